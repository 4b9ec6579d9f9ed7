"""Which words each presentation is trained with: variants, and what is preserved."""

import dataclasses

import pytest
import torch

from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.model import CaptionOptions, Concept, Dataset, GraphPicture, Sample
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ObjectiveSettings, Plan, RunSettings
from lora_loom.training.wording import Wording

SHUFFLED = CaptionOptions(shuffle=True)
CAPTION = "a, b, c, d, e, f, g, h"


def dataset(*captions, options=SHUFFLED, resolutions=((64, 64),), **concept):
    of_all = Concept(resolutions=resolutions, captions=options, **concept)
    pictures = [Sample(str(i), GraphPicture(torch.zeros(64, 64, 3)), text) for i, text in enumerate(captions)]
    return Dataset("test", (of_all,), tuple(pictures))


def wording(data, variants=0, seed=1, steps=100, batch=1, **objective):
    plan = Plan(run=RunSettings(text_variants=variants), objective=ObjectiveSettings(**objective))
    return Wording(data, BatchPlan(data, batch, seed), plan, steps)


def texts(words, positions):
    """(sample, text) of every presentation"""
    return [
        (words.sample(member).id, words.text(member, position))
        for position in range(positions)
        for member in words.order.batch(position)
    ]


def preserved(words, positions=20):
    return [
        (text, words.preserved(member, text))
        for position in range(positions)
        for member in words.order.batch(position)
        for text in [words.text(member, position)]
    ]


# ---------------------------------------------------------------- variants


def test_new_words_at_every_presentation_or_one_of_so_many():
    data = dataset(CAPTION, CAPTION.upper())
    free = texts(wording(data), 200)
    assert len(set(free)) == 200
    for count in (1, 3):
        words = wording(data, count)
        found = texts(words, 200)
        for name in "01":
            mine = [text for sample, text in found if sample == name]
            assert len(set(mine)) == count
            assert all(sorted(text.split(", ")) == sorted(data.samples[int(name)].caption.split(", ")) for text in mine)
            assert min(mine.count(text) for text in set(mine)) > 50 / count  # each about equally often
        assert texts(wording(data, count), 200) == found
        assert texts(wording(data, count, seed=2), 200) != found


def test_dropping_the_whole_caption_stays_a_matter_of_the_presentation():
    """As often as without variants, and not always the same variants."""
    options = dataclasses.replace(SHUFFLED, dropout=0.25)
    found = [text for _, text in texts(wording(dataset(CAPTION, options=options), 2), 800)]
    assert 0.2 < found.count("") / len(found) < 0.3
    assert len(set(found)) == 3
    every = dataclasses.replace(SHUFFLED, dropout_every_n_epochs=3)
    found = [text for _, text in texts(wording(dataset(CAPTION, options=every), 2), 30)]
    assert [position for position, text in enumerate(found) if not text] == list(range(2, 30, 3))
    assert len(set(found)) == 3


def test_tag_dropout_is_kept_in_the_variants():
    options = CaptionOptions(tag_dropout=0.4)
    found = {text for _, text in texts(wording(dataset(CAPTION, options=options), 6), 300)}
    assert len(found) == 6 and len({text.count(",") for text in found}) > 2


def test_resolutions_share_their_variants():
    data = dataset(CAPTION, resolutions=((64, 64), (128, 128)))
    assert len({text for _, text in texts(wording(data, 2), 100)}) == 2


def test_captions_that_do_not_vary_are_left_alone():
    still = Concept(resolutions=((64, 64),))
    data = dataset(CAPTION)
    both = dataclasses.replace(data, concepts=(*data.concepts, still), samples=(
        *data.samples, Sample("still", GraphPicture(torch.ones(64, 64, 3)), "(as it is)", 1)
    ))  # fmt: skip
    found = texts(wording(both, 2), 60)
    assert {text for name, text in found if name == "still"} == {"\\(as it is\\)"}
    assert len(set(found)) == 3


@pytest.mark.parametrize("options", [
    CaptionOptions(), CaptionOptions(dropout=0.5), CaptionOptions(dropout_every_n_epochs=2),
    CaptionOptions(warmup_steps=0.5), CaptionOptions(prefix="x", trigger="y"),
])  # fmt: skip
def test_variants_of_captions_that_do_not_vary_are_refused(options):
    data = dataset(CAPTION, options=options)
    wording(data)
    with pytest.raises(OptionError, match=r"text_variants is 3, expected 0: .* Switch on shuffle"):
        wording(data, 3)


# ---------------------------------------------------------------- preserved


DOP = {"preservation_weight": 1.0, "preservation_trigger": "zørb", "preservation_class": "woman"}


@pytest.mark.parametrize("caption, expected", [
    ("a photo of zørb", "a photo of woman"),
    ("Zørb, zørb and ZØRB", "woman, woman and woman"),
    ("zørbs are many", None),
    ("xzørb", None),
    ("zørb_1", None),
    ("a zørb's hat (zørb)", "a woman's hat \\(woman\\)"),
    ("nothing", None),
])  # fmt: skip
def test_the_class_stands_in_for_the_trigger(caption, expected):
    words = wording(dataset(caption, "zørb", options=CaptionOptions()), **DOP)
    found = dict(preserved(words))
    assert found["zørb"] == "woman"
    assert [instead for text, instead in found.items() if text != "zørb"] == [expected]


def test_brackets_and_backslashes_are_words_like_others():
    """Captions are shown with their brackets escaped; both the trigger and the class may have some."""
    options = {**DOP, "preservation_trigger": "miku (vocaloid)", "preservation_class": r"girl (any) \1"}
    words = wording(dataset("solo, miku (vocaloid), smile", options=CaptionOptions()), **options)
    assert preserved(words, 1) == [("solo, miku \\(vocaloid\\), smile", "solo, girl \\(any\\) \\1, smile")]
    weighted = dataset("solo, (miku (vocaloid):1.2)", options=CaptionOptions(weighted=True))
    assert preserved(wording(weighted, **options), 1) == [("solo, (miku (vocaloid):1.2)", r"solo, (girl (any) \1:1.2)")]


@pytest.mark.parametrize("where", ["caption", "trigger", "prefix", "suffix"])
def test_the_trigger_may_come_from_the_options(where):
    caption = "zørb" if where == "caption" else "a hat"
    options = CaptionOptions(**({} if where == "caption" else {where: "zørb"}))
    words = wording(dataset(caption, options=options), **DOP)
    assert all("woman" in instead and "zørb" not in instead for _, instead in preserved(words))


def test_a_dropped_caption_preserves_nothing():
    words = wording(dataset("zørb", options=CaptionOptions(dropout=0.5)), **DOP)
    assert {("zørb", "woman"), ("", None)} == set(preserved(words, 40))


def test_a_trigger_of_no_caption_is_refused():
    for caption in ("", "zørbs", "a hat"):
        with pytest.raises(OptionError, match=r"preservation_trigger is 'zørb', expected a word of the captions"):
            wording(dataset(caption), **DOP)
    held_out = dataclasses.replace(dataset("zørb").concepts[0], kind="validation")
    data = dataset("a hat")
    both = dataclasses.replace(data, concepts=(*data.concepts, held_out), samples=(
        *data.samples, Sample("held out", GraphPicture(torch.ones(64, 64, 3)), "zørb", 1)
    ))  # fmt: skip
    with pytest.raises(OptionError, match="preservation_trigger"):
        wording(both, **DOP)
    assert wording(both).preserved(both_first(both), "zørb") is None


def both_first(data):
    return BatchPlan(data, 1, 1).batch(0)[0]
