"""Adapters taken apart and put together again, for files that cut layers otherwise.

* ``Piece``: the parts of one adapter on some rows of a layer, as a file holds them.
* ``pieces_of``: an adapter of any make -> its pieces.
* ``as_one``: the pieces of a layer as the one set of parts that gives the same W'; ``on_rows``: of some of its rows.
* ``exchanged``: parts for the layer with the halves of its rows exchanged.
* ``folded``: parts without alpha and without a core, for files that have no place for them.

Low-rank pairs stay pairs: sums have their ranks beside each other, rows of a fused layer are rows of ``up``; other
families are cut by rows where they can be. Rotations of all parts of a fused layer are numbered as kohya does it. What
else there is together on one layer, or in part of it, is written as a dense difference where that does not depend on
the weight, and is a ValueError otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .adapter import Adapter, Additive, wide
from .compose import Sliced, Sum, Swapped, swapped
from .control import WIDTH, Widened
from .dora import SCALE
from .glora import A1, A2, B1, B2
from .ia3 import ON_INPUT
from .ia3 import WEIGHT as FACTORS
from .lora import DOWN, MID, UP
from .oftv2 import SCALED
from .oftv2 import WEIGHT as OFT_R
from .registry import read_adapter
from .rotations import BLOCKS

DIFF, DIFF_B = "diff", "diff_b"
_PAIR = frozenset({DOWN, UP, "alpha"})
_BY_ROW = frozenset({UP, DIFF, DIFF_B, "w_norm", "b_norm", "hada_w1_a", "hada_w2_a", B1})  # rows first, as the layer's
_ALL_ROWS = frozenset({DOWN, MID, "alpha", "hada_w1_b", "hada_w2_b", A1, A2, B2, OFT_R, SCALED, ON_INPUT})
_Shape = Sequence[int]


@dataclass(frozen=True)
class Piece:
    """``parts`` for ``rows`` (start, length) of a layer, None for all of them; ``swapped``: their halves exchanged."""

    parts: Mapping[str, Tensor]
    rows: tuple[int, int] | None = None
    swapped: bool = False


def pieces_of(adapter: Adapter) -> list[Piece]:
    """What the adapter consists of."""
    if isinstance(adapter, Sum):
        return [piece for part in adapter.parts for piece in pieces_of(part)]
    if isinstance(adapter, Sliced):
        inner, start = pieces_of(adapter.inner), adapter.start
        whole = (0, adapter.length)
        return [replace(p, rows=(start + (p.rows or whole)[0], (p.rows or whole)[1])) for p in inner]
    if isinstance(adapter, Swapped):
        return [replace(piece, swapped=not piece.swapped) for piece in pieces_of(adapter.inner)]
    if isinstance(adapter, Widened):
        wider = as_one(pieces_of(adapter.inner), adapter.inner.shape)
        return [Piece({**wider, WIDTH: torch.tensor(adapter.inner.shape)})]
    return [Piece(adapter.state())]


def as_one(pieces: Sequence[Piece], shape: _Shape | None) -> dict[str, Tensor]:
    """The parts for a whole layer of ``shape``. Raises ValueError where they are of kinds that do not go together."""
    pieces = [Piece(_straight(piece, shape), piece.rows) for piece in pieces]
    if len(pieces) == 1 and pieces[0].rows is None:
        return dict(pieces[0].parts)
    biases = [replace(piece, parts={DIFF_B: piece.parts[DIFF_B]}) for piece in pieces if DIFF_B in piece.parts]
    weights = [replace(piece, parts={k: v for k, v in piece.parts.items() if k != DIFF_B}) for piece in pieces]
    weights = [piece for piece in weights if piece.parts]
    parts: dict[str, Tensor] = {}
    if len(weights) == 1 and weights[0].rows is None:
        parts = dict(weights[0].parts)
    elif weights and all(piece.parts.keys() <= _PAIR for piece in weights):
        parts = _stacked(weights, shape)
    elif weights and shape and _parts_with_norms(weights) and _covers([piece.rows for piece in weights], shape[0]):
        weights.sort(key=lambda piece: piece.rows or (0, 0))
        parts = _stacked(weights, shape) | {SCALE: torch.cat([piece.parts[SCALE] for piece in weights])}
    elif weights and shape and _covers([piece.rows for piece in weights], shape[0]):
        parts = _numbered(weights) or {DIFF: _dense(weights, shape)}
    elif weights:
        parts = {DIFF: _dense(weights, shape)}
    if biases:
        length = shape[0] if shape else len(biases[0].parts[DIFF_B])
        parts[DIFF_B] = _total([(piece.parts[DIFF_B], piece.rows) for piece in biases], (length,))
    return parts


def on_rows(pieces: Sequence[Piece], rows: tuple[int, int], shape: _Shape) -> dict[str, Tensor]:
    """The parts for some rows of a layer of ``shape``, as if they were a layer; empty where no piece is there."""
    start, length = rows
    found = []
    for piece in pieces:
        first, count = piece.rows or (0, shape[0])
        if start < first + count and first < start + length:
            found.append(Piece(_cut(piece, start - first, length, (count, *shape[1:])), None))
    return as_one(found, (length, *shape[1:])) if found else {}


def exchanged(parts: Mapping[str, Tensor], shape: _Shape | None) -> dict[str, Tensor]:
    """The same for a layer of ``shape`` with the halves of its rows exchanged."""
    by_row = _by_row(parts, all_rows=True)
    if by_row is None:
        parts = _as_difference(parts, shape)
        by_row = set(parts)
    return {part: swapped(tensor) if part in by_row else tensor for part, tensor in parts.items()}


def folded(parts: Mapping[str, Tensor], into: str) -> dict[str, Tensor]:
    """Without alpha, its scale in the factor ``into``; and without Tucker's core, which goes into ``down``."""
    scale = _scale(parts)
    result = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    if scale != 1:
        result[into] = (wide(result[into]) * scale).to(result[into].dtype)
    if MID in result:
        down, mid = result[DOWN], result.pop(MID)
        product = torch.einsum("pq...,qi->pi...", wide(mid), wide(down).flatten(1))
        result[DOWN] = product.to(down.dtype).contiguous()
    return result


