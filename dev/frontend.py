"""Another page for the host than the one it came with: ``frontend.py latest``, or a version such as ``1.49.6``.

Prints the folder of its files, in ``.dev/frontends``, fetched from the package index when it is not there yet. A live
server that finds this folder in ``LOOM_FRONTEND`` serves it. ``latest`` asks the index each time.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from bootstrap import STATE, pip, say, venv_python

PACKAGE = "comfyui-frontend-package"
FOLDER = STATE / "frontends"
STATIC = "comfyui_frontend_package/static"
LATEST = "latest"


def newest() -> str:
    """The newest version on the package index."""
    command = [venv_python(), "-m", "pip", "--disable-pip-version-check", "index", "versions", PACKAGE]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    found = re.match(rf"{PACKAGE} \(([\w.]+)\)", answer)
    if found is None:
        raise SystemExit(f"the package index names no version of {PACKAGE}: write one, such as FRONTEND=1.49.6")
    return found[1]


def fetched(wanted: str) -> Path:
    """The folder of a version's files."""
    version = newest() if wanted == LATEST else wanted
    if not re.fullmatch(r"\d+(?:\.\w+)*", version):
        raise SystemExit(f"FRONTEND={wanted} is no version: write {LATEST}, or one such as 1.49.6")
    place = FOLDER / version
    if not (place / STATIC / "index.html").exists():
        say(f"fetching {PACKAGE} {version}")
        shutil.rmtree(place, ignore_errors=True)
        pip("install", "-q", "--no-deps", "--target", place, f"{PACKAGE}=={version}")
    return place / STATIC


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(f"usage: frontend.py {LATEST} | VERSION")
    sys.stdout.write(f"{fetched(sys.argv[1])}\n")
