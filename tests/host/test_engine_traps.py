"""What the engines have to survive: other patches on the same weights, other packs, exchanged modules, failures."""

import copy

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import tiny
from applying import lora_on, noise_for, norms, relative, sampled
from lora_loom.host import branching
from lora_loom.host.apply import AUTO, BRANCH, FUSE, Strengths, apply_lora
from lora_loom.kernels.branches import LayerBranch
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.strengths.schedule import parse


def unload():
    comfy.model_management.unload_all_models()


def test_branched_norms_see_what_changes_below_them():
    patcher = tiny.tiny("sd15", inference=True)
    beside, below = norms(patcher, 1), norms(patcher, 2)
    first, _, _ = apply_lora(patcher, None, beside, Strengths.of(0.5), BRANCH)
    weak, strong = (apply_lora(first, None, below, Strengths.of(s), FUSE)[0] for s in (0.3, 0.9))
    wanted = sampled(strong, "sd15")
    unload()
    before = sampled(weak, "sd15")
    assert torch.equal(sampled(strong, "sd15"), wanted) and relative(before, wanted) > 0.01


@pytest.mark.parametrize("both", [True, False])
@pytest.mark.parametrize("kind", ["norms", "layers"])
def test_hooked_loras_of_the_host(both, kind):
    """Core's hooks write into weights in between; fused or branched is the same with and without them."""
    patcher = tiny.tiny("sd15", inference=True)
    make = norms if kind == "norms" else lambda patcher, seed: lora_on(patcher, seed=seed)[1]
    ours, theirs = make(patcher, 1), make(patcher, 2)
    fused, branched = (apply_lora(patcher, None, ours, Strengths.of(0.8), engine)[0] for engine in (FUSE, BRANCH))

    def run(model, hooked):
        conds = [tiny.conditioning("sd15", seed=seed) for seed in (1, 2)]
        if hooked:
            hooks = comfy.hooks.create_hook_lora(lora=theirs, strength_model=1.0, strength_clip=0.0)
            conds[0] = comfy.hooks.set_hooks_for_conditioning(conds[0], hooks)
            conds[1] = comfy.hooks.set_hooks_for_conditioning(conds[1], hooks) if both else conds[1]
        how = (3, 3.0, "euler", "normal", *conds, tiny.latent("sd15"))
        with torch.inference_mode():
            return comfy.sample.sample(model, noise_for("sd15"), *how, seed=3, disable_pbar=True)

    plain, wanted = run(fused, False), run(fused, True)
    assert relative(plain, wanted) > 1e-3
    for hooked in (False, True, False):
        assert relative(run(branched, hooked), wanted if hooked else plain) <= 2e-5


@pytest.mark.parametrize("family, options", [("LoRA", {"dora": "output"}), ("IA3", {}), ("OFT", {})], ids=str)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_what_depends_on_the_weight_sees_it_without_others(name, family, options):
    """Every order and every choice of engines gives one and the same."""
    patcher = tiny.tiny(name, inference=True)
    _, plain = lora_on(patcher, seed=1, size=0.2)
    _, dependent = lora_on(patcher, family, options, seed=2, size=0.2)
    pictures = []
    for steps in ([(plain, FUSE), (dependent, FUSE)], [(plain, FUSE), (dependent, BRANCH)],
                  [(dependent, BRANCH), (plain, FUSE)], [(plain, BRANCH), (dependent, FUSE)],
                  [(dependent, FUSE), (plain, BRANCH)], [(plain, BRANCH), (dependent, BRANCH)]):  # fmt: skip
        model = patcher
        for lora, engine in steps:
            model, _, _ = apply_lora(model, None, lora, Strengths.of(0.7), engine)
        pictures.append(sampled(model, name))
    effect = relative(sampled(patcher, name), pictures[0])
    assert all(relative(picture, pictures[0]) <= 1e-3 * effect for picture in pictures), effect


def control_lora(out, width, bias=True):
    draws = torch.Generator().manual_seed(5)
    path = "diffusion_model.img_in"
    lora = {
        f"{path}.lora_A.weight": 0.2 * torch.randn(4, 2 * width, generator=draws),
        f"{path}.lora_B.weight": 0.2 * torch.randn(out, 4, generator=draws),
        f"{path}.reshape_weight": torch.tensor([out, 2 * width]),
    }
    return lora | ({f"{path}.lora_B.bias": 0.5 * torch.randn(out, generator=draws)} if bias else {})


def controlled(model):
    picture = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    conds = [tiny.conditioning("flux", seed=seed) for seed in (1, 2)]
    for cond in conds:
        cond[0][1] |= {"concat_latent_image": picture, "concat_mask": torch.ones(1, 1, 64, 64)}
    how = (3, 3.0, "euler", "simple", *conds, tiny.latent("flux"))
    with torch.inference_mode():
        return comfy.sample.sample(model, noise_for("flux"), *how, seed=3, disable_pbar=True)


