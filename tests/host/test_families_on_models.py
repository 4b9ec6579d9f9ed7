"""Families × tiny models of the host: LoRA on every model in every checkpointing mode, every family on UNet and Flux.

What a cell has to show is in ``family_cell.py``; ``make soak`` runs the whole product (bench/results/families.md).
"""

import copy

import comfy.model_base
import pytest
import torch
from comfy.model_base import ModelType, model_sampling

import tiny
from family_cell import FEW, VARIANTS, Cell, fits, model, prediction, relative, samples
from lora_loom.host.denoiser import HostDenoiser, UnsupportedModelError, prediction_of
from lora_loom.host.families import PROVEN, check_family
from lora_loom.host.loan import borrow
from lora_loom.kernels.registry import FAMILIES

MODELS = [name for name in tiny.SPECS if name != "sd2"]  # sd2_v is the same network
MODES = ({"checkpoint": True}, {"checkpoint": True, "offload": True})


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_every_model(name, tmp_path):
    cell = Cell(name, "LoRA")
    cell.checked(tmp_path)
    adapters = cell.stirred(torch.float64)
    plain = cell.gradients(adapters)
    for mode in MODES:
        for path, grads in cell.gradients(adapters, **mode).items():
            for got, want in zip(grads, plain[path], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9, msg=f"{path} with {mode}")


@pytest.mark.parametrize("name, variant", [(name, variant) for name in FEW for variant in VARIANTS])
def test_every_family_on_unet_and_flux(name, variant, tmp_path):
    if fits(name, variant):
        Cell(name, variant, few=True).checked(tmp_path)
    else:
        with pytest.raises(ValueError, match="tucker.*no effect"):
            Cell(name, variant, few=True).fresh()


def test_every_family_that_can_be_trained_is_in_the_table():
    named = {variant.options.get("algorithm", "LoRA") for variant in VARIANTS.values()}
    assert named == {name for name, family in FAMILIES.items() if family.trainable}
    around = {variant.options.get("algorithm", "LoRA") for variant in VARIANTS.values() if "dora" in variant.options}
    assert around == {name for name, family in FAMILIES.items() if family.dora}


@pytest.mark.parametrize("name", MODELS)
def test_a_lent_model_predicts_what_the_host_does(name):
    """The raw prediction, taken the host's way to x̂0, is what a sampler gets; also where σ is counted otherwise."""
    patcher, data = model(name), samples(name, batch=1)
    x0, noise, times, (item,) = data
    ours = prediction(patcher, {}, data)
    with borrow(patcher) as loan:
        denoiser = HostDenoiser(loan)
        sigma, scaled = denoiser.noise_levels(times), denoiser.scaled
        noisy = denoiser.prediction.noisy(x0, noise, sigma)
    if scaled:
        noisy, sigma = noisy / (1 - sigma), sigma / (1 - sigma)
    with torch.inference_mode():
        host = patcher.model
        conditions = host.extra_conds(**item.host_arguments(), noise=x0, device=x0.device)
        prepared = {key: value.process_cond(batch_size=1, area=None).cond for key, value in conditions.items()}
        found = host.apply_model(noisy, sigma, transformer_options={"sigmas": sigma}, **prepared)
        wanted = host.model_sampling.calculate_denoised(sigma, ours.float(), noisy)
    assert relative(wanted, found) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_models_of_the_table_are_offered(name):
    check_family(model(name).model)


def test_every_family_that_is_offered_is_in_the_table():
    """What only a newer host has is in the table there."""
    here = {kind for kind in PROVEN if hasattr(comfy.model_base, kind)}
    assert here == {type(model(name).model).__name__ for name in MODELS}


def test_other_families_are_refused_by_name():
    class StableAudio1(comfy.model_base.BaseModel):
        pass

    other = copy.copy(model("sd15").model)
    other.__class__ = StableAudio1
    with pytest.raises(UnsupportedModelError, match="of the kind StableAudio1 are not trained yet.*Stable Diffusion 1"):
        check_family(other)


def test_models_that_are_given_a_picture_are_refused():
    painting = tiny.tiny("sd15").model
    painting.set_inpaint()
    filling = tiny.tiny("flux").model
    filling.diffusion_model.img_in.weight = torch.nn.Parameter(torch.zeros(filling.diffusion_model.hidden_size, 384))
    for other in (painting, filling):
        with pytest.raises(UnsupportedModelError, match="inpainting, image-to-video or control model"):
            check_family(other)


KINDS = [kind for kind in ("EDM", "IMG_TO_IMG", "IMG_TO_IMG_FLOW", "V_PREDICTION_DDPM") if hasattr(ModelType, kind)]


@pytest.mark.parametrize("kind", KINDS)
def test_other_samplings_are_refused_by_name(kind):
    sampling = model_sampling(tiny.tiny("sd15").model.model_config, ModelType[kind])
    with pytest.raises(UnsupportedModelError, match=f"with {kind} sampling cannot be trained yet; supported are"):
        prediction_of(sampling)


def test_a_scaled_noise_is_refused_by_name():
    sampling = tiny.tiny("flux").model.model_sampling
    sampling.noise_scale = 8.0
    with pytest.raises(UnsupportedModelError, match="noise_scale 8"):
        prediction_of(sampling)
