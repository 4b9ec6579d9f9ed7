"""A run that goes on with other weights, LoRAs, texts or a VAE says so, and nothing else makes it say so."""

import json
import subprocess
import sys
import time
from pathlib import Path

import comfy.model_management as management
import comfy.sd
import pytest
import torch
from comfy.model_sampling import V_PREDICTION, ModelSamplingDiscrete

import test_quantised as quant
import tiny
from graph import clip_for, images, sampled, vae_for
from lora_loom.host.contents import content_of_model
from lora_loom.host.fingerprints import applied, base_of, sample, weights
from lora_loom.host.loan import borrow
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.kernels.blocks import diffusion_tree
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.writing import to_state_dict
from lora_loom.training.runstate import find_state
from lora_loom.training.settings import ComponentSettings
from small_runs import NAMES, RUNS, alike, holding_out_the_last, log, plan, smaller_model
from test_loan import core_lora
from test_loan import sample as sampled_as
from training import adapters_for, opened

NEWS = "another base since then: "


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return opened(images(tmp_path_factory.mktemp("data") / "zorb", count=5), 64, 16)


def loaded():
    """MODEL, CLIP and VAE, as loader nodes give them when they read the same files."""
    with torch.inference_mode():
        return smaller_model(), clip_for("sd15"), vae_for("sd15")


def go(dataset, parts, name, length=2, **options):
    with torch.inference_mode():
        return train(Request(*parts, dataset, plan(length=length, **options), name))


def scaled(module, factor=1.5):
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.mul_(factor)


def told(result):
    return [line.partition(NEWS)[2] for line in result.report.splitlines() if NEWS in line]


def clip_lora(clip, strength):
    """A clone with a LoRA of the host's own on it."""
    draws = torch.Generator().manual_seed(4)
    state = {}
    for end, shape in (("up", (64, 2)), ("down", (2, 64))):
        key = f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{end}.weight"
        state[key] = 0.1 * torch.randn(shape, generator=draws)
    _, clone = comfy.sd.load_lora_for_models(None, clip, state, 0, strength)
    assert clone.patcher.patches
    return clone


def with_lora(model, seed=21, strength=0.7):
    state = to_state_dict(adapters_for(model, "full", seed=seed), NameTable.of(model.model).write)
    clone, _ = comfy.sd.load_lora_for_models(model, None, state, strength, 0)
    assert clone.patches
    return clone


def shifted(model):
    class Sampling(ModelSamplingDiscrete, V_PREDICTION):
        pass

    clone = model.clone()
    clone.add_object_patch("model_sampling", Sampling(model.model.model_config))
    return clone


def replaced(parts, **others):
    return tuple(others.get(name, part) for name, part in zip(("model", "clip", "vae"), parts, strict=True))


def change(what, parts):
    """``parts`` with one thing different."""
    model, clip, vae = parts
    if what == "weights":
        scaled(model.model.diffusion_model)
    elif what == "LoRA":
        return replaced(parts, model=with_lora(model))
    elif what == "sampling":
        return replaced(parts, model=shifted(model))
    elif what == "CLIP":
        scaled(clip.cond_stage_model)
    elif what == "CLIP's LoRA":
        return replaced(parts, clip=clip_lora(clip, 0.5))
    elif what == "clip skip":
        skipping = clip.clone()
        skipping.clip_layer(-2)
        return replaced(parts, clip=skipping)
    elif what == "VAE":
        scaled(vae.first_stage_model)
    return parts


WORDS = {
    "weights": "the weights of the MODEL",
    "LoRA": "the LoRAs on the MODEL",
    "sampling": "the prediction or noise levels of the MODEL",
    "CLIP": "the weights of the CLIP",
    "CLIP's LoRA": "the LoRAs on the CLIP",
    "clip skip": "clip_skip None → -2",
    "VAE": "the weights of the VAE",
}


@pytest.mark.parametrize("what", WORDS)
def test_another_base_is_accepted_and_told(dataset, what):
    name = next(NAMES)
    go(dataset, loaded(), name)
    result = go(dataset, change(what, loaded()), name, 4)
    [line] = told(result)
    assert line.startswith(f"{WORDS[what]}. ") and "another LoRA than one that was never interrupted" in line
    assert len(result.losses) == 4 and f"went on with run {name!r} after step 2" in result.report
    assert not told(go(dataset, change(what, loaded()), name, 5)), "the third part goes on with the base of the second"


