"""Edits: what comes back from the graph lands where its id says, and text edits touch nothing else."""

import dataclasses
import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.edits import CAPTION_MODES, IMAGE_MODES, update
from lora_loom.training.dataset.graph import dataset_of
from lora_loom.training.dataset.model import (
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    GraphPicture,
    Header,
    ImageOptions,
    Sample,
)
from lora_loom.training.dataset.tag_text import begins_with, canonical, move_first, remove_tag, tags


def picture(number, height=4, width=6, channels=3):
    return torch.full((height, width, channels), number / 256)


def dataset(count=4, captions=None, options=None, **fields):
    captions = captions or [f"caption {index}" for index in range(count)]
    samples = [
        Sample(f"{index}.png", GraphPicture(picture(index)), caption, **fields)
        for index, caption in enumerate(captions)
    ]
    return Dataset("test", (options or Concept(),), tuple(samples), ("noted before",))


def contents(data):
    return {sample.id: (sample.caption, sample.picture.pixels[0, 0, 0].item() * 256) for sample in data.samples}


# ---------------------------------------------------------------- update


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.randoms(use_true_random=False))
def test_everything_lands_where_its_id_says(count, draw):
    before = dataset(count)
    chosen = draw.sample(range(count), draw.randint(1, count))
    after = update(
        before,
        [f"{index}.png" for index in chosen],
        captions=[f"new {index}" for index in chosen],
        images=[picture(100 + index) for index in chosen],
        masks=[torch.full((4, 6), index / 256) for index in chosen],
    )
    expected = {
        f"{index}.png": (f"new {index}", 100 + index) if index in chosen else (f"caption {index}", index)
        for index in range(count)
    }
    assert contents(after) == expected
    assert [sample.id for sample in after.samples] == [sample.id for sample in before.samples]
    for index, sample in enumerate(after.samples):
        assert (sample.mask is None) == (index not in chosen)
        assert sample.mask is None or torch.equal(sample.mask.pixels, torch.full((4, 6, 1), index / 256))


def test_the_dataset_before_is_as_it_was():
    before = dataset(3)
    facts, pixels = repr(before), [sample.picture.pixels.clone() for sample in before.samples]
    given_image = picture(9) * 2 - 0.5
    after = update(before, ["1.png"], images=[given_image], captions=["x"])
    assert repr(before) == facts and before.samples[0] is after.samples[0]
    assert all(torch.equal(sample.picture.pixels, old) for sample, old in zip(before.samples, pixels, strict=True))
    assert torch.equal(given_image, picture(9) * 2 - 0.5), "the graph's tensor is never written to"
    assert after.fingerprint() != before.fingerprint()


def test_notes_say_what_changed():
    before = dataset(3)
    ids = ["0.png", "1.png"]
    after = update(before, ids, captions=["new", "caption 1"], images=[picture(1)] * 2, masks=[torch.ones(4, 6)] * 2)
    assert after.notes == (
        "noted before",
        "update: 1 caption replaced; 1 as before",
        "update: 2 images replaced",
        "update: 2 masks set",
    )
    assert update(before, [], captions=[]).notes[1:] == ("update: no ids were given, nothing was changed",)


def test_captions_are_replaced_appended_or_left():
    old = ["1girl, smile", "", " \n"]
    new = ["Smile, blue sky", "new", "newer"]
    ids = [f"{index}.png" for index in range(3)]
    expected = {
        "replace": new,
        "append": ["1girl, smile, blue sky", "new", "newer"],
        "skip": ["1girl, smile", "new", "newer"],
    }
    assert set(expected) == set(CAPTION_MODES)
    for mode, captions in expected.items():
        after = update(dataset(captions=old), ids, captions=new, captions_mode=mode)
        assert [sample.caption for sample in after.samples] == captions
    after = update(dataset(captions=old), ids, captions=new, captions_mode="skip")
    assert after.notes[-1] == "update: 2 captions written where there was none; 1 as before"


