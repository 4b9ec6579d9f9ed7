"""The dataset check: what each rule fires on, what it leaves alone, with which figures; thresholds; cancelling."""

import re
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_loom.training.dataset import lint_images
from lora_loom.training.dataset.images import read_header
from lora_loom.training.dataset.lint import badge, lint, report
from lora_loom.training.dataset.lint_knowledge import (
    TagKnowledge,
    parse_implications,
    parse_tags,
    plain,
    read_knowledge,
)
from lora_loom.training.dataset.lint_rules import FIXABLE, NEEDS, RULES, Finding, Limits, parse_limits, rule_table
from lora_loom.training.dataset.lint_spelling import implied_by, one_letter_apart
from lora_loom.training.dataset.lint_tags import obfuscated
from lora_loom.training.dataset.model import (
    BucketOptions,
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
from lora_loom.training.dataset.scores import measure

PHOTOS = Path(skimage.__file__).parent / "data"
MIDDLE = (60, 0, 440, 300)
GOOD = "ohwx, sitting on bench, smiling, red coat, garden, looking away"
CONCEPT = Concept(name="ohwx", resolutions=((512, 512),))


def picture(width=512, height=512, **header):
    given = replace(Header(width, height, "JPEG", "RGB", jpeg_quality=90), **header)
    return FilePicture("nowhere.jpg", given, 1000, 1)


def dataset(texts, *concepts, pictures=None, **options):
    """One sample per text, which is (concept, caption) where there are several concepts."""
    concepts = tuple(concepts) or (replace(CONCEPT, **options),)
    samples = []
    for number, text in enumerate(texts):
        concept, caption = text if isinstance(text, tuple) else (0, text)
        shown = picture() if pictures is None else pictures[number]
        shown = replace(shown, path=f"{number}.jpg") if isinstance(shown, FilePicture) else shown
        samples.append(Sample(f"{number}.jpg", shown, caption, concept))
    return Dataset("set", concepts, tuple(samples))


def as_found(findings):
    return sorted(findings, key=lambda found: (found.rule, found.level, found.message))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.lists(st.sampled_from(
        ["ohwx", "Ohwx", "black hair", "black_hair", "hair", "1girl", "solo", "2girls", "smiling", "smilng", "by x", "",
         "day", "night", "left arm", "\ufeff", "a tall woman walks along the quiet beach"],
        ), max_size=6).map(", ".join)),
        min_size=1, max_size=12),
    st.lists(st.sampled_from(sorted(RULES)), max_size=3), st.booleans(),
)  # fmt: skip
def test_some_rules_find_what_they_find_among_all(texts, rules, flip):
    shapes = [picture(300 + 70 * number, 512, transparent=number % 3 == 0) for number in range(len(texts))]
    images = ImageOptions(flip=flip)
    found = dataset(texts, replace(CONCEPT, images=images), Concept("class", repeats=Fraction(30)), pictures=shapes)
    everything = lint(found, count_tokens=len, batch_size=2)
    assert as_found(lint(found, count_tokens=len, batch_size=2, rules=rules)) == as_found(
        each for each in everything if each.rule in rules
    )


def test_a_rule_alone_is_quick():
    """It was part of a check of everything."""

    def seconds(many, **options):
        start = time.process_time()
        lint(many, **options)
        return time.process_time() - start

    assert 4 * seconds(varied(2000), rules=["T001"]) < seconds(varied(2000))


def varied(count=30, **options):
    """A dataset that no caption rule has anything to say about."""
    words = ["arm chair", "blue sky", "rain", "market stall", "old bridge", "cup", "dancing", "hat", "umbrella", "book"]
    captions = [
        ", ".join(["ohwx", *(f"{words[(n + k) % 10]} {'abcde'[(n // 10 + k) % 5]}" for k in range(5))])
        for n in range(count)
    ]
    return dataset(captions, **options)


def found(data, rule, level=None, **options):
    """The one finding of a rule; None without one."""
    every = [f for f in lint(data, **options) if f.rule == rule and level in (None, f.level)]
    assert len(every) <= 1, every
    return every[0] if every else None


def ids(*numbers):
    return tuple(f"{number}.jpg" for number in numbers)


# ---------------------------------------------------------------- the table


def test_the_table_has_every_rule_once():
    numbers = {"D": (1, 2, 3, 10, 11, 12, 20, 21, 22, 23, 24, 30, 31, 32), "A": (1,), "B": (1, 2, 3), "R": (1,)}
    numbers["T"] = (1, 2, 3, 4, 10, 11, 12, 20, 21, 22, 23, 24, 30, 31, 32, 40, 41, 50)
    assert set(RULES) == {f"{letter}{number:03}" for letter in numbers for number in numbers[letter]}
    for rule in RULES.values():
        assert rule.needs in NEEDS and rule.advice and rule.source in ("guide", "measured", "ours")
        for threshold in rule.thresholds:
            assert f"{threshold.name} {threshold.default:g}" in rule_table()
        assert f"{rule.id} {rule.level}: {rule.title}" in rule_table()
    assert rule_table().count("automatic fix") == len(FIXABLE)


