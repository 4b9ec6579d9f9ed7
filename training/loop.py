"""The training loop: one optimizer step at a time, exactly repeatable.

* ``Trainer.step``: micro-batches → forward, loss, backward → clip → optimizer → EMA; returns what there is to tell.
* Everything random is drawn on the CPU by a generator of its own, seeded by (seed, purpose, position): the same seed
  gives the same bits whatever was drawn elsewhere, and a resumed run goes on as if it had never stopped.
* ``Trainer.state`` / ``Trainer.restore``: all that has to be kept for that, as plain tensors and plain numbers.
* ``Trainer.evaluation`` / ``Trainer.averaged``: the weights to look at, while a ``with`` lasts.

The model is reached through ``objective.Denoiser`` only, the data through ``Examples``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.adapter import Adapter
from .ema import Average
from .learners import Component, groups
from .objective import Denoiser, Noised, add_noise, draw_times, loss_weights, sample_losses
from .optimizers.make import make_optimizer
from .optimizers.masters import Masters
from .optimizers.state import pack, unpack
from .options import OptionError
from .schedules import Schedule
from .settings import Plan

VALIDATION_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)  # on the trajectory, 0 being clean
LEAST_SCALE = 2.0**-10  # of the loss in half precision; what overflows even then will not stop overflowing
BANDS = 4  # equal parts of the trajectory for which the loss is told apart


@dataclass(frozen=True)
class Batch:
    """``latents`` (B, C, …) as the model wants them; ``conditioning`` one opaque item per sample.

    ``masks`` (B, 1, …) say how much each place of a latent counts, ``weights`` (B,) how much each sample does.
    ``prior`` (B,) marks samples whose target is what the model predicted before training. ``preserved`` holds, for
    samples whose old prediction is to be preserved, the conditioning it is preserved for, None for the others.
    ``pixels`` is the width times the height of the pictures; without it a place of the latents counts for 8 × 8.
    """

    latents: Tensor
    conditioning: Sequence[Any]
    masks: Tensor | None = None
    weights: Tensor | None = None
    prior: Tensor | None = None
    preserved: Sequence[Any] | None = None
    pixels: int | None = None


class Examples(Protocol):
    """The data of a run."""

    def batch(self, position: int) -> Batch:
        """The ``position``-th micro-batch of the run."""
        ...


@dataclass(frozen=True)
class StepReport:
    """``step`` counts finished optimizer steps; ``skipped`` when half precision overflowed and nothing was learned.

    ``bands`` are the losses of each part of the trajectory, NaN where none was drawn.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    bands: tuple[float, ...]
    skipped: bool = False


