"""The editor's window in the host's real page: pictures, selection, filter, focus boxes, undo, writing and closing."""

from __future__ import annotations

import re
import time

import pytest
from playwright.sync_api import expect

from editor_client import Client, Dataset, listed_by, put
from editor_panels import leave

WAIT = 20_000  # milliseconds, on a busy machine
MANY = 400
EDITOR, GRID, TILE = ".loom-editor", ".loom-grid", ".loom-tile"
LOADER, EDITING = "LoomDatasetLoader", "LoomTagEditor"
ADD = """([folder]) => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    const loader = LiteGraph.createNode("LoomDatasetLoader");
    loader.pos = [200, 120];
    app.graph.add(loader);
    for (const [name, value] of Object.entries({ root: "datasets", folder }))
        loader.widgets.find((widget) => widget.name === name).value = value;
    [app.canvas.ds.scale, app.canvas.ds.offset] = [1, [0, 0]];
    app.canvas.setDirty(true, true);
}"""
ADD_EDITOR = """() => {
    const [loader] = app.graph._nodes;
    const editor = LiteGraph.createNode("LoomTagEditor"), report = LiteGraph.createNode("PreviewAny");
    [editor.pos, report.pos] = [[600, 120], [900, 120]];
    app.graph.add(editor);
    app.graph.add(report);
    loader.connect(0, editor, 0);
    editor.connect(1, report, 0);
    return app.queuePrompt(0, 1);
}"""
BUTTON = """(type) => {
    const node = app.graph._nodes.find((each) => each.type === type);
    const widget = node.widgets.find((each) => each.name === "Open editor");
    return app.canvasPosToClientPos([node.pos[0] + node.size[0] / 2, node.pos[1] + widget.last_y + 10]);
}"""
PROGRAM = (
    "() => app.graph._nodes.find((node) => node.type === 'LoomTagEditor')"
    ".widgets.find((widget) => widget.name === 'program').value"
)


@pytest.fixture(scope="module")
def client(server):
    return Client(server)


@pytest.fixture(scope="module")
def folders(server, client):
    """{name: path} of datasets; each test that edits has one of its own."""
    made = {}
    for name in ("focus", "writing", "closing", "forgetting", "keys", "node-canvas", "node-vue"):
        made[name] = put(server.base / "datasets" / f"page-{name}", {f"{n}.png": f"cat, tag {n}" for n in range(6)})
    captions = {f"sub/img_{n:03}.png": f"{'cat' if n % 2 else 'dog'}, tag {n}" for n in range(MANY)}
    made["many"] = put(server.base / "datasets" / "page-many", captions)
    listed_by(client, "page-many")
    listed_by(client, "page-node-vue")
    return made


@pytest.fixture
def editor(host_page, folders):
    """editor(name): the window, opened on that folder from a Dataset Loader; closed after the test."""

    def opened(name):
        host_page.evaluate(ADD, [folders[name].name])
        host_page.evaluate("() => app.graph._nodes[0].widgets.find(({ name }) => name === 'Open editor').callback()")
        shown(host_page)
        return host_page

    yield opened
    leave(host_page, "Keep it open")


def shown(page):
    page.locator(f"{TILE} img.there").first.wait_for(timeout=WAIT)


def tile(page, name):
    return page.locator(f'{TILE}[aria-label^="{name}"]')


def count(page, text):
    expect(page.locator(".loom-bar-count")).to_have_text(text, timeout=WAIT)


def foot(page, text):
    expect(page.locator(".loom-foot-text")).to_contain_text(text, timeout=WAIT)


def selected(page):
    """Names of the tiles in view that are selected, once nothing changes any more."""
    read = "(tiles) => tiles.filter((t) => t.ariaSelected === 'true').map((t) => t.ariaLabel.split(',')[0])"
    before = None
    for _ in range(100):
        now = page.eval_on_selector_all(TILE, read)
        if now == before:
            break
        before = now
        page.wait_for_timeout(100)
    return sorted(before)


def names(first, last):
    return [f"sub/img_{n:03}.png" for n in range(first, last + 1)]


def columns(page):
    lefts = page.eval_on_selector_all(TILE, "(tiles) => tiles.map((tile) => tile.getBoundingClientRect().left)")
    return len({round(left) for left in lefts})


def cursor(page):
    return page.locator(f"{TILE}.cursor").get_attribute("data-image", timeout=WAIT)


