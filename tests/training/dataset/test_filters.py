"""Filters: every prefix on a table worked out by hand, the grammar against Python's own not, and, or."""

import fnmatch
import random
import re
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.filters import parse_filter, select
from lora_loom.training.dataset.lint_rules import Finding
from lora_loom.training.dataset.model import CaptionOptions, Concept, Dataset, DatasetError, GraphPicture, Sample
from lora_loom.training.dataset.tag_text import Glob

SAMPLES = [  # id, caption, concept, width
    ("cats/cat-1.jpg", "orange cat, sitting, re: zero", 0, 640),
    ("cats/b [2].png", "cat, dog AND bird", 0, 64),
    ("dogs/large_cat.png", r"a dog on a mat, miku \(vocaloid\)", 1, 100),
    ("dogs/Übung.png", "", 1, 100),
    ("dogs/e.png", "catastrophe; DOG, with comma; *_*", 2, 100),
    ("f.png", 'he said "hi", 50%\nsecond line', 0, 100),
]


@pytest.fixture(scope="module")
def dataset():
    concepts = (Concept("my cats"), Concept("Dogs"), Concept("", captions=CaptionOptions(separator=";")))
    samples = [
        Sample(name, GraphPicture(torch.zeros(80, width, 3)), caption, concept)
        for name, caption, concept, width in SAMPLES
    ]
    return Dataset("test", concepts, tuple(samples))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {0, 1, 2, 3, 4, 5}),
        ("  \n ", {0, 1, 2, 3, 4, 5}),
        # the examples of TagGUI's README, section "Advanced Image List Filtering"
        ("tag:cat", {1}),
        ("caption:cat", {0, 1, 4}),
        ("name:cat", {0, 2}),
        ("path:cat", {0, 1, 2}),
        ("tags:=2", {1, 2}),
        ("tags:==2", {1, 2}),
        ("tags:!=2", {0, 3, 4, 5}),
        ("chars:<20", {1, 3}),
        ("chars:>=29", {0, 2, 4, 5}),
        ('tag:"orange cat"', {0}),
        ("tag:'orange cat'", {0}),
        ('tag:"he said \\"hi\\""', {5}),
        ("tag:'he said \"hi\"'", {5}),
        ("tag:*cat", {0, 1}),
        ("NOT tag:cat", {0, 2, 3, 4, 5}),
        ("tag:cat AND tag:orange*", set()),
        ("tag:cat OR tag:catastrophe", {1, 4}),
        ("tag:*cat and not (tag:orange* or tag:white)", {1}),
        ("width:>100", {0}),
        ("height:=80", {0, 1, 2, 3, 4, 5}),
        # one more of each
        ("cat", {0, 1, 4}),
        ('"a dog"', {2}),
        ("CAPTION:DoG", {1, 2, 4}),
        ("tag:'dog, with comma'", {4}),
        ("tag:re:*", {0}),
        ('"re: zero"', {0}),
        ('tag:"dog and bird"', {1}),
        (r"tag:\*_\*", {4}),
        ("tag:???", {1, 4, 5}),
        ("caption:'c?t, d'", {1}),
        ("tag:50%", {5}),
        ("tag:miku*(vocaloid)", {2}),
        ('tag:"miku (vocaloid)"', {2}),
        (r'tag:"miku \(vocaloid\)"', {2}),
        ("(tag:miku*(vocaloid) OR tag:cat)", {1, 2}),
        ("name:[2]", {1}),
        ("name:übung", {3}),
        ("name:dogs", set()),
        ("concept:cats", {0, 1, 5}),
        ("concept:dogs", {2, 3}),
        ("tags:=0", {3}),
        ("tags:>=3 AND width:<=100", {4, 5}),
        ("lint:D021", {0, 4}),
        ("lint:t*", {2}),
        ("NOT NOT lint:D021 AND NOT(lint:T010)", {0, 4}),
    ],
)
def test_what_each_filter_selects(dataset, text, expected):
    findings = [
        Finding("D021", "warn", "", ("cats/cat-1.jpg", "dogs/e.png"), None),
        Finding("T010", "warn", "", ("dogs/large_cat.png", "gone.png"), None),
    ]
    assert set(select(dataset, text, findings)) == expected


