"""A size for the whole file, shared out among its layers so that the most energy is retained.

* ``Budget``: what a LoRA may take, as an average rank or in bytes.
* ``Layer``: what is known of a layer before its rank is: the first of its singular values and vectors.
* ``decomposed``: a matrix → its ``Layer``, with the error that the first ones leave, measured.
* ``ranks``: how many of them each layer keeps; ``decided``: the same for a ``Cut`` or a ``Budget``.

A rank of a layer (m, n) takes m + n numbers and adds S² to what is retained. The S² of a layer fall, so the gains are
concave, and taking the greatest S² / (m + n) of all layers first is the best for the size that is reached; what is left
over at the end goes to the next that fits. Where all layers are of one shape nothing better exists; otherwise the best
for the same budget has less than one rank's energy more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter
from ..low_rank import Cut, LowRank, as_lora, distance, size, truncated
from .outcome import LayerOutcome

MEGABYTE = 10**6
WIDEST = 4  # times the average rank: no layer gets more, so that what is kept meanwhile is bounded
ALPHA, LINE, LINES = 4, 120, 3  # bytes: alpha, a line of the file's table besides the name, lines per layer


@dataclass(frozen=True)
class Budget:
    """One of the two. ``average_rank``: as large as a file with this rank in every layer that it has. ``bytes``: of
    the file without its metadata, its numbers stored with ``itemsize`` bytes each (2 in half precision).
    """

    average_rank: float | None = None
    bytes: int | None = None
    itemsize: int = 2

    def __post_init__(self) -> None:
        if (self.average_rank is None) == (self.bytes is None):
            raise ValueError("a budget is either an average_rank or bytes; give one of them")
        if self.average_rank is not None and not 0 < self.average_rank < math.inf:
            raise ValueError(f"average_rank is {self.average_rank!r}, expected more than 0")
        if self.bytes is not None and self.bytes < 1:
            raise ValueError(f"bytes is {self.bytes!r}, expected at least 1")
        if self.itemsize not in (1, 2, 4, 8):
            raise ValueError(f"itemsize is {self.itemsize!r}, expected 1, 2, 4 or 8 bytes for a number")

    @classmethod
    def of_megabytes(cls, megabytes: float, itemsize: int) -> Budget:
        if not 1 <= megabytes * MEGABYTE < 2**62:
            raise ValueError(f"megabytes is {megabytes}, expected the size of a file")
        return cls(bytes=int(megabytes * MEGABYTE), itemsize=itemsize)

    def numbers(self, matrices: Mapping[str, tuple[int, int]], carried: Mapping[str, int]) -> int:
        """How many numbers the factors of ``matrices`` may have, beside as many of another kind as are ``carried``."""
        if self.average_rank is not None:
            return int(sum(min(self.average_rank, *shape) * sum(shape) for shape in matrices.values()))
        assert self.bytes is not None
        paths = matrices.keys() | carried.keys()
        table = sum(ALPHA + LINES * (len(path) + LINE) for path in paths)
        left = (self.bytes - table) // self.itemsize - sum(carried.values())
        smallest = min(map(sum, matrices.values()), default=0)
        if left < smallest:
            least = self.bytes + (smallest - left) * self.itemsize
            raise ValueError(f"bytes is {self.bytes}, too few for {len(paths)} layers; expected at least {least}")
        return left

    def widest(self, matrices: Mapping[str, tuple[int, int]], carried: Mapping[str, int]) -> int:
        """The greatest rank that a layer may get. An ``average_rank`` says it whatever the layers are."""
        if self.average_rank is not None:
            return math.ceil(WIDEST * self.average_rank)
        even = self.numbers(matrices, carried) / max(sum(map(sum, matrices.values())), 1)
        return max(1, math.ceil(WIDEST * even))


@dataclass(frozen=True)
class Layer:
    """``factors``: their singular ``values`` fall. ``norm``: ‖ΔW‖; ``error``: ‖ΔW‖ without what the factors hold.

    ``before``: the rank it had, None where it was dense. ``own``: an adapter of that rank with the same ΔW.
    """

    path: str
    shape: tuple[int, ...]
    factors: LowRank
    values: Tensor
    norm: float
    error: float
    before: int | None = None
    own: Adapter | None = None

    def adapter(self, rank: int) -> Adapter:
        """With so many of the ranks, of which there is one at least."""
        if self.own is not None and rank == self.before:
            return self.own
        return as_lora(LowRank(self.factors.up[:, :rank].clone(), self.factors.down[:rank].clone()), self.shape)

    def outcome(self, rank: int) -> LayerOutcome:
        dropped = self.values[rank : self.factors.rank].double().norm().item()
        error = math.hypot(self.error, dropped) if rank else self.norm
        return LayerOutcome(self.path, rank, self.before, self.norm, error)


def decomposed(
    path: str,
    shape: Sequence[int],
    matrix: LowRank | Tensor,
    cut: Cut,
    exact: bool = False,
    own: Adapter | None = None,
) -> Layer:
    """The best approximation of ``matrix`` that ``cut`` asks for; ``exact`` as in ``truncated``.

    Norm and error are of one kind: of factors from all their singular values, else both measured. Raises ValueError
    naming the layer where numbers are not finite.
    """
    try:
        factors, values = truncated(matrix, cut, exact)
    except ValueError as error:
        raise ValueError(f"{path[:200]}: {error}") from error
    if isinstance(matrix, LowRank) and len(values) >= min(matrix.rank, *matrix.shape):
        norm, lost = values.double().norm().item(), values[factors.rank :].double().norm().item()
    else:
        dense = matrix.dense() if isinstance(matrix, LowRank) else matrix
        norm, lost = size(dense), distance(dense, factors)
    before = matrix.rank if isinstance(matrix, LowRank) else None
    return Layer(path, tuple(shape), factors, values[: factors.rank], norm, lost, before, own)


def ranks(layers: Sequence[Layer], numbers: int) -> list[int]:
    """How many ranks each of ``layers`` keeps of those it has, within so many ``numbers`` for all."""
    costs = torch.tensor([sum(layer.factors.shape) for layer in layers])
    energies = [layer.values[: layer.factors.rank].double().square() for layer in layers]
    owners = torch.repeat_interleave(torch.arange(len(layers)), torch.tensor([len(gains) for gains in energies]))
    order = (torch.cat(energies) / costs[owners]).argsort(descending=True, stable=True)
    kept, left = [0] * len(layers), numbers
    for index in owners[order].tolist():
        cost = int(costs[index])
        if cost <= left:
            kept[index] += 1
            left -= cost
    return kept


def decided(layers: Sequence[Layer], cut: Cut | Budget, carried: Mapping[str, int]) -> tuple[list[int], list[str]]:
    """(how many ranks each of ``layers`` keeps, what there is to say)."""
    if isinstance(cut, Cut) or not layers:
        return [layer.factors.rank for layer in layers], []
    matrices = {layer.path: layer.factors.shape for layer in layers}
    kept = ranks(layers, cut.numbers(matrices, carried))
    none, most = kept.count(0), cut.widest(matrices, carried)
    full = kept.count(most)
    notes = [f"the budget gives {none} layers no rank; they are left out"] if none else []
    return kept, notes + ([f"{full} layers have rank {most}, the greatest within this budget"] if full else [])
