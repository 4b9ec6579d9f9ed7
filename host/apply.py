"""Put a LoRA on a MODEL and a CLIP.

* ``apply_lora``: (MODEL, CLIP, what happened). Two engines of our own, which agree:
  - fuse: weights are patched through the host's ModelPatcher, at no cost per step (``fusing``);
  - branch: the layers get the LoRA's part beside them while they are called (``branching``): for strengths that change
    over a run, for quantised weights, which rounding would spoil, and for what was trained a moment ago.
  "auto" chooses for every layer, "host" is the host's own loader.
* ``Strengths``: how strong, by component, block and step.
* ``Applied``: what happened, in numbers and sentences.

Every spelling is read that ``kernels.reading`` knows; what found no place is told, with the reason. Embeddings that the
file brings along become words of the CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.lora
import comfy.lora_convert
import torch
from torch import Tensor

from ..kernels.adapter import Adapter
from ..kernels.blocks import MODEL_PREFIX
from ..kernels.branches import can_branch, needs_weight
from ..kernels.embeddings import by_encoder
from ..kernels.reading import NO_ENCODER, SHAPE, UNKNOWN, LoRAFile, Unplaced, read_lora
from ..kernels.strengths.blocks import BlockWeights, parse_blocks
from ..kernels.strengths.components import UNET, by_part, without_effect
from ..kernels.strengths.schedule import Schedule, fixed
from ..kernels.unplaced import both_bases
from . import branching, fusing
from .branching import BranchedLoRA, Strength
from .clocks import Course
from .embeddings import encoders, with_words
from .presets import block_presets
from .targets import Parameter, layer_of, layout_of, names_of, parameters_of

AUTO, FUSE, BRANCH, HOST = "auto", "fuse", "branch", "host"
ENGINES = {
    AUTO: "fuses what stays the same on ordinary weights; branches what changes over the run, lies on quantised "
    "weights, or was trained a moment ago",
    FUSE: "patches the weights: no cost per step; refuses strengths that change over the run",
    BRANCH: "keeps the weights as they are: a few per cent per step, and strengths cost nothing to change",
    HOST: "the loader of ComfyUI itself, to compare: no blocks, components or steps",
}
_ONE = fixed(1.0)
_NOT_LOADED = "lora key not loaded"
# parts that newer hosts call while they prepare the text, in models that have this method
_TEXT_METHOD = "preprocess_text_embeds"
_TEXT_PARTS = (
    *("llm_adapter", "token_refiner", "condition_proj"),
    *("video_embeddings_connector", "audio_embeddings_connector"),
)


@dataclass(frozen=True)
class Strengths:
    """``model`` and ``clip`` times those of ``components`` ("unet", "te", "te1", "clip_l" …); on the MODEL also times
    ``blocks`` (text, see ``kernels.strengths.blocks``) and ``steps``."""

    model: Schedule = field(default_factory=lambda: fixed(1.0))
    clip: Schedule = field(default_factory=lambda: fixed(1.0))
    components: Mapping[str, Schedule] = field(default_factory=dict)
    blocks: str = ""
    steps: Schedule = field(default_factory=lambda: fixed(1.0))
    interpolation: str = "hold"  # of what ``blocks`` says
    letters: Mapping[str, float] = field(default_factory=dict)  # in vectors, and the seed of those that are drawn
    seed: int = 0
    course: Course = field(default_factory=Course)

    @classmethod
    def of(cls, model: float, clip: float = 1.0) -> Strengths:
        return cls(fixed(model), fixed(clip))


@dataclass(frozen=True)
class Applied:
    """What happened, by parameters of MODEL and CLIP; ``fused`` and ``branched`` act at a strength other than 0.

    ``why``: engine → what made it necessary, in words; ``adapters`` and ``strengths`` of all that fit the MODEL,
    ``clip_strengths`` of all that fit the CLIP.
    """

    fused: tuple[str, ...] = ()
    branched: tuple[str, ...] = ()
    clip_fused: tuple[str, ...] = ()
    clip_branched: tuple[str, ...] = ()
    unplaced: tuple[Unplaced, ...] = ()
    words: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    why: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    strengths: Mapping[str, Strength] = field(default_factory=dict)
    clip_strengths: Mapping[str, float] = field(default_factory=dict)
    file: LoRAFile | None = None

    def noting(self, notes: Sequence[str]) -> Applied:
        return replace(self, notes=(*self.notes, *notes))

    @property
    def model_weights(self) -> int:
        return len(self.fused) + len(self.branched)

    @property
    def clip_weights(self) -> int:
        return len(self.clip_fused) + len(self.clip_branched)


def apply_lora(
    model: Any,
    clip: Any | None,
    lora: Mapping[str, Tensor] | Any,
    strengths: Strengths | None = None,
    engine: str = AUTO,
) -> tuple[Any, Any | None, Applied]:
    """(MODEL, CLIP, what happened); the inputs stay as they are. ``lora``: tensors, or a LoRA of ``lora_cache``.

    Raises ValueError when nothing of the LoRA fits, and for options that cannot act.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine: there is no {engine!r}; choose one of {', '.join(ENGINES)}")
    strengths = strengths or Strengths()
    names = names_of(model, clip)
    file = lora.file(names) if hasattr(lora, "file") else read_lora(lora, names)
    fresh = bool(getattr(lora, "trained", False))
    if engine == HOST:
        result = _by_host(model, clip, getattr(lora, "tensors", lora), file, strengths)
    else:
        result = _by_us(model, clip, file, strengths, engine, fresh)
    new_model, new_clip, applied = result
    fits = applied.adapters or applied.clip_strengths or applied.words or applied.model_weights or applied.clip_weights
    if not (fits or (clip is not None and file.embeddings and not strengths.clip.constant)):
        raise ValueError(_nothing_fits(file, applied.unplaced, clip))
    return new_model, new_clip, applied


