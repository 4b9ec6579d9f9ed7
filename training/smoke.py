"""Before the first step: do gradients reach everything that is trained, and what does a step cost?

* ``check_gradients``: one forward and backward on the first real batch, with nothing stepped, drawn or kept. Raises
  ``GradientError`` naming the first module that stops, breaks or spoils the gradient, and what to do about it.
  Adapters that have no part in the loss (layers that this model does not call) are told in a note.
* ``Smoke``: the bytes and seconds of that step, for ``estimate``.

A tensor without a gradient is judged by experiment: if moving it moves the loss, its gradient was lost on the way; if
not, there is none. A zero gradient is fine, fresh adapters have many. Gradients that are there are held against finite
differences along themselves, as far as the precision of the model allows: in-place blocks and half-detached layers give
gradients that look well and are wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..kernels.adapter import Adapter, Dropout
from ..kernels.dora import constant_norms
from .activations import Activations
from .estimate import SMALLER
from .gradient_trace import Trace
from .loop import Trainer

CURE = (
    "Leave that layer out (layer_filter of the adapter settings) or remove the node that put it there; if it belongs "
    "to the model itself, please report the family. smoke_test of the run settings switches this check off"
)

SLOPE_STEPS = (0.01, 0.005, 0.0025)  # parts of the loss by which the finite differences change it
FINE_STEP = 0.01 / 64
HALF_SCALES = (2.0**10, 1.0)  # of the loss in float16, whose small gradients would be lost


class GradientError(RuntimeError):
    """Gradients do not reach what is trained."""


@dataclass(frozen=True)
class Smoke:
    """What one step costs: ``kept``, ``block`` and ``away`` as ``Activations`` counts them for a batch of ``places``
    latent numbers; ``seconds`` of a forward and a backward; ``notes`` for the report.
    """

    kept: int
    block: int
    away: int
    places: int
    seconds: float
    notes: list[str] = field(default_factory=list)


def check_gradients(trainer: Trainer, modules: Mapping[str, nn.Module]) -> Smoke:
    """Run the first batch forward and backward; ``modules`` are those of the lent models by path, in forward order."""
    position = trainer.step_number * trainer.plan.optimizer.gradient_accumulation
    trainer.wake()
    with _without_dropout(trainer.adapters):
        try:
            smoke = _measured(trainer, position, modules)
            lost = {name: owner for name, owner in _owners(trainer).items() if owner.lost()}
            _check_finite(trainer, position, modules)
            notes = _judged(trainer, position, modules, lost) if lost else []
            _check_slope(trainer, position, modules)
        except RuntimeError as error:
            if _out_of_memory(error):
                raise type(error)(f"{_first_line(error)} Before the first step: {SMALLER}") from error
            if isinstance(error, GradientError):
                raise
            trace = _traced(trainer, position, modules)
            if trace.error is None:
                raise  # it has not happened again: not the model's own fault
            raise GradientError(f"smoke_test: {trace.broken()} ({_first_line(error)}). {CURE}") from error
        finally:
            trainer.drop_gradients()
    smoke.notes.extend(notes)
    return smoke


def _measured(trainer: Trainer, position: int, modules: Mapping[str, nn.Module]) -> Smoke:
    batch = trainer.examples.batch(position)
    weights = [t for m in modules.values() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))]
    parts, counted = trainer.terms(position), []
    while True:  # of the largest, for one part of the loss is differentiated before the next one is computed
        activations = Activations([*trainer.parameters, *weights])
        with activations.counting():  # autograd does not watch for writes in place now: no gradient is taken of it
            if next(parts, None) is None:
                break
        counted.append(activations)
    began = time.perf_counter()
    for scale in HALF_SCALES if trainer.scaler.is_enabled() else (1.0,):
        trainer.drop_gradients()
        for loss in trainer.terms(position):
            _backward(loss * scale if scale != 1 else loss)
        gradients = [tensor.grad for tensor in trainer.parameters if tensor.grad is not None]
        if scale != 1:
            torch._foreach_div_(gradients, scale)
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            break
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    seconds = time.perf_counter() - began
    kept, block, away = (max(getattr(one, what) for one in counted) for what in ("kept", "block", "away"))
    return Smoke(kept, block, away, batch.latents.numel(), seconds)


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # otherwise everything was cut off, which is found by what has no gradient
        loss.backward()


# -- what has no gradient


@dataclass(frozen=True)
class _Owner:
    """What a tensor without a gradient is a part of."""

    component: str
    tensors: list[Tensor]
    loose: bool = False

    def lost(self) -> bool:
        return any(tensor.requires_grad and tensor.grad is None for tensor in self.tensors)


def _owners(trainer: Trainer) -> dict[str, _Owner]:
    found = {}
    for part in trainer.components:
        for path, adapter in part.adapters.items():
            found[_name(part.name, path)] = _Owner(part.name, adapter.parameters())
        for name, tensor in part.loose.items():
            found[_name(part.name, name)] = _Owner(part.name, [tensor], loose=True)
    return found


def _name(component: str, path: str) -> str:
    return path if component == "model" else f"{component} {path}"


def _judged(
    trainer: Trainer, position: int, modules: Mapping[str, nn.Module], lost: Mapping[str, _Owner]
) -> list[str]:
    """Notes on what has no part in the loss; GradientError if there is something among it that has one."""
    layers = {name: owner for name, owner in lost.items() if not owner.loose}
    without = [tensor for owner in lost.values() for tensor in owner.tensors]
    everyone = _owners(trainer)
    if _moves_the_loss(trainer, position, without):
        trace = _traced(trainer, position, modules)
        raise GradientError(
            f"smoke_test: no gradient reaches {_listed(lost)}, although the loss depends on it: {trace.broken()}. "
            f"{CURE}"
        )
    for component in {owner.component for owner in layers.values()}:
        mine = [name for name, owner in everyone.items() if owner.component == component and not owner.loose]
        if all(name in layers for name in mine):
            what = "layers of the model" if component == "model" else f"layers of {component}"
            raise GradientError(
                f"smoke_test: none of the {len(mine)} trained {what} has a part in the loss ({_listed(layers)}). "
                "Choose others (layers, layer_filter), or do not train that component"
            )
    notes = []
    if layers:
        notes.append(
            f"{len(layers)} of {len(everyone)} adapters stay as they are, this model makes no use of their layers: "
            f"{_listed(layers)}. layer_filter can leave them out"
        )
    if words := [name for name, owner in lost.items() if owner.loose]:
        notes.append(f"the first batch trains no {_listed(words)}: its captions do not hold it")
    return notes


def _listed(names: Mapping[str, object] | list[str]) -> str:
    shown = list(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _moves_the_loss(trainer: Trainer, position: int, tensors: list[Tensor]) -> bool:
    """Whether other values in ``tensors`` give another loss."""
    before, again = _loss(trainer, position), _loss(trainer, position)
    draws = torch.Generator().manual_seed(0)
    with _moved(tensors, [0.1 * torch.randn(tensor.shape, generator=draws).to(tensor) for tensor in tensors]):
        moved = _loss(trainer, position)
    return abs(moved - before) > 1e-6 * abs(before) + 4 * abs(again - before)


@torch.no_grad()
def _loss(trainer: Trainer, position: int) -> float:
    return trainer.loss(position).item()


@contextmanager
def _moved(tensors: list[Tensor], by: list[Tensor]) -> Iterator[None]:
    """Other values for the time of a ``with``; the old ones come back to the last bit."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        with torch.no_grad():
            torch._foreach_add_(tensors, by)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, kept)