@dataclass(frozen=True)
class State:
    """What a run goes on from: plain tensors on the CPU, and facts that JSON can hold."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class TrainingDivergedError(RuntimeError):
    """Loss or gradients are no longer finite; the adapters hold the last good weights."""


def generator(seed: int, purpose: str, position: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its three arguments."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{position}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Trainer:
    """Trains the tensors of ``components`` in place (leaves on the compute device).

    ``denoiser`` may be set later, and anew for every loan of the model. ``schedule`` is the whole run by default.
    """

    def __init__(
        self,
        components: Sequence[Component],
        denoiser: Denoiser | None,
        examples: Examples,
        plan: Plan,
        total_steps: int,
        half_precision: bool = False,
        schedule: Schedule | None = None,
    ) -> None:
        self.components, self.denoiser, self.examples, self.plan = list(components), denoiser, examples, plan
        self.total_steps = total_steps
        self.schedule = schedule or Schedule.of_run(plan.optimizer, total_steps)
        self.adapters: list[Adapter] = [a for component in self.components for a in component.adapters.values()]
        self.groups = groups(self.components, plan.loraplus_ratio)
        last = max((group.stop_after or total_steps for group in self.groups), default=0)
        if last < total_steps:
            raise OptionError(
                f"everything that is trained stops after step {last} of {total_steps}: shorten length, or raise the "
                "stop_after options of the component settings"
            )
        self.parameters = [tensor for group in self.groups for tensor in group.tensors]
        for tensor in self.parameters:
            tensor.requires_grad_(True)
        self.device = self.parameters[0].device
        self.masters = Masters(self.parameters)
        rates = [
            {"params": self.masters.of(group.tensors), "lr": group.learning_rate} for group in self.groups
        ]
        with self.masters.gathered():  # some optimizers look at the weights when they are made
            self.optimizer = make_optimizer(plan.optimizer, rates)
        # float16 gradients underflow without a moving loss scale; other dtypes need none
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half_precision)
        self.average = Average(self.parameters, plan.run.ema_decay) if plan.run.ema_decay else None
        self.step_number = 0
        self.losses: list[float] = []
        self.bands: list[tuple[float, ...]] = []
        self.intact = True  # False while weights and optimizer do not belong together: in a step, or rolled back
        self._before_last_step = [tensor.detach().clone() for tensor in self.parameters]

    @property
    def finished(self) -> bool:
        return self.step_number >= self.total_steps

    def step(self) -> StepReport:
        """One optimizer step. Raises TrainingDivergedError on a loss that is not finite."""
        factor = self.schedule.factor(self.step_number)
        self.wake()
        for group, settings in zip(self.groups, self.optimizer.param_groups, strict=True):
            settings["lr"] = group.learning_rate * factor
        self.drop_gradients()
        micro_steps = self.plan.optimizer.gradient_accumulation
        total, bands = 0.0, _Bands()
        for micro in range(micro_steps):
            for loss in self.terms(self.step_number * micro_steps + micro, bands):
                total += loss.item()
                if not math.isfinite(total):
                    self._diverged(f"the loss is {total}")
                self.masters.collect()
                if loss.requires_grad:  # what is trained may have no part in it: all adapters dropped, a word not shown
                    self.scaler.scale(loss / micro_steps).backward()
        for adapter in self.adapters:
            adapter.seed = None
        with self.masters.gathered():
            norm = self._apply_gradients()
        self.drop_gradients()
        self.step_number += 1
        self.losses.append(total / micro_steps)
        self.bands.append(bands.means())
        return StepReport(
            self.step_number,
            total / micro_steps,
            self.groups[0].learning_rate * factor,
            norm,
            self.bands[-1],
            skipped=not math.isfinite(norm),
        )

    def _apply_gradients(self) -> float:
        """Clip, step, shrink, average; the norm of the gradients before clipping."""
        if all(tensor.grad is None for tensor in self.masters.tensors):
            return 0.0
        self.scaler.unscale_(self.optimizer)
        limit = self.plan.optimizer.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.masters.tensors, limit).item()
        if not math.isfinite(norm) and (not self.scaler.is_enabled() or self.scaler.get_scale() < LEAST_SCALE):
            self._diverged(f"the gradient norm is {norm}")
        with torch.no_grad():
            torch._foreach_copy_(self._before_last_step, self.parameters)
        self.intact = False
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if math.isfinite(norm):
            self.masters.write_back(lambda: generator(self.plan.seed, "rounding", self.step_number))
            for component in self.components:
                if not component.active(self.step_number):
                    continue
                if self.plan.adapter.max_norm:
                    for adapter in component.adapters.values():
                        adapter.limit_norm(self.plan.adapter.max_norm)
                if component.after_step is not None:
                    component.after_step()
            if self.average is not None:
                self.average.update(self.parameters)
        self.intact = True
        return norm

    def loss(self, position: int) -> Tensor:
        """Mean loss of the ``position``-th micro-batch of the run, differentiable in what is trained."""
        terms = list(self.terms(position))
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def terms(self, position: int, bands: _Bands | None = None) -> Iterator[Tensor]:
        """The parts of the loss; each may be differentiated before the next one is computed, to need less memory."""
        assert self.denoiser is not None, "a step needs a denoiser"
        self._seed_dropout(position)
        batch, seed = self.examples.batch(position), self.plan.seed
        prediction, settings = self.denoiser.prediction, self.plan.objective
        draws = generator(seed, "timestep", position)
        pixels = batch.pixels or 64 * batch.latents.shape[-1] * batch.latents.shape[-2]
        times = draw_times(len(batch.latents), prediction, settings, draws, pixels)
        sigma = self.denoiser.noise_levels(times).to(self.device)
        latents = batch.latents.to(self.device)
        noised = add_noise(latents, sigma, prediction, settings, generator(seed, "noise", position))
        yield self._denoising(batch, noised, sigma, times, bands or _Bands())
        if batch.preserved is not None and any(item is not None for item in batch.preserved):
            yield settings.preservation_weight * self._preservation(batch.preserved, noised.noisy, sigma)

    def _denoising(self, batch: Batch, noised: Noised, sigma: Tensor, times: Tensor, bands: _Bands) -> Tensor:
        """What the samples teach; nothing of it is held on to here while what follows is computed."""
        assert self.denoiser is not None
        prediction, settings = self.denoiser.prediction, self.plan.objective
        output = self.denoiser.predict(noised.noisy, sigma, batch.conditioning)
        losses = sample_losses(
            output,
            self._targets(batch, noised, sigma),
            batch.masks,
            sigma=sigma,
            times=times,
            prediction=prediction,
            settings=settings,
        )
        bands.add(times, losses.detach())
        weights = loss_weights(sigma, prediction, settings)
        losses = losses if weights is None else losses * weights.to(losses)
        return (losses if batch.weights is None else losses * batch.weights.to(losses)).mean()

    def _targets(self, batch: Batch, noised: Noised, sigma: Tensor) -> Tensor:
        """The targets (B, …), where marked the prediction of the base."""
        if batch.prior is None or not batch.prior.any():
            return noised.target
        assert self.denoiser is not None
        chosen = batch.prior.nonzero().flatten().tolist()
        some = torch.tensor(chosen, device=self.device)
        old = self.denoiser.predict_base(noised.noisy[some], sigma[some], [batch.conditioning[i] for i in chosen])
        return noised.target.index_copy(0, some, old.to(noised.target))

    def _preservation(self, preserved: Sequence[Any], noisy: Tensor, sigma: Tensor) -> Tensor:
        """Mean square of what training changed on the preserved conditioning (differential output preservation)."""
        assert self.denoiser is not None
        chosen = [index for index, item in enumerate(preserved) if item is not None]
        some = torch.tensor(chosen, device=self.device)
        conditioning = [preserved[index] for index in chosen]
        old = self.denoiser.predict_base(noisy[some], sigma[some], conditioning)
        new = self.denoiser.predict(noisy[some], sigma[some], conditioning)
        return sample_losses(new, old).sum() / len(preserved)

    @torch.no_grad()
    def validation_losses(self, batches: Iterable[Batch]) -> dict[float, float]:
        """time -> mean square error of batches that are not trained on, at the same noise every time."""
        assert self.denoiser is not None, "a loss needs a denoiser"
        losses: dict[float, list[float]] = {time: [] for time in VALIDATION_TIMES}
        prediction = self.denoiser.prediction
        for index, batch in enumerate(batches):
            for part, time in enumerate(VALIDATION_TIMES):
                draws = generator(self.plan.seed, "validation noise", index * len(VALIDATION_TIMES) + part)
                times = torch.full((len(batch.latents),), time, dtype=torch.float64)
                sigma = self.denoiser.noise_levels(times).to(self.device)
                latents = batch.latents.to(self.device)
                noise = torch.randn(latents.shape, generator=draws).to(self.device, latents.dtype)
                output = self.denoiser.predict(prediction.noisy(latents, noise, sigma), sigma, batch.conditioning)
                target = prediction.target(latents, noise, sigma)
                losses[time].append(sample_losses(output, target, batch.masks).mean().item())
        return {time: sum(found) / len(found) for time, found in losses.items() if found}

    def _seed_dropout(self, position: int) -> None:
        """A seed for every adapter, the same whenever this micro-batch is run."""
        draws = generator(self.plan.seed, "dropout", position)
        seeds = torch.randint(1 << 62, (len(self.adapters),), generator=draws).tolist()
        for adapter, seed in zip(self.adapters, seeds, strict=True):
            adapter.seed = seed

    def wake(self) -> None:
        """Only groups that have not stopped yet get gradients."""
        for group in self.groups:
            active = not group.stop_after or self.step_number < group.stop_after
            for tensor in group.tensors:
                tensor.requires_grad_(active)

    def drop_gradients(self) -> None:
        for tensor in (*self.parameters, *self.masters.tensors):
            tensor.grad = None

    @property
    def finite(self) -> bool:
        """Whether all weights are numbers; a step whose loss was finite can still have thrown them out of range."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.parameters)

    def check_finite(self) -> None:
        """Raises TrainingDivergedError, back at the last good weights, where the last step made infinite ones."""
        if not self.finite:
            self._diverged("the weights are no longer finite", self.step_number)

    def roll_back(self) -> None:
        """Back to the weights of before the last step. The optimizer stays a step ahead: ``intact`` is False then."""
        self.intact = False
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self._before_last_step)
        self.drop_gradients()

    def _diverged(self, what: str, step: int | None = None) -> None:
        """Back to the weights of the last step whose loss was finite."""
        self.roll_back()
        raise TrainingDivergedError(
            f"step {self.step_number + 1 if step is None else step}: {what}. Lower learning_rate, set max_grad_norm to "
            "1, or use a base model in bf16 or fp32."
        )

    # -- the weights to look at

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The weights that are saved, shown and measured; afterwards those that are trained, to the last bit.

        They differ only for optimizers that average while they train (schedule-free).
        """
        if not hasattr(self.optimizer, "eval"):
            yield
            return
        kept = [tensor.detach().clone() for tensor in self.parameters]
        with self.masters.gathered():
            self.optimizer.eval()
            self.masters.write_back(lambda: generator(self.plan.seed, "evaluation rounding", self.step_number))
        try:
            yield
        finally:
            with self.masters.gathered():
                self.optimizer.train()  # type: ignore[attr-defined]
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving average of the weights in their place."""
        assert self.average is not None, "ema_decay is 0"
        kept = [tensor.detach().clone() for tensor in self.parameters]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.average.tensors)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, kept)

    # -- kept and taken up

    def state(self) -> State:
        """Everything a run goes on from, detached on the CPU."""
        tensors = {
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "bands": torch.tensor(self.bands, dtype=torch.float64).view(-1, BANDS),
        }
        for index, tensor in enumerate(self.parameters):
            tensors[f"parameter.{index}"] = tensor
            tensors[f"previous.{index}"] = self._before_last_step[index]
        moments, facts = pack(self.optimizer)
        tensors |= {f"optimizer.{name}": value for name, value in moments.items()}
        if self.average is not None:
            tensors |= {f"average.{index}": tensor for index, tensor in enumerate(self.average.tensors)}
        everything: dict[str, Any] = {"step": self.step_number, "optimizer": facts}
        if self.average is not None:
            everything["averaged"] = self.average.updates
        if self.scaler.is_enabled():
            everything["scaler"] = [self.scaler.get_scale(), self.scaler._get_growth_tracker()]
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        return State(copies, everything)

    def restore(self, state: State) -> None:
        """Go on from ``state``; raises ValueError when it belongs to other adapters."""
        tensors, facts = state.tensors, state.facts
        for index, tensor in enumerate(self.parameters):
            saved = tensors.get(f"parameter.{index}")
            if saved is None or saved.shape != tensor.shape or f"parameter.{len(self.parameters)}" in tensors:
                raise ValueError("the saved state belongs to other layers or another rank")
        with torch.no_grad():
            for index, tensor in enumerate(self.parameters):
                tensor.copy_(tensors[f"parameter.{index}"])
                self._before_last_step[index].copy_(tensors[f"previous.{index}"])
        with self.masters.gathered():
            unpack(self.optimizer, _below("optimizer.", tensors), facts["optimizer"])
        if self.average is not None and "averaged" in facts:
            self.average.restore([tensors[f"average.{i}"] for i in range(len(self.parameters))], facts["averaged"])
        elif self.average is not None:  # switched on since: it starts from here
            self.average.restore(self.parameters, 0)
        if self.scaler.is_enabled() and "scaler" in facts:
            scale, tracker = facts["scaler"]
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})
        self.step_number = int(facts["step"])
        self.losses = tensors["losses"].tolist()
        self.bands = [tuple(row) for row in tensors["bands"].tolist()]


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


class _Bands:
    """Sums of losses by the part of the trajectory they were drawn from."""

    def __init__(self) -> None:
        self.sums, self.counts = [0.0] * BANDS, [0] * BANDS

    def add(self, times: Tensor, losses: Tensor) -> None:
        for time, loss in zip(times.tolist(), losses.tolist(), strict=True):
            band = min(int(time * BANDS), BANDS - 1)
            self.sums[band] += loss
            self.counts[band] += 1

    def means(self) -> tuple[float, ...]:
        return tuple(total / n if n else math.nan for total, n in zip(self.sums, self.counts, strict=True))
