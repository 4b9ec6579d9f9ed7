"""All that is on a MODEL and a CLIP as one LoRA: alone on the clean model it gives the same weights and pictures.

The oracle is the host: its own calculation of patched weights, its own sampler.
"""

import json

import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.patcher_extension import PatcherInjection

import tiny
from applying import lora_on, norms, relative, sampled
from lora_loom.host import exporting
from lora_loom.host.apply import BRANCH, FUSE, Strengths, apply_lora
from lora_loom.host.effective import effective_reader
from lora_loom.host.tools import bake_applied
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.strengths.schedule import fixed, parse
from lora_loom.kernels.tools.provenance import TOOL
from lora_loom.kernels.writing import to_tensors
from lora_loom.nodes.merging import LoomBakeApplied


def bake(model, clip=None, method="concat", cut=None, dense_rank=64, precision="float32"):
    return bake_applied(model, clip, method, cut, dense_rank, precision)


def weights(patcher):
    """parameter → as the host would patch it."""
    read = effective_reader(patcher, None)
    return {key: read(key) for key in patcher.model.state_dict() if patcher.model.state_dict()[key].is_floating_point()}


def alone(made, clean, clip=None):
    model, new_clip, applied = apply_lora(clean, clip, made.lora, Strengths(), FUSE)
    assert not applied.unplaced
    return model, new_clip


def effect(got, wanted, clean, name="sd15"):
    """How far what it does to pictures is from what it should do."""
    base = sampled(clean, name)
    return relative(sampled(got, name) - base, sampled(wanted, name) - base)


def same_weights(got, wanted, clean, tolerance):
    """Changes of the weights, compared one by one."""
    base, got, wanted = weights(clean), weights(got), weights(wanted)
    changed = 0
    for key, before in base.items():
        change = wanted[key] - before
        changed += bool(change.norm() > 0)
        assert (got[key] - wanted[key]).norm() <= tolerance * change.norm() + 1e-6 * before.norm(), key
    assert changed


@pytest.mark.parametrize("engine", [FUSE, BRANCH])
@pytest.mark.parametrize("method", ["concat", "sum"])
def test_several_loras_of_our_loaders(engine, method):
    clean = tiny.tiny("sd15")
    model = clean
    for seed, strength in enumerate((0.7, -0.4, 1.3)):
        _, lora = lora_on(clean, seed=seed, every=2, options={"rank": 2 + seed})
        model, _, _ = apply_lora(model, None, lora, Strengths.of(strength), engine)
    made = bake(model, method=method, cut=Cut(energy=1.0) if method == "sum" else None)
    got, _ = alone(made, clean)
    if engine == FUSE:
        same_weights(got, model, clean, 1e-4)
    assert effect(got, model, clean) < 1e-3
    assert "all of the energy retained" in made.report and '"tool": "bake"' in made.lora.metadata[TOOL]


def by_core(model, clip, lora, strength_model, strength_clip=1.0):
    return comfy.sd.load_lora_for_models(model, clip, dict(lora), strength_model, strength_clip)


def test_ours_and_cores_on_the_same_layers_and_the_norms():
    clean = tiny.tiny("sd15")
    _, first = lora_on(clean, seed=1)
    _, second = lora_on(clean, seed=2, options={"tucker": True})
    model, _, _ = apply_lora(clean, None, first, Strengths.of(0.6), FUSE)
    model, _ = by_core(model, None, second, 0.8)
    model, _, _ = apply_lora(model, None, norms(clean, 3), Strengths.of(0.5), FUSE)
    model, _ = by_core(model, None, first, -0.3)
    made = bake(model)
    assert not exporting.collect(model, None).computed  # every one of these is a product, or small
    got, _ = alone(made, clean)
    same_weights(got, model, clean, 1e-4)
    assert relative(sampled(got, "sd15"), sampled(model, "sd15")) < 1e-4


def test_parts_of_fused_layers_by_core():
    """Query, key and value apart, as diffusers has them: core patches slices of one weight."""
    clean = tiny.tiny("flux")
    adapters, _ = lora_on(clean, seed=4)
    lora = to_tensors(LoRAFile(adapters, names=NameTable.of(clean.model)), "diffusers")
    model, _ = by_core(clean, None, lora, 0.9)
    assert any(entry[3] is not None for entries in model.patches.values() for entry in entries)
    collected = exporting.collect(model, None)
    exact = len(collected.parts) - len(collected.computed)
    assert exact and all("adaLN" in path for path in collected.computed)  # core exchanges their halves by a function
    got, _ = alone(bake(model), clean)
    same_weights(got, model, clean, 1e-4)


