"""Learning-rate schedules: pure functions of the step.

* All begin with a linear warm-up, after which progress p goes from 0 to 1 at the end of the schedule's length.
* Those that fall end at ``min_lr_factor``: m + (1 − m)·f(p).
* ``check_schedule``: options that would have no effect are refused; ``check_length``: so are lengths that do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .options import OptionError

SCHEDULES = {
    "constant": "the learning rate stays where it is after the warm-up",
    "linear": "falls in a straight line to its end",
    "cosine": "falls along half a cosine to its end: slowly, fast, slowly",
    "cosine with restarts": "falls along half a cosine several times (cycles), each time from the full rate",
    "polynomial": "falls like (1 − p) to the power of power",
    "inverse-sqrt": "falls like 1/√step after the warm-up, without an end: runs can be made longer at will",
    "REX": "stays high for long, then falls fast",
    "warm-up-stable-decay": "stays where it is, and falls along half a cosine over the last decay_steps",
}
RESTS = 10_000  # steps after which inverse-sqrt without a warm-up has fallen to 1/√2
REX_SHAPE = 0.9
STABLE_DECAYS = 5  # warm-up-stable-decay falls over the run's last 1/5 unless it is told otherwise

_HORIZON_FREE = ("constant", "inverse-sqrt")
_LISTENS = {  # option -> schedules it has an effect on
    "min_lr_factor": tuple(name for name in SCHEDULES if name not in _HORIZON_FREE),
    "horizon": tuple(name for name in SCHEDULES if name not in _HORIZON_FREE),
    "cycles": ("cosine with restarts",),
    "power": ("polynomial",),
    "decay_steps": ("warm-up-stable-decay",),
}
_DEFAULTS = {"min_lr_factor": 0.0, "horizon": 0, "cycles": 1.0, "power": 1.0, "decay_steps": 0}


def check_schedule(settings: Any) -> None:
    """Raises OptionError for options that have no effect on the chosen schedule."""
    for option, schedules in _LISTENS.items():
        value = getattr(settings, option)
        if value != _DEFAULTS[option] and settings.schedule not in schedules:
            raise OptionError(
                f"{option} is {value!r}, expected {_DEFAULTS[option]!r}: it has no effect on the schedule "
                f"{settings.schedule}, only on {', '.join(schedules)}"
            )
    if settings.schedule_unit != "steps" and not (settings.warmup_steps or settings.decay_steps or settings.horizon):
        raise OptionError(
            f"schedule_unit is {settings.schedule_unit!r}, expected 'steps': warmup_steps, decay_steps and horizon "
            "are 0, so there is nothing to count"
        )


def check_length(settings: Any, total: int, steps_per_epoch: float = 1.0) -> None:
    """Raises OptionError where the schedule does not fit a run of ``total`` optimizer steps."""
    length = _steps(settings, settings.horizon, steps_per_epoch) or total
    if length < total:
        raise OptionError(f"horizon is {length} steps, expected 0 or at least the {total} steps of the run")
    check_room(settings, length, steps_per_epoch, "the run")


def check_room(settings: Any, length: int, steps_per_epoch: float, whose: str) -> None:
    """Raises OptionError where warm-up and fall do not fit the ``length`` steps of ``whose`` schedule."""
    warmup = _steps(settings, settings.warmup_steps, steps_per_epoch)
    decay = _steps(settings, settings.decay_steps, steps_per_epoch)
    if warmup > length:
        raise OptionError(f"warmup_steps is {warmup} steps, expected at most the {length} of {whose}")
    if warmup + decay > length:
        raise OptionError(
            f"decay_steps is {decay} steps, expected at most {length - warmup}: {whose} has {length} and the warm-up "
            f"takes {warmup}"
        )


@dataclass(frozen=True)
class Schedule:
    """A schedule of ``length`` steps that begins at step ``start`` of the run.

    ``settings`` are ``OptimizerSettings``; ``steps_per_epoch`` is what their lengths in epochs are counted with.
    """

    settings: Any
    length: int
    start: int = 0
    steps_per_epoch: float = 1.0

    @classmethod
    def of_run(cls, settings: Any, total: int, steps_per_epoch: float = 1.0) -> Schedule:
        """The schedule of a whole run of ``total`` steps, or of its horizon. Raises OptionError."""
        check_length(settings, total, steps_per_epoch)
        return cls(settings, _steps(settings, settings.horizon, steps_per_epoch) or total, 0, steps_per_epoch)

    @property
    def horizon_free(self) -> bool:
        """Whether no step's rate depends on ``length``."""
        return self.settings.schedule in _HORIZON_FREE

    def factor(self, step: int) -> float:
        """What the learning rate is multiplied with at optimizer step ``step`` (0-based) of the run."""
        return rate_factor(step - self.start, self.length, self.settings, self.steps_per_epoch)


def rate_factor(step: int, total: int, settings: Any, steps_per_epoch: float = 1.0) -> float:
    """What the learning rate is multiplied with at optimizer step ``step`` (0-based) of ``total``."""
    warmup = _steps(settings, settings.warmup_steps, steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    if settings.schedule == "inverse-sqrt":
        rest = warmup or RESTS
        return math.sqrt(rest / (step - warmup + rest))
    begin = warmup
    if settings.schedule == "warm-up-stable-decay":
        decay = _steps(settings, settings.decay_steps, steps_per_epoch) or max(1, round(total / STABLE_DECAYS))
        begin = max(warmup, total - decay)
    progress = max(0.0, (step - begin) / max(1, total - begin))
    fallen = 0.0 if progress >= 1 else _FALLS[settings.schedule](progress, settings)
    return settings.min_lr_factor + (1 - settings.min_lr_factor) * fallen


def _half_cosine(p: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * p))


_FALLS: dict[str, Callable[[float, Any], float]] = {
    "linear": lambda p, _: 1 - p,
    "cosine": lambda p, _: _half_cosine(p),
    "cosine with restarts": lambda p, settings: _half_cosine(settings.cycles * p % 1),
    "polynomial": lambda p, settings: (1 - p) ** settings.power,
    "REX": lambda p, _: (1 - p) / (1 - REX_SHAPE + REX_SHAPE * (1 - p)),
    "warm-up-stable-decay": lambda p, _: _half_cosine(p),
}


def _steps(settings: Any, length: int, steps_per_epoch: float) -> int:
    return round(length * steps_per_epoch) if settings.schedule_unit == "epochs" else length
