"""States on disk: whole or not there at all."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch

from lora_loom.training import runstate
from lora_loom.training.runstate import FACTS, MANIFEST, TENSORS, StateError, clean, find_state, has_state, write_state

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


def tensors(seed=0):
    draws = torch.Generator().manual_seed(seed)
    odd = {f"kind {index}": torch.randint(0, 2, (3, 5), generator=draws).to(d) for index, d in enumerate(DTYPES)}
    more = {"scalar": torch.tensor(float("nan")), "none": torch.empty(0, 4), "one": torch.randn(7, generator=draws)}
    return {**odd, **more}


def facts(step):
    return {"step": step, "losses": [0.1, 1 / 3, 2.0**-1074], "nothing": None, "text": "ü"}


def keep(folder, step, prune=True):
    """A state of ``step``; with ``prune`` off, older ones stay, as if the process had died before it removed them."""
    older = {path: path.with_name(f"kept-{path.name}") for path in folder.glob("state-*")} if folder.exists() else {}
    for path, copy in older.items() if not prune else ():
        shutil.copytree(path, copy)
    write_state(folder, step, tensors(step), facts(step))
    for path, copy in older.items() if not prune else ():
        copy.rename(path)


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[key].nan_to_num(3) if one[key].is_floating_point() else one[key],
                    other[key].nan_to_num(3) if other[key].is_floating_point() else other[key])
        and one[key].dtype == other[key].dtype
        for key in one
    )  # fmt: skip


def test_what_was_written_is_read(tmp_path):
    assert find_state(tmp_path / "new") is None and not has_state(tmp_path / "new")
    write_state(tmp_path / "new", 12, tensors(), facts(12))
    found = find_state(tmp_path / "new")
    assert (found.step, found.damaged, found.folder.name) == (12, (), "state-000012")
    assert found.facts == facts(12) and same(found.tensors, tensors())
    assert sorted(path.name for path in found.folder.iterdir()) == sorted((TENSORS, FACTS, MANIFEST))


def test_a_new_state_takes_the_place_of_the_old_one(tmp_path):
    for step in (5, 10, 10, 1_000_000):
        keep(tmp_path, step)
        assert find_state(tmp_path).facts["step"] == step and len(list(tmp_path.iterdir())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state-1000000"]


def test_the_same_step_may_be_written_again(tmp_path):
    keep(tmp_path, 10)
    for number in range(1, 12):
        write_state(tmp_path, 10, tensors(number), facts(10 + number))
        assert find_state(tmp_path).facts["step"] == 10 + number


def harm(state, name, how):
    path = state / name
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":
        content[0 if name == MANIFEST else random.Random(name).randrange(len(content))] ^= 1
        path.write_bytes(content)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "missing"])
@pytest.mark.parametrize("name", [TENSORS, FACTS, MANIFEST])
def test_a_damaged_state_is_passed_over_or_refused(tmp_path, name, how):
    keep(tmp_path, 5)
    keep(tmp_path, 10, prune=False)
    assert find_state(tmp_path).step == 10
    harm(tmp_path / "state-000010", name, how)
    found = find_state(tmp_path)
    assert found.step == 5 and same(found.tensors, tensors(5)) and found.facts == facts(5)
    [fault] = found.damaged
    assert fault.startswith("state-000010: ") and name in fault

    shutil.rmtree(tmp_path / "state-000005")
    with pytest.raises(StateError, match=rf"no saved state can be read \(state-000010: .*{name}.*Choose another"):
        find_state(tmp_path)
    keep(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["state-000007"], "what is damaged goes with the next state"


@pytest.mark.parametrize("schema", [1, 3, 99, "x", None])
def test_a_layout_of_another_version_is_refused_not_passed_over(tmp_path, schema):
    keep(tmp_path, 5)
    keep(tmp_path, 10, prune=False)
    path = tmp_path / "state-000010" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": schema}))
    with pytest.raises(StateError, match=rf"was written in layout {schema!r}, this version reads 2\. Update LoRA Loom"):
        find_state(tmp_path)


def test_half_written_folders_are_ignored_and_removed(tmp_path):
    keep(tmp_path, 5)
    unfinished = tmp_path / ".state-000010-0a1b2c3d.part"
    shutil.copytree(tmp_path / "state-000005", unfinished)
    (tmp_path / "state-of-the-art.txt").write_text("the user's own")
    (tmp_path / "state-abc").mkdir()
    assert find_state(tmp_path).step == 5
    clean(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-000005", "state-abc", "state-of-the-art.txt"]


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    keep(tmp_path, 5)
    for failing in range(3):
        calls = iter(range(9))
        write = runstate._write

        def full(path, content, calls=calls, failing=failing, write=write):
            if next(calls) == failing:
                path.write_bytes(content[:10])
                raise OSError(28, "No space left on device")
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(runstate, "_write", full)
            with pytest.raises(OSError, match="No space left"):
                write_state(tmp_path, 10, tensors(), facts(10))
        assert [path.name for path in tmp_path.iterdir()] == ["state-000005"] and find_state(tmp_path).step == 5


@pytest.fixture
def one_thread():
    """For children that are forks: the threads that torch computes with in the parent are not there in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_writer_that_is_killed_leaves_a_whole_state(tmp_path, one_thread):
    """Writes as fast as it can, and is killed at random moments."""
    large = torch.zeros(1 << 18)
    began = time.monotonic()
    for step in (1, 2, 3):
        write_state(tmp_path, step, {"weights": large + step}, {"step": step})
    each = (time.monotonic() - began) / 3
    draws, newest, unfinished = random.Random(0), 3, 0
    for _ in range(40):
        child = os.fork()
        if not child:
            step = newest
            while True:
                step += 1
                write_state(tmp_path, step, {"weights": large + step}, {"step": step})
        time.sleep(draws.uniform(0, 6) * each)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        unfinished += any(path.name.endswith(".part") for path in tmp_path.iterdir())
        found = find_state(tmp_path)
        assert not found.damaged and found.step >= newest
        newest = found.step
        assert found.facts == {"step": newest} and bool((found.tensors["weights"] == newest).all())
    assert newest > 10 and unfinished > 5
