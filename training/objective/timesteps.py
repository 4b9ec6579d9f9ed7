"""Which timesteps are drawn.

* ``draw_times``: a distribution, cut to the range that trains, moved by the shift.
* ``time_shift``: s of the shift t → s·t / (1 + (s−1)·t); by the picture's size as Flux does it.
* The distributions: uniform, logit-normal, mode and cosmap (Esser et al. 2024, section 3.1), and a drawn curve.

The limits min_timestep ≤ 1000·t < max_timestep hold for the times that the model gets, after the shift. The
distribution is cut to them: within the range every time stays as much more likely than another as it was, and none
piles up at an edge. Each time takes one draw of the generator, whatever is set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..curve import parse_curve
from ..options import OptionError
from ..settings import ObjectiveSettings
from .prediction import Prediction

RARE = 1e-9  # a range that holds less than this part of the draws is a mistake
ROUNDING = 1e-7  # float32 must not take a time for the end of its range
FLUX_TOKENS, FLUX_MU = (256, 4096), (0.5, 1.15)
TOKEN = 16 * 16  # pixels of a Flux token
ROOM = (0.0, 1.0)
Time = TypeVar("Time", float, Tensor)


class Distribution(Protocol):
    def mass(self, low: float, high: float) -> float:
        """Part of the draws between two times."""
        ...

    def draw(self, count: int, low: float, high: float, draws: torch.Generator) -> Tensor:
        """Times (count,) between the two, float64."""
        ...


@dataclass(frozen=True)
class Inverted:
    """Drawn by its ``quantile`` function (the inverse of ``cdf``) from uniform numbers."""

    cdf: Callable[[Tensor], Tensor]
    quantile: Callable[[Tensor], Tensor]

    def _parts(self, low: float, high: float) -> tuple[float, float]:
        if (low, high) == ROOM:
            return ROOM
        first, last = self.cdf(torch.tensor([low, high], dtype=torch.float64)).tolist()
        return first, last

    def mass(self, low: float, high: float) -> float:
        first, last = self._parts(low, high)
        return last - first

    def draw(self, count: int, low: float, high: float, draws: torch.Generator) -> Tensor:
        first, last = self._parts(low, high)
        return self.quantile(first + (last - first) * torch.rand(count, generator=draws, dtype=torch.float64))


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid(mean + std · normal)."""

    mean: float
    std: float

    def _parts(self, low: float, high: float) -> Tensor:
        edges = torch.logit(torch.tensor([low, high], dtype=torch.float64))
        return torch.special.ndtr((edges - self.mean) / self.std)

    def mass(self, low: float, high: float) -> float:
        return self._parts(low, high).diff().item()

    def draw(self, count: int, low: float, high: float, draws: torch.Generator) -> Tensor:
        normal = torch.randn(count, generator=draws, dtype=torch.float64)
        if (low, high) != ROOM:
            first, last = self._parts(low, high)
            normal = torch.special.ndtri(first + (last - first) * torch.special.ndtr(normal))
        return torch.sigmoid(self.mean + self.std * normal)


UNIFORM = Inverted(lambda time: time, lambda part: part)
# density 2 / (π (1 − 2t + 2t²))
COSMAP = Inverted(
    lambda time: torch.atan2(time, 1 - time) * 2 / math.pi,
    lambda part: 1 / (1 + torch.tan(math.pi / 2 * (1 - part))),
)


def mode(scale: float) -> Inverted:
    """Above 0 the middle is drawn more often than the ends, below 0 less often."""

    def quantile(part: Tensor) -> Tensor:  # f_mode(u; s) = 1 − u − s (cos²(πu/2) − 1 + u) of the paper at u = 1 − part
        return part + scale * (part - torch.sin(math.pi / 2 * part) ** 2)

    def cdf(time: Tensor) -> Tensor:  # it has no closed form
        low, high = torch.zeros_like(time), torch.ones_like(time)
        for _ in range(54):  # bits of a double
            middle = (low + high) / 2
            below = quantile(middle) < time
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(time >= 1, 1.0, high * (time > 0))

    return Inverted(cdf, quantile)


def distribution(prediction: Prediction, settings: ObjectiveSettings) -> Distribution:
    kind = resolved(prediction, settings)
    if kind == "logit-normal":
        return LogitNormal(settings.logit_mean, settings.logit_std)
    if kind == "mode":
        return mode(settings.mode_scale)
    if kind == "curve":
        curve = parse_curve(settings.timestep_curve)
        return Inverted(curve.cdf, curve.quantile)
    return COSMAP if kind == "cosmap" else UNIFORM


def resolved(prediction: Prediction, settings: ObjectiveSettings) -> str:
    """How timesteps are drawn, where the settings leave it to the kind of model."""
    if settings.timesteps != "automatic":
        return settings.timesteps
    return "logit-normal" if prediction.is_flow else "uniform"


def time_shift(settings: ObjectiveSettings, pixels: int) -> float:
    """s; for pictures of ``pixels`` = height · width, counted in tokens of Flux whatever the model cuts them into."""
    if settings.timestep_shift == "fixed":
        return settings.shift
    if settings.timestep_shift == "none":
        return 1.0
    (few, many), (low, high) = FLUX_TOKENS, FLUX_MU
    return math.exp(low + (high - low) * (pixels / TOKEN - few) / (many - few))


def shifted(time: Time, shift: float) -> Time:
    """s·t / (1 + (s−1)·t), so written that the ends stay where they are to the last bit. 1/s is the way back."""
    return time if shift == 1 else time / (time + (1 - time) / shift)


def draw_times(
    count: int, prediction: Prediction, settings: ObjectiveSettings, draws: torch.Generator, pixels: int = 0
) -> Tensor:
    """Positions (count,) in [0, 1), 0 being clean; float64 on the CPU.

    ``pixels`` is the height times the width of the pictures, for shifts that depend on it.
    """
    shift = time_shift(settings, pixels)
    check_range(prediction, settings, shift)
    times = distribution(prediction, settings).draw(count, *_before_shift(settings, shift), draws)
    return shifted(times, shift).clamp(settings.min_timestep / 1000, settings.max_timestep / 1000 - ROUNDING)


def _before_shift(settings: ObjectiveSettings, shift: float) -> tuple[float, float]:
    """Between which times to draw, so that the shifted ones keep the limits."""
    return shifted(settings.min_timestep / 1000, 1 / shift), shifted(settings.max_timestep / 1000, 1 / shift)


def check_range(prediction: Prediction, settings: ObjectiveSettings, shift: float) -> None:
    """Raises OptionError where the distribution has (next to) nothing between the limits."""
    if distribution(prediction, settings).mass(*_before_shift(settings, shift)) < RARE:
        kind = resolved(prediction, settings)
        options = {"curve": "timestep_curve", "logit-normal": "logit_mean and logit_std"}.get(kind, "timesteps")
        raise OptionError(
            f"min_timestep is {settings.min_timestep} and max_timestep {settings.max_timestep}, but {kind} timesteps "
            f"are never drawn between them: widen the range, or change {options}"
        )
