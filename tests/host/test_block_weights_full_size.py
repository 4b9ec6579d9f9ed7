"""Block weights on the host's full-size models: every vector that people carry, every group, every kind."""

from functools import cache

import pytest

from full_size import FAMILIES, TEXT_ENCODERS, full_size, text_encoders
from lora_loom.kernels.blocks import base_parameters, block_map
from lora_loom.kernels.dialects_text import encoder_prefixes
from lora_loom.kernels.names import layer_shapes
from lora_loom.kernels.strengths.blocks import parse_blocks
from lora_loom.kernels.strengths.layout import Layout
from lora_loom.kernels.strengths.presets import PRESETS
from lora_loom.kernels.strengths.vectors import readings
from tiny import NEWER

# the lists of blocks that sd-webui-lora-block-weight publishes for its vectors, and Flux' own
SD26 = ["BASE"] + [f"IN{n:02}" for n in range(12)] + ["M00"] + [f"OUT{n:02}" for n in range(12)]
SD17 = "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11".split()
XL20 = ["BASE"] + [f"IN{n:02}" for n in range(9)] + ["M00"] + [f"OUT{n:02}" for n in range(9)]
XL12 = "BASE IN04 IN05 IN07 IN08 M00 OUT00 OUT01 OUT02 OUT03 OUT04 OUT05".split()
FLUX57 = [f"D{n:02}" for n in range(19)] + [f"S{n:02}" for n in range(38)]
FLUX61 = ["CLIP", "T5", "IN", *FLUX57, "OUT"]
LENGTHS = {  # every family: all lengths that it takes
    **dict.fromkeys(("sd15", "sd2", "sd2_unclip"), {26, 17, 25}),
    "sdxl": {20, 12, 19, 26},
    "sdxl_refiner": {26, 12, 25},
    "ssd1b": {20, 11, 19, 26},
    "koala": {13, 7, 12, 26},
    "flux": {58, 61, 57},
    "sd35_medium": {25, 24},
    "flux2": {57, 56},
    "chroma": {63, 62},
    "lumina2": {31, 30},
    "z_image": {35, 34},
    "qwen_image": {61, 60},
    "wan_14b": {41, 40},
    "hunyuan_video": {63, 62},
    "ltxv": {29, 28},
    "cosmos2": {29, 28},
    "aura": {37, 36},
    "hunyuan_dit": {41, 40},
    **({"anima": {35, 34}} if NEWER else {}),
}


@cache
def blocks_by_path(name):
    """A second way to find blocks: by the beginnings of paths, without the model's prefix."""
    ids = {block.id for block in block_map(full_size(name))}
    found = {}
    for path in layer_shapes(full_size(name).diffusion_model):
        parts = path.split(".")
        found[path] = next((start for n in range(len(parts)) if (start := ".".join(parts[:n])) in ids), "base")
    return found


@cache
def layout_of(name):
    return Layout.of(full_size(name))


def id_of(label):
    """The host's name of a block in the published lists."""
    group, number = label.rstrip("0123456789"), label[len(label.rstrip("0123456789")) :]
    names = {"IN": "input_blocks", "OUT": "output_blocks", "D": "double_blocks", "S": "single_blocks"}
    return {"M": "middle_block", "BASE": "base"}.get(group) or f"{names[group]}.{int(number)}"


@pytest.mark.parametrize("name", FAMILIES)
def test_lengths(name):
    assert set(readings(layout_of(name))) == LENGTHS[name]


@pytest.mark.parametrize(
    "name, labels",
    [("sd15", SD26), ("sd15", SD17), ("sd2", SD26), ("sd2", SD17), ("sdxl", XL20), ("sdxl", XL12), ("sdxl", SD26),
     ("flux", ["BASE", *FLUX57]), ("flux", FLUX57)],
)  # fmt: skip
def test_vectors_are_those_of_the_published_lists(name, labels):
    model = full_size(name)
    blocks = block_map(model)
    weights = {id_of(label): 2 + n / 8 for n, label in enumerate(labels)}
    found = parse_blocks(",".join(f"{2 + n / 8}" for n in range(len(labels))), model)
    left = 1.0 if "BASE" not in labels else None
    for path, block in blocks_by_path(name).items():
        wanted = weights.get(block, left if block == "base" else 0.0)
        assert found.of(f"diffusion_model.{path}").constant == wanted, path
    assert found.components == ({"te": 2.0} if "BASE" in labels else {})
    absent = [label for label in labels if id_of(label) not in {"base", *(block.id for block in blocks)}]
    told = [note for note in found.notes if "this model has no" in note]
    assert bool(told) == bool(absent) and all(label in told[0] for label in absent)
    assert any("which get 0" in note for note in found.notes) == (labels in (SD17, XL12))


