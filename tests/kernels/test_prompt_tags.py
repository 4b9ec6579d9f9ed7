"""``<lora:…>`` in prompts: what every dialect's own examples mean, what is refused, and what stays of the prompt."""

import numpy as np
import pytest
from torch import nn

from lora_loom.kernels.strengths.blocks import parse_blocks
from lora_loom.kernels.strengths.dialects import ARGUMENTS, DIALECTS, TABLE, dialect_table
from lora_loom.kernels.strengths.schedule import Clock, Point, Schedule, fixed, parse
from lora_loom.kernels.strengths.tags import Tag, TagError, canonical, parse_prompt

RUN = Clock([14.6 * 0.8**n for n in range(20)] + [0.0])


def tag(text, dialect="sdnext", encoders=()):
    (found,) = parse_prompt(f"a cat, {text}, sitting", dialect, encoders).tags
    assert parse_prompt(canonical(found), "sdnext", encoders).tags == (found,)
    return found


def steps(schedule, clock=RUN):
    """The weight of each step of a run of twenty."""
    return [schedule.at(clock, sigma) for sigma in clock.sigmas[:-1]]


def held(*pieces):
    return [weight for weight, count in pieces for _ in range(count)]


# what all dialects read alike


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<lora:name>", {}),
        ("<lora:name:1.0>", {}),
        ("<LoRA: name :0.7>", {"model": 0.7, "clip": 0.7}),
        ("< lora:a/my name_v1.safetensors:-.5 >", {"name": "a/my name_v1.safetensors", "model": -0.5, "clip": -0.5}),
        ("<lyco:name:0.7>", {"model": 0.7, "clip": 0.7}),
        ("<loractl:name:0.7>", {"model": 0.7, "clip": 0.7}),
        ("<lora:name:te=0.5:unet=1.5>", {"model": 1.5, "clip": 0.5}),
        ("<lora:name:clip=0:transformer=2>", {"model": 2.0, "clip": 0.0}),
        ("<lora:name:in=0:mid=1:out=0>", {"blocks": "in=0\nmid=1\nout=0"}),
        ("<lora:name:0.8:mid=1>", {"clip": 0.8, "blocks": "all=0.8\nmid=1"}),
        ("<lora:name:1:lbw=OUTALL>", {"blocks": "OUTALL"}),
        ("<lora:name:1:LBW=1, 0,R,U,0.25>", {"blocks": "1, 0,R,U,0.25"}),
        ("<lora:name:1:lbw=1,X,X+0.2,X-0.2>", {"blocks": "1,1,1.2,0.8"}),
        ("<lora:name:1:lbw=1,X,X+0.2,X-0.2:x=0.7>", {"blocks": "1,0.7,0.9,0.5"}),
        ("<lora:name:1:blocks=in/attn=0.1@1,0.6@6; mid=0>", {"blocks": "in/attn=0.1@1,0.6@6\nmid=0"}),
        ("<lora:name:1:lbwe=IN05-OUT05:attn:0.3>", {"blocks": "IN05-OUT05/attn=0.3"}),
        (
            "<lora:name:1:lbw=ALL:lbwe=IN04 M00:attn1 ff:0.3,::0.5:low>",
            {
                "side": "low",
                "blocks": "ALL\nIN04/attn1=0.3\nIN04/ff=0.3\nM00/attn1=0.3\nM00/ff=0.3\nall=0.5",
            },
        ),
        ("<lora:name:1:lbwe=NOT IN04 M00:NOT attn ff:0.3>", {"blocks": "NOT IN04 M00/NOT attn ff=0.3"}),
        ("<lora:name:1:lbwe=ATTNDEEPOFF>", {"blocks": "IN05-OUT05/attn=0"}),
        ("<lora:name:module=unet>", {"module": "unet"}),
        ("<lora:name:module=Transformer>", {"module": "unet"}),
        ("<lora:name:module=text_encoder_2>", {"module": "te2"}),
        ("<lora:name:module=clip_g>", {"module": "clip_g"}),
        ("<lora:name:1:low>", {"side": "low"}),
        ("<lora:name:HIGH:0.5>", {"side": "high", "model": 0.5, "clip": 0.5}),
        ("<lora:name:module=transformer_2>", {"module": "unet", "side": "low"}),
        ("<lora:name:te1=0.3>", {"components": {"te1": 0.3}}),
        ("<lora:name:0.8:te2=0.3:t5xxl=0>", {"model": 0.8, "components": {"te": 0.8, "te2": 0.3, "t5xxl": 0.0}}),
    ],
)
def test_every_dialect(dialect, text, expected):
    numbers = {key: fixed(expected[key]) for key in ("model", "clip") if key in expected}
    components = {name: fixed(value) for name, value in expected.get("components", {}).items()}
    assert tag(text, dialect) == Tag(**{"name": "name"} | expected | numbers | {"components": components})


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # sd-webui-lora-block-weight: nothing until the sampler's step N (1-based), nothing from there on
        ("<lora:name:1:start=5>", held((0, 4), (1, 16))),
        ("<lora:name:1:stop=10>", held((1, 9), (0, 11))),
        ("<lora:name:1:start=5:stop=10>", held((0, 4), (1, 5), (0, 11))),
        ("<lora:name:1:step=5-10>", held((0, 4), (1, 5), (0, 11))),
        ("<lora:name:1:step=-10>", held((1, 9), (0, 11))),
        ("<lora:name:1:start=0>", held((1, 20))),
        ("<lora:name:1:start=1:stop=3>", held((1, 2), (0, 18))),
        ("<lora:name:1:start=25%:stop=0.5>", held((0, 5), (1, 5), (0, 10))),
        ("<lora:name:1:start=s9:stop=s5>", held((0, 3), (1, 2), (0, 15))),
        ("<lora:name:1:start=s99>", held((1, 20))),
        ("<lora:name:1:stop=s99>", held((0, 20))),
        ("<lora:name:1:steps=0.2@1;1~5>", held((0.2, 4), (1, 16))),
    ],
)
def test_when_it_acts_on_the_model(dialect, text, expected):
    found = tag(text, dialect)
    assert steps(found.steps) == expected
    assert (found.model, found.clip) == (fixed(1), fixed(1))


