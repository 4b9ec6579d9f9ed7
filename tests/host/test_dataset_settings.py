"""Settings nodes and the loader's further widgets: every option is there, has its default, and arrives."""

import asyncio
import dataclasses
import importlib.util
import json
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from graph import Graph, GraphError, node
from hosting import host_folder
from lora_loom.host import folders
from lora_loom.host.checking import badge_of
from lora_loom.nodes import NODES
from lora_loom.nodes.dataset import SUBFOLDERS, LoomDatasetFromImages, LoomDatasetLoader
from lora_loom.nodes.dataset_settings import LoomCaptionSettings, LoomConceptSettings, LoomImageSettings
from lora_loom.training.dataset.lint_rules import RULES, Finding
from lora_loom.training.dataset.model import CaptionOptions, DatasetError, ImageOptions
from lora_loom.training.dataset.settings import ConceptSettings

DOCS = Path(__file__).resolve().parents[2] / "web" / "docs"
SETTINGS = {
    LoomCaptionSettings: (CaptionOptions, {}),
    LoomImageSettings: (ImageOptions, {"zoom": ("zoom_min", "zoom_max")}),
    LoomConceptSettings: (ConceptSettings, {}),
}


def defaults(kind):
    return {item.id: item.default for item in kind.GET_SCHEMA().inputs}


def put(path, size=(96, 72), caption="a cat"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 80).convert("RGB").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def load(folder="cats", **options):
    return LoomDatasetLoader.execute("datasets", folder, 64, 8, **options).result


# ---------------------------------------------------------------- the settings


@pytest.mark.parametrize("kind", SETTINGS, ids=lambda kind: kind.__name__)
def test_every_option_is_a_widget_and_the_defaults_are_those_of_the_options(kind):
    options, renamed = SETTINGS[kind]
    fields = [name for field in dataclasses.fields(options) for name in renamed.get(field.name, (field.name,))]
    schema = kind.GET_SCHEMA()
    schema.validate()
    assert sorted(item.id for item in schema.inputs) == sorted(fields)
    assert all(item.tooltip for item in schema.inputs) and len(schema.outputs) == 1
    assert kind.execute(**defaults(kind)).result == (options(),)


def another(item):
    """A value that differs from the widget's default."""
    if getattr(item, "options", None):
        return item.options[-1]
    if isinstance(item.default, bool):
        return not item.default
    if isinstance(item.default, str):
        return "red" if item.id == "background" else "|"
    return min(item.max, item.default + 1) if item.default != item.max else item.min


@pytest.mark.parametrize(
    "kind, name", [(kind, item.id) for kind in SETTINGS for item in kind.GET_SCHEMA().inputs], ids=str
)
def test_every_widget_decides_about_its_own_option_only(kind, name):
    options, renamed = SETTINGS[kind]
    [item] = [item for item in kind.GET_SCHEMA().inputs if item.id == name]
    values = defaults(kind) | {name: another(item)}
    if name.startswith("zoom"):
        values |= {"zoom_min": 0.5, "zoom_max": 2.0}
    [found] = kind.execute(**values).result
    field = next((field for field, widgets in renamed.items() if name in widgets), name)
    changed = [f.name for f in dataclasses.fields(options) if getattr(found, f.name) != getattr(options(), f.name)]
    assert changed == [field]


def test_lists_of_tags():
    values = defaults(LoomCaptionSettings) | {"never_drop": "hat, blue *,,\nzorb "}
    [found] = LoomCaptionSettings.execute(**values).result
    assert found.never_drop == ("hat", "blue *", "zorb")


@pytest.mark.parametrize(
    "kind, options, message",
    [
        (LoomCaptionSettings, {"dropout": 2.0}, "dropout is 2.0, expected 0 to 1"),
        (LoomCaptionSettings, {"lines": "some"}, "lines is 'some', expected one of all, first, random"),
        (LoomCaptionSettings, {"separator": " "}, "separator is ' '"),
        (LoomImageSettings, {"zoom_min": 3.0}, r"zoom is \(3.0, 0.0\)"),
        (LoomImageSettings, {"crop": "left"}, "crop is 'left'"),
        (LoomConceptSettings, {"validation_split": 1.0}, "validation_split is 1.0, expected 0 to below 1"),
    ],
)
def test_what_cannot_be_is_named(kind, options, message):
    with pytest.raises(DatasetError, match=message):
        kind.execute(**defaults(kind) | options)


# ---------------------------------------------------------------- what they do to a dataset


