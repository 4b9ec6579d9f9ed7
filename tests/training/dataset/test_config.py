"""sd-scripts' configurations: every key, what wins over what, what is wrong and where, and back to TOML.

Snippets called "docs" are from docs/config_README-en.md of kohya-ss/sd-scripts, their folders renamed.
"""

import json
from fractions import Fraction

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.config_keys import KEYS as ALL_KEYS
from lora_loom.training.dataset.model import (
    Access,
    BucketOptions,
    CaptionOptions,
    Concept,
    DatasetError,
    ImageOptions,
)
from lora_loom.training.dataset.opening import dataset_state, open_dataset

PLAIN = Concept()
ANYWHERE = Access(lambda path: True, lambda path: "")
ONE = "[[datasets]]\n{}\n[[datasets.subsets]]\nimage_dir = 'cats'\n{}\n"


def put(folder, name, caption="a cat", size=(64, 48), kind=".txt"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path)
    if caption is not None:
        path.with_suffix(kind).write_text(caption)


def put_many(folder, name, count, **options):
    for index in range(count):
        put(folder, f"{name}/{index}.png", **options)


def opened(folder, text, defaults=PLAIN, access=ANYWHERE, name="set.toml", **options):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return open_dataset(path, defaults, access, **options)


def refuses(folder, text, *parts, **options):
    with pytest.raises(DatasetError) as caught:
        opened(folder, text, **options)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def samples(dataset):
    return {sample.id: sample.caption for sample in dataset.samples}


# ---------------------------------------------------------------- the documentation's examples

DOCS_OVERVIEW = """
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

# This is a DreamBooth-style dataset
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'hoge'
  class_tokens = 'hoge girl'
  # This subset uses keep_tokens = 2 (the value of the parent datasets)

  [[datasets.subsets]]
  image_dir = 'fuga'
  class_tokens = 'fuga boy'
  keep_tokens = 3

  [[datasets.subsets]]
  is_reg = true
  image_dir = 'reg'
  class_tokens = 'human'
  keep_tokens = 1

# This is a fine-tuning dataset
[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'piyo'
  metadata_file = 'piyo/piyo_md.json'
  # This subset uses keep_tokens = 1 (the value of [general])
"""


def test_the_overview_of_the_docs(tmp_path):
    put_many(tmp_path, "hoge", 6)
    put_many(tmp_path, "fuga", 6, caption=None)
    put_many(tmp_path, "reg", 4, caption=None)
    put_many(tmp_path, "piyo", 5, caption=None)
    (tmp_path / "piyo/piyo_md.json").write_text(json.dumps({f"{i}": {"caption": f"no {i}"} for i in range(5)}))
    dataset = opened(tmp_path, DOCS_OVERVIEW)
    facts = [(c.name, c.kind, c.captions.keep_tokens, c.batch_size, c.resolutions, c.group) for c in dataset.concepts]
    assert facts == [
        ("hoge", "training", 2, 4, ((512, 512),), 1),
        ("fuga", "training", 3, 4, ((512, 512),), 1),
        ("reg", "regularisation", 1, 4, ((512, 512),), 1),
        ("piyo", "training", 1, 2, ((768, 768),), 2),
    ]
    assert all(c.captions.shuffle and c.captions.lines == "first" and c.repeats == 1 for c in dataset.concepts)
    texts = samples(dataset)
    assert (texts["hoge/0.png"], texts["fuga/0.png"], texts["reg/0.png"]) == ("a cat", "fuga boy", "human")
    assert texts["piyo/3.png"] == "no 3" and len(texts) == 21
    # 12 training pictures and as many regularisation ones in fours, 5 pictures in twos
    assert BatchPlan(dataset, 1, 0).batches_in(1) == (12 + 12) // 4 + 3
    alone = opened(tmp_path, DOCS_OVERVIEW.split("# This is a fine-tuning dataset")[0])
    assert BatchPlan(alone, 1, 0).batches_in(1) == (12 + 12) // 4


