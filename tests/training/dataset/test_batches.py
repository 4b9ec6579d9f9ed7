"""Items, epochs and batches: what is shown, how often, and with whom."""

import dataclasses
import math
import random
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset.batches import BatchPlan, Item, apportioned, place, place_all
from lora_loom.training.dataset.buckets import choose_bucket, cover
from lora_loom.training.dataset.model import (
    BucketOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    Header,
    ImageOptions,
    Sample,
)

SMALL = {"resolutions": ((64, 64),), "buckets": BucketOptions(step=8)}


def sample(name, size=(64, 64), concept=0, **more):
    return Sample(name, FilePicture(name, Header(*size, "PNG", "RGB"), 1, 1), "a cat", concept, **more)


def made(*concepts, seed=0, sizes=None):
    """A dataset of (number of pictures, options of the concept); pictures of all shapes, or of one."""
    draw, samples = random.Random(seed), []
    for index, (count, _) in enumerate(concepts):
        for number in range(count):
            size = sizes or (draw.randint(16, 90), draw.randint(16, 90))
            samples.append(sample(f"{index}/{number:03}", size, index))
    return Dataset("test", tuple(Concept(**{**SMALL, **options}) for _, options in concepts), tuple(samples))


def counted(plan, *epochs):
    """Presentations of each item in these epochs."""
    return Counter(shown.item for epoch in epochs for batch in plan.epoch(epoch) for shown in batch)


@st.composite
def datasets(draw):
    """Concepts of every kind, repeats whole and not, two resolutions, own batch sizes, groups."""
    concepts = []
    for number in range(draw(st.integers(1, 4))):
        fractions = st.fractions(Fraction(1, 5), 4, max_denominator=6)
        options = {
            "kind": draw(st.sampled_from(["training", "training", "regularisation", "validation"]))
            if number
            else "training",
            "repeats": draw(st.one_of(st.integers(1, 4).map(Fraction), fractions)),
            "samples_per_epoch": draw(st.sampled_from([None, None, 7])),
            "resolutions": draw(st.sampled_from([((64, 64),), ((64, 64), (96, 96))])),
            "batch_size": draw(st.sampled_from([None, None, 3])),
            "group": draw(st.integers(0, 1)),
            "buckets": BucketOptions(step=8, merge=draw(st.booleans()), upscale=draw(st.booleans())),
            "images": ImageOptions(variations=draw(st.integers(1, 4))),
        }
        concepts.append((draw(st.integers(0 if number else 5, 14)), options))
    return made(*concepts, seed=draw(st.integers(0, 99)))


quick = settings(deadline=None, max_examples=40)


# ---------------------------------------------------------------- items


def test_every_sample_at_every_resolution():
    dataset = made((2, {"resolutions": ((64, 64), (128, 128))}), (1, {"kind": "validation"}), (1, {}), sizes=(200, 90))
    items = place(dataset)
    assert [item.sample for item in items] == [0, 0, 1, 1, 3]
    assert items[0] == Item(0, (96, 40), (96, 43), (0, 1), 1)
    assert items[1].bucket == choose_bucket((200, 90), (128, 128), BucketOptions(step=8))
    assert [item.sample for item in place(dataset, ("validation",))] == [2]
    assert [item.sample for item in place(dataset, ("regularisation",))] == []


def test_crops_follow_the_focus_only_where_asked():
    for crop in ("centre", "focus", "random"):
        dataset = made((0, {"images": ImageOptions(crop=crop)}))
        box = (0.7, 0.1, 0.9, 0.3)
        samples = sample("with", (300, 90), focus=box), sample("without", (300, 90))
        there, elsewhere = place(dataset.with_samples(samples))
        assert elsewhere.crop == cover((300, 90), elsewhere.bucket)[1]
        expected = cover((300, 90), there.bucket, box)[1] if crop == "focus" else elsewhere.crop
        assert there.crop == expected and (there.crop != elsewhere.crop) == (crop == "focus")


def test_variations_are_those_of_the_concept_and_one_for_validation():
    options = {"images": ImageOptions(flip=True, brightness=0.1)}
    dataset = made((1, options), (1, {**options, "kind": "validation"}))
    assert place(dataset)[0].variations == 8 and place(dataset, ("validation",))[0].variations == 1


