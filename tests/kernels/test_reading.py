"""The reader: every dialect, what adds up, what finds no place and why, what is put right and told."""

import itertools
import json
import math

import pytest
import torch

from adapter_files import CLIP, CONV, KEY, PREFIX, close, flux, lora, pair, product, unet
from lora_loom.kernels.architectures import same_base
from lora_loom.kernels.compose import Sliced, Sum
from lora_loom.kernels.reading import (
    DAMAGED,
    DUPLICATE,
    INCOMPLETE,
    NO_ENCODER,
    SHAPE,
    UNKNOWN,
    WRONG_BASE,
    read_lora,
)
from lora_loom.kernels.reading import PREFIX as STRANGE_PREFIX
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors

DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"
FLAT = DIFFUSERS.replace(".", "_")
SHAPE_OF = unet()[PREFIX + KEY]
CLIP_PATH = next(iter(CLIP))
CLIP_LAYER = "text_model.encoder.layers.0.self_attn.q_proj"
A, B = ".lora_A.weight", ".lora_B.weight"

UNET_NAMES = {  # who writes it -> name of the layer, ends of down and up
    "kohya": ("lora_unet_" + FLAT, ".lora_down.weight", ".lora_up.weight"),
    "LyCORIS wrapper": ("lycoris_" + FLAT, ".lora_down.weight", ".lora_up.weight"),
    "host": (PREFIX + KEY, ".lora_down.weight", ".lora_up.weight"),
    "host, PEFT's ends": (PREFIX + KEY, A, B),
    "PEFT": ("base_model.model." + DIFFUSERS, A, B),
    "PEFT, raw": ("base_model.model." + DIFFUSERS, ".lora_A.default.weight", ".lora_B.default.weight"),
    "PEFT, named": ("base_model.model." + DIFFUSERS, ".lora_A.my-style_2.weight", ".lora_B.my-style_2.weight"),
    "PEFT, flash": ("unet.base_model.model." + DIFFUSERS, A, B),
    "diffusers": ("unet." + DIFFUSERS, A, B),
    "diffusers, layers": ("unet." + DIFFUSERS, ".lora.down.weight", ".lora.up.weight"),
    "diffusers, processors": (
        "unet." + DIFFUSERS.replace("to_k", "processor.to_k"), "_lora.down.weight", "_lora.up.weight"
    ),
    "diffusers, linear layers": ("unet." + DIFFUSERS, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "Mochi": (PREFIX + KEY, ".lora_A", ".lora_B"),
    "OneTrainer, internal": ("unet." + DIFFUSERS, ".lora_down.weight", ".lora_up.weight"),
    "OneTrainer, original": (KEY, A, B),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 1.0])
@pytest.mark.parametrize("dialect", UNET_NAMES)
def test_every_spelling_of_a_layer(dialect, alpha):
    name, down, up = UNET_NAMES[dialect]
    file = read_lora(lora(name, SHAPE_OF, 2, alpha, down, up), unet())
    assert not file.unplaced and not file.notes
    assert file.adapters.keys() == {PREFIX + KEY}
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF), (alpha or 2) / 2))


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_" + CLIP_LAYER.replace(".", "_"),
        "lora_te1_" + CLIP_LAYER.replace(".", "_"),
        "text_encoder." + CLIP_LAYER,
        "text_encoders." + CLIP_PATH,
        CLIP_PATH,
    ],
)
def test_text_encoders(name):
    keys = lora(name, (6, 6)) | lora("lora_unet_" + FLAT, SHAPE_OF)
    both = read_lora(keys, unet() | CLIP)
    assert both.adapters.keys() == {CLIP_PATH, PREFIX + KEY} and not both.unplaced
    without = read_lora(keys, unet())
    assert without.adapters.keys() == {PREFIX + KEY}
    assert {item.reason for item in without.unplaced} == {NO_ENCODER}
    assert {item.key for item in without.unplaced} == {key for key in keys if key.startswith(name)}


T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"
T5_PATH = "t5xxl.transformer." + T5_LAYER


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("clip_l." + CLIP_LAYER, CLIP_PATH), ("t5." + T5_LAYER, T5_PATH), ("t5xxl." + T5_LAYER, T5_PATH)],
)
def test_text_encoders_by_their_own_names(name, wanted):
    """OneTrainer's earlier files, and those without a prefix."""
    file = read_lora(lora(name, (6, 6)), CLIP | {T5_PATH: (6, 6)})
    assert file.adapters.keys() == {wanted}
    assert {item.reason for item in read_lora(lora(name, (6, 6)), unet()).unplaced} == {NO_ENCODER}


