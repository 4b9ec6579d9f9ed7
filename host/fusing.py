"""LoRAs fused into weights: patches by our own arithmetic, and a change of strength without loading anew.

* ``FusedPatch``: what our loaders do to one weight, as the host's ModelPatcher takes it: W + Σ s (W' − W).
* ``add_fused``: put adapters on a patcher; those of an earlier loader on the same weight join one patch.
* ``install``: lets a MODEL whose weights differ from the loaded ones in strengths only overwrite them from the kept
  originals, before the host would take all patches off and put them on again. Whatever is unusual is left to the host.

The originals are those that the host keeps (``backup``): nothing is ever subtracted, so nothing drifts.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import comfy.float
import comfy.lora
import comfy.model_patcher
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..kernels.branches import fused, fused_bias
from ..kernels.lora import LoRA

KEY = "lora_loom"  # of our callbacks and wrappers on a patcher

# of what the host rounds by chance; newer hosts, older hosts
seed_of: Callable[[str], int] = getattr(comfy.utils, "string_to_seed", None) or comfy.model_patcher.string_to_seed

Part = tuple[Adapter, float, tuple[str, ...], tuple[Tensor, ...]]


class FusedPatch(WeightAdapterBase):
    """``weights``: for each adapter itself, its strength, the names of its tensors and these.

    The host may move the tensors and make the patch anew from ``loaded_keys`` and ``weights``.
    """

    name = "loom"

    def __init__(self, loaded_keys: set[str], weights: tuple[Part, ...]) -> None:
        self.loaded_keys, self.weights = loaded_keys, weights

    def calculate_weight(
        self,
        weight: Tensor,
        key: str,
        strength: float,
        strength_model: float,
        offset: Any,
        function: Any,
        intermediate_dtype: torch.dtype = torch.float32,
        original_weight: Any = None,
    ) -> Tensor:
        """``weight`` is the caller's to overwrite."""
        parts = [(adapter, strength * own) for adapter, own in self.placed(weight.device)]
        moved = fused_bias(weight, parts) if key.endswith(".bias") else fused(weight, parts)
        return moved.to(weight.dtype)

    def placed(self, device: torch.device) -> Iterable[tuple[Adapter, float]]:
        """(adapter with its tensors on ``device``, strength)."""
        for adapter, strength, names, tensors in self.weights:
            moved = {name: tensor.to(device) for name, tensor in zip(names, tensors, strict=True)}
            same = all(tensor is adapter.tensors[name] for name, tensor in moved.items())
            yield adapter if same else adapter.with_tensors(moved), strength


class OnUse:
    """A patch that acts whenever the host has cast a weight for use: weights that are kept rounded stay what they are.

    For text encoders, which run once a prompt: each use costs about as much as fusing.
    """

    def __init__(self, key: str, adapter: Adapter, strength: float) -> None:
        self.key, self.patch = key, FusedPatch(set(), (part(adapter, strength),))

    def __call__(self, weight: Tensor) -> Tensor:
        return self.patch.calculate_weight(weight, self.key, 1.0, 1.0, None, None)


def part(adapter: Adapter, strength: float) -> Part:
    return adapter, strength, tuple(adapter.tensors), tuple(adapter.tensors.values())


def add_fused(patcher: Any, adapters: Mapping[str, Sequence[tuple[Adapter, float]]]) -> None:
    """Patch parameters, ``key`` → (adapter, strength)s, of ``patcher``, a clone that is the caller's.

    As the host's ``add_patches`` does, which lists every parameter of the model to learn which keys there are.
    """
    for key, parts in adapters.items():
        before = take_off(patcher, key)
        patch = FusedPatch(set(), (*before, *(part(adapter, strength) for adapter, strength in parts)))
        patcher.patches.setdefault(key, []).append((1.0, patch, 1.0, None, None))
    patcher.patches_uuid = uuid.uuid4()


def parts_on(patcher: Any, key: str) -> tuple[Part, ...]:
    """What our loaders fuse last on a parameter; nothing where another's patch came behind."""
    entries = patcher.patches.get(key, [])
    return entries[-1][1].weights if entries and is_ours(entries[-1]) else ()


def take_off(patcher: Any, key: str) -> tuple[Part, ...]:
    """``parts_on``, taken off ``patcher``, a clone that is the caller's."""
    parts = parts_on(patcher, key)
    if parts:
        patcher.patches[key].pop()
        if not patcher.patches[key]:
            del patcher.patches[key]
        patcher.patches_uuid = uuid.uuid4()
    return parts


def is_ours(entry: tuple) -> bool:
    """Whether a patch of the host is one of our loaders', and acts as they put it there."""
    strength, patch, strength_model, offset, function = entry
    alone = strength == strength_model == 1 and offset is None and function is None
    return alone and isinstance(patch, FusedPatch)


# -- a change of strength


@dataclass(frozen=True)
class _Loaded:
    """What a model's weights have been made of: the host's mark for it, and the patches by parameter."""

    mark: uuid.UUID
    patches: dict[str, list[tuple]]
    cast: bool
    ordinary: bool


_loaded: WeakKeyDictionary[nn.Module, _Loaded] = WeakKeyDictionary()


