"""What tools tell: retained energy, lines for people, and what a result's metadata says."""

import json
import math
from dataclasses import replace

import pytest
import torch

from adapter_files import flux, lora, pair
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.metadata import trigger_words
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.tools.merge import Ingredient, merge
from lora_loom.kernels.tools.outcome import LayerOutcome, Outcome
from lora_loom.kernels.tools.provenance import Parent, shared, with_parents
from lora_loom.kernels.writing import to_tensors, write_lora

NOTHING = LoRAFile({})


def test_retained_energy_is_that_of_the_matrices():
    wanted = [torch.randn(9, 7, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    made = [matrix * (1 - 0.1 * n) for n, matrix in enumerate(wanted)]
    layers = tuple(
        LayerOutcome(f"l.{n}", 7, None, float(one.norm()), float((one - other).norm()))
        for n, (one, other) in enumerate(zip(wanted, made, strict=True))
    )
    whole, lost = (
        sum(float(m.square().sum()) for m in ms) for ms in (wanted, [a - b for a, b in zip(wanted, made, strict=True)])
    )
    assert Outcome(NOTHING, layers).energy == pytest.approx(1 - lost / whole, rel=1e-6)
    assert [layer.energy for layer in layers] == pytest.approx([1, 0.99, 0.96])
    assert LayerOutcome("zero", 0, 0, 0.0, 0.0).energy == Outcome(NOTHING, ()).energy == 1
    assert Outcome(NOTHING, (), ("a note",)).lines() == ["a note"]  # where nothing was approximated nothing is said


def test_lines_for_people():
    layers = (
        LayerOutcome("in.0.a", 4, 8, 10.0, 1.0),
        LayerOutcome("in.0.b", 4, 8, 10.0, 0.0),
        LayerOutcome("out.1.a", 2, 8, 1.0, 0.5),
        LayerOutcome("out.1.norm", 0, None, 1.0, 0.0),
    )
    outcome = Outcome(NOTHING, layers, ("something else",))
    assert outcome.lines(lambda path: path.rsplit(".", 1)[0]) == [
        "4 layers: ranks 2 to 4 (mostly 4), 1 as whole differences; 99.38 % of the energy retained",
        "in.0: 99.50 % of the energy retained (2 layers)",
        "out.1: 87.50 % of the energy retained (2 layers)",
        "least of out.1.a: 75.00 % of the energy retained at rank 2",
        "least of in.0.a: 99.00 % of the energy retained at rank 4",
        "something else",
    ]
    assert len(outcome.lines()) == 4
    exact = Outcome(NOTHING, layers[1:2])
    assert exact.lines(lambda path: path) == ["1 layer: rank 4; all of the energy retained"]
    nearly = Outcome(NOTHING, (LayerOutcome("l", 1, 2, 1.0, 0.005),))
    assert "99.99 %" in nearly.lines()[0]  # never rounded up to all


def outcome_of(*adapters):
    return Outcome(LoRAFile({f"l.{n}": adapter for n, adapter in enumerate(adapters)}), ())


def plain(rank):
    return LoRA(*pair((8, 6), rank), rank)


def test_kohyas_keys_follow_the_dialect():
    """Of q, k and v: one pair in one, three in the other, which has no place for alpha."""
    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    fused = Sum([Sliced(LoRA(*pair((8, 8), 2), 1.0), 8 * n, 8, (24, 8)) for n in range(3)])
    file = LoRAFile({path: fused}, {"loom.tool": "{}"}, names=NameTable(flux()))
    for dialect, dim, alpha in (("native", "6", 3), ("diffusers", "2", 2)):
        model = to_tensors(file, dialect)
        downs = [tensor for key, tensor in model.items() if "lora_down" in key or "lora_A" in key]
        assert {str(len(down)) for down in downs} == {dim} == {model.metadata["ss_network_dim"]}
        assert float(model.metadata["ss_network_alpha"]) == alpha
    trained = {"ss_network_dim": "2", "ss_network_alpha": "1", "ss_network_module": "networks.lora"}
    assert trained.items() <= to_tensors(replace(file, metadata=trained)).metadata.items()  # what a trainer says stays


STALE = {
    "sshs_model_hash": "a",
    "sshs_legacy_hash": "b",
    "modelspec.hash_sha256": "c",
    "modelspec.date": "2020-01-01",
    "ss_network_args": '{"rs_lora": "True"}',
    "adapter_config": '{"lora_alpha": 99}',
    "lora_adapter_metadata": "{}",
    "loom.tool": "{}",
}


@pytest.mark.parametrize(
    "adapters, module, dim",
    [
        ([plain(4), plain(4)], "networks.lora", "4"),
        ([plain(4), plain(2)], "networks.lora", "Dynamic"),
        ([plain(4), Sum([plain(4), Full({"diff_b": torch.ones(8)}, (8, 6))])], "networks.lora", "4"),
        ([plain(4), Full({"diff": torch.ones(8, 6)}, (8, 6))], "lycoris.kohya", "4"),
        ([Full({"diff": torch.ones(8, 6)}, (8, 6))], "lycoris.kohya", None),
        ([Sum([plain(2), plain(2)])], "networks.lora", "4"),  # one pair in the file
        ([Sum([Sliced(LoRA(*pair((4, 6), 2), 2), 4 * n, 4, (8, 6)) for n in (0, 1)])], "networks.lora", "4"),
        ([Swapped(plain(2))], "networks.lora", "2"),
        ([LoRA(*pair((8, 6), 2), math.inf), LoRA(*pair((8, 6), 2), 0.0)], "networks.lora", "2"),
    ],
)
def test_kohyas_keys_are_put_right(adapters, module, dim):
    before = STALE | {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": "128",
        "ss_network_alpha": "64",
        "kept": "1",
    }
    outcome = outcome_of(*adapters)
    told = with_parents(before, "resize", [Parent("a")], {}, outcome)
    assert not told.keys() & {"ss_network_module", "ss_network_dim", "ss_network_alpha"}
    told = to_tensors(replace(outcome.file, metadata=told)).metadata
    assert told["ss_network_module"] == module and told.get("ss_network_dim") == dim and told["kept"] == "1"
    alpha = told.get("ss_network_alpha")
    assert alpha == dim or float(alpha) == float(dim)
    assert not told.keys() & (STALE.keys() - {"loom.tool"})


def test_parents_are_told_and_bounded():
    parents = [Parent("first" * 100, "12ab", "0.5:te=0" * 1000), Parent("二", "34cd")]
    told = with_parents({}, "merge", parents, {"method": "sum", "rank": 4, "energy": None}, outcome_of(plain(4)))
    assert told["modelspec.merged_from"] == "first" * 40 + ", 二" and told["modelspec.sai_model_spec"] == "1.0.0"
    tool = json.loads(told["loom.tool"])
    assert tool["tool"] == "merge" and "energy" not in tool  # nothing was approximated
    row = LayerOutcome("l", 1, 2, 1.0, 0.5)
    cut = with_parents({}, "resize", [], {}, Outcome(NOTHING, (row,)))
    assert json.loads(cut["loom.tool"])["energy"] == 0.75
    assert tool["options"] == {"method": "sum", "rank": 4, "energy": None}
    assert tool["parents"][1] == {"name": "二", "digest": "34cd", "strength": "1"}
    assert len(tool["parents"][0]["name"]) == 200 and len(tool["parents"][0]["strength"]) == 2000
    alone = with_parents({"modelspec.merged_from": "x"}, "resize", parents[:1], {}, outcome_of(plain(4)))
    assert "modelspec.merged_from" not in alone


def test_trigger_words_of_all_parents_are_carried_on():
    parents = [
        Parent("a", metadata={"modelspec.trigger_phrase": "sks dog, a (red, blue) ball"}),
        Parent("b", metadata={"ss_tag_frequency": '{"1_zwx": {"zwx": 1}}'}),
        Parent("c", metadata={"modelspec.trigger_phrase": "SKS dog, cat"}),
        Parent("d"),
    ]
    told = with_parents({}, "merge", parents, {}, outcome_of(plain(2)))
    assert trigger_words(told) == ["sks dog", "a (red, blue) ball", "zwx", "cat"]
    idle = [parents[0], replace(parents[1], acts=False)]
    told = with_parents({}, "merge", idle, {}, outcome_of(plain(2)))
    assert "zwx" not in trigger_words(told) and "modelspec.merged_from" not in told
    assert len(json.loads(told["loom.tool"])["parents"]) == 2
    silent = with_parents({"modelspec.trigger_phrase": "kept"}, "merge", [Parent("d")], {}, outcome_of(plain(2)))
    assert silent["modelspec.trigger_phrase"] == "kept"


def test_shared_is_what_all_say_alike_and_is_still_true():
    one = STALE | {"ss_base_model_version": "sdxl", "title": "a", "only": "here"}
    assert shared([one, one | {"title": "b"}, {"ss_base_model_version": "sdxl", "title": "a"}]) == {
        "ss_base_model_version": "sdxl"
    }
    assert shared([one]) == {"ss_base_model_version": "sdxl", "title": "a", "only": "here"}


def test_a_result_that_is_written_and_read_again(tmp_path):
    """Of a parent whose adapter_config says another alpha than its tensors."""
    config = {"adapter_config": json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6})}
    keys = lora("base_model.model.blocks.0.x", (6, 4), down=".lora_A.weight", up=".lora_B.weight")
    path = tmp_path / "result.safetensors"
    file = read_lora(keys)
    file = LoRAFile(file.adapters, config)
    outcome = merge([Ingredient(file, 0.5)], "sum", Cut(rank=2))
    told = with_parents(config, "merge", [Parent("p", metadata=config)], {}, outcome)
    write_lora(LoRAFile(outcome.file.adapters, told), path)
    back = read_lora(path)
    assert json.loads(back.metadata["loom.tool"])["parents"][0]["name"] == "p"
    (made,), (read,) = outcome.file.adapters.values(), back.adapters.values()
    assert torch.equal(read.delta(), made.delta())
