"""optimizer_args: literals by name, known to the optimizer, and nothing that is evaluated."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_loom.training.optimizers import make_optimizer
from lora_loom.training.optimizers.arguments import parse_arguments
from lora_loom.training.options import OptionError
from lora_loom.training.settings import OptimizerSettings


@pytest.mark.parametrize(
    "text, expected",
    (
        ("", {}),
        ("  \n ", {}),
        ("d_coef=2", {"d_coef": 2}),
        (
            "d_coef=2 safeguard_warmup=True betas=0.9,0.99 decouple=True",
            {"d_coef": 2, "safeguard_warmup": True, "betas": (0.9, 0.99), "decouple": True},
        ),
        ("betas = (0.9, 0.99)\nweight_decay= 1e-2", {"betas": (0.9, 0.99), "weight_decay": 0.01}),
        ("a=1, b=2,c=3", {"a": 1, "b": 2, "c": 3}),
        ("eps=None,1e-3 x=-4", {"eps": (None, 1e-3), "x": -4}),
        ("betas=0.9,", {"betas": 0.9}),
        ("names='a b', kind=match_rms_adamw", {"names": "a b", "kind": "match_rms_adamw"}),
        ("on=true off=FALSE none=none", {"on": True, "off": False, "none": None}),
        ("growth_rate=inf low=-inf", {"growth_rate": math.inf, "low": -math.inf}),
        ("nested=((1,2),(3,4)) list=[1,2]", {"nested": ((1, 2), (3, 4)), "list": [1, 2]}),
    ),
)
def test_arguments_are_read(text, expected):
    assert parse_arguments(text) == expected


@pytest.mark.parametrize(
    "text",
    ("3", "d_coef", "d_coef 2", "=2", "junk a=1", "a=", "a=1 a=2", "a=__import__('os')", "a=1+x", "a=f(2)", "a==1"),
)
def test_what_is_no_literal_is_refused(text):
    with pytest.raises(OptionError, match="^optimizer_args is .*expected "):
        parse_arguments(text)


literals = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    st.none(),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
)


names = st.from_regex(r"[a-z][a-z_0-9]{0,8}", fullmatch=True)


@given(st.dictionaries(names, literals, max_size=5), st.sampled_from(" \n,"))
def test_whatever_is_written_is_read(values, between):
    text = between.join(f"{name}={value!r}" for name, value in values.items())
    assert parse_arguments(text) == values


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text):
    try:
        parse_arguments(text)
    except OptionError as error:
        assert str(error).startswith("optimizer_args")


@pytest.mark.parametrize(
    "name, text, message",
    (
        ("AdamW", "beta=0.9", "^optimizer_args has beta, expected one of AdamW's: .*nearest: betas"),
        ("Prodigy", "dcoef=2", "^optimizer_args has dcoef, expected one of Prodigy's: .*d0, d_coef.*nearest: d_coef"),
        ("AdamW", "lr=1", "^optimizer_args has lr, expected .* learning_rate"),
        ("AdamWScheduleFree", "warmup_steps=9", "^optimizer_args has warmup_steps, expected .* option warmup_steps"),
        ("AdamW", "foreach=True", "^optimizer_args has foreach, expected one of AdamW's"),
        ("AdamW", "betas=0.9", "^optimizer_args is 'betas=0.9', expected what AdamW accepts: .*subscriptable"),
        ("AdamW", "betas=0.9,2.0", "^optimizer_args is 'betas=0.9,2.0', expected what AdamW accepts: Invalid beta"),
        ("Lion", "betas=0.9,7", "^optimizer_args is .*, expected what Lion accepts: AssertionError"),
        ("Prodigy", "d0=zero", "^optimizer_args is 'd0=zero', expected what Prodigy accepts: "),
    ),
)
def test_arguments_that_do_not_fit_are_named(name, text, message):
    with pytest.raises(OptionError, match=message):
        OptimizerSettings(optimizer=name, optimizer_args=text)


def trained(**options):
    tensor = torch.ones(4, 4)
    optimizer = make_optimizer(OptimizerSettings(**options), [{"params": [tensor], "lr": 0.1}])
    for step in range(3):
        tensor.grad = torch.full((4, 4), 0.1 + step)
        optimizer.step()
    return tensor


@pytest.mark.parametrize(
    "name, text",
    (("SGD", "momentum=0.9 nesterov=True"), ("AdamW", "amsgrad=True betas=0.5,0.6"), ("Adafactor", "eps=None,1e-3")),
)
def test_arguments_reach_the_optimizer(name, text):
    assert not torch.equal(trained(optimizer=name, optimizer_args=text), trained(optimizer=name))


def test_an_argument_wins_over_its_widget():
    both = trained(optimizer="AdamW", beta1=0.7, optimizer_args="betas=0.8,0.9")
    assert torch.equal(both, trained(optimizer="AdamW", beta1=0.8, beta2=0.9))


def test_the_guides_arguments_are_taken():
    settings = OptimizerSettings(
        optimizer="Prodigy", optimizer_args="decouple=True weight_decay=0.1 betas=0.9,0.99", schedule="cosine"
    )
    [group] = make_optimizer(settings, [{"params": [torch.ones(2, 2)], "lr": 1.0}]).param_groups
    assert (group["decouple"], group["weight_decay"], group["betas"], group["lr"]) == (True, 0.1, (0.9, 0.99), 1.0)
