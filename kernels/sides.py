"""Which of two models a LoRA is for: the one for high noise or the one for low noise, as Wan 2.2 has them.

* ``side_by_metadata``: by the timesteps it was trained on, or the base model's file.
* ``side_by_name``: by a mark in its name: high_noise, HIGH, hn, -H- … and their counterparts.
* ``partners``: the files that are called the same but for the mark.
* ``halves``: one file with keys for both, as one set of tensors for each.

"high" alone may mean anything (HIGH_heels): it counts at the end of a name, before numbers and versions, or where there
is a file with "low" in its place. A lone H or L counts only where there is a file with the other letter. Folders count
where the file's own name says nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from .metadata import json_object
from .peft_config import DIFFUSERS_CONFIG

HIGH, LOW = "high", "low"
OTHER = {HIGH: LOW, LOW: HIGH}
SUFFIX = ".safetensors"
# parts of the noise: models change at 0.875 or 0.9, and trainers let both sides reach a little beyond that
_HIGH_FROM, _LOW_TO = 0.8, 0.95
_MAX_NAME = 500
_WORD, _ALONE = r"(?<![A-Za-z])", r"(?<![A-Za-z0-9])"
_BEGIN = rf"(?:{_WORD}|(?<=[a-z])(?=[HL]))"
# how sure a mark is → what it looks like; its first letter tells the side
_MARKS = {
    3: re.compile(rf"{_BEGIN}(?i:high|hi|low|lo)[ _.-]?(?i:noise)(?![a-z])"),
    2: re.compile(rf"{_BEGIN}(?i:high|low)[ _.-]?(?i:model)(?![a-z])|{_ALONE}(?i:hn|ln)(?![A-Za-z0-9])"),
    1: re.compile(rf"{_BEGIN}(?:[Hh]igh|[Ll]ow)(?![a-z])|{_WORD}(?:HIGH|LOW)(?![A-Za-z])"),
    0: re.compile(rf"{_ALONE}(?i:[hl])(?![A-Za-z0-9])"),
}
_LETTER = 0
_SEPARATORS = re.compile(r"[\s_.()\[\]-]+")
_BEHIND = re.compile(
    r"(?:v|e|ep|epoch|r|rank|s|steps?|fp|bf|wan)?\d{0,12}|models?|loras?|final|best|ema|t2v|i2v|a?14b", re.IGNORECASE
)
_GENERIC = re.compile(rf"{_BEHIND.pattern}|noise", re.IGNORECASE)
_KEY = re.compile(
    r"(?P<before>(?:base_model\.model\.)?(?:(?:model\.)?diffusion_model\.)?)"
    r"(?:(?P<high>transformer_1|high_noise(?:_model)?)|(?P<low>transformer_2|low_noise(?:_model)?))\."
)
_FIRST, _SECOND = "transformer.", "transformer_2."  # of diffusers' pipelines


class Said(NamedTuple):
    """``side`` is empty for a LoRA of both; ``evidence`` is empty where nothing tells."""

    side: str
    evidence: str


class _Mark(NamedTuple):
    side: str
    sureness: int
    begin: int
    end: int


def side_by_metadata(metadata: Mapping[str, str]) -> Said:
    """By what it was trained on. The name that it had then is left to ``side_by_name``."""
    recipe = json_object(metadata, "loom.recipe").get("objective")
    low, high = (recipe.get(f"{end}_timestep") if isinstance(recipe, dict) else None for end in ("min", "max"))
    if isinstance(low, int) and isinstance(high, int):
        told = f"trained on timesteps {low} to {high}"
        if low >= 1000 * _HIGH_FROM:
            return Said(HIGH, told)
        if high <= 1000 * _LOW_TO:
            return Said(LOW, told)
    if metadata.get("ss_dit_high_noise_name"):
        return Said("", "trained on both models")
    base = metadata.get("ss_sd_model_name", "")[-_MAX_NAME:]
    marks = _marks_of(base)
    capitals = [mark for mark in marks if base[mark.begin : mark.end] in ("HIGH", "LOW")]
    side = _decided(marks, 2) or _decided(capitals, 1)
    return Said(side, f"trained on {base[:100]}") if side else Said("", "")


def side_by_name(name: str, names: Sequence[str] = ()) -> Said:
    """By the marks in a name; ``names`` are those of all files, among which there may be its partner."""
    if len(name) > _MAX_NAME:
        return Said("", "")
    for place, part in enumerate(reversed(_parts(name))):
        marks = _marks_of(part)
        words = [mark for mark in marks if mark.sureness != _LETTER]
        sides = sorted({mark.side for mark in words})
        side = _decided(words, 2)
        if not side and len(sides) == 1 and any(_at_the_end(mark, part) for mark in words):
            side = sides[0]
        if side:
            return Said(side, "by its folder" if place else "by its name")
        paired = [side for side in OTHER if not place and any(mark.side == side for mark in marks)]
        paired = [side for side in paired if partners(name, side, names)]
        if len(paired) == 1:
            return Said(paired[0], "by its name and its partner's")
    return Said("", "")


def side_by_title(metadata: Mapping[str, str]) -> Said:
    """By what it was called when it was made."""
    for key in ("ss_output_name", "modelspec.title"):
        title = metadata.get(key, "")
        if side := side_by_name(title).side:
            return Said(side, f"made as {title[:100]}")
    return Said("", "")


def partners(name: str, side: str, names: Sequence[str]) -> list[str]:
    """The files of the other side that are called like ``name``: exactly so but for the mark, or else with other
    letters and separators; in the same folder, or else in another one, if the name tells more than that it is a LoRA
    of some side. Several are equally good."""
    path = _plain(name)
    marks = [mark for mark in _marks_of(path) if mark.side == side]
    others = {other: _plain(other) for other in names if other != name and len(other) <= _MAX_NAME}
    for mark in sorted(marks, key=lambda mark: -mark.sureness):
        turned = _turned(path, [mark])
        if exact := [other for other, text in others.items() if text == turned]:
            return exact
        if mark.begin < path.rfind("/"):
            continue  # another folder's name would be another mark
        wanted = _around(path, mark)
        begin, end = map(_folded, _stem(wanted).split("\0"))
        near = {other: text for other, text in others.items() if _framed(_folded(_stem(text)), begin, end)}
        alike = {other: [_around(text, its) for its in _counterparts(text, mark)] for other, text in near.items()}
        elsewhere = (_stem, lambda text: _folded(_stem(text))) if _tells(_stem(wanted)) else ()
        for view in (str, _folded, *elsewhere):
            if found := [other for other, texts in alike.items() if view(wanted) in map(view, texts)]:
                return found
    turned = _turned(path, [mark for mark in marks if mark.sureness != _LETTER])  # folder and file bear a mark
    return [other for other, text in others.items() if text == turned != path]


def halves(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, tuple[dict[str, Tensor], dict]]:
    """Side → (tensors, metadata) of a file whose keys tell; keys without a side, such as a text encoder's, are in both.

    Empty for a file whose keys tell nothing.
    """
    second = any(key.startswith(_SECOND) for key in tensors)
    found: dict[str, dict[str, Tensor]] = {}
    common = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if second and key.startswith((_FIRST, _SECOND)):
            side, own = (LOW if key.startswith(_SECOND) else HIGH), _FIRST + key.partition(".")[2]
        elif match:
            side, own = (HIGH if match["high"] else LOW), match["before"] + key[match.end() :]
        else:
            common[key] = tensor
            continue
        found.setdefault(side, {})[own] = tensor
    return {side: ({**common, **own}, _configured(metadata, side, second)) for side, own in found.items()}


def _configured(metadata: Mapping[str, str], side: str, second: bool) -> dict[str, str]:
    """The metadata with what diffusers keeps of ranks and alphas for this side only."""
    config = json_object(metadata, DIFFUSERS_CONFIG)
    if not second or not config:
        return dict(metadata)
    left_out, own = (_FIRST, _SECOND) if side == LOW else (_SECOND, _FIRST)
    kept = {key: value for key, value in config.items() if not key.startswith(left_out)}
    renamed = {_FIRST + key.removeprefix(own) if key.startswith(own) else key: value for key, value in kept.items()}
    return {**metadata, DIFFUSERS_CONFIG: json.dumps(renamed)}


# -- marks in names


def _marks_of(text: str) -> list[_Mark]:
    """All marks in a text, each at its highest sureness; lone letters not of folders."""
    found: list[_Mark] = []
    for sureness, pattern in _MARKS.items():
        for match in pattern.finditer(text):
            taken = any(mark.begin <= match.start() < mark.end for mark in found)
            if not taken and (sureness != _LETTER or match.start() > text.rfind("/")):
                found.append(_Mark(HIGH if match[0][0] in "Hh" else LOW, sureness, match.start(), match.end()))
    return found


def _counterparts(text: str, mark: _Mark) -> list[_Mark]:
    """The marks of the other side that may stand for ``mark``: a letter for a letter, a word for a word."""
    return [
        its
        for its in _marks_of(text)
        if its.side == OTHER[mark.side] and (its.sureness == _LETTER) == (mark.sureness == _LETTER)
    ]


def _tells(rest: str) -> bool:
    """Whether a name without its mark says what the LoRA is of."""
    return not all(_GENERIC.fullmatch(word) for word in _SEPARATORS.split(rest.replace("\0", " ")))


def _framed(text: str, begin: str, end: str) -> bool:
    return text.startswith(begin) and text.endswith(end)


def _decided(marks: Sequence[_Mark], least: int) -> str:
    """The side of the surest marks; empty where these contradict each other."""
    surest = max((mark.sureness for mark in marks), default=0)
    sides = {mark.side for mark in marks if mark.sureness == surest}
    return sides.pop() if surest >= least and len(sides) == 1 else ""


def _at_the_end(mark: _Mark, text: str) -> bool:
    return all(_BEHIND.fullmatch(word) for word in _SEPARATORS.split(text[mark.end :]))


def _turned(text: str, marks: Sequence[_Mark]) -> str:
    """With the marks of the other side, written the same way."""
    for mark in sorted(marks, key=lambda mark: -mark.begin):
        text = text[: mark.begin] + _other(text[mark.begin : mark.end]) + text[mark.end :]
    return text


def _other(mark: str) -> str:
    long = {"high": "low", "hi": "lo", "h": "l", "low": "high", "lo": "hi", "l": "h"}
    word = next(word for word in ("high", "low", "hi", "lo", "h", "l") if mark.lower().startswith(word))
    new = long[word]
    written = mark[: len(word)]
    if written.isupper() and (len(word) > 1 or not mark[1:].islower()):
        new = new.upper()
    elif written[0].isupper():
        new = new.capitalize()
    return new + mark[len(word) :]


def _around(text: str, mark: _Mark) -> str:
    return text[: mark.begin] + "\0" + text[mark.end :]


def _folded(text: str) -> str:
    return _SEPARATORS.sub("", text).casefold()


def _stem(text: str) -> str:
    return text.rpartition("/")[2]


def _plain(name: str) -> str:
    return name.replace("\\", "/").removesuffix(SUFFIX)


def _parts(name: str) -> list[str]:
    return _plain(name).split("/")