def test_merging_stays_within_what_can_share_a_batch():
    """Two pictures of neighbouring shapes save a batch together; apart in anything that keeps batches apart, not."""
    shapes, options = [(72, 64)] * 2 + [(82, 64)] * 2, {**SMALL, "resolutions": ((256, 256),)}

    def buckets(trainer=4, **other):
        concepts = (Concept(**options), Concept(**{**options, **other}))
        samples = tuple(sample(str(i), size, i // 2) for i, size in enumerate(shapes))
        return [item.bucket for item in place(Dataset("x", concepts, samples), batch_size=trainer)]

    alone = buckets(trainer=1)
    assert alone[0] == alone[1] != alone[2] == alone[3]
    assert len(set(buckets())) == 1
    assert buckets(group=1) == buckets(batch_size=2) == buckets(trainer=2) == alone
    assert buckets(trainer=8) != alone == buckets(buckets=BucketOptions(step=8, merge=False))


# ---------------------------------------------------------------- an epoch


@quick
@given(datasets(), st.integers(1, 6), st.integers(0, 5))
def test_batches_are_of_one_kind_full_and_even(dataset, batch_size, epoch):
    plan = BatchPlan(dataset, batch_size, 7)
    pools = {}
    for batch in plan.epoch(epoch):
        items = [plan.items[shown.item] for shown in batch]
        concepts = [dataset.of(dataset.samples[item.sample]) for item in items]
        [kind] = {(c.group, c.batch_size or batch_size, i.bucket) for c, i in zip(concepts, items, strict=True)}
        assert len({item.sample for item in items}) == len(items) <= kind[1], "no picture twice"
        assert all(concept.kind != "validation" for concept in concepts)
        pools.setdefault(kind, []).append([item.sample for item in items])
    for (_, limit, _), batches in pools.items():
        lengths = [len(batch) for batch in batches]
        assert max(lengths) - min(lengths) <= 1
        most = max(Counter(sample for batch in batches for sample in batch).values())
        assert len(batches) == max(math.ceil(sum(lengths) / limit), most), "as few as possible"


@quick
@given(datasets(), st.integers(1, 6))
def test_repeats_are_exact_over_the_run(dataset, batch_size):
    plan = BatchPlan(dataset, batch_size, 3)
    pictures, total = Counter(sample.concept for sample in dataset.samples), Counter()
    for epoch in range(7):
        now = counted(plan, epoch)
        total += now
        for number, concept in enumerate(dataset.concepts):
            if concept.kind == "training" and pictures[number]:
                of_samples = Fraction(concept.samples_per_epoch or 0, pictures[number])
                rate = of_samples or concept.repeats
                mine = [i for i, item in enumerate(plan.items) if dataset.samples[item.sample].concept == number]
                assert all(math.floor(rate) <= now[i] <= math.ceil(rate) for i in mine)
                assert all(abs(total[i] - (epoch + 1) * rate) < 1 for i in mine)
                wanted = math.floor((epoch + 1) * pictures[number] * rate + Fraction(1, 2))
                assert sum(total[i] for i in mine) == wanted * len(concept.resolutions)


@quick
@given(datasets(), st.integers(1, 6))
def test_regularisation_is_shown_as_often_as_the_training_pictures_of_its_group(dataset, batch_size):
    plan = BatchPlan(dataset, batch_size, 3)
    kinds = [concept.kind for concept in dataset.concepts]
    concepts = [dataset.of(dataset.samples[item.sample]) for item in plan.items]
    for epoch in range(5):
        shown = counted(plan, epoch)
        sums = Counter()
        for item, number in shown.items():
            sums[concepts[item].kind, concepts[item].group] += number
        whole = sum(number for (kind, _), number in sums.items() if kind == "training")
        trained = {concept.group for concept in concepts if concept.kind == "training"}
        for group in {concept.group for concept in concepts if concept.kind == "regularisation"}:
            assert sums["regularisation", group] == (sums["training", group] if group in trained else whole)
        by_concept = plan.presentations(epoch)
        assert sum(by_concept) == shown.total() and len(by_concept) == len(kinds)
        for number, kind in enumerate(kinds):
            mine = [i for i, item in enumerate(plan.items) if dataset.samples[item.sample].concept == number]
            assert by_concept[number] == sum(shown[i] for i in mine)
            assert kind != "validation" or not mine


def test_no_regularisation_picture_is_left_out():
    """Peers show the first few only, epoch after epoch."""
    plan = BatchPlan(made((5, {"repeats": Fraction(2)}), (37, {"kind": "regularisation"})), 2, 0)
    assert plan.presentations() == (10, 10)
    shown = counted(plan, *range(15))
    assert {shown[item] for item in range(5, 42)} == {4, 5} and {shown[item] for item in range(5)} == {30}
    few = BatchPlan(made((50, {}), (3, {"kind": "regularisation"}), (9, {"kind": "regularisation"})), 2, 0)
    assert few.presentations() == (50, 12 + 1, 37), "by their numbers of pictures"
    alone = counted(few, *range(6))
    assert {alone[item] for item in range(50, 62)} == {25}


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_an_epoch_shows_every_picture_once_in_batches_of_one_bucket(batch_size):
    dataset = made((24, {}))
    plan = BatchPlan(dataset, batch_size, 7)
    assert sorted(shown.item for batch in plan.epoch(0) for shown in batch) == list(range(24))
    assert all(len({plan.items[shown.item].bucket for shown in batch}) == 1 for batch in plan.epoch(0))
    assert len(plan.epoch(0)) == plan.batches_in(1)


@pytest.mark.parametrize("pictures", [6, 30])
def test_no_picture_is_twice_in_a_batch_however_often_it_repeats(pictures):
    """Peers: of 6 pictures repeated 10 times, 69 % of the batches of 4 have one twice; of 30, 17 %."""
    plan = BatchPlan(made((pictures, {"repeats": Fraction(10)}), sizes=(64, 64)), 4, 0)
    for epoch in range(3):
        batches = plan.epoch(epoch)
        assert len(batches) == pictures * 10 // 4 and {len(batch) for batch in batches} == {4}
        assert all(len({shown.item for shown in batch}) == 4 for batch in batches)
        assert set(counted(plan, epoch).values()) == {10}


def test_a_lone_picture_repeats_in_batches_of_its_own():
    plan = BatchPlan(made((1, {"repeats": Fraction(3)})), 4, 0)
    assert [len(batch) for batch in plan.epoch(0)] == [1, 1, 1]


def test_one_small_picture_at_two_resolutions_is_one_picture():
    """Without scaling up both are the same size, but a batch is not to show it twice."""
    buckets = BucketOptions(step=8, upscale=False)
    plan = BatchPlan(made((3, {"resolutions": ((64, 64), (96, 96)), "buckets": buckets}), sizes=(40, 40)), 4, 0)
    assert {item.bucket for item in plan.items} == {(40, 40)} and len(plan.items) == 6
    assert [len({plan.items[shown.item].sample for shown in batch}) for batch in plan.epoch(0)] == [3, 3]


def test_a_picture_that_is_listed_twice_is_one_picture():
    """A folder in two subsets, with captions or repeats of their own."""
    dataset = made((4, {}), (4, {"repeats": Fraction(2)}), sizes=(64, 64))
    ones, others = dataset.samples[:4], dataset.samples[4:]
    twins = [dataclasses.replace(twin, picture=one.picture) for one, twin in zip(ones, others, strict=True)]
    plan = BatchPlan(dataset.with_samples((*ones, *twins)), 4, 0)
    pictures = [[plan.dataset.samples[plan.items[shown.item].sample].picture for shown in b] for b in plan.epoch(0)]
    assert [len(set(batch)) for batch in pictures] == [4, 4, 4]
    assert plan.batches_in(1) == 3


def test_validation_pictures_move_none_that_are_trained():
    for seed in range(20):
        both = made((12, {}), (6, {"kind": "validation"}), seed=seed)
        placed = {item.sample: item for item in place_all(both, 4)}
        alone = place(both.with_samples(both.samples[:12]), batch_size=4)
        assert [placed[item.sample] for item in alone] == list(alone) and len(placed) == 18
        assert all(placed[item.sample] == item for item in place(both.with_samples(both.samples), ("validation",)))


# ---------------------------------------------------------------- turns and variations


@quick
@given(datasets(), st.integers(1, 6))
def test_turns_count_on_and_variations_take_turns(dataset, batch_size):
    plan = BatchPlan(dataset, batch_size, 11)
    turns, seen = Counter(), {}
    for epoch in range(4):
        for batch in plan.epoch(epoch):
            for shown in batch:
                assert shown.turn == turns[shown.item]
                turns[shown.item] += 1
                assert 0 <= shown.variation < plan.items[shown.item].variations
                seen.setdefault(shown.item, []).append(shown.variation)
    for item, variations in seen.items():
        count = plan.items[item].variations
        assert all((b - a) % count == 1 % count for a, b in zip(variations, variations[1:], strict=False))


def test_variations_of_different_pictures_do_not_keep_step():
    plan = BatchPlan(made((40, {"images": ImageOptions(variations=4)})), 1, 0)
    firsts = Counter(shown.variation for batch in plan.epoch(0) for shown in batch)
    assert len(firsts) == 4 and min(firsts.values()) > 3


# ---------------------------------------------------------------- positions


@settings(deadline=None, max_examples=15)
@given(datasets(), st.integers(1, 6), st.lists(st.integers(0, 25), min_size=1, max_size=3))
def test_positions_count_through_the_epochs(dataset, batch_size, asked):
    plan = BatchPlan(dataset, batch_size, 5)
    order = [(epoch, index) for epoch in range(26) for index in range(len(plan.epoch(epoch)))]
    for position in asked:
        fresh = BatchPlan(dataset, batch_size, 5)
        assert fresh.locate(position) == order[position] == plan.locate(position)
        assert fresh.batch(position) == plan.epoch(order[position][0])[order[position][1]]
        epochs = order[position][0]
        assert BatchPlan(dataset, batch_size, 5).batches_in(epochs) == sum(epoch < epochs for epoch, _ in order)


def test_far_positions_are_found_at_once():
    plan = BatchPlan(made((7, {"repeats": Fraction(3, 7)}), (5, {"repeats": Fraction(2, 5)})), 2, 0)
    period = [len(plan.epoch(epoch)) for epoch in range(35)]
    assert len(set(period)) > 1
    started = time.process_time()
    assert plan.batches_in(35 * 10**9 + 3) == sum(period) * 10**9 + sum(period[:3])
    assert plan.locate(sum(period) * 10**9 + sum(period[:3]))[0] == 35 * 10**9 + 3
    assert time.process_time() - started < 20


# ---------------------------------------------------------------- the order


def test_the_order_is_a_pure_function_of_its_arguments():
    dataset = made((24, {}))
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    keys = [(seed, epoch) for seed in (0, 1, 2**63) for epoch in (0, 1, 11)]
    orders = {(seed, epoch): BatchPlan(dataset, 2, seed).epoch(epoch) for seed, epoch in keys}
    again = {}
    for seed in (2**63, 1, 0):
        plan = BatchPlan(dataclasses.replace(dataset, notes=("x",)), 2, seed)
        again |= {(seed, epoch): plan.epoch(epoch) for epoch in (11, 0, 1, 0)}
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1]) and torch.equal(torch.get_rng_state(), before[2])
    assert again == orders
    partners = [[frozenset(shown.item for shown in batch) for batch in order] for order in orders.values()]
    assert len({repr(order) for order in partners}) == len(orders)
    assert len({frozenset(order) for order in partners}) > 1, "partners must change too"


