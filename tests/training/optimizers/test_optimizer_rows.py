"""Every row of the table: it makes the class it names, listens to what it says it listens to, and refuses the rest."""

import importlib
import inspect

import pytest
import torch

from lora_loom.training.optimizers import OPTIMIZERS, make_optimizer, offered
from lora_loom.training.optimizers.make import class_of
from lora_loom.training.options import OptionError, options_of
from lora_loom.training.settings import OptimizerSettings

SHAPES = ((64, 80), (7, 3), (6, 4, 3, 3), (5,))
NAMED = "StableAdamW"  # of pytorch_optimizer
WIDGETS = ("weight_decay", "beta1", "beta2", "epsilon")


def settings_of(name, **options):
    own = {"optimizer_name": NAMED} if name == "pytorch_optimizer" else {}
    return OptimizerSettings(optimizer=name, **own | options)


def start(seed=0):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws) for shape in SHAPES]


def take(optimizer, tensors, steps, seed=1, scale=0.1):
    draws = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = scale * torch.randn(tensor.shape, generator=draws)
        optimizer.step()
    return tensors


def trained(settings, steps=7, rate=0.01, **options):
    tensors = start()
    return take(make_optimizer(settings, [{"params": tensors, "lr": rate}]), tensors, steps, **options)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


ORACLES = {  # what the class is made with when all widgets are left alone
    "AdamW": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "fused": True},
    "Adafactor": {"eps": (1e-15, 1.0), "weight_decay": 0.01},
    "SGD": {"weight_decay": 0.01},
    "Prodigy": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "decouple": True},
    "ProdigyPlusScheduleFree": {"betas": (0.9, 0.99), "weight_decay": 0.01},
    "AdamWScheduleFree": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "RAdamScheduleFree": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    "SGDScheduleFree": {"weight_decay": 0.01},
    "DAdaptAdam": {"betas": (0.9, 0.999), "weight_decay": 0.01, "decouple": True},
    "DAdaptLion": {"betas": (0.9, 0.99), "weight_decay": 0.01},
    "DAdaptSGD": {"weight_decay": 0.01},
    "Lion": {"betas": (0.9, 0.99), "weight_decay": 0.01},
    "CAME": {"betas": (0.9, 0.999, 0.9999), "weight_decay": 0.01},
    "AdamW8bit": {"betas": (0.9, 0.999), "weight_decay": 0.01},
    "PagedAdamW8bit": {"betas": (0.9, 0.999), "weight_decay": 0.01},
    "Lion8bit": {"betas": (0.9, 0.99), "weight_decay": 0.01},
    "PagedLion8bit": {"betas": (0.9, 0.99), "weight_decay": 0.01},
    "AdEMAMix8bit": {"betas": (0.9, 0.999, 0.9999), "weight_decay": 0.01},
    "SGD8bit": {"momentum": 0.9, "weight_decay": 0.01},
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_the_optimizer_is_the_packages_own(name):
    """Not another one under its name: a peer's DAdaptAdam was a DAdaptLion."""
    row = OPTIMIZERS[name]
    kind = getattr(importlib.import_module(row.module), row.kind)
    assert kind.__name__ == name
    tensors = start()
    theirs = kind([{"params": tensors, "lr": 0.01}], lr=0.01, **ORACLES[name])
    if row.schedule_free:
        theirs.train()
    assert same(trained(settings_of(name)), take(theirs, tensors, 7))


@pytest.mark.parametrize("kind", ("AdamW8bit", "AdamW4bit", "AdamWFp8"))
def test_low_bit_steps_follow_adamw(kind):
    """Small tensors keep full moments and are AdamW's to rounding; large ones are near."""
    ours, theirs = trained(settings_of(f"torchao {kind}")), trained(settings_of("AdamW"))
    for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        moved = (one - start()[index]).flatten()
        assert torch.cosine_similarity(moved, (other - start()[index]).flatten(), 0) > (0.9 if index == 0 else 0.99999)


