"""Aspect buckets: the size an image is trained at, and how it is scaled and cropped to that size.

- buckets have an area close to resolution², sides that are multiples of ``step`` and lie between resolution/2 and
  2·resolution, and come in transposed pairs
- an image goes to the bucket that keeps most of it; a picture and its transpose go to transposed buckets
- exact integer arithmetic: the same image gets the same geometry on every machine
"""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache

Size = tuple[int, int]  # (width, height)

LARGEST_AREA = Fraction(5, 4)  # of resolution²: what the user's memory was asked for, plus one rounding
SMALLEST_AREA = Fraction(3, 4)


def _nearest_multiple(value: Fraction, step: int) -> int:
    return int(value / step + Fraction(1, 2)) * step


@lru_cache(maxsize=64)
def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All (width, height) buckets of a resolution, widest last; ValueError when ``step`` does not fit into it."""
    if step < 1 or resolution < step:
        raise ValueError(
            f"bucket_step is {step} and resolution is {resolution}: "
            f"choose a bucket_step between 1 and the resolution, e.g. {max(1, min(64, resolution))}"
        )
    area = resolution * resolution
    side = _nearest_multiple(Fraction(resolution), step)
    if side * side > area * LARGEST_AREA:
        side = resolution // step * step
    sizes = {(side, side)}
    shortest, longest = -(-resolution // (2 * step)) * step, 2 * resolution // step * step
    for width in range(shortest, longest + 1, step):
        height = _nearest_multiple(Fraction(area, width), step)
        if shortest <= height <= longest and SMALLEST_AREA <= Fraction(width * height, area) <= LARGEST_AREA:
            sizes |= {(width, height), (height, width)}
    return tuple(sorted(sizes, key=lambda size: (Fraction(*size), size)))


def kept_part(image: Size, bucket: Size) -> Fraction:
    """The part of the image's area that is left when it covers the bucket: min(r, 1/r), r the ratio of aspects."""
    wide, tall = image[0] * bucket[1], image[1] * bucket[0]
    return Fraction(min(wide, tall), max(wide, tall))


@lru_cache(maxsize=4096)
def choose_bucket(image: Size, resolution: int, step: int) -> Size:
    """The bucket that keeps most of the image; between equals, the one nearer to a square."""
    return max(bucket_sizes(resolution, step), key=lambda bucket: (kept_part(image, bucket), -max(bucket)))


def cover(image: Size, bucket: Size) -> tuple[Size, Size]:
    """(resized size, (left, top) of the crop): the smallest scaling that covers the bucket, and its centre."""
    (width, height), (bucket_width, bucket_height) = image, bucket
    if width * bucket_height <= height * bucket_width:
        resized = bucket_width, (2 * height * bucket_width + width) // (2 * width)
    else:
        resized = (2 * width * bucket_height + height) // (2 * height), bucket_height
    return resized, ((resized[0] - bucket_width) // 2, (resized[1] - bucket_height) // 2)
