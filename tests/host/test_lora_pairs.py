"""LoRAs for two MODELs: every file goes to its side, finds its partner, and acts as by the host's own loader."""

import json

import comfy.sd
import folder_paths
import pytest
import torch

import tiny
from applying import lora_on, relative, sampled
from graph import Graph, GraphError, node
from lora_loom.host import lora_cache, pairs
from lora_loom.host.apply import Strengths
from lora_loom.host.pairs import FIND, FROM_SOCKETS, HIGH, LOW, NONE, Choice, apply_pair, route
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors
from lora_loom.kernels.sides import halves, partners, side_by_metadata, side_by_name
from lora_loom.kernels.strengths.schedule import parse
from lora_loom.nodes.pairs import LoomLoRAPair

OUTPUTS = ("high", "low", "clip", "words", "report")
LONELY = "2000 letters " * 160


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty LoRA folder of the host, and an empty cache."""
    known = dict(folder_paths.folder_names_and_paths) | {"loras": ([str(tmp_path)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    lora_cache.clear()
    yield tmp_path
    lora_cache.clear()


@pytest.fixture(scope="module")
def models():
    return {HIGH: tiny.tiny("wan", seed=1), LOW: tiny.tiny("wan", seed=2)}


@pytest.fixture(scope="module")
def tensors(models):
    """Two different LoRAs as files have them."""
    return {side: lora_on(models[side], seed=seed, every=3)[1] for seed, side in enumerate((HIGH, LOW))}


def by_host(model, lora, strength=1.0):
    return sampled(comfy.sd.load_lora_for_models(model, None, dict(lora), strength, 0.0)[0], "wan", steps=2)


def pair(models, choice, engine="auto", high=1.0, low=1.0, clip=None, **further):
    strengths = {side: Strengths.of(s) for side, s in ((HIGH, high), (LOW, low))}
    return apply_pair(models, clip, choice, strengths, engine)[:4]


# ---------------------------------------------------------------- sides, by what there is


@pytest.mark.parametrize(
    ("name", "side"),
    [
        # as they are called where they are published
        ("wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors", HIGH),
        ("wan2.2_t2v_lightx2v_4steps_lora_v1.1_low_noise.safetensors", LOW),
        ("Wan2.2-Lightning_T2V-A14B-4steps-lora_HIGH_fp16.safetensors", HIGH),
        ("Wan2.2-Lightning_T2V-v1.1-A14B-4steps-lora_LOW_fp16.safetensors", LOW),
        ("high_noise_model.safetensors", HIGH),
        ("walk_HighNoise_Wan2.2_someone.safetensors", HIGH),
        ("someone_v2.0_lownoise.safetensors", LOW),
        ("someone_v2.0_hinoise.safetensors", HIGH),
        ("Wan2_2-I2V_high_model_walk.safetensors", HIGH),
        ("LowModel walk.safetensors", LOW),
        ("video_surf_000000100_low_noise.safetensors", LOW),
        ("w22_hn_walk_v3.safetensors", HIGH),
        ("walk LN.safetensors", LOW),
        ("wan/high_noise/walk.safetensors", HIGH),
        ("Low\\walk.safetensors", LOW),
        ("cat_high.safetensors", HIGH),
        ("CatLow.safetensors", LOW),
        ("cat-low-v2-000012.safetensors", LOW),
        ("WAN22_WALK_HIGH.safetensors", HIGH),
        ("low_poly_high_noise.safetensors", HIGH),  # the surer mark counts
        # what only looks like it
        ("high_heels.safetensors", ""),
        ("low_poly_style.safetensors", ""),
        ("HIGH_HEELS.safetensors", ""),
        ("HIGH_heels_wan.safetensors", ""),
        ("wan_LOW_poly_style.safetensors", ""),
        ("Low_Light_Photography.safetensors", ""),
        ("Samuel_L_Jackson.safetensors", ""),
        ("DeathNote_L.safetensors", ""),
        ("XYZ-22-H-e8.safetensors", ""),
        ("L/lcm_wan.safetensors", ""),
        ("highres.safetensors", ""),
        ("slow_flow.safetensors", ""),
        ("xl_hnd.safetensors", ""),
        ("cat_high_and_low.safetensors", ""),
        ("cat_high_noise_low_noise.safetensors", ""),
        ("cat.safetensors", ""),
        (LONELY, ""),
    ],
)
def test_sides_by_name(name, side):
    assert side_by_name(name).side == side


def test_a_word_counts_where_there_is_its_counterpart():
    assert side_by_name("high_heels.safetensors", ["low_heels.safetensors"]) == (HIGH, "by its name and its partner's")
    assert side_by_name("low_poly_high.safetensors", ["low_poly_low.safetensors"]).side == HIGH
    assert side_by_name("wan_l_cat.safetensors", ["wan_h_cat.safetensors"]).side == LOW
    assert side_by_name("high_heels.safetensors", ["other/low_boots.safetensors"]).side == ""
    assert side_by_name("LOW_poly.safetensors", ["HIGH_poly.safetensors"]).side == LOW
    assert side_by_name("XYZ-22-H-e8.safetensors", ["XYZ-22-L-e8.safetensors"]).side == HIGH
    assert side_by_name("Wan22-L-e8-K3NK.safetensors", ["other/Wan22-H-e8-K3NK.safetensors"]).side == LOW
    assert side_by_name("DeathNote_L.safetensors", ["DeathNote_high.safetensors"]).side == ""
    assert side_by_name("L/cat.safetensors", ["H/cat.safetensors"]).side == ""


@pytest.mark.parametrize(
    ("name", "others", "found"),
    [
        ("cat_high.safetensors", ["cat_low.safetensors", "sub/cat_low.safetensors", "dog_low.safetensors"], [0]),
        ("cat_HIGH.safetensors", ["cat_low.safetensors", "cat_LOW.safetensors"], [1]),  # as it is written
        ("Cat_High.safetensors", ["cat-low.safetensors"], [0]),  # letters and separators
        ("cat_high_noise.safetensors", ["cat_LOW.safetensors"], [0]),
        ("sub/cat_high.safetensors", ["cat_low.safetensors"], [0]),  # another folder
        ("sub/cat_high.safetensors", ["cat_low.safetensors", "sub/Cat-Low.safetensors"], [1]),  # rather the same one
        ("a/cat_high.safetensors", ["b/cat_low.safetensors", "c/cat_low.safetensors"], [0, 1]),
        ("cat_high.safetensors", ["Cat_low.safetensors", "cat-low.safetensors"], [0, 1]),
        ("high_noise/cat.safetensors", ["low_noise/cat.safetensors", "cat.safetensors"], [0]),
        ("XYZ-22-H-e8.safetensors", ["XYZ-22-L-e8.safetensors", "XYZ-22-H-e9.safetensors"], [0]),
        ("XYZ-22-H-e8.safetensors", ["XYZ-22-L-e9.safetensors"], []),
        ("high_a_high_noise.safetensors", ["low_a_high_noise.safetensors", "high_a_low_noise.safetensors"], [1]),
        ("cat_hinoise.safetensors", ["cat_lonoise.safetensors", "cat_low.safetensors"], [0]),
        ("cat.safetensors", ["cat_low.safetensors"], []),
        # from another folder only what the name tells apart
        ("styleA/high_noise.safetensors", ["styleB/low_noise.safetensors"], []),
        ("styleA/high_noise.safetensors", ["styleB/low_noise.safetensors", "styleA/low_noise.safetensors"], [1]),
        ("dog/wan2.2_HIGH_lora_v2.safetensors", ["cat/wan2.2_LOW_lora_v2.safetensors"], []),
        ("dog/wan_high_noise_model.safetensors", ["low_noise_model.safetensors"], []),
        ("a/wan_walk_high.safetensors", ["b/wan_walk_low.safetensors", "c/wan_low.safetensors"], [0]),
        ("high/high_noise.safetensors", ["low/low_noise.safetensors", "x/low_noise.safetensors"], [0]),
        ("high/cat_high.safetensors", ["low/cat_low.safetensors"], [0]),
        ("cat_h.safetensors", ["cat_low.safetensors", "cat_l.safetensors"], [1]),
        ("cat_high.safetensors", ["cat_l.safetensors"], []),
        ("H/cat.safetensors", ["L/cat.safetensors"], []),
        ("cat_high.safetensors", ["cat_low" + "x" * 600 + ".safetensors"], []),
    ],
)
def test_partners(name, others, found):
    side = side_by_name(name, others).side or HIGH
    assert partners(name, side, [name, *others]) == [others[number] for number in found]


def test_every_partner_is_mutual():
    names = [
        f"{before}{mark}{behind}.safetensors"
        for before in ("cat_", "wan/Cat ", "")
        for mark in ("high_noise", "HighNoise", "HIGH", "hn", "H", "low_noise", "LowNoise", "LOW", "ln", "L")
        for behind in ("", "_v2", "-e8")
    ]
    for name in names:
        side = side_by_name(name, names).side
        (other,) = partners(name, side, names)
        assert partners(other, side_by_name(other, names).side, names) == [name]


@pytest.mark.parametrize(
    ("metadata", "side"),
    [
        ({"loom.recipe": json.dumps({"objective": {"min_timestep": 875, "max_timestep": 1000}})}, HIGH),
        ({"loom.recipe": json.dumps({"objective": {"min_timestep": 0, "max_timestep": 900}})}, LOW),
        ({"loom.recipe": json.dumps({"objective": {"min_timestep": 0, "max_timestep": 1000}})}, ""),
        ({"loom.recipe": json.dumps({"objective": {"min_timestep": "0", "max_timestep": None}})}, ""),
        ({"loom.recipe": json.dumps({"objective": [1]})}, ""),
        ({"loom.recipe": "[" * 10_000}, ""),
        ({"ss_sd_model_name": "wan2.2_t2v_high_noise_14B_fp16.safetensors"}, HIGH),
        ({"ss_sd_model_name": "wan2.2_t2v_low_noise_14B_fp16.safetensors", "ss_dit_high_noise_name": "x"}, ""),
        ({"ss_sd_model_name": "Wan2_2-I2V-A14B-HIGH_fp8_e4m3fn_scaled_KJ.safetensors"}, HIGH),
        ({"ss_sd_model_name": "high_quality_mix.safetensors"}, ""),
        ({}, ""),
    ],
)
def test_sides_by_metadata(metadata, side):
    assert side_by_metadata(metadata).side == side


def test_our_trainer_says_it():
    """The recipe in a file is the plan as it is."""
    import dataclasses

    from lora_loom.training.settings import Plan
    from lora_loom.training.settings.objective import ObjectiveSettings

    plan = dataclasses.replace(Plan(), objective=ObjectiveSettings(min_timestep=900))
    metadata = {"loom.recipe": json.dumps(dataclasses.asdict(plan))}
    assert side_by_metadata(metadata) == (HIGH, "trained on timesteps 900 to 1000")


# ---------------------------------------------------------------- files for both sides


PREFIXES = {
    "diffusers": ("transformer.", "transformer_2."),
    "ai-toolkit": ("diffusion_model.transformer_1.", "diffusion_model.transformer_2."),
    "noise": ("high_noise.diffusion_model.", "low_noise.diffusion_model."),
    "bare": ("high_noise_model.", "low_noise_model."),
}


def combined(tensors, prefixes):
    """Both LoRAs in one file, as PEFT names the parts."""
    found = {}
    for side, prefix in zip((HIGH, LOW), PREFIXES[prefixes], strict=True):
        for key, tensor in tensors[side].items():
            found[key.replace("diffusion_model.", prefix, 1)] = tensor
    return found


@pytest.mark.parametrize("prefixes", PREFIXES)
def test_one_file_for_both(folder, models, tensors, prefixes):
    plain = {side: {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in lora.items()
                    if not k.endswith(".alpha")} for side, lora in tensors.items()}  # fmt: skip
    assert all(key.startswith("diffusion_model.blocks.") or "." in key for key in plain[HIGH])
    save_tensors(combined(plain, prefixes), folder / "both.safetensors")
    done, _, _, report = pair(models, Choice("both.safetensors"))
    for side in (HIGH, LOW):
        assert relative(sampled(done[side], "wan", steps=2), by_host(models[side], plain[side])) < 1e-5
    assert "left out" not in report and report.count("by its keys") == 2


def test_what_peft_keeps_beside_goes_with_its_half():
    metadata = {
        "lora_adapter_metadata": json.dumps(
            {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer_2.r": 4, "transformer_2.lora_alpha": 2}
        ),
        "other": "kept",
    }
    keys = {"transformer.a.lora_A.weight": torch.ones(1), "transformer_2.a.lora_A.weight": torch.zeros(1)}
    found = halves({**keys, "text_encoder.b.lora_A.weight": torch.ones(2)}, metadata)
    for side, value, alpha in ((HIGH, 1.0, 8), (LOW, 0.0, 2)):
        tensors, own = found[side]
        assert tensors.keys() == {"transformer.a.lora_A.weight", "text_encoder.b.lora_A.weight"}
        assert tensors["transformer.a.lora_A.weight"].item() == value and own["other"] == "kept"
        assert json.loads(own["lora_adapter_metadata"]) == {"transformer.r": 4, "transformer.lora_alpha": alpha}
    assert halves({"transformer.a.lora_A.weight": torch.ones(1)}, {}) == {}


def test_a_half_of_such_a_file(folder, models, tensors):
    both = combined(tensors, "ai-toolkit")
    low = {key: tensor for key, tensor in both.items() if "transformer_2" in key}
    save_tensors(low, folder / "x.safetensors")
    save_tensors(both, folder / "both.safetensors")
    found = route(Choice("x.safetensors"))
    assert found.parts.keys() == {LOW} and "the high noise MODEL stays as it is" in found.notes
    assert route(Choice("both.safetensors", side=HIGH)).parts.keys() == {HIGH}
    with pytest.raises(ValueError, match="side: the keys of x.safetensors are for low noise only"):
        route(Choice("x.safetensors", side=HIGH))
    with pytest.raises(ValueError, match="partner: both.safetensors holds both sides itself; choose .none"):
        route(Choice("both.safetensors", "x.safetensors"))
    with pytest.raises(ValueError, match="partner: both.safetensors holds both sides itself; choose it in lora_name"):
        route(Choice("x.safetensors", "both.safetensors"))


# ---------------------------------------------------------------- where files go


def put(folder, tensors, *names, **metadata):
    for number, name in enumerate(names):
        save_tensors(tensors[(HIGH, LOW)[number % 2]], folder / f"{name}.safetensors", metadata or None)


@pytest.mark.parametrize("first", ["cat_high", "cat_low"])
@pytest.mark.parametrize("engine", ["auto", "branch", "host"])
def test_a_pair_acts_as_by_two_loaders(folder, models, tensors, first, engine):
    put(folder, tensors, "cat_high", "cat_low")
    done, clip, _, report = pair(models, Choice(f"{first}.safetensors"), engine, 0.7, -1.5)
    assert clip is None and done[HIGH] is not models[HIGH]
    for side, strength in ((HIGH, 0.7), (LOW, -1.5)):
        wanted = by_host(models[side], tensors[side], strength)
        assert relative(sampled(done[side], "wan", steps=2), wanted) < 1e-5
        assert relative(sampled(models[side], "wan", steps=2), wanted) > 1e-3
        assert f"{side} noise: cat_{side}.safetensors (by its name): " in report
        assert f"weights of the MODEL at {strength} (" in report


def test_a_file_for_both(folder, models, tensors):
    put(folder, tensors, "cat")
    done, _, _, report = pair(models, Choice("cat.safetensors"))
    for side in (HIGH, LOW):
        assert relative(sampled(done[side], "wan", steps=2), by_host(models[side], tensors[HIGH])) < 1e-5
    assert report.count("nothing tells which one it is for") == 2
    assert route(Choice("cat.safetensors", side="low")).parts.keys() == {LOW}
    put(folder, tensors, "dog_high", "dog_low")
    assert {part.name for part in route(Choice("dog_low.safetensors", side="both")).parts.values()} == {
        "dog_low.safetensors"
    }


def test_no_partner(folder, models, tensors):
    put(folder, tensors, "cat_high")
    done, _, _, report = pair(models, Choice("cat_high.safetensors"))
    assert done[LOW] is models[LOW] and "no partner found for cat_high.safetensors; choose one in partner" in report
    assert "the low noise MODEL stays as it is" in report
    put(folder, tensors, "cat_high", "cat_low")
    folder_paths.filename_list_cache.clear()
    assert route(Choice("cat_high.safetensors", NONE)).parts.keys() == {HIGH}
    assert route(Choice("cat_high.safetensors", FIND)).parts[LOW].name == "cat_low.safetensors"


def test_partners_by_hand(folder, tensors):
    put(folder, tensors, "one", "two", "cat_low", "cat_LOW", "cat_high")
    found = route(Choice("one.safetensors", "two.safetensors"))
    assert [found.parts[side].name for side in (HIGH, LOW)] == ["one.safetensors", "two.safetensors"]
    assert any("nothing tells which of the two" in note for note in found.notes)
    found = route(Choice("cat_low.safetensors", "one.safetensors"))
    assert [found.parts[side].name for side in (HIGH, LOW)] == ["one.safetensors", "cat_low.safetensors"]
    found = route(Choice("one.safetensors", "cat_high.safetensors"))
    assert [found.parts[side].name for side in (HIGH, LOW)] == ["cat_high.safetensors", "one.safetensors"]


def test_metadata_before_names(folder, tensors):
    save_tensors(tensors[HIGH], folder / "cat_low.safetensors", {"ss_sd_model_name": "wan2.2_high_noise.safetensors"})
    found = route(Choice("cat_low.safetensors"))
    assert found.parts[HIGH].why == "trained on wan2.2_high_noise.safetensors"
    assert any("its name says low noise" in note for note in found.notes)
    save_tensors(tensors[HIGH], folder / "renamed.safetensors", {"ss_output_name": "cat_high_noise"})
    folder_paths.filename_list_cache.clear()
    assert route(Choice("renamed.safetensors")).parts[HIGH].why == "made as cat_high_noise"


def test_what_cannot_be(folder, tensors):
    put(folder, tensors, "cat_high", "dog_high", "a_high", "x/a_low", "y", "z/a_low")
    for choice, what in (
        (Choice(), "lora_name: choose a file, or connect"),
        (Choice(partner="y.safetensors", lora_low=tensors[LOW]), "partner: it belongs to a file in lora_name"),
        (Choice("cat_high.safetensors", "dog_high.safetensors"), "partner: dog_high.* for high noise .* so is cat"),
        (Choice("a_high.safetensors"), "partner: a_high.* any of 2 files: x/a_low.safetensors, z/a_low.safetensors"),
        (Choice("nothing.safetensors"), "lora_name: there is no"),
        (Choice("../y.safetensors"), "lora_name: there is no"),
        (Choice("y.safetensors", "nothing.safetensors"), "^partner: there is no"),
        (Choice("y.safetensors", "cat_high.safetensors", "both"), "partner: side says that both"),
        (Choice("cat_high.safetensors", lora_high=LoraModel(tensors[LOW])), "lora_name: cat_high.* so is the LoRA"),
    ):
        with pytest.raises(ValueError, match=what):
            route(choice)
    with pytest.raises(ValueError, match="side: 'left' is none; choose one of automatic, high, low, both"):
        Choice(side="left")


def test_sockets(folder, models, tensors):
    put(folder, tensors, "x", "cat_low")
    lora = LoraModel(tensors[HIGH], {"ss_sd_model_name": "wan_low_noise"})
    done, _, _, report = pair(models, Choice(lora_high=lora))
    assert relative(sampled(done[HIGH], "wan", steps=2), by_host(models[HIGH], tensors[HIGH])) < 1e-5
    assert done[LOW] is models[LOW] and "lora_high: it seems made for low noise" in report
    found = route(Choice("cat_low.safetensors", lora_high=dict(lora)))
    assert [found.parts[side].name for side in (HIGH, LOW)] == ["the LoRA at lora_high", "cat_low.safetensors"]
    assert route(Choice("x.safetensors", lora_low=lora)).parts[HIGH].name == "x.safetensors"
    found = route(Choice("x.safetensors", lora_low=lora, lora_high=lora))
    assert "lora_name: x.safetensors is not used while both sockets are connected" in found.notes
    both = combined(tensors, "diffusers")
    found = route(Choice(lora_low=both))
    assert any("only the one for low noise is used" in note for note in found.notes)
    assert all(torch.equal(found.parts[LOW].lora.tensors[k.replace("diffusion_model.", "transformer.", 1)], v)
               for k, v in tensors[LOW].items() if k.startswith("diffusion_model."))  # fmt: skip
    with pytest.raises(ValueError, match="lora_high: its keys are for low noise; connect it to lora_low"):
        route(Choice(lora_high={k: v for k, v in both.items() if "transformer_2" in k}))


def test_wrong_files_name_side_and_file(folder, models, tensors):
    save_tensors({"lora_unet_input_blocks_1_1_proj_in.lora_down.weight": torch.ones(2, 8),
                  "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(8, 2)},
                 folder / "cat_high.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="^high noise, cat_high.safetensors: none of the 2 keys"):
        pair(models, Choice("cat_high.safetensors"))
    broken = {**tensors[HIGH], "diffusion_model.nowhere.lora_A.weight": torch.ones(2, 2)}
    save_tensors(broken, folder / "dog_high.safetensors")
    _, _, _, report = pair(models, Choice("dog_high.safetensors"))
    assert "1 key left out" in report and "diffusion_model.nowhere" in report


# ---------------------------------------------------------------- the CLIP


def test_the_text_encoder_gets_one_of_the_two(folder, models, tensors):
    clip = tiny.tiny_clip()
    draws = torch.Generator().manual_seed(5)
    name = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    text = {
        side: {
            f"{name}.lora_down.weight": torch.randn(2, 64, generator=draws),
            f"{name}.lora_up.weight": torch.randn(128, 2, generator=draws),
        }
        for side in (HIGH, LOW)
    }
    for side in (HIGH, LOW):
        save_tensors({**tensors[side], **text[side]}, folder / f"cat_{side}.safetensors")
    save_tensors({**tensors[HIGH], **text[HIGH]}, folder / "same.safetensors")

    def encoded(clip):
        return clip.encode_from_tokens(clip.tokenize("a cat"))

    wanted = encoded(comfy.sd.load_lora_for_models(None, clip, text[HIGH], 0.0, 1.0)[1])
    for name, said in (("cat_low.safetensors", "that of cat_low.safetensors is left out"), ("same.safetensors", "")):
        _, patched, _, report = pair(models, Choice(name), clip=clip)
        assert relative(encoded(patched), wanted) < 1e-5 and relative(encoded(clip), wanted) > 1e-2
        assert said in report and ("is left out" in report) == bool(said)
    _, _, _, report = pair(models, Choice("same.safetensors"))
    assert "text encoder absent" in report


# ---------------------------------------------------------------- the node


def test_blocks_and_steps(folder, models, tensors):
    put(folder, tensors, "cat_high", "cat_low")
    options = dict(side="automatic", engine="auto", strength_high=1.0, strength_low=1.0, strength_clip=1.0)
    options |= dict(lora_name="cat_low.safetensors", partner=FIND)
    given = dict(model_high=models[HIGH], model_low=models[LOW], **options)
    done = LoomLoRAPair.execute(**given, blocks="blocks.0=0", steps="1@1,0@2")
    high, low, clip, words, report = done.args
    assert len(done.ui["images"]) == 1 and report.count("change of the weights") == 2
    assert LoomLoRAPair.execute(**given, picture=False).ui.keys() == {"loom_blocks"}
    assert clip is None and words == "" and report.count("branched: strengths change over the run") == 2
    from lora_loom.host.apply import apply_lora

    for got, side in ((high, HIGH), (low, LOW)):
        strengths = Strengths(blocks="blocks.0=0", steps=parse("1@1,0@2", "steps"))
        wanted = apply_lora(models[side], None, tensors[side], strengths)[0]
        assert torch.equal(sampled(got, "wan", steps=2), sampled(wanted, "wan", steps=2))
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0])
    high, low, *_ = LoomLoRAPair.execute(**given, steps="1@1,0@3", clock="trajectory", sigmas=sigmas).args
    part = dict(sigmas=sigmas[2:], start=sampled(models[LOW], "wan", steps=2), noise=False)
    assert torch.equal(sampled(low, "wan", **part), sampled(models[LOW], "wan", **part))  # done by then
    wrong = {"steps": "1@1,", "blocks": "nowhere=1", "sigmas": sigmas, "side": "left", "engine": "x"}
    for option, bad in wrong.items():
        with pytest.raises(ValueError, match=option):
            LoomLoRAPair.execute(**{**given, option: bad})


class TwoModels:
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "MODEL"), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return tiny.tiny("wan", seed=1), tiny.tiny("wan", seed=2)


def test_in_a_graph_and_when_files_change(folder, tensors):
    put(folder, tensors, "cat_high")
    save_tensors(tensors[HIGH], folder / "cat_high.safetensors", {"modelspec.trigger_phrase": "ohwx cat"})
    graph = Graph()
    graph.register("TwoModels", TwoModels)
    options = dict(side="automatic", engine="auto", strength_high=1.0, strength_low=1.0, strength_clip=1.0)
    prompt = {
        "1": node("TwoModels"),
        "2": node("LoomLoRAPair", model_high=["1", 0], model_low=["1", 1], lora_name="cat_high.safetensors",
                  partner=FIND, **options),
        **{name: node("Keep", value=["2", number]) for number, name in enumerate(OUTPUTS)},
    }  # fmt: skip
    kept = graph.run(prompt)
    assert kept["words"] == "ohwx cat" and kept["clip"] is None and "no partner found" in kept["report"]
    graph.run(prompt)
    assert "2" not in graph.ran
    put(folder, tensors, "cat_high", "cat_low")  # the partner arrives
    folder_paths.filename_list_cache.clear()
    kept = graph.run(prompt)
    assert "2" in graph.ran and "low noise: cat_low.safetensors" in kept["report"]
    prompt["2"]["inputs"]["lora_name"] = FROM_SOCKETS
    with pytest.raises(GraphError, match="lora_name: choose a file"):
        graph.run(prompt)


@pytest.mark.parametrize("value", [None, 3, "", "../../x", ["1", 0], "run: x", LONELY, "\0", {"a": 1}])
def test_fingerprints_never_raise(folder, value):
    for partner in (FIND, NONE, value):
        for name in ("x.safetensors", value):
            assert isinstance(LoomLoRAPair.fingerprint_inputs(lora_name=name, partner=partner), str | float)


def test_the_page_says_what_there_is():
    from pathlib import Path

    page = (Path(__file__).parents[2] / "web/docs/LoomLoRAPair.md").read_text()
    for field in LoomLoRAPair.define_schema().inputs:
        assert f"**{field.id}**" in page
    assert all(side in page for side in pairs.SIDES)
