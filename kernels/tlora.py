"""T-LoRA: a low-rank adapter that starts from the weight's own singular vectors.

* ``TLoRA``: W' = W + (alpha / rank) · (P diag(λ) Q − P₀ diag(λ₀) Q₀) (Soboleva et al. 2025, arXiv:2507.05964, as in
  ``lycoris/modules/tlora.py``). P₀, λ₀, Q₀ are the greatest singular vectors and values of W itself. Files leave them
  out, so they are computed again from the weight. Applied, not trained.

Files do not tell whether training started from the greatest singular vectors, from others or from those of a random
matrix; the greatest are LyCORIS' default and what its own loader takes. The mask that limits ranks by timestep belongs
to training; LyCORIS applies all ranks at all timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from typing_extensions import Self

from .adapter import Adapter, fitted, low_rank_scale, scalar, wide
from .frozen import FrozenLayer
from .products import mix

Q, P, LAMBDA = PARTS = ("q_layer.weight", "p_layer.weight", "lambda_layer")


class TLoRA(Adapter):
    """Q (rank, in[, 1, 1]), P (out, rank[, 1, 1]), λ (1, rank), on linear layers and 1×1 convolutions.

    LyCORIS cannot run what it makes for k×k convolutions, so there are no files with such layers.
    """

    name = "T-LoRA"
    alpha: float

    def __init__(self, tensors: Mapping[str, Tensor], shape: Sequence[int], alpha: float) -> None:
        super().__init__(tensors, shape, alpha)
        # (what the weight was recognised by, its own factors) of the last weight
        self._known: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        missing = [name for name in PARTS if name not in parts]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        q, p, singular = (parts[name] for name in PARTS)
        rank = singular.numel()
        if shape is None:
            shape = (len(p), q.shape[1], *q.shape[2:])
        if any(size != 1 for size in shape[2:]):
            raise ValueError(f"T-LoRA is for linear layers and 1×1 convolutions, not for a weight of {tuple(shape)}")
        ones = [1] * len(shape[2:])
        q, p = fitted(q, (rank, shape[1], *ones), Q), fitted(p, (shape[0], rank, *ones), P)
        alpha = scalar(parts)
        return cls({Q: q, P: p, LAMBDA: singular.reshape(1, rank)}, shape, rank if alpha is None else alpha)

    @property
    def rank(self) -> int:
        return self.tensors[LAMBDA].numel()

    @property
    def scale(self) -> float:
        return low_rank_scale(self.alpha, self.rank)

    def _factors(self) -> tuple[Tensor, Tensor]:
        """s P diag(λ) (out, rank), Q (rank, in)."""
        q, p, singular = (wide(self.tensors[name]).flatten(1) for name in PARTS)
        return self.scale * p * singular, q

    def _base_factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """s P₀ diag(λ₀) (out, rank), Q₀ (rank, in) of W; not differentiable.

        The decomposition takes longer than many steps of the model. It is done again when the weight's product with a
        fixed vector differs in any bit, for a layer on loan may have got another weight.
        """
        with torch.no_grad():
            matrix = wide(weight).flatten(1)
            steps = torch.arange(1, matrix.shape[1] + 1, device=matrix.device, dtype=matrix.dtype)
            mark = matrix @ steps.cos()
            if self._known is None or not _same(self._known[0], mark):
                p, singular, q = torch.linalg.svd(matrix, full_matrices=False)
                rank = self.rank
                self._known = mark, (self.scale * p[:, :rank] * singular[:rank], q[:rank].contiguous())
            return self._known[1]

    def difference(self, weight: Tensor) -> Tensor:
        assert self.shape is not None
        if tuple(weight.shape[:2]) != self.shape[:2] or weight[0].numel() != self.shape[1]:
            raise ValueError(f"this adapter is made for a weight of {self.shape}, not {tuple(weight.shape)}")
        p, q = (tensor.to(weight.device) for tensor in self._factors())
        base_p, base_q = self._base_factors(weight)
        return (p @ q - base_p @ base_q).view(weight.shape)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        """In float32: of two products about as large as the layer's own output only the difference counts."""
        with layer.weight(x) as weight:
            base_p, base_q = self._base_factors(weight)
        p, q = self._factors()
        hidden = mix(wide(x), torch.cat([q.to(x.device), base_q]), layer.geometry)
        return mix(hidden, torch.cat([p.to(x.device), -base_p], 1), layer.geometry).to(x.dtype)


def _same(known: Tensor, mark: Tensor) -> bool:
    return known.dtype == mark.dtype and known.device == mark.device and torch.equal(known, mark)
