"""BOFT on linear layers and convolutions: several block-diagonal rotations, interleaved like a butterfly.

* ``BOFT``: W' = rescale ∘ (Bₘ₋₁ … B₀ W) (Liu et al. 2023, arXiv:2311.06243; LyCORIS' modules/boft.py). A block of
  stage i takes n/2 neighbouring outputs and the n/2 that are 2ⁱ·n/2 further on, so that m stages mix 2ᵐ⁻¹ blocks.
  ``alpha`` and ``rescale`` as in ``oft.OFT``. Trained fused with the frozen layer, several stages at once; what went
  into them is found again in backward from the one output that is kept.
* ``PeftBOFT``: PEFT's files, applied only: W' = s ∘ (W Mᵀ), M = Bₘ₋₁ … B₀ over the weight's inputs (of convolutions
  over in·kernel), with another sign and half the angle. ``boft_R`` (m, blocks, n, n), ``boft_s`` (out, 1) or (1, out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, Options, wide
from .dense import dense_contribution
from .frozen import FrozenLayer, frozen
from .rotations import OutputRotation, cayley, skew, turn, turn_back

PEFT_R, PEFT_S = "boft_R", "boft_s"


class BOFT(OutputRotation):
    """``oft_blocks`` (stages, blocks, n, n), ``rescale`` (out, 1, …)."""

    name = "BOFT"

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """Zeros, and ones to rescale; as many stages as it takes for every output to meet every other."""
        size, count = butterfly(shape[0], options.block_size)
        return cls.fresh((count.bit_length(), count, size, size), shape, options)

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Adapter:
        if PEFT_R in parts or PEFT_S in parts:
            return PeftBOFT.read(parts, shape)
        adapter = cls.fitting(parts, shape)
        _check_stages(adapter.blocks, paired=True)
        return adapter

    def operators(self) -> Tensor:
        """LyCORIS orders a block by pairs of channels, one near, one far; and turns columns, y = B y."""
        r = cayley(skew(self.blocks, self.limit))
        *stages, n, _ = r.shape
        return r.reshape(*stages, n // 2, 2, n // 2, 2).permute(0, 1, 5, 4, 3, 2).reshape(r.shape)


class PeftBOFT(Adapter):
    """``boft_R`` and ``boft_s`` as PEFT 0.21 uses them (tuners/boft/layer.py)."""

    name = "BOFT"

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        if missing := {PEFT_R, PEFT_S} - parts.keys():
            raise ValueError(f"{missing.pop()} is missing")
        blocks, scale = parts[PEFT_R], parts[PEFT_S]
        _check_stages(blocks)
        if shape is not None:
            outputs, inputs = shape[0], torch.Size(shape[1:]).numel()
            turned = blocks.shape[1] * blocks.shape[3]
            if (scale.numel(), turned) != (outputs, inputs):
                raise ValueError(
                    f"{PEFT_R} and {PEFT_S} are for {turned} inputs and {scale.numel()} outputs, "
                    f"the layer has {inputs} and {outputs}"
                )
        return cls({PEFT_R: blocks, PEFT_S: scale}, shape)

    def operators(self) -> Tensor:
        """Those of Mᵀ, by rows."""
        return cayley(skew(self.tensors[PEFT_R]) / 2)

    def difference(self, weight: Tensor) -> Tensor:
        base = wide(weight)
        turned = turn(base.flatten(1), self.operators().to(base), False)
        scaled = turned * self.tensors[PEFT_S].to(base).view(-1, 1)
        return scaled.view(base.shape) - base

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        if layer.geometry is not None:
            return dense_contribution(self, x, layer)
        bias = layer.bias(base_out)
        turned = frozen(turn_back(x, self.operators().to(x.dtype), False), layer)
        scale = self.tensors[PEFT_S].to(turned.dtype).flatten()
        if bias is not None:
            turned, base_out = turned - bias, base_out - bias
        return turned * scale - base_out

    def norm(self) -> Tensor:
        """‖Q‖."""
        return skew(self.tensors[PEFT_R]).norm() / 2


def butterfly(dimension: int, largest: int) -> tuple[int, int]:
    """(n, blocks): the greatest even n ≤ ``largest`` that makes a power of two of blocks. Raises ValueError if none."""
    for size in range(largest - largest % 2, 0, -2):
        count, rest = divmod(dimension, size)
        if not rest and count & (count - 1) == 0:
            return size, count
    odd = dimension // (dimension & -dimension)
    cure = f"{2 * odd} or more would do" if dimension % 2 == 0 else "an odd number never does"
    raise ValueError(f"block_size is {largest}, but {dimension} outputs make no power of two of such blocks: {cure}")


def _check_stages(blocks: Tensor, paired: bool = False) -> None:
    """Raises ValueError if (stages, blocks, n, n) are no butterfly; ``paired``: not even a single stage of odd n."""
    stages, count, n, m = blocks.shape if blocks.ndim == 4 else (0, 0, 0, 0)
    if not stages or n != m or count % (1 << (stages - 1)) or (n % 2 and (paired or stages > 1)):
        raise ValueError(f"blocks of {tuple(blocks.shape)} are no butterfly (stages, blocks, n, n)")
