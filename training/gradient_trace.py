"""Watch one forward and backward, module by module, to find where a gradient gets lost.

``Trace`` hangs hooks on modules for the time of a ``with``: each call is noted when it is done, so what is inside a
module comes before the module. ``broken`` and ``spoilt`` say in words what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@dataclass
class _Call:
    """One call of a module. ``cuts``: what went in had a gradient, what came out has none."""

    name: str
    cuts: bool
    connected: bool  # what came out takes part in autograd
    finite: bool
    reached: bool = False  # a gradient arrived at what came out
    passed: bool = False  # and left for what went in


class Trace:
    """``calls`` in forward order; ``error`` is what the step ended with."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.error: BaseException | None = None
        self._inside: list[str] = []  # modules that have been entered and not left
        self._arrivals: list[list[_Call]] = []  # in backward order; calls that gave the same tensor arrive together
        self._recording = False
        self._same: dict[tuple[int, int], tuple[Any, list[_Call]]] = {}  # what made a tensor -> the calls that gave it

    @contextmanager
    def watching(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in modules.items():
                enter = module.register_forward_pre_hook(partial(self._enter, name))
                leave = module.register_forward_hook(partial(self._leave, name), with_kwargs=True)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
            yield

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward only: blocks that are run again in backward are not noted again."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._same.clear()

    def _enter(self, name: str, module: nn.Module, args: tuple) -> None:
        if self._recording:
            self._inside.append(name)

    def _leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self._recording:
            return
        self._inside.pop()
        if not torch.is_grad_enabled():
            return
        entered = [tensor for tensor in _tensors((args, kwargs)) if tensor.requires_grad]
        left = _tensors(output)
        alive = [tensor for tensor in left if tensor.requires_grad]
        finite = all(bool(tensor.detach().isfinite().all()) for tensor in left)
        call = _Call(name or "the model", bool(entered and left and not alive), bool(alive), finite)
        self.calls.append(call)
        for tensor in alive:
            made_by = tensor.grad_fn
            _, calls = self._same.setdefault((id(made_by), tensor.output_nr), (made_by, []))
            calls.append(call)
            tensor.register_hook(partial(self._arrive, calls))
        for tensor in entered:
            tensor.register_hook(partial(_pass, call))

    def _arrive(self, calls: list[_Call], grad: Tensor) -> None:
        if not calls[0].reached:
            self._arrivals.append(calls)
        for call in calls:
            call.reached = True

    # -- what was found

    def broken(self) -> str:
        """The module that stops the gradient."""
        if self._inside:
            return f"the forward fails in {self._inside[-1] or 'the model'}"
        if self.error is not None:
            under_way = [call for calls in reversed(self._arrivals) for call in calls if not call.passed]
            return f"the backward fails in {under_way[0].name}" if under_way else "the backward fails in the loss"
        if cuts := [call.name for call in self.calls if call.cuts]:
            return f"{cuts[0]} stops the gradient"
        stranded = [call.name for call in self.calls if call.connected and not call.reached]
        return f"it is lost after {stranded[-1]}" if stranded else "it is lost outside of the model's layers"

    def spoilt(self) -> str:
        """The first module that gives inf or NaN."""
        first = next((call.name for call in self.calls if not call.finite), None)
        return f"{first} gives inf or NaN" if first else "it overflows in the backward"


def _pass(call: _Call, grad: Tensor) -> None:
    call.passed = True


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
