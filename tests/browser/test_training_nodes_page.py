"""The training nodes in the host's real page: presets fill widgets, and advice comes before the first step with a click
that follows it."""

from __future__ import annotations

import random
import time

import pytest

from drawings import CONCEPT, draw
from lora_loom.training.presets import PRESETS

ADD = """() => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    const make = (type, x, y) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const trainer = make("LoomLoRATrainer", 700, 100), adapter = make("LoomAdapterSettings", 50, 100);
    adapter.connectByType(0, trainer, "LOOM_ADAPTER_SETTINGS");
    [app.canvas.ds.scale, app.canvas.ds.offset] = [0.7, [0, 0]];
    app.canvas.setDirty(true, true);
}"""
RUN = """(folder) => {
    const make = (type) => { const node = LiteGraph.createNode(type); app.graph.add(node); return node; };
    const trainer = app.graph._nodes.find((node) => node.type === "LoomLoRATrainer");
    const base = make("CheckpointLoaderSimple"), loader = make("LoomDatasetLoader"), report = make("PreviewAny");
    const set = (node, name, value) => { node.widgets.find((widget) => widget.name === name).value = value; };
    set(base, "ckpt_name", "loom-demo-base.safetensors");
    for (const [name, value] of [["root", "input"], ["folder", folder], ["resolution", 32], ["bucket_step", 8]]) {
        set(loader, name, value);
    }
    const into = (name) => trainer.inputs.findIndex((input) => input.name === name);
    for (const [slot, name] of ["model", "clip", "vae"].entries()) base.connect(slot, trainer, into(name));
    loader.connect(0, trainer, into("dataset"));
    trainer.connect(4, report, 0);
    set(trainer, "length", 1);
    set(trainer, "learning_rate", 1.0);
    set(trainer, "run_name", folder);
    return app.queuePrompt(0, 1);
}"""
PICK = """([type, name]) => {
    const node = app.graph._nodes.find((node) => node.type === type);
    const widget = node.widgets.find((widget) => widget.name === "preset");
    widget.value = name;
    widget.callback(name);
}"""
VALUES = """(type) => {
    const node = app.graph._nodes.find((node) => node.type === type);
    return node && Object.fromEntries(node.widgets.map((widget) => [widget.name, widget.value]));
}"""
INSIDE = """() => {
    const trainer = app.graph._nodes.find((node) => node.type === "LoomLoRATrainer");
    const { subgraph, node: wrapper } = app.graph.convertToSubgraph(new Set([trainer]));
    const inner = subgraph.nodes.find((node) => node.type === "LoomLoRATrainer");
    const findings = [{ rule: "L000", level: "warn", message: "so be it", changes: [] }];
    app.api.dispatchCustomEvent("loom.run_lint", { node: `${wrapper.id}:${inner.id}`, findings });
    const lines = inner.loomAdvice.element.children;
    return { wrapper: wrapper.id !== inner.id, lines: lines.length, text: lines[0]?.textContent };
}"""
HAS = """([type, wanted]) => {
    const node = app.graph._nodes.find((node) => node.type === type);
    const value = (name) => node?.widgets.find((widget) => widget.name === name)?.value;
    return Object.entries(wanted).every(([name, each]) => value(name) === each);
}"""
TRAINER, ADAPTER, OPTIMIZER = "LoomLoRATrainer", "LoomAdapterSettings", "LoomOptimizerSettings"


@pytest.fixture
def training(page):
    page.evaluate(ADD)
    page.wait_for_timeout(300)  # nodes drawn by Vue come to their place
    return page


def holds(page, kind, wanted):
    page.wait_for_function(HAS, arg=[kind, wanted], timeout=10_000)


def test_a_preset_fills_its_node_and_those_connected(training):
    style = PRESETS["style"]
    training.evaluate(PICK, [TRAINER, "style"])
    holds(training, TRAINER, {**style.options("trainer"), "preset": "style"})
    holds(training, ADAPTER, {**style.options("adapter"), "preset": "style"})
    training.evaluate(PICK, [ADAPTER, "fast test"])  # of one node alone; what it does not name is as at first
    holds(training, ADAPTER, {"layers": "attention", "conv_rank": 0, "conv_alpha": 1.0, "preset": "fast test"})
    assert training.evaluate(VALUES, TRAINER)["rank"] == style.options("trainer")["rank"]
    training.evaluate(PICK, [TRAINER, "none"])
    holds(training, TRAINER, {"rank": 16, "alpha": 16, "unit": "steps"})


def test_advice_comes_with_a_value_to_click(training, server):
    folder = f"advice {training.mode}"
    (server.base / "input" / folder).mkdir()
    rng = random.Random(3)
    for index in range(3):
        draw(CONCEPT, "white", 32, rng).save(server.base / "input" / folder / f"{index}.png")
        (server.base / "input" / folder / f"{index}.txt").write_text("a zorb")
    before = set(server.get("/history"))
    training.evaluate(RUN, folder)
    advice = training.locator(".loom-advice [data-rule=L005]")
    advice.wait_for(timeout=90_000)
    assert advice.get_attribute("data-level") == "error"
    button = advice.get_by_role("button", name="learning_rate → 0.0001")
    button.focus()
    training.keyboard.press("Enter")  # no mouse is needed
    holds(training, TRAINER, {"learning_rate": 1e-4})
    assert advice.get_by_role("button").is_disabled()
    deadline = time.monotonic() + 90
    while not set(server.get("/history")) - before:
        assert time.monotonic() < deadline, server.log_tail()
        training.wait_for_timeout(200)


def test_advice_finds_a_trainer_inside_a_subgraph(training):
    shown = training.evaluate(INSIDE)
    assert shown == {"wrapper": True, "lines": 1, "text": "⚠ so be it "}


def test_the_page_saw_no_error_of_a_script(page):
    assert not page.errors
