"""What has to be put right in files of some trainers before a family can read its parts.

* ``damage``: why a tensor cannot be part of any adapter.
* ``normalised``: one layer's parts under the names and with the values that ``registry.read_adapter`` takes.
* ``as_peft_turns``: PEFT's OFT on convolutions, which turns the other way; there and back.
* ``across_layers``: what concerns several layers: VeRA's matrices, stored once, and BFL's wider input.

Each rule says whose files need it. Whatever changes the meaning of a number is told in ``notes``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapter import low_rank_scale
from .control import SET_WEIGHT, WIDTH
from .lora import DOWN, UP
from .metadata import json_object
from .peft_config import WRAPPER, Configs
from .spellings import TOKENS_DOWN, TOKENS_UP, UP_BIAS, VERA_A, VERA_B

_SCALARS = frozenset({"alpha", "scalar"})
_COUNTS = frozenset({"on_input", WIDTH, "oft_R.scaled_oft"})  # whole numbers and truth values
_OFT = "oft_R.weight"
_FULL_LOKR = ("lokr_w1", "lokr_w2")


@dataclass(frozen=True)
class Layer:
    """What a file holds under one layer's name. ``keys``: part -> key."""

    name: str
    parts: dict[str, Tensor]
    keys: dict[str, str]


def damage(part: str, tensor: Tensor) -> str | None:
    """Why ``tensor`` cannot be ``part`` of an adapter, None if it can."""
    if not tensor.numel():
        return f"is empty {tuple(tensor.shape)}"
    if part in _COUNTS:
        few = tensor.numel() <= 16 and not tensor.is_complex()
        return None if few and (tensor.double().abs() < 2**40).all() else "is no list of sizes"
    if part in _SCALARS:
        if tensor.numel() != 1 or tensor.is_complex():
            return f"holds {tensor.numel()} numbers instead of one" if tensor.numel() != 1 else "is complex"
        return "is not a number" if math.isnan(float(tensor)) else None
    if not tensor.ndim:
        return "is a single number"
    if not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}, not floating point numbers"
    if tensor.element_size() == 1:  # 8-bit floats know no arithmetic
        tensor = tensor.to(torch.float16)
    # one NaN or infinity makes the sum one; so may an overflow, which a second look at each number tells apart
    whole = math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())
    return None if whole else "holds NaN or infinity"


def across_layers(layers: Iterable[Layer]) -> list[Layer]:
    """Every layer with what it needs from elsewhere in the file."""
    layers, projections = list(layers), {VERA_A, VERA_B}
    shared = [layer for layer in layers if layer.parts.keys() <= projections]
    users = [layer for layer in layers if "vera_lambda_b" in layer.parts]
    if users:
        layers = [layer for layer in layers if layer.parts.keys() - projections]
    common: dict[str, tuple[Tensor, str]] = {}
    for layer in shared:
        for part, tensor in layer.parts.items():
            common.setdefault(part, (tensor, layer.keys[part]))
    for layer in users:  # PEFT keeps vera_A and vera_B once, cut to the layer's size when they are used
        for part, (tensor, key) in common.items():
            layer.parts.setdefault(part, tensor)
            layer.keys.setdefault(part, key)
    if any(SET_WEIGHT in layer.parts for layer in layers):  # a control LoRA of BFL: made for a model with more inputs
        for layer in layers:
            if layer.name == "img_in" and {DOWN, UP} <= layer.parts.keys() and layer.parts[DOWN].ndim == 2:
                layer.parts.setdefault(WIDTH, torch.tensor([len(layer.parts[UP]), layer.parts[DOWN].shape[1]]))
                layer.keys.setdefault(WIDTH, layer.keys[DOWN])
    return layers


def normalised(layer: Layer, configs: Configs, metadata: Mapping[str, str], notes: list[str]) -> Layer:
    """``layer`` with its parts as the families read them. Raises ValueError for what no family can do."""
    parts = _of_one_dtype(layer.parts)
    if TOKENS_DOWN in parts and TOKENS_UP in parts:  # PEFT on a table of tokens: ΔW = (B A)ᵀ
        down, up = parts.pop(TOKENS_DOWN), parts.pop(TOKENS_UP)
        parts |= {DOWN: up.T.contiguous(), UP: down.T.contiguous()}
    _with_configured_scale(layer.name, parts, configs, notes)
    if "loom.dialect" not in metadata and "loom.recipe" not in metadata:  # not written by this pack
        _as_meant_by_lycoris(parts, metadata, notes)
    if _OFT in parts:
        _check_rotation(configs.of(layer.name)[0])
    scalar = parts.pop("scalar", None)
    if scalar is not None:  # LyCORIS' learnt scale, which it puts into a factor before it saves
        _note(notes, "a scalar is stored apart from the factors; LyCORIS puts it into them, so it was left out")
    if UP_BIAS in parts:  # PEFT's lora_bias, BFL: behind the up projection
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        bias = parts.pop(UP_BIAS) * (low_rank_scale(alpha, len(parts[DOWN])) if DOWN in parts else 1.0)
        parts["diff_b"] = bias + parts["diff_b"].reshape(bias.shape) if "diff_b" in parts else bias
    if "alpha" in parts and math.isinf(float(parts["alpha"])):
        _note(notes, "an infinite alpha (ai-toolkit's full-rank LoKr in float16) was read as alpha = rank")
    keys = {part: layer.keys.get(part, next(iter(layer.keys.values()))) for part in parts}
    keys |= {part: key for part, key in layer.keys.items() if part not in keys}
    return Layer(layer.name, parts, keys)


