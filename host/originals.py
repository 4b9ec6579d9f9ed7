"""The weights of a MODEL (or of a CLIP's patcher) without any patch on them, whatever is merged into them at the time.

* ``Originals.dense``: the whole weight of a layer in float32; ``Originals.as_stored``: in its own type;
  ``Originals.rows``: some of its rows, without the rest.
* ``Originals.norm``: ‖W‖, read once per base model, of large layers from some of their rows and with its error.
* ``Originals.kept``: what kind of numbers a weight is kept in; ``Originals.rounded``: other values in that kind, as the
  host rounds them when it merges a LoRA.
"""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import comfy.float
import comfy.model_patcher
import comfy.utils
import torch
from torch import Tensor, nn

from .fusing import seed_of

WHOLE = 1 << 21  # numbers up to which a weight is read whole for its norm
SOME, FEWEST = 1 << 18, 64  # numbers, and rows, that are read of larger ones


class Norm(NamedTuple):
    """‖W‖, and its relative standard error: 0 where all of W was read."""

    value: float
    error: float = 0.0


# numbers alone, as long as the base model lives
_NORMS: WeakKeyDictionary[nn.Module, dict[str, Norm]] = WeakKeyDictionary()


class UnreadableError(ValueError):
    """A weight that is kept in a way which only its own loader can read."""


