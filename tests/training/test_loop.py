"""The training loop on a toy network: repeatable to the bit, resumable to the bit, safe when it diverges."""

import dataclasses
import math
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from lora_loom.kernels.adapter import Dropout, Options
from lora_loom.kernels.lora import LoRA
from lora_loom.training.learners import Component
from lora_loom.training.loop import Batch, Trainer, TrainingDivergedError, generator
from lora_loom.training.objective import Prediction
from lora_loom.training.schedules import rate_factor
from lora_loom.training.settings import AdapterSettings, ObjectiveSettings, OptimizerSettings, Plan


class Layer:
    """A linear layer on loan."""

    geometry = None

    def __init__(self, seed):
        self.matrix = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed)) / 3

    def forward(self, x):
        return x @ self.matrix.T

    @contextmanager
    def weight(self, like):
        yield self.matrix.to(like.dtype)


class Toy:
    """Two layers and a nonlinearity; ``spoiled`` names calls whose prediction is not a number."""

    def __init__(self, adapters, spoiled=(), prediction=Prediction.EPSILON):
        self.adapters, self.spoiled, self.prediction = list(adapters.values()), spoiled, prediction
        self.layers, self.calls = [Layer(1), Layer(2)], 0

    def noise_levels(self, times):
        return times.float() if self.prediction.is_flow else (3 * times).float()

    def predict(self, noisy, sigma, conditioning):
        x = torch.cat([noisy.flatten(1), sigma.view(-1, 1), torch.tensor(conditioning).view(-1, 1)], 1)
        x = self.adapters[1].on(torch.tanh(self.adapters[0].on(x, self.layers[0])), self.layers[1])
        self.calls += 1
        if self.calls in self.spoiled:
            x = x * math.nan
        return x[:, :4].view(noisy.shape)


class Points:
    """Five batches of three; remembers what it was asked for."""

    def __init__(self):
        self.latents = torch.randn(5, 3, 4, 1, 1, generator=torch.Generator().manual_seed(8))
        self.asked = []

    def batch(self, position):
        epoch, index = divmod(position, 5)
        self.asked.append((epoch, index))
        return Batch(self.latents[index], [0.1, 0.2, 0.3 + epoch])


def plan(seed=0, **options):
    optimizer = {"schedule": "cosine", "warmup_steps": 3, **options}
    one_rate = AdapterSettings(loraplus_ratio=1.0)
    return Plan(seed=seed, learning_rate=0.02, adapter=one_rate, optimizer=OptimizerSettings(**optimizer))


def start(seed=0, spoiled=(), total=20, prediction=Prediction.EPSILON, half=False, **options):
    draws = generator(seed, "adapters", 0)
    adapters = {name: LoRA.create((6, 6), Options(2, 2.0), draws) for name in ("first", "second")}
    return trainer_of(adapters, Toy(adapters, spoiled, prediction), plan(seed, **options), total, half)


def trainer_of(adapters, denoiser, plan, total=20, half=False):
    return Trainer([Component("model", adapters, plan.learning_rate)], denoiser, Points(), plan, total, half)


def run(trainer, steps):
    return [trainer.step() for _ in range(steps)]


def weights(trainer):
    return [tensor.detach().clone() for tensor in trainer.parameters]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# -- what is drawn


def test_the_shift_by_resolution_is_told_the_pixels():
    """Not how many places an autoencoder makes of them."""
    losses = {}
    for pixels in (None, 64, 1024 * 1024):
        trainer = start(prediction=Prediction.FLOW)
        trainer.plan = dataclasses.replace(trainer.plan, objective=ObjectiveSettings(timestep_shift="resolution"))
        known = trainer.examples.batch
        trainer.examples.batch = lambda position, known=known, pixels=pixels: dataclasses.replace(
            known(position), pixels=pixels
        )
        losses[pixels] = trainer.step().loss
    assert losses[None] == losses[64] != losses[1024 * 1024], "a place of latents is 8 × 8 where nothing is said"


# -- repeatable


@pytest.mark.parametrize("prediction", Prediction)
def test_same_seed_same_bits_and_another_seed_others(prediction):
    runs = {}
    for name, seed in (("once", 4), ("again", 4), ("other", 5)):
        torch.manual_seed(len(runs))  # the global generators have no say
        trainer = start(seed, prediction=prediction)
        reports = run(trainer, 20)
        runs[name] = weights(trainer), [report.loss for report in reports]
    assert same(runs["once"][0], runs["again"][0]) and runs["once"][1] == runs["again"][1]
    assert not any(torch.equal(a, b) for a, b in zip(runs["once"][0], runs["other"][0], strict=True))
    assert not set(runs["once"][1]) & set(runs["other"][1])


