"""Options of the objective without effect are refused by name, with what to do instead."""

import pytest

from lora_loom.training.objective import Prediction, check_objective
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ObjectiveSettings

E, V, FLOW = Prediction
FITS = {"v_loss_scale": (True, (V,)), "v_like_loss": (0.5, (E,)), "zero_terminal_snr": (True, (V,))}


@pytest.mark.parametrize("kind", Prediction)
@pytest.mark.parametrize("name", FITS)
def test_options_for_one_kind_of_model(name, kind):
    value, fitting = FITS[name]
    settings = ObjectiveSettings(**{name: value})
    if kind in fitting:
        check_objective(settings, kind)
        return
    with pytest.raises(OptionError, match=f"{name} is {value}.*(Switch it off|Set it to 0)"):
        check_objective(settings, kind)


@pytest.mark.parametrize("option", ({"logit_mean": 0.5}, {"logit_std": 0.5}))
def test_logit_options_need_logit_normal_timesteps(option):
    check_objective(ObjectiveSettings(**option), FLOW)
    for kind in (E, V):
        check_objective(ObjectiveSettings(timesteps="logit-normal", **option), kind)
        with pytest.raises(OptionError, match="logit_mean and logit_std.*automatic, which is uniform.*logit-normal"):
            check_objective(ObjectiveSettings(**option), kind)
    for timesteps in ("uniform", "mode", "cosmap", "curve"):
        curve = {"timestep_curve": "0:1, 1:2"} if timesteps == "curve" else {}
        with pytest.raises(OptionError, match=f"logit_mean and logit_std.*timesteps {timesteps}.*logit-normal"):
            ObjectiveSettings(timesteps=timesteps, **curve, **option)


def test_a_range_without_draws_is_refused_before_the_run():
    settings = ObjectiveSettings(logit_mean=-5.0, logit_std=0.2, timesteps="logit-normal", min_timestep=950)
    for kind in Prediction:
        with pytest.raises(OptionError, match="min_timestep is 950.*logit_mean"):
            check_objective(settings, kind)


@pytest.mark.parametrize("kind", Prediction)
def test_defaults_fit_every_model(kind):
    check_objective(ObjectiveSettings(), kind)
    everywhere = ObjectiveSettings(
        timesteps="curve", timestep_curve="0:1, 1:2", min_timestep=100, timestep_shift="resolution", loss="smooth L1",
        huber_scale=2.0, min_snr_gamma=5.0, debiased=True, p2_gamma=1.0, noise_offset=0.1, input_perturbation=0.1,
    )
    check_objective(everywhere, kind)
