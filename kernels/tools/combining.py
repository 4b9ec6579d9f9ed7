"""How several differences of one weight become one: sum, magnitude pruning, DARE, TIES.

As in PEFT's utils/merge_utils.py, with two things told apart there: the sign of a strength belongs to ΔW, so that a
LoRA below 0 votes the other way; and nothing is written to the global random state.

* ``magnitude_pruned``, ``randomly_dropped``: one ΔW with fewer numbers. ``disjoint_mean``: the vote on signs and the
  mean of those that agree. ``combined``: the methods made of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

MAJORITIES = {
    "total": "The sign of the sum of all numbers: large ones count more.",
    "frequency": "The sign that more of them have, however small.",
}


def combined(
    deltas: Iterable[tuple[Tensor, float]], method: str, density: float, majority: str, draws: torch.Generator
) -> Tensor:
    """``deltas``: (ΔW, strength), made one after the other; ``method``: sum, prune, dare, ties or dare_ties."""
    if method in ("ties", "dare_ties"):
        turned = ((delta if strength > 0 else -delta, abs(strength)) for delta, strength in deltas)
        thinned = [(_thinned(delta, method, density, draws), strength) for delta, strength in turned]
        return disjoint_mean([delta for delta, _ in thinned], [strength for _, strength in thinned], majority)
    total: Tensor | None = None
    for delta, strength in deltas:
        delta = _thinned(delta, method, density, draws)
        total = delta * strength if total is None else total.add_(delta, alpha=strength)
    assert total is not None
    return total


def _thinned(delta: Tensor, method: str, density: float, draws: torch.Generator) -> Tensor:
    if method == "sum" or density == 1:
        return delta
    return randomly_dropped(delta, density, draws) if "dare" in method else magnitude_pruned(delta, density)


def magnitude_pruned(delta: Tensor, density: float) -> Tensor:
    """The largest numbers stay, ``density`` of all (at least one), and equals of the smallest among them."""
    sizes = delta.abs().flatten()
    kept = max(int(density * sizes.numel()), 1)
    smallest = sizes.kthvalue(sizes.numel() - kept + 1).values
    return torch.where(delta.abs() >= smallest, delta, 0)


def randomly_dropped(delta: Tensor, density: float, draws: torch.Generator) -> Tensor:
    """Each number stays with the probability ``density``, and is divided by it."""
    kept = torch.bernoulli(torch.full(delta.shape, density), generator=draws)
    return delta * kept.to(delta.device, delta.dtype) / density


def disjoint_mean(deltas: Sequence[Tensor], weights: Sequence[float], majority: str) -> Tensor:
    """Of every number the weighted mean of those with the elected sign (that of the sum; + where it is 0)."""
    votes = sum(delta if majority == "total" else delta.sign() for delta in deltas)
    elected = torch.where(torch.as_tensor(votes) >= 0, 1, -1)
    total, count = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = delta.sign() == elected
        total += weight * delta * agrees
        count += agrees
    return total / count.clamp_min(1)


def draws_for(seed: int, path: str) -> torch.Generator:
    """Of one layer: the same whatever other layers there are."""
    digest = hashlib.blake2b(f"{seed} {path}".encode("utf-8", "replace"), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
