"""What a run knows and says of itself: its parts, its identity and recipe, the LoRA's metadata, the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..kernels.adapter import Adapter
from ..kernels.embeddings import bundle
from ..kernels.metadata import training_metadata
from ..kernels.names import NameTable
from ..kernels.safetensors_io import LoraModel, read_metadata
from ..kernels.writing import to_state_dict
from ..training.continuing import Segment
from ..training.dataset.captions import tags
from ..training.dataset.describe import options
from ..training.dataset.model import Concept, Dataset
from ..training.estimate import Estimate
from ..training.learners import MODEL, Component, groups
from ..training.logs import Log, band_names
from ..training.loop import Trainer
from ..training.runstate import Found
from ..training.settings import Plan
from .denoiser import prediction_of
from .fingerprints import base_of
from .identify import architecture
from .live import Training
from .previews import Previews
from .runs import Run
from .text_loan import LiveText, words_of

CURVE = 8  # measurements shown in the report


@dataclass(frozen=True)
class Request:
    """What the trainer node was given."""

    model: Any
    clip: Any | None
    vae: Any | None
    dataset: Dataset
    plan: Plan
    run_name: str
    if_run_exists: str = "continue"
    start_from: LoraModel | None = None
    node_id: str | None = None
    previews: Previews | None = None


class Measurement(NamedTuple):
    step: int
    loss: float

    @property
    def rank(self) -> float:
        return math.inf if math.isnan(self.loss) else self.loss


@dataclass
class Session:
    """What the parts of a run share."""

    request: Request
    run: Run
    patcher: Any
    names: NameTable
    components: list[Component]
    notes: list[str]
    recipe: dict[str, Any]
    log: Log
    training: Training  # what the page knows of the run
    saved: Found | None = None  # what the run goes on from
    live: LiveText | None = None  # where something of the text is trained
    compute_dtype: Any = None  # where it is not the host's own choice
    estimate: Estimate | None = None  # of what a step needs
    kept: int = 0  # step of the state on disk
    segments: list[Segment] = field(default_factory=list)  # schedules of the learning rate, the last one is followed
    validation: list[tuple[int, dict[float, float]]] = field(default_factory=list)  # (step, time → loss)
    seconds: list[float] = field(default_factory=list)  # of each step of this session
    skipped: int = 0  # steps in which half precision overflowed
    idle: int = 0  # steps in which nothing that is trained had a part
    started: float = field(default_factory=time.time)

    @property
    def lowest(self) -> Measurement:
        """The lowest validation loss so far, the first of equal ones."""
        return min((Measurement(step, mean(losses)) for step, losses in self.validation), key=lambda one: one.rank)

    @property
    def best(self) -> int | None:
        """The step with the lowest validation loss among those at which something had been learned."""
        learned = [Measurement(step, mean(losses)) for step, losses in self.validation if step]
        best = min(learned, key=lambda one: one.rank, default=None)
        return None if best is None or math.isnan(best.loss) else best.step

    @property
    def stalled(self) -> bool:
        """Whether the validation loss has not fallen for as long as the run bears."""
        patience = self.request.plan.run.early_stop
        if not patience or not self.validation:
            return False
        since = [step for step, _ in self.validation if step > self.lowest.step]
        return len(since) >= patience

    @property
    def adapters(self) -> dict[str, Adapter]:
        """Those on the diffusion model, by module path."""
        return next((part.adapters for part in self.components if part.name == MODEL), {})


def identity(session: Session) -> dict[str, Any]:
    """What must be the same for a run to be continued: the model, and what is trained in the order it is saved in."""
    names = {
        id(tensor): f"{part.name} {path} {adapter.alpha} {index}"
        for part in session.components
        for path, adapter in part.adapters.items()
        for index, tensor in enumerate(adapter.parameters())
    }
    names |= {id(tensor): f"{part.name} {name}" for part in session.components for name, tensor in part.loose.items()}
    trained = "\n".join(
        f"{names[id(tensor)]} {tuple(tensor.shape)}"
        for group in groups(session.components, session.request.plan.loraplus_ratio)
        for tensor in group.tensors
    )
    return {
        "base model": architecture(session.patcher.model)[0],
        "trained": hashlib.sha256(trained.encode()).hexdigest(),
    }


def recipe(request: Request) -> dict[str, Any]:
    """What the run is made of, as JSON gives it back."""
    base = base_of(request.model, request.clip, request.vae)
    whole = {**dataclasses.asdict(request.plan), "dataset": _facts(request.dataset), "base": base}
    return json.loads(json.dumps(whole))


def _facts(dataset: Dataset) -> dict[str, Any]:
    """``fingerprint`` is of everything, the others say what of it is different."""
    pictures = [
        (sample.id, sample.concept, sample.focus, sample.picture.fingerprint, sample.mask and sample.mask.fingerprint)
        for sample in dataset.samples
    ]
    return {
        "fingerprint": dataset.fingerprint(),
        "images": len(dataset.samples),
        "resolution": dataset.resolution,
        "concepts": [_concept(number, concept) for number, concept in enumerate(dataset.concepts, 1)],
        "options": options(dataset),
        "pictures": _hash(pictures),
        "captions": _hash([sample.caption for sample in dataset.samples]),
    }


def _concept(number: int, concept: Concept) -> str:
    """What ``options`` leaves out."""
    sizes = " ".join(f"{width}×{height}" for width, height in concept.resolutions)
    steps = f"{sizes} in steps of {concept.buckets.step}"
    return f"{concept.name or f'concept {number}'}: {concept.kind}, {steps}, repeats {concept.repeats}"


def _hash(facts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def lora(session: Session, trainer: Trainer) -> LoraModel:
    """What has been learned so far, with the recipe in its metadata."""
    plan, dataset, model = session.request.plan, session.request.dataset, session.patcher.model
    kind, version = architecture(model)
    prediction = prediction_of(session.patcher.get_model_object("model_sampling"))
    optimizer = plan.optimizer
    metadata = training_metadata(
        title=session.run.name,
        architecture=kind,
        base_model_version=version,
        rank=plan.rank,
        alpha=plan.alpha,
        conv_rank=plan.adapter.conv_rank or None,
        conv_alpha=plan.adapter.conv_alpha if plan.adapter.conv_rank else None,
        resolution=dataset.resolution,
        prediction_type=None if prediction.is_flow else prediction.value,
        recipe=session.recipe,
        learning_rate=plan.learning_rate,
        max_train_steps=trainer.total_steps,
        steps=trainer.step_number,
        batch_size=plan.batch_size,
        gradient_accumulation_steps=optimizer.gradient_accumulation,
        optimizer=optimizer.optimizer,
        lr_scheduler=optimizer.schedule,
        lr_warmup_steps=optimizer.warmup_steps,
        seed=plan.seed,
        num_train_images=len(dataset.samples),
        tag_frequency=_tag_counts(dataset),
        training_started_at=session.started,
        training_finished_at=time.time(),
        trigger_phrase=", ".join(words_of(session.components)) or None,
        extra={**_rates(session), **_as_kohya_calls(plan)},
    )
    adapters = {path: adapter for part in session.components for path, adapter in part.adapters.items()}
    embeddings = {name: tensor for part in session.components for name, tensor in part.loose.items()}
    tensors = to_state_dict(adapters, session.names.write) | bundle(embeddings)
    return LoraModel(tensors, metadata, trained=True)


def _as_kohya_calls(plan: Plan) -> dict[str, Any]:
    """Options under the names that kohya's trainers give them in metadata, for tools that know no recipe."""
    objective, adapter = plan.objective, plan.adapter
    huber = objective.loss in ("Huber", "smooth L1")
    named = {
        "loss_type": {"L2": None, "L1": "l1", "Huber": "huber", "smooth L1": "smooth_l1"}[objective.loss],
        "huber_c": objective.huber_c if huber else None,
        "huber_schedule": objective.huber_schedule.lower() if huber else None,
        "min_snr_gamma": objective.min_snr_gamma or None,
        "debiased_estimation": objective.debiased or None,
        "zero_terminal_snr": objective.zero_terminal_snr or None,
        "noise_offset": objective.noise_offset or None,
        "adaptive_noise_scale": objective.adaptive_noise_offset or None,
        "multires_noise_iterations": objective.multires_noise_iterations or None,
        "multires_noise_discount": objective.multires_noise_discount if objective.multires_noise_iterations else None,
        "ip_noise_gamma": objective.input_perturbation or None,
        "network_dropout": adapter.network_dropout or None,
        "scale_weight_norms": adapter.max_norm or None,
        "max_grad_norm": plan.optimizer.max_grad_norm,
    }
    return {name: value for name, value in named.items() if value is not None}


