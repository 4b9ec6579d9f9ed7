"""The check of a dataset: what probably spoils training, with the figure measured, the threshold and the cure.

- quick: headers, captions, buckets and repeats; full: pixels too, each picture decoded once
- thresholds and rules as the user sets them (``lint_rules``), tag tables of the user's own (``lint_knowledge``)
- ``rules``: only what these need is looked at, so that asking for one takes a moment with thousands of images
- ``report``: findings as text; ``badge``: how many of which level

Nothing is changed; ``fixes.apply_fixes`` makes a new dataset.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from .batches import place_all
from .lint_captions import CaptionCheck
from .lint_images import PIXEL_RULES, pixel_findings, score
from .lint_knowledge import TagKnowledge
from .lint_plan import PLACED_RULES, plan_findings
from .lint_rules import LEVELS, Finding, Limits, parse_limits
from .lint_spelling import spelling_findings
from .lint_tags import caption_findings
from .model import Dataset, listed, some

PLURALS = {"error": "errors", "warn": "warnings", "info": "notes"}


def lint(
    dataset: Dataset,
    *,
    full: bool = False,
    thresholds: Limits | str | None = None,
    batch_size: int = 1,
    style: bool = False,
    count_tokens: Callable[[str], int] | None = None,
    knowledge: TagKnowledge | None = None,
    progress: Callable[[int, int], None] | None = None,
    rules: Iterable[str] | None = None,
) -> list[Finding]:
    """Findings, the most serious first, of all rules or of some.

    ``progress(done, total)`` is called for each decoded picture and may raise.
    """
    limits = thresholds if isinstance(thresholds, Limits) else parse_limits(thresholds or "")
    limits = limits if rules is None else limits.only(rules)
    check = CaptionCheck(dataset, limits, knowledge or TagKnowledge())
    looked = full and limits.on(*PIXEL_RULES)
    items = place_all(dataset, batch_size) if looked or limits.on(*PLACED_RULES) else ()
    scores, faults = score(dataset, items, limits.on("D031", "D032"), progress) if looked else ({}, {})
    opaque = {identity: figures.opaque for identity, figures in scores.items()}
    findings = [
        *plan_findings(dataset, limits, items, batch_size, style, opaque),
        *(pixel_findings(check, scores, faults) if looked else ()),
        *caption_findings(check, count_tokens),
        *spelling_findings(check),
    ]
    return sorted(
        (found for found in findings if limits.on(found.rule)),
        key=lambda found: (LEVELS.index(found.level), found.rule),
    )


def report(findings: Iterable[Finding]) -> str:
    """One line per finding, its images and its cure below it."""
    lines = []
    for found in findings:
        lines.append(f"{found.level} {found.rule}: {found.message}")
        lines += [f"    {listed(found.ids)}"] * bool(found.ids)
        lines += [f"    → {found.fix}"] * bool(found.fix)
    return "\n".join(lines) or "the check found nothing"


def badge(findings: Iterable[Finding]) -> str:
    """``2 errors, 5 warnings``; notes are counted where there is nothing worse."""
    counts = Counter(found.level for found in findings)
    serious = [level for level in ("error", "warn") if counts[level]]
    named = [some(range(counts[level]), PLURALS[level][:-1]) for level in serious or ["info"] if counts[level]]
    return ", ".join(named) or "no findings"
