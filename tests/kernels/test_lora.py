"""LoRA beside a frozen layer: values against peft and LyCORIS, gradients against finite differences."""

import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import run_host
from lora_loom.kernels.frozen import ConvGeometry, frozen_conv, frozen_linear, frozen_other
from lora_loom.kernels.lora import LoRA

run_host.prepare_imports()  # both references import torchvision, which may need its operators declared first

import peft  # noqa: E402
from lycoris.modules.locon import LoConModule  # noqa: E402

# name -> (make the layer, shape of its input)
LINEARS = {
    "2-D": (lambda: nn.Linear(7, 5), (6, 7)),
    "3-D": (lambda: nn.Linear(5, 9, bias=False), (2, 3, 5)),
    "4-D": (lambda: nn.Linear(3, 4), (2, 3, 2, 3)),
}
CONVS = {
    "1d": (lambda: nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 9)),
    "1d dilated": (lambda: nn.Conv1d(2, 3, 3, padding=2, dilation=2, bias=False), (1, 2, 8)),
    "2d": (lambda: nn.Conv2d(3, 5, 3, padding=1), (2, 3, 5, 4)),
    "2d strided": (lambda: nn.Conv2d(4, 3, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 5)),
    "2d dilated": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 3), dilation=(2, 3)), (1, 2, 6, 7)),
    "2d pointwise": (lambda: nn.Conv2d(5, 3, 1), (2, 5, 3, 4)),
    "2d pointwise strided": (lambda: nn.Conv2d(3, 4, 1, stride=2), (2, 3, 5, 5)),
    "3d": (lambda: nn.Conv3d(2, 3, 3, padding=(0, 1, 1), stride=(1, 2, 1)), (1, 2, 3, 4, 3)),
    "3d pointwise": (lambda: nn.Conv3d(3, 2, 1), (2, 3, 2, 2, 3)),
}
LAYERS = {**{f"linear {name}": case for name, case in LINEARS.items()}, **{f"conv {n}": c for n, c in CONVS.items()}}


