"""What hangs on the layers: family, size, which layers, what each block gets."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.adapter import Dropout, Options
from ...kernels.layers import PRESETS
from ...kernels.registry import FAMILIES
from ..options import OptionError, Settings, check, option

CUSTOM = "custom"
LAYERS = {
    **{preset.name: preset.description for preset in PRESETS.values()},
    CUSTOM: "The layers that layer_filter names.",
}
ALGORITHMS = {name: f"{row.label}. {row.description}" for name, row in FAMILIES.items() if row.trainable}
DORA = {
    "off": "direction and length of the weights are learnt together",
    "output": "DoRA with one learnt length per output, as LyCORIS and PEFT do it",
    "input": "DoRA with one learnt length per input, as OneTrainer does it",
}


@dataclass(frozen=True)
class AdapterSettings(Settings):
    first_release = ("layers", "conv_rank", "conv_alpha")

    layers: str = option("attention+MLP", "Which layers get an adapter.", choices=LAYERS)
    conv_rank: int = option(
        0,
        "Rank of the adapters on k×k convolutions (LoCon). 0 leaves those layers out; they are part of the full and "
        "conv presets only.",
        low=0,
        high=512,
        expected="0 (no k×k convolutions) or more",
    )
    conv_alpha: float = option(
        1.0,
        "Alpha of the convolutions' adapters; their strength is conv_alpha / conv_rank.",
        low=-1024.0,
        high=1024.0,
        step=0.5,
    )
    algorithm: str = option("LoRA", "What an adapter is made of.", choices=ALGORITHMS)
    dora: str = option(
        "off", "Learn the lengths of the weights apart from their directions (DoRA).", choices=DORA, advanced=True
    )
    rs_lora: bool = option(
        False, "Strength alpha / √rank instead of alpha / rank (rsLoRA), for high ranks.", advanced=True
    )
    tucker: bool = option(
        False, "Adapters on k×k convolutions with a core of rank × rank × kernel (Tucker): smaller.", advanced=True
    )
    factor: int = option(
        -1,
        "LoKr: size of the small matrix. −1 splits evenly (smallest files), 8 or so gives larger, stronger ones.",
        low=-1,
        high=1024,
        advanced=True,
    )
    decompose_both: bool = option(False, "LoKr: the small matrix in low rank too.", advanced=True)
    full_matrix: bool = option(False, "LoKr: neither matrix in low rank; rank has no say then.", advanced=True)
    block_size: int = option(
        32, "OFT, BOFT, OFTv2: how many outputs (OFTv2: inputs) rotate together.", low=2, high=1024, advanced=True
    )
    constraint: float = option(
        0.0,
        "OFT, BOFT: greatest deviation from no rotation; 0 sets no bound.",
        low=0.0,
        high=100.0,
        step=0.0001,
        advanced=True,
    )
    rescaled: bool = option(False, "OFT, BOFT: a learnt factor per output beside the rotation.", advanced=True)
    unit: int = option(
        1, "DyLoRA: ranks that are trained together; must divide the rank.", low=1, high=128, advanced=True
    )
    train_on_input: bool = option(False, "(IA)³: scale the inputs of layers instead of their outputs.", advanced=True)
    train_bias: bool = option(False, "Full difference: learn the biases too.", advanced=True)
    network_dropout: float = option(
        0.0,
        "Part of the adapter's inner numbers left out in each step. 0.1 to 0.5 holds back overfitting; with DoRA a "
        "tenth of that.",
        low=0.0,
        high=0.99,
        step=0.01,
        expected="0 to below 1",
    )
    rank_dropout: float = option(
        0.0,
        "Part of the ranks left out in each step.",
        low=0.0,
        high=0.99,
        step=0.01,
        expected="0 to below 1",
        advanced=True,
    )
    module_dropout: float = option(
        0.0,
        "Part of the layers whose adapter is left out in each step.",
        low=0.0,
        high=0.99,
        step=0.01,
        expected="0 to below 1",
        advanced=True,
    )
    max_norm: float = option(
        0.0,
        "Greatest norm of a layer's change; larger ones are shrunk after each step (scale_weight_norms). 1 is usual, "
        "0 sets no bound.",
        low=0.0,
        high=1000.0,
        step=0.01,
        advanced=True,
    )
    loraplus_ratio: float = option(
        0.0,
        "LoRA+ (Hayou et al. 2024): how many times faster the second factor learns than the first. 1 is off; 0 is "
        "automatic: 16, its paper's value, for LoRA with an AdamW, else 1.",
        low=0.0,
        high=1000.0,
        step=1.0,
        expected="0 (automatic), 1 (off) or more",
        advanced=True,
    )
    layer_filter: str = option(
        "",
        "One rule a line. A rule is a part of a layer's path (attn1.to_q), a pattern with * and ?, re: and a regular "
        "expression, or block: and block names; a leading minus leaves those layers out. With layers set to custom "
        "the rules choose; with a preset they narrow it. A rule that matches no layer is an error.",
        multiline=True,
        advanced=True,
    )
    blocks: str = option(
        "",
        "One line per group of blocks: names, a colon, then what is different there: rank=8 alpha=4 conv_rank=4 "
        "conv_alpha=1 lr=0.5 (a factor) or off. Names are those of the loader: in, mid, out, IN4-8, "
        "double_blocks.0-7, single, base, …; later lines win. Example: IN0-2: off",
        multiline=True,
        advanced=True,
    )

    def check_together(self) -> None:
        check(not 0 < self.loraplus_ratio < 1, "loraplus_ratio", self.loraplus_ratio, "0 (automatic), 1 (off) or more")
        check(self.conv_alpha != 0, "conv_alpha", self.conv_alpha, "a number other than 0")
        known = FAMILIES[self.algorithm]
        if self.dora != "off" and not known.dora:
            able = ", ".join(name for name, row in FAMILIES.items() if row.dora)
            raise OptionError(
                f"dora is {self.dora!r}, expected off for {self.algorithm}: only {able} can learn norms apart"
            )
        for name, (reads, default) in _READ_BY.items():
            if getattr(self, name) != default and reads not in known.options:
                able = ", ".join(family for family, row in FAMILIES.items() if reads in row.options and row.trainable)
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}, expected {default!r} for {self.algorithm}, where it has no "
                    f"effect; it is for {able}"
                )
        if self.layers == CUSTOM and not self.layer_filter.strip():
            raise OptionError("layer_filter is empty, expected the rules that choose the layers: layers is custom")

    @property
    def dropout(self) -> Dropout:
        return Dropout(self.network_dropout, self.rank_dropout, self.module_dropout)

    def kernel_options(self, rank: int, alpha: float) -> Options:
        """What ``kernels.make_adapter`` is told."""
        return Options(
            rank=rank,
            alpha=alpha,
            rank_stabilised=self.rs_lora,
            tucker=self.tucker,
            factor=self.factor,
            decompose_both=self.decompose_both,
            full_rank=self.full_matrix,
            block_size=self.block_size,
            constraint=self.constraint,
            rescale=self.rescaled,
            dora="" if self.dora == "off" else self.dora,
            unit=self.unit,
            on_input=self.train_on_input,
            bias=self.train_bias,
        )


# our option -> the field of kernels.Options that a family must read, and the value that asks for nothing
_READ_BY = {
    "rs_lora": ("rank_stabilised", False),
    "tucker": ("tucker", False),
    "factor": ("factor", -1),
    "decompose_both": ("decompose_both", False),
    "full_matrix": ("full_rank", False),
    "block_size": ("block_size", 32),
    "constraint": ("constraint", 0.0),
    "rescaled": ("rescale", False),
    "unit": ("unit", 1),
    "train_on_input": ("on_input", False),
    "train_bias": ("bias", False),
}
