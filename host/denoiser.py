"""The host's model as training sees it: one call, a batch of samples, the raw prediction.

* ``HostDenoiser``: implements ``training.objective.Denoiser`` on a loan. The host's own ``apply_model`` runs, with its
  own input scaling, timestep and conditioning; only its last step, the way back to x̂0, is left out.
* ``zero_terminal``: the noise levels of a v-model stretched to pure noise, for the calls of the denoiser only.
* ``Conditioning``: one sample's text and sizes. Conditioning is built per sample by the model's own ``extra_conds``
  and joined along the batch; the sampler's batching, which averages captions, is never used.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_sampling
import torch
from torch import Tensor, nn

from ..training.objective import Prediction, per_sample
from ..training.options import OptionError
from .loan import Loan

PURE_NOISE = 1000.0  # a greater σ leaves nothing of the picture
REFUSED = ("EDM", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "X0", "V_PREDICTION_DDPM")  # the host's names, special ones first


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
    base: Conditioning | None = None  # as the untrained text encoders have it, where they are trained

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


def prediction_of(sampling: Any) -> Prediction:
    """The space a model predicts in, from its sampling object (which a ModelSampling node may have set)."""
    kinds = comfy.model_sampling
    refused = [name for name in REFUSED if isinstance(sampling, getattr(kinds, name, ()))]
    if getattr(sampling, "noise_scale", 1.0) != 1.0:
        refused.append(f"noise_scale {sampling.noise_scale:g}")
    if refused:
        raise UnsupportedModelError(
            f"models with {refused[0]} sampling cannot be trained yet; "
            "supported are epsilon, v-prediction and flow models"
        )
    if isinstance(sampling, kinds.CONST) or _is_scaled_flow(sampling):
        return Prediction.FLOW
    if isinstance(sampling, kinds.V_PREDICTION):
        return Prediction.VELOCITY
    if isinstance(sampling, kinds.EPS):
        return Prediction.EPSILON
    raise UnsupportedModelError(f"unknown model sampling {type(sampling).__name__}; set it with a ModelSampling node")


def _is_scaled_flow(sampling: Any) -> bool:
    """A flow whose samples the host scales by 1 / (1 − σ) and whose σ it calls σ / (1 − σ) (Cosmos-Predict2)."""
    return isinstance(sampling, getattr(comfy.model_sampling, "COSMOS_RFLOW", ()))


def ends_in_noise(sampling: Any) -> bool:
    """Whether the last noise level is pure noise already; the host writes σ = 4518 for it, SD's own is 14.6."""
    return float(sampling.sigma_max) > PURE_NOISE


def zero_terminal(sampling: Any) -> Any:
    """``sampling`` with its noise levels stretched to pure noise by the host's own function (Lin et al. 2023).

    A copy, unless it ends there already. Raises OptionError where there is no table to stretch.
    """
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        raise OptionError(
            "zero_terminal_snr is True, expected False: the noise levels of this MODEL are no table "
            f"({type(sampling).__mro__[1].__name__})"
        )
    if ends_in_noise(sampling):
        return sampling
    stretched = copy.deepcopy(sampling)
    sigmas = sampling.sigmas.to("cpu", torch.float64)  # which not every device has
    stretched.set_sigmas(comfy.model_sampling.rescale_zero_terminal_snr_sigmas(sigmas).to(sampling.sigmas))
    return stretched


def zero_terminal_note(sampling: Any) -> str:
    """What the report says where zero_terminal_snr is on; raises as ``zero_terminal`` does."""
    if zero_terminal(sampling) is sampling:
        return "zero_terminal_snr changes nothing: the noise levels of this MODEL end in pure noise already"
    return "trained down to pure noise (zero_terminal_snr): sample with ModelSamplingDiscrete, v_prediction, zsnr on"


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
    """``training.objective.Denoiser`` over a borrowed model; with ``zero_terminal_snr`` down to pure noise."""

    def __init__(self, loan: Loan, zero_terminal_snr: bool = False) -> None:
        self.loan = loan
        self.model: Any = loan.model
        sampling = loan.model.model_sampling
        self.stretched = zero_terminal(sampling) if zero_terminal_snr else None
        self.prediction = prediction_of(sampling)
        # a scaled flow divides by 1 − σ: it ends where the host's own schedule does
        self.scaled = _is_scaled_flow(sampling)
        self.noisiest = float(sampling.sigma_max / (sampling.sigma_max + 1)) if self.scaled else 1.0

    def noise_levels(self, times: Tensor) -> Tensor:
        """σ for positions in [0, 1): the table entry of a discrete model, the position itself of a flow."""
        if self.prediction.is_flow:
            return times.clamp(max=self.noisiest).float()
        sigmas = (self.stretched or self.model.model_sampling).sigmas
        index = (times * len(sigmas)).long().clamp(max=len(sigmas) - 1)
        return sigmas[index.to(sigmas.device)].float().cpu()

    def predict(self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """One forward of the whole batch; samples whose conditioning cannot be joined (other lengths) run in groups."""
        return self._predict(noisy, sigma, conditioning, adapters=True)

    @torch.no_grad()
    def predict_base(self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning]) -> Tensor:
        """``predict`` of the model as it was before training, also of its text encoders."""
        return self._predict(noisy, sigma, [item.base or item for item in conditioning], adapters=False)

    def _predict(
        self, noisy: Tensor, sigma: Tensor, conditioning: Sequence[Conditioning], adapters: bool
    ) -> Tensor:
        per_sample = [self._model_conditions(noisy[i : i + 1], item) for i, item in enumerate(conditioning)]
        outputs: dict[int, Tensor] = {}
        for group in _joinable(per_sample):
            picked = slice(None) if len(group) == len(per_sample) else group
            joined = {
                name: value.concat([per_sample[i][name] for i in group[1:]])
                for name, value in per_sample[group[0]].items()
            }
            result = self._apply(noisy[picked], sigma[picked], joined, adapters)
            outputs.update(zip(group, result.unbind(0), strict=True))
        if len(outputs) == len(group):
            return result
        return torch.stack([outputs[i] for i in range(len(per_sample))])

    def _apply(self, noisy: Tensor, sigma: Tensor, joined: dict[str, Any], adapters: bool) -> Tensor:
        options = {
            "optimized_attention_override": _attention,
            "cond_or_uncond": [0],
            "sigmas": sigma,
            "sample_sigmas": sigma,
        }
        if self.scaled:
            noisy, sigma = noisy / per_sample(1 - sigma, noisy), sigma / (1 - sigma)
        model = self.model
        with self.loan.using(adapters):  # which may load the model anew, with the sampling object of its patches
            sampling = model.model_sampling
            model.model_sampling = _RawPrediction(self.stretched or sampling)
            try:
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
