"""What each block of a LoRA does to a picture: sampled with every block left out in turn, or with it alone.

* ``Options``: how is sampled, and which blocks or groups of blocks.
* ``analyse`` → ``Analysis``: a sheet of labelled pictures, the pictures, and a table.

The LoRA hangs beside the weights (``branching``), each block with a dial of its own; between pictures only dials are
turned. The model is loaded once and nothing is patched or read again: a picture costs its steps and no more. All are
sampled before the first is decoded, so that the VAE does not push the model out between them. Of what is decoded only
the first frames are kept, and all frames of the two pictures that the others are compared with.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
import comfy.sample
import latent_preview
import torch
from PIL import Image
from torch import Tensor

from ..kernels.block_names import BASE, resolve
from ..kernels.blocks import Block, BlockIndex
from ..kernels.reading import NO_ENCODER
from ..kernels.unplaced import grouped
from . import branching
from .applied import layer_adapters
from .apply import BRANCH, Applied, Strengths, apply_lora
from .branching import BranchedLoRA, Dial
from .diagnosis import Shares, percent, shares_of
from .lora_cache import Loaded
from .pictures import grid
from .previews import sampler_names, scheduler_names, to_picture
from .progress import Progress
from .targets import layout_of

WITHOUT, ONLY = "without each block", "only each block"
MODES = {
    WITHOUT: "every part is left out in turn; the number is how far the picture moves away from that of the whole LoRA",
    ONLY: "every part acts alone in turn; the number is how far the picture moves away from that without the LoRA",
}
BLOCK, GROUP = "block", "group"
GRANULARITIES = {
    BLOCK: "a picture for every block",
    GROUP: "a picture for every group of blocks, such as double_blocks or input_blocks",
}
MODEL_ORDER, BY_DIFFERENCE = "model", "difference"
ORDERS = {
    MODEL_ORDER: "as the blocks follow each other in the model",
    BY_DIFFERENCE: "the greatest difference first",
}
BASE_LABEL, WHOLE_LABEL = "without the LoRA", "the whole LoRA"
MOST_PICTURES, SMALLEST, LARGEST = 200, 64, 512
_CHOICES = {"mode": MODES, "granularity": GRANULARITIES, "order": ORDERS}
_CELLS_ACROSS = 12


@dataclass(frozen=True)
class Options:
    strength: float = 1.0
    seed: int = 0
    steps: int = 20
    cfg: float = 7.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    denoise: float = 1.0
    mode: str = WITHOUT
    granularity: str = BLOCK
    blocks: str = ""
    order: str = MODEL_ORDER
    max_pictures: int = 80
    thumbnail: int = 256

    def __post_init__(self) -> None:
        known = {**_CHOICES, "sampler_name": sampler_names(), "scheduler": scheduler_names()}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                given = str(getattr(self, name))[:60]
                raise ValueError(f"{name}: {given!r} is none; choose one of {', '.join(choices)}")
        bounds = {
            "steps": (1, 10_000),
            "cfg": (0.0, 100.0),
            "denoise": (0.0, 1.0),
            "max_pictures": (3, MOST_PICTURES),
            "thumbnail": (SMALLEST, LARGEST),
        }
        for name, (low, high) in bounds.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected {low} to {high}")
        if not self.denoise:
            raise ValueError("denoise is 0: nothing would be sampled; choose more, up to 1")
        if not math.isfinite(self.strength) or not self.strength:
            raise ValueError(f"strength is {self.strength}: the LoRA would change nothing; choose another than 0")


@dataclass(frozen=True)
class Analysis:
    """``pictures`` (N, height, width, 3): without the LoRA, with all of it, then the others as in the sheet."""

    sheet: Image.Image
    pictures: Tensor
    table: str


@dataclass(frozen=True)
class _Row:
    """One part of the LoRA: its blocks, and what its picture shows."""

    label: str
    blocks: tuple[str, ...]
    layers: int
    share: float
    picture: Tensor
    to_whole: float
    to_base: float


@dataclass(frozen=True)
class _Dialled:
    """A MODEL with the LoRA beside its weights, and what turns each block of it up or down."""

    patcher: Any
    dials: Mapping[str, Dial]
    layers: Mapping[str, int]  # of each block, that the LoRA changes
    applied: Applied

    def turn(self, on: Sequence[str]) -> None:
        for block, dial in self.dials.items():
            dial.factor = 1.0 if block in on else 0.0


def analyse(
    model: Any,
    positive: Any,
    negative: Any,
    latent: Mapping[str, Any],
    vae: Any,
    lora: Loaded,
    options: Options,
    node_id: str | None = None,
) -> Analysis:
    """Raises ValueError naming the option before anything is sampled."""
    dialled = _dialled(model, lora, options.strength)
    blocks = layout_of(model.model).blocks
    parts, notes = _parts(dialled.dials, blocks, options)
    pictures = len(parts) + 2
    if pictures > options.max_pictures:
        raise ValueError(
            f"max_pictures is {options.max_pictures}, but {len(parts)} parts make {pictures} pictures of "
            f"{options.steps} steps each; raise it, choose granularity {GROUP}, or name fewer in blocks"
        )
    shares = shares_of(dialled.patcher, layer_adapters(dialled.applied), lambda _: options.strength)
    cost = f"{pictures} pictures of {options.steps} steps each, {pictures * options.steps} steps in all"
    logging.info("LoRA Loom: analysing %s: %s", lora.name, cost)
    progress = Progress(pictures * options.steps, node_id)
    progress.tell(cost, now=True)
    everything = tuple(dialled.dials)
    labels = {BASE_LABEL: (), WHOLE_LABEL: everything} | {
        f"{options.mode.split()[0]} {_called(part, ids, shares)}": (
            ids if options.mode == ONLY else tuple(block for block in everything if block not in ids)
        )
        for part, ids in parts.items()
    }
    sample, said = _sampler(dialled.patcher, positive, negative, latent, options, progress)
    latents = []
    for number, (label, on) in enumerate(labels.items(), 1):
        progress.tell(f"{number} of {pictures}: {label}\n{cost}", now=True)
        dialled.turn(on)
        latents.append(sample())
    base, whole = (_decoded(vae, samples) for samples in latents[:2])
    rows = []
    for label, ids, samples in zip(list(labels)[2:], parts.values(), latents[2:], strict=True):
        layers = sum(dialled.layers[block] for block in ids)
        own = _decoded(vae, samples)
        picture, to_whole, to_base = own[0].clone(), _difference(own, whole), _difference(own, base)
        rows.append(_Row(label, ids, layers, _share(shares, ids), picture, to_whole, to_base))
        del own
    told = _Numbers(options.mode)
    if options.order == BY_DIFFERENCE:
        rows.sort(key=lambda row: -told.of(row))
    notes += [*said, *_told(dialled.applied), *_frames(whole)]
    return Analysis(
        _sheet(base[0], whole[0], _difference(base, whole), rows, told, options.thumbnail),
        torch.stack([base[0], whole[0], *(row.picture for row in rows)]),
        _table(lora.name, cost, _difference(base, whole), rows, notes),
    )


# -- the parts of the LoRA


def _dialled(model: Any, lora: Loaded, strength: float) -> _Dialled:
    patcher, _, applied = apply_lora(model, None, lora, Strengths.of(strength), BRANCH)
    if applied.fused:
        raise ValueError(
            f"lora: {lora.name} makes {applied.fused[0]} wider, which cannot be taken away between pictures; analyse "
            "another LoRA"
        )
    stack = branching.stack_on(patcher)
    assert stack is not None
    whole, blocks = stack.loras[-1], layout_of(model.model).blocks
    index = BlockIndex(blocks)
    found = {key: index.of(key) for key in whole.adapters}
    places = {key: BASE if block is None else block.id for key, block in found.items()}
    layers = Counter(places.values())
    dials = {block: Dial() for block in (BASE, *(block.id for block in blocks)) if block in layers}
    strengths = {key: replace(own, dial=dials[places[key]]) for key, own in whole.strengths.items()}
    clone = model.clone()
    branching.put(clone, BranchedLoRA(whole.adapters, strengths))
    return _Dialled(clone, dials, layers, applied)


def _parts(
    touched: Mapping[str, Dial], blocks: Sequence[Block], options: Options
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Block or group → ids of the blocks to leave out, or to show alone; and what is not shown."""
    wanted = set(touched)
    notes = []
    if options.blocks.strip():
        try:
            named = resolve(options.blocks, blocks)
        except ValueError as error:
            raise ValueError(f"blocks: {error}") from error
        wanted &= named
        if not wanted:
            raise ValueError(f"blocks: the LoRA changes none of these; it changes {', '.join(touched)}")
        if idle := [block.id for block in blocks if block.id in named - wanted]:
            notes.append(f"not shown, since the LoRA does not change them: {', '.join(idle)}")
        if rest := [block for block in touched if block not in wanted]:
            state = "in every picture but the first" if options.mode == WITHOUT else "in that of the whole LoRA only"
            notes.append(f"blocks that were not named are {state}: {', '.join(rest)}")
    groups = {block.id: block.group for block in blocks}
    parts: dict[str, tuple[str, ...]] = {}
    for block in touched:
        if block in wanted:
            part = groups.get(block, block) if options.granularity == GROUP else block
            parts[part] = (*parts.get(part, ()), block)
    return parts, notes


