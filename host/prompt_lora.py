"""A prompt with LoRA tags → MODEL, CLIP, CONDITIONING.

* ``apply_prompt``: finds the LoRAs that the tags name and that are for this MODEL of two, puts them on MODEL and CLIP,
  and encodes the rest of the prompt: once, or once for every weight that the text encoders get over the run
  (``scheduled_text``).

Names are those of files and runs, found in the way of ``kernels.strengths.lookup``.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management
from PIL import Image

from ..kernels.sidecars import Facts
from ..kernels.sides import OTHER
from ..kernels.strengths.components import UNET, by_part
from ..kernels.strengths.lookup import find_name
from ..kernels.strengths.schedule import ModelClock, Schedule, fixed
from ..kernels.strengths.tags import Tag, canonical, parse_prompt
from . import lora_cache, loras, pairs
from .applied import account, log
from .apply import ENGINES, HOST, Applied, Strengths, apply_lora
from .clocks import TRAJECTORY, Course
from .embeddings import encoders
from .scheduled_text import Choice, Entries, Weights, at_beginning, combinations, conditioning, install, stepwise

ALL_WORDS = -1
SIDES = {
    "one": "the MODEL is not one of a pair: tags with high or low are left out, and the report says so",
    "high": "the MODEL is the one for high noise of two, as Wan 2.2 has them: tags with low are left out, and files "
    "whose keys, metadata or names say low noise, where the tag says nothing",
    "low": "the MODEL is the one for low noise of two: what is for high noise is left out",
}
_NOBODY = "the LoRA holds nothing for"
_BRACKET = re.compile(r"\\.|[()]")
_PLACE = re.compile(r"(?<![A-Za-z0-9_])_tags_(?![A-Za-z0-9_])")
_EMPTY_PLACE = re.compile(_PLACE.pattern + r"[ \t]*,?[ \t]*")
_OFF, _FULL = fixed(0.0), fixed(1.0)


@dataclass(frozen=True)
class Prompted:
    """``text`` is what was encoded; ``tags`` are all of the prompt, in our own spelling."""

    model: Any
    clip: Any
    conditioning: Entries
    text: str
    report: str
    tags: str
    words: str
    pictures: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class _Use:
    """A tag with the LoRA that it means. What changes over the run on text encoders is held from point to point."""

    tag: Tag
    lora: lora_cache.Loaded
    strengths: Strengths
    facts: Facts

    @property
    def shown(self) -> str:
        return f"<lora:{self.tag.name[:60]}>"

    @property
    def changing(self) -> list[Schedule]:
        """Of what is for text encoders."""
        every = (self.strengths.clip, *self.strengths.components.values())
        return [schedule for schedule in every if schedule.constant is None]

    def at(self, weights: Mapping[Schedule, float]) -> Strengths:
        """With these weights in place of what changes on text encoders."""
        components = {name: fixed(_weight(one, weights)) for name, one in self.strengths.components.items()}
        return replace(self.strengths, clip=fixed(_weight(self.strengths.clip, weights)), components=components)

    @property
    def acts(self) -> bool:
        """Whether anything of it is at a strength other than 0 at some time."""
        own, off = self.strengths, fixed(0.0)
        return own.clip != off or (off not in (own.model, own.steps) and own.components.get(UNET) != off)

    def on_text(
        self, weights: Mapping[Schedule, float], present: Sequence[str], touched: Sequence[str], words: bool
    ) -> Weights:
        """The strength on each encoder that the LoRA changes, and whether its own ``words`` are known."""
        whole, parts = _weight(self.strengths.clip, weights), by_part(self.strengths.components, present)
        return (*(whole * _weight(parts[encoder], weights) for encoder in touched), float(words and whole != 0))


def apply_prompt(
    model: Any,
    clip: Any,
    prompt: str,
    dialect: str,
    engine: str,
    course: Course,
    trigger_words: int = 0,
    seed: int = 0,
    force_reload: bool = False,
    side: str = "one",
    pictured: bool = False,
) -> Prompted:
    """The inputs stay as they are. Raises ValueError that names the tag or the option."""
    for option, given, known in (("engine", engine, ENGINES), ("side", side, SIDES)):
        if given not in known:
            raise ValueError(f"{option}: there is no {str(given)[:60]!r}; choose one of {', '.join(known)}")
    present = list(encoders(clip))
    parsed = parse_prompt(prompt, dialect, present)
    sources = loras.sources() if parsed.tags else []
    uses: list[_Use] = []
    notes = list(parsed.notes)
    for tag in parsed.tags:
        if tag.side not in ("", side):
            notes.append(_left_out(tag, side))
        elif use := _use(tag, sources, present, engine, course, seed, force_reload, side, notes):
            uses.append(use)

    changing = tuple(dict.fromkeys(schedule for use in uses for schedule in use.changing))
    begin = at_beginning(changing, course, model.get_model_object("model_sampling")) if changing else ()
    new_model, new_clip, done = _applied(model, clip, uses, dict(zip(changing, begin, strict=True)), engine)
    install(new_model := new_model.clone() if new_model is model else new_model)
    _check_clock(course, changing, done)
    changes = changing or any(strength.schedules for applied in done for strength in applied.strengths.values())
    notes += course.without_effect(bool(changes))
    text, added = _with_words(parsed.text, uses, trigger_words)
    numbers = _numbers(uses, done, changing, present)
    if len(set(numbers.values())) < 2:
        entries, encoded = _encode(new_clip, text), ""
    else:
        choice = Choice(changing, numbers, course)
        entries, encoded = _encoded_often(model, clip, new_clip, text, uses, choice, begin, engine)
    accounts = [_account(use, applied, model, pictured) for use, applied in zip(uses, done, strict=True)]
    told = [text for text, _ in accounts]
    return Prompted(
        new_model,
        new_clip,
        entries,
        text,
        "\n".join([*notes, *told, *added, *filter(None, [encoded])]) or "no LoRA in this prompt",
        " ".join(map(canonical, parsed.tags)),
        ", ".join(_known_words(uses)),
        tuple(image for _, image in accounts if image is not None),
    )


# -- from a tag to a LoRA and its strengths


def _use(
    tag: Tag,
    sources: Sequence[str],
    present: Sequence[str],
    engine: str,
    course: Course,
    seed: int,
    force_reload: bool,
    side: str,
    notes: list[str],
) -> _Use | None:
    """None for one that is not for this MODEL of two, which ``notes`` then tell."""
    try:
        lora = lora_cache.get(find_name(tag.name, sources), force_reload)
        part = _for_side(tag, lora, side, sources, notes)
        if part is None:
            return None
        return _Use(tag, part, _strengths(tag, present, engine, course, seed), lora.facts())
    except ValueError as error:
        raise ValueError(f"<lora:{tag.name[:60]}>: {error}") from error


def _for_side(
    tag: Tag, lora: lora_cache.Loaded, side: str, sources: Sequence[str], notes: list[str]
) -> lora_cache.Loaded | None:
    """What of it is for this MODEL: where the tag does not say so, as its keys, its metadata or its name do."""
    told: list[str] = []
    parts = pairs.parts_of(lora, sources, told)
    shown = f"<lora:{tag.name[:60]}> is {lora.name}"
    sides = {said.side: part for part, said in parts}
    seems = " and ".join(f"{pairs.CALLED[said.side]} ({said.evidence})" for _, said in parts if said.side)
    if side not in OTHER:
        if seems:
            notes.append(f"{shown}, made for {seems}; set side if this MODEL is one of two")
        return lora
    if side in sides or "" in sides:
        notes += told
        return sides.get(side, lora)
    if parts[0][1].evidence == pairs.BY_KEYS and tag.side:
        raise ValueError(f"{tag.side}: {lora.name} is for {seems} only; leave {tag.side} out")
    if tag.side:
        notes.append(f"{shown}, which seems made for {seems}; it is here because the tag says {tag.side}")
        return lora
    notes += told
    notes.append(f"{shown}, for {seems}, and was left out: this MODEL is for {side} noise (:{side} puts it here)")
    return None


def _strengths(tag: Tag, present: Sequence[str], engine: str, course: Course, seed: int) -> Strengths:
    model, clip, components, blocks, steps = tag.model, tag.clip, dict(tag.components), tag.blocks, tag.steps
    if tag.module == UNET:
        clip, components = _OFF, {}
    elif tag.module:
        model, blocks, steps = _OFF, "", _FULL
        switched = by_part({tag.module: _OFF}, present, name="module")
        if any(switched[encoder] != _OFF for encoder in present):
            parts = by_part(components, present)
            components = {encoder: parts[encoder] if switched[encoder] == _OFF else _OFF for encoder in present}
    if all(strength == _OFF for part, strength in by_part(components, present).items() if part != UNET):
        clip = _OFF
    clip = stepwise(clip, "te")
    components = {name: stepwise(schedule, name) for name, schedule in components.items()}
    if engine == HOST:  # which knows nothing that the rest could count for
        return Strengths(model, clip, components, blocks, steps)
    return Strengths(model, clip, components, blocks, steps, seed=seed, course=course)


def _applied(
    model: Any, clip: Any, uses: Sequence[_Use], weights: Mapping[Schedule, float], engine: str
) -> tuple[Any, Any, list[Applied]]:
    done = []
    for use in uses:
        try:
            model, clip, applied = apply_lora(model, clip, use.lora, use.at(weights), engine)
        except ValueError as error:
            raise ValueError(f"{use.shown}: {error}") from error
        done.append(applied)
    return model, clip, done


def _check_clock(course: Course, changing: Sequence[Schedule], done: Sequence[Applied]) -> None:
    """Raises ValueError where steps are to be counted that nobody knows, rather than in the midst of a run."""
    if course.clock == TRAJECTORY and not course.sigmas:
        strengths = (strength for applied in done for strength in set(applied.strengths.values()))
        for schedule in (*changing, *(schedule for strength in strengths for schedule in strength.schedules)):
            try:
                schedule.at(ModelClock(lambda _: 0.0), 0.0)
            except ValueError as error:
                raise ValueError(f"clock: {error}") from error


def _weight(schedule: Schedule, weights: Mapping[Schedule, float]) -> float:
    constant = schedule.constant
    return weights[schedule] if constant is None else constant


# -- the text


def _with_words(text: str, uses: Sequence[_Use], count: int) -> tuple[str, list[str]]:
    """The prompt with trigger words where it says ``_tags_``, or behind it, and notes."""
    place = bool(_PLACE.search(text))
    if not place and not count:
        return text, []
    count = count or ALL_WORDS  # whoever writes the placeholder wants them
    words = _known_words(uses, None if count < 0 else count)
    words = [_safe(word) for word in words]
    words = [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)]
    joined = ", ".join(words)
    if not words:
        lacking = "the LoRAs have none that the prompt lacks" if uses else "there is no LoRA in the prompt"
        return (_EMPTY_PLACE.sub("", text).strip() if place else text), [f"trigger words: none added, {lacking}"]
    added = [f"trigger words added: {joined}"]
    if place:
        return _PLACE.sub(lambda _: joined, text), added
    return ", ".join(filter(None, (text.rstrip(" ,"), joined))), added


def _known_words(uses: Sequence[_Use], count: int | None = None) -> list[str]:
    return list(dict.fromkeys(word for use in uses if use.acts for word in use.facts.words[:count]))


def _safe(word: str) -> str:
    """A word from a file as part of a prompt: brackets that do not close must not hold what stands around it."""
    depth = deepest = 0
    for mark in _BRACKET.findall(word):
        depth += {"(": 1, ")": -1}.get(mark, 0)
        deepest = min(deepest, depth)
    if depth or deepest:
        word = _BRACKET.sub(lambda mark: mark[0] if len(mark[0]) > 1 else "\\" + mark[0], word)
    loose = len(word) - len(word.rstrip("\\"))
    return word[:-1] if loose % 2 else word  # else it would escape what follows


def _numbers(
    uses: Sequence[_Use], done: Sequence[Applied], changing: tuple[Schedule, ...], present: Sequence[str]
) -> dict[Weights, int]:
    """What changes on text encoders → the number of the encoding; the same where the text comes out the same."""
    touched = [
        [encoder for encoder in present if any(key.startswith(f"{encoder}.") for key in _on_clip(applied))]
        for applied in done
    ]
    effects: dict[tuple[Weights, ...], int] = {}
    numbers = {}
    for values in combinations(changing, "te"):
        weights = dict(zip(changing, values, strict=True))
        effect = tuple(
            use.on_text(weights, present, own, bool(applied.file and applied.file.embeddings))
            for use, own, applied in zip(uses, touched, done, strict=True)
        )
        numbers[values] = effects.setdefault(effect, len(effects))
    return numbers


def _encoded_often(
    model: Any,
    clip: Any,
    new_clip: Any,
    text: str,
    uses: Sequence[_Use],
    choice: Choice,
    begin: Weights,
    engine: str,
) -> tuple[Entries, str]:
    """Every encoding in one CONDITIONING; that of the beginning comes last, so that its weights stay loaded."""
    started, first = time.perf_counter(), choice.numbers[begin]
    text_only = [replace(use, strengths=replace(use.strengths, model=_OFF, steps=_FULL)) for use in uses]
    encodings: dict[int, Entries] = {}
    for values, number in choice.numbers.items():
        if number != first and number not in encodings:
            comfy.model_management.throw_exception_if_processing_interrupted()
            _, variant, _ = _applied(model, clip, text_only, dict(zip(choice.schedules, values, strict=True)), engine)
            encodings[number] = _encode(variant, text)
    encodings[first] = _encode(new_clip, text)
    took = time.perf_counter() - started
    told = (
        f"the prompt was encoded {len(encodings)} times ({took:.2f} s), once for each weight on the text encoders; the "
        "sampler's real step chooses, on the MODEL that leaves this node"
    )
    return conditioning(encodings, choice, first), told


def _encode(clip: Any, text: str) -> Entries:
    """As the host's own node does it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


