"""Tables of the names that others give to the layers of a family of models, and how they are read.

* ``Family``: how a family is told, diffusers' names for its layers, and the further spellings found in files.
* ``spelled``: a table applied to the layers of one model.

A table is a tuple of ``Stack``s: a numbered stack of the host (# for the numbers), the other name for it, and layer by
layer the names there. Such an entry reads:

    "name"            the whole layer
    "q k v"           a fused layer: its rows in equal shares, in this order
    "q k v | mlp"     those before the bar have as many rows as the layer has inputs, those after it share the rest
    "3*qkv | -"       three times as many; "-" has no name of its own
    "~name"           the two halves of the rows the other way round (scale and shift, value and gate)
    "~2 name"         so where the layer makes just two vectors, as in the last block of SD3
    ""                no name at all
    "*": "*"          every other layer keeps its name

The first stack that has an entry decides. The tables say what the host's key maps and diffusers' own converters say;
where those slice as if every attention and every MLP were alike, they follow the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

KEEP = {"*": "*"}
QKV = "attn.to_q attn.to_k attn.to_v"
ADDED_QKV = "attn.add_q_proj attn.add_k_proj attn.add_v_proj"
FINAL = {"final_layer.linear": "proj_out", "final_layer.adaLN_modulation.1": "~norm_out.linear"}


class Stack(NamedTuple):
    host: str
    other: str
    layers: Mapping[str, str]


class Part(NamedTuple):
    """A name, the rows of the layer that it stands for (None: all), and whether its halves are exchanged."""

    name: str
    rows: tuple[int, int] | None  # first, count
    swapped: bool


Table = tuple[Stack, ...]


@dataclass(frozen=True)
class Family:
    """``marks``: layers that all its models have. ``diffusers`` is None where nobody has settled names."""

    name: str
    marks: tuple[str, ...]
    diffusers: Table | None = None
    aliases: tuple[Table, ...] = ()
    bfl: bool = False  # its authors' own files name layers as the host does, without a prefix
    kohya: str = "lora_unet_"


def embedder(host: str, other: str) -> Stack:
    """The two layers of a timestep or vector embedder, whichever way the host counts them."""
    return Stack(host, other, {"0": "linear_1", "2": "linear_2", "in_layer": "linear_1", "out_layer": "linear_2"})


def spelled(table: Table, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[Part]]:
    """Layer -> its names in ``table``. Several names are given in the order of their rows."""
    patterns = [re.compile(_pattern(stack.host)) for stack in table]
    found: dict[str, list[Part]] = {}
    for path, shape in shapes.items():
        plain = path.removesuffix(".scale")  # older hosts call the weight of an RMS norm so
        for stack, pattern in zip(table, patterns, strict=True):
            match = pattern.fullmatch(plain)
            if match is None:
                continue
            *numbers, layer = match.groups()
            entry = stack.layers.get(layer, stack.layers.get("*"))
            if entry is not None:
                other = stack.other
                for number in numbers:
                    other = other.replace("#", number, 1)
                prefix = other and other + "."
                found[path] = _parts(prefix, layer if entry == "*" else entry, shape)
                break
    return found


def _pattern(stack: str) -> str:
    start = re.escape(stack + ".") if stack else ""
    return start.replace(re.escape("#"), r"(\d+)") + "(.+)"


def _parts(prefix: str, entry: str, shape: Sequence[int]) -> list[Part]:
    names = entry.split()
    if not names:
        return []
    if len(names) == 2 and names[0] == "~2":
        names = [("~" if shape[0] == 2 * shape[1] else "") + names[1]]
    if len(names) == 1:
        return [Part(prefix + names[0].removeprefix("~"), None, names[0].startswith("~"))]
    rows, inputs = (shape[0], shape[1]) if len(shape) > 1 else (0, 0)
    before, _, after = entry.partition("|") if "|" in entry else ("", "", entry)
    sized = [(name, inputs * int(count or 1)) for count, _, name in map(_counted, before.split())]
    left, sharers = rows - sum(count for _, count in sized), after.split()
    if left <= 0 or left % len(sharers):  # not the layer this entry was written for
        return []
    start, parts = 0, []
    for name, count in (*sized, *((name, left // len(sharers)) for name in sharers)):
        if name != "-":
            parts.append(Part(prefix + name, (start, count), False))
        start += count
    return parts


def _counted(name: str) -> tuple[str, str, str]:
    count, times, bare = name.rpartition("*")
    return count, times, bare
