"""Extraction: what is found again, what is left out, sizes for whole files, one layer in memory at a time."""

import gc
import itertools
import math
import zlib

import pytest
import torch

from adapter_files import CONV, KEY, PREFIX, unet
from lora_loom.kernels import names, reading, writing
from lora_loom.kernels.adapter import Options, wide
from lora_loom.kernels.compose import Sum
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.low_rank import Cut, LowRank
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.tools.budget import Budget, Layer, ranks
from lora_loom.kernels.tools.deltas import is_table
from lora_loom.kernels.tools.extract import Change, extract

SHAPES = {"linear": (30, 22), "tall": (41, 7), "conv": (12, 6, 3, 3)}
SHAPES |= {"conv1x1": (14, 9, 1, 1), "conv3d": (8, 5, 1, 3, 2)}


@pytest.fixture
def draws(request):
    """Other numbers for every test, the same every time."""
    return torch.Generator().manual_seed(zlib.crc32(request.node.name.encode()))


def normal(draws, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)


def tuned(family, shape, draws, **options):
    """(weight, the same with a random adapter of a usual size merged into it)."""
    weight = normal(draws, *shape) / math.sqrt(math.prod(shape[1:]))
    adapter = make_adapter(family, shape, Options(rank=2, alpha=2.0, **options), draws, weight)
    adapter = adapter.with_tensors({k: t + 0.1 * normal(draws, *t.shape) for k, t in adapter.tensors.items()})
    return weight, adapter.merged(weight)


def only(outcome):
    """The one adapter of a result."""
    (adapter,) = outcome.file.adapters.values()
    return adapter


