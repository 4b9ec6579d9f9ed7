"""What a run knows and says of itself: its parts, its identity and recipe, the LoRA's metadata, the report."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..kernels.lora import LoRA
from ..kernels.metadata import training_metadata
from ..kernels.names import NameTable
from ..kernels.safetensors_io import LoraModel
from ..kernels.writing import to_state_dict
from ..training.dataset.captions import tags
from ..training.dataset.describe import options
from ..training.dataset.model import Dataset
from ..training.loop import Trainer
from ..training.settings import Plan
from .denoiser import prediction_of
from .identify import architecture
from .previews import Previews
from .runs import Run


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


@dataclass
class Session:
    """What the parts of a run share."""

    request: Request
    run: Run
    patcher: Any
    names: NameTable
    adapters: dict[str, LoRA]
    notes: list[str]
    recipe: dict[str, Any]
    validation: list[tuple[int, float]] = field(default_factory=list)  # (step, loss) of what is never trained on
    started: float = field(default_factory=time.time)


def identity(session: Session) -> dict[str, Any]:
    """What must be the same for a run to be continued: the shape of what is trained."""
    shapes = "\n".join(
        f"{path} {adapter.shape} {adapter.rank} {adapter.alpha}" for path, adapter in session.adapters.items()
    )
    plan = session.request.plan
    return {
        "base model": architecture(session.patcher.model)[0],
        "layers": plan.adapter.layers,
        "rank": plan.rank,
        "alpha": plan.alpha,
        "conv_rank": plan.adapter.conv_rank,
        "conv_alpha": plan.adapter.conv_alpha,
        "shapes": hashlib.sha256(shapes.encode()).hexdigest(),
    }


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, value in now.items():
        old = before.get(name)
        if isinstance(value, dict) and isinstance(old, dict):
            found.extend(changes(old, value, f"{prefix}{name}."))
        elif name == "fingerprint" and old != value:  # two hashes would tell nobody anything
            found.append("the dataset's images, captions or options")
        elif old != value:
            found.append(f"{prefix}{name} {old!r} → {value!r}")
    return found


def recipe(request: Request) -> dict[str, Any]:
    dataset = request.dataset
    return {
        **dataclasses.asdict(request.plan),
        "dataset": {
            "fingerprint": dataset.fingerprint(),
            "images": len(dataset.samples),
            "resolution": dataset.resolution,
            "options": options(dataset),
        },
    }


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
    )
    return LoraModel(to_state_dict(session.adapters, session.names.write), metadata, trained=True)


def _tag_counts(dataset: Dataset) -> dict[str, Counter[str]]:
    """Concept → how many of its captions have each tag."""
    counts: dict[str, Counter[str]] = {}
    for sample in dataset.samples:
        concept = dataset.of(sample)
        counts.setdefault(concept.name or "dataset", Counter()).update(tags(sample.caption, concept.captions.separator))
    return counts


def report(session: Session, trainer: Trainer) -> str:
    parameters = sum(tensor.numel() for tensor in trainer.parameters)
    losses = trainer.losses
    tail = losses[-max(1, len(losses) // 10) :]
    lines = [
        f"run {session.run.name!r}: {trainer.step_number} of {trainer.total_steps} steps",
        f"{len(session.adapters)} layers ({session.request.plan.adapter.layers}), {parameters:,} trained numbers",
    ]
    if losses:
        lines.append(f"loss {losses[0]:.4f} at first, {sum(tail) / len(tail):.4f} over the last {len(tail)} steps")
    if session.validation:
        curve = " → ".join(f"{loss:.4f} (step {step})" for step, loss in session.validation)
        lines.append(f"validation loss {curve}, at fixed noise")
    lines.append(f"kept in {session.run.folder}")
    return "\n".join(lines + [f"note: {note}" for note in session.notes])
