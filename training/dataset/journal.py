"""What was done to a dataset, with undo and redo over everything, bulk edits too.

- ``given``: the program that the dataset comes with: carried out first and not undone, its text stays as it is
- ``preview``: how many images an edit would change, with a few before and after; nothing is done
- ``do``: one edit is one step, however many images it changes; what changes nothing is no step
- ``undo``, ``redo``: one step back or forth; the captions are those of before, to the letter
- ``program``: what was given and all steps as lines; run on the dataset as it was read, they give the dataset as it
  is. It never gets longer than ``parse_program`` reads: an edit that would make it so is refused
- ``unsaved``: the samples whose captions are not those in their files; ``changed``: those and the ones whose focus is
  not as it was read

Only captions that changed are kept, and of the oldest steps not even those where they get too many: such steps stay in
the program, but cannot be undone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from .edit_program import LONGEST, LONGEST_LINE, MOST_LINES, parse_lines, program_text, shortened
from .model import Dataset, DatasetError
from .operations import Change, Draft, Known, Operation

EXAMPLES = 5
MOST_KEPT = 100_000_000  # characters of captions that can be brought back
OVERHEAD = 200  # of each of them, in characters: what it takes besides its text
SHOWN = 300  # characters of a line that could be undone or redone


@dataclass(frozen=True)
class Done:
    """What changed, by the ids of the samples, and what had no effect."""

    operation: Operation
    ids: tuple[str, ...]
    selected: int = 0
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Example:
    id: str
    before: str
    after: str


@dataclass(frozen=True)
class Preview:
    """What an edit would do."""

    count: int
    selected: int
    examples: tuple[Example, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Step:
    operation: Operation
    line: str  # shortened
    length: int  # of its line in the program, with the line break
    old: dict[int, Any]
    new: dict[int, Any]

    @property
    def size(self) -> int:
        """What it keeps, in characters: what was there before is kept by the step before, or by the dataset as read."""
        return OVERHEAD * len(self.new) + sum(len(value) for value in self.new.values() if value)


class Journal:
    """One dataset while it is edited."""

    def __init__(
        self, dataset: Dataset, known: Known | None = None, most_kept: int = MOST_KEPT, given: str = ""
    ) -> None:
        """DatasetError with the number of the line where ``given`` is no program, or cannot be carried out."""
        self.opened = dataset
        self.given = given
        self._draft = Draft(dataset, known or Known())
        self._saved = {sample.id: sample.caption for sample in dataset.samples}
        self._most_kept = most_kept
        self._kept = 0
        self._length, self._lines = len(given) + 1, given.count("\n") + 1
        self._given: list[Operation] = []
        self._settled: list[Operation] = []  # can no longer be undone
        self._done: deque[_Step] = deque()
        self._undone: list[_Step] = []
        self._previewed: tuple[Operation, dict[int, Any], Change] | None = None  # until the next step
        for number, operation in parse_lines(given):
            try:
                new, _ = self._draft.edits(operation)
            except DatasetError as error:
                raise DatasetError(f"program, line {number}: {error}") from error
            self._draft.put(new, operation.FIELD)
            self._given.append(operation)

    @property
    def dataset(self) -> Dataset:
        return self._draft.dataset

    @property
    def operations(self) -> tuple[Operation, ...]:
        """All that made the dataset what it is, those that were given too."""
        return (*self._given, *self._added)

    @property
    def _added(self) -> tuple[Operation, ...]:
        return (*self._settled, *(step.operation for step in self._done))

    @property
    def added(self) -> str:
        """The lines of all steps, without what was given."""
        return program_text(self._added)

    @property
    def program(self) -> str:
        """What was given, as it was written, and the lines of all steps behind it."""
        added = self.added
        if not added or not self.given.strip():
            return added or self.given
        return f"{self.given}\n{added}" if self.given[-1] != "\n" else self.given + added

    @property
    def unsaved(self) -> tuple[str, ...]:
        samples = self._draft.samples
        return tuple(sample.id for sample in samples if self._saved[sample.id] != sample.caption)

    @property
    def changed(self) -> tuple[str, ...]:
        """The samples whose caption is not in its file, or whose focus is not as it was read."""
        pairs = zip(self._draft.samples, self.opened.samples, strict=True)
        return tuple(now.id for now, read in pairs if self._saved[now.id] != now.caption or now.focus != read.focus)

    @property
    def as_saved(self) -> Dataset:
        """The dataset as its files say."""
        samples = self._draft.samples
        return replace(self.opened, samples=tuple(replace(one, caption=self._saved[one.id]) for one in samples))

    @property
    def steps(self) -> int:
        """How many can be undone."""
        return len(self._done)

    @property
    def can_undo(self) -> bool:
        return bool(self._done)

    @property
    def can_redo(self) -> bool:
        return bool(self._undone)

    @property
    def undo_line(self) -> str | None:
        """The line that would be undone, shortened."""
        return self._done[-1].line if self._done else None

    @property
    def redo_line(self) -> str | None:
        return self._undone[-1].line if self._undone else None

    def saved(self, ids: Iterable[str]) -> None:
        """The captions of these samples are now those in their files."""
        for name in ids:
            self._saved[name] = self._draft.samples[self._draft.place[name]].caption

    def preview(self, operation: Operation, examples: int = EXAMPLES) -> Preview:
        self._check_room(operation.line)
        new, change = self._edits(operation)
        self._previewed = operation, new, change
        samples = self._draft.samples
        captions = [*new][:examples] if operation.FIELD == "caption" else []
        shown = tuple(Example(samples[at].id, samples[at].caption, new[at]) for at in captions)
        return Preview(change.count, change.selected, shown, change.notes)

    def do(self, operation: Operation) -> Done:
        line = operation.line
        self._check_room(line)
        new, change = self._edits(operation)
        if new:
            old = {at: getattr(self._draft.samples[at], operation.FIELD) for at in new}
            step = _Step(operation, shortened(line, SHOWN), len(line) + 1, old, new)
            self._put(new, operation.FIELD)
            self._kept += step.size - sum(undone.size for undone in self._undone)
            self._append(step)
            self._undone.clear()
            while self._kept > self._most_kept and len(self._done) > 1:
                oldest = self._done.popleft()
                self._kept -= oldest.size
                self._settled.append(oldest.operation)
        return Done(operation, change.ids, change.selected, change.notes)

    def undo(self) -> Done:
        if not self._done:
            cure = "; the steps before are too far back" if self._settled else ""
            raise DatasetError(f"there is nothing to undo{cure}")
        step = self._done.pop()
        self._length, self._lines = self._length - step.length, self._lines - 1
        self._undone.append(step)
        return self._moved(step, step.old)

    def redo(self) -> Done:
        if not self._undone:
            raise DatasetError("there is nothing to redo; a new edit ends what could be redone")
        step = self._undone.pop()
        self._append(step)
        return self._moved(step, step.new)

    def _append(self, step: _Step) -> None:
        self._done.append(step)
        self._length, self._lines = self._length + step.length, self._lines + 1

    def _check_room(self, line: str) -> None:
        """DatasetError where the program with this line could not be read again."""
        cure = "select the images by a filter (where …) instead of one by one, or all of them"
        if len(line) > LONGEST_LINE:
            raise DatasetError(
                f"the line of this edit would have {len(line):,} characters, at most {LONGEST_LINE:,} are read: {cure}"
            )
        if self._length + len(line) > LONGEST or self._lines == MOST_LINES:
            raise DatasetError(
                f"the program of all edits would have {self._length + len(line):,} characters in {self._lines + 1:,} "
                f"lines, at most {LONGEST:,} in {MOST_LINES:,} are read: {cure}; or write the captions "
                "into their files and open the dataset again"
            )

    def _edits(self, operation: Operation) -> tuple[dict[int, Any], Change]:
        """What an edit would change; a preview of the same a moment ago has found out already."""
        if self._previewed is not None and self._previewed[0] == operation:
            return self._previewed[1:]
        return self._draft.edits(operation)

    def _put(self, values: dict[int, Any], field: str) -> None:
        self._previewed = None
        self._draft.put(values, field)

    def _moved(self, step: _Step, values: dict[int, Any]) -> Done:
        self._put(values, step.operation.FIELD)
        ids = tuple(self._draft.samples[at].id for at in values)
        return Done(step.operation, ids, len(ids))
