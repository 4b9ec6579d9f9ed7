"""Edits as text: one operation per line, in words.

    # what the folder is about
    remove "blurry", "watermark*"
    rename "kitty" to "cat", "young animal" where path:cats
    put trigger "ohwx" first
    sort by frequency keeping first 1

- a line is an operation, then ``where`` and a filter, or ``for`` and ids in quotes, or nothing for all images
- lines that begin with # are comments; empty lines are skipped
- ``Operation.line`` is the one text of an operation that reads back as itself
- a fault names line, place, what may stand there and the nearest; all of them together
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from .caption_edits import JoinLines, JoinTags, ReplacePattern, ReplaceText, SetCaption, SplitTags, Tidy
from .edit_words import Words
from .fix_edits import Fix
from .focus_edits import ClearFocus, SetFocus
from .model import SHOWN, Dataset, DatasetError
from .operations import Change, Draft, Known, Operation, Selection
from .spelling_edits import AddImplied, ClearWeight, RemoveImplied, Respell, SetWeight
from .tag_edits import Add, Move, PutTriggerFirst, Remove, RemoveDuplicates, Rename, Sort

OPERATIONS: tuple[type[Operation], ...] = (
    Add,
    AddImplied,
    Remove,
    RemoveDuplicates,
    RemoveImplied,
    Rename,
    Move,
    Sort,
    PutTriggerFirst,
    Respell,
    SetWeight,
    ClearWeight,
    SetCaption,
    SplitTags,
    JoinTags,
    JoinLines,
    Tidy,
    ReplaceText,
    ReplacePattern,
    Fix,
    SetFocus,
    ClearFocus,
)
OPENINGS = {tuple(kind.OPENING.split()): kind for kind in OPERATIONS}
LONGEST_LINE = 4_000_000  # characters; ids of many thousands of images
LONGEST = 32_000_000
MOST_LINES = 20_000


def parse_operation(line: str) -> Operation:
    """The operation of one line; DatasetError names the place, what was expected and the nearest of it."""
    if len(line) > LONGEST_LINE:
        raise DatasetError(f"it has {len(line)} characters, at most {LONGEST_LINE} are read; use several lines")
    words = Words(line)
    kind = _kind(words)
    words.skip(len(kind.OPENING.split()))
    try:
        fields = kind.read(words)
        selection = Selection.read(words)
    except DatasetError as error:
        verb = kind.OPENING.split()[0]
        written = [kind.SYNTAX, *(other.OPENING for other in OPERATIONS if other.OPENING.startswith(f"{verb} "))]
        raise DatasetError(f"{error}; it is written: {', or '.join(dict.fromkeys(written))}") from None
    return kind(**fields, selection=selection)


def parse_program(text: str) -> tuple[Operation, ...]:
    """The operations of a program; DatasetError says what is wrong with which line."""
    return tuple(operation for _, operation in parse_lines(text))


def parse_lines(text: str) -> tuple[tuple[int, Operation], ...]:
    """The operations of a program, each with the number of its line."""
    text = text.removeprefix("\ufeff")  # of a file that was pasted
    if len(text) > LONGEST:
        raise DatasetError(f"program: it has {len(text)} characters, at most {LONGEST} are read; divide it")
    lines = text.split("\n")
    if len(lines) > MOST_LINES:
        raise DatasetError(f"program: it has {len(lines)} lines, at most {MOST_LINES} are read; divide it")
    operations, faults = [], []
    for number, line in enumerate(lines, 1):
        line = line.strip(" \t\r")
        if not line or line.startswith("#"):
            continue
        try:
            operations.append((number, parse_operation(line)))
        except DatasetError as error:
            faults.append(f"program, line {number}: {error}")
    if faults:
        more = f"\nand {len(faults) - SHOWN} lines more" if len(faults) > SHOWN else ""
        raise DatasetError("\n".join(faults[:SHOWN]) + more)
    return tuple(operations)


def program_text(operations: Iterable[Operation]) -> str:
    return "\n".join(operation.line for operation in operations)


def run_program(
    dataset: Dataset,
    operations: Iterable[Operation],
    known: Known | None = None,
    done: Callable[[Operation, Change], object] | None = None,
) -> tuple[Dataset, list[str]]:
    """The edited dataset, and for each operation a note of what it did; ``done`` is called after each and may raise."""
    draft = Draft(dataset, known or Known())
    notes = []
    for operation in operations:
        captions, change = draft.edits(operation)
        draft.put(captions, operation.FIELD)
        notes.append("; ".join((f"{shortened(operation.line)}: {change.told}", *change.notes)))
        if done is not None:
            done(operation, change)
    return draft.dataset, notes


def shortened(line: str, longest: int = 100) -> str:
    return line if len(line) <= longest else line[: longest - 1] + "…"


def _kind(words: Words) -> type[Operation]:
    opening = tuple(words.opening)
    for count in (2, 1):
        if opening[:count] in OPENINGS and len(opening) >= count:
            return OPENINGS[opening[:count]]
    openings = sorted({kind.OPENING for kind in OPERATIONS})
    if not opening:
        raise DatasetError(f"it has to begin with an operation: {', '.join(openings)}")
    begun = [name for name in openings if name.split()[0] == opening[0]]
    names = {name: name for name in openings} | {name.split()[0]: name for name in reversed(openings)}
    near = difflib.get_close_matches(" ".join(opening[:2]), begun or names, 1, 0.0 if begun else 0.5)
    near = near or difflib.get_close_matches(opening[0], names, 1, 0.5)
    found = f"“{' '.join(opening[:2])[:40]}” is no operation"
    if not near:
        raise DatasetError(f"{found}; there are {', '.join(openings)}")
    syntax = next(kind.SYNTAX for kind in OPERATIONS if kind.OPENING == names[near[0]])
    raise DatasetError(f"{found}; the nearest is {names[near[0]]}: {syntax}")
