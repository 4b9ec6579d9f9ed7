"""What reaches the network in a step of training: timesteps that no precision rounds, and distilled guidance at 1.

Some trainers cast timesteps to bfloat16 with everything else, which moves them by up to 2 of 1000.
"""

import functools

import pytest
import torch

import tiny
from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import Plan, RunSettings
from training import adapters_for, borrow, learners, opened, samples_for

BF16 = torch.bfloat16
# the layer that takes the sine embedding of the timestep
EMBEDDED = {
    "sd15": "time_embed.0",
    "sd3": "t_embedder.mlp.0",
    "flux": "time_in.in_layer",
    "chroma": "distilled_guidance_layer.in_proj",
    "lumina2": "t_embedder.mlp.0",
    "z_image": "t_embedder.mlp.0",
    "qwen_image": "time_text_embed.timestep_embedder.linear_1",
    "wan": "time_embedding.0",
    "cosmos2": "t_embedder.1.linear_1",
}


class Examples:
    """One batch for ever."""

    def __init__(self, name):
        latents, _, _, conditioning = samples_for(name, 3)
        self.one = Batch(latents, conditioning)

    def batch(self, position):
        return self.one


def what_it_gets(name, patcher, compute_dtype=None):
    """(what the network is called with, what the first layer of its timestep is given) in a training step."""
    network = patcher.model.diffusion_model
    adapters = adapters_for(patcher, "attention", conv=False)
    seen = []
    with borrow(patcher, adapters, compute_dtype=compute_dtype) as loan:
        hooks = [
            module.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
            for module in (network, network.get_submodule(EMBEDDED[name]))
        ]
        try:
            plan = Plan(learning_rate=1e-3, seed=9)
            Trainer(learners(adapters, plan), HostDenoiser(loan), Examples(name), plan, 1).step()
        finally:
            for hook in hooks:
                hook.remove()
    (latents, times), (embedded,) = seen
    return latents.dtype, times, embedded


@functools.cache
def in_float32(name):
    return what_it_gets(name, tiny.tiny(name))


@pytest.mark.parametrize("stored", (torch.float32, BF16), ids=("cast", "stored"))
@pytest.mark.parametrize("name", EMBEDDED)
def test_timesteps_are_not_rounded_to_bfloat16(name, stored):
    _, wanted, exact = in_float32(name)
    dtype, times, embedded = what_it_gets(name, tiny.tiny(name, dtype=stored), None if stored == BF16 else BF16)
    assert dtype == embedded.dtype == BF16, "the network computes in it"
    assert times.dtype == wanted.dtype == torch.float32 and torch.equal(times, wanted)
    assert (wanted != wanted.bfloat16()).any(), "rounding would have shown"
    assert torch.equal(embedded, exact.bfloat16()), "rounded is what has been embedded, not what will be"


# -- distilled guidance


@pytest.mark.parametrize("name, wanted", (("flux", 1.0), ("chroma", 0.0), ("sd15", None)))
def test_distilled_guidance_is_that_which_teaches_the_model_itself(name, wanted, tmp_path):
    """Flux at 1; Chroma, which is not distilled, at the 0 that it samples at; none for a model without. The host's own
    default for Flux is 3.5."""
    dataset = opened(images(tmp_path / "zorb"), 64, 16)
    plan = Plan(length=1, rank=2, batch_size=2, run=RunSettings(smoke_test=False))
    with torch.inference_mode():
        patcher = tiny.tiny(name, inference=True) if name == "chroma" else tiny_model(name)
        seen = []
        hook = patcher.model.diffusion_model.register_forward_pre_hook(
            lambda module, args, given: seen.append(given.get("guidance")), with_kwargs=True
        )
        train(Request(patcher, clip_for(name), vae_for(name), dataset, plan, f"guidance {name}"))
        hook.remove()
    assert len(seen) == 1
    assert seen[0] is None if wanted is None else seen[0].tolist() == [wanted, wanted]
