"""What a patched MODEL brings along into training, and what stays outside.

Kept: LoRAs already applied (patches on weights, and those that hang beside them), the sampling object (prediction type,
shift, zero-terminal SNR) and the precision it computes in.
Left out, and named: wrappers, attention overrides and replacements, compile wrappers, sampler functions. Refused: what
would make the trained function another one without anybody noticing.
"""

from __future__ import annotations

from typing import Any

from ..kernels.adapter import Adapter
from . import branching, fusing
from .denoiser import UnsupportedModelError
from .targets import parameters_of

COMPILE = "torch.compile"  # the host's key for its wrapper
KEPT_OBJECTS = {"model_sampling", "latent_format", "manual_cast_dtype"}


def trainable_clone(patcher: Any, what: str = "MODEL") -> tuple[Any, list[str]]:
    """A clone that shares the weights and carries only what training keeps; and one note for each thing left out.

    ``what`` is what the user knows it as.

    Raises UnsupportedModelError for LoRAs in bypass mode and for replaced parts of the network.
    """
    notes: list[str] = []
    if patcher.patches:
        notes.append(f"trains on top of patches (LoRAs) already on {len(patcher.patches)} weights of the {what}")
    if any(patcher.injections.values()):
        raise UnsupportedModelError(
            f"the {what} carries injected layers ({', '.join(map(str, patcher.injections))}), for example a LoRA in "
            f"bypass mode. Load that LoRA with the ordinary LoRA loader, or train on the {what} before it."
        )
    objects = {}
    for name, value in patcher.object_patches.items():
        if name in KEPT_OBJECTS:
            objects[name] = value
        elif _is_compiled(value):
            notes.append(f"left out for training: torch.compile on {name}")
        else:
            raise UnsupportedModelError(
                f"a node has replaced {name} of the {what} by {type(value).__name__}, and training beside it would "
                f"teach another network. Connect the {what} as it was before that node."
            )
    notes.extend(f"left out for training: {what}" for what in _call_time_patches(patcher))
    clone = patcher.clone()
    stack = branching.stack_on(patcher)
    if stack is not None:
        notes.append(f"trains on top of {len(stack.loras)} LoRA(s) beside the weights of the {what}")
        fusing.add_fused(clone, _constant(patcher, stack, what))
    clone.object_patches = objects
    clone.model_options = {"transformer_options": {}}
    clone.wrappers, clone.callbacks, clone.injections, clone.additional_models = {}, {}, {}, {}
    clone.hook_patches, clone.forced_hooks = {}, None
    return clone, notes


def _constant(patcher: Any, stack: branching.Stack, what: str) -> dict[str, list[tuple[Adapter, float]]]:
    """The LoRAs of a stack, to be fused for as long as is trained."""
    if any(strength.schedules for strength in stack.strengths):
        raise UnsupportedModelError(
            f"the {what} carries a LoRA whose strength changes over a sampling run. Set one strength for it (steps and "
            f"blocks without @) to train on top of it, or train on the {what} before it."
        )
    places = parameters_of(patcher.model)
    lost = [key for key in stack.by_parameter() if places[key].held_beside or not places[key].ordinary]
    if lost:
        first = places[lost[0]]
        raise UnsupportedModelError(
            f"the {what} carries a LoRA on {lost[0]}, which training would have to fuse and cannot without loss "
            f"(it is kept in {first.kept}, or the host does not patch it). Train on the {what} before that LoRA."
        )
    return {
        key: [(adapter, stack.strengths[number].constant) for adapter, number in parts]
        for key, parts in stack.by_parameter().items()
    }


def _is_compiled(value: Any) -> bool:
    return hasattr(value, "_orig_mod") or hasattr(value, "_torchdynamo_orig_callable")


def _call_time_patches(patcher: Any) -> list[str]:
    found: list[str] = []
    for kind, by_key in patcher.wrappers.items():
        for key, functions in by_key.items():
            if key == fusing.KEY:
                continue
            found.extend(COMPILE if key == COMPILE else f"{kind} wrapper {_name(function)}" for function in functions)
    options = dict(patcher.model_options)
    options.pop("torch_compile_kwargs", None)  # the compile wrapper's own
    transformer = dict(options.pop("transformer_options", {}))
    found.extend(f"{name} {_name(value)}" for name, value in options.items() if callable(value) or value)
    override = transformer.pop("optimized_attention_override", None)
    if override is not None:
        found.append(f"attention override {_name(override)} (torch's own attention is used)")
    for name, value in transformer.items():
        if value:
            inner = f" ({', '.join(map(str, value))})" if isinstance(value, dict) else ""
            found.append(f"transformer option {name}{inner}")
    if patcher.hook_patches:
        found.append(f"{len(patcher.hook_patches)} hooked LoRA(s), which act on marked conditioning only")
    if patcher.additional_models:
        found.append(f"additional models {', '.join(map(str, patcher.additional_models))}")
    return found


def _name(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__name__
