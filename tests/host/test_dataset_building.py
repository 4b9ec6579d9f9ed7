"""Datasets made, combined, shown and written in the graph; what a changed file runs again; the example workflows."""

import json
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image

import nodes
from dataset_graph import SIZES, dataset_graph, later, loader, put, settings, stored, trained
from graph import Graph, GraphError, clip_for, node
from lora_loom.host.checking import token_counter
from lora_loom.host.exchange import write_text
from lora_loom.host.runs import RunError
from lora_loom.nodes.dataset_exchange import LoomDatasetToTOML
from lora_loom.training.dataset.model import CaptionOptions, GraphPicture
from served import tiny_upscale_model
from ui_workflow import PAGE_ONLY, to_prompt

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"


@pytest.fixture
def graph(places):
    return dataset_graph()


# ---------------------------------------------------------------- what runs again


def test_only_what_depends_on_a_changed_file_runs_again(graph, places):
    cats, dogs = put(places, "cats"), put(places, "dogs")
    (cats / "masks").mkdir()
    Image.new("L", (64, 64), 128).save(cats / "masks/0.png")
    prompt = {
        "cats": loader("cats"),
        "dogs": loader("dogs"),
        "cat sheet": node("LoomContactSheet", dataset=["cats", 0], batch_size=1, limit=9, page=1, columns=3, seed=0),
        "dog sheet": node("LoomContactSheet", dataset=["dogs", 0], batch_size=1, limit=9, page=1, columns=3, seed=0),
        "keep cats": node("Keep", value=["cat sheet", 0]),
        "keep dogs": node("Keep", value=["dog sheet", 0]),
    }
    graph.run(prompt)
    assert graph.ran == set(prompt)
    graph.run(prompt)
    assert graph.ran == set()

    (cats / "0.txt").write_text("another caption")
    graph.run(prompt)
    assert graph.ran == {"cats", "cat sheet", "keep cats"}

    for name in ("readme.md", ".hidden.png", "thumbs.db"):
        (cats / name).write_text("nothing to do with it")
    graph.run(prompt)
    assert graph.ran == set()

    for path in (cats / "1.png", cats / "masks/0.png"):
        later(path)
        graph.run(prompt)
        assert graph.ran == {"cats", "cat sheet", "keep cats"}, path.name

    (dogs / "3.png").unlink()
    graph.run(prompt)
    assert graph.ran == {"dogs", "dog sheet", "keep dogs"}


def test_a_toml_file_and_what_it_names_are_followed(graph, places):
    put(places, "cats")
    put(places, "dogs")
    file = places / "comfy/datasets/both.toml"
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{}"\ncaption_extension = ".txt"\n'
    file.write_text(text.format("cats"))
    prompt = {"1": loader("both.toml"), "2": node("Keep", value=["1", 0])}
    assert len(graph.run(prompt)["2"].samples) == 4
    later(places / "comfy/datasets/dogs/0.png")
    graph.run(prompt)
    assert graph.ran == set()
    later(places / "comfy/datasets/cats/0.txt")
    graph.run(prompt)
    assert graph.ran == {"1", "2"}
    file.write_text(text.format("dogs"))
    found = graph.run(prompt)["2"]
    assert graph.ran == {"1", "2"} and "dogs" in found.samples[0].picture.path


def test_tables_of_tags_are_followed(graph, places):
    put(places, "cats")
    table = places / "comfy/datasets/tags.csv"
    table.write_text('zorb,0,5,""\n')
    lint = node(
        "LoomDatasetLint",
        **{"dataset": ["1", 0], "checks": "quick", "thresholds": "", "fixes": "", "style": False, "batch_size": 1},
        **{"tag_list": "tags.csv", "implications": "none"},
    )
    prompt = {"1": loader("cats"), "2": lint, "3": node("Keep", value=["2", 1])}
    assert "T024" in graph.run(prompt)["3"], "number 1 is no known tag"
    graph.run(prompt)
    assert graph.ran == set()
    table.write_text("".join(f'{tag},0,5,""\n' for tag in ("zorb", *(f"number_{index}" for index in range(4)))))
    assert "T024" not in graph.run(prompt)["3"]
    assert graph.ran == {"2", "3"}


# ---------------------------------------------------------------- made in the graph, and put together


def from_images(count=3, **options):
    default = {item.id: item.default for item in settings("LoomDatasetFromImages") if hasattr(item, "default")}
    return {
        "1": node("EmptyImage", width=64, height=64, batch_size=count, color=0x102030),
        "2": node("LoomDatasetFromImages", images=["1", 0], **default | SIZES | options),
        "3": node("Keep", value=["2", 0]),
        "4": node("Keep", value=["2", 1]),
    }


