"""Learning-rate schedules against the functions of transformers, and against OneTrainer's formula for REX."""

import ast
import dataclasses
import functools
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lora_loom.training.options import OptionError, options_of
from lora_loom.training.schedules import SCHEDULES, Schedule, check_length, rate_factor
from lora_loom.training.settings import OptimizerSettings

LENGTHS = ((40, 0), (40, 7), (101, 1), (17, 16), (3, 0), (1, 0))
FREE = ("constant", "inverse-sqrt")


def schedules_of_transformers():
    """Its functions without the package, whose import takes half a minute."""
    [folder] = importlib.util.find_spec("transformers").submodule_search_locations
    tree = ast.parse((Path(folder) / "optimization.py").read_text(encoding="utf-8"))
    wanted = ("constant", "cosine", "polynomial", "inverse", "wsd")
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name.removeprefix("_").split("_")[1] in wanted
    ]
    names = {"math": math, "partial": functools.partial, "LambdaLR": LambdaLR, "Optimizer": torch.optim.Optimizer}
    exec(compile(ast.fix_missing_locations(tree), "optimization.py", "exec"), names)
    return SimpleNamespace(**{name: value for name, value in names.items() if name.startswith("get_")})


optimization = schedules_of_transformers()


def optimizer():
    return torch.optim.SGD([torch.zeros(1)], lr=1.0)


def oracle(name, warmup, total, minimum=0.0, cycles=1.0, power=1.0, decay=0):
    """factor(step) of transformers, whose warm-up begins at zero: theirs of the next step is ours of this one."""
    if name == "constant":
        made = optimization.get_constant_schedule_with_warmup(optimizer(), warmup)
    elif name == "linear":
        made = optimization.get_polynomial_decay_schedule_with_warmup(optimizer(), warmup, total, minimum, 1.0)
    elif name == "cosine":
        made = optimization.get_cosine_with_min_lr_schedule_with_warmup(
            optimizer(), warmup, total, min_lr_rate=minimum
        )
    elif name == "cosine with restarts":
        made = optimization.get_cosine_with_hard_restarts_schedule_with_warmup(optimizer(), warmup, total, cycles)
    elif name == "polynomial":
        made = optimization.get_polynomial_decay_schedule_with_warmup(optimizer(), warmup, total, minimum, power)
    elif name == "inverse-sqrt":
        made = optimization.get_inverse_sqrt_schedule(optimizer(), warmup)
    else:
        made = optimization.get_wsd_schedule(optimizer(), warmup, decay, total, min_lr_ratio=minimum)
    theirs = made.lr_lambdas[0]

    def factor(step):
        if step < warmup:  # the minimum is no part of our warm-up
            return (step + 1) / warmup
        return theirs(step)

    return factor


@pytest.mark.parametrize("total, warmup", LENGTHS)
@pytest.mark.parametrize(
    "name, options",
    (
        ("constant", {}),
        ("linear", {}),
        ("linear", {"minimum": 0.25}),
        ("cosine", {}),
        ("cosine", {"minimum": 0.1}),
        ("cosine with restarts", {}),
        ("cosine with restarts", {"cycles": 3.0}),
        ("cosine with restarts", {"cycles": 2.5}),
        ("polynomial", {"power": 2.0}),
        ("polynomial", {"power": 0.5, "minimum": 0.01}),
        ("inverse-sqrt", {}),
        ("warm-up-stable-decay", {"decay": 1}),
    ),
)
def test_schedules_are_those_of_transformers(name, options, total, warmup):
    words = {"minimum": "min_lr_factor", "decay": "decay_steps"}
    given = {words.get(key, key): value for key, value in options.items()}
    settings = OptimizerSettings(schedule=name, warmup_steps=warmup, **given)
    theirs = oracle(name, warmup, total, **options)
    for step in range(total):
        assert rate_factor(step, total, settings) == pytest.approx(theirs(step), abs=1e-12), step


@pytest.mark.parametrize("warmup, decay", ((0, 10), (5, 20), (10, 30), (0, 40)))
def test_warm_up_stable_decay_is_that_of_transformers(warmup, decay):
    settings = OptimizerSettings(
        schedule="warm-up-stable-decay", warmup_steps=warmup, decay_steps=decay, min_lr_factor=0.2
    )
    theirs = oracle("warm-up-stable-decay", warmup, 40, 0.2, decay=decay)
    assert [rate_factor(step, 40, settings) for step in range(45)] == pytest.approx([theirs(s) for s in range(45)])


def test_warm_up_stable_decay_falls_over_the_last_fifth_unless_told_otherwise():
    settings = OptimizerSettings(schedule="warm-up-stable-decay")
    factors = [rate_factor(step, 50, settings) for step in range(50)]
    assert factors[:41] == [1.0] * 41 and all(a > b for a, b in zip(factors[40:], factors[41:], strict=False))


