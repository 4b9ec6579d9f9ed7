"""LoRAs are read once, never served stale, kept within a budget, and whatever a trainer wrote finds its place."""

import gc
import hashlib
import json
import os
import threading
import time
import weakref
from pathlib import Path

import folder_paths
import pytest
import torch

import tiny
from lora_loom.host import lora_cache, runs
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import read_lora
from lora_loom.kernels.safetensors_io import LoraModel, load_tensors, save_tensors

LAYER = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q"
OLD = 1_600_000_000


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty LoRA folder of the host, and an empty cache with the usual budget."""
    known = dict(folder_paths.folder_names_and_paths) | {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.delenv(lora_cache.VARIABLE, raising=False)
    lora_cache.clear()
    yield tmp_path
    lora_cache.clear()


@pytest.fixture
def table():
    return NameTable.of(tiny.tiny("sd15").model)


def lora(table, seed=0, rank=3):
    """A LoRA on one layer."""
    draws = torch.Generator().manual_seed(seed)
    name, (rows, columns) = table.write(LAYER), table.shapes[LAYER]
    down, up = torch.randn(rank, columns, generator=draws), torch.randn(rows, rank, generator=draws)
    return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}


def put(folder, name, tensors, written=OLD, metadata=None):
    path = save_tensors(tensors, folder / name, metadata)
    os.utime(path, ns=(written * 10**9, written * 10**9))
    return path


def reads(monkeypatch):
    """What is read from now on, by kind."""
    found = []
    for module, name in ((lora_cache, "load_tensors"), (lora_cache, "read_lora")):
        real = getattr(module, name)

        def counted(*given, real=real, name=name):
            found.append(name)
            return real(*given)

        monkeypatch.setattr(module, name, counted)
    return found


# ---------------------------------------------------------------- read once


def test_what_is_loaded(folder, table):
    tensors = lora(table)
    path = put(folder, "style/cat.safetensors", tensors, metadata={"modelspec.trigger_phrase": "ohwx cat"})
    loaded = lora_cache.get("style/cat.safetensors")
    assert loaded.tensors.keys() == tensors.keys()
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in tensors.items())
    assert (loaded.name, loaded.path) == ("style/cat.safetensors", path)
    assert (loaded.size, loaded.mtime, loaded.trained) == (path.stat().st_size, OLD * 10**9, False)
    assert loaded.metadata["modelspec.trigger_phrase"] == "ohwx cat"
    assert loaded.nbytes == sum(tensor.nbytes for tensor in tensors.values()) == lora_cache.held()
    assert loaded.facts().line() == "trigger words: ohwx cat (from modelspec.trigger_phrase)"
    (folder / "style/cat.json").write_text(json.dumps({"preferred weight": 0.6}))
    assert loaded.facts().strength == 0.6  # as it is now, while the file is not read again


def test_a_page_of_versions_is_matched_by_the_hash_of_the_file(folder, table):
    path = put(folder, "cat.safetensors", lora(table))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    versions = [{"trainedWords": [word], "files": [{"hashes": {"AutoV2": value}}]} for word, value in (
        ("other", "0" * 10), ("mine", digest[:10].upper()),
    )]  # fmt: skip
    (folder / "cat.json").write_text(json.dumps({"modelVersions": versions}))
    assert lora_cache.get("cat.safetensors").facts().words == ("mine",)


def test_another_strength_reads_nothing(folder, table, monkeypatch):
    put(folder, "cat.safetensors", lora(table))
    found = reads(monkeypatch)
    first = lora_cache.get("cat.safetensors")
    file = first.file(table)
    assert found == ["load_tensors", "read_lora"]
    for _ in range(3):
        again = lora_cache.get("cat.safetensors")
        assert again is first and again.file(table).adapters is file.adapters
        assert again.file(table).names is table
    assert len(found) == 2
    other = NameTable.of(tiny.tiny("flux").model)
    assert lora_cache.get("cat.safetensors").file(other).unplaced and not first.file(table).unplaced
    assert found[2:] == ["read_lora"]


def test_reload_on_demand(folder, table, monkeypatch):
    put(folder, "cat.safetensors", lora(table))
    found = reads(monkeypatch)
    first = lora_cache.get("cat.safetensors")
    second = lora_cache.get("cat.safetensors", force_reload=True)
    assert second is not first and found == ["load_tensors"] * 2
    assert lora_cache.get("cat.safetensors") is second


def test_clearing(folder, table):
    put(folder, "cat.safetensors", lora(table))
    first = lora_cache.get("cat.safetensors")
    lora_cache.clear()
    assert lora_cache.held() == 0
    assert lora_cache.get("cat.safetensors") is not first


def test_loras_that_runs_keep(folder, table, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    run = runs.open_run("cat", "error")
    run.keep(LoraModel(lora(table)))
    assert lora_cache.get("run: cat").file(table).adapters.keys() == {LAYER}


@pytest.mark.parametrize("name", ["no.safetensors", "../x.safetensors", "run: no", "", None, 3, "/etc/passwd"])
def test_names_are_contained(folder, table, name):
    put(folder.parent, "x.safetensors", lora(table))
    with pytest.raises(ValueError, match="^lora_name: there is no"):
        lora_cache.get(name)


# ---------------------------------------------------------------- never stale


def test_a_changed_file_is_read_again(folder, table):
    for seed in range(4):
        put(folder, "cat.safetensors", lora(table, seed), OLD + seed)
        loaded = lora_cache.get("cat.safetensors")
        assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in lora(table, seed).items())
        assert lora_cache.get("cat.safetensors") is loaded


def test_versions_that_bear_the_same_time(folder, table):
    """Written twice within one tick of the file system's clock, of equal size: told apart all the same."""
    now = int(os.stat(put(folder, "cat.safetensors", lora(table))).st_ctime)
    for seed in range(3):
        put(folder, "cat.safetensors", lora(table, seed), now)
        loaded = lora_cache.get("cat.safetensors")
        assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in lora(table, seed).items())


