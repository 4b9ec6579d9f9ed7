"""The LoRA tools as nodes in the host's own executor: sockets, files, strengths, reports, and what they refuse."""

import json
import weakref
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch

import tiny
from applying import lora_on, random_adapter, relative, sampled
from graph import Graph, GraphError, node
from lora_loom.host import lora_cache, tools
from lora_loom.host.apply import BRANCH, FUSE, Strengths, apply_lora
from lora_loom.kernels.low_rank import Cut
from lora_loom.kernels.names import NameTable
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.safetensors_io import LoraModel, load_tensors, save_tensors
from lora_loom.kernels.strengths.schedule import fixed
from lora_loom.kernels.tools.provenance import TOOL
from lora_loom.kernels.writing import to_tensors
from lora_loom.nodes import NODES
from lora_loom.nodes.merging import LoomBakeApplied, LoomMergeLoRA
from lora_loom.nodes.tools import LoomExtractLoRA, LoomInspectLoRA, LoomResizeLoRA

WIDGETS = {
    "LoomMergeLoRA": {
        **{"strengths": "", "files": "", "method": "concat", "rank": 0, "energy": 0.0, "density": 0.5},
        **{"majority": "total", "seed": 0, "precision": "as given"},
    },
    "LoomBakeApplied": {"method": "concat", "rank": 0, "energy": 0.0, "dense_rank": 64, "precision": "as given"},
    "LoomExtractLoRA": {
        **{"rank": 8, "energy": 0.0, "average_rank": 0.0, "megabytes": 0.0, "min_change": 0.0, "clamp_quantile": 0.0},
        **{"conv": True, "precision": "float32"},
    },
    "LoomResizeLoRA": {
        **{"rank": 2, "energy": 0.0, "ratio": 0.0, "average_rank": 0.0, "megabytes": 0.0, "precision": "as given"},
    },
    "LoomConvertLoRA": {"dialect": "as it is", "precision": "as given", "plain": False, "rank": 0, "energy": 0.0},
    "LoomInspectLoRA": {"lora_name": "(from the lora socket)"},
}


class Anything(str):
    """A type of socket that fits all others."""

    def __ne__(self, other):
        return False


class Given:
    """Hands things of the test to the graph."""

    RETURN_TYPES, FUNCTION, CATEGORY = (Anything("*"),), "give", "test"
    things: dict = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    @classmethod
    def IS_CHANGED(cls, name):
        return float("nan")

    def give(self, name):
        return (self.things[name],)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A loras folder of its own."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    lora_cache.clear()
    return tmp_path


@pytest.fixture(scope="module")
def graph():
    Graph.register("Given", Given)
    return Graph()


def run(graph, kind, links=(), count=3, **widgets):
    """What a tool's outputs are; ``links``: socket → thing."""
    Given.things = dict(links)
    prompt = {f"in-{name}": node("Given", name=name) for name in Given.things}
    sockets = {name: [f"in-{name}", 0] for name in Given.things}
    prompt["tool"] = node(kind, **WIDGETS[kind] | widgets | sockets)
    prompt |= {str(place): node("Keep", value=["tool", place]) for place in range(count)}
    kept = graph.run(prompt)
    return [kept[str(place)] for place in range(count)]


def model(tensors, **metadata):
    return LoraModel(tensors, metadata)


def delta(lora, table):
    adapters = read_lora(lora, table).adapters
    return {path: adapter.difference(torch.zeros(table.shapes[path])) for path, adapter in adapters.items()}


def metadata_of(lora):
    return json.loads(lora.metadata[TOOL])


# -- merge