def _called(part: str, ids: Sequence[str], shares: Shares) -> str:
    if len(ids) == 1 and part == ids[0]:
        return shares.names.get(part, part)
    return f"{part} ({len(ids)})"


def _share(shares: Shares, ids: Sequence[str]) -> float:
    """‖ΔW‖ / ‖W‖ over the layers of some blocks; not a number where none of them could be read."""
    own = [layer for layer in shares.layers if layer.block in ids]
    weight = math.hypot(*(layer.weight for layer in own))
    return math.hypot(*(layer.factor * layer.change for layer in own)) / weight if weight else math.nan


# -- sampling


def _sampler(
    patcher: Any, positive: Any, negative: Any, latent: Mapping[str, Any], options: Options, progress: Progress
) -> tuple[Callable[[], Tensor], list[str]]:
    """A function that samples the one picture with the dials as they are, and notes."""
    samples = latent["samples"]
    if samples.is_nested:
        raise ValueError("latent_image: it holds several latents, say of picture and sound; use one of a picture alone")
    notes = []
    if len(samples) > 1:
        notes.append(f"latent_image: the first of {len(samples)} is used")
    ratios = {name: latent[name] for name in latent if name.startswith("downscale_ratio")}  # newer hosts
    start = comfy.sample.fix_empty_latent_channels(patcher, samples[:1], **ratios)
    index, mask = latent.get("batch_index"), latent.get("noise_mask")
    noise = comfy.sample.prepare_noise(start, options.seed, None if index is None else index[:1])
    previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
    done = shown = 0

    def show(steps: int, preview: Any = None) -> None:
        nonlocal shown
        shown = steps
        progress.bar.update_absolute(steps, preview=preview)

    def step(number: int, x0: Any, *_: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
        show(done + min(number + 1, options.steps), preview)  # some samplers take more steps than they were told

    def sample() -> Tensor:
        nonlocal done
        comfy.model_management.throw_exception_if_processing_interrupted()
        result = comfy.sample.sample(
            patcher,
            noise,
            options.steps,
            options.cfg,
            options.sampler_name,
            options.scheduler,
            positive,
            negative,
            start,
            denoise=options.denoise,
            noise_mask=None if mask is None else mask[:1],
            callback=step,
            disable_pbar=True,
            seed=options.seed,
        )
        done += options.steps
        if shown < done:  # or fewer
            show(done)
        return result

    return sample, notes


def _decoded(vae: Any, samples: Tensor) -> Tensor:
    """(frames, height, width, 3), on the CPU."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    pixels = vae.decode(samples)
    return pixels.reshape(-1, *pixels.shape[-3:])[..., :3].cpu().float().clamp_(0, 1)


def _difference(one: Tensor, other: Tensor) -> float:
    """Frame by frame, which takes little memory."""
    apart = [(own - its).abs_().mean().item() for own, its in zip(one, other, strict=True)]
    return sum(apart) / len(apart)


# -- what is shown


@dataclass(frozen=True)
class _Numbers:
    """Which of a row's numbers tells what its part does."""

    mode: str

    def of(self, row: _Row) -> float:
        return row.to_base if self.mode == ONLY else row.to_whole


def _sheet(
    base: Tensor, whole: Tensor, apart: float, rows: Sequence[_Row], told: _Numbers, side: int
) -> Image.Image:
    reference = (apart, 0.0) if told.mode == WITHOUT else (0.0, apart)
    cells = [
        (BASE_LABEL, to_picture(base), reference[0]),
        (WHOLE_LABEL, to_picture(whole), reference[1]),
        *((row.label, to_picture(row.picture), told.of(row)) for row in rows),
    ]
    return grid(cells, min(_CELLS_ACROSS, math.ceil(math.sqrt(len(cells) * 1.5))), side)


def _table(name: str, cost: str, apart: float, rows: Sequence[_Row], notes: Sequence[str]) -> str:
    header = ("picture", "layers", "to the whole", "to none", "change of weights")
    body = [
        (row.label, str(row.layers), f"{row.to_whole:.5f}", f"{row.to_base:.5f}", _percent(row.share)) for row in rows
    ]
    far, none = f"{apart:.5f}", f"{0:.5f}"
    lines = [header, (BASE_LABEL, "", far, none, ""), (WHOLE_LABEL, "", none, far, ""), *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    table = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    said = "differences are means of the pixels' absolute differences, from 0 to 1"
    return "\n".join([f"{name}: {cost}; {said}", "", *(line.rstrip() for line in table), "", *notes]).rstrip()


def _percent(share: float) -> str:
    return percent(share) if math.isfinite(share) else "unknown"


def _told(applied: Applied) -> list[str]:
    """What of the file is not in the pictures."""
    text = [item for item in applied.unplaced if item.reason == NO_ENCODER]
    rest = [item for item in applied.unplaced if item.reason != NO_ENCODER]
    notes = list(applied.notes)
    if text:
        notes.append(
            f"{len(text)} keys are for text encoders: they act through the prompts, where these are encoded by a CLIP "
            "with the LoRA"
        )
    if rest and applied.file is not None and applied.file.names is not None:
        notes += grouped(rest, applied.file.names, applied.file.architecture, applied.file.evidence)
    return notes


def _frames(frames: Tensor) -> list[str]:
    return [f"the first of {len(frames)} frames is shown; differences are of all of them"] if len(frames) > 1 else []
