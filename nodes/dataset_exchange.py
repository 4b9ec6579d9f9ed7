"""Nodes between a dataset and the rest of the graph: pictures and captions out, edited ones back in, and TOML."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import exchange
from ..host.checking import findings_for, token_counter
from ..training.dataset.config_writing import to_toml
from ..training.dataset.describe import describe
from ..training.dataset.edits import CAPTION_MODES, IMAGE_MODES, update
from ..training.dataset.filters import select
from ..training.dataset.graph import frames
from ..training.dataset.model import Dataset, DatasetError
from .compat import build
from .sockets import CATEGORY, LOOM_DATASET, chosen, dataset_outputs, explained, node_id, single

FILTER_HELP = (
    "Which images. Empty is all.\n"
    "tag:hat  a whole tag; * and ? stand for other letters\n"
    "caption:words, name:words, path:words, concept:words  a part of them\n"
    "tags:>20, chars:<10, tokens:>75  how many\n"
    "lint:D021  a finding of that rule\n"
    "NOT, AND, OR and brackets combine; quotes hold words with spaces together."
)


class LoomDatasetToGraph(io.ComfyNode):
    """Dataset → lists of images, masks, captions and ids."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetToGraph",
            display_name="Dataset to Graph",
            category=f"{CATEGORY}/dataset",
            description="Sends images, masks and captions of a dataset into the graph, where any node can change them "
            "one by one. Update Dataset takes them back by their ids.",
            search_aliases=["edit dataset", "dataset images", "dataset captions", "select images", "filter dataset"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                LOOM_DATASET.Input("dataset", tooltip="The dataset to take from; it stays as it is."),
                io.String.Input("filter", default="", tooltip=FILTER_HELP),
                io.Int.Input("limit", default=0, min=0, max=1000000, tooltip="At most so many. 0 is all."),
                io.String.Input(
                    "findings",
                    default="",
                    optional=True,
                    force_input=True,
                    tooltip="From Check Dataset, for lint: in the filter. Without, the dataset is checked here.",
                ),
                io.Boolean.Input(
                    "with_images",
                    default=True,
                    optional=True,
                    tooltip="Off, nothing is decoded: captions and ids come out at once, and what is connected to "
                    "images or masks does not run.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Counts tokens, for tokens: in the filter."),
            ],
            outputs=[
                io.Image.Output(
                    "images",
                    display_name="images",
                    is_output_list=True,
                    tooltip="Whole, upright images, transparency laid onto the background.",
                ),
                io.Mask.Output(
                    "masks", display_name="masks", is_output_list=True, tooltip="The loss masks: light is learned."
                ),
                io.String.Output(
                    "captions", display_name="captions", is_output_list=True, tooltip="Captions as they are written."
                ),
                io.String.Output(
                    "ids", display_name="ids", is_output_list=True, tooltip="For Update Dataset, which takes them back."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        filter: str,
        limit: int,
        findings: str = "",
        with_images: bool = True,
        clip: Any = None,
    ) -> io.NodeOutput:
        known = findings_for(dataset, filter, findings, node_id(cls))
        indices = select(dataset, filter, known, token_counter(clip))
        if not indices:
            raise DatasetError(
                f"filter: no image matches {filter!r}; widen the filter, or bypass this node and what follows it"
            )
        indices = indices[: limit or None]
        images, masks = exchange.images_and_masks(dataset, indices, node_id(cls)) if with_images else exchange.NOTHING
        samples = [dataset.samples[index] for index in indices]
        return io.NodeOutput(images, masks, [sample.caption for sample in samples], [sample.id for sample in samples])


class LoomDatasetUpdate(io.ComfyNode):
    """Dataset, ids and what became of them → dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetUpdate",
            display_name="Update Dataset",
            category=f"{CATEGORY}/dataset",
            description="Takes changed images, masks and captions back into a dataset, by id. What is not connected "
            "stays. Files stay as they are.",
            search_aliases=["edit dataset", "replace images", "replace captions", "dataset from graph"],
            is_input_list=True,
            inputs=[
                LOOM_DATASET.Input("dataset", tooltip="The dataset that Dataset to Graph took from."),
                io.String.Input("ids", force_input=True, tooltip="The ids from Dataset to Graph, in the same order."),
                io.Image.Input("images", optional=True, tooltip="One image for each id, as a list or a batch."),
                io.Mask.Input("masks", optional=True, tooltip="One loss mask for each id, as a list or a batch."),
                io.String.Input("captions", optional=True, force_input=True, tooltip="One caption for each id."),
                io.Combo.Input(
                    "images_mode",
                    options=list(IMAGE_MODES),
                    default="replace",
                    optional=True,
                    tooltip=explained(IMAGE_MODES),
                ),
                io.Combo.Input(
                    "captions_mode",
                    options=list(CAPTION_MODES),
                    default="replace",
                    optional=True,
                    tooltip=explained(CAPTION_MODES),
                ),
            ],
            outputs=dataset_outputs("What was changed.", "updated_dataset"),
        )

    @classmethod
    def execute(
        cls,
        dataset: list,
        ids: list,
        images: list | None = None,
        masks: list | None = None,
        captions: list | None = None,
        images_mode: list | None = None,
        captions_mode: list | None = None,
    ) -> io.NodeOutput:
        given = single("dataset", dataset)
        updated = update(
            given,
            ids,
            images=frames(images),
            masks=frames(masks),
            captions=captions,
            images_mode=chosen("images_mode", single("images_mode", images_mode, "replace"), IMAGE_MODES),
            captions_mode=chosen("captions_mode", single("captions_mode", captions_mode, "replace"), CAPTION_MODES),
        )
        return io.NodeOutput(updated, describe(updated))


class LoomDatasetToTOML(io.ComfyNode):
    """Dataset → configuration text, and a file where it is asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetToTOML",
            display_name="Dataset to TOML",
            category=f"{CATEGORY}/dataset",
            description="The dataset's folders and options as sd-scripts' TOML, which the Dataset Loader reads too.",
            search_aliases=["export dataset", "save dataset config", "kohya toml", "sd-scripts"],
            is_output_node=True,
            inputs=[
                LOOM_DATASET.Input("dataset", tooltip="The dataset to describe."),
                io.Boolean.Input("save", default=False, tooltip="Also write the text into the output folder."),
                io.String.Input(
                    "name",
                    default="dataset",
                    tooltip="File name without .toml. A file that is there already is kept; the next number is taken.",
                ),
            ],
            outputs=[
                io.String.Output("text", display_name="toml", tooltip="The configuration."),
                io.String.Output("file", display_name="file", tooltip="The name of the file, empty if not saved."),
            ],
        )

    @classmethod
    def execute(cls, dataset: Dataset, save: bool, name: str) -> io.NodeOutput:
        text = to_toml(dataset)
        if not save:
            return io.NodeOutput(text, "")
        file = exchange.write_text(text, name, ".toml").name
        return io.NodeOutput(text, file, ui={"text": [file]})