def as_peft_turns(parts: dict[str, Tensor], shape: Sequence[int] | None) -> dict[str, Tensor]:
    """``parts`` for a weight of ``shape``. Raises ValueError for what PEFT does that no weight can do."""
    if _OFT not in parts or shape is None or len(shape) < 3:
        return parts
    if math.prod(shape[2:]) > 1:
        raise ValueError("PEFT's OFT turns overlapping patches of a convolution's input, which no weight can do")
    return parts | {_OFT: -parts[_OFT]}


def of_peft(layer: Layer, configs: Configs) -> bool:
    """Whether PEFT wrote it, as far as the file tells."""
    return layer.name.startswith(WRAPPER) or "peft_type" in configs.of(layer.name)[0]


def _of_one_dtype(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors that are multiplied with each other: in the widest dtype among them, 8-bit floats in float16."""
    widest = torch.float16
    wanted = [tensor.dtype for part, tensor in parts.items() if part not in _SCALARS and tensor.is_floating_point()]
    if len(set(wanted)) < 2 and all(dtype.itemsize > 1 for dtype in wanted):
        return dict(parts)
    for dtype in wanted:
        widest = torch.promote_types(widest, dtype) if dtype.itemsize > 1 else widest
    return {
        part: tensor.to(widest) if tensor.is_floating_point() and part not in _SCALARS else tensor
        for part, tensor in parts.items()
    }


def _with_configured_scale(name: str, parts: dict[str, Tensor], configs: Configs, notes: list[str]) -> None:
    """PEFT keeps alpha in its configuration: turned into the alpha that gives the same scale."""
    scale = configs.scale(name) if configs and "alpha" not in parts else None
    if scale is None or scale == 1:
        return
    if parts.keys() >= set(_FULL_LOKR):  # every other reader takes two full halves as they are
        parts[_FULL_LOKR[0]] = parts[_FULL_LOKR[0]] * scale
        _note(notes, "PEFT scales a LoKr of two full halves, all others do not: its scale was put into lokr_w1")
        return
    rank = _rank(parts)
    if rank:
        parts["alpha"] = torch.tensor(scale * rank)
        _note(notes, "alpha was taken from adapter_config")


def _as_meant_by_lycoris(parts: dict[str, Tensor], metadata: Mapping[str, str], notes: list[str]) -> None:
    """Two of its modules, trained with rs_lora, act at √rank times what their files say (4.1.3 and before)."""
    glora, full_lokr = parts.keys() >= {"a1.weight", "b1.weight"}, parts.keys() >= set(_FULL_LOKR)
    if "alpha" not in parts or not (glora or full_lokr):
        return
    stabilised = str(json_object(metadata, "ss_network_args").get("rs_lora")).lower() in ("true", "1")
    alpha = float(parts["alpha"])
    if stabilised and glora and parts["b1.weight"].ndim > 1:
        parts["alpha"] = torch.tensor(alpha * math.sqrt(parts["b1.weight"].shape[1]))
        _note(notes, "GLoRA trained by LyCORIS with rs_lora: its alpha is stored without √rank, which was put back")
    if full_lokr and 1 < alpha < 1e6:
        # LyCORIS stores rank · √rank here, and the rank itself without rs_lora
        rank = alpha ** (2 / 3)
        whole = abs(rank - round(rank)) < 1e-3 * rank
        if whole and (stabilised or not alpha.is_integer()):
            parts[_FULL_LOKR[0]] = parts[_FULL_LOKR[0]] * math.sqrt(round(rank))
            parts["alpha"] = torch.tensor(float(round(rank)))
            _note(notes, "LoKr of two full halves trained by LyCORIS with rs_lora: √rank was put into lokr_w1")


def _check_rotation(config: Mapping[str, Any]) -> None:
    """PEFT's OFT by the exact Cayley transform turns the other way; only the usual cut series is replayed."""
    if config.get("use_cayley_neumann") is False or config.get("num_cayley_neumann_terms", 5) != 5:
        raise ValueError("adapter_config asks for an OFT by another series than that of five terms")


def _rank(parts: Mapping[str, Tensor]) -> int | None:
    """The rank that a family divides alpha by."""
    for part, dimension in ((DOWN, 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0)):
        if part in parts and parts[part].ndim:
            return parts[part].shape[dimension]
    return None


def _note(notes: list[str], text: str) -> None:
    if text not in notes:
        notes.append(text)
