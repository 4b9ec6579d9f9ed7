"""A dataset as immutable data: concepts, and the captioned pictures that belong to them.

``Dataset`` is what travels between the nodes. It holds what the files or the graph say and what the user chose;
everything else (buckets, crops, batches, shown captions, findings) is computed from it by pure functions and never
stored, so an edit is a new ``Dataset`` and nothing can be out of date.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path

from torch import Tensor

Size = tuple[int, int]  # (width, height) in pixels
Box = tuple[float, float, float, float]  # left, top, right, bottom as parts of the upright picture, 0 to 1

KINDS = {
    "training": "what the adapter is to learn",
    "regularisation": "pictures of the class without the concept; each epoch shows as many of them as of the others",
    "validation": "never trained on; the loss on them is reported",
}
CROPS = {
    "centre": "the middle of the picture",
    "random": "anywhere, drawn anew for each variation",
    "focus": "around the focus box of the picture, where it has one, else the centre",
}
LINES = {
    "all": "all lines of a caption file, joined",
    "first": "the first line only, as sd-scripts does",
    "random": "one line, drawn anew for each presentation",
}
SHOWN = 5  # how many names an error or note lists


class DatasetError(ValueError):
    """Something in a dataset that has to be put right before training; names the file or option and the cure."""


def _check(fits: bool, option: str, value: object, expected: str) -> None:
    if not fits:
        raise DatasetError(f"{option} is {value!r}, expected {expected}")


# -- pictures


@dataclass(frozen=True)
class Header:
    """What the header of an image file tells; ``width`` and ``height`` are those of the upright picture."""

    width: int
    height: int
    format: str  # as Pillow calls it: "PNG", "JPEG", …
    mode: str  # Pillow's mode as stored
    orientation: int = 1  # Exif
    transparent: bool = False  # has an alpha channel, a transparent colour or a transparent palette entry
    animated: bool = False  # more than one frame; the first is used
    bits: int = 8  # per channel
    jpeg_quality: int | None = None  # estimated from the quantisation tables


@dataclass(frozen=True)
class FilePicture:
    """A picture in a file, of which only the header has been read."""

    path: str
    header: Header
    size: int  # of the file, in bytes
    mtime_ns: int

    @property
    def width(self) -> int:
        return self.header.width

    @property
    def height(self) -> int:
        return self.header.height

    @property
    def transparent(self) -> bool:
        return self.header.transparent

    @property
    def fingerprint(self) -> str:
        return f"{self.size} {self.mtime_ns} {self.header}"


@dataclass(frozen=True, eq=False)
class GraphPicture:
    """A picture that came out of the graph: (height, width, 1, 3 or 4 channels), float in [0, 1], on the CPU.

    A mask has one channel. The tensor is the graph's own; it is never written to.
    """

    pixels: Tensor

    @property
    def width(self) -> int:
        return self.pixels.shape[1]

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def transparent(self) -> bool:
        return self.pixels.shape[2] == 4

    @cached_property
    def fingerprint(self) -> str:
        content = self.pixels.detach().cpu().float().contiguous().numpy()
        return hashlib.sha256(repr(content.shape).encode() + content.tobytes()).hexdigest()


Picture = FilePicture | GraphPicture


@dataclass(frozen=True)
class Sample:
    """One captioned picture. ``caption`` is as written; what is shown of it is up to the concept's captions options."""

    id: str  # unique in its dataset: the posix path of the picture below the dataset's folder, or a name
    picture: Picture
    caption: str
    concept: int = 0  # index into Dataset.concepts
    mask: Picture | None = None  # light is learned, dark is not
    focus: Box | None = None
    caption_path: str | None = None  # the file the caption was read from

    @property
    def size(self) -> Size:
        return self.picture.width, self.picture.height


# -- options, all per concept


@dataclass(frozen=True)
class BucketOptions:
    """Sizes pictures are trained at.

    ``min_side`` and ``max_side`` of None follow from ``max_aspect`` (long side over short side of a bucket).
    """

    enabled: bool = True  # off: everything is cropped to the resolution itself
    step: int = 64
    max_aspect: float = 4.0
    min_side: int | None = None
    max_side: int | None = None
    upscale: bool = True  # off: pictures smaller than the resolution get a bucket of their own size
    merge: bool = True  # move pictures to a neighbouring bucket where that saves a thin batch

    def __post_init__(self) -> None:
        _check(self.step >= 1, "bucket_step", self.step, "1 or more")
        _check(self.max_aspect >= 1, "max_aspect", self.max_aspect, "1 or more")
        for name in ("min_side", "max_side"):
            value = getattr(self, name)
            _check(value is None or value >= self.step, name, value, f"at least bucket_step ({self.step})")
        if self.min_side and self.max_side:
            _check(self.min_side <= self.max_side, "min_side", self.min_side, f"at most max_side ({self.max_side})")