def test_merge_of_sockets_and_files(graph, folder):
    patcher = tiny.tiny("sd15")
    table = NameTable.of(patcher.model)
    loras = [model(lora_on(patcher, seed=seed, options={"rank": 2 + seed})[1]) for seed in range(3)]
    save_tensors(LoraModel(loras[2], {"modelspec.trigger_phrase": "my_cat"}), folder / "style" / "cat.safetensors")
    lora, report, picture = run(
        graph,
        "LoomMergeLoRA",
        {"lora_1": loras[0], "lora_2": loras[1]},
        strengths="0.5\n-0.3",
        files="cat : 0.7",
        precision="float32",
    )
    wanted = [delta(each, table) for each in loras]
    for path, made in delta(lora, table).items():
        total = 0.5 * wanted[0][path] - 0.3 * wanted[1][path] + 0.7 * wanted[2][path]
        torch.testing.assert_close(made, total, rtol=1e-5, atol=1e-6)
    told = metadata_of(lora)
    assert [parent["name"] for parent in told["parents"]][2].endswith("cat.safetensors")
    assert [parent["strength"] for parent in told["parents"][:2]] == ["0.5", "-0.3"]
    assert lora.metadata["modelspec.trigger_phrase"] == "my_cat"
    assert "the LoRA at lora_1 at 0.5" in report and "all of the energy retained" in report
    assert picture.shape[0] == 1 and picture.shape[3] == 3
    assert not any(tensor.is_inference() for tensor in lora.values())


def test_components_and_blocks_are_baked_in(graph):
    patcher, clip = tiny.tiny("sdxl", inference=True), tiny.tiny_dual_clip(inference=True)
    table = NameTable.of(patcher.model)
    text = NameTable.of(clip.cond_stage_model)
    adapters, _ = lora_on(patcher, every=2)
    encoders = {}
    for number, path in enumerate(path for path in text.text.paths if path.endswith("q_proj")):
        shape = text.shapes[path]
        encoders[path] = random_adapter("LoRA", shape, {}, torch.zeros(shape), number)
    both = NameTable(table.shapes | text.shapes)
    given = model(to_tensors(LoRAFile(adapters | encoders, names=both)))
    strength = "0.5:te1=0.2:clip_g=0:blocks=in=0;out/attn=2"
    lora, report, _ = run(
        graph,
        "LoomMergeLoRA",
        {"lora_1": given, "model": patcher, "clip": clip},
        strengths=strength,
        precision="float32",
    )
    by_hand = Strengths(fixed(0.5), fixed(0.5), {"te1": fixed(0.4), "clip_g": fixed(0.0)}, "in=0\nout/attn=2")
    wanted, wanted_clip, _ = apply_lora(patcher, clip, given, by_hand, FUSE)
    got, got_clip, _ = apply_lora(patcher, clip, lora, Strengths(), FUSE)
    assert relative(sampled(got, "sdxl"), sampled(wanted, "sdxl")) < 1e-5
    text = got_clip.tokenize("a cat")
    assert relative(got_clip.encode_from_tokens(text), wanted_clip.encode_from_tokens(text)) < 1e-5
    assert set(path for path in read_lora(lora, both).adapters if path.startswith("clip_g")) == set()
    assert "te1=0.2" in report


@pytest.mark.parametrize("method", ["sum", "ties", "dare", "dare_ties", "prune"])
def test_every_method_cuts_to_the_rank(graph, method):
    patcher = tiny.tiny("sd15")
    loras = {f"lora_{n}": model(lora_on(patcher, seed=9 * n, every=9)[1]) for n in (1, 2)}
    lora, report, _ = run(graph, "LoomMergeLoRA", loras, method=method, rank=4, density=0.7)
    ranks = {adapter.rank for adapter in read_lora(lora, NameTable.of(patcher.model)).adapters.values()}
    assert max(ranks) <= 4 and "% of the energy retained" in report
    told = metadata_of(lora)["options"]
    assert told["method"] == method and told["rank"] == 4


def test_files_in_different_dialects_meet_by_the_model(graph):
    patcher = tiny.tiny("flux")
    table = NameTable.of(patcher.model)
    (one, native), (two, _) = lora_on(patcher, seed=1), lora_on(patcher, seed=2)
    theirs = to_tensors(LoRAFile(two, names=table), "diffusers")
    links = {"lora_1": model(native), "lora_2": theirs}
    with pytest.raises(GraphError, match="give the model"):
        run(graph, "LoomMergeLoRA", links)
    lora, _, _ = run(graph, "LoomMergeLoRA", links | {"model": patcher}, precision="float32")
    for path, made in delta(lora, table).items():
        torch.testing.assert_close(made, one[path].delta() + two[path].delta(), rtol=1e-4, atol=1e-5)