def test_low_bit_steps_follow_the_rate_of_the_loop():
    tensors = start()
    optimizer = make_optimizer(settings_of("torchao AdamW8bit", weight_decay=0.0), [{"params": tensors, "lr": 0.01}])
    before = [tensor.clone() for tensor in tensors]
    optimizer.param_groups[0]["lr"] = 0.0
    assert same(take(optimizer, tensors, 1), before)
    optimizer.param_groups[0]["lr"] = 0.5
    assert not same(take(optimizer, tensors, 1), before)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("widget", WIDGETS)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_widget_changes_the_steps_or_is_refused(name, widget):
    """An epsilon matters where gradients are small; what finds its rate begins too low to round to anything."""
    value = {"weight_decay": 0.5, "beta1": 0.8, "beta2": 0.9, "epsilon": 1e-2}[widget]
    known = {"optimizer_args": "d0=0.01"} if OPTIMIZERS[name].finds_rate else {}
    try:
        settings = settings_of(name, **known, **{widget: value})
    except OptionError as error:
        assert str(error).startswith(f"{widget} is {value!r}, expected {options_of(OptimizerSettings)[widget][1]!r}: ")
        return
    rate = 1.0 if known else 0.01
    plain = trained(settings_of(name, **known), rate=rate, scale=1e-3)
    assert not same(trained(settings, rate=rate, scale=1e-3), plain)


def test_the_table_tells_what_the_classes_take():
    for name, row in OPTIMIZERS.items():
        found, kind = class_of(settings_of(name))
        known = inspect.signature(kind).parameters
        if name == "pytorch_optimizer":
            continue
        assert found is row
        assert bool(row.betas) == ("betas" in known), name
        if row.betas:
            assert known["betas"].default == row.betas, name
        assert row.decay == ("weight_decay" in known), name
        assert row.epsilon == (isinstance(known["eps"].default, float) if "eps" in known and row.betas else False), name
        assert row.schedule_free == callable(getattr(kind, "train", None)), name
        assert set(row.arguments) <= set(known), name
        assert row.finds_rate == (known["lr"].default == 1.0 and "d0" in known), name


def test_a_schedule_beside_a_schedule_free_optimizer_is_refused():
    for name, row in OPTIMIZERS.items():
        if row.schedule_free:
            with pytest.raises(OptionError, match="^schedule is 'cosine', expected 'constant'"):
                settings_of(name, schedule="cosine")
            settings_of(name, warmup_steps=10)
        else:
            settings_of(name, schedule="cosine")
    settings_of("ProdigyPlusScheduleFree", schedule="cosine", optimizer_args="use_schedulefree=False")
    with pytest.raises(OptionError, match="^schedule is 'linear', expected 'constant'"):
        settings_of("pytorch_optimizer", optimizer_name="ScheduleFreeAdamW", schedule="linear")


def test_an_average_that_could_not_be_told_from_the_trained_weights_is_refused():
    named = {"optimizer": "pytorch_optimizer", "optimizer_name": "ScheduleFreeAdamW"}
    rows = [{"optimizer": name} for name, row in OPTIMIZERS.items() if row.schedule_free and row.betas]
    for asked in ({"beta1": 0.0}, {"optimizer_args": "betas=0.0,0.9"}):
        for settings in (*rows, named):
            with pytest.raises(OptionError, match="^beta1 is 0, expected more"):
                OptimizerSettings(**settings, **asked)
        OptimizerSettings(optimizer="AdamW", **asked)
    OptimizerSettings("ProdigyPlusScheduleFree", beta1=0.0, optimizer_args="use_schedulefree=False")