def test_control_loras_and_others_on_the_same_layer():
    patcher = tiny.tiny("flux", inference=True)
    out, width = patcher.model.diffusion_model.img_in.weight.shape
    control = control_lora(out, width)
    fused, _, _ = apply_lora(patcher, None, control, None, FUSE)
    wanted = controlled(fused)
    without_bias, _, _ = apply_lora(patcher, None, control_lora(out, width, bias=False), None, FUSE)
    assert relative(controlled(without_bias), wanted) > 0.01
    for engine in (AUTO, BRANCH):
        model, _, _ = apply_lora(patcher, None, control, None, engine)
        assert relative(controlled(model), wanted) <= 1e-6
    draws = torch.Generator().manual_seed(6)
    plain = {
        "diffusion_model.img_in.lora_A.weight": 0.2 * torch.randn(4, width, generator=draws),
        "diffusion_model.img_in.lora_B.weight": 0.2 * torch.randn(out, 4, generator=draws),
    }
    one, _, _ = apply_lora(fused, None, plain)
    other, _, _ = apply_lora(apply_lora(patcher, None, plain)[0], None, control)
    both = controlled(one)
    assert relative(controlled(other), both) <= 1e-6 and relative(both, wanted) > 1e-3
    with pytest.raises(ValueError, match="a control LoRA makes .*img_in.* wider"):
        apply_lora(fused, None, plain, Strengths(steps=parse("0@1,1@2", "steps")))


def test_a_wrapper_that_calls_the_model_once_more():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher, every=4)
    model, _, _ = apply_lora(patcher, None, lora, Strengths.of(0.5), BRANCH)
    wanted, inside = sampled(model, "sd15"), []

    def once_more(executor, *args, **kwargs):
        if not inside:
            inside.append(True)
            try:
                patcher.model.apply_model(*args, **kwargs)
            finally:
                inside.clear()
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "other", once_more)
    assert torch.equal(sampled(model, "sd15"), wanted)
    assert not [module for module in patcher.model.modules() if "forward" in module.__dict__]


def test_a_pack_that_puts_our_forward_back_later():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    model, _, _ = apply_lora(patcher, None, lora, Strengths.of(0.5), BRANCH)
    wanted, base, found = sampled(model, "sd15"), sampled(patcher, "sd15"), []
    layer = patcher.model.get_submodule("diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q")

    def grab(executor, *args, **kwargs):
        if not found:
            found.append(layer.forward)
            layer.forward = lambda *a, **k: found[0](*a, **k)
        return executor(*args, **kwargs)

    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "zz", grab)
    assert relative(sampled(other, "sd15"), wanted) <= 1e-5
    layer.forward = found[0]
    for _ in range(2):
        assert relative(sampled(patcher, "sd15"), base) <= 1e-5
        assert relative(sampled(model, "sd15"), wanted) <= 1e-5 < 1e-3 < relative(base, wanted)


@pytest.mark.parametrize("kinds", [(torch.bfloat16, torch.float16), (torch.float16, torch.bfloat16)], ids=str)
def test_files_of_both_half_precisions(kinds):
    patcher = tiny.tiny("sd15", inference=True)
    files = []
    for seed, kind in enumerate(kinds):
        wide = {"lora_down.weight": 1e-8, "lora_up.weight": 1e8} if kind is torch.bfloat16 else {}
        _, lora = lora_on(patcher, seed=seed)
        files.append({key: (t * wide.get(key.partition(".")[2], 1)).to(kind) for key, t in lora.items()})
    pictures = []
    for engine in (FUSE, BRANCH):
        model = patcher
        for lora in files:
            model, _, _ = apply_lora(model, None, lora, Strengths.of(0.5), engine)
        pictures.append(sampled(model, "sd15"))
    assert relative(pictures[1], pictures[0]) <= 2e-5


def test_after_a_model_with_functions_on_its_weights():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher, every=2)
    strange, plain = (apply_lora(patcher, None, lora, Strengths.of(s), FUSE)[0] for s in (0.3, 0.9))
    wanted = sampled(plain, "sd15")
    for key in patcher.model.state_dict():
        if key.endswith("to_q.weight"):
            strange.add_weight_wrapper(key, lambda weight: 3 * weight)
    unload()
    assert relative(sampled(strange, "sd15"), wanted) > 0.01
    assert torch.equal(sampled(plain, "sd15"), wanted)


def test_one_stack_keeps_factors_at_a_time():
    patcher = tiny.tiny("sd15", inference=True)
    models = []
    for seed in range(3):
        model = patcher
        for lora in (lora_on(patcher, seed=2 * seed)[1], lora_on(patcher, seed=2 * seed + 1)[1]):
            model, _, _ = apply_lora(model, None, lora, Strengths.of(0.5), BRANCH)
        models.append(model)
    for model in models:
        sampled(model, "sd15")
    held = [len(branching.stack_on(model)._hung) for model in models]
    assert held == [0, 0, 1]
    unload()
    assert not any(branching.stack_on(model)._hung for model in models)


