"""Random and mutated prompts, all dialects: only ``TagError`` is raised, at once, and canonical text is read back."""

import random
import time

import pytest

from lora_loom.kernels.strengths.dialects import ARGUMENTS, DIALECTS, OURS, TABLE, TagError
from lora_loom.kernels.strengths.tags import canonical, parse_prompt

COUNT = 5000  # for each dialect
STRENGTHS = [
    *("0.7", "-1", "1e-3", ".5", "0", "2.0", "0.1@1,0.6@6", "0@0,1@0.5", "0@0%,1@50%", "1@s14.6,0@2σ", "0~0;1~1"),
    *("1@1%,2@3%,0.5@99%", "0@1%,1@5% cosine", "0@0%,1@7% linear of steps-2"),
]
ODD = [
    *("101", "nan", "1" * 30, "0,1@0.5", "0@after2.5,1@9", "0-", "x", "", "²", "٣", "１", "1_0", "0x1", "inf", "--1"),
    *("1@²", "0@1@2", "1@5 wobbly", "in=0", "0.1@1,0.6@6,", "@", "1@", "@1", "NOT", "::", "1@100000,0@100001"),
]
PROPER = {  # values that go with an argument; all others are strengths
    "interpolation": ["hold", "linear", "cosine", "Linear"],
    "blocks": ["OUTALL", "1,X,X-0.2,R,U", "in=0.5;mid/attn=0@1,1@5", "NOT mid=0", "0.5,1,1"],
    "lbwe": ["IN05-OUT05:attn:0.3", "NOT IN04 M00:NOT ff:1,::0", "ATTNDEEPON"],
    "x": ["0.3", "-1"],
    "start": ["5", "0", "20%", "s9"],
    "stop": ["9", "50%", "s2"],
    "step": ["5-10", "-7", "3-"],
    "module": ["unet", "te2", "clip_g", "transformer_2"],
}
COMPONENTS = ["te1", "te3", "text_encoder_2", "clip_l"]
PIECES = ["<lora:", "<loractl:", ">", "<", ":", ",", "@", "=", "~", ";", " ", "\n", "\\(", "(", ")", "1", "low", "\0"]
PIECES += [f"{name}=" for name in (*ARGUMENTS, *COMPONENTS, "dyn")] + STRENGTHS + ODD


def random_tag(draw):
    parts = [draw.choice(["cat", "a/b c.safetensors", "x=y", "é@1"])]
    parts += draw.choices(STRENGTHS, k=draw.choice([0, 1, 1, 2]))
    for name in draw.sample([*ARGUMENTS, *COMPONENTS, "unet", "te"], draw.choice([0, 1, 1, 2, 3])):
        value = draw.choice(ODD if draw.random() < 0.05 else PROPER.get(OURS.get(name, name), STRENGTHS))
        parts.append(f"{name}={value}")
    parts += draw.sample(["low", "high"], 1) if draw.random() < 0.1 else []
    return f"<{draw.choice(['lora', 'lora', 'lyco', 'loractl', 'LORA '])}:{':'.join(parts)}>"


def mutated(text, draw):
    for _ in range(draw.randrange(1, 4)):
        at, length = draw.randrange(len(text) + 1), draw.choice([0, 0, 1, 3])
        what = draw.choice([draw.choice(PIECES), "", text[at : at + 10], chr(draw.randrange(1, 0x3000))])
        text = text[:at] + what + text[at + length :]
    return text


def prompts(draw):
    examples = [row.example for row in TABLE]
    for number in range(COUNT):
        kind = number % 4
        if kind == 0:
            yield "a, " + random_tag(draw) + ", b"
        elif kind == 1:
            yield mutated(draw.choice(examples), draw)
        elif kind == 2:
            yield mutated(random_tag(draw), draw)
        else:
            yield "".join(draw.choices(PIECES, k=draw.randrange(1, 30)))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nothing_else_is_raised_and_canonical_text_is_read_back(dialect):
    draw, read, slowest = random.Random(dialect), 0, 0.0
    for text in prompts(draw):
        begin = time.process_time()
        try:
            parsed = parse_prompt(text, dialect)
        except TagError as error:
            assert 10 < len(str(error)) < 900, text
            continue
        finally:
            slowest = max(slowest, time.process_time() - begin)
        read += len(parsed.tags)
        again = [parse_prompt(canonical(tag)) for tag in parsed.tags]
        assert [one.tags for one in again] == [(tag,) for tag in parsed.tags], text
        assert all(not one.text for one in again), text
        kept = sum(end - begin for begin, end in (tag.span for tag in parsed.tags))
        assert len(parsed.text) <= len(text) - kept
        assert not parse_prompt(parsed.text).tags
    assert read > COUNT / 6, read
    assert slowest < 0.3


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "text",
    [
        "<lora:" * 16_000,
        "<" * 100_000,
        "<lora:cat:1" + " " * 90_000,
        " ," * 40_000 + "<lora:cat:1>" + ", " * 9_000,
        "<lora:cat:" + "1" * 1900 + ">",
        "<lora:cat:te=" + "0" * 900 + "." + "0" * 900 + "x>",
        "<lora:cat:te=" + "1@" * 900 + ">",
        "<lora:cat:te=" + "1@1," * 450 + "1>",
        "<lora:cat:te=" + " " * 1900 + "x>",
        "<lora:cat:te=0@1,1@2" + " of steps-1" * 150 + ">",
        "<lora:cat" + ":1" * 950 + ">",
        "<lora:cat:lbw=" + "X+" * 900 + ">",
        "<lora:cat:lbwe=" + "a b " * 300 + ":" + "c d " * 150 + ":1>",
        "<lora:cat:lbwe=" + ":" * 1900 + ">",
        "<lora:cat:" + "unet" * 480 + "=1>",
        ("<lora:cat:te=" + "0.5@1%," * 100 + "1@99%>\n , ") * 64,
    ],
    ids=lambda text: text[:24],
)
def test_long_prompts_take_no_time(dialect, text):
    begin = time.process_time()
    try:
        for tag in parse_prompt(text, dialect).tags:
            assert parse_prompt(canonical(tag)).tags == (tag,)
    except TagError as error:
        assert len(str(error)) < 900
    assert time.process_time() - begin < 10