def test_the_wildcard_example_of_the_docs(tmp_path):
    put_many(tmp_path, "path", 6)
    dataset = opened(
        tmp_path,
        """
[general]
flip_aug = true
color_aug = false
resolution = [1024, 1024]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator= "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;"
enable_wildcard = true

  [[datasets.subsets]]
  image_dir = "path"
  num_repeats = 1
  caption_prefix = "1girl, hatsune miku, vocaloid |||"
  caption_suffix = ", anime screencap ||| masterpiece, rating: general"
""",
    )
    assert dataset.concepts == (
        Concept(
            name="path",
            resolutions=((1024, 1024),),
            batch_size=6,
            group=1,
            buckets=BucketOptions(upscale=False),
            captions=CaptionOptions(
                prefix="1girl, hatsune miku, vocaloid |||",
                suffix=", anime screencap ||| masterpiece, rating: general",
                lines="random",
                wildcards=True,
                shuffle=True,
                keep_tokens_separator="|||",
                secondary_separator=";;;",
                tag_dropout=0.1,
            ),
            images=ImageOptions(flip=True),
        ),
    )
    assert dataset.notes == ()


def test_the_same_folder_in_two_datasets_of_the_docs(tmp_path):
    put_many(tmp_path, "hoge", 2)
    subset = "[[datasets.subsets]]\nimage_dir = 'hoge'\n"
    dataset = opened(tmp_path, f"[[datasets]]\nresolution = 512\n{subset}[[datasets]]\nresolution = 768\n{subset}")
    assert [(c.group, c.resolutions) for c in dataset.concepts] == [(1, ((512, 512),)), (2, ((768, 768),))]
    assert list(samples(dataset)) == ["hoge/0.png", "hoge/1.png", "hoge/0.png~2", "hoge/1.png~2"]
    again = opened(tmp_path, f"[[datasets]]\n{subset}num_repeats = 3\n{subset}num_repeats = 5\n")
    assert [concept.repeats for concept in again.concepts] == [3], "a second time in one dataset it is ignored"
    assert "datasets[0].subsets[1] is left out: its images are those of another subset" in again.notes


def test_the_mask_example_of_the_docs(tmp_path):
    # docs/masked_loss_README.md
    put_many(tmp_path, "a_zundamon", 2)
    put_many(tmp_path, "a_zundamon_mask", 3, caption=None)
    text = """
[[datasets]]
enable_bucket = true
[[datasets.subsets]]
image_dir = "a_zundamon"
caption_extension = ".txt"
conditioning_data_dir = "a_zundamon_mask"
num_repeats = 8
"""
    dataset = opened(tmp_path, text)
    assert [sample.mask.path for sample in dataset.samples] == [
        str(tmp_path / f"a_zundamon_mask/{index}.png") for index in range(2)
    ]
    where = "datasets[0].subsets[0].conditioning_data_dir"
    assert dataset.notes == (
        f"{where}: its images are masks; light is learned, dark is not",
        f"{where}: masks without an image: 2.png",
    )
    (tmp_path / "a_zundamon_mask/1.png").unlink()
    refuses(tmp_path, text, f"{where}: 1 image without a mask of the same name in ", "a_zundamon/1.png; add them")
    put(tmp_path, "a_zundamon_mask/1.png", caption=None)
    put(tmp_path, "a_zundamon_mask/1.jpg", caption=None)
    refuses(tmp_path, text, f"{where}: images with more than one mask: a_zundamon/1.png; remove one of each")
    alpha = opened(tmp_path, ONE.format("", "alpha_mask = true").replace("cats", "a_zundamon"))
    assert alpha.concepts[0].images.alpha_mask


# ---------------------------------------------------------------- keys

