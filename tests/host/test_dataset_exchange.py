"""Datasets out into the graph and back: pixels, masks and captions by id, and nothing else."""

import json

import comfy.model_management
import numpy as np
import pytest
from PIL import Image

from dataset_graph import KeepLists, dataset_graph, loader, put, settings, stored, trained
from graph import GraphError, node, training_prompt
from lora_loom.host.exchange import images_and_masks


@pytest.fixture
def graph(places):
    return dataset_graph()


def out_and_back(middle, **ends):
    """Loader, a node on the images, and back; ``middle`` takes the images' link."""
    return {
        "1": loader("zorb"),
        "2": node("LoomDatasetToGraph", dataset=["1", 0], filter="", limit=0),
        "3": middle(["2", 0]),
        "4": node("LoomDatasetUpdate", dataset=["1", 0], ids=["2", 3], images=["3", 0], **ends),
        "5": node("Keep", value=["4", 0]),
    }


def test_changed_pixels_come_back_exactly(graph, places):
    folder = put(places, "zorb")
    inverted = graph.run(out_and_back(lambda link: node("ImageInvert", image=link)))["5"]
    for name, pixels in stored(folder).items():
        assert np.array_equal(trained(inverted, name), 1 - pixels), name

    scale = {"upscale_method": "nearest-exact", "width": 128, "height": 128, "crop": "disabled"}
    enlarged = graph.run(out_and_back(lambda link: node("ImageScale", image=link, **scale)))["5"]
    assert {sample.size for sample in enlarged.samples} == {(128, 128)}
    for sample in enlarged.samples:
        expected = stored(folder)[sample.id].repeat(2, 0).repeat(2, 1)
        assert np.array_equal(sample.picture.pixels.numpy(), expected)


def test_training_learns_from_the_changed_pixels(graph, places):
    """Inverted in the graph is the very same training as inverted in the files."""
    folder = put(places, "zorb")
    other = put(places, "other")
    for path in other.glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)

    def losses(name, source):
        prompt = training_prompt("sd15", "zorb", name)
        prompt["2"] = loader(source)
        if name == "graph":
            prompt["a"] = node("LoomDatasetToGraph", dataset=["2", 0], filter="", limit=0)
            prompt["b"] = node("ImageInvert", image=["a", 0])
            prompt["c"] = node("LoomDatasetUpdate", dataset=["2", 0], ids=["a", 3], images=["b", 0])
            prompt["3"]["inputs"]["dataset"] = ["c", 0]
        return graph.run(prompt)["loss_map"]["loss"]

    from_graph, from_files, plain = losses("graph", "zorb"), losses("files", "other"), losses("plain", "zorb")
    assert from_graph == pytest.approx(from_files, rel=1e-5)
    assert from_graph != pytest.approx(plain, rel=1e-3)
    assert len(stored(folder)) == 4


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_ids_never_mix(graph, places, seed):
    folder = put(places, "zorb", count=7)
    prompt = {
        "1": loader("zorb"),
        "2": node("LoomDatasetToGraph", dataset=["1", 0], filter="NOT caption:5", limit=0),
        "3": node("Shuffled", images=["2", 0], captions=["2", 2], ids=["2", 3], seed=seed),
        "4": node("ImageInvert", image=["3", 0]),
        "5": node("StringConcatenate", string_a=["3", 1], string_b="new", delimiter=", "),
        "6": node("LoomDatasetUpdate", dataset=["1", 0], ids=["3", 2], images=["4", 0], captions=["5", 0]),
        "7": node("Keep", value=["6", 0]),
    }
    found = graph.run(prompt)["7"]
    assert [sample.id for sample in found.samples] == [f"{index}.png" for index in range(7)]
    for index, sample in enumerate(found.samples):
        pixels = stored(folder)[sample.id]
        assert np.array_equal(trained(found, sample.id), pixels if index == 5 else 1 - pixels)
        assert sample.caption == f"zorb, number {index}" + ("" if index == 5 else ", new")


