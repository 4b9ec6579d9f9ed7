"""What learns in a run, and at which rate.

* ``Component``: the diffusion model, a text encoder or the embeddings, with what is trained on it.
* ``groups``: everything that is trained as groups of one learning rate, in an order that never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.adapter import Adapter

MODEL = "model"


@dataclass
class Component:
    """``adapters`` by the module paths of the component; ``loose`` tensors are trained as they are (embeddings).

    ``learning_rate`` is that of the component, ``factors`` multiply it for single paths, ``stop_after`` is the step
    after which it stays as it is (0: none), ``after_step`` is called behind every step until then.
    """

    name: str  # "model", "te1", "te2", "te3", "embeddings"
    adapters: dict[str, Adapter]
    learning_rate: float
    stop_after: int = 0
    factors: Mapping[str, float] = field(default_factory=dict)
    loose: dict[str, Tensor] = field(default_factory=dict)
    after_step: Callable[[], None] | None = None

    def active(self, step: int) -> bool:
        """Whether it learns in the step after ``step`` finished ones."""
        return not self.stop_after or step < self.stop_after


@dataclass(frozen=True)
class Group:
    """Tensors that learn at one rate."""

    component: str
    tensors: tuple[Tensor, ...]
    learning_rate: float
    stop_after: int = 0


def groups(components: Iterable[Component], loraplus_ratio: float = 1.0) -> list[Group]:
    """Everything that is trained. With ``loraplus_ratio`` the second factors learn that much faster (LoRA+)."""
    found: dict[tuple[str, float, int], list[Tensor]] = {}
    for component in components:
        for path, adapter in component.adapters.items():
            rate = component.learning_rate * component.factors.get(path, 1.0)
            fast = {id(tensor) for tensor in adapter.fast_parameters()} if loraplus_ratio != 1 else set()
            for tensor in adapter.parameters():
                own = rate * loraplus_ratio if id(tensor) in fast else rate
                found.setdefault((component.name, own, component.stop_after), []).append(tensor)
        if component.loose:
            key = (component.name, component.learning_rate, component.stop_after)
            found.setdefault(key, []).extend(component.loose.values())
    return [Group(name, tuple(tensors), rate, stop) for (name, rate, stop), tensors in found.items()]
