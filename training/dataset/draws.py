"""Chance that is a pure function of its key: the same key draws the same on every machine and in every version.

Nothing global is touched, and a resumed run draws what an uninterrupted one would have drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Draws that depend on nothing but ``key``, e.g. ``Draws(seed, "crop", sample.id, variation)``.

    Only ``random.Random.random`` is used: it is the one method whose sequence Python promises to keep.
    """

    def __init__(self, *key: object) -> None:
        digest = hashlib.sha256(repr(key).encode()).digest()
        self._source = random.Random(int.from_bytes(digest[:8], "big"))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self._source.random()

    def chance(self, rate: float) -> bool:
        """True with probability ``rate``; never at 0, always at 1."""
        return self._source.random() < rate

    def below(self, count: int) -> int:
        """A whole number in [0, count)."""
        return int(self._source.random() * count)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.below(len(choices))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        keys = [self._source.random() for _ in items]
        return [items[index] for index in sorted(range(len(items)), key=keys.__getitem__)]
