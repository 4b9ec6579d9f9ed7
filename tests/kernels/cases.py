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
from lora_loom.kernels.dora import DoRA
from lora_loom.kernels.products import ConvGeometry
from lora_loom.kernels.registry import FAMILIES, make_adapter, read_adapter

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

DORA = [{"dora": "output"}, {"dora": "input", "tucker": True}]

# family -> the options it is tried with; every family is tried on every layer it is made for
OPTIONS: dict[str, list[dict]] = {
    "LoRA": [{}, {"rank_stabilised": True}, {"tucker": True}, *DORA],
    "DyLoRA": [{"rank": 4, "unit": 2}, {"tucker": True}],
    "LoRA-FA": [{}, {"tucker": True}],
    "LoHa": [{}, {"tucker": True}, {"rank": 12}, *DORA],  # ΔW is built from rank 12 on
    "LoKr": [
        {},
        {"factor": 1, "alpha": 3.0},
        {"factor": 1, "alpha": 3.0, "tucker": True},
        {"factor": 2, "rank": 1, "decompose_both": True},
        {"full_rank": True},
        {"factor": 1, "alpha": 3.0, "dora": "output"},
        {"dora": "input"},
    ],
    "full": [{}, {"bias": True}],
    "OFT": [{"block_size": 4}, {"block_size": 4, "constraint": 0.02, "rescale": True}],
    "BOFT": [{"block_size": 6}, {"block_size": 6, "constraint": 0.02, "rescale": True}],
    "OFTv2": [{"block_size": 3}],
    "IA3": [{}, {"on_input": True}],
    "GLoRA": [{}, {"rank_stabilised": True}],
    "VeRA": [{"rank": 3}],
    "T-LoRA": [{}],
}

# families that are applied, not trained -> shapes of a file's tensors for a weight (out, in) at a rank
APPLIED = {
    "VeRA": lambda o, i, r: {"vera_lambda_b": (o,), "vera_lambda_d": (r,), "vera_A": (r, i + 3), "vera_B": (o + 2, r)},
    "T-LoRA": lambda o, i, r: {"q_layer.weight": (r, i), "p_layer.weight": (o, r), "lambda_layer": (1, r)},
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
    if case.family in APPLIED:
        sizes = APPLIED[case.family](*module.weight.shape, case.options.rank)
        parts = {name: torch.randn(size, generator=draws) for name, size in sizes.items()}
        adapter, _ = read_adapter(parts, module.weight.shape)
    else:
        adapter = make_adapter(case.family, module.weight.shape, case.options, draws, module.weight)
    return module, adapter.to(dtype=dtype), torch.randn(shape, generator=draws, dtype=dtype)


def randomised(adapter: Adapter, seed=0, size=0.3) -> Adapter:
    """The same adapter with something in every tensor."""
    draws = torch.Generator().manual_seed(seed)
    return adapter.with_tensors(
        {name: t + size * torch.randn(t.shape, generator=draws).to(t.dtype) for name, t in adapter.tensors.items()}
    )


def hold_norms(monkeypatch, adapter, module):
    """DoRA's norms are constants to gradients (paper §4.3); make them constants to finite differences too."""
    if isinstance(adapter, DoRA):
        norms = adapter.norms(module.weight)
        monkeypatch.setattr(DoRA, "norms", lambda self, weight: norms.to(weight.dtype))


def with_weight(module, weight, x, bias=None):
    """The layer's output with another weight (and bias)."""
    changed = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return torch.func.functional_call(module, changed, x)


def kept_for_backward(run):
    """The tensors that autograd keeps while ``run()`` goes forward, in its order."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run()
    return kept


def storages(tensors):
    """The addresses of their storages."""
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}