class Lent:
    """A layer on loan whose owner reuses the buffer: what ``weight`` gave is ruined as soon as it is given back."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.geometry = module.requires_grad_(False), None
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            self.geometry = ConvGeometry(module.stride, module.padding, module.dilation, module.groups)

    def forward(self, x, *args, **kwargs):
        return self.module.to(x.dtype)(x, *args, **kwargs)

    @contextmanager
    def weight(self, like):
        borrowed = self.module.weight.detach().to(like.dtype, copy=True)
        yield borrowed
        borrowed.fill_(math.nan)


def make(name, rank=3, alpha=2.0, dtype=torch.float64, seed=0):
    """(layer, adapter with random factors, input) of a case."""
    torch.manual_seed(seed)
    build, shape = LAYERS[name]
    module = build().to(dtype)
    draws = torch.Generator().manual_seed(seed)
    adapter = LoRA.create(module.weight.shape, rank, alpha, draws, dtype)
    adapter.up.normal_(generator=draws)
    return module, adapter, torch.randn(shape, generator=draws, dtype=dtype)


def ours(way, module, adapter, x):
    layer = Lent(module)
    if way == "on":
        return adapter.on(x, layer)
    if way == "branch":
        return adapter.branch(x, module(x), layer.geometry)
    changed = {"weight": adapter.merged(module.weight)}
    return torch.func.functional_call(module, changed, x)


def peft_output(module, adapter, x):
    network = nn.ModuleDict({"layer": module})
    config = peft.LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, target_modules=["layer"])
    layer = peft.inject_adapter_in_model(config, network)["layer"]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(adapter.down)
        layer.lora_B["default"].weight.copy_(adapter.up)
        return layer(x)


def lycoris_output(module, adapter, x):
    locon = LoConModule("layer", module, 1.0, adapter.rank, adapter.alpha).to(x.dtype)
    with torch.no_grad():
        locon.lora_down.weight.copy_(adapter.down)
        locon.lora_up.weight.copy_(adapter.up)
        locon.apply_to()
        return module(x)


REFERENCES = [
    *((name, peft_output) for name in LAYERS if "dilated" not in name),  # peft's branch leaves dilation out
    *((name, lycoris_output) for name in LAYERS),
]


@pytest.mark.parametrize("way", ("on", "branch", "merged"))
@pytest.mark.parametrize("name, oracle", REFERENCES, ids=lambda value: getattr(value, "__name__", value))
def test_output_equals_the_reference(name, oracle, way):
    module, adapter, x = make(name)
    with torch.no_grad():
        untouched = module(x)
        got = ours(way, module, adapter, x)
    assert not torch.allclose(got, untouched)  # the adapter does something
    torch.testing.assert_close(got, oracle(module, adapter, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_delta_equals_lycoris(name):
    module, adapter, _ = make(name, rank=2, alpha=0.7)
    locon = LoConModule("layer", module, 1.0, adapter.rank, adapter.alpha).double()
    with torch.no_grad():
        locon.lora_down.weight.copy_(adapter.down)
        locon.lora_up.weight.copy_(adapter.up)
        expected = locon.get_diff_weight()[0]
    torch.testing.assert_close(adapter.delta(), expected.view(module.weight.shape), rtol=1e-6, atol=1e-9)
    assert adapter.shape == tuple(module.weight.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_strength_scales_branch_and_merged_alike(name):
    module, adapter, x = make(name)
    with torch.no_grad():
        base = module(x)
        branch = adapter.branch(x, base, Lent(module).geometry, strength=-0.6)
        merged = torch.func.functional_call(module, {"weight": adapter.merged(module.weight, -0.6)}, x)
        torch.testing.assert_close(branch, merged)
        torch.testing.assert_close(branch - base, -0.6 * (adapter.on(x, Lent(module)) - base))


def test_a_pointwise_adapter_fits_a_linear_weight():
    module, adapter, _ = make("conv 2d pointwise")
    flat = module.weight.detach().flatten(1)
    torch.testing.assert_close(adapter.merged(flat), adapter.merged(module.weight.detach()).flatten(1))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("input_too", (True, False))
def test_gradients_of_the_fused_branch(name, input_too):
    module, adapter, x = make(name, rank=2)
    layer = Lent(module)
    inputs = [x.requires_grad_(input_too), adapter.down.requires_grad_(), adapter.up.requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, down, up: LoRA(down, up, adapter.alpha).on(x, layer), inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_plain_branch(name):
    module, adapter, x = make(name, rank=2)
    base, geometry = module(x).detach(), Lent(module).geometry
    inputs = [tensor.requires_grad_() for tensor in (x, base, adapter.down, adapter.up)]

    def branch(x, base, down, up):
        return LoRA(down, up, adapter.alpha).branch(x, base, geometry, strength=0.5)

    assert torch.autograd.gradcheck(branch, inputs)


@pytest.mark.parametrize("name", LINEARS)
def test_gradients_of_frozen_linear(name):
    module, _, x = make(f"linear {name}")
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, Lent(module)), x.requires_grad_())


@pytest.mark.parametrize("name", (*CONVS, "grouped"))
def test_gradients_of_frozen_conv(name):
    if name == "grouped":
        module, x = nn.Conv2d(4, 6, 3, padding=1, groups=2).double(), torch.randn(2, 4, 4, 3, dtype=torch.float64)
    else:
        module, _, x = make(f"conv {name}")
    assert torch.autograd.gradcheck(lambda x: frozen_conv(x, Lent(module)), x.requires_grad_())


@pytest.mark.parametrize(
    "module, shape, arguments",
    (
        (nn.LayerNorm(5), (2, 3, 5), {}),
        (nn.GroupNorm(2, 4), (2, 4, 3, 3), {}),
        (nn.ConvTranspose2d(3, 2, 3, stride=2), (1, 3, 3, 3), {"output_size": (8, 8)}),
        (nn.Conv2d(2, 3, 3, padding="same", padding_mode="reflect"), (1, 2, 4, 5), {}),
    ),
    ids=("layer norm", "group norm", "transposed conv with an argument", "reflecting conv"),
)
def test_gradients_of_frozen_other(module, shape, arguments):
    layer = Lent(module.double())
    layer.geometry = None
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.no_grad():  # weights unlike ones and zeros
        for tensor in module.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, dtype=torch.float64))
    torch.testing.assert_close(frozen_other(x, layer, **arguments), module(x, **arguments))
    assert torch.autograd.gradcheck(lambda x: frozen_other(x, layer, **arguments), x)


@pytest.mark.parametrize("name", ("linear 3-D", "linear 4-D", "conv 2d", "conv 2d strided", "conv 3d"))
def test_strided_inputs_and_gradients(name):
    """Permuted and channels-last tensors, as attention and the host's convolutions hand them on."""
    module, adapter, x = make(name)
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


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("half", (torch.bfloat16, torch.float16))
def test_half_precision_inputs_keep_full_precision_factors(name, half):
    module, adapter, x = make(name, dtype=torch.float32)
    for tensor in adapter.parameters():
        tensor.requires_grad_()
    grads = {}
    for dtype in (half, torch.float64):
        own = adapter if dtype is half else LoRA(*(t.detach().double() for t in adapter.parameters()), adapter.alpha)
        inputs = [x.to(half).to(dtype).requires_grad_(), *(t.requires_grad_() for t in own.parameters())]
        y = own.on(inputs[0], Lent(module.to(half)))
        assert y.dtype == dtype
        grads[dtype] = torch.autograd.grad(y.square().sum(), inputs)
    assert [grad.dtype for grad in grads[half]] == [half, torch.float32, torch.float32]
    for got, want in zip(grads[half], grads[torch.float64], strict=True):
        assert (got.double() - want).norm() < 0.03 * want.norm()


