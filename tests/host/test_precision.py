"""``compute_dtype``: the model computes in another precision for the time of a loan, and is as it was afterwards."""

import functools

import comfy.model_management
import pytest
import torch

import tiny
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.precision import check_dtype, compute_dtype, host_dtype
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.options import OptionError
from lora_loom.training.settings import Plan
from snapshot import Snapshot
from training import adapters_for, borrow, learners, loss_of, samples_for

MODELS = ("sd15", "sdxl", "sd3", "flux")
FP32, BF16, FP16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
PAIRS = ((FP32, BF16), (FP32, FP16), (BF16, FP32), (FP8, FP32), (FP8, FP16))  # stored in, computed in
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 0.03, torch.float16: 0.004}


def stored(name, dtype):
    """Weights kept in ``dtype``; fp8 is nothing that one can compute in, the host casts it."""
    return tiny.tiny(name, dtype=dtype, compute_dtype=torch.bfloat16 if dtype.itemsize == 1 else None, inference=True)


@functools.cache
def reference(name, dtype):
    """Loss of the same weights in float32."""
    dense, low = tiny.tiny(name), stored(name, dtype)
    with torch.no_grad():
        for slot, value in zip(dense.model.state_dict().values(), low.model.state_dict().values(), strict=True):
            slot.copy_(value.float())
    return step(dense, name, None)[0]


def step(patcher, name, dtype, checkpoint=False):
    """(loss, gradients, dtypes that the layers were given)."""
    adapters, seen = adapters_for(patcher, "attention+MLP", conv=False), set()
    with borrow(patcher, adapters, checkpoint=checkpoint, compute_dtype=dtype) as loan:
        layer = loan.model.get_submodule(next(iter(adapters)))
        handle = layer.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
        try:
            loss = loss_of(HostDenoiser(loan), samples_for(name, 2, side=8))
            loss.backward()
        finally:
            handle.remove()
    gradients = torch.cat([tensor.grad.flatten() for a in adapters.values() for tensor in a.parameters()])
    return loss.item(), gradients, seen


@pytest.mark.parametrize("dtype, wanted", PAIRS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_that_of_a_model_which_the_host_itself_casts(name, dtype, wanted):
    checkpoint = dtype == BF16
    patcher = stored(name, dtype)
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patcher])
    before, cast = Snapshot(patcher), patcher.model.manual_cast_dtype
    loss, gradients, seen = step(patcher, name, wanted, checkpoint)
    assert seen == {wanted}, "the layers computed in it"
    by_the_host = step(tiny.tiny(name, dtype=dtype, compute_dtype=wanted, inference=True), name, None, checkpoint)
    assert (loss, seen) == (by_the_host[0], by_the_host[2]) and torch.equal(gradients, by_the_host[1])
    assert loss == pytest.approx(reference(name, dtype), rel=TOLERANCE[wanted])
    assert not before.differences(Snapshot(patcher)) and patcher.model.manual_cast_dtype is cast


def test_automatic_is_the_hosts_own_choice():
    patcher = stored("sd15", torch.bfloat16)
    assert compute_dtype("automatic", patcher) is None and compute_dtype("bf16", patcher) is None
    assert compute_dtype("fp32", patcher) is torch.float32 and compute_dtype("fp16", patcher) is torch.float16
    assert step(patcher, "sd15", None)[2] == {torch.bfloat16}


def test_the_host_s_choice_may_be_that_of_a_node():
    """ModelComputeDtype hangs on the patcher until the model is loaded."""
    patcher = tiny.tiny("sd15", inference=True).clone()
    assert host_dtype(patcher) == torch.float32
    patcher.set_model_compute_dtype(torch.float16)
    assert host_dtype(patcher) == torch.float16 and compute_dtype("fp16", patcher) is None
    assert compute_dtype("fp32", patcher) == torch.float32


def test_what_a_device_cannot_compute_in_is_refused():
    with pytest.raises(OptionError, match="compute_dtype is 'fp8', which cpu cannot .*: set it to automatic"):
        check_dtype(torch.float8_e4m3fn, "fp8", torch.device("cpu"))


class Examples:
    """One batch for ever."""

    def __init__(self):
        latents, _, _, conditioning = samples_for("sd15", 2, side=8)
        self.one = Batch(latents, conditioning)

    def batch(self, position):
        return self.one


def test_ten_steps_in_fp16_learn_what_ten_in_float32_do():
    ends = {}
    for dtype in (None, FP16):
        patcher = tiny.tiny("sd15")
        adapters, plan, half = adapters_for(patcher, "attention", conv=False), Plan(learning_rate=1e-3), dtype is FP16
        with borrow(patcher, adapters, compute_dtype=dtype) as loan:
            trainer = Trainer(learners(adapters, plan), HostDenoiser(loan), Examples(), plan, 10, half_precision=half)
            reports = [trainer.step() for _ in range(10)]
        ends[dtype] = reports[-1].loss
        assert sum(report.skipped for report in reports) <= (2 if half else 0)
    assert ends[FP16] == pytest.approx(ends[None], rel=0.01) and reports[-1].loss != reports[0].loss
