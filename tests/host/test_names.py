"""Our name tables against the host's own."""

import comfy.lora
import comfy.utils
import pytest

from full_size import FAMILIES, SD_UNETS, full_size
from lora_loom.kernels.names import NameTable, diffusers_paths, sd_unet_layout
from tiny import tiny

TINY = ("tiny sd15", "tiny sd2", "tiny sdxl")


def build(name):
    return tiny(name.removeprefix("tiny ")).model if name.startswith("tiny ") else full_size(name)


def host_map(model):
    """Spelling -> canonical path, as the host's loaders have it; whole layers that exist in this model only."""
    present = {key for key in model.state_dict() if key.endswith(".weight")}
    found = comfy.lora.model_lora_keys_unet(model, {})
    return {name: key.removesuffix(".weight") for name, key in found.items() if isinstance(key, str) and key in present}


@pytest.mark.parametrize("name", [*SD_UNETS, *TINY])
def test_unet_tables_equal_the_hosts(name):
    model = build(name)
    ours, theirs = NameTable.of(model).accepted(), host_map(model)
    assert {name: ours.get(name) for name in theirs} == theirs
    for name in ours.keys() - theirs.keys():  # the host knows diffusers' attention layers by an older spelling only
        older = name.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
        assert older != name
        assert theirs[older] == ours[name]


@pytest.mark.parametrize("name", [*SD_UNETS, *TINY])
def test_unet_paths_equal_the_hosts(name):
    model = build(name)
    layout = sd_unet_layout(model)
    present = {key.removeprefix("diffusion_model.").removesuffix(".weight") for key in model.state_dict()}
    theirs = comfy.utils.unet_to_diffusers(model.model_config.unet_config)
    theirs = {
        host.removesuffix(".weight"): diffusers.removesuffix(".weight")
        for diffusers, host in theirs.items()
        if diffusers.endswith(".weight") and not diffusers.startswith("class_embedding")
    }
    ours = diffusers_paths(layout)
    assert {path: ours[path] for path in ours if path in present} == {
        path: theirs[path] for path in theirs if path in present
    }


@pytest.mark.parametrize("name", [*FAMILIES, *TINY])
def test_written_names_are_read_by_the_host_and_by_us(name):
    model = build(name)
    table, theirs = NameTable.of(model), host_map(model)
    paths, state = set(table.accepted().values()), model.state_dict()
    assert len({table.write(path) for path in paths}) == len(paths)
    for path in paths:
        assert table.find(table.write(path)) == path
        if path + ".weight" in state:
            assert theirs[table.write(path)] == path


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in SD_UNETS])
def test_other_families_are_written_under_the_hosts_paths(name):
    model = full_size(name)
    table = NameTable.of(model)
    assert table.layout is None
    assert all(table.write(path) == path for path in table.accepted().values())


@pytest.mark.parametrize(("name", "sdxl"), [("sd15", False), ("sd2", False), ("sd2_unclip", False), ("sdxl", True)])
def test_kohyas_spelling(name, sdxl):
    table = NameTable.of(full_size(name))
    assert table.layout.sdxl is sdxl
    written = table.write("diffusion_model.input_blocks.4.1.proj_in")
    assert written == ("lora_unet_input_blocks_4_1_proj_in" if sdxl else "lora_unet_down_blocks_1_attentions_0_proj_in")
