"""The keys of sd-scripts' dataset configurations: which there are, where they may stand, and what they may hold.

- ``KEYS`` is the one table; ``read_config`` checks a TOML or JSON file against it and hands out its subsets, each with
  the values that count for it: those of the subset, else of its dataset, else of ``[general]``
- more is accepted than sd-scripts accepts: whole numbers for parts, ``"512,768"``, 0 and 1 for false and true,
  fractions as ``num_repeats``, several caption extensions, ``alpha_mask`` at every level
- an unknown key, a key at the wrong level and a wrong value are errors with the path of the key and the cure
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from .files import shown
from .metadata_files import parse_json, read_text
from .model import DatasetError, Size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

GENERAL, DATASETS, SUBSETS = "[general]", "[[datasets]]", "[[datasets.subsets]]"
OF_DATASETS = (GENERAL, DATASETS)
EVERYWHERE = (GENERAL, DATASETS, SUBSETS)
OF_SUBSETS = (SUBSETS,)
LONGEST_SIDE = 1 << 16
MOST_REPEATS = 1_000_000
FRACTION = re.compile(r"[0-9]{1,7}(/[0-9]{1,7}|\.[0-9]{1,7})?")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError
    return value


def _whole(value: Any) -> int:
    if _number(value) != int(value):
        raise ValueError
    return int(value)


def _side(value: Any) -> int:
    if not 1 <= _whole(value) <= LONGEST_SIDE:
        raise ValueError
    return int(value)


def _flag(value: Any) -> bool:
    if value not in (0, 1):
        raise ValueError
    return bool(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


def _table(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _times(value: Any) -> Fraction:
    if isinstance(value, str) and not FRACTION.fullmatch(value):
        raise ValueError
    times = Fraction(value) if isinstance(value, str) else Fraction(repr(_number(value)))
    if not 0 <= times <= MOST_REPEATS:
        raise ValueError
    return times


def _pair(value: Any) -> tuple[float, float]:
    first, second = value
    return float(_number(first)), float(_number(second))


def _resolutions(value: Any) -> tuple[Size, ...]:
    if isinstance(value, str):
        value = [int(side) for side in re.split(r"[,x×]", value)]
    sides = value if isinstance(value, list) else [value]
    width, height = sides * 2 if len(sides) == 1 else sides
    return ((_side(width), _side(height)),)


def _extensions(value: Any) -> tuple[str, ...]:
    names = [_text(name).strip().lower() for name in (value if isinstance(value, list) else [value])]
    if not names or not all(name.strip(".") for name in names):
        raise ValueError
    return tuple(name if name.startswith(".") else f".{name}" for name in names)


@dataclass(frozen=True)
class Key:
    levels: tuple[str, ...]
    expected: str
    read: Callable[[Any], Any]


def _keys(levels: tuple[str, ...], expected: str, read: Callable[[Any], Any], *names: str) -> dict[str, Key]:
    return {name: Key(levels, expected, read) for name in names}


KEYS: dict[str, Key] = {
    **_keys(OF_DATASETS, "a size, e.g. 512 or [512, 768]", _resolutions, "resolution"),
    **_keys(OF_DATASETS, "a number of pixels", _side, "bucket_reso_steps", "min_bucket_reso", "max_bucket_reso"),
    **_keys(OF_DATASETS, "a whole number", _whole, "batch_size", "validation_seed"),
    **_keys(OF_DATASETS, "true or false", _flag, "enable_bucket", "bucket_no_upscale"),
    **_keys(OF_DATASETS, "a number", _number, "validation_split", "network_multiplier"),
    **_keys(EVERYWHERE, "a number, 0 or more, or a fraction as \"1/3\"", _times, "num_repeats"),
    **_keys(EVERYWHERE, "true or false", _flag, "shuffle_caption", "enable_wildcard", "color_aug", "flip_aug"),
    **_keys(EVERYWHERE, "true or false", _flag, "random_crop", "alpha_mask", "cache_info"),
    **_keys(EVERYWHERE, "a text", _text, "caption_separator", "keep_tokens_separator", "secondary_separator"),
    **_keys(EVERYWHERE, "a text", _text, "caption_prefix", "caption_suffix", "class_tokens", "resize_interpolation"),
    **_keys(EVERYWHERE, "a whole number", _whole, "keep_tokens", "token_warmup_min", "caption_dropout_every_n_epochs"),
    **_keys(EVERYWHERE, "a number", _number, "token_warmup_step", "caption_dropout_rate", "caption_tag_dropout_rate"),
    **_keys(EVERYWHERE, "two numbers, e.g. [1.0, 3.0]", _pair, "face_crop_aug_range"),
    **_keys(EVERYWHERE, "a file extension, e.g. \".txt\"", _extensions, "caption_extension"),
    **_keys(EVERYWHERE, "a table", _table, "custom_attributes"),
    **_keys(OF_SUBSETS, "a path", _text, "image_dir", "metadata_file", "conditioning_data_dir"),
    **_keys(OF_SUBSETS, "true or false", _flag, "is_reg"),
}  # fmt: skip
COMMAND_LINE = {"train_batch_size": "batch_size", "dataset_repeats": "num_repeats", "in_json": "metadata_file",
                "train_data_dir": "image_dir", "reg_data_dir": "image_dir"}  # fmt: skip


@dataclass(frozen=True)
class Subset:
    """One subset with all values that count for it, its own, its dataset's and the general ones."""

    where: str  # datasets[0].subsets[1]
    group: int  # its dataset
    values: dict[str, Any]


