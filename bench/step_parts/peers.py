"""Adapter families as other libraries train them, and the loop people write with ``diffusers``.

* ``FAMILIES``: our name and options, and how ``peft`` and ``lycoris_lora`` make the same (None: they do not).
* ``PeftStep``, ``LycorisStep``: their adapters on our targets of the same network, with the same loop around.
* ``DiffusersStep``: a ``diffusers`` UNet of the same shape with its own adapter loading (``peft`` below), its noise
  schedule and the loop of its training example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from lycoris.modules import boft, diag_oft, full, glora, ia3, locon, loha, lokr
from torch import Tensor, nn

from steps import RATE, Step, share, sizes

Make = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """``ours``: kernel options; ``peft`` (rank, names) -> configuration; ``lycoris`` (name, module, rank) -> module."""

    algorithm: str
    ours: dict[str, Any]
    peft: Make | None = None
    lycoris: Make | None = None


def _peft(kind: Make, ranks: tuple[str, ...] = (), **options: Any) -> Make:
    """``ranks`` are the options that are given the rank."""
    return lambda rank, names: kind(target_modules=names, **dict.fromkeys(ranks, rank), **options)


FAMILIES = {
    "LoRA": Family(
        "LoRA", {}, _peft(peft.LoraConfig, ("r", "lora_alpha")), lambda n, m, r: locon.LoConModule(n, m, 1.0, r, r)
    ),
    "DoRA": Family(
        "LoRA",
        {"dora": "output"},
        _peft(peft.LoraConfig, ("r", "lora_alpha"), use_dora=True),
        lambda n, m, r: locon.LoConModule(n, m, 1.0, r, r, weight_decompose=True),
    ),
    "LoHa": Family(
        "LoHa", {}, _peft(peft.LoHaConfig, ("r", "alpha")), lambda n, m, r: loha.LohaModule(n, m, 1.0, r, r)
    ),
    "LoKr": Family(
        "LoKr",
        {"factor": 8},
        _peft(peft.LoKrConfig, ("r", "alpha"), decompose_factor=8),
        lambda n, m, r: lokr.LokrModule(n, m, 1.0, r, r, factor=8),
    ),
    "OFT": Family("OFT", {"block_size": 32}, None, lambda n, m, r: diag_oft.DiagOFTModule(n, m, 1.0, 32, 0)),
    "BOFT": Family("BOFT", {"block_size": 32}, None, lambda n, m, r: boft.ButterflyOFTModule(n, m, 1.0, 32, 0)),
    "OFTv2": Family("OFTv2", {"block_size": 32}, _peft(peft.OFTConfig, r=0, oft_block_size=32)),
    "(IA)³": Family(
        "IA3", {}, _peft(peft.IA3Config, feedforward_modules=[]), lambda n, m, r: ia3.IA3Module(n, m, 1.0)
    ),
    "GLoRA": Family("GLoRA", {}, None, lambda n, m, r: glora.GLoRAModule(n, m, 1.0, r, r)),
    "full": Family("full", {}, None, lambda n, m, r: full.FullModule(n, m, 1.0)),
}


class _Loop(Step):
    """The loop anybody would write, over ``network`` and ``parameters``."""

    network: nn.Module
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer

    def prediction(self) -> Tensor:
        return self.network(self.latent + self.noise, self.time, context=self.context)

    def once(self) -> None:
        F.mse_loss(self.prediction(), self.noise).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sizes(self) -> dict[str, int]:
        return sizes(self.parameters, self.optimizer)


class PeftStep(_Loop):
    def __init__(self, base: Any, latent: int, rank: int, mode: Any, family: str) -> None:
        super().__init__(latent, mode)
        shared = share(base, inference=False)
        names = [target.path.removeprefix("diffusion_model.") for target in shared.targets]
        make = FAMILIES[family].peft
        assert make is not None
        with self.mode:
            self.network = peft.inject_adapter_in_model(make(rank, names), shared.network)
            self.parameters = [value for value in self.network.parameters() if value.requires_grad]
            self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)
        adapted = sum(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in self.network.modules())
        if adapted != len(names):
            raise RuntimeError(f"peft adapted {adapted} layers instead of {len(names)}")


class LycorisStep(_Loop):
    def __init__(self, base: Any, latent: int, rank: int, mode: Any, family: str) -> None:
        super().__init__(latent, mode)
        shared = share(base, inference=False)
        make = FAMILIES[family].lycoris
        assert make is not None
        self.network = shared.network
        with self.mode:
            self.adapters = []
            for target in shared.targets:
                path = target.path.removeprefix("diffusion_model.")
                adapter = make(path.replace(".", "_"), self.network.get_submodule(path), rank)
                adapter.apply_to()
                self.adapters.append(adapter)
            self.parameters = [p for adapter in self.adapters for p in adapter.parameters() if p.requires_grad]
            self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)


class DiffusersStep(_Loop):
    """Random weights of its own: the shape is the same, the values make no difference to the time."""

    def __init__(self, base: Any, latent: int, rank: int, mode: Any) -> None:
        import diffusers

        super().__init__(latent, mode)
        channels = base.model.model_config.unet_config["model_channels"]
        self.network = diffusers.UNet2DConditionModel(
            sample_size=latent,
            block_out_channels=tuple(channels * factor for factor in (1, 2, 4, 4)),
            cross_attention_dim=self.context.shape[-1],
            attention_head_dim=8,
        ).requires_grad_(False)
        self.schedule = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        names = [name for name, module in self.network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        with self.mode:
            self.network.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names))
            self.parameters = [value for value in self.network.parameters() if value.requires_grad]
            self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)
        adapted, wanted = len(self.parameters) // 2, len(share(base).targets)
        if adapted != wanted:
            raise RuntimeError(f"diffusers adapted {adapted} layers instead of {wanted}")

    def prediction(self) -> Tensor:
        noisy = self.schedule.add_noise(self.latent, self.noise, self.time.long())
        return self.network(noisy, self.time, encoder_hidden_states=self.context).sample