@pytest.mark.parametrize(
    "old, new, lines, expected",
    [
        ("a, b,", "c", "all", "a, b, c"),
        ("a (x)", r"a \(x\), d", "all", "a (x), d"),
        ("a", "a, A", "all", "a"),
        ("a", "", "all", "a"),
        ("a\nb", "c, b", "all", "a\nb, c"),
        ("a\n\nb", "c, b", "random", "a, c, b\n\nb, c"),
    ],
)
def test_what_is_appended(old, new, lines, expected):
    before = dataset(captions=[old], options=Concept(captions=CaptionOptions(lines=lines)))
    assert update(before, ["0.png"], captions=[new], captions_mode="append").samples[0].caption == expected


def test_images_are_replaced_added_or_left():
    assert set(IMAGE_MODES) == {"replace", "append", "skip"}
    images, captions = [picture(101), picture(100)], ["one", "nought"]
    before = dataset(3)
    added = update(before, ["1.png", "0.png"], images=images, captions=captions, images_mode="append")
    assert contents(added) == {
        "0.png": ("caption 0", 0),
        "0.png~2": ("nought", 100),
        "1.png": ("caption 1", 1),
        "1.png~2": ("one", 101),
        "2.png": ("caption 2", 2),
    }
    assert added.notes[-1] == "update: 2 images added"
    again = update(added, ["0.png~2", "0.png"], images=images, images_mode="append")
    assert Counter(sample.id.split("~")[0] for sample in again.samples) == {"0.png": 4, "1.png": 2, "2.png": 1}
    assert contents(again)["0.png~3"][1] == 100 and contents(again)["0.png~4"][1] == 101
    left = update(before, ["1.png", "0.png"], images=images, captions=captions, images_mode="skip")
    assert contents(left)["1.png"] == ("one", 1)
    assert left.notes[-1] == "update: 2 images given but not used: images_mode is skip"


def test_masks_stay_where_they_fit():
    masked = dataset(1, mask=GraphPicture(torch.ones(40, 60, 1)), focus=(0, 0, 0.5, 0.5))
    for height, width in ((8, 12), (83, 124), (399, 600), (4, 6)):
        after = update(masked, ["0.png"], images=[picture(1, height, width)]).samples[0]
        assert after.mask is masked.samples[0].mask and after.focus == (0, 0, 0.5, 0.5)
    with pytest.raises(DatasetError, match=r"the old mask of 0\.png \(60×40\) .* \(50×40\); give a new mask"):
        update(masked, ["0.png"], images=[picture(1, 40, 50)])
    with pytest.raises(DatasetError, match=r"the new mask of 0\.png \(64×64\) .* \(600×400\); scale and crop it"):
        update(masked, ["0.png"], images=[picture(1, 400, 600)], masks=[torch.ones(64, 64)])
    after = update(masked, ["0.png"], images=[picture(1, 40, 50)], masks=[torch.ones(20, 25)])
    assert after.samples[0].mask.pixels.shape == (20, 25, 1)


def test_masks_that_leave_nothing_are_named():
    nothing, everything = torch.zeros(4, 6), torch.ones(4, 6)
    warned = "update: masks that leave nothing of the picture to learn: 0.png; light is learned, dark is not"
    assert warned in update(dataset(2), ["0.png", "1.png"], masks=[nothing, everything]).notes
    inverted = dataset(2, options=Concept(images=ImageOptions(invert_mask=True)))
    assert warned in update(inverted, ["0.png", "1.png"], masks=[everything, nothing]).notes
    floored = dataset(1, options=Concept(images=ImageOptions(mask_floor=0.1)))
    assert warned not in update(floored, ["0.png"], masks=[nothing]).notes


def test_lost_transparency_is_named():
    header = Header(6, 4, "PNG", "RGBA", transparent=True)
    for kind in (FilePicture("0.png", header, 1, 1), GraphPicture(picture(1, channels=4))):
        before = dataset(1, options=Concept(images=ImageOptions(alpha_mask=True)))
        before = before.with_samples([dataclasses.replace(before.samples[0], picture=kind)])
        lost = update(before, ["0.png"], images=[picture(2)]).notes[-1]
        assert (
            lost == "update: images without the transparency that was their mask (alpha_mask): 0.png; connect masks too"
        )
        for options in ({"masks": [torch.ones(4, 6)]}, {"images": [picture(2, channels=4)]}):
            assert lost not in update(before, ["0.png"], **{"images": [picture(2)], **options}).notes


