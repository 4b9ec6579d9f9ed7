"""What a run goes on from, on disk.

* ``write_state(folder, step, tensors, facts)``: a folder ``state-<step>`` with tensors.safetensors, run.json and, last,
  manifest.json with the size and SHA-256 of both. Everything is written and synced in a folder beside it, which is then
  renamed; only when that is done do older states go. Whenever the process ends, one whole state is there.
* ``find_state(folder)``: the newest state whose files are what its manifest says, and why newer ones were passed over.
* ``Found.tensors`` and ``Found.facts`` read it; files are read as a whole, none stays open or mapped.

No pickles: tensors are safetensors, facts are JSON, and both carry the version of their layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels.safetensors_io import load_tensors, serialised

SCHEMA = 2  # 1 was a single file, state.safetensors
TENSORS, FACTS, MANIFEST = "tensors.safetensors", "run.json", "manifest.json"
_NAME = re.compile(r"state-(\d{6,})(?:\.(\d+))?")  # the same step may be written more than once
_UNFINISHED = re.compile(r"\.state-.*\.part")
_DAMAGED = (OSError, ValueError, KeyError, TypeError, AttributeError)  # what reading a damaged manifest can raise


class StateError(ValueError):
    """States are there, and none can be gone on from; says why and what to do."""


@dataclass(frozen=True)
class Found:
    """A state whose files are whole. ``damaged`` tells of newer ones that are not."""

    folder: Path
    step: int
    damaged: tuple[str, ...] = ()

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / FACTS).read_text(encoding="utf-8"))

    @property
    def tensors(self) -> dict[str, Tensor]:
        return load_tensors(self.folder / TENSORS)


def has_state(folder: Path) -> bool:
    """Whether a state was ever finished there; it may have been damaged since."""
    return any((state / MANIFEST).is_file() for state in _states(folder))


def find_state(folder: Path) -> Found | None:
    """The state to go on from, None without any. Raises StateError where none of those that are there will do."""
    damaged: list[str] = []
    for state in reversed(_states(folder)):
        fault = _fault(state)
        if fault is None:
            return Found(state, _order(state)[0], tuple(damaged))
        damaged.append(f"{state.name}: {fault}")
    if not damaged:
        return None
    raise StateError(
        f"no saved state can be read ({'; '.join(damaged)}). Choose another run_name, or set if_run_exists to new; the "
        f"LoRA so far is in {folder} and can be connected to start_from"
    )


def write_state(folder: Path, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Keep a state, then remove all others. Whoever writes is alone in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    clean(folder)
    older = _states(folder)
    files = {TENSORS: serialised(tensors, {}), FACTS: json.dumps(facts, sort_keys=True).encode()}
    entries = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    aside = folder / f".state-{step:06d}-{secrets.token_hex(4)}.part"
    try:
        aside.mkdir()
        for name, content in files.items():
            _write(aside / name, content)
        _write(aside / MANIFEST, json.dumps({"schema": SCHEMA, "files": entries}, indent=1).encode())
        _sync(aside)
        state = _free_name(folder, step)
        os.rename(aside, state)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _sync(folder)
    for old in older:
        shutil.rmtree(old, ignore_errors=True)  # somebody may be looking; it goes with the next one then
    return state


def clean(folder: Path) -> None:
    """Remove what a killed process left half-written."""
    for path in folder.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _states(folder: Path) -> list[Path]:
    """All folders that are named like states, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()), key=_order)


def _order(state: Path) -> tuple[int, int]:
    """(step, how many times it was written before)."""
    match = _NAME.fullmatch(state.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _free_name(folder: Path, step: int) -> Path:
    taken = [order[1] for order in map(_order, _states(folder)) if order[0] == step]
    return folder / (f"state-{step:06d}.{max(taken) + 1}" if taken else f"state-{step:06d}")


def _fault(state: Path) -> str | None:
    """What is wrong with a state. Raises StateError for one that another version wrote."""
    try:
        manifest = json.loads((state / MANIFEST).read_text(encoding="utf-8"))
        schema, entries = manifest["schema"], {name: manifest["files"][name] for name in (TENSORS, FACTS)}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except _DAMAGED:
        return f"{MANIFEST} is damaged"
    if schema != SCHEMA:
        raise StateError(
            f"{state} was written in layout {schema!r}, this version reads {SCHEMA}. Update LoRA Loom, or choose "
            "another run_name"
        )
    for name, entry in entries.items():
        try:
            size, digest = (state / name).stat().st_size, _sha256(state / name)
            if (size, digest) != (entry["size"], entry["sha256"]):
                return f"{name} is damaged"
        except _DAMAGED as error:
            return f"{name} cannot be read ({error})"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make names durable; Windows has no such thing for folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