def test_the_vector_of_61():
    found = parse_blocks(",".join(str(n / 100) for n in range(61)), full_size("flux"))
    assert found.components == {"clip_l": 0, "t5xxl": 0.01}
    for path, block in blocks_by_path("flux").items():
        if block == "base":  # as there: what has "_in" in its name, and the final layer
            wanted = 60 if path.startswith("final_layer") else 2
            assert wanted == 60 or "_in" in path
        else:
            group, number = block.split(".")
            wanted = 3 + int(number) + (19 if group == "single_blocks" else 0)
        assert found.of(f"diffusion_model.{path}").constant == wanted / 100


@pytest.mark.parametrize("name", FAMILIES)
def test_one_number_per_block_of_any_model(name):
    model = full_size(name)
    blocks, base = block_map(model), set(base_parameters(model))
    found = parse_blocks(",".join(str(n / 100) for n in range(1 + len(blocks))), model)
    for number, block in enumerate(blocks, 1):
        for parameter in block.parameters:
            path = parameter.removesuffix(".weight")
            assert found.of(path).constant == number / 100
    assert all(found.of(parameter.removesuffix(".weight")).constant == 0 for parameter in base)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_lengths_are_refused(name):
    lengths = LENGTHS[name]
    for length in {1, 2, 12, 17, 20, 26, 27, 57, 58, 61, 100} - lengths:
        with pytest.raises(ValueError, match=rf"a vector of {length} numbers, but this model takes") as error:
            parse_blocks(",".join(["1"] * length), layout_of(name))
        assert all(str(known) in str(error.value) for known in lengths)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_group_role_and_id(name):
    model = full_size(name)
    blocks, layout = block_map(model), layout_of(name)
    texts = {block.group: {other.id for other in blocks if other.group == block.group} for block in blocks}
    texts |= {block.role: {other.id for other in blocks if other.role == block.role} for block in blocks}
    texts |= {block.id: {block.id} for block in blocks} | {"base": {"base"}}
    texts["all"] = {"base", *(block.id for block in blocks)}
    texts[f"{blocks[1].id}-{blocks[-2].id}"] = {block.id for block in blocks[1:-1]}
    for text, ids in texts.items():
        found = parse_blocks(f"{text}=0.25", layout)
        assert {path for path, strength in found.weights.items() if strength.constant == 0.25} == {
            f"diffusion_model.{path}" for path, block in blocks_by_path(name).items() if block in ids
        }


