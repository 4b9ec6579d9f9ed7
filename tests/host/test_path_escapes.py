"""No widget that takes a name reaches anything outside the registered folders, by any spelling of it.

Every spelling goes through every such widget, through ``execute`` and through the fingerprint, which the host calls
first and on unchecked strings. The old host checks no choices of a list, so what counts is what the nodes do.
"""

import math
from pathlib import Path

import folder_paths
import pytest
import torch
from PIL import Image

from lora_loom.host import checking, exchange, folders, loras
from lora_loom.host.runs import RunError
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.nodes import NODES
from lora_loom.nodes.dataset import LoomDatasetLoader
from lora_loom.nodes.dataset_check import LoomDatasetLint
from lora_loom.nodes.dataset_exchange import LoomDatasetToTOML
from lora_loom.nodes.files import LoomLoadLoRA, LoomSaveLoRA
from lora_loom.training.dataset.model import DatasetError

SPELLINGS = {  # {secret} is an absolute path to the folder or file outside, {name} its name
    "absolute": "{secret}",
    "absolute, doubled slash": "/{secret}",
    "up": "../../{name}",
    "up from inside": "cats/../../../{name}",
    "up with backslashes": "..\\..\\{name}",
    "up, mixed": "cats\\..\\..\\../{name}",
    "up at the end": "..",
    "inside and out": "cats/..",
    "dots": "./../../{name}",
    "NUL": "cats\0/../../{name}",
    "NUL behind": "{name}\0.toml",
    "UNC": "\\\\host\\share\\{name}",
    "UNC with slashes": "//host/share/{name}",
    "device": "\\\\?\\C:\\{name}",
    "drive": "C:\\{name}",
    "drive, relative": "C:{name}",
    "home": "~/{name}",
    "home of another": "~root/{name}",
    "variable": "$HOME/{name}",
    "percent": "%2e%2e/%2e%2e/{name}",
    "wide dots": "．．/．．/{name}",
    "file scheme": "file://{secret}",
    "other case of a root": "../DATASETS/{name}",
    "surrogate": "\ud800/{name}",
    "long": "x/" * 4000 + "{name}",
    "link": "link",
    "link inside": "cats/link",
    "below a link": "linked_folder/{name}",
}
ODD = [None, 5, 5.5, True, ["cats"], {"a": 1}, (), b"cats", ""]


@pytest.fixture
def outside(places):
    """A folder with a dataset, a dataset file and a table, all outside, and links to them from inside."""
    secret = places / "secret"
    for folder in (secret, places / "comfy/datasets/cats"):
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 64), "green").save(folder / "a.png")
        (folder / "a.txt").write_text("secret words")
    (places / "secret.toml").write_text("secret words = [")
    (places / "secret.csv").write_text("secret words")
    inside = places / "comfy/datasets"
    (inside / "linked_folder").symlink_to(places)
    return places


def spelt(places, spelling, name):
    for link in ("link", "cats/link"):
        (places / "comfy/datasets" / (link + Path(name).suffix)).symlink_to(places / name)
    text = SPELLINGS[spelling].format(secret=places / name, name=name)
    return text + Path(name).suffix if text.endswith("link") else text


def refused_everywhere(places, text, monkeypatch, root="datasets"):
    monkeypatch.setattr("lora_loom.nodes.dataset.open_dataset", lambda path, *_, **__: pytest.fail(f"opened {path}"))
    monkeypatch.setattr("lora_loom.nodes.dataset.dataset_state", lambda path, *_: pytest.fail(f"looked at {path}"))
    with pytest.raises(DatasetError, match="^(folder|root): ") as refused:
        LoomDatasetLoader.execute(root, text, 64, 8)
    state = LoomDatasetLoader.fingerprint_inputs(root=root, folder=text)
    assert isinstance(state, float) or state.startswith(("folder: ", "root: "))
    assert "secret words" not in str(refused.value)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["secret", "secret.toml"])
def test_the_loader_s_folder(outside, spelling, name, monkeypatch):
    refused_everywhere(outside, spelt(outside, spelling, name), monkeypatch)