def test_global_generators_are_left_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    trainer = start(total=8, gradient_accumulation=2)
    run(trainer, 4)
    start().restore(trainer.state())
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert before[2][0] == after[2][0] and np.array_equal(before[2][1], after[2][1]) and before[2][2:] == after[2][2:]


def test_draws_differ_between_seeds_purposes_and_positions():
    cases = [(seed, "noise", 0) for seed in (0, 1, 2**63, -1)] + [(0, "timestep", 0), (0, "noise", 1)]
    drawn = [torch.randn(3, generator=generator(*case)) for case in cases]
    assert len({tuple(values.tolist()) for values in drawn}) == len(cases)
    assert torch.equal(drawn[0], torch.randn(3, generator=generator(*cases[0])))


def test_training_learns_and_reports():
    trainer = start(total=200)
    reports = run(trainer, 200)
    assert trainer.finished and [report.step for report in reports] == list(range(1, 201))
    assert sum(trainer.losses[-40:]) < 0.9 * sum(trainer.losses[:40])
    assert trainer.losses == [report.loss for report in reports]
    assert trainer.examples.asked[:7] == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]
    rates = [0.02 * rate_factor(step, 200, trainer.plan.optimizer) for step in range(200)]
    assert [report.learning_rate for report in reports] == rates
    assert not any(tensor.grad is not None for tensor in trainer.parameters)


def test_accumulation_averages_its_micro_batches():
    trainer, single = start(gradient_accumulation=4), start()
    expected = torch.stack([single.loss(position) for position in range(4)]).mean()
    gradients = torch.autograd.grad(expected, single.parameters)
    report = trainer.step()
    assert report.loss == pytest.approx(expected.item(), rel=1e-6)
    assert report.gradient_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)
    assert trainer.examples.asked == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_one_draw_per_sample_of_every_micro_batch():
    """Times and noise of a batch are all different, and another position draws others."""
    trainer = start()
    seen = []
    levels = trainer.denoiser.noise_levels
    trainer.denoiser.noise_levels = lambda times: seen.append(times) or levels(times)
    run(trainer, 4)
    assert len(set(torch.cat(seen).tolist())) == 12


def test_clipping_bounds_the_step():
    """Adam hides a gradient's scale but for epsilon: with a huge one the step is lr · gradient / epsilon."""
    for limit, factor in ((0.01, None), (0.0, 1.0)):
        trainer = start(max_grad_norm=limit, epsilon=1e6, weight_decay=0.0, warmup_steps=0, schedule="constant")
        before = weights(trainer)
        report = trainer.step()
        moved = torch.cat([(a - b).flatten() for a, b in zip(weights(trainer), before, strict=True)]).double().norm()
        expected = (limit if factor is None else report.gradient_norm) * 0.02 / 1e6
        assert report.gradient_norm > 0.01
        assert moved.item() == pytest.approx(expected, rel=0.2)  # weights near one round such a small step


# -- resumable


@pytest.mark.parametrize("options", ({}, {"gradient_accumulation": 3}), ids=("plain", "accumulated"))
@pytest.mark.parametrize("stop", (1, 5, 19))
def test_a_resumed_run_goes_on_to_the_bit(stop, options):
    whole = start(**options)
    reports = run(whole, 20)
    first = start(**options)
    run(first, stop)
    state = first.state()
    run(first, 1)  # what happens after the state was taken must not reach it
    second = start(**options)
    second.restore(state)
    assert second.step_number == stop
    rest = run(second, 20 - stop)
    assert same(weights(whole), weights(second))
    assert rest == reports[stop:]
    assert second.losses == whole.losses and second.finished
    for name, value in whole.state().tensors.items():
        assert torch.equal(value.nan_to_num(), second.state().tensors[name].nan_to_num()), name
    assert whole.state().facts == second.state().facts


def test_a_fresh_state_can_be_restored():
    trainer = start()
    trainer.restore(start().state())
    run(trainer, 3)
    other = start()
    run(other, 3)
    assert same(weights(trainer), weights(other))


