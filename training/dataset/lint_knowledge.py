"""What the user's own tag tables know: counts, categories, aliases, implications. None ship with the pack.

- tag list: rows ``name,category,count,"alias,alias"`` without a header, as image boards' lists for completion are
- implications: rows ``antecedent,consequent`` or a board's export with a header (``antecedent_name``,
  ``consequent_name``, ``status``, of which the active rows count); followed transitively, and refused in circles

Names are compared in lower case, with spaces for underscores. Errors name the file, the line and the cure.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from .model import DatasetError
from .tag_text import is_emoticon, name_of

LARGEST = 64 << 20  # bytes; the largest lists known have 4 MB
ARTIST = 1  # category, on every board


@lru_cache(1 << 15)  # a tag is on many pictures
def plain(tag: str) -> str:
    """The one name of a tag: lower case, brackets bare, spaces for underscores except in emoticons."""
    name = name_of(tag)
    return name if "_" not in name or is_emoticon(name) else " ".join(name.replace("_", " ").split())


@dataclass(frozen=True)
class TagKnowledge:
    counts: Mapping[str, int] = field(default_factory=dict)
    categories: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)  # to the tag they stand for
    implications: Mapping[str, frozenset[str]] = field(default_factory=dict)  # direct ones

    def implied(self, tag: str) -> set[str]:
        """All tags that follow from one, however many steps away."""
        found: set[str] = set()
        ahead = [tag]
        while ahead:
            fresh = self.implications.get(ahead.pop(), frozenset()) - found
            found |= fresh
            ahead += fresh
        return found


def read_knowledge(tag_list: Path | None, implications: Path | None) -> TagKnowledge | None:
    """What the given files know; None where none is given."""
    if tag_list is None and implications is None:
        return None
    counts, categories, aliases = parse_tags(_content(tag_list), tag_list.name) if tag_list else ({}, {}, {})
    implied = parse_implications(_content(implications), implications.name) if implications else {}
    return TagKnowledge(counts, categories, aliases, implied)


def _content(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): check the file") from error
    if len(content) > LARGEST:
        raise DatasetError(f"{path} is larger than {LARGEST >> 20} MB: this is no tag list")
    return content


def parse_tags(content: bytes, name: str) -> tuple[dict[str, int], dict[str, int], dict[str, str]]:
    """(counts, categories, aliases) of a tag list."""
    counts: dict[str, int] = {}
    categories: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for line, row in _rows(content, name):
        if line == 1 and not _is_count(row[1:2]):
            raise DatasetError(f"{name}, line 1: expected name,category,count,aliases, found {','.join(row)[:60]!r}")
        if not (_is_count(row[1:2]) and _is_count(row[2:3])):
            raise DatasetError(f"{name}, line {line}: category and count of {row[0]!r} are no whole numbers")
        tag = plain(row[0])
        counts[tag], categories[tag] = int(row[2]), int(row[1])
        for alias in (row[3] if len(row) > 3 else "").split(","):
            if alias.strip():
                aliases.setdefault(plain(alias), tag)
    return counts, categories, {alias: tag for alias, tag in aliases.items() if alias not in counts}


def _is_count(cell: list[str]) -> bool:
    return bool(cell) and cell[0].strip().isdecimal() and len(cell[0]) < 16


def parse_implications(content: bytes, name: str) -> dict[str, frozenset[str]]:
    """Direct implications; DatasetError where they run in a circle."""
    found: dict[str, set[str]] = {}
    first, second, status = 0, 1, None
    for line, row in _rows(content, name):
        header = [cell.strip().lower() for cell in row]
        if line == 1 and {"antecedent_name", "consequent_name"} <= set(header):
            first, second = header.index("antecedent_name"), header.index("consequent_name")
            status = header.index("status") if "status" in header else None
            continue
        if line == 1 and header[:2] == ["antecedent", "consequent"]:
            continue
        if len(row) <= max(first, second, status or 0) or not (row[first].strip() and row[second].strip()):
            raise DatasetError(f"{name}, line {line}: expected antecedent,consequent, found {','.join(row)[:60]!r}")
        if status is None or row[status].strip() == "active":
            found.setdefault(plain(row[first]), set()).add(plain(row[second]))
    circle = _circle(found)
    if circle:
        raise DatasetError(f"{name}: these tags imply each other: {' → '.join(circle)}; remove one of the rows")
    return {tag: frozenset(implied) for tag, implied in found.items()}


def _circle(implications: Mapping[str, set[str]]) -> list[str]:
    """A way from a tag back to itself; empty where there is none."""
    finished: set[str] = set()
    for start in implications:
        way: list[str] = []
        ahead: list[Iterator[str]] = [iter([start])]
        while ahead:
            tag = next((other for other in ahead[-1] if other not in finished), None)
            if tag in way:
                return [*way[way.index(tag) :], tag]
            if tag is None:
                ahead.pop()
                if way:
                    finished.add(way.pop())
            else:
                way.append(tag)
                ahead.append(iter(sorted(implications.get(tag, ()))))
    return []


def _rows(content: bytes, name: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is not empty."""
    if content[:2] == b"\x1f\x8b":
        raise DatasetError(f"{name} is compressed: unpack it first")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    reader = csv.reader(text.splitlines())
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise DatasetError(f"{name}, line {reader.line_num}: {error}; expected values separated by commas") from error
