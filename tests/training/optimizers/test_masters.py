"""bfloat16 parameters with float32 copies while the optimizer works: rounded at random, right in the mean."""

import pytest
import torch

from lora_loom.training.optimizers.masters import Masters, rounded_at_random


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def neighbours(values):
    """The two bfloat16 numbers around each of ``values``, by the bits."""
    down = (values.view(torch.int32) & -65536).view(torch.float32)
    up = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32)
    return down, up


@pytest.mark.parametrize("scale", (1e-30, 1e-4, 1.0, 1e20))
def test_rounding_is_right_in_the_mean(scale):
    values = scale * torch.randn(50, generator=draws(1))
    generator, times = draws(2), 4000
    rounded = torch.stack([rounded_at_random(values, generator) for _ in range(times)])
    assert rounded.dtype == torch.bfloat16
    down, up = neighbours(values)
    assert ((rounded.float() == down) | (rounded.float() == up)).all()
    gap = (up - down).abs()
    off = (rounded.double().mean(0) - values.double()).abs() / gap
    assert off.max() < 5 * 0.5 / times**0.5  # five deviations of the worst coin
    part = ((values - down) / (up - down)).mean()
    assert (rounded.float() == up).float().mean() == pytest.approx(part.item(), abs=0.01)


def test_what_bfloat16_can_hold_is_kept():
    exact = torch.randn(100, generator=draws()).bfloat16().float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 1.0, -2.0])
    for seed in range(20):
        for values in (exact, special):
            rounded = rounded_at_random(values, draws(seed)).float()
            assert torch.equal(rounded.view(torch.int32), values.view(torch.int32))
        odd = torch.tensor([float("nan"), -float("nan")])
        odd = torch.cat([odd, torch.tensor([0x7F800001, -0x007FFFFF], dtype=torch.int32).view(torch.float32)])
        assert rounded_at_random(odd, draws(seed)).isnan().all()


def test_the_same_draws_give_the_same_bits():
    values = torch.randn(33, 7, generator=draws())
    assert torch.equal(rounded_at_random(values, draws(4)), rounded_at_random(values, draws(4)))
    assert not torch.equal(rounded_at_random(values, draws(4)), rounded_at_random(values, draws(5)))
    flipped = values.t().contiguous().t()  # another layout of the same numbers
    assert torch.equal(rounded_at_random(values, draws(4)), rounded_at_random(flipped, draws(4)))


def test_small_steps_are_not_lost():
    """A thousand steps of 1e-4 of a bfloat16's distance each; plain rounding would not move at all."""
    parameter = torch.ones(2000, dtype=torch.bfloat16)
    masters = Masters([parameter])
    generator = draws(9)
    for _ in range(1000):
        with masters.gathered():
            masters.tensors[0].sub_(1e-5)
            masters.write_back(lambda: generator)
    assert parameter.float().mean() == pytest.approx(1 - 1000 * 1e-5, abs=5e-4)
    assert (torch.ones((), dtype=torch.bfloat16) - 1e-5).item() == 1.0


def test_float32_parameters_are_their_own_masters():
    parameters = [torch.randn(3, 4, generator=draws()), torch.randn(2, generator=draws(1))]
    masters = Masters(parameters)
    assert all(one is other for one, other in zip(masters.tensors, parameters, strict=True))
    kept = [tensor.clone() for tensor in parameters]
    parameters[0].grad = gradient = torch.ones(3, 4)
    with masters.gathered():
        masters.write_back(lambda: pytest.fail("nothing is to be rounded"))
    assert all(torch.equal(one, other) for one, other in zip(kept, parameters, strict=True))
    assert parameters[0].grad is gradient


def test_copies_live_only_while_the_optimizer_works():
    parameters = [torch.randn(5, 3, generator=draws()).bfloat16(), torch.randn(4, generator=draws(1))]
    parameters[0].grad = gradient = torch.full((5, 3), 0.5, dtype=torch.bfloat16)
    masters = Masters(parameters)
    master = masters.of(parameters[:1])[0]
    assert master is masters.tensors[0] and master.shape == (5, 3) and master.untyped_storage().nbytes() == 4
    with masters.gathered():
        assert torch.equal(master, parameters[0].float()) and master.dtype == torch.float32
        assert torch.equal(master.grad, gradient.float()) and parameters[0].grad is None
    assert master.grad is None and master.untyped_storage().nbytes() == 4
    with pytest.raises(KeyError, match="boom"), masters.gathered():
        raise KeyError("boom")
    assert master.untyped_storage().nbytes() == 4
    with masters.gathered():
        assert torch.equal(master, parameters[0].float()) and master.grad is None


def test_no_storage_is_resized(monkeypatch):
    """Apple's devices cannot."""

    def refuse(*_):
        raise RuntimeError("UntypedStorage.resize_: got unexpected device type mps")

    monkeypatch.setattr(torch.UntypedStorage, "resize_", refuse)
    masters = Masters([torch.ones(3).bfloat16()])
    with masters.gathered():
        assert torch.equal(masters.tensors[0], torch.ones(3))


def test_gradients_of_many_backward_passes_are_summed_in_float32():
    """In bfloat16 a sum of equal terms ends at 256 of them."""
    parameter = torch.ones(3, dtype=torch.bfloat16, requires_grad=True)
    masters = Masters([parameter])
    for _ in range(1000):
        masters.collect()
        (0.01 * parameter).sum().backward()
    with masters.gathered():
        assert parameter.grad is None
        assert torch.allclose(masters.tensors[0].grad, torch.tensor(10.0), rtol=0.002)


def test_tensors_are_rounded_in_their_order_by_one_generator():
    parameters = [torch.zeros(3, 5).bfloat16(), torch.zeros(2).bfloat16(), torch.zeros(4)]
    masters = Masters(parameters)
    wanted = [torch.randn(tensor.shape, generator=draws(7)) for tensor in parameters]
    with masters.gathered():
        for master, value in zip(masters.tensors, wanted, strict=True):
            master.copy_(value)
        masters.write_back(lambda: draws(3))
    generator = draws(3)
    assert torch.equal(parameters[0], rounded_at_random(wanted[0], generator))
    assert torch.equal(parameters[1], rounded_at_random(wanted[1], generator))
    assert torch.equal(parameters[2], wanted[2])
