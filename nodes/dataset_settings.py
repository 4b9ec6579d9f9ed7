"""Settings of a dataset: how captions are shown, how images are varied, how a concept counts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..training.dataset.model import CROPS, KINDS, LINES, CaptionOptions, ImageOptions
from ..training.dataset.settings import ConceptSettings
from .compat import build
from .sockets import (
    LOOM_CAPTION_SETTINGS,
    LOOM_CONCEPT_SETTINGS,
    LOOM_IMAGE_SETTINGS,
    explained,
    settings_schema,
)


def _part(name: str, default: float, most: float, tooltip: str) -> Any:
    """A number from 0 to ``most``."""
    return build(io.Float.Input, name, default=default, min=0.0, max=most, step=0.01, round=False, tooltip=tooltip)


def listed_words(text: str) -> tuple[str, ...]:
    """``"a, b c"`` as ("a", "b c")."""
    return tuple(word.strip() for word in text.replace("\n", ",").split(",") if word.strip())


class LoomCaptionSettings(io.ComfyNode):
    """How a caption becomes the text of one presentation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = CaptionOptions()
        return settings_schema(
            "LoomCaptionSettings",
            "Caption Settings",
            "What is made of the captions each time an image is shown: trigger word, shuffled and dropped tags, "
            "wildcards. The caption files stay as they are.",
            [
                io.String.Input(
                    "trigger",
                    default=default.trigger,
                    tooltip="Put in front of every caption that does not begin with it, and the caption of images "
                    "without one. It always stays in front and is never dropped with single tags.",
                ),
                io.String.Input("prefix", default=default.prefix, tooltip="Put in front of every caption."),
                io.String.Input("suffix", default=default.suffix, tooltip="Put behind every caption."),
                io.Combo.Input(
                    "lines",
                    options=list(LINES),
                    default=default.lines,
                    tooltip="Which lines of a caption with several are used.\n" + explained(LINES),
                ),
                io.Boolean.Input(
                    "wildcards",
                    default=default.wildcards,
                    tooltip="{red|blue} picks one of the words each time. Write {{ and }} for braces.",
                ),
                io.String.Input("separator", default=default.separator, tooltip="What stands between two tags."),
                io.Boolean.Input(
                    "shuffle",
                    default=default.shuffle,
                    tooltip="Put the tags in another order each time, so that none is learned by its place.",
                ),
                io.Int.Input(
                    "keep_tokens",
                    default=default.keep_tokens,
                    min=0,
                    max=1000,
                    tooltip="So many tags stay in front, neither shuffled nor dropped.",
                ),
                io.String.Input(
                    "keep_tokens_separator",
                    default=default.keep_tokens_separator,
                    tooltip="A mark in the captions, e.g. |||. What stands before the first and behind the second "
                    "stays in place; it counts instead of keep_tokens.",
                ),
                io.String.Input(
                    "secondary_separator",
                    default=default.secondary_separator,
                    tooltip="A mark between tags that are shuffled and dropped together, e.g. ;;;. "
                    "It becomes the separator in the end.",
                ),
                _part(
                    "dropout",
                    default.dropout,
                    1.0,
                    "How often an image is shown without any caption, as a part: 0.1 is every tenth time. It helps "
                    "the LoRA at low guidance.",
                ),
                io.Int.Input(
                    "dropout_every_n_epochs",
                    default=default.dropout_every_n_epochs,
                    min=0,
                    max=100000,
                    tooltip="Show all images without captions in every n-th epoch. 0 is never.",
                ),
                _part("tag_dropout", default.tag_dropout, 1.0, "How often each single tag is left out, as a part."),
                io.String.Input(
                    "never_drop",
                    default="",
                    tooltip="Tags that tag_dropout leaves alone, separated by commas; * stands for any text.",
                ),
                io.String.Input(
                    "only_drop",
                    default="",
                    tooltip="If filled in, tag_dropout leaves out these tags only; commas between, * for any text.",
                ),
                io.Int.Input(
                    "warmup_min",
                    default=default.warmup_min,
                    min=0,
                    max=1000,
                    tooltip="Tags shown at the first step, if warmup_steps is on.",
                ),
                build(
                    io.Float.Input,
                    "warmup_steps",
                    default=default.warmup_steps,
                    min=0.0,
                    max=1000000.0,
                    step=0.1,
                    round=False,
                    tooltip="Steps until all tags are shown, from warmup_min at the first. Below 1, a part of the "
                    "whole run. 0 shows all from the beginning.",
                ),
                io.Boolean.Input(
                    "weighted",
                    default=default.weighted,
                    tooltip="Read (tag:1.2) as a weight, as prompts do. Off, brackets are just brackets.",
                ),
            ],
            LOOM_CAPTION_SETTINGS,
            "captions",
            of="dataset",
        )

    @classmethod
    def execute(cls, never_drop: str, only_drop: str, **options: Any) -> io.NodeOutput:
        for name in ("trigger", "prefix", "suffix"):
            options[name] = options[name].strip()
        never, only = listed_words(never_drop), listed_words(only_drop)
        return io.NodeOutput(CaptionOptions(never_drop=never, only_drop=only, **options))