def until(page, call, wanted):
    """What ``call`` returns, once it is as wanted; the page's requests go on meanwhile."""
    end = time.monotonic() + WAIT / 1000
    while not wanted(found := call()):
        assert time.monotonic() < end, found
        page.wait_for_timeout(50)
    return found


# -- opening


def test_it_opens_from_a_node_and_gives_the_focus_back(page, folders, shot):
    page.evaluate(ADD, [folders["many"].name])
    button = page.get_by_role("button", name="Open editor") if page.mode == "vue" else None
    if button:
        button.click()
    else:
        page.wait_for_function("() => !!app.graph._nodes[0].widgets.find(({ name }) => name === 'Open editor').last_y")
        page.mouse.click(*page.evaluate(BUTTON, LOADER))
    shown(page)
    expect(page.locator(".loom-bar-name")).to_have_text("datasets/page-many")
    count(page, f"{MANY} images")
    assert page.evaluate("() => document.activeElement.className") == "loom-grid"
    page.get_by_role("tab", name="Caption").wait_for()
    shot(f"editor-{page.mode}")
    page.keyboard.press("Escape")
    expect(page.locator(EDITOR)).to_have_count(0)


def test_edits_of_a_node_go_into_its_program(page, server, folders, shot):
    folder = folders[f"node-{page.mode}"]
    page.evaluate(ADD, [folder.name])
    before = set(server.get("/history"))
    page.evaluate(ADD_EDITOR)
    until(page, lambda: set(server.get("/history")) - before, bool)
    page.evaluate(
        "() => app.graph._nodes.find((node) => node.type === 'LoomTagEditor')"
        ".widgets.find(({ name }) => name === 'Open editor').callback()"
    )
    shown(page)
    expect(page.locator(".loom-bar-count")).to_have_text("6 images")
    expect(page.get_by_role("button", name="Write", exact=True)).to_have_count(0)
    for key in ("Home", "Enter"):
        page.keyboard.press(key)
    draw_focus(page, (0.25, 0.25), (0.75, 0.5))
    expect(page.locator(".loom-bar-mark")).to_have_text("1 edit in the node", timeout=WAIT)
    line = until(page, lambda: page.evaluate(PROGRAM), bool)
    sides = re.fullmatch(r'set focus (\S+) (\S+) (\S+) (\S+) for "0.png"\n?', line).groups()
    assert [float(side) for side in sides] == pytest.approx([0.25, 0.25, 0.75, 0.5], abs=0.02)
    shot(f"editor-node-{page.mode}")
    page.keyboard.press("Control+z")
    until(page, lambda: page.evaluate(PROGRAM), lambda text: not text)
    page.keyboard.press("Control+y")
    until(page, lambda: page.evaluate(PROGRAM), bool)
    for _ in range(2):  # the large picture, the window
        page.keyboard.press("Escape")
    expect(page.locator(EDITOR)).to_have_count(0)
    assert page.evaluate(PROGRAM) == line
    assert {path.suffix for path in folder.iterdir()} == {".png", ".txt"}
    assert (folder / "0.txt").read_text() == "cat, tag 0"


def test_a_node_that_has_not_run_says_so(host_page, folders):
    host_page.evaluate(ADD, [folders["many"].name])
    host_page.evaluate(
        """() => {
            const node = LiteGraph.createNode("LoomTagEditor");
            app.graph.add(node);
            node.widgets.find(({ name }) => name === "Open editor").callback();
        }"""
    )
    host_page.get_by_text("queue the workflow first").wait_for(timeout=WAIT)
    expect(host_page.locator(EDITOR)).to_have_count(0)


def test_it_opens_from_the_sidebar(host_page, folders, shot):
    tab = host_page.get_by_role("button", name="Captions of your datasets")
    tab.click()
    host_page.get_by_label("Find a folder").fill("PAGE-M")
    found = host_page.locator(".loom-sidebar li:not([hidden])")
    expect(found).to_have_count(2, timeout=WAIT)  # and the folder inside
    shot("editor-sidebar")
    found.get_by_role("button", name=re.compile("page-many($| )")).click()
    shown(host_page)
    expect(host_page.locator(".loom-bar-name")).to_have_text("datasets/page-many")
    host_page.keyboard.press("Escape")
    expect(host_page.locator(EDITOR)).to_have_count(0)
    host_page.get_by_label("Find a folder").fill("no such")
    expect(found).to_have_count(0)
    tab.click()


# -- the grid