def _rates(session: Session) -> dict[str, Any]:
    """The learning rates of the parts, as kohya's trainers note them; None where a part is not trained."""
    rates = {part.name: part.learning_rate for part in session.components}
    encoders = [rate for name, rate in rates.items() if name.startswith("te")]
    return {"unet_lr": rates.get(MODEL), "text_encoder_lr": encoders or None}


def _tag_counts(dataset: Dataset) -> dict[str, Counter[str]]:
    """Concept → how many of its captions have each tag."""
    counts: dict[str, Counter[str]] = {}
    for sample in dataset.samples:
        concept = dataset.of(sample)
        counts.setdefault(concept.name or "dataset", Counter()).update(tags(sample.caption, concept.captions.separator))
    return counts


# -- the report


def report(session: Session, trainer: Trainer) -> str:
    lines = [
        f"run {session.run.name!r}: {trainer.step_number} of {trainer.total_steps} steps",
        *_trained(session, trainer),
        *_losses(trainer),
        *_measured(session),
        *_time(session),
        *_kept(session, trainer),
    ]
    return "\n".join(lines + [f"note: {note}" for note in session.notes])


def _trained(session: Session, trainer: Trainer) -> list[str]:
    numbers = f"{sum(tensor.numel() for tensor in trainer.parameters):,} trained numbers"
    parts = [
        f"{len(part.adapters)} layers ({session.request.plan.adapter.layers})"
        if part.name == MODEL
        else f"{part.name} with {len(part.adapters) or len(part.loose)} {'layers' if part.adapters else 'tensors'}"
        for part in session.components
    ]
    return [", ".join([*parts, numbers])]