def test_what_goes_out(graph, places):
    folder = put(places, "zorb", count=3, square=False)
    picture = Image.open(folder / "0.png").convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    picture.save(folder / "0.png")
    (folder / "masks").mkdir()
    mask = np.random.default_rng(3).integers(0, 255, (96, 64), np.uint8)
    Image.fromarray(mask).save(folder / "masks/1.png")
    prompt = {
        "0": node("LoomImageSettings", **{item.id: item.default for item in settings("LoomImageSettings")}),
        "1": {**loader("zorb"), "inputs": {**loader("zorb")["inputs"], "images": ["0", 0]}},
        "2": node("LoomDatasetToGraph", dataset=["1", 0], filter="", limit=0),
        "3": node("KeepLists", **{name: ["2", n] for n, name in enumerate(("images", "masks", "captions", "ids"))}),
    }
    prompt["0"]["inputs"] |= {"background": "#ff0000", "alpha_mask": True}
    graph.run(prompt, also=("3",))
    kept = KeepLists.kept
    assert kept["ids"] == ["0.png", "1.png", "2.png"]
    assert kept["captions"] == [f"zorb, number {index}" for index in range(3)]
    assert [tuple(image.shape) for image in kept["images"]] == [(1, 64, 64, 3), (1, 96, 64, 3), (1, 64, 64, 3)]
    assert [tuple(mask.shape) for mask in kept["masks"]] == [(1, 64, 64), (1, 96, 64), (1, 64, 64)]
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "#ff0000"), picture).convert("RGB")
    assert np.abs(kept["images"][0][0].numpy() - np.asarray(flat) / 255).max() < 1.01 / 255
    alpha = np.asarray(picture.getchannel("A"), np.float32) / 255
    assert np.allclose(kept["masks"][0][0].numpy(), alpha, atol=1e-6)
    assert np.allclose(kept["masks"][1][0].numpy(), mask / 255, atol=1e-6)
    assert bool((kept["masks"][2] == 1).all())


def test_a_batch_is_taken_apart_and_masks_come_back(graph, places):
    folder = put(places, "zorb", count=3)
    prompt = {
        "1": loader("zorb"),
        "2": node("LoomDatasetToGraph", dataset=["1", 0], filter="", limit=2),
        "3": node("ImageBatch", image1=["a", 0], image2=["b", 0]),
        "a": node("EmptyImage", width=64, height=64, batch_size=1, color=0xFF0000),
        "b": node("EmptyImage", width=64, height=64, batch_size=1, color=0x00FF00),
        "m": node("Keep", value=["2", 1]),
        "4": node("LoomDatasetUpdate", dataset=["1", 0], ids=["2", 3], images=["3", 0], masks=["2", 1]),
        "5": node("Keep", value=["4", 0]),
    }
    found = graph.run(prompt)["5"]
    assert [trained(found, f"{index}.png")[0, 0].tolist() for index in range(2)] == [[1, 0, 0], [0, 1, 0]]
    assert np.array_equal(trained(found, "2.png"), stored(folder)["2.png"])
    assert [sample.mask is not None for sample in found.samples] == [True, True, False]


def test_one_image_for_two_ids_is_an_error_that_says_so(graph, places):
    put(places, "zorb")
    prompt = out_and_back(lambda link: node("EmptyImage", width=64, height=64, batch_size=3, color=0))
    with pytest.raises(GraphError, match="images: 3 given for 4 ids; give one for each id, in the order of the ids"):
        graph.run(prompt)


def test_nothing_selected_is_an_error_with_its_cure(graph, places):
    put(places, "zorb")
    prompt = out_and_back(lambda link: node("ImageInvert", image=link))
    prompt["2"]["inputs"]["filter"] = "tag:unheard"
    with pytest.raises(GraphError, match="filter: no image matches 'tag:unheard'; widen the filter, or bypass"):
        graph.run(prompt)


