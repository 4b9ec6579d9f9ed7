"""The table of adapter cases: every family on every kind of layer with every option. ``test_families.py`` runs it.

A family's own tests (``test_<family>.py``) compare the same cases with the references that exist for it.
"""

import itertools
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lora_loom.kernels.adapter import Adapter, Options
from lora_loom.kernels.products import ConvGeometry
from lora_loom.kernels.registry import FAMILIES, make_adapter

# name -> (make the layer, shape of its input)
LINEARS = {
    "linear": (lambda: nn.Linear(8, 12), (5, 8)),
    "linear 3-D": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "linear 4-D": (lambda: nn.Linear(4, 6), (2, 3, 2, 4)),
}
CONVS = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 4)),
    "conv2d strided": (lambda: nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 6, 7, 5)),
    "conv2d dilated": (lambda: nn.Conv2d(2, 4, 3, padding=(2, 3), dilation=(2, 3)), (1, 2, 6, 7)),
    "conv2d grouped": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (2, 4, 4, 4)),
    "conv1x1": (lambda: nn.Conv2d(6, 4, 1), (2, 6, 3, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3, padding=(0, 1, 1), stride=(1, 2, 1)), (1, 2, 3, 4, 3)),
}
LAYERS = LINEARS | CONVS

# family -> the options it is tried with; every family is tried on every layer it is made for
OPTIONS: dict[str, list[dict]] = {
    "LoRA": [{}, {"rank_stabilised": True}, {"tucker": True}],
    "DyLoRA": [{"rank": 4, "unit": 2}, {"tucker": True}],
    "LoRA-FA": [{}, {"tucker": True}],
}


@dataclass(frozen=True)
class Case:
    family: str
    layer: str
    options: Options

    def __str__(self):
        changed = {key: value for key, value in vars(self.options).items() if value != getattr(Options(), key)}
        shown = (f"{key}={value}" for key, value in changed.items() if key not in ("rank", "alpha"))
        return " ".join([self.family, self.layer, *shown])

    @property
    def spatial(self):
        return self.layer in CONVS and self.layer != "conv1x1"


def _cases():
    for family, variants in OPTIONS.items():
        kinds = FAMILIES[family].layers
        layers = [*(LINEARS if "linear" in kinds else ()), *(CONVS if "conv" in kinds else ())]
        for options, layer in itertools.product(variants, layers):
            yield Case(family, layer, Options(**({"rank": 2, "alpha": 1.5} | options)))


CASES = list(_cases())


class Lent:
    """A layer on loan whose owner reuses the buffer: what ``weight`` gave is ruined as soon as it is given back."""

    def __init__(self, module):
        self.module, self.geometry = module.requires_grad_(False), None
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            self.geometry = ConvGeometry(module.stride, module.padding, module.dilation, module.groups)

    def forward(self, x, *args, **kwargs):
        return self.module.to(x.dtype)(x, *args, **kwargs)

    @contextmanager
    def weight(self, like):
        borrowed = self.module.weight.detach().to(like.dtype, copy=True)
        yield borrowed
        borrowed.fill_(math.nan)

    def bias(self, like):
        return None if self.module.bias is None else self.module.bias.detach().to(like.dtype, copy=True)


def build(case, dtype=torch.float64, seed=0):
    """(layer, fresh adapter, input) of a case."""
    torch.manual_seed(seed)
    make, shape = LAYERS[case.layer]
    module = make().to(dtype).requires_grad_(False)
    draws = torch.Generator().manual_seed(seed + 1)
    adapter = make_adapter(case.family, module.weight.shape, case.options, draws, module.weight).to(dtype=dtype)
    return module, adapter, torch.randn(shape, generator=draws, dtype=dtype)


def randomised(adapter: Adapter, seed=0, size=0.3) -> Adapter:
    """The same adapter with something in every tensor."""
    draws = torch.Generator().manual_seed(seed)
    return adapter.with_tensors(
        {name: t + size * torch.randn(t.shape, generator=draws).to(t.dtype) for name, t in adapter.tensors.items()}
    )


def with_weight(module, weight, x, bias=None):
    """The layer's output with another weight (and bias)."""
    changed = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return torch.func.functional_call(module, changed, x)
