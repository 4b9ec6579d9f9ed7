"""Blocks from the keys of LoRA files alone: the same as those of the host's full-size models."""

import pytest

from full_size import FAMILIES, FURTHER, full_size, text_encoders
from lora_loom.kernels.block_names import resolve
from lora_loom.kernels.blocks import BlockIndex, block_map
from lora_loom.kernels.file_blocks import GROUPS, blocks_of_file
from lora_loom.kernels.layers import attention_blocks
from lora_loom.kernels.names import DIALECTS, NameTable
from lora_loom.kernels.strengths.layout import Layout
from lora_loom.kernels.strengths.vectors import readings

EVERY = (*FAMILIES, *FURTHER)
ENDS = ("lora_down.weight", "lora_A.weight", "alpha", "hada_w1_a", "dora_scale")


def names_of(name, dialect):
    """(key in the file, path), for every layer of a matrix that has a name in the dialect."""
    table = NameTable.of(full_size(name))
    found = []
    for path, shape in table.shapes.items():
        if len(shape) < 2 or not path.startswith("diffusion_model."):
            continue
        try:
            parts = table.parts(path, "diffusers" if dialect == "lycoris" else dialect)
        except ValueError:
            continue
        for written, _ in parts:
            if dialect == "lycoris":
                written = "lycoris_" + written.removeprefix("unet.").removeprefix("transformer.").replace(".", "_")
            found.append((f"{written}.{ENDS[len(found) % len(ENDS)]}", path))
    return found


@pytest.mark.parametrize("dialect", [*DIALECTS, "lycoris"])
@pytest.mark.parametrize("name", EVERY)
def test_ids_are_those_of_the_model(name, dialect):
    model = full_size(name)
    names = names_of(name, dialect)
    if not names:  # no such names for this family
        assert dialect in ("bfl", "diffusers", "lycoris")
        return
    index, blocks = BlockIndex(block_map(model)), block_map(model)
    covered = {found.id for found in (index.of(path) for _, path in names) if found}
    wanted = [block for block in blocks if block.id in covered]
    told = "cosmos1" if name == "cosmos1" and dialect in ("diffusers", "lycoris") else None  # as the second one there
    keys = sorted(key for key, _ in names)  # as safetensors files have them
    found = blocks_of_file(keys, architecture=told)
    assert [(block.id, block.group) for block in found] == [(block.id, block.group) for block in wanted]
    if name in FAMILIES:  # the others are thinner than real ones, so that their roles differ
        assert [block.role for block in found] == [block.role for block in wanted]
        assert len(found) == len(blocks)  # everything that people train


@pytest.mark.parametrize("dialect", ["native", "kohya", "diffusers"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sdxl_refiner", "flux", "z_image", "hunyuan_video", "wan_14b"])
def test_names_and_vectors_mean_the_same_blocks(name, dialect):
    model = full_size(name)
    blocks = block_map(model)
    found = blocks_of_file([key for key, _ in names_of(name, dialect)])
    for text in ("all", "base", *{block.group for block in blocks}, *{block.role for block in blocks}, blocks[3].id):
        assert resolve(text, found) == resolve(text, blocks)
    paths = tuple(parameter.removesuffix(".weight") for block in found for parameter in block.parameters)
    ours, theirs = readings(Layout(tuple(found), paths)), readings(Layout.of(model))
    assert {length: [place.label for place in places] for length, places in ours.items()} == {
        length: [place.label for place in places] for length, places in theirs.items()
    }
    if "input_blocks" in GROUPS.get(NameTable.of(model).architecture, ()):
        assert [block.id for block in attention_blocks(found)] == [block.id for block in attention_blocks(blocks)]


@pytest.mark.parametrize("dialect", ["kohya", "diffusers", "lycoris"])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35_medium", "flux", "qwen_image", "wan_14b", "ltxv", "cosmos2"])
def test_files_of_attention_alone(name, dialect):
    """What most trainers write. Where other families have all these names, the caller has to tell."""
    index = BlockIndex(block_map(full_size(name)))
    names = [(key, path) for key, path in names_of(name, dialect) if "attn" in path or "linear1" in path]
    wanted = {index.of(path).id for _, path in names}
    found = blocks_of_file([key for key, _ in names], architecture="cosmos2" if name == "cosmos2" else None)
    assert {block.id for block in found} == wanted


def test_metadata_tell_where_names_do_not():
    keys = [f"transformer.transformer_blocks.{n}.attn1.to_q.lora_A.weight" for n in range(3)]
    assert [block.id for block in blocks_of_file(keys)] == [f"transformer_blocks.{n}" for n in range(3)]
    keys = [key.replace("attn1.to_q", "attn.to_q") for key in keys]
    found = blocks_of_file(keys, {"modelspec.architecture": "Qwen-Image"})
    assert [block.id for block in found] == [f"transformer_blocks.{n}" for n in range(3)]
    found = blocks_of_file(keys, {"modelspec.architecture": "stable-diffusion-3-medium"})
    assert [block.id for block in found] == [f"joint_blocks.{n}" for n in range(3)]


def test_a_single_block():
    keys = ["lora_unet_single_blocks_7_linear1.lora_down.weight", "lora_unet_single_blocks_7_linear1.alpha"]
    assert [block.id for block in blocks_of_file(keys)] == ["single_blocks.7"]
    keys = ["unet.up_blocks.1.attentions.2.proj_in.lora_A.weight"]
    assert [block.id for block in blocks_of_file(keys)] == ["output_blocks.5"]


def test_text_encoders_and_strangers_have_no_blocks():
    table = NameTable.of(text_encoders("sdxl"))
    keys = [f"{table.write(path, 'kohya')}.alpha" for path in table.text.paths if ".encoder.layers." in path]
    assert keys and blocks_of_file(keys) == []
    assert blocks_of_file(["some.thing.3.else.lora_A.weight"]) == []
    assert blocks_of_file([]) == []
