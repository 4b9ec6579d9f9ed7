"""Begin with the weights of a LoRA that is there already.

* ``start_from``: what a LoRA holds for the layers that are trained takes the place of their fresh adapters, exactly:
  tensors, alpha and, where a few layers have another one, rank. Another family, DoRA or size is refused with the
  setting to change.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..kernels.adapter import Adapter
from ..kernels.compose import Sliced, Sum, Swapped
from ..kernels.dora import AXES, DoRA
from ..kernels.embeddings import by_encoder
from ..kernels.full import Full
from ..kernels.lora import DyLoRA
from ..kernels.names import NameTable
from ..kernels.oftv2 import OFTv2
from ..kernels.pieces import as_one, pieces_of
from ..kernels.reading import read_lora
from ..kernels.registry import read_adapter
from ..kernels.safetensors_io import LoraModel
from .embeddings import take_over
from .learners import Component
from .options import OptionError

_SAME_FILES = {"DyLoRA": "LoRA", "LoRA-FA": "LoRA"}  # trained otherwise, kept alike
_SETTINGS = {  # what tells the sizes of a family's tensors
    "LoRA": "tucker",
    "LoHa": "tucker",
    "LoKr": "rank, conv_rank, factor, decompose_both, full_matrix and tucker",
    "full": "train_bias",
    "OFT": "block_size and rescaled",
    "BOFT": "block_size and rescaled",
    "OFTv2": "block_size",
    "IA3": "train_on_input",
    "GLoRA": "rank",
}


def start_from(components: Iterable[Component], given: LoraModel, names: NameTable) -> list[str]:
    """Put what ``given`` holds into the adapters of ``components``; returns notes.

    ``names`` is the table of all layers that the components' paths name: of the model, and of the text encoders where
    those are trained. Raises OptionError.
    """
    components = list(components)
    try:
        file = read_lora(given, names)
    except ValueError as error:
        raise OptionError(f"start_from: {error}") from error
    words = _words(components, file.embeddings)
    fresh = {path: component.adapters for component in components for path in component.adapters}
    shared = {path: _whole(path, file.adapters[path], names) for path in fresh if path in file.adapters}
    if not shared and not words:
        raise OptionError(
            "start_from: none of its layers is trained here. It must be a LoRA for this MODEL, and the layers preset "
            "of the adapter settings must cover it"
        )
    for path, theirs in shared.items():
        _check_kind(path, theirs, fresh[path][path])
    ranks = _other_ranks(shared, {path: fresh[path][path] for path in shared})
    alphas = set()
    for path, theirs in shared.items():
        own = fresh[path][path]
        alpha = _alpha(theirs, own)
        if alpha != own.alpha and alpha is not None:
            alphas.add(alpha)
        fresh[path][path] = _taken(path, theirs, own, path in ranks)
    note = f"started from the given LoRA on {len(shared)} of {len(fresh)} layers"
    if words:
        note += f" and with its embeddings {', '.join(words)}"
    untrained = len(file.adapters) - len(shared)
    if untrained:
        note += f", {untrained} of its layers are not trained here"
    if alphas:
        note += f"; its alpha {', '.join(f'{value:g}' for value in sorted(alphas))} stays"
    if ranks:
        found = ", ".join(f"{rank} on {count}" for rank, count in sorted(Counter(ranks.values()).items()))
        note += f"; its rank {found} layers stays"
    notes = [note, *file.notes]
    if file.unplaced:
        key, _, detail = file.unplaced[0]
        notes.append(f"start_from: {len(file.unplaced)} of its keys fit nothing here ({key[:80]}: {detail})")
    return notes


def _words(components: Iterable[Component], given: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    loose = {name: tensor for component in components for name, tensor in component.loose.items()}
    encoders = list(dict.fromkeys(name.rpartition(".")[2] for name in loose))
    return take_over(loose, by_encoder(given, encoders))


def _whole(path: str, adapter: Adapter, names: NameTable) -> Adapter:
    """What a file holds of a layer in pieces, as one adapter."""
    if not isinstance(adapter, Sum | Sliced | Swapped):
        return adapter
    try:
        return read_adapter(as_one(pieces_of(adapter), names.shapes[path]), names.shapes[path])[0]
    except ValueError as error:
        raise OptionError(f"start_from: what it holds for {path} cannot be trained as one adapter: {error}") from error


def _check_kind(path: str, theirs: Adapter, own: Adapter) -> None:
    (family, dora), (wanted, own_dora) = _kind(theirs), _kind(own)
    if family != wanted:
        raise OptionError(
            f"start_from is {family} on {path}, algorithm is {own.inner.name if isinstance(own, DoRA) else own.name}: "
            f"set algorithm to {family}, or start from another LoRA"
        )
    if dora != own_dora:
        raise OptionError(f"start_from has dora {dora} on {path}, dora is {own_dora}: set dora to {dora}")


def _kind(adapter: Adapter) -> tuple[str, str]:
    """(family, axis of DoRA)"""
    if isinstance(adapter, DoRA):
        return _kind(adapter.inner)[0], AXES[adapter.axis]
    name = getattr(adapter, "name", type(adapter).__name__)
    return _SAME_FILES.get(name, name), "off"


def _rank(adapter: Adapter) -> int | None:
    return getattr(adapter.inner if isinstance(adapter, DoRA) else adapter, "rank", None)


def _other_ranks(shared: Mapping[str, Adapter], fresh: Mapping[str, Adapter]) -> dict[str, int]:
    """path → rank, of the layers whose rank is not what the settings say. Raises OptionError where most are such."""
    other: dict[str, int] = {}
    for option, spatial in (("rank", False), ("conv_rank", True)):
        kind = {path: _rank(theirs) for path, theirs in shared.items() if _is_spatial(theirs) == spatial}
        found = {path: rank for path, rank in kind.items() if rank is not None and rank != _rank(fresh[path])}
        if 2 * len(found) > len(kind):
            rank = Counter(found.values()).most_common(1)[0][0]
            path = next(path for path, other_rank in found.items() if other_rank == rank)
            raise OptionError(
                f"start_from has rank {rank} on {path}, {option} is {_rank(fresh[path])}: set {option} to {rank}"
            )
        other |= found
    for path, rank in other.items():
        own = fresh[path]
        if isinstance(own, DyLoRA) and rank % own.unit:
            raise OptionError(
                f"start_from has rank {rank} on {path}, unit is {own.unit}: set unit to a divisor of {rank}"
            )
    return other


def _is_spatial(adapter: Adapter) -> bool:
    return adapter.shape is not None and any(size > 1 for size in adapter.shape[2:])


def _taken(path: str, theirs: Adapter, own: Adapter, other_rank: bool) -> Adapter:
    """``own`` with the tensors and the alpha of ``theirs``."""
    kept = own.tensors if isinstance(own, Full) else {}  # a difference that is not in the file is none
    tensors: dict[str, Tensor] = {**kept, **theirs.tensors}
    sizes = {name: tuple(tensor.shape) for name, tensor in own.tensors.items()}
    if tensors.keys() != sizes.keys() or not (other_rank or _sizes(tensors) == sizes):
        odd = next(name for name in (*tensors, *sizes) if _sizes(tensors).get(name) != sizes.get(name))
        raise OptionError(
            f"start_from has {odd} {_sizes(tensors).get(odd, 'nowhere')} on {path}, the settings make it "
            f"{sizes.get(odd, 'nowhere')}: set {_SETTINGS[_kind(own)[0]]} as in its own training"
        )
    dtype = next(iter(own.tensors.values())).dtype
    adapter = own.with_tensors({name: _copied(tensor, dtype) for name, tensor in tensors.items()})
    for part in (adapter, adapter.inner) if isinstance(adapter, DoRA) else (adapter,):
        part.alpha = _alpha(theirs, own)
    if isinstance(adapter, OFTv2) and isinstance(theirs, OFTv2):
        adapter.scaled = theirs.scaled
    return adapter


def _alpha(theirs: Adapter, own: Adapter) -> float | None:
    """That of ``theirs``, but not the little that a file's precision takes from it; the rank where it stands for it."""
    rounded = None if own.alpha is None else torch.tensor(own.alpha).item()
    if theirs.alpha == rounded:
        return own.alpha
    rank = _rank(theirs)
    return rank if rank and theirs.alpha in (0.0, math.inf) else theirs.alpha  # as ``low_rank_scale`` has it


def _sizes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _copied(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()
