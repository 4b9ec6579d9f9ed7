"""What each layer of an adapter file is, and how much it does.

* ``Layer``: family, rank, alpha, precision, ‖ΔW‖, effective rank; ``measured``: an adapter → its ``Layer``.
* ``component_of``: the part of a model that a layer belongs to.

Singular values come from the factors of what is of low rank and from the halves of Kronecker products; nothing dense is
made for these. A dense difference is decomposed up to ``SIDE``, beyond that only its norm is taken. What depends on the
weight is measured where the weight is given, and only then. Nothing here raises for strange numbers: what cannot be
measured is None.

The effective rank is that of Roy and Vetterli (2007): exp of the entropy of pᵢ = Sᵢ² / ΣS², k for k equal values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter, Additive, wide
from ..architectures import encoder_prefix
from ..branches import needs_weight
from ..compose import Sum, Wrapper
from ..dora import DoRA
from ..loha import LoHa
from ..lokr import LoKr
from ..lora import LoRA
from ..low_rank import Cut, changes_bias_only, factors_of, spectrum
from ..rotations import OutputRotation
from ..strengths.components import UNET

SIDE = 1024  # the smaller one of a dense difference whose singular values are computed; a second takes far more
LARGEST = 2**27  # numbers of the largest tensor that is made to measure anything
MOST = 0.99  # of the energy: so many ranks do nearly all
_TEXT = {"text_encoder": "te1", "text_encoder_2": "te2", "text_encoder_3": "te3", "lora_prior_te": "te1"}


@dataclass(frozen=True)
class Layer:
    """``path`` as the file or the model calls it; ``block`` its id, "" for none.

    ``norm``: ‖ΔW‖, of layers that change their bias alone ‖Δb‖; None where it depends on a weight that is not given.
    ``own``, of layers that depend on it: the size of what is learnt itself (``Adapter.norm``: of rotations ‖Q‖, of DoRA
    that of ΔW without the norms). ``ranks``: how many do ``MOST`` of ‖ΔW‖².
    """

    path: str
    component: str
    block: str
    family: str
    shape: tuple[int, ...] | None
    rank: int | None
    alpha: float | None
    dtype: str
    numbers: int
    norm: float | None = None
    own: float | None = None
    effective_rank: float | None = None
    ranks: int | None = None

    @property
    def scale(self) -> float | None:
        """alpha / rank."""
        return None if self.alpha is None or not self.rank else self.alpha / self.rank

    @property
    def idle(self) -> bool:
        """Whether it does nothing at all."""
        return self.norm == 0 or (self.norm is None and self.own == 0 and "DoRA" not in self.family)


def measured(path: str, adapter: Adapter, block: str = "", weight: Callable[[str], Tensor] | None = None) -> Layer:
    first = next(iter(adapter.tensors.values()))
    layer = Layer(
        path,
        component_of(path),
        block,
        family_of(adapter),
        adapter.shape,
        rank_of(adapter),
        _alpha_of(adapter),
        str(first.dtype).removeprefix("torch."),
        sum(tensor.numel() for tensor in adapter.tensors.values()),
    )
    own = None
    if needs_weight(adapter):
        own = _finite(_own(adapter))
        if weight is None:
            return Layer(**vars(layer) | {"own": own})
    try:
        norm, values = _size(path, adapter, weight)
        norm, values = (_bias_of(adapter), None) if norm == 0 else (norm, values)
    except (ValueError, RuntimeError):  # of numbers that overflow, of factors that do not go together
        return Layer(**vars(layer) | {"own": own})
    norm, effective, ranks = _finite(norm), None, None
    if values is not None and norm:
        shares = values.double().square() / values.double().square().sum()
        effective = _finite(torch.exp(torch.special.entr(shares).sum()).item())
        ranks = Cut(energy=MOST).of(values)
    return Layer(**vars(layer) | {"norm": norm, "own": own, "effective_rank": effective, "ranks": ranks})


def component_of(path: str) -> str:
    """ "unet" for the diffusion model, "te1" or the encoder's own name for text encoders."""
    prefix = encoder_prefix(path).removeprefix("base_model.model.").rstrip("._")
    if not prefix:
        return UNET
    if prefix == "text_encoders":
        return path.removeprefix("text_encoders.").partition(".")[0][:60]
    if prefix in _TEXT:
        return _TEXT[prefix]
    short = prefix.removeprefix("lora_").removeprefix("lycoris_")
    return {"te": "te1", "text_model": "te1"}.get(short, short)


def family_of(adapter: Adapter) -> str:
    """For people: "LoRA", "LoHa with DoRA norms", "LoRA + full"."""
    if isinstance(adapter, Sum):
        return " + ".join(dict.fromkeys(map(family_of, adapter.parts)))
    if isinstance(adapter, Wrapper):
        return family_of(adapter.inner)
    return f"{adapter.inner.name} with DoRA norms" if isinstance(adapter, DoRA) else adapter.name