@pytest.mark.parametrize("name", ["lora_te2_" + CLIP_LAYER.replace(".", "_"), "text_encoder_2." + CLIP_LAYER])
def test_one_of_two_text_encoders_is_absent(name):
    keys = lora("lora_te1_" + CLIP_LAYER.replace(".", "_"), (6, 6)) | lora(name, (6, 6))
    file = read_lora(keys, unet() | CLIP)
    assert file.adapters.keys() == {CLIP_PATH}
    assert {item.reason for item in file.unplaced} == {NO_ENCODER}


def test_convolutions_and_points():
    """A 1×1 convolution and a linear layer differ by trailing ones only."""
    conv, point = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_" + FLAT
    down, up = pair(SHAPE_OF)
    keys = lora(conv, (6, 4, 3, 3)) | {f"{point}.lora_down.weight": down[..., None, None]}
    file = read_lora(keys | {f"{point}.lora_up.weight": up[..., None, None]}, unet())
    assert not file.unplaced
    assert close(file.adapters[PREFIX + CONV], (6, 4, 3, 3), product(*pair((6, 4, 3, 3))))
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(down, up))


def test_without_targets_the_names_stay():
    keys = lora("lora_unet_" + FLAT, SHAPE_OF) | lora("some.strange layer", (5, 3), 1, 2.0)
    file = read_lora(keys)
    assert file.adapters.keys() == {"lora_unet_" + FLAT, "some.strange layer"}
    assert not file.unplaced and file.names is None
    assert close(file.adapters["some.strange layer"], (5, 3), product(*pair((5, 3), 1), 2.0))


def test_any_module_tree():
    targets = {"body.0.proj": (6, 4), "head": (3, 6)}
    for name in ("base_model.model.body.0.proj", "lora_unet_body_0_proj", "lycoris_body_0_proj", "body.0.proj"):
        assert read_lora(lora(name, (6, 4)), targets).adapters.keys() == {"body.0.proj"}


# ---------------------------------------------------------------- fused layers


def test_slices_of_fused_layers_add_up():
    name = "transformer.transformer_blocks.1.attn."
    keys = {}
    for n, leaf in enumerate(("to_q", "to_k", "to_v")):
        keys |= lora(name + leaf, (8, 8), 2 + n, down=A, up=B, seed=n)
    file = read_lora(keys, flux())
    assert not file.unplaced and file.architecture == "flux"
    path = PREFIX + "double_blocks.1.img_attn.qkv"
    adapter = file.adapters[path]
    assert isinstance(adapter, Sum) and all(isinstance(part, Sliced) for part in adapter.parts)
    wanted = torch.cat([product(*pair((8, 8), 2 + n, n)) for n in range(3)])
    assert close(adapter, (24, 8), wanted)


FLUX_SPLIT, FLUX_FUSED = "transformer_blocks.0.attn.to_k", "double_blocks.0.img_attn.qkv"
FLUX_NAMES = {  # who writes it -> name, ends of down and up, whether alpha is stored
    "OneTrainer, DIFFUSERS": ("transformer." + FLUX_SPLIT, A, B, False),
    "OneTrainer, KOHYA": ("lora_unet_" + FLUX_FUSED.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True),
    "OneTrainer, LEGACY": (
        "lora_transformer_" + FLUX_SPLIT.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True
    ),
    "OneTrainer, ORIGINAL": (FLUX_FUSED, A, B, True),
    "OneTrainer, COMFY": ("diffusion_model." + FLUX_FUSED, A, B, True),
    "OneTrainer, INTERNAL": ("transformer." + FLUX_SPLIT, ".lora_down.weight", ".lora_up.weight", True),
    "ai-toolkit": ("transformer." + FLUX_SPLIT, A, B, False),
    "ai-toolkit, native": ("diffusion_model." + FLUX_FUSED, A, B, False),
    "ai-toolkit, old LoKr's names": (
        "lycoris_" + FLUX_SPLIT.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True
    ),
    "musubi": ("lora_unet_" + FLUX_FUSED.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True),
    "musubi, converted": ("diffusion_model." + FLUX_FUSED, A, B, False),
    "diffusion-pipe": ("diffusion_model." + FLUX_FUSED, A, B, False),
    "diffusion-pipe, older": ("transformer." + FLUX_SPLIT, A, B, False),
    "SimpleTuner": ("lycoris_" + FLUX_SPLIT.replace(".", "_"), ".lora_down.weight", ".lora_up.weight", True),
    "the projection alone": ("diffusion_model.single_blocks.0.linear1_qkv", A, B, False),
}  # fmt: skip


