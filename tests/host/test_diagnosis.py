"""How much a LoRA changes a model: norms against dense float64, what low precision leaves of a change, the words."""

import gc
import math

import numpy as np
import pytest
import torch

import tiny
from full_size import full_size
from lora_loom.host import diagnosis, originals
from lora_loom.host.diagnosis import Shares, change_of, percent, shares_of
from lora_loom.host.originals import Originals, UnreadableError
from lora_loom.host.realised import realised, realised_lines
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.block_names import resolve
from lora_loom.kernels.blocks import BlockIndex, block_map
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.control import Widened
from lora_loom.kernels.full import Full
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.tlora import TLoRA
from lora_loom.kernels.vera import VeRA
from test_quantised import OFFERED, quantised

LINEAR = "diffusion_model.double_blocks.0.img_attn.proj"
FAMILIES = [
    ("LoRA", {}),
    ("LoRA", {"rank_stabilised": True}),
    ("LoRA", {"dora": "output"}),
    ("LoRA", {"dora": "input"}),
    ("LoHa", {}),
    ("LoKr", {"factor": 4}),
    ("LoKr", {"full_rank": True, "dora": "output"}),
    ("full", {}),
    ("OFT", {"rescale": True}),
    ("BOFT", {}),
    ("OFTv2", {}),
    ("IA3", {}),
    ("GLoRA", {}),
]


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def filled(family, shape, options, weight, seed=0):
    """An adapter with something in all its tensors."""
    fresh = make_adapter(
        family, shape, Options(**{"rank": 3, "alpha": 2.0, "block_size": 8} | options), draws(), weight
    )
    noise = draws(seed)
    return fresh.with_tensors({k: t + 0.1 * torch.randn(t.shape, generator=noise) for k, t in fresh.tensors.items()})


def loras(patcher, preset="full", size=1.0, every=1):
    noise, found = draws(3), {}
    for target in select_targets(patcher.model, preset, True)[::every]:
        columns = math.prod(target.shape[1:])
        down = torch.randn(4, *target.shape[1:], generator=noise)
        up = torch.randn(target.shape[0], 4, *(1 for _ in target.shape[2:]), generator=noise)
        found[target.path] = LoRA(down, up * size * torch.rand((), generator=noise) / columns, 4)
    return found


def dense_change(adapter, weight, strength=1.0):
    """‖W' − W‖, by numpy in float64."""
    double = adapter.to(dtype=torch.float64)
    base = double.widened(weight.double()) if isinstance(adapter, Widened) else weight.double()
    return np.linalg.norm((double.merged(weight.double(), strength) - base).numpy().ravel())


def weight_of(patcher, path):
    return patcher.model.get_submodule(path).weight


@pytest.mark.parametrize("family, options", FAMILIES, ids=str)
@pytest.mark.parametrize("name, path", [("flux", LINEAR), ("sd15", "diffusion_model.input_blocks.1.0.in_layers.2")])
def test_the_norm_of_every_family(name, path, family, options):
    patcher = tiny.tiny(name)
    weight = weight_of(patcher, path)
    adapter = filled(family, tuple(weight.shape), options, weight)
    assert change_of(adapter, path, Originals(patcher)) == pytest.approx(dense_change(adapter, weight), rel=2e-4)


def test_tucker_and_families_that_are_only_applied():
    patcher = tiny.tiny("sd15")
    path = "diffusion_model.input_blocks.1.0.in_layers.2"
    weight = weight_of(patcher, path)
    for family in ("LoRA", "LoHa", "LoKr"):
        adapter = filled(family, tuple(weight.shape), {"tucker": True}, weight)
        assert change_of(adapter, path, Originals(patcher)) == pytest.approx(dense_change(adapter, weight), rel=2e-4)
    patcher = tiny.tiny("flux")
    weight = weight_of(patcher, LINEAR)
    o, i = weight.shape
    noise = draws(8)
    shapes = {"vera_lambda_b": (o,), "vera_lambda_d": (3,), "vera_A": (3, i + 5), "vera_B": (o + 2, 3)}
    parts = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    vera = VeRA.read(parts, weight.shape)
    shapes = {"q_layer.weight": (3, i), "p_layer.weight": (o, 3), "lambda_layer": (1, 3)}
    tlora = TLoRA.read({name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}, weight.shape)
    for adapter in (vera, tlora):
        assert change_of(adapter, LINEAR, Originals(patcher)) == pytest.approx(dense_change(adapter, weight), rel=2e-4)