# what they read differently


def test_sdnext_switches_at_steps_that_count_from_one():
    found = tag("<lora:name:te=0.1@1,0.6@6>")
    assert steps(found.clip) == held((0.1, 5), (0.6, 15))
    assert found.model == fixed(1)
    assert steps(tag("<lora:name:unet=0@1,1@0.5,0@75%>", "a1111").model) == held((0, 10), (1, 5), (0, 5))


def test_loractl_blends_over_fractions_of_two_steps_less():
    """Its own arithmetic: numpy.interp(step / (steps - 2), places, weights)."""
    found = tag("<lora:name:0@0,1@0.5>", "loractl")
    assert found.model == found.clip == parse("0@0%,1@50% linear of steps-2", "x")
    assert np.allclose(steps(found.model), np.interp(np.arange(20) / 18, [0, 0.5], [0, 1]), atol=1e-5)
    for text in ("1@1;0@0", "0~0,1", " 0@0 ; 1~1 ", "1@1,0@0"):  # no place is 1, order is no matter
        ramp = tag(f"<lora:name:unet={text}>", "loractl").model
        assert np.allclose(steps(ramp), np.interp(np.arange(20) / 18, [0, 1], [0, 1]), atol=1e-5)


def test_loractl_counts_steps_from_zero_where_a_place_is_above_one():
    found = tag("<lora:name:te=0.5:unet=0@0,1@10,0.5@12.5>", "loractl")
    assert np.allclose(steps(found.model), np.interp(np.arange(20), [0, 10, 12.5], [0, 1, 0.5]), atol=1e-5)
    assert found.clip == fixed(0.5)


def test_prompt_control_holds_and_begins_without_a_place():
    for text, dialect in (("<lora:name:0,1@0.5>", "prompt-control"), ("<loractl:name:0@0,1@0.5>", "sdnext")):
        assert steps(tag(text, dialect).model) == held((0, 10), (1, 10))
    for dialect in ("prompt-control", "sdnext", "a1111"):
        assert steps(tag("<loractl:name:0.5@0,1@5>", dialect).model) == held((0.5, 5), (1, 15))
    assert steps(tag("<loractl:name:0@0,1@0.5>", "loractl").model)[4] == pytest.approx(4 / 9)


def params_of(text):
    """A tag's items as the programs cut them: those without a name, and those with one."""
    items = text[1:-1].split(":")[1:]
    return [item for item in items if "=" not in item], dict(item.split("=", 1) for item in items if "=" in item)


def by_a1111(text):
    """(unet, te) by the documented order of its arguments: te, its default 1; unet, its default what te came to."""
    numbers, named = params_of(text)
    te = named.get("te", numbers[1] if len(numbers) > 1 else "1")
    return named.get("unet", numbers[2] if len(numbers) > 2 else te), te


