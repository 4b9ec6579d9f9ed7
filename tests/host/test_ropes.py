"""Rotations with a derivative: the host's own values, gradients by finite differences, and nothing left behind."""

import comfy.quant_ops
import pytest
import torch
from comfy.ldm.flux.math import rope

import tiny
from lora_loom.host.ropes import OPERATIONS, differentiable_ropes
from training import borrow

KITCHEN = getattr(comfy.quant_ops, "ck", None)
DIM = 12


def turns(positions, dim=DIM):
    """The host's own table (1, 1, positions, dim/2, 2, 2)."""
    return rope(torch.arange(positions, dtype=torch.float32)[None] * 1.7, dim, 100)[:, None]


def inputs(name, dtype=torch.float32):
    """Random arguments for one of the operations, (batch, heads, positions, dim)."""
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 5, DIM, generator=draws).to(dtype) for _ in range(2))
    scales = [1 + 0.3 * torch.randn(DIM, generator=draws).to(dtype) for _ in range(2)]
    moving = (x,) if name.endswith("1") else (x, y)
    return moving, (turns(5).to(dtype),), tuple(scales[: len(moving)]) if name.startswith("rms") else ()


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_by_finite_differences(name):
    moving, table, scales = inputs(name, torch.float64)
    moving = tuple(x[:1, :1, :, :].clone().requires_grad_() for x in moving)
    assert torch.autograd.gradcheck(lambda *x: OPERATIONS[name](*x, *table, *scales), moving)


@pytest.mark.parametrize("halves", (False, True))
def test_only_the_rotated_part_turns(halves):
    (q, k), _, scales = inputs("rms_rope")
    name = "rms_rope_split_half" if halves else "rms_rope"
    whole = torch.nn.functional.rms_norm(q, (DIM,), scales[0], 1e-6)
    result, _ = OPERATIONS[name](q, k, turns(5, 8), *scales, rot_dim=8)
    assert torch.equal(result[..., 8:], whole[..., 8:])
    torch.testing.assert_close(result[..., :8].norm(dim=-1), whole[..., :8].norm(dim=-1))
    assert not torch.allclose(result[..., 1:, :8], whole[..., 1:, :8], atol=0.1)


if KITCHEN is not None:  # older hosts have no such operations, and a skipped test fails under CI

    @pytest.mark.parametrize("name", OPERATIONS)
    def test_values_are_the_hosts(name):
        moving, table, scales = inputs(name)
        want = getattr(KITCHEN, name)(*moving, *table, *scales)
        got = OPERATIONS[name](*moving, *table, *scales)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_they_are_lent_and_given_back():
        before = {name: getattr(KITCHEN, name) for name in OPERATIONS}
        (x,), table, scales = inputs("rms_rope_split_half1")
        with pytest.raises(RuntimeError, match="autograd"):
            before["rms_rope_split_half1"](x.requires_grad_(), *table, *scales).sum().backward()
        with pytest.raises(KeyError), borrow(tiny.tiny("sd3"), {}):
            KITCHEN.rms_rope_split_half1(x, *table, *scales).sum().backward()
            with differentiable_ropes():
                pass
            assert KITCHEN.rms_rope is not before["rms_rope"]
            raise KeyError
        assert x.grad is not None and x.grad.any()
        assert all(getattr(KITCHEN, name) is own for name, own in before.items())