def test_a_known_order():
    """Runs are resumed by later versions: what an epoch shows must never change."""
    plan = BatchPlan(made((6, {"repeats": Fraction(3, 2)}), sizes=(64, 64)), 2, 42)
    assert [[shown.item for shown in batch] for batch in plan.epoch(0)] == [[5, 2], [3, 4], [0], [2, 5], [3, 1]]


def test_the_order_has_no_preference():
    plan = BatchPlan(made((4, {}), sizes=(64, 64)), 1, 0)
    firsts = Counter(plan.epoch(epoch)[0][0].item for epoch in range(800))
    assert len(firsts) == 4 and min(firsts.values()) > 150
    pairs = BatchPlan(made((4, {}), sizes=(64, 64)), 2, 0)
    together = Counter(frozenset(shown.item for shown in batch) for n in range(600) for batch in pairs.epoch(n))
    assert len(together) == 6 and min(together.values()) > 150


def test_fractions_take_turns_in_a_drawn_order():
    def halves(seed):
        plan = BatchPlan(made((20, {"repeats": Fraction(1, 2)}), sizes=(64, 64)), 4, seed)
        return frozenset(counted(plan, 0)), frozenset(counted(plan, 1))

    first, second = halves(0)
    assert len(first) == len(second) == 10 and not first & second
    assert len({halves(seed)[0] for seed in range(5)}) == 5 and first != frozenset(range(10))


