"""The table of what core's loaders misread equals what the running host does, for every family with every option."""

import itertools

import pytest
import torch
from comfy.lora import calculate_weight, load_lora

from lora_loom.kernels.adapter import Options
from lora_loom.kernels.core_reads import FAILS, FAULTS, LEFT_OUT, WRONG, fault_of, rewritten, warnings
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import FAMILIES, make_adapter
from lora_loom.kernels.writing import to_tensors

KERNELS = {"linear": (), "conv1x1": (1, 1), "conv1d": (3,), "conv2d": (3, 3), "conv3d": (2, 3, 2)}
DORA = ({"dora": "output"}, {"dora": "input"}, {"dora": "input", "tucker": True})
OPTIONS = {
    "LoRA": ({}, {"tucker": True}, {"rank_stabilised": True}, *DORA),
    "DyLoRA": ({"unit": 2}, {"tucker": True}, {"rank_stabilised": True}),
    "LoRA-FA": ({}, {"tucker": True}, {"rank_stabilised": True}),
    "LoHa": ({}, {"tucker": True}, {"rank_stabilised": True}, *DORA),
    "LoKr": (
        {}, {"factor": 1}, {"factor": 1, "tucker": True}, {"factor": 2, "rank": 1, "tucker": True},
        {"rank": 1, "decompose_both": True}, {"full_rank": True}, {"rank": 1, "rank_stabilised": True}, *DORA,
        {"factor": 1, **DORA[2]}, {"factor": 2, "rank": 1, **DORA[2]},
        {"factor": 2, "rank": 1, "tucker": True, "decompose_both": True},
    ),
    "full": ({}, {"bias": True}),
    "OFT": ({"block_size": 4}, {"block_size": 4, "constraint": 0.01}, {"block_size": 4, "rescale": True}),
    "BOFT": ({"block_size": 4}, {"block_size": 4, "constraint": 0.01}, {"block_size": 4, "rescale": True}),
    "OFTv2": ({"block_size": 4},),
    "IA3": ({}, {"on_input": True}),
    "GLoRA": ({}, {"rank_stabilised": True}),
}  # fmt: skip
CASES = [(family, options, kernel) for family, many in OPTIONS.items() for options in many for kernel in KERNELS]
STRENGTHS = (1.0, 0.5, -0.7)


def test_every_family_and_option_is_tried():
    assert OPTIONS.keys() == {name for name, row in FAMILIES.items() if row.trainable}
    for name, many in OPTIONS.items():
        tried = set().union(*(options.keys() for options in many)) | {"rank", "alpha"}
        assert tried >= FAMILIES[name].options, name


def trained(family, options, kernel, outputs=16, inputs=12):
    """(adapter with every number random, weight, bias)."""
    draws = torch.Generator().manual_seed(sum(map(ord, f"{family} {options} {kernel}")))
    shape = (outputs, inputs, *KERNELS[kernel])
    weight = torch.randn(shape, generator=draws)
    fresh = make_adapter(family, shape, Options(**{"rank": 4, "alpha": 2.0} | options), draws, weight)
    numbers = {name: t + 0.3 * torch.randn(t.shape, generator=draws) for name, t in fresh.tensors.items()}
    return fresh.with_tensors(numbers), weight, torch.randn(outputs, generator=draws)


def by_the_host(tensors, weight, bias, strength):
    """What core's loader makes of the layer of a file; None where it raises."""
    try:
        patches = load_lora(dict(tensors), {"layer": "layer.weight"}, False)
        return [
            calculate_weight([(strength, patches[key], 1.0, None, None)] if key in patches else [], own.clone(), key)
            for key, own in (("layer.weight", weight), ("layer.bias", bias))
        ]
    except (RuntimeError, IndexError):
        return None


def outcome(adapter, weight, bias, tensors=None):
    """None where core gives W + s (W' − W) at every strength, to 1e-4 of the difference."""
    tensors = to_tensors(LoRAFile({"layer": adapter})) if tensors is None else tensors
    found = set()
    for strength in STRENGTHS:
        wanted = adapter.merged(weight, strength), adapter.merged_bias(bias, strength)
        got = by_the_host(tensors, weight, bias, strength)
        if got is None:
            found.add(FAILS)
        elif torch.equal(got[0], weight):
            found.add(LEFT_OUT)
        else:
            error = max((g - w).norm() / (w - own).norm().clamp_min(1e-6)
                        for g, w, own in zip(got, wanted, (weight, bias), strict=True))
            found |= {WRONG} if error > 1e-4 else set()
    return next((kind for kind in (FAILS, WRONG, LEFT_OUT) if kind in found), None)


