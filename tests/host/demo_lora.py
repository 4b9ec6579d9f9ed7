"""A LoRA file for the demo base, without training."""

from __future__ import annotations

import torch

from live_server import DEMO, Server
from lora_loom.kernels.safetensors_io import LoraModel, TensorFile, save_tensors

_MODEL = "model.diffusion_model."


def put_demo_lora(server: Server, name: str, size: float = 0.2) -> None:
    """On every matrix of its diffusion model, listed by the server as ``name``."""
    base, draws, tensors = TensorFile(DEMO / "loom-demo-base.safetensors"), torch.Generator().manual_seed(1), {}
    for key, shape in base.shapes.items():
        if key.startswith(_MODEL) and key.endswith(".weight") and len(shape) == 2:
            layer = "lora_unet_" + key.removeprefix(_MODEL).removesuffix(".weight").replace(".", "_")
            tensors[f"{layer}.lora_down.weight"] = size * torch.randn(4, shape[1], generator=draws)
            tensors[f"{layer}.lora_up.weight"] = size * torch.randn(shape[0], 4, generator=draws)
    save_tensors(LoraModel(tensors), server.base / "models/loras" / name)
