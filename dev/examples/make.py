"""Makes ``example_workflows``: the graphs, built and saved by the host's own page, and a picture of a real run of each.

    python dev/examples/make.py [--pictures] [name …]

Without names all of them. ``--pictures`` also trains and samples with the demo base, which takes some minutes; what
one example saves (``zorb``, ``blueprint``) others read. Wan's two models are the demo base both times there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "demo_base"), str(ROOT / "tests" / "host")]

from PIL import Image  # noqa: E402
from playwright.sync_api import Page, sync_playwright  # noqa: E402

import applying_examples  # noqa: E402
import dataset_examples  # noqa: E402
import example_folders  # noqa: E402
import example_pictures  # noqa: E402
import tool_examples  # noqa: E402
import training_examples  # noqa: E402
from bootstrap import chromium  # noqa: E402
from example import CHECKPOINT, Example  # noqa: E402
from live_server import Server, live_server  # noqa: E402
from served import tiny_upscale_model  # noqa: E402

TARGET = ROOT / "example_workflows"
PARTS = training_examples, applying_examples, dataset_examples, tool_examples
EXAMPLES = [make() for part in PARTS for make in part.EXAMPLES]
COUNTS = {"zorb": 24, "mell": 24, "blueprint": 64, "known": 64}
READY = "() => window.app?.vueAppReady && app.extensionManager && app.graph && app.canvas"
VUE = "(on) => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
SHOWN = "(count) => document.querySelectorAll('[data-node-id]').length >= count"


def build(page: Page, example: Example) -> dict[str, Any]:
    """The graph as the page saves it, with room for its nodes both ways of drawing them."""
    plan = example.plan()
    page.evaluate(VUE, False)
    page.evaluate("([plan]) => loomExamples.build(plan, {})", [plan])
    page.evaluate("() => { app.canvas.ds.scale = 0.1; app.canvas.ds.offset = [100, 100]; }")
    page.evaluate(VUE, True)
    page.wait_for_function(SHOWN, arg=len(plan["nodes"]), timeout=60_000)
    page.wait_for_timeout(1000)  # lines that our own nodes add by themselves
    heights = page.evaluate("(plan) => loomExamples.measure(plan)", plan)
    page.evaluate(VUE, False)
    saved = page.evaluate("([plan, heights]) => loomExamples.build(plan, heights)", [plan, heights])
    return tidy(json.loads(saved), example.name)


def tidy(saved: dict[str, Any], name: str) -> dict[str, Any]:
    """Without what is by chance: the same every time it is made."""
    saved["id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, f"lora-loom/{name}"))
    saved["extra"] = {}
    for node in saved["nodes"]:
        node["properties"].pop("ver", None)
    return saved


def shown(server: Server, workflow: dict[str, Any], outputs: dict[str, Any]) -> dict[str, list[Image.Image]]:
    titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
    return {
        titles[number]: [Image.open(path).convert("RGB") for path in server.files({number: output})]
        for number, output in outputs.items()
    }


def on_the_demo_base(prompt: dict[str, Any]) -> dict[str, Any]:
    """Wan's loaders give way to the demo base, its empty video to empty pictures of 32 × 32."""
    places = {"UNETLoader": 0, "CLIPLoader": 1, "VAELoader": 2}
    source = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}}
    loaders = {number: places[node["class_type"]] for number, node in prompt.items() if node["class_type"] in places}
    if not loaders:
        return prompt
    changed = {number: node for number, node in prompt.items() if number not in loaders}
    for node in changed.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in loaders:
                inputs[name] = ["base", loaders[value[0]]]
        if node["class_type"] == "EmptyHunyuanLatentVideo":
            node.update(class_type="EmptyChromaRadianceLatentImage")
            node["inputs"] = {"width": 32, "height": 32, "batch_size": 8}
        if node["class_type"] == "LoomDatasetLoader":
            inputs.update(resolution=32, bucket_step=8)
        if node["class_type"] == "LoomLoRATrainer":
            inputs.update(length=120, batch_size=4, learning_rate=1e-3)
        if node["class_type"] == "ModelSamplingSD3":
            inputs.update(shift=1.0)
    return {"base": source, **changed}


def run(server: Server, example: Example, workflow: dict[str, Any]) -> None:
    prompt = on_the_demo_base(server.prompt_of(workflow))
    saved = shown(server, workflow, server.run(prompt, workflow=workflow))
    example_pictures.write(example.picture(saved), TARGET / f"{example.name}.jpg")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--pictures", action="store_true")
    options = parser.parse_args()
    chosen = [example for example in EXAMPLES if not options.names or example.name in options.names]
    with tempfile.TemporaryDirectory(prefix="loom-examples-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        for name, count in COUNTS.items():
            example_folders.write(base / "datasets", name, count)
        tiny_upscale_model(base / "models/upscale_models/RealESRGAN_x2plus.pth")
        with live_server(base=base) as server:
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu"])
                page = browser.new_page(viewport={"width": 1600, "height": 1000})
                page.route(lambda address: not address.startswith(server.url), lambda route: route.abort())
                page.goto(server.url, wait_until="domcontentloaded")
                page.wait_for_function(READY, timeout=120_000)
                page.add_script_tag(path=HERE / "build.js")
                for example in chosen:
                    path = TARGET / f"{example.name}.json"
                    path.write_text(json.dumps(build(page, example), indent=1, ensure_ascii=False) + "\n")
                    sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
                browser.close()
            for example in chosen if options.pictures else ():
                run(server, example, json.loads((TARGET / f"{example.name}.json").read_text()))
                sys.stdout.write(f"wrote {example.name}.jpg\n")


if __name__ == "__main__":
    main()
