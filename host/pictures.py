"""Pictures that nodes show, drawn with Pillow and its own typeface; dark cards, readable on any theme.

* ``bar_picture(shares, title)``: how much each block changes; groups in colours of their own, the two extremes with
  numbers, a logarithmic scale where the shares span more than ``SPAN``
* ``schedule_picture(parts, clock, title)``: weights over the steps of a run, a line for each part
* ``grid(cells, columns)``: pictures with a label and a number under each; ``below``: one below the other;
  ``as_image``: as IMAGE
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..kernels.block_names import BASE
from ..kernels.strengths.schedule import Clock, Schedule
from ..training.dataset.sheet import FAINT, LINE, PAGE, PLATE, TEXT, Colour, Font, printable, wrap
from .diagnosis import BlockShare, percent

WIDTH, SPAN = 896, 100
STEPS = 20  # of a run of which nothing is known
MOST_LINES, MOST_CELLS = 12, 400
NARROWEST, WIDEST = 7, 120  # bars with the gaps between them; a picture grows where it has to
TINY = 1e-300  # smaller ones have no logarithm that can be reckoned with
LEAST = 1e-12  # of the strongest block: what a logarithmic scale goes down to
FEW = 6  # blocks that all get their numbers
_MARGIN, _AXIS, _PLOT = 20, 62, 260
_LEFT = _MARGIN + _AXIS
_ROLES: dict[str, Colour] = {
    "in": (96, 165, 250),
    "mid": (250, 204, 21),
    "out": (74, 222, 128),
    "aux": (192, 132, 252),
    BASE: (161, 161, 170),
}
# of groups without a role of their own (double, single, layers, …) and of lines
_OTHERS: tuple[Colour, ...] = ((56, 189, 248), (251, 146, 60), (52, 211, 153), (244, 114, 182), (163, 230, 53))
_LINES: tuple[Colour, ...] = (*_OTHERS, (250, 204, 21), (192, 132, 252), (248, 113, 113), (226, 232, 240))


def _font(size: int) -> Font:
    return ImageFont.load_default(size)


# -- bars


def bar_picture(
    shares: Sequence[BlockShare],
    title: str,
    names: Mapping[str, str] | None = None,
    what: str = "|dW| / |W| by block",
    number: Callable[[float], str] = percent,
) -> Image.Image:
    """``names``: id of a block → what to call it, as ``diagnosis.Shares`` has them. Shares that are no numbers, and
    those of weights that are zero, are left to the words. ``what`` is drawn, and how its numbers are written."""
    known = [block for block in shares if math.isfinite(block.share)]
    shown = [block.share for block in known if block.share > 0]
    row = _Row(known)
    legend = _flow([(_group(block), row.colours[_group(block)]) for block in _firsts(known)], row.width)
    top = 54 + 20 * len(legend) + 22
    bottom = top + _PLOT
    image = Image.new("RGB", (row.width, bottom + 46), PAGE)
    draw = ImageDraw.Draw(image)
    _draw_title(draw, title, row.width)
    _draw_flow(draw, legend, 56)
    if not shown:
        draw.text((row.width // 2, top + _PLOT // 2), "nothing is changed", FAINT, _font(16), "mm")
        return image
    scale = _Scale(min(shown), max(shown))
    for value in scale.ticks:
        _draw_tick(draw, bottom - scale.part(value) * _PLOT, number(value), row.width)
    tops = [bottom - max(1.0, scale.part(block.share) * _PLOT if block.share else 0) for block in known]
    for block, x, y in zip(known, row.places, tops, strict=True):
        draw.rectangle((x, y, x + row.bar, bottom), row.colours[_group(block)])
    draw.line((_LEFT, bottom, row.width - _MARGIN, bottom), FAINT)
    _draw_numbers(draw, known, row, bottom)
    _draw_values(draw, known, names or {}, row, tops, number)
    draw.text((_MARGIN, bottom + 40), what + (", logarithmic" if scale.logarithmic else ""), FAINT, _font(12), "ls")
    return image


class _Row:
    """Where the bars stand, side by side and a little apart between groups, and their colours."""

    def __init__(self, blocks: Sequence[BlockShare]) -> None:
        gaps = max(0, len(_firsts(blocks)) - 1) / 2
        room = (WIDTH - _MARGIN - _LEFT) / max(1.0, len(blocks) + gaps)
        pitch = min(WIDEST, max(NARROWEST, room))
        self.pitch, self.bar = pitch, pitch - max(1.0, pitch / 5) - 1
        self.places: list[float] = []
        x = float(_LEFT)
        for number, block in enumerate(blocks):
            x += pitch / 2 if number and _group(block) != _group(blocks[number - 1]) else 0
            self.places.append(x)
            x += pitch
        self.width = max(WIDTH, math.ceil(x - 0.5) + _MARGIN)
        self.colours: dict[str, Colour] = {}
        for block in _firsts(blocks):
            own = _ROLES.get(block.role)
            taken = self.colours.values()
            free = [colour for colour in _OTHERS if colour not in taken] or [*_OTHERS]
            self.colours[_group(block)] = own if own and own not in taken else free[0]


class _Scale:
    """Shares to parts of the plot's height."""

    def __init__(self, low: float, high: float) -> None:
        self.logarithmic = high > SPAN * low
        if self.logarithmic:
            self._low, self._high = math.floor(math.log10(max(low, high * LEAST)) - 0.2), math.log10(high * 1.25)
            decades = range(self._low, math.floor(self._high) + 1)
            self.ticks = [10.0**decade for decade in decades][:: 1 + len(decades) // 8]
        else:
            step = _step(max(high, TINY))
            self._high = high * 1.12
            self.ticks = [step * number for number in range(int(self._high / step) + 1)]

    def part(self, share: float) -> float:
        if self.logarithmic:
            return max(0.0, (math.log10(share) - self._low) / (self._high - self._low))
        return share / self._high


def _group(block: BlockShare) -> str:
    """The stack a block is of."""
    name, _, number = block.block.rpartition(".")
    return name if number.isdigit() else block.block


def _firsts(blocks: Sequence[BlockShare]) -> list[BlockShare]:
    """One of each group, in order."""
    return list({_group(block): block for block in reversed(blocks)}.values())[::-1]


def _draw_title(draw: ImageDraw.ImageDraw, title: str, width: int) -> None:
    for line in wrap(title, _font(18), width - 2 * _MARGIN, 1):
        draw.text((_MARGIN, 34), line, TEXT, _font(18), "ls")


def _draw_tick(draw: ImageDraw.ImageDraw, y: float, text: str, width: int, colour: Colour = LINE) -> None:
    draw.line((_LEFT, y, width - _MARGIN, y), colour)
    draw.text((_LEFT - 8, y), text, FAINT, _font(12), "rm")


def _draw_numbers(draw: ImageDraw.ImageDraw, blocks: Sequence[BlockShare], row: _Row, bottom: int) -> None:
    """A block's number in its group under the bar, as many as there is room for."""
    apart = max(1, math.ceil(20 / row.pitch))
    for block, x in zip(blocks, row.places, strict=True):
        number = block.block.removeprefix(_group(block)).lstrip(".")
        if number and int(number) % apart == 0:
            draw.text((x + row.bar / 2, bottom + 13), number, FAINT, _font(11), "mm")


def _draw_values(
    draw: ImageDraw.ImageDraw,
    blocks: Sequence[BlockShare],
    names: Mapping[str, str],
    row: _Row,
    tops: Sequence[float],
    number: Callable[[float], str],
) -> None:
    """Names and numbers of the strongest and the weakest block, of all where there are few; over what is below them,
    with a line down to the bar."""
    changed = sorted((place for place, block in enumerate(blocks) if block.share > 0), key=lambda n: -blocks[n].share)
    font = _font(13)
    taken: list[tuple[float, float, float]] = []
    for place in changed if len(changed) <= FEW else dict.fromkeys((changed[0], changed[-1])):
        block = blocks[place]
        text = f"{names.get(block.block, block.block)}  {number(block.share)}"
        half = font.getlength(text) / 2 + 5
        middle = row.places[place] + row.bar / 2
        x = min(max(middle, _LEFT + half), row.width - _MARGIN - half)
        y = min(top for at, top in zip(row.places, tops, strict=True) if x - half - row.bar < at < x + half) - 14
        while any(abs(x - other) < half + wide and abs(y - high) < 20 for other, high, wide in taken):
            y -= 21
        taken.append((x, y, half))
        if y + 14 < tops[place]:
            draw.line((middle, y, middle, tops[place]), TEXT)
        draw.rounded_rectangle((x - half, y - 9, x + half, y + 9), 4, PLATE, LINE)
        draw.text((x, y), text, TEXT, font, "mm")


Flow = list[list[tuple[float, str, Colour]]]


def _flow(entries: Sequence[tuple[str, Colour]], width: int, font_size: int = 13) -> Flow:
    """A legend, entry behind entry, in as many lines as it takes: (x, text, colour)."""
    lines: Flow = [[]]
    x: float = _MARGIN
    font = _font(font_size)
    for text, colour in entries:
        text = wrap(text, font, width - 2 * _MARGIN - 20, 1)[0]
        wide = font.getlength(text) + 38
        if lines[-1] and x + wide - 18 > width - _MARGIN:
            lines.append([])
            x = _MARGIN
        lines[-1].append((x, text, colour))
        x += wide
    return lines


def _draw_flow(draw: ImageDraw.ImageDraw, lines: Flow, top: int, font_size: int = 13) -> None:
    for row, entries in enumerate(lines):
        y = top + 20 * row
        for x, text, colour in entries:
            draw.rounded_rectangle((x, y - 5, x + 11, y + 6), 2, colour)
            draw.text((x + 18, y), text, TEXT, _font(font_size), "lm")


# -- schedules


def schedule_picture(parts: Mapping[str, Schedule], clock: Clock | None = None, title: str = "") -> Image.Image:
    """Weights as the model sees them: one per step. ``clock`` None: of the run nothing is known yet.

    Raises ValueError without parts.
    """
    if not parts:
        raise ValueError("there is no schedule to draw")
    units = {point.unit for schedule in parts.values() if schedule.constant is None for point in schedule.points}
    run = clock or Clock(_assumed(parts))
    steps = max(1, run.steps)
    lines = {
        name: [schedule.at(run, sigma) for sigma in run.sigmas[:steps]]
        for name, schedule in list(parts.items())[:MOST_LINES]
    }
    colours = [_LINES[number % len(_LINES)] for number in range(len(lines))]
    legend = _flow([(f"{name}: {parts[name]}", colour) for name, colour in zip(lines, colours, strict=True)], WIDTH)
    top = 54 + 20 * len(legend) + 10
    axes = [_Axis("step", [str(number + 1) for number in range(steps)])]
    if "fraction" in units:
        axes.append(_Axis("of the run", [f"{number / steps:.0%}".replace("%", " %") for number in range(steps)]))
    if "sigma" in units:
        axes.append(_Axis("sigma", [_number(sigma) for sigma in run.sigmas[:steps]]))
    notes = _notes(parts, clock, "sigma" in units)
    image = Image.new("RGB", (WIDTH, top + _PLOT + 22 * len(axes) + 20 * len(notes) + 18), PAGE)
    draw = ImageDraw.Draw(image)
    _draw_title(draw, title, WIDTH)
    _draw_flow(draw, legend, 56)
    bottom = top + _PLOT
    wide = (WIDTH - _MARGIN - _LEFT) / steps
    low, high, ticks = _range([weight for line in lines.values() for weight in line])
    for value in ticks:
        y = bottom - (value - low) / (high - low) * _PLOT
        _draw_tick(draw, y, _number(value), WIDTH, FAINT if value == 0 else LINE)
    for row, axis in enumerate(axes):
        _draw_axis(draw, axis, wide, bottom + 14 + 22 * row)
    for number, (line, colour) in enumerate(zip(lines.values(), colours, strict=True)):
        thick = 2 + 2 * (len(lines) - 1 - number) if len(lines) <= 4 else 2  # equal lines show each other's edges
        heights = [bottom - (weight - low) / (high - low) * _PLOT for weight in line]
        points = [(_LEFT + wide * place, height) for step, height in enumerate(heights) for place in (step, step + 1)]
        draw.line(points, colour, thick)
    for row, note in enumerate(notes):
        draw.text((_MARGIN, bottom + 22 * len(axes) + 20 * (row + 1)), note, FAINT, _font(12), "ls")
    return image


class _Axis:
    def __init__(self, name: str, labels: Sequence[str]) -> None:
        self.name, self.labels = name, labels


def _draw_axis(draw: ImageDraw.ImageDraw, axis: _Axis, wide: float, y: int) -> None:
    font = _font(11)
    draw.text((_MARGIN, y), wrap(axis.name, font, _AXIS - 4, 1)[0], FAINT, font, "lm")
    room = max(font.getlength(label) for label in axis.labels) + 10
    apart = max(1, math.ceil(room / wide))
    for number, label in enumerate(axis.labels):
        if number % apart == 0:
            draw.text((_LEFT + wide * (number + 0.5), y), label, FAINT, font, "mm")


def _assumed(parts: Mapping[str, Schedule]) -> list[float]:
    """Noise levels of a run that nobody has begun: such that the levels in the schedules lie well inside."""
    levels = [point.position for schedule in parts.values() for point in schedule.points if point.unit == "sigma"]
    levels = [level for level in levels if level > 0]
    if not levels:
        return [float(STEPS - step) for step in range(STEPS + 1)]
    high, low = max(levels) * 2, min(levels) / 4
    return [*(high * (low / high) ** (step / (STEPS - 1)) for step in range(STEPS)), 0.0]


def _notes(parts: Mapping[str, Schedule], clock: Clock | None, by_level: bool) -> list[str]:
    notes = []
    if clock is None:
        assumed = f"{STEPS} steps{' and their noise levels' if by_level else ''} are assumed"
        notes.append(f"{assumed}: the sampler's own are not known before it runs")
    if len(parts) > MOST_LINES:
        notes.append(f"{len(parts) - MOST_LINES} further parts are not drawn")
    return notes


def _range(weights: Sequence[float]) -> tuple[float, float, list[float]]:
    """(lowest, highest, ticks) of an axis with zero on it."""
    low, high = min(0.0, *weights), max(0.0, *weights)
    step = _step(high - low or 1.0)
    first, last = math.floor(low / step - 1e-9) if low < 0 else 0, math.ceil(high / step + 0.05) if high > 0 else 0
    if first == last:
        last = 1
    return first * step, last * step, [step * number for number in range(first, last + 1)]


def _step(extent: float) -> float:
    """Between the ticks of an axis: 1, 2 or 5 with zeros, six of them at most."""
    power = 10.0 ** math.floor(math.log10(extent))
    return next(power * size for size in (0.2, 0.5, 1, 2) if extent <= 6 * power * size)


def _number(value: float) -> str:
    return f"{value:.3g}"


# -- grids


def grid(cells: Sequence[tuple[str, Image.Image, float | None]], columns: int, side: int = 256) -> Image.Image:
    """Pictures of one size each in a cell of ``side`` pixels, its label below, and its number with a bar as long as it
    is large; None has none. Raises ValueError for no picture, too many, or impossible columns."""
    if not 1 <= len(cells) <= MOST_CELLS:
        raise ValueError(f"{len(cells)} pictures, expected 1 to {MOST_CELLS}")
    if not 1 <= columns <= 24:
        raise ValueError(f"columns is {columns}, expected 1 to 24")
    columns = min(columns, len(cells))
    scale = side / max(max(picture.size) for _, picture, _ in cells)
    wide, high = (max(1, round(max(sizes) * scale)) for sizes in zip(*(p.size for _, p, _ in cells), strict=True))
    wide = max(wide, 96)  # for the label
    labels = [wrap(label, _font(13), wide - 12, 2) for label, _, _ in cells]
    foot = 10 + 17 * max(1, *map(len, labels)) + 24
    image = Image.new(
        "RGB",
        (2 * _MARGIN + columns * (wide + 12) - 12, 2 * _MARGIN + -(-len(cells) // columns) * (high + foot + 12) - 12),
        PAGE,
    )
    draw = ImageDraw.Draw(image)
    numbers = [number for _, _, number in cells if number is not None and math.isfinite(number)]
    largest = max([*map(abs, numbers), 0.0]) or 1.0
    for index, (_, picture, number) in enumerate(cells):
        x, y = _MARGIN + index % columns * (wide + 12), _MARGIN + index // columns * (high + foot + 12)
        draw.rectangle((x, y, x + wide - 1, y + high + foot - 1), PLATE)
        size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
        resized = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
        image.paste(resized, (x + (wide - size[0]) // 2, y + (high - size[1]) // 2))
        for row, text in enumerate(labels[index]):
            draw.text((x + 6, y + high + 20 + 17 * row), text, TEXT, _font(13), "ls")
        if number is not None:
            below = y + high + foot - 12
            draw.text((x + 6, below), printable(_number(number)), TEXT, _font(12), "lm")
            room, part = wide - 70, abs(number) / largest if math.isfinite(number) else 0
            draw.rectangle((x + 60, below - 3, x + 59 + room, below + 3), LINE)
            if long := round(room * part):
                draw.rectangle((x + 60, below - 3, x + 59 + long, below + 3), _OTHERS[0])
    return image


def as_image(picture: Image.Image) -> Tensor:
    """IMAGE of the graph: (1, height, width, 3)."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float()[None] / 255


def below(pictures: Sequence[Image.Image]) -> Image.Image:
    """One below the other, as wide as the widest."""
    whole = Image.new("RGB", (max(one.width for one in pictures), sum(one.height for one in pictures)), PAGE)
    top = 0
    for one in pictures:
        whole.paste(one, (0, top))
        top += one.height
    return whole
