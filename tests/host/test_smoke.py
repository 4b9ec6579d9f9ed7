"""The check before the first step: silent where all is well, and naming the culprit where it is not."""

import math

import pytest
import torch
from torch import nn

import tiny
from graph import images
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.kernels.adapter import Dropout
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import OptimizerSettings, Plan, RunSettings
from lora_loom.training.smoke import GradientError, check_gradients
from small_runs import plan, run
from training import adapters_for, borrow, learners, opened, samples_for

MODELS = ("sdxl", "flux", "hunyuan_video")


class Examples:
    def __init__(self, name, batch=2, side=8):
        latents, _, _, conditioning = samples_for(name, batch, seed=5, side=side)
        self.one = Batch(latents, conditioning)

    def batch(self, position):
        return self.one


def trainer_for(name, loan, adapters, **options):
    plan = Plan(learning_rate=1e-3, optimizer=OptimizerSettings(**options), run=RunSettings(ema_decay=0.9))
    return Trainer(learners(adapters, plan), HostDenoiser(loan), Examples(name), plan, total_steps=4)


def check(name, patcher=None, adapters=None, preset="full", checkpoint=False, dropout=None, filled=False, **how):
    """The smoke test on a tiny model; what it found."""
    patcher = patcher or tiny.tiny(name)
    adapters = adapters or adapters_for(patcher, preset, filled=filled)
    with borrow(patcher, adapters, checkpoint=checkpoint, **how) as loan:
        trainer = trainer_for(name, loan, adapters)
        for adapter in adapters.values():
            adapter.dropout = dropout or adapter.dropout
        before = trainer.state(), torch.get_rng_state()
        try:
            return check_gradients(trainer, dict(loan.model.named_modules()))
        finally:
            after = trainer.state(), torch.get_rng_state()
            assert after[0].facts == before[0].facts and torch.equal(before[1], after[1])
            assert all(torch.equal(after[0].tensors[key], value) for key, value in before[0].tensors.items())
            assert all(tensor.grad is None for tensor in trainer.parameters)
            assert all(adapter.seed is None for adapter in adapters.values())
            assert not any(module._forward_hooks or module._forward_pre_hooks for module in loan.model.modules())


