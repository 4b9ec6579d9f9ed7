"""Edits of which tags a caption has, and in which order: add, remove, rename, duplicates, move, sort, trigger.

Each is one ``Operation``: a pure function of a dataset, and a line of an edit program. Tags to look for may have * and
?, a backslash in front takes them as they are; neither case nor escaped brackets matter, nor weights where captions are
weighted. Whatever is not edited stays as it was written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import compress
from typing import Any, ClassVar

from .edit_words import Words, listed_texts, quoted
from .model import CaptionOptions, Concept, DatasetError, Sample
from .operations import SPELLINGS, Editor, Finder, Look, Table, TagEditor, TagOperation, check_tags
from .tag_list import TagList, edited, unwrapped
from .tag_text import begins_with, name_of, tags

MOST = 100_000  # positions and counts in a line
COUNT = r"[0-9]{1,6}"


def check_count(what: str, count: int) -> None:
    if type(count) is not int or not 0 <= count <= MOST:
        raise DatasetError(f"{what} is {count!r}, expected a whole number, 0 to {MOST}")


# -- places


@dataclass(frozen=True)
class Place:
    """Where in a caption: start, end, a position counted from 1, before or after a tag."""

    kind: str = "end"
    position: int = 0
    tag: str = ""

    KINDS: ClassVar[tuple[str, ...]] = ("start", "end", "position", "before", "after")

    def __post_init__(self) -> None:
        if self.kind not in self.KINDS:
            raise DatasetError(f"place: {self.kind!r} is unknown; use one of {', '.join(self.KINDS)}")
        check_count("position", self.position)
        if self.kind == "position" and not self.position:
            raise DatasetError(f"position is 0, expected 1 (the first) to {MOST}")
        if self.kind != "position" and self.position:
            raise DatasetError(f"place: {self.kind} has no position; leave {self.position} out")
        if self.kind in ("before", "after"):
            check_tags(self.kind, (self.tag,))
        elif self.tag:
            raise DatasetError(f"place: {self.kind} has no tag; leave {self.tag[:40]!r} out")

    def words(self, preposition: str) -> str:
        if self.kind in ("before", "after"):
            return f"{self.kind} {quoted(self.tag)}"
        return f"{preposition} {self.kind}" + (f" {self.position}" if self.kind == "position" else "")

    @staticmethod
    def read(words: Words, preposition: str) -> Place | None:
        """None where none is written."""
        for kind in ("before", "after"):
            if words.accept(kind):
                return Place(kind, 0, words.text())
        if not words.accept(preposition):
            return None
        kind = words.one_of("start", "end", "position")
        position = int(words.number(COUNT, "a position, 1 is the first")) if kind == "position" else 0
        return Place(kind, position)

    def finder(self, look: Look) -> Finder | None:
        return look.finder([self.tag]) if self.tag else None

    def target(self, names: list[str], finder: Finder | None) -> int | None:
        """The index this place stands for; None where the tag it is named after is not there."""
        if finder is None:
            return {"start": 0, "end": len(names)}.get(self.kind, min(self.position - 1, len(names)))
        return next((index for index, name in enumerate(names) if finder(name)), None)

    def put(self, line: TagList, index: int, new: list[str]) -> None:
        if self.kind == "after":
            line.insert_behind(index, new)
        else:
            line.insert(index, new)


END = Place()


def divided(new: Iterable[str], separator: str) -> list[str]:
    """Tags as the separator of captions divides them."""
    return [part for tag in new for part in tags(tag, separator)]


# -- adding and removing


@dataclass(frozen=True)
class Add(TagOperation):
    """New tags; those that a caption has already stay where they are."""

    OPENING = "add"
    SYNTAX = 'add "tag", … [at start | at end | at position 3 | before "tag" | after "tag"] [even if present]'
    tags: tuple[str, ...]
    place: Place = END
    again: bool = False

    def __post_init__(self) -> None:
        check_tags("add", self.tags)

    def words(self) -> Iterable[str]:
        place = [] if self.place == END else [self.place.words("at")]
        return [listed_texts(self.tags), *place, *["even if present"] * self.again]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        return {
            "tags": words.texts(),
            "place": Place.read(words, "at") or END,
            "again": words.accept("even", "if", "present"),
        }

    def tag_editor(self, look: Look) -> TagEditor:
        anchor = self.place.finder(look)
        parts = Table(partial(divided, self.tags))

        def edit(line: TagList) -> None:
            names = look.names(line)
            new = parts[line.options.separator]
            if not self.again:
                by_name: dict[str, str] = {}
                for tag in new:
                    by_name.setdefault(look.name(tag, line.options), tag)
                new = [by_name[name] for name in by_name if name not in names]
            index = self.place.target(names, anchor)
            if index is not None and new:
                look.note_brackets(new, line.options)
                self.place.put(line, index, new)

        return edit


@dataclass(frozen=True)
class Remove(TagOperation):
    OPENING = "remove"
    SYNTAX = 'remove "tag", …'
    tags: tuple[str, ...]

    def __post_init__(self) -> None:
        check_tags("remove", self.tags)

    def words(self) -> Iterable[str]:
        return [listed_texts(self.tags)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        return {"tags": words.texts()}

    def tag_editor(self, look: Look) -> TagEditor:
        fits = look.finder(self.tags)

        def edit(line: TagList) -> None:
            found = fits.all_of(look.names(line))
            if any(found):
                line.keep([not gone for gone in found])

        return edit


@dataclass(frozen=True)
class RemoveDuplicates(TagOperation):
    """Each tag once per caption, or per line where lines are captions of their own: the first one stays."""

    OPENING = "remove duplicates"
    SYNTAX = "remove duplicates"

    def tag_editor(self, look: Look) -> TagEditor:
        def edit(line: TagList) -> None:
            names = look.names(line)
            if len({*names}) < len(names):
                first = {name: index for index, name in reversed([*enumerate(names)])}
                line.keep([first[name] == index for index, name in enumerate(names)])

        return edit


@dataclass(frozen=True)
class Rename(TagOperation):
    """Other tags in the place of one; those that are there already are not put there twice."""

    OPENING = "rename"
    SYNTAX = 'rename "tag" to "tag", …'
    tag: str
    new: tuple[str, ...]

    def __post_init__(self) -> None:
        check_tags("rename", (self.tag,))
        check_tags("to", self.new)

    def words(self) -> Iterable[str]:
        return [quoted(self.tag), "to", listed_texts(self.new)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        tag = words.text()
        words.expect("to")
        return {"tag": tag, "new": words.texts()}

    def tag_editor(self, look: Look) -> TagEditor:
        fits = look.finder([self.tag])

        def edit(line: TagList) -> None:
            names = look.names(line)
            found = [*compress(range(len(names)), fits.all_of(names))]
            if not found:
                return
            new = {look.name(tag, line.options): tag for tag in divided(self.new, line.options.separator)}
            gone = {*found}
            others = {name for index, name in enumerate(names) if index not in gone}
            missing = [tag for name, tag in new.items() if name not in others]
            if gone.difference(found[:1]):
                line.keep([index == found[0] or index not in gone for index in range(len(names))])
            look.note_brackets(missing, line.options)
            opening, _, closing = unwrapped(line.tags[found[0]]) if line.options.weighted else ("", "", "")
            line.replace(found[0], [f"{opening}{tag}{closing}" for tag in missing])

        return edit


# -- order


@dataclass(frozen=True)
class Move(TagOperation):
    OPENING = "move"
    SYNTAX = 'move "tag", … to start | to end | to position 3 | before "tag" | after "tag"'
    tags: tuple[str, ...]
    place: Place

    def __post_init__(self) -> None:
        check_tags("move", self.tags)

    def words(self) -> Iterable[str]:
        return [listed_texts(self.tags), self.place.words("to")]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        moved, place = words.texts(), Place.read(words, "to")
        if place is None:
            words.expect("to")
        return {"tags": moved, "place": place}

    def tag_editor(self, look: Look) -> TagEditor:
        fits, anchor = look.finder(self.tags), self.place.finder(look)

        def edit(line: TagList) -> None:
            names = look.names(line)
            moves = fits.all_of(names)
            rest = [name for name, moved in zip(names, moves, strict=True) if not moved]
            index = self.place.target(rest, anchor)
            if index is None or not any(moves):
                return
            taken = [tag for tag, moved in zip(line.tags, moves, strict=True) if moved]
            stay = [tag for tag, moved in zip(line.tags, moves, strict=True) if not moved]
            at = index + (self.place.kind == "after")
            target = [*stay[:at], *taken, *stay[at:]]
            if target == line.tags:
                return  # also keeps its white space
            if line.plain:
                line.tags = target
                return
            line.keep([not moved for moved in moves])
            self.place.put(line, index, taken)

        return edit


@dataclass(frozen=True)
class Sort(TagOperation):
    """By name, or the most frequent of the dataset first; lines and joined tags stay together."""

    OPENING = "sort"
    SYNTAX = "sort by name | by frequency [keeping first 2]"
    by: str = "name"
    fixed: int = 0

    def __post_init__(self) -> None:
        if self.by not in ("name", "frequency"):
            raise DatasetError(f"sort by {self.by!r} is unknown; use name or frequency")
        check_count("sort: keeping first", self.fixed)

    def words(self) -> Iterable[str]:
        return ["by", self.by, f"keeping first {self.fixed}" if self.fixed else ""]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        words.expect("by")
        by = words.one_of("name", "frequency")
        fixed = words.number(COUNT, "how many tags stay") if words.accept("keeping", "first") else "0"
        return {"by": by, "fixed": int(fixed)}

    def tag_editor(self, look: Look) -> TagEditor:
        counts: Counter[str] = Counter()
        if self.by == "frequency":
            for sample in look.draft.samples:
                options = look.draft.concepts[sample.concept].captions
                counts.update({*look.names(TagList(sample.caption, options))})

        def keys(options: CaptionOptions) -> Table:
            return Table(lambda tag: (-counts[look.name(tag, options)], look.name(tag, options)))

        tables = {options.weighted: keys(options) for options in SPELLINGS}
        return lambda line: line.sort(tables[line.options.weighted].__getitem__, self.fixed)


@dataclass(frozen=True)
class PutTriggerFirst(TagOperation):
    """The trigger in front and nowhere else; without a text, that of the concept."""

    OPENING = "put trigger"
    SYNTAX = 'put trigger ["word"] first'
    trigger: str = ""

    def __post_init__(self) -> None:
        if self.trigger:
            check_tags("put trigger", (self.trigger,))

    def words(self) -> Iterable[str]:
        return [quoted(self.trigger) if self.trigger else "", "first"]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        trigger = words.text() if words.is_text else ""
        words.expect("first")
        return {"trigger": trigger}

    def editor(self, look: Look) -> Editor:
        known: dict[tuple[str, str], _Trigger] = {}

        def edit(sample: Sample, concept: Concept) -> str:
            options = concept.captions
            trigger = self.trigger or options.trigger
            if not trigger:
                where = f" of {concept.name}" if concept.name else ""
                look.note(f'no trigger{where} is set; write one: put trigger "ohwx" first')
                return sample.caption
            key = (trigger, options.separator)
            if key not in known:
                known[key] = _Trigger(*key)
            return edited(sample.caption, options, partial(known[key].put_first, look))

        return edit


class _Trigger:
    def __init__(self, trigger: str, separator: str) -> None:
        self.trigger, self.separator = trigger, separator
        self.parts = tags(trigger, separator)
        self.names = [*map(name_of, self.parts)]

    def put_first(self, look: Look, line: TagList) -> None:
        parts, wanted, names = self.parts, self.names, look.names(line)
        count = len(parts)
        begins = names[:count] == wanted or (
            names[count - 1 : count] != []
            and names[count - 1].startswith(wanted[-1])
            and begins_with(line.between.join(line.tags[:count]), self.trigger, self.separator)
        )
        if not begins and {*wanted}.isdisjoint(names):
            line.insert(0, parts)
            return
        kept = count if begins else 0
        stays = [index < kept or name not in wanted for index, name in enumerate(names)]
        written = {name: tag for name, tag in reversed([*zip(names, line.tags, strict=True)])}  # with its weight
        if not all(stays):
            line.keep(stays)
        if not begins:
            line.insert(0, [written.get(name, part) for name, part in zip(wanted, parts, strict=True)])
