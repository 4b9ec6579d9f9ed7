"""What nodes look at to see whether a LoRA has changed: the file, what lies beside it, presets, and nothing else."""

import json
import os
import random
import time
from pathlib import Path

import folder_paths
import pytest
import torch

from lora_loom.host import loras, pairs, prompt_states
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.kernels.sidecars import facts_about, files_beside
from lora_loom.kernels.strengths.lookup import find_name
from lora_loom.kernels.strengths.tags import names_in
from lora_loom.nodes.analysing import LoomBlockAnalyser
from lora_loom.nodes.pairs import LoomLoRAPair
from lora_loom.nodes.prompting import LoomPromptLoRA

NAME = "peft/adapter_model.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    (folder / "peft").mkdir(parents=True)
    known = dict(folder_paths.folder_names_and_paths) | {"loras": ([str(folder)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    save_tensors({"x": torch.ones(2)}, folder / NAME)
    save_tensors({"x": torch.ones(2)}, folder / "other.safetensors")
    return folder


STATES = {
    "state_of": lambda: loras.state_of(NAME),
    "pair": lambda: LoomLoRAPair.fingerprint_inputs(lora_name=NAME, partner=pairs.FIND),
    "partner": lambda: LoomLoRAPair.fingerprint_inputs(lora_name="other.safetensors", partner=NAME),
    "prompt": lambda: LoomPromptLoRA.fingerprint_inputs(prompt="a <lora:peft/adapter_model:1>"),
    "words of the name": lambda: LoomPromptLoRA.fingerprint_inputs(prompt="a <lora:model peft:1>"),
    "analyser": lambda: LoomBlockAnalyser.fingerprint_inputs(lora_name=NAME),
    "linked name": lambda: loras.state_of(None),
    "linked prompt": lambda: LoomPromptLoRA.fingerprint_inputs(prompt=None),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_everything_that_counts_is_noticed(folder, state, monkeypatch):
    monkeypatch.setattr(loras, "_LONGEST", 0.0)
    path, presets = folder / NAME, Path(folder_paths.get_user_directory()) / "lora_loom/block_presets.txt"
    presets.parent.mkdir(parents=True)
    seen = [state()]
    changes = {
        path.with_name("adapter_config.json"): ("{}", '{"lora_alpha": 3}'),
        **{beside: ("{}", '{"a": 1}') for beside in files_beside(path)},
        presets: ("MINE: in=0", "MINE: in=1", "no preset"),
    }
    assert len(changes) == 8
    for file, texts in changes.items():
        for text in texts:
            file.write_text(text)
            seen.append(state())
            assert state() == seen[-1]
    save_tensors({"x": torch.ones(3)}, path)
    seen.append(state())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", [name for name in STATES if name not in ("linked name", "linked prompt", "partner")])
def test_nothing_else_is(folder, name):
    before = STATES[name]()
    save_tensors({"x": torch.ones(3)}, folder / "other.safetensors")
    save_tensors({"x": torch.ones(3)}, folder / "new.safetensors")
    (folder / "peft/adapter_model.png").write_bytes(b"picture")
    (folder / "peft/readme.txt").write_text("text")
    assert STATES[name]() == before


def test_the_files_beside_are_those_that_are_read(folder):
    path = folder / "other.safetensors"
    for file in files_beside(path):
        file.write_text("[]" if file.suffix != ".txt" else "what it is")
    facts = facts_about(path, {})
    assert {note.split(" is damaged")[0] for note in facts.notes} == {f.name for f in files_beside(path)[:-1]}
    assert facts.description == "what it is"


@pytest.mark.parametrize("name", [None, 3, "", "../../x", ["1", 0], "run: x", "x" * 5000, "\0", "\ud800", b"x", {}])
def test_states_never_raise(folder, name, monkeypatch):
    for state in (loras.state_of, lambda name: pairs.state(name, pairs.FIND), lambda name: pairs.state("x", name)):
        assert isinstance(state(name), str)
    monkeypatch.setattr(folder_paths, "user_directory", "\0")
    assert isinstance(loras.state_of(name), str)


def test_a_linked_name_is_looked_up_often_but_not_all_the_time(folder, monkeypatch):
    """A twentieth of the time at most is spent on it, so a change is seen soon."""
    now = [100.0]
    monkeypatch.setattr(loras.time, "monotonic", lambda: now[0])
    real, took = os.scandir, 0.05  # which the host uses, too

    def slow(path):
        now[0] += took
        return real(path)

    monkeypatch.setattr(loras.os, "scandir", slow)
    loras.lora_names()
    begun = now[0]
    first = loras.state_of(None)
    whole = now[0] - begun
    assert whole > 0.09  # two folders
    (folder / "other.json").write_text("{}")
    now[0] += 19 * whole
    assert loras.state_of(None) == first
    now[0] += 1.1 * whole
    second = loras.state_of(None)
    assert second != first
    took = 100.0
    now[0] += 10
    assert loras.state_of(None) == second
    (folder / "other.json").write_text('{"a": 1}')
    now[0] += 5.1
    assert loras.state_of(None) != second


def test_many_names_among_many_files(folder, monkeypatch):
    names = [f"folder{number % 50}/some_style_of_number_{number}-v{number % 7}.safetensors" for number in range(10_000)]
    monkeypatch.setattr(loras, "lora_names", lambda: names)
    for prompt in (
        "".join(f"<lora:unknown {number} thing>" for number in range(64)),
        "".join(f"<lora:style number {number} folder{number % 50}>" for number in range(64)),
        "".join(f"<lora:{name}>" for name in names[:64]),
        "".join(f"<lora:some style {'e' * number}>" for number in range(64)),
    ):
        begun = time.process_time()
        prompt_states.prompt_state(prompt)
        assert time.process_time() - begun < 20


def test_what_a_name_means_is_never_missed(folder, monkeypatch):
    """Whatever the node would load for a name, its change is noticed."""
    draws, looked_at = random.Random(1), []
    monkeypatch.setattr(loras, "state_of", lambda source: looked_at.append(source) or "")
    words = ["cat", "Cat", "VanGogh", "van", "gogh", "v2", "V", "2", "flux", "é", "e\u0301", "1.5", "run: a", "École"]

    def called(most):
        parts = (draws.choice(["", "/", " ", "_", "-"]) + draws.choice(words) for _ in range(draws.randint(1, most)))
        return "".join(parts).strip("/")

    meant = 0
    for _ in range(3000):
        names = list({called(4) + draws.choice([".safetensors"] * 3 + [""]) for _ in range(6)})
        wanted = called(3) + draws.choice(["", ".safetensors"])
        monkeypatch.setattr(loras, "sources", lambda names=names: names)
        looked_at.clear()
        prompt_states.prompt_state(f"<lora:{wanted}>")
        read = names_in(f"<lora:{wanted}>")
        try:
            found = find_name(read[0], names)
        except (IndexError, ValueError):
            continue
        meant += 1
        assert found in looked_at
    assert meant > 200


def test_a_run_s_state(folder, tmp_path):
    kept = tmp_path / "output/lora_loom/zorb/zorb.safetensors"
    kept.parent.mkdir(parents=True)
    save_tensors({"x": torch.ones(2)}, kept)
    seen = [loras.state_of("run: zorb"), loras.state_of(None)]
    kept.with_suffix(".json").write_text(json.dumps({"activation text": "zorb"}))
    seen.append(loras.state_of("run: zorb"))
    save_tensors({"x": torch.ones(5)}, kept)
    assert len({*seen, loras.state_of("run: zorb")}) == 4