KEYS = {  # of a dataset, what comes of it
    "resolution = [512, 768]": {"resolutions": ((512, 768),)},
    "resolution = '640x512'": {"resolutions": ((640, 512),)},
    "resolution = '512, 768'": {"resolutions": ((512, 768),)},
    "resolution = '768'": {"resolutions": ((768, 768),)},
    "batch_size = 3": {"batch_size": 3},
    "num_repeats = 7": {"repeats": Fraction(7)},
    "num_repeats = 0.1": {"repeats": Fraction(1, 10)},
    "num_repeats = '1/3'": {"repeats": Fraction(1, 3)},
    "network_multiplier = 1": {},
    "validation_split = 0\nvalidation_seed = 5": {},
    "custom_attributes = {a = 1}": {},
    "resize_interpolation = 'lanczos'": {},
    "cache_info = 1": {},
}
BUCKETS = {
    "bucket_reso_steps = 32": {"step": 32},
    "min_bucket_reso = 256\nmax_bucket_reso = 1024": {"min_side": 256, "max_side": 1024},
    "bucket_no_upscale = true": {"upscale": False},
    "bucket_no_upscale = 0": {},
}
CAPTIONS = {
    "shuffle_caption = true": {"shuffle": True},
    "caption_separator = ';'": {"separator": ";"},
    "keep_tokens = 2": {"keep_tokens": 2},
    "keep_tokens_separator = '|||'": {"keep_tokens_separator": "|||"},
    "secondary_separator = ';;;'": {"secondary_separator": ";;;"},
    "enable_wildcard = 1": {"wildcards": True, "lines": "random"},
    "caption_prefix = 'a '\ncaption_suffix = ' b'": {"prefix": "a ", "suffix": " b"},
    "token_warmup_min = 2\ntoken_warmup_step = 0.5": {"warmup_min": 2, "warmup_steps": 0.5},
    "caption_dropout_rate = 0.25": {"dropout": 0.25},
    "caption_dropout_every_n_epochs = 4": {"dropout_every_n_epochs": 4},
    "caption_tag_dropout_rate = 1": {"tag_dropout": 1},
}
IMAGES = {
    "color_aug = true": {"hue": 8 / 180, "brightness": 0.05},
    "flip_aug = true": {"flip": True},
    "random_crop = true": {"crop": "random"},
    "random_crop = false": {},
    "face_crop_aug_range = [1, 3.5]": {"zoom": (1.0, 3.5)},
    "alpha_mask = true": {"alpha_mask": True},
}


@pytest.mark.parametrize("level", ["general", "datasets"])
@pytest.mark.parametrize("keys", [*KEYS, *BUCKETS, *CAPTIONS, *IMAGES])
def test_every_key(tmp_path, keys, level):
    put(tmp_path, "cats/a.png")
    text = ONE.format(f"enable_bucket = true\n{keys if level == 'datasets' else ''}", "")
    [concept] = opened(tmp_path, f"[general]\n{keys}\n{text}" if level == "general" else text).concepts
    captions = {"lines": "first"} | CAPTIONS.get(keys, {})
    expected = Concept(
        name="cats",
        group=1,
        buckets=BucketOptions(**BUCKETS.get(keys, {})),
        captions=CaptionOptions(**captions),
        images=ImageOptions(**IMAGES.get(keys, {})),
        **KEYS.get(keys, {}),
    )
    assert concept == expected


@pytest.mark.parametrize(
    "keys", [*[key for key in KEYS if key.startswith("num_repeats")], *CAPTIONS, *IMAGES, "class_tokens = 'x'"]
)
def test_options_of_pictures_may_stand_at_the_subset(tmp_path, keys):
    put(tmp_path, "cats/a.png")
    at_dataset = opened(tmp_path, ONE.format(keys, ""))
    assert opened(tmp_path, ONE.format("", keys)).concepts == at_dataset.concepts


def test_what_is_nearer_wins_and_the_loader_comes_last(tmp_path):
    put(tmp_path, "cats/a.png")
    loader = Concept(
        resolutions=((640, 640), (768, 768)),
        repeats=Fraction(9),
        loss_weight=0.5,
        captions=CaptionOptions(trigger="ohwx", keep_tokens=9, dropout=0.5, lines="all"),
        images=ImageOptions(flip=True, crop="random", hue=0.2, rotate=5),
        buckets=BucketOptions(max_aspect=2, merge=False),
    )
    text = "[general]\nkeep_tokens = 1\nflip_aug = true\n" + ONE.format("keep_tokens = 2", "flip_aug = false")
    [concept] = opened(tmp_path, text, loader).concepts
    assert concept.captions == CaptionOptions(trigger="ohwx", keep_tokens=2, dropout=0.5, lines="first")
    assert concept.images == ImageOptions(flip=False, crop="random", hue=0.2, rotate=5)
    assert (concept.resolutions, concept.repeats, concept.loss_weight) == (loader.resolutions, 9, 0.5)
    assert concept.buckets == BucketOptions(enabled=False, max_aspect=2, merge=False)
    [concept] = opened(tmp_path, ONE.format("", "random_crop = false\ncolor_aug = false"), loader).concepts
    assert concept.images == ImageOptions(flip=True, rotate=5)
    by_hand = Concept(samples_per_epoch=50)
    assert opened(tmp_path, ONE.format("", ""), by_hand).concepts[0].samples_per_epoch == 50
    dataset = opened(tmp_path, ONE.format("", "num_repeats = 2"), by_hand)
    assert (dataset.concepts[0].samples_per_epoch, dataset.concepts[0].repeats) == (None, 2)
    assert "samples_per_epoch has no effect on subsets that set num_repeats" in dataset.notes


