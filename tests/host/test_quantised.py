"""Training on the host's own quantised layers: the loss and gradients of the model they stand for."""

import json

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import pytest
import torch

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.kernels.layers import select_targets
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import Plan
from snapshot import Snapshot
from training import adapters_for, borrow, learners, loss_of, samples_for

quant_ops = pytest.importorskip("comfy.quant_ops")
FORMATS = {"float8_e4m3fn": (torch.float8_e4m3fn, 448.0), "int8_tensorwise": (torch.int8, 127.0)}
OFFERED = [name for name in FORMATS if name in quant_ops.QUANT_ALGOS]
MODELS = ("flux", "sdxl")
PREFIX = "diffusion_model."


def quantised(name, kind):
    """A tiny model whose attention and MLP layers are kept in ``kind``, loaded as the host loads such files."""
    base, spec = tiny.tiny(name), tiny.SPECS[name]
    storage, largest = FORMATS[kind]
    state = {key: value.clone() for key, value in base.model.diffusion_model.state_dict().items()}
    targets = select_targets(base.model, "attention+MLP", conv=False)
    layers = [target.path.removeprefix(PREFIX) for target in targets if len(target.shape) == 2]
    for layer in layers:
        weight = state[f"{layer}.weight"]
        scale = weight.abs().max() / largest
        scaled = weight / scale
        state[f"{layer}.weight"] = (scaled.round() if storage is torch.int8 else scaled).to(storage)
        state[f"{layer}.weight_scale"] = scale
        if tiny.NEWER:
            state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    with torch.inference_mode():
        config = getattr(comfy.supported_models, spec.config)(dict(spec.settings))
        config.set_inference_dtype(torch.float32, torch.float32)
        if tiny.NEWER:
            config.quant_config = {"mixed_ops": True}
        else:
            config.layer_quant_config = {layer: {"format": kind} for layer in layers}
        model = config.get_model({}, "")
        missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
        assert not unexpected and not [key for key in missing if not key.endswith(("comfy_quant", "weight_scale"))]
        model.requires_grad_(False)
        device = comfy.model_management.get_torch_device()
        patcher = comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())
    kept = [model.get_submodule(PREFIX + layer).weight for layer in layers]
    assert kept and all(isinstance(weight, quant_ops.QuantizedTensor) for weight in kept)
    with torch.no_grad():
        for layer, weight in zip(layers, kept, strict=True):
            base.model.get_submodule(PREFIX + layer).weight.copy_(weight.dequantize().float())
    return patcher, base


def step(name, patcher, checkpoint, **how):
    adapters = adapters_for(patcher, "attention+MLP", conv=False)
    with borrow(patcher, adapters, checkpoint=checkpoint, **how) as loan:
        loss = loss_of(HostDenoiser(loan), samples_for(name, 2, side=8))
        loss.backward()
    return loss.item(), {path: [tensor.grad for tensor in a.parameters()] for path, a in adapters.items()}


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("kind", OFFERED)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_the_dequantised_model(name, kind, checkpoint):
    patcher, dense = quantised(name, kind)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
    before = Snapshot(patcher)
    loss, gradients = step(name, patcher, checkpoint)
    assert not before.differences(Snapshot(patcher))
    wanted, exact = step(name, dense, False)
    # for int8 the host rounds the inputs of a layer too
    tolerance = 0.05 if kind == "int8_tensorwise" else 1e-4
    assert loss == pytest.approx(wanted, rel=tolerance / 10)
    for path, found in gradients.items():
        for got, want in zip(found, exact[path], strict=True):
            assert (got - want).norm() <= tolerance * want.norm(), path


@pytest.mark.parametrize("kind", OFFERED)
def test_they_compute_in_another_precision_too(kind):
    patcher, dense = quantised("flux", kind)
    loss, _ = step("flux", patcher, True, offload=True, compute_dtype=torch.bfloat16)
    assert loss == pytest.approx(step("flux", dense, False)[0], rel=0.03)


class Examples:
    def __init__(self, name):
        latents, _, _, conditioning = samples_for(name, 2, side=8)
        self.one = Batch(latents, conditioning)

    def batch(self, position):
        return self.one


@pytest.mark.parametrize("kind", OFFERED)
def test_steps_learn_the_same(kind):
    ends = []
    for patcher in quantised("sd3", kind):
        adapters, plan = adapters_for(patcher, "attention", conv=False), Plan(learning_rate=1e-3)
        with borrow(patcher, adapters) as loan:
            trainer = Trainer(learners(adapters, plan), HostDenoiser(loan), Examples("sd3"), plan, 5)
            ends.append([trainer.step().loss for _ in range(5)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)