@dataclass(frozen=True)
class CaptionOptions:
    """How a caption becomes the text of one presentation; the order of the steps is that of ``captions.shown``."""

    trigger: str = ""  # put in front of every caption that does not begin with it; the caption where there is none
    prefix: str = ""
    suffix: str = ""
    lines: str = "all"
    wildcards: bool = False  # {red|blue} picks one; {{ and }} are braces
    separator: str = ","
    shuffle: bool = False
    keep_tokens: int = 0  # so many tags stay in front, unshuffled and undropped
    keep_tokens_separator: str = ""  # e.g. |||: what stands before its first and after its second stays
    secondary_separator: str = ""  # e.g. ;;;: joins tags that stay together
    dropout: float = 0.0  # the whole caption
    dropout_every_n_epochs: int = 0
    tag_dropout: float = 0.0
    never_drop: tuple[str, ...] = ()  # tags (wildcards * and ?) that tag_dropout leaves alone
    only_drop: tuple[str, ...] = ()  # where given, tag_dropout takes these only
    warmup_min: int = 1  # tags shown at the first step …
    warmup_steps: float = 0.0  # … all of them after so many steps; below 1, a part of the run; 0 is off
    weighted: bool = False  # (tag:1.2) weighs; off, brackets are just brackets

    def __post_init__(self) -> None:
        _check(self.lines in LINES, "lines", self.lines, f"one of {', '.join(LINES)}")
        _check(bool(self.separator.strip()), "separator", self.separator, "a character, e.g. a comma")
        _check(self.keep_tokens >= 0, "keep_tokens", self.keep_tokens, "0 or more")
        _check(0 <= self.dropout <= 1, "dropout", self.dropout, "0 to 1")
        _check(0 <= self.tag_dropout <= 1, "tag_dropout", self.tag_dropout, "0 to 1")
        _check(self.dropout_every_n_epochs >= 0, "dropout_every_n_epochs", self.dropout_every_n_epochs, "0 or more")
        _check(self.warmup_min >= 0, "warmup_min", self.warmup_min, "0 or more")
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")

    @property
    def still(self) -> CaptionOptions:
        """The same without anything that is left to chance or changes in the course of a run."""
        return dataclasses.replace(
            self,
            lines="first" if self.lines == "random" else self.lines,
            shuffle=False,
            dropout=0.0,
            dropout_every_n_epochs=0,
            tag_dropout=0.0,
            warmup_steps=0.0,
        )

    @property
    def varies(self) -> bool:
        """Whether one caption can be shown in several ways."""
        return bool(
            self.shuffle
            or self.wildcards
            or self.lines == "random"
            or self.dropout
            or self.dropout_every_n_epochs
            or self.tag_dropout
            or self.warmup_steps
        )


