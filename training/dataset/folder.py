"""A folder of captioned pictures as a dataset.

- any depth; every picture is captioned by the text file of its name beside it
- kohya's folders: the pictures in a sub-folder ``10_cat`` are shown 10 times per epoch, and ``cat`` is the caption of
  those that have none; other folders count as they are, where sd-scripts would skip them
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

from .files import Found, check_found, find
from .model import Access, Concept, Dataset, DatasetError, listed
from .reading import Entry, read

SUBFOLDERS = {
    "repeats": "a folder called 10_name is shown 10 times per epoch",
    "plain": "names of folders mean nothing",
}
REPEATS = re.compile(r"([0-9]{1,3})_(.*)", re.DOTALL)  # four digits are a year, more a date


def open_folder(
    folder: Path, defaults: Concept, access: Access, if_unreadable: str = "error", subfolders: str = "repeats"
) -> Dataset:
    """The dataset of a folder; DatasetError names the files at fault and the cure."""
    if subfolders not in SUBFOLDERS:
        raise DatasetError(f"subfolders is {subfolders!r}, expected one of {', '.join(SUBFOLDERS)}")
    found = find(folder)
    groups = _groups(found) if subfolders == "repeats" else {"": list(found.images)}
    repeats = {group: _repeats(group or folder.name) if subfolders == "repeats" else None for group in groups}

    unused = [group for group, named in repeats.items() if named and named[0] == 0]
    for name in (name for group in unused for name in groups.pop(group)):
        del found.images[name]
    if unused and not groups:
        raise DatasetError(f"{folder}: nothing but 0 repeats: {listed(unused)}; rename the folder, e.g. to 1_name")
    notes = [*found.notes, *([f"left out, 0 repeats: {listed(unused)}"] if unused else [])]
    check_found(found)

    concepts: list[Concept] = []
    entries: list[Entry] = []
    for group, names in groups.items():
        concept = dataclasses.replace(defaults, name=group or defaults.name or folder.name)
        count, tokens = repeats[group] or (None, "")
        if count is not None:
            concept = dataclasses.replace(concept, repeats=Fraction(count), samples_per_epoch=None)
            idle = [name for name in ("samples_per_epoch", "repeats") if getattr(defaults, name) not in (None, 1)]
            notes += [f"{name} has no effect on {concept.name}: its name sets the repeats" for name in idle]
        entries += list(entries_of(found, names, len(concepts), tokens))
        concepts.append(concept)
    others = sorted({name.split("/")[0] if "/" in name else name for name in groups.get("", ())})
    if others and len(concepts) > 1:
        notes.append(f"not called like 10_name, so shown as often as the loader says: {listed(others)}")
    deeper = {"/".join(name.split("/")[:-1]) for name in groups.get("", ()) if _repeats(_parent(name))}
    if deeper and subfolders == "repeats":
        notes.append(
            f"names of folders count only directly in the chosen one, so these set nothing: {listed(sorted(deeper))}; "
            "choose the folder around them"
        )
    return read(folder, concepts, entries, access, if_unreadable, notes)


def entries_of(found: Found, names: list[str], concept: int = 0, class_tokens: str = "") -> Iterator[Entry]:
    for name in names:
        mask = found.masks[name][0] if found.masks[name] else None
        captions = tuple(found.captions[name])
        yield Entry(name, found.images[name], concept, None, captions, class_tokens, mask)


def _groups(found: Found) -> dict[str, list[str]]:
    """The pictures of each direct sub-folder whose name sets repeats, those of the rest under the empty name first."""
    groups: dict[str, list[str]] = {"": []}
    for name in found.images:
        first = name.split("/")[0] if "/" in name else ""
        groups.setdefault(first if _repeats(first) else "", []).append(name)
    return {group: names for group, names in groups.items() if names}


def _parent(name: str) -> str:
    return name.rpartition("/")[0].rpartition("/")[2]


def _repeats(name: str) -> tuple[int, str] | None:
    """(10, "cat girl") of ``10_cat girl``."""
    match = REPEATS.fullmatch(name)
    return (int(match[1]), match[2].strip()) if match else None
