"""The check of a run's options before its first step: what probably spoils it, and the value to set instead.

``check_run(facts)`` → findings, the most serious first. Nothing is changed: a finding carries the values to click.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..kernels.registry import FAMILIES
from .dataset.balancing import presentations_per_image
from .dataset.batches import BatchPlan
from .dataset.lint_rules import LEVELS
from .dataset.model import Dataset
from .optimizers.arguments import parse_arguments
from .optimizers.make import class_of
from .optimizers.table import BY_NAME, OptimizerInfo
from .run_rules import RUN_RULES, Change, RunFinding
from .settings import Plan

ANY_RATE = frozenset({"SGD", "SGDScheduleFree", "SGD8bit", BY_NAME})  # steps in proportion to gradients, or anybody's
LOW_RANK = frozenset({"LoRA", "LoRA-FA", "GLoRA"})  # families whose rank and alpha mean what they mean for a LoRA


@dataclass(frozen=True)
class RunFacts:
    """What is known before the first step.

    ``native`` is the side of the square pictures the model was made with, 0 where that is not known; ``noise``: whether
    it predicts noise.
    """

    plan: Plan
    dataset: Dataset
    total_steps: int
    presentations: float  # of each image in the whole run, in the mean
    architecture: str = "this model"
    native: int = 0
    noise: bool = True

    @property
    def optimizer(self) -> OptimizerInfo:
        """Its row; one of pytorch_optimizer's by its own name."""
        return class_of(self.plan.optimizer)[0]

    def reads(self, option: str) -> bool:
        """Whether the adapters' family has a rank, an alpha."""
        return option in FAMILIES[self.plan.adapter.algorithm].options

    @property
    def concepts(self) -> list[int]:
        return sorted({self.dataset.samples[index].concept for index in self.dataset.members("training")})

    @property
    def images(self) -> int:
        return len(self.dataset.members("training"))

    @property
    def style(self) -> bool:
        """A single concept with many pictures is taken for a style."""
        return len(self.concepts) == 1 and self.images > RUN_RULES["L017"].limits["above"]


def facts(plan: Plan, order: BatchPlan, total_steps: int, **model: Any) -> RunFacts:
    """``model``: ``architecture``, ``native``, ``noise`` of ``RunFacts``."""
    epochs = order.epochs_at(total_steps * plan.optimizer.gradient_accumulation)
    shown = epochs * float(presentations_per_image(order.dataset))
    return RunFacts(plan, order.dataset, total_steps, shown, **model)


def check_run(known: RunFacts) -> list[RunFinding]:
    """Findings, the most serious first."""
    found = [finding for check in _CHECKS for finding in check(known)]
    return sorted(found, key=lambda finding: (LEVELS.index(finding.level), finding.rule))


def _finding(rule: str, *changes: Change, **figures: Any) -> RunFinding:
    row = RUN_RULES[rule]
    return RunFinding(rule, row.level, row.message.format(**figures), changes)


def _set(part: str, option: str, value: Any) -> Change:
    return Change(part, option, value)


def _finds_rate(known: RunFacts) -> Iterator[RunFinding]:
    """Of optimizers that find their own learning rate."""
    plan, settings, rate = known.plan, known.plan.optimizer, known.plan.learning_rate
    if not known.optimizer.finds_rate:
        return
    name, limits = known.optimizer.name, RUN_RULES["L001"].limits
    if not limits["low"] <= rate <= limits["high"]:
        yield _finding("L001", _set("trainer", "learning_rate", 1.0), optimizer=name, rate=rate)
    if settings.schedule != "cosine" and not known.optimizer.schedule_free:
        yield _finding("L002", _set("optimizer", "schedule", "cosine"), optimizer=name, schedule=settings.schedule)
    if plan.alpha != 1 and known.reads("alpha"):
        yield _finding("L003", _set("trainer", "alpha", 1.0), optimizer=name, alpha=plan.alpha)
    decouple = next((name for name in ("decouple", "weight_decouple") if name in known.optimizer.arguments), "")
    if decouple and len(known.optimizer.betas) == 2 and (changes := _arguments(known, decouple)):
        yield _finding("L004", *changes, optimizer=name, decouple=decouple)


