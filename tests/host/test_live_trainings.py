"""Trainings as the page knows them: what it is told and may ask; nothing of it changes what is learned."""

import itertools
import json
import time

import comfy.model_management
import pytest
import torch

from graph import images
from live_panel import known, line, previewed, slow_steps, until, watching
from lora_loom.host import live, steering
from lora_loom.host import session as sessions
from lora_loom.host.live import Training, Trainings, WishError
from lora_loom.host.runs import Run
from lora_loom.training.history import LIMIT, history_of
from lora_loom.training.logs import read_log
from lora_loom.training.loop import Trainer
from lora_loom.training.runstate import find_state
from small_runs import NAMES, RUNS, alike, files, holding_out_the_last, log, lora, plan, run
from training import opened


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(images(tmp_path_factory.mktemp("data") / "zorb", count=5), 64, 16)


@pytest.fixture
def unhurried(monkeypatch):
    slow_steps(monkeypatch)


# -- what is told


def test_a_finished_run_is_told_as_its_log_has_it(plain):
    name = next(NAMES)
    before = time.time()
    result = run(holding_out_the_last(plain), plan(length=5, run={"validate_every": 2}), name)
    [training] = known(name)
    told = training.everything()
    assert told["points"] == history_of(read_log(RUNS / name)).points()
    assert told["points"]["loss"] == {"step": [1, 2, 3, 4, 5], "value": result.losses}
    assert told["points"]["validation"]["step"] == [0, 2, 4, 5]
    assert told["points"]["seconds"]["value"] == [one["seconds"] for one in log(name) if "seconds" in one]
    assert (told["state"], told["step"], told["total"], told["why"]) == ("done", 5, 5, "")
    assert before < told["started"] < told["ended"] < time.time() and told["seconds_left"] is None
    assert (
        0
        < told["memory"]["free"]
        <= told["memory"]["total"]
        == comfy.model_management.get_total_memory(torch.device("cpu"))
    )
    assert told["can"] == [] and told["previews"] == [] and told["wishes"] == []
    assert training.everything(4)["points"]["loss"]["step"] == [5]
    assert result.training is training and training.for_ui()["points"] == told["points"]
    json.dumps(told, allow_nan=False)
    assert str(RUNS) not in json.dumps(told)


def test_a_run_that_goes_on_shows_its_beginning(plain):
    name = next(NAMES)
    previewed(plain, name, every=2, length=3)
    with (RUNS / name / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 9.0, "learning_rate": 0, "seconds": 1, "bands": [null, null, null, null]}\n')
    Run(name, RUNS / name).preview_file(7).write_bytes(b"of a run that was killed")
    result = previewed(plain, name, length=5)
    first, second = (training.everything() for training in known(name))
    assert first["id"] != second["id"] and first["step"] == 3 and first["previews"] == [2, 3]
    assert second["points"]["loss"] == {"step": [1, 2, 3, 4, 5], "value": result.losses}
    assert second["previews"] == [2, 3, 5]
    assert [training.preview_of(3) for training in known(name)] == [RUNS / name / "previews" / "step-000003.png"] * 2
    assert known(name)[0].preview_of(5) is None and known(name)[0].preview_of(7) is None


def test_an_error_is_told_in_a_line(plain, monkeypatch):
    def failing(self):
        raise torch.OutOfMemoryError(f"\nCUDA out of memory in {RUNS}/x.\nTried to allocate")

    name = next(NAMES)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", failing)
        with pytest.raises(torch.OutOfMemoryError):
            run(plain, plan(run={"smoke_test": False}), name)
    [training] = known(name)
    assert (training.state, training.why) == ("failed", "CUDA out of memory in output/lora_loom/x.")
    with pytest.raises(WishError, match="this training is failed; queue the prompt again"):
        training.ask("stop")
    with pytest.raises(ValueError, match="run_name"):
        run(plain, plan(), "../elsewhere")
    [refused] = known("../elsewhere")
    assert refused.state == "failed" and refused.why.startswith("run_name is '../elsewhere'")


def test_weights_that_diverge_are_told_with_the_reason(plain, monkeypatch):
    step, name = Trainer.step, next(NAMES)

    def throwing(self):
        report = step(self)
        with torch.no_grad():
            self.parameters[0].fill_(float("inf"))
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", throwing)
        run(plain, plan(length=1), name)
    [training] = known(name)
    assert training.state == "stopped" and "step 1: the weights are no longer finite" in training.why


