"""Muon against torch's own on matrices, on flattened convolutions, and AdamW on what is no matrix."""

import pytest
import torch

from lora_loom.training.optimizers import make_optimizer
from lora_loom.training.optimizers.muon import Muon, orthogonal
from lora_loom.training.options import OptionError
from lora_loom.training.settings import OptimizerSettings

MATRICES = ((16, 40), (40, 16), (9, 9), (1, 12), (33, 1))


def random(shapes, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws) for shape in shapes]


def take(optimizer, tensors, steps=4):
    for step in range(steps):
        for tensor, gradient in zip(tensors, random([tensor.shape for tensor in tensors], step + 1), strict=True):
            tensor.grad = gradient
        optimizer.step()
    return tensors


@pytest.mark.parametrize(
    "options",
    (
        {"adjust_lr_fn": "original"},
        {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.3},
        {"adjust_lr_fn": "original", "nesterov": False, "momentum": 0.8, "ns_steps": 3},
    ),
)
def test_matrices_take_torchs_steps_to_the_bit(options):
    ours, theirs = random(MATRICES), random(MATRICES)
    take(Muon(ours, lr=0.02, **options), ours)
    take(torch.optim.Muon(theirs, lr=0.02, **options), theirs)
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", ((6, 4, 3, 3), (8, 5, 1, 1), (4, 3, 2, 3, 3)))
def test_convolutions_are_matrices_of_a_row_per_output(shape):
    [kernel], [matrix] = random([shape]), [tensor.flatten(1) for tensor in random([shape])]
    first, second = Muon([kernel], lr=0.02), torch.optim.Muon([matrix], lr=0.02, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        [kernel.grad] = random([shape], step)
        matrix.grad = kernel.grad.flatten(1).clone()
        first.step()
        second.step()
    assert torch.equal(kernel.flatten(1), matrix)


def test_what_is_no_matrix_takes_adamws_steps():
    shapes = ((7,), (3, 4, 4), ())
    ours, theirs = random(shapes), random(shapes)
    take(Muon(ours, lr=0.02, weight_decay=0.1), ours, 6)
    take(torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1, foreach=False), theirs, 6)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shape", MATRICES)
def test_the_update_has_equal_lengths_in_all_directions(shape):
    [matrix] = random([shape])
    lengths = torch.linalg.svdvals(orthogonal(matrix).float())
    assert lengths.min() > 0.3 and lengths.max() < 1.5


def test_steps_are_as_large_as_those_of_adamw():
    """So that the rates of AdamW suit it."""
    settings = OptimizerSettings(optimizer="Muon", weight_decay=0.0)
    moved = {}
    for rows, columns in ((64, 320), (320, 64)):
        tensors = [torch.zeros(rows, columns)]
        take(make_optimizer(settings, [{"params": tensors, "lr": 1e-3}]), tensors, 1)
        moved[rows] = tensors[0].square().mean().sqrt().item() / 1e-3
    assert all(0.1 < size < 0.4 for size in moved.values()), moved


def test_its_arguments_are_checked():
    wrong = {"adjust_lr_fn=spectral": "adjust_lr_fn", "ns_steps=0": "ns_steps", "vector_eps=0": "vector_eps"}
    for text, message in wrong.items():
        with pytest.raises(OptionError, match=f"^optimizer_args is '{text}', expected what Muon accepts: .*{message}"):
            OptimizerSettings(optimizer="Muon", optimizer_args=text)
