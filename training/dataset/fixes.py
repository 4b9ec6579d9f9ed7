"""Automatic fixes of what the check found: a new dataset with a note for each fix, files and the old one untouched.

- captions: trigger in front, one spelling, implied tags removed, typing mistakes, tags for colourless and poor pictures
- options: mirroring off, alpha_mask on, max_side empty, repeats that balance the concepts
- samples: lesser copies of duplicates and pictures that cannot be decoded left out
- a rule without a fix, or one that does not exist, is an error; fixing twice changes nothing more
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

from .balancing import balanced, table
from .lint_captions import Caption, title
from .lint_knowledge import plain
from .lint_rules import FIXABLE, RULES, Finding, rule_id
from .lint_spelling import BECOMES, respelled
from .lint_tags import STRAY
from .model import Concept, Dataset, DatasetError, ImageOptions, Sample, listed, some
from .tag_text import move_first, rewrite, tags

LOST = "\ufffd"  # what stands for a letter that could not be read; nothing can bring it back
LOW_QUALITY = ("low quality",)
COLOURLESS = ("monochrome", "greyscale")

Details = tuple[str, ...]
CaptionFix = Callable[[Caption, Details, Concept], str]


def apply_fixes(dataset: Dataset, findings: Iterable[Finding], rules: Collection[str]) -> Dataset:
    """The dataset with the fixes of ``rules`` applied to what ``findings`` say; DatasetError for rules without one."""
    wanted = {rule_id(rule) for rule in rules}
    impossible = sorted(wanted - set(FIXABLE))
    if impossible:
        cures = "; ".join(f"{rule}: {RULES[rule].advice}" for rule in impossible)
        raise DatasetError(f"no automatic fix for {cures}. There are fixes for {', '.join(FIXABLE)}")
    found = list(findings)
    for rule in RULES:
        if rule in wanted:
            dataset = _fixed(dataset, rule, [finding for finding in found if finding.rule == rule])
    return dataset


def _fixed(dataset: Dataset, rule: str, findings: list[Finding]) -> Dataset:
    if rule in CAPTION_FIXES:
        fixed, what = _captions(dataset, findings, CAPTION_FIXES[rule])
    elif rule in OPTION_FIXES:
        fixed, what = _options(dataset, findings, OPTION_FIXES[rule])
    elif rule == "B001":
        fixed, what = _balanced(dataset, findings)
    else:
        fixed, what = _without(dataset, findings)
    note = f"{rule} ({RULES[rule].title}): {what or 'nothing changed'}"
    return dataclasses.replace(fixed, notes=(*dict.fromkeys((*dataset.notes, note)),))


# -- captions


def _captions(dataset: Dataset, findings: list[Finding], fix: CaptionFix) -> tuple[Dataset, str]:
    details: dict[str, list[str]] = {}
    for finding in findings:
        parts = finding.details or ((),) * len(finding.ids)
        for identity, part in zip(finding.ids, parts, strict=True):
            details.setdefault(identity, []).extend(part)
    changed: list[str] = []

    def with_fix(sample: Sample) -> Sample:
        if sample.id not in details:
            return sample
        concept = dataset.of(sample)
        caption = fix(Caption(sample, concept.captions), tuple(details[sample.id]), concept)
        if caption == sample.caption:
            return sample
        changed.append(sample.id)
        return dataclasses.replace(sample, caption=caption)

    fixed = dataset.with_samples([with_fix(sample) for sample in dataset.samples])
    return fixed, f"{some(changed, 'caption')} changed ({listed(changed)})" if changed else ""


def _say_something(caption: Caption, _: Details, concept: Concept) -> str:
    clean = STRAY.sub(lambda match: match[0] if match[0] == LOST else "", caption.sample.caption).strip()
    return clean or concept.captions.trigger or concept.name


def _trigger_first(caption: Caption, details: Details, _: Concept) -> str:
    return move_first(caption.sample.caption, details[0], caption.options.separator)


def _outfit_second(caption: Caption, details: Details, _: Concept) -> str:
    trigger, outfit = details[:2]
    separator = caption.options.separator
    written = {caption.name(tag): tag for line in caption.lines for tag in line}
    text = move_first(caption.sample.caption, written.get(outfit, outfit), separator)
    return move_first(text, written[trigger], separator) if trigger in written else text


def _without_implied(caption: Caption, details: Details, _: Concept) -> str:
    return _renamed(caption, dict.fromkeys(details))


def _one_spelling(caption: Caption, details: Details, _: Concept) -> str:
    text = _renamed(caption, _pairs(details))
    return respelled(Caption(dataclasses.replace(caption.sample, caption=text), caption.options))


def _corrected(caption: Caption, details: Details, _: Concept) -> str:
    return _renamed(caption, _pairs(details))


def _pairs(details: Details) -> dict[str, str | None]:
    written = (detail.partition(BECOMES) for detail in details if BECOMES in detail)
    return {name: meant for name, _, meant in written}


def _renamed(caption: Caption, names: dict[str, str | None]) -> str:
    """The caption with tags of these names replaced, or left out where the new one is None."""

    def change(tag: str) -> str | None:
        return names.get(caption.name(tag), tag)

    return rewrite(caption.sample.caption, change, caption.options.separator)


def _adding(*new: str) -> CaptionFix:
    def add(caption: Caption, _: Details, __: Concept) -> str:
        text, separator = caption.sample.caption, caption.options.separator
        missing = [tag for tag in new if tag not in {plain(other) for other in tags(text, separator)}]
        return f"{separator} ".join([*([text.rstrip()] if text.strip() else []), *missing]) if missing else text

    return add


CAPTION_FIXES: dict[str, CaptionFix] = {
    "D031": _adding(*LOW_QUALITY),
    "T001": _say_something,
    "T002": _trigger_first,
    "T004": _outfit_second,
    "T020": _without_implied,
    "T021": _one_spelling,
    "T023": _corrected,
    "T040": _adding(*COLOURLESS),
}


# -- options


def _options(dataset: Dataset, findings: list[Finding], fix: Callable[[Concept], Concept]) -> tuple[Dataset, str]:
    chosen = {finding.concept for finding in findings}
    concepts = [fix(concept) if index in chosen else concept for index, concept in enumerate(dataset.concepts)]
    changed = [title(dataset, i) for i, concept in enumerate(concepts) if concept != dataset.concepts[i]]
    return dataclasses.replace(dataset, concepts=tuple(concepts)), f"changed for {listed(changed)}" if changed else ""


def _images(**options: bool) -> Callable[[Concept], Concept]:
    def change(concept: Concept) -> Concept:
        images: ImageOptions = dataclasses.replace(concept.images, **options)  # type: ignore[arg-type]
        return dataclasses.replace(concept, images=images)

    return change


def _without_max_side(concept: Concept) -> Concept:
    return dataclasses.replace(concept, buckets=dataclasses.replace(concept.buckets, max_side=None))


OPTION_FIXES: dict[str, Callable[[Concept], Concept]] = {
    "A001": _images(flip=False),
    "D010": _images(alpha_mask=True),
    "D023": _without_max_side,
}


def _balanced(dataset: Dataset, findings: list[Finding]) -> tuple[Dataset, str]:
    fixed = balanced(dataset, "presentations") if findings else dataset
    if fixed.concepts == dataset.concepts:
        return dataset, ""
    rows = [(index, row) for index, row in enumerate(table(fixed)) if row.kind == "training" and row.images]
    return fixed, "repeats " + ", ".join(f"{title(dataset, index)} {float(row.repeats):.4g}" for index, row in rows)


# -- samples


def _without(dataset: Dataset, findings: list[Finding]) -> tuple[Dataset, str]:
    """Without the lesser copies (D030, warnings) or the pictures that cannot be decoded (D011, errors)."""
    gone = {identity for finding in findings if finding.level in ("warn", "error") for identity in finding.ids}
    gone &= {sample.id for sample in dataset.samples}
    if not gone:
        return dataset, ""
    rest = [sample for sample in dataset.samples if sample.id not in gone]
    if not rest:
        raise DatasetError(f"{dataset.source}: the fix would leave out all images; replace the files instead")
    return dataset.with_samples(rest), f"left out {some(gone, 'image')} ({listed(sorted(gone))}); files stay"
