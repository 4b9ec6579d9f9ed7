"""What an adapter of any family changes on its layer, as plain tensors.

* ``shape_at``: the shape of the layer's weight, from whoever knows it.
* ``dense``: ΔW = W' − W at full strength; ``bias``: the same of the bias; ``scales_bias``: where that is not all.
* ``stays_difference``, ``is_no_matrix``, ``is_table``: what does not become factors; ``scaled``: any number of times ΔW
  in its own family; ``joined``: several adapters of a layer as one.
* ``apart``, ``widest_part``: of what is on rows of its own, as q, k and v of a fused layer are.
* ``told``: any sequence, with its progress.

``Weights`` is path → weight, as the base model has it. Errors name the layer and say what would help.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..adapter import Adapter, Additive, wide
from ..branches import needs_weight
from ..compose import Sliced, Sum, Wrapper
from ..control import Widened
from ..full import Full
from ..ia3 import IA3
from ..low_rank import changes_bias_only, factors_of
from ..names import NameTable
from ..vera import LAMBDA_B, VeRA

Weights = Callable[[str], Tensor]
Progress = Callable[[int, int], None]  # (done, of how many); may raise to stop
_Item = TypeVar("_Item")
_TABLES = r"(?:token|position|positional|word|pos)_embed(?:ding|dings|der)?|embed_tokens|embedding_table|shared|wte|wpe"
_TABLE = re.compile(rf"(?:.*\.|[^.]*_)?(?:{_TABLES})", re.DOTALL)  # behind a dot, or in a name of one word as kohya has


def scales_bias(adapter: Adapter) -> bool:
    """PEFT's (IA)³ multiplies the bias too, whose change no file holds."""
    if isinstance(adapter, Sum):
        return any(map(scales_bias, adapter.parts))
    if isinstance(adapter, Wrapper):
        return scales_bias(adapter.inner)
    return isinstance(adapter, IA3) and adapter.scales_bias and not adapter.on_input


def shape_at(
    path: str, adapters: Iterable[Adapter], names: NameTable | None, weights: Weights | None
) -> tuple[int, ...]:
    """Raises ValueError where nobody knows it: a LoHa or LoKr read without the model does not tell the kernel."""
    if names is not None and path in names.shapes:
        return names.shapes[path]
    adapters = list(adapters)
    for adapter in adapters:
        if adapter.shape is not None:
            return adapter.shape
    if weights is not None:
        return tuple(weights(path).shape)
    if all(map(changes_bias_only, adapters)):  # as many rows as the bias has are all there is to know
        return tuple(next(tensor.shape for adapter in adapters for tensor in adapter.tensors.values()))
    raise ValueError(f"{path}: the file does not tell the shape of this layer; give the model that it is for")


def dense(path: str, adapter: Adapter, shape: tuple[int, ...], weights: Weights | None) -> Tensor:
    """ΔW in ``shape``, float32 or wider. Raises ValueError naming the layer."""
    if not needs_weight(adapter):
        weight = torch.zeros(()).expand(shape)  # takes no memory; only its shape is looked at
    elif weights is None:
        raise ValueError(
            f"{path}: what {adapter.name} changes here depends on the weights; give the model that it was trained on"
        )
    else:
        weight = weights(path)
    try:
        return adapter.difference(weight).detach()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def bias(path: str, adapter: Adapter) -> Tensor | None:
    """b' − b in float32 or wider, None where the bias stays (see ``scales_bias``)."""
    try:
        found = adapter.merged_bias(None)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; give the model that it is for") from error
    return None if found is None else found.detach()


# -- what becomes of it


def is_table(path: str) -> bool:
    """Whether a layer is called as tables of embeddings are."""
    return _TABLE.fullmatch(path) is not None


def is_no_matrix(path: str, shape: Sequence[int]) -> bool:
    """Vectors, and tables of embeddings, whose rows are looked up: there factors make no sense."""
    return 1 in (math.prod(shape[:1]), math.prod(shape[1:])) or is_table(path)


def stays_difference(path: str, adapter: Adapter) -> bool:
    """Whether it is left as it is where others become factors."""
    if changes_bias_only(adapter):
        return True
    shape = adapter.shape
    if shape is None:
        return False
    return len(shape) < 2 or (isinstance(adapter, Full) and is_no_matrix(path, shape))


def scaled(adapter: Adapter, strength: float) -> Adapter | None:
    """``strength`` · ΔW, and of the bias, in the adapter's own family; None where that depends on the weight."""
    if isinstance(adapter, Sum):
        parts = [scaled(part, strength) for part in adapter.parts]
        known = [part for part in parts if part is not None]
        return Sum(known) if len(known) == len(parts) else None
    if isinstance(adapter, Wrapper):
        inner = None if isinstance(adapter, Widened) else scaled(adapter.inner, strength)
        return None if inner is None else adapter.with_tensors(inner.tensors)
    if not isinstance(adapter, Additive):
        return None
    # all differences, or one factor of a product
    names = tuple(adapter.tensors) if isinstance(adapter, Full) else adapter.factors[:1]
    names = (LAMBDA_B,) if isinstance(adapter, VeRA) else names
    moved = {name: wide(adapter.tensors[name]) * strength for name in names}
    return adapter.with_tensors(adapter.tensors | moved) if moved else None


def joined(parts: Iterable[Adapter | None]) -> Adapter | None:
    """What there is of ``parts`` as one adapter."""
    present = [part for part in parts if part is not None]
    return (present[0] if len(present) == 1 else Sum(present)) if present else None


def apart(parts: Sequence[Adapter]) -> bool:
    """Whether all of them are on rows of their own."""
    ends = sorted((part.start, part.start + part.length) for part in parts if isinstance(part, Sliced))
    return len(ends) == len(parts) and all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))


def widest_part(adapter: Adapter) -> int:
    """The greatest rank of several that are on rows of their own; 0 where there are none such."""
    if not isinstance(adapter, Sum) or not apart(adapter.parts):
        return 0
    return max(0 if factors is None else factors.rank for factors in map(factors_of, adapter.parts))


def told(
    items: Sequence[_Item], progress: Progress | None, first: int = 0, total: int | None = None
) -> Iterator[_Item]:
    """``items``, and ``progress(done, total)`` before each and after the last; it may raise to stop."""
    total = len(items) if total is None else total
    for done, item in enumerate(items, first):
        if progress:
            progress(done, total)
        yield item
    if progress:
        progress(first + len(items), total)
