"""What the editor's page is told of a dataset, as plain values for JSON: pure functions, ids instead of paths.

- ``image_id``: what the page calls an image by; nothing about the disk can be learned from it or asked with it
- ``row``, ``detail``: an image in the grid, and all there is to say of one
- ``TagTable``: every tag with the number of images that have it; ``selected``: what a selection has in common
- ``finding``: what the check found, with the line of an edit program that cures it
- ``crop_boxes``: which part of each image is trained, for every resolution
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..training.dataset.batches import place_all
from ..training.dataset.captions import shown
from ..training.dataset.draws import Draws
from ..training.dataset.fix_edits import FIXES
from ..training.dataset.lint_rules import LEVELS, RULES, Finding
from ..training.dataset.model import Dataset, FilePicture, Sample
from ..training.dataset.tag_text import name_of, tags
from .completion import Completion
from .guard import without_places

ID_LENGTH = 20  # hexadecimal digits: no two of a million images share one by chance
LONGEST_SHOWN = 4000  # characters of a caption in a row; an image's detail has all of it
Findings = Mapping[str, Sequence[Finding]]  # by sample


def image_id(sample: str) -> str:
    return hashlib.sha256(sample.encode()).hexdigest()[:ID_LENGTH]


def row(dataset: Dataset, sample: Sample, changed: bool, findings: Findings | None) -> dict[str, Any]:
    """``findings`` is None while the dataset has not been checked; then nothing is said about them."""
    concept = dataset.of(sample)
    caption = sample.caption[:LONGEST_SHOWN]
    found = None if findings is None else findings.get(sample.id, ())
    return {
        "id": image_id(sample.id),
        "name": sample.id,
        "size": list(sample.size),
        "version": _version(sample),
        "caption": caption,
        "tags": tags(caption, concept.captions.separator),
        "cut": len(sample.caption) > LONGEST_SHOWN,
        "changed": changed,
        "concept": sample.concept,
        "mask": sample.mask is not None,
        "transparent": sample.picture.transparent,
        "focus": list(sample.focus) if sample.focus else None,
        "findings": None if found is None else len(found),
        "level": min((finding.level for finding in found), key=LEVELS.index) if found else None,
    }


def _version(sample: Sample) -> str:
    """For the address of a thumbnail: another one for another file."""
    picture = sample.picture
    return f"{picture.mtime_ns:x}-{picture.size:x}" if isinstance(picture, FilePicture) else ""


def detail(
    dataset: Dataset, sample: Sample, before: Sample, changed: bool, findings: Findings | None, boxes: Sequence[Any]
) -> dict[str, Any]:
    """An image with its whole caption, as it is, as it was read, and as training shows it."""
    found = None if findings is None else findings.get(sample.id, ())
    concept = dataset.of(sample)
    still = dataclasses.replace(concept.captions.still, weighted=True)  # brackets as they are written
    return {
        **row(dataset, sample, changed, findings),
        "caption": sample.caption,
        "tags": tags(sample.caption, concept.captions.separator),
        "cut": False,
        "before": before.caption,
        "shown": shown(sample.caption, still, Draws("editor", sample.id)).strip(),
        "crops": list(boxes),
        "cures": None if found is None else [finding(each, {sample.id: image_id(sample.id)}) for each in found],
    }


def concepts(dataset: Dataset) -> list[dict[str, Any]]:
    counts = Counter(sample.concept for sample in dataset.samples)
    return [
        {
            "name": concept.name,
            "kind": concept.kind,
            "images": counts[index],
            "trigger": concept.captions.trigger,
            "separator": concept.captions.separator,
            "lines": concept.captions.lines,
            "focused": concept.images.focused,
        }
        for index, concept in enumerate(dataset.concepts)
    ]


def crop_boxes(dataset: Dataset) -> dict[str, list[dict[str, Any]]]:
    """By sample: bucket, and the part of the upright picture (left, top, right, bottom, 0 to 1) that it shows.

    Where crops are drawn at random it is the one in the middle, or around the focus.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for item in place_all(dataset):
        (width, height), (left, top), (across, down) = item.resized, item.crop, item.bucket
        box = (left / width, top / height, (left + across) / width, (top + down) / height)
        found.setdefault(dataset.samples[item.sample].id, []).append(
            {"bucket": list(item.bucket), "box": [round(side, 5) for side in box]}
        )
    return found


# -- tags


class TagTable:
    """Tags by what makes two the same, each as it is mostly written, with the number of images; most frequent first."""

    def __init__(self, dataset: Dataset, samples: Iterable[Sample] | None = None) -> None:
        names: dict[str, str] = {}  # as written: what makes it the same as others
        written: dict[str, Counter[str]] = {}
        for sample in dataset.samples if samples is None else samples:
            seen = set()
            for tag in tags(sample.caption, dataset.of(sample).captions.separator):
                name = names.get(tag)
                if name is None:
                    name = names[tag] = name_of(tag)
                if name not in seen:
                    seen.add(name)
                    written.setdefault(name, Counter())[tag] += 1
        rows = [(name, max(spelt, key=lambda tag: spelt[tag]), spelt.total()) for name, spelt in written.items()]
        self.rows = sorted(rows, key=lambda found: (-found[2], found[0]))

    def find(self, part: str, most: int) -> list[Completion]:
        """Tags with ``part`` in them."""
        fitting = (Completion(tag, count) for name, tag, count in self.rows if part in name or part in tag.lower())
        return [found for found, _ in zip(fitting, range(most), strict=False)]

    def as_json(self) -> list[list[Any]]:
        return [[tag, count] for _, tag, count in self.rows]


def selected(dataset: Dataset, samples: Collection[Sample]) -> dict[str, Any]:
    """Tags that all of the images have, and those that some have, with how many."""
    rows = TagTable(dataset, samples).rows
    return {
        "images": len(samples),
        "common": [tag for _, tag, count in rows if count == len(samples)],
        "partial": [[tag, count] for _, tag, count in rows if count < len(samples)],
    }


# -- findings


def by_sample(findings: Iterable[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for each in findings:
        for name in each.ids:
            found.setdefault(name, []).append(each)
    return found


def finding(found: Finding, ids: Mapping[str, str]) -> dict[str, Any]:
    """``ids``: by sample, the images to be named; details stand beside them."""
    details = dict(zip(found.ids, found.details, strict=False))
    images = [(ids[name], list(details.get(name, ()))) for name in found.ids if name in ids]
    return {
        "rule": found.rule,
        "title": RULES[found.rule].title,
        "level": found.level,
        "message": without_places(found.message),
        "cure": without_places(found.fix or ""),
        "line": f"fix {found.rule}" if found.rule in FIXES else None,
        "concept": found.concept,
        "images": [image for image, _ in images],
        "details": [part for _, part in images],
    }
