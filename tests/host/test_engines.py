"""Both engines against weights merged in float64, on models of every build; and together with everything else."""

import math

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper

import tiny
from applying import lora_on, relative, sampled
from lora_loom.host.apply import BRANCH, FUSE, HOST, Strengths, apply_lora
from lora_loom.kernels.blocks import block_map
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.strengths.blocks import parse_blocks
from lora_loom.kernels.strengths.schedule import fixed, parse
from lora_loom.kernels.writing import to_tensors
from snapshot import weights

MODELS = ("sd15", "sdxl", "sd3", "flux", "qwen_image", "wan", "lumina2", "hunyuan_video")
FAMILIES = [
    *((family, {}) for family in ("LoRA", "LoHa", "LoKr", "full", "OFT", "OFTv2", "GLoRA", "IA3")),
    ("BOFT", {"block_size": 16}),
    ("LoRA", {"tucker": True}),
    *(("LoRA", {"dora": axis}) for axis in ("output", "input")),
    ("LoKr", {"dora": "output"}),
    ("full", {"bias": True}),
]


def merged(name, adapters, factors):
    """A model of its own whose weights are W + s (W' − W), computed in float64."""
    patcher = tiny.tiny(name, inference=True)
    with torch.inference_mode():
        for path, adapter in adapters.items():
            layer = patcher.model.get_submodule(path)
            wide = adapter.to(dtype=torch.float64)
            weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
            layer.weight.copy_(weight + factors(path) * (wide.merged(weight) - weight))
            if bias is not None:
                layer.bias.copy_(bias + factors(path) * (wide.merged_bias(bias) - bias))
    return patcher


@pytest.mark.parametrize("kind", ["rules", "vector"])
@pytest.mark.parametrize("name", MODELS)
def test_a_lora_on_every_layer(name, kind):
    patcher = tiny.tiny(name, inference=True)
    adapters, lora = lora_on(patcher)
    before, base = weights(patcher), sampled(patcher, name)
    if kind == "rules":
        text = "all=0.5, attn=-0.3, base=1.2"
        expected = {0.5, -0.3, 1.2}
    else:
        numbers = [round(0.2 * number - 0.7, 3) for number in range(1 + len(block_map(patcher.model)))]
        text, expected = ",".join(map(str, numbers)), set(numbers)
    factors = parse_blocks(text, patcher.model)
    assert {factors.of(path).constant for path in adapters} == expected
    wanted = sampled(merged(name, adapters, lambda path: 0.8 * factors.of(path).constant), name)
    strengths = Strengths(fixed(0.8), blocks=text)
    for engine, limit in ((FUSE, 5e-6), (BRANCH, 2e-5)):
        model, _, applied = apply_lora(patcher, None, lora, strengths, engine)
        assert not applied.unplaced and applied.model_weights == len(adapters)
        assert bool(applied.branched) == (engine == BRANCH)
        assert relative(sampled(model, name), wanted) <= limit < 0.01 < relative(base, wanted)
        assert torch.equal(sampled(patcher, name), base)
    comfy.model_management.unload_all_models()
    assert weights(patcher) == before


EVERY = [(name, *family) for name in ("sd15", "flux") for family in FAMILIES]
EVERY += [(name, *family) for name in MODELS[1:3] + MODELS[4:] for family in FAMILIES[1:4] + FAMILIES[10:12]]


@pytest.mark.parametrize("name, family, options", EVERY, ids=str)
def test_every_family(name, family, options):
    patcher = tiny.tiny(name, inference=True)
    adapters, lora = lora_on(patcher, family, options, every=3, size=0.05)
    base = sampled(patcher, name)
    for strength in (1.0, -0.6):
        wanted = sampled(merged(name, adapters, lambda path, s=strength: s), name)
        for engine in (FUSE, BRANCH):
            model, _, applied = apply_lora(patcher, None, lora, Strengths.of(strength), engine)
            assert not applied.unplaced
            assert relative(sampled(model, name), wanted) <= 5e-5 < 1e-3 < relative(base, wanted), engine


