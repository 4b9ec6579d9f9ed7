"""What is shown of a caption, against the examples of sd-scripts' docs/config_README-en.md (named where they are used)
and tables worked out by hand from its description."""

import itertools
import random
import time
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.captions import check, notes, shown, tags
from lora_loom.training.dataset.draws import Draws
from lora_loom.training.dataset.model import CaptionOptions, Concept, Dataset, GraphPicture, Sample

HEAD = "1girl, hatsune miku, vocaloid"


def text(caption, turn=0, epoch=0, step=0, total=0, **options):
    return shown(caption, CaptionOptions(**{"weighted": True, **options}), Draws("test", turn), epoch, step, total)


def reached(caption, turns=300, **options):
    """Everything that the draws come to."""
    return {text(caption, turn, **options) for turn in range(turns)}


def arrangements(*tags):
    return {", ".join(order) for order in itertools.permutations(tags)}


def subsets(*tags):
    return {", ".join(kept) for count in range(len(tags) + 1) for kept in itertools.combinations(tags, count)}


def dataset(*captions, **options):
    picture = GraphPicture(torch.zeros(64, 64, 3))
    samples = tuple(Sample(f"{index}.png", picture, caption) for index, caption in enumerate(captions))
    return Dataset("test", (Concept(captions=CaptionOptions(**options)),), samples)


# ---------------------------------------------------------------- examples of the documentation


def test_the_documented_keep_tokens_separator():
    """ "Example of caption, `keep_tokens_separator` notation", and the option's own description."""
    caption = f"{HEAD} ||| stage, microphone, white shirt, smile ||| best quality, rating: general"
    found = reached(caption, shuffle=True, keep_tokens_separator="|||")
    middle = arrangements("stage", "microphone", "white shirt", "smile")
    assert found == {f"{HEAD}, {order}, best quality, rating: general" for order in middle}
    found = reached(caption, tag_dropout=0.5, keep_tokens_separator="|||")
    middle = subsets("stage", "microphone", "white shirt", "smile")
    assert found == {", ".join(filter(None, (HEAD, kept, "best quality, rating: general"))) for kept in middle}
    found = reached("aaa, bbb ||| ccc, ddd, eee, fff ||| ggg, hhh", shuffle=True, keep_tokens_separator="|||")
    assert {"aaa, bbb, eee, ccc, fff, ddd, ggg, hhh", "aaa, bbb, fff, ccc, eee, ddd, ggg, hhh"} < found
    assert found == {f"aaa, bbb, {order}, ggg, hhh" for order in arrangements("ccc", "ddd", "eee", "fff")}


def test_the_documented_prefix_and_suffix():
    """ "Example of configuration file: `secondary_separator`, wildcard notation, `keep_tokens_separator`, etc."."""
    options = {
        "prefix": "1girl, hatsune miku, vocaloid |||",
        "suffix": ", anime screencap ||| masterpiece, rating: general",
        "keep_tokens_separator": "|||",
        "secondary_separator": ";;;",
        "wildcards": True,
    }
    found = reached("sky;;;cloud, {simple|white} background", **options, shuffle=True)
    middle = [
        order
        for background in ("simple background", "white background")
        for order in arrangements("sky,cloud", background, "anime screencap")
    ]
    assert found == {f"{HEAD}, {order}, masterpiece, rating: general" for order in middle}


def test_the_documented_secondary_separator():
    """ "Example of caption, secondary_separator notation"."""
    caption = "1girl, hatsune miku, vocaloid, upper body, looking at viewer, sky;;;cloud;;;day, outdoors"
    assert text(caption, secondary_separator=";;;") == caption.replace(";;;", ",")
    assert text("aaa;;;bbb;;;ccc", secondary_separator=";;;") == "aaa,bbb,ccc"
    for turn in range(100):
        parts = text(caption, turn, secondary_separator=";;;", shuffle=True, tag_dropout=0.3).split(", ")
        assert set(parts) <= {*caption.replace(";;;", ",").split(", "), "sky,cloud,day"}
        assert not {"sky", "cloud", "day", "sky,cloud"} & set(parts)


