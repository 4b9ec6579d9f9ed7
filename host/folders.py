"""The folders that datasets may lie in, as the host registers them, and the way from a widget's string to a path.

- roots: ``datasets`` (ComfyUI/datasets and whatever extra_model_paths.yaml adds) and ``input``
- a string from a graph names a root and a folder or a file of a few types below it; nothing else can be reached, also
  not through links
- ``access()`` tells the reader of a dataset what it may open, and what lines of extra_model_paths.yaml add a folder
"""

from __future__ import annotations

import difflib
import os
import posixpath
import re
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

import folder_paths

from ..training.dataset.images import image_types
from ..training.dataset.model import Access, DatasetError

HERE = "."  # the root itself
NONE = "none"  # no table chosen
SOURCE_TYPES = frozenset({".toml", ".json", ".jsonl"})  # files that are a dataset
TABLE_TYPES = frozenset({".csv"})  # files with tags
TEXT_TYPES = frozenset({".txt", ".caption"})
TABLE_ROOT = "datasets"
MAX_DEPTH = 8
MAX_FOLDERS = 4000
LISTING_SECONDS = 2.0

_listings: dict[str, tuple[float, tuple[str, ...]]] = {}  # the host asks for the choices several times per prompt


def roots() -> dict[str, tuple[str, ...]]:
    """The places of each root as real paths; registers ``datasets`` with the host, which may not know it."""
    folder_paths.add_model_folder_path("datasets", os.path.join(folder_paths.base_path, "datasets"))
    places = {"datasets": folder_paths.get_folder_paths("datasets"), "input": [folder_paths.get_input_directory()]}
    return {root: tuple(map(os.path.realpath, paths)) for root, paths in places.items()}


def list_sources(root: str) -> tuple[str, ...]:
    """What of a root can be a dataset, as posix paths: folders with images in or below them, then dataset files.

    ``.`` stands for images in the root itself.
    """
    return _sorted(name for place in roots()[root] for name in _listing(place) if _type(name) not in TABLE_TYPES)


def all_sources() -> tuple[str, ...]:
    """The folders and dataset files of all roots together, each once."""
    return _sorted(name for root in roots() for name in list_sources(root))


def list_tables() -> tuple[str, ...]:
    """The tables of tags in the ``datasets`` root."""
    places = roots()[TABLE_ROOT]
    return _sorted(name for place in places for name in _listing(place) if _type(name) in TABLE_TYPES)


def resolve(root: object, name: object) -> Path:
    """The real path of a dataset's folder or file. DatasetError names the widget, what is wrong and what to choose."""
    places = roots()
    if not isinstance(root, str) or root not in places:
        raise DatasetError(f"root: {_shown(root)} is unknown; choose one of {', '.join(places)}")
    found = _found(root, name, "folder", "folder or dataset file", SOURCE_TYPES)
    if found is None:
        raise DatasetError(_not_found(root, str(name)))
    return found


def resolve_table(name: object, widget: str) -> Path | None:
    """The real path of a table of tags, None for none. DatasetError names ``widget``."""
    if name == NONE:
        return None
    found = _found(TABLE_ROOT, name, widget, "table", TABLE_TYPES)
    if found is None or found.is_dir():
        choices = ", ".join(list_tables()) or f"(there is none yet: put a .csv file into {roots()[TABLE_ROOT][0]})"
        raise DatasetError(f"{widget}: {_shown(name)} is no .csv file of {TABLE_ROOT}; choose {NONE} or {choices}")
    return found


def file_state(path: Path | None) -> str:
    """Changes when the file does; empty for no file."""
    if path is None:
        return ""
    status = path.stat()
    return f"{status.st_mtime_ns} {status.st_size}"


def is_registered(path: Path) -> bool:
    """Whether a path, its links followed, lies in one of the roots."""
    return access().allowed(path)


def access() -> Access:
    """What a dataset may be read from at this moment."""
    places = [place for paths in roots().values() for place in paths]

    def allowed(path: Path) -> bool:
        real = os.path.realpath(path)
        return any(_contains(place, real) for place in places)

    return Access(allowed, advice)


def advice(path: Path) -> str:
    """What to write into extra_model_paths.yaml so that ``path`` may be read, to the letter."""
    folder = path.parent if _type(path.name) in (*SOURCE_TYPES, *TABLE_TYPES, *TEXT_TYPES, *image_types()) else path
    section = re.sub(r"\W+", "_", str(folder), flags=re.ASCII).strip("_")  # a section that is there twice counts once
    quoted = str(folder).replace("'", "''")
    return (
        f"put the files into {roots()['datasets'][0]}, or allow them where they are: add these two lines to "
        f"extra_model_paths.yaml beside ComfyUI's main.py, and restart ComfyUI\n"
        f"datasets_{section}:\n"
        f"    datasets: '{quoted}'"
    )


