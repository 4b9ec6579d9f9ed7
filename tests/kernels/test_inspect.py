"""What is told of files: what they are, how much they do where; every fault on a file that has it and one without."""

import dataclasses
import json
import math
import time

import pytest
import torch

from adapter_files import CLIP, flux, lora, unet
from cases import CASES, build, randomised
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.compose import Sum
from lora_loom.kernels.file_blocks import block_of_layers, blocks_of_file
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.safetensors_io import LoraModel, load_tensors, save_tensors
from lora_loom.kernels.tools.convert import in_precision, plain
from lora_loom.kernels.tools.faults import RULES
from lora_loom.kernels.tools.inspect import inspect
from lora_loom.kernels.tools.measure import component_of, measured
from lora_loom.kernels.writing import DIALECTS, to_tensors, write_lora


def entropy_rank(matrix):
    """Roy and Vetterli 2007, with energies for p."""
    squares = torch.linalg.svdvals(matrix.double().flatten(1)).square()
    shares = (squares / squares.sum()).clamp_min(1e-300)
    return math.exp(-(shares * shares.log()).sum())


def adapter_of(family, shape, seed=0, **options):
    draws = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=draws)
    fresh = make_adapter(family, shape, Options(**options), draws, weight)
    tensors = {name: t + torch.randn(t.shape, generator=draws) / 4 for name, t in fresh.tensors.items()}
    return fresh.with_tensors(tensors), weight


# -- what is measured


@pytest.mark.parametrize("case", CASES, ids=str)
def test_measures_of_every_family(case):
    """‖ΔW‖ and effective rank are those of the dense difference, with the weight where that is needed."""
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    alone = measured("layer", adapter)
    wanted = adapter.difference(module.weight)
    needs = case.family in ("OFT", "BOFT", "OFTv2", "IA3", "GLoRA", "T-LoRA") or bool(case.options.dora)
    assert (alone.norm is None) == needs and (alone.effective_rank is None) == needs
    assert (alone.own is not None) == (needs and case.family != "T-LoRA")
    layer = measured("layer", adapter, weight=lambda path: module.weight)
    assert layer.norm == pytest.approx(wanted.norm().item(), rel=1e-5)
    assert layer.effective_rank == pytest.approx(entropy_rank(wanted), rel=1e-4)
    values = torch.linalg.svdvals(wanted.flatten(1)).square().cumsum(0)
    assert layer.ranks == int((values < 0.99 * values[-1]).sum()) + 1
    assert not layer.idle and layer.numbers == sum(tensor.numel() for tensor in adapter.tensors.values())


def test_nothing_dense_is_made_of_low_rank():
    """A layer whose ΔW would take 40 GB."""
    draws = torch.Generator().manual_seed(0)
    wide = LoRA(torch.randn(2, 100_000, generator=draws), torch.randn(100_000, 2, generator=draws), 2)
    assert measured("layer", wide).effective_rank == pytest.approx(2, abs=0.1)
    halves = {"lokr_w1": torch.randn(300, 300, generator=draws), "lokr_w2": torch.randn(300, 300, generator=draws)}
    file = inspect({f"layer.{part}": tensor for part, tensor in halves.items()})
    (layer,) = file.layers
    one, two = (entropy_rank(half) for half in halves.values())
    assert layer.effective_rank == pytest.approx(one * two, rel=1e-3)
    huge = {"hada_w1_a": (200_000, 40), "hada_w1_b": (40, 1000), "hada_w2_a": (200_000, 40), "hada_w2_b": (40, 1000)}
    start = time.process_time()
    (layer,) = inspect({f"layer.{part}": torch.ones(size) for part, size in huge.items()}).layers
    assert layer.norm is None and not layer.idle and time.process_time() - start < 20


