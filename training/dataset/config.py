"""sd-scripts' dataset configurations as datasets: one concept per subset.

- every key counts as it does there; where the file says nothing, the loader's own options do
- what differs, each with a note where it matters: aspect buckets are not capped at 1024 unless the file says so,
  ``.txt`` captions are found without ``caption_extension``, resizing is bicubic with anti-aliasing, lists of captions
  and folders may be mixed, ``color_aug`` is drawn for each variation
- a configuration reaches only into folders that datasets may lie in, wherever its paths point
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .balancing import split_validation
from .config_keys import Subset, read_config
from .files import CAPTION_TYPES, MASK_LABEL, File, Found, Places, check_found, find, kind, stem
from .folder import entries_of
from .metadata_files import metadata_entries, name_below
from .model import (
    Access,
    BucketOptions,
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    ImageOptions,
    Sample,
    listed,
    some,
)
from .reading import Entry, read

CAPTION_KEYS = {
    "caption_prefix": "prefix",
    "caption_suffix": "suffix",
    "caption_separator": "separator",
    "shuffle_caption": "shuffle",
    "keep_tokens": "keep_tokens",
    "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator",
    "enable_wildcard": "wildcards",
    "caption_dropout_rate": "dropout",
    "caption_dropout_every_n_epochs": "dropout_every_n_epochs",
    "caption_tag_dropout_rate": "tag_dropout",
    "token_warmup_min": "warmup_min",
    "token_warmup_step": "warmup_steps",
}
BUCKET_KEYS = {"bucket_reso_steps": "step", "min_bucket_reso": "min_side", "max_bucket_reso": "max_side"}
IMAGE_KEYS = {"flip_aug": "flip", "alpha_mask": "alpha_mask", "face_crop_aug_range": "zoom"}
CONCEPT_KEYS = {"resolution": "resolutions", "batch_size": "batch_size", "num_repeats": "repeats"}
# color_aug there: hue by up to 8 of 180 degrees, or a gamma of 0.95 to 1.05; here both, as largest changes
COLOUR_AUG = {"hue": 8 / 180, "brightness": 0.05}
WITHOUT_EFFECT = {
    "resize_interpolation": "pictures are resized by bicubic interpolation with anti-aliasing",
    "cache_info": "headers are read anew each time, which takes seconds",
    "custom_attributes": "they are for other programs",
}


@dataclass(frozen=True)
class Source:
    """Where the pictures of a subset come from, looked up and allowed, but not opened."""

    subset: Subset
    places: Places
    image_dir: Path | None
    metadata: File | None
    masks: Found | None


def open_config(path: Path, defaults: Concept, access: Access, if_unreadable: str = "error") -> Dataset:
    """The dataset of a TOML or JSON configuration; DatasetError names key or file, and the cure."""
    root = Path(os.path.realpath(path.parent))
    notes: list[str] = []
    concepts: list[Concept] = []
    entries: list[Entry] = []
    splits: list[tuple[float, int]] = []
    seen: set[tuple] = set()
    for subset in read_config(path):
        source = source_of(subset, root, access)
        place = (subset.group, source.image_dir, source.metadata and source.metadata.path)
        if subset.values.get("num_repeats") == 0 or place in seen:
            why = "its images are those of another subset" if place in seen else "its num_repeats is 0"
            notes.append(f"{subset.where} is left out: {why}")
            continue
        seen.add(place)
        concept = concept_of(subset, defaults, source.places.base.name)
        found, more = _entries(source, root, concept, len(concepts), if_unreadable)
        entries += found
        notes += more
        splits.append(_split_of(subset))
        concepts.append(concept)
    if not entries:
        raise DatasetError(f"{path.name}: no subset with images is left; give one num_repeats of 1 or more")
    if defaults.samples_per_epoch and any(concept.samples_per_epoch is None for concept in concepts):
        notes.append("samples_per_epoch has no effect on subsets that set num_repeats")
    return _held_back(read(path, concepts, entries, access, if_unreadable, dict.fromkeys(notes)), splits)


def source_of(subset: Subset, root: Path, access: Access) -> Source:
    """The folders and files of a subset."""
    where, values, places = subset.where, subset.values, Places(root, access)
    image_dir = places.folder(values["image_dir"], f"{where}.image_dir") if "image_dir" in values else None
    metadata = places.file(values["metadata_file"], f"{where}.metadata_file") if "metadata_file" in values else None
    if image_dir is None and metadata is None:
        raise DatasetError(f"{where} has neither image_dir nor metadata_file; add the folder of its images")
    masks = None
    if "conditioning_data_dir" in values:
        masks = find(places.folder(values["conditioning_data_dir"], f"{where}.conditioning_data_dir"), deep=False)
    base = image_dir or Path(os.path.dirname(metadata.path if metadata else ""))
    return Source(subset, Places(base, access), image_dir, metadata, masks)


def found_in(source: Source) -> Found:
    """The pictures directly in the folder of a subset."""
    assert source.image_dir is not None
    return find(source.image_dir, False, source.subset.values.get("caption_extension", CAPTION_TYPES))


def concept_of(subset: Subset, defaults: Concept, name: str) -> Concept:
    """The options of a subset; DatasetError names the key."""
    values = subset.values
    if values.get("network_multiplier", 1) != 1:
        raise DatasetError(
            f"{subset.where}: network_multiplier is {values['network_multiplier']}, and the adapter always trains at "
            "its full strength here; remove the key"
        )
    try:
        changes = _renamed(values, CONCEPT_KEYS)
        if "num_repeats" in values:
            changes["samples_per_epoch"] = None
        if "is_reg" in values and (values["is_reg"] or defaults.kind == "regularisation"):
            changes["kind"] = "regularisation" if values["is_reg"] else "training"
        if values.get("validation_split") == 1 and not values.get("is_reg"):
            changes["kind"] = "validation"
        captions = _captions(values, defaults.captions)
        if changes.get("kind") == "regularisation":
            captions = dataclasses.replace(captions, trigger="")
        sides = [side for size in changes.get("resolutions", defaults.resolutions) for side in size]
        return dataclasses.replace(
            defaults,
            name=name,
            group=subset.group + 1,  # 0 is for what other sources bring
            buckets=_buckets(values, defaults.buckets, sides),
            captions=captions,
            images=_images(values, defaults.images),
            **changes,
        )
    except DatasetError as error:
        raise DatasetError(f"{subset.where}: {_in_their_words(str(error))}") from error


def _renamed(values: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    return {option: values[key] for key, option in keys.items() if key in values}


def _in_their_words(message: str) -> str:
    """An error about one of our options, by the name of its key."""
    message = message.replace("bucket_step", "bucket_reso_steps").replace("most max_side", "most max_bucket_reso")
    for key, option in {**CAPTION_KEYS, **BUCKET_KEYS, **IMAGE_KEYS, **CONCEPT_KEYS}.items():
        if message.startswith(f"{option} is "):
            return key + message.removeprefix(option)
    return message


def _captions(values: dict[str, Any], defaults: CaptionOptions) -> CaptionOptions:
    """``enable_wildcard`` says which line is shown too; without it there is one, unless the loader asks for chance."""
    options = dataclasses.replace(defaults, **_renamed(values, CAPTION_KEYS))
    chance = options.wildcards or (defaults.lines == "random" and "enable_wildcard" not in values)
    return dataclasses.replace(options, lines="random" if chance else "first")


def _buckets(values: dict[str, Any], defaults: BucketOptions, sides: Sequence[int]) -> BucketOptions:
    """Without enable_bucket there are none, as there; then the size itself is trained, whatever the loader's step."""
    options = _renamed(values, BUCKET_KEYS)
    if "bucket_no_upscale" in values:
        options["upscale"] = not values["bucket_no_upscale"]
    if not values.get("enable_bucket", False):
        step = max(math.gcd(defaults.step, *sides), min(8, defaults.step))
        return dataclasses.replace(defaults, enabled=False, step=options.get("step", step))
    return dataclasses.replace(defaults, enabled=True, **options)