def _by_row(parts: Mapping[str, Tensor], all_rows: bool) -> set[str] | None:
    """The parts that belong to single rows, None unless the others are the same for any rows (for all of them)."""
    by_row, common = _BY_ROW & parts.keys(), _ALL_ROWS & parts.keys()
    if SCALE in parts and (len(parts[SCALE]) > 1 or all_rows):
        by_row |= {SCALE} if len(parts[SCALE]) > 1 else set()
        common |= {SCALE}
    if FACTORS in parts and parts[FACTORS].ndim == 1:
        by_row |= {FACTORS} if not parts[ON_INPUT] else set()
        common |= {FACTORS}
    return None if parts.keys() - by_row - common else set(by_row)


def _straight(piece: Piece, shape: _Shape | None) -> dict[str, Tensor]:
    """Its parts with nothing exchanged; ``shape`` is that of the whole layer."""
    if not piece.swapped:
        return dict(piece.parts)
    rows = None if shape is None else (piece.rows[1] if piece.rows else shape[0], *shape[1:])
    return exchanged(piece.parts, rows)


def _cut(piece: Piece, first: int, length: int, shape: _Shape) -> dict[str, Tensor]:
    """``length`` rows from ``first`` on, of a piece for a layer of ``shape``."""
    parts = _straight(piece, shape)
    if (first, length) == (0, shape[0]):
        return parts
    if first < 0 or first + length > shape[0]:
        raise ValueError("the layers of the file divide the rows of this one otherwise than its adapters do")
    by_row = _by_row(parts, all_rows=False)
    if by_row is None:
        parts = _as_difference(parts, shape)
        by_row = set(parts)
    return {
        part: tensor.narrow(0, first, length).contiguous() if part in by_row else tensor
        for part, tensor in parts.items()
    }


