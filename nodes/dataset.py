"""Nodes that bring datasets into the graph: from a folder or file, from images of the graph, from several datasets."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import folders
from ..host.checking import badge_of, check
from ..host.editing import EDITING
from ..training.dataset.balancing import balanced
from ..training.dataset.combining import combine
from ..training.dataset.describe import describe
from ..training.dataset.graph import dataset_of, frames
from ..training.dataset.lint import report as lint_report
from ..training.dataset.model import CaptionOptions, Dataset, ImageOptions
from ..training.dataset.opening import dataset_state, open_dataset
from ..training.dataset.settings import ConceptSettings, concept_from, split
from .compat import build
from .sockets import (
    CATEGORY,
    LOOM_CAPTION_SETTINGS,
    LOOM_CONCEPT_SETTINGS,
    LOOM_DATASET,
    LOOM_IMAGE_SETTINGS,
    chosen,
    dataset_outputs,
    explained,
    node_id,
    single,
)

NO_FOLDER = "(no folder with images yet)"
IF_UNREADABLE = {
    "error": "stop and name the files that cannot be read",
    "skip": "leave them out and name them in the report",
}
SUBFOLDERS = {
    "10_name sets repeats": "a folder 10_cat is a concept of its own: shown 10 times per epoch, cat the caption of "
    "images without one",
    "plain": "names of folders mean nothing",
}
CHECKS = {
    "quick": "headers and captions",
    "full": "pixels too: duplicates, blur, compression, borders; about 20 ms per image",
    "off": "no check",
}
BALANCE = {
    "as given": "repeats stay as they are",
    "equal presentations": "repeats are set such that every training concept is shown equally often per epoch",
    "weighted presentations": "the same, with the present repeats as weights: 2 is shown twice as often as 1",
}


def _sizes() -> list:
    return [
        build(
            io.Int.Input,
            "resolution",
            default=512,
            min=16,
            max=4096,
            step=8,
            tooltip=(
                "Images are trained at about resolution × resolution pixels, in their own aspect ratio. Use "
                "what the base model was made for: 512 for SD1.5, 1024 for SDXL and newer models."
            ),
        ),
        build(
            io.Int.Input,
            "bucket_step",
            default=64,
            min=8,
            max=256,
            step=8,
            advanced=True,
            tooltip=(
                "Widths and heights are multiples of this. Smaller crops less, but spreads the images over "
                "more sizes, and a batch holds one size only, so batches get smaller. 64 suits most models."
            ),
        ),
    ]


def _concept_widgets() -> list:
    return [
        build(
            io.String.Input,
            "more_resolutions",
            default="",
            optional=True,
            tooltip="Further sizes every image is trained at, e.g. 768, 1024 or 832x1216. Each counts as a "
            "presentation of its own.",
        ),
        build(
            io.Float.Input,
            "repeats",
            default=1.0,
            min=0.001,
            max=10000.0,
            step=0.1,
            round=False,
            optional=True,
            tooltip="How often each image is shown per epoch. Fractions are exact: 1.5 shows every image three times "
            "in two epochs.",
        ),
        build(
            io.String.Input,
            "trigger",
            default="",
            optional=True,
            tooltip="A word put in front of every caption that does not begin with it; the caption of images without "
            "one.",
        ),
    ]


def _settings_sockets(captions: str, images: str, concept: str) -> list:
    return [
        LOOM_CAPTION_SETTINGS.Input(
            captions, optional=True, tooltip="How captions are shown. Without: as they are written."
        ),
        LOOM_IMAGE_SETTINGS.Input(
            images, optional=True, tooltip="Crops, mirroring, colours, masks. Without: centre crops, unchanged."
        ),
        LOOM_CONCEPT_SETTINGS.Input(
            concept, optional=True, tooltip="Kind, weight, validation split, bucket limits. Without: training images."
        ),
    ]


class LoomDatasetLoader(io.ComfyNode):
    """A folder of captioned images, or a file that describes a dataset → dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetLoader",
            display_name="Dataset Loader",
            category=CATEGORY,
            description=(
                "Reads a folder of images with captions, or a dataset file: sd-scripts' TOML or JSON, or a list of "
                "images and captions in JSON or JSON Lines. The caption of cat.png is the text in cat.txt beside it. "
                "Images are turned upright, laid onto white where transparent, and sorted into aspect buckets."
            ),
            search_aliases=["lora dataset", "training images", "image folder", "captions", "load dataset", "kohya"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                build(
                    io.Combo.Input,
                    "root",
                    options=list(folders.roots()),
                    default="datasets",
                    tooltip=(
                        "Where the folder lies: datasets is ComfyUI/datasets and every datasets path in "
                        "extra_model_paths.yaml, input is the host's input folder."
                    ),
                ),
                build(
                    io.Combo.Input,
                    "folder",
                    options=list(folders.all_sources()) or [NO_FOLDER],
                    tooltip=(
                        "The folder of images, folders inside it included, or a dataset file (.toml, .json, .jsonl). "
                        "The list shows those of all roots; press R in the graph to renew it. A dot is the root "
                        "itself. What a file says goes before the widgets below."
                    ),
                ),
                *_sizes(),
                *_concept_widgets(),
                build(
                    io.Combo.Input,
                    "if_unreadable",
                    options=list(IF_UNREADABLE),
                    default="error",
                    optional=True,
                    tooltip="What to do with damaged files.\n" + explained(IF_UNREADABLE),
                ),
                build(
                    io.Combo.Input,
                    "subfolders",
                    options=list(SUBFOLDERS),
                    default="10_name sets repeats",
                    optional=True,
                    tooltip="What names of folders mean.\n" + explained(SUBFOLDERS),
                ),
                build(
                    io.Combo.Input,
                    "lint",
                    options=list(CHECKS),
                    default="quick",
                    optional=True,
                    tooltip="Look for faults that spoil training; they are in the report.\n" + explained(CHECKS),
                ),
                *_settings_sockets("captions", "images", "concept"),
            ],
            outputs=dataset_outputs("How many images were found, the sizes they are trained at, and what is wrong."),
        )

    @classmethod
    def fingerprint_inputs(cls, root: Any = None, folder: Any = None, **_: Any) -> str | float:
        """Changes with the files that are read; runs before execute and on unchecked strings, so it never raises."""
        if root is None or folder is None:  # linked: their values are not known yet
            return float("nan")
        try:
            return dataset_state(folders.resolve(root, folder), folders.access())
        except (OSError, ValueError) as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        root: str,
        folder: str,
        resolution: int,
        bucket_step: int,
        more_resolutions: str = "",
        repeats: float = 1.0,
        trigger: str = "",
        if_unreadable: str = "error",
        subfolders: str = "10_name sets repeats",
        lint: str = "quick",
        captions: CaptionOptions | None = None,
        images: ImageOptions | None = None,
        concept: ConceptSettings | None = None,
    ) -> io.NodeOutput:
        for widget, value, table in (
            ("if_unreadable", if_unreadable, IF_UNREADABLE),
            ("subfolders", subfolders, SUBFOLDERS),
            ("lint", lint, CHECKS),
        ):
            chosen(widget, value, table)
        defaults = concept_from(resolution, bucket_step, more_resolutions, repeats, trigger, captions, images, concept)
        dataset = open_dataset(
            folders.resolve(root, folder),
            defaults,
            folders.access(),
            if_unreadable=if_unreadable,
            subfolders="plain" if subfolders == "plain" else "repeats",
        )
        dataset = split(dataset, concept)
        EDITING.keep(node_id(cls), dataset)
        return _reported(dataset, lint, node_id(cls))


