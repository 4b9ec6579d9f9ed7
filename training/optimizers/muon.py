"""Muon for everything an adapter is made of.

* Matrices get orthogonalised momentum; k×k convolutions are matrices of one row per output.
* What is no matrix (norms, biases, scales, rotations) gets AdamW's steps with the same rate and decay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonal(
    matrix: Tensor, coefficients: tuple[float, float, float] = COEFFICIENTS, steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """U Vᵀ of ``matrix`` = U S Vᵀ, roughly: X ← aX + (bXXᵀ + c(XXᵀ)²)X brings all of S near 1."""
    a, b, c = coefficients
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """``adjust_lr_fn``: "match_rms_adamw" makes steps as large as AdamW's at the same rate, "original" is Jordan's."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        vector_betas: tuple[float, float] = (0.9, 0.999),
        vector_eps: float = 1e-8,
    ) -> None:
        if adjust_lr_fn not in ("match_rms_adamw", "original"):
            raise ValueError(f"adjust_lr_fn is {adjust_lr_fn!r}, expected match_rms_adamw or original")
        if len(ns_coefficients) != 3 or not 0 < ns_steps < 100 or not 0 <= momentum < 1:
            raise ValueError("expected three ns_coefficients, 1 to 99 ns_steps, momentum from 0 to below 1")
        beta1, beta2 = vector_betas
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and vector_eps > 0):
            raise ValueError("expected vector_betas from 0 to below 1 and vector_eps above 0")
        matrices = {"momentum": momentum, "nesterov": nesterov, "ns_coefficients": ns_coefficients, "eps": eps}
        matrices |= {"ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        vectors = {"vector_betas": vector_betas, "vector_eps": vector_eps}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **matrices, **vectors})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                if _is_matrix(parameter):
                    self._matrix(parameter, group)
                else:
                    self._vector(parameter, group)

    def _matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """M ← μM + (1−μ)G; W ← W − lr·k·orthogonal(G + μ(M − G)), k by the shape of W."""
        state, gradient = self.state[parameter], parameter.grad.flatten(1)  # type: ignore[union-attr]
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        ahead = gradient.lerp(state["momentum"], group["momentum"]) if group["nesterov"] else state["momentum"]
        update = orthogonal(ahead, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = gradient.shape
        original = group["adjust_lr_fn"] == "original"
        size = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * size)

    def _vector(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """Adam: W ← W − lr·(m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)."""
        state, (beta1, beta2) = self.state[parameter], group["vector_betas"]
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(parameter), "square": torch.zeros_like(parameter)}
        state["step"] += 1
        state["mean"].lerp_(parameter.grad, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        below = (state["square"] / (1 - beta2 ** state["step"])).sqrt_().add_(group["vector_eps"])
        parameter.addcdiv_(state["mean"], below, value=-group["lr"] / (1 - beta1 ** state["step"]))


def _is_matrix(tensor: Tensor) -> bool:
    return tensor.ndim == 2 or tensor.ndim > 3
