"""The dataset node and its folders in the real host."""

import math
import os
from pathlib import Path

import pytest
from comfy_api.latest import io
from PIL import Image

from lora_loom.host import folders
from lora_loom.nodes import compat, dataset
from lora_loom.nodes.compat import build
from lora_loom.nodes.dataset import NO_FOLDER, LoomDatasetLoader
from lora_loom.training.dataset.batches import place
from lora_loom.training.dataset.model import DatasetError
from lora_loom.training.dataset.pixels import load as load_pixels


def put(path: Path, caption: str | None = "a cat"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (96, 72), "green").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def load(root="datasets", folder="cats", resolution=64, bucket_step=8, **options):
    return LoomDatasetLoader.execute(root, folder, resolution, bucket_step, **options).result


def fingerprint(root="datasets", folder="cats"):
    return LoomDatasetLoader.fingerprint_inputs(root=root, folder=folder, resolution=64, bucket_step=8)


# ---------------------------------------------------------------- the node


def test_the_schema_is_the_public_contract(places):
    put(places / "comfy/datasets/cats/a.png")
    schema = LoomDatasetLoader.GET_SCHEMA()
    schema.validate()
    assert (schema.node_id, schema.display_name, schema.category) == (
        "LoomDatasetLoader",
        "Dataset Loader",
        "LoRA Loom",
    )
    first, added = ["root", "folder", "resolution", "bucket_step"], schema.inputs[4:]
    assert [item.id for item in schema.inputs[:4]] == first
    assert [item.id for item in added] == [
        *("more_resolutions", "repeats", "trigger", "if_unreadable", "subfolders", "lint"),
        *("captions", "images", "concept"),
    ]
    assert all(item.optional for item in added), "workflows saved with four widgets still load"
    assert [item.default for item in added[:6]] == ["", 1.0, "", "error", "10_name sets repeats", "quick"]
    assert [(item.id, item.io_type) for item in schema.outputs] == [("dataset", "LOOM_DATASET"), ("report", "STRING")]
    assert all(item.tooltip for item in (*schema.inputs, *schema.outputs)) and schema.description
    root, folder, resolution, step = schema.inputs[:4]
    assert (root.options, root.default, folder.options) == (["datasets", "input"], "datasets", ["cats"])
    assert (resolution.default, resolution.min, resolution.max, resolution.step) == (512, 16, 4096, 8)
    assert (step.default, step.min, step.max, step.step) == (64, 8, 256, 8)


def test_the_host_lists_the_node_and_renews_its_choices(places):
    def choices():
        kind, options = LoomDatasetLoader.INPUT_TYPES()["required"]["folder"]
        return kind if isinstance(kind, list) else options["options"]

    assert choices() == [NO_FOLDER]
    put(places / "comfy/datasets/cats/a.png")
    put(places / "elsewhere/sets/dogs/a.png")
    put(places / "comfy/input/deep/er/a.png")
    assert choices() == ["cats", "deep", "deep/er", "dogs"]
    assert LoomDatasetLoader.GET_NODE_INFO_V1()["output"] == ["LOOM_DATASET", "STRING"]


@pytest.mark.parametrize(
    "root, root_place", [("datasets", "comfy/datasets"), ("datasets", "elsewhere/sets"), ("input", "comfy/input")]
)
def test_it_loads_a_folder_of_each_root(places, root, root_place):
    put(places / root_place / "cats/a.png")
    put(places / root_place / "cats/b/ü.jpg", "two\n")
    found, report = load(root)
    assert [(sample.id, sample.caption) for sample in found.samples] == [("a.png", "a cat"), ("b/ü.jpg", "two")]
    assert found.source == os.path.realpath(places / root_place / "cats")
    assert load_pixels(found, place(found)[0], 0, 0).image.shape == (56, 72, 3)
    assert report.splitlines()[:2] == ["2 images at resolution 64", "1 bucket (72×56: 2)"]
    assert len(load(root, "cats/b")[0].samples) == 1


