"""A folder of captioned images as an immutable table of samples.

- any depth of folders; ``cat.png`` is captioned by ``cat.txt`` beside it; hidden files and folders are left out
- everything Pillow reads of the types below; Exif orientation, transparency (onto white), palettes, greyscale, 16-bit
  greyscale and CMYK are handled
- aspect buckets; each sample keeps its original size, scaled size and crop, which size conditioning needs
- every fault that names and headers show is found at the scan and named with its cure; lesser things become notes
- the order of batches is a pure function of (dataset, batch size, seed, epoch)
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from .buckets import Size, bucket_sizes, choose_bucket, cover, kept_part
from .images import IMAGE_TYPES, OTHER_IMAGE_TYPES, decode, image_types, oriented_size

CAPTION_TYPE = ".txt"
MUCH_CROPPED = Fraction(4, 5)
SHOWN = 5


class DatasetError(ValueError):
    """Something in a dataset folder that has to be put right before training; names the file and the cure."""


@dataclass(frozen=True)
class Sample:
    """One captioned image; sizes are (width, height) in pixels after Exif orientation, crop is (left, top)."""

    id: str  # posix path relative to the dataset's folder
    path: str
    caption: str
    width: int
    height: int
    bucket: Size
    crop: tuple[int, int]  # where the bucket lies in the resized image
    resized: Size
    size: int  # of the file, in bytes
    mtime_ns: int


@dataclass(frozen=True)
class Dataset:
    """The samples of one folder, sorted by id, and what the user should know about them."""

    root: str
    resolution: int
    samples: tuple[Sample, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """sha256 over what decides the training data: ids, captions, file sizes and times, geometry."""
        digest = hashlib.sha256()
        for sample in self.samples:
            facts = (sample.id, sample.caption, sample.size, sample.mtime_ns)
            geometry = (sample.width, sample.height, sample.bucket, sample.resized, sample.crop)
            digest.update(repr((facts, geometry)).encode())
        return digest.hexdigest()


def scan_folder(
    folder: Path, resolution: int, bucket_step: int = 64, allowed: Callable[[Path], bool] | None = None
) -> Dataset:
    """The dataset in a folder. DatasetError names every file at fault, ValueError an option that does not fit.

    ``allowed`` is asked about the target of each file that is a link.
    """
    bucket_sizes(resolution, bucket_step)  # an option that does not fit is reported before any file is opened
    found = _find(folder)
    if not found.images:
        raise DatasetError(_nothing_found(folder, found.unsupported))
    _check_pairs(folder, found)
    if allowed is not None:
        _check_links(folder, found, allowed)

    samples, faults, notes = [], [], []
    for name in found.images:
        try:
            samples.append(_sample(folder, name, found.captions[_stem(name)], resolution, bucket_step))
        except DatasetError as fault:
            faults.append(str(fault))
    if faults:
        raise DatasetError(f"{folder}: {_some(faults, 'file')} cannot be used:\n" + "\n".join(faults[:SHOWN]))
    if found.unsupported:
        notes.append(f"left out, no supported type: {_listed(found.unsupported)}; convert to png or jpg to use them")
    if found.linked:
        notes.append(f"left out, folders that are links: {_listed(found.linked)}; copy them in to use them")
    return Dataset(str(folder), resolution, tuple(samples), (*notes, *_quality_notes(samples)))


def load_pixels(sample: Sample) -> np.ndarray:
    """The image at its bucket's size: float32, (height, width, 3), in [0, 1]. DatasetError when it does not decode."""
    try:
        picture = decode(sample.path)
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DatasetError(f"{sample.path} cannot be decoded ({error}): save it again or remove it") from error
    if picture.size != (sample.width, sample.height):
        raise DatasetError(f"{sample.path} was replaced by an image of another size: queue the workflow again")
    left, top = sample.crop
    box = (left, top, left + sample.bucket[0], top + sample.bucket[1])
    return np.asarray(picture.resize(sample.resized, Image.Resampling.LANCZOS).crop(box), np.float32) / 255


