"""LoRAs from files and runs into the graph and out again, in every format, as core's loaders read them."""

from pathlib import Path

import comfy.lora
import comfy.lora_convert
import folder_paths
import pytest
import torch

import tiny
from graph import Graph, GraphError, images, node, training_prompt
from lora_loom.host import loras, saving
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.core_reads import fault_of
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.names import NameTable, layer_shapes
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import make_adapter
from lora_loom.kernels.safetensors_io import LoraModel, load_tensors, save_tensors
from lora_loom.kernels.writing import DIALECTS, to_tensors
from lora_loom.nodes.files import LoomLoadLoRA, LoomSaveLoRA
from lora_loom.training.adapters import build
from lora_loom.training.learners import Component
from lora_loom.training.options import OptionError
from lora_loom.training.settings import AdapterSettings, Plan
from lora_loom.training.starting import start_from

FAMILIES = {"LoRA": {}, "LoKr": {}, "DoRA": {"dora": "output"}, "OFT": {}, "IA3": {}, "OFTv2": {}}


def trained(patcher, family, options, every=7):
    """Adapters with every number random on some of the layers."""
    adapters = {}
    for number, target in enumerate(select_targets(patcher.model, "full", True)[::every]):
        draws = torch.Generator().manual_seed(number)
        weight = patcher.model.state_dict()[f"{target.path}.weight"].float()
        name = "LoRA" if family == "DoRA" else family
        fresh = make_adapter(name, target.shape, Options(**{"rank": 2, "alpha": 1.0} | options), draws, weight)
        numbers = {key: t + 0.05 * torch.randn(t.shape, generator=draws) for key, t in fresh.tensors.items()}
        adapters[target.path] = fresh.with_tensors(numbers)
    return adapters


def lora_of(patcher, adapters, dialect="native"):
    file = LoRAFile(adapters, names=NameTable.of(patcher.model))
    model = to_tensors(file, dialect)
    return LoraModel(model, model.metadata)


def by_core(patcher, tensors, strength):
    """path → W' of the layers that core's loader changes."""
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names)
    clone = patcher.clone()
    clone.add_patches(patches, strength)
    state = patcher.model.state_dict()
    return {
        key.removesuffix(".weight"): comfy.lora.calculate_weight(patch, state[key].float().clone(), key)
        for key, patch in clone.patches.items()
    }


# -- written for core


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["sd15", "flux"])
def test_a_file_for_core_acts_as_trained(name, family, tmp_path):
    """To 1e-4 at every strength, for the families that core misreads, and unchanged for the others."""
    patcher = tiny.tiny(name)
    adapters = trained(patcher, family, FAMILIES[family])
    lora = lora_of(patcher, adapters)
    path, notes = saving.save(lora, tmp_path / "x.safetensors", saving.AS_IT_IS, saving.PLAIN, patcher, None)
    misread = [path for path, adapter in adapters.items() if fault_of(adapter)]
    assert bool(notes) == bool(misread) and (not notes or "largest error" in notes[0])
    state = patcher.model.state_dict()
    for strength in (1.0, 0.5, -0.7):
        made = by_core(patcher, load_tensors(path), strength)
        assert made.keys() == adapters.keys()
        for layer, adapter in adapters.items():
            weight = state[f"{layer}.weight"].float()
            wanted = adapter.merged(weight, strength)
            assert (made[layer] - wanted).norm() <= 1e-4 * (wanted - weight).norm() + 1e-6 * weight.norm(), layer
    assert not read_lora(path, layer_shapes(patcher.model)).unplaced


def test_what_core_misreads_is_told(tmp_path):
    patcher = tiny.tiny("sd15")
    lora = lora_of(patcher, trained(patcher, "IA3", {}))
    for model in (None, patcher):
        _, notes = saving.save(lora, tmp_path / "x.safetensors", saving.AS_IT_IS, saving.AS_TRAINED, model, None)
        assert len(notes) == 1 and notes[0].startswith("ComfyUI's own LoRA loaders misread (IA)³ (")
    assert load_tensors(tmp_path / "x.safetensors").keys() == lora.keys()
    plain = lora_of(patcher, trained(patcher, "LoRA", {}))
    assert saving.save(plain, tmp_path / "y.safetensors", saving.AS_IT_IS, saving.AS_TRAINED, None, None)[1] == []


def test_loras_on_the_model_are_part_of_what_it_was_trained_on(tmp_path):
    """(IA)³ scales the weights as wired: with another LoRA applied its difference is another."""
    patcher = tiny.tiny("sd15")
    adapters = trained(patcher, "IA3", {})
    first = next(iter(adapters))
    wired = patcher.clone()
    wired.add_patches({f"{first}.weight": ("diff", (torch.ones_like(patcher.model.state_dict()[f"{first}.weight"]),))})
    lora = lora_of(patcher, adapters)
    path, _ = saving.save(lora, tmp_path / "x.safetensors", saving.AS_IT_IS, saving.PLAIN, wired, None)
    written = read_lora(path, layer_shapes(patcher.model)).adapters[first]
    weight = patcher.model.state_dict()[f"{first}.weight"].float() + 1
    torch.testing.assert_close(written.difference(weight), adapters[first].difference(weight), rtol=1e-4, atol=1e-5)


