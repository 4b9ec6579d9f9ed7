"""Which layers an adapter may sit on, and the presets that choose among them.

* ``kind_of``: what a layer does, read from its path: attention, mlp or other.
* ``PRESETS``: one table that feeds dropdown, tooltip and ``select_targets``.
* ``select_targets``: the layers of a loaded model that a preset chooses, in the model's own order.
* ``attention_blocks``: the blocks a short block-weight vector counts (SD1.5 16, SDXL 11, each + base).

Layers are known by their attributes, not their class, so a host's quantised layers count and packed weights are never
looked at. Grouped and transposed convolutions are left out: a low-rank pair does not fit them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .blocks import Block, BlockIndex, block_map, diffusion_tree

# The innermost segment that matches decides. Modulation and norm come first: "adaln_modulation_self_attn.1" is neither.
_KINDS = (
    ("other", re.compile(r"(?:^|_)mod(?:[A-Z]\w*)?$|(?i:modulation|adaln|norm)")),
    ("attention", re.compile(r"^(?:\w+_)?(?:attn|attention)\d*$|^(?:Self|EncDec)Attention$")),
    (
        "mlp",
        re.compile(r"^(?:\w+_)?(?:mlp|ffn?|feed_?forward|(?:shared_)?experts)(?:\d+|[A-Z]|_[a-z]+)?$|^DenseReluDense$"),
    ),
)
_FUSED = re.compile(r"(?:^|\.)single_blocks\.\d+\.linear[12]$")  # qkv beside the mlp's way in, and both ways out


@dataclass(frozen=True)
class Preset:
    name: str
    description: str


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("attention", "The projections of every attention inside the blocks: query, key, value and output."),
        Preset(
            "attention+MLP",
            "The attention projections, the feed-forward layers beside them, and the projections "
            "into and out of each spatial transformer.",
        ),
        Preset("full", "Every linear layer and convolution of the diffusion model, those outside the blocks too."),
        Preset("conv", "Every k×k convolution of the diffusion model and nothing else; needs conv_rank."),
    )
}


@dataclass(frozen=True)
class Target:
    """A layer: ``path`` in the model, ``kind`` linear or conv, weight ``shape`` (out, in, *kernel), ``block`` id."""

    path: str
    kind: str
    shape: tuple[int, ...]
    block: str | None


def kind_of(path: str) -> str:
    """attention, mlp or other; the fused linear1 and linear2 of single-stream blocks count as attention."""
    if _FUSED.search(path):
        return "attention"
    for segment in reversed(path.split(".")):
        for kind, pattern in _KINDS:
            if pattern.search(segment):
                return kind
    return "other"


def select_targets(module_tree: nn.Module, preset: str, conv: bool) -> list[Target]:
    """The layers that ``preset`` chooses; k×k convolutions only with ``conv``, 1×1 ones count like linear layers.

    Raises ValueError for an unknown preset and for one that matches no layer of this model.
    """
    if preset not in PRESETS:
        raise ValueError(f"layers: there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
    layers = [layer for layer in trainable_layers(module_tree) if conv or not is_spatial(layer)]
    paths = {path for path, _ in module_tree.named_modules()}
    chosen = [layer for layer in layers if _belongs(layer, preset, paths)]
    if not chosen:
        raise ValueError(f"layers: the preset {preset!r} matches no layer of this model; it has {_census(layers)}")
    return chosen


def trainable_layers(module_tree: nn.Module) -> Iterator[Target]:
    """Every linear layer and ungrouped convolution of a model, in its order."""
    root, prefix = diffusion_tree(module_tree)
    index = BlockIndex(block_map(module_tree))
    for name, module in root.named_modules():
        found = _weight_of(module)
        if found is not None:
            block = index.of(prefix + name)
            yield Target(prefix + name, *found, block.id if block else None)


def is_spatial(layer: Target) -> bool:
    """Whether it is a k×k convolution, what LoRA calls LoCon there; 1×1 ones count like linear layers."""
    return any(size > 1 for size in layer.shape[2:])


def attention_blocks(blocks: Iterable[Block]) -> list[Block]:
    """The blocks with an attention in them."""
    layers = {block: {name.rpartition(".")[0] for name in block.parameters} for block in blocks}
    return [block for block, paths in layers.items() if any(kind_of(path) == "attention" for path in paths)]


def is_linear(module: nn.Module) -> bool:
    """Whether a layer says how many features go in and out, as those of every library of quantised layers do."""
    own = vars(module)  # asking a module for what it has not takes several times as long
    return "in_features" in own and "out_features" in own or hasattr(type(module), "in_features")


def _weight_of(module: Any) -> tuple[str, tuple[int, ...]] | None:
    if not hasattr(module, "weight"):
        return None
    if is_linear(module):
        return "linear", (module.out_features, module.in_features)
    if hasattr(module, "in_channels") and hasattr(module, "kernel_size") and hasattr(module, "groups"):
        if module.groups == 1 and not module.transposed:
            return "conv", (module.out_channels, module.in_channels, *module.kernel_size)
    return None


def _belongs(layer: Target, preset: str, paths: set[str]) -> bool:
    if preset in ("full", "conv"):
        return preset == "full" or is_spatial(layer)
    if layer.block is None:
        return False
    kind = kind_of(layer.path)
    if preset == "attention":
        return kind == "attention"
    parent, _, leaf = layer.path.rpartition(".")
    around = leaf in ("proj_in", "proj_out") and f"{parent}.transformer_blocks" in paths
    return kind in ("attention", "mlp") or around


def _census(layers: Iterable[Target]) -> str:
    counts = Counter(kind_of(layer.path) if layer.block else "outside the blocks" for layer in layers)
    return ", ".join(f"{count} × {kind}" for kind, count in counts.items()) or "no linear layer or convolution at all"