@pytest.mark.parametrize("dialect", FLUX_NAMES)
def test_trainers_of_transformers(dialect):
    name, down, up, with_alpha = FLUX_NAMES[dialect]
    split = FLUX_SPLIT.replace(".", "_") in name.replace(".", "_")
    shape = (8, 8) if split else (24, 8)
    file = read_lora(lora(name, shape, 2, 1.0 if with_alpha else None, down, up), flux())
    assert not file.unplaced and not file.notes
    wanted = product(*pair(shape), 0.5 if with_alpha else 1.0)
    if split:
        wanted = torch.cat([torch.zeros(8, 8), wanted, torch.zeros(8, 8)])
    path, whole = FLUX_FUSED, (24, 8)
    if "linear1" in name:
        path, whole, wanted = "single_blocks.0.linear1", (56, 8), torch.cat([wanted, torch.zeros(32, 8)])
    assert file.adapters.keys() == {PREFIX + path}
    assert close(file.adapters[PREFIX + path], whole, wanted)


def test_kohyas_oft_of_flux():
    """One rotation for each part of a fused layer, with a constraint of its own."""
    blocks = [torch.randn(2, 4, 4) for _ in range(3)]
    name = "oft_unet_double_blocks_0_img_attn_qkv"
    keys = {f"{name}.oft_blocks.{n}": part for n, part in enumerate(blocks)} | {f"{name}.alpha": torch.tensor(0.05)}
    file = read_lora(keys, flux())
    assert not file.unplaced
    weight, rows = torch.randn(24, 8), []
    for n, part in enumerate(blocks):
        q = part - part.mT
        q = q * (0.05 * 8 / q.norm()).clamp(max=1)
        turn = (torch.eye(4) + q) @ torch.linalg.inv(torch.eye(4) - q)
        rows.append(torch.einsum("bnp,bnm->bpm", turn, weight[8 * n : 8 * n + 8].view(2, 4, 8)).reshape(8, 8))
    adapter = file.adapters[PREFIX + "double_blocks.0.img_attn.qkv"]
    assert torch.allclose(adapter.merged(weight), torch.cat(rows), atol=1e-5)


def test_scale_and_shift_are_exchanged():
    keys = lora("transformer.norm_out.linear", (16, 8), down=A, up=B)
    adapter = read_lora(keys, flux()).adapters[PREFIX + "final_layer.adaLN_modulation.1"]
    wanted = product(*pair((16, 8)))
    assert close(adapter, (16, 8), torch.cat([wanted[8:], wanted[:8]]))


@pytest.mark.parametrize("singles", [True, False])
def test_xlabs(singles):
    """The host reads such a file only if it has all blocks of both kinds."""
    name = "double_blocks.0.processor."
    keys = lora(name + "qkv_lora1", (24, 8), down=".down.weight", up=".up.weight")
    keys |= lora(name + "proj_lora2", (8, 8), down=".down.weight", up=".up.weight", seed=1)
    wanted = {"double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj"}
    if singles:
        keys |= lora("single_blocks.1.processor.qkv_lora", (24, 8), down=".down.weight", up=".up.weight", seed=2)
        keys |= lora("single_blocks.1.processor.proj_lora", (8, 40), down=".down.weight", up=".up.weight", seed=3)
        wanted |= {"single_blocks.1.linear1", "single_blocks.1.linear2"}
    file = read_lora(keys, flux())
    assert file.adapters.keys() == {PREFIX + path for path in wanted} and not file.unplaced
    assert file.architecture == "flux"
    if singles:
        rows = torch.cat([product(*pair((24, 8), seed=2)), torch.zeros(32, 8)])
        assert close(file.adapters[PREFIX + "single_blocks.1.linear1"], (56, 8), rows)


