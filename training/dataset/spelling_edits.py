"""Edits of how tags are written, and of what they imply: underscores, capitals, implied tags, weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from .edit_words import Words, listed_texts
from .lint_captions import is_prose
from .lint_knowledge import plain
from .lint_spelling import UNTOUCHED, implications_of
from .model import CaptionOptions, DatasetError
from .operations import Finder, Look, Table, TagEditor, TagOperation, check_tags
from .tag_list import TagList, bare, core, members, unwrapped
from .tag_text import NO_LETTER, begins_with, is_emoticon, literal, name_of, tags

HEAVIEST = 10.0


# -- spelling


@dataclass(frozen=True)
class Respell(TagOperation):
    """Spaces for underscores or the other way, and lower case.

    Emoticons such as ^_^ stay, so do triggers and tags that begin with one, tags that models know with their underscore
    (score_9), and exceptions. Sentences keep their spaces. What stands together in brackets is respelled one by one.
    """

    OPENING = "respell"
    SYNTAX = 'respell [with spaces | with underscores] [in lower case] [except "tag", …]'
    gaps: str = ""
    lower: bool = False
    exceptions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.gaps not in ("", "spaces", "underscores"):
            raise DatasetError(f"respell with {self.gaps!r} is unknown; use spaces or underscores")
        if not (self.gaps or self.lower):
            raise DatasetError("respell: say how: with spaces, with underscores, in lower case")
        if self.exceptions:
            check_tags("except", self.exceptions)

    def words(self) -> Iterable[str]:
        return [
            f"with {self.gaps}" if self.gaps else "",
            "in lower case" if self.lower else "",
            f"except {listed_texts(self.exceptions)}" if self.exceptions else "",
        ]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        return {
            "gaps": words.one_of("spaces", "underscores") if words.accept("with") else "",
            "lower": words.accept("in", "lower", "case"),
            "exceptions": words.texts() if words.accept("except") else (),
        }

    def tag_editor(self, look: Look) -> TagEditor:
        excepted = look.finder(self.exceptions)
        tables: dict[tuple[int, str], Table] = {}  # per options, which all live as long as the dataset

        def edit(line: TagList) -> None:
            options = line.options
            for gaps in (self.gaps, ""):  # sentences keep theirs
                if (id(options), gaps) not in tables:
                    spelled = partial(self._spelled, options=options, gaps=gaps, excepted=excepted)
                    tables[id(options), gaps] = Table(spelled)
                new = [*map(tables[id(options), gaps].__getitem__, line.tags)]
                if not gaps or new == line.tags or not is_prose(_single_names(line)):
                    break
            line.tags = new

        return edit

    def _spelled(self, tag: str, options: CaptionOptions, gaps: str, excepted: Finder) -> str:
        opening, inner, closing = unwrapped(tag) if options.weighted else ("", tag, "")
        pieces = members(inner, options)
        if len(pieces) > 1:
            parts = [core(piece) if index % 2 == 0 else (piece, "", "") for index, piece in enumerate(pieces)]
            inner = "".join(f"{a}{self._spelled(b, options, gaps, excepted) if b else ''}{c}" for a, b, c in parts)
            return f"{opening}{inner}{closing}"
        name = name_of(inner)
        smiley = is_emoticon(inner) or len(NO_LETTER.sub("", inner)) <= 1 < len(inner)
        triggers = tags(options.trigger, options.separator)
        known = any(begins_with(name, part, options.separator) for part in triggers) or UNTOUCHED.match(name)
        if excepted(name) or smiley or known:
            return tag
        if gaps == "spaces" and "_" in inner:
            inner = " ".join(inner.replace("_", " ").split())
        elif gaps == "underscores":
            inner = "_".join(inner.split())
        return f"{opening}{inner.lower() if self.lower else inner}{closing}"


# -- implied tags


@dataclass(frozen=True)
class RemoveImplied(TagOperation):
    """Without the tags that others of the same caption say already: the user's table, and ends of tags.

    Sentences and triggers are left alone.
    """

    OPENING = "remove implied"
    SYNTAX = "remove implied"

    def tag_editor(self, look: Look) -> TagEditor:
        implied = Table(lambda name: implications_of(name, look.known.tags) - {name})

        def edit(line: TagList) -> None:
            names = _plain_names(line, look)
            trigger = plain(line.options.trigger)
            gone = {*names}.intersection(*[{*chain.from_iterable(implied[name] for name in names if name != trigger)}])
            if gone - {trigger} and not is_prose(names):
                line.keep([name not in gone or name == trigger for name in names])

        return edit


@dataclass(frozen=True)
class AddImplied(TagOperation):
    """With all that the tags of a caption imply, by the user's table, at the end."""

    OPENING = "add implied"
    SYNTAX = "add implied"

    def tag_editor(self, look: Look) -> TagEditor:
        known = look.known.tags
        if not known.implications:
            raise DatasetError(f"{self.OPENING}: no implications are known; choose a table of them under implications")
        implied = Table(known.implied)

        def edit(line: TagList) -> None:
            names = _plain_names(line, look)
            found = sorted({*chain.from_iterable(implied[name] for name in names)}.difference(names))
            line.insert(len(names), [*map(literal, found)] if line.options.weighted else found)

        return edit


