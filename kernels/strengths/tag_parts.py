"""What stands between the colons of ``<lora:name:…>``, part by part.

* ``split``: the text of a tag → ``Parts``: its name (``name_of``), numbers, named arguments and flags
* ``strengths_of``, ``components_of``, ``blocks_of``, ``steps_of``, ``module_of``, ``side_of``: what they mean

Every argument is named once at most and has an effect, or is told in ``Parts.notes``. Only ValueError is raised.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass, field

from .dialects import A1111, ARGUMENTS, ELEMENTALS, OURS, SDNEXT, SIDES, TE_FIRST, weights
from .schedule import MAX_SIGMA, Point, Schedule, fixed, is_number, point_of, weight_of

_TE = re.compile(r"te(?P<number>[1-9])|text_encoder(?:_(?P<diffusers>[1-9]))?", re.ASCII)
_NAMES = re.compile(r"[\w .*?-]*")
_LETTER_X = re.compile(r"X(?P<more>[+-].{1,20})?")
_MODULES = {name: "unet" for name in ("unet", "model", "transformer", "dit")} | {"te": "te", "clip": "te"}
_WAYS = ("in", "mid", "out")
MAX_RULES = 100  # from one lbwe=


@dataclass
class Parts:
    name: str
    dialect: str
    encoders: Collection[str]
    numbers: list[Schedule] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    changing: bool = False  # whether there is anything to interpolate

    def weights(self, text: str, name: str) -> Schedule:
        schedule = weights(text, name, self.dialect, self.named.get("interpolation"))
        self.changing |= schedule.constant is None
        return schedule

    def check_interpolation(self) -> None:
        if "interpolation" in self.named and not self.changing:
            raise ValueError(
                "interpolation= has no effect, no weight here changes over the run; write 0@0%,1@50%, or behind the "
                "weights in blocks= and steps= themselves: 0@0%,1@50% linear"
            )


def name_of(body: str) -> tuple[str, list[str]]:
    """The name in a tag, and the parts behind it; "run: cat", as what runs keep is called, is one name."""
    name, *rest = (" ".join(part.split()) for part in body.split(":"))
    if name.lower() == "run" and rest and rest[0].lower() not in ("", *SIDES):
        if "=" not in rest[0] and not _is_strength(rest[0]):
            name = f"run: {rest.pop(0)}"
    return name, rest


def split(body: str, dialect: str, encoders: Collection[str]) -> Parts:
    name, rest = name_of(body)
    if not name:
        raise ValueError("the name is missing; write <lora:name:1>")
    parts = Parts(name, dialect, encoders)
    numbers: list[str] = []
    while rest:
        part = rest.pop(0)
        argument, given, value = (piece.strip() for piece in part.partition("="))
        if not part:
            raise ValueError("nothing stands between two colons; leave one of them out")
        if given:
            ours = _argument(argument.lower(), encoders)
            if ours == "lbwe" and value.upper() not in ELEMENTALS:
                while rest and "=" not in rest[0] and rest[0].lower() not in SIDES:
                    value += ":" + rest.pop(0)
            _name(parts, ours, value)
        elif part.lower() in SIDES:
            parts.flags.append(part.lower())
        elif dialect == A1111 and not _is_strength(part):
            _name(parts, "blocks", part)
        else:
            numbers.append(part)
    if len(numbers) > 2:
        raise ValueError(f"{numbers[2][:60]!r} is a third number; to lower a LoRA's rank, make a resized file of it")
    if how := parts.named.get("interpolation"):
        parts.named["interpolation"] = how.lower()
    parts.numbers = [_number(parts, number) for number in numbers]
    for hires in ("hr", "hrunet", "hrte"):
        if hires in parts.named:
            weights(parts.named[hires], hires, dialect, None)
            parts.notes.append(
                f"{hires}= has no effect: no second pass belongs to a prompt here; put the LoRA on that sampler's MODEL"
            )
    return parts


def strengths_of(parts: Parts) -> tuple[Schedule, Schedule]:
    """Strengths on the MODEL and on the text encoders."""
    named: dict[str, Schedule] = {
        name: parts.weights(parts.named[name], name) for name in ("unet", "te") if name in parts.named
    }
    if parts.dialect in TE_FIRST:
        return _te_first(parts, named)
    model, clip = (parts.numbers * 2)[:2] or [fixed(1.0)] * 2
    if len(parts.numbers) == 2 and named:
        raise ValueError(f"{next(iter(named))}= and two numbers, one of which is for the same; leave one of them out")
    if len(parts.numbers) == 1 and len(named) == 2:
        parts.notes.append(f"the number {parts.numbers[0]} has no effect, unet= and te= say what counts")
    return named.get("unet", model), named.get("te", clip)


def _te_first(parts: Parts, named: dict[str, Schedule]) -> tuple[Schedule, Schedule]:
    """The same where numbers stand for te and unet, and unet is what te has come to unless something says more."""
    given = dict(zip(("te", "unet"), parts.numbers, strict=False))
    for name in [name for name in given if name in named]:
        parts.notes.append(f"the number {given[name]} has no effect, {name}= says what counts")
    both = given | named
    clip = both.get("te", fixed(1.0))
    return both.get("unet", clip), clip


def components_of(parts: Parts) -> dict[str, Schedule]:
    """Strengths of single text encoders."""
    named = {name: value for name, value in parts.named.items() if name not in ARGUMENTS}
    return {name: parts.weights(value, name) for name, value in named.items()}


def blocks_of(parts: Parts, model: Schedule) -> tuple[Schedule, str]:
    """The strength on the MODEL that is left, and block weights as rules, one a line."""
    named = parts.named
    ways = {way: parts.weights(named[way], way) for way in _WAYS if way in named}
    lines = [line.strip() for line in re.split("[;\n]", named.get("blocks", "")) if line.strip()]
    if ways and (lines or "lbwe" in named):
        raise ValueError(f"{next(iter(ways))}= and block weights both say what blocks get; write all of it in blocks=")
    if ways:
        lines = [f"{way}={schedule}" for way, schedule in ways.items()]
        if model != fixed(1.0):
            lines.insert(0, f"all={model}")
        return fixed(1.0), "\n".join(lines)
    if "blocks" in named and not lines:
        raise ValueError("blocks= is empty; write in=0.5, a vector or the name of a preset")
    if lines:
        lines[0] = _without_x(parts, lines[0])
    elif "x" in named:
        raise ValueError("x= has no effect, there is no vector with X in it; write lbw=1,X,…")
    return model, "\n".join(lines + _elements(named["lbwe"]) if "lbwe" in named else lines)


def steps_of(parts: Parts) -> Schedule:
    """What multiplies the strength on the MODEL over the run."""
    named = parts.named
    if "steps" in named:
        if other := [name for name in ("start", "stop", "step") if name in named]:
            raise ValueError(f"steps= and {other[0]}= say the same; leave one of them out")
        return weights(named["steps"], "steps", SDNEXT, None)
    start, stop = named.get("start", ""), named.get("stop", "")
    if "step" in named:
        if start or stop:
            raise ValueError("step= and start= or stop= say the same; leave one of them out")
        start, dash, stop = (place.strip() for place in named["step"].partition("-"))
        if not dash or not (start or stop):
            raise ValueError(f"step={named['step'][:60]}: expected two steps, as in step=5-10")
    begin, end = _place(start, 1.0, "start"), _place(stop, 0.0, "stop")
    if end and end.unit != "sigma" and not end.position:
        raise ValueError(f"stop={stop[:20]} leaves nothing of the run; write the first step or place without the LoRA")
    if begin and begin.unit != "sigma" and not begin.position:
        begin = None
    if begin and end:
        if begin.unit != end.unit:
            raise ValueError("start and stop are counted in different ways; write both as steps or both as parts (50%)")
        if (end.position >= begin.position) if begin.unit == "sigma" else (end.position <= begin.position):
            raise ValueError(f"stop={stop[:20]} does not come after start={start[:20]}, so nothing would be left")
    points = [point for point in (begin, end) if point]
    if not points:
        return fixed(1.0)
    earliest = (MAX_SIGMA, "sigma") if points[0].unit == "sigma" else (0.0, "fraction")
    return Schedule((Point(1.0 - points[0].weight, *earliest), *points))


def module_of(parts: Parts) -> tuple[str, str]:
    """The only part that counts, and which MODEL of two that means."""
    module = parts.named.get("module", "").lower()
    if not module and "module" not in parts.named:
        return "", ""
    if module == "transformer_2":
        return "unet", "low"
    found = _MODULES.get(module) or _component(module, parts.encoders)
    if not found:
        known = [*_MODULES, "te1", "te2", "te3", *parts.encoders, "transformer_2"]
        raise ValueError(f"module={module[:60]}: there is no such part{_nearest(module, known)}; known: {_list(known)}")
    on_model = ("unet", *_WAYS, "blocks", "lbwe", "start", "stop", "step", "steps")
    on_text = () if parts.dialect in TE_FIRST and "unet" not in parts.named and len(parts.numbers) < 2 else ("te",)
    for name in parts.named:
        if name in on_model if found != "unet" else name in on_text or name not in ARGUMENTS:
            parts.notes.append(f"{name}= has no effect beside module={module}")
    return found, ""


def side_of(parts: Parts, said: str) -> str:
    sides = sorted({*parts.flags, *([said] if said else [])})
    if len(sides) > 1:
        raise ValueError("both high and low are asked for; leave both out to have it on both")
    return sides[0] if sides else ""


def _argument(name: str, encoders: Collection[str]) -> str:
    """Our name of a named argument, or of a text encoder."""
    if name in OURS:
        return OURS[name]
    if component := _component(name, encoders):
        return component
    if name == "dyn":
        raise ValueError("dyn= lowers a LoRA's rank, which is not done here; make a resized file of it")
    known = [*ARGUMENTS, "te1", "te2", "te3", *encoders]
    raise ValueError(f"unknown argument {name[:60]!r}{_nearest(name, known)}; known: {_list(known)}, and high and low")


def _component(name: str, encoders: Collection[str]) -> str:
    """A text encoder's name; empty if it is none."""
    if found := _TE.fullmatch(name):
        return f"te{found['number'] or found['diffusers'] or 1}"
    return name if name in encoders else ""


