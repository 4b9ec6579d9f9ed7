"""L2, L1, Huber and smooth L1 against their closed forms, their thresholds against the published figures."""

import diffusers
import pytest
import torch

from lora_loom.training.objective import Prediction, sample_losses
from lora_loom.training.objective.losses import huber_threshold
from lora_loom.training.settings import ObjectiveSettings

E, V, FLOW = Prediction
ROBUST = ("Huber", "smooth L1")


def pair(shape=(3, 4, 5, 7), seed=0):
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()


def stable_diffusion():
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    alphas = scheduler.alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt()


def test_losses_are_plain_means_in_float32_or_better():
    output, target = pair((3, 4, 5, 5))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        losses = sample_losses(output.to(dtype), target.to(dtype))
        assert losses.shape == (3,) and losses.dtype == wide
        expected = (output.to(dtype).double() - target.to(dtype).double()).square().mean((1, 2, 3))
        torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("shape", ((3, 4, 5, 7), (3, 2, 2, 3, 5)))
@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("loss", ("L2", "L1", *ROBUST))
def test_each_loss_equals_its_formula(loss, kind, shape, masked):
    output, target = pair(shape)
    sigma, times = torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.15, 0.5, 0.85], dtype=torch.float64)
    settings = ObjectiveSettings(loss=loss, **({"huber_c": 0.3} if loss in ROBUST else {}))
    mask = torch.rand(3, 1, *shape[2:], generator=torch.Generator().manual_seed(5)) if masked else None
    d = output - target
    equivalent = sigma.double() / (1 - sigma.double()) if kind is FLOW else sigma.double()
    c = ((1 - 0.3) / (1 + equivalent) ** 2 + 0.3).view(3, *(1 for _ in shape[1:]))
    root = (d**2 + c**2).sqrt() - c
    errors = {"L2": d**2, "L1": d.abs(), "Huber": 2 * c * root, "smooth L1": 2 * root}[loss]
    weights = torch.ones_like(errors) if mask is None else mask.double().expand_as(errors)
    expected = (errors * weights).flatten(1).sum(1) / weights.flatten(1).sum(1)
    got = sample_losses(output, target, mask, sigma=sigma, times=times, prediction=kind, settings=settings)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule, expected", (("SNR", (0.95, 0.23, 0.10)), ("constant", (0.1, 0.1, 0.1))))
def test_thresholds_of_stable_diffusion(schedule, expected):
    sigma = stable_diffusion()[[0, 500, 999]]
    settings = ObjectiveSettings(loss="Huber", huber_schedule=schedule)
    times = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    assert huber_threshold(sigma, times, V, settings).tolist() == pytest.approx(expected, abs=0.005)


def test_exponential_threshold_falls_from_one_to_huber_c():
    """exp(t ln c / N), t of N."""
    settings = ObjectiveSettings(loss="Huber", huber_schedule="exponential", huber_c=0.01)
    times = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    thresholds = huber_threshold(torch.ones(4), times, FLOW, settings)
    assert thresholds.tolist() == pytest.approx([1, 0.01**0.25, 0.1, 0.01])


def test_thresholds_of_a_flow_have_a_limit_at_both_ends():
    thresholds = huber_threshold(
        torch.tensor([0.0, 0.25, 1.0]), torch.tensor([0.0, 0.25, 1.0]), FLOW, ObjectiveSettings(loss="Huber")
    )
    assert thresholds.tolist() == pytest.approx([1.0, 0.9 * 0.75**2 + 0.1, 0.1])


@pytest.mark.parametrize("schedule", ("constant", "exponential", "SNR"))
def test_scale_multiplies_every_schedule(schedule):
    """A peer forgets it for SNR."""
    sigma, times = torch.tensor([0.3, 0.8]), torch.tensor([0.3, 0.8], dtype=torch.float64)
    one, three = (
        huber_threshold(sigma, times, FLOW, ObjectiveSettings(loss="Huber", huber_schedule=schedule, huber_scale=scale))
        for scale in (1.0, 3.0)
    )
    torch.testing.assert_close(three, 3 * one)


def test_huber_is_square_below_and_straight_above_its_threshold():
    settings = {name: ObjectiveSettings(loss=name, huber_schedule="constant", huber_c=1.0) for name in ROBUST}
    sigma = times = torch.tensor([0.5])
    for difference, expected in ((1e-4, 1e-8), (1e4, 2e4)):
        output = torch.full((1, 1, 1, 1), difference)
        for options in settings.values():
            got = sample_losses(output, torch.zeros(1, 1, 1, 1), sigma=sigma, times=times, settings=options)
            assert got.item() == pytest.approx(expected, rel=2e-4)  # float32: c + tiny − c would give 0


@pytest.mark.parametrize("loss", ROBUST)
def test_gradients_of_a_perfect_prediction_are_zero(loss):
    output = torch.zeros(1, 2, 3, 3, requires_grad=True)
    options = ObjectiveSettings(loss=loss, huber_c=1e-6, huber_schedule="constant")
    sigma = times = torch.tensor([0.5])
    sample_losses(output, torch.zeros_like(output), sigma=sigma, times=times, settings=options).sum().backward()
    assert torch.equal(output.grad, torch.zeros_like(output))


def test_a_perfect_flow_model_has_no_loss():
    """A peer's default compares −σ·prediction + x with ε − x0: a perfect model scores 5 there."""
    x0, noise = pair()
    sigma = torch.tensor([0.1, 0.5, 0.9])
    target = FLOW.target(x0, noise, sigma)
    assert torch.equal(sample_losses(noise - x0, target, prediction=FLOW, sigma=sigma), torch.zeros(3).double())
