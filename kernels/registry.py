"""The adapter families, in one table.

Dropdowns, tooltips, the help pages, the file reader and the test matrix are made from ``FAMILIES``.

* ``read_adapter``: from one layer's tensors in a file to the adapter they are, whatever the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, Options
from .compose import Sum
from .lora import DOWN, MID, UP, DyLoRA, LoRA, LoRAFA

LAYERS = frozenset({"linear", "conv"})


@dataclass(frozen=True)
class Family:
    """One row. ``options`` are the fields of ``Options`` that it reads.

    ``parts`` are the names its tensors have in files behind the layer's name; any of ``marks`` among a layer's tensors
    makes it this family (empty where a file cannot tell it from another one). ``dora``: its norms can be learnt apart.
    """

    adapter: type[Adapter]
    label: str
    description: str
    reference: str
    layers: frozenset[str] = LAYERS
    options: frozenset[str] = frozenset()
    parts: frozenset[str] = frozenset()
    marks: frozenset[str] = frozenset()
    trainable: bool = True
    dora: bool = False


_LOW_RANK = frozenset({"rank", "alpha", "rank_stabilised", "tucker"})
_PAIR = frozenset({DOWN, UP, MID, "alpha"})

FAMILIES: dict[str, Family] = {
    family.adapter.name: family
    for family in (
        Family(
            LoRA,
            "LoRA / LoCon",
            "Two narrow factors per layer; on k×k convolutions the first carries the kernel. The usual choice.",
            "Hu et al. 2021, arXiv:2106.09685",
            options=_LOW_RANK | {"dora"},
            parts=_PAIR,
            marks=frozenset({DOWN, UP, MID}),
            dora=True,
        ),
        Family(
            DyLoRA,
            "DyLoRA",
            "A LoRA of which every first part works on its own: the file can be cut to a smaller rank later.",
            "Valipour et al. 2022, arXiv:2210.07558",
            options=_LOW_RANK | {"unit"},
            parts=_PAIR,
        ),
        Family(
            LoRAFA,
            "LoRA-FA",
            "A LoRA whose first factor stays random: half the trained numbers, far less memory for activations.",
            "Zhang et al. 2023, arXiv:2308.03303",
            options=_LOW_RANK,
            parts=_PAIR,
        ),
    )
}


def read_adapter(parts: Mapping[str, Tensor], shape: Sequence[int] | None) -> tuple[Adapter, frozenset[str]]:
    """The adapter that a layer's tensors are, and the names of those that belong to none.

    Tensors of several families on one layer add up. Raises ValueError where nothing is recognised, or saying what is
    missing or does not fit a weight of ``shape``.
    """
    found = [family for family in FAMILIES.values() if family.marks & parts.keys()]
    if not found:
        raise ValueError(f"no adapter family is known by {', '.join(sorted(parts))}")
    adapters = [
        family.adapter.read({name: tensor for name, tensor in parts.items() if name in family.parts}, shape)
        for family in found
    ]
    used = frozenset().union(*(family.parts for family in found))
    return adapters[0] if len(adapters) == 1 else Sum(adapters), frozenset(parts) - used


def make_adapter(
    family: str, shape: Sequence[int], options: Options, draws: torch.Generator, weight: Tensor | None = None
) -> Adapter:
    """A fresh adapter of ``family`` with ΔW = 0 for a weight of ``shape``.

    ``weight`` itself is needed with ``options.dora`` only, whose norms start as the weight's. Raises ValueError for an
    unknown family.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no adapter family {family!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[family].adapter.create(shape, options, draws)