def test_a_dataset_from_images(graph):
    kept = graph.run(from_images(captions="one\ntwo\nthree", trigger="zorb", repeats=1.5))
    found = kept["3"]
    assert [(sample.id, sample.caption) for sample in found.samples] == [
        *(("image-0001", "one"), ("image-0002", "two"), ("image-0003", "three"))
    ]
    assert all(isinstance(sample.picture, GraphPicture) for sample in found.samples)
    assert np.allclose(trained(found, "image-0002")[0, 0] * 255, [0x10, 0x20, 0x30], atol=1e-3)
    assert found.concepts[0].captions == CaptionOptions(trigger="zorb") and float(found.concepts[0].repeats) == 1.5
    assert kept["4"].startswith("3 images at resolution 64") and "D001" in kept["4"]
    assert [s.caption for s in graph.run(from_images(captions="all alike\n"))["3"].samples] == ["all alike"] * 3
    assert graph.run(from_images(1, captions="two\nlines"))["3"].samples[0].caption == "two\nlines"
    with pytest.raises(GraphError, match="captions: 2 lines for 3 images; write one line for each image, or one"):
        graph.run(from_images(captions="one\ntwo"))


def test_lists_of_images_captions_and_masks(graph, places):
    folder = put(places, "zorb", count=3, square=False)
    prompt = {
        "1": loader("zorb"),
        "2": node("LoomDatasetToGraph", dataset=["1", 0], filter="", limit=0),
        "3": node("LoomDatasetFromImages", images=["2", 0], captions=["2", 2], masks=["2", 1], **SIZES),
        "4": node("Keep", value=["3", 0]),
    }
    found = graph.run(prompt)["4"]
    for sample, (name, pixels) in zip(found.samples, stored(folder).items(), strict=True):
        assert sample.caption == f"zorb, number {name[0]}" and sample.mask is not None
        assert np.array_equal(sample.picture.pixels.numpy(), pixels)


def test_pictures_that_cannot_be_are_named(graph):
    broken = from_images()
    broken["1"] = node("Broken")

    class Broken:
        RETURN_TYPES, FUNCTION, CATEGORY = ("IMAGE",), "make", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

        def make(self):
            return (torch.full((1, 8, 8, 3), torch.nan),)

    Graph.register("Broken", Broken)
    with pytest.raises(GraphError, match="images: that of image-0001 has values that are not finite"):
        graph.run(broken)


def test_combined_concepts_are_shown_equally_often(graph, places):
    for name, count in (("many", 6), ("few", 2), ("class", 3)):
        put(places, name, count)
    concept = {item.id: item.default for item in settings("LoomConceptSettings")} | {"kind": "regularisation"}
    prompt = {
        "1": loader("many"),
        "2": loader("few"),
        "k": {"class_type": "LoomConceptSettings", "inputs": concept},
        "3": {**loader("class"), "inputs": {**loader("class")["inputs"], "concept": ["k", 0]}},
        "4": node(
            "LoomCombineDatasets",
            **{"dataset_1": ["1", 0], "dataset_2": ["2", 0], "dataset_3": ["3", 0], "balance": "equal presentations"},
        ),
        "5": node("Keep", value=["4", 0]),
        "6": node("Keep", value=["4", 1]),
    }
    kept = graph.run(prompt)
    found, report = kept["5"], kept["6"].splitlines()
    assert [float(concept.repeats) for concept in found.concepts] == [1, 3, 1]
    assert len({sample.id for sample in found.samples}) == 11
    assert "many: 6 images × 1 = 6 presentations per epoch (25%)" in report
    assert "few: 2 images × 3 = 6 presentations per epoch (25%)" in report
    assert "class (regularisation): 3 images × 4 = 12 presentations per epoch (50%)" in report
    prompt["4"]["inputs"]["balance"] = "as given"
    assert "few: 2 images × 1 = 2 presentations per epoch (12%)" in graph.run(prompt)["6"].splitlines()
    prompt["4"]["inputs"]["balance"] = "fair"
    with pytest.raises(GraphError, match="balance: 'fair' is unknown; choose one of as given, equal presentations"):
        graph.run(prompt)


# ---------------------------------------------------------------- counted, shown, written


def test_tokens_are_counted_as_the_tokenizer_does():
    for family in ("sd15", "sdxl"):
        clip = clip_for(family)
        count = token_counter(clip)
        tokenizer = clip.tokenizer.clip_l.tokenizer
        for text in ("", "a cat", "zorb, number 1", "word " * 74, "word " * 75, "word " * 200, "ünï çödé " * 30):
            assert count(text) == len(tokenizer(text)["input_ids"]) - 2, text[:20]
    assert token_counter(None) is None


def test_the_sheet_in_the_graph_is_an_image(graph, places):
    put(places, "zorb", count=5)
    prompt = {
        "1": loader("zorb"),
        "2": node("LoomContactSheet", dataset=["1", 0], batch_size=2, limit=4, page=2, columns=2, seed=1),
        "3": node("Keep", value=["2", 0]),
    }
    sheet = graph.run(prompt)["3"]
    assert sheet.ndim == 4 and sheet.shape[0] == 1 and sheet.shape[3] == 3
    prompt["2"]["inputs"]["page"] = 3
    with pytest.raises(GraphError, match="page is 3, expected 1 to 2 with a limit of 4"):
        graph.run(prompt)


