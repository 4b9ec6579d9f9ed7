"""What holds for every adapter family, on every kind of layer, with every option (the table is in ``cases.py``)."""

import dataclasses

import pytest
import torch

from cases import CASES, LAYERS, LINEARS, Lent, build, hold_norms, randomised, with_weight
from lora_loom.kernels.adapter import Dropout, Options
from lora_loom.kernels.registry import FAMILIES, read_adapter

STRENGTHS = (1.0, 0.5, -0.7)
EVERY_DIRECTION = ("linear", "conv1d")  # elsewhere gradients are compared along random ones, which is far quicker
every_case = pytest.mark.parametrize("case", CASES, ids=str)
trainable_cases = pytest.mark.parametrize("case", [c for c in CASES if FAMILIES[c.family].trainable], ids=str)


def test_every_family_is_in_the_table():
    assert {case.family for case in CASES} == FAMILIES.keys()
    for name, family in FAMILIES.items():
        tried = {key for case in CASES if case.family == name for key, value in vars(case.options).items()
                 if value != getattr(Options(), key)}
        untried = family.options - tried - {"dora", "rank_stabilised"}
        assert not untried, f"{name} is never tried with {untried}"
        assert family.options <= {field.name for field in dataclasses.fields(Options)}


@trainable_cases
def test_a_fresh_adapter_changes_nothing(case):
    module, adapter, x = build(case)
    assert torch.equal(adapter.merged(module.weight), module.weight) or torch.allclose(
        adapter.merged(module.weight), module.weight, rtol=1e-12, atol=1e-13
    )
    torch.testing.assert_close(adapter.on(x, Lent(module)), module(x), rtol=1e-10, atol=1e-12)


@every_case
def test_strength_is_a_straight_line_from_the_base(case):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    full = adapter.merged(module.weight) - module.weight
    assert full.norm() > 0.01 * module.weight.norm()
    for strength in STRENGTHS:
        torch.testing.assert_close(adapter.merged(module.weight, strength) - module.weight, strength * full)
    assert torch.equal(adapter.merged(module.weight, 0.0), module.weight)
    base = module(x)
    assert torch.equal(adapter.branch(x, base, Lent(module), 0.0), base)


@every_case
def test_branch_and_merge_agree(case):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    base = module(x)
    for strength in STRENGTHS:
        bias = adapter.merged_bias(module.bias, strength)
        merged = with_weight(module, adapter.merged(module.weight, strength), x, bias)
        assert not torch.allclose(merged, base)
        torch.testing.assert_close(adapter.branch(x, base, Lent(module), strength), merged)


@trainable_cases
def test_training_sees_the_merged_layer(case):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    merged = with_weight(module, adapter.merged(module.weight), x, adapter.merged_bias(module.bias))
    torch.testing.assert_close(adapter.on(x, Lent(module)), merged)


@trainable_cases
@pytest.mark.parametrize("input_too", (True, False))
def test_gradients_of_training(case, input_too, monkeypatch):
    """Finite differences reach every trained tensor and the input; alpha is a number and cannot be trained."""
    module, adapter, x = build(case)
    adapter, layer = randomised(adapter), Lent(module)
    hold_norms(monkeypatch, adapter, module)
    names = [name for name in adapter.tensors if name not in adapter.fixed_parts]
    assert [id(t) for t in adapter.parameters()] == [id(adapter.tensors[name]) for name in names]
    assert adapter.alpha is None or isinstance(adapter.alpha, float)
    tensors = [adapter.tensors[name].detach().requires_grad_() for name in names]

    def on(x, *tensors):
        return adapter.with_tensors(adapter.tensors | dict(zip(names, tensors, strict=True))).on(x, layer)

    fast = case.layer not in EVERY_DIRECTION
    assert torch.autograd.gradcheck(on, [x.requires_grad_(input_too), *tensors], fast_mode=fast)
    for gradient in torch.autograd.grad((on(x, *tensors) - 1).square().sum(), tensors):
        assert gradient.any()


