"""Adapters that the host's own loader applies wrongly: the right values, ours, and the host's error."""

import peft
import pytest
import torch
from comfy.lora import calculate_weight, load_lora

from lora_loom.kernels.reading import read_lora
from lora_loom.kernels.registry import read_adapter
from lora_loom.kernels.safetensors_io import load_tensors

STRENGTHS = (1.0, 0.5, -0.7)


def by_the_host(parts, weight, strength=1.0, bias=None):
    """(weight, bias) that the host's loader makes of a layer's tensors."""
    patches = load_lora({f"layer.{name}": tensor for name, tensor in parts.items()}, {"layer": "layer.weight"}, False)
    merged = [
        None if tensor is None else
        calculate_weight([(strength, patches[key], 1.0, None, None)] if key in patches else [], tensor.clone(), key)
        for key, tensor in (("layer.weight", weight), ("layer.bias", bias))
    ]
    return merged[0], merged[1]


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


def lora(outputs, inputs, size=0.3):
    draws = torch.Generator().manual_seed(0)
    down, up = torch.randn(2, inputs, generator=draws), size * torch.randn(outputs, 2, generator=draws)
    weight, scale = torch.randn(outputs, inputs, generator=draws), torch.rand(outputs, generator=draws) + 0.5
    return {"lora_down.weight": down, "lora_up.weight": up}, weight, scale


@pytest.mark.parametrize("strength", STRENGTHS)
def test_dora_per_output_is_not_divided_by_the_base_norm(strength):
    """LyCORIS' default: m ∘ V / ‖V‖ with V = W + ΔW. The host divides by ‖W‖."""
    parts, weight, scale = lora(12, 8)
    moved, scale = weight + parts["lora_up.weight"] @ parts["lora_down.weight"], scale[:, None]
    right = weight + strength * (scale * moved / moved.norm(dim=1, keepdim=True) - weight)
    wrong = weight + strength * (scale * moved / weight.norm(dim=1, keepdim=True) - weight)
    ours, _ = read_adapter({**parts, "dora_scale": scale}, weight.shape)
    host, _ = by_the_host({**parts, "dora_scale": scale}, weight, strength)
    torch.testing.assert_close(ours.merged(weight, strength), right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(host, wrong, rtol=1e-4, atol=1e-5)
    assert relative(host - weight, right - weight) > 0.02


@pytest.mark.parametrize("strength", STRENGTHS)
def test_dora_per_input_is_right_in_the_host_too(strength):
    """And so is its rule for strength, a straight line; LyCORIS' multiplier is not (tests/kernels/test_dora.py)."""
    parts, weight, scale = lora(8, 12)
    scale = torch.rand(1, 12, generator=torch.Generator().manual_seed(1)) + 0.5
    ours, _ = read_adapter({**parts, "dora_scale": scale}, weight.shape)
    host, _ = by_the_host({**parts, "dora_scale": scale}, weight, strength)
    torch.testing.assert_close(ours.merged(weight, strength), host, rtol=2e-4, atol=1e-5)


def test_a_vector_of_dora_norms_is_per_output():
    """PEFT's and ai-toolkit's shape. The host makes an outer product of it: on square weights wrong without a word."""
    parts, weight, scale = lora(8, 8)
    moved = weight + parts["lora_up.weight"] @ parts["lora_down.weight"]
    right = scale[:, None] * moved / moved.norm(dim=1, keepdim=True)
    ours, _ = read_adapter({**parts, "dora_scale": scale}, weight.shape)
    host, _ = by_the_host({**parts, "dora_scale": scale}, weight)
    torch.testing.assert_close(ours.merged(weight), right, rtol=1e-5, atol=1e-6)
    assert relative(host, right) > 0.1


@pytest.mark.parametrize("half, gain", ((torch.bfloat16, 0.951), (torch.float16, 0.994)))
def test_dora_of_small_weights_loses_no_gain_in_half_precision(half, gain):
    """The host adds the weight dtype's own eps to ‖V‖: of norms about 0.16 a twentieth is lost."""
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=draws)
    weight = (0.15 * weight / weight.norm(dim=0)).to(half)
    parts = {"lora_down.weight": torch.randn(2, 64, generator=draws), "lora_up.weight": torch.zeros(64, 2)}
    scale = weight.float().norm(dim=0, keepdim=True)
    ours, _ = read_adapter({**parts, "dora_scale": scale}, weight.shape)
    host, _ = by_the_host({**parts, "dora_scale": scale}, weight)
    assert torch.equal(ours.merged(weight), weight)
    assert (host.float().norm() / weight.float().norm()).item() == pytest.approx(gain, abs=0.004)


