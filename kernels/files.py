"""Adapter files: one canonical form in memory, safetensors on disk.

* ``LoraModel``: a dict of plain tensors that carries its metadata; what travels between nodes.
* ``read_lora`` and ``write_lora``: the whole file into memory, and one atomic replacement of the file.
* ``read_metadata``: the header alone, for listings.
* ``training_metadata``: kohya's and ModelSpec's keys from plain arguments.
* ``to_state_dict`` and ``from_state_dict``: between named tensors and adapter objects.

Tensors keep the dtype they have. Equal content gives equal bytes: the header's metadata is written in sorted order.
"""

from __future__ import annotations

import datetime
import hashlib
import io
import json
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor, contiguous_format

from .layers import Target
from .lora import LoRA

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format
_PAIRS = (  # (down, up) as the trainers spell them after the layer's name
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_A.default.weight", ".lora_B.default.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
)
_PARTS = {suffix: part for down, up in _PAIRS for suffix, part in ((down, "down"), (up, "up"))} | {".alpha": "alpha"}

_FURTHER = (  # what makes a layer's pair something other than a plain LoRA
    *(".dora_scale", ".lora_magnitude_vector", ".magnitude", ".lora_mid.weight"),
    *(".lora_up.bias", ".lora_B.bias", ".diff", ".reshape_weight"),
)


