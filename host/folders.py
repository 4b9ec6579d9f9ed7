"""The folders that datasets may lie in, as the host registers them, and the way from a widget's string to a path.

- roots: ``datasets`` (ComfyUI/datasets and whatever extra_model_paths.yaml adds) and ``input``
- a string from a graph names a root and a folder below it; nothing else can be reached, also not through links
"""

from __future__ import annotations

import difflib
import os
import posixpath
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path, PureWindowsPath

import folder_paths

from ..training.data import DatasetError
from ..training.images import image_types

HERE = "."  # the root itself
MAX_DEPTH = 8
MAX_FOLDERS = 4000
LISTING_SECONDS = 2.0

_listings: dict[str, tuple[float, tuple[str, ...]]] = {}  # the host asks for the choices several times per prompt


def roots() -> dict[str, tuple[str, ...]]:
    """The places of each root as real paths; registers ``datasets`` with the host, which may not know it."""
    folder_paths.add_model_folder_path("datasets", os.path.join(folder_paths.base_path, "datasets"))
    places = {"datasets": folder_paths.get_folder_paths("datasets"), "input": [folder_paths.get_input_directory()]}
    return {root: tuple(map(os.path.realpath, paths)) for root, paths in places.items()}


def list_folders(root: str) -> tuple[str, ...]:
    """The folders of a root with images in or below them, as posix paths; ``.`` for images in the root itself."""
    return _sorted(name for place in roots()[root] for name in _listing(place))


def all_folders() -> tuple[str, ...]:
    """The folders of all roots together, each once."""
    return _sorted(name for root in roots() for name in list_folders(root))


def resolve(root: object, folder: object) -> Path:
    """The real path of a folder of a root. DatasetError names the widget, what is wrong and the nearest choices."""
    places = roots()
    if not isinstance(root, str) or root not in places:
        raise DatasetError(f"root: {_shown(root)} is unknown; choose one of {', '.join(places)}")
    if not isinstance(folder, str) or not _is_below(folder):
        raise DatasetError(
            f"folder: {_shown(folder)} is no folder below a root; choose one from the list, e.g. {_nearest(root, '')}"
        )
    existing = {}
    for place in places[root]:
        path = os.path.realpath(os.path.join(place, folder))
        if not is_registered(Path(path)):
            raise DatasetError(
                f"folder: {_shown(folder)} is a link that leads outside the dataset folders; copy the images to "
                f"{places['datasets'][0]}, or name its target under `datasets` in extra_model_paths.yaml"
            )
        if os.path.isdir(path):
            existing[place] = path
    if not existing:
        raise DatasetError(_not_found(root, folder))
    filled = [place for place in existing if posixpath.normpath(folder) in _listing(place)]
    if len(filled) > 1:
        raise DatasetError(f"folder: {_shown(folder)} is in {' and in '.join(filled)}; rename one of the two folders")
    return Path(existing[filled[0] if filled else next(iter(existing))])


def is_registered(path: Path) -> bool:
    """Whether a path, its links followed, lies in one of the roots."""
    real = os.path.realpath(path)
    return any(_contains(place, real) for paths in roots().values() for place in paths)


def _sorted(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names), key=lambda name: (name == HERE, name)))


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


def _is_below(folder: str) -> bool:
    parts = folder.replace("\\", "/").split("/")
    absolute = folder.startswith(("/", "\\")) or PureWindowsPath(folder).drive
    return len(folder) < 1024 and _is_name(folder) and not absolute and ".." not in parts


def _is_name(text: str) -> bool:
    """Whether a file system takes the text: no NUL, no half of a surrogate pair."""
    return "\0" not in text and text.encode("utf-8", "ignore").decode() == text


def _not_found(root: str, folder: str) -> str:
    if not all_folders():
        return (
            f"folder: there is no folder with images yet; make one in {roots()['datasets'][0]}, "
            "put the images and their .txt captions there, and press R in the graph to renew the list"
        )
    others = [other for other in roots() if other != root and folder in list_folders(other)]
    if others:
        return f"folder: {_shown(folder)} lies in {others[0]}, not in {root}; set the widget root to {others[0]}"
    return f"folder: {_shown(folder)} is not in {root}; choose one of {_nearest(root, folder)}"


def _nearest(root: str, folder: str) -> str:
    names = list_folders(root)
    near = difflib.get_close_matches(folder, names, n=8, cutoff=0.0)
    return ", ".join(f"{root}/{name}" for name in near) or f"(no folder of {root} has images yet)"


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
                if os.path.splitext(entry.name)[1].lower() in image_types():
                    found.update("/".join(names[:depth]) for depth in range(1, len(names) + 1))
                    found.update(() if names else (HERE,))
                continue
            if entry.is_symlink():
                real = os.path.realpath(entry.path)
                allowed = is_registered(Path(real))
            else:
                real, allowed = os.path.join(path, entry.name), True
            if allowed and real not in seen and len(names) < MAX_DEPTH:
                seen.add(real)
                queue.append((real, (*names, entry.name)))
    return tuple(found)