def test_a_warm_up_of_the_loop_is_the_warm_up_of_schedule_free():
    from schedulefree import AdamWScheduleFree

    from lora_loom.training.schedules import Schedule

    settings = settings_of("AdamWScheduleFree", warmup_steps=5)
    ours, theirs = start(), start()
    optimizer = make_optimizer(settings, [{"params": ours, "lr": 0.01}])
    reference = AdamWScheduleFree(theirs, lr=0.01, weight_decay=0.01, warmup_steps=5)
    reference.train()
    for step in range(9):
        optimizer.param_groups[0]["lr"] = 0.01 * Schedule(settings, 9).factor(step)
        take(optimizer, ours, 1, seed=step)
        take(reference, theirs, 1, seed=step)
    optimizer.eval()
    reference.eval()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def test_one_rate_is_enough_for_some():
    """They would raise in the middle of the first step; LoRA+ and rates of their own are named instead."""
    for name, row in OPTIMIZERS.items():
        groups = [{"params": [one], "lr": rate} for one, rate in zip(start(), (1.0, 0.5, 1.0, 1.0), strict=True)]
        if row.one_rate:
            with pytest.raises(OptionError, match="^optimizer is .*loraplus_ratio"):
                make_optimizer(settings_of(name), groups)
        elif not row.package:
            optimizer = make_optimizer(settings_of(name), groups)
            assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5, 1.0, 1.0]


ONE_RATE = ("Prodigy", "DAdaptAdam", "DAdaptSGD", "DAdaptLion", "DAdaptAdaGrad", "DAdaptAdan")  # of pytorch_optimizer


def named(name, **options):
    return OptimizerSettings("pytorch_optimizer", optimizer_name=name, **options)


@pytest.mark.parametrize("name", ONE_RATE)
def test_a_packages_optimizers_with_one_rate_are_known_by_any_spelling(name):
    """The class itself says nothing: it takes two rates and uses one. So it is refused, as our own rows are."""
    kind = class_of(named(name))[1]
    tensors = [torch.zeros(4, 4), torch.zeros(4, 4)]
    theirs = kind([{"params": [one], "lr": rate} for one, rate in zip(tensors, (1.0, 0.5), strict=True)])
    draws = torch.Generator().manual_seed(0)
    for _ in range(5):
        gradient = torch.randn(4, 4, generator=draws)
        for one in tensors:
            one.grad = gradient.clone()
        theirs.step()
    assert tensors[0].any() and torch.equal(*tensors)
    for spelling in (name, name.lower(), name.upper()):
        row, _ = class_of(named(spelling))
        assert (row.name, row.finds_rate, row.one_rate) == (name, True, True)
        groups = [{"params": [one], "lr": rate} for one, rate in zip(start(), (1.0, 0.5, 1.0, 1.0), strict=True)]
        with pytest.raises(OptionError, match=f"^optimizer is '{name}', expected .*loraplus_ratio"):
            make_optimizer(named(spelling), groups)
        make_optimizer(named(spelling), [group | {"lr": 1.0} for group in groups])


def test_of_a_packages_optimizers_those_that_find_their_rate_are_known():
    """AdamG calls itself parameter-free and takes a rate per group; others whose rate is 1 (AdaDelta) find none."""
    import pytorch_optimizer

    found = set()
    for name in pytorch_optimizer.get_supported_optimizers():
        try:
            row, _ = class_of(OptimizerSettings(optimizer="pytorch_optimizer", optimizer_name=name))
        except OptionError:
            continue
        if row.finds_rate:
            found.add(row.name)
            assert row.one_rate == (row.name != "AdamG")
    assert found == {*ONE_RATE, "AdamG"}


def test_their_weight_decay_is_decoupled_as_the_widget_says():
    """As Prodigy's and DAdaptAdam's own rows have it; optimizer_args may say otherwise."""
    for name in (*ONE_RATE, "AdamG"):
        for text, decoupled in (("", True), ("weight_decouple=False", False)):
            made = make_optimizer(named(name, optimizer_args=text), [{"params": start(), "lr": 1.0}])
            assert made.param_groups[0]["weight_decouple"] is decoupled


def test_what_is_not_installed_is_not_offered_and_says_how_to_get_it(monkeypatch):
    from lora_loom.training.optimizers import table

    real = table.find_spec
    monkeypatch.setattr(table, "find_spec", lambda name: None if name == "prodigyopt" else real(name))
    assert "Prodigy" not in offered() and "AdamW" in offered()
    with pytest.raises(OptionError, match="^optimizer is 'Prodigy', expected .* pip install prodigyopt"):
        settings_of("Prodigy")
    with pytest.raises(OptionError, match="^optimizer is 'Prodigal', expected one of AdamW, "):
        settings_of("Prodigal")


