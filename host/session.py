"""One training run in the host, from the sockets of a node to a LoRA.

``train(request)``: check → encode data → borrow the model → step, save, preview → give back → LoRA, losses, report.
Previews and encoding run outside the loan, which is then taken again. Whatever ends the run, the host's model is as it
was, and what has been learned is in the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import comfy.model_management
import torch

from ..kernels.adapter import Adapter, Options
from ..kernels.layers import Target, select_targets
from ..kernels.lora import LoRA
from ..kernels.names import NameTable
from ..kernels.reading import read_lora
from ..kernels.safetensors_io import LoraModel
from ..training.dataset.balancing import presentations_per_image
from ..training.dataset.batches import BatchPlan
from ..training.dataset.describe import notes as dataset_notes
from ..training.loop import StepReport, Trainer, TrainingDivergedError, generator
from ..training.settings import OptionError, Plan
from . import record
from .denoiser import HostDenoiser, prediction_of
from .examples import HostExamples
from .loan import borrow
from .patched import trainable_clone
from .progress import Progress
from .record import Request, Session
from .runs import Run, RunError, open_run

# activations of a training step against the host's estimate for inference, without and with checkpointing
ACTIVATION_FACTORS = {False: 6.0, True: 2.0}


@dataclass
class Result:
    """``finished`` is False when the run ended before its last step."""

    lora: LoraModel
    losses: list[float]
    report: str
    finished: bool


def train(request: Request) -> Result:
    """Train, and return the LoRA with all there is to say.

    Raises ValueError subclasses for options and inputs that make no sense, before the first step; lets the host's
    interruption through after saving, unless the plan says to stop and keep.
    """
    _check_inputs(request)
    run = open_run(request.run_name, request.if_run_exists)
    patcher, notes = trainable_clone(request.model)
    session = _prepare(request, run, patcher, notes)
    plan = request.plan
    order = BatchPlan(request.dataset, plan.batch_size, plan.seed)
    session.notes.extend([*dataset_notes(request.dataset), *order.notes()])
    total = plan.steps_for(order.batches_in, presentations_per_image(request.dataset))
    examples = HostExamples(
        request.dataset, order, patcher, request.clip, request.vae, plan.optimizer.gradient_accumulation, total
    )
    with torch.inference_mode(False):
        return _run(session, examples, total)


def _check_inputs(request: Request) -> None:
    if request.clip is None:
        raise OptionError("clip is not connected: the captions are encoded with it. Connect the CLIP of the checkpoint")
    if request.vae is None:
        raise OptionError("vae is not connected: the images are encoded with it. Connect the VAE of the checkpoint")


def _prepare(request: Request, run: Run, patcher: Any, notes: list[str]) -> Session:
    plan, model = request.plan, patcher.model
    model_sampling = patcher.get_model_object("model_sampling")
    prediction_of(model_sampling)
    settings = plan.adapter
    targets = select_targets(model, settings.layers, settings.conv_rank > 0)
    if settings.conv_rank > 0 and not any(_is_spatial(target) for target in targets):
        notes.append(f"conv_rank has no effect: the layers of {settings.layers!r} hold no k×k convolution")
    names = NameTable.of(model)
    with torch.inference_mode(False):
        adapters = _fresh_adapters(plan, targets)
        if request.start_from is not None:
            note = _start_from(adapters, request.start_from, names)
            notes.append("start_from has no effect: the run goes on with its own weights" if run.exists() else note)
    session = Session(request, run, patcher, names, adapters, notes, record.recipe(request))
    _check_run(session)
    return session


def _is_spatial(target: Target) -> bool:
    return any(size > 1 for size in target.shape[2:])


def _fresh_adapters(plan: Plan, targets: list[Target]) -> dict[str, LoRA]:
    adapters = {}
    for index, target in enumerate(targets):
        spatial = _is_spatial(target)
        rank = plan.adapter.conv_rank if spatial else plan.rank
        alpha = plan.adapter.conv_alpha if spatial else plan.alpha
        adapters[target.path] = LoRA.create(target.shape, Options(rank, alpha), generator(plan.seed, "adapter", index))
    return adapters


def _start_from(adapters: dict[str, LoRA], given: LoraModel, names: NameTable) -> str:
    """Take over the plain LoRAs that ``given`` holds for the same layers; returns a note."""
    found = read_lora(given, names).adapters
    loaded = {path: adapter for path, adapter in found.items() if path in adapters and _is_pair(adapter)}
    if not loaded:
        raise OptionError(
            "start_from: none of its layers is trained here. It must be a LoRA for this MODEL, and the layers preset "
            "of the adapter settings must cover it"
        )
    alphas = set()
    for path, adapter in loaded.items():
        if adapter.rank != adapters[path].rank:
            raise OptionError(
                f"start_from has rank {adapter.rank} on {path}, rank is {adapters[path].rank}: "
                f"set rank (or conv_rank) to {adapter.rank}"
            )
        if adapter.alpha != adapters[path].alpha:
            alphas.add(adapter.alpha)
        adapters[path] = LoRA(adapter.down.float().clone(), adapter.up.float().clone(), adapter.alpha)
    unused = len(given) - sum(len(adapter.state()) for adapter in loaded.values())
    left = f", {unused} of its keys are not trained here" if unused > 0 else ""
    kept = f"; its alpha {', '.join(f'{value:g}' for value in sorted(alphas))} stays" if alphas else ""
    return f"started from the given LoRA on {len(loaded)} of {len(adapters)} layers{left}{kept}"


def _is_pair(adapter: Adapter) -> TypeGuard[LoRA]:
    """A LoRA without Tucker's core: all that is trained here so far."""
    return type(adapter) is LoRA and adapter.mid is None


