"""What a dataset holds, in a few lines for the user.

- images and resolutions; buckets with the number of images in each
- captions: how many, how long
- each concept that is not the only one: kind, images, presentations per epoch
- options that differ from the defaults, so that a report alone tells how a dataset is used
- the notes
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from .balancing import table, table_lines
from .batches import BatchPlan, place
from .captions import notes as caption_notes
from .captions import tags
from .model import KINDS, BucketOptions, CaptionOptions, Concept, Dataset, ImageOptions, listed, some

LISTED_BUCKETS = 12
WITHOUT_OPTION = {"name", "kind", "resolutions", "repeats", "group", "buckets", "captions", "images"}


def describe(dataset: Dataset, batch_size: int = 1) -> str:
    """The report of a dataset as text; with the trainer's batch size, batches are part of it."""
    lines = [_counts(dataset), *_buckets(dataset, batch_size), *_captions(dataset)]
    if len(dataset.concepts) > 1:
        lines += table_lines(dataset)
    notes = [*dataset.notes, *caption_notes(dataset)]
    if sum(row.presentations for row in table(dataset) if row.kind == "training") >= 1:  # else for others to join
        plan = BatchPlan(dataset, batch_size, 0)
        lines += _epoch(plan)
        notes += plan.notes() if batch_size > 1 else []
    return "\n".join([*lines, *_options(dataset), *(f"note: {note}" for note in notes)])


def _counts(dataset: Dataset) -> str:
    kinds = {kind: len(dataset.members(kind)) for kind in KINDS}
    used = {kind: count for kind, count in kinds.items() if count}
    parts = "" if set(used) <= {"training"} else f" ({', '.join(f'{count} {kind}' for kind, count in used.items())})"
    sizes = dict.fromkeys(size for concept in dataset.concepts for size in concept.resolutions)
    shown = [f"{width}" if width == height else f"{width}×{height}" for width, height in sizes]
    return f"{some(dataset.samples, 'image')}{parts} at resolution{'s' * (len(shown) > 1)} {listed(shown)}"


def _buckets(dataset: Dataset, batch_size: int) -> list[str]:
    counts = Counter(item.bucket for item in place(dataset, tuple(KINDS), batch_size))
    sizes = [f"{width}×{height}: {number}" for (width, height), number in counts.most_common()]
    rest = len(sizes) - LISTED_BUCKETS
    more = f" and {rest} more" if rest > 0 else ""
    return [f"{some(sizes, 'bucket')} ({', '.join(sizes[:LISTED_BUCKETS])}{more})"] if sizes else []


def _epoch(plan: BatchPlan) -> list[str]:
    """Only where an epoch is not simply every image once, one at a time."""
    shown, batches = sum(plan.presentations()), len(plan.epoch(0))
    if plan.batch_size == 1 and shown == len(plan.dataset.samples):
        return []
    in_batches = f" in {some(range(batches), 'batch').replace('batchs', 'batches')}" if batches != shown else ""
    return [f"an epoch has {some(range(shown), 'presentation')}{in_batches}"]


def _captions(dataset: Dataset) -> list[str]:
    counts = [len(tags(sample.caption, dataset.of(sample).captions.separator)) for sample in dataset.samples]
    masks = sum(sample.mask is not None for sample in dataset.samples)
    lines = []
    if max(counts, default=0) > 1:
        lines.append(f"captions of {min(counts)} to {max(counts)} tags, {sum(counts) / len(counts):.1f} on average")
    if masks:
        lines.append(f"{some(range(masks), 'mask')}")
    return lines


def _options(dataset: Dataset) -> list[str]:
    lines = []
    for number, concept in enumerate(dataset.concepts, 1):
        changed = [
            *_changed(concept, Concept(), WITHOUT_OPTION),
            *_changed(concept.buckets, BucketOptions(step=concept.buckets.step), set()),
            *_changed(concept.captions, CaptionOptions(), set()),
            *_changed(concept.images, ImageOptions(), set()),
        ]
        if changed:
            name = f"{concept.name or f'concept {number}'}: " if len(dataset.concepts) > 1 else ""
            lines.append(f"options: {name}{', '.join(changed)}")
    return lines


def _changed(options: Any, default: Any, left_out: set[str]) -> list[str]:
    """``name value`` of every option that is not at its default."""
    found = []
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if field.name not in left_out and value != getattr(default, field.name):
            found.append(f"{field.name} {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return " ".join(_shown(part) for part in value)
    return repr(value) if isinstance(value, str) else str(value)