def test_what_depends_on_the_weights_needs_the_model(graph):
    patcher = tiny.tiny("sd15")
    lora = model(lora_on(patcher, "LoRA", {"dora": "output"}, every=9)[1])
    with pytest.raises(GraphError, match="depends on the weight.*give the model"):
        run(graph, "LoomMergeLoRA", {"lora_1": lora}, strengths="0.5")
    made, _, _ = run(graph, "LoomMergeLoRA", {"lora_1": lora, "model": patcher}, strengths="0.5", precision="float32")
    wanted, _, _ = apply_lora(patcher, None, lora, Strengths.of(0.5), FUSE)
    got, _, _ = apply_lora(patcher, None, made, Strengths(), FUSE)
    assert relative(sampled(got, "sd15"), sampled(wanted, "sd15")) < 1e-5


@pytest.mark.parametrize(
    "widgets, message",
    [
        ({}, "there is no LoRA to merge"),
        ({"files": "nobody"}, "files: nobody: there is no LoRA 'nobody'"),
        ({"files": "<lora:cat:0.5> and more"}, "files: 'and more' stands beside the tags"),
        ({"files": "cat:0.5@1,1@5"}, "changes over the run"),
        ({"files": "cat:0.5:steps=1@1,0@5"}, "steps: .* changes over the run, which a file cannot do"),
        ({"files": "cat:in=0"}, "cat.*blocks need the model"),
        ({"files": "cat:high"}, "high has no effect"),
        ({"strengths": "1\n1"}, "strengths: 2 lines for 0 connected"),
        ({"files": "cat", "rank": 4}, "rank and energy: concat keeps all ranks"),
        ({"files": "cat", "method": "sum"}, "sum makes as many ranks as it likes; set one of them"),
        ({"files": "cat\n" * 65}, "files: 65 lines, expected at most 64"),
    ],
)
def test_what_merge_refuses(graph, folder, widgets, message):
    save_tensors(lora_on(tiny.tiny("sd15"), every=20)[1], folder / "cat.safetensors")
    with pytest.raises(GraphError, match=message):
        run(graph, "LoomMergeLoRA", **widgets)


def test_text_encoders_are_not_lost_without_being_told(graph):
    patcher, clip = tiny.tiny("sd15"), tiny.tiny_clip()
    text = NameTable.of(clip.cond_stage_model)
    path = next(path for path in text.text.paths if path.endswith("q_proj"))
    adapter = random_adapter("LoRA", text.shapes[path], {}, torch.zeros(text.shapes[path]), 0)
    both = NameTable(NameTable.of(patcher.model).shapes | text.shapes)
    given = model(to_tensors(LoRAFile(lora_on(patcher, every=9)[0] | {path: adapter}, names=both)))
    with pytest.raises(GraphError, match="for text encoders .*connect the CLIP, or give it te=0"):
        run(graph, "LoomMergeLoRA", {"lora_1": given, "model": patcher})
    lora, report, _ = run(graph, "LoomMergeLoRA", {"lora_1": given, "model": patcher}, strengths="1:te=0")
    assert "3 keys found no place" in report
    lora, _, _ = run(graph, "LoomMergeLoRA", {"lora_1": given}, strengths="1:te1=0.5", precision="float32")
    torch.testing.assert_close(read_lora(lora, both).adapters[path].delta(), 0.5 * adapter.delta())


def test_options_without_effect_are_told(graph):
    lora = model(lora_on(tiny.tiny("sd15"), every=20)[1])
    _, report, _ = run(graph, "LoomMergeLoRA", {"lora_1": lora}, density=0.2, seed=3, majority="frequency")
    assert all(f"{name}: no effect with concat" in report for name in ("density", "seed", "majority"))


def test_files_that_change_are_read_again(graph, folder):
    patcher = tiny.tiny("sd15")
    for seed in (1, 2):
        save_tensors(lora_on(patcher, seed=seed, every=20)[1], folder / "cat.safetensors")
        lora, _, _ = run(graph, "LoomMergeLoRA", files="cat", precision="float32")
        (path, wanted), *_ = lora_on(patcher, seed=seed, every=20)[0].items()
        torch.testing.assert_close(delta(lora, NameTable.of(patcher.model))[path], wanted.delta())