# -- where it goes wrong


def _check_finite(trainer: Trainer, position: int, modules: Mapping[str, nn.Module]) -> None:
    """GradientError where a gradient holds inf or NaN: the first step would end the run."""
    spoilt = [
        name
        for name, owner in _owners(trainer).items()
        if not all(tensor.grad is None or bool(tensor.grad.isfinite().all()) for tensor in owner.tensors)
    ]
    if not spoilt:
        return
    trace = _traced(trainer, position, modules)
    raise GradientError(
        f"smoke_test: the gradient of {_listed(spoilt)} is not finite: {trace.spoilt()}. Use compute_dtype fp32 or "
        "bf16 (run settings), or check that the model's own pictures are sound"
    )


def _check_slope(trainer: Trainer, position: int, modules: Mapping[str, nn.Module]) -> None:
    """GradientError where the loss does not follow the gradients: steps of several sizes that agree on it say so.

    Where they do not agree the loss is too rough to tell, as it is for adapters that were trained too fast. There they
    may agree by chance, but a far smaller step goes as it should; in half precision that one says nothing.
    """
    tensors = [tensor for tensor in trainer.parameters if tensor.grad is not None]
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    square = sum(gradient.double().square().sum().item() for gradient in gradients)
    if not square:
        return
    slopes: list[float] = []
    with constant_norms(trainer.adapters):
        whole = _loss(trainer, position) / square
        for part in SLOPE_STEPS:
            slope = _slope(trainer, position, tensors, gradients, part * whole)
            if slope is None or abs(slope - 1) < 0.3 or any(abs(slope - other) > _near(other) for other in slopes):
                return
            slopes.append(slope)
        fine = _slope(trainer, position, tensors, gradients, FINE_STEP * whole)
        if fine is not None and abs(fine - 1) < 0.3:
            return
    trace = _traced(trainer, position, modules)
    raise GradientError(
        f"smoke_test: the gradients are wrong, the loss changes {slopes[-1]:.2f} times as much as they say: "
        f"{trace.broken()}. {CURE}"
    )


def _near(slope: float) -> float:
    return 0.05 * abs(slope) + 0.01


def _slope(
    trainer: Trainer, position: int, tensors: list[Tensor], gradients: list[Tensor], step: float
) -> float | None:
    """Change of the loss along the gradients by what they predict; 1 where they are right, None where none is found."""
    losses, predicted = [], 0.0
    for sign in (1, -1):
        before = [tensor.detach().clone() for tensor in tensors]
        with _moved(tensors, [sign * step * gradient for gradient in gradients]):
            losses.append(_loss(trainer, position))
            moves = zip(tensors, before, gradients, strict=True)  # as far as their dtype let them move
            predicted += sign * sum(((t.detach() - b).double() * g).sum().item() for t, b, g in moves)
    slope = (losses[0] - losses[1]) / predicted if predicted else math.nan
    return slope if math.isfinite(slope) else None


def _traced(trainer: Trainer, position: int, modules: Mapping[str, nn.Module]) -> Trace:
    """The same step again, with every module watched."""
    trainer.drop_gradients()
    trace = Trace()
    with trace.watching(modules):
        try:
            with trace.forward():
                loss = trainer.loss(position)
            _backward(loss)
        except RuntimeError as error:
            trace.error = error
    return trace


@contextmanager
def _without_dropout(adapters: list[Adapter]) -> Iterator[None]:
    """An adapter that is left out by chance has no gradient either."""
    before = [adapter.dropout for adapter in adapters]
    for adapter in adapters:
        adapter.dropout = Dropout()
    try:
        yield
    finally:
        for adapter, dropout in zip(adapters, before, strict=True):
            adapter.dropout, adapter.seed = dropout, None


def _out_of_memory(error: RuntimeError) -> bool:
    """Devices other than CUDA say it in words only."""
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(word in str(error).lower() for word in words)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