def rank_of(adapter: Adapter) -> int | None:
    """That of its factors, None for families without one; of several adapters the sum."""
    if isinstance(adapter, Sum):
        ranks = [rank for rank in map(rank_of, adapter.parts) if rank is not None]
        return sum(ranks) if ranks else None
    if isinstance(adapter, Wrapper | DoRA):
        return rank_of(adapter.inner)
    if isinstance(adapter, LoKr):
        return next(
            (len(adapter.tensors[half]) for half in ("lokr_w2_b", "lokr_w1_b") if half in adapter.tensors), None
        )
    return getattr(adapter, "rank", None)


def _alpha_of(adapter: Adapter) -> float | None:
    """None where nothing is scaled by it; of several adapters that of the first that has one."""
    if isinstance(adapter, Sum):
        return next((alpha for alpha in map(_alpha_of, adapter.parts) if alpha is not None), None)
    if isinstance(adapter, Wrapper):
        return _alpha_of(adapter.inner)
    return None if isinstance(adapter, LoKr) and rank_of(adapter) is None else adapter.alpha


def _size(path: str, adapter: Adapter, weight: Callable[[str], Tensor] | None) -> tuple[float | None, Tensor | None]:
    """(‖ΔW‖, singular values where they are known). Nothing of a layer that changes its bias alone."""
    if needs_weight(adapter):
        assert weight is not None
        return _of_dense(adapter.difference(weight(path)).detach())
    if changes_bias_only(adapter):
        return 0.0, None
    if isinstance(adapter, Wrapper):  # other rows, or none beside
        return _size(path, adapter.inner, None)
    if _numbers(adapter) > LARGEST:
        return None, None
    if isinstance(adapter, LoKr):
        values = _of_kronecker(adapter)
        return values.norm().item(), values
    low = factors_of(adapter)
    if low is not None:
        values = spectrum(low)
        return values.double().norm().item(), values
    if isinstance(adapter, Additive):
        return _of_dense(adapter.delta().detach())
    if adapter.shape is None:
        return None, None
    return _of_dense(adapter.difference(torch.zeros(()).expand(adapter.shape)).detach())


def _bias_of(adapter: Adapter) -> float:
    bias = adapter.merged_bias(None)
    return 0.0 if bias is None else bias.double().norm().item()


def _of_dense(delta: Tensor) -> tuple[float, Tensor | None]:
    matrix = wide(delta).flatten(1) if delta.ndim > 1 else delta[None]
    norm = matrix.double().norm().item()
    known = delta.ndim > 1 and min(matrix.shape) <= SIDE and math.isfinite(norm)
    return norm, _values(matrix) if known else None


def _values(matrix: Tensor) -> Tensor:
    """Singular values from the smaller Gram matrix: to 3e-4 of the first in float32, in a tenth of the time."""
    gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def _of_kronecker(adapter: LoKr) -> Tensor:
    """Every product of a singular value of w1 with one of w2."""
    w1, outer, low = adapter.halves()
    w2 = outer if low is None else outer @ low
    one, two = (torch.linalg.svdvals(half.double()) for half in (w1, w2))
    return (abs(adapter.scale) * one[:, None] * two).flatten().sort(descending=True).values


def _own(adapter: Adapter) -> float | None:
    """The size of what is learnt, whatever the weight; of several that depend on it the first's."""
    if isinstance(adapter, Sum):
        return next((_own(part) for part in adapter.parts if needs_weight(part)), None)
    if isinstance(adapter, Wrapper):
        return _own(adapter.inner)
    try:
        if isinstance(adapter, DoRA):
            return _size("", adapter.inner, None)[0]
        rescale = adapter.rescale if isinstance(adapter, OutputRotation) else None
        return math.hypot(adapter.norm().item(), 0.0 if rescale is None else (wide(rescale) - 1).norm().item())
    except (NotImplementedError, ValueError, RuntimeError):  # a family without a norm, factors that do not fit
        return None


def _numbers(adapter: Adapter) -> int:
    """Of the largest tensor that is made of it: small factors of a strange file may have a product of gigabytes."""
    if isinstance(adapter, Sum):
        return sum(map(_numbers, adapter.parts))
    if isinstance(adapter, Wrapper):
        return _numbers(adapter.inner)
    if isinstance(adapter, LoKr):
        w1, outer, low = adapter.to("meta").halves()  # sizes alone
        ranks, columns = (0, outer.shape[1]) if low is None else (min(w1.shape) * len(low), low.shape[1])
        sides = len(w1) * len(outer) + w1.shape[1] * columns
        return max(w1.numel(), len(outer) * columns, min(ranks * sides, w1.numel() * len(outer) * columns))
    shape = adapter.shape
    if shape is None and isinstance(adapter, LoHa):
        shape = (len(adapter.tensors["hada_w1_a"]), adapter.tensors["hada_w1_b"].shape[1])
    if shape is None or len(shape) < 2:
        return sum(tensor.numel() for tensor in adapter.tensors.values())
    size, sides = math.prod(shape), shape[0] + math.prod(shape[1:])
    rank = rank_of(adapter)
    if isinstance(adapter, LoRA) and rank is not None:
        return rank * sides
    if isinstance(adapter, LoHa) and rank is not None:
        return min(rank**2 * sides, size) if rank**2 < min(shape[0], size // shape[0]) else size
    return size


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