@pytest.mark.parametrize("junk", [None, 3, ["a", 0], "x" * 10**6, "<lora:", "a\n" * 500, "\ud800", ""])
def test_fingerprints_never_raise(junk):
    assert isinstance(LoomMergeLoRA.fingerprint_inputs(files=junk), str)
    assert isinstance(LoomInspectLoRA.fingerprint_inputs(lora_name=junk), str)


# -- extract


def test_extracting_what_is_applied_gives_it_back(graph):
    patcher, clip = tiny.tiny("sd15", inference=True), tiny.tiny_clip(inference=True)
    both = NameTable(NameTable.of(patcher.model).shapes | NameTable.of(clip.cond_stage_model).shapes)
    text = [path for path in NameTable.of(clip.cond_stage_model).text.paths if path.endswith("fc1")]
    adapters = lora_on(patcher, every=2)[0]
    adapters |= {path: random_adapter("LoRA", both.shapes[path], {}, torch.zeros(1), 7) for path in text}
    given = model(to_tensors(LoRAFile(adapters, names=both)))
    for engine in (FUSE, BRANCH):
        tuned, tuned_clip, _ = apply_lora(patcher, clip, given, Strengths.of(0.8, 0.8), engine)
        links = {"model_tuned": tuned, "model_base": patcher, "clip_tuned": tuned_clip, "clip_base": clip}
        lora, report, picture = run(graph, "LoomExtractLoRA", links, energy=0.999999)
        found = read_lora(lora, both)
        assert found.adapters.keys() == adapters.keys() and not found.unplaced
        for path, adapter in adapters.items():
            assert relative(found.adapters[path].delta(), 0.8 * adapter.delta()) < 1e-3, path
    assert picture.ndim == 4 and lora.metadata["ss_base_model_version"] == "sd_v1"
    assert metadata_of(lora)["tool"] == "extract"


def test_another_checkpoint_by_budget(graph):
    base, tuned = tiny.tiny("flux"), tiny.tiny("flux")
    with torch.no_grad():
        for name, weight in tuned.model.named_parameters():
            draws = torch.Generator().manual_seed(len(name))
            weight += 0.01 * torch.randn(weight.shape, generator=draws)
    links = {"model_tuned": tuned, "model_base": base}
    energies = []
    for widgets in ({"rank": 4}, {"rank": 0, "average_rank": 4.0}, {"rank": 0, "megabytes": 0.1}):
        lora, report, _ = run(graph, "LoomExtractLoRA", links, **widgets)
        energies.append(metadata_of(lora)["energy"])
    assert energies[1] > energies[0]
    assert sum(tensor.nbytes for tensor in lora.values()) <= 100_000
    with pytest.raises(GraphError, match="average_rank: goes without rank"):
        run(graph, "LoomExtractLoRA", links, rank=4, average_rank=4.0)
    with pytest.raises(GraphError, match="how large it becomes is not said"):
        run(graph, "LoomExtractLoRA", links, rank=0)


def test_one_layer_at_a_time(monkeypatch):
    """Beyond both models: a weight before and after, and its bias."""
    base = tiny.tiny("sd15")
    tuned, _, _ = apply_lora(base, None, lora_on(base)[1], Strengths(), FUSE)
    alive, most = weakref.WeakSet(), []
    make = tools.effective_reader

    def watched(*args):
        read = make(*args)

        def reader(key):
            tensor = read(key)
            alive.add(tensor)
            most.append(len(alive))
            return tensor

        return reader

    monkeypatch.setattr(tools, "effective_reader", watched)
    tools.extract_lora(tuned, base, None, None, Cut(rank=2), 0.0, None, True, "float32")
    assert len(most) > 200 and max(most) <= 4


def test_what_extract_refuses(graph):
    base, clip = tiny.tiny("sd15"), tiny.tiny_clip()
    with pytest.raises(GraphError, match="same in both models"):
        run(graph, "LoomExtractLoRA", {"model_tuned": base, "model_base": base})
    with pytest.raises(GraphError, match="different architectures"):
        run(graph, "LoomExtractLoRA", {"model_tuned": tiny.tiny("flux"), "model_base": base})
    with pytest.raises(GraphError, match="clip_base is not connected"):
        run(graph, "LoomExtractLoRA", {"model_tuned": base, "model_base": base, "clip_tuned": clip})