def test_state_is_plain_and_apart():
    trainer = start()
    run(trainer, 2)
    state = trainer.state()
    kept = {name: value.clone() for name, value in state.tensors.items()}
    run(trainer, 2)
    for name, value in state.tensors.items():
        assert torch.equal(value.nan_to_num(), kept[name].nan_to_num())
        assert not value.requires_grad and value.is_contiguous()
        assert value.device.type == "cpu"


def test_a_state_of_other_adapters_is_refused():
    state = start().state()
    adapters = {name: LoRA.create((6, 6), Options(3, 2.0), generator(0, "adapters", 0)) for name in ("first", "second")}
    other = trainer_of(adapters, Toy(adapters), plan())
    with pytest.raises(ValueError, match="other layers or another rank"):
        other.restore(state)
    more = {**adapters, "third": LoRA.create((6, 6), Options(2, 2.0), generator(0, "adapters", 1))}
    with pytest.raises(ValueError, match="other layers or another rank"):
        trainer_of(more, Toy(more), plan()).restore(state)


# -- diverging


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("bad_step", (1, 2, 7))
def test_a_loss_that_is_no_number_keeps_the_last_good_weights(bad_step, accumulation):
    """Good: weights that a finite loss was seen with."""
    trainer = start(spoiled=(bad_step * accumulation,), gradient_accumulation=accumulation)
    seen = [weights(trainer)]
    for _ in range(bad_step - 1):
        trainer.step()
        seen.append(weights(trainer))
    with pytest.raises(TrainingDivergedError, match=f"step {bad_step}: the loss is nan.*learning_rate"):
        trainer.step()
    assert same(weights(trainer), seen[max(0, bad_step - 2)])
    assert all(tensor.isfinite().all() and tensor.requires_grad for tensor in trainer.parameters)
    assert not any(tensor.grad is not None for tensor in trainer.parameters)
    assert len(trainer.losses) == trainer.step_number == bad_step - 1


def test_a_gradient_that_is_no_number_stops_too():
    trainer = start()
    run(trainer, 2)
    before_last, layer = weights(trainer), trainer.denoiser.layers[1]
    run(trainer, 1)

    @contextmanager
    def broken(like):
        yield layer.matrix * math.nan

    layer.weight = broken
    with pytest.raises(TrainingDivergedError, match="step 4: the gradient norm is nan"):
        trainer.step()
    assert same(weights(trainer), before_last)


def test_half_precision_skips_a_step_that_overflowed():
    trainer = start(half=True)
    before, scale, layer = weights(trainer), trainer.scaler.get_scale(), trainer.denoiser.layers[1]
    usual = layer.weight

    @contextmanager
    def overflowing(like):
        yield layer.matrix * math.inf

    layer.weight = overflowing
    report = trainer.step()
    assert report.skipped and report.step == 1 and math.isfinite(report.loss)
    assert not math.isfinite(report.gradient_norm)
    assert same(weights(trainer), before)
    assert trainer.scaler.get_scale() == scale / 2
    layer.weight = usual
    assert not trainer.step().skipped
    assert not same(weights(trainer), before)


def test_half_precision_that_never_stops_overflowing_ends_the_run():
    trainer = start(half=True, total=200)
    run(trainer, 2)
    kept, layer = weights(trainer), trainer.denoiser.layers[1]

    @contextmanager
    def overflowing(like):
        yield layer.matrix * math.inf

    layer.weight = overflowing
    with pytest.raises(TrainingDivergedError, match="the gradient norm is .*bf16 or fp32"):
        run(trainer, 198)
    assert same(weights(trainer), kept) and trainer.step_number > 20


@pytest.mark.parametrize("half", (False, True), ids=("fp32", "fp16"))
def test_steps_in_which_nothing_that_is_trained_has_a_part_change_nothing(half):
    trainer = start(half=half, gradient_accumulation=2)
    for adapter in trainer.adapters:
        adapter.dropout = Dropout(module=0.7)
    norms, before = [], weights(trainer)
    while not trainer.finished:
        norms.append(trainer.step().gradient_norm)
        assert same(weights(trainer), before) == (norms[-1] == 0)
        before = weights(trainer)
    assert 0 in norms and any(norms)


def test_half_precision_resumes_with_its_scale():
    trainer, again = start(half=True), start(half=True)
    run(trainer, 3)
    trainer.scaler.update(new_scale=256.0)
    again.restore(trainer.state())
    run(trainer, 3), run(again, 3)
    assert trainer.scaler.get_scale() == again.scaler.get_scale() == 256.0
    assert same(weights(trainer), weights(again))
