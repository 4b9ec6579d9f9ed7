"""The automatic fixes of captions that the check knows, as edits: ``fix T002``, ``fix T021 where path:cats``.

Each puts right what the quick check finds in the dataset as it is at that moment, and is a line of an edit program like
any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .edit_words import Words
from .fixes import CAPTION_FIXES, apply_fixes
from .lint_rules import RULES
from .model import DatasetError
from .operations import Editor, Look, Operation

FIXES = tuple(rule for rule in sorted(CAPTION_FIXES) if RULES[rule].needs != "pixels")  # by the quick check


@dataclass(frozen=True)
class Fix(Operation):
    """What a rule of the check found in captions, put right."""

    OPENING = "fix"
    SYNTAX = "fix " + " | ".join(FIXES)
    rule: str

    def __post_init__(self) -> None:
        if self.rule not in FIXES:
            raise DatasetError(f"fix: {self.rule[:20]!r} is no rule whose findings an edit can fix: {', '.join(FIXES)}")

    def words(self) -> Iterable[str]:
        return [self.rule]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        return {"rule": words.one_of(*(rule.lower() for rule in FIXES)).upper()}

    def editor(self, look: Look) -> Editor:
        dataset = look.draft.dataset
        findings = [found for found in look.known.findings(dataset, f"lint:{self.rule}") if found.rule == self.rule]
        if not findings:
            look.note(f"the check finds nothing of {self.rule} ({RULES[self.rule].title})")
        fixed = {sample.id: sample.caption for sample in apply_fixes(dataset, findings, [self.rule]).samples}
        return lambda sample, _: fixed[sample.id]
