"""What every adapter is and can do, whatever its family.

* ``Adapter``: named tensors on one layer that turn its weight W into W' (and nothing else).
* ``Adapter.difference``: W' − W, dense, at full strength; everything about merging follows from it.
* ``Adapter.contribution``: what that difference adds to the layer's output, without building it where a family can.
* ``Adapter.on``: layer and adapter together, for training; families override it with fused kernels.
* ``Dropout``: network, rank and module dropout, drawn on the CPU from a seed.

One rule for strength, for every family: W(s) = W + s · (W' − W), a straight line from the base. Strength 0 is the base
to the last bit. (LyCORIS and the host square the strength of rotations, or scale a part of DoRA only.)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from .frozen import FrozenLayer, frozen
from .products import apply_weight, channel_dim


@dataclass(frozen=True)
class Options:
    """How a new adapter is made; a family reads what it knows (``registry.FAMILIES[…].options``) and no more."""

    rank: int = 16
    alpha: float = 16.0
    rank_stabilised: bool = False  # scale alpha / √rank (Kalajdzievski 2023, arXiv:2312.03732)
    tucker: bool = False  # k×k convolutions by a core of rank × rank × kernel
    factor: int = -1  # LoKr: how the dimensions are split; −1 as evenly as possible
    decompose_both: bool = False  # LoKr: also the left factor in low rank
    full_rank: bool = False  # LoKr: neither factor in low rank
    block_size: int = 32  # rotations: size of the blocks that rotate
    constraint: float = 0.0  # rotations: greatest deviation from the identity, 0 for none
    rescale: bool = False  # rotations: a learnt factor per output
    dora: str = ""  # "output" or "input": learn the norms along that axis apart (Liu et al. 2024, arXiv:2402.09353)
    unit: int = 1  # DyLoRA: ranks that are trained together
    on_input: bool = False  # (IA)³: scale inputs instead of outputs
    bias: bool = False  # full: learn a difference of the bias too; for layers that have one

    @property
    def scaling_alpha(self) -> float:
        """What alpha / rank is made of, with rank stabilisation in it, as LyCORIS keeps it in its files."""
        return self.alpha * (math.sqrt(self.rank) if self.rank_stabilised else 1)


@dataclass(frozen=True)
class Dropout:
    """Probabilities of leaving something out during training.

    ``network``: single numbers of the low-rank product, or of the branch where a family has none; ``rank``: whole
    ranks, or output channels, per sample; ``module``: the whole adapter. What stays is scaled by 1/(1 − p), except for
    ``module``, as in kohya's trainers.
    """

    network: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < 1:
                raise ValueError(f"{name}_dropout is {value!r}, expected 0 ≤ p < 1")

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def mask(self, shape: Sequence[int], channels: int, draws: torch.Generator) -> Tensor | None:
        """Factors for a product of ``shape``, samples first and ranks in dimension ``channels``; None if all stay."""
        mask = _keep(shape, self.network, draws) if self.network else None
        if self.rank:
            per_sample = [1] * len(shape)
            per_sample[0], per_sample[channels] = shape[0], shape[channels]
            ranks = _keep(per_sample, self.rank, draws)
            mask = ranks if mask is None else mask * ranks
        return mask


def _keep(shape: Sequence[int], probability: float, draws: torch.Generator) -> Tensor:
    return (torch.rand(tuple(shape), generator=draws) >= probability).float().div_(1 - probability)


class Adapter:
    """``tensors`` by the names they have in a LyCORIS or kohya file, ``alpha``, and the ``shape`` of W.

    Trained tensors stay in their own dtype (float32 in training); products run in the input's dtype. ``alpha`` is a
    plain number that is never trained; None where a family has none. ``shape`` is None only for adapters read without
    a target whose tensors do not tell it.

    A family defines ``create``, ``read``, ``difference``, ``contribution``, ``norm`` and, where there is something to
    gain, ``_on``.
    """

    name: ClassVar[str]  # in registry.FAMILIES
    fast_parts: ClassVar[frozenset[str]] = frozenset()  # LoRA+ (arXiv:2402.12354): those with the higher learning rate
    fixed_parts: ClassVar[frozenset[str]] = frozenset()  # used, saved, not trained
    factors: ClassVar[tuple[str, ...]] = ()  # ΔW is a product of these; ``limit_norm`` shrinks them all alike

    def __init__(self, tensors: Mapping[str, Tensor], shape: Sequence[int] | None, alpha: float | None = None) -> None:
        self.tensors = dict(tensors)
        self.shape = None if shape is None else tuple(shape)
        self.alpha = None if alpha is None else float(alpha)
        self.dropout = Dropout()
        self.seed: int | None = None  # of this step's dropout; None: nothing is left out

    # -- made and read

    @classmethod
    def create(cls, shape: Sequence[int], options: Options, draws: torch.Generator) -> Self:
        """A fresh adapter for a weight of ``shape`` with ΔW = 0."""
        raise NotImplementedError

    @classmethod
    def read(cls, parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> Adapter:
        """From a file's tensors by part name. Raises ValueError saying what does not fit ``shape`` or is missing."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """What ``read`` reads: contiguous copies on the CPU, alpha as a tensor."""
        state = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in self.tensors.items()}
        if self.alpha is not None:
            state["alpha"] = torch.tensor(self.alpha)
        return state

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        """The same adapter with other values in all its tensors."""
        other = copy.copy(self)
        other.tensors = {name: tensors[name] for name in self.tensors}
        return other

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        return self.with_tensors({name: tensor.to(device, dtype) for name, tensor in self.tensors.items()})

    # -- the mathematics

    def difference(self, weight: Tensor) -> Tensor:
        """W' − W for W = ``weight``, in its shape; float32 or wider."""
        raise NotImplementedError

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        """(W' − W) x for a layer whose output on ``x`` is ``base_out`` (its bias included); differentiable."""
        raise NotImplementedError

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """W + strength · (W' − W) in ``weight``'s dtype and shape; a new tensor, at strength 0 equal to W."""
        if strength == 0:
            return weight.clone()
        base = wide(weight)
        return (base + strength * self.difference(base)).to(weight.dtype)

    def added_to(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """``merged`` into a ``weight`` of float32 or wider that is the caller's to overwrite."""
        return weight.add_(self.difference(weight), alpha=strength)

    def merged_bias(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """b + strength · (b' − b); most families leave the bias alone."""
        return None if bias is None else bias.clone()

    def branch(self, x: Tensor, base_out: Tensor, layer: FrozenLayer, strength: float = 1.0) -> Tensor:
        """What the layer gives with the adapter at ``strength``, from what it gives without; differentiable."""
        if strength == 0:
            return base_out
        return base_out + strength * self.contribution(x, base_out, layer)

    # -- training

    def on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        """Layer and adapter at full strength, with dropout where a ``seed`` is set; differentiable in x and tensors.

        Called again with the same seed it leaves out the same, so a checkpointed block may run twice.
        """
        if self.seed is None or not self.dropout:
            return self._on(x, layer)
        draws = torch.Generator().manual_seed(self.seed)
        if torch.rand((), generator=draws).item() < self.dropout.module:
            return frozen(x, layer)
        return self._on_with_dropout(x, layer, draws)

    def _on(self, x: Tensor, layer: FrozenLayer) -> Tensor:
        return self.branch(x, frozen(x, layer), layer)

    def _on_with_dropout(self, x: Tensor, layer: FrozenLayer, draws: torch.Generator) -> Tensor:
        base = frozen(x, layer)
        extra = self.contribution(x, base, layer)
        mask = self.dropout.mask(extra.shape, channel_dim(layer.geometry), draws)
        return base + (extra if mask is None else extra * mask.to(extra.device, extra.dtype))

    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [tensor for name, tensor in self.tensors.items() if name not in self.fixed_parts]

    def fast_parameters(self) -> list[Tensor]:
        """Those among ``parameters`` that LoRA+ gives the higher learning rate."""
        return [tensor for name, tensor in self.tensors.items() if name in self.fast_parts]

    def norm(self) -> Tensor:
        """‖ΔW‖ (Frobenius), of rotations ‖Q‖; a scalar."""
        raise NotImplementedError

    def limit_norm(self, maximum: float) -> bool:
        """Shrink ΔW in place to ‖ΔW‖ ≤ ``maximum``; whether that was needed (kohya's scale_weight_norms)."""
        norm = self.norm().item()
        if norm <= maximum:
            return False
        ratio = (maximum / norm) ** (1 / len(self.factors))
        with torch.no_grad():
            for name in self.factors:
                self.tensors[name].mul_(ratio)
        return True


class Additive(Adapter):
    """A family whose ΔW does not depend on W: it defines ``delta``, and the rest follows (slowly) from that."""

    def delta(self) -> Tensor:
        """ΔW in ``shape`` (or, with no shape known, as the tensors have it), differentiable."""
        raise NotImplementedError

    def difference(self, weight: Tensor) -> Tensor:
        delta = wide(self.delta()).to(weight.device)
        if delta.numel() != weight.numel() or len(delta) != len(weight):
            raise ValueError(f"this adapter is made for a weight of {tuple(delta.shape)}, not {tuple(weight.shape)}")
        return delta.reshape(weight.shape)

    def contribution(self, x: Tensor, base_out: Tensor, layer: FrozenLayer) -> Tensor:
        return apply_weight(x, self.delta().to(x.dtype), layer.geometry)

    def moved_rows(self, weight: Tensor) -> Iterator[Tensor]:
        """W + ΔW as pieces of rows (n, in · kernel), float32 or wider, the caller's to overwrite; for norms.

        A family that can make a few rows at a time overrides it, so that the whole is never in memory.
        """
        yield (wide(weight) + self.difference(weight)).flatten(1)

    def norm(self) -> Tensor:
        return self.delta().norm()


def low_rank_scale(alpha: float | None, rank: int) -> float:
    """alpha / rank; 1 where alpha is missing, zero (kohya: "0 means rank") or infinite (an overflow in some files)."""
    return alpha / rank if alpha and math.isfinite(alpha) else 1.0


def scalar(parts: Mapping[str, Tensor], name: str = "alpha") -> float | None:
    """A number stored as a tensor of one element; None when absent. Raises ValueError for any other tensor."""
    if name not in parts:
        return None
    if parts[name].numel() != 1:
        raise ValueError(f"{name} holds {parts[name].numel()} numbers instead of one")
    return float(parts[name])


def kaiming(shape: Sequence[int], draws: torch.Generator) -> Tensor:
    """U(−1/√fan_in, 1/√fan_in) in float32, what ``torch.nn.init.kaiming_uniform_(a=√5)`` draws from."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    uniform = torch.rand(tuple(shape), generator=draws, dtype=torch.float64)
    return ((2 * uniform - 1) * bound).float()


def fitted(tensor: Tensor, shape: Sequence[int], name: str) -> Tensor:
    """``tensor`` in ``shape`` where only dimensions of one differ. Raises ValueError naming it otherwise."""
    if tensor.shape == tuple(shape):
        return tensor
    given, wanted = ([size for size in sizes[2:] if size != 1] for sizes in (tensor.shape, shape))
    if tensor.shape[:2] != tuple(shape[:2]) or given != wanted:
        raise ValueError(f"{name} is {tuple(tensor.shape)}, the layer needs {tuple(shape)}")
    return tensor.reshape(tuple(shape))


def wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    if tensor.dtype.itemsize == 1:  # torch knows no common type of float8 and others
        return tensor.float()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
