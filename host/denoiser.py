"""The host's model as training sees it: one call, a batch of samples, the raw prediction.

* ``HostDenoiser``: implements ``training.objective.Denoiser`` on a loan. The host's own ``apply_model`` runs, with its
  own input scaling, timestep and conditioning; only its last step, the way back to x̂0, is left out.
* ``encode_captions``: every caption once, with the graph's CLIP.
* ``Conditioning``: one sample's text and sizes. Conditioning is built per sample by the model's own ``extra_conds``
  and joined along the batch; the sampler's batching, which averages captions, is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ..training.objective import Prediction
from .loan import Loan


class UnsupportedModelError(ValueError):
    """A model that cannot be trained, with what to do instead."""


@dataclass(frozen=True)
class Conditioning:
    """What one sample is conditioned on: the encoded caption and the sizes in pixels that SDXL wants to know."""

    cross_attn: Tensor
    extras: dict[str, Any]
    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]

    def host_arguments(self) -> dict[str, Any]:
        width, height = self.original_size
        left, top = self.crop
        target_width, target_height = self.target_size
        return {
            **self.extras,
            "cross_attn": self.cross_attn,
            "width": width,
            "height": height,
            "crop_w": left,
            "crop_h": top,
            "target_width": target_width,
            "target_height": target_height,
            "prompt_type": "positive",
        }


def encode_captions(
    clip: Any, captions: Iterable[str], advance: Callable[[], None] = lambda: None
) -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """caption → (cross-attention tensor, extras) with ordinary tensors on the CPU; each caption is encoded once.

    ``advance`` is called after each.
    """
    encoded: dict[str, tuple[Tensor, dict[str, Any]]] = {}
    for caption in captions:
        if caption in encoded:
            continue
        comfy.model_management.throw_exception_if_processing_interrupted()
        context, extras = clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0]
        with torch.inference_mode(False):
            kept = {name: _plain(value) for name, value in extras.items() if name not in ("hooks", "model_conds")}
            encoded[caption] = (_plain(context), kept)
        advance()
    return encoded


def _plain(value: Any) -> Any:
    """Inference tensors cannot take part in training: a copy can."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def prediction_of(sampling: Any) -> Prediction:
    """The space a model predicts in, from its sampling object (which a ModelSampling node may have set)."""
    kinds = comfy.model_sampling
    unsupported = ("EDM", "X0", "IMG_TO_IMG_FLOW", "COSMOS_RFLOW", "V_PREDICTION_DDPM")
    refused = [getattr(kinds, name) for name in unsupported if hasattr(kinds, name)]
    if isinstance(sampling, tuple(refused)) or getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"models with {type(sampling).__mro__[1].__name__} sampling cannot be trained yet; "
            "supported are epsilon, v-prediction and flow models"
        )
    if isinstance(sampling, kinds.CONST):
        return Prediction.FLOW
    if isinstance(sampling, kinds.V_PREDICTION):
        return Prediction.VELOCITY
    if isinstance(sampling, kinds.EPS):
        return Prediction.EPSILON
    raise UnsupportedModelError(f"unknown model sampling {type(sampling).__name__}; set it with a ModelSampling node")


class _RawPrediction(nn.Module):
    """The model's sampling object without the step from the network's output to x̂0."""

    def __init__(self, sampling: nn.Module) -> None:
        super().__init__()
        self.__dict__["sampling"] = sampling

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["sampling"], name)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output


def _attention(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """Torch's own attention, whatever the host or a node has chosen: it has a backward everywhere."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


class HostDenoiser:
    """``training.objective.Denoiser`` over a borrowed model."""

    def __init__(self, loan: Loan) -> None:
        self.loan = loan
        self.model: Any = loan.model
        self.prediction = prediction_of(loan.model.model_sampling)

    def noise_levels(self, times: Tensor) -> Tensor:
        """σ for positions in [0, 1): the table entry of a discrete model, the position itself of a flow."""
        if self.prediction.is_flow:
            return times.float()
        sigmas = self.model.model_sampling.sigmas
        index = (times * len(sigmas)).long().clamp(max=len(sigmas) - 1)
        return sigmas[index.to(sigmas.device)].float().cpu()

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """One forward of the whole batch; samples whose conditioning cannot be joined (other lengths) run in groups."""
        per_sample = [self._model_conditions(noisy[i : i + 1], item) for i, item in enumerate(conditioning)]
        outputs: dict[int, Tensor] = {}
        for group in _joinable(per_sample):
            picked = slice(None) if len(group) == len(per_sample) else group
            joined = {
                name: value.concat([per_sample[i][name] for i in group[1:]])
                for name, value in per_sample[group[0]].items()
            }
            result = self._apply(noisy[picked], sigma[picked], joined)
            outputs.update(zip(group, result.unbind(0), strict=True))
        if len(outputs) == len(group):
            return result
        return torch.stack([outputs[i] for i in range(len(per_sample))])

    def _apply(self, noisy: Tensor, sigma: Tensor, joined: dict[str, Any]) -> Tensor:
        options = {
            "optimized_attention_override": _attention,
            "cond_or_uncond": [0],
            "sigmas": sigma,
            "sample_sigmas": sigma,
        }
        model, sampling = self.model, self.model.model_sampling
        model.model_sampling = _RawPrediction(sampling)
        try:
            with self.loan.using():
                return model.apply_model(noisy, sigma, transformer_options=options, **joined)
        finally:
            model.model_sampling = sampling

    def _model_conditions(self, latent: Tensor, item: Conditioning) -> dict[str, Any]:
        conditions = self.model.extra_conds(**item.host_arguments(), noise=latent, device=latent.device)
        return {name: value.process_cond(batch_size=1, area=None) for name, value in conditions.items()}


def _joinable(per_sample: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Indices grouped so that every group can run as one batch, by the host's own rule."""
    groups: list[list[int]] = []
    for index, conditions in enumerate(per_sample):
        for group in groups:
            first = per_sample[group[0]]
            if first.keys() == conditions.keys() and all(v.can_concat(conditions[k]) for k, v in first.items()):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
