"""One training run: what the trainer node asks for itself, and the settings of its sockets."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

from ..optimizers import saves_averages
from ..options import Settings, check, option
from .adapter import AdapterSettings
from .components import ComponentSettings
from .objective import ObjectiveSettings
from .optimizer import OptimizerSettings
from .run import RunSettings

LORAPLUS = 16.0  # the ratio of the paper's experiments (Hayou, Ghosh & Yu 2024, arXiv:2402.12354)
LENGTH_UNITS = {
    "steps": "optimizer steps",
    "epochs": "passes over the data set",
    "presentations per image": "how often each image is shown",
}


@dataclass(frozen=True)
class Plan(Settings):
    """``length`` counts ``unit``s; ``steps_for`` turns it into optimizer steps. JSON and back loses nothing."""

    length: int = option(500, "How long to train, in units.", low=1, high=1000000, expected="1 or more")
    unit: str = option("steps", "What length counts.", choices=LENGTH_UNITS)
    learning_rate: float = option(
        2e-4,
        "1e-4 to 3e-4 suits AdamW on most models. Too high: the loss jumps. Too low: nothing is learned. Those that "
        "find their own rate (Prodigy, D-Adaptation) want 1.",
        low=1e-8,
        high=10.0,
        step=1e-5,
        expected="more than 0",
    )
    rank: int = option(
        16,
        "Size of the adapters, 8 to 32 is usual. Larger: more detail, larger files.",
        low=1,
        high=1024,
        expected="1 or more",
    )
    alpha: float = option(
        16.0,
        "The adapter acts with strength alpha / rank. alpha = rank is strength 1.",
        low=-1024.0,
        high=1024.0,
        step=0.5,
        expected="a number other than 0",
    )
    batch_size: int = option(
        1,
        "Images per step, all of one bucket. Larger is steadier, slower and needs more memory.",
        low=1,
        high=1024,
        expected="1 or more",
    )
    seed: int = option(
        0,
        "Drives everything random: initial weights, order, noise, timesteps. Same seed, same LoRA.",
        low=0,
        high=0xFFFFFFFFFFFFFFFF,
    )
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    run: RunSettings = field(default_factory=RunSettings)
    components: ComponentSettings = field(default_factory=ComponentSettings)

    def check_together(self) -> None:
        check(self.alpha != 0, "alpha", self.alpha, "a number other than 0")
        if saves_averages(self.optimizer):
            why = f"the averaged weights that {self.optimizer.optimizer} saves would not keep to it. Or choose AdamW"
            norm, keep = self.adapter.max_norm, self.components.preserve_embedding_norm
            check(not norm, "max_norm", norm, f"0: {why}")
            check(not keep, "preserve_embedding_norm", keep, f"False: {why}")

    @property
    def loraplus_ratio(self) -> float:
        """How many times faster the second factors of the adapters learn (LoRA+)."""
        automatic = LORAPLUS if self.adapter.algorithm == "LoRA" and "AdamW" in self.optimizer.optimizer else 1.0
        return self.adapter.loraplus_ratio or automatic

    def steps_for(self, batches_in: Callable[[int], int], presentations: Fraction = Fraction(1)) -> int:
        """Optimizer steps of the whole run.

        ``batches_in(n)``: batches in the first n epochs; ``presentations``: how often an epoch shows an image, in the
        mean over the images.
        """
        if self.unit == "steps":
            return self.length
        epochs = self.length if self.unit == "epochs" else self.length / presentations
        whole = math.floor(epochs)
        rest = (epochs - whole) * (batches_in(whole + 1) - batches_in(whole)) if epochs > whole else 0
        return max(1, math.ceil((batches_in(whole) + rest) / self.optimizer.gradient_accumulation))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


PARTS: dict[str, type[Settings]] = {
    "adapter": AdapterSettings,
    "optimizer": OptimizerSettings,
    "objective": ObjectiveSettings,
    "run": RunSettings,
    "components": ComponentSettings,
}


def plan_from_json(text: str) -> Plan:
    """The plan that ``Plan.to_json`` wrote; options it does not know yet have their defaults."""
    values = json.loads(text)
    for name, kind in PARTS.items():
        values[name] = kind(**values.get(name, {}))
    return Plan(**values)
