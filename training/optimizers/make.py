"""From settings to an optimizer.

* ``check_optimizer``: all that can be said of the settings before there is anything to train.
* ``make_optimizer``: imports what it needs only then, hands over the widgets and optimizer_args, and tries out on toy
  tensors that a run could be saved and go on exactly. The rates of the groups are for the loop to set at each step.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import importlib
import inspect
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..options import OptionError
from .arguments import known_arguments, read_arguments
from .state import pack, unpack
from .table import BY_NAME, OPTIMIZERS, PARAMETER_FREE, OptimizerInfo, offered

log = logging.getLogger(__name__)


def check_optimizer(settings: Any) -> None:
    """Raises OptionError for an optimizer, or arguments of it, that cannot be used."""
    row = OPTIMIZERS[settings.optimizer]
    check_installed(row)
    if row.name != BY_NAME and settings.optimizer_name:
        raise OptionError(
            f"optimizer_name is {settings.optimizer_name!r}, expected nothing: it has an effect only with the "
            f"optimizer {BY_NAME}"
        )
    row, _ = class_of(settings)
    used = {"beta1": len(row.betas) > 0, "beta2": len(row.betas) > 1, "epsilon": row.epsilon, "weight_decay": row.decay}
    for widget, default in _defaults(settings, used).items():
        value = getattr(settings, widget)
        if not used[widget] and value != default:
            raise OptionError(
                f"{widget} is {value!r}, expected {default!r}: {row.name} has no use for it; what it does know goes to "
                "optimizer_args"
            )
    arguments = keywords(settings)
    averaging, betas = saves_averages(settings), arguments.get("betas")
    if averaging and isinstance(betas, tuple | list) and betas and betas[0] == 0:
        raise OptionError(
            f"beta1 is 0, expected more: {row.name} could not tell the averaged weights, which are saved, from those "
            "it trains"
        )
    if averaging and settings.schedule != "constant":
        raise OptionError(
            f"schedule is {settings.schedule!r}, expected 'constant': {row.name} averages the weights instead of "
            "lowering the learning rate"
        )
    if settings.optimizer_args.strip() or settings.optimizer == BY_NAME:
        _build(settings, [{"params": [torch.zeros(2, 2)], "lr": 1.0}])


def check_installed(row: OptimizerInfo) -> None:
    """Raises OptionError, with what to install."""
    if not row.installed:
        raise OptionError(
            f"optimizer is {row.name!r}, expected one that is installed: pip install {row.package}, or choose one of "
            f"{', '.join(offered())}"
        )


def make_optimizer(settings: Any, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """``groups`` as torch's optimizers take them: ``params``, ``lr``."""
    row, _ = class_of(settings)
    rates = sorted({group["lr"] for group in groups})
    if row.one_rate and len(rates) > 1:
        raise OptionError(
            f"optimizer is {row.name!r}, expected one that can learn at several rates, such as AdamW or "
            f"ProdigyPlusScheduleFree: this run has {', '.join(f'{rate:g}' for rate in rates)}. Or set loraplus_ratio "
            "to 1, take lr= out of blocks, and give all components the trainer's learning_rate"
        )
    if row.package:
        check_saves(settings, groups[0]["params"][0].device, rates)
    return _build(settings, groups)


def saves_averages(settings: Any) -> bool:
    """Whether the optimizer averages the weights, so that others are saved than those it trains."""
    row, _ = class_of(settings)
    return row.schedule_free and bool(keywords(settings).get("use_schedulefree", True))


def class_of(settings: Any) -> tuple[OptimizerInfo, type[torch.optim.Optimizer]]:
    """The row and the class of the chosen optimizer; imports its package."""
    row = OPTIMIZERS[settings.optimizer]
    with _quiet():
        module = importlib.import_module(row.module)
    if row.name == BY_NAME:
        return _by_name(row, module, settings.optimizer_name)
    kind = getattr(module, row.kind)
    return row, _in_plain_steps(kind) if row.package == "torchao" else kind


def keywords(settings: Any) -> dict[str, Any]:
    """What the class is called with: the row's own, the widgets, then optimizer_args.

    A widget that was left alone leaves the choice of betas and epsilon to the optimizer's authors.
    """
    row, kind = class_of(settings)
    default = _defaults(settings, ("beta1", "beta2", "epsilon"))
    arguments = dict(row.arguments)
    if row.betas:
        changed = {place: getattr(settings, name) for place, name in enumerate(("beta1", "beta2"))}
        asked = {place: value for place, value in changed.items() if value != default[f"beta{place + 1}"]}
        arguments["betas"] = tuple(asked.get(place, own) for place, own in enumerate(row.betas))
    if row.epsilon and settings.epsilon != default["epsilon"]:
        arguments["eps"] = settings.epsilon
    if row.decay:
        arguments["weight_decay"] = settings.weight_decay
    return arguments | read_arguments(settings.optimizer_args, kind, row.name)


