"""The curves of a run: one line per step, none twice, none lost."""

import importlib.util
import json
import math

import numpy as np
import pytest

from lora_loom.training.logs import Log, check_tensorboard
from lora_loom.training.loop import StepReport
from lora_loom.training.options import OptionError


def report(step, loss=None):
    return StepReport(step, 1 / step if loss is None else loss, 1e-4, 0.5, (math.nan, 0.25, math.nan, 1.0))


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_each_step_is_a_line(tmp_path):
    with Log(tmp_path / "run", 0, False) as log:
        log.validation(0, {0.1: 0.5, 0.9: 1.5})
        assert not (tmp_path / "run").exists(), "before the first step nothing is left behind"
        log.after(report(1), 0.123456)
        assert len(lines(tmp_path / "run")) == 2, "a crash now would lose nothing"
        log.after(report(2, math.inf), 0.1)
    first, second, third = lines(tmp_path / "run")
    assert first == {"step": 0, "validation": {"0.1": 0.5, "0.9": 1.5}, "mean": 1.0}
    assert second == {"step": 1, "loss": 1.0, "learning_rate": 1e-4, "gradient_norm": 0.5, "seconds": 0.1235,
                      "bands": [None, 0.25, None, 1.0]}  # fmt: skip
    assert third["step"] == 2 and third["loss"] is None, "JSON has no infinity"


def test_a_run_that_goes_on_drops_what_it_makes_again(tmp_path):
    with Log(tmp_path, 0, False) as log:
        for step in range(1, 6):
            log.after(report(step), 0.1)
            log.validation(step, {0.5: float(step)})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 6, "los')
    with Log(tmp_path, 3, False) as log:
        log.after(report(4, 9.0), 0.1)
    assert [(line["step"], line.get("loss")) for line in lines(tmp_path) if "loss" in line] == [
        (1, 1.0), (2, 0.5), (3, 1 / 3), (4, 9.0)]  # fmt: skip
    assert [line["step"] for line in lines(tmp_path) if "mean" in line] == [1, 2, 3]
    with Log(tmp_path, 0, False) as log:
        log.after(report(1), 0.1)
    assert len(lines(tmp_path)) == 1, "a run that begins anew begins its log anew"
    for _ in range(2):
        with Log(tmp_path, 0, False) as log:
            log.validation(0, {0.5: 1.0})
            log.after(report(1), 0.1)
        assert [line["step"] for line in lines(tmp_path)] == [0, 1], "and its first measurement"


def test_a_log_that_is_not_written_to_is_left_alone(tmp_path):
    (tmp_path / "log.jsonl").write_text("mine")
    with Log(tmp_path, 3, True):
        pass
    assert (tmp_path / "log.jsonl").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def curves():
        board = EventAccumulator(str(tmp_path / "tensorboard"))
        board.Reload()
        return board, {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}

    with Log(tmp_path, 0, True) as log:
        log.validation(0, {0.1: 0.5, 0.9: 1.5})
        for step in (1, 2, 3):
            log.after(report(step), 0.1)
        log.picture(3, "preview", np.zeros((8, 6, 3), np.uint8))
    board, found = curves()
    assert found["loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert found["learning_rate"][0] == (1, pytest.approx(1e-4)) and found["gradient_norm"][0] == (1, 0.5)
    assert found["loss by timestep/0.25-0.5"][2] == (3, 0.25) and "loss by timestep/0-0.25" not in found
    assert found["validation/mean"] == [(0, 1.0)] and found["validation/0.9"] == [(0, 1.5)]
    [picture] = board.Images("preview")
    assert (picture.step, picture.width, picture.height) == (3, 6, 8)

    with Log(tmp_path, 1, True) as log:  # from step 1 on, made again
        log.after(report(2, 7.0), 0.1)
    _, found = curves()
    assert found["loss"] == [(1, 1.0), (2, 7.0)]


def test_tensorboard_that_is_not_installed_is_an_error_with_a_cure(monkeypatch):
    check_tensorboard(True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_tensorboard(False)
    with pytest.raises(OptionError, match="^tensorboard is on, .* pip install tensorboard, or switch it off"):
        check_tensorboard(True)
