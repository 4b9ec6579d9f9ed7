"""What becomes of the editor's edits: captions in their files with backups, files that others changed, findings that
are fixed, and the program of a node, which runs."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from editor_client import Client, listed_by, put
from editor_panels import (
    ADD,
    APPLY,
    CAPTIONS,
    CHIP,
    WAIT,
    apply_line,
    choose,
    has,
    leave,
    open_folder,
    open_from,
    panel,
    said,
    texts,
    until,
    unwritten,
)

PROGRAM = """() => {
    const node = app.graph._nodes.find(({ type }) => type === "LoomTagEditor");
    return node.widgets.find(({ name }) => name === "program").value;
}"""


@pytest.fixture(scope="module")
def folders(server):
    """{name: path} of datasets, one for each test."""
    made = {}
    for name in ("writing", "conflict", "fixing"):
        made[name] = put(server.base / "datasets" / f"writing-{name}", CAPTIONS)
    for name in ("canvas", "vue"):  # a loader wants a caption for every picture
        made[name] = put(server.base / "datasets" / f"writing-{name}", {**CAPTIONS, "d.png": "ohwx"})
    listed_by(Client(server), made["vue"].name)
    return made


@pytest.fixture
def editor(host_page, folders):
    """editor(name): the window on that folder; closed after the test, with its edits."""
    yield lambda name: open_folder(host_page, folders[name])
    leave(host_page)


def test_captions_are_written_with_a_backup(editor, folders, shot):
    page, folder = editor("writing"), folders["writing"]
    before = texts(folder)
    apply_line(page, 'rename "kitty" to "cat"')
    apply_line(page, 'add "new" where name:d')
    write = panel(page, "Write")
    write.get_by_text("3 captions not in their files yet").wait_for(timeout=WAIT)
    write.get_by_role("button", name="Dry run").click()
    write.get_by_text("3 captions would be written into 3 files.").wait_for(timeout=WAIT)
    assert texts(folder) == before
    write.get_by_text("c.png", exact=True).click()
    expect(write.locator("ins")).to_have_text("cat", timeout=WAIT)
    shot("panels-write")
    write.get_by_role("button", name="Write 3 captions").click()
    write.get_by_text("3 captions were written into 3 files.").wait_for(timeout=WAIT)
    name = write.locator("code").inner_text(timeout=WAIT)
    after = texts(folder)
    [backup] = {path.rpartition("/")[0] for path in after if path.startswith(".lora_loom/")}
    assert name.endswith(backup) and not name.startswith("/")
    assert after["b.txt"] == b"ohwx, red hat, cat, what?" and after["c.txt"] == b"ohwx, cat, hat\r\n"
    assert after["d.txt"].strip() == b"new" and after["a.txt"] == before["a.txt"]
    assert {path: after[f"{backup}/{path}"] for path in ("b.txt", "c.txt")} == {
        path: before[path] for path in ("b.txt", "c.txt")
    }
    unwritten(page, 0)
    write.get_by_text("Every caption is in its file.").wait_for(timeout=WAIT)


def test_a_file_that_somebody_changed_is_refused_and_shown(editor, folders, shot):
    page, folder = editor("conflict"), folders["conflict"]
    apply_line(page, 'rename "kitty" to "cat"')
    (folder / "b.txt").write_bytes(b"theirs")
    write = panel(page, "Write")
    write.get_by_role("button", name="Dry run").click()
    write.get_by_text("1 image would be refused:").wait_for(timeout=WAIT)
    write.get_by_role("button", name="Write 2 captions").click()
    write.get_by_text("1 image was refused:").wait_for(timeout=WAIT)
    refused = "b.txt was changed since it was read: open the dataset again"
    expect(write.locator(".loom-refused li")).to_contain_text(refused)
    shot("panels-conflict")
    assert (folder / "b.txt").read_bytes() == b"theirs" and (folder / "c.txt").read_bytes() == b"ohwx, cat, hat\r\n"
    unwritten(page, 1)
    write.get_by_role("button", name="Show 1 image").click()
    panel(page, "Caption")
    has(page, "ohwx", "red hat", "cat", "what?")


def test_a_finding_is_fixed(editor, folders, shot):
    page = editor("fixing")
    findings = panel(page, "Findings")
    card = findings.locator("[data-rule=T021]").first
    card.wait_for(timeout=WAIT)
    count = int(findings.get_by_role("group").get_by_role("button", name="warning").inner_text().split()[1])
    assert count == findings.locator("li[data-level=warn]").count() > 0
    findings.get_by_role("group").get_by_role("button", name="warning").click()
    expect(findings.locator("li[data-level=warn]")).to_have_count(0)
    findings.get_by_role("group").get_by_role("button", name="warning").click()
    card.get_by_role("button", name="Select 1 image").click()
    expect(page.locator(".loom-bar-count")).to_contain_text("1 selected", timeout=WAIT)
    card.get_by_role("button", name=re.compile("Fix T021")).click()
    findings.get_by_text("1 image changes, of 1 looked at").wait_for(timeout=WAIT)
    shot("panels-findings")
    expect(page.locator(APPLY)).to_be_focused(timeout=WAIT)
    page.keyboard.press("Enter")
    said(page, "1 image changed")
    expect(findings.locator("[data-rule=T021]")).to_have_count(0, timeout=WAIT)
    panel(page, "Caption")
    has(page, "ohwx", "red hat", "smile")
    assert texts(folders["fixing"])["a.txt"] == CAPTIONS["a.png"].encode()


# -- a node's program


def test_edits_of_a_node_are_its_program_and_run(page, server, folders, shot):
    folder = folders[page.mode]
    before = texts(folder)
    page.evaluate(ADD, [folder.name, ["LoomTagEditor", "PreviewAny"]])
    queued(page, server)
    open_from(page, "LoomTagEditor")
    apply_line(page, 'rename "kitty" to "cat"')
    choose(page, "c.png")
    panel(page, "Caption")
    has(page, "ohwx", "cat", "hat")
    page.locator(f"{CHIP}[data-tag=hat]").focus()
    page.keyboard.press("Delete")
    has(page, "ohwx", "cat")
    lines = 'rename "kitty" to "cat"\nremove "hat" for "c.png"'
    until(lambda: page.evaluate(PROGRAM).strip(), lambda text: text == lines)
    program = panel(page, "Program")
    expect(program.get_by_label("Edit program")).to_have_value(re.compile('^rename "kitty" to "cat"\n'), timeout=WAIT)
    program.get_by_text("The program changes 2 images.").wait_for(timeout=WAIT)
    expect(program.get_by_label("Edit program")).not_to_be_editable()
    shot(f"panels-program-{page.mode}")
    leave(page)
    entry = queued(page, server)
    [report] = [output["text"] for output in entry["outputs"].values() if "text" in output]
    assert 'remove "hat" for "c.png": 1 image changed' in report[0]
    [sent] = [node for node in entry["prompt"][2].values() if node["class_type"] == "LoomTagEditor"]
    assert sent["inputs"]["program"].strip() == lines
    assert texts(folder) == before, "files are as they were"


def queued(page, server):
    """The history entry of the graph, once it has run."""
    before = set(server.get("/history"))
    page.evaluate("() => app.queuePrompt(0, 1)")
    new = until(lambda: set(server.get("/history")) - before, bool)
    entry = server.get("/history")[new.pop()]
    assert entry["status"]["status_str"] == "success", entry["status"]
    return entry


def test_the_page_saw_no_error_of_a_script(host_page):
    assert host_page.errors == []
