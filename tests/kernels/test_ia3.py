"""(IA)³: values against LyCORIS and PEFT, biases, which side a file means."""

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, LAYERS, Case, Lent, build, randomised, with_weight
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.ia3 import IA3, PeftIA3
from lora_loom.kernels.registry import read_adapter

run_host.prepare_imports()  # the references import torchvision, which may need its operators declared first

import peft  # noqa: E402
from lycoris.modules.ia3 import IA3Module  # noqa: E402

IA3_CASES = [case for case in CASES if case.family == "IA3"]
# conv1d is unknown to peft
PEFT_LAYERS = ("linear", "linear 3-D", "conv2d", "conv2d strided", "conv2d dilated", "conv1x1", "conv3d")


@pytest.mark.parametrize("strength", (1.0, 0.5, -0.7))
@pytest.mark.parametrize("case", [case for case in IA3_CASES if "grouped" not in case.layer], ids=str)
def test_output_equals_lycoris(case, strength):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight, strength), x)
    branch = adapter.branch(x, module(x), Lent(module), strength)
    reference = IA3Module("layer", module, strength, train_on_input=case.options.on_input).to(x.dtype)
    assert reference.weight.shape == adapter.tensors["weight"].shape
    with torch.no_grad():
        reference.weight.copy_(adapter.tensors["weight"])
        reference.apply_to()
        expected = module(x)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("strength", (1.0, 0.5, -0.7))
@pytest.mark.parametrize("case", IA3_CASES, ids=str)
def test_merged_equals_the_closed_form(case, strength):
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    vector = 1 + strength * adapter.tensors["weight"].flatten()
    subscripts = "oi...,i->oi..." if case.options.on_input else "oi...,o->oi..."
    expected = torch.einsum(subscripts, module.weight, vector)
    torch.testing.assert_close(adapter.merged(module.weight, strength), expected, rtol=1e-9, atol=1e-11)


def peft_case(name, feedforward):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module, x = make().double().requires_grad_(False), torch.randn(shape, dtype=torch.float64)
    outputs, inputs, *kernel = module.weight.shape
    count = inputs if feedforward else outputs
    sizes = (1, count, *(1 for _ in kernel)) if kernel else (1, count) if feedforward else (count, 1)
    factors = 1 + 0.3 * torch.randn(sizes, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return module, x, factors


@pytest.mark.parametrize("feedforward", (False, True))
@pytest.mark.parametrize("name", PEFT_LAYERS)
def test_pefts_files_give_pefts_output(name, feedforward):
    module, x, factors = peft_case(name, feedforward)
    adapter, left = read_adapter({"ia3_l": factors}, module.weight.shape)
    assert isinstance(adapter, PeftIA3) and not left and adapter.on_input == feedforward
    bias = adapter.merged_bias(module.bias)
    merged = with_weight(module, adapter.merged(module.weight), x, bias)
    results = [adapter.branch(x, module(x), Lent(module)), adapter.on(x, Lent(module)), merged]
    config = peft.IA3Config(target_modules=["layer"], feedforward_modules=["layer"] if feedforward else [])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": module}))["layer"].double()
    assert layer.ia3_l["default"].shape == factors.shape
    with torch.no_grad():
        layer.ia3_l["default"].copy_(factors)
        expected = layer(x)
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("feedforward", (False, True))
@pytest.mark.parametrize("name", ("linear", "conv2d"))
def test_gradients_of_pefts(name, feedforward):
    module, x, factors = peft_case(name, feedforward)

    def on(x, factors):
        return read_adapter({"ia3_l": factors}, module.weight.shape)[0].on(x, Lent(module))

    assert torch.autograd.gradcheck(on, (x.requires_grad_(), factors.requires_grad_()))


@pytest.mark.parametrize("feedforward", (False, True))
@pytest.mark.parametrize("name", ("linear", "conv2d"))
def test_pefts_files_without_a_target(name, feedforward):
    """Of convolutions only the layer can tell what is scaled."""
    module, x, factors = peft_case(name, feedforward)
    told, _ = read_adapter({"ia3_l": factors}, module.weight.shape)
    untold, _ = read_adapter({"ia3_l": factors}, None)
    assert untold.state().keys() == {"ia3_l"}
    torch.testing.assert_close(untold.merged(module.weight, 0.5), told.merged(module.weight, 0.5))
    torch.testing.assert_close(untold.merged_bias(module.bias, 0.5), told.merged_bias(module.bias, 0.5))
    torch.testing.assert_close(untold.on(x, Lent(module)), told.on(x, Lent(module)))


def test_the_outputs_are_meant_where_a_convolution_does_not_tell():
    adapter, _ = read_adapter({"ia3_l": torch.full((1, 3, 1, 1), 2.0)}, (3, 3, 2, 2))
    assert adapter.on_input is False


def test_pefts_factors_are_limited_around_one():
    adapter, _ = read_adapter({"ia3_l": torch.tensor([[4.0], [1.0], [-3.0]])}, (3, 2))
    assert adapter.norm() == pytest.approx(5)
    assert not adapter.limit_norm(6) and adapter.limit_norm(2.5)
    assert adapter.tensors["ia3_l"].flatten().tolist() == pytest.approx([2.5, 1.0, -1.0])


@pytest.mark.parametrize("on_input", (False, True))
def test_only_one_side_is_kept(on_input):
    module, adapter, x = build(Case("IA3", "linear", Options(on_input=on_input)))
    adapter.tensors["weight"].requires_grad_()
    sizes = {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        adapter.on(x.requires_grad_(), Lent(module))
    assert sorted(sizes.values()) == sorted([(5, 8), (8,)] if on_input else [(5, 12), (12,)])


def test_state_tells_the_side():
    for on_input in (False, True):
        adapter = IA3.create((4, 6, 3, 3), Options(on_input=on_input), torch.Generator())
        state = adapter.state()
        assert state["on_input"].item() == int(on_input) and state["weight"].shape == (1, 6 if on_input else 4, 1, 1)
        assert not state["weight"].any()


@pytest.mark.parametrize(
    "parts, message",
    (
        ({"on_input": torch.tensor(0)}, "weight is missing"),
        ({"weight": torch.zeros(3), "on_input": torch.tensor(1)}, "3 factors, the layer 4 outputs and 6 inputs"),
        ({"ia3_l": torch.zeros(3)}, "not one number per channel"),
        ({"ia3_l": torch.zeros(2, 3)}, "not one number per channel"),
        ({"ia3_l": torch.zeros(1, 3, 1, 1)}, "3 factors"),
    ),
)
def test_broken_files_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        read_adapter(parts, (4, 6))
