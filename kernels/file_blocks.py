"""The blocks of a model, from the keys of a LoRA file alone.

* ``blocks_of_file``: the blocks that a file has layers in, in the model's order, with the ids and groups that
  ``blocks.block_map`` finds on the model. ``block_names.resolve`` and the vectors of block weights take them.
* ``block_of_layers``: the block that each layer of a file is in.
* ``GROUPS``: the stacks of blocks of every family that has names of its own, in the order of its models.

Which family a file is for is told as in ``architectures``, and where several have layers of such names, by how many of
the file's names their tables know, and by the number of blocks. PixArt, LTX-Video and Cosmos call the layers of their
blocks alike in diffusers' files: of such a file with attention and MLP alone only the metadata, or the caller, can tell
(else it is taken for LTX-Video's). The first and the second Cosmos have all names in common there; it is taken for the
second.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from .architectures import guess, in_text_encoder, local, same_base
from .blocks import MODEL_PREFIX, Block, named_role
from .dialects import KEEP, Table
from .dialects_transformers import FAMILIES
from .dialects_unet import UNetLayout, diffusers_paths, diffusers_spellings
from .spellings import split

_STREAMS = ("double_blocks", "single_blocks")
_HUNYUAN = ("txt_in.individual_token_refiner.blocks", *_STREAMS)
_LUMINA = ("noise_refiner", "context_refiner", "layers")
_CASCADE = ("down_blocks", "down_downscalers", "up_blocks", "up_upscalers")
_UNET = ("input_blocks", "middle_block", "output_blocks")
AUXILIARY = {
    "txt_in.individual_token_refiner.blocks",
    *("distilled_guidance_layer.layers", "noise_refiner", "context_refiner", "llm_adapter.blocks"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sd", "sd1", "sd2", "sdxl", "sdxl_refiner"), _UNET),
    **dict.fromkeys(("flux", "flux2"), _STREAMS),
    "chroma": ("distilled_guidance_layer.layers", *_STREAMS),
    **dict.fromkeys(("hunyuan_video", "hunyuan_video15", "hunyuan_image"), _HUNYUAN),
    "sd3": ("joint_blocks",),
    "auraflow": ("double_layers", "single_layers"),
    **dict.fromkeys(("hunyuan_dit", "pixart", "mochi", "cosmos2"), ("blocks",)),
    **dict.fromkeys(("z_image", "lumina2"), _LUMINA),
    "wan": ("blocks", "vace_blocks"),
    "ltxav": (
        "audio_embeddings_connector.transformer_1d_blocks",
        "video_embeddings_connector.transformer_1d_blocks",
        "transformer_blocks",
    ),
    **dict.fromkeys(("ltxv", "qwen_image"), ("transformer_blocks",)),
    "cosmos1": ("t_embedder", "blocks.block#.blocks"),
    "anima": ("blocks", "llm_adapter.blocks"),
    "hidream": ("double_stream_blocks", "single_stream_blocks", "caption_projection"),
    "omnigen2": ("noise_refiner", "ref_image_refiner", "context_refiner", "layers"),
    "ace_step": ("transformer_blocks", "lyric_encoder.encoders", "projectors"),
    "ace_step15": (
        *("decoder.layers", "encoder.lyric_encoder.layers", "encoder.timbre_encoder.layers"),
        *("tokenizer.attention_pooler.layers", "detokenizer.layers"),
    ),
    "kandinsky5": ("text_transformer_blocks", "visual_transformer_blocks"),
    "ernie_image": ("layers",),
    "krea2": ("blocks", "txtfusion.layerwise_blocks", "txtfusion.refiner_blocks"),
    **dict.fromkeys(("cascade_c", "cascade_b"), _CASCADE),
}
_ATTENTIONS = ("attn1", "attn2", "audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
_KEPT = (  # LTX-Video's names, which diffusers keeps, so that its table does not list them
    *(f"transformer_blocks.#.{name}.{leaf}" for name in _ATTENTIONS for leaf in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.#.{name}.net.{leaf}" for name in ("ff", "audio_ff") for leaf in ("0.proj", "2")),
    *("adaln_single.linear", "caption_projection.linear_1", "caption_projection.linear_2", "proj_out"),
    *(f"adaln_single.emb.timestep_embedder.linear_{n}" for n in (1, 2)),
)
_MOST = {  # the largest model's blocks that diffusers calls "transformer_blocks"; Qwen-Image has 60 of such layers
    **{"sd3": 38, "flux": 19, "flux2": 8, "chroma": 19},
    **{"hunyuan_video": 20, "hunyuan_video15": 54, "hunyuan_image": 20},
}
_ANY_UNET = UNetLayout((2, 2, 2, 2), (10,) * 8, 10, (10,) * 12, sdxl=False)  # holds every layer of SD1, SD2 and SDXL
_KOALA = UNetLayout((1, 1, 1), (10,) * 3, 10, (10,) * 6, sdxl=False)  # one ResNet a level; the others have two
_NUMBER = re.compile(r"(?<=_)\d+(?=_|$)")


@dataclass(frozen=True)
class _Known:
    """What a family's names look like, flat and without prefix.

    ``stacks``: the beginning of a name → the block it means, # for the first number of the name. ``layers``: whole
    names that its tables know, # for every number. ``same``: diffusers mostly keeps names as they are.
    """

    stacks: tuple[tuple[re.Pattern, str], ...]
    layers: frozenset[str]
    same: bool

    def score(self, names: Iterable[str], templates: Iterable[str]) -> int:
        """How many of the names it knows; where diffusers keeps names, any inside a block."""
        known = sum(template in self.layers for template in templates)
        return known + sum(self.place(name) is not None for name in names) if self.same else known

    def place(self, name: str) -> tuple[str, str] | None:
        """(the block, the layer: as it stands in the file)."""
        for pattern, block in self.stacks:
            match = pattern.match(name)
            if match:
                for number in match.groups():
                    block = block.replace("#", number, 1)
                return block, name
        return None


def blocks_of_file(
    names: Iterable[str], metadata: Mapping[str, str] | None = None, architecture: str | None = None
) -> list[Block]:
    """The blocks that a file has layers in. ``names``: the file's keys, or the names of its layers as they stand there.

    ``architecture``: the family, as ``LoRAFile.architecture`` calls it, where it is known. Blocks of a family without
    a table are not found. The parameters of the blocks are layers of the file, by their canonical paths in UNets.
    """
    family, places = _places(names, metadata or {}, architecture)
    if family is None:
        return []
    inside: dict[str, list[str]] = {}
    for identifier, path in dict.fromkeys(places.values()):
        inside.setdefault(identifier, []).append(f"{MODEL_PREFIX}{path}.weight")
    blocks = [_block(identifier, parameters) for identifier, parameters in inside.items()]
    order = [group.replace("#", "") for group in GROUPS[family]]

    def place_of(block: Block) -> tuple[int, ...]:
        group = re.sub(r"(?<=block)\d+", "", block.group)
        return order.index(group), *map(int, re.findall(r"\d+", block.id))

    return sorted(blocks, key=place_of)


def block_of_layers(
    names: Iterable[str], metadata: Mapping[str, str] | None = None, architecture: str | None = None
) -> dict[str, str]:
    """Layer, by its name in the file → id of its block; without those that are in none."""
    return {name: block for name, (block, _) in _places(names, metadata or {}, architecture)[1].items()}


def _places(
    names: Iterable[str], metadata: Mapping[str, str], architecture: str | None
) -> tuple[str | None, dict[str, tuple[str, str]]]:
    """(the family, None where it has no table; layer by its name in the file → its block, its path)."""
    keys = list(names)
    known = set(keys)
    layers = dict.fromkeys(split(key, known).name for key in keys)
    flat = {name: _flat(name) for name in layers if not in_text_encoder(name)}
    by_flat = {short: name for name, short in flat.items()}
    family = architecture or _family(by_flat, metadata)
    if family not in GROUPS:
        return None, {}
    table = _unet(by_flat) if GROUPS[family] is _UNET else _known(family)
    found = ((name, table.place(short)) for name, short in flat.items())
    return family, {name: place for name, place in found if place is not None}


def _flat(name: str) -> str:
    """Without what stands before the model's own path; LyCORIS puts only its name there."""
    return name.removeprefix("lycoris_") if name.startswith("lycoris_") else local(name)


