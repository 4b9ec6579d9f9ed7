"""What an optimizer remembers, as plain tensors and facts that JSON can hold, and back to the last bit.

* Nothing is cast, whatever the parameters' dtype: moments, codes, scales and counters come back as they were.
* Quantised tensors are taken apart into the plain ones they are made of; tensors that are one stay one.
* Of a group only what changes while training is kept. Its arguments are the settings' affair: those of the run that
  goes on hold.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..options import OptionError

Facts = dict[str, Any]


def pack(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], Facts]:
    """(tensors by "<index of the parameter>.<name>", facts that JSON can hold)."""
    writer = _Writer(type(optimizer).__name__)
    parameters = [
        writer.mapping(str(index), optimizer.state[one], one.device) if one in optimizer.state else None
        for index, one in enumerate(_parameters(optimizer))
    ]
    state: Mapping[Any, Any] = optimizer.state  # some packages keep what all parameters share by words
    shared = {key: value for key, value in state.items() if isinstance(key, str)}
    arguments = _arguments(optimizer)
    groups = [
        writer.mapping(
            f"group{index}", {key: value for key, value in group.items() if key not in arguments}, torch.device("cpu")
        )
        for index, group in enumerate(optimizer.param_groups)
    ]
    facts: Facts = {"parameters": parameters, "groups": groups}
    if shared:
        facts["shared"] = writer.mapping("shared", shared, torch.device("cpu"))
    return writer.tensors, facts


def unpack(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """The state that ``pack`` took, for an optimizer made of the same settings and groups."""
    parameters = list(_parameters(optimizer))
    if len(facts["parameters"]) != len(parameters) or len(facts["groups"]) != len(optimizer.param_groups):
        raise ValueError("the saved state belongs to another optimizer or other layers")
    reader = _Reader(optimizer, tensors)
    optimizer.state.clear()
    for parameter, fact in zip(parameters, facts["parameters"], strict=True):
        if fact is not None:
            optimizer.state[parameter] = reader.mapping(fact, parameter.device)
    optimizer.state.update(reader.mapping(facts.get("shared", {}), parameters[0].device))  # type: ignore[arg-type]
    for group, fact in zip(optimizer.param_groups, facts["groups"], strict=True):
        group.update(reader.mapping(fact, group["params"][0].device))


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _arguments(optimizer: torch.optim.Optimizer) -> set[str]:
    return {"params", *inspect.signature(type(optimizer)).parameters}


class _Writer:
    """Turns values into facts; what JSON has no word for becomes a mapping of one entry that names its kind."""

    def __init__(self, optimizer: str) -> None:
        self.optimizer, self.tensors = optimizer, dict[str, Tensor]()
        self._seen: dict[tuple[Any, ...], str] = {}

    def mapping(self, name: str, values: Mapping[str, Any], home: torch.device) -> Facts:
        return {key: self.fact(f"{name}.{key}", value, home) for key, value in values.items()}

    def fact(self, name: str, value: Any, home: torch.device) -> Any:
        if isinstance(value, Tensor):
            return self.tensor(name, value, home)
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        if type(value) in (tuple, list, torch.Size):
            items = [self.fact(f"{name}.{index}", item, home) for index, item in enumerate(value)]
            return items if type(value) is list else {"tuple": items}
        if type(value) is dict:
            keys, values = [self.fact(name, key, home) for key in value], self.mapping(name, value, home)
            return {"mapping": [[key, fact] for key, fact in zip(keys, values.values(), strict=True)]}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        raise OptionError(
            f"optimizer is {self.optimizer!r}, expected one whose state can be saved: its {name} is a "
            f"{type(value).__name__}. Choose another optimizer"
        )

    def tensor(self, name: str, value: Tensor, home: torch.device) -> Facts:
        if hasattr(value, "__tensor_flatten__"):
            parts, context = value.__tensor_flatten__()
            inner = {part: self.tensor(f"{name}.{part}", getattr(value, part), home) for part in parts}
            return {"made of": inner, "kind": type(value).__name__, "context": self.fact(name, context, home)}
        key = (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)
        known = self._seen.setdefault(key, name) if value.numel() else name
        if known == name:
            self.tensors[name] = value.detach()
        fact: Facts = {"tensor": known}
        if not value.is_contiguous():  # the order in memory is the order of sums
            fact["strides"] = list(value.stride())
        if value.device.type == "cpu" and home.type != "cpu":
            fact["at"] = "paged" if getattr(value, "is_paged", False) else "cpu"
        return fact


class _Reader:
    def __init__(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer, self.saved = optimizer, tensors
        self._made: dict[tuple[str, torch.device], Tensor] = {}

    def mapping(self, facts: Mapping[str, Any], home: torch.device) -> dict[str, Any]:
        return {key: self.value(fact, home) for key, fact in facts.items()}

    def value(self, fact: Any, home: torch.device) -> Any:
        if isinstance(fact, list):
            return [self.value(item, home) for item in fact]
        if not isinstance(fact, dict):
            return fact
        if "tensor" in fact:
            return self.tensor(fact, home)
        if "made of" in fact:
            inner = {part: self.tensor(below, home) for part, below in fact["made of"].items()}
            return _wrapper(fact["kind"]).__tensor_unflatten__(inner, self.value(fact["context"], home), None, None)
        if "tuple" in fact:
            return tuple(self.value(item, home) for item in fact["tuple"])
        if "mapping" in fact:
            return {self.value(key, home): self.value(below, home) for key, below in fact["mapping"]}
        if "dtype" in fact:
            return getattr(torch, fact["dtype"])
        return float(fact["float"])

    def tensor(self, fact: Facts, home: torch.device) -> Tensor:
        saved, at = self.saved[fact["tensor"]], fact.get("at")
        if at == "paged" and home.type != "cpu":
            like = torch.empty(saved.shape, dtype=saved.dtype, device=home)
            return self.optimizer.get_state_buffer(like, dtype=saved.dtype).copy_(saved)  # type: ignore[attr-defined]
        device = torch.device("cpu") if at == "cpu" else home
        key = (fact["tensor"], device)
        if key not in self._made:
            strides = fact.get("strides", saved.stride())
            made = torch.empty_strided(saved.shape, strides, dtype=saved.dtype, device=device)
            self._made[key] = made.copy_(saved)
        return self._made[key]


def _wrapper(kind: str) -> Any:
    """The classes of quantised tensors that optimizers keep; no others are made from a file."""
    from torchao.optim.subclass_4bit import OptimState4bit
    from torchao.optim.subclass_8bit import OptimState8bit
    from torchao.optim.subclass_fp8 import OptimStateFp8

    return {one.__name__: one for one in (OptimState4bit, OptimState8bit, OptimStateFp8)}[kind]
