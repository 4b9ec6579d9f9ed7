"""Regular expressions from strangers: Python's syntax and meaning, in a number of steps that no pattern can exceed.

- literals, ``.``, classes ``[a-z]``, ``\\d \\w \\s \\b`` and their opposites, ``^ $``, groups ``( )`` and ``(?: )``,
  ``|``, ``* + ? {2,5}`` and their lazy forms; ``(?i)``, ``(?m)``, ``(?s)`` in front
- lookaround, references back and named groups are refused by name, so are patterns that fit nothing at all
- in what replaces, ``\\1`` to ``\\9`` are groups, ``\\0`` the whole, ``\\\\`` a backslash

Python's own ``re`` tries some patterns, such as ``(a+)+b``, in exponentially many ways and cannot be interrupted. So it
is asked only where it can be told beforehand that it takes few steps for each letter of a text. Else a search of our
own finds the same, where a way that failed at a place is never tried there again, and every step counts against a
budget. That grows with each text, so that ordinary patterns are never refused, however many captions there are.
"""

from __future__ import annotations

import re

from .model import DatasetError
from .pattern_syntax import Assertion, Chars, Choice, Group, Node, One, Reader, Repeat, Sequence_, cost, repeated_chars

LONGEST = 500  # characters of a pattern
LARGEST = 1000  # instructions it may become: a{1000} is as much work as it looks
STEPS = 20_000_000  # of all texts together, some seconds, and …
SHARE = 30  # … for each letter of a text
MOST_QUICK = 1000  # steps of ``re`` for each letter; as long as some SHARE of ours take
RUNS = (256, 64, 24)  # letters of a repetition that follow each other at most, for which that is told
MOST_FAILED = 1_000_000  # places in one text that are remembered

NOTHING = r"(?!)"  # fits nowhere

CHAR, SPLIT, JUMP, SAVE, ASSERT, FOUND = range(6)


class Budget:
    """Steps that are left."""

    def __init__(self, steps: int = STEPS) -> None:
        self.left = steps


# -- as instructions


