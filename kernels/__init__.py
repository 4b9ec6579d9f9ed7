"""Adapter mathematics, adapter files, names and blocks. Pure torch and safetensors."""

from .blocks import Block, block_map
from .files import LoraModel, read_lora, write_lora
from .lora import LoRA

__all__ = ["Block", "LoRA", "LoraModel", "block_map", "read_lora", "write_lora"]
