"""Options: senseless values are named, plans survive JSON, lengths count in every unit."""

import dataclasses
import math

import pytest

from lora_loom.training.settings import (
    AdapterSettings,
    ComponentSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Plan,
    RunSettings,
    plan_from_json,
)


@pytest.mark.parametrize(
    "kind, option, value",
    (
        *((Plan, "length", value) for value in (0, -1)),
        (Plan, "unit", "minutes"),
        *((Plan, "learning_rate", value) for value in (0.0, -1e-4, math.nan, math.inf)),
        *((Plan, "rank", value) for value in (0, -4)),
        *((Plan, "alpha", value) for value in (0.0, math.nan)),
        (Plan, "batch_size", 0),
        (AdapterSettings, "conv_rank", -1),
        (AdapterSettings, "conv_alpha", math.inf),
        (AdapterSettings, "conv_alpha", 0.0),
        (OptimizerSettings, "optimizer", "Adam2"),
        *((OptimizerSettings, "weight_decay", value) for value in (-0.1, math.nan)),
        *((OptimizerSettings, "beta1", value) for value in (-0.1, 1.0, math.nan)),
        *((OptimizerSettings, "beta2", value) for value in (-0.1, 1.0)),
        (OptimizerSettings, "epsilon", 0.0),
        (OptimizerSettings, "schedule", "zigzag"),
        (OptimizerSettings, "warmup_steps", -1),
        *((OptimizerSettings, "max_grad_norm", value) for value in (-1.0, math.nan)),
        (OptimizerSettings, "gradient_accumulation", 0),
        (ObjectiveSettings, "timesteps", "sigmoid"),
        (ObjectiveSettings, "logit_mean", math.nan),
        *((ObjectiveSettings, "logit_std", value) for value in (0.0, -1.0, math.nan)),
        (RunSettings, "on_cancel", "panic"),
        (RunSettings, "save_every", -1),
    ),
)
def test_a_senseless_option_is_named(kind, option, value):
    with pytest.raises(ValueError, match=rf"^{option} is .*expected "):
        kind(**{option: value})


@pytest.mark.parametrize(
    "bound, error",
    (
        ({"adapter": AdapterSettings(max_norm=1.0)}, "^max_norm is 1.0, expected 0: .* AdamW$"),
        (
            {"components": ComponentSettings(embeddings="my_cat: 1 cat", preserve_embedding_norm=True)},
            "^preserve_embedding_norm is True, expected False: .* AdamW$",
        ),
    ),
)
def test_a_bound_that_averaged_weights_would_not_keep_to_is_refused(bound, error):
    for name in ("AdamWScheduleFree", "ProdigyPlusScheduleFree"):
        with pytest.raises(ValueError, match=error):
            Plan(optimizer=OptimizerSettings(optimizer=name), **bound)
    plain = OptimizerSettings(optimizer="ProdigyPlusScheduleFree", optimizer_args="use_schedulefree=False")
    Plan(optimizer=plain, **bound)
    Plan(**bound)


def test_a_plan_survives_json():
    original = Plan(
        length=7,
        unit="epochs",
        learning_rate=3.3e-5,
        seed=2**64 - 1,
        adapter=AdapterSettings(conv_rank=4),
        optimizer=OptimizerSettings(schedule="cosine", beta2=0.99),
        objective=ObjectiveSettings(timesteps="logit-normal", logit_mean=-0.3),
        run=RunSettings(save_every=50),
    )
    assert plan_from_json(original.to_json()) == original
    assert dataclasses.asdict(plan_from_json(Plan().to_json())) == dataclasses.asdict(Plan())


@pytest.mark.parametrize(
    "unit, length, accumulation, expected",
    (
        ("steps", 37, 1, 37),
        ("steps", 37, 4, 37),  # steps are the optimizer's whatever they are made of
        ("epochs", 3, 1, 15),
        ("epochs", 3, 2, 8),
        ("epochs", 1, 64, 1),
        ("presentations per image", 10, 1, 50),
        ("presentations per image", 10, 4, 13),
    ),
)
def test_length_in_every_unit(unit, length, accumulation, expected):
    """An epoch of 5 batches."""
    settings = OptimizerSettings(gradient_accumulation=accumulation)
    assert Plan(length=length, unit=unit, optimizer=settings).steps_for(lambda epochs: 5 * epochs) == expected
