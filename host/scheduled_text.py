"""A prompt whose encoding changes over a sampling run, in one CONDITIONING.

* ``stepwise``: a schedule that is blended, as one that is held, since texts are encoded before the run.
* ``combinations``: which weights of several schedules can hold at the same time; ``at_beginning``: those that hold
  where a run begins at full noise.
* ``Choice``: which of several encodings is meant at a moment; ``conditioning``: all of them as one CONDITIONING.
* ``install``: lets a MODEL choose by the real step. On a MODEL without it the first encoding acts all the time, or, for
  parts of the run, each over the host's percent of that number.

The host hands unknown keys of a CONDITIONING through to the sampler. So the entries of every encoding carry a
``Variant``, and a wrapper around each evaluation leaves out those that are not meant. What nodes set on entries later
(areas, masks, ranges of time, ControlNets, hooks) stays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from comfy.patcher_extension import WrappersMP

from ..kernels.strengths.schedule import Clock, ModelClock, Point, Schedule, simplest
from .clocks import Course, RunSigmas, sigma_of
from .fusing import KEY

VARIANT = "loom_text"  # the key in entries of a CONDITIONING
MOST = 64  # encodings of one prompt
PARTS = 20  # of a run, in which weights by parts of it are blended
_LEVELS = 1000
_EVER, _NEVER = (0.0, 1.0), (1.0, 1.0)

Entries = list[list[Any]]  # a CONDITIONING
Entry = dict[str, Any]  # as the sampler has it
Weights = tuple[float, ...]
Percents = tuple[float, float]


# -- what can hold at the same time


def stepwise(schedule: Schedule, name: str) -> Schedule:
    """The same, held from whole step to whole step, or for twentieths of the run. Raises ValueError with ``name``."""
    if schedule.interpolation == "hold" or schedule.constant is not None:
        return schedule
    units = {point.unit for point in schedule.points}
    if len(units) > 1 or "sigma" in units:
        raise ValueError(
            f"{name}: {schedule}: what a text encoder gets can only be blended from step to step or in parts of the "
            "run; write all places as steps (@6) or all as parts (@50%), hold the weights, or write one for text (te=1)"
        )
    unit = units.pop()
    places = {point.position for point in schedule.points}
    low, high, grain = min(places), max(places), PARTS if unit == "fraction" else 1
    if (high - low) * grain > MOST:
        raise ValueError(_too_many(name))
    between = (number / grain for number in range(math.floor(low * grain) + 1, math.ceil(high * grain)))
    places.update(between)
    most, plain = high or 1.0, ModelClock(lambda part: part)
    parts = replace(schedule, points=tuple(Point(p.weight, p.position / most, "fraction") for p in schedule.points))
    held = tuple(Point(parts.at(plain, place / most), place, unit) for place in sorted(places))
    return simplest(replace(schedule, points=held, interpolation="hold"))


def combinations(schedules: Sequence[Schedule], name: str) -> list[Weights]:
    """What distinct, held schedules can be at the same time, in the order of a run where that is known beforehand.

    How steps, parts and noise levels follow each other only the run tells: of those all that might meet are given.
    """
    groups = _groups(schedules)
    meetings = [list(dict.fromkeys(weights for _, weights in _together(group))) for group in groups]
    if math.prod(map(len, meetings)) > MOST:
        raise ValueError(_too_many(name))
    order = list(itertools.chain(*groups))
    found = (dict(zip(order, itertools.chain(*parts), strict=True)) for parts in itertools.product(*meetings))
    return [tuple(weights[schedule] for schedule in schedules) for weights in found]


def at_beginning(schedules: Sequence[Schedule], course: Course, sampling: Any) -> Weights:
    top = float(sampling.sigma_max)
    clock = Clock(course.sigmas or (top * (1 - level / _LEVELS) for level in range(_LEVELS + 1)))
    return tuple(schedule.at(clock, clock.sigmas[0]) for schedule in schedules)


def _groups(schedules: Sequence[Schedule]) -> list[list[Schedule]]:
    """Those whose points are counted in the same way, so that it is known which comes first."""
    groups: dict[Hashable, list[Schedule]] = {}
    for schedule in schedules:
        groups.setdefault(_counted(schedule), []).append(schedule)
    return list(groups.values())


def _counted(schedule: Schedule) -> Hashable:
    units = {point.unit for point in schedule.points}
    return (*units, schedule.inset if units == {"fraction"} else 0) if len(units) == 1 else schedule


def _together(group: Sequence[Schedule]) -> list[tuple[float, Weights]]:
    """(place, weights from there on), in the order of the run; those of the first hold before it as well."""
    if len({point.unit for point in group[0].points}) > 1:
        return [(0.0, (point.weight,)) for point in group[0].points]
    sign = -1.0 if group[0].points[0].unit == "sigma" else 1.0
    places = sorted({sign * point.position for schedule in group for point in schedule.points})
    return [(place, tuple(_held(schedule, sign, place) for schedule in group)) for place in places]


def _held(schedule: Schedule, sign: float, place: float) -> float:
    points = sorted(schedule.points, key=lambda point: sign * point.position)
    return ([points[0]] + [point for point in points if sign * point.position <= place])[-1].weight


def _too_many(name: str) -> str:
    return (
        f"{name}: the prompt would have to be encoded more than {MOST} times, once for each weight the text encoders "
        "get over the run; write fewer points, or hold the weights instead of blending them"
    )


# -- several encodings in one CONDITIONING


@dataclass(frozen=True, eq=False)
class Choice:
    """The number of an encoding for all that ``schedules`` can be."""

    schedules: tuple[Schedule, ...]
    numbers: Mapping[Weights, int]
    course: Course
    _run: RunSigmas = field(default_factory=RunSigmas)

    def at(self, sampling: Any, options: Mapping[str, Any], sigma: float) -> int:
        clock = self.course.clock_in(self._run.of(options), sampling)
        return self.numbers[tuple(schedule.at(clock, sigma) for schedule in self.schedules)]

    def percents(self, first: int) -> dict[int, Percents]:
        """The host's range for each encoding, which counts on a MODEL that cannot choose."""
        spans: dict[int, Percents] = {}
        if [_counted(group[0]) for group in _groups(self.schedules)] == [("fraction", 0)]:
            moments = _together(self.schedules)
            ends = [place for place, _ in moments[1:]] + [1.0]
            begin, before = 0.0, -1
            for (_, weights), end in zip(moments, ends, strict=True):
                number = self.numbers[weights]
                if number in spans and number != before:
                    break  # comes back, and an entry has one range only
                spans[number] = (spans.get(number, (begin,))[0], end)
                begin, before = end, number
            else:
                return spans
        return {number: _EVER if number == first else _NEVER for number in self.numbers.values()}


