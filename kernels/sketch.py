"""The first singular values and vectors of a large matrix, from random products with it.

* ``leading``: by subspace iteration (Halko et al. 2011, arXiv:0909.4061, algorithm 4.4), or None where the whole
  decomposition is less work, or where the iteration would not come close enough to it.

How many turns that takes depends on the spectrum: one or two for a matrix of low rank with little beside it, dozens
where the singular values are much alike, of which a fixed number of turns loses some per cent of the energy. So the
energy that is held is watched from turn to turn. What is missing from the best approximation is bounded by all that
lies outside the subspace (Ky Fan). Where that is too much it is estimated from the last two gains, as if they went on
as a geometric series, and taken ``CAUTION`` times, because their ratio grows slowly (at first faster: hence
``RATIO``, the least that is believed). It has to be below ``MISSING`` of what the best approximation keeps, and of what
it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

MISSING, CAUTION = 1e-3, 4.0
RATIO = 0.25
FLOOR = 1e-7  # of the whole energy: less than that is rounding of products in float32
TURNS = 16
WORTH = 8  # times narrower than the matrix has the subspace to be; else a whole decomposition takes no longer

Found = tuple[Tensor, Tensor, Tensor, int]  # U (m, k), singular values (k or more), Vᵀ (k, n), k


def leading(dense: Tensor, kept_of: Callable[[Tensor, float], int], expected: int) -> Found | None:
    """What is kept of ``dense`` (m, n), float32 or wider; the same for the same matrix.

    ``kept_of``: from the first singular values and the norm of the matrix to how many stay, of those that are not 0.
    ``expected``: how many that may be; where they are not enough, twice as many are tried.
    """
    norm = math.sqrt(sum(rows.double().square().sum().item() for rows in dense.split(1024)))
    while norm and WORTH * _width(expected) <= min(dense.shape):
        found = _iterated(dense, norm, kept_of, expected)
        if found is None or found[3] <= expected:
            return found
        expected *= 2
    return None


def _width(expected: int) -> int:
    return expected + expected // 2 + 10


def _iterated(dense: Tensor, norm: float, kept_of: Callable[[Tensor, float], int], expected: int) -> Found | None:
    """Within subspaces of one width. More is kept than ``expected`` where that is too narrow."""
    draws = torch.Generator().manual_seed(0)
    basis = torch.randn(dense.shape[1], _width(expected), generator=draws).to(dense.device, dense.dtype)
    energies: list[Tensor] = []  # of the first 1, 2, … singular values, at each turn
    for turn in range(TURNS):
        basis = torch.linalg.qr((dense @ basis).double())[0].to(dense.dtype)  # its energy is only as good as its angles
        inside = basis.T @ dense  # (l, n)
        squares, u = torch.linalg.eigh(inside.double() @ inside.double().T)
        squares, u = squares.flip(0).clamp_min(0), u.flip(1)
        energies.append(squares.cumsum(0))
        values = squares.sqrt()
        kept = kept_of(values, norm)
        turns_left = 0.0 if kept > expected and turn > 1 else _turns_left(energies, kept, norm**2)
        if turns_left == 0:
            u = u[:, :kept].to(dense.dtype)
            return basis @ u, values, (u.T @ inside) / values[:kept, None].to(dense.dtype), kept
        if turns_left > TURNS - 1 - turn:
            return None
        basis = torch.linalg.qr(inside.T)[0]
    return None


def _turns_left(energies: list[Tensor], kept: int, whole: float) -> float:
    """How many turns it takes until too little is missing from the first ``kept`` values to matter."""
    held = energies[-1][kept - 1].item()
    allowed = max(MISSING * min(held, whole - held), FLOOR * whole)
    if whole - energies[-1][-1].item() <= allowed:
        return 0
    if len(energies) < 3:
        return 1
    before, last = (energies[n + 1][kept - 1].item() - energies[n][kept - 1].item() for n in (-3, -2))
    if last <= FLOOR * whole:
        return 0
    ratio = max(last / before, RATIO) if before > 0 else 1.0
    missing = CAUTION * last * ratio / (1 - ratio) if ratio < 1 else math.inf
    return 0 if missing <= allowed else math.log(missing / allowed) / -math.log(ratio) if ratio < 1 else math.inf
