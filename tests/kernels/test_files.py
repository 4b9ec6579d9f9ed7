"""Adapter files: round trips, atomic writing, refusals, kohya's hashes and the metadata."""

import hashlib
import io
import json
import os

import pytest
import safetensors.torch
import torch

from lora_loom.kernels.adapter import Options
from lora_loom.kernels.files import (
    LoraModel,
    from_state_dict,
    read_lora,
    read_metadata,
    tensor_hashes,
    to_state_dict,
    training_metadata,
    write_lora,
)
from lora_loom.kernels.layers import Target
from lora_loom.kernels.lora import LoRA

LINEAR = Target("diffusion_model.a", "linear", (6, 4), "blocks.0")
CONV = Target("diffusion_model.b", "conv", (6, 4, 3, 3), None)
POINT = Target("diffusion_model.c", "conv", (6, 4, 1, 1), None)
TARGETS = (LINEAR, CONV, POINT)
KNOWN = {"lora_unet_" + target.path[-1]: target.path for target in TARGETS}


def write_name(path):
    return "lora_unet_" + path[-1]


def adapters(rank=2, alpha=3.0):
    draws = torch.Generator().manual_seed(0)
    made = {target.path: LoRA.create(target.shape, Options(rank, alpha), draws) for target in TARGETS}
    for adapter in made.values():
        adapter.up.normal_(generator=draws)
    return made


def state():
    return to_state_dict(adapters(), write_name)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_round_trip(tmp_path):
    path = write_lora(LoraModel(state(), {"ss_seed": "7"}), tmp_path / "new" / "a.safetensors")
    again = read_lora(path)
    assert again.keys() == state().keys()
    for key, tensor in state().items():
        assert torch.equal(again[key], tensor)
        assert again[key].is_contiguous()
    assert again.metadata["ss_seed"] == "7"
    assert again.metadata == read_metadata(path)
    assert not again.trained
    assert read_lora(again) is again
    assert safetensors.torch.load_file(path).keys() == again.keys()
    assert names_in(path.parent) == ["a.safetensors"]


def test_slices_of_one_tensor_are_written(tmp_path):
    fused = torch.arange(12.0).reshape(2, 6)
    written = read_lora(write_lora({"q": fused[:, :3], "k": fused[:, 3:]}, tmp_path / "s.safetensors"))
    assert torch.equal(torch.cat([written["q"], written["k"]], 1), fused)


def test_state_dict_round_trip():
    found, unplaced = from_state_dict(state(), TARGETS, KNOWN.get)
    assert not unplaced
    for path, adapter in adapters().items():
        assert torch.equal(found[path].down, adapter.down)
        assert torch.equal(found[path].up, adapter.up)
        assert found[path].alpha == 3.0


@pytest.mark.parametrize(
    ("down", "up"),
    [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ],
)
def test_other_spellings_and_missing_alpha(down, up):
    renamed = {
        key.replace(".lora_down.weight", down).replace(".lora_up.weight", up): tensor
        for key, tensor in state().items()
        if not key.endswith("alpha")
    }
    found, unplaced = from_state_dict(renamed, TARGETS, KNOWN.get)
    assert not unplaced
    assert {adapter.alpha for adapter in found.values()} == {2.0}


def test_linear_and_pointwise_files_fit_each_other():
    swapped = state()
    for name, ones in (("lora_unet_a", (1, 1)), ("lora_unet_c", ())):
        for part in ("lora_down", "lora_up"):
            tensor = swapped[f"{name}.{part}.weight"]
            swapped[f"{name}.{part}.weight"] = tensor.reshape(*tensor.shape[:2], *ones)
    found, unplaced = from_state_dict(swapped, TARGETS, KNOWN.get)
    assert not unplaced
    for target in TARGETS:
        assert found[target.path].shape == target.shape


@pytest.mark.parametrize(
    "extra",
    [
        {"lora_unet_a.dora_scale": torch.ones(6, 1)},
        {"lora_unet_a.lora_mid.weight": torch.ones(2, 2)},
        {"lora_unet_a.lora_up.bias": torch.ones(6)},
        {"lora_unet_a.lora_down.weight": torch.ones(2, 5)},
        {"lora_unet_a.lora_down.weight": torch.ones(4)},
        {"lora_unet_a.lora_down.weight": torch.ones(0, 4)},
        {"lora_unet_a.alpha": torch.ones(3)},
    ],
)
def test_what_is_no_plain_pair_for_its_layer_is_left_over_whole(extra):
    found, unplaced = from_state_dict(state() | extra, TARGETS, KNOWN.get)
    assert found.keys() == {CONV.path, POINT.path}
    assert set(unplaced) == {key for key in state() | extra if key.startswith("lora_unet_a.")}


