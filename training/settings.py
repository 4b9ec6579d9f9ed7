"""Every option of a training run, checked where it is written down.

Each class is one settings node; each error names the option. ``Plan`` puts them together with what the trainer node
itself asks for. Plain data: a plan turns into JSON and back without loss (``to_json``, ``plan_from_json``).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any


class OptionError(ValueError):
    """A value that makes no sense for the option it was given to."""


def _check(condition: bool, option: str, value: Any, expected: str) -> None:
    if not condition:
        raise OptionError(f"{option} is {value!r}, expected {expected}")


# name -> what the option does; these tables feed the widgets and their tooltips
SCHEDULES = {
    "constant": "the learning rate stays where it is after the warm-up",
    "cosine": "falls along half a cosine from the learning rate to zero over the run",
}
OPTIMIZERS = {"AdamW": "Adam with decoupled weight decay (Loshchilov & Hutter 2019)"}
TIMESTEPS = {
    "automatic": "logit-normal for flow models, uniform for the others",
    "uniform": "every timestep equally often",
    "logit-normal": "mostly the middle of the trajectory: sigmoid of a normal draw (Esser et al. 2024)",
}
LENGTH_UNITS = {
    "steps": "optimizer steps",
    "epochs": "passes over the data set",
    "presentations per image": "how often each image is shown",
}
ON_CANCEL = {
    "abort": "the ✕ saves what has been learned to the run folder, then aborts the prompt; queue again to go on",
    "stop and keep": "the ✕ ends the training; the LoRA so far leaves the node and the graph goes on",
}


@dataclass(frozen=True)
class AdapterSettings:
    layers: str = "attention+MLP"
    conv_rank: int = 0
    conv_alpha: float = 1.0

    def __post_init__(self) -> None:
        _check(self.conv_rank >= 0, "conv_rank", self.conv_rank, "0 (no k×k convolutions) or more")
        _check(math.isfinite(self.conv_alpha), "conv_alpha", self.conv_alpha, "a number")


@dataclass(frozen=True)
class OptimizerSettings:
    optimizer: str = "AdamW"
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1

    def __post_init__(self) -> None:
        _check(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        _check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _check(0 <= self.beta1 < 1, "beta1", self.beta1, "0 ≤ beta1 < 1")
        _check(0 <= self.beta2 < 1, "beta2", self.beta2, "0 ≤ beta2 < 1")
        _check(self.epsilon > 0, "epsilon", self.epsilon, "more than 0")
        _check(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        _check(self.max_grad_norm >= 0, "max_grad_norm", self.max_grad_norm, "0 (no clipping) or more")
        _check(self.gradient_accumulation >= 1, "gradient_accumulation", self.gradient_accumulation, "1 or more")


@dataclass(frozen=True)
class ObjectiveSettings:
    timesteps: str = "automatic"
    logit_mean: float = 0.0
    logit_std: float = 1.0

    def __post_init__(self) -> None:
        _check(self.timesteps in TIMESTEPS, "timesteps", self.timesteps, f"one of {', '.join(TIMESTEPS)}")
        _check(math.isfinite(self.logit_mean), "logit_mean", self.logit_mean, "a number")
        _check(self.logit_std > 0, "logit_std", self.logit_std, "more than 0")


@dataclass(frozen=True)
class RunSettings:
    gradient_checkpointing: bool = False
    on_cancel: str = "abort"
    save_every: int = 0

    def __post_init__(self) -> None:
        _check(self.on_cancel in ON_CANCEL, "on_cancel", self.on_cancel, f"one of {', '.join(ON_CANCEL)}")
        _check(self.save_every >= 0, "save_every", self.save_every, "0 (only at the end) or a number of steps")


@dataclass(frozen=True)
class Plan:
    """One training run. ``length`` counts ``unit``s; ``steps_for`` turns it into optimizer steps."""

    length: int = 500
    unit: str = "steps"
    learning_rate: float = 1e-4
    rank: int = 16
    alpha: float = 16.0
    batch_size: int = 1
    seed: int = 0
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        _check(self.length >= 1, "length", self.length, "1 or more")
        _check(self.unit in LENGTH_UNITS, "unit", self.unit, f"one of {', '.join(LENGTH_UNITS)}")
        _check(
            math.isfinite(self.learning_rate) and self.learning_rate > 0,
            "learning_rate",
            self.learning_rate,
            "more than 0",
        )
        _check(self.rank >= 1, "rank", self.rank, "1 or more")
        _check(math.isfinite(self.alpha) and self.alpha != 0, "alpha", self.alpha, "a number other than 0")
        _check(self.batch_size >= 1, "batch_size", self.batch_size, "1 or more")

    def steps_for(self, batches_in: Callable[[int], int], presentations: Fraction = Fraction(1)) -> int:
        """Optimizer steps of the whole run.

        ``batches_in(n)``: batches in the first n epochs; ``presentations``: how often an epoch shows an image, in the
        mean over the images.
        """
        if self.unit == "steps":
            return self.length
        epochs = self.length if self.unit == "epochs" else self.length / presentations
        whole = math.floor(epochs)
        rest = (epochs - whole) * (batches_in(whole + 1) - batches_in(whole)) if epochs > whole else 0
        return max(1, math.ceil((batches_in(whole) + rest) / self.optimizer.gradient_accumulation))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def plan_from_json(text: str) -> Plan:
    """The plan that ``Plan.to_json`` wrote."""
    values = json.loads(text)
    parts = {
        "adapter": AdapterSettings,
        "optimizer": OptimizerSettings,
        "objective": ObjectiveSettings,
        "run": RunSettings,
    }
    for name, kind in parts.items():
        values[name] = kind(**values[name])
    return Plan(**values)
