"""Merging whole files: dialects, fused layers, biases, embeddings, notes, and what cannot be merged."""

import math
import re
from dataclasses import replace

import pytest
import torch

from adapter_files import flux, lora, product, unet
from cases import CASES, build, randomised
from lora_loom.kernels.adapter import Additive
from lora_loom.kernels.compose import Sliced, Sum, Swapped
from lora_loom.kernels.control import Replacement, Widened
from lora_loom.kernels.full import Full
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.tools.baked import Baked
from lora_loom.kernels.tools.merge import METHODS, Ingredient, merge
from lora_loom.kernels.writing import to_tensors
from merging import ALL, PATH, apart, holding, plain


def differences(file, shapes):
    """path → ΔW in float64, of weights that are all the same."""
    draws = torch.Generator().manual_seed(8)
    weights = {path: torch.randn(shape, generator=draws, dtype=torch.float64) for path, shape in shapes.items()}
    return {path: adapter.difference(weights[path]).double() for path, adapter in file.adapters.items()}


QKV, MLP = "double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.0"


def of_flux():
    """(its shapes, a LoRA in the host's names, one in diffusers' with q and v apart); both on a fused layer."""
    shapes = flux()
    ours = lora(f"diffusion_model.{QKV}", (24, 8), 3, 1.5, seed=1) | lora(f"diffusion_model.{MLP}", (32, 8), seed=2)
    stem = "transformer.transformer_blocks.0.attn.to_"
    ends = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
    theirs = lora(f"{stem}q", (8, 8), seed=3, **ends) | lora(f"{stem}v", (8, 8), 4, seed=4, **ends)
    table = NameTable(shapes)
    return shapes, read_lora(ours, table), read_lora(theirs, table)


@pytest.mark.parametrize("dialect", ["native", "kohya", "lycoris", "diffusers"])
@pytest.mark.parametrize("method", ["concat", "sum"])
def test_dialects_meet_on_fused_layers_and_go_into_files(method, dialect):
    shapes, ours, theirs = of_flux()
    outcome = merge(
        [Ingredient(ours, 0.8, "ours"), Ingredient(theirs, -0.5, "theirs")], method, None if method == "concat" else ALL
    )
    assert list(outcome.file.adapters) == [f"diffusion_model.{QKV}", f"diffusion_model.{MLP}"]
    assert outcome.layers[0].before == 3 + 2 + 4
    first, second = differences(ours, shapes), differences(theirs, shapes)
    wanted = {path: 0.8 * delta - 0.5 * second.get(path, 0) for path, delta in first.items()}
    file = outcome.file
    if method == "concat":  # q and v of a small layer: nine ranks are more than its 24 × 8 numbers
        assert "hold more numbers than the whole difference" in " ".join(outcome.notes)
        if dialect == "diffusers":  # which has no place for differences
            file = merge([Ingredient(ours, 0.8), Ingredient(theirs, -0.5)], "sum", ALL).file
    back = read_lora(to_tensors(file, dialect), NameTable(shapes))
    assert not back.unplaced
    for found in (differences(outcome.file, shapes), differences(back, shapes)):
        assert found.keys() == wanted.keys()
        assert all(apart(found[path], wanted[path]) < 1e-6 for path in wanted)


def test_one_file_of_every_layer_kind_without_a_model():
    keys = [lora("lora_unet_a_0_b", (9, 7), 2, 1.0, seed=n) | lora("lora_unet_c", (4, 3, 3, 3), seed=5) for n in (0, 1)]
    files = [read_lora(each) for each in keys]
    merged = merge([Ingredient(file, strength) for file, strength in zip(files, (1.0, 2.0), strict=True)]).file
    assert merged.names is None
    for path, adapter in merged.adapters.items():
        one, two = (product(each[f"{path}.lora_down.weight"], each[f"{path}.lora_up.weight"]) for each in keys)
        scale = 0.5 if path.endswith("b") else 1.0
        assert apart(adapter.delta(), scale * (one + 2 * two)) < 1e-6


