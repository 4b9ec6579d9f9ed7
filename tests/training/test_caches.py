"""Keys that tell everything apart, and a cache on disk that never serves what it should not."""

import dataclasses
import hashlib
import multiprocessing
import os
import sys
import time

import pytest
import torch

from lora_loom.training.caches import COLUMNS, DiskCache, Entry, checksum, key_of


@dataclasses.dataclass
class Pair:
    left: object
    right: object


@dataclasses.dataclass
class Other:
    left: object
    right: object


FACTS = [
    None, True, False, 0, 1, 1.0, 0.0, -0.0, "", "1", "True", "None", b"", b"1", (), (1,), ((1,),), (1, ()), {},
    {"a": 1}, {"a": "1"}, {"b": 1}, ("a", 1), ("ab", "c"), ("a", "bc"), ("a", ("b", "c")), (("a", "b"), "c"),
    ("sequence 0", ""), Pair(1, 2), Pair(2, 1), Other(1, 2), {"left": 1, "right": 2}, 1e-300, 2**80,
    torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(0),
    torch.zeros(0, 3), torch.tensor(0.0), torch.tensor(-0.0), torch.zeros(2, dtype=torch.bfloat16),
    torch.zeros(2, dtype=torch.float16),
]  # fmt: skip


def test_every_fact_has_a_key_of_its_own():
    assert len({key_of(fact) for fact in FACTS}) == len(FACTS)
    assert len({key_of(*FACTS[:count]) for count in range(len(FACTS))}) == len(FACTS)


def test_the_key_is_written_down():
    """Other processes and later versions must find what this one has kept."""
    written = b"sequence 3:0:" + b"NoneType:4:None" + b"str:3:'a'" + b"tensor torch.uint8 (2,):2:\x07\xff"
    assert key_of(None, "a", torch.tensor([7, 255], dtype=torch.uint8)) == hashlib.sha256(written).hexdigest()


def test_equal_content_has_one_key():
    table = torch.randn(6, 5)
    assert key_of(table) == key_of(table.clone()) == key_of(table.T.contiguous().T)
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1})
    assert key_of([1, 2]) == key_of((1, 2))
    with torch.inference_mode():
        assert key_of(table.clone()) == key_of(table)


@pytest.mark.parametrize("unknown", [object(), lambda: 1, {1, 2}, (1, [object()])])
def test_what_has_no_content_is_refused(unknown):
    with pytest.raises(TypeError, match="no content"):
        key_of(unknown)


# ---------------------------------------------------------------- checksums of weights

SHAPES = [(), (0,), (3,), (5, 7), (COLUMNS, 9), (3, 1237, 5), (64, 64, 3, 3)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.float8_e4m3fn]


def weights(shape, dtype, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, shape, generator=draws).to(torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_changed_bit_anywhere_is_seen(shape, dtype):
    tensor = weights(shape, dtype)
    before = checksum([("w", tensor)])
    assert checksum([("w", tensor.clone())]) == before
    content = tensor.reshape(-1).view(torch.uint8)
    draws = torch.Generator().manual_seed(1)
    places = torch.randint(0, max(1, len(content)), (20,), generator=draws).tolist() if len(content) else []
    for place in {0, len(content) - 1, *places} if places else ():
        content[place] ^= 1 << place % 8
        assert checksum([("w", tensor)]) != before, f"byte {place} of {len(content)}"
        content[place] ^= 1 << place % 8
    assert checksum([("w", tensor)]) == before


def test_exchanged_parts_names_shapes_and_kinds_are_seen():
    table = torch.randn(40, 2 * COLUMNS)  # rows of the checksum's own table, so that columns alone would not tell
    before = checksum([("a", table), ("b", table[:3])])
    rows = table.clone()
    rows[[3, 17]] = rows[[17, 3]]
    halves = torch.cat([table[:, COLUMNS:], table[:, :COLUMNS]], 1)
    for other in (rows, halves, table.view(-1), table.view(torch.int32), table.T, -table):
        assert checksum([("a", other), ("b", table[:3])]) != before
    assert checksum([("b", table), ("a", table[:3])]) != before
    assert checksum([("b", table[:3]), ("a", table)]) != before


def test_places_in_memory_do_not_matter():
    """Slices of a file that was read as a whole lie anywhere, and some layers share or transpose their weights."""
    table = torch.randint(0, 255, (8 * COLUMNS * 5 + 13,), dtype=torch.uint8)
    expected = checksum([("w", table)])
    for offset in range(1, 9):
        around = torch.zeros(len(table) + 16, dtype=torch.uint8)
        around[offset : offset + len(table)] = table
        assert checksum([("w", around[offset : offset + len(table)])]) == expected
    matrix = torch.randn(300, 500)
    assert checksum([("w", matrix.T)]) == checksum([("w", matrix.T.contiguous())])


# ---------------------------------------------------------------- on disk

KEYS = [key_of(number) for number in range(20)]


def entry(seed=0, length=7):
    draws = torch.Generator().manual_seed(seed)
    tensors = {
        "odd": torch.randn(1, 3, length, 5, generator=draws),
        "half": torch.randn(2, 3, generator=draws).to(torch.bfloat16),
        "scalar": torch.tensor(seed),
        "none": torch.zeros(0, 4),
        "turned": torch.randn(4, 6, generator=draws).T,
        "mask": torch.randn(9, generator=draws) > 0,
    }
    return Entry(tensors, {"crop": [seed, 2], "text": "zørb \"x\"", "nothing": None, "part": 0.1})


def same(one, other):
    return (
        one is not None
        and one.facts == other.facts
        and one.tensors.keys() == other.tensors.keys()
        and all(
            torch.equal(found, other.tensors[name]) and found.dtype == other.tensors[name].dtype
            for name, found in one.tensors.items()
        )
    )


@pytest.fixture
def cache(tmp_path):
    return DiskCache(tmp_path / "deep" / "cache", 1 << 30)


def file_of(cache, key):
    [path] = cache.folder.glob(f"{key[:2]}/{key}.*")
    return path


def test_what_was_put_is_found_again(cache):
    assert cache.get(KEYS[0]) is None
    for number in range(3):
        cache.put(KEYS[number], entry(number))
    again = DiskCache(cache.folder, 1 << 30)
    with torch.inference_mode():
        found = [again.get(key) for key in KEYS[:4]]
    assert all(same(one, entry(number)) for number, one in enumerate(found[:3])) and found[3] is None
    assert (again.hits, again.misses) == (3, 1)
    for tensor in found[0].tensors.values():
        assert not tensor.is_inference() and tensor.is_contiguous()
    found[0].tensors["odd"].zero_()  # nobody else has it
    assert same(again.get(KEYS[0]), entry(0))


def test_a_later_entry_replaces_an_earlier_one(cache):
    cache.put(KEYS[0], entry(0))
    cache.put(KEYS[0], entry(1))
    assert same(cache.get(KEYS[0]), entry(1))
    assert [path.name for path in cache.folder.glob("*/*")] == [f"{KEYS[0]}.safetensors"]


def test_a_changed_bit_anywhere_makes_an_entry_missing(cache):
    cache.put(KEYS[0], entry())
    path = file_of(cache, KEYS[0])
    content = path.read_bytes()
    draws = torch.Generator().manual_seed(0)
    start = 8 + int.from_bytes(content[:8], "little")
    places = torch.randint(0, len(content), (60,), generator=draws).tolist()
    served = 0
    for place in {*range(12), start - 1, start, len(content) - 1, *places}:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :])
        found = DiskCache(cache.folder, 1 << 30).get(KEYS[0])
        served += found is not None
        assert found is None or same(found, entry()), f"byte {place}"
    assert served <= 12  # hashes that are not ours, white space of the header


