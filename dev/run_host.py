"""Start the ComfyUI host that is in the working directory, also where torch has no CUDA.

The package index's torchvision is built for CUDA and refuses to import beside a CPU-only torch, because two of its
operators are then missing; their schemas are enough. Newer hosts import torchaudio even where nothing uses sound: an
empty stand-in does. ``python run_host.py --cpu --listen 127.0.0.1 --port N …`` takes ComfyUI's own arguments.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import runpy
import sys
import types


def prepare_imports() -> None:
    """Make torchvision and torchaudio importable beside a CPU-only torch; safe to call twice."""
    import torch

    if not torch.version.cuda and "torchvision" not in sys.modules:
        for operator in ("nms", "qnms"):
            try:
                torch.library.define(
                    f"torchvision::{operator}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
            except RuntimeError:  # defined already
                continue
    if importlib.util.find_spec("torchaudio") is None and "torchaudio" not in sys.modules:
        audio = _stand_in("torchaudio")
        audio.functional, audio.transforms = _stand_in("torchaudio.functional"), _stand_in("torchaudio.transforms")


def _stand_in(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    sys.modules[name] = module
    return module


if __name__ == "__main__":
    sys.argv = ["main.py", *sys.argv[1:]]
    sys.path.insert(0, os.getcwd())
    prepare_imports()
    runpy.run_path("main.py", run_name="__main__")
