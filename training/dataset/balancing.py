"""How often the pictures of each concept are shown, equal shares for concepts of unequal size, and held-back pictures.

- ``rates``: presentations of a picture per epoch, as exact fractions: repeats, samples per epoch, and regularisation
  pictures that are shown as often as the training pictures of their group; ``presentations_per_image``, their mean
- ``balanced``: repeats by which every concept is shown equally often; fractions, so nothing is lost to rounding
- ``table``, ``table_lines``: repeats, presentations and share per concept, for the report
- ``split_validation``: a part of the pictures held back by content, so that no copy of one stays in training
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from fractions import Fraction

from .model import Concept, Dataset, DatasetError, GraphPicture, Picture, Sample, listed, some

BALANCES = {
    "none": "repeats as they are",
    "presentations": "every concept is shown equally often, as often as the one with the most pictures",
}
READ = 1 << 20  # bytes


def rates(dataset: Dataset) -> tuple[Fraction, ...]:
    """Presentations per epoch of each concept's pictures, at each of its resolutions; 0 for validation."""
    counts = Counter(sample.concept for sample in dataset.samples)
    own = [_own_rate(concept, counts[index]) for index, concept in enumerate(dataset.concepts)]

    def shown(kind: str, groups: Collection[int]) -> Fraction:
        concepts = ((i, c) for i, c in enumerate(dataset.concepts) if c.kind == kind and c.group in groups)
        return sum((own[i] * counts[i] * len(c.resolutions) for i, c in concepts), Fraction(0))

    def factor(concept: Concept) -> Fraction:
        if concept.kind != "regularisation":
            return Fraction(concept.kind == "training")
        training = shown("training", followed(dataset, concept.group))
        regularisation = shown("regularisation", {concept.group})
        return training / regularisation if training and regularisation else Fraction(1)

    return tuple(rate * factor(concept) for rate, concept in zip(own, dataset.concepts, strict=True))


def followed(dataset: Dataset, group: int) -> set[int]:
    """Whose training pictures the regularisation of a group keeps up with: its own group's, or those of all groups
    where it has none."""
    groups = {dataset.of(dataset.samples[index]).group for index in dataset.members("training")}
    return {group} if group in groups else groups


def _own_rate(concept: Concept, pictures: int) -> Fraction:
    if concept.samples_per_epoch is None or not pictures:
        return Fraction(concept.repeats)
    return Fraction(concept.samples_per_epoch, pictures)


def presentations_per_image(dataset: Dataset) -> Fraction:
    """How often an epoch shows a training picture, in the mean over the pictures; each resolution counts."""
    rows = [row for row in table(dataset) if row.kind == "training"]
    images = sum(row.images for row in rows)
    return sum((row.presentations for row in rows), Fraction(0)) / images if images else Fraction(0)


def balanced(dataset: Dataset, target: str = "presentations", weights: bool = False) -> Dataset:
    """Training concepts with the repeats X_i = X_max · images_max / images_i, "max" being the one with the most images.

    With ``weights``, the repeats a concept has are its weight: one with 2 is shown twice as often as one with 1,
    however many pictures they have. Images count once for each resolution. Regularisation follows by itself.
    """
    if target not in BALANCES:
        raise DatasetError(f"balance is {target!r}, expected one of {', '.join(BALANCES)}")
    counts = Counter(sample.concept for sample in dataset.samples)
    images = {
        index: counts[index] * len(concept.resolutions)
        for index, concept in enumerate(dataset.concepts)
        if concept.kind == "training" and counts[index]
    }
    if target == "none" or not images:
        return dataset
    given = rates(dataset)
    largest = max(images, key=lambda index: (images[index], -index))

    def repeats(index: int) -> Fraction:
        return given[index if weights else largest] * Fraction(images[largest], images[index])

    concepts = (
        dataclasses.replace(concept, repeats=repeats(index), samples_per_epoch=None) if index in images else concept
        for index, concept in enumerate(dataset.concepts)
    )
    return dataclasses.replace(dataset, concepts=tuple(concepts))


@dataclass(frozen=True)
class Row:
    """One concept in an epoch; fractions are averages over the epochs."""

    name: str
    kind: str
    images: int
    repeats: Fraction  # presentations of each image at each resolution
    presentations: Fraction
    share: Fraction  # of all presentations


def table(dataset: Dataset) -> list[Row]:
    """The concepts in their order."""
    counts, repeats = Counter(sample.concept for sample in dataset.samples), rates(dataset)
    shown = [rate * counts[i] * len(dataset.concepts[i].resolutions) for i, rate in enumerate(repeats)]
    total = sum(shown) or Fraction(1)
    return [
        Row(concept.name, concept.kind, counts[i], repeats[i], shown[i], shown[i] / total)
        for i, concept in enumerate(dataset.concepts)
    ]


def table_lines(dataset: Dataset) -> list[str]:
    """``cats: 50 images × 2 = 100 presentations per epoch (50%)``."""
    return [_line(row, concept) for row, concept in zip(table(dataset), dataset.concepts, strict=True)]


