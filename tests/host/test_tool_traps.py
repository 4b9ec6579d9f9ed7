"""Where the LoRA tools could do something else than what is on the MODEL, without a word."""

import json

import comfy.sd
import pytest
import torch

import tiny
from applying import lora_on, relative, sampled
from lora_loom.host.apply import BRANCH, FUSE, Strengths, apply_lora
from lora_loom.host.tooling import files_state
from lora_loom.host.tools import MergeOptions, bake_applied, extract_lora, merge_loras
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.safetensors_io import LoraModel
from lora_loom.kernels.tools.provenance import TOOL
from lora_loom.kernels.writing import to_tensors
from lora_loom.nodes.tools import amount


def model(tensors, **metadata):
    return LoraModel(tensors, metadata)


def by_core(patcher, lora, strength=1.0):
    return comfy.sd.load_lora_for_models(patcher, None, dict(lora), strength, 0.0)[0]


def merged(loras, strengths="", patcher=None, rank=0, **options):
    given = [(f"lora_{number}", lora) for number, lora in enumerate(loras, 1)]
    return merge_loras(given, strengths, "", MergeOptions(**options), Cut(rank=rank) if rank else None, patcher)


def baked(patcher, clip=None, method="concat", rank=0, dense_rank=64, precision="float32"):
    return bake_applied(patcher, clip, method, Cut(rank=rank) if rank else None, dense_rank, precision)


def extracted(tuned, base, clip_tuned=None, clip_base=None, rank=4, min_change=0.0, conv=True):
    return extract_lora(tuned, base, clip_tuned, clip_base, Cut(rank=rank), min_change, None, conv, "float32")


# -- what weights are read


@pytest.mark.parametrize("engine", [FUSE, BRANCH])
def test_our_own_loras_on_the_model_do_not_move_the_base(engine):
    """DoRA is merged on the weights that our loaders show it: those without any of ours."""
    clean = tiny.tiny("sd15")
    dora = model(lora_on(clean, "LoRA", {"dora": "output"}, every=9, seed=1)[1])
    plain = model(lora_on(clean, every=9, seed=1)[1])
    wanted = merged([dora, plain], patcher=clean, method="sum", rank=64).lora
    loaded, _, _ = apply_lora(clean, None, plain, Strengths(), engine)
    got = merged([dora, plain], patcher=loaded, method="sum", rank=64).lora
    table = NameTable.of(clean.model)
    wanted, got = (read_lora(lora, table).adapters for lora in (wanted, got))
    assert wanted.keys() == got.keys() and len(got) > 5
    for path, adapter in got.items():
        zeros = torch.zeros(table.shapes[path])
        assert relative(adapter.difference(zeros), wanted[path].difference(zeros)) < 1e-4


def test_patches_that_the_host_never_applies_are_in_no_file():
    """It skips parameters of modules that hold others; our loaders would not."""
    clean = tiny.tiny("wan")
    _, lora = lora_on(clean, every=5)
    idle = {"diffusion_model.blocks.0.modulation.diff": torch.ones(1, 6, clean.model.diffusion_model.dim)}
    model_ = by_core(by_core(clean, lora), idle)
    assert relative(sampled(model_, "wan", 2), sampled(by_core(clean, lora), "wan", 2)) < 1e-6
    found = baked(model_)
    assert "never applies" in found.report and "modulation" in found.report
    for lora in (found.lora, extracted(model_, clean, rank=16).lora):
        assert lora and not any("modulation" in key for key in lora)


@pytest.mark.parametrize("name", ["wan", "sd3"])
def test_a_merged_model_baked_is_what_it_was(name):
    clean, other = tiny.tiny(name), tiny.tiny(name)
    with torch.no_grad():
        draws = torch.Generator().manual_seed(5)
        for weight in other.model.parameters():
            weight.add_(0.02 * torch.randn(weight.shape, generator=draws))
    both = clean.clone()
    both.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    found = baked(both, dense_rank=512)
    got, _, applied = apply_lora(clean, None, found.lora, Strengths(), FUSE)
    assert not applied.unplaced
    base, wanted = sampled(clean, name, 2), sampled(both, name, 2)
    assert relative(sampled(got, name, 2) - base, wanted - base) < 2e-3


@pytest.mark.parametrize(("one", "two"), [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.float16)])
def test_rounding_is_no_difference(one, two):
    with pytest.raises(ValueError, match="extract: nothing is left .* rounding"):
        extracted(tiny.tiny("sd15", dtype=one), tiny.tiny("sd15", dtype=two))


def test_loras_merged_on_use_are_extracted():
    clean, clip = tiny.tiny("sd15"), tiny.tiny_clip()
    table, state = NameTable.of(clip.cond_stage_model), clip.cond_stage_model.state_dict()
    adapters = {}
    for number, path in enumerate(path for path in table.text.paths if path.endswith("fc1")):
        draws = torch.Generator().manual_seed(number)
        fresh = make_adapter("LoRA", state[f"{path}.weight"].shape, Options(rank=2), draws)
        numbers = {key: torch.randn(tensor.shape, generator=draws) for key, tensor in fresh.tensors.items()}
        adapters[path] = fresh.with_tensors(numbers)
        layer = clip.cond_stage_model.get_submodule(path)
        layer.comfy_cast_weights = True
        layer.weight = torch.nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    lora = to_tensors(LoRAFile(adapters, names=table))
    _, with_lora, applied = apply_lora(clean, clip, lora, Strengths.of(1.0, 0.7))
    assert len(applied.clip_branched) == len(adapters) > 0
    got = read_lora(extracted(clean, clean, with_lora, clip).lora, table).adapters
    assert got.keys() == adapters.keys()
    for path, adapter in adapters.items():
        zeros = torch.zeros(table.shapes[path])
        assert relative(got[path].difference(zeros), 0.7 * adapter.difference(zeros)) < 1e-3


