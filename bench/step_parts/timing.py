"""Contestants take turns; every round gives each of them one time and one ratio."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol


class Contestant(Protocol):
    def step(self) -> None: ...

    def close(self) -> None: ...


def take_turns(make: Mapping[str, Callable[[], Contestant]], repeats: int) -> dict[str, dict[str, Any]]:
    """name → median process-CPU and wall seconds of a step and the median of its ratios to ``frozen`` of that round.

    They go round in an order that rotates. The first two rounds are not counted: optimizers make their state in them
    and caches fill.
    """
    contestants = {name: build() for name, build in make.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    gc.collect()
    gc.disable()
    try:
        for turn in range(repeats + 2):
            names = list(contestants)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody always follows the same one
                one = contestants[name]
                cpu, wall = time.process_time(), time.perf_counter()
                one.step()
                spent = time.process_time() - cpu, time.perf_counter() - wall
                if turn >= 2:
                    seconds[name].append(spent)
            gc.collect()
            print(f"round {turn - 1} of {repeats}" if turn >= 2 else "warm-up", file=sys.stderr, flush=True)
    finally:
        gc.enable()
        for one in contestants.values():
            one.close()
    return {name: _summary(spent, seconds["frozen"]) for name, spent in seconds.items()}


def _summary(spent: list[tuple[float, float]], frozen: list[tuple[float, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for index, clock in enumerate(("cpu", "wall")):
        own, unit = [s[index] for s in spent], [s[index] for s in frozen]
        ratios = sorted(a / b for a, b in zip(own, unit, strict=True))
        row[f"{clock}_seconds"] = statistics.median(own)
        row[f"{clock}_ratio"] = statistics.median(ratios)
        row[f"{clock}_ratio_range"] = [ratios[0], ratios[-1]]
        row[f"{clock}_all_seconds"] = own
    return row
