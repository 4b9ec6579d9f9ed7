"""A prompt with LoRA tags → MODEL, CLIP, CONDITIONING.

* ``apply_prompt``: finds the LoRAs that the tags name, puts them on MODEL and CLIP, and encodes the rest of the prompt:
  once, or once for every weight that the text encoders get over the run (``scheduled_text``).
* ``prompt_state``: changes when something that a prompt names does.

Names are those of files and runs, found in the way of ``kernels.strengths.lookup``.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.model_management

from ..kernels.sidecars import Facts
from ..kernels.strengths.components import UNET, by_part
from ..kernels.strengths.lookup import find_name
from ..kernels.strengths.schedule import ModelClock, Schedule, fixed
from ..kernels.strengths.tags import Tag, canonical, names_in, parse_prompt
from . import lora_cache, loras, presets
from .applied import log, report
from .apply import ENGINES, HOST, Applied, Strengths, apply_lora
from .clocks import TRAJECTORY, Course
from .embeddings import encoders
from .scheduled_text import Choice, Entries, Weights, at_beginning, combinations, conditioning, install, stepwise

ALL_WORDS = -1
SIDES = {
    "one": "the MODEL is not one of a pair: tags with high or low are left out, and the report says so",
    "high": "the MODEL is the one for high noise of two, as Wan 2.2 has them: tags with low are left out",
    "low": "the MODEL is the one for low noise of two: tags with high are left out",
}
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

    def on_text(self, weights: Mapping[Schedule, float], present: Sequence[str], touched: Sequence[str]) -> Weights:
        """The strength on each encoder that the LoRA changes."""
        whole, parts = _weight(self.strengths.clip, weights), by_part(self.strengths.components, present)
        return tuple(whole * _weight(parts[encoder], weights) for encoder in touched)


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
) -> Prompted:
    """The inputs stay as they are. Raises ValueError that names the tag or the option."""
    for option, given, known in (("engine", engine, ENGINES), ("side", side, SIDES)):
        if given not in known:
            raise ValueError(f"{option}: there is no {str(given)[:60]!r}; choose one of {', '.join(known)}")
    present = list(encoders(clip))
    parsed = parse_prompt(prompt, dialect, present)
    own = [tag for tag in parsed.tags if tag.side in ("", side)]
    sources = loras.sources() if own else []
    uses = [_use(tag, sources, present, engine, course, seed, force_reload) for tag in own]
    left_out = [_left_out(tag, side) for tag in parsed.tags if tag.side not in ("", side)]

    changing = tuple(dict.fromkeys(schedule for use in uses for schedule in use.changing))
    begin = at_beginning(changing, course, model.get_model_object("model_sampling")) if changing else ()
    new_model, new_clip, done = _applied(model, clip, uses, dict(zip(changing, begin, strict=True)), engine)
    _check_clock(course, changing, done)
    text, added = _with_words(parsed.text, uses, trigger_words)
    numbers = _numbers(uses, done, changing, present)
    if len(set(numbers.values())) < 2:
        entries, encoded = _encode(new_clip, text), ""
    else:
        choice = Choice(changing, numbers, course)
        entries, encoded = _encoded_often(model, clip, new_clip, text, uses, choice, begin, engine)
        install(new_model)
    told = [_told(use, applied) for use, applied in zip(uses, done, strict=True)]
    return Prompted(
        new_model,
        new_clip,
        entries,
        text,
        "\n".join([*parsed.notes, *left_out, *told, *added, *filter(None, [encoded])]) or "no LoRA in this prompt",
        " ".join(map(canonical, parsed.tags)),
        ", ".join(_known_words(uses)),
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
) -> _Use:
    try:
        lora = lora_cache.get(find_name(tag.name, sources), force_reload)
        return _Use(tag, lora, _strengths(tag, present, engine, course, seed), lora.facts())
    except ValueError as error:
        raise ValueError(f"<lora:{tag.name[:60]}>: {error}") from error


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
    return list(dict.fromkeys(word for use in uses for word in use.facts.words[:count]))


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
        effect = tuple(use.on_text(weights, present, own) for use, own in zip(uses, touched, strict=True))
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


def _told(use: _Use, applied: Applied) -> str:
    log(use.lora.name, applied)
    text = report(f"{use.shown} is {use.lora.name}", applied, use.strengths, use.facts, None, None)
    if use.changing and not _on_clip(applied):
        text += "\nthe weights on text encoders have no effect, this LoRA holds nothing for those of this CLIP"
    return text


def _on_clip(applied: Applied) -> tuple[str, ...]:
    return applied.clip_fused + applied.clip_branched


def _left_out(tag: Tag, side: str) -> str:
    here = "is for one of two MODELs" if side == "one" else f"is not for the MODEL for {side} noise"
    cure = f"; set side to {tag.side} where that MODEL is" if side == "one" else ""
    return f"<lora:{tag.name[:60]}> ({tag.side}) {here}, and was left out{cure}"


# -- has anything changed?


def prompt_state(prompt: Any) -> str:
    """Changes with the LoRAs that a prompt names, what lies beside them, and presets of block weights. Never raises."""
    if not isinstance(prompt, str):
        return ""
    names = names_in(prompt)
    if not names:
        return ""
    digest = hashlib.sha256()
    try:
        sources = loras.sources()
    except OSError:  # a run's folder that vanishes just now
        return ""
    for name in names:
        try:
            state = _state(find_name(name, sources))
        except (ValueError, OSError):
            state = "none"
        digest.update(f"{name}\0{state}\0".encode(errors="replace"))
    try:
        digest.update(repr(presets.block_presets()).encode(errors="replace"))
    except ValueError:
        pass  # the file is damaged, which the node tells if it needs it
    return digest.hexdigest()


def _state(source: str) -> str:
    """Of the file and all that is called like it, its managers' pages among them."""
    folder, name = os.path.split(loras.path_of(source))
    stem = name.removesuffix(loras.SUFFIX) + "."
    with os.scandir(folder) as entries:
        found = [(one.name, one.stat().st_mtime_ns, one.stat().st_size) for one in entries if one.name.startswith(stem)]
    return f"{source} {sorted(found)}"
