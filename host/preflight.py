"""Before the first step: gradients tried, memory and time told.

What ``preflight`` measures in a short loan is what the loans after it ask the host to keep free.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management

from ..training.dataset.balancing import presentations_per_image
from ..training.estimate import Estimate, estimate, told
from ..training.loop import Trainer
from ..training.smoke import check_gradients
from .examples import HostExamples
from .loan import Loan

MARGIN = 1.2  # gradients in flight and workspaces, on top of what was counted


def preflight(trainer: Trainer, examples: HostExamples, loan: Loan, *others: Any) -> tuple[Estimate, list[str]]:
    """The estimate and notes for the report. ``others`` are further lent module trees (text encoders).

    Raises GradientError where training would go wrong.
    """
    modules = {name: module for tree in (*others, loan.model) for name, module in tree.named_modules()}
    smoke = check_gradients(trainer, modules)
    largest = examples.order.largest_batch * examples.largest_latent().numel()
    free = comfy.model_management.get_free_memory(loan.device)
    found = estimate(trainer, smoke, largest, loan.patcher.model_size(), int(free))
    return found, [*told(found, _passes(trainer, examples)), *smoke.notes]


def _passes(trainer: Trainer, examples: HostExamples) -> str:
    epochs = examples.order.epochs_at(trainer.total_steps * trainer.plan.optimizer.gradient_accumulation)
    shown = epochs * float(presentations_per_image(examples.dataset))
    return f"{epochs:.3g} passes over the data set, each image shown {shown:.3g} times"


def memory_required(found: Estimate) -> float:
    """Bytes that the host should leave free beside the weights."""
    return MARGIN * found.wanted