def test_widgets_and_settings_reach_the_dataset(places):
    put(places / "comfy/datasets/cats/a.png")
    concept = ConceptSettings(kind="regularisation", loss_weight=0.5, min_side=32)
    found, report = load(
        more_resolutions="96, 64x128",
        repeats=2.5,
        trigger="zorb",
        captions=CaptionOptions(shuffle=True),
        images=ImageOptions(flip=True),
        concept=concept,
    )
    [made] = found.concepts
    assert made.resolutions == ((64, 64), (96, 96), (64, 128)) and made.repeats == Fraction(5, 2)
    assert (made.kind, made.loss_weight, made.buckets.min_side, made.buckets.step) == ("regularisation", 0.5, 32, 8)
    assert made.captions == CaptionOptions(shuffle=True, trigger="zorb") and made.images == ImageOptions(flip=True)
    assert "1 image (1 regularisation) at resolutions 64, 96, 64×128" in report


def test_a_file_goes_before_the_widgets(places):
    put(places / "comfy/datasets/cats/a.png")
    (places / "comfy/datasets/set.toml").write_text(
        'general.resolution = 128\n[[datasets]]\n[[datasets.subsets]]\nimage_dir = "cats"\nnum_repeats = 3\n'
        'caption_extension = ".txt"\n'
    )
    made = load("set.toml", repeats=7.0, trigger="zorb")[0].concepts[0]
    assert made.resolutions == ((128, 128),) and made.repeats == 3, "the file says so"
    assert made.captions.trigger == "zorb", "the file says nothing"


def test_names_of_folders_set_repeats_unless_they_are_plain(places):
    put(places / "comfy/datasets/set/10_cat/a.png", caption=None)
    put(places / "comfy/datasets/set/2_dog/a.png")
    found, report = load("set")
    assert {concept.name: concept.repeats for concept in found.concepts} == {"10_cat": 10, "2_dog": 2}
    assert "10_cat: 1 image × 10 = 10 presentations per epoch (83%)" in report
    (places / "comfy/datasets/set/10_cat/a.txt").write_text("a cat")
    [concept] = load("set", subfolders="plain")[0].concepts
    assert concept.repeats == 1


def test_a_validation_split_is_kept_out(places):
    for index in range(10):
        put(places / f"comfy/datasets/cats/{index}.png", size=(64, 64 + index))
    found, report = load(concept=ConceptSettings(validation_split=0.2, validation_seed=3))
    assert (len(found.members("training")), len(found.members("validation"))) == (8, 2)
    assert "10 images (8 training, 2 validation)" in report
    other = load(concept=ConceptSettings(validation_split=0.2, validation_seed=4))[0]
    assert [found.samples[i].id for i in found.members("validation")] != [
        other.samples[i].id for i in other.members("validation")
    ]


def test_damaged_files_stop_or_are_left_out(places):
    put(places / "comfy/datasets/cats/a.png")
    put(places / "comfy/datasets/cats/b.png")
    (places / "comfy/datasets/cats/b.png").write_text("<html>not found</html>")
    with pytest.raises(DatasetError, match=r"b\.png"):
        load()
    found, report = load(if_unreadable="skip")
    assert [sample.id for sample in found.samples] == ["a.png"] and "b.png" in report


def test_the_check_of_the_loader(places):
    put(places / "comfy/datasets/cats/a.png", size=(40, 40), caption="")
    output = LoomDatasetLoader.execute("datasets", "cats", 64, 8)
    text, level = output.ui["loom_badge"]
    assert level == "error" and "error" in text and "D021" in output.result[1] and "T001" in output.result[1]
    off = LoomDatasetLoader.execute("datasets", "cats", 64, 8, lint="off")
    assert off.ui is None and "D021" not in off.result[1]
    Image.new("RGB", (64, 64), "white").save(places / "comfy/datasets/cats/a.png")
    assert "D024" not in load()[1] and "D024" in load(lint="full")[1], "plain borders show in the pixels only"


@pytest.mark.parametrize(
    "levels, expected",
    [((), "ok"), (("info",), "ok"), (("info", "warn"), "warn"), (("warn", "error"), "error"), (("error",), "error")],
)
def test_the_badge_has_the_worst_level(levels, expected):
    badge = badge_of([Finding("D001", level, "x", (), None) for level in levels])["loom_badge"]
    assert badge[1] == expected and badge[0] and json.loads(json.dumps(badge)) == badge


@pytest.mark.parametrize("widget", ["if_unreadable", "subfolders", "lint"])
def test_choices_are_checked_where_the_host_does_not(places, widget):
    put(places / "comfy/datasets/cats/a.png")
    with pytest.raises(ValueError, match=f"{widget}: 'other' is unknown; choose one of "):
        load(**{widget: "other"})
    assert list(SUBFOLDERS)[0] == "10_name sets repeats"


