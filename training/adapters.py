"""From adapter settings and a model's layers to fresh adapters.

* ``build``: which layers, which family and size on each, at which part of the learning rate. What a setting cannot
  change on these layers is refused; what comes out otherwise than one may think is noted.
* ``layers_of``: the layers alone, by preset, rules and block lines.

Of text encoders the presets choose as they do in the model (``custom`` and ``conv`` choose attention and MLP);
``layer_filter``, ``blocks`` and whatever is for convolutions are the model's alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..kernels.blocks import Block, block_map
from ..kernels.layer_rules import chosen, parse
from ..kernels.layers import Target, is_spatial, select_targets, trainable_layers
from ..kernels.loha import T1
from ..kernels.lokr import T2, W1, W1_A, W2
from ..kernels.lokr import split as lokr_split
from ..kernels.lora import MID
from ..kernels.oftv2 import OFTv2
from ..kernels.registry import FAMILIES, make_adapter
from ..kernels.rotations import OutputRotation
from . import block_lines
from .block_lines import Line, Size
from .learners import MODEL
from .loop import generator
from .options import OptionError, options_of
from .settings import AdapterSettings, Plan
from .settings.adapter import CUSTOM

ENCODER_LAYERS = "attention+MLP"  # of text encoders, where the model's own choice means nothing there
_OF_THE_MODEL = ("layer_filter", "blocks", "conv_rank", "conv_alpha", "tucker")


@dataclass
class Built:
    """``adapters`` by module path; ``factors``: path -> part of the learning rate where that is not 1; ``notes``."""

    adapters: dict[str, Adapter]
    factors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def build(tree: nn.Module, plan: Plan, weight_of: Callable[[str], Tensor], component: str = MODEL) -> Built:
    """Fresh adapters for the layers of ``tree`` (a loaded model, or a text encoder) that the plan asks for.

    ``weight_of(path)`` is asked for the weights that an adapter begins from (DoRA). Raises ValueError subclasses that
    name the option.
    """
    settings = plan.adapter
    layers, sizes = layers_of(tree, plan) if component == MODEL else _of_encoder(tree, plan)
    _check_units(settings, sizes)
    built, left_out, used = Built({}), {}, []
    for index, layer in enumerate(layers):
        size = sizes[layer.path]
        options = settings.kernel_options(size.rank, size.alpha)
        options = replace(options, bias=options.bias and _has_bias(tree, layer.path))
        weight = weight_of(layer.path) if options.dora else None
        draws = generator(plan.seed, "adapter" if component == MODEL else f"adapter {component}", index)
        try:
            adapter = make_adapter(settings.algorithm, layer.shape, options, draws, weight)
        except ValueError as error:
            left_out[layer.path] = str(error)
            continue
        adapter.dropout = settings.dropout
        built.adapters[layer.path] = adapter
        used.append(layer)
        if size.factor != 1:
            built.factors[layer.path] = size.factor
    if not built.adapters:
        raise OptionError(f"{settings.algorithm} fits none of the layers: {next(iter(left_out.values()))}")
    _check_effects(tree, plan, used, sizes, built.adapters, component)
    built.notes = _notes(plan, used, sizes, built.adapters, left_out, component)
    return built


# -- which layers


def layers_of(tree: nn.Module, plan: Plan) -> tuple[list[Target], dict[str, Size]]:
    """The layers of a model that get an adapter, in its order, and the sizes by path.

    Raises OptionError naming layers, layer_filter or the line of blocks.
    """
    settings = plan.adapter
    blocks = block_map(tree)
    lines = block_lines.parse(settings.blocks, blocks)
    conv = settings.conv_rank > 0 or any(line.values.get("conv_rank") for line in lines)
    if settings.layers == "conv" and not conv:
        raise OptionError("conv_rank is 0, expected more: layers is conv, and that many ranks get the k×k convolutions")
    layers = _filtered(tree, settings, blocks, conv)
    plain, spatial = Size(plan.rank, plan.alpha), Size(settings.conv_rank, settings.conv_alpha)
    sizes = block_lines.sizes(layers, lines, plain, spatial)
    if not sizes:
        raise OptionError("blocks switches off every layer that is trained; leave some on")
    _check_words(settings, lines)
    return [layer for layer in layers if layer.path in sizes], sizes


def _filtered(tree: nn.Module, settings: AdapterSettings, blocks: Sequence[Block], conv: bool) -> list[Target]:
    """The layers of the preset that the rules of ``layer_filter`` leave."""
    if settings.layers == CUSTOM:
        every = list(trainable_layers(tree))
        layers = [layer for layer in every if conv or not is_spatial(layer)]
        without = " without k×k convolutions, which need conv_rank" if len(layers) < len(every) else ""
        among = f"the {len(layers)} layers of this model{without}"
    else:
        try:
            layers = select_targets(tree, settings.layers, conv)
        except ValueError as error:
            raise OptionError(str(error)) from error
        among = f"the {len(layers)} layers of {settings.layers!r}"
    try:
        return chosen(layers, parse(settings.layer_filter, blocks), among)
    except ValueError as error:
        raise OptionError(f"layer_filter {error}") from error


def _of_encoder(tree: nn.Module, plan: Plan) -> tuple[list[Target], dict[str, Size]]:
    preset = ENCODER_LAYERS if plan.adapter.layers in (CUSTOM, "conv") else plan.adapter.layers
    layers = select_targets(tree, preset, False)
    return layers, {layer.path: Size(plan.rank, plan.alpha) for layer in layers}


def _has_bias(tree: nn.Module, path: str) -> bool:
    return getattr(tree.get_submodule(path), "bias", None) is not None


# -- what has an effect


def _check_words(settings: AdapterSettings, lines: Iterable[Line]) -> None:
    """Sizes mean nothing to a family that has none."""
    reads = FAMILIES[settings.algorithm].options
    for line in lines:
        for word in line.values:
            kind = word.removeprefix("conv_")
            if kind in ("rank", "alpha") and kind not in reads and word != "conv_rank":
                raise OptionError(f"{line}: {word} has no effect, {settings.algorithm} has no {kind}; leave it out")


def _check_units(settings: AdapterSettings, sizes: Mapping[str, Size]) -> None:
    for path, size in sizes.items():
        if size.rank % settings.unit:
            raise OptionError(f"unit is {settings.unit}, expected a divisor of the rank {size.rank} that {path} has")


def _check_effects(
    tree: nn.Module,
    plan: Plan,
    layers: Sequence[Target],
    sizes: Mapping[str, Size],
    adapters: Mapping[str, Adapter],
    component: str,
) -> None:
    """Raises OptionError naming an option that changes nothing on these layers.

    What changes the model need not do anything to its text encoders.
    """
    if component != MODEL and plan.components.train_model:
        return
    settings, reads = plan.adapter, FAMILIES[plan.adapter.algorithm].options
    held = {name for adapter in adapters.values() for name in adapter.tensors}
    halves = {"full" if {W1, W2} <= adapter.tensors.keys() else "low" for adapter in adapters.values()}
    if component == MODEL:
        spatial = any(map(is_spatial, layers))
        where = "custom rules" if settings.layers == CUSTOM else repr(settings.layers)
        none = f"the layers of {where} hold no k×k convolution in this model"
        _refuse(settings, "conv_rank", 0, settings.conv_rank > 0 and not spatial, none)
        _refuse(settings, "conv_alpha", 1.0, not spatial, f"{none}, or conv_rank is 0")
        _refuse(settings, "conv_alpha", 1.0, "alpha" not in reads, f"{settings.algorithm} has no alpha")
        core = "no k×k convolution is trained, or their ranks are too great for a low-rank half (LoKr)"
        _refuse(settings, "tucker", False, not held & {MID, T1, T2}, core)
    else:
        text = "it is for the diffusion model, and train_model is off"
        for option in _OF_THE_MODEL:
            _refuse(settings, option, options_of(AdapterSettings)[option][1], True, text)
        _refuse(settings, "layers", ENCODER_LAYERS, settings.layers == "conv", text)
    biased = any(_has_bias(tree, path) for path in adapters)
    _refuse(settings, "train_bias", False, not biased, "none of the layers has a bias")
    whole = "rank is no less than half the longer side of what it would divide; lower rank"
    _refuse(settings, "decompose_both", False, W1_A not in held, whole)
    _refuse(settings, "full_matrix", False, not _is_made_full(settings, layers, sizes), f"it is full anyway: {whole}")
    same = all(lokr_split(size, settings.factor) == lokr_split(size, -1) for one in layers for size in one.shape[:2])
    _refuse(settings, "factor", -1, same, "it divides no layer otherwise than −1 does; take a divisor of the layers'")
    reason = "both halves of every LoKr are full, so alpha is not used"
    _refuse(settings, "rs_lora", False, settings.algorithm == "LoKr" and halves == {"full"}, reason)
    slow = settings.loraplus_ratio > 1 and not any(adapter.fast_parameters() for adapter in adapters.values())
    _refuse(settings, "loraplus_ratio", 0.0, slow, f"{settings.algorithm} has no second factor")


def _refuse(settings: AdapterSettings, option: str, default: object, useless: bool, why: str) -> None:
    value = getattr(settings, option)
    if useless and value != default:
        raise OptionError(f"{option} is {value!r}, expected {default!r}: it has no effect here, {why}")


def _is_made_full(settings: AdapterSettings, layers: Iterable[Target], sizes: Mapping[str, Size]) -> bool:
    """Whether LoKr would have a half in low rank on some layer if ``full_matrix`` did not say otherwise."""
    sides = ([lokr_split(size, settings.factor)[1] for size in layer.shape[:2]] for layer in layers)
    return any(sizes[layer.path].rank < max(side) / 2 for layer, side in zip(layers, sides, strict=True))


# -- what there is to tell


def _notes(
    plan: Plan,
    layers: Sequence[Target],
    sizes: Mapping[str, Size],
    adapters: Mapping[str, Adapter],
    left_out: Mapping[str, str],
    component: str,
) -> list[str]:
    settings, family = plan.adapter, FAMILIES[plan.adapter.algorithm]
    notes = [_summary(settings, layers, sizes, adapters, component)]
    if left_out:
        path, why = next(iter(left_out.items()))
        notes.append(f"{len(left_out)} layers get no adapter: {why} ({path})")
    for name in ("rank", "alpha"):
        if name not in family.options and getattr(plan, name) != options_of(Plan)[name][1] and component == MODEL:
            notes.append(f"{name} has no effect: {settings.algorithm} has none")
    if "rank" not in family.options and settings.conv_rank and component == MODEL:
        notes.append(f"conv_rank only says that convolutions are trained: {settings.algorithm} has no rank")
    full = sum({W1, W2} <= adapter.tensors.keys() for adapter in adapters.values())
    if full:
        notes.append(
            f"both LoKr matrices are whole on {full} of {len(adapters)} layers, where rank and alpha have no say"
        )
    rotating = Counter(size for adapter in adapters.values() if (size := _block_size(adapter)))
    if rotating and set(rotating) != {settings.block_size}:
        found = ", ".join(f"{size} on {count}" for size, count in sorted(rotating.items(), reverse=True))
        notes.append(f"block_size {settings.block_size} comes out as blocks of {found} layers, which they divide into")
    return notes


def _summary(
    settings: AdapterSettings,
    layers: Sequence[Target],
    sizes: Mapping[str, Size],
    adapters: Mapping[str, Adapter],
    component: str,
) -> str:
    """How many layers of which size, and how many numbers are trained."""
    kinds: Counter[str] = Counter()
    for layer in layers:
        what = "k×k convolutions" if is_spatial(layer) else "layers"
        rank = f" of rank {sizes[layer.path].rank}" if "rank" in FAMILIES[settings.algorithm].options else ""
        kinds[f"{what}{rank}"] += 1
    numbers = sum(math.prod(t.shape) for adapter in adapters.values() for t in adapter.parameters())
    where = "" if component == MODEL else f" on {component}"
    dora = f" with DoRA per {settings.dora}" if settings.dora != "off" else ""
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{settings.algorithm}{dora}{where}: {counted}; {numbers:,} numbers"


def _block_size(adapter: Adapter) -> int:
    """Channels that rotate together, 0 for what does not rotate."""
    if isinstance(adapter, OutputRotation):
        return adapter.blocks.shape[-1]
    return adapter.size if isinstance(adapter, OFTv2) else 0
