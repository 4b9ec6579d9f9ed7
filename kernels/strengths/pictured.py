"""What a picture of strengths shows, and where in the text each part of it is written.

* ``pictured``: block weights against the blocks of a model → ``Bar``s, a weight for each block, and ``Rule``s, the
  places of the text that say so. What bars cannot show (kinds of layers, patterns, weights that change over the run) is
  marked as kept: who writes weights back leaves it as it is.
* ``drawn``: a schedule → its points as they are written, and what stands behind them.

The texts are read by ``blocks`` and ``schedule``; this only asks them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..block_names import BASE
from .blocks import MAX_LENGTH, BlockWeights, parse_blocks
from .components import TE, items_of, spans_of
from .layout import Layout
from .presets import PRESETS
from .schedule import HOLD, Point, Schedule, fixed, is_number, parse, point_of, weight_of, written
from .vectors import is_entry, readings

PRESET, ENTRY, RULE = "preset", "entry", "rule"
_SHOWN = 3  # schedules of one block


@dataclass(frozen=True)
class Bar:
    """``weight``: without what is kept; ``others``: in words, what its layers have where that is not this weight."""

    id: str
    weight: float
    others: str = ""


@dataclass(frozen=True)
class Rule:
    """A part of the text, from ``begin`` to ``end``; its weight begins at ``value``.

    ``bars``: the ids of those it gives its weight to. ``kept``: a picture cannot show it; ``fault``: why it is not
    understood where that is allowed.
    """

    begin: int
    end: int
    value: int
    kind: str
    bars: tuple[str, ...] = ()
    kept: bool = False
    fault: str = ""


@dataclass(frozen=True)
class Pictured:
    bars: tuple[Bar, ...]
    rules: tuple[Rule, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Drawn:
    """``points``: (as it is written, what it means); none where ``constant`` is all that the text says.

    ``how``: the interpolation that the text itself asks for; ``inset``: what it says of the steps that are counted.
    """

    points: tuple[tuple[str, Point], ...]
    constant: float | None
    how: str | None = None
    inset: int = 0


def pictured(
    text: str,
    layout: Layout,
    interpolation: str = HOLD,
    presets: Mapping[str, tuple[str, ...]] | None = None,
    name: str = "blocks",
    lenient: bool = False,
) -> Pictured:
    """Raises ValueError that begins with ``name``, as ``parse_blocks`` does.

    ``lenient``: the layout is a part of the model's, so rules that name nothing there are kept and not understood.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{name}: {len(text)} letters, expected at most {MAX_LENGTH}")
    reader = _Reader(layout, interpolation, presets, name)
    if not lenient:
        reader.weights(text)  # the error of the whole text, if there is one
    spans = spans_of(text)
    first = next((number for number, (begin, end) in enumerate(spans) if "=" in text[begin:end]), len(spans))
    rules = [*reader.head(text, spans[:first], lenient), *(reader.rule(text, span, lenient) for span in spans[first:])]
    understood = _joined(text, [rule for rule in rules if not rule.fault])
    found = reader.weights(understood)
    told = [rule for rule in rules if not rule.fault and (not rule.kept or rule.kind == ENTRY)]
    plain = reader.weights(_joined(text, told))
    return Pictured(reader.bars(found, plain), tuple(rules), found.notes)


def drawn(text: str, name: str = "steps", interpolation: str = HOLD) -> Drawn:
    """Raises ValueError that begins with ``name``, as ``parse`` does; empty text is 1 throughout."""
    if not text.strip():
        return Drawn((), 1.0)
    schedule = parse(text, name, interpolation)
    items, how, inset = written(text)
    if "@" not in text:
        return Drawn((), weight_of(items[0], name))
    points = tuple((item, point_of(item, name)) for item in items)
    return Drawn(points, schedule.constant, how and how.lower(), int(inset or 0))


