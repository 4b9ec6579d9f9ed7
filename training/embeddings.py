"""Words of one's own, trained as vectors (textual inversion): what the lines of the option say, and how words begin.

* ``parse``: "my_cat: 4 fluffy cat" → ``Word("my_cat", 4, "fluffy cat")``.
* ``begun_as``: as many vectors as wanted, from those of the text they begin as.
* ``pattern``: where words stand in a text. ``check_used``: each of them must stand in some caption.
* ``take_over``: go on with the vectors that a file holds. ``keep_length``: vectors as long as they are told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .options import OptionError

LONGEST = 64  # vectors of one word; a prompt of Stable Diffusion has room for 75
_LINE = re.compile(r"(?P<name>[^\s:]+)\s*:\s*(?P<count>\d+)\s+(?P<text>\S.*)")
_NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
_EXAMPLE = "a line such as my_cat: 4 fluffy cat (the word, a colon, how many vectors, the text they begin as)"


@dataclass(frozen=True)
class Word:
    """``count`` vectors called ``name`` in captions and prompts, which begin as ``text``."""

    name: str
    count: int
    text: str


def parse(lines: str) -> list[Word]:
    """The words that the option ``embeddings`` names. Raises OptionError naming the line."""
    words: dict[str, Word] = {}
    for number, line in enumerate(lines.splitlines(), 1):
        if not line.strip():
            continue
        where = f"embeddings, line {number}: {line.strip()!r}"
        found = _LINE.fullmatch(line.strip())
        if found is None:
            raise OptionError(f"{where}, expected {_EXAMPLE}")
        name, count = found["name"], int(found["count"])
        if not _NAME.fullmatch(name):
            raise OptionError(f"{where}, expected a word of letters, digits, - and _ that begins with a letter or _")
        if not 1 <= count <= LONGEST:
            raise OptionError(f"{where}, expected 1 to {LONGEST} vectors")
        if name in words:
            raise OptionError(f"{where}, expected another word: {name} is there already")
        words[name] = Word(name, count, found["text"])
    return list(words.values())


def begun_as(tokens: Tensor, count: int) -> Tensor:
    """(count, width) from the (n, width) vectors of a text: repeated in turn, or averaged where there are more."""
    if count >= len(tokens):
        return tokens[torch.arange(count) % len(tokens)].clone()
    return torch.stack([part.mean(0) for part in tokens.tensor_split(count)])


def take_over(loose: Mapping[str, Tensor], given: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    """Put the vectors ``given`` (word -> encoder -> vectors) into ``loose`` ("word.encoder" -> vectors).

    Returns the names that were taken. Raises OptionError where a word has another number of vectors, or other ones.
    """
    taken = []
    for name, vectors in loose.items():
        word, _, encoder = name.rpartition(".")
        theirs = given.get(word, {}).get(encoder)
        if theirs is None:
            continue
        if theirs.shape != vectors.shape:
            raise OptionError(
                f"start_from holds {len(theirs)} vectors of {theirs.shape[-1]} numbers for {word}, embeddings make "
                f"{len(vectors)} of {vectors.shape[-1]}: set the count of {word} to {len(theirs)}, or start from "
                "another LoRA"
            )
        with torch.no_grad():
            vectors.copy_(theirs)
        taken.append(name)
    return taken


def keep_length(vectors: Tensor, length: float) -> None:
    """Scale each row, in place, to ``length``."""
    with torch.no_grad():
        vectors.mul_(length / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12))


def pattern(names: Iterable[str]) -> re.Pattern[str]:
    """Finds whole words, longer ones first; "embedding:" before them, as the host wants it, belongs to them.

    Before another name it does not make a word "embedding", as files without a name have it.
    """
    alternatives = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<![\w-])(?:embedding:)?(?!(?<!embedding:)embedding:[^\W\d])({alternatives})(?![\w-])")


def check_used(words: Sequence[Word], captions: Iterable[str]) -> None:
    """Raises OptionError for a word that no caption shows: nothing would ever reach its vectors."""
    missing = {word.name for word in words}
    for caption in captions:
        if not missing:
            return
        missing -= set(pattern(missing).findall(caption))
    if missing:
        name = next(word.name for word in words if word.name in missing)
        raise OptionError(
            f"embeddings: no caption shows the word {name!r}, so nothing would train it. Write it into the captions "
            "(the Tag Editor or the trigger of the dataset does it for all of them), or take its line out"
        )
