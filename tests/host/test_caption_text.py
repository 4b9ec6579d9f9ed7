"""Captions as the host's own tokenizers read them: brackets are text, unless the captions are weighted."""

import pytest

import tiny
from lora_loom.training.dataset.captions import shown
from lora_loom.training.dataset.draws import Draws
from lora_loom.training.dataset.model import CaptionOptions
from lora_loom.training.dataset.tag_text import literal

CASES = [  # a caption, and the same without brackets that are there for the parser only
    ("hatsune_miku_(vocaloid)", "hatsune_miku_(vocaloid)"),
    (r"hatsune miku \(vocaloid\)", "hatsune miku (vocaloid)"),
    (r"\(", "("),
    ("((a))", "((a))"),
    (r"a \\ b", r"a \\ b"),
    ("a \\ b", "a \\ b"),
    (r"a \\(b\\)", r"a \(b\)"),
    ("(red hat:1.5), cat", "(red hat:1.5), cat"),
    (":) :( ;( )(", ":) :( ;( )("),
    ("[a] {b} <c>", "[a] {b} <c>"),
    ("cat\\", "cat\\"),
    ("", ""),
]


@pytest.fixture(scope="module")
def clips():
    return tiny.tiny_clip(), tiny.tiny_dual_clip()


def weights(clip, text):
    return {entry[1] for chunks in clip.tokenize(text).values() for chunk in chunks for entry in chunk}


@pytest.mark.parametrize("caption, bare", CASES)
def test_brackets_are_text(clips, caption, bare):
    for clip in clips:
        assert weights(clip, literal(caption)) == {1.0}
        [chunk] = clip.tokenize(literal(caption))["l"]
        # the tokenizer itself, without the host's prompt parser; the rest of the chunk is filled with its end
        begin, *words, end = clip.tokenizer.clip_l.tokenizer(bare)["input_ids"]
        assert [entry[0] for entry in chunk] == [begin, *words] + [end] * (76 - len(words))


def test_weighted_captions_weigh(clips):
    for weighted, expected in ((False, {1.0}), (True, {1.0, 1.5})):
        text = shown("(red hat:1.5), cat", CaptionOptions(weighted=weighted), Draws(0))
        assert weights(clips[0], text) == expected


def test_escaped_twice_is_escaped_once():
    for caption, _ in CASES:
        assert literal(literal(caption)) == literal(caption)
