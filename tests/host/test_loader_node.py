"""The loader as its users have it: widgets in, MODEL, CLIP, words, report and picture out."""

import re

import comfy.samplers
import folder_paths
import pytest
import torch
from PIL import Image

import tiny
from applying import lora_on, relative, sampled
from lora_loom.host import lora_cache
from lora_loom.host.apply import BRANCH, FUSE, HOST, Strengths, apply_lora
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors
from lora_loom.nodes.applying import FROM_SOCKET, LoomLoRALoaderAdvanced


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A loras folder of its own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    lora_cache.clear()
    return tmp_path


def load(model, name=FROM_SOCKET, strength=1.0, clip=None, strength_clip=1.0, **options):
    """(MODEL, CLIP, words, report, the node's whole output)"""
    with torch.inference_mode():
        result = LoomLoRALoaderAdvanced.execute(model, name, strength, strength_clip, clip, **options)
    return (*result.args, result)


def saved(folder, patcher, name="cat.safetensors", metadata=None, **how):
    _, lora = lora_on(patcher, **how)
    save_tensors(LoraModel(lora, metadata or {}), folder / name)
    return lora


def test_a_file(folder):
    patcher = tiny.tiny("sd15", inference=True)
    lora = saved(folder, patcher, metadata={"modelspec.trigger_phrase": "my_cat"})
    model, clip, words, report, result = load(patcher, "cat.safetensors", 0.7)
    assert clip is None and words == "my_cat"
    wanted, _, applied = apply_lora(patcher, None, lora, Strengths.of(0.7))
    assert torch.equal(sampled(model, "sd15"), sampled(wanted, "sd15"))
    assert report.startswith(f"cat.safetensors: {len(applied.fused)} weights of the MODEL at 0.7 (fused: constant")
    assert "trigger words: my_cat (from" in report and "strongest blocks" in report
    assert len(result.ui["images"]) == 1
    plain = load(patcher, "cat.safetensors", 0.7, picture=False)
    assert "images" not in plain[4].ui and "strongest" not in plain[3]


def test_blocks_components_and_steps(folder):
    patcher, clip = tiny.tiny("sdxl", inference=True), tiny.tiny_dual_clip(inference=True)
    saved(folder, patcher)
    how = {"components": "unet=0.5, te1=0.3", "blocks": "in=0, out/attn=2", "steps": "1@1, 0@3"}
    model, _, _, report, _ = load(patcher, "cat.safetensors", 0.5, clip, **how)
    assert "branched: strengths change over the run" in report and "at 0.25 to 0.5 times 1@1,0@3 over the run" in report
    assert "31 weights of the MODEL are left as they are: their factor is 0" in report
    assert "te1" not in report.splitlines()[0]
    assert not torch.equal(sampled(model, "sdxl"), sampled(patcher, "sdxl"))
    with pytest.raises(ValueError, match="engine: fuse cannot change strengths"):
        load(patcher, "cat.safetensors", steps="1@1, 0@3", engine=FUSE)
    with pytest.raises(ValueError, match="engine: host knows one strength"):
        load(patcher, "cat.safetensors", blocks="in=0", engine=HOST)
    with pytest.raises(ValueError, match="LoomPromptLoRA"):
        text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.diff": torch.zeros(128, 64)}
        load(patcher, lora=LoraModel(text), clip=clip, components="te=0.1@1,0.6@6")
    with pytest.raises(ValueError, match="steps: .*is no place in a run"):
        load(patcher, "cat.safetensors", steps="1@noon")
    with pytest.raises(ValueError, match="blocks: .*do you mean"):
        load(patcher, "cat.safetensors", blocks="atn1=0")


def test_options_without_effect_are_told(folder):
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher, preset="attention", conv=False)
    options = {"interpolation": "linear", "clock": "trajectory", "blocks": "ff=0", "strength_clip": 0.3}
    report = load(patcher, lora=LoraModel(lora), **options)[3]
    for option in ("interpolation", "strength_clip", "blocks"):
        assert f"{option}: no effect" in report, report
    assert "clock: trajectory has no effect" in report
    quiet = load(patcher, lora=LoraModel(lora), interpolation="linear", clock="trajectory", steps="0@0.0,1@0.5")[3]
    assert "no effect" not in quiet


def test_schedules_of_blocks_are_drawn(folder):
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    sizes = []
    for blocks in ("", "in=0@1,1@6"):
        images = load(patcher, lora=LoraModel(lora), blocks=blocks)[4].ui["images"]
        place = folder_paths.get_temp_directory()
        with Image.open(f"{place}/{images[0]['subfolder']}/{images[0]['filename']}") as picture:
            sizes.append(picture.height)
    assert sizes[1] > sizes[0] + 100


def test_every_key_in_the_log_when_asked(folder, monkeypatch, caplog):
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    lora["lora_unet_nowhere.lora_down.weight"] = torch.zeros(2, 3)
    lora["lora_unet_nowhere.lora_up.weight"] = torch.zeros(3, 2)
    for asked in (False, True):
        monkeypatch.setenv("LOOM_DEBUG", str(int(asked)))
        caplog.clear()
        with caplog.at_level("INFO"):
            load(patcher, lora=LoraModel(lora))
        logged = [record.getMessage() for record in caplog.records if "layers placed" in record.getMessage()]
        assert len(logged) == 1 and ("lora_unet_nowhere.lora_down.weight" in logged[0]) == asked


