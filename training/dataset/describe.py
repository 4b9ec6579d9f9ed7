"""What a dataset holds, in a few lines for the user.

- images and resolutions; buckets with the number of images in each
- captions: how many, how long
- each concept that is not the only one: kind, images, presentations per epoch
- options that differ from the defaults, so that a report alone tells how a dataset is used
- the notes, and options that none of the images or captions has any use for
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from .balancing import table, table_lines
from .batches import BatchPlan, place_all
from .captions import notes as caption_notes
from .captions import tags
from .model import KINDS, BucketOptions, CaptionOptions, Concept, Dataset, ImageOptions, Sample, listed, some

LISTED_BUCKETS = 12
WITHOUT_OPTION = {"name", "kind", "resolutions", "repeats", "group", "buckets", "captions", "images"}


def describe(dataset: Dataset, batch_size: int = 1) -> str:
    """The report of a dataset as text; with the trainer's batch size, batches are part of it."""
    lines = [_counts(dataset), *_buckets(dataset, batch_size), *_captions(dataset)]
    if len(dataset.concepts) > 1:
        lines += table_lines(dataset)
    said = notes(dataset)
    if sum(row.presentations for row in table(dataset) if row.kind == "training") >= 1:  # else for others to join
        plan = BatchPlan(dataset, batch_size, 0)
        lines += _epoch(plan)
        said += plan.notes() if batch_size > 1 else []
    return "\n".join([*lines, *(f"options: {line}" for line in options(dataset)), *(f"note: {note}" for note in said)])


def notes(dataset: Dataset) -> list[str]:
    """What was left out or changed on the way, and options that none of the images or captions has any use for."""
    return [*dataset.notes, *caption_notes(dataset), *_image_notes(dataset)]


def options(dataset: Dataset) -> list[str]:
    """The options of each concept that differ from the defaults; nothing for a concept of defaults only."""
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
            lines.append(f"{name}{', '.join(changed)}")
    return lines


def _counts(dataset: Dataset) -> str:
    kinds = {kind: len(dataset.members(kind)) for kind in KINDS}
    used = {kind: count for kind, count in kinds.items() if count}
    parts = "" if set(used) <= {"training"} else f" ({', '.join(f'{count} {kind}' for kind, count in used.items())})"
    sizes = dict.fromkeys(size for concept in dataset.concepts for size in concept.resolutions)
    shown = [f"{width}" if width == height else f"{width}×{height}" for width, height in sizes]
    return f"{some(dataset.samples, 'image')}{parts} at resolution{'s' * (len(shown) > 1)} {listed(shown)}"


def _buckets(dataset: Dataset, batch_size: int) -> list[str]:
    counts = Counter(item.bucket for item in place_all(dataset, batch_size))
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


def _image_notes(dataset: Dataset) -> list[str]:
    """Options of buckets and images that another one switches off, or that no picture of their concept has use for."""
    notes = []
    for index, concept in enumerate(dataset.concepts):
        samples = [sample for sample in dataset.samples if sample.concept == index]
        name = f"{concept.name}: " if concept.name else ""
        notes += [name + note for note in _idle(concept, samples)] if samples else []
    return list(dict.fromkeys(notes))


def _idle(concept: Concept, samples: Sequence[Sample]) -> Iterator[str]:
    options, buckets = concept.images, concept.buckets
    if concept.kind == "validation" and (concept.repeats != 1 or concept.samples_per_epoch):
        yield "repeats and samples_per_epoch without effect: validation images are never trained on"
    if not buckets.enabled:
        usual = BucketOptions(enabled=False, step=buckets.step)
        names = [field.name for field in dataclasses.fields(usual)]
        idle = [name for name in names if getattr(buckets, name) != getattr(usual, name)]
        if idle:
            yield f"{' and '.join(idle)} without effect: bucketing is off"
    if options.flip and options.variations == 1:
        yield "flip with variations 1: half of the images are only ever shown mirrored; set variations to 0 or 2"
    if options.focused and not any(sample.focus for sample in samples):
        asked = " and ".join(["crop focus"] * (options.crop == "focus") + ["zoom"] * (options.zoom is not None))
        yield (
            f"{asked} without effect, no image has a focus box: write it behind the name in pixels, "
            "name_x_y_width_height.png, x and y being its centre"
        )
    transparent = any(sample.picture.transparent for sample in samples)
    if options.alpha_mask and not transparent:
        yield "alpha_mask has no effect: no image is transparent"
    if not any(sample.mask for sample in samples) and not (options.alpha_mask and transparent):
        idle = [name for name in ("mask_floor", "invert_mask") if getattr(options, name)]
        if idle:
            yield f"{' and '.join(idle)} without effect: no image has a mask"


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
