"""How a run can end before its time, what is left then, and who may write to its folder."""

import fcntl
import os
import signal
import time
import weakref

import comfy.model_management
import pytest
import torch

from graph import images
from lora_loom.host import session as sessions
from lora_loom.host.record import Request
from lora_loom.host.runs import Run, RunError
from lora_loom.training.loop import Batch, Trainer, TrainingDivergedError
from lora_loom.training.runstate import find_state
from small_runs import NAMES, PLAN, RUNS, alike, files, holding_out_the_last, lora, parts, plan, run
from training import opened


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(images(tmp_path_factory.mktemp("data") / "zorb", count=5), 64, 16)


@pytest.fixture(scope="module")
def dataset(plain):
    """The fifth picture is held out."""
    return holding_out_the_last(plain)


# ---------------------------------------------------------------- ends before its time


def poisoned(monkeypatch, from_position):
    """From there on, all pictures are NaN."""

    class Poisoned(sessions.HostExamples):
        def batch(self, position):
            batch = super().batch(position)
            return batch if position < from_position else Batch(batch.latents * float("nan"), batch.conditioning)

    monkeypatch.setattr(sessions, "HostExamples", Poisoned)


def test_after_a_loss_that_is_no_number_the_last_good_state_is_gone_on_from(plain, monkeypatch):
    straight, name = run(plain, plan(length=8, run={"save_every": 2})), next(NAMES)
    with monkeypatch.context() as patch:
        poisoned(patch, 5)
        stopped = run(plain, plan(length=8, run={"save_every": 2}), name)
    assert "STOPPED EARLY, the last good weights are kept. step 6: the loss is nan" in stopped.report
    assert "queued again, the run goes on from its state of step 4" in stopped.report and not stopped.finished
    assert find_state(RUNS / name).step == 4, "optimizer and weights of one and the same step"
    assert alike(lora(name), stopped.lora) and all(torch.isfinite(tensor).all() for tensor in stopped.lora.values())
    again = run(plain, plan(length=8, run={"save_every": 2}), name)
    assert alike(again.lora, straight.lora) and again.losses == straight.losses


def test_a_loss_that_is_no_number_from_the_start_leaves_nothing(plain, monkeypatch):
    name = next(NAMES)
    poisoned(monkeypatch, 0)
    with pytest.raises(TrainingDivergedError, match=r"^step 1: the loss is nan\. Lower learning_rate"):
        run(plain, plan(run={"smoke_test": False}), name)
    assert not (RUNS / name).exists()


def test_what_a_failed_step_held_is_let_go_before_it_is_saved(plain, monkeypatch):
    step, state, held = Trainer.step, Trainer.state, []

    def failing(self):
        if self.step_number < 2:
            return step(self)
        activations = self.loss(0)
        activations.backward()
        held.append(weakref.ref(activations))
        raise MemoryError("no more")

    def watched(self):
        assert held[0]() is None and all(tensor.grad is None for tensor in self.parameters)
        return state(self)

    monkeypatch.setattr(Trainer, "step", failing)
    monkeypatch.setattr(Trainer, "state", watched)
    with pytest.raises(MemoryError, match="no more\n\nthe run is saved after step 2; queue again to go on"):
        run(plain)


def test_weights_that_are_thrown_out_of_range_by_the_last_step_are_not_kept(plain, monkeypatch):
    step, name = Trainer.step, next(NAMES)

    def throwing(self):
        report = step(self)
        if self.finished:
            with torch.no_grad():
                self.parameters[0].fill_(float("inf"))
        return report

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", throwing)
        result = run(plain, plan(length=3), name)
    assert "step 3: the weights are no longer finite. Lower learning_rate" in result.report and not result.finished
    assert all(torch.isfinite(tensor).all() for tensor in lora(name).values())
    assert alike(lora(name), run(plain, plan(length=2)).lora), "those of the step before"


def failing(monkeypatch, at, error, where="step"):
    original = getattr(Trainer, where)

    def method(self, *args):
        if self.step_number == at:
            raise error
        return original(self, *args)

    monkeypatch.setattr(Trainer, where, method)


