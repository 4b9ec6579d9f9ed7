"""Merging: every family against sums in float64, and the methods against PEFT."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, build, randomised
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.tools.combining import draws_for, magnitude_pruned, randomly_dropped
from lora_loom.kernels.tools.merge import METHODS, Ingredient, merge
from merging import ALL, PATH, Largest, apart, holding, plain

run_host.prepare_imports()  # peft imports torchvision, which may need its operators declared first

import peft  # noqa: E402
import peft.tuners.lora.model as pefts  # noqa: E402


@pytest.mark.parametrize("method", ["concat", "sum"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_is_summed_exactly(case, method):
    module, adapter, _ = build(case)
    shape, weight = tuple(module.weight.shape), module.weight.detach()
    adapter = randomised(adapter).to(dtype=torch.float32)
    other = plain(shape, rank=1, seed=7)
    strengths = (0.7, -0.4)
    files = [Ingredient(holding(a, shape), s) for a, s in zip((adapter, other), strengths, strict=True)]
    outcome = merge(files, method, None if method == "concat" else ALL, lambda path: weight)
    merged = outcome.file.adapters[PATH]
    wide = [a.to(dtype=torch.float64) for a in (adapter, other)]
    wanted = sum(s * a.difference(weight) for a, s in zip(wide, strengths, strict=True))
    assert apart(merged.difference(weight), wanted) < 1e-6
    (layer,) = outcome.layers
    assert layer.norm == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert layer.error <= 1e-6 * layer.norm and outcome.energy > 1 - 1e-9
    bias = None if module.bias is None else module.bias.detach()
    changed = [s * (a.merged_bias(bias) - bias) for a, s in zip(wide, strengths, strict=True) if bias is not None]
    if changed:
        assert torch.allclose(merged.merged_bias(bias) - bias, sum(changed), atol=1e-7)


@pytest.mark.parametrize("method", [*METHODS])
def test_gain_of_halves_is_one(method):
    adapter = plain((24, 18), rank=3, alpha=2)
    halves = [Ingredient(holding(adapter, (24, 18)), 0.5)] * 2
    outcome = merge(halves, method, None if method == "concat" else Cut(rank=6), density=1.0)
    mean = 0.5 if "ties" in method else 1.0  # the weighted mean of two that agree, as in PEFT
    assert apart(outcome.file.adapters[PATH].delta(), mean * adapter.delta()) < 1e-6


def kohyas_concat(adapters, ratios):
    """sd-scripts' networks/sdxl_merge_lora.py --concat: both factors by √(alpha / alpha₀) · ratio, and alpha₀ stays."""
    scales = [math.sqrt(a.alpha / adapters[0].alpha) * ratio for a, ratio in zip(adapters, ratios, strict=True)]
    down = torch.cat([a.down * scale for a, scale in zip(adapters, scales, strict=True)])
    up = torch.cat([a.up * scale for a, scale in zip(adapters, scales, strict=True)], 1)
    return LoRA(down, up, adapters[0].alpha)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.25])
def test_kohyas_concat_gives_half_and_the_square_of_the_ratio(ratio):
    pairs = [plain((24, 18), rank=3, alpha=3, seed=seed) for seed in (1, 2)]
    wanted = ratio * sum(each.delta().double() for each in pairs)
    assert apart(kohyas_concat(pairs, [ratio, ratio]).delta(), 0.5 * ratio * wanted) < 1e-6
    outcome = merge([Ingredient(holding(each, (24, 18)), ratio) for each in pairs])
    assert apart(outcome.file.adapters[PATH].delta(), wanted) < 1e-6


# -- against PEFT

LAYERS = {
    "linear": (lambda: nn.Linear(20, 14), (14, 20)),
    "conv": (lambda: nn.Conv2d(5, 9, 3), (9, 5, 3, 3)),
    "conv1x1": (lambda: nn.Conv2d(8, 7, 1), (7, 8, 1, 1)),
}
IN_PEFT = {
    **{"concat": "cat", "sum": "svd", "ties": "ties_svd", "dare": "dare_linear_svd"},
    **{"dare_ties": "dare_ties_svd", "prune": "magnitude_prune_svd"},
}


def by_peft(module, adapters, strengths, combination, **options):
    """ΔW of the combination, of a model whose first layer this is. Where an adapter is None, it is on another layer."""
    model, names = nn.ModuleDict({"layer": module, "other": nn.Linear(8, 9)}), [f"a{n}" for n in range(len(adapters))]
    tuner = None
    for name, adapter in zip(names, adapters, strict=True):
        rank, alpha = (2, 2) if adapter is None else (adapter.rank, adapter.alpha)
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["other" if adapter is None else "layer"])
        if tuner is None:
            tuner = peft.LoraModel(model, {name: config}, name)
        else:
            tuner.peft_config[name] = config
            tuner.inject_adapter(model, name)
        if adapter is not None:
            model["layer"].lora_A[name].weight.data = adapter.down
            model["layer"].lora_B[name].weight.data = adapter.up
    tuner.add_weighted_adapter(names, strengths, "merged", combination, **options)
    return model["layer"].get_delta_weight("merged").detach().double()


