"""The training loss against diffusers (its network, its scheduler, the textbook target), and flow's closed form."""

import diffusers
import pytest
import torch
from comfy.utils import unet_to_diffusers
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete, ModelSamplingFlux, ModelSamplingSD3

import tiny
from lora_loom.host.denoiser import Conditioning, HostDenoiser
from lora_loom.host.loan import borrow
from lora_loom.training.loop import Batch, Trainer, generator
from lora_loom.training.objective import Prediction, sample_losses
from lora_loom.training.settings import ObjectiveSettings, Plan
from training import adapters_for, learners

TOLERANCE = 1e-5
VISIBLE = 30 * TOLERANCE  # what a test could not overlook
TIMESTEPS = (0, 999, 1, 500, *torch.randint(1000, (4,), generator=torch.Generator().manual_seed(5)).tolist())
HOSTS_LAST_ALPHA = 4.8973451890853435e-08  # where diffusers has 0, the host keeps σ finite

DIFFUSERS = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "attention_head_dim": 8,  # diffusers' name for the number of heads
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (64, 128),
        "attention_head_dim": (1, 2),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 32,
    },
}


def diffusers_unet(name, patcher, adapters):
    """The same network in diffusers; adapters, if any, are multiplied out and added to its weights."""
    weights = {key: value.clone() for key, value in patcher.model.diffusion_model.state_dict().items()}
    for path, adapter in adapters.items():
        key = path.removeprefix("diffusion_model.") + ".weight"
        with torch.no_grad():
            product = torch.einsum("or,r...->o...", adapter.up.flatten(1).double(), adapter.down.double())
        weights[key] = weights[key] + (adapter.alpha / adapter.rank * product).float().view_as(weights[key])
    config = DIFFUSERS[name]
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, layers_per_block=1, cross_attention_dim=tiny.SPECS[name].context, **config
    )
    names = unet.state_dict().keys()
    host_names = {
        theirs: host
        for theirs, host in unet_to_diffusers(tiny.SPECS[name].settings).items()
        if theirs in names and host in weights
    }
    assert sorted(host_names.values()) == sorted(weights)
    unet.load_state_dict({theirs: weights[host] for theirs, host in host_names.items()})
    return unet.eval()


def scheduler_for(kind, zero_snr=False):
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction" if kind is Prediction.VELOCITY else "epsilon",
        rescale_betas_zero_snr=zero_snr,
    )
    if zero_snr:
        assert scheduler.alphas_cumprod[-1] == 0
        scheduler.alphas_cumprod[-1] = HOSTS_LAST_ALPHA
    return scheduler


def oracle_losses(unet, scheduler, x0, noise, timesteps, conditioning):
    """One loss per sample, in diffusers alone."""
    extra = {}
    if unet.config.addition_embed_type:
        sizes = [
            (*item.original_size[::-1], *item.crop[::-1], *item.target_size[::-1])  # diffusers says height first
            for item in conditioning
        ]
        pooled = torch.cat([item.extras["pooled_output"] for item in conditioning])
        extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.tensor(sizes, dtype=torch.float32)}
    text = torch.cat([item.cross_attn for item in conditioning])
    velocity = scheduler.config.prediction_type == "v_prediction"
    with torch.no_grad():
        output = unet(scheduler.add_noise(x0, noise, timesteps), timesteps, text, **extra).sample
        target = scheduler.get_velocity(x0, noise, timesteps) if velocity else noise
    return (output - target).double().square().flatten(1).mean(1)


def our_losses(patcher, adapters, x0, noise, times, conditioning, kind):
    with borrow(patcher, adapters) as loan, torch.no_grad():
        denoiser = HostDenoiser(loan)
        assert denoiser.prediction is kind
        sigma = denoiser.noise_levels(times)
        output = denoiser.predict(kind.noisy(x0, noise, sigma), sigma, conditioning)
        return sample_losses(output, kind.target(x0, noise, sigma)).double()


