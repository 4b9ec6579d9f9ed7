"""Focus boxes as edits: which part of a picture a crop is laid around, where a concept's crops look for one.

``set focus 0.25 0.1 0.75 0.6 for "cat.png"``: left, top, right and bottom as parts of the upright picture. A box that
stands in the name of a file is replaced by it, until the edit is undone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .edit_words import Words
from .model import Box, DatasetError
from .operations import Editor, Look, Operation

PART = r"(?:0|1|[01]\.[0-9]{1,9})"
DIGITS = 6  # of a part that is written down: a pixel of the largest picture


def rounded(box: Iterable[float]) -> Box:
    """A box as a line holds it."""
    left, top, right, bottom = (round(float(side), DIGITS) for side in box)
    return left, top, right, bottom


@dataclass(frozen=True)
class SetFocus(Operation):
    OPENING = "set focus"
    SYNTAX = "set focus 0.25 0.1 0.75 0.6"
    FIELD = "focus"
    box: Box

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if self.box != rounded(self.box) or not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise DatasetError(
                f"focus: {' '.join(map(_part, self.box))} is no box; give left, top, right and bottom from 0 to 1, "
                "each less than its opposite"
            )

    def words(self) -> Iterable[str]:
        return map(_part, self.box)

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        return {"box": rounded(float(words.number(PART, "a part of the picture, 0 to 1")) for _ in range(4))}

    def editor(self, look: Look) -> Editor:
        concepts = look.draft.concepts
        if not any(concept.images.focused for concept in concepts):
            look.note("no concept crops around the focus: set crop to focus in the image settings")
        return lambda sample, _: self.box


@dataclass(frozen=True)
class ClearFocus(Operation):
    OPENING = "clear focus"
    SYNTAX = "clear focus"
    FIELD = "focus"

    def editor(self, look: Look) -> Editor:
        return lambda sample, _: None


def _part(number: float) -> str:
    return f"{number:.{DIGITS}f}".rstrip("0").rstrip(".")
