"""What edits of captions have in common: one edit is a value, a line of text, and a pure function of a dataset.

- ``Operation.apply(dataset)``: a new dataset and the ``Change``: how many captions, whose, and what had no effect
- ``Operation.line``: the edit as a line of an edit program, which reads back as the same edit
- ``Selection``: the samples an edit looks at: by a filter, by ids, or all of them, regularisation images too
- ``Finder``: tags by name, with * and ? as wildcards; remembers which names no caption has
- ``Draft``: captions while many edits follow each other, without a dataset for each
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, ClassVar

from .edit_words import FILTER, Words, listed_texts
from .filters import LONGEST as LONGEST_FILTER
from .filters import CountTokens, parse_filter, select
from .lint import lint
from .lint_knowledge import TagKnowledge
from .lint_rules import RULES, Finding
from .model import CaptionOptions, Concept, Dataset, DatasetError, Sample, listed
from .tag_list import TagList, bare, edited, tag_name
from .tag_text import BARE_BRACKET, Glob, literal, unescaped

LONGEST_TEXT = 20_000  # characters of one text in an edit, and of what a caption may grow to
MOST_TEXTS = 1_000  # tags in one list
MOST_IDS = 200_000
NEAR_AMONG = 2_000  # names that the nearest is looked for among

LINE_BREAK = re.compile(r"\r+\n")
BOM, WHITE = "\ufeff", " \t\r\n"

SPELLINGS = CaptionOptions(), CaptionOptions(weighted=True)

Editor = Callable[[Sample, Concept], Any]  # a caption, or what else of a sample an edit is about
TagEditor = Callable[[TagList], None]


# -- what edits may know besides the dataset


def quick_findings(dataset: Dataset, where: str) -> list[Finding]:
    """What the quick check finds, for a filter with ``lint:``; DatasetError for rules that need the pixels."""
    rules = parse_filter(where).rules
    slow = [rule for rule in rules if RULES[rule].needs == "pixels"]
    if slow:
        raise DatasetError(f"filter: lint:{slow[0]} needs the pixels, which are not looked at here; use tags or ids")
    return lint(dataset, rules=rules) if rules else []


@dataclass(frozen=True)
class Known:
    """Tables of the user's, tokens as the graph's CLIP counts them, and the findings that a filter asks for."""

    tags: TagKnowledge = field(default_factory=TagKnowledge)
    count_tokens: CountTokens | None = None
    findings: Callable[[Dataset, str], Iterable[Finding]] = quick_findings


@dataclass(frozen=True)
class Change:
    """What an edit did: the samples whose captions changed, of how many, and what of it had no effect."""

    ids: tuple[str, ...]
    selected: int
    notes: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.ids)

    @property
    def told(self) -> str:
        """``3 of 12 images change``."""
        all_of = "" if self.count == self.selected else f"{self.count} of "
        return f"{all_of}{self.selected} image{'s' * (self.selected != 1)} changed"


@dataclass(frozen=True)
class Selection:
    """Which samples: those that a filter selects, those of some ids, or all."""

    where: str = ""
    ids: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.where and self.ids:
            raise DatasetError("an edit is for a filter or for ids, not for both; leave one out")
        if self.where != self.where.strip() or "\n" in self.where or "\r" in self.where:
            raise DatasetError("filter: it has to be one line without spaces around it")
        check_text("filter", self.where, LONGEST_FILTER)
        parse_filter(self.where)
        check_texts("ids", self.ids, MOST_IDS, least=0)
        if len(set(self.ids)) < len(self.ids):
            twice = [name for name, count in Counter(self.ids).items() if count > 1]
            raise DatasetError(f"ids: given more than once: {listed(twice)}; give each id once")

    @property
    def line(self) -> str:
        return f"{FILTER} {self.where}" if self.where else f"for {listed_texts(self.ids)}" if self.ids else ""

    @staticmethod
    def read(words: Words) -> Selection:
        """What the rest of a line selects."""
        ids = words.texts() if words.accept("for") else ()
        words.ended()
        if words.filter == "":
            raise DatasetError(f"at its end: expected a filter behind {FILTER}, e.g. {FILTER} tag:cat")
        try:
            return Selection(words.filter or "", ids)
        except DatasetError as error:
            hint = "; a comment needs a line of its own" if " #" in (words.filter or "") else ""
            raise DatasetError(f"{error}{hint}") from None


def as_files_hold(caption: str) -> str:
    """The caption as it is read back from a file: one kind of line break, no byte order mark in front."""
    caption = LINE_BREAK.sub("\n", caption)
    return caption.lstrip(BOM + WHITE) if caption.lstrip(WHITE).startswith(BOM) else caption


def check_text(what: str, text: str, longest: int = LONGEST_TEXT) -> None:
    if not isinstance(text, str):
        raise DatasetError(f"{what} is of type {type(text).__name__}; give a text")
    if len(text) > longest:
        raise DatasetError(f"{what}: {len(text)} characters, at most {longest} are possible; use a shorter one")
    if "\0" in text or text.encode("utf-8", "ignore").decode() != text:
        raise DatasetError(f"{what}: {text[:40]!r} has characters that no text file holds; leave them out")


def check_texts(what: str, texts: Sequence[str], most: int = MOST_TEXTS, least: int = 1) -> None:
    if not isinstance(texts, tuple) or not least <= len(texts) <= most:
        raise DatasetError(f"{what}: expected {least} to {most} texts, found {len(texts)}")
    for text in texts:
        check_text(what, text)


def check_pattern(what: str, text: str) -> None:
    """A text to look for, which must not be empty."""
    check_text(what, text)
    if not text:
        raise DatasetError(f"{what}: the text to look for is empty; write one")


def check_tags(what: str, texts: Sequence[str]) -> None:
    check_texts(what, texts)
    for text in texts:
        if not text.strip() or text != text.strip() or "\n" in text:
            raise DatasetError(f"{what}: {text[:40]!r} is no tag; give one without spaces or line breaks around it")


EVERYTHING = Selection()


# -- looking at captions


class Table(dict[str, Any]):
    """What a function says of a text, asked once."""

    def __init__(self, says: Callable[[str], Any]) -> None:
        super().__init__()
        self._says = says

    def __missing__(self, text: str) -> Any:
        self[text] = value = self._says(text)
        return value


class Finder:
    """Whether a name is one of those that are looked for."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}  # name → pattern
        self._globs: list[tuple[str, Glob]] = []
        for pattern in patterns:
            name = unescaped(pattern)
            if any(letter in name for letter in "*?\\"):
                self._globs.append((pattern, Glob(name)))
            else:
                self._exact[name.strip().lower()] = pattern
        self._fits = Table(self._look)
        self._missing = {*self._exact.values(), *(pattern for pattern, _ in self._globs)}

    def __call__(self, name: str) -> bool:
        return self._fits[name]

    def all_of(self, names: Iterable[str]) -> list[bool]:
        return [*map(self._fits.__getitem__, names)]

    def _look(self, name: str) -> bool:
        fitting = {pattern for pattern, glob in self._globs if glob.fits(name)}
        fitting |= {self._exact[name]} if name in self._exact else set()
        self._missing -= fitting
        return bool(fitting)

    def notes(self) -> list[str]:
        """What fits no tag of the captions that were looked at, with the nearest."""
        if not self._missing:
            return []
        names = [*islice(self._fits, NEAR_AMONG)]
        return [f"no tag there fits {listed(self._told(pattern, names) for pattern in sorted(self._missing))}"]

    @staticmethod
    def _told(pattern: str, names: list[str]) -> str:
        near = difflib.get_close_matches(pattern.lower()[:100], names, 1)
        return f"“{pattern[:60]}”" + (f" (is “{near[0]}” meant?)" if near else "")


