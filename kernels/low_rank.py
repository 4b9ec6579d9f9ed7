"""Matrices of low rank, kept as two factors: sums, spectra and the best approximations of them, nothing dense.

* ``LowRank``: the matrix up @ down; its norm from Gram matrices.
* ``beside``: the exact sum of several, their ranks next to each other.
* ``spectrum``: singular values; ``Cut``: how many of them stay, by rank, energy, ratio or sum.
* ``truncated``: the best approximation of that rank (Eckart–Young), from QR of both factors and the SVD of the small
  core between them; of a dense matrix by its SVD, or with ``exact=False`` from random products with it (``sketch``).
  ``distance``: how far it is from the matrix, measured, not estimated. ``whole``: all of a dense matrix of low rank.
* ``factors_of``: the ΔW of an adapter in this form, where its family has one; ``as_lora``: the way back.

Factors stay in their own dtype, float32 or wider; what is small (and QR, which makes it) is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, wide
from .compose import Sliced, Sum, Swapped, swapped
from .full import Full
from .loha import LoHa, khatri_rao
from .lokr import LoKr
from .lora import LoRA
from .sketch import leading
from .vera import LAMBDA_B, LAMBDA_D, A, B, VeRA

NOISE = torch.finfo(torch.float32).eps / 4  # of the largest singular value: below that float32 factors hold nothing
NOT_FINITE = "some of its numbers are not finite; inspect the file"
PIECE = 1 << 22  # numbers of a matrix that are measured at once


@dataclass(frozen=True)
class LowRank:
    """The matrix ``up`` (m, r) @ ``down`` (r, n); rank 0 is the zero matrix. Half types become float32."""

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != len(self.down):
            raise ValueError(f"{tuple(self.up.shape)} and {tuple(self.down.shape)} are no two factors of one matrix")
        up, down = wide(self.up.detach()), wide(self.down.detach())
        dtype = torch.promote_types(up.dtype, down.dtype)
        object.__setattr__(self, "up", up.to(dtype))
        object.__setattr__(self, "down", down.to(up.device, dtype))

    @property
    def rank(self) -> int:
        """Of the factors; the matrix may have less."""
        return len(self.down)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.up), self.down.shape[1]

    def dense(self) -> Tensor:
        return self.up @ self.down

    def scaled(self, factor: float) -> LowRank:
        """``factor`` times the matrix; nothing is computed for 1."""
        return self if factor == 1 else LowRank(self.up * factor, self.down)

    def norm(self) -> float:
        """Frobenius: ‖up · down‖² = ⟨upᵀ up, down downᵀ⟩."""
        up, down = self.up.double(), self.down.double()
        return (up.T @ up).mul(down @ down.T).sum().clamp_min(0).sqrt().item()


def beside(parts: Sequence[LowRank]) -> LowRank:
    """The sum of ``parts`` (one at least): nothing is rounded, the ranks add up."""
    if len(parts) == 1:
        return parts[0]
    shapes = {part.shape for part in parts}
    if len(shapes) != 1:
        raise ValueError(f"matrices of {', '.join(map(str, sorted(shapes)))} have no sum")
    return LowRank(torch.cat([part.up for part in parts], 1), torch.cat([part.down for part in parts]))


@dataclass(frozen=True)
class Cut:
    """How many ranks stay; the fewest of what is asked for, and never any that hold nothing but rounding.

    ``rank``: so many. ``energy``: the fewest whose S² sum up to this part of all; retained energy is 1 − error²/norm².
    ``ratio``: those with S ≥ S₁ / ratio (kohya's sv_ratio). ``cumulative``: the fewest whose S sum up to this part of
    all (kohya's sv_cumulative).
    """

    rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    cumulative: float | None = None

    def __post_init__(self) -> None:
        if all(value is None for value in vars(self).values()):
            raise ValueError("a cut needs a rank, an energy, a ratio or a cumulative sum")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        for name in ("energy", "cumulative"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{name} is {value!r}, expected 0 < {name} ≤ 1 (a part of the whole)")
        if self.ratio is not None and not 1 <= self.ratio < math.inf:
            raise ValueError(f"ratio is {self.ratio!r}, expected at least 1 (largest by smallest singular value)")

    def of(self, spectrum: Tensor, norm: float | None = None) -> int:
        """The rank for singular values, largest first; 0 for a zero matrix, else at least 1.

        ``norm`` of the matrix, where ``spectrum`` are only the first of its values. They may then be too few for
        ``energy``: the answer is how many there are.
        """
        values = spectrum.double()
        count = int((values > values[0] * NOISE).sum()) if len(values) else 0
        if not count:
            return 0
        if self.rank is not None:
            count = min(count, self.rank)
        if self.energy is not None:
            sums = values.square().cumsum(0)
            count = min(count, _reached(sums, self.energy * (sums[-1].item() if norm is None else norm**2)))
        if self.ratio is not None:
            count = min(count, int((values * self.ratio >= values[0]).sum()))
        if self.cumulative is not None:
            sums = values.cumsum(0)
            count = min(count, _reached(sums, self.cumulative * sums[-1].item()))
        return count


def _reached(sums: Tensor, wanted: float) -> int:
    """How many it takes until the growing ``sums`` reach what is wanted; all, where they do not."""
    return min(int((sums < wanted).sum()) + 1, len(sums))


def spectrum(matrix: LowRank | Tensor) -> Tensor:
    """Singular values, largest first; of a LowRank only as many as it has ranks (the others are zero)."""
    if isinstance(matrix, LowRank) and not _rather_dense(matrix):
        if not matrix.rank:
            return matrix.up.new_zeros(0)
        return torch.linalg.svdvals(_core(matrix)[1])
    return torch.linalg.svdvals(_dense(matrix))


def truncated(matrix: LowRank | Tensor, cut: Cut, exact: bool = True) -> tuple[LowRank, Tensor]:
    """(the best approximation of the rank that ``cut`` says, the singular values that were found), √S in each factor.

    Computed in float64. ``exact=False``: of a dense matrix only as many singular values as are needed, where that comes
    close enough to the best (``sketch``), and in its own dtype. The factors have the dtype of the matrix, float32 or
    wider. Raises ValueError where numbers are not finite.
    """
    for tensor in (matrix.up, matrix.down) if isinstance(matrix, LowRank) else (matrix,):
        if not tensor.isfinite().all():
            raise ValueError(NOT_FINITE)
    if isinstance(matrix, LowRank) and not matrix.rank:
        return matrix, matrix.up.new_zeros(0)
    dtype = matrix.up.dtype if isinstance(matrix, LowRank) else wide(matrix).dtype
    if isinstance(matrix, LowRank) and not _rather_dense(matrix):
        left, core, right = _core(matrix)
        u, values, v = torch.linalg.svd(core, full_matrices=False)
        kept = cut.of(values)
        u, v = left @ u[:, :kept], v[:kept] @ right.T
    else:
        dense = _dense(matrix)
        found = None if exact or cut.cumulative else leading(dense, cut.of, cut.rank or 32)
        u, values, v, kept = found if found else _decomposed(dense.double() if exact else dense, cut)
    roots = values[:kept].sqrt()
    return LowRank((u[:, :kept] * roots).to(dtype), (roots[:, None] * v[:kept]).to(dtype)), values


def size(matrix: Tensor) -> float:
    """‖M‖ (Frobenius), of however many dimensions."""
    return math.sqrt(sum(piece.double().square().sum().item() for piece in pieces(matrix)))


def distance(matrix: Tensor, factors: LowRank) -> float:
    """‖M − up · down‖, as it is."""
    squares, few = 0.0, max(1, PIECE // matrix.shape[1])
    for rows, up in zip(matrix.split(few), factors.up.split(few), strict=True):
        squares += torch.addmm(rows, up.to(rows), factors.down.to(rows), alpha=-1).double().square().sum().item()
    return math.sqrt(squares)


def pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Rows, some at a time, so that nothing of the size of a layer is made."""
    if not tensor.ndim:
        return [tensor]
    return tensor.split(max(1, PIECE * len(tensor) // max(tensor.numel(), 1)))


def whole(matrix: Tensor, most: int, error: float) -> LowRank | None:
    """All of a dense ``matrix`` but ``error`` (a part of its norm) in at most ``most`` ranks; None where it has more.

    None too where the factors would be larger than the matrix. From a single product with random vectors, which spans
    whatever of a low rank there is (Halko et al. 2011, arXiv:0909.4061). In float64, since the rounding of float32 has
    every rank.
    """
    matrix = matrix.detach().double().flatten(1)
    norm = matrix.norm().item()
    most = min(most, math.ceil(matrix.numel() / sum(matrix.shape)) - 1)
    if not norm or most < 1:
        return None
    draws = torch.randn(matrix.shape[1], most, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ draws.to(matrix.device))[0]
    inside = basis.T @ matrix
    u, values, v = torch.linalg.svd(inside, full_matrices=False)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()  # what is lost from each rank on
    kept = int((tails > error * norm).sum())
    if not kept or (matrix - basis @ inside).norm().item() > error * norm:
        return None
    roots = values[:kept].sqrt()
    return LowRank(basis @ (u[:, :kept] * roots), roots[:, None] * v[:kept])


def _core(matrix: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Q₁ (m, r), C (r, r), Q₂ (n, r) with orthonormal columns: the matrix is Q₁ C Q₂ᵀ; in float64."""
    left, upper = torch.linalg.qr(matrix.up.double())
    right, lower = torch.linalg.qr(matrix.down.double().T)
    return left, upper @ lower.T, right


def _rather_dense(matrix: LowRank) -> bool:
    """Whether the whole is less work, in multiplications: about 4 m r² for Q, 14 n³ + 8 m n² for singular vectors."""
    few, many = sorted(matrix.shape)
    rank = matrix.rank
    small = 4 * (few + many) * rank**2 + 22 * rank**3
    return rank >= few or small > few * many * rank + 8 * many * few**2 + 14 * few**3


def _dense(matrix: LowRank | Tensor) -> Tensor:
    """Two dimensions, float32 or wider; of a LowRank, whose product adds rounding of its own, float64."""
    if isinstance(matrix, LowRank):
        return matrix.up.double() @ matrix.down.double()
    return wide(matrix.detach()).flatten(1)


def _decomposed(dense: Tensor, cut: Cut) -> tuple[Tensor, Tensor, Tensor, int]:
    u, values, v = torch.linalg.svd(dense, full_matrices=False)
    return u, values, v, cut.of(values)


def factors_of(adapter: Adapter) -> LowRank | None:
    """ΔW as a matrix (out, in · kernel), where the family is of low rank in a closed form; exact. None otherwise.

    LoHa and LoKr only where that rank is smaller than both dimensions. Biases are not in it: of an adapter that changes
    nothing else ΔW has rank 0.
    """
    if changes_bias_only(adapter):
        if adapter.shape is None or len(adapter.shape) < 2:
            return None
        return LowRank(torch.zeros(adapter.shape[0], 0), torch.zeros(0, math.prod(adapter.shape[1:])))
    if isinstance(adapter, Sum):
        parts = [factors_of(part) for part in adapter.parts if not changes_bias_only(part)]
        known = [part for part in parts if part is not None]
        return beside(known) if len(known) == len(parts) else None
    if isinstance(adapter, Sliced | Swapped):
        inner = factors_of(adapter.inner)
        if inner is None or adapter.shape is None:
            return None
        if isinstance(adapter, Swapped):
            return LowRank(swapped(inner.up), inner.down)
        up = inner.up.new_zeros(adapter.shape[0], inner.rank)
        up[adapter.start : adapter.start + adapter.length] = inner.up
        return LowRank(up, inner.down)
    if isinstance(adapter, LoRA):
        return LowRank(*adapter.matrices()).scaled(adapter.scale)
    if isinstance(adapter, LoHa):
        w1_a, w1_b, w2_a, w2_b = adapter.pairs()
        if adapter.rank**2 >= min(len(w1_a), w1_b.shape[1]):
            return None
        return LowRank(khatri_rao(w1_a.T, w2_a.T).T, khatri_rao(w1_b, w2_b)).scaled(adapter.scale)
    if isinstance(adapter, LoKr):
        return _of_kronecker(adapter)
    if isinstance(adapter, VeRA) and adapter.shape is not None:
        up, down = (wide(adapter.tensors[name]) for name in (B, A))
        return LowRank(wide(adapter.tensors[LAMBDA_B])[:, None] * up, wide(adapter.tensors[LAMBDA_D])[:, None] * down)
    return None


def changes_bias_only(adapter: Adapter) -> bool:
    """Whether it leaves the weight as it is, whatever that is."""
    if isinstance(adapter, Sum):
        return all(map(changes_bias_only, adapter.parts))
    if isinstance(adapter, Sliced | Swapped):
        return changes_bias_only(adapter.inner)
    return isinstance(adapter, Full) and not adapter.factors


def _of_kronecker(adapter: LoKr) -> LowRank | None:
    """w1 ⊗ (outer · low) = (w1 ⊗ outer)(1 ⊗ low) = (1 ⊗ outer)(w1 ⊗ low), whichever has fewer ranks."""
    w1, outer, low = (None if half is None else wide(half) for half in adapter.halves())
    if w1 is None or outer is None or low is None:
        return None
    (rows, columns), one = w1.shape, torch.eye(min(w1.shape), dtype=w1.dtype)
    if len(one) * len(low) >= min(rows * len(outer), columns * low.shape[1]):
        return None
    up, down = (w1, one) if columns < rows else (one, w1)
    return LowRank(_kron(up, outer), _kron(down, low)).scaled(adapter.scale)


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """torch.kron of matrices, which fails for transposed ones, as a core leaves them."""
    return (one[:, None, :, None] * two[None, :, None, :]).reshape(len(one) * len(two), -1)


def as_lora(matrix: LowRank, shape: Sequence[int]) -> LoRA:
    """A LoRA with this ΔW for a weight of ``shape``, alpha = rank."""
    rank, (out_features, in_features, *kernel) = matrix.rank, shape
    if not rank:
        raise ValueError("a LoRA of rank 0 is none; leave the layer out")
    down = matrix.down.contiguous().view(rank, in_features, *kernel)
    return LoRA(down, matrix.up.contiguous().view(out_features, rank, *(1 for _ in kernel)), rank)