def test_only_tiles_in_view_are_there_and_show_their_pictures(editor, shot):
    page = editor("many")
    assert page.locator(TILE).count() < MANY / 4
    page.keyboard.press("End")
    tile(page, "sub/img_399.png").locator("img.there").wait_for(timeout=WAIT)
    assert page.locator(TILE).count() < MANY / 4
    assert tile(page, "sub/img_000.png").count() == 0
    width = tile(page, "sub/img_399.png").locator("img").evaluate("(image) => image.naturalWidth")
    assert width == 48
    before = columns(page)
    page.locator(GRID).hover()
    page.keyboard.down("Control")
    for _ in range(3):
        page.mouse.wheel(0, 100)
    page.keyboard.up("Control")
    until(page, lambda: columns(page), lambda now: now > before)
    page.keyboard.press("c")
    expect(page.locator(".loom-tile-caption:visible")).to_have_count(0)
    shot("editor-small-tiles")
    page.keyboard.press("c")
    for _ in range(3):
        page.keyboard.press("+")
    until(page, lambda: columns(page), lambda now: now <= before)


def test_the_mouse_selects(editor):
    page = editor("many")
    tile(page, "sub/img_001.png").click()
    assert selected(page) == names(1, 1)
    tile(page, "sub/img_003.png").click(modifiers=["Control"])
    assert selected(page) == ["sub/img_001.png", "sub/img_003.png"]
    tile(page, "sub/img_001.png").click(modifiers=["Control"])
    assert selected(page) == names(3, 3)
    tile(page, "sub/img_003.png").click()
    tile(page, "sub/img_006.png").click(modifiers=["Shift"])
    assert selected(page) == names(3, 6)
    count(page, f"{MANY} images, 4 selected")

    across = columns(page)
    first, last = (
        tile(page, "sub/img_000.png").bounding_box(),
        tile(page, f"sub/img_{across + 1:03}.png").bounding_box(),
    )
    page.mouse.move(first["x"] + 20, first["y"] + 20)
    page.mouse.down()
    page.mouse.move(last["x"] + 10, last["y"] + 10, steps=4)
    page.locator(".loom-band").wait_for()
    page.mouse.up()
    banded = sorted(names(0, 1) + names(across, across + 1))
    until(page, lambda: selected(page), lambda found: found == banded)
    tile(page, "sub/img_002.png").dblclick()
    expect(page.locator(".loom-picture-name")).to_contain_text("sub/img_002.png", timeout=WAIT)


def test_keys_alone_select(editor):
    page = editor("many")
    press = page.keyboard.press
    press("Home")
    assert selected(page) == names(0, 0)
    press("ArrowRight")
    press("ArrowRight")
    assert selected(page) == names(2, 2)
    press("Shift+ArrowRight")
    press("Shift+ArrowRight")
    until(page, lambda: selected(page), lambda found: found == names(2, 4))
    press("Control+ArrowRight")
    press("Control+ArrowRight")
    assert selected(page) == names(2, 4)
    press("Space")
    assert selected(page) == [*names(2, 4), *names(6, 6)]
    press("Control+a")
    count(page, f"{MANY} images, {MANY} selected")
    press("Control+Shift+A")
    count(page, f"{MANY} images")
    press("Home")
    press("PageDown")
    below = until(page, lambda: selected(page), lambda found: found != names(0, 0))
    press("ArrowUp")
    press("End")
    until(page, lambda: selected(page), lambda found: found == names(399, 399))
    assert below[0] > "sub/img_004.png"
    press("Enter")
    expect(page.locator(".loom-picture-name")).to_contain_text("sub/img_399.png", timeout=WAIT)
    press("ArrowLeft")
    expect(page.locator(".loom-picture-name")).to_contain_text("sub/img_398.png", timeout=WAIT)
    press("Escape")
    until(page, lambda: selected(page), lambda found: found == names(398, 398))
    assert page.evaluate("() => document.activeElement.className") == "loom-grid"


def test_a_filter_narrows_and_says_what_is_wrong(editor, shot):
    page = editor("many")
    page.keyboard.press("Control+a")
    count(page, f"{MANY} images, {MANY} selected")
    page.keyboard.press("/")
    page.keyboard.type("tag:cat AND NOT name:img_00*")
    count(page, f"195 of {MANY} images, 195 selected")  # nothing is selected unseen
    page.keyboard.press("Enter")
    page.keyboard.press("Home")
    assert selected(page) == ["sub/img_011.png"]
    page.keyboard.press("/")
    page.keyboard.type("tag:cat AND")
    expect(page.locator(".loom-filter-error")).to_be_visible(timeout=WAIT)
    shot("editor-filter")
    page.get_by_label("Examples of filters").click()
    page.get_by_role("button", name="no tags yet").click()
    count(page, f"0 of {MANY} images")
    page.get_by_text("No image fits this filter.").wait_for()
    page.get_by_label("Filter", exact=True).fill("")
    count(page, f"{MANY} images")


