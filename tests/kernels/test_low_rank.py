"""Matrices kept as two factors: against dense SVDs in float64, and every family's ΔW in that form."""

import math

import pytest
import torch

from cases import CASES, build, randomised
from lora_loom.kernels.adapter import wide
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.low_rank import (
    Cut,
    LowRank,
    as_lora,
    beside,
    changes_bias_only,
    factors_of,
    spectrum,
    truncated,
)
from lora_loom.kernels.tools.budget import decomposed
from merging import Largest

SHAPES = [  # rows, columns, ranks
    *((37, 23, 5), (23, 37, 5), (64, 9, 3), (50, 50, 1), (61, 47, 46)),  # fewer ranks than rows and columns
    *((9, 11, 30), (5, 5, 5), (31, 7, 20), (7, 120, 7)),  # as many or more
    *((1, 13, 4), (13, 1, 4), (1, 1, 3), (1, 9, 1)),  # one row, one column
]


def drawn(rows, columns, rank, seed=0, dtype=torch.float32):
    draws = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(size, generator=draws, dtype=dtype) for size in ((rows, rank), (rank, columns)))
    return LowRank(up * torch.logspace(0, -2, rank, dtype=dtype), down)


def exactly(matrix):
    return matrix.up.double() @ matrix.down.double() if isinstance(matrix, LowRank) else matrix.double()


