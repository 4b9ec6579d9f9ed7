"""Files of every family as plain LoRAs, with the error that is stated; files in other precisions."""

import math
import re

import pytest
import torch

from cases import CASES, build, randomised
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.control import Replacement, Widened
from lora_loom.kernels.dora import SCALE
from lora_loom.kernels.full import Full
from lora_loom.kernels.ia3 import PeftIA3
from lora_loom.kernels.lora import DOWN, MID, UP, LoRA
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter, read_adapter
from lora_loom.kernels.safetensors_io import LoraModel
from lora_loom.kernels.tlora import LAMBDA, P, Q
from lora_loom.kernels.tlora import PARTS as TLORA
from lora_loom.kernels.tools.convert import ENERGY, PRECISIONS, in_precision, plain
from lora_loom.kernels.writing import to_tensors

ALL = Cut(energy=1.0)


def file_of(adapter, shape, path="layer"):
    return LoRAFile({path: adapter}, names=NameTable({path: shape}))


def change(adapter, weight):
    """W' − W in float64."""
    return adapter.to(dtype=torch.float64).difference(weight.double())


def is_plain(adapter):
    parts = adapter.parts if isinstance(adapter, Sum) else [adapter]
    return all(
        (isinstance(part, LoRA) and MID not in part.tensors) or (isinstance(part, Full) and not part.factors)
        for part in parts
    )


def converted(adapter, weight, cut=None, needs=True):
    """(the LoRA, its row in the outcome), after what is stated of it was found true."""
    file = file_of(adapter, weight.shape)
    outcome = plain(file, cut, (lambda path: {"layer": weight}[path]) if needs else None)
    (row,) = outcome.layers
    lora, wanted = outcome.file.adapters["layer"], change(adapter, weight)
    assert is_plain(lora)
    error = (change(lora, weight) - wanted).norm().item()
    assert row.path == "layer" and row.norm == pytest.approx(wanted.norm().item(), rel=1e-5)
    assert row.error == pytest.approx(error, rel=1e-3, abs=2e-6 * row.norm), "another error than is stated"
    (again,) = read_lora(to_tensors(outcome.file), {"layer": weight.shape}).adapters.values()
    torch.testing.assert_close(change(again, weight), change(lora, weight), rtol=1e-5, atol=1e-6)
    return lora, row


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_family_on_every_layer(case):
    """With all its singular values nothing is lost, whatever the family."""
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    bias = adapter.merged_bias(torch.zeros(len(module.weight), dtype=torch.float64))
    lora, row = converted(adapter, module.weight, ALL)
    assert row.error <= 1e-5 * row.norm
    torch.testing.assert_close(lora.merged_bias(torch.zeros(len(module.weight), dtype=torch.float64)), bias)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_lost_by_default_is_small_and_stated(case):
    module, adapter, _ = build(case)
    _, row = converted(randomised(adapter, 3), module.weight)
    assert row.energy >= ENERGY - 1e-6


# -- closed forms


def adapter_of(family, shape, seed=0, **options):
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draws)
    fresh = make_adapter(family, shape, Options(**options), draws, weight)
    tensors = {name: t + torch.randn(t.shape, generator=draws) / 4 for name, t in fresh.tensors.items()}
    return fresh.with_tensors(tensors), weight


CLOSED = {
    "LoHa has rank²": ("LoHa", (37, 41), {"rank": 3, "alpha": 2.0}, 9),
    "LoHa of a convolution": ("LoHa", (40, 9, 3, 3), {"rank": 3, "alpha": 1.0}, 9),
    "LoHa with cores": ("LoHa", (40, 9, 3, 3), {"rank": 3, "alpha": 1.0, "tucker": True}, 9),
    "LoKr: the ranks of its halves": ("LoKr", (48, 60), {"rank": 2, "factor": 4}, 8),
    "LoKr of a convolution": ("LoKr", (48, 20, 3, 3), {"rank": 2, "factor": 4}, 8),
    "LoKr, both in low rank": ("LoKr", (64, 96), {"rank": 1, "factor": 8, "decompose_both": True}, 1),
    "GLoRA: both terms": ("GLoRA", (40, 52), {"rank": 3}, 6),
    "a LoRA's core": ("LoRA", (20, 18, 3, 3), {"rank": 4, "alpha": 3.0, "tucker": True}, 4),
}


