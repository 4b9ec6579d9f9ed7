"""Keep what a block was called with in main memory until it is needed again.

* ``MainMemory``: the store of one loan. Only what the block computes from what is trained goes away; text, positions
  and the like are shared by all blocks and stay.
* ``Parcel``: the arguments of one call: as they were for the first run, fetched back for the second.

On CUDA the copies run beside the computation, from and to pinned memory: when backward begins with a block, the
arguments of the block before it are on their way already. Elsewhere a copy is a plain copy.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


class MainMemory:
    """``parcels`` by number, as long as the graph that needs them lives."""

    def __init__(self) -> None:
        self.parcels: weakref.WeakValueDictionary[int, Parcel] = weakref.WeakValueDictionary()
        self._count = 0
        self._known: dict[int, tuple[weakref.ref, int, weakref.ref]] = {}  # id of a tensor -> it, version, its copy
        self._streams: dict[torch.device, Any] = {}

    def parcel(self, args: tuple, kwargs: dict[str, Any]) -> Parcel:
        parcel = Parcel(self, self._count, args, kwargs)
        self.parcels[self._count] = parcel
        self._count += 1
        return parcel

    def keep(self, tensor: Tensor) -> _Copy:
        """A copy of ``tensor``; the same one if it is there already."""
        original, version, copy = self._known.get(id(tensor), (None, 0, None))
        found = copy() if copy is not None else None
        if found is None or original is None or original() is not tensor or version != tensor._version:
            found = _Copy(tensor, self._stream(tensor.device))
            self._known = {key: entry for key, entry in self._known.items() if entry[2]() is not None}
            self._known[id(tensor)] = (weakref.ref(tensor), tensor._version, weakref.ref(found))
        return found

    def _stream(self, device: torch.device) -> Any:
        if device.type != "cuda":
            return None
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


class Parcel:
    """Arguments of one call. ``open`` gives them: the originals at first, with fetched copies ever after."""

    def __init__(self, store: MainMemory, number: int, args: tuple, kwargs: dict[str, Any]) -> None:
        self.store, self.number = store, number
        self._originals: Any = (args, kwargs)
        leaves, self._structure = tree_flatten((args, kwargs))
        self.copies = {index: store.keep(leaf) for index, leaf in enumerate(leaves) if _flows(leaf)}
        self._leaves = [None if index in self.copies else leaf for index, leaf in enumerate(leaves)]

    def open(self) -> tuple[tuple, dict[str, Any]]:
        if self._originals is not None:
            originals, self._originals = self._originals, None
            return originals
        fetched = [self.copies[i].back() if i in self.copies else leaf for i, leaf in enumerate(self._leaves)]
        if (previous := self.store.parcels.get(self.number - 1)) is not None:  # the next one that backward asks for
            for copy in previous.copies.values():
                copy.send_for()
        return tree_unflatten(fetched, self._structure)


def split(values: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors in a structure: those that a parcel sends away, and the others."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return [tensor for tensor in tensors if _flows(tensor)], [tensor for tensor in tensors if not _flows(tensor)]


def _flows(value: Any) -> bool:
    """Whether ``value`` comes out of what is trained."""
    return isinstance(value, Tensor) and value.requires_grad and not value.is_leaf


class _Copy:
    """One tensor in main memory: ``there``."""

    def __init__(self, tensor: Tensor, stream: Any) -> None:
        self.device, self.stream = tensor.device, stream
        self._coming: tuple[Tensor, Any] | None = None  # on its way to the device
        self._lent: weakref.ref[Tensor] | None = None  # what came back, while somebody still has it
        plain = tensor.detach()
        if stream is None:
            self.there = plain.to("cpu", copy=True)
            return
        self.there = torch.empty_like(plain, device="cpu", pin_memory=True)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.there.copy_(plain, non_blocking=True)
        plain.record_stream(stream)  # its memory is not given to others before the copy is made

    def send_for(self) -> None:
        """Begin to fetch it, where that can be done beside the computation."""
        if self.stream is None or self._coming is not None or self._still_lent() is not None:
            return
        with torch.cuda.stream(self.stream):
            self._coming = self.there.to(self.device, non_blocking=True), self.stream.record_event()

    def back(self) -> Tensor:
        """The tensor on its device again, as something that gradients flow through."""
        if (lent := self._still_lent()) is not None:
            return lent
        if self.stream is None:
            # on the CPU the copy itself will do: a block does not write into its arguments
            tensor = self.there.to(self.device)
        else:
            self.send_for()
            assert self._coming is not None
            (tensor, arrived), self._coming = self._coming, None
            current = torch.cuda.current_stream(self.device)
            current.wait_event(arrived)
            tensor.record_stream(current)
        tensor = tensor.detach().requires_grad_()
        self._lent = weakref.ref(tensor)
        return tensor

    def _still_lent(self) -> Tensor | None:
        return None if self._lent is None else self._lent()