class Originals:
    """Paths are those of layers ("diffusion_model.…", their weight is meant) or of parameters."""

    def __init__(self, patcher: Any) -> None:
        self._patcher = patcher
        self._norms = _NORMS.setdefault(patcher.model, {})

    def key(self, path: str) -> str:
        """The name of the parameter that an adapter at ``path`` changes."""
        try:
            owner = self._patcher.model.get_submodule(path)
        except AttributeError:
            return path
        return f"{path}.weight" if getattr(owner, "weight", None) is not None else path

    def shape(self, path: str) -> tuple[int, ...]:
        return tuple(self._stored(path)[0].shape)

    def owner(self, path: str) -> nn.Module:
        """The module that has the parameter."""
        return self._patcher.model.get_submodule(self.key(path).rpartition(".")[0])

    def dense(self, path: str) -> Tensor:
        """A copy that is the caller's. Raises UnreadableError."""
        weight, convert = self._stored(path)
        return _dense(weight, convert)

    def as_stored(self, path: str) -> Tensor:
        """A copy in the type it is kept in, which tells how it was rounded; float32 where numbers have a scale."""
        weight, convert = self._stored(path)
        plain = convert is None and type(weight) in (Tensor, nn.Parameter)
        return weight.detach().clone() if plain else _dense(weight, convert)

    def rows(self, path: str, some: Tensor) -> Tensor:
        """Rows of the weight as (rows, in · kernel), float32. Raises UnreadableError."""
        weight, convert = self._stored(path)
        some = some.to(weight.device)
        if type(weight) in (Tensor, nn.Parameter):
            return _dense(weight.detach()[some], convert).flatten(1)
        if not _has_rows(weight):
            return _dense(weight, convert)[some].flatten(1)
        return _rows_of_quantised(weight, some).dequantize().float().flatten(1)

    def norm(self, path: str) -> Norm:
        """Of the original weight; the same whatever is merged into it."""
        if path not in self._norms:
            self._norms[path] = self._read_norm(path)
        return self._norms[path]

    def kept(self, path: str) -> str:
        """bfloat16, float8_e4m3fn, … or the layout of quantised weights."""
        weight, _ = self._stored(path)
        if type(weight) in (Tensor, nn.Parameter):
            return str(weight.dtype).removeprefix("torch.")
        _, context = weight.__tensor_flatten__()
        named = context.get("layout_type", context.get("layout_cls", type(weight).__name__))
        return str(getattr(named, "__name__", named))

    def rounded(self, path: str, value: Tensor) -> Tensor:
        """What the host would compute with, had it merged a LoRA into W with ``value`` as the result; float32.

        ``value`` may be some of the rows where each number ``rounds_alone``.
        """
        key = self.key(path)
        weight, convert = self._stored(path)
        _, put, _ = comfy.model_patcher.get_key_weight(self._patcher.model, key)
        seed = seed_of(key)
        if put is None:
            return comfy.float.stochastic_rounding(value, weight.dtype, seed=seed).float()
        return _dense(put(value.clone(), inplace_update=False, seed=seed, return_weight=True), convert)

    def in_rows(self, path: str) -> bool:
        """Whether rows can be read without the rest."""
        weight, _ = self._stored(path)
        return type(weight) in (Tensor, nn.Parameter) or _has_rows(weight)

    def rounds_alone(self, path: str) -> bool:
        """Whether the host rounds each number by itself, with no scale that the others have a part in."""
        _, put, _ = comfy.model_patcher.get_key_weight(self._patcher.model, self.key(path))
        return put is None

    def _stored(self, path: str) -> tuple[Any, Any]:
        key = self.key(path)
        weight, _, convert = comfy.model_patcher.get_key_weight(self._patcher.model, key)
        if key in self._patcher.backup:
            weight = self._patcher.backup[key].weight
        elif key in self._patcher.hook_backup:
            weight = self._patcher.hook_backup[key][0]
        return weight, convert

    @torch.no_grad()
    def _read_norm(self, path: str) -> Norm:
        weight, convert = self._stored(path)
        if weight.ndim < 2 or weight.numel() <= WHOLE:
            return Norm(_dense(weight, convert).norm().item())
        columns = weight.numel() // len(weight)
        squares = self.rows(path, _spread(len(weight), max(FEWEST, SOME // columns), path)).square().sum(1)
        mean, count = squares.mean().item(), len(squares)
        if not mean:
            return Norm(0.0)
        left_out = 1 - count / len(weight)
        error = squares.std().item() / mean * math.sqrt(left_out / count) / 2  # a root halves relative errors
        return Norm(math.sqrt(mean * len(weight)), error)


def _dense(weight: Any, convert: Any) -> Tensor:
    """A copy in float32."""
    if type(weight) in (Tensor, nn.Parameter):
        copy = weight.detach().to(torch.float32, copy=True)
        return copy if convert is None else convert(copy, inplace=True)
    if type(weight).dequantize is Tensor.dequantize:
        raise UnreadableError(f"its weights are kept as {type(weight).__name__}, which only its own loader can read")
    return weight.dequantize().float()


def _has_rows(weight: Any) -> bool:
    """Whether a quantised weight is numbers in its own shape and scales, one of them or one for each row."""
    if not hasattr(weight, "__tensor_flatten__"):
        return False
    parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    scales = [part for part in parts if part.shape != weight.shape]
    return len(scales) == len(parts) - 1 and all(part.numel() == 1 or _by_row(part, weight) for part in scales)


def _by_row(scale: Tensor, weight: Any) -> bool:
    return scale.ndim > 0 and len(scale) == scale.numel() == len(weight)


def _rows_of_quantised(weight: Any, some: Tensor) -> Any:
    """Some rows, quantised as they are."""
    names, context = weight.__tensor_flatten__()
    parts = {name: getattr(weight, name) for name in names}
    parts = {name: part if part.numel() == 1 else part[some] for name, part in parts.items()}
    fields = context.get("non_tensor_fields", {})
    if "orig_shape" in fields:  # newer hosts
        context = {**context, "non_tensor_fields": {**fields, "orig_shape": (len(some), *weight.shape[1:])}}
    return type(weight).__tensor_unflatten__(parts, context, None, None)


def _spread(count: int, wanted: int, path: str) -> Tensor:
    """Numbers of rows, one drawn from each of ``wanted`` equal stretches; the same ones for the same layer."""
    wanted = min(wanted, count)
    draws = torch.Generator().manual_seed(zlib.crc32(path.encode()))
    at = (torch.arange(wanted) + torch.rand(wanted, generator=draws, dtype=torch.float64)) * (count / wanted)
    return at.long().clamp_max(count - 1)