def test_bfl_control():
    """Control LoRAs of Black Forest Labs: biases, other scales of norms, more inputs than the model has."""
    keys = lora("img_in", (8, 10), 4, down=A, up=B) | {"img_in.lora_B.bias": torch.arange(8.0)}
    keys |= lora("double_blocks.0.img_attn.qkv", (24, 8), 4, down=A, up=B)
    keys |= {
        "double_blocks.0.img_attn.qkv.lora_B.bias": torch.arange(24.0),
        "double_blocks.0.img_attn.norm.query_norm.scale": torch.tensor([1.0, 2.0, 3.0, 4.0]),
    }
    file = read_lora(keys, flux())
    assert not file.unplaced
    qkv = file.adapters[PREFIX + "double_blocks.0.img_attn.qkv"]
    assert close(qkv, (24, 8), product(*pair((24, 8), 4)))
    assert torch.allclose(qkv.merged_bias(torch.ones(24), 0.5), 1 + torch.arange(24.0) / 2)
    norm = file.adapters[PREFIX + "double_blocks.0.img_attn.norm.query_norm.scale"]
    assert torch.allclose(norm.merged(torch.ones(4), 0.5), torch.tensor([1.0, 1.5, 2.0, 2.5]))
    weight = torch.randn(8, 4)
    wider = file.adapters[PREFIX + "img_in"].merged(weight)
    padded = torch.nn.functional.pad(weight, (0, 6))
    assert torch.allclose(wider, padded + product(*pair((8, 10), 4)).float(), atol=1e-5)
    assert torch.allclose(file.adapters[PREFIX + "img_in"].merged_bias(torch.zeros(8)), torch.arange(8.0))


# ---------------------------------------------------------------- several adapters on one layer


def test_adapters_of_two_names_add_up():
    name = "base_model.model." + DIFFUSERS
    keys = lora(name, SHAPE_OF, 2, None, ".lora_A.one.weight", ".lora_B.one.weight")
    keys |= lora(name, SHAPE_OF, 3, None, ".lora_A.two.weight", ".lora_B.two.weight", seed=1)
    file = read_lora(keys, unet())
    assert not file.unplaced
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF)) + product(*pair(SHAPE_OF, 3, 1)))


def test_what_carries_no_adapter_name_belongs_to_those_that_do():
    name = "base_model.model." + DIFFUSERS
    keys = lora(name, SHAPE_OF, 2, 1.0, ".lora_A.one.weight", ".lora_B.one.weight")
    file = read_lora(keys, unet())
    assert not file.unplaced
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF), 0.5))


def test_two_spellings_of_a_layer_add_up_and_copies_count_once():
    first = lora("lora_unet_" + FLAT, SHAPE_OF)
    other = lora("unet." + DIFFUSERS, SHAPE_OF, 3, None, A, B, seed=1)
    copy = lora("lycoris_" + FLAT, SHAPE_OF)
    file = read_lora(first | other | copy, unet())
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF)) + product(*pair(SHAPE_OF, 3, 1)))
    assert {(item.key, item.reason) for item in file.unplaced} == {(key, DUPLICATE) for key in copy}


def test_what_differs_in_more_than_its_numbers_is_no_copy():
    keys = {f"lora_unet_{FLAT}.weight": torch.ones(4), f"lora_unet_{FLAT}.on_input": torch.tensor(1)}
    other = {f"lycoris_{FLAT}.weight": torch.ones(4), f"lycoris_{FLAT}.on_input": torch.tensor(0)}
    square = {path: (4, 4) for path in unet()}
    file = read_lora(keys | other, square)
    assert not file.unplaced and isinstance(file.adapters[PREFIX + KEY], Sum)


@pytest.mark.parametrize("order", itertools.permutations(range(4)))
def test_two_spellings_of_parts_add_up(order):
    """Each factor goes with the one that is spelled alike, wherever it stands in the file."""
    name = "unet." + DIFFUSERS
    keys = list((lora(name, SHAPE_OF) | lora(name, SHAPE_OF, 2, None, A, B, seed=1)).items())
    file = read_lora(dict(keys[n] for n in order), unet())
    assert not file.unplaced
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF)) + product(*pair(SHAPE_OF, 2, 1)))


def test_a_difference_beside_named_adapters_counts_once():
    name = "base_model.model." + DIFFUSERS
    keys = lora(name, SHAPE_OF, 2, None, ".lora_A.one.weight", ".lora_B.one.weight")
    keys |= lora(name, SHAPE_OF, 3, None, ".lora_A.two.weight", ".lora_B.two.weight", seed=1)
    file = read_lora(keys | {name + ".diff": torch.ones(SHAPE_OF), name + ".diff_b": torch.ones(6)}, unet())
    adapter = file.adapters[PREFIX + KEY]
    assert not file.unplaced
    assert close(adapter, SHAPE_OF, product(*pair(SHAPE_OF)) + product(*pair(SHAPE_OF, 3, 1)) + 1)
    assert torch.equal(adapter.merged_bias(torch.zeros(6)), torch.ones(6))