# -- formats


@pytest.mark.parametrize("form", ["kohya", "diffusers", "lycoris", "native"])
def test_formats(form, tmp_path):
    patcher = tiny.tiny("sd15")
    adapters = trained(patcher, "LoRA", {})
    lora = lora_of(patcher, adapters)
    path, _ = saving.save(lora, tmp_path / "x.safetensors", form, saving.AS_TRAINED, patcher, None)
    again = read_lora(path, layer_shapes(patcher.model))
    assert not again.unplaced and again.adapters.keys() == adapters.keys()
    for layer, adapter in adapters.items():
        torch.testing.assert_close(again.adapters[layer].delta(), adapter.delta(), rtol=1e-4, atol=1e-6)
    assert load_tensors(path).metadata["loom.dialect"] == form
    assert form in DIALECTS


@pytest.mark.parametrize(
    "form, for_core, family, connected, message",
    [
        ("kohya", saving.AS_TRAINED, "LoRA", None, "format is 'kohya': connect the MODEL"),
        ("diffusers", saving.AS_TRAINED, "IA3", "sd15", "format is 'diffusers': .*cannot hold"),
        (saving.AS_IT_IS, saving.PLAIN, "IA3", None, "depends on the weights; connect the MODEL"),
        (saving.AS_IT_IS, saving.PLAIN, "IA3", "flux", "of its keys cannot be written .*connect the MODEL that it is"),
        ("pickle", saving.AS_TRAINED, "LoRA", "sd15", "format: 'pickle' is unknown; choose one of as it is, native"),
        ("kohya", "maybe", "LoRA", "sd15", "for_core: 'maybe' is unknown"),
    ],
)
def test_what_is_refused(form, for_core, family, connected, message, tmp_path):
    lora = lora_of(tiny.tiny("sd15"), trained(tiny.tiny("sd15"), family, {}))
    model = connected and tiny.tiny(connected)
    with pytest.raises(ValueError, match=message):
        saving.save(lora, tmp_path / "x.safetensors", form, for_core, model, None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dialect", ["kohya", "diffusers"])
def test_a_file_that_core_reads_keeps_its_names(dialect, tmp_path):
    patcher = tiny.tiny("sd15")
    lora = lora_of(patcher, trained(patcher, "LoRA", {}), dialect)
    for model in (None, patcher):
        path, notes = saving.save(lora, tmp_path / "x.safetensors", saving.AS_IT_IS, saving.PLAIN, model, None)
        written = load_tensors(path)
        assert written.keys() == lora.keys() and written.metadata["loom.dialect"] == dialect and not notes


def test_biases_that_others_cannot_scale_are_told(tmp_path):
    patcher = tiny.tiny("sd15")
    path = "diffusion_model.time_embed.0"
    factors = torch.linspace(0.5, 2, patcher.model.get_submodule(path).out_features)[:, None]
    given, place = LoraModel({f"{path}.ia3_l": factors}), tmp_path / "x.safetensors"
    _, (_, note) = saving.save(given, place, saving.AS_IT_IS, saving.PLAIN, patcher, None)
    assert note == "PEFT's (IA)³ scales the biases of its layers too, which are left as they are"


def test_layers_in_parts_are_rewritten_too(tmp_path):
    """Query, key and value with a DoRA each, which core misreads one by one."""
    patcher = tiny.tiny("flux")
    adapters = trained(patcher, "DoRA", {"dora": "output"}, every=1)
    adapters = {path: adapter for path, adapter in adapters.items() if "qkv" in path}
    lora, place = lora_of(patcher, adapters, "diffusers"), tmp_path / "x.safetensors"
    saving.save(lora, place, saving.AS_IT_IS, saving.PLAIN, patcher, None)
    made, state = by_core(patcher, load_tensors(place), 0.5), patcher.model.state_dict()
    assert made.keys() == adapters.keys() and adapters
    for path, adapter in adapters.items():
        weight = state[f"{path}.weight"].float()
        wanted = adapter.merged(weight, 0.5)
        assert (made[path] - wanted).norm() <= 1e-4 * (wanted - weight).norm(), path


def test_text_encoders_need_the_clip(tmp_path):
    clip = tiny.tiny_clip()
    table = NameTable.of(clip.cond_stage_model)
    path = next(path for path in table.text.paths if path.endswith("q_proj"))
    weight = clip.cond_stage_model.state_dict()[f"{path}.weight"].float()
    fresh = make_adapter("IA3", weight.shape, Options(), torch.Generator())
    adapter = fresh.with_tensors({"weight": torch.full_like(fresh.tensors["weight"], 0.5)})
    lora = to_tensors(LoRAFile({path: adapter}, names=table))
    place, model = tmp_path / "x.safetensors", tiny.tiny("sd15")
    with pytest.raises(ValueError, match="1 of its keys|2 of its keys"):
        saving.save(lora, place, saving.AS_IT_IS, saving.PLAIN, model, None)
    saving.save(lora, place, saving.AS_IT_IS, saving.PLAIN, model, clip)
    patches = comfy.lora.load_lora(load_tensors(place), comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}))
    (key,) = patches
    made = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], weight.clone(), key)
    torch.testing.assert_close(made, 1.5 * weight)