def test_several_kinds_on_one_layer_add_up():
    """The host keeps the last it finds."""
    parts, weight, _ = lora(12, 8)
    difference = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    product = parts["lora_up.weight"] @ parts["lora_down.weight"]
    ours, left = read_adapter({**parts, "diff": difference}, weight.shape)
    host, _ = by_the_host({**parts, "diff": difference}, weight)
    assert not left
    torch.testing.assert_close(ours.merged(weight), weight + product + difference, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(host, weight + difference, rtol=1e-5, atol=1e-6)


def test_the_bias_of_a_norm_layer_comes_alone():
    weight, bias, extra = torch.ones(6), torch.zeros(6), torch.randn(6)
    ours, left = read_adapter({"b_norm": extra}, weight.shape)
    assert not left and torch.equal(ours.merged_bias(bias), extra) and torch.equal(ours.merged(weight), weight)
    assert torch.equal(by_the_host({"b_norm": extra}, weight, bias=bias)[1], bias)
    # with w_norm next to it the host takes it
    assert torch.equal(by_the_host({"b_norm": extra, "w_norm": extra}, weight, bias=bias)[1], extra)


def test_a_pointwise_difference_fits_a_linear_weight():
    weight, difference = torch.randn(6, 4), torch.randn(6, 4, 1, 1)
    ours, _ = read_adapter({"diff": difference}, weight.shape)
    torch.testing.assert_close(ours.merged(weight), weight + difference.flatten(1))
    assert torch.equal(by_the_host({"diff": difference}, weight)[0], weight)


KERNELS = {"linear": (), "conv1d": (3,), "conv2d": (3, 2), "conv3d": (3, 2, 2)}


def loha(name, tucker):
    """A LoHa for a weight (8, 6, *kernel) → (tensors, weight, ΔW)."""
    draws, kernel = torch.Generator().manual_seed(0), KERNELS[name]
    a1, a2, b1, b2 = (0.5 * torch.randn(size, generator=draws) for size in ((2, 8), (2, 8), (2, 6), (2, 6)))
    t1, t2 = (torch.randn(2, 2, *kernel, generator=draws) for _ in range(2))
    halves = [torch.einsum("po,pq...,qi->oi...", *factors) for factors in ((a1, t1, b1), (a2, t2, b2))]
    factors = (a1, b1, a2, b2, t1, t2)
    if not tucker:
        b1, b2 = (torch.einsum("pq...,qi->pi...", t, b).flatten(1) for t, b in ((t1, b1), (t2, b2)))
        factors = (a1.T, b1, a2.T, b2)
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    parts = dict(zip(names, (factor.contiguous() for factor in factors), strict=False))
    weight = torch.randn(8, 6, *kernel, generator=draws)
    return {**parts, "alpha": torch.tensor(3.0)}, weight, 1.5 * halves[0] * halves[1]


def lokr(name, form):
    """A LoKr for a weight (8, 6, *kernel), w2 "full", in "low rank" or with a "core" → (tensors, weight, ΔW)."""
    draws, kernel = torch.Generator().manual_seed(0), KERNELS[name]
    w1, a, b = (torch.randn(size, generator=draws) for size in ((2, 3), (2, 4), (2, 2)))
    core = torch.randn(2, 2, *kernel, generator=draws)
    w2 = torch.einsum("po,pq...,qi->oi...", a, core, b)
    parts = {
        "full": {"lokr_w2": w2},
        "low rank": {"lokr_w2_a": a.T, "lokr_w2_b": torch.einsum("pq...,qi->pi...", core, b).flatten(1)},
        "core": {"lokr_w2_a": a, "lokr_w2_b": b, "lokr_t2": core},
    }[form]
    weight = torch.randn(8, 6, *kernel, generator=draws)
    delta = (1.0 if form == "full" else 1.5) * torch.einsum("oi,pj...->opij...", w1, w2).reshape(weight.shape)
    parts = {key: part.contiguous() for key, part in parts.items()}
    return {**parts, "lokr_w1": w1, "alpha": torch.tensor(3.0)}, weight, delta


AGREED = (
    *((loha, name, False) for name in KERNELS),
    (loha, "conv2d", True),
    *((lokr, name, "low rank") for name in KERNELS),
    (lokr, "linear", "full"),
    (lokr, "conv2d", "full"),
)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("make, name, form", AGREED)
def test_loha_and_lokr_that_the_host_applies_as_we_do(make, name, form, strength):
    parts, weight, delta = make(name, form)
    ours, left = read_adapter(parts, weight.shape)
    assert not left
    torch.testing.assert_close(ours.merged(weight, strength), weight + strength * delta, rtol=1e-5, atol=1e-5)
    host, _ = by_the_host(parts, weight, strength)
    torch.testing.assert_close(ours.merged(weight, strength), host, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_lokr_with_a_core_is_not_dropped(strength):
    """The host's Kronecker product fails on the core's strides; it logs an error and leaves the weight."""
    parts, weight, delta = lokr("conv2d", "core")
    ours, _ = read_adapter(parts, weight.shape)
    torch.testing.assert_close(ours.merged(weight, strength), weight + strength * delta, rtol=1e-5, atol=1e-5)
    assert torch.equal(by_the_host(parts, weight, strength)[0], weight)


@pytest.mark.parametrize("name", ("conv1d", "conv3d"))
def test_full_lokr_of_one_and_three_dimensions(name):
    """The host lines w1 up with the kernel of anything but four dimensions: as many numbers, in the wrong places."""
    parts, weight, delta = lokr(name, "full")
    ours, _ = read_adapter(parts, weight.shape)
    torch.testing.assert_close(ours.merged(weight), weight + delta, rtol=1e-5, atol=1e-5)
    host, _ = by_the_host(parts, weight)
    assert relative(host - weight, delta) > 1
    torch.testing.assert_close((host - weight).norm(), delta.norm())


@pytest.mark.parametrize("make, form", ((loha, True), (lokr, "core")))
@pytest.mark.parametrize("name", ("conv1d", "conv3d"))
def test_cores_of_one_and_three_dimensions(make, form, name):
    """The host spells out two dimensions: it raises."""
    parts, weight, delta = make(name, form)
    ours, _ = read_adapter(parts, weight.shape)
    torch.testing.assert_close(ours.merged(weight), weight + delta, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="number of subscripts"):
        by_the_host(parts, weight)


def rotated(kind, rescale=False):
    """(parts without alpha, weight, W' by the definition) of an OFT or BOFT adapter on 8 outputs."""
    draws = torch.Generator().manual_seed(0)
    sizes = (2, 4, 4) if kind == "OFT" else (2, 2, 4, 4)
    parts = {"oft_blocks": 0.3 * torch.randn(sizes, generator=draws)}
    weight = torch.randn(8, 6, generator=draws)
    if rescale:
        parts["rescale"] = torch.rand(8, 1, generator=draws) + 0.5
    return parts, weight, turned(parts["oft_blocks"], weight) * parts.get("rescale", 1.0)


def turned(blocks, weight, limit=None):
    q = blocks - blocks.mT
    q = q if limit is None else q * min(1.0, limit / q.norm().item())
    eye = torch.eye(4)
    r = (eye + q) @ torch.inverse(eye - q)
    if blocks.ndim == 3:
        return torch.block_diag(*r).T @ weight
    for stage, matrices in enumerate(r):  # of four: two outputs and the two that are 2 or 4 further on, by pairs
        order = [[0, 2, 1, 3, 4, 6, 5, 7], [0, 4, 1, 5, 2, 6, 3, 7]][stage]
        weight = (torch.block_diag(*matrices) @ weight[order])[torch.tensor(order).argsort()]
    return weight


@pytest.mark.parametrize("kind", ("OFT", "BOFT"))
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_strength_of_rotations_is_not_squared(kind, strength):
    """The host scales the rotation, then the difference: half strength is a quarter, −0.7 turns like 0.49."""
    parts, weight, full = rotated(kind)
    parts["alpha"] = torch.tensor(0.0)
    ours, _ = read_adapter(parts, weight.shape)
    host, _ = by_the_host(parts, weight, strength)
    right = weight + strength * (full - weight)
    torch.testing.assert_close(ours.merged(weight, strength), right, rtol=1e-4, atol=1e-5)
    if strength == 1:
        torch.testing.assert_close(host, right, rtol=1e-4, atol=1e-5)
    elif kind == "OFT":
        torch.testing.assert_close(host, weight + strength**2 * (full - weight), rtol=1e-4, atol=1e-5)
    else:  # every stage on its own
        assert relative(host - weight, right - weight) > 0.3


@pytest.mark.parametrize("kind", ("OFT", "BOFT"))
def test_the_constraint_counts_the_outputs(kind):
    """LyCORIS and kohya: ‖Q‖ ≤ alpha · out. The host leaves out the outputs, and rotates an eighth."""
    parts, weight, _ = rotated(kind)
    parts["alpha"] = torch.tensor(0.01)
    ours, _ = read_adapter(parts, weight.shape)
    host, _ = by_the_host(parts, weight)
    right, wrong = (turned(parts["oft_blocks"], weight, limit) for limit in (0.08, 0.01))
    torch.testing.assert_close(ours.merged(weight), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(host, wrong, rtol=1e-4, atol=1e-5)
    assert relative(host - weight, right - weight) > 0.8


def test_rescale_of_oft_is_used():
    parts, weight, right = rotated("OFT", rescale=True)
    ours, _ = read_adapter(parts, weight.shape)
    host, _ = by_the_host(parts, weight)
    torch.testing.assert_close(ours.merged(weight), right, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(host, rotated("OFT")[2], rtol=1e-4, atol=1e-5)
    assert relative(host - weight, right - weight) > 0.2


def test_boft_without_alpha_is_applied():
    """The host compares the missing alpha with 0, logs the TypeError and leaves the weight as it is."""
    parts, weight, right = rotated("BOFT")
    ours, _ = read_adapter(parts, weight.shape)
    host, _ = by_the_host(parts, weight)
    torch.testing.assert_close(ours.merged(weight), right, rtol=1e-4, atol=1e-5)
    assert torch.equal(host, weight)
    saved, _ = by_the_host(ours.state(), weight)  # what we save says so in words that the host understands
    torch.testing.assert_close(saved, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "parts",
    (
        {"weight": torch.full((8,), 0.5), "on_input": torch.tensor(0)},
        {"ia3_l": torch.full((8, 1), 1.5)},
        {"oft_R.weight": torch.full((2, 3), 0.2)},
        {"boft_R": torch.ones(1, 2, 3, 3).triu(), "boft_s": torch.full((8, 1), 1.5)},
        {f"oft_blocks.{n}": torch.ones(1, 4, 4).triu() for n in range(2)},
    ),
    ids=("(IA)³", "(IA)³ of PEFT", "OFTv2", "BOFT of PEFT", "OFT of parts"),
)
def test_families_the_host_does_not_know(parts):
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    ours, left = read_adapter(parts, weight.shape)
    host, _ = by_the_host(parts, weight)
    assert not left and relative(ours.merged(weight) - weight, weight) > 0.1
    assert torch.equal(host, weight)


def test_glora_of_full_rank_is_no_old_file():
    """Where in, out and rank are one number the tensors fit both orders; LyCORIS writes the new one."""
    draws = torch.Generator().manual_seed(0)
    a1, a2, b1, b2, weight = (torch.randn(6, 6, generator=draws) for _ in range(5))
    parts = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    ours, _ = read_adapter(parts, weight.shape)
    host, _ = by_the_host(parts, weight)
    right = weight + weight @ a1 @ a2 + b1 @ b2
    torch.testing.assert_close(ours.merged(weight), right, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(host, weight + weight @ a2 @ a1 + b2 @ b1, rtol=1e-4, atol=1e-4)
    assert relative(host - weight, right - weight) > 1


def test_peft_files_keep_alpha_beside_the_tensors(tmp_path):
    """PEFT writes alpha into adapter_config.json only; the host takes it for the rank, here four times too strong."""
    torch.manual_seed(0)
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(8, 6, bias=False)})
    weight = base["layer"].weight.detach().clone()
    network = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=1, target_modules=["layer"]))
    with torch.no_grad():
        network.base_model.model["layer"].lora_B["default"].weight.normal_()
    network.save_pretrained(tmp_path)
    right = network.merge_and_unload()["layer"].weight.detach() - weight
    ours = read_lora(tmp_path / "adapter_model.safetensors")
    (adapter,) = ours.adapters.values()
    torch.testing.assert_close(adapter.merged(weight) - weight, right, rtol=1e-4, atol=1e-6)
    name = "base_model.model.layer"
    patches = load_lora(load_tensors(tmp_path / "adapter_model.safetensors"), {name: "layer.weight"}, False)
    host = calculate_weight([(1.0, patches["layer.weight"], 1.0, None, None)], weight.clone(), "layer.weight")
    torch.testing.assert_close(host - weight, 4 * right, rtol=1e-4, atol=1e-6)