class Look:
    """What one run of one edit asks, and what it has to say."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft
        self.known = draft.known
        self._finders: list[Finder] = []
        self._notes: dict[str, None] = {}
        self._names = {options.weighted: Table(partial(tag_name, options=options)) for options in SPELLINGS}

    def finder(self, patterns: Iterable[str]) -> Finder:
        self._finders.append(Finder(patterns))
        return self._finders[-1]

    def note(self, text: str) -> None:
        self._notes[text] = None

    def note_brackets(self, new: Iterable[str], options: CaptionOptions) -> None:
        """Say so where brackets of a new tag's name weigh."""
        weighing = [tag for tag in new if options.weighted and BARE_BRACKET.search(bare(tag, options))]
        if weighing:
            self.note(
                f"captions are weighted, so brackets in {listed(weighing)} weigh what is in them: write "
                f"{listed(map(literal, weighing))} for brackets that are read"
            )

    def name(self, tag: str, options: CaptionOptions) -> str:
        """``tag_name``, worked out once for each tag."""
        return self._names[options.weighted][tag]

    def names(self, line: TagList) -> list[str]:
        return [*map(self._names[line.options.weighted].__getitem__, line.tags)]

    def notes(self) -> list[str]:
        return [*self._notes, *(note for finder in self._finders for note in finder.notes())]


