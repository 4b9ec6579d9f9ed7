"""zero_terminal_snr on a v-model: what the network is given, what it is asked for and what counts, all of one table."""

import comfy.model_sampling
import diffusers
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

import tiny
from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.denoiser import HostDenoiser, zero_terminal, zero_terminal_note
from lora_loom.host.loan import borrow
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.training.objective import Prediction, loss_weights
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ObjectiveSettings, Plan
from training import adapters_for, opened, samples_for

HOSTS_LAST_ALPHA = 4.8973451890853435e-08  # where the paper has 0, the host keeps σ finite


def v_model(zsnr=False, **arguments):
    return ModelSamplingDiscrete().patch(tiny.tiny("sd15", **arguments), "v_prediction", zsnr)[0]


def fixed_alphas():
    """ᾱ as diffusers rescales it, in float64."""
    scheduler = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(betas.float(), scheduler.betas)
    alphas = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    assert alphas[-1] == 0
    alphas[-1] = HOSTS_LAST_ALPHA
    return alphas


EVERY = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000


@pytest.mark.parametrize("inference", (False, True))
def test_noise_levels_are_those_of_diffusers_and_of_the_hosts_node(inference):
    alphas = fixed_alphas()
    with borrow(v_model(inference=inference)) as loan:
        sigma = HostDenoiser(loan, zero_terminal_snr=True).noise_levels(EVERY)
        plain = HostDenoiser(loan).noise_levels(EVERY)
    torch.testing.assert_close(sigma.double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-4, atol=0)
    node = v_model(zsnr=True).get_model_object("model_sampling").sigmas
    torch.testing.assert_close(sigma, node, rtol=1e-4, atol=0)
    assert plain[-1] < 15 and sigma[-1] > 4000
    snr = Prediction.VELOCITY.snr(sigma)
    torch.testing.assert_close(snr, alphas / (1 - alphas), rtol=2e-4, atol=0)


def test_weights_belong_to_the_fixed_table():
    """A peer weighs with the ratios from before the fix: 4.8, 14 and 314 times too much at t = 900, 950 and 990."""
    settings = ObjectiveSettings(min_snr_gamma=5.0)
    with borrow(v_model()) as loan:
        fixed, before = (HostDenoiser(loan, on).noise_levels(EVERY) for on in (True, False))
    weights, stale = (loss_weights(sigma, Prediction.VELOCITY, settings).double() for sigma in (fixed, before))
    snr = fixed_alphas() / (1 - fixed_alphas())
    torch.testing.assert_close(weights, snr.clamp(max=5) / (snr + 1), rtol=2e-4, atol=1e-12)
    ratio = (stale / weights)[[900, 950, 990]]
    torch.testing.assert_close(ratio, torch.tensor([4.8, 14.0, 314.0], dtype=torch.float64), rtol=0.02, atol=0)


def test_the_network_sees_the_same_as_with_the_hosts_node():
    """Timestep, input scaling and all: predictions equal those of the MODEL a ModelSamplingDiscrete node has fixed."""
    x0, noise, _, conditioning = samples_for("sd15", 4)
    times = torch.tensor([0.2, 0.7, 0.95, 0.9995], dtype=torch.float64)
    outputs = {}
    for name, by_node, on in (("ours", False, True), ("node", True, False), ("off", False, False)):
        patcher = v_model(by_node)
        adapters = adapters_for(patcher, "attention")
        with borrow(patcher, adapters) as loan, torch.no_grad():
            denoiser = HostDenoiser(loan, on)
            assert denoiser.prediction is Prediction.VELOCITY
            sigma = denoiser.noise_levels(times)
            noisy = Prediction.VELOCITY.noisy(x0, noise, sigma)
            both = denoiser.predict, denoiser.predict_base
            outputs[name] = [predict(noisy, sigma, conditioning) for predict in both]
    for ours, node, off in zip(*(outputs[name] for name in ("ours", "node", "off")), strict=True):
        torch.testing.assert_close(ours, node, rtol=1e-3, atol=1e-3 * node.std().item())
        assert (ours - off).abs().max() > 0.05 * node.std()


def test_every_timestep_of_the_stretched_table_reaches_the_network():
    stretched = zero_terminal(v_model().get_model_object("model_sampling"))
    assert torch.equal(stretched.timestep(stretched.sigmas), torch.arange(1000))


def test_the_hosts_object_stays_as_it_was():
    patcher = v_model(inference=True)
    sampling = patcher.get_model_object("model_sampling")
    base = patcher.model.model_sampling
    sigmas, logs = sampling.sigmas.clone(), sampling.log_sigmas.clone()
    x0, _, _, conditioning = samples_for("sd15", 1)
    with borrow(patcher) as loan, torch.no_grad():
        assert patcher.model.model_sampling is sampling
        denoiser = HostDenoiser(loan, zero_terminal_snr=True)
        denoiser.predict(x0, denoiser.noise_levels(EVERY[-1:]), conditioning)
        assert patcher.model.model_sampling is sampling
    patcher.unpatch_model()
    assert patcher.model.model_sampling is base and isinstance(base, comfy.model_sampling.EPS)
    assert torch.equal(sampling.sigmas, sigmas) and torch.equal(sampling.log_sigmas, logs)


def test_a_model_that_ends_in_noise_already_is_not_fixed_twice():
    sampling = v_model(zsnr=True).get_model_object("model_sampling")
    assert zero_terminal(sampling) is sampling and "changes nothing" in zero_terminal_note(sampling)
    plain = v_model().get_model_object("model_sampling")
    assert zero_terminal(plain) is not plain and "ModelSamplingDiscrete" in zero_terminal_note(plain)


def test_noise_levels_that_are_no_table_are_refused():
    class Continuous(comfy.model_sampling.ModelSamplingContinuousV, comfy.model_sampling.V_PREDICTION):
        pass

    with pytest.raises(OptionError, match="zero_terminal_snr.*expected False.*ModelSamplingContinuousV"):
        zero_terminal(Continuous())


def test_a_run_equals_one_on_a_model_that_a_node_has_fixed(tmp_path, monkeypatch):
    monkeypatch.setattr("folder_paths.output_directory", str(tmp_path / "output"))
    dataset, clip, vae = opened(images(tmp_path / "zorb"), 64, 16), clip_for("sd15"), vae_for("sd15")

    def run(name, by_node, on, sampling="v_prediction"):
        model = ModelSamplingDiscrete().patch(tiny_model("sd15"), sampling, by_node)[0]
        objective = ObjectiveSettings(zero_terminal_snr=on, min_timestep=600)
        plan = Plan(length=3, batch_size=2, rank=2, learning_rate=1e-3, seed=4, objective=objective)
        with torch.inference_mode():
            return train(Request(model, clip, vae, dataset, plan, name))

    ours, node, off = run("ours", False, True), run("node", True, False), run("off", False, False)
    assert ours.losses == pytest.approx(node.losses, rel=1e-4) and ours.losses != pytest.approx(off.losses, rel=1e-2)
    assert "sample with ModelSamplingDiscrete" in ours.report and "ModelSamplingDiscrete" not in node.report
    assert "zero_terminal_snr changes nothing" in run("both", True, True).report
    with pytest.raises(OptionError, match="zero_terminal_snr is True and has no effect.*predicts noise"):
        run("noise", False, True, "eps")
