"""Whole training trajectories against an independent loop: the same network with peft's LoRA in it."""

import peft
import pytest
import torch

import tiny
from lora_loom.host.loan import borrow
from lora_loom.training.loop import Batch, Trainer, generator
from lora_loom.training.objective import Prediction
from lora_loom.training.settings import AdapterSettings, ObjectiveSettings, OptimizerSettings, Plan
from training import adapters_for, learners

PREFIX = "diffusion_model."
NAME = "sd2"  # sd15 is so narrow that its norms undo some layers, whose factors would then follow rounding alone
BATCHES, BATCH, SIDE, WARMUP = 4, 2, 4, 5
CLIP = {1: 0.3, 2: 0.2}  # by accumulation: a limit that some steps keep and others do not


class PlainDenoiser:
    """ε-prediction in the network's own precision: the host hands predictions over in float32."""

    prediction = Prediction.EPSILON

    def __init__(self, loan):
        self.loan, self.sigmas = loan, loan.model.model_sampling.sigmas.double()

    def noise_levels(self, times):
        return self.sigmas[(times * 1000).long()]

    def predict(self, noisy, sigma, conditioning):
        timesteps = (sigma.double().view(-1, 1) - self.sigmas).abs().argmin(1)
        level = sigma.to(noisy.dtype).view(-1, 1, 1, 1)
        with self.loan.using():
            return self.loan.model.diffusion_model(
                noisy / (1 + level**2).sqrt(), timesteps.to(noisy.dtype), context=torch.cat(list(conditioning))
            )


class Shuffled:
    """A data set in a fixed order that differs from epoch to epoch."""

    def __init__(self, dtype):
        draws = torch.Generator().manual_seed(1)
        self.latents = torch.randn(BATCHES, BATCH, 4, SIDE, SIDE, generator=draws).to(dtype)
        self.texts = torch.randn(BATCHES, BATCH, 1, tiny.TOKENS, 64, generator=draws).to(dtype)

    def batch(self, position):
        epoch, index = divmod(position, BATCHES)
        index = (index + 3 * epoch) % BATCHES
        return Batch(self.latents[index], list(self.texts[index]))


def plan_for(accumulation):
    return Plan(
        learning_rate=2e-3,
        batch_size=BATCH,
        seed=5,
        adapter=AdapterSettings(loraplus_ratio=1.0),
        objective=ObjectiveSettings(timesteps="uniform"),
        optimizer=OptimizerSettings(
            weight_decay=0.02,
            beta1=0.85,
            beta2=0.98,
            schedule="cosine",
            warmup_steps=WARMUP,
            max_grad_norm=CLIP[accumulation],
            gradient_accumulation=accumulation,
        ),
    )


def factors(adapters):
    return {path: [t.detach().clone() for t in adapter.parameters()] for path, adapter in adapters.items()}


def trainer_for(adapters, denoiser, examples, accumulation, steps):
    plan = plan_for(accumulation)
    return Trainer(learners(adapters, plan), denoiser, examples, plan, steps)


def our_run(dtype, steps, accumulation):
    """(first factors, last factors, reports) of the package's own trainer."""
    patcher = tiny.tiny(NAME, dtype=dtype, inference=True)
    adapters = adapters_for(patcher, "full", conv=True, rank=3, dtype=dtype, filled=False)
    first = factors(adapters)
    with borrow(patcher, adapters) as loan:
        trainer = trainer_for(adapters, PlainDenoiser(loan), Shuffled(dtype), accumulation, steps)
        reports = [trainer.step() for _ in range(steps)]
    return first, factors(adapters), reports


