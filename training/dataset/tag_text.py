"""Captions as text: their tags, and edits that leave everything else in them as it was written.

- ``tags`` splits at the separator and at line breaks; sentences are one tag each
- ``rewrite``, ``remove_tag``, ``move_first`` and ``canonical`` keep order, whitespace and line breaks of the rest
- ``begins_with``: a caption "ohwx man on a beach" begins with the trigger "ohwx man", "ohwx manor" does not
- ``literal``: brackets that the host's prompt parser leaves alone
- ``Glob``: * and ? in time that grows with the text, however hostile the pattern; case makes no difference

Line breaks divide a caption into lines that may be shown in turn, so each edit looks at one line at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from functools import lru_cache
from itertools import chain

BARE_BRACKET = re.compile(r"(?<!\\)[()]")  # the host takes every bracket behind a backslash as read, even behind two
ESCAPED_BRACKET = re.compile(r"\\+([()])")  # also escaped twice, as captions that went through JSON may be
NO_LETTER = re.compile(r"[\W_]")


def tags(caption: str, separator: str = ",") -> list[str]:
    """The tags of a caption in order, without the empty ones."""
    pieces = chain.from_iterable(line.split(separator) for line in caption.split("\n"))
    return [*filter(None, map(str.strip, pieces))]


def literal(text: str) -> str:
    """The text with its brackets escaped for the host's prompt parser, so that nothing is weighted.

    Brackets that are escaped already stay as they are: ``miku_(vocaloid)`` and ``miku_\\(vocaloid\\)`` read the same.
    A word ``embedding:name`` still names an embedding: whoever writes that means it.
    """
    return BARE_BRACKET.sub(r"\\\g<0>", text)


def unescaped(text: str) -> str:
    return ESCAPED_BRACKET.sub(r"\1", text)


@lru_cache(1 << 15)  # a tag is on many pictures
def name_of(tag: str) -> str:
    """What makes two tags the same: neither case nor escapes do."""
    return unescaped(tag).strip().lower()


def begins_with(caption: str, tag: str, separator: str = ",") -> bool:
    """Whether the caption's first words are those of ``tag``, which may have several parts."""
    parts = tags(name_of(tag), separator)
    first = tags(name_of(caption), separator)[: len(parts)]
    if not parts or len(first) < len(parts) or first[:-1] != parts[:-1]:
        return not parts
    return re.match(re.escape(parts[-1]) + r"(?!\w)", first[-1]) is not None


def rewrite(caption: str, change: Callable[[str], str | None], separator: str = ",") -> str:
    """The caption with each tag replaced by ``change(tag)``, or left out where that is None."""
    lines = (_rewrite_line(line, change, separator) for line in caption.split("\n"))
    return "\n".join(line for line in lines if line is not None)


def _rewrite_line(line: str, change: Callable[[str], str | None], separator: str) -> str | None:
    """As ``rewrite``; None for a line of which no tag is left."""
    written, removed = [], False
    for piece in line.split(separator):
        tag = piece.strip()
        new = change(tag) if tag else tag
        if new is None:
            removed = True
        else:
            written.append(piece if new == tag else piece.replace(tag, new, 1))
    if not removed:
        return separator.join(written)
    rest = separator.join(written).lstrip()
    indent = line[: len(line) - len(line.lstrip())]
    return indent + rest if rest.strip(separator + " \t\r") else None


def remove_tag(caption: str, tag: str, separator: str = ",") -> str:
    """The caption without each tag of that name."""
    name = name_of(tag)
    return rewrite(caption, lambda other: None if name_of(other) == name else other, separator)


def move_first(caption: str, tag: str, separator: str = ",") -> str:
    """The caption with ``tag`` in front, moved or put there; unchanged where it begins with it."""
    if begins_with(caption, tag, separator):
        return caption
    for part in tags(tag, separator):
        caption = remove_tag(caption, part, separator)
    return f"{tag.strip()}{separator} {caption.lstrip()}" if caption.strip() else tag.strip()


def canonical(caption: str, separator: str = ",", *, keep: Collection[str] = (), weighted: bool = False) -> str:
    """Tags as captions spell them: spaces for underscores, brackets bare, each tag once per line.

    Emoticons such as ``^_^`` keep their underscore, tags in ``keep`` (a trigger) everything, and ``weighted`` captions
    their escapes, which mean something there.
    """
    kept = {name_of(tag) for tag in keep}

    def spelled(tag: str) -> str:
        if name_of(tag) in kept:
            return tag
        tag = tag if weighted else unescaped(tag)
        return tag if is_emoticon(tag) else " ".join(tag.replace("_", " ").split()) if "_" in tag else tag

    def once() -> Callable[[str], str | None]:
        seen: set[str] = set()

        def change(tag: str) -> str | None:
            new = spelled(tag)
            if name_of(new) in seen:
                return None
            seen.add(name_of(new))
            return new

        return change

    return "\n".join(rewrite(line, once(), separator) for line in caption.split("\n"))


def is_emoticon(tag: str) -> bool:
    """``^_^``, ``o_o``, ``(o)_(o)``, ``|_|``: no side of the underscores has more than one letter or digit."""
    return "_" in tag and all(len(NO_LETTER.sub("", side)) <= 1 for side in tag.split("_"))


class Glob:
    """A pattern in which * is any text and ? any character; a backslash in front of either (or itself) takes it as is.

    Text between two * has a fixed length, so the first place where it fits is always good enough and nothing is tried
    twice: regular expressions with a ``.*`` for each * take exponential time for a pattern such as a*a*a*b.
    """

    def __init__(self, pattern: str, *, anywhere: bool = False) -> None:
        pieces = re.findall(r"\\[*?\\]|.", pattern.lower(), re.DOTALL)
        runs: list[list[str]] = [[]]
        for piece in ("*", *pieces, "*") if anywhere else pieces:
            if piece == "*":
                runs.append([])
            else:
                runs[-1].append("." if piece == "?" else re.escape(piece[-1]))
        self._runs = [re.compile("".join(run), re.DOTALL) for run in runs]
        self._last_length = len(runs[-1])

    def fits(self, text: str) -> bool:
        """Whether the whole text is as the pattern says."""
        text = text.lower()
        first, *others = self._runs
        if not others:
            return first.fullmatch(text) is not None
        end, found = len(text) - self._last_length, first.match(text)
        for run in others[:-1]:
            found = found and run.search(text, found.end())
        return found is not None and found.end() <= end and others[-1].match(text, end) is not None