def test_out_of_memory_keeps_what_has_been_learned_and_says_so(plain, monkeypatch):
    straight, name = run(plain), next(NAMES)
    with monkeypatch.context() as patch:
        failing(patch, 3, torch.OutOfMemoryError("CUDA out of memory."))
        with pytest.raises(torch.OutOfMemoryError) as caught:
            run(plain, PLAN, name)
    assert str(caught.value) == "CUDA out of memory.\n\nthe run is saved after step 3; queue again to go on"
    assert alike(lora(name), run(plain, plan(length=3)).lora)
    assert alike(run(plain, PLAN, name).lora, straight.lora)


def test_out_of_memory_in_the_optimizer_keeps_the_weights_of_before(plain, monkeypatch):
    """It has moved some weights and not others: neither its state nor theirs is any good."""
    name = next(NAMES)

    class Failing(torch.optim.AdamW):
        def step(self, closure=None):
            super().step(closure)
            if self.state[self.param_groups[0]["params"][0]]["step"] == 4:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        made = lambda settings, groups: Failing(list(groups), weight_decay=settings.weight_decay, fused=True)  # noqa: E731
        patch.setattr("lora_loom.training.loop.make_optimizer", made)
        with pytest.raises(torch.OutOfMemoryError, match="has the last good weights; queued again, .* state of step 2"):
            run(plain, plan(run={"save_every": 2}), name)
    assert alike(lora(name), run(plain, plan(length=3)).lora)
    assert find_state(RUNS / name).step == 2


def test_a_full_disk_is_told_and_the_old_state_stays(plain, monkeypatch):
    name, write = next(NAMES), Run.keep_state

    def full(self, step, tensors, facts):
        if step > 2:
            raise OSError(28, "No space left on device")
        write(self, step, tensors, facts)

    monkeypatch.setattr(Run, "keep_state", full)
    with pytest.raises(OSError, match="No space left(?s:.)*learned since step 2 could not be saved") as caught:
        run(plain, plan(run={"save_every": 2}), name)
    assert caught.value.errno == 28 and find_state(RUNS / name).step == 2


def test_a_last_save_that_fails_is_tried_again_and_told(plain, monkeypatch):
    name, write, failed = next(NAMES), Run.keep_state, []

    def locked_once(self, step, tensors, facts):
        if not failed:
            failed.append(step)
            raise PermissionError(13, "Permission denied", str(self.folder))
        write(self, step, tensors, facts)

    monkeypatch.setattr(Run, "keep_state", locked_once)
    with pytest.raises(PermissionError, match="Permission denied(?s:.)*the run is saved after step 3"):
        run(plain, plan(length=3), name)
    assert failed == [3] and find_state(RUNS / name).step == 3


def test_what_could_not_be_kept_is_told_whatever_stood_in_the_way(plain, monkeypatch):
    def no_memory(self):
        raise RuntimeError("no memory for a copy")

    monkeypatch.setattr(Trainer, "state", no_memory)
    failing(monkeypatch, 3, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match="since step 0 could not be saved: no memory for a copy"):
        run(plain)