def test_strengths_by_layer_and_what_is_at_zero():
    table = NameTable({f"l.{n}": (9, 7) for n in range(4)})
    file = LoRAFile({f"l.{n}": plain((9, 7), seed=n) for n in range(4)}, names=table)
    strengths = {"l.0": 0.0, "l.1": 0.5, "l.2": 1.0, "l.3": -1.0}
    outcome = merge([Ingredient(file, strengths.__getitem__)])
    assert [*outcome.file.adapters] == ["l.1", "l.2", "l.3"]
    assert outcome.file.adapters["l.2"] is file.adapters["l.2"]  # as it is
    for path, adapter in outcome.file.adapters.items():
        assert apart(adapter.delta(), strengths[path] * file.adapters[path].delta().double()) < 1e-6
    assert any("1 layers: nothing is left" in note for note in outcome.notes)
    nothing = merge([Ingredient(file, 0, "gone"), Ingredient(file, 0.5)])
    assert apart(nothing.file.adapters["l.0"].delta(), 0.5 * file.adapters["l.0"].delta().double()) < 1e-6
    assert "gone: its strength is 0, nothing of it is in the result" in nothing.notes
    away = merge([Ingredient(file, 1), Ingredient(file, -1)], "prune", ALL)
    assert not away.file.adapters and not away.layers and away.energy == 1


def test_vectors_and_biases_are_exact_whatever_the_method():
    shapes = {"norm": (6,), "layer": (6, 5)}
    table, draws = NameTable(shapes), torch.Generator().manual_seed(0)
    norms = [
        Full({"w_norm": torch.randn(6, generator=draws), "b_norm": torch.randn(6, generator=draws)}, (6,)) for _ in "ab"
    ]
    rows = [Sliced(Full({"diff_b": torch.randn(2, generator=draws)}, (2, 5)), 3, 2, (6, 5)), plain((6, 5))]
    files = [LoRAFile({"norm": norm, "layer": row}, names=table) for norm, row in zip(norms, rows, strict=True)]
    for method in METHODS:
        cut = None if method == "concat" else Cut(rank=2)
        merged = merge([Ingredient(files[0], 0.5), Ingredient(files[1], -2)], method, cut, density=0.2).file.adapters
        assert set(merged["norm"].tensors) == {"w_norm", "b_norm"}
        wanted = [0.5 * norms[0].tensors[name] - 2 * norms[1].tensors[name] for name in ("w_norm", "b_norm")]
        assert torch.allclose(merged["norm"].delta(), wanted[0])
        assert torch.allclose(merged["norm"].merged_bias(None), wanted[1])
        assert torch.equal(merged["layer"].merged_bias(torch.zeros(6)), 0.5 * rows[0].merged_bias(torch.zeros(6)))
    alone = merge([Ingredient(replace(files[0], adapters={"layer": rows[0]}), 0.5)]).file.adapters["layer"]
    assert set(alone.tensors) == {"diff_b"}


def test_bias_alone_needs_no_model():
    file = read_lora({"lora_unet_x.diff_b": torch.arange(3.0)})
    merged = merge([Ingredient(file), Ingredient(file, 0.5)]).file
    assert torch.equal(to_tensors(merged)["lora_unet_x.diff_b"], 1.5 * torch.arange(3.0))


def test_too_many_ranks_become_a_difference():
    shape = (8, 6)
    files = [Ingredient(holding(plain(shape, 2, seed=n), shape)) for n in range(3)]
    outcome = merge(files)
    adapter = outcome.file.adapters[PATH]
    assert adapter.name == "full" and outcome.layers[0].rank == 0 and outcome.layers[0].before == 6
    assert any("1 layers: all ranks together hold more numbers" in note for note in outcome.notes)
    assert merge(files[:1] + [Ingredient(files[0].file, 0.0)]).file.adapters[PATH].name == "LoRA"


def test_embeddings_travel_along():
    def with_words(**words):
        return LoRAFile({}, embeddings={word: {"clip_l": vectors} for word, vectors in words.items()})

    one, two = torch.ones(2, 4), torch.zeros(2, 4)
    files = [with_words(cat=one, dog=one), with_words(cat=one, dog=two, dog_2=one), with_words(dog=two, owl=one)]
    strengths = (1.0, 0.5, lambda path: 1.0)
    outcome = merge([Ingredient(f, s, f"f{n}") for n, (f, s) in enumerate(zip(files, strengths, strict=True))])
    found = outcome.file.embeddings
    assert [*found] == ["cat", "dog", "dog_2", "dog_2_2", "dog_3", "owl"]
    assert torch.equal(found["dog_2"]["clip_l"], two) and torch.equal(found["dog_2_2"]["clip_l"], one)
    assert torch.equal(found["dog"]["clip_l"], one) and torch.equal(found["dog_3"]["clip_l"], two)
    assert "the word 'dog' of f1 means something else in another file: it is 'dog_2' now" in outcome.notes
    layers = LoRAFile({"l": plain((6, 4))}, embeddings=files[0].embeddings)
    for gone in (0, lambda path: 0.0, Baked("0", 0.0)):
        for file in (files[0], layers):
            outcome = merge([Ingredient(file, gone, "gone")])
            assert not outcome.file.embeddings
            assert "gone: its strength is 0, nothing of it is in the result" in outcome.notes
    assert merge([Ingredient(files[0], Baked("0.5", 0.5))]).file.embeddings