@dataclass(frozen=True)
class ImageOptions:
    """How a picture becomes the pixels of one variation.

    Colour strengths are the largest change as a part: 0.1 is up to 10 % up or down; ``hue`` is a part of the circle.
    """

    crop: str = "centre"
    zoom: tuple[float, float] | None = None  # random crop around the focus box, so many times as large as the box
    flip: bool = False  # half of the variations mirrored, left and right exchanged
    rotate: float = 0.0  # up to so many degrees either way; the crop stays inside the picture
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    background: str = "#ffffff"  # what transparent pictures are laid onto
    alpha_mask: bool = False  # transparency is a loss mask
    mask_floor: float = 0.0  # weight of what a mask leaves out
    invert_mask: bool = False
    variations: int = 0  # how many of each picture are prepared; 0 is automatic

    def __post_init__(self) -> None:
        _check(self.crop in CROPS, "crop", self.crop, f"one of {', '.join(CROPS)}")
        for name in ("brightness", "contrast", "saturation", "mask_floor"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        _check(0 <= self.hue <= 0.5, "hue", self.hue, "0 to 0.5")
        _check(0 <= self.rotate <= 45, "rotate", self.rotate, "0 to 45 degrees")
        _check(self.variations >= 0, "variations", self.variations, "0 (automatic) or more")
        if self.zoom is not None:
            _check(0 < self.zoom[0] <= self.zoom[1], "zoom", self.zoom, "a smaller and a larger factor above 0")

    @property
    def still(self) -> ImageOptions:
        """The same without anything that is left to chance."""
        return dataclasses.replace(
            self,
            crop="centre" if self.crop == "random" else self.crop,
            zoom=None,
            flip=False,
            rotate=0.0,
            brightness=0.0,
            contrast=0.0,
            saturation=0.0,
            hue=0.0,
        )

    @property
    def focused(self) -> bool:
        """Whether the focus box of a picture counts."""
        return self.crop == "focus" or self.zoom is not None

    @property
    def varies(self) -> bool:
        """Whether variations differ in more than being mirrored."""
        colour = self.brightness or self.contrast or self.saturation or self.hue
        return bool(colour or self.rotate or self.crop == "random" or self.zoom)

    @property
    def variation_count(self) -> int:
        """1 where nothing is random, 2 for mirroring alone, 8 otherwise, unless the user says."""
        return self.variations or (8 if self.varies else 2 if self.flip else 1)


@dataclass(frozen=True)
class Concept:
    """Pictures that share their options: a folder, a kohya ``N_name`` folder, a subset of a TOML file."""

    name: str = ""
    kind: str = "training"
    resolutions: tuple[Size, ...] = ((512, 512),)  # every picture is trained at each of them
    repeats: Fraction = Fraction(1)  # presentations of each picture per epoch
    samples_per_epoch: int | None = None  # of the whole concept, instead of repeats
    loss_weight: float = 1.0
    batch_size: int | None = None  # where a file of the user's says so; else the trainer's
    group: int = 0  # batches never mix pictures of two groups; 0 is common to datasets that are combined
    validation_split: float = 0.0  # the part of its pictures that was held back: whoever writes this down needs it
    validation_seed: int = 0
    buckets: BucketOptions = field(default_factory=BucketOptions)
    captions: CaptionOptions = field(default_factory=CaptionOptions)
    images: ImageOptions = field(default_factory=ImageOptions)

    def __post_init__(self) -> None:
        _check(self.kind in KINDS, "kind", self.kind, f"one of {', '.join(KINDS)}")
        _check(bool(self.resolutions), "resolution", self.resolutions, "at least one size")
        for size in self.resolutions:
            _check(min(size) >= self.buckets.step, "resolution", size, f"at least bucket_step ({self.buckets.step})")
        _check(self.repeats > 0, "repeats", self.repeats, "more than 0")
        _check(self.samples_per_epoch is None or self.samples_per_epoch >= 1, "samples_per_epoch",
               self.samples_per_epoch, "1 or more")  # fmt: skip
        _check(math.isfinite(self.loss_weight) and self.loss_weight >= 0, "loss_weight", self.loss_weight, "0 or more")
        _check(self.batch_size is None or self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")


# -- the dataset


@dataclass(frozen=True)
class Dataset:
    """Concepts, their samples, and what the user should know about where they come from."""

    source: str  # the folder or file, or where in the graph it came from
    concepts: tuple[Concept, ...]
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ids = {sample.id for sample in self.samples}
        assert len(ids) == len(self.samples), "sample ids are unique"

    @property
    def resolution(self) -> int:
        """The largest resolution, as the side of a square of that area."""
        return max(round(math.sqrt(w * h)) for concept in self.concepts for w, h in concept.resolutions)

    def of(self, sample: Sample) -> Concept:
        return self.concepts[sample.concept]

    def members(self, *kinds: str) -> list[int]:
        """Indices of the samples of these kinds of concepts."""
        return [index for index, sample in enumerate(self.samples) if self.of(sample).kind in kinds]

    def fingerprint(self) -> str:
        """sha256 over everything that decides what is trained: options, ids, captions, pixels, masks."""
        digest = hashlib.sha256(repr(self.concepts).encode())
        for sample in self.samples:
            mask = sample.mask and sample.mask.fingerprint
            facts = (sample.id, sample.caption, sample.concept, sample.focus, sample.picture.fingerprint, mask)
            digest.update(repr(facts).encode())
        return digest.hexdigest()

    def with_samples(self, samples: Iterable[Sample], *notes: str) -> Dataset:
        return dataclasses.replace(self, samples=tuple(samples), notes=(*self.notes, *notes))


@dataclass(frozen=True)
class Access:
    """What may be read: whoever knows the registered folders says so; ``advice`` is the cure for what may not."""

    allowed: Callable[[Path], bool]  # of a path with its links followed
    advice: Callable[[Path], str]


def some(names: Iterable[object], noun: str) -> str:
    """``3 images``, ``1 image``."""
    count = len(list(names))
    return f"{count} {noun}{'s' * (count != 1)}"


def listed(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
