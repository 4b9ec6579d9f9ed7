"""Our name tables against the host's own, and diffusers' names against diffusers' own converters."""

import re

import comfy.lora
import comfy.lora_convert
import comfy.utils
import diffusers.loaders.single_file_utils as converters
import pytest
import torch

import tiny as tiny_models
from full_size import FAMILIES, FURTHER, SD_UNETS, TEXT_ENCODERS, full_size, text_encoders
from lora_loom.kernels.dialects_unet import diffusers_paths
from lora_loom.kernels.names import NameTable, Place
from tiny import NEWER, tiny, tiny_clip, tiny_dual_clip

TINY = tuple(f"tiny {name}" for name in tiny_models.NAMES)
TINY_UNETS = ("tiny sd15", "tiny sd2", "tiny sdxl")
EVERY = (*FAMILIES, *FURTHER, *TINY)


def grouped(inputs, rows):
    """Grouped-query attention: keys and values have fewer rows than queries; the host slices as if they had as many."""
    fewer = (rows - inputs) // 2
    return {"k": ((inputs, inputs), (inputs, fewer)), "v": ((2 * inputs, inputs), (inputs + fewer, fewer))}


def gated(inputs, rows):
    """A gated MLP of three times the width; the host slices as if it were a plain one of four times."""
    return {"proj_mlp": ((3 * inputs, 4 * inputs), (3 * inputs, rows - 3 * inputs))}


# What the host's maps get wrong: family -> (names, piece of the name -> (the rows it takes, the right ones)).
HOST_ERRS = {"lumina2": (r".*attention[._]to_([kv])$", grouped), "flux2": (r".*(proj_mlp)$", gated)}
# Families whose diffusers names the host reads -> those that it lacks. It reads hardly any of the others' names, and of
# the UNets' attention layers only an older spelling.
HOST_LACKS = {
    "sd3": r"(?!)",
    "auraflow": r"(?!)",
    "pixart": r"(?!)",
    "flux": r"(?!)",
    "hidream": r"(?!)",
    "qwen_image": r"(?!)",
    "chroma": r"transformer\.distilled_guidance_layer\.",
    "flux2": r"transformer\.(time_guidance_embed|(double|single)_stream_modulation)"
    + ("" if NEWER else r"|.*\.linear_(in|out)$|.*\.to_qkv_mlp_proj$|.*single_transformer_blocks\.\d+\.attn\.to_out$"),
}
if NEWER:
    HOST_LACKS |= dict.fromkeys(("z_image", "kandinsky5", "ernie_image", "krea2"), r"(?!)")

# Families whose checkpoints diffusers converts -> its converter, and (ours, its) pieces of names where they differ.
CONVERTERS = {
    "sd35_medium": (converters.convert_sd3_transformer_checkpoint_to_diffusers, ()),
    "flux": (converters.convert_flux_transformer_checkpoint_to_diffusers, ()),
    "flux2": (converters.convert_flux2_transformer_checkpoint_to_diffusers, ()),
    "chroma": (converters.convert_chroma_transformer_checkpoint_to_diffusers, ()),
    "hunyuan_video": (
        converters.convert_hunyuan_video_transformer_to_diffusers,
        (
            *(("c_embedder.in_layer", "c_embedder.linear_1"), ("c_embedder.out_layer", "c_embedder.linear_2")),
            *(("r.in_layer", "r.mlp.0"), ("r.out_layer", "r.mlp.2"), ("mod.lin.", "mod.linear.")),
            *(("time_in.in_layer", "time_in.mlp.0"), ("time_in.out_layer", "time_in.mlp.2")),
            *(("guidance_in.in_layer", "guidance_in.mlp.0"), ("guidance_in.out_layer", "guidance_in.mlp.2")),
            *(("_attn.qkv", "_attn_qkv"), ("_attn.proj", "_attn_proj"), ("modulation.lin.", "modulation.linear.")),
            *(("_attn.norm.query_norm.scale", "_attn_q_norm.weight"), ("norm.query_norm.scale", "q_norm.weight")),
            *(("_attn.norm.key_norm.scale", "_attn_k_norm.weight"), ("norm.key_norm.scale", "k_norm.weight")),
            *(("_mlp.0", "_mlp.fc1"), ("_mlp.2", "_mlp.fc2"), (".mlp.0", ".mlp.fc1"), (".mlp.2", ".mlp.fc2")),
            *(("_embedder.mlp.fc1", "_embedder.mlp.0"), ("_embedder.mlp.fc2", "_embedder.mlp.2")),
            *(("_in.mlp.fc1", "_in.mlp.0"), ("_in.mlp.fc2", "_in.mlp.2")),
        ),
    ),
    "aura": (converters.convert_auraflow_transformer_checkpoint_to_diffusers, ()),
    "lumina2": (converters.convert_lumina2_to_diffusers, ()),
    "z_image": (converters.convert_z_image_transformer_checkpoint_to_diffusers, ()),
    "mochi": (converters.convert_mochi_transformer_checkpoint_to_diffusers, ()),
    "wan_14b": (converters.convert_wan_transformer_to_diffusers, ()),
    "wan_i2v": (converters.convert_wan_transformer_to_diffusers, ()),
    "wan_vace": (converters.convert_wan_transformer_to_diffusers, ()),
    "ltxv": (converters.convert_ltx_transformer_checkpoint_to_diffusers, ()),
    "cosmos2": (converters.convert_cosmos_transformer_checkpoint_to_diffusers, (("", "net."),)),
}
if NEWER:
    CONVERTERS |= {
        "krea2": (converters.convert_krea2_transformer_checkpoint_to_diffusers, ()),
        "ltxav": (converters.convert_ltx2_transformer_to_diffusers, ()),
        "ernie_image": (converters.convert_ernie_image_transformer_checkpoint_to_diffusers, ()),
    }


