"""Edits of a dataset: a new ``Dataset``, the old one and all files as they were.

- ``update``: captions, pictures and masks that come back from the graph, each put where its id says
- a note says what was changed, and what was lost with it
- ids that are unknown or given twice, counts and shapes that do not fit are errors

Focus boxes are parts of the picture, so they stay with a picture that is scaled; a picture that is cropped needs a new
one.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .model import CaptionOptions, Dataset, DatasetError, GraphPicture, Sample, Size, listed, some
from .tag_text import name_of, tags

CAPTION_MODES = {
    "replace": "the new caption instead of the old one",
    "append": "the old caption with those tags of the new one that it lacks behind it",
    "skip": "the new caption only where there is none; written captions stay",
}
IMAGE_MODES = {
    "replace": "the new picture instead of the old one",
    "append": "samples of their own beside the old ones, called name~2, name~3 …; captions and masks given go to them",
    "skip": "pictures stay as they are",
}
ASPECT_TOLERANCE = 0.01  # of mask to picture; a mask is scaled to its picture
OVERSHOOT = 1 / 255  # what resampling filters overshoot by is cut off without a word; more deserves one
COPY = re.compile(r"~\d+\Z")


def update(
    dataset: Dataset,
    ids: Sequence[str],
    *,
    captions: Sequence[str] | None = None,
    images: Sequence[Tensor] | None = None,
    masks: Sequence[Tensor] | None = None,
    captions_mode: str = "replace",
    images_mode: str = "replace",
) -> Dataset:
    """The dataset with what is given for ``ids``, in the order of ``ids``.

    Images are (height, width, 3 or 4), masks (height, width): light is learned. A new mask takes the place of the old.
    """
    _check_modes(captions_mode, images_mode)
    _check_ids(dataset, ids)
    given = {"captions": captions, "images": images, "masks": masks}
    if all(values is None for values in given.values()):
        raise DatasetError("nothing to update with: connect captions, images or masks")
    for name, values in given.items():
        if values is not None and len(values) != len(ids):
            raise DatasetError(
                f"{name}: {len(values)} given for {some(ids, 'id')}; give one for each id, in the order of the ids"
            )
    if not ids:
        return dataset.with_samples(dataset.samples, "update: no ids were given, nothing was changed")
    place = {name: index for index, name in enumerate(ids)}
    pictures = None if images is None or images_mode == "skip" else [*map(_picture, images, ids)]
    covers = None if masks is None else [*map(_mask, masks, ids)]

    taken = {sample.id for sample in dataset.samples}
    samples: list[Sample] = []
    changed: list[tuple[Sample, Sample]] = []
    reworded = 0
    for old in dataset.samples:
        if old.id not in place:
            samples.append(old)
            continue
        new, index = old, place[old.id]
        if pictures is not None:
            new = replace(new, picture=pictures[index])
        if covers is not None:
            new = replace(new, mask=covers[index])
        if captions is not None:
            text = _caption(old.caption, _text(old.id, captions[index]), captions_mode, dataset.of(old).captions)
            new = replace(new, caption=text)
            reworded += text != old.caption
        _check_mask(new, covers is not None)
        if pictures is not None and images_mode == "append":
            samples.append(old)
            new = replace(new, id=_free_id(old.id, taken))
        samples.append(new)
        changed.append((old, new))

    notes: list[str] = []
    if captions is not None:
        notes.append(_caption_note(len(ids), reworded, captions_mode))
    if images is not None:
        notes.append(_image_note(ids, images_mode))
    if masks is not None:
        notes.append(f"{some(masks, 'mask')} set")
    elif pictures is not None:
        notes += _lost_transparency(dataset, changed)
    given_images = dict(zip(ids, images, strict=True)) if images is not None and pictures is not None else {}
    notes += doubts(dataset, given_images, [new for _, new in changed] if masks is not None else [])
    return dataset.with_samples(samples, *(f"update: {note}" for note in notes))


# -- what is given


def _check_modes(captions_mode: str, images_mode: str) -> None:
    for name, mode, known in (
        ("captions_mode", captions_mode, CAPTION_MODES),
        ("images_mode", images_mode, IMAGE_MODES),
    ):
        if mode not in known:
            raise DatasetError(f"{name} is {mode!r}, expected one of {', '.join(known)}")


def _check_ids(dataset: Dataset, ids: Sequence[str]) -> None:
    known = {sample.id for sample in dataset.samples}
    unknown = [str(name) for name in ids if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        cure = f"is {near[0]} meant?" if near else "take the ids from the same dataset"
        raise DatasetError(f"ids: not in the dataset: {listed(unknown)}; {cure}")
    double = [name for name, count in Counter(ids).items() if count > 1]
    if double:
        raise DatasetError(f"ids: given more than once: {listed(double)}; give each id once")


def _text(name: str, caption: object) -> str:
    if not isinstance(caption, str):
        raise DatasetError(f"captions: that of {name} is of type {type(caption).__name__}; give text")
    return caption


def _picture(image: Tensor, name: str) -> GraphPicture:
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[2] not in (3, 4) or 0 in image.shape:
        raise DatasetError(
            f"images: that of {name} is {_shape(image)}; give (height, width, 3 or 4 channels), one picture for each id"
        )
    return GraphPicture(_in_range(f"images: that of {name}", image))


def _mask(mask: Tensor, name: str) -> GraphPicture:
    if not isinstance(mask, Tensor) or mask.ndim != 2 or 0 in mask.shape:
        raise DatasetError(f"masks: that of {name} is {_shape(mask)}; give (height, width), one mask for each id")
    return GraphPicture(_in_range(f"masks: that of {name}", mask)[..., None])


def _shape(value: object) -> str:
    return f"of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"


def _in_range(what: str, values: Tensor) -> Tensor:
    """On the CPU, in float32 and in [0, 1]; the graph's own tensor where it is so already."""
    values = values.detach().to("cpu", torch.float32)
    low, high = (float(bound) for bound in values.aminmax())  # NaN if any of them is
    if not (math.isfinite(low) and math.isfinite(high)):
        raise DatasetError(f"{what} has values that are not finite; check the nodes in front of it")
    return values if low >= 0 and high <= 1 else values.clamp(0, 1)


