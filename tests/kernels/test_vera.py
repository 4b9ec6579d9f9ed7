"""VeRA: against peft and a closed form; the shared matrices are cut to each layer."""

import pytest
import torch
from torch import nn

import run_host
from cases import Lent
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.registry import make_adapter, read_adapter
from lora_loom.kernels.vera import VeRA

run_host.prepare_imports()

import peft  # noqa: E402

STRENGTHS = (1.0, 0.5, -0.7)


def parts(outputs=6, inputs=4, rank=3):
    draws = torch.Generator().manual_seed(0)
    sizes = {"vera_lambda_b": (outputs,), "vera_lambda_d": (rank,), "vera_A": (rank, inputs), "vera_B": (outputs, rank)}
    return {name: torch.randn(size, generator=draws, dtype=torch.float64) for name, size in sizes.items()}


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("shape", ((6, 4), (5, 2), (6, 4, 1, 1)), ids=str)
def test_closed_form(shape, strength):
    torch.manual_seed(0)
    found = parts() | {"vera_lambda_b": torch.randn(shape[0], dtype=torch.float64)}
    weight = torch.randn(shape, dtype=torch.float64)
    a, b = found["vera_A"][:, : shape[1]], found["vera_B"][: shape[0]]
    delta = torch.einsum("o,or,r,ri->oi", found["vera_lambda_b"], b, found["vera_lambda_d"], a).view(shape)
    for known in (shape, None):
        adapter, left = read_adapter(found, known)
        assert not left
        torch.testing.assert_close(adapter.merged(weight, strength), weight + strength * delta, rtol=1e-9, atol=1e-12)


def test_output_equals_peft():
    """Two layers of different size share A and B."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(4, 6), "two": nn.Linear(7, 3, bias=False)}).double()
    config = peft.VeraConfig(r=5, target_modules=["one", "two"], save_projection=True, init_weights=True)
    peft.get_peft_model(model, config).double()
    for name in ("one", "two"):
        layer = model[name]
        with torch.no_grad():
            layer.vera_lambda_b["default"].normal_()
            layer.vera_lambda_d["default"].normal_()
        found = {"vera_lambda_b": layer.vera_lambda_b["default"], "vera_lambda_d": layer.vera_lambda_d["default"]}
        found |= {"vera_A": layer.vera_A["default"], "vera_B": layer.vera_B["default"]}
        assert found["vera_A"].shape == (5, 7) and found["vera_B"].shape == (6, 5)
        base = layer.base_layer
        x = torch.randn(2, 3, base.in_features, dtype=torch.float64)
        plain = base(x)
        for shape in (tuple(base.weight.shape), None):
            adapter, _ = read_adapter(found, shape)
            for strength in STRENGTHS:
                expected = plain + strength * (layer(x) - plain)
                ours = adapter.branch(x, plain, Lent(base), strength)
                torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_only_the_layers_own_part_is_kept():
    adapter, _ = read_adapter(parts(6, 9) | {"vera_lambda_b": torch.ones(4)}, (4, 5))
    assert {name: tuple(tensor.shape) for name, tensor in adapter.state().items()} == {
        "vera_lambda_b": (4,), "vera_lambda_d": (3,), "vera_A": (3, 5), "vera_B": (4, 3),
    }


def test_what_does_not_fit_is_refused():
    found = parts()
    without = {name: tensor for name, tensor in found.items() if name not in ("vera_A", "vera_B")}
    with pytest.raises(ValueError, match="vera_A, vera_B missing .*save_projection"):
        VeRA.read(without, (6, 4))
    with pytest.raises(ValueError, match="vera_lambda_d missing$"):
        VeRA.read({name: tensor for name, tensor in found.items() if name != "vera_lambda_d"}, (6, 4))
    with pytest.raises(ValueError, match="do not serve a layer of 9 outputs"):
        VeRA.read(found | {"vera_lambda_b": torch.ones(9)}, None)
    with pytest.raises(ValueError, match="do not serve a layer of 6 outputs at rank 2"):
        VeRA.read(found | {"vera_lambda_d": torch.ones(2)}, None)
    for shape in ((5, 4), (6, 5), (6, 4, 3, 3), (6,)):
        with pytest.raises(ValueError, match="is made for 6 outputs and at most 4 inputs"):
            VeRA.read(found, shape)
    with pytest.raises(ValueError, match="applied, not trained"):
        make_adapter("VeRA", (6, 4), Options(), torch.Generator())
