"""Checkpointed blocks whose inputs wait in main memory, on the host's own blocks."""

import gc
import weakref

import pytest
import torch

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.loan import WeightsChangedError, undisturbed
from lora_loom.kernels.blocks import block_map
from lora_loom.training.checkpointing import block_modules
from training import adapters_for, borrow, loss_of, samples_for

MODELS = ("sd15", "sdxl", "sd3", "flux", "flux2", "hunyuan_video", "qwen_image")


def gradients(name, patcher, adapters, compute_dtype=None, **how):
    """Gradients of a step, and which of the inputs of blocks were alive between forward and backward."""
    seen = []

    def note(module, args, kwargs):
        flowing = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        if flowing.requires_grad and not torch._C._current_graph_task_id() >= 0:
            seen.append((flowing.numel(), weakref.ref(flowing)))

    with borrow(patcher, adapters, compute_dtype=compute_dtype, **how) as loan:
        tree = loan.model
        blocks = block_modules([tree.get_submodule(path) for block in block_map(tree) for path in block.modules])
        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks]
        loss = loss_of(HostDenoiser(loan), samples_for(name, 2, side=8))
        for hook in hooks:
            hook.remove()
        gc.collect()
        largest = max(size for size, _ in seen)
        alive = [ref() is not None for size, ref in seen if size >= 0.5 * largest]
        loss.backward()
    # the last block of some models computes text that nobody reads
    found = [tensor.grad for a in adapters.values() for tensor in a.parameters() if tensor.grad is not None]
    assert len(found) > len(adapters)
    for adapter in adapters.values():
        for tensor in adapter.parameters():
            tensor.grad = None
    return found, alive


@pytest.mark.parametrize("name", MODELS)
def test_every_bit_is_the_same_and_the_inputs_are_gone(name):
    patcher = tiny.tiny(name, **({"depth": 3} if tiny.SPECS[name].depth_keys else {}))
    adapters = adapters_for(patcher, "full")
    blocks, kept = gradients(name, patcher, adapters, checkpoint=True)
    offloaded, left = gradients(name, patcher, adapters, checkpoint=True, offload=True)
    assert all(torch.equal(got, want) for got, want in zip(offloaded, blocks, strict=True))
    assert sum(left) < 0.2 * sum(kept), f"{sum(left)} of {len(left)} still there, {sum(kept)} without offloading"


def test_in_another_precision_too():
    patcher = tiny.tiny("flux", dtype=torch.bfloat16)
    adapters = adapters_for(patcher, "attention")
    found = [
        gradients("flux", patcher, adapters, torch.float32, checkpoint=True, offload=offload)[0]
        for offload in (False, True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# -- a host that moves weights in the middle of a step


@pytest.mark.parametrize("offload", (False, True))
def test_a_step_that_the_host_disturbed_is_done_again(offload):
    """Unloading in the middle of a step ends a checkpointed step; the second try gives what an undisturbed one does."""
    patcher = tiny.tiny("sd15", inference=True)
    adapters, samples = adapters_for(patcher, "attention"), samples_for("sd15", 2, side=8)
    tensors = [tensor for adapter in adapters.values() for tensor in adapter.parameters()]
    tries = []

    def step(disturb):
        for tensor in tensors:
            tensor.grad = None
        tries.append(1)
        loss = loss_of(denoiser, samples)
        if disturb and len(tries) == 1:
            with torch.inference_mode():
                patcher.partially_unload(patcher.offload_device, 1e30)
        loss.backward()
        return [tensor.grad for tensor in tensors]

    with borrow(patcher, adapters, checkpoint=True, offload=offload) as loan:
        denoiser = HostDenoiser(loan)
        found = undisturbed(lambda: step(True))
        assert len(tries) == 2
        for got, want in zip(found, step(False), strict=True):
            assert (got - want).norm() <= 1e-5 * want.norm()


def test_what_goes_wrong_twice_is_not_tried_for_ever():
    calls = []

    def step():
        calls.append(1)
        raise WeightsChangedError("again")

    with pytest.raises(WeightsChangedError):
        undisturbed(step)
    assert len(calls) == 2
