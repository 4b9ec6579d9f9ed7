"""The reader of adapter files, whoever wrote them.

* ``read_lora``: a file or state dict -> ``LoRAFile``: adapters by the model's own paths, metadata, the base model it
  seems made for, embeddings that travel with it, and whatever found no place, key by key, with the reason.
* ``Unplaced``: a key that is not used, and why.

Nothing is dropped in silence, and several adapters on one layer add up. Without targets the names stay as in the file.
How keys end is in ``spellings``, what layers are called in ``names``, what PEFT keeps beside in ``peft_config``, and
what has to be put right for some trainers in ``quirks``. Raises ValueError, and nothing else, for files that cannot be
read: a part of a file that makes no sense is ``unplaced`` while there is another part that does.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .adapter import Adapter
from .architectures import encoder_prefix, guess, has_prefix, in_text_encoder, known, same_base
from .compose import Sliced, Sum, Swapped
from .control import SET_WEIGHT, WIDTH, Replacement, Widened
from .dora import PARTS as NORMS
from .embeddings import take_embeddings
from .lora import DOWN, UP
from .names import NameTable, Place
from .peft_config import Configs, beside
from .quirks import Layer, across_layers, as_peft_turns, damage, normalised, of_peft
from .registry import FAMILIES, read_adapter
from .safetensors_io import LoraModel, load_tensors
from .spellings import BOOKKEEPING, split

WRONG_BASE, NO_ENCODER, SHAPE, PREFIX = "wrong base", "text encoder absent", "shape", "prefix"
DUPLICATE, INCOMPLETE, DAMAGED, UNKNOWN = "duplicate", "incomplete", "damaged", "unknown"
_FAULTS = (ValueError, RuntimeError, IndexError)  # what tensors of impossible shapes lead to
_SHARED = frozenset({"alpha", *NORMS})  # what is nothing alone
_COMPLETE = frozenset().union(*(family.marks for family in FAMILIES.values() if "alpha" in family.parts))
_FACTOR = re.compile("lora_[AB]|down|up")


class Unplaced(NamedTuple):
    """``reason`` is one of the constants above, ``detail`` says more for people."""

    key: str
    reason: str
    detail: str


@dataclass(frozen=True)
class LoRAFile:
    """``adapters`` by canonical path, or by the name in the file where no targets were given.

    ``architecture`` is a guess, ``evidence`` what it rests on. ``embeddings``: placeholder -> text encoder -> vectors
    (tokens, width). ``notes``: what was read otherwise than it is written, in sentences. ``names``: of the targets.
    """

    adapters: dict[str, Adapter]
    metadata: dict[str, str] = field(default_factory=dict)
    unplaced: list[Unplaced] = field(default_factory=list)
    architecture: str | None = None
    evidence: str = ""
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    names: NameTable | None = None


def read_lora(
    source: str | os.PathLike | Mapping[str, Tensor],
    targets: Mapping[str, Sequence[int]] | NameTable | None = None,
) -> LoRAFile:
    """Read a file, or a state dict. ``targets``: path -> shape of every weight of the model (``names.layer_shapes``).

    Raises ValueError naming the file where it is none of safetensors, or holds damaged adapters only.
    """
    model = load_tensors(source)
    metadata = dict(model.metadata)
    name = "the adapter"
    if not isinstance(source, Mapping):
        name = Path(source).name
        metadata = beside(source, metadata) | metadata
    table = targets if isinstance(targets, NameTable) or targets is None else NameTable(targets)
    reader = _Reader(table, metadata)
    reader.read(model)
    if not reader.adapters and any(item.reason == DAMAGED for item in reader.unplaced):
        worst = next(item for item in reader.unplaced if item.reason == DAMAGED)
        raise ValueError(f"{name}: nothing in it can be used: {worst.key[:200]} {worst.detail}")
    return LoRAFile(
        reader.adapters,
        metadata,
        reader.unplaced,
        reader.architecture,
        reader.evidence,
        reader.embeddings,
        reader.notes,
        table,
    )


class _Reader:
    """One pass over one file."""

    def __init__(self, table: NameTable | None, metadata: Mapping[str, str]) -> None:
        self.table, self.metadata, self.configs = table, metadata, Configs(metadata)
        self.adapters: dict[str, Adapter] = {}
        self.unplaced: list[Unplaced] = []
        self.notes: list[str] = []
        self.architecture: str | None = None
        self.evidence = ""
        self.embeddings: dict[str, dict[str, Tensor]] = {}
        self._found: dict[str, list[tuple[Adapter, Layer]]] = defaultdict(list)
        self._looked_at: dict[tuple[str, str], str | None] = {}

    def read(self, model: LoraModel) -> None:
        self.embeddings, rest = take_embeddings(model, self.metadata)
        layers = self._layers(rest)
        self.architecture, self.evidence = guess({layer.name: layer.parts for layer in layers}, self.metadata)
        self.notes += self.configs.warnings()
        for layer in across_layers(layers):
            fault = next(filter(None, (self._damage(part, layer) for part in layer.parts)), None)
            if fault:
                self._leave(layer, DAMAGED, fault)
                continue
            try:
                layer = normalised(layer, self.configs, self.metadata, self.notes)
            except _FAULTS as error:
                self._leave(layer, INCOMPLETE, str(error))
                continue
            self._place(layer)
        if self.configs.refused:
            refused = ", ".join(dict.fromkeys(self.configs.refused))[:300]
            self.notes.append(f"patterns of adapter_config not followed: {refused}")
        for path, found in self._found.items():
            self.adapters[path] = self._together(found)
        if self.architecture is None and self.adapters and self.table is not None and self.table.architecture:
            self.architecture = self.table.architecture
            self.evidence = f"{len(self.adapters)} of its layers fit this model, and nothing else tells"

    def _layers(self, tensors: Mapping[str, Tensor]) -> list[Layer]:
        """Keys put together by layer, and by adapter where the file holds several of PEFT's."""
        layers: dict[str, dict[str, list[Layer]]] = {}
        for key, tensor in tensors.items():
            if BOOKKEEPING.match(key):
                self.notes.append(f"{key} is no part of any adapter and was left out")
                continue
            name, part, adapter = split(key, tensors)
            if part is None:
                self._add(key, UNKNOWN, "ends like no part of an adapter")
                continue
            copies = layers.setdefault(name, {}).setdefault(adapter, [])
            # the same part once more, in another spelling: another adapter on the layer
            free = next((layer for layer in copies if part not in layer.parts and _alike(layer, part, key)), None)
            if free is None:
                free = Layer(name, {}, {})
                copies.append(free)
            free.parts[part], free.keys[part] = tensor, key
        return [layer for named in layers.values() for layer in _with_common(named)]

    def _damage(self, part: str, layer: Layer) -> str | None:
        """What is wrong with a part; looked at once, however many layers share it."""
        key = layer.keys.get(part, part)
        if (part, key) not in self._looked_at:
            why = damage(part, layer.parts[part])
            self._looked_at[part, key] = why and f"{part} {why}"
        return self._looked_at[part, key]

    def _place(self, layer: Layer) -> None:
        """Read one layer's adapter and keep it for its path, or say why not."""
        place = Place(layer.name)
        shape: tuple[int, ...] | None = None
        if self.table is not None:
            found = self.table.find(layer.name) or self.table.find(layer.name + ".scale")
            if found is None:
                self._leave(layer, *self._why_not_found(layer.name))
                return
            place = found
            shape = self.table.shapes[place.path]
        whole = shape
        if place.slice is not None and shape is not None:
            shape = (place.slice[2], *shape[1:])
        try:
            if of_peft(layer, self.configs):
                layer = replace(layer, parts=as_peft_turns(layer.parts, shape))
            adapter, left = _read(layer, shape)
            if place.swapped:
                adapter = Swapped(adapter)
            if place.slice is not None:
                adapter = Sliced(adapter, *place.slice[1:], whole)
        except _FAULTS as error:
            self._leave(layer, *_fault(layer, shape, str(error)))
            return
        for part in left:
            self._add(layer.keys[part], UNKNOWN, f"{part} belongs to no adapter of the layer {layer.name}")
        self._found[place.path].append((adapter, layer))

    def _together(self, found: list[tuple[Adapter, Layer]]) -> Adapter:
        """All that was found for one layer; the same tensors twice count once."""
        if len(found) == 1:
            return found[0][0]
        different: dict[bytes, tuple[Adapter, Layer]] = {}
        for adapter, layer in found:
            first = different.setdefault(_digest(adapter), (adapter, layer))
            if first[1] is not layer:
                self._leave(layer, DUPLICATE, f"is the same as what is called {first[1].name}")
        adapters = [adapter for adapter, _ in different.values()]
        return adapters[0] if len(adapters) == 1 else Sum(adapters)

    def _why_not_found(self, name: str) -> tuple[str, str]:
        assert self.table is not None
        if in_text_encoder(name) and not self.table.text.paths:
            return NO_ENCODER, "belongs to a text encoder, and there is none among the targets"
        if in_text_encoder(name) and not self.table.text.has(encoder_prefix(name)):
            return NO_ENCODER, "belongs to a text encoder that is not among the targets"
        other, here = self.architecture, self.table.architecture
        if not same_base(other, here):
            return WRONG_BASE, f"was made for {other} ({self.evidence}); the model is {here}"
        if known(name) or has_prefix(name) or in_text_encoder(name):
            return WRONG_BASE, "names a layer that the model does not have"
        return PREFIX, "is called as no trainer known here calls layers"

    def _leave(self, layer: Layer, reason: str, detail: str) -> None:
        for key in dict.fromkeys(layer.keys.values()):
            self._add(key, reason, detail)

    def _add(self, key: str, reason: str, detail: str) -> None:
        self.unplaced.append(Unplaced(key, reason, detail))


