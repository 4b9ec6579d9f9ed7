"""Datasets as TOML for sd-scripts: read back they are the same, and what the format cannot say stands in comments."""

import dataclasses
import json
from fractions import Fraction

import pytest
import toml
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_loom.training.dataset.balancing import split_validation
from lora_loom.training.dataset.combining import combine
from lora_loom.training.dataset.config_writing import to_toml
from lora_loom.training.dataset.model import (
    Access,
    BucketOptions,
    CaptionOptions,
    Concept,
    DatasetError,
    GraphPicture,
    ImageOptions,
)
from lora_loom.training.dataset.opening import open_dataset

ANYWHERE = Access(lambda path: True, lambda path: "")
# docs/config_README-en.md of sd-scripts, its tables of options; validation and masks from its sources
OF_DATASETS = {"batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso"}
OF_DATASETS |= {"min_bucket_reso", "resolution"}
OF_SUBSETS = {"color_aug", "face_crop_aug_range", "flip_aug", "keep_tokens", "num_repeats", "random_crop"}
OF_SUBSETS |= {"shuffle_caption", "caption_prefix", "caption_suffix", "caption_separator", "keep_tokens_separator"}
OF_SUBSETS |= {"secondary_separator", "enable_wildcard", "image_dir", "caption_extension", "class_tokens", "is_reg"}
OF_SUBSETS |= {"metadata_file", "caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_tag_dropout_rate"}
OF_SUBSETS |= {"conditioning_data_dir", "alpha_mask", "token_warmup_min", "token_warmup_step"}

texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=8)
parts = st.floats(0, 1, allow_subnormal=False)
whole_captions = st.builds(
    CaptionOptions,
    prefix=texts,
    suffix=texts,
    separator=st.sampled_from([",", ";", "、"]),
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 9),
    keep_tokens_separator=texts,
    secondary_separator=texts,
    dropout=parts,
    dropout_every_n_epochs=st.integers(0, 9),
    tag_dropout=parts,
    warmup_min=st.integers(0, 9),
    warmup_steps=st.floats(0, 1000, allow_subnormal=False),
)
captions = st.builds(
    lambda options, wild: dataclasses.replace(options, wildcards=wild, lines="random" if wild else "first"),
    whole_captions,
    st.booleans(),
)
zooms = st.tuples(st.floats(1, 3), st.floats(3, 9))
images = st.builds(
    lambda colour, **options: ImageOptions(**options, **({"hue": 8 / 180, "brightness": 0.05} if colour else {})),
    colour=st.booleans(),
    crop=st.sampled_from(["centre", "random"]),
    zoom=st.none() | zooms,
    flip=st.booleans(),
    alpha_mask=st.booleans(),
)
buckets = st.builds(
    BucketOptions,
    step=st.sampled_from([8, 32, 64]),
    min_side=st.none() | st.integers(64, 256),
    max_side=st.none() | st.integers(512, 2048),
    upscale=st.booleans(),
)
off = st.builds(lambda step: BucketOptions(enabled=False, step=step), st.sampled_from([8, 64]))
concepts = st.builds(
    Concept,
    kind=st.sampled_from(["training", "regularisation"]),
    resolutions=st.tuples(st.tuples(st.integers(64, 2048), st.integers(64, 2048))),
    repeats=st.integers(1, 50).map(Fraction),
    batch_size=st.none() | st.integers(1, 16),
    buckets=buckets | off,
    captions=captions,
    images=images,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("we[i]rd ' \" \\ ünicode 猫")
    for name in ("0/a.png", "0/b.png", "1/c.png", "1/d.png"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48)).save(path)
        path.with_suffix(".txt").write_text("a cat\nsecond line")
    (folder / "1/d.txt").unlink()
    return folder


def opened(path, text=None, defaults=None):
    if text is not None:
        path.write_text(text, encoding="utf-8")
    return open_dataset(path, defaults or Concept(), ANYWHERE)


def same(one, other):
    facts = [
        [(s.id, s.picture, s.caption, s.mask, s.focus, s.caption_path, d.of(s)) for s in d.samples]
        for d in (one, other)
    ]
    return facts[0] == facts[1] and one.concepts == other.concepts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(concepts, min_size=2, max_size=2))
def test_read_back_it_is_the_same(folder, pair):
    base = opened(
        folder / "base.toml",
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '0'\n"
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = '1'\nclass_tokens = 'the class'\n",
    )
    named = tuple(dataclasses.replace(one, name=str(index), group=index + 1) for index, one in enumerate(pair))
    dataset = dataclasses.replace(base, concepts=named)
    text = to_toml(dataset)
    assert same(opened(folder / "base.toml", text), dataset)
    assert not [line for line in text.splitlines() if line.startswith("#") and "sd-scripts caps" not in line]
    parsed = toml.loads(text)  # what sd-scripts reads it with
    assert [table["subsets"][0]["image_dir"] for table in parsed["datasets"]] == [str(folder / "0"), str(folder / "1")]
    for table in parsed["datasets"]:
        assert set(table) <= OF_DATASETS | {"subsets"}
        assert all(set(subset) <= OF_SUBSETS for subset in table["subsets"])
        assert all(type(subset["num_repeats"]) is int for subset in table["subsets"])