def test_metadata_is_that_of_the_files_that_act():
    files = [holding(plain((6, 4)), (6, 4), metadata={"ss_base_model_version": base}) for base in ("sdxl", "sd_v1")]
    merged = merge([Ingredient(files[0]), Ingredient(files[1], lambda path: 0.0)]).file
    assert merged.metadata == {"ss_base_model_version": "sdxl"}


@pytest.mark.parametrize("method", ["concat", "sum"])
def test_what_cancels_out_is_nothing(method):
    """Of factors that are rounded to float32 on the way, and of whole differences."""
    shape, cut = (64, 48), None if method == "concat" else Cut(rank=3)
    one, two = (holding(plain(shape, 4, seed=n), shape) for n in (0, 3))
    whole = holding(Full({"diff": torch.randn(shape)}, shape), shape)
    both = merge([Ingredient(one, 0.9), Ingredient(two, 0.3)]).file
    for files, strengths in (
        ((one, one), (0.7, -0.7)),
        ((both, one, two), (1, -0.9, -0.3)),
        ((whole, whole), (0.7, -0.7)),
    ):
        outcome = merge([Ingredient(f, s) for f, s in zip(files, strengths, strict=True)], method, cut)
        assert not outcome.file.adapters and not outcome.layers and outcome.energy == 1
        assert any("1 layers: nothing is left" in note for note in outcome.notes)
    little = merge([Ingredient(one, 0.7), Ingredient(one, -0.69999)], method, cut)
    assert little.layers[0].norm == pytest.approx(1e-5 * float(one.adapters[PATH].delta().norm()), rel=1e-2)


@pytest.mark.parametrize("case", [case for case in CASES if case.layer in ("linear", "conv2d")], ids=str)
def test_one_alone_at_another_strength_stays_in_its_family(case):
    module, adapter, _ = build(case)
    adapter = randomised(adapter)
    weight = module.weight.detach()
    outcome = merge([Ingredient(holding(adapter, weight.shape), -0.3)], weights=lambda path: weight)
    made = outcome.file.adapters[PATH]
    assert apart(made.difference(weight), -0.3 * adapter.difference(weight)) < 1e-6
    if isinstance(adapter, Additive):
        assert type(made) is type(adapter) and not any("whole difference" in note for note in outcome.notes)
        assert {n: t.numel() for n, t in made.tensors.items()} == {n: t.numel() for n, t in adapter.tensors.items()}
    else:
        assert made.name == "full" and any("1 layers: what changes there has no ranks" in n for n in outcome.notes)


def test_parts_of_a_layer_alone_at_another_strength_stay_parts():
    shape = (12, 5)
    parts = [Sliced(plain((6, 5), seed=n), 6 * n, 6, shape) for n in (0, 1)]
    fused = Sum([*parts, Swapped(plain(shape, seed=2)), Full({"diff_b": torch.ones(12)}, shape)])
    made = merge([Ingredient(holding(fused, shape), 0.5)]).file.adapters[PATH]
    assert [type(part) for part in made.parts] == [Sliced, Sliced, Swapped, Full]
    zeros = torch.zeros(shape)
    assert apart(made.difference(zeros), 0.5 * fused.difference(zeros).double()) < 1e-6
    assert torch.equal(made.merged_bias(None), torch.full((12,), 0.5))


def test_parts_of_fused_layers_that_lose_much_in_one_rank_are_told():
    fused = Sum([Sliced(plain((8, 64), 4, seed=n), 8 * n, 8, (24, 64)) for n in range(3)])
    files = [Ingredient(holding(fused, (24, 64)))]
    says = "1 layer made of parts such as q, k and v: .*; with rank 12 nothing of them is lost"
    assert any(re.match(says, note) for note in merge(files, "sum", Cut(rank=4)).notes)
    for cut in (Cut(rank=12), Cut(rank=3)):  # 3 is less than each of them had, which anybody would expect to lose
        assert not any("such as q, k and v" in note for note in merge(files, "sum", cut).notes)


@pytest.mark.parametrize("path", ["clip_l.text_model.embeddings.token_embedding", "lora_te1_token_embedding"])
@pytest.mark.parametrize("method", ["sum", "ties", "concat"])
def test_tables_of_embeddings_stay_differences(method, path):
    shape = (30, 8)
    table = Full({"diff": torch.randn(shape)}, shape)
    files = [Ingredient(holding(table, shape, path), strength) for strength in (0.5, 0.25)]
    for given in (files, files[:1]):
        made = merge(given, method, None if method == "concat" else Cut(rank=4)).file.adapters[path]
        assert made.name == "full"
        assert apart(made.delta(), sum(each.strength for each in given) * table.delta().double()) < 1e-6