def _found(root: str, name: object, widget: str, noun: str, types: frozenset[str]) -> Path | None:
    """The folder, or file of one of the types, of that name in a root; None where there is none."""
    if not isinstance(name, str) or not _is_below(name):
        raise DatasetError(f"{widget}: {_shown(name)} is no {noun} below a root; choose one from the list{_such(root)}")
    existing = {}
    for place in roots()[root]:
        path = os.path.realpath(os.path.join(place, name))
        if not is_registered(Path(path)):
            raise DatasetError(
                f"{widget}: {_shown(name)} is a link that leads outside the dataset folders; {advice(Path(path))}"
            )
        if os.path.isdir(path) or (os.path.isfile(path) and {_type(name), _type(path)} <= types):
            existing[place] = path
    filled = [place for place in existing if posixpath.normpath(name) in _listing(place)]
    if len(filled) > 1:
        raise DatasetError(f"{widget}: {_shown(name)} is in {' and in '.join(filled)}; rename one of the two")
    return Path(existing[filled[0] if filled else next(iter(existing))]) if existing else None


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    """Folders, the root itself, files."""
    return tuple(sorted(set(names), key=lambda name: (_type(name) in SOURCE_TYPES, name == HERE, name)))


def _type(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _listing(place: str) -> tuple[str, ...]:
    when, names = _listings.get(place, (float("-inf"), ()))
    if time.monotonic() - when > LISTING_SECONDS:
        names = _walk(place)
        _listings[place] = time.monotonic(), names
    return names


def _contains(place: str, path: str) -> bool:
    try:
        return os.path.commonpath([place, path]) == place
    except ValueError:  # two drives
        return False


def _is_below(name: str) -> bool:
    parts = name.replace("\\", "/").split("/")
    absolute = name.startswith(("/", "\\")) or PureWindowsPath(name).drive
    return len(name) < 1024 and _is_name(name) and not absolute and ".." not in parts


def _is_name(text: str) -> bool:
    """Whether a file system takes the text: no NUL, no half of a surrogate pair."""
    return "\0" not in text and text.encode("utf-8", "ignore").decode() == text


def _not_found(root: str, name: str) -> str:
    if not all_sources():
        return (
            f"folder: there is no folder with images yet; make one in {roots()['datasets'][0]}, "
            "put the images and their .txt captions there, and press R in the graph to renew the list"
        )
    others = [other for other in roots() if other != root and name in list_sources(other)]
    if others:
        return f"folder: {_shown(name)} lies in {others[0]}, not in {root}; set the widget root to {others[0]}"
    return f"folder: {_shown(name)} is not in {root}; choose one of {_nearest(root, name)}"


def _such(root: str) -> str:
    return f", e.g. {_nearest(root, '')}"


def _nearest(root: str, name: str) -> str:
    names = list_sources(root)
    near = difflib.get_close_matches(name, names, n=8, cutoff=0.0)
    return ", ".join(f"{root}/{near_name}" for near_name in near) or f"(no folder of {root} has images yet)"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "…"


def _walk(place: str) -> tuple[str, ...]:
    """Breadth first and bounded, so that a huge input folder costs little; what cannot be opened is left out."""
    found: set[str] = set()
    seen = {place}
    queue: deque[tuple[str, tuple[str, ...]]] = deque([(place, ())])  # real path, names below the place
    while queue and len(seen) <= MAX_FOLDERS:
        path, names = queue.popleft()
        try:
            with os.scandir(path) as entries:
                inside = [entry for entry in entries if _is_name(entry.name) and not entry.name.startswith(".")]
        except OSError:
            continue
        for entry in inside:
            if not entry.is_dir():
                if _type(entry.name) in image_types():
                    found.update("/".join(names[:depth]) for depth in range(1, len(names) + 1))
                    found.update(() if names else (HERE,))
                elif _type(entry.name) in SOURCE_TYPES | TABLE_TYPES and _may_be_read(entry):
                    found.add("/".join((*names, entry.name)))
                continue
            real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(path, entry.name)
            if _may_be_read(entry) and real not in seen and len(names) < MAX_DEPTH:
                seen.add(real)
                queue.append((real, (*names, entry.name)))
    return tuple(found)


def _may_be_read(entry: os.DirEntry[str]) -> bool:
    return not entry.is_symlink() or is_registered(Path(entry.path))
