"""What the nodes of the graph set, put together to the options of a concept.

- ``ConceptSettings``: the options of one settings node
- ``concept_from``: the loader's own widgets and up to three settings as one ``Concept``; contradictions are errors
- ``resolutions``: "768, 1024" and "832x1216" as sizes
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from fractions import Fraction

from PIL import ImageColor

from .balancing import split_validation
from .model import BucketOptions, CaptionOptions, Concept, Dataset, DatasetError, ImageOptions, Size

FINEST_REPEATS = 1000  # the denominator of repeats that come as floating-point numbers: 0.333 is 333/1000


@dataclass(frozen=True)
class ConceptSettings:
    """How a concept counts, and which sizes it may be trained at."""

    kind: str = "training"
    samples_per_epoch: int = 0  # 0: repeats decide
    loss_weight: float = 1.0
    batch_size: int = 0  # 0: the trainer's
    validation_split: float = 0.0  # the part of the pictures that is kept out of training
    validation_seed: int = 0
    bucketing: bool = True
    max_aspect: float = 4.0
    min_side: int = 0  # 0: follows from max_aspect
    max_side: int = 0
    upscale: bool = True
    merge: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.validation_split < 1:
            raise DatasetError(f"validation_split is {self.validation_split!r}, expected 0 to below 1")
        if self.validation_split and self.kind != "training":
            raise DatasetError(f"validation_split: {self.kind} images are not split; set it to 0, or kind to training")

    def buckets(self, step: int) -> BucketOptions:
        return BucketOptions(
            enabled=self.bucketing,
            step=step,
            max_aspect=self.max_aspect,
            min_side=self.min_side or None,
            max_side=self.max_side or None,
            upscale=self.upscale,
            merge=self.merge,
        )


def resolutions(resolution: int, more: str) -> tuple[Size, ...]:
    """The resolution and those listed in ``more``, each once."""
    sizes = [(resolution, resolution)]
    for part in re.split(r"[,;\s]+", more.strip()) if more.strip() else ():
        match = re.fullmatch(r"(\d{2,5})(?:[x×](\d{2,5}))?", part, re.IGNORECASE | re.ASCII)
        if match is None:
            raise DatasetError(f"more_resolutions: {part[:40]!r} is no size; write e.g. 768, 1024 or 832x1216")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    return tuple(dict.fromkeys(sizes))


def concept_from(
    resolution: int,
    bucket_step: int,
    more_resolutions: str = "",
    repeats: float = 1.0,
    trigger: str = "",
    captions: CaptionOptions | None = None,
    images: ImageOptions | None = None,
    settings: ConceptSettings | None = None,
) -> Concept:
    """The options of pictures for which nothing else is said."""
    captions, images = captions or CaptionOptions(), images or ImageOptions()
    settings = settings or ConceptSettings()
    trigger = trigger.strip()
    if trigger and captions.trigger and trigger != captions.trigger:
        raise DatasetError(
            f"trigger: it is {trigger!r} here and {captions.trigger!r} in the caption settings; empty one of the two"
        )
    if settings.samples_per_epoch and repeats != 1:
        raise DatasetError(
            f"repeats is {repeats:g}, but samples_per_epoch of the concept settings ({settings.samples_per_epoch}) "
            "decides instead; set repeats to 1, or samples_per_epoch to 0"
        )
    try:
        ImageColor.getrgb(images.background)
    except ValueError as error:
        raise DatasetError(f"background: {images.background[:40]!r} is no colour; write e.g. #ffffff") from error
    return Concept(
        kind=settings.kind,
        resolutions=resolutions(resolution, more_resolutions),
        repeats=Fraction(repeats).limit_denominator(FINEST_REPEATS),
        samples_per_epoch=settings.samples_per_epoch or None,
        loss_weight=settings.loss_weight,
        batch_size=settings.batch_size or None,
        buckets=settings.buckets(bucket_step),
        captions=dataclasses.replace(captions, trigger=trigger or captions.trigger),
        images=images,
    )


def split(dataset: Dataset, settings: ConceptSettings | None) -> Dataset:
    """The dataset with the validation part that the settings ask for."""
    if settings is None or not settings.validation_split:
        return dataset
    if dataset.members("validation"):
        return dataset.with_samples(
            dataset.samples, "validation_split of the concept settings has no effect: the dataset has validation images"
        )
    return split_validation(dataset, settings.validation_split, settings.validation_seed)