def batch_order(dataset: Dataset, batch_size: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """Sample indices of each batch of an epoch: one bucket per batch, every sample once, partial batches kept.

    The order comes from hashes, so it touches no generator and stays the same in every version of every library.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}: it must be at least 1")

    def lot(kind: str, index: int) -> bytes:
        return hashlib.sha256(f"{kind} {index} of epoch {epoch}, seed {seed}".encode()).digest()

    buckets: dict[Size, list[int]] = {}
    for index in sorted(range(len(dataset.samples)), key=lambda index: lot("sample", index)):
        buckets.setdefault(dataset.samples[index].bucket, []).append(index)
    batches = [
        tuple(members[start : start + batch_size])
        for members in buckets.values()
        for start in range(0, len(members), batch_size)
    ]
    return sorted(batches, key=lambda batch: lot("batch", batch[0]))


def describe(dataset: Dataset) -> str:
    """A few lines for the user: how many images, in which buckets, and the notes."""
    count, counts = len(dataset.samples), Counter(sample.bucket for sample in dataset.samples)
    sizes = [f"{width}×{height}: {number}" for (width, height), number in counts.most_common()]
    lines = [
        f"{count} image{'s' * (count != 1)} at resolution {dataset.resolution}",
        f"{len(sizes)} bucket{'s' * (len(sizes) != 1)} ({', '.join(sizes)})",
    ]
    return "\n".join([*lines, *(f"note: {note}" for note in dataset.notes)])


def folder_state(folder: Path) -> str:
    """sha256 over name, time and size of every image and caption: changes when a scan could change; OSError."""
    found, digest = _find(folder), hashlib.sha256()
    for name in sorted([*found.images, *found.captions.values()]):
        status = (folder / name).stat()
        digest.update(repr((name, status.st_mtime_ns, status.st_size)).encode())
    return digest.hexdigest()


@dataclass
class _Found:
    """What lies in a folder, as sorted relative posix paths; captions by the path without its extension."""

    images: list[str]
    captions: dict[str, str]
    unsupported: list[str]
    linked: list[str]


def _find(folder: Path) -> _Found:
    found = _Found([], {}, [], [])

    def refuse(error: OSError) -> None:
        raise DatasetError(f"{error.filename} cannot be opened ({error.strerror}): does it exist, may it be read?")

    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        here = Path(place)
        found.linked += [_relative(folder, here / name) for name in folders if (here / name).is_symlink()]
        for name in files:
            kind, path = os.path.splitext(name)[1].lower(), _relative(folder, here / name)
            if name.startswith("."):
                continue
            if kind in image_types():
                found.images.append(path)
            elif kind == CAPTION_TYPE and (path.endswith(CAPTION_TYPE) or _stem(path) not in found.captions):
                found.captions[_stem(path)] = path
            elif kind in IMAGE_TYPES or kind in OTHER_IMAGE_TYPES:
                found.unsupported.append(path)
    for names in (found.images, found.unsupported, found.linked):
        names.sort()
    return found


def _relative(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _nothing_found(folder: Path, unsupported: list[str]) -> str:
    types = ", ".join(kind[1:] for kind in IMAGE_TYPES if kind in image_types())
    if unsupported:
        return f"{folder} has images of unsupported types only ({_listed(unsupported)}): convert them to one of {types}"
    return f"{folder} has no images: put images ({types}) there, each with a caption in a {CAPTION_TYPE} file"


def _check_pairs(folder: Path, found: _Found) -> None:
    sharing: dict[str, list[str]] = {}
    for name in found.images:
        sharing.setdefault(_stem(name), []).append(name)
    ambiguous = [" and ".join(names) for names in sharing.values() if len(names) > 1]
    if ambiguous:
        raise DatasetError(
            f"{folder}: images that share one caption file: {_listed(ambiguous)}; rename or remove one of each"
        )
    bare = [name for name in found.images if _stem(name) not in found.captions]
    if bare:
        raise DatasetError(
            f"{folder}: {_some(bare, 'image')} of {len(found.images)} without a caption: {_listed(bare)}; "
            f"write each caption into a text file of the same name, e.g. {_stem(bare[0])}{CAPTION_TYPE}"
        )


def _check_links(folder: Path, found: _Found, allowed: Callable[[Path], bool]) -> None:
    paths = [folder / name for name in (*found.images, *found.captions.values())]
    outside = [_relative(folder, path) for path in paths if path.is_symlink() and not allowed(path.resolve())]
    if outside:
        raise DatasetError(f"{folder}: links that lead outside the dataset folders: {_listed(outside)}; copy the files")


def _sample(folder: Path, name: str, caption: str, resolution: int, bucket_step: int) -> Sample:
    path = folder / name
    try:
        size = oriented_size(path)
        status = path.stat()
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DatasetError(f"{name} is no readable image ({error}): save it again or remove it") from error
    try:
        text = (folder / caption).read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{caption} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise DatasetError(f"{caption} cannot be read ({error.strerror}): check the file") from error
    bucket = choose_bucket(size, resolution, bucket_step)
    resized, crop = cover(size, bucket)
    return Sample(name, str(path), text, *size, bucket, crop, resized, status.st_size, status.st_mtime_ns)


def _quality_notes(samples: list[Sample]) -> Iterable[str]:
    empty = [sample.id for sample in samples if not sample.caption]
    if empty:
        yield f"empty captions, trained without a prompt: {_listed(empty)}"
    enlarged = {sample.id: sample.resized[0] / sample.width for sample in samples if sample.resized[0] > sample.width}
    if enlarged:
        worst = max(enlarged, key=lambda name: enlarged[name])
        yield (
            f"{_some(enlarged, 'image')} smaller than the bucket and scaled up "
            f"(at most {enlarged[worst]:.2f}×, {worst}): use larger originals or a lower resolution"
        )
    kept = {sample.id: kept_part((sample.width, sample.height), sample.bucket) for sample in samples}
    cropped = [name for name in kept if kept[name] < MUCH_CROPPED]
    if cropped:
        worst = min(cropped, key=lambda name: kept[name])
        yield (
            f"{_some(cropped, 'image')} with more than a fifth cropped away "
            f"(at most {1 - float(kept[worst]):.0%}, {worst}): crop them yourself, or use a smaller bucket_step"
        )


def _some(names: Iterable[str], noun: str) -> str:
    count = len(list(names))
    return f"{count} {noun}{'s' * (count != 1)}"


def _listed(names: list[str]) -> str:
    rest = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
