"""What was expensive to compute, kept on disk under a key of everything that it was computed from.

* ``key_of``: sha256 of plain facts and tensors; the same content gives the same key in every process.
* ``checksum``: a key for gigabytes of weights, over every bit of them, at the speed of memory.
* ``DiskCache``: one safetensors file per entry, in folders of two letters. Entries are put in place in one step, so
  that several processes may share the cache. One that is damaged, or lies where another belongs, counts as missing.
  Those unused for longest go when the whole outgrows its budget.

Nothing is ever looked up by name or date: whatever changes the result must be part of the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.safetensors_io import load_tensors, replace_file, serialised

COLUMNS = 1024  # of the table of 64-bit words that the checksum adds up
ABANDONED = 3600  # seconds after which a file that is still being written belongs to nobody
_KEY, _FACTS, _CONTENT = "loom.key", "loom.facts", "loom.content"


class _Digest(Protocol):
    def update(self, data: Any, /) -> None: ...


# -- keys


def key_of(*facts: Any) -> str:
    """64 hexadecimal digits that differ when any of the facts does.

    Facts are numbers, text, None, tensors, and sequences, mappings and dataclasses of them; anything else, whose
    content is not known here, is a TypeError.
    """
    digest = hashlib.sha256()
    _feed(digest, facts)
    return digest.hexdigest()


def _feed(digest: _Digest, value: Any) -> None:
    """Every part is written with its kind and its length, so that no two values read the same."""
    if value is None or isinstance(value, bool | int | float | str):
        _write(digest, type(value).__name__, repr(value).encode())
    elif isinstance(value, bytes):
        _write(digest, "bytes", value)
    elif isinstance(value, Tensor):
        _write(digest, f"tensor {value.dtype} {tuple(value.shape)}", _bytes_of(value).cpu().numpy())
    elif isinstance(value, Mapping):
        _write(digest, f"mapping {len(value)}")
        for name in sorted(value, key=repr):
            _feed(digest, name)
            _feed(digest, value[name])
    elif isinstance(value, list | tuple):
        _write(digest, f"sequence {len(value)}")
        for part in value:
            _feed(digest, part)
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        _write(digest, type(value).__name__)
        _feed(digest, fields)
    else:
        raise TypeError(f"{type(value).__name__} has no content that could be part of a key")


def _write(digest: _Digest, kind: str, content: Any = b"") -> None:
    digest.update(f"{kind}:{len(content)}:".encode())
    digest.update(content)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A key of named tensors, wherever they are; weights of gigabytes take about a second.

    Large ones are read as a table of 64-bit words, of which the sums of the columns and of the rows are hashed: one
    changed bit changes both. It tells weights apart, and is no defence against somebody who wants them confused.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        _feed(digest, (name, str(tensor.dtype), tuple(tensor.shape)))
        content = _bytes_of(tensor)
        whole = len(content) // (8 * COLUMNS) * 8 * COLUMNS
        if whole > 8 * COLUMNS:
            table = content[:whole]
            if table.storage_offset() % 8:
                table = table.clone()  # words have to lie on multiples of their size
            words = table.view(torch.int64).view(-1, COLUMNS)
            _feed(digest, (words.sum(0), words.sum(1), content[whole:]))
        else:
            _feed(digest, content)
    return digest.hexdigest()


# -- entries


@dataclass(frozen=True)
class Entry:
    """``facts`` hold what JSON can."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class DiskCache:
    """Entries below ``folder``, together at most ``budget`` bytes once ``prune`` has run.

    ``problem`` tells why entries could not be written, if so: a cache that cannot be filled is no reason to fail.
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget = folder, budget
        self.hits = self.misses = 0
        self.problem = ""

    def get(self, key: str) -> Entry | None:
        """The entry, or None where there is none that can be trusted."""
        entry = self._read(key)
        if entry is None:
            self.misses += 1
        else:
            self.hits += 1
            with suppress(OSError):  # somebody else has just removed it; what counts has been read
                os.utime(self._path(key))
        return entry

    def _read(self, key: str) -> Entry | None:
        path = self._path(key)
        try:
            with torch.inference_mode(False):
                found = load_tensors(path)
                tensors = {name: tensor.clone() for name, tensor in found.items()}
        except (OSError, ValueError):  # missing, or damaged in any way
            return None
        facts = found.metadata.get(_FACTS, "")
        if found.metadata.get(_KEY) != key or found.metadata.get(_CONTENT) != key_of(tensors, facts):
            return None
        return Entry(tensors, json.loads(facts))

    def put(self, key: str, entry: Entry) -> None:
        """Keep an entry; on a full or locked disk it is left out, and ``problem`` says so."""
        path, facts = self._path(key), json.dumps(entry.facts, sort_keys=True)
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in entry.tensors.items()}
        metadata = {_KEY: key, _FACTS: facts, _CONTENT: key_of(tensors, facts)}
        try:
            replace_file(path, serialised(tensors, metadata))
        except OSError as error:
            self.problem = f"could not write to {self.folder} ({error.strerror or error})"

    def prune(self) -> None:
        """Remove the entries unused for longest until the rest fits the budget, and what broken-off writers left."""
        entries = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):  # removed by another process meanwhile
                status = path.stat()
                if path.suffix != ".part":
                    entries.append((status.st_mtime, status.st_size, path))
                elif status.st_mtime < time.time() - ABANDONED:
                    path.unlink()
        excess = sum(size for _, size, _ in entries) - self.budget
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            with suppress(OSError):
                path.unlink()
                excess -= size

    def _path(self, key: str) -> Path:
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise ValueError(f"{key[:80]!r} is no key")
        return self.folder / key[:2] / f"{key}.safetensors"