@pytest.mark.parametrize("dialect", ["a1111", "loractl"])
@pytest.mark.parametrize("numbers", ["", ":0.6", ":0.6:0.8"])
@pytest.mark.parametrize("named", ["", ":te=0.2", ":te=0", ":unet=0.3", ":te=0.2:unet=0", ":unet=0:te=0.3"])
def test_te_is_for_the_model_too_where_the_programs_have_it_so(dialect, numbers, named):
    text = f"<lora:c{numbers}{named}>"
    on_model, on_text = by_a1111(text)
    assert tag(text, dialect) == Tag("c", model=fixed(float(on_model)), clip=fixed(float(on_text)))
    # a number that counts for nothing is told
    notes = parse_prompt(text, dialect).notes
    idle = ["0.6"] if numbers and "te=" in named else []
    idle += ["0.8"] if numbers.count(":") == 2 and "unet=" in named else []
    assert [note.partition("the number ")[2].partition(" has no effect")[0] for note in notes] == idle


def test_te_over_the_run_is_for_the_model_too():
    found = tag("<lora:c:te=0@0,1@0.5>", "loractl")
    assert found.model == found.clip
    assert np.allclose(steps(found.model), np.interp(np.arange(20) / 18, [0, 0.5], [0, 1]), atol=1e-5)
    found = tag("<lora:c:te=0.1@1,0.6@6:te1=0.3>", "a1111")
    assert steps(found.model) == held((0.1, 5), (0.6, 15))
    assert found.components == {"te": found.model, "te1": fixed(0.3)}
    found = tag("<lora:c:te=0.5:mid=1>", "a1111")
    assert (found.clip, found.blocks) == (fixed(0.5), "all=0.5\nmid=1")
    prompt = parse_prompt("<lora:c:te=0.5:module=unet>", "a1111")  # where it has an effect
    assert prompt.tags == (Tag("c", fixed(0.5), fixed(0.5), module="unet"),) and not prompt.notes
    assert parse_prompt("<lora:c:te=0.5:unet=1:module=unet>", "a1111").notes


@pytest.mark.parametrize("dialect", ["sdnext", "prompt-control"])
def test_te_is_for_the_text_encoders_alone_elsewhere(dialect):
    assert tag("<lora:c:te=0.5>", dialect) == Tag("c", fixed(1), fixed(0.5))
    assert tag("<lora:c:0.8:te=0>", dialect) == Tag("c", fixed(0.8), fixed(0))
    assert tag("<lora:c:0.8:unet=0.2>", dialect) == Tag("c", fixed(0.2), fixed(0.8))
    for name in ("te", "unet"):
        with pytest.raises(TagError, match=f"{name}= and two numbers"):
            parse_prompt(f"<lora:c:0.6:0.8:{name}=0.2>", dialect)


def test_the_table_says_what_the_programs_do_otherwise():
    rows = [row.meaning for row in TABLE if row.part.startswith("`te=`") or row.part == "second number"]
    assert sum("SD.Next itself" in row for row in rows) == 2
    (held_there,) = (row.meaning for row in TABLE if row.part == "`w@n,w@n`" and row.dialects == ("prompt-control",))
    assert "percents" in held_there


def test_the_second_number_is_the_text_encoders_except_where_it_came_first():
    for dialect in ("sdnext", "prompt-control"):
        assert tag("<lora:name:0.7:0.4>", dialect) == Tag("name", fixed(0.7), fixed(0.4))
    for dialect in ("a1111", "loractl"):
        assert tag("<lora:name:0.7:0.4>", dialect) == Tag("name", fixed(0.4), fixed(0.7))


@pytest.mark.parametrize("text", ["<lora:n:1:1:IN02>", "<lora:n:1:IN02>", "<lora:n:1:1:lbw=IN02>"])
def test_a1111_takes_block_weights_without_a_name(text):
    assert tag(text, "a1111") == Tag("n", blocks="IN02")


def test_a1111_takes_a_vector_in_third_place():
    assert tag("<lora:n:1:0.5:1,0,0,1>", "a1111") == Tag("n", model=fixed(0.5), blocks="1,0,0,1")


