"""What may change when a run goes on: the table is complete, and the schedule goes on or begins anew as it says."""

import dataclasses
import json

import pytest

from lora_loom.training.continuing import (
    RULES,
    VERDICTS,
    Segment,
    compare,
    first_segment,
    next_segments,
)
from lora_loom.training.options import OptionError
from lora_loom.training.settings import PARTS, OptimizerSettings, Plan, options_of

OLD = {"fingerprint": "a", "images": 4, "resolution": 64, "options": ["repeats 2"]}  # facts of former versions
DATASET = {**OLD, "concepts": ["zorb: training"], "pictures": "b", "captions": "c"}
BASE = {"weights": "d", "loras": "", "sampling": "e", "vae": "f"}
BASE |= {"text_encoder": "g", "text_encoder_loras": "", "clip_skip": -1}


def recipe(plan, **dataset):
    return json.loads(json.dumps({**dataclasses.asdict(plan), "dataset": {**DATASET, **dataset}, "base": BASE}))


def test_the_table_knows_every_option_and_every_fact_of_dataset_and_base():
    plan = {field.name for field in dataclasses.fields(Plan)} - set(PARTS)
    parts = {f"{part}.{field.name}" for part, kind in PARTS.items() for field in dataclasses.fields(kind)}
    assert set(RULES) == plan | parts | {f"dataset.{name}" for name in DATASET} | {f"base.{n}" for n in BASE}
    assert set(RULES) > set(options_of(Plan)) and not {"dataset", "base"} & PARTS.keys()
    assert {rule.verdict for rule in RULES.values()} == set(VERDICTS)
    assert all(rule.reason for rule in RULES.values() if rule.verdict == "refused")


SAID = {
    "dataset.fingerprint": "the dataset's images, captions or options",
    "dataset.pictures": "the dataset's images, masks or their concepts",
    "dataset.captions": "the dataset's captions",
    "base.weights": "the weights of the MODEL",
    "base.loras": "the LoRAs on the MODEL",
    "base.sampling": "the prediction or noise levels of the MODEL",
    "base.text_encoder": "the weights of the CLIP",
    "base.text_encoder_loras": "the LoRAs on the CLIP",
    "base.vae": "the weights of the VAE",
}


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else f"{value}?" if isinstance(value, str) else [*value, "more"]


@pytest.mark.parametrize("name", RULES)
def test_every_difference_is_told_and_judged_by_the_table(name):
    before, part, option = recipe(Plan()), *name.rpartition(".")[::2]
    now = json.loads(json.dumps(before))
    place = now[part] if part else now
    old, place[option] = place[option], changed(place[option])
    found = compare(before, now)
    verdict = RULES[name].verdict
    refused = verdict == "refused" or (verdict == "on or off" and not old)
    base = verdict == "another base"
    counts = len(found.refused), len(found.accepted), len(found.base)
    assert counts == (int(refused), int(not refused and not base), int(base)) and base == (part == "base")
    assert found.schedule == (verdict == "schedule")
    assert found.measures == (part in ("dataset", "base") or option in ("seed", "zero_terminal_snr"))
    [text] = found.refused or found.accepted or found.base
    assert SAID.get(name, f"{option} ") in text
    assert compare(before, before) == compare(now, now)
    assert not compare(before, before).accepted and not compare(before, before).refused


def test_rates_may_change_but_not_what_is_trained():
    slow, fast = ({"components": {"te1_learning_rate": rate}} for rate in (1e-5, 1e-4))
    assert compare(slow, fast).accepted == ["te1_learning_rate 1e-05 → 0.0001"]
    [refused] = compare(slow, {"components": {"te1_learning_rate": 0.0}}).refused
    assert refused.startswith("another te1_learning_rate (1e-05, now 0.0): it decides what is trained")


def test_an_option_that_the_saved_run_did_not_know_had_its_default():
    before, now = recipe(Plan()), recipe(Plan())
    del before["run"]["ema_decay"], before["seed"]
    assert compare(before, now) == compare(now, now)
    now["run"]["ema_decay"] = 0.5
    assert compare(before, now).accepted == ["ema_decay 0.0 → 0.5"]


def test_the_whole_dataset_is_only_told_of_where_nothing_says_what_of_it_is_different():
    before = recipe(Plan())
    assert compare(before, recipe(Plan(), fingerprint="x", captions="y")).accepted == ["the dataset's captions"]
    told = compare(before, recipe(Plan(), fingerprint="x", images=5, pictures="y", captions="z")).accepted
    assert told == ["the dataset's images 4 → 5", SAID["dataset.pictures"], SAID["dataset.captions"]]
    assert compare(before, recipe(Plan(), fingerprint="x")).accepted == [SAID["dataset.fingerprint"]]