def is_config(content: Any) -> bool:
    """Whether a JSON file holds a configuration and no list of captions."""
    return isinstance(content, dict) and isinstance(content.get("datasets"), (dict, list))


def read_config(path: Path) -> list[Subset]:
    """The subsets of a TOML or JSON configuration, checked; DatasetError names the file, the key and the cure."""
    text = read_text(path)
    try:
        return subsets(parse_json(text, path.name) if path.suffix.lower() == ".json" else _parse_toml(text))
    except DatasetError as error:
        message = str(error)
        raise DatasetError(message if message.startswith(path.name) else f"{path.name}: {message}") from error


def subsets(content: dict[str, Any]) -> list[Subset]:
    """The subsets of a parsed configuration."""
    for key in content:
        if key not in ("general", "datasets"):
            raise DatasetError(_unknown(key, key, ""))
    if not isinstance(content.get("general", {}), dict):
        raise DatasetError("general is no table; write [general] on a line of its own")
    general = _checked(content.get("general", {}), "general", GENERAL)
    found = []
    for group, dataset in enumerate(_tables(content, "datasets", DATASETS)):
        where = f"datasets[{group}]"
        own = {key: value for key, value in dataset.items() if key != "subsets"}
        of_dataset = _checked(own, where, DATASETS)
        for index, subset in enumerate(_tables(dataset, "subsets", SUBSETS, f"{where}.")):
            here = f"{where}.subsets[{index}]"
            found.append(Subset(here, group, {**general, **of_dataset, **_checked(subset, here, SUBSETS)}))
    return found


def _parse_toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise DatasetError("nested too deeply to be a dataset configuration") from error
    except ValueError as error:
        cure = "; write paths with backslashes in single quotes" if "\\" in str(error) else "; correct it there"
        raise DatasetError(f"no valid TOML: {error}{cure}") from error


def _tables(table: dict[str, Any], name: str, level: str, where: str = "") -> list[dict[str, Any]]:
    value = table.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise DatasetError(f"{where}{name} has to be at least one table; write {level} on a line of its own")
    return value


def _checked(table: dict[str, Any], where: str, level: str) -> dict[str, Any]:
    """The values of a table, read; one that is null counts as absent."""
    values = {}
    for name, value in table.items():
        key = KEYS.get(name)
        if key is None or level not in key.levels:
            raise DatasetError(_unknown(name, f"{where}.{name}", level))
        if value is None:
            continue
        try:
            values[name] = key.read(value)
        except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
            raise DatasetError(f"{where}.{name} is {shown(value)}, expected {key.expected}") from error
    return values


def _unknown(name: str, where: str, level: str) -> str:
    """What is wrong with a key that may not stand where it does."""
    if name in KEYS:
        return f"{where}: {name} cannot stand there; move it to {' or '.join(KEYS[name].levels)}"
    known = [key for key in KEYS if not level or level in KEYS[key].levels] + ["general", "datasets"] * (not level)
    near = [COMMAND_LINE[name]] if name in COMMAND_LINE else difflib.get_close_matches(name, known, 1, 0.0)
    return f"{where}: there is no key {shown(name)}; did you mean {near[0]}?"
