"""The branch as trained against the host's own application of the saved adapters: weight by weight, and in bf16.

``test_families_on_models`` compares the outputs of every model in float32. A bf16 model keeps the merged weight in
bf16, which rounds the adapter away by up to 2⁻⁹ of the weight; where the host merges on the fly (partly unloaded)
nothing is lost.
"""

import comfy.lora
import comfy.model_management
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_train import LoraModelLoader

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.writing import to_state_dict
from training import adapters_for, borrow, samples_for

FAMILIES = ("sd15", "sdxl", "sd3", "flux")


def prediction(patcher, adapters, samples, before=lambda patcher: None):
    """The raw prediction; ``before`` is what the host does once the model is loaded."""
    x0, noise, times, conditioning = samples
    with borrow(patcher, adapters) as loan, torch.no_grad():
        before(patcher)
        denoiser = HostDenoiser(loan)
        sigma = denoiser.noise_levels(times)
        return denoiser.predict(denoiser.prediction.noisy(x0, noise, sigma), sigma, conditioning).clone()


def by_core_node(patcher, adapters):
    """The MODEL that core's LoraModelLoader makes of the adapters' file form."""
    state = to_state_dict(adapters, NameTable.of(patcher.model).write)
    options = {"model": patcher, "lora": state, "strength_model": 1.0}
    if any(field.id == "bypass" for field in LoraModelLoader.define_schema().inputs):
        options["bypass"] = False
    with torch.inference_mode():
        merged = LoraModelLoader.execute(**options).args[0]
    assert {key.removesuffix(".weight") for key in merged.patches} == set(adapters)
    return merged, state


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_weights_equal_the_hosts_own(name):
    patcher = tiny.tiny(name)
    adapters = adapters_for(patcher)
    merged, state = by_core_node(patcher, adapters)
    if name in ("sd15", "sdxl"):
        assert all(key.startswith("lora_unet_") for key in state)
    for path, adapter in adapters.items():
        key = f"{path}.weight"
        weight = comfy.utils.get_attr(patcher.model, key)
        host = comfy.lora.calculate_weight(merged.patches[key], weight.clone(), key)
        torch.testing.assert_close(adapter.merged(weight), host, rtol=1e-6, atol=1e-6)
        assert relative(host, weight) > 1e-3, f"the adapter changes nothing at {path}"


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_the_branch_equals_what_the_host_merges_on_the_fly(name):
    patcher = tiny.tiny(name, dtype=torch.bfloat16, compute_dtype=torch.float32, inference=True)
    samples, adapters = samples_for(name, 2), adapters_for(patcher)
    merged, _ = by_core_node(patcher, adapters)
    branch = prediction(patcher, adapters, samples)
    fused = prediction(merged, {}, samples)
    on_the_fly = prediction(merged, {}, samples, lambda one: one.partially_unload(one.offload_device, 1e30))
    effect = relative(branch, prediction(patcher, {}, samples))
    assert relative(branch, on_the_fly) <= 1e-4 < 0.01 < effect
    assert relative(branch, fused) <= 0.02, "rounding of the merged weights to bf16"
