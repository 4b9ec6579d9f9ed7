"""Ingredients for the tests of merging, and what is measured of results."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_files import pair
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile

PATH = "diffusion_model.blocks.0.layer"
ALL = Cut(rank=1000)


def plain(shape, rank=2, alpha=1.5, seed=0, dtype=torch.float32):
    """A LoRA with something in both factors."""
    down, up = pair(shape, rank, seed)
    return LoRA(down.to(dtype), up.to(dtype), alpha)


def holding(adapter, shape, path=PATH, **more):
    """A file of one layer."""
    return LoRAFile({path: adapter}, names=NameTable({path: shape}), **more)


def apart(got, wanted):
    """‖difference‖ / ‖wanted‖"""
    return float((got.double() - wanted).norm() / wanted.norm())


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that an operator returns."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made
