"""Aspect buckets: which sizes there are, which one a picture goes to, and where it is cut."""

import random
from fractions import Fraction
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.buckets import bucket_sizes, choose_bucket, cover, grows, kept_part
from lora_loom.training.dataset.model import BucketOptions, DatasetError

SQUARES = [(16, 8), (16, 16), (64, 8), (96, 64), (500, 64), (512, 64), (768, 32), (1024, 64), (2048, 64), (4096, 256)]
side = st.integers(1, 6000)
picture = st.tuples(side, side)
quick = settings(deadline=None, max_examples=80)


@st.composite
def setting(draw, **given_options):
    """A resolution and options that fit it."""
    step = draw(st.sampled_from([8, 32, 64, 128]))
    resolution = draw(st.tuples(*[st.integers(step, 1600)] * 2))
    options = {"step": step, "max_aspect": draw(st.sampled_from([1.0, 2.0, 2.2, 4.0, 7.5])), **given_options}
    return resolution, BucketOptions(**options)


def by_area(resolution):
    return lambda size: Fraction(size[0] * size[1], resolution[0] * resolution[1])


# ---------------------------------------------------------------- which there are


@pytest.mark.parametrize("resolution, step", SQUARES)
def test_buckets_of_a_square_resolution(resolution, step):
    sizes = bucket_sizes((resolution, resolution), BucketOptions(step=step))
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert any(width == height for width, height in sizes)
    for width, height in sizes:
        assert width % step == 0 and height % step == 0
        if width != height:
            assert resolution <= 2 * width <= 4 * resolution and resolution <= 2 * height <= 4 * resolution
            assert 0.75 <= width * height / resolution**2 <= 1.25
        assert width * height <= 1.25 * resolution**2


@quick
@given(setting())
def test_buckets_keep_to_their_limits(case):
    resolution, options = case
    sizes = bucket_sizes(resolution, options)
    [home] = bucket_sizes(resolution, BucketOptions(enabled=False, step=options.step))
    assert home in sizes, "the resolution itself"
    assert all(abs(home[i] - resolution[i]) < options.step for i in (0, 1))
    assert {size[::-1] for size in sizes} == set(sizes)
    aspects = [Fraction(*size) for size in sizes]
    assert all(one < other for one, other in zip(aspects, aspects[1:], strict=False)), "sorted, one for each aspect"
    for size in sizes:
        assert not any(length % options.step for length in size) and min(size) > 0
        assert by_area(resolution)(size) <= Fraction(5, 4)
        if size not in (home, home[::-1]):
            assert by_area(resolution)(size) >= Fraction(3, 4)
            assert max(size) <= Fraction(options.max_aspect) * min(size)


@pytest.mark.parametrize("resolution, step", SQUARES[4:])
def test_no_bucket_is_missing(resolution, step):
    """Every size within the limits is there, or one of the same width or height that is nearer to the area."""
    sizes, area = set(bucket_sizes((resolution, resolution), BucketOptions(step=step))), resolution**2
    for width in range(step, 4 * resolution, step):
        for height in range(step, width + 1, step):
            if width <= 2 * resolution and resolution <= 2 * height and 0.98 <= width * height / area <= 1.02:
                rivals = [size for size in sizes if size[0] == width or size[1] == height]
                off = min(abs(w * h - area) for w, h in rivals)
                assert off <= abs(width * height - area), (width, height)


def test_known_buckets_without_a_cap_at_1024():
    """Peers' default of 1024 as the longest side leaves 0.61 of the area at resolution 1024."""
    sizes = bucket_sizes((1024, 1024), BucketOptions())
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (512, 2048), (2048, 512)} <= set(sizes)
    assert sum(width * height for width, height in sizes) / len(sizes) == pytest.approx(1024**2, rel=0.02)
    assert bucket_sizes((512, 512), BucketOptions(step=512)) == ((512, 512),)


def test_an_explicit_longest_side_makes_buckets_smaller_and_keeps_shapes():
    sizes = bucket_sizes((1024, 1024), BucketOptions(min_side=256, max_side=1024))
    assert {(1024, 1024), (1024, 512), (256, 1024), (1024, 704)} <= set(sizes)
    assert max(map(max, sizes)) == 1024 and min(map(min, sizes)) == 256
    assert choose_bucket((1500, 1000), (1024, 1024), BucketOptions(max_side=1024)) == (1024, 704)
    assert all(max(size) <= 700 for size in bucket_sizes((512, 512), BucketOptions(max_side=700)))


