"""Adapter mathematics, adapter files, names and blocks. Pure torch and safetensors."""

from .blocks import Block, block_map
from .lora import LoRA
from .reading import LoRAFile, Unplaced, read_lora
from .safetensors_io import LoraModel, load_tensors, read_metadata, save_tensors
from .writing import DIALECTS, write_lora

__all__ = [
    "Block",
    "DIALECTS",
    "LoRA",
    "LoRAFile",
    "LoraModel",
    "Unplaced",
    "block_map",
    "load_tensors",
    "read_lora",
    "read_metadata",
    "save_tensors",
    "write_lora",
]