def _alike(layer: Layer, part: str, key: str) -> bool:
    """Whether a factor is spelled as the other of its pair, if that is there."""
    other = {DOWN: UP, UP: DOWN}.get(part)
    if other not in layer.keys:
        return True
    ends = (_FACTOR.sub("", spelled.removeprefix(layer.name)) for spelled in (key, layer.keys[other]))
    return len(set(ends)) == 1


def _with_common(named: Mapping[str, list[Layer]]) -> Iterable[Layer]:
    """The adapters of a layer; an alpha or norms without an adapter's name belong to all that have one."""
    unnamed, others = named.get("", []), [layer for name, found in named.items() if name for layer in found]
    if not others or len(unnamed) != 1 or any(layer.parts.keys() & unnamed[0].parts for layer in others):
        return [*unnamed, *others]
    if len(others) == 1:
        return [Layer(others[0].name, others[0].parts | unnamed[0].parts, others[0].keys | unnamed[0].keys)]
    rest = Layer(unnamed[0].name, dict(unnamed[0].parts), dict(unnamed[0].keys))
    if not rest.parts.keys() & _COMPLETE:
        for part in _SHARED & rest.parts.keys():
            tensor, key = rest.parts.pop(part), rest.keys.pop(part)
            for layer in others:
                layer.parts[part], layer.keys[part] = tensor, key
    return [rest, *others] if rest.parts else others