def _family(flat: Mapping[str, str], metadata: Mapping[str, str]) -> str | None:
    told = guess({short: {} for short in flat}, metadata)[0]
    if told in GROUPS and GROUPS[told] is _UNET:
        return told
    templates = [_NUMBER.sub("#", short) for short in flat]
    numbers = (re.match(r"transformer_blocks_(\d+)_", short) for short in flat)
    count = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    scores = {
        family.name: _known(family.name).score(flat, templates)
        for family in FAMILIES
        if same_base(told, family.name) and count <= _MOST.get(family.name, count)
    }
    best = max(scores.values(), default=0)
    if told and scores.get(told) == best:
        return told
    return next(name for name, score in scores.items() if score == best) if best else told


@cache
def _known(name: str) -> _Known:
    family = next(family for family in FAMILIES if family.name == name)
    groups = GROUPS[name]
    stacks = [(f"{group}.#", f"{group}.#") for group in groups]
    layers = [*family.marks, *(_KEPT if name in ("ltxv", "ltxav") else ())]
    for table in (family.diffusers or (), *family.aliases):
        stacks += _stacks(table, groups)
        layers += itertools.chain.from_iterable(_layers(table))
    patterns = sorted(dict.fromkeys(stacks), key=lambda stack: -len(stack[0]))  # the longest beginning decides
    return _Known(
        tuple((re.compile(_pattern(there)), here) for there, here in patterns),
        frozenset(_NUMBER.sub("#", layer.replace(".", "_")) for layer in layers),
        any(not stack.other and stack.layers == KEEP for stack in family.diffusers or ()),
    )


