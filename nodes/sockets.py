"""The types that travel between our nodes, and helpers to describe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from comfy_api.latest import io

from ..host import folders, presets
from ..training.options import Option, Settings, options_of
from ..training.presets import PRESETS
from .compat import build

CATEGORY = "LoRA Loom"
FINE_STEP = 0.05  # numbers with finer steps are kept as they are typed

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
LOOM_COMPONENT_SETTINGS = io.Custom("LOOM_COMPONENT_SETTINGS")
LOOM_PREVIEW_SETTINGS = io.Custom("LOOM_PREVIEW_SETTINGS")


def explained(table: Mapping[str, str]) -> str:
    """A table of choices as tooltip lines."""
    return "\n".join(f"{name}: {text}" for name, text in table.items())


def widgets(kind: type[Settings]) -> list:
    """The widgets of a settings class, from its own declarations."""
    first = kind.first_release or options_of(kind)
    return [
        _widget(name, declared, default, optional=name not in first)
        for name, (declared, default) in options_of(kind).items()
    ]


def _widget(name: str, declared: Option, default: Any, optional: bool) -> Any:
    details: dict[str, Any] = {
        "default": default,
        "tooltip": declared.tooltip,
        "advanced": declared.advanced,
        "optional": optional,
    }
    if declared.choices is not None:
        details["tooltip"] = f"{declared.tooltip}\n{explained(declared.table())}"
        return build(io.Combo.Input, name, options=list(declared.table()), **details)
    if isinstance(default, bool):
        return build(io.Boolean.Input, name, **details)
    if isinstance(default, str):
        return build(io.String.Input, name, multiline=declared.multiline, **details)
    bounds = {"min": declared.low, "max": declared.high} | ({"step": declared.step} if declared.step else {})
    if isinstance(default, int):
        fixed = {"control_after_generate": False} if name.endswith("seed") else {}
        return build(io.Int.Input, name, **bounds, **fixed, **details)
    # the host rounds numbers to their step unless told not to, which loses small ones
    exact = {"round": False} if declared.step and declared.step < FINE_STEP else {}
    return build(io.Float.Input, name, **bounds, **exact, **details)


def preset_widget() -> Any:
    """A combo that the page fills the other widgets from; in a prompt, options it lacks come from the preset."""
    return io.Combo.Input(
        "preset",
        options=presets.names(),
        default=presets.NONE,
        optional=True,
        tooltip="Fills the widgets of this node. On the trainer also those of the settings nodes connected to it, and "
        "what the preset says for sockets that are not connected.\n"
        + explained({preset.name: preset.description for preset in PRESETS.values()}),
    )


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


def table_widget(name: str, tooltip: str, **more: Any) -> Any:
    """The choice of a table of tags, or none."""
    return io.Combo.Input(
        name,
        options=[folders.NONE, *folders.list_tables()],
        default=folders.NONE,
        tooltip=f"{tooltip} A .csv file in the datasets folder.",
        **more,
    )


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