def peft_network(dtype, first):
    patcher = tiny.tiny(NAME, dtype=dtype)
    network = patcher.model.diffusion_model
    paths = [path.removeprefix(PREFIX) for path in first]
    config = peft.LoraConfig(r=3, lora_alpha=2, target_modules=paths, init_lora_weights=False)
    network = peft.inject_adapter_in_model(config, network)
    injected = {name for name, module in network.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert injected == set(paths)
    pairs = {}
    for path, (down, up) in first.items():
        layer = network.get_submodule(path.removeprefix(PREFIX))
        pairs[path] = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
        with torch.no_grad():
            for own, start in zip(pairs[path], (down, up), strict=True):
                own.copy_(start)
    return patcher.model, network, pairs


def reference_run(dtype, steps, accumulation, first, order="as given"):
    """(last factors, losses) of a textbook loop; ``order`` says in which order a batch is summed up."""
    model, network, pairs = peft_network(dtype, first)
    parameters = [tensor for pair in pairs.values() for tensor in pair]
    assert {id(p) for p in network.parameters() if p.requires_grad} == {id(p) for p in parameters}
    optimizer = torch.optim.AdamW(
        parameters, lr=2e-3, betas=(0.85, 0.98), eps=1e-8, weight_decay=0.02, foreach=False, fused=False
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, 1.0, total_iters=WARMUP - 1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - WARMUP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[WARMUP])
    alphas = 1 / (1 + model.model_sampling.sigmas.double() ** 2)
    examples, losses = Shuffled(dtype), []
    for step in range(steps):
        total = 0.0
        for micro in range(accumulation):
            position = step * accumulation + micro
            batch = examples.batch(position)
            times = torch.rand(BATCH, generator=generator(5, "timestep", position), dtype=torch.float64)
            noise = torch.randn(batch.latents.shape, generator=generator(5, "noise", position)).to(dtype)
            timesteps = (times * 1000).long()
            kept = alphas[timesteps].to(dtype).view(-1, 1, 1, 1)
            noisy = kept.sqrt() * batch.latents + (1 - kept).sqrt() * noise
            text = torch.cat(list(batch.conditioning))
            for part in {"as given": [[0, 1]], "reversed": [[1, 0]], "one by one": [[0], [1]]}[order]:
                output = network(noisy[part], timesteps[part].to(dtype), context=text[part])
                loss = torch.nn.functional.mse_loss(output, noise[part]) * len(part) / BATCH / accumulation
                loss.backward()
                total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP[accumulation])
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return {path: [t.detach() for t in pair] for path, pair in pairs.items()}, losses


def largest_error(got, want):
    """Over all factors: largest difference relative to the factor's largest entry."""
    assert got.keys() == want.keys()
    return max(
        ((a - b).abs().max() / b.abs().max()).item()
        for path in got
        for a, b in zip(got[path], want[path], strict=True)
    )


@pytest.mark.parametrize("steps, accumulation", ((30, 1), (10, 2)), ids=("30 steps", "accumulated"))
def test_float64_trajectory_equals_peft(steps, accumulation):
    first, last, reports = our_run(torch.float64, steps, accumulation)
    reference, losses = reference_run(torch.float64, steps, accumulation, first)
    assert largest_error(last, reference) < 1e-9
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-9)
    assert min(largest_error({0: [a]}, {0: [b]}) for p in first for a, b in zip(last[p], first[p], strict=True)) > 1e-3
    clipped = [report.gradient_norm > CLIP[accumulation] for report in reports]
    assert any(clipped) and not all(clipped)


def distance(got, want, first):
    """How far apart two runs have come, relative to how far they went."""
    apart = sum((a - b).double().square().sum() for p in want for a, b in zip(got[p], want[p], strict=True))
    went = sum((a - b).double().square().sum() for p in want for a, b in zip(first[p], want[p], strict=True))
    return (apart / went).sqrt().item()


def test_float32_trajectory_equals_peft_within_its_own_rounding():
    first, last, _ = our_run(torch.float32, 30, 1)
    reference, _ = reference_run(torch.float32, 30, 1, first)
    bound = max(
        distance(reference_run(torch.float32, 30, 1, first, order)[0], reference, first)
        for order in ("reversed", "one by one")
    )
    assert bound < 1e-4
    assert distance(last, reference, first) < 2 * bound