@pytest.mark.parametrize("value", ODD[1:-1], ids=repr)
def test_what_is_no_string_is_no_folder(outside, value, monkeypatch):
    refused_everywhere(outside, value, monkeypatch)
    refused_everywhere(outside, "cats", monkeypatch, root=value)


@pytest.mark.parametrize("root", ["..", "/", "output", "datasets/..", "DATASETS", "", "datasets\0", "{places}"])
def test_the_loader_s_root(outside, root, monkeypatch):
    refused_everywhere(outside, "secret", monkeypatch, root.format(places=outside))


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("widget", ["tag_list", "implications"])
def test_the_tables_of_the_check(outside, spelling, widget, monkeypatch):
    text = spelt(outside, spelling, "secret.csv")
    monkeypatch.setattr("lora_loom.nodes.dataset_check.read_knowledge", lambda *paths: pytest.fail(f"opened {paths}"))
    monkeypatch.setattr(checking, "lint", lambda *_, **__: [])
    options = {"checks": "quick", "thresholds": "", "fixes": "", "style": False, "batch_size": 1}
    tables = {"tag_list": "none", "implications": "none"} | {widget: text}
    dataset = LoomDatasetLoader.execute("datasets", "cats", 64, 8, lint="off").result[0]
    with pytest.raises(DatasetError, match=f"^{widget}: ") as refused:
        LoomDatasetLint.execute(dataset, **options, **tables)
    assert LoomDatasetLint.fingerprint_inputs(**tables).startswith(f"{widget}: ")
    assert "secret words" not in str(refused.value)


@pytest.mark.parametrize("value", [*ODD, "cats", "cats/a.txt", "cats/a.png", "."], ids=repr)
def test_what_is_no_table_is_refused(outside, value):
    with pytest.raises(DatasetError, match="^tag_list: "):
        folders.resolve_table(value, "tag_list")


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "link" not in name])
def test_the_name_of_a_saved_toml(outside, spelling):
    name = SPELLINGS[spelling].format(secret=outside / "secret", name="secret")
    before = sorted(outside.rglob("*"))
    dataset = LoomDatasetLoader.execute("datasets", "cats", 64, 8, lint="off").result[0]
    with pytest.raises(RunError, match="^name is "):
        LoomDatasetToTOML.execute(dataset, True, name)
    left = [path for path in sorted(outside.rglob("*")) if path not in before]
    assert left in ([], [Path(folder_paths.get_output_directory())])


def test_a_saved_toml_never_follows_a_link(outside):
    """A link in the output folder is a taken name, wherever it leads."""
    output = Path(folder_paths.get_output_directory())
    output.mkdir(parents=True)
    (output / "set.toml").symlink_to(outside / "secret.toml")
    (output / "set-2.toml").symlink_to(outside / "nowhere.toml")
    assert exchange.write_text("x", "set", ".toml").name == "set-3.toml"
    assert (outside / "secret.toml").read_text() == "secret words = [" and not (outside / "nowhere.toml").exists()


@pytest.mark.parametrize("key", ["image_dir", "conditioning_data_dir", "metadata_file"])
@pytest.mark.parametrize("spelling", ["absolute", "up", "UNC", "drive", "home", "link"])
def test_what_a_toml_names_goes_the_same_way(outside, spelling, key):
    """The loader hands its own idea of what may be read to the reader of the file."""
    (outside / "comfy/datasets/link").symlink_to(outside / "secret")
    place = SPELLINGS[spelling].format(secret=outside / "secret", name="secret").replace("\\", "\\\\")
    subset = {"image_dir": "cats"} | {key: place}
    lines = "\n".join(f'{name} = "{value}"' for name, value in subset.items())
    (outside / "comfy/datasets/set.toml").write_text(
        f"general.resolution = 64\n[[datasets]]\n[[datasets.subsets]]\n{lines}\n"
    )
    with pytest.raises(DatasetError) as refused:
        LoomDatasetLoader.execute("datasets", "set.toml", 64, 8)
    assert "secret words" not in str(refused.value)
    state = LoomDatasetLoader.fingerprint_inputs(root="datasets", folder="set.toml")
    assert isinstance(state, str) and "secret words" not in state