@pytest.mark.parametrize("method", ["concat", "sum"])
def test_numbers_beyond_all_bounds_name_the_layer(method):
    cut = None if method == "concat" else Cut(rank=2)
    good, broken = plain((6, 4)), plain((6, 4))
    broken.up[0, 0] = math.nan
    for adapters, strengths in (((broken,), (1,)), ((broken,), (0.5,)), ((broken, good), (1, 1)), ((good,), (1e39,))):
        files = [Ingredient(holding(a, (6, 4)), s, "it") for a, s in zip(adapters, strengths, strict=True)]
        with pytest.raises(ValueError, match=rf"^{PATH}: .*(smaller|inspect)"):
            merge(files, method, cut)


def test_nothing_that_was_not_read_is_lost_in_silence():
    keys = lora("lora_unet_nowhere", (6, 4)) | lora("lora_unet_input_blocks_1_1_proj_in", (6, 4))
    file = read_lora(keys, NameTable(unet()))
    assert len(file.unplaced) == 2
    outcome = merge([Ingredient(replace(file, notes=["read with care"]), name="mine")])
    assert any("mine: 2 keys found no place and are left out (lora_unet_nowhere" in note for note in outcome.notes)
    assert "mine: read with care" in outcome.notes


def test_what_replaces_or_widens_goes_alone():
    shapes = {"scale": (4,), "img_in": (8, 4)}
    wide_lora = plain((8, 6))
    adapters = {"scale": Replacement(torch.ones(4)), "img_in": Widened(wide_lora, (8, 4))}
    file = LoRAFile(adapters, names=NameTable(shapes))
    for method, cut in (("concat", None), ("sum", ALL)):
        assert merge([Ingredient(file)], method, cut).file.adapters == adapters
    wider = replace(file, adapters={"img_in": adapters["img_in"]})
    with pytest.raises(ValueError, match="img_in: c widens this layer.*strength 1"):
        merge([Ingredient(wider, 0.5, "c")])
    other = LoRAFile({"img_in": plain((8, 4))}, names=file.names)
    with pytest.raises(ValueError, match="img_in: c widens"):
        merge([Ingredient(wider, 1, "c"), Ingredient(other)])
    norm = replace(file, adapters={"scale": adapters["scale"]})
    merged = merge([Ingredient(norm, 0.5)], weights=lambda path: torch.full((4,), 3.0)).file.adapters["scale"]
    assert torch.equal(merged.delta(), torch.full((4,), -1.0))


def test_pefts_ia3_is_told_of():
    shape = (6, 4)
    table = NameTable({PATH: shape})
    file = read_lora({f"{PATH}.ia3_l": torch.rand(6, 1)}, table)
    outcome = merge([Ingredient(file, 0.5)], weights=lambda path: torch.ones(shape))
    assert any("scales their biases too" in note for note in outcome.notes)


def test_progress_is_told_and_may_stop():
    table = NameTable({f"l.{n}": (9, 7) for n in range(3)})
    file = LoRAFile({f"l.{n}": plain((9, 7), seed=n) for n in range(3)}, names=table)
    seen = []
    merge([Ingredient(file)], progress=lambda done, of: seen.append((done, of)))
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge([Ingredient(file)], progress=stop)


# -- what cannot be


def refused(says, *ingredients, **options):
    with pytest.raises(ValueError, match=says):
        merge(list(ingredients), **options)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"method": "average"}, "method: 'average' is unknown; choose one of concat, sum"),
        ({"method": "sum"}, "sum needs a cut: give a rank or an energy"),
        ({"method": "ties"}, "ties needs a cut"),
        ({"cut": Cut(rank=2)}, "concat keeps every rank"),
        ({"method": "ties", "cut": ALL, "density": 0}, "density is 0"),
        ({"method": "ties", "cut": ALL, "density": math.nan}, "density is nan"),
        ({"method": "ties", "cut": ALL, "majority": "loudest"}, "majority: 'loudest'"),
    ],
)
def test_options_that_make_no_sense(options, says):
    refused(says, Ingredient(holding(plain((6, 4)), (6, 4))), **options)


def test_strengths_and_shapes_that_make_no_sense():
    refused("nothing to merge")
    refused(f"x: its strength at {PATH} is nan", Ingredient(holding(plain((6, 4)), (6, 4)), math.nan, "x"))
    files = [read_lora(lora("lora_unet_a", shape)) for shape in ((6, 4), (6, 5))]
    says = r"lora_unet_a: one is made for \(6, 4\), two for \(6, 5\); they are for different base models"
    refused(says, Ingredient(files[0], 1, "one"), Ingredient(files[1], 1, "two"))