def test_the_documented_wildcards_and_lines():
    """ "Example of caption, enable_wildcard notation", and "it can be combined" with several lines."""
    start = "1girl, hatsune miku, vocaloid, upper body, looking at viewer"
    found = reached(f"{start}, {{simple|white}} background", wildcards=True)
    assert found == {f"{start}, simple background", f"{start}, white background"}
    assert text(f"{HEAD}, {{{{retro style}}}}", wildcards=True) == f"{HEAD}, {{retro style}}"
    lines = [
        "1girl, hatsune miku, vocaloid, upper body, looking at viewer, microphone, stage",
        "a girl with a microphone standing on a stage",
        "detailed digital art of a girl with a microphone on a stage",
    ]
    assert reached("\n".join(lines), lines="random") == set(lines)
    assert reached("a {red|blue} cat\ndog", lines="random", wildcards=True) == {"a red cat", "a blue cat", "dog"}
    assert text("\n".join(lines), lines="first") == lines[0]


# ---------------------------------------------------------------- step by step


def test_a_caption_that_no_option_changes_is_shown_as_it_is_written():
    for caption in ("a  cat,sitting ,on a mat.", "", " a sentence (with brackets), {and} braces  ", "x ||| y;;;z"):
        assert text(caption) == caption
        assert text(caption, shuffle=False, keep_tokens=3, lines="random") == caption


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("1girl\nlong hair\nsmile", "1girl, long hair, smile"),
        ("1girl, smile,\nstage\n\n", "1girl, smile, stage"),
        ("A girl on a stage.\nShe sings.", "A girl on a stage. She sings."),
        ("  1girl, smile\r\n  She sings.\r\n", "1girl, smile, She sings."),
    ],
)
def test_lines_are_joined_as_tags_or_sentences(caption, expected):
    assert text(caption) == expected


def test_whole_captions_are_dropped_by_chance_and_by_epoch():
    many = [text("a cat", turn, dropout=0.3, trigger="x", prefix="y") for turn in range(2000)]
    assert set(many) == {"", "y x, a cat"} and 0.27 < many.count("") / 2000 < 0.33
    assert reached("a cat", dropout=1) == {""}
    # sd-scripts counts epochs from 1 and drops where the number divides
    assert [text("a", epoch=epoch, dropout_every_n_epochs=3) for epoch in range(7)] == ["a", "a", ""] * 2 + ["a"]
    assert {text("a", epoch=epoch, dropout_every_n_epochs=1) for epoch in range(3)} == {""}


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("", "mikux"),
        ("smile, stage", "mikux, smile, stage"),
        ("mikux, smile", "mikux, smile"),
        ("Mikux on a stage", "Mikux on a stage"),
        ("mikuxes, smile", "mikux, mikuxes, smile"),
        ("smile, mikux, stage", "mikux, smile, stage"),
        ("a photo of mikux", "mikux, a photo of mikux"),
    ],
)
def test_the_trigger_comes_first(caption, expected):
    assert text(caption, trigger="mikux") == expected
    assert text(text(caption, trigger="mikux"), trigger="mikux") == expected


def test_every_line_gets_the_trigger_prefix_and_suffix():
    found = reached("cat\ndog, mikux", lines="random", trigger="mikux", prefix="a picture of", suffix="on white")
    assert found == {"a picture of mikux, cat on white", "a picture of mikux, dog on white"}


def test_escaped_brackets_do_not_hide_the_trigger():
    assert text(r"miku \(vocaloid\), smile", trigger="miku (vocaloid)") == r"miku \(vocaloid\), smile"
    assert text("sks, woman, smile", trigger="sks, woman") == "sks, woman, smile"
    assert text("woman, smile", trigger="sks, woman") == "sks, woman, smile"


@pytest.mark.parametrize("separator", ["", "|||"])
@pytest.mark.parametrize("prefix", ["", "best quality,", "a photo of"])
def test_the_trigger_stays_in_front(separator, prefix):
    caption = "b, mikux, c" if not separator else "b, mikux, c ||| d"
    front = {"": "mikux", "best quality,": "best quality, mikux", "a photo of": "a photo of mikux"}[prefix]
    found = reached(caption, trigger="mikux", prefix=prefix, shuffle=True, keep_tokens_separator=separator)
    assert all(shown.startswith(front + ", ") and shown.count("mikux") == 1 for shown in found)
    gone = reached(caption, turns=20, trigger="mikux", prefix=prefix, tag_dropout=1, keep_tokens_separator=separator)
    assert gone == {front if not separator else f"{front}, b, c"}


