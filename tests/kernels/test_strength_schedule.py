"""Weights over a run: text, interpolation and clocks, against numpy.interp and closed forms."""

import math
import random

import numpy as np
import pytest
import torch

from lora_loom.kernels.strengths.schedule import Clock, ModelClock, Point, Schedule, fixed, parse, point_of


def karras(steps, low=0.0292, high=14.6146, rho=7.0):
    """The published schedule (Karras et al. 2022, eq. 5), as float32 like the host's, with a zero behind it."""
    ramp = np.linspace(0, 1, steps)
    sigmas = (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    return [*np.float32(sigmas).tolist(), 0.0]


def shifted(steps, shift):
    """Flow matching's levels with a shift: those near 1 lie close together."""
    t = np.linspace(1, 0, steps + 1)
    return np.float32(shift * t / (1 + (shift - 1) * t)).tolist()


def drawn(seed):
    return random.Random(seed)


# text


@pytest.mark.parametrize(
    ("text", "points", "interpolation", "inset"),
    [
        ("0.1@1,0.6@6", [(0.1, 0, "step"), (0.6, 5, "step")], "hold", 0),
        ("0@0.0,1@0.5", [(0, 0, "fraction"), (1, 0.5, "fraction")], "hold", 0),
        ("0@0,1@.5", [(0, 0, "fraction"), (1, 0.5, "fraction")], "hold", 0),
        (" -1 @ 0% , 1 @ 37.5 % ", [(-1, 0, "fraction"), (1, 0.375, "fraction")], "hold", 0),
        ("0.3@s14.6,1@2σ,0@sigma0.5", [(0.3, 14.6, "sigma"), (1, 2, "sigma"), (0, 0.5, "sigma")], "hold", 0),
        ("0@1,1@50%,2@s1", [(0, 0, "step"), (1, 0.5, "fraction"), (2, 1, "sigma")], "hold", 0),
        ("0@1,1@after2.5 cosine", [(0, 0, "step"), (1, 2.5, "step")], "cosine", 0),
        ("0@0%,1@50% linear of steps-2", [(0, 0, "fraction"), (1, 0.5, "fraction")], "linear", 2),
        ("1e-3@1,+2@1e-1", [(0.001, 0, "step"), (2, 0.1, "fraction")], "hold", 0),
    ],
)
def test_text_is_read_and_written(text, points, interpolation, inset):
    expected = Schedule(tuple(Point(*point) for point in points), interpolation, inset)
    assert parse(text, "te") == expected
    assert parse(str(expected), "te") == expected


@pytest.mark.parametrize("text", ["0.7", " 0.7 ", "0.7@5", "0.7@1,0.7@30%", "0.7@0%,0.7@1 linear"])
def test_what_never_changes_is_one_weight(text):
    schedule = parse(text, "te")
    assert schedule == fixed(0.7)
    assert schedule.constant == 0.7
    assert str(schedule) == "0.7"
    assert parse("0.7@1,0.8@2", "te").constant is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "te: '' is no weight; write a number"),
        ("a", "te: 'a' is no weight"),
        ("nan", "is no weight"),
        ("inf@1,0@2", "is no weight"),
        ("101", "te: 101 is too much, expected -100 to 100"),
        ("1e999", "is too much"),
        ("0.1,0.6@6", "'0.1' has no place; write 0.1@ and a step"),
        ("0.1@1,,0.6@6", "missing between the commas"),
        ("0.1@1;0.6@6", "'1;0.6@6' is no place"),
        ("0.1@-1,1@2", "'-1' is no place"),
        ("0.1@x,1@2", "a step (6), a part of the run (0.5 or 50%) or a noise level (s14.6)"),
        ("0.1@0,1@6", "steps count from 1; write @1 for the first"),
        ("0@0%,1@1.5", "fraction 1.5, expected 0 to 1; a number without a dot is a step"),
        ("0@0%,1@150%", "fraction 1.5"),
        ("0@1,1@100003", "step 100002, expected 0 to 100000"),
        ("0@1,1@2 wobbly", "'wobbly' behind the points, expected hold, linear, cosine or nothing"),
        ("0@3,1@3", "two weights for one place"),
        (",".join(f"{n % 2}@{n}" for n in range(1, 202)), "201 points, expected at most 200"),
        ("1" * 8001, "8001 letters, expected at most 8000"),
    ],
)
def test_other_text_is_refused_and_told_what_to_write(text, said):
    with pytest.raises(ValueError, match="te: ") as error:
        parse(text, "te")
    assert said in str(error.value)


