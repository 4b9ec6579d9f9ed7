"""Our loader gives every family its effect, also those that the host's own misreads or does not know."""

import logging

import pytest
import torch
from comfy.lora import calculate_weight

import tiny
from applying import random_adapter
from lora_loom.host.apply import Strengths, apply_lora
from lora_loom.kernels.compose import Sum
from lora_loom.kernels.dora import DoRA
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.writing import to_tensors
from lora_loom.training.settings import ALGORITHMS

CASES = [
    *((name, {}) for name in ALGORITHMS),
    *((name, {"dora": axis}) for name in ("LoRA", "LoHa", "LoKr") for axis in ("output", "input")),
    ("OFT", {"constraint": 0.01, "rescale": True}),
    ("BOFT", {"constraint": 0.01, "rescale": True}),
    ("LoKr", {"tucker": True, "factor": 2, "rank": 1}),
    ("IA3", {"on_input": True}),
]


def lora_for(patcher, family, options):
    state, adapters = patcher.model.state_dict(), {}
    for number, target in enumerate(select_targets(patcher.model, "full", True)[1:-1:9]):
        weight = state[f"{target.path}.weight"].float()
        adapters[target.path] = random_adapter(family, target.shape, options, weight, number)
    return adapters, to_tensors(LoRAFile(adapters, names=NameTable.of(patcher.model)))


def weight_in(patcher, key):
    """As the host computes with it."""
    patcher.patch_model(device_to=torch.device("cpu"))
    try:
        return patcher.model.state_dict()[key].clone()
    finally:
        patcher.unpatch_model(device_to=torch.device("cpu"))


@pytest.mark.parametrize("family, options", CASES, ids=str)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_every_family(name, family, options, caplog):
    patcher = tiny.tiny(name)
    adapters, lora = lora_for(patcher, family, options)
    before = {path: patcher.model.state_dict()[f"{path}.weight"].clone() for path in adapters}
    for strength in (1.0, -0.5):
        with caplog.at_level(logging.WARNING):
            model, _, applied = apply_lora(patcher, None, lora, Strengths.of(strength))
            assert not applied.unplaced and applied.model_weights >= len(adapters)
            path = list(adapters)[len(adapters) // 2]
            got = weight_in(model, f"{path}.weight")
        assert not caplog.records
        wanted = adapters[path].merged(before[path], strength)
        assert (got - wanted).norm() <= 1e-4 * (wanted - before[path]).norm() + 1e-6 * wanted.norm()
    assert all(torch.equal(patcher.model.state_dict()[f"{path}.weight"], weight) for path, weight in before.items())


def test_two_loras_one_behind_the_other():
    patcher = tiny.tiny("sd15")
    adapters, lora = lora_for(patcher, "IA3", {})
    first, _, _ = apply_lora(patcher, None, lora, Strengths.of(0.5))
    both, _, _ = apply_lora(first, None, lora)
    path = next(iter(adapters))
    weight = patcher.model.state_dict()[f"{path}.weight"].clone()
    wanted = adapters[path].merged(weight, 1.5)  # each of them sees the weight as it is without any
    torch.testing.assert_close(weight_in(both, f"{path}.weight"), wanted)
    torch.testing.assert_close(weight_in(first, f"{path}.weight"), adapters[path].merged(weight, 0.5))


def test_text_encoders():
    clip = tiny.tiny_clip()
    table = NameTable.of(clip.cond_stage_model)
    path = next(path for path in table.text.paths if path.endswith("fc1"))
    weight = clip.cond_stage_model.state_dict()[f"{path}.weight"].clone()
    adapter = random_adapter("LoRA", weight.shape, {"dora": "output"}, weight, 1)
    assert isinstance(adapter, DoRA)
    lora = to_tensors(LoRAFile({path: adapter}, names=table))
    _, with_it, applied = apply_lora(tiny.tiny("sd15"), clip, lora, Strengths.of(1.0, 0.5))
    assert applied.clip_weights == 1 and not applied.unplaced
    key = f"{path}.weight"
    got = calculate_weight(with_it.patcher.patches[key], weight.float(), key)
    torch.testing.assert_close(got, adapter.merged(weight.float(), 0.5), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "family, options, dialect",
    [
        ("LoRA", {"dora": "output"}, "diffusers"),
        ("LoRA", {"dora": "output"}, "lycoris"),
        ("LoRA", {"dora": "output"}, "peft"),
        ("IA3", {}, "lycoris"),
        ("OFTv2", {}, "peft"),
    ],
)
def test_fused_layers_that_a_file_has_in_parts(family, options, dialect):
    """Query, key and value each with an adapter of its own: together what the host would misread one by one."""
    patcher = tiny.tiny("flux")
    state = {key: weight.clone() for key, weight in patcher.model.state_dict().items()}
    names, adapters = NameTable.of(patcher.model), {}
    for number, target in enumerate(select_targets(patcher.model, "attention", False)):
        weight = state[f"{target.path}.weight"]
        adapters[target.path] = random_adapter(family, target.shape, options, weight, number)
    lora = to_tensors(LoRAFile(adapters, names=names), dialect)
    assert any(isinstance(adapter, Sum) for adapter in read_lora(lora, names).adapters.values())
    model, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.7))
    assert not applied.unplaced
    for path, adapter in adapters.items():
        weight = state[f"{path}.weight"]
        wanted = adapter.merged(weight, 0.7)
        assert (weight_in(model, f"{path}.weight") - wanted).norm() <= 1e-4 * (wanted - weight).norm(), path


def test_peft_scales_biases_too():
    patcher = tiny.tiny("sd15")
    target = next(t for t in select_targets(patcher.model, "full", False) if t.kind == "linear")
    layer = patcher.model.get_submodule(target.path)
    assert layer.bias is not None
    factors = torch.linspace(0.5, 2, target.shape[0])[:, None]
    model, _, applied = apply_lora(patcher, None, {f"{target.path}.ia3_l": factors})
    assert applied.model_weights == 2
    torch.testing.assert_close(weight_in(model, f"{target.path}.bias"), layer.bias * factors.flatten())
    torch.testing.assert_close(weight_in(model, f"{target.path}.weight"), layer.weight * factors)
