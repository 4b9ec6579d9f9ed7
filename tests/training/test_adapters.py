"""From settings to adapters: every option changes what is built, or is refused."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from lora_loom.kernels.dora import DoRA
from lora_loom.kernels.registry import FAMILIES
from lora_loom.training.adapters import build
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ALGORITHMS, AdapterSettings, ComponentSettings, Plan

SPATIAL = {"layers": "full", "conv_rank": 3}


def unet(width=24):
    def block(number):
        transformer = nn.Module()
        transformer.proj_in = nn.Conv2d(width, width, 1)
        attention = {"to_q": nn.Linear(width, 2 * width, bias=False), "to_out": nn.Linear(width, width)}
        inner = nn.ModuleDict({"attn1": nn.ModuleDict(attention), "ff": nn.Linear(width, 4 * width)})
        transformer.transformer_blocks = nn.ModuleList([inner])
        transformer.proj_out = nn.Conv2d(width, width, 1)
        resnet = nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, bias=number != 1), "norm": nn.GroupNorm(2, width)})
        return nn.Sequential(resnet, transformer)

    inside = nn.Module()
    inside.embed = nn.Linear(4, width)
    inside.input_blocks = nn.ModuleList([block(number) for number in range(3)])
    inside.middle_block = block(3)
    inside.head = nn.Linear(width, 7)
    loaded = nn.Module()
    loaded.diffusion_model = inside
    return loaded


MODEL = unet()


def weight_of(path):
    return MODEL.get_submodule(path).weight.detach().float()


def built(rank=4, alpha=2.0, component="model", **settings):
    return build(MODEL, Plan(rank=rank, alpha=alpha, adapter=AdapterSettings(**settings)), weight_of, component)


def paths(result):
    return [path.removeprefix("diffusion_model.") for path in result.adapters]


def shapes(result):
    return {path: {name: tuple(t.shape) for name, t in adapter.tensors.items()}
            for path, adapter in result.adapters.items()}


# -- families


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_family_on_every_layer(algorithm):
    """A fresh adapter changes nothing, of the right shape, and the note counts layers and numbers."""
    result = built(algorithm=algorithm, block_size=32, **SPATIAL)
    assert len(result.adapters) == 2 + 4 * 6 - (algorithm == "BOFT")
    for path, adapter in result.adapters.items():
        weight = weight_of(path)
        assert adapter.name == algorithm and adapter.shape == tuple(weight.shape)
        torch.testing.assert_close(adapter.merged(weight), weight, rtol=1e-6, atol=1e-6)
    numbers = sum(tensor.numel() for adapter in result.adapters.values() for tensor in adapter.parameters())
    rank = " of rank 4" if "rank" in FAMILIES[algorithm].options else ""
    assert result.notes[0].startswith(f"{algorithm}: ") and f"{numbers:,} numbers" in result.notes[0]
    assert f"layers{rank}, 4 k×k convolutions{' of rank 3' if rank else ''};" in result.notes[0]


def test_layers_that_a_family_does_not_fit_are_left_out_and_named():
    result = built(algorithm="BOFT", layers="full")
    assert "head" not in paths(result)
    assert any("1 layers get no adapter" in note and "an odd number never does" in note for note in result.notes)
    with pytest.raises(OptionError, match="BOFT fits none of the layers: .* 7 outputs"):
        built(algorithm="BOFT", layers="custom", layer_filter="head")


@pytest.mark.parametrize("axis", ["output", "input"])
def test_dora_begins_with_the_norms_of_the_weights(axis):
    result = built(dora=axis, conv_rank=2, layers="full")
    for path, adapter in result.adapters.items():
        weight = weight_of(path)
        dims = [d for d in range(weight.ndim) if d != (axis == "input")]
        assert isinstance(adapter, DoRA)
        torch.testing.assert_close(adapter.magnitude, torch.linalg.vector_norm(weight, dim=dims, keepdim=True))
    assert f"LoRA with DoRA per {axis}: " in result.notes[0]


def test_seed_and_component_decide_the_draws():
    one, same, other = built(), built(), build(MODEL, Plan(seed=1, rank=4), weight_of)
    first, name = next(iter(one.adapters)), "lora_down.weight"
    assert torch.equal(one.adapters[first].tensors[name], same.adapters[first].tensors[name])
    assert not torch.equal(one.adapters[first].tensors[name], other.adapters[first].tensors[name])
    assert not torch.equal(one.adapters[first].tensors[name], built(component="te1").adapters[first].tensors[name])


# -- options of the families


@pytest.mark.parametrize(
    "option, settings",
    [
        ({"tucker": True}, SPATIAL),
        ({"tucker": True}, {"algorithm": "LoHa", **SPATIAL}),
        ({"tucker": True}, {"algorithm": "LoKr", "factor": 1, **SPATIAL}),
        ({"factor": 2}, {"algorithm": "LoKr"}),
        ({"decompose_both": True}, {"algorithm": "LoKr", "rank": 1}),
        ({"full_matrix": True}, {"algorithm": "LoKr", "rank": 1}),
        ({"block_size": 8}, {"algorithm": "OFT"}),
        ({"block_size": 6}, {"algorithm": "BOFT"}),
        ({"block_size": 8}, {"algorithm": "OFTv2"}),
        ({"rescaled": True}, {"algorithm": "OFT"}),
        ({"rescaled": True}, {"algorithm": "BOFT"}),
        ({"train_on_input": True}, {"algorithm": "IA3"}),
        ({"train_bias": True}, {"algorithm": "full"}),
        ({"dora": "output"}, {"algorithm": "LoHa"}),
        ({"dora": "input"}, {"algorithm": "LoKr"}),
        ({"rank": 5}, {}),
        ({"rank": 5}, {"algorithm": "GLoRA"}),
        ({"conv_rank": 5}, SPATIAL),
    ],
)
def test_options_that_change_the_tensors(option, settings):
    assert shapes(built(**{**settings, **option})) != shapes(built(**settings))


@pytest.mark.parametrize(
    "settings, scale",
    [
        ({"alpha": 3.0}, 3 / 4),
        ({"alpha": -2.0}, -2 / 4),
        ({"rs_lora": True}, 2 / math.sqrt(4)),
        ({"rs_lora": True, "algorithm": "LoHa"}, 2 / math.sqrt(4)),
        ({"rs_lora": True, "algorithm": "GLoRA"}, 2 / math.sqrt(4)),
    ],
)
def test_options_that_change_the_strength(settings, scale):
    assert [adapter.scale for adapter in built(**settings).adapters.values()] == pytest.approx([scale] * 20)


def test_convolutions_have_their_own_rank_and_alpha():
    result = built(conv_rank=3, conv_alpha=1.5, layers="full")
    scales = {path.endswith(".conv"): adapter.scale for path, adapter in result.adapters.items()}
    assert scales == {False: 0.5, True: 0.5} and {a.rank for p, a in result.adapters.items() if "conv" in p} == {3}
    assert [a.scale for p, a in built(conv_rank=3, layers="full").adapters.items() if "conv" in p] == [1 / 3] * 4


@pytest.mark.parametrize("kind", ["network", "rank", "module"])
def test_dropouts_reach_the_adapters(kind):
    assert {getattr(a.dropout, kind) for a in built(**{f"{kind}_dropout": 0.25}).adapters.values()} == {0.25}


def test_constraint_and_unit_reach_the_adapters():
    assert {adapter.alpha for adapter in built(algorithm="OFT", constraint=0.01).adapters.values()} == {0.01}
    assert {adapter.unit for adapter in built(algorithm="DyLoRA", unit=2).adapters.values()} == {2}


def test_biases_are_trained_where_there_are_any():
    result = built(algorithm="full", train_bias=True, **SPATIAL)
    for path, adapter in result.adapters.items():
        assert ("diff_b" in adapter.tensors) == (MODEL.get_submodule(path).bias is not None)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"conv_rank": 4}, "conv_rank is 4, expected 0.*'attention.MLP' hold no k×k"),
        ({"conv_alpha": 2.0, "layers": "full"}, "conv_alpha is 2.0, expected 1.0"),
        ({"conv_alpha": 2.0, "algorithm": "OFT", **SPATIAL}, "conv_alpha is 2.0.*OFT has no alpha"),
        ({"layers": "conv"}, "conv_rank is 0, expected more: layers is conv"),
        ({"tucker": True}, "tucker is True, expected False.*no k×k convolution is trained"),
        ({"algorithm": "LoKr", "factor": 24, "rank": 1}, None),
        ({"algorithm": "LoKr", "factor": 1024}, "factor is 1024, expected -1: it has no effect here"),
        ({"algorithm": "LoKr", "decompose_both": True, "rank": 12}, "decompose_both is True.*lower rank"),
        ({"algorithm": "LoKr", "full_matrix": True, "rank": 12}, "full_matrix is True.*full anyway"),
        ({"algorithm": "LoKr", "rs_lora": True, "rank": 12}, "rs_lora is True.*both halves"),
        ({"algorithm": "full", "train_bias": True, "layers": "custom", "layer_filter": "to_q"}, "train_bias is True"),
        ({"algorithm": "DyLoRA", "unit": 3}, "unit is 3, expected a divisor of the rank 4"),
        ({"algorithm": "DyLoRA", "unit": 2, **SPATIAL}, "unit is 2, expected a divisor of the rank 3"),
        *(({"algorithm": name, "loraplus_ratio": 16.0}, f"loraplus_ratio is 16.0, expected 0.0.*{name}")
          for name in ("full", "OFT", "BOFT", "OFTv2", "IA3")),
    ],
)
def test_options_without_effect_are_refused(settings, message):
    if message is None:
        assert built(**settings).adapters
        return
    with pytest.raises(OptionError, match=message):
        built(**settings)


def test_what_is_told():
    assert "rank has no effect: OFT has none" in built(algorithm="OFT").notes
    assert "rank has no effect: OFT has none" not in built(rank=16, alpha=16.0, algorithm="OFT").notes
    assert any("conv_rank only says" in note for note in built(algorithm="IA3", **SPATIAL).notes)
    assert any("whole on 20 of 20 layers, where rank" in note for note in built(algorithm="LoKr", rank=64).notes)
    sizes = "block_size 32 comes out as blocks of 24 on 21, 4 on 1 layers, which they divide into"
    assert sizes in built(algorithm="OFTv2", layers="full").notes
    assert not any("block_size" in note for note in built(algorithm="OFTv2", block_size=24).notes)


# -- which layers


def test_presets():
    attention, both, full, conv = (
        paths(built(layers=preset, conv_rank=rank))
        for preset, rank in (("attention", 0), ("attention+MLP", 0), ("full", 2), ("conv", 2))
    )
    assert len(attention) == 8 and len(both) == 20 and len(full) == 26
    assert conv == [path for path in full if path.endswith("0.conv")] and len(conv) == 4


def test_rules_choose_and_narrow():
    assert paths(built(layers="custom", layer_filter="to_q\nhead")) == [
        *(f"input_blocks.{n}.1.transformer_blocks.0.attn1.to_q" for n in range(3)),
        "middle_block.1.transformer_blocks.0.attn1.to_q", "head",
    ]
    narrowed = paths(built(layers="attention", layer_filter="-block: mid\nto_q"))
    assert narrowed == [f"input_blocks.{n}.1.transformer_blocks.0.attn1.to_q" for n in range(3)]
    assert len(paths(built(layers="custom", layer_filter="-proj_", conv_rank=2))) == 26 - 8


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"layers": "custom", "layer_filter": "attn2"}, r"line 1 \('attn2'\) matches none of the 22 layers"),
        ({"layers": "custom", "layer_filter": "0.conv"}, "without k×k convolutions, which need conv_rank"),
        ({"layer_filter": "head"}, r"matches none of the 20 layers of 'attention\+MLP'"),
        ({"layer_filter": "re:(("}, "layer_filter line 1 .*no regular expression"),
        ({"layers": "custom"}, "layer_filter is empty"),
    ],
)
def test_rules_without_effect(settings, message):
    with pytest.raises(OptionError, match=message):
        built(**settings)


# -- blocks


def test_block_lines():
    lines = "IN0: off\nIN1-2: rank=8 alpha=1 lr=0.5\nIN2: lr = 2\nmid: conv_rank=6 conv_alpha=3"
    result = built(conv_rank=2, layers="full", blocks=lines)
    ranks, factors = {}, {}
    for path, adapter in result.adapters.items():
        local = path.removeprefix("diffusion_model.")
        key = (".".join(local.split(".")[:2]) if "input" in local else local.split(".")[0], "conv" in local)
        ranks.setdefault(key, set()).add((adapter.rank, adapter.alpha))
        factors.setdefault(key[0], set()).add(result.factors.get(path, 1.0))
    assert ranks == {
        ("embed", False): {(4, 2.0)}, ("head", False): {(4, 2.0)},
        ("input_blocks.1", False): {(8, 1.0)}, ("input_blocks.1", True): {(2, 1.0)},
        ("input_blocks.2", False): {(8, 1.0)}, ("input_blocks.2", True): {(2, 1.0)},
        ("middle_block", False): {(4, 2.0)}, ("middle_block", True): {(6, 3.0)},
    }  # fmt: skip
    expected = {"embed": {1.0}, "head": {1.0}, "input_blocks.1": {0.5}, "input_blocks.2": {2.0}, "middle_block": {1.0}}
    assert factors == expected


def test_later_lines_win():
    result = built(blocks="all: off\nIN1-2: rank=2, alpha=1\nIN1: rank=3\nIN2: off")
    assert {(a.rank, a.alpha) for a in result.adapters.values()} == {(3, 1.0)} and len(result.adapters) == 5


def test_convolutions_of_single_blocks():
    with_one = built(layers="full", blocks="mid: conv_rank=2")
    assert [path for path in paths(with_one) if "0.conv" in path] == ["middle_block.0.conv"]
    without = built(layers="full", conv_rank=2, blocks="mid: conv_rank=0")
    assert len([path for path in paths(without) if "0.conv" in path]) == 3


@pytest.mark.parametrize(
    "line, message",
    [
        ("IN1 off", r"blocks line 1 \('IN1 off'\): there is no colon"),
        ("IN1:", "nothing stands behind the colon; write rank, alpha, conv_rank, conv_alpha, lr with =, or off"),
        ("\nIN9: off", r"blocks line 2 \('IN9: off'\): 'IN9': there is no number 9"),
        ("IN1: rnk=8", "'rnk=8' is unknown; do you mean rank?"),
        ("IN1: rank=8.5", "'rank=8.5', expected a whole number from 1 to 1024"),
        ("IN1: rank=0", "'rank=0', expected a whole number from 1 to 1024 .off leaves blocks out"),
        ("IN1: rank=nan", "'rank=nan', expected"),
        ("IN1: lr=0", "'lr=0', expected a number other than 0"),
        ("IN1: lr=-1", "'lr=-1', expected"),
        ("IN1: alpha=", "'alpha=', expected"),
        ("IN1: alpha=0", "'alpha=0', expected a number other than 0"),
        ("IN1: rank=8 rank=4", "rank stands there twice"),
        ("IN1: off rank=4", "off leaves nothing that 'rank=4' could change"),
        ("base: rank=4", r"none of the layers that are trained lies there"),
        ("IN1: conv_alpha=4", "conv_alpha has no effect, no k×k convolutions are trained there"),
        ("all: off", "blocks switches off every layer"),
        ("IN1: rank=8\nin: off", r"blocks line 1 \('IN1: rank=8'\) has no effect: later lines .*put it behind them"),
        ("IN1: off\nin: rank=8", r"blocks line 1 \('IN1: off'\) has no effect"),
        ("IN1: lr=0.5\nIN2: lr=3\nin: lr=2 rank=8", r"blocks line 1 \('IN1: lr=0.5'\) has no effect"),
        ("IN1: rank=4\n" * 501, "501 lines, expected at most 500"),
    ],
)
def test_lines_that_are_refused(line, message):
    with pytest.raises(OptionError, match=message):
        built(blocks=line)


@pytest.mark.parametrize("algorithm, word", [("OFT", "rank=4"), ("IA3", "alpha=1"), ("full", "conv_alpha=2")])
def test_words_that_a_family_has_no_use_for(algorithm, word):
    with pytest.raises(OptionError, match=f"{word.split('=')[0]} has no effect, {algorithm} has no"):
        built(algorithm=algorithm, blocks=f"mid: {word}", **SPATIAL)


# -- text encoders


def test_text_encoders_take_what_makes_sense_there():
    """Rules, block lines and what is for convolutions are the model's."""
    settings = {"layers": "custom", "layer_filter": "0.conv", "conv_rank": 2, "conv_alpha": 3.0}
    settings["blocks"] = "mid: rank=1"
    with pytest.raises(OptionError):
        built(**settings)
    result = built(component="te1", **settings)
    assert paths(result) == paths(built()) and {adapter.rank for adapter in result.adapters.values()} == {4}
    assert "LoRA on te1: 20 layers of rank 4" in result.notes[0]