def test_a_pair_and_a_difference_add_up():
    """The host takes the last of them."""
    keys = lora("lora_unet_" + FLAT, SHAPE_OF, 2, 1.0)
    keys |= {f"lora_unet_{FLAT}.diff": torch.ones(SHAPE_OF), f"lora_unet_{FLAT}.diff_b": torch.ones(6)}
    file = read_lora(keys, unet())
    assert not file.unplaced
    adapter = file.adapters[PREFIX + KEY]
    assert close(adapter, SHAPE_OF, product(*pair(SHAPE_OF), 0.5) + 1)
    assert torch.equal(adapter.merged_bias(torch.zeros(6)), torch.ones(6))


# ---------------------------------------------------------------- what finds no place


def one_reason(keys, targets, reason, detail=""):
    file = read_lora(lora("lora_unet_" + FLAT, SHAPE_OF) | keys, targets)
    assert {item.key for item in file.unplaced} == keys.keys()
    assert {item.reason for item in file.unplaced} == {reason}
    assert all(detail in item.detail for item in file.unplaced), file.unplaced
    return file


def test_another_base_model():
    file = read_lora(lora("lora_unet_" + FLAT.replace("attn1", "attn2"), (640, 768)), flux())
    assert not file.adapters
    assert file.architecture == "sd1"
    assert {item.reason for item in file.unplaced} == {WRONG_BASE}
    assert "was made for sd1" in file.unplaced[0].detail and "the model is flux" in file.unplaced[0].detail


@pytest.mark.parametrize(
    ("keys", "reason", "detail"),
    [
        (lora("lora_unet_up_blocks_9_conv", (6, 4)), WRONG_BASE, "does not have"),
        (lora("my.own.layer", (6, 4)), STRANGE_PREFIX, "called"),
        (lora(f"unet.{DIFFUSERS.replace('to_k', 'to_v')}", (6, 5)), SHAPE, "(2, 5)"),
        ({f"unet.{DIFFUSERS.replace('to_k', 'to_v')}.lora_up.weight": torch.ones(6, 2)}, INCOMPLETE, "lora_down"),
        ({f"unet.{DIFFUSERS.replace('to_k', 'to_v')}.alpha": torch.tensor(1.0)}, INCOMPLETE, "alpha"),
        ({"lora_unet_" + FLAT + ".unheard_of": torch.ones(2)}, UNKNOWN, "no part"),
        ({"note": torch.ones(2)}, UNKNOWN, "no part"),
        (lora("lora_unet_time_embed_0", (6, 4), 2, math.nan), DAMAGED, "not a number"),
        ({"lora_unet_conv_in.diff": torch.full((6, 4), math.nan)}, DAMAGED, "NaN"),
        ({"lora_unet_conv_in.diff": torch.ones((6, 4), dtype=torch.int8)}, DAMAGED, "int8"),
        ({"lora_unet_conv_in.diff": torch.ones((0, 4))}, DAMAGED, "empty"),
    ],
)  # fmt: skip
def test_reasons(keys, reason, detail):
    one_reason(keys, unet(), reason, detail)


def test_nothing_but_damage_is_an_error(tmp_path):
    path = save_tensors({"lora_unet_conv_in.diff": torch.full((6, 4), math.nan)}, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match=r"nan\.safetensors: nothing in it can be used: lora_unet_conv_in\.diff .*NaN"):
        read_lora(path, unet())


def test_what_tools_leave_behind_is_told():
    file = read_lora(lora("lora_unet_" + FLAT, SHAPE_OF) | {"_aux.3f2a": torch.ones(3)}, unet())
    assert not file.unplaced and any("_aux.3f2a" in note for note in file.notes)


# ---------------------------------------------------------------- alpha, and what trainers mean


def test_infinite_alpha():
    """ai-toolkit's default LoKr in float16; the host's result is NaN."""
    w1, w2 = torch.randn(2, 2), torch.randn(3, 2)
    keys = {f"{PREFIX}{KEY}.lokr_w1": w1, f"{PREFIX}{KEY}.lokr_w2": w2}
    file = read_lora(keys | {f"{PREFIX}{KEY}.alpha": torch.tensor(9999999999.0).half()}, unet())
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, torch.kron(w1, w2))
    assert any("infinite alpha" in note for note in file.notes)