def test_an_early_stop_is_told(plain):
    name = next(NAMES)
    learning_nothing = plan(length=8, learning_rate=5.0, run={"validate_every": 1, "early_stop": 2})
    assert run(holding_out_the_last(plain), learning_nothing, name).finished
    [training] = known(name)
    assert training.state == "done" and training.why.startswith("ended early: the validation loss has not fallen")


def test_only_the_last_ones_are_remembered():
    trainings = Trainings(kept=2)
    with trainings.begun(Training("running")):
        for number in range(5):
            with trainings.begun(Training(f"ended {number}")) as training:
                assert training.running
            assert training.state == "done"
        assert [one.summary()["run"] for one in trainings.all()] == ["running", "ended 3", "ended 4"]
    assert [one.summary()["run"] for one in trainings.all()] == ["ended 3", "ended 4"]
    assert trainings.find(training.id) is training and trainings.find("ended 4") is None


def test_a_long_run_keeps_its_peaks():
    training, steps = Training("long"), 5 * LIMIT
    for step in range(1, steps + 1):
        training.add(line(step, 99.0 if step == 77 else -99.0 if step == 8_000 else 1 / step))
    for points in (training.everything()["points"], training.for_ui()["points"]):
        curve = dict(zip(points["loss"]["step"], points["loss"]["value"], strict=True))
        assert curve[77] == 99.0 and curve[8_000] == -99.0 and steps in curve
    assert len(training.everything()["points"]["loss"]["step"]) <= LIMIT
    assert len(training.for_ui()["points"]["loss"]["step"]) <= live.UI_POINTS
    training.end("done")


# -- what is asked


def test_what_the_page_asks_changes_no_bit(plain, unhurried):
    """Paused, saved, looked at and continued, against a run that nobody touched."""
    untouched, name, paused_for = run(plain, plan(length=12)), next(NAMES), 2.0

    def script(panel):
        panel.at(2)
        assert panel.ask("save")["note"] == ""
        panel.at(5)
        at = panel.ask("pause")["step"]
        assert panel.state() == "paused"
        assert panel.ask("pause")["note"] == "it was paused"
        assert panel.ask("save")["step"] == panel.ask("preview")["step"] == at
        until(lambda: at in panel.training.everything()["previews"])
        assert panel.state() == "paused"
        busy, left = time.process_time(), panel.training.summary()["seconds_left"]
        time.sleep(paused_for)
        assert panel.training.summary()["step"] == at
        assert time.process_time() - busy < paused_for / 2, "it waits without computing"
        assert panel.training.summary()["seconds_left"] == left
        assert panel.ask("continue")["note"] == ""
        panel.at(at + 1)
        assert panel.training.summary()["seconds_left"] < left + paused_for / 2
        assert panel.ask("continue")["note"] == "it was not paused"
        assert panel.ask("preview")["step"] > at

    with watching(name, script):
        result = previewed(plain, name, length=12)
    told = known(name)[0].everything()
    asked = ["save", "pause", "pause", "save", "preview", "continue", "continue", "preview"]
    assert [wish["do"] for wish in told["wishes"]] == asked and told["state"] == "done"
    assert alike(result.lora, untouched.lora) and result.losses == untouched.losses
    assert max(told["points"]["seconds"]["value"]) < paused_for
    saved = {wish["step"] for wish in told["wishes"] if wish["do"] == "save"}
    assert {f"{name}-step{step:06d}.safetensors" for step in saved} == {file for file in files(name) if "-step" in file}
    for step in saved:
        assert alike(lora(name, f"-step{step:06d}"), run(plain, plan(length=step)).lora)
    looked_at = {wish["step"] for wish in told["wishes"] if wish["do"] == "preview"} | {12}
    assert set(told["previews"]) == looked_at == set(Run(name, RUNS / name).previews())


def test_what_is_saved_on_demand_is_gone_on_from(plain, unhurried, monkeypatch):
    straight, name = run(plain, plan(length=10)), next(NAMES)
    step, saved = Trainer.step, []

    def killed(self):
        if saved:
            raise MemoryError
        return step(self)

    def script(panel):
        panel.at(3)
        saved.append(panel.ask("save")["step"])

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        patch.setattr(sessions.keeping, "keep_so_far", lambda *_: "")
        with watching(name, script), pytest.raises(MemoryError):
            run(plain, plan(length=10), name)
    assert find_state(RUNS / name).step == saved[0]
    assert alike(run(plain, plan(length=10), name).lora, straight.lora)


