"""Beginning with a LoRA that is there already: taken exactly, or refused with the setting to change."""

import pytest
import torch
from torch import nn

from lora_loom.kernels.dora import DoRA
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.safetensors_io import LoraModel
from lora_loom.kernels.writing import to_tensors
from lora_loom.training.adapters import build
from lora_loom.training.learners import Component
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ALGORITHMS, AdapterSettings, Plan
from lora_loom.training.starting import start_from


def model():
    def block():
        return nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(8, 12), "o": nn.Linear(12, 8, bias=False)}),
                              "mlp": nn.Linear(8, 16), "conv": nn.Conv2d(6, 8, 3)})

    loaded = nn.Module()
    loaded.diffusion_model = nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])})
    return loaded


MODEL = model()
NAMES = NameTable.of(MODEL)


def weight_of(path):
    return MODEL.get_submodule(path).weight.detach().float()


def built(seed=0, rank=4, alpha=2.0, **settings):
    blocks = {"block_size": 4} if "OFT" in settings.get("algorithm", "") else {}
    plan = Plan(seed=seed, rank=rank, alpha=alpha, adapter=AdapterSettings(**{"layers": "full"} | blocks | settings))
    return build(MODEL, plan, weight_of).adapters


def trained(seed=9, **settings):
    """Adapters with every number random, as a training leaves them."""
    draws = torch.Generator().manual_seed(seed)
    return {
        path: adapter.with_tensors({name: tensor + 0.1 * torch.randn(tensor.shape, generator=draws)
                                    for name, tensor in adapter.tensors.items()})
        for path, adapter in built(seed, **settings).items()
    }


def saved(adapters, dialect="native"):
    return to_tensors(LoRAFile(adapters, names=NAMES), dialect)


def begun(given, **settings):
    """(adapters, notes) of a run that starts from ``given``."""
    component = Component("model", built(**settings), 1e-4)
    notes = start_from([component], given, NAMES)
    return component.adapters, notes


def equal_effect(one, other):
    assert one.keys() == other.keys()
    for path in one:
        weight = weight_of(path)
        assert torch.equal(one[path].merged(weight), other[path].merged(weight)), path


FAMILIES = [
    *({"algorithm": name} for name in ALGORITHMS),
    *({"algorithm": name, "dora": "output"} for name in ("LoRA", "LoHa", "LoKr")),
    {"dora": "input", "conv_rank": 2},
    {"algorithm": "LoKr", "decompose_both": True, "rank": 1},
    {"tucker": True, "conv_rank": 3},
    {"algorithm": "DyLoRA", "unit": 2},
    {"algorithm": "OFT", "rescaled": True, "constraint": 0.3},
    {"algorithm": "IA3", "train_on_input": True, "conv_rank": 1},
    {"algorithm": "full", "train_bias": True},
    {"rs_lora": True},
]


@pytest.mark.parametrize("settings", FAMILIES, ids=str)
def test_the_same_family_is_taken_exactly(settings):
    before = trained(**settings)
    after, (note, *others) = begun(saved(before), **settings)
    assert note.startswith(f"started from the given LoRA on {len(before)} of {len(before)} layers") and not others
    equal_effect(before, after)
    for path, adapter in after.items():
        assert type(adapter) is type(before[path]) and adapter.alpha == before[path].alpha
        assert adapter.tensors.keys() == before[path].tensors.keys()
        assert all(torch.equal(adapter.tensors[name], tensor) for name, tensor in before[path].tensors.items())
        assert adapter.parameters() and adapter.dropout == built(**settings)[path].dropout


def test_the_given_lora_stays_as_it_is():
    given = saved(trained())
    copy = {key: tensor.clone() for key, tensor in given.items()}
    for adapter in begun(given)[0].values():
        for tensor in adapter.tensors.values():
            tensor.mul_(2)
    assert all(torch.equal(given[key], copy[key]) for key in copy)


def test_half_precision_is_widened():
    given = LoraModel({key: tensor.half() for key, tensor in saved(trained()).items()})
    assert {t.dtype for adapter in begun(given)[0].values() for t in adapter.tensors.values()} == {torch.float32}


def test_alpha_is_kept_and_said():
    before = trained(alpha=1.0)
    after, (note, *_) = begun(saved(before), alpha=4.0)
    equal_effect(before, after)
    assert note.endswith("; its alpha 1 stays")
    after, (note, *_) = begun(saved(trained(dora="output", alpha=1.0)), dora="output", alpha=4.0)
    assert all(isinstance(a, DoRA) and a.inner.alpha == a.alpha == 1.0 for a in after.values())


def test_some_layers_of_another_rank_keep_it():
    before = trained(blocks="blocks.0: rank=7")
    path = "diffusion_model.blocks.0.mlp"
    given = {p: a for p, a in before.items() if p == path or ".0." not in p}
    after, (note, *_) = begun(saved(given))
    assert after[path].rank == 7 and note.endswith("; its rank 7 on 1 layers stays")
    assert torch.equal(after[path].delta(), before[path].delta())


