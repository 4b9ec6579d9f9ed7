"""Files from anywhere: a clear error each, in bounded memory and time, and never a crash."""

import json
import pickle
import random
import time

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapter_files import flux, lora
from lora_loom.kernels.reading import read_lora
from lora_loom.kernels.safetensors_io import (
    MAX_ENTRIES,
    MAX_HEADER,
    LoraModel,
    load_tensors,
    read_metadata,
    save_tensors,
)
from mutations import check, good_files, mutated, peak_bytes

LONG = 60_000
TARGETS = {"one": (6, 4), "two": (6, 4)}
ACTS = (read_metadata, load_tensors, read_lora)


def raw(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HOSTILE = {
    "empty": (b"", "claims 0 bytes"),
    "zeros": (b"\x00" * 64, "claims 0 bytes"),
    "ones": (b"\xff" * 64, "claims 18446744073709551615 bytes"),
    "2 GB header": ((2**31).to_bytes(8, "little") + b"{}" * 50, "claims 2147483648 bytes"),
    "header cut short": ((40).to_bytes(8, "little") + b"{}", "claims 40 bytes of 2"),
    "header of a list": (raw(b"[[]]"), "no table of tensors"),
    "header of brackets": (raw(b"[" * 50_000), "not readable"),
    "header of nested tables": (raw(b'{"a":' * 50_000), "not readable"),
    "header that is no text": (raw(b"\xff\xfe\x00\x01"), "not readable"),
    "too many entries": (raw(b"{" * (MAX_ENTRIES + 1)), f"more than {MAX_ENTRIES} entries"),
    "huge number": (raw(b'{"x":' + b"9" * 5000 + b"}"), "not readable"),
    "entry is a number": (raw({"x": 3}), "the entry of 'x' is not a tensor's"),
    "entry lacks its shape": (raw({"x": {"dtype": "F32", "data_offsets": [0, 0]}}), "the entry of 'x'"),
    "unknown dtype": (raw({"x": entry("F13")}, bytes(8)), "'x' has the dtype 'F13', which is not known here"),
    "dtype is no text": (raw({"x": entry(["F32"])}, bytes(8)), "'x' has the dtype"),
    "dtype of another size": (raw({"x": entry("F64")}, bytes(8)), "'x' has 8 bytes, its shape needs 16"),
    "negative size": (raw({"x": entry(shape=(-2,))}, bytes(8)), "impossible shape"),
    "fractional size": (raw({"x": entry(shape=(2.0,))}, bytes(8)), "impossible shape"),
    "sizes that overflow": (raw({"x": entry(shape=(2**40, 2**40))}, bytes(8)), "'x' has 8 bytes"),
    "many dimensions": (raw({"x": entry(shape=(1,) * 99)}, bytes(8)), "impossible shape"),
    "end before its start": (raw({"x": entry(offsets=(8, 0))}, bytes(8)), "'x' has -8 bytes"),
    "three offsets": (raw({"x": entry(offsets=(0, 4, 8))}, bytes(8)), "the entry of 'x'"),
    "behind the end": (raw({"x": entry()}, bytes(4)), "ends at byte 8 of 4"),
    "overlap": (raw({"x": entry(), "y": entry(offsets=(4, 12))}, bytes(12)), "'y' overlaps another tensor"),
    "same place": (raw({"x": entry(), "y": entry()}, bytes(8)), "'y' overlaps another tensor"),
    "gap": (raw({"x": entry(), "y": entry(offsets=(16, 24))}, bytes(24)), "'y' lies behind a gap"),
    "bytes left over": (raw({"x": entry()}, bytes(9)), "1 bytes belong to no tensor"),
    "metadata with numbers": (raw({"__metadata__": {"a": 1}, "x": entry()}, bytes(8)), "other than text"),
    "metadata is a list": (raw({"__metadata__": [1], "x": entry()}, bytes(8)), "other than text"),
    "zip": (b"PK\x03\x04" + bytes(60), "pickle"),
    "pickle": (pickle.dumps({"lora": [1, 2, 3]}), "pickle"),
    "gguf": (b"GGUF" + bytes(60), "GGUF"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "lone surrogate": (raw(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)), ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(kind, tmp_path):
    content, message = HOSTILE[kind]
    path = tmp_path / "some file.safetensors"
    path.write_bytes(content)
    for act in ACTS:
        with pytest.raises(ValueError, match=r"some file\.safetensors: ") as caught:
            act(path)
        assert message in str(caught.value)


def test_a_pickle_by_another_name_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("it was opened",)

    for number, legacy in enumerate((True, False)):
        path = tmp_path / f"{number}.safetensors"
        torch.save({"x": torch.ones(2), "bomb": Bomb()}, path, _use_new_zipfile_serialization=not legacy)
        for act in ACTS:
            with pytest.raises(ValueError, match="pickle"):
                act(path)


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a", "a.safetensors.bin"])
def test_other_file_types_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    for act in (*ACTS, lambda path: save_tensors({}, path)):
        with pytest.raises(ValueError, match=rf"{name}: only \.safetensors"):
            act(tmp_path / name)


def test_a_header_that_claims_gigabytes_takes_no_memory(tmp_path):
    path = tmp_path / "big.safetensors"
    for length in (2**31, MAX_HEADER + 1, 2**64 - 1):
        with open(path, "wb") as file:
            file.write(length.to_bytes(8, "little"))
            file.truncate(2**33)  # a sparse file: the claim could be true

        def read():
            for act in ACTS:
                with pytest.raises(ValueError, match="claims"):
                    act(path)

        assert peak_bytes(read) < 2**20


@pytest.mark.parametrize(
    "body",
    [b'{"a":[' + b"1," * 2_000_000 + b"1]}", b'{"a":"' + b"x" * 10_000_000 + b'"}', b'{"' + b'a":{},"' * 240_000],
    ids=["numbers", "text", "entries"],
)
def test_the_header_takes_a_small_multiple_of_its_size(tmp_path, body):
    path = tmp_path / "long.safetensors"
    path.write_bytes(raw(body))

    def read():
        with pytest.raises(ValueError, match=r"long\.safetensors"):
            read_metadata(path)

    assert peak_bytes(read) < 12 * len(body) + 2**20


def test_a_hundred_thousand_keys(tmp_path):
    """Most of them nonsense, all of them accounted for, in seconds."""
    keys = {f"lora_unet_double_blocks_{n}_img_attn_qkv.lora_up.weight": torch.ones(1) for n in range(50_000)}
    keys |= {f"what.{n}": torch.ones(1) for n in range(49_000)}
    keys |= {f"x.lora_A.{n}.weight": torch.ones(1, 4) for n in range(500)}
    keys |= {f"x.lora_B.{n}.weight": torch.ones(4, 1) for n in range(500)}
    keys |= lora("lora_unet_double_blocks_0_txt_attn_qkv", (24, 8))
    path = tmp_path / "many.safetensors"
    path.write_bytes(safetensors.torch.save(keys))
    began = time.process_time()
    file = read_lora(path, flux())
    assert time.process_time() - began < 60
    assert len(file.unplaced) == len(keys) - 2
    assert len({item.key for item in file.unplaced}) == len(file.unplaced)
    assert file.adapters.keys() == {"diffusion_model.double_blocks.0.txt_attn.qkv"}
    without = read_lora(path)
    assert len(without.unplaced) == len(keys) - 2 - 2 * 500 + 2 * 499  # copies of one adapter


def seconds(act):
    began = time.process_time()
    act()
    return time.process_time() - began


@pytest.mark.parametrize("pattern", [".*a.*{}b", "a{}"])
def test_patterns_of_a_configuration_take_bounded_time(pattern):
    """Each of them is harmless, on names that are short; a file need not have such names."""
    names = [f"{n}." + "a." * 3000 + "x" for n in range(40)]
    tensors = {key: value for name in names for key, value in lora(name, (6, 4), 4, None, ".lora_A", ".lora_B").items()}
    patterns = {pattern.format(n): 3 for n in range(3000)}
    config = {"r": 4, "lora_alpha": 8, "alpha_pattern": patterns}
    model = LoraModel(tensors, {"adapter_config": json.dumps(config)})
    files = []
    assert seconds(lambda: files.append(read_lora(model))) < 20
    assert len(files[0].adapters) == len(names) and any("not followed" in note for note in files[0].notes)


def test_a_rank_for_every_layer_takes_no_time():
    names = [f"blocks.{n}.attn.to_q" for n in range(1000)]
    tensors = {key: value for name in names for key, value in lora(name, (6, 4), 4, None, ".lora_A", ".lora_B").items()}
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {f"^{name}": 8 for name in names}}
    model = LoraModel(tensors, {"adapter_config": json.dumps(config)})
    files = []
    assert seconds(lambda: files.append(read_lora(model))) < 60
    assert {adapter.alpha for adapter in files[0].adapters.values()} == {8.0}


def test_shared_matrices_in_great_number():
    keys = {f"s{n}.vera_A": torch.ones(1, 4) for n in range(8000)}
    keys |= {f"u{n}.vera_lambda_b": torch.ones(4) for n in range(8000)}
    assert seconds(lambda: read_lora(keys)) < 20


@pytest.mark.parametrize(
    "keys",
    [
        lora("one", (100_000, 1), 1),
        {"one.lokr_w1_a": torch.ones(LONG, 1), "one.lokr_w1_b": torch.ones(1, LONG), "one.lokr_w2": torch.ones(1, 1)},
        {"one.lokr_w1": torch.ones(1, 1), "one.lokr_w2_a": torch.ones(LONG, 1), "one.lokr_w2_b": torch.ones(1, LONG)},
        {f"one.hada_w{n}_{x}": torch.ones(size) for n in "12" for x, size in (("a", (LONG, 1)), ("b", (1, LONG)))},
        {"one.oft_R.weight": torch.ones(1, 499_500)},
    ],
    ids=["LoRA", "LoKr w1", "LoKr w2", "LoHa", "OFTv2"],
)  # fmt: skip
def test_reading_builds_nothing_large(keys, monkeypatch):
    """Small tensors whose product would take gigabytes are read, or refused, without it."""
    real = torch.Tensor.__matmul__

    def counted(one, other):
        result = torch.Size((*one.shape[:-1], *other.shape[1:]))
        assert one.is_meta or result.numel() < 2**24, f"a product of {tuple(result)}"
        return real(one, other)

    monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
    read_lora(keys)
    read_lora(keys, TARGETS)


EXAMPLES = 2000


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzzed.safetensors"


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
    database=None,
)
@given(number=st.integers(0, 2), seed=st.integers(0, 2**32))
def test_mutated_files_are_read_or_refused(place, number, seed):
    place.write_bytes(mutated(good_files((6, 4))[number], random.Random(seed)))
    check(place, TARGETS)


def test_the_files_that_are_mutated_are_good(place):
    outcomes = []
    for content in good_files((6, 4)):
        place.write_bytes(content)
        assert check(place, TARGETS) == "read"
        file = read_lora(place, TARGETS)
        assert file.adapters.keys() == TARGETS.keys() and not file.unplaced
        for seed in range(50):
            place.write_bytes(mutated(content, random.Random(seed)))
            outcomes.append(check(place, TARGETS))
    assert {"read", "refused"} == set(outcomes)


def test_a_number_is_no_factor():
    state = {
        "x.lora_A.weight": torch.tensor(1.0),
        "x.lora_B.weight": torch.ones(6, 2),
        "x.lora_B.bias": torch.ones(6),
        "y.lora_A.weight": torch.ones(2, 4),
        "y.lora_B.weight": torch.ones(6, 2),
    }
    file = read_lora(state)
    assert set(file.adapters) == {"y"}
    assert "x.lora_A.weight" in {item.key for item in file.unplaced if "single number" in item.detail}


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_numbers_whose_sum_overflows_are_no_damage(dtype):
    most = torch.finfo(dtype).max
    for low in (most, -most, 0.0):
        factor = torch.full((2, 4), most, dtype=torch.float32)
        factor[1] = low
        assert read_lora(lora("one", (6, 4)) | {"one.lora_down.weight": factor.to(dtype)}, TARGETS).adapters


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("values", [[float("nan")], [float("inf"), float("-inf")], [float("-inf")]], ids=str)
def test_a_single_bad_number_is_damage(dtype, values):
    if dtype is torch.float8_e4m3fn and values[0] == values[0]:
        values = [float("nan")]  # it knows no infinity
    for place in range(8 - len(values)):
        factor = torch.randn(8)
        factor[place : place + len(values)] = torch.tensor(values)
        keys = lora("one", (6, 4)) | {"one.lora_down.weight": factor.view(2, 4).to(dtype)}
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            read_lora(keys, TARGETS)
