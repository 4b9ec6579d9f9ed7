"""Rules about pixels: duplicates, quality, borders, backgrounds, colour. Each picture is decoded once.

- decoding runs in a few threads, a result is a handful of numbers; ``progress`` is called for each picture and may
  raise to end it all
- large JPEGs are decoded at a fraction of their size that still covers what they are trained at
- damaged pictures are findings, not the end of the check
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from math import ceil

import numpy as np
from PIL import Image

from .batches import Item
from .images import decode
from .lint_captions import CaptionCheck, title
from .lint_rules import Finding, Limits, finding
from .model import Dataset, FilePicture, GraphPicture, Picture, Sample, listed
from .scores import THUMB, Scores, alike, measure, robust_z

PIXEL_RULES = ("D010", "D011", "D024", "D030", "D031", "D032", "T030", "T040")
THREADS = 4
COLOURLESS = ("monochrome", "greyscale", "grayscale", "black and white", "sketch", "lineart", "line art")


def decoded(picture: Picture, scale: float, quality: bool) -> tuple[Image.Image, float]:
    """The upright picture, RGB or RGBA, and the scale from that to what is trained; small without ``quality``."""
    if isinstance(picture, GraphPicture):
        levels = (picture.pixels.detach().cpu().float().clamp(0, 1) * 255).round().byte().numpy()
        image = Image.fromarray(levels if levels.shape[2] > 1 else levels[..., 0])
        return image.convert("RGB") if levels.shape[2] == 1 else image, scale
    enough = scale if quality else 2 * THUMB / min(picture.width, picture.height)
    image = decode(picture.path, (ceil(picture.width * enough), ceil(picture.height * enough)))
    return image, scale * picture.width / image.width


def score(
    dataset: Dataset, items: tuple[Item, ...], quality: bool, progress: Callable[[int, int], None] | None
) -> tuple[dict[str, Scores], dict[str, str]]:
    """Figures of all pictures by id, and why some cannot be decoded."""
    scales: dict[str, float] = {}
    for item in items:
        sample = dataset.samples[item.sample]
        scale = max(item.resized[side] / sample.size[side] for side in (0, 1))
        scales[sample.id] = max(scale, scales.get(sample.id, 0.0))

    def one(sample: Sample) -> Scores:
        return measure(*decoded(sample.picture, scales[sample.id], quality))

    scores: dict[str, Scores] = {}
    faults: dict[str, str] = {}
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        tasks: dict[Future[Scores], str] = {pool.submit(one, sample): sample.id for sample in dataset.samples}
        for count, task in enumerate(as_completed(tasks), 1):
            try:
                scores[tasks[task]] = task.result()
            except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
                faults[tasks[task]] = str(error) or type(error).__name__
            if progress is not None:
                progress(count, len(tasks))
    finally:
        pool.shutdown(cancel_futures=True)
    order = [sample.id for sample in dataset.samples]
    return {i: scores[i] for i in order if i in scores}, {i: faults[i] for i in order if i in faults}


def pixel_findings(check: CaptionCheck, scores: dict[str, Scores], faults: dict[str, str]) -> Iterator[Finding]:
    """Findings about the figures of all pictures."""
    dataset, limits = check.dataset, check.limits
    if faults:
        first = next(iter(faults))
        what = f"that cannot be decoded ({first}: {faults[first]})"
        yield finding("D011", "error", faults, what=what, advice="save them again, or leave them out")
    bordered = {identity: s.border for identity, s in scores.items() if s.border > limits.of("D024")}
    if bordered:
        worst = max(bordered, key=lambda identity: bordered[identity])
        yield finding("D024", "info", bordered, limit=limits.of("D024"), worst=bordered[worst], worst_id=worst)
    if limits.on("D030"):
        yield from _duplicates(dataset, limits, scores)
    yield from _quality(limits, scores)
    yield from _backgrounds(check, scores)
    yield from _colourless(check, scores)


# -- duplicates


def _duplicates(dataset: Dataset, limits: Limits, scores: dict[str, Scores]) -> Iterator[Finding]:
    samples = {sample.id: sample for sample in dataset.samples}
    same, likely = limits.of("D030", "same"), limits.of("D030", "likely")
    pairs = _pairs(scores, int(max(same, likely)))
    pairs = [pair for pair in pairs if not _one_file(dataset, samples[pair[0]], samples[pair[1]])]
    surely = [pair for pair in pairs if pair[2] <= same]
    keepers = _keepers(dataset, [pair[:2] for pair in surely])
    if keepers:
        exact = sum(scores[a].digest == scores[b].digest for a, b, *_ in surely)
        turned = sum(turn > 0 for *_, turn in surely)
        held = sum(_leaks(dataset, samples[a], samples[b]) for a, b, *_ in surely)
        what = f"that repeat another ({exact} exactly, {turned} mirrored or turned"
        what += f", {held} both trained and held back for validation)" if held else ")"
        yield finding("D030", "warn", keepers, details=[(keeper,) for keeper in keepers.values()], what=what,
                      worst=max(bits for *_, bits, _ in surely), limit=same,
                      pairs=listed(f"{identity} = {keeper}" for identity, keeper in keepers.items()))  # fmt: skip
    maybe = [pair for pair in pairs if pair[2] > same and not {pair[0], pair[1]} & keepers.keys()]
    if maybe:
        ids = dict.fromkeys(identity for pair in maybe for identity in pair[:2])
        yield finding("D030", "info", ids, automatic=False, what="that may repeat one another", limit=likely,
                      worst=max(bits for *_, bits, _ in maybe),
                      pairs=listed(f"{a} ≈ {b}" for a, b, *_ in maybe))  # fmt: skip


def _pairs(scores: dict[str, Scores], limit: int) -> list[tuple[str, str, int, int]]:
    """(one id, another, bits apart, orientation) of pictures that look alike."""
    hashed = {identity: figures.hashes for identity, figures in scores.items() if figures.hashes is not None}
    names = list(hashed)
    prints = np.stack(list(hashed.values())) if hashed else np.empty((0, 8, 2), np.uint64)
    found = [(names[a], names[b], bits, turn) for a, b, bits, turn in alike(prints, limit)]
    first: dict[bytes, str] = {}
    for identity, figures in scores.items():
        if figures.hashes is None and first.setdefault(figures.digest, identity) != identity:
            found.append((first[figures.digest], identity, 0, 0))
    return found


def _one_file(dataset: Dataset, one: Sample, other: Sample) -> bool:
    """Whether one file is listed twice, as for training at two resolutions."""
    files = [sample.picture.path for sample in (one, other) if isinstance(sample.picture, FilePicture)]
    return len(files) == 2 and files[0] == files[1] and not _leaks(dataset, one, other)


def _leaks(dataset: Dataset, one: Sample, other: Sample) -> bool:
    return {dataset.of(one).kind, dataset.of(other).kind} == {"training", "validation"}


def _keepers(dataset: Dataset, pairs: list[tuple[str, str]]) -> dict[str, str]:
    """Each picture that repeats a better one, and that one: larger, then less compressed, then earlier."""
    near: dict[str, set[str]] = defaultdict(set)
    for one, other in pairs:
        near[one].add(other)
        near[other].add(one)

    def worth(sample: Sample) -> tuple[bool, int, int]:
        quality = sample.picture.header.jpeg_quality if isinstance(sample.picture, FilePicture) else None
        trained, area = dataset.of(sample).kind == "training", sample.size[0] * sample.size[1]
        return trained, area, 101 if quality is None else quality

    best_first = sorted((s for s in dataset.samples if s.id in near), key=worth, reverse=True)
    kept: dict[str, None] = {}
    keepers = {}
    for sample in best_first:
        keeper = next((identity for identity in kept if identity in near[sample.id]), None)
        if keeper is None:
            kept[sample.id] = None
        else:
            keepers[sample.id] = keeper
    return {sample.id: keepers[sample.id] for sample in dataset.samples if sample.id in keepers}


# -- quality


def _quality(limits: Limits, scores: dict[str, Scores]) -> Iterator[Finding]:
    def limit(name: str) -> float:
        return limits.of("D031", name)

    def z(values: list[float]) -> dict[str, float]:
        return dict(zip(scores, robust_z(np.log(np.array(values) + 1e-3)), strict=True))

    detail = {identity: s.detail for identity, s in scores.items() if s.detail < limit("detail")}
    if detail:
        worst = min(detail, key=lambda identity: detail[identity])
        what = f"soft, or enlarged before (detail down to {detail[worst]:.3f}, {worst}; "
        what += f"below {limit('detail'):g} counts)"
        yield finding("D031", "info", detail, what=what)
    sharpness = {i: value for i, value in z([s.sharpness for s in scores.values()]).items() if value < -limit("z")}
    if sharpness.keys() - detail.keys():
        worst = min(sharpness, key=lambda identity: sharpness[identity])
        what = f"far less sharp than the others (robust z down to {sharpness[worst]:.1f}, {worst}; "
        yield finding("D031", "info", sharpness, what=f"{what}below -{limit('z'):g} counts)")
    blocky = {identity: s.blockiness for identity, s in scores.items() if s.blockiness > limit("blockiness")}
    if blocky:
        worst = max(blocky, key=lambda identity: blocky[identity])
        what = f"strongly compressed (blockiness up to {blocky[worst]:.2f}, {worst}; "
        what += f"above {limit('blockiness'):g} counts)"
        yield finding("D031", "info", blocky, what=what)
    noisy = {
        identity: value
        for identity, value in z([s.noise for s in scores.values()]).items()
        if value > limits.of("D032", "z") and scores[identity].blockiness > limits.of("D032", "blockiness")
    }
    if noisy:
        worst = max(noisy, key=lambda identity: noisy[identity])
        yield finding("D032", "info", noisy, worst=noisy[worst], worst_id=worst, limit=limits.of("D032", "z"))


# -- what captions do not say


def _backgrounds(check: CaptionCheck, scores: dict[str, Scores]) -> Iterator[Finding]:
    limit = check.limits.of("T030")
    for index, captions in check.concepts.items():
        plain: dict[str, list[str]] = defaultdict(list)
        for caption in captions:
            figures = scores.get(caption.sample.id)
            if figures and figures.background and "background" not in caption.sample.caption.lower():
                plain[figures.background].append(caption.sample.id)
        for colour, ids in plain.items():
            share = len(ids) / len(captions)
            if share >= limit and len(ids) > 1:
                yield finding("T030", "warn", ids, concept=index, where=title(check.dataset, index), colour=colour,
                              total=len(captions), share=share, limit=limit)  # fmt: skip


def _colourless(check: CaptionCheck, scores: dict[str, Scores]) -> Iterator[Finding]:
    limit = check.limits.of("T040")
    found = {}
    for caption in (caption for group in check.concepts.values() for caption in group):
        figures, text = scores.get(caption.sample.id), caption.sample.caption.lower().replace("_", " ")
        if figures and figures.saturation < limit and not any(word in text for word in COLOURLESS):
            found[caption.sample.id] = figures.saturation
    if found:
        yield finding("T040", "info", found, worst=max(found.values()), limit=limit)