@pytest.mark.parametrize("rows, columns, rank", SHAPES)
@pytest.mark.parametrize("form", ["factors", "factors in float64", "dense"])
def test_truncation_is_the_best_there_is(rows, columns, rank, form):
    matrix = drawn(rows, columns, rank, seed=rows, dtype=torch.float64 if "64" in form else torch.float32)
    given = matrix.dense() if form == "dense" else matrix
    wanted = exactly(given)
    u, values, v = torch.linalg.svd(wanted, full_matrices=False)
    true_rank = min(rows, columns, rank)
    for kept in {1, (true_rank + 1) // 2, true_rank}:
        found, singular = truncated(given, Cut(rank=kept))
        assert found.rank == kept and found.up.dtype == matrix.up.dtype
        best = values[kept:].norm()
        size = values.norm()
        assert (exactly(found) - wanted).norm() <= best + 1e-6 * size
        layer = decomposed("layer", (rows, columns), given, Cut(rank=kept), exact=True)
        assert abs(layer.error - best) <= 1e-6 * size and layer.norm == pytest.approx(float(size), rel=1e-6)
        assert torch.allclose(singular[:kept].double(), values[:kept], rtol=1e-6, atol=1e-6 * float(values[0]))
        clear = kept == true_rank or values[kept - 1] > 1.01 * values[kept]  # else there are several best ones
        if clear:
            assert (exactly(found) - (u[:, :kept] * values[:kept]) @ v[:kept]).norm() <= 1e-4 * size


def test_factors_are_balanced():
    found, values = truncated(drawn(20, 30, 6, dtype=torch.float64), Cut(rank=4))
    wanted = torch.diag(values[:4])
    assert torch.allclose(found.up.T @ found.up, wanted) and torch.allclose(found.down @ found.down.T, wanted)


@pytest.mark.parametrize("rows, columns, rank", SHAPES)
def test_spectrum_and_norm_are_those_of_the_product(rows, columns, rank):
    matrix = drawn(rows, columns, rank, seed=columns)
    wanted = torch.linalg.svdvals(exactly(matrix))
    for found in (spectrum(matrix), spectrum(matrix.dense())):
        assert torch.allclose(found.double(), wanted[: len(found)], rtol=1e-4, atol=1e-5 * float(wanted[0]))
        assert wanted[len(found) :].norm() <= 1e-12 * wanted[0]
    assert matrix.norm() == pytest.approx(float(exactly(matrix).norm()), rel=1e-9)
    assert matrix.scaled(-0.3).norm() == pytest.approx(0.3 * matrix.norm(), rel=1e-6)


@pytest.mark.parametrize("rank", [4, 60])
def test_ranks_that_hold_nothing_are_not_kept(rank):
    thin = drawn(40, 30, 3, dtype=torch.float64)
    draws = torch.Generator().manual_seed(5)
    mixing = torch.randn(3, rank, generator=draws, dtype=torch.float64)
    deficient = LowRank(thin.up @ mixing, torch.linalg.pinv(mixing) @ thin.down)
    found, _ = truncated(deficient, Cut(rank=rank))
    assert found.rank == 3
    assert torch.allclose(found.dense(), exactly(thin), atol=1e-9)


@pytest.mark.parametrize(
    "nothing",
    [LowRank(torch.zeros(5, 2), torch.ones(2, 7)), LowRank(torch.zeros(5, 0), torch.zeros(0, 7)), torch.zeros(5, 7)],
)
def test_a_zero_matrix_has_rank_zero(nothing):
    for exact in (True, False):
        found, values = truncated(nothing, Cut(rank=3), exact)
        assert found.rank == 0 and found.shape == (5, 7) and not found.dense().any()
        layer = decomposed("layer", (5, 7), nothing, Cut(rank=3), exact)
        assert layer.norm == layer.error == 0
    assert not spectrum(nothing).any()


def test_the_sum_of_factors_is_the_sum():
    parts = [drawn(11, 8, rank, seed=rank) for rank in (1, 4, 9)]
    total = beside(parts)
    assert total.rank == 14
    assert torch.allclose(exactly(total), sum(exactly(part) for part in parts), rtol=0, atol=1e-13)
    with pytest.raises(ValueError, match=r"\(8, 11\)"):
        beside([parts[0], drawn(8, 11, 2)])


def test_half_precision_is_widened_and_nothing_else():
    up, down = torch.randn(6, 2).half(), torch.randn(2, 5).bfloat16()
    matrix = LowRank(up, down)
    assert matrix.up.dtype == matrix.down.dtype == torch.float32
    assert torch.equal(matrix.up, up.float()) and torch.equal(matrix.down, down.float())
    assert LowRank(up.double(), down).down.dtype == torch.float64
    eight = up.to(torch.float8_e4m3fn)
    assert torch.equal(LowRank(eight, down).up, eight.float()) and torch.equal(wide(eight), eight.float())
    with pytest.raises(ValueError, match=r"\(6, 2\) and \(3, 5\)"):
        LowRank(up, torch.zeros(3, 5))


def test_nothing_dense_is_made_of_factors():
    matrix = drawn(900, 700, 8)
    with Largest() as largest:
        truncated(matrix, Cut(rank=4))
        spectrum(matrix)
        matrix.norm()
        beside([matrix, matrix.scaled(0.5)])
    assert largest.numbers <= 900 * 16


def test_random_products_find_the_same_and_the_error_is_measured():
    draws = torch.Generator().manual_seed(1)
    matrix = drawn(400, 300, 6, dtype=torch.float64).dense()
    matrix += 1e-3 * matrix.norm() / 300 * torch.randn(matrix.shape, generator=draws, dtype=torch.float64)
    found, values = truncated(matrix, Cut(rank=6), exact=False)
    best, every = truncated(matrix, Cut(rank=6))
    assert len(values) < 100 and len(every) == 300
    assert torch.allclose(found.dense(), best.dense(), atol=1e-5 * float(every[0]))
    layer = decomposed("layer", matrix.shape, matrix, Cut(rank=6))
    assert layer.error == pytest.approx(float((matrix - found.dense()).norm()), rel=1e-6)


def test_of_factors_that_are_larger_than_their_matrix_the_error_is_measured_too():
    """Random products find some of the singular values; the others are part of the error."""
    matrix = drawn(420, 330, 340, seed=3)
    layer = decomposed("layer", matrix.shape, matrix, Cut(rank=4))
    wanted = exactly(matrix)
    assert len(truncated(matrix, Cut(rank=4), exact=False)[1]) < 330
    assert layer.error == pytest.approx(float((wanted - exactly(layer.factors)).norm()), rel=1e-5)
    assert layer.norm == pytest.approx(float(wanted.norm()), rel=1e-6) and layer.before == 340


VALUES = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize(
    "cut, wanted",
    [
        (Cut(rank=3), 3),
        (Cut(rank=9), 5),  # the last holds nothing
        (Cut(energy=64 / 85.25), 1),
        (Cut(energy=80.1 / 85.25), 3),
        (Cut(energy=1.0), 5),
        (Cut(ratio=1), 1),
        (Cut(ratio=4), 3),
        (Cut(ratio=4.1), 3),
        (Cut(ratio=1e9), 5),
        (Cut(cumulative=8 / 15.5), 1),
        (Cut(cumulative=0.9), 3),
        (Cut(cumulative=0.91), 4),
        (Cut(cumulative=1.0), 5),
        (Cut(rank=4, energy=0.5, ratio=100), 1),
        (Cut(rank=2, energy=0.999, ratio=100, cumulative=0.999), 2),
    ],
)
def test_how_many_stay(cut, wanted):
    assert cut.of(VALUES) == wanted
    assert cut.of(VALUES * 1e-20) == wanted  # sizes are relative
    assert cut.of(torch.zeros(4)) == 0 and cut.of(torch.zeros(0)) == 0


def test_energy_is_retained_energy():
    matrix = drawn(40, 30, 20, seed=3)
    for energy in (0.5, 0.9, 0.99, 0.9999):
        layer = decomposed("layer", matrix.shape, matrix, Cut(energy=energy))
        fewer = layer.outcome(layer.factors.rank - 1).energy
        assert fewer < energy <= layer.outcome(layer.factors.rank).energy + 1e-12
    first = spectrum(matrix)[:4]
    assert Cut(energy=0.9999).of(first, matrix.norm()) == 4  # more would be needed than are known


@pytest.mark.parametrize(
    "options, says",
    [
        ({}, "needs a rank"),
        ({"rank": 0}, "rank is 0"),
        ({"energy": 0.0}, "energy is 0.0"),
        ({"energy": 1.5}, "energy is 1.5"),
        ({"energy": math.nan}, "energy is nan"),
        ({"ratio": 0.5}, "ratio is 0.5"),
        ({"ratio": math.inf}, "ratio is inf"),
        ({"cumulative": 2.0}, "cumulative is 2.0"),
    ],
)
def test_cuts_that_mean_nothing_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Cut(**options)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_none_are_refused(bad):
    up, down = torch.randn(300, 3), torch.randn(3, 250)
    for exact in (True, False):
        dense = up @ down
        dense[17, 4] = bad
        with pytest.raises(ValueError, match="not finite"):
            truncated(dense, Cut(rank=1), exact)
    down[1, 7] = bad
    with pytest.raises(ValueError, match="not finite"):
        truncated(LowRank(up, down), Cut(rank=1))


CLOSED = {"LoRA", "DyLoRA", "LoRA-FA", "VeRA"}  # always of low rank; LoHa and LoKr where it is lower than the matrix's


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_are_those_of_every_familys_difference(case):
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    found = factors_of(adapter)
    weight = module.weight.detach()
    wanted = adapter.difference(weight).flatten(1)
    sometimes = case.family in ("LoHa", "LoKr") and not case.options.dora
    if found is None:
        assert case.options.dora or case.family not in CLOSED
        if sometimes:
            assert case.family == "LoKr" or case.options.rank**2 >= min(wanted.shape)
        return
    assert sometimes or case.family in CLOSED
    assert found.shape == wanted.shape and found.up.dtype == torch.float64
    assert torch.allclose(found.dense(), wanted, rtol=1e-9, atol=1e-12)
    if sometimes:
        assert found.rank < min(wanted.shape)


def test_loha_and_lokr_do_have_such_factors():
    found = {case.family for case in CASES if factors_of(build(case)[1]) is not None}
    assert found == CLOSED | {"LoHa", "LoKr"}


def test_parts_of_fused_layers_and_sums():
    draws = torch.Generator().manual_seed(2)

    def made(rows):
        down, up = torch.randn(2, 5, generator=draws), torch.randn(rows, 2, generator=draws)
        return LoRA(down, up, alpha=3)

    weight = torch.zeros(12, 5)
    parts = [Sliced(made(4), 8, 4, (12, 5)), Swapped(made(12)), made(12), Sliced(Swapped(made(6)), 1, 6, (12, 5))]
    for adapter in (*parts, Sum(parts), Sum([*parts, Full({"diff_b": torch.ones(12)}, (12, 5))])):
        assert torch.allclose(factors_of(adapter).dense(), adapter.difference(weight), atol=1e-6)
    assert factors_of(Sum([made(12), Full({"diff": torch.ones(12, 5)}, (12, 5))])) is None
    assert factors_of(Sliced(made(4), 8, 4)) is None  # of how many rows, nobody knows


def test_adapters_of_biases_alone():
    bias = Full({"diff_b": torch.ones(6)}, (6, 2, 3))
    for adapter in (bias, Sum([bias, bias]), Sliced(Full({"diff_b": torch.ones(2)}, (2, 2, 3)), 1, 2, (6, 2, 3))):
        assert changes_bias_only(adapter)
        assert factors_of(adapter).rank == 0 and factors_of(adapter).shape == (6, 6)
    assert factors_of(Full({"diff_b": torch.ones(6)}, None)) is None
    lora = LoRA(torch.ones(1, 4), torch.ones(6, 1), 1)
    assert not changes_bias_only(Sum([bias, lora])) and not changes_bias_only(Full({"diff": torch.ones(6, 4)}, (6, 4)))


@pytest.mark.parametrize("shape", [(7, 5), (6, 4, 3), (4, 3, 3, 2), (3, 2, 1, 2, 3), (1, 1)])
def test_back_to_a_lora(shape):
    matrix = drawn(shape[0], math.prod(shape[1:]), 2)
    lora = as_lora(matrix, shape)
    assert lora.shape == shape and lora.alpha == lora.rank == 2 and lora.scale == 1
    assert torch.equal(lora.delta(), matrix.dense().view(shape))
    assert torch.equal(factors_of(lora).dense(), matrix.dense())
    with pytest.raises(ValueError, match="rank 0"):
        as_lora(LowRank(torch.zeros(shape[0], 0), torch.zeros(0, math.prod(shape[1:]))), shape)
