"""Which layer of a model gets which strength, from text.

* ``parse_blocks``: text → ``BlockWeights`` for one model; empty text is 1 everywhere.
* ``BlockWeights.of``: the strength of a layer.

The text is a vector (``vectors``), the name of a preset (``presets``), or rules, one a line or with commas between:

    in=0.5               blocks, as kernels.block_names knows them: in, mid, OUT3, double, single.10-, layers.5, base
    IN05-OUT05 base=0    a range over groups counts in the model's order; spaces between several names
    attn=0.5             a kind of layer (``layout.KINDS``), in all blocks
    in/attn=0.5          what is both; double/img/ff=0 is what is all three
    proj_in=0            a part of the paths of layers, between dots or underscores
    *.attn2.*=0          a pattern for whole paths, without "diffusion_model."
    NOT mid=0            all but these, also behind a slash: in/NOT attn=0
    out=0.1@1,0.6@6      strengths may change over the run
    te=0.5               the text encoders, as a vector's BASE has them; this one cannot change over the run

The last rule that names a layer gives its strength, kinds and parts of paths included. A layer that none names has 1.
Rules may follow a vector or a preset and then change what that gives.
"""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from ..block_names import BASE, ROLES, described, resolve
from .components import TE, items_of
from .layout import ALIASES, KINDS, Layout
from .presets import PRESETS, find
from .schedule import Schedule, fixed, parse
from .vectors import is_entry, numbers, read

MAX_LENGTH, MAX_RULES, MAX_WORD = 8000, 500, 200
_NOT = re.compile(r"not\s+", re.IGNORECASE)
_ONE = fixed(1.0)
_ONLY_BLOCKS = {*ROLES, "double", "single"}


@dataclass(frozen=True)
class BlockWeights:
    """Strengths by canonical path; ``components``: of text encoders, from vectors that have a place for them.

    ``notes``: what was read otherwise than it is written, and rules without effect, in sentences.
    """

    weights: Mapping[str, Schedule] = field(default_factory=dict)
    components: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def of(self, path: str) -> Schedule:
        """The strength of a layer, or of a parameter of another name than weight."""
        return self.weights.get(path, _ONE)


def parse_blocks(
    text: str,
    module_tree: nn.Module | Layout,
    interpolation: str = "hold",
    seed: int = 0,
    *,
    name: str = "blocks",
    dialect: str = "lbw",
    letters: Mapping[str, float] | None = None,
    presets: Mapping[str, tuple[str, ...]] | None = None,
) -> BlockWeights:
    """The strengths that ``text`` gives to the layers of a model. Raises ValueError that begins with ``name``.

    ``seed``, ``dialect`` and ``letters`` are for the letters in vectors, ``presets`` for names (``PRESETS`` unless
    the user has some).
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{name}: {len(text)} letters, expected at most {MAX_LENGTH}")
    layout = module_tree if isinstance(module_tree, Layout) else Layout.of(module_tree)
    presets = PRESETS if presets is None else presets
    items = items_of(text)
    head = list(itertools.takewhile(lambda item: "=" not in item, items))
    given = BlockWeights()
    if len(head) == 1 and "@" not in head[0] and (head[0] in presets or not is_entry(head[0])):
        # a preset names no other preset
        again = partial(parse_blocks, name=name, dialect=dialect, letters=letters, presets={})
        given = _of_preset(head[0], name, presets, lambda text: again(text, layout, interpolation, seed))
    elif head:
        given = _of_vector(head, layout, seed, name, dialect, letters)
    return _with_rules(given, items[len(head) :], layout, interpolation, name)


def _of_vector(
    items: list[str], layout: Layout, seed: int, name: str, dialect: str, letters: Mapping[str, float] | None
) -> BlockWeights:
    timed = next((item for item in items if "@" in item), None)
    if timed:
        raise ValueError(f"{name}: {timed[:60]!r} stands behind no names; write all={timed[:60]}")
    values, drawn = numbers(items, name, dialect, seed, letters or {})
    places, notes = read(values, layout, name)
    weights = {path: fixed(weight) for place, weight in places for path in place.paths}
    components = {place.component: weight for place, weight in places if place.component and weight != 1}
    return BlockWeights(weights, components, (*drawn, *notes))


def _of_preset(
    word: str, name: str, presets: Mapping[str, tuple[str, ...]], read_text: Callable[[str], BlockWeights]
) -> BlockWeights:
    """What the first of a preset's texts that fits this model says."""
    try:
        texts = find(word, presets)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; for blocks write names=weight, such as in=0.5") from error
    faults = []
    for text in texts:
        try:
            return read_text(text)
        except ValueError as error:
            faults.append(str(error).removeprefix(f"{name}: "))
    raise ValueError(f"{name}: the preset {word[:60]!r} does not fit this model: {faults[-1]}")


