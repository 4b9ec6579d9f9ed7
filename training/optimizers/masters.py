"""What the optimizer writes to: the adapters themselves, or float32 copies of adapters that are kept in bfloat16.

* The copies live only while the optimizer works (``gathered``); between steps they take no memory.
* Gradients of several backward passes are summed in float32 (``collect``): in bfloat16 a sum soon takes no more up.
* What it made of them is rounded at random, up or down in proportion to how near each is, so that steps smaller than
  bfloat16 can hold are right on average instead of lost. The draws come from a generator on the CPU, in a fixed order:
  the same bits on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Masters:
    """``tensors`` stand for ``parameters``, in their order; they are the same tensors where those are float32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = list(parameters)
        self.tensors = [_nothing(one) if one.dtype == torch.bfloat16 else one for one in self.parameters]
        self._copied = [
            (one, master) for one, master in zip(self.parameters, self.tensors, strict=True) if master is not one
        ]
        self._by_parameter = {id(one): master for one, master in zip(self.parameters, self.tensors, strict=True)}

    def of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        return [self._by_parameter[id(parameter)] for parameter in parameters]

    @torch.no_grad()
    def collect(self) -> None:
        """The copies take over the gradients; those of another backward are added to them."""
        for parameter, master in self._copied:
            if parameter.grad is not None:
                gradient, parameter.grad = parameter.grad.float(), None
                master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    @contextmanager
    @torch.no_grad()
    def gathered(self) -> Iterator[None]:
        """The copies are there, with the values of their parameters, and have taken over the gradients."""
        try:
            self.collect()
            for parameter, master in self._copied:
                master.data = parameter.to(torch.float32, memory_format=torch.contiguous_format)
            yield
        finally:
            for parameter, master in self._copied:
                master.grad = None
                master.data = _nothing(parameter)

    @torch.no_grad()
    def write_back(self, draws: Callable[[], torch.Generator]) -> None:
        """Round the copies into the parameters; ``draws`` is asked only where there is something to round."""
        if not self._copied:
            return
        generator = draws()
        for parameter, master in self._copied:
            parameter.copy_(rounded_at_random(master, generator))


def rounded_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 ``values`` as bfloat16, each to one of its two neighbours, right in the mean.

    bfloat16 is the upper half of float32: what a random number below 2¹⁶ carries over from the lower half rounds up.
    """
    noise = torch.randint(1 << 16, values.shape, generator=generator, dtype=torch.int32).to(values.device)
    bits = values.contiguous().view(torch.int32)
    carried = torch.where(values.isfinite(), bits + noise, bits)
    rounded = (carried & -(1 << 16)).view(torch.float32)
    return torch.where(values.isnan(), values, rounded).bfloat16()


def _nothing(parameter: Tensor) -> Tensor:
    """float32 in the shape of ``parameter``, one number in memory; not every device can resize a storage."""
    return torch.zeros((), dtype=torch.float32, device=parameter.device).expand(parameter.shape)
