"""LoRAs that were read a moment ago, so that another strength reads nothing again.

* ``get``: a LoRA by the host's name, or one that a run keeps ("run: cat"); ``of``: a LORA_MODEL of the graph.
* ``Loaded``: its tensors, what it says of itself, and ``file``: its adapters for a model, made once per model.
* ``clear``, ``held``: forget everything; the bytes that are kept.

What is kept are the files used last, within a budget of bytes: LOOM_CACHE_MB megabytes, 0 for nothing, or else a
quarter of the free memory and at most 2 GiB. A file counts as the same while its size and time do. One that was written
a moment before it was read is read once more: two versions of it may bear the same time. No file stays open.

The hosts have no hook by which "free memory" could ask packs for theirs; that is why the budget follows what is free.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..kernels.names import NameTable
from ..kernels.peft_config import beside, config_file
from ..kernels.reading import LoRAFile, read_lora
from ..kernels.safetensors_io import LoraModel, load_tensors
from ..kernels.sidecars import Facts, facts_about
from . import loras

VARIABLE = "LOOM_CACHE_MB"
MOST = 2**31  # bytes, without the variable
SHARE = 4  # of the free memory, one part
_COARSEST = 2_000_000_000  # nanoseconds between two times that a file system can tell apart, at worst (FAT)
_TRIES = 10

State = tuple[int, ...]  # of a file: equal while it is the same


class Loaded:
    """One LoRA in memory. ``path``, ``size`` and ``mtime`` (nanoseconds) are None for one that is no file.

    ``nbytes``: memory of the tensors, and of what adapters had to make of them.
    """

    def __init__(self, tensors: LoraModel, name: str, path: Path | None = None, state: State = ()) -> None:
        self.tensors, self.name, self.path = tensors, name, path
        self.size: int | None
        self.mtime: int | None
        self.size, self.mtime = state[:2] if state else (None, None)
        self.nbytes = _size(tensors.values())
        self._files: weakref.WeakKeyDictionary[NameTable, LoRAFile] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def metadata(self) -> dict[str, str]:
        return self.tensors.metadata

    @property
    def trained(self) -> bool:
        """Whether it is a fresh result."""
        return self.tensors.trained

    def file(self, names: NameTable) -> LoRAFile:
        """The adapters for the model that ``names`` are of. Raises ValueError naming the LoRA where none is whole."""
        with self._lock:
            found = self._files.get(names)
            if found is None:
                try:
                    with torch.inference_mode(False):
                        read = read_lora(self.tensors, names)
                except ValueError as error:
                    raise ValueError(f"{self.name}: {error}") from error
                found = replace(read, names=None)  # else the key would be held by its value
                own = {id(tensor) for tensor in self.tensors.values()}
                made = [tensor for adapter in found.adapters.values() for tensor in adapter.tensors.values()]
                with _lock:
                    self._files[names] = found
                    if any(id(tensor) not in own for tensor in made):
                        self.nbytes = max(self.nbytes, _size((*self.tensors.values(), *made)))
                    _trim()
        return replace(found, names=names)

    def facts(self) -> Facts:
        """Trigger words and what else is known, also from the files beside it, as they are now."""
        return facts_about(self.path, self.metadata, lambda: self._digest)

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        if self.path is not None:
            with open(self.path, "rb") as file:
                while content := file.read(2**20):
                    digest.update(content)
        return digest.hexdigest()


_kept: OrderedDict[str, tuple[State, Loaded]] = OrderedDict()  # path → …, the one used last at the end
_of_graph: dict[int, tuple[weakref.ref, dict[str, Tensor], Loaded]] = {}
_lock = threading.RLock()


def get(name: Any, force_reload: bool = False) -> Loaded:
    """The LoRA called ``name``, from memory where it is the same as on disk; ``force_reload`` reads it in any case.

    Raises ValueError for what is no LoRA of the host or of a run, or cannot be read.
    """
    path = loras.path_of(name, "lora_name")
    try:
        return _get(name, path, force_reload)
    except OSError as error:
        why = error.strerror or error
        raise ValueError(f"lora_name: {name!r} cannot be read ({why}); press R to read the list anew") from error


def _get(name: str, path: str, force_reload: bool) -> Loaded:
    state = _state(path)
    with _lock:
        kept = _kept.get(path)
        if kept is not None and kept[0] == state and not force_reload:
            _kept.move_to_end(path)
            return kept[1]
    for _ in range(_TRIES):  # it may be written anew in the meantime
        begun, state = time.time_ns(), _state(path)
        loaded = _read(name, path, state)
        if _state(path) == state:
            break
    else:
        raise ValueError(f"lora_name: {name!r} changes faster than it can be read; wait until it is written")
    settled = all(abs(begun - moment) > _COARSEST for moment in state[1::2])
    with _lock:
        _kept[path] = (state if settled else (), loaded)
        _kept.move_to_end(path)
        _trim()
    return loaded


def of(lora: Mapping[str, Tensor], name: str = "the connected LoRA") -> Loaded:
    """A LORA_MODEL of the graph; the same again for as long as the graph keeps it and it holds the same tensors."""
    number = id(lora)
    with _lock:
        known = _of_graph.get(number)
        if known is not None and known[0]() is lora and _same(known[1], lora) and known[2].name == name:
            return known[2]
    # a dict of its own, which does not keep the graph's alive
    model = LoraModel(lora, getattr(lora, "metadata", {}), getattr(lora, "trained", False))
    loaded = Loaded(model, name)
    if isinstance(lora, LoraModel):  # plain dicts cannot be watched
        with _lock:
            _of_graph[number] = weakref.ref(lora, lambda _: _of_graph.pop(number, None)), dict(lora), loaded
    return loaded


def held() -> int:
    """Bytes of the files that are kept."""
    with _lock:
        return sum(loaded.nbytes for _, loaded in _kept.values())


def clear() -> None:
    with _lock:
        _kept.clear()
        _of_graph.clear()


def budget() -> int:
    """Bytes that may be kept now. Raises ValueError naming the variable where it is no number of megabytes."""
    text = os.getenv(VARIABLE, "").strip()
    if text:
        if not text.isdecimal() or len(text) > 9:
            raise ValueError(f"{VARIABLE} is {text[:40]!r}; set it to whole megabytes, 0 to keep no LoRA in memory")
        return int(text) << 20
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    return int(min(MOST, (free + held()) / SHARE))


def _trim() -> None:
    """Forget what was used longest ago until the rest is within the budget."""
    with _lock:
        most, bytes_held = budget(), held()
        while _kept and bytes_held > most:
            _, (_, loaded) = _kept.popitem(last=False)
            bytes_held -= loaded.nbytes


def _read(name: str, path: str, state: State) -> Loaded:
    with torch.inference_mode(False):  # what nodes make is of no use to autograd, and this is kept for others
        model = load_tensors(path)
    model.metadata = beside(path, model.metadata) | model.metadata
    return Loaded(model, name, Path(path), state)


def _same(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    return before.keys() == now.keys() and all(tensor is now[key] for key, tensor in before.items())


def _state(path: str) -> State:
    """Size and time of the file, and of what PEFT keeps beside it."""
    files = [path, config_file(path)]
    return tuple(number for file in files if file for number in _size_and_time(file))


def _size_and_time(path: str | Path) -> State:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _size(tensors: Iterable[Tensor]) -> int:
    """Of their storages, each counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
