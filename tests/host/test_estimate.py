"""What is said of memory before the first step, against what a larger step then needs, counted exactly."""

import pytest
import torch

import tiny
from live_bytes import LiveBytes, SavedTensors
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.preflight import memory_required
from lora_loom.training.estimate import SMALLER, duration, estimate, size, told
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import OptimizerSettings, Plan, RunSettings
from lora_loom.training.smoke import Smoke, check_gradients
from training import adapters_for, borrow, learners, loss_of, samples_for

MODES = {"none": {}, "blocks": {"checkpoint": True}, "offload": {"checkpoint": True, "offload": True}}
DEEP = {"depth": 3}


class Examples:
    def __init__(self, samples):
        self.one = Batch(samples[0], samples[3])

    def batch(self, position):
        return self.one


def trainer_for(denoiser, adapters, samples, **options):
    run, optimizer = options.pop("run", RunSettings()), OptimizerSettings(**options)
    plan = Plan(learning_rate=1e-3, optimizer=optimizer, run=run)
    return Trainer(learners(adapters, plan), denoiser, Examples(samples), plan, total_steps=10)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ("sd15", "sdxl", "flux", "wan"))
def test_the_estimate_is_within_30_per_cent(name, mode):
    """From one sample of 16 × 16 to two of 24 × 16; on the CPU what waits in main memory lies beside the rest."""
    patcher = tiny.tiny(name, **(DEEP if tiny.SPECS[name].depth_keys else {}))
    adapters = adapters_for(patcher, "attention+MLP", conv=False)
    little, large = samples_for(name, 1, side=16), samples_for(name, 2, side=24)
    large = (large[0][..., :16], large[1][..., :16], *large[2:])
    with borrow(patcher, adapters, **MODES[mode]) as loan:
        trainer = trainer_for(HostDenoiser(loan), adapters, little)
        smoke = check_gradients(trainer, dict(loan.model.named_modules()))
        found = estimate(trainer, smoke, large[0].numel(), patcher.model_size(), free=0)
        existing = [*loan.model.parameters(), *loan.model.buffers(), *trainer.parameters]
        with LiveBytes(existing) as live:
            loss_of(trainer.denoiser, large).backward()
        trainer.drop_gradients()
        assert found.activations + found.away + found.gradients == pytest.approx(live.peak, rel=0.3)
        if mode == "none":
            with SavedTensors().recording() as saved:
                loss_of(trainer.denoiser, large)
            assert found.activations == pytest.approx(saved.bytes(existing), rel=0.3) and not found.away
    assert found.weights == sum(value.nbytes for value in patcher.model.state_dict().values())


def test_the_check_needs_no_more_than_the_steps_do():
    """Parts of the loss are differentiated one after the other: preserving predictions needs hardly more memory."""
    patcher = tiny.tiny("sd15")
    adapters, samples = adapters_for(patcher, "attention", conv=False), samples_for("sd15", 2, side=16)
    found, peaks = [], []
    with borrow(patcher, adapters) as loan:
        for preserved in (None, samples[3]):
            trainer = trainer_for(HostDenoiser(loan), adapters, samples)
            trainer.examples.one = Batch(samples[0], samples[3], preserved=preserved)
            existing = [*loan.model.parameters(), *loan.model.buffers(), *trainer.parameters]
            with LiveBytes(existing) as smoked:
                smoke = check_gradients(trainer, {})
            with LiveBytes(existing) as live:
                trainer.step()
            found.append(smoke.kept + smoke.block + smoke.away)
            peaks.append((smoked.peak, live.peak))
    assert found[1] == pytest.approx(found[0], rel=0.1)
    assert all(smoked < 1.1 * stepped for smoked, stepped in peaks), "trying out a step takes no more than a step"


def test_what_lives_between_steps_is_exact():
    patcher = tiny.tiny("sd15")
    adapters, samples = adapters_for(patcher, "attention", conv=False), samples_for("sd15", 1, side=8)
    with borrow(patcher, adapters) as loan:
        trainer = trainer_for(HostDenoiser(loan), adapters, samples, run=RunSettings(ema_decay=0.9))
        smoke = check_gradients(trainer, dict(loan.model.named_modules()))
        found = estimate(trainer, smoke, smoke.places, 0, free=0)
        trainer.step()
    numbers = sum(tensor.numel() for tensor in trainer.parameters)
    assert (found.numbers, found.gradients) == (numbers, 4 * numbers)
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    assert found.optimizer == sum(value.nbytes for value in moments)
    kept = [*trainer.parameters, *trainer._before_last_step, *trainer.average.tensors]
    assert found.adapters == sum(tensor.nbytes for tensor in kept)
    assert memory_required(found) > found.gradients + found.optimizer + found.activations


def test_the_report_says_what_to_change_where_it_does_not_fit():
    patcher = tiny.tiny("sd15")
    adapters, samples = adapters_for(patcher, "attention", conv=False), samples_for("sd15", 1, side=8)
    trainer = trainer_for(None, adapters, samples, gradient_accumulation=3)
    smoke = Smoke(kept=3 << 30, block=1 << 30, away=1 << 20, places=100, seconds=2.0)
    plenty, little = (estimate(trainer, smoke, 200, weights=5 << 30, free=free) for free in (9 << 30, 7 << 30))
    lines = told(plenty, "2 passes")
    assert lines[0].startswith("expected memory: base weights 5.0 GB, ") and "activations 8.0 GB" in lines[0]
    assert "in main memory 2.0 MB; 9.0 GB are free" in lines[0] and len(lines) == 2
    assert lines[1] == "expected length: 10 steps, 2 passes, about 60 s at 6 s/step"
    assert told(little, "")[2].endswith(SMALLER) and "1.0 GB more than is free" in told(little, "")[2]
    for option in ("gradient_checkpointing", "offload_activations", "batch_size", "resolution"):
        assert option in SMALLER


def test_sizes_and_times_are_readable():
    assert (size(3 << 20), size(3 << 29)) == ("3.0 MB", "1.5 GB")
    assert [duration(seconds) for seconds in (80, 600, 7300)] == ["80 s", "10 min", "2 h 2 min"]


def test_bf16_adapters_are_counted_as_they_are():
    patcher = tiny.tiny("sd15")
    adapters = adapters_for(patcher, "attention", conv=False, dtype=torch.bfloat16)
    trainer = trainer_for(None, adapters, samples_for("sd15", 1, side=8), run=RunSettings(parameter_dtype="bf16"))
    found = estimate(trainer, Smoke(1, 0, 0, 1, 1.0), 1, 0, 0)
    assert found.adapters == 2 * 2 * found.numbers and found.optimizer == 8 * found.numbers