def build(name):
    return tiny(name.removeprefix("tiny ")).model if name.startswith("tiny ") else full_size(name)


def as_places(found, present):
    """The host's map as name -> Place; parameters that this model has only."""
    places = {}
    for name, key in found.items():
        key, rows, function = (*key, None)[:3] if isinstance(key, tuple) else (key, None, None)
        assert function in (None, comfy.utils.swap_scale_shift)
        if key in present:
            places[name] = Place(key.removesuffix(".weight"), rows, function is not None)
    return places


def host_map(model):
    return as_places(comfy.lora.model_lora_keys_unet(model, {}), model.state_dict().keys())


def host_text_map(encoders):
    return as_places(comfy.lora.model_lora_keys_clip(encoders, {}), encoders.state_dict().keys())


def layers(module):
    """Canonical paths of everything the host calls a weight."""
    names = [key.removesuffix(".weight") for key in module.state_dict() if key.endswith(".weight")]
    if hasattr(module, "diffusion_model"):
        return [name for name in names if name.startswith("diffusion_model.")]
    return names


def written_in(table, path, dialect):
    """Names and places of a layer, none where the dialect has no name for it."""
    try:
        return table.parts(path, dialect)
    except ValueError:
        return []


@pytest.mark.parametrize("name", EVERY)
def test_every_name_that_the_host_reads_means_the_same_to_us(name):
    model = build(name)
    table, theirs = NameTable.of(model), host_map(model)
    pattern, rows_of = HOST_ERRS.get(table.architecture, (r"(?!)", None))
    corrected = 0
    for spelling, place in theirs.items():
        if match := re.match(pattern, spelling):
            rows, inputs = table.shapes[place.path]
            wrong, right = rows_of(inputs, rows)[match[1]]
            assert place.slice == (0, *wrong)
            place = Place(place.path, (0, *right))
            corrected += 1
        assert table.find(spelling) == place, spelling
    assert bool(corrected) is (table.architecture in HOST_ERRS)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dialect", ["native", "kohya", "host"])
def test_written_names_are_read_by_us_and_by_the_host(name, dialect):
    model = build(name)
    table, theirs = NameTable.of(model), host_map(model)
    paths = layers(model)
    written = [table.write(path, dialect) for path in paths]
    assert len(set(written)) == len(paths)
    for path, spelling in zip(paths, written, strict=True):
        assert table.find(spelling) == theirs[spelling] == Place(path)
        assert table.whole(spelling) == path