def test_blocks_that_a_clone_exchanges():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    model, _, _ = apply_lora(patcher, None, lora, None, BRANCH)
    wanted, path = sampled(model, "sd15"), "diffusion_model.input_blocks.1.1.transformer_blocks.0"
    with torch.inference_mode():
        other = copy.deepcopy(patcher.model.get_submodule(path))
    exchanged = model.clone()
    exchanged.add_object_patch(path, other)
    assert torch.equal(sampled(exchanged, "sd15"), wanted), "the same weights in another block"
    assert torch.equal(sampled(model, "sd15"), wanted)


def test_a_failure_while_strengths_change(monkeypatch):
    patcher = tiny.tiny("sd15", inference=True)
    scheduled = Strengths(steps=parse("0.9@1,0.2@2", "steps"))
    model, _, _ = apply_lora(patcher, None, lora_on(patcher, seed=1)[1], scheduled)
    model, _, _ = apply_lora(model, None, lora_on(patcher, seed=2)[1], Strengths.of(0.4), BRANCH)
    wanted, original, calls = sampled(model, "sd15", steps=2), LayerBranch.set, []

    def fails(self, *values):
        calls.append(self)
        if len(calls) == 60:
            raise MemoryError
        original(self, *values)

    monkeypatch.setattr(LayerBranch, "set", fails)
    with pytest.raises(MemoryError):
        sampled(model, "sd15", steps=2)
    assert torch.equal(sampled(model, "sd15", steps=2), wanted)


def test_weights_that_are_cast_after_the_first_look():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    assert not apply_lora(patcher, None, lora)[2].branched
    with torch.inference_mode():
        for module in patcher.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.to(torch.float8_e4m3fn), requires_grad=False)
    _, _, applied = apply_lora(patcher, None, lora)
    assert applied.branched and "float8" in applied.why[BRANCH]


def test_layers_that_run_before_the_steps():
    """Anima's text adapter is called while the sampler prepares: it is fused whatever is asked for."""
    if not tiny.NEWER:
        assert "anima" not in tiny.SPECS  # older hosts have no such model
        return
    patcher = tiny.tiny("anima", inference=True)
    draws, lora = torch.Generator().manual_seed(3), {}
    for key, weight in patcher.model.named_parameters():
        if ".llm_adapter." in key and key.endswith(".weight") and weight.ndim == 2 and "embed" not in key:
            lora[f"{key[:-7]}.lora_A.weight"] = 0.3 * torch.randn(4, weight.shape[1], generator=draws)
            lora[f"{key[:-7]}.lora_B.weight"] = 0.3 * torch.randn(weight.shape[0], 4, generator=draws)
    base = sampled(patcher, "anima")
    wanted = sampled(apply_lora(patcher, None, lora, None, FUSE)[0], "anima")
    assert relative(wanted, base) > 1e-3
    scheduled = Strengths(steps=parse("1@1,0.9@2", "steps"))
    for strengths, engine in ((None, BRANCH), (scheduled, AUTO)):
        model, _, applied = apply_lora(patcher, None, lora, strengths, engine)
        assert not applied.branched and "before the steps" in applied.why[FUSE]
        assert torch.equal(sampled(model, "anima"), wanted)


def test_nothing_is_claimed_at_strength_0():
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    model, _, applied = apply_lora(patcher, None, lora, Strengths(blocks="all=0"))
    assert applied.model_weights == 0 and len(applied.strengths) > 50
    assert torch.equal(sampled(model, "sd15"), sampled(patcher, "sd15"))


def test_what_moves_beside_takes_its_bias_along():
    """PEFT's (IA)³ scales biases too: fused first, then beside a DoRA, it scales them once."""
    patcher = tiny.tiny("sd15", inference=True)
    path = next(t.path for t in select_targets(patcher.model, "full", False) if t.path.endswith("ff.net.0.proj"))
    factors = {f"{path}.ia3_l": torch.linspace(0.5, 2, patcher.model.get_submodule(path).weight.shape[0])[:, None]}
    _, dora = lora_on(patcher, "LoRA", {"dora": "output"}, seed=2)
    pictures = []
    for engine in (FUSE, BRANCH):
        model, _, applied = apply_lora(patcher, None, factors, Strengths.of(0.7), FUSE)
        assert f"{path}.bias" in applied.fused
        model, _, _ = apply_lora(model, None, dora, Strengths.of(0.7), engine)
        pictures.append(sampled(model, "sd15"))
    assert relative(*pictures) <= 1e-4
