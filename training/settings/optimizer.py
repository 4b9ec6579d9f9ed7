"""How the weights follow the gradients."""

from __future__ import annotations

from dataclasses import dataclass

from ..optimizers import check_optimizer, known, offered
from ..options import Settings, option
from ..schedules import SCHEDULES, check_schedule

SCHEDULE_UNITS = {
    "steps": "warmup_steps, decay_steps and horizon count optimizer steps",
    "epochs": "warmup_steps, decay_steps and horizon count passes over the data set",
}


@dataclass(frozen=True)
class OptimizerSettings(Settings):
    first_release = (
        "optimizer",
        "weight_decay",
        "beta1",
        "beta2",
        "epsilon",
        "schedule",
        "warmup_steps",
        "max_grad_norm",
        "gradient_accumulation",
    )

    optimizer: str = option("AdamW", "How gradients become steps.", choices=offered, also=known())
    weight_decay: float = option(
        0.01,
        "Pulls the adapter towards zero, decoupled from the gradient.",
        low=0.0,
        high=10.0,
        step=0.001,
        expected="0 or more",
    )
    beta1: float = option(
        0.9,
        "Memory of the mean gradient. At 0.9 an optimizer whose authors chose another value takes theirs.",
        low=0.0,
        high=0.9999,
        step=0.01,
        expected="0 ≤ beta1 < 1",
    )
    beta2: float = option(
        0.999,
        "Memory of the squared gradient. At 0.999 an optimizer whose authors chose another value takes theirs (the "
        "Lions and ProdigyPlusScheduleFree 0.99); optimizer_args betas=0.9,0.999 would insist.",
        low=0.0,
        high=0.99999,
        step=0.001,
        expected="0 ≤ beta2 < 1",
    )
    epsilon: float = option(
        1e-8,
        "Added to the denominator of the update; larger values calm very small gradients.",
        low=1e-16,
        high=1e9,
        step=1e-8,
        expected="more than 0",
    )
    schedule: str = option("constant", "How the learning rate changes over the run.", choices=SCHEDULES)
    warmup_steps: int = option(
        0, "Steps over which the learning rate rises linearly from zero.", low=0, high=100000, expected="0 or more"
    )
    max_grad_norm: float = option(
        1.0,
        "Longer gradients are shortened to this norm. 0 does not clip.",
        low=0.0,
        high=1000.0,
        step=0.1,
        expected="0 (no clipping) or more",
    )
    gradient_accumulation: int = option(
        1,
        "Batches per optimizer step: the effective batch size is batch_size times this.",
        low=1,
        high=1024,
        expected="1 or more",
    )
    optimizer_args: str = option(
        "",
        "More arguments of the optimizer, as its own documentation names them: d_coef=2 safeguard_warmup=True "
        "betas=0.9,0.99. An argument it does not know is an error that lists those it does.",
        advanced=True,
    )
    optimizer_name: str = option(
        "", "With pytorch_optimizer: which of its optimizers, say AdEMAMix or SOAP.", advanced=True
    )
    min_lr_factor: float = option(
        0.0,
        "Where a falling schedule ends, as a part of the learning rate.",
        low=0.0,
        high=1.0,
        step=0.01,
        advanced=True,
    )
    cycles: float = option(
        1.0,
        "cosine with restarts: how many times it falls.",
        low=0.5,
        high=1000.0,
        step=0.5,
        advanced=True,
    )
    power: float = option(
        1.0, "polynomial: exponent of the fall.", low=0.01, high=10.0, step=0.1, advanced=True
    )
    decay_steps: int = option(
        0,
        "warm-up-stable-decay: steps of the fall at the end; 0 takes a fifth of the run.",
        low=0,
        high=1000000,
        advanced=True,
    )
    schedule_unit: str = option("steps", "What the schedule's lengths count.", choices=SCHEDULE_UNITS, advanced=True)
    horizon: int = option(
        0,
        "Length the schedule is made for; 0 takes the run's. State the whole length here when you mean to continue "
        "later: the continued run then equals one that never stopped.",
        low=0,
        high=10000000,
        advanced=True,
    )

    def check_together(self) -> None:
        check_optimizer(self)
        check_schedule(self)
