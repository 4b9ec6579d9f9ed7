"""The node that edits captions by a program: lines of text that the workflow carries, run anew with every dataset."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import folders
from ..host.checking import findings_for, stepping, token_counter
from ..host.editing import EDITING
from ..training.dataset.edit_program import OPERATIONS, parse_program, run_program, shortened
from ..training.dataset.lint_knowledge import TagKnowledge, read_knowledge
from ..training.dataset.model import Dataset, DatasetError, some
from ..training.dataset.operations import Change, Known, Operation
from .compat import build
from .sockets import CATEGORY, LOOM_DATASET, chosen, dataset_outputs, explained, node_id, table_widget

IF_NOTHING_MATCHES = {
    "note": "a line that changes no image is named in the report",
    "error": "such a line stops the workflow: it is probably misspelt",
}
PROGRAM_HELP = (
    "One edit per line, for all images, or those of a filter behind where. Texts stand in quotes, * and ? are "
    "wildcards, lines with # are comments.\n"
    + "\n".join(kind.SYNTAX for kind in OPERATIONS)
    + '\nfollowed by: where tag:cat AND NOT path:dogs | for "name.png", …'
)


class LoomTagEditor(io.ComfyNode):
    """Dataset and edit program → dataset."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomTagEditor",
            display_name="Tag Editor",
            category=f"{CATEGORY}/dataset",
            description="Edits the captions of a dataset by a program that you can read: add, remove, rename, move, "
            "sort and respell tags, for all images or those a filter selects. Caption files stay as they are.",
            search_aliases=["edit tags", "edit captions", "tag editor", "booru", "rename tags", "trigger word"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                LOOM_DATASET.Input("dataset", tooltip="The dataset to edit; it stays as it is."),
                io.String.Input("program", multiline=True, default="", tooltip=PROGRAM_HELP),
                io.Combo.Input(
                    "if_nothing_matches",
                    options=list(IF_NOTHING_MATCHES),
                    default="note",
                    optional=True,
                    tooltip=explained(IF_NOTHING_MATCHES),
                ),
                table_widget(
                    "implications",
                    "Tags that imply others, for add implied and remove implied: antecedent, consequent.",
                    optional=True,
                ),
                io.Clip.Input("clip", optional=True, tooltip="Counts tokens, for tokens: in a filter."),
            ],
            outputs=dataset_outputs("What each line changed, and what of it had no effect.", "edited_dataset"),
        )

    @classmethod
    def fingerprint_inputs(cls, implications: Any = folders.NONE, **_: Any) -> str:
        """Changes with the table; runs on unchecked strings, so it never raises."""
        try:
            return folders.file_state(folders.resolve_table(implications, "implications"))
        except (OSError, ValueError) as error:
            return str(error)

    @classmethod
    def execute(
        cls,
        dataset: Dataset,
        program: str,
        if_nothing_matches: str = "note",
        implications: str = folders.NONE,
        clip: Any = None,
    ) -> io.NodeOutput:
        strict = chosen("if_nothing_matches", if_nothing_matches, IF_NOTHING_MATCHES) == "error"
        EDITING.keep(node_id(cls), dataset, clip)
        operations = parse_program(program)
        if not operations:
            return io.NodeOutput(dataset, "the program is empty: nothing was edited")
        known = Known(
            read_knowledge(None, folders.resolve_table(implications, "implications")) or TagKnowledge(),
            token_counter(clip),
            lambda current, where: findings_for(current, where, "", node_id(cls)),
        )
        advance = stepping(len(operations), node_id(cls))

        def done(operation: Operation, change: Change) -> None:
            advance()
            if strict and not change.count:
                why = "".join(f"; {note}" for note in change.notes)
                raise DatasetError(
                    f"program: “{shortened(operation.line)}” changes no image{why}: correct or remove the line, or set "
                    "if_nothing_matches to note"
                )

        edited, notes = run_program(dataset, operations, known, done)
        changed = [new.id for old, new in zip(dataset.samples, edited.samples, strict=True) if old != new]
        note = f"edited: {some(changed, 'image')} by {some(operations, 'line')} of a program; files stay as they are"
        return io.NodeOutput(edited.with_samples(edited.samples, note), "\n".join([*notes, note]))
