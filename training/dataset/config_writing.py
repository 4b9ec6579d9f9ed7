"""A dataset as the TOML configuration that sd-scripts reads.

- keys that sd-scripts knows and nothing else; options at their usual value are left out
- pictures that were held back stand with those they were held back from, by ``validation_split``; other validation
  pictures are a dataset of which all is held back
- what the format cannot say (edited captions, pictures from the graph, the trigger, …) stands there as a comment
- read back, it gives the same concepts and samples wherever there is no such comment
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from itertools import count
from pathlib import Path
from typing import Any

import tomli_w

from .config import BUCKET_KEYS, CAPTION_KEYS, COLOUR_AUG, IMAGE_KEYS
from .files import File, find, stem
from .metadata_files import Row, joined, name_below, rows
from .model import (
    BucketOptions,
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    ImageOptions,
    Sample,
    Size,
    listed,
)
from .reading import Unreadable, focus_in_name, read_caption

WRITTEN = {  # options that have a key; all others become a comment where they are set
    CaptionOptions: {*CAPTION_KEYS.values(), "lines"},
    BucketOptions: {*BUCKET_KEYS.values(), "enabled", "upscale"},
    ImageOptions: {*IMAGE_KEYS.values(), *COLOUR_AUG, "crop"},
}
THEIR_LARGEST = 1024  # max_bucket_reso of sd-scripts where a file does not say
STYLES = {  # keys that make a dataset another kind for sd-scripts, and what it refuses beside them
    "conditioning_data_dir": ("metadata_file", "class_tokens", "is_reg", "alpha_mask", "random_crop"),
    "metadata_file": ("is_reg",),
}
LIST_TYPES = (".json", ".jsonl")


@dataclass
class Table:
    """A table of the file, with the comments that stand above it."""

    values: dict[str, Any] = field(default_factory=dict)
    comments: list[str] = field(default_factory=list)
    subsets: list[Table] = field(default_factory=list)


def to_toml(dataset: Dataset) -> str:
    """The TOML text; DatasetError where no picture is in a file."""
    datasets: dict[tuple, Table] = {}
    lost = [sample.id for sample in dataset.samples if not isinstance(sample.picture, FilePicture)]
    if len(lost) == len(dataset.samples):
        raise DatasetError("no picture of the dataset is in a file; save the pictures to a folder first")
    top = Table(comments=_lost("pictures from the graph are left out", lost))
    samples = [sample for sample in dataset.samples if isinstance(sample.picture, FilePicture)]
    filled = {(sample.concept, _place_of(sample)) for sample in samples}
    homes = {sample.id: _home(sample, dataset, filled) for sample in samples}
    homeless = [sample.id for sample in samples if homes[sample.id] is None]
    top.comments += _lost("validation images without the folder they were held back from", homeless)
    for index, concept in enumerate(dataset.concepts):
        members = [sample for sample in samples if homes[sample.id] == index]
        if not members:
            continue
        subsets = list(_subset_tables(concept, members, sum(sample.concept == index for sample in members)))
        if concept.kind == "training" and concept.validation_split and len(subsets) > 1:
            top.comments += _lost("validation_split holds back other pictures: it counts per folder in", [concept.name])
        for size in concept.resolutions:
            for style in dict.fromkeys(map(_style, subsets)):
                _place([subset for subset in subsets if _style(subset) == style], concept, size, datasets)
    return "\n".join(_lines(top, [datasets[key] for key in sorted(datasets, key=lambda key: key[0])]))


def _home(sample: Sample, dataset: Dataset, filled: set[tuple[int, str]]) -> int | None:
    """The concept that a sample is written with: what was held back, with that which it was held back from.

    ``filled`` says which concepts have pictures in which places.
    """
    held = dataset.of(sample)
    if not (held.kind == "validation" and held.validation_split):
        return sample.concept
    for index, concept in enumerate(dataset.concepts):
        if concept.kind == "training" and (index, _place_of(sample)) in filled:
            twin = replace(concept, kind=held.kind, repeats=held.repeats, samples_per_epoch=held.samples_per_epoch)
            if twin == held:
                return index
    return None


def _place(subsets: Sequence[Table], concept: Concept, size: Size, datasets: dict[tuple, Table]) -> None:
    """Put the subsets into a dataset of those options; a folder that is there already would be ignored."""
    part = 1.0 if concept.kind == "validation" else concept.validation_split
    places = {_place_key(subset) for subset in subsets}
    options = (concept.group, repr(concept.buckets), concept.batch_size, size, part, concept.validation_seed)
    for number in count():
        key = (*options, _style(subsets[0]), number)
        if key not in datasets:
            datasets[key] = _dataset_table(concept, size, part)
            if any(other != key and other[: len(options)] == options for other in datasets):
                datasets[key].comments.append("apart from another of these options: sd-scripts cannot have both in one")
        if places.isdisjoint(map(_place_key, datasets[key].subsets)):
            datasets[key].subsets += subsets
            return


def _style(subset: Table) -> str:
    """What kind of dataset the subset makes it: sd-scripts tells them apart by their keys and mixes none."""
    return next((key for key in STYLES if key in subset.values), "")


def _place_key(subset: Table) -> tuple[Any, Any]:
    return subset.values.get("image_dir"), subset.values.get("metadata_file")


def _lost(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {listed(names)}"] if names else []


def _lines(top: Table, datasets: Iterable[Table]) -> Iterator[str]:
    yield from _comments(top)
    for dataset in datasets:
        yield "[[datasets]]"
        yield from _comments(dataset)
        yield tomli_w.dumps(dataset.values)
        for subset in dataset.subsets:
            yield "[[datasets.subsets]]"
            yield from _comments(subset)
            yield tomli_w.dumps(subset.values)


def _comments(table: Table) -> Iterator[str]:
    for comment in table.comments:
        yield "# " + "".join(character if character.isprintable() else " " for character in comment)


def _dataset_table(concept: Concept, size: Size, validation: float) -> Table:
    options, usual = concept.buckets, BucketOptions()
    values: dict[str, Any] = {"resolution": list(size) if size[0] != size[1] else size[0]}
    if concept.batch_size is not None:
        values["batch_size"] = concept.batch_size
    if validation:
        values["validation_split"] = float(validation)
        values["validation_seed"] = concept.validation_seed
    values["enable_bucket"] = options.enabled
    values["bucket_reso_steps"] = options.step
    comments = _unwritten(options)
    if options.enabled:
        values |= _keys(options, {key: name for key, name in BUCKET_KEYS.items() if name != "step"}, usual)
        if not options.upscale:
            values["bucket_no_upscale"] = True
        longest = round((size[0] * size[1] * options.max_aspect) ** 0.5)
        if options.max_side is None and longest > THEIR_LARGEST:
            comments.append(
                f"sd-scripts caps buckets at {THEIR_LARGEST}; for all of these: max_bucket_reso = {longest}"
            )
    return Table(values, comments)


def _keys(options: Any, keys: dict[str, str], usual: Any) -> dict[str, Any]:
    """Keys and values of the options that are not as usual."""
    return {key: value for key, name in keys.items() if (value := getattr(options, name)) != getattr(usual, name)}


def _unwritten(options: Any) -> list[str]:
    """What is set and has no key."""
    usual = type(options)()
    return [
        f"no key for {option.name} = {getattr(options, option.name)!r}"
        for option in fields(options)
        if option.name not in WRITTEN[type(options)] and getattr(options, option.name) != getattr(usual, option.name)
    ]


def _options_table(concept: Concept, pictures: int) -> Table:
    """What all subsets of a concept have in common."""
    captions, images = concept.captions, concept.images
    repeats = concept.repeats
    if concept.samples_per_epoch is not None:
        repeats = Fraction(concept.samples_per_epoch, pictures)
    whole = max(1, round(repeats))
    table = Table({"num_repeats": whole}, [*_unwritten(captions), *_unwritten(images)])
    if repeats != whole:
        table.comments.append(
            f"num_repeats is exactly {repeats} = {float(repeats):.4g}; sd-scripts takes whole numbers"
        )
    if concept.loss_weight != 1:
        table.comments.append(f"no key for loss_weight = {concept.loss_weight!r}; see --prior_loss_weight")
    if concept.kind == "regularisation":
        table.values["is_reg"] = True
    table.values |= _keys(captions, CAPTION_KEYS, CaptionOptions())
    if captions.lines != ("random" if captions.wildcards else "first"):
        table.comments.append(f"no key for lines = {captions.lines!r}: sd-scripts shows the first line of a caption")
    table.values |= _keys(images, IMAGE_KEYS, ImageOptions())
    if images.crop == "random":
        table.values["random_crop"] = True
    elif images.crop == "focus":
        table.comments.append("no key for crop = 'focus'")
    colour = {name: getattr(images, name) for name in COLOUR_AUG}
    if colour == COLOUR_AUG:
        table.values["color_aug"] = True
    else:
        table.comments += [f"no key for {name} = {value!r}" for name, value in colour.items() if value]
    return table


def _place_of(sample: Sample) -> str:
    """The list of captions a sample is in, or else its folder."""
    path = sample.caption_path or ""
    return path if path.lower().endswith(LIST_TYPES) else os.path.dirname(_path(sample))


def _subset_tables(concept: Concept, samples: Sequence[Sample], trained: int) -> Iterator[Table]:
    """One subset for each list of captions, and one for each folder; ``trained`` of the samples are not held back."""
    by_place: dict[str, list[Sample]] = {}
    for sample in samples:
        by_place.setdefault(_place_of(sample), []).append(sample)
    for place, members in by_place.items():
        options = _options_table(concept, trained)
        is_list = place.lower().endswith(LIST_TYPES)
        named = _of_list(Path(place), members, concept) if is_list else _of_folder(place, members)
        boxes = [s.id for s in members if s.focus and not _box_in_name(s, concept)]
        lost = [*named.comments, *_lost("no key for the focus boxes", boxes), *options.comments]
        table = Table({**named.values, **options.values}, lost)
        style = _style(table)
        refused = [key for key in STYLES.get(style, ()) if key in table.values]
        table.comments += _lost(f"sd-scripts refuses beside {style}", refused)
        yield table


def _path(sample: Sample) -> str:
    assert isinstance(sample.picture, FilePicture)
    return sample.picture.path


def _box_in_name(sample: Sample, concept: Concept) -> bool:
    assert isinstance(sample.picture, FilePicture)
    return concept.images.zoom is not None and focus_in_name(sample.picture) == sample.focus


def _of_folder(folder: str, samples: Sequence[Sample]) -> Table:
    """The subset of a folder, and what its files do not give back."""
    table = Table({"image_dir": folder})
    types = sorted({os.path.splitext(sample.caption_path)[1] for sample in samples if sample.caption_path})
    if types:
        table.values["caption_extension"] = types[0]
    if len(types) > 1:
        table.comments.append(f"captions have several types, {', '.join(types)}: rename them to {types[0]}")
    bare = sorted({sample.caption for sample in samples if not sample.caption_path})
    if bare == [""]:
        table.comments += _lost("without a caption", [s.id for s in samples if not s.caption_path])
    elif bare:
        table.values["class_tokens"] = bare[0]
        table.comments += _lost(
            "captions that are in no file", [s.id for s in samples if not s.caption_path and s.caption != bare[0]]
        )
    edited = [sample.id for sample in samples if sample.caption_path and _read(sample.caption_path) != sample.caption]
    table.comments += _lost("captions that were edited and are not in their files", edited)
    masks = [sample for sample in samples if sample.mask]
    if masks:
        _add_masks(table, samples)
    used = {os.path.basename(_path(sample)) for sample in samples}
    table.comments += _lost("in the folder, but not in the dataset", [n for n in _images(folder) if n not in used])
    return table


def _of_list(path: Path, samples: Sequence[Sample], concept: Concept) -> Table:
    """The subset of a list of captions: the folder its paths are relative to is the one that all samples fit."""
    try:
        listed_rows = {row.path.replace("\\", "/"): row for row in rows(path)}
    except DatasetError as error:
        return Table({"metadata_file": str(path)}, [str(error)])
    bases = [path.parent, *Path(_path(samples[0])).parents]
    base = next((base for base in bases if all(_row(listed_rows, one, base) for one in samples)), path.parent)
    table = Table({"metadata_file": str(path), "image_dir": str(base)})
    named = [(sample, _row(listed_rows, sample, base)) for sample in samples]
    in_list = [sample.id for sample, row in named if row and row.mask is not None]
    if in_list:
        table.comments += _lost("masks that the list names, where sd-scripts reads none", in_list)
    elif any(sample.mask for sample in samples):
        _add_masks(table, samples)
    edited = [sample.id for sample, row in named if row is None or joined(row, concept) != sample.caption]
    table.comments += _lost("captions that were edited and are not in the list", edited)
    if len(listed_rows) > len(samples):
        more = len(listed_rows) - len(samples)
        table.comments.append(f"entries of the list that are not in the dataset: {more}")
    return table


def _row(listed_rows: dict[str, Row], sample: Sample, base: Path) -> Row | None:
    """What the list says of a picture, whether by its whole path or by that below a folder, with or without type."""
    below = name_below(_path(sample), base)
    names = (_path(sample), below, f"./{below}", stem(_path(sample)), stem(below), f"./{stem(below)}")
    return next((listed_rows[name] for name in names if name in listed_rows), None)


def _add_masks(table: Table, samples: Sequence[Sample]) -> None:
    """conditioning_data_dir where every picture has its mask there under its own name."""
    folders = {
        os.path.dirname(sample.mask.path)
        if isinstance(sample.mask, FilePicture)
        and stem(os.path.basename(sample.mask.path)) == stem(os.path.basename(_path(sample)))
        else ""
        for sample in samples
    }
    if len(folders) == 1 and "" not in folders:
        table.values["conditioning_data_dir"] = folders.pop()
    else:
        names = [sample.id for sample in samples if sample.mask]
        table.comments += _lost("masks need a folder with one for each image, under its name", names)


def _read(path: str) -> str | None:
    try:
        return read_caption(File(path, os.path.getsize(path), 0))
    except (Unreadable, OSError):
        return None


def _images(folder: str) -> list[str]:
    try:
        return list(find(Path(folder), deep=False).images)
    except DatasetError:
        return []
