"""Curves that stay short: no peak of them is lost, whatever their length; and they are what the log says."""

import itertools
import json
import math
import random
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_loom.training.history import BAND, LIMIT, MEASURED, History, Series, history_of
from lora_loom.training.logs import LONGEST, Log, read_log
from lora_loom.training.loop import StepReport

GAPS = st.integers(0, 50) | st.sampled_from([1, 1000, 2**40])
VALUES = st.floats(width=32) | st.sampled_from([0.0, math.nan, math.inf, -math.inf])


def series_of(points, limit=LIMIT):
    """The series of these points, held to what it promises."""
    series = Series(limit)
    for step, value in points:
        series.add(step, value)
    kept = list(zip(series.steps, series.values, strict=True))
    assert len(kept) <= limit and repr(kept[-1]) == repr(points[-1])
    rest = map(repr, points)
    assert all(any(point == other for other in rest) for point in map(repr, kept)), "some of the points, in their order"
    left = {bucket: [value for _, value in found] for bucket, found in groupby(kept, lambda at: at[0] // series.width)}
    for bucket, found in groupby(points, lambda at: at[0] // series.width):
        known = [value for _, value in found if not math.isnan(value)]
        assert not known or {min(known), max(known)} <= set(left[bucket]), "the peaks of these steps"
        assert left[bucket]
    return series


@given(st.lists(st.tuples(GAPS, VALUES), min_size=1, max_size=300), st.integers(4, 40))
def test_no_peak_is_lost(draws, limit):
    steps = itertools.accumulate(gap for gap, _ in draws)
    series = series_of([(step, value) for step, (_, value) in zip(steps, draws, strict=True)], limit)
    assert len(draws) > limit or (series.width == 1 and len(series.steps) == len(draws))


@pytest.mark.parametrize("count", (LIMIT, LIMIT + 1, 3 * LIMIT + 7, 60_000))
def test_a_run_of_any_length_is_a_few_thousand_points(count):
    draws = random.Random(count)
    points = [(step, draws.gauss(0, 1)) for step in range(1, count + 1)]
    series = series_of(points)
    assert (series.width == 1) == (count <= LIMIT)
    values = [value for _, value in points]
    assert (min(series.values), max(series.values)) == (min(values), max(values))


def test_no_more_is_left_out_than_has_to_be():
    series = Series(64)
    for step in range(1, 5_000):
        series.add(step, math.sin(step * step))
        assert min(step, 24) <= len(series.steps) <= 64


def report(step, loss):
    return StepReport(step, loss, 1e-4 / step, 0.5, (math.nan, loss / 2, math.nan, 2 * loss))


def test_what_is_told_is_what_the_file_says(tmp_path):
    told = History()
    with Log(tmp_path, 0, False, told.add) as log:
        log.validation(0, {0.1: 0.5, 0.9: 1.5})
        assert told.points() == {MEASURED: {"step": [0], "value": [1.0]}}, "before there is a file"
        for step in (1, 2, 3):
            log.after(report(step, 1 / step), 0.25 * step)
        log.validation(3, {0.1: math.nan})
    read = history_of(read_log(tmp_path))
    assert read.points() == told.points() and read.step == told.step == 3
    assert told.points()["loss"] == {"step": [1, 2, 3], "value": [1.0, 0.5, 1 / 3]}
    assert told.points()["seconds"]["value"] == [0.25, 0.5, 0.75]
    assert told.points()["learning_rate"]["value"] == [1e-4, 5e-5, 1e-4 / 3]
    assert told.points()[f"{BAND}0.75-1"]["value"] == [2.0, 1.0, 2 / 3]
    assert f"{BAND}0-0.25" not in told.points(), "nothing was drawn there"
    assert told.points()[MEASURED] == {"step": [0, 3], "value": [1.0, None]}
    json.dumps(told.points(), allow_nan=False)


def test_what_comes_after_a_step(tmp_path):
    history = History()
    for step in range(1, 6):
        history.add({"step": step, "loss": step, "learning_rate": 1, "seconds": 1, "bands": [1, None, None, None]})
        history.add({"step": step, "validation": {}, "mean": -step})
    later = history.points(3)
    assert later["loss"]["step"] == later[f"{BAND}0-0.25"]["step"] == [4, 5]
    assert later[MEASURED]["step"] == [3, 4, 5], "it is measured after the step, and may come after it was asked for"
    assert history.points(5)["loss"] == {"step": [], "value": []} == history.points(10**30)["loss"]
    short = history.thinned(4)
    assert short.keys() == later.keys() and short["loss"] == {"step": [1, 5], "value": [1.0, 5.0]}
    assert short[MEASURED] == {"step": [1, 5], "value": [-1.0, -5.0]}
    assert history.points()["loss"]["step"] == [1, 2, 3, 4, 5], "the history itself is as it was"


GOOD = {"step": 2, "loss": 0.5, "learning_rate": 1e-4, "seconds": 0.1, "bands": [None] * 4}


def test_lines_that_no_trainer_writes_are_passed_over(tmp_path):
    spoiled = [
        *({**GOOD, name: "x"} for name in ("loss", "learning_rate", "seconds", "bands")),
        *({**GOOD, name: {}} for name in ("loss", "learning_rate", "seconds", "bands")),
        *({key: value for key, value in GOOD.items() if key != name} for name in GOOD),
        {**GOOD, "step": "1"}, {**GOOD, "step": 2**60}, {**GOOD, "step": -1}, {**GOOD, "step": 10**40},
        {**GOOD, "bands": [1, 2]}, {"step": 3, "validation": {}}, {"step": 3, "validation": 1, "mean": []},
    ]  # fmt: skip
    with open(tmp_path / "log.jsonl", "w", encoding="utf-8") as file:
        for line in spoiled:
            file.write(json.dumps(line) + "\n")
        file.write("[" * 100_000 + "\n" + '{"step": 1, "x": "' + "y" * 2 * LONGEST + '"}\nnull\n[1]\n"step"\n\n')
        file.write(json.dumps({**GOOD, "loss": 10**400}) + "\n")
        file.write(json.dumps(GOOD) + "\n" + json.dumps({**GOOD, "step": 1}) + "\n" + json.dumps(GOOD)[:-5])
    history = history_of(read_log(tmp_path))
    assert history.points()["loss"] == {"step": [2], "value": [0.5]} and history.step == 2
    assert [line["step"] for line in read_log(tmp_path, 1) if line.keys() == GOOD.keys()] == [-1, 1]
    assert list(read_log(tmp_path / "nowhere")) == []
