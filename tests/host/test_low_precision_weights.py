"""LoRAs on weights that are kept rounded: branched by themselves, with next to nothing lost."""

import comfy.model_management
import pytest
import torch

import tiny
from applying import lora_on, relative, sampled
from lora_loom.host.apply import AUTO, BRANCH, FUSE, HOST, Strengths, apply_lora
from lora_loom.host.branching import stack_on
from lora_loom.host.contents import content_of_model
from test_quantised import OFFERED, quantised

FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def on_wide_weights(name, dtype, adapters, strength):
    """What a model of rounded weights stands for, with the LoRA added in float32."""
    rounded = tiny.tiny(name, dtype=dtype, compute_dtype=torch.float32, inference=True)
    wide = tiny.tiny(name, inference=True)
    with torch.inference_mode():
        for key, weight in rounded.model.named_parameters():
            wide.model.get_parameter(key).copy_(weight.float())
        base = sampled(wide, name)
        for path, adapter in adapters.items():
            weight = wide.model.get_submodule(path).weight
            weight.copy_(adapter.merged(weight, strength))
    return rounded, base, sampled(wide, name)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_float8(name, dtype):
    adapters, lora = lora_on(tiny.tiny(name), size=0.05)
    patcher, base, wanted = on_wide_weights(name, dtype, adapters, 0.5)
    assert relative(sampled(patcher, name), base) <= 1e-5
    errors = {}
    for engine in (AUTO, BRANCH, FUSE, HOST):
        model, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.5), engine)
        assert bool(applied.branched) == (engine in (AUTO, BRANCH))
        errors[engine] = relative(sampled(model, name) - base, wanted - base)
        if engine == AUTO:
            assert "float8" in applied.why[BRANCH]
    assert errors[AUTO] <= 0.01 and errors[BRANCH] <= 0.01, "of the effect that was asked for"
    assert errors[HOST] >= 0.05, "the host rounds the sum"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fused_and_can_be_branched(dtype):
    adapters, lora = lora_on(tiny.tiny("sd15"), size=0.05)
    patcher, base, wanted = on_wide_weights("sd15", dtype, adapters, 0.5)
    errors = {}
    for engine in (AUTO, BRANCH):
        model, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.5), engine)
        assert bool(applied.branched) == (engine == BRANCH)
        errors[engine] = relative(sampled(model, "sd15") - base, wanted - base)
    assert errors[BRANCH] <= 0.01 and errors[BRANCH] <= errors[AUTO] <= 0.2


@pytest.mark.parametrize("kind", OFFERED)
@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_the_hosts_quantised_layers(name, kind):
    """Where the host rounds what comes into a layer as well, no more is lost with a LoRA than without."""
    patcher, dense = quantised(name, kind)
    adapters, lora = lora_on(dense, preset="attention+MLP", conv=False, size=0.05)
    base, before = sampled(patcher, name), sampled(dense, name)
    noise = relative(base, before)
    with torch.no_grad():
        for path, adapter in adapters.items():
            weight = dense.model.get_submodule(path).weight
            weight.copy_(adapter.merged(weight, 0.5))
    wanted = sampled(dense, name)
    model, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.5))
    assert len(applied.branched) == len(adapters) and not applied.fused
    assert relative(sampled(model, name), wanted) <= 1.1 * noise + 0.01 * relative(before, wanted)
    assert torch.equal(sampled(patcher, name), base)


@pytest.mark.parametrize("family", ["LoRA", "LoKr", "DoRA", "OFT"])
@pytest.mark.parametrize("kind", OFFERED)
def test_what_quantised_layers_gain(kind, family):
    """Layer by layer, where the host's rounding of inputs is in the output with the LoRA and without it."""
    patcher, dense = quantised("flux", kind)
    options = {"dora": "output"} if family == "DoRA" else {}
    kind_of = "LoRA" if family == "DoRA" else family
    adapters, lora = lora_on(dense, kind_of, options, preset="attention+MLP", conv=False, size=0.05)
    model, _, _ = apply_lora(patcher, None, lora, Strengths.of(0.5))
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        hung = stack_on(model).hung_on(model.model)
        draws = torch.Generator().manual_seed(11)
        for path, adapter in adapters.items():
            layer, weight = model.model.get_submodule(path), dense.model.get_submodule(path).weight
            x = torch.randn(2, 9, weight.shape[1], generator=draws)
            without = layer(x)
            with hung.at((0.5,)):
                gained = layer(x) - without
            wanted = x @ (adapter.merged(weight, 0.5) - weight).T
            assert relative(gained, wanted) <= 0.01, path


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_text_encoders_in_float8(dtype):
    """They are merged on use, not rounded again."""
    clip = tiny.tiny_clip(inference=True)
    plain = tiny.tiny_clip(inference=True)
    for key, weight in clip.cond_stage_model.named_parameters():
        if key.endswith(("fc1.weight", "q_proj.weight")):
            rounded = weight.to(dtype)
            module = clip.cond_stage_model.get_submodule(key.rpartition(".")[0])
            with torch.inference_mode():
                module.weight = torch.nn.Parameter(rounded, requires_grad=False)
                plain.cond_stage_model.get_parameter(key).copy_(rounded.float())
    draws = torch.Generator().manual_seed(7)
    lora = {}
    for key, weight in plain.cond_stage_model.named_parameters():
        if key.endswith(("fc1.weight", "q_proj.weight")):
            path = key.removesuffix(".weight").removeprefix("clip_l.transformer.")
            name = "lora_te_" + path.replace(".", "_")
            lora[f"{name}.lora_down.weight"] = 0.1 * torch.randn(4, weight.shape[1], generator=draws)
            lora[f"{name}.lora_up.weight"] = 0.1 * torch.randn(weight.shape[0], 4, generator=draws)
    encoded = []
    for one in (clip, plain):
        model = tiny.tiny("sd15", inference=True)
        _, with_lora, applied = apply_lora(model, one, lora, Strengths.of(1.0, 0.7))
        assert bool(applied.clip_branched) == (one is clip) and applied.clip_weights == len(lora) // 2
        assert content_of_model(with_lora.patcher) != content_of_model(one.patcher), "no cached text is taken for it"
        with torch.inference_mode():
            encoded.append([c.encode_from_tokens(c.tokenize("a red fox")) for c in (with_lora, one)])
    (got, base), (wanted, base_wide) = encoded
    assert relative(base, base_wide) <= 1e-5
    # the other one is kept in float16, to which a fused weight is rounded
    assert relative(got, wanted) <= 1e-3 < 0.01 < relative(base, wanted)
    with torch.inference_mode():
        assert torch.equal(clip.encode_from_tokens(clip.tokenize("a red fox")), base), "the CLIP itself is as it was"
