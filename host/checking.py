"""Checking a dataset in the host: with progress on the node, cancellable, tokens counted by the graph's CLIP."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import comfy.model_management

from ..training.dataset.filters import parse_filter
from ..training.dataset.lint import badge, lint
from ..training.dataset.lint_rules import RULES, Finding
from ..training.dataset.model import Dataset, DatasetError
from .progress import Progress


def stepping(total: int, node_id: str | None) -> Callable[..., None]:
    """To call for each image: moves the node's bar, and ends the node where the user has cancelled."""
    progress = Progress(total, node_id)

    def advance(*_: Any) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        progress.advance()

    return advance


def check(dataset: Dataset, node_id: str | None, *, full: bool, **options: Any) -> list[Finding]:
    """What ``lint`` finds, with progress on the node."""
    return lint(dataset, full=full, progress=stepping(len(dataset.samples), node_id), **options)


def badge_of(findings: Collection[Finding]) -> dict[str, list[str]]:
    """What the page shows on the node: a few words, and ``error``, ``warn`` or ``ok``."""
    levels = {finding.level for finding in findings}
    worst = next((level for level in ("error", "warn") if level in levels), "ok")
    return {"loom_badge": [badge(list(findings)), worst]}


def token_counter(clip: Any) -> Callable[[str], int] | None:
    """How many tokens a text has, for the encoder of the CLIP that makes most of it; None without a CLIP.

    Start, end and padding do not count: they are what an empty text consists of.
    """
    if clip is None:
        return None
    empty = {name: Counter(_ids(chunks[0])) for name, chunks in clip.tokenize("").items()}

    def count(text: str) -> int:
        return max(
            sum((Counter(_ids(chunk)) - empty[name]).total() for chunk in chunks)
            for name, chunks in clip.tokenize(text).items()
        )

    return count


def _ids(chunk: list[Any]) -> list[Any]:
    """Token ids; of a vector from an embedding file, something that is none."""
    return [entry[0] if isinstance(entry[0], int) else id(entry) for entry in chunk]


def findings_for(dataset: Dataset, wanted: str, findings: str, node_id: str | None) -> list[Finding]:
    """The findings a filter speaks of: those given as JSON, else a check as thorough as its rules need."""
    if findings.strip():
        return _parsed(findings)
    rules = parse_filter(wanted).rules
    if not rules:
        return []
    return check(dataset, node_id, full=any(RULES[rule].needs == "pixels" for rule in rules), rules=rules)


def _parsed(text: str) -> list[Finding]:
    try:
        return [
            Finding(**{**entry, "ids": tuple(entry["ids"]), "details": tuple(map(tuple, entry["details"]))})
            for entry in json.loads(text)
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DatasetError("findings: this is not what Check Dataset gives; connect its output findings") from error