def test_the_graph_keeps_no_weight():
    module, adapter, x = make("linear 2-D")
    adapter.down.requires_grad_(), adapter.up.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        adapter.on(x.requires_grad_(), Lent(module))
        frozen_linear(x, Lent(module))
    assert sorted(kept) == sorted([(6, 7), (6, 3), (3, 7), (5, 3)])  # x, down·x, down, up


@pytest.mark.parametrize("shape", ((5, 7), (6, 4, 3), (5, 3, 3, 3), (4, 3, 1, 1), (3, 2, 3, 3, 3)), ids=str)
def test_fresh_adapters(shape):
    def fresh(seed):
        return LoRA.create(shape, 64, 16.0, torch.Generator().manual_seed(seed))

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


def test_precision_changes_rounding_only():
    wide = LoRA.create((5, 7), 3, 1.0, torch.Generator().manual_seed(0), torch.float64)
    narrow = LoRA.create((5, 7), 3, 1.0, torch.Generator().manual_seed(0), torch.float32)
    assert torch.equal(wide.down.float(), narrow.down)


def test_creating_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    LoRA.create((5, 7), 3, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_alpha_is_a_number_that_is_never_trained():
    _, adapter, _ = make("linear 2-D", alpha=2)
    assert adapter.alpha == 2.0 and isinstance(adapter.alpha, float)
    assert [id(tensor) for tensor in adapter.parameters()] == [id(adapter.down), id(adapter.up)]
    state = adapter.state()
    assert set(state) == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert state["alpha"].shape == () and state["alpha"].item() == 2.0


def test_state_is_a_copy():
    _, adapter, _ = make("conv 2d")
    adapter.down.requires_grad_()
    state = adapter.state()
    for name, tensor in (("lora_down.weight", adapter.down), ("lora_up.weight", adapter.up)):
        assert torch.equal(state[name], tensor)
        assert state[name].is_contiguous() and not state[name].requires_grad
        assert state[name].data_ptr() != tensor.data_ptr()


def test_factors_of_different_rank_are_refused():
    with pytest.raises(ValueError, match="rank 3 but lora_up has rank 2"):
        LoRA(torch.zeros(3, 5), torch.zeros(4, 2), 1.0)
