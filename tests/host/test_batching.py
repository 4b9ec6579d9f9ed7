"""A batch is one forward, and every sample in it sees its own caption, size and noise level only."""

import dataclasses
from contextlib import contextmanager

import pytest
import torch
from comfy_extras.nodes_train import TrainLoraNode
from diffusers.models.embeddings import get_timestep_embedding

import tiny
from lora_loom.host.denoiser import Conditioning, HostDenoiser
from lora_loom.host.loan import borrow
from lora_loom.host.texts import encode_captions
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import OptimizerSettings, Plan
from training import adapters_for, learners, samples_for

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "hunyuan_video", "wan", "lumina2", "ltxv")


@contextmanager
def watched(kind):
    """The calls of every module of class ``kind``: (positional arguments, keyword arguments) each."""
    calls, forward = [], kind.__call__  # inherited

    def call(self, *arguments, **keywords):
        calls.append((arguments, keywords))
        return forward(self, *arguments, **keywords)

    kind.__call__ = call
    try:
        yield calls
    finally:
        del kind.__call__


def sizes(calls):
    return [len(arguments[0]) for arguments, _ in calls]


class OneBatch:
    def __init__(self, latents, conditioning):
        self.fixed = Batch(latents, conditioning)

    def batch(self, position):
        return self.fixed


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_costs_one_forward_per_micro_batch(name, checkpoint):
    patcher = tiny.tiny(name, inference=True)
    adapters = adapters_for(patcher, "attention")
    x0, _, _, conditioning = samples_for(name, 3)
    plan = Plan(batch_size=3, optimizer=OptimizerSettings(gradient_accumulation=2))
    with borrow(patcher, adapters, checkpoint) as loan:
        trainer = Trainer(learners(adapters, plan), HostDenoiser(loan), OneBatch(x0, conditioning), plan, 1)
        with watched(type(patcher.model.diffusion_model)) as calls:
            trainer.step()
    assert sizes(calls) == [3, 3]


def predictions(patcher, adapters, latents, sigma, conditioning, one_by_one=False):
    """(prediction, batch sizes of the forwards it took)."""
    kind = type(patcher.model.diffusion_model)
    with borrow(patcher, adapters) as loan, torch.no_grad(), watched(kind) as calls:
        denoiser = HostDenoiser(loan)
        if not one_by_one:
            return denoiser.predict(latents, sigma, conditioning), sizes(calls)
        single = [slice(index, index + 1) for index in range(len(latents))]
        output = [denoiser.predict(latents[part], sigma[part], conditioning[part]) for part in single]
        return torch.cat(output), sizes(calls)