def _images(values: dict[str, Any], defaults: ImageOptions) -> ImageOptions:
    options = _renamed(values, IMAGE_KEYS)
    if "color_aug" in values:
        options.update(COLOUR_AUG if values["color_aug"] else dict.fromkeys(COLOUR_AUG, 0.0))
    if "random_crop" in values and (values["random_crop"] or defaults.crop == "random"):
        options["crop"] = "random" if values["random_crop"] else "centre"
    return dataclasses.replace(defaults, **options)


def _split_of(subset: Subset) -> tuple[float, int]:
    part = subset.values.get("validation_split", 0)
    if not 0 <= part <= 1:
        raise DatasetError(f"{subset.where}: validation_split is {part}, expected 0 (none) to 1 (all), e.g. 0.1")
    return part % 1, subset.values.get("validation_seed", 0)  # of all, nothing is left to split


# -- pictures


def _entries(
    source: Source, root: Path, concept: Concept, index: int, if_unreadable: str
) -> tuple[list[Entry], list[str]]:
    """The pictures of a subset under their paths below ``root``, and notes."""
    where, values = source.subset.where, source.subset.values
    if source.metadata is not None:
        path = Path(source.metadata.path)
        entries, notes = metadata_entries(path, source.places, concept, index, if_unreadable)
        unused = [key for key in ("caption_extension", "class_tokens") if key in values]
        if unused:
            notes.append(f"{where}: {' and '.join(unused)} have no effect, the captions are in {path.name}")
    else:
        found = found_in(source)
        check_found(found)
        entries = list(entries_of(found, list(found.images), index, values.get("class_tokens", "")))
        notes = [*found.notes, *_unread_captions(source, entries, concept)]
        companions = [entry.name for entry in entries if entry.mask]
        if companions:
            notes.append(f"{where}: files called …{MASK_LABEL} are masks here: of {listed(companions)}")
    entries = [dataclasses.replace(entry, name=name_below(entry.image.path, root)) for entry in entries]
    if source.masks is not None:
        entries, more = _masked(source, entries)
        notes += more
    return entries, [*notes, *_subset_notes(source.subset, entries)]


