"""Where every picture is trained, and which pictures each batch shows: pure functions of (dataset, batch size, seed).

- ``place``: bucket, scaling and crop of every picture at each of its resolutions
- ``BatchPlan``: the batches of any epoch, and the batch at any position of the run
- repeats are exact: with fractions, an epoch shows a picture one time more or less in turn, and the totals of the run
  are right to within one presentation of a picture and half a one of a concept
- regularisation pictures are shown as often as the training pictures of their group together; which ones takes turns,
  and none is left out
- batches never mix buckets or groups, never show a picture twice, and those of a bucket differ by at most one in size
- nothing is drawn from a global generator
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .balancing import followed, rates
from .buckets import choose_bucket, cover, kept_part
from .draws import Draws
from .merging import merged
from .model import Dataset, DatasetError, Picture, Size, listed, some


@dataclass(frozen=True)
class Item:
    """One sample at one resolution."""

    sample: int  # index into Dataset.samples
    bucket: Size
    resized: Size
    crop: tuple[int, int]  # (left, top) of the bucket in the resized picture, where nothing is drawn at random
    variations: int


@dataclass(frozen=True)
class Shown:
    """One presentation of an item."""

    item: int  # index into BatchPlan.items
    variation: int
    turn: int  # how often the item has been shown in the run before


Batch = tuple[Shown, ...]
TRAINED = ("training", "regularisation")


def _slots(dataset: Dataset, kinds: Sequence[str]) -> list[tuple[int, int]]:
    """(sample, index of the resolution) of every item, in the order of the items."""
    return [
        (sample, resolution)
        for sample in dataset.members(*kinds)
        for resolution in range(len(dataset.of(dataset.samples[sample]).resolutions))
    ]


def place(dataset: Dataset, kinds: Sequence[str] = TRAINED, batch_size: int = 1) -> tuple[Item, ...]:
    """Every sample of these kinds at every resolution of its concept, sample by sample."""
    slots, repeats = _slots(dataset, kinds), rates(dataset)
    alike = defaultdict(list)  # items that may be merged: batches can mix them, and they choose from the same buckets
    for item, (index, which) in enumerate(slots):
        concept = dataset.of(dataset.samples[index])
        size = concept.batch_size or batch_size
        alike[concept.group, size, concept.resolutions[which], concept.buckets].append(item)
    buckets: dict[int, Size] = {}
    for (_, size, resolution, options), items in alike.items():
        samples = [dataset.samples[slots[item][0]] for item in items]
        chosen = merged(
            [sample.size for sample in samples], [repeats[s.concept] for s in samples], resolution, options, size
        )
        buckets.update(zip(items, chosen, strict=True))
    return tuple(_item(dataset, index, buckets[item]) for item, (index, _) in enumerate(slots))


def place_all(dataset: Dataset, batch_size: int = 1) -> tuple[Item, ...]:
    """Every item where a run has it, sample by sample: validation pictures are shown one by one and move no others."""
    items = (*place(dataset, TRAINED, batch_size), *place(dataset, ("validation",)))
    return tuple(sorted(items, key=lambda item: item.sample))


def _item(dataset: Dataset, index: int, bucket: Size) -> Item:
    sample = dataset.samples[index]
    concept = dataset.of(sample)
    resized, crop = cover(sample.size, bucket, sample.focus if concept.images.crop == "focus" else None)
    variations = 1 if concept.kind == "validation" else concept.images.variation_count
    return Item(index, bucket, resized, crop, variations)


class _Rotation:
    """The items of one concept at one resolution in a drawn order that repeats for ever.

    After ``total`` presentations the item at place j of n has been shown ceil((total − j) / n) times.
    """

    def __init__(self, items: Sequence[int], group: int, rate: Fraction, draws: Draws) -> None:
        self.items, self.group = np.array(draws.shuffled(items)), group
        self.per_epoch = rate * len(items)

    def shown(self, total: int) -> np.ndarray:
        return -((np.arange(len(self.items)) - total) // len(self.items))


class BatchPlan:
    """The batches of a run."""

    def __init__(self, dataset: Dataset, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise DatasetError(f"batch_size is {batch_size}, expected 1 or more")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.items = place(dataset, TRAINED, batch_size)
        self._slots = _slots(dataset, TRAINED)
        self._rates = rates(dataset)
        self._training, self._regularisation = (self._rotations(kind) for kind in TRAINED)
        if sum(rotation.per_epoch for rotation in self._training) < 1:
            found = some(dataset.members("training"), "training image")
            raise DatasetError(f"{dataset.source}: {found}, less than one shown per epoch: add some or raise repeats")
        self._period = math.lcm(*(self._rates[dataset.samples[item.sample].concept].denominator for item in self.items))

        pools: dict[tuple[int, int, Size], int] = {}  # group, batch size and bucket: what may share a batch
        concepts = [dataset.of(dataset.samples[item.sample]) for item in self.items]
        keys = [
            (concept.group, concept.batch_size or batch_size, item.bucket)
            for concept, item in zip(concepts, self.items, strict=True)
        ]
        self._pool = np.array([pools.setdefault(key, len(pools)) for key in keys])
        self._pools = tuple(pools)
        # a picture can be in a pool at two resolutions, or listed twice, but must not be in a batch twice
        self._pictures = [dataset.samples[item.sample].picture for item in self.items]
        pictures_in: dict[tuple[int, Picture], int] = {}
        pairs = zip(self._pool.tolist(), self._pictures, strict=True)
        self._picture = np.array([pictures_in.setdefault(pair, len(pictures_in)) for pair in pairs])
        self._pool_of_picture = np.array([pool for pool, _ in pictures_in])
        self._first_variation = [
            Draws(seed, "variation", dataset.samples[sample].id, which).below(item.variations)
            for item, (sample, which) in zip(self.items, self._slots, strict=True)
        ]
        self._ends = [0]  # batches in the first so many epochs, as far as anybody has asked
        self._latest: tuple[int, tuple[Batch, ...]] | None = None

    @property
    def largest_batch(self) -> int:
        """The most pictures a batch can hold."""
        return max(size for _, size, _ in self._pools)

    def _rotations(self, kind: str) -> list[_Rotation]:
        members: dict[tuple[int, int], list[int]] = defaultdict(list)
        for item, (sample, which) in enumerate(self._slots):
            if self.dataset.of(self.dataset.samples[sample]).kind == kind:
                members[self.dataset.samples[sample].concept, which].append(item)
        return [
            _Rotation(
                items,
                self.dataset.concepts[concept].group,
                self._rates[concept],
                Draws(self.seed, "rotation", concept, which),
            )
            for (concept, which), items in members.items()
        ]

    def _shown_before(self, epoch: int) -> np.ndarray:
        """How often each item is shown in the epochs before this one."""
        totals = [math.floor(epoch * rotation.per_epoch + Fraction(1, 2)) for rotation in self._training]
        rotations = list(zip(self._training, totals, strict=True))
        training = tuple(rotations)
        for group in dict.fromkeys(rotation.group for rotation in self._regularisation):
            groups = followed(self.dataset, group)
            total = sum(total for rotation, total in training if rotation.group in groups)
            regularisation = [rotation for rotation in self._regularisation if rotation.group == group]
            shares = [rotation.per_epoch for rotation in regularisation]
            rotations += zip(regularisation, apportioned(total, shares), strict=True)
        shown = np.zeros(len(self.items), np.int64)
        for rotation, total in rotations:
            shown[rotation.items] = rotation.shown(total)
        return shown

    # -- one epoch

    def epoch(self, number: int) -> tuple[Batch, ...]:
        """The batches of an epoch, counted from 0."""
        if self._latest is None or self._latest[0] != number:
            self._latest = number, self._epoch(number)
        return self._latest[1]

    def _epoch(self, number: int) -> tuple[Batch, ...]:
        before = self._shown_before(number)
        counts = self._shown_before(number + 1) - before
        pools: dict[int, dict[Picture, list[int]]] = defaultdict(lambda: defaultdict(list))  # presentations, by picture
        for item in np.flatnonzero(counts).tolist():
            presentations = pools[int(self._pool[item])][self._pictures[item]]
            presentations += [item] * int(counts[item])
        batches: list[list[int]] = []
        for pool, pictures in sorted(pools.items()):
            draws = Draws(self.seed, "batches", number, self._pools[pool])
            batches += _filled(list(pictures.values()), self._pools[pool][1], draws)
        turns = before.tolist()
        return tuple(
            tuple(self._shown(item, turns) for item in batch)
            for batch in Draws(self.seed, "order", number).shuffled(batches)
        )

    def _shown(self, item: int, turns: list[int]) -> Shown:
        turn = turns[item]
        turns[item] += 1
        return Shown(item, (turn + self._first_variation[item]) % self.items[item].variations, turn)

    def presentations(self, epoch: int = 0) -> tuple[int, ...]:
        """How many presentations of each concept an epoch has."""
        counts = self._shown_before(epoch + 1) - self._shown_before(epoch)
        concepts = [self.dataset.samples[item.sample].concept for item in self.items]
        return tuple(np.bincount(concepts, counts, len(self.dataset.concepts)).astype(int).tolist())

    # -- the run

    def batch(self, position: int) -> Batch:
        """The batch at a position of the run, counted from 0."""
        epoch, index = self.locate(position)
        return self.epoch(epoch)[index]

    def locate(self, position: int) -> tuple[int, int]:
        """(epoch, index of the batch in it) of a position of the run."""
        assert position >= 0
        while self._ends[-1] <= position and len(self._ends) <= self._period:
            self._count_another()
        rounds, position = divmod(position, self._ends[-1]) if self._ends[-1] <= position else (0, position)
        epoch = bisect_right(self._ends, position) - 1
        return rounds * self._period + epoch, position - self._ends[epoch]

    def epochs_at(self, position: int) -> float:
        """How often the run has gone through the dataset before a position."""
        epoch, index = self.locate(position)
        return epoch + index / max(1, self.batches_in(epoch + 1) - self.batches_in(epoch))

    def batches_in(self, epochs: int) -> int:
        """The number of batches of the first so many epochs."""
        rounds, rest = divmod(epochs, self._period)  # everything repeats after as many epochs as make repeats whole
        while len(self._ends) <= (self._period if rounds else rest):
            self._count_another()
        return (rounds * self._ends[self._period] if rounds else 0) + self._ends[rest]

    def _count_another(self) -> None:
        epoch = len(self._ends) - 1
        counts = self._shown_before(epoch + 1) - self._shown_before(epoch)
        by_picture = np.bincount(self._picture, counts).astype(np.int64)
        totals = np.bincount(self._pool_of_picture, by_picture).astype(np.int64)
        most = np.zeros_like(totals)
        np.maximum.at(most, self._pool_of_picture, by_picture)
        sizes = np.array([size for _, size, _ in self._pools])
        self._ends.append(self._ends[-1] + int(np.maximum(-(-totals // sizes), most).sum()))

    # -- what the user should know

    def notes(self) -> list[str]:
        """Thin batches, moved pictures, and options that are overruled or have no effect, with figures."""
        return [*self._thin(), *self._moved(), *self._overruled(), *self._rotating()]

    def _thin(self) -> Iterator[str]:
        pictures = np.bincount(self._pool_of_picture)
        few = [pool for pool, (_, size, _) in enumerate(self._pools) if pictures[pool] < size]
        if not few:
            return
        epoch = next(epoch for number in range(self._period) if (epoch := self.epoch(number)))
        thin = sum(len(batch) < self._pools[self._pool[batch[0].item]][1] for batch in epoch)
        few.sort(key=lambda pool: (-pictures[pool], pool))
        names = listed(f"{w}×{h} ({pictures[pool]})" for pool in few for w, h in [self._pools[pool][2]])
        yield (
            f"{thin} of {len(epoch)} batches per epoch are not full ({thin / len(epoch):.0%}); "
            f"buckets with fewer pictures than a batch holds: {names}; "
            "add pictures of those shapes, crop them alike, or use a smaller batch_size"
        )

    def _moved(self) -> Iterator[str]:
        more: dict[str, Fraction] = {}
        for item, (index, which) in zip(self.items, self._slots, strict=True):
            sample = self.dataset.samples[index]
            concept = self.dataset.of(sample)
            own = choose_bucket(sample.size, concept.resolutions[which], concept.buckets)
            if own != item.bucket:
                lost = kept_part(sample.size, own) - kept_part(sample.size, item.bucket)
                more[sample.id] = max(lost, more.get(sample.id, lost))
        if more:
            worst = max(more, key=lambda name: more[name])
            yield (
                f"{some(more, 'image')} moved to a neighbouring bucket to fill batches "
                f"(cropped by at most {float(more[worst]):.0%} more, {worst}); switch merging off to keep them whole"
            )

    def _overruled(self) -> Iterator[str]:
        for concept in self.dataset.concepts:
            name = concept.name or "images"
            if concept.batch_size not in (None, self.batch_size) and concept.kind in TRAINED:
                yield f"{name}: its own batch_size {concept.batch_size} goes before the trainer's {self.batch_size}"
            if not concept.buckets.enabled and not concept.buckets.upscale:
                yield f"{name}: upscale off has no effect, since buckets are off and there is one size for all"

    def _rotating(self) -> Iterator[str]:
        for rotation in self._regularisation:
            concept = self.dataset.of(self.dataset.samples[self.items[rotation.items[0]].sample])
            images, shown = len(rotation.items), rotation.per_epoch
            if shown < images:
                yield (
                    f"{concept.name or 'images'}: {images} regularisation images, {float(shown):.4g} presentations per "
                    f"epoch; each is shown about every {float(images / shown):.2g} epochs"
                )


def apportioned(total: int, shares: Sequence[Fraction]) -> list[int]:
    """``total`` whole presentations in proportion to ``shares``, so that a larger total never takes any away.

    Presentation k of a share comes due at (k + ½) / share; these are the first ``total`` that come due.
    """
    if not shares:
        return []
    whole = sum(shares)
    given = [math.floor(share / whole * total + Fraction(1, 2)) for share in shares]  # due at total / whole
    order = range(len(shares))
    while sum(given) < total:
        given[min(order, key=lambda index: ((given[index] + Fraction(1, 2)) / shares[index], index))] += 1
    while sum(given) > total:
        given[max(order, key=lambda index: ((given[index] - Fraction(1, 2)) / shares[index], index))] -= 1
    return given


def _filled(pictures: Iterable[list[int]], batch_size: int, draws: Draws) -> Iterator[list[int]]:
    """Batches of even sizes without a picture twice; ``pictures`` are the presentations of each.

    Each batch takes the pictures with most presentations left, so that none is left over with nobody to go with.
    """
    waiting = [(-len(left), draws.uniform(), draws.shuffled(left)) for left in pictures]
    heapq.heapify(waiting)
    total, most = -sum(left for left, _, _ in waiting), -waiting[0][0]
    count = max(-(-total // batch_size), most)
    for number in range(count):
        size = total // count + (number < total % count)
        taken = [heapq.heappop(waiting) for _ in range(size)]
        yield [left[-1] for _, _, left in taken]
        for _, _, left in taken:
            left.pop()
            if left:
                heapq.heappush(waiting, (-len(left), draws.uniform(), left))