def test_convolutions_can_be_left_out(graph):
    base = tiny.tiny("sd15")
    tuned, _, _ = apply_lora(base, None, lora_on(base)[1], Strengths(), FUSE)
    lora, report, _ = run(graph, "LoomExtractLoRA", {"model_tuned": tuned, "model_base": base}, conv=False)
    shapes = NameTable.of(base.model).shapes
    assert all(max(shapes[path][2:], default=1) == 1 for path in read_lora(lora, NameTable.of(base.model)).adapters)
    assert "conv is off" in report


@pytest.mark.parametrize("kind", ["LoomExtractLoRA", "LoomMergeLoRA", "LoomResizeLoRA", "LoomBakeApplied"])
def test_a_tool_stops_when_asked(graph, kind, monkeypatch):
    base = tiny.tiny("sd15")
    lora = model(lora_on(base, every=2)[1])
    tuned, _, _ = apply_lora(base, None, lora, Strengths(), FUSE)
    asked = []

    def interrupt():
        asked.append(1)
        if len(asked) > 3:
            comfy.model_management.interrupt_current_processing()
        real()

    real = comfy.model_management.throw_exception_if_processing_interrupted
    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        if kind == "LoomExtractLoRA":
            LoomExtractLoRA.execute(tuned, base, **WIDGETS[kind])
        elif kind == "LoomMergeLoRA":
            LoomMergeLoRA.execute(**WIDGETS[kind] | {"method": "sum", "rank": 2}, lora_1=lora)
        elif kind == "LoomResizeLoRA":
            LoomResizeLoRA.execute(lora, **WIDGETS[kind])
        else:
            LoomBakeApplied.execute(tuned, **WIDGETS[kind])
    assert len(asked) == 4


# -- resize, convert