@pytest.mark.parametrize("name", EVERY)
def test_diffusers_names_are_read_by_us_and_where_it_knows_the_family_by_the_host(name):
    model = build(name)
    table, theirs = NameTable.of(model), host_map(model)
    if table.architecture in ("cascade_c", "cascade_b"):
        with pytest.raises(ValueError, match="no name in diffusers"):
            table.write(layers(model)[0], "diffusers")
        return
    names, unread = {}, set()
    for path in layers(model):
        parts = written_in(table, path, "diffusers")
        assert [part.path for _, part in parts] == [path] * len(parts)
        if parts and parts[0][1].slice:
            ends = [part.slice[1] + part.slice[2] for _, part in parts]
            assert [part.slice[1] for _, part in parts] == [0, *ends[:-1]]
            assert ends[-1] == table.shapes[path][0]
        for spelling, part in parts:
            assert names.setdefault(spelling, part) is part  # no two layers share a name
            assert table.find(spelling) == part
            assert table.find(spelling.replace(".", ".base_model.model.", 1)) == part
            assert table.find("base_model.model." + spelling) == part
            if theirs.get(spelling) != part:
                unread.add(spelling)
    assert len(names) > 0.6 * len(table.shapes) / 2
    if table.layout:  # the host knows diffusers' attention layers by an older spelling only
        assert {spelling for spelling in names if ".to_" in spelling} == unread
        for spelling in unread:
            assert theirs[spelling.replace(".to_", ".processor.to_").removesuffix(".0")] == names[spelling]
    elif table.architecture in HOST_LACKS:
        lacking = {spelling for spelling in names if re.match(HOST_LACKS[table.architecture], spelling)}
        assert unread == lacking
    else:
        assert len(unread) > 0.7 * len(names)


@pytest.mark.parametrize("name", CONVERTERS)
def test_diffusers_names_are_those_of_its_own_converters(name):
    """A checkpoint whose rows are numbered goes through diffusers' converter: each name must have the rows we say."""
    model = full_size(name)
    convert, renamed = CONVERTERS[name]
    table = NameTable.of(model)
    numbered, converted, start = {}, {}, 0
    for key, tensor in model.diffusion_model.state_dict().items():
        rows = torch.arange(start, start + len(tensor)).reshape(-1, *[1] * (tensor.ndim - 1))
        start += len(tensor)
        numbered["diffusion_model." + key.removesuffix(".weight")] = rows
        if NEWER and key.endswith("_norm.weight") and name in ("flux", "flux2", "chroma", "hunyuan_video"):
            key = key.replace(".weight", ".scale")  # as checkpoints have it
        if NEWER and name == "chroma":
            key = re.sub(r"(norms\.\d+)\.weight", r"\1.scale", key)
        for ours, its in renamed:
            key = key.replace(ours, its) if ours else its + key
        converted[key] = rows
    converted = convert(converted)
    seen = set()
    for key, rows in converted.items():
        if not key.endswith(".weight") or rows is None:
            continue
        spelling = "transformer." + key.removesuffix(".weight")
        place = table.find(spelling)
        assert place is not None, spelling
        expected = numbered[place.path]
        if place.slice:
            expected = expected.narrow(*place.slice)
        if place.swapped:
            expected = torch.cat(expected.chunk(2)[::-1])
        assert torch.equal(rows.flatten(), expected.flatten()), spelling
        assert (spelling, place) in table.parts(place.path, "diffusers")
        seen.add(spelling)
    for path in layers(model):
        assert {spelling for spelling, _ in written_in(table, path, "diffusers")} <= seen


@pytest.mark.parametrize("name", ["flux", "flux2", "chroma"])
def test_bfl_names_are_read_by_us_and_by_the_host_in_a_file_that_it_knows_as_theirs(name):
    model = build(name)
    table, theirs = NameTable.of(model), host_map(model)
    written = {table.write(path, "bfl"): path for path in layers(model)}
    file = {f"{spelling}.lora_{part}.weight": torch.zeros(1, 1) for spelling in written for part in "AB"}
    file["single_blocks.0.norm.key_norm.scale"] = torch.zeros(1)  # by this the host knows such a file
    converted = comfy.lora_convert.convert_lora(file)
    for spelling, path in written.items():
        assert table.find(spelling) == Place(path)
        if not spelling.endswith("_norm.scale"):  # BFL do not train adapters on norms, but replace them
            assert f"diffusion_model.{spelling}.lora_A.weight" in converted
            assert theirs[f"diffusion_model.{spelling}"] == Place(path)


