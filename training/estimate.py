"""What a run will need, before its first step: memory, steps, time.

* ``estimate``: from the step that the smoke test measured, scaled to the largest batch of the run.
* ``told``: the same as lines for the report, with what to change where it does not fit.

The activations are counted, not guessed: what the forward keeps for backward, and with checkpointing what the largest
block needs while it is run again. Gradients in flight come on top, a few per cent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .optimizers.table import OPTIMIZERS

if TYPE_CHECKING:
    from .loop import Trainer
    from .smoke import Smoke

SMALLER = (
    "switch on gradient_checkpointing (and then offload_activations) in the run settings, or lower batch_size or the "
    "resolution"
)


@dataclass(frozen=True)
class Estimate:
    """Bytes, numbers and seconds. ``adapters`` holds all copies of the trained tensors that live between steps;
    ``optimizer`` the state that its first step makes; ``away`` waits in main memory; ``weights`` is the base model.
    """

    numbers: int
    adapters: int
    gradients: int
    optimizer: int
    activations: int
    away: int
    weights: int
    free: int
    steps: int
    seconds: float

    @property
    def wanted(self) -> int:
        """What a step needs beside what is there before the first one."""
        return self.gradients + self.optimizer + self.activations


def estimate(trainer: Trainer, smoke: Smoke, largest: int, weights: int, free: int) -> Estimate:
    """``largest``: latent numbers of the largest batch; ``free``: bytes left on the device once the model is loaded."""
    share = largest / smoke.places
    numbers = sum(tensor.numel() for tensor in trainer.parameters)
    own = sum(tensor.nbytes for tensor in trainer.parameters)
    wide = 4 * numbers  # the optimizer and the average work in float32
    copies = 2 * own + (wide if trainer.average is not None else 0)  # the last good weights are kept too
    masters = wide if own < wide else 0  # there while the optimizer works
    micro = trainer.plan.optimizer.gradient_accumulation
    return Estimate(
        numbers=numbers,
        adapters=copies,
        gradients=own + 2 * masters,
        optimizer=round(OPTIMIZERS[trainer.plan.optimizer.optimizer].state_bytes * numbers),
        activations=round((smoke.kept + smoke.block) * share),
        away=round(smoke.away * share),
        weights=weights,
        free=free,
        steps=trainer.total_steps - trainer.step_number,
        seconds=smoke.seconds * micro,
    )


def told(found: Estimate, passes: str) -> list[str]:
    """Lines for the report; ``passes`` says how often the data set is gone through."""
    parts = [
        f"base weights {size(found.weights)}",
        f"{found.numbers:,} trained numbers {size(found.adapters)}",
        f"gradients {size(found.gradients)}",
        f"optimizer {size(found.optimizer)}",
        f"activations {size(found.activations)}",
    ]
    if found.away:
        parts.append(f"in main memory {size(found.away)}")
    lines = [
        f"expected memory: {', '.join(parts)}; {size(found.free)} are free",
        f"expected length: {found.steps} steps, {passes}, about {duration(found.steps * found.seconds)} at "
        f"{found.seconds:.2g} s/step",
    ]
    if found.wanted > found.free:
        lines.append(
            f"a step needs about {size(found.wanted)}, {size(found.wanted - found.free)} more than is free: if it runs "
            f"out of memory, or slowly because the host moves the model out of the way, {SMALLER}"
        )
    return lines


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.1f} MB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
