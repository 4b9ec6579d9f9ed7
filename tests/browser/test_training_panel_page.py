"""Trainings in the host's real page: on the node, in the bottom panel, steered, and there again after a reload."""

from __future__ import annotations

import re
import time
import uuid

import numpy as np
import pytest

from served import put_drawings

TRAINER, TAB = "LoomLoRATrainer", "lora-loom-trainings"
PATIENCE = 120_000
READY = "() => window.app?.vueAppReady && app.extensionManager && app.graph && app.canvas"
BUILD = """([folder, runs, length]) => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    const make = (type, x, y) => {
        const node = LiteGraph.createNode(type);
        node.pos = [x, y];
        app.graph.add(node);
        return node;
    };
    const fill = (node, values) => {
        for (const [name, value] of Object.entries(values)) {
            node.widgets.find((widget) => widget.name === name).value = value;
        }
    };
    const [base, loader] = [make("CheckpointLoaderSimple", 0, 0), make("LoomDatasetLoader", 0, 200)];
    const pictures = make("LoomPreviewSettings", 0, 600);
    fill(base, { ckpt_name: "loom-demo-base.safetensors" });
    fill(loader, { root: "input", folder, resolution: 32, bucket_step: 8 });
    const small = { width: 32, height: 32, steps: 1, cfg: 1, every: 100000, scheduler: "simple" };
    fill(pictures, { prompts: "a circle", ...small });
    return runs.map((run_name, index) => {
        const trainer = make("LoomLoRATrainer", 500 + 600 * index, 0);
        const into = (name) => trainer.inputs.findIndex((input) => input.name === name);
        for (const [slot, name] of ["model", "clip", "vae"].entries()) base.connect(slot, trainer, into(name));
        loader.connect(0, trainer, into("dataset"));
        pictures.connect(0, trainer, into("preview"));
        make("PreviewAny", 900 + 600 * index, 0);
        trainer.connect(4, app.graph._nodes.at(-1), 0);
        fill(trainer, { length, learning_rate: 1e-3, rank: 2, alpha: 2, batch_size: 2, run_name });
        return String(trainer.id);
    });
}"""
SEE = """(id) => {  // the panel of the node comes to a place that no part of the page covers
    const node = app.graph.getNodeById(id);
    const widget = node.widgets.find((each) => each.name === "loom_training");
    const { ds } = app.canvas;
    ds.scale = 1;
    const { left, top, height } = widget.element.getBoundingClientRect();
    if (height) [0, 1].forEach((axis) => (ds.offset[axis] += [300, 130][axis] - [left, top][axis]));
    else ds.offset = [300 - node.pos[0], 130 - node.pos[1] - widget.y];
    app.canvas.setDirty(true, true);
    return Math.abs(left - 300) < 30 && Math.abs(top - 130) < 30;
}"""
PAINTED = """(canvas) => {  // in how many columns of pixels the curve of the loss lies
    const { width, height } = canvas;
    const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
    let columns = 0;
    for (let x = 0; x < width; x++) {
        for (let y = 0; y < height; y++) {
            const [red, green, blue, alpha] = data.slice(4 * (y * width + x), 4 * (y * width + x) + 4);
            if (alpha > 200 && blue > red + 80) { columns++; break; }
        }
    }
    return columns;
}"""


@pytest.fixture(scope="module")
def folder(server):
    put_drawings(server, "input", "panel", 4)
    return "panel"


@pytest.fixture
def build(page, folder):
    def made(runs, length):
        ids = page.evaluate(BUILD, [folder, runs, length])
        page.wait_for_timeout(200)  # nodes drawn by Vue come to their place
        return ids

    return made


def queue(page):
    return page.evaluate("() => app.queuePrompt(0, 1)")