def test_thresholds_from_text():
    limits = parse_limits(" d021=1.2, T010=25;\n-D002  D001.warn=9 ")
    assert (limits.of("D021"), limits.of("D021", "warn"), limits.of("D021", "error")) == (1.2, 1.2, 1.5)
    assert (limits.of("T010"), limits.of("D001"), limits.of("D001", "warn"), limits.of("T011")) == (25, 8, 9, 5)
    assert limits.off == {"D002"} and not limits.on("D002") and limits.on("D002", "D001")
    assert parse_limits("") == Limits()


@pytest.mark.parametrize(
    "text, message",
    [
        ("D21=1", "'D21' is no lint rule: did you mean D021 (enlarged)?"),
        ("-X999", "'X999' is no lint rule"),
        ("quick", "'quick' is no lint rule: known are D001, D002"),
        ("D021", "'D021' sets nothing: write e.g. D021=1 or -D021"),
        ("D021=big", "'D021=big': 'big' is no number of 0 or more, e.g. D021=1.5"),
        ("D021=-1", "no number of 0 or more"),
        ("D021=nan", "no number of 0 or more"),
        ("D021=", "no number of 0 or more"),
        ("D021.much=1", "D021 has no 'much': it has warn, error"),
        ("T001=1", "T001 has no threshold: -T001 switches it off"),
    ],
)
def test_thresholds_that_make_no_sense(text, message):
    with pytest.raises(DatasetError, match=re.escape(message)):
        parse_limits(text)


def test_a_sound_dataset_has_nothing_but_its_schedule():
    findings = lint(varied(40))
    assert [finding.rule for finding in findings] == ["R001"]
    assert badge(findings) == "1 note" and badge([]) == "no findings"
    assert lint(varied(40), thresholds="-R001") == []
    assert report([]) == "the check found nothing"


def test_nothing_to_check():
    assert lint(Dataset("set", (CONCEPT,), ()), full=True) == lint(Dataset("set", (), ())) == []


def test_report_and_badge():
    findings = lint(dataset(["", *["a cat"] * 7]))
    assert findings == sorted(findings, key=lambda finding: ["error", "warn", "info"].index(finding.level))
    text = report(findings)
    assert "error T001: 1 image without a caption or a trigger, trained without words\n    0.jpg\n    → " in text
    many = report([Finding("D012", "info", "sideways", ids(*range(9)), None)])
    assert many == "info D012: sideways\n    0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 4 more"
    levels = [Finding("D012", level, "", (), None) for level in ("error", "warn", "warn", "info")]
    assert badge(levels) == "1 error, 2 warnings" and badge(levels[1:]) == "2 warnings"


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(st.sampled_from("ab1 ,._()\\\n|{}:;é猫\ufeff"), max_size=30), max_size=6),
    st.sampled_from([CaptionOptions(), CaptionOptions(weighted=True, lines="random", keep_tokens_separator="|||")]),
)
def test_no_caption_breaks_the_check(captions, options):
    data = dataset([*captions, "x"], captions=replace(options, trigger="a b"))
    assert all(finding.message and finding.fix for finding in lint(data, count_tokens=len))


# ---------------------------------------------------------------- numbers, files, buckets


@pytest.mark.parametrize(
    "count, level, limit", [(7, "error", 8), (8, "warn", 15), (15, "info", 30), (30, None, 0), (51, "info", 50)]
)
def test_numbers_of_images(count, level, limit):
    finding = found(varied(count), "D002" if count > 50 else "D001")
    assert level == (finding and finding.level)
    if finding:
        assert f"“ohwx” has {count} images" in finding.message and f"than {limit}" in finding.message
        assert finding.ids == ids(*range(count))


def test_numbers_of_images_of_a_style():
    for count, fires in ((49, True), (50, False), (200, False), (201, True)):
        findings = {finding.rule for finding in lint(varied(count), style=True)}
        assert ("D003" in findings) == fires and not findings & {"D001", "D002"}


def test_files():
    pictures = [
        picture(format="WEBP", jpeg_quality=None),
        picture(mode="CMYK"),
        picture(format="GIF", mode="P", jpeg_quality=None, animated=True),
        picture(format="PNG", jpeg_quality=None, bits=16),
        picture(format="PNG", jpeg_quality=None, transparent=True),
        picture(orientation=6),
        picture(3001, 3000),
        picture(3000, 3000),
        picture(jpeg_quality=49),
        picture(jpeg_quality=50),
    ]
    data = dataset([GOOD] * 10, pictures=pictures)
    formats = found(data, "D011")
    assert formats.ids == ids(0, 1, 2, 3) and "1 animated: its first frame is used" in formats.message
    assert formats.level == "info" and "automatic" not in formats.fix
    assert "1 WEBP" in formats.message and "1 CMYK" in formats.message and "16 bits" in formats.message
    assert found(data, "D010").ids == ids(4) and "#ffffff" in found(data, "D010").message
    assert found(data, "D012").ids == ids(5)
    assert found(data, "D020").ids == ids(6) and "over 3000 pixels (up to 3001, 6.jpg)" in found(data, "D020").message
    assert found(data, "D031").ids == ids(8) and "below 50 (down to 49, 8.jpg)" in found(data, "D031").message
    assert not found(dataset([GOOD] * 10, pictures=pictures, images=ImageOptions(alpha_mask=True)), "D010")


