"""Files with other ranks: compared with dense SVDs in float64, and with what kohya's resize_lora.py computes."""

import math
import zlib

import pytest
import torch

from adapter_files import CONV, KEY, PREFIX, flux, unet
from cases import CASES, build, randomised
from lora_loom.kernels import names, reading, writing
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.control import Replacement
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.tools.budget import Budget
from lora_loom.kernels.tools.resize import resize


@pytest.fixture
def draws(request):
    """Other numbers for every test, the same every time."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


def lora(draws, shape, rank, alpha=None, values=None, dtype=torch.float32):
    """A LoRA of ``shape`` whose ΔW has the given singular values, or falling ones."""
    out, inside = shape[0], math.prod(shape[1:])
    values = 0.7 ** torch.arange(rank, dtype=torch.float64) if values is None else torch.tensor(values).double()
    u, v = (torch.linalg.qr(torch.randn(size, rank, generator=draws, dtype=torch.float64))[0] for size in (out, inside))
    mixing = torch.eye(rank, dtype=torch.float64)  # factors are not orthogonal in files
    mixing += 0.3 * torch.randn(rank, rank, generator=draws, dtype=torch.float64) / math.sqrt(rank)
    alpha = rank if alpha is None else alpha
    up, down = (u * values) @ mixing * (rank / alpha), torch.linalg.inv(mixing) @ v.T
    ones = [1] * (len(shape) - 2)
    return LoRA(down.to(dtype).view(rank, *shape[1:]), up.to(dtype).view(out, rank, *ones), alpha)


def spectrum_of(adapter):
    return torch.linalg.svdvals(adapter.delta().flatten(1).double())


def size_of(outcome):
    """How many numbers its tensors have."""
    return sum(tensor.numel() for adapter in outcome.file.adapters.values() for tensor in adapter.tensors.values())


def relative(delta, wanted):
    return ((delta.double() - wanted.double()).norm() / wanted.double().norm()).item()


SHAPES = {"linear": (23, 31), "tall": (40, 17), "conv": (20, 6, 3, 3), "conv1x1": (18, 21, 1, 1)}


@pytest.mark.parametrize("alpha", [None, 1.0, 37.5])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_smaller_rank_is_the_best_of_that_rank(shape, alpha, draws):
    adapter = lora(draws, shape, 12, alpha)
    outcome = resize(LoRAFile({"layer": adapter}, {"key": "value"}, embeddings={"word": {}}), Cut(rank=5))
    made = outcome.file.adapters["layer"]
    assert isinstance(made, LoRA) and made.rank == made.alpha == 5
    assert made.shape == shape
    u, s, v = torch.linalg.svd(adapter.delta().flatten(1).double(), full_matrices=False)
    assert relative(made.delta().flatten(1), (u[:, :5] * s[:5]) @ v[:5]) < 1e-4
    (layer,) = outcome.layers
    assert (layer.rank, layer.before) == (5, 12)
    assert layer.norm == pytest.approx(s.norm().item(), rel=1e-5)
    assert layer.error == pytest.approx(s[5:].norm().item(), rel=1e-4)
    assert outcome.file.metadata == {"key": "value"}
    assert outcome.file.embeddings == {"word": {}}


def kohya_rank(values, method, parameter):
    """networks/resize_lora.py of sd-scripts: index_sv_… and the "+ 1" in rank_resize."""
    if method == "sv_ratio":
        index = int((values > values[0] / parameter).sum())
    else:
        held = values if method == "sv_cumulative" else values.square()
        target = parameter if method == "sv_cumulative" else parameter**2
        index = int(torch.searchsorted(held.cumsum(0) / held.sum(), target)) + 1
    return max(1, min(index, len(values) - 1)) + 1


def cut_for(method, parameter):
    if method == "sv_fro":
        return Cut(energy=parameter**2)
    return Cut(ratio=parameter) if method == "sv_ratio" else Cut(cumulative=parameter)


def reaches(values, rank, method, parameter):
    """Whether so many ranks are what the method asks for."""
    if method == "sv_ratio":
        return rank == len(values) or values[rank] < values[0] / parameter
    held, wanted = (values, parameter) if method == "sv_cumulative" else (values.square(), parameter**2)
    return held[:rank].sum() >= wanted * held.sum()


@pytest.mark.parametrize(
    "method, parameters", [("sv_ratio", (2.0, 4.3, 9.0)), ("sv_fro", (0.8, 0.95, 0.99)), ("sv_cumulative", (0.5, 0.9))]
)
def test_dynamic_ranks_are_the_fewest_that_reach_the_target_where_kohya_has_one_more(method, parameters, draws):
    for parameter in parameters:
        values = (torch.rand(16, generator=draws) + 0.05).sort(descending=True)[0].tolist()
        adapter = lora(draws, (50, 40), 16, values=values)
        cut = cut_for(method, parameter)
        (layer,) = resize(LoRAFile({"layer": adapter}), cut).layers
        exact = spectrum_of(adapter)[:16]
        if layer.rank < 15:  # behind that theirs has an end
            assert kohya_rank(exact, method, parameter) == layer.rank + 1
        reached = [reaches(exact, rank, method, parameter) for rank in range(1, 17)]
        assert layer.rank == reached.index(True) + 1
        if method == "sv_fro":
            assert layer.energy >= parameter**2


def test_no_rank_is_added_and_what_stays_is_the_same_to_the_last_bit(draws):
    adapters = {
        "plain": lora(draws, (20, 15), 4, 2.0, dtype=torch.float16),
        "sum": Sum([lora(draws, (20, 15), 2), lora(draws, (20, 15), 1), Full({"diff_b": torch.ones(20)}, (20, 15))]),
        "wide": lora(draws, (20, 15), 9),
    }
    outcome = resize(LoRAFile(dict(adapters)), Cut(rank=5))
    assert outcome.file.adapters["plain"] is adapters["plain"]
    assert outcome.file.adapters["sum"] is adapters["sum"]
    assert [layer.rank for layer in outcome.layers] == [4, 3, 5]
    assert any(note.startswith("2 of 3 layers: no more ranks than are asked") for note in outcome.notes)
    assert resize(LoRAFile(dict(adapters)), Cut(rank=200)).energy == 1


def test_ranks_that_hold_nothing_go_without_loss(draws):
    small = lora(draws, (30, 20), 3)
    up = torch.cat([small.up, torch.zeros(30, 5)], 1)
    padded = LoRA(torch.cat([small.down, torch.ones(5, 20)]), up, 8.0)
    outcome = resize(LoRAFile({"layer": padded, "nothing": LoRA(torch.ones(2, 9), torch.zeros(7, 2), 2)}), Cut(rank=6))
    assert outcome.file.adapters.keys() == {"layer"}
    assert outcome.file.adapters["layer"].rank == 3
    assert relative(outcome.file.adapters["layer"].delta(), padded.delta()) < 1e-6
    assert "1 of 2 layers: without any effect, left out" in outcome.notes


def weights_of(module):
    return lambda path: module.weight.detach()


FAMILIES = [case for case in CASES if case.layer in ("linear", "conv2d")]


@pytest.mark.parametrize("case", FAMILIES, ids=map(str, FAMILIES))
def test_every_family_becomes_the_best_lora_of_that_rank(case, draws):
    module, adapter, _ = build(case, seed=int(draws.initial_seed()) % 1000)
    adapter = randomised(adapter, seed=draws.initial_seed() % 1000)
    wanted = adapter.difference(module.weight).detach()
    rank = 3
    file = LoRAFile({"layer": adapter}, names=None)
    outcome = resize(file, Cut(rank=rank), weights_of(module))
    made = outcome.file.adapters["layer"]
    values = torch.linalg.svdvals(wanted.flatten(1))
    error = relative(made.difference(module.weight), wanted)
    assert error == pytest.approx((values[rank:].norm() / values.norm()).item(), abs=1e-6, rel=1e-4)
    assert outcome.layers[0].error == pytest.approx(error * values.norm().item(), abs=1e-6, rel=1e-4)
    bias = adapter.merged_bias(None)
    if bias is not None:
        torch.testing.assert_close(made.merged_bias(None), bias.detach())
    else:
        assert isinstance(made, LoRA)
    full = resize(file, Cut(energy=1.0), weights_of(module)).file.adapters["layer"]
    assert relative(full.difference(module.weight), wanted) < 1e-6


@pytest.mark.parametrize("family", ["OFT", "IA3", "LoRA"])
def test_families_that_depend_on_the_weight_say_which_layer_needs_it(family, draws):
    case = next(c for c in CASES if c.family == family and c.layer == "linear" and (family != "LoRA" or c.options.dora))
    adapter = randomised(build(case)[1])
    with pytest.raises(ValueError, match=r"some\.layer: .*give the model that it was trained on"):
        resize(LoRAFile({"some.layer": adapter}), Cut(rank=2))


def test_layers_of_low_rank_are_never_made_dense(draws):
    """Not even in pieces: a weight of these shapes would take 40 GB."""
    huge, falling = (100_000, 100_000), torch.tensor([8.0, 4.0, 2.0, 1.0])

    def narrow(rows):
        up = torch.randn(rows, 4, generator=draws) * falling
        return LoRA(torch.randn(4, huge[1], generator=draws), up, 4.0)

    half = huge[0] // 2
    adapters = {"rows": Sum([Sliced(narrow(half), half, half, huge)]), "swapped": Swapped(narrow(huge[0]))}
    for cut in (Cut(rank=2), Budget(average_rank=2)):
        outcome = resize(LoRAFile(dict(adapters)), cut)
        assert [adapter.shape for adapter in outcome.file.adapters.values()] == [huge, huge]
        assert sum(layer.rank for layer in outcome.layers) == 4
        assert size_of(outcome) <= 8e5


def test_what_is_no_matrix_is_carried_along(draws):
    table, flat = "text_model.embeddings.token_embedding", "lora_te1_text_model_embeddings_token_embedding"
    adapters = {
        "norm": Full({"w_norm": torch.randn(6), "b_norm": torch.randn(6)}, (6,)),
        "bias": Full({"diff_b": torch.randn(6)}, (6, 4)),
        "scale": Replacement(torch.randn(6)),
        table: Full({"diff": torch.randn(9, 6)}, (9, 6)),
        flat: Full({"diff": torch.randn(9, 6)}, (9, 6)),
        "both": Full({"diff": torch.randn(9, 6), "diff_b": torch.randn(9)}, (9, 6)),
    }
    unplaced = [reading.Unplaced("key", reading.UNKNOWN, "why")]
    outcome = resize(LoRAFile(dict(adapters), unplaced=unplaced), Cut(rank=2))
    made = outcome.file.adapters
    assert list(made) == list(adapters)
    assert all(made[path] is adapters[path] for path in ("norm", "bias", "scale", table, flat))
    assert isinstance(made["both"], Sum)
    torch.testing.assert_close(made["both"].merged_bias(None), adapters["both"].merged_bias(None))
    assert made["both"].parts[0].rank == 2
    assert "5 of 6 layers: biases, norms, tables and replacements, as they were" in outcome.notes
    assert "keys of the file that could not be used, and are not in the result: 1" in outcome.notes
    assert outcome.file.unplaced == []


def test_a_budget_keeps_more_than_the_same_rank_everywhere(draws):
    shapes = {"a": (60, 40), "b": (30, 30), "c": (50, 8, 3, 3), "d": (40, 60)}
    falls = {"a": 0.95, "b": 0.5, "c": 0.3, "d": 0.8}
    file = LoRAFile(
        {path: lora(draws, shape, 16, values=[falls[path] ** n for n in range(16)]) for path, shape in shapes.items()}
    )
    even, shared = resize(file, Cut(rank=4)), resize(file, Budget(average_rank=4))
    assert size_of(shared) <= size_of(even)
    assert 1 - shared.energy < 0.6 * (1 - even.energy)
    kept = {layer.path: layer.rank for layer in shared.layers}
    assert kept["a"] > 4 > kept["c"]
    for layer in shared.layers:
        delta, wanted = shared.file.adapters[layer.path].delta(), file.adapters[layer.path].delta()
        assert (delta - wanted).norm().item() == pytest.approx(layer.error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("dialect", ["native", "kohya"])
def test_a_budget_of_bytes_is_what_the_file_takes(dialect, draws, tmp_path):
    table = names.NameTable(unet() | {PREFIX + KEY: (300, 200), PREFIX + CONV: (120, 40, 3, 3)})
    adapters = {PREFIX + KEY: lora(draws, (300, 200), 64), PREFIX + CONV: lora(draws, (120, 40, 3, 3), 64)}
    adapters[PREFIX + KEY] = Sum([adapters[PREFIX + KEY], Full({"diff_b": torch.randn(300)}, (300, 200))])
    outcome = resize(LoRAFile(adapters, names=table), Budget(bytes=40_000, itemsize=4))
    size = writing.write_lora(outcome.file, tmp_path / "it.safetensors", dialect).stat().st_size
    assert 0.9 * 40_000 < size < 40_000 + 1000
    with pytest.raises(ValueError, match="bytes is 2000, too few for 2 layers; expected at least"):
        resize(LoRAFile(adapters, names=table), Budget(bytes=2000, itemsize=4))


def test_a_resized_file_is_read_again_with_the_same_effect(draws, tmp_path):
    """Of a fused layer whose parts have adapters of their own, in diffusers' names."""
    shapes = flux()
    qkv, mlp = PREFIX + "double_blocks.0.img_attn.qkv", PREFIX + "double_blocks.1.txt_mlp.0"
    table = names.NameTable(shapes)
    parts = [Sliced(lora(draws, (8, 8), 2), n * 8, 8, (24, 8)) for n in range(3)]
    file = LoRAFile({qkv: Sum(parts), mlp: lora(draws, shapes[mlp], 4)}, names=table)
    outcome = resize(file, Cut(rank=3))
    for dialect in ("native", "kohya", "diffusers"):
        again = reading.read_lora(writing.write_lora(outcome.file, tmp_path / f"{dialect}.safetensors", dialect), table)
        assert not again.unplaced
        for path, adapter in outcome.file.adapters.items():
            zeros = torch.zeros(shapes[path])
            torch.testing.assert_close(again.adapters[path].difference(zeros), adapter.difference(zeros))
            wanted = torch.linalg.svdvals(file.adapters[path].difference(zeros).double())
            error = (adapter.difference(zeros) - file.adapters[path].difference(zeros)).norm().item()
            assert error == pytest.approx(wanted[3:].norm().item(), rel=1e-4, abs=1e-5)