def _by_us(
    model: Any, clip: Any | None, file: LoRAFile, strengths: Strengths, engine: str, fresh: bool
) -> tuple[Any, Any | None, Applied]:
    present = list(encoders(clip)) if clip is not None else []
    blocks = _block_weights(model, strengths)
    parts = by_part(strengths.components, present, blocks.components)
    notes = [*file.notes, *blocks.notes, *without_effect(strengths.components, present)]
    tree = parameters_of(model.model)
    text = {} if clip is None else parameters_of(clip.cond_stage_model)
    unplaced = list(file.unplaced)
    on_model: dict[str, Adapter] = {}
    on_clip: dict[str, Adapter] = {}
    for path, adapter in file.adapters.items():
        own = text if _parameter(path, text) else tree
        keys, lost = _places(path, adapter, own)
        (on_clip if own is text else on_model).update(dict.fromkeys(keys, adapter))
        unplaced += lost
    on_model_at = _strengths_on_model(on_model, blocks, parts, strengths)
    if blocks.weights and on_model and all(blocks.of(layer_of(key)) == _ONE for key in on_model):
        notes.append("blocks: no effect, this LoRA is on none of the layers that it names")
    new_model, done, why = _on_model(model, on_model, on_model_at, engine, fresh)
    new_clip = clip
    on_clip_done: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    on_clip_at: dict[str, float] = {}
    words: tuple[str, ...] = ()
    if clip is not None:
        on_clip_at = _strengths_on_clip(on_clip, parts, strengths.clip)
        if file.embeddings and strengths.clip.constant == 0:
            new_clip = clip.clone()
            notes.append(f"the strength on the CLIP is 0, so {', '.join(file.embeddings)} is no word of it")
        else:
            new_clip, words, unfit = _with_words(clip, file)
            unplaced += unfit
        on_clip_done = _on_clip(new_clip, on_clip, on_clip_at)
    else:
        unplaced += [
            Unplaced(f"{word}.{encoder}", NO_ENCODER, "is an embedding, and there is no CLIP connected")
            for word, vectors in file.embeddings.items()
            for encoder in vectors
        ]
    return (
        new_model,
        new_clip,
        Applied(
            *done, *on_clip_done, tuple(unplaced), words, tuple(notes), why, on_model, on_model_at, on_clip_at, file
        ),
    )


