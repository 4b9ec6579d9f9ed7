"""The types that travel between our nodes, and helpers to describe them."""

from __future__ import annotations

from comfy_api.latest import io

CATEGORY = "LoRA Loom"

LOOM_DATASET = io.Custom("LOOM_DATASET")
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