PEFT_CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {}, "alpha_pattern": {}}


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (PEFT_CONFIG, 2.0),
        (PEFT_CONFIG | {"use_rslora": True}, 4.0),
        (PEFT_CONFIG | {"alpha_pattern": {"attn1.to_k": 3}}, 0.75),
        (PEFT_CONFIG | {"alpha_pattern": {"to_k": 3, "attn1.to_k": 5}}, 0.75),
        (PEFT_CONFIG | {"alpha_pattern": {r"down_blocks\.\d+\.attentions.*attn1\.to_k": 3}}, 0.75),
        (PEFT_CONFIG | {"alpha_pattern": {"ttn1.to_k": 3, "attn1": 4, "^attn1.to_k": 5}}, 2.0),
        (PEFT_CONFIG | {"r": 16, "rank_pattern": {"to_k": 4}}, 2.0),
        (PEFT_CONFIG | {"r": 16, "rank_pattern": {"to_q": 4}}, 0.5),
        (PEFT_CONFIG | {"lora_alpha": None}, 1.0),
        (PEFT_CONFIG | {"r": 0}, 1.0),
        (PEFT_CONFIG | {"lora_alpha": "8"}, 1.0),
        (PEFT_CONFIG | {"alpha_pattern": [1]}, 2.0),
        ([1], 1.0),
    ],
)
def test_peft_keeps_alpha_in_its_configuration(config, scale):
    keys = lora("base_model.model." + DIFFUSERS, SHAPE_OF, 4, None, A, B)
    file = read_lora(LoraModel(keys, {"adapter_config": json.dumps(config)}), unet())
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF, 4), scale))
    assert bool(file.notes) == (scale != 1)


@pytest.mark.parametrize(
    ("start", "told"), [("pissa_niter_4", True), ("olora", True), ("eva", False), (["pissa"], False)]
)
def test_a_beginning_taken_out_of_the_base_is_told(start, told):
    keys = lora("base_model.model." + DIFFUSERS, SHAPE_OF, 4, None, A, B)
    config = PEFT_CONFIG | {"lora_alpha": 4, "init_lora_weights": start}
    file = read_lora(LoraModel(keys, {"adapter_config": json.dumps(config)}), unet())
    assert any("out of the base model" in note for note in file.notes) == told == bool(file.notes)


@pytest.mark.parametrize("pattern", ["(a+)+$", ".*.*.*x", "a{9999}", "[", "(?R)", "\\"])
def test_patterns_that_could_take_for_ever_are_not_followed(pattern):
    config = PEFT_CONFIG | {"alpha_pattern": {pattern: 3}}
    keys = lora("base_model.model." + DIFFUSERS, SHAPE_OF, 4, None, A, B)
    file = read_lora(LoraModel(keys, {"adapter_config": json.dumps(config)}), unet())
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF, 4), 2.0))
    assert any("not followed" in note for note in file.notes)


def test_diffusers_keeps_a_configuration_for_each_component():
    config = {"unet.r": 4, "unet.lora_alpha": 2, "text_encoder.r": 4, "text_encoder.lora_alpha": 16}
    keys = lora("unet." + DIFFUSERS, SHAPE_OF, 4, None, A, B)
    keys |= lora("text_encoder." + CLIP_LAYER, (6, 6), 4, None, A, B)
    file = read_lora(LoraModel(keys, {"lora_adapter_metadata": json.dumps(config)}), unet() | CLIP)
    assert close(file.adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF, 4), 0.5))
    assert close(file.adapters[CLIP_PATH], (6, 6), product(*pair((6, 6), 4), 4.0))


def test_the_configuration_beside_a_file_of_peft(tmp_path):
    """diffusion-pipe and PEFT write it there; the file itself tells no alpha."""
    keys = lora("diffusion_model." + KEY, SHAPE_OF, 4, None, A, B)
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT_CONFIG))
    path = save_tensors(keys, tmp_path / "adapter_model.safetensors")
    assert close(read_lora(path, unet()).adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF, 4), 2.0))
    other = save_tensors(keys, tmp_path / "other.safetensors")
    assert close(read_lora(other, unet()).adapters[PREFIX + KEY], SHAPE_OF, product(*pair(SHAPE_OF, 4)))


