"""T-LoRA: against LyCORIS and a closed form; the weight's own factors are found again when the weight changes."""

import pytest
import torch
from torch import nn

import run_host
from cases import Lent, with_weight
from lora_loom.kernels.registry import read_adapter
from lora_loom.kernels.tlora import LAMBDA, TLoRA

run_host.prepare_imports()

from lycoris.modules.tlora import TLoraModule  # noqa: E402

STRENGTHS = (1.0, 0.5, -0.7)
LAYERS = {
    "linear": (lambda: nn.Linear(7, 9), (2, 3, 7)),
    "linear wide": (lambda: nn.Linear(9, 5, bias=False), (4, 9)),
    "conv1x1": (lambda: nn.Conv2d(6, 8, 1), (2, 6, 4, 3)),
}


def build(name, rank=3, dtype=torch.float64):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make().to(dtype).requires_grad_(False)
    out_features, in_features, *ones = module.weight.shape
    sizes = {"q_layer.weight": (rank, in_features, *ones), "p_layer.weight": (out_features, rank, *ones),
             LAMBDA: (1, rank)}
    parts = {key: torch.randn(size, dtype=dtype) for key, size in sizes.items()} | {"alpha": torch.tensor(1.5)}
    adapter, left = read_adapter(parts, module.weight.shape)
    assert not left
    return module, adapter, parts, torch.randn(shape, dtype=dtype)


def closed_form(parts, weight):
    """(alpha / rank) · (P diag(λ) Q − W V Vᵀ) with V the strongest eigenvectors of Wᵀ W."""
    rank, matrix = parts[LAMBDA].numel(), weight.flatten(1)
    _, vectors = torch.linalg.eigh(matrix.T @ matrix)
    strongest = vectors[:, -rank:]
    q, p = parts["q_layer.weight"].flatten(1), parts["p_layer.weight"].flatten(1)
    own = torch.einsum("or,r,ri->oi", p, parts[LAMBDA].flatten(), q)
    return (1.5 / rank * (own - matrix @ strongest @ strongest.T)).view(weight.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_closed_form(name):
    module, adapter, parts, x = build(name)
    delta = closed_form(parts, module.weight)
    for strength in STRENGTHS:
        merged = adapter.merged(module.weight, strength)
        torch.testing.assert_close(merged, module.weight + strength * delta, rtol=1e-9, atol=1e-10)
        branch = adapter.branch(x, module(x), Lent(module), strength)
        torch.testing.assert_close(branch, with_weight(module, merged, x))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("rank", (3, 12))
@pytest.mark.parametrize("name", LAYERS)
def test_output_equals_lycoris(name, rank, strength):
    module, adapter, parts, x = build(name, rank)
    merged = with_weight(module, adapter.merged(module.weight, strength), x)
    branch = adapter.branch(x, module(x), Lent(module), strength)
    network = TLoraModule("layer", module, strength, rank, 1.5).to(x.dtype)
    with torch.no_grad():
        network.q_layer.weight.copy_(parts["q_layer.weight"])
        network.p_layer.weight.copy_(parts["p_layer.weight"])
        network.lambda_layer.copy_(parts[LAMBDA])
    network.apply_to()
    # its singular vectors are of float32
    torch.testing.assert_close(merged, module(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(branch, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_an_untrained_file_changes_nothing(name):
    module, _, _, _ = build(name)
    network = TLoraModule("layer", module, 1.0, 3, 1.5)
    adapter, left = read_adapter({key: t.detach().double() for key, t in network.custom_state_dict().items()}, None)
    assert not left
    torch.testing.assert_close(adapter.merged(module.weight), module.weight, rtol=0, atol=1e-6)


def test_another_weight_has_other_factors(monkeypatch):
    """The decomposition is remembered, and only as long as the layer holds the very same weight."""
    module, adapter, parts, x = build("linear")
    lent, calls, decompose = Lent(module), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or decompose(*args, **kwargs))
    for count in (1, 1, 2):
        if count == 2:
            module.weight[2, 3] += 0.5
        expected = with_weight(module, module.weight + closed_form(parts, module.weight), x)
        torch.testing.assert_close(adapter.branch(x, module(x), lent), expected)
        assert len(calls) == count
    adapter.merged(module.weight.float())  # the same numbers, rounded
    assert len(calls) == 3


def test_what_does_not_fit_is_refused():
    _, adapter, parts, _ = build("linear")
    with pytest.raises(ValueError, match="p_layer.weight missing"):
        TLoRA.read({name: tensor for name, tensor in parts.items() if name != "p_layer.weight"}, (9, 7))
    with pytest.raises(ValueError, match="not for a weight of"):
        TLoRA.read(parts, (9, 7, 3, 3))
    with pytest.raises(ValueError, match="p_layer.weight is"):
        TLoRA.read(parts | {"p_layer.weight": torch.ones(9, 4)}, (9, 7))
    for shape in ((8, 7), (9, 6), (9, 7, 3, 3)):
        with pytest.raises(ValueError, match="made for a weight of"):
            adapter.merged(torch.zeros(shape))