@pytest.mark.parametrize("length", [0, 1, 7, 8, 100, 1000, -1])
def test_a_torn_entry_is_missing_and_written_anew(cache, length):
    cache.put(KEYS[0], entry())
    path = file_of(cache, KEYS[0])
    path.write_bytes(path.read_bytes()[:length])
    assert cache.get(KEYS[0]) is None
    cache.put(KEYS[0], entry())
    assert same(cache.get(KEYS[0]), entry())


def test_an_entry_in_anothers_place_is_missing(cache):
    cache.put(KEYS[0], entry(0))
    cache.put(KEYS[1], entry(1))
    file_of(cache, KEYS[1]).write_bytes(file_of(cache, KEYS[0]).read_bytes())
    assert cache.get(KEYS[1]) is None and same(cache.get(KEYS[0]), entry(0))


def test_the_longest_unused_go_first(cache):
    for number, key in enumerate(KEYS[:6]):
        cache.put(key, entry(number))
        os.utime(file_of(cache, key), (1000 + number, 1000 + number))
    each = max(path.stat().st_size for path in cache.folder.glob("*/*"))
    cache.get(KEYS[0])  # used just now
    small = DiskCache(cache.folder, 3 * each)
    small.prune()
    left = {path.stem for path in cache.folder.glob("*/*")}
    assert left == {KEYS[0], KEYS[4], KEYS[5]}
    small.prune()
    assert {path.stem for path in cache.folder.glob("*/*")} == left
    DiskCache(cache.folder, 0).prune()
    assert not list(cache.folder.glob("*/*"))


def test_what_broken_off_writers_left_goes_once_it_is_old(cache):
    cache.put(KEYS[0], entry())
    folder = file_of(cache, KEYS[0]).parent
    old, new = folder / ".old-12345678.part", folder / ".new-12345678.part"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 1e5,) * 2)
    cache.prune()
    assert not old.exists() and new.exists() and same(cache.get(KEYS[0]), entry())


def test_a_cache_that_cannot_be_written_says_so(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = DiskCache(tmp_path / "cache", 1 << 30)
    cache.put(KEYS[0], entry())
    assert "could not write" in cache.problem and cache.get(KEYS[0]) is None
    cache.prune()


@pytest.mark.parametrize("key", ["", "../../etc", "0" * 63, "0" * 65, "A" * 64, "..", "0" * 62 + "/.", "0" * 63 + "\n"])
def test_nothing_but_a_key_names_a_file(cache, key):
    for call in (cache.get, lambda key: cache.put(key, entry())):
        with pytest.raises(ValueError, match="is no key"):
            call(key)
    assert not cache.folder.exists()


def hammer(folder, seed, rounds):
    cache = DiskCache(folder, 40_000)
    for number in range(rounds):
        key = (number * 7 + seed * 3) % 5
        cache.put(KEYS[key], entry(key, 50))
        found = cache.get(KEYS[(key + seed) % 5])
        assert found is None or same(found, entry((key + seed) % 5, 50))
        if number % 5 == 0:
            cache.prune()
    assert not cache.problem


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_processes_share_a_cache(tmp_path):
    """Writers of the same keys, readers and pruning all at once: an entry is whole or absent."""
    forks = multiprocessing.get_context("fork")
    processes = [forks.Process(target=hammer, args=(tmp_path / "cache", seed, 40)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert not list((tmp_path / "cache").glob("*/*.part"))
