"""Several datasets as one.

Options stay as they are; group 0 is common to all, every other group stays apart. Ids are unique: those of a dataset
that shares any with an earlier one get its number in front, ``2/cat.png``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .model import Concept, Dataset, FilePicture, Sample, listed, some


def combine(datasets: Sequence[Dataset]) -> Dataset:
    """The concepts, samples and notes of all, in order."""
    concepts: list[Concept] = []
    samples: list[Sample] = []
    notes: list[str] = []
    taken: set[str] = set()
    for number, dataset in enumerate(datasets, 1):
        prefix = ""
        while taken & {prefix + sample.id for sample in dataset.samples}:
            prefix += f"{number}/"
        if prefix:
            notes.append(f"dataset {number} ({dataset.source}) shares ids with an earlier one: its begin with {prefix}")
        placed = [
            dataclasses.replace(sample, id=prefix + sample.id, concept=sample.concept + len(concepts))
            for sample in dataset.samples
        ]
        taken |= {sample.id for sample in placed}
        samples += placed
        apart = max((concept.group for concept in concepts), default=0)
        concepts += [
            dataclasses.replace(concept, group=concept.group + apart) if concept.group else concept
            for concept in dataset.concepts
        ]
        notes += dataset.notes
    combined = Dataset(", ".join(dataset.source for dataset in datasets), tuple(concepts), tuple(samples))
    return dataclasses.replace(combined, notes=(*notes, *_leaks(combined)))


def _leaks(dataset: Dataset) -> list[str]:
    """Pictures that one of the datasets holds back and another one trains on."""
    trained = {_origin(dataset.samples[index]) for index in dataset.members("training", "regularisation")}
    held_back = (dataset.samples[index] for index in dataset.members("validation"))
    leaked = [sample.id for sample in held_back if _origin(sample) in trained]
    if not leaked:
        return []
    return [
        f"{some(leaked, 'validation image')} also trained on, in another of the datasets: {listed(leaked)}; "
        "the validation loss will look better than it is: leave them out of one dataset"
    ]


def _origin(sample: Sample) -> str:
    picture = sample.picture
    return picture.path if isinstance(picture, FilePicture) else picture.fingerprint
