"""The tiny models that the host tests stand on: each runs through the host's own sampler."""

import comfy.sample
import pytest
import torch

import tiny


def sample(patcher, positive, negative, latent, steps=2):
    noise = comfy.sample.prepare_noise(latent, 3)
    with torch.inference_mode():
        return comfy.sample.sample(
            patcher, noise, steps, 1.5, "euler", "simple", positive, negative, latent, seed=3, disable_pbar=True
        )


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_architecture_samples(name):
    latent = tiny.latent(name, batch=2)
    inputs = tiny.conditioning(name), tiny.conditioning(name, seed=2)
    result = sample(tiny.tiny(name), *inputs, latent)
    assert result.shape == latent.shape
    assert torch.isfinite(result).all()
    assert result.std() > 0.01
    assert torch.equal(result, sample(tiny.tiny(name, inference=True), *inputs, latent))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_seed_decides_the_weights(name):
    first, again, other = (tiny.tiny(name, seed).model.diffusion_model.state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].ndim > 1)


def test_weights_are_inference_tensors_only_on_request():
    assert not any(weight.is_inference() for weight in tiny.tiny("sd15").model.diffusion_model.parameters())
    assert all(weight.is_inference() for weight in tiny.tiny("sd15", inference=True).model.diffusion_model.parameters())


@pytest.mark.parametrize("name", ["flux", "hunyuan_video"])
def test_depth_is_the_number_of_blocks(name):
    network = tiny.tiny(name, depth=3).model.diffusion_model
    assert (len(network.double_blocks), len(network.single_blocks)) == (3, 3)


def test_stored_narrow_and_cast_on_use():
    patcher = tiny.tiny("sd15", dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert {weight.dtype for weight in patcher.model.diffusion_model.parameters()} == {torch.bfloat16}
    result = sample(patcher, tiny.conditioning("sd15"), tiny.conditioning("sd15", seed=2), tiny.latent("sd15"))
    assert torch.isfinite(result).all()


def test_the_full_unet_has_the_shape_of_sd15():
    network = tiny.unet(96).model.diffusion_model
    assert (len(network.input_blocks), len(network.output_blocks)) == (12, 12)
    assert sum(weight.numel() for weight in network.parameters()) > 70e6


def test_text_encoders():
    clip, dual = tiny.tiny_clip(), tiny.tiny_dual_clip()
    text, options = clip.encode_from_tokens_scheduled(clip.tokenize("a red cat"))[0]
    assert text.shape == (1, 77, 64)
    text, options = dual.encode_from_tokens_scheduled(dual.tokenize("a red cat"))[0]
    assert text.shape == (1, 77, 128)
    assert options["pooled_output"].shape == (1, 64)
    assert all(weight.is_inference() for weight in tiny.tiny_clip(inference=True).cond_stage_model.parameters())


def test_vaes():
    picture = torch.rand(1, 64, 64, 3)
    encoder, pixels = tiny.tiny_vae(), tiny.pixel_vae()
    assert encoder.encode(picture).shape == (1, 4, 8, 8)
    assert encoder.decode(encoder.encode(picture)).shape == picture.shape
    assert (pixels.decode(pixels.encode(picture)) - picture).abs().max() < 1e-5
