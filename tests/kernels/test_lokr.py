"""LoKr: values against LyCORIS and peft; splits, scales, what files hold; what is kept for backward; how it starts."""

import itertools
import math

import pytest
import torch
from torch import nn

import run_host
from cases import CASES, LAYERS, Case, Lent, build, kept_for_backward, randomised, with_weight
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.lokr import T2, W1, W1_A, W1_B, W2, W2_A, W2_B, LoKr, split

run_host.prepare_imports()  # both references import torchvision, which may need its operators declared first

import peft  # noqa: E402
from lycoris.functional import factorization  # noqa: E402
from lycoris.modules.lokr import LokrModule  # noqa: E402
from peft.tuners.lokr.layer import factorization as pefts_split  # noqa: E402

STRENGTHS = (1.0, 0.5, -0.7)
OWN = [case for case in CASES if case.family == "LoKr" and not case.options.dora]


def lycoris_module(module, options, strength=1.0, **more):
    return LokrModule(
        "layer",
        module,
        strength,
        options.rank,
        options.alpha,
        use_tucker=options.tucker,
        factor=options.factor,
        decompose_both=options.decompose_both,
        full_matrix=options.full_rank,
        **more,
    ).to(module.weight.dtype)


def copied(reference, adapter):
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            getattr(reference, name).copy_(tensor)
    return reference


def lycoris_output(module, case, adapter, x, strength):
    with torch.no_grad():
        copied(lycoris_module(module, case.options, strength), adapter).apply_to()
        return module(x)


def peft_output(module, case, adapter, x, strength):
    full = not {W1_A, W2_A} & adapter.tensors.keys()
    config = peft.LoKrConfig(
        r=case.options.rank,
        alpha=case.options.rank if full else case.options.alpha,  # it scales full halves too
        target_modules=["layer"],
        use_effective_conv2d=case.options.tucker,
        decompose_both=case.options.decompose_both,
        decompose_factor=case.options.factor,
    )
    layer = peft.inject_adapter_in_model(config, nn.ModuleDict({"layer": module}))["layer"]
    with torch.no_grad():
        for name, tensor in adapter.tensors.items():
            factor = getattr(layer, name)["default"]
            factor.copy_(tensor.reshape(factor.shape))  # its cores of one-dimensional convolutions have a fourth one
        layer.scale_layer(strength)
        return layer(x)


