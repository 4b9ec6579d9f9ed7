"""LoRA files by the names the host knows them under, and those of runs; names from a graph are untrusted.

* ``lora_names``: what lies in the host's LoRA folders
* ``sources``, ``load_source``, ``path_of``, ``source_state``: those, and what runs keep: ``run: cat``,
  ``run: cat (best)``, ``run: cat (step 500)``
* ``state_of``, ``state_of_path``: change with all that a node makes of a LoRA: the file, what lies beside it, and
  presets of block weights
* ``place_for``, ``free_place_for``, ``listed_name``: where a file is written, and what it is listed under
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import folder_paths

from ..kernels.peft_config import config_file
from ..kernels.safetensors_io import LoraModel, load_tensors
from ..kernels.sidecars import files_beside
from .presets import block_presets
from .runs import RunError, checked_name, runs_root

SUFFIX = ".safetensors"
RUN = "run: "
MAX_NAME = 200
_ENDINGS = (SUFFIX, ".json", ".info", ".txt")  # of files that say something
_PART_OF_TIME, _LONGEST = 20, 5.0  # all files are looked at in one twentieth of the time, and at least so many seconds
_KINDS = re.compile(r"-(?:step(?P<step>\d{1,9})|(?P<kind>best|ema))", re.ASCII)


def lora_names() -> list[str]:
    """Every safetensors file in the host's LoRA folders, as the host writes them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(SUFFIX)]


def sources() -> list[str]:
    """What can be loaded: the runs, the newest first, then the files."""
    return [*_of_runs(), *lora_names()]


def load_source(source: Any) -> LoraModel:
    """The file or the run's LoRA called ``source``. Raises ValueError naming ``source``."""
    return load_tensors(path_of(source))


def source_state(source: Any) -> str:
    """Changes when what is called ``source`` does; empty for what is none."""
    try:
        return _state(path_of(source))
    except (ValueError, OSError):
        return ""


def path_of(source: Any, option: str = "source") -> str:
    """Where what is called ``source`` lies. Raises ValueError naming the ``option``."""
    if isinstance(source, str) and source.startswith(RUN):
        found = _of_runs().get(source)
        if found is not None:
            return found
    elif source in lora_names():
        return folder_paths.get_full_path_or_raise("loras", source)
    raise ValueError(
        f"{option}: there is no {repr(source)[:100]} among the runs below output/lora_loom and the .safetensors files "
        "in the loras folders; choose one of the list (press R to read it anew)"
    )


def _of_runs() -> dict[str, str]:
    """What each LoRA that a run keeps is called → its path, the newest runs first."""
    root = runs_root()
    folders = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
    found = {}
    for folder in sorted(folders, key=lambda entry: entry.stat().st_mtime, reverse=True):
        for called, path in sorted(_kept_in(folder), key=lambda pair: (len(pair[0]), pair[0])):
            found[called] = path
    return found


def _kept_in(folder: Path) -> Iterator[tuple[str, str]]:
    """The LoRAs in a run's folder; nothing that a link leads to."""
    try:
        name = checked_name(folder.name)
    except RunError:
        return
    inside = os.path.realpath(folder.parent)
    for path in folder.glob(f"*{SUFFIX}"):
        if os.path.realpath(path) != os.path.join(inside, name, path.name) or not path.stem.startswith(name):
            continue
        mark = path.stem.removeprefix(name)
        kind = _KINDS.fullmatch(mark)
        if kind:
            what = f"step {int(kind['step'])}" if kind["step"] else kind["kind"]
            yield f"{RUN}{name} ({what})", str(path)
        elif not mark:
            yield f"{RUN}{name}", str(path)


def _state(path: str | Path) -> str:
    status = os.stat(path)
    return f"{status.st_mtime_ns} {status.st_size}"


# -- has anything changed?


def state_of(name: Any) -> str:
    """Changes with the file called ``name``, what lies beside it, and presets of block weights.

    None is a name that is not known yet: then with any file that LoRAs are made of. Never raises.
    """
    try:
        own = _state_of_all() if name is None else state_of_path(path_of(name))
    except (ValueError, OSError):
        own = ""
    return f"{own} {_state_of_presets()}"


def state_of_path(path: str) -> str:
    """Of a LoRA file, what PEFT keeps beside it, and what managers do. Raises OSError where there is no such file."""
    beside = (_state_or_none(file) for file in (config_file(path), *files_beside(path)))
    return " ".join((_state(path), *beside))


def _state_or_none(path: str | Path | None) -> str:
    try:
        return "-" if path is None else _state(path)
    except (ValueError, OSError):
        return "-"


def _state_of_presets() -> str:
    try:
        return hashlib.sha256(repr(block_presets()).encode(errors="replace")).hexdigest()
    except (ValueError, OSError) as error:  # the node tells it if it needs them
        return str(error)


_all_files: dict[tuple[str, ...], tuple[float, str]] = {}  # folders → (until when this counts, their state)


def _state_of_all() -> str:
    folders = (folder_paths.get_output_directory(), *folder_paths.get_folder_paths("loras"))
    begun = time.monotonic()
    until, state = _all_files.get(folders, (0.0, ""))
    if begun < until:
        return state
    parts = {os.path.dirname(name) for name in lora_names()}
    within = [os.path.join(folder, part) for folder in folders[1:] for part in parts]
    found = {path: _state_or_none(path) for path in _of_runs().values()}
    for folder in filter(os.path.isdir, within):
        with os.scandir(folder) as entries:
            found |= {entry.path: _state_or_none(entry.path) for entry in entries if entry.name.endswith(_ENDINGS)}
    state = hashlib.sha256(repr(sorted(found.items())).encode(errors="replace")).hexdigest()
    ended = time.monotonic()
    _all_files.clear()
    _all_files[folders] = ended + min(_PART_OF_TIME * (ended - begun), _LONGEST), state
    return state


# -- where files are written


def place_for(name: str) -> Path:
    """Where a LoRA called ``name`` (folders allowed: ``style/mine``) is written: below the first LoRA folder.

    Raises ValueError naming ``name``, also for places outside that folder.
    """
    root = os.path.realpath(folder_paths.get_folder_paths("loras")[0])
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise ValueError(f"name: {repr(name)[:60]} is no name of at most {MAX_NAME} letters, folders included")
    parts = name.replace("\\", "/").removesuffix(SUFFIX).split("/")
    target = os.path.realpath(os.path.join(root, *(checked_name(part, "name") for part in parts)) + SUFFIX)
    if os.path.commonpath([root, target]) != root:
        raise ValueError(f"name: {name!r} lies outside the loras folder")
    return Path(target)


def free_place_for(name: str) -> Path:
    """``place_for`` with the next free number behind the name when there is such a file already."""
    first = place_for(name)
    number, place = 2, first
    while place.exists():
        place = first.with_name(f"{first.stem}-{number}{SUFFIX}")
        number += 1
    return place


def listed_name(path: Path) -> str:
    """The name under which the host lists the file at ``path``."""
    root = os.path.realpath(folder_paths.get_folder_paths("loras")[0])
    return os.path.relpath(path, root)
