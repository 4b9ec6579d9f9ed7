"""Named block weights: this pack's own, and files of the user's."""

import pytest
from torch import nn

from lora_loom.kernels.strengths.blocks import parse_blocks
from lora_loom.kernels.strengths.presets import PRESETS, find, parse_presets, read_presets

LBW = """# lines of sd-webui-lora-block-weight

NONE:0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0
ROUT:1,1,1,1,1,1,1,1,R,R,R,R,R,R,R,R,R   # drawn
ALL0.5:0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0.5
my style 2: all=0, input_blocks/attn=0.5@1,1@6
my style 2: 1,0,0
"""


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.ModuleDict({"img_attn": nn.Linear(2, 2)}) for _ in range(3)])


def test_files_of_others_are_read_as_they_are(tmp_path):
    path = tmp_path / "presets.txt"
    path.write_text("\ufeff" + LBW.replace("\n", "\r\n"), encoding="utf-8")
    presets = read_presets(path)
    assert presets["NONE"] == (",".join(["0"] * 17),)  # takes the place of our own
    assert presets["ROUT"][0].endswith("R,R,R")
    assert presets["my style 2"] == ("all=0, input_blocks/attn=0.5@1,1@6", "1,0,0")
    assert presets["OUTALL"] == PRESETS["OUTALL"]


def test_no_file_no_presets_of_ones_own(tmp_path):
    assert read_presets(tmp_path / "none.txt") == PRESETS


@pytest.mark.parametrize(
    "text, message",
    [
        ("INS 1,0,0", r"^presets\.txt, line 1 \('INS 1,0,0'\): expected NAME: weights; put # before"),
        ("\n\nINS:", r"^presets\.txt, line 3"),
        (":1,0", "line 1"),
        ("a/b:1,0", "'a/b' is no name for a preset"),
        ("a" * 61 + ":1", "is no name for a preset"),
        ("a:" + "1," * 5000, "10000 letters, expected at most 8000"),
        ("a:1\n" * 2001, "2001 lines, expected at most 2000"),
    ],
)
def test_files_that_cannot_be_read(text, message, tmp_path):
    path = tmp_path / "presets.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_presets(path)


def test_what_is_no_text(tmp_path):
    path = tmp_path / "presets.txt"
    path.write_bytes(b"\xff\xfe\x00INS")
    with pytest.raises(ValueError, match=r"presets\.txt: this is no text"):
        read_presets(path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(ValueError, match="larger than 1048576 bytes"):
        read_presets(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_presets(tmp_path)


def test_names():
    assert find("outall", PRESETS) == PRESETS["OUTALL"]
    with pytest.raises(ValueError, match="there is no preset 'OUTTALL'; do you mean OUTALL"):
        find("OUTTALL", PRESETS)
    with pytest.raises(ValueError, match="do you mean mine or MINE"):
        find("Mine", {"mine": ("all=1",), "MINE": ("all=0",), "other": ("all=2",)})


def test_presets_are_used_and_fit_or_say_why_not():
    model = Tiny()
    presets = parse_presets(LBW + "again: NONE\nbad: all=much\n", "presets.txt")
    paths = [f"double_blocks.{n}.img_attn" for n in range(3)]
    found = parse_blocks("my style 2", model, presets=presets)
    assert [found.of(path).constant for path in paths] == [1, 0, 0]  # the second line: there are no input_blocks
    assert [parse_blocks("all0.5", model).of(path).constant for path in paths] == [0.5] * 3
    changed = parse_blocks("my style 2\ndouble.2=0.3", model, presets=presets)
    assert [changed.of(path).constant for path in paths] == [1, 0, 0.3]
    for name, message in (
        (
            "NONE",
            r"^blocks: the preset 'NONE' does not fit this model: a vector of 17 numbers, but this model takes 3 or 4",
        ),
        ("again", "there is no preset 'NONE'"),
        ("bad", "'much' is no weight"),
        ("in", r"there is no preset 'in'.*for blocks write names=weight, such as in=0\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_blocks(name, model, presets=presets)


def test_what_a_preset_says_of_text_encoders():
    model = Tiny()
    for name, weight in (("NONE", 0), ("ALL0.5", 0.5)):
        found = parse_blocks(name, model)
        assert found.components == {"te": weight}
        assert found.notes == (f"blocks: te={weight:g} is for the text encoders",)
        assert {found.of(f"double_blocks.{n}.img_attn").constant for n in range(3)} == {weight}
        assert parse_blocks(f"{name}, te=1", model).components == {}
        assert parse_blocks(f"{name}\nTE=0.25", model).components == {"te": 0.25}
    assert parse_blocks("ALL", model) == parse_blocks("all=1, te=1", model)
    assert not parse_blocks("ALL", model).components
    assert parse_blocks("0.5,1,1,1\nte=1", model).components == {}  # after a vector, whose BASE is for them too
    assert "te=0 has no effect" in parse_blocks("te=0, te=0.5", model).notes[0]
    assert parse_blocks("double=0", model).components == {}
    with pytest.raises(ValueError, match="^blocks: te changes over the run, .*; write te=0@1,1@5 in components"):
        parse_blocks("te=0@1,1@5", model)
    for bad in ("te/attn=0", "NOT te=0", "te double=0"):
        with pytest.raises(ValueError, match="^blocks: there is no block 'te'"):
            parse_blocks(bad, model)
