"""Textual inversion in the host: vectors in the place of words, for each text encoder of a CLIP.

* ``encoders``: the text encoders of a CLIP, in its own order.
* ``begin``: fresh vectors for words of one's own, begun as other words.
* ``with_words``: a clone of a CLIP that knows such words, as "my_cat" and as "embedding:my_cat". Its tokenizer is a
  copy; the CLIP it came from, and the embeddings folder, know nothing of it.

The host's tokenizers give an embedding as one tensor per token. They are handed the vectors themselves, not copies, so
that gradients reach them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..training.embeddings import Word, begun_as, keep_length, pattern
from ..training.options import OptionError

Words = dict[str, dict[str, Tensor]]  # word -> encoder -> (count, width)
_KEPT = "\ue000"  # a character of no meaning
_ROWS = 1 << 14  # of the table of words, looked at together


def encoders(clip: Any) -> dict[str, nn.Module]:
    """name -> text encoder, in the CLIP's own order: CLIP-L, CLIP-G, T5, …"""
    return {name: child for name, child in clip.cond_stage_model.named_children() if hasattr(child, "transformer")}


# -- how words begin


def begin(
    clip: Any, words: Sequence[Word], preserve_norm: bool
) -> tuple[dict[str, Tensor], dict[str, float], list[str]]:
    """("word.encoder" -> vectors, encoder -> length to keep where wanted, notes).

    May move weights. Raises OptionError for words that the CLIP knows already.
    """
    able = {name: encoder for name, encoder in encoders(clip).items() if _tokenizer(clip, name) is not None}
    if not able:
        raise OptionError(
            f"embeddings: no text encoder of this CLIP ({', '.join(encoders(clip))}) takes embeddings; leave it empty"
        )
    for word in words:
        if any(_knows(_tokenizer(clip, name), word.name) for name in able):
            raise OptionError(
                f"embeddings: this CLIP knows an embedding {word.name!r} already, from your embeddings folder or from "
                "a LoRA applied before: choose another word"
            )
    with torch.inference_mode():  # as the host itself loads
        clip.load_model()
    found: dict[str, Tensor] = {}
    lengths: dict[str, float] = {}
    for name, encoder in able.items():
        if preserve_norm:
            lengths[name] = _mean_length(encoder)
        for word in words:
            tokens = _vectors_of(encoder, _tokenizer(clip, name), word)
            found[f"{word.name}.{name}"] = vectors = begun_as(tokens, word.count)
            if preserve_norm:
                keep_length(vectors, lengths[name])
    left = [name for name in encoders(clip) if name not in able]
    notes = [f"embeddings: {', '.join(left)} takes none, and reads the words as they are"] if left else []
    return found, lengths, notes


def _knows(tokenizer: Any, name: str) -> bool:
    if name in getattr(tokenizer, "words", {}):
        return True
    return tokenizer.embedding_directory is not None and tokenizer._try_get_embedding(name)[0] is not None


def _vectors_of(encoder: Any, tokenizer: Any, word: Word) -> Tensor:
    """(n, width) of the text that a word begins as, which may hold embeddings itself."""
    chunks = tokenizer.tokenize_with_weights(word.text, return_word_ids=True)
    tokens = [token for chunk in chunks for token, _, place in chunk if place]  # 0: start, end and padding
    if not tokens:
        raise OptionError(f"embeddings: {word.text!r} of the word {word.name!r} holds no token to begin as")
    rows = [token if isinstance(token, Tensor) else _rows(encoder, [token])[0] for token in tokens]
    return torch.stack([row.to("cpu", torch.float32) for row in rows])


@torch.inference_mode()
def _rows(encoder: Any, ids: Iterable[int]) -> Tensor:
    table = encoder.transformer.get_input_embeddings()
    return table(torch.tensor(list(ids), device=table.weight.device), out_dtype=torch.float32)


def _mean_length(encoder: Any) -> float:
    count = _vocabulary(encoder)
    starts = range(0, count, _ROWS)
    return sum(_rows(encoder, range(at, min(at + _ROWS, count))).norm(dim=-1).sum().item() for at in starts) / count