@pytest.mark.parametrize("kind", CLOSED)
def test_closed_forms_are_exact(kind):
    family, shape, options, rank = CLOSED[kind]
    adapter, weight = adapter_of(family, shape, **options)
    lora, row = converted(adapter, weight, needs=family == "GLoRA")
    assert lora.rank == row.rank == rank and row.error <= 2e-6 * row.norm
    torch.testing.assert_close(lora.delta(), change(adapter, weight).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 60), (24, 20, 3, 3), (35, 45)])
def test_a_lokr_of_full_halves_is_cut_as_its_dense_product_would_be(shape):
    """Eckart–Young, from the halves alone; a negative factor keeps its sign."""
    adapter, weight = adapter_of("LoKr", shape, factor=5, full_rank=True)
    values = torch.linalg.svdvals(change(adapter, weight).flatten(1))
    for rank in (1, 5, 17):
        lora, row = converted(adapter, weight, Cut(rank=rank), needs=False)
        assert lora.rank == rank and row.error == pytest.approx(values[rank:].norm().item(), rel=1e-5)


@pytest.mark.parametrize("family, options", [("OFT", {"block_size": 4}), ("LoRA", {"dora": "output"}), ("full", {})])
def test_what_is_of_full_rank_is_cut_to_the_best(family, options):
    adapter, weight = adapter_of(family, (32, 24), **options)
    values = torch.linalg.svdvals(change(adapter, weight))
    lora, row = converted(adapter, weight, Cut(rank=6))
    assert lora.rank == 6 and row.before is None
    assert row.error == pytest.approx(values[6:].norm().item(), rel=1e-4)
    assert converted(adapter, weight)[1].rank == Cut(energy=ENERGY).of(values)


def test_a_dense_difference_of_low_rank_is_taken_whole():
    """Even where no family says so: a rotation of one block of many."""
    adapter, weight = adapter_of("OFT", (64, 48), block_size=4)
    blocks = adapter.blocks.clone()
    blocks[1:] = 0
    lora, row = converted(adapter.with_tensors({"oft_blocks": blocks}), weight)
    assert lora.rank == 4 and row.error < 1e-6 * row.norm


def test_tables_of_embeddings_stay_differences():
    for path in ("clip_l.text_model.embeddings.token_embedding", "lora_te1_text_model_embeddings_token_embedding"):
        file = file_of(Full({"diff": torch.randn(30, 8)}, (30, 8)), (30, 8), path)
        assert plain(file, Cut(rank=4)).file.adapters == file.adapters


def test_the_stated_error_of_large_layers_is_measured():
    """By random products, of which the energy that they leave cannot be told so exactly."""
    draws = torch.Generator().manual_seed(2)
    u, v = (torch.linalg.qr(torch.randn(size, 12, generator=draws, dtype=torch.float64))[0] for size in (500, 400))
    delta = ((u * torch.linspace(3, 1, 12)) @ v.T).float()
    (row,) = plain(file_of(Full({"diff": delta}, (500, 400)), (500, 400)), Cut(rank=16)).layers
    assert row.error < 2e-6 * row.norm


def test_a_loha_larger_than_its_layer_keeps_the_energy():
    adapter, weight = adapter_of("LoHa", (24, 30), rank=6)
    lora, row = converted(adapter, weight, needs=False)
    assert lora.rank < 24 and ENERGY <= row.energy < 1


# -- several on a layer, parts of layers