def test_wider_aspects_on_request():
    sizes = bucket_sizes((512, 512), BucketOptions(max_aspect=9.0))
    assert max(Fraction(*size) for size in sizes) == Fraction(1536, 192)
    assert bucket_sizes((512, 512), BucketOptions(max_aspect=1.0)) == ((512, 512),)


def test_a_resolution_that_is_not_square():
    sizes = bucket_sizes((832, 1216), BucketOptions())
    assert {(832, 1216), (1216, 832)} <= set(sizes)
    assert bucket_sizes((832, 1216), BucketOptions(enabled=False)) == ((832, 1216),)
    assert bucket_sizes((500, 300), BucketOptions(enabled=False)) == ((512, 320),)
    assert choose_bucket((100, 4000), (500, 300), BucketOptions(enabled=False, upscale=False)) == (512, 320)


@pytest.mark.parametrize(
    "resolution, options",
    [
        ((32, 32), {}),
        ((512, 40), {}),
        ((512, 512), {"min_side": 576}),
        ((1024, 1024), {"max_side": 768}),
        ((512, 2048), {"min_side": 1024, "max_side": 1024}),
    ],
)
def test_limits_that_do_not_fit_are_refused(resolution, options):
    with pytest.raises(DatasetError, match="no bucket fits .* choose a bucket_step .* min_side .* max_side"):
        bucket_sizes(resolution, BucketOptions(**options))


# ---------------------------------------------------------------- which one


@quick
@given(picture, setting())
def test_a_picture_goes_to_the_bucket_that_keeps_most_of_it(size, case):
    resolution, options = case
    bucket = choose_bucket(size, resolution, options)
    assert kept_part(size, bucket) == max(kept_part(size, other) for other in bucket_sizes(resolution, options))
    mirrored = choose_bucket(size[::-1], resolution, options)
    if size[0] != size[1]:  # a square may lie just between two buckets
        assert mirrored == bucket[::-1], "the transposed picture goes to the transposed bucket"


def test_what_is_kept_is_the_overlap_of_scaled_rectangles():
    """Against the definition: scale to cover, then area of the bucket over area of the scaled picture."""
    draw = random.Random(5)
    for _ in range(200):
        size, bucket = [(draw.randint(1, 3000), draw.randint(1, 3000)) for _ in range(2)]
        scale = max(bucket[0] / size[0], bucket[1] / size[1])
        kept = bucket[0] * bucket[1] / (size[0] * scale * size[1] * scale)
        assert float(kept_part(size, bucket)) == pytest.approx(kept, rel=1e-12)


def photographs(count, seed=2, height=3000):
    """Aspects from 1:2.2 to 2.2:1, evenly on the logarithmic scale."""
    draw = random.Random(seed)
    return [(round(height * 2.2 ** draw.uniform(-1, 1)), height) for _ in range(count)]


@pytest.mark.parametrize("resolution, mean, most", [(512, 0.065, 0.14), (768, 0.045, 0.11), (1024, 0.035, 0.09)])
def test_photographs_lose_little_and_are_trained_large(resolution, mean, most):
    """Peers cut the buckets of resolution 1024 down to 0.69 of its area on these."""
    pictures = photographs(300)
    buckets = [choose_bucket(size, (resolution, resolution), BucketOptions()) for size in pictures]
    lost = [1 - float(kept_part(size, bucket)) for size, bucket in zip(pictures, buckets, strict=True)]
    assert np.mean(lost) < mean and max(lost) < most
    areas = [width * height / resolution**2 for width, height in buckets]
    assert np.mean(areas) > 0.97 and min(areas) >= 0.75


def test_the_nearest_aspect_is_meant_on_the_logarithmic_scale():
    """Peers compare width over height: 1.01 is nearer to 0.5 than to 2, so that half of the picture goes, not 0.495."""
    options = BucketOptions(step=512, max_aspect=2.0)
    assert set(bucket_sizes((512, 1024), options)) == {(512, 1024), (1024, 512)}
    assert choose_bucket((1010, 1000), (512, 1024), options) == (1024, 512)
    assert choose_bucket((1000, 1010), (512, 1024), options) == (512, 1024)


# ---------------------------------------------------------------- no scaling up