def test_toml_is_saved_only_when_asked_and_never_over_another(graph, places):
    put(places, "zorb")
    output = Path(folder_paths.get_output_directory())
    prompt = {
        "1": loader("zorb"),
        "2": node("LoomDatasetToTOML", dataset=["1", 0], save=False, name="set"),
        "3": node("Keep", value=["2", 0]),
        "4": node("Keep", value=["2", 1]),
    }
    kept = graph.run(prompt)
    assert kept["4"] == "" and "[[datasets.subsets]]" in kept["3"] and not output.exists()
    prompt["2"]["inputs"]["save"] = True
    assert graph.run(prompt)["4"] == "set.toml" and (output / "set.toml").read_text() == kept["3"]
    (output / "set.toml").write_text("mine")
    prompt["1"]["inputs"]["repeats"] = 3.0
    assert graph.run(prompt)["4"] == "set-2.toml"
    assert (output / "set.toml").read_text() == "mine"
    assert write_text((output / "set-2.toml").read_text(), "set", ".toml").name == "set-2.toml", "nothing twice"
    assert sorted(path.name for path in output.iterdir()) == ["set-2.toml", "set.toml"], "nothing aside is left"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "a\\b", "C:x", "nul", "a\0b", "", ".hidden", "x" * 200, "~"])
def test_a_name_is_a_plain_file_name(places, name):
    with pytest.raises(RunError, match="^name is "):
        write_text("x", name, ".toml")
    assert not Path(folder_paths.get_output_directory()).joinpath("x.toml").exists()
    assert LoomDatasetToTOML.GET_SCHEMA().is_output_node


# ---------------------------------------------------------------- the example workflows


def core_info(prompt_types):
    """What the server would tell of these nodes."""
    found = {}
    for kind in prompt_types:
        cls = nodes.NODE_CLASS_MAPPINGS[kind]
        found[kind] = {"input": cls.INPUT_TYPES()}
    return found


def example(name, places):
    """The workflow as the page would send it, with its pictures as Keep nodes."""
    workflow = json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    types = {entry["type"] for entry in workflow["nodes"]} - PAGE_ONLY
    prompt = to_prompt(workflow, core_info(types))
    for entry in prompt.values():
        if entry["class_type"] in ("PreviewImage", "PreviewAny"):
            entry["inputs"] = {"value": next(iter(entry["inputs"].values()))}
            entry["class_type"] = "Keep"
    return prompt


def test_the_upscale_workflow(graph, places):
    """Small pictures are enlarged by the upscale model, others stay; the sheet shows the result."""
    folder = put(places, "zorb", count=4)
    for index in (1, 2):
        Image.open(folder / f"{index}.png").resize((40, 40)).save(folder / f"{index}.png")
    models = places / "models"
    tiny_upscale_model(models / "RealESRGAN_x2plus.pth")
    folder_paths.add_model_folder_path("upscale_models", str(models), is_default=True)
    prompt = example("upscale_small_images", places)
    [update] = [key for key, entry in prompt.items() if entry["class_type"] == "LoomDatasetUpdate"]
    [to_graph] = [entry for entry in prompt.values() if entry["class_type"] == "LoomDatasetToGraph"]
    to_graph["inputs"]["filter"] = "lint:D021"  # what is noise by itself is not sharp to any measure
    found = graph.run(prompt | {"result": node("Keep", value=[update, 0])})["result"]
    sizes = {sample.id: sample.size for sample in found.samples}
    assert sizes == {"0.png": (64, 64), "1.png": (80, 80), "2.png": (80, 80), "3.png": (64, 64)}
    for name in ("1.png", "2.png"):
        [sample] = [sample for sample in found.samples if sample.id == name]
        expected = stored(folder)[name].repeat(2, 0).repeat(2, 1)  # the tiny model repeats pixels
        assert np.allclose(sample.picture.pixels.numpy(), expected, atol=1e-5)


def test_the_caption_workflow(graph, places):
    folder = put(places, "zorb", count=3)
    for index, colour in enumerate(("white", "red")):
        (folder / f"{index}.txt").write_text(f"a zorb on a {colour} background")
    prompt = example("edit_captions", places)
    [update] = [key for key, entry in prompt.items() if entry["class_type"] == "LoomDatasetUpdate"]
    found = graph.run(prompt | {"result": node("Keep", value=[update, 0])})["result"]
    assert [sample.caption for sample in found.samples] == [
        *("my style, a zorb", "my style, a zorb", "my style, zorb, number 2")
    ]
    assert (folder / "0.txt").read_text() == "a zorb on a white background"
