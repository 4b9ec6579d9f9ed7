"""What guides and other trainers advise about the options of a run, as one table.

Each row says what it tells and where that comes from; the checks are in ``run_lint``. Levels are those of the dataset
check: ``error`` spoils what is learned, ``warn`` probably does, ``info`` is worth knowing. Sources: "guide" is a
written guide to training characters and styles, the trainers are named, "paper" is that of the method, "ours" is
judgement.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunRule:
    id: str
    level: str
    title: str
    message: str  # filled with what was found
    source: str
    limits: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """A value to click: ``part`` is "trainer" or a settings socket, or "dataset" for what a dataset node sets."""

    part: str
    option: str
    value: Any


@dataclass(frozen=True)
class RunFinding:
    rule: str
    level: str
    message: str
    changes: tuple[Change, ...] = ()

    def line(self) -> str:
        cure = "; ".join(f"{change.option} → {change.value}" for change in self.changes)
        return f"{self.level} {self.rule}: {self.message}" + (f" ({cure})" if cure else "")


_TABLE = (
    RunRule("L001", "error", "rate of adaptive optimizers",
            "{optimizer} finds its own learning rate and multiplies it with learning_rate: {rate:g} instead of 1",
            "guide, Prodigy's documentation", {"low": 0.1, "high": 10.0}),
    RunRule("L002", "warn", "schedule of adaptive optimizers",
            "{optimizer} goes with the cosine schedule, this is {schedule}", "guide"),
    RunRule("L003", "info", "alpha of adaptive optimizers",
            "{optimizer} is used with alpha 1, this is {alpha:g}: the update is {alpha:g} times as strong", "guide"),
    RunRule("L004", "info", "arguments of adaptive optimizers",
            "{optimizer} is used with {decouple}=True, weight_decay 0.1 and betas 0.9, 0.99", "guide"),
    RunRule("L005", "error", "rate too high",
            "learning_rate {rate:g} is far above what {optimizer} can use; 1 is for optimizers that find their own",
            "guide", {"above": 0.05}),
    RunRule("L006", "info", "rate outside the usual", "learning_rate {rate:g} is outside {low:g} to {high:g}, which "
            "suits {optimizer} on most models", "sd-scripts, below 1e-4 ours", {"low": 1e-5, "high": 1e-3}),
    RunRule("L007", "info", "schedule of Adam", "with Adam the guide uses cosine with restarts, this is constant",
            "guide"),
    RunRule("L008", "warn", "rate of second factors",
            "the second factors learn at {fast:.2g}, which is learning_rate {rate:g} × {ratio:g} (LoRA+); above "
            "{limit:g} the loss may jump: switch LoRA+ off (loraplus_ratio 1) or lower learning_rate", "ours",
            {"above": 5e-3}),
    RunRule("L010", "warn", "rank higher than useful",
            "rank {rank} is above {limit:g}: 128 is overkill, it fits noise and makes large files", "guide",
            {"above": 64}),
    RunRule("L011", "warn", "LoHa rank",
            "a LoHa of rank {rank} acts like a LoRA of rank {square}: use {limit:g} at most",
            "guide, LyCORIS", {"above": 32}),
    RunRule("L012", "warn", "LoCon rank", "conv_rank {rank} is above {limit:g}", "guide", {"above": 64}),
    RunRule("L013", "info", "weak adapter",
            "alpha {alpha:g} with rank {rank} acts at strength {strength:.3g}: with Adam that slows learning as much; "
            "alpha = rank or half of it is usual", "OneTrainer, guide", {"below": 0.2}),
    RunRule("L014", "info", "convolutions", "conv_rank {rank} with conv_alpha {alpha:g}: the guide uses 16 and 1",
            "guide", {"rank": 16}),
    RunRule("L015", "info", "rank lower than usual",
            "rank {rank} is below {limit:g}: 8 is enough for familiar things, 16 to 32 for new ones",
            "sd-scripts, guide", {"below": 4}),
    RunRule("L016", "info", "LoCon alpha",
            "alpha {alpha:g} with rank {rank}: the guide begins a LoCon at 32/32 and gives larger ones half the rank",
            "guide", {"rank": 32, "share": 0.5}),
    RunRule("L017", "info", "families for styles",
            "{images} images of one concept look like a style, this is {algorithm} on the {layers} layers: the guide "
            "makes styles with LoCon (LoRA on the full layers), GLoRA or (IA)³", "guide", {"above": 50}),
    RunRule("L020", "info", "LoKr factor",
            "LoKr with factor {factor}: −1 makes the smallest files, 8 or so larger and stronger ones",
            "guide, LyCORIS", {"low": 4, "high": 16}),
    RunRule("L021", "warn", "DyLoRA",
            "DyLoRA trains one random part of its ranks per step: it wants batch_size 1 with gradient_accumulation, "
            "and a rank of about {limit:g} (this is batch_size {batch}, accumulation {accumulation}, rank {rank})",
            "guide", {"rank": 64, "accumulation": 2}),
    RunRule("L022", "warn", "(IA)³ rate", "(IA)³ learns with {low:g} to {high:g}, learning_rate is {rate:g}", "guide",
            {"low": 5e-3, "high": 1e-2}),
    RunRule("L023", "warn", "DoRA dropout",
            "with DoRA dropout should be about a tenth of a LoRA's; network_dropout is {dropout:g}", "OneTrainer",
            {"above": 0.05}),
    RunRule("L024", "info", "dropout", "network_dropout {dropout:g} is above {limit:g}", "guide", {"above": 0.5}),
    RunRule("L030", "warn", "concepts blend",
            "{count} training concepts and batch_size {batch}: batches mix their gradients, which blends them",
            "guide"),
    RunRule("L031", "warn", "mirrored concepts",
            "{count} training concepts and flip is on for {where}: what tells them apart may be a side", "guide"),
    RunRule("L032", "info", "rank for several concepts", "{count} training concepts at rank {rank}: {limit:g} or more",
            "guide", {"below": 32}),
    RunRule("L033", "warn", "too few presentations",
            "each image is shown {shown:.0f} times; {wanted:g} are usual (styles {style:g})", "guide",
            {"low": 0.3, "wanted": 100, "style": 35}),
    RunRule("L034", "warn", "too many presentations",
            "each image is shown {shown:.0f} times; {wanted:g} are usual (styles {style:g}): expect overfitting",
            "guide", {"high": 5.0, "wanted": 100, "style": 35}),
    RunRule("L035", "warn", "resolution beyond the model",
            "images are trained at up to {side:.0f} pixels (root of the area), {architecture} was made at {native}",
            "guide", {"factor": 1.35}),
    RunRule("L036", "info", "resolution below the model",
            "images are trained at {side:.0f} pixels at most, {architecture} was made at {native}: details stay soft",
            "ours", {"factor": 0.6}),
    RunRule("L037", "info", "batch size", "batch_size {batch} is above {limit:g}", "guide", {"above": 4}),
    RunRule("L040", "info", "min-SNR alone",
            "min_snr_gamma without debiased: the guide uses both on noise-prediction models (they multiply)", "guide"),
    RunRule("L041", "info", "min-SNR γ", "min_snr_gamma is {gamma:g}; 5 is what its paper and the guide use",
            "paper, guide", {"low": 1, "high": 20}),
    RunRule("L042", "warn", "noise offset", "noise_offset {offset:g} is above {limit:g}: pictures turn grey or burnt",
            "guide, sd-scripts", {"above": 0.15}),
    RunRule("L043", "info", "norm bound",
            "max_norm is {norm:g}; 1 is usual (scale_weight_norms), much less holds back everything", "guide",
            {"low": 0.5}),
    RunRule("L050", "warn", "text encoder rate",
            "text encoder {number} learns at {rate:g}, the model at {model:g}: a tenth to a half of it is usual",
            "OneTrainer, sd-scripts", {"share": 1.0}),
    RunRule("L051", "info", "text encoder to the end",
            "text encoder {number} is trained to the end of {steps} steps; stopping it early keeps what words mean",
            "OneTrainer", {"steps": 1000}),
    RunRule("L060", "info", "choose by looking",
            "the loss says little about how good a LoRA is; save_every keeps LoRAs of several steps to choose from, "
            "and previews show them", "guide", {"steps": 800}),
    RunRule("L061", "info", "nothing held out",
            "no picture is held out, so overfitting cannot be measured: validation_split 0.1 of the Concept Settings",
            "ours", {"images": 20}),
    RunRule("L062", "warn", "warm-up longer than useful",
            "warmup_steps take {share:.0%} of the run", "ours", {"above": 0.3}),
    RunRule("L063", "info", "adapters in half precision",
            "parameter_dtype is bf16: adapters are small, so fp32 costs little and is exact", "OneTrainer"),
    RunRule("L064", "info", "computing in full precision",
            "compute_dtype is fp32: others train in bf16 or fp16, which is faster and halves what is kept for backward",
            "sd-scripts, guide"),
)  # fmt: skip
RUN_RULES: Mapping[str, RunRule] = {rule.id: rule for rule in _TABLE}


def rule_table() -> str:
    """All rules as text, for the help page."""
    lines = []
    for rule in _TABLE:
        limits = ", ".join(f"{name} {value:g}" for name, value in rule.limits.items())
        lines.append(f"{rule.id} {rule.level}: {rule.title}; source: {rule.source}" + (f"; {limits}" if limits else ""))
    return "\n".join(lines)
