"""LoRA+ and the bound of norms, with every family, in the trainer."""

import math

import pytest
import torch
from torch import nn

import run_host
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.dora import DoRA
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.registry import FAMILIES
from lora_loom.training.adapters import build
from lora_loom.training.learners import Component, groups
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.objective import Prediction
from lora_loom.training.settings import ALGORITHMS, AdapterSettings, OptimizerSettings, Plan

run_host.prepare_imports()  # the reference imports torchvision, which may need its operators declared first

import peft  # noqa: E402
from peft.optimizers import create_loraplus_optimizer  # noqa: E402


class Layer:
    """A linear layer on loan."""

    geometry = None

    def __init__(self, module):
        self.module = module

    def forward(self, x):
        return self.module(x).detach() if not x.requires_grad else x @ self.module.weight.T + self.module.bias

    def weight(self, like):
        class Lent:
            def __enter__(lent):
                return self.module.weight.detach()

            def __exit__(lent, *problem):
                return None

        return Lent()

    def bias(self, like):
        return self.module.bias.detach()


class Toy:
    """Two layers with adapters and a nonlinearity between them."""

    prediction = Prediction.FLOW

    def __init__(self, tree, adapters):
        self.layers = [Layer(tree.blocks[n].fc) for n in range(2)]
        self.adapters = list(adapters.values())

    def noise_levels(self, times):
        return times.float()

    def predict(self, noisy, sigma, conditioning):
        x = torch.cat([noisy.flatten(1), sigma.view(-1, 1).expand(-1, 4)], 1)
        x = self.adapters[1].on(torch.tanh(self.adapters[0].on(x, self.layers[0])), self.layers[1])
        return x[:, :4].view(noisy.shape)


class Points:
    def batch(self, position):
        draws = torch.Generator().manual_seed(position)
        return Batch(torch.randn(3, 4, 1, 1, generator=draws), [None] * 3)


def tree():
    torch.manual_seed(0)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2)])
    return model.requires_grad_(False)


def started(total=6, rate=0.05, loraplus_ratio=1.0, **settings):
    model = tree()
    blocks = {"block_size": 4} if "OFT" in settings.get("algorithm", "") else {}
    adapter = AdapterSettings(layers="full", loraplus_ratio=loraplus_ratio, **blocks, **settings)
    plan = Plan(rank=2, alpha=2.0, learning_rate=rate, adapter=adapter, optimizer=OptimizerSettings(weight_decay=0.0))
    built = build(model, plan, lambda path: model.get_submodule(path).weight.float())
    component = Component("model", built.adapters, rate, factors=built.factors)
    return Trainer([component], Toy(model, built.adapters), Points(), plan, total)


@pytest.mark.parametrize("settings", [*({"algorithm": name} for name in ALGORITHMS), {"dora": "output"}], ids=str)
def test_norms_are_bounded_after_every_step(settings):
    free, bound = started(**settings), started(max_norm=0.02, **settings)
    for _ in range(6):
        free.step()
        bound.step()
        assert all(adapter.norm().item() <= 0.02 * (1 + 1e-5) for adapter in bound.adapters)
    assert any(adapter.norm().item() > 0.04 for adapter in free.adapters)
    assert any(adapter.norm().item() > 0.019 for adapter in bound.adapters), "shrunk no further than asked"


def test_a_component_that_has_stopped_is_not_shrunk():
    trainer = started(max_norm=0.02)
    adapter = LoRA.create((8, 8), Options(2, 2.0), torch.Generator())
    torch.nn.init.ones_(adapter.up)
    kept = {name: tensor.clone() for name, tensor in adapter.tensors.items()}
    trainer.components.append(Component("te1", {"layer": adapter}, 0.1, stop_after=2))
    trainer.step_number = 2
    trainer.step()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapter.tensors.items())


def test_loraplus_is_grouped_as_peft_does_it():
    model = peft.get_peft_model(tree(), peft.LoraConfig(r=2, target_modules=["fc"]))
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
    rates = {}
    for group in theirs.param_groups:
        for tensor in group["params"]:
            rates.setdefault(tuple(tensor.shape), set()).add(group["lr"])
    ours = {}
    trainer = started(rate=1e-3, loraplus_ratio=16.0)
    for group in trainer.groups:
        for tensor in group.tensors:
            ours.setdefault(tuple(tensor.shape), set()).add(group.learning_rate)
    assert ours == rates == {(2, 8): {1e-3}, (8, 2): {16 * 1e-3}}


# what is next to the outputs learns faster, whatever the family calls it
FAST = {
    "LoRA": {"lora_up.weight"},
    "DyLoRA": {"lora_up.weight"},
    "LoRA-FA": {"lora_up.weight"},
    "LoHa": {"hada_w2_a"},
    "LoKr": {"lokr_w2", "lokr_w2_b"},
    "GLoRA": {"a1.weight", "b1.weight"},
}


def test_the_table_of_fast_factors():
    assert {name for name in ALGORITHMS if FAMILIES[name].adapter.fast_parts} == FAST.keys()


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("dora", ["off", "output"])
def test_loraplus_with_every_family(family, dora):
    if dora != "off" and not FAMILIES[family].dora:
        return
    settings = {"algorithm": family, "dora": dora}
    trainer = started(rate=1e-3, loraplus_ratio=4.0, **settings)
    rates = {id(tensor): group.learning_rate for group in trainer.groups for tensor in group.tensors}
    for adapter in trainer.adapters:
        found = {name: rates.get(id(tensor)) for name, tensor in adapter.tensors.items()}
        for name, rate in found.items():
            if name in adapter.fixed_parts:
                assert rate is None
            else:
                assert math.isclose(rate, 4e-3 if name in FAST[family] else 1e-3), name
        assert isinstance(adapter, DoRA) == (dora != "off")


def test_rates_of_blocks_and_loraplus_multiply():
    trainer = started(rate=1e-3, loraplus_ratio=4.0, blocks="blocks.1: lr=0.5")
    assert sorted(group.learning_rate for group in trainer.groups) == pytest.approx([5e-4, 1e-3, 2e-3, 4e-3])
    assert len(groups(trainer.components, 1.0)) == 2