def test_eight_bits_are_resized(draws):
    adapter = lora(draws, (20, 15), 4)
    eight = adapter.with_tensors({name: t.to(torch.float8_e4m3fn) for name, t in adapter.tensors.items()})
    made = resize(LoRAFile({"layer": eight}), Cut(rank=2)).file.adapters["layer"]
    wanted = torch.linalg.svdvals(eight.to(dtype=torch.float64).delta())
    assert relative(spectrum_of(made)[:2], wanted[:2]) < 1e-6


def test_parts_of_fused_layers_that_lose_much_in_one_rank_are_told(draws):
    parts = [Sliced(lora(draws, (8, 64), 4), 8 * n, 8, (24, 64)) for n in range(3)]
    file = LoRAFile({"qkv": Sum(parts)}, notes=["read with care"])
    outcome = resize(file, Cut(rank=4))
    assert any("with rank 12 nothing of them is lost" in note for note in outcome.notes)
    assert "read with care" in outcome.notes
    assert not any("nothing of them is lost" in note for note in resize(file, Cut(rank=12)).notes)


def test_numbers_that_are_none_are_an_error_that_names_the_layer(draws):
    broken = lora(draws, (9, 8), 2)
    broken.up[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"^some\.layer: .*finite"):
        resize(LoRAFile({"some.layer": broken}), Cut(rank=1))


def test_progress_is_told_and_may_stop_everything(draws):
    file = LoRAFile({str(n): lora(draws, (9, 8), 3) for n in range(3)})
    seen = []
    resize(file, Cut(rank=1), progress=lambda *step: seen.append(step))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def stop(done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resize(file, Cut(rank=1), progress=stop)