def test_pictures_out_of_the_graph():
    clear, solid = (torch.rand(512, 512, 4) for _ in range(2))
    solid[..., 3] = 1
    pictures = [GraphPicture(clear), GraphPicture(solid), GraphPicture(torch.rand(512, 512, 3))]
    for full in (False, True):
        assert found(dataset([GOOD] * 3, pictures=pictures), "D010", full=full).ids == ids(0)


@pytest.mark.parametrize(
    "side, level, limit", [(512, None, 0), (500, "warn", "1"), (342, "warn", "1"), (341, "error", "1.5")]
)
def test_pictures_that_are_enlarged(side, level, limit):
    finding = found(dataset([GOOD], pictures=[picture(side, side)]), "D021")
    assert level == (finding and finding.level)
    if finding:
        assert f"more than {limit}× to fill the bucket (up to {512 / side:.2f}×, 0.jpg)" in finding.message
    free = dataset([GOOD], pictures=[picture(side, side)], buckets=BucketOptions(upscale=False))
    assert not found(free, "D021")


def test_the_resolution_that_asks_most_counts():
    data = dataset([GOOD], pictures=[picture(600, 600)], resolutions=((512, 512), (768, 768)))
    assert "up to 1.28×" in found(data, "D021").message


def test_crops():
    pictures = [picture(512, 512), picture(700, 512), picture(4000, 512), picture(520, 2070)]
    finding = found(dataset([GOOD] * 4, pictures=pictures), "D022")
    assert finding.ids == ids(2) and "more than 10% of their area" in finding.message and "4:1" in finding.message
    assert f"up to {1 - 4 * 512 / 4000:.0%}, 2.jpg" in finding.message
    square = dataset([GOOD] * 4, pictures=pictures, buckets=BucketOptions(enabled=False))
    assert found(square, "D022").ids == ids(1, 2, 3)


@pytest.mark.parametrize("size", [(600, 400), (6000, 4000), (1024, 683), (640, 427)])
def test_what_is_cropped_is_compared_as_it_is_told(size):
    """3:2 photographs lose a tenth, exactly or with the rounding of their sides: not more than 10%."""
    assert not found(dataset([GOOD], pictures=[picture(*size)]), "D022")
    assert "up to 10%" in found(dataset([GOOD], pictures=[picture(*size)]), "D022", thresholds="D022=0.09").message


def test_buckets_cut_short():
    cut = found(varied(resolutions=((1024, 1024),), buckets=BucketOptions(max_side=1024)), "D023")
    assert "max_side 1024 is below 2× the resolution 1024" in cut.message and cut.concept == 0
    assert not found(varied(buckets=BucketOptions(max_side=1024)), "D023")
    assert not found(varied(), "D023")
    off = BucketOptions(max_side=1024, enabled=False)
    assert not found(varied(resolutions=((1024, 1024),), buckets=off), "D023")


# ---------------------------------------------------------------- repeats and schedule


def two(first, second, **options):
    """Concepts of so many images."""
    concepts = (replace(CONCEPT, name="one", **options), replace(CONCEPT, name="two"))
    return dataset([(0, GOOD)] * first + [(1, GOOD)] * second, *concepts)


def test_balance():
    finding = found(two(20, 10), "B001")
    assert "“one” is shown 2.00 times as often as “two” (over 1.5): “one” 20, “two” 10 per epoch" in finding.message
    assert not found(two(15, 10), "B001") and not found(two(10, 10), "B001")
    assert not found(two(10, 20, repeats=Fraction(2)), "B001")
    assert not found(two(20, 10), "B001", thresholds="B001=2")


def test_small_concepts():
    assert found(two(20, 7), "B002").ids == ids(*range(20, 27))
    assert "has 7 images, fewer than 8" in found(two(20, 7), "B002").message
    assert not found(two(20, 8), "B002") and not found(varied(5), "B002")
    assert "11 times as often as others (over 10)" in found(two(20, 20, repeats=Fraction(11)), "B002").message


def test_batches_of_several_concepts():
    assert "batch size 4 with 2 training concepts" in found(two(9, 9), "B003", batch_size=4).message
    assert not found(two(9, 9), "B003") and not found(varied(), "B003", batch_size=4)
    assert found(two(9, 9, batch_size=2), "B003")


def test_schedule():
    """100 presentations of each of 30 images with repeats 2 at batch size 4: 50 epochs of 60 / 4 steps."""
    message = found(varied(30, repeats=Fraction(2)), "R001", batch_size=4).message
    assert "100 presentations of each image" in message
    assert "50 epochs of 15 steps at batch size 4: 750 steps" in message
    assert "35 epochs of 30 steps at batch size 1: 1050 steps" in found(varied(30), "R001", style=True).message


# ---------------------------------------------------------------- captions