def test_nothing_is_told_where_nothing_changed(dataset):
    """Loaded anew, sampled with before, with another LoRA in its place at the moment."""
    name, straight = next(NAMES), go(dataset, loaded(), next(NAMES), 6)
    parts = loaded()
    go(dataset, parts, name)
    result = go(dataset, loaded(), name, 3)
    assert not told(result)
    with_another = with_lora(parts[0])
    sampled(with_another)  # whose weights stay in the model
    with torch.inference_mode():
        management.load_models_gpu([with_another, parts[1].patcher, parts[2].patcher])
    assert not told(go(dataset, parts, name, 4))
    sampled(parts[0])
    last = go(dataset, parts, name, 6)
    assert not told(last) and last.losses == straight.losses and alike(last.lora, straight.lora)


def test_a_trained_text_encoder_is_no_other_one(dataset):
    name, parts = next(NAMES), loaded()
    text = ComponentSettings(te1_learning_rate=1e-3, embeddings="zorb: 2 a thing")
    go(dataset, parts, name, components=text)
    assert not told(go(dataset, parts, name, 3, components=text))
    assert not told(go(dataset, loaded(), name, 4, components=text))


def test_other_strength_and_other_tensors_of_a_lora_are_other_loras(dataset):
    name, parts = next(NAMES), loaded()
    go(dataset, replaced(parts, model=with_lora(parts[0])), name)
    assert not told(go(dataset, replaced(parts, model=with_lora(parts[0])), name, 3))
    for length, how in ((4, {"strength": 0.8}), (5, {"seed": 22})):
        [line] = told(go(dataset, replaced(parts, model=with_lora(parts[0], **how)), name, length))
        assert line.startswith("the LoRAs on the MODEL. ")


def test_a_state_of_before_says_nothing_of_its_base(dataset, monkeypatch):
    name, parts = next(NAMES), loaded()
    with monkeypatch.context() as patch:
        patch.setattr("lora_loom.host.record.base_of", lambda *_: {})
        go(dataset, parts, name)
    assert not find_state(RUNS / name).facts["recipe"]["base"]
    scaled(parts[0].model.diffusion_model)
    assert not told(go(dataset, parts, name, 3))
    assert "weights" in find_state(RUNS / name).facts["recipe"]["base"]


def test_losses_on_another_base_are_not_compared(dataset):
    name, options = next(NAMES), {"run": {"validate_every": 1, "keep_best": True}}
    held_out = holding_out_the_last(dataset)
    go(held_out, loaded(), name, **options)
    report = go(held_out, change("VAE", loaded()), name, 3, **options).report
    [curve] = [line for line in report.splitlines() if line.startswith("validation loss")]
    assert "measured anew" in report and "(step 0)" not in curve and "(step 2)" in curve
    assert [entry["step"] for entry in log(name) if "mean" in entry] == [0, 1, 2, 2, 3]


# ---------------------------------------------------------------- of weights


def of(patcher):
    return weights(patcher, *diffusion_tree(patcher.model))


@pytest.mark.parametrize("family", tiny.NAMES)
def test_use_changes_nothing(family):
    patcher = tiny.tiny(family, inference=True)
    before = of(patcher), applied(patcher)
    with_one = core_lora(patcher, 20)
    sampled_as(family, with_one)
    assert of(patcher) == of(with_one) == before[0] and applied(patcher) == before[1] != applied(with_one)
    patcher.partially_unload(patcher.offload_device, 1e30)
    assert of(patcher) == of(with_one) == before[0]
    sampled_as(family, patcher)
    with borrow(patcher, adapters_for(patcher)):
        assert of(patcher) == before[0]
    management.unload_all_models()
    assert of(patcher) == before[0] == of(tiny.tiny(family))
    assert of(tiny.tiny(family, seed=1)) != before[0]


