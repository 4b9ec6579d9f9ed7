"""How the faults of adapter files are found: a function for each rule in ``faults``.

A check looks at ``Evidence``, what was stored, read and measured, and yields a ``Hit`` for each thing that it finds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reading
from ..architectures import in_text_encoder, local
from ..core_reads import warnings
from ..metadata import json_object
from ..peft_config import Configs
from ..reading import LoRAFile
from ..safetensors_io import LoraModel, tensor_hashes
from ..spellings import split
from ..strengths.components import UNET
from ..unplaced import CURES, both_bases, grouped
from .measure import Layer

GREATEST = torch.finfo(torch.float16).max
ABSURD = 64.0  # alpha by rank; rank-stabilised files of rank 1024 have 32
UNUSED = 4  # times less than the rank is needed for nearly all of the energy
_WIDER = (torch.float32, torch.float64, torch.bfloat16)


class Evidence(NamedTuple):
    """``model``: what is stored; ``file``: as it was read; ``layers``: as they were measured."""

    model: LoraModel
    file: LoRAFile
    layers: Sequence[Layer]


class Hit(NamedTuple):
    """``where``: layers or keys; ``more``: what to say of them."""

    where: Sequence[str]
    more: str = ""


def not_finite(evidence: Evidence) -> Iterator[Hit]:
    yield from _some(key for key, tensor in evidence.model.items() if not _finite(key, tensor))


def _finite(key: str, tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.numel() == 1:  # an infinite alpha has a rule of its own
        return not math.isnan(float(tensor))
    tensor = tensor.to(torch.float16) if tensor.element_size() == 1 else tensor
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def does_nothing(evidence: Evidence) -> Iterator[Hit]:
    if evidence.layers and all(layer.idle for layer in evidence.layers):
        yield Hit([], f"all {len(evidence.layers)} layers have ΔW = 0")


def nothing_read(evidence: Evidence) -> Iterator[Hit]:
    if not evidence.file.adapters:
        yield Hit([], f"{len(evidence.model)} tensors, none of them part of an adapter that can be used")


def idle_layers(evidence: Evidence) -> Iterator[Hit]:
    idle = [layer for layer in evidence.layers if layer.idle]
    parts = set(_idle_parts(evidence))
    if len(idle) < len(evidence.layers):
        yield from _some(layer.path for layer in idle if layer.component not in parts)


def idle_encoders(evidence: Evidence) -> Iterator[Hit]:
    if not all(layer.idle for layer in evidence.layers):
        for part in _idle_parts(evidence):
            yield Hit([layer.path for layer in evidence.layers if layer.component == part], part)


def _idle_parts(evidence: Evidence) -> list[str]:
    parts: dict[str, bool] = {}
    for layer in evidence.layers:
        parts[layer.component] = parts.get(layer.component, True) and layer.idle
    return [part for part, idle in parts.items() if idle and part != UNET]


def _alphas(evidence: Evidence) -> Iterator[tuple[str, float]]:
    for key, tensor in evidence.model.items():
        if key.endswith(".alpha") and tensor.numel() == 1 and not tensor.is_complex():
            yield key, float(tensor)


def infinite_alpha(evidence: Evidence) -> Iterator[Hit]:
    yield from _some(key for key, alpha in _alphas(evidence) if math.isinf(alpha))


def zero_alpha(evidence: Evidence) -> Iterator[Hit]:
    yield from _some(key for key, alpha in _alphas(evidence) if alpha == 0)


def negative_alpha(evidence: Evidence) -> Iterator[Hit]:
    yield from _some(layer.path for layer in evidence.layers if layer.scale is not None and -math.inf < layer.scale < 0)


def absurd_alpha(evidence: Evidence) -> Iterator[Hit]:
    scaled = ((layer.path, layer.scale) for layer in evidence.layers if layer.scale is not None)
    far = {path: scale for path, scale in scaled if ABSURD < scale < math.inf}
    if far:
        yield Hit(list(far), f"up to {max(far.values()):.4g} times")


def same_twice(evidence: Evidence) -> Iterator[Hit]:
    yield from _some(item.key for item in evidence.file.unplaced if item.reason == reading.DUPLICATE)


def two_spellings(evidence: Evidence) -> Iterator[Hit]:
    """By the names in the file: with the names of a model they are put together before anybody sees them."""
    known = evidence.model.keys() - {item.key for item in evidence.file.unplaced if item.reason == reading.DUPLICATE}
    by_flat: dict[str, list[str]] = {}
    for name in dict.fromkeys(split(key, known).name for key in sorted(known)):
        flat = name.replace(".", "_") if in_text_encoder(name) else local(name)
        by_flat.setdefault(flat, []).append(name)
    yield from _some(" and ".join(names) for names in by_flat.values() if len(names) > 1)


def unplaced(evidence: Evidence) -> Iterator[Hit]:
    """One hit for each cause; what is damaged, incomplete or there twice has rules of its own."""
    apart = (reading.DAMAGED, reading.INCOMPLETE, reading.DUPLICATE)
    left = [item for item in evidence.file.unplaced if item.reason not in apart]
    names = evidence.file.names
    for reason in dict.fromkeys(item.reason for item in left):
        items = [item for item in left if item.reason == reason]
        told = CURES.get(reason, items[0].detail)
        if names is not None:
            (line,) = grouped(items, names, evidence.file.architecture, evidence.file.evidence)
            told = line.partition("; ")[2]
        yield Hit([item.key for item in items], f"{reason}: {told[:600]}")


def incomplete(evidence: Evidence) -> Iterator[Hit]:
    items = [item for item in evidence.file.unplaced if item.reason == reading.INCOMPLETE and not _of_axis(item.detail)]
    for detail in dict.fromkeys(item.detail for item in items):
        yield Hit([item.key for item in items if item.detail == detail], detail[:200])


def _of_axis(detail: str) -> bool:
    return "which is no axis of" in detail


def norms_of_no_axis(evidence: Evidence) -> Iterator[Hit]:
    yield from _some(item.key for item in evidence.file.unplaced if _of_axis(item.detail))


def norms_missing(evidence: Evidence) -> Iterator[Hit]:
    """On some layers only, or on none although it is said that they were trained."""
    able = [layer for layer in evidence.layers if layer.family.split(" ")[0] in ("LoRA", "LoHa", "LoKr")]
    without = [layer.path for layer in able if "DoRA" not in layer.family and layer.norm is not None]
    if len(without) < len(able):
        yield from _some(without)
    elif without and _says_dora(evidence.file):
        yield Hit(without, "the metadata says that it was trained as DoRA")


def _says_dora(file: LoRAFile) -> bool:
    trainer = json_object(file.metadata, "ss_network_args")
    told: list[Any] = [trainer.get("dora_wd"), trainer.get("weight_decompose"), trainer.get("use_dora")]
    told += [component.get("use_dora") for component in Configs(file.metadata).components.values()]
    return any(str(value).lower() in ("true", "1") for value in told)


def beyond_float16(evidence: Evidence) -> Iterator[Hit]:
    wide = {key: tensor for key, tensor in evidence.model.items() if tensor.dtype in _WIDER and tensor.numel() > 1}
    yield from _some(key for key, tensor in wide.items() if GREATEST < tensor.abs().max().item() < math.inf)


def rank_beyond_layer(evidence: Evidence) -> Iterator[Hit]:
    found = {}
    for layer in evidence.layers:
        if layer.family.startswith(("LoRA", "sliced")) and layer.rank and layer.shape and len(layer.shape) > 1:
            most = min(layer.shape[0], math.prod(layer.shape[1:]))
            if layer.rank > most:
                found[layer.path] = f"{layer.path} (rank {layer.rank} of {most})"
    yield from _some(found.values())


def mostly_unused(evidence: Evidence) -> Iterator[Hit]:
    """Of the file as a whole: single layers learn little in most files."""
    measured = [layer for layer in evidence.layers if layer.ranks is not None and layer.rank and layer.norm]
    given, needed = sum(layer.rank or 0 for layer in measured), sum(layer.ranks or 0 for layer in measured)
    if len(measured) * UNUSED < given and needed * UNUSED <= given:
        share = needed / given
        yield Hit([], f"{share:.0%} of the ranks do 99 % of the work, {needed / len(measured):.1f} of them in a layer")


def needlessly_wide(evidence: Evidence) -> Iterator[Hit]:
    floats = [tensor for tensor in evidence.model.values() if tensor.is_floating_point() and tensor.numel() > 1]
    wide = [tensor for tensor in floats if tensor.dtype in (torch.float32, torch.float64)]
    for dtype in (torch.float16, torch.bfloat16):
        if wide and all(bool((tensor.to(dtype).to(tensor.dtype) == tensor).all()) for tensor in wide):
            name = str(dtype).removeprefix("torch.")
            saved = sum(tensor.numel() * (tensor.element_size() - dtype.itemsize) for tensor in wide)
            yield Hit([], f"{name} holds every number as well, in {saved / 2**20:.1f} MB less")
            return


def other_hash(evidence: Evidence) -> Iterator[Hit]:
    told = {key: evidence.model.metadata.get(key, "") for key in ("sshs_model_hash", "modelspec.hash_sha256")}
    told = {key: value for key, value in told.items() if value}
    if told:
        true = tensor_hashes(evidence.model, evidence.model.metadata)
        yield from _some(key for key, value in told.items() if value.lower() != true[key].lower())


def misread(evidence: Evidence) -> Iterator[Hit]:
    for told in warnings(evidence.file.adapters.values()):
        yield Hit([], told.removeprefix("ComfyUI's own LoRA loaders misread ").partition(". The loader")[0])


def other_base(evidence: Evidence) -> Iterator[Hit]:
    names = evidence.file.names
    told = both_bases(evidence.file.architecture, evidence.file.evidence, names) if names is not None else ""
    if told:
        yield Hit([], told)


def _some(places: Iterable[str]) -> Iterator[Hit]:
    found = list(places)
    if found:
        yield Hit(found)