@trainable_cases
def test_no_samples_and_a_single_position(case):
    """Linear layers take a vector; every layer takes a batch of nothing."""
    module, adapter, x = build(case)
    adapter, layer = randomised(adapter), Lent(module)
    inputs = [x[:0], x.flatten(0, -2)[0]] if case.layer in LINEARS else [x[:0]]
    for some in inputs:
        leaves = [some.requires_grad_(), *(tensor.requires_grad_() for tensor in adapter.parameters())]
        y = adapter.on(some, layer)
        torch.testing.assert_close(y, adapter.branch(some, module(some), layer))
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        if len(some):
            rows = adapter.on(some[None], layer)
            torch.testing.assert_close(y, rows[0])
            torch.testing.assert_close(gradients, torch.autograd.grad(rows.square().sum(), leaves))
        else:
            assert not any(gradient.any() for gradient in gradients)


@trainable_cases
def test_what_a_layer_gives_may_be_written_into(case):
    """As hosts do; where it is kept for the backward, autograd has to notice."""
    module, adapter, x = build(case)
    adapter, layer = randomised(adapter), Lent(module)
    leaves = [x.requires_grad_(), *(tensor.requires_grad_() for tensor in adapter.parameters())]
    times = torch.ones_like(module(x))
    times[:1] = 3
    wanted = torch.autograd.grad((adapter.on(x, layer) * times).square().sum(), leaves)
    y = adapter.on(x, layer)
    assert y._base is None
    y[:1].mul_(3)
    try:
        got = torch.autograd.grad(y.square().sum(), leaves)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error) and case.family in ("OFT", "BOFT")
    else:
        torch.testing.assert_close(got, wanted)


@every_case
def test_gradients_of_the_branch(case, monkeypatch):
    module, adapter, x = build(case)
    adapter, layer, base = randomised(adapter), Lent(module), module(x)
    hold_norms(monkeypatch, adapter, module)
    names = list(adapter.tensors)

    def branch(x, base, *tensors):
        return adapter.with_tensors(dict(zip(names, tensors, strict=True))).branch(x, base, layer, 0.5)

    inputs = [x, base, *(tensor.detach() for tensor in adapter.tensors.values())]
    fast = case.layer not in EVERY_DIRECTION
    assert torch.autograd.gradcheck(branch, [tensor.requires_grad_() for tensor in inputs], fast_mode=fast)


@every_case
@pytest.mark.parametrize("told", (True, False), ids=("shape told", "shape unknown"))
def test_state_is_read_back(case, told):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    state = adapter.state()
    for tensor in state.values():
        assert tensor.is_contiguous() and not tensor.requires_grad and tensor.device.type == "cpu"
    again, left = read_adapter(state, tuple(module.weight.shape) if told else None)
    assert not left
    torch.testing.assert_close(again.merged(module.weight), adapter.merged(module.weight))


@every_case
def test_another_shape_is_refused(case):
    module, adapter, _ = build(case)
    other = (module.weight.shape[0] + 2, module.weight.shape[1] + 2, *module.weight.shape[2:])
    with pytest.raises(ValueError):
        read_adapter(adapter.state(), other)


@every_case
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_half_precision(case, half):
    """Inputs and base in half precision, the adapter's own tensors in float32: within half precision's rounding."""
    module, adapter, x = build(case, torch.float32)
    adapter = randomised(adapter)
    exact = with_weight(module, adapter.merged(module.weight), x, adapter.merged_bias(module.bias))
    base = module.to(half)(x.to(half))
    got = adapter.branch(x.to(half), base, Lent(module))
    assert got.dtype == half and got.isfinite().all()
    bound = 0.03 if half is torch.bfloat16 else 0.004
    assert (got.float() - exact).norm() < bound * exact.norm()
    merged = adapter.merged(module.weight.to(half))
    assert merged.dtype == half and merged.isfinite().all()