def test_slices_sums_and_exchanged_halves():
    patcher = tiny.tiny("flux")
    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    weight = weight_of(patcher, path)
    rows, columns = weight.shape
    third = rows // 3

    def lora(count, seed):
        return filled("LoRA", (count, columns), {}, None, seed)

    slices = [Sliced(lora(third, n), n * third, third, weight.shape) for n in range(3)]
    other = filled("LoHa", (third, columns), {}, None, 5)
    cases = {
        "one slice": slices[1],
        "apart": Sum(slices),
        "slices over each other": Sum([slices[0], Sliced(lora(third, 7), third // 2, third, weight.shape)]),
        "the same slice twice": Sum([slices[0], Sliced(lora(third, 9), 0, third, weight.shape)]),
        "whole ones": Sum([lora(rows, 1), lora(rows, 2), lora(rows, 3)]),
        "one against itself": Sum([lora(rows, 1), LoRA(lora(rows, 1).down, -lora(rows, 1).up, 2.0)]),
        "a slice and the whole": Sum([slices[2], lora(rows, 4)]),
        "a dense slice": Sum([slices[0], Sliced(other, third, third, weight.shape)]),
        "swapped": Swapped(lora(rows, 5)),
        "swapped rotation": Swapped(filled("OFT", (rows, columns), {}, weight)),
        "in a slice": Sliced(filled("IA3", (third, columns), {}, weight), third, third, weight.shape),
        "wider": Widened(filled("LoRA", (rows, columns + 6), {}, None), weight.shape),
        "wider and dense": Widened(filled("LoHa", (rows, columns + 6), {}, None), weight.shape),
    }
    for what, adapter in cases.items():
        wanted = dense_change(adapter, weight)
        assert change_of(adapter, path, Originals(patcher)) == pytest.approx(wanted, rel=2e-4, abs=2e-6), what


def test_norms_of_other_parameters():
    patcher = tiny.tiny("flux")
    path = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
    name = "weight" if hasattr(patcher.model.get_submodule(path), "weight") else "scale"
    weight = getattr(patcher.model.get_submodule(path), name)
    for key in (path if name == "weight" else f"{path}.scale", f"{path}.{name}"):
        adapter = Full.read({"diff": torch.full_like(weight, 0.5)}, weight.shape)
        (layer,) = shares_of(patcher, {key: adapter}, lambda path: 2.0).layers
        assert layer.share == pytest.approx(math.sqrt(len(weight)) / np.linalg.norm(weight.numpy()), rel=1e-5)


@pytest.mark.parametrize("name", ["sd15", "flux", "sdxl"])
def test_blocks(name):
    patcher = tiny.tiny(name)
    adapters = loras(patcher)
    strengths = dict(zip(adapters, np.random.default_rng(0).normal(size=len(adapters)), strict=True))
    shares = shares_of(patcher, adapters, strengths.__getitem__)
    index, sums = BlockIndex(block_map(patcher.model)), {}
    for path, adapter in adapters.items():
        block, weight = index.of(path), weight_of(patcher, path)
        changed, base, count = sums.get(block.id if block else "base", (0.0, 0.0, 0))
        changed += dense_change(adapter, weight, strengths[path]) ** 2
        base += np.linalg.norm(weight.double().numpy().ravel()) ** 2
        sums[block.id if block else "base"] = changed, base, count + 1
    assert {block.block for block in shares.blocks} == sums.keys()
    for block in shares.blocks:
        changed, base, count = sums[block.block]
        assert block.share == pytest.approx(math.sqrt(changed / base), rel=1e-4) and block.layers == count
    roles = {"base": "base"} | {block.id: block.role for block in block_map(patcher.model)}
    assert [block.block for block in shares.blocks] == [block for block in roles if block in sums]
    assert all(block.role == roles[block.block] for block in shares.blocks)
    ranked = sorted(shares.blocks, key=lambda block: -block.share)
    text = " ".join(shares.lines())
    for block in (ranked[0], ranked[-1]):
        assert f"{shares.names[block.block]} {percent(block.share)}" in text


def test_text_encoders():
    clip = tiny.tiny_dual_clip()
    paths = [f"clip_{x}.transformer.text_model.encoder.layers.{n}.mlp.fc1" for x in "lg" for n in range(2)]
    tree = clip.cond_stage_model
    adapters = {path: filled("LoRA", tree.get_submodule(path).weight.shape, {}, None) for path in paths}
    shares = shares_of(clip.patcher, adapters, lambda path: 0.5)
    assert [block.block for block in shares.blocks] == [path.removesuffix(".mlp.fc1") for path in paths]
    weight = tree.get_submodule(paths[1]).weight
    wanted = dense_change(adapters[paths[1]], weight, 0.5) / np.linalg.norm(weight.numpy())
    assert shares.blocks[1].share == pytest.approx(wanted, rel=1e-4)


def test_what_is_merged_does_not_count():
    patcher = tiny.tiny("sd15")
    adapters = loras(patcher, every=5)
    before = shares_of(patcher, adapters, lambda path: 1.0)
    other = patcher.clone()
    other.add_patches({f"{path}.weight": ("diff", (a.delta() * 50,)) for path, a in adapters.items()}, 1.0)
    first = next(iter(adapters))
    original = weight_of(patcher, first).clone()
    other.patch_model(device_to=torch.device("cpu"))
    try:
        assert not torch.equal(weight_of(patcher, first), original)
        originals._NORMS.clear()
        for one in (patcher, other):
            assert shares_of(one, adapters, lambda path: 1.0) == before
            assert torch.equal(Originals(one).dense(first), original)
    finally:
        other.unpatch_model(device_to=torch.device("cpu"))


def test_norms_are_read_once_and_die_with_the_model(monkeypatch):
    patcher = tiny.tiny("flux")
    adapters = loras(patcher, "attention")
    kept = len(originals._NORMS)
    first = shares_of(patcher, adapters, lambda path: 1.0)
    read = []
    monkeypatch.setattr(Originals, "_read_norm", lambda self, path: read.append(path))
    assert shares_of(patcher.clone(), adapters, lambda path: 1.0) == first and not read
    assert len(originals._NORMS) == kept + 1
    del patcher
    gc.collect()
    assert len(originals._NORMS) == kept


def test_large_weights_are_read_in_part_and_the_error_is_told(monkeypatch):
    patcher = tiny.tiny("flux")
    monkeypatch.setattr(originals, "WHOLE", 1000)
    monkeypatch.setattr(originals, "SOME", 100)
    monkeypatch.setattr(originals, "FEWEST", 24)
    adapters, noise = loras(patcher), draws(4)
    for path in adapters:  # rows of very different lengths
        weight_of(patcher, path).mul_(0.1 + 2 * torch.rand(len(weight_of(patcher, path)), 1, generator=noise))
    shares = shares_of(patcher, adapters, lambda path: 1.0)
    off = []
    for layer in shares.layers:
        exact = np.linalg.norm(weight_of(patcher, layer.path).double().numpy().ravel())
        if layer.error:
            off.append(abs(layer.weight - exact) / (layer.error * exact))
        else:
            assert layer.weight == pytest.approx(exact, rel=1e-5)
    assert len(off) > 20 and max(off) < 5
    assert 0.5 < np.mean(np.square(off)) ** 0.5 < 1.5  # the error that is told is the error there is
    told = next(line for line in shares.lines() if "read in part" in line)
    assert f"{len(off)} large layers" in told and f"{2 * max(layer.error for layer in shares.layers):.1%}" in told
    assert shares_of(patcher, adapters, lambda path: 1.0) == shares


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_weights_of_low_precision(dtype):
    patcher = tiny.tiny("flux", dtype=dtype, compute_dtype=torch.bfloat16)
    adapters = loras(patcher, "attention")
    for layer in shares_of(patcher, adapters, lambda path: 1.0).layers:
        exact = np.linalg.norm(weight_of(patcher, layer.path).float().numpy().ravel())
        assert layer.weight == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("kind", OFFERED)
def test_quantised_weights(kind, monkeypatch):
    patcher, dense = quantised("flux", kind)
    adapters = loras(dense, "attention")
    wanted = shares_of(dense, adapters, lambda path: 1.0)
    found = shares_of(patcher, adapters, lambda path: 1.0)
    assert [layer.share for layer in found.layers] == pytest.approx([layer.share for layer in wanted.layers], rel=1e-4)
    inside = Originals(patcher)
    some = torch.tensor([0, 3, 4, 17])
    path = next(iter(adapters))
    assert inside.in_rows(path)
    torch.testing.assert_close(inside.rows(path, some), weight_of(dense, path)[some], rtol=1e-5, atol=1e-7)
    monkeypatch.setattr(originals, "_has_rows", lambda weight: False)
    torch.testing.assert_close(inside.rows(path, some), weight_of(dense, path)[some], rtol=1e-5, atol=1e-7)


class Packed(torch.Tensor):
    """What another pack's loader would keep weights in."""


def test_weights_that_cannot_be_read_are_told():
    patcher = tiny.tiny("flux")
    adapters = loras(patcher, "attention")
    module = patcher.model.get_submodule(LINEAR)
    module.weight = torch.nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)
    assert type(module.weight) is not torch.nn.Parameter
    with pytest.raises(UnreadableError, match="Packed"):
        Originals(patcher).dense(LINEAR)
    shares = shares_of(patcher, adapters, lambda path: 1.0)
    assert len(shares.layers) == len(adapters) - 1
    assert any("1 layer could not be compared" in line and "Packed" in line for line in shares.lines())


def test_dense_families_stop_at_the_budget(monkeypatch):
    patcher = tiny.tiny("flux")
    targets = select_targets(patcher.model, "full", True)
    adapters = {t.path: filled("LoHa", t.shape, {}, None) for t in targets}
    blocks = {t.block for t in targets}
    monkeypatch.setattr(diagnosis, "BUDGET", sum(math.prod(t.shape) for t in targets) // 2)
    shares = shares_of(patcher, adapters, lambda path: 1.0)
    assert 0 < shares.left_out < len(adapters) and len(shares.layers) == len(adapters) - shares.left_out
    assert len(shares.blocks) == len(blocks)
    assert any(line.startswith(f"{shares.left_out} layers not measured") for line in shares.lines())
    monkeypatch.setattr(diagnosis, "BUDGET", 0)
    cheap = {t.path: filled("LoRA", t.shape, {}, None) for t in targets}
    assert len(shares_of(patcher, cheap, lambda path: 1.0).layers) == len(cheap)


def test_what_changes_nothing_is_told():
    patcher = tiny.tiny("flux")
    adapters = loras(patcher)
    paths = list(adapters)
    for path in paths[:3]:
        adapters[path] = LoRA(adapters[path].down, torch.zeros_like(adapters[path].up), 4)
    rows = weight_of(patcher, paths[3]).shape
    adapters[paths[3]] = Full.read({"diff_b": torch.ones(rows[0])}, rows)
    adapters[paths[4]] = LoRA(adapters[paths[4]].down * math.nan, adapters[paths[4]].up, 4)
    weight_of(patcher, paths[5]).zero_()
    shares = shares_of(patcher, adapters, lambda path: 0.0 if path in paths[6:8] else 1.0)
    text = "\n".join(shares.lines())
    assert "3 layers change nothing: what the file holds for them is zero" in text
    assert "2 layers at strength 0" in text
    assert f"1 layer with values that are no numbers, {paths[4]} first" in text
    assert "1 layer whose own weights are all zero" in text
    (zeroed,) = (layer for layer in shares.layers if layer.path == paths[5])
    assert zeroed.share == math.inf
    assert not any("nothing" in line for line in shares_of(patcher, loras(patcher), lambda path: 1.0).lines())


def test_few_blocks_are_all_named():
    shares = Shares(
        tuple(
            diagnosis.LayerShare(f"x.{n}", f"double_blocks.{n}", "trunk", 0.04 * (n + 1), 1.0, 1.0) for n in range(3)
        ),
        0,
        {},
        {f"double_blocks.{n}": f"double.{n}" for n in range(3)},
    )
    assert shares.lines() == ["change of the weights by block: double.2 12 %, double.1 8.0 %, double.0 4.0 %"]


@pytest.mark.parametrize("share, text", [(0, "0 %"), (1e-9, "1.0e-07 %"), (0.00123, "0.12 %"), (0.0123, "1.2 %")])
def test_percent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "hunyuan_video", "lumina2", "wan_14b"])
def test_names_mean_the_blocks_they_stand_for(name):
    blocks = block_map(full_size(name))
    names = diagnosis.short_names(blocks, {block.id for block in blocks})
    assert all(resolve(called, blocks) == {block} for block, called in names.items())
    if name == "flux":
        assert names["double_blocks.3"] == "double.3"


# -- what arrives of a change


def one_layer(dtype, share, size=1024, rank=16, compute=torch.bfloat16):
    """The layer of the report's table: Gaussian weights, and a LoRA with ‖ΔW‖ = share · ‖W‖."""
    patcher = tiny.tiny("flux", dtype=dtype, compute_dtype=compute)
    module, noise = patcher.model.get_submodule(LINEAR), draws(5)
    weight = (torch.randn(size, size, generator=noise) / 32).to(dtype)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    up, down = torch.randn(size, rank, generator=noise), torch.randn(rank, size, generator=noise)
    scale = share * weight.float().norm() / (up @ down).norm()
    return patcher, {LINEAR: LoRA(down, up * scale, rank)}, weight


def measured(patcher, adapters, strength=1.0):
    shares = shares_of(patcher, adapters, lambda path: strength)
    return realised(patcher, shares, adapters), shares


# |ΔW| / |W|, bf16, fp8 e4m3 nearest with its gain, fp8 stochastic
TABLE = [(0.10, 0.017, 0.28, 0.995, 0.40), (0.03, 0.054, 0.70, 0.78, 1.13), (0.01, 0.16, 0.99, 0.05, 2.38)]


@pytest.mark.parametrize("share, half, nearest, gain, stochastic", TABLE)
def test_the_table_of_precision(share, half, nearest, gain, stochastic, monkeypatch):
    patcher, adapters, _ = one_layer(torch.bfloat16, share)
    ((one,), shares) = measured(patcher, adapters)
    assert shares.layers[0].share == pytest.approx(share, rel=1e-4)
    assert one.merged.error == pytest.approx(half, rel=0.1) and one.merged.gain == pytest.approx(1, abs=0.02)
    assert one.branched.error == pytest.approx(0.004, rel=0.3) and one.branched.gain == pytest.approx(1, abs=2e-3)
    patcher, adapters, weight = one_layer(torch.float8_e4m3fn, share)
    ((one,), _) = measured(patcher, adapters)
    assert one.merged.error == pytest.approx(stochastic, rel=0.1) and one.merged.gain == pytest.approx(1, abs=0.03)
    assert one.branched.error < 0.005 and one.kept == "float8_e4m3fn"
    monkeypatch.setattr(Originals, "rounded", lambda self, path, value: value.to(torch.float8_e4m3fn).float())
    ((one,), shares) = measured(patcher, adapters)
    assert one.merged.error == pytest.approx(nearest, rel=0.05) and one.merged.gain == pytest.approx(gain, abs=0.03)
    (line,) = realised_lines([one], shares.names)
    assert ("arrives" in line) == (gain < 0.9) and f"off by {percent(one.merged.error)} (double.0)" in line


def dense(patcher, path):
    weight = weight_of(patcher, path)
    return (weight.float() if type(weight) is torch.nn.Parameter else weight.dequantize()).float().clone()


def compare_with_the_host(patcher, found, adapters, strength):
    """``found`` against what the host has in its weights once it has merged the same."""
    other = patcher.clone()
    other.add_patches({f"{path}.weight": ("diff", (a.delta(),)) for path, a in adapters.items()}, strength)
    base = {one.path: dense(patcher, one.path) for one in found}
    other.patch_model(device_to=torch.device("cpu"))
    try:
        for one in found:
            got = (dense(other, one.path) - base[one.path]).double().numpy().ravel()
            asked = strength * adapters[one.path].delta().double().numpy().ravel()
            error = np.linalg.norm(got - asked) / np.linalg.norm(asked)
            assert one.merged.error == pytest.approx(error, rel=0.01)
            assert one.merged.gain == pytest.approx(got @ asked / (asked @ asked), rel=0.01, abs=0.01)
    finally:
        other.unpatch_model(device_to=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16])
