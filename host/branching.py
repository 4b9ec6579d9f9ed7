"""LoRAs beside the weights: branches that hang on the model's layers while it is called, and only then.

* ``BranchedLoRA``: adapters on one MODEL and how strong they are, which may change over a run.
* ``Stack``: all of them on a MODEL, in the order of their loaders: one wrapper around the host's ``apply_model``.
  It is never changed: a loader puts a longer one on its clone, so other clones keep theirs.
* ``stack_on``, ``put``: the stack on a patcher.

Layers get a ``LayerBranch``; what is no product (norms, biases of their own, tables) is small and stands in the place
of the parameter for the time of a call.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..kernels.branches import LayerBranch, Vectors, fused, fused_bias
from ..kernels.strengths.schedule import Clock, ModelClock, Schedule
from .clocks import Course, RunSigmas, sigma_of
from .fusing import KEY
from .layers import HostLayer
from .targets import is_product

_OPTIONS = 5  # place of transformer_options among the arguments of apply_model


@dataclass(eq=False)
class Dial:
    """A factor that whoever made it turns between runs."""

    factor: float = 1.0


@dataclass(frozen=True)
class Strength:
    """``constant`` · ``dial`` · Π ``schedules``, by the clock of ``course``."""

    constant: float
    schedules: tuple[Schedule, ...] = ()
    course: Course = field(default_factory=Course)
    dial: Dial | None = None

    @classmethod
    def of(cls, schedules: tuple[Schedule, ...], course: Course) -> Strength:
        """The product of all; what never changes goes into the constant."""
        constants = [schedule.constant for schedule in schedules if schedule.constant is not None]
        changing = tuple(schedule for schedule in schedules if schedule.constant is None)
        constant = math.prod(constants)
        return cls(constant, changing, course) if changing and constant else cls(constant)

    @property
    def steady(self) -> float:
        """What of it stays the same over a run."""
        return self.constant if self.dial is None else self.constant * self.dial.factor

    @property
    def begin(self) -> float:
        """For what is asked once, before the run."""
        return self.constant * math.prod(schedule.points[0].weight for schedule in self.schedules)

    @property
    def greatest(self) -> float:
        """The constant times the farthest from zero that each schedule goes."""
        peaks = (max((point.weight for point in schedule.points), key=abs) for schedule in self.schedules)
        return self.constant * math.prod(peaks)

    def at(self, clock: Clock | ModelClock, sigma: float) -> float:
        return self.steady * math.prod(schedule.at(clock, sigma) for schedule in self.schedules)


@dataclass(frozen=True)
class BranchedLoRA:
    """``adapters`` and ``strengths`` by parameter ("….weight", "….scale")."""

    adapters: Mapping[str, Adapter]
    strengths: Mapping[str, Strength]


class _AlwaysOpen:
    """A gate for layers that are nobody's loan."""

    def open(self) -> bool:
        return True

    def check(self) -> None:
        pass


