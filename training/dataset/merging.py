"""Fewer thin batches: pictures may move to a neighbouring bucket where that saves a batch.

Thirty photographs lie in a dozen buckets; with batches of 4 each in its own that is 13 steps or more where 8 would do.
Sorted by aspect, the buckets cut the pictures into segments, and moving a border moves pictures to the neighbour. The
best borders are found exactly: first the fewest batches, then the least cropped away. Nothing is drawn, so the result
is always the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

import numpy as np

from .buckets import bucket_sizes, choose_bucket, grows, kept_part, nearest_index
from .model import BucketOptions, Size

# What a picture may lose to save a batch. Its subject survives a crop of a quarter, and coarse buckets (512, steps of
# 64) take up to a seventh without any merging: nobody is to notice which pictures moved, so it may be that much again.
LEAST_KEPT = Fraction(3, 4)  # of the whole picture
LEAST_OF_BEST = Fraction(17, 20)  # of what its own bucket keeps

UNIT = 1 << 20  # repeats and lost parts as whole numbers, so that sums are exact
NEVER = 1 << 60


def merged(
    pictures: Sequence[Size], repeats: Sequence[Fraction], resolution: Size, options: BucketOptions, batch_size: int
) -> list[Size]:
    """The bucket of each picture; ``repeats`` are its presentations per epoch."""
    chosen = [choose_bucket(picture, resolution, options) for picture in pictures]
    sizes = bucket_sizes(resolution, options)
    if not options.merge or batch_size == 1 or len(sizes) == 1:
        return chosen
    nearest = [nearest_index(picture, resolution, options) for picture in pictures]
    # pictures in buckets of their own size stay there
    order = [index for index in range(len(pictures)) if chosen[index] == sizes[nearest[index]]]
    order.sort(key=lambda index: (Fraction(*pictures[index]), index))
    segments = _Segments(
        [pictures[index] for index in order], [nearest[index] for index in order], sizes, options.upscale
    )
    borders = _best_borders(segments, [repeats[index] for index in order], batch_size)
    for bucket, (start, stop) in enumerate(pairwise(borders)):
        for index in order[start:stop]:
            chosen[index] = sizes[bucket]
    return chosen


@dataclass(frozen=True)
class _Segments:
    """Pictures by aspect, and the bucket each would go to by itself."""

    pictures: Sequence[Size]
    nearest: Sequence[int]
    sizes: Sequence[Size]
    upscale: bool

    def may_go(self, index: int, bucket: int) -> bool:
        picture, size = self.pictures[index], self.sizes[bucket]
        kept, best = kept_part(picture, size), kept_part(picture, self.sizes[self.nearest[index]])
        return kept >= max(LEAST_KEPT, LEAST_OF_BEST * best) and (self.upscale or not grows(picture, size))

    def reach(self, bucket: int, furthest: int) -> tuple[int, int]:
        """The pictures (start, stop) that the bucket may hold: its own, and up to so many on either side."""
        own = bisect_left(self.nearest, bucket), bisect_left(self.nearest, bucket + 1)
        start, stop = own
        while start > max(own[0] - furthest, 0) and self.may_go(start - 1, bucket):
            start -= 1
        while stop < min(own[1] + furthest, len(self.pictures)) and self.may_go(stop, bucket):
            stop += 1
        return start, stop

    def lost(self, bucket: int, start: int, stop: int) -> np.ndarray:
        """What the bucket crops away of the pictures from ``start`` to each place up to ``stop``."""
        lost = [floor(UNIT * (1 - kept_part(picture, self.sizes[bucket]))) for picture in self.pictures[start:stop]]
        return np.concatenate([[0], np.cumsum(lost, dtype=np.int64)])


def _best_borders(segments: _Segments, repeats: Sequence[Fraction], batch_size: int) -> list[int]:
    """Where the segments of the buckets begin and end.

    Border by border from left to right: for each of its places, the best way to get there. A border moves by less than
    a batch to either side, since moving a whole batch only hands it to the neighbour.
    """
    count, furthest = len(segments.pictures), batch_size - 1
    shown = np.concatenate([[0], np.cumsum([floor(UNIT * value) for value in repeats], dtype=np.int64)])
    most = np.array([ceil(value) for value in repeats], np.int64)
    starts, batches, lost = np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros(1, np.int64)
    steps: list[tuple[np.ndarray, np.ndarray]] = []  # of each bucket: places of its left border, choice for its right
    for bucket in range(len(segments.sizes)):
        natural = bisect_left(segments.nearest, bucket + 1)
        stops = np.arange(max(natural - furthest, 0), min(natural + furthest, count) + 1)
        if bucket == len(segments.sizes) - 1:
            stops = np.array([count])
        first, last = segments.reach(bucket, furthest)
        left, right = starts[:, None], stops[None, :]
        held = (left < right) & (first <= left) & (right <= last)
        possible = held | (left == right)
        # a bucket takes as many batches as its presentations fill, and as its most repeated picture, once in each
        full = -((shown[left] - shown[right]) // (batch_size * UNIT))
        used = np.where(held, np.maximum(full, _largest(most, starts, stops)), 0)
        loss = segments.lost(bucket, first, last)
        cut = loss[np.clip(right, first, last) - first] - loss[np.clip(left, first, last) - first]

        all_batches = np.where(possible, batches[:, None] + used, NEVER)
        fewest = all_batches.min(axis=0)
        all_lost = np.where(possible & (all_batches == fewest), lost[:, None] + np.where(held, cut, 0), NEVER)
        choice = all_lost.argmin(axis=0)
        steps.append((starts, choice))
        starts, batches, lost = stops, np.minimum(fewest, NEVER), np.minimum(all_lost.min(axis=0), NEVER)
    borders, place = [count], 0
    for starts, choice in reversed(steps):
        place = int(choice[place])
        borders.append(int(starts[place]))
    return borders[::-1]


def _largest(values: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The largest of ``values[start:stop]`` for each start (rows) and stop (columns), 0 where there are none."""
    table = np.zeros((len(starts), len(stops)), np.int64)
    for row, start in enumerate(starts):
        ahead = stops > start
        if ahead.any():
            table[row, ahead] = np.maximum.accumulate(values[start : stops[-1]])[stops[ahead] - start - 1]
    return table
