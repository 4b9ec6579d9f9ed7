"""Has anything changed that a prompt names?

* ``prompt_state``: a text that changes when it has. Asked before every run, on unchecked text.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..kernels.sides import HIGH, LOW, side_by_name
from ..kernels.strengths.tags import names_in
from . import loras

_MOST_FILES = 100  # that the names of a prompt may mean, to look at one by one
_BORDERS = re.compile(r"(?<=[a-zß-öø-ÿ])(?=[A-ZÀ-ÖØ-Þ])|(?<=[A-Z])(?=[A-Z][a-z])")
_PIECE = re.compile(r"[^\W\d_]+|\d+")


def prompt_state(prompt: Any, side: Any = "one") -> str:
    """Changes with the LoRAs that a prompt names, what lies beside them, and presets of block weights; None is a prompt
    that is not known yet. Never raises, and takes little time however many files there are."""
    if prompt is None:
        return loras.state_of(None)
    names = names_in(prompt) if isinstance(prompt, str) else []
    if not names:
        return ""
    try:
        sources = loras.sources()
    except (ValueError, OSError):  # a run's folder that vanishes just now
        sources = []
    meant = _may_mean(names, sources)
    if len(meant) > _MOST_FILES:
        meant = [None]
    found = [(source, loras.state_of(source)) for source in meant]
    if side in (HIGH, LOW):
        found += [(source, side_by_name(source, sources).side) for source in meant if source]
    return hashlib.sha256(repr((found, loras.state_of(""))).encode(errors="replace")).hexdigest()


def _may_mean(names: Sequence[str], sources: Sequence[str]) -> list[str | None]:
    """Those of ``sources`` that ``find_name`` may choose for one of ``names``, at a fraction of its cost.

    Not all of them where they are more than ``_MOST_FILES``.
    """
    every = [(source, unicodedata.normalize("NFC", source).casefold()) for source in sources]
    by_path: dict[str, list[str]] = {}
    by_stem: dict[str, list[str]] = {}
    for source in sources:
        path = _plain(source)
        by_path.setdefault(path, []).append(source)
        by_stem.setdefault(path.rpartition("/")[2], []).append(source)
    holding: dict[str, set[str]] = {}
    found: dict[str | None, None] = {}
    for own in map(_plain, names):
        if same := by_path.get(own) or by_stem.get(own):
            found |= dict.fromkeys(same)
            continue
        pieces = [piece.casefold() for piece in _PIECE.findall(_BORDERS.sub(" ", unicodedata.normalize("NFC", own)))]
        for piece in {*pieces} - holding.keys():
            holding[piece] = {source for source, folded in every if piece in folded}
        near = sorted((holding[piece] for piece in pieces), key=len)
        found |= dict.fromkeys(sorted(near[0].intersection(*near[1:])) if near else sources)
        if len(found) > _MOST_FILES:
            break
    return list(found)


def _plain(name: str) -> str:
    return name.strip().replace("\\", "/").removesuffix(loras.SUFFIX)