def test_empty_captions_and_stray_characters():
    data = dataset([" \n", GOOD, "\ufeff" + GOOD, "caf\ufffd, b", GOOD + "\x00"])
    empty, stray = (finding for finding in lint(data) if finding.rule == "T001")
    assert (empty.ids, stray.ids) == (ids(0), ids(2, 3, 4)) and empty.level == stray.level == "error"
    assert "UTF-8" in stray.fix
    with_trigger = (replace(CONCEPT, captions=CaptionOptions(trigger="x")),)
    assert found(replace(data, concepts=with_trigger), "T001").ids == ids(2, 3, 4)


def test_the_trigger_that_is_set():
    data = dataset([GOOD, "ohwx man, x", "x, ohwx, y", "ohwxian, y"], captions=CaptionOptions(trigger="ohwx"))
    finding = found(data, "T002")
    assert (finding.level, finding.ids) == ("info", ids(2, 3)) and "“ohwx”" in finding.message


def test_the_trigger_that_nobody_set():
    captions = [f"ohwx, thing {n}, b, c, d" for n in "abcdefghi"]
    finding = found(dataset([*captions, "thing z, ohwx, b, c, d"]), "T002")
    assert (finding.level, finding.ids) == ("error", ids(9)) and "do not begin with “ohwx”" in finding.message
    assert not found(dataset([*captions[:8], "thing y, c", "thing z, d"]), "T002")  # below the share
    usual = [caption.replace("ohwx", "1girl") for caption in captions]
    assert not found(dataset([*usual, "2girls, b"]), "T002")
    known = TagKnowledge(counts={"ohwx": 1})
    assert not found(dataset([*captions, "thing z"]), "T002", knowledge=known)


def test_a_trigger_that_is_a_known_tag():
    knowledge = TagKnowledge(counts={"miku": 101, "rare": 100})
    data = dataset([GOOD], captions=CaptionOptions(trigger="Miku"))
    finding = found(data, "T003", knowledge=knowledge)
    assert "“miku” is a tag the tag list counts 101 times (over 100)" in finding.message and "“mkx4”" in finding.fix
    assert not found(dataset([GOOD], captions=CaptionOptions(trigger="rare")), "T003", knowledge=knowledge)
    assert obfuscated("hatsune miku") == "htsnmk"


def test_outfits_come_second():
    concepts = [replace(CONCEPT, name=name, captions=CaptionOptions(trigger="ohwx")) for name in ("armour", "dress")]
    captions = [(0, f"ohwx, steel armour, {n} trees") for n in range(4)] + [(0, "ohwx, rain, steel armour")]
    captions += [(1, f"ohwx, ball gown, {n} clouds") for n in range(5)]
    finding = found(dataset(captions, *concepts), "T004")
    assert finding.ids == ids(4) and "“armour”: 1 image without its own tag “steel armour”" in finding.message
    assert not found(dataset(captions[:5], concepts[0]), "T004")


def test_numbers_of_tags():
    captions = [", ".join(f"tag{n}{k}" for k in range(count)) for n, count in enumerate((4, 5, 20, 21))]
    data = dataset([*captions, "A portrait of a woman in a red coat who sits on a bench and reads."])
    most, least = found(data, "T010"), found(data, "T011")
    assert most.ids == ids(3) and "more than 20 tags (up to 21, 3.jpg; mean of all 12.5)" in most.message
    assert least.ids == ids(0) and "fewer than 5 tags (down to 4, 0.jpg)" in least.message
    assert found(data, "T010", thresholds="T010=19").ids == ids(2, 3)


def test_lengths_in_tokens():
    captions = ["w " * count for count in (75, 76, 160)]
    data = dataset(captions, captions=CaptionOptions(prefix="", dropout=1.0, tag_dropout=1.0))
    finding = found(data, "T012", count_tokens=lambda text: len(text.split()))
    assert finding.ids == ids(1, 2)
    assert "longer than 75 tokens (up to 160, 2.jpg; over 75: 2, over 150: 1, over 225: 0)" in finding.message
    longer = replace(data, concepts=(replace(CONCEPT, captions=CaptionOptions(trigger="a", suffix="b")),))
    assert found(longer, "T012", count_tokens=lambda text: len(text.split())).ids == ids(0, 1, 2)
    assert not found(data, "T012")
    called = []
    lint(data, thresholds="-T012", count_tokens=called.append)
    assert not called


@pytest.mark.parametrize(
    "caption, implied",
    [
        ("black hair, hair", {"hair": "black hair"}),
        ("spread legs, legs", {"legs": "spread legs"}),
        ("fake animal ears, animal ears, ears", {"animal ears": "fake animal ears", "ears": "fake animal ears"}),
        ("hot dog, dog", {}),
        ("teddy bear, bear", {}),
        ("no hat, hat", {}),
        ("animal print, print", {}),
        ("horseshoe, shoe", {}),
        ("black hair, long hair", {}),
        ("german shepherd, animal", {"animal": "german shepherd"}),
        ("german shepherd, dog, animal", {"dog": "german shepherd", "animal": "german shepherd"}),
    ],
)
def test_implied_tags(caption, implied):
    knowledge = TagKnowledge(implications={"german shepherd": frozenset({"dog"}), "dog": frozenset({"animal"})})
    assert implied_by(caption.split(", "), knowledge) == implied
    finding = found(dataset([caption]), "T020", knowledge=knowledge)
    assert bool(finding) == bool(implied)
    if finding:
        assert finding.details == (tuple(sorted(implied)),)