def test_the_loader_says_which_line_where_the_file_does_not(tmp_path):
    put(tmp_path, "cats/a.png")

    def lines(key, asked):
        [concept] = opened(tmp_path, ONE.format("", key), Concept(captions=CaptionOptions(lines=asked))).concepts
        return concept.captions.lines

    assert [lines("", asked) for asked in ("all", "first", "random")] == ["first", "first", "random"]
    assert [lines("enable_wildcard = false", asked) for asked in ("all", "random")] == ["first", "first"]
    assert lines("enable_wildcard = true", "first") == "random"


def test_regularisation_gets_no_trigger(tmp_path):
    put(tmp_path, "cats/a.png")
    put(tmp_path, "reg/a.png")
    text = ONE.format("", "") + "[[datasets.subsets]]\nimage_dir = 'reg'\nis_reg = true\n"
    first, second = opened(tmp_path, text, Concept(captions=CaptionOptions(trigger="ohwx"))).concepts
    assert (first.captions.trigger, second.captions.trigger) == ("ohwx", "")
    first, second = opened(tmp_path, text, Concept(kind="validation")).concepts
    assert (first.kind, second.kind) == ("validation", "regularisation")


def test_without_enable_bucket_pictures_are_cropped_to_the_size_itself(tmp_path):
    put(tmp_path, "cats/a.png")
    dataset = opened(tmp_path, ONE.format("resolution = [520, 776]\nmax_bucket_reso = 2048", ""))
    assert dataset.concepts[0].buckets == BucketOptions(enabled=False, step=8)
    assert [item.bucket for item in BatchPlan(dataset, 1, 0).items] == [(520, 776)]
    assert dataset.notes == (
        "datasets[0].subsets[0]: .txt captions are taken; sd-scripts wants caption_extension = '.txt' for that",
        "datasets[0]: every image is cropped to the resolution; set enable_bucket = true for aspect buckets",
        "datasets[0]: without enable_bucket no effect of max_bucket_reso",
    )


def test_keys_without_effect_are_noted(tmp_path):
    put(tmp_path, "cats/a.png", kind=".caption")
    keys = "resize_interpolation = 'area'\ncache_info = true\ncustom_attributes = {x = 1}\ncolor_aug = true"
    notes = opened(tmp_path, ONE.format("enable_bucket = true", keys)).notes
    assert [note.split(": ")[1].split()[0] for note in notes] == [
        "resize_interpolation",
        "cache_info",
        "custom_attributes",
        "color_aug",
    ]


def test_caption_extensions(tmp_path):
    put(tmp_path, "cats/a.png", "from txt")
    put(tmp_path, "cats/b.png", "from caption", kind=".caption")
    put(tmp_path, "cats/c.png", "from tags", kind=".tags")
    tokens = "class_tokens = 'cat'\n"
    assert list(samples(opened(tmp_path, ONE.format("", tokens))).values()) == ["from txt", "from caption", "cat"]
    one = opened(tmp_path, ONE.format("", f"{tokens}caption_extension = 'txt'"))
    assert list(samples(one).values()) == ["from txt", "cat", "cat"]
    both = opened(tmp_path, ONE.format("caption_extension = ['.tags', '.txt', '.caption']", ""))
    assert list(samples(both).values()) == ["from txt", "from caption", "from tags"]
    refuses(tmp_path, ONE.format("", ""), "1 image of 3 without a caption: cats/c.png")
    passed_by = "datasets[0].subsets[0]: caption_extension is .tags, which passes by a.txt, b.caption; correct it or le"
    refuses(tmp_path, ONE.format("", "caption_extension = 'tags'"), passed_by)
    spared = opened(tmp_path, ONE.format("", f"{tokens}caption_extension = 'tags'"))
    assert any(note.startswith(passed_by) for note in spared.notes)