# -- what acts where


def _block_weights(model: Any, strengths: Strengths) -> BlockWeights:
    if not strengths.blocks.strip():
        return BlockWeights()
    return parse_blocks(
        strengths.blocks,
        layout_of(model.model),
        strengths.interpolation,
        strengths.seed,
        letters=strengths.letters,
        presets=block_presets(),
    )


def _parameter(path: str, parameters: Mapping[str, Parameter]) -> str | None:
    """The parameter that a canonical path means."""
    return next((key for key in (f"{path}.weight", path) if key in parameters), None)


def _places(path: str, adapter: Adapter, own: Mapping[str, Parameter]) -> tuple[list[str], list[Unplaced]]:
    """The parameters that an adapter changes: the weight, and the bias where it changes that too."""
    key = _parameter(path, own)
    if key is None:
        return [], [Unplaced(path, UNKNOWN, "is no parameter of the model")]
    if type(adapter).merged_bias is Adapter.merged_bias or not key.endswith(".weight"):
        return [key], []
    bias = f"{path}.bias"
    if bias not in own:
        moved = adapter.merged_bias(None)
        return [key], [] if moved is None else [Unplaced(bias, SHAPE, "is for a layer that has no bias")]
    ones = torch.ones(own[bias].shape)
    moved = adapter.merged_bias(ones)
    return [key] if moved is None or torch.equal(moved, ones) else [key, bias], []


def _strengths_on_model(
    adapters: Mapping[str, Adapter], blocks: BlockWeights, parts: Mapping[str, Schedule], strengths: Strengths
) -> dict[str, Strength]:
    common = (strengths.model, parts.get(UNET, fixed(1.0)), strengths.steps)
    known: dict[Schedule, Strength] = {}  # most layers have the same
    found = {}
    for key in adapters:
        own = blocks.of(layer_of(key))
        if own not in known:
            known[own] = Strength.of((*common, own), strengths.course)
        found[key] = known[own]
    return found


def _on_model(
    model: Any, adapters: Mapping[str, Adapter], strengths: Mapping[str, Strength], engine: str, fresh: bool
) -> tuple[Any, tuple[tuple[str, ...], tuple[str, ...]], dict[str, str]]:
    clone, parameters = model.clone(), parameters_of(model.model)
    network = getattr(model.model, MODEL_PREFIX[:-1], None)
    once = tuple(f"{MODEL_PREFIX}{part}." for part in _TEXT_PARTS) if hasattr(network, _TEXT_METHOD) else ()
    stack = branching.stack_on(clone)
    beside = {} if stack is None else stack.by_parameter()
    branched: dict[str, Adapter] = {}
    fused: dict[str, list[tuple[Adapter, float]]] = {}
    why: dict[str, dict[str, None]] = {}
    for key, adapter in adapters.items():
        strength, weight = strengths[key], f"{key.removesuffix('.bias')}.weight"
        if not strength.constant:
            continue
        if key.endswith(".bias") and (weight in branched or weight in fused):  # goes where the weight goes
            chosen = BRANCH if weight in branched else FUSE
        elif key.startswith(once):
            chosen = FUSE
            why.setdefault(FUSE, {})["layers that run once, before the steps, at the first weight"] = None
        else:
            chosen, reason = _engine(parameters[key], key, adapter, strength, engine, fresh)
            others = [other for other, _ in beside.get(key, ())]
            others += [other for other, *_ in fusing.parts_on(clone, key)]
            chosen, reason = _together(key, adapter, strength, others, beside, chosen, reason)
            why.setdefault(chosen, {})[reason] = None
        if chosen == BRANCH:
            branched[key] = adapter
        else:
            fused[key] = [(adapter, strength.begin)]
    _keep_together(clone, branched)
    if fused:
        fusing.add_fused(clone, fused)
        fusing.install(clone)
    if branched:
        branching.put(clone, BranchedLoRA(branched, {key: strengths[key] for key in branched}))
    reasons = {chosen: ", ".join(found) for chosen, found in why.items()}
    return clone, (tuple(fused), tuple(branched)), reasons