def _read(layer: Layer, shape: tuple[int, ...] | None) -> tuple[Adapter, Iterable[str]]:
    """The adapter for a weight of ``shape``, and the parts that are not of it."""
    parts = dict(layer.parts)
    if SET_WEIGHT in parts:
        value = parts.pop(SET_WEIGHT)
        if not parts:
            return Replacement(value, shape), ()
        raise ValueError(f"{SET_WEIGHT} stands beside {', '.join(sorted(parts))}")
    width = parts.pop(WIDTH, None)
    if width is None:
        return read_adapter(parts, shape)
    wider = tuple(int(size) for size in width.flatten()[:8].tolist())
    adapter, left = read_adapter(parts, wider)
    if shape is None or shape == wider:
        return adapter, left
    if len(wider) != len(shape) or wider[1] < shape[1] or (wider[0], *wider[2:]) != (shape[0], *shape[2:]):
        raise ValueError(f"it makes the weight {wider}, which cannot hold one of {shape}")
    return Widened(adapter, shape), left


def _fault(layer: Layer, shape: tuple[int, ...] | None, message: str) -> tuple[str, str]:
    """Whether it is the shape of the target that does not fit, or the layer itself."""
    if shape is not None:
        try:
            _read(layer, None)
        except _FAULTS:
            return INCOMPLETE, message
        return SHAPE, message
    return INCOMPLETE, message


def _digest(adapter: Adapter) -> bytes:
    """Equal for equal adapters."""
    digest = hashlib.blake2b(repr((adapter.name, getattr(adapter, "start", None))).encode())
    for name, tensor in sorted(adapter.state().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes(tensor.view(-1).view(torch.uint8).numpy()))
    return digest.digest()