def test_pictures_below_the_folder_are_left_out_as_in_sd_scripts(tmp_path):
    put(tmp_path, "5_cat/a.png")
    put(tmp_path, "5_cat/deep/b.png")
    (tmp_path / "5_cat/empty").mkdir()
    dataset = opened(tmp_path, ONE.format("enable_bucket = true", "").replace("cats", "5_cat"))
    assert list(samples(dataset)) == ["5_cat/a.png"] and dataset.concepts[0].repeats == 1
    assert f"left out, folders below {tmp_path / '5_cat'}: deep; a subset is what lies directly in it" in dataset.notes


def test_focus_boxes_in_names_as_the_face_detector_writes_them(tmp_path):
    for name in ("cat_0_32_24_16_12", "cat_0_60_24_16_96", "cat", "a_b_c_d_e", "x_0_900_900_2_2"):
        put(tmp_path, f"cats/{name}.png")
    zoomed = opened(tmp_path, ONE.format("face_crop_aug_range = [1.0, 3.0]", ""))
    focus = {sample.id: sample.focus for sample in zoomed.samples}
    assert focus == {
        "cats/cat_0_32_24_16_12.png": (0.375, 0.375, 0.625, 0.625),
        "cats/cat_0_60_24_16_96.png": (0.8125, 0.0, 1.0, 1.0),
        "cats/cat.png": None,
        "cats/a_b_c_d_e.png": None,
        "cats/x_0_900_900_2_2.png": None,
    }
    assert all(sample.focus is None for sample in opened(tmp_path, ONE.format("", "")).samples)
    focused = opened(tmp_path, ONE.format("", ""), Concept(images=ImageOptions(crop="focus")))
    assert {sample.id: sample.focus for sample in focused.samples} == focus


def test_subsets_of_no_repeats_are_left_out(tmp_path):
    put(tmp_path, "cats/a.png")
    text = ONE.format("", "num_repeats = 0")
    refuses(tmp_path, text, "set.toml: no subset with images is left")
    dataset = opened(tmp_path, text + "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'cats'\n")
    assert len(dataset.concepts) == 1 and dataset.concepts[0].group == 2
    assert "datasets[0].subsets[0] is left out: its num_repeats is 0" in dataset.notes


def test_the_json_form_and_lists_of_captions(tmp_path):
    put(tmp_path, "cats/a.png", None)
    (tmp_path / "cats/meta.json").write_text('{"a": {"caption": "one\\ntwo", "tags": "cat"}}')
    subset = {"metadata_file": "cats/meta.json", "class_tokens": "x", "num_repeats": None}
    content = {"general": {"resolution": 640}, "datasets": [{"enable_bucket": True, "subsets": [subset]}]}
    dataset = opened(tmp_path, content, name="set.json")
    assert samples(dataset) == {"cats/a.png": "one, cat\ntwo, cat"} and dataset.concepts[0].name == "cats"
    assert dataset.notes == ("datasets[0].subsets[0]: class_tokens have no effect, the captions are in meta.json",)
    refuses(tmp_path, {"datasets": {}}, "set.json: datasets has to be at least one table", name="set.json")
    missing = {"datasets": [{"subsets": [{"metadata_file": "cats/gone.json"}]}]}
    refuses(tmp_path, missing, "datasets[0].subsets[0].metadata_file: there is no file", name="set.json")


# ---------------------------------------------------------------- validation