def _unread_captions(source: Source, entries: Sequence[Entry], concept: Concept) -> list[str]:
    """Captions that caption_extension passes by; DatasetError where nothing stands in for them."""
    where, values = source.subset.where, source.subset.values
    bare = [entry.name for entry in entries if not entry.captions]
    if not bare or "caption_extension" not in values or source.image_dir is None:
        return []
    others = find(source.image_dir, deep=False).captions
    unread = [file.name for name in bare for file in others[name]]
    if not unread:
        return []
    asked = " or ".join(values["caption_extension"])
    message = f"{where}: caption_extension is {asked}, which passes by {listed(unread)}; correct it or leave it out"
    if not (values.get("class_tokens") or concept.captions.trigger):
        raise DatasetError(message)
    return [message]


def _masked(source: Source, entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """The pictures with the masks of the same name in conditioning_data_dir; sd-scripts wants one for each too."""
    where, found = f"{source.subset.where}.conditioning_data_dir", source.masks
    assert found is not None
    masks: dict[str, list[File]] = {}
    for file in found.images.values():
        masks.setdefault(stem(file.name), []).append(file)
    bare = [entry.name for entry in entries if stem(entry.image.name) not in masks]
    if bare:
        raise DatasetError(
            f"{where}: {some(bare, 'image')} without a mask of the same name in {found.folder}: {listed(bare)}; "
            "add them, white where all is to be learned"
        )
    several = [entry.name for entry in entries if len(masks[stem(entry.image.name)]) > 1 or entry.mask]
    if several:
        raise DatasetError(f"{where}: images with more than one mask: {listed(several)}; remove one of each")
    masked = [dataclasses.replace(entry, mask=masks.pop(stem(entry.image.name))[0]) for entry in entries]
    notes = [f"{where}: its images are masks; light is learned, dark is not"]
    if masks:
        notes.append(f"{where}: masks without an image: {listed(file.name for [file] in masks.values())}")
    return masked, notes


# -- notes


def _subset_notes(subset: Subset, entries: Sequence[Entry]) -> Iterator[str]:
    where, values = subset.where, subset.values
    for key, instead in WITHOUT_EFFECT.items():
        if values.get(key):
            yield f"{where}: {key} has no effect, {instead}"
    if values.get("color_aug"):
        yield f"{where}: color_aug changes hue and brightness a little in each variation"
    texts = [entry.name for entry in entries if any(kind(file.name) == ".txt" for file in entry.captions)]
    if texts and "caption_extension" not in values:
        yield f"{where}: .txt captions are taken; sd-scripts wants caption_extension = '.txt' for that"
    if not values.get("enable_bucket", False):
        dataset = f"datasets[{subset.group}]"
        yield f"{dataset}: every image is cropped to the resolution; set enable_bucket = true for aspect buckets"
        idle = [key for key in ("min_bucket_reso", "max_bucket_reso", "bucket_no_upscale") if values.get(key)]
        if idle:
            yield f"{dataset}: without enable_bucket no effect of {', '.join(idle)}"


# -- validation


def _held_back(dataset: Dataset, splits: Sequence[tuple[float, int]]) -> Dataset:
    """Each dataset of the file with the part held back that it asks for."""
    for part, seed in sorted({split for split in splits if split[0]}):
        others = [
            i for i, concept in enumerate(dataset.concepts) if concept.kind == "training" and splits[i] != (part, seed)
        ]
        asked = _with_kind(dataset, others, "validation")  # which is never split
        dataset = _with_kind(split_validation(asked, part, seed), others, "training")
    held = {_path(dataset.samples[index]) for index in dataset.members("validation")}
    trained = [
        dataset.samples[index].id
        for index in dataset.members("training", "regularisation")
        if _path(dataset.samples[index]) in held
    ]
    if trained:
        return dataset.with_samples(
            dataset.samples,
            f"validation images that another dataset of the file trains on: {listed(trained)}; set the same "
            "validation_split and validation_seed in [general]",
        )
    return dataset


def _path(sample: Sample) -> str:
    return sample.picture.path if isinstance(sample.picture, FilePicture) else sample.id


def _with_kind(dataset: Dataset, indices: Sequence[int], kind_: str) -> Dataset:
    concepts = (
        dataclasses.replace(concept, kind=kind_) if i in indices else concept
        for i, concept in enumerate(dataset.concepts)
    )
    return dataclasses.replace(dataset, concepts=tuple(concepts))