@pytest.mark.parametrize("family, read", [("sd15", set()), ("sdxl", {"clip_g"})])
def test_what_the_host_never_set_and_nobody_reads_does_not_count(family, read):
    """Files of SD1 and SDXL have no text projection for CLIP-L: the host leaves there what the memory held."""
    clip = clip_for(family)
    found = {
        name.partition(".")[0]: weight
        for name, weight in clip.cond_stage_model.named_parameters()
        if "text_projection" in name
    }
    assert len(found) == len(read) + 1
    for encoder, weight in found.items():
        before = weights(clip.patcher, clip.cond_stage_model), content_of_model(clip.patcher)
        scaled(torch.nn.ParameterList([weight]))
        after = weights(clip.patcher, clip.cond_stage_model), content_of_model(clip.patcher)
        assert [one == other for one, other in zip(before, after, strict=True)] == [encoder not in read] * 2


def test_a_lora_in_the_weights_is_not_taken_for_the_weights():
    patcher = tiny.tiny("sd15", inference=True)
    before, with_one = of(patcher), core_lora(patcher, 20)
    with torch.inference_mode():
        management.load_models_gpu([with_one])
    assert with_one.backup and of(patcher) == of(with_one) == before
    with_one.backup = {}  # what would be seen without it
    assert of(with_one) != before
    patcher.model.current_weight_patches_uuid = None


@pytest.mark.parametrize("kind", [kind for kind in ("float8_e4m3fn", "int8_tensorwise") if kind in quant.OFFERED])
def test_quantised_weights(kind):
    patcher, base = quant.quantised("flux", kind)
    before, with_one = of(patcher), core_lora(patcher, 20)
    assert before == of(quant.quantised("flux", kind)[0]) != of(base)
    with torch.inference_mode():
        management.load_models_gpu([with_one])
    assert with_one.backup and of(with_one) == before
    management.unload_all_models()
    name = next(n for n, p in patcher.model.named_parameters() if type(p) not in (torch.Tensor, torch.nn.Parameter))
    values = patcher.model.get_parameter(name)
    part = values._qdata.view(torch.uint8)
    with torch.inference_mode():
        part.view(-1)[0] += 1
    assert of(patcher) != before


def test_every_process_finds_the_same():
    program = "import sys; sys.path[:0] = sys.argv[1:]; import hosting; hosting.prepare_host()"
    program += "; import test_another_base as t; sys.stdout.write('> ' + t.json.dumps(t.base_of(*t.loaded())))"
    here = Path(__file__).resolve().parent
    command = [sys.executable, "-c", program, str(here), str(here.parents[1] / "dev")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.rpartition("> ")[2]
    assert json.loads(out) == base_of(*loaded())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (600,), (64, 33, 3, 3)])
def test_a_sample_is_of_the_values_wherever_they_lie(dtype, shape):
    values = (40 * torch.randn(shape, generator=torch.Generator().manual_seed(1))).to(dtype)
    before = sample(values)
    assert sample(values.clone()) == before
    if values.ndim > 1:
        turned = torch.empty(shape[::-1], dtype=dtype).permute(*reversed(range(len(shape))))
        turned.copy_(values)
        assert not turned.is_contiguous() and sample(turned) == before
        assert sample(values.reshape(-1)) != before, "the shape counts"
    other = values.clone()
    flat = other.view(-1).view(torch.uint8)
    flat[-1] ^= 8 if dtype.itemsize == 1 else 127  # the last value
    assert sample(other) != before
    assert sample((2 * values.float()).to(dtype)) != before


def test_the_precision_in_which_a_device_keeps_wide_weights_does_not_count():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    half = values.to(torch.float16)
    assert sample(values) == sample(values.to(torch.bfloat16)) and sample(half) == sample(half.float())
    assert sample(values) != sample(values * 1.001)


def test_gigabytes_take_no_second():
    module, content = torch.nn.Module(), torch.zeros(4000, 4000)
    for index in range(1700):  # as many as SDXL has, each of 64 MB
        module.register_parameter(f"p{index}", torch.nn.Parameter(content, requires_grad=False))
    patcher = type("Patcher", (), {"backup": {}, "hook_backup": {}})()
    began = time.process_time()
    weights(patcher, module)
    assert time.process_time() - began < 20
