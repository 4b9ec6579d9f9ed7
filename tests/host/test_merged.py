"""A LoRA as trained (beside the weights) and as the host's own loader applies it (in the weights) say the same."""

import comfy.sd
import pytest
import torch

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.loan import borrow
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.writing import to_state_dict
from training import adapters_for, samples_for


def prediction(patcher, adapters, samples):
    x0, noise, times, conditioning = samples
    with borrow(patcher, adapters) as loan, torch.no_grad():
        denoiser = HostDenoiser(loan)
        sigma = denoiser.noise_levels(times)
        return denoiser.predict(denoiser.prediction.noisy(x0, noise, sigma), sigma, conditioning).clone()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_branch_and_merged_outputs_agree(name):
    patcher = tiny.tiny(name, inference=True)
    samples, adapters = samples_for(name, 2), adapters_for(patcher)
    base = prediction(patcher, {}, samples)
    branch = prediction(patcher, adapters, samples)
    state = to_state_dict(adapters, NameTable.of(patcher.model).write)
    merged_patcher, _ = comfy.sd.load_lora_for_models(patcher, None, state, 1.0, 0.0)
    assert {key.removesuffix(".weight") for key in merged_patcher.patches} == set(adapters)
    merged = prediction(merged_patcher, {}, samples)
    again = prediction(patcher, {}, samples)  # the host takes its patches off
    assert (branch - merged).norm() <= 1e-4 * merged.norm()
    assert (merged - base).norm() > 1e-3 * base.norm()
    assert (again - base).norm() <= 1e-6 * base.norm()