def test_images_in_the_root_itself(places):
    put(places / "comfy/datasets/a.png")
    put(places / "comfy/datasets/cats/a.png")
    assert folders.list_sources("datasets") == ("cats", ".")
    assert [sample.id for sample in load("datasets", ".")[0].samples] == ["a.png", "cats/a.png"]


def test_one_name_in_two_paths_of_a_root(places):
    put(places / "comfy/datasets/cats/a.png")
    (places / "elsewhere/sets/cats").mkdir()
    assert load()[0].source == os.path.realpath(places / "comfy/datasets/cats"), "the other one has no images"
    put(places / "elsewhere/sets/cats/b.png")
    with pytest.raises(DatasetError, match=r"^folder: 'cats' is in .*sets and in .*datasets; rename one of the two$"):
        load()


def test_faults_of_the_dataset_are_named(places):
    put(places / "comfy/datasets/cats/a.png", caption=None)
    with pytest.raises(DatasetError, match=r"1 image of 1 without a caption: a\.png; .* e\.g\. a\.txt"):
        load()
    with pytest.raises(DatasetError, match=r"resolution is \(64, 64\), expected at least bucket_step \(128\)"):
        load(bucket_step=128)


# ---------------------------------------------------------------- fingerprint


def test_the_fingerprint_follows_the_files(places):
    image = places / "comfy/datasets/cats/a.png"
    put(image)
    first = fingerprint()
    assert fingerprint() == first
    image.with_suffix(".txt").write_text("a cat, sitting")
    second = fingerprint()
    put(image.with_name("b.png"))
    third = fingerprint()
    image.unlink()
    assert len({first, second, third, fingerprint()}) == 4


@pytest.mark.parametrize("folder", ["../..", "/etc", "no such", "a\0b", "\ud800", "x" * 5000, 5, ["cats"], {"a": 1}])
def test_the_fingerprint_never_raises_and_reads_nothing_outside(places, folder, monkeypatch):
    monkeypatch.setattr(dataset, "dataset_state", lambda path, access: pytest.fail(f"{path} was opened"))
    assert fingerprint(folder=folder).startswith("folder: ")
    assert fingerprint(root=folder).startswith("root: ")


def test_linked_widgets_always_run_again(places):
    assert math.isnan(fingerprint(folder=None)) and math.isnan(LoomDatasetLoader.fingerprint_inputs())


def test_a_folder_that_vanishes_changes_the_fingerprint(places):
    put(places / "comfy/datasets/cats/a.png")
    before = fingerprint()
    (places / "comfy/datasets/cats").rename(places / "comfy/datasets/gone")
    assert fingerprint() != before


# ---------------------------------------------------------------- containment


@pytest.mark.parametrize(
    "folder",
    [
        "..",
        "../x",
        "cats/../../x",
        "cats/..",
        "..\\x",
        "{secret}",
        "//etc",
        "\\\\host",
        "C:\\x",
        "C:x",
        "a\0b",
        "\udc80",
    ],
)
def test_nothing_outside_a_root_can_be_named(places, folder):
    put(places / "comfy/secret/a.png")
    put(places / "comfy/datasets/cats/a.png")
    name = folder.format(secret=places / "comfy/secret")
    with pytest.raises(DatasetError, match=r"^folder: .* is no folder or dataset file below a root; .* datasets/cats"):
        load("datasets", name)


@pytest.mark.parametrize("root", ["", "output", "datasets/cats", "..", None, 3, ["datasets"]])
def test_only_registered_roots_can_be_named(places, root):
    with pytest.raises(DatasetError, match=r"^root: .* is unknown; choose one of datasets, input"):
        load(root, "cats")


def test_links_that_lead_outside_are_refused_and_not_listed(places):
    put(places / "secret/a.png")
    put(places / "comfy/input/dogs/a.png")
    (places / "comfy/datasets/cats").symlink_to(places / "secret")
    (places / "comfy/datasets/dogs").symlink_to(places / "comfy/input/dogs")
    (places / "comfy/datasets/dogs/loop").symlink_to(places / "comfy/datasets")
    assert folders.list_sources("datasets") == ("dogs",)
    assert len(load(folder="dogs")[0].samples) == 1
    with pytest.raises(DatasetError, match=r"^folder: 'cats' is a link that leads outside .* extra_model_paths\.yaml"):
        load(folder="cats")


