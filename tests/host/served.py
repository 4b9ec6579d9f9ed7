"""Data sets for the live server."""

from __future__ import annotations

import random
import time

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