def _run(session: Session, examples: HostExamples, total: int) -> Result:
    request, plan = session.request, session.request.plan
    device = session.patcher.load_device
    session.adapters = {path: adapter.to(device) for path, adapter in session.adapters.items()}
    trainer = Trainer(session.adapters, None, examples, plan, total, half_precision=_half_precision(session.patcher))
    _continue(session, trainer)
    progress = Progress(total, request.node_id)
    progress.advance(trainer.step_number)
    finished = True
    if not trainer.finished:
        _make_ready(session, trainer, examples, progress)  # data at fault ends the run before it leaves anything behind
    try:
        while not trainer.finished:
            _make_ready(session, trainer, examples, progress)
            _train_until_break(session, trainer, examples, progress)
            if request.previews is not None and not trainer.finished:
                _preview(session, trainer, progress, record.lora(session, trainer))
    except TrainingDivergedError as error:
        if trainer.step_number == 0:
            raise
        session.notes.append(f"STOPPED EARLY, the last good weights are kept. {error}")
        finished = False
    except comfy.model_management.InterruptProcessingException:
        _save(session, trainer, complete=False)
        if plan.run.on_cancel != "stop and keep":
            raise
        session.notes.append(f"stopped by you after {trainer.step_number} of {total} steps; queue again to go on")
        finished = False
    except BaseException:
        if trainer.intact:  # out of memory and the like: what has been learned is not lost
            _save(session, trainer, complete=False)
        raise
    lora = _save(session, trainer, complete=finished)
    if request.previews is not None and finished:
        _preview(session, trainer, progress, lora)
    return Result(lora, trainer.losses, record.report(session, trainer), finished)


def _preview(session: Session, trainer: Trainer, progress: Progress, lora: LoraModel) -> None:
    assert session.request.previews is not None
    progress.show(session.request.previews(session.run, trainer.step_number, lora))


def _half_precision(patcher: Any) -> bool:
    model = patcher.model
    return (model.manual_cast_dtype or model.get_dtype()) == torch.float16


