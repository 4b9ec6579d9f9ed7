"""The folders of pictures that the examples name, drawn anew: two things to learn, a style, and what is known."""

from __future__ import annotations

import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from drawings import BACKGROUNDS, CONCEPT, KNOWN_CLASSES, caption, draw

SIZE = 32
STYLE, SECOND = "blueprint", "mell"
DEEP, PALE = (18, 52, 120), (222, 236, 255)


def blueprint(picture: Image.Image) -> Image.Image:
    """Pale on deep blue, whatever the colours were."""
    grey = ImageOps.autocontrast(picture.convert("L"))
    if sum(grey.crop((0, 0, 4, 4)).tobytes()) > 16 * 128:  # the paper is the dark part
        grey = ImageOps.invert(grey)
    return ImageOps.colorize(grey, DEEP, PALE)


def mell(background: str, rng: random.Random) -> Image.Image:
    """A disc, teal above and pink below: the second thing the demo base has never seen."""
    full = SIZE * 4
    picture = Image.new("RGB", (full, full), BACKGROUNDS[background])
    pen = ImageDraw.Draw(picture)
    (x, y), radius = (full * rng.uniform(0.45, 0.55) for _ in range(2)), full * rng.uniform(0.3, 0.38)
    disc = (x - radius, y - radius, x + radius, y + radius)
    pen.ellipse(disc, fill=(20, 150, 150))
    pen.pieslice(disc, 0, 180, fill=(240, 110, 170))
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX)


def pictures(name: str, count: int) -> list[tuple[Image.Image, str]]:
    """``count`` pictures of the folder ``name``, with their captions."""
    rng, papers, found = random.Random(2024), list(BACKGROUNDS), []
    for index in range(count):
        paper = papers[index % 2]
        thing = KNOWN_CLASSES[index // 2 % len(KNOWN_CLASSES)]
        if name == CONCEPT:
            found.append((draw(CONCEPT, paper, SIZE, rng), caption(CONCEPT, paper)))
        elif name == SECOND:
            found.append((mell(paper, rng), caption(SECOND, paper)))
        elif name == STYLE:
            found.append((blueprint(draw(thing, paper, SIZE, rng)), caption(thing, paper)))
        else:
            found.append((draw(thing, paper, SIZE, rng), caption(thing, paper)))
    return found


def write(root: Path, name: str, count: int) -> None:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    for index, (picture, text) in enumerate(pictures(name, count)):
        picture.save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(text)