@dataclass(frozen=True, eq=False)
class Variant:
    """What an entry of a CONDITIONING is: one of the encodings."""

    choice: Choice
    number: int


class _Ours(float):
    """An end of the range that an entry was given for other MODELs; one that a node sets is none, even if equal."""


def conditioning(encodings: Mapping[int, Entries], choice: Choice, first: int) -> Entries:
    """``encodings`` by number, ``first`` in front."""
    percents = choice.percents(first)
    found: Entries = []
    for number in sorted(encodings, key=lambda number: (number != first, number)):
        begin, end = map(_Ours, percents[number])
        marks = {VARIANT: Variant(choice, number), "start_percent": begin, "end_percent": end}
        found += [[text, {**extras, **marks}] for text, extras in encodings[number]]
    return found


# -- the right one for every call


def install(patcher: Any) -> None:
    """Once per MODEL, a clone that is the caller's; its clones have it too."""
    if not patcher.get_wrappers(WrappersMP.CALC_COND_BATCH, KEY):
        patcher.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _choose)


def _choose(executor: Any, model: Any, conds: list, x: Any, timestep: Any, model_options: Mapping[str, Any]) -> Any:
    """Around the host's evaluation of positive and negative entries."""
    options, sigma = model_options.get("transformer_options", {}), sigma_of({}, timestep)
    now: dict[Choice, int] = {}
    for entry in itertools.chain(*filter(None, conds)):
        choice = entry[VARIANT].choice if VARIANT in entry else None
        if choice is not None and choice not in now:
            now[choice] = choice.at(model.model_sampling, options, sigma)
    if now:
        conds = [entries and _meant(entries, now, model.model_sampling) for entries in conds]
    return executor(model, conds, x, timestep, model_options)


def _meant(entries: Sequence[Entry], now: Mapping[Choice, int], sampling: Any) -> list[Entry]:
    """The entries that count.

    For an area of the positive prompt the host puts a copy of that entry among the negative ones, with their text, and
    the other way round: such a copy counts whenever the text does.
    """
    origins: dict[tuple[int, ...], Entry] = {}
    for entry in entries:
        origins.setdefault(_text(entry), entry)
    texts = {
        variant.choice: entry for entry in origins.values() if (variant := entry.get(VARIANT)) and _is(variant, now)
    }
    found = []
    for entry in entries:
        origin = origins[_text(entry)]
        variant = origin.get(VARIANT)
        if variant is None or _is(variant, now):
            found.append(_without_own_range(entry, sampling))
        elif entry is not origin and variant.choice in texts:
            text = texts[variant.choice]["model_conds"]
            found.append({**_without_own_range(entry, sampling), "model_conds": text})
    return found


def _is(variant: Variant, now: Mapping[Choice, int]) -> bool:
    return variant.number == now[variant.choice]


def _text(entry: Entry) -> tuple[int, ...]:
    """Equal for copies that the host has made of an entry."""
    return tuple(id(value) for value in entry["model_conds"].values())


def _without_own_range(entry: Entry, sampling: Any) -> Entry:
    """Without the range that ``conditioning`` gave it, unless a node has set another."""
    if not all(isinstance(entry.get(end), _Ours) for end in ("start_percent", "end_percent")):
        return entry
    entry = {key: value for key, value in entry.items() if key not in ("timestep_start", "timestep_end")}
    if "clip_start_percent" in entry:  # of hooks on the CLIP, which the host counts together with the others
        entry["timestep_start"] = sampling.percent_to_sigma(entry["clip_start_percent"])
        entry["timestep_end"] = sampling.percent_to_sigma(entry["clip_end_percent"])
    return entry
