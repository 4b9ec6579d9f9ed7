"""Nodes that read and write LoRA files."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import loras, saving
from ..kernels.metadata import trigger_words
from ..kernels.safetensors_io import load_tensors
from .compat import build
from .sockets import CATEGORY, LORA_MODEL, explained

IF_FILE_EXISTS = {
    "number": "writes name-2, name-3, … beside it",
    "overwrite": "replaces it",
}


class LoomLoadLoRA(io.ComfyNode):
    """File or run → LORA_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return build(
            io.Schema,
            node_id="LoomLoadLoRA",
            display_name="Read LoRA",
            category=CATEGORY,
            description=(
                "Reads a LoRA without putting it on a MODEL: to go on training with it (start_from of the LoRA "
                "Trainer), to save it in another format, or for the socket of a loader. Takes files, and what runs "
                "have kept."
            ),
            search_aliases=["load lora", "open lora", "lora file", "resume", "checkpoint"],
            inputs=[
                io.Combo.Input(
                    "source",
                    options=loras.sources(),
                    tooltip=(
                        "A file from the loras folders, or what a run keeps in output/lora_loom: its LoRA, the best by "
                        "validation loss, the moving average (ema), or the one of a step."
                    ),
                ),
            ],
            outputs=[
                LORA_MODEL.Output("lora", display_name="lora", tooltip="The LoRA with its metadata."),
                io.String.Output(
                    "trigger_words", display_name="trigger_words", tooltip="Words the LoRA was trained to react to."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, source: Any = None, **_: Any) -> str | float:
        """Changes with the file; runs before execute and on unchecked strings, so it never raises."""
        if source is None:  # linked: its value is not known yet
            return float("nan")
        return loras.source_state(source)

    @classmethod
    def execute(cls, source: str) -> io.NodeOutput:
        lora = loras.load_source(source)
        return io.NodeOutput(lora, ", ".join(trigger_words(lora.metadata)))


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
            search_aliases=["save lora", "export lora", "write lora", "convert lora"],
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
                build(
                    io.Combo.Input,
                    "format",
                    optional=True,
                    options=list(saving.FORMATS),
                    default=saving.AS_IT_IS,
                    tooltip=f"What the layers are called in the file.\n{explained(saving.FORMATS)}",
                    advanced=True,
                ),
                build(
                    io.Combo.Input,
                    "for_core",
                    optional=True,
                    options=list(saving.FOR_CORE),
                    default=saving.AS_TRAINED,
                    tooltip=f"For ComfyUI's own LoRA loaders.\n{explained(saving.FOR_CORE)}",
                    advanced=True,
                ),
                io.Model.Input(
                    "model", optional=True, tooltip="What it was trained on. Needed for other formats and for for_core."
                ),
                io.Clip.Input("clip", optional=True, tooltip="Needed with the MODEL where text encoders were trained."),
            ],
            outputs=[io.String.Output("file", display_name="name", tooltip="The name a LoRA loader lists it under.")],
        )

    @classmethod
    def execute(
        cls,
        lora: Any,
        name: str,
        if_file_exists: str,
        format: str = saving.AS_IT_IS,
        for_core: str = saving.AS_TRAINED,
        model: Any = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        place = loras.place_for(name) if if_file_exists == "overwrite" else loras.free_place_for(name)
        written, notes = saving.save(load_tensors(lora), place, format, for_core, model, clip)
        listed = loras.listed_name(written)
        return io.NodeOutput(listed, ui={"text": [listed, *notes]})
