"""Gradients of every adapter against finite differences, on families that write in place and on those that do not.

All models and checkpointing are in ``test_families_on_models.py``, several adapters at a time.
"""

import pytest
import torch

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.loan import borrow
from training import adapters_for, loss_of, samples_for

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "hunyuan_video")
STEP = 3e-3


def make(name):
    depth = {"depth": 3} if name in ("flux", "hunyuan_video") else {}
    patcher = tiny.tiny(name, dtype=torch.float64, inference=True, **depth)
    return patcher, adapters_for(patcher, dtype=torch.float64), samples_for(name, 2, dtype=torch.float64, side=8)


def gradients(patcher, adapters, samples):
    with borrow(patcher, adapters) as loan:
        denoiser = HostDenoiser(loan)
        loss = loss_of(denoiser, samples)
        loss.backward()
        with torch.no_grad():  # the guards stand aside here: this is the host's own forward
            torch.testing.assert_close(loss.detach(), loss_of(denoiser, samples), rtol=1e-6, atol=0)
    found = {path: [tensor.grad for tensor in adapter.parameters()] for path, adapter in adapters.items()}
    for adapter in adapters.values():
        for tensor in adapter.parameters():
            tensor.grad = None
    return found


def loss_at(denoiser, samples, adapter, directions, step):
    """The loss with the adapter's tensors moved by ``step`` along ``directions``."""
    kept = [tensor.detach().clone() for tensor in adapter.parameters()]
    with torch.no_grad():
        for tensor, direction in zip(adapter.parameters(), directions, strict=True):
            tensor.add_(direction, alpha=step)
        value = loss_of(denoiser, samples).item()
        for tensor, before in zip(adapter.parameters(), kept, strict=True):
            tensor.copy_(before)
    return value


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_agree_with_finite_differences(name):
    patcher, adapters, samples = make(name)
    plain = gradients(patcher, adapters, samples)
    draws = torch.Generator().manual_seed(7)
    wrong = {}
    with borrow(patcher, adapters) as loan:
        denoiser = HostDenoiser(loan)
        for path, adapter in adapters.items():
            assert all(grad is not None and grad.any() for grad in plain[path]), f"no gradient reached {path}"
            # along the gradient of each tensor, so that an error in one cannot hide behind the other, plus noise
            directions = [
                grad / grad.norm() + torch.randn(grad.shape, generator=draws, dtype=grad.dtype) / grad.numel() ** 0.5
                for grad in plain[path]
            ]
            up = loss_at(denoiser, samples, adapter, directions, STEP)
            down = loss_at(denoiser, samples, adapter, directions, -STEP)
            expected = (up - down) / (2 * STEP)
            got = sum((grad * direction).sum().item() for grad, direction in zip(plain[path], directions, strict=True))
            error = abs(got - expected) / max(abs(expected), 1e-4)
            if error > 0.02:
                wrong[path] = (got, expected)
    assert not wrong, wrong
