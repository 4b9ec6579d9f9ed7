"""Where ComfyUI's own LoRA loaders (0.3.75 to 0.33) give another effect than was trained, and files that they read.

* ``FAULTS``: what they misread, in one table; ``fault_of``: the row that an adapter falls under, None where they are
  right at every strength. A test makes every family with every option and compares the table with the running host.
* ``warnings``: what to tell about adapters, in sentences.
* ``rewritten``: a ``LoRAFile`` with the same effect that they read right. What can be put otherwise stays what it is
  (cores are multiplied out); what depends on the weight becomes its difference, as a LoRA where a small rank is all of
  it, else dense.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, wide
from .boft import PeftBOFT
from .compose import Sum, Wrapper
from .dora import DoRA
from .full import Full
from .glora import A1, A2, B1, B2, GLoRA
from .ia3 import IA3
from .loha import T1, W1_A, W1_B, W2_A, W2_B, LoHa
from .lokr import T2, W1, LoKr
from .lokr import W2 as LOKR_W2
from .lokr import W2_A as LOKR_W2_A
from .lokr import W2_B as LOKR_W2_B
from .lora import DOWN, MID, UP, LoRA
from .low_rank import LowRank, as_lora, whole
from .oftv2 import OFTv2
from .reading import LoRAFile
from .rotations import OutputRotation

LEFT_OUT, FAILS, WRONG = "left out", "fails", "wrong"
RANKS = 64  # a difference of no greater rank is written as a LoRA
EXACT = 1e-5  # ‖error‖ / ‖difference‖ up to which it counts as one


@dataclass(frozen=True)
class Fault:
    """``outcome``: layer ``left out``, loader ``fails``, or ``wrong`` values; ``why`` for people."""

    name: str
    outcome: str
    why: str
    fits: Callable[[Adapter], bool]


FAULTS = (
    Fault("(IA)³", LEFT_OUT, "they do not know it", lambda a: isinstance(a, IA3)),
    Fault("OFTv2", LEFT_OUT, "they do not know it", lambda a: isinstance(a, OFTv2)),
    Fault("BOFT of PEFT", LEFT_OUT, "they do not know it", lambda a: isinstance(a, PeftBOFT)),
    Fault(
        "OFT and BOFT",
        WRONG,
        "they scale rotations twice (strength 0.5 acts as 0.25, −1 as 1), take the constraint without the number of "
        "outputs and leave out what is rescaled",
        lambda a: isinstance(a, OutputRotation),
    ),
    Fault(
        "DoRA per output",
        WRONG,
        "they divide by the norms of the base instead of those of base and adapter together",
        lambda a: isinstance(a, DoRA) and a.axis == 0,
    ),
    Fault(
        "DoRA per input on layers of one output",
        WRONG,
        "they take its norms for that of the output",
        lambda a: _norms_of_one_output(a),
    ),
    Fault(
        "Tucker cores of one or three dimensions",
        FAILS,
        "they spell out two dimensions",
        lambda a: bool(a.tensors.keys() & {MID, T1, T2}) and _dimensions(a) in (1, 3),
    ),
    Fault("LoKr with a Tucker core", LEFT_OUT, "their product fails", lambda a: T2 in a.tensors and not _is_single(a)),
    Fault(
        "LoKr with a whole second matrix on convolutions of one or three dimensions",
        WRONG,
        "they line its halves up for two dimensions only",
        lambda a: LOKR_W2 in a.tensors and _dimensions(a) in (1, 3),
    ),
    Fault(
        "GLoRA of full rank",
        WRONG,
        "they take it for one of the old files, whose factors are exchanged",
        lambda a: isinstance(a, GLoRA) and len(a.tensors[A1]) == len(a.tensors[B1]) == a.rank,
    ),
)


def fault_of(adapter: Adapter) -> Fault | None:
    """What ComfyUI's own loaders make of an adapter otherwise than it is; None where they are right."""
    if isinstance(adapter, Sum):
        return next(filter(None, map(fault_of, adapter.parts)), None)
    if isinstance(adapter, Wrapper):
        return fault_of(adapter.inner)
    return next((fault for fault in FAULTS if fault.fits(adapter)), None)


def warnings(adapters: Iterable[Adapter]) -> list[str]:
    """A sentence for each thing that they misread, empty where they are right."""
    counts = Counter(fault for fault in map(fault_of, adapters) if fault)
    return [
        f"ComfyUI's own LoRA loaders misread {fault.name} ({count} layers): {fault.why}. The loader of this pack reads "
        "it right; Save LoRA writes a file for the others with for_core"
        for fault, count in counts.items()
    ]