def test_a_file_from_the_future_is_kept(folder, table):
    put(folder, "cat.safetensors", lora(table), 4_000_000_000)
    assert lora_cache.get("cat.safetensors") is lora_cache.get("cat.safetensors")


def test_a_file_that_changes_while_it_is_read(folder, table, monkeypatch):
    path = put(folder, "cat.safetensors", lora(table))
    real, begun = load_tensors, []

    def slow(source):
        tensors = real(source)
        if len(begun) < 2:
            put(folder, "cat.safetensors", lora(table, 1), OLD + 1 + len(begun))
        begun.append(source)
        return tensors

    monkeypatch.setattr(lora_cache, "load_tensors", slow)
    loaded = lora_cache.get("cat.safetensors")
    assert begun == [str(path)] * 3
    assert torch.equal(*(next(iter(found.values())) for found in (loaded.tensors, lora(table, 1))))
    begun.clear()
    monkeypatch.setattr(lora_cache, "load_tensors", lambda path: (os.utime(path), real(path))[1])
    with pytest.raises(ValueError, match=r"lora_name: 'cat.safetensors' changes faster than it can be read; wait"):
        lora_cache.get("cat.safetensors", force_reload=True)


def test_what_peft_keeps_beside_counts(folder, table):
    path = put(folder, "adapter_model.safetensors", lora(table))
    config = path.with_name("adapter_config.json")
    for alpha in (3, 6):
        config.write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": alpha}))
        os.utime(config, (OLD + alpha, OLD + alpha))
        loaded = lora_cache.get(path.name)
        assert lora_cache.get(path.name) is loaded
        assert loaded.file(table).adapters[LAYER].scale == alpha / 3
        assert loaded.file(table).adapters[LAYER].scale == read_lora(path, table).adapters[LAYER].scale


def test_files_that_are_gone_or_damaged(folder, table):
    path = put(folder, "cat.safetensors", lora(table))
    lora_cache.get("cat.safetensors")
    path.unlink()
    with pytest.raises(ValueError, match="lora_name: "):
        lora_cache.get("cat.safetensors")
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"cat\.safetensors: not a safetensors file, but a web page"):
        lora_cache.get("cat.safetensors")
    put(folder, "nan.safetensors", {key: tensor * torch.nan for key, tensor in lora(table).items()})
    with pytest.raises(ValueError, match=r"^nan\.safetensors: .*nothing in it can be used: .*NaN"):
        lora_cache.get("nan.safetensors").file(table)


# ---------------------------------------------------------------- memory


def test_the_budget_holds_and_the_rest_dies(folder, table, monkeypatch):
    size = 1 << 19
    for number in range(6):
        put(folder, f"{number}.safetensors", {"x.lora_down.weight": torch.zeros(size >> 2)})
    monkeypatch.setenv(lora_cache.VARIABLE, "2")
    alive = []
    for number in (0, 1, 2, 3, 0, 4, 5):  # 0 is used again: it outlives 1 and 2
        alive.append((number, weakref.ref(lora_cache.get(f"{number}.safetensors"))))
        gc.collect()
        assert lora_cache.held() <= 2 << 20
    assert [number for number, one in alive if one()] == [0, 3, 0, 4, 5]
    monkeypatch.setenv(lora_cache.VARIABLE, "1")
    lora_cache.get("1.safetensors")
    assert lora_cache.held() == 1 << 20
    put(folder, "large.safetensors", {"x.lora_down.weight": torch.zeros(3 * size)})
    loaded = lora_cache.get("large.safetensors")
    assert lora_cache.held() == 0 and loaded.tensors
    gone = weakref.ref(loaded)
    del loaded
    gc.collect()
    assert gone() is None


def test_nothing_is_kept(folder, table, monkeypatch):
    put(folder, "cat.safetensors", lora(table))
    monkeypatch.setenv(lora_cache.VARIABLE, "0")
    first = lora_cache.get("cat.safetensors")
    assert lora_cache.held() == 0 and lora_cache.get("cat.safetensors") is not first
    assert first.file(table).adapters is first.file(table).adapters


