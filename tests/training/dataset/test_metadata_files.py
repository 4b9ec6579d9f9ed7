"""Lists of captions: every form that trainers write, and every way in which one can be wrong."""

import json

import pytest
from PIL import Image

from lora_loom.training.dataset import metadata_files
from lora_loom.training.dataset.describe import describe
from lora_loom.training.dataset.model import Access, CaptionOptions, Concept, DatasetError
from lora_loom.training.dataset.opening import open_dataset

PLAIN = Concept()
ANYWHERE = Access(lambda path: True, lambda path: "")


def put(folder, *names, size=(64, 48)):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "green").save(folder / name)


def write(folder, content, name="meta.json"):
    path = folder / name
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def captions(path, defaults=PLAIN, **options):
    return {sample.id: sample.caption for sample in open_dataset(path, defaults, ANYWHERE, **options).samples}


def refuses(path, *parts, access=ANYWHERE, **options):
    with pytest.raises(DatasetError) as caught:
        open_dataset(path, PLAIN, access, **options)
    for part in parts:
        assert part in str(caught.value)


# ---------------------------------------------------------------- forms


@pytest.mark.parametrize("pretty", [None, 2])
def test_kohyas_json(tmp_path, pretty):
    put(tmp_path, "a.png", "deep/b.jpg", "c.webp", "d.x.png", "e.png")
    entries = {
        "a.png": {"caption": "a frog", "tags": "open mouth, standing", "image_size": [64, 48]},
        "deep/b": {"tags": "frog"},  # merge_captions_to_metadata.py leaves the extension out unless told otherwise
        str(tmp_path / "c.webp"): {"caption": "whole path", "train_resolution": [64, 64]},
        "d.x": {"caption": ""},
        "e.png": {"caption": None, "tags": ["one", "two"]},
    }
    path = write(tmp_path, json.dumps(entries, indent=pretty))
    dataset = open_dataset(path, PLAIN, ANYWHERE)
    assert [(sample.id, sample.caption) for sample in dataset.samples] == [
        ("a.png", "a frog, open mouth, standing"),
        ("deep/b.jpg", "frog"),
        ("c.webp", "whole path"),
        ("d.x.png", ""),
        ("e.png", "one, two"),
    ]
    assert dataset.notes == ()
    assert "empty captions, trained without a prompt: d.x.png" in describe(dataset)
    assert {sample.caption_path for sample in dataset.samples} == {str(path)}
    assert [concept.name for concept in dataset.concepts] == ["meta"]


def test_tags_follow_every_line_that_may_be_shown_alone(tmp_path):
    # the example of sd-scripts, docs/config_README-en.md, "Multi-line captions"
    caption = "a cartoon of a frog with the word frog on it\ntest multiline caption1\ntest multiline caption2"
    tags = "open mouth, simple background"
    put(tmp_path, "image.png")
    path = write(tmp_path, {"image.png": {"caption": caption, "tags": tags}})
    one = Concept(captions=CaptionOptions(lines="random", wildcards=True))
    assert captions(path, one)["image.png"].split("\n") == [
        "a cartoon of a frog with the word frog on it, open mouth, simple background",
        "test multiline caption1, open mouth, simple background",
        "test multiline caption2, open mouth, simple background",
    ]
    assert captions(path)["image.png"] == f"{caption}, {tags}"
    semicolon = Concept(captions=CaptionOptions(separator=";"))
    assert captions(path, semicolon)["image.png"] == f"{caption}; {tags}"


def test_lines_and_lists_of_objects(tmp_path):
    put(tmp_path, "a.png", "b.png")
    rows = [{"image_path": "a.png", "caption": "one", "image_size": [64, 48]}, {"file_name": "b.png", "text": "zwei ü"}]
    lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    expected = {"a.png": "one", "b.png": "zwei ü"}
    assert captions(write(tmp_path, f"\ufeff{lines}\n\n", "meta.jsonl")) == expected
    assert captions(write(tmp_path, rows)) == expected
    assert captions(write(tmp_path, {"a.png": "one", "b.png": "zwei ü"})) == expected


def test_masks_and_unused_keys(tmp_path):
    put(tmp_path, "a.png", "m/a.png", "b.png")
    path = write(
        tmp_path,
        {"a.png": {"caption": "x", "mask_path": "m/a", "rating": 5}, "b.png": {"caption": "y", "caption_short": "z"}},
    )
    dataset = open_dataset(path, PLAIN, ANYWHERE)
    first, second = dataset.samples
    assert first.mask.path == str(tmp_path / "m/a.png") and second.mask is None
    assert dataset.notes == ("meta.json: not used: caption_short, rating",)


def test_paths_from_windows_and_ambiguous_ones(tmp_path):
    put(tmp_path, "deep/a.png", "b.png", "b.jpg")
    assert captions(write(tmp_path, {"deep\\a.png": "one", "b.jpg": "two"})) == {"deep/a.png": "one", "b.jpg": "two"}
    refuses(write(tmp_path, {"b": "two"}), "meta.json, 'b': 'b' may be b.jpg or b.png; write the extension too")


def test_a_picture_may_be_listed_under_two_names(tmp_path):
    put(tmp_path, "a.png")
    assert captions(write(tmp_path, {"a.png": "one", "./a.png": "two", "a": "three"})) == {
        "a.png": "one",
        "a.png~2": "two",
        "a.png~3": "three",
    }


# ---------------------------------------------------------------- what is refused


