"""LoRA, LoCon, Tucker: values against peft and LyCORIS; what is kept for backward; how a fresh one is drawn."""

import math

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, Case, Lent, build, kept_for_backward, randomised, with_weight
from lora_loom.kernels.adapter import Dropout, Options
from lora_loom.kernels.frozen import frozen_linear
from lora_loom.kernels.lora import DOWN, DyLoRA, LoRA

run_host.prepare_imports()  # both references import torchvision, which may need its operators declared first

import peft  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402


def peft_output(module, adapter, x, strength):
    network = nn.ModuleDict({"layer": module})
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, network)["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.down)
        layer.lora_B["default"].weight.copy_(adapter.up)
        layer.scale_layer(strength)
        return layer(x)


def lycoris_output(module, adapter, x, strength):
    tucker = adapter.mid is not None
    locon = LoConModule("layer", module, strength, adapter.rank, adapter.alpha, use_tucker=tucker).to(x.dtype)
    with torch.no_grad():
        locon.lora_down.weight.copy_(adapter.down)
        locon.lora_up.weight.copy_(adapter.up)
        if tucker:
            locon.lora_mid.weight.copy_(adapter.mid)
        locon.apply_to()
        return module(x)


def references():
    for case in CASES:
        # neither reference knows grouped convolutions, and peft's branch leaves dilation and Tucker's core out
        if case.family != "LoRA" or case.options.dora or "grouped" in case.layer:
            continue
        yield case, lycoris_output
        if "dilated" not in case.layer and not case.options.tucker:
            yield case, peft_output


@pytest.mark.parametrize("strength", (1.0, 0.5, -0.7))
@pytest.mark.parametrize("case, oracle", references(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_output_equals_the_reference(case, oracle, strength):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight, strength), x)
    branch = adapter.branch(x, module(x), Lent(module), strength)
    expected = oracle(module, adapter, x, strength)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ("linear", "conv2d"))