@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_slices_of_fused_layers(name):
    """q, k and v of a file apart, as PEFT has them, fused and branched."""
    patcher = tiny.tiny(name, inference=True)
    adapters, _ = lora_on(patcher, "LoRA", preset="attention", conv=False)
    lora = to_tensors(LoRAFile(adapters, names=NameTable.of(patcher.model)), "diffusers")
    wanted = sampled(merged(name, adapters, lambda path: 0.7), name)
    for engine in (FUSE, BRANCH):
        model, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.7), engine)
        assert not applied.unplaced
        assert relative(sampled(model, name), wanted) <= 1e-5


@pytest.mark.parametrize("name", ["sd15", "flux", "wan"])
def test_norms_biases_and_tables(name):
    """Differences of everything that a model has; what is no product stands in the parameter's place."""
    patcher = tiny.tiny(name, inference=True)
    draws = torch.Generator().manual_seed(4)
    lora = {}
    for key, weight in patcher.model.named_parameters():
        path, _, leaf = key.rpartition(".")
        part = {"weight": f"{path}.diff", "bias": f"{path}.diff_b"}.get(leaf, f"{key}.diff")
        lora[part] = 0.02 * torch.randn(weight.shape, generator=draws)
    reference = tiny.tiny(name, inference=True)
    with torch.inference_mode():
        for key, weight in reference.model.named_parameters():
            path, _, leaf = key.rpartition(".")
            part = {"weight": f"{path}.diff", "bias": f"{path}.diff_b"}.get(leaf, f"{key}.diff")
            weight.add_(lora[part], alpha=0.5)
    wanted, base = sampled(reference, name), sampled(patcher, name)
    for engine in (FUSE, BRANCH):
        model, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.5), engine)
        assert not applied.unplaced, applied.unplaced[:3]
        assert relative(sampled(model, name), wanted) <= 5e-5 < 1e-3 < relative(base, wanted), engine


@pytest.mark.parametrize("name", ["sd15", "flux"])
@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_a_schedule_is_two_runs_spliced(name, scheduler):
    patcher = tiny.tiny(name, inference=True)
    _, lora = lora_on(patcher, every=2)
    steps, switch = 6, 3
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), scheduler, steps)
    with_strength = {s: apply_lora(patcher, None, lora, Strengths.of(s), FUSE)[0] for s in (0.2, 0.9)}
    first = sampled(with_strength[0.2], name, sigmas=sigmas[: switch + 1])
    wanted = sampled(with_strength[0.9], name, sigmas=sigmas[switch:], start=first, noise=False)
    scheduled = Strengths(steps=parse("0.2@1,0.9@4", "steps"))
    model, _, applied = apply_lora(patcher, None, lora, scheduled)
    assert applied.branched and not applied.fused
    got = sampled(model, name, sigmas=sigmas)
    apart = min(relative(sampled(one, name, sigmas=sigmas), wanted) for one in with_strength.values())
    assert relative(got, wanted) <= 2e-5 < 1e-3 < apart


def test_block_by_component_by_step():
    """Together they are the product of all, in every span."""
    patcher = tiny.tiny("sd15", inference=True)
    adapters, lora = lora_on(patcher)
    text = "in=0.5, mid=0@1,1@4, out/attn=-1"
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", 6)
    latents = None
    for first, last, steps, mid in ((0, 2, 0.2, 0.0), (2, 3, 0.9, 0.0), (3, 6, 0.9, 1.0)):
        factors = parse_blocks(text.replace("0@1,1@4", str(mid)), patcher.model)
        model = merged("sd15", adapters, lambda path, f=factors, s=steps: 0.8 * 0.5 * s * f.of(path).constant)
        how = {} if latents is None else {"start": latents, "noise": False}
        latents = sampled(model, "sd15", sigmas=sigmas[first : last + 1], **how)
    strengths = Strengths(fixed(0.8), components={"unet": fixed(0.5)}, blocks=text, steps=parse("0.2@1,0.9@3", "steps"))
    model, _, _ = apply_lora(patcher, None, lora, strengths)
    assert relative(sampled(model, "sd15", sigmas=sigmas), latents) <= 2e-5 < 1e-3


