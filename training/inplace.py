"""Run a block that writes in place as if it did not.

Several hosts' transformer blocks say ``img += …``, ``x.addcmul_(…)``, ``inplace=True`` or ``out=x``. Autograd then
refuses to differentiate them, or, where a checkpoint recomputes from inputs that have changed meanwhile, silently
returns wrong gradients.

``OutOfPlace`` intercepts torch's own functions: every in-place operation makes a new tensor instead, and whoever uses
the old tensor later, inside the same ``with``, is given the new one. Writing to a part of a tensor (``x[:, :n].mul_``)
makes a new whole, which all parts are then taken from. Inputs of the block are left as they were.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map_only

_ASSIGNMENTS: dict[str, Callable[..., Tensor]] = {
    "__iadd__": torch.add,
    "__isub__": torch.sub,
    "__imul__": torch.mul,
    "__itruediv__": torch.div,
}
# end in an underscore, change no values
_HARMLESS = {"requires_grad_", "retain_grad", "detach_", "share_memory_", "__setstate__"}


_active = threading.local()  # autograd recomputes on threads of its own


def latest(tensor: Tensor) -> Tensor:
    """What ``tensor`` has become inside the ``OutOfPlace`` around the caller.

    Torch's functions ask by themselves; custom autograd Functions, which no function mode sees, have to.
    """
    for mode in getattr(_active, "modes", ()):
        tensor = mode.outcome(tensor)
    return tensor


class OutOfPlace(TorchFunctionMode):
    """``seen`` counts the operations that were made out of place; ``outcome`` follows a tensor to its latest value."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self._latest: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # an id is only good while its tensor lives

    def __enter__(self) -> OutOfPlace:
        if not hasattr(_active, "modes"):
            _active.modes = []
        _active.modes.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _active.modes.remove(self)

    def outcome(self, value: Any) -> Any:
        """``value`` with every tensor replaced by what it became."""
        if not self._latest:
            return value
        with torch._C.DisableTorchFunction():  # or asking a tensor for its base would be answered for its outcome
            return tree_map_only(Tensor, self._current, value)

    def _current(self, tensor: Tensor) -> Tensor:
        while id(tensor) in self._latest:
            tensor = self._latest[id(tensor)]
        whole = tensor._base
        if whole is not None and id(whole) in self._latest:
            return _same_part(tensor, whole, self._current(whole))
        return tensor

    def _became(self, old: Tensor, new: Tensor) -> Tensor:
        """What is used in the place of ``old`` from now on."""
        if new is old:  # a dropout of nothing
            return old
        whole = old._base
        if whole is None:
            self._follow(old, new)
            return new
        current = self._current(whole)
        if old.requires_grad and not current.requires_grad and old.numel() < whole.numel():
            raise RuntimeError("in-place work on a part of what a custom function gave cannot be differentiated")
        fresh = current.clone()
        part = _same_part(old, whole, fresh)
        part.copy_(new)
        self._follow(whole, fresh)
        return part

    def _follow(self, old: Tensor, new: Tensor) -> None:
        self._kept.append(old)
        self._latest[id(old)] = new

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        original = args[0] if args else None  # before it is followed to what it became: its identity is the key
        target = (kwargs or {}).get("out")
        args, kwargs = self.outcome(args), self.outcome(kwargs or {})
        name = func.__name__
        if isinstance(target, Tensor) and torch.is_grad_enabled():
            original, result = target, func(*args, **{**kwargs, "out": None}).to(target.dtype)
        elif not isinstance(original, Tensor) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        elif name in _ASSIGNMENTS and not kwargs:
            result = _ASSIGNMENTS[name](*args)
        elif kwargs.get("inplace") is True:
            result = func(*args, **{**kwargs, "inplace": False})
        elif name == "__setitem__":
            result = args[0].clone()
            func(result, *args[1:], **kwargs)
        elif name.endswith("_") and not name.startswith("__") and name not in _HARMLESS and _is_method(func):
            result = func(args[0].clone(), *args[1:], **kwargs)
        else:
            return func(*args, **kwargs)
        self.seen += 1
        return self._became(original, result)


def _is_method(func: Any) -> bool:
    return (resolve_name(func) or "").startswith(("torch.Tensor.", "torch._C.TensorBase."))


def _same_part(part: Tensor, whole: Tensor, other: Tensor) -> Tensor:
    """The part of ``other`` that ``part`` is of ``whole``."""
    if part.dtype != whole.dtype or other.stride() != whole.stride():
        raise RuntimeError(f"in-place work on a {part.dtype} view of a {whole.dtype} tensor cannot be differentiated")
    offset = part.storage_offset() - whole.storage_offset() + other.storage_offset()
    return other.as_strided(part.size(), part.stride(), offset)
