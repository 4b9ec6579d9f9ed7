"""What the nodes of the LoRA tools have in common.

* ``gather``: LORA_MODELs and files named in text, each with its strengths by component and block, as ingredients.
* ``ticking``: a bar on the node, and the ✕.
* ``Places``: the block of a layer, and what to call it; ``energy_picture``: what is retained, by block.
* ``named``: the whole of a LORA_MODEL by the names of what is connected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_management
import comfy.utils
from PIL import Image
from torch import Tensor

from ..kernels.block_names import BASE
from ..kernels.file_blocks import block_of_layers, blocks_of_file
from ..kernels.low_rank import Cut
from ..kernels.reading import NO_ENCODER, LoRAFile, read_lora
from ..kernels.strengths.components import TE, UNET
from ..kernels.strengths.lookup import find_name
from ..kernels.strengths.tags import MAX_TAG, Tag, parse_prompt
from ..kernels.tools.baked import Baked, bake, parse_strength, part_of
from ..kernels.tools.finishing import digest
from ..kernels.tools.merge import Ingredient
from ..kernels.tools.outcome import LayerOutcome, Outcome, retained
from ..kernels.tools.provenance import Parent
from . import lora_cache, loras
from .diagnosis import BlockShare, short_names
from .embeddings import encoders
from .pictures import bar_picture
from .presets import block_presets
from .prompt_states import prompt_state
from .targets import layout_of, names_of

MAX_LINES, MAX_TEXT = 64, 100_000


# -- ingredients


@dataclass(frozen=True)
class Gathered:
    ingredients: tuple[Ingredient, ...]
    parents: tuple[Parent, ...]
    notes: tuple[str, ...]
    tensors: tuple[tuple[str, Tensor], ...] = field(default=(), repr=False)


def gather(
    given: Sequence[tuple[str, Mapping[str, Tensor]]], strengths: str, files: str, model: Any, clip: Any
) -> Gathered:
    """``given``: sockets by name, with a line of ``strengths`` each; ``files``: a tag or its inside per line.

    Raises ValueError naming the widget, or the file and what it lacks.
    """
    lines = _lines(strengths, "strengths")
    if len(lines) > len(given):
        raise ValueError(
            f"strengths: {len(lines)} lines for {len(given)} connected LoRAs; write one line for each, in their order"
        )
    found = []
    for number, (socket, lora) in enumerate(given):
        text = lines[number] if number < len(lines) else ""
        loaded = lora_cache.of(lora, f"the LoRA at {socket}")
        found.append((loaded, lambda own, layout, text=text: parse_strength(text, own, layout, block_presets())))
    sources = loras.sources() if files.strip() else []
    for tag in _tags(files, () if clip is None else tuple(encoders(clip))):
        try:
            loaded = lora_cache.get(find_name(tag.name, sources))
        except ValueError as error:
            raise ValueError(f"files: {tag.name[:60]}: {error}") from error
        found.append((loaded, lambda own, layout, tag=tag: bake(tag, own, layout, block_presets(), text=_shown(tag))))
    if not found:
        raise ValueError("there is no LoRA to merge: connect lora_1 and more, or name files in the widget files")
    read = [_ingredient(loaded, strength, model, clip) for loaded, strength in found]
    return Gathered(
        tuple(ingredient for ingredient, _, _ in read),
        tuple(parent for _, parent, _ in read),
        tuple(note for _, _, notes in read for note in notes),
        tuple(item for loaded, _ in found for item in loaded.tensors.items()),
    )


def files_state(files: Any) -> str:
    """Changes with the files that the widget names, and with presets. Never raises."""
    presets = loras.state_of("")
    if files is None:
        return f"{prompt_state(None)} {presets}"
    try:
        return f"{prompt_state(' '.join(map(_as_tag, _lines(files, 'files'))))} {presets}"
    except (ValueError, TypeError, AttributeError):
        return presets


def _lines(text: str, name: str) -> list[str]:
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name}: {len(text)} letters, expected at most {MAX_TEXT}")
    lines = [line.strip() for line in text.rstrip().splitlines()]  # an empty line stands for its socket, too
    if len(lines) > MAX_LINES:
        raise ValueError(f"{name}: {len(lines)} lines, expected at most {MAX_LINES}")
    return lines


def _as_tag(line: str) -> str:
    return line if not line or line.startswith("<") else f"<lora:{line[:MAX_TAG]}>"


def _tags(files: str, known: Sequence[str]) -> tuple[Tag, ...]:
    text = " ".join(map(_as_tag, _lines(files, "files")))
    try:
        parsed = parse_prompt(text, encoders=known)
    except ValueError as error:
        raise ValueError(f"files: {error}") from error
    if parsed.text.strip():
        raise ValueError(
            f"files: {parsed.text.strip()[:60]!r} stands beside the tags; write one file a line, such as cat:0.7"
        )
    return parsed.tags


def _shown(tag: Tag) -> str:
    """The strengths of a tag as text."""
    parts = [f"unet={tag.model}", f"te={tag.components.get(TE, tag.clip)}"]
    parts += [f"{name}={strength}" for name, strength in tag.components.items() if name != TE]
    parts += [f"blocks={tag.blocks}"] if tag.blocks else []
    return ":".join(parts + ([f"module={tag.module}"] if tag.module else []))


def _ingredient(
    loaded: lora_cache.Loaded, strength: Callable[[Sequence[str], Any], Baked], model: Any, clip: Any
) -> tuple[Ingredient, Parent, list[str]]:
    if model is None:
        file = read_lora(loaded.tensors)
        own = sorted({part_of(path) for path in file.adapters} - {UNET})
        baked = _of(loaded, strength, own, None)
    else:
        file = loaded.file(names_of(model, clip))
        own = [] if clip is None else list(encoders(clip))
        baked = _of(loaded, strength, own, layout_of(model.model))
        lost = [item for item in file.unplaced if item.reason == NO_ENCODER]
        if lost and clip is None and baked.parts.get(TE, 1.0):
            raise ValueError(
                f"{loaded.name}: {len(lost)} of its keys are for text encoders ({lost[0].key[:80]}); connect the CLIP, "
                "or give it te=0 to leave them out"
            )
    if not file.adapters and not file.embeddings:
        why = f" ({file.unplaced[0].key[:80]}: {file.unplaced[0].detail})" if file.unplaced else ""
        raise ValueError(f"{loaded.name}: nothing of it fits{why}; connect the MODEL that it was made for")
    ingredient = Ingredient(file, baked, loaded.name)
    parent = replace(parent_of(loaded.tensors, loaded.name, baked.text), acts=ingredient.acts)
    return ingredient, parent, [f"{loaded.name}: {note}" for note in baked.notes]


def parent_of(lora: Mapping[str, Tensor], name: str, strength: str = "1") -> Parent:
    """``name`` where the LoRA does not say what it is called."""
    metadata = getattr(lora, "metadata", {})
    own = metadata.get("ss_output_name") or metadata.get("modelspec.title")
    return Parent(own or name, digest(lora), strength, metadata)


def _of(loaded: lora_cache.Loaded, strength: Callable[[Sequence[str], Any], Baked], own: Sequence[str], layout: Any):
    try:
        return strength(own, layout)
    except ValueError as error:
        raise ValueError(f"{loaded.name}: {error}") from error


# -- in and out


def named(lora: Mapping[str, Tensor], model: Any, clip: Any) -> LoRAFile:
    """All of a LORA_MODEL; by the names of the MODEL where one is connected, else by its own.

    Raises ValueError for what finds no place: it would be lost.
    """
    loaded = lora_cache.of(lora)
    file = read_lora(loaded.tensors) if model is None else loaded.file(names_of(model, clip))
    if file.unplaced:
        item = file.unplaced[0]
        raise ValueError(
            f"lora: {len(file.unplaced)} of its keys would be lost ({item.key[:80]}: {item.detail}); connect the MODEL "
            "that it is for, and the CLIP where it holds layers of text encoders; the LoRA Inspector lists them"
        )
    return file


def cut_of(rank: int, energy: float, ratio: float = 0.0) -> Cut | None:
    """From widgets, where 0 means that it does not count; None where none does."""
    if not (rank or energy or ratio):
        return None
    return Cut(rank or None, energy or None, ratio or None)


def ticking(node_id: str | None) -> Callable[[int, int], None]:
    """Shows how far a tool is, and stops it where the user has asked for that."""
    bars: dict[int, Any] = {}

    def tick(done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total not in bars:
            bars[total] = comfy.utils.ProgressBar(total, node_id)
        bars[total].update_absolute(done, total)

    return tick


# -- blocks


class Places:
    """Which block a layer of a file lies in; text encoders count as one each. Without a MODEL, the names tell."""

    def __init__(self, model: Any | None, file: LoRAFile) -> None:
        if model is not None:
            layout = layout_of(model.model)
            blocks, self._of = list(layout.blocks), layout.block_of
        else:
            blocks = blocks_of_file(file.adapters, file.metadata)
            self._of = block_of_layers(file.adapters, file.metadata)
        self.roles = {block.id: block.role for block in blocks}
        self.names = short_names(blocks, [*self.roles, BASE])  # id → what to call it

    def block_of(self, path: str) -> str:
        part = part_of(path)
        return self._of.get(path) or BASE if part == UNET else part

    def called(self, path: str) -> str:
        block = self.block_of(path)
        return self.names.get(block, block)

    def ordered(self, blocks: Iterable[str]) -> list[str]:
        """In the model's order, what lies in none first, text encoders last."""
        order = {block: number for number, block in enumerate([BASE, *self.roles])}
        return sorted(blocks, key=lambda block: (order.get(block, len(order)), block))


def energy_picture(title: str, outcome: Outcome, places: Places) -> Image.Image:
    """The part of each block's ‖ΔW‖² that is left."""
    inside: dict[str, list[LayerOutcome]] = {}
    for layer in outcome.layers:
        inside.setdefault(places.block_of(layer.path), []).append(layer)
    shares = [
        BlockShare(block, retained(inside[block]), len(inside[block]), places.roles.get(block, BASE))
        for block in places.ordered(inside)
    ]
    return bar_picture(shares, title, places.names, "retained energy by block", _kept)


def _kept(part: float) -> str:
    """Never rounded up to all."""
    return "100 %" if part >= 1 else f"{math.floor(part * 1000) / 10:g} %"