def _plain_names(line: TagList, look: Look) -> list[str]:
    """Names of tags as the tables have them: underscores are spaces."""
    return [plain(name) if "_" in name else name for name in look.names(line)]


def _single_names(line: TagList) -> list[str]:
    """The same with groups in brackets as the tags they consist of."""
    options = line.options
    if not (options.weighted or options.wildcards):
        return [*map(plain, line.tags)]
    return [plain(piece) for tag in line.tags for piece in members(bare(tag, options), options)[::2]]


# -- weights


@dataclass(frozen=True)
class SetWeight(TagOperation):
    OPENING = "set weight"
    SYNTAX = 'set weight 1.2 on "tag", …'
    weight: float
    tags: tuple[str, ...]

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= HEAVIEST or round(self.weight, 3) != self.weight:
            raise DatasetError(f"weight is {self.weight!r}, expected 0 to {HEAVIEST:g} with at most three decimals")
        check_tags("set weight", self.tags)

    def words(self) -> Iterable[str]:
        return [f"{self.weight:g}", "on", listed_texts(self.tags)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        weight = words.number(r"[0-9]{1,2}(?:\.[0-9]{1,3})?", "a weight, e.g. 1.2")
        words.expect("on")
        return {"weight": float(weight), "tags": words.texts()}

    def tag_editor(self, look: Look) -> TagEditor:
        return _weighing(look, self.tags, f"{self.weight:g}")


@dataclass(frozen=True)
class ClearWeight(TagOperation):
    OPENING = "clear weight"
    SYNTAX = 'clear weight on "tag", …'
    tags: tuple[str, ...]

    def __post_init__(self) -> None:
        check_tags("clear weight", self.tags)

    def words(self) -> Iterable[str]:
        return ["on", listed_texts(self.tags)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        words.expect("on")
        return {"tags": words.texts()}

    def tag_editor(self, look: Look) -> TagEditor:
        return _weighing(look, self.tags, "")


def _weighing(look: Look, patterns: tuple[str, ...], weight: str) -> TagEditor:
    fits = look.finder(patterns)

    def weighed(tag: str, weighted: bool) -> str:
        _, inner, _ = unwrapped(tag)
        if not fits(name_of(inner)):
            return tag
        if weight and not weighted:
            look.note("weighted is off in Caption Settings, so weights are read as they stand; switch it on")
            inner = literal(inner)
        return f"({inner}:{weight})" if weight else inner

    tables = {weighted: Table(partial(weighed, weighted=weighted)) for weighted in (False, True)}

    def edit(line: TagList) -> None:
        line.tags = [*map(tables[line.options.weighted].__getitem__, line.tags)]

    return edit
