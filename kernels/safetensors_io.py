"""Tensors in files: safetensors in and out, whatever is in the file.

* ``LoraModel``: a dict of plain tensors that carries its metadata; what travels between nodes.
* ``load_tensors`` and ``save_tensors``: the whole file into memory, and one atomic replacement of the file.
* ``TensorFile``: the tensors of a large file one by one.
* ``read_metadata``: the header alone, for listings.
* ``tensor_hashes``: the hashes by which an adapter is known.

Files come from anywhere. A header is checked before anything of its size is allocated, so that memory stays within a
small multiple of the file, and whatever is wrong is a ValueError that names the file. Pickles are never opened.
Tensors keep the dtype they have. Equal content gives equal bytes: the header's metadata is written in sorted order.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import safetensors.torch
import torch
from torch import Tensor, contiguous_format

MAX_HEADER = 2**25  # bytes; a hundred thousand tensors need half of it
MAX_ENTRIES = 250_000  # tensors; the parsed header takes some hundred bytes for each
MAX_DIMENSIONS = 16
BUFFER = 2**22  # bytes that tensors share at most: one that is kept keeps no more than that of a large file
_HALVES = re.compile("[\ud800-\udfff]")
_DTYPES = {
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{"BOOL": torch.bool, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64},
}
_OTHER_FORMATS = (  # first bytes, what such a file is
    (b"PK\x03\x04", "a pickle (.pt or .ckpt) or another zip archive under a safetensors name"),
    (b"\x80", "a pickle (.pt or .ckpt) under a safetensors name"),
    (b"GGUF", "a GGUF file under a safetensors name"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never downloaded"),
    (b"<", "a web page: the download went wrong"),
)


class LoraModel(dict[str, Tensor]):
    """Name -> tensor, contiguous and on the CPU, with the file's ``metadata``; ``trained`` marks a fresh result."""

    def __init__(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, trained: bool = False
    ) -> None:
        super().__init__({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        self.metadata = dict(metadata or {})
        self.trained = trained


def load_tensors(source: str | os.PathLike | Mapping[str, Tensor]) -> LoraModel:
    """Read a .safetensors file, or adopt a state dict. Raises ValueError naming the file if it is not such a file."""
    if isinstance(source, LoraModel):
        return source
    if isinstance(source, Mapping):
        return LoraModel(source)
    path = checked_path(source)
    with open(path, "rb") as file:  # read, not mapped: a mapped file cannot be replaced on Windows
        header = _header_of(file, path)
        model = LoraModel({}, _metadata_in(header, path.name))
        header.pop("__metadata__", None)
        for entries in _runs(header):
            model.update(_read(file, entries, path))
    return model


class TensorFile:
    """A .safetensors file whose tensors are read one at a time; it is open, and never mapped, while one is read.

    ``shapes`` and ``dtypes`` by name, ``metadata``. Raises ValueError naming the file, also where it has changed since.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = checked_path(path)
        with open(self.path, "rb") as file:
            header = _header_of(file, self.path)
            self._data, self._state = file.tell(), _state(file)
        self.metadata = _metadata_in(header, self.path.name)
        header.pop("__metadata__", None)
        self._entries = header
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in header.items()}
        self.dtypes: dict[str, torch.dtype] = {name: _DTYPES[entry["dtype"]] for name, entry in header.items()}

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        with open(self.path, "rb") as file:
            if _state(file) != self._state:
                raise ValueError(f"{self.path.name}: was changed while it was read; begin again")
            file.seek(self._data + entry["data_offsets"][0])
            return _read(file, {name: entry}, self.path)[name]


def save_tensors(
    model: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a .safetensors file in one step: readers see the old file or the new one, never a part.

    ``metadata`` defaults to the model's own; kohya's and ModelSpec's hashes of the tensors are added to it. Folders are
    made as needed. Raises ValueError for another file type or metadata that is not text.
    """
    path = checked_path(path)
    values = dict(metadata if metadata is not None else getattr(model, "metadata", {}))
    for key, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"metadata {key!r} is {type(value).__name__}; safetensors metadata holds text only")
    # copies: the format refuses tensors that share memory, such as slices of one fused projection
    tensors = {name: tensor.detach().cpu().clone(memory_format=contiguous_format) for name, tensor in model.items()}
    replace_file(path, serialised(tensors, values | tensor_hashes(tensors, values)))
    return path


def replace_file(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step."""
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


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """Metadata of a .safetensors file, read from its header only. Raises ValueError naming the file."""
    path = checked_path(path)
    with open(path, "rb") as file:
        return _metadata_in(_header_of(file, path), path.name)


def tensor_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which model pages and web UIs know an adapter.

    sshs_model_hash: SHA-256 of the tensor data; sshs_legacy_hash: first 8 digits of the SHA-256 of 64 KiB at 1 MiB of
    the file with its ss_ metadata only (both as kohya's trainers write them); modelspec.hash_sha256: 0x + the former.
    """
    content = serialised(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    data = hashlib.sha256(memoryview(content)[8 + int.from_bytes(content[:8], "little") :]).hexdigest()
    legacy = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    return {"sshs_model_hash": data, "sshs_legacy_hash": legacy, "modelspec.hash_sha256": f"0x{data}"}


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file; the library would write the metadata in an order that differs from run to run."""
    content = safetensors.torch.save(dict(tensors))
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    header = {"__metadata__": dict(sorted(metadata.items()))} | entries if metadata else entries
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join((len(text).to_bytes(8, "little"), text, memoryview(content)[end:]))


def checked_path(path: str | os.PathLike) -> Path:
    """Raises ValueError naming the file for another file type than safetensors."""
    path = Path(path)
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path.name}: only .safetensors files are read and written; convert it to one first")
    return path


def _runs(header: Mapping[str, dict]) -> Iterator[dict[str, dict]]:
    """The entries in the order of their data, put together as far as one buffer can hold them side by side."""
    run: dict[str, dict] = {}
    first = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if run and (end - first > BUFFER or (begin - first) % _DTYPES[entry["dtype"]].itemsize):
            yield run
            run = {}
        first = first if run else begin
        run[name] = entry
    if run:
        yield run


def _read(file: BinaryIO, entries: Mapping[str, dict], path: Path) -> dict[str, Tensor]:
    """The tensors of a run of a header's entries, at whose data the ``file`` stands."""
    spans = [entry["data_offsets"] for entry in entries.values()]
    first, last = spans[0][0], spans[-1][1]
    content = torch.empty(last - first, dtype=torch.uint8)
    if file.readinto(memoryview(content.numpy())) != last - first:  # type: ignore
        raise ValueError(f"{path.name}: became shorter while it was read; get or save the file again")
    return {
        name: content[begin - first : end - first].view(_DTYPES[entry["dtype"]]).view(entry["shape"])
        for (name, entry), (begin, end) in zip(entries.items(), spans, strict=True)
    }


def _state(file: BinaryIO) -> tuple[int, int]:
    """Equal while the file is the same."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _header_of(file: BinaryIO, path: Path) -> dict:
    """The parsed header, found to describe exactly the bytes behind it, where the ``file`` stands then."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(24)
    for mark, what in _OTHER_FORMATS:
        # a length that begins with one of these bytes is possible, one that leads to a header is not mistaken
        if start.startswith(mark) and start[8:9] != b"{":
            raise ValueError(f"{path.name}: not a safetensors file, but {what}")
    length = int.from_bytes(start[:8], "little")
    if size < 10 or not 2 <= length <= MAX_HEADER:
        raise ValueError(f"{path.name}: not a safetensors file (its header claims {length} bytes)")
    if length > size - 8:
        raise ValueError(
            f"{path.name}: not a safetensors file, or cut short (its header claims {length} bytes of {size - 8})"
        )
    file.seek(8)
    text = file.read(length)
    if max(text.count(b"{"), text.count(b"[") // 2) > MAX_ENTRIES:
        raise ValueError(f"{path.name}: its header holds more than {MAX_ENTRIES} entries")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: not a safetensors file (its header is not readable)") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name}: not a safetensors file (its header is no table of tensors)")
    fault = _fault(header, size - 8 - length)
    if fault:
        raise ValueError(f"{path.name}: damaged or incomplete ({fault}); get or save the file again")
    return header


def _fault(header: dict, size: int) -> str | None:
    """What is wrong with the table of tensors, for ``size`` bytes of data."""
    spans = []
    if not _is_text("".join(header)):
        return "a tensor has a name that is no text"
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            return f"the entry of {_shown(name)} is not a tensor's"
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            return f"{_shown(name)} has the dtype {_shown(dtype)}, which is not known here"
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, (*shape, begin, end))):
            return f"{_shown(name)} has an impossible shape or place"
        needed = math.prod(shape) * _DTYPES[dtype].itemsize
        if begin > end or end - begin != needed:
            return f"{_shown(name)} has {end - begin} bytes, its shape needs {needed}"
        if end > size:
            return f"{_shown(name)} ends at byte {end} of {size}"
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            return f"{_shown(name)} {'overlaps another tensor' if begin < place else 'lies behind a gap'}"
        place = end
    return f"{size - place} bytes belong to no tensor" if place != size else None


def _is_text(value: object) -> bool:
    """JSON can spell half a character, which no file and no page can."""
    return isinstance(value, str) and not _HALVES.search(value)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _metadata_in(header: Mapping, name: str) -> dict[str, str]:
    values = header.get("__metadata__") or {}
    if not isinstance(values, dict) or not all(map(_is_text, (*values, *values.values()))):
        raise ValueError(f"{name}: not a safetensors file (its metadata holds something other than text)")
    return values


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
