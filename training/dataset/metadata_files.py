"""Lists of captions in one file, as trainers and captioners write them.

- JSON ``{path: {"caption": …, "tags": …}}`` (kohya, ai-toolkit), or ``{path: caption}``, or a list of objects
- JSONL, one object per line: ``image_path`` (or ``file_name``), ``caption`` (or ``text``), ``tags``
- tags follow the caption, and each of its lines where one line is shown; a mask may be named beside them
- paths are relative to the folder of the file, or to the one given, and may lack their extension
- errors say the line or the entry; what is there and not used becomes a note, but condition images are refused
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from .files import File, FileMissing, Places, kind, shown
from .images import VIDEO_TYPES, image_types
from .model import Access, Concept, Dataset, DatasetError, listed
from .reading import Entry, read

PATHS = ("image_path", "file_name", "path", "image")
CAPTIONS = ("caption", "text")
MASKS = ("mask_path", "mask")
CONDITIONS = ("condition", "control")  # how the keys of condition images begin
SIZES = ("image_size", "train_resolution", "resolution")  # the files say it better
EXAMPLE = '{"cat.png": {"caption": "a cat"}}'
LARGEST = 256 << 20  # bytes of a file that is read at once


@dataclass(frozen=True)
class Row:
    """One entry of a file: what it says, and where."""

    where: str
    path: str
    caption: str
    tags: str
    mask: str | None
    unused: tuple[str, ...]


def open_metadata(path: Path, defaults: Concept, access: Access, if_unreadable: str = "error") -> Dataset:
    """The dataset that a metadata file lists."""
    places = Places(Path(os.path.realpath(path.parent)), access)
    entries, notes = metadata_entries(path, places, defaults, 0, if_unreadable)
    concept = dataclasses.replace(defaults, name=defaults.name or path.stem)
    return read(path, [concept], entries, access, if_unreadable, notes)


def metadata_entries(
    path: Path, places: Places, concept: Concept, index: int, if_unreadable: str = "error"
) -> tuple[list[Entry], list[str]]:
    """The pictures of a metadata file, and notes; paths in it are relative to ``places``."""
    entries, notes, missing = [], [], []
    unused: set[str] = set()
    for row in rows(path):
        unused.update(row.unused)
        try:
            image, mask = files_of(row, places)
        except FileMissing as error:
            if if_unreadable == "error":
                raise
            missing.append(str(error))
            continue
        caption = joined(row, concept)
        name = name_below(image.path, places.base)
        entries.append(Entry(name, image, index, caption, mask=mask, caption_path=str(path)))
    if missing:
        notes.append(f"left out, {len(missing)} without their file: {listed(missing)}")
    if unused:
        notes.append(f"{path.name}: not used: {listed(sorted(unused))}")
    if not entries:
        raise DatasetError(f"{path} lists no image; write one entry per image, e.g. {EXAMPLE}")
    return entries, notes


def files_of(row: Row, places: Places) -> tuple[File, File | None]:
    """Picture and mask of an entry."""
    if kind(row.path) in VIDEO_TYPES:
        raise DatasetError(f"{row.where}: {shown(row.path)} is a video; save single frames as images and list those")
    image = places.file(row.path, row.where, image_types())
    mask = places.file(row.mask, f"{row.where}, mask", image_types()) if row.mask is not None else None
    return image, mask


def rows(path: Path) -> Iterator[Row]:
    """The entries of a JSON or JSONL file, checked."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        seen: dict[str, str] = {}
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                row = _row(parse_json(line, f"{path.name}, line {number}"), None, f"{path.name}, line {number}")
                if row.path in seen:
                    raise DatasetError(f"{row.where}: {shown(row.path)} is in {seen[row.path]} already; remove one")
                seen[row.path] = row.where
                yield row
        return
    content = parse_json(text, path.name)
    if isinstance(content, dict):
        for key, value in content.items():
            yield _row({"caption": value} if isinstance(value, str) else value, key, f"{path.name}, {shown(key)}")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield _row(value, None, f"{path.name}, [{index}]")
    else:
        raise DatasetError(f"{path.name} holds {_type(content)}, expected entries by path, e.g. {EXAMPLE}")


def read_text(path: Path) -> str:
    """A whole UTF-8 file; DatasetError where it is too large or no text."""
    try:
        with open(path, "rb") as stream:
            content = stream.read(LARGEST + 1)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}): does it exist, may it be read?") from error
    if len(content) > LARGEST:
        raise DatasetError(f"{path} is larger than {LARGEST >> 20} MB: is it the right file? Else split it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error


def parse_json(text: str, where: str) -> Any:
    """What the text holds, nothing guessed: numbers are finite, and no key stands twice."""

    def number(name: str) -> NoReturn:
        raise DatasetError(f"{where}: {name} is no number of JSON; remove it")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) < len(items):
            [(twice, _)] = Counter(key for key, _ in items).most_common(1)
            raise DatasetError(f"{where}: the key {shown(twice)} stands there twice; remove one")
        return content

    try:
        return json.loads(text, parse_constant=number, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
        raise DatasetError(f"{where}: no valid JSON ({error.msg} at {place}); correct it there") from error
    except RecursionError as error:
        raise DatasetError(f"{where}: nested too deeply to be a list of captions") from error
    except DatasetError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise DatasetError(f"{where}: {error}") from error


def _row(value: Any, path: str | None, where: str) -> Row:
    if not isinstance(value, dict):
        raise DatasetError(f'{where} is {_type(value)}, expected an object, e.g. {{"caption": "a cat"}}')
    if path is None:
        names = [name for name in PATHS if name in value]
        if not names:
            raise DatasetError(f"{where} has no {PATHS[0]}; write which image it is about")
        path = _text(value[names[0]], f"{where}, {names[0]}")
    conditions = [name for name in value if name.lower().startswith(CONDITIONS) and value[name]]
    if conditions:
        raise DatasetError(
            f"{where}: {listed(conditions)} is for edit or control training, which this trainer does not do; remove it"
        )
    known = (*PATHS, *CAPTIONS, *MASKS, *SIZES, "tags")
    caption = next((value[name] for name in CAPTIONS if value.get(name) is not None), "")
    mask = next((value[name] for name in MASKS if value.get(name) is not None), None)
    return Row(
        where,
        path,
        _text(caption, f"{where}, caption"),
        _tags(value.get("tags"), f"{where}, tags"),
        None if mask is None else _text(mask, f"{where}, mask"),
        tuple(name for name in value if name not in known),
    )


def _tags(value: Any, where: str) -> str:
    if isinstance(value, list):
        return ", ".join(_text(tag, where) for tag in value)
    return "" if value is None else _text(value, where)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"{where} is {_type(value)}, expected a text")
    return value


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"the number {shown(value)}")


def joined(row: Row, concept: Concept) -> str:
    """The caption with its tags behind: behind each line, where one line is shown."""
    caption, separator = row.caption.replace("\r\n", "\n").strip(), f"{concept.captions.separator.strip()} "
    tags = separator.join(part.strip() for part in row.tags.splitlines() if part.strip())
    if not caption or not tags:
        return caption or tags
    if concept.captions.lines == "all":
        return f"{caption}{separator}{tags}"
    return "\n".join(f"{line.strip()}{separator}{tags}" for line in caption.split("\n") if line.strip())


def name_below(path: str, base: Path) -> str:
    """The posix path below a folder; of what lies elsewhere, the name of its folder and its own."""
    folder, name = os.path.split(path)
    try:
        place = os.path.relpath(folder, base)
    except ValueError:  # two drives
        place = ".."
    return Path(os.path.basename(folder) if place.startswith("..") else place, name).as_posix()
