"""Adapter mathematics, adapter files, names and blocks. Pure torch and safetensors."""

from .adapter import Adapter, Dropout, Options
from .blocks import Block, block_map
from .lora import LoRA
from .reading import LoRAFile, Unplaced, read_lora
from .registry import FAMILIES, make_adapter
from .safetensors_io import LoraModel, load_tensors, read_metadata, save_tensors
from .writing import DIALECTS, write_lora

__all__ = [
    "Adapter",
    "Block",
    "DIALECTS",
    "Dropout",
    "FAMILIES",
    "LoRA",
    "LoRAFile",
    "LoraModel",
    "Options",
    "Unplaced",
    "block_map",
    "load_tensors",
    "make_adapter",
    "read_lora",
    "read_metadata",
    "save_tensors",
    "write_lora",
]