def test_pixels_are_finite_and_in_range():
    before = dataset(1)
    bright = picture(100) + torch.tensor([0.0, 1.0, -1.0])
    after = update(before, ["0.png"], images=[bright])
    assert torch.equal(after.samples[0].picture.pixels, bright.clamp(0, 1))
    assert after.notes[-1] == "update: images with values outside 0 to 1, which were cut off: 0.png"
    slightly = update(before, ["0.png"], images=[picture(256) + 0.002])
    assert slightly.samples[0].picture.pixels.max() == 1 and "cut off" not in slightly.notes[-1]
    half = update(before, ["0.png"], images=[picture(64).half()]).samples[0].picture.pixels
    assert half.dtype == torch.float32 and torch.equal(half, picture(64))
    with torch.inference_mode():
        inside = picture(64)
    kept = update(before, ["0.png"], images=[inside]).samples[0].picture.pixels
    assert kept.data_ptr() == inside.data_ptr(), "no copy of what fits as it is"
    for value in (float("nan"), float("inf"), -float("inf")):
        broken = picture(1)
        broken[2, 3, 1] = value
        with pytest.raises(DatasetError, match=r"^images: that of 0\.png has values that are not finite"):
            update(before, ["0.png"], images=[broken])
        with pytest.raises(DatasetError, match=r"^masks: that of 0\.png has values that are not finite"):
            update(before, ["0.png"], masks=[broken[..., 1]])


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, "nothing to update with: connect captions, images or masks"),
        ({"captions": ["a"]}, "captions: 1 given for 2 ids; give one for each id, in the order of the ids"),
        ({"images": [picture(1)] * 3}, "images: 3 given for 2 ids"),
        ({"masks": []}, "masks: 0 given for 2 ids"),
        ({"captions": ["a", 5]}, "captions: that of 1.png is of type int; give text"),
        (
            {"images": [picture(1), picture(1)[None]]},
            "images: that of 1.png is of shape (1, 4, 6, 3); give (height, width",
        ),
        ({"images": [picture(1, channels=1)] * 2}, "images: that of 0.png is of shape (4, 6, 1)"),
        ({"images": [picture(1, 0)] * 2}, "images: that of 0.png is of shape (0, 6, 3)"),
        ({"images": [None, None]}, "images: that of 0.png is of type NoneType"),
        ({"masks": [picture(1)] * 2}, "masks: that of 0.png is of shape (4, 6, 3); give (height, width)"),
        (
            {"captions": ["a"] * 2, "captions_mode": "add"},
            "captions_mode is 'add', expected one of replace, append, skip",
        ),
        ({"captions": ["a"] * 2, "images_mode": ""}, "images_mode is '', expected one of replace, append, skip"),
    ],
)
def test_what_does_not_fit_is_named(options, expected):
    with pytest.raises(DatasetError) as caught:
        update(dataset(3), ["0.png", "1.png"], **options)
    assert expected in str(caught.value)


def test_wrong_ids_are_named():
    with pytest.raises(DatasetError, match=r"^ids: not in the dataset: 0\.pmg; is 0\.png meant\?"):
        update(dataset(), ["0.pmg"], captions=["x"])
    with pytest.raises(DatasetError, match=r"not in the dataset: nothing.*; take the ids from the same dataset"):
        update(dataset(), ["nothing like it"], captions=["x"])
    with pytest.raises(DatasetError, match=r"^ids: given more than once: 1\.png; give each id once"):
        update(dataset(), ["1.png", "0.png", "1.png"], captions=["x"] * 3)


# ---------------------------------------------------------------- tags in text


