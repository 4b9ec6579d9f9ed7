"""A contact sheet: every crop exactly as it is trained, with its caption: trigger, prefix and suffix included, nothing
shuffled or dropped.

- grouped by bucket, largest group first, each with its size and the number of its images
- all thumbnails cover about the same area, so aspect ratios compare
- what a mask keeps from being learned is tinted; regularisation and validation images, repeats and enlargements are
  marked
- one page of at most ``limit`` crops
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .balancing import with_still_validation
from .batches import Item, place_all
from .captions import shown
from .draws import Draws
from .model import Concept, Dataset, DatasetError, Size, some
from .pixels import Pixels, load_many

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PAGE, PLATE, LINE = (24, 25, 29), (36, 38, 44), (66, 70, 80)
TEXT, FAINT = (236, 238, 242), (158, 164, 176)
TINT: Colour = (235, 64, 120)  # over what is not learned
TINT_STRENGTH = 0.6
MARKS: dict[str, Colour] = {"regularisation": (52, 120, 246), "validation": (150, 84, 220)}
REPEATS_MARK, ENLARGED_MARK = (46, 140, 90), (200, 120, 20)

CELL = 208  # side of a square thumbnail
GAP = 14
MARGIN = 22
PADDING = 6
CAPTION_LINES, LINE_HEIGHT = 3, 17
NO_CAPTION = "(no caption)"
COLUMNS = 6
LIMIT = 60
MOST = 400
ENLARGED = 1.05  # scale from which an enlargement is marked


@dataclass(frozen=True)
class _Group:
    bucket: Size
    items: tuple[Item, ...]
    total: int  # items of this bucket on all pages


def contact_sheet(
    dataset: Dataset,
    batch_size: int = 1,
    seed: int = 0,
    limit: int = LIMIT,
    page: int = 1,
    columns: int = COLUMNS,
    advance: Callable[[], None] = lambda: None,
) -> Tensor:
    """(height, width, 3) in [0, 1]; ``advance`` is called for each crop and may raise."""
    if not 1 <= limit <= MOST:
        raise DatasetError(f"limit is {limit}, expected 1 to {MOST}; further images are on further pages")
    if not 1 <= columns <= 24:
        raise DatasetError(f"columns is {columns}, expected 1 to 24")
    dataset = with_still_validation(dataset)
    items = place_all(dataset, batch_size)
    pages = max(1, -(-len(items) // limit))
    if not 1 <= page <= pages:
        raise DatasetError(f"page is {page}, expected 1 to {pages} with a limit of {limit}")
    groups = _groups(items, limit, page)
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    title = f"{some(dataset.samples, 'image')}, {some({item.bucket for item in items}, 'bucket')}"
    title += f" · page {page} of {pages}" if pages > 1 else ""
    fonts = _Fonts()
    strips = [_heading(title, width, fonts.large, TEXT, 46)]
    pictures = load_many(dataset, ((item, 0) for group in groups for item in group.items), seed)
    for group in groups:
        strips.append(_heading(_group_title(group, batch_size), width, fonts.small, FAINT, 34, line=True))
        strips += _rows(dataset, group, width, pictures, fonts, advance)
    sheet = Image.new("RGB", (width, MARGIN + sum(strip.height for strip in strips)), PAGE)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return torch.from_numpy(np.asarray(sheet, np.float32) / 255)


class _Fonts:
    """Pillow's own typeface, so that a sheet looks the same everywhere; it has no sign for times."""

    def __init__(self) -> None:
        self.large, self.small, self.mark = (ImageFont.load_default(size) for size in (18, 13, 12))


def _groups(items: tuple[Item, ...], limit: int, page: int) -> list[_Group]:
    """The page's share of the items, by bucket; the order of buckets and items is that of the whole sheet."""
    found: dict[Size, list[Item]] = {}
    for item in items:
        found.setdefault(item.bucket, []).append(item)
    order = sorted(found, key=lambda bucket: (-len(found[bucket]), bucket))
    flat = [item for bucket in order for item in found[bucket]][(page - 1) * limit : page * limit]
    groups = []
    for bucket in order:
        on_page = tuple(item for item in flat if item.bucket == bucket)
        if on_page:
            groups.append(_Group(bucket, on_page, len(found[bucket])))
    return groups


def _group_title(group: _Group, batch_size: int) -> str:
    width, height = group.bucket
    title = f"{width} x {height} · {some(range(group.total), 'image')}"
    return title if batch_size == 1 else f"{title} · batches of {batch_size}"


def _heading(text: str, width: int, font: Font, colour: Colour, height: int, line: bool = False) -> Image.Image:
    strip = Image.new("RGB", (width, height), PAGE)
    draw = ImageDraw.Draw(strip)
    draw.text((MARGIN, height - 8), text, colour, font, anchor="ls")
    if line:
        start = MARGIN + draw.textlength(text, font) + 12
        draw.line((start, height - 12, width - MARGIN, height - 12), LINE)
    return strip