def test_the_trigger_counts_as_kept():
    assert reached("b, c", trigger="a", keep_tokens=1, shuffle=True) == {"a, b, c", "a, c, b"}
    assert reached("b, c", trigger="a", keep_tokens=2, shuffle=True) == {"a, b, c"}
    whole = "photo of a man ohwx, man"
    assert text("b, c", trigger="ohwx, man", prefix="photo of a man", tag_dropout=1) == whole
    found = reached("b, c", trigger="a", prefix="x ||| ", keep_tokens_separator="|||", shuffle=True)
    assert found == {"x, a, b, c", "x, a, c, b"}


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|b {c|d} }", {"a", "b c ", "b d "}),
        ("{a|{b|{c|d}}} {{x}}", {"a {x}", "b {x}", "c {x}", "d {x}"}),
        ("{{{a|b}}}", {"{a", "{b}"}),  # sd-scripts reads doubled braces first, from the left
        ("{a|}x", {"ax", "x"}),
        ("{a}", {"a"}),
        ("{} {a|b", {"{} {a|b"}),
        ("a|b}", {"a|b}"}),
        ("{{a|b}}", {"{a|b}"}),
        ("{a|b} }}{{", {"a }{", "b }{"}),
    ],
)
def test_wildcards(caption, expected):
    assert reached(caption, wildcards=True) == expected


def test_every_choice_is_as_likely():
    counts = Counter(text("{a|b|c|d}", turn, wildcards=True) for turn in range(2000))
    assert set(counts) == set("abcd") and min(counts.values()) > 400


def test_hostile_braces_take_no_time():
    start = time.process_time()
    for caption in ("{a|" * 20_000, "{a|b" * 20_000 + "}" * 20_000, "|" * 100_000, "{|" * 9_999 + " }" * 9_999):
        text(caption, wildcards=True)
    assert time.process_time() - start < 60


def test_keep_tokens_and_shuffle():
    assert reached("a, b, c, d", shuffle=True, keep_tokens=2) == {"a, b, c, d", "a, b, d, c"}
    assert reached("a, b, c", shuffle=True) == arrangements("a", "b", "c")
    assert reached("a, b, c", shuffle=True, keep_tokens=9) == {"a, b, c"}
    counts = Counter(text("a, b, c", turn, shuffle=True) for turn in range(1800))
    assert min(counts.values()) > 230, "every order is as likely"
    assert reached("a; b, c", shuffle=True, separator=";") == {"a, b, c", "b, c, a"}


def test_the_mark_is_never_shown():
    """sd-scripts leaves it in the text where nothing is shuffled or dropped, and from the third one on."""
    assert text("a ||| b, c", keep_tokens_separator="|||") == "a, b, c"
    assert text("a ||| b ||| c ||| d", keep_tokens_separator="|||", tag_dropout=1) == "a, c, d"
    assert text("a, b", keep_tokens_separator="|||", tag_dropout=1, keep_tokens=1) == "a"


@pytest.mark.parametrize(
    "step, least, steps, expected",
    [
        # floor(step · (tags - least) / steps) + least of the four tags behind the kept one
        (0, 1, 10, 1),
        (3, 1, 10, 1),
        (4, 1, 10, 2),
        (9, 1, 10, 3),
        (10, 1, 10, 4),
        (99, 1, 10, 4),
        (0, 0, 10, 0),
        (5, 0, 10, 2),
        (0, 3, 10, 3),
        (0, 9, 10, 4),
        (7, 1, 0.5, 3),  # half of the 20 steps
        (10, 1, 0.5, 4),
    ],
)
def test_warm_up(step, least, steps, expected):
    found = text("x, a, b, c, d", step=step, total=20, warmup_min=least, warmup_steps=steps, keep_tokens=1)
    assert found == ", ".join(["x", *"abcd"[:expected]])


