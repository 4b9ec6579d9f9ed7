"""Products with weights: what linear layers and convolutions compute, and its gradients.

* ``ConvGeometry``: how a convolution walks; None stands for a linear layer throughout this package.
* ``apply_weight``, ``convolve``, ``pointwise``: forward; channels are the last dimension of a linear layer's input and
  the second of a convolution's.
* ``input_gradient``, ``weight_gradient``: backward of either kind, without autograd; ``conv_gradients``,
  ``conv_input_gradient``, ``kernel_gradient``, ``outer``: their pieces.
* ``per_channel``, ``channel_dim``, ``channel_sum``: vectors over the channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ConvGeometry:
    """How a convolution walks over its input; one entry per spatial dimension."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    @property
    def dimensions(self) -> int:
        return len(self.stride)


def channel_dim(geometry: ConvGeometry | None) -> int:
    """Where the channels are: last for linear layers, second for convolutions."""
    return -1 if geometry is None else 1


def per_channel(vector: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """(channels,) broadcastable over a layer's input or output."""
    return vector if geometry is None else vector.view(-1, *(1 for _ in geometry.stride))


def channel_sum(tensor: Tensor, channels: int) -> Tensor:
    """Sum over all dimensions but ``channels``, float32 or wider."""
    channels %= tensor.ndim
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    # the dimension in front is for vectors: summed over no dimensions they would be summed over all
    return tensor[None].sum([0, *(dim + 1 for dim in range(tensor.ndim) if dim != channels)], dtype=dtype)


def apply_weight(x: Tensor, weight: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """The layer with ``weight`` (out, in, *kernel) and no bias, differentiable in both."""
    return F.linear(x, weight.flatten(1)) if geometry is None else convolve(x, weight, geometry)


def mix(x: Tensor, matrix: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """``matrix`` (out, in) over the channels of ``x`` at every position."""
    return F.linear(x, matrix) if geometry is None else pointwise(matrix, x)


def walked(space: Sequence[int], kernel: Sequence[int], geometry: ConvGeometry) -> list[int]:
    """Spatial size of a convolution's output."""
    sizes = zip(space, kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return [(size + 2 * pad - gap * (side - 1) - 1) // step + 1 for size, side, step, pad, gap in sizes]


def is_pointwise(weight: Tensor, geometry: ConvGeometry) -> bool:
    """A kernel of one pixel: the same matrix at every position."""
    return math.prod((*weight.shape[2:], *geometry.stride, geometry.groups)) == 1 and not any(geometry.padding)


def wants_product(grad: Tensor, weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether the input gradient is cheaper as one matrix product than from the convolution library (dev/LOG.md).

    Measured on CPUs: for 1×1 kernels, and for weights beyond 32 MB that meet few positions, whose reordering is most
    of the library's time.
    """
    if grad.device.type != "cpu" or grad.dtype not in (torch.float32, torch.float64):
        return False
    if is_pointwise(weight, geometry):
        return True
    size = weight.numel()
    if size < 8_000_000 or geometry.dimensions != 2 or geometry.groups != 1:
        return False
    few = 32 * grad.numel() // grad.shape[1]
    return size // weight.shape[0] >= few


def conv_input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: ConvGeometry) -> Tensor:
    """∂L/∂x of ``y = conv(x, weight)`` for an input of ``shape``; the input itself is not needed."""
    if wants_product(grad, weight, geometry):
        return conv_input_gradient_by_product(shape, geometry, (grad, weight))
    placeholder = grad.new_empty(shape)  # never read; anything but plain contiguous would be copied into that
    return conv_gradients(grad, placeholder, weight, geometry, (True, False))[0]


def input_gradient(grad: Tensor, shape: torch.Size, weight: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """∂L/∂x of the layer with ``weight``, for an input of ``shape``."""
    if geometry is None:
        return grad @ weight.flatten(1)
    return conv_input_gradient(grad, shape, weight, geometry)


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry | None) -> Tensor:
    """∂L/∂weight of the layer, in the shape of ``weight``, whose values are not needed."""
    if geometry is None:
        return (grad.reshape(-1, grad.shape[-1]).T @ x.reshape(-1, x.shape[-1])).view(weight.shape)
    return kernel_gradient(grad, x, weight, geometry)


def conv_input_gradient_by_product(shape: torch.Size, geometry: ConvGeometry, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """∂L/∂x of y = Σ conv(x, Wᵢ) from pairs (∂L/∂conv(x, Wᵢ), Wᵢ): columns Σ Wᵢᵀ gradᵢ, then overlaps added up."""
    (grad, weight), *others = parts
    columns = _transposed(weight, grad) @ grad.flatten(2)  # (N, in·kernel, positions)
    for other_grad, other in others:
        columns.baddbmm_(_transposed(other, other_grad), other_grad.flatten(2))
    if is_pointwise(weight, geometry):
        return columns.view(shape)
    return F.fold(columns, shape[2:], weight.shape[2:], geometry.dilation, geometry.padding, geometry.stride)


def _transposed(weight: Tensor, grad: Tensor) -> Tensor:
    """(N, in·kernel, out) without a copy."""
    return weight.flatten(1).T.expand(len(grad), -1, -1)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, geometry: ConvGeometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """(∂L/∂x, ∂L/∂weight) of ``y = conv(x, weight)``; what is not ``wanted`` is None."""
    zeros = [0] * geometry.dimensions
    gradients = torch.ops.aten.convolution_backward.default(
        grad,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        zeros,
        geometry.groups,
        [*wanted, False],
    )
    return gradients[0], gradients[1]


def convolve(x: Tensor, kernel: Tensor, geometry: ConvGeometry) -> Tensor:
    """conv(x, kernel) in one, two or three dimensions."""
    if is_pointwise(kernel, geometry):
        return pointwise(kernel.flatten(1), x)
    zeros = [0] * geometry.dimensions
    return torch.convolution(
        x, kernel, None, geometry.stride, geometry.padding, geometry.dilation, False, zeros, geometry.groups
    )


def kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, geometry: ConvGeometry) -> Tensor:
    """∂L/∂kernel of conv(x, kernel)."""
    if is_pointwise(kernel, geometry):
        return outer(grad, x).view(kernel.shape)
    return conv_gradients(grad, x, kernel, geometry, (False, True))[1]


def pointwise(matrix: Tensor, x: Tensor) -> Tensor:
    """A 1×1 convolution: (out, in) · (N, in, *space) → (N, out, *space)."""
    product = torch.bmm(matrix.expand(len(x), -1, -1), x.flatten(2))
    return product.view(*product.shape[:2], *x.shape[2:])


def outer(a: Tensor, b: Tensor) -> Tensor:
    """Σ over samples and positions of a bᵀ: (N, p, *space), (N, q, *space) → (p, q)."""
    return torch.bmm(a.flatten(2), b.flatten(2).transpose(1, 2)).sum(0)


def add_pointwise(y: Tensor, matrix: Tensor, x: Tensor) -> None:
    """y += matrix · x, in place."""
    if y.is_contiguous():
        y.flatten(2).baddbmm_(matrix.expand(len(x), -1, -1), x.flatten(2))
    else:
        y.add_(pointwise(matrix, x))