def seeded(run, seed):
    def from_the_seed(*args):
        torch.manual_seed(seed)
        return run(*args)

    return from_the_seed


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("layer", [*LAYERS])
@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.55])
@pytest.mark.parametrize("method", [*METHODS])
def test_methods_are_pefts(method, density, majority, layer, alone, monkeypatch):
    dtype = torch.float32 if "dare" in method else torch.float64  # PEFT draws in the type of ΔW
    make, shape = LAYERS[layer]
    adapters = [plain(shape, rank, 2 * rank + 1, seed=rank, dtype=dtype) for rank in (3, 4, 2)]
    strengths = [0.75, 0.5, 1.25]
    files = [Ingredient(holding(each, shape), s) for each, s in zip(adapters, strengths, strict=True)]
    if alone:
        adapters[1:], files = [None, None], files[:1]
    cut = None if method == "concat" else Cut(rank=5)
    merged = merge(files, method, cut, density=density, majority=majority, seed=3)
    for name in ("dare_linear", "dare_ties"):  # PEFT draws from torch's own generator
        monkeypatch.setattr(pefts, name, seeded(getattr(pefts, name), draws_for(3, PATH).initial_seed()))
    wanted = by_peft(
        make().to(dtype),
        adapters,
        strengths,
        IN_PEFT[method],
        svd_rank=5,
        density=density,
        majority_sign_method=majority,
    )
    assert apart(merged.file.adapters[PATH].delta(), wanted) < (1e-5 if dtype == torch.float32 else 1e-6)


def test_one_alone_is_pefts_linear():
    adapter = plain((14, 20), 3, 2)
    merged = merge([Ingredient(holding(adapter, (14, 20)), -0.6)])
    wanted = by_peft(nn.Linear(20, 14), [adapter], [-0.6], "linear")
    assert apart(merged.file.adapters[PATH].delta(), wanted) < 1e-6


# -- methods


def test_a_negative_strength_votes_the_other_way():
    """PEFT elects signs before it multiplies by weights, so that there a LoRA at −1 pulls towards what it removes."""
    shape = (13, 9)
    one, two = plain(shape, 2, seed=1), plain(shape, 2, seed=2)
    turned = LoRA(two.down, -two.up, two.alpha)
    for method in ("ties", "dare_ties"):
        below = merge([Ingredient(holding(one, shape)), Ingredient(holding(two, shape), -0.5)], method, ALL)
        above = merge([Ingredient(holding(one, shape)), Ingredient(holding(turned, shape), 0.5)], method, ALL)
        assert apart(below.file.adapters[PATH].delta(), above.file.adapters[PATH].delta().double()) < 1e-6


def test_pruning_keeps_the_largest():
    delta = torch.randn(31, 17, generator=torch.Generator().manual_seed(4))
    kept = magnitude_pruned(delta, 0.25)
    assert kept.count_nonzero() == int(0.25 * delta.numel())
    assert delta[kept == 0].abs().max() < delta[kept != 0].abs().min() and torch.equal(
        kept[kept != 0], delta[kept != 0]
    )
    assert magnitude_pruned(delta, 1e-9).count_nonzero() == 1


def test_dropping_keeps_the_mean_and_repeats_itself():
    delta = torch.full((300, 200), 2.0)
    first, again, other = (randomly_dropped(delta, 0.3, draws_for(seed, PATH)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert (first != 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert first.mean() == pytest.approx(2.0, rel=0.03)
    assert torch.allclose(first[first != 0], torch.tensor(2 / 0.3))


def test_draws_depend_on_no_other_layer():
    shape = (12, 10)
    many = LoRAFile(
        {f"l.{n}": plain(shape, seed=n) for n in range(3)}, names=NameTable({f"l.{n}": shape for n in range(3)})
    )
    one = replace(many, adapters={"l.2": many.adapters["l.2"]})
    before = torch.get_rng_state()
    found = [merge([Ingredient(file, 0.5)], "dare", ALL, seed=5).file.adapters["l.2"].delta() for file in (many, one)]
    assert torch.equal(*found) and torch.equal(before, torch.get_rng_state())


# -- memory


@pytest.mark.parametrize("method", ["concat", "sum"])
def test_nothing_dense_is_made_of_low_rank_files(method):
    shape = (700, 500)
    adapters = [plain(shape, 4, seed=3), plain(shape, 6, seed=4)]
    files = [Ingredient(holding(each, shape), 0.5) for each in adapters]
    with Largest() as largest:
        merge(files, method, None if method == "concat" else Cut(rank=4))
    assert largest.numbers <= 2 * 10 * 700