# ---------------------------------------------------------------- sharing out


@settings(deadline=None, max_examples=30)
@given(st.lists(st.fractions(Fraction(1, 9), 9, max_denominator=20), min_size=1, max_size=5))
def test_apportioning_adds_up_and_never_takes_away(shares):
    before = apportioned(0, shares)
    assert not any(before)
    whole = sum(shares)
    for total in range(1, 30):
        now = apportioned(total, shares)
        assert sum(now) == total and all(a <= b for a, b in zip(before, now, strict=True))
        due = sorted(((Fraction(2 * k + 1, 2) / share, i) for i, share in enumerate(shares) for k in range(total)))
        assert Counter(i for _, i in due[:total]) == Counter({i: n for i, n in enumerate(now) if n})
        if len(shares) < 4:
            assert all(abs(n - share * total / whole) < 1 for n, share in zip(now, shares, strict=True))
        before = now


# ---------------------------------------------------------------- notes, errors, time


def test_thin_buckets_are_named():
    dataset = made((0, {"name": "cats"})).with_samples(
        [sample(f"a{i}", (64, 64)) for i in range(8)] + [sample("b", (90, 30)), sample("c", (30, 90))]
    )
    [note] = BatchPlan(dataset, 4, 0).notes()
    assert note == (
        "2 of 4 batches per epoch are not full (50%); buckets with fewer pictures than a batch holds: "
        "112×40 (1), 40×112 (1); add pictures of those shapes, crop them alike, or use a smaller batch_size"
    )
    assert BatchPlan(dataset, 1, 0).notes() == []


