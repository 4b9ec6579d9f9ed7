"""What a patched MODEL brings along (kept, left out and told, or refused), and that it keeps its patches."""

import re

import comfy.model_management
import comfy.model_sampling
import comfy.sd
import pytest
import torch
from comfy.model_patcher import PatcherInjection
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

from applying import lora_on
from graph import clip_for, images, sampled, tiny_model, vae_for
from lora_loom.host.apply import BRANCH, FUSE, Strengths, apply_lora
from lora_loom.host.denoiser import UnsupportedModelError
from lora_loom.host.examples import HostExamples
from lora_loom.host.latents import encode_pictures
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.strengths.schedule import parse
from lora_loom.training.dataset.batches import BatchPlan, place
from lora_loom.training.loop import generator
from lora_loom.training.objective import Prediction, draw_times
from lora_loom.training.settings import ObjectiveSettings, Plan
from snapshot import weights
from training import opened

PLAN = Plan(length=2, batch_size=2, rank=2, alpha=2.0, learning_rate=1e-2, seed=5)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Data set, text encoder, VAE."""
    return opened(images(tmp_path_factory.mktemp("zorb")), 64, 16), clip_for("sd15"), vae_for("sd15")


@pytest.fixture
def run(parts, tmp_path, monkeypatch):
    """Train on a MODEL as the node does; a run folder of its own."""
    monkeypatch.setattr("folder_paths.output_directory", str(tmp_path))
    dataset, clip, vae = parts

    def run(model, plan=PLAN):
        names = iter(range(100))
        with torch.inference_mode():
            return train(Request(model, clip, vae, dataset, plan, f"run {next(names)}", "new"))

    return run


@pytest.fixture(scope="module")
def plain(parts, tmp_path_factory):
    """The run on the MODEL as it was loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("folder_paths.output_directory", str(tmp_path_factory.mktemp("output")))
        dataset, clip, vae = parts
        with torch.inference_mode():
            return train(Request(tiny_model("sd15"), clip, vae, dataset, PLAN, "plain"))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def told(result):
    """What the report says of what the MODEL brings along."""
    notes = [line.removeprefix("note: ") for line in result.report.splitlines() if line.startswith("note: ")]
    return [note for note in notes if note.startswith(("left out for training", "trains on top"))]


def carried(model):
    """What a MODEL carries beside its weights, by identity."""

    def flat(value):
        return {key: flat(inner) for key, inner in value.items()} if isinstance(value, dict) else id(value)

    names = ("patches", "object_patches", "model_options", "wrappers", "callbacks", "injections", "hook_patches")
    return {name: flat(dict(getattr(model, name))) for name in names}


def raising(*args, **kwargs):
    raise AssertionError("called in training")


# ---------------------------------------------------------------- left out and told


def no_backward(function, *args, **kwargs):
    """Attention as fast kernels do it: right forward, no way back."""
    return function(*args, **{**kwargs, "_inside_attn_wrapper": True}).detach()


@pytest.mark.parametrize("override", [no_backward, raising])
def test_an_attention_override(run, plain, override):
    model = tiny_model("sd15")
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    before = carried(model)
    result = run(model)
    assert told(result) == [
        f"left out for training: attention override {override.__qualname__} (torch's own attention is used)"
    ]
    assert same(result.lora, plain.lora) and result.losses == plain.losses
    assert carried(model) == before


class Skipping:
    """A cache of the last step: every second call gives the answer of the one before."""

    def __init__(self):
        self.calls, self.last = 0, None

    def __call__(self, executor, *args, **kwargs):
        self.calls += 1
        if self.calls % 2:
            self.last = executor(*args, **kwargs)
        return self.last


@pytest.mark.parametrize("kind", [WrappersMP.DIFFUSION_MODEL, WrappersMP.APPLY_MODEL])
def test_a_wrapper_that_skips_steps(run, plain, kind):
    skipping, model = Skipping(), tiny_model("sd15")
    model.add_wrapper_with_key(kind, "skip", skipping)
    before, picture = carried(model), sampled(model)
    assert skipping.calls
    skipping.calls = 0
    result = run(model)
    assert told(result) == [f"left out for training: {kind} wrapper Skipping"]
    assert skipping.calls == 0 and same(result.lora, plain.lora)
    assert carried(model) == before and torch.equal(sampled(model), picture) and skipping.calls


def test_a_wrapper_in_the_options(run, plain):
    model = tiny_model("sd15")
    options = model.model_options["transformer_options"]
    options["wrappers"] = {WrappersMP.APPLY_MODEL: {"skip": [raising]}}
    options["patches_replace"] = {"attn1": {("input", 1): raising}}
    result = run(model)
    assert any("transformer option wrappers" in line and WrappersMP.APPLY_MODEL in line for line in told(result))
    assert any("transformer option patches_replace (attn1)" in line for line in told(result))
    assert same(result.lora, plain.lora)