def test_rounding_is_told(folder):
    """What of the LoRA arrives on float8 weights, merged and beside them."""
    patcher = tiny.tiny("sd15", dtype=torch.float8_e4m3fn, compute_dtype=torch.float32, inference=True)
    _, lora = lora_on(patcher, size=0.05)
    report = load(patcher, lora=LoraModel(lora))[3]
    assert "branched: weights in float8_e4m3fn" in report
    assert re.search(r"float8.*%", report.split("strongest")[1]), report


def test_what_is_left_out_is_told_by_cause(folder):
    """A LoRA for another base names both; keys without a place are grouped."""
    patcher = tiny.tiny("sd15", inference=True)
    saved(folder, tiny.tiny("sdxl"), "xl.safetensors")
    with pytest.raises(ValueError, match=r"none of the \d+ keys of this LoRA fits the MODEL \(made for SDXL .*is SD1"):
        load(patcher, "xl.safetensors")
    lora = saved(folder, patcher)
    key = next(key for key in lora if key.endswith("lora_down.weight") and "attn1_to_q" in key)
    odd = {key.replace("attn1_to_q", "attn1_to_p"): lora.pop(key)}
    _, _, _, report, _ = load(patcher, lora=LoraModel({**lora, **odd}))
    assert re.search(r"1 key left out, .*attn1_to_p.*nearest in this model: .*attn1", report), report


def test_the_lora_socket_counts_and_is_branched(folder):
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher)
    model, _, _, report, _ = load(patcher, lora=LoraModel(lora, {}, trained=True))
    assert "branched: trained a moment ago" in report
    fused = load(patcher, lora=LoraModel(lora, {}, trained=True), engine=FUSE)
    assert relative(sampled(model, "sd15"), sampled(fused[0], "sd15")) <= 2e-5
    with pytest.raises(ValueError, match="lora_name: choose a file, or connect"):
        load(patcher)


def test_a_changed_file_is_read_again(folder):
    patcher = tiny.tiny("sd15", inference=True)
    saved(folder, patcher)
    before = LoomLoRALoaderAdvanced.fingerprint_inputs("cat.safetensors")
    first = sampled(load(patcher, "cat.safetensors")[0], "sd15")
    saved(folder, patcher, seed=1)
    assert LoomLoRALoaderAdvanced.fingerprint_inputs("cat.safetensors") != before
    assert not torch.equal(sampled(load(patcher, "cat.safetensors")[0], "sd15"), first)
    own = LoomLoRALoaderAdvanced.fingerprint_inputs("cat.safetensors")
    (folder / "cat.json").write_text('{"activation text": "zorb"}')
    assert LoomLoRALoaderAdvanced.fingerprint_inputs("cat.safetensors") != own, "what lies beside it counts"
    assert load(patcher, "cat.safetensors")[2] == "zorb"
    unknown = LoomLoRALoaderAdvanced.fingerprint_inputs("../../etc/passwd")
    assert unknown == LoomLoRALoaderAdvanced.fingerprint_inputs("nothing") and "passwd" not in unknown
    with pytest.raises(ValueError, match="there is no"):
        load(patcher, "../../etc/passwd")


def test_both_clocks():
    """A split run replays its own steps on the one, and goes on where it is on the other."""
    patcher = tiny.tiny("sd15", inference=True)
    _, lora = lora_on(patcher, every=2)
    lora = LoraModel(lora)
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "karras", 6)
    on_run, _, _, _, _ = load(patcher, lora=lora, steps="0@1, 1@4")
    on_way, _, _, _, _ = load(patcher, lora=lora, steps="0@1, 1@4", clock="trajectory", sigmas=sigmas)
    by_time, _, _, _, _ = load(patcher, lora=lora, steps="0@0.0, 1@0.5", clock="trajectory")
    whole = sampled(on_run, "sd15", sigmas=sigmas)
    assert torch.equal(sampled(on_way, "sd15", sigmas=sigmas), whole)
    for model, same in ((on_run, False), (on_way, True), (by_time, None)):
        first = sampled(model, "sd15", sigmas=sigmas[:3])
        both = sampled(model, "sd15", sigmas=sigmas[2:], start=first, noise=False)
        if same is None:  # the model's own time does not know where runs begin
            assert relative(both, sampled(model, "sd15", sigmas=sigmas)) <= 1e-5
        else:
            assert (relative(both, whole) <= 1e-5) == same
    # img2img: of 12 steps the last 6 are run
    full = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "karras", 12)
    tail, _, _, _, _ = load(patcher, lora=lora, steps="0@1, 1@9", clock="trajectory", sigmas=full)
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    got = sampled(tail, "sd15", sigmas=full[6:], start=start)
    plain = sampled(patcher, "sd15", sigmas=full[6:9], start=start)
    wanted = sampled(load(patcher, lora=lora, engine=BRANCH)[0], "sd15", sigmas=full[8:], start=plain, noise=False)
    # full[6:9] are steps 7 and 8, before the switch
    assert relative(got, wanted) <= 1e-5
    with pytest.raises(ValueError, match="the steps of the whole trajectory are not known here"):
        sampled(load(patcher, lora=lora, steps="0@1, 1@4", clock="trajectory")[0], "sd15")
    with pytest.raises(ValueError, match="sigmas: they count for the clock 'trajectory' only"):
        load(patcher, lora=lora, steps="0@1, 1@4", sigmas=sigmas)