def test_resize(graph):
    patcher = tiny.tiny("sd15")
    given = model(lora_on(patcher, options={"rank": 6})[1], ss_output_name="cat")
    lora, report, _ = run(graph, "LoomResizeLoRA", {"lora": given, "model": patcher}, rank=2, precision="float32")
    table = NameTable.of(patcher.model)
    for path, wanted in delta(given, table).items():
        u, s, v = torch.linalg.svd(wanted.flatten(1).double(), full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        made = delta(lora, table)[path].flatten(1)
        assert relative(made, best) < 1e-4, path
    assert "input.0: " in report and "output.3: " in report
    assert metadata_of(lora)["parents"][0]["name"] == "cat" and lora.metadata["ss_network_dim"] == "2"


@pytest.mark.parametrize("dialect", ["kohya", "lycoris", "diffusers", "native"])
def test_convert_to_a_dialect(graph, dialect, folder):
    patcher = tiny.tiny("flux")
    table = NameTable.of(patcher.model)
    adapters, tensors = lora_on(patcher, options={"rank": 2}, conv=False, preset="attention")
    lora, _, _ = run(
        graph, "LoomConvertLoRA", {"lora": model(tensors), "model": patcher}, dialect=dialect, precision="float16"
    )
    assert lora.metadata["loom.dialect"] == dialect
    assert {tensor.dtype for key, tensor in lora.items() if not key.endswith("alpha")} == {torch.float16}
    for path, made in delta(lora, table).items():
        assert relative(made, adapters[path].delta()) < 2e-3
    Given.things = {"lora": lora}
    prompt = {
        "in": node("Given", name="lora"),
        "tool": node("LoomSaveLoRA", lora=["in", 0], name="kept", if_file_exists="number"),
        "name": node("Keep", value=["tool", 0]),
    }
    first, second = (graph.run(prompt)["name"] for _ in range(2))
    assert (first, second) == ("kept.safetensors", "kept-2.safetensors")  # nothing is overwritten
    assert load_tensors(folder / first).keys() == lora.keys()


def test_convert_without_a_model_keeps_the_names(graph):
    patcher = tiny.tiny("flux")
    adapters, _ = lora_on(patcher, conv=False, preset="attention")
    theirs = to_tensors(LoRAFile(adapters, names=NameTable.of(patcher.model)), "diffusers")
    lora, _, _ = run(graph, "LoomConvertLoRA", {"lora": theirs}, precision="bfloat16")
    assert lora.keys() == theirs.keys() and {tensor.dtype for tensor in lora.values()} == {torch.bfloat16}
    with pytest.raises(GraphError, match="connect the MODEL"):
        run(graph, "LoomConvertLoRA", {"lora": theirs}, dialect="kohya")


@pytest.mark.parametrize("family, options", [("LoKr", {"factor": 4}), ("OFT", {}), ("LoRA", {"dora": "output"})])
def test_convert_to_plain(graph, family, options):
    patcher = tiny.tiny("sd15")
    given = model(lora_on(patcher, family, options, every=8, size=0.3)[1])
    lora, report, _ = run(
        graph, "LoomConvertLoRA", {"lora": given, "model": patcher}, plain=True, energy=1.0, precision="float32"
    )
    assert all(key.endswith(("lora_up.weight", "lora_down.weight", "alpha")) for key in lora)
    wanted, _, _ = apply_lora(patcher, None, given, Strengths(), FUSE)
    got, _, _ = apply_lora(patcher, None, lora, Strengths(), FUSE)
    change = sampled(wanted, "sd15") - sampled(patcher, "sd15")
    assert relative(sampled(got, "sd15") - sampled(patcher, "sd15"), change) < 1e-3
    _, idle, _ = run(graph, "LoomConvertLoRA", {"lora": given, "model": patcher}, energy=0.5)
    assert "no effect, since plain is off" in idle


# -- the schemas


@pytest.mark.parametrize("kind", WIDGETS)
def test_every_widget_is_explained_and_there_is_a_help_page(kind):
    found = next(node for node in NODES if node.GET_SCHEMA().node_id == kind)
    schema = found.GET_SCHEMA()
    assert all(part.tooltip for part in (*schema.inputs, *schema.outputs)) and schema.description
    page = (Path(__file__).parents[2] / "web/docs" / f"{kind}.md").read_text(encoding="utf-8")
    for part in schema.inputs:
        named = "lora_1" if part.id.startswith("lora_") and part.id[5:].isdecimal() else part.id
        assert f"**{named}**" in page, part.id
    sockets = {part.id for part in schema.inputs if part.io_type in ("MODEL", "CLIP", "LORA_MODEL")}
    assert set(WIDGETS[kind]) == {part.id for part in schema.inputs} - sockets


# -- inspect


def test_inspect_shows_text_json_and_a_picture(graph, folder):
    patcher, clip = tiny.tiny("sd15"), tiny.tiny_clip()
    save_tensors(LoraModel(lora_on(patcher)[1], {"modelspec.trigger_phrase": "my_cat"}), folder / "cat.safetensors")
    text, told, picture = run(graph, "LoomInspectLoRA", lora_name="cat.safetensors")
    assert text.startswith("cat.safetensors · ") and "trigger words: my_cat" in text
    found = json.loads(told)
    assert found["families"] == {"LoRA": 119} and found["ranks"] == {"3": 119}
    assert len(found["blocks"]) == 10 and picture.shape[0] == 1 and picture.std() > 0
    with_model, _, _ = run(graph, "LoomInspectLoRA", {"model": patcher, "clip": clip}, lora_name="cat.safetensors")
    assert "‖ΔW‖ by blocks" in with_model
    out = LoomInspectLoRA.execute("cat.safetensors")
    assert out.ui["text"] == [text] and out.ui["images"]
    other, _, _ = run(graph, "LoomInspectLoRA", {"lora": model(lora_on(patcher, "LoKr", every=9)[1])})
    assert other.startswith("the connected LoRA · ") and "LoKr" in other
    with pytest.raises(GraphError, match="lora_name: choose a file"):
        run(graph, "LoomInspectLoRA")


def test_inspect_measures_what_depends_on_the_weights_with_the_model(graph):
    patcher = tiny.tiny("sd15")
    links = {"lora": model(lora_on(patcher, "OFT", every=9)[1])}
    without, _, _ = run(graph, "LoomInspectLoRA", links)
    given, told, _ = run(graph, "LoomInspectLoRA", links | {"model": patcher})
    assert "was not measured" in without and "was not measured" not in given
    assert all(row["norm"] for row in json.loads(told)["blocks"] if row["layers"])
