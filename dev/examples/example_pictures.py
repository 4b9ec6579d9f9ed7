"""The picture of an example: what a real run of it has saved, under a few words, small enough to publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 640, 400
PAPER, INK, MARGIN, LINE = (32, 33, 38), (228, 230, 236), 20, 26
SHARPEST = 64  # pictures up to this side are enlarged pixel by pixel
Saved = Mapping[str, list[Image.Image]]  # pictures by the title of the node that shows them


def rows(*lines: tuple[str, str]) -> Callable[[Saved], Image.Image]:
    """(words, title of a node): a row of pictures of each node below its words."""

    def draw(saved: Saved) -> Image.Image:
        canvas = Image.new("RGB", SIZE, PAPER)
        pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(17)
        room = (SIZE[1] - 2 * MARGIN) // len(lines)
        for number, (words, title) in enumerate(lines):
            top, pictures = MARGIN + number * room, saved[title]
            pen.text((MARGIN, top), words, fill=INK, font=font)
            side = min(room - LINE - 8, (SIZE[0] - 2 * MARGIN) // min(len(pictures), 5) - 8)
            for index in range(min(len(pictures), (SIZE[0] - 2 * MARGIN) // (side + 8))):
                canvas.paste(_fitted(pictures[index], (side, side)), (MARGIN + index * (side + 8), top + LINE))
        return canvas

    return draw


def sheet(title: str, words: str) -> Callable[[Saved], Image.Image]:
    """The one picture that a node shows, as large as it fits."""

    def draw(saved: Saved) -> Image.Image:
        canvas = Image.new("RGB", SIZE, PAPER)
        ImageDraw.Draw(canvas).text((MARGIN, 14), words, fill=INK, font=ImageFont.load_default(17))
        room = SIZE[0] - 2 * MARGIN, SIZE[1] - MARGIN - 44
        picture = _fitted(saved[title][0], room)
        canvas.paste(picture, ((SIZE[0] - picture.width) // 2, 44))
        return canvas

    return draw


def _fitted(picture: Image.Image, room: tuple[int, int]) -> Image.Image:
    factor = min(room[0] / picture.width, room[1] / picture.height)
    way = Image.Resampling.NEAREST if max(picture.size) <= SHARPEST else Image.Resampling.LANCZOS
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.convert("RGB").resize((width, height), way)


def write(picture: Image.Image, path: Path, most: int = 60_000) -> None:
    """As JPEG, at the best quality that stays below ``most`` bytes."""
    for quality in (92, 85, 75, 65, 50):
        picture.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= most:
            return
    raise ValueError(f"{path.name} is {path.stat().st_size} bytes at quality 50, at most {most} are wanted")