@pytest.mark.parametrize("minimum", (0.0, 0.3))
def test_rex_is_onetrainers(minimum):
    settings = OptimizerSettings(schedule="REX", min_lr_factor=minimum)
    for step in range(60):
        progress = min(1.0, step / 50)
        published = (1 - progress) / ((1 - 0.9) + 0.9 * (1 - progress))
        assert rate_factor(step, 50, settings) == pytest.approx(minimum + (1 - minimum) * published)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("warmup", (0, 6))
def test_every_schedule_is_a_rate(name, warmup):
    """Between 0 and 1, at 1 right after the warm-up, rising before; what falls ends at its minimum and stays there."""
    minimum = {} if name in FREE else {"min_lr_factor": 0.125}
    settings = OptimizerSettings(schedule=name, warmup_steps=warmup, **minimum)
    factors = [rate_factor(step, 30, settings) for step in range(40)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == pytest.approx([(step + 1) / 6 for step in range(warmup)] + [1.0])
    assert name in FREE or factors[30:] == [0.125] * 10
    assert all(a >= b for a, b in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


@pytest.mark.parametrize("name", SCHEDULES)
def test_only_schedules_without_an_end_are_free_of_a_horizon(name):
    settings = OptimizerSettings(schedule=name, warmup_steps=4)
    short, long = Schedule(settings, 30), Schedule(settings, 60)
    same = all(short.factor(step) == long.factor(step) for step in range(30))
    assert short.horizon_free == same == (name in FREE)


def test_lengths_in_epochs():
    inner = {"schedule": "warm-up-stable-decay", "warmup_steps": 2, "decay_steps": 3, "horizon": 10}
    epochs = Schedule.of_run(OptimizerSettings(schedule_unit="epochs", **inner), 60, 7.5)
    steps = Schedule.of_run(OptimizerSettings(**inner | {"warmup_steps": 15, "decay_steps": 22, "horizon": 75}), 60)
    assert epochs.length == steps.length == 75
    assert [epochs.factor(step) for step in range(80)] == [steps.factor(step) for step in range(80)]


def test_a_segment_begins_where_it_is_told():
    settings = OptimizerSettings(schedule="cosine", warmup_steps=3)
    assert [Schedule(settings, 20, start=100).factor(100 + step) for step in range(20)] == [
        Schedule(settings, 20).factor(step) for step in range(20)
    ]


def test_a_stated_horizon_makes_a_run_the_beginning_of_a_longer_one():
    settings = OptimizerSettings(schedule="cosine", horizon=80)
    part, whole = Schedule.of_run(settings, 30), Schedule.of_run(dataclasses.replace(settings, horizon=0), 80)
    assert [part.factor(step) for step in range(30)] == [whole.factor(step) for step in range(30)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    "option, value",
    (("min_lr_factor", 0.3), ("cycles", 2.0), ("power", 2.0), ("decay_steps", 9), ("horizon", 70), ("warmup_steps", 5)),
)
def test_every_option_changes_the_schedule_or_is_refused(name, option, value):
    plain = OptimizerSettings(schedule=name)
    try:
        other = OptimizerSettings(schedule=name, **{option: value})
    except OptionError as error:
        assert str(error).startswith(f"{option} is {value!r}, expected {options_of(OptimizerSettings)[option][1]!r}")
        assert name in str(error)
        return
    before, after = (Schedule.of_run(settings, 50) for settings in (plain, other))
    assert [before.factor(step) for step in range(50)] != [after.factor(step) for step in range(50)]


def test_a_unit_with_nothing_to_count_is_refused():
    with pytest.raises(OptionError, match="^schedule_unit is 'epochs', expected 'steps'"):
        OptimizerSettings(schedule_unit="epochs")


@pytest.mark.parametrize(
    "options, message",
    (
        ({"warmup_steps": 51}, "^warmup_steps is 51 steps, expected at most the 50 of the run"),
        ({"schedule_unit": "epochs", "warmup_steps": 6}, "^warmup_steps is 60 steps"),
        ({"schedule": "cosine", "horizon": 49}, "^horizon is 49 steps, expected 0 or at least the 50"),
        (
            {"schedule": "warm-up-stable-decay", "warmup_steps": 20, "decay_steps": 31},
            "^decay_steps is 31 steps, expected at most 30",
        ),
    ),
)
def test_lengths_that_do_not_fit_the_run_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        check_length(OptimizerSettings(**options), 50, 10.0)


def test_lengths_that_just_fit_are_taken():
    settings = OptimizerSettings(schedule="warm-up-stable-decay", warmup_steps=20, decay_steps=30, horizon=50)
    schedule = Schedule.of_run(settings, 50)
    assert schedule.factor(19) == schedule.factor(20) == 1.0 and schedule.factor(49) < 0.01
    assert math.isclose(schedule.factor(0), 1 / 20)