def _name(parts: Parts, name: str, value: str) -> None:
    if name in parts.named:
        raise ValueError(f"{name} is said twice; leave one of them out")
    parts.named[name] = value


def _number(parts: Parts, text: str) -> Schedule:
    if not _is_strength(text):
        known = ", ".join(SIDES)
        raise ValueError(
            f"{text[:60]!r} is no strength{_nearest(text.lower(), SIDES)}; expected a number, name=value or {known} "
            f"(block weights are written blocks={text[:20]})"
        )
    return parts.weights(text, "strength")


def _is_strength(text: str) -> bool:
    """Whether it is meant to be one: a number, or weights with places."""
    return "@" in text or "~" in text or is_number(text)


def _without_x(parts: Parts, vector: str) -> str:
    """A vector with numbers for its X."""
    x = weight_of(parts.named["x"], "x") if "x" in parts.named else 1.0
    items = [item.strip() for item in vector.split(",")]
    found = [_LETTER_X.fullmatch(item) for item in items]
    if not any(found) or len(items) == 1:
        if "x" in parts.named:
            raise ValueError("x= has no effect, the vector has no X; write X in lbw= where it is to stand")
        return vector
    numbers = [item if letter is None else _x(x, letter) for item, letter in zip(items, found, strict=True)]
    return ",".join(numbers)


