"""LoRA files by the names the host knows them under; names from a graph are untrusted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import folder_paths

from ..kernels.safetensors_io import LoraModel, load_tensors
from .runs import checked_name

SUFFIX = ".safetensors"


def lora_names() -> list[str]:
    """Every safetensors file in the host's LoRA folders, as the host writes them."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(SUFFIX)]


def load(name: str) -> LoraModel:
    """The LoRA called ``name``. Raises ValueError naming ``lora_name``."""
    if name not in lora_names():
        raise ValueError(f"lora_name: there is no LoRA {name!r} in the loras folders (only .safetensors is read)")
    return load_tensors(folder_paths.get_full_path_or_raise("loras", name))


def file_state(name: Any) -> str:
    """Changes when the file called ``name`` does; empty for what is no LoRA file."""
    if name not in lora_names():
        return ""
    status = os.stat(folder_paths.get_full_path_or_raise("loras", name))
    return f"{status.st_mtime_ns} {status.st_size}"


def place_for(name: str) -> Path:
    """Where a LoRA called ``name`` (folders allowed: ``style/mine``) is written: below the first LoRA folder.

    Raises ValueError naming ``name``, also for places outside that folder.
    """
    root = os.path.realpath(folder_paths.get_folder_paths("loras")[0])
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
