"""What a run keeps, and how it is taken up again.

* ``check``: a run that is there already and cannot be gone on with is refused, before anything is encoded
* ``restore``: go on from a state: weights, optimizer, average, measurements, schedule; what is different is told
* ``save``: the LoRA, the one of this step, the moving average, then the state
* ``validate``: measure what is never trained on, and keep the best
* ``keep_so_far``: what can be kept when a run ends before its time; a good state is never replaced by a doubtful one
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..kernels.safetensors_io import LoraModel
from ..training.continuing import Segment, compare, first_segment, next_segments
from ..training.loop import State, Trainer
from ..training.options import OptionError
from . import record
from .examples import HostExamples
from .record import Session
from .runs import RunError

_FIXED = "fixed."  # tensors that adapters use and nobody trains


def check(session: Session) -> None:
    """Raises RunError for a saved run of another model or of options that cannot change, OptionError for options that
    this dataset makes no use of."""
    plan, dataset = session.request.plan, session.request.dataset
    for name in ("validate_every", "keep_best", "early_stop"):
        if getattr(plan.run, name) and not dataset.members("validation"):
            raise OptionError(
                f"{name} is {getattr(plan.run, name)!r}, but the dataset has no held-out pictures to measure: set "
                "validation_split, or give a concept the kind validation"
            )
    if session.saved is None:
        return
    facts, now = session.saved.facts, record.identity(session)
    if (was := facts["identity"]["base model"]) != now["base model"]:
        what = f"with another base model ({was!r}, now {now['base model']!r})"
    elif refused := compare(facts["recipe"], session.recipe).refused:
        options, reasons = zip(*(one.split(": ", 1) for one in refused), strict=True)
        what = f"with {' and '.join(options)}"
        raise _other_run(session, what, "; ".join(dict.fromkeys(reasons)))
    elif facts["identity"] != now:
        what = "for a MODEL with other layers, or from another LoRA at start_from"
    else:
        return
    raise _other_run(session, what)


def _other_run(session: Session, what: str, why: str = "") -> RunError:
    return RunError(
        f"run_name: the run {session.run.name!r} was made {what}. Choose another run_name, or set if_run_exists to new"
        f"{why and f' ({why})'}"
    )


# -- going on


def choose_schedule(session: Session, total: int, steps_per_epoch: float) -> None:
    """Sets ``session.segments``: the schedule of the whole run, or how a continued run goes on with its own."""
    settings = session.request.plan.optimizer
    if session.saved is None:
        session.segments = [first_segment(settings, total, steps_per_epoch)]
        return
    facts = session.saved.facts
    before = [Segment(**segment) for segment in facts["segments"]]
    changed = compare(facts["recipe"], session.recipe).schedule
    session.segments, new = next_segments(settings, total, steps_per_epoch, before, session.saved.step, changed)
    if new:
        why = "its options have changed" if changed else f"the one before was made for {before[-1].length} steps"
        session.notes.append(
            f"a new learning-rate schedule ({settings.schedule}) of {session.segments[-1].length} steps begins at step "
            f"{session.saved.step}: {why}. With horizon set to the whole length from the start, a run can be made "
            "longer as if it had never stopped"
        )


def restore(session: Session, trainer: Trainer) -> None:
    """Take up the saved run, if there is one."""
    saved, run = session.saved, session.run
    if saved is None:
        if run.lora_path.exists():
            session.notes.append(f"run {run.name!r} had no state to go on from: it began afresh, its LoRA is replaced")
        return
    facts, tensors = saved.facts, saved.tensors
    trainer.restore(State({n: t for n, t in tensors.items() if not n.startswith(_FIXED)}, facts["trainer"]))
    with torch.no_grad():
        for name, tensor in _fixed(session).items():
            tensor.copy_(tensors[_FIXED + name])
    session.kept = trainer.step_number
    session.notes.append(f"went on with run {run.name!r} after step {trainer.step_number}")
    changed = compare(facts["recipe"], session.recipe)
    measured = [(step, {float(time): loss for time, loss in losses}) for step, losses in facts["validation"]]
    if not measured or trainer.finished or not changed.measures:
        session.validation = measured
    else:
        why = "seed, dataset, objective or base changed"
        session.notes.append(f"held-out pictures are measured anew from here on: {why}")
    for fault in saved.damaged:
        session.notes.append(f"a newer state of it is of no use: {fault}")
    if changed.accepted:
        session.notes.append(f"changed since then, from here on: {', '.join(changed.accepted)}")
    if changed.base:
        session.notes.append(
            f"another base since then: {', '.join(changed.base)}. A run that goes on with it ends with another LoRA "
            "than one that was never interrupted"
        )
    fraction = any(0 < concept.captions.warmup_steps < 1 for concept in session.request.dataset.concepts)
    if fraction and trainer.total_steps != facts["total"]:
        session.notes.append("warmup_steps of the captions is a part of the run, which has another length now")
    if trainer.finished:
        session.notes.append("the run is complete, nothing was trained; a greater length goes on with it")
    elif session.stalled:
        session.notes.append(f"the run had ended: {_stalled(session)}; set early_stop to 0 to go on with it")


def _fixed(session: Session) -> dict[str, Tensor]:
    """What belongs to the adapters and is not trained, by name."""
    found = {}
    for component in session.components:
        for path, adapter in component.adapters.items():
            trained = {id(tensor) for tensor in adapter.parameters()}
            for name, tensor in adapter.tensors.items():
                if id(tensor) not in trained:
                    found[f"{component.name}.{path}.{name}"] = tensor
    return found


# -- keeping


def save(session: Session, trainer: Trainer, complete: bool, on_the_way: bool = False) -> LoraModel:
    """Keep everything; ``on_the_way`` also keeps the LoRA of this step."""
    with session.training.during("saving"):
        return _save(session, trainer, complete, on_the_way)


def _save(session: Session, trainer: Trainer, complete: bool, on_the_way: bool) -> LoraModel:
    run, settings, step = session.run, session.request.plan.run, trainer.step_number
    lora = looked_at(session, trainer)
    run.keep(lora)
    if on_the_way:
        run.keep_step(lora, step, settings.keep_last)
    if trainer.average is not None:
        with trainer.averaged():
            run.keep(record.lora(session, trainer), "ema")
    state = trainer.state()
    fixed = {_FIXED + name: tensor.detach().cpu() for name, tensor in _fixed(session).items()}
    facts = {
        "trainer": state.facts,
        "identity": record.identity(session),
        "recipe": session.recipe,
        "segments": [dataclasses.asdict(segment) for segment in session.segments],
        "validation": [[at, list(losses.items())] for at, losses in session.validation],
        "step": step,
        "total": trainer.total_steps,
        "complete": complete,
    }
    run.keep_state(step, {**state.tensors, **fixed}, facts)
    session.kept = step
    return lora


def looked_at(session: Session, trainer: Trainer) -> LoraModel:
    """The LoRA that is saved, shown and handed out."""
    with trainer.evaluation():
        return record.lora(session, trainer)


def keep_so_far(session: Session, trainer: Trainer) -> str:
    """Keep what has been learned, as far as it is sound; says what was kept."""
    if trainer.step_number == session.kept:
        return f"the run is kept up to step {session.kept}; queue again to go on" if session.kept else ""
    if trainer.intact and trainer.finite:
        save(session, trainer, complete=False)
        return f"the run is saved after step {session.kept}; queue again to go on"
    trainer.roll_back()
    return keep_lora_only(session, trainer)


def keep_lora_only(session: Session, trainer: Trainer) -> str:
    """Keep the weights that the trainer went back to; the optimizer is a step ahead of them, so no state is made."""
    lora = record.lora(session, trainer)
    session.run.keep(lora)
    kept = f"{session.run.lora_path.name} has the last good weights"
    if session.kept:
        return f"{kept}; queued again, the run goes on from its state of step {session.kept}"
    return f"{kept}; no state had been saved (save_every does that), so queued again the run begins afresh"


# -- measuring


def validate(session: Session, trainer: Trainer, examples: HostExamples) -> None:
    """Measure the loss on what is never trained on, if there is anything; keep the best."""
    with trainer.evaluation():
        batches = examples.validation()
        if not batches:
            return
        with session.training.during("validating"):
            losses = trainer.validation_losses(batches)
        session.validation.append((trainer.step_number, losses))
        session.log.validation(trainer.step_number, losses)
        if session.request.plan.run.keep_best and session.best == trainer.step_number:
            session.run.keep(record.lora(session, trainer), "best")
    if session.stalled and not trainer.finished:
        session.training.why = f"ended early: {_stalled(session)}"
        session.notes.append(session.training.why)


def _stalled(session: Session) -> str:
    best, loss = session.lowest
    return (
        f"the validation loss has not fallen for {session.request.plan.run.early_stop} measurements, it was lowest "
        f"({loss:.4f}) at step {best}"
    )
