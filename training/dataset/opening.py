"""One way in: whatever a dataset lies in, a folder, a list of captions or a configuration.

- ``open_dataset`` reads headers and captions and says all that is wrong at once
- ``dataset_state`` tells cheaply whether opening could give something else than before
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .config import found_in, open_config, source_of
from .config_keys import is_config, read_config
from .files import File, Found, Places, find
from .folder import open_folder
from .metadata_files import files_of, open_metadata, parse_json, read_text, rows
from .model import Access, Concept, Dataset, DatasetError

FILE_TYPES = (".toml", ".json", ".jsonl")


def open_dataset(
    path: Path,
    defaults: Concept,
    access: Access,
    *,
    if_unreadable: str = "error",
    subfolders: str = "repeats",
) -> Dataset:
    """The dataset in a folder, or that a TOML, JSON or JSONL file describes.

    ``defaults`` holds the options for which the files say nothing. DatasetError names every file or key at fault, and
    the cure.
    """
    if not access.allowed(Path(os.path.realpath(path))):
        raise DatasetError(f"{path} is outside the dataset folders; {access.advice(path)}")
    if path.suffix.lower() not in FILE_TYPES or path.is_dir():
        if path.is_file():
            raise DatasetError(f"{path} is no dataset; choose a folder, or a {', '.join(FILE_TYPES)} file")
        return open_folder(path, defaults, access, if_unreadable, subfolders)
    if _is_config(path):
        return open_config(path, defaults, access, if_unreadable)
    return open_metadata(path, defaults, access, if_unreadable)


def dataset_state(path: Path, access: Access) -> str:
    """sha256 over names, sizes and times of all that opening reads; what is wrong there is part of the state."""
    digest = hashlib.sha256()
    for fact in _facts(path, access):
        digest.update(repr(fact).encode())
    return digest.hexdigest()


def _is_config(path: Path) -> bool:
    return path.suffix.lower() == ".toml" or (
        path.suffix.lower() == ".json" and is_config(parse_json(read_text(path), path.name))
    )


def _facts(path: Path, access: Access) -> Iterator[object]:
    try:
        if not access.allowed(Path(os.path.realpath(path))):
            return
        if path.suffix.lower() not in FILE_TYPES or path.is_dir():
            yield from _of_folder(find(path))
            return
        status = path.stat()
        yield status.st_size, status.st_mtime_ns
        root = Path(os.path.realpath(path.parent))
        if _is_config(path):
            yield from _of_config(path, root, access)
        else:
            yield from _of_metadata(path, Places(root, access))
    except (DatasetError, OSError, ValueError) as error:
        yield str(error)


def _of_folder(found: Found) -> Iterator[object]:
    for name, image in found.images.items():
        yield from _of_files([image, *found.captions[name], *found.masks[name]])
    yield found.notes


def _of_config(path: Path, root: Path, access: Access) -> Iterator[object]:
    for subset in read_config(path):
        try:
            source = source_of(subset, root, access)
            if source.metadata is not None:
                yield from _of_files([source.metadata])
                yield from _of_metadata(Path(source.metadata.path), source.places)
            else:
                yield from _of_folder(found_in(source))
            if source.masks is not None:
                yield from _of_folder(source.masks)
        except DatasetError as error:
            yield str(error)


def _of_metadata(path: Path, places: Places) -> Iterator[object]:
    for row in rows(path):
        try:
            image, mask = files_of(row, places)
            yield from _of_files([image, *([mask] if mask else [])])
        except DatasetError as error:
            yield str(error)


def _of_files(files: Iterable[File]) -> Iterator[object]:
    for file in files:
        yield file.path, file.size, file.mtime_ns