def _arguments(known: RunFacts, decouple: str) -> list[Change]:
    """From what such an optimizer is given to what the guide gives it; what is written out was chosen knowingly."""
    settings = known.plan.optimizer
    given, changes = parse_arguments(settings.optimizer_args), []
    if not given.get(decouple, True):
        rest = re.sub(rf"\b{decouple}\s*=\s*\w+[,;]?", " ", settings.optimizer_args).strip()
        changes.append(_set("optimizer", "optimizer_args", f"{rest} {decouple}=True".strip()))
    if "weight_decay" not in given and settings.weight_decay != 0.1:
        changes.append(_set("optimizer", "weight_decay", 0.1))
    if "betas" not in given and settings.beta2 != 0.99:
        changes.append(_set("optimizer", "beta2", 0.99))
    return changes


def _rate(known: RunFacts) -> Iterator[RunFinding]:
    """Of optimizers that are told their learning rate."""
    plan, settings, rate = known.plan, known.plan.optimizer, known.plan.learning_rate
    name = settings.optimizer
    if known.optimizer.finds_rate or name in ANY_RATE:
        return
    if plan.adapter.algorithm == "IA3":
        limits = RUN_RULES["L022"].limits
        if not limits["low"] <= rate <= limits["high"]:
            yield _finding("L022", _set("trainer", "learning_rate", limits["low"]), rate=rate, **limits)
    elif rate > RUN_RULES["L005"].limits["above"]:
        yield _finding("L005", _set("trainer", "learning_rate", 1e-4), optimizer=name, rate=rate)
    elif "AdamW" in name and not known.optimizer.schedule_free:  # those average, and like higher rates
        limits = RUN_RULES["L006"].limits
        if not limits["low"] <= rate <= limits["high"]:
            yield _finding("L006", _set("trainer", "learning_rate", 1e-4), optimizer=name, rate=rate, **limits)
        elif (fast := rate * plan.loraplus_ratio) > (limit := RUN_RULES["L008"].limits["above"]):
            figures = {"fast": fast, "rate": rate, "ratio": plan.loraplus_ratio, "limit": limit}
            yield _finding("L008", _set("adapter", "loraplus_ratio", 1.0), **figures)
        if settings.schedule == "constant" and known.total_steps >= RUN_RULES["L060"].limits["steps"]:
            yield _finding("L007", _set("optimizer", "schedule", "cosine with restarts"))


