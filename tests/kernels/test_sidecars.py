"""What managers keep beside a LoRA is read as they write it, in the order that was settled, and harms nobody."""

import hashlib
import json
import os
import random
import time

import pytest
import torch

from lora_loom.kernels.metadata import split_words, trained_on, trigger_words
from lora_loom.kernels.safetensors_io import read_metadata, save_tensors
from lora_loom.kernels.sidecars import MAX_BYTES, MAX_DESCRIPTION, facts_about

CIVITAI = {"id": 7, "baseModel": "SDXL 1.0", "trainedWords": ["ohwx cat, Whiskers", "cat"], "description": "<p>Cat</p>"}
CARDS = {  # name beside cat.safetensors, content as its manager writes it, words
    "cat.json": (
        {
            "description": "mine", "sd version": "SD1", "activation text": "a1, b1 (soft), a1", "preferred weight": 0.7,
            "negative text": "dog", "notes": "",
        },
        ("a1", "b1 (soft)"),
    ),
    "cat.civitai.info": (CIVITAI, ("ohwx cat", "Whiskers", "cat")),
    "cat.metadata.json": (
        {"file_name": "cat", "base_model": "SDXL 1.0", "civitai": CIVITAI | {"trainedWords": ["m1"]}, "notes": "n"},
        ("m1",),
    ),
    "cat.safetensors.rgthree-info.json": (
        {
            "file": "cat.safetensors", "baseModel": "SDXL 1.0",
            "trainedWords": [
                {"word": "r1", "civitai": True, "count": 9, "metadata": True}, {"word": "r2", "user": True},
                {"word": "1girl", "count": 99, "metadata": True}, {"word": "r3"},
            ],
        },
        ("r1", "r2", "r3"),
    ),
    "cat.cm-info.json": ({"ModelId": 1, "TrainedWords": ["s1"], "BaseModel": "SDXL 1.0"}, ("s1",)),
}  # fmt: skip
TAGS = json.dumps({"10_cats": {"fur": 8, "grass": 2}, "more": {" fur": 1}})
PHRASE = {"modelspec.trigger_phrase": "own phrase"}
COUNTED = {"ss_tag_frequency": TAGS, "ss_num_train_images": "10"}


@pytest.fixture
def lora(tmp_path):
    return save_tensors({"x": torch.randn(3)}, tmp_path / "cat.safetensors")


def beside(lora, name, content):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (lora.parent / name).write_bytes(text)


def digest_of(path):
    return lambda: hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", CARDS)
def test_each_manager(lora, name):
    content, words = CARDS[name]
    beside(lora, name, content)
    facts = facts_about(lora, {})
    assert (facts.words, facts.source, facts.notes) == (words, name, ())
    assert facts.line() == f"trigger words: {', '.join(words)} (from {name})"
    assert facts.base_model == ("SD1" if name == "cat.json" else "SDXL 1.0")
    if name == "cat.json":
        assert (facts.strength, facts.negative, facts.description) == (0.7, "dog", "mine")


def test_the_order_of_sources(lora):
    """Each source in turn is taken away: the next one has the word."""
    metadata = PHRASE | COUNTED | {"ss_datasets": json.dumps([{"subsets": [{"class_tokens": "sks cat"}]}])}
    for name, (content, _) in CARDS.items():
        beside(lora, name, content)
    beside(lora, "cat.txt", b"word, of, a, description")
    steps = []
    for name in (None, *CARDS, "ss_datasets", "ss_tag_frequency"):
        steps.append(facts_about(lora, metadata).source)
        if name is None:
            del metadata["modelspec.trigger_phrase"]
        elif name in CARDS:
            (lora.parent / name).unlink()
        else:
            del metadata[name]
    last = facts_about(lora, metadata)
    assert steps == ["modelspec.trigger_phrase", *CARDS, "class_tokens", "tags in 60% of the captions"]
    assert (last.words, last.line(), last.description) == ((), "", "word, of, a, description")


def test_a_lora_that_is_no_file():
    assert facts_about(None, PHRASE).words == ("own phrase",)
    assert facts_about(None, {}).line() == ""


# ---------------------------------------------------------------- a model's page, of which one version is the file


def version(word, **hashes):
    return {"trainedWords": [word], "baseModel": "Pony", "files": [{"name": f"{word}.safetensors", "hashes": hashes}]}


