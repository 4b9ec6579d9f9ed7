"""What the contestants of ``train_step`` have in common: shared weights, inputs, the memory counter."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from torch import Tensor, nn

import tiny
from lora_loom.kernels.layers import Target, select_targets

TOKENS, CONTEXT = 77, 768
RATE = 1e-4


def first_model(channels: int) -> Any:
    """The model as a loader node leaves it: inference tensors."""
    return tiny.unet(channels, inference=True)


@dataclass
class Shared:
    """A module tree of its own over the same storages."""

    patcher: Any
    network: nn.Module
    targets: list[Target]


def share(base: Any, inference: bool = True, copies: bool = False) -> Shared:
    """A model whose parameters are ``base``'s own, or aliases that autograd accepts, or real copies."""

    def another(tensor: Tensor) -> Tensor:
        if copies:
            return _like(tensor, tensor.detach().clone())
        return tensor if inference else _like(tensor, _alias(tensor))

    with torch.inference_mode(False):
        memo: dict[int, Any] = {id(t): another(t) for t in (*base.model.parameters(), *base.model.buffers())}
    memo[id(base.model.model_config)] = base.model.model_config  # plain settings
    model = copy.deepcopy(base.model, memo)
    patcher = comfy.model_patcher.ModelPatcher(model, base.load_device, base.offload_device)
    return Shared(patcher, model.diffusion_model, select_targets(model, "full", True))


def _alias(tensor: Tensor) -> Tensor:
    bare = torch.empty(0, dtype=tensor.dtype)
    return bare.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _like(original: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=False) if isinstance(original, nn.Parameter) else values


class Step:
    """What they have in common: inputs, and the memory counter around everything."""

    def __init__(self, latent: int, mode: Any) -> None:
        self.mode = mode if mode is not None else nullcontext()
        draws = torch.Generator().manual_seed(0)
        self.latent = torch.randn((1, 4, latent, latent), generator=draws)
        self.noise = torch.randn((1, 4, latent, latent), generator=draws)
        self.context = torch.randn((1, TOKENS, CONTEXT), generator=draws)
        self.time = torch.tensor([500.0])

    def step(self) -> None:
        with self.mode:
            self.once()

    def once(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...

    def sizes(self) -> dict[str, int]:
        return {}


def sizes(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return {"adapters": sum(t.nbytes for t in parameters), "optimizer": sum(t.nbytes for t in moments)}