def _x(x: float, letter: re.Match) -> str:
    more = weight_of(letter["more"], "X") if letter["more"] else 0.0
    return str(fixed(round(x + more, 9)))


def _elements(text: str) -> list[str]:
    """Rules for blocks from ``blocks:elements:weight`` and commas between."""
    lines = []
    for item in ELEMENTALS.get(text.upper(), text).split(","):
        fields = [part.strip() for part in item.split(":")]
        if len(fields) != 3:
            raise ValueError(
                f"lbwe={item[:60]}: expected blocks:elements:weight as in lbwe=IN05-OUT05:attn:0.3, or one of "
                f"{', '.join(ELEMENTALS)}"
            )
        blocks, elements, weight = fields
        if not _NAMES.fullmatch(blocks + elements):
            raise ValueError(f"lbwe={item[:60]}: names of blocks and elements are words with spaces between")
        ratio = fixed(weight_of(weight, "lbwe"))
        kinds = [f"/{kind}" for kind in _words(elements)] or [""]
        if (count := max(len(_words(blocks)), 1) * len(kinds)) > MAX_RULES:
            raise ValueError(f"{count} rules from lbwe=, expected at most {MAX_RULES}; write them in a preset")
        lines += [f"{block}{kind}={ratio}" for block in _words(blocks) or ["all"] for kind in kinds]
    return lines


def _words(text: str) -> list[str]:
    """Words with spaces between; those behind a NOT belong together."""
    words = text.split()
    return [text] if words[:1] == ["NOT"] else words


def _place(text: str, weight: float, name: str) -> Point | None:
    return point_of(f"{weight:g}@{text}", name) if text else None


def _nearest(name: str, known: Collection[str]) -> str:
    found = difflib.get_close_matches(name[:60], known, 1)
    return f", do you mean {found[0]!r}?" if found else ""


def _list(names: Collection[str]) -> str:
    return ", ".join(dict.fromkeys(names))
