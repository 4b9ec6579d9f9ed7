"""Named sets of options: those that come with the pack, and how a user's own are written and read.

A preset holds, for each part of a run ("trainer" and the settings nodes), the options it sets; all others keep their
defaults. Presets only fill widgets: what counts is what the widgets say, and the recipe records both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .options import OptionError, Settings, options_of
from .settings import PARTS, Plan

TRAINER = "trainer"
NONE = "none"
VERSION = 1
KINDS: dict[str, type[Settings]] = {TRAINER: Plan, **PARTS}
NOT_IN_PRESETS = frozenset({"seed"})


@dataclass(frozen=True)
class Preset:
    """``parts``: part of the run -> option -> value."""

    name: str
    description: str
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options(self, part: str) -> dict[str, Any]:
        return dict(self.parts.get(part, {}))


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "character",
            "A person, animal or thing from 15 to 50 pictures: rank 16, 100 presentations of each picture.",
            {
                "trainer": {
                    "length": 100,
                    "unit": "presentations per image",
                    "learning_rate": 1e-4,
                    "rank": 16,
                    "alpha": 16.0,
                    "batch_size": 2,
                },
                "optimizer": {"schedule": "cosine", "warmup_steps": 20},
            },
        ),
        Preset(
            "style",
            "A style from 50 to 200 pictures: a larger rank on every layer, 35 presentations of each picture.",
            {
                "trainer": {
                    "length": 35,
                    "unit": "presentations per image",
                    "learning_rate": 1e-4,
                    "rank": 32,
                    "alpha": 16.0,
                    "batch_size": 4,
                },
                "adapter": {"layers": "full"},
                "optimizer": {"schedule": "cosine", "warmup_steps": 20},
            },
        ),
        Preset(
            "multi-concept",
            "Several concepts in one LoRA: one picture at a time, so that they do not blend, and a larger rank.",
            {
                "trainer": {
                    "length": 100,
                    "unit": "presentations per image",
                    "learning_rate": 1e-4,
                    "rank": 32,
                    "alpha": 32.0,
                    "batch_size": 1,
                },
                "optimizer": {"schedule": "cosine", "warmup_steps": 20},
            },
        ),
        Preset(
            "fast test",
            "Does it learn at all? A few minutes with a small adapter on the attention alone.",
            {
                "trainer": {
                    "length": 200,
                    "unit": "steps",
                    "learning_rate": 3e-4,
                    "rank": 8,
                    "alpha": 8.0,
                    "batch_size": 1,
                },
                "adapter": {"layers": "attention"},
            },
        ),
        Preset(
            "guide: Adam",
            "The written guide's way with Adam: 32/32 with convolutions at 16/1, cosine with restarts, bounded norms, "
            "min-SNR 5 with debiased estimation. For models with convolutions: SD 1, SD 2, SDXL.",
            {
                "trainer": {
                    "length": 100,
                    "unit": "presentations per image",
                    "learning_rate": 1e-4,
                    "rank": 32,
                    "alpha": 32.0,
                    "batch_size": 2,
                },
                "adapter": {
                    "layers": "full",
                    "conv_rank": 16,
                    "conv_alpha": 1.0,
                    "max_norm": 1.0,
                    "loraplus_ratio": 1.0,
                },
                "optimizer": {"schedule": "cosine with restarts", "cycles": 3.0},
                "objective": {"min_snr_gamma": 5.0, "debiased": True},
            },
        ),
        Preset(
            "guide: Prodigy",
            "The written guide's way with an optimizer that finds its own rate: rate 1, cosine, alpha 1. For models "
            "with convolutions: SD 1, SD 2, SDXL.",
            {
                "trainer": {
                    "length": 100,
                    "unit": "presentations per image",
                    "learning_rate": 1.0,
                    "rank": 32,
                    "alpha": 1.0,
                    "batch_size": 2,
                },
                "adapter": {
                    "layers": "full",
                    "conv_rank": 16,
                    "conv_alpha": 1.0,
                    "max_norm": 1.0,
                    "loraplus_ratio": 1.0,
                },
                "optimizer": {
                    "optimizer": "Prodigy",
                    "schedule": "cosine",
                    "weight_decay": 0.1,
                    "beta2": 0.99,
                    "optimizer_args": "decouple=True",
                },
                "objective": {"min_snr_gamma": 5.0, "debiased": True},
            },
        ),
    )
}


def label(part: str, preset: Preset | None, options: Mapping[str, Any]) -> str:
    """What the recipe says: the preset's name, and whether the widgets still say what it says."""
    if preset is None:
        return ""
    wanted = {name: default for name, (_, default) in options_of(KINDS[part]).items()} | preset.options(part)
    same = all(value == wanted[name] for name, value in options.items() if name not in NOT_IN_PRESETS)
    return preset.name if same else f"{preset.name}, changed"


def settings(part: str, preset: Preset | None, given: Mapping[str, Any]) -> Settings:
    """The settings of a part: the options given, else the preset's, else defaults."""
    options = {**(preset.options(part) if preset else {}), **given}
    return KINDS[part](**options, preset=label(part, preset, options))


def from_recipe(name: str, recipe: Mapping[str, Any]) -> Preset:
    """The preset that makes a run as the recipe of a LoRA says, but for its data and its seed."""
    parts: dict[str, dict[str, Any]] = {}
    for part, kind in KINDS.items():
        values = recipe if part == TRAINER else recipe.get(part, {})
        if not isinstance(values, Mapping):
            raise OptionError(f"lora: its recipe holds no options of {part!r}; use a LoRA made by the LoRA Trainer")
        parts[part] = {
            option: values[option]
            for option, (_, default) in options_of(kind).items()
            if option in values and option not in NOT_IN_PRESETS and (part == TRAINER or values[option] != default)
        }
    return checked(Preset(name, "from the recipe of a LoRA", parts))


def to_json(preset: Preset) -> str:
    content = {"version": VERSION, "description": preset.description, "parts": preset.parts}
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)


def from_json(name: str, text: str | bytes) -> Preset:
    """Raises OptionError naming the preset and what is wrong with it."""
    try:
        content = json.loads(text)
        if not isinstance(content, dict) or content.get("version") != VERSION:
            raise ValueError(f"it is not of version {VERSION}")
        return checked(Preset(name, str(content.get("description", "")), dict(content["parts"])))
    except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise OptionError(f"preset {name!r} cannot be used: {error}. Mend or delete its file") from error


def checked(preset: Preset) -> Preset:
    """The preset itself. Raises OptionError for options that do not exist or values out of range."""
    for part, values in preset.parts.items():
        if part not in KINDS:
            raise OptionError(f"there is no part {part!r}; known are {', '.join(KINDS)}")
        if not isinstance(values, Mapping):
            raise OptionError(f"{part} is {values!r}, expected options with their values")
        known = options_of(KINDS[part])
        for name, value in values.items():
            if name not in known:
                raise OptionError(f"{part} has no option {name!r}")
            declared, default = known[name]
            if not callable(declared.choices):  # an optimizer that is not installed here is told when it is used
                declared.check(name, value, default)
    return preset
