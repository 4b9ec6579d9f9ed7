"""Python's syntax of regular expressions, as far as it can be carried out in bounded time, as a tree.

- what cannot is refused by name, with its place and the cure
- ``cost``: how many steps a search that goes back can take at most at one place of a text
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from .model import DatasetError

DEEPEST = 20  # groups inside one another
TURN = 8  # steps that one more turn of a repeated group costs besides its own

FLAGS = re.compile(r"\(\?([ims]+)\)")
COUNTS = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|.)", re.DOTALL)
ASSERTIONS = {"^", "$", r"\b", r"\B", r"\A", r"\Z"}
REFUSED = {
    "(?=": "looking ahead",
    "(?!": "looking ahead",
    "(?<=": "looking back",
    "(?<!": "looking back",
    "(?P": "named groups",
    "(?(": "conditions",
    "(?#": "comments",
    "(?>": "atomic groups",
}


class Chars(dict[str, bool]):
    """Whether one character fits, as ``re`` says; each is asked once."""

    def __init__(self, source: str, flags: int) -> None:
        super().__init__()
        self.source = source
        plain = source != "." if len(source) == 1 else len(source) == 2 and not source[1].isalnum()  # not \\d
        cased = flags & re.IGNORECASE and source[-1].lower() != source[-1].upper()
        self.letter = source[-1] if plain and not cased else ""  # the only one that fits, where that is sure
        self._fits = re.compile(source, flags).fullmatch

    def __missing__(self, letter: str) -> bool:
        self[letter] = self._fits(letter) is not None
        return self[letter]


# -- what a pattern consists of


@dataclass(frozen=True)
class One:
    """One character."""

    chars: Chars
    nullable = False


@dataclass(frozen=True)
class Assertion:
    holds: Callable[[str, int], object]
    nullable = True


@dataclass(frozen=True)
class Sequence_:
    parts: tuple[Node, ...]

    @property
    def nullable(self) -> bool:
        return all(part.nullable for part in self.parts)


@dataclass(frozen=True)
class Choice:
    options: tuple[Node, ...]

    @property
    def nullable(self) -> bool:
        return any(option.nullable for option in self.options)


@dataclass(frozen=True)
class Group:
    part: Node
    number: int

    @property
    def nullable(self) -> bool:
        return self.part.nullable


@dataclass(frozen=True)
class Repeat:
    part: Node
    least: int
    most: int | None
    greedy: bool

    @property
    def nullable(self) -> bool:
        return self.least == 0


Node = One | Assertion | Sequence_ | Choice | Group | Repeat


class Reader:
    """Reads a pattern from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.groups = 0
        self.depth = 0
        self.flags = 0
        self.chars: dict[str, Chars] = {}
        if flags := FLAGS.match(text):
            self.flags = sum({getattr(re, letter.upper()) for letter in flags[1]})
            self.at = flags.end()

    def fault(self, what: str) -> DatasetError:
        return DatasetError(f"pattern {self.text[:60]!r}, at character {self.at + 1}: {what}")

    def whole(self) -> Node:
        found = self.choice()
        if self.at < len(self.text):
            raise self.fault("this bracket closes none; write \\) for a bracket in the text")
        return found

    def choice(self) -> Node:
        options = [self.sequence()]
        while self.text.startswith("|", self.at):
            self.at += 1
            options.append(self.sequence())
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def sequence(self) -> Node:
        parts: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            parts.append(self.repeated(self.atom()))
        return parts[0] if len(parts) == 1 else Sequence_(tuple(parts))

    def repeated(self, part: Node) -> Node:
        start, counts = self.at, self.counts()
        if counts is None:
            return part
        if part.nullable:
            self.at = start
            raise self.fault("what is repeated can be nothing already; leave one of the two repetitions out")
        greedy = not self.text.startswith("?", self.at)
        self.at += not greedy
        if self.text.startswith("+", self.at) or self.counts() is not None:
            raise self.fault("a repetition of a repetition; put the first into (?: ) or leave one out")
        return Repeat(part, *counts, greedy)

    def counts(self) -> tuple[int, int | None] | None:
        """(least, most) of the quantifier here, which is then behind us; None where there is none."""
        letter = self.text[self.at : self.at + 1]
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(letter)
        if simple:
            self.at += 1
            return simple
        found = COUNTS.match(self.text, self.at)
        if found is None or not (found[1] or found[2]):
            return None  # a brace is then an ordinary character
        least = int(found[1] or 0)
        most = int(found[3]) if found[3] else None if found[2] else least
        if most is not None and most < least:
            raise self.fault(f"{found[0]} has its counts the wrong way round")
        self.at = found.end()
        return least, most

    def atom(self) -> Node:
        letter = self.text[self.at]
        if letter == "(":
            return self.group()
        if letter in "*+?" or (letter == "{" and COUNTS.match(self.text, self.at) and self.counts() is not None):
            raise self.fault(f"nothing stands in front of {letter} to be repeated; write \\{letter} for the character")
        source = self.source()
        self.at += len(source)
        if source in ASSERTIONS:
            return Assertion(re.compile(source, self.flags).match)
        source = source if len(source) > 1 or source == "." else re.escape(source)
        return One(self.chars.setdefault(source, Chars(source, self.flags)))

    def source(self) -> str:
        """How the one character here is written; valid as a pattern of its own."""
        letter = self.text[self.at]
        if letter == "[":
            source = self.bracketed()
        elif letter == "\\":
            found = ESCAPE.match(self.text, self.at)
            if found is None:
                raise self.fault("the pattern ends with a single backslash; write two for one in the text")
            source = found[0]
            if source[1].isdigit():
                raise self.fault(f"{source} refers back to a group, which is not possible; write out what is meant")
        else:
            return letter
        try:
            re.compile(source, self.flags)
        except re.error as error:
            raise self.fault(
                f"{source[:20]}: {error}; put a backslash in front of what is meant as it stands"
            ) from None
        return source

    def bracketed(self) -> str:
        """A class from its opening to its closing bracket."""
        end = self.at + 1
        end += self.text.startswith("^", end)
        end += self.text.startswith("]", end)  # in front it is a character like others
        while end < len(self.text) and self.text[end] != "]":
            end += 2 if self.text[end] == "\\" else 1
        if end >= len(self.text):
            raise self.fault("this bracket is not closed; write \\[ for a bracket in the text")
        return self.text[self.at : end + 1]

    def group(self) -> Node:
        opened, number = self.at, 0
        if self.text.startswith("(?:", self.at):
            self.at += 3
        elif self.text.startswith("(?", self.at):
            names = [name for start, name in REFUSED.items() if self.text.startswith(start, self.at)]
            raise self.fault(f"{names[0] if names else 'this kind of group'} is not possible; use ( ) or (?: )")
        else:
            self.groups += 1
            number = self.groups
            self.at += 1
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.fault(f"more than {DEEPEST} brackets inside one another; take some out")
        part = self.choice()
        self.depth -= 1
        if not self.text.startswith(")", self.at):
            self.at = opened
            raise self.fault("this bracket is not closed; write \\( for a bracket in the text")
        self.at += 1
        return Group(part, number) if number else Sequence_((part,))