def _line(row: Row, concept: Concept) -> str:
    images = some(range(row.images), "image")
    if row.kind == "validation":
        return f"{row.name or 'images'} (validation): {images}, never trained"
    kind = "" if row.kind == "training" else f" ({row.kind})"
    factors = [images, _decimal(row.repeats)]
    if len(concept.resolutions) > 1:
        factors.append(some(concept.resolutions, "resolution"))
    shown = f"{_decimal(row.presentations)} presentations per epoch ({float(row.share):.0%})"
    return f"{row.name or 'images'}{kind}: {' × '.join(factors)} = {shown}"


def _decimal(value: Fraction) -> str:
    return f"{float(value):.4g}" if value.denominator > 1 else str(value)


# -- held back


def split_validation(dataset: Dataset, part: float, seed: int) -> Dataset:
    """Hold back ``part`` of the pictures of each training concept, in a validation concept of the same options.

    Pictures go in the order of a hash of their content and the seed. Copies stay together, also across concepts, and a
    copy of a regularisation picture is never held back; re-saved copies are the business of the near-duplicate check.
    A concept of two or more pictures gives at least one and never all, as far as copies allow.
    """
    if not 0 <= part < 1:
        raise DatasetError(f"validation part is {part}, expected 0 (none) to below 1, e.g. 0.1")
    training = dataset.members("training")
    counts = Counter(dataset.samples[index].concept for index in training)
    wanted = {i: min(max(math.floor(part * n + 0.5), 1), n - 1) if part else 0 for i, n in counts.items()}
    if not any(wanted.values()):
        return dataset
    copies: dict[str, list[Sample]] = {}
    for index in training:
        sample = dataset.samples[index]
        copies.setdefault(content_of(sample.picture), []).append(sample)
    for index in dataset.members("regularisation"):
        copies.pop(content_of(dataset.samples[index].picture), None)
    order = sorted(copies, key=lambda content: hashlib.sha256(f"{seed} {content}".encode()).digest())

    held: Counter[int] = Counter()
    chosen: set[str] = set()

    def hold_back(content: str, limits: dict[int, int]) -> None:
        concepts = Counter(sample.concept for sample in copies[content])
        if all(held[i] + number <= limits[i] for i, number in concepts.items()):
            held.update(concepts)
            chosen.update(sample.id for sample in copies[content])

    for content in order:
        hold_back(content, wanted)
    for content in sorted(order, key=lambda content: len(copies[content])):  # too many copies for the part asked for
        if all(wanted[sample.concept] and not held[sample.concept] for sample in copies[content]):
            hold_back(content, {i: n - 1 for i, n in counts.items()})
    concepts = (
        dataclasses.replace(concept, validation_split=part, validation_seed=seed) if i in wanted else concept
        for i, concept in enumerate(dataset.concepts)
    )
    noted = dataclasses.replace(dataset, concepts=tuple(concepts))
    return _with_twins(noted, chosen, [i for i in wanted if wanted[i] and not held[i]])


def _with_twins(dataset: Dataset, chosen: set[str], unsplit: list[int]) -> Dataset:
    split = sorted({sample.concept for sample in dataset.samples if sample.id in chosen})
    twin = {concept: len(dataset.concepts) + place for place, concept in enumerate(split)}
    concepts = [
        dataclasses.replace(dataset.concepts[i], kind="validation", repeats=Fraction(1), samples_per_epoch=None)
        for i in split
    ]
    samples = tuple(
        dataclasses.replace(sample, concept=twin[sample.concept]) if sample.id in chosen else sample
        for sample in dataset.samples
    )
    notes = [f"{some(chosen, 'image')} held back for validation"] * bool(chosen)
    if unsplit:
        names = listed(dataset.concepts[i].name or "images" for i in unsplit)
        why = "its pictures are copies of each other or of regularisation"
        notes.append(f"nothing held back for validation of {names}: {why}")
    return dataclasses.replace(
        dataset, concepts=(*dataset.concepts, *concepts), samples=samples, notes=(*dataset.notes, *notes)
    )


def with_still_validation(dataset: Dataset) -> Dataset:
    """The dataset with nothing left to chance in validation: what is compared from one time to the next stays alike."""
    concepts = (
        dataclasses.replace(concept, captions=concept.captions.still, images=concept.images.still)
        if concept.kind == "validation"
        else concept
        for concept in dataset.concepts
    )
    return dataclasses.replace(dataset, concepts=tuple(concepts))


def content_of(picture: Picture) -> str:
    """A hash of the picture's file, or of its pixels where it came out of the graph."""
    if isinstance(picture, GraphPicture):
        return picture.fingerprint
    digest = hashlib.sha256()
    try:
        with open(picture.path, "rb") as file:
            while block := file.read(READ):
                digest.update(block)
    except OSError as error:
        raise DatasetError(f"{picture.path} cannot be read ({error.strerror}): check the file") from error
    return digest.hexdigest()