# -- what is told


def _account(use: _Use, applied: Applied, model: Any, pictured: bool) -> tuple[str, Image.Image | None]:
    log(use.lora.name, applied)
    name, title = f"{use.shown} is {use.lora.name}", use.lora.name
    text, image = account(name, applied, use.facts, model, use.strengths, pictured, title)
    return "\n".join([text, *_idle(use, applied)]), image


def _idle(use: _Use, applied: Applied) -> list[str]:
    """What the tag asks for in vain, in sentences."""
    tag, notes = use.tag, []
    if not _on_clip(applied) and not applied.words:
        asked = [tag.clip, *(strength for name, strength in tag.components.items() if name != UNET)]
        if tag.module not in ("", UNET):
            notes.append(f"module: {tag.module} leaves nothing of it, {_NOBODY} the text encoders of this CLIP")
        elif any(strength not in (_OFF, _FULL, tag.model) for strength in asked):
            notes.append(f"the weights on text encoders have no effect, {_NOBODY} those of this CLIP")
    if not (applied.strengths or applied.model_weights):
        asked_of = {"unet": tag.model not in (_OFF, _FULL, tag.clip), "blocks": tag.blocks, "steps": tag.steps != _FULL}
        if tag.module == UNET:
            notes.append(f"module: {UNET} leaves nothing of it, {_NOBODY} the MODEL")
        elif idle := [name for name, asked in asked_of.items() if asked]:
            notes.append(f"{' and '.join(idle)}: no effect, {_NOBODY} the MODEL")
    return notes


def _on_clip(applied: Applied) -> dict[str, None]:
    """The weights of the CLIP that the LoRA is for, at whatever strength."""
    return dict.fromkeys((*applied.clip_fused, *applied.clip_branched, *applied.clip_strengths))


def _left_out(tag: Tag, side: str) -> str:
    here = "is for one of two MODELs" if side == "one" else f"is not for the MODEL for {side} noise"
    cure = f"; set side to {tag.side} where that MODEL is" if side == "one" else ""
    return f"<lora:{tag.name[:60]}> ({tag.side}) {here}, and was left out{cure}"
