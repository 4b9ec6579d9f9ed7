"""Diag-OFT on linear layers and convolutions: outputs rotated in blocks.

* ``OFT``: W' = rescale ∘ (Rᵀ W), R = (I + Q)(I − Q)⁻¹ per block of outputs, Q = B − Bᵀ (Qiu et al. 2023,
  arXiv:2306.07280; LyCORIS' modules/diag_oft.py; kohya's networks/oft.py writes the same tensors). ``alpha`` is the
  constraint: ‖Q‖ ≤ alpha · out over all blocks together, 0 for none. ``rescale`` (out, 1, …) is optional.
* The rotation works on Wx, before the bias. Trained fused with the frozen layer; kept for backward are the output and
  R, not the input.
* ``OFT.read`` also takes the butterfly's tensors, which have the same name (``boft.BOFT``), and those that kohya's
  networks/oft_flux.py has for every part of a fused projection (``oft_blocks.0``, …), as a sum of parts.

Where a group of a grouped convolution is not made of whole blocks, outputs do not turn as the weight does, and the
weight itself is turned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Options, scalar
from .boft import BOFT
from .compose import Sliced, Sum
from .lokr import split
from .rotations import BLOCKS, OutputRotation, cayley, skew

PIECES = tuple(f"{BLOCKS}.{n}" for n in range(4))  # q, k, v and the rest


class OFT(OutputRotation):
    """``oft_blocks`` (blocks, n, n), ``rescale`` (out, 1, …)."""

    name = "OFT"

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """Zeros, and ones to rescale. n is ``block_size`` or its cofactor, the smaller, or the next divisor below."""
        size, count = split(shape[0], options.block_size)
        if size == 1:  # nothing to rotate with; a prime number of outputs makes one block
            size, count = count, size
        if not 1 < size <= options.block_size:
            raise ValueError(f"block_size is {options.block_size}, no size of equal blocks for {shape[0]} outputs")
        return cls.fresh((count, size, size), shape, options)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Adapter:
        pieces = [parts[name] for name in PIECES if name in parts]
        if pieces and BLOCKS not in parts:
            return _pieces(pieces, scalar(parts), shape)
        if BLOCKS in parts and parts[BLOCKS].ndim == 4:
            return BOFT.read(parts, shape)
        return cls.fitting(parts, shape)

    def operators(self) -> Tensor:
        return cayley(skew(self.blocks, self.limit))[None]


def _pieces(pieces: Sequence[Tensor], alpha: float | None, shape: Sequence[int] | None) -> Adapter:
    """Every part of the outputs has blocks and a constraint of its own."""
    parts, start = [], 0
    for blocks in pieces:
        part = OFT({BLOCKS: blocks}, None, alpha or 0.0)
        parts.append(Sliced(part, start, part.outputs, shape))
        start += part.outputs
    if shape is not None and start != shape[0]:
        raise ValueError(f"{PIECES[0]} … {PIECES[len(pieces) - 1]} rotate {start} outputs, the layer has {shape[0]}")
    return Sum(parts)