def test_warm_up_is_exact_where_floating_point_is_not():
    caption = ", ".join(f"t{index}" for index in range(50))
    for steps in (49, 490, 7, 1000):
        for step in range(steps):
            expected = 1 + int(Fraction(step * 49, steps))
            assert len(tags(text(caption, step=step, warmup_steps=steps))) == expected
    assert len(tags(text(caption, step=29, total=100, warmup_steps=0.29))) == 50, "0.29 · 100 is 28.999…"


def test_tags_are_dropped_one_by_one():
    assert reached("a, b, c", tag_dropout=0.5) == subsets("a", "b", "c")
    counts = Counter(tag for turn in range(2000) for tag in tags(text("a, b, c", turn, tag_dropout=0.2)))
    assert all(1500 < counts[tag] < 1700 for tag in "abc")
    assert text("a, b", tag_dropout=1) == ""
    tail = "red hat, blue hat, cat"
    assert text(tail, tag_dropout=1, never_drop=("* HAT",)) == "red hat, blue hat"
    assert text(tail, tag_dropout=1, never_drop=("??? hat", "dog")) == "red hat"
    assert text(tail, tag_dropout=1, only_drop=("*hat",)) == "cat"
    assert text(tail, tag_dropout=1, only_drop=("*hat",), never_drop=("red*",)) == "red hat, cat"
    for written in ("miku (vocaloid)", r"miku \(vocaloid\)"):  # one tag, as everywhere else
        for listed in ("miku (vocaloid)", r"miku \(*\)"):
            assert "miku" in text(f"{written}, cat", tag_dropout=1, never_drop=(listed,))
            assert not notes(dataset(f"{written}, cat", tag_dropout=0.5, never_drop=(listed,)))


def test_brackets_are_text_unless_weighted():
    assert text("(a:1.2), miku_(vocaloid)", weighted=False) == r"\(a:1.2\), miku_\(vocaloid\)"
    assert text("(a:1.2)", weighted=True) == "(a:1.2)"


# ---------------------------------------------------------------- for all captions

any_caption = st.text(st.sampled_from("ab ,|{};()\\\n\u00e9"), max_size=40)
any_options = st.builds(
    CaptionOptions,
    trigger=st.sampled_from(["", "mikux", "a b"]),
    prefix=st.sampled_from(["", "p,"]),
    suffix=st.sampled_from(["", ", s"]),
    lines=st.sampled_from(["all", "first", "random"]),
    wildcards=st.booleans(),
    shuffle=st.booleans(),
    keep_tokens=st.integers(0, 3),
    keep_tokens_separator=st.sampled_from(["", "|||"]),
    secondary_separator=st.sampled_from(["", ";;"]),
    dropout=st.sampled_from([0, 0.5]),
    tag_dropout=st.sampled_from([0, 0.5]),
    warmup_steps=st.sampled_from([0, 0.5, 9]),
    weighted=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(any_caption, any_options, st.integers(0, 9), st.integers(0, 20))
def test_it_is_a_pure_function_of_its_arguments(caption, options, turn, step):
    before = random.getstate()
    first = shown(caption, options, Draws(turn), 3, step, 20)
    assert shown(caption, options, Draws(turn), 3, step, 20) == first
    assert random.getstate() == before
    assert not options.keep_tokens_separator or "|||" not in first
    if options.trigger and first and not options.wildcards:
        assert options.trigger in first.lower()


@settings(max_examples=200, deadline=None)
@given(any_caption, any_options, st.integers(0, 99))
def test_without_dropping_no_tag_is_lost_or_made_up(caption, options, turn):
    changes = {"dropout": 0, "tag_dropout": 0, "warmup_steps": 0, "lines": "all", "wildcards": False, "weighted": True}
    options = CaptionOptions(**{**vars(options), **changes, "trigger": "", "secondary_separator": ""})
    mark = options.keep_tokens_separator or ","
    whole = ",".join((options.prefix, caption.replace("\n", ","), options.suffix)).replace(mark, ",")
    got = shown(caption, options, Draws(turn))
    # white space is no part of a tag; sentences that are joined by a space are compared letter by letter
    letters = [Counter("".join(tags(part)).replace(" ", "").replace(",", "")) for part in (whole, got)]
    assert letters[0] == letters[1]


# ---------------------------------------------------------------- notes


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"keep_tokens": 1}, "keep_tokens keeps tags in place, but nothing moves"),
        ({"keep_tokens": 1, "keep_tokens_separator": "|||", "shuffle": True}, "counts only in captions without"),
        ({"never_drop": ("a",)}, "never_drop has no effect without tag_dropout"),
        ({"only_drop": ("a",), "never_drop": ("b",)}, "never_drop and only_drop has no effect"),
        ({"warmup_min": 3}, "warmup_min (3) has no effect without warmup_steps"),
        ({"dropout": 1}, "dropout is 1: every caption is dropped"),
        ({"dropout_every_n_epochs": 1}, "dropout_every_n_epochs is 1: every caption is dropped"),
        ({"trigger": "x", "prefix": "y, X"}, "trigger 'x' is in the prefix too"),
        ({"secondary_separator": ",,", "shuffle": True}, "secondary_separator ',,' holds the separator"),
    ],
)
def test_options_without_effect_are_named(options, expected):
    [note] = check(CaptionOptions(**options))
    assert expected in note and ":" in note + ":"