@pytest.mark.parametrize(
    "caption, tag, expected",
    [
        ("a, b, c", "b", "a, c"),
        ("a,  b ,c", "a", "b ,c"),
        ("  a, b", "a", "  b"),
        ("a, b", "B", "a"),
        ("a, b,", "b", "a,"),
        ("a", "a", ""),
        ("a, b, a", "a", "b"),
        ("ab, b c", "b", "ab, b c"),
        ("a\nb, c\n\nd", "a", "b, c\n\nd"),
        (r"miku \(x\), b", "Miku (x)", "b"),
        (" no  change ,\tat all\r\n", "b", " no  change ,\tat all\r\n"),
    ],
)
def test_removing_a_tag(caption, tag, expected):
    assert remove_tag(caption, tag) == expected


@pytest.mark.parametrize(
    "caption, tag, expected",
    [
        ("", "x", "x"),
        ("a,  b", "x", "x, a,  b"),
        ("a, x,  b", "x", "x, a,  b"),
        ("a, X", "x", "x, a"),
        ("X,a", "x", "X,a"),
        ("a, y, x", "x, y", "x, y, a"),
        ("a\nb, x", "x", "x, a\nb"),
        ("a", "", "a"),
    ],
)
def test_moving_a_tag_first(caption, tag, expected):
    assert move_first(caption, tag) == expected
    assert move_first(expected, tag) == expected
    assert begins_with(expected, tag)


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("long_hair, 1girl", "long hair, 1girl"),
        ("a,  Long_Hair ,long hair, b", "a,  Long Hair , b"),
        (r"miku_\(vocaloid\), miku (vocaloid), miku \\(vocaloid\\)", "miku (vocaloid)"),
        ("^_^, o_o, (o)_(o), >_<, |_|, ;_;, 0_0, t_t, ^___^", "^_^, o_o, (o)_(o), >_<, |_|, ;_;, 0_0, t_t, ^___^"),
        ("red_hat_, _x", "red hat, _x"),
        ("A photo of a cat, which  sleeps.", "A photo of a cat, which  sleeps."),
        ("a, b\nb, a, b", "a, b\nb, a"),
        ("", ""),
    ],
)
def test_canonical_spelling(caption, expected):
    assert canonical(caption) == expected
    assert canonical(expected) == expected


def test_canonical_spelling_leaves_what_is_meant():
    assert canonical("my_cat, a_cat, MY_CAT", keep=["my_cat"]) == "my_cat, a cat"
    assert canonical(r"miku_\(x\), (a_b:1.2)", weighted=True) == r"miku \(x\), (a b:1.2)"
    assert canonical("red_b; red b, c", separator=";") == "red b; red b, c"


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("abX_ ,()\\\n^"), max_size=30), st.sampled_from(["a", "X", "b a", "(a)"]))
def test_edits_of_text_touch_nothing_else(caption, tag):
    before = Counter(tags(caption))
    gone = {other: count for other, count in before.items() if other not in tags(remove_tag(caption, tag))}
    assert Counter(tags(remove_tag(caption, tag))) == before - Counter(gone)
    assert remove_tag(remove_tag(caption, tag), tag) == remove_tag(caption, tag)
    assert canonical(canonical(caption)) == canonical(caption)
    if not gone:
        assert remove_tag(caption, tag) == caption
    order = [other for other in tags(move_first(caption, tag)) if other != tag]
    assert order == [other for other in tags(caption) if other != tag and other not in gone] or begins_with(
        caption, tag
    )


def test_a_hundred_thousand_tags_take_no_time():
    caption = ", ".join(f"tag_{index}" for index in random.Random(0).sample(range(100_000), 100_000))
    assert len(tags(canonical(caption))) == 100_000
    assert move_first(caption, "tag_7").startswith("tag_7, ")


def test_a_dataset_of_the_graph_says_what_is_odd_about_its_pictures():
    given = dataset_of([torch.full((8, 8, 3), 2.0)], ["a"], [torch.zeros(8, 8)], Concept())
    assert given.notes == (
        "images with values outside 0 to 1, which were cut off: image-0001",
        "masks that leave nothing of the picture to learn: image-0001; light is learned, dark is not",
    )
    assert dataset_of([torch.ones(8, 8, 3)], ["a"], None, Concept()).notes == ()
