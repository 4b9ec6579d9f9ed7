"""What is different in single blocks: the ``blocks`` option of the adapter settings.

* ``parse``: text → ``Line``s: the blocks they are about and what they set there.
* ``Size`` and ``sizes``: rank, alpha and part of the learning rate of every layer; later lines win.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ..kernels.block_names import BASE, resolve
from ..kernels.blocks import Block
from ..kernels.layers import Target, is_spatial
from .options import OptionError

MAX_LINES = 500
# word → (least and greatest value, whole numbers only)
_WORDS = {
    "rank": (1, 1024, True),
    "alpha": (-1024, 1024, False),
    "conv_rank": (0, 512, True),
    "conv_alpha": (-1024, 1024, False),
    "lr": (0, 1000, False),
}
OFF = "off"


@dataclass(frozen=True)
class Line:
    """One line: ``ids`` of blocks, ``values`` by word, ``off`` where they get no adapters at all."""

    number: int
    text: str
    ids: frozenset[str]
    values: dict[str, float] = field(default_factory=dict)
    off: bool = False

    def __str__(self) -> str:
        return f"blocks line {self.number} ({self.text!r})"

    def is_about(self, layer: Target) -> bool:
        return (layer.block or BASE) in self.ids


@dataclass(frozen=True)
class Size:
    """Of one layer's adapter; rank 0 (of k×k convolutions) for none."""

    rank: int
    alpha: float
    factor: float = 1.0


def parse(text: str, blocks: Sequence[Block]) -> list[Line]:
    """The lines in ``text``; empty ones count for nothing. Raises OptionError naming line and word."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > MAX_LINES:
        raise OptionError(f"blocks has {len(lines)} lines, expected at most {MAX_LINES}")
    return [_line(number, line, blocks) for number, line in lines]


def sizes(layers: Sequence[Target], lines: Sequence[Line], plain: Size, spatial: Size) -> dict[str, Size]:
    """path → size, for the layers that get an adapter; ``plain`` and ``spatial`` are what no line changes.

    Raises OptionError naming a line that changes nothing.
    """
    for line in lines:
        _check_effect(line, [layer for layer in layers if line.is_about(layer)])
    found, acting = {}, set()
    for layer in layers:
        prefix, size, off = ("conv_", spatial, False) if is_spatial(layer) else ("", plain, False)
        said_by: dict[str, int] = {}  # word → number of the last line that says it
        for line in lines:
            if line.is_about(layer):
                words = [word for word in (f"{prefix}rank", f"{prefix}alpha", "lr") if word in line.values]
                said_by |= dict.fromkeys(words + [OFF] * (line.off or off), line.number)
                off, values = line.off, line.values
                rank = int(values.get(f"{prefix}rank", size.rank))
                alpha, factor = values.get(f"{prefix}alpha", size.alpha), values.get("lr", size.factor)
                size = replace(size, rank=rank, alpha=alpha, factor=factor)
        if not off and size.rank:
            found[layer.path] = size
        acting |= {said_by[OFF]} if off else set(said_by.values())
    for line in lines:
        if line.number not in acting:
            raise OptionError(f"{line} has no effect: later lines change all of it; put it behind them or take it out")
    return found


def _check_effect(line: Line, layers: Sequence[Target]) -> None:
    if not layers:
        raise OptionError(f"{line}: none of the layers that are trained lies there; take the line out, or widen layers")
    for word in line.values:
        if word == "lr":
            continue
        if word.startswith("conv_") not in {is_spatial(layer) for layer in layers}:
            what = "k×k convolutions" if word.startswith("conv_") else "linear layers or 1×1 convolutions"
            raise OptionError(f"{line}: {word} has no effect, no {what} are trained there; leave it out")


def _line(number: int, text: str, blocks: Sequence[Block]) -> Line:
    where = f"blocks line {number} ({text[:60]!r})"
    names, colon, rest = text.partition(":")
    if not colon:
        raise OptionError(f"{where}: there is no colon; write names of blocks, a colon, then what is different there")
    try:
        ids = frozenset(resolve(names, blocks))
    except ValueError as error:
        raise OptionError(f"{where}: {error}") from error
    words = re.sub(r"\s*=\s*", "=", rest).replace(",", " ").split()
    if not words:
        raise OptionError(f"{where}: nothing stands behind the colon; write {', '.join(_WORDS)} with =, or off")
    if OFF in words:
        if len(words) > 1:
            raise OptionError(f"{where}: off leaves nothing that {words[0 if words[1] == OFF else 1]!r} could change")
        return Line(number, text[:60], ids, off=True)
    values: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name in values:
            raise OptionError(f"{where}: {name} stands there twice; write it once")
        values[name] = _value(where, word, name, value)
    return Line(number, text[:60], ids, values)


def _value(where: str, word: str, name: str, value: str) -> float:
    if name not in _WORDS:
        near = difflib.get_close_matches(name, [*_WORDS, OFF], 1)
        hint = f"do you mean {near[0]}?" if near else f"write {', '.join(f'{known}=…' for known in _WORDS)} or off"
        raise OptionError(f"{where}: {word[:60]!r} is unknown; {hint}")
    low, high, whole = _WORDS[name]
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    fine = low <= number <= high and (number.is_integer() or not whole)  # not for NaN
    if not fine or (number == 0 and name != "conv_rank"):
        kind = "a whole number" if whole else "a number other than 0"
        raise OptionError(f"{where}: {word[:60]!r}, expected {kind} from {low} to {high} (off leaves blocks out)")
    return number
