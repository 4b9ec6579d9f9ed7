"""Rotary positions that can be differentiated, in place of the host's fused kernels, for the time of a loan.

Newer hosts turn queries and keys with operations of ``comfy_kitchen``. Those have no derivative, and not every model
(Cosmos-Predict2, Anima, Ernie) avoids them while the host's training flag is set: autograd then refuses to train it.

* ``differentiable_ropes``: meanwhile these operations are made of torch's own; hosts without them stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.quant_ops
import torch
import torch.nn.functional as F
from torch import Tensor


def turned(x: Tensor, turns: Tensor, halves: bool) -> Tensor:
    """Pairs of ``x`` (…, d) times the 2 × 2 matrices ``turns`` (…, d/2, 2, 2).

    A pair is two neighbours, or one number of each half of the last dimension with ``halves``.
    """
    if x.ndim > 2 and turns.ndim > 2 and turns.shape[2] > x.shape[2] != 1:
        turns = turns[:, :, : x.shape[2]]  # positions to spare
    pairs = x.unflatten(-1, (2, -1)).mT if halves else x.unflatten(-1, (-1, 2))
    moved = (turns @ pairs.to(turns.dtype).unsqueeze(-1)).squeeze(-1)
    return (moved.mT if halves else moved).reshape(x.shape).to(x.dtype)


def normed_and_turned(
    x: Tensor, turns: Tensor, scale: Tensor, epsilon: float = 1e-6, rot_dim: int = 0, *, halves: bool
) -> Tensor:
    """RMS norm over the last dimension, then ``turned`` in its first ``rot_dim`` numbers (0: all)."""
    # a scale that the host has cast for this one call must not be what backward finds
    x = F.rms_norm(x, x.shape[-1:], scale.clone(), epsilon)
    if not rot_dim or rot_dim == x.shape[-1]:
        return turned(x, turns, halves)
    return torch.cat([turned(x[..., :rot_dim], turns, halves), x[..., rot_dim:]], -1)


def _turn_both(q: Tensor, k: Tensor, freqs_cis: Tensor, *, halves: bool) -> tuple[Tensor, Tensor]:
    return turned(q, freqs_cis, halves), turned(k, freqs_cis, halves)


def _norm_and_turn_both(
    q: Tensor,
    k: Tensor,
    freqs_cis: Tensor,
    q_scale: Tensor,
    k_scale: Tensor | None = None,
    epsilon: float = 1e-6,
    rot_dim: int = 0,
    *,
    halves: bool,
) -> tuple[Tensor, Tensor]:
    k_scale = q_scale if k_scale is None else k_scale
    return (
        normed_and_turned(q, freqs_cis, q_scale, epsilon, rot_dim, halves=halves),
        normed_and_turned(k, freqs_cis, k_scale, epsilon, rot_dim, halves=halves),
    )


def _turn(x: Tensor, freqs_cis: Tensor, *, halves: bool) -> Tensor:
    return turned(x, freqs_cis, halves)


def _norm_and_turn(x: Tensor, freqs_cis: Tensor, scale: Tensor, epsilon: float = 1e-6, *, halves: bool) -> Tensor:
    return normed_and_turned(x, freqs_cis, scale, epsilon, halves=halves)


OPERATIONS: dict[str, Callable[..., Any]] = {  # by the host's names
    name + half: partial(operation, halves=halves)
    for half, halves in (("", False), ("_split_half", True))
    for name, operation in (("apply_rope", _turn_both), ("rms_rope", _norm_and_turn_both))
} | {
    f"{name}{half}1": partial(operation, halves=halves)
    for half, halves in (("", False), ("_split_half", True))
    for name, operation in (("apply_rope", _turn), ("rms_rope", _norm_and_turn))
}


@contextmanager
def differentiable_ropes() -> Iterator[None]:
    """Until the end of the ``with`` the host's fused rotations have gradients.

    Without gradients under way too, so that a prediction has the same bits whether it is differentiated or not.
    """
    kitchen = getattr(comfy.quant_ops, "ck", None)
    hosts_own = {name: getattr(kitchen, name) for name in OPERATIONS if hasattr(kitchen, name)}
    for name in hosts_own:
        setattr(kitchen, name, OPERATIONS[name])
    try:
        yield
    finally:
        for name, own in hosts_own.items():
            if getattr(kitchen, name) is OPERATIONS[name]:  # somebody who replaced it meanwhile meant it
                setattr(kitchen, name, own)
