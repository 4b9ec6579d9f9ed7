"""The training loop: one optimizer step at a time, exactly repeatable.

* ``Trainer.step``: micro-batches → forward, loss, backward → clip → AdamW; returns what there is to tell.
* Everything random is drawn on the CPU by a generator of its own, seeded by (seed, purpose, position): the same seed
  gives the same bits whatever was drawn elsewhere, and a resumed run goes on as if it had never stopped.
* ``Trainer.state`` / ``Trainer.restore``: all that has to be kept for that, as plain tensors.

The model is reached through ``objective.Denoiser`` only, the data through ``Examples``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.lora import LoRA
from .objective import Denoiser, draw_times, sample_losses
from .schedule import learning_rate
from .settings import Plan

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # on the trajectory, 0 being clean


@dataclass(frozen=True)
class Batch:
    """``latents`` (B, C, …) as the model wants them; ``conditioning`` one opaque item per sample.

    ``masks`` (B, 1, …) say how much each place of a latent counts, ``weights`` (B,) how much each sample does.
    """

    latents: Tensor
    conditioning: Sequence[Any]
    masks: Tensor | None = None
    weights: Tensor | None = None


class Examples(Protocol):
    """The data of a run."""

    def batch(self, position: int) -> Batch:
        """The ``position``-th micro-batch of the run."""
        ...


@dataclass(frozen=True)
class StepReport:
    """``step`` counts finished optimizer steps; ``skipped`` when half precision overflowed and nothing was learned."""

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    skipped: bool = False


class TrainingDivergedError(RuntimeError):
    """Loss or gradients are no longer finite; the adapters hold the last good weights."""


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Trainer:
    """``adapters`` maps module paths to adapters whose tensors are trained in place (leaves on the compute device).

    ``denoiser`` may be set later, and anew for every loan of the model.
    """

    def __init__(
        self,
        adapters: Mapping[str, LoRA],
        denoiser: Denoiser | None,
        examples: Examples,
        plan: Plan,
        total_steps: int,
        half_precision: bool = False,
    ) -> None:
        self.adapters, self.denoiser, self.examples, self.plan = adapters, denoiser, examples, plan
        self.total_steps = total_steps
        self.parameters = [tensor for adapter in adapters.values() for tensor in adapter.parameters()]
        for tensor in self.parameters:
            tensor.requires_grad_(True)
        self.device = self.parameters[0].device
        settings = plan.optimizer
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=plan.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        # float16 gradients underflow without a moving loss scale; other dtypes need none
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half_precision)
        self.step_number = 0
        self.losses: list[float] = []
        self.intact = True  # False while the optimizer is writing: what it leaves behind then is neither old nor new
        self._before_last_step = [tensor.detach().clone() for tensor in self.parameters]

    @property
    def finished(self) -> bool:
        return self.step_number >= self.total_steps

    def step(self) -> StepReport:
        """One optimizer step. Raises TrainingDivergedError on a loss that is not finite."""
        rate = learning_rate(self.plan.learning_rate, self.step_number, self.total_steps, self.plan.optimizer)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        micro_steps = self.plan.optimizer.gradient_accumulation
        total = 0.0
        for micro in range(micro_steps):
            loss = self.loss(self.step_number * micro_steps + micro)
            total += loss.item()
            if not math.isfinite(total):
                self._diverged(f"the loss is {total}")
            self.scaler.scale(loss / micro_steps).backward()
        self.scaler.unscale_(self.optimizer)
        limit = self.plan.optimizer.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            self._diverged(f"the gradient norm is {norm}")
        with torch.no_grad():
            torch._foreach_copy_(self._before_last_step, self.parameters)
        self.intact = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.intact = True
        self.optimizer.zero_grad(set_to_none=True)
        self.step_number += 1
        self.losses.append(total / micro_steps)
        return StepReport(self.step_number, total / micro_steps, rate, norm, skipped=not math.isfinite(norm))

    def loss(self, position: int) -> Tensor:
        """Mean loss of the ``position``-th micro-batch of the run, differentiable in the adapters."""
        assert self.denoiser is not None, "a step needs a denoiser"
        batch = self.examples.batch(position)
        seed, count = self.plan.seed, len(batch.latents)
        times = draw_times(
            count, self.denoiser.prediction, self.plan.objective, generator(seed, "timestep", position)
        )
        losses = self._losses(batch, times, generator(seed, "noise", position))
        return (losses if batch.weights is None else losses * batch.weights.to(losses)).mean()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[Batch]) -> float:
        """Mean loss of batches that are not trained on, at the same noise and timesteps every time."""
        losses = []
        for index, batch in enumerate(batches):
            for part, time in enumerate(VALIDATION_TIMES):
                draws = generator(self.plan.seed, "validation noise", index * len(VALIDATION_TIMES) + part)
                times = torch.full((len(batch.latents),), time, dtype=torch.float64)
                losses.append(self._losses(batch, times, draws).mean().item())
        return sum(losses) / len(losses)

    def _losses(self, batch: Batch, times: Tensor, draws: torch.Generator) -> Tensor:
        """The loss of each sample (B,) at these positions on the trajectory."""
        assert self.denoiser is not None, "a loss needs a denoiser"
        noise = torch.randn(batch.latents.shape, generator=draws)
        sigma = self.denoiser.noise_levels(times).to(self.device)
        latents, noise = batch.latents.to(self.device), noise.to(self.device, batch.latents.dtype)
        prediction = self.denoiser.prediction
        output = self.denoiser.predict(prediction.noisy(latents, noise, sigma), sigma, batch.conditioning)
        return sample_losses(output, prediction.target(latents, noise, sigma), batch.masks)

    def _diverged(self, what: str) -> None:
        """Back to the weights of the last step whose loss was finite."""
        for tensor, good in zip(self.parameters, self._before_last_step, strict=True):
            tensor.detach().copy_(good)
        self.optimizer.zero_grad(set_to_none=True)
        raise TrainingDivergedError(
            f"step {self.step_number + 1}: {what}. Lower learning_rate, set max_grad_norm to 1, "
            "or use a base model in bf16 or fp32."
        )

    def state(self) -> dict[str, Tensor]:
        """Adapters, optimizer and position, detached on the CPU."""
        tensors = {"step": torch.tensor(self.step_number), "losses": torch.tensor(self.losses, dtype=torch.float64)}
        for index, tensor in enumerate(self.parameters):
            tensors[f"parameter.{index}"] = tensor
            tensors[f"previous.{index}"] = self._before_last_step[index]
            for name, value in self.optimizer.state.get(tensor, {}).items():
                tensors[f"optimizer.{index}.{name}"] = value
        if self.scaler.is_enabled():
            tensors["scaler"] = torch.tensor([self.scaler.get_scale(), self.scaler._get_growth_tracker()])
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``; raises ValueError when it belongs to other adapters."""
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters):
                saved = state.get(f"parameter.{index}")
                if saved is None or saved.shape != tensor.shape:
                    raise ValueError("the saved state belongs to other layers or another rank")
                tensor.copy_(saved)
                self._before_last_step[index].copy_(state[f"previous.{index}"])
        moments = {}
        for index in range(len(self.parameters)):
            prefix = f"optimizer.{index}."
            entry = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
            if entry:
                moments[index] = entry
        saved_optimizer = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments, "param_groups": saved_optimizer["param_groups"]})
        if self.scaler.is_enabled() and "scaler" in state:
            scale, tracker = state["scaler"].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})
        self.step_number = int(state["step"])
        self.losses = state["losses"].tolist()