def _engine(
    place: Parameter, key: str, adapter: Adapter, strength: Strength, engine: str, fresh: bool
) -> tuple[str, str]:
    """(fuse or branch, why)."""
    if strength.schedules and engine == FUSE:
        raise ValueError("engine: fuse cannot change strengths over the run; choose auto or branch")
    if place.product and not can_branch(adapter):
        if strength.schedules:
            raise ValueError(f"steps: this LoRA makes {key} wider, which cannot change over the run; leave it open")
        return FUSE, "layers that become wider can only be fused"
    if place.held_beside:
        return BRANCH, "the host patches no parameters of modules that hold others"
    if engine in (FUSE, BRANCH):
        return engine, "chosen"
    if strength.schedules:
        return BRANCH, "strengths change over the run"
    if fresh:
        return BRANCH, "trained a moment ago"
    if place.product and not place.ordinary:
        return BRANCH, f"weights in {place.kept}, which a patch would be rounded to"
    return FUSE, "constant on ordinary weights"


def _together(
    key: str,
    adapter: Adapter,
    strength: Strength,
    others: Sequence[Adapter],
    beside: Mapping[str, Any],
    chosen: str,
    reason: str,
) -> tuple[str, str]:
    """Where another of our LoRAs is on the same weight: all of them see it as it is without any, so what depends on
    the weight must not find another fused into it."""
    wider = [other for other in (adapter, *others) if not can_branch(other)]
    if wider and others:
        if strength.schedules or key in beside:
            raise ValueError(
                f"engine: a control LoRA makes {key} wider, and another LoRA on it acts beside the weight; choose fuse "
                "and constant strengths for both"
            )
        return FUSE, "beside a LoRA that makes the layer wider"
    if chosen == FUSE and any(needs_weight(other) for other, _ in beside.get(key, ())):
        return BRANCH, "beside a LoRA that depends on the weight"
    return chosen, reason


def _keep_together(clone: Any, branched: Mapping[str, Adapter]) -> None:
    """What is fused of earlier LoRAs where ours depends on the weight and acts beside it goes beside it too, with what
    it does to the bias."""
    earlier: list[dict[str, tuple[Adapter, float]]] = []  # one behind the other on the same parameter
    for key, adapter in branched.items():
        if key.endswith(".bias") or not needs_weight(adapter):
            continue
        taken = {key: fusing.take_off(clone, key)}
        if taken[key] and key.endswith(".weight"):
            bias = f"{layer_of(key)}.bias"
            taken[bias] = fusing.take_off(clone, bias)
        for place, parts in taken.items():
            for number, (other, strength, *_) in enumerate(parts):
                if number == len(earlier):
                    earlier.append({})
                earlier[number][place] = other, strength
    for found in earlier:
        adapters = {key: other for key, (other, _) in found.items()}
        strengths = {key: Strength(strength) for key, (_, strength) in found.items()}
        branching.put(clone, BranchedLoRA(adapters, strengths))


def _strengths_on_clip(
    adapters: Mapping[str, Adapter], parts: Mapping[str, Schedule], strength: Schedule
) -> dict[str, float]:
    found = {}
    for key in adapters:
        whole, part = strength.constant, parts.get(key.partition(".")[0], fixed(1.0)).constant
        if whole is None or part is None:
            raise ValueError(
                "components: a text encoder's strength cannot change over the run here, since a CLIP encodes before "
                "it; use LoRA from Prompt (LoomPromptLoRA), which hands out the conditioning as well"
            )
        found[key] = whole * part
    return found