def references():
    for case in OWN:
        yield case, lycoris_output
        # peft has nothing in three dimensions and no full_rank, puts the factor first even where it is the greater one,
        # and multiplies w1 (o, i) with w2 (o, i, k) as the host does: over the wrong axes
        _, adapter, _ = build(case)
        wrong = case.layer == "conv1d" and W2 in adapter.tensors
        same = all(split(d, case.options.factor) == pefts_split(d, case.options.factor) for d in adapter.shape[:2])
        if case.layer != "conv3d" and not case.options.full_rank and same and not wrong:
            yield case, peft_output


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("case, oracle", references(), ids=lambda value: getattr(value, "__name__", str(value)))
def test_output_equals_the_reference(case, oracle, strength):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight, strength), x)
    branch = adapter.branch(x, module(x), Lent(module), strength)
    expected = oracle(module, case, adapter, x, strength)
    torch.testing.assert_close(merged, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(branch, expected, rtol=1e-6, atol=1e-8)


def closed_form(adapter, shape):
    """s Σ w1[o₁, i₁] w2[o₂, i₂, k], written out."""
    t, rank = (
        adapter.tensors,
        next((len(adapter.tensors[name]) for name in (W2_B, W1_B) if name in adapter.tensors), None),
    )
    w1 = t[W1] if W1 in t else torch.einsum("or,ri->oi", t[W1_A], t[W1_B])
    if W2 in t:
        w2 = t[W2].flatten(2) if t[W2].ndim > 2 else t[W2][..., None]
    elif T2 in t:
        w2 = torch.einsum("po,pqk,qi->oik", t[W2_A], t[T2].flatten(2), t[W2_B])
    else:
        w2 = torch.einsum("or,rik->oik", t[W2_A], t[W2_B].unflatten(1, (-1, math.prod(shape[2:]))))
    return (adapter.alpha / rank if rank else 1.0) * torch.einsum("oi,pjk->opijk", w1, w2).reshape(shape)


@pytest.mark.parametrize("case", OWN, ids=str)
def test_delta_equals_the_closed_form(case):
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    expected = closed_form(adapter, module.weight.shape)
    torch.testing.assert_close(adapter.delta(), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(adapter.norm(), expected.norm(), rtol=1e-9, atol=1e-12)
    moved = torch.cat(list(adapter.moved_rows(module.weight))).view(expected.shape)
    torch.testing.assert_close(moved, module.weight + expected, rtol=1e-9, atol=1e-12)
    for strength in STRENGTHS:
        merged = module.weight + strength * expected
        torch.testing.assert_close(adapter.merged(module.weight, strength), merged, rtol=1e-9, atol=1e-12)


def test_dimensions_are_split_as_in_lycoris():
    for dimension, factor in itertools.product(
        (*range(1, 200), 320, 640, 1280, 3072, 5120, 12288), (*range(-1, 40), 64)
    ):
        assert split(dimension, factor) == factorization(dimension, factor)


GRID = [
    Options(rank, 3.0, tucker=tucker, factor=factor, decompose_both=both, full_rank=full)
    for rank, tucker, factor, both, full in itertools.product(
        (1, 2, 5, 40), (False, True), (-1, 1, 2, 8), *[(False, True)] * 2
    )
]


@pytest.mark.parametrize(
    "make",
    (
        lambda: nn.Linear(36, 24),
        lambda: nn.Conv1d(12, 20, 3),
        lambda: nn.Conv2d(24, 16, (3, 1)),
        lambda: nn.Conv2d(36, 24, 1),
        lambda: nn.Conv3d(24, 16, 3),
    ),
)
def test_fresh_adapters_have_lycoris_shapes_scale_and_zeros(make):
    module, forms = make(), set()
    for options in GRID:
        adapter = LoKr.create(module.weight.shape, options, torch.Generator().manual_seed(3))
        reference = lycoris_module(module, options)
        state, theirs = adapter.state(), reference.state_dict()
        assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in theirs.items()}
        assert adapter.scale == reference.scale
        if adapter.scale != 1.0:
            assert state["alpha"] == theirs["alpha"]
        for key in adapter.tensors:
            assert state[key].any() == theirs[key].any() and state[key].dtype == torch.float32
        zeros = [key for key in adapter.tensors if not state[key].any()]
        assert [id(t) for t in adapter.fast_parameters()] == [id(adapter.tensors[key]) for key in zeros]
        assert not adapter.delta().any() and adapter.delta().shape == module.weight.shape
        forms.add(frozenset(adapter.tensors))
    # either half full or in low rank, and w2 with a core; but w1 alone in low rank would be the larger half
    assert len(forms) == (3 if module.weight.shape[2:].numel() == 1 else 5)


def test_fresh_factors_spread_as_kaiming_says():
    options = Options(40, 1.0, factor=64, decompose_both=True, tucker=True)
    adapter = LoKr.create((64 * 200, 64 * 100, 3, 3), options, torch.Generator().manual_seed(3))
    fan_in = {W1: 64, W2_A: 200, T2: 40 * 9}
    assert adapter.tensors.keys() == {*fan_in, W2_B}
    for name, fan in fan_in.items():
        bound = 1 / math.sqrt(fan)
        assert 0.95 * bound < adapter.tensors[name].abs().max() <= bound
        assert abs(adapter.tensors[name].std() / (bound / math.sqrt(3)) - 1) < 0.1


def test_the_rank_is_that_of_the_half_in_low_rank():
    halves = {W1_A: torch.ones(6, 3), W1_B: torch.ones(3, 4), W2_A: torch.ones(9, 2), W2_B: torch.ones(2, 8)}
    alpha = {"alpha": torch.tensor(4.0)}
    assert LoKr.read(halves | alpha, (54, 32)).scale == 2.0  # w2's, as in the host
    full_w1 = {W1: torch.ones(6, 4), W2_A: halves[W2_A], W2_B: halves[W2_B]}
    assert LoKr.read(full_w1 | alpha, (54, 32)).scale == 2.0
    assert LoKr.read(full_w1, (54, 32)).scale == 1.0
    full_w2 = {W1_A: halves[W1_A], W1_B: halves[W1_B], W2: torch.ones(9, 8)}
    assert LoKr.read(full_w2 | alpha, (54, 32)).scale == 4.0 / 3
    assert LoKr.read({W1: torch.ones(6, 4), W2: torch.ones(9, 8)} | alpha, (54, 32)).scale == 1.0


@pytest.mark.parametrize("alpha", (math.inf, 9999999999.0, 0.0, 4.0))
def test_two_full_halves_have_no_alpha(alpha):
    """ai-toolkit writes 9999999999, infinite in half precision; newer hosts' branches are NaN then."""
    module, adapter, x = build(Case("LoKr", "linear", Options(2, 1.5, full_rank=True)))
    adapter = randomised(adapter)
    again = LoKr.read(adapter.state() | {"alpha": torch.tensor(alpha)}, module.weight.shape)
    torch.testing.assert_close(again.delta(), torch.kron(adapter.tensors[W1], adapter.tensors[W2]))
    torch.testing.assert_close(again.on(x, Lent(module)), adapter.on(x, Lent(module)))


def test_lycoris_trains_full_rank_stabilised_halves_at_a_scale_that_no_file_tells():
    """It trains at √rank and writes alpha = rank · √rank; reading with 1, as everybody does, its own effect is lost."""
    module, adapter, x = build(Case("LoKr", "linear", Options(4, 3.0, full_rank=True, rank_stabilised=True)))
    adapter = randomised(adapter)
    assert adapter.scale == 1.0
    ours = adapter.on(x, Lent(module)) - module(x)
    reference = copied(lycoris_module(module, Options(4, 3.0, full_rank=True), rs_lora=True), adapter)
    assert reference.scale == 2.0
    again = LoKr.read(reference.state_dict(), module.weight.shape)
    torch.testing.assert_close(again.delta(), adapter.delta())
    base = module(x)
    with torch.no_grad():
        reference.apply_to()
        torch.testing.assert_close(module(x) - base, 2.0 * ours)


def test_rank_stabilised_scale_equals_lycoris():
    options = Options(2, 3.0, factor=2, rank_stabilised=True)
    module, adapter, x = build(Case("LoKr", "linear", options))
    adapter = randomised(adapter)
    expected = adapter.on(x, Lent(module))
    reference = copied(lycoris_module(module, options, rs_lora=True), adapter)
    torch.testing.assert_close(reference.state_dict()["alpha"].float(), adapter.state()["alpha"])
    with torch.no_grad():
        reference.apply_to()
        torch.testing.assert_close(expected, module(x), rtol=1e-6, atol=1e-8)


def test_lycoris_scales_its_own_merged_weights_twice():
    """Its ``get_diff_weight``, and with it its merging; why its ``forward`` is the reference."""
    options = Options(2, 1.0, factor=2)
    module, adapter, _ = build(Case("LoKr", "linear", options))
    adapter = randomised(adapter)
    diff, _ = copied(lycoris_module(module, options), adapter).get_diff_weight(shape=module.weight.shape)
    torch.testing.assert_close(diff, 0.5 * adapter.delta())


# (o₁, i₁), (o₂, i₂): LyCORIS' unbalanced factorization swaps the outputs' pair; other programs swap anything
UNBALANCED = (((4, 2), (3, 4)), ((12, 2), (1, 4)), ((3, 8), (4, 1)), ((1, 1), (12, 8)))


@pytest.mark.parametrize("name", ("linear", "conv2d", "conv3d"))
@pytest.mark.parametrize("first, second", UNBALANCED)
@pytest.mark.parametrize("low_rank", (False, True))
def test_unbalanced_files_are_read(name, first, second, low_rank):
    make, kernel = {"linear": (nn.Linear, ()), "conv2d": (nn.Conv2d, (3, 3)), "conv3d": (nn.Conv3d, (3, 3, 3))}[name]
    module = make(8, 12, *kernel[:1]).double().requires_grad_(False)
    draws = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=draws, dtype=torch.float64)

    parts = {W1: normal(*first), "alpha": torch.tensor(3.0)}
    if low_rank:
        parts |= {W2_A: normal(second[0], 2), W2_B: normal(2, second[1] * math.prod(kernel))}
    else:
        parts[W2] = normal(*second, *kernel)
    adapter = LoKr.read(parts, module.weight.shape)
    expected = closed_form(adapter, module.weight.shape)
    torch.testing.assert_close(adapter.delta(), expected)
    x = normal(2, 5, 8) if name == "linear" else normal(2, 8, *[4] * len(kernel))
    torch.testing.assert_close(adapter.on(x, Lent(module)), with_weight(module, module.weight + expected, x))


