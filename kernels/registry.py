"""The adapter families, in one table.

Dropdowns, tooltips, the help pages, the file reader and the test matrix are made from ``FAMILIES``.

* ``read_adapter``: from one layer's tensors in a file to the adapter they are, whatever the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapter import Adapter, Additive, Options
from .boft import BOFT, PEFT_R, PEFT_S
from .compose import Sum
from .dora import PARTS as NORMS
from .dora import DoRA, attached
from .full import BIASES, WEIGHTS, Full
from .glora import PARTS as GLORA
from .glora import GLoRA
from .ia3 import IA3, ON_INPUT, PEFT, WEIGHT
from .loha import PARTS as LOHA
from .loha import LoHa
from .lokr import PARTS as LOKR
from .lokr import LoKr
from .lora import DOWN, MID, UP, DyLoRA, LoRA, LoRAFA
from .oft import OFT, PIECES
from .oftv2 import SCALED, OFTv2
from .oftv2 import WEIGHT as OFT_R
from .rotations import BLOCKS, RESCALE
from .tlora import PARTS as TLORA
from .tlora import TLoRA
from .vera import LAMBDA_B, LAMBDA_D, VeRA
from .vera import PARTS as VERA

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
_ROTATION = frozenset({"block_size", "constraint", "rescale"})
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
        Family(
            LoHa,
            "LoHa",
            "The elementwise product of two low-rank matrices: rank² with the numbers of two LoRAs. Costs more time.",
            "Hyeon-Woo et al. 2021, arXiv:2108.06098",
            options=_LOW_RANK | {"dora"},
            parts=frozenset({*LOHA, "alpha"}),
            marks=frozenset(LOHA),
            dora=True,
        ),
        Family(
            LoKr,
            "LoKr",
            "A Kronecker product of a small matrix and a larger one: of high rank, in small files.",
            "Edalati et al. 2022, arXiv:2212.10650; LyCORIS, Yeh et al. 2023, arXiv:2309.14859",
            options=_LOW_RANK | {"factor", "decompose_both", "full_rank", "dora"},
            parts=frozenset({*LOKR, "alpha"}),
            marks=frozenset(LOKR),
            dora=True,
        ),
        Family(
            Full,
            "Full difference",
            "The whole difference of a weight, as many numbers as the weight has. Also of biases and norm layers.",
            "LyCORIS, modules/full.py and modules/norms.py",
            options=frozenset({"bias"}),
            parts=frozenset({*WEIGHTS, *BIASES}),
            marks=frozenset({*WEIGHTS, *BIASES}),
        ),
        Family(
            OFT,
            "Diag-OFT",
            "Rotates the outputs in blocks and leaves their angles to each other as they are. Keeps more of the base.",
            "Qiu et al. 2023, arXiv:2306.07280",
            options=_ROTATION,
            parts=frozenset({BLOCKS, RESCALE, *PIECES, "alpha"}),
            marks=frozenset({BLOCKS, *PIECES}),
        ),
        Family(
            BOFT,
            "BOFT",
            "Several rotations, interleaved like a butterfly, so that every output meets every other. Costs more time.",
            "Liu et al. 2023, arXiv:2311.06243",
            options=_ROTATION,
            # the tensors of LyCORIS' files have the names of OFT's
            parts=frozenset({PEFT_R, PEFT_S}),
            marks=frozenset({PEFT_R, PEFT_S}),
        ),
        Family(
            OFTv2,
            "OFTv2",
            "Rotates the inputs in blocks, as PEFT and OneTrainer do it. Few numbers, cheap to train.",
            "Qiu et al. 2025, arXiv:2506.19847",
            options=frozenset({"block_size"}),
            parts=frozenset({OFT_R, SCALED}),
            marks=frozenset({OFT_R}),
        ),
        Family(
            IA3,
            "(IA)³",
            "One factor for every output or input of a layer: the smallest files there are.",
            "Liu et al. 2022, arXiv:2205.05638",
            options=frozenset({"on_input"}),
            parts=frozenset({WEIGHT, ON_INPUT, PEFT}),
            marks=frozenset({ON_INPUT, PEFT}),
        ),
        Family(
            GLoRA,
            "GLoRA",
            "A low-rank change of the weight and one of what goes into it: two LoRAs per layer.",
            "Chavan et al. 2023, arXiv:2306.07967",
            options=frozenset({"rank", "alpha", "rank_stabilised"}),
            parts=frozenset({*GLORA, "alpha"}),
            marks=frozenset(GLORA),
        ),
        Family(
            VeRA,
            "VeRA",
            "Two vectors per layer between two random matrices that all layers share.",
            "Kopiczko et al. 2023, arXiv:2310.11454",
            layers=frozenset({"linear"}),
            parts=frozenset(VERA),
            marks=frozenset({LAMBDA_B, LAMBDA_D}),
            trainable=False,
        ),
        Family(
            TLoRA,
            "T-LoRA",
            "A low-rank adapter that starts from the weight's own singular vectors.",
            "Soboleva et al. 2025, arXiv:2507.05964",
            layers=frozenset({"linear"}),
            parts=frozenset({*TLORA, "alpha"}),
            marks=frozenset(TLORA),
            trainable=False,
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
    norms = [name for name in NORMS if name in parts]
    directions = [index for index, family in enumerate(found) if family.dora]
    if norms and directions:
        if len(norms) > 1 or len(directions) > 1:
            labels = ", ".join(found[index].label for index in directions)
            raise ValueError(f"{' and '.join(norms)} cannot be the norms of {labels} together")
        inner = adapters[directions[0]]
        assert isinstance(inner, Additive)
        adapters[directions[0]] = attached(inner, norms[0], parts[norms[0]], shape)
        used |= {norms[0]}
    return adapters[0] if len(adapters) == 1 else Sum(adapters), frozenset(parts) - used


def make_adapter(
    family: str, shape: Sequence[int], options: Options, draws: torch.Generator, weight: Tensor | None = None
) -> Adapter:
    """A fresh adapter of ``family`` with ΔW = 0 for a weight of ``shape``.

    ``weight`` itself is needed with ``options.dora`` only, whose norms start as the weight's. Raises ValueError for an
    unknown family, for one that is only applied and for ``dora`` around one that has no norms to learn apart.
    """
    if family not in FAMILIES:
        raise ValueError(f"there is no adapter family {family!r}; choose one of {', '.join(FAMILIES)}")
    row = FAMILIES[family]
    if not row.trainable:
        raise ValueError(f"{family} adapters are applied, not trained")
    adapter = row.adapter.create(shape, options, draws)
    if not options.dora:
        return adapter
    if not row.dora or not isinstance(adapter, Additive):
        able = ", ".join(name for name, other in FAMILIES.items() if other.dora)
        raise ValueError(f"dora is {options.dora!r}, but {family} has no norms to learn apart; {able} have")
    if weight is None:
        raise ValueError("dora starts from the norms of the weight, which is not given")
    return DoRA.around(adapter, weight, options.dora)