@pytest.mark.parametrize("alpha", [0.0, float("inf")])
def test_alphas_that_stand_for_the_rank_are_saved_as_it(alpha):
    """To us and to kohya's trainers, not to the host's loader, which would make nothing of what is trained."""
    given = {key: torch.tensor(alpha) if key.endswith("alpha") else tensor for key, tensor in saved(trained()).items()}
    after, _ = begun(LoraModel(given))
    assert {adapter.alpha for adapter in after.values()} == {4.0}
    equal_effect(after, trained(alpha=4.0))


def test_other_ranks_that_dylora_cannot_train_are_refused():
    given = saved(trained(blocks="blocks.0: rank=7"))
    given = LoraModel({key: tensor for key, tensor in given.items() if ".0." not in key or "mlp" in key})
    with pytest.raises(OptionError, match="start_from has rank 7 on .*0.mlp, unit is 2: set unit to a divisor of 7"):
        begun(given, algorithm="DyLoRA", unit=2)


def test_what_is_damaged_is_of_start_from():
    with pytest.raises(OptionError, match="start_from: .*NaN"):
        begun(LoraModel({key: tensor * float("nan") for key, tensor in saved(trained()).items()}))


def test_layers_that_only_one_side_has():
    before = trained()
    half = {path: adapter for path, adapter in before.items() if ".0." in path}
    after, (note, *_) = begun(saved(half))
    assert note == "started from the given LoRA on 3 of 6 layers"
    fresh = built()
    assert all(torch.equal(after[path].delta(), (half.get(path) or fresh[path]).delta()) for path in after)
    after, (note, *_) = begun(saved(before), layers="attention")
    assert note == "started from the given LoRA on 4 of 4 layers, 2 of its layers are not trained here"


def test_keys_that_fit_nothing_are_counted():
    given = LoraModel({**saved(trained()), "elsewhere.lora_up.weight": torch.ones(2, 2)})
    _, notes = begun(given)
    assert notes[1].startswith("start_from: 1 of its keys fit nothing here (elsewhere.lora_up.weight: ")


def test_text_encoders_are_parts_of_their_own():
    """Layers are found by path, whatever component they are of."""
    before = trained()
    first, second = ({p: a for p, a in built().items() if f".{n}." in p} for n in (0, 1))
    components = [Component("model", first, 1e-4), Component("te1", second, 1e-5)]
    start_from(components, saved(before), NAMES)
    equal_effect({**components[0].adapters, **components[1].adapters}, before)


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        ({"rank": 5}, {}, r"start_from has rank 5 on .*, rank is 4: set rank to 5"),
        ({"algorithm": "LoHa", "rank": 5}, {"algorithm": "LoHa"}, "set rank to 5"),
        ({"dora": "output", "rank": 5}, {"dora": "output"}, "set rank to 5"),
        ({"conv_rank": 2}, {"conv_rank": 3}, "start_from has rank 2 on .*conv, conv_rank is 3: set conv_rank to 2"),
        ({"algorithm": "LoHa"}, {}, "start_from is LoHa on .*, algorithm is LoRA: set algorithm to LoHa"),
        ({}, {"algorithm": "OFT"}, "start_from is LoRA on .*, algorithm is OFT: set algorithm to LoRA"),
        ({"algorithm": "OFT"}, {"algorithm": "BOFT"}, "start_from is OFT on .*, algorithm is BOFT"),
        ({"algorithm": "IA3"}, {"algorithm": "LoKr", "dora": "output"}, "algorithm is LoKr: set algorithm to IA3"),
        ({"dora": "output"}, {}, "start_from has dora output on .*, dora is off: set dora to output"),
        ({}, {"dora": "input"}, "start_from has dora off on .*, dora is input: set dora to off"),
        ({"tucker": True, "conv_rank": 3}, {"conv_rank": 3}, "lora_down.weight .* make it .*: set tucker as in"),
        ({"algorithm": "LoKr", "factor": 2, "rank": 1}, {"algorithm": "LoKr", "rank": 1}, "set rank, conv_rank, fact"),
        ({"algorithm": "OFT"}, {"algorithm": "OFT", "block_size": 8}, "set block_size and rescaled"),
        ({"algorithm": "OFT", "rescaled": True}, {"algorithm": "OFT"}, "has rescale .* nowhere: set block_size and "),
        ({"algorithm": "OFTv2"}, {"algorithm": "OFTv2", "block_size": 2}, "set block_size as in its own training"),
        ({"algorithm": "IA3"}, {"algorithm": "IA3", "train_on_input": True}, "set train_on_input"),
        ({"algorithm": "full", "train_bias": True}, {"algorithm": "full"}, "has diff_b .* nowhere: set train_bias"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(theirs, ours, message):
    with pytest.raises(OptionError, match=message):
        begun(saved(trained(**theirs)), **ours)


def test_nothing_in_common():
    with pytest.raises(OptionError, match=r"start_from: none of its layers is trained here\. It must be a LoRA for"):
        begun(LoraModel({"lora_unet_down.lora_up.weight": torch.ones(2, 2)}))


def test_biases_that_are_not_in_the_file_begin_at_zero():
    before = trained(algorithm="full")
    after, _ = begun(saved(before), algorithm="full", train_bias=True)
    equal_effect(before, after)
    assert any("diff_b" in adapter.tensors and not adapter.tensors["diff_b"].any() for adapter in after.values())