def test_the_trigger_implies_nothing():
    assert not found(dataset(["my dog, dog, a"], captions=CaptionOptions(trigger="my dog")), "T020")


def test_spellings():
    captions = ["long_hair, a, b", "long hair, c", "a, x, A", r"miku \(vocaloid\), d", "miku (vocaloid), ^_^, score_9"]
    findings = {f.ids: f.message for f in lint(dataset(captions)) if f.rule == "T021"}
    assert list(findings) == [ids(2), ids(0, 3)]
    assert "“a”" in findings[ids(2)] and "“long_hair” (1×)" in findings[ids(0, 3)]
    assert not found(dataset(["long_hair, a", "long_hair, b"]), "T021")  # consistent
    assert found(dataset(["long_hair, a", "long hair, wide_hat"]), "T021").ids == ids(0)
    aliased = found(dataset(["a, sole female"]), "T021", knowledge=TagKnowledge(aliases={"sole female": "1girl"}))
    assert "“sole female → 1girl”" in aliased.message


@pytest.mark.parametrize(
    "caption, fires",
    [
        ("1girl, 2girls", True),
        ("1girl, 1boy", False),
        ("solo, multiple girls", True),
        ("monochrome, red hair", True),
        ("monochrome, long hair", False),
        ("day, night", True),
        ("long hair, short hair", True),
        ("long hair, short hair ornament", False),
        ("white background, outdoors", True),
        ("2girls, long hair, short hair", False),  # one each
        ("1girl, 1boy, open mouth, closed mouth", False),
        ("2girls, day, night", True),
        ("1boy, bald, facial hair", False),
        ("1boy, bald, long black hair", True),
    ],
)
def test_contradictions(caption, fires):
    assert bool(found(dataset([caption]), "T022")) == fires


@pytest.mark.parametrize(
    "one, other, apart",
    [
        ("smilling", "smiling", True),
        ("smiing", "smiling", True),
        ("smulinf", "smiling", False),
        ("simling", "smiling", True),
        ("smiling", "smiling", False),
        ("smilingg", "smiling", True),
        ("shoes", "shoe", False),
        ("1girl", "2girl", False),
        ("blue eyez", "blue eyes", True),
        ("msiilng", "smiling", False),
    ],
)
def test_one_letter(one, other, apart):
    assert one_letter_apart(one, other) == one_letter_apart(other, one) == apart


@settings(max_examples=200)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_one_letter_apart_is_edit_distance_one(one, other):
    """Against the textbook's table of Damerau and Levenshtein (restricted)."""
    rows = [[max(a, b) if 0 in (a, b) else 0 for b in range(len(other) + 1)] for a in range(len(one) + 1)]
    for a in range(1, len(one) + 1):
        for b in range(1, len(other) + 1):
            rows[a][b] = min(rows[a - 1][b] + 1, rows[a][b - 1] + 1, rows[a - 1][b - 1] + (one[a - 1] != other[b - 1]))
            if a > 1 and b > 1 and one[a - 1] == other[b - 2] and one[a - 2] == other[b - 1]:
                rows[a][b] = min(rows[a][b], rows[a - 2][b - 2] + 1)
    assert one_letter_apart(one, other) == (rows[-1][-1] == 1)


def test_typing_mistakes():
    captions = ["smiling, a"] * 5 + ["smilling, b", "frowning, c"]
    finding = found(dataset(captions), "T023")
    assert finding.ids == ids(5) and finding.details == (("smilling → smiling",),)
    assert "5 times or more" in finding.message
    assert not found(dataset(captions[1:]), "T023")
    assert not found(dataset(captions), "T023", knowledge=TagKnowledge(counts={"smilling": 3}))
    assert not found(dataset([*captions, "smilling, d"]), "T023")


@pytest.mark.parametrize("often, once", [("blue skirt", "blue shirt"), ("red hat", "red cat"), ("boots", "books")])
def test_words_that_differ_in_a_letter_are_no_mistakes(often, once):
    """The fix would replace what is meant."""
    assert not found(dataset([f"{often}, a"] * 5 + [f"{once}, b"]), "T023")


def test_unknown_tags():
    knowledge = TagKnowledge(counts={"smile": 90, "smiles": 3, "hat": 5}, aliases={"grin": "smile"})
    data = dataset(["ohwx, smle, grin, hat, {a|b}"], captions=CaptionOptions(trigger="ohwx"))
    finding = found(data, "T024", knowledge=knowledge)
    assert finding.details == (("smle",),) and "“smle” (did you mean “smile”?) (1×)" in finding.message
    assert not found(data, "T024")


def test_tags_on_every_image():
    captions = [f"ohwx, glasses, thing {n}" for n in "abcdefgh"]
    data = dataset(captions, captions=CaptionOptions(trigger="ohwx"))
    assert "“glasses” on 100% (on 95% or more)" in found(data, "T031").message
    assert not found(dataset(captions[:4], captions=CaptionOptions(trigger="ohwx")), "T031")
    assert not found(dataset([*captions, "ohwx, x"], captions=CaptionOptions(trigger="ohwx")), "T031")