def test_a_model_function_wrapper(run, plain):
    def skipping(apply_model, arguments):
        if "last" not in memory:
            memory["last"] = apply_model(arguments["input"], arguments["timestep"], **arguments["c"])
        return memory["last"]

    memory, model = {}, tiny_model("sd15")
    model.set_model_unet_function_wrapper(skipping)
    model.set_model_sampler_cfg_function(raising)
    before = carried(model)
    result = run(model)
    assert not memory and same(result.lora, plain.lora) and carried(model) == before
    assert len(told(result)) == 2
    assert any(line.startswith("left out for training: model_function_wrapper ") for line in told(result))
    assert any(line.startswith("left out for training: sampler_cfg_function raising") for line in told(result))


def test_a_compile_wrapper(run, plain):
    model = tiny_model("sd15")
    set_torch_compile_wrapper(model, backend="inductor")
    before = carried(model)
    result = run(model)
    assert told(result) == ["left out for training: torch.compile"]
    assert same(result.lora, plain.lora) and carried(model) == before


def test_a_compiled_network(run, plain):
    """As the older compile nodes do it."""
    model = tiny_model("sd15")
    model.add_object_patch("diffusion_model", torch.compile(model.get_model_object("diffusion_model")))
    before, network = carried(model), model.model.diffusion_model
    result = run(model)
    assert told(result) == ["left out for training: torch.compile on diffusion_model"]
    assert same(result.lora, plain.lora) and carried(model) == before and model.model.diffusion_model is network


# ---------------------------------------------------------------- kept


def with_lora(model, seed=9, scale=0.3):
    """``model`` with a LoRA on some of its layers, as core's loaders put it there."""
    draws, lora = torch.Generator().manual_seed(seed), {}
    for target in select_targets(model.model, "attention", False):
        (out, *rest), path = target.shape, target.path
        lora[f"{path}.lora_down.weight"] = torch.randn(4, *rest, generator=draws) * 0.1
        lora[f"{path}.lora_up.weight"] = torch.randn(out, 4, *rest[1:], generator=draws) * scale
    return comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@pytest.mark.parametrize("engine", [FUSE, BRANCH])
def test_a_lora_of_our_own_loader(run, plain, engine):
    """Beside the weights or in them: trained on is the same model."""
    base = tiny_model("sd15")
    clean = weights(base)
    _, lora = lora_on(base, every=2)
    model, _, _ = apply_lora(base, None, lora, Strengths.of(0.7), engine)
    other, _, _ = apply_lora(tiny_model("sd15"), None, lora, Strengths.of(0.7), FUSE)
    before, pictures = carried(model), [sampled(base), sampled(model)]
    result, wanted = run(model), run(other)
    assert any("trains on top of" in line for line in told(result))
    assert same(result.lora, wanted.lora) and result.losses == wanted.losses
    assert not same(result.lora, plain.lora)
    assert carried(model) == before
    assert torch.equal(sampled(base), pictures[0]) and torch.equal(sampled(model), pictures[1])
    comfy.model_management.unload_all_models()
    assert weights(base) == clean


def test_a_lora_that_changes_over_a_run_is_refused(run):
    base = tiny_model("sd15")
    _, lora = lora_on(base, every=2)
    model, _, _ = apply_lora(base, None, lora, Strengths(steps=parse("0@1,1@3", "steps")))
    with pytest.raises(UnsupportedModelError, match="changes over a sampling run. Set one strength"):
        run(model)


def test_a_lora_that_is_applied_already(run, plain):
    """Training on it is training on a MODEL whose weights are those; the base beneath is not touched."""
    base = tiny_model("sd15")
    model = with_lora(base)
    before, pictures = carried(model), [sampled(base), sampled(model), sampled(base)]
    clean = weights(base)
    result = run(model)
    layers = len(model.patches)
    assert told(result) == [f"trains on top of patches (LoRAs) already on {layers} weights of the MODEL"]

    merged = tiny_model("sd15")
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model])
        state = {name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()}
        merged.model.diffusion_model.load_state_dict(state)
    expected = run(merged)
    assert result.losses == expected.losses and same(result.lora, expected.lora)
    assert abs(result.losses[0] - plain.losses[0]) > 1e-4 and not same(result.lora, plain.lora)

    assert carried(model) == before
    assert torch.equal(sampled(base), pictures[0]) and torch.equal(sampled(model), pictures[1])
    assert torch.equal(sampled(base), pictures[2]) and weights(base) == clean


def test_training_on_the_base_while_its_patched_clone_is_loaded(run, plain):
    base = tiny_model("sd15")
    model = with_lora(base)
    picture = sampled(model)
    result = run(base)
    assert told(result) == [] and same(result.lora, plain.lora)
    assert torch.equal(sampled(model), picture)


def zero_terminal(model):
    return ModelSamplingDiscrete().patch(model, "v_prediction", True)[0]


