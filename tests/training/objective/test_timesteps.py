"""Timesteps follow the published densities, also cut to a range and shifted, with one draw each."""

import math

import numpy as np
import pytest
import torch

from lora_loom.training.objective import Prediction, draw_times
from lora_loom.training.objective.timesteps import time_shift
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ObjectiveSettings

E, V, FLOW = Prediction
COUNT = 20000
GRID = np.linspace(0, 1, 200001)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def distance_to_uniform(values):
    """Kolmogorov–Smirnov statistic, times √n: above 1.63 in one of a hundred fair samples."""
    ordered, n = torch.as_tensor(values).sort().values, len(values)
    ranks = torch.arange(n + 1, dtype=torch.float64) / n
    return max((ranks[1:] - ordered).max(), (ordered - ranks[:-1]).max()).item() * n**0.5


def area_below(density):
    """Distribution function on GRID by the trapezoidal rule."""
    with np.errstate(divide="ignore", invalid="ignore"):
        height = density(GRID)
    steps = np.concatenate([[0.0], np.cumsum((height[1:] + height[:-1]) / 2 * np.diff(GRID))])
    return lambda times: np.interp(times, GRID, steps / steps[-1])


def logit_normal(mean, std):
    def below(times):
        with np.errstate(divide="ignore"):
            logits = np.log(times) - np.log1p(-np.asarray(times))
        return torch.special.ndtr(torch.as_tensor((logits - mean) / std)).numpy()

    return below


def sd3_mode(scale):
    """f_mode(u; s) = 1 − u − s (cos²(π/2 u) − 1 + u) of a uniform u, falling in u (Esser et al. 2024, eq. 20)."""
    times = 1 - GRID - scale * (np.cos(np.pi / 2 * GRID) ** 2 - 1 + GRID)
    return lambda wanted: 1 - np.interp(wanted, times[::-1], GRID[::-1])


def sd3_cosmap(time):
    """π(t) = 2 / (π − 2πt + 2πt²) (Esser et al. 2024, eq. 21)."""
    return 2 / (np.pi - 2 * np.pi * time + 2 * np.pi * time**2)


def drawn(*points):
    return lambda times: np.interp(times, *np.array(points, dtype=float).T)


CASES = {
    "uniform": (dict(timesteps="uniform"), lambda times: times),
    "logit-normal": (dict(timesteps="logit-normal"), logit_normal(0, 1)),
    "logit-normal, noisier": (dict(timesteps="logit-normal", logit_mean=1.5, logit_std=2.0), logit_normal(1.5, 2)),
    "logit-normal, cleaner": (dict(timesteps="logit-normal", logit_mean=-0.8, logit_std=0.5), logit_normal(-0.8, 0.5)),
    "mode 1.29": (dict(timesteps="mode"), sd3_mode(1.29)),
    "mode -1": (dict(timesteps="mode", mode_scale=-1.0), sd3_mode(-1.0)),
    "mode 1.75": (dict(timesteps="mode", mode_scale=1.75), sd3_mode(1.75)),
    "cosmap": (dict(timesteps="cosmap"), area_below(sd3_cosmap)),
    "curve": (
        dict(timesteps="curve", timestep_curve="0:1, 0.5:3, 1:0"),
        area_below(drawn((0, 1), (0.5, 3), (1, 0))),
    ),
    "curve from zero": (dict(timesteps="curve", timestep_curve="0:0,1:2"), area_below(drawn((0, 0), (1, 2)))),
    "curve with a gap": (
        dict(timesteps="curve", timestep_curve="0.1:1, 0.3:1, 0.3:0, 0.6:0, 0.9:4"),
        area_below(lambda t: ((0.1 <= t) & (t <= 0.3)) * 1.0 + ((0.6 < t) & (t <= 0.9)) * (t - 0.6) / 0.3 * 4),
    ),
}


@pytest.mark.parametrize("shift", (1.0, 3.0, 0.4))
@pytest.mark.parametrize("low, high", ((0, 1000), (0, 400), (200, 1000), (333, 750)))
@pytest.mark.parametrize("name", CASES)
def test_times_follow_the_density_cut_to_the_range_after_the_shift(name, low, high, shift):
    """1000 t stays in the range; within it, the times before the shift are as likely as the density says."""
    options, below = CASES[name]
    moved = {} if shift == 1 else {"timestep_shift": "fixed", "shift": shift}
    settings = ObjectiveSettings(**options, **moved, min_timestep=low, max_timestep=high)
    times = draw_times(COUNT, FLOW, settings, seeded(3))
    assert times.dtype == torch.float64 and times.shape == (COUNT,)
    assert low / 1000 <= times.min() and times.max() < high / 1000

    def back(time):
        return time / (shift - (shift - 1) * time)

    first, last = below(np.array(back(low / 1000))), below(np.array(back(high / 1000)))
    parts = (below(back(times.numpy())) - first) / (last - first)
    assert distance_to_uniform(parts) < 1.63


@pytest.mark.parametrize("kind", Prediction)
def test_automatic_is_logit_normal_for_flow_and_uniform_for_the_others(kind):
    named = "logit-normal" if kind is FLOW else "uniform"
    automatic, explicit = (
        draw_times(50, kind, ObjectiveSettings(timesteps=choice), seeded()) for choice in ("automatic", named)
    )
    assert torch.equal(automatic, explicit)


