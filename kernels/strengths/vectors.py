"""Vectors of block weights, as people carry them from other tools, read for the blocks of the model at hand.

* ``readings``: the lengths that a model takes, and what each place in such a vector is for.
* ``numbers``: the entries of a vector as numbers; letters stand for drawn and for given ones.

Lengths, the first that fits counts:
- 1 + blocks: BASE, then every block in the model's order. SD1.5 26, SDXL 20, Flux 58.
- Flux: 61, ``CLIP, T5, IN, D00-18, S00-37, OUT``; IN is what comes before the blocks, OUT the final layer.
- UNets: 1 + blocks with attention. SD1.5 17, SDXL 12. All other blocks get 0, as in sd-webui-lora-block-weight.
- blocks: the same without BASE.
- UNets of no more blocks than SD1.5: its 26 names; those that the model lacks are told.

BASE is everything that lies in no block, and the text encoders: the former alone is what the model's tree says, the
latter alone what sd-webui-lora-block-weight does, both together what the Inspire pack does.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..block_names import BASE
from ..blocks import MODEL_PREFIX
from ..layers import attention_blocks
from .components import TE
from .layout import Layout
from .schedule import weight_of

FLUX = ("double_blocks", 19, "single_blocks", 38)
DIALECTS = ("lbw", "inspire")
# what R and U draw (lowest, highest), the decimals that are kept, and the letters that stand for given numbers
_DRAWS = {
    "lbw": ({"R": (0.0, 1.0), "U": (-0.5, 1.5)}, 3, {"X": 1.0}),
    "inspire": ({"R": (0.0, 3.0), "U": (-1.5, 1.5)}, 2, {"A": 4.0, "B": 1.0}),
}
_LETTERS = re.compile(r"(?P<letter>[A-Za-z])(?P<offset>[+-][0-9.]{1,20})?")
_WORD = re.compile(r"[A-Za-z]")


@dataclass(frozen=True)
class Place:
    """One entry: ``label`` as in the other tools, the ``paths`` it is for, and the ``component`` of text encoders."""

    label: str
    paths: frozenset[str]
    component: str = ""


def readings(layout: Layout) -> dict[int, list[Place]]:
    """length → what the entries of a vector of that length are for."""
    ids = [block.id for block in layout.blocks]
    inside = {block.id: Place(block.id, layout.inside([block.id])) for block in layout.blocks}
    base = Place("BASE", layout.inside([BASE]), TE)
    blocks = [inside[identifier] for identifier in ids]
    found = [[base, *blocks]]
    if _is_flux(layout):
        out = frozenset(path for path in base.paths if path.removeprefix(MODEL_PREFIX).startswith("final_layer."))
        text = Place("CLIP", frozenset(), "clip_l"), Place("T5", frozenset(), "t5xxl")
        found.append([*text, Place("IN", base.paths - out), *blocks, Place("OUT", out)])
    unet = {"in", "out"} <= {block.role for block in layout.blocks}
    if unet:
        found.append([base, *(inside[block.id] for block in attention_blocks(layout.blocks))])
    found.append(blocks)
    if unet and _sd15_names(layout):
        found.append([base, *_sd15_names(layout)])
    lengths: dict[int, list[Place]] = {}
    for places in found:
        lengths.setdefault(len(places), places)
    return lengths


def read(values: Sequence[float], layout: Layout, name: str) -> tuple[list[tuple[Place, float]], list[str]]:
    """Each place with its weight, and notes. Raises ValueError that lists the lengths this model takes."""
    known = readings(layout)
    if len(values) not in known:
        *others, last = sorted(known)
        raise ValueError(
            f"{name}: a vector of {len(values)} numbers, but this model takes {', '.join(map(str, others))} or {last}; "
            f"or write names=weight, such as all={values[0]:g}"
        )
    places = known[len(values)]
    found = list(zip(places, values, strict=True))
    notes = []
    absent = [place.label for place in places if not place.paths and not place.component]
    if absent:
        notes.append(f"{name}: this model has no {', '.join(absent)}; their weights are not used")
    left = set(layout.paths).difference(*(place.paths for place in places))
    outside = sorted({layout.block_of[path] for path in left} - {BASE}, key=[b.id for b in layout.blocks].index)
    if outside:  # blocks without attention; what lies in no block is left as it is where a vector has no BASE
        found.append((Place("rest", layout.inside(outside)), 0.0))
        notes.append(f"{name}: a vector of {len(values)} leaves out {', '.join(outside)}, which get 0")
    for place, weight in found:
        if place.component == TE and weight != 1:
            notes.append(f"{name}: BASE is also for the text encoders, which get {weight:g}")
    return found, notes


def numbers(
    items: Sequence[str], name: str, dialect: str, seed: int, given: Mapping[str, float]
) -> tuple[list[float], list[str]]:
    """The entries as numbers, and a note on those that were letters.

    ``given``: X (sd-webui-lora-block-weight, also X+0.2), A and B (Inspire, a and b are half of them).
    """
    if dialect not in DIALECTS:
        raise ValueError(f"{name}: there is no dialect {dialect!r} of vectors, choose one of {', '.join(DIALECTS)}")
    draws = random.Random(seed)
    values, said = [], []
    for place, item in enumerate(items, 1):
        letter = bool(_WORD.match(item))
        values.append(_of_letter(item, name, dialect, draws, given) if letter else weight_of(item, name))
        if letter:
            said.append(f"{item} at place {place} is {values[-1]:g}")
    return values, [f"{name}: {', '.join(said)}"] if said else []


def is_entry(text: str) -> bool:
    """Whether a word can only be an entry of a vector."""
    return bool(re.fullmatch(r"[RUXABruab](?:[+-][0-9.]{1,20})?|[+-]?[0-9.]{1,60}(?:[eE][+-]?\d{1,3})?", text))


def _of_letter(item: str, name: str, dialect: str, draws: random.Random, given: Mapping[str, float]) -> float:
    drawn, decimals, defaults = _DRAWS[dialect]
    match = _LETTERS.fullmatch(item)
    letter, offset = (match["letter"], match["offset"]) if match else (item, None)
    upper = letter.upper() if dialect == "inspire" else letter
    if upper in drawn and not offset:
        return round(draws.uniform(*drawn[upper]), decimals)
    if upper in defaults and (letter == "X" or not offset):
        value = given.get(upper, defaults[upper])
        if letter == "X":
            return weight_of(repr(value + (weight_of(offset, name) if offset else 0.0)), name)
        return value if letter == upper else value / 2
    letters = ", ".join([*drawn, *defaults])
    raise ValueError(f"{name}: {item[:60]!r} is no weight; write a number, or one of {dialect}'s letters {letters}")


def _is_flux(layout: Layout) -> bool:
    groups: dict[str, int] = {}
    for block in layout.blocks:
        groups[block.group] = groups.get(block.group, 0) + 1
    return tuple(part for group in groups.items() for part in group) == FLUX


def _sd15_names(layout: Layout) -> list[Place]:
    """The 25 blocks of SD1.5 by their names; nothing for a model with others."""
    labels = {f"input_blocks.{n}": f"IN{n:02}" for n in range(12)} | {"middle_block": "M00"}
    labels |= {f"output_blocks.{n}": f"OUT{n:02}" for n in range(12)}
    if not {block.id for block in layout.blocks} <= labels.keys():
        return []
    return [Place(label, layout.inside([identifier])) for identifier, label in labels.items()]