@quick
@given(picture, setting(upscale=False))
def test_nothing_grows_where_it_may_not(size, case):
    resolution, options = case
    bucket = choose_bucket(size, resolution, options)
    assert min(bucket) >= options.step and not any(length % options.step for length in bucket)
    assert by_area(resolution)(bucket) <= Fraction(5, 4)
    if min(size) >= options.step:
        thin = sqrt(min(size) / max(size) * resolution[0] * resolution[1]) < options.step
        assert thin or not grows(size, bucket)
    assert choose_bucket(size[::-1], resolution, options) in (bucket[::-1], bucket)


@quick
@given(setting(upscale=False), st.data())
def test_a_small_picture_keeps_its_own_size(case, data):
    (width, height), options = case
    step, area = options.step, width * height
    long = data.draw(st.integers(step, max(step, 3 * area // (4 * step))))
    short = data.draw(st.integers(step, max(step, 3 * area // (4 * long))))
    size = data.draw(st.sampled_from([(long, short), (short, long)]))
    bucket = choose_bucket(size, (width, height), options)
    regular = bucket in bucket_sizes((width, height), options)
    assert regular or bucket == (size[0] // step * step, size[1] // step * step)


@pytest.mark.parametrize(
    "size, bucket", [((50, 500), (64, 448)), ((3000, 40), (2944, 64)), ((10, 10), (64, 64)), ((400, 300), (384, 256))]
)
def test_no_bucket_is_zero_wide(size, bucket):
    """Peers make (0, 448) of the first and divide by zero on the second."""
    assert choose_bucket(size, (512, 512), BucketOptions(upscale=False)) == bucket
    assert choose_bucket(size[::-1], (512, 512), BucketOptions(upscale=False)) == bucket[::-1]


def test_own_sizes_respect_what_memory_was_asked_for():
    options = BucketOptions(upscale=False)
    assert choose_bucket((200_000, 1), (512, 512), options) == (4096, 64)
    assert choose_bucket((20_000, 200), (512, 512), options) == (4096, 64), "shrunk, not cut down to (1344, 192)"
    assert choose_bucket((1, 200_000), (256, 256), options) == (64, 1024)
    assert choose_bucket((1500, 400), (1024, 1024), BucketOptions(upscale=False, max_side=1024)) == (1024, 256)
    assert choose_bucket((530, 500), (512, 512), options) == (512, 448), "shrunk a little rather than scaled up"


# ---------------------------------------------------------------- scaling and crop


@quick
@given(picture, picture)
def test_the_crop_covers_the_bucket_and_lies_in_the_middle(size, bucket):
    resized, (left, top) = cover(size, bucket)
    assert cover(size[::-1], bucket[::-1]) == (resized[::-1], (top, left))
    assert resized[0] == bucket[0] or resized[1] == bucket[1]
    scale = max(Fraction(bucket[0], size[0]), Fraction(bucket[1], size[1]))
    for i, offset in enumerate((left, top)):
        room = resized[i] - bucket[i]
        assert 0 <= room and offset == room // 2
        assert abs(resized[i] - size[i] * scale) <= 0.5


def test_a_known_crop():
    assert cover((200, 90), (96, 48)) == ((107, 48), (5, 0))


part = st.floats(0, 1)


@quick
@given(picture, setting(), st.tuples(part, part).map(sorted), st.tuples(part, part).map(sorted))
def test_the_crop_lies_around_the_focus(size, case, columns, rows):
    (left, right), (top, bottom) = columns, rows
    bucket = choose_bucket(size, *case)
    resized, crop = cover(size, bucket, (left, top, right, bottom))
    assert resized == cover(size, bucket)[0]
    for i, middle in enumerate(((left + right) / 2, (top + bottom) / 2)):
        room = resized[i] - bucket[i]
        best = min(range(room + 1), key=lambda offset: abs(offset + bucket[i] / 2 - middle * resized[i]))
        assert 0 <= crop[i] <= room and abs(crop[i] - best) <= 1


def test_a_focus_box_is_kept_whole_where_it_fits():
    resized, crop = cover((3000, 1000), (512, 512), (0.8, 0.2, 0.95, 0.9))
    assert resized == (1536, 512) and crop == (1024, 0), "at the right edge"
    assert cover((3000, 1000), (512, 512), (0.4, 0, 0.5, 1))[1] == (435, 0)
    assert cover((3000, 1000), (512, 512), (0.0, 0, 1.0, 1))[1] == cover((3000, 1000), (512, 512))[1]