def _caption(old: str, new: str, mode: str, options: CaptionOptions) -> str:
    if mode == "replace" or not old.strip():
        return new
    if mode == "skip" or not new.strip():
        return old
    if options.lines == "all":
        return _with_tags(old, new, options.separator)
    # each line is a caption of its own
    return "\n".join(_with_tags(line, new, options.separator) if line.strip() else line for line in old.split("\n"))


def _with_tags(line: str, new: str, separator: str) -> str:
    there = {name_of(tag) for tag in tags(line, separator)}
    lacking = [tag for tag in tags(new, separator) if name_of(tag) not in there]
    return f"{separator} ".join([line.rstrip().removesuffix(separator), *lacking]) if lacking else line


def _free_id(name: str, taken: set[str]) -> str:
    """``name~2``, or the next number that is free; it is taken from then on."""
    base, number = COPY.sub("", name), 2
    while f"{base}~{number}" in taken:
        number += 1
    taken.add(f"{base}~{number}")
    return f"{base}~{number}"


def _check_mask(sample: Sample, new: bool) -> None:
    """A mask lies over the whole of its picture."""
    mask = sample.mask
    if mask is None or _same_aspect((mask.width, mask.height), sample.size):
        return
    which, cure = ("new", "scale and crop it like the picture") if new else ("old", "give a new mask with the picture")
    raise DatasetError(
        f"masks: the {which} mask of {sample.id} ({mask.width}×{mask.height}) is of another shape than its picture "
        f"({sample.size[0]}×{sample.size[1]}); {cure}"
    )


def _same_aspect(one: Size, other: Size) -> bool:
    """Within the tolerance, or within what rounding the sides of both to whole pixels explains."""
    across, down = one[0] * other[1], one[1] * other[0]
    return abs(across - down) <= max(ASPECT_TOLERANCE * max(across, down), (sum(one) + sum(other)) / 2)


# -- what the user is told


def _caption_note(given: int, changed: int, mode: str) -> str:
    same = f"; {given - changed} as before" if changed < given else ""
    done = {"replace": "replaced", "append": "appended to", "skip": "written where there was none"}[mode]
    return f"{changed} caption{'s' * (changed != 1)} {done}{same}"


def _image_note(ids: Sequence[str], mode: str) -> str:
    if mode == "skip":
        return f"{some(ids, 'image')} given but not used: images_mode is skip"
    return f"{some(ids, 'image')} {'replaced' if mode == 'replace' else 'added'}"


def doubts(dataset: Dataset, images: Mapping[str, Tensor], masked: Sequence[Sample]) -> Iterator[str]:
    """What of the images given, and of the samples with a new mask, is hardly meant so."""
    far = [name for name, image in images.items() if _overshoot(image) > OVERSHOOT]
    if far:
        yield f"images with values outside 0 to 1, which were cut off: {listed(far)}"
    idle = [sample.id for sample in masked if _learns_nothing(sample, dataset)]
    if idle:
        yield f"masks that leave nothing of the picture to learn: {listed(idle)}; light is learned, dark is not"


def _overshoot(image: Tensor) -> float:
    low, high = (float(bound) for bound in image.aminmax())
    return max(-low, high - 1)


def _lost_transparency(dataset: Dataset, changed: Sequence[tuple[Sample, Sample]]) -> Iterator[str]:
    lost = [
        new.id
        for old, new in changed
        if dataset.of(old).images.alpha_mask and old.picture.transparent and not new.picture.transparent
    ]
    if lost:
        yield f"images without the transparency that was their mask (alpha_mask): {listed(lost)}; connect masks too"


def _learns_nothing(sample: Sample, dataset: Dataset) -> bool:
    options = dataset.of(sample).images
    assert isinstance(sample.mask, GraphPicture)
    unlearned = 1.0 if options.invert_mask else 0.0
    return options.mask_floor == 0 and bool((sample.mask.pixels == unlearned).all())
