"""Aspect buckets: the size a picture is trained at, and how it is scaled and cropped to that size.

- buckets have an area close to the resolution's, sides that are multiples of ``step``, come in transposed pairs, and
  always include the one nearest to the resolution itself; the longest side follows from ``max_aspect``, not from a
  fixed number of pixels
- an explicit ``max_side`` makes the buckets at that limit smaller instead of leaving them out, so that long pictures
  keep their shape
- a picture goes to the bucket that keeps most of it; a picture and its transpose go to transposed buckets
- ``upscale`` off: a picture that would have to grow gets a bucket of its own size, rounded down, never below one step
- the crop lies in the middle, or as near as possible around a focus box
- exact arithmetic: the same picture gets the same geometry on every machine
"""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from functools import lru_cache
from math import ceil, floor, isqrt

from .model import Box, BucketOptions, DatasetError, Size

LARGEST_AREA = Fraction(5, 4)  # of the resolution's: what the user's memory was asked for, plus one rounding
SMALLEST_AREA = Fraction(3, 4)


def _nearest(value: Fraction) -> int:
    return floor(value + Fraction(1, 2))


def _home(resolution: Size, options: BucketOptions) -> Size:
    """The bucket nearest to the resolution that its limits allow."""
    step, area = options.step, resolution[0] * resolution[1]
    least, most = step, max(resolution) + step
    if options.enabled:
        least, most = options.min_side or least, options.max_side or most
    for rounded in (_nearest, floor, ceil):
        width, height = (rounded(Fraction(side, step)) * step for side in resolution)
        if least <= min(width, height) and max(width, height) <= most and width * height <= LARGEST_AREA * area:
            return width, height
    raise DatasetError(
        f"no bucket fits resolution {resolution[0]}×{resolution[1]} with sides from {least} to {most}: "
        f"choose a bucket_step (now {step}) up to the resolution's shorter side, min_side up to the shorter and "
        f"max_side from the longer side, or leave these two to max_aspect"
    )


def _side_limits(resolution: Size, options: BucketOptions) -> tuple[int, int]:
    """Shortest and longest side, multiples of ``step``; by ``max_aspect`` √(area / aspect) and √(area · aspect)."""
    step, aspect = options.step, Fraction(options.max_aspect)
    steps = Fraction(resolution[0] * resolution[1], step * step)  # the area, in squares of one step
    shortest = ceil(Fraction(options.min_side, step)) if options.min_side else isqrt(ceil(steps / aspect) - 1) + 1
    longest = options.max_side // step if options.max_side else isqrt(floor(steps * aspect))
    return shortest * step, longest * step


@lru_cache(maxsize=256)
def bucket_sizes(resolution: Size, options: BucketOptions) -> tuple[Size, ...]:
    """All (width, height) buckets of a resolution, widest last."""
    home = _home(resolution, options)
    if not options.enabled:
        return (home,)
    area, step = resolution[0] * resolution[1], options.step
    shortest, longest = _side_limits(resolution, options)
    sizes = {home, home[::-1]}
    for width in range(shortest, longest + 1, step):
        height = _nearest(Fraction(area, width * step)) * step
        cut = options.max_side is not None and height > longest
        height = longest if cut else height
        part = Fraction(width * height, area)
        if shortest <= height <= longest and (cut or SMALLEST_AREA <= part) and part <= LARGEST_AREA:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes, key=lambda size: Fraction(*size)))  # no two have the same aspect


@lru_cache(maxsize=256)
def _aspects(resolution: Size, options: BucketOptions) -> tuple[Fraction, ...]:
    return tuple(Fraction(*size) for size in bucket_sizes(resolution, options))


def kept_part(picture: Size, bucket: Size) -> Fraction:
    """The part of the picture's area that is left when it covers the bucket: min(r, 1/r), r the ratio of aspects."""
    wide, tall = picture[0] * bucket[1], picture[1] * bucket[0]
    return Fraction(min(wide, tall), max(wide, tall))


def nearest_index(picture: Size, resolution: Size, options: BucketOptions) -> int:
    """Where in ``bucket_sizes`` the bucket is that keeps most of the picture; between equals, the nearest to a square.

    What is kept falls with the distance of the aspects, so that only the two neighbours can be meant.
    """
    sizes, aspects = bucket_sizes(resolution, options), _aspects(resolution, options)
    above = bisect_left(aspects, Fraction(*picture))
    near = range(max(above - 1, 0), min(above + 1, len(sizes)))
    return max(near, key=lambda index: (kept_part(picture, sizes[index]), -max(sizes[index])))


def grows(picture: Size, bucket: Size) -> bool:
    """Whether the picture has to be scaled up to cover the bucket."""
    return picture[0] < bucket[0] or picture[1] < bucket[1]


def choose_bucket(picture: Size, resolution: Size, options: BucketOptions) -> Size:
    """The bucket that keeps most of the picture, or where it may not grow, one of its own size."""
    bucket = bucket_sizes(resolution, options)[nearest_index(picture, resolution, options)]
    own = options.enabled and not options.upscale and grows(picture, bucket)
    return own_size(picture, resolution, options) if own else bucket


def own_size(picture: Size, resolution: Size, options: BucketOptions) -> Size:
    """The picture's size, shrunk to the resolution's area and ``max_side``, rounded down to steps but at least one."""
    step, area = options.step, resolution[0] * resolution[1]
    limit = Fraction(options.max_side or max(picture), max(picture))
    shrunk = min(Fraction(1), Fraction(area, picture[0] * picture[1]), limit * limit)  # of the area
    # floor(side · √shrunk / step): the root of the floor has the same floor
    short, long = (max(1, isqrt(floor(side * side * shrunk / step**2))) * step for side in sorted(picture))
    long = min(long, area // short // step * step)  # makes room where the short side was lengthened to one step
    return (short, long) if picture[0] <= picture[1] else (long, short)


def cover(picture: Size, bucket: Size, focus: Box | None = None) -> tuple[Size, tuple[int, int]]:
    """(resized size, (left, top) of the crop): the smallest scaling that covers the bucket, around the focus."""
    (width, height), (bucket_width, bucket_height) = picture, bucket
    if width * bucket_height <= height * bucket_width:
        resized = bucket_width, (2 * height * bucket_width + width) // (2 * width)
    else:
        resized = (2 * width * bucket_height + height) // (2 * height), bucket_height
    left, top, right, bottom = focus or (0.0, 0.0, 1.0, 1.0)
    return resized, (
        _offset(resized[0], bucket_width, left, right),
        _offset(resized[1], bucket_height, top, bottom),
    )


def _offset(length: int, window: int, start: float, end: float) -> int:
    """Where a window lies whose middle is that of [start, end], parts of the length, but which does not stick out."""
    middle = (Fraction(start) + Fraction(end)) / 2
    return min(max(floor(middle * length - Fraction(window, 2)), 0), length - window)