def test_parts_of_a_fused_layer_stay_parts():
    """q and v of a qkv, each by its own ranks, and the halves of a modulation."""
    shape, draws = (18, 5), torch.Generator().manual_seed(4)
    weight = torch.randn(shape, generator=draws)
    q = Sliced(adapter_of("LoHa", (6, 5), rank=1)[0], 0, 6, shape)
    v = Sliced(Swapped(adapter_of("full", (6, 5), 1)[0]), 12, 6, shape)
    rotated = Sliced(adapter_of("OFT", (6, 5), 2, block_size=3)[0], 6, 6, shape)
    outcome = plain(file_of(Sum([q, rotated, v]), shape), ALL, lambda path: weight)
    result = outcome.file.adapters["layer"]
    assert [(part.start, part.length) for part in result.parts] == [(0, 6), (6, 6), (12, 6)]
    wanted = sum(change(part, weight) for part in (q, rotated, v))
    torch.testing.assert_close(change(result, weight), wanted, rtol=1e-5, atol=1e-5)
    assert outcome.layers[0].norm == pytest.approx(wanted.norm().item(), rel=1e-5)


def test_several_adapters_on_a_layer_become_one():
    parts = [adapter_of(family, (20, 14), n, rank=2)[0] for n, family in enumerate(("LoRA", "LoHa", "full"))]
    both, weight = Sum(parts[:2]), torch.randn(20, 14)
    lora, row = converted(both, weight, needs=False)
    assert lora.rank == row.before == 6 and row.error < 1e-6 * row.norm
    with_bias = Sum([*parts[:2], Full({"diff_b": torch.randn(20)}, (20, 14))])
    made = converted(with_bias, weight, needs=False)[0]
    torch.testing.assert_close(made.merged_bias(None), with_bias.merged_bias(None))
    _, row = converted(Sum(parts), weight, ALL, needs=False)
    assert row.error < 2e-6 * row.norm


def test_a_wider_input_stays_wider():
    inner, _ = adapter_of("LoHa", (12, 10), rank=2)
    widened = Widened(inner, (12, 6))
    (result,) = plain(file_of(widened, (12, 6))).file.adapters.values()
    weight = torch.randn(12, 6)
    assert isinstance(result, Widened) and isinstance(result.inner, LoRA)
    torch.testing.assert_close(result.merged(weight), widened.merged(weight), rtol=1e-5, atol=1e-5)


# -- what stays


def test_what_is_plain_stays_to_the_last_bit():
    lora = adapter_of("LoRA", (8, 6), rank=4, alpha=3.0)[0].to(dtype=torch.bfloat16)
    norm, bias = (
        Full({"w_norm": torch.randn(7), "b_norm": torch.randn(7)}, (7,)),
        Full({"diff_b": torch.ones(5)}, (5, 3)),
    )
    scale = Replacement(torch.ones(4))
    adapters = {"a": lora, "n": norm, "b": bias, "s": scale, "h": adapter_of("LoHa", (9, 8), rank=2)[0]}
    table = NameTable({path: adapter.shape for path, adapter in adapters.items()})
    file = LoRAFile(adapters, {"key": "value"}, embeddings={"word": {"clip_l": torch.randn(2, 3)}}, names=table)
    outcome = plain(file)
    result = outcome.file
    assert all(result.adapters[path] is file.adapters[path] for path in "anbs")
    assert result.metadata == {"key": "value"} and result.embeddings is file.embeddings
    assert [row.path for row in outcome.layers] == ["a", "h"] and outcome.energy == pytest.approx(1)
    assert outcome.notes == (
        "1 layers are plain LoRAs already and stay as they are",
        "parameters that the file replaces as a whole stay replaced",
    )