# -- focus


def draw_focus(page, start, end):
    """F, then a box drawn on the picture from one part of it to another."""
    page.keyboard.press("f")
    page.locator(".loom-picture-stage.drawing").wait_for()
    box = page.locator(".loom-picture-sheet").bounding_box()
    points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
    page.mouse.move(*points[0])
    page.mouse.down()
    page.mouse.move(*points[1], steps=3)
    page.mouse.up()


def test_a_focus_box_is_drawn_dragged_moved_by_keys_and_cleared(editor, client, shot):
    page = editor("focus")
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    page.locator(".loom-crop").first.wait_for(timeout=WAIT)
    opened = opened_at(client, "datasets/page-focus")
    image = cursor(page)

    def stored():
        return opened.told(f"/images/{image}")["focus"]

    draw_focus(page, (0.2, 0.2), (0.6, 0.7))
    drawn = until(page, stored, bool)
    assert drawn == pytest.approx([0.2, 0.2, 0.6, 0.7], abs=0.02)
    frame = page.locator(".loom-focus").bounding_box()
    sheet = page.locator(".loom-picture-sheet").bounding_box()
    page.mouse.move(frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2)
    page.mouse.down()
    page.mouse.move(frame["x"] + frame["width"] / 2 + 0.2 * sheet["width"], frame["y"] + frame["height"] / 2, steps=3)
    page.mouse.up()
    moved = until(page, stored, lambda box: box != drawn)
    assert moved == pytest.approx([0.4, 0.2, 0.8, 0.7], abs=0.02)
    shot("editor-focus")
    page.keyboard.press("Shift+ArrowRight")  # the box has the focus
    wider = until(page, stored, lambda box: box != moved)
    assert wider[:2] == moved[:2] and wider[2] > moved[2]
    page.keyboard.press("Control+z")
    until(page, stored, lambda box: box == moved)
    page.keyboard.press("Delete")
    until(page, stored, lambda box: box is None)
    expect(page.locator(".loom-focus")).to_be_hidden()
    page.keyboard.press("Escape")  # what had the focus is gone, keys go on
    expect(page.locator(".loom-picture")).to_be_hidden()


def test_boxes_stay_inside_and_keep_a_size(host_page, server):
    script = next(path for path in server.get("/extensions") if path.endswith("/tag_editor.js"))
    module = script.replace("tag_editor.js", "editor/focus_box.mjs")

    def box(call):
        return host_page.evaluate(f"async (module) => {{ const m = await import(module); return {call}; }}", module)

    assert box("m.movedBox([0.5, 0.5, 0.75, 0.75], 1, -1)") == [0.75, 0, 1, 0.25]
    assert box("m.resizedBox([0.25, 0.25, 0.75, 0.75], 'nw', -1, 0.125)") == [0, 0.375, 0.75, 0.75]
    assert box("m.resizedBox([0.25, 0.25, 0.75, 0.75], 'e', -1, 1)") == [0.25, 0.25, 0.26, 0.75]
    assert box("m.drawnBox([1.5, 0.5], [0.5, -1])") == [0.5, 0, 1, 0.5]
    assert box("m.drawnBox([0.5, 0.5], [0.505, 0.9])") is None


# -- what is unwritten, undone, written, left


def opened_at(client, name):
    found = next(each for each in client.get("/datasets").json["open"] if each["name"] == name)
    return Dataset(client, found["id"])


def test_edits_are_marked_undone_and_written(editor, client, folders, shot):
    page = editor("writing")
    opened_at(client, "datasets/page-writing").done("/operation", line='add "new" for "1.png", "2.png"')
    page.keyboard.press("u")  # another page has edited: this one finds out
    mark = page.locator(".loom-bar-mark")
    expect(mark).to_have_text("● 2 unwritten", timeout=WAIT)
    count(page, "2 of 6 images")
    expect(page.locator(".loom-tile-changed:visible")).to_have_count(2)
    page.keyboard.press("u")
    page.keyboard.press("Control+z")
    expect(mark).to_have_text("", timeout=WAIT)
    foot(page, "undone: add")
    page.keyboard.press("Control+y")
    expect(mark).to_have_text("● 2 unwritten", timeout=WAIT)
    shot("editor-unwritten")
    assert (folders["writing"] / "1.txt").read_text() == "cat, tag 1"
    page.keyboard.press("Control+s")
    foot(page, "2 captions written")
    assert (folders["writing"] / "1.txt").read_text() == "cat, tag 1, new"
    assert (folders["writing"] / "0.txt").read_text() == "cat, tag 0"
    expect(mark).to_have_text("")
    page.keyboard.press("Escape")
    expect(page.locator(EDITOR)).to_have_count(0)


