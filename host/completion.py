"""Completion of tags from the user's own lists: any part of a name or alias, the most frequent first.

- lists lie in ``lora_loom/tags`` of the host's user folder: .csv files with rows ``name,category,count,"alias,alias"``
  as image boards' completions have them, or with e621's header ``id,name,category,post_count``; none ship with the pack
- "eed lin" and "eed_lin" find "speed lines": any part of it, underscores are spaces, case makes no difference
- a list is read once and again when it changes; a faulty one is left out with a note that says what to correct

All names lie in one text, the most frequent first, which is searched for the query from its start: whatever is found
first is what is wanted, and what is rare or absent costs one pass over a few megabytes (1 ms).
"""

from __future__ import annotations

import csv
import io
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ..training.dataset.lint_knowledge import parse_tags, plain
from ..training.dataset.model import DatasetError

FOLDER = ("lora_loom", "tags")
LARGEST = 64 << 20  # bytes of all lists together
MOST_LISTS = 16
LONGEST_QUERY = 200
MOST = 100  # completions at once
BOARD_HEADER = ["id", "name", "category", "post_count"]


@dataclass(frozen=True)
class Completion:
    tag: str
    count: int
    category: int | None = None  # as the list's board numbers them
    alias: str = ""  # the name that fits, where it is not the tag itself


class Index:
    """Tags with their counts and aliases, to be searched for parts of names."""

    def __init__(self, tags: Iterable[tuple[str, int, int | None, Iterable[str]]]) -> None:
        rows = sorted(tags, key=lambda row: (-row[1], row[0]))
        lines = ["\t".join((row[0], *row[3])) for row in rows]
        self._text = "\n".join(["", *lines, ""])
        self._counts = [row[1] for row in rows]
        self._categories = [row[2] for row in rows]
        self._starts = array("q")  # of each line in the text
        place = 1
        for line in lines:
            self._starts.append(place)
            place += len(line) + 1

    def __len__(self) -> int:
        return len(self._starts)

    def find(self, part: str, most: int) -> Iterator[Completion]:
        """Tags whose name or alias has ``part`` in it."""
        place = 1
        while most > 0 and (place := self._text.find(part, place)) >= 0:
            row, end = bisect_right(self._starts, place) - 1, self._text.index("\n", place)
            names = self._text[self._starts[row] : end].split("\t")
            fits = next(name for name in names if part in name)
            yield Completion(names[0], self._counts[row], self._categories[row], "" if fits == names[0] else fits)
            most, place = most - 1, end


class TagLists:
    """The user's lists as one index, kept until a file changes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: tuple[tuple[str, int, int], ...] = ()
        self._index = Index(())
        self._notes: tuple[str, ...] = ()

    def complete(self, text: str, most: int) -> tuple[list[Completion], tuple[str, ...]]:
        """(completions, what is wrong with the lists)."""
        part = one_line(plain(text[:LONGEST_QUERY]))
        with self._lock:
            files = _files()
            if files != self._state:
                self._index, self._notes = _read(files)
                self._state = files
            index, notes = self._index, self._notes
        return list(index.find(part, min(most, MOST))) if part else [], notes


def folder() -> Path:
    return Path(folder_paths.get_user_directory()).joinpath(*FOLDER)


def _files() -> tuple[tuple[str, int, int], ...]:
    """(path, size, time) of the lists; a link is none."""
    try:
        with os.scandir(folder()) as entries:
            found = [
                (entry.path, status.st_size, status.st_mtime_ns)
                for entry in entries
                if entry.name.lower().endswith(".csv") and entry.is_file(follow_symlinks=False)
                for status in [entry.stat()]
            ]
    except OSError:
        return ()
    return tuple(sorted(found))


def _read(files: tuple[tuple[str, int, int], ...]) -> tuple[Index, tuple[str, ...]]:
    rows: dict[str, tuple[int, int | None]] = {}
    aliases: dict[str, set[str]] = {}
    notes: list[str] = []
    left = LARGEST
    for number, (path, size, _) in enumerate(files):
        name = os.path.basename(path)
        if number >= MOST_LISTS or size > left:
            notes.append(f"{name} is left out: at most {MOST_LISTS} lists of {LARGEST >> 20} MB together are read")
            continue
        left -= size
        try:
            counts, categories, known = parse_tags(_as_completion_list(Path(path).read_bytes()), name)
        except (DatasetError, OSError) as error:
            notes.append(str(error))
            continue
        except csv.Error as error:
            notes.append(f"{name}: {error}; look for a quotation mark without its partner")
            continue
        for (written, count), category in zip(counts.items(), categories.values(), strict=True):
            tag = one_line(written)
            if tag and count >= rows.get(tag, (-1, None))[0]:
                rows[tag] = count, category
        for alias, tag in known.items():
            aliases.setdefault(one_line(tag), set()).add(one_line(alias))
    return Index((tag, *facts, sorted(aliases.get(tag, ()))) for tag, facts in rows.items()), tuple(notes)


def one_line(name: str) -> str:
    """A name without what parts names in the index."""
    return " ".join(name.split()) if "\n" in name or "\t" in name else name


def _as_completion_list(content: bytes) -> bytes:
    """A board's export with its header as rows ``name,category,count``; anything else as it is."""
    head = content[:80].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").split("\n")[0].strip().lower()
    if head.split(",")[:4] != BOARD_HEADER:
        return content
    stream = io.StringIO()
    write = csv.writer(stream).writerow
    for row in csv.reader(content.decode("utf-8-sig", "replace").splitlines()[1:]):
        if len(row) >= 4:
            write(row[1:4])
    return stream.getvalue().encode()