def _make_ready(session: Session, trainer: Trainer, examples: HostExamples, progress: Progress) -> None:
    """Encode what the coming steps need, if it is not there yet."""
    if examples.ready(trainer.step_number):
        return

    def begin(count: int) -> Callable[[], None]:
        progress.tell(f"encoding {count} pictures and captions", now=True)
        if trainer.step_number:  # the bar shows the training already
            return lambda: None
        return Progress(count, session.request.node_id).advance

    with torch.inference_mode():
        examples.prepare(trainer.step_number, begin)


def _train_until_break(session: Session, trainer: Trainer, examples: HostExamples, progress: Progress) -> None:
    """One loan: steps until the run is done or something has to be done without the loan."""
    plan, request = session.request.plan, session.request
    every = getattr(request.previews, "every", 0)
    checkpoint = plan.run.gradient_checkpointing
    with borrow(
        session.patcher, session.adapters, checkpoint, _memory_required(session, trainer, examples, checkpoint)
    ) as loan:
        trainer.denoiser = HostDenoiser(loan)
        if not session.validation:
            _validate(session, trainer, examples)
        while not trainer.finished and examples.ready(trainer.step_number):
            comfy.model_management.throw_exception_if_processing_interrupted()
            began = time.perf_counter()
            report = trainer.step()
            progress.advance()
            progress.tell(_line(report, trainer.total_steps, time.perf_counter() - began), now=trainer.finished)
            if plan.run.save_every and report.step % plan.run.save_every == 0 and not trainer.finished:
                _save(session, trainer, complete=False)
            if trainer.finished:
                _validate(session, trainer, examples)
            if every and report.step % every == 0:
                return


def _validate(session: Session, trainer: Trainer, examples: HostExamples) -> None:
    if batches := examples.validation():
        session.validation.append((trainer.step_number, trainer.validation_loss(batches)))


def _memory_required(session: Session, trainer: Trainer, examples: HostExamples, checkpoint: bool) -> float:
    """Bytes beside the weights: activations, gradients and optimizer, generously."""
    shape = [examples.order.largest_batch, *examples.largest_latent().shape[1:]]
    adapters = sum(tensor.numel() * tensor.element_size() for tensor in trainer.parameters)
    return session.patcher.model.memory_required(shape) * ACTIVATION_FACTORS[checkpoint] + 5 * adapters


def _line(report: StepReport, total: int, seconds: float) -> str:
    pace = f"{1 / seconds:.2f} steps/s" if seconds < 1 else f"{seconds:.2f} s/step"
    return f"step {report.step}/{total} · loss {report.loss:.4f} · lr {report.learning_rate:.2e} · {pace}"


# -- going on, keeping, telling


def _check_run(session: Session) -> None:
    """Refuse a run that is there already and was made of other adapters."""
    run = session.run
    if not run.exists():
        return
    saved, wanted = run.facts()["identity"], record.identity(session)
    differing = [name for name, value in wanted.items() if saved.get(name) != value]
    if differing:
        name = differing[0]
        what = f"with another {name} ({saved.get(name)!r}, now {wanted[name]!r})"
        if name == "shapes":
            what = "for a MODEL with other layers, or from another LoRA at start_from"
        raise RunError(
            f"run_name: the run {run.name!r} was made {what}. Choose another run_name, or set if_run_exists to new"
        )


def _continue(session: Session, trainer: Trainer) -> None:
    run = session.run
    if not run.exists():
        return
    trainer.restore(run.state())
    changed = record.changes(run.facts()["recipe"], session.recipe)
    session.notes.append(f"went on with run {run.name!r} after step {trainer.step_number}")
    if changed:
        session.notes.append(f"changed since then, from here on: {', '.join(changed)}")
    if trainer.finished:
        session.notes.append("the run is complete, nothing was trained; a greater length goes on with it")


def _save(session: Session, trainer: Trainer, complete: bool) -> LoraModel:
    lora = record.lora(session, trainer)
    facts = {
        "identity": record.identity(session),
        "recipe": session.recipe,
        "step": trainer.step_number,
        "total": trainer.total_steps,
        "complete": complete,
    }
    session.run.write(trainer.state(), facts, lora)
    return lora