# -- the nodes in the graph


@pytest.fixture(scope="module")
def graph():
    images(Path(folder_paths.get_input_directory()) / "pair")
    return Graph()


def test_from_a_run_and_from_a_file(graph):
    """Trained, listed as a run, saved, listed as a file, and gone on with from both."""
    made = graph.run(training_prompt("sd15", "pair", "begun here", length=2))["lora"]
    assert loras.sources()[0] == "run: begun here"
    file = {"4": node("LoomLoadLoRA", source="run: begun here"),
            "5": node("LoomSaveLoRA", lora=["4", 0], name="kept/begun", if_file_exists="overwrite"),
            "keep": node("Keep", value=["4", 0]), "name": node("Keep", value=["5", 0])}
    kept = graph.run(file)
    assert kept["name"] == str(Path("kept/begun.safetensors")) and kept["name"] in loras.sources()
    assert all(torch.equal(kept["keep"][key], made[key]) for key in made)
    assert kept["keep"].metadata["loom.recipe"] == made.metadata["loom.recipe"]
    for number, source in enumerate(("run: begun here", kept["name"])):
        prompt = training_prompt("sd15", "pair", f"on from {number}", length=1, start_from=["6", 0])
        told = graph.run({**prompt, "6": node("LoomLoadLoRA", source=source)})["report"]
        assert "started from the given LoRA on 84 of 84 layers" in told


def test_the_marks_of_runs_and_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    folder = tmp_path / "lora_loom/cat"
    for mark in ("", "-best", "-ema", "-step000500", "-step000050", "-other", "-best-2"):
        save_tensors({"a": torch.ones(1)}, folder / f"cat{mark}.safetensors")
    (folder / "state.safetensors").write_bytes(b"")
    runs = [name for name in loras.sources() if name.startswith("run: ")]
    assert runs == ["run: cat", "run: cat (ema)", "run: cat (best)", "run: cat (step 50)", "run: cat (step 500)"]
    assert torch.equal(LoomLoadLoRA.execute("run: cat (step 50)").result[0]["a"], torch.ones(1))
    before = LoomLoadLoRA.fingerprint_inputs(source="run: cat")
    save_tensors({"a": torch.ones(2)}, folder / "cat.safetensors")
    assert before and LoomLoadLoRA.fingerprint_inputs(source="run: cat") != before


def test_the_node_says_what_core_misreads(tmp_path, monkeypatch):
    patcher = tiny.tiny("sd15")
    lora = lora_of(patcher, trained(patcher, "OFT", {}))
    out = LoomSaveLoRA.execute(lora, "told", "overwrite")
    assert out.ui["text"][0] == out.result[0] == "told.safetensors"
    assert out.ui["text"][1].startswith("ComfyUI's own LoRA loaders misread OFT and BOFT (")
    out = LoomSaveLoRA.execute(lora, "told", "overwrite", for_core=saving.PLAIN, model=patcher)
    assert out.ui["text"][1].startswith("written for ComfyUI's own loaders: ")


def test_start_from_of_a_lora_whose_query_key_and_value_are_apart():
    """As diffusers has them: one adapter of three times the rank, with the same effect."""
    patcher = tiny.tiny("flux")
    names, path = NameTable.of(patcher.model), "diffusion_model.double_blocks.0.img_attn.qkv"
    adapters = {p: a for p, a in trained(patcher, "LoRA", {}, every=1).items() if p == path}
    given = to_tensors(LoRAFile(adapters, names=names), "diffusers")
    assert len([key for key in given if "lora_A" in key]) == 3
    for rank in (2, 6):
        settings = AdapterSettings(layers="custom", layer_filter="double_blocks.0.img_attn.qkv")
        built = build(patcher.model, Plan(rank=rank, adapter=settings), lambda path: None)
        component = Component("model", built.adapters, 1e-4)
        if rank == 2:
            with pytest.raises(OptionError, match="start_from has rank 6 on .*set rank to 6"):
                start_from([component], given, names)
        else:
            start_from([component], given, names)
            ours, theirs = component.adapters[path].delta(), adapters[path].delta()
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_source_that_is_gone(graph):
    with pytest.raises(GraphError, match="source"):
        graph.run({"4": node("LoomLoadLoRA", source="run: nobody"), "keep": node("Keep", value=["4", 0])})
