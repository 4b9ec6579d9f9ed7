"""How much a forward keeps for its backward, counted in bytes of tensor storage.

``Activations.counting`` is one ``with`` around a forward, whose graph is good for nothing else: what is counted is not
kept, so that counting needs little memory itself. Checkpointed blocks keep their inputs only; what such a block needs
while it is run once more is found by running the largest of each kind without its checkpoint.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_active = threading.local()


def counter() -> Activations | None:
    """The one that is counting in this thread."""
    return getattr(_active, "counter", None)


class Activations:
    """``kept``: bytes alive on the device for backward; ``block``: the most that one checkpointed block adds to them
    while it runs again; ``away``: bytes that wait in main memory. Storages of ``existing`` tensors cost nothing.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        self.kept = self.block = self.away = 0
        self._known = {_key(tensor) for tensor in existing if type(tensor) in (Tensor, nn.Parameter)}
        self._sets = [self._known]  # of all and, while one block is run, of that one
        self._sent: set[int] = set()
        self._measured: dict[type, int] = {}  # kind of block -> size of the largest input

    @contextmanager
    def counting(self) -> Iterator[Activations]:
        _active.counter = self
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._see, lambda nothing: nothing):
                yield self
        finally:
            _active.counter = None

    def keep(self, values: Iterable[Tensor]) -> None:
        """What a checkpoint keeps on the device."""
        for value in values:
            self._see(value)

    def send_away(self, values: Iterable[Tensor]) -> None:
        """What waits in main memory instead; what is sent twice is there once."""
        for value in values:
            if _key(value) not in self._sent:
                self._sent.add(_key(value))
                weakref.finalize(value.untyped_storage(), self._sent.discard, _key(value))
                self.away += value.nbytes

    def is_largest(self, kind: type, size: int) -> bool:
        """Whether no block of this kind with an input as large has been measured yet."""
        if size <= self._measured.get(kind, 0):
            return False
        self._measured[kind] = size
        return True

    @contextmanager
    def one_block(self) -> Iterator[None]:
        """A block run without its checkpoint: what it keeps would be there only while it is run again."""
        before = self.kept, self._known
        self.kept, self._known = 0, set(self._known)
        self._sets.append(self._known)
        try:
            yield
        finally:
            self._sets.pop()
            self.block = max(self.block, self.kept)
            self.kept, self._known = before

    def _see(self, tensor: Tensor) -> None:
        key = _key(tensor)
        if key in self._known:
            return
        self._known.add(key)
        storage = tensor.untyped_storage()
        self.kept += storage.nbytes()
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        """Another storage may come to lie there."""
        for known in self._sets:
            known.discard(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