def test_interpolation_only_when_asked():
    for dialect, how in (("sdnext", "hold"), ("a1111", "hold"), ("prompt-control", "hold"), ("loractl", "linear")):
        assert tag("<lora:name:0@0%,1@50%>", dialect).model.interpolation == how
        assert tag("<lora:name:0@0%,1@50%:interp=Cosine>", dialect).model.interpolation == "cosine"
    assert tag("<lora:name:0@0%,1@50% linear>").model.interpolation == "linear"


def test_a_clip_gives_its_encoders_names():
    assert tag("<lora:n:qwen3_4b=0.5>", encoders=["qwen3_4b"]).components == {"qwen3_4b": fixed(0.5)}
    assert tag("<lora:n:module=qwen3_4b>", encoders=["qwen3_4b"]).module == "qwen3_4b"


# what its block weights do to a model


def unet():
    def stack(count):
        block = {"attn1": nn.Linear(4, 4), "ff": nn.Linear(4, 4)}
        return nn.ModuleList([nn.ModuleDict(block) for _ in range(count)])

    model = nn.Module()
    model.diffusion_model = nn.Module()
    parts = {"time_embed": nn.Linear(4, 4), "input_blocks": stack(12), "middle_block": nn.Sequential(*stack(3))}
    parts["output_blocks"] = stack(12)
    for name, part in parts.items():
        model.diffusion_model.add_module(name, part)
    return model


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "<lora:n:in=0:mid=0.5:out=0.25>",
            {"time_embed": 1, "input_blocks.3.ff": 0, "middle_block.1.ff": 0.5, "output_blocks.11.ff": 0.25},
        ),
        ("<lora:n:0.8:mid=1>", {"time_embed": 0.8, "input_blocks.3.ff": 0.8, "middle_block.1.ff": 1}),
        (
            "<lora:n:lbwe=IN05-OUT05:attn:0.3>",
            {"input_blocks.4.attn1": 1, "input_blocks.5.attn1": 0.3, "middle_block.0.attn1": 0.3}
            | {"output_blocks.5.attn1": 0.3, "output_blocks.6.attn1": 1, "output_blocks.5.ff": 1},
        ),
        (
            "<lora:n:0.8:lbw=" + ",".join(["0.5"] * 26) + ":lbwe=NOT IN05:ff:0.25>",
            {"input_blocks.5.ff": 0.4, "input_blocks.4.ff": 0.2, "input_blocks.4.attn1": 0.4, "time_embed": 0.4},
        ),
    ],
)
def test_block_weights_of_a_tag_on_a_model(text, expected):
    found = tag(text)
    weights = parse_blocks(found.blocks, unet())
    for path, weight in expected.items():
        assert weights.of(f"diffusion_model.{path}").scaled(found.model.constant) == fixed(weight), path