def _pattern(stack: str) -> str:
    return re.escape(stack.replace(".", "_")).replace(re.escape("#"), r"(\d+)") + "(?:_|$)"


def _stacks(table: Table, groups: Iterable[str]) -> list[tuple[str, str]]:
    """(the other name of a stack, with # for numbers, and the block that it lies in)."""
    found = []
    for stack in table:
        for group in groups:
            begin = re.match(re.escape(group) + r"\.(?:#|\d+)", stack.host)
            if begin:
                found.append((stack.other, begin.group()))
            elif stack.layers.get("*") == "*" and (f"{group}.".startswith(f"{stack.host}.") or not stack.host):
                rest = group[len(stack.host) :].lstrip(".")
                found.append((".".join(filter(None, (stack.other, rest, "#"))), f"{group}.#"))
    return found


def _layers(table: Table) -> Iterable[tuple[str, str]]:
    """(the host's name, another), of every layer that a table lists."""
    for stack in table:
        for layer, entry in stack.layers.items():
            for name in entry.replace("|", " ").split():
                name = name.lstrip("~").rpartition("*")[2]
                if layer != "*" and name not in ("-", "2"):
                    yield ".".join(filter(None, (stack.host, layer))), ".".join(filter(None, (stack.other, name)))


@dataclass(frozen=True)
class _UNetNames:
    """SD's UNets: the host's paths by the names in files."""

    paths: Mapping[str, str]

    def place(self, name: str) -> tuple[str, str] | None:
        """(the block, the path of the layer)."""
        path = self.paths.get(name)
        if path is None:
            return None
        group, number = path.split(".")[:2]
        return (group if group == "middle_block" else f"{group}.{number}"), path


def _unet(flat: Iterable[str]) -> _UNetNames:
    numbers: dict[str, set[str]] = {"down": set(), "up": set()}
    for match in filter(None, (re.match(r"(down|up)_blocks_\d_(?:attentions|resnets)_(\d)_", name) for name in flat)):
        numbers[match[1]].add(match[2])
    return _unet_names(_KOALA if numbers == {"down": {"0"}, "up": {"0", "1"}} else _ANY_UNET)


@cache
def _unet_names(layout: UNetLayout) -> _UNetNames:
    theirs = {
        spelling.replace(".", "_"): path
        for path, name in diffusers_paths(layout).items()
        for spelling in diffusers_spellings(name)
    }
    ours = {path.replace(".", "_"): path for either in (_ANY_UNET, _KOALA) for path in diffusers_paths(either)}
    return _UNetNames({name: path for name, path in (theirs | ours).items() if path.startswith(_UNET)})


def _block(identifier: str, names: list[str]) -> Block:
    group, _, number = identifier.rpartition(".")
    group = group if number.isdecimal() else identifier
    role = named_role(group) or ("aux" if group in AUXILIARY else "trunk")
    return Block(identifier, group, role, (MODEL_PREFIX + identifier,), tuple(names))
