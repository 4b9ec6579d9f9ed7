"""Make a model's blocks fit for training: safe to differentiate, and cheap in memory when asked.

* ``block_modules``: the modules that are really called, one per block (the stacks of ``kernels.block_map``, one level
  deeper where the host walks through a block's children itself).
* ``guarded``: for the time of a ``with``, blocks that write in place run out of place, and with ``checkpoint`` a
  block keeps only its inputs and is run once more in backward (Chen et al. 2016, arXiv:1604.06174). Blocks on small
  inputs, the bottom of a UNet, are left as they are: they cost much time and hold little memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from .inplace import OutOfPlace

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
def guarded(modules: Iterable[nn.Module], checkpoint: bool) -> Iterator[None]:
    """Guard ``modules`` until the end of the ``with``; their instance attributes are then as before."""
    sizes = _Sizes()
    guards = [_Guard(module, sizes if checkpoint else None) for module in modules]
    try:
        for guard in guards:
            guard.hang()
        yield
    finally:
        for guard in reversed(guards):
            guard.remove()


class _Sizes:
    """The largest input any block has had; the first block of a network has it at once."""

    def __init__(self) -> None:
        self.largest = 0

    def worthwhile(self, values: Iterable[Any]) -> bool:
        # the first tensor is what flows through the block; others (text, positions) are as large for small blocks
        size = next((value.numel() for value in values if isinstance(value, torch.Tensor)), 0)
        self.largest = max(self.largest, size)
        return size >= WORTHWHILE_SHARE * self.largest


class _Guard:
    """The forward of one block, out of place where it has to be, checkpointed where ``sizes`` finds it worthwhile."""

    def __init__(self, module: nn.Module, sizes: _Sizes | None) -> None:
        self.module, self.sizes = module, sizes
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
        if self.sizes is not None and self.sizes.worthwhile((*args, *kwargs.values())):
            return run_checkpointed(
                self.out_of_place, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
            )
        return self.out_of_place(*args, **kwargs)

    def out_of_place(self, *args: Any, **kwargs: Any) -> Any:
        if self.writes_in_place is False:
            return self.inner(*args, **kwargs)
        with OutOfPlace() as mode:
            result = mode.outcome(self.inner(*args, **kwargs))
        self.writes_in_place = mode.seen > 0
        return result
