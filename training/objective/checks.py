"""Options of the objective that have no effect on a model of this kind are refused."""

from __future__ import annotations

from ..options import OptionError
from ..settings import ObjectiveSettings
from .prediction import Prediction
from .timesteps import check_range, resolved, time_shift

WHAT = {
    Prediction.EPSILON: "predicts noise (ε)",
    Prediction.VELOCITY: "predicts v",
    Prediction.FLOW: "is a flow model",
}
# option -> the only kind of model it is for, and what to do instead
ONLY_FOR = {
    "v_loss_scale": (
        Prediction.VELOCITY,
        "it weighs the loss of v-prediction as noise prediction would. Switch it off, or use min_snr_gamma, which fits "
        "every kind of model",
    ),
    "v_like_loss": (
        Prediction.EPSILON,
        "it adds the loss of v-prediction to that of noise prediction. Set it to 0",
    ),
    "zero_terminal_snr": (
        Prediction.VELOCITY,
        "at pure noise, noise prediction has nothing to learn and a flow model ends in pure noise anyway. Switch it "
        "off; if the MODEL does predict v, say so with a ModelSamplingDiscrete node",
    ),
}
PIXELS = (256**2, 2048**2)  # about the smallest and the largest pictures anybody trains


def check_objective(settings: ObjectiveSettings, prediction: Prediction) -> None:
    """Raises OptionError for options that have no effect on a model that predicts in this space."""
    for name, (intended, why) in ONLY_FOR.items():
        if getattr(settings, name) and prediction is not intended:
            raise OptionError(
                f"{name} is {getattr(settings, name)!r} and has no effect here, because this MODEL "
                f"{WHAT[prediction]}: {why}"
            )
    kind = resolved(prediction, settings)
    if kind != "logit-normal" and (settings.logit_mean, settings.logit_std) != (0.0, 1.0):
        raise OptionError(
            f"logit_mean and logit_std have no effect: timesteps is {settings.timesteps}, which is {kind} for a MODEL "
            f"that {WHAT[prediction]}. Set them to 0 and 1, or timesteps to logit-normal"
        )
    for pixels in PIXELS:
        check_range(prediction, settings, time_shift(settings, pixels))
