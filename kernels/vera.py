"""VeRA: two random matrices shared by all layers, two vectors of each layer's own.

* ``VeRA``: W' = W + diag(λ_b) · B · diag(λ_d) · A (Kopiczko et al. 2023, arXiv:2310.11454, as in PEFT's tuners/vera). A
  (rank, in) and B (out, rank) are as large as the widest layer needs and every layer uses their first columns and rows.
  Applied, not trained. There is no alpha.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from typing_extensions import Self

from .adapter import Additive, wide
from .frozen import FrozenLayer
from .products import mix

LAMBDA_B, LAMBDA_D, A, B = PARTS = ("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B")


class VeRA(Additive):
    """λ_b (out,), λ_d (rank,), A (rank, ≥ in), B (≥ out, rank), on linear layers and 1×1 convolutions.

    How many columns of A are used is the layer's affair: with no shape known, ``shape`` stays unknown.
    """

    name = "VeRA"
    fixed_parts = frozenset({A, B})

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Self:
        """``parts`` hold the shared A and B too, which PEFT leaves out of files with save_projection=False."""
        missing = [name for name in PARTS if name not in parts]
        if missing:
            shared = " (shared by all layers, PEFT saves them with save_projection)" if {A, B} & {*missing} else ""
            raise ValueError(f"{', '.join(missing)} missing{shared}")
        lambda_b, lambda_d, a, b = (parts[name] for name in PARTS)
        outputs, rank = lambda_b.numel(), lambda_d.numel()
        if len(a) != rank or b.ndim != 2 or b.shape[1] != rank or len(b) < outputs:
            given = f"{A} {tuple(a.shape)}, {B} {tuple(b.shape)}"
            raise ValueError(f"{given} do not serve a layer of {outputs} outputs at rank {rank}")
        if shape is not None:
            if len(shape) < 2 or shape[0] != outputs or shape[1] > a.shape[1] or any(size != 1 for size in shape[2:]):
                wanted = f"{outputs} outputs and at most {a.shape[1]} inputs"
                raise ValueError(f"this adapter is made for {wanted}, not for a weight of {tuple(shape)}")
            a = a[:, : shape[1]]
        return cls({LAMBDA_B: lambda_b.flatten(), LAMBDA_D: lambda_d.flatten(), A: a, B: b[:outputs]}, shape)

    def delta(self) -> Tensor:
        """(out, in), of as many inputs as A has."""
        lambda_b, lambda_d, a, b = (wide(self.tensors[name]) for name in PARTS)
        return (lambda_b[:, None] * b) @ (lambda_d[:, None] * a)

    def difference(self, weight: Tensor) -> Tensor:
        narrow = self.with_tensors({**self.tensors, A: self.tensors[A][:, : weight.shape[1]]})
        return super(VeRA, narrow).difference(weight)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        geometry = layer.geometry
        lambda_b, lambda_d, a, b = (self.tensors[name].to(x.dtype) for name in PARTS)
        channels = x.shape[-1 if geometry is None else 1]
        hidden = mix(x, lambda_d[:, None] * a[:, :channels], geometry)
        return mix(hidden, lambda_b[:, None] * b, geometry)
