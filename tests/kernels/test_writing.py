"""The writer: every dialect gives back the same differences; what a dialect cannot hold is refused by name."""

import dataclasses
import json

import pytest
import torch

from adapter_files import CLIP, CONV, KEY, PREFIX, flux, lora, unet
from cases import CASES, build, randomised
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.full import Full
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import FAMILIES, make_adapter
from lora_loom.kernels.safetensors_io import load_tensors
from lora_loom.kernels.writing import DIALECTS, to_tensors, write_lora

QKV, LINEAR1 = PREFIX + "double_blocks.0.img_attn.qkv", PREFIX + "single_blocks.1.linear1"
MODULATION = PREFIX + "final_layer.adaLN_modulation.1"


def random_lora(shape, rank=2, alpha=1.0, seed=0, **options):
    draws = torch.Generator().manual_seed(seed)
    adapter = LoRA.create(shape, Options(rank, alpha, **options), draws)
    return adapter.with_tensors({name: torch.randn(t.shape, generator=draws) for name, t in adapter.tensors.items()})


def random_weight(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same(one, other, shapes):
    assert one.adapters.keys() == other.adapters.keys()
    for path, adapter in one.adapters.items():
        weight, bias = random_weight(shapes[path]), random_weight(shapes[path][:1])
        torch.testing.assert_close(adapter.merged(weight), other.adapters[path].merged(weight), rtol=1e-5, atol=1e-5)
        ours, theirs = adapter.merged_bias(bias), other.adapters[path].merged_bias(bias)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def round_trip(adapters, shapes, dialect, tmp_path):
    file = LoRAFile(adapters, {"ss_seed": "1"}, names=NameTable(shapes))
    path = write_lora(file, tmp_path / "x.safetensors", dialect)
    again = read_lora(path, shapes)
    assert not again.unplaced and again.metadata["ss_seed"] == "1"
    same(file, again, shapes)
    return load_tensors(path)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_plain_loras(dialect, tmp_path):
    shapes = unet() | CLIP
    paths = [PREFIX + KEY, PREFIX + CONV, *([] if dialect == "peft" else CLIP)]
    adapters = {path: random_lora(shapes[path], seed=n) for n, path in enumerate(paths)}
    written = round_trip(adapters, shapes, dialect, tmp_path)
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
    flat = stem.replace(".", "_")
    assert {
        "native": f"lora_unet_{flat}.lora_down.weight",
        "kohya": f"lora_unet_{flat}.lora_down.weight",
        "lycoris": f"lycoris_{flat}.lora_down.weight",
        "diffusers": f"unet.{stem}.lora_A.weight",
        "peft": f"base_model.model.{stem}.lora_A.weight",
    }[dialect] in written
    assert any(key.endswith(".alpha") for key in written) != DIALECTS[dialect].peft


@pytest.mark.parametrize("dialect", DIALECTS)
def test_fused_layers(dialect, tmp_path):
    """Read and written in pieces where the dialect has it so."""
    shapes = flux()
    adapters = {
        QKV: random_lora((24, 8)),
        LINEAR1: random_lora((56, 8), 3, 2.0),
        MODULATION: random_lora((16, 8)),
    }
    written = round_trip(adapters, shapes, dialect, tmp_path)
    pieces = dialect in ("diffusers", "peft", "lycoris")
    assert len({key.rpartition(".lora")[0] for key in written if ".lora" in key}) == (8 if pieces else 3)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("alphas", [(1.0, 1.0), (1.0, 3.0)])
def test_pieces_of_fused_layers(dialect, alphas, tmp_path):
    shapes = flux()
    q, k = (random_lora((8, 8), 2, alpha, n) for n, alpha in enumerate(alphas))
    v = random_lora((8, 8), 4, 2 * alphas[1], 7)
    adapters = {
        QKV: Sum([Sliced(a, start, 8, (24, 8)) for start, a in ((0, q), (8, k), (16, v))]),
        LINEAR1: Sliced(q, 8, 8, (56, 8)),
        MODULATION: Swapped(random_lora((16, 8))),
    }
    round_trip(adapters, shapes, dialect, tmp_path)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_sums(dialect, tmp_path):
    shapes = unet()
    several = Sum([random_lora((6, 4)), random_lora((6, 4), 3, 3.0, 1)])
    convolution = Sum([random_lora((6, 4, 3, 3)), random_lora((6, 4, 3, 3), 3, 2.0, 1)])
    round_trip({PREFIX + KEY: several, PREFIX + CONV: convolution}, shapes, dialect, tmp_path)
    half = LoRAFile({PREFIX + KEY: several}, names=NameTable(shapes))
    rank = {"diffusers": "lora_A", "peft": "lora_A"}.get(dialect, "lora_down")
    assert next(t for key, t in to_tensors(half, dialect).items() if rank in key).shape == (5, 4)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_tuckers_core(dialect, tmp_path):
    adapter = random_lora((6, 4, 3, 3), tucker=True)
    assert adapter.mid is not None
    round_trip({PREFIX + CONV: adapter}, unet(), dialect, tmp_path)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_difference_of_the_bias(dialect, tmp_path):
    both = Sum([random_lora((6, 4)), Full({"diff_b": torch.randn(6)}, (6, 4))])
    round_trip({PREFIX + KEY: both}, unet(), dialect, tmp_path)


@pytest.mark.parametrize("dialect", ["native", "kohya", "lycoris"])
def test_a_pair_and_a_difference_become_one_difference(dialect, tmp_path):
    """The host would take one of them."""
    both = Sum([random_lora((6, 4)), Full({"diff": torch.randn(6, 4), "diff_b": torch.randn(6)}, (6, 4))])
    written = round_trip({PREFIX + KEY: both}, unet(), dialect, tmp_path)
    assert {key.rpartition(".")[2] for key in written} == {"diff", "diff_b"}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.dora])