def _warmup(known: RunFacts) -> Iterator[RunFinding]:
    settings = known.plan.optimizer
    if known.total_steps and settings.schedule_unit == "steps":
        share = settings.warmup_steps / known.total_steps
        if share > RUN_RULES["L062"].limits["above"]:
            yield _finding("L062", _set("optimizer", "warmup_steps", known.total_steps // 10), share=share)


def _adapter(known: RunFacts) -> Iterator[RunFinding]:
    plan, settings = known.plan, known.plan.adapter
    rank, algorithm = plan.rank, settings.algorithm
    limit = RUN_RULES["L011"].limits["above"]
    if algorithm == "LoHa" and rank > limit:
        yield _finding("L011", _set("trainer", "rank", int(limit)), rank=rank, square=rank * rank, limit=limit)
    limit = RUN_RULES["L010"].limits["above"]
    if algorithm in LOW_RANK and rank > limit:
        yield _finding("L010", _set("trainer", "rank", 32), rank=rank, limit=limit)
    limit = RUN_RULES["L015"].limits["below"]
    if algorithm in LOW_RANK and rank < limit:
        yield _finding("L015", _set("trainer", "rank", 8), rank=rank, limit=limit)
    limit = RUN_RULES["L012"].limits["above"]
    if settings.conv_rank > limit and known.reads("rank"):
        yield _finding("L012", _set("adapter", "conv_rank", int(limit)), rank=settings.conv_rank, limit=limit)
    strength = abs(plan.alpha) / rank
    low_rank = algorithm in (*LOW_RANK, "LoHa") and not settings.rs_lora
    if low_rank and not known.optimizer.finds_rate and strength < RUN_RULES["L013"].limits["below"]:
        yield _finding("L013", _set("trainer", "alpha", float(rank)), alpha=plan.alpha, rank=rank, strength=strength)
    if algorithm == "LoKr" and settings.factor != -1:
        limits = RUN_RULES["L020"].limits
        if not limits["low"] <= settings.factor <= limits["high"]:
            yield _finding("L020", _set("adapter", "factor", 8), factor=settings.factor)
    if algorithm == "DyLoRA":
        limits, accumulation = RUN_RULES["L021"].limits, plan.optimizer.gradient_accumulation
        if plan.batch_size > 1 or accumulation < limits["accumulation"] or rank < limits["rank"]:
            yield _finding(
                "L021",
                _set("trainer", "batch_size", 1),
                _set("optimizer", "gradient_accumulation", max(4, accumulation)),
                _set("trainer", "rank", 128),
                limit=128,
                batch=plan.batch_size,
                accumulation=accumulation,
                rank=rank,
            )
    dropout = settings.network_dropout
    if settings.dora != "off" and dropout > RUN_RULES["L023"].limits["above"]:
        yield _finding("L023", _set("adapter", "network_dropout", round(dropout / 10, 3)), dropout=dropout)
    elif dropout > RUN_RULES["L024"].limits["above"]:
        limit = RUN_RULES["L024"].limits["above"]
        yield _finding("L024", _set("adapter", "network_dropout", 0.1), dropout=dropout, limit=limit)
    if 0 < settings.max_norm < RUN_RULES["L043"].limits["low"]:
        yield _finding("L043", _set("adapter", "max_norm", 1.0), norm=settings.max_norm)


def _convolutions(known: RunFacts) -> Iterator[RunFinding]:
    plan, settings = known.plan, known.plan.adapter
    if settings.algorithm == "LoRA" and settings.conv_rank:
        limits = RUN_RULES["L016"].limits
        usual = plan.rank * (limits["share"] if plan.rank > limits["rank"] else 1)
        if plan.alpha > usual:
            yield _finding("L016", _set("trainer", "alpha", float(usual)), alpha=plan.alpha, rank=plan.rank)
    low, high = RUN_RULES["L014"].limits["rank"], RUN_RULES["L012"].limits["above"]
    if low < settings.conv_rank <= high and known.reads("rank"):
        yield _finding(
            "L014",
            _set("adapter", "conv_rank", 16),
            _set("adapter", "conv_alpha", 1.0),
            rank=settings.conv_rank,
            alpha=settings.conv_alpha,
        )


def _style(known: RunFacts) -> Iterator[RunFinding]:
    settings = known.plan.adapter
    algorithm, partly = settings.algorithm, settings.layers in ("attention", "attention+MLP")
    if known.style and (algorithm not in ("LoRA", "GLoRA", "IA3") or (algorithm == "LoRA" and partly)):
        changes = (_set("adapter", "algorithm", "LoRA"), _set("adapter", "layers", "full"))
        figures = {"images": known.images, "algorithm": algorithm, "layers": settings.layers}
        yield _finding("L017", *(each for each in changes if getattr(settings, each.option) != each.value), **figures)


def _data(known: RunFacts) -> Iterator[RunFinding]:
    plan, dataset, concepts = known.plan, known.dataset, known.concepts
    if len(concepts) > 1:
        count = len(concepts)
        if plan.batch_size > 1:
            yield _finding("L030", _set("trainer", "batch_size", 1), count=count, batch=plan.batch_size)
        mirrored = [index for index in concepts if dataset.concepts[index].images.flip]
        if mirrored:
            names = ", ".join(dataset.concepts[index].name or str(index) for index in mirrored)
            yield _finding("L031", _set("dataset", "flip", False), count=count, where=names)
        limit = RUN_RULES["L032"].limits["below"]
        if plan.rank < limit and plan.adapter.algorithm == "LoRA":
            yield _finding("L032", _set("trainer", "rank", int(limit)), count=count, rank=plan.rank, limit=limit)
    low, high = RUN_RULES["L033"].limits, RUN_RULES["L034"].limits
    wanted = low["style"] if known.style else low["wanted"]
    figures = {"shown": known.presentations, "wanted": low["wanted"], "style": low["style"]}
    if known.presentations < low["low"] * wanted:
        yield _finding("L033", *_length(known, wanted), **figures)
    elif known.presentations > high["high"] * wanted:
        yield _finding("L034", *_length(known, wanted), **figures)
    if plan.batch_size > RUN_RULES["L037"].limits["above"]:
        limit = RUN_RULES["L037"].limits["above"]
        yield _finding("L037", _set("trainer", "batch_size", 4), batch=plan.batch_size, limit=limit)
    if not dataset.members("validation") and known.images >= RUN_RULES["L061"].limits["images"]:
        yield _finding("L061", _set("dataset", "validation_split", 0.1))
    if not plan.run.save_every and known.total_steps >= RUN_RULES["L060"].limits["steps"]:
        yield _finding("L060", _set("run", "save_every", max(1, known.total_steps // 8)))


def _length(known: RunFacts, wanted: float) -> tuple[Change, ...]:
    return _set("trainer", "unit", "presentations per image"), _set("trainer", "length", int(wanted))


def _resolution(known: RunFacts) -> Iterator[RunFinding]:
    if not known.native:
        return
    sizes = [size for index in known.concepts for size in known.dataset.concepts[index].resolutions]
    side = max((width * height) ** 0.5 for width, height in sizes)
    figures = {"architecture": known.architecture, "native": known.native}
    change = _set("dataset", "resolution", known.native)
    if side > RUN_RULES["L035"].limits["factor"] * known.native:
        yield _finding("L035", change, side=side, **figures)
    elif side < RUN_RULES["L036"].limits["factor"] * known.native:
        yield _finding("L036", change, side=side, **figures)


def _objective(known: RunFacts) -> Iterator[RunFinding]:
    settings = known.plan.objective
    if settings.min_snr_gamma:
        limits = RUN_RULES["L041"].limits
        if not limits["low"] <= settings.min_snr_gamma <= limits["high"]:
            yield _finding("L041", _set("objective", "min_snr_gamma", 5.0), gamma=settings.min_snr_gamma)
        if not settings.debiased and known.noise:
            yield _finding("L040", _set("objective", "debiased", True))
    limit = RUN_RULES["L042"].limits["above"]
    if settings.noise_offset > limit:
        yield _finding("L042", _set("objective", "noise_offset", 0.05), offset=settings.noise_offset, limit=limit)


def _precision(known: RunFacts) -> Iterator[RunFinding]:
    if known.plan.run.parameter_dtype == "bf16":
        yield _finding("L063", _set("run", "parameter_dtype", "fp32"))
    if known.plan.run.compute_dtype == "fp32":
        yield _finding("L064", _set("run", "compute_dtype", "automatic"))


def _text(known: RunFacts) -> Iterator[RunFinding]:
    components, model = known.plan.components, known.plan.learning_rate
    for number, (rate, stop) in enumerate(zip(components.encoder_rates, components.encoder_stops, strict=True), 1):
        if not rate:
            continue
        free = components.train_model and not known.optimizer.one_rate
        if free and rate >= RUN_RULES["L050"].limits["share"] * model:
            change = _set("components", f"te{number}_learning_rate", model / 2)
            yield _finding("L050", change, number=number, rate=rate, model=model)
        if not stop and known.total_steps >= RUN_RULES["L051"].limits["steps"]:
            change = _set("components", f"te{number}_stop_after", known.total_steps // 3)
            yield _finding("L051", change, number=number, steps=known.total_steps)


_CHECKS = (
    *(_finds_rate, _rate, _warmup, _adapter, _convolutions, _style),
    *(_data, _resolution, _objective, _precision, _text),
)