@pytest.mark.parametrize("family, options, kernel", CASES, ids=str)
def test_the_table_equals_the_host(family, options, kernel):
    adapter, weight, bias = trained(family, options, kernel)
    fault = fault_of(adapter)
    assert (fault.outcome if fault else None) == outcome(adapter, weight, bias)


def test_full_rank_glora():
    adapter, weight, bias = trained("GLoRA", {"rank": 8}, "linear", 8, 8)
    assert fault_of(adapter).name == "GLoRA of full rank" and outcome(adapter, weight, bias) == WRONG


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.dora])
def test_dora_per_input_of_one_output(family):
    """As Krea 2 has such a layer."""
    adapter, weight, bias = trained(family, {"dora": "input", "rank": 1}, "linear", 1, 12)
    assert fault_of(adapter).name == "DoRA per input on layers of one output"
    assert outcome(adapter, weight, bias) == WRONG
    file, _ = rewritten(LoRAFile({"layer": adapter}), lambda path: weight)
    assert fault_of(file.adapters["layer"]) is None and outcome(adapter, weight, bias, to_tensors(file)) is None


def test_every_row_of_the_table_is_met():
    met = {fault.name for family, options, kernel in CASES if (fault := fault_of(trained(family, options, kernel)[0]))}
    assert {fault.name for fault in FAULTS} - met == {
        "BOFT of PEFT", "GLoRA of full rank", "DoRA per input on layers of one output"  # of others' files or few layers
    }  # fmt: skip


MISREAD = [case for case in CASES if fault_of(trained(*case)[0])]


@pytest.mark.parametrize("family, options, kernel", MISREAD, ids=str)
def test_what_is_rewritten_is_read_right(family, options, kernel):
    """By core at every strength, and by our own reader."""
    adapter, weight, bias = trained(family, options, kernel)
    file, notes = rewritten(LoRAFile({"layer": adapter}), lambda path: weight)
    assert fault_of(file.adapters["layer"]) is None and len(notes) == 1 and "written for ComfyUI's own" in notes[0]
    tensors = to_tensors(file)
    assert outcome(adapter, weight, bias, tensors) is None
    (again,) = read_lora(tensors, {"layer": weight.shape}).adapters.values()
    torch.testing.assert_close(again.merged(weight), adapter.merged(weight), rtol=1e-4, atol=1e-4)


def test_full_rank_glora_is_rewritten():
    adapter, weight, bias = trained("GLoRA", {"rank": 8}, "linear", 8, 8)
    file, _ = rewritten(LoRAFile({"layer": adapter}), None)
    assert outcome(adapter, weight, bias, to_tensors(file)) is None


def test_what_needs_no_weights_takes_none():
    for family, options, kernel in MISREAD:
        adapter, _, _ = trained(family, options, kernel)
        needs = family in ("IA3", "OFT", "BOFT", "OFTv2") or options.get("dora") == "output"
        if needs:
            with pytest.raises(ValueError, match="layer: what .* does depends on the weights; connect the MODEL"):
                rewritten(LoRAFile({"layer": adapter}), None)
        else:
            rewritten(LoRAFile({"layer": adapter}), None)


def test_a_difference_of_small_rank_becomes_a_lora():
    """One rotated block of many: a LoRA of its rank; a difference of full rank is dense."""
    adapter, weight, bias = trained("OFT", {"block_size": 4}, "linear", 64, 48)
    blocks = adapter.blocks.clone()
    blocks[1:] = 0
    few = adapter.with_tensors({"oft_blocks": blocks})
    file, (note,) = rewritten(LoRAFile({"layer": few}), lambda path: weight)
    small = file.adapters["layer"]
    assert isinstance(small, LoRA) and small.rank == adapter.blocks.shape[-1] and "1 layers as LoRA" in note
    torch.testing.assert_close(small.merged(weight), few.merged(weight), rtol=1e-5, atol=1e-5)
    assert isinstance(rewritten(LoRAFile({"layer": adapter}), lambda path: weight)[0].adapters["layer"], Full)


def test_what_core_reads_stays_and_nothing_is_said():
    adapters = {"a": trained("LoRA", {}, "linear")[0], "b": trained("full", {}, "linear")[0]}
    file = LoRAFile(adapters)
    assert rewritten(file, None) == (file, []) and warnings(adapters.values()) == []


def test_warnings_count_layers():
    pairs = itertools.chain([("LoRA", {}), ("IA3", {})], [("LoRA", {"dora": "output"})] * 2)
    told = warnings(trained(family, options, "linear")[0] for family, options in pairs)
    assert [line.split(":")[0] for line in told] == [
        "ComfyUI's own LoRA loaders misread (IA)³ (1 layers)",
        "ComfyUI's own LoRA loaders misread DoRA per output (2 layers)",
    ]
