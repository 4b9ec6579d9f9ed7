"""Every optimizer in the trainer: it learns, is looked at, saved and taken up again without another bit."""

import json
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch

from lora_loom.kernels.adapter import Options
from lora_loom.kernels.lora import LoRA
from lora_loom.training.learners import Component
from lora_loom.training.loop import Batch, State, Trainer, generator
from lora_loom.training.objective import Prediction
from lora_loom.training.optimizers import OPTIMIZERS
from lora_loom.training.options import OptionError
from lora_loom.training.settings import AdapterSettings, OptimizerSettings, Plan, RunSettings

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers")
WIDE = 72  # a factor of rank 64 is then large enough for 8-bit states
RATES = {"SGD": 0.3, "SGD8bit": 0.1, "SGDScheduleFree": 0.3, "RAdamScheduleFree": 0.1, "CAME": 1e-3}
RATES |= {"Lion": 1e-3, "Lion8bit": 1e-3, "PagedLion8bit": 1e-3}


class Layer:
    geometry = None

    def forward(self, x):
        return 0.3 * x

    @contextmanager
    def weight(self, like):
        yield 0.3 * torch.eye(WIDE, dtype=like.dtype)


class Toy:
    prediction = Prediction.FLOW

    def __init__(self, adapter):
        self.adapter = adapter

    def noise_levels(self, times):
        return times.float()

    def predict(self, noisy, sigma, conditioning):
        return self.adapter.on(noisy.flatten(1), Layer()).view(noisy.shape)


class Points:
    def batch(self, position):
        return Batch(torch.randn(4, WIDE, 1, 1, generator=torch.Generator().manual_seed(position % 3)), [None] * 4)


def trainer(name, dtype=torch.float32, total=12, adapter=None, components=(), **options):
    row = OPTIMIZERS[name]
    own = {"optimizer_name": "AdEMAMix"} if name == "pytorch_optimizer" else {}
    if row.finds_rate:
        own["optimizer_args"] = "d0=0.001"
    rate = 1.0 if row.finds_rate else RATES.get(name, 0.01)
    plan = Plan(
        learning_rate=rate,
        optimizer=OptimizerSettings(optimizer=name, **own | options),
        run=RunSettings(ema_decay=0.5),
        adapter=adapter or AdapterSettings(loraplus_ratio=1.0),
    )
    lora = LoRA.create((WIDE, WIDE), Options(64, 64.0), generator(3, "adapters", 0)).to(dtype=dtype)
    return Trainer([Component("model", {"layer": lora}, rate), *components], Toy(lora), Points(), plan, total)


def written_and_read(state):
    tensors = safetensors.torch.load(safetensors.torch.save(state.tensors))
    return State(tensors, json.loads(json.dumps(state.facts)))


HALF = ("AdamW", "Prodigy", "ProdigyPlusScheduleFree", "AdamWScheduleFree", "AdamW8bit", "torchao AdamW4bit")


@pytest.mark.parametrize(
    "name, dtype", [*((name, torch.float32) for name in OPTIMIZERS), *((name, torch.bfloat16) for name in HALF)]
)
def test_a_run_that_stopped_and_was_looked_at_ends_with_the_same_bits(name, dtype):
    whole, first = trainer(name, dtype), trainer(name, dtype)
    for _ in range(4):
        whole.step()
        first.step()
    with first.evaluation():
        assert all(tensor.isfinite().all() for tensor in first.parameters)
    resumed = trainer(name, dtype)
    resumed.restore(written_and_read(first.state()))
    for _ in range(8):
        whole.step()
        resumed.step()
        with resumed.evaluation():
            pass
    ends, others = whole.state(), resumed.state()
    assert json.dumps(ends.facts) == json.dumps(others.facts)
    assert ends.tensors.keys() == others.tensors.keys()
    for key, value in ends.tensors.items():
        assert torch.allclose(value.double(), others.tensors[key].double(), rtol=0, atol=0, equal_nan=True), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name):
    """What finds its rate is held back: so little noise averages out in so few steps that it would soon jump."""
    held = dict.fromkeys(("Prodigy", "DAdaptAdam"), "d0=0.001 growth_rate=1.02") | {"DAdaptSGD": "d0=0.0001"}
    run = trainer(name, total=60, **({"optimizer_args": held[name]} if name in held else {}))
    with run.evaluation():
        before = sum(run.validation_losses([Points().batch(0), Points().batch(1)]).values())
    while not run.finished:
        run.step()
    with run.evaluation():
        after = sum(run.validation_losses([Points().batch(0), Points().batch(1)]).values())
    assert after < 0.95 * before


@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.schedule_free])
def test_the_weights_that_are_saved_are_the_averaged_ones(name):
    run = trainer(name)
    while not run.finished:
        run.step()
    trained = [tensor.detach().clone() for tensor in run.parameters]
    with run.evaluation():
        assert not any(torch.equal(one, other) for one, other in zip(trained, run.parameters, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(trained, run.parameters, strict=True))


def test_rates_that_differ_are_refused_by_name_where_they_cannot_be():
    fast = AdapterSettings(loraplus_ratio=4.0)
    assert len(trainer("AdamW", adapter=fast).optimizer.param_groups) == 2
    trainer("ProdigyPlusScheduleFree", adapter=fast).step()
    with pytest.raises(OptionError, match="^optimizer is 'Prodigy', expected .*loraplus_ratio"):
        trainer("Prodigy", adapter=fast)


def test_a_component_that_stops_holds_nothing_up():
    for name in ("Prodigy", "ProdigyPlusScheduleFree", "AdamW8bit", "torchao AdamW8bit", "AdamWScheduleFree"):
        words = torch.ones(3, 5)
        rate = 1.0 if OPTIMIZERS[name].finds_rate else 0.01
        other = Component("embeddings", {}, rate, stop_after=2, loose={"word": words})
        run = trainer(name, components=[other])
        while not run.finished:
            run.step()
        assert torch.equal(words, torch.ones(3, 5))  # it never had a gradient
