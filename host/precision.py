"""The precision a model computes in while it is trained.

Only the computation changes: the weights stay in the precision the host has loaded them in.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..training.options import OptionError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def host_dtype(patcher: Any) -> torch.dtype:
    """What the host computes in, once the model is loaded."""
    return patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def compute_dtype(name: str, patcher: Any) -> torch.dtype | None:
    """The dtype that ``compute_dtype`` of the run settings names; None where that is the host's own choice.

    Raises OptionError where the device cannot compute in it.
    """
    dtype = DTYPES.get(name)
    if dtype is None or dtype == host_dtype(patcher):
        return None
    check_dtype(dtype, name, patcher.load_device)
    return dtype


def check_dtype(dtype: torch.dtype, name: str, device: torch.device) -> None:
    """Raises OptionError where ``device`` lacks an operation that every diffusion model is trained with."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(1, 8, 8, 8, dtype=dtype, device=device, requires_grad=True)
            y = F.silu(F.group_norm(F.conv2d(x, torch.ones(8, 8, 3, 3, dtype=dtype, device=device), padding=1), 4))
            rows = F.layer_norm(y.flatten(2), (64,))
            F.scaled_dot_product_attention(rows, rows, rows).sum().backward()
    except RuntimeError as error:
        raise OptionError(
            f"compute_dtype is {name!r}, which {device} cannot compute in ({str(error).splitlines()[0]}): "
            "set it to automatic or fp32"
        ) from error
