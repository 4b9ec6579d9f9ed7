"""Exact bytes above the loaded model: every tensor storage that torch makes is counted while it lives.

``LiveBytes`` sees each operation's outputs, so tensors saved for backward, adapters, gradients, optimizer state and
copies of weights all count once per storage; scratch space inside a single operation does not.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

STEPS = 3  # the last is the one that is looked at: optimizer state is there


class LiveBytes(TorchDispatchMode):
    """``now`` and ``peak`` bytes of storages made while the mode was on; ``known`` tensors are left out."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.at_backward = 0
        self._ignored = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, Any] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._ignored or key in self._alive:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone(_: Any) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)

    @contextmanager
    def marking_backward(self):
        """Note what is alive whenever a backward begins."""
        original = torch.autograd.backward

        def noted(*args: Any, **kwargs: Any) -> None:
            self.at_backward = self.now
            original(*args, **kwargs)

        with mock.patch("torch.autograd.backward", noted):
            yield


def memory_of(build: Callable[..., Any], base: Any) -> dict[str, int]:
    """Bytes of one contestant, alone, on a thread of its own: an early end of a recomputation confuses the mode's.

    ``before``: what stays between steps (adapters, optimizer, weight copies …); ``held``: what the forward keeps for
    backward; ``step_peak``: the most above ``before`` inside a step; ``peak``: the most above the loaded model at all.
    """
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_memory_of, build, base).result()


def _memory_of(build: Callable[..., Any], base: Any) -> dict[str, int]:
    gc.collect()
    live = LiveBytes([*base.model.parameters(), *base.model.buffers()])
    with live.marking_backward():
        one = build(mode=live)
        try:
            for _ in range(STEPS - 1):
                one.step()
            gc.collect()
            before, peak = live.now, live.peak
            live.peak = before
            one.step()
            return {
                "before": before,
                "held": live.at_backward - before,
                "step_peak": live.peak - before,
                "peak": max(peak, live.peak),
                **one.sizes(),
            }
        finally:
            one.close()
            gc.collect()