def samples(name, count, seed=1):
    """Clean latents, noise, and captions and sizes that all differ."""
    draws = torch.Generator().manual_seed(seed)
    shape = (count, *tiny.SPECS[name].latent)
    x0, noise = torch.randn(shape, generator=draws), torch.randn(shape, generator=draws)
    conditioning = []
    for index in range(count):
        text, extras = tiny.conditioning(name, seed=seed + index)[0]
        conditioning.append(Conditioning(text, extras, (90 + index, 140), (3 * index, index + 2), (128, 96)))
    return x0, noise, conditioning


def relative(got, want):
    return ((got - want).abs() / want.abs()).max().item()


def as_set_by_node(patcher, kind, zero_snr):
    sampling = "v_prediction" if kind is Prediction.VELOCITY else "eps"
    return ModelSamplingDiscrete().patch(patcher, sampling, zero_snr)[0]


@pytest.mark.parametrize("with_adapters", (False, True), ids=("base", "adapters"))
@pytest.mark.parametrize("case", ("epsilon", "epsilon by node", "v", "v, zero terminal SNR"))
@pytest.mark.parametrize("name", DIFFUSERS)
def test_loss_equals_diffusers(name, case, with_adapters):
    kind = Prediction.VELOCITY if case.startswith("v") else Prediction.EPSILON
    zero_snr = case.endswith("SNR")
    patcher = tiny.tiny(name, inference=True)
    adapters = adapters_for(patcher) if with_adapters else {}
    unet = diffusers_unet(name, patcher, adapters)
    if case != "epsilon":
        patcher = as_set_by_node(patcher, kind, zero_snr)
    x0, noise, conditioning = samples(name, len(TIMESTEPS))
    timesteps = torch.tensor(TIMESTEPS)
    times = (timesteps.double() + 0.5) / 1000
    got = our_losses(patcher, adapters, x0, noise, times, conditioning, kind)
    want = oracle_losses(unet, scheduler_for(kind, zero_snr), x0, noise, timesteps, conditioning)
    assert relative(got, want) < TOLERANCE


def test_adapters_change_the_loss():
    """Else the cases with adapters would show nothing."""
    patcher = tiny.tiny("sd15", inference=True)
    x0, noise, conditioning = samples("sd15", 2)
    times = torch.tensor([0.2, 0.7])
    base, adapted = (
        our_losses(patcher, adapters, x0, noise, times, conditioning, Prediction.EPSILON)
        for adapters in ({}, adapters_for(patcher))
    )
    assert relative(adapted, base) > VISIBLE


def test_zero_terminal_snr_differs_from_the_plain_schedule():
    patcher = tiny.tiny("sd15")
    x0, noise, conditioning = samples("sd15", 1)
    plain, rescaled = (
        our_losses(
            as_set_by_node(patcher, Prediction.VELOCITY, zero_snr),
            {}, x0, noise, torch.tensor([0.95]), conditioning, Prediction.VELOCITY,
        )
        for zero_snr in (False, True)
    )  # fmt: skip
    assert relative(rescaled, plain) > VISIBLE


class Fixed:
    """A data set of one batch."""

    def __init__(self, batch):
        self.fixed = batch

    def batch(self, position):
        return self.fixed


@pytest.mark.parametrize("kind", (Prediction.EPSILON, Prediction.VELOCITY))
def test_the_trainers_own_loss_equals_diffusers(kind):
    """With its own draws: each position falls into one of a thousand equal parts, and the noise is plain normal."""
    patcher = tiny.tiny("sd15", inference=True)
    adapters = adapters_for(patcher, preset="attention")
    unet = diffusers_unet("sd15", patcher, adapters)
    x0, _, conditioning = samples("sd15", 3)
    plan = Plan(seed=11, objective=ObjectiveSettings(timesteps="uniform"))
    with borrow(as_set_by_node(patcher, kind, False), adapters) as loan:
        examples = Fixed(Batch(x0, conditioning))
        trainer = Trainer(learners(adapters, plan), HostDenoiser(loan), examples, plan, total_steps=10)
        losses = [trainer.loss(position).item() for position in range(3)]
    for position, got in enumerate(losses):
        drawn = torch.rand(3, generator=generator(11, "timestep", position), dtype=torch.float64)
        noise = torch.randn(x0.shape, generator=generator(11, "noise", position))
        timesteps = (1000 * drawn).floor().long()
        want = oracle_losses(unet, scheduler_for(kind), x0, noise, timesteps, conditioning).mean()
        assert relative(torch.tensor(got), want) < TOLERANCE


