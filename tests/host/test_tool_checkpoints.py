"""Checkpoints as the host saves them, read without it: the same names, shapes and weights; and a LoRA out of two."""

import comfy.sd
import pytest
import torch

import tiny
from applying import lora_on, random_adapter, relative
from lora_loom.host.apply import FUSE, Strengths, apply_lora
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.tools.checkpoint import Checkpoint
from lora_loom.kernels.tools.command_line import main
from lora_loom.kernels.writing import to_tensors

CLIPS = {"sd15": tiny.tiny_clip, "sdxl": tiny.tiny_dual_clip, "flux": None}


def parts_of(name):
    make = CLIPS[name]
    return tiny.tiny(name), None if make is None else make()


def saved(path, model, clip):
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(path), model, clip)
    return path


@pytest.mark.parametrize("name", CLIPS)
def test_names_shapes_and_weights_are_the_hosts(name, tmp_path):
    model, clip = parts_of(name)
    found = Checkpoint(saved(tmp_path / "base.safetensors", model, clip))
    assert found.table.architecture == NameTable.of(model.model).architecture
    trees = [model.model] if clip is None else [model.model, clip.cond_stage_model]
    own = {key: value for tree in trees for key, value in tree.named_parameters() if not key.endswith("logit_scale")}
    missing = {key for key in own if key not in found}
    assert missing <= {"clip_l.transformer.text_projection.weight"}  # which the host does not save
    for key, value in own.items():
        if key in found:
            assert found.shape(key) == tuple(value.shape), key
            torch.testing.assert_close(found.stored(key).float(), value.detach().float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", CLIPS)
def test_the_command_extracts_what_was_merged(name, tmp_path, capsys):
    model, clip = parts_of(name)
    shapes = NameTable.of(model.model).shapes
    adapters = lora_on(model, every=4)[0]
    if clip is not None:
        text = NameTable.of(clip.cond_stage_model)
        shapes = shapes | text.shapes
        for number, path in enumerate(path for path in text.text.paths if path.endswith(("q_proj", "fc2"))):
            adapters[path] = random_adapter("LoRA", text.shapes[path], {}, torch.zeros(1), number)
    names = NameTable(shapes)
    lora = to_tensors(LoRAFile(adapters, names=names))
    base = saved(tmp_path / "base.safetensors", model, clip)
    changed, changed_clip, _ = apply_lora(model, clip, lora, Strengths.of(0.9, 0.9), FUSE)
    tuned = saved(tmp_path / "tuned.safetensors", changed, changed_clip)
    out = tmp_path / "out.safetensors"
    command = ["extract", str(tuned), str(base), "--rank", "3", "--out", str(out), "--precision", "float32"]
    assert main(command) == 0, capsys.readouterr().err
    found = read_lora(out, names)
    assert not found.unplaced and found.adapters.keys() == adapters.keys()
    for path, adapter in adapters.items():
        limit = 1e-3 if path.startswith("diffusion_model.") else 1e-2  # the host saves text encoders in half precision
        assert relative(found.adapters[path].delta(), 0.9 * adapter.delta()) < limit, path