def test_the_version_is_found_by_hash(lora):
    whole, data = digest_of(lora)().upper(), read_metadata(lora)["sshs_model_hash"]
    others = [version("x", SHA256="0" * 64, AutoV3="1" * 12), version("y", AutoV2="2" * 10), "damaged", {"files": [3]}]
    for kind, value in (("SHA256", whole), ("AutoV2", whole[:10]), ("AutoV3", data[:12])):
        versions = [*others, version("mine", **{kind: value})]
        random.Random(kind).shuffle(versions)
        beside(lora, "cat.json", {"name": "Cats", "description": "<b>All</b> cats", "modelVersions": versions})
        facts = facts_about(lora, read_metadata(lora), digest_of(lora))
        assert (facts.words, facts.base_model, facts.description, facts.notes) == (("mine",), "Pony", "All cats", ())


def test_the_version_is_found_by_name_where_no_hash_fits(lora):
    beside(lora, "cat.json", {"modelVersions": [version("dog"), version("cat")]})
    assert facts_about(lora, {}).words == ("cat",)
    beside(lora, "cat.json", {"modelVersions": [version("cat"), version("cat")]})
    facts = facts_about(lora, {})
    assert facts.words == ()
    assert facts.notes == (
        "cat.json: none of its 2 versions has this file's hash or name, so no words were taken from it",
    )


def test_the_file_is_hashed_only_where_that_tells_something(lora):
    def never():
        pytest.fail("it was hashed")

    for name, (content, _) in CARDS.items():
        beside(lora, name, content)
    assert facts_about(lora, {}, never).words
    found = version("mine", AutoV3=read_metadata(lora)["sshs_model_hash"][:12], SHA256="0" * 64)
    beside(lora, "cat.json", {"modelVersions": [found]})
    assert facts_about(lora, read_metadata(lora), never).words == ("mine",)


# ---------------------------------------------------------------- what files hold


DAMAGED = [
    b"", b"{", b"[1, 2]", b"null", b"\xff\xfe\x00", b"\x00" * 100, b"[" * 100_000, b'{"a":' * 100_000,
    b'{"a":' + b"9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damage_is_told_not_raised(lora, name, content):
    beside(lora, name, content)
    facts = facts_about(lora, COUNTED)
    assert facts.words == ("fur",)
    assert facts.notes == (f"{name} is damaged (no JSON object) and was not used",)


ODD = [
    3, -1.5, True, None, "", "text", [], [[]], [None, 3, {}], {}, {"a": {}}, float("nan"), float("inf"), 10**400,
    [{"word": 3}, {"word": None, "user": 1}], "\x00\x1b[31m\u202e", [{"files": {"name": 3}}], ["w", 3, "w"],
    "<" * 50_000, ["(" * 50_000],
]  # fmt: skip


def test_values_of_any_kind(lora):
    keys = {key for content, _ in CARDS.values() for key in content} | {"modelVersions", "preferredWeight"}
    draws = random.Random(8)
    begun = time.process_time()
    for _ in range(200):
        for name in CARDS:
            beside(lora, name, {key: draws.choice(ODD) for key in keys})
        beside(lora, "cat.txt", draws.randbytes(50))
        facts = facts_about(lora, {})
        assert all(word and word.isprintable() and "<" not in word for word in facts.words)
        assert facts.strength is None or -100 <= facts.strength <= 100
        assert len(facts.description) <= MAX_DESCRIPTION and "\x1b" not in facts.description
    assert time.process_time() - begun < 20


def test_large_files_are_not_read(lora):
    beside(lora, "cat.civitai.info", CIVITAI | {"x": "y" * MAX_BYTES})
    facts = facts_about(lora, {})
    assert facts.words == ()
    (note,) = facts.notes
    assert note.startswith("cat.civitai.info has 1000") and note.endswith(f"was not read (at most {MAX_BYTES})")


def test_nothing_outside_of_the_folder_is_read(lora, tmp_path):
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "secret.json").write_text(json.dumps(CIVITAI))
    (tmp_path / "cat.civitai.info").symlink_to(outside / "secret.json")
    (tmp_path / "cat.json").symlink_to(tmp_path / "nothing")
    os.mkfifo(tmp_path / "cat.metadata.json")  # reading it would never end
    (tmp_path / "cat.txt").mkdir()
    facts = facts_about(lora, {})
    assert (facts.words, facts.description) == ((), "")
    assert facts.notes == (
        "cat.json is a link to nothing",
        "cat.civitai.info is a link that leads out of the folder and was not read",
        "cat.metadata.json is no file and was not read",
        "cat.txt is no file and was not read",
    )
    (tmp_path / "cat.civitai.info").unlink()
    (tmp_path / "real.json").write_text(json.dumps(CIVITAI))
    (tmp_path / "cat.civitai.info").symlink_to(tmp_path / "real.json")
    assert facts_about(lora, {}).words == ("ohwx cat", "Whiskers", "cat")


