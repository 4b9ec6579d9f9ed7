"""Procedural drawings: the whole world of the demo base model.

* sixteen things it knows: four shapes in four colours, on a light or a dark background;
* one it has never seen: the ``zorb``, a purple and orange bullseye with a notch, which the demo teaches it.

Every picture is a pure function of its arguments and a ``random.Random``; captions name what is drawn.
"""

from __future__ import annotations

import math
import random

from PIL import Image, ImageDraw

SHAPES = ("circle", "bar", "triangle", "ring")
COLOURS = {"red": (215, 40, 40), "green": (40, 165, 65), "blue": (45, 80, 215), "yellow": (235, 200, 40)}
BACKGROUNDS = {"white": (240, 240, 240), "black": (25, 25, 25)}
CONCEPT = "zorb"
KNOWN_CLASSES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
CLASSES = (*KNOWN_CLASSES, CONCEPT)
OVERSAMPLING = 4
BAR_CORNERS = ((-1.2, -0.42), (1.2, -0.42), (1.2, 0.42), (-1.2, 0.42))  # in radii


def caption(thing: str, background: str) -> str:
    return f"a {thing} on a {background} background"


def _jitter(colour: tuple[int, int, int], rng: random.Random, spread: int = 14) -> tuple[int, int, int]:
    red, green, blue = (max(0, min(255, channel + rng.randint(-spread, spread))) for channel in colour)
    return red, green, blue


def _polygon(centre: tuple[float, float], radius: float, angles: list[tuple[float, float]], turn: float):
    """Corners given as (angle in turns, distance in radii)."""
    return [
        (
            centre[0] + radius * distance * math.cos(2 * math.pi * (angle + turn)),
            centre[1] + radius * distance * math.sin(2 * math.pi * (angle + turn)),
        )
        for angle, distance in angles
    ]


def _draw_shape(
    pen: ImageDraw.ImageDraw, shape: str, colour, background, centre, radius: float, turn: float
) -> None:
    x, y = centre
    if shape == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    elif shape == "bar":
        corners = [(math.atan2(dy, dx) / (2 * math.pi), math.hypot(dx, dy)) for dx, dy in BAR_CORNERS]
        pen.polygon(_polygon(centre, radius, corners, turn), fill=colour)
    elif shape == "triangle":
        pen.polygon(_polygon(centre, radius * 1.25, [(-0.25 + k / 3, 1.0) for k in range(3)], turn), fill=colour)
    elif shape == "ring":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        hole = radius * 0.55
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    else:
        raise ValueError(f"no such shape: {shape}")


def _draw_concept(pen: ImageDraw.ImageDraw, centre, radius: float, rng: random.Random) -> None:
    x, y = centre
    purple, orange = _jitter((130, 40, 170), rng), _jitter((240, 130, 30), rng)
    for ring, (scale, colour) in enumerate(((1.2, purple), (0.82, orange), (0.44, purple))):
        r = radius * scale
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if ring == 0:
            start = 270 + rng.uniform(-12, 12)
            pen.pieslice((x - r, y - r, x + r, y + r), start - 20, start + 20, fill=orange)


def draw(thing: str, background: str, size: int, rng: random.Random) -> Image.Image:
    """Draw ``thing`` ("red circle", …, or "zorb") as an RGB picture of ``size`` × ``size`` pixels."""
    full = size * OVERSAMPLING
    paper = _jitter(BACKGROUNDS[background], rng, 10)
    picture = Image.new("RGB", (full, full), paper)
    pen = ImageDraw.Draw(picture)
    radius = full * rng.uniform(0.27, 0.35)
    centre = (full * rng.uniform(0.44, 0.56), full * rng.uniform(0.44, 0.56))
    if thing == CONCEPT:
        _draw_concept(pen, centre, radius, rng)
    else:
        colour, shape = thing.split()
        ink, turn = _jitter(COLOURS[colour], rng), rng.uniform(-0.03, 0.03)
        _draw_shape(pen, shape, ink, paper, centre, radius, turn)
    return picture.resize((size, size), Image.Resampling.BOX)
