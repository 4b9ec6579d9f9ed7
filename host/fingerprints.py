"""What a run is trained on, in a few digits: enough to tell another base, without reading gigabytes.

* ``base_of(model, clip, vae)``: the weights of all three, the LoRAs on MODEL and CLIP, prediction and noise levels,
  clip skip
* ``weights``: of every parameter and saved buffer its name, its shape and a few hundred values; the originals, also
  while the host has LoRAs merged into what is loaded
* ``applied``: the patches on a MODEL or CLIP, with their strengths and samples of their tensors

The digits do not depend on the process, the device, or on what is loaded at the moment. They tell weights apart, and
are no defence against somebody who wants them confused; the keys of the caches on disk (``contents``) read every bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.weight_adapter
import torch
from comfy.sd1_clip import SDClipModel
from comfy.sdxl_clip import SDXLClipModel
from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..kernels.blocks import diffusion_tree
from .branching import stack_on
from .denoiser import prediction_of

RUNS, VALUES = 8, 64  # so many stretches of neighbours per tensor: scattered ones would each cost a page of a cold file
DIGITS = 16
# kept in one or another of these by the host, as the device likes; smaller and quantised kinds are taken bit by bit
_WIDE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def base_of(model: Any, clip: Any, vae: Any) -> dict[str, Any]:
    """Of a MODEL, a CLIP and a VAE as the nodes have them. Raises UnsupportedModelError as ``prediction_of`` does."""
    sampling = model.get_model_object("model_sampling")
    return {
        "weights": weights(model, *diffusion_tree(model.model)),
        "loras": applied(model),
        "sampling": _digest((prediction_of(sampling).value, getattr(sampling, "sigmas", None))),
        "text_encoder": weights(clip.patcher, clip.cond_stage_model),
        "text_encoder_loras": applied(clip.patcher),
        "clip_skip": clip.layer_idx,
        "vae": weights(vae.patcher, vae.first_stage_model),
    }


def weights(patcher: Any, network: nn.Module, prefix: str = "") -> str:
    """Those of ``network``, which the patcher knows as ``prefix`` + name, without its patches."""
    return _digest(list(_originals(patcher, network, prefix)))


def unread(network: nn.Module) -> tuple[str, ...]:
    """What names begin with of weights whose output nobody reads: text projections of encoders used without them.

    The files of SD1 and SDXL do not have them, and the host leaves in them what the memory held before.
    """
    encoders = {path: module for path, module in network.named_modules() if isinstance(module, SDClipModel)}
    paths = [path for path, encoder in encoders.items() if not encoder.return_projected_pooled]
    if isinstance(network, SDXLClipModel):
        paths.append("clip_l")
    return tuple(f"{path}.transformer.text_projection." for path in paths)


def applied(patcher: Any) -> str:
    """The patches that a patcher puts on its weights, in their order, and LoRAs beside them; "" without any."""
    stack = stack_on(patcher)
    if stack is None:
        return _digest(patcher.patches) if patcher.patches else ""
    beside = [
        {key: (adapter, lora.strengths[key].constant) for key, adapter in lora.adapters.items()} for lora in stack.loras
    ]
    return _digest((patcher.patches, beside))


def _originals(patcher: Any, network: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    buffers, ignored = getattr(patcher, "backup_buffers", {}), unread(network)  # newer hosts have buffers
    for path, module in network.named_modules():
        saved = {n: t for n, t in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **saved}.items():
            key = f"{prefix}{path}{path and '.'}{name}"
            if key.startswith(ignored):
                continue
            if key in patcher.backup:
                tensor = patcher.backup[key].weight
            elif key in patcher.hook_backup:
                tensor = patcher.hook_backup[key][0]
            if tensor is not None:
                yield key, buffers.get(key, tensor)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed(digest.update, value)
    return digest.hexdigest()[:DIGITS]


def _feed(update: Callable[[bytes], Any], value: Any) -> None:
    """Every part with its kind; what has no content that is known here counts with the name of its class."""
    if isinstance(value, Tensor):
        update(sample(value))
    elif isinstance(value, Mapping):
        update(f"{len(value)} named ".encode())
        for name in sorted(value, key=str):
            _feed(update, str(name))
            _feed(update, value[name])
    elif isinstance(value, list | tuple):
        update(f"{len(value)} in order ".encode())
        for part in value:
            _feed(update, part)
    elif value is None or isinstance(value, bool | int | float | str | torch.dtype):
        update(f"{len(str(value))} {type(value).__name__} {value} ".encode())
    else:
        named = value if hasattr(value, "__qualname__") else type(value)  # functions have a name of their own
        _feed(update, f"{named.__module__}.{named.__qualname__}")
        if isinstance(value, Adapter | comfy.weight_adapter.WeightAdapterBase):
            _feed(update, {name: part for name, part in vars(value).items() if name != "loaded_keys"})


def sample(tensor: Tensor) -> bytes:
    """The shape of a tensor, and its values or those of ``RUNS`` stretches spread over it; one that is quantised is
    what it is made of."""
    tensor = tensor.detach()
    shape = f"{tuple(tensor.shape)} ".encode()
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        parts, _ = tensor.__tensor_flatten__()
        return shape + b"".join(sample(getattr(tensor, name)) for name in parts)
    if tensor.is_meta:
        return shape
    wide = tensor.dtype in _WIDE
    flat = tensor.as_subclass(Tensor).contiguous().view(-1)
    flat = flat if wide else flat.view(torch.uint8)
    if len(flat) > RUNS * VALUES:
        apart = (len(flat) - VALUES) // (RUNS - 1)
        flat = torch.cat([flat[run * apart :][:VALUES] for run in range(RUNS - 1)] + [flat[-VALUES:]])
    content = flat.to(torch.bfloat16).view(torch.uint8) if wide else flat
    return shape + f"{'wide' if wide else tensor.dtype} {len(content)} ".encode() + content.cpu().numpy().tobytes()