def test_a_lora_that_is_a_link_has_its_files_beside_the_link(lora, tmp_path):
    place = tmp_path / "loras"
    place.mkdir()
    (place / "linked.safetensors").symlink_to(lora)
    (place / "linked.civitai.info").write_text(json.dumps(CIVITAI))
    assert facts_about(place / "linked.safetensors", {}).source == "linked.civitai.info"


def test_descriptions_without_markup(lora):
    text = "<h1>Cat &amp; dog</h1><p>Use&nbsp;<strong>0.8</strong><br/>and   <a href='http://x.y'>more</a></p>\r\n\x07&lt;3"
    beside(lora, "cat.civitai.info", {"description": text})
    assert facts_about(lora, {}).description == "Cat & dog\nUse 0.8\nand more\n<3"
    beside(lora, "cat.civitai.info", {"description": "x" * 50_000})
    assert len(facts_about(lora, {}).description) == MAX_DESCRIPTION


def test_a_strength_that_was_never_set_is_none(lora):
    for value in (0, 0.0, None, "1", True, 101, float("nan")):
        beside(lora, "cat.json", {"activation text": "a", "preferred weight": value})
        assert facts_about(lora, {}).strength is None, value


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["a, b,,  c d ,"], ["a", "b", "c d"]),
        (["Cat, cat", "CAT"], ["Cat"]),
        (["(red hair, long hair:1.2), blue"], ["(red hair, long hair:1.2)", "blue"]),
        ([r"saber \(fate, zero\), x"], [r"saber \(fate", r"zero\)", "x"]),
        (["(never closed, a"], ["(never closed", "a"]),
        (["a) b, (c"], ["a) b", "(c"]),
        (["line one\nline two; three"], ["line one", "line two", "three"]),
        (["<lora:other:1> word, <b>bold</b>"], ["word", "bold"]),
        (["x" * 201 + ", short"], ["short"]),
        ([None, 3, ["a"], "a"], ["a"]),
        (["a\u200bb\x00, 猫"], ["猫"]),
    ],
)
def test_words(texts, words):
    assert split_words(*texts) == words


# ---------------------------------------------------------------- what trainers leave in the header


def datasets(*subsets):
    return json.dumps([{"resolution": [512, 512], "subsets": list(subsets)}])


def test_captions_are_counted_once_however_often_pictures_are_repeated():
    """sd-scripts: tags by folder, each picture once; ss_num_train_images has the repeats in it."""
    tags = {"10_cats": {"fur": 8, "grass": 5}, "reg": {"person": 1000}, "more": {"fur": 2, "sky": 4}}
    subsets = [
        {"image_dir": "10_cats", "img_count": 8, "num_repeats": 10, "is_reg": False, "class_tokens": None},
        {"image_dir": "more", "img_count": 6, "num_repeats": 1, "is_reg": False},
        {"image_dir": "reg", "img_count": 1000, "num_repeats": 1, "is_reg": True, "class_tokens": "person"},
        {"image_dir": "without captions", "img_count": 500, "num_repeats": 1, "is_reg": False},
    ]
    metadata = {"ss_tag_frequency": json.dumps(tags), "ss_num_train_images": "1086", "ss_datasets": datasets(*subsets)}
    assert trained_on(metadata).texts == ["fur"]  # 10 of 14 captions; in the first bucket alone grass had 5 of 8
    twice = json.loads(metadata["ss_datasets"]) * 2  # the same folders at two resolutions: tags are counted once
    assert trained_on(metadata | {"ss_datasets": json.dumps(twice)}).texts == ["fur"]
    older = {key: value for key, value in metadata.items() if key != "ss_datasets"}
    older["ss_dataset_dirs"] = json.dumps({"10_cats": {"n_repeats": 10, "img_count": 8}, "more": {"img_count": 6}})
    assert trained_on(older).texts == ["fur"]


def test_names_of_concepts():
    metadata = {"ss_datasets": datasets({"class_tokens": "sks dog, x"}, {"class_tokens": "dog", "is_reg": True}, 3)}
    assert trained_on(metadata) == (["sks dog", "x"], "class_tokens")
    assert trigger_words(metadata | PHRASE) == ["own phrase"]


def test_ai_toolkits_trigger():
    assert trigger_words({"ss_tag_frequency": '{"1_p3r5on": {"p3r5on": 1}}'}) == ["p3r5on"]
    assert trigger_words({"ss_tag_frequency": '{"1_p3r5on": {"p3r5on": 1, "tree": 1}}'}) == []


@pytest.mark.parametrize("text", ["", "[", "3", "[3, {}]", '[{"subsets": 3}]', '[{"subsets": [{"img_count": "x"}]}]'])
def test_datasets_of_any_kind(text):
    assert trigger_words(COUNTED | {"ss_datasets": text, "ss_dataset_dirs": text}) == ["fur"]