class _Reader:
    """Asks ``parse_blocks`` about one model."""

    def __init__(
        self, layout: Layout, interpolation: str, presets: Mapping[str, tuple[str, ...]] | None, name: str
    ) -> None:
        self.layout, self.interpolation, self.presets, self.name = layout, interpolation, presets, name
        inside: dict[str, set[str]] = {BASE: set(), **{block.id: set() for block in layout.blocks}}
        for path, block in layout.block_of.items():
            inside[block].add(path)
        self.places = {**{block: frozenset(paths) for block, paths in inside.items()}, TE: frozenset({TE})}

    def weights(self, text: str) -> BlockWeights:
        return parse_blocks(text, self.layout, self.interpolation, name=self.name, presets=self.presets)

    def rule(self, text: str, span: tuple[int, int], lenient: bool) -> Rule:
        begin, end = span
        [item] = items_of(text[begin:end])
        selector, _, weight = (part.strip() for part in item.partition("="))
        parse(weight, f"{self.name}: {selector[:60]}", self.interpolation)  # which no model makes right or wrong
        value = begin + text[begin:end].index("=") + 1
        value += len(text[value:end]) - len(text[value:end].lstrip())
        try:
            named = frozenset({TE}) if selector.lower() == TE else frozenset(self.weights(item).weights)
        except ValueError as error:
            if not lenient:
                raise
            return Rule(begin, end, value, RULE, kept=True, fault=str(error))
        bars = self._whole(named)
        return Rule(begin, end, value, RULE, bars, kept=not is_number(weight) or self._left(named, bars))

    def head(self, text: str, spans: list[tuple[int, int]], lenient: bool) -> list[Rule]:
        """The preset or the entries of the vector that a text begins with."""
        if not spans:
            return []
        items = [text[begin:end] for begin, end in spans]
        begin, end = spans[0][0], spans[-1][1]
        known = PRESETS if self.presets is None else self.presets
        is_preset = len(items) == 1 and (items[0] in known or not is_entry(items[0]))
        try:
            self.weights(text[begin:end])
        except ValueError as error:
            if not lenient:
                raise
            return [Rule(begin, end, begin, PRESET if is_preset else ENTRY, kept=True, fault=str(error))]
        if is_preset:
            return [Rule(begin, end, begin, PRESET)]
        found = []
        for (first, last), place in zip(spans, readings(self.layout)[len(spans)], strict=True):
            named = place.paths | ({TE} if place.component else set())
            bars = self._whole(named) if place.component in ("", TE) else ()
            found.append(Rule(first, last, first, ENTRY, bars, kept=self._left(named, bars)))
        return found

    def bars(self, found: BlockWeights, plain: BlockWeights) -> tuple[Bar, ...]:
        return tuple(
            _text_bar(found, plain) if bar == TE else _bar(bar, paths, found, plain)
            for bar, paths in self.places.items()
            if paths
        )

    def _whole(self, named: frozenset[str]) -> tuple[str, ...]:
        """The bars that are named with all of their layers."""
        return tuple(bar for bar, paths in self.places.items() if paths and paths <= named)

    def _left(self, named: frozenset[str], bars: tuple[str, ...]) -> bool:
        """Whether more is named than these bars."""
        return named != frozenset().union(*(self.places[bar] for bar in bars))


def _bar(bar: str, paths: frozenset[str], found: BlockWeights, plain: BlockWeights) -> Bar:
    usual = Counter(constant for path in paths if (constant := plain.of(path).constant) is not None)
    weight = usual.most_common(1)[0][0] if usual else 1.0
    real = {found.of(path) for path in paths}
    return Bar(bar, weight, "" if real == {fixed(weight)} else _in_words(real))


def _text_bar(found: BlockWeights, plain: BlockWeights) -> Bar:
    own = {encoder: weight for encoder, weight in found.components.items() if encoder != TE}
    return Bar(TE, plain.components.get(TE, 1.0), ", ".join(f"{encoder} {weight:g}" for encoder, weight in own.items()))


def _in_words(strengths: set[Schedule]) -> str:
    constants = sorted({strength.constant for strength in strengths if strength.constant is not None})
    changing = sorted(str(strength) for strength in strengths if strength.constant is None)
    parts = [f"{constants[0]:g}"] if len(constants) == 1 else []
    parts = [f"{constants[0]:g} to {constants[-1]:g}"] if len(constants) > 1 else parts
    return " and ".join([*parts, *changing[:_SHOWN], *(["…"] if len(changing) > _SHOWN else [])])


def _joined(text: str, rules: list[Rule]) -> str:
    return "\n".join(text[rule.begin : rule.end] for rule in rules)