def _on_clip(
    clip: Any, adapters: Mapping[str, Adapter], strengths: Mapping[str, float]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Patch ``clip``, a clone that is the caller's: (fused, merged on use)."""
    fused: dict[str, list[tuple[Adapter, float]]] = {}
    on_use: dict[str, tuple[Adapter, float]] = {}
    parameters = parameters_of(clip.cond_stage_model)
    for key, adapter in adapters.items():
        if not strengths[key]:
            continue
        if parameters[key].ordinary or not parameters[key].cast:
            fused[key] = [(adapter, strengths[key])]
        else:
            on_use[key] = adapter, strengths[key]
    if fused:
        fusing.add_fused(clip.patcher, fused)
    for key, (adapter, factor) in on_use.items():
        clip.patcher.add_weight_wrapper(key, fusing.OnUse(key, adapter, factor))
    return tuple(fused), tuple(on_use)


def _with_words(clip: Any, file: LoRAFile) -> tuple[Any, tuple[str, ...], list[Unplaced]]:
    """(a clone of ``clip`` that knows the file's embeddings, their words, what of them fits no encoder)."""
    found = by_encoder(file.embeddings, list(encoders(clip)))
    clone, unfit = with_words(clip, found)
    words = tuple(word for word, vectors in found.items() if any(f"{word}.{name}" not in unfit for name in vectors))
    return clone, words, [Unplaced(key, SHAPE, "is an embedding, of a width that no encoder here has") for key in unfit]


def _nothing_fits(file: LoRAFile, unplaced: Sequence[Unplaced], clip: Any | None) -> str:
    if clip is None and file.embeddings:
        return "nothing of this LoRA fits the MODEL: connect the CLIP, it holds embeddings"
    if not unplaced:
        return "this LoRA is empty; get or save the file again"
    bases = both_bases(file.architecture, file.evidence, file.names) if file.names is not None else ""
    first = unplaced[0]
    why = bases or f"for example {first.key[:100]}: {first.reason}, {first.detail}"
    return (
        f"none of the {len(unplaced)} keys of this LoRA fits the MODEL ({why}); load the base it was made for, or a "
        "LoRA made for this one"
    )


# -- the host's own loader


def _by_host(
    model: Any, clip: Any | None, lora: Mapping[str, Tensor], file: LoRAFile, strengths: Strengths
) -> tuple[Any, Any | None, Applied]:
    plain = Strengths(strengths.model, strengths.clip)
    if strengths != plain or strengths.model.constant is None or strengths.clip.constant is None:
        raise ValueError(
            "engine: host knows one strength for the MODEL and one for the CLIP only; choose auto, or leave "
            "components, blocks and steps empty"
        )
    names: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    with _unplaced_keys() as lost:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names)
    new_model, new_clip = model.clone(), clip
    words: tuple[str, ...] = ()
    on_model = set(new_model.add_patches(patches, strengths.model.constant))
    on_clip: set[Any] = set()
    unplaced = [Unplaced(key, UNKNOWN, "is not known to the host's loader") for key in lost]
    if clip is not None:
        new_clip, words, unfit = _with_words(clip, file)
        unplaced += unfit
        on_clip = set(new_clip.add_patches(patches, strengths.clip.constant))
    keys = [tuple(key if isinstance(key, str) else key[0] for key in found) for found in (on_model, on_clip)]
    applied = Applied(
        *(keys[0], (), keys[1], (), tuple(unplaced), words),
        why={HOST: "chosen"},
        strengths=dict.fromkeys(keys[0], Strength(strengths.model.constant)),
        clip_strengths=dict.fromkeys(keys[1], strengths.clip.constant),
        file=file,
    )
    return new_model, new_clip, applied


@contextmanager
def _unplaced_keys() -> Iterator[list[str]]:
    """The keys that the host says it could not load; it says so in its log only."""
    found: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(_NOT_LOADED):
            return True
        found.append(text.split(": ", 1)[-1])
        return False

    logger = logging.getLogger()
    logger.addFilter(take)
    try:
        yield found
    finally:
        logger.removeFilter(take)
