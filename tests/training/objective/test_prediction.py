"""Noising and targets of ε, v and flow against their closed forms, and the noise levels of Stable Diffusion."""

import diffusers
import pytest
import torch

from lora_loom.training.objective import Prediction

E, V, FLOW = Prediction


def test_noising_and_targets_are_one_rotation():
    """x = √ᾱ x0 + √(1−ᾱ) ε and v = √ᾱ ε − √(1−ᾱ) x0 give x0 and ε back; the flow's target is dx/dσ."""
    draws = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=draws, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.03, 1.0, 14.6], dtype=torch.float64)
    level = sigma.view(3, 1, 1, 1)
    alpha = 1 / (1 + level**2)
    x = V.noisy(x0, noise, sigma) * alpha.sqrt()
    v = V.target(x0, noise, sigma)
    torch.testing.assert_close(x, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise)
    torch.testing.assert_close(alpha.sqrt() * x - (1 - alpha).sqrt() * v, x0)
    torch.testing.assert_close((1 - alpha).sqrt() * x + alpha.sqrt() * v, noise)
    assert E.target(x0, noise, sigma) is noise
    flow = [FLOW.noisy(x0, noise, torch.full((3,), s, dtype=torch.float64)) for s in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(flow[0], x0)
    torch.testing.assert_close(flow[2], noise)
    torch.testing.assert_close(flow[0] + 0.25 * FLOW.target(x0, noise, sigma), flow[1])


def test_signal_to_noise_of_stable_diffusion():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alphas = scheduler.alphas_cumprod.double()
    sigma = ((1 - alphas) / alphas).sqrt()
    snr = E.snr(sigma)
    torch.testing.assert_close(snr, alphas / (1 - alphas))
    assert torch.equal(snr, V.snr(sigma))
    assert snr[0].item() == pytest.approx(1175, rel=1e-3) and snr[-1].item() == pytest.approx(0.00468, rel=1e-3)
    assert sigma[-1].item() == pytest.approx(14.61, abs=0.01)


def test_signal_to_noise_of_a_flow_is_that_of_its_noising():
    sigma = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    assert FLOW.snr(sigma).tolist() == pytest.approx([float("inf"), 16, 1, 1 / 81, 0], rel=1e-6)
    assert FLOW.snr(sigma).dtype == torch.float64