def test_a_bias_behind_the_product_is_scaled_with_it():
    keys = lora("base_model.model." + DIFFUSERS, SHAPE_OF, 4, None, A, B)
    keys |= {f"base_model.model.{DIFFUSERS}.lora_B.bias": torch.ones(6)}
    file = read_lora(LoraModel(keys, {"adapter_config": json.dumps(PEFT_CONFIG)}), unet())
    assert not file.unplaced
    assert torch.equal(file.adapters[PREFIX + KEY].merged_bias(torch.zeros(6)), torch.full((6,), 2.0))


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1.0), (1.0, 0.25), (0.0, 1.0), (math.inf, 1.0)])
def test_two_differences_of_the_bias_add_up(alpha, scale):
    keys = lora("unet." + DIFFUSERS, SHAPE_OF, 4, alpha, A, B)
    keys |= {f"unet.{DIFFUSERS}.lora_B.bias": torch.ones(6), f"unet.{DIFFUSERS}.diff_b": torch.full((6,), 10.0)}
    file = read_lora(keys, unet())
    assert not file.unplaced
    assert torch.equal(file.adapters[PREFIX + KEY].merged_bias(torch.zeros(6)), torch.full((6,), 10 + scale))


def test_a_table_of_tokens():
    targets = {"text.embed": (10, 6)}
    a, b = torch.randn(2, 10), torch.randn(6, 2)
    keys = {"base_model.model.text.embed.lora_embedding_A": a, "base_model.model.text.embed.lora_embedding_B": b}
    assert close(read_lora(keys, targets).adapters["text.embed"], (10, 6), (b @ a).T)


def test_scales_of_dora_by_other_names():
    magnitude = torch.rand(6) + 1
    weight = torch.randn(SHAPE_OF)
    moved = weight + product(*pair(SHAPE_OF)).float()
    wanted = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    for end, stored in (
        (".lora_magnitude_vector", magnitude),
        (".lora_magnitude_vector.weight", magnitude),
        (".lora_magnitude_vector.default.weight", magnitude),
        (".magnitude", magnitude),
        (".dora_scale", magnitude),
        (".dora_scale", magnitude[:, None]),
    ):
        keys = lora("unet." + DIFFUSERS, SHAPE_OF, down=A, up=B)
        file = read_lora(keys | {"unet." + DIFFUSERS + end: stored}, unet())
        assert not file.unplaced
        assert torch.allclose(file.adapters[PREFIX + KEY].merged(weight), wanted, atol=1e-5)


def test_embeddings_that_travel_along():
    keys = lora("lora_unet_" + FLAT, SHAPE_OF)
    keys |= {
        "bundle_emb.sks.dog.clip_l": torch.ones(2, 6),
        "bundle_emb.sks.dog.clip_l_out": torch.ones(2, 6),
        "bundle_emb.moss.string_to_param.*": torch.ones(3, 6),
        "clip_g": torch.ones(1, 8),
        "emb_params": torch.ones(1, 6),
    }
    file = read_lora(LoraModel(keys, {"ss_output_name": "fern"}), unet())
    assert not file.unplaced
    assert {name: set(found) for name, found in file.embeddings.items()} == {
        "sks.dog": {"clip_l", "clip_l_out"},
        "moss": {"string_to_param.*"},
        "fern": {"clip_g", "emb_params"},
    }


# ---------------------------------------------------------------- the guess


