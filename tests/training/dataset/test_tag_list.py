"""Captions as tags and what stands between them: nothing is lost, and what goes in and out again leaves no trace."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.model import CaptionOptions
from lora_loom.training.dataset.tag_list import TagList, core, edited, exactly, members, tag_name, unwrapped
from lora_loom.training.dataset.tag_text import Glob, tags, unescaped

PLAIN = CaptionOptions()
MARKED = CaptionOptions(keep_tokens_separator="|||", secondary_separator=";;;")
OPTIONS = st.sampled_from(
    [
        PLAIN,
        MARKED,
        CaptionOptions(separator=";"),
        CaptionOptions(separator=" | "),
        CaptionOptions(wildcards=True, weighted=True),
        CaptionOptions(lines="first"),
    ]
)
TEXTS = st.text(st.sampled_from("aab B,,,  \n;|(){}:1._\\\t"), max_size=40) | st.lists(
    st.sampled_from(["a", "b cat", "(c, d:1.2)", "{x, y|z}", "e"]), max_size=6
).flatmap(lambda words: st.sampled_from([", ", ",", "\n", ";;;", " ||| ", "; "]).map(lambda joint: joint.join(words)))


@settings(max_examples=300, deadline=None)
@given(TEXTS, OPTIONS)
def test_reading_loses_nothing(text, options):
    line = TagList(text, options)
    assert line.text == text and len(line.joints) == len(line.tags) + 1
    assert all(tag and tag == tag.strip() for tag in line.tags)
    if options in (PLAIN, CaptionOptions(separator=";")):
        assert line.tags == tags(text, options.separator)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab ()\t\xa0"), max_size=4), max_size=6), st.sampled_from([",", ", ", " ,  "]))
def test_the_quick_way_reads_what_the_other_reads(words, joint):
    text = joint.join(words)
    quick, thorough = TagList(text, PLAIN), TagList("", PLAIN)
    thorough.tags, thorough.joints = [], []
    thorough._read(text)
    assert (quick.tags, quick.joints) == (thorough.tags, thorough.joints)


@settings(max_examples=500, deadline=None)
@given(TEXTS, OPTIONS, st.integers(0, 8), st.booleans())
def test_put_in_and_taken_out_leaves_the_caption_as_it_was(text, options, place, behind):
    line = TagList(text, options)
    assume(line.tags or not text)
    index = min(place, len(line.tags))
    if behind and index < len(line.tags):
        line.insert_behind(index, ["new"])
        index += 1
    else:
        line.insert(index, ["new"])
    again = TagList(line.text, options)
    assume("new" in again.tags)  # else it stands inside brackets that close behind it
    assert again.tags.index("new") == line.tags.index("new") == index
    assert again.tags == line.tags
    again.delete(index)
    assert again.text == text


@settings(max_examples=300, deadline=None)
@given(TEXTS, OPTIONS, st.data())
def test_what_is_kept_stays_in_order(text, options, data):
    line = TagList(text, options)
    stays = data.draw(st.lists(st.booleans(), min_size=len(line.tags), max_size=len(line.tags)))
    expected = [tag for tag, kept in zip(line.tags, stays, strict=True) if kept]
    line.keep(stays)
    assert line.tags == expected
    assert TagList(line.text, options).tags == expected or any(letter in text for letter in "(){}")


@pytest.mark.parametrize(
    "text, gone, expected",
    [
        ("a, b\nc, d", "c", "a, b\nd"),
        ("a, b\nc, d", "b", "a\nc, d"),
        ("a, b\nc", "c", "a, b"),
        ("a ||| b, c ||| d", "b", "a ||| c ||| d"),
        ("a ||| b ||| d", "b", "a |||  ||| d"),
        ("a ||| b, c", "a", "||| b, c"),
        ("a ||| b", "b", "a |||"),
        ("a;;;b, c", "b", "a, c"),
        ("a;;;b, c", "a", "b, c"),
        ("x, a;;;b, c", "a", "x, b, c"),
        ("a,  b ,c", "b", "a,  c"),
        ("a,", "a", ""),
    ],
)
def test_groups_lines_and_marks_stay_apart(text, gone, expected):
    line = TagList(text, MARKED)
    line.delete(line.tags.index(gone))
    assert line.text == expected


@pytest.mark.parametrize(
    "text, options, expected",
    [
        ("(a, b:1.2), c", CaptionOptions(weighted=True), ["(a, b:1.2)", "c"]),
        ("(a, b:1.2), c", PLAIN, ["(a", "b:1.2)", "c"]),
        ("(a, b", CaptionOptions(weighted=True), ["(a", "b"]),
        (r"miku \(x, y", CaptionOptions(weighted=True), [r"miku \(x", "y"]),
        ("{a, b|c}, d", CaptionOptions(wildcards=True), ["{a, b|c}", "d"]),
        ("{a, b|c, d", CaptionOptions(wildcards=True), ["{a", "b|c", "d"]),
        ("a | b|c", CaptionOptions(separator="|", keep_tokens_separator="|||"), ["a", "b", "c"]),
    ],
)
def test_what_belongs_together_is_one_tag(text, options, expected):
    assert TagList(text, options).tags == expected


@pytest.mark.parametrize(
    "text, fixed, expected",
    [
        ("c, a, b", 0, "a, b, c"),
        ("c, b,  a", 1, "c, a,  b"),
        ("c, a\nd, b", 0, "a, c\nb, d"),
        ("c, a;;;z, b", 0, "a;;;z, b, c"),
        ("z, y ||| c, a ||| x, b", 0, "z, y ||| a, c ||| x, b"),
        ("||| c, a ||| x, b", 0, "||| a, c ||| x, b"),
        ("c, a ||| ||| x, b", 0, "c, a ||| ||| x, b"),
        ("d;;;a, c, b", 1, "d;;;a, b, c"),
        ("", 0, ""),
    ],
)
def test_sorting_keeps_what_is_fixed(text, fixed, expected):
    line = TagList(text, MARKED)
    line.sort(str.lower, fixed)
    assert line.text == expected


def test_lines_that_are_captions_of_their_own_are_edited_apart():
    first = CaptionOptions(lines="first")

    def without_a(line):
        line.keep([tag != "a" for tag in line.tags])

    assert edited("a, b\na\n\nc, a", first, without_a) == "b\n\nc"
    assert edited("a, b\nc", CaptionOptions(), without_a) == "b\nc"
    assert edited("a", first, without_a) == ""


@pytest.mark.parametrize(
    "tag, expected",
    [
        ("(a:1.2)", ("(", "a", ":1.2)")),
        ("((a))", ("((", "a", "))")),
        ("[a]", ("", "[a]", "")),
        ("(:)", ("", "(:)", "")),
        ("(^_^)", ("", "(^_^)", "")),
        ("(^_^:1.2)", ("(", "^_^", ":1.2)")),
        ("(a: 1 )", ("(", "a", ": 1 )")),
        ("(o)_(o)", ("", "(o)_(o)", "")),
        (r"\(a\)", ("", r"\(a\)", "")),
        (r"(a\)", ("", r"(a\)", "")),
        ("(re:zero)", ("(", "re:zero", ")")),
        ("(:3)", ("(", ":3", ")")),
        ("(a:b:1.5)", ("(", "a:b", ":1.5)")),
        (":)", ("", ":)", "")),
        ("()", ("", "()", "")),
        ("a:1.2", ("", "a:1.2", "")),
    ],
)
def test_weights_are_told_from_tags(tag, expected):
    assert unwrapped(tag) == expected and "".join(expected) == tag


@pytest.mark.parametrize("text", [",", "\n", " , ,\n"])
def test_what_is_put_into_a_caption_of_separators_stands_alone(text):
    line = TagList(text, PLAIN)
    line.insert(0, ["x", "y"])
    assert line.text == "x, y"


@pytest.mark.parametrize(
    "group, expected",
    [
        ("long hair, blue eyes", ["long hair", "blue eyes"]),
        ("{long hair, hat|cat}", ["long hair", "hat", "cat"]),
        ("red {long hair|dark hat} x", ["red {long hair", "dark hat} x"]),
        ("a, (b c, d e:1.2)", ["a", "b c", "d e"]),
        ("miku (x), {{b|c}}", ["miku (x)", "b", "c"]),
    ],
)
def test_a_group_consists_of_tags_and_of_what_stands_around_them(group, expected):
    pieces = members(group, CaptionOptions(weighted=True, wildcards=True))
    assert "".join(pieces) == group
    assert [core(piece)[1] for piece in pieces[::2]] == expected
    assert ["".join(core(piece)) for piece in pieces[::2]] == pieces[::2]


def test_names_forget_weights_only_where_captions_are_weighted():
    assert tag_name("(Long Hair:1.2)", CaptionOptions(weighted=True)) == "long hair"
    assert tag_name("(Long Hair:1.2)", PLAIN) == "(long hair:1.2)"
    assert tag_name(r"Miku \(Vocaloid\)", PLAIN) == "miku (vocaloid)"


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab*?\\() "), min_size=1, max_size=8), st.text(st.sampled_from("ab*?\\() "), max_size=8))
def test_a_tag_taken_exactly_fits_itself_alone(tag, other):
    glob = Glob(unescaped(exactly(tag)))
    assert glob.fits(unescaped(tag))
    assert glob.fits(unescaped(other)) == (unescaped(other) == unescaped(tag))