def _vocabulary(encoder: Any) -> int:
    return encoder.transformer.get_input_embeddings().weight.shape[0]


def _width(encoder: Any) -> int:
    return encoder.transformer.get_input_embeddings().weight.shape[1]


# -- a CLIP that knows them


def with_words(clip: Any, words: Mapping[str, Mapping[str, Tensor]]) -> tuple[Any, list[str]]:
    """(clone of ``clip`` that knows ``words``, "word.encoder" of those that fit none of its encoders)."""
    clone = clip.clone()
    if words:
        clone.tokenizer = copy.copy(clip.tokenizer)
    fitting = encoders(clip)
    unplaced = [f"{word}.{name}" for word, vectors in words.items() for name in vectors if name not in fitting]
    for name, encoder in fitting.items():
        tokenizer, own = _tokenizer(clip, name), {}
        for word, vectors in words.items():
            if name not in vectors:
                continue
            if tokenizer is None or vectors[name].shape[-1] != _width(encoder):
                unplaced.append(f"{word}.{name}")
            else:
                own[word] = vectors[name]
        if own:
            setattr(clone.tokenizer, name, _knowing(tokenizer, own))
    return clone, unplaced


def _tokenizer(clip: Any, encoder: str) -> Any | None:
    """The tokenizer of one encoder, which bears its name; None where it is of another make and takes no embeddings."""
    found = getattr(clip.tokenizer, encoder, None)
    return found if hasattr(found, "_try_get_embedding") else None


def _knowing(tokenizer: Any, words: Mapping[str, Tensor]) -> Any:
    own = copy.copy(tokenizer)
    if not isinstance(tokenizer, _Knowing):
        own.__class__ = type(_Knowing.__name__, (_Knowing, type(tokenizer)), {})
        nowhere = copy.copy(tokenizer)
        nowhere.embedding_directory = []
        own.parts = len(nowhere._try_get_embedding("-"))  # newer hosts also give the name
    own.words = {**getattr(tokenizer, "words", {}), **words}
    if own.embedding_directory is None:
        own.embedding_directory = []  # the host looks for embeddings only where there is a folder of them
    return own


class _Knowing:
    """What a tokenizer with words of its own does otherwise than the host's, whose class stands behind this one.

    A word is replaced by a mark that no prompt syntax touches, which the host then asks for as for any embedding. What
    follows it stays as it is: in the templates of language models line breaks have a meaning.
    """

    words: dict[str, Tensor]
    parts: int
    embedding_identifier: str

    def tokenize_with_weights(self, text: str, *args: Any, **kwargs: Any) -> Any:
        marked = self._marked(text)
        one_piece = kwargs.get("disable_weights", getattr(self, "disable_weights", False))
        if one_piece and marked != text and marked.endswith("\n"):
            marked += _KEPT  # the host cuts line breaks off behind an embedding
        return super().tokenize_with_weights(marked, *args, **kwargs)  # type: ignore[misc]

    def _marked(self, text: str) -> str:
        marks = {word: f"{self.embedding_identifier}loom-{index}" for index, word in enumerate(self.words)}
        pieces: list[str] = []
        at = 0
        for found in pattern(self.words).finditer(text):
            before, after = text[at : found.start()], text[found.end() : found.end() + 1]
            # older hosts take a line break before an embedding away with it
            apart = not (pieces or before) or before.endswith(" " if self.parts == 2 else (" ", "\n"))
            pieces += [before, "" if apart else " ", marks[found[1]], "" if after in ("", " ") else " "]
            at = found.end()
        return "".join((*pieces, text[at:]))

    def _try_get_embedding(self, embedding_name: str) -> tuple:
        mark, _, leftover = embedding_name.removesuffix(_KEPT).partition(" ")
        _, dash, index = mark.partition("loom-")
        if not (dash and index.isdigit() and int(index) < len(self.words)):
            return super()._try_get_embedding(embedding_name.removesuffix(_KEPT))  # type: ignore[misc]
        vectors = list(self.words.values())[int(index)]
        return (vectors, leftover) if self.parts == 2 else (vectors, mark, leftover)
