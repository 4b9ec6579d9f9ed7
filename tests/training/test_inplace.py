"""Code that writes in place, run as if it did not: same values, same inputs, gradients of the same function."""

import pytest
import torch

from lora_loom.training.inplace import OutOfPlace, latest


def assignments(x, y):
    x += y
    x *= 2
    return x.sin()


def methods(x, y):
    x.addcmul_(y, x).mul_(y)
    return x


def options(x, y):
    h = x * y
    torch.nn.functional.silu(h, inplace=True)
    return h * x


def nothing(x, y):
    """Gives back the tensor itself."""
    h = x * y
    torch.nn.functional.dropout(h, 0.0, inplace=True)
    return h.mul_(x)


def target(x, y):
    h = x.tanh()
    torch.add(h, y, out=x)
    return x * h


def items(x, y):
    x[1:] = y[1:]
    return x * y


def parts(x, y):
    """As newer hosts turn queries and keys."""
    turned = x * y
    half = x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], y[..., :half])
    turned[..., half:].addcmul_(x[..., :half], y[..., half:])
    return turned


def parts_of_strided(x, y):
    return parts(x.mT.contiguous().mT, y)


def parts_seen_from_the_whole(x, y):
    """A part taken before the whole is written sees it, and the other way round; twice over."""
    h = x + 1
    first, rest = h[:1], h[1:]
    h.mul_(y)
    first += 3
    rest.mul_(y[1:]).add_(1)
    return first.sum() * h + rest.sum()


def parts_of_inputs(x, y):
    a, b = x.chunk(2, -1)
    a += b
    b.mul_(a)
    return x.exp() + torch.cat([a, b], -1) * y


PROGRAMS = (
    assignments,
    methods,
    options,
    nothing,
    target,
    items,
    parts,
    parts_of_strided,
    parts_seen_from_the_whole,
    parts_of_inputs,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_values_inputs_and_gradients(program):
    inputs = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = program(*inputs.clone())

    def run(x, y):
        with OutOfPlace() as mode:
            result = mode.outcome(program(x, y))
        assert mode.seen
        return result

    x, y = (tensor.clone().requires_grad_(True) for tensor in inputs)
    assert torch.equal(run(x, y), wanted)
    assert torch.equal(torch.stack([x, y]), inputs)
    assert torch.autograd.gradcheck(run, (x, y))


class Product(torch.autograd.Function):
    """As layers do it: the result is a view of what was computed; no function mode sees it."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return (x * y).view(x.shape)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y, grad * x


def test_views_that_custom_functions_return():
    """The last write has to be in the result, and each product has to be of the latest values."""

    def product(x, y):
        return Product.apply(latest(x), latest(y))

    def program(x, y):
        h = product(x, y)
        h.addcmul_(product(h, y), x)
        h += product(h, x)
        h.addcmul_(product(h * 2, y), y)
        return h

    inputs = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        wanted = program(*inputs.clone())

    def run(x, y):
        with OutOfPlace() as mode:
            return mode.outcome(program(x, y))

    x, y = (tensor.clone().requires_grad_(True) for tensor in inputs)
    assert torch.equal(run(x, y), wanted)
    assert torch.autograd.gradcheck(run, (x, y))


def test_a_part_of_such_a_view_is_refused():
    """The whole has no history, and the other part would lose its own."""
    x, y = torch.randn(2, 3, 6, dtype=torch.float64).requires_grad_()
    h = Product.apply(x, y)
    with OutOfPlace(), pytest.raises(RuntimeError, match="a part of what a custom function gave"):
        h[:1].mul_(2)


def test_other_types_of_parts_are_refused():
    z = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    with OutOfPlace(), pytest.raises(RuntimeError, match="float64 view of a torch.complex128"):
        torch.view_as_real(z * 2).mul_(2)