def test_options_with_an_effect_are_not():
    busy = {"shuffle": True, "keep_tokens": 1, "tag_dropout": 0.1, "never_drop": ("a",), "warmup_steps": 5}
    marked = {"keep_tokens_separator": "|||", "shuffle": True}
    for options in ({}, busy, {"warmup_min": 2, "warmup_steps": 9}, marked):
        assert check(CaptionOptions(**options)) == []
        assert notes(dataset("a ||| b, c" if options is marked else "a, b", "d, e", **options)) == []


@pytest.mark.parametrize(
    "options, caption, expected",
    [
        ({"keep_tokens_separator": "|||", "shuffle": True}, "a, b", "keep_tokens_separator '|||' is in no caption"),
        ({"secondary_separator": ";;;"}, "a, b", "secondary_separator ';;;' is in no caption"),
        ({"wildcards": True}, "a, b", "wildcards is on, but no caption has"),
        ({"lines": "random"}, "a, b\n", "lines is random, but no caption has several lines"),
        ({"weighted": True}, "a, b", "weighted is on, but no caption has a (bracket)"),
        ({}, "a, (b:1.2)", "weighted is off: '(b:1.2)' is read as it stands"),
        ({"shuffle": True}, "a long sentence.", "shuffle: no caption has more than one tag"),
        ({"tag_dropout": 0.1, "never_drop": ("a", "x*")}, "a, b", "never_drop names tags that no caption has: x*"),
    ],
)
def test_what_no_caption_has_is_named(options, caption, expected):
    [note] = notes(dataset(caption, **options))
    assert expected in note


def test_empty_captions_are_named():
    [note] = notes(dataset("a", "", " \n"))
    assert note == "empty captions, trained without a prompt: 1.png, 2.png"
    for options in ({"trigger": "x"}, {"prefix": "x"}, {"suffix": "x"}):
        assert notes(dataset("a", "", **options)) == []


def test_wildcards_of_a_configuration_need_no_lines():
    """``enable_wildcard`` stands for both, and who has no lines is not told about an option that has no key."""
    assert notes(dataset("{a|b} c", wildcards=True, lines="random")) == []


def test_notes_name_the_concept_and_come_once():
    one = Concept("cats", captions=CaptionOptions(keep_tokens=1))
    other = Concept("dogs", captions=CaptionOptions(wildcards=True))
    picture = GraphPicture(torch.zeros(8, 8, 3))
    samples = (Sample("a", picture, "x, y", 0), Sample("b", picture, "x, {y|z}", 1))
    [note] = notes(Dataset("test", (one, other, one), samples))
    assert note.startswith("cats: keep_tokens ")
    assert "dogs: " in notes(Dataset("test", (one, other), samples[:1] + (Sample("b", picture, "y", 1),)))[1]