@pytest.mark.parametrize("how", ["linear", "cosine"])
def test_a_blend_is_a_run_for_every_step(how):
    """And with denoise 0.5 the run's own steps count, as the sampler takes them."""
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher, every=2)
    schedule = parse("0@1,1@4", "steps", how)
    full = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "karras", 8)
    for sigmas in (full[:5], full[4:]):
        start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
        model, _, _ = apply_lora(patcher, None, lora, Strengths(steps=schedule))
        got, latents = sampled(model, "sd15", sigmas=sigmas, start=start), start
        for step in range(4):
            weight = step / 3 if how == "linear" else (1 - math.cos(math.pi * step / 3)) / 2
            static, _, _ = apply_lora(patcher, None, lora, Strengths.of(weight), FUSE)
            latents = sampled(static, "sd15", sigmas=sigmas[step : step + 2], start=latents, noise=step == 0)
        assert relative(got, latents) <= 2e-5


def test_a_constant_schedule_is_the_static_strength():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher, every=2)
    static, _, _ = apply_lora(patcher, None, lora, Strengths.of(0.7), BRANCH)
    model, _, applied = apply_lora(patcher, None, lora, Strengths(steps=parse("0.7@1,0.7@5", "steps")))
    assert applied.fused and not applied.branched  # it never changes
    assert relative(sampled(model, "sd15"), sampled(static, "sd15")) <= 2e-5


def test_loaders_in_any_order_beside_the_hosts_own():
    """Ours fused, ours branched, core's: all sums, whatever comes first."""
    patcher = tiny.tiny("sd15", inference=True)
    files = [lora_on(patcher, seed=seed, every=2, size=0.05) for seed in range(3)]
    engines = (FUSE, BRANCH, HOST)
    both = tiny.tiny("sd15", inference=True)
    with torch.inference_mode():
        for (adapters, _), strength in zip(files, (0.5, -0.4, 0.8), strict=True):
            for path, adapter in adapters.items():
                weight = both.model.get_submodule(path).weight
                weight.add_(strength * (adapter.delta().view(weight.shape)))
    wanted = sampled(both, "sd15")
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        model = patcher
        for number in order:
            strength = Strengths.of((0.5, -0.4, 0.8)[number])
            model, _, _ = apply_lora(model, None, files[number][1], strength, engines[number])
        assert relative(sampled(model, "sd15"), wanted) <= 1e-5


def test_clones_keep_what_they_have():
    patcher = tiny.tiny("sd15", inference=True)
    one, two = (lora_on(patcher, seed=seed, every=2)[1] for seed in (1, 2))
    first, _, _ = apply_lora(patcher, None, one, Strengths.of(0.5), BRANCH)
    alone = sampled(first, "sd15")
    copied = first.clone()
    both, _, _ = apply_lora(first, None, two, Strengths.of(0.5), BRANCH)
    together = sampled(both, "sd15")
    assert not torch.equal(alone, together)
    assert torch.equal(sampled(first, "sd15"), alone) and torch.equal(sampled(copied, "sd15"), alone)
    del both
    assert torch.equal(sampled(copied.clone(), "sd15"), alone)


def test_an_exception_leaves_nothing_behind():
    patcher = tiny.tiny("sd15", inference=True)
    base, before = sampled(patcher, "sd15"), weights(patcher)
    _, lora = lora_on(patcher)
    model, _, _ = apply_lora(patcher, None, lora, None, BRANCH)
    broken = patcher.model.get_submodule("diffusion_model.out.2")

    def fails(*args, **kwargs):
        raise comfy.model_management.InterruptProcessingException

    broken.forward = fails
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sampled(model, "sd15")
    assert broken.__dict__.pop("forward") is fails
    assert not [path for path, module in patcher.model.named_modules() if "forward" in module.__dict__]
    assert torch.equal(sampled(patcher, "sd15"), base) and weights(patcher) == before


def test_compiled_models():
    """torch.compile sees the branches of every call, at their strength of the moment."""
    patcher = tiny.tiny("lumina2", depth=1, inference=True)
    _, lora = lora_on(patcher, every=3)
    strengths = Strengths(steps=parse("0.2@1,0.9@2,-0.5@3", "steps"))
    wanted = sampled(apply_lora(patcher, None, lora, strengths)[0], "lumina2")
    compiled = patcher.clone()
    set_torch_compile_wrapper(compiled, backend="eager")
    model, _, _ = apply_lora(compiled, None, lora, strengths)
    assert relative(sampled(model, "lumina2"), wanted) <= 1e-5 < 1e-3 < relative(sampled(compiled, "lumina2"), wanted)