def test_dora(family, dialect, tmp_path):
    shapes = unet()
    adapters = {}
    for path in (PREFIX + KEY, PREFIX + CONV):
        weight = random_weight(shapes[path]).float()
        options = Options(2, 1.0, dora="output")
        adapters[path] = randomised(
            make_adapter(family, shapes[path], options, torch.Generator().manual_seed(1), weight)
        )
    if family != "LoRA" and DIALECTS[dialect].peft:
        with pytest.raises(ValueError, match=f"{dialect} files cannot hold .*dora_scale"):
            to_tensors(LoRAFile(adapters, names=NameTable(shapes)), dialect)
        return
    round_trip(adapters, shapes, dialect, tmp_path)


@pytest.mark.parametrize("case", [case for case in CASES if case.layer in ("linear", "conv2d", "conv3d")], ids=str)
@pytest.mark.parametrize("dialect", ["native", "kohya", "lycoris"])
def test_every_family(case, dialect, tmp_path):
    """Train, save, read back: the same difference, alpha, norms and biases."""
    module, adapter, _ = build(case, torch.float32)
    adapter = randomised(adapter)
    shapes = {PREFIX + "body.layer": tuple(module.weight.shape)}
    file = LoRAFile({PREFIX + "body.layer": adapter}, names=NameTable(shapes))
    again = read_lora(write_lora(file, tmp_path / "x.safetensors", dialect), shapes)
    assert not again.unplaced and not again.notes
    same(file, again, shapes)
    alpha = again.adapters[PREFIX + "body.layer"].alpha
    assert (alpha, adapter.alpha) == (None, None) or alpha == pytest.approx(adapter.alpha, rel=1e-6)


PEFT_FAMILIES = ("LoRA", "LoHa", "LoKr", "OFTv2")
PEFT_CASES = [c for c in CASES if c.layer == "linear" and c.family in PEFT_FAMILIES and not c.options.dora]


@pytest.mark.parametrize("case", PEFT_CASES, ids=str)
def test_peft_files_of_other_families(case, tmp_path):
    module, adapter, _ = build(case, torch.float32)
    shapes = {"body.layer": tuple(module.weight.shape)}
    file = LoRAFile({"body.layer": randomised(adapter)}, names=NameTable(shapes))
    again = read_lora(write_lora(file, tmp_path / "adapter_model.safetensors", "peft"), shapes)
    assert not again.unplaced
    same(file, again, shapes)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == ["body.layer"]
    assert json.loads(again.metadata["adapter_config"]) == config


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_dtypes_stay(dialect, dtype, tmp_path):
    shapes = flux()
    adapters = {QKV: random_lora((24, 8), 4, 2.0).to(dtype=dtype)}
    file = LoRAFile(adapters, names=NameTable(shapes))
    path = write_lora(file, tmp_path / "x.safetensors", dialect)
    assert {t.dtype for key, t in load_tensors(path).items() if "alpha" not in key} == {dtype}
    same(file, read_lora(path, shapes), shapes)


