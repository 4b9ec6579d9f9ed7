"""LoRAs in a prompt: ``<lora:name:0.7>`` and everything that people write between the colons (``dialects.TABLE``).

* ``parse_prompt``: a prompt → ``ParsedPrompt``: the text without tags, the tags, and notes on what has no effect
* ``Tag``: what one of them says, as schedules by part of the model and text for ``blocks``
* ``names_in``: the names of LoRAs in any text, whatever else its tags say
* ``canonical``: a tag as text that means the same in the dialect sdnext, and is read back to an equal tag

The rest of the prompt stays as it is, but for the spaces and commas around tags. ``TagError`` is all that is raised.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .dialects import DIALECTS, ENCODERS, LORACTL, PROMPT_CONTROL, SDNEXT, TagError
from .schedule import Schedule, fixed
from .tag_parts import Parts, blocks_of, components_of, module_of, name_of, side_of, split, steps_of, strengths_of

MAX_TAGS, MAX_TAG, MAX_PROMPT = 64, 2000, 100_000
_TAG = re.compile(r"<[ \t]{0,4}(?P<kind>lora|lyco|loractl)[ \t]{0,4}:(?P<body>[^<>]*)(?P<end>>?)", re.IGNORECASE)
_BLANK = " \t\r\n,"
_OPENING, _CLOSING = "([{|", ")]}|:"


@dataclass(frozen=True)
class Tag:
    """``model`` is the strength on the MODEL, ``clip`` that on the text encoders; ``components`` hold those of single
    encoders, and then also that of the others (``te``) where it is not 1, ``clip`` being 1. ``blocks`` and ``steps``
    multiply ``model``. ``module``: the only part that counts (unet, te, te1, clip_l …), empty for all. ``side``: high,
    low, or empty for both. ``span`` is where it stood in the prompt."""

    name: str
    model: Schedule = field(default_factory=lambda: fixed(1.0))
    clip: Schedule = field(default_factory=lambda: fixed(1.0))
    components: Mapping[str, Schedule] = field(default_factory=dict)
    blocks: str = ""
    steps: Schedule = field(default_factory=lambda: fixed(1.0))
    module: str = ""
    side: str = ""
    span: tuple[int, int] = field(default=(0, 0), compare=False)


@dataclass(frozen=True)
class ParsedPrompt:
    text: str
    tags: tuple[Tag, ...]
    notes: tuple[str, ...] = ()


def parse_prompt(text: str, dialect: str = SDNEXT, encoders: Collection[str] = ()) -> ParsedPrompt:
    """The prompt without its tags, and what they say; ``encoders``: names that the CLIP has for its parts."""
    if dialect not in DIALECTS:
        raise TagError(f"dialect is {dialect!r}, expected one of {', '.join(DIALECTS)}")
    if len(text) > MAX_PROMPT:
        raise TagError(f"the prompt is {len(text)} letters long, expected at most {MAX_PROMPT}")
    known = (*ENCODERS, *encoders)
    tags: list[Tag] = []
    notes: list[str] = []
    for found in _TAG.finditer(text):
        shown = f"<lora:{found['body'].partition(':')[0][:60]}…>"
        if not found["end"]:
            raise TagError(f"{shown}: the tag does not end; write > behind it")
        if len(found[0]) > MAX_TAG:
            raise TagError(f"{shown}: {len(found[0])} letters, expected at most {MAX_TAG}; keep long rules in a preset")
        if len(tags) == MAX_TAGS:
            raise TagError(f"{shown}: more than {MAX_TAGS} tags; put some of the LoRAs on the MODEL by loaders")
        theirs = found["kind"].lower() == "loractl" and dialect != LORACTL
        try:
            tag, said = _tag(found["body"], PROMPT_CONTROL if theirs else dialect, known, found.span())
        except ValueError as error:
            raise TagError(f"{shown}: {error}") from error
        if (length := len(canonical(tag))) > MAX_TAG:
            raise TagError(
                f"{shown}: written out it would be {length} letters, at most {MAX_TAG} are read; use a preset"
            )
        tags.append(tag)
        notes += [f"{shown}: {note}" for note in said]
    return ParsedPrompt(_without(text, [tag.span for tag in tags]), tuple(tags), tuple(notes))


def names_in(text: str) -> list[str]:
    """The names in the tags, each once. Never raises."""
    found = itertools.islice(_TAG.finditer(text[:MAX_PROMPT]), MAX_TAGS)
    return list(dict.fromkeys(name for tag in found if (name := name_of(tag["body"][:MAX_TAG])[0])))


def canonical(tag: Tag) -> str:
    """The tag as text in the dialect sdnext."""
    others = tag.components.get("te", tag.clip)
    parts = [tag.name]
    if others == tag.model:
        parts += [] if tag.model == fixed(1.0) else [str(tag.model)]
    else:
        parts += [f"unet={tag.model}", f"te={others}"]
    parts += [f"{name}={schedule}" for name, schedule in tag.components.items() if name != "te"]
    if tag.blocks:
        parts.append("blocks=" + tag.blocks.replace("\n", ";"))
    if tag.steps != fixed(1.0):
        parts.append(f"steps={tag.steps}")
    if tag.module:
        parts.append(f"module={tag.module}")
    return "<lora:" + ":".join(parts + ([tag.side] if tag.side else [])) + ">"


def _tag(body: str, dialect: str, encoders: Collection[str], span: tuple[int, int]) -> tuple[Tag, list[str]]:
    parts: Parts = split(body, dialect, encoders)
    model, clip = strengths_of(parts)
    components = components_of(parts)
    if components and clip != fixed(1.0):
        components, clip = {"te": clip, **components}, fixed(1.0)
    model, blocks = blocks_of(parts, model)
    module, side = module_of(parts)
    tag = Tag(
        name=parts.name,
        model=model,
        clip=clip,
        components=components,
        blocks=blocks,
        steps=steps_of(parts),
        module=module,
        side=side_of(parts, side),
        span=span,
    )
    parts.check_interpolation()
    return tag, parts.notes


def _without(text: str, spans: list[tuple[int, int]]) -> str:
    """The text without these parts of it, the blanks and commas around each made one."""
    kept, rest = text, ""
    for begin, end in reversed(spans):
        kept, rest = kept[:begin], kept[end:] + rest
        before, after = kept.rstrip(_BLANK), rest.lstrip(_BLANK)
        gap = _joined(kept[len(before) :], rest[: len(rest) - len(after)], before, after)
        kept, rest = before, gap + after
    return kept + rest


def _joined(left: str, right: str, before: str, after: str) -> str:
    """What stays of the blanks and commas around a tag."""
    if not before or not after:
        return ""
    if "\n" in left:  # the line begins with the tag
        _, newline, more = right.partition("\n")
        return left + (more if newline else "")
    if "\n" in right:  # it ends with the tag
        first, newline, more = right.partition("\n")
        return ("," if "," in left + first else "") + newline + more
    if before[-1] in _OPENING or after[0] in _CLOSING:
        return ""
    commas = [run for run in (left, right) if "," in run]
    return max(commas or [left, right], key=len)