def test_a_name_that_begins_like_a_root_is_outside(places):
    put(places / "comfy/datasets-private/a.png")
    (places / "comfy/datasets/x").symlink_to(places / "comfy/datasets-private")
    with pytest.raises(DatasetError, match="leads outside"):
        load(folder="x")


def test_linked_files_are_read_only_from_registered_folders(places):
    put(places / "comfy/datasets/cats/a.png")
    put(places / "comfy/input/b.png")
    for kind in ("png", "txt"):
        (places / f"comfy/datasets/cats/b.{kind}").symlink_to(places / f"comfy/input/b.{kind}")
    assert len(load()[0].samples) == 2
    (places / "secret").write_text("secret words")
    (places / "comfy/datasets/cats/b.txt").unlink()
    (places / "comfy/datasets/cats/b.txt").symlink_to(places / "secret")
    with pytest.raises(DatasetError, match=r"links that lead outside the dataset folders: \S*b\.txt; copy the files"):
        load()


# ---------------------------------------------------------------- lists and their help


def test_a_wrong_folder_gets_the_nearest_ones(places):
    for name in ("zebra", "cats", "cat pictures", "horses"):
        put(places / f"comfy/datasets/{name}/a.png")
    put(places / "comfy/input/dogs/a.png")
    with pytest.raises(DatasetError, match="^folder: 'catz' is not in datasets; choose one of datasets/cats, "):
        load(folder="catz")
    with pytest.raises(
        DatasetError, match="^folder: 'dogs' lies in input, not in datasets; set the widget root to input$"
    ):
        load(folder="dogs")


def test_without_any_folder_the_error_says_where_to_put_one(places):
    for folder in (NO_FOLDER, "cats"):
        with pytest.raises(DatasetError) as caught:
            load(folder=folder)
        assert "there is no folder with images yet; make one in " in str(caught.value)


def test_the_own_path_is_registered_beside_the_user_s(places):
    expected = tuple(os.path.realpath(places / name) for name in ("elsewhere/sets", "comfy/datasets"))
    assert folders.roots()["datasets"] == folders.roots()["datasets"] == expected


def test_the_walk_is_bounded_and_cached(places, monkeypatch):
    for index in range(30):
        put(places / f"comfy/input/{index:02}/a.png")
    put(places / "comfy/input" / "/".join("x" * 12) / "a.png")
    put(places / "comfy/input/.hidden/a.png")
    assert len(folders.list_sources("input")) == 30, "too deep or hidden"
    monkeypatch.setattr(folders, "MAX_FOLDERS", 5)
    assert len(folders.list_sources("input")) < 30
    monkeypatch.setattr(folders, "LISTING_SECONDS", 60.0)
    names = folders.list_sources("input")
    monkeypatch.setattr(folders, "_walk", lambda place: pytest.fail("walked again"))
    assert folders.list_sources("input") == names


# ---------------------------------------------------------------- compat


def test_only_options_that_the_host_lacks_are_dropped():
    class Older:
        def __init__(self, name, tooltip=None):
            self.name, self.tooltip = name, tooltip

    part = build(Older, "a", tooltip="b", search_aliases=["c"], advanced=True)
    assert (part.name, part.tooltip) == ("a", "b")
    with pytest.raises(TypeError, match="tooltop"):
        build(Older, "a", tooltop="b")


def test_options_that_the_host_knows_are_kept():
    assert build(io.Int.Input, "steps", tooltip="how many", default=3).as_dict()["tooltip"] == "how many"
    schema = build(io.Schema, node_id="X", search_aliases=["y"])
    assert getattr(schema, "search_aliases", ["y"]) == ["y"]
    assert "search_aliases" in compat.NEWER_OPTIONS
