"""What found no place is told by cause, with what helps, quickly, and never by the thousand."""

import random
import re
import time
from collections import Counter

import pytest
import torch

from adapter_files import CLIP, KEY, PREFIX, flux, lora, unet
from lora_loom.kernels import reading
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import Unplaced, read_lora
from lora_loom.kernels.unplaced import CURES, base_of, both_bases, called, grouped, nearest, summary

SD1_FACT = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
SDXL_FACT = "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k"


def sd(width):
    """SD1's layers at toy sizes, the text as wide as a real one."""
    return {path: (6, width) if path.endswith("attn2.to_k") else shape for path, shape in unet().items()}


def test_every_reason_has_its_cure():
    reasons = {value for name, value in vars(reading).items() if name.isupper() and isinstance(value, str)}
    assert reasons >= CURES.keys() >= {item.reason for item in all_causes()[0].unplaced}


def all_causes():
    """A file with a key of every cause."""
    table = NameTable(unet())
    keys = lora("lora_unet_" + KEY.replace(".", "_"), (6, 4))
    keys |= lora("unet." + KEY, (7, 4))  # shape
    again = lora("lora_unet_input_blocks_1_1_proj_in", (6, 4))
    keys |= again | {key.replace("lora_unet_", "lora_unet__"): tensor for key, tensor in again.items()}  # duplicate
    keys |= lora("lora_unet_input_blocks_20_0_op", (6, 4), alpha=2.0)  # wrong base
    keys |= lora("lora_te_text_model_encoder_layers_0_mlp_fc1", (6, 6))  # no encoder
    keys |= lora("my_own_middle_block_1_proj_in", (6, 4))  # prefix
    keys["lora_unet_middle_block_1_proj_in.lora_down.weight"] = torch.ones(2, 4)  # incomplete
    keys |= {"lora_unet_time_embed_0.lora_down.weight": torch.full((2, 4), torch.nan)}  # damaged
    keys["something"] = torch.ones(1)  # unknown
    return read_lora(keys, table), table


def test_one_line_for_each_cause():
    file, table = all_causes()
    counts = Counter(item.reason for item in file.unplaced)
    assert counts.keys() == CURES.keys()
    lines = grouped(file.unplaced, table, file.architecture, file.evidence)
    assert [line.split("; ")[0] for line in lines] == [
        f"{count} {'key' if count == 1 else 'keys'} left out, {cause}" for cause, count in counts.most_common()
    ]
    for line, cause in zip(lines, (cause for cause, _ in counts.most_common()), strict=True):
        assert f"for example {next(item.key for item in file.unplaced if item.reason == cause)}" in line
    by_cause = dict(zip((cause for cause, _ in counts.most_common()), lines, strict=True))
    assert "connect the CLIP" in by_cause[reading.NO_ENCODER]
    assert by_cause[reading.PREFIX].endswith("nearest in this model: diffusion_model.middle_block.1.proj_in")
    assert by_cause[reading.UNKNOWN].endswith("nothing in this model is called alike")
    assert "the layer needs (6, 2)" in by_cause[reading.SHAPE]
    assert "lora_down.weight holds NaN or infinity" in by_cause[reading.DAMAGED]


def test_nothing_left_out_is_nothing_told():
    table = NameTable(unet())
    file = read_lora(lora("lora_unet_" + KEY.replace(".", "_"), (6, 4)), table)
    assert grouped(file.unplaced, table, file.architecture, file.evidence) == []
    assert summary("cat.safetensors", file, "fuse") == "cat.safetensors: 1 of 1 layers placed, engine fuse"


@pytest.mark.parametrize(
    ("fact", "width", "shapes", "both"),
    [
        (SDXL_FACT, 2048, sd(768), ("SDXL", "SD1.5")),
        (SDXL_FACT, 2048, flux(), ("SDXL", "Flux")),
        (SD1_FACT, 768, flux(), ("SD1.5", "Flux")),
        (SD1_FACT, 768, sd(1024), ("SD1.5", "SD2")),
        (SD1_FACT, 1024, sd(768), ("SD2", "SD1.5")),
        ("transformer.single_transformer_blocks.0.attn.to_q", 8, sd(768), ("Flux", "SD1.5")),
    ],
)
def test_wrong_bases_are_both_named(fact, width, shapes, both):
    table = NameTable(shapes)
    file = read_lora(lora(fact, (6, width)) | lora("lora_unet_time_embed_2", (6, 4)), table)
    assert file.unplaced
    named = both_bases(file.architecture, file.evidence, table)
    assert re.fullmatch(rf"made for {both[0]} \(.*\), the model is {both[1]}", named)
    assert named in grouped(file.unplaced, table, file.architecture, file.evidence)[0]
    assert summary("x.safetensors", file, "fuse").endswith(named)