def a_run_and_a_file_outside(places, monkeypatch):
    """A LoRA outside, a run, and links to the LoRA from the run and beside it; the folder of LoRAs."""
    secret, runs = places / "secret", Path(folder_paths.get_output_directory()) / "lora_loom"
    for place in (secret / "secret.safetensors", runs / "cats/cats.safetensors", places / "loras/mine.safetensors"):
        save_tensors({"secret": torch.ones(1)}, place)
    (runs / "cats/cats-best.safetensors").symlink_to(secret / "secret.safetensors")
    (runs / "secret").symlink_to(secret)
    registered = {**folder_paths.folder_names_and_paths, "loras": ([str(places / "loras")], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", registered)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return runs


@pytest.mark.parametrize("lead", ["", "run: ", "run: cats ("])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_source_of_a_lora(outside, spelling, lead, monkeypatch):
    a_run_and_a_file_outside(outside, monkeypatch)
    text = lead + spelt(outside, spelling, "secret/secret.safetensors")
    for source in (text, text.removesuffix(".safetensors"), f"{text})"):
        with pytest.raises(ValueError, match="^source: there is no "):
            LoomLoadLoRA.execute(source)
        assert LoomLoadLoRA.fingerprint_inputs(source=source) == ""


def test_a_run_is_no_way_out(outside, monkeypatch):
    """Nothing that a link leads to is listed, nor what is called as no run may be."""
    runs = a_run_and_a_file_outside(outside, monkeypatch)
    save_tensors({"a": torch.ones(1)}, runs / ".." / "lora_loom" / "-x" / "-x.safetensors")
    save_tensors({"a": torch.ones(1)}, runs / "other" / "cats.safetensors")
    assert loras.sources() == ["run: cats", "mine.safetensors"]
    for source in ("run: cats (best)", "run: secret", *ODD):
        with pytest.raises(ValueError, match="^source: "):
            LoomLoadLoRA.execute(source)
        assert source is None or LoomLoadLoRA.fingerprint_inputs(source=source) == ""


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "link" not in name])
def test_the_name_of_a_saved_lora(outside, spelling, monkeypatch):
    a_run_and_a_file_outside(outside, monkeypatch)
    name = SPELLINGS[spelling].format(secret=outside / "secret" / "secret", name="secret/secret")
    before = sorted(outside.rglob("*"))
    for if_exists in ("number", "overwrite"):
        with pytest.raises(ValueError, match="^name"):
            LoomSaveLoRA.execute({"a": torch.ones(1)}, name, if_exists)
    assert sorted(outside.rglob("*")) == before


def test_every_widget_that_takes_a_name_is_in_this_file():
    """Strings and lists of nodes for datasets and files that are not free text."""
    texts = {
        *("more_resolutions", "trigger", "captions", "thresholds", "fixes", "filter", "findings", "ids"),
        *("prefix", "suffix", "separator", "keep_tokens_separator", "secondary_separator", "never_drop", "only_drop"),
        "background",
    }
    choices = {"if_unreadable", "subfolders", "lint", "balance", "checks", "images_mode", "captions_mode", "kind"}
    choices |= {"lines", "crop", "if_file_exists", "format", "for_core"}
    names = set()
    for kind in NODES:
        if kind.__module__.rpartition(".")[2].startswith(("dataset", "files")):
            for item in kind.GET_SCHEMA().inputs:
                if item.get_io_type() in ("STRING", "COMBO") or isinstance(getattr(item, "options", None), list):
                    names.add(item.id)
    assert names - texts - choices == {"root", "folder", "tag_list", "implications", "name", "source"}


def test_a_linked_root_and_folder_run_always():
    assert math.isnan(LoomDatasetLoader.fingerprint_inputs()), "their values are not known yet"