def test_an_error_before_anything_was_learned_leaves_nothing(plain, monkeypatch):
    name = next(NAMES)
    failing(monkeypatch, 0, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\.$"):
        run(plain, PLAN, name)
    assert not (RUNS / name).exists()


class Shown:
    """Previews at the end, of which the last ends like this."""

    every = 100

    def __init__(self, error):
        self.error = error

    def __call__(self, run, step, lora):
        raise self.error


def previewed(dataset, name, error, **options):
    with torch.inference_mode():
        return sessions.train(Request(*parts(), dataset, plan(**options), name, previews=Shown(error)))


def test_a_last_preview_that_fails_says_that_the_run_is_complete(plain):
    name = next(NAMES)
    with pytest.raises(torch.OutOfMemoryError, match=r"memory\.\s+the preview failed, the run is complete: "):
        previewed(plain, name, torch.OutOfMemoryError("CUDA out of memory."), length=2)
    assert find_state(RUNS / name).facts["complete"]


def test_a_last_preview_that_is_cancelled_keeps_nobody_waiting(plain):
    stop = comfy.model_management.InterruptProcessingException()
    result = previewed(plain, next(NAMES), stop, length=2, run={"on_cancel": "stop and keep"})
    assert result.finished and "the last preview was stopped by you" in result.report
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        previewed(plain, next(NAMES), stop, length=2)


def test_a_cancel_while_encoding_hands_on_what_an_earlier_session_learned(plain, monkeypatch):
    name, keeping_it = next(NAMES), {"on_cancel": "stop and keep"}
    first = run(plain, plan(length=2, run=keeping_it), name)

    def cancelled(*_):
        raise comfy.model_management.InterruptProcessingException

    with monkeypatch.context() as patch:
        patch.setattr(sessions.HostExamples, "prepare", cancelled)
        stopped = run(plain, plan(length=4, run=keeping_it), name)
        assert not stopped.finished and alike(stopped.lora, first.lora)
        assert "stopped by you after 2 of 4 steps; queue again to go on" in stopped.report
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(plain, plan(run=keeping_it), other := next(NAMES))
    assert not (RUNS / other).exists(), "nothing had been learned"
    assert alike(run(plain, plan(length=4), name).lora, run(plain, plan(length=4)).lora)


# ---------------------------------------------------------------- the folder


def test_a_damaged_state_is_told_and_the_one_before_is_taken(plain):
    straight, name = run(plain), next(NAMES)
    run(plain, plan(length=2), name)
    folder = RUNS / name
    older = {path.name: path.read_bytes() for path in (folder / "state-000002").iterdir()}
    run(plain, plan(length=4), name)
    (folder / "state-000002").mkdir()
    for file, content in older.items():
        (folder / "state-000002" / file).write_bytes(content)
    damaged = folder / "state-000004" / "tensors.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (folder / ".state-000006-00000000.part").mkdir()
    (folder / f".{name}-00000000.part").write_bytes(b"half a LoRA")
    result = run(plain, PLAN, name)
    assert f"went on with run {name!r} after step 2" in result.report
    assert "a newer state of it is of no use: state-000004: tensors.safetensors is damaged" in result.report
    assert alike(result.lora, straight.lora) and files(name) == [f"{name}.safetensors", "log.jsonl", "state-000006"]


def test_states_of_version_0_1_are_refused_by_name(plain):
    folder = RUNS / "of old"
    folder.mkdir(parents=True)
    (folder / "state.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match="'of old' was made by LoRA Loom 0.1, .* Choose another run_name.* start_from"):
        run(plain, PLAN, "of old")
    run(plain, plan(length=1), "of old", "new")
    assert (RUNS / "of old-2").exists() and files("of old") == ["state.safetensors"]


def test_a_lora_without_a_state_is_replaced_and_that_is_told(plain, monkeypatch):
    name = next(NAMES)
    with monkeypatch.context() as patch:
        poisoned(patch, 2)
        assert "no state had been saved (save_every does that), so queued" in run(plain, PLAN, name).report
    assert files(name) == [f"{name}.safetensors", "log.jsonl"]
    assert run(plain, plan(length=1), name, "new").report.startswith(f"run '{name}-2'"), "it is not overwritten"
    told = run(plain, plan(length=1), name)
    assert "had no state to go on from: it began afresh, its LoRA is replaced" in told.report


def test_two_trainers_do_not_share_a_run(plain):
    name = next(NAMES)
    busy = Run(name, RUNS / name)
    with busy.locked():
        assert (busy.folder / ".lock").exists()
        with pytest.raises(RunError, match=f"^run_name: the run '{name}' is being trained right now. Wait"):
            run(plain, PLAN, name)
        run(plain, plan(length=1))  # others are free
    assert not busy.folder.exists()
    run(plain, plan(length=1), name)
    assert ".lock" not in files(name)


def test_the_lock_of_another_process_goes_with_it(tmp_path):
    held = Run("busy", tmp_path / "busy")
    child = os.fork()
    if not child:
        with held.locked():
            time.sleep(600)
    while not (held.folder / ".lock").exists():
        time.sleep(0.01)
    deadline = time.monotonic() + 60
    while True:  # between making the file and locking it
        with open(held.folder / ".lock", "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
        assert time.monotonic() < deadline
    with pytest.raises(RunError, match="is being trained right now"), held.locked():
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (held.folder / ".lock").exists()
    with held.locked():
        pass
    assert not (held.folder / ".lock").exists()


def test_tensorboard_s_files_lie_in_the_run_folder(dataset):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = next(NAMES)
    result = run(dataset, plan(length=3, run={"tensorboard": True}), name)
    board = EventAccumulator(str(RUNS / name / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(result.losses)
    assert [event.step for event in board.Scalars("validation/mean")] == [0, 3]