def test_several_on_a_layer_and_parts_of_one():
    keys = {}
    for n, leaf in enumerate(("to_q", "to_k", "to_v")):
        keys |= lora(f"transformer.transformer_blocks.0.attn.{leaf}", (8, 8), 2, 2.0, seed=n)
    (layer,) = inspect(keys, flux()).layers
    assert layer.path == "diffusion_model.double_blocks.0.img_attn.qkv" and layer.rank == 6 and layer.family == "LoRA"
    both = Sum([adapter_of("LoRA", (9, 8), 1, rank=2)[0], adapter_of("full", (9, 8), 2)[0]])
    found = measured("layer", both)
    assert found.family == "LoRA + full" and found.rank == 2
    assert found.norm == pytest.approx(both.difference(torch.zeros(9, 8)).norm().item(), rel=1e-5)
    bias = measured("layer", Full({"diff_b": torch.tensor([3.0, 4.0])}, (2, 2)))
    assert bias.norm == 5 and bias.effective_rank is None and not bias.idle
    assert measured("layer", Full({"diff_b": torch.zeros(2)}, (2, 2))).idle


# -- what is told


def sd_file(metadata=None):
    keys = {}
    for n, (path, shape) in enumerate(unet().items()):
        if "attn" in path or "in_layers" in path:
            name = "lora_unet_" + path.removeprefix("diffusion_model.").replace(".", "_")
            keys |= lora(name, shape, 3 if n % 2 else 2, 1.0, seed=n)
    for n, (path, shape) in enumerate(CLIP.items()):
        keys |= lora("lora_te_" + path.removeprefix("clip_l.transformer.").replace(".", "_"), shape, 2, 1.0, seed=n)
    return LoraModel(keys, metadata or {})


TOLD = {
    "ss_steps": "1500",
    "ss_learning_rate": "0.0001",
    "ss_optimizer": "torch.optim.adamw.AdamW",
    "ss_resolution": "(512, 512)",
    "ss_num_epochs": "None",
    "modelspec.trigger_phrase": "ohwx, a cat",
    "loom.recipe": json.dumps({"rank": 4, "model": {"name": "tiny"}}),
    "loom.tool": json.dumps(
        {"tool": "merge", "options": {}, "energy": 0.875, "parents": [{"name": "a", "strength": "0.5"}, {"name": "b"}]}
    ),
}


def test_what_is_told_of_a_file(tmp_path):
    path = save_tensors(sd_file(TOLD), tmp_path / "cat.safetensors")
    found = inspect(path)
    assert found.name == "cat.safetensors" and found.dialect == "kohya" and found.architecture == "sd"
    assert found.components["te1"] == len(CLIP) and found.families == {"LoRA": len(found.layers)}
    assert set(found.ranks) == {"2", "3"} and set(found.alphas) == {"1"} and set(found.precisions) == {"float32"}
    assert found.trigger_words == ("ohwx", "a cat") and found.words_from == "modelspec.trigger_phrase"
    assert found.training["steps"] == "1500" and "epochs" not in found.training
    assert found.recipe == {"rank": 4, "model": {"name": "tiny"}} and found.made_by["tool"] == "merge"
    assert found.bytes == sum(tensor.numel() * 4 for tensor in load_tensors(path).values())
    assert [finding.rule for finding in found.findings] == []
    text = found.text()
    for part in (
        "cat.safetensors · 0.0 MB · float32 · names: kohya",
        "base: SD1.5 or SD2",
        "trigger words: ohwx, a cat",
        "training: steps 1500, resolution (512, 512), learning rate 0.0001, optimizer torch.optim.adamw.AdamW",
        "made by merge of a at 0.5, b at ?, 87.50 % of the energy",
        "recipe of this pack: model, rank",
        "input_blocks ",
        "no faults found",
    ):
        assert part in text, part
    assert len(text.splitlines()) < 25 and all(len(line) < 300 for line in text.splitlines())


def test_blocks_add_up():
    """Each block's norm is that of its layers together; blocks are the file's own, in the model's order."""
    model = sd_file()
    found = inspect(model)
    names = [block.id for block in blocks_of_file(model)]
    assert [row.id for row in found.blocks] == [*names, "te1"]
    where = block_of_layers(model)
    for row in found.blocks:
        inside = [layer for layer in found.layers if (where.get(layer.path) or layer.component) == row.id]
        assert row.layers == len(inside) > 0 and row.unmeasured == 0
        assert row.norm == pytest.approx(math.sqrt(sum(layer.norm**2 for layer in inside)))
        assert row.effective_rank == pytest.approx(sum(layer.effective_rank for layer in inside) / len(inside))
    assert {row.role for row in found.blocks} == {"in", "mid", "out", "text"}
    by_model = inspect(model, unet() | CLIP)
    assert [row.id for row in by_model.blocks] == [*names, "clip_l"]
    assert [row.norm for row in by_model.blocks] == pytest.approx([row.norm for row in found.blocks])