def test_moved_pictures_are_noted_with_what_it_costs():
    dataset = made((0, {})).with_samples([sample("a", (68, 64)), *(sample(f"b{i}", (80, 64)) for i in range(3))])
    [note] = BatchPlan(dataset, 4, 0).notes()
    assert note == (
        "1 image moved to a neighbouring bucket to fill batches (cropped by at most 11% more, a); "
        "switch merging off to keep them whole"
    )


def test_options_that_are_overruled_or_idle_are_noted():
    idle = BucketOptions(step=8, enabled=False, upscale=False)
    dataset = made((4, {"name": "cats", "batch_size": 2}), (8, {"buckets": idle}), sizes=(64, 64))
    assert BatchPlan(dataset, 4, 0).notes() == [
        "cats: its own batch_size 2 goes before the trainer's 4",
        "images: upscale off has no effect, since buckets are off and there is one size for all",
    ]
    rotating = made((4, {}), (10, {"name": "reg", "kind": "regularisation"}), sizes=(64, 64))
    assert BatchPlan(rotating, 2, 0).notes() == [
        "reg: 10 regularisation images, 4 presentations per epoch; each is shown about every 2.5 epochs"
    ]


def test_what_cannot_be_planned_is_refused():
    with pytest.raises(DatasetError, match="batch_size is 0"):
        BatchPlan(made((3, {})), 0, 0)
    for dataset in (made((0, {})), made((3, {"kind": "regularisation"})), made((3, {"kind": "validation"}))):
        with pytest.raises(DatasetError, match="test: 0 training images, less than one shown per epoch"):
            BatchPlan(dataset, 1, 0)
    with pytest.raises(
        DatasetError, match="1 training image, less than one shown per epoch: add some or raise repeats"
    ):
        BatchPlan(made((1, {"repeats": Fraction(1, 10**9)})), 1, 0)


def test_many_pictures_take_little_time():
    dataset = made((5000, {"repeats": Fraction(3, 2), "images": ImageOptions(variations=8)}))
    started = time.process_time()
    plan = BatchPlan(dataset, 4, 0)
    plan.epoch(0), plan.epoch(1), plan.notes()
    assert time.process_time() - started < 60, "takes about half a second"