def _rows(
    dataset: Dataset, group: _Group, width: int, pictures: Iterator[Pixels], fonts: _Fonts, advance: Callable[[], None]
) -> list[Image.Image]:
    thumbnail = _thumbnail_size(group.bucket, width - 2 * MARGIN)
    columns = max(1, (width - 2 * MARGIN + GAP) // (thumbnail[0] + GAP))
    rows = []
    for start in range(0, len(group.items), columns):
        row_items = group.items[start : start + columns]
        texts = [_caption_lines(_caption(dataset, item), thumbnail[0], fonts) for item in row_items]
        cells = []
        for item, lines in zip(row_items, texts, strict=True):
            picture = _picture(next(pictures)).resize(thumbnail, Image.Resampling.LANCZOS)
            cells.append(_cell(dataset, item, picture, lines, max(map(len, texts)), fonts))
            advance()
        row = Image.new("RGB", (width, max(cell.height for cell in cells) + GAP), PAGE)
        for column, cell in enumerate(cells):
            row.paste(cell, (MARGIN + column * (thumbnail[0] + GAP), 0))
        rows.append(row)
    return rows


def _thumbnail_size(bucket: Size, widest: int) -> Size:
    """The bucket's shape with the area of a square cell, no wider than the sheet."""
    scale = min(CELL / (bucket[0] * bucket[1]) ** 0.5, widest / bucket[0])
    return max(1, round(bucket[0] * scale)), max(1, round(bucket[1] * scale))


def _caption(dataset: Dataset, item: Item) -> str:
    """What is shown of the caption where nothing is left to chance; brackets as they are written."""
    sample = dataset.samples[item.sample]
    options = dataclasses.replace(dataset.of(sample).captions.still, weighted=True)
    return shown(sample.caption, options, Draws("contact sheet", sample.id)).strip()


def _caption_lines(caption: str, width: int, fonts: _Fonts) -> list[str]:
    return wrap(caption or NO_CAPTION, fonts.small, width - 2 * PADDING, CAPTION_LINES)


def _cell(
    dataset: Dataset, item: Item, picture: Image.Image, lines: list[str], most_lines: int, fonts: _Fonts
) -> Image.Image:
    sample = dataset.samples[item.sample]
    cell = Image.new("RGB", (picture.width, picture.height + most_lines * LINE_HEIGHT + 2 * PADDING), PLATE)
    cell.paste(picture, (0, 0))
    draw = ImageDraw.Draw(cell)
    for number, line in enumerate(lines, 1):
        baseline = picture.height + PADDING + number * LINE_HEIGHT - 4
        draw.text((PADDING, baseline), line, FAINT if lines == [NO_CAPTION] else TEXT, fonts.small, anchor="ls")
    left = 5
    for text, colour in _marks(dataset.of(sample), item, sample.size):
        wide = round(draw.textlength(text, fonts.mark)) + 10
        draw.rounded_rectangle((left, 5, left + wide, 22), 4, colour)
        draw.text((left + 5, 18), text, (255, 255, 255), fonts.mark, anchor="ls")
        left += wide + 4
    return cell


def _picture(pixels: Pixels) -> Image.Image:
    image = pixels.image
    if pixels.mask is not None:
        hidden = (1 - pixels.mask[..., None]) * TINT_STRENGTH
        image = image * (1 - hidden) + torch.tensor(TINT) / 255 * hidden
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _marks(concept: Concept, item: Item, size: Size) -> list[tuple[str, Colour]]:
    marks = []
    if concept.kind in MARKS:
        marks.append((concept.kind, MARKS[concept.kind]))
    if concept.repeats != 1 and concept.kind == "training":
        marks.append((f"{float(concept.repeats):.3g}x", REPEATS_MARK))
    scale = item.resized[0] / size[0]
    if scale > ENLARGED:
        marks.append((f"enlarged {scale:.2f}x", ENLARGED_MARK))
    return marks


def wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Text broken between words, or inside those that are too long; the last line ends with … where more follows."""
    found: list[str] = []
    rest = " ".join(printable(text).split())
    while rest and len(found) < lines:
        fits = _fitting(rest, font, width)
        if fits < len(rest):
            space = rest.rfind(" ", 0, fits + 1)
            fits = space if space > 0 else fits
        found.append(rest[:fits].rstrip())
        rest = rest[fits:].lstrip()
    if rest:
        last = found[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        found[-1] = last.rstrip(" ,") + "…"
    return found


def printable(text: str) -> str:
    """Without what cannot be drawn: halves of surrogate pairs, control characters."""
    text = text.encode("utf-8", "replace").decode()
    return "".join(character if character.isprintable() or character.isspace() else "?" for character in text)


def _fitting(text: str, font: Font, width: int) -> int:
    """How many characters of ``text`` fit, at least one."""
    low, high = 1, min(len(text), width)  # no character is narrower than a pixel
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
