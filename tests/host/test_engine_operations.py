"""Two hundred loaders, changes, clones, removals and unloads in random order: nothing mixes, nothing stays."""

import gc
import random

import comfy.model_management
import pytest
import torch

import tiny
from applying import lora_on, norms, sampled
from lora_loom.host import fusing
from lora_loom.host.apply import AUTO, BRANCH, FUSE, HOST, Strengths, apply_lora
from lora_loom.kernels.strengths.schedule import fixed, parse
from snapshot import weights

OPERATIONS = 200


def live_bytes():
    """Of all tensors that anybody holds."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.layout == torch.strided and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def random_strengths(draw, engine):
    if engine == HOST:
        return Strengths.of(draw.choice((0.0, 0.5, -0.25)))
    strengths = {"model": fixed(draw.choice((0.0, 0.5, 1.0, -0.25)))}
    if draw.random() < 0.3:
        strengths["blocks"] = draw.choice(("in=0.5, out=0", "attn=0", "IN1-2=1.5, mid=0"))
    if draw.random() < 0.3 and engine != FUSE:
        strengths["steps"] = parse(draw.choice(("0@1,1@2", "1@0.0,0@0.6")), "steps", draw.choice(("hold", "linear")))
    return Strengths(**strengths)


@pytest.mark.parametrize("seed", [1])
def test_random_operations(seed):
    draw = random.Random(seed)
    base = tiny.tiny("sd15", inference=True)
    plain, before = sampled(base, "sd15", steps=2), weights(base)
    files = [lora_on(base, seed=number, every=2, size=0.05)[1] for number in range(3)]
    files += [lora_on(base, "IA3", seed=4, every=3)[1], lora_on(base, "LoKr", seed=5, every=3)[1]]
    files += [norms(base, 6, 0.05), lora_on(base, "LoRA", {"dora": "output"}, seed=7, every=3)[1]]
    started = live_bytes()
    live = [(base, plain)]
    kinds = {"add": 0, "clone": 0, "remove": 0, "unload": 0, "again": 0}
    for _ in range(OPERATIONS):
        what = draw.choices(list(kinds), (4, 2, 3, 1, 4))[0]
        kinds[what] += 1
        model, picture = draw.choice(live)
        if what == "add":
            engine = draw.choice((AUTO, FUSE, BRANCH, HOST))
            lora = draw.choice(files[:3] if engine == HOST else files)
            new, _, _ = apply_lora(model, None, lora, random_strengths(draw, engine), engine)
            live.append((new, sampled(new, "sd15", steps=2)))
        elif what == "clone":
            live.append((model.clone(), picture))
        elif what == "remove" and len(live) > 6:
            live.remove((model, picture)) if model is not base else None
        elif what == "unload":
            comfy.model_management.unload_all_models()
        assert torch.equal(sampled(model, "sd15", steps=2), picture), (what, kinds)
    assert min(kinds.values()) > 5
    assert torch.equal(sampled(base, "sd15", steps=2), plain)
    assert weights(base) == before, "the base is loaded: its weights are the very bits"
    del live, model, picture, new
    comfy.model_management.unload_all_models()
    assert weights(base) == before
    assert live_bytes() <= started + 4096, "nothing of what was applied is kept"


def test_a_change_of_strength_patches_nothing_anew(monkeypatch):
    """Fused weights are overwritten from the kept originals; the host neither takes patches off nor puts them on."""
    base = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(base)
    models = {s: apply_lora(base, None, lora, Strengths.of(s), FUSE)[0] for s in (0.3, -0.7, 1.1)}
    fresh = {}
    for strength, model in models.items():
        fresh[strength] = sampled(model, "sd15")
        comfy.model_management.unload_all_models()
    sampled(models[0.3], "sd15")
    patched = []
    original = type(base).patch_weight_to_device

    def seen(self, key, *args, **kwargs):
        patched.append(key)
        return original(self, key, *args, **kwargs)

    monkeypatch.setattr(type(base), "patch_weight_to_device", seen)
    for strength in (-0.7, 1.1, 0.3, 1.1):
        assert torch.equal(sampled(models[strength], "sd15"), fresh[strength]), "bit by bit as if it were loaded anew"
    assert not patched


def test_a_change_that_fails_is_made_good(monkeypatch):
    base = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(base)
    one, two = (apply_lora(base, None, lora, Strengths.of(s), FUSE)[0] for s in (0.3, 0.9))
    first, second = sampled(one, "sd15"), sampled(two, "sd15")
    sampled(one, "sd15")
    calls, original = [], fusing._overwrite

    def fails(key, *weights):
        calls.append(key)
        if len(calls) == 20:
            raise comfy.model_management.InterruptProcessingException
        original(key, *weights)

    monkeypatch.setattr(fusing, "_overwrite", fails)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(two, "sd15")
    assert torch.equal(sampled(one, "sd15"), first)
    assert torch.equal(sampled(two, "sd15"), second)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_change_of_strength_rounds_as_the_host_does(dtype):
    base = tiny.tiny("sd15", dtype=dtype, compute_dtype=torch.float32, inference=True)
    _, lora = lora_on(base, size=0.3)
    one, two = (apply_lora(base, None, lora, Strengths.of(s), FUSE)[0] for s in (0.3, 0.9))
    second = sampled(two, "sd15")
    comfy.model_management.unload_all_models()
    sampled(one, "sd15")
    assert torch.equal(sampled(two, "sd15"), second)


def test_partly_unloaded_models_patch_on_use():
    """Low VRAM: the host computes patched weights when it needs them, with our patches."""
    base = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(base)
    for engine in (FUSE, BRANCH):
        model, _, _ = apply_lora(base, None, lora, Strengths.of(0.7), engine)
        wanted = sampled(model, "sd15")
        model.partially_unload(model.offload_device, 1e30)
        torch.testing.assert_close(sampled(model, "sd15"), wanted, rtol=1e-4, atol=1e-4)
        comfy.model_management.unload_all_models()
