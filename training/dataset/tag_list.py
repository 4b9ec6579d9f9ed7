"""A caption as its tags and what stands between them, so that an edit changes nothing else.

- all separators of a concept's captions divide tags: its own, ``keep_tokens_separator``, ``secondary_separator``, line
  breaks; what stands between two tags stays there with its white space
- where captions are weighted or have wildcards, ``(a, b:1.2)`` and ``{a, b|c}`` are one tag
- a tag that goes takes the weaker of its two neighbours' separators along, so that groups and lines stay apart, and
  what was put in and taken out again leaves the caption as it was
- ``edited``: a caption's lines are edited one by one where one of them is shown, else all together
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import compress

from .model import CaptionOptions
from .tag_text import NO_LETTER, name_of, unescaped

NUMBER = re.compile(r"[0-9]{1,4}(?:\.[0-9]{0,6})?|\.[0-9]{1,6}")
MOST_BRACKETS = 10  # around one tag that are looked through
SECONDARY, SEPARATOR, LINE, MARK = range(4)  # how strongly tags are divided
PAIRS = {"(": ")"}  # that weigh; the host takes others as text
BRACKET = re.compile(r"\\.|[()]", re.DOTALL)


class TagList:
    """Tags in order, and the text in front of, between and behind them."""

    def __init__(self, text: str, options: CaptionOptions) -> None:
        self.options = options
        self.between = f"{options.separator.rstrip()} "  # what is put between tags
        self.tags: list[str] = []
        self.joints: list[str] = []  # one more than tags
        if not self._read_plain(text):
            self._read(text)

    def _read_plain(self, text: str) -> bool:
        """The same for captions as most are, ten times as fast: one space behind each separator and nothing else."""
        options = self.options
        if options.wildcards or options.weighted or options.keep_tokens_separator or options.secondary_separator:
            return False
        tags = text.split(self.between)
        if "\n" in text or text.count(options.separator) != len(tags) - 1 or [*map(str.strip, tags)] != tags:
            return False
        if "" in tags:
            return False
        self.tags = tags
        self.joints = ["", *[self.between] * (len(tags) - 1), ""]
        return True

    def _read(self, text: str) -> None:
        options, joint = self.options, ""
        for index, part in enumerate(_parts(text, options)):
            tag = part.strip()
            if index % 2 or not tag:
                joint += part
            elif tag == part:
                self.joints.append(joint)
                self.tags.append(part)
                joint = ""
            else:
                start = len(part) - len(part.lstrip())
                self.joints.append(joint + part[:start])
                self.tags.append(tag)
                joint = part[start + len(tag) :]
        self.joints.append(joint)

    @property
    def text(self) -> str:
        pieces = [*self.joints, *self.tags]
        pieces[::2], pieces[1::2] = self.joints, self.tags
        return "".join(pieces)

    def rank(self, joint: str) -> int:
        options = self.options
        if options.keep_tokens_separator and options.keep_tokens_separator in joint:
            return MARK
        if "\n" in joint:
            return LINE
        secondary = options.secondary_separator
        return SECONDARY if secondary and secondary in joint and not self._ordinary(joint) else SEPARATOR

    @property
    def plain(self) -> bool:
        """Whether nothing but the usual stands between tags."""
        options = self.options
        marked = options.keep_tokens_separator or options.secondary_separator
        return not marked and self.joints[1:-1].count(self.between) == len(self.tags) - 1

    def _ordinary(self, joint: str) -> bool:
        return self.options.separator in joint.replace(self.options.secondary_separator, "")

    def delete(self, index: int) -> None:
        before, behind = self.joints[index], self.joints[index + 1]
        if len(self.tags) == 1:
            joint = self._alone(before + behind)
        elif index == 0:
            joint = before + (behind if self.rank(behind) == MARK else "")
            joint = joint if before else joint.lstrip()  # as it is read from a file
        elif index == len(self.tags) - 1:
            joint = (before if self.rank(before) == MARK else "") + behind
            joint = joint if behind else joint.rstrip()
        elif self.rank(before) == self.rank(behind) == MARK:
            joint = before + behind
        else:
            joint = behind if self.rank(behind) > self.rank(before) else before
        del self.tags[index]
        self.joints[index : index + 2] = [joint]

    def _alone(self, joint: str) -> str:
        """What stands where no tag is, unless that is nothing but separators."""
        return joint if joint.strip(self.options.separator + " \t\r\n") else ""

    def keep(self, stays: Sequence[bool]) -> None:
        """Take out the tags that do not stay."""
        if any(stays) and self.plain:
            self.tags = [*compress(self.tags, stays)]
            self.joints[1:-1] = [self.between] * (len(self.tags) - 1)
            return
        for index in reversed(range(len(stays))):
            if not stays[index]:
                self.delete(index)

    def insert(self, index: int, tags: Sequence[str]) -> None:
        """Put tags in front of the one at ``index``, or at the end."""
        if not tags:
            return
        count, between = len(self.tags), self.between
        if not count:
            self.joints = [self._alone(self.joints[0]), *[between] * (len(tags) - 1), ""]
        elif index >= count:
            self.joints[count:count] = [between] * len(tags)
        else:
            inside = 0 < index and self.rank(self.joints[index]) == SECONDARY
            joint = self.options.secondary_separator if inside else between
            self.joints[index + 1 : index + 1] = [joint] * len(tags)
        self.tags[index:index] = tags

    def insert_behind(self, index: int, tags: Sequence[str]) -> None:
        """Put tags behind the one at ``index``, in its line."""
        if index + 1 < len(self.tags) and self.rank(self.joints[index + 1]) >= LINE:
            self.joints[index + 1 : index + 1] = [self.between] * len(tags)
            self.tags[index + 1 : index + 1] = tags
        else:
            self.insert(index + 1, tags)

    def replace(self, index: int, tags: Sequence[str]) -> None:
        """Put tags in the place of one; without any, it is deleted."""
        if not tags:
            self.delete(index)
            return
        self.tags[index] = tags[0]
        self.insert_behind(index, tags[1:])

    def sort(self, key: Callable[[str], object], fixed: int) -> None:
        """Sort all but the first ``fixed`` tags: each line for itself, what is joined stays together.

        Around marks of ``keep_tokens_separator``, only what varies is sorted.
        """
        count, mark = len(self.tags), self.options.keep_tokens_separator
        if self.plain:
            self.tags[fixed:] = sorted(self.tags[fixed:], key=key)  # type: ignore[arg-type]
            return
        ranks = [self.rank(self.joints[index]) for index in range(1, count)]
        marks = [index for index, joint in enumerate(self.joints) for _ in range(mark and joint.count(mark) or 0)]
        first = max(fixed, marks[0] if marks else 0)
        last = marks[1] if len(marks) > 1 else count
        groups: list[tuple[int, int]] = []  # that may be exchanged, from and to
        start = 0
        for index in range(1, count + 1):
            rank = ranks[index - 1] if index < count else LINE
            if rank == SECONDARY:
                continue
            if first <= start < last:
                groups.append((start, index))
            start = index
            if rank >= LINE:
                self._reorder(groups, key)
                groups = []

    def _reorder(self, groups: list[tuple[int, int]], key: Callable[[str], object]) -> None:
        if len(groups) < 2:
            return
        order = sorted(groups, key=lambda group: key(self.tags[group[0]]))  # type: ignore[arg-type,return-value]
        if order == groups:
            return
        joints = [self.joints[start] for start, _ in groups]  # stay in place
        tags = [tag for start, end in order for tag in self.tags[start:end]]
        inner = [[joint, *self.joints[start + 1 : end]] for joint, (start, end) in zip(joints, order, strict=True)]
        first, last = groups[0][0], groups[-1][1]
        self.tags[first:last] = tags
        self.joints[first:last] = [joint for part in inner for joint in part]


@lru_cache(64)
def _marks(*marks: str) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, sorted({"\n", *marks} - {""}, key=len, reverse=True))) + ")")


def _parts(text: str, options: CaptionOptions) -> list[str]:
    """Pieces and the marks between them in turn."""
    pattern = _marks(options.separator, options.keep_tokens_separator, options.secondary_separator)
    parts = pattern.split(text)
    if options.wildcards and "{" in text:
        parts = _whole(parts, lambda part: part.count("{") - part.count("}"))
    if options.weighted and "(" in text:
        parts = _whole(parts, _brackets)
    return parts


def members(group: str, options: CaptionOptions) -> list[str]:
    """Pieces and the marks between them in turn, of what stands in one pair of brackets; one piece is no group."""
    marks = [options.separator, options.keep_tokens_separator, options.secondary_separator]
    return _marks(*marks, *["|"] * (options.wildcards and "{" in group)).split(group)


def core(member: str) -> tuple[str, str, str]:
    """(what is in front, the tag, what is behind) of a piece of a group, which brackets may begin or end in."""
    tag = member.strip()
    while tag[:1] in ("(", "{") and _open(tag) > 0:
        tag = tag[1:].lstrip()
    while tag[-1:] in (")", "}") and _open(tag) < 0:
        inner, colon, number = tag[:-1].rpartition(":")
        tag = (inner if tag[-1] == ")" and colon and NUMBER.fullmatch(number.strip()) else tag[:-1]).rstrip()
    start = member.index(tag)
    return member[:start], tag, member[start + len(tag) :]


def _open(text: str) -> int:
    return _brackets(text) + text.count("{") - text.count("}")


def _brackets(part: str) -> int:
    return sum({"(": 1, ")": -1}.get(bracket, 0) for bracket in BRACKET.findall(part))


def _whole(parts: list[str], opened: Callable[[str], int]) -> list[str]:
    """The same with pieces put together from where a bracket opens to where it closes; one that never does is text."""
    joined: list[str] = []
    held: list[str] = []
    depth = 0
    for index, part in enumerate(parts):
        if not index % 2:
            depth = max(0, depth + opened(part))
        held.append(part)
        if not index % 2 and not depth:
            joined.append("".join(held))
            held = []
        elif index % 2 and len(held) == 1:
            joined += held
            held = []
    return joined + held


def edited(caption: str, options: CaptionOptions, edit: Callable[[TagList], None]) -> str:
    """The caption with its tags edited; a line of which no tag is left goes too."""
    if options.lines == "all" or "\n" not in caption:
        return _edited(caption, options, edit)
    lines = []
    for line in caption.split("\n"):
        new = _edited(line, options, edit) if line.strip() else line
        if new or not line.strip():
            lines.append(new)
    return "\n".join(lines)


def _edited(text: str, options: CaptionOptions, edit: Callable[[TagList], None]) -> str:
    line = TagList(text, options)
    edit(line)
    return line.text


# -- weights


def unwrapped(tag: str) -> tuple[str, str, str]:
    """(opening brackets, the tag, weight and closing brackets) of ``((tag:1.2))``; around mere signs they are text."""
    start, end = 0, len(tag)
    while (
        start < MOST_BRACKETS
        and end - start > 2
        and PAIRS.get(tag[start]) == tag[end - 1]
        and _pairs_up(tag[start:end])
    ):
        start, end = start + 1, end - 1
    if start and not NO_LETTER.sub("", tag[start:end]):
        return "", tag, ""
    inner, colon, number = tag[start:end].rpartition(":")
    if start and colon and inner.strip() and NUMBER.fullmatch(number.strip()):
        end = start + len(inner)
    return tag[:start], tag[start:end], tag[end:]


def _pairs_up(text: str) -> bool:
    """Whether the first bracket is closed by the last character."""
    opening, closing = text[0], text[-1]
    depth, at = 0, 0
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        depth += (text[at] == opening) - (text[at] == closing)
        if depth == 0:
            return at == len(text) - 1
        at += 1
    return False


def bare(tag: str, options: CaptionOptions) -> str:
    """The tag without its weight, where captions are weighted."""
    return unwrapped(tag)[1] if options.weighted and tag[:1] in PAIRS else tag


def tag_name(tag: str, options: CaptionOptions) -> str:
    """What makes two tags the same: neither case, escapes nor weights do."""
    return name_of(bare(tag, options))


def exactly(tag: str) -> str:
    """The pattern that fits this tag alone: its * and ? taken as they are."""
    return re.sub(r"[*?\\]", r"\\\g<0>", unescaped(tag))
