"""When a page is told of a training: at once where something changes, a few times a second at most, and all of it."""

import json
import threading

import pytest

from graph import images
from live_panel import PATIENCE, known, line, previewed, slow_steps, until, watching
from lora_loom.host import live
from lora_loom.host.live import Training, Trainings
from lora_loom.host.previews import Previews
from small_runs import NAMES, holding_out_the_last, plan, run
from training import opened


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(images(tmp_path_factory.mktemp("data") / "zorb", count=5), 64, 16)


@pytest.fixture
def unhurried(monkeypatch):
    slow_steps(monkeypatch)


def test_what_can_be_asked_is_what_would_have_an_effect():
    training = Training("can", previews=True)
    assert training.summary()["can"] == ["pause"], "nothing has been learned yet"
    training.add(line(1))
    training.now("training")
    assert training.summary()["can"] == ["stop", "save", "preview", "pause"]
    training.now("paused")
    with training.during("previewing"):
        assert training.summary()["can"] == ["stop", "save", "preview", "continue"], "it is still to be continued"
    assert training.state == "paused"
    training.stopping = True
    assert training.summary()["can"] == ["save", "preview", "continue"]
    training.end("done")
    assert training.summary()["can"] == []


def test_a_page_that_cannot_be_told_disturbs_nobody(plain, monkeypatch, caplog):
    def broken():
        raise RuntimeError("Event loop is closed")

    monkeypatch.setattr(live, "host_server", broken)
    name = next(NAMES)
    run(plain, plan(length=3), name)
    assert known(name)[0].state == "done"
    assert [record.getMessage() for record in caplog.records if "page" in record.getMessage()] == [
        "LoRA Loom: the page could not be told of the training"
    ]


@pytest.fixture
def events(monkeypatch):
    """What all pages are told, in that order."""
    sent = []

    class Listening:
        def send_sync(self, event, data):
            assert event == live.EVENT
            sent.append(json.loads(json.dumps(data, allow_nan=False)))

    monkeypatch.setattr(live, "host_server", Listening)
    return sent


def of(events, name):
    return [event for event in events if event["run"] == name]


def test_the_page_knows_what_the_loop_is_busy_with(plain, unhurried, monkeypatch, events):
    """A pause, and a preview right behind it that takes long: all there is to know is told before the preview ends."""
    name, shown = next(NAMES), threading.Event()
    look = Previews.__call__

    def slow(self, *given):
        assert shown.wait(PATIENCE)
        return look(self, *given)

    def script(panel):
        try:
            panel.at(3)
            at = panel.ask("pause")["step"]
            panel.ask("preview")
            until(lambda: of(events, name)[-1]["state"] == "previewing")
            told = of(events, name)
            assert "paused" in {event["state"] for event in told}
            answers = [wish for event in told for wish in event["wishes"]]
            assert [(wish["do"], wish["step"]) for wish in answers] == [("pause", at), ("preview", at)]
            assert [step for event in told for step in event["points"].get("loss", {"step": []})["step"]] == [
                *range(1, at + 1)
            ]
            assert told[-1]["can"] == ["stop", "save", "preview", "continue"]
        finally:
            shown.set()
        until(lambda: of(events, name)[-1]["state"] == "paused")
        assert panel.training.everything()["previews"] == [at]
        panel.ask("stop")

    monkeypatch.setattr(Previews, "__call__", slow)
    with watching(name, script):
        previewed(plain, name, length=500)
    told = of(events, name)
    assert [event["seq"] for event in told] == [*range(1, len(told) + 1)], "a page sees what it has missed"
    assert known(name)[0].everything()["seq"] == known(name)[0].summary()["seq"] == len(told)


def test_every_state_is_told(plain, monkeypatch, events):
    monkeypatch.setattr(live, "AT_ONCE", 1000)  # the states of so short a run follow each other too fast for a page
    name = next(NAMES)
    options = {"run": {"validate_every": 2, "save_every": 3}}
    previewed(holding_out_the_last(plain), name, every=2, length=4, **options)
    states = [event["state"] for event in of(events, name)]
    assert {"preparing", "training", "validating", "saving", "previewing"} <= set(states) and states[-1] == "done"
    assert states.count("previewing") >= 2


def test_much_at_once_is_told_later_but_told(events):
    """Also where the loop does nothing any more that would tell it."""
    training = Training("busy")
    for step in range(1, 200):
        training.now("saving")
        training.add(line(step))
        training.now("training")
    training.now("validating")
    first = len(events)
    assert first <= live.AT_ONCE + 1
    until(lambda: events[-1]["state"] == "validating")
    steps = [step for event in events for step in event["points"].get("loss", {"step": []})["step"]]
    assert steps == [*range(1, 200)] and len(events) <= first + 2
    training.end("done")
    assert [event["seq"] for event in events] == [*range(1, len(events) + 1)] and events[-1]["state"] == "done"


def test_a_run_has_ended_as_it_has_whatever_its_end_says(monkeypatch):
    def gone(*_):
        raise OSError("the folder is gone")

    monkeypatch.setattr(live, "without_places", gone)
    trainings = Trainings()
    with trainings.begun(Training("complete")) as training:
        training.why = "ended early"
    assert (training.state, training.why) == ("done", "the server's log says why")
    with pytest.raises(KeyError), trainings.begun(Training("failing")) as training:
        raise KeyError("its own error")
    assert training.state == "failed"
