"""Rules that choose layers."""

import time

import pytest
from torch import nn

from lora_loom.kernels.blocks import block_map
from lora_loom.kernels.layer_rules import chosen, parse
from lora_loom.kernels.layers import trainable_layers


def model():
    def block():
        parts = nn.ModuleDict({name: nn.ModuleDict({"to_q": nn.Linear(4, 4), "to_k": nn.Linear(4, 4)})
                               for name in ("attn1", "attn2")})
        return nn.Sequential(parts, nn.ModuleDict({"ff": nn.Linear(4, 4)}))

    inside = nn.Module()
    inside.embed = nn.Linear(4, 4)
    inside.input_blocks = nn.ModuleList([block() for _ in range(12)])
    loaded = nn.Module()
    loaded.diffusion_model = inside
    return loaded


MODEL = model()
LAYERS, BLOCKS = list(trainable_layers(MODEL)), block_map(MODEL)


def paths(rules):
    return [layer.path.removeprefix("diffusion_model.") for layer in chosen(LAYERS, parse(rules, BLOCKS), "the layers")]


@pytest.mark.parametrize(
    "rules, count, first",
    [
        ("attn1", 24, "input_blocks.0.0.attn1.to_q"),
        ("attn1.to_q", 12, "input_blocks.0.0.attn1.to_q"),
        ("attn1\n\n  ff  ", 36, "input_blocks.0.0.attn1.to_q"),
        ("*.attn?.to_k", 24, "input_blocks.0.0.attn1.to_k"),
        ("input_blocks.*.attn2.to_?", 24, "input_blocks.0.0.attn2.to_q"),
        ("diffusion_model.input_blocks.1?.*", 10, "input_blocks.10.0.attn1.to_q"),
        ("input_blocks.1.*", 5, "input_blocks.1.0.attn1.to_q"),
        (r"re:^diffusion_model\.input_blocks\.\d\d\.\d+\.attn[12]\.to_(q|k)$", 8, "input_blocks.10.0.attn1.to_q"),
        ("re:.*attn.*to_q.*", 24, "input_blocks.0.0.attn1.to_q"),
        ("re:embed$", 1, "embed"),
        (r"re:\.ff\.*", 12, "input_blocks.0.1.ff"),
        ("block: base", 1, "embed"),
        ("block:IN4-5, base", 11, "embed"),
        ("-ff", 49, "embed"),
        ("attn1\n- block:IN0-10", 2, "input_blocks.11.0.attn1.to_q"),
        ("- *.attn1.*\n-re:attn2", 13, "embed"),
    ],
)
def test_rules(rules, count, first):
    found = paths(rules)
    assert (len(found), found[0]) == (count, first)


@pytest.mark.parametrize(
    "rules, message",
    [
        ("attn1\natn2", r"line 2 \('atn2'\) matches none of the layers; do you mean 'attn2'\?"),
        ("attn1.to_v", r"matches none of the layers; do you mean 'attn1\.to_[qk]'\?"),
        ("attn1*", "matches none"),  # a pattern is for the whole path
        ("[ab]*", "matches none"),
        ("-attn3", r"line 1 \('-attn3'\) leaves out nothing of the layers; do you mean 'attn\d'"),
        ("attn1\n-attn2", r"line 2 \('-attn2'\) leaves out nothing of those that the other rules chose"),
        ("attn1\n-attn", "the rules leave none of the layers"),
        ("-attn2\nattn1", r"line 1 \('-attn2'\) leaves out nothing of those that the other rules chose"),
        ("ATTN1.TO_Q", r"do you mean 'attn1\.to_q'\?"),
        ("attn1, ff", r"matches none of the layers; write one rule a line"),
        ("-", "a minus with nothing behind it"),
        ("re:", "re: with nothing behind it"),
        ("block:OUT1", r"line 1 \('block:OUT1'\): there is no block 'OUT1'"),
        ("re:(", "no regular expression"),
        ("re:(a+)+b", "a group that repeats may take forever"),
        ("re:(a|a)*b", "a group that repeats may take forever"),
        ("re:(.?){40}b", "a group that repeats may take forever"),
        ("re:a.*b.*c.*d", r"so many of \* \+ \? \| may take forever"),
        ("re:" + ".?" * 40 + "x", r"so many of \* \+ \? \| may take forever"),
        ("re:" + "(a|a)" * 30 + "x", r"so many of \* \+ \? \| may take forever"),
        ("x" * 201, "201 letters long, expected at most 200"),
        ("re:" + "x" * 198, "201 letters long, expected at most 200"),
        ("a\n" * 201, "201 rules, expected at most 200"),
    ],
)
def test_what_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        paths(rules)


@pytest.mark.parametrize("rule", ["re:" + ".?" * 10 + ".*!", "re:.+_.+!", "*" * 100 + "!", "*_*" * 50 + "!"])
def test_nothing_takes_forever(rule):
    began = time.process_time()
    with pytest.raises(ValueError, match="matches none"):
        paths(rule)
    assert time.process_time() - began < 20