def test_kernels_split_across_channels_are_read():
    """The host's trainer splits in·kernel as one number: here 36 = 6 · 6, whose 6 are no channels."""
    module, _, x = build(Case("LoKr", "conv2d", Options(2)))
    draws = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(size, generator=draws, dtype=torch.float64) for size in ((2, 6), (4, 6)))
    adapter = LoKr.read({W1: w1, W2: w2, "alpha": torch.tensor(1.0)}, module.weight.shape)
    weight = module.weight + torch.einsum("oi,pj->opij", w1, w2).reshape(8, 4, 3, 3)
    torch.testing.assert_close(adapter.merged(module.weight), weight)
    torch.testing.assert_close(adapter.on(x, Lent(module)), with_weight(module, weight, x))


def test_pefts_cores_of_one_dimension_are_read():
    case = Case("LoKr", "conv1d", Options(2, 3.0, factor=1, tucker=True))
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    state = adapter.state()
    again = LoKr.read(state | {T2: state[T2].unsqueeze(-1)}, module.weight.shape)
    torch.testing.assert_close(again.delta(), adapter.delta())


@pytest.mark.parametrize(
    "options", (Options(2, 2.0, factor=1), Options(2, 2.0, factor=2, full_rank=True)), ids=("low", "full")
)
@pytest.mark.parametrize("name", ("linear 3-D", "linear 4-D", "conv2d", "conv2d strided", "conv3d"))
def test_strided_inputs_and_gradients(name, options):
    """Permuted and channels-last tensors, as attention and the host's convolutions hand them on."""
    module, adapter, x = build(Case("LoKr", name, options))
    adapter = randomised(adapter)
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    results = []
    for last in (x.contiguous(), x.movedim(1, -1).contiguous().movedim(-1, 1)):
        last = last.detach().requires_grad_()
        y = adapter.on(last, Lent(module))
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        if not last.is_contiguous():
            weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
        results.append((y.detach(), *torch.autograd.grad(y, (last, *adapter.parameters()), weight)))
    for contiguous, permuted in zip(*results, strict=True):
        torch.testing.assert_close(contiguous, permuted)