def test_validation_split(tmp_path):
    put_many(tmp_path, "cats", 20)
    for index in range(20):
        Image.new("RGB", (64, 48), (index, 0, 0)).save(tmp_path / f"cats/{index}.png")
    put_many(tmp_path, "reg", 3)
    put_many(tmp_path, "watched", 2)
    subsets = ONE.format("{}", "") + "[[datasets.subsets]]\nimage_dir = 'reg'\nis_reg = true\n"
    text = subsets.format("validation_split = 0.2\nvalidation_seed = 3")
    dataset = opened(tmp_path, text)
    assert [concept.kind for concept in dataset.concepts] == ["training", "regularisation", "validation"]
    held = {dataset.samples[index].id for index in dataset.members("validation")}
    assert len(held) == 4 and len(dataset.members("training")) == 16 and len(dataset.members("regularisation")) == 3
    twice = f"[general]\nvalidation_split = 0.2\nvalidation_seed = 3\n{subsets.format('')}{subsets.format('')}"
    both = opened(tmp_path, twice)
    names = {both.samples[index].id.removesuffix("~2") for index in both.members("validation")}
    assert names == held and len(both.members("validation")) == 8, "the same pictures at both sizes"
    leaking = opened(tmp_path, text + subsets.format(""))
    assert len(leaking.members("validation")) == 4 and len(leaking.members("training")) == 36
    assert "validation images that another dataset of the file trains on: " in leaking.notes[-1]
    watched = opened(tmp_path, text + subsets.replace("cats", "watched").format("validation_split = 1"))
    assert [concept.kind for concept in watched.concepts[2:4]] == ["validation", "regularisation"]
    refuses(tmp_path, ONE.format("validation_split = 1.1", ""), "validation_split is 1.1, expected 0 (none) to 1 (all)")


# ---------------------------------------------------------------- what is wrong is named with its place

WRONG = [
    ("x = [1,,]", "set.toml: no valid TOML: ", "line 1, column 8", "correct it there"),
    ('[[datasets]]\nimage_dir = "C:\\hoge"', "no valid TOML: ", "line 2", "write paths with backslashes in single"),
    ("a = " + "[" * 5000, "set.toml: n"),
    ("", "set.toml: datasets has to be at least one table; write [[datasets]] on a line of its own"),
    ("[datasets]\nresolution = 512", "datasets has to be at least one table; write [[datasets]]"),
    ("general = 1", "general is no table; write [general]"),
    ("[[datasets]]\nresolution = 512", "datasets[0].subsets has to be at least one table; write [[datasets.subsets]]"),
    ("resolution = 512", "resolution: resolution cannot stand there; move it to [general] or [[datasets]]"),
    ("[genaral]\nkeep_tokens = 1", "there is no key 'genaral'; did you mean general?"),
    ("[general]\nimage_dir = 'cats'", "general.image_dir: image_dir cannot stand there; move it to [[dat"),
    (ONE.format("is_reg = true", ""), "datasets[0].is_reg: is_reg cannot stand there; move it to [[datasets.subsets]]"),
    (
        ONE.format("", "num_repeat = 2"),
        "datasets[0].subsets[0].num_repeat: there is no key 'num_repeat'; did you mean num_repeats?",
    ),
    (ONE.format("train_batch_size = 2", ""), "datasets[0].train_batch_size: ", "did you mean batch_size?"),
    (
        ONE.format("", "resolution = 512"),
        "datasets[0].subsets[0].resolution: resolution cannot stand there; move it to [general] or [[datasets]]",
    ),
    (ONE.format("", "num_repeats = '2x'"), "datasets[0].subsets[0].num_repeats is '2x', expected a number, 0 or more"),
    (ONE.format("", "num_repeats = -1"), "num_repeats is -1, expected a number, 0 or more"),
    (ONE.format("", "num_repeats = '1/0'"), "num_repeats is '1/0', expected"),
    (ONE.format("", "num_repeats = '1e999999999'"), "num_repeats is '1e999999999', expected"),
    (ONE.format("", "num_repeats = 1e300"), "num_repeats is 1e+300, expected"),
    (ONE.format("", "num_repeats = nan"), "num_repeats is nan, expected"),
    (ONE.format("", "num_repeats = true"), "num_repeats is True, expected"),
    (ONE.format("", "flip_aug = 'yes'"), "datasets[0].subsets[0].flip_aug is 'yes', expected true or false"),
    (ONE.format("", "flip_aug = 2"), "flip_aug is 2, expected true or false"),
    (ONE.format("", "keep_tokens = 1.5"), "keep_tokens is 1.5, expected a whole number"),
    (ONE.format("", "keep_tokens = -1"), "datasets[0].subsets[0]: keep_tokens is -1, expected 0 or more"),
    (ONE.format("", "caption_prefix = 1"), "caption_prefix is 1, expected a text"),
    (ONE.format("", "caption_separator = ' '"), "datasets[0].subsets[0]: caption_separator is ' ', expected a"),
    (ONE.format("", "caption_dropout_rate = 2"), "datasets[0].subsets[0]: caption_dropout_rate is 2, expected 0 to 1"),
    (ONE.format("", "face_crop_aug_range = [3.0, 1.0]"), "datasets[0].subsets[0]: face_crop_aug_range is (3.0, 1.0)"),
    (ONE.format("", "face_crop_aug_range = 2"), "face_crop_aug_range is 2, expected two numbers"),
    (ONE.format("", "face_crop_aug_range = [1, 2, 3]"), "face_crop_aug_range is [1, 2, 3], expected two numbers"),
    (ONE.format("", "caption_extension = []"), "caption_extension is [], expected a file extension"),
    (ONE.format("", "caption_extension = ''"), "caption_extension is '', expected a file extension"),
    (ONE.format("", "custom_attributes = 1"), "custom_attributes is 1, expected a table"),
    (ONE.format("resolution = [512]", ""), None),
    (ONE.format("resolution = [1, 2, 3]", ""), "datasets[0].resolution is [1, 2, 3], expected a size, e.g. 512 or"),
    (ONE.format("resolution = 'big'", ""), "datasets[0].resolution is 'big', expected a size"),
    (ONE.format("resolution = 10000000", ""), "datasets[0].resolution is 10000000, expected a size"),
    (ONE.format("resolution = 0", ""), "datasets[0].resolution is 0, expected a size"),
    (ONE.format("enable_bucket = true\nmin_bucket_reso = 16", ""), "min_bucket_reso is 16, expected at least"),
    (
        ONE.format("enable_bucket = true\nmin_bucket_reso = 256\nmax_bucket_reso = 128", ""),
        "datasets[0].subsets[0]: min_bucket_reso is 256, expected at most max_bucket_reso (128)",
    ),
    (ONE.format("network_multiplier = 0.5", ""), "datasets[0].subsets[0]: network_multiplier is 0.5", "remove the key"),
    ("[[datasets]]\n[[datasets.subsets]]\nnum_repeats = 1", "datasets[0].subsets[0] has neither image_dir nor"),
    (ONE.format("", "").replace("cats", "dogs"), "datasets[0].subsets[0].image_dir: there is no folder 'dogs'"),
    (ONE.format("", "").replace("cats", "empty"), "empty has no images: put images"),
]