def test_lists_of_captions_and_masks_come_back(tmp_path):
    for name in ("pics/deep/a.png", "pics/b.png", "masks/a.png", "masks/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48)).save(tmp_path / name)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/meta.json").write_text(json.dumps({"deep/a": {"caption": "x", "tags": "y"}, "b.png": "z"}))
    dataset = opened(
        tmp_path / "set.toml",
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'pics'\nmetadata_file = 'lists/meta.json'\n"
        "conditioning_data_dir = 'masks'\n",
    )
    text = to_toml(dataset)
    assert comments(dataset) == ["# sd-scripts refuses beside conditioning_data_dir: metadata_file"]
    assert same(opened(tmp_path / "again.toml", text), dataset)
    less = dataclasses.replace(dataset, samples=(dataclasses.replace(dataset.samples[0], caption="edited"),))
    assert comments(less) == [
        "# captions that were edited and are not in the list: pics/deep/a.png",
        "# entries of the list that are not in the dataset: 1",
        "# sd-scripts refuses beside conditioning_data_dir: metadata_file",
    ]
    rows = {f"{name}.png": {"caption": name, "mask": f"../masks/{name.split('/')[-1]}.png"} for name in ("deep/a", "b")}
    (tmp_path / "pics/meta.json").write_text(json.dumps(rows))
    dataset = opened(tmp_path / "pics/meta.json", defaults=Concept(name="pics", captions=CaptionOptions(lines="first")))
    assert comments(dataset) == ["# masks that the list names, where sd-scripts reads none: deep/a.png, b.png"]
    again = opened(tmp_path / "again.toml", to_toml(dataset))
    assert [s.mask for s in again.samples] == [s.mask for s in dataset.samples] and dataset.samples[0].mask


def test_sd_scripts_finds_no_two_kinds_of_subsets_in_a_dataset(tmp_path):
    for name in ("plain/a.png", "masked/a.png", "masks/a.png", "listed/a.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (64, 48)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a")
    (tmp_path / "listed/meta.json").write_text('{"a.png": "a"}')
    mixed = "".join(
        f"[[datasets.subsets]]\n{values}\n"
        for values in (
            "image_dir = 'plain'",
            "image_dir = 'masked'\nconditioning_data_dir = 'masks'\nalpha_mask = true",
            "metadata_file = 'listed/meta.json'\nis_reg = true",
        )
    )
    dataset = opened(tmp_path / "set.toml", "[[datasets]]\n" + mixed)
    written = toml.loads(to_toml(dataset))["datasets"]
    assert [sorted({"conditioning_data_dir", "metadata_file"} & set(s)) for d in written for s in d["subsets"]] == [
        [],
        ["conditioning_data_dir"],
        ["metadata_file"],
    ]
    assert [len(d["subsets"]) for d in written] == [1, 1, 1]
    apart = "# apart from another of these options: sd-scripts cannot have both in one"
    assert [line for line in comments(dataset) if "sd-scripts " in line] == [
        apart,
        "# sd-scripts refuses beside conditioning_data_dir: alpha_mask",
        apart,
        "# sd-scripts refuses beside metadata_file: is_reg",
    ]
    again = opened(tmp_path / "again.toml", to_toml(dataset))
    assert [s.mask for s in again.samples] == [s.mask for s in dataset.samples]
    assert [c.kind for c in again.concepts] == [c.kind for c in dataset.concepts]


def comments(dataset):
    return [line for line in to_toml(dataset).splitlines() if line.startswith("#")]


