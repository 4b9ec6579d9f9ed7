"""Lines of the embeddings option, and how words begin."""

import pytest
import torch

from lora_loom.training.embeddings import Word, begun_as, check_used, keep_length, parse, pattern
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ComponentSettings


def test_lines_are_words():
    assert parse("\n my_cat: 4 fluffy cat\n\n_dog-2:1 a, (very) big dog \n") == [
        Word("my_cat", 4, "fluffy cat"),
        Word("_dog-2", 1, "a, (very) big dog"),
    ]
    assert parse("  \n") == []


@pytest.mark.parametrize(
    ("lines", "told"),
    (
        ("my_cat 4 cat", "line 1: 'my_cat 4 cat', expected a line such as"),
        ("a_b: 2 cat\nmy_cat: four cat", "line 2: 'my_cat: four cat', expected a line such as"),
        ("my_cat: 4", "expected a line such as"),
        ("my cat: 4 cat", "expected a line such as"),
        ("<cat>: 4 cat", "expected a word of letters"),
        ("9cat: 4 cat", "begins with a letter"),
        ("my_cat: 0 cat", "expected 1 to 64 vectors"),
        ("my_cat: 65 cat", "expected 1 to 64 vectors"),
        ("my_cat: 4 cat\nmy_cat: 2 dog", "line 2: 'my_cat: 2 dog', expected another word"),
    ),
)
def test_lines_at_fault_are_named_where_they_are_written(lines, told):
    with pytest.raises(OptionError, match=told):
        ComponentSettings(embeddings=lines)


@pytest.mark.parametrize(("count", "rows"), ((1, ["012"]), (2, ["01", "2"]), (3, ["0", "1", "2"]), (5, list("01201"))))
def test_words_begin_as_the_text_repeated_or_averaged(count, rows):
    tokens = torch.randn(3, 7)
    wanted = torch.stack([torch.stack([tokens[int(i)] for i in row]).mean(0) for row in rows])
    got = begun_as(tokens, count)
    assert torch.allclose(got, wanted) and got.data_ptr() != tokens.data_ptr()


def test_vectors_keep_the_length_they_are_told():
    vectors = torch.randn(3, 5)
    turned = vectors / vectors.norm(dim=-1, keepdim=True)
    keep_length(vectors, 0.37)
    assert torch.allclose(vectors, 0.37 * turned)


def test_whole_words_are_found_and_nothing_else():
    found = pattern(["cat", "cat-2", "a_cat"])
    text = "cat, a_cat cat-2 concat cats my-cat embedding:cat (cat:1.2) a_cat2"
    assert [hit[0] for hit in found.finditer(text)] == ["cat", "a_cat", "cat-2", "embedding:cat", "cat"]
    assert found.findall(text) == ["cat", "a_cat", "cat-2", "cat", "cat"]


def test_a_word_called_embedding_leaves_other_embeddings_alone():
    """So files are read whose vectors have no name."""
    text = "embedding, embedding:other embedding:embedding (embedding:1.2) embedding:cat"
    hits = [hit[0] for hit in pattern(["embedding", "cat"]).finditer(text)]
    assert hits == ["embedding", "embedding:embedding", "embedding", "embedding:cat"]


def test_a_word_that_no_caption_shows_is_refused():
    words = parse("my_cat: 1 cat\nmy_dog: 1 dog")
    check_used(words, ["my_dogs", "a my_dog", "my_cat", "never looked at"])
    with pytest.raises(OptionError, match="no caption shows the word 'my_dog'"):
        check_used(words, ["my_dogs", "a my_cat, and my cat"])