def panel_of(page, node):
    """The panel on a node, in sight."""
    page.wait_for_function("(id) => app.graph.getNodeById(id).loomTraining.key()", arg=node, timeout=PATIENCE)
    page.wait_for_function(SEE, arg=node, polling=200, timeout=30_000)
    mark = f"panel-{node}"
    page.evaluate(
        "([id, mark]) => { app.graph.getNodeById(id).loomTraining.element.dataset.mark = mark; }", [node, mark]
    )
    return page.locator(f"[data-mark={mark}] .loom-run")


def step_of(panel):
    text = panel.locator("[data-figure=step] .loom-run-value").text_content(timeout=PATIENCE)
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))


def until(page, check, seconds=PATIENCE / 1000):
    deadline = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < deadline, "it never came"
        page.wait_for_timeout(50)
    return found


def in_state(panel, state):
    panel.locator(f".loom-run-state:text-is('{state}')").wait_for(timeout=PATIENCE)


def press(panel, name):
    """A button by the keyboard, once it works."""
    button = panel.get_by_role("button", name=name, exact=True)
    panel.page.wait_for_function(
        "(button) => button.getAttribute('aria-disabled') === 'false'", arg=button.element_handle(), timeout=PATIENCE
    )
    button.focus()
    panel.page.keyboard.press("Enter")


def succeeded(page, server, before, count=1):
    """The new entries of the history, once there are so many; all of them a success."""

    def there():
        found = {name: entry for name, entry in server.get("/history").items() if name not in before}
        return found if len(found) >= count else None

    new = until(page, there)
    assert {entry["status"]["status_str"] for entry in new.values()} == {"success"}
    return new