def test_merged_as_the_host_merges(dtype):
    patcher = tiny.tiny("flux", dtype=dtype, compute_dtype=torch.bfloat16)
    adapters = loras(patcher, "full", size=0.4)
    found, _ = measured(patcher, adapters, 0.7)
    assert len(found) == 8 and [one.share for one in found] == sorted(one.share for one in found)
    compare_with_the_host(patcher, found, adapters, 0.7)


@pytest.mark.parametrize("kind", OFFERED)
def test_on_quantised_weights(kind):
    patcher, _ = quantised("flux", kind)
    adapters = loras(patcher, "attention", size=30)
    found, shares = measured(patcher, adapters)
    assert len(found) > 4 and not {one.kept for one in found} & {"float32", "bfloat16"}
    assert all(one.merged.error > 1e-3 and one.branched.error < 1e-4 for one in found)  # branches run in float32
    compare_with_the_host(patcher, found, adapters, 1.0)
    assert realised_lines(found, shares.names)[0].startswith(found[0].kept)


def test_a_part_of_a_large_layer_stands_for_it(monkeypatch):
    patcher, adapters, _ = one_layer(torch.bfloat16, 0.03)
    ((whole,), _) = measured(patcher, adapters)
    monkeypatch.setattr("lora_loom.host.realised.NUMBERS", 50_000)
    ((part,), _) = measured(patcher, adapters)
    assert part != whole and part.merged.error == pytest.approx(whole.merged.error, rel=0.1)
    assert part.branched.error == pytest.approx(whole.branched.error, rel=0.2)


@pytest.mark.parametrize("family, options", FAMILIES, ids=str)
def test_branches_of_every_family_are_exact_enough(family, options):
    patcher = tiny.tiny("sd15", dtype=torch.bfloat16)
    paths = ["diffusion_model.input_blocks.1.0.in_layers.2", "diffusion_model.input_blocks.1.1.proj_in"]
    adapters = {}
    for path in paths:
        weight = weight_of(patcher, path).float()
        adapters[path] = filled(family, tuple(weight.shape), options, weight)
    found, _ = measured(patcher, adapters)
    assert len(found) == 2
    for one in found:
        # rotations and DoRA take the difference of two bf16 numbers
        assert one.branched.error < 0.03 and one.branched.gain == pytest.approx(1, abs=0.01)


def test_nothing_is_lost_in_float32():
    patcher = tiny.tiny("flux")
    assert measured(patcher, loras(patcher))[0] == [] and realised_lines([], {}) == []


def test_the_random_generator_is_left_alone():
    patcher = tiny.tiny("flux", dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    state = torch.get_rng_state()
    measured(patcher, loras(patcher, "attention"))
    assert torch.equal(torch.get_rng_state(), state)