# what is told, and what is refused


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("<lora:name:0@1,1@5:hr=1>", "<lora:name…>: hr= has no effect: no second pass belongs to a prompt here"),
        ("<lora:name:hrte=0.5>", "hrte= has no effect"),
        ("<lora:name:0.5:te=1:unet=0>", "the number 0.5 has no effect, unet= and te= say what counts"),
        ("<lora:name:module=unet:te=0.5>", "te= has no effect beside module=unet"),
        ("<lora:name:module=unet:te2=0.5>", "te2= has no effect beside module=unet"),
        ("<lora:name:module=te:start=5>", "start= has no effect beside module=te"),
    ],
)
def test_what_has_no_effect_is_told(text, note):
    notes = parse_prompt(text).notes
    assert len(notes) == 1
    assert note in notes[0]
    assert not parse_prompt("<lora:name:0.5:te=1>").notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<lora:>", "<lora:…>: the name is missing; write <lora:name:1>"),
        ("<lora: :1>", "the name is missing"),
        ("<lora:cat:1", "<lora:cat…>: the tag does not end; write > behind it"),
        ("<lora:cat:1, a <b> c", "the tag does not end"),
        ("<lora:cat:1:lwo>", "'lwo' is no strength, do you mean 'low'?"),
        ("<lora:cat::1>", "nothing stands between two colons"),
        ("<lora:cat:1:1:32>", "a third number; to lower a LoRA's rank, make a resized file"),
        ("<lora:cat:1:dyn=4>", "dyn= lowers a LoRA's rank"),
        ("<lora:cat:umet=1>", "unknown argument 'umet', do you mean 'unet'?; known: unet, model, transformer"),
        ("<lora:cat:=1>", "unknown argument ''"),
        ("<lora:cat:te10=1>", "unknown argument 'te10'"),
        ("<lora:cat:unet=1:model=2>", "unet is said twice"),
        ("<lora:cat:lbw=ALL:blocks=in=0>", "blocks is said twice"),
        ("<lora:cat:1:0.5:te=1>", "te= and two numbers"),
        ("<lora:cat:1e3>", "strength: 1e3 is too much"),
        ("<lora:cat:unet=101>", "unet: 101 is too much"),
        ("<lora:cat:te=x>", "te: 'x' is no weight"),
        ("<lora:cat:te=0.1@1,0.6>", "te: '0.6' has no place"),
        ("<lora:cat:0@0,1@1>", "strength: steps count from 1"),
        ("<lora:cat:1:interp=linear>", "interpolation= has no effect"),
        ("<lora:cat:0@1,1@5:interp=smooth>", "interpolation is 'smooth', expected one of hold, linear, cosine"),
        ("<lora:cat:in=0:lbw=ALL>", "in= and block weights both say what blocks get"),
        ("<lora:cat:blocks= ; >", "blocks= is empty"),
        ("<lora:cat:x=1>", "x= has no effect, there is no vector"),
        ("<lora:cat:lbw=ALL:x=1>", "x= has no effect, the vector has no X"),
        ("<lora:cat:lbwe=attn>", "lbwe=attn: expected blocks:elements:weight"),
        ("<lora:cat:lbwe=IN05:attn:x>", "lbwe: 'x' is no weight"),
        ("<lora:cat:steps=0@1,1@5:stop=9>", "steps= and stop= say the same"),
        ("<lora:cat:step=5-9:stop=9>", "step= and start= or stop= say the same"),
        ("<lora:cat:step=5>", "step=5: expected two steps, as in step=5-10"),
        ("<lora:cat:step=->", "expected two steps"),
        ("<lora:cat:start=9:stop=5>", "stop=5 does not come after start=9"),
        ("<lora:cat:start=s5:stop=s9>", "stop=s9 does not come after start=s5"),
        ("<lora:cat:start=5:stop=50%>", "counted in different ways"),
        ("<lora:cat:stop=1>", "stop=1 leaves nothing of the run"),
        ("<lora:cat:start=soon>", "start: 'soon' is no place in a run"),
        ("<lora:cat:start=5,1@6>", "start: '5,1@6' is no place"),
        ("<lora:cat:module=vae>", "module=vae: there is no such part; known: unet, model, transformer, dit, te"),
        ("<lora:cat:module=>", "there is no such part"),
        ("<lora:cat:low:high>", "both high and low are asked for"),
        ("<lora:cat:high:module=transformer_2>", "both high and low"),
        ("<lora:cat:hr=x>", "hr: 'x' is no weight"),
        ("<lora:cat:lbwe=" + "IN01 " * 15 + ":" + "attn " * 15 + ":1>", "225 rules from lbwe=, expected at most 100"),
        ("<lora:cat:lbwe=" + "IN01 " * 9 + ":" + "attention.to_q " * 11 + ":1>", "would be 2195 letters, at most"),
        ("<lora:cat:lbwe=IN01;OUT2:attn:1>", "names of blocks and elements are words"),
        ("<lora:cat:" + "x" * 2000 + ">", "2011 letters, expected at most 2000"),
        ("<lora:cat>" * 65, "more than 64 tags"),
        ("a" * 100_001, "the prompt is 100001 letters long"),
    ],
)
def test_refused_with_a_cure(text, said):
    with pytest.raises(TagError) as error:
        parse_prompt(text)
    assert said in str(error.value)
    assert len(str(error.value)) < 700


@pytest.mark.parametrize(
    ("text", "dialect", "said"),
    [
        ("<lora:cat:0.5,1@1>", "loractl", "the first weight has no place, so loractl would take it for all of the run"),
        ("<lora:cat:0@0,1@50%>", "loractl", "bare numbers and other places in one list"),
        ("<lora:cat:0@0@1,1@1>", "loractl", "bare numbers and other places"),
        ("<lora:cat:0@0,1@200000>", "loractl", "step 200000, expected 0 to 100000"),
        ("<lora:cat:te=0,1>", "prompt-control", "two weights for one place"),
        ("<lora:cat:0,1>", "prompt-control", "'0,1' is no strength"),
        ("<lora:cat>", "a1112", "dialect is 'a1112', expected one of sdnext, a1111, loractl, prompt-control"),
    ],
)
def test_refused_in_other_dialects(text, dialect, said):
    with pytest.raises(TagError) as error:
        parse_prompt(text, dialect)
    assert said in str(error.value)