@pytest.mark.parametrize("case", WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_what_is_wrong_is_named_with_its_place(tmp_path, case):
    put(tmp_path, "cats/a.png")
    (tmp_path / "empty").mkdir()
    text, *parts = case
    if parts == [None]:
        assert opened(tmp_path, text).concepts[0].resolutions == ((512, 512),)
    else:
        assert refuses(tmp_path, text, *parts).count("\n") == 0


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "set.toml").write_bytes("x = 'ä'".encode("latin-1"))
    with pytest.raises(DatasetError, match=r"set\.toml is not UTF-8 text \(byte 5\)"):
        open_dataset(tmp_path / "set.toml", PLAIN, ANYWHERE)
    put(tmp_path, "cats/a.png")
    assert opened(tmp_path, "\ufeff" + ONE.format("", "")).samples


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["cats", "512,768"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
tables = st.dictionaries(st.sampled_from([*ALL_KEYS, "subsets", "x"]), anything, max_size=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables, tables, tables | anything, anything)
def test_whatever_a_configuration_holds_the_answer_is_a_dataset_or_a_named_error(tmp_path, general, own, subset, more):
    put(tmp_path, "cats/a.png")
    if isinstance(subset, dict):
        subset = {"image_dir": "cats"} | subset
    content = {"general": general, "datasets": [own | {"subsets": [subset]}, *([more] if more else [])]}
    (tmp_path / "set.json").write_text(json.dumps(content, default=str))
    try:
        assert len(open_dataset(tmp_path / "set.json", PLAIN, ANYWHERE).samples) == 1
    except DatasetError as error:
        assert str(error)
    assert len(dataset_state(tmp_path / "set.json", ANYWHERE)) == 64
