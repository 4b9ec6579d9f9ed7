"""The ✕ on the real server: what is kept, that the same queue goes on, and that nothing unfinished is served again."""

import json
import re
import struct

import pytest
import torch
from safetensors import safe_open

from served import put_drawings

STEPS = 24
STOP_AT = 5
TEXT = 3  # the server's number for binary messages that carry a line of text


@pytest.fixture(scope="module")
def folder(server):
    """A data set in the server's input folder."""
    put_drawings(server, "input", "cancel", 4)
    return "cancel"


def prompt_for(folder, run_name, on_cancel):
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    settings = {"length": STEPS, "unit": "steps", "learning_rate": 1e-3, "rank": 2, "alpha": 2.0, "batch_size": 2}
    run = {"seed": 1, "run_name": run_name, "if_run_exists": "continue"}
    sockets = {"model": ["1", 0], "clip": ["1", 1], "vae": ["1", 2], "dataset": ["2", 0], "run": ["5", 0]}
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="loom-demo-base.safetensors"),
        "2": node("LoomDatasetLoader", root="input", folder=folder, resolution=32, bucket_step=8),
        "3": node("LoomLoRATrainer", **settings, **run, **sockets),
        "4": node("PreviewAny", source=["3", 4]),
        "5": node("LoomRunSettings", gradient_checkpointing=False, on_cancel=on_cancel, save_every=0),
        "6": node("LoomSaveLoRA", lora=["3", 0], name=run_name, if_file_exists="overwrite"),
    }


class Watch:
    """Carries out a prompt and remembers what the page would have seen; ``stop_at`` presses the ✕ at that step."""

    def __init__(self, server, prompt, stop_at=None):
        self.steps, self.lines, self.cached = [], [], set()
        for event in server.follow(prompt):
            kind, data = event["type"], event["data"]
            if kind == "preview":
                self._read(data)
            elif kind == "execution_cached":
                self.cached = set(data["nodes"])
            elif kind == "progress" and data["node"] == "3" and data["max"] == STEPS:
                self.steps.append(data["value"])
                if stop_at is not None and data["value"] >= stop_at:
                    server.interrupt()
                    stop_at = None
        self.end = kind
        history = server.get(f"/history/{data['prompt_id']}")
        while not history:
            history = server.get(f"/history/{data['prompt_id']}")
        self.history = history[data["prompt_id"]]

    def _read(self, message):
        number, length = struct.unpack(">II", message[:8])
        if number == TEXT and message[8 : 8 + length] == b"3":
            self.lines.append(message[8 + length :].decode())

    @property
    def report(self):
        return self.history["outputs"]["4"]["text"][0]


def run_folder(server, name):
    return server.base / "output" / "lora_loom" / name


def facts(server, name):
    [state] = run_folder(server, name).glob("state-*")
    return json.loads((state / "run.json").read_text())


def tensors(path):
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def straight(server, folder):
    """The run that nobody stops: what was seen, and its weights."""
    watch = Watch(server, prompt_for(folder, "straight", "abort"))
    assert watch.end == "execution_success", server.log_tail()
    return watch, tensors(run_folder(server, "straight") / "straight.safetensors")[0]


def test_progress_is_told_with_loss_and_speed(straight):
    watch, _ = straight
    assert watch.steps[-1] == STEPS and watch.steps == sorted(watch.steps)
    assert re.fullmatch(r"encoding [1-9]\d* pictures and captions", watch.lines[0])
    line = rf"step \d+/{STEPS} · loss \d+\.\d{{4}} · lr 1\.00e-03 · [\d.]+ (steps/s|s/step)"
    steps = [text for text in watch.lines if text.startswith("step")]
    assert len(steps) > 2 and all(re.fullmatch(line, text) for text in steps)
    assert watch.lines[-1].startswith(f"step {STEPS}/{STEPS}")
    assert f"run 'straight': {STEPS} of {STEPS} steps" in watch.report


def test_a_cancelled_run_goes_on_when_it_is_queued_again(server, folder, straight):
    prompt = prompt_for(folder, "cancelled", "abort")
    first = Watch(server, prompt, STOP_AT)
    assert first.end == "execution_interrupted"
    assert not first.history["status"]["completed"] and first.history["outputs"] == {}
    assert "execution_interrupted" in [name for name, _ in first.history["status"]["messages"]]

    kept = facts(server, "cancelled")
    assert STOP_AT <= kept["step"] < STEPS and not kept["complete"] and kept["total"] == STEPS
    partial, metadata = tensors(run_folder(server, "cancelled") / "cancelled.safetensors")
    assert metadata["ss_steps"] == str(kept["step"]) and any(bool(value.any()) for value in partial.values())
    assert sorted(path.name for path in run_folder(server, "cancelled").iterdir()) == [
        "cancelled.safetensors",
        "log.jsonl",
        f"state-{kept['step']:06d}",
    ]

    second = Watch(server, prompt)
    assert second.end == "execution_success" and "3" not in second.cached
    assert f"went on with run 'cancelled' after step {kept['step']}" in second.report
    assert second.steps[-1] == STEPS and facts(server, "cancelled")["complete"]
    finished, _ = tensors(run_folder(server, "cancelled") / "cancelled.safetensors")
    assert same(finished, straight[1]) and not same(finished, partial)

    third = Watch(server, prompt)
    assert third.end == "execution_success" and "3" in third.cached and third.steps == []


def test_stop_and_keep_lets_the_graph_go_on(server, folder, straight):
    prompt = prompt_for(folder, "kept", "stop and keep")
    saved = server.base / "models" / "loras" / "kept.safetensors"
    first = Watch(server, prompt, STOP_AT)
    assert first.end == "execution_success" and first.history["status"]["completed"]
    step = facts(server, "kept")["step"]
    assert STOP_AT <= step < STEPS
    assert f"stopped by you after {step} of {STEPS} steps; queue again to go on" in first.report
    partial, metadata = tensors(saved)
    assert metadata["ss_steps"] == str(step), "the LoRA so far went on through the graph"

    second = Watch(server, prompt)
    assert second.end == "execution_success" and not {"3", "4", "6"} & second.cached
    assert f"went on with run 'kept' after step {step}" in second.report and "stopped" not in second.report
    finished, metadata = tensors(saved)
    assert metadata["ss_steps"] == str(STEPS)
    assert same(finished, straight[1]) and not same(finished, partial)

    third = Watch(server, prompt)
    assert third.end == "execution_success" and {"3", "6"} <= third.cached and third.steps == []
