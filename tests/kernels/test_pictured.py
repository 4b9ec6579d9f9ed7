"""What pictures of strengths are told: bars and rules that agree with the parser, on every text it reads."""

import random

import pytest

from lora_loom.kernels.strengths.blocks import parse_blocks
from lora_loom.kernels.strengths.components import items_of, spans_of
from lora_loom.kernels.strengths.pictured import drawn, pictured
from lora_loom.kernels.strengths.schedule import parse
from test_block_weights import UNET


def bars(text, **how):
    return {bar.id: (bar.weight, bar.others) for bar in pictured(text, UNET, **how).bars}


def rules(text, **how):
    found = pictured(text, UNET, **how).rules
    return [(text[rule.begin : rule.end], text[rule.value : rule.end], rule.kept) for rule in found]


def test_bars_are_the_blocks_in_the_models_order():
    found = bars("")
    assert list(found) == ["base", *(block.id for block in UNET.blocks), "te"]
    assert set(found.values()) == {(1.0, "")}


def test_rules_and_where_they_stand():
    text = " in=0.5 ,\n attn = 0.2; te=0.25\nout=0.1@1, 0.6@6"
    assert rules(text) == [
        ("in=0.5", "0.5", False),
        ("attn = 0.2", "0.2", True),
        ("te=0.25", "0.25", False),
        ("out=0.1@1, 0.6@6", "0.1@1, 0.6@6", True),
    ]
    found = bars(text)
    assert found["te"] == (0.25, "")
    ins = [block.id for block in UNET.blocks if block.role == "in"]
    outs = [block.id for block in UNET.blocks if block.role == "out"]
    assert all(found[block][0] == 0.5 for block in ins) and any("0.2 to 0.5" in found[block][1] for block in ins)
    assert all(found[block] == (1.0, "0.1@1,0.6@6") for block in outs)
    named = pictured(text, UNET).rules[0].bars
    assert list(named) == ins


def test_vectors_are_read_entry_by_entry():
    count = len(UNET.blocks)
    text = ",".join(["0.5", *(str(number) for number in range(count))]) + "\nmid=2"
    found = pictured(text, UNET)
    assert [rule.kind for rule in found.rules] == ["entry"] * (count + 1) + ["rule"]
    assert found.rules[0].bars == ("base", "te")  # BASE is for both
    assert [rule.bars for rule in found.rules[1 : count + 1]] == [(block.id,) for block in UNET.blocks]
    given = bars(text)
    assert given["te"] == given["base"] == (0.5, "")
    wanted = {block.id: float(number) for number, block in enumerate(UNET.blocks) if block.role != "mid"}
    assert {block: given[block][0] for block in wanted} == wanted


def test_presets():
    found = pictured("ATTN\nmid=0", UNET)
    assert [(rule.kind, rule.kept) for rule in found.rules] == [("preset", False), ("rule", False)]
    assert any(bar.others == "0 to 1" for bar in found.bars)


@pytest.mark.parametrize("text", ["atn1=0", "in=x", "in", "1,1,1", "in=0.1@noon", "=1", "x" * 9000, "te=0@1,1@5"])
def test_errors_are_the_parsers(text):
    with pytest.raises(ValueError) as ours:
        pictured(text, UNET)
    with pytest.raises(ValueError) as theirs:
        parse_blocks(text, UNET)
    assert str(ours.value) == str(theirs.value)


def test_what_a_part_of_a_model_does_not_have_is_kept():
    """Of a file alone: another vector, a block or a kind that the file has nothing of."""
    found = pictured("1,0,1\nIN99=0.5, in=0.25", UNET, lenient=True)
    assert [(rule.kind, rule.kept, bool(rule.fault)) for rule in found.rules] == [
        ("entry", True, True),
        ("rule", True, True),
        ("rule", False, False),
    ]
    assert bars("IN99=0.5, in=0.25", lenient=True)["input_blocks.0"] == (0.25, "")
    with pytest.raises(ValueError, match="oops"):  # wrong for every model
        pictured("in=oops", UNET, lenient=True)


def test_bars_agree_with_the_parser_on_drawn_texts():
    draws = random.Random(4)
    names = ["in", "mid", "out", "all", "base", "te", "IN01", "OUT0-1", "attn", "in/ff", "NOT mid", "proj_in"]
    checked = 0
    for _ in range(300):
        text = draws.choice([", ", "\n", ";"]).join(
            f"{draws.choice(names)}={draws.choice(['0', '0.5', '-1', '1.5', '0@1,1@3'])}"
            for _ in range(draws.randint(1, 6))
        )
        try:
            real = parse_blocks(text, UNET)
        except ValueError:
            continue
        for bar in pictured(text, UNET).bars:
            if bar.id == "te":
                assert bar.weight == real.components.get("te", 1.0)
                continue
            own = {real.of(path).constant for path, block in UNET.block_of.items() if block == bar.id}
            assert (own == {bar.weight}) == (bar.others == ""), text
            checked += 1
    assert checked > 500


def test_items_and_their_places():
    draws = random.Random(1)
    for _ in range(3000):
        text = "".join(draws.choice("ab=@,;\n 1\t") for _ in range(draws.randint(0, 25)))
        places = spans_of(text)
        assert len(places) == len(items_of(text))
        for (begin, end), item in zip(places, items_of(text), strict=True):
            written = [part.strip() for part in text[begin:end].replace(";", ",").replace("\n", ",").split(",")]
            assert ",".join(filter(None, written)) == item


def test_schedules_as_points():
    found = drawn("0.2@10%, 1@0.5,0.4@90% linear of steps-2")
    assert [item for item, _ in found.points] == ["0.2@10%", "1@0.5", "0.4@90%"]
    assert (found.how, found.inset, found.constant) == ("linear", 2, None)
    assert [(point.weight, point.position, point.unit) for _, point in found.points][1] == (1.0, 0.5, "fraction")
    assert drawn("0.7").constant == 0.7 and not drawn("0.7").points
    assert drawn(" ").constant == 1.0
    alone = drawn("0.6@6")  # one weight all the time, and still a point
    assert alone.constant == 0.6 and len(alone.points) == 1
    with pytest.raises(ValueError, match="steps: .*is no place in a run"):
        drawn("1@noon")


def test_points_written_together_are_the_schedule():
    for text in ("0.1@1, 0.6@6", "1@s2.5,0@14σ cosine", "0@0%,1@100% of steps-2"):
        found = drawn(text)
        ending = (f" {found.how}" if found.how else "") + (f" of steps-{found.inset}" if found.inset else "")
        assert parse(", ".join(item for item, _ in found.points) + ending, "steps") == parse(text, "steps")