def test_stop_keeps_the_lora_and_the_graph_goes_on(plain, unhurried):
    straight, name, answers = run(plain, plan(length=30)), next(NAMES), []

    def script(panel):
        panel.at(4)
        answers.append(panel.ask("stop"))

    with watching(name, script):
        result = run(plain, plan(length=30), name)
    [answer] = answers
    at = answer["step"]
    assert 4 <= at < 30 and not result.finished
    assert f"stopped by you after {at} of 30 steps; queue again to go on" in result.report
    assert alike(result.lora, run(plain, plan(length=at)).lora) and alike(lora(name), result.lora)
    told = known(name)[0].summary()
    assert (told["state"], told["why"], told["step"]) == ("stopped", f"stopped by you after {at} of 30 steps", at)
    assert alike(run(plain, plan(length=30), name).lora, straight.lora), "queued again"


def test_stop_while_paused(plain, unhurried):
    name = next(NAMES)

    def script(panel):
        panel.at(2)
        panel.ask("pause")
        assert panel.ask("stop")["step"] == panel.training.summary()["step"]

    with watching(name, script):
        assert not run(plain, plan(length=50), name).finished
    assert known(name)[0].state == "stopped"


def test_the_host_s_cancel_is_heard_while_paused(plain, unhurried):
    name, at = next(NAMES), []

    def script(panel):
        panel.at(2)
        at.append(panel.ask("pause")["step"])
        comfy.model_management.interrupt_current_processing()

    with watching(name, script), pytest.raises(comfy.model_management.InterruptProcessingException):
        run(plain, plan(length=50), name)
    told = known(name)[0].summary()
    assert (told["state"], told["why"]) == ("stopped", "stopped by you") and find_state(RUNS / name).step == at[0]


def test_stop_before_anything_was_learned_ends_the_prompt(plain, monkeypatch):
    """Also between two pictures that are encoded."""
    begun, name = Training.begin, next(NAMES)

    def stopped_at_once(self, *given):
        begun(self, *given)
        self.ask("save")
        self.ask("stop")

    monkeypatch.setattr(Training, "begin", stopped_at_once)
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("it went on"))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        run(plain, plan(), name)
    assert not (RUNS / name).exists()
    told = known(name)[0].everything()
    assert told["state"] == "stopped" and told["step"] == 0
    save, stop = told["wishes"]
    assert stop["note"] == "nothing has been learned yet: the prompt ends here"
    assert save["note"] == "the training had ended before"


def test_what_makes_no_sense_before_the_first_step_is_answered(plain, monkeypatch):
    begun, name = Training.begin, next(NAMES)

    def asking(self, *given):
        begun(self, *given)
        for do in ("save", "preview", "pause", "continue"):
            self.ask(do)

    untouched = run(plain, plan(length=3))
    monkeypatch.setattr(Training, "begin", asking)
    assert alike(previewed(plain, name, length=3).lora, untouched.lora)
    wishes = known(name)[0].everything()["wishes"]
    assert [wish["step"] for wish in wishes] == [0] * 4
    assert [wish["note"].split(";")[0] for wish in wishes] == ["nothing has been learned yet"] * 2 + [""] * 2


def test_no_more_can_be_asked_than_makes_sense():
    training = Training("asked")
    assert training.ask("pause") == training.ask("pause") == {"number": 1, "do": "pause", "step": None, "note": ""}
    with pytest.raises(WishError, match="no preview settings; connect Preview Settings to the trainer"):
        training.ask("preview")
    with pytest.raises(WishError, match="too much is asked of this training already"):
        for do in itertools.cycle(("continue", "pause")):
            training.ask(do)
    assert len(training.everything()["wishes"]) == live.MOST_WISHES
    training.end("stopped", "for now")
    assert all(wish["note"] == "the training had ended before" for wish in training.everything()["wishes"])
    with pytest.raises(WishError, match="this training is stopped; queue the prompt again"):
        training.ask("save")
    assert steering.PATIENCE < 1 and live.WISHES == ("stop", "save", "preview", "pause", "continue")


def test_a_wish_is_answered_when_it_could_not_be_carried_out(plain, unhurried, monkeypatch):
    def full(self, *_):
        raise OSError(28, f"No space left on {RUNS}")

    name, answers = next(NAMES), []

    def script(panel):
        panel.at(2)
        answers.append(panel.ask("save"))

    with monkeypatch.context() as patch:
        patch.setattr(Run, "keep_state", full)
        with watching(name, script), pytest.raises(OSError, match="No space left"):
            run(plain, plan(length=200), name)
    [training] = known(name)
    [answer] = answers
    assert training.state == "failed" and answer["step"] == training.summary()["step"]
    assert answer["note"].startswith("it was not done: [Errno 28] No space left on output/lora_loom")
    assert all(wish["step"] is not None for wish in training.everything()["wishes"])
