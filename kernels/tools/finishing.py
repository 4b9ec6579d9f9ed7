"""From what a tool made to what is written: precision, and what the file says of itself.

* ``finished``: the file in a precision, its metadata with parents, options and retained energy; notes.
* ``PRECISIONS``: what can be chosen; ``written_in``, ``precision_of``: what comes of that.
* ``options_of``, ``spelled_as``, ``digest``: what was asked for; what a file is like; what tensors are, for ``Parent``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch import Tensor

from ..dora import PARTS as DORA
from ..low_rank import Cut
from ..reading import LoRAFile
from .budget import Budget
from .convert import GAINS, in_precision
from .convert import PRECISIONS as _DTYPES
from .outcome import Outcome
from .provenance import Parent, with_parents

AS_GIVEN = "as given"
_OWN = tuple(f".{part}" for part in {*GAINS, *DORA})
PRECISIONS = {
    AS_GIVEN: "that of what goes in, the widest of it",
    "float32": "exact, twice as large as the others",
    "float16": "eleven bits, up to 65504; what other trainers and loaders use most",
    "bfloat16": "eight bits, never overflows",
}


def finished(
    outcome: Outcome,
    tool: str,
    parents: Sequence[Parent],
    options: Mapping[str, object],
    precision: str = AS_GIVEN,
    given: torch.dtype | None = None,
) -> tuple[LoRAFile, list[str]]:
    """(what is to be written, what there is to say of it). ``given``: what ``AS_GIVEN`` is; None leaves all numbers."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: {str(precision)[:60]!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    if not outcome.file.adapters and not outcome.file.embeddings:
        why = "; ".join(dict.fromkeys(outcome.notes)) or "nothing differs"
        raise ValueError(f"{tool}: nothing is left that a LoRA could hold: {why}")
    dtype = given if precision == AS_GIVEN else _DTYPES[precision]
    file, notes = (outcome.file, []) if dtype is None else in_precision(outcome.file, dtype)
    told = {key: value for key, value in options.items() if value not in (None, "")}
    metadata = with_parents(file.metadata, tool, parents, told, replace(outcome, file=file))
    return replace(file, metadata=metadata), notes


def written_in(precision: str, given: Iterable[tuple[str, Tensor]]) -> torch.dtype:
    """What the numbers of a result are written in; ``given`` is what goes in."""
    return (precision_of(given) if precision == AS_GIVEN else _DTYPES[precision]) or torch.float32


def precision_of(tensors: Iterable[tuple[str, Tensor]]) -> torch.dtype | None:
    """The widest that LoRAs are written in of the floating numbers of files, or of adapters; None without any.

    Single numbers, such as alpha, do not count, nor does what stays in a precision of its own (``in_precision``).
    """
    dtypes = {
        tensor.dtype
        for name, tensor in tensors
        if tensor.is_floating_point() and tensor.numel() > 1 and not f".{name}".endswith(_OWN)
    }
    if not dtypes:
        return None
    widest = reduce(torch.promote_types, (dtype if dtype.itemsize > 1 else torch.bfloat16 for dtype in dtypes))
    return widest if widest in _DTYPES.values() else torch.float32


def options_of(cut: Cut | Budget | None) -> dict[str, object]:
    """What was asked for, as a part of a tool's options."""
    return {} if cut is None else {name: value for name, value in vars(cut).items() if value is not None}


def spelled_as(tensors: Iterable[str]) -> str:
    """A dialect whose parts are called as those of a file already are."""
    return "diffusers" if any(".lora_A." in key for key in tensors) else "native"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, types, shapes and numbers; the same however they are stored."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        plain = tensor.detach().cpu().contiguous()
        found.update(memoryview(plain.view(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return found.hexdigest()