class _Layer(HostLayer):
    """A layer with its branch, and which of the stack's strengths are those of its adapters."""

    def __init__(self, module: Any, adapters: list[Adapter], which: tuple[int, ...]) -> None:
        super().__init__(module, None, _AlwaysOpen())
        self.branch, self.which = LayerBranch(adapters, self.geometry), which
        self.acting = self._below = False

    def hung_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._below:  # what was hung there meanwhile calls us: it found us there before
            return type(self.module).forward(self.module, x, *args, **kwargs)
        if not (self.acting and self.branch.acts):  # somebody may keep this longer than the call
            return self._forward_below(x, *args, **kwargs)
        if not self.had_own_forward and self.branch.prefers_weight(x) and self._resident(x):
            return self.branch.on_weight(x, self.module.weight, self.module.bias)
        return self.branch(x, self._forward_below(x, *args, **kwargs), self)

    def _forward_below(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.had_own_forward:
            return self.host_forward(x, *args, **kwargs)
        self._below = True
        try:
            return self.host_forward(x, *args, **kwargs)
        finally:
            self._below = False

    def hang(self) -> None:
        """Others may have replaced the forward since the last call, also by one of ours that they had found."""
        found = self.module.__dict__.get("forward")
        while isinstance(owner := getattr(found, "__self__", None), _Layer):
            del self.module.__dict__["forward"]
            if owner.had_own_forward and not isinstance(getattr(owner.host_forward, "__self__", None), _Layer):
                self.module.__dict__["forward"] = owner.host_forward
            found = self.module.__dict__.get("forward")
        self.had_own_forward = "forward" in self.module.__dict__
        self.host_forward = self.module.forward
        self.acting = True
        super().hang()

    def remove(self) -> None:
        self.acting = False
        super().remove()


class _Parameter:
    """A parameter whose place is taken by a merged one. They are small: merged anew for every call, since the host and
    others write into weights where they lie."""

    def __init__(self, module: nn.Module, name: str, adapters: list[Adapter], which: tuple[int, ...]) -> None:
        self.module, self.name, self.adapters, self.which = module, name, adapters, which
        self._merged: nn.Parameter | None = None
        self._original: nn.Parameter | None = None

    def hang(self, strengths: tuple[float, ...]) -> None:
        own = self.module._parameters[self.name]
        assert own is not None
        with torch.no_grad():
            parts = [(adapter.to(own.device), s) for adapter, s in zip(self.adapters, strengths, strict=True)]
            dense = own.detach().float()
            moved = fused_bias(dense, parts) if self.name == "bias" else fused(dense.clone(), parts)
            self._merged = nn.Parameter(moved.to(own.dtype), requires_grad=False)
        self._original, self.module._parameters[self.name] = own, self._merged

    def remove(self) -> None:
        if self._merged is not None and self.module._parameters[self.name] is self._merged:
            self.module._parameters[self.name] = self._original
        self._merged = self._original = None


class _Hung:
    """The branches of a stack on one loaded model, with the strengths they have at the moment."""

    def __init__(self, stack: Stack, model: nn.Module) -> None:
        self.layers: list[_Layer] = []
        self.parameters: list[_Parameter] = []
        self.run = RunSigmas()
        self._clocks: dict[Any, Clock | ModelClock] = {}
        self._values: tuple[float, ...] | None = None
        self._hangs = False
        self._links: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        for key, parts in stack.by_parameter().items():
            path, _, name = key.rpartition(".")
            module = self._found(model, path)
            if name == "bias" and is_product(module):
                continue  # the branch of the weight brings it along
            adapters, which = [adapter for adapter, _ in parts], tuple(number for _, number in parts)
            if name == "weight" and is_product(module):
                self.layers.append(_Layer(module, adapters, which))
            else:
                self.parameters.append(_Parameter(module, name, adapters, which))

    def _found(self, model: nn.Module, path: str) -> nn.Module:
        """The module at ``path``, noting the way to it."""
        for name in filter(None, path.split(".")):
            child = getattr(model, name)
            assert isinstance(child, nn.Module)
            if model._modules.get(name) is child:  # compiled networks give those of the network they stand for
                self._links[id(model), name] = model, name, child
            model = child
        return model

    def fits(self) -> bool:
        """Whether all modules are still where they were: nodes may exchange some of them for a clone."""
        return all(parent._modules.get(name) is child for parent, name, child in self._links.values())

    def clock(self, course: Course, run: tuple[float, ...] | None, sampling: Any) -> Clock | ModelClock:
        key = course, run, id(sampling)
        if key not in self._clocks:
            self._clocks = {known: clock for known, clock in self._clocks.items() if known[1:] == key[1:]}
            self._clocks[key] = course.clock_in(run, sampling)
        return self._clocks[key]

    @contextmanager
    def at(self, values: tuple[float, ...]) -> Iterator[None]:
        """On the model for a ``with``, at the ``values`` of the stack's strengths."""
        if self._hangs:  # another wrapper calls the model once more, inside of this call
            yield
            return
        if values != self._values:
            self._values = None
            vectors: Vectors = {}
            for layer in self.layers:
                layer.branch.set(tuple(values[number] for number in layer.which), vectors)
            self._values = values
        hung: list[_Layer | _Parameter] = []
        try:
            self._hangs = True
            for layer in self.layers:
                hung.append(layer)
                layer.hang()
            for parameter in self.parameters:
                hung.append(parameter)
                parameter.hang(tuple(values[number] for number in parameter.which))
            yield
        finally:
            self._hangs = False
            for thing in reversed(hung):
                thing.remove()

    def memory(self) -> int:
        """Bytes that this takes beyond the LoRAs themselves."""
        return sum(layer.branch.memory() for layer in self.layers)


# the stack that has last been hung on a model: one at a time keeps factors on the device
_last: WeakKeyDictionary[nn.Module, ref[Stack]] = WeakKeyDictionary()


class Stack:
    """The branched LoRAs of a MODEL. Called by the host around every call of the model."""

    def __init__(self, loras: tuple[BranchedLoRA, ...]) -> None:
        self.loras = loras
        found: dict[Strength, int] = {}
        for lora in loras:
            for strength in lora.strengths.values():
                found.setdefault(strength, len(found))
        self.strengths = tuple(found)
        self._number = found
        self._hung: WeakKeyDictionary[nn.Module, _Hung] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: Any) -> Stack:
        return self  # the host copies what hangs on a MODEL for every sampler

    def by_parameter(self) -> dict[str, list[tuple[Adapter, int]]]:
        """parameter → (adapter, number of its strength), in the order of the loaders."""
        found: dict[str, list[tuple[Adapter, int]]] = {}
        for lora in self.loras:
            for key, adapter in lora.adapters.items():
                found.setdefault(key, []).append((adapter, self._number[lora.strengths[key]]))
        return found

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        model = executor.class_obj
        options = args[_OPTIONS] if len(args) > _OPTIONS else kwargs.get("transformer_options", {})
        hung = self.hung_on(model)
        values = self._values(model, hung, options, args[1])
        if not any(values):
            return executor(*args, **kwargs)
        with hung.at(values):
            return executor(*args, **kwargs)

    def hung_on(self, model: nn.Module) -> _Hung:
        """Made on the first call, and kept until the model is unloaded or another stack is hung on it."""
        with self._lock:
            hung = self._hung.get(model)
            if hung is None or not hung.fits():
                release(model)
                hung = self._hung[model] = _Hung(self, model)
                _last[model] = ref(self)
            return hung

    def let_go(self, model: nn.Module) -> None:
        """Give back what was made for calls; the next one makes it anew."""
        self._hung.pop(model, None)

    def _values(self, model: Any, hung: _Hung, options: Mapping[str, Any], timestep: Any) -> tuple[float, ...]:
        if not any(strength.schedules for strength in self.strengths):
            return tuple(strength.steady for strength in self.strengths)
        sigma, run = sigma_of(options, timestep), hung.run.of(options)
        return tuple(
            strength.at(hung.clock(strength.course, run, model.model_sampling), sigma)
            if strength.schedules
            else strength.steady
            for strength in self.strengths
        )


def stack_on(patcher: Any) -> Stack | None:
    found = patcher.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return found[0] if found else None


def put(patcher: Any, lora: BranchedLoRA) -> None:
    """Add to the stack of ``patcher``, a clone that is the caller's."""
    before = stack_on(patcher)
    replace_stack(patcher, Stack((*(before.loras if before else ()), lora)))


def replace_stack(patcher: Any, stack: Stack) -> None:
    """``patcher`` is a clone that is the caller's."""
    patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, stack)
    if not patcher.get_callbacks(CallbacksMP.ON_DETACH, KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _detached)


def release(model: nn.Module) -> None:
    """Give back what lies beside a model for the last stack that was hung on it."""
    last = _last.pop(model, None)
    stack = None if last is None else last()
    if stack is not None:
        stack.let_go(model)


def _detached(patcher: Any, unpatch_all: bool) -> None:
    """The host has unloaded the model: what lay beside it on the device goes too."""
    if unpatch_all:
        release(patcher.model)