def rewritten(file: LoRAFile, weight_of: Callable[[str], Tensor] | None) -> tuple[LoRAFile, list[str]]:
    """(``file`` as ComfyUI's own loaders read it right, what was done).

    ``weight_of(path)`` are the weights that it was trained on; without it, what depends on them is a ValueError.
    """
    adapters, done, worst = dict(file.adapters), Counter[str](), 0.0
    for path, adapter in file.adapters.items():
        fault = fault_of(adapter)
        if fault is None:
            continue
        plain = _without_weight(adapter)
        if plain is None:
            if weight_of is None:
                raise ValueError(f"{path}: what {fault.name} does depends on the weights; connect the MODEL, or CLIP")
            plain, error = _difference(adapter, weight_of(path))
            worst = max(worst, error)
        adapters[path] = plain
        done[plain.name if isinstance(plain, Full) else f"{plain.name} without core"] += 1
    told = ", ".join(f"{count} layers as {what}" for what, count in done.items())
    if not told:
        return file, []
    notes = [f"written for ComfyUI's own loaders: {told}; largest error {worst:.0e}"]
    if any(isinstance(adapter, IA3) and adapter.scales_bias for adapter in file.adapters.values()):
        notes.append("PEFT's (IA)³ scales the biases of its layers too, which are left as they are")
    return replace(file, adapters=adapters), notes


def _dimensions(adapter: Adapter) -> int:
    """Of the kernel."""
    return 0 if adapter.shape is None else len(adapter.shape) - 2


def _norms_of_one_output(adapter: Adapter) -> bool:
    """Norms (1, in, …) of a weight (1, in, …), told from those per output by nothing but their number."""
    return isinstance(adapter, DoRA) and adapter.axis == 1 and adapter.shape is not None and adapter.shape[0] == 1


def _is_single(adapter: Adapter) -> bool:
    """Whether the first LoKr matrix is one number."""
    return W1 in adapter.tensors and adapter.tensors[W1].numel() == 1


def _without_weight(adapter: Adapter) -> Adapter | None:
    """The same in a form that is read right, None where that takes the weight."""
    tensors, shape = adapter.tensors, adapter.shape
    if isinstance(adapter, DoRA):
        readable = adapter.axis == 1 and not _norms_of_one_output(adapter)
        inner = _without_weight(adapter.inner) if readable else None
        return None if inner is None else DoRA(inner, adapter.magnitude, 1)  # type: ignore[arg-type]
    if isinstance(adapter, LoRA):
        down = torch.einsum("pq...,qi->pi...", wide(tensors[MID]), wide(tensors[DOWN]).flatten(1))
        return LoRA(down, tensors[UP], adapter.alpha)
    if isinstance(adapter, LoHa):
        pairs = zip((W1_A, W1_B, W2_A, W2_B), adapter.pairs(), strict=True)
        return LoHa(dict(pairs), shape, adapter.alpha)
    if isinstance(adapter, LoKr):
        _, outer, low = adapter.halves()
        outer, low = (torch.eye(len(outer)), outer) if low is None else (outer, low)
        kept = {name: tensor for name, tensor in tensors.items() if name not in (LOKR_W2, LOKR_W2_A, LOKR_W2_B, T2)}
        halves = {LOKR_W2_A: outer, LOKR_W2_B: low}
        return LoKr(kept | halves, shape, adapter.scale * len(low))
    if isinstance(adapter, GLoRA):  # one more rank that does nothing tells it from an old file
        ranks = {A1: 1, A2: 0, B1: 1, B2: 0}
        wider = {name: _widened(tensor, ranks[name]) for name, tensor in tensors.items()}
        return GLoRA(wider, shape, adapter.scale * (adapter.rank + 1))
    return None


def _widened(tensor: Tensor, dimension: int) -> Tensor:
    return torch.cat([tensor, torch.zeros_like(tensor.narrow(dimension, 0, 1))], dimension)


def _difference(adapter: Adapter, weight: Tensor) -> tuple[Adapter, float]:
    """(a LoRA of its rank where that is small, else the difference itself; the relative error)."""
    delta = adapter.difference(weight).detach()
    matrix = delta.double().flatten(1)
    found = whole(matrix, RANKS, EXACT / 2)
    if found is None:
        return Full({"diff": delta.float()}, delta.shape), 0.0
    small = LowRank(found.up.float(), found.down.float())
    error = (matrix - small.up.double() @ small.down.double()).norm().item() / matrix.norm().item()
    return as_lora(small, delta.shape), error
