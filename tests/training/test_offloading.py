"""Blocks that run once more from inputs which waited in main memory, on toy blocks."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lora_loom.training.activations import Activations
from lora_loom.training.checkpointing import guarded
from lora_loom.training.offloading import MainMemory

DEVICES = ["cpu", "cuda"][: 1 + torch.cuda.is_available()]


class Block(nn.Module):
    """Takes what hosts' blocks take: tensors by place and by name, tuples, a dict it writes into."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 12))
        self.seen = []

    def forward(self, x, *, shift, text, options):
        self.seen.append(weakref.ref(x))
        options["calls"] = options.get("calls", 0) + 1
        return x + self.inner(x * shift + text[0]) * text[1]


def blocks(count, device="cpu"):
    return nn.ModuleList(Block(seed) for seed in range(count)).to(device)


def run(stack, checkpoint, offload, breaks_at=None):
    """Forward and backward; what is found on the way, and the gradients."""
    device = next(stack.parameters()).device
    draws = torch.Generator().manual_seed(9)
    start, shift = (torch.randn(5, 7, 12, generator=draws).to(device) for _ in range(2))
    text = tuple(torch.randn(12, generator=draws).to(device) for _ in range(2))
    start.requires_grad_()
    options = {}
    for block in stack:
        block.seen.clear()
    with guarded(stack, checkpoint, offload):
        x, shared = start * 2, (shift * start).tanh()
        for index, block in enumerate(stack):
            if index == breaks_at:
                raise KeyError(index)
            x = block(x, shift=shared, text=text, options=options)
        result = x.square().mean()
        del x
        gc.collect()
        alive = [block.seen[0]() is not None for block in stack]
        result.backward()
    gradients = [start.grad, *(parameter.grad for parameter in stack.parameters())]
    stack.zero_grad()
    return gradients, alive


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_gradients_to_the_last_bit(device):
    stack = blocks(4, device)
    plain, _ = run(stack, False, False)
    for offload in (False, True):
        again, _ = run(stack, True, offload)
        assert all(torch.equal(got, want) for got, want in zip(again, plain, strict=True)), offload
        assert all(len(block.seen) == 2 for block in stack), "every block has been run once more"


@pytest.mark.parametrize("device", DEVICES)
def test_the_inputs_of_blocks_leave_the_device(device):
    _, alive = run(blocks(4, device), True, False)
    assert all(alive)
    _, alive = run(blocks(4, device), True, True)
    assert not any(alive)


def held(store):
    """Bytes that lie in main memory."""
    copies = {id(copy): copy for parcel in store.parcels.values() for copy in parcel.copies.values()}
    return sum(copy.there.nbytes for copy in copies.values())


def test_main_memory_is_free_again_when_the_graph_is_gone():
    store = MainMemory()
    x = torch.randn(4, 3, requires_grad=True) * 1
    shared = torch.randn(4, 3, requires_grad=True) * 1
    parcels = [store.parcel((x, shared), {"plain": torch.ones(2)}) for _ in range(3)]
    assert held(store) == x.nbytes + shared.nbytes, "a tensor that several blocks are given is kept once"
    args, kwargs = parcels[0].open()
    assert args[0] is x and args[1] is shared
    (back, _), kwargs = parcels[0].open()
    assert back is not x and torch.equal(back, x) and back.requires_grad and kwargs["plain"].tolist() == [1, 1]
    x.detach().add_(1)  # a new version is another tensor
    changed = store.parcel((x,), {})
    changed.open()
    assert torch.equal(changed.open()[0][0], x) and not torch.equal(back, x)
    del args, kwargs, back, parcels, changed
    gc.collect()
    assert not store.parcels and held(store) == 0


def test_an_error_on_the_way_leaves_nothing_behind():
    stack = blocks(3)
    with pytest.raises(KeyError):
        run(stack, True, True, breaks_at=2)
    gc.collect()
    assert not any(block.seen[0]() is not None for block in stack[:2])
    assert not any("forward" in vars(block) for block in stack)
    assert all(torch.equal(a, b) for a, b in zip(run(stack, True, True)[0], run(stack, False, False)[0], strict=True))


@pytest.mark.parametrize("offload", (False, True))
def test_what_a_checkpointed_stack_holds_is_counted(offload):
    """Each block holds its input, or main memory does; one block at a time holds what lies between its layers."""
    rows = 5 * 7 * 12 * 4  # bytes of one activation
    counted = {}
    for count in (2, 6):
        stack = blocks(count)
        x = torch.randn(5, 7, 12, requires_grad=True)
        text, activations = tuple(torch.randn(2, 12)), Activations([*stack.parameters(), x])
        with guarded(stack, True, offload), activations.counting():
            y = x * 2
            for block in stack:
                y = block(y, shift=torch.ones(12), text=text, options={})
        counted[count] = activations
    assert counted[6].block == counted[2].block >= 3 * rows
    kept, away = (getattr(counted[6], name) - getattr(counted[2], name) for name in ("kept", "away"))
    # the ones of each call stay on the device in both cases
    assert (kept - 4 * 48, away) == ((0, 4 * rows) if offload else (4 * rows, 0))