def test_adafactor_steps_by_the_rate_itself():
    """The size of the weights has no say: an adapter begins at zero. Against the loop that sd-scripts' users know."""
    tensors = [torch.zeros(20, 30), torch.randn(7, generator=torch.Generator().manual_seed(0)) / 9]
    optimizer = make_optimizer(settings_of("Adafactor", weight_decay=0.0), [{"params": tensors, "lr": 1e-3}])
    expected, row, column, square = [tensor.clone() for tensor in tensors], 0.0, 0.0, 0.0
    draws = torch.Generator().manual_seed(3)
    for step in range(1, 6):
        gradients = [1e-6 * torch.randn(tensor.shape, generator=draws) for tensor in tensors]
        keep = 1 - step**-0.8
        matrix, vector = gradients
        row = keep * row + (1 - keep) * (matrix**2).mean(1, keepdim=True)
        column = keep * column + (1 - keep) * (matrix**2).mean(0, keepdim=True)
        square = keep * square + (1 - keep) * vector**2
        for index, update in enumerate((matrix / (row * column / row.mean()).sqrt(), vector / square.sqrt())):
            expected[index] -= 1e-3 * update / max(1, update.square().mean().sqrt())
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient
        optimizer.step()
    for tensor, other in zip(tensors, expected, strict=True):
        assert torch.allclose(tensor, other, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ("AdEMAMix", "SOAP", "stableadamw", "Lamb", "madgrad", "AggMo"))
def test_optimizers_by_name(name):
    settings = settings_of("pytorch_optimizer", optimizer_name=name)
    assert not same(trained(settings, 2), start())
    assert same(trained(settings, 2), trained(settings, 2))


@pytest.mark.parametrize(
    "name, message",
    (
        ("", "^optimizer_name is '', expected one of"),
        ("AdEMAMax", "^optimizer_name is 'AdEMAMax', expected .*ademamix"),
        ("Ranger21", "^optimizer_name is 'Ranger21', expected what Ranger21 accepts: .*num_iterations"),
        ("AdamMini", "^optimizer_name is 'AdamMini', expected .* whole model"),
        ("Alig", "^optimizer_name is 'Alig', expected .* closure"),
        ("Gravity", "^optimizer_name is 'Gravity', expected .* global random generator"),
        ("StableSPAM", "^optimizer_name is 'StableSPAM', expected .* goes on differently"),
        ("ScalableShampoo", "^optimizer is 'ScalableShampoo', expected .* PreConditioner"),
    ),
)
def test_names_that_do_not_work_say_why_before_the_first_step(name, message):
    with pytest.raises(OptionError, match=message):
        make_optimizer(settings_of("pytorch_optimizer", optimizer_name=name), [{"params": start(), "lr": 0.1}])


def test_a_name_without_its_package_is_refused():
    with pytest.raises(OptionError, match="^optimizer_name is 'SOAP', expected nothing"):
        settings_of("AdamW", optimizer_name="SOAP")


def test_arguments_reach_an_optimizer_by_name():
    plain = settings_of("pytorch_optimizer", optimizer_name="AdEMAMix")
    other = settings_of("pytorch_optimizer", optimizer_name="AdEMAMix", optimizer_args="alpha=1 betas=0.9,0.99,0.999")
    assert not same(trained(plain, 3), trained(other, 3))


def test_trying_out_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    with pytest.raises(OptionError):
        make_optimizer(settings_of("pytorch_optimizer", optimizer_name="Gravity"), [{"params": start(), "lr": 0.1}])
    assert torch.equal(before, torch.get_rng_state())


def test_packages_say_nothing_on_the_console(capfd):
    make_optimizer(settings_of("Prodigy", weight_decay=0.1), [{"params": start(), "lr": 1.0}])
    make_optimizer(settings_of("ProdigyPlusScheduleFree"), [{"params": start(), "lr": 1.0}])
    assert capfd.readouterr().out == ""
