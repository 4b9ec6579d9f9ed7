"""Nodes that write LoRA files."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import loras
from ..kernels.safetensors_io import load_tensors, save_tensors
from .compat import build
from .sockets import CATEGORY, LORA_MODEL

IF_FILE_EXISTS = {
    "number": "writes name-2, name-3, … beside it",
    "overwrite": "replaces it",
}


class LoomSaveLoRA(io.ComfyNode):
    """LORA_MODEL → file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomSaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description=(
                "Writes a LoRA into the loras folder, with its training recipe in the file's metadata. Every LoRA "
                "loader reads it: Stable Diffusion 1, 2 and XL in the kohya convention, others in ComfyUI's own."
            ),
            search_aliases=["save lora", "export lora", "write lora"],
            is_output_node=True,
            inputs=[
                LORA_MODEL.Input("lora", tooltip="From the LoRA Trainer, or any node that makes a LORA_MODEL."),
                io.String.Input(
                    "name",
                    default="my_lora",
                    tooltip="File name without .safetensors; folders are allowed: style/mine.",
                ),
                io.Combo.Input(
                    "if_file_exists",
                    options=list(IF_FILE_EXISTS),
                    default="number",
                    tooltip="\n".join(f"{choice}: {text}" for choice, text in IF_FILE_EXISTS.items()),
                ),
            ],
            outputs=[io.String.Output("file", display_name="name", tooltip="The name a LoRA loader lists it under.")],
        )

    @classmethod
    def execute(cls, lora: Any, name: str, if_file_exists: str) -> io.NodeOutput:
        place = loras.place_for(name) if if_file_exists == "overwrite" else loras.free_place_for(name)
        written = save_tensors(load_tensors(lora), place)
        listed = loras.listed_name(written)
        return io.NodeOutput(listed, ui={"text": [listed]})
