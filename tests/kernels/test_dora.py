"""DoRA: against closed forms, LyCORIS (both axes, every inner family) and peft (gradients too); spellings; no eps."""

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, Case, Lent, build, kept_for_backward, randomised, with_weight
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.dora import DoRA
from lora_loom.kernels.lora import DOWN, UP
from lora_loom.kernels.registry import make_adapter, read_adapter

run_host.prepare_imports()

import peft  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402
from lycoris.modules.loha import LohaModule  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402

LYCORIS = {"LoRA": LoConModule, "LoHa": LohaModule, "LoKr": LokrModule}
DORA_CASES = [case for case in CASES if case.options.dora]
every_case = pytest.mark.parametrize("case", DORA_CASES, ids=str)
STRENGTHS = (1.0, 0.5, -0.7)


def direction(adapter, weight):
    """V = W + ΔW."""
    inner = adapter.inner
    if inner.name != "LoRA":
        return weight + inner.delta()  # compared with references in the family's own tests
    up, down = inner.up.flatten(1), inner.down
    if inner.mid is None:
        return weight + inner.scale * torch.einsum("or,ri...->oi...", up, down)
    return weight + inner.scale * torch.einsum("op,pq...,qi->oi...", up, inner.mid, down.flatten(1))


def closed_form(adapter, weight):
    """m ∘ V / ‖V‖ of which ‖V‖ is a constant."""
    moved, axis = direction(adapter, weight), 0 if adapter.magnitude.shape[0] == len(weight) else 1
    norms = moved.square().sum([dim for dim in range(moved.ndim) if dim != axis], keepdim=True).sqrt()
    return adapter.magnitude * moved / norms.detach()


def test_every_dora_family_is_tried_on_both_axes():
    tried = {(case.family, case.options.dora) for case in DORA_CASES}
    assert tried == {(family, axis) for family in LYCORIS for axis in ("output", "input")}


@every_case
def test_merged_weight_is_the_closed_form(case):
    module, adapter, _ = build(case)
    adapter, weight = randomised(adapter), module.weight
    assert adapter.axis == ("output", "input").index(case.options.dora)
    expected = closed_form(adapter, weight)
    for strength in STRENGTHS:
        straight = weight + strength * (expected - weight)
        torch.testing.assert_close(adapter.merged(weight, strength), straight, rtol=1e-9, atol=1e-11)