def test_weights_where_they_are_needed():
    table = NameTable({PATH: (12, 8)})
    case = next(case for case in CASES if str(case) == "LoRA linear dora=output")
    file = LoRAFile({PATH: build(case)[1]}, names=table)
    refused(
        f"mine: {PATH}: what DoRA changes here depends on the weights; give the model", Ingredient(file, 0.5, "mine")
    )
    assert merge([Ingredient(file)]).file.adapters == file.adapters  # alone and whole it may stay what it is
    loha = {
        f"hada_w{n}": torch.ones(size)
        for n, size in (("1_a", (6, 1)), ("1_b", (1, 36)), ("2_a", (6, 1)), ("2_b", (1, 36)))
    }
    unknown = read_lora({f"lora_unet_c.{name}": tensor for name, tensor in loha.items()})
    refused("lora_unet_c: the file does not tell the shape of this layer; give the model", Ingredient(unknown, 0.5))
    merged = merge([Ingredient(unknown, 0.5)] * 2, weights=lambda path: torch.zeros(6, 4, 3, 3)).file
    assert merged.adapters["lora_unet_c"].shape == (6, 4, 3, 3)


GIVE = "call their layers differently, or have none alike; give the model"
BLOCK = "input_blocks_1_1_transformer_blocks_0_attn1_to_q"
TEXT = "text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    "one, other",
    [
        (f"lora_unet_{BLOCK}", "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"),
        (f"lora_unet_{BLOCK}", f"lycoris_{BLOCK}"),
        ("diffusion_model.double_blocks.0.img_attn.proj", "transformer.transformer_blocks.0.attn.to_out.0"),
        (f"lora_te_{TEXT}", f"lora_te1_{TEXT}"),
    ],
)
def test_dialects_only_meet_by_a_model(one, other):
    files = [Ingredient(read_lora(lora(name, (6, 4))), 1, called) for name, called in ((one, "one"), (other, "other"))]
    refused(f"one and other {GIVE}", *files)


def test_names_of_models():
    keys = lora(f"lora_unet_{BLOCK}", (6, 4))
    raw, read = read_lora(keys), read_lora(keys, unet())
    refused(f"raw and read {GIVE}", Ingredient(raw, 1, "raw"), Ingredient(read, 1, "read"))
    more = read_lora(keys, {**unet(), "diffusion_model.more": (3, 3)})
    refused("read and more were read for different models", Ingredient(read, 1, "read"), Ingredient(more, 1, "more"))
    again = read_lora(keys, unet())
    assert merge([Ingredient(read), Ingredient(again)]).file.names is read.names


def test_files_of_one_style_meet_whatever_layers_they_have():
    names = ["lora_unet_double_blocks_0_img_attn_proj", "lora_unet_double_blocks_1_img_mlp_0"]
    merged = merge([Ingredient(read_lora(lora(name, (6, 4), seed=n))) for n, name in enumerate(names)]).file
    assert [*merged.adapters] == names


def test_other_blocks_and_components_of_one_dialect_meet():
    names = [f"lora_unet_{BLOCK}", f"lora_unet_{BLOCK}".replace("_1_", "_2_"), f"lora_te_{TEXT}"]
    merged = merge([Ingredient(read_lora(lora(name, (6, 4), seed=n))) for n, name in enumerate(names)]).file
    assert [*merged.adapters] == names


def test_loras_of_different_bases_do_not():
    one, two = ({"modelspec.architecture": base + "/lora"} for base in ("stable-diffusion-xl-v1-base", "flux-1-dev"))
    files = [
        replace(read_lora(lora("blocks.0.layer", (6, 4))), architecture=base, evidence=f"{told} says so", metadata=told)
        for base, told in (("sdxl", one), ("flux", two))
    ]
    says = "a is for sdxl .*, b for flux .*merge LoRAs of one base model"
    refused(says, Ingredient(files[0], 1, "a"), Ingredient(files[1], 1, "b"))
    assert merge([Ingredient(files[0])]).file.architecture == "sdxl"


def test_the_file_says_what_all_of_them_say():
    told = {"ss_base_model_version": "sdxl", "ss_network_dim": "4", "sshs_model_hash": "00"}
    files = [holding(plain((6, 4)), (6, 4), metadata=told | {"ss_output_name": name}) for name in "ab"]
    assert merge([Ingredient(file) for file in files]).file.metadata == {"ss_base_model_version": "sdxl"}
