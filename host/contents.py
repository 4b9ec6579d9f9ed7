"""What the caches on disk know a VAE or a CLIP by, and where those caches lie.

A model is known by the content of its weights, of the patches on them and by the version of the host, never by the
name of a file: another VAE of the same class, a LoRA on the CLIP or a changed strength is another key. It does not
matter whether the host has it loaded at the moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FunctionType
from typing import Any

import comfy.weight_adapter
import comfyui_version
import folder_paths
import torch
from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..training.caches import DiskCache, checksum, key_of
from .fingerprints import unread
from .fusing import OnUse

DISK_BUDGET = 32 << 30  # bytes of the cache on disk; what was unused for longest goes first
FORMAT = 1  # of the entries and of how they are computed: raise it when either changes


class UnknownContentError(ValueError):
    """Something that changes what a model computes, and of which nobody can tell whether it is the same next time."""


def open_cache() -> DiskCache:
    """The cache that all runs share: in the host's user folder, where its web server does not reach.

    The temporary folder would not do: the host empties it whenever it starts.
    """
    return DiskCache(Path(folder_paths.get_system_user_directory("lora_loom")) / "cache", DISK_BUDGET)


def content_of_model(patcher: Any) -> str:
    """A key of everything that decides what the patcher's model computes. Raises UnknownContentError."""
    strange = [name for name in ("hook_patches", "forced_hooks") if getattr(patcher, name, None)]
    on_use = patcher.weight_wrapper_patches
    if not all(isinstance(function, OnUse) for functions in on_use.values() for function in functions):
        strange.append("weight_wrapper_patches")
    if strange:
        raise UnknownContentError(f"it carries {' and '.join(strange)}")
    try:
        patches = {name: [_plain(part) for part in entries] for name, entries in patcher.patches.items()}
        patches |= {f"{name} on use": [_plain(one.patch) for one in functions] for name, functions in on_use.items()}
        return key_of(
            FORMAT,
            comfyui_version.__version__,
            _name_of(type(patcher.model)),
            checksum(_weights(patcher)),
            patches,
            {name: _plain(replaced) for name, replaced in patcher.object_patches.items()},
        )
    except TypeError as error:
        raise UnknownContentError(str(error)) from error


def _weights(patcher: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's own weights, also while patched ones are in their place."""
    ignored = unread(patcher.model)
    for name, tensor in patcher.model.state_dict().items():
        if name.startswith(ignored):
            continue
        backup = patcher.backup.get(name)
        yield from _flat(name, tensor if backup is None else backup.weight)


def _flat(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that a quantised one is made of."""
    if type(tensor) in (Tensor, nn.Parameter):
        yield name, tensor
        return
    if not hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(f"{name} is a {type(tensor).__name__}, whose content is not known")
    inner, context = tensor.__tensor_flatten__()
    for part in inner:
        yield from _flat(f"{name}.{part} {type(tensor).__name__} {context}", getattr(tensor, part))


def _plain(value: Any) -> Any:
    """A patch as facts that a key can be made of."""
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, comfy.weight_adapter.WeightAdapterBase):
        return _name_of(type(value)), value.name, _plain(value.weights)
    if isinstance(value, Adapter):
        return _name_of(type(value)), _plain(vars(value))
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, FunctionType) and value.__closure__ is None and "<" not in value.__qualname__:
        return _name_of(value)  # a function of a module: its name says what it does
    return value


def _name_of(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"
