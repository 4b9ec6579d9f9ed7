"""Nodes that put a LoRA on a MODEL and a CLIP."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import loras
from ..host.apply import apply_lora
from ..kernels.metadata import trigger_words
from ..kernels.safetensors_io import load_tensors
from .compat import build
from .sockets import CATEGORY, LORA_MODEL

FROM_SOCKET = "(from the lora socket)"


class LoomLoRALoaderAdvanced(io.ComfyNode):
    """File or LORA_MODEL → MODEL, CLIP."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        def strength(name: str, what: str):
            return io.Float.Input(
                name,
                default=1.0,
                min=-100.0,
                max=100.0,
                step=0.01,
                tooltip=f"How strongly the LoRA acts on the {what}. 0 leaves it as it is; negative turns it around.",
            )

        return build(
            io.Schema,
            node_id="LoomLoRALoaderAdvanced",
            display_name="LoRA Loader (Advanced)",
            category=CATEGORY,
            description=(
                "Applies a LoRA to a MODEL and a CLIP: a file from the loras folder, or one that was trained a moment "
                "ago in this graph. Connect the lora socket to use the latter; it then counts instead of the file."
            ),
            search_aliases=["lora loader", "load lora", "apply lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA is put on."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs trained on it too."),
                io.Combo.Input(
                    "lora_name",
                    options=[FROM_SOCKET, *loras.lora_names()],
                    default=FROM_SOCKET,
                    tooltip="The file. Unused while the lora socket is connected.",
                ),
                strength("strength_model", "MODEL"),
                strength("strength_clip", "CLIP"),
                LORA_MODEL.Input("lora", optional=True, tooltip="A LoRA from this graph, say from the trainer."),
            ],
            outputs=[
                io.Model.Output("patched_model", display_name="model", tooltip="The MODEL with the LoRA."),
                io.Clip.Output("patched_clip", display_name="clip", tooltip="The CLIP with the LoRA."),
                io.String.Output(
                    "trigger_words", display_name="trigger_words", tooltip="Words the LoRA was trained to react to."
                ),
                io.String.Output("report", display_name="report", tooltip="What was applied, and what found no place."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any = None, **_: Any) -> str | float:
        """Changes with the file; runs before execute and on unchecked strings, so it never raises."""
        if lora_name is None:  # linked: its value is not known yet
            return float("nan")
        return loras.file_state(lora_name)

    @classmethod
    def execute(
        cls,
        model: Any,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        clip: Any = None,
        lora: Any = None,
    ) -> io.NodeOutput:
        if lora is None and lora_name == FROM_SOCKET:
            raise ValueError("lora_name: choose a file, or connect the lora socket to a trainer")
        name = "the connected LoRA" if lora is not None else lora_name
        loaded = load_tensors(lora) if lora is not None else loras.load(lora_name)
        words = ", ".join(trigger_words(getattr(loaded, "metadata", {})))
        new_model, new_clip, applied = apply_lora(model, clip, loaded, strength_model, strength_clip)
        return io.NodeOutput(new_model, new_clip, words, applied.describe(name, strength_model, strength_clip))