def test_notes_and_errors():
    loha, weight = adapter_of("LoHa", (9, 8), rank=2)
    idle = loha.with_tensors({name: torch.zeros_like(tensor) for name, tensor in loha.tensors.items()})
    outcome = plain(file_of(idle, (9, 8)))
    assert not outcome.file.adapters and outcome.notes == ("1 layers that do nothing were left out",)
    full, _ = adapter_of("full", (9, 8))
    assert plain(file_of(full, (9, 8)), ALL).notes == (
        "1 layers take more numbers as LoRAs than as differences; choose a smaller cut",
    )
    lora, _ = adapter_of("LoRA", (9, 8), rank=2)
    assert "resizing cuts these too" in plain(file_of(lora, (9, 8)), Cut(rank=1)).notes[0]
    factors = read_adapter({"ia3_l": torch.ones(9, 1) * 1.5}, (9, 8))[0]
    assert isinstance(factors, PeftIA3)
    assert "scales the biases" in plain(file_of(factors, (9, 8)), None, lambda path: weight).notes[-1]
    for family, options in (("OFT", {}), ("IA3", {}), ("LoRA", {"dora": "input"}), ("GLoRA", {})):
        adapter, _ = adapter_of(family, (32, 8), **options)
        with pytest.raises(ValueError, match="^layer: what .* changes here depends on the weights; give the model"):
            plain(file_of(adapter, (32, 8)))
    with pytest.raises(ValueError, match="layer: the file does not tell the shape .* give the model"):
        plain(read_lora(to_tensors(file_of(loha, (9, 8)))))
    huge, _ = adapter_of("LoHa", (9, 8), rank=2)
    huge = huge.with_tensors({name: tensor * 1e30 for name, tensor in huge.tensors.items()})
    broken, kronecker = lora.to(dtype=torch.float32), adapter_of("LoKr", (9, 8), full_rank=True, factor=3)[0]
    broken.up[0, 0], kronecker.tensors["lokr_w1"][0, 0] = math.nan, math.inf
    dense = Full({"diff": torch.full((9, 8), math.nan)}, (9, 8))
    for adapter in (huge, broken, kronecker, dense):
        with pytest.raises(ValueError, match="^layer: some of its numbers are not finite; inspect the file"):
            plain(file_of(adapter, (9, 8)))


def test_progress_counts_layers_and_may_stop():
    adapters = {f"{n}": adapter_of("LoHa", (9, 8), n, rank=2)[0] for n in range(3)}
    file, told = LoRAFile(adapters, names=NameTable(dict.fromkeys(adapters, (9, 8)))), []
    plain(file, progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]

    class Stopped(Exception):
        pass

    def stop(done, total):
        if done == 1:
            raise Stopped

    with pytest.raises(Stopped):
        plain(file, progress=stop)


# -- precisions


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("case", [case for case in CASES if case.layer in ("linear", "conv2d")], ids=str)
def test_every_family_in_every_precision(case, name):
    """ΔW as exact as the numbers are; alpha to the last bit; what is written is read again."""
    module, adapter, _ = build(case)
    adapter = randomised(adapter.to(dtype=torch.float32))
    file, notes = in_precision(file_of(adapter, module.weight.shape), PRECISIONS[name])
    (result,) = file.adapters.values()
    assert result.alpha == adapter.alpha and type(result) is type(adapter)
    kept = {SCALE, "rescale", *TLORA}
    for key, tensor in result.tensors.items():
        assert tensor.dtype == (torch.float32 if key in kept else PRECISIONS[name])
    before, after = change(adapter, module.weight), change(result, module.weight)
    # rotations by large angles amplify the rounding of their generators
    error = 8 * torch.finfo(PRECISIONS[name]).eps
    assert (after - before).norm() <= error * before.norm()
    assert any("stay as they were" in note for note in notes) == (
        name != "float32" and bool(kept & result.tensors.keys())
    )
    assert not any("only grows" in note for note in notes)
    (again,) = read_lora(to_tensors(file), {"layer": module.weight.shape}).adapters.values()
    torch.testing.assert_close(change(again, module.weight), after, rtol=1e-3, atol=1e-3)


def barely_trained(up=1e-7, down=0.1, rank=4):
    """Most of what is in ``up`` is beneath float16."""
    draws = torch.Generator().manual_seed(1)
    shape = (40, 30)
    return LoRA(down * torch.randn(rank, 30, generator=draws), up * torch.randn(40, rank, generator=draws), 1.3), shape


