"""diffusers' names for the UNets of SD1, SD2 and SDXL.

* ``sd_unet_layout``: the shape of such a UNet, read from the paths of its layers.
* ``diffusers_paths``: host path -> diffusers path for a layout, as pure tables.
* ``diffusers_spellings``: every way in which diffusers has written such a path.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER = ("norm", "proj_in", "proj_out")
_TRANSFORMER_BLOCK = (
    *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
    *(f"attn{n}.{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
)
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_CLASS_EMBEDDING = {"add_embedding": "class_embedding"}  # what SD2 unCLIP calls the layers that SDXL calls the former


@dataclass(frozen=True)
class UNetLayout:
    """An SD UNet: ResNets per level going down, and transformer depths (0: no transformer) in forward order.

    ``depths_in`` has one entry per ResNet going down, ``depths_out`` one per ResNet going up (one more per level);
    ``depth_middle`` is -1 where the middle is a lone ResNet, and -2 where there is none. ``sdxl``: kohya's SDXL names.
    """

    resnets: tuple[int, ...]
    depths_in: tuple[int, ...]
    depth_middle: int
    depths_out: tuple[int, ...]
    sdxl: bool


def sd_unet_layout(layers: Iterable[str]) -> UNetLayout | None:
    """Read the layout off the paths of all layers, without prefix; None unless it is an SD1, SD2 or SDXL UNet."""
    paths = set(layers)
    if not {"input_blocks.0.0", "output_blocks.0.0.in_layers.0", "time_embed.0", "out.2"} <= paths:
        return None
    if any("time_stack" in path for path in paths):  # video UNets have further layers without diffusers names
        return None
    blocks: dict[str, set[str]] = defaultdict(set)  # stack → its members
    for path in paths:
        stack, transformer, rest = path.partition(".transformer_blocks.")
        if not transformer:
            stack, _, rest = path.partition(".")
        blocks[stack].add(rest.partition(".")[0])

    def depth(transformer: str) -> int:
        return len(blocks.get(transformer, ()))

    resnets, depths_in = [0], []
    for block in range(1, len(blocks["input_blocks"])):
        if f"input_blocks.{block}.0.op" in paths:
            resnets.append(0)
        else:
            resnets[-1] += 1
            depths_in.append(depth(f"input_blocks.{block}.1"))
    depths_out = tuple(depth(f"output_blocks.{block}.1") for block in range(len(blocks["output_blocks"])))
    middle = depth("middle_block.1") or (-1 if "middle_block.0.in_layers.0" in paths else -2)
    sdxl = "label_emb.0.0" in paths and depths_in[0] == 0
    return UNetLayout(tuple(resnets), tuple(depths_in), middle, depths_out, sdxl)


def diffusers_paths(layout: UNetLayout) -> dict[str, str]:
    """Host path without "diffusion_model." -> diffusers path, for every layer such a UNet can have."""
    table, last = dict(_OUTSIDE), len(layout.resnets) - 1
    block, transformers = 1, iter(layout.depths_in)
    for level, resnets in enumerate(layout.resnets):
        for n in range(resnets):
            table.update(_resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{n}"))
            table.update(
                _transformer(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{n}", next(transformers))
            )
            block += 1
        if level < last:
            table[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        block += 1
    if layout.depth_middle > -2:
        table.update(_resnet("middle_block.0", "mid_block.resnets.0"))
    if layout.depth_middle > 0:
        table.update(_transformer("middle_block.1", "mid_block.attentions.0", layout.depth_middle))
        table.update(_resnet("middle_block.2", "mid_block.resnets.1"))
    block, transformers = 0, iter(layout.depths_out)
    for level, resnets in enumerate(reversed(layout.resnets)):
        for n in range(resnets + 1):
            depth = next(transformers)
            table.update(_resnet(f"output_blocks.{block}.0", f"up_blocks.{level}.resnets.{n}"))
            table.update(_transformer(f"output_blocks.{block}.1", f"up_blocks.{level}.attentions.{n}", depth))
            if n == resnets and level < last:
                upsampler = f"output_blocks.{block}.{2 if depth else 1}.conv"
                table[upsampler] = f"up_blocks.{level}.upsamplers.0.conv"
            block += 1
    return table


def diffusers_spellings(path: str) -> Iterator[str]:
    """A diffusers path, the one of SD2 unCLIP for it, and each as the attention processors of older diffusers."""
    for name in (path, *(path.replace(old, new) for old, new in _CLASS_EMBEDDING.items() if old in path)):
        yield name
        if ".to_" in name:
            yield name.replace(".to_", ".processor.to_").removesuffix(".0")


def _resnet(host: str, diffusers: str) -> dict[str, str]:
    return {f"{host}.{here}": f"{diffusers}.{there}" for here, there in _RESNET.items()}


def _transformer(host: str, diffusers: str, depth: int) -> dict[str, str]:
    if not depth:
        return {}
    leaves = [*_TRANSFORMER, *(f"transformer_blocks.{n}.{leaf}" for n in range(depth) for leaf in _TRANSFORMER_BLOCK)]
    return {f"{host}.{leaf}": f"{diffusers}.{leaf}" for leaf in leaves}