class _Program:
    """(what, first, second) per instruction; the host of all choices is SPLIT, which prefers its first way."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.steps: list[tuple] = []

    def emit(self, *step: object) -> int:
        if len(self.steps) == LARGEST:
            raise DatasetError(f"pattern {self.text[:60]!r}: it repeats too much; use smaller counts, or + and *")
        self.steps.append((*step, None, None)[:3])
        return len(self.steps) - 1

    def add(self, node: Node) -> None:
        match node:
            case One(chars):
                self.emit(CHAR, chars)
            case Assertion(holds):
                self.emit(ASSERT, holds)
            case Sequence_(parts):
                for part in parts:
                    self.add(part)
            case Group(part, number):
                self.emit(SAVE, 2 * number)
                self.add(part)
                self.emit(SAVE, 2 * number + 1)
            case Choice(options):
                self.choice(options)
            case Repeat():
                self.repeat(node)

    def choice(self, options: tuple[Node, ...]) -> None:
        ends = []
        for option in options[:-1]:
            split = self.emit(SPLIT)
            self.add(option)
            ends.append(self.emit(JUMP))
            self.steps[split] = (SPLIT, split + 1, len(self.steps))
        self.add(options[-1])
        for end in ends:
            self.steps[end] = (JUMP, len(self.steps), None)

    def repeat(self, node: Repeat) -> None:
        for _ in range(node.least):
            self.add(node.part)
        splits = []
        if node.most is None:
            splits.append(self.emit(SPLIT))
            self.add(node.part)
            self.emit(JUMP, splits[0])
        for _ in range((node.most or 0) - node.least):
            splits.append(self.emit(SPLIT))
            self.add(node.part)
        for split in splits:
            ways = (split + 1, len(self.steps))
            self.steps[split] = (SPLIT, *(ways if node.greedy else ways[::-1]))


class Pattern:
    """A pattern that was read; DatasetError names the place and the cure where that is impossible."""

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise DatasetError(f"pattern: it has {len(text)} characters, at most {LONGEST} are read; use a shorter one")
        reader = Reader(text)
        root = reader.whole()
        if root.nullable:
            raise DatasetError(f"pattern {text[:60]!r}: it also fits nothing, so anywhere; use + instead of *, or no ?")
        self.groups = reader.groups
        program = _Program(text)
        program.add(root)
        program.emit(FOUND)
        self._steps = program.steps
        self._text = text
        firsts = {chars.source: None for chars in self._firsts()}
        self._first = re.compile("|".join(firsts), reader.flags)  # single characters: no way to go wrong
        self._python = re.compile(text)
        run = next((run for run in RUNS if cost(root, run)[1] <= MOST_QUICK), None)
        sources = {f"{chars.source}{{{(run or 0) + 1}}}": None for chars in repeated_chars(root)}
        self._longer = re.compile("|".join(sources) or NOTHING, reader.flags)  # one after the other: no way either
        self._has_quick = run is not None

    def _firsts(self) -> list[Chars]:
        """What a match can begin with."""
        found, seen, ahead = [], set(), [0]
        while ahead:
            at = ahead.pop()
            if at in seen:
                continue
            seen.add(at)
            kind, first, second = self._steps[at]
            if kind == CHAR:
                found.append(first)
            else:
                ahead += [first, second] if kind == SPLIT else [first] if kind == JUMP else [at + 1]
        return found

    def is_quick(self, text: str) -> bool:
        """Whether ``re`` is sure to take few steps for each letter of this text."""
        return self._has_quick and self._longer.search(text) is None

    def spans(self, text: str, budget: Budget) -> list[list[int]]:
        """Beginning and end of each match in turn and of its groups, -1 for a group that took no part."""
        budget.left += SHARE * (len(text) + 1)
        found, at = [], 0
        failed: set[int] = set()
        while (first := self._first.search(text, at)) is not None:
            match = self._match(text, first.start(), failed, budget)
            if match is None:
                at = first.start() + 1
            else:
                found.append(match)
                at = match[1]
                failed = set()
        return found

    def _match(self, text: str, start: int, failed: set[int], budget: Budget) -> list[int] | None:
        steps, end, left = self._steps, len(text), budget.left
        marks = [start, -1] + [-1] * (2 * self.groups)
        ahead: list[tuple[int, int]] = [(0, start)]  # where to go on; or ~group and the mark to put back
        while ahead:
            at, place = ahead.pop()
            if at < 0:
                marks[~at] = place
                continue
            while True:
                left -= 1
                kind, first, second = steps[at]
                if kind == CHAR:
                    if place == end or not first[text[place]]:
                        break
                    at += 1
                    place += 1
                elif kind == SPLIT:
                    key = at * (end + 1) + place
                    if key in failed:
                        break
                    failed.add(key)
                    if left < 0 or len(failed) > MOST_FAILED:
                        raise self._too_much()
                    ahead.append((second, place))
                    at = first
                elif kind == SAVE:
                    ahead.append((~first, marks[first]))
                    marks[first] = place
                    at += 1
                elif kind == JUMP:
                    at = first
                elif kind == ASSERT:
                    if not first(text, place):
                        break
                    at += 1
                else:
                    marks[1] = place
                    budget.left = left
                    return marks
            if left < 0:
                raise self._too_much()
        budget.left = left
        return None

    def _too_much(self) -> DatasetError:
        return DatasetError(
            f"pattern {self._text[:60]!r}: it takes too many steps on these captions; say more exactly what it is to "
            "fit, or select fewer images with where"
        )

    def replaced(self, text: str, template: Template, budget: Budget) -> str:
        """The text with every match replaced."""
        if self.is_quick(text):
            return self._python.sub(template.python, text)
        pieces, done = [], 0
        for marks in self.spans(text, budget):
            pieces += [text[done : marks[0]], template.filled(text, marks)]
            done = marks[1]
        return "".join(pieces) + text[done:] if pieces else text


class Template:
    """What takes the place of a match: text and groups."""

    def __init__(self, text: str, groups: int) -> None:
        self._parts: list[str | int] = []
        for piece in re.findall(r"\\.?|[^\\]+", text, re.DOTALL):
            if piece[0] != "\\":
                self._parts.append(piece)
            elif piece == "\\\\":
                self._parts.append("\\")
            elif piece[1:].isdecimal() and piece.isascii() and int(piece[1:]) <= groups:
                self._parts.append(int(piece[1:]))
            elif piece[1:].isdecimal() and piece.isascii():
                raise DatasetError(f"{piece} in {text[:60]!r}: the pattern has {groups} groups; put ( ) around one")
            else:
                raise DatasetError(f"{piece} in {text[:60]!r}: only \\0 to \\9 mean something; a backslash is \\\\")

    @property
    def python(self) -> str:
        """The same as ``re`` writes it."""
        return "".join(f"\\g<{part}>" if isinstance(part, int) else part.replace("\\", "\\\\") for part in self._parts)

    def filled(self, text: str, marks: list[int]) -> str:
        return "".join(
            part
            if isinstance(part, str)
            else text[marks[2 * part] : marks[2 * part + 1]]
            if marks[2 * part] >= 0
            else ""
            for part in self._parts
        )
