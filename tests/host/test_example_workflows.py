"""Every example workflow, exactly as it is shipped, to its end on a real server; each node is in one of them.

Where a workflow names files there are tiny ones of that name: drawings, LoRAs of the demo base, a tiny Wan. The demo's
own workflow is run to its end by ``test_demo``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import example_folders
import tiny_wan
from demo import WORKFLOW as DEMO
from live_server import live_server
from served import tiny_upscale_model
from ui_workflow import WIDGET_TYPES

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LORAS = {"zorb": {"conv_rank": 8, "conv_alpha": 8.0}, "blueprint": {"algorithm": "LoKr", "factor": 4}}
FOLDERS = {"zorb": 6, "mell": 6, "known": 6, "blueprint": 6}
SHOWING = {"PreviewAny", "PreviewImage", "SaveImage", "LoomSaveLoRA", "LoomInspectLoRA", "LoomSavePreset"}
LARGEST_PICTURE = 60_000


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def values_of(workflow: dict, kind: str) -> list:
    return [value for node in workflow["nodes"] if node["type"] == kind for value in node["widgets_values"]]


@pytest.fixture(scope="module")
def examples_server(tmp_path_factory):
    """A server that has whatever the examples name."""
    base = tmp_path_factory.mktemp("examples")
    for name, count in FOLDERS.items():
        example_folders.write(base / "datasets", name, count)
    wan = read(ROOT / "example_workflows/wan_2_2_pair.json")
    high, low = (name for name in values_of(wan, "UNETLoader") if name.endswith(".safetensors"))
    [encoder] = (name for name in values_of(wan, "CLIPLoader") if name.endswith(".safetensors"))
    tiny_wan.write(base / "models", high, low, encoder, values_of(wan, "VAELoader")[0])
    tiny_upscale_model(base / "models/upscale_models/RealESRGAN_x2plus.pth")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes/narrow_umt5.py").write_text(tiny_wan.NARROW)
    with live_server(base=base) as server:
        for name, options in LORAS.items():
            server.run(a_lora(server, name, options))
        yield server


def a_lora(server, name, options):
    """A LoRA file as the example that trains it would save it, two steps old."""

    def node(kind, links, **values):
        known = server.object_info()[kind]["input"]
        default = {
            option: spec[1]["default"]
            for part in ("required", "optional")
            for option, spec in known.get(part, {}).items()
            if len(spec) > 1 and "default" in spec[1]
        }
        return {"class_type": kind, "inputs": {**default, **links, **values}}

    base = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "dataset": ["data", 0]}
    short = {"length": 2, "rank": 8, "alpha": 8.0, "run_name": f"before {name}"}
    checkpoint = {"ckpt_name": "loom-demo-base.safetensors"}
    return {
        "base": {"class_type": "CheckpointLoaderSimple", "inputs": checkpoint},
        "data": node("LoomDatasetLoader", {}, folder=name, resolution=32, bucket_step=8),
        "adapter": node("LoomAdapterSettings", {}, layers="full", **options),
        "trainer": node("LoomLoRATrainer", {**base, "adapter": ["adapter", 0]}, **short),
        "file": node("LoomSaveLoRA", {"lora": ["trainer", 0]}, name=name),
    }


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path != DEMO], ids=lambda path: path.stem)
def test_an_example_runs_to_its_end_as_shipped(examples_server, path):
    workflow = read(path)
    prompt = examples_server.prompt_of(workflow)
    outputs = examples_server.run(prompt, workflow=workflow)
    for number, node in prompt.items():
        if node["class_type"] in SHOWING:
            assert outputs.get(number), f"{node['class_type']} {number} handed out nothing"
    for picture in examples_server.files(outputs):
        with Image.open(picture) as opened:
            assert len(opened.convert("RGB").getcolors(1 << 24)) > 1, f"{picture.name} is of one colour"
    reports = [text for output in outputs.values() for text in output.get("text", ()) if isinstance(text, str)]
    assert not [text for text in reports if "changes no image" in text or "no effect" in text], reports


def test_a_run_goes_on_where_the_example_left_it(examples_server):
    """What the note of the example says: a larger *length*, and it goes on."""
    workflow = read(ROOT / "example_workflows/continue_a_run.json")
    prompt = examples_server.prompt_of(workflow)
    examples_server.run(prompt)
    trainers = [node for node in prompt.values() if node["class_type"] == "LoomLoRATrainer"]
    [first] = [node for node in trainers if "start_from" not in node["inputs"]]
    trained = first["inputs"]["length"]
    first["inputs"]["length"] += 2
    seen = [event for event in examples_server.follow(prompt) if event["type"] == "progress"]
    steps = [event["data"]["value"] for event in seen if event["data"]["max"] == trained + 2]
    assert steps and min(steps) >= trained, steps
    kept = {f"run: {first['inputs']['run_name']} ({what})" for what in ("step 40", "step 80", "ema")}
    assert kept <= sources(examples_server)


def sources(server) -> set[str]:
    kind, *options = server.get("/object_info/LoomLoadLoRA")["LoomLoadLoRA"]["input"]["required"]["source"]
    return set(kind if isinstance(kind, list) else options[0]["options"])


def test_every_node_is_in_an_example(examples_server):
    shown = {node["type"] for path in WORKFLOWS for node in read(path)["nodes"]}
    assert {name for name in examples_server.object_info() if name.startswith("Loom")} <= shown


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_is_complete(examples_server, path):
    """Every value that a node's widgets have, a note that says what to do, groups with titles, and where it is from."""
    workflow, info = read(path), examples_server.object_info()
    assert any(node["type"] == "MarkdownNote" for node in workflow["nodes"])
    assert all(group["title"] for group in workflow["groups"])
    assert workflow["version"] == 0.4 and workflow["id"]
    links = {link[0]: link for link in workflow["links"]}
    assert len(links) == len(workflow["links"])
    for node in workflow["nodes"]:
        assert node["mode"] == 0, f"{node['type']} is muted or bypassed"
        for slot, socket in enumerate(node["inputs"]):
            if socket.get("link") is not None:
                assert links[socket["link"]][3:5] == [node["id"], slot]
        if not node["type"].startswith("Loom"):
            continue
        assert node["properties"]["cnr_id"] == "lora-loom"
        inputs = info[node["type"]]["input"]
        known = {**inputs.get("required", {}), **inputs.get("optional", {})}
        names = [name for name, spec in known.items() if widget(spec)]
        assert len(node["widgets_values"]) == len(names), f"{node['type']}: {names}"


def widget(spec) -> bool:
    kind, details = spec[0], spec[1] if len(spec) > 1 else {}
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not details.get("forceInput")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_an_example_has_a_small_picture(path):
    picture = path.with_suffix(".jpg")
    assert picture.stat().st_size <= LARGEST_PICTURE
    with Image.open(picture) as opened:
        assert opened.format == "JPEG" and opened.width >= 400
        assert len(opened.getcolors(1 << 24)) > 100


def test_there_is_nothing_else_beside_the_examples():
    names = {path.name for path in (ROOT / "example_workflows").iterdir()}
    assert names == {path.name for path in WORKFLOWS} | {path.with_suffix(".jpg").name for path in WORKFLOWS}
