"""Presets in the host: the pack's own, and the user's in ``lora_loom/presets`` of the host's user folder.

* ``names``, ``find``: what the widgets offer, and the preset of that name.
* ``save``: a new one of the user's; the pack's own are never replaced.
* ``block_presets``: named block weights, the user's in the file ``lora_loom/block_presets.txt`` there.
* ``as_filled``: every option of every preset, defaults included, for the page to fill widgets with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths

from ..kernels.safetensors_io import replace_file
from ..kernels.strengths.presets import read_presets
from ..training.options import OptionError, options_of
from ..training.presets import KINDS, NONE, NOT_IN_PRESETS, PRESETS, Preset, from_json, to_json
from .runs import checked_name

LARGEST = 1 << 20  # bytes of a preset's file


def block_presets() -> dict[str, tuple[str, ...]]:
    """name → texts. Raises ValueError naming the file where that cannot be read."""
    return read_presets(Path(folder_paths.get_user_directory()) / "lora_loom" / "block_presets.txt")


def _folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "lora_loom" / "presets"


def names() -> list[str]:
    """None, the pack's own, the user's own."""
    try:
        own = sorted(path.stem for path in _folder().glob("*.json") if path.stem not in (NONE, *PRESETS))
    except OSError:
        own = []
    return [NONE, *PRESETS, *own]


def find(name: str | None) -> Preset | None:
    """Raises OptionError naming ``preset``."""
    if name in (None, "", NONE):
        return None
    if name not in (known := names()):  # so that it is a plain name of a file in the folder
        raise OptionError(f"preset is {str(name)[:60]!r}, expected one of {', '.join(known)}")
    if name in PRESETS:
        return PRESETS[name]
    path = _folder() / f"{name}.json"
    if os.path.getsize(path) > LARGEST:
        raise OptionError(f"preset {name!r} cannot be used: its file is too large")
    return from_json(name, path.read_bytes())


def save(preset: Preset, overwrite: bool) -> Path:
    """The file it was written to. Raises ValueError naming ``name`` where that is taken or no file name."""
    name = checked_name(preset.name, "name")
    if name in PRESETS or name == NONE:
        raise OptionError(f"name is {name!r}, which the pack uses itself; choose another name")
    path = _folder() / f"{name}.json"
    if path.exists() and not overwrite:
        raise OptionError(f"name: there is a preset {name!r} already; choose another, or set if_exists to overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, to_json(preset).encode())
    return path


def as_filled() -> dict[str, dict[str, dict[str, Any]]]:
    """preset -> part -> option -> value; presets that cannot be read are left out."""
    filled = {}
    for name in names():
        try:
            preset = find(name)
        except (OptionError, OSError):
            continue
        filled[name] = {
            part: {
                option: default
                for option, (_, default) in options_of(kind).items()
                if option not in NOT_IN_PRESETS
            }
            | (preset.options(part) if preset else {})
            for part, kind in KINDS.items()
        }
    return filled