@pytest.mark.parametrize("how", ({}, {"checkpoint": True}, {"checkpoint": True, "offload": True}), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_to_say_of_a_sound_model(name, how):
    found = check(name, **how)
    assert not found.notes and found.seconds > 0 and found.kept > 0 and found.places == 2 * math.prod(
        (*tiny.SPECS[name].latent[:-2], 8, 8)
    )
    assert (found.block > 0) == bool(how) and (found.away > 0) == ("offload" in how)


def test_dropout_of_whole_adapters_is_no_lost_gradient():
    assert not check("sd15", dropout=Dropout(module=0.9)).notes


# -- what breaks gradients


class Detached(nn.Module):
    """A node's patch that thought of pictures only."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs).detach()


class _OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0


class OneWay(Detached):
    """A fast kernel without a backward."""

    def forward(self, *args, **kwargs):
        return _OneWay.apply(self.inner(*args, **kwargs))


class InPlace(Detached):
    """Overwrites what its own backward needs, outside of any block."""

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs).sigmoid()
        y.add_(1.0)
        return y


class Exploding(Detached):
    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs) / 0.0


PLACES = {
    "sd15": ("diffusion_model.middle_block.1.transformer_blocks.0.ff", "diffusion_model.out.0"),
    "sd3": ("diffusion_model.joint_blocks.1.x_block.mlp", "diffusion_model.final_layer.linear"),
    "flux": ("diffusion_model.single_blocks.0.linear2", "diffusion_model.final_layer.linear"),
}
# in a block (checkpointed or not), and outside
WHERE = [(name, place, checkpoint) for name in PLACES for place, checkpoint in ((0, False), (0, True), (1, False))]


def broken(name, path, kind):
    patcher = tiny.tiny(name)
    parent, _, leaf = path.rpartition(".")
    owner = patcher.model.get_submodule(parent)
    adapters = adapters_for(patcher, "attention+MLP", conv=False)
    whole = owner.get_submodule(leaf)
    owner._modules[leaf] = kind(whole)
    inner = {f"{path}.": f"{path}.inner."}  # adapters inside follow
    adapters = {
        next((new + key.removeprefix(old) for old, new in inner.items() if key.startswith(old)), key): adapter
        for key, adapter in adapters.items()
    }
    return patcher, adapters


@pytest.mark.parametrize("name, place, checkpoint", WHERE)
def test_a_module_that_detaches_is_named(name, place, checkpoint):
    path = PLACES[name][place]
    patcher, adapters = broken(name, path, Detached)
    with pytest.raises(GradientError, match=f"smoke_test: .*{path} stops the gradient.*layer_filter"):
        check(name, patcher, adapters, checkpoint=checkpoint)


@pytest.mark.parametrize("name, place, checkpoint", WHERE)
def test_a_module_without_a_backward_is_named(name, place, checkpoint):
    path = PLACES[name][place]
    patcher, adapters = broken(name, path, OneWay)
    with pytest.raises(GradientError, match=f"the backward fails in {path} .*layer_filter"):
        check(name, patcher, adapters, checkpoint=checkpoint)


@pytest.mark.parametrize("name", PLACES)
def test_a_module_that_overwrites_what_it_needs_is_named(name):
    path = PLACES[name][1]
    patcher, adapters = broken(name, path, InPlace)
    with pytest.raises(GradientError, match=f"the backward fails in {path} .*inplace"):
        check(name, patcher, adapters)


@pytest.mark.parametrize("name", PLACES)
def test_a_module_that_overflows_is_named(name):
    path = PLACES[name][0]
    patcher, adapters = broken(name, path, Exploding)
    with pytest.raises(GradientError, match=f"not finite: {path} gives inf or NaN. Use compute_dtype fp32"):
        check(name, patcher, adapters)


# -- what has no gradient and needs none


class Unused(Detached):
    """Gives back what went in: what is inside is called, and does nothing."""

    def forward(self, x, *args, **kwargs):
        self.inner(x, *args, **kwargs)
        return torch.zeros_like(x)


@pytest.mark.parametrize("name, place", [("sd15", 0), ("sd3", 0)])
def test_layers_without_a_part_in_the_loss_are_told(name, place):
    path = PLACES[name][place]
    patcher, adapters = broken(name, path, Unused)
    inside = [key for key in adapters if key.startswith(path)]
    (note,) = check(name, patcher, adapters).notes
    assert note.startswith(f"{len(inside)} of {len(adapters)} adapters stay as they are") and inside[0] in note
    with pytest.raises(GradientError, match=f"none of the {len(inside)} trained layers of the model"):
        check(name, patcher, {key: adapters[key] for key in inside})


def test_text_that_nobody_reads_is_told():
    """The last block of Qwen-Image computes text that is not used any more."""
    (note,) = check("qwen_image").notes
    assert "transformer_blocks.0.attn.to_add_out" in note and "layer_filter" in note


def test_no_memory_for_a_step_says_what_to_do(monkeypatch):
    def full(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="gradient_checkpointing.*batch_size"):
        check("sd15")


@pytest.mark.parametrize("said", ("MPS backend out of memory (MPS allocated: 1 GB)", "CUDA error: out of memory",
                                  "DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."))
def test_no_memory_is_not_a_broken_model_on_any_device(monkeypatch, said):
    def full(*args, **kwargs):
        raise RuntimeError(said)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", full)
    with pytest.raises(RuntimeError, match="Before the first step: .*gradient_checkpointing.*batch_size") as caught:
        check("sd15")
    assert not isinstance(caught.value, GradientError) and str(caught.value).startswith(said)


class Scaled(Detached):
    """The right value with a gradient that is too small."""

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs)
        return 0.3 * y + 0.7 * y.detach()


# fresh adapters move the loss so little that bfloat16 does not always show it
PRECISIONS = [(filled, dtype) for filled in (False, True) for dtype in (None, torch.float16, torch.bfloat16)]
PRECISIONS.remove((False, torch.bfloat16))


@pytest.mark.parametrize("filled, dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("name", PLACES)
def test_gradients_that_look_well_and_are_wrong(name, filled, dtype):
    patcher, adapters = broken(name, PLACES[name][1], Scaled)
    for adapter in adapters.values():
        if not filled:
            adapter.up.detach().zero_()
    with pytest.raises(GradientError, match=r"the gradients are wrong, the loss changes 3\.\d+ times as much"):
        check(name, patcher, adapters, **({} if dtype is None else {"compute_dtype": dtype}))


@pytest.mark.parametrize("name", MODELS)
def test_low_precision_is_no_wrong_gradient(name):
    for dtype in (torch.bfloat16, torch.float16):
        assert not check(name, filled=True, compute_dtype=dtype, preset="attention", checkpoint=True).notes


def test_adapters_that_were_trained_too_fast_are_no_wrong_gradient(tmp_path):
    """Their loss is so rough that two steps can agree by chance: each of these runs begins with the check."""
    dataset = opened(images(tmp_path / "zorb", count=5), 64, 16)
    for length in range(1, 11):
        wild = plan(length=length, seed=1, learning_rate=3e-2, run={"save_every": 1})
        assert run(dataset, wild, "trained too fast").finished
