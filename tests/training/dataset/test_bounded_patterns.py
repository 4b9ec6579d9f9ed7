"""Patterns: what they fit and replace is what Python's own ``re`` says, and none of them takes long."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.bounded_patterns import LARGEST, STEPS, Budget, Pattern, Template
from lora_loom.training.dataset.model import DatasetError


def replaced(pattern, template, text, steps=STEPS):
    read = Pattern(pattern)
    return read.replaced(text, Template(template, read.groups), Budget(steps))


def spans(pattern, text):
    return [marks for marks in Pattern(pattern).spans(text, Budget())]


def python_spans(pattern, text):
    return [
        [edge for group in range(match.re.groups + 1) for edge in match.span(group)]
        for match in re.finditer(pattern, text)
    ]


# ---------------------------------------------------------------- against Python

ATOMS = ["a", "b", "c", ".", "[ab]", "[^a]", r"\w", r"\W", r"\d", " ", r"\b", r"\B", "^", "$", "[]x-]", r"\.", "\n"]


@st.composite
def patterns(draw, depth=3):
    kind = draw(st.sampled_from(["atom", "atom", "row", "choice", "group", "bare", "repeat"] if depth else ["atom"]))
    if kind == "atom":
        return draw(st.sampled_from(ATOMS))
    if kind in ("row", "choice"):
        parts = draw(st.lists(patterns(depth - 1), min_size=1, max_size=3))
        return "".join(parts) if kind == "row" else "(?:" + "|".join(parts) + ")"
    inner = draw(patterns(depth - 1))
    if kind != "repeat":
        return f"({inner})" if kind == "group" else f"(?:{inner})"
    counts = draw(st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}"])) + draw(st.sampled_from(["", "?"]))
    return f"(?:{inner}){counts}" if draw(st.booleans()) else f"({inner}){counts}"


@settings(max_examples=400, deadline=None)
@given(patterns(), st.text("aabbc 1.\n", max_size=12), st.sampled_from(["", "(?i)", "(?m)", "(?s)", "(?ms)"]))
def test_it_finds_what_python_finds(pattern, text, flags):
    try:
        found = spans(flags + pattern, text)
    except DatasetError as error:
        assert "nothing" in str(error), error
        return
    assert found == python_spans(flags + pattern, text)


@pytest.mark.parametrize(
    "pattern, template, text",
    [
        (r"(\w+) hair", r"hair: \1", "long hair, blue  hair, hair"),
        (r"^(\d+)girls?$", r"\1 women", "2girls"),
        (r"(.+) \((.+)\)", r"\2/\1", "miku (vocaloid)"),
        (r"(?i)CAT|dog", r"<\0>", "Cat, DOG, bird"),
        (r"(a)|(b)", r"[\1|\2]", "ab"),
        (r"\s+", " ", "a   b\n\n c"),
        (r"a{2}?b", "x", "aaab"),
        (r"x{,2}y", "-", "xxxyy"),
        ("{", "(", "{a}"),
        ("a{}", "b", "a{}"),
        (r"\x41\u0042", "z", "xAB"),
        (r"(?s)a.b", "", "a\nb"),
        (r"[\]\\-]+", "_", r"a]\-b"),
        ("ä+", "ae", "Bäär"),
        ("(?i)ſ", "s", "S"),
        (r"$\n", "!", "a\n"),
    ],
)
def test_it_replaces_as_python_does(pattern, template, text):
    expected = re.sub(pattern, template.replace(r"\0", r"\g<0>"), text)
    assert replaced(pattern, template, text) == expected


def test_backslashes_and_groups_in_what_replaces():
    assert replaced("a", r"\\1", "xay") == r"x\1y"
    assert replaced("(a)(b)?", r"\2\1", "a") == "a"


# ---------------------------------------------------------------- nothing takes long

CLASSIC = [
    *("(a+)+b", "(a*)*b", "(a|a)+b", "(a|aa)+b", "(.*)*b", "(.*a){20}b", "(a+){2,}b", "((a+)+)+b", "(?:a?){25}a{25}b"),
    *("^(a+)+$", "([a-zA-Z]+)*!", r"(\w+\s?)+$", r"^(([a-z])+.)+[A-Z]([a-z])+$", ".*.*.*.*=", "a*a*a*a*a*a*a*a*a*b"),
    *("(x+x+)+y", r"(\d+)+\$", "(?i)(A|B|C|D|E|a)+Z", r"\s+$|\s+b", "(a|b|ab)*c", "(a?a?a?a?a?)+b", "[^,]*,[^,]*!"),
]


@pytest.mark.parametrize("pattern", CLASSIC)
def test_a_hostile_pattern_ends_soon(pattern):
    """Each is exponential or a high power in a search that goes back; all end in a moment, or say what to do."""
    start = time.process_time()
    for text in ("a" * 5000, "x" * 3000, "ab" * 2000, " " * 3000 + "!", "a, " * 1500, "1" * 3000):
        try:
            spans(pattern, text)
        except DatasetError as error:
            assert re.search("nothing|too many steps|repetition", str(error))
    assert time.process_time() - start < 60


def test_the_budget_counts_all_texts_together():
    budget, pattern = Budget(300_000), Pattern("a.*b|a")  # looks at all of a text for each letter
    pattern.spans("a" * 300, budget)
    with pytest.raises(DatasetError, match="too many steps on these captions; say more exactly"):
        for _ in range(1000):
            pattern.spans("a" * 300, budget)


WORDS = ["long hair", "red_hat", "a cat (sitting)", "2girls", "white background", "looking at viewer"]


@pytest.mark.parametrize(
    "pattern",
    [r"(\w+) word1\b", r"\w+ word1\b", r"\b(\w+) (\w+)\b", r"(.+) \((.+)\)", r"^(.*), (.*)$", r"(?:\w+ )+hat",
     r"(\w+)_(\w+)",
     r"(?i)\b(cat|dog|girl|hair|hat|viewer)s?\b", r"\s+", r"([^,]+), ([^,]+), ", "(a+)+b"],
)  # fmt: skip
def test_captions_of_any_number_are_never_too_much(pattern):
    """Each text brings its share of steps along, with which a pattern without surprises gets by."""
    read, budget, texts = Pattern(pattern), Budget(0), [", ".join(WORDS[at:] * 8) for at in range(6)]
    for _ in range(10):
        for text in texts:
            assert read.replaced(text, Template("<\\0>", read.groups), budget) == re.sub(pattern, r"<\g<0>>", text)
    assert budget.left >= 0


@pytest.mark.parametrize(
    "pattern, text, quick",
    [
        (r"\b(\w+) (\w+)\b", "some words " * 50, True),
        (r"\b(\w+) (\w+)\b", "w" * 300 + " x", False),
        (r"(?i)(cat|dog)s? hat", "cats hat " * 50, True),
        (r"\w+_\w+_\w+", "a_b_c", False),
        ("(a+)+b", "ab", False),
        ("(?:ab){9}", "ab", False),
        (".*,.*,.*=", "a", False),
        (r"a|b\.", "b.", True),
    ],
)
def test_python_searches_only_where_that_is_sure_to_be_quick(pattern, text, quick):
    assert Pattern(pattern).is_quick(text) == quick


@settings(max_examples=300, deadline=None)
@given(patterns(), st.text("aabbc 1.\n", max_size=12), st.sampled_from(["", "(?i)", "(?s)"]))
def test_either_way_replaces_the_same(pattern, text, flags):
    try:
        read = Pattern(flags + pattern)
    except DatasetError:
        return
    template = Template(r"<\0\\>", read.groups)
    expected = re.sub(flags + pattern, r"<\g<0>\\>", text)
    assert read.replaced(text, template, Budget()) == expected
    read._has_quick = False
    assert read.replaced(text, template, Budget()) == expected


@pytest.mark.parametrize(
    "pattern", [*CLASSIC, r"(\w+ ?)?(\w+ ?)?x", r"(?:a|ab|abc){4}c", r"[ab]{2,9}[bc]{2,9}[ac]{2,9}d"]
)
def test_what_is_told_to_be_quick_is(pattern):
    """Of texts made of runs just short of what is allowed, the worst there is for a search that goes back."""
    try:
        read = Pattern(pattern)
    except DatasetError as error:
        assert "nothing" in str(error)
        return
    for run in (24, 64, 256):
        for letters in ("a", "ab", "abc"):
            text = ((letters * run)[:run] + " ") * (6000 // run)
            start = time.process_time()
            if read.is_quick(text):
                read.replaced(text, Template("", read.groups), Budget())
            assert time.process_time() - start < 20


@pytest.mark.parametrize("pattern", ["(a{100}){100}", "a{999999999}", f"a{{{LARGEST}}}", "((((a{9}){9}){9}){9}){9}b"])
def test_what_repeats_too_much_is_refused_at_once(pattern):
    with pytest.raises(DatasetError, match="repeats too much; use smaller counts"):
        Pattern(pattern)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("a(b", r"at character 2: this bracket is not closed; write \("),
        ("a)b", r"at character 2: this bracket closes none; write \)"),
        ("[ab", r"at character 1: this bracket is not closed; write \["),
        ("*a", r"nothing stands in front of * to be repeated; write \*"),
        ("a|{2}", "nothing stands in front of {"),
        ("a**", "a repetition of a repetition"),
        ("a++", "a repetition of a repetition"),
        ("(a*)*b", "what is repeated can be nothing already"),
        (r"\b+a", "what is repeated can be nothing already"),
        ("a*", "it also fits nothing, so anywhere"),
        ("", "it also fits nothing"),
        ("^|$", "it also fits nothing"),
        ("(?=a)b", "looking ahead is not possible"),
        ("(?<!a)b", "looking back is not possible"),
        ("(?P<n>a)", "named groups is not possible"),
        ("(?x)a", "this kind of group is not possible"),
        (r"(a)\1", r"\1 refers back to a group"),
        (r"a\q", "bad escape"),
        ("a\\", "a single backslash"),
        ("[z-a]", "bad character range"),
        ("a{3,2}", "the wrong way round"),
        ("a" * 501, "501 characters, at most 500"),
        ("(" * 25 + "a" + ")" * 25, "more than 20 brackets"),
    ],
)
def test_a_fault_is_named_with_its_cure(pattern, message):
    with pytest.raises(DatasetError, match="^pattern.*" + re.escape(message)):
        Pattern(pattern)


@pytest.mark.parametrize(
    "template, message", [(r"\2", "the pattern has 1 groups"), (r"\g<1>", "only"), ("\\", "only"), (r"\²", "only")]
)
def test_a_fault_in_what_replaces_is_named(template, message):
    with pytest.raises(DatasetError, match=message):
        Template(template, Pattern("(a)").groups)


@settings(max_examples=500, deadline=None)
@given(st.text("ab()[]{}|*+?\\.^$,12wd-", max_size=15))
def test_any_text_is_a_pattern_or_a_named_fault(text):
    try:
        read = Pattern(text)
    except DatasetError as error:
        assert str(error).startswith("pattern ")
    else:
        found = read.spans("ab12 (a) b", Budget())
        assert found == python_spans(text, "ab12 (a) b")