@pytest.mark.parametrize("family, options", [("LoRA", {"dora": "output"}), ("OFT", {}), ("LoHa", {}), ("GLoRA", {})])
@pytest.mark.parametrize("engine", [FUSE, BRANCH])
def test_what_depends_on_the_weights_is_computed(family, options, engine):
    clean = tiny.tiny("sd15")
    _, lora = lora_on(clean, family, options, every=5, size=0.3)
    _, plain = lora_on(clean, seed=9, every=3)
    model, _, _ = apply_lora(clean, None, plain, Strengths.of(0.5), FUSE)
    model, _, _ = apply_lora(model, None, lora, Strengths.of(0.7), engine)
    made = bake(model, dense_rank=4096)
    got, _ = alone(made, clean)
    assert effect(got, model, clean) < 2e-3
    if engine == FUSE:
        same_weights(got, model, clean, 1e-3)


def test_the_error_of_what_is_cut_is_stated():
    clean = tiny.tiny("sd15")
    _, lora = lora_on(clean, "OFT", every=5, size=0.5)
    model, _, _ = apply_lora(clean, None, lora, Strengths.of(1.0), FUSE)
    found = exporting.collect(model, None)
    outcome = exporting.bake(found, "concat", None, Cut(rank=2))
    base, wanted = weights(clean), weights(model)
    assert outcome.layers and outcome.energy < 0.99
    for layer in outcome.layers:
        change = (wanted[f"{layer.path}.weight"] - base[f"{layer.path}.weight"]).flatten(1).double()
        values = torch.linalg.svdvals(change)
        assert layer.rank == 2 and layer.norm == pytest.approx(change.norm().item(), rel=1e-4)
        assert layer.error == pytest.approx(values[2:].norm().item(), rel=1e-2)
    report = bake(model, dense_rank=2).report
    assert "no product of two factors" in report and "cut to rank 2 (dense_rank)" in report
    summed = bake(model, method="sum", cut=Cut(rank=2))
    assert json.loads(summed.lora.metadata[TOOL])["energy"] == pytest.approx(outcome.energy, abs=1e-3)


def test_merged_models_are_computed():
    """Another pack's patch: a mean of two models, as the host's merge node makes it."""
    clean, other = tiny.tiny("sd15"), tiny.tiny("sd15", seed=5)
    model = clean.clone()
    model.add_patches(other.get_key_patches("diffusion_model."), 0.25, 0.75)
    got, _ = alone(bake(model, dense_rank=4096), clean)
    same_weights(got, model, clean, 1e-3)


def test_text_encoders_and_words():
    clean, clip = tiny.tiny("sd15"), tiny.tiny_clip()
    paths = [path for path in NameTable.of(clip.cond_stage_model).text.paths if path.endswith(("q_proj", "fc1"))]
    state = clip.cond_stage_model.state_dict()
    adapters = {}
    for number, path in enumerate(paths):
        draws = torch.Generator().manual_seed(number)
        fresh = make_adapter("LoRA", state[f"{path}.weight"].shape, Options(rank=2), draws)
        numbers = {key: torch.randn(tensor.shape, generator=draws) for key, tensor in fresh.tensors.items()}
        adapters[path] = fresh.with_tensors(numbers)
    words = {"my_cat": {"clip_l": torch.randn(2, 64)}}
    lora = to_tensors(LoRAFile(adapters, embeddings=words, names=NameTable.of(clip.cond_stage_model)))
    model, new_clip, _ = apply_lora(clean, clip, lora, Strengths(fixed(1.0), fixed(0.3)))
    _, new_clip = by_core(None, new_clip, lora, 1.0, 0.2)
    made = bake(model, new_clip)
    _, got = alone(made, clean, clip)
    for path in paths:
        read, wanted = (effective_reader(one.patcher, None) for one in (got, new_clip))
        torch.testing.assert_close(read(f"{path}.weight"), wanted(f"{path}.weight"), rtol=1e-4, atol=1e-5)
    again = read_lora(made.lora, NameTable.of(clip.cond_stage_model))
    assert torch.equal(again.embeddings["my_cat"]["clip_l"], words["my_cat"]["clip_l"])
    text = "a photo of my_cat"
    wanted = new_clip.encode_from_tokens(new_clip.tokenize(text))
    assert relative(got.encode_from_tokens(got.tokenize(text)), wanted) < 1e-3
    assert relative(clip.encode_from_tokens(clip.tokenize(text)), wanted) > 0.1