def test_single_tags():
    assert found(dataset(["ohwx", "ohwx"]), "T032").ids == ids(0, 1)
    assert found(dataset(["", "ohwx"], captions=CaptionOptions(trigger="ohwx")), "T032")
    assert not found(dataset(["ohwx", "ohwx, a"]), "T032")
    assert not found(dataset(["A cat is sitting on a sofa", "A dog runs over the field"]), "T032")


def test_several_figures():
    captions = ["ohwx, multiple views, a", "ohwx, 2girls", "ohwx, b", "ohwx, c"]
    finding = found(dataset(captions), "T041")
    assert finding.ids == ids(0, 1) and "2 images of 4 (50%, over 20%)" in finding.message
    assert not found(dataset([*captions, *captions[2:] * 3]), "T041")


def test_one_artist():
    captions = [f"by someone, {n}" for n in range(3)] + ["a, b"] * 4
    assert "“by someone” on 43% of the images (over 40%)" in found(dataset(captions), "T050").message
    assert not found(dataset([*captions, "c"]), "T050")
    known = TagKnowledge(counts={"somebody": 5}, categories={"somebody": 1})
    assert found(dataset(["somebody, a"] * 5), "T050", knowledge=known)


@pytest.mark.parametrize(
    "caption", ["left arm up", "Eyepatch", "heterochromia", "english text", "asymmetrical_hair", "prosthetic leg"]
)
def test_mirrored_asymmetry(caption):
    mirrored = ImageOptions(flip=True)
    finding = found(dataset([f"ohwx, {caption}", "ohwx, smile"], images=mirrored), "A001")
    assert (finding.ids, finding.level, finding.concept) == (ids(0), "error", 0)
    assert not found(dataset([f"ohwx, {caption}"]), "A001")
    assert not found(dataset(["bright light, context, outright"], images=mirrored), "A001")
    assert not found(dataset([caption], images=mirrored, kind="validation"), "A001")


def test_sentences_are_no_tags():
    sentence = "A photograph of a man with number {}, who has long hair, a hat and hair on his left arm."
    captions = [sentence.format(number) for number in range(9)]
    rules = {finding.rule for finding in lint(dataset(captions))}
    assert rules == {"D001", "R001"}
    assert not found(
        dataset(["一只戴着红色帽子的小猫坐在窗台上看着外面的雨天，窗外的街道上行人撑着雨伞匆匆走过"]), "T011"
    )


@pytest.mark.parametrize("kind", ["validation", "regularisation"])
def test_other_kinds_of_pictures_are_left_alone(kind):
    other = replace(CONCEPT, name="other", kind=kind, captions=CaptionOptions(trigger=""))
    captions = [(0, sample.caption) for sample in varied(30).samples] + [(1, ", ".join("abcdefghijklmnopqrstuvwxyz"))]
    findings = lint(dataset([*captions, (1, "hair, black hair, a_b, a b")], CONCEPT, other))
    assert {finding.rule for finding in findings} == {"R001"}


# ---------------------------------------------------------------- the user's own tables


def test_tag_lists():
    content = '1girl,0,500,"sole_female,1girls"\nLong_Hair,0,400,\n\nsomebody,1,3\n^_^,0,9,sole_female\n'
    counts, categories, aliases = parse_tags(b"\xef\xbb\xbf" + content.encode(), "tags.csv")
    assert counts == {"1girl": 500, "long hair": 400, "somebody": 3, "^_^": 9} and categories["somebody"] == 1
    assert aliases == {"sole female": "1girl", "1girls": "1girl"}


def test_implications():
    plain_rows = b"german_shepherd,dog\ndog,animal\n"
    board = b"id,antecedent_name,consequent_name,created_at,status\n1,german_shepherd,dog,x,active\n"
    board += b"2,dog,animal,x,active\n3,dog,cat,x,pending\n"
    for content in (plain_rows, board):
        knowledge = TagKnowledge(implications=parse_implications(content, "i.csv"))
        assert knowledge.implied("german shepherd") == {"dog", "animal"} and knowledge.implied("cat") == set()


@pytest.mark.parametrize(
    "parse, content, message",
    [
        (parse_tags, b"name,category,count,alias\n", "t.csv, line 1: expected name,category,count,aliases"),
        (parse_tags, b"a,0,1\nb,0,many\n", "t.csv, line 2: category and count of 'b'"),
        (parse_tags, b"a,0,1\n\xff\n", "not UTF-8 text (byte 6)"),
        (parse_tags, b"\x1f\x8b\x08", "compressed: unpack it first"),
        (parse_implications, b"a,b\nc\n", "t.csv, line 2: expected antecedent,consequent"),
        (parse_implications, b"z,a\na,b\nb,c\nc,a\n", "a → b → c → a; remove one"),
        (parse_implications, b"a,a\n", "a → a"),
    ],
)
def test_tables_with_faults(parse, content, message):
    with pytest.raises(DatasetError, match=re.escape(message)):
        parse(content, "t.csv")