def close(got, want):
    return (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_each_sample_sees_its_own_caption_only(name):
    patcher = tiny.tiny(name, inference=True)
    adapters = adapters_for(patcher)
    latents, _, times, conditioning = samples_for(name, 4)
    with borrow(patcher) as loan:
        sigma = HostDenoiser(loan).noise_levels(times)
    together, forwards = predictions(patcher, adapters, latents, sigma, conditioning)
    alone, single_forwards = predictions(patcher, adapters, latents, sigma, conditioning, one_by_one=True)
    assert forwards == [4] and single_forwards == [1] * 4
    for got, want in zip(together, alone, strict=True):
        assert close(got, want)
    other = [*conditioning[:2], conditioning[0], conditioning[3]]  # the third sample gets the first one's caption
    changed, _ = predictions(patcher, adapters, latents, sigma, other)
    assert not close(changed[2], together[2])
    for index in (0, 1, 3):
        assert close(changed[index], together[index])


@pytest.mark.parametrize(
    "tokens, forwards",
    (
        ((7, 14, 7, 14), [4]),  # the host repeats the shorter ones, which attention does not notice
        ((7, 9, 7, 9), [2, 2]),  # no common length that is worth it
        ((7, 9, 10, 7), [2, 1, 1]),
    ),
    ids=str,
)
def test_captions_of_different_lengths(tokens, forwards):
    patcher = tiny.tiny("sd15", inference=True)
    latents, _, times, conditioning = samples_for("sd15", 4)
    draws = torch.Generator().manual_seed(3)
    conditioning = [
        dataclasses.replace(item, cross_attn=torch.randn(1, length, 64, generator=draws))
        for item, length in zip(conditioning, tokens, strict=True)
    ]
    sigma = 0.1 + 5 * times.float()
    together, got_forwards = predictions(patcher, {}, latents, sigma, conditioning)
    alone, _ = predictions(patcher, {}, latents, sigma, conditioning, one_by_one=True)
    assert got_forwards == forwards
    for got, want in zip(together, alone, strict=True):
        assert close(got, want)


def test_gradients_of_grouped_samples_reach_every_adapter_like_single_ones():
    gradients = {}
    for one_by_one in (False, True):
        patcher = tiny.tiny("sd15", inference=True)
        adapters = adapters_for(patcher, "attention")
        latents, _, times, conditioning = samples_for("sd15", 3)
        draws = torch.Generator().manual_seed(3)
        conditioning[1] = dataclasses.replace(conditioning[1], cross_attn=torch.randn(1, 9, 64, generator=draws))
        sigma = 0.1 + 5 * times.float()
        with borrow(patcher, adapters) as loan:
            denoiser = HostDenoiser(loan)
            parts = [slice(i, i + 1) for i in range(3)] if one_by_one else [slice(0, 3)]
            for part in parts:
                denoiser.predict(latents[part], sigma[part], conditioning[part]).square().sum().backward()
        gradients[one_by_one] = {
            path: torch.cat([tensor.grad.flatten() for tensor in adapter.parameters()])
            for path, adapter in adapters.items()
        }
    for path, grad in gradients[False].items():
        assert (grad - gradients[True][path]).norm() <= 1e-4 * grad.norm()


def test_sdxl_gets_the_sizes_of_each_sample():
    """y is the pooled text and the sinusoids of height, width, top, left, target height, target width."""
    patcher = tiny.tiny("sdxl", inference=True)
    latents, _, times, conditioning = samples_for("sdxl", 3)
    shapes = [((640, 480), (0, 0), (128, 128)), ((100, 2000), (16, 5), (96, 160)), ((512, 512), (3, 40), (160, 96))]
    conditioning = [
        Conditioning(item.cross_attn, item.extras, *shape) for item, shape in zip(conditioning, shapes, strict=True)
    ]
    with borrow(patcher) as loan, torch.no_grad(), watched(type(patcher.model.diffusion_model)) as calls:
        HostDenoiser(loan).predict(latents, 0.1 + times.float(), conditioning)
    ((_, keywords),) = calls
    for row, item in zip(keywords["y"], conditioning, strict=True):
        numbers = [*item.original_size[::-1], *item.crop[::-1], *item.target_size[::-1]]
        embedded = get_timestep_embedding(torch.tensor(numbers), 256, flip_sin_to_cos=True, downscale_freq_shift=0)
        torch.testing.assert_close(row, torch.cat([item.extras["pooled_output"][0], embedded.flatten()]))


def test_sdxl_sizes_change_the_prediction():
    patcher = tiny.tiny("sdxl", inference=True)
    latents, _, times, conditioning = samples_for("sdxl", 2)
    resized = [conditioning[0], dataclasses.replace(conditioning[1], original_size=(2000, 700))]
    first, _ = predictions(patcher, {}, latents, times.float(), conditioning)
    second, _ = predictions(patcher, {}, latents, times.float(), resized)
    assert close(first[0], second[0]) and not close(first[1], second[1])


def test_encoded_captions_are_the_clips_own():
    clip = tiny.tiny_dual_clip(inference=True)
    captions = ["a red circle", "something else", "a red circle"]
    with torch.inference_mode():
        encoded = encode_captions(clip, captions)
        assert list(encoded) == captions[:2]
        for caption, (context, extras) in encoded.items():
            expected, pooled = clip.encode_from_tokens(clip.tokenize(caption), return_pooled=True)
            assert torch.equal(context, expected) and torch.equal(extras["pooled_output"], pooled)
            assert not context.is_inference() and not extras["pooled_output"].is_inference()


def test_the_native_node_runs_the_square_of_the_batch():
    """What our one forward of three samples is compared with: nine samples for the same step."""
    patcher = tiny.tiny("sd15")
    latents, _, _, conditioning = samples_for("sd15", 3)
    schema = TrainLoraNode.define_schema()
    options = {entry.id: [entry.default] for entry in schema.inputs if getattr(entry, "default", None) is not None}
    options |= {"model": [patcher], "batch_size": [3], "steps": [1], "rank": [2]}
    options["latents"] = [{"samples": latents[index : index + 1]} for index in range(3)]
    options |= {"training_dtype": ["fp32"], "lora_dtype": ["fp32"], "gradient_checkpointing": [False]}
    options["positive"] = [[[item.cross_attn, {}]] for item in conditioning]
    with watched(type(patcher.model.diffusion_model)) as calls:
        TrainLoraNode.execute(**options)
    assert sum(sizes(calls)) == 9