def check_saves(settings: Any, device: torch.device, rates: Sequence[float] = (1e-3,)) -> None:
    """Raises OptionError when a toy run that was saved and taken up again ends with other bits.

    The tensors are large enough for 8-bit states, and of every number of dimensions.
    """
    name = settings.optimizer_name or settings.optimizer
    option = "optimizer_name" if settings.optimizer_name else "optimizer"
    draws = torch.Generator().manual_seed(0)
    shapes = ((64, 64), (65, 64), (5,), (4, 3, 3, 3))
    start = [torch.randn(shape, generator=draws).to(device) for shape in shapes]
    gradients = [[torch.randn(shape, generator=draws).to(device) for shape in shapes] for _ in range(5)]

    def take(tensors: list[Tensor], optimizer: torch.optim.Optimizer, steps: Sequence[list[Tensor]]) -> None:
        for step in steps:
            for tensor, gradient in zip(tensors, step, strict=True):
                tensor.grad = gradient.clone()
            optimizer.step()

    def optimizer_of(tensors: list[Tensor]) -> torch.optim.Optimizer:
        parts = [{"params": tensors[place::2], "lr": rates[place % len(rates)]} for place in (0, 1)]
        return _build(settings, parts)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        whole = [tensor.clone().requires_grad_() for tensor in start]
        first = optimizer_of(whole)
        before = _random_state(device)
        try:
            take(whole, first, gradients[:3])
            tensors, facts = pack(first)
            tensors = {key: value.clone() for key, value in tensors.items()}
            resumed = [tensor.detach().clone().requires_grad_() for tensor in whole]
            take(whole, first, gradients[3:])
            second = optimizer_of(resumed)
            unpack(second, tensors, json.loads(json.dumps(facts)))
            take(resumed, second, gradients[3:])
        except OptionError:
            raise
        except Exception as error:
            raise OptionError(
                f"{option} is {name!r}, expected an optimizer that trains by gradients alone: {_said(error)}. Its "
                "arguments go to optimizer_args"
            ) from error
        if not torch.equal(before, _random_state(device)):
            raise OptionError(
                f"{option} is {name!r}, expected one that repeats itself: it draws from the global random generator, "
                "so a run could not be saved and go on exactly. Choose another"
            )
        ends = [pack(first), pack(second)]
    if _bytes(whole) != _bytes(resumed) or ends[0][1] != ends[1][1] or _bytes(ends[0][0]) != _bytes(ends[1][0]):
        raise OptionError(
            f"{option} is {name!r}, expected one whose state can be saved: after saving it goes on differently. "
            "Choose another"
        )


def _build(settings: Any, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    row, kind = class_of(settings)
    arguments = keywords(settings)
    if row.name == "AdamW":
        arguments["fused"] = groups[0]["params"][0].device.type in ("cpu", "cuda")
    own = [copy.copy(group) for group in groups]
    try:
        with _quiet():
            optimizer = kind(own, lr=max(group["lr"] for group in groups), **arguments)  # type: ignore[call-arg]
    except Exception as error:  # whatever a package thinks of its arguments
        option = "optimizer_name" if settings.optimizer_name else "optimizer_args"
        raise OptionError(
            f"{option} is {getattr(settings, option)!r}, expected what {row.name} accepts: {_said(error)}. "
            f"optimizer_args may set {', '.join(known_arguments(kind))}"
        ) from error
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def _by_name(row: OptimizerInfo, module: Any, asked: str) -> tuple[OptimizerInfo, type[torch.optim.Optimizer]]:
    """The row of one of the package's optimizers, made from what its class says of itself.

    Those that begin at a first guess ``d0`` (Prodigy, D-Adaptation) find one rate for all of their tensors. They take
    others and use the first, which nobody would notice.
    """
    names = sorted(module.get_supported_optimizers())
    if asked.lower() not in names:
        near = difflib.get_close_matches(asked.lower(), names, 5) or names
        raise OptionError(f"optimizer_name is {asked!r}, expected one of {BY_NAME}'s, such as {', '.join(near)}")
    kind = module.load_optimizer(asked)
    if "params" not in inspect.signature(kind).parameters:
        raise OptionError(f"optimizer_name is {asked!r}, expected one that is given parameters: it wants a whole model")
    known = known_arguments(kind)
    betas, finds_rate = known.get("betas"), "d0" in known or kind.__name__ in PARAMETER_FREE
    own = dataclasses.replace(
        row,
        name=kind.__name__,
        betas=betas if isinstance(betas, tuple) else (),
        decay="weight_decay" in known,
        epsilon=isinstance(known.get("eps"), float),
        arguments={"weight_decouple": True} if finds_rate and "weight_decouple" in known else {},
        finds_rate=finds_rate,
        one_rate="d0" in known,
        schedule_free=callable(getattr(kind, "train", None)),
    )
    return own, kind


def _in_plain_steps(kind: Any) -> type[torch.optim.Optimizer]:
    """torchao's steps without its compiler, which would work for seconds at each shape of an adapter.

    It wants rates as tensors; the loop sets numbers.
    """

    class Plain(kind):
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)
            with torch.compiler.set_stance("force_eager"):
                super().step()

    Plain.__name__, Plain.__signature__ = kind.__name__, inspect.signature(kind)  # type: ignore[attr-defined]
    return Plain


def _bytes(tensors: Sequence[Tensor] | Mapping[str, Tensor]) -> list[bytes]:
    listed = tensors.values() if isinstance(tensors, Mapping) else tensors
    dense = [one.detach().cpu().clone(memory_format=torch.contiguous_format).flatten() for one in listed]
    return [one.view(torch.uint8).numpy().tobytes() for one in dense]


def _random_state(device: torch.device) -> Tensor:
    """Of the global generators that an optimizer might draw from."""
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return torch.cat(states)


def _defaults(settings: Any, names: Any) -> dict[str, Any]:
    return {one.name: one.default for one in dataclasses.fields(settings) if one.name in names}


def _said(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What packages print or warn of while they are imported and made goes to the debug log."""
    chatty = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "bitsandbytes")]
    levels = [one.level for one in chatty]
    said = io.StringIO()
    try:
        for one in chatty:
            one.setLevel(logging.ERROR)
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(chatty, levels, strict=True):
            one.setLevel(level)
        if said.getvalue():
            log.debug("%s", said.getvalue().strip())