def _with_rules(given: BlockWeights, items: list[str], layout: Layout, interpolation: str, name: str) -> BlockWeights:
    """What rules make of strengths that are given."""
    if len(items) > MAX_RULES:
        raise ValueError(f"{name}: {len(items)} rules, expected at most {MAX_RULES}")
    weights = dict(given.weights)
    by: dict[str, int] = {}
    for number, item in enumerate(items):
        selector, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not selector:
            raise ValueError(f"{name}: {item[:60]!r} is no rule; write names=weight, such as in=0.5")
        strength = parse(value, f"{name}: {selector[:60]}", interpolation)
        named = frozenset({TE}) if selector.lower() == TE else _named(selector, layout, name)
        weights |= dict.fromkeys(named, strength)
        by |= dict.fromkeys(named, number)
    acting = set(by.values())
    idle = [item[:60] for number, item in enumerate(items) if number not in acting]
    notes = [f"{name}: {item} has no effect, later rules name all of it; put it behind them" for item in idle]
    components = given.components
    if TE in weights:
        components, said = _on_text(weights.pop(TE), name)
        notes += said
    return BlockWeights(weights, components, (*given.notes, *notes))


def _on_text(strength: Schedule, name: str) -> tuple[dict[str, float], list[str]]:
    """What a rule for the text encoders gives them, and a note."""
    weight = strength.constant
    if weight is None:
        raise ValueError(
            f"{name}: te changes over the run, which it cannot do among blocks; write te={str(strength)[:60]} in "
            "components, or behind a colon of a prompt's tag"
        )
    return ({}, []) if weight == 1 else ({TE: weight}, [f"{name}: te={weight:g} is for the text encoders"])


def _named(selector: str, layout: Layout, name: str) -> frozenset[str]:
    """The paths that a selector names: in all of its parts."""
    found, only_kinds = frozenset(layout.paths), True
    for place, part in enumerate(selector.split("/")):
        inverse = _NOT.match(part.strip())
        words = part.strip()[inverse.end() if inverse else 0 :].split()
        if not words:
            raise ValueError(f"{name}: {selector[:60]!r} has an empty part; write names of blocks, kinds or layers")
        sorts = {}
        for word in words:
            sorts[word] = _meant(word, layout, name, behind=place > 0)
        if len({sort for sort, _ in sorts.values()}) > 1:
            raise ValueError(f"{name}: {part.strip()[:60]!r} mixes blocks and layers; write {'/'.join(words)[:60]}")
        paths = frozenset().union(*(paths for _, paths in sorts.values()))
        only_kinds = only_kinds and sorts[words[0]][0] == "kind"
        found &= frozenset(layout.paths) - paths if inverse else paths
    if only_kinds:  # "ff" is no layer of a time embedder; "base/ff" is
        found -= layout.inside([BASE])
    if not found:
        raise ValueError(f"{name}: {selector[:60]!r} names no layer of this model; {described(layout.blocks)}")
    return found


def _meant(word: str, layout: Layout, name: str, behind: bool) -> tuple[str, frozenset[str]]:
    """(blocks, kind or path; the paths that are meant). ``behind`` a slash kinds come before blocks of that name."""
    if len(word) > MAX_WORD:
        raise ValueError(f"{name}: {word[:60]!r}… has {len(word)} letters, expected at most {MAX_WORD}")
    kind = ALIASES.get(word.lower(), word.lower())
    kind = "o" if behind and kind == "out" else kind
    if behind and layout.of_kind(kind):
        return "kind", layout.of_kind(kind)
    try:
        return "blocks", layout.inside(_blocks(word, layout))
    except ValueError as error:
        if kind in KINDS:
            if layout.of_kind(kind):
                return "kind", layout.of_kind(kind)
            raise ValueError(
                f"{name}: this model has no layers of the kind {word!r} ({KINDS[kind]}); it has "
                f"{', '.join(layout.kinds)}"
            ) from error
        if word.lower() in _ONLY_BLOCKS:  # "in" is a part of "txt_in", which nobody means by it
            raise ValueError(f"{name}: {error}") from error
        paths = _of_part(word.lower(), layout)
        if paths:
            return "path", paths
        near = _nearest(word, layout)
        raise ValueError(
            f"{name}: {error}; nor is it a kind of layer ({', '.join(layout.kinds)}) or a part of a path{near}"
        ) from error


def _blocks(word: str, layout: Layout) -> set[str]:
    """Ids of the blocks that a word names; a range may begin in one group and end in another."""
    first, _, last = word.partition("-")
    if not first or not last or last.isdecimal():
        return resolve(word, layout.blocks)
    order = [BASE, *(block.id for block in layout.blocks)]
    ends = [resolve(end, layout.blocks) for end in (first, last)]
    if any(len(end) != 1 for end in ends):
        raise ValueError(f"{word[:60]!r} begins or ends with several blocks; write one at each end, such as IN05-OUT05")
    low, high = sorted(order.index(end.pop()) for end in ends)
    return set(order[low : high + 1])


def _of_part(word: str, layout: Layout) -> frozenset[str]:
    """The paths with this part, between dots or underscores; with * or ? the paths that fit as a whole."""
    if "*" in word or "?" in word:
        match = re.compile(fnmatch.translate(word.replace("[", "[[]"))).match
        return frozenset(path for path, name in layout.local.items() if match(name))
    found = re.compile(rf"(?<![a-z0-9]){re.escape(word.replace('.', '_'))}(?![a-z0-9])").search
    return frozenset(path for path, name in layout.local.items() if found(name.replace(".", "_")))


def _nearest(word: str, layout: Layout) -> str:
    segments = {segment for name in layout.local.values() for segment in name.split(".")}
    near = difflib.get_close_matches(word, {*segments, *layout.kinds}, 1, 0.7)
    return f", do you mean {near[0]!r}?" if near else ""