def error_of(outcome, wanted):
    """Relative, of the ΔW in the file."""
    delta = only(outcome).difference(torch.zeros(wanted.shape, dtype=torch.float64))
    return ((delta - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(
    "family, options", [("LoRA", {}), ("LoHa", {}), ("LoKr", {"factor": 1}), ("LoRA", {"dora": "output"})]
)
def test_what_was_merged_is_found_again(family, options, shape, draws):
    weight, merged = tuned(family, shape, draws, **options)
    outcome = extract([Change("layer", weight, merged)], Cut(energy=1 - 5e-7))
    wanted = merged.double() - weight.double()
    assert error_of(outcome, wanted) < 1e-3
    assert isinstance(only(outcome), LoRA)
    (layer,) = outcome.layers
    assert layer.norm == pytest.approx(wanted.norm().item(), rel=1e-6)
    assert layer.before is None
    if family == "LoRA" and not options:
        assert layer.rank == 2
        assert error_of(outcome, wanted) < 1e-5


@pytest.mark.parametrize("exact", [True, False])
def test_no_lora_of_that_rank_is_nearer_than_the_one_found(exact, draws):
    for shape, rank in (((33, 21), 5), ((9, 40), 3), ((6, 3, 3, 3), 4), ((400, 300), 8)):
        before, after = normal(draws, *shape), normal(draws, *shape)
        outcome = extract([Change("layer", before, after)], Cut(rank=rank), exact=exact)
        wanted = after.double() - before.double()
        values = torch.linalg.svdvals(wanted.flatten(1))
        best = values[rank:].norm() / values.norm()
        assert error_of(outcome, wanted) == pytest.approx(best.item(), rel=1e-4)
        assert outcome.layers[0].error == pytest.approx((best * values.norm()).item(), rel=1e-4)
        assert outcome.energy == pytest.approx(1 - best.item() ** 2, abs=1e-4)


def layer(path, shape, values):
    """Known to the budget by its shape and its singular values."""
    values = torch.tensor(values, dtype=torch.float64)
    factors = LowRank(torch.zeros(shape[0], len(values)), torch.zeros(len(values), shape[1]))
    return Layer(path, shape, factors, values, values.norm().item(), 0.0)


def best_shares(layers, numbers):
    """(energy, ranks) by trying all."""
    choices = itertools.product(*(range(len(one.values) + 1) for one in layers))
    fitting = (kept for kept in choices if spent(layers, kept) <= numbers)
    return max((retained(layers, kept), kept) for kept in fitting)


def spent(layers, kept):
    return sum(count * sum(one.shape) for one, count in zip(layers, kept, strict=True))


def retained(layers, kept):
    return sum(one.values[:count].square().sum().item() for one, count in zip(layers, kept, strict=True))


def test_a_budget_is_shared_out_as_well_as_can_be(draws):
    for trial in range(30):
        same = trial % 2
        shapes = [(5, 4)] * 3 if same else [(5, 4), (9, 2), (3, 3)]
        spectra = [sorted(normal(draws, 3).abs().tolist(), reverse=True) for _ in shapes]
        layers = [layer(str(n), shape, values) for n, (shape, values) in enumerate(zip(shapes, spectra, strict=True))]
        for numbers in range(0, 70, 7):
            kept = ranks(layers, numbers)
            assert spent(layers, kept) <= numbers
            energy = retained(layers, kept)
            if same:
                assert energy == pytest.approx(best_shares(layers, numbers)[0])
                continue
            # the best that anything of the size reached could do, if nothing was filled up behind a gap
            one_more = max([one.values[k].item() ** 2 for one, k in zip(layers, kept, strict=True) if k < 3], default=0)
            assert energy >= best_shares(layers, numbers)[0] - one_more - 1e-9
    # in the order of their worth every size on the way is the best for itself
    worth = sorted(
        ((s * s / sum(one.shape), n) for n, one in enumerate(layers) for s in one.values.tolist()), reverse=True
    )
    on_the_way = [0, 0, 0]
    for _, n in worth:
        on_the_way[n] += 1
        assert retained(layers, on_the_way) == pytest.approx(best_shares(layers, spent(layers, on_the_way))[0])


def several(draws, dtype=torch.float32, strengths=(3.0, 1.0, 0.2, 0.05)):
    """Layers whose differences are more or less strong, of rank 24 at most."""
    found = []
    for n, strength in enumerate(strengths):
        rows, columns = (90, 70) if n % 2 else (60, 80)
        delta = strength * normal(draws, rows, 24) @ torch.diag(0.8 ** torch.arange(24.0)) @ normal(draws, 24, columns)
        weight = normal(draws, rows, columns)
        found.append(Change(f"layers.{n}", weight.to(dtype), (weight + delta).to(dtype)))
    return found


def size_of(outcome):
    """How many numbers its tensors have."""
    return sum(tensor.numel() for adapter in outcome.file.adapters.values() for tensor in adapter.tensors.values())


def test_a_budget_of_an_average_rank_keeps_more_than_that_rank_everywhere(draws):
    changes = several(draws)
    even = extract(changes, Cut(rank=6))
    shared = extract(changes, Budget(average_rank=6))
    assert size_of(shared) <= size_of(even)
    assert 1 - shared.energy < 0.5 * (1 - even.energy)
    kept = {outcome.path: outcome.rank for outcome in shared.layers}
    assert kept["layers.0"] > kept["layers.1"] > kept["layers.2"] >= kept["layers.3"]
    for change, outcome in zip(changes, shared.layers, strict=True):
        wanted = change.after.double() - change.before.double()
        adapter = shared.file.adapters.get(change.path)
        delta = torch.zeros_like(wanted) if adapter is None else adapter.difference(wanted)
        assert outcome.error == pytest.approx((delta - wanted).norm().item(), rel=1e-4)
    left_out = [path for path, rank in kept.items() if not rank]
    assert left_out == [change.path for change in changes if change.path not in shared.file.adapters] != []
    assert any("no rank" in note for note in shared.notes)
    assert "1 left out" in shared.lines()[0]


def test_no_layer_gets_more_than_four_times_the_average_rank(draws):
    outcome = extract(several(draws, strengths=(100.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3)), Budget(average_rank=2))
    assert max(layer.rank for layer in outcome.layers) == 8
    assert any("rank 8, the greatest" in note for note in outcome.notes)


@pytest.mark.parametrize("dialect", ["native", "kohya"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_budget_of_bytes_is_what_the_file_takes(itemsize, dialect, draws, tmp_path):
    paths = [path for path in unet() if "attn1" in path][:6]
    table = names.NameTable({path: (300, 200) for path in paths} | {PREFIX + "time_embed.0": (64, 8)})
    changes = [Change(path, normal(draws, 300, 200), normal(draws, 300, 200)) for path in paths]
    vector = normal(draws, 64)
    changes += [Change(PREFIX + "time_embed.0", *[normal(draws, 64, 8)] * 2, (torch.zeros(64), vector))]
    wanted = 120_000
    outcome = extract(changes, Budget(bytes=wanted, itemsize=itemsize), names=table)
    file = outcome.file
    dtype = {2: torch.float16, 4: torch.float32}[itemsize]
    file.adapters.update({path: adapter.to(dtype=dtype) for path, adapter in file.adapters.items()})
    size = writing.write_lora(file, tmp_path / "it.safetensors", dialect).stat().st_size
    assert 0.95 * wanted < size < wanted + 1000  # the metadata: three hashes and the dialect
    with pytest.raises(ValueError, match=r"bytes is 3000, too few for 7 layers; expected at least (\d+)") as error:
        extract(changes, Budget(bytes=3000, itemsize=itemsize), names=table)
    least = int(str(error.value).split()[-1])
    assert extract(changes, Budget(bytes=least, itemsize=itemsize), names=table).layers


def test_one_layer_is_in_memory_at_a_time(request):
    shape, dense = (256, 200), []

    def source(seed):
        def read():
            alive = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.numel() == math.prod(shape)]
            dense.append(len(alive))
            return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

        return read

    changes = [Change(f"layers.{n}", source(n), source(n + 100)) for n in range(4)]
    gc.freeze()  # what other tests have left is not looked through
    request.addfinalizer(gc.unfreeze)
    for cut, passes in ((Cut(rank=3), 1), (Budget(average_rank=3), 1), (Budget(bytes=20_000), 2)):
        dense.clear()
        outcome = extract(changes, cut)
        assert dense == [0, 1] * 4 * passes  # when a layer's second weight is read, its first is all there is
        kept = [t.untyped_storage().nbytes() for a in outcome.file.adapters.values() for t in a.tensors.values()]
        assert sum(kept) < 4 * 4 * 12 * sum(shape)


def test_biases_norms_and_tables_are_differences_and_the_file_gives_the_tuned_model(draws, tmp_path):
    norm, table_path = "input_blocks.1.1.norm", "clip_l.transformer.text_model.embeddings.token_embedding"
    shapes = {PREFIX + KEY: (16, 12), PREFIX + CONV: (8, 6, 3, 3), PREFIX + norm: (10,), table_path: (20, 6)}
    shapes |= {PREFIX + "out.2": (6, 4)}
    table = names.NameTable(unet() | shapes)
    weights = {path: (normal(draws, *shape), normal(draws, *shape)) for path, shape in shapes.items()}
    biases = {path: (normal(draws, shape[0]), normal(draws, shape[0])) for path, shape in shapes.items()}
    biases[PREFIX + KEY] = (biases[PREFIX + KEY][0],) * 2
    weights[PREFIX + "out.2"] = (weights[PREFIX + "out.2"][0],) * 2
    del biases[table_path]
    changes = [Change(path, *weights[path], biases.get(path)) for path in shapes]
    outcome = extract(changes, Cut(energy=1.0), names=table, metadata={"modelspec.title": "it"})
    file = outcome.file
    assert list(file.adapters) == list(shapes)
    assert isinstance(file.adapters[PREFIX + KEY], LoRA)
    assert isinstance(file.adapters[PREFIX + CONV], Sum)
    assert isinstance(file.adapters[PREFIX + norm], Full)
    assert isinstance(file.adapters[table_path], Full)
    assert {layer.path: layer.rank for layer in outcome.layers} == {
        **{PREFIX + KEY: 12, PREFIX + CONV: 8, table_path: 0}
    }
    assert any(note.startswith("1 of 5 layers: changed in the bias only") for note in outcome.notes)
    assert any("norms" in note for note in outcome.notes)
    assert any("tables" in note for note in outcome.notes)
    written = writing.write_lora(file, tmp_path / "it.safetensors")
    again = reading.read_lora(written, table)
    assert not again.unplaced
    assert again.metadata["modelspec.title"] == "it"
    for path, (before, after) in weights.items():
        adapter = again.adapters[path]
        torch.testing.assert_close(adapter.merged(before), after, atol=1e-5, rtol=1e-5)
        if path in biases:
            torch.testing.assert_close(adapter.merged_bias(biases[path][0]), biases[path][1])


def test_tables_are_known_by_the_caller_or_by_name(draws):
    before, after = normal(draws, 20, 9), normal(draws, 20, 9)
    for path, told, whole in (
        ("t5xxl.transformer.shared", None, True),
        ("text_model.embeddings.position_embedding", None, True),
        ("time_embed.0", None, False),
        ("context_embedder", None, False),
        ("lora_te1_text_model_embeddings_token_embedding", None, True),
        ("lora_te3_encoder_embed_tokens", None, True),
        ("lora_te3_shared", None, True),
        ("lora_unet_pos_embed_proj", None, False),
        ("pos_embed.proj", None, False),
        ("lora_unet_time_embed_0", None, False),
        ("time_embed.0", True, True),
        ("t5xxl.transformer.shared", False, False),
    ):
        adapter = only(extract([Change(path, before, after, table=told)], Cut(rank=2)))
        assert isinstance(adapter, Full) is whole, path
        assert is_table(path) is (whole if told is None else not told)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_is_no_difference(dtype, draws):
    exact = normal(draws, 24, 18, dtype=torch.float64)
    stored, finer = exact.to(dtype), exact.to(torch.float64 if dtype == torch.float32 else torch.float32)
    other = finer.clone()
    other[5, 7] += 3 * torch.finfo(dtype).eps * (1 + other[5, 7].abs())
    changes = [
        Change("rounded", stored, finer),
        Change("other", stored, other),
        Change("equal", stored, stored.clone()),
        Change("vector", stored[0], finer[0]),
        Change("bias", stored, stored, (stored[1], finer[1])),
    ]
    outcome = extract(changes, Cut(energy=1.0))
    assert list(outcome.file.adapters) == ["other"]
    assert "2 of 5 layers: the same in both models, left out" in outcome.notes
    assert "2 of 5 layers: different by rounding alone, left out" in outcome.notes


def test_half_precision_leaves_its_own_rounding_in_the_result(draws):
    """What is lost is what the weights were rounded to: a LoRA of 1 % of W is found to 1e-3 in float32, and to about
    bfloat16's rounding noise in bfloat16, of which the cut to its rank takes most away."""
    weight = normal(draws, 300, 200)
    delta = normal(draws, 300, 4) @ normal(draws, 4, 200)
    delta *= 0.01 * weight.norm() / delta.norm()
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        # the base is stored in this precision, the tuned model was rounded to it afterwards
        base = weight.to(dtype)
        outcome = extract([Change("layer", base, (wide(base) + delta).to(dtype))], Cut(rank=4))
        found[dtype] = error_of(outcome, delta.double())
        noise = ((wide((wide(base) + delta).to(dtype)) - wide(base) - delta).norm() / delta.norm()).item()
        assert found[dtype] < max(0.4 * noise, 1e-5)
    assert found[torch.float32] < 1e-3
    assert 1e-3 < found[torch.float16] < 1e-2
    assert 1e-2 < found[torch.bfloat16] < 8e-2


def test_numbers_are_limited_as_kohya_limits_them_only_when_asked(draws):
    shape, rank, quantile = (26, 7, 3, 3), 5, 0.99
    before, after = normal(draws, *shape), normal(draws, *shape)
    u, s, vh = torch.linalg.svd((after - before).flatten(1).double(), full_matrices=False)
    u, vh = u[:, :rank] * s[:rank], vh[:rank]  # sd-scripts' extract_lora_from_models.py
    limit = torch.quantile(torch.cat([u.flatten(), vh.flatten()]), quantile)
    theirs = u.clamp(-limit, limit) @ vh.clamp(-limit, limit)
    outcome = extract([Change("layer", before, after)], Cut(rank=rank), clamp_quantile=quantile)
    ours = only(outcome).delta().flatten(1).double()
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    wanted = (after.double() - before.double()).flatten(1)
    assert outcome.layers[0].error == pytest.approx((theirs - wanted).norm().item(), rel=1e-4)
    best = extract([Change("layer", before, after)], Cut(rank=rank))
    assert best.layers[0].error < outcome.layers[0].error
    with pytest.raises(ValueError, match="clamp_quantile goes with a rank or an energy, not with a budget"):
        extract([Change("layer", before, after)], Budget(average_rank=1), clamp_quantile=0.99)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="clamp_quantile is"):
            extract([Change("layer", before, after)], Cut(rank=1), clamp_quantile=wrong)


def test_small_changes_are_left_out_when_asked(draws):
    weight, delta = normal(draws, 12, 10), normal(draws, 12, 10)
    delta *= weight.norm() / delta.norm()
    changes = [Change(str(size), weight, weight + size * delta) for size in (1e-3, 1e-2, 1e-1)]
    changes += [Change("from nothing", torch.zeros(4, 3), normal(draws, 4, 3))]
    assert len(extract(changes, Cut(rank=2)).file.adapters) == 4
    outcome = extract(changes, Cut(rank=2), min_change=0.05)
    assert list(outcome.file.adapters) == ["0.1", "from nothing"]
    assert "2 of 4 layers: changed by less than min_change, left out" in outcome.notes
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="min_change is"):
            extract(changes, Cut(rank=2), min_change=wrong)


@pytest.mark.parametrize("cut", [Cut(rank=2), Budget(average_rank=2), Budget(bytes=1000)], ids=str)
def test_where_nothing_differs_the_file_is_empty_and_the_notes_say_why(cut, draws):
    weight = normal(draws, 6, 5)
    outcome = extract([Change("layer", weight, weight.clone())], cut)
    assert not outcome.file.adapters and not outcome.layers
    assert outcome.notes == ("1 of 1 layers: the same in both models, left out",)


def test_models_that_do_not_go_together_are_errors_that_name_the_layer(draws):
    weight = normal(draws, 6, 5)
    with pytest.raises(ValueError, match=r"some\.layer: \(6, 5\) in one model and \(5, 6\) in the other"):
        extract([Change("some.layer", weight, weight.T)], Cut(rank=2))
    with pytest.raises(ValueError, match=r"some\.layer: is there twice"):
        extract([Change("some.layer", weight, -weight)] * 2, Cut(rank=2))
    with pytest.raises(ValueError, match=r"some\.layer \(bias\): holds numbers that are not finite"):
        extract([Change("some.layer", weight, -weight, (weight[0], weight[0] * math.nan))], Cut(rank=2))
    with pytest.raises(ValueError, match=r"some\.layer: is stored as torch.int8"):
        extract([Change("some.layer", weight.to(torch.int8), weight)], Cut(rank=2))


def _into(seen):
    return lambda *step: seen.append(step)


def test_progress_is_told_and_may_stop_everything(draws):
    for cut, passes in ((Cut(rank=2), 1), (Budget(bytes=30_000), 2)):
        seen: list[tuple[int, int]] = []
        extract(several(draws), cut, progress=_into(seen))
        assert {total for _, total in seen} == {4 * passes}
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[0][0] == 0 and seen[-1][0] == 4 * passes

        def stop(done, total):
            if done == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            extract(several(draws), cut, progress=stop)


@pytest.mark.parametrize(
    "options, match",
    [
        ({}, "either an average_rank or bytes"),
        ({"average_rank": 3, "bytes": 5}, "either an average_rank or bytes"),
        ({"average_rank": 0}, "average_rank is 0"),
        ({"average_rank": math.nan}, "average_rank is nan"),
        ({"bytes": 0}, "bytes is 0"),
        ({"bytes": 10, "itemsize": 3}, "itemsize is 3"),
    ],
)
def test_budgets_that_make_no_sense_are_errors(options, match):
    with pytest.raises(ValueError, match=match):
        Budget(**options)