def test_biases_go_with_their_layers():
    clean = tiny.tiny("sd15")
    _, lora = lora_on(clean, "full", {"bias": True}, every=6)
    for engine in (FUSE, BRANCH):
        model, _, _ = apply_lora(clean, None, lora, Strengths.of(0.5), engine)
        got, _ = alone(bake(model, dense_rank=4096), clean)
        assert relative(sampled(got, "sd15"), sampled(model, "sd15")) < 1e-4
        if engine == FUSE:
            same_weights(got, model, clean, 1e-4)


def test_what_cannot_be_in_a_file():
    clean = tiny.tiny("sd15")
    _, lora = lora_on(clean)
    with pytest.raises(ValueError, match="nothing is applied"):
        bake(clean)
    changing = Strengths(fixed(1.0), fixed(1.0), steps=parse("0.1@1,0.6@6", "steps"))
    model, _, _ = apply_lora(clean, None, lora, changing)
    with pytest.raises(ValueError, match=r"changes over the run \(0.1@1,0.6@6\).* set steps, blocks and components"):
        bake(model)
    model, _, _ = apply_lora(clean, None, lora)
    with pytest.raises(ValueError, match="concat keeps all ranks"):
        bake(model, cut=Cut(rank=3))
    with pytest.raises(ValueError, match="set one of them"):
        bake(model, method="sum")
    with pytest.raises(ValueError, match="method: 'ties' is unknown"):
        bake(model, method="ties", cut=Cut(rank=3))


def test_what_cannot_be_seen_is_told():
    clean = tiny.tiny("sd15")
    _, lora = lora_on(clean)
    model, _, _ = apply_lora(clean, None, lora)
    model.set_injections("bypass_lora", [PatcherInjection(lambda patcher: None, lambda patcher: None)])
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    hook = comfy.hooks.WeightHook(1.0, 0.0)
    model.add_hook_patches(hook, comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names), 1.0)
    report = bake(model).report
    assert "1 hooked LoRA(s) on the MODEL are not in it" in report
    assert "bypass_lora injects layers into the MODEL" in report


def test_at_strength_0_nothing_is_left():
    clean = tiny.tiny("sd15")
    _, lora = lora_on(clean, every=4)
    _, second = lora_on(clean, seed=1, every=4)
    model, _, _ = apply_lora(clean, None, lora, Strengths.of(0.0), BRANCH)
    model, _, _ = apply_lora(model, None, second, Strengths.of(1.0), BRANCH)
    made = read_lora(bake(model).lora, NameTable.of(clean.model))
    assert made.adapters.keys() == read_lora(second, NameTable.of(clean.model)).adapters.keys()


def test_models_kept_in_half_precision_and_loaded():
    """The weights are read without what the host has merged into them."""
    clean = tiny.tiny("sd15", dtype=torch.bfloat16, compute_dtype=torch.float32)
    _, lora = lora_on(clean, every=3)
    model, _, _ = apply_lora(clean, None, lora, Strengths.of(0.7), FUSE)
    comfy.model_management.load_models_gpu([model])
    try:
        again, _, _ = apply_lora(model, None, lora_on(clean, "OFT", seed=3, every=7)[1], Strengths.of(0.4), FUSE)
        made = bake(again, dense_rank=4096)
    finally:
        comfy.model_management.unload_all_models()
    got, _ = alone(made, clean)
    same_weights(got, again, clean, 1e-3)


def test_the_node():
    clean = tiny.tiny("sd15", inference=True)
    with torch.inference_mode():
        model, _, _ = apply_lora(clean, None, lora_on(clean)[1], Strengths.of(0.5))
        lora, report, picture = LoomBakeApplied.execute(model, "concat", 0, 0.0, 64, "as given").result
    assert not any(tensor.is_inference() for tensor in lora.values())
    assert report.startswith("119 layers: rank 3; all of") and picture.ndim == 4
    assert lora.metadata["ss_base_model_version"] == "sd_v1"
    assert lora.metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