def test_who_leaves_unwritten_edits_is_asked(editor, client, folders, shot):
    def edit(page):
        opened_at(client, "datasets/page-closing").done("/operation", line='add "new"')
        page.keyboard.press("u")
        expect(page.locator(".loom-bar-mark")).to_have_text("● 6 unwritten", timeout=WAIT)
        page.keyboard.press("Escape")

    page = editor("closing")
    edit(page)
    question = page.get_by_role("dialog", name="Unwritten captions")
    question.wait_for()
    shot("editor-question")
    page.keyboard.press("Escape")
    expect(question).to_have_count(0)
    assert page.locator(EDITOR).count() == 1
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Keep it open").click()
    expect(page.locator(EDITOR)).to_have_count(0)
    assert opened_at(client, "datasets/page-closing").told()["unsaved"] == 6

    page = editor("closing")
    expect(page.locator(".loom-bar-mark")).to_have_text("● 6 unwritten")
    page.get_by_label("Close (Escape)").click()
    page.get_by_role("button", name="Discard").click()
    expect(page.locator(EDITOR)).to_have_count(0)
    assert all(each["name"] != "datasets/page-closing" for each in client.get("/datasets").json["open"])

    edit(editor("closing"))
    page.get_by_role("button", name="Write them").click()
    expect(page.locator(EDITOR)).to_have_count(0, timeout=WAIT)
    assert (folders["closing"] / "5.txt").read_text() == "cat, tag 5, new"


def test_a_dataset_that_the_server_has_forgotten_opens_again(editor, client):
    page = editor("forgetting")
    opened = opened_at(client, "datasets/page-forgetting")
    opened.done("/operation", line='add "new"')
    page.keyboard.press("u")
    expect(page.locator(".loom-bar-mark")).to_have_text("● 6 unwritten", timeout=WAIT)
    opened.done("/close")
    page.keyboard.press("u")
    foot(page, "open again: edits of 6 images that were not written are lost")
    count(page, "6 images")
    page.keyboard.press("Control+a")
    count(page, "6 images, 6 selected")
    assert opened_at(client, "datasets/page-forgetting").path != opened.path


# -- keys


def test_keys_are_listed_and_stay_inside(editor, shot):
    page = editor("keys")
    page.evaluate(
        """() => {
            window.loomNode = app.graph._nodes[0];
            const tracker = app.extensionManager.workflow.activeWorkflow.changeTracker;
            (tracker.captureCanvasState ?? tracker.checkState).call(tracker);
            window.loomUndoable = tracker.undoQueue.length;
            window.loomKeys = [];
            window.addEventListener("keydown", (event) => window.loomKeys.push(event.key));
        }"""
    )
    assert page.evaluate("() => window.loomUndoable") > 0  # the host has something to undo
    page.keyboard.press("?")
    page.get_by_role("dialog", name="Keys", exact=True).get_by_text("draw a focus box").wait_for()
    shot("editor-keys")
    page.keyboard.press("Control+z")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog", name="Keys", exact=True)).to_have_count(0)
    page.keyboard.press("Control+z")
    foot(page, "nothing to undo")
    page.keyboard.press("/")
    page.keyboard.type("u?")  # typed, no keys of the editor
    expect(page.get_by_label("Filter", exact=True)).to_have_value("u?")
    expect(page.get_by_role("dialog", name="Keys", exact=True)).to_have_count(0)
    page.keyboard.press("Control+a")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.activeElement.className") == "loom-grid"
    page.keyboard.press("F6")
    assert page.evaluate("() => document.activeElement.getAttribute('role')") == "tab"
    page.keyboard.press("Shift+F6")
    for _ in range(60):  # the focus goes round inside the window
        page.keyboard.press("Tab")
        assert page.evaluate(
            "() => document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        )
    assert page.evaluate("() => window.loomKeys") == []
    page.wait_for_timeout(200)  # the host undoes a frame later
    assert page.evaluate("() => app.graph._nodes[0] === window.loomNode")


def test_the_page_saw_no_error_of_a_script(host_page):
    assert host_page.errors == []
