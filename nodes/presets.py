"""The node that keeps a preset of the user's own."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import presets
from ..kernels.metadata import json_object
from ..kernels.safetensors_io import load_tensors
from ..training.options import OptionError
from ..training.presets import from_recipe
from .compat import build
from .sockets import CATEGORY, LORA_MODEL, chosen, explained

IF_EXISTS = {"error": "stops with an error", "overwrite": "replaces it"}


class LoomSavePreset(io.ComfyNode):
    """LORA_MODEL → preset with the options it was trained with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomSavePreset",
            display_name="Save Training Preset",
            category=f"{CATEGORY}/settings",
            description=(
                "Keeps the options that a LoRA was trained with as a preset of your own, in the host's user folder. "
                "The trainer and the settings nodes then offer it under its name."
            ),
            search_aliases=["training preset", "save settings", "lora preset"],
            is_output_node=True,
            inputs=[
                LORA_MODEL.Input("lora", tooltip="From the LoRA Trainer, or a file it has written."),
                io.String.Input("name", default="my preset", tooltip="What the preset widgets call it."),
                io.Combo.Input(
                    "if_exists", options=list(IF_EXISTS), default="error", tooltip=explained(IF_EXISTS)
                ),
            ],
            outputs=[io.String.Output("saved", display_name="name", tooltip="The name it is offered under.")],
        )

    @classmethod
    def execute(cls, lora: Any, name: str, if_exists: str) -> io.NodeOutput:
        recipe = json_object(getattr(load_tensors(lora), "metadata", {}), "loom.recipe")
        if not recipe:
            raise OptionError("lora: it carries no recipe of a training; only LoRAs made by the LoRA Trainer do")
        path = presets.save(from_recipe(name, recipe), chosen("if_exists", if_exists, IF_EXISTS) == "overwrite")
        return io.NodeOutput(path.stem, ui={"text": [f"kept as preset {path.stem!r}"]})