def test_tables_from_files(tmp_path):
    (tmp_path / "t.csv").write_text("hat,0,5,cap\n")
    (tmp_path / "i.csv").write_text("hat,headwear\n")
    assert read_knowledge(None, None) is None
    knowledge = read_knowledge(tmp_path / "t.csv", tmp_path / "i.csv")
    assert knowledge.aliases == {"cap": "hat"} and knowledge.implied("hat") == {"headwear"}
    with pytest.raises(DatasetError, match="none.csv cannot be read"):
        read_knowledge(tmp_path / "none.csv", None)


def test_names():
    assert [plain(tag) for tag in (r"Miku_\(Vocaloid\)", "o_o", " A  b_c ")] == ["miku (vocaloid)", "o_o", "a b c"]


# ---------------------------------------------------------------- pixels


def on_disk(folder, images, captions=None, **options):
    """A dataset of files; images by name."""
    samples = []
    for number, (name, image) in enumerate(images.items()):
        path = folder / name
        image.save(path, quality=95, compress_level=1)
        status = path.stat()
        file = FilePicture(str(path), read_header(path), status.st_size, status.st_mtime_ns)
        samples.append(Sample(name, file, captions[number] if captions else GOOD))
    return Dataset(str(folder), (replace(CONCEPT, **options),), tuple(samples))


@pytest.fixture(scope="module")
def photos():
    names = ("astronaut.png", "coffee.png", "chelsea.png", "motorcycle_left.png", "ihc.png", "hubble_deep_field.jpg")
    return {name.replace("jpg", "png"): Image.open(PHOTOS / name).convert("RGB").crop(MIDDLE) for name in names}


def test_photographs_are_fine(tmp_path, photos):
    findings = lint(on_disk(tmp_path, photos, resolutions=((256, 256),)), full=True)
    assert not {f.rule for f in findings if f.rule in RULES and RULES[f.rule].needs == "pixels"}


def test_duplicates(tmp_path, photos):
    coffee = photos["coffee.png"]
    more = {
        "same.bmp": coffee,
        "small.jpg": coffee.resize((300, 200)),
        "turned.png": photos["chelsea.png"].transpose(Image.Transpose.ROTATE_90),
        "white.png": Image.new("RGB", (300, 300), "white"),
        "white2.png": Image.new("RGB", (300, 300), "white"),
        "black.png": Image.new("RGB", (300, 300), "black"),
    }
    data = on_disk(tmp_path, photos | more)
    finding = found(data, "D030", full=True)
    kept = dict(zip(finding.ids, (detail[0] for detail in finding.details), strict=True))
    expected = {"same.bmp": "coffee.png", "small.jpg": "coffee.png", "turned.png": "chelsea.png"}
    assert kept == expected | {"white2.png": "white.png"}
    assert finding.level == "warn" and "(2 exactly, 1 mirrored or turned)" in finding.message
    assert "small.jpg = coffee.png" in finding.message and "4 or less counts" in finding.message


def test_pictures_that_may_be_duplicates(tmp_path, photos):
    coffee = photos["coffee.png"]
    data = on_disk(tmp_path, {**photos, "crop.png": coffee.crop((4, 3, 376, 297))})
    assert found(data, "D030", full=True, thresholds="D030.same=0").level == "info"
    assert found(data, "D030", full=True, thresholds="D030=0, D030.likely=1") is None


def test_held_back_copies_and_files_listed_twice(tmp_path, photos):
    data = on_disk(tmp_path, photos)
    again = replace(data.samples[0], id="again", concept=1)
    for kind, fires in (("training", False), ("validation", True)):
        concepts = (CONCEPT, replace(CONCEPT, kind=kind))
        finding = found(replace(data, concepts=concepts, samples=(*data.samples, again)), "D030", full=True)
        assert bool(finding) == fires
    assert finding.ids == ("again",) and "1 both trained and held back for validation" in finding.message


def test_poor_pictures(tmp_path, photos):
    soft = photos["coffee.png"].resize((95, 75)).resize((380, 300))
    poor = {"soft.png": soft, "framed.png": Image.new("RGB", (800, 700), "white")}
    poor["framed.png"].paste(photos["astronaut.png"].resize((400, 400)), (200, 150))
    data = on_disk(tmp_path, {name: photos[name] for name in ("chelsea.png", "motorcycle_left.png")} | poor)
    photos["ihc.png"].save(tmp_path / "ihc.jpg", quality=10)
    path = tmp_path / "ihc.jpg"
    file = FilePicture(str(path), replace(read_header(path), jpeg_quality=None), path.stat().st_size, 1)
    data = data.with_samples([*data.samples, Sample("ihc.jpg", file, GOOD)])
    findings = {(f.rule, f.ids): f.message for f in lint(data, full=True, thresholds="-D021") if f.rule[:3] == "D03"}
    assert set(findings) == {("D031", ("soft.png",)), ("D031", ("ihc.jpg",))}
    assert "below 0.13 counts" in findings["D031", ("soft.png",)]
    assert "above 1.3 counts" in findings["D031", ("ihc.jpg",)]
    border = found(data, "D024", full=True)
    assert border.ids == ("framed.png",) and "more than 25% of the area (up to 71%, framed.png)" in border.message
    assert not [f for f in lint(data, thresholds="-D021") if f.rule in ("D024", "D031", "D030")]  # quick does not look