def test_rank_stabilised_scale_equals_pefts(name):
    module, adapter, x = build(Case("LoRA", name, Options(4, 3.0, rank_stabilised=True)))
    adapter = randomised(adapter)
    expected = adapter.on(x, Lent(module))
    network = nn.ModuleDict({"layer": module})
    config = peft.LoraConfig(r=4, lora_alpha=3.0, use_rslora=True, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, network)["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.down)
        layer.lora_B["default"].weight.copy_(adapter.up)
        torch.testing.assert_close(expected, layer(x), rtol=1e-6, atol=1e-8)


def test_a_pointwise_adapter_fits_a_linear_weight():
    module, adapter, _ = build(Case("LoRA", "conv1x1", Options(3, 2.0)))
    adapter, flat = randomised(adapter), module.weight.detach().flatten(1)
    torch.testing.assert_close(adapter.merged(flat), adapter.merged(module.weight).flatten(1))
    again = LoRA.read(adapter.state(), flat.shape)
    torch.testing.assert_close(again.merged(flat), adapter.merged(flat))


@pytest.mark.parametrize("name", ("linear 3-D", "linear 4-D", "conv2d", "conv2d strided", "conv3d"))
def test_strided_inputs_and_gradients(name):
    """Permuted and channels-last tensors, as attention and the host's convolutions hand them on."""
    module, adapter, x = build(Case("LoRA", name, Options(3, 2.0)))
    adapter = randomised(adapter)
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    results = []
    for layout in ("contiguous", "permuted"):
        last = x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "permuted" else x.contiguous()
        assert last.is_contiguous() == (layout == "contiguous")
        last = last.detach().requires_grad_()
        y = adapter.on(last, Lent(module))
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        if layout == "permuted":
            weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
        results.append((y.detach(), *torch.autograd.grad(y, (last, *adapter.parameters()), weight)))
    for contiguous, permuted in zip(*results, strict=True):
        torch.testing.assert_close(contiguous, permuted)


def kept_shapes(run):
    return sorted(tuple(tensor.shape) for tensor in kept_for_backward(run))


@pytest.mark.parametrize("width, kept_too", ((64, []), (63, [(5, 2)])), ids=("narrow rank", "wide rank"))
def test_the_graph_keeps_the_input_and_no_weight(width, kept_too):
    """And the narrow product where it is not narrow."""
    layer = Lent(nn.Linear(width, 12))
    adapter = LoRA.create((12, width), Options(2, 2.0), torch.Generator().manual_seed(0))
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    x = torch.randn(5, width, requires_grad=True)
    factors = [tuple(tensor.shape) for tensor in adapter.parameters()]
    assert kept_shapes(lambda: adapter.on(x, layer)) == sorted([(5, width), *kept_too, *factors])
    assert kept_shapes(lambda: frozen_linear(x, layer)) == []


@pytest.mark.parametrize("name, narrow", (("linear", (5, 3)), ("conv2d", (2, 3, 5, 4))))
def test_lora_fa_keeps_the_narrow_product_only(name, narrow):
    module, adapter, x = build(Case("LoRA-FA", name, Options(3, 2.0)))
    assert [id(tensor) for tensor in adapter.parameters()] == [id(adapter.up)]
    adapter.up.requires_grad_()
    factors = [tuple(tensor.shape) for tensor in adapter.tensors.values()]
    assert kept_shapes(lambda: adapter.on(x.requires_grad_(), Lent(module))) == sorted([narrow, *factors])


def test_dylora_trains_a_random_prefix():
    """kohya's networks/dylora.py: ranks [b, b + unit) learn, those before act, and √(rank / active) scales."""
    module, adapter, x = build(Case("DyLoRA", "linear", Options(6, 3.0, unit=2)))
    adapter, seen = randomised(adapter), set()
    for seed in range(40):
        adapter.seed = seed
        first, end = adapter.active_ranks()
        seen.add(first)
        leaves = [tensor.detach().requires_grad_() for tensor in adapter.tensors.values()]
        y = adapter.with_tensors(dict(zip(adapter.tensors, leaves, strict=True))).on(x, Lent(module))
        expected = module(x) + 0.5 * math.sqrt(6 / end) * x @ adapter.down[:end].T @ adapter.up[:, :end].T
        torch.testing.assert_close(y, expected)
        down, up = torch.autograd.grad(y.sum(), leaves)
        assert {int(rank) for rank in down.any(1).nonzero()} <= set(range(first, end))
        assert {int(rank) for rank in up.any(0).nonzero()} == set(range(first, end))
    assert seen == {0, 2, 4}
    assert adapter.state().keys() == LoRA.read(adapter.state(), None).state().keys()
    with pytest.raises(ValueError, match="divisor of the rank"):
        DyLoRA(adapter.down, adapter.up, 1.0, unit=4)


def test_dropout_is_kohyas():
    """networks/lora.py: on the rank-sized product; rank dropout per sample; what stays is scaled up."""
    module, adapter, x = build(Case("LoRA", "linear 3-D", Options(4, 2.0)))
    adapter = randomised(adapter)
    hidden, base = x @ adapter.down.T, module(x)
    adapter.seed, adapter.dropout = 3, Dropout(rank=0.5)
    y = adapter.on(x, Lent(module)) - base
    masks = (y / 0.5) @ torch.linalg.pinv(adapter.up).T / hidden
    torch.testing.assert_close(masks, masks[:, :1].expand_as(masks))  # one mask per sample
    torch.testing.assert_close(masks.abs().clamp_max(1), (masks > 1).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(masks[masks > 1], torch.full_like(masks[masks > 1], 2.0))


@pytest.mark.parametrize("shape", ((5, 7), (6, 4, 3), (5, 3, 3, 3), (4, 3, 1, 1), (3, 2, 3, 3, 3)), ids=str)
def test_fresh_adapters(shape):
    def fresh(seed):
        return LoRA.create(shape, Options(64, 16.0), torch.Generator().manual_seed(seed))

    adapter, fan_in = fresh(3), math.prod(shape[1:])
    assert adapter.shape == shape and adapter.rank == 64 and adapter.scale == 0.25
    assert adapter.down.dtype == adapter.up.dtype == torch.float32
    assert not adapter.delta().any()
    bound = 1 / math.sqrt(fan_in)
    assert 0.9 * bound < adapter.down.abs().max() <= bound
    assert abs(adapter.down.mean()) < 4 * bound / math.sqrt(3 * adapter.down.numel())
    assert abs(adapter.down.std() / (bound / math.sqrt(3)) - 1) < 0.1
    assert torch.equal(adapter.down, fresh(3).down)
    assert not torch.equal(adapter.down, fresh(4).down)


def test_state_is_a_copy():
    _, adapter, _ = build(Case("LoRA", "conv2d", Options(3, 2.0)))
    adapter.down.requires_grad_()
    state = adapter.state()
    assert set(state) == {"lora_down.weight", "lora_up.weight", "alpha"} and state["alpha"].item() == 2.0
    assert torch.equal(state[DOWN], adapter.down) and state[DOWN].data_ptr() != adapter.down.data_ptr()


def test_factors_of_different_rank_are_refused():
    with pytest.raises(ValueError, match="rank 3 but lora_up has rank 2"):
        LoRA(torch.zeros(3, 5), torch.zeros(4, 2), 1.0)


@pytest.mark.parametrize("tucker", (False, True))
def test_the_fixed_factor_of_lora_fa_is_not_shrunk_either(tucker):
    adapter = randomised(build(Case("LoRA-FA", "conv2d", Options(3, 2.0, tucker=tucker)))[1])
    down, norm = adapter.down.clone(), adapter.norm().item()
    assert adapter.limit_norm(norm / 3)
    assert torch.equal(adapter.down, down)
    assert adapter.norm().item() == pytest.approx(norm / 3)
