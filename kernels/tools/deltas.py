"""What an adapter of any family changes on its layer, as plain tensors.

* ``needs_weight``: whether that depends on the weight itself (DoRA, rotations, (IA)³, GLoRA, T-LoRA, replacements).
* ``shape_at``: the shape of the layer's weight, from whoever knows it.
* ``dense``: ΔW = W' − W at full strength; ``bias``: the same of the bias; ``scales_bias``: where that is not all.

``weights`` is path → weight, as the base model has it. Errors name the layer and say what would help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..adapter import Adapter, Additive
from ..compose import Sum, Wrapper
from ..ia3 import IA3
from ..low_rank import changes_bias_only
from ..names import NameTable

Weights = Callable[[str], Tensor]


def needs_weight(adapter: Adapter) -> bool:
    if isinstance(adapter, Sum):
        return any(map(needs_weight, adapter.parts))
    if isinstance(adapter, Wrapper):
        return needs_weight(adapter.inner)
    return not isinstance(adapter, Additive)


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