# -- what a search that goes back can cost


def repeated_chars(node: Node) -> list[Chars]:
    """The characters of which any number may follow each other, each repetition's own."""
    match node:
        case Repeat(One(chars)):
            return [chars]
        case Repeat(part) | Group(part):
            return repeated_chars(part)
        case Sequence_(parts) | Choice(parts):
            return [chars for part in parts for chars in repeated_chars(part)]
    return []


def cost(node: Node, longest: int, following: str = "") -> tuple[float, float]:
    """(in how many ways it can fit at one place, steps of trying all of them), neither less than it is.

    ``longest`` is how many of the characters of a repetition follow each other at most in the text; ``following`` the
    character that has to come next, where there is one. Infinite where nothing is known.
    """
    match node:
        case Sequence_(parts):
            ways, steps = 1.0, 0.0
            for part, behind in zip(parts, [*map(first_letter, parts[1:]), following][: len(parts)], strict=True):
                own_ways, own_steps = cost(part, longest, behind)
                steps += ways * own_steps
                ways *= own_ways
            return ways, steps + 1
        case Choice(options):
            costs = [cost(option, longest, following) for option in options]
            return sum(ways for ways, _ in costs), sum(steps for _, steps in costs) + len(costs)
        case Group(part):
            ways, steps = cost(part, longest, following)
            return ways, steps + 2 * ways
        case Repeat(One(chars), least, most):
            run = longest if most is None else min(longest, most)
            alone = following and not chars[following]  # then it fits behind the last of them only
            return (1 if alone else max(1, run - least + 1)), 2 * run + 2
        case Repeat(part, least, most):
            ways, steps = cost(part, longest)
            if most is None or most > TURN:
                return math.inf, math.inf
            turns = sum(ways**count for count in range(most + 1))
            return turns, (steps + TURN) * turns
    return 1, 1


def first_letter(node: Node) -> str:
    """The one character that it begins with, if it is always the same; else nothing."""
    match node:
        case One(chars):
            return chars.letter
        case Sequence_((first, *_)) | Group(first):
            return first_letter(first)
        case Repeat(part, least) if least:
            return first_letter(part)
    return ""
