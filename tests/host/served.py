"""Data sets for the live server."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

from drawings import CONCEPT, caption, draw
from live_server import Server


def put_drawings(server: Server, root: str, folder: str, count: int) -> None:
    """``count`` captioned drawings in a folder below ``root``, listed by the server when this returns."""
    place, rng = server.base / root / folder, random.Random(1)
    place.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        draw(CONCEPT, "white", 32, rng).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(caption(CONCEPT, "white"))
    for _ in range(100):  # the list of folders is renewed every few seconds
        kind, options = server.get("/object_info/LoomDatasetLoader")["LoomDatasetLoader"]["input"]["required"]["folder"]
        if folder in (kind if isinstance(kind, list) else options["options"]):
            return
        time.sleep(0.1)
    raise TimeoutError(f"the server does not list {folder}")


def tiny_upscale_model(path: Path) -> Path:
    """An upscale model of the RealESRGAN kind that doubles the size and adds nothing: every pixel becomes four."""
    weights = {}
    for layer, (to, of) in {0: (4, 3), 2: (4, 4), 4: (12, 4)}.items():  # a convolution, another, four pixels of colours
        weights |= {f"body.{layer}.weight": torch.zeros(to, of, 3, 3), f"body.{layer}.bias": torch.zeros(to)}
    weights |= {f"body.{layer}.weight": torch.zeros(4) for layer in (1, 3)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(weights, path)
    return path
