"""Weights patched by our own arithmetic, for what the host's would get wrong (``kernels.core_reads``).

* ``own_patches``: path of a weight → patch, of the layers of a file that the host misreads or does not know.
* ``OwnPatch``: one of them, as the host's ModelPatcher takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..kernels.adapter import Adapter
from ..kernels.core_reads import fault_of
from ..kernels.names import NameTable, layer_shapes
from ..kernels.reading import read_lora
from ..kernels.spellings import split

# ends of keys without which a file has nothing that the host misreads
_HINTS = (
    *("dora_scale", "magnitude", "oft_", "boft_", "on_input", "ia3_l", "lora_mid", "hada_t1", "lokr_t2", "lokr_w2"),
    "a1.weight",
)


class OwnPatch(WeightAdapterBase):
    """W + s · (W' − W), and the same of a bias. ``weights`` are the adapter, the names of its tensors and these.

    The host may move the tensors and make the patch anew from ``loaded_keys`` and ``weights``.
    """

    name = "loom"

    def __init__(self, loaded_keys: set[str], weights: tuple[Adapter, tuple[str, ...], tuple[Tensor, ...]]) -> None:
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
        adapter, names, tensors = self.weights
        moved = (tensor.to(weight.device) for tensor in tensors)
        here = adapter.with_tensors(dict(zip(names, moved, strict=True)))
        if key.endswith(".bias"):
            bias = here.merged_bias(weight, strength)
            assert bias is not None
            return bias
        return here.merged(weight, strength)


def own_patches(lora: Mapping[str, Tensor], model: Any, clip: Any | None) -> tuple[dict[str, OwnPatch], set[str]]:
    """(parameter of MODEL or CLIP → patch, the keys of the file that they are made of)."""
    if not any(hint in key for key in lora for hint in _HINTS):
        return {}, set()
    trees = [model.model] + ([] if clip is None else [clip.cond_stage_model])
    names = NameTable({path: shape for tree in trees for path, shape in layer_shapes(tree).items()})
    misread = {path: adapter for path, adapter in read_lora(lora, names).adapters.items() if fault_of(adapter)}
    patches: dict[str, OwnPatch] = {}
    for path, adapter in misread.items():
        weights = adapter, tuple(adapter.tensors), tuple(adapter.tensors.values())
        patches[f"{path}.weight"] = OwnPatch(set(), weights)
        bias = torch.ones(names.shapes.get(f"{path}.bias", ()))
        moved = adapter.merged_bias(bias) if bias.ndim else None
        if moved is not None and not torch.equal(moved, bias):
            patches[f"{path}.bias"] = OwnPatch(set(), weights)
    places = {key: names.find(split(key, lora).name) for key in lora}
    return patches, {key for key, place in places.items() if place is not None and place.path in misread}
