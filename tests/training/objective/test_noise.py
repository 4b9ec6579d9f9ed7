"""Offset, multi-resolution and perturbed noise: their formulas, their draws, and every kind of model."""

import pytest
import torch

from lora_loom.training.objective import Prediction, add_noise
from lora_loom.training.objective.noise import multires
from lora_loom.training.settings import ObjectiveSettings

E, V, FLOW = Prediction
SHAPES = ((3, 4, 9, 6), (2, 3, 2, 5, 8))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(shape, seed=1):
    return torch.randn(shape, generator=seeded(seed)) + torch.arange(shape[1]).view(-1, *(1 for _ in shape[2:]))


def noise_of(x0, seed=7, **options):
    """The noise that a run draws, read off the target of noise prediction."""
    return add_noise(x0, torch.ones(len(x0)), E, ObjectiveSettings(**options), seeded(seed)).target


def replayed(shape, *draws, seed=7):
    """What the generator gives after the noise itself: torch.randn or torch.rand, and a shape each."""
    generator = seeded(seed)
    return torch.randn(shape, generator=generator), *(make(size, generator=generator) for make, size in draws)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", Prediction)
def test_plain_noise_is_the_generators_own(kind, shape):
    x0, sigma, draws = latents(shape), torch.rand(shape[0], generator=seeded(3)), seeded(7)
    noised = add_noise(x0, sigma, kind, ObjectiveSettings(), draws)
    generator = seeded(7)
    noise = torch.randn(shape, generator=generator)
    assert torch.equal(noised.noisy, kind.noisy(x0, noise, sigma))
    assert torch.equal(noised.target, kind.target(x0, noise, sigma))
    assert torch.equal(draws.get_state(), generator.get_state())


@pytest.mark.parametrize("options", ({"noise_offset": 0.3}, {"multires_noise_iterations": 3}), ids=str)
@pytest.mark.parametrize("kind", Prediction)
def test_the_same_noise_is_shown_and_asked_for_by_every_kind(kind, options):
    """Flow models too, which a peer forgets."""
    x0, sigma = latents(SHAPES[0]), torch.tensor([0.2, 0.5, 0.8])
    noise = noise_of(x0, **options)
    noised = add_noise(x0, sigma, kind, ObjectiveSettings(**options), seeded(7))
    assert torch.equal(noised.noisy, kind.noisy(x0, noise, sigma))
    assert torch.equal(noised.target, kind.target(x0, noise, sigma))
    assert not torch.equal(noise, noise_of(x0))


@pytest.mark.parametrize("shape", SHAPES)
def test_offset_is_one_number_for_each_sample_and_channel(shape):
    noise, normal = replayed(shape, (torch.randn, (*shape[:2], *(1 for _ in shape[2:]))))
    assert torch.equal(noise_of(latents(shape), noise_offset=0.4), noise + 0.4 * normal)


def test_offset_adds_its_square_to_the_variance():
    x0 = torch.zeros(4000, 4, 2, 2)
    assert noise_of(x0, noise_offset=0.5).var().item() == pytest.approx(1.25, rel=0.03)
    means = noise_of(x0, noise_offset=0.5).mean((2, 3))
    assert means.var().item() == pytest.approx(0.25 + 1 / 4, rel=0.05)


def test_offset_of_random_strength_is_drawn_for_each_picture():
    shape = (5, 4, 3, 3)
    noise, normal, strength = replayed(shape, (torch.randn, (5, 4, 1, 1)), (torch.rand, (5,)))
    got = noise_of(latents(shape), noise_offset=0.4, noise_offset_random=True)
    torch.testing.assert_close(got, noise + 0.4 * strength.view(5, 1, 1, 1) * normal)
    assert strength.unique().numel() == 5


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("growth", (0.1, -0.2))
def test_adaptive_offset_follows_the_mean_of_the_latent(shape, growth):
    """w + a · |mean x0| of each channel, never below 0."""
    x0 = latents(shape)
    one_each = (*shape[:2], *(1 for _ in shape[2:]))
    noise, normal = replayed(shape, (torch.randn, one_each))
    strength = 0.3 + growth * x0.mean(tuple(range(2, x0.ndim)), keepdim=True).abs()
    got = noise_of(x0, noise_offset=0.3, adaptive_noise_offset=growth)
    torch.testing.assert_close(got, noise + strength.clamp(min=0) * normal)
    assert (strength < 0).any() == (growth < 0)


@pytest.mark.parametrize("shape", ((1, 4, 64, 48), *SHAPES, (2, 3, 1, 8)))
@pytest.mark.parametrize("iterations", (1, 6, 16))
def test_multires_has_variance_one_in_each_sample(shape, iterations):
    noise = noise_of(latents(shape), multires_noise_iterations=iterations, multires_noise_discount=0.8)
    assert noise.shape == shape
    torch.testing.assert_close(noise.flatten(1).std(1), torch.ones(shape[0]))


