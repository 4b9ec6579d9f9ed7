"""How strong a LoRA goes into a file: what tags and widgets say, as one number for each of its layers.

* ``parse_strength``: text such as "0.7", "0.7:te=0.3", "1:in=0.5:blocks=double.3-8=0": what stands behind the name in
  a tag of a prompt, in the spelling of SD.Next.
* ``Baked``: the strength of each layer, for people, and what has no effect.

A file has one strength for all time: whatever changes over a run is an error that says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..architectures import has_prefix
from ..blocks import MODEL_PREFIX
from ..file_blocks import blocks_of_file
from ..names import NameTable
from ..strengths.blocks import BlockWeights, parse_blocks
from ..strengths.components import TE, UNET, by_part, without_effect
from ..strengths.layout import Layout
from ..strengths.schedule import Schedule, fixed
from ..strengths.tags import Tag, parse_prompt
from .measure import component_of

MAX_LENGTH = 2000


@dataclass(frozen=True)
class Baked:
    """Call it with a path; ``text`` is how it was written, ``whole`` the strength of what nothing else is said of."""

    text: str
    whole: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)  # of the diffusion model and of text encoders
    blocks: BlockWeights = field(default_factory=BlockWeights)
    notes: tuple[str, ...] = ()

    def __call__(self, path: str) -> float:
        part = part_of(path)
        strength = self.parts.get(part, self.parts.get(TE if part != UNET else UNET, self.whole))
        if part != UNET:
            return strength
        block = self.blocks.of(path).constant
        assert block is not None
        return strength * block


def part_of(path: str) -> str:
    """``UNET``, or the text encoder that a layer is of: its own name, or te1, te2, … for names in files."""
    if path.startswith(MODEL_PREFIX):
        return UNET
    found = component_of(path)
    own = found == UNET and ".transformer." in path and not has_prefix(path)  # language models, as the host has them
    return path.partition(".")[0] if own else found


def layout_of(table: NameTable) -> Layout:
    """The blocks of a model of which nothing but the names is known."""
    paths = tuple(path for path in table.shapes if path.startswith(MODEL_PREFIX))
    return Layout(tuple(blocks_of_file(paths, architecture=table.architecture)), paths)


def parse_strength(
    text: str,
    encoders: Sequence[str],
    layout: Layout | None,
    presets: Mapping[str, tuple[str, ...]] | None = None,
    name: str = "strengths",
) -> Baked:
    """What ``text`` says of one LoRA. Raises ValueError that begins with ``name``."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{name}: {len(text)} letters, expected at most {MAX_LENGTH}")
    if any(mark in text for mark in "<>\n"):
        raise ValueError(f"{name}: {text[:60]!r} is no strength; write 0.7, or 0.7:te=0.3:in=0.5")
    parts = " ".join(text.split()).strip(": ")
    try:
        (tag,) = (parsed := parse_prompt(f"<lora:it:{parts}>" if parts else "<lora:it>", encoders=encoders)).tags
        return bake(tag, encoders, layout, presets, text=parts or "1", notes=parsed.notes)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix('<lora:it…>: ')}") from error


def bake(
    tag: Tag,
    encoders: Sequence[str],
    layout: Layout | None,
    presets: Mapping[str, tuple[str, ...]] | None = None,
    text: str = "",
    notes: Sequence[str] = (),
) -> Baked:
    """The strengths of a tag. ``encoders``: the text encoders that there are; ``layout``: of the model, for blocks."""
    if tag.side:
        raise ValueError(f"{tag.side} has no effect here, a file is for one model; leave it out")
    blocks = BlockWeights()
    if tag.blocks.strip():
        if layout is None:
            raise ValueError("blocks need the model, which tells what its blocks are; connect or name it")
        blocks = parse_blocks(tag.blocks, layout, presets=presets)
        for strength in blocks.weights.values():
            _constant(strength, "blocks")
    parts = {
        part: _constant(tag.clip, TE) * _constant(strength, part)
        for part, strength in by_part(tag.components, encoders, blocks.components).items()
    }
    parts[UNET] = _constant(tag.model, UNET) * _constant(tag.steps, "steps")
    parts.setdefault(TE, _constant(tag.clip, TE) * _constant(tag.components.get(TE, fixed(1.0)), TE))
    if tag.module:
        meant = by_part({tag.module: fixed(0.0)}, encoders, name="module")
        parts = {part: own if meant.get(part) == fixed(0.0) else 0.0 for part, own in parts.items()}
    single = {part: strength for part, strength in tag.components.items() if part != TE}  # te is that of the others
    idle = without_effect(single, encoders)
    return Baked(text, parts[UNET], parts, blocks, (*notes, *blocks.notes, *idle))


def _constant(strength: Schedule, name: str) -> float:
    constant = strength.constant
    if constant is None:
        raise ValueError(
            f"{name}: {str(strength)[:60]} changes over the run, which a file cannot do; give it one strength"
        )
    return constant