def test_layers_outside_of_blocks_have_a_row():
    keys = lora("diffusion_model.img_in", (8, 4)) | lora("diffusion_model.double_blocks.0.img_mlp.0", (32, 8))
    rows = inspect(keys).blocks
    assert [(row.id, row.role) for row in rows] == [("double_blocks.0", "trunk"), ("other", "other")]


def test_json_holds_everything_under_keys_that_stay():
    found = inspect(sd_file(TOLD))
    told = json.loads(found.to_json())
    assert list(told) == [field.name for field in dataclasses.fields(found)] == [
        *("name", "bytes", "dialect", "architecture", "evidence", "families", "components", "ranks", "alphas"),
        *("precisions", "trigger_words", "words_from", "training", "recipe", "made_by", "embeddings", "blocks"),
        *("layers", "findings", "notes"),
    ]  # fmt: skip
    assert list(told["blocks"][0]) == ["id", "group", "role", "layers", "norm", "effective_rank", "rank", "unmeasured"]
    assert len(told["layers"]) == len(found.layers) and told["layers"][0]["norm"] == found.layers[0].norm


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects(dialect):
    table = NameTable(flux())
    path = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = to_tensors(LoRAFile({path: adapter_of("LoRA", (8, 8), rank=2)[0]}, names=table), dialect)
    wanted = {"native": "ComfyUI", "kohya": "kohya", "lycoris": "LyCORIS' wrapper", "peft": "PEFT"}
    assert inspect(dict(tensors)).dialect == wanted.get(dialect, dialect)
    assert inspect(tensors).dialect.endswith(", written by this pack")