def test_multires_of_a_picture_does_not_depend_on_its_neighbours():
    """A peer divides by the standard deviation of the whole batch."""
    noise = torch.randn(2, 4, 16, 16, generator=seeded())
    louder = torch.stack([noise[0], 50 * noise[1]])
    one, other = (multires(given, 5, 0.5, seeded(2)) for given in (noise, louder))
    assert torch.equal(one[0], other[0]) and not torch.equal(one[1], other[1])


def test_multires_adds_coarse_layers_only():
    """Begun at full size, as peers do, half of the noise's power is another one's: correlation 1/√2 at best."""
    noise = torch.randn(64, 4, 32, 32, generator=seeded())
    faint, usual = (multires(noise, 6, discount, seeded(2)) for discount in (0.0, 0.3))
    again = torch.corrcoef(torch.stack([noise.flatten(), faint.flatten()]))[0, 1]
    assert again.item() == pytest.approx(1, abs=1e-4)
    assert torch.corrcoef(torch.stack([noise.flatten(), usual.flatten()]))[0, 1] > 0.95
    peers = noise + torch.randn(noise.shape, generator=seeded(3))
    correlation = torch.corrcoef(torch.stack([noise.flatten(), peers.flatten()]))[0, 1].item()
    assert correlation == pytest.approx(0.70, abs=0.01)


def published(noise, iterations, discount, draws):
    """Pyramid noise as its author gives it (Whitaker 2023), with the first layer in full size."""
    batch, channels, height, width = noise.shape
    for i in range(iterations):
        ratio = 2 + 2 * torch.rand((), generator=draws).item()
        size = max(1, int(height / ratio**i)), max(1, int(width / ratio**i))
        layer = torch.randn(batch, channels, *size, generator=draws)
        noise = noise + torch.nn.functional.interpolate(layer, (height, width), mode="bilinear") * discount**i
        if 1 in size:
            break
    return noise / noise.std()


@pytest.mark.parametrize("discount", (0.3, 0.8))
@pytest.mark.parametrize("places", (2, 4, 16))
def test_multires_is_distributed_as_published(places, discount):
    """Means over squares of many places have more variance than white noise's, and as much as the published ones'."""
    ours, theirs = [], []
    for seed in range(40):  # a size of layers each
        noise = torch.randn(32, 4, 32, 32, generator=seeded(seed))
        ours.append(multires(noise, 5, discount, seeded(seed + 1000)))
        theirs.append(published(noise, 6, discount, seeded(seed + 2000)))
    variances = [
        torch.nn.functional.avg_pool2d(torch.cat(parts), places).var().item() * places**2 for parts in (ours, theirs)
    ]
    assert variances[0] == pytest.approx(variances[1], rel=0.1) and variances[0] > 1.05


def test_multires_frames_have_layers_of_their_own():
    noise = multires(torch.zeros(1, 2, 3, 16, 16), 1, 1.0, seeded(1))
    frames = noise[0].flatten(0, 1).flatten(1)
    assert (torch.corrcoef(frames) - torch.eye(6)).abs().max() < 0.6


def test_offset_on_top_of_multires_keeps_its_strength():
    both = noise_of(torch.zeros(2000, 4, 4, 4), multires_noise_iterations=4, noise_offset=1.0)
    alone = noise_of(torch.zeros(2000, 4, 4, 4), multires_noise_iterations=4)
    difference = both - alone
    assert (difference - difference[..., :1, :1]).abs().max() < 1e-5
    assert difference[..., 0, 0].var().item() == pytest.approx(1, rel=0.06)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", Prediction)
def test_input_perturbation_is_shown_but_not_asked_for(kind, shape):
    """x with ε + γ ξ, the target with ε; a peer puts it into both."""
    x0, sigma = latents(shape), torch.rand(shape[0], generator=seeded(3))
    noised = add_noise(x0, sigma, kind, ObjectiveSettings(input_perturbation=0.1), seeded(7))
    noise, more = replayed(shape, (torch.randn, shape))
    assert torch.equal(noised.target, kind.target(x0, noise, sigma))
    torch.testing.assert_close(noised.noisy, kind.noisy(x0, noise + 0.1 * more, sigma))
    assert not torch.equal(noised.noisy, kind.noisy(x0, noise, sigma))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
def test_noise_has_the_dtype_of_the_latents(dtype):
    everything = ObjectiveSettings(
        noise_offset=0.1, adaptive_noise_offset=0.1, multires_noise_iterations=2, input_perturbation=0.1
    )
    noised = add_noise(latents(SHAPES[0]).to(dtype), torch.rand(3), V, everything, seeded())
    assert noised.noisy.dtype == noised.target.dtype == dtype
