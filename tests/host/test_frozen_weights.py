"""Weights the host casts on use: gradients are right, and nothing keeps a copy of them.

Newer hosts cast every weight into one shared buffer on the device. ``Scratch`` does the same on the CPU, with less
mercy: each cast overwrites the last one, and giving a weight back fills the buffer with NaN.
"""

import comfy.model_management
import comfy.ops
import pytest
import torch

import tiny
from live_bytes import LiveBytes, SavedTensors
from lora_loom.host.denoiser import HostDenoiser
from training import adapters_for, borrow, loss_of, samples_for

STORED = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)
FAMILIES = ("sd15", "sdxl", "sd3", "flux")


def stored(name, dtype):
    """A model whose weights are kept in ``dtype`` and cast to float32 on use."""
    return tiny.tiny(name, dtype=dtype, compute_dtype=torch.float32, inference=True)


def dense(name, dtype):
    """The same weights, held in float32."""
    patcher, low = tiny.tiny(name), stored(name, dtype)
    with torch.no_grad():
        for slot, value in zip(patcher.model.parameters(), low.model.parameters(), strict=True):
            slot.copy_(value.float())
        for slot, value in zip(patcher.model.buffers(), low.model.buffers(), strict=True):
            slot.copy_(value.float())
    return patcher


def gradients(name, patcher, checkpoint=False, preset="full"):
    """Gradients of every adapter tensor by (path, factor)."""
    adapters = adapters_for(patcher, preset)
    with borrow(patcher, adapters, checkpoint=checkpoint) as loan:
        loss_of(HostDenoiser(loan), samples_for(name, 2, side=8)).backward()
    found = {}
    for path, adapter in adapters.items():
        found[path, "down"], found[path, "up"] = adapter.down.grad, adapter.up.grad
    assert all(grad is not None and grad.any() for grad in found.values())
    return found


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for key, gradient in got.items():
        error = (gradient - want[key]).norm() / want[key].norm()
        assert error < 1e-4, f"{key}: relative error {error}"


class Scratch:
    """One buffer for every cast of the process; see the head of this file."""

    def __init__(self, patch, poison=True):
        self.buffer, self.casts, self.poison = torch.empty(0), 0, poison
        self.cast, self.uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight
        patch.setattr(comfy.ops, "cast_bias_weight", self.cast_bias_weight)
        patch.setattr(comfy.ops, "uncast_bias_weight", self.uncast_bias_weight)

    def cast_bias_weight(self, module, *args, **kwargs):
        weight, bias, *stream = self.cast(module, *args, **kwargs)
        self.casts += 1
        with torch.inference_mode(False), torch.no_grad():
            parts = [part for part in (weight, bias) if part is not None]
            needed = sum(part.numel() for part in parts)
            if needed > self.buffer.numel():
                self.buffer = torch.empty(needed)
            # through .data: the device's own copies do not tell autograd about themselves either
            self.buffer.data.fill_(torch.nan)
            placed, offset = [], 0
            for part in parts:
                view = self.buffer.data[offset : offset + part.numel()].view(part.shape)
                placed.append(view.copy_(part))
                offset += part.numel()
        return placed[0], placed[1] if bias is not None else None, *stream

    def uncast_bias_weight(self, module, weight, bias, stream):
        self.uncast(module, weight, bias, stream)
        if self.poison:
            self.buffer.data.fill_(torch.nan)


def test_a_model_made_under_inference_mode_trains():
    made = tiny.tiny("sd15", inference=True)
    assert all(parameter.is_inference() for parameter in made.model.parameters())
    assert_equal(gradients("sd15", made), gradients("sd15", tiny.tiny("sd15")))


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_equal_those_of_the_same_weights_in_float32(name, dtype, checkpoint):
    assert_equal(gradients(name, stored(name, dtype), checkpoint), gradients(name, dense(name, dtype)))


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("preset", ("attention", "full"))
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_right_when_all_casts_share_one_buffer(name, preset, checkpoint, monkeypatch):
    want = gradients(name, dense(name, torch.bfloat16), preset=preset)
    scratch = Scratch(monkeypatch)
    got = gradients(name, stored(name, torch.bfloat16), checkpoint, preset)
    assert scratch.casts > len(got) / 2  # at least once for every adapter's layer
    assert_equal(got, want)