def test_unusual_noise_and_softness(tmp_path, photos):
    draw = np.random.default_rng(0)
    names, images = list(photos), {}
    for number in range(11):
        base = np.asarray(photos[names[0]].crop((number * 5, 0, number * 5 + 400, 400)), np.float32)
        images[f"{number}.png"] = Image.fromarray((base + draw.normal(0, 3, base.shape)).clip(0, 255).astype(np.uint8))
    rough = np.asarray(images["3.png"], np.float32)
    chequers = np.add.outer(np.arange(400) // 8, np.arange(400) // 8) % 2
    rough = rough + draw.normal(0, 14, rough.shape) + 25 * chequers[..., None]
    images["3.png"] = Image.fromarray(rough.clip(0, 255).astype(np.uint8))
    flat = np.asarray(images["5.png"], np.float32)
    images["5.png"] = Image.fromarray((flat * 0.05 + 100).astype(np.uint8))
    findings = lint(on_disk(tmp_path, images), full=True, thresholds="-D030")
    noisy = [f for f in findings if f.rule == "D032"]
    assert [f.ids for f in noisy] == [("3.png",)] and "3.5 counts; 3.png)" in noisy[0].message
    assert [f.ids for f in findings if f.rule == "D031" and "far less sharp" in f.message] == [("5.png",)]


def test_backgrounds_and_colours_that_captions_do_not_name(tmp_path, photos):
    images = {}
    for number in range(4):
        images[f"{number}.png"] = Image.new("RGB", (400, 400), "white" if number < 2 else (90, 160, 60))
        images[f"{number}.png"].paste(photos["astronaut.png"].resize((240, 240)).rotate(number * 30), (80, 100))
    images["4.png"] = photos["coffee.png"].convert("L")
    images["5.png"] = photos["ihc.png"].convert("L").convert("RGB")
    captions = ["ohwx", "ohwx, smile", "ohwx", "ohwx", "ohwx", "ohwx, greyscale"]
    data = on_disk(tmp_path, images, captions)
    finding = found(data, "T030", full=True)
    assert finding.ids == ("0.png", "1.png") and "2 images of 6 (33%, 25% counts) on plain white" in finding.message
    assert "white background" in finding.fix
    assert found(data, "T040", full=True).ids == ("4.png",)
    told = on_disk(tmp_path, images, ["ohwx, white background", *captions[1:]])
    assert not found(told, "T030", full=True)


def test_transparency_is_looked_at_in_full(tmp_path, photos):
    opaque, clear = photos["coffee.png"].convert("RGBA"), photos["chelsea.png"].convert("RGBA")
    clear.putpixel((3, 3), (1, 2, 3, 250))
    data = on_disk(tmp_path, {"opaque.png": opaque, "clear.png": clear})
    assert found(data, "D010").ids == ("opaque.png", "clear.png")
    assert found(data, "D010", full=True).ids == ("clear.png",)


def test_damaged_files_are_findings(tmp_path, photos):
    data = on_disk(tmp_path, photos)
    path = tmp_path / "coffee.png"
    path.write_bytes(path.read_bytes()[:5000])
    finding = found(data, "D011", full=True)
    assert (finding.level, finding.ids) == ("error", ("coffee.png",)) and "(automatic fix D011: " in finding.fix
    assert "cannot be decoded (coffee.png: " in finding.message
    assert not found(data, "D011")


def test_large_jpegs_are_judged_at_the_size_they_are_trained_at(tmp_path, photos):
    soft = photos["coffee.png"].resize((1900, 1500), Image.Resampling.BICUBIC)
    for side, fires in ((256, False), (1664, True)):
        data = on_disk(tmp_path, {"a.jpg": soft}, resolutions=((side, side),))
        assert bool([f for f in lint(data, full=True) if f.rule == "D031"]) == fires


def test_progress_and_cancelling(tmp_path, photos):
    data = on_disk(tmp_path, photos)
    seen = []
    lint(data, full=True, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 6) for number in range(1, 7)]

    def cancel(done, total):
        seen.append(done)
        raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        lint(data, full=True, progress=cancel)
    assert seen == [1]
    lint(data, progress=cancel)
    lint(data, full=True, thresholds="-D010,-D011,-D024,-D030,-D031,-D032,-T030,-T040", progress=cancel)
    assert seen == [1]


def test_cancelling_ends_the_decoding(monkeypatch):
    looked = []

    def counted(*arguments):
        looked.append(arguments)
        return measure(*arguments)

    def cancel(done, total):
        raise KeyboardInterrupt

    monkeypatch.setattr(lint_images, "measure", counted)
    data = dataset([GOOD] * 300, pictures=[GraphPicture(torch.rand(256, 256, 3))] * 300)
    with pytest.raises(KeyboardInterrupt):
        lint(data, full=True, progress=cancel)
    assert 0 < len(looked) < 200


def test_the_quick_check_is_quick():
    """1,000 images in about 0.3 s of one core; the whole check of their pixels takes more than 12."""
    data = varied(1000)
    start = time.process_time()
    lint(data, batch_size=4)
    assert time.process_time() - start < 9