@every_case
def test_gradients_are_those_of_the_closed_form(case):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    inputs = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in adapter.parameters())]
    expected = with_weight(module, closed_form(adapter, module.weight), x)
    weight = torch.linspace(-1, 1, expected.numel(), dtype=x.dtype).view(expected.shape)
    wanted = torch.autograd.grad(expected, inputs, weight)
    for way in (adapter.on(x, Lent(module)), adapter.branch(x, module(x), Lent(module))):
        for got, want in zip(torch.autograd.grad(way, inputs, weight), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def lycoris(case, module, adapter, multiplier=1.0):
    """LyCORIS' module with the adapter's values, on the layer."""
    options = case.options
    extra = {"use_tucker": options.tucker}
    if case.family == "LoKr":
        extra |= {"factor": options.factor, "decompose_both": options.decompose_both, "full_matrix": options.full_rank}
    wd = {"weight_decompose": True, "wd_on_out": options.dora == "output"}
    network = LYCORIS[case.family]("layer", module, multiplier, options.rank, options.alpha, **wd, **extra)
    network = network.to(module.weight.dtype)
    values = dict(network.named_parameters())
    assert values.keys() == adapter.tensors.keys()
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            values[name].copy_(tensor.view(values[name].shape))
    return network


@pytest.mark.parametrize("case", [case for case in DORA_CASES if "grouped" not in case.layer], ids=str)
def test_output_equals_lycoris(case):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    ours = adapter.branch(x, module(x), Lent(module)), with_weight(module, adapter.merged(module.weight), x)
    network = lycoris(case, module, adapter)
    network.apply_to()
    for output in ours:
        torch.testing.assert_close(output, module(x), rtol=1e-6, atol=1e-8)


def test_strength_nought_is_the_base_where_lycoris_keeps_the_direction():
    """functional/general.py: the multiplier acts on m / ‖V‖ − 1 alone; W + ΔW is what remains at 0."""
    case = Case("LoRA", "linear", Options(2, 1.5, dora="output"))
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    theirs, _ = lycoris(case, module, adapter).get_merged_weight(multiplier=0)
    torch.testing.assert_close(theirs, direction(adapter, module.weight))
    assert torch.equal(adapter.merged(module.weight, 0.0), module.weight)
    assert (theirs - module.weight).norm() > 0.1 * module.weight.norm()


@pytest.mark.parametrize("name", ("linear", "linear 3-D", "conv2d", "conv2d strided"))
def test_outputs_and_gradients_equal_pefts(name):
    module, adapter, x = build(Case("LoRA", name, Options(3, 2.0, dora="output")))
    adapter, lent = randomised(adapter), Lent(module)
    config = peft.LoraConfig(r=3, lora_alpha=2.0, use_dora=True, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": module}))["layer"]
    theirs = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    theirs.append(layer.lora_magnitude_vector["default"].weight)
    ours = [adapter.inner.down, adapter.inner.up, adapter.magnitude]
    with torch.no_grad():
        layer.to(x.dtype)
        for their, our in zip(theirs, ours, strict=True):
            their.copy_(our.view(their.shape))
    for tensor in (*theirs, *ours):
        tensor.requires_grad_()
    results = []
    for run, tensors in ((layer, theirs), (lambda x: adapter.on(x, lent), ours)):
        leaf = x.detach().requires_grad_()
        y = run(leaf)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append((y, *torch.autograd.grad(y, [leaf, *tensors], weight)))
    for their, our in zip(*results, strict=True):
        torch.testing.assert_close(our.flatten(), their.flatten(), rtol=1e-6, atol=1e-8)
    again, left = read_adapter(
        {DOWN: theirs[0], UP: theirs[1], "lora_magnitude_vector": theirs[2], "alpha": torch.tensor(2.0)},
        module.weight.shape,
    )
    assert not left
    torch.testing.assert_close(again.merged(module.weight), adapter.merged(module.weight))


@pytest.mark.parametrize("shape", ((6, 4), (5, 5), (6, 4, 3, 3), (1, 4), (4, 1)), ids=str)
def test_spellings_of_the_norms(shape):
    """The tensor's own shape tells the axis; a vector is per output, also where host and weight are square."""
    out_features, in_features, *kernel = shape
    ones, weight = [1] * len(kernel), torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pair = {DOWN: torch.randn(2, in_features, *kernel), UP: torch.randn(out_features, 2, *ones)}
    scale = torch.rand(out_features) + 0.5
    spelt = {
        "dora_scale": scale.view(-1, 1, *ones),
        "lora_magnitude_vector": scale,
        "lora_magnitude_vector.weight": scale.view(1, -1, *ones) if kernel else scale,
        "magnitude": scale,
    }
    adapters = [read_adapter({**pair, name: tensor}, shape) for name, tensor in spelt.items()]
    adapters.append(read_adapter({**pair, "dora_scale": scale}, shape))  # kohya-like files with a vector
    for adapter, left in adapters:
        assert not left and adapter.axis == 0
        assert torch.equal(adapter.merged(weight), adapters[0][0].merged(weight))
        assert adapter.state()["dora_scale"].shape == (out_features, 1, *ones)
    per_input, _ = read_adapter({**pair, "dora_scale": torch.rand(1, in_features, *ones) + 0.5}, shape)
    assert per_input.axis == 1
    with pytest.raises(ValueError, match="no axis"):
        read_adapter({**pair, "dora_scale": torch.rand(7, *ones, 1)}, shape)


def test_a_square_weight_is_no_riddle():
    torch.manual_seed(0)
    weight, pair = torch.randn(5, 5), {DOWN: torch.randn(2, 5), UP: torch.randn(5, 2)}
    scale = torch.rand(5) + 0.5
    moved = weight + pair[UP] @ pair[DOWN]
    per_output, _ = read_adapter({**pair, "dora_scale": scale[:, None]}, None)
    per_input, _ = read_adapter({**pair, "dora_scale": scale[None]}, None)
    torch.testing.assert_close(per_output.merged(weight), scale[:, None] * moved / moved.norm(dim=1, keepdim=True))
    torch.testing.assert_close(per_input.merged(weight), scale[None] * moved / moved.norm(dim=0, keepdim=True))


def test_what_cannot_be_taken_apart_is_refused():
    draws, weight = torch.Generator(), torch.zeros(6, 4)
    with pytest.raises(ValueError, match="DyLoRA has no norms to learn apart; LoRA, "):
        make_adapter("DyLoRA", (6, 4), Options(2, dora="output"), draws, weight)
    with pytest.raises(ValueError, match="weight, which is not given"):
        make_adapter("LoRA", (6, 4), Options(2, dora="output"), draws)
    with pytest.raises(ValueError, match="dora is 'rows', expected one of output, input"):
        make_adapter("LoRA", (6, 4), Options(2, dora="rows"), draws, weight)
    pair, scale = {DOWN: torch.zeros(2, 4), UP: torch.zeros(6, 2)}, torch.ones(6, 1)
    loha = {f"hada_{name}": torch.zeros(6, 2) if name[-1] == "a" else torch.zeros(2, 4)
            for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    with pytest.raises(ValueError, match="dora_scale cannot be the norms of LoRA / LoCon, LoHa together"):
        read_adapter({**pair, **loha, "dora_scale": scale}, (6, 4))
    with pytest.raises(ValueError, match="dora_scale and magnitude cannot be"):
        read_adapter({**pair, "dora_scale": scale, "magnitude": scale}, (6, 4))
    _, left = read_adapter({"diff": torch.ones(6, 4), "dora_scale": scale}, (6, 4))
    assert left == {"dora_scale"}  # named to the user, not applied in silence
    other, _ = read_adapter({**pair, "dora_scale": scale}, None)
    with pytest.raises(ValueError):
        other.merged(torch.zeros(7, 4))


@pytest.mark.parametrize("axis", ("output", "input"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_fresh_adapter_starts_from_the_norms(axis, dtype):
    """Norms in float32 or wider whatever the weight's dtype; the layer as it was, to the last bit."""
    torch.manual_seed(0)
    module = nn.Linear(40, 30).to(dtype).requires_grad_(False)
    adapter = make_adapter("LoRA", (30, 40), Options(4, dora=axis), torch.Generator(), module.weight)
    assert adapter.magnitude.dtype == torch.float32
    assert adapter.magnitude.shape == ((30, 1) if axis == "output" else (1, 40))
    dim = 1 if axis == "output" else 0
    torch.testing.assert_close(adapter.magnitude, module.weight.float().norm(dim=dim, keepdim=True))
    assert torch.equal(adapter.merged(module.weight), module.weight)
    x = torch.randn(3, 40, dtype=dtype)
    assert torch.equal(adapter.on(x, Lent(module)), module(x))
    assert adapter.fast_parameters() == [adapter.inner.up]


@pytest.mark.parametrize("axis", ("output", "input"))
def test_rows_of_zeros_stay_finite_and_can_be_trained(axis):
    """No eps anywhere; what has no direction keeps the factor 1, so that its first step is not lost."""
    torch.manual_seed(0)
    module = nn.Linear(6, 6).requires_grad_(False)
    module.weight[2], module.weight[:, 3] = 0, 0
    adapter = make_adapter("LoRA", (6, 6), Options(2, dora=axis), torch.Generator().manual_seed(1), module.weight)
    adapter.inner.down[:, 3] = 0  # and so does the sum have no direction there
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    x = torch.randn(4, 6, requires_grad=True)
    y = adapter.on(x, Lent(module))
    torch.testing.assert_close(y, module(x))
    gradients = dict(zip(adapter.tensors, torch.autograd.grad(y.square().sum(), adapter.parameters()), strict=True))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert gradients[UP][2].any()
    assert adapter.merged(module.weight).isfinite().all()


def test_norms_follow_the_weight():
    """Another weight under the same layer, as after a host's re-patching: nothing remembered may survive it."""
    module, adapter, x = build(Case("LoRA", "linear", Options(2, 1.5, dora="output")))
    adapter, lent = randomised(adapter), Lent(module)
    adapter.on(x, lent)
    with torch.no_grad():
        module.weight[3].mul_(10)
    torch.testing.assert_close(adapter.on(x, lent), with_weight(module, adapter.merged(module.weight), x))


def test_norms_come_in_pieces_and_survive_cancellation():
    """Many pieces (more numbers than one holds), and ΔW ≈ −W, where a sum of squared terms would have no digit left."""
    draws = torch.Generator().manual_seed(0)
    up, down = torch.randn(700, 2, generator=draws), torch.randn(2, 1000, generator=draws)
    rest = 1e-3 * torch.randn(700, 1000, generator=draws)
    weight = rest - up @ down
    for axis in ("output", "input"):
        fresh = make_adapter("LoRA", weight.shape, Options(2, 2.0, dora=axis), draws, weight)
        adapter = fresh.with_tensors({DOWN: down, UP: up, "dora_scale": fresh.magnitude})
        assert len(list(adapter.inner.moved_rows(weight))) > 1
        exact = (weight.double() + up.double() @ down.double()).norm(dim=1 if axis == "output" else 0)
        torch.testing.assert_close(adapter.norms(weight).double(), exact, rtol=1e-3, atol=0)
        torch.testing.assert_close(fresh.norms(weight), fresh.magnitude.flatten(), rtol=0, atol=0)


@pytest.mark.parametrize("axis, kept", (("output", [(5, 8), (5, 12)]), ("input", [(5, 8), (5, 8)])))
def test_the_graph_keeps_no_weight(axis, kept):
    """Beside factors and vectors: the input, and the output before the norms or the input after them."""
    module, adapter, x = build(Case("LoRA", "linear", Options(3, 2.0, dora=axis)))
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    factors = {tensor.data_ptr() for tensor in adapter.tensors.values()}
    found = kept_for_backward(lambda: adapter.on(x.requires_grad_(), Lent(module)))
    wide = {(t.data_ptr(), tuple(t.shape)) for t in found if t.numel() > 12 and t.data_ptr() not in factors}
    # h is kept too where the rank is not small against the width, as of any LoRA
    assert sorted(shape for _, shape in wide if shape != (5, 3)) == kept


def test_the_inner_adapter_is_limited_and_saved():
    _, adapter, _ = build(Case("LoRA", "conv2d", Options(3, 2.0, dora="input")))
    adapter = randomised(adapter)
    before = adapter.magnitude.clone()
    assert adapter.limit_norm(adapter.norm().item() / 2)
    assert torch.equal(adapter.magnitude, before)
    assert isinstance(adapter, DoRA) and adapter.state().keys() == {DOWN, UP, "alpha", "dora_scale"}