class LoomImageSettings(io.ComfyNode):
    """How an image becomes the pixels of one variation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = ImageOptions()
        return settings_schema(
            "LoomImageSettings",
            "Image Settings",
            "Crops, mirroring, colour changes, transparency and masks. Several variations of each image are prepared "
            "once, before training.",
            [
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=default.crop,
                    tooltip="Which part is kept where an image does not fit its bucket.\n" + explained(CROPS),
                ),
                *(
                    build(
                        io.Float.Input,
                        name,
                        default=0.0,
                        min=0.0,
                        max=100.0,
                        step=0.1,
                        round=False,
                        tooltip=f"{text} size of a random crop around the focus box, in sizes of that box. "
                        "0 in both crops no closer than the bucket asks.",
                    )
                    for name, text in (("zoom_min", "Smallest"), ("zoom_max", "Largest"))
                ),
                io.Boolean.Input(
                    "flip",
                    default=default.flip,
                    tooltip="Show half of the variations mirrored. Not for what differs between left and right, and "
                    "not for writing.",
                ),
                build(
                    io.Float.Input,
                    "rotate",
                    default=default.rotate,
                    min=0.0,
                    max=45.0,
                    step=0.5,
                    round=False,
                    tooltip="Turn by up to so many degrees either way; enlarged so that no corner stays empty.",
                ),
                _part("brightness", default.brightness, 1.0, "Largest change of brightness: 0.1 is up to 10 %."),
                _part("contrast", default.contrast, 1.0, "Largest change of contrast: 0.1 is up to 10 %."),
                _part("saturation", default.saturation, 1.0, "Largest change of saturation: 0.1 is up to 10 %."),
                _part("hue", default.hue, 0.5, "Largest shift of hue, as a part of the colour circle."),
                io.String.Input(
                    "background",
                    default=default.background,
                    tooltip="Colour that transparent images are laid onto, e.g. #ffffff or white.",
                ),
                io.Boolean.Input(
                    "alpha_mask",
                    default=default.alpha_mask,
                    tooltip="Use transparency as loss mask: what is transparent is not learned.",
                ),
                _part(
                    "mask_floor",
                    default.mask_floor,
                    1.0,
                    "How much of what a mask leaves out is learned all the same, as a part.",
                ),
                io.Boolean.Input(
                    "invert_mask", default=default.invert_mask, tooltip="Learn what is dark in the masks, not the rest."
                ),
                io.Int.Input(
                    "variations",
                    default=default.variations,
                    min=0,
                    max=1000,
                    tooltip="How many of each image are prepared. 0 is automatic: 1, or 2 if mirrored, 8 if "
                    "anything else is random.",
                ),
            ],
            LOOM_IMAGE_SETTINGS,
            "images",
            of="dataset",
        )

    @classmethod
    def execute(cls, zoom_min: float, zoom_max: float, **options: Any) -> io.NodeOutput:
        zoom = (zoom_min, zoom_max) if zoom_min or zoom_max else None
        return io.NodeOutput(ImageOptions(zoom=zoom, **options))


class LoomConceptSettings(io.ComfyNode):
    """How a concept counts, and which sizes it may be trained at."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = ConceptSettings()
        return settings_schema(
            "LoomConceptSettings",
            "Concept Settings",
            "What the images are for, how often they are shown, how much they count, and which sizes they may be "
            "trained at.",
            [
                io.Combo.Input("kind", options=list(KINDS), default=default.kind, tooltip=explained(KINDS)),
                io.Int.Input(
                    "samples_per_epoch",
                    default=default.samples_per_epoch,
                    min=0,
                    max=1000000,
                    tooltip="Images shown per epoch, whatever the folder holds; they take turns. 0 shows each as often "
                    "as repeats says.",
                ),
                build(
                    io.Float.Input,
                    "loss_weight",
                    default=default.loss_weight,
                    min=0.0,
                    max=1000.0,
                    step=0.05,
                    round=False,
                    tooltip="How much these images count in the loss; of regularisation images, the prior loss weight.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=default.batch_size,
                    min=0,
                    max=1024,
                    tooltip="Batch size of these images instead of the trainer's. 0 is the trainer's.",
                ),
                _part(
                    "validation_split",
                    default.validation_split,
                    0.99,
                    "The part of the images that is kept out of training and watched: 0.1 is every tenth. Equal "
                    "images never end up on both sides.",
                ),
                io.Int.Input(
                    "validation_seed",
                    default=default.validation_seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Another number keeps out other images.",
                ),
                io.Boolean.Input(
                    "bucketing",
                    default=default.bucketing,
                    tooltip="Train each image in about its own aspect ratio. Off, all are cropped to the resolution.",
                ),
                build(
                    io.Float.Input,
                    "max_aspect",
                    default=default.max_aspect,
                    min=1.0,
                    max=16.0,
                    step=0.5,
                    round=False,
                    tooltip="The longest bucket: its long side over its short side. Longer images are cropped.",
                ),
                *(
                    io.Int.Input(
                        name,
                        default=0,
                        min=0,
                        max=16384,
                        step=8,
                        tooltip=f"{text} side of a bucket in pixels. 0 follows from max_aspect.",
                    )
                    for name, text in (("min_side", "Shortest"), ("max_side", "Longest"))
                ),
                io.Boolean.Input(
                    "upscale",
                    default=default.upscale,
                    tooltip="Enlarge images that are smaller than the resolution. Off, they are trained at their size.",
                ),
                io.Boolean.Input(
                    "merge",
                    default=default.merge,
                    tooltip="Move images to a neighbouring bucket where that saves a thin batch, if little is lost.",
                ),
            ],
            LOOM_CONCEPT_SETTINGS,
            "concept",
            of="dataset",
        )

    @classmethod
    def execute(cls, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(ConceptSettings(**options))