def test_random_schedules_survive_their_text():
    draw = drawn(0)
    for _ in range(500):
        kinds = {
            "step": lambda: draw.choice([draw.randrange(100_000), draw.uniform(0, 99)]),
            "fraction": draw.random,
            "sigma": lambda: draw.expovariate(0.1) * 10 ** draw.randrange(-8, 8),
        }
        units = [draw.choice(list(kinds)) for _ in range(draw.randrange(2, 9))]
        points = tuple(Point(draw.uniform(-100, 100), float(kinds[unit]()), unit) for unit in units)
        schedule = Schedule(points, draw.choice(["hold", "linear", "cosine"]), draw.choice([0, 2]))
        assert parse(str(schedule), "te") == schedule


def test_schedules_that_make_no_sense_cannot_be_made():
    with pytest.raises(ValueError, match="0 points, expected 1 to 200"):
        Schedule(())
    with pytest.raises(ValueError, match="interpolation is 'spline', expected one of hold"):
        Schedule((Point(1, 0),), "spline")
    with pytest.raises(ValueError, match="by 'percent', expected step"):
        Schedule((Point(1, 0, "percent"),))
    with pytest.raises(ValueError, match="expected a finite number"):
        Schedule((Point(math.nan, 0),))
    with pytest.raises(ValueError, match="inset is -1"):
        Schedule((Point(1, 0),), inset=-1)


def test_scaled():
    schedule = parse("0.5@1,-2@6 linear", "te")
    assert schedule.scaled(-2) == parse("-1@1,4@6 linear", "te")
    assert schedule.scaled(0) == fixed(0)
    assert str(fixed(1).scaled(-0.0)) == "0"


# the clock of a run


@pytest.mark.parametrize("sigmas", [karras(20), karras(1), shifted(30, 1), shifted(1000, 12), [14.6, 5.1, 2.3, 1.2]])
def test_position_is_numpys_interpolation(sigmas):
    clock, draw = Clock(sigmas), drawn(1)
    assert clock.steps == len(sigmas) - 1
    levels = [sigmas[0] * 1.1 * draw.random() ** power for power in (1, 9) for _ in range(300)]
    found = [clock.position(level) for level in levels]
    expected = np.interp(levels, sigmas[::-1], np.arange(clock.steps, -1.0, -1.0))
    # levels that are equal in float32 count as equal: near 1, shifted levels lie a few roundings apart
    assert np.abs(np.array(found) - expected).max() < (1e-9 if clock.steps < 100 else 6e-3)