def test_the_badge_is_sent_to_the_page(places):
    put(places / "comfy/datasets/cats/a.png")
    graph, sent = Graph(), []
    graph.executor.server.send_sync = lambda event, data, sid=None: sent.append((event, data))
    prompt = {
        "1": node("LoomDatasetLoader", root="datasets", folder="cats", resolution=64, bucket_step=8),
        "2": node("Keep", value=["1", 0]),
    }
    asyncio.run(graph.executor.execute_async(prompt, "prompt", {"client_id": "page"}, ["2"]))
    [output] = [data["output"] for event, data in sent if event == "executed" and data["node"] == "1"]
    assert len(output["loom_badge"]) == 2


# ---------------------------------------------------------------- the yaml that an error shows


def test_the_lines_of_the_advice_are_what_the_host_takes(places, tmp_path):
    """Copied from the error into the host's file, read by the host itself, they allow the folder."""
    outside = tmp_path / "some where: else" / "it's #1"
    put(outside / "cats/a.png")
    (places / "comfy/datasets/set.toml").write_text(
        f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(outside / 'cats'))}\n"
        'caption_extension = ".txt"\n'
    )
    with pytest.raises(DatasetError, match="extra_model_paths.yaml") as refused:
        load("set.toml")
    lines = str(refused.value).splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("datasets_"))
    yaml = tmp_path / "extra_model_paths.yaml"
    yaml.write_text("\n".join(lines[start : start + 2]) + "\n")
    found = importlib.util.spec_from_file_location("extra_config", host_folder() / "utils/extra_config.py")
    host = importlib.util.module_from_spec(found)
    found.loader.exec_module(host)
    host.load_extra_path_config(str(yaml))
    assert str(outside / "cats") in folders.roots()["datasets"]
    assert [sample.caption for sample in load("set.toml")[0].samples] == ["a cat"]


def test_the_advice_for_two_folders_has_two_sections(places):
    sections = {folders.advice(Path(name)).splitlines()[1] for name in ("/data/a", "/data/b", "/data/b/x.toml")}
    assert sections == {"datasets_data_a:", "datasets_data_b:"}


# ---------------------------------------------------------------- lists of the widgets


def test_dataset_files_and_tables_are_listed_apart(places):
    put(places / "comfy/datasets/cats/a.png")
    for name in ("set.toml", "cats/list.jsonl", "tags.csv", "notes.md", ".hidden.toml"):
        (places / "comfy/datasets" / name).write_text("")
    (places / "comfy/input/meta.json").write_text("{}")
    (places / "secret.toml").write_text("")
    (places / "comfy/datasets/linked.toml").symlink_to(places / "secret.toml")
    assert folders.list_sources("datasets") == ("cats", "cats/list.jsonl", "set.toml")
    assert folders.all_sources() == ("cats", "cats/list.jsonl", "meta.json", "set.toml")
    assert folders.list_tables() == ("tags.csv",)


# ---------------------------------------------------------------- help


def test_the_help_of_the_check_lists_every_rule():
    page = (DOCS / "LoomDatasetLint.md").read_text(encoding="utf-8")
    for rule in RULES.values():
        limits = "; ".join(f"{limit.name} {limit.default:g}" for limit in rule.thresholds)
        level = f"{rule.level}{' · fix' if rule.fix else ''}"
        assert f"| {rule.id} | {level} | {rule.title}{', full check' * (rule.needs == 'pixels')} | {limits} |" in page
    assert page.count("\n| ") == len(RULES) + 1


@pytest.mark.parametrize("kind", NODES, ids=lambda kind: kind.__name__)
def test_every_widget_is_on_the_help_page(kind):
    """Each by its name, or by the page of the loader for those that are the loader's."""
    schema = kind.GET_SCHEMA()
    page = (DOCS / f"{schema.node_id}.md").read_text(encoding="utf-8")
    shared = {item.id for item in LoomDatasetLoader.GET_SCHEMA().inputs} if kind is LoomDatasetFromImages else set()
    shared |= {"dataset", "images", "masks", "clip", "caption_settings", "image_settings", "concept_settings"}
    if kind.__module__.rpartition(".")[2].startswith("dataset"):
        missing = [item.id for item in schema.inputs if item.id not in shared and item.id not in page]
        assert not [name for name in missing if not name.startswith("dataset_")]


def test_an_error_of_settings_reaches_the_graph(places):
    put(places / "comfy/datasets/cats/a.png")
    prompt = {
        "0": node("LoomCaptionSettings", **defaults(LoomCaptionSettings) | {"trigger": "other"}),
        "1": node(
            "LoomDatasetLoader",
            **{"root": "datasets", "folder": "cats", "resolution": 64, "bucket_step": 8, "trigger": "zorb"},
            captions=["0", 0],
        ),
        "2": node("Keep", value=["1", 0]),
    }
    with pytest.raises(GraphError, match="trigger: it is 'zorb' here and 'other' in the caption settings; empty one"):
        Graph().run(prompt)
