"""The report of a dataset: every figure in it, counted by hand."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch

from lora_loom.training.dataset.balancing import split_validation
from lora_loom.training.dataset.combining import combine
from lora_loom.training.dataset.describe import describe
from lora_loom.training.dataset.model import (
    BucketOptions,
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    GraphPicture,
    ImageOptions,
    Sample,
)
from lora_loom.training.dataset.settings import ConceptSettings, concept_from, resolutions, split

PLAIN = Concept(resolutions=((64, 64),), buckets=BucketOptions(step=8))


def picture(width, height):
    return GraphPicture(torch.rand(height, width, 3))


def dataset(*sizes, caption="a, b", concept=PLAIN, name="set", notes=()):
    samples = (Sample(f"{n}.png", picture(*size), caption) for n, size in enumerate(sizes))
    return Dataset(name, (concept,), tuple(samples), notes)


def test_the_plainest_report():
    assert describe(dataset((64, 64), caption="one")) == "1 image at resolution 64\n1 bucket (64×64: 1)"


def test_counts_buckets_captions_and_notes():
    given = dataset((64, 64), (200, 200), (128, 32), notes=("something to know",))
    given = given.with_samples([*given.samples[:2], replace(given.samples[2], caption="a, b, c, d, e")])
    assert describe(given).splitlines() == [
        "3 images at resolution 64",
        "2 buckets (64×64: 2, 128×32: 1)",
        "captions of 2 to 5 tags, 3.0 on average",
        "note: something to know",
    ]


def test_an_epoch_of_fractional_repeats_and_batches():
    given = dataset(*[(64, 64)] * 5, caption="one", concept=replace(PLAIN, repeats=Fraction(8, 5)))
    assert "an epoch has 8 presentations" in describe(given).splitlines()
    assert "an epoch has 8 presentations in 2 batches" in describe(given, 4).splitlines()
    thin = describe(dataset((64, 64), (64, 64), (128, 32), caption="one"), 2)
    assert "note: 1 of 2 batches per epoch are not full (50%)" in thin


def test_every_kind_and_concept_has_a_line():
    given = combine(
        [
            dataset(*[(64, 64)] * 4, concept=replace(PLAIN, name="cats", repeats=Fraction(2))),
            dataset(*[(64, 64)] * 3, concept=replace(PLAIN, name="reg", kind="regularisation")),
            dataset((64, 64), concept=replace(PLAIN, name="held", kind="validation")),
        ]
    )
    lines = describe(given).splitlines()
    assert lines[0] == "8 images (4 training, 3 regularisation, 1 validation) at resolution 64"
    assert "cats: 4 images × 2 = 8 presentations per epoch (50%)" in lines
    assert "reg (regularisation): 3 images × 2.667 = 8 presentations per epoch (50%)" in lines
    assert "held (validation): 1 image, never trained" in lines
    assert "an epoch has 16 presentations" in lines


def test_a_dataset_that_is_no_training_by_itself_is_described():
    for kind in ("regularisation", "validation"):
        assert f"(1 {kind})" in describe(dataset((64, 64), concept=replace(PLAIN, kind=kind)))
    assert describe(dataset((64, 64), concept=replace(PLAIN, repeats=Fraction(1, 4)))).startswith("1 image at")


def test_changed_options_are_named_and_others_are_not():
    concept = replace(
        PLAIN,
        loss_weight=0.5,
        captions=CaptionOptions(shuffle=True, trigger="zorb", never_drop=("hat", "blue *")),
        images=ImageOptions(flip=True, zoom=(1.5, 3.0)),
        buckets=BucketOptions(step=8, upscale=False),
    )
    [line] = [line for line in describe(dataset((64, 64), concept=concept)).splitlines() if line.startswith("options")]
    assert line == (
        "options: loss_weight 0.5, upscale off, trigger 'zorb', shuffle on, never_drop 'hat' 'blue *', "
        "zoom 1.5 3, flip on"
    )


def test_masks_are_counted_and_idle_options_noted():
    given = dataset((64, 64), (64, 64), concept=replace(PLAIN, captions=CaptionOptions(keep_tokens=1)))
    given = given.with_samples([replace(given.samples[0], mask=GraphPicture(torch.ones(64, 64, 1))), given.samples[1]])
    text = describe(given)
    assert "\n1 mask\n" in text and "note: keep_tokens" in text


def test_image_options_without_effect_are_noted():
    asked = ImageOptions(crop="focus", zoom=(1.0, 2.0), alpha_mask=True, mask_floor=0.1, invert_mask=True)
    given = dataset((64, 64), concept=replace(PLAIN, name="cats", images=asked))
    notes = [line for line in describe(given).splitlines() if line.startswith("note: cats: ")]
    assert [note[12:].split(",")[0].split(":")[0] for note in notes] == [
        "crop focus and zoom without effect",
        "alpha_mask has no effect",
        "mask_floor and invert_mask without effect",
    ]
    unbucketed = replace(PLAIN, buckets=BucketOptions(enabled=False, step=8, max_aspect=2.0, upscale=False))
    off = "note: max_aspect and upscale without effect: bucketing is off"
    assert off in describe(dataset((64, 64), concept=unbucketed)).splitlines()
    for variations, told in ((0, False), (1, True), (2, False)):
        mirrored = replace(PLAIN, images=ImageOptions(flip=True, variations=variations))
        assert ("only ever shown mirrored" in describe(dataset((64, 64), concept=mirrored))) == told
    held_out = replace(PLAIN, kind="validation", repeats=Fraction(3))
    both = combine([dataset((64, 64)), dataset((64, 64), concept=held_out)])
    assert "note: repeats and samples_per_epoch without effect: validation" in describe(both)
    halved = split_validation(dataset(*[(64, 64 + n) for n in range(4)]), 0.5, 0)
    assert "validation images are never" not in describe(halved)
    fitting = replace(
        given.samples[0], focus=(0.1, 0.1, 0.5, 0.5), picture=GraphPicture(torch.ones(64, 64, 4)), mask=None
    )
    assert "note: cats" not in describe(given.with_samples([fitting]))


def test_many_buckets_are_cut_short():
    sizes = [(64, 64 + 16 * n) for n in range(12)] + [(64 + 16 * n, 64) for n in range(1, 12)]
    text = describe(dataset(*sizes, caption="one"))
    count = int(text.splitlines()[1].split()[0])
    assert count > 12 and text.splitlines()[1].endswith(f" and {count - 12} more)")


# ---------------------------------------------------------------- several datasets as one


def test_ids_stay_unique_and_concepts_their_own():
    one, two = dataset((64, 64), (64, 64)), dataset((64, 64), name="two", concept=replace(PLAIN, name="b"))
    three = dataset((96, 96), name="three").with_samples([Sample("2/0.png", picture(96, 96), "x")])
    joined = combine([one, two, three])
    assert [(sample.id, joined.of(sample).name) for sample in joined.samples] == [
        ("0.png", ""),
        ("1.png", ""),
        ("2/0.png", "b"),
        ("3/2/0.png", ""),
    ]
    assert joined.samples[2].picture is two.samples[0].picture
    assert joined.notes == (
        "dataset 2 (two) shares ids with an earlier one: its begin with 2/",
        "dataset 3 (three) shares ids with an earlier one: its begin with 3/",
    )


# ---------------------------------------------------------------- settings put together


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ()),
        ("768, 1024", ((768, 768), (1024, 1024))),
        ("832x1216 512;768", ((832, 1216), (768, 768))),
        (" 640×320 ", ((640, 320),)),
    ],
)
def test_resolutions(text, expected):
    assert resolutions(512, text) == ((512, 512), *expected)


@pytest.mark.parametrize("text", ["abc", "768 x 1024", "-5", "1", "12345678", "0x0", "768x", "٧٦٨"])
def test_a_size_that_is_none_is_named(text):
    with pytest.raises(DatasetError, match=r"more_resolutions: .* is no size; write e\.g\. 768, 1024 or 832x1216"):
        resolutions(512, text)


def test_widgets_and_settings_become_one_concept():
    found = concept_from(
        512,
        32,
        "768",
        0.1,
        " zorb ",
        CaptionOptions(shuffle=True),
        ImageOptions(flip=True),
        ConceptSettings("regularisation", loss_weight=0.5, min_side=32, max_side=1024, batch_size=3, upscale=False),
    )
    assert found == Concept(
        kind="regularisation",
        resolutions=((512, 512), (768, 768)),
        repeats=Fraction(1, 10),
        loss_weight=0.5,
        batch_size=3,
        buckets=BucketOptions(step=32, min_side=32, max_side=1024, upscale=False),
        captions=CaptionOptions(shuffle=True, trigger="zorb"),
        images=ImageOptions(flip=True),
    )
    assert concept_from(512, 64) == Concept()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"trigger": "a", "captions": CaptionOptions(trigger="b")}, "trigger: it is 'a' here and 'b' in the caption"),
        ({"repeats": 2.0, "settings": ConceptSettings(samples_per_epoch=5)}, "repeats is 2, but samples_per_epoch"),
        ({"images": ImageOptions(background="not a colour")}, "background: 'not a colour' is no colour"),
        ({"settings": ConceptSettings(min_side=32)}, "min_side is 32, expected at least bucket_step"),
        ({"resolution": 32}, "resolution is .*, expected at least bucket_step"),
    ],
)
def test_contradictions_are_named(options, message):
    with pytest.raises(DatasetError, match=message):
        concept_from(**{"resolution": 512, "bucket_step": 64, **options})


def test_a_split_keeps_the_part_out_of_training():
    given = dataset(*[(64, 64)] * 10)
    found = split(given, ConceptSettings(validation_split=0.2))
    assert (len(found.members("training")), len(found.members("validation"))) == (8, 2)
    assert split(given, None) is given and split(given, ConceptSettings()) is given
    again = split(found, ConceptSettings(validation_split=0.2))
    assert again.samples == found.samples and "has no effect" in again.notes[-1]
    for options in ({"validation_split": 1.0}, {"validation_split": 0.1, "kind": "validation"}):
        with pytest.raises(DatasetError, match="validation_split"):
            ConceptSettings(**options)
