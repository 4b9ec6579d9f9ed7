"""What several LoRA files must have in common to become one, and what they bring besides adapters.

* ``common_names``: the model whose paths they are read by; or none, where all of them keep the names of one dialect.
* ``architecture``: the base model they are for.
* ``carried``: their embeddings; words that mean different things in two files get another name.

Files come with what they are called in messages.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..architectures import in_text_encoder, same_base
from ..names import NameTable
from ..reading import LoRAFile

_NUMBER = re.compile(r"\d")
Named = tuple[LoRAFile, str]
Embeddings = dict[str, dict[str, Tensor]]


def common_names(files: Sequence[Named]) -> NameTable | None:
    """Raises ValueError where the same layer may be called otherwise in two of them."""
    (first, called), *others = files
    known = _kinds(first)
    for file, name in others:
        if (file.names is None) != (first.names is None):
            raise ValueError(_cure(called, name))
        if file.names is not None and first.names is not None:
            if file.names.shapes != first.names.shapes:
                raise ValueError(f"{called} and {name} were read for different models; read both for the same one")
            continue
        for part, kinds in _kinds(file).items():
            if known.setdefault(part, kinds).isdisjoint(kinds):
                raise ValueError(_cure(called, name))
            known[part] |= kinds
    return first.names


def _cure(one: str, other: str) -> str:
    return (
        f"{one} and {other} call their layers differently, or have none alike; give the model (its names make files of "
        "different dialects meet)"
    )


def _kinds(file: LoRAFile) -> dict[bool, set[str]]:
    """What names begin with, up to a number, of text encoders and of the rest: enough to tell dialects apart."""
    found: dict[bool, set[str]] = {}
    for path in file.adapters:
        found.setdefault(in_text_encoder(path), set()).add(_NUMBER.split(path, maxsplit=1)[0])
    return found


def architecture(files: Sequence[Named]) -> tuple[str | None, str]:
    """(what they are made for, what that rests on). Raises ValueError for different ones that no model has placed."""
    known = [(file, name) for file, name in files if file.architecture]
    if not known:
        return None, ""
    (first, called), *others = known
    for file, name in others:
        alike = same_base(file.architecture, first.architecture) or same_base(first.architecture, file.architecture)
        if first.names is None and not alike:
            bases = f"{called} is for {first.architecture} ({first.evidence}), {name} for {file.architecture}"
            raise ValueError(f"{bases} ({file.evidence}); merge LoRAs of one base model")
    return first.architecture, first.evidence


def carried(files: Sequence[Named]) -> tuple[Embeddings, list[str]]:
    """(word -> encoder -> vectors of all of them, what there is to say)."""
    found: Embeddings = {}
    notes = []
    for file, called in files:
        for word, vectors in file.embeddings.items():
            if word in found and not _equal(found[word], vectors):
                other = next(name for n in itertools.count(2) if (name := f"{word}_{n}") not in found)
                notes.append(f"the word {word!r} of {called} means something else in another file: it is {other!r} now")
                word = other
            found[word] = dict(vectors)
    return found, notes


def _equal(some: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)
