"""Rules for layers, vectors and letters, on small trees (tests/host/test_block_weights_full_size.py has the real)."""

import random
import re
import time

import pytest
from torch import nn

from lora_loom.kernels.strengths.blocks import BlockWeights, parse_blocks
from lora_loom.kernels.strengths.layout import KINDS, Layout
from lora_loom.kernels.strengths.schedule import Clock, fixed, parse


def leaf():
    return nn.Linear(2, 2)


def attention():
    return nn.ModuleDict({"to_q": leaf(), "to_k": leaf(), "to_v": leaf(), "to_out": nn.ModuleList([leaf()])})


class Block(nn.Module):
    """A ResNet and a transformer, called as in SD's UNets."""

    def __init__(self):
        super().__init__()
        self.emb_layers = nn.Sequential(nn.SiLU(), leaf())
        self.proj_in = leaf()
        self.attn1, self.attn2 = attention(), attention()
        self.norm1 = nn.LayerNorm(2)
        self.ff = nn.ModuleDict({"net": nn.ModuleList([leaf(), nn.Identity(), leaf()])})


class UNet(nn.Module):
    def __init__(self, ways=3):
        super().__init__()
        self.time_embed = nn.Sequential(leaf(), nn.SiLU(), leaf())
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(leaf(), nn.SiLU(), leaf())})
        self.input_blocks = nn.ModuleList([nn.Sequential(Block()) for _ in range(ways)])
        self.middle_block = nn.Sequential(Block(), Block())
        self.output_blocks = nn.ModuleList([nn.Sequential(Block()) for _ in range(ways)])


class Streams(nn.Module):
    def __init__(self):
        super().__init__()
        self.img_in, self.txt_in = leaf(), leaf()
        names = ("img_attn", "img_mlp", "img_mod", "txt_attn", "txt_mlp", "txt_mod")
        self.double_blocks = nn.ModuleList(
            [nn.ModuleDict({name: nn.ModuleDict({"lin": leaf()}) for name in names}) for _ in range(3)]
        )
        self.single_blocks = nn.ModuleList(
            [nn.ModuleDict({name: leaf() for name in ("linear1", "linear2")}) for _ in range(4)]
        )