def reloaded(page):
    """The page anew, with the graph it had."""
    graph = page.evaluate("() => app.graph.serialize()")
    page.reload(wait_until="domcontentloaded")
    page.wait_for_function(READY, timeout=PATIENCE)
    page.evaluate("(graph) => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(200)


def test_a_training_is_watched_steered_and_survives_a_reload(page, build, server):
    run, before = f"steered {page.mode}", set(server.get("/history"))
    [node] = build([run], 5000)
    lines = page.evaluate("(id) => app.graph.getNodeById(id).loomTraining.element.offsetHeight", node)
    assert lines <= 30, "one line until there is a training"
    size = page.evaluate("(id) => app.graph.getNodeById(id).size[1]", node)
    queue(page)
    panel = panel_of(page, node)
    until(page, lambda: step_of(panel) >= 3)
    canvas = panel.locator("canvas.loom-run-chart-canvas")
    until(page, lambda: canvas.evaluate(PAINTED) > 50)  # while it runs
    assert page.evaluate("(id) => app.graph.getNodeById(id).size[1]", node) >= size
    assert panel.locator("[data-figure=speed] .loom-run-value").text_content()
    press(panel, "Pause")
    in_state(panel, "paused")
    at = step_of(panel)

    press(panel, "Save now")
    panel.locator(f".loom-run-note:text-is('saved at step {at}')").wait_for(timeout=PATIENCE)
    kept = server.base / "output/lora_loom" / run
    assert (kept / f"{run}-step{at:06d}.safetensors").stat().st_size > 1000
    press(panel, "Preview now")
    panel.locator(f".loom-run-previews figcaption:text-is('step {at}')").wait_for(timeout=PATIENCE)
    assert (kept / "previews" / f"step-{at:06d}.png").exists()

    reloaded(page)
    panel = panel_of(page, node)
    in_state(panel, "paused")
    assert step_of(panel) == at
    until(page, lambda: panel.locator("canvas.loom-run-chart-canvas").evaluate(PAINTED) > 50)
    panel.locator(f".loom-run-previews figcaption:text-is('step {at}')").wait_for(timeout=PATIENCE)
    press(panel, "Continue")
    until(page, lambda: step_of(panel) >= at + 2)
    press(panel, "Stop and keep")
    in_state(panel, "stopped")
    assert panel.locator(".loom-run-why").text_content().startswith("stopped by you after")
    assert panel.locator(".loom-run-buttons").is_hidden()
    history = succeeded(page, server, before)  # the graph goes on
    texts = [str(output.get("text")) for entry in history.values() for output in entry["outputs"].values()]
    assert any("stopped by you after" in text for text in texts)


def test_two_trainers_have_a_panel_each_and_a_cached_one_has_it_again(page, build, server):
    runs, before = [f"one {page.mode}", f"two {page.mode}"], set(server.get("/history"))
    nodes = build(runs, 4)
    queue(page)
    for node, run in zip(nodes, runs, strict=True):
        panel = panel_of(page, node)
        in_state(panel, "done")
        assert panel.locator(".loom-run-name").text_content() == run and step_of(panel) == 4
    [outputs] = [entry["outputs"] for entry in succeeded(page, server, before).values()]

    page.route("**/lora_loom/trainings**", lambda route: route.fulfill(status=404, json={"error": "none"}))  # restarted
    try:
        reloaded(page)
        assert not page.evaluate("(id) => app.graph.getNodeById(id).loomTraining.key()", nodes[0])
        queue(page)
        succeeded(page, server, before, 2)
        if not server.object_info()[TRAINER].get("has_intermediate_output"):  # this host tells nothing of cached nodes
            for node in nodes:
                told = {"node": node, "display_node": node, "output": outputs[node], "prompt_id": uuid.uuid4().hex}
                page.evaluate("(told) => app.api.dispatchCustomEvent('executed', told)", told)
        for node, run in zip(nodes, runs, strict=True):
            panel = panel_of(page, node)
            in_state(panel, "done")
            assert panel.locator(".loom-run-name").text_content() == run and step_of(panel) == 4
            until(page, lambda shown=panel: shown.locator("canvas.loom-run-chart-canvas").evaluate(PAINTED) > 50)
    finally:
        page.unroute("**/lora_loom/trainings**")


def test_a_trainer_in_a_subgraph_has_its_panel(page, build, server):
    before = set(server.get("/history"))
    [node] = build([f"inside {page.mode}"], 3)
    page.evaluate("(id) => app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))", node)
    queue(page)
    succeeded(page, server, before)
    inner = """() => {
        const wrapper = app.graph._nodes.find((node) => node.subgraph);
        return wrapper.subgraph.nodes.find((node) => node.type === "LoomLoRATrainer").loomTraining.key();
    }"""
    page.wait_for_function(inner, timeout=PATIENCE)
    if page.mode == "canvas":
        known = {one["id"]: one["node"] for one in server.get("/lora_loom/trainings")["trainings"]}
        assert ":" in known[page.evaluate(inner)]


@pytest.fixture
def tab(page):
    """The bottom tab; closed again afterwards."""
    toggle = f"() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.{TAB}')"
    page.evaluate(toggle)
    tab = page.locator(".loom-run-tab")
    tab.wait_for(timeout=30_000)
    yield tab
    page.evaluate(toggle)
    tab.wait_for(state="detached", timeout=30_000)


def test_what_the_api_queues_is_in_the_bottom_tab_by_keyboard_alone(page, build, tab, server):
    run = f"elsewhere {page.mode}"
    [node] = build([run], 12)
    prompt = page.evaluate("() => app.graphToPrompt()")["output"]
    settings = next(inputs["inputs"] for inputs in prompt.values() if inputs["class_type"] == "LoomPreviewSettings")
    settings["every"] = 4
    page.evaluate("() => app.graph.clear()")  # the page knows nothing of it
    server.post("/prompt", {"prompt": prompt, "client_id": uuid.uuid4().hex})
    entry = tab.locator(f"button.loom-run-item[title='{run}'][data-state=done]")
    entry.wait_for(timeout=PATIENCE)
    tab.locator(".loom-run-list button").first.focus()
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert page.evaluate("() => document.activeElement.title") == run
    page.keyboard.press("Enter")
    panel = tab.locator(".loom-run")
    in_state(panel, "done")
    assert panel.locator(".loom-run-name").text_content() == run

    slider = panel.get_by_label("Step of the preview")
    slider.focus()
    panel.locator("figcaption:text-is('step 12')").wait_for(timeout=30_000)
    for key, step in (("ArrowLeft", 8), ("Home", 4), ("ArrowRight", 8)):
        page.keyboard.press(key)
        panel.locator(f"figcaption:text-is('step {step}')").wait_for(timeout=30_000)
    panel.get_by_role("button", name="Enlarge the preview").focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Preview beside the base")
    page.keyboard.press("ArrowRight")
    dialog.locator("figcaption:text-is('step 12')").wait_for(timeout=30_000)
    page.keyboard.press("Escape")
    dialog.wait_for(state="detached", timeout=30_000)

    chart = panel.get_by_role("application")
    chart.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    tip = panel.locator(".loom-run-chart-tip")
    tip.locator("b:text-is('step 2')").wait_for(timeout=30_000)
    assert re.search(r"smoothed \d", tip.text_content()) and "learning rate 0.001" in tip.text_content()
    for name in ("by timestep", "log"):
        toggle = panel.get_by_role("button", name=name)
        pressed = toggle.get_attribute("aria-pressed")
        toggle.focus()
        page.keyboard.press("Space")
        assert toggle.get_attribute("aria-pressed") != pressed
    chart.focus()
    page.keyboard.press("End")
    tip.locator("[data-colour^=band]").first.wait_for(timeout=30_000)
    for name in ("by timestep", "log"):
        panel.get_by_role("button", name=name).click()


def test_a_range_is_looked_at_closer_with_the_mouse(page, build, tab, server):
    run = f"mouse {page.mode}"
    build([run], 12)
    queue(page)
    tab.locator(f"button.loom-run-item[title='{run}'][data-state=done]").click(timeout=PATIENCE)
    tab.locator("figcaption:text-is('step 12')").wait_for(timeout=30_000)  # beside the chart
    page.evaluate("() => app.extensionManager.toast.removeAll()")  # the host's messages lie above the chart
    page.locator(".p-toast-message").first.wait_for(state="detached", timeout=30_000)
    box = tab.get_by_role("application").bounding_box()
    at = lambda share: box["x"] + 46 + share * (box["width"] - 58)  # noqa: E731 - the axis and the room beside it
    middle = box["y"] + box["height"] / 3
    tip = tab.locator(".loom-run-chart-tip b")

    def step_at(share):
        page.mouse.move(at(share) - 1, middle)
        page.mouse.move(at(share), middle)
        tip.wait_for(timeout=30_000)
        page.wait_for_timeout(100)  # the next frame
        return int(tip.text_content().removeprefix("step "))

    assert [step_at(0.01), step_at(0.99)] == [1, 12]
    page.mouse.move(at(3 / 11), middle)
    page.mouse.down()
    page.mouse.move(at(5 / 11), middle, steps=3)
    page.mouse.move(at(7 / 11), middle, steps=3)
    page.mouse.up()
    assert [step_at(0.01), step_at(0.99)] == [4, 8]
    page.mouse.dblclick(at(0.5), middle)
    assert [step_at(0.01), step_at(0.99)] == [1, 12]


def test_a_run_of_before_is_shown_from_its_log(page, tab, server):
    place = server.base / "output/lora_loom" / f"past {page.mode}"
    place.mkdir(parents=True)
    bands = "[0.1, null, 0.3, 0.4]"
    rest = f'"learning_rate": 0.01, "gradient_norm": 1.0, "bands": {bands}, "seconds": 0.5'
    lines = [f'{{"step": {step}, "loss": {1 / step}, {rest}}}\n' for step in range(1, 3001)]
    (place / "log.jsonl").write_text("".join(lines))
    page.evaluate(f"() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.{TAB}')")
    page.evaluate(f"() => app.extensionManager.command.execute('Workspace.ToggleBottomPanelTab.{TAB}')")
    tab.locator(f"button.loom-run-item[title='past {page.mode}']").click(timeout=PATIENCE)
    in_state(tab, "past run")
    assert step_of(tab) == 3000 and tab.locator("[data-figure=speed] .loom-run-value").text_content() == "2 steps/s"


def test_a_failed_training_tells_why(page, build, server):
    [node] = build(["../elsewhere"], 3)
    queue(page)
    panel = panel_of(page, node)
    in_state(panel, "failed")
    assert "use letters, digits" in panel.get_by_role("alert").text_content()
    page.keyboard.press("Escape")  # the host's own message


def figures(page, script, *arguments):
    return page.evaluate(
        f"""async (given) => {{
            const address = (await app.api.getExtensions()).find((each) => each.endsWith("/training_panel.js"));
            const place = (name) => new URL(address.replace("training_panel.js", `training/${{name}}`), location).href;
            const [figures, curves] = [await import(place("figures.mjs")), await import(place("curves.mjs"))];
            return ({script})({{ ...figures, ...curves }}, ...given);
        }}""",
        list(arguments),
    )


def test_smoothing_is_tensorboard_s(host_page):
    rng = np.random.default_rng(0)
    values = rng.random(500).tolist()
    for weight in (0.0, 0.6, 0.99):
        shown = figures(host_page, "({ smoothed }, values, weight) => smoothed(values, weight)", values, weight)
        weights = weight ** np.arange(500)
        expected = [
            np.average(values[: end + 1], weights=weights[: end + 1][::-1]) if weight else values[end]
            for end in range(500)
        ]
        np.testing.assert_allclose(shown, expected, rtol=1e-9)
    holes = figures(host_page, "({ smoothed }) => smoothed([1, NaN, 2], 0.5).map(String)")
    assert holes[1] == "NaN" and float(holes[2]) == pytest.approx((0.5 * 1 + 1 * 2) / 1.5)


def test_decimation_loses_no_peak(host_page):
    rng = np.random.default_rng(1)
    values = rng.standard_normal(50_000)
    steps = np.cumsum(rng.integers(1, 4, 50_000))
    first, last, columns = int(steps[100]), int(steps[-100]), 400
    script = "({ decimated }, steps, values, from, to, columns) => decimated(steps, values, from, to, columns)"
    kept = np.array(figures(host_page, script, steps.tolist(), values.tolist(), first, last, columns))
    assert np.all(np.diff(kept) > 0) and len(kept) <= 4 * (columns + 3)
    assert kept[0] == 99 and kept[-1] >= len(steps) - 100, "the line goes on past the edges"
    column = np.floor((steps - first) / ((last - first) / columns))
    for each in range(columns):
        inside, shown = values[column == each], values[kept[column[kept] == each]]
        assert (shown.min(), shown.max()) == (inside.min(), inside.max())


def test_long_curves_are_kept_short_and_drawn_fast(host_page):
    script = """({ addPoints, LIMIT, decimated, smoothed }) => {
        const curves = {};
        const count = 200_000;
        const step = Array.from({ length: count }, (_, index) => index);
        const value = step.map((index) => (index === 123_456 ? 1000 : Math.sin(index)));
        addPoints(curves, { loss: { step, value } });
        addPoints(curves, { loss: { step: [5, count - 1, count], value: [1, 2, null] } });
        const { loss } = curves;
        const began = performance.now();
        for (let turn = 0; turn < 10; turn++) decimated(loss.step, smoothed(loss.value, 0.9), 0, count, 800);
        const took = (performance.now() - began) / 10;
        const last = [loss.step.at(-1), loss.step.at(-2), String(loss.value.at(-1)), loss.value.at(-2)];
        return { length: loss.step.length, most: Math.max(...loss.value.filter(Number.isFinite)), last, LIMIT, took };
    }"""
    told = figures(host_page, script)
    assert told["length"] <= told["LIMIT"] and told["most"] == 1000
    assert told["last"] == [200_000, 199_999, "NaN", 2]
    print(f"{told['took']:.2f} ms for a curve of {told['length']} points")


def test_the_page_saw_no_error_of_a_script(page):
    assert not page.errors
