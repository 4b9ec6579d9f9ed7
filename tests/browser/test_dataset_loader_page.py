"""The Dataset Loader in the host's real page: what is dropped on it is uploaded and chosen, nothing is overwritten."""

from __future__ import annotations

import json
import random
import re
import time

import pytest

from drawings import CONCEPT, draw
from lora_loom.training.dataset.images import IMAGE_TYPES

LINE = ".loom-status"

ADD = """() => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    const loader = LiteGraph.createNode("LoomDatasetLoader"), report = LiteGraph.createNode("PreviewAny");
    [loader.pos, report.pos] = [[200, 150], [600, 150]];
    app.graph.add(loader);
    app.graph.add(report);
    loader.connect(1, report, 0);
    [app.canvas.ds.scale, app.canvas.ds.offset] = [1, [0, 0]];
    app.canvas.setDirty(true, true);
}"""
CHECK = """() => {
    const loader = app.graph._nodes.find((node) => node.type === "LoomDatasetLoader");
    const check = LiteGraph.createNode("LoomDatasetLint"), report = LiteGraph.createNode("PreviewAny");
    [check.pos, report.pos] = [[600, 350], [900, 350]];
    app.graph.add(check);
    app.graph.add(report);
    loader.connect(0, check, 0);
    check.connect(1, report, 0);
}"""
LOADER = "app.graph._nodes.find((node) => node.type === 'LoomDatasetLoader')"
TITLE = f"() => app.canvasPosToClientPos([{LOADER}.pos[0] + 120, {LOADER}.pos[1] - 12])"
INSIDE = f"""() => {{
    const node = {LOADER}, line = document.querySelector("{LINE}");
    const [right, bottom] = app.canvasPosToClientPos([node.pos[0] + node.size[0], node.pos[1] + node.size[1]]);
    const frame = line.closest("[data-node-id]")?.getBoundingClientRect() ?? {{ right, bottom }};
    const place = line.getBoundingClientRect();
    return place.height > 20 && place.right <= frame.right && place.bottom <= frame.bottom;
}}"""
SHOWN = f"""(said) => {{
    const lines = [...document.querySelectorAll("{LINE}")].map((line) => [line.title, line.dataset.level]);
    return JSON.stringify(lines.sort()) === JSON.stringify(said);
}}"""
VALUES = f"() => Object.fromEntries({LOADER}.widgets.map((widget) => [widget.name, widget.value]))"


@pytest.fixture
def loader(page):
    """A graph of one Dataset Loader whose report is shown."""
    page.evaluate(ADD)
    page.locator(LINE).wait_for()
    page.wait_for_timeout(300)  # nodes drawn by Vue come to their place
    return page


@pytest.fixture
def inputs(server):
    return server.base / "input"


def title(page):
    return page.evaluate(TITLE)


def line(page, level):
    """What the line on the node says, once it is of that level."""
    return page.locator(f"{LINE}[data-level={level}]").inner_text(timeout=20_000)


def failed(page, why):
    page.locator(f"{LINE}[data-level=error]", has_text=why).wait_for()