@pytest.mark.parametrize(
    "key, dialect",
    [
        ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
        ("oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.0", "kohya (OFT)"),
        ("lora_transformer_single_transformer_blocks_0_attn_to_q.lora_down.weight", "OneTrainer (legacy)"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight", "ComfyUI's names, PEFT's factors"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "Black Forest Labs"),
        ("blocks.0.attn.lora_A.weight", "PEFT's factors, the model's own names"),
        ("bundle_emb.cat.clip_l", "embeddings"),
        ("nothing.known", "unknown"),
    ],
)
def test_other_names(key, dialect):
    assert inspect({key: torch.ones(2, 3)}).dialect == dialect


@pytest.mark.parametrize(
    "name, component",
    [
        ("lora_unet_input_blocks_1_1", "unet"),
        ("diffusion_model.double_blocks.0", "unet"),
        ("lora_te_text_model_encoder", "te1"),
        ("lora_te2_text_model_encoder", "te2"),
        ("text_encoder.text_model", "te1"),
        ("text_encoder_2.text_model", "te2"),
        ("base_model.model.text_encoder_3.encoder", "te3"),
        ("text_encoders.t5xxl.transformer.encoder", "t5xxl"),
        ("clip_g.transformer.text_model", "clip_g"),
        ("lycoris_text_model_encoder_layers_0", "te1"),
    ],
)
def test_components(name, component):
    assert component_of(name) == component


def test_what_needs_the_weights_is_said_to_need_them():
    adapter, weight = adapter_of("OFT", (16, 6), block_size=4)
    model, shapes = to_tensors(LoRAFile({"layer": adapter}, names=NameTable({"layer": (16, 6)}))), {"layer": (16, 6)}
    without = inspect(model, shapes)
    assert "‖ΔW‖ of 1 layers was not measured (OFT): it depends on the weights; give the base model" in without.notes
    assert without.layers[0].own == pytest.approx(adapter.norm().item()) and without.blocks[0].unmeasured == 1
    told = []
    given = inspect(model, shapes, lambda path: weight, lambda *counts: told.append(counts))
    assert given.layers[0].norm == pytest.approx(adapter.difference(weight).norm().item(), rel=1e-5)
    assert not any("not measured" in note for note in given.notes) and told == [(0, 1), (1, 1)]


def test_embeddings_are_listed():
    found = inspect(sd_file() | {"bundle_emb.mycat.clip_l": torch.randn(2, 6)})
    assert found.embeddings == {"mycat": {"clip_l": (2, 6)}} and "embedding mycat: clip_l 2×6" in found.text()


# -- faults

KEY = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k"
OTHER = KEY.replace("to_k", "to_q")
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"
SHAPES = {"diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_k": (12, 8)} | {
    "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q": (12, 8)
}


def good(**more):
    """Two layers in which nothing is wrong; float16 would do, but not without loss."""
    return lora(KEY, (12, 8), 2, 1.0, seed=1) | lora(OTHER, (12, 8), 2, 1.0, seed=2) | more


def changed(key, change):
    keys = good()
    keys[key] = change(keys[key])
    return keys


def dora(name=KEY, shape=(1, 8)):
    return good() | {f"{name}.dora_scale": torch.ones(shape)}


def peft(rank, shape=(12, 8)):
    return lora("base_model.model.blocks.0.attn", shape, rank, None, ".lora_A.weight", ".lora_B.weight")


UP, DOWN, ALPHA = f"{KEY}.lora_up.weight", f"{KEY}.lora_down.weight", f"{KEY}.alpha"
IDLE = {name: torch.zeros_like(tensor) if "up" in name else tensor for name, tensor in good().items()}
TRAINED_TEXT = lora(TEXT, (6, 6), 2, 1.0, seed=3)
SPREAD = {"lora_down.weight": torch.randn(32, 64), "lora_up.weight": torch.randn(64, 32)}
FEW = {
    "lora_down.weight": SPREAD["lora_down.weight"],
    "lora_up.weight": SPREAD["lora_up.weight"] * 0.01 ** torch.arange(32),
}
# rule -> (a file with it, one without, more arguments for both)
FAULTY = {
    "not_finite": (changed(UP, lambda t: t * math.nan), good(), {}),
    "nothing_read": ({f"{KEY}.lora_up.weight": torch.ones(12, 2)}, good(), {}),
    "does_nothing": (IDLE, good(), {}),
    "incomplete": ({key: tensor for key, tensor in good().items() if key != DOWN}, good(), {}),
    "dora_axis": (dora(shape=(5, 1)), dora(shape=(12, 1)) | dora(OTHER, (12, 1)), {}),
    "other_base": (
        lora("transformer.single_transformer_blocks.0.attn.to_q", (12, 8)),
        good(),
        {"targets": unet() | CLIP},
    ),
    "unplaced": (good() | {"what.is.this": torch.ones(2)}, good(), {}),
    "infinite_alpha": (changed(ALPHA, lambda t: torch.tensor(math.inf)), good(), {}),
    "zero_alpha": (changed(ALPHA, lambda t: torch.tensor(0.0)), good(), {}),
    "negative_alpha": (changed(ALPHA, lambda t: -t), good(), {}),
    "absurd_alpha": (changed(ALPHA, lambda t: torch.tensor(1e6)), changed(ALPHA, lambda t: torch.tensor(128.0)), {}),
    "duplicate": (
        good() | {key.replace(KEY, next(iter(SHAPES))): t for key, t in good().items() if KEY in key},
        good(),
        {"targets": SHAPES},
    ),
    "two_spellings": (
        good() | lora(f"unet.{KEY[10:]}", (12, 8), seed=9),
        good() | lora("lora_te_text_model_x", (6, 6)),
        {},
    ),
    "dora_missing": (dora(), dora() | dora(OTHER), {}),
    "beyond_float16": (changed(UP, lambda t: t * 1e6), good(), {}),
    "idle_encoder": (
        good() | {key: t * 0 if "up" in key else t for key, t in TRAINED_TEXT.items()},
        good() | TRAINED_TEXT,
        {},
    ),
    "idle_layers": (changed(UP, torch.zeros_like), good(), {}),
    "misread": ({f"{KEY}.weight": torch.ones(12), f"{KEY}.on_input": torch.tensor(0)}, good(), {}),
    "other_hash": (
        LoraModel(good(), {"sshs_model_hash": "0" * 64}),
        load_tensors(good()),
        {},
    ),
    "rank_beyond_layer": (peft(9), peft(8), {}),
    "unused_ranks": (
        {f"{KEY}.{part}": tensor for part, tensor in FEW.items()},
        {f"{KEY}.{part}": tensor for part, tensor in SPREAD.items()},
        {},
    ),
    "needlessly_wide": ({key: tensor.half().float() for key, tensor in good().items()}, good(), {}),
}


def rules(source, **more):
    return [finding.rule for finding in inspect(source, **more).findings]


def test_every_rule_is_tried():
    assert list(FAULTY) == [rule.id for rule in RULES]
    assert len({rule.what for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("rule", FAULTY)
def test_faults(rule):
    """Found where it is, and not where it is not; told with what to do about it."""
    bad, fine, more = FAULTY[rule]
    assert rule in rules(bad, **more) and rule not in rules(fine, **more)
    found = inspect(bad, **more)
    (finding, *_) = (finding for finding in found.findings if finding.rule == rule)
    line = finding.line()
    assert line in found.text() and finding.cure in line and finding.severity in ("error", "warning", "advice")
    assert finding.count == 0 or finding.examples
    assert json.loads(found.to_json())["findings"][found.findings.index(finding)]["rule"] == rule


def test_a_good_file_has_none():
    assert rules(good()) == [] and rules(good() | TRAINED_TEXT, targets=SHAPES | CLIP) == []


def test_findings_name_layers_and_what_they_are():
    lines = {finding.rule: finding.line() for finding in inspect(FAULTY["absurd_alpha"][0]).findings}
    assert f"alpha far beyond the rank: up to 5e+05 times (1: {KEY})" in lines["absurd_alpha"]
    lines = {finding.rule: finding.line() for finding in inspect(FAULTY["misread"][0]).findings}
    assert "misread: (IA)³ (1 layers): they do not know it. With them" in lines["misread"]
    (line,) = (f.line() for f in inspect(FAULTY["unused_ranks"][0]).findings if f.rule == "unused_ranks")
    assert "3% of the ranks do 99 % of the work, 1.0 of them in a layer" in line


def test_whole_files_that_do_nothing_are_told_once():
    assert rules(IDLE) == ["does_nothing"]
    text = {key: t * 0 if "up" in key else t for key, t in TRAINED_TEXT.items()}
    assert rules(good() | text) == ["idle_encoder"], "its layers are not listed apart"


def test_dora_that_only_the_metadata_knows():
    told = LoraModel(good(), {"ss_network_args": json.dumps({"dora_wd": "True"})})
    assert rules(told) == ["dora_missing"]
    told = LoraModel(good(), {"ss_network_args": json.dumps({"dora_wd": "False"})})
    assert rules(told) == []
    config = LoraModel(peft(2), {"adapter_config": json.dumps({"peft_type": "LORA", "use_dora": True, "r": 2})})
    assert "dora_missing" in rules(config)


def test_hashes_of_our_own_files_are_true(tmp_path):
    path = save_tensors(LoraModel(good(), {"ss_steps": "3"}), tmp_path / "x.safetensors")
    assert {"sshs_model_hash", "modelspec.hash_sha256"} <= load_tensors(path).metadata.keys()
    assert rules(path) == []
    changed_since = LoraModel(good() | TRAINED_TEXT, load_tensors(path).metadata)
    (finding,) = inspect(changed_since).findings
    assert finding.examples == ("sshs_model_hash", "modelspec.hash_sha256")


def test_cures_work():
    """What converting is said to cure, it cures."""
    for rule in ("infinite_alpha", "zero_alpha", "idle_layers", "idle_encoder", "two_spellings", "duplicate"):
        bad, _, more = FAULTY[rule]
        file = read_lora(LoraModel(bad), more.get("targets") or (SHAPES | CLIP))
        assert rule not in rules(to_tensors(plain(file).file, "kohya"), targets=SHAPES | CLIP), rule
    for rule in ("beyond_float16", "needlessly_wide"):
        file = read_lora(LoraModel(FAULTY[rule][0]), SHAPES)
        assert rule not in rules(to_tensors(in_precision(file, torch.float16)[0]), targets=SHAPES), rule


# -- hostile files


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "cut.safetensors"
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="cut.safetensors: not a safetensors file"):
        inspect(path)
    path.write_bytes(save_tensors(good(), tmp_path / "good.safetensors").read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut.safetensors: damaged or incomplete"):
        inspect(path)


def test_a_file_that_cannot_be_used_is_told_not_raised():
    ruined = {key: tensor * math.nan for key, tensor in good().items()}
    found = inspect(ruined)
    assert [finding.rule for finding in found.findings][:2] == ["not_finite", "nothing_read"] and not found.layers
    assert "nothing in it can be used" in found.text() and json.loads(found.to_json())
    assert rules({}) == ["nothing_read"] and "none" in inspect({}).text()


def test_strange_metadata_stays_small():
    deep = "[" * 900 + "]" * 900
    metadata = {
        "loom.recipe": json.dumps({"a" * 5000: "b" * 50_000, "deep": 0, "list": list(range(10_000)), "nan": 1e999})
        .replace('"deep": 0', f'"deep": {deep}'),
        "loom.tool": json.dumps({"tool": "x" * 9000, "parents": [7, {"name": ["no", "text"]}], "energy": "much"}),
        "ss_steps": "9" * 100_000,
        "ss_network_args": deep,
        "modelspec.title": "\x1b[31m\u202e" + "t" * 5000,
        "modelspec.trigger_phrase": "w" * 50_000,
    }  # fmt: skip
    found = inspect(LoraModel(good(), metadata))
    told, text = found.to_json(), found.text()
    assert len(told) < 60_000 and len(text) < 4000 and "\x1b" not in text and "\u202e" not in text
    assert json.loads(told)["recipe"]["nan"] is None
    long = "diffusion_model." + "x" * 50_000
    found = inspect(lora(long, (4, 3)) | {long + "?": torch.ones(2)})
    assert len(found.text()) < 4000


def test_numbers_and_letters_that_are_none_are_told_as_such():
    """JSON can spell numbers beyond all bounds, and halves of characters."""
    half, seed = "x\\ud800y", 2**64 - 1
    metadata = {
        "loom.tool": f'{{"energy": 1{"0" * 400}, "parents": [], "tool": "{half}"}}',
        "loom.recipe": f'{{"seed": {seed}, "{half}": "{half}"}}',
        "ss_tag_frequency": f'{{"1_{half}": {{"{half}": 1}}}}',
    }
    found = inspect(LoraModel(good(), metadata))
    told = json.loads(found.to_json().encode())
    assert told["made_by"]["energy"] is None and told["made_by"]["tool"] == "x?y"
    assert told["recipe"]["seed"] == seed and "x?y" in told["recipe"].values()
    assert found.text().encode()


def test_numbers_that_overflow_are_not_measured():
    found = inspect(
        {key: tensor * 1e30 if "lora" in key.split(".", 1)[1] else tensor for key, tensor in good().items()}
    )
    assert [layer.norm for layer in found.layers] != [] and json.loads(found.to_json())
    assert "beyond_float16" in [finding.rule for finding in found.findings]
    far = {key: tensor * 1e38 if key.endswith("weight") else tensor for key, tensor in good().items()}
    assert json.loads(inspect(far).to_json())


def test_many_layers_take_bounded_time():
    keys = {}
    for n in range(2000):
        keys |= lora(f"diffusion_model.blocks.{n}.x", (2, 2), 1)
    start = time.process_time()
    assert len(inspect(keys).layers) == 2000 and time.process_time() - start < 20


def test_a_written_file_is_inspected_whole(tmp_path):
    adapters = {
        f"diffusion_model.double_blocks.{n}.img_mlp.0": adapter_of("LoHa", (32, 8), n, rank=2)[0] for n in range(2)
    }
    path = write_lora(LoRAFile(adapters, names=NameTable(flux())), tmp_path / "x.safetensors")
    found = inspect(path, flux())
    assert [layer.path for layer in found.layers] == list(adapters) and found.families == {"LoHa": 2}
    assert found.architecture == "flux" and [row.id for row in found.blocks] == ["double_blocks.0", "double_blocks.1"]