def test_a_file_read_without_the_model_is_written_under_its_own_names(tmp_path):
    keys = lora("lora_unet_one", (6, 4), 2, 1.0) | lora("two.b", (6, 4), 2, 1.0)
    path = write_lora(read_lora(keys), tmp_path / "x.safetensors", "kohya")
    again = load_tensors(path)
    assert again.keys() == keys.keys() and all(torch.equal(again[key], keys[key]) for key in keys)
    with pytest.raises(ValueError, match="lora_unet_one: only the model tells what it is called in peft files"):
        to_tensors(read_lora(keys), "peft")
    dotted = to_tensors(read_lora(lora("two.b", (6, 4), 2, 1.0)), "peft")
    assert dotted.keys() == {"base_model.model.two.b.lora_A.weight", "base_model.model.two.b.lora_B.weight"}


def test_embeddings_are_kept(tmp_path):
    file = dataclasses.replace(read_lora(lora("a", (6, 4))), embeddings={"sks": {"clip_l": torch.ones(2, 4)}})
    assert "bundle_emb.sks.clip_l" in to_tensors(file)
    again = read_lora(write_lora(file, tmp_path / "x.safetensors"))
    assert torch.equal(again.embeddings["sks"]["clip_l"], torch.ones(2, 4))


def test_what_a_dialect_cannot_hold_is_named():
    shapes = unet() | CLIP
    table = NameTable(shapes)
    text = {PREFIX + KEY: random_lora((6, 4)), next(iter(CLIP)): random_lora((6, 6))}
    difference = {PREFIX + KEY: Full({"diff": torch.ones(6, 4)}, (6, 4))}
    with pytest.raises(ValueError, match="there is no dialect 'sd'; choose one of native"):
        to_tensors(LoRAFile({}), "sd")
    with pytest.raises(ValueError, match="one component and one kind of adapter, not text_encoder., unet."):
        to_tensors(LoRAFile(text, names=table), "peft")
    with pytest.raises(ValueError, match="to_k: diffusers files cannot hold diff; write kohya, lycoris or native"):
        to_tensors(LoRAFile(difference, names=table), "diffusers")
    with pytest.raises(ValueError, match=f"{PREFIX}elsewhere"):
        to_tensors(LoRAFile({PREFIX + "elsewhere": random_lora((6, 4))}, names=table))
    rotations = make_adapter("OFT", (6, 4), Options(block_size=2), torch.Generator())
    with pytest.raises(ValueError, match="depends on the weight"):
        to_tensors(LoRAFile({PREFIX + KEY: Sum([rotations, random_lora((6, 4))])}, names=table))


def test_rotations_of_a_fused_layer_are_numbered(tmp_path):
    """kohya's OFT for Flux."""
    blocks = {n: torch.randn(2, 4, 4) * 0.3 for n in range(3)}
    keys = {f"oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.{n}": tensor for n, tensor in blocks.items()}
    keys |= {"oft_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(0.01)}
    file = read_lora(keys, flux())
    assert not file.unplaced
    written = to_tensors(file, "kohya")
    assert written.keys() == {key.replace("oft_unet", "lora_unet") for key in keys}
    for dialect in ("kohya", "lycoris", "native"):
        same(file, read_lora(write_lora(file, tmp_path / "x.safetensors", dialect), flux()), flux())


def test_a_configuration_left_from_another_file_is_not_followed(tmp_path):
    path = tmp_path / "adapter_model.safetensors"
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 64}))
    file = LoRAFile({PREFIX + KEY: random_lora((6, 4))}, names=NameTable(unet()))
    same(file, read_lora(write_lora(file, path, "diffusers"), unet()), unet())


