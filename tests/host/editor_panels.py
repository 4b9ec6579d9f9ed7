"""What tests of the editor's panels share: folders of captions, the window on one of them, chips, panels, verdicts."""

from __future__ import annotations

import re
import time

from playwright.sync_api import expect

WAIT = 30_000  # milliseconds, on a busy machine
EDITOR, CHIP = ".loom-editor", '[aria-label="Tags of this image"] .loom-chip'
APPLY = ".loom-panel:not([hidden]) .loom-proposal .primary"
CAPTIONS = {
    "a.png": "ohwx, red_hat, red hat, smile",
    "b.png": "ohwx, red hat, kitty, what?",
    "c.png": "ohwx, kitty, hat\r\n",
    "d.png": "",
}
ADD = """([folder, nodes]) => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    const [loader, ...others] = ["LoomDatasetLoader", ...nodes].map((type, index) => {
        const node = LiteGraph.createNode(type);
        node.pos = [60 + 380 * index, 120];
        app.graph.add(node);
        return node;
    });
    for (const [name, value] of Object.entries({ root: "datasets", folder }))
        loader.widgets.find((widget) => widget.name === name).value = value;
    const [editor, report] = others;
    if (editor) loader.connect(0, editor, 0);
    if (report) editor.connect(1, report, 0);
}"""
OPEN = """(type) => {
    const node = app.graph._nodes.find((each) => each.type === type);
    node.widgets.find(({ name }) => name === "Open editor").callback();
}"""
TAGS = "(chips) => chips.map((chip) => chip.dataset.tag)"


def open_folder(page, folder):
    """The window on a folder, as a Dataset Loader opens it."""
    page.evaluate(ADD, [folder.name, []])
    open_from(page, "LoomDatasetLoader")
    return page


def open_from(page, node):
    page.evaluate(OPEN, node)
    page.locator(".loom-tile img.there").first.wait_for(timeout=WAIT)


def leave(page, how="Discard the edits"):
    """Close the window; ``how`` answers the question that unwritten edits raise."""
    for _ in range(8):
        if not page.locator(EDITOR).count():
            break
        answer = page.get_by_role("button", name=how)
        if answer.count():
            answer.click()
        else:
            page.keyboard.press("Escape")
        page.wait_for_timeout(50)
    expect(page.locator(EDITOR)).to_have_count(0)


def choose(page, *names):
    """Select images by their names, with the mouse."""
    for index, name in enumerate(names):
        page.locator(f'.loom-tile[aria-label^="{name}"] .loom-tile-picture').click(
            modifiers=["Control"] if index else []
        )


def panel(page, name):
    page.get_by_role("tab", name=re.compile(name)).click()
    return page.get_by_role("tabpanel", name=re.compile(name))


def has(page, *tags):
    """Wait until the chips of one image are these."""
    until(lambda: page.locator(CHIP).evaluate_all(TAGS), lambda found: found == [*tags])


def said(page, text):
    expect(page.locator(".loom-foot-text")).to_contain_text(text, timeout=WAIT)


def unwritten(page, count):
    expect(page.get_by_role("tab", name=re.compile("Write"))).to_have_text(f"Write{count or ''}", timeout=WAIT)


def until(call, wanted):
    """What ``call`` returns, once it is as wanted."""
    end = time.monotonic() + WAIT / 1000
    while not wanted(found := call()):
        assert time.monotonic() < end, found
        time.sleep(0.05)
    return found


def texts(folder):
    """Every caption file and backup with its bytes."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.txt"))}


def apply_line(page, text):
    bulk = panel(page, "Bulk")
    line = bulk.get_by_label("Line of the edit program")
    line.fill(text)
    expect(page.locator(APPLY)).to_be_enabled(timeout=WAIT)
    page.locator(APPLY).click()
    said(page, "changed")
    expect(page.locator(APPLY)).to_be_disabled(timeout=WAIT)