def test_what_the_format_cannot_say_is_a_comment(folder):
    concept = Concept(
        name="x",
        resolutions=((1024, 1024),),
        repeats=Fraction(7, 3),
        loss_weight=0.5,
        buckets=BucketOptions(max_aspect=2.0, merge=False),
        captions=CaptionOptions(trigger="ohwx\nman", never_drop=("a", "b"), weighted=True),
        images=ImageOptions(crop="focus", rotate=5.0, hue=0.1, mask_floor=0.1, background="#000000"),
    )
    dataset = opened(folder / "0", defaults=concept)
    first, second = dataset.samples
    focused = dataclasses.replace(first, caption="edited", focus=(0.1, 0.1, 0.9, 0.9), mask=second.picture)
    from_graph = dataclasses.replace(second, id="g", picture=GraphPicture(torch.zeros(8, 8, 3)))
    other = dataclasses.replace(concept, kind="validation", validation_split=0.5)
    held = dataclasses.replace(first, id="v", concept=1)
    mixed = dataclasses.replace(dataset, concepts=(concept, other), samples=(focused, from_graph, held))
    assert comments(mixed) == [
        "# pictures from the graph are left out: g",
        "# validation images without the folder they were held back from: v",
        "# no key for max_aspect = 2.0",
        "# no key for merge = False",
        "# sd-scripts caps buckets at 1024; for all of these: max_bucket_reso = 1448",
        "# captions that were edited and are not in their files: a.png",
        "# masks need a folder with one for each image, under its name: a.png",
        "# in the folder, but not in the dataset: b.png",
        "# no key for the focus boxes: a.png",
        "# no key for trigger = 'ohwx\\nman'",
        "# no key for never_drop = ('a', 'b')",
        "# no key for weighted = True",
        "# no key for rotate = 5.0",
        "# no key for background = '#000000'",
        "# no key for mask_floor = 0.1",
        "# num_repeats is exactly 7/3 = 2.333; sd-scripts takes whole numbers",
        "# no key for loss_weight = 0.5; see --prior_loss_weight",
        "# no key for lines = 'all': sd-scripts shows the first line of a caption",
        "# no key for crop = 'focus'",
        "# no key for hue = 0.1",
    ]
    assert toml.loads(to_toml(mixed))["datasets"][0]["subsets"] == [
        {"image_dir": str(folder / "0"), "caption_extension": ".txt", "num_repeats": 2}
    ]
    with pytest.raises(DatasetError, match="no picture of the dataset is in a file; save the pictures"):
        to_toml(dataclasses.replace(mixed, samples=(from_graph,)))


def test_several_folders_sizes_and_counts_become_several_tables(folder):
    sizes = ((512, 512), (768, 768))
    dataset = opened(
        folder, defaults=Concept(name="x", resolutions=sizes, samples_per_epoch=9, captions=CaptionOptions(trigger="t"))
    )
    parsed = toml.loads(to_toml(dataset))["datasets"]
    assert [table["resolution"] for table in parsed] == [512, 768]
    for table in parsed:
        assert [subset["image_dir"] for subset in table["subsets"]] == [str(folder / "0"), str(folder / "1")]
        assert [subset["num_repeats"] for subset in table["subsets"]] == [2, 2]
    lines = comments(dataset)
    assert "# num_repeats is exactly 9/4 = 2.25; sd-scripts takes whole numbers" in lines
    assert "# without a caption: 1/d.png" in lines


def test_validation_comes_back_as_it_was(tmp_path):
    names = [f"{folder}/{index}.png" for folder in ("0", "1", "watched") for index in range(7)]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (number, 0, 0)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(name)
    subset = "[[datasets.subsets]]\nimage_dir = '{}'\n"
    text = "[[datasets]]\nvalidation_split = 0.3\nvalidation_seed = 5\n" + subset.format("0") + subset.format("1")
    for more in ("", "[[datasets]]\nvalidation_split = 1.0\n" + subset.format("watched")):
        dataset = opened(tmp_path / "set.toml", text + more)
        written = to_toml(dataset)
        assert len(dataset.members("validation")) == (11 if more else 4) and "#" not in written
        assert same(opened(tmp_path / "set.toml", written), dataset)
    whole = split_validation(
        opened(tmp_path, defaults=Concept(name="x", captions=CaptionOptions(lines="first"))), 0.2, 0
    )
    assert comments(whole) == ["# validation_split holds back other pictures: it counts per folder in: x"]
    kept = dataset.with_samples(sample for sample in dataset.samples if dataset.of(sample).kind == "validation")
    assert comments(kept)[0].startswith("# validation images without the folder they were held back from: 0/")


def test_a_folder_that_is_used_twice_is_written_twice(folder):
    plain, flipped = (
        opened(folder / "0", defaults=Concept(captions=CaptionOptions(lines="first"), images=ImageOptions(flip=flip)))
        for flip in (False, True)
    )
    text = to_toml(combine([plain, flipped]))
    assert [c.images.flip for c in opened(folder / "base.toml", text).concepts] == [False, True]


def test_nothing_in_a_name_or_caption_becomes_toml(tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a\nimage_dir = 'x'.png")
    trigger = CaptionOptions(trigger="x\r\n[[datasets]]\x85\u2028evil = 1", lines="first")
    dataset = opened(tmp_path, defaults=Concept(name="x", captions=trigger))
    text = to_toml(dataset)
    assert len(toml.loads(text)["datasets"]) == 1 and "\nevil" not in text and "\nimage_dir = 'x'" not in text
