"""Pictures moved to a neighbouring bucket to save batches, against trying out every way."""

import random
from fractions import Fraction
from itertools import combinations_with_replacement, pairwise
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.buckets import bucket_sizes, choose_bucket, grows, kept_part
from lora_loom.training.dataset.merging import merged
from lora_loom.training.dataset.model import BucketOptions

FULL_HD = (1024, 1024)


def photographs(count, draw):
    return [(round(1500 * 2.2 ** draw.uniform(-1, 1)), 1500) for _ in range(count)]


def batches(buckets, repeats, batch_size):
    """By definition: what a bucket's presentations fill, and one for each showing of its most shown picture."""
    count = 0
    for bucket in set(buckets):
        shown = [often for where, often in zip(buckets, repeats, strict=True) if where == bucket]
        count += max(ceil(sum(shown) / batch_size), ceil(max(shown)))
    return count


def lost(pictures, buckets):
    return sum(1 - kept_part(size, bucket) for size, bucket in zip(pictures, buckets, strict=True))


def tolerable(size, bucket, options, resolution=FULL_HD):
    best = choose_bucket(size, resolution, options)
    kept, whole = kept_part(size, bucket), kept_part(size, best)
    return bucket == best or (kept >= Fraction(3, 4) and kept >= Fraction(85, 100) * whole)


def best_of_all(pictures, repeats, options, batch_size):
    """Every division of the pictures, in the order of their aspects, among the buckets in theirs."""
    sizes = bucket_sizes(FULL_HD, options)
    order = sorted(range(len(pictures)), key=lambda index: Fraction(*pictures[index]))
    best = None
    for borders in combinations_with_replacement(range(len(pictures) + 1), len(sizes) - 1):
        buckets = [None] * len(pictures)
        for size, (start, stop) in zip(sizes, pairwise((0, *borders, len(pictures))), strict=True):
            for index in order[start:stop]:
                buckets[index] = size
        if all(tolerable(size, bucket, options) for size, bucket in zip(pictures, buckets, strict=True)):
            cost = batches(buckets, repeats, batch_size), lost(pictures, buckets)
            best = cost if best is None else min(best, cost)
    return best


FEW = [BucketOptions(step=64, max_aspect=1.4), BucketOptions(step=128, max_aspect=1.8)]  # near and far apart
few, seeds = st.sampled_from(FEW), st.integers(0, 2**32)


def few_pictures(options, seed, count):
    assert len(bucket_sizes(FULL_HD, options)) == 5
    draw = random.Random(seed)
    return [(round(1500 * options.max_aspect ** draw.uniform(-1.4, 1.4)), 1500) for _ in range(count)]


@settings(deadline=None, max_examples=60)
@given(few, seeds, st.integers(1, 8), st.integers(2, 5))
def test_nothing_better_exists(options, seed, count, batch_size):
    pictures, ones = few_pictures(options, seed, count), [Fraction(1)] * count
    buckets = merged(pictures, ones, FULL_HD, options, batch_size)
    assert all(tolerable(size, bucket, options) for size, bucket in zip(pictures, buckets, strict=True))
    fewest, least = best_of_all(pictures, ones, options, batch_size)
    assert batches(buckets, ones, batch_size) == fewest
    assert float(lost(pictures, buckets)) == pytest.approx(float(least), abs=1e-5)


@settings(deadline=None, max_examples=40)
@given(few, seeds, st.lists(st.sampled_from([Fraction(1), Fraction(3), Fraction(5, 2)]), min_size=2, max_size=7))
def test_nothing_better_exists_where_repeats_differ(options, seed, repeats):
    pictures = few_pictures(options, seed, len(repeats))
    buckets = merged(pictures, repeats, FULL_HD, options, 8)  # no border is further away than a batch of 8 here
    fewest, least = best_of_all(pictures, repeats, options, 8)
    assert batches(buckets, repeats, 8) == fewest
    assert float(lost(pictures, buckets)) == pytest.approx(float(least), abs=1e-5)


@pytest.mark.parametrize("count, batch_size, ideal, spare", [(30, 4, 8, 0.2), (100, 4, 25, 0.05), (100, 8, 13, 0.05)])
def test_photographs_need_hardly_more_batches_than_if_they_were_alike(count, batch_size, ideal, spare):
    """Peers need 13.1 for 30 photographs in batches of 4."""
    draw, ones = random.Random(3), [Fraction(1)] * count
    needed, alone = [], []
    for _ in range(20):
        pictures = photographs(count, draw)
        buckets = merged(pictures, ones, FULL_HD, BucketOptions(), batch_size)
        needed.append(batches(buckets, ones, batch_size))
        alone.append(batches([choose_bucket(size, FULL_HD, BucketOptions()) for size in pictures], ones, batch_size))
    assert ideal <= sum(needed) / len(needed) <= ideal + spare
    assert sum(alone) / len(alone) > 1.2 * ideal


def test_a_picture_shown_often_goes_where_it_has_company():
    """Alone in its bucket it would take ten batches of one."""
    pictures = [(1150, 1000), *[(1290, 1000)] * 12]
    tens = [Fraction(10)] * 13
    assert batches([choose_bucket(size, FULL_HD, BucketOptions()) for size in pictures], tens, 4) == 40
    assert batches(merged(pictures, tens, FULL_HD, BucketOptions(), 4), tens, 4) == 33


@pytest.mark.parametrize("batch_size, options", [(1, BucketOptions()), (4, BucketOptions(merge=False))])
def test_nobody_moves_without_need(batch_size, options):
    pictures = photographs(30, random.Random(4))
    alone = [choose_bucket(size, FULL_HD, options) for size in pictures]
    assert merged(pictures, [Fraction(1)] * 30, FULL_HD, options, batch_size) == alone
    full = [(1024, 1024)] * 4 + [(1152, 896)] * 8
    assert merged(full, [Fraction(1)] * 12, FULL_HD, BucketOptions(), 4) == full


def test_pictures_of_extreme_shapes_stay_and_do_not_hinder():
    pictures = [(9000, 100), (100, 9000), *photographs(28, random.Random(5))]
    buckets = merged(pictures, [Fraction(1)] * 30, FULL_HD, BucketOptions(), 4)
    assert buckets[:2] == [(2048, 512), (512, 2048)]
    assert batches(buckets[2:], [Fraction(1)] * 28, 4) <= 8


def test_without_scaling_up_nothing_grows_by_moving():
    draw, options = random.Random(6), BucketOptions(upscale=False)
    pictures = [(draw.randint(300, 2000), draw.randint(300, 2000)) for _ in range(120)]
    alone = [choose_bucket(size, FULL_HD, options) for size in pictures]
    buckets = merged(pictures, [Fraction(1)] * 120, FULL_HD, options, 4)
    assert not any(grows(size, bucket) for size, bucket in zip(pictures, buckets, strict=True))
    assert batches(buckets, [Fraction(1)] * 120, 4) < batches(alone, [Fraction(1)] * 120, 4)
    small = [i for i, bucket in enumerate(alone) if bucket not in bucket_sizes(FULL_HD, options)]
    assert len(small) > 10 and all(buckets[i] == alone[i] for i in small)


def test_nobody_and_the_order_of_the_pictures():
    assert merged([], [], FULL_HD, BucketOptions(), 4) == []
    pictures = photographs(40, random.Random(7))
    ones = [Fraction(1)] * 40
    buckets = dict(zip(pictures, merged(pictures, ones, FULL_HD, BucketOptions(), 4), strict=True))
    turned = merged(pictures[::-1], ones, FULL_HD, BucketOptions(), 4)
    assert turned == [buckets[size] for size in pictures[::-1]]