def _reported(dataset: Dataset, lint: str, node: str | None) -> io.NodeOutput:
    """The dataset as a node hands it out: with its report, the findings and the badge."""
    if lint == "off":
        return io.NodeOutput(dataset, describe(dataset))
    findings = check(dataset, node, full=lint == "full")
    return io.NodeOutput(dataset, f"{describe(dataset)}\n{lint_report(findings)}", ui=badge_of(findings))


class LoomDatasetFromImages(io.ComfyNode):
    """Images of the graph → dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetFromImages",
            display_name="Dataset from Images",
            category=f"{CATEGORY}/dataset",
            description="Makes a dataset of images, captions and masks that come out of the graph: a batch or a list.",
            search_aliases=["make dataset", "images to dataset", "lora dataset", "training images"],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="A batch, or a list of images of any sizes."),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="",
                    tooltip="One line for each image, or one for all. A list of texts gives one to each; the caption "
                    "of a single image may have several lines.",
                ),
                *_sizes(),
                io.Mask.Input(
                    "masks", optional=True, tooltip="One for each image, or one for all: light is learned, dark is not."
                ),
                *_concept_widgets(),
                *_settings_sockets("caption_settings", "image_settings", "concept_settings"),
            ],
            outputs=dataset_outputs("How many images there are, the sizes they are trained at, and what is wrong."),
        )

    @classmethod
    def execute(
        cls,
        images: list,
        captions: list,
        resolution: list,
        bucket_step: list,
        masks: list | None = None,
        more_resolutions: list | None = None,
        repeats: list | None = None,
        trigger: list | None = None,
        caption_settings: list | None = None,
        image_settings: list | None = None,
        concept_settings: list | None = None,
    ) -> io.NodeOutput:
        settings = single("concept_settings", concept_settings)
        concept = concept_from(
            single("resolution", resolution),
            single("bucket_step", bucket_step),
            single("more_resolutions", more_resolutions, ""),
            single("repeats", repeats, 1.0),
            single("trigger", trigger, ""),
            single("caption_settings", caption_settings),
            single("image_settings", image_settings),
            settings,
        )
        dataset = split(dataset_of(frames(images) or [], captions, frames(masks), concept), settings)
        return _reported(dataset, "quick", node_id(cls))


class LoomCombineDatasets(io.ComfyNode):
    """Several datasets → one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomCombineDatasets",
            display_name="Combine Datasets",
            category=f"{CATEGORY}/dataset",
            description="Trains on several datasets at once: several concepts, or a concept and regularisation images. "
            "Each keeps its own options.",
            search_aliases=["merge datasets", "join datasets", "multi concept", "regularisation", "balance"],
            inputs=[
                LOOM_DATASET.Input("dataset_1", tooltip="The first dataset."),
                LOOM_DATASET.Input("dataset_2", tooltip="The second dataset."),
                LOOM_DATASET.Input("dataset_3", optional=True, tooltip="A third one, if there is."),
                LOOM_DATASET.Input("dataset_4", optional=True, tooltip="A fourth one, if there is."),
                io.Combo.Input("balance", options=list(BALANCE), default="as given", tooltip=explained(BALANCE)),
            ],
            outputs=dataset_outputs("What was put together, and how often each concept is shown."),
        )

    @classmethod
    def execute(
        cls,
        dataset_1: Dataset,
        dataset_2: Dataset,
        balance: str = "as given",
        dataset_3: Dataset | None = None,
        dataset_4: Dataset | None = None,
    ) -> io.NodeOutput:
        chosen("balance", balance, BALANCE)
        given = [dataset for dataset in (dataset_1, dataset_2, dataset_3, dataset_4) if dataset is not None]
        dataset = combine(given)
        if balance != "as given":
            dataset = balanced(dataset, "presentations", weights=balance == "weighted presentations")
        return io.NodeOutput(dataset, describe(dataset))