def picture(path, seed=1):
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(CONCEPT, "white", 32, random.Random(seed)).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def tree(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_dropped_files_become_the_dataset_that_is_queued(loader, drop, server, inputs, tmp_path):
    files = [picture(tmp_path / "a.png"), text(tmp_path / "a.txt", "a zorb, é"), picture(tmp_path / "b.png", 2)]
    drop([*files, text(tmp_path / "b.txt", "")], title(loader))
    folder = re.fullmatch(r"✓ 2 images in input/(dataset-\d{4}-\d\d-\d\d(-\d+)?)", line(loader, "ok"))[1]
    assert tree(inputs / folder) == tree(tmp_path)
    values = loader.evaluate(VALUES)
    assert (values["root"], values["folder"]) == ("input", folder)

    before = set(server.get("/history"))
    loader.evaluate(CHECK)
    loader.evaluate("() => app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 60
    while not (new := set(server.get("/history")) - before):
        assert time.monotonic() < deadline, server.log_tail()
        loader.wait_for_timeout(200)
    entry = server.get("/history")[new.pop()]
    assert entry["status"]["status_str"] == "success"
    said = [output["loom_badge"] for output in entry["outputs"].values() if "loom_badge" in output]
    assert len(said) == 2
    loader.wait_for_function(SHOWN, arg=sorted(said))
    prompt = entry["prompt"][2]
    assert "loom_status" not in next(node for node in prompt.values() if node["class_type"] == "LoomDatasetLoader")

    loader.evaluate(f"() => {LOADER}.widgets[0].callback('input')")
    loader.locator(LINE, has_text="drop images").wait_for()  # a verdict on other settings does not stay


def test_a_folder_keeps_its_name_and_form_and_a_second_one_goes_elsewhere(loader, drop, inputs, tmp_path):
    name = f"Cäts {loader.mode}"
    source = tmp_path / name
    for path in ("1.png", "deep/er/2.png", 'deep/3 "q".png'):
        picture(source / path)
        text((source / path).with_suffix(".txt"), f"caption of {path}")
    kept = {path.replace('"', "_"): content for path, content in tree(source).items()}
    text(source / "page.html", "<script></script>")
    text(source / ".hidden/4.txt", "")

    box = loader.locator(LINE).bounding_box()
    drop([source], (box["x"] + 9, box["y"] + 9))
    drop([source], title(loader))
    loader.get_by_text("An upload is still running").wait_for()
    assert line(loader, "ok") == f"✓ 3 images in input/{name}"
    loader.get_by_text(re.compile(r"Left out.*: 2 \(.*hidden/4.txt")).wait_for()
    assert tree(inputs / name) == kept
    assert not (inputs / f"{name}-2").exists()

    picture(source / "1.png", seed=9)
    loader.evaluate(f"() => {LOADER}.widgets[0].callback('input')")
    drop([source], title(loader))
    assert line(loader, "ok") == f"✓ 3 images in input/{name}-2"
    assert tree(inputs / name) == kept
    assert tree(inputs / f"{name}-2")["1.png"] == (source / "1.png").read_bytes()
    assert loader.evaluate(VALUES)["folder"] == f"{name}-2"
    assert loader.locator(".p-invalid").count() == 0  # Vue's mark of a value that is no choice


def test_what_fails_is_said_and_nothing_is_lost(loader, drop, inputs, tmp_path):
    held = text(inputs / f"held-{loader.mode}/a.txt", "another caption")  # no picture: the folder is not listed
    picture(tmp_path / held.parent.name / "a.png")
    text(tmp_path / held.parent.name / "a.txt", "a caption")
    drop([tmp_path / held.parent.name], title(loader))
    failed(loader, "a.txt: input/")
    assert held.read_text() == "another caption"

    text(inputs / f"file-{loader.mode}", "")  # a file where the folder would be
    drop([picture(tmp_path / f"file-{loader.mode}/a.png").parent], title(loader))
    failed(loader, "a.png: the server answered 500")

    drop([text(tmp_path / "a.txt", "a caption")], title(loader))
    failed(loader, "no picture among what was dropped")
    loader.wait_for_function(INSIDE)  # however much there is to say


def test_a_workflow_is_left_to_the_page(loader, drop, inputs, tmp_path):
    before = sorted(inputs.iterdir())
    workflow = {"nodes": [{"id": 1, "type": "Note", "pos": [9, 9], "size": [99, 99]}], "links": [], "version": 0.4}
    drop([text(tmp_path / "workflow.json", json.dumps(workflow))], title(loader))
    if loader.mode == "canvas":  # nodes drawn by Vue keep every drop to themselves
        loader.wait_for_function("() => app.graph._nodes.map((node) => node.type).join() === 'Note'")
    else:
        assert line(loader, "hint")
    assert sorted(inputs.iterdir()) == before


def test_a_saved_workflow_makes_room_for_the_line_and_does_not_hold_it(loader):
    saved = loader.evaluate(f"() => {LOADER}.serialize()")
    assert len(saved["widgets_values"]) == len(loader.evaluate(VALUES)) - 2  # the line and the button
    loader.evaluate(f"(saved) => {LOADER}.configure(saved)", {**saved, "size": [300, 60]})
    loader.wait_for_function(INSIDE)


PLAN = """async ([module, names, listed]) => {
    const { IMAGES, plan } = await import(module);
    const files = names.map(([folders, name]) => ({ file: new File([], name), folders }));
    try {
        const { folder, uploads, left } = plan(files, listed, new Date(2026, 0, 5));
        return { IMAGES, folder, left, to: uploads.map(({ subfolder, name }) => `${subfolder}/${name}`) };
    } catch (error) {
        return error.message;
    }
}"""


def test_where_dropped_files_go(page, server):
    script = next(path for path in server.get("/extensions") if path.endswith("/dataset_nodes.js"))
    module = script.replace("dataset_nodes.js", "dropped_files.mjs")

    def plan(*names, listed=()):
        return page.evaluate(PLAN, [module, [[name.split("|")[:-1], name.split("|")[-1]] for name in names], listed])

    assert set(plan("a.png")["IMAGES"]) == set(IMAGE_TYPES)
    assert plan("a.PNG", "a.txt", "x.zip", ".a.png") == {
        "IMAGES": plan("a.png")["IMAGES"],
        "folder": "dataset-2026-01-05",
        "left": ["x.zip", ".a.png"],
        "to": ["dataset-2026-01-05/a.txt", "dataset-2026-01-05/a.PNG"],
    }
    assert plan("one|a.png", "two|a.png")["to"] == ["dataset-2026-01-05/one/a.png", "dataset-2026-01-05/two/a.png"]
    assert plan("one|a.png", "b.png")["to"] == ["dataset-2026-01-05/one/a.png", "dataset-2026-01-05/b.png"]
    assert plan("Cats|a.png", listed=["cats", "deep/cats-2", "CATS-3/x"])["folder"] == "Cats-2"
    assert plan("Cats|a.png", listed=["cats/x", "cats-2", "dogs"])["folder"] == "Cats-3"
    for name, safe in {
        "con": "_con",
        "a/b": "a_b",
        "  .x. ": "x",
        "a:b*?": "a_b__",
        "COM1.x": "_COM1.x",
        "e\u0301": "é",
    }.items():
        assert plan(f"{name}|a.png")["to"] == [f"{safe}/a.png"], name
    assert len(plan(f"{'x' * 300}|a.png")["folder"]) == 80
    assert "no picture" in plan("a.txt", "b.json")
    assert "rename a?.png" in plan("a*.png", "a?.png")


def test_the_page_saw_no_error_of_a_script(page):
    assert page.errors == []
