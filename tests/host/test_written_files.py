"""Files that we write, loaded by the host's own loaders: no key is left over, and the weights are as ours."""

import logging

import comfy.lora
import comfy.lora_convert
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher

import tiny
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.compose import Sum
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.names import NameTable, layer_shapes
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.safetensors_io import load_tensors
from lora_loom.kernels.writing import write_lora

# families whose plain form the host applies as it should (the others: test_host_adapter_errors.py)
FAMILIES = ("LoRA", "LoHa", "LoKr", "full")
LYCORIS = ("sd15", "sd2", "sdxl", "sd3", "flux", "qwen_image")
DIFFUSERS = ("sd3", "flux", "qwen_image")


def random_adapter(family, shape, seed):
    draws = torch.Generator().manual_seed(seed)
    adapter = make_adapter(family, shape, Options(2, 1.0), draws)
    return adapter.with_tensors({k: 0.1 * torch.randn(t.shape, generator=draws) for k, t in adapter.tensors.items()})


def random_adapters(model, family):
    """One adapter on a fifth of the layers."""
    targets = select_targets(model, "full", True)
    chosen = {n: target for n, target in enumerate(targets) if n < 4 or n % 5 == 0}
    return {target.path: random_adapter(family, target.shape, n) for n, target in chosen.items()}


def patched_by_the_host(patcher: ModelPatcher, tensors, caplog):
    """path -> weight, for all that the host's loader changes; it must have a place for every key."""
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names)
        clone = patcher.clone()
        taken = set(clone.add_patches(patches, 1.0))
        assert len(taken) == len(patches)
        weights = {}
        for key, patch in clone.patches.items():
            weight = clone.model.state_dict()[key].float().clone()
            weights[key.removesuffix(".weight")] = comfy.lora.calculate_weight(patch, weight, key)
    assert not [record.message for record in caplog.records], "keys or weights were left out"
    return weights


def check(name, family, dialect, tmp_path, caplog, adapters=None):
    patcher = tiny.tiny(name)
    shapes = layer_shapes(patcher.model)
    adapters = adapters or random_adapters(patcher.model, family)
    file = LoRAFile(adapters, names=NameTable(shapes))
    path = write_lora(file, tmp_path / "ours.safetensors", dialect)
    weights = patched_by_the_host(patcher, load_tensors(path), caplog)
    assert weights.keys() == adapters.keys()
    state = patcher.model.state_dict()
    for path_of, adapter in adapters.items():
        wanted = adapter.merged(state[path_of + ".weight"].float())
        torch.testing.assert_close(weights[path_of], wanted, rtol=2e-4, atol=2e-5)
        assert not torch.allclose(wanted, state[path_of + ".weight"].float(), atol=1e-4)
    again = read_lora(path, shapes)
    assert not again.unplaced and again.adapters.keys() == adapters.keys()
    return path


@pytest.mark.parametrize("dialect", ["native", "kohya"])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_model(name, dialect, tmp_path, caplog):
    check(name, "LoRA", dialect, tmp_path, caplog)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_families(name, family, tmp_path, caplog):
    check(name, family, "native", tmp_path, caplog)


def named_by_the_host(name, dialect, tmp_path):
    """Adapters on those layers only whose names of the dialect the host knows."""
    patcher = tiny.tiny(name)
    known = comfy.lora.model_lora_keys_unet(patcher.model, {})
    found = {}
    for path, adapter in random_adapters(patcher.model, "LoRA").items():
        file = LoRAFile({path: adapter}, names=NameTable(layer_shapes(patcher.model)))
        keys = load_tensors(write_lora(file, tmp_path / "one.safetensors", dialect))
        if all(any(key.startswith(prefix + ".") for prefix in known) for key in keys):
            found[path] = adapter
    return found


@pytest.mark.parametrize("name", LYCORIS)
def test_lycoris_names(name, tmp_path, caplog):
    adapters = named_by_the_host(name, "lycoris", tmp_path)
    assert len(adapters) > 3
    check(name, "", "lycoris", tmp_path, caplog, adapters)


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers_names(name, tmp_path, caplog):
    adapters = named_by_the_host(name, "diffusers", tmp_path)
    assert len(adapters) > 3
    check(name, "", "diffusers", tmp_path, caplog, adapters)


@pytest.mark.parametrize("dialect", ["native", "kohya", "diffusers"])
def test_text_encoders(dialect, tmp_path, caplog):
    clip = tiny.tiny_clip()
    shapes = layer_shapes(clip.cond_stage_model)
    table = NameTable(shapes)
    paths = [path for path in table.text.paths if len(shapes[path]) == 2 and ".encoder." in path]
    adapters = {path: random_adapter("LoRA", shapes[path], n) for n, path in enumerate(paths)}
    tensors = load_tensors(write_lora(LoRAFile(adapters, names=table), tmp_path / "te.safetensors", dialect))
    names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(dict(tensors), names)
    assert not [record.message for record in caplog.records]
    assert {key.removesuffix(".weight") for key in patches} == set(adapters)
    again = read_lora(tensors, shapes)
    assert not again.unplaced and again.adapters.keys() == adapters.keys()


def test_a_sum_is_one_adapter_for_the_host(tmp_path, caplog):
    """Of two adapters on a module the host would take the last, without a word."""
    path = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k"
    shape = layer_shapes(tiny.tiny("sd15").model)[path]
    both = Sum([random_adapter(family, shape, n) for n, family in enumerate(("LoRA", "LoHa"))])
    check("sd15", "", "native", tmp_path, caplog, {path: both})