# the rest of the prompt


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a cat, <lora:x:1>, sitting", "a cat, sitting"),
        ("a cat <lora:x:1> sitting", "a cat sitting"),
        ("a cat<lora:x:1>, sitting", "a cat, sitting"),
        ("a cat, <lora:x:1> sitting", "a cat, sitting"),
        ("a cat,<lora:x:1>,sitting", "a cat,sitting"),
        ("a cat <lora:x:1>, sitting", "a cat, sitting"),
        ("ca<lora:x:1>t", "cat"),
        ("<lora:x:1> a cat", "a cat"),
        ("<lora:x:1>, a cat", "a cat"),
        ("a cat <lora:x:1>", "a cat"),
        ("a cat, <lora:x:1>", "a cat"),
        ("<lora:x:1>", ""),
        (" <lora:x:1> <lora:y:1>,", ""),
        ("a, <lora:x:1>, <lora:y:1> <lora:z:1>, b", "a, b"),
        ("a\n<lora:x:1>\nb", "a\nb"),
        ("a\n\n<lora:x:1>\n\nb", "a\n\n\nb"),
        ("a,\n<lora:x:1>, b", "a,\nb"),
        ("a, <lora:x:1>\nb", "a,\nb"),
        ("a <lora:x:1>,\nb", "a,\nb"),
        ("(<lora:x:1>, a cat:1.2) on", "(a cat:1.2) on"),
        ("(a cat, <lora:x:1>:1.2)", "(a cat:1.2)"),
        ("[a <lora:x:1>|b <lora:y:1>]", "[a|b]"),
        ("(a ,  b)  <lora:x:1> BREAK  c , ,d ", "(a ,  b)  BREAK  c , ,d "),
        (r"\(a\) <lora:x:1>, embedding:foo, a < b, <hyper:z:1>, <3", r"\(a\), embedding:foo, a < b, <hyper:z:1>, <3"),
        ("no tag, a < b,  <lora without a colon>, <lorax:y>", "no tag, a < b,  <lora without a colon>, <lorax:y>"),
        ("", ""),
    ],
)
def test_only_the_tags_leave_the_prompt(text, clean):
    assert parse_prompt(text).text == clean


def test_spans_and_order():
    text = "one <lora:a:1>, two <lyco:b:0.5:low>"
    found = parse_prompt(text).tags
    assert [tag.name for tag in found] == ["a", "b"]
    assert [text[slice(*tag.span)] for tag in found] == ["<lora:a:1>", "<lyco:b:0.5:low>"]


# the table


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.example)
def test_every_example_of_the_table_says_something(row):
    for dialect in row.dialects:
        parsed = parse_prompt(row.example, dialect)
        assert parsed.notes or row.example == "<lora:cat>" or parsed.tags[0] != Tag("cat")
        assert not row.names or any(f":{name}=" in row.example for name in row.names)


def test_examples_differ_where_the_table_says_so():
    """Rows about the same part have the same meaning nowhere: each dialect stands in one of them."""
    for part in {row.part for row in TABLE}:
        where = [dialect for row in TABLE if row.part == part for dialect in row.dialects]
        assert len(where) == len(set(where)), part
    assert len(set(ARGUMENTS)) == len(ARGUMENTS)


def test_the_table_as_markdown():
    lines = dialect_table().splitlines()
    assert len(lines) == len(TABLE) + 2
    assert {line.replace("`[^`]*`", "").count(" | ") for line in lines[2:]} == {3}
    for name in ARGUMENTS:
        assert any(f"`{name}=`" in line for line in lines), name


def test_canonical_text():
    everything = Tag(
        "style/cat",
        model=parse("0@0%,1@50% linear of steps-2", "x"),
        components={"te": parse("0.1@1,0.6@6", "x"), "te2": fixed(0)},
        blocks="OUTALL\nin/attn=0.5@1,1@s5",
        steps=Schedule((Point(0, 0, "fraction"), Point(1, 2.5))),
        side="high",
    )
    assert canonical(everything) == (
        "<lora:style/cat:unet=0@0.0,1@0.5 linear of steps-2:te=0.1@1,0.6@6:te2=0:blocks=OUTALL;in/attn=0.5@1,1@s5"
        ":steps=0@0.0,1@after2.5:high>"
    )
    assert parse_prompt(canonical(everything)).tags == (everything,)
