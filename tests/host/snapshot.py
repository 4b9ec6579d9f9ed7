"""Everything the host believes about a model, in a form that can be compared."""

from __future__ import annotations

import hashlib
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

_FLAGS = ("comfy_cast_weights", "prev_comfy_cast_weights", "comfy_patched_weights", "weight_function", "bias_function")


class Snapshot(dict):
    """What was seen → value. Objects stand for themselves by id; they are kept alive, so that no id is given twice."""

    def __init__(self, patcher: Any) -> None:
        super().__init__()
        self.alive: list[Any] = []
        model, management = patcher.model, comfy.model_management
        for path, module in model.named_modules():
            self._module(path, module)
        for key, entry in patcher.backup.items():
            self["backup", key] = (*self._tensor(entry.weight), entry.inplace_update)
        self["object backup"] = {key: self._id(value) for key, value in patcher.object_patches_backup.items()}
        if hasattr(model, "model_sampling"):  # text encoders have none
            self["model sampling"] = self._id(model.model_sampling)
            self["sampling object patch"] = self._id(patcher.get_model_object("model_sampling"))
        self["model options"] = _keys(patcher.model_options)
        self["patches"] = (sorted(patcher.patches), patcher.patches_uuid, model.current_weight_patches_uuid)
        self["injections"] = (sorted(patcher.injections), patcher.is_injected, patcher.skip_injection)
        self["wrappers"] = (_keys(patcher.wrappers), _keys(patcher.callbacks))
        self["whereabouts"] = (str(model.device), model.model_loaded_weight_memory, model.model_lowvram)
        self["loaded"] = [self._id(entry.model) for entry in management.current_loaded_models]
        self["in training"] = getattr(management, "in_training", None)
        self["modes"] = (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        self["global generator"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()

    def _id(self, value: Any) -> int:
        self.alive.append(value)
        return id(value)

    def _module(self, path: str, module: nn.Module) -> None:
        own = vars(module)
        self["attributes", path] = sorted(own)
        self["children", path] = {name: self._id(child) for name, child in module._modules.items()}
        self["training", path] = module.training
        self["forward", path] = self._id(own["forward"]) if "forward" in own else None
        for name in own:
            if "hook" in name:
                self[name, path] = sorted(own[name] or ())
        for name in _FLAGS:
            value = own.get(name)
            self[name, path] = [self._id(item) for item in value] if isinstance(value, list) else value
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                self["slot", f"{path}.{name}"] = None if tensor is None else self._tensor(tensor)

    def _tensor(self, tensor: Tensor) -> tuple:
        return (
            self._id(tensor),
            bits(tensor),
            tensor.device,
            tensor.dtype,
            tensor.data_ptr(),
            tensor.stride(),
            tensor.requires_grad,
            tensor.is_inference(),
            tensor.grad is None,
        )

    def differences(self, other: Snapshot) -> dict:
        keys = self.keys() | other.keys()
        return {key: (self.get(key), other.get(key)) for key in keys if self.get(key) != other.get(key)}


def bits(tensor: Tensor) -> str:
    """A hash of the values, bit for bit."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


def weights(patcher: Any) -> dict[str, str]:
    """Name → bits of every parameter and buffer."""
    model = patcher.model
    return {name: bits(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _keys(value: Any) -> Any:
    """The keys of nested dicts."""
    return {key: _keys(inner) for key, inner in value.items()} if isinstance(value, dict) else None
