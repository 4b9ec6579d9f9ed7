"""Edits of captions as text: set, split, join, replace, tidy up. Each is one ``Operation``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .bounded_patterns import Budget, Pattern, Template
from .captions import joined_lines
from .edit_words import Words, quoted
from .model import Concept, DatasetError, Sample
from .operations import Editor, Look, Operation, Table, TagEditor, TagOperation, check_pattern, check_text
from .tag_list import LINE, MARK, TagList, edited

Change = Callable[[str], str]


@dataclass(frozen=True)
class SetCaption(Operation):
    """One text as the whole caption."""

    OPENING = "set caption"
    SYNTAX = 'set caption "text"'
    text: str

    def __post_init__(self) -> None:
        check_text("set caption", self.text)

    def words(self) -> Iterable[str]:
        return [quoted(self.text)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        return {"text": words.text()}

    def editor(self, look: Look) -> Editor:
        return lambda sample, concept: self.text


@dataclass(frozen=True)
class SplitTags(TagOperation):
    """Tags, or sentences, divided where a text stands in them; the text goes."""

    OPENING = "split tags"
    SYNTAX = 'split tags at "text"'
    mark: str

    def __post_init__(self) -> None:
        check_pattern("split tags at", self.mark)

    def words(self) -> Iterable[str]:
        return ["at", quoted(self.mark)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        words.expect("at")
        return {"mark": words.text()}

    def tag_editor(self, look: Look) -> TagEditor:
        def edit(line: TagList) -> None:
            for index in reversed(range(len(line.tags))):
                tag = line.tags[index]
                if self.mark in tag:
                    line.replace(index, [part.strip() for part in tag.split(self.mark) if part.strip()])

        return edit


@dataclass(frozen=True)
class JoinTags(TagOperation):
    """The tags of a line as one text; marks of keep_tokens_separator and line breaks stay."""

    OPENING = "join tags"
    SYNTAX = 'join tags with "text"'
    joint: str

    def __post_init__(self) -> None:
        check_text("join tags with", self.joint)

    def words(self) -> Iterable[str]:
        return ["with", quoted(self.joint)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        words.expect("with")
        return {"joint": words.text()}

    def tag_editor(self, look: Look) -> TagEditor:
        def edit(line: TagList) -> None:
            for index in range(1, len(line.tags)):
                if line.rank(line.joints[index]) < LINE:
                    line.joints[index] = self.joint

        return edit


@dataclass(frozen=True)
class JoinLines(Operation):
    """All lines as one, as captions are shown whose lines are joined."""

    OPENING = "join lines"
    SYNTAX = "join lines"

    def editor(self, look: Look) -> Editor:
        def edit(sample: Sample, concept: Concept) -> str:
            lines = [line.strip() for line in sample.caption.split("\n") if line.strip()]
            if "\n" not in sample.caption:
                return sample.caption
            return joined_lines(lines, concept.captions.separator) if lines else ""

        return edit


@dataclass(frozen=True)
class Tidy(TagOperation):
    """Without empty tags and double spaces; one space behind each separator, none around a caption or line."""

    OPENING = "tidy"
    SYNTAX = "tidy"

    def tag_editor(self, look: Look) -> TagEditor:
        def edit(line: TagList) -> None:
            if any("  " in tag or not tag.isprintable() for tag in line.tags):
                line.tags = [" ".join(tag.split()) for tag in line.tags]
            line.joints = [self._tidied(line, index) for index in range(len(line.joints))]

        return edit

    @staticmethod
    def _tidied(line: TagList, index: int) -> str:
        joint, rank = line.joints[index], line.rank(line.joints[index])
        if rank == MARK:
            mark = line.options.keep_tokens_separator
            spaced = f" {mark}" * joint.count(mark) + " "
            return spaced.lstrip() if index == 0 else spaced.rstrip() if index == len(line.tags) else spaced
        if not 0 < index < len(line.tags):
            return ""
        if rank == LINE:
            return "\n"
        return line.options.secondary_separator if rank < line.rank(line.between) else line.between


@dataclass(frozen=True)
class ReplaceText(Operation):
    """A text by another one, wherever it stands in a caption; capitals matter."""

    OPENING = "replace text"
    SYNTAX = 'replace text "old" with "new"'
    old: str
    new: str

    def __post_init__(self) -> None:
        check_pattern("replace text", self.old)
        check_text("with", self.new)

    def words(self) -> Iterable[str]:
        return [quoted(self.old), "with", quoted(self.new)]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        old = words.text()
        words.expect("with")
        return {"old": old, "new": words.text()}

    def editor(self, look: Look) -> Editor:
        return lambda sample, concept: sample.caption.replace(self.old, self.new)


@dataclass(frozen=True)
class ReplacePattern(Operation):
    """What a regular expression fits, in each tag or in the whole caption; a tag that gets empty goes."""

    OPENING = "replace pattern"
    SYNTAX = r'replace pattern "(\w+) hair" with "hair: \1" in tags | in captions'
    pattern: str
    new: str
    within: str = "tags"

    def __post_init__(self) -> None:
        check_text("replace pattern", self.pattern)
        check_text("with", self.new)
        if self.within not in ("tags", "captions"):
            raise DatasetError(f"replace pattern in {self.within!r} is unknown; use tags or captions")
        self._change(Budget())  # faults of the pattern are found where it is written

    def _change(self, budget: Budget) -> Change:
        pattern = Pattern(self.pattern)
        template = Template(self.new, pattern.groups)
        return lambda text: pattern.replaced(text, template, budget)

    def words(self) -> Iterable[str]:
        return [quoted(self.pattern), "with", quoted(self.new), f"in {self.within}"]

    @classmethod
    def read(cls, words: Words) -> dict[str, Any]:
        pattern = words.text()
        words.expect("with")
        new = words.text()
        words.expect("in")
        return {"pattern": pattern, "new": new, "within": words.one_of("tags", "captions")}

    def editor(self, look: Look) -> Editor:
        change = self._change(Budget())
        if self.within == "captions":
            return lambda sample, concept: change(sample.caption)
        known = Table(lambda tag: change(tag).strip())  # a tag is on many images

        def edit(line: TagList) -> None:
            new = [*map(known.__getitem__, line.tags)]
            if new != line.tags:
                line.tags = [tag or old for tag, old in zip(new, line.tags, strict=True)]
                if not all(new):
                    line.keep([*map(bool, new)])

        return lambda sample, concept: edited(sample.caption, concept.captions, edit)
