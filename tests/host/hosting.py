"""Put the real ComfyUI host into this test process.

``COMFYUI_DIR`` names it, else ``.dev/host-path`` as ``make setup`` wrote it. It runs on the CPU unless
``LOOM_TEST_DEVICE=cuda``, and its base directory is a temporary folder, so that no test writes into the host.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

import run_host

ROOT = Path(__file__).resolve().parent.parent.parent
BASE_FOLDERS = ("custom_nodes", "input", "models/checkpoints", "models/loras", "output", "temp", "user")


def host_folder() -> Path:
    recorded = ROOT / ".dev" / "host-path"
    chosen = os.environ.get("COMFYUI_DIR") or (recorded.read_text().strip() if recorded.exists() else "")
    if not chosen or not (Path(chosen) / "comfyui_version.py").exists():
        pytest.exit(f"no ComfyUI host at {chosen or recorded}: run `make setup`, or set COMFYUI_DIR to one", 3)
    return Path(chosen).resolve()


def prepare_host() -> Path:
    """Make ``import comfy`` mean the host; call before anything of it is imported. Safe to call twice."""
    host = host_folder()
    if str(host) in sys.path:
        return host
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
    sys.path.insert(0, str(host))
    run_host.prepare_imports()

    import comfy.options

    comfy.options.args_parsing = False
    from comfy.cli_args import args

    base = Path(tempfile.mkdtemp(prefix="loom-tests-"))
    atexit.register(shutil.rmtree, base, ignore_errors=True)
    for folder in BASE_FOLDERS:
        (base / folder).mkdir(parents=True)
    args.base_directory = str(base)
    args.cpu = os.environ.get("LOOM_TEST_DEVICE") != "cuda"
    args.use_pytorch_cross_attention = True
    return host