def network_velocity(name, patcher, noisy, sigma, conditioning):
    """The flow network called by hand, every argument as its paper has it."""
    network = patcher.model.diffusion_model
    text = torch.cat([item.cross_attn for item in conditioning])
    pooled = torch.cat([item.extras["pooled_output"] for item in conditioning])
    with torch.inference_mode():
        if name == "sd3":
            return network(noisy, 1000 * sigma, context=text, y=pooled)
        guidance = torch.full((len(sigma),), 3.5)
        return network(noisy, sigma, context=text, y=pooled, guidance=guidance)  # multiplies by 1000 itself


@pytest.mark.parametrize("name", ("sd3", "flux"))
def test_flow_loss_equals_its_closed_form(name):
    patcher = tiny.tiny(name, inference=True)
    x0, noise, conditioning = samples(name, 5)
    sigma = torch.tensor([0.0, 0.999999, 0.5, 0.123, 0.87])
    got = our_losses(patcher, {}, x0, noise, sigma.double(), conditioning, Prediction.FLOW)
    level = sigma.view(-1, 1, 1, 1)
    output = network_velocity(name, patcher, (1 - level) * x0 + level * noise, sigma, conditioning)
    want = (output - (noise - x0)).double().square().flatten(1).mean(1)
    assert relative(got, want) < TOLERANCE


@pytest.mark.parametrize("name", ("sd3", "flux"))
def test_flow_loss_with_adapters_equals_the_merged_network(name):
    patcher = tiny.tiny(name)
    adapters = adapters_for(patcher)
    x0, noise, conditioning = samples(name, 3)
    sigma = torch.tensor([0.02, 0.6, 0.97])
    got = our_losses(patcher, adapters, x0, noise, sigma.double(), conditioning, Prediction.FLOW)
    base = our_losses(patcher, {}, x0, noise, sigma.double(), conditioning, Prediction.FLOW)
    with torch.no_grad():
        for path, adapter in adapters.items():
            weight = patcher.model.get_submodule(path).weight
            product = torch.einsum("or,r...->o...", adapter.up.flatten(1).double(), adapter.down.double())
            weight += (adapter.alpha / adapter.rank * product).float().view_as(weight)
    level = sigma.view(-1, 1, 1, 1)
    output = network_velocity(name, patcher, (1 - level) * x0 + level * noise, sigma, conditioning)
    want = (output - (noise - x0)).double().square().flatten(1).mean(1)
    assert relative(got, want) < TOLERANCE
    assert relative(got, base) > VISIBLE


@pytest.mark.parametrize("name", ("sd3", "flux"))
def test_the_inference_shift_changes_nothing(name):
    patcher = tiny.tiny(name)
    x0, noise, conditioning = samples(name, 2)
    node = ModelSamplingSD3().patch if name == "sd3" else None
    if node:
        shifted = node(patcher, 7.0)[0]
    else:
        shifted = ModelSamplingFlux().patch(patcher, 2.5, 0.5, 2048, 2048)[0]
    assert shifted.object_patches["model_sampling"].percent_to_sigma(0.5) != pytest.approx(
        patcher.model.model_sampling.percent_to_sigma(0.5), abs=0.01
    )
    losses = [
        our_losses(model, {}, x0, noise, torch.tensor([0.3, 0.8]), conditioning, Prediction.FLOW)
        for model in (patcher, shifted)
    ]
    assert torch.equal(*losses)
