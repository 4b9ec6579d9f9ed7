"""The host's layers as frozen layers: its own forward, its own cast, nothing saved.

``HostLayer`` decides afresh at every call: a weight that lies resident in the compute dtype is used as it is; one that
the host casts on use, keeps offloaded, manages dynamically, patches on the fly or holds quantised is asked for again
through the host's own cast, and given back. A layer computes in the dtype of its input, whatever its weights are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.lora
import comfy.ops
import torch
from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..kernels.frozen import frozen_conv, frozen_linear, frozen_other
from ..kernels.layers import is_linear
from ..kernels.products import ConvGeometry
from ..training.inplace import latest


def is_host_layer(module: nn.Module) -> bool:
    """True for layers whose weights the host may cast on use."""
    return hasattr(module, "comfy_cast_weights")


def conv_geometry(module: nn.Module) -> ConvGeometry | None:
    """How a convolution walks; None for everything else, and for those whose input gradient takes another road."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) or isinstance(module.padding, str):
        return None
    if module.padding_mode != "zeros":
        return None
    return ConvGeometry(tuple(module.stride), tuple(module.padding), tuple(module.dilation), module.groups)


def weight_reader(patcher: Any) -> Callable[[str], Tensor]:
    """path -> the weight of a layer as this MODEL has it, LoRAs applied, in float32, whatever is loaded at the time."""
    known: dict[str, Any] = {}

    def read(path: str) -> Tensor:
        if not known:
            known.update(patcher.get_key_patches())
        key = f"{path}.weight"
        (weight, convert), *patches = known[key]
        dense = weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize()
        dense = convert(dense.detach().to(torch.float32, copy=True), inplace=True)
        return comfy.lora.calculate_weight(patches, dense, key) if patches else dense

    return read


@contextmanager
def _set(module: nn.Module, **values: Any) -> Iterator[None]:
    """Attributes of a module for a moment."""
    attributes = vars(module)
    before = {name: attributes[name] for name in values if name in attributes}
    attributes.update(values)
    try:
        yield
    finally:
        for name in values:
            del attributes[name]
        attributes.update(before)


class HostLayer:
    """One layer on loan; hung into ``module.forward`` for its time. See ``kernels.frozen.FrozenLayer``.

    ``gate.open()`` says whether adapters act now, ``gate.check()`` raises where the weights are no longer those lent.
    """

    def __init__(self, module: Any, adapter: Adapter | None, gate: Any) -> None:
        self.module, self.adapter, self.gate = module, adapter, gate
        self.geometry = conv_geometry(module)
        self.is_linear = is_linear(module)
        self.host_forward = module.forward
        self.had_own_forward = "forward" in module.__dict__

    # -- what kernels.frozen asks for

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.is_grad_enabled() or self._resident(x):
            return self._as_the_host(x, *args, **kwargs)
        # run once more in backward: autograd needs the weights for longer than the host leaves a cast where it is
        with self._own_weights(x):
            return self.host_forward(x, *args, **kwargs)

    def _as_the_host(self, x: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The host's forward, told to cast where the weights are not what the input is."""
        module = self.module
        stored = getattr(module.weight, "dtype", None)
        fits = not isinstance(x, Tensor) or not x.is_floating_point() or stored in (None, x.dtype)
        if fits or module.comfy_cast_weights:
            return self.host_forward(x, *args, **kwargs)
        with _set(module, comfy_cast_weights=True):
            return self.host_forward(x, *args, **kwargs)

    @contextmanager
    def weight(self, like: Tensor) -> Iterator[Tensor]:
        self.gate.check()
        if self._resident(like):
            yield self.module.weight
            return
        with self._cast(like) as (weight, _):
            # a quantised weight reports the dtype it stands for; products with a gradient need it dense
            dense = weight if type(weight) in (Tensor, nn.Parameter) else weight.dequantize().to(like.dtype)
            smoothing = getattr(self.module, "pre_quant_scale", None)  # the host multiplies the input with it
            yield dense if smoothing is None else dense * smoothing.to(like.device, like.dtype)

    def bias(self, like: Tensor) -> Tensor | None:
        if self.module.bias is None:
            return None
        if self._resident(like):
            return self.module.bias.detach()
        with self._cast(like) as (_, bias):
            return None if bias is None else bias.clone()

    @contextmanager
    def _cast(self, like: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        weight, bias, stream = comfy.ops.cast_bias_weight(self.module, like, offloadable=True)
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(self.module, weight, bias, stream)

    @contextmanager
    def _own_weights(self, like: Tensor) -> Iterator[None]:
        """Put copies of the cast weights into the module; they live as long as autograd holds them."""
        module = self.module
        with self._cast(like) as cast, torch.no_grad():
            parts = zip(("weight", "bias"), cast, strict=True)
            copies = {name: part.clone() for name, part in parts if part is not None}
        own = {"_parameters": {**module._parameters, **copies}, "weight_function": [], "bias_function": []}
        with _set(module, comfy_cast_weights=False, **own):
            yield

    def _resident(self, like: Tensor) -> bool:
        module = self.module
        weight = module.weight
        return (
            not module.comfy_cast_weights
            and not module.weight_function
            and not module.bias_function
            and type(weight) in (Tensor, nn.Parameter)
            and weight.dtype == like.dtype
            and weight.device == like.device
        )

    # -- what hangs on the module

    def hung_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = latest(x)
        if self.adapter is not None and self.gate.open():
            self.gate.check()
            return self.adapter.on(x, self)
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad):
            return self._as_the_host(x, *args, **kwargs)
        if self.module.weight is None or (self._resident(x) and not self.module.weight.requires_grad):
            return self.host_forward(x, *args, **kwargs)
        if self.is_linear:
            return frozen_linear(x, self)
        if self.geometry is not None:
            return frozen_conv(x, self)
        return frozen_other(x, self, *args, **kwargs)

    def hang(self) -> None:
        self.module.__dict__["forward"] = self.hung_forward

    def remove(self) -> None:
        """Put the forward back, unless somebody has replaced ours meanwhile."""
        if self.module.__dict__.get("forward") != self.hung_forward:
            return
        if self.had_own_forward:
            self.module.__dict__["forward"] = self.host_forward
        else:
            del self.module.__dict__["forward"]
