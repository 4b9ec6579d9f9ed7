"""Nodes that bring datasets into the graph."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import folders
from ..training.data import describe, folder_state, scan_folder
from .compat import build
from .sockets import CATEGORY, LOOM_DATASET

NO_FOLDER = "(no folder with images yet)"


class LoomDatasetLoader(io.ComfyNode):
    """A folder of captioned images → dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetLoader",
            display_name="Dataset Loader",
            category=CATEGORY,
            description=(
                "Reads a folder of images with captions. The caption of cat.png is the text in cat.txt beside it. "
                "Images are turned upright, laid onto white where transparent, and sorted into aspect buckets."
            ),
            search_aliases=["lora dataset", "training images", "image folder", "captions", "load dataset"],
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
                    options=list(folders.all_folders()) or [NO_FOLDER],
                    tooltip=(
                        "The folder of images, folders inside it included. The list shows the folders of all roots; "
                        "press R in the graph to renew it. A dot is the root itself."
                    ),
                ),
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
            ],
            outputs=[
                build(
                    LOOM_DATASET.Output,
                    "dataset",
                    display_name="dataset",
                    tooltip="The images and captions, to train on.",
                ),
                build(
                    io.String.Output,
                    "report",
                    display_name="report",
                    tooltip="How many images were found, the sizes they are trained at, and anything worth knowing.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, root: Any = None, folder: Any = None, **_: Any) -> str | float:
        """Changes with the files in the folder; runs before execute and on unchecked strings, so it never raises."""
        if root is None or folder is None:  # linked: their values are not known yet
            return float("nan")
        try:
            return folder_state(folders.resolve(root, folder))
        except (OSError, ValueError) as error:
            return str(error)

    @classmethod
    def execute(cls, root: str, folder: str, resolution: int, bucket_step: int) -> io.NodeOutput:
        dataset = scan_folder(folders.resolve(root, folder), resolution, bucket_step, folders.is_registered)
        return io.NodeOutput(dataset, describe(dataset))
