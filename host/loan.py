"""Borrow the model the graph has loaded, train beside its weights, give it back as it was.

``borrow(patcher, …)`` is one ``with``:

* the host loads the model (its own memory management, the right weight patches on);
* plain resident parameters and buffers are replaced by aliases over the same storage, because autograd refuses the
  tensors that loaders make under inference mode; it costs no memory and no copy;
* every layer the host may cast, move or dequantise on use is asked through ``HostLayer``; adapters hang there;
* blocks that write in place are made safe, and checkpointed where wanted; the host's training flag is set;
* with ``compute_dtype`` the model computes in another precision while it is called for training: its weights stay as
  they are and are cast layer by layer;
* on every way out all of it is taken back. Slots that still hold an alias get their original tensor, slots the host
  has rewritten meanwhile (patches, unloading) keep what it wrote, and backups that hold an alias get the original;
* if the host puts other weights into the model during a loan (a preview with another LoRA), the next forward takes the
  loan anew, and a backward that is under way stops with ``WeightsChangedError`` before it can be wrong; ``undisturbed``
  then does the step again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import comfy.model_management
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from ..kernels.adapter import Adapter
from ..kernels.blocks import block_map, diffusion_tree
from ..training.checkpointing import block_modules, guarded
from .layers import HostLayer, is_host_layer
from .ropes import differentiable_ropes

Result = TypeVar("Result")


class WeightsChangedError(RuntimeError):
    """The host exchanged the weights between a forward and its backward."""


def undisturbed(step: Callable[[], Result]) -> Result:
    """``step()``, once more where the host moved weights in the middle of it; half a step has changed nothing."""
    try:
        return step()
    except (WeightsChangedError, CheckpointError):  # the latter where a block found them elsewhere when it ran again
        return step()


class Loan:
    """A model on loan: ``model`` is the host's BaseModel. Adapters act while ``using`` is entered, and in backward."""

    def __init__(
        self,
        patcher: Any,
        memory_required: float,
        beside: Sequence[Any] = (),
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        self.patcher, self.memory_required, self.beside = patcher, memory_required, tuple(beside)
        self.compute_dtype = compute_dtype
        self.model: Any = patcher.model
        self.network, self.prefix = diffusion_tree(self.model)
        self.device: torch.device = patcher.load_device
        self._open = False
        self._slots: list[_Slot] = []

    def open(self) -> bool:
        """Whether adapters act now; the host's own sampling inside a loan sees the untouched model."""
        return self._open or torch.is_grad_enabled()

    def take(self) -> None:
        """Let the host load the model with this patcher's patches, and put aliases over its weights."""
        with torch.inference_mode():  # as the host itself does: without it newer hosts copy what loaders have made
            comfy.model_management.load_models_gpu([self.patcher, *self.beside], memory_required=self.memory_required)
        self._slots = _slots(self.network)
        for slot in self._slots:
            slot.holder[slot.name] = slot.alias

    def give_back(self) -> None:
        slots, self._slots = self._slots, []
        _give_back(slots, self.patcher)

    def check(self) -> None:
        """Raises WeightsChangedError where the model holds other weights than those that were lent."""
        loaded = self.model.current_weight_patches_uuid
        if loaded != self.patcher.patches_uuid and (loaded is not None or self.patcher.patches):
            raise WeightsChangedError(
                "the host loaded other weights in the middle of a training step; run previews between steps"
            )

    @contextmanager
    def using(self, adapters: bool = True) -> Iterator[None]:
        """One call of the model, with the adapters acting or (outside autograd) without them."""
        if self.model.current_weight_patches_uuid != self.patcher.patches_uuid:
            self.give_back()
            self.take()
        before, self._open = self._open, adapters
        try:
            with self._computing():
                yield
        finally:
            self._open = before

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """What the model makes of its inputs is what all of its layers compute in."""
        if self.compute_dtype is None:
            yield
            return
        before, self.model.manual_cast_dtype = self.model.manual_cast_dtype, self.compute_dtype
        try:
            yield
        finally:
            self.model.manual_cast_dtype = before


@contextmanager
def borrow(
    patcher: Any,
    adapters: Mapping[str, Adapter] | None = None,
    checkpoint: bool = False,
    memory_required: float = 0,
    beside: Sequence[Any] = (),
    *,
    offload: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Iterator[Loan]:
    """Lend ``patcher``'s model for training, with ``adapters`` (module path → adapter) hanging on its layers.

    ``memory_required`` is what training needs beside the weights, in bytes; ``beside`` are the patchers of models that
    have to stay loaded at the same time. With ``offload`` what checkpointed blocks keep waits in main memory;
    ``compute_dtype`` None is the host's own choice. Raises KeyError for a path that names no layer. Inside, autograd is
    on and inference mode is off.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        loan = Loan(patcher, memory_required, beside, compute_dtype)
        stack.callback(loan.give_back)
        loan.take()
        stack.enter_context(_training_flag())
        stack.enter_context(differentiable_ropes())
        stack.enter_context(_hung(loan, adapters or {}))
        stack.enter_context(guarded(block_modules(_blocks(loan.model)), checkpoint, offload))
        yield loan


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(path) for block in block_map(model) for path in block.modules]


@contextmanager
def _training_flag() -> Iterator[None]:
    """Newer hosts choose differentiable kernels by a process-wide flag."""
    management = comfy.model_management
    if not hasattr(management, "in_training"):
        yield
        return
    before = management.in_training
    management.in_training = True
    try:
        yield
    finally:
        management.in_training = before


@contextmanager
def _hung(loan: Loan, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    prefix = loan.prefix
    modules = dict(loan.network.named_modules())
    missing = [path for path in adapters if path.removeprefix(prefix) not in modules]
    if missing:
        raise KeyError(f"this model has no layer {missing[0]} (and {len(missing) - 1} more)")
    layers = [
        HostLayer(module, adapters.get(prefix + name), loan)
        for name, module in modules.items()
        if is_host_layer(module)
    ]
    try:
        for layer in layers:
            layer.hang()
        yield
    finally:
        for layer in layers:
            layer.remove()


@dataclass
class _Slot:
    """One place in the module tree that holds an alias of ``original``."""

    holder: dict[str, Any]
    name: str
    original: Tensor
    alias: Tensor


def _slots(network: nn.Module) -> list[_Slot]:
    slots: list[_Slot] = []
    memo: dict[int, Tensor] = {}  # tied tensors stay tied
    for module in network.modules():
        if hasattr(module, "_v"):  # dynamically managed by the host: its weights are never resident
            continue
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if tensor is None or type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
                    continue
                if id(tensor) not in memo:
                    memo[id(tensor)] = _alias(tensor)
                slots.append(_Slot(holder, name, tensor, memo[id(tensor)]))
    return slots


def _alias(tensor: Tensor) -> Tensor:
    """A normal tensor over the same storage; the caller has inference mode off."""
    bare = _over_the_same_storage(tensor)
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare


def _over_the_same_storage(tensor: Tensor) -> Tensor:
    """Normal outside inference mode, an inference tensor inside; a view or ``.data`` would stay what it is."""
    bare = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return bare.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _give_back(slots: list[_Slot], patcher: Any) -> None:
    originals = {id(slot.alias): slot.original for slot in slots}
    for slot in slots:
        if slot.holder.get(slot.name) is not slot.alias:
            continue  # the host has put something else there, and means it
        _follow(slot.original, slot.alias)
        slot.holder[slot.name] = slot.original
    backup = patcher.backup
    for key, entry in list(backup.items()):
        original = originals.get(id(getattr(entry, "weight", None)))
        if original is not None:
            backup[key] = entry._replace(weight=original)


def _follow(original: Tensor, alias: Tensor) -> None:
    """The host moves a model by rewriting ``.data``; what it did to the alias is done to the original."""
    same = original.data_ptr() == alias.data_ptr() and original.dtype == alias.dtype
    if same and original.device == alias.device:
        return
    with torch.inference_mode(original.is_inference()):  # the two kinds must not be mixed in one tensor
        original.data = _over_the_same_storage(alias)
