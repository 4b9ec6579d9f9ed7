"""Where a sampling run is: the clocks that weights over a run are told by.

* ``Course``: which steps are counted: those of the sampler's own run, or the whole trajectory, of which a split run or
  an img2img run is a part.
* ``clock_of``: the clock of one call of the model, and the noise level it is made at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from torch import Tensor

from ..kernels.strengths.schedule import Clock, ModelClock

RUN, TRAJECTORY = "run", "trajectory"
CLOCKS = {
    RUN: "steps of this sampler's run; a second sampler, or denoise below 1, counts its own steps from 1",
    TRAJECTORY: "the whole way from noise to picture, of which this run may be a part: by the model's own time, or "
    "by the steps of the sigmas socket",
}
_HALVINGS = 40
_LEVELS = 4096  # noise levels whose place is remembered


@dataclass(frozen=True)
class Course:
    """``sigmas``: of the whole trajectory; without them it is told by the model's own time, which has no steps."""

    clock: str = RUN
    sigmas: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.clock not in CLOCKS:
            raise ValueError(f"clock: {self.clock!r} is none; choose one of {', '.join(CLOCKS)}")
        if self.clock == RUN and self.sigmas:
            raise ValueError("sigmas: they count for the clock 'trajectory' only; choose it, or leave sigmas open")

    def without_effect(self, changes: bool) -> list[str]:
        """What is chosen in vain, in sentences; ``changes``: whether any weight changes over the run."""
        if changes or self.clock == RUN:
            return []
        return [f"clock: {self.clock} has no effect, since no weight changes over the run"]

    def clock_in(self, run: Sequence[float] | None, sampling: Any) -> Clock | ModelClock:
        """``run``: the sigmas of the sampler's run, None outside of samplers; ``sampling``: the model's."""
        sigmas = self.sigmas if self.clock == TRAJECTORY else run
        return Clock(sigmas) if sigmas else ModelClock(lru_cache(_LEVELS)(partial(fraction_of, sampling)))


def fraction_of(sampling: Any, sigma: float) -> float:
    """How far a noise level lies in the model's own time: 0 for pure noise, 1 for the picture (the host's percent)."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return high


def sigma_of(options: Mapping[str, Any], timestep: Any) -> float:
    """The noise level of a call of the model, from its transformer options or else its time argument."""
    sigmas = options.get("sigmas")
    return float((timestep if sigmas is None else sigmas).flatten()[0])


class RunSigmas:
    """The sigmas of the run a call belongs to, as numbers; read from the device once a run."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None
        self._numbers: tuple[float, ...] = ()

    def of(self, options: Mapping[str, Any]) -> tuple[float, ...] | None:
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            return None
        if sigmas is not self._seen:
            self._seen, self._numbers = sigmas, tuple(sigmas.flatten().tolist())
        return self._numbers
