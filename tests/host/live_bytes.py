"""Exact counts of what a training step holds in memory, in bytes of tensor storage.

* ``LiveBytes``: the peak of everything torch's operators made and that is still alive, above what was there before.
  It sees forward, backward and recomputation alike, so a checkpointed block's own peak is part of the number.
* ``SavedTensors``: every tensor that autograd keeps for backward, and the bytes of their distinct storages.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``existing``: tensors that were there before and do not count (the model, the adapters)."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class SavedTensors:
    """What was handed to autograd inside ``recording``; ``existing`` storages (the model's own) cost nothing."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    @contextmanager
    def recording(self):
        def pack(tensor: Tensor) -> Tensor:
            self.tensors.append(tensor.detach())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield self

    def bytes(self, existing: Iterable[Tensor]) -> int:
        ours = {tensor.untyped_storage()._cdata for tensor in existing}
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in self.tensors}
        return sum(size for key, size in storages.items() if key not in ours)