class Loaded(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.diffusion_model = model


UNET, FLUX = Layout.of(Loaded(UNet())), Layout.of(Loaded(Streams()))
BASE = r"(?:time_embed|t_embedder)\."
LAYER = r"(?:input|output)_blocks\.\d|middle_block"


def weighed(found, layout):
    """The paths whose weight is another than 1, without biases and what all of them begin with."""
    return {
        path.removeprefix("diffusion_model.")
        for path in layout.paths
        if not path.endswith(".bias") and found.of(path) != fixed(1.0)
    }


def fitting(expression, layout):
    local = [path.removeprefix("diffusion_model.") for path in layout.paths if not path.endswith(".bias")]
    return {path for path in local if re.search(expression, path)}


@pytest.mark.parametrize(
    "layout, text, expression",
    [
        (UNET, "in=0", r"^input_blocks"),
        (UNET, "IN01=0", r"^input_blocks\.1\."),
        (UNET, "in.1-=0", r"^input_blocks\.[12]\."),
        (UNET, "mid=0", r"^middle_block"),
        (UNET, "base=0", rf"^{BASE}"),
        (UNET, "all=0", "."),
        (UNET, "IN01-OUT01=0", r"^input_blocks\.[12]|^middle|^output_blocks\.[01]\."),
        (UNET, "OUT01-IN01=0", r"^input_blocks\.[12]|^middle|^output_blocks\.[01]\."),
        (UNET, "BASE-IN00=0", rf"^{BASE}|^input_blocks\.0\."),
        (UNET, "M00-output_blocks.0=0", r"^middle|^output_blocks\.0\."),
        (UNET, "IN00 M00 OUT02=0", r"^input_blocks\.0\.|^middle|^output_blocks\.2\."),
        (UNET, "NOT IN00-IN02 base=0", r"^middle|^output"),
        (UNET, "not mid=0", r"^(?!middle)"),
        (UNET, "attn=0", r"\.attn[12]\."),
        (UNET, "ff=0", r"\.ff\."),  # the time embedder's MLP lies in no block
        (UNET, "MLP=0", r"\.ff\."),
        (UNET, "base/mlp=0", r"^t_embedder\.mlp"),
        (UNET, "mod=0", r"\.emb_layers\.1"),
        (UNET, "norm=0", r"\.norm1"),
        (UNET, "q=0", r"\.to_q"),
        (UNET, "in/qkv=0", r"^input.*\.to_[qkv]"),
        (UNET, "o=0", r"\.to_out"),
        (UNET, "out/out=0", r"^output.*\.to_out"),
        (UNET, "attn1=0", r"\.attn1\."),
        (UNET, "attn1.to_q=0", r"\.attn1\.to_q"),
        (UNET, "attn1_to_q=0", r"\.attn1\.to_q"),
        (UNET, "proj=0", r"\.proj_in"),
        (UNET, "*.attn?.to_k=0", r"\.attn[12]\.to_k$"),
        (UNET, "mid/attn2/q=0", r"^middle.*\.attn2\.to_q"),
        (UNET, "IN01-OUT00/NOT attn=0", r"^(?:input_blocks\.[12]\.|middle|output_blocks\.0\.)(?!.*\.attn[12]\.)"),
        (UNET, "NOT IN01-OUT00/attn=0", r"^(?:input_blocks\.0|output_blocks\.[12]).*\.attn[12]\."),
        (UNET, "NOT attn ff=0", rf"^(?!{BASE}).*\.(?:norm1|proj_in|emb_layers)"),
        (UNET, "time_embed=0", r"^time_embed"),
        (FLUX, "double=0", r"^double"),
        (FLUX, "D1 single.2-=0", r"^double_blocks\.1|^single_blocks\.[23]"),
        (FLUX, "D2-S1=0", r"^double_blocks\.2|^single_blocks\.[01]"),
        (FLUX, "img=0", r"\.img_"),
        (FLUX, "txt/ff=0", r"\.txt_mlp"),
        (FLUX, "double/img/attn=0", r"\.img_attn"),
        (FLUX, "attn=0", r"_attn\.|linear[12]"),
        (FLUX, "mod=0", r"_mod\."),
        (FLUX, "txt_in=0", r"^txt_in"),
        (FLUX, "linear1=0", r"linear1"),
    ],
)
def test_selectors(layout, text, expression):
    wanted = fitting(expression, layout)
    assert wanted
    assert weighed(parse_blocks(text, layout), layout) == wanted


def test_biases_go_with_their_layers():
    found = parse_blocks("in/attn=0.5", UNET)
    assert found.of("diffusion_model.input_blocks.0.0.attn1.to_q.bias") == fixed(0.5)
    assert found.of("diffusion_model.input_blocks.0.0.proj_in.bias") == fixed(1.0)


def test_the_last_rule_counts():
    found = parse_blocks("all=0; in=0.5\nattn=0.25, IN01=2,\n", UNET)
    at = {path: found.of(f"diffusion_model.{path}").constant for path in ("time_embed.0", "middle_block.0.proj_in")}
    assert at == {"time_embed.0": 0, "middle_block.0.proj_in": 0}
    assert found.of("diffusion_model.input_blocks.0.0.proj_in").constant == 0.5
    assert found.of("diffusion_model.input_blocks.0.0.attn1.to_q").constant == 0.25
    assert found.of("diffusion_model.input_blocks.1.0.attn1.to_q").constant == 2
    assert not found.notes and not found.components


def test_a_rule_that_later_ones_cover_is_told():
    found = parse_blocks("in=0.5, attn=1, all=0.2", UNET)
    assert len(found.notes) == 2 and found.notes[0].startswith("blocks: in=0.5 has no effect, later rules")


def test_strengths_over_the_run():
    found = parse_blocks("in=0.1@1,0.6@6, mid=1, out=0@0%,1@100% linear", UNET)
    clock = Clock(range(10, -1, -1))
    at = [
        found.of(f"diffusion_model.{path}.0.proj_in") for path in ("input_blocks.2", "middle_block", "output_blocks.0")
    ]
    assert [one.at(clock, 10) for one in at] == [0.1, 1, 0]
    assert [one.at(clock, 5) for one in at] == [0.6, 1, 0.5]
    cosine = parse_blocks("out=0@0%,1@100%", UNET, "cosine").of("diffusion_model.output_blocks.0.0.proj_in")
    assert cosine == parse("0@0%,1@100% cosine", "x")


@pytest.mark.parametrize("text", ["", "  \n , ;", None])
def test_no_text_is_one_everywhere(text):
    found = parse_blocks(text or "", Loaded(UNet()))
    assert found == BlockWeights() and found.of(UNET.paths[3]) == fixed(1.0)


def test_rules_change_a_vector():
    found = parse_blocks("1,0.5,0.5,0.5,0,0,0,0\nin/attn=2", UNET)
    assert found.of("diffusion_model.input_blocks.1.0.attn2.to_v").constant == 2
    assert found.of("diffusion_model.input_blocks.1.0.proj_in").constant == 0.5
    assert found.of("diffusion_model.output_blocks.1.0.attn2.to_v").constant == 0


def test_the_bare_network_has_paths_without_prefix():
    found = parse_blocks("mid=0.5", UNet())
    assert found.of("middle_block.0.proj_in").constant == 0.5 and found.of("time_embed.0").constant == 1


@pytest.mark.parametrize(
    "layout, text, message",
    [
        (UNET, "double=0", r"^blocks: there is no block 'double'.*input_blocks\.0-2 \(in\)"),
        (UNET, "IN03=0", r"^blocks: 'IN03': there is no number 3, expected 0 to 2"),
        (UNET, "IN01-OUT09=0", "'OUT09': there is no number 9"),
        (UNET, "in-out=0", "begins or ends with several blocks"),
        (UNET, "atn1=0", r"nor is it a kind of layer \(attn, ff, mod.*\) or a part of a path, do you mean 'attn1'\?"),
        (UNET, "img=0", r"this model has no layers of the kind 'img' \(the picture's stream.*it has attn, ff"),
        (FLUX, "norm=0", "no layers of the kind 'norm'"),
        (UNET, "in/mid=0", r"'in/mid' names no layer of this model"),
        (UNET, "attn in=0", r"'attn in' mixes blocks and layers; write attn/in"),
        (UNET, "in/=0", "has an empty part"),
        (UNET, "NOT =0", "there is no block 'NOT'|has an empty part"),
        (UNET, "NOT all=0", "names no layer"),
        (UNET, "in=", r"^blocks: in: '' is no weight"),
        (UNET, "in=x", "^blocks: in: 'x' is no weight"),
        (UNET, "in=1=2", "is no weight"),
        (UNET, "in=nan", "is no weight"),
        (UNET, "in=101", "is too much"),
        (UNET, "=0.5", "'=0.5' is no rule"),
        (UNET, "in=0.5, mid", "'mid' is no rule; write names=weight"),
        (UNET, "0.1@1,0.6@6", r"'0\.1@1' stands behind no names; write all=0\.1@1"),
        (UNET, "1,1,1", r"a vector of 3 numbers, but this model takes 7, 8 or 26; or write .* all=1"),
        (UNET, "0.5", "a vector of 1 numbers"),
        (UNET, "1,1,one,1,1,1,1,1", "'one' is no weight; write a number, or one of lbw's letters R, U, X"),
        (UNET, "1,1,1,1,1,1,1,1e9", "is too much"),
        (UNET, "OUTTALL", r"there is no preset 'OUTTALL'; do you mean OUTALL"),
        (UNET, "(a+)+$=1", "there is no block"),
        (UNET, "x" * 300 + "=1", "has 300 letters, expected at most 200"),
        (UNET, "x" * 9000, "9000 letters, expected at most 8000"),
        (UNET, "in=1," * 501, "501 rules, expected at most 500"),
    ],
)
def test_what_cannot_be_read(layout, text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_blocks(text, layout)
    assert str(error.value).startswith("blocks: ")


def entries(text, **how):
    found = parse_blocks(text, UNET, **how)
    paths = ["time_embed.0", *(f"input_blocks.{n}.0.proj_in" for n in range(3)), "middle_block.0.proj_in"]
    paths += [f"output_blocks.{n}.0.proj_in" for n in range(3)]
    return [found.of(f"diffusion_model.{path}").constant for path in paths], found


def test_vectors_and_the_base():
    values, found = entries("0.1,0.2,0.3,0.4,-0.5,.6,7e-1, +0.8 ")
    assert values == [0.1, 0.2, 0.3, 0.4, -0.5, 0.6, 0.7, 0.8]
    assert found.components == {"te": 0.1}
    assert found.notes == ("blocks: BASE is also for the text encoders, which get 0.1",)
    values, found = entries("2,3,4,5,6,7,8")
    assert values == [1, 2, 3, 4, 5, 6, 7, 8] and not found.components and not found.notes


def test_letters_draw_in_the_ranges_of_their_dialect():
    drawn = {"lbw": {"R": (0, 1), "U": (-0.5, 1.5)}, "inspire": {"R": (0, 3), "U": (-1.5, 1.5)}}
    for dialect, ranges in drawn.items():
        for letter, (low, high) in ranges.items():
            seen = []
            for seed in range(60):
                values, found = entries(",".join([letter] * 8), dialect=dialect, seed=seed)
                assert values == entries(",".join([letter] * 8), dialect=dialect, seed=seed)[0]
                assert f"{letter} at place 8 is {values[7]:g}" in found.notes[0]
                seen += values
            assert low <= min(seen) < low + 0.1 * (high - low) and high - 0.1 * (high - low) < max(seen) <= high
            assert all(value == round(value, 3) for value in seen) and len(set(seen)) > 50


def test_letters_that_stand_for_given_numbers():
    assert entries("X,X+0.2,X-0.2,1,1,1,1,1")[0][:3] == [1, 1.2, 0.8]
    assert entries("X,X+0.25,X-0.25,1,1,1,1,1", letters={"X": 0.5})[0][:3] == [0.5, 0.75, 0.25]
    values, found = entries("A,a,B,b,1,1,1,1", dialect="inspire", letters={"A": 3.0, "B": 0.5})
    assert values[:4] == [3, 1.5, 0.5, 0.25] and "a at place 2 is 1.5" in found.notes[0]
    for text, dialect in (("A,1,1,1,1,1,1,1", "lbw"), ("X,1,1,1,1,1,1,1", "inspire"), ("R+1,1,1,1,1,1,1,1", "lbw")):
        with pytest.raises(ValueError, match=f"is no weight; write a number, or one of {dialect}'s letters"):
            parse_blocks(text, UNET, dialect=dialect)
    with pytest.raises(ValueError, match="there is no dialect 'a1111' of vectors"):
        parse_blocks("R,1,1,1,1,1,1,1", UNET, dialect="a1111")
    with pytest.raises(ValueError, match="is too much"):
        parse_blocks("X+100,1,1,1,1,1,1,1", UNET)


def test_no_text_hangs_or_fails_otherwise():
    draws = random.Random(5)
    words = [
        *KINDS,
        "in",
        "mid",
        "OUT01",
        "IN00-OUT02",
        "NOT",
        "/",
        "=",
        ",",
        ";",
        "\n",
        "@",
        "1",
        "0.5@2",
        "*",
        "?",
        "[",
        "(",
    ]
    words += [".*", "base", "all", "R", "X+1", "-", "attn1", "%", "é", "\0", "linear", "of steps-2", "INALL", "proj_in"]
    began = time.process_time()
    read = 0
    for _ in range(1500):
        text = "".join(draws.choice(words) + draws.choice(["", "", " "]) for _ in range(draws.randrange(1, 14)))
        try:
            parse_blocks(text, draws.choice([UNET, FLUX]), draws.choice(["hold", "linear"]))
            read += 1
        except ValueError as error:
            assert str(error).startswith("blocks: "), text
    assert read > 10
    assert time.process_time() - began < 60
    began = time.process_time()
    for text in ("*a" * 95 + "b=1", "?" * 199 + "x=1", ("in " * 66 + "=1,") * 35, "1," * 3999, "=" * 8000):
        try:
            parse_blocks(text, UNET)
        except ValueError as error:
            assert str(error).startswith("blocks: ")
    assert time.process_time() - began < 10
