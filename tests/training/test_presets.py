"""Presets: they name real options, fill what is not given, survive their file, and say when they were changed."""

import dataclasses
import json

import pytest

from lora_loom.training.options import OptionError, options_of
from lora_loom.training.presets import (
    KINDS,
    PRESETS,
    Preset,
    checked,
    from_json,
    from_recipe,
    label,
    settings,
    to_json,
)
from lora_loom.training.settings import AdapterSettings, ComponentSettings, ObjectiveSettings, OptimizerSettings, Plan


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_plan(name):
    preset = PRESETS[name]
    assert checked(preset) is preset and preset.description.endswith(".")
    parts = {part: settings(part, preset, {}) for part in KINDS if part != "trainer"}
    plan = Plan(**preset.options("trainer"), **parts)
    assert plan != Plan()
    for part in KINDS:
        chosen = plan if part == "trainer" else parts[part]
        for option, value in preset.options(part).items():
            assert getattr(chosen, option) == value


def test_the_guides_presets_say_what_the_guide_says():
    adam, prodigy = PRESETS["guide: Adam"], PRESETS["guide: Prodigy"]
    assert adam.options("optimizer")["schedule"] == "cosine with restarts"
    assert (prodigy.options("trainer")["learning_rate"], prodigy.options("trainer")["alpha"]) == (1.0, 1.0)
    chosen = settings("optimizer", prodigy, {})
    assert (chosen.schedule, chosen.weight_decay, chosen.beta1, chosen.beta2) == ("cosine", 0.1, 0.9, 0.99)
    assert "decouple=True" in chosen.optimizer_args
    for preset in (adam, prodigy):
        assert preset.options("trainer")["rank"] == 32
        assert preset.options("adapter")["conv_rank"] == 16 and preset.options("adapter")["conv_alpha"] == 1.0
        assert preset.options("objective") == {"min_snr_gamma": 5.0, "debiased": True}
        parts = {part: settings(part, preset, {}) for part in KINDS if part != "trainer"}
        assert Plan(**preset.options("trainer"), **parts).loraplus_ratio == 1  # the guide knows no LoRA+


def test_what_is_given_wins_and_is_told():
    guide = PRESETS["guide: Adam"]
    plain = settings("adapter", guide, {})
    assert (plain.layers, plain.conv_rank, plain.preset) == ("full", 16, "guide: Adam")
    changed = settings("adapter", guide, {"conv_rank": 4})
    assert (changed.layers, changed.conv_rank, changed.preset) == ("full", 4, "guide: Adam, changed")
    assert settings("adapter", None, {"conv_rank": 4}).preset == ""
    same = {name: getattr(plain, name) for name in options_of(AdapterSettings)}
    assert settings("adapter", guide, same) == plain
    assert label("trainer", guide, {"rank": 32, "seed": 7}) == "guide: Adam"  # a seed belongs to no preset


def test_a_preset_survives_its_file():
    original = Preset("mine", "straße", {"trainer": {"rank": 4}, "objective": {"loss": "Huber", "huber_c": 0.2}})
    again = from_json("mine", to_json(original))
    assert (again.parts, again.description) == (original.parts, original.description)


def test_the_recipe_of_a_run_is_a_preset():
    plan = Plan(
        rank=5,
        seed=99,
        adapter=AdapterSettings(algorithm="LoKr", factor=8),
        optimizer=OptimizerSettings(warmup_steps=3),
        objective=ObjectiveSettings(min_snr_gamma=5.0),
        components=ComponentSettings(te1_learning_rate=1e-5),
    )
    recipe = {**json.loads(plan.to_json()), "dataset": {"images": 3}, "something new": 1}
    preset = from_recipe("again", recipe)
    assert preset.options("trainer")["rank"] == 5 and "seed" not in preset.options("trainer")
    assert preset.options("adapter") == {"algorithm": "LoKr", "factor": 8}
    parts = {part: dataclasses.replace(settings(part, preset, {}), preset="") for part in KINDS if part != "trainer"}
    assert Plan(**preset.options("trainer"), **parts, seed=99) == plan


@pytest.mark.parametrize(
    "text, why",
    (
        ("[]", "version"),
        ("{", "Expecting"),
        ('{"version": 2, "parts": {}}', "version 1"),
        ('{"version": 1, "parts": {"trainer": {"speed": 1}}}', "no option 'speed'"),
        ('{"version": 1, "parts": {"cooking": {}}}', "no part 'cooking'"),
        ('{"version": 1, "parts": {"trainer": {"rank": "many"}}}', "rank is 'many'"),
        ('{"version": 1, "parts": {"trainer": {"rank": true}}}', "rank is True"),
        ('{"version": 1, "parts": {"objective": {"loss": "L7"}}}', "loss is 'L7'"),
        ('{"version": 1, "parts": {"trainer": {"rank": 1%s}}}' % ("0" * 400), "too large"),
        ('{"version": 1, "parts": {"trainer": 3}}', "trainer is 3"),
        ('{"version": 1, "parts": 3}', "int"),
        ('{"version": 1}', "parts"),
        ("[" * 100000, "recursion"),
    ),
)
def test_a_spoiled_file_is_named(text, why):
    with pytest.raises(OptionError, match=f"(?s)preset 'mine' cannot be used.*{why}.*Mend or delete"):
        from_json("mine", text)
