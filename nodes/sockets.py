"""The types that travel between our nodes, and helpers to describe them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comfy_api.latest import io

from .compat import build

CATEGORY = "LoRA Loom"

LOOM_DATASET = io.Custom("LOOM_DATASET")
LOOM_CAPTION_SETTINGS = io.Custom("LOOM_CAPTION_SETTINGS")
LOOM_IMAGE_SETTINGS = io.Custom("LOOM_IMAGE_SETTINGS")
LOOM_CONCEPT_SETTINGS = io.Custom("LOOM_CONCEPT_SETTINGS")
LORA_MODEL = io.Custom("LORA_MODEL")  # the host's own
LOSS_MAP = io.Custom("LOSS_MAP")  # the host's own
LOOM_ADAPTER_SETTINGS = io.Custom("LOOM_ADAPTER_SETTINGS")
LOOM_OPTIMIZER_SETTINGS = io.Custom("LOOM_OPTIMIZER_SETTINGS")
LOOM_OBJECTIVE_SETTINGS = io.Custom("LOOM_OBJECTIVE_SETTINGS")
LOOM_RUN_SETTINGS = io.Custom("LOOM_RUN_SETTINGS")
LOOM_PREVIEW_SETTINGS = io.Custom("LOOM_PREVIEW_SETTINGS")


def explained(table: dict[str, str]) -> str:
    """A table of choices as tooltip lines."""
    return "\n".join(f"{name}: {text}" for name, text in table.items())


def settings_schema(
    node_id: str, name: str, description: str, inputs: list, socket: Any, output: str, of: str = "training"
) -> io.Schema:
    """A node that gathers options into one socket, of the trainer or (``of`` "dataset") of the dataset loader."""
    aliases, owner = {
        "training": (["lora settings", "training options", output.replace("_", " ")], "trainer"),
        "dataset": (["dataset settings", f"{output} settings", output], "loader"),
    }[of]
    return build(
        io.Schema,
        node_id=node_id,
        display_name=name,
        category=f"{CATEGORY}/settings",
        description=description,
        search_aliases=aliases,
        inputs=inputs,
        outputs=[
            socket.Output("settings", display_name=output, tooltip=f"Connect to this socket of the {owner}.")
        ],
    )


def dataset_outputs(report: str, socket: str = "dataset") -> list:
    """A dataset and what there is to say about it; ``socket`` must not be the id of an input."""
    return [
        LOOM_DATASET.Output(socket, display_name="dataset", tooltip="The images and captions, to train on."),
        io.String.Output("report", display_name="report", tooltip=report),
    ]


def chosen(widget: str, value: Any, choices: Iterable[str]) -> Any:
    """``value``, which must be one of the choices: not every host checks that itself."""
    if value not in (known := list(choices)):
        raise ValueError(f"{widget}: {str(value)[:60]!r} is unknown; choose one of {', '.join(known)}")
    return value


def single(name: str, values: list | None, default: Any = None) -> Any:
    """The one value of an input of a node that takes lists."""
    if not values:
        return default
    if len(values) > 1:
        raise ValueError(f"{name}: a list of {len(values)} is connected, one is expected")
    return values[0]


def node_id(node: type[io.ComfyNode]) -> str | None:
    """The running node's id, for messages to the page."""
    return getattr(node.hidden, "unique_id", None)