# layers with a matrix of each kind, by the models' published sizes
KINDS = {
    "sd15": {"attn": 16 * 8, "ff": 16 * 2, "mod": 22, "q": 32, "k": 32, "v": 32, "o": 32, "qkv": 96},
    "sdxl": {"attn": 70 * 8, "ff": 70 * 2, "mod": 17, "q": 140, "k": 140, "v": 140, "o": 140, "qkv": 420},
    "flux": {
        "attn": 19 * 4 + 38 * 2, "ff": 19 * 4, "mod": 19 * 2 + 38, "img": 19 * 5, "txt": 19 * 5, "qkv": 38, "o": 38,
    },
    "sd35_medium": {  # the last block makes no text; 13 have a second attention
        "attn": 24 * 4 - 1 + 13 * 2, "ff": 24 * 4 - 2, "mod": 48, "img": 24 * 5 + 26, "txt": 24 * 5 - 3,
        "qkv": 48 + 13, "o": 47 + 13,
    },
    "qwen_image": {
        "attn": 60 * 8, "ff": 60 * 4, "mod": 120, "img": 60 * 7, "txt": 60 * 7, "q": 120, "k": 120, "v": 120,
        "qkv": 360, "o": 120,
    },
    "wan_14b": {"attn": 320, "ff": 80, "q": 80, "k": 80, "v": 80, "qkv": 240, "o": 80, "mod": 40},  # a raw parameter
    "z_image": {"attn": 34 * 2, "ff": 34 * 3, "mod": 32, "qkv": 34, "o": 34},
    "hunyuan_video": {
        "attn": 20 * 4 + 40 * 2 + 4, "ff": 20 * 4 + 4, "mod": 20 * 2 + 40 + 2, "img": 100, "txt": 100, "qkv": 42,
        "o": 42,
    },
    "ltxv": {"attn": 28 * 8, "ff": 56, "q": 56, "k": 56, "v": 56, "qkv": 168, "o": 56, "mod": 28},  # raw parameters
    "cosmos2": {"attn": 28 * 8, "ff": 56, "mod": 28 * 6, "q": 56, "k": 56, "v": 56, "qkv": 168, "o": 56},
    "aura": {
        "attn": 4 * 8 + 32 * 4, "ff": 4 * 6 + 32 * 3, "mod": 8 + 32, "img": 4 * 8, "txt": 4 * 8, "q": 40, "k": 40,
        "v": 40, "qkv": 120, "o": 40,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds(name):
    model = full_size(name)
    layout, shapes = layout_of(name), layer_shapes(model)
    counts = {}
    for kind in layout.kinds:
        found = parse_blocks(f"{kind}=0.5", layout)
        assert found.weights.keys() <= layout.inside(block.id for block in layout.blocks)
        counts[kind] = sum(
            len(shapes[path]) > 1 and not path.endswith(".bias") for path in found.weights if path in shapes
        )
    assert ("norm" in counts) == (name != "aura") and not counts.pop("norm", 0)
    assert counts == KINDS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_biases_go_with_their_layers(name):
    layout = layout_of(name)
    kinds = {path: {kind for kind in layout.kinds if path in layout.of_kind(kind)} for path in layout.paths}
    for path in layout.paths:
        owner = path.removesuffix(".bias")
        if owner != path and owner in layout.paths:
            assert kinds[path] == kinds[owner]


@pytest.mark.parametrize("preset", [name for name in PRESETS if not name.startswith("FLUX")])
def test_presets_fit_sd15_and_sdxl(preset):
    for name, labels in (("sd15", SD17), ("sdxl", XL12)):
        found = parse_blocks(preset, layout_of(name))
        weights = {label: set() for label in labels}
        labelled = {id_of(label): label for label in labels}
        for path, block in blocks_by_path(name).items():
            if block in labelled:
                weights[labelled[block]].add(found.of(f"diffusion_model.{path}").constant)
        if preset in ("ATTN", "FF"):
            assert weights["BASE"] == {0} and all(
                values == {0, 1} for label, values in weights.items() if label != "BASE"
            )
            continue
        assert all(len(values) == 1 for values in weights.values())
        half = {"ALL0.5": 0.5, "NONE": 0}.get(preset, 1)
        assert weights["BASE"] == {half} and found.components == ({} if half == 1 else {"te": half})
        # the names of the defaults: on the way in or out, deep or shallow
        deep = {"sd15": "IN05 IN07 IN08 OUT03 OUT04 OUT05 OUT06", "sdxl": "IN07 IN08 OUT00 OUT01 OUT02"}[name].split()
        for label in labels[1:]:
            side = "IN" if label.startswith("IN") else "OUT" if label.startswith("OUT") else "MID"
            wanted = {
                "INS": side == "IN" and label not in deep,
                "IND": side == "IN" and label in deep,
                "INALL": side == "IN",
                "MIDD": side == "MID" or label in deep,
                "OUTD": side == "OUT" and label in deep,
                "OUTS": side == "OUT" and label not in deep,
                "OUTALL": side == "OUT",
            }.get(preset, True)
            assert weights[label] == {half if wanted else 0}, label


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("preset, weight", [("NONE", 0), ("ALL", 1), ("ALL0.5", 0.5)])
def test_even_presets_are_for_all_of_any_model(name, preset, weight):
    """The text encoders included, as what lies in no block is."""
    found = parse_blocks(preset, layout_of(name))
    assert {found.of(path).constant for path in layout_of(name).paths} == {weight}
    assert found.components == ({} if weight == 1 else {"te": weight})


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("FLUX")])
def test_presets_for_flux(preset):
    found = parse_blocks(preset, full_size("flux"))
    assert not found.notes
    with pytest.raises(ValueError, match="does not fit this model: there is no block"):
        parse_blocks(preset, full_size("sd15"))


@pytest.mark.parametrize("name", TEXT_ENCODERS)
def test_encoders_count_as_the_trainers_count_them(name):
    """te1, te2, te3 by the places in the CLIP are diffusers' text_encoder, text_encoder_2, text_encoder_3."""
    paths = layer_shapes(text_encoders(name))
    order = list(dict.fromkeys(path.partition(".")[0] for path in paths if ".transformer." in path))
    numbered = encoder_prefixes(order)
    if set(order) == set(numbered):  # else no trainer has settled who is first
        places = ["text_encoder.", *(f"text_encoder_{place}." for place in range(2, 9))]
        assert [numbered[encoder].diffusers for encoder in order] == places[: len(order)]
    elif len(order) > 1:
        assert set(order) - set(numbered) <= {"llama", "qwen25_7b", "byt5_small", "qwen3_06b", "qwen3_2b", "qwen3_4b"}