def install(patcher: Any) -> None:
    """Once per patcher; its clones have it too."""
    if not patcher.get_callbacks(CallbacksMP.ON_LOAD, KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, _remember)
        patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _prepare)


def _remember(patcher: Any, *_: Any) -> None:
    marks = {key: [_mark(entry) for entry in entries] for key, entries in patcher.patches.items()}
    _loaded[patcher.model] = _Loaded(patcher.patches_uuid, marks, patcher.force_cast_weights, _is_ordinary(patcher))


def _mark(entry: tuple) -> tuple:
    """Equal for patches that do the same; holds no tensor."""
    if not is_ours(entry):
        strength, patch, *rest = entry
        return (strength, _reference(patch), *rest)
    return tuple((ref(adapter), strength) for adapter, strength, *_ in entry[1].weights)


def _reference(value: Any) -> Any:
    """Equal for the same object while it lives; what nothing can refer to is equal to nothing."""
    try:
        return ref(value)
    except TypeError:
        return float("nan")


def _prepare(executor: Any, patcher: Any, *args: Any, **kwargs: Any) -> Any:
    """Around the host's loading for a sampler."""
    change_strengths(patcher)
    return executor(patcher, *args, **kwargs)


def change_strengths(patcher: Any) -> bool:
    """Make the loaded weights those of ``patcher`` if only strengths or adapters differ; whether it was done."""
    model = patcher.model
    known = _loaded.get(model)
    if known is None or known.mark != model.current_weight_patches_uuid or known.mark == patcher.patches_uuid:
        return False
    if not (known.ordinary and _is_ordinary(patcher)) or known.cast != patcher.force_cast_weights:
        return False
    wanted = {key: [_mark(entry) for entry in entries] for key, entries in patcher.patches.items()}
    if wanted.keys() != known.patches.keys():
        return False
    changed: dict[str, tuple[Tensor, Tensor]] = {}
    for key in (key for key, marks in wanted.items() if marks != known.patches[key]):
        pair = _pair(patcher, key)
        if pair is None:
            return False
        changed[key] = pair
    model.current_weight_patches_uuid = uuid.uuid4()  # of nobody's weights: should this fail, the host begins anew
    with torch.inference_mode():
        for key, pair in changed.items():
            _overwrite(key, patcher.patches[key], *pair)
    model.current_weight_patches_uuid = patcher.patches_uuid
    _loaded[model] = replace(known, mark=patcher.patches_uuid, patches=wanted)
    return True


def _is_ordinary(patcher: Any) -> bool:
    """Everything loaded in one piece, with nothing but patches on the weights."""
    hooks = patcher.hook_backup or patcher.current_hooks or patcher.forced_hooks or patcher.weight_wrapper_patches
    dynamic = getattr(patcher, "is_dynamic", bool)()  # newer hosts
    return not (hooks or dynamic or patcher.model.model_lowvram)


def _pair(patcher: Any, key: str) -> tuple[Tensor, Tensor] | None:
    """(the weight as it is loaded, the original); None where the one cannot be overwritten from the other."""
    entry = patcher.backup.get(key)
    if entry is None or entry.inplace_update:
        return None
    module: nn.Module | None = patcher.model
    *path, name = key.split(".")
    for step in path:
        module = None if module is None else module._modules.get(step)
    weight, base = None if module is None else module._parameters.get(name), entry.weight
    own_ways = hasattr(type(module), f"set_{name}") or hasattr(type(module), f"convert_{name}")  # of quantised layers
    if own_ways or any(type(tensor) not in (Tensor, nn.Parameter) for tensor in (weight, base)):
        return None
    assert weight is not None
    same = weight.shape == base.shape and weight.dtype == base.dtype and weight.data_ptr() != base.data_ptr()
    return (weight, base) if same else None


def _overwrite(key: str, entries: list[tuple], weight: Tensor, base: Tensor) -> None:
    """The patched ``weight`` anew, where it lies, from the original."""
    products = _products(entries, base, weight)
    if products is not None:
        (factor, up, down), *others = products
        target, source = weight.view(len(weight), -1), base.to(weight.device).view(len(base), -1)
        torch.addmm(source, up, down, alpha=factor, out=target)
        for factor, up, down in others:
            target.addmm_(up, down, alpha=factor)
        return
    moved = base.to(weight.device, torch.float32, copy=True)
    moved = comfy.lora.calculate_weight(entries, moved, key)
    weight.copy_(comfy.float.stochastic_rounding(moved, weight.dtype, seed=seed_of(key)))


def _products(entries: list[tuple], base: Tensor, weight: Tensor) -> list[tuple[float, Tensor, Tensor]] | None:
    """(factor, up, down) of all that is on a weight, where that is nothing but products of two matrices."""
    if len(entries) != 1 or not is_ours(entries[0]):
        return None
    if weight.dtype != torch.float32 or not (base.is_contiguous() and weight.is_contiguous()):
        return None
    found = []
    for adapter, strength in entries[0][1].placed(weight.device):
        if not isinstance(adapter, LoRA) or adapter.mid is not None:
            return None
        found.append((strength * adapter.scale, *(factor.float().flatten(1) for factor in (adapter.up, adapter.down))))
    return found
