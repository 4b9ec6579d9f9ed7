"""Every optimizer a run may use, in one table that feeds dropdown, tooltip, errors and documentation.

* ``OPTIMIZERS``: a row per optimizer, whether its package is installed or not; ``offered`` are those that are.
* A row says which widgets an optimizer listens to and with which arguments it is made when nobody asks for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

BY_NAME = "pytorch_optimizer"  # the row that stands for a whole package: optimizer_name says which
PARAMETER_FREE = frozenset({"AdamG"})  # of that package: finds its rate without the first guess d0 that others begin at


@dataclass(frozen=True)
class OptimizerInfo:
    """``module`` and ``kind`` are where the class is found.

    ``betas`` are what its authors use, () where it has none; ``decay`` and ``epsilon`` tell whether it has a weight
    decay and an epsilon in the sense of the widgets. ``arguments`` it is made with unless optimizer_args says
    otherwise. ``finds_rate``: it finds its own learning rate, ours multiplies it and should be 1. ``one_rate``: all
    of its tensors have to learn at one rate. ``schedule_free``: it averages the weights instead of lowering the
    learning rate, and has to be told when they are looked at. ``state_bytes`` per trained number, as measured.
    """

    name: str
    description: str
    module: str
    kind: str
    package: str = ""  # what to install; "" is torch's own
    paper: str = ""
    betas: tuple[float, ...] = ()
    decay: bool = True
    epsilon: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    finds_rate: bool = False
    one_rate: bool = False
    schedule_free: bool = False
    state_bytes: float = 8.0

    @property
    def installed(self) -> bool:
        return not self.package or find_spec(self.module.partition(".")[0]) is not None


ADAM = (0.9, 0.999)
LION = (0.9, 0.99)

_ROWS = (
    OptimizerInfo(
        "AdamW", "Adam with decoupled weight decay, the usual choice", "torch.optim", "AdamW",
        paper="Loshchilov & Hutter 2019, arXiv:1711.05101", betas=ADAM, epsilon=True,
    ),
    OptimizerInfo(
        "Adafactor", "nearly no memory: the squares of gradients are kept by rows and columns; the rate is absolute",
        "torch.optim", "Adafactor", paper="Shazeer & Stern 2018, arXiv:1804.04235",
        # torch scales steps with the size of the weights, which for adapters that begin at zero means no steps at all;
        # from 1.0 up the rate is what it says. Its first epsilon drowns the small gradients of adapters.
        arguments={"eps": (1e-15, 1.0)}, state_bytes=0.09,
    ),
    OptimizerInfo(
        "SGD", "plain gradient descent; optimizer_args momentum=0.9 nesterov=True for momentum. Wants far higher "
        "rates, and its weight decay is part of the gradient", "torch.optim", "SGD", state_bytes=0.0,
    ),
    OptimizerInfo(
        "Muon", "steps of equal length in every direction of a matrix, k×k convolutions flattened; AdamW for what is "
        "no matrix. The rates of AdamW suit it", f"{__package__}.muon", "Muon",
        paper="Jordan 2024; Liu et al. 2025, arXiv:2502.16982", state_bytes=4.0,
    ),
    OptimizerInfo(
        "Prodigy", "finds its own learning rate; leave ours at 1", "prodigyopt", "Prodigy", "prodigyopt",
        "Mishchenko & Defazio 2024, arXiv:2306.06101", ADAM, epsilon=True, arguments={"decouple": True},
        finds_rate=True, one_rate=True, state_bytes=16.0,
    ),
    OptimizerInfo(
        "ProdigyPlusScheduleFree", "Prodigy that needs no schedule and little memory; leave the learning rate at 1",
        "prodigyplus", "ProdigyPlusScheduleFree", "prodigy-plus-schedule-free",
        "Mishchenko & Defazio 2024; Defazio et al. 2024", LION, epsilon=True, finds_rate=True, schedule_free=True,
        state_bytes=4.5,
    ),
    OptimizerInfo(
        "AdamWScheduleFree", "AdamW that averages the weights instead of lowering the rate; use a warm-up",
        "schedulefree", "AdamWScheduleFree", "schedulefree", "Defazio et al. 2024, arXiv:2405.15682", ADAM,
        epsilon=True, schedule_free=True,
    ),
    OptimizerInfo(
        "RAdamScheduleFree", "the same with its own warm-up: the first steps only look", "schedulefree",
        "RAdamScheduleFree", "schedulefree", "Defazio et al. 2024, arXiv:2405.15682", ADAM, epsilon=True,
        schedule_free=True,
    ),
    OptimizerInfo(
        "SGDScheduleFree", "gradient descent that averages the weights; wants far higher rates", "schedulefree",
        "SGDScheduleFree", "schedulefree", "Defazio et al. 2024, arXiv:2405.15682", schedule_free=True,
        state_bytes=4.0,
    ),
    OptimizerInfo(
        "DAdaptAdam", "Adam that finds its own learning rate; leave ours at 1", "dadaptation", "DAdaptAdam",
        "dadaptation", "Defazio & Mishchenko 2023, arXiv:2301.07733", ADAM, epsilon=True, arguments={"decouple": True},
        finds_rate=True, one_rate=True, state_bytes=12.0,
    ),
    OptimizerInfo(
        "DAdaptLion", "Lion that finds its own learning rate; leave ours at 1", "dadaptation", "DAdaptLion",
        "dadaptation", "Defazio & Mishchenko 2023, arXiv:2301.07733", LION, finds_rate=True, one_rate=True,
    ),
    OptimizerInfo(
        "DAdaptSGD", "gradient descent that finds its own learning rate; leave ours at 1", "dadaptation", "DAdaptSGD",
        "dadaptation", "Defazio & Mishchenko 2023, arXiv:2301.07733", finds_rate=True, one_rate=True,
        state_bytes=12.0,
    ),
    OptimizerInfo(
        "Lion", "steps of one size by sign; a third to a tenth of AdamW's rate, three to ten times its decay",
        "lion_pytorch", "Lion", "lion-pytorch", "Chen et al. 2023, arXiv:2302.06675", LION, state_bytes=4.0,
    ),
    OptimizerInfo(
        "CAME", "Adafactor that weighs steps by how far they can be trusted", "came_pytorch", "CAME", "came-pytorch",
        "Luo et al. 2023, arXiv:2307.02047", (0.9, 0.999, 0.9999), state_bytes=4.2,
    ),
    OptimizerInfo(
        "AdamW8bit", "AdamW with its memory in 8 bits (bitsandbytes)", "bitsandbytes.optim", "AdamW8bit",
        "bitsandbytes", "Dettmers et al. 2022, arXiv:2110.02861", ADAM, epsilon=True, state_bytes=2.3,
    ),
    OptimizerInfo(
        "PagedAdamW8bit", "the same, moved to main memory when the GPU is full", "bitsandbytes.optim",
        "PagedAdamW8bit", "bitsandbytes", "Dettmers et al. 2022, arXiv:2110.02861", ADAM, epsilon=True,
        state_bytes=2.3,
    ),
    OptimizerInfo(
        "Lion8bit", "Lion with its memory in 8 bits (bitsandbytes)", "bitsandbytes.optim", "Lion8bit", "bitsandbytes",
        "Chen et al. 2023, arXiv:2302.06675", LION, state_bytes=1.1,
    ),
    OptimizerInfo(
        "PagedLion8bit", "the same, moved to main memory when the GPU is full", "bitsandbytes.optim", "PagedLion8bit",
        "bitsandbytes", "Chen et al. 2023, arXiv:2302.06675", LION, state_bytes=1.1,
    ),
    OptimizerInfo(
        "AdEMAMix8bit", "Adam with a second, far longer memory, in 8 bits (bitsandbytes)", "bitsandbytes.optim",
        "AdEMAMix8bit", "bitsandbytes", "Pagliardini et al. 2024, arXiv:2409.03137", (0.9, 0.999, 0.9999),
        epsilon=True, state_bytes=3.3,
    ),
    OptimizerInfo(
        "SGD8bit", "gradient descent with momentum, its memory in 8 bits (bitsandbytes)", "bitsandbytes.optim",
        "SGD8bit", "bitsandbytes", "Dettmers et al. 2022, arXiv:2110.02861", arguments={"momentum": 0.9},
        state_bytes=1.1,
    ),
    OptimizerInfo(
        "torchao AdamW8bit", "AdamW with its memory in 8 bits (torchao)", "torchao.optim", "AdamW8bit", "torchao",
        "Dettmers et al. 2022, arXiv:2110.02861", ADAM, epsilon=True, state_bytes=2.3,
    ),
    OptimizerInfo(
        "torchao AdamW4bit", "AdamW with its memory in 4 bits (torchao)", "torchao.optim", "AdamW4bit", "torchao",
        "Li et al. 2023, arXiv:2309.01507", ADAM, epsilon=True, state_bytes=1.1,
    ),
    OptimizerInfo(
        "torchao AdamWFp8", "AdamW with its memory in 8-bit floats (torchao)", "torchao.optim", "AdamWFp8", "torchao",
        "", ADAM, epsilon=True, state_bytes=2.0,
    ),
    OptimizerInfo(
        BY_NAME, "any optimizer of that package: optimizer_name says which", "pytorch_optimizer", "",
        "pytorch_optimizer", state_bytes=16.0,
    ),
)  # fmt: skip
OPTIMIZERS: dict[str, OptimizerInfo] = {row.name: row for row in _ROWS}


def offered() -> dict[str, str]:
    """name -> description of what can be used here and now."""
    return {row.name: row.description for row in _ROWS if row.installed}


def known() -> dict[str, str]:
    """name -> description of all, installed or not."""
    return {row.name: row.description for row in _ROWS}
