"""Names of a model's layers in files: the host's module paths, kohya's and diffusers' spellings.

* ``sd_unet_layout``: the shape of an SD1, SD2 or SDXL UNet, read from its module tree.
* ``diffusers_paths``: host path -> diffusers path for a layout, as pure tables.
* ``NameTable``: for one model, the name to write for each layer and the layer that any accepted spelling means.

A canonical name is the host's module path, "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q".
kohya's trainers write "lora_unet_" and the path of their own UNet with underscores: diffusers' paths for SD1 and SD2,
the original ones for SDXL. Every other family is written under the host's path, which all its loaders take.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from .blocks import MODEL_PREFIX, diffusion_tree

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
_CLASS_EMBEDDING = {"class_embedding.linear_1": "label_emb.0.0", "class_embedding.linear_2": "label_emb.0.2"}


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


def sd_unet_layout(module_tree: nn.Module) -> UNetLayout | None:
    """Read the layout off a loaded model; None unless it is an SD1, SD2 or SDXL UNet."""
    root, _ = diffusion_tree(module_tree)
    paths = {name for name, _ in root.named_modules()}
    if not {"input_blocks.0.0", "output_blocks.0.0.in_layers", "time_embed.0", "out.2"} <= paths:
        return None
    if any("time_stack" in path for path in paths):  # video UNets have further layers without diffusers names
        return None
    resnets, depths_in = [0], []
    for block in range(1, _count(paths, "input_blocks")):
        if f"input_blocks.{block}.0.op" in paths:
            resnets.append(0)
        else:
            resnets[-1] += 1
            depths_in.append(_depth(paths, f"input_blocks.{block}.1"))
    depths_out = tuple(_depth(paths, f"output_blocks.{block}.1") for block in range(_count(paths, "output_blocks")))
    middle = _depth(paths, "middle_block.1") or (-1 if "middle_block.0" in paths else -2)
    sdxl = "label_emb.0.0" in paths and depths_in[0] == 0
    return UNetLayout(tuple(resnets), tuple(depths_in), middle, depths_out, sdxl)


def diffusers_paths(layout: UNetLayout) -> dict[str, str]:
    """Host path without "diffusion_model." -> diffusers path, for every layer such a UNet can have."""
    table = dict(_OUTSIDE)
    block, transformers = 1, iter(layout.depths_in)
    for level, resnets in enumerate(layout.resnets):
        for n in range(resnets):
            table.update(_resnet(f"input_blocks.{block}.0", f"down_blocks.{level}.resnets.{n}"))
            table.update(
                _transformer(f"input_blocks.{block}.1", f"down_blocks.{level}.attentions.{n}", next(transformers))
            )
            block += 1
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
            if n == resnets:
                upsampler = f"output_blocks.{block}.{2 if depth else 1}.conv"
                table[upsampler] = f"up_blocks.{level}.upsamplers.0.conv"
            block += 1
    return table


def kohya_name(path: str, layout: UNetLayout) -> str:
    """The name kohya's trainers give a UNet layer, "lora_unet_down_blocks_0_attentions_0_proj_in".

    Raises ValueError for a path that such a UNet does not have.
    """
    local = path.removeprefix(MODEL_PREFIX)
    if layout.sdxl:
        return _flat(local)
    try:
        return _flat(diffusers_paths(layout)[local])
    except KeyError:
        raise ValueError(f"{path}: not a layer of this UNet, so it has no kohya name") from None


class NameTable:
    """Names of one model's layers: ``write`` gives the name for a file, ``find`` the layer that a name means."""

    def __init__(self, paths: Iterable[str], layout: UNetLayout | None) -> None:
        self.layout = layout
        diffusers = diffusers_paths(layout) if layout else {}
        self._written: dict[str, str] = {}
        self._found: dict[str, str] = {}
        for path in paths:
            local = path.removeprefix(MODEL_PREFIX)
            other = diffusers.get(local)
            kohya = _flat(other if other and layout and not layout.sdxl else local)
            self._written[path] = kohya if layout else MODEL_PREFIX + local
            for name in _spellings(local, other):
                self._found.setdefault(name, path)

    @classmethod
    def of(cls, module_tree: nn.Module) -> NameTable:
        """The table of a loaded model: every module that owns a weight."""
        root, prefix = diffusion_tree(module_tree)
        weighted = (prefix + name for name, module in root.named_modules() if hasattr(module, "weight"))
        return cls(weighted, sd_unet_layout(module_tree))

    def write(self, path: str) -> str:
        """kohya's name for SD1, SD2 and SDXL UNets, the host's "diffusion_model.…" for every other family."""
        return self._written[path]

    def find(self, name: str) -> str | None:
        """Canonical path of an accepted spelling, None if no layer of this model is called so."""
        return self._found.get(name)

    def accepted(self) -> dict[str, str]:
        """Every accepted spelling -> canonical path."""
        return dict(self._found)


def _spellings(local: str, diffusers: str | None) -> Iterator[str]:
    yield MODEL_PREFIX + local
    yield _flat(local)
    if diffusers is None:
        return
    for other in (diffusers, *(alias for alias, path in _CLASS_EMBEDDING.items() if path == local)):
        yield _flat(other)
        yield "lycoris_" + other.replace(".", "_")
        processor = other.replace(".to_", ".processor.to_").removesuffix(".0" if other.endswith(".to_out.0") else "")
        for spelling in (other, processor):  # layers, and the attention processors of older diffusers
            yield spelling
            yield "unet." + spelling


def _flat(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def _resnet(host: str, diffusers: str) -> dict[str, str]:
    return {f"{host}.{here}": f"{diffusers}.{there}" for here, there in _RESNET.items()}


def _transformer(host: str, diffusers: str, depth: int) -> dict[str, str]:
    if not depth:
        return {}
    leaves = [*_TRANSFORMER, *(f"transformer_blocks.{n}.{leaf}" for n in range(depth) for leaf in _TRANSFORMER_BLOCK)]
    return {f"{host}.{leaf}": f"{diffusers}.{leaf}" for leaf in leaves}


def _count(paths: set[str], stack: str) -> int:
    return sum(1 for path in paths if path.startswith(stack + ".") and path.count(".") == 1)


def _depth(paths: set[str], transformer: str) -> int:
    start = f"{transformer}.transformer_blocks."
    return sum(1 for path in paths if path.startswith(start) and path.count(".") == start.count("."))
