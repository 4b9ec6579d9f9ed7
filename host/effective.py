"""Parameters of a MODEL, or of a CLIP's patcher, as it computes with them, whatever is loaded at the time.

* ``applied_patches``: the host's patches, LoRAs merged on use among them, without those that it never applies.
* ``effective_reader``: parameter → with patches and with LoRAs beside it; as it is stored where nothing is on it.
* ``base_reader``: path → weight as a LoRA of ours finds it: without any of ours, with what others have patched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.lora
from torch import Tensor

from ..kernels.branches import fused, fused_bias
from . import branching
from .fusing import OnUse, is_ours
from .originals import Originals
from .targets import parameters_of


def applied_patches(patcher: Any) -> tuple[dict[str, list[tuple]], list[str]]:
    """(parameter → patches, those with patches that do nothing).

    The host leaves out buffers, and parameters of modules that hold other modules.
    """
    places = parameters_of(patcher.model)
    acting, idle = {}, []
    for key, entries in patcher.patches.items():
        if key in places and not places[key].held_beside:
            acting[key] = list(entries)
        elif entries:
            idle.append(key)
    for key, functions in getattr(patcher, "weight_wrapper_patches", {}).items():
        own = [(1.0, function.patch, 1.0, None, None) for function in functions if isinstance(function, OnUse)]
        if own:
            acting.setdefault(key, []).extend(own)
    return acting, idle


def effective_reader(patcher: Any, stack: branching.Stack | None) -> Callable[[str], Tensor]:
    """On the CPU. Raises ValueError where a strength changes over the run."""
    patches, _ = applied_patches(patcher)
    strengths = () if stack is None else stack.strengths
    if any(strength.schedules for strength in strengths):
        raise ValueError(
            "a LoRA on the MODEL has a strength that changes over the run; set its steps, blocks and components to "
            "constant strengths"
        )
    beside = {} if stack is None else stack.by_parameter()
    originals = Originals(patcher)

    def read(key: str) -> Tensor:
        if key not in patches and key not in beside:
            return originals.as_stored(key).cpu()
        weight = originals.dense(key)
        if key in patches:
            weight = comfy.lora.calculate_weight(patches[key], weight, key)
        weight = weight.cpu()
        if key in beside:
            parts = [(adapter.to("cpu"), strengths[number].steady) for adapter, number in beside[key]]
            weight = fused_bias(weight, parts) if key.endswith(".bias") else fused(weight, parts)
        return weight

    return read


def base_reader(patcher: Any) -> Callable[[str], Tensor]:
    """A copy in float32 on the CPU; of a layer its weight, or the parameter of that name."""
    patches, _ = applied_patches(patcher)
    originals = Originals(patcher)

    def read(path: str) -> Tensor:
        key = originals.key(path)
        others = [entry for entry in patches.get(key, ()) if not is_ours(entry)]
        weight = originals.dense(key)
        return (comfy.lora.calculate_weight(others, weight, key) if others else weight).cpu()

    return read