def test_only_what_is_selected_is_decoded(graph, places):
    """A file that is damaged behind its header hurts only who asks for it."""
    folder = put(places, "zorb")
    data = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(data[:3000] + b"\0" * 500 + data[3500:])
    names = {name: ["2", n] for n, name in enumerate(("images", "masks", "captions", "ids"))}
    prompt = {
        "1": loader("zorb"),
        "2": node("LoomDatasetToGraph", dataset=["1", 0], filter="NOT name:2*", limit=0),
        "3": node("KeepLists", **names),
    }
    graph.run(prompt, also=("3",))
    assert KeepLists.kept["ids"] == ["0.png", "1.png", "3.png"]
    prompt["2"]["inputs"]["filter"] = ""
    with pytest.raises(GraphError, match=r"2\.png cannot be decoded"):
        graph.run(prompt, also=("3",))
    texts = {
        **{"1": prompt["1"], "2": prompt["2"]},
        "4": node("LoomDatasetUpdate", dataset=["1", 0], ids=["2", 3], captions=["2", 2], captions_mode="append"),
        "5": node("Keep", value=["4", 0]),
    }
    texts["2"]["inputs"]["with_images"] = False
    assert len(graph.run(texts)["5"].samples) == 4


def test_findings_reach_the_filter(graph, places):
    folder = put(places, "zorb")
    Image.new("RGB", (24, 24), "red").save(folder / "1.png")
    lint = {"checks": "quick", "thresholds": "", "fixes": "", "style": False, "batch_size": 1}
    prompt = {
        "1": loader("zorb"),
        "l": node("LoomDatasetLint", dataset=["1", 0], **lint, tag_list="none", implications="none"),
        "2": node("LoomDatasetToGraph", dataset=["l", 0], filter="lint:D021", limit=0, findings=["l", 2]),
        "3": node("KeepLists", **{name: ["2", n] for n, name in enumerate(("images", "masks", "captions", "ids"))}),
        "f": node("Keep", value=["l", 2]),
    }
    findings = json.loads(graph.run(prompt, also=("3",))["f"])
    assert KeepLists.kept["ids"] == ["1.png"]
    [found] = [finding for finding in findings if finding["rule"] == "D021"]
    assert found["ids"] == ["1.png"] and found["level"] == "error"
    del prompt["2"]["inputs"]["findings"]  # the node checks by itself
    graph.run(prompt, also=("3",))
    assert KeepLists.kept["ids"] == ["1.png"]
    prompt["2"]["inputs"]["findings"] = '[{"rule": 1}]'
    with pytest.raises(GraphError, match="findings: this is not what Check Dataset gives"):
        graph.run(prompt, also=("3",))


def test_fixes_change_the_dataset_and_no_file(graph, places):
    folder = put(places, "zorb")
    (folder / "1.txt").write_text("hat, zorb, number 1")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    lint = {"checks": "quick", "thresholds": "", "fixes": "T002", "style": False, "batch_size": 1}
    prompt = {
        "1": loader("zorb", trigger="zorb"),
        "2": node("LoomDatasetLint", dataset=["1", 0], **lint, tag_list="none", implications="none"),
        "3": node("Keep", value=["2", 0]),
        "4": node("Keep", value=["2", 1]),
    }
    kept = graph.run(prompt)
    assert kept["3"].samples[1].caption == "zorb, hat, number 1"
    assert "T002" in kept["4"] and "fixed: " in kept["4"]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    prompt["2"]["inputs"]["fixes"] = "T999"
    with pytest.raises(GraphError, match="'T999' is no lint rule"):
        graph.run(prompt)


def test_a_cancelled_node_ends_between_two_pictures(graph, places):
    put(places, "zorb")
    dataset = graph.run({"1": loader("zorb"), "2": node("Keep", value=["1", 0])})["2"]
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        images_and_masks(dataset, range(4), None)
    assert len(images_and_masks(dataset, range(4), None)[0]) == 4