@pytest.mark.parametrize("sigmas", [karras(20), shifted(1000, 12.0), [*karras(7)[3:]]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_every_level_of_the_list_so_many_steps_are_done(sigmas, dtype):
    for clock, levels in ((Clock(sigmas), sigmas), (Clock(sigmas[::-1]), sigmas[::-1])):
        given = torch.tensor(levels, dtype=dtype)
        assert [clock.position(sigma) for sigma in given] == list(range(len(levels)))


def test_levels_that_were_computed_again_still_are_those_of_the_list():
    exact = [14.6146 * 0.8**n / 3 for n in range(30)]
    clock = Clock(exact)
    for index, sigma in enumerate(exact):
        assert clock.position(float(np.float32(sigma))) == index
        assert clock.position(float(np.float32(1) / (np.float32(1) / np.float32(sigma)))) == index


def test_a_rising_run_counts_its_own_steps():
    rising = karras(9)[::-1]
    clock = Clock(rising)
    levels = np.linspace(0, 15, 77)
    assert np.allclose([clock.position(level) for level in levels], np.interp(levels, rising, np.arange(10.0)))
    assert parse("0@1,1@4", "te").at(clock, rising[2]) == 0
    assert parse("0@1,1@4", "te").at(clock, rising[3]) == 1


def test_of_repeated_levels_the_last_counts():
    sigmas = [10.0, 10.0, 6.0, 6.0, 6.0, 2.0, 0.0, 0.0]
    clock = Clock(sigmas)
    assert [clock.position(level) for level in (12, 10, 6, 2, 0)] == [0, 1, 4, 5, 7]
    assert [clock.position(level * (1 + 1e-7)) for level in (10, 6, 2)] == [1, 4, 5]
    assert clock.position(8) == 1.5
    assert clock.position(4) == 4.5
    assert Clock([5.0, 5.0]).position(5.0) == 1
    assert Clock([5.0]).position(3.0) == 0


def test_levels_outside_the_run_belong_to_its_ends():
    clock = Clock([14.6, 5.09, 2.28, 1.16])
    assert [clock.position(level) for level in (1e9, 14.6001, 1.1599, 0.0)] == [0, 0, 3, 3]
    assert Clock([999999999.9, 4.09, 1.62, 0.0]).position(4.09) == 1


@pytest.mark.parametrize("sigmas", [[], [1.0, math.nan], [math.inf, 1.0], [5.0, 1.0, 2.0, 0.0]])
def test_other_lists_are_refused(sigmas):
    with pytest.raises(ValueError, match="noise levels"):
        Clock(sigmas)


# weights


@pytest.mark.parametrize("sigmas", [karras(20), shifted(20, 3.0), karras(20)[10:], karras(20)[::-1]])
def test_hold_switches_at_the_step_that_is_written(sigmas):
    clock, schedule = Clock(sigmas), parse("0.1@1,0.6@6,-1@9", "te")
    found = [schedule.at(clock, sigma) for sigma in sigmas[:-1]]
    assert found == ([0.1] * 5 + [0.6] * 3 + [-1.0] * 99)[: len(found)]


def test_hold_between_levels_as_samplers_of_second_order_ask():
    sigmas = karras(10)
    clock, schedule = Clock(sigmas), parse("0@1,1@6", "te")
    for index in range(9):
        middle = math.sqrt(sigmas[index] * sigmas[index + 1])
        assert schedule.at(clock, middle) == (0 if index < 5 else 1)
        assert schedule.at(clock, sigmas[index + 1]) == (0 if index + 1 < 5 else 1)  # heun looks ahead


def test_linear_and_cosine_between_points():
    draw = drawn(2)
    for trial in range(60):
        sigmas = draw.choice([karras, lambda n: shifted(n, 2.5)])(draw.randrange(3, 40))
        clock = Clock(sigmas)
        places = sorted(draw.sample(range(80), draw.randrange(2, 6)))
        heights = [draw.uniform(-2, 2) for _ in places]
        points = tuple(Point(height, float(place), "step") for height, place in zip(heights, places, strict=True))
        shuffled = tuple(draw.sample(points, len(points)))
        levels = sigmas[:-1] + [draw.uniform(0, sigmas[0]) for _ in range(20)]
        now = np.interp(levels, sigmas[::-1], np.arange(clock.steps, -1.0, -1.0))
        linear = [Schedule(shuffled, "linear").at(clock, level) for level in levels]
        assert np.allclose(linear, np.interp(now, places, heights), atol=1e-5), trial
        cosine = [Schedule(shuffled, "cosine").at(clock, level) for level in levels]
        part = np.interp(now, places, np.arange(len(places), dtype=float))
        low, share = np.floor(part).astype(int), part % 1
        high = np.minimum(low + 1, len(places) - 1)
        blend = (1 - np.cos(np.pi * share)) / 2
        assert np.allclose(cosine, np.array(heights)[low] * (1 - blend) + np.array(heights)[high] * blend, atol=1e-5)


def test_units_may_be_mixed_and_stand_in_any_order():
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.5, 0.0]
    clock, schedule = Clock(sigmas), parse("3@s1, 1@1, 4@80%, 2@3", "te")
    assert [schedule.at(clock, sigma) for sigma in sigmas[:-1]] == [1, 1, 2, 3, 4]
    linear = parse("0@s8, 1@s2 linear", "te")
    assert [linear.at(clock, sigma) for sigma in (8.0, 6.0, 4.0, 2.0, 1.0)] == [0, 0.25, 0.5, 1, 1]


def test_a_fraction_is_one_of_the_steps_whatever_their_levels_are():
    for sigmas in (karras(20), shifted(20, 5.0), shifted(20, 1.0)):
        clock, schedule = Clock(sigmas), parse("0@0%,1@50%,2@0.75", "te")
        assert [schedule.at(clock, sigma) for sigma in sigmas[:-1]] == [0] * 10 + [1] * 5 + [2] * 5


def test_a_percent_of_a_hundred_steps_is_one_step():
    """Though 7 % of 100 is 7.000000000000001."""
    sigmas = [float(n) for n in range(100, -1, -1)]
    clock = Clock(sigmas)
    for percent in range(1, 100):
        schedule = parse(f"0@0%,1@{percent}%", "te")
        assert [schedule.at(clock, sigma) for sigma in sigmas[percent - 1 : percent + 1]] == [0, 1], percent


def test_before_the_first_point_and_behind_the_last():
    clock = Clock([4.0, 3.0, 2.0, 1.0, 0.0])
    for how in ("hold", "linear", "cosine"):
        schedule = parse("5@2,7@3", "te", how)
        assert schedule.at(clock, 4.0) == 5
        assert schedule.at(clock, 0.5) == 7


def test_levels_that_a_run_does_not_reach_lie_outside_of_it():
    """A run over a part of the trajectory: what was passed before it holds, what comes after it does not."""
    clock, schedule = Clock([1.4, 1.1, 0.9]), parse("1@s14.6, 2@s5, 3@s1, 4@s0.5", "te")
    assert [schedule.at(clock, sigma) for sigma in (1.4, 1.1, 1.0, 0.9, 0.5)] == [2, 2, 3, 3, 3]
    backwards = Schedule(schedule.points[::-1])
    assert [backwards.at(clock, sigma) for sigma in (1.4, 1.1, 1.0, 0.9, 0.5)] == [2, 2, 3, 3, 3]
    linear = [parse("0@s2, 1@s0.6 linear", "te").at(clock, sigma) for sigma in (1.4, 1.25, 1.1, 1.0, 0.9)]
    assert 0 < linear[0] < linear[1] < linear[2] < linear[3] < linear[4] < 1


def test_inset_counts_fractions_as_loractl_does():
    draw = drawn(3)
    for steps in (3, 8, 20, 33):
        clock, sigmas = Clock(karras(steps)), karras(steps)
        places, heights = sorted(draw.random() for _ in range(4)), [draw.uniform(0, 1) for _ in range(4)]
        points = tuple(Point(height, place, "fraction") for height, place in zip(heights, places, strict=True))
        found = [Schedule(points, "linear", 2).at(clock, sigma) for sigma in sigmas[:-1]]
        assert np.allclose(found, np.interp(np.arange(steps) / (steps - 2), places, heights), atol=1e-5)
    short = parse("0@0%,1@100% linear of steps-2", "te")
    assert short.at(Clock([1.0, 0.0]), 1.0) == 1  # nothing is left to blend over


def test_dpm_adaptives_levels_give_a_rising_ramp():
    clock, draw = Clock(karras(3)), drawn(4)
    levels = sorted((math.exp(draw.uniform(-3.5, 2.6)) for _ in range(33)), reverse=True)
    ramp = [parse("0@0%,1@100% linear", "te").at(clock, level) for level in levels]
    assert ramp == sorted(ramp)
    assert all(0 <= weight <= 1 for weight in ramp)


# the model's clock


def test_the_models_time_knows_fractions_and_levels_but_no_steps():
    clock = ModelClock(lambda sigma: 1 - sigma)  # flow matching without a shift
    levels = np.linspace(1, 0, 23)
    linear = [parse("0.5@0.25,2@75% linear", "te").at(clock, level) for level in levels]
    assert np.allclose(linear, np.interp(1 - levels, [0.25, 0.75], [0.5, 2]))
    held = parse("0@0%,1@s0.7", "te")
    assert [held.at(clock, sigma) for sigma in (1.0, 0.71, 0.7, 0.1)] == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="1@6: the steps of the whole trajectory are not known here; connect"):
        parse("0@0%,1@6", "te").at(clock, 0.5)
    assert fixed(0.3).at(clock, 0.5) == 0.3


def test_one_point_alone():
    assert point_of("0.5@7", "start") == Point(0.5, 6.0, "step")
    with pytest.raises(ValueError, match="start: '5,3@2' is no place"):
        point_of("1@5,3@2", "start")