def test_what_the_model_has_use_for_need_not_do_anything_to_a_text_encoder():
    """Nor the other way round: without the model, what is for it alone is refused."""
    settings = {"algorithm": "LoKr", "full_matrix": True, "layer_filter": "attn", "rank": 24}
    plan = Plan(rank=settings.pop("rank"), adapter=AdapterSettings(**settings))
    with pytest.raises(OptionError, match="full_matrix is True, expected False: it has no effect here, it is full"):
        build(MODEL, plan, weight_of)
    assert build(MODEL, plan, weight_of, "te1").adapters
    alone = dataclasses.replace(plan, components=ComponentSettings(train_model=False, te1_learning_rate=1e-5))
    with pytest.raises(OptionError, match="layer_filter is 'attn', expected ''.*train_model is off"):
        build(MODEL, alone, weight_of, "te1")


@pytest.mark.parametrize(
    "settings, option",
    [
        ({"layers": "conv"}, "layers"),
        ({"layers": "custom", "layer_filter": "attn"}, "layer_filter"),
        ({"blocks": "mid: off"}, "blocks"),
        ({"conv_rank": 4}, "conv_rank"),
        ({"conv_alpha": 2.0}, "conv_alpha"),
        ({"tucker": True}, "tucker"),
    ],
)
def test_what_is_for_the_model_alone(settings, option):
    text = ComponentSettings(train_model=False, te1_learning_rate=1e-5)
    plan = Plan(rank=4, adapter=AdapterSettings(**settings), components=text)
    with pytest.raises(OptionError, match=f"^{option} is .*no effect here, .*train_model is off"):
        build(MODEL, plan, weight_of, "te1")
