"""Rules about numbers, file headers, buckets, repeats and the schedule: everything that needs neither pixels nor words.

A picture trained at several resolutions is judged by the one that asks most of it. Validation pictures count for files
and buckets only.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any

from .balancing import table
from .batches import BatchPlan, Item
from .buckets import kept_part
from .lint_captions import title
from .lint_rules import Finding, Limits, finding
from .model import Dataset, FilePicture, GraphPicture, listed, some

PLACED_RULES = ("D021", "D022")  # that ask which buckets pictures are placed in
COMPLEX = ("WEBP", "AVIF", "GIF")  # formats that other trainers may not read


def plan_findings(
    dataset: Dataset, limits: Limits, items: tuple[Item, ...], batch_size: int, style: bool, opaque: Mapping[str, bool]
) -> Iterator[Finding]:
    """Findings from headers and plan; ``opaque`` tells of pictures whose transparency has been looked at."""
    if limits.on("D001", "D002", "D003"):
        yield from _numbers(dataset, limits, style)
    if limits.on("D010", "D011", "D012", "D020", "D031"):
        yield from _files(dataset, limits, opaque)
    if limits.on(*PLACED_RULES):
        yield from _sizes(dataset, limits, items)
    if limits.on("D023"):
        yield from _buckets_cut(dataset, limits)
    if limits.on("B001", "B002", "B003"):
        yield from _balance(dataset, limits, batch_size)
    if limits.on("R001"):
        yield from _schedule(dataset, limits, batch_size, style)


def members(dataset: Dataset, kind: str = "training") -> dict[int, list[str]]:
    """Ids of the samples of each concept of a kind that has any."""
    found: dict[int, list[str]] = defaultdict(list)
    for index in dataset.members(kind):
        found[dataset.samples[index].concept].append(dataset.samples[index].id)
    return dict(found)


def _numbers(dataset: Dataset, limits: Limits, style: bool) -> Iterator[Finding]:
    for index, ids in members(dataset).items():
        facts: dict[str, Any] = {"concept": index, "where": title(dataset, index)}
        if style:
            low, high = limits.of("D003", "low"), limits.of("D003", "high")
            if not low <= len(ids) <= high:
                yield finding("D003", "warn", ids, **facts, low=low, high=high)
            continue
        level = next((name for name in ("error", "warn", "info") if len(ids) < limits.of("D001", name)), None)
        if level:
            yield finding("D001", level, ids, **facts, limit=limits.of("D001", level))
        if len(ids) > limits.of("D002"):
            yield finding("D002", "info", ids, **facts, limit=limits.of("D002"))


# -- files


def _files(dataset: Dataset, limits: Limits, opaque: Mapping[str, bool]) -> Iterator[Finding]:
    transparent: dict[int, list[str]] = defaultdict(list)
    kinds: Counter[str] = Counter()
    odd: list[str] = []
    sideways: list[str] = []
    large, compressed = {}, {}
    for sample in dataset.samples:
        images, picture = dataset.of(sample).images, sample.picture
        if not images.alpha_mask and not opaque.get(sample.id, not _may_be_transparent(picture)):
            transparent[sample.concept].append(sample.id)
        if max(sample.size) > limits.of("D020"):
            large[sample.id] = max(sample.size)
        if not isinstance(picture, FilePicture):
            continue
        header = picture.header
        what = [header.format] if header.format in COMPLEX else []
        what += ["CMYK"] * (header.mode == "CMYK") + [f"{header.bits} bits per channel"] * (header.bits > 8)
        what += ["palette"] * (header.mode == "P" and header.format != "GIF")
        what += ["animated: its first frame is used"] * header.animated
        kinds.update(what)
        odd += [sample.id] * bool(what)
        sideways += [sample.id] * (header.orientation != 1)
        if header.jpeg_quality is not None and header.jpeg_quality < limits.of("D031", "quality"):
            compressed[sample.id] = header.jpeg_quality
    for index, ids in transparent.items():
        yield finding("D010", "warn", ids, concept=index, background=dataset.concepts[index].images.background)
    if odd:
        named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        yield finding("D011", "info", odd, automatic=False, what=f"converted when read: {named}")
    if sideways:
        yield finding("D012", "info", sideways)
    if large:
        worst = max(large, key=lambda identity: large[identity])
        yield finding("D020", "info", large, limit=limits.of("D020"), worst=large[worst], worst_id=worst)
    if compressed:
        worst = min(compressed, key=lambda identity: compressed[identity])
        below = f"{limits.of('D031', 'quality'):g} (down to {compressed[worst]}, {worst})"
        yield finding("D031", "info", compressed, what=f"saved at a JPEG quality below {below}")


def _may_be_transparent(picture: FilePicture | GraphPicture) -> bool:
    if isinstance(picture, FilePicture):
        return picture.header.transparent
    return picture.pixels.shape[2] == 4 and bool((picture.pixels[..., 3] < 1).any())


# -- buckets


def _sizes(dataset: Dataset, limits: Limits, items: tuple[Item, ...]) -> Iterator[Finding]:
    scales: dict[str, float] = {}
    lost: dict[str, float] = {}
    for item in items:
        sample = dataset.samples[item.sample]
        scale = max(item.resized[side] / sample.size[side] for side in (0, 1))
        scales[sample.id] = max(scale, scales.get(sample.id, 0))
        # compared as it is told: nothing is "more than 10% (up to 10%)", as every 3:2 photograph would be
        part = round(float(1 - kept_part(sample.size, item.bucket)), 2)
        lost[sample.id] = max(part, lost.get(sample.id, 0))
    error, warn = limits.of("D021", "error"), limits.of("D021", "warn")
    for level, above, upto in (("error", error, math.inf), ("warn", warn, error)):
        found = {identity: scale for identity, scale in scales.items() if above < scale <= upto}
        if found:
            worst = max(found, key=lambda identity: found[identity])
            yield finding("D021", level, found, limit=above, worst=found[worst], worst_id=worst)
    aspects = {s.id: max(s.size) / min(s.size) for s in dataset.samples}
    for index, concept in enumerate(dataset.concepts):
        widest = concept.buckets.max_aspect if concept.buckets.enabled else math.inf
        ids = [s.id for s in dataset.samples if s.concept == index and s.id in lost]
        cut = {i: lost[i] for i in ids if lost[i] > limits.of("D022") or aspects[i] > widest}
        if cut:
            worst = max(cut, key=lambda identity: cut[identity])
            yield finding("D022", "warn", cut, limit=limits.of("D022"), worst=cut[worst], worst_id=worst,
                          aspect=concept.buckets.max_aspect)  # fmt: skip


def _buckets_cut(dataset: Dataset, limits: Limits) -> Iterator[Finding]:
    for index in members(dataset):
        concept = dataset.concepts[index]
        resolution = max(math.sqrt(width * height) for width, height in concept.resolutions)
        longest, limit = concept.buckets.max_side, limits.of("D023")
        if concept.buckets.enabled and longest is not None and longest < limit * resolution:
            yield finding("D023", "warn", concept=index, where=title(dataset, index), value=longest, limit=limit,
                          resolution=resolution)  # fmt: skip


# -- repeats


def _balance(dataset: Dataset, limits: Limits, batch_size: int) -> Iterator[Finding]:
    rows = {index: row for index, row in enumerate(table(dataset)) if row.kind == "training" and row.images}
    if len(rows) < 2:
        return
    most, least = (pick(rows, key=lambda index: rows[index].presentations) for pick in (max, min))
    ratio = rows[most].presentations / rows[least].presentations
    if ratio > limits.of("B001"):
        shown = listed(f"{title(dataset, index)} {number(row.presentations)}" for index, row in rows.items())
        yield finding("B001", "warn", high=title(dataset, most), low=title(dataset, least), worst=float(ratio),
                      limit=limits.of("B001"), what=shown)  # fmt: skip
    groups, few, limit = members(dataset), limits.of("B002", "images"), limits.of("B002", "ratio")
    fewest = min(row.repeats for row in rows.values())
    for index, row in rows.items():
        what = []
        if row.images < few:
            what.append(f"has {some(groups[index], 'image')}, fewer than {few:g}, beside larger concepts")
        if row.repeats > limit * fewest:
            what.append(f"shows each image {float(row.repeats / fewest):.3g} times as often as others (over {limit:g})")
        if what:
            where = title(dataset, index)
            yield finding("B002", "warn", groups[index], concept=index, where=where, what=" and ".join(what))
    largest = max((dataset.concepts[index].batch_size or batch_size for index in rows), default=batch_size)
    if largest > limits.of("B003"):
        yield finding("B003", "info", value=largest, number=len(rows), limit=limits.of("B003"))


def number(value: Fraction) -> str:
    return f"{float(value):.4g}"


def _schedule(dataset: Dataset, limits: Limits, batch_size: int, style: bool) -> Iterator[Finding]:
    rows = [row for row in table(dataset) if row.kind == "training" and row.images]
    if sum(row.presentations for row in rows) < 1:
        return  # nothing to plan
    limit = limits.of("R001", "style" if style else "presentations")
    each = sum(row.presentations for row in rows) / sum(row.images for row in rows)
    epochs = max(1, round(Fraction(limit) / each))
    plan = BatchPlan(dataset, batch_size, 0)
    total = plan.batches_in(epochs)
    yield finding("R001", "info", limit=limit, epochs=epochs, steps=number(Fraction(total, epochs)), batch=batch_size,
                  total=total)  # fmt: skip
