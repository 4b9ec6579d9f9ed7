"""Tensors in files: round trips, atomic writing, kohya's hashes. What is refused is in test_hostile_files.py."""

import hashlib
import io
import json
import os
import random

import pytest
import safetensors.torch
import torch

from lora_loom.kernels import safetensors_io
from lora_loom.kernels.safetensors_io import (
    BUFFER,
    LoraModel,
    load_tensors,
    read_metadata,
    save_tensors,
    tensor_hashes,
)


def state():
    draws = torch.Generator().manual_seed(0)
    pair = {"lora_down.weight": (2, 4), "lora_up.weight": (6, 2)}
    tensors = {f"lora_unet_{n}.{part}": torch.randn(s, generator=draws) for n in "abc" for part, s in pair.items()}
    return tensors | {f"lora_unet_{n}.alpha": torch.tensor(3.0) for n in "abc"}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_round_trip(tmp_path):
    path = save_tensors(LoraModel(state(), {"ss_seed": "7"}), tmp_path / "new" / "a.safetensors")
    again = load_tensors(path)
    assert again.keys() == state().keys()
    for key, tensor in state().items():
        assert torch.equal(again[key], tensor)
        assert again[key].is_contiguous()
    assert again.metadata["ss_seed"] == "7"
    assert again.metadata == read_metadata(path)
    assert not again.trained
    assert load_tensors(again) is again
    assert safetensors.torch.load_file(path).keys() == again.keys()
    assert names_in(path.parent) == ["a.safetensors"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
)
def test_every_dtype_keeps_its_bits(tmp_path, dtype):
    tensor = torch.tensor([0.0, 1.0, 0.0, 1.0]).to(dtype)
    again = load_tensors(save_tensors({"x": tensor, "none": tensor[:0]}, tmp_path / "d.safetensors"))
    assert again["x"].dtype == again["none"].dtype == dtype
    assert torch.equal(again["x"].view(torch.uint8), tensor.view(torch.uint8))
    assert again["none"].shape == (0,)


def test_slices_of_one_tensor_are_written(tmp_path):
    fused = torch.arange(12.0).reshape(2, 6)
    written = load_tensors(save_tensors({"q": fused[:, :3], "k": fused[:, 3:]}, tmp_path / "s.safetensors"))
    assert torch.equal(torch.cat([written["q"], written["k"]], 1), fused)


def test_models_hold_plain_tensors():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    model = load_tensors({"x": weight})
    assert type(model["x"]) is torch.Tensor
    assert model["x"].is_contiguous()
    assert not model["x"].requires_grad
    assert (model.metadata, model.trained) == ({}, False)


def test_metadata_is_text():
    with pytest.raises(ValueError, match="'ss_seed' is int"):
        save_tensors(state(), "never.safetensors", {"ss_seed": 7})


def test_metadata_is_read_from_the_header_alone(tmp_path):
    path = save_tensors({"x": torch.zeros(1_000_000)}, tmp_path / "h.safetensors", {"a": "b"})
    with open(path, "r+b") as file:
        file.seek(3_000_000)
        file.write(b"\xff" * 100_000)
    assert read_metadata(path)["a"] == "b"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = save_tensors(state(), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        save_tensors({"x": torch.ones(1)}, path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.safetensors"]


def test_equal_content_is_equal_bytes(tmp_path):
    metadata = {f"ss_{n}": 'é ✓ "quoted"' for n in range(20)}
    written = {save_tensors(state(), tmp_path / f"{n}.safetensors", metadata).read_bytes() for n in range(5)}
    assert len(written) == 1
    assert read_metadata(tmp_path / "0.safetensors").items() >= metadata.items()
    header = safetensors.torch.load(written.pop())  # the library accepts it
    assert header.keys() == state().keys()


def kohya_hashes(tensors, metadata):
    """sd-scripts, library/train_util.py: precalculate_safetensors_hashes and its two helpers."""
    kept = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = io.BytesIO(safetensors.torch.save(tensors, kept))
    content.seek(0x100000)
    legacy = hashlib.sha256(content.read(0x10000)).hexdigest()[0:8]
    content.seek(0)
    content.seek(int.from_bytes(content.read(8), "little") + 8)
    return hashlib.sha256(content.read()).hexdigest(), legacy


def test_hashes_are_kohyas(tmp_path):
    tensors = {f"layer{n}.lora_up.weight": torch.randn(400, 400) for n in range(3)}  # longer than 1 MiB
    metadata = {"ss_seed": "1", "ss_note": "ü", "modelspec.title": "not part of it"}
    model_hash, legacy = kohya_hashes(tensors, metadata)
    assert tensor_hashes(tensors, metadata) == {
        "sshs_model_hash": model_hash,
        "sshs_legacy_hash": legacy,
        "modelspec.hash_sha256": "0x" + model_hash,
    }
    written = read_metadata(save_tensors(tensors, tmp_path / "h.safetensors", metadata))
    assert (written["sshs_model_hash"], written["sshs_legacy_hash"]) == (model_hash, legacy)


def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    path = save_tensors({"x": torch.zeros(100_000)}, tmp_path / "a.safetensors")
    checked = safetensors_io._header_of

    def cut(file, path):
        header = checked(file, path)
        os.truncate(path, path.stat().st_size - 4)
        return header

    monkeypatch.setattr(safetensors_io, "_header_of", cut)
    with pytest.raises(ValueError, match=r"a\.safetensors: became shorter while it was read"):
        load_tensors(path)


def test_one_tensor_that_is_kept_keeps_little_of_its_file(tmp_path):
    """And it can be changed without the others."""
    large = BUFFER // 4  # float32s
    shapes = {"a": 3, "b": 5, "c": large, "d": large - 9, "e": 9, "f": 1}
    written = {name: torch.randn(size) for name, size in shapes.items()} | {"g": torch.ones(3, dtype=torch.bool)}
    path = save_tensors(written, tmp_path / "a.safetensors")
    loaded = load_tensors(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
    assert max(tensor.untyped_storage().nbytes() for tensor in loaded.values()) <= BUFFER
    assert len({tensor.untyped_storage().data_ptr() for tensor in loaded.values()}) < len(loaded)
    loaded["a"].fill_(1)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items() if name != "a")


def test_tensors_behind_odd_bytes_are_read(tmp_path):
    kinds = {"BOOL": torch.bool, "F16": torch.float16, "U8": torch.uint8, "F64": torch.float64, "BF16": torch.bfloat16}
    draws = random.Random(2)
    written, header, data = {}, {}, b""
    for number, (called, kind) in enumerate([*kinds.items()] * 8):  # the library sorts by width; other writers do not
        tensor = torch.rand(draws.randrange(7), 3).gt(0.5).to(kind)
        content = bytes(tensor.view(torch.uint8).numpy()) if tensor.numel() else b""
        place = [len(data), len(data) + len(content)]
        name = f"{number:03}"
        written[name], header[name] = tensor, {"dtype": called, "shape": list(tensor.shape), "data_offsets": place}
        data += content
    text = json.dumps(header).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    loaded = load_tensors(path)
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in written.items())