@pytest.mark.parametrize("up, down", [(1e-7, 0.1), (1e5, 1e-3), (1e-3, 3e5)])
def test_factors_that_float16_cannot_hold_are_balanced(up, down):
    lora, shape = barely_trained(up, down)
    naive = lora.to(dtype=torch.float16)
    wanted = lora.delta().double()
    ruined = naive.delta().double() - wanted
    assert not torch.isfinite(ruined).all() or ruined.norm() > 0.05 * wanted.norm()
    file, notes = in_precision(file_of(lora, shape), torch.float16)
    (result,) = file.adapters.values()
    assert result.up.dtype == result.down.dtype == torch.float16 and result.alpha == 1.3
    assert (result.delta().double() - wanted).norm() <= 1e-3 * wanted.norm()
    assert notes == ["layer: numbers that float16 cannot hold; the factors were balanced, with the same product"]
    one, two = (tensor.abs().max() for tensor in (result.up, result.down))
    assert 0.5 <= one / two <= 2


def test_balancing_is_exact():
    """By powers of two: in float32 the product has the same bits."""
    lora, shape = barely_trained(1e-7, 0.1)
    (result,) = in_precision(file_of(lora, shape), torch.float16)[0].adapters.values()
    for name in (UP, DOWN):
        factor = (result.tensors[name].float() / lora.tensors[name]).median().log2().round()
        rounded = (lora.tensors[name] * 2**factor).half()
        assert torch.equal(result.tensors[name], rounded)


@pytest.mark.parametrize("family", ["LoHa", "LoKr", "GLoRA", "LoRA"])
def test_other_products_are_balanced_too(family):
    adapter, weight = adapter_of(family, (24, 9, 3, 3), rank=2, alpha=3.0, tucker=True, factor=3)
    first, *_, last = adapter.tensors
    sizes = {first: 2.0**-24, last: 2.0**24}
    if family == "GLoRA":
        sizes = {"a1.weight": 2.0**-24, "a2.weight": 2.0**24}
    skewed = adapter.with_tensors({name: tensor * sizes.get(name, 1.0) for name, tensor in adapter.tensors.items()})
    both = Sum([skewed, adapter])
    file, notes = in_precision(file_of(both, weight.shape), torch.float16)
    (result,) = file.adapters.values()
    wanted = change(both, weight)
    assert (change(result, weight) - wanted).norm() < 2e-3 * wanted.norm()
    assert any("balanced" in note for note in notes)
    assert {
        name: torch.equal(tensor, adapter.tensors[name].half()) for name, tensor in result.parts[1].tensors.items()
    } == (dict.fromkeys(adapter.tensors, True)), "what needed no balance was changed"


def test_what_is_beyond_stays_and_what_is_lost_is_told():
    full = Full({"diff": torch.tensor([[1e6, 1.0], [2.0, 3.0]])}, (2, 2))
    tiny = Full({"diff": torch.tensor([[1e-9, 1e-9], [1e-9, 2e-9]])}, (2, 2))
    file = LoRAFile(
        {"big": full, "small": tiny},
        embeddings={"w": {"clip_l": torch.full((1, 3), 1e6)}, "v": {"t5": torch.ones(1, 2)}},
    )
    result, notes = in_precision(file, torch.float16)
    assert result.adapters["big"] is full and result.adapters["small"].tensors["diff"].dtype == torch.float16
    assert result.embeddings["w"] is file.embeddings["w"] and result.embeddings["v"]["t5"].dtype == torch.float16
    assert notes == [
        "2 layers, such as big: numbers beyond float16, which ends at 65504; kept as they were",
        "small: numbers too small for float16 are lost, up to 100.0% of a tensor",
    ]
    (note,) = in_precision(file, torch.bfloat16)[1]  # which reaches as far as float32
    assert re.fullmatch(r"bfloat16 rounds tensors by up to 0\.\d%", note)