def test_bases_that_may_be_the_same():
    table = NameTable(sd(768))
    for architecture in (None, "sd", "sd1"):
        assert both_bases(architecture, "", table) == ""
    assert base_of(table) == "sd1" and base_of(NameTable(unet())) == "sd" and base_of(NameTable({})) is None
    assert called("some_new_family") == "some_new_family" and called(None) == "a model not known here"


@pytest.mark.parametrize("shapes", [unet() | CLIP, flux()], ids=["unet", "flux"])
def test_the_nearest_name_is_that_of_the_layer_with_one_letter_wrong(shapes):
    table = NameTable(shapes)
    draws = random.Random(5)
    found = 0
    paths = [path for path in shapes if len(shapes[path]) > 1]
    for path in draws.sample(paths, min(40, len(paths))):
        for dialect in ("native", "host"):
            name = table.write(path, dialect)
            place = draws.randrange(max(len(PREFIX), len(name) // 2), len(name))
            letter = draws.choice("qzj")
            if not name[place].isalpha():
                continue  # another number is another layer
            wrong = name[:place] + letter + name[place + 1 :]
            found += table.find(wrong) is None
            assert nearest(wrong, table) == path
    assert found > 10


def test_nothing_is_near():
    assert nearest("", NameTable(unet())) == nearest("x" * 100_000, NameTable(unet())) == ""
    assert nearest("lora_unet_x", NameTable({})) == ""


def test_five_thousand_keys_on_a_large_model_take_no_time():
    shapes = flux(doubles=40, singles=120)
    table = NameTable(shapes)
    reasons = list(CURES)
    names = ["transformer.blocks.{}.attn.to_q.lora_A.weight", "lora_unet_mid_{}.lora_up.weight"]
    names.append("x" * 5000 + ".{}.alpha")
    many = [Unplaced(names[n % 3].format(n), reasons[n % 8], "because " * 50) for n in range(5000)]
    begun = time.process_time()
    lines = grouped(many, table, "sdxl", "it says so")
    assert time.process_time() - begun < 10
    assert len(lines) == len(CURES) and all(len(line) < 2000 for line in lines)


def test_layers_are_counted_with_those_that_found_no_place(monkeypatch):
    table = NameTable(flux())
    keys = {}
    for part in ("to_q", "to_k", "to_v"):  # three names, one layer
        keys |= lora(f"transformer.transformer_blocks.0.attn.{part}", (8, 8))
    keys |= lora("transformer.transformer_blocks.9.attn.to_q", (8, 8), alpha=1.0)  # a layer that is not there
    keys |= {"transformer.transformer_blocks.1.attn.to_out.0.nonsense": torch.ones(2)}
    keys |= lora("lora_unet_single_blocks_0_linear2", (8, 40), alpha=1.0)
    keys["lora_unet_single_blocks_0_linear2.dora_scale.x"] = torch.ones(2)
    file = read_lora(keys, table)
    assert len(file.adapters) == 2
    counts = Counter(item.reason for item in file.unplaced)
    assert counts == {reading.WRONG_BASE: 3, reading.UNKNOWN: 2}
    text = "x.safetensors: 2 of 5 layers placed, engine branch; keys left out: 3 wrong base, 2 unknown"
    assert summary("x.safetensors", file, "branch") == text + " (LOOM_DEBUG=1 lists them)"
    monkeypatch.setenv("LOOM_DEBUG", "1")
    first, *rest = summary("x.safetensors", file, "branch").splitlines()
    assert first == text
    assert [line.split(":")[0].strip() for line in rest] == [item.key for item in file.unplaced]
    assert f"{PREFIX}double_blocks.0.img_attn.qkv" in file.adapters
