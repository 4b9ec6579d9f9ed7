"""What a run has measured so far, kept short however long it is.

* ``Series``: (step, value) in the order of steps. Where there would be more than ``limit`` points, every ``width``
  steps (a power of two, counted from 0) keep their lowest and their highest value, and ``width`` doubles as the curve
  grows: no peak is lost, and the last point is always there.
* ``History``: the series of a run by name, from the lines of its log (``logs``), live or read from the file.

Numbers only, in plain arrays: half a megabyte for a run of any length.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .logs import band_names

LIMIT = 2048  # points kept of each series
ROOM = 0.75  # of the limit is filled by thinning at most, so that it is not done at every step
FURTHEST = 2**53  # steps that JSON can tell apart
MEASURED = "validation"
BAND = "loss at "
Points = dict[str, dict[str, list[Any]]]  # name → {"step": […], "value": […]}, what is not a number being None


class Series:
    """One curve of at most ``limit`` points."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.width = limit, 1
        self.steps, self.values = array("q"), array("d")

    def add(self, step: int, value: float) -> None:
        """The next point; steps never fall."""
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > self.limit:
            self._thin()

    def _thin(self) -> None:
        kept = _extremes(self.steps, self.values, self.width)
        while len(kept) >= ROOM * self.limit:
            self.width *= 2
            kept = _extremes(self.steps, self.values, self.width)
        if kept[-1] != len(self.steps) - 1:
            kept.append(len(self.steps) - 1)
        self.steps = array("q", (self.steps[index] for index in kept))
        self.values = array("d", (self.values[index] for index in kept))

    def columns(self, first: int = 0) -> dict[str, list[Any]]:
        """The points from the ``first``-th on."""
        return {"step": self.steps[first:].tolist(), "value": [_plain(value) for value in self.values[first:]]}


def _extremes(steps: array[int], values: array[float], width: int) -> list[int]:
    """The places of the lowest and the highest value of every ``width`` steps; of those that are numbers, if any."""
    bucket, value = np.array(steps) // width, np.array(values)
    first = np.flatnonzero(np.diff(bucket, prepend=-1))  # place of each bucket's first point, also once sorted
    last = np.append(first[1:], len(bucket)) - 1
    unknown = np.isnan(value)
    lowest = np.lexsort((np.where(unknown, np.inf, value), bucket))[first]
    highest = np.lexsort((np.where(unknown, -np.inf, value), bucket))[last]
    return np.union1d(lowest, highest).tolist()


class History:
    """The curves of a run: loss, learning_rate, seconds (of each step), validation, and the loss of each band of
    timesteps, at most ``limit`` points each."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit, self.step = limit, 0
        self.series: dict[str, Series] = {}

    def add(self, line: Mapping[str, Any]) -> list[tuple[str, int, float]]:
        """Take in a line of the log; returns its points. Lines that no trainer has written, or that go back, are left
        out."""
        try:
            points = list(_points(line))
        except (KeyError, TypeError, ValueError, OverflowError):
            return []
        points = [point for point in points if self._goes_on(*point[:2])]
        for name, step, value in points:
            self.series.setdefault(name, Series(self.limit)).add(step, value)
            self.step = max(self.step, step)
        return points

    def _goes_on(self, name: str, step: int) -> bool:
        before = self.series.get(name)
        return 0 <= step < FURTHEST and (before is None or before.steps[-1] <= step)

    def points(self, since: int | None = None) -> Points:
        """All points, or those after the step ``since``; of what is measured also at that step, for that comes after
        the step itself."""
        found = {}
        for name, series in self.series.items():
            cut = bisect_left if name == MEASURED else bisect_right
            found[name] = series.columns(0 if since is None else cut(series.steps, since))
        return found

    def thinned(self, limit: int) -> Points:
        """The same curves with at most ``limit`` points each."""
        found = {}
        for name, series in self.series.items():
            fewer = Series(limit)
            for step, value in zip(series.steps, series.values, strict=True):
                fewer.add(step, value)
            found[name] = fewer.columns()
        return found


def history_of(lines: Iterable[Mapping[str, Any]]) -> History:
    history = History()
    for line in lines:
        history.add(line)
    return history


def _points(line: Mapping[str, Any]) -> Iterator[tuple[str, int, float]]:
    step = line["step"]
    if not isinstance(step, int):
        raise TypeError("a step is a whole number")
    if MEASURED in line:
        yield MEASURED, step, _number(line["mean"])
        return
    for name in ("loss", "learning_rate", "seconds"):
        yield name, step, _number(line[name])
    for name, loss in zip(band_names(), line["bands"], strict=True):
        if not math.isnan(_number(loss)):  # none was drawn from this band
            yield BAND + name, step, _number(loss)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
