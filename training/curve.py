"""A density that somebody drew: points joined by straight lines, ``0:1, 0.5:3, 1:0``.

* ``parse_curve``: text → ``Curve``; its errors name the option and the point.
* ``Curve.cdf``, ``Curve.quantile``: exact, from the area under the lines. Outside the first and the last point the
  density is 0; two points at one time make a step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .options import OptionError

EXAMPLE = "points such as 0:1, 0.5:3, 1:0"
HEAVIEST = 1e9


@dataclass(frozen=True)
class Curve:
    """Lines from (begin, weight) over ``length`` with ``slope``, those with an area only; all (S,) float64."""

    begin: Tensor
    length: Tensor
    weight: Tensor
    slope: Tensor

    def areas(self, length: Tensor) -> Tensor:
        """Under the first ``length`` of each line."""
        return length * (self.weight + self.slope * length / 2)

    def cdf(self, times: Tensor) -> Tensor:
        """Part of the area below each of ``times`` (N,)."""
        covered = torch.minimum((times[:, None] - self.begin).clamp(min=0), self.length)
        return self.areas(covered).sum(1) / self.areas(self.length).sum()

    def quantile(self, parts: Tensor) -> Tensor:
        """The times (N,) below which ``parts`` (N,) of the area lie."""
        ends = self.areas(self.length).cumsum(0)
        area = parts * ends[-1]
        line = torch.searchsorted(ends, area, right=True).clamp(max=len(ends) - 1)
        rest = area - torch.cat([ends.new_zeros(1), ends])[line]
        # the root of weight · x + slope / 2 · x² = rest that does not cancel for flat lines
        weight, slope = self.weight[line], self.slope[line]
        root = (weight**2 + 2 * slope * rest).clamp(min=0).sqrt()
        return self.begin[line] + torch.minimum(2 * rest / (weight + root).clamp(min=1e-300), self.length[line])


def parse_curve(text: str) -> Curve:
    """Raises OptionError naming ``timestep_curve`` and the bad point."""
    points = [_point(part.strip()) for part in text.split(",") if part.strip()]
    for (early, _), (late, weight) in zip(points, points[1:], strict=False):
        if late < early:
            raise OptionError(f"timestep_curve: {late:g}:{weight:g} comes after {early:g}, expected rising times")
    times, weights = torch.tensor(points or [(0.0, 0.0)], dtype=torch.float64).unbind(1)
    length, slope = times.diff(), weights.diff() / times.diff()
    drawn = length * (weights[1:] + weights[:-1]) > 0
    if not drawn.any():
        raise OptionError(
            f"timestep_curve is {text!r}, expected {EXAMPLE}: two points or more, and more than 0 somewhere between"
        )
    return Curve(times[:-1][drawn], length[drawn], weights[:-1][drawn], slope[drawn])


def _point(text: str) -> tuple[float, float]:
    try:
        time, weight = (float(number) for number in text.split(":"))
    except ValueError:
        raise OptionError(f"timestep_curve: {text!r} is no point, expected time:weight, {EXAMPLE}") from None
    if not 0 <= time <= 1:
        raise OptionError(f"timestep_curve: the time of {text!r} is {time:g}, expected 0 (clean) to 1 (noise)")
    if not 0 <= weight <= HEAVIEST:
        raise OptionError(f"timestep_curve: the weight of {text!r} is {weight:g}, expected 0 to {HEAVIEST:g}")
    return time, weight