def test_plain_draws_are_the_generators_own():
    """Nothing but the draw itself, so that a seed means what it always meant."""
    uniform = draw_times(9, E, ObjectiveSettings(), seeded(4))
    assert torch.equal(uniform, torch.rand(9, generator=seeded(4), dtype=torch.float64))
    normal = draw_times(9, FLOW, ObjectiveSettings(logit_mean=0.5, logit_std=0.7), seeded(4))
    expected = torch.sigmoid(0.5 + 0.7 * torch.randn(9, generator=seeded(4), dtype=torch.float64))
    assert torch.equal(normal, expected)


@pytest.mark.parametrize("name", CASES)
def test_each_time_takes_one_draw_whatever_is_set(name):
    options = CASES[name][0]
    draw = torch.randn if options["timesteps"] == "logit-normal" else torch.rand
    plain = seeded(1)
    draw(7, generator=plain, dtype=torch.float64)
    for more in ({}, {"min_timestep": 100, "max_timestep": 800}, {"timestep_shift": "resolution"}):
        used = seeded(1)
        draw_times(7, V, ObjectiveSettings(**options, **more), used, pixels=512 * 512)
        assert torch.equal(used.get_state(), plain.get_state())


@pytest.mark.parametrize("side, expected", ((512, 1.88), (768, 2.33), (1024, 3.16), (1536, 7.51)))
def test_shift_by_resolution(side, expected):
    settings = ObjectiveSettings(timestep_shift="resolution")
    assert time_shift(settings, side * side) == pytest.approx(expected, abs=0.005)
    plain = draw_times(100, FLOW, ObjectiveSettings(), seeded(), side * side)
    moved = draw_times(100, FLOW, settings, seeded(), side * side)
    torch.testing.assert_close(moved.logit(), plain.logit() + math.log(time_shift(settings, side * side)))


def test_shift_is_s_t_over_one_plus_s_minus_one_t():
    fixed = ObjectiveSettings(timestep_shift="fixed", shift=6.5, timesteps="uniform")
    plain = draw_times(100, E, ObjectiveSettings(), seeded())
    torch.testing.assert_close(draw_times(100, E, fixed, seeded()), 6.5 * plain / (1 + 5.5 * plain), rtol=1e-12, atol=0)


def test_limits_are_those_of_the_table():
    """A range of one thousandth gives that entry of a table of 1000, whatever rounding does."""
    for first in range(1000):
        settings = ObjectiveSettings(min_timestep=first, max_timestep=first + 1, timestep_shift="fixed", shift=5.0)
        times = draw_times(3, V, settings, seeded(first))
        assert (times * 1000).long().tolist() == [first] * 3


@pytest.mark.parametrize("sign, low, high", ((1, 0, 100), (-1, 900, 1000)))
def test_tails_of_the_logit_normal(sign, low, high):
    """Five and a half standard deviations from the centre, on either side."""
    settings = ObjectiveSettings(
        timesteps="logit-normal", logit_mean=sign * 2.0, logit_std=0.76, min_timestep=low, max_timestep=high
    )
    times = draw_times(COUNT, V, settings, seeded(2))
    far = (2.0 - sign * times.logit()) / 0.76  # a normal number, given that it is beyond the edge
    edge = torch.tensor((2.0 + math.log(9)) / 0.76, dtype=torch.float64)
    assert 5.4 < edge <= far.min() + 1e-6
    assert distance_to_uniform(torch.special.ndtr(-far) / torch.special.ndtr(-edge)) < 1.63


def test_extreme_times_stay_below_one():
    settings = ObjectiveSettings(timesteps="logit-normal", logit_mean=5.0, logit_std=5.0)
    times = draw_times(100, FLOW, settings, seeded())
    assert times.max() < 1 and times.float().max() < 1


@pytest.mark.parametrize(
    "options, named",
    (
        (dict(timesteps="curve", timestep_curve="0:1, 0.5:0, 1:0", min_timestep=500), "timestep_curve"),
        (dict(timesteps="logit-normal", logit_mean=-5.0, logit_std=0.1, min_timestep=900), "logit_mean and logit_std"),
    ),
)
def test_a_range_that_is_never_drawn_is_refused(options, named):
    with pytest.raises(OptionError, match=f"min_timestep is .* never drawn between them: widen the range, .*{named}"):
        draw_times(1, FLOW, ObjectiveSettings(**options), seeded())


@pytest.mark.parametrize(
    "curve, named",
    (
        ("0:1, 0.5", "'0.5' is no point"),
        ("0:1, x:2", "'x:2' is no point"),
        ("0:1:2, 1:2", "'0:1:2' is no point"),
        ("-0.1:1, 1:2", "time of '-0.1:1'"),
        ("0:1, 1.5:2", "time of '1.5:2'"),
        ("0:1, nan:2", "time of 'nan:2'"),
        ("0:1, 1:-2", "weight of '1:-2'"),
        ("0:inf, 1:2", "weight of '0:inf'"),
        ("0:1, 0.7:1, 0.5:3", "0.5:3 comes after 0.7"),
        ("0:1", "two points or more"),
        ("0.5:1, 0.5:3", "more than 0 somewhere"),
        ("0:0, 1:0", "more than 0 somewhere"),
        (" , ", "two points or more"),
    ),
)
def test_curves_that_are_none_are_refused_at_once(curve, named):
    with pytest.raises(OptionError, match=f"timestep_curve.*{named}"):
        ObjectiveSettings(timesteps="curve", timestep_curve=curve)