WRONG = [
    ("", "meta.json: no valid JSON (Expecting value at column 1)"),
    ('{\n"a.png": {"caption": "x"\n}', "meta.json: no valid JSON (Expecting ',' delimiter at line 3, column 2)"),
    ('{"a.png": NaN}', "meta.json: NaN is no number of JSON"),
    ('{"a.png": {"image_size": [-Infinity, 1]}}', "meta.json: -Infinity is no number of JSON"),
    ('{"a.png": {}, "b.png": {}, "a.png": {}}', "meta.json: the key 'a.png' stands there twice; remove one"),
    ('{"a.png": {"caption": "x", "caption": "y"}}', "the key 'caption' stands there twice"),
    ('"a.png"', "meta.json holds a text, expected entries by path"),
    ("12", "meta.json holds the number 12"),
    ("{}", "lists no image; write one entry per image"),
    ("[]", "lists no image"),
    ('{"a.png": 5}', "meta.json, 'a.png' is the number 5, expected an object"),
    ('{"a.png": null}', "meta.json, 'a.png' is null, expected an object"),
    ('{"a.png": {"caption": 5}}', "meta.json, 'a.png', caption is the number 5, expected a text"),
    ('{"a.png": {"caption": true}}', "meta.json, 'a.png', caption is true or false, expected a text"),
    ('{"a.png": {"tags": {"x": 1}}}', "meta.json, 'a.png', tags is an object, expected a text"),
    ('{"a.png": {"tags": ["x", 1]}}', "meta.json, 'a.png', tags is the number 1, expected a text"),
    ('{"a.png": {"mask": []}}', "meta.json, 'a.png', mask is a list, expected a text"),
    ('[{"caption": "x"}]', "meta.json, [0] has no image_path; write which image it is about"),
    ('[{"image_path": 3}]', "meta.json, [0], image_path is the number 3, expected a text"),
    ('["a.png"]', "meta.json, [0] is a text, expected an object"),
    ("[" * 100_000, "meta.json: nested too deeply"),
    ('{"a.png": ' + "9" * 5000 + "}", "meta.json: Exceeds the limit"),
    ('{"a.mp4": "x"}', "meta.json, 'a.mp4': 'a.mp4' is a video; save single frames as images"),
    ('{"a.png": {"conditioning_image": "b.png"}}', "meta.json, 'a.png': conditioning_image is for edit or control"),
    ('{"a.png": {"control_path": "b.png"}}', "control_path is for edit or control training, which this trainer does"),
    ('{"gone.png": "x"}', "meta.json, 'gone.png': there is no file 'gone.png' (looked for it in "),
    ('{"": "x"}', "meta.json, '': the path is empty; write one"),
    ('{"a.png": "x", "..": "x"}', "'..' is no name of a file"),
    ('{"a.png": {"caption": "x", "mask": "gone.png"}}', "meta.json, 'a.png', mask: there is no file 'gone.png'"),
]


@pytest.mark.parametrize("content, expected", WRONG, ids=[str(index) for index in range(len(WRONG))])
def test_what_is_wrong_is_named_with_its_place(tmp_path, content, expected):
    put(tmp_path, "a.png")
    refuses(write(tmp_path, content), expected)


def test_lines_are_named_by_their_number(tmp_path):
    put(tmp_path, "a.png")
    good = '{"image_path": "a.png", "caption": "x"}'
    refuses(write(tmp_path, f"{good}\n\n{{", "m.jsonl"), "m.jsonl, line 3: no valid JSON (", "at column 2)")
    refuses(write(tmp_path, f"{good}\n{good}", "m.jsonl"), "m.jsonl, line 2: 'a.png' is in m.jsonl, line 1 already")
    refuses(write(tmp_path, f"{good}\n[1]", "m.jsonl"), "m.jsonl, line 2 is a list, expected an object")
    refuses(write(tmp_path, good.replace("a.png", "b.png"), "m.jsonl"), "m.jsonl, line 1: there is no file 'b.png'")


def test_files_that_are_no_text_or_far_too_large(tmp_path, monkeypatch):
    path = tmp_path / "meta.json"
    path.write_bytes('{"a.png": "ä"}'.encode("latin-1"))
    refuses(path, "is not UTF-8 text (byte 11): save it as UTF-8")
    refuses(tmp_path / "gone.json", "gone.json cannot be read (No such file or directory)")
    monkeypatch.setattr(metadata_files, "LARGEST", 1 << 20)
    path.write_bytes(b" " * ((1 << 20) + 1))
    refuses(path, "is larger than 1 MB: is it the right file?")


def test_missing_and_broken_files_can_be_left_out(tmp_path):
    put(tmp_path, "a.png")
    (tmp_path / "broken.png").write_bytes(b"")
    path = write(tmp_path, {"a.png": "x", "gone.png": "y", "broken.png": "z"})
    dataset = open_dataset(path, PLAIN, ANYWHERE, if_unreadable="skip")
    assert [sample.id for sample in dataset.samples] == ["a.png"]
    first, second = dataset.notes
    assert first.startswith("left out, 1 without their file: meta.json, 'gone.png': there is no file")
    assert second.startswith("left out: broken.png is no readable image (")
    (tmp_path / "a.png").unlink()
    refuses(path, "1 file cannot be used:", if_unreadable="skip")
    (tmp_path / "broken.png").unlink()
    refuses(path, "lists no image", if_unreadable="skip")