def test_a_state_of_a_former_version_says_what_it_knows_and_nothing_of_the_rest():
    before = {**recipe(Plan()), "dataset": OLD}
    del before["base"]
    same = compare(before, recipe(Plan()))
    assert not (same.accepted or same.base or same.refused or same.measures)
    told = compare(before, recipe(Plan(), fingerprint="x", resolution=96, captions="y"))
    assert told.accepted == [SAID["dataset.fingerprint"], "the dataset's resolution 64 → 96"] and told.measures


# ---------------------------------------------------------------- the learning rate


def settings(**options):
    return OptimizerSettings(**{"schedule": "cosine", **options})


def rates(options, segments, steps):
    """The factor of each step, by the segment that was followed when it was made."""
    of = [next(s for s in reversed(segments) if s.start <= step) for step in range(steps)]
    return [segment.schedule(options).factor(step) for step, segment in enumerate(of)]


def test_an_unchanged_run_goes_on_with_its_own_schedule():
    first = first_segment(settings(warmup_steps=2), 10, 4.0)
    assert first == Segment(0, 10, 4.0)
    assert next_segments(settings(warmup_steps=2), 10, 4.0, [first], 6, False) == ([first], False)


@pytest.mark.parametrize("schedule", ["constant", "inverse-sqrt"])
def test_a_schedule_without_an_end_goes_on_when_the_run_is_made_longer(schedule):
    options = settings(schedule=schedule, warmup_steps=3)
    first = first_segment(options, 10, 1.0)
    segments, new = next_segments(options, 20, 1.0, [first], 10, False)
    assert not new
    assert rates(options, segments, 20) == rates(options, [first_segment(options, 20, 1.0)], 20)


@pytest.mark.parametrize("unit, horizon", [("steps", 30), ("epochs", 10)])
def test_a_stated_horizon_makes_a_longer_run_equal_to_one_that_never_stopped(unit, horizon):
    options = settings(schedule_unit=unit, horizon=horizon)
    first = first_segment(options, 10, 3.0)
    assert first.length == 30
    segments, new = next_segments(options, 20, 3.0, [first], 10, False)
    assert not new and rates(options, segments, 20) == rates(options, [first_segment(options, 20, 3.0)], 20)
    with pytest.raises(OptionError, match="horizon is 30 steps, expected 0 or at least the 31"):
        next_segments(options, 31, 3.0, [first], 10, False)


def test_otherwise_a_new_schedule_begins_at_the_joint_and_stays_on_a_second_resume():
    options = settings(warmup_steps=2)
    first = first_segment(options, 10, 1.0)
    segments, new = next_segments(options, 16, 1.0, [first], 10, False)
    assert new and segments == [first, Segment(10, 6, 1.0)]
    # warm-up again over steps 10 and 11, then half a cosine over the last four
    assert rates(options, segments, 16)[10:] == pytest.approx([0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447], abs=1e-6)
    assert next_segments(options, 16, 1.0, segments, 13, False) == (segments, False)
    third, new = next_segments(options, 20, 1.0, segments, 16, False)
    assert new and third[-1] == Segment(16, 4, 1.0)


def test_a_warm_up_that_the_rest_of_the_run_has_no_room_for_is_refused():
    options = settings(warmup_steps=5)
    first = first_segment(options, 10, 1.0)
    with pytest.raises(OptionError, match="^warmup_steps is 5 steps, expected at most the 4 of the rest of the run, "):
        next_segments(options, 14, 1.0, [first], 10, False)
    assert next_segments(options, 15, 1.0, [first], 10, False)[1]
    falling = settings(schedule="warm-up-stable-decay", decay_steps=5)
    with pytest.raises(OptionError, match="^decay_steps is 5 steps, expected at most 4: the rest of the run, .* has 4"):
        next_segments(falling, 14, 1.0, [first], 10, True)


def test_a_shorter_run_and_other_options_begin_a_new_schedule():
    options = settings()
    first = first_segment(options, 100, 1.0)
    assert next_segments(options, 50, 1.0, [first], 30, False) == ([first, Segment(30, 20, 1.0)], True)
    assert next_segments(options, 100, 1.0, [first], 30, True) == ([first, Segment(30, 70, 1.0)], True)
    assert next_segments(options, 20, 1.0, [first], 30, False) == ([first], False), "nothing is left to do"


def test_epochs_of_another_length_begin_a_new_schedule():
    options = settings(schedule_unit="epochs", warmup_steps=1)
    first = first_segment(options, 100, 5.0)
    assert next_segments(options, 100, 5.0, [first], 30, False) == ([first], False)
    assert next_segments(options, 100, 4.0, [first], 30, False)[1]
    assert not next_segments(settings(), 100, 4.0, [first_segment(settings(), 100, 5.0)], 30, False)[1]