def test_tokens_are_counted_as_the_encoder_will_see_them(dataset):
    seen = []

    def count(text):
        seen.append(text)
        return len(text.split())

    assert select(dataset, "tokens:<=3", (), count) == [3]
    assert seen == [caption.replace(r"\(", "(").replace(r"\)", ")").replace("(", r"\(").replace(")", r"\)")
                    for _, caption, _, _ in SAMPLES]  # fmt: skip
    with pytest.raises(DatasetError, match="filter: tokens: counts with .* connect clip"):
        select(dataset, "tag:nothing AND tokens:>3")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("tag:cat dog", "at character 9 ('dog'): expected AND, OR or the end, e.g. tag:cat AND tag:dog"),
        ("tag:cat (tag:dog)", "at character 9 ('(tag:dog)'): expected AND, OR or the end"),
        ("tag:cat AND", "at its end: expected a term, e.g. tag:cat"),
        ("OR tag:cat", "at character 1 ('OR tag:cat'): expected a term"),
        ("tag:a AND or b", "at character 11 ('or b'): expected a term"),
        ("NOT", "at its end: expected a term"),
        ("()", "at character 2 (')'): expected a term"),
        ("(tag:a", "at character 1 ('(tag:a'): expected a closing bracket for this one, e.g. ("),
        ("(tag:a tag:b)", "at character 8 ('tag:b)'): expected AND, OR or a closing bracket"),
        ("tag:a)", "at character 6 (')'): expected no closing bracket, since none is open"),
        ('tag:"a b', "at character 5 ('\"a b'): expected a closing \""),
        ("tag:", "at character 1 ('tag:'): expected something to look for after tag:, e.g. tag:cat, or"),
        ("tags:many", "expected a comparison (= != < > <= >=) and a whole number, e.g. tags:>20"),
        ("tags: >5", "expected a comparison"),
        ("tags:=>5", "expected a comparison"),
        ("tags:>1.5", "expected a comparison"),
        ("tags:>\u00b2", "expected a comparison"),
        ("tga:cat", "at character 1 ('tga:cat'): expected a known prefix (tag:, caption:, name:, path:, "),
        ("tga:cat", "width:, height:); the nearest is tag:, e.g. quotes"),
        ("re:zero", 'quotes for text with a colon: "re: zero"'),
        ("a OR lint:D0211", "at character 6: 'D0211' is no lint rule: did you mean D021"),
        ("x" * 3000, "it has 3000 characters, at most 2000 are read"),
        ("(" * 60 + "a" + ")" * 60, "at character 51 ("),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_place_and_an_example(text, expected):
    with pytest.raises(DatasetError, match="^filter: .*" + re.escape(expected)):
        parse_filter(text)


def test_which_rules_and_numbers_a_filter_asks_for():
    chosen = parse_filter("tag:a OR NOT (lint:D02? AND (tokens:>3 OR lint:T010))")
    assert chosen.rules == ("D020", "D021", "D022", "D023", "D024", "T010")
    assert chosen.asks_for("tokens") and not chosen.asks_for("tags")
    assert parse_filter("").rules == ()


# ---------------------------------------------------------------- the grammar

LETTERS = "abcd"


@st.composite
def expressions(draw, depth=4):
    """A filter over single letters, with any brackets and white space."""
    kind = draw(st.sampled_from(["term", "term", "not", "and", "or", "brackets"] if depth else ["term"]))
    if kind == "term":
        return "tag:" + draw(st.sampled_from(LETTERS))
    left = draw(expressions(depth - 1))
    if kind == "not":
        return f"{draw(st.sampled_from(['NOT', 'not', 'Not']))} {left}"
    if kind == "brackets":
        return draw(st.sampled_from(["({})", "( {} )", "NOT({})"])).format(left)
    return f"{left}  {kind.upper() if draw(st.booleans()) else kind} {draw(expressions(depth - 1))}"


@settings(max_examples=300, deadline=None)
@given(expressions())
def test_precedence_is_python_s(text):
    captions = [[tag for bit, tag in enumerate(LETTERS) if number >> bit & 1] for number in range(16)]
    picture = GraphPicture(torch.zeros(8, 8, 3))
    samples = tuple(Sample(str(number), picture, ", ".join(tags)) for number, tags in enumerate(captions))
    python = re.sub(
        r"tag:(\w)", r"('\1' in tags)", re.sub(r"\b(NOT|AND|OR)\b", lambda m: m[0].lower(), text, flags=re.I)
    )
    expected = [number for number, tags in enumerate(captions) if eval(python, {}, {"tags": tags})]
    assert select(Dataset("test", (Concept(),), samples), text) == expected


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('ab :()"\\*?<>=1'), max_size=30))
def test_any_text_is_a_filter_or_a_named_fault(text):
    try:
        parse_filter(text)
    except DatasetError as error:
        assert str(error).startswith("filter: ")


# ---------------------------------------------------------------- wildcards


@settings(max_examples=500, deadline=None)
@given(st.text("ab*?", max_size=8), st.text("ab", max_size=10))
def test_wildcards_are_those_of_the_shell(pattern, text):
    assert Glob(pattern).fits(text) == fnmatch.fnmatchcase(text, pattern)
    assert Glob(pattern, anywhere=True).fits(text) == fnmatch.fnmatchcase(text, f"*{pattern}*")


@pytest.mark.parametrize("text", [".", "[ab]", "(a|b)+", "a{2}", "^a$", "\\", "a\\", "\\d", "$", "é\n"])
def test_nothing_else_in_a_pattern_means_anything(text):
    assert Glob(text).fits(text) and Glob("*" + text).fits("x" + text) and Glob(text, anywhere=True).fits(f"x{text}x")
    assert not Glob(text).fits("a" if text != "a" else "b")


def test_hostile_patterns_take_no_time(dataset):
    start = time.process_time()
    for pattern in ("a*" * 900 + "b", "*" * 1900, "a?" * 900 + "*b", "*a" * 900 + "c", "(a+)+b", "?*" * 900):
        Glob(pattern).fits("a" * 20_000)
    assert time.process_time() - start < 30
    parse_filter("NOT " * 400 + "a")
    parse_filter(" OR ".join(["a"] * 300))
    assert time.process_time() - start < 30


def test_ten_thousand_captions_are_quick(dataset):
    draw = random.Random(0)
    words = [f"word{index}" for index in range(500)]
    picture = GraphPicture(torch.zeros(8, 8, 3))
    samples = [Sample(str(index), picture, ", ".join(draw.sample(words, 20))) for index in range(10_000)]
    start = time.process_time()
    found = select(Dataset("test", (Concept(),), tuple(samples)), "tag:word1? AND NOT (caption:word49* OR tags:<20)")
    assert 500 < len(found) < 9000
    assert time.process_time() - start < 30