class LoraModel(dict[str, Tensor]):
    """Name -> tensor, contiguous and on the CPU, with the file's ``metadata``; ``trained`` marks a fresh result."""

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, trained: bool = False
    ) -> None:
        super().__init__({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        self.metadata = dict(metadata or {})
        self.trained = trained


def read_lora(source: str | os.PathLike | Mapping[str, Tensor]) -> LoraModel:
    """Read a .safetensors file, or adopt a state dict. Raises ValueError naming the file if it is not such a file."""
    if isinstance(source, LoraModel):
        return source
    if isinstance(source, Mapping):
        return LoraModel(source)
    path = _checked(source)
    content = path.read_bytes()  # not mapped: a mapped file cannot be replaced on Windows
    metadata = _metadata_of(io.BytesIO(content), path.name)
    try:
        return LoraModel(safetensors.torch.load(content), metadata)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path.name}: damaged or incomplete ({error}); get or save the file again") from error


def write_lora(model: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a .safetensors file in one step: readers see the old file or the new one, never a part.

    ``metadata`` defaults to the model's own; kohya's and ModelSpec's hashes of the tensors are added to it. Folders are
    made as needed. Raises ValueError for another file type or metadata that is not text.
    """
    path = _checked(path)
    values = dict(metadata if metadata is not None else getattr(model, "metadata", {}))
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {key!r} is {type(value).__name__}; safetensors metadata holds text only")
    # copies: the format refuses tensors that share memory, such as slices of one fused projection
    tensors = {name: tensor.detach().cpu().clone(memory_format=contiguous_format) for name, tensor in model.items()}
    content = _serialised(tensors, values | tensor_hashes(tensors, values))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.part")
    try:
        with open(aside, "xb") as file:  # closed before the replacement: Windows refuses to move an open file
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return path


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Metadata of a .safetensors file, read from its header only. Raises ValueError naming the file."""
    path = _checked(path)
    with open(path, "rb") as file:
        return _metadata_of(file, path.name)


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What a LoRA reacts to: its trigger phrase, or else the tags that most of its captions share (in 60 % or more)."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        images = int(metadata.get("ss_num_train_images", 0))
    except ValueError:
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        counts.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
    return [tag for tag, count in counts.most_common() if images and count >= 0.6 * images]


def to_state_dict(adapters: Mapping[str, LoRA], name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Adapters by canonical path -> "<name>.lora_down.weight", "<name>.lora_up.weight", "<name>.alpha"."""
    return {
        f"{name_of(path)}.{suffix}": tensor
        for path, adapter in adapters.items()
        for suffix, tensor in adapter.state().items()
    }


def from_state_dict(
    state: Mapping[str, Tensor], targets: Iterable[Target], find: Callable[[str], str | None]
) -> tuple[dict[str, LoRA], list[str]]:
    """Adapters by canonical path, and the keys that found no place.

    ``find`` maps a layer's name in the file to a canonical path (``NameTable.find``). A layer without alpha has
    alpha = rank. All keys of a layer are left over if it is unknown, incomplete, of another shape, or carries more
    than a plain pair (DoRA, Tucker, bias): a part of an adapter is another adapter.
    """
    shapes = {target.path: target.shape for target in targets}
    layers: dict[str, dict[str, str]] = {}
    unplaced = []
    for key in state:
        name, part = _split(key)
        path = find(name)
        if path is None or path not in shapes or (part or key) in layers.setdefault(path, {}):
            unplaced.append(key)
        else:
            layers[path][part or key] = key
    adapters = {}
    for path, keys in layers.items():
        parts = {part: state[key] for part, key in keys.items()}
        pair = _fitted(parts, shapes[path])
        if pair is None:
            unplaced.extend(keys.values())
        else:
            alpha = float(parts["alpha"]) if "alpha" in parts else float(pair[0].shape[0])
            adapters[path] = LoRA(*pair, alpha)
    return adapters, unplaced


def training_metadata(
    *,
    title: str,
    architecture: str,
    base_model_version: str,
    rank: int,
    alpha: float,
    resolution: int | tuple[int, int],
    recipe: Mapping[str, object],
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    implementation: str = "diffusers",
    prediction_type: str | None = None,
    trigger_phrase: str | None = None,
    learning_rate: float | None = None,
    max_train_steps: int | None = None,
    steps: int | None = None,
    epoch: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    optimizer: str | None = None,
    lr_scheduler: str | None = None,
    lr_warmup_steps: int | None = None,
    seed: int | None = None,
    num_train_images: int | None = None,
    tag_frequency: Mapping[str, Mapping[str, int]] | None = None,
    training_started_at: float | None = None,
    training_finished_at: float | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The metadata of a trained LoRA: kohya's ss_ keys, ModelSpec 1.0.0, and the recipe as JSON in "loom.recipe".

    ``architecture`` is ModelSpec's id of the base model ("stable-diffusion-v1"; "/lora" is added),
    ``base_model_version`` kohya's ("sd_v1", "sd_v2", "sdxl_base_v1-0", "flux1"); ``tag_frequency`` is folder -> tag ->
    count, times are Unix seconds, ``extra`` further ss_ keys without the prefix. What is None is left out.
    """
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    network_args = {"conv_dim": conv_rank, "conv_alpha": conv_alpha} if conv_rank else {}
    trained: dict[str, object] = {
        "v2": base_model_version.startswith("sd_v2"),
        "base_model_version": base_model_version,
        "output_name": title,
        "network_module": "networks.lora",
        "network_dim": rank,
        "network_alpha": alpha,
        "network_args": json.dumps({key: str(value) for key, value in network_args.items() if value is not None}),
        "resolution": f"({width}, {height})",
        "learning_rate": learning_rate,
        "max_train_steps": max_train_steps,
        "steps": steps,
        "epoch": epoch,
        "batch_size_per_device": batch_size,
        "total_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": lr_warmup_steps,
        "seed": seed,
        "num_train_images": num_train_images,
        "tag_frequency": None if tag_frequency is None else _json(tag_frequency),
        "training_started_at": training_started_at,
        "training_finished_at": training_finished_at,
        **(extra or {}),
    }
    spec: dict[str, object] = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": title,
        "date": None if training_finished_at is None else _iso_date(training_finished_at),
        "resolution": f"{width}x{height}",
        "prediction_type": prediction_type,
        "trigger_phrase": trigger_phrase,
    }
    every = {f"ss_{key}": value for key, value in trained.items()}
    every |= {f"modelspec.{key}": value for key, value in spec.items()}
    return {key: str(value) for key, value in every.items() if value is not None} | {"loom.recipe": _json(recipe)}


def tensor_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which model pages and web UIs know an adapter.

    sshs_model_hash: SHA-256 of the tensor data; sshs_legacy_hash: first 8 digits of the SHA-256 of 64 KiB at 1 MiB of
    the file with its ss_ metadata only (both as kohya's trainers write them); modelspec.hash_sha256: 0x + the former.
    """
    content = _serialised(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": data, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{data}"}


def _serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the library would write the metadata in an order that differs from run to run."""
    content = safetensors.torch.save(dict(tensors))
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    header = {"__metadata__": dict(sorted(metadata.items()))} | entries if metadata else entries
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))


def _metadata_of(file: BinaryIO, name: str) -> dict[str, str]:
    length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise ValueError(f"{name}: not a safetensors file (its header claims {length} bytes)")
    text = file.read(length)
    try:
        if len(text) < length:
            raise ValueError("cut short")
        header = json.loads(text)
        return {str(key): str(value) for key, value in header.get("__metadata__", {}).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{name}: not a safetensors file (its header is not readable)") from error


def _split(key: str) -> tuple[str, str | None]:
    """(layer name, down | up | alpha | None for a part that a plain LoRA does not have)."""
    for suffix, part in _PARTS.items():
        if key.endswith(suffix):
            return key.removesuffix(suffix), part
    for marker in _FURTHER:
        if marker in key:
            return key.partition(marker)[0], None
    return key, None


def _fitted(parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> tuple[Tensor, Tensor] | None:
    """(down, up) in the layer's own dimensions, None unless they are a plain pair for a weight of ``shape``."""
    if not {"down", "up"} <= parts.keys() <= {"down", "up", "alpha"}:
        return None
    down, up = parts["down"], parts["up"]
    if down.ndim < 2 or up.ndim < 2 or not len(down) or ("alpha" in parts and parts["alpha"].numel() != 1):
        return None
    rank = len(down)
    wanted = ((rank, *shape[1:]), (shape[0], rank, *(1 for _ in shape[2:])))
    for tensor, expected in zip((down, up), wanted, strict=True):
        # a 1×1 convolution and a linear layer differ by trailing ones only
        if _without_ones(tensor.shape) != _without_ones(expected):
            return None
    return down.reshape(wanted[0]), up.reshape(wanted[1])


def _without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    out, inner, *kernel = shape
    return (out, inner) if all(size == 1 for size in kernel) else (out, inner, *kernel)


def _checked(path: str | os.PathLike) -> Path:
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name}: only .safetensors files are read and written; convert it to one first")
    return path


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _iso_date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).isoformat()