def test_the_shared_buffer_does_break_what_autograd_saves(monkeypatch):
    """The emulation is worth something: the host's own layer, differentiated as it is, goes wrong with it."""
    layer = comfy.ops.manual_cast.Linear(4, 3, dtype=torch.bfloat16)
    torch.nn.init.ones_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    for parameter in layer.parameters():
        parameter.requires_grad_(False)
    Scratch(monkeypatch)
    x = torch.ones(2, 4, requires_grad=True)
    output = layer(x)
    assert torch.equal(output, torch.full((2, 3), 4.0))
    output.sum().backward()
    assert x.grad.isnan().all()


def weight_copies(tensors, model):
    """The cast weights, biases and norms of the host's layers that are among ``tensors``, in whatever order.

    A few families cast the scale of their query and key norms with code of their own: one head's width each.
    """
    by_fingerprint = {}
    for path, module in model.named_modules():
        if hasattr(module, "comfy_cast_weights"):
            for name, weight in module.named_parameters(path, recurse=False):
                by_fingerprint.setdefault(fingerprint(weight), []).append((name, weight))
    copies = []
    for tensor in tensors:
        for name, weight in by_fingerprint.get(fingerprint(tensor), ()):
            if torch.equal(tensor.float().flatten().sort().values, weight.float().flatten().sort().values):
                copies.append(name)
    return copies


def fingerprint(tensor):
    return tensor.numel(), tensor.max().item(), tensor.min().item()


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("preset", ("attention", "full"))
@pytest.mark.parametrize("name", FAMILIES)
def test_autograd_keeps_no_copy_of_a_cast_weight(name, preset, checkpoint):
    saved = {}
    for patcher in (stored(name, torch.bfloat16), dense(name, torch.bfloat16)):
        adapters = adapters_for(patcher, preset)
        with borrow(patcher, adapters, checkpoint=checkpoint) as loan:
            with SavedTensors().recording() as record:
                loss_of(HostDenoiser(loan), samples_for(name, 2, side=8))
            trained = [tensor for adapter in adapters.values() for tensor in adapter.parameters()]
            existing = [*loan.model.parameters(), *loan.model.buffers(), *trained]
            outside = {tensor.untyped_storage()._cdata for tensor in existing}
            own = [tensor for tensor in record.tensors if tensor.untyped_storage()._cdata not in outside]
            assert record.tensors and not weight_copies(own, loan.model)
            saved[next(loan.model.diffusion_model.parameters()).dtype] = record.bytes(existing)
    # what the same model keeps whose weights lie there in float32: activations, and the same ones
    assert saved[torch.bfloat16] <= 1.02 * saved[torch.float32], saved


@pytest.mark.parametrize("checkpoint", (False, True), ids=("plain", "checkpointed"))
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_cast_weights_needs_one_cast_at_a_time(name, checkpoint):
    """Peak of a whole step against the float32 model's: at most two casts of the largest layer more, not the model."""
    peaks = {}
    for kind, patcher in (("cast", stored(name, torch.bfloat16)), ("dense", dense(name, torch.bfloat16))):
        adapters = adapters_for(patcher, "attention")
        with borrow(patcher, adapters, checkpoint=checkpoint) as loan:
            denoiser, samples = HostDenoiser(loan), samples_for(name, 1, side=8)
            trained = [tensor for adapter in adapters.values() for tensor in adapter.parameters()]
            with LiveBytes([*loan.model.parameters(), *loan.model.buffers(), *trained]) as live:
                loss_of(denoiser, samples).backward()
        peaks[kind] = live.peak
    sizes = [parameter.numel() * 4 for parameter in patcher.model.parameters()]
    assert peaks["cast"] - peaks["dense"] <= 2 * max(sizes) < sum(sizes) / 4, (peaks, max(sizes), sum(sizes))
