"""Weights over a sampling run.

* ``Schedule``: points (a weight, and where in the run it holds), held until the next point or blended into it.
* ``fixed``: the same weight all the time; ``parse``: from text, ``str(schedule)`` is the way back.
* ``Clock``: how many steps are done at a noise level, from the sigmas of the run; ``ModelClock``: where only the
  model's own time is known, without steps.

Text: ``0.7``, or points ``weight@place`` with commas between. A place is
- ``6``: from the 6th step on (steps count from 1);
- ``0.5``, ``50%``: from this part of the run's steps on;
- ``s14.6``, ``sigma14.6``, ``14.6σ``: from this noise level on;
- ``after2.5``: where this many steps are done.
Behind the last point may stand how to go from one to the next, ``hold``, ``linear`` or ``cosine``, and ``of steps-2``
where parts of the run are to be counted in fewer steps than it has: ``0@0%,1@50% linear of steps-2``.

A position is the number of whole steps done: the call of the model that begins step 6 has position 5. Samplers also
call the model between the levels of the run, so positions are interpolated, never looked up.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

HOLD = "hold"
INTERPOLATIONS = {
    HOLD: "a weight holds until the next point",
    "linear": "straight from one point to the next",
    "cosine": "gently from one point to the next",
}
UNITS = ("step", "fraction", "sigma")
MAX_WEIGHT, MAX_POINTS, MAX_LENGTH = 100.0, 200, 8000
MAX_STEP, MAX_SIGMA = 100_000, 1e10

_TOLERANCE = 1e-6  # of a step: sigmas are float32
_ROUNDING = 4e-7  # relative: a level that is off by less is the level of the list
_NUMBER = r"(?:\d{1,25}(?:\.\d{0,25})?|\.\d{1,25})(?:[eE][+-]?\d{1,3})?"
_WEIGHT = re.compile(rf"[+-]?{_NUMBER}", re.ASCII)
_PLACE = re.compile(
    rf"(?P<step>\d{{1,20}})|(?P<percent>{_NUMBER})\s?%|(?P<fraction>{_NUMBER})|after\s?(?P<after>{_NUMBER})"
    rf"|(?:sigma|s|σ)\s?(?P<sigma>{_NUMBER})|(?P<level>{_NUMBER})\s?σ",
    re.ASCII | re.IGNORECASE,
)
_ENDING = re.compile(r"(?:\s(?P<how>[a-z]{1,20}))?(?:\sof\ssteps\s?-\s?(?P<inset>\d{1,4}))?$", re.ASCII | re.IGNORECASE)
_PLACES = "a step (6), a part of the run (0.5 or 50%) or a noise level (s14.6)"


@dataclass(frozen=True)
class Point:
    """``weight`` from ``position`` on: steps done, a fraction 0 to 1 of the steps, or a noise level."""

    weight: float
    position: float
    unit: str = "step"

    def __str__(self) -> str:
        if self.unit == "sigma":
            place = "s" + _shown(self.position)
        elif self.unit == "fraction":
            place = repr(float(self.position))
        elif float(self.position).is_integer():
            place = str(int(self.position) + 1)
        else:
            place = "after" + _shown(self.position)
        return f"{_shown(self.weight)}@{place}"


@dataclass(frozen=True)
class Schedule:
    """Points in any order; ``inset``: fractions are of so many steps less than the run has."""

    points: tuple[Point, ...]
    interpolation: str = "hold"
    inset: int = 0

    def __post_init__(self) -> None:
        if not 1 <= len(self.points) <= MAX_POINTS:
            raise ValueError(f"a schedule of {len(self.points)} points, expected 1 to {MAX_POINTS}")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}, expected one of {', '.join(INTERPOLATIONS)}")
        if not 0 <= self.inset <= MAX_STEP:
            raise ValueError(f"inset is {self.inset}, expected 0 to {MAX_STEP} steps")
        for point in self.points:
            _check(point)

    @property
    def constant(self) -> float | None:
        """The one weight that it always has; None for one that changes."""
        first = self.points[0].weight
        return first if all(point.weight == first for point in self.points) else None

    def at(self, clock: Clock | ModelClock, sigma: float) -> float:
        """The weight at a noise level; the first one before all points, the last one behind them."""
        if (constant := self.constant) is not None:
            return constant
        placed = sorted(((clock.place(point, self.inset), point.weight) for point in self.points), key=_position)
        now = clock.position(sigma)
        done = bisect_right(placed, now + _TOLERANCE, key=_position)
        if done == 0:
            return placed[0][1]
        begin, weight = placed[done - 1]
        if done == len(placed) or self.interpolation == "hold":
            return weight
        end, following = placed[done]
        part = min(max((now - begin) / (end - begin), 0.0), 1.0)
        if self.interpolation == "cosine":
            part = (1 - math.cos(math.pi * part)) / 2
        return weight + (following - weight) * part

    def scaled(self, factor: float) -> Schedule:
        """The same with every weight times ``factor``."""
        return simplest(replace(self, points=tuple(replace(p, weight=p.weight * factor) for p in self.points)))

    def __str__(self) -> str:
        """Text that ``parse`` reads back."""
        if (constant := self.constant) is not None:
            return _shown(constant)
        how = "" if self.interpolation == "hold" else f" {self.interpolation}"
        inset = f" of steps-{self.inset}" if self.inset else ""
        return ",".join(str(point) for point in self.points) + how + inset


class Clock:
    """The steps of a run, from its sigmas: falling, or rising as they do when a picture is turned into noise.

    Of a level that repeats the last place counts: a step between equal levels changes nothing.
    """

    def __init__(self, sigmas: Iterable[float]) -> None:
        self.sigmas = tuple(float(sigma) for sigma in sigmas)
        if not self.sigmas or not all(math.isfinite(sigma) for sigma in self.sigmas):
            raise ValueError(
                f"the noise levels of this run are {str(list(self.sigmas[:8]))[:100]}, expected finite numbers, one at "
                "least; choose more steps or another scheduler"
            )
        self.steps = len(self.sigmas) - 1
        self._sign = 1.0 if self.sigmas[-1] > self.sigmas[0] else -1.0
        self._keys = [self._sign * sigma for sigma in self.sigmas]
        gaps = [after - before for before, after in itertools.pairwise(self._keys)]
        if any(gap < 0 for gap in gaps):
            raise ValueError(
                "the noise levels of this run go up and down again, so they do not tell how many steps are done; "
                "sample each part in a run of its own, or use constant weights"
            )
        real = [gap for gap in gaps if gap > 0] or [1.0]
        self._first_gap, self._last_gap = real[0], real[-1]

    def position(self, sigma: float) -> float:
        """How many steps are done at this noise level, 0 to ``steps``."""
        return min(max(self._continued(float(sigma)), 0.0), float(self.steps))

    def place(self, point: Point, inset: int = 0) -> float:
        """Where on this clock a point lies. Noise levels that the run does not reach lie before or behind it."""
        if point.unit == "sigma":
            return self._continued(point.position)
        return point.position * max(self.steps - inset, 0) if point.unit == "fraction" else point.position

    def _continued(self, sigma: float) -> float:
        """The position, beyond both ends as if the outermost steps went on."""
        keys, key = self._keys, self._sign * sigma
        after = bisect_right(keys, key)
        around = [near for near in (after - 1, after) if 0 <= near <= self.steps]
        nearest = min(around, key=lambda near: abs(keys[near] - key))
        if abs(keys[nearest] - key) <= _ROUNDING * abs(key):
            return bisect_right(keys, keys[nearest]) - 1.0
        if after == 0:
            return (key - keys[0]) / self._first_gap
        if after > self.steps:
            return self.steps + (key - keys[-1]) / self._last_gap
        return after - 1 + (key - keys[after - 1]) / (keys[after] - keys[after - 1])


class ModelClock:
    """The model's own time: ``fraction_of`` a noise level is 0 at pure noise and 1 at the picture.

    It knows no steps: nothing is inset, and points by step cannot be placed.
    """

    def __init__(self, fraction_of: Callable[[float], float]) -> None:
        self._fraction_of = fraction_of

    def position(self, sigma: float) -> float:
        return float(self._fraction_of(float(sigma)))

    def place(self, point: Point, inset: int = 0) -> float:
        if point.unit == "step":
            raise ValueError(
                f"{point}: the steps of the whole trajectory are not known here; connect its sigmas, count on the "
                "run's own clock, or write a part (@50%) or a noise level (@s14.6) instead of a step"
            )
        return self.position(point.position) if point.unit == "sigma" else point.position


def fixed(weight: float) -> Schedule:
    """The same weight all the time."""
    return Schedule((Point(float(weight), 0.0, "fraction"),))


def parse(text: str, name: str, interpolation: str = "hold") -> Schedule:
    """A schedule from text; ``interpolation`` where that says none. Raises ValueError that begins with ``name``."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{name}: {len(text)} letters, expected at most {MAX_LENGTH}")
    items, how, inset = written(text)
    if how and how.lower() not in INTERPOLATIONS:
        raise ValueError(f"{name}: {how!r} behind the points, expected {', '.join(INTERPOLATIONS)} or nothing")
    if len(items) > MAX_POINTS:
        raise ValueError(f"{name}: {len(items)} points, expected at most {MAX_POINTS}")
    if len(items) == 1 and "@" not in items[0]:
        return fixed(weight_of(items[0], name))
    points = [point_of(item, name) for item in items]
    if any(_is_zero(item) for item in items) and any(point.unit == "step" for point in points):
        raise ValueError(f"{name}: steps count from 1; write @1 for the first, or @0% for the run's beginning")
    try:
        schedule = Schedule(tuple(points), (how or interpolation).lower(), int(inset or 0))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    places = {(point.unit, point.position) for point in points}
    if schedule.interpolation == "hold" and len(places) < len(points):
        raise ValueError(f"{name}: {_cut(text)!r} has two weights for one place; leave one of them out")
    return simplest(schedule)


