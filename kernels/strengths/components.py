"""Strengths of the parts that a LoRA is put on: the diffusion model, and each text encoder of a CLIP.

* ``parse_components``: text (``unet=0.5, te1=0.3@1,0.6@6``) → strengths by the names written there.
* ``by_part``: these, for the parts that there are; ``without_effect``: those that are for none.

Names, in any case of letters: ``unet`` (also ``model``, ``transformer``, ``dit``); ``te`` for all text encoders,
``te1``, ``te2``, ``te3`` for one by its place in the CLIP, or its own name (``clip_l``, ``clip_g``, ``t5xxl`` …). The
later of two that are for the same part wins.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from .schedule import Schedule, fixed, parse

UNET, TE = "unet", "te"
MAX_LENGTH, MAX_COMPONENTS = 8000, 50
_ALIASES = {"model": UNET, "transformer": UNET, "dit": UNET}
_NAME = re.compile(r"[A-Za-z]\w{0,59}", re.ASCII)
_NUMBERED = re.compile(r"te(\d{1,2})")
_EXAMPLE = "unet=0.5, te1=0.3@1,0.6@6"


def items_of(text: str) -> list[str]:
    """Items between commas, semicolons and line breaks; the points of a schedule stay with its first one."""
    parts = (text[begin:end] for begin, end in spans_of(text))
    return [",".join(filter(None, map(str.strip, re.split(r"[\n,;]", part)))) for part in parts]


def spans_of(text: str) -> list[tuple[int, int]]:
    """Where in the text the items begin and end."""
    spans: list[tuple[int, int]] = []
    for piece in re.finditer(r"[^\n,;]+", text):
        item = piece.group().strip()
        if not item:
            continue
        begin = text.index(item, piece.start())
        if spans and "=" not in item and "@" in item and "=" in text[slice(*spans[-1])]:
            begin = spans.pop()[0]
        spans.append((begin, piece.start() + len(piece.group().rstrip())))
    return spans


def parse_components(text: str, name: str = "components", interpolation: str = "hold") -> dict[str, Schedule]:
    """component → strength, in the order of the text. Raises ValueError that begins with ``name``."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{name}: {len(text)} letters, expected at most {MAX_LENGTH}")
    found: dict[str, Schedule] = {}
    for item in items_of(text):
        component, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not _NAME.fullmatch(component):
            raise ValueError(f"{name}: {item[:60]!r} is no component and its strength; write {_EXAMPLE}")
        component = _ALIASES.get(component.lower(), component.lower())
        found.pop(component, None)  # the later one counts, at its place
        found[component] = parse(value, f"{name}: {component}", interpolation)
    if len(found) > MAX_COMPONENTS:
        raise ValueError(f"{name}: {len(found)} components, expected at most {MAX_COMPONENTS}")
    return found


def by_part(
    components: Mapping[str, Schedule],
    encoders: Sequence[str],
    vector: Mapping[str, float] | None = None,
    name: str = "components",
) -> dict[str, Schedule]:
    """The strength of every part that there is: ``UNET``, and each of ``encoders``, the names of the CLIP's.

    ``vector``: what block weights give to text encoders, which multiplies. Raises ValueError listing the parts that
    there are, for any other; those for text encoders in general are allowed without a CLIP (``without_effect``).
    """
    found = dict.fromkeys((UNET, *encoders), fixed(1.0))
    for component, strength in components.items():
        for part in _meant(component, encoders, name):
            found[part] = strength
    for component, factor in (vector or {}).items():
        for encoder in encoders if component == TE else [component] if component in encoders else []:
            found[encoder] = found[encoder].scaled(factor)
    return found


def without_effect(components: Mapping[str, Schedule], encoders: Sequence[str], name: str = "components") -> list[str]:
    """What is asked for in vain, in sentences."""
    notes: list[str] = []
    set_by: dict[str, str] = {}
    for component in components:
        meant = _meant(component, encoders, name)
        if not meant:
            notes.append(f"{name}: {component} has no effect without a CLIP; connect the CLIP, or leave it out")
        set_by |= dict.fromkeys(meant, component)
    return notes + [
        f"{name}: {component} has no effect, later ones set all of it; put it behind them"
        for component in components
        if _meant(component, encoders, name) and component not in set_by.values()
    ]


def _meant(component: str, encoders: Sequence[str], name: str) -> list[str]:
    numbered = _NUMBERED.fullmatch(component)
    by_name = {encoder.lower(): encoder for encoder in encoders}
    if component == UNET:
        return [UNET]
    if component == TE or (numbered and not encoders):
        return list(encoders)
    if component in by_name:
        return [by_name[component]]
    if numbered and 1 <= int(numbered[1]) <= len(encoders):
        return [encoders[int(numbered[1]) - 1]]
    there = [UNET]
    if encoders:
        there += [TE, *(f"te{place} ({encoder})" for place, encoder in enumerate(encoders, 1))]
    near = difflib.get_close_matches(component, [UNET, TE, *_ALIASES, *by_name], 1)
    hint = f", do you mean {near[0]}?" if near else ";"
    cure = "" if encoders else "; connect a CLIP for those of text encoders"
    raise ValueError(f"{name}: there is no component {component!r}{hint} there are {', '.join(there)}{cure}")
