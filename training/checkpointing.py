"""Make a model's blocks fit for training: safe to differentiate, and cheap in memory when asked.

* ``block_modules``: the modules that are really called, one per block (the stacks of ``kernels.block_map``, one level
  deeper where the host walks through a block's children itself).
* ``guarded``: for the time of a ``with``, blocks that write in place run out of place, and with ``checkpoint`` a
  block keeps only its inputs and is run once more in backward (Chen et al. 2016, arXiv:1604.06174). Blocks on small
  inputs, the bottom of a UNet, are left as they are: they cost much time and hold little memory.
* With ``offload`` those inputs wait in main memory: what a run holds on the device no longer grows with its depth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from .activations import counter
from .inplace import OutOfPlace
from .offloading import MainMemory, split

# Blocks whose input is a smaller share of the largest block's than this are not worth running twice (dev/LOG.md).
WORTHWHILE_SHARE = 0.2


def block_modules(blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The modules to guard: a block itself, or its parts where it is only a list that its owner walks through."""
    found: list[nn.Module] = []
    for block in blocks:
        if isinstance(block, nn.Sequential | nn.ModuleList):
            for child in block.children():
                if any(True for _ in child.children()):
                    found.extend(_inner_stack(child) or [child])
        else:
            found.append(block)
    return found


def _inner_stack(module: nn.Module) -> list[nn.Module]:
    """A deep child (ten transformer layers) is guarded layer by layer, or recomputing it would be the peak."""
    for child in module.children():
        if type(child) is nn.ModuleList and len(child) > 1 and all(any(True for _ in c.children()) for c in child):
            return list(child)
    return []


@contextmanager
def guarded(modules: Iterable[nn.Module], checkpoint: bool, offload: bool = False) -> Iterator[None]:
    """Guard ``modules`` until the end of the ``with``; their instance attributes are then as before."""
    sizes = _Sizes() if checkpoint else None
    memory = MainMemory() if checkpoint and offload else None
    guards = [_Guard(module, sizes, memory) for module in modules]
    try:
        for guard in guards:
            guard.hang()
        yield
    finally:
        for guard in reversed(guards):
            guard.remove()


def _size(values: Iterable[Any]) -> int:
    """Of the first tensor: it is what flows through a block; others (text, positions) are as large for small blocks."""
    return next((value.numel() for value in values if isinstance(value, torch.Tensor)), 0)


class _Sizes:
    """The largest input any block has had; the first block of a network has it at once."""

    def __init__(self) -> None:
        self.largest = 0

    def worthwhile(self, size: int) -> bool:
        self.largest = max(self.largest, size)
        return size >= WORTHWHILE_SHARE * self.largest


class _Guard:
    """The forward of one block, out of place where it has to be, checkpointed where ``sizes`` finds it worthwhile.

    With ``memory`` a checkpointed block's inputs wait there.
    """

    def __init__(self, module: nn.Module, sizes: _Sizes | None, memory: MainMemory | None) -> None:
        self.module, self.sizes, self.memory = module, sizes, memory
        self.inner = module.forward
        self.had_own = "forward" in module.__dict__
        self.writes_in_place: bool | None = None  # not known before the first call

    def hang(self) -> None:
        self.module.__dict__["forward"] = self.forward

    def remove(self) -> None:
        if self.module.__dict__.get("forward") != self.forward:
            return  # somebody replaced it meanwhile: theirs stays
        if self.had_own:
            self.module.__dict__["forward"] = self.inner
        else:
            del self.module.__dict__["forward"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        size = _size((*args, *kwargs.values()))
        if self.sizes is None or not self.sizes.worthwhile(size):
            return self.out_of_place(*args, **kwargs)
        if (counting := counter()) is not None:
            flowing, staying = split((args, kwargs))
            counting.keep(staying)
            (counting.keep if self.memory is None else counting.send_away)(flowing)
            if counting.is_largest(type(self.module), size):
                with counting.one_block():
                    return self.out_of_place(*args, **kwargs)
        return self.checkpointed(args, kwargs)

    def checkpointed(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.memory is None:
            return run_checkpointed(self.out_of_place, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        parcel = self.memory.parcel(args, kwargs)

        def run() -> Any:
            args, kwargs = parcel.open()
            return self.out_of_place(*args, **kwargs)

        return run_checkpointed(run, use_reentrant=False, preserve_rng_state=False)

    def out_of_place(self, *args: Any, **kwargs: Any) -> Any:
        if self.writes_in_place is False:
            return self.inner(*args, **kwargs)
        with OutOfPlace() as mode:
            result = mode.outcome(self.inner(*args, **kwargs))
        self.writes_in_place = mode.seen > 0
        return result