@trainable_cases
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_half_precision_training_keeps_full_precision_gradients(case, half):
    module, adapter, x = build(case, torch.float32)
    adapter = randomised(adapter)
    gradients = []
    for dtype in (half, torch.float64):
        own = adapter if dtype is half else adapter.to(dtype=dtype)
        leaf = x.to(half).to(dtype).requires_grad_()
        for tensor in own.parameters():
            tensor.requires_grad_()
        y = own.on(leaf, Lent(module.to(dtype)))
        assert y.dtype == dtype
        # one that rotations cannot leave as it is
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=half).to(dtype).view(y.shape)).sum()
        gradients.append(torch.autograd.grad(loss, [leaf, *own.parameters()]))
    for got, want in zip(*gradients, strict=True):
        assert (got.double() - want).norm() < 0.05 * want.norm() + 1e-6
    assert [gradient.dtype for gradient in gradients[0]] == [half, *(t.dtype for t in adapter.parameters())]


@every_case
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_a_file_in_half_precision_acts_in_that_of_the_input(case, half):
    """Nothing is rounded but the numbers in the file."""
    module, adapter, x = build(case, torch.float32)
    stored = {n: t.to(half) if t.is_floating_point() else t for n, t in randomised(adapter).state().items()}
    adapter, _ = read_adapter(stored, tuple(module.weight.shape))
    exact = adapter.to(dtype=torch.float32)
    got = adapter.branch(x, module(x), Lent(module))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact.branch(x, module(x), Lent(module)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.merged(module.weight), exact.merged(module.weight), rtol=1e-4, atol=1e-4)


@trainable_cases
@pytest.mark.parametrize("alpha", (0.0, float("inf")))
def test_strange_alphas_give_no_nan(case, alpha):
    module, adapter, x = build(case)
    adapter = randomised(adapter)
    state = adapter.state() | ({"alpha": torch.tensor(alpha)} if adapter.alpha is not None else {})
    again, _ = read_adapter(state, tuple(module.weight.shape))
    assert again.merged(module.weight).isfinite().all()
    assert again.branch(x, module(x), Lent(module)).isfinite().all()


@trainable_cases
def test_the_norm_can_be_limited(case):
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    norm = adapter.norm().item()
    assert norm > 0
    assert not adapter.limit_norm(norm * 1.01)
    assert adapter.limit_norm(norm / 3)
    assert adapter.norm().item() == pytest.approx(norm / 3)


@pytest.mark.parametrize("case", [c for c in CASES if c.layer in ("linear 3-D", "conv2d")], ids=str)
def test_dropout(case):
    """The same seed leaves out the same, the mean over seeds is the adapter itself."""
    module, adapter, x = build(case)
    adapter, layer = randomised(adapter), Lent(module)
    full, base = adapter.on(x, layer), module(x)
    for dropout in (Dropout(network=0.3), Dropout(rank=0.3), Dropout(module=0.3)):
        adapter.dropout = dropout
        adapter.seed = None
        torch.testing.assert_close(adapter.on(x, layer), full)
        if case.family == "DyLoRA":  # draws its ranks from the seed too
            continue
        outputs = []
        for seed in range(300):
            adapter.seed = seed
            outputs.append(adapter.on(x, layer))
            if seed < 3:
                assert torch.equal(adapter.on(x, layer), outputs[-1])
        kept = 0.7 if dropout.module else 1.0
        mean = torch.stack(outputs).mean(0) - base
        assert len({round(float(y.sum()), 9) for y in outputs}) > 1
        error = (mean - kept * (full - base)).norm() / (full - base).norm()
        assert error < 0.25


@trainable_cases
def test_lora_plus_has_something_to_speed_up(case):
    _, adapter, _ = build(case)
    fast = {id(tensor) for tensor in adapter.fast_parameters()}
    assert fast <= {id(tensor) for tensor in adapter.parameters()}


def test_creating_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    for case in (case for case in CASES if FAMILIES[case.family].trainable):
        module_shape = LAYERS[case.layer][0]().weight.shape
        torch.set_rng_state(before)
        FAMILIES[case.family].adapter.create(module_shape, case.options, torch.Generator().manual_seed(0))
        assert torch.equal(before, torch.get_rng_state())
