"""Nodes that look at a dataset: the check with its fixes, and the contact sheet."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from comfy_api.latest import io

from ..host import folders
from ..host.checking import badge_of, check, stepping, token_counter
from ..training.dataset import sheet
from ..training.dataset.fixes import apply_fixes
from ..training.dataset.lint import report as lint_report
from ..training.dataset.lint_knowledge import read_knowledge
from ..training.dataset.model import Dataset
from .compat import build
from .sockets import CATEGORY, LOOM_DATASET, chosen, dataset_outputs, explained, node_id, table_widget

CHECKS = {
    "quick": "headers and captions, also of thousands of images at once",
    "full": "pixels too: duplicates, blur, compression, borders; about 20 ms per image",
}


class LoomDatasetLint(io.ComfyNode):
    """Dataset → findings, and the dataset with those fixes that are asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomDatasetLint",
            display_name="Check Dataset",
            category=f"{CATEGORY}/dataset",
            description="Looks for what spoils training: duplicates, blur, sizes, missing trigger words, contradicting "
            "tags, imbalance. Each finding has a rule id, what was measured, and a cure.",
            search_aliases=["dataset lint", "lint", "check captions", "find duplicates", "dataset quality", "fix tags"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                LOOM_DATASET.Input("dataset", tooltip="The dataset to check."),
                io.Clip.Input("clip", optional=True, tooltip="Counts the tokens of captions, if connected."),
                io.Combo.Input("checks", options=list(CHECKS), default="quick", tooltip=explained(CHECKS)),
                io.String.Input(
                    "thresholds",
                    default="",
                    tooltip="Other limits, separated by commas: D021=1.2, T010=25. A minus switches a rule off: -D002.",
                ),
                io.String.Input(
                    "fixes",
                    default="",
                    multiline=True,
                    tooltip="Ids of rules whose findings are to be put right, one per line or with commas: T002, T021. "
                    "Only the dataset in the graph changes; files stay as they are.",
                ),
                io.Boolean.Input(
                    "style", default=False, tooltip="The dataset shows a style, not a character or thing: other counts."
                ),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=1024, tooltip="The trainer's batch size: it decides on buckets."
                ),
                table_widget("tag_list", "Known tags: name, category, count, aliases."),
                table_widget("implications", "Tags that imply others: antecedent, consequent."),
            ],
            outputs=[
                *dataset_outputs("Every finding with its cure, and what was fixed.", "fixed_dataset"),
                io.String.Output(
                    "findings", display_name="findings", tooltip="The findings as JSON, say for Dataset to Graph."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, tag_list: Any = folders.NONE, implications: Any = folders.NONE, **_: Any) -> str:
        """Changes with the tables; runs on unchecked strings, so it never raises."""
        try:
            return " ".join(folders.file_state(path) for path in _tables(tag_list, implications))
        except (OSError, ValueError) as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        checks: str,
        thresholds: str,
        fixes: str,
        style: bool,
        batch_size: int,
        tag_list: str,
        implications: str,
        clip: Any = None,
    ) -> io.NodeOutput:
        full = chosen("checks", checks, CHECKS) == "full"
        findings = check(
            dataset,
            node_id(cls),
            full=full,
            thresholds=thresholds,
            batch_size=batch_size,
            style=style,
            count_tokens=token_counter(clip),
            knowledge=read_knowledge(*_tables(tag_list, implications)),
        )
        rules = fixes.replace(",", " ").split()
        fixed = apply_fixes(dataset, findings, rules) if rules else dataset
        listed = json.dumps([dataclasses.asdict(finding) for finding in findings], ensure_ascii=False, indent=1)
        done = "".join(f"\nfixed: {note}" for note in fixed.notes[len(dataset.notes) :])
        return io.NodeOutput(fixed, lint_report(findings) + done, listed, ui=badge_of(findings))


def _tables(tag_list: Any, implications: Any) -> tuple:
    return folders.resolve_table(tag_list, "tag_list"), folders.resolve_table(implications, "implications")


class LoomContactSheet(io.ComfyNode):
    """Dataset → one picture of all crops and captions."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomContactSheet",
            display_name="Contact Sheet",
            category=f"{CATEGORY}/dataset",
            description="Shows every image as it is trained: cropped to its bucket, with its caption, grouped by size. "
            "What a mask leaves out is tinted; regularisation and validation images are marked.",
            search_aliases=["dataset preview", "show dataset", "bucket preview", "thumbnails", "image grid"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                LOOM_DATASET.Input("dataset", tooltip="The dataset to show."),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=1024, tooltip="The trainer's batch size: it decides on buckets."
                ),
                io.Int.Input("limit", default=sheet.LIMIT, min=1, max=sheet.MOST, tooltip="Images on one page."),
                io.Int.Input("page", default=1, min=1, max=100000, tooltip="Which page."),
                io.Int.Input(
                    "columns", default=sheet.COLUMNS, min=1, max=24, tooltip="How wide the sheet is, in square images."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="The trainer's seed: it draws random crops and colours.",
                ),
            ],
            outputs=[io.Image.Output("sheet", display_name="sheet", tooltip="The contact sheet, to preview or save.")],
        )

    @classmethod
    def execute(
        cls, dataset: Dataset, batch_size: int, limit: int, page: int, columns: int, seed: int
    ) -> io.NodeOutput:
        advance = stepping(min(limit, len(dataset.samples)), node_id(cls))
        picture = sheet.contact_sheet(dataset, batch_size, seed, limit, page, columns, advance)
        return io.NodeOutput(picture[None])