@pytest.mark.parametrize(
    ("keys", "metadata", "architecture", "evidence"),
    [
        (lora(f"unet.{DIFFUSERS}", (640, 640)), {}, "sd", "nothing tells"),
        (
            lora("lora_unet_double_blocks_0_img_attn_qkv", (8, 8)),
            {"modelspec.architecture": "Chroma/lora"},
            "chroma",
            "and modelspec.architecture says",
        ),
        (lora(f"unet.{DIFFUSERS}", (640, 640)), {"ss_base_model_version": "sd_v2"}, "sd2", "metadata tells"),
        (lora(f"unet.{DIFFUSERS.replace('attn1', 'attn2')}", (640, 1024)), {}, "sd2", "1024"),
        (lora("lora_unet_input_blocks_4_1_transformer_blocks_1_attn1_to_k", (8, 8)), {}, "sdxl", "only SDXL"),
        (lora("transformer.single_transformer_blocks.3.proj_mlp", (8, 8)), {}, "flux", "proj_mlp"),
        (lora("lora_unet_double_blocks_19_img_attn_qkv", (8, 8)), {}, "hunyuan_video", "double_blocks_19"),
        (lora("transformer.double_blocks.0.img_mlp.fc1", (8, 8)), {}, "hunyuan_video", "fc1"),
        (lora("diffusion_model.blocks.3.cross_attn.k_img", (8, 8)), {}, "wan", "k_img"),
        (lora("lora_unet__blocks_0_cross_attn_k", (8, 8)), {}, "wan", "cross_attn"),
        (lora("transformer.transformer_blocks.0.img_mod.1", (8, 8)), {}, "qwen_image", "img_mod"),
        (lora("x.y", (8, 8)), {"modelspec.architecture": "Flux-1-dev/lora"}, "flux", "modelspec.architecture"),
        (lora("x.y", (8, 8)), {}, None, "known"),
        (
            lora("lora_unet_double_blocks_0_img_attn_qkv", (8, 8)),
            {"ss_base_model_version": "sdxl_base_v1-0"},
            "flux",
            "says 'sdxl_base_v1-0' all the same",
        ),
    ],
)
def test_the_architecture_is_guessed(keys, metadata, architecture, evidence):
    file = read_lora(LoraModel(keys, metadata))
    assert file.architecture == architecture
    assert evidence in file.evidence


@pytest.mark.parametrize(
    ("guessed", "table", "same"),
    [
        *(("hunyuan_video", other, True) for other in ("hunyuan_video15", "hunyuan_image", "hunyuan_video")),
        *(("flux", other, True) for other in ("chroma", "flux2", "hunyuan_video", "hunyuan_image")),
        *(("sd3", other, True) for other in ("flux", "chroma", "qwen_image", "hunyuan_video15")),
        *(("ltxv", other, True) for other in ("ltxav", "pixart", "mochi", "cosmos2", "anima")),
        *(("lumina2", "z_image", True), ("z_image", "lumina2", True), ("cascade_c", "cascade_b", True)),
        *(("cosmos2", "anima", True), ("sd1", "sd", True), ("sd2", "sd", True), ("sd", "sdxl", True)),
        *(("sdxl", "sdxl_refiner", True), (None, "flux", True), ("flux", None, True)),
        *(("sdxl", "sd", False), ("sd1", "sdxl", False), ("wan", "flux", False), ("qwen_image", "flux", False)),
        *(("chroma", "flux", False), ("hunyuan_video", "flux", False), ("sd", "flux", False)),
    ],
)
def test_names_shared_by_several_bases_speak_for_all_of_them(guessed, table, same):
    assert same_base(guessed, table) is same


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_what_a_base_lacks_is_not_said_to_be_of_another(names):
    """A file for Chroma looks like one for Flux wherever it has none of the layers that Chroma alone has."""
    chroma = flux() | {PREFIX + "distilled_guidance_layer.in_proj": (8, 4)}
    layer, other = {
        "diffusers": ("transformer.transformer_blocks.1.attn.to_q", "transformer.single_transformer_blocks.7.proj_out"),
        "kohya": ("lora_unet_double_blocks_1_img_attn_proj", "lora_unet_single_blocks_7_linear2"),
    }[names]
    file = read_lora(lora(layer, (8, 8)) | lora(other, (8, 8)), chroma)
    assert len(file.adapters) == 1
    assert {item.detail for item in file.unplaced} == {"names a layer that the model does not have"}


@pytest.mark.parametrize("end", ("down", "up"))
def test_ia3_on_layers_that_are_called_like_a_factor(end):
    """As in Krea 2; a pair of factors on the layer above is still a pair."""
    path = f"{PREFIX}blocks.0.mlp.{end}"
    targets = {path: (6, 4), f"{PREFIX}blocks.1.mlp": (6, 4)}
    factors = torch.randn(6)
    keys = {f"{path}.weight": factors, f"{path}.on_input": torch.tensor(0)}
    keys |= lora(f"{PREFIX}blocks.1.mlp", (6, 4), down=".down.weight", up=".up.weight")
    read = read_lora(keys, targets)
    assert not read.unplaced and read.adapters.keys() == targets.keys()
    weight = torch.randn(6, 4)
    torch.testing.assert_close(read.adapters[path].merged(weight), weight * (1 + factors[:, None]))
    assert close(read.adapters[f"{PREFIX}blocks.1.mlp"], (6, 4), product(*pair((6, 4))))