def test_norms_of_bfl_files_are_found_whatever_the_host_calls_them():
    table = NameTable.of(build("flux"))
    norm = "double_blocks.3.img_attn.norm.key_norm"
    place = Place(f"diffusion_model.{norm}" + ("" if NEWER else ".scale"))
    assert table.find(f"{norm}.scale") == table.find(f"diffusion_model.{norm}.scale") == place
    assert table.find("transformer.transformer_blocks.3.attn.norm_k") == place


@pytest.mark.parametrize("name", [*SD_UNETS, *TINY_UNETS])
def test_unet_paths_equal_the_hosts(name):
    model = build(name)
    layout = NameTable.of(model).layout
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


@pytest.mark.parametrize("name", [name for name in EVERY if name not in (*SD_UNETS, *TINY_UNETS)])
def test_other_families_are_written_under_the_hosts_paths(name):
    table = NameTable.of(build(name))
    assert table.layout is None
    assert table.architecture is not None
    assert all(table.write(path) == path for path in table.shapes)


@pytest.mark.parametrize(("name", "sdxl"), [("sd15", False), ("sd2", False), ("sd2_unclip", False), ("sdxl", True)])
def test_kohyas_spelling(name, sdxl):
    table = NameTable.of(full_size(name))
    assert table.layout.sdxl is sdxl
    written = table.write("diffusion_model.input_blocks.4.1.proj_in")
    assert written == ("lora_unet_input_blocks_4_1_proj_in" if sdxl else "lora_unet_down_blocks_1_attentions_0_proj_in")


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_every_name_of_a_text_encoder_that_the_host_reads_means_the_same_to_us(name):
    encoders = text_encoders(name)
    table, theirs = NameTable.of(encoders), host_text_map(encoders)
    assert theirs
    for spelling, place in theirs.items():
        assert table.find(spelling) == place, spelling
        assert table.find("base_model.model." + spelling) == place


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_names_written_for_text_encoders_are_read_by_us_and_by_the_host(name):
    encoders = text_encoders(name)
    table, theirs = NameTable.of(encoders), host_text_map(encoders)
    paths = layers(encoders)
    for dialect in ("native", "host"):
        written = [table.write(path, dialect) for path in paths]
        assert len(set(written)) == len(paths)
        for path, spelling in zip(paths, written, strict=True):
            assert table.find(spelling) == theirs[spelling] == Place(path)
    for dialect in ("kohya", "diffusers"):
        written = {}
        for path in paths:
            if not written_in(table, path, dialect):
                continue
            spelling = table.write(path, dialect)
            assert written.setdefault(spelling, path) == path
            assert table.find(spelling) == Place(path)
            # the host knows the layers of CLIP's blocks only, and under diffusers' names those of CLIP only
            if re.match(r"clip_\w\..*\.(self_attn\.\w+_proj|mlp\.fc[12])$", path):
                assert theirs[spelling] == Place(path)
            elif dialect == "kohya" and path.startswith(("t5xxl.transformer.", "hydit_clip.transformer.bert.")):
                assert theirs[spelling] == Place(path)
            elif path.startswith("clip_") and "text_projection" not in path:
                assert spelling not in theirs
        if any(path.startswith(("clip_", "t5xxl.", "hydit_clip.")) for path in paths):
            assert written


@pytest.mark.parametrize("clip", [tiny_clip, tiny_dual_clip])
def test_loaded_text_encoders(clip):
    encoders = clip().cond_stage_model
    table, theirs = NameTable.of(encoders), host_text_map(encoders)
    assert {spelling: table.find(spelling) for spelling in theirs} == theirs
    layer = "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1"
    number = "" if clip is tiny_clip else "1"
    assert table.write(layer) == f"lora_te{number}_text_model_encoder_layers_0_mlp_fc1"


def test_a_model_and_its_text_encoders_share_a_table():
    model, encoders = NameTable.of(full_size("flux")), NameTable.of(text_encoders("flux"))
    table = NameTable(model.shapes | encoders.shapes)
    assert table.architecture == "flux"
    for part in (model, encoders):
        for path in part.shapes:
            assert table.find(part.write(path)) == Place(path)
            assert table.write(path) == part.write(path)
