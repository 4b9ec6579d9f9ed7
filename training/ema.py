"""An exponential moving average of the adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Average:
    """``tensors`` follow those that are trained, in float32.

    The decay begins low, min(decay, (1 + n) / (10 + n)) at update n, so that the first weights are soon forgotten.
    """

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.tensors = [tensor.detach().float().clone() for tensor in parameters]

    def update(self, parameters: Sequence[Tensor]) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            torch._foreach_lerp_(self.tensors, [tensor.detach().float() for tensor in parameters], 1 - decay)
        self.updates += 1

    def restore(self, tensors: Sequence[Tensor], updates: int) -> None:
        with torch.no_grad():
            for own, saved in zip(self.tensors, tensors, strict=True):
                own.copy_(saved)
        self.updates = updates