# -- edits


@dataclass(frozen=True)
class Operation:
    """One edit of captions."""

    OPENING: ClassVar[str]  # the words its lines begin with
    SYNTAX: ClassVar[str]  # how its lines are written
    FIELD: ClassVar[str] = "caption"  # of samples, that it edits
    selection: Selection = field(default=EVERYTHING, kw_only=True)

    def editor(self, look: Look) -> Editor:
        """From a sample to its new caption, or what else ``FIELD`` names."""
        raise NotImplementedError

    def words(self) -> Iterable[str]:
        """What stands in its line between the opening and the selection."""
        return ()

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        """Its fields from the words behind the opening."""
        return {}

    @property
    def line(self) -> str:
        return " ".join(part for part in (self.OPENING, *self.words(), self.selection.line) if part)

    def __str__(self) -> str:
        return self.line

    def apply(self, dataset: Dataset, known: Known | None = None) -> tuple[Dataset, Change]:
        draft = Draft(dataset, known or Known())
        captions, change = draft.edits(self)
        draft.put(captions, self.FIELD)
        return draft.dataset, change


class TagOperation(Operation):
    """An edit of tags, line by line where lines are captions of their own."""

    def tag_editor(self, look: Look) -> TagEditor:
        raise NotImplementedError

    def editor(self, look: Look) -> Editor:
        edit = self.tag_editor(look)
        return lambda sample, concept: edited(sample.caption, concept.captions, edit)


def _with(sample: Sample, field: str, value: Any) -> Sample:
    """``dataclasses.replace``, five times as fast: an edit and its undo make one for every image."""
    new = object.__new__(Sample)
    facts = new.__dict__
    facts.update(sample.__dict__)
    facts[field] = value
    return new


class Draft:
    """A dataset whose captions are being edited."""

    def __init__(self, dataset: Dataset, known: Known) -> None:
        self.known = known
        self.samples = list(dataset.samples)
        self._dataset: Dataset | None = dataset
        self._origin = dataset
        self.place = {sample.id: index for index, sample in enumerate(dataset.samples)}

    @property
    def concepts(self) -> tuple[Concept, ...]:
        return self._origin.concepts

    @property
    def dataset(self) -> Dataset:
        if self._dataset is None:
            self._dataset = replace(self._origin, samples=tuple(self.samples))
        return self._dataset

    def put(self, new: Mapping[int, Any], field: str) -> None:
        for index, value in new.items():
            self.samples[index] = _with(self.samples[index], field, value)
        if new:
            self._dataset = None

    def indices(self, selection: Selection) -> tuple[Sequence[int], list[str]]:
        """The samples of a selection, and notes."""
        if selection.ids:
            gone = [name for name in selection.ids if name not in self.place]
            notes = [f"not in the dataset: {listed(gone)}"] if gone else []
            return [self.place[name] for name in selection.ids if name in self.place], notes
        if not selection.where:
            return range(len(self.samples)), []
        findings = self.known.findings(self.dataset, selection.where)
        found = select(self.dataset, selection.where, findings, self.known.count_tokens)
        return found, [] if found else ["the filter selects no image"]

    def edits(self, operation: Operation) -> tuple[dict[int, Any], Change]:
        """The captions, or what else an edit changes, by the indices of their samples; nothing is changed yet."""
        indices, notes = self.indices(operation.selection)
        look = Look(self)
        edit = operation.editor(look)
        new: dict[int, Any] = {}
        samples, concepts = self.samples, self.concepts
        for index in indices:
            sample = samples[index]
            value, old = edit(sample, concepts[sample.concept]), getattr(sample, operation.FIELD)
            if value != old:
                if isinstance(value, str) and ("\r" in value or BOM in value):
                    value = as_files_hold(value)
                    if value == old:
                        continue
                if isinstance(value, str) and len(value) > max(LONGEST_TEXT, len(old)):
                    raise DatasetError(
                        f"{sample.id}: its caption would have {len(value)} characters, at most {LONGEST_TEXT} are "
                        "possible; add less"
                    )
                new[index] = value
        if len(indices):
            notes += look.notes()
        return new, Change(tuple(samples[index].id for index in new), len(indices), tuple(notes))
