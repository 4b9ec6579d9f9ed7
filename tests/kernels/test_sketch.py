"""Sketches of large matrices, on spectra of all kinds, against SVDs in float64."""

import math
import zlib

import pytest
import torch

from lora_loom.kernels.low_rank import Cut, LowRank, distance
from lora_loom.kernels.sketch import leading
from lora_loom.kernels.tools.extract import Change, extract


@pytest.fixture
def draws(request):
    """Other numbers for every test, the same every time."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


def normal(draws, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)


SPECTRA = {
    "alike": lambda n: torch.ones(n),
    "falling as 1/i": lambda n: 1 / torch.arange(1, n + 1),
    "falling as 1/√i": lambda n: torch.arange(1, n + 1) ** -0.5,
    "exponential": lambda n: torch.exp(-torch.arange(n) / 20),
    "of rank 12": lambda n: torch.cat([torch.linspace(3, 1, 12), torch.zeros(n - 12)]),
    "of rank 12, and a little": lambda n: torch.cat([torch.linspace(3, 1, 12), torch.full((n - 12,), 0.01)]),
}


def matrix(name, rows, columns, draws):
    """A float32 matrix with a spectrum by name; "random" and "noisy" are those of independent numbers."""
    if name == "random":
        return normal(draws, rows, columns)
    if name == "noisy":
        return matrix("of rank 12", rows, columns, draws) + normal(draws, rows, columns) / math.sqrt(columns)
    values = SPECTRA[name](min(rows, columns)).double()
    u, v = (torch.linalg.qr(normal(draws, size, len(values), dtype=torch.float64))[0] for size in (rows, columns))
    return ((u * values) @ v.T).float()


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("name", [*SPECTRA, "random", "noisy"])
def test_a_sketch_keeps_what_the_best_approximation_keeps(name, rank, draws):
    dense = matrix(name, 420, 330, draws)
    values = torch.linalg.svdvals(dense.double())
    best = values[:rank].square().sum()
    found = leading(dense, Cut(rank=rank).of, rank)
    if found is None:  # the spectrum falls so slowly there that a whole decomposition is quicker
        assert name in ("random", "noisy")
        return
    u, s, v, kept = found
    assert kept == rank or (kept >= 12 and name == "of rank 12")  # what is behind holds rounding
    approximation = LowRank(u * s[:kept].float(), v)
    error = distance(dense, approximation)
    assert values.square().sum() - error**2 > best * (1 - 1e-3)
    optimum = values[rank:].norm().item()
    assert error < optimum * 1.001 + 1e-6 * values.norm().item()
    torch.testing.assert_close(s[:kept], values[:kept], rtol=5e-3, atol=1e-6)


def test_where_a_sketch_would_lose_much_the_whole_is_decomposed(draws):
    dense = normal(draws, 500, 500)
    values = torch.linalg.svdvals(dense.double())
    best = values[:6].square().sum()
    # two turns, as other tools have it, lose a tenth and do not say so
    assert torch.svd_lowrank(dense, q=6, niter=2)[1].double().square().sum() < 0.9 * best
    assert leading(dense, Cut(rank=6).of, 6) is None
    (layer,) = extract([Change("layer", torch.zeros(500, 500), dense)], Cut(rank=6)).layers
    assert layer.energy == pytest.approx((best / values.square().sum()).item(), rel=1e-4)


def test_a_sketch_is_the_same_every_time_and_draws_from_nowhere_else(draws):
    dense = matrix("exponential", 300, 280, draws)
    before = torch.get_rng_state()
    first, again = (leading(dense, Cut(rank=5).of, 5) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first[:3], again[:3], strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_a_sketch_grows_until_the_energy_is_reached(draws):
    dense = matrix("exponential", 640, 600, draws)
    values = torch.linalg.svdvals(dense.double()).square()
    fewest = int((values.cumsum(0) < 0.9 * values.sum()).sum()) + 1
    found = leading(dense, Cut(energy=0.9).of, 3)
    assert found is not None
    assert found[3] == fewest > 3
    assert leading(dense, Cut(energy=0.99999).of, 3) is None  # too many ranks to be worth it
    assert leading(dense[:, :60], Cut(rank=4).of, 4) is None  # too narrow
    assert leading(torch.zeros(500, 400), Cut(rank=4).of, 4) is None