def test_v_prediction_with_zero_terminal_snr(run, parts, plain):
    """The first loss against v = √ᾱ ε − √(1−ᾱ) x0, read off the x̂0 that the host's own model call gives."""
    base = tiny_model("sd15")
    model = zero_terminal(base)
    before, pictures = carried(model), (sampled(base), sampled(model))
    result = run(model)
    assert told(result) == [] and result.lora.metadata["modelspec.prediction_type"] == "v"
    assert result.losses[0] == pytest.approx(first_loss(model, parts), rel=1e-5)
    assert result.losses[0] != plain.losses[0]
    assert carried(model) == before
    assert isinstance(base.get_model_object("model_sampling"), comfy.model_sampling.EPS)
    assert torch.equal(sampled(base), pictures[0]) and torch.equal(sampled(model), pictures[1])


@torch.inference_mode()
def first_loss(model, parts):
    dataset, clip, vae = parts
    examples = HostExamples(dataset, BatchPlan(dataset, PLAN.batch_size, PLAN.seed), model, clip, vae, PLAN, 1)
    examples.prepare(0, lambda count: lambda: None)
    batch = examples.batch(0)
    x0 = batch.latents.double()
    noise = torch.randn(x0.shape, generator=generator(PLAN.seed, "noise", 0)).double()
    times = draw_times(len(x0), Prediction.VELOCITY, ObjectiveSettings(), generator(PLAN.seed, "timestep", 0))
    sampling = model.get_model_object("model_sampling")
    sigma = sampling.sigmas[(times * len(sampling.sigmas)).long()].float()
    assert sampling.sigma_max > 1000, "the schedule really ends in pure noise"
    comfy.model_management.load_models_gpu([model])
    level = sigma.double().reshape(-1, 1, 1, 1)
    noisy = x0 + level * noise
    context = torch.cat([item.cross_attn for item in batch.conditioning])
    denoised = model.model.apply_model(noisy.float(), sigma, c_crossattn=context).double()
    predicted = (noisy / (level**2 + 1) - denoised) * (level**2 + 1).sqrt() / level
    return ((predicted - (noise - level * x0) / (1 + level**2).sqrt()) ** 2).mean().item()


def test_a_replaced_latent_format_scales_the_latents(run, parts, plain):
    """It is on the model only while loaded, and images are encoded before that."""
    base = tiny_model("sd15")
    model = base.clone()
    latent_format = type(base.model.latent_format)()
    latent_format.scale_factor *= 2
    model.add_object_patch("latent_format", latent_format)
    dataset, clip, vae = parts
    with torch.inference_mode():
        wanted = [(item, 0) for item in place(dataset)]
        once = encode_pictures(dataset, wanted, 0, base, vae)
        twice = encode_pictures(dataset, wanted, 0, model, vae)
    assert once and all(torch.equal(2 * one.latent, two.latent) for one, two in zip(once, twice, strict=True))
    assert run(model).losses != plain.losses


# ---------------------------------------------------------------- refused


class Branch:
    """A LoRA in bypass mode, in small: it adds to what a layer gives."""

    def __init__(self, path):
        self.path, self.host_forward = path, None

    def inject(self, patcher):
        layer = patcher.model.get_submodule(self.path)
        self.host_forward = layer.forward
        layer.forward = lambda x: self.host_forward(x) * 1.5

    def eject(self, patcher):
        layer = patcher.model.get_submodule(self.path)
        layer.__dict__.pop("forward", None)


def with_branch(base):
    branch = Branch("diffusion_model.middle_block.1.proj_in")
    model = base.clone()
    model.set_injections("bypass_lora", [PatcherInjection(inject=branch.inject, eject=branch.eject)])
    return model


def refused(run, model, match):
    before, clean = carried(model), weights(model)
    with pytest.raises(UnsupportedModelError, match=match):
        run(model)
    assert carried(model) == before and weights(model) == clean


def test_a_lora_in_bypass_mode(run):
    model = with_branch(tiny_model("sd15"))
    cure = "Load that LoRA with the ordinary LoRA loader, or train on the MODEL before it"
    refused(run, model, rf"injected layers \(bypass_lora\).*{re.escape(cure)}")


def test_a_bypass_lora_left_on_the_shared_network_does_not_leak_in(run, plain):
    """The host leaves injected layers on the network after sampling."""
    base = tiny_model("sd15")
    model = with_branch(base)
    picture = sampled(model)
    assert not torch.equal(picture, sampled(tiny_model("sd15")))
    result = run(base)
    assert same(result.lora, plain.lora)
    assert torch.equal(sampled(model), picture)


@pytest.mark.parametrize("path", ["diffusion_model.middle_block.1", "diffusion_model.out.2.forward", "apply_model"])
def test_a_replaced_part_of_the_network(run, path):
    model = tiny_model("sd15")
    model.add_object_patch(path, torch.nn.Identity())
    cure = "Connect the MODEL as it was before that node"
    refused(run, model, rf"a node has replaced {re.escape(path)} of the MODEL by Identity.*{re.escape(cure)}")