def test_the_budget_follows_the_free_memory(folder, monkeypatch):
    free = 400 << 20
    monkeypatch.setattr(lora_cache.comfy.model_management, "get_free_memory", lambda _: free)
    assert lora_cache.budget() == 100 << 20
    free = 1 << 50
    assert lora_cache.budget() == lora_cache.MOST == 2 << 30
    monkeypatch.setenv(lora_cache.VARIABLE, " 7 ")
    assert lora_cache.budget() == 7 << 20
    for text in ("-1", "1.5", "much", "9" * 10):
        monkeypatch.setenv(lora_cache.VARIABLE, text)
        with pytest.raises(ValueError, match=f"LOOM_CACHE_MB is '{text}'; set it to whole megabytes"):
            lora_cache.budget()


def test_adapters_die_with_their_model_and_share_the_files_memory(folder, table):
    put(folder, "cat.safetensors", lora(table))
    loaded = lora_cache.get("cat.safetensors")
    before = loaded.nbytes
    model = tiny.tiny("sd15").model
    names = NameTable.of(model)
    adapter = weakref.ref(loaded.file(names).adapters[LAYER])
    assert loaded.nbytes == before
    gone = weakref.ref(names)
    del names
    gc.collect()
    assert gone() is None and adapter() is None


def test_what_adapters_had_to_make_is_counted(folder, table):
    """8-bit factors are used in 16 bits."""
    narrow = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in lora(table).items()}
    put(folder, "cat.safetensors", narrow)
    loaded = lora_cache.get("cat.safetensors")
    size = sum(tensor.nbytes for tensor in narrow.values())
    assert loaded.nbytes == size
    loaded.file(table)
    assert loaded.nbytes == 3 * size == lora_cache.held()


def test_no_file_stays_open_or_mapped(folder, table):
    path = put(folder, "cat.safetensors", lora(table))
    loaded = lora_cache.get("cat.safetensors")
    loaded.file(table)
    loaded.facts()
    assert not any(os.path.realpath(entry) == str(path) for entry in Path("/proc/self/fd").iterdir())
    assert str(path) not in Path("/proc/self/maps").read_text()
    with open(path, "r+b") as file:  # overwriting it in place does not reach what is in memory
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(loaded.tensors[key], tensor) for key, tensor in lora(table).items())


def test_what_a_node_reads_can_be_trained_through_later(folder, table):
    put(folder, "cat.safetensors", lora(table))
    with torch.inference_mode():
        loaded = lora_cache.get("cat.safetensors")
        adapter = loaded.file(table).adapters[LAYER]
    assert not any(tensor.is_inference() for tensor in (*loaded.tensors.values(), *adapter.tensors.values()))


# ---------------------------------------------------------------- LORA_MODELs of the graph


def test_a_lora_of_the_graph_is_parsed_once_while_it_lives(folder, table, monkeypatch):
    found = reads(monkeypatch)
    model = LoraModel(lora(table), {"modelspec.trigger_phrase": "cat"}, trained=True)
    first = lora_cache.of(model)
    file = first.file(table)
    assert lora_cache.of(model) is first and lora_cache.of(model).file(table).adapters is file.adapters
    assert found == ["read_lora"]
    assert (first.path, first.size, first.mtime, first.trained) == (None, None, None, True)
    assert first.facts().words == ("cat",)
    for key in model:  # shared, not copied
        assert first.tensors[key].data_ptr() == model[key].data_ptr()
    assert lora_cache.held() == 0
    model[next(iter(model))] = model[next(iter(model))] * 2
    second = lora_cache.of(model)
    assert second is not first and torch.equal(*(next(iter(one.values())) for one in (second.tensors, model)))
    gone = weakref.ref(second)
    del model, first, second, file
    gc.collect()
    assert gone() is None


def test_a_plain_dict_of_another_pack(folder, table):
    loaded = lora_cache.of(lora(table), "theirs")
    assert (loaded.name, loaded.metadata, loaded.trained) == ("theirs", {}, False)
    assert loaded.file(table).adapters.keys() == {LAYER}


# ---------------------------------------------------------------- many at a time


def test_threads(folder, table, monkeypatch):
    """Readers, writers, and models that come and go; what each reader gets is one of the versions, whole."""
    for number in range(3):
        put(folder, f"{number}.safetensors", lora(table, number))
    monkeypatch.setenv(lora_cache.VARIABLE, "1")
    versions = [lora(table, seed) for seed in range(3, 9)]
    faults = []

    def read(number):
        try:
            for step in range(25):
                loaded = lora_cache.get(f"{(number + step) % 3}.safetensors", force_reload=step % 7 == 0)
                own = NameTable(table.shapes) if step % 5 == 0 else table
                assert loaded.file(own).adapters.keys() == {LAYER}
                values = tuple(loaded.tensors.values())
                assert any(
                    all(map(torch.equal, values, one.values())) for one in (lora(table, (number + step) % 3), *versions)
                )
                if step % 11 == 0:
                    lora_cache.clear()
        except Exception as error:  # told by the main thread
            faults.append(error)

    def write():
        try:
            for step, tensors in enumerate(versions):
                put(folder, "0.safetensors", tensors, OLD + 1 + step)
                time.sleep(0.01)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(4)] + [threading.Thread(target=write)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    assert lora_cache.held() <= 1 << 20
