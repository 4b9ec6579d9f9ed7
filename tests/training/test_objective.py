"""Schedules, draws, noising, targets and the loss against their closed forms."""

import math

import pytest
import torch

from lora_loom.training.objective import Prediction, draw_times, sample_losses
from lora_loom.training.schedule import learning_rate
from lora_loom.training.settings import ObjectiveSettings, OptimizerSettings


@pytest.mark.parametrize("total, warmup", ((10, 0), (10, 4), (100, 1), (5, 5), (3, 8), (1, 0)))
def test_schedules_equal_their_closed_forms(total, warmup):
    for step in range(total):
        constant = learning_rate(3e-4, step, total, OptimizerSettings(warmup_steps=warmup))
        cosine = learning_rate(3e-4, step, total, OptimizerSettings(warmup_steps=warmup, schedule="cosine"))
        if step < warmup:
            assert constant == cosine == pytest.approx(3e-4 * (step + 1) / warmup)
        else:
            assert constant == 3e-4
            assert cosine == pytest.approx(3e-4 * math.cos(math.pi / 2 * (step - warmup) / (total - warmup)) ** 2)
        assert 0 < cosine <= 3e-4


def test_the_cosine_ends_at_zero_and_stays_there():
    settings = OptimizerSettings(schedule="cosine", warmup_steps=2)
    assert learning_rate(1.0, 10, 10, settings) == pytest.approx(0, abs=1e-15)
    assert learning_rate(1.0, 50, 10, settings) == pytest.approx(0, abs=1e-15)


def distance_to_uniform(values):
    """Kolmogorov–Smirnov statistic, times √n: above 1.63 in one of a hundred fair samples."""
    ordered, n = values.sort().values, len(values)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    return max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max()).item() * n**0.5


@pytest.mark.parametrize("kind", (Prediction.EPSILON, Prediction.VELOCITY))
@pytest.mark.parametrize("named", ("automatic", "uniform"))
def test_uniform_times(kind, named):
    times = draw_times(20000, kind, ObjectiveSettings(timesteps=named), torch.Generator().manual_seed(1))
    assert times.dtype == torch.float64 and 0 <= times.min() and times.max() < 1
    assert distance_to_uniform(times) < 1.63


@pytest.mark.parametrize("mean, std", ((0.0, 1.0), (-0.8, 0.5), (1.5, 2.0)))
@pytest.mark.parametrize("kind, named", ((Prediction.FLOW, "automatic"), (Prediction.EPSILON, "logit-normal")))
def test_logit_normal_times(kind, named, mean, std):
    settings = ObjectiveSettings(timesteps=named, logit_mean=mean, logit_std=std)
    times = draw_times(20000, kind, settings, torch.Generator().manual_seed(2))
    assert 0 < times.min() and times.max() < 1
    logits = torch.logit(times)
    assert logits.mean().item() == pytest.approx(mean, abs=4 * std / 20000**0.5)
    assert logits.std().item() == pytest.approx(std, rel=0.03)
    assert distance_to_uniform(torch.special.ndtr((logits - mean) / std)) < 1.63


def test_extreme_times_stay_below_one():
    settings = ObjectiveSettings(timesteps="logit-normal", logit_mean=80.0)
    times = draw_times(100, Prediction.FLOW, settings, torch.Generator().manual_seed(0))
    assert times.max() < 1 and times.float().max() < 1


def test_losses_are_plain_means_in_float32_or_better():
    draws = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 4, 5, 5, generator=draws).unbind()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        losses = sample_losses(output.to(dtype), target.to(dtype))
        assert losses.shape == (3,) and losses.dtype == wide
        expected = (output.to(dtype).double() - target.to(dtype).double()).square().mean((1, 2, 3))
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)


def test_noising_and_targets_are_one_rotation():
    """x = √ᾱ x0 + √(1−ᾱ) ε and v = √ᾱ ε − √(1−ᾱ) x0 give x0 and ε back; the flow's target is dx/dσ."""
    draws = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 3, 4, 2, 2, generator=draws, dtype=torch.float64).unbind()
    sigma = torch.tensor([0.03, 1.0, 14.6], dtype=torch.float64)
    level = sigma.view(3, 1, 1, 1)
    alpha = 1 / (1 + level**2)
    x = Prediction.VELOCITY.noisy(x0, noise, sigma) * alpha.sqrt()
    v = Prediction.VELOCITY.target(x0, noise, sigma)
    torch.testing.assert_close(x, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise)
    torch.testing.assert_close(alpha.sqrt() * x - (1 - alpha).sqrt() * v, x0)
    torch.testing.assert_close((1 - alpha).sqrt() * x + alpha.sqrt() * v, noise)
    assert Prediction.EPSILON.target(x0, noise, sigma) is noise
    flow = [Prediction.FLOW.noisy(x0, noise, torch.full((3,), s, dtype=torch.float64)) for s in (0.0, 0.25, 1.0)]
    torch.testing.assert_close(flow[0], x0)
    torch.testing.assert_close(flow[2], noise)
    torch.testing.assert_close(flow[0] + 0.25 * Prediction.FLOW.target(x0, noise, sigma), flow[1])
