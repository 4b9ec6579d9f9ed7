"""Runs of before, as a list and a panel show them: found by name, their logs read no more often than they change."""

import json

import pytest

from graph import images
from live_panel import line
from lora_loom.host import runs
from lora_loom.host.runs import Histories, Run, past_runs
from lora_loom.training.history import history_of
from lora_loom.training.logs import read_log
from small_runs import NAMES, RUNS, plan, run
from training import opened


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(images(tmp_path_factory.mktemp("data") / "zorb", count=5), 64, 16)


def test_a_log_is_read_once_until_it_changes(plain, monkeypatch):
    name, read = next(NAMES), []
    run(plain, plan(length=3), name)
    histories, past = Histories(), past_runs()[name]

    def counted(folder, *given):
        read.append(folder)
        return read_log(folder, *given)

    monkeypatch.setattr(runs, "read_log", counted)
    for _ in range(3):
        assert histories.of(past).points() == history_of(read_log(past.folder)).points()
    assert len(read) == 1
    run(plain, plan(length=5), name)
    assert histories.of(past).step == 5 and len(read) == 2
    for _ in range(runs.HISTORIES_KEPT):
        folder = log_of(next(NAMES), 1)
        histories.of(past_runs()[folder.name])
    assert histories.of(past).step == 5 and len(histories._kept) == runs.HISTORIES_KEPT
    assert len(read) == 2 + runs.HISTORIES_KEPT + 1, "the one asked for longest ago had to go"


def log_of(name, steps):
    """A run folder with nothing but a log."""
    folder = RUNS / name
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(line(step))}\n" for step in range(1, steps + 1)))
    return folder


def test_runs_are_listed_without_reading_their_logs_whole(monkeypatch):
    long, short, empty, torn = (log_of(next(NAMES), steps) for steps in (20_000, 3, 0, 2))
    with (torn / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "loss"')
    (short / "previews").mkdir()
    (short / "previews/step-000002.png").write_bytes(b"")
    monkeypatch.setattr(runs, "read_log", lambda *_: pytest.fail("it is read whole"))
    found = {name: past.described() for name, past in past_runs().items()}
    assert [found[folder.name]["step"] for folder in (long, short, empty, torn)] == [20_000, 3, 0, 2]
    assert found[short.name] == {
        "run": short.name, "step": 3, "time": (short / "log.jsonl").stat().st_mtime, "previews": 1
    }  # fmt: skip


def test_runs_of_before_are_found_by_name_and_nothing_else_is(plain, tmp_path):
    names = [next(NAMES) for _ in range(2)]
    for name in names:
        run(plain, plan(length=1), name)
    (tmp_path / "log.jsonl").write_text("{}")
    (RUNS / "link").symlink_to(tmp_path)
    (RUNS / "linked log").mkdir()
    (RUNS / "linked log" / "log.jsonl").symlink_to(tmp_path / "log.jsonl")
    (RUNS / "nothing").mkdir()
    (RUNS / ".hidden").mkdir()
    (RUNS / ".hidden" / "log.jsonl").write_text("{}")
    found = past_runs()
    assert list(found)[:2] == names[::-1], "the last one first"
    assert not {"link", "linked log", "nothing", ".hidden"} & set(found)
    assert all(found[name] == Run(name, (RUNS / name).resolve()) for name in names)
