"""One training run in the host, from the sockets of a node to a LoRA.

``train(request)``: check → encode data → borrow the model → step, measure, save, preview → give back → LoRA, losses,
report. Previews and encoding run outside the loan, which is then taken again. Whatever ends the run, the host's model
is as it was, and what has been learned is in the run folder (``keeping``).
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch

from ..kernels.core_reads import warnings
from ..kernels.names import NameTable, layer_shapes
from ..kernels.safetensors_io import LoraModel
from ..training.adapters import build
from ..training.dataset.balancing import presentations_per_image
from ..training.dataset.batches import TRAINED, BatchPlan
from ..training.dataset.describe import notes as dataset_notes
from ..training.embeddings import check_used, parse
from ..training.history import history_of
from ..training.learners import MODEL, Component, groups
from ..training.logs import Log, check_tensorboard, read_log
from ..training.loop import StepReport, Trainer, TrainingDivergedError
from ..training.objective import check_objective
from ..training.optimizers.make import check_saves
from ..training.options import OptionError
from ..training.starting import start_from
from . import keeping, record, steering
from .advice import advise
from .denoiser import HostDenoiser, prediction_of, zero_terminal_note
from .examples import HostExamples
from .families import check_family
from .layers import weight_reader
from .live import TRAININGS, Training
from .loan import Loan, borrow, undisturbed
from .patched import trainable_clone
from .precision import compute_dtype, host_dtype
from .preflight import memory_required, preflight
from .progress import Progress
from .record import Request, Session
from .runs import Run, open_run
from .text_loan import LiveText, borrow_text, is_text, text_components, trainable_clip

# activations of a training step against the host's estimate for inference, without and with checkpointing
ACTIVATION_FACTORS = {False: 6.0, True: 2.0}


@dataclass
class Result:
    """``finished`` is False when the run ended before its last step."""

    lora: LoraModel
    losses: list[float]
    report: str
    finished: bool
    training: Training  # as the page knows it


def train(request: Request) -> Result:
    """Train, and return the LoRA with all there is to say.

    Raises ValueError subclasses for options and inputs that make no sense, before the first step; lets the host's
    interruption through after saving, unless the plan says to stop and keep.
    """
    known = Training(request.run_name, request.node_id, request.previews is not None)
    with TRAININGS.begun(known) as training:
        result = _train(request, training)
        if not result.finished:
            training.end("stopped")
    return result


def _train(request: Request, training: Training) -> Result:
    _check_inputs(request)
    run = open_run(request.run_name, request.if_run_exists)
    with run.locked():
        check_family(request.model.model)
        patcher, notes = trainable_clone(request.model)
        session = _prepare(request, run, patcher, notes, training)
        plan = request.plan
        order = BatchPlan(request.dataset, plan.batch_size, plan.seed)
        session.notes.extend([*dataset_notes(request.dataset), *order.notes()])
        total = plan.steps_for(order.batches_in, presentations_per_image(request.dataset))
        prediction = prediction_of(patcher.get_model_object("model_sampling"))
        advice = advise(patcher.model, prediction, plan, order, total, request.node_id)
        session.notes.extend(finding.line() for finding in advice)
        if session.saved is not None:
            since = session.saved.step
            training.take_up(history_of(read_log(run.folder, since)), [at for at in run.previews() if at <= since])
        training.begin(run, total, patcher.load_device)
        keeping.choose_schedule(session, total, order.batches_in(1) / plan.optimizer.gradient_accumulation)
        examples = HostExamples(request.dataset, order, patcher, request.clip, request.vae, plan, total, session.live)
        with torch.inference_mode(False):
            return _run(session, examples, total)


def _check_inputs(request: Request) -> None:
    if request.clip is None:
        raise OptionError("clip is not connected: the captions are encoded with it. Connect the CLIP of the checkpoint")
    if request.vae is None:
        raise OptionError("vae is not connected: the images are encoded with it. Connect the VAE of the checkpoint")
    check_tensorboard(request.plan.run.tensorboard)


def _prepare(request: Request, run: Run, patcher: Any, notes: list[str], training: Training) -> Session:
    plan, model = request.plan, patcher.model
    model_sampling = patcher.get_model_object("model_sampling")
    check_objective(plan.objective, prediction_of(model_sampling))
    if plan.objective.zero_terminal_snr:
        notes.append(zero_terminal_note(model_sampling))
    names, saved = NameTable.of(model), run.saved()
    components: list[Component] = []
    with torch.inference_mode(False):
        if plan.components.train_model:
            built = build(model, plan, weight_reader(patcher))
            components.append(Component(MODEL, built.adapters, plan.learning_rate, factors=built.factors))
            notes.extend(built.notes)
        live = _prepare_text(request, components, notes)
        if live is not None:
            names = NameTable({**names.shapes, **layer_shapes(live.clip.cond_stage_model)})
        if request.start_from is not None:
            found = start_from(components, request.start_from, names)
            notes.extend(["start_from has no effect: the run goes on with its own weights"] if saved else found)
    notes.extend(warnings(adapter for component in components for adapter in component.adapters.values()))
    log = Log(run.folder, saved.step if saved else 0, plan.run.tensorboard, training.add)
    made_of = record.recipe(request)
    session = Session(request, run, patcher, names, components, notes, made_of, log, training, saved, live)
    session.compute_dtype = compute_dtype(plan.run.compute_dtype, patcher)
    keeping.check(session)
    return session


def _prepare_text(request: Request, components: list[Component], notes: list[str]) -> LiveText | None:
    """Adds what is trained of the text to ``components``; None where nothing is."""
    plan, dataset = request.plan, request.dataset
    if not plan.components.trains_text:
        return None
    shown = [dataset.samples[index] for index in dataset.members(*TRAINED)]
    options = [dataset.of(sample).captions for sample in shown]
    around = [text for one in options for text in (one.trigger, one.prefix, one.suffix)]
    check_used(parse(plan.components.embeddings), [*around, *(sample.caption for sample in shown)])
    clip, left_out = trainable_clip(request.clip)
    found, told = text_components(clip, plan)
    components.extend(found)
    notes.extend([*left_out, *told])
    return LiveText(clip, components)


def _run(session: Session, examples: HostExamples, total: int) -> Result:
    request, plan = session.request, session.request.plan
    device = session.patcher.load_device
    rates = {group.learning_rate for group in groups(session.components, plan.loraplus_ratio)}
    check_saves(plan.optimizer, device, sorted(rates))
    kept_in = torch.bfloat16 if plan.run.parameter_dtype == "bf16" else None
    for component in session.components:
        where = session.live.device if session.live is not None and is_text(component) else device
        component.adapters = {path: adapter.to(where, kept_in) for path, adapter in component.adapters.items()}
        component.loose = {name: tensor.to(where) for name, tensor in component.loose.items()}
    trainer = Trainer(
        session.components,
        None,
        examples,
        plan,
        total,
        half_precision=(session.compute_dtype or host_dtype(session.patcher)) == torch.float16,
        schedule=session.segments[-1].schedule(plan.optimizer),
    )
    trainer.device = device  # where the model computes, wherever the text does
    keeping.restore(session, trainer)
    progress = Progress(total, request.node_id)
    progress.advance(trainer.step_number)
    with session.log:
        finished = _train_to_the_end(session, trainer, examples, progress)
        lora = keeping.looked_at(session, trainer) if trainer.intact else record.lora(session, trainer)
        if request.previews is not None and finished:
            _last_preview(session, trainer, progress, lora)
    session.notes.extend(examples.notes())
    return Result(lora, trainer.losses, record.report(session, trainer), finished, session.training)


def _over(session: Session, trainer: Trainer) -> bool:
    return trainer.finished or session.stalled


def _train_to_the_end(session: Session, trainer: Trainer, examples: HostExamples, progress: Progress) -> bool:
    """All steps that are left, and what is kept of them. False when the run ended before its time, with the weights it
    ends with."""
    try:
        if not _over(session, trainer):
            _make_ready(session, trainer, examples, progress)  # data at fault ends the run before it leaves anything
            _try_out(session, trainer, examples, progress)
        while not _over(session, trainer):
            _make_ready(session, trainer, examples, progress)
            _train_until_break(session, trainer, examples, progress)
            if session.request.previews is not None and not _over(session, trainer):
                _preview(session, trainer, progress, keeping.looked_at(session, trainer))
        if trainer.step_number > session.kept:
            keeping.save(session, trainer, complete=True)
        else:
            session.run.keep(keeping.looked_at(session, trainer))  # it may have been deleted since
    except TrainingDivergedError as error:
        if trainer.step_number == 0:
            raise
        kept = keeping.keep_lora_only(session, trainer)
        session.training.why = f"the last good weights are kept. {error}"
        session.notes.append(f"STOPPED EARLY, {session.training.why} {kept}")
        return False
    except comfy.model_management.InterruptProcessingException:
        kept = keeping.keep_so_far(session, trainer)
        if not (trainer.step_number and _keeps_when_stopped(session)):
            progress.tell(f"stopped by you. {kept}", now=True)
            raise
        steps = f"{trainer.step_number} of {trainer.total_steps} steps"
        session.training.why = f"stopped by you after {steps}"
        session.notes.append(f"{session.training.why}; {'queue again to go on' if trainer.intact else kept}")
        return False
    except BaseException as error:  # out of memory and the like: what has been learned is not lost
        _tell(error, _kept_in_spite_of(error, session, trainer))
        raise
    return True


def _kept_in_spite_of(error: BaseException, session: Session, trainer: Trainer) -> str:
    traceback.clear_frames(error.__traceback__)  # they hold what a step had on the device, where saving needs room
    trainer.drop_gradients()
    try:
        return keeping.keep_so_far(session, trainer)
    except Exception as second:  # no disk, or no memory either
        return f"what was learned since step {session.kept} could not be saved: {second}"


def _tell(error: BaseException, text: str) -> None:
    """Add to what the host shows of an error; its kind stays, by which the host knows what to do."""
    if text and isinstance(error, OSError) and error.strerror:
        error.strerror = f"{error.strerror}\n\n{text}"
    elif text:
        error.args = (f"{error}\n\n{text}",)


def _keeps_when_stopped(session: Session) -> bool:
    return session.training.stopping or session.request.plan.run.on_cancel == "stop and keep"


def _preview(session: Session, trainer: Trainer, progress: Progress, lora: LoraModel) -> None:
    assert session.request.previews is not None
    with session.training.during("previewing"):
        sheet = session.request.previews(session.run, trainer.step_number, lora)
    progress.show(sheet)
    session.training.previewed(trainer.step_number)
    session.log.picture(trainer.step_number, "preview", sheet)


def _last_preview(session: Session, trainer: Trainer, progress: Progress, lora: LoraModel) -> None:
    """That of a run which is complete and kept, whatever becomes of the picture."""
    try:
        _preview(session, trainer, progress, lora)
    except comfy.model_management.InterruptProcessingException:
        if not _keeps_when_stopped(session):
            raise
        session.notes.append("the last preview was stopped by you")
    except BaseException as error:
        _tell(error, f"the preview failed, the run is complete: {session.run.lora_path}")
        raise


def _make_ready(session: Session, trainer: Trainer, examples: HostExamples, progress: Progress) -> None:
    """Encode what the coming steps need, if it is not there yet."""
    if examples.ready(trainer.step_number):
        return

    def begin(count: int) -> Callable[[], None]:
        progress.tell(f"encoding {count} pictures and captions", now=True)
        # once there are steps, the bar shows the training already
        bar = None if trainer.step_number else Progress(count, session.request.node_id)

        def advance() -> None:
            steering.stop_if_asked(session, trainer)
            if bar is not None:
                bar.advance()

        return advance

    with torch.inference_mode(), session.training.during("preparing"):
        examples.prepare(trainer.step_number, begin)


@contextmanager
def _lent(session: Session, trainer: Trainer, examples: HostExamples) -> Iterator[Loan]:
    """The model, and what of the text is trained, on loan to ``trainer``."""
    run, live = session.request.plan.run, session.live
    checkpoint, offload = run.gradient_checkpointing, run.offload_activations
    with ExitStack() as stack:
        memory = _memory_required(session, trainer, examples, checkpoint)
        if live is not None:
            stack.enter_context(borrow_text(live, checkpoint, memory, beside=[session.patcher], offload=offload))
        beside = [] if live is None else [live.clip.patcher]
        loan = stack.enter_context(
            borrow(
                session.patcher,
                session.adapters,
                checkpoint,
                memory,
                beside,
                offload=offload,
                compute_dtype=session.compute_dtype,
            )
        )
        trainer.denoiser = HostDenoiser(loan, session.request.plan.objective.zero_terminal_snr)
        yield loan


def _try_out(session: Session, trainer: Trainer, examples: HostExamples, progress: Progress) -> None:
    """One step without consequences: what it finds and needs is told before the first that counts."""
    if not session.request.plan.run.smoke_test:
        return
    progress.tell("trying out a step", now=True)
    with _lent(session, trainer, examples) as loan:
        texts = [] if session.live is None else [session.live.clip.cond_stage_model]
        session.estimate, notes = preflight(trainer, examples, loan, *texts)
    session.notes.extend(notes)
    progress.tell("\n".join(notes), now=True)


def _train_until_break(session: Session, trainer: Trainer, examples: HostExamples, progress: Progress) -> None:
    """One loan: steps until the run is done or something has to be done without the loan."""
    plan, request = session.request.plan, session.request
    every = getattr(request.previews, "every", 0)
    with _lent(session, trainer, examples):
        if not session.validation:
            keeping.validate(session, trainer, examples)
        while not _over(session, trainer) and examples.ready(trainer.step_number):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if steering.heed(session, trainer):
                return
            began = time.perf_counter()
            report = undisturbed(trainer.step)
            session.seconds.append(time.perf_counter() - began)
            session.log.after(report, session.seconds[-1])
            session.skipped += report.skipped
            session.idle += report.gradient_norm == 0
            progress.advance()
            progress.tell(_line(report, trainer.total_steps, session.seconds[-1]), now=trainer.finished)
            if trainer.finished or (plan.run.validate_every and report.step % plan.run.validate_every == 0):
                trainer.check_finite()
                keeping.validate(session, trainer, examples)
            if not _over(session, trainer) and _save_is_due(session, examples, report.step):
                trainer.check_finite()
                keeping.save(session, trainer, complete=False, on_the_way=True)
            if every and report.step % every == 0:
                return


def _save_is_due(session: Session, examples: HostExamples, step: int) -> bool:
    settings = session.request.plan.run
    if not settings.save_every or settings.save_unit == "steps":
        return bool(settings.save_every) and step % settings.save_every == 0
    accumulation = session.request.plan.optimizer.gradient_accumulation
    before, now = (examples.order.locate(count * accumulation)[0] for count in (step - 1, step))  # whole epochs
    return now // settings.save_every > before // settings.save_every


def _memory_required(session: Session, trainer: Trainer, examples: HostExamples, checkpoint: bool) -> float:
    """Bytes beside the weights: activations, gradients and optimizer, generously."""
    if session.estimate is not None:
        return memory_required(session.estimate)
    shape = [examples.order.largest_batch, *examples.largest_latent().shape[1:]]
    adapters = sum(tensor.numel() * tensor.element_size() for tensor in trainer.parameters)
    return session.patcher.model.memory_required(shape) * ACTIVATION_FACTORS[checkpoint] + 5 * adapters


def _line(report: StepReport, total: int, seconds: float) -> str:
    pace = f"{1 / seconds:.2f} steps/s" if seconds < 1 else f"{seconds:.2f} s/step"
    return f"step {report.step}/{total} · loss {report.loss:.4f} · lr {report.learning_rate:.2e} · {pace}"