@pytest.mark.parametrize("options", (Options(2, 2.0, factor=2), Options(2, full_rank=True)), ids=("low", "full"))
def test_the_graph_keeps_the_input_and_the_halves(options):
    module, adapter, x = build(Case("LoKr", "linear", options))
    for tensor in (x, *adapter.parameters()):
        tensor.requires_grad_()
    kept = [tuple(tensor.shape) for tensor in kept_for_backward(lambda: adapter.on(x, Lent(module)))]
    assert sorted(kept) == sorted([(5, 8), *(tuple(tensor.shape) for tensor in adapter.parameters())])


@pytest.mark.parametrize("name", [name for name in LAYERS if "grouped" not in name])
@pytest.mark.parametrize("options", (Options(1, 2.0), Options(2, full_rank=True)), ids=("low", "full"))
def test_training_builds_no_product(name, options, monkeypatch):
    module, adapter, x = build(Case("LoKr", name, options))
    monkeypatch.setattr(LoKr, "delta", lambda self: pytest.fail("ΔW was built"))
    adapter.on(x, Lent(module))


@pytest.mark.parametrize(
    "change, message",
    (
        ({W1: None}, "lokr_w1 is missing$"),
        ({W2_B: None}, "lokr_w2 is missing, or lokr_w2_b"),
        ({W2_B: torch.zeros(3, 8)}, "no halves of a Kronecker product"),
        ({W1: torch.zeros(3)}, "no halves of a Kronecker product"),
        ({W2: torch.zeros(12)}, "no halves of a Kronecker product"),
        ({W2_A: torch.zeros(6, 0), W2_B: torch.zeros(0, 4)}, "lokr_w2_a, lokr_w2_b: nothing in it"),
        ({W1: torch.zeros(2, 3)}, r"w1 \(2, 3\) ⊗ w2 \(6, 4\) is no weight of \(12, 8\)"),
        ({"alpha": torch.zeros(2)}, "alpha holds 2 numbers"),
    ),
)
def test_unfit_tensors_are_refused(change, message):
    module, adapter, _ = build(Case("LoKr", "linear", Options(2, 2.0, factor=2)))
    assert adapter.tensors.keys() == {W1, W2_A, W2_B}
    parts = {key: value for key, value in (adapter.state() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        LoKr.read(parts, module.weight.shape)


def test_another_kernel_is_refused():
    parts = {W1: torch.zeros(2, 2), W2: torch.zeros(4, 2, 3, 5)}
    assert LoKr.read(parts, None).shape == (8, 4, 3, 5)
    with pytest.raises(ValueError, match="is no weight"):
        LoKr.read(parts, (8, 4, 5, 3))