def _as_difference(parts: Mapping[str, Tensor], shape: _Shape | None) -> dict[str, Tensor]:
    bias = {part: tensor for part, tensor in parts.items() if part == DIFF_B}
    rest = {part: tensor for part, tensor in parts.items() if part != DIFF_B}
    return ({DIFF: _dense([Piece(rest)], shape)} if rest else {}) | bias


def _parts_with_norms(pieces: Sequence[Piece]) -> bool:
    """Whether they are DoRAs of pairs with norms per row."""
    kept = _PAIR | {SCALE}
    return all(p.parts.keys() <= kept and SCALE in p.parts and p.parts[SCALE].shape[1:].numel() == 1 for p in pieces)


def _stacked(pieces: Sequence[Piece], shape: _Shape | None) -> dict[str, Tensor]:
    """Low-rank pairs as one, their ranks beside each other; alpha / rank stays where they share it."""
    scales = [_scale(piece.parts) for piece in pieces]
    common = scales[0] if len(set(scales)) == 1 else 1.0
    ups = []
    for piece, scale in zip(pieces, scales, strict=True):
        up = piece.parts[UP]
        up = up if scale == common else (wide(up) * scale).to(up.dtype)
        ups.append(_total([(up, piece.rows)], (shape[0] if shape else len(up), *up.shape[1:])))
    down = torch.cat([piece.parts[DOWN] for piece in pieces])
    return {DOWN: down, UP: torch.cat(ups, 1), "alpha": torch.tensor(common * len(down))}


def _covers(rows: Sequence[tuple[int, int] | None], total: int) -> bool:
    """Whether pieces stand one behind the other from the first row to the last."""
    end = 0
    for start, length in sorted(span or (0, total) for span in rows):
        if start != end:
            return False
        end += length
    return end == total


def _numbered(pieces: Sequence[Piece]) -> dict[str, Tensor]:
    """kohya's OFT on a fused layer; empty for anything else."""
    if any(piece.parts.keys() - {BLOCKS, "alpha"} or piece.parts[BLOCKS].ndim != 3 for piece in pieces):
        return {}
    alphas = {float(piece.parts["alpha"]) for piece in pieces if "alpha" in piece.parts}
    if len(alphas) > 1:
        return {}
    ordered = sorted(pieces, key=lambda piece: piece.rows or (0, 0))
    blocks = {f"{BLOCKS}.{n}": piece.parts[BLOCKS] for n, piece in enumerate(ordered)}
    return blocks | ({"alpha": torch.tensor(alphas.pop())} if alphas else {})


def _dense(pieces: Sequence[Piece], shape: _Shape | None) -> Tensor:
    """The sum of the differences, in the shape of the layer."""
    if shape is None:
        raise ValueError("several adapters on a layer of unknown shape cannot be written as one")
    deltas = []
    for piece in pieces:
        rows = piece.rows[1] if piece.rows else shape[0]
        adapter = _adapter(piece.parts, (rows, *shape[1:]))
        if not isinstance(adapter, Additive):
            raise ValueError(f"{adapter.name} depends on the weight, and so cannot be written as a part of a layer")
        dtype = next(iter(piece.parts.values())).dtype
        deltas.append((adapter.delta().to(dtype), piece.rows))
    return _total(deltas, shape)


def _total(tensors: Sequence[tuple[Tensor, tuple[int, int] | None]], shape: _Shape) -> Tensor:
    """The sum of tensors for rows of ``shape``, in the dtype of the first."""
    if len(tensors) == 1 and tensors[0][1] is None:
        return tensors[0][0]
    first = tensors[0][0]
    total = wide(first).new_zeros(tuple(shape))
    for tensor, rows in tensors:
        place = total if rows is None else total.narrow(0, *rows)
        place += tensor
    return total.to(first.dtype)


def _scale(parts: Mapping[str, Tensor]) -> float:
    """alpha / rank, as the family has it."""
    adapter = _adapter({part: tensor for part, tensor in parts.items() if part not in (SCALE, DIFF_B)}, None)
    return float(getattr(adapter, "scale", 1.0))


def _adapter(parts: Mapping[str, Tensor], shape: _Shape | None) -> Adapter:
    return read_adapter(parts, shape)[0]
