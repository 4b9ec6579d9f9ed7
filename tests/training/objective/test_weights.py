"""Weights against their published forms and figures, and alike for models that say the same in other spaces."""

import itertools

import diffusers
import pytest
import torch

from lora_loom.training.objective import Prediction, loss_weights, sample_losses
from lora_loom.training.settings import ObjectiveSettings

E, V, FLOW = Prediction


def weigh(sigma, kind, **options):
    weights = loss_weights(torch.as_tensor(sigma), kind, ObjectiveSettings(**options))
    assert weights.dtype == torch.float32
    return weights.double()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def table():
    """(σ, SNR) of Stable Diffusion at its 1000 timesteps, from diffusers' ᾱ."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alphas = scheduler.alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt(), alphas / (1 - alphas)


def levels(kind):
    times = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)
    return times if kind is FLOW else times / (1 - times)


@pytest.mark.parametrize("kind, mean", ((E, 0.917), (V, 0.294)))
def test_min_snr_means(table, kind, mean):
    assert weigh(table[0], kind, min_snr_gamma=5.0).mean().item() == pytest.approx(mean, abs=5e-4)


def test_min_snr(table):
    sigma, snr = table
    for gamma in (1.0, 5.0, 20.0):
        clipped = torch.minimum(snr, torch.tensor(gamma))
        close(weigh(sigma, E, min_snr_gamma=gamma), clipped / snr)
        close(weigh(sigma, V, min_snr_gamma=gamma), clipped / (snr + 1))
        flow = levels(FLOW)
        close(weigh(flow, FLOW, min_snr_gamma=gamma), torch.minimum((1 - flow) ** 2, gamma * flow**2))
    below_one = weigh(sigma, E, min_snr_gamma=5.0) < 1
    assert below_one.sum() == 147 and below_one[:147].all()


def clean_estimate(kind, x, output, sigma):
    """x̂0 of a prediction, as a sampler computes it."""
    level = sigma.view(-1, 1, 1, 1)
    if kind is V:
        return x / (1 + level**2) - output * level / (1 + level**2).sqrt()
    return x - level * output


@pytest.mark.parametrize("kind", Prediction)
def test_weights_mean_the_same_for_every_kind_of_model(kind):
    """min-SNR is the error of x̂0 times min(SNR, γ), debiased the mean of the two errors (geometric), for all kinds."""
    sigma = levels(kind)
    draws = torch.Generator().manual_seed(1)
    x0, noise, output = torch.randn(3, len(sigma), 3, 4, 5, generator=draws, dtype=torch.float64).unbind()
    x = kind.noisy(x0, noise, sigma)
    own = sample_losses(output, kind.target(x0, noise, sigma))
    clean = (clean_estimate(kind, x, output, sigma) - x0).square().mean((1, 2, 3))
    snr = ((1 - sigma) / sigma) ** 2 if kind is FLOW else sigma**-2
    close(own * weigh(sigma, kind, min_snr_gamma=5.0), clean * snr.clamp(max=5))
    middle = snr < 1000
    assert middle.sum() >= 30
    close((own * weigh(sigma, kind, debiased=True))[middle], (own * clean).sqrt()[middle])


def test_debiased(table):
    sigma, snr = table
    close(weigh(sigma, E, debiased=True), snr.clamp(max=1000).rsqrt())
    close(weigh(sigma, V, debiased=True), (snr.clamp(max=1000) + 1).rsqrt())
    assert weigh(sigma, V, debiased=True)[10].item() == pytest.approx(0.098, abs=5e-4)  # sd-scripts: its square, .0096
    assert weigh(sigma, V, debiased=True)[10].square().item() == pytest.approx(0.0096, abs=5e-5)
    flow = levels(FLOW)
    cap = 1 / (1 + 1000**0.5)
    close(weigh(flow, FLOW, debiased=True), flow.clamp(min=cap))


@pytest.mark.parametrize("kind", Prediction)
def test_p2(kind):
    sigma = levels(kind)
    snr = ((1 - sigma) / sigma) ** 2 if kind is FLOW else sigma**-2
    close(weigh(sigma, kind, p2_gamma=0.5), (1 + snr) ** -0.5)


def test_like_noise_prediction_and_like_v(table):
    sigma, snr = table
    scale = snr.clamp(max=1000) / (snr.clamp(max=1000) + 1)
    close(weigh(sigma, V, v_loss_scale=True), scale)
    close(weigh(sigma, E, v_like_loss=0.2), 1 + 0.2 / scale)


OPTIONS = {"min_snr_gamma": 5.0, "debiased": True, "p2_gamma": 1.0, "v_loss_scale": True, "v_like_loss": 0.3}


@pytest.mark.parametrize("first, second", itertools.combinations(OPTIONS, 2))
def test_weights_multiply(first, second):
    sigma = levels(E)
    both = weigh(sigma, E, **{first: OPTIONS[first], second: OPTIONS[second]})
    close(both, weigh(sigma, E, **{first: OPTIONS[first]}) * weigh(sigma, E, **{second: OPTIONS[second]}))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", Prediction)
def test_clean_pictures_and_pure_noise_have_finite_weights(kind, name):
    """σ = 0, and the last level: 1 of a flow, 4518 where the host ends in pure noise."""
    sigma = torch.tensor([0.0, 1e-30, 1e-4, 1.0] if kind is FLOW else [0.0, 1e-30, 1e-4, 14.6, 4518.0])
    if kind is V:
        sigma = torch.cat([sigma, torch.tensor([float("inf")])])
    if name == "v_like_loss" and kind is not E:
        sigma = sigma[:-1] if kind is FLOW else sigma[:-2]  # refused for these
    weights = weigh(sigma, kind, **{name: OPTIONS[name]})
    assert weights.isfinite().all() and (weights >= 0).all()


@pytest.mark.parametrize("kind", Prediction)
def test_no_weight_is_no_factor(kind):
    assert loss_weights(levels(kind), kind, ObjectiveSettings()) is None