def written(text: str) -> tuple[list[str], str | None, str | None]:
    """(the points as they are written, how to go from one to the next, how many steps less)."""
    body = " ".join(text.split())
    ending = _ENDING.search(body)
    how, inset = (ending["how"], ending["inset"]) if ending else (None, None)
    return [item.strip() for item in body[: ending.start() if ending else None].split(",")], how, inset


def simplest(schedule: Schedule) -> Schedule:
    """The same, without places where it is one weight anyway."""
    return schedule if (constant := schedule.constant) is None else fixed(constant)


def is_number(text: str) -> bool:
    return _WEIGHT.fullmatch(text.strip()) is not None


def weight_of(text: str, name: str) -> float:
    """One weight from its text. Raises ValueError that begins with ``name``."""
    if not is_number(text):
        raise ValueError(f"{name}: {_cut(text)!r} is no weight; write a number (0.7), or with places 0.1@1,0.6@6")
    if abs(weight := float(text)) > MAX_WEIGHT:
        raise ValueError(f"{name}: {_cut(text)} is too much, expected -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
    return weight + 0.0  # a negative zero is a zero


def point_of(item: str, name: str) -> Point:
    """One ``weight@place``. Raises ValueError that begins with ``name``."""
    weight, at, place = (part.strip() for part in item.partition("@"))
    if not item:
        raise ValueError(f"{name}: a weight is missing between the commas; write weights with places (0.1@1,0.6@6)")
    if not at:
        raise ValueError(f"{name}: {_cut(item)!r} has no place; write {_cut(item)}@ and {_PLACES}")
    found = _PLACE.fullmatch(place)
    if found is None:
        raise ValueError(f"{name}: {_cut(place)!r} is no place in a run; write {_PLACES}")
    value = weight_of(weight, name)
    kinds = found.groupdict()
    if kinds["step"] is not None:
        step = int(kinds["step"])
        point = Point(value, step - 1.0, "step") if step else Point(value, 0.0, "fraction")
    elif kinds["after"] is not None:
        point = Point(value, float(kinds["after"]), "step")
    elif kinds["percent"] is not None:
        point = Point(value, float(kinds["percent"]) / 100, "fraction")
    elif kinds["fraction"] is not None:
        point = Point(value, float(kinds["fraction"]), "fraction")
    else:
        point = Point(value, float(kinds["sigma"] or kinds["level"]), "sigma")
    try:
        _check(point)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return point


def _is_zero(item: str) -> bool:
    """Whether an item is for "step 0", which there is not."""
    place = item.partition("@")[2].strip()
    return place.isdecimal() and not int(place)


def _check(point: Point) -> None:
    most = {"step": MAX_STEP, "fraction": 1.0, "sigma": MAX_SIGMA}.get(point.unit)
    if most is None:
        raise ValueError(f"a point by {point.unit!r}, expected {', '.join(UNITS)}")
    if not math.isfinite(point.weight):
        raise ValueError(f"a weight of {point.weight}, expected a finite number")
    if not 0 <= point.position <= most:
        cure = "; a number without a dot is a step" if point.unit == "fraction" else ""
        raise ValueError(f"{point.unit} {point.position:g}, expected 0 to {most:g}{cure}")


def _position(placed: tuple[float, float]) -> float:
    return placed[0]


def _shown(number: float) -> str:
    """The shortest text that is exactly this number."""
    return repr(float(number) + 0.0).removesuffix(".0")


def _cut(text: str) -> str:
    return text[:60]