def test_what_stands_beside_the_weight_is_not_rounded():
    """A T-LoRA's factors and a replacement are about as large as the weight, their effect is far smaller."""
    draws = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 30, generator=draws)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    near = 1e-3 * torch.randn(4, 30, generator=draws)
    parts = {Q: v[:4] + near, P: u[:, :4].contiguous(), LAMBDA: values[None, :4].clone()}
    scale = torch.randn(30, generator=draws)
    tlora, replaced = read_adapter(parts, (40, 30))[0], Replacement(scale * (1 + near[0]))
    file = LoRAFile({"tlora": tlora, "scale": replaced})
    for dtype in (torch.float16, torch.bfloat16):
        result, notes = in_precision(file, dtype)
        for path, base in (("tlora", weight), ("scale", scale)):
            assert torch.equal(result.adapters[path].difference(base), file.adapters[path].difference(base))
        assert notes == [
            "2 layers, such as tlora: norms, factors and values of the weight itself stay as they were: rounding them "
            "moves all of it"
        ]


def test_eight_bits_say_what_they_cost():
    adapter, weight = adapter_of("LoRA", (24, 18), rank=4)
    file, notes = in_precision(file_of(adapter, weight.shape), torch.float8_e4m3fn)
    (note,) = notes
    assert "few programs besides ComfyUI read it" in note and "float8_e4m3fn rounds tensors by up to " in note
    (again,) = read_lora(to_tensors(file), {"layer": weight.shape}).adapters.values()
    error = (change(again, weight) - change(adapter, weight)).norm() / change(adapter, weight).norm()
    assert 0.01 < error < 0.1


def test_a_wider_precision_only_grows():
    adapter, weight = adapter_of("LoRA", (24, 18), rank=4)
    half = file_of(adapter.to(dtype=torch.bfloat16), weight.shape)
    result, notes = in_precision(half, torch.float32)
    assert notes == ["float32 holds no more than the file did: it only grows"]
    assert torch.equal(result.adapters["layer"].up, half.adapters["layer"].up.float())
    assert in_precision(half, torch.bfloat16)[1] == []


def test_counts_and_truth_values_stay():
    """What says how to read the numbers is no number to round."""
    for family, options in (("IA3", {"on_input": True}), ("OFTv2", {"block_size": 3})):
        adapter, weight = adapter_of(family, (12, 9), **options)
        if family == "OFTv2":
            adapter.scaled = True
        file, _ = in_precision(file_of(adapter, weight.shape), torch.bfloat16)
        (again,) = read_lora(LoraModel(to_tensors(file)), {"layer": weight.shape}).adapters.values()
        wanted = change(adapter, weight)
        assert (change(again, weight) - wanted).norm() < 0.05 * wanted.norm()


def test_an_unknown_precision_names_those_there_are():
    with pytest.raises(
        ValueError, match="precision: LoRA files are not kept in int8; choose one of float32, float16, "
    ):
        in_precision(LoRAFile({}), torch.int8)


def test_alphas_that_loaders_disagree_about_become_the_rank():
    """0 and infinity, wherever they are; all other alphas stay."""
    shape = (12, 5)
    parts = [adapter_of("LoRA", (6, 5), n, rank=2, alpha=alpha)[0] for n, alpha in enumerate((math.inf, 0.0, 1.5))]
    fused = Sum([Sliced(parts[0], 0, 6, shape), Sliced(Swapped(parts[1]), 6, 6, shape)])
    file = LoRAFile({"a": fused, "b": parts[2]}, names=NameTable({"a": shape, "b": (6, 5)}))
    outcome = plain(file)
    result = outcome.file.adapters["a"]
    assert [part.alpha for part in result.parts] == [2.0, 2.0] and outcome.file.adapters["b"] is parts[2]
    torch.testing.assert_close(change(result, torch.zeros(shape)), change(fused, torch.zeros(shape)))
    assert all(float(part["alpha"]) == 2 for part in (result.parts[0].state(), result.parts[1].state()))
    assert [part.alpha for part in fused.parts] == [math.inf, 0.0], "the file that was given is as it was"