@pytest.mark.parametrize("dialect", ["native", "kohya", "lycoris"])
def test_control_loras(dialect):
    """A bias beside a pair that makes its layer wider, and another scale of a norm."""
    keys = lora("img_in", (8, 10), 4, down=".lora_A.weight", up=".lora_B.weight")
    keys |= {"img_in.lora_B.bias": torch.randn(8)}
    keys |= {"double_blocks.0.img_attn.norm.query_norm.scale": torch.randn(4)}
    file = read_lora(keys, flux())
    again = read_lora(to_tensors(file, dialect), flux())
    assert not file.unplaced and not again.unplaced
    same(file, again, flux())


ON_FUSED = ("LoRA", "LoHa", "LoKr", "full", "IA3", "GLoRA", "OFTv2")


@pytest.mark.parametrize("dora", ["", "output", "input"])
@pytest.mark.parametrize("family", ON_FUSED)
@pytest.mark.parametrize("dialect", ["native", "kohya", "lycoris"])
def test_families_on_fused_layers(family, dialect, dora):
    """Trained on a layer as a whole, and held in pieces or with its halves exchanged."""
    if dora and not FAMILIES[family].dora:
        return
    shapes, adapters = flux(), {}
    for path in (QKV, LINEAR1, MODULATION):
        cut = dialect == "lycoris" and (path != MODULATION or family == "LoKr")
        if dora and cut and (dora == "input" or family == "LoKr"):
            continue  # norms of all rows together, or factors that cannot be cut
        weight = random_weight(shapes[path]).float()
        options = Options(2, 1.5, dora=dora, block_size=4)
        made = make_adapter(family, shapes[path], options, torch.Generator().manual_seed(1), weight)
        adapters[path] = randomised(made)
    file = LoRAFile(adapters, names=NameTable(shapes))
    again = read_lora(to_tensors(file, dialect), shapes)
    assert not again.unplaced
    same(file, again, shapes)


@pytest.mark.parametrize("family", ["LoHa", "LoKr", "full", "OFTv2"])
@pytest.mark.parametrize("dialect", ["native", "kohya", "lycoris"])
def test_halves_exchanged_of_families(family, dialect):
    """As read from files of diffusers' names."""
    made = make_adapter(family, (16, 8), Options(2, 1.0, block_size=4), torch.Generator().manual_seed(1))
    file = LoRAFile({MODULATION: Swapped(randomised(made))}, names=NameTable(flux()))
    same(file, read_lora(to_tensors(file, dialect), flux()), flux())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dora_on_every_part_of_a_fused_layer(dialect):
    parts = []
    for n, rank in enumerate((2, 3, 4)):
        weight = random_weight((8, 8)).float()
        options = Options(rank, 1.0, dora="output")
        made = randomised(make_adapter("LoRA", (8, 8), options, torch.Generator().manual_seed(n), weight))
        parts.append(Sliced(made, 8 * n, 8, (24, 8)))
    file = LoRAFile({QKV: Sum([parts[1], parts[2], parts[0]])}, names=NameTable(flux()))
    same(file, read_lora(to_tensors(file, dialect), flux()), flux())


@pytest.mark.parametrize("dialect", ["diffusers", "peft"])
def test_dora_on_some_layers_only_is_refused(dialect):
    """PEFT and diffusers give norms to every layer of a file that has them on one."""
    weight = random_weight((6, 4)).float()
    dora = randomised(make_adapter("LoRA", (6, 4), Options(2, dora="output"), torch.Generator().manual_seed(1), weight))
    paths = [path for path in unet() if path.endswith(("attn1.to_k", "attn1.to_q"))][:2]
    file = LoRAFile({paths[0]: dora, paths[1]: random_lora((6, 4))}, names=NameTable(unet()))
    with pytest.raises(ValueError, match="DoRA on all of its layers or on none"):
        to_tensors(file, dialect)


@pytest.mark.parametrize("name", ["lora_te1_text_model_q", "lora_te_text_model_q"])
def test_flat_names_of_text_encoders_are_not_translated_without_the_model(name):
    with pytest.raises(ValueError, match=f"{name}: only the model tells what it is called in diffusers files"):
        to_tensors(read_lora(lora(name, (6, 4))), "diffusers")