def test_what_other_nodes_do_otherwise_is_told():
    clean = tiny.tiny("sd15")
    loaded = by_core(clean, lora_on(clean, every=9)[1])
    assert "not in it" not in baked(loaded).report
    loaded.set_model_unet_function_wrapper(lambda apply, args: apply(args["input"], args["timestep"], **args["c"]))
    loaded.set_model_attn1_patch(lambda q, k, v, extra: (q, k, v))
    loaded.add_object_patch("diffusion_model.time_embed", torch.nn.Identity())
    report = baked(loaded).report
    for word in ("model_function_wrapper", "patches", "diffusion_model.time_embed"):
        assert word in report


def test_exact_parts_stay_exact_beside_computed_ones():
    clean = tiny.tiny("sd15")
    plain = lora_on(clean, every=9)[1]
    dora = lora_on(clean, "LoRA", {"dora": "output"}, every=9)[1]
    both, _, _ = apply_lora(by_core(clean, plain), None, dora, Strengths(), BRANCH)
    found = baked(both, dense_rank=1)
    alone = baked(apply_lora(clean, None, dora, Strengths(), BRANCH)[0], dense_rank=1)
    assert json.loads(found.lora.metadata[TOOL])["energy"] > json.loads(alone.lora.metadata[TOOL])["energy"]


# -- what is said


def test_an_empty_line_is_a_strength_of_one():
    loras = [model(lora_on(tiny.tiny("sd15"), every=9, seed=seed)[1]) for seed in (1, 2)]
    assert [line for line in merged(loras, "\n0.5").report.splitlines() if " at " in line] == [
        "the LoRA at lora_1 at 1",
        "the LoRA at lora_2 at 0.5",
    ]


def test_nothing_is_no_success():
    clean = tiny.tiny("sd15")
    lora = model(lora_on(clean, every=9)[1])
    with pytest.raises(ValueError, match="nothing is left .* strength is 0"):
        merged([lora], "0")
    itself = clean.clone()
    itself.add_patches(clean.get_key_patches("diffusion_model."), 0.5, 0.5)
    for method, rank in (("concat", 0), ("sum", 4)):
        with pytest.raises(ValueError, match="nothing is left"):
            baked(itself, method=method, rank=rank)
    with pytest.raises(ValueError, match="nothing is left .* less than min_change"):
        extracted(by_core(clean, lora, 0.001), clean, min_change=0.9)


def test_options_without_effect_are_told():
    clean = tiny.tiny("sd15")
    loaded = by_core(clean, lora_on(clean, every=9)[1])
    found = baked(loaded, dense_rank=512)
    assert "dense_rank: no effect" in found.report and "dense_rank" not in found.lora.metadata[TOOL]
    assert "dense_rank" not in baked(loaded).report


def test_presets_change_what_is_merged(monkeypatch):
    before = files_state("")
    monkeypatch.setattr("lora_loom.host.loras._state_of_presets", lambda: "other presets")
    assert files_state("") != before and files_state(None) != before


# -- numbers


def test_a_size_counts_the_precision_that_is_given():
    half = torch.zeros(3, 3, dtype=torch.float16)
    assert amount(0, 0, 0, 0, 0.5, "as given", [("x.lora_up.weight", half)]).itemsize == 2
    assert amount(0, 0, 0, 0, 0.5, "as given", [("x.lora_up.weight", half.float())]).itemsize == 4
    assert amount(0, 0, 0, 0, 0.5, "bfloat16").itemsize == 2
    for bad in (float("inf"), float("nan"), 1e-9, -5.0):
        with pytest.raises(ValueError, match="^megabytes"):
            amount(0, 0, 0, 0, bad, "float16")
    with pytest.raises(ValueError, match="^megabytes: goes without rank and energy; set one"):
        amount(8, 0.9, 0, 0, 5.0, "float16")


def test_precision_as_given_is_that_of_the_loras():
    clean = tiny.tiny("sd15")
    half = {key: tensor.half() for key, tensor in lora_on(clean, every=9)[1].items()}
    norms = {"diffusion_model.input_blocks.1.0.in_layers.0.diff": torch.randn(32).half()}
    assert clean.model.get_parameter("diffusion_model.input_blocks.1.0.in_layers.0.weight").shape == (32,)
    found = baked(by_core(clean, {**half, **norms}), precision="as given")
    assert {tensor.dtype for tensor in found.lora.values() if tensor.numel() > 1} == {torch.float16}


def test_parameters_that_are_no_layers():
    wan = tiny.tiny("wan")
    wide = {"diffusion_model.blocks.0.modulation.set_weight": torch.ones(1, 6, wan.model.diffusion_model.dim)}
    lora = model({**lora_on(wan, every=9)[1], **wide})
    assert merged([lora], patcher=wan).lora
    clean = tiny.tiny("sd15")
    clean.model.diffusion_model.extra = torch.nn.Module()
    clean.model.diffusion_model.extra.gain = torch.nn.Parameter(torch.ones(()))
    loaded = by_core(clean, lora_on(clean, every=9)[1])
    loaded.add_patches({"diffusion_model.extra.gain": (torch.ones(()),)}, 0.5)
    assert "diffusion_model.extra.gain is a single number" in baked(loaded).report
