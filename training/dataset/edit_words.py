"""One line of an edit program, word by word: texts in quotes, words, numbers, and a filter behind ``where``.

- in quotes, ``\\"`` is a quote, ``\\\\`` a backslash, ``\\n`` a line break, ``\\r`` a carriage return; any other
  backslash stands for itself, so that ``"miku \\(vocaloid\\)"`` and ``"\\d+"`` need no doubling
- ``quoted`` writes a text the one way that reads back exactly
- a fault names the place, what may stand there and the nearest of it
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from .model import DatasetError

ESCAPES = {"n": "\n", "r": "\r", '"': '"', "\\": "\\"}
ESCAPED = {"\n": "\\n", "\r": "\\r", '"': '\\"'}
QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"', re.DOTALL)
ESCAPE = re.compile(r'\\([nr"\\])')
SPECIAL = re.compile(r'[\n\r"]|\\(?=[nr"\\\n\r]|\Z)')
WORD = re.compile(r'[^\s,"]+')
SPACE = re.compile(r"[ \t]+")
COMMA, FILTER = ",", "where"
SHOWN = 40


def quoted(text: str) -> str:
    return '"' + SPECIAL.sub(lambda match: ESCAPED.get(match[0], "\\\\"), text) + '"'


def listed_texts(texts: Iterable[str]) -> str:
    return ", ".join(map(quoted, texts))


@dataclass(frozen=True)
class Token:
    value: str
    at: int
    text: bool = False  # in quotes


class Words:
    """The words of a line, from left to right."""

    def __init__(self, line: str) -> None:
        self.line = line
        self.tokens: list[Token] = []
        self.filter: str | None = None
        self.at = 0
        self._known: list[str] = []  # what else could stand at this place
        place = 0
        while place < len(line):
            place = self._token(place)

    def _token(self, place: int) -> int:
        if space := SPACE.match(self.line, place):
            return space.end()
        letter = self.line[place]
        if letter == '"':
            found = QUOTED.match(self.line, place)
            if found is None:
                raise self._fault(place, 'a closing quote; a quote inside a text is written \\"')
            self.tokens.append(Token(ESCAPE.sub(lambda match: ESCAPES[match[1]], found[1]), place, True))
            return found.end()
        if letter == COMMA:
            self.tokens.append(Token(COMMA, place))
            return place + 1
        found = WORD.match(self.line, place)
        if found is None:
            raise self._fault(place, f"a space instead of the character {letter!r}")
        if found[0].lower() == FILTER:
            self.filter = self.line[found.end() :].strip()
            return len(self.line)
        self.tokens.append(Token(found[0].lower(), place))
        return found.end()

    # -- reading

    @property
    def opening(self) -> list[str]:
        """The words in front, up to the first text or comma."""
        words = []
        for token in self.tokens:
            if token.text or token.value == COMMA:
                break
            words.append(token.value)
        return words

    def skip(self, count: int) -> None:
        self.at += count
        self._known = []

    def accept(self, *words: str) -> bool:
        """Whether these words stand here; then they are behind us. Once the first is there, all have to be."""
        if not self._is(words[0]):
            self._known.append(words[0])
            return False
        for word in words:
            if not self._is(word):
                raise self._missing([word])
            self.skip(1)
        return True

    def one_of(self, *words: str) -> str:
        for word in words:
            if self.accept(word):
                return word
        raise self._missing()

    def expect(self, *words: str) -> None:
        if not self.accept(*words):
            raise self._missing()

    def text(self) -> str:
        token = self._here()
        if token is None or not token.text:
            example = f', e.g. "{token.value[:SHOWN]}"' if token and token.value != COMMA else ""
            raise self._missing([], f"a text in quotes{example}")
        self.skip(1)
        return token.value

    @property
    def is_text(self) -> bool:
        token = self._here()
        return token is not None and token.text

    def texts(self) -> tuple[str, ...]:
        found = [self.text()]
        while (token := self._here()) is not None and token.value == COMMA and not token.text:
            self.skip(1)
            found.append(self.text())
        self._known.append("a comma")
        return tuple(found)

    def number(self, pattern: str, what: str) -> str:
        token = self._here()
        if token is None or token.text or re.fullmatch(pattern, token.value, re.ASCII) is None:
            raise self._missing([], what)
        self.skip(1)
        return token.value

    def ended(self) -> None:
        """DatasetError where words are left."""
        if self._here() is not None:
            raise self._missing(end=True)

    # -- faults

    def _here(self) -> Token | None:
        return self.tokens[self.at] if self.at < len(self.tokens) else None

    def _is(self, word: str) -> bool:
        token = self._here()
        return token is not None and not token.text and token.value == word

    def _missing(self, known: list[str] | None = None, what: str = "", end: bool = False) -> DatasetError:
        token = self._here()
        known = [*dict.fromkeys(self._known if known is None else known)]
        choices = [what] * bool(what) + known + [FILTER, "the end"] * end
        expected = " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
        if token is None:
            return self._fault(len(self.line), expected)
        near = [] if token.text else difflib.get_close_matches(token.value, [*known, *[FILTER] * end], 1, 0.5)
        return self._fault(token.at, expected + (f"; the nearest is {near[0]}" if near else ""))

    def _fault(self, place: int, expected: str) -> DatasetError:
        here = f"at {self.line[place : place + SHOWN]!r}" if place < len(self.line) else "at its end"
        return DatasetError(f"{here}: expected {expected}")