def _losses(trainer: Trainer) -> list[str]:
    losses = trainer.losses
    if not losses:
        return []
    few = max(1, len(losses) // 10)
    lines = [f"loss {losses[0]:.4f} at first, {_mean(losses[-few:]):.4f} over the last {few} steps"]
    bands = []
    for name, column in zip(band_names(), zip(*trainer.bands, strict=True), strict=True):
        first, last = _mean(column[:few]), _mean(column[-few:])
        if not (math.isnan(first) or math.isnan(last)):
            bands.append(f"{name}: {first:.4f} → {last:.4f}")
    if bands and len(losses) > 1:
        lines.append(f"loss by timestep (0 is clean), first → last tenth of the steps: {', '.join(bands)}")
    return lines


def _measured(session: Session) -> list[str]:
    found = session.validation
    if not found:
        return []
    shown = found if len(found) <= CURVE else [*found[:1], *found[1 - CURVE :]]
    left = f" ({len(found) - len(shown)} measurements between the first two are left out)" if found != shown else ""
    curve = " → ".join(f"{mean(losses):.4f} (step {step})" for step, losses in shown)
    lines = [f"validation loss {curve}, at fixed noise{left}"]
    (_, first), (_, last) = found[0], found[-1]
    if len(found) > 1:
        each = ", ".join(f"{time:g}: {first[time]:.4f} → {last[time]:.4f}" for time in first if time in last)
        lines.append(f"validation by timestep (0 is clean): {each}")
        best = session.lowest
        lines.append(f"lowest validation loss {best.loss:.4f} at step {best.step}")
    return lines


def _time(session: Session) -> list[str]:
    if not session.seconds:
        return []
    skipped = f", {session.skipped} skipped because half precision overflowed" if session.skipped else ""
    idle = f", {session.idle} taught nothing because nothing that is trained had a part in them" if session.idle else ""
    return [f"{statistics.median(session.seconds):.2f} s per step{skipped}{idle}"]


def _kept(session: Session, trainer: Trainer) -> list[str]:
    run = session.run
    steps = len(run.steps())
    lines = [f"kept in {run.folder}{f', with the LoRAs of {steps} steps on the way' if steps else ''}"]
    best = run.lora_file("best")
    if session.request.plan.run.keep_best and best.exists():  # it may be of another session
        lines.append(f"the best on held-out pictures, of step {read_metadata(best)['ss_steps']}: {best.name}")
    if trainer.average is not None and run.lora_file("ema").exists():
        lines.append(f"moving average of {trainer.average.updates} steps: {run.lora_file('ema').name}")
    return lines


def mean(losses: Mapping[float, float]) -> float:
    return sum(losses.values()) / len(losses)


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