def test_unknown_and_incomplete_layers_are_left_over():
    partial = {
        "lora_unet_a.lora_up.weight": torch.ones(6, 2),
        "lora_unet_z.alpha": torch.tensor(1.0),
        "note": torch.ones(1),
    }
    found, unplaced = from_state_dict(partial, TARGETS, KNOWN.get)
    assert not found
    assert set(unplaced) == partial.keys()


def test_a_second_spelling_of_the_same_layer_is_left_over():
    double = state() | {"other_a.lora_down.weight": torch.ones(2, 4)}
    found, unplaced = from_state_dict(double, TARGETS, (KNOWN | {"other_a": LINEAR.path}).get)
    assert unplaced == ["other_a.lora_down.weight"]
    assert torch.equal(found[LINEAR.path].down, adapters()[LINEAR.path].down)


def test_models_hold_plain_tensors():
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).T)
    model = read_lora({"x": weight})
    assert type(model["x"]) is torch.Tensor
    assert model["x"].is_contiguous()
    assert not model["x"].requires_grad
    assert (model.metadata, model.trained) == ({}, False)


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a", "a.safetensors.bin"])
def test_other_file_types_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    for act in (read_lora, read_metadata, lambda path: write_lora(state(), path)):
        with pytest.raises(ValueError, match=rf"{name}: only \.safetensors"):
            act(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 64,
        b"\xff" * 64,
        (40).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[[]]",
        (50_000).to_bytes(8, "little") + b"[" * 50_000,
    ],
)
def test_damaged_files_are_named(tmp_path, content):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    for act in (read_lora, read_metadata):
        with pytest.raises(ValueError, match=r"broken\.safetensors: "):
            act(path)


def test_a_cut_file_is_named(tmp_path):
    path = write_lora(state(), tmp_path / "cut.safetensors")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"cut\.safetensors: damaged or incomplete"):
        read_lora(path)


def test_metadata_is_text():
    with pytest.raises(ValueError, match="'ss_seed' is int"):
        write_lora(state(), "never.safetensors", {"ss_seed": 7})


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path, monkeypatch):
    path = write_lora(state(), tmp_path / "a.safetensors")
    before = path.read_bytes()

    def refuse(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        write_lora({"x": torch.ones(1)}, path)
    assert path.read_bytes() == before
    assert names_in(tmp_path) == ["a.safetensors"]


def test_equal_content_is_equal_bytes(tmp_path):
    metadata = {f"ss_{n}": 'é ✓ "quoted"' for n in range(20)}
    written = {write_lora(state(), tmp_path / f"{n}.safetensors", metadata).read_bytes() for n in range(5)}
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
    written = read_metadata(write_lora(tensors, tmp_path / "h.safetensors", metadata))
    assert (written["sshs_model_hash"], written["sshs_legacy_hash"]) == (model_hash, legacy)


def test_training_metadata():
    recipe = {"rank": 8, "preset": "attention"}
    made = training_metadata(
        title="fern",
        architecture="stable-diffusion-v1",
        base_model_version="sd_v1",
        rank=8,
        alpha=4.0,
        conv_rank=4,
        conv_alpha=1.0,
        resolution=(512, 768),
        recipe=recipe,
        prediction_type="epsilon",
        trigger_phrase="sks fern",
        learning_rate=1e-4,
        max_train_steps=100,
        batch_size=2,
        seed=0,
        tag_frequency={"ferns": {"fern": 3}},
        training_started_at=1_700_000_000.0,
        training_finished_at=1_700_000_060.5,
        extra={"max_grad_norm": 1.0},
    )
    assert all(isinstance(value, str) for value in made.values())
    assert (
        made.items()
        >= {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "8",
            "ss_network_alpha": "4.0",
            "ss_network_args": '{"conv_dim": "4", "conv_alpha": "1.0"}',
            "ss_resolution": "(512, 768)",
            "ss_seed": "0",
            "ss_max_grad_norm": "1.0",
            "ss_tag_frequency": '{"ferns": {"fern": 3}}',
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.resolution": "512x768",
            "modelspec.date": "2023-11-14T22:14:20+00:00",
            "modelspec.trigger_phrase": "sks fern",
        }.items()
    )
    assert json.loads(made["loom.recipe"]) == recipe
    assert "ss_optimizer" not in made
    assert "ss_lr_scheduler" not in made
