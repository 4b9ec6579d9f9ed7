"""The editor's panels in the host's real page: chips, completion, several images, all tags, bulk edits."""

from __future__ import annotations

import re

import pytest
from playwright.sync_api import expect

from editor_client import Client, listed_by, put
from editor_panels import APPLY, CAPTIONS, CHIP, WAIT, choose, has, leave, open_folder, panel, said, texts, unwritten

MANY_TAGS, PER_IMAGE = 50_000, 2_000


@pytest.fixture(scope="module")
def folders(server):
    """{name: path} of datasets, one for each test; and a tag list of the user's own."""
    made = {}
    for name in ("adding", "chips", "typing", "several", "light", "renaming", "table"):
        made[name] = put(server.base / "datasets" / f"panels-{name}", CAPTIONS)
    for first in range(0, MANY_TAGS, PER_IMAGE):
        tags = ", ".join(f"tag {number}" for number in range(first, first + PER_IMAGE))
        put(made["table"], {f"many/{first}.png": tags})
    lists = server.base / "user/lora_loom/tags"
    lists.mkdir(parents=True)
    lists.joinpath("mine.csv").write_text('speed_lines,0,12000,"motion_lines"\nhatsune_miku,4,150000,"miku"\n')
    listed_by(Client(server), made["table"].name)
    yield made
    lists.joinpath("mine.csv").unlink()
    lists.rmdir()


@pytest.fixture
def editor(host_page, folders):
    """editor(name): the window on that folder; closed after the test, with its edits."""
    yield lambda name: open_folder(host_page, folders[name])
    leave(host_page)


# -- one image and several


def test_a_tag_is_added_with_completion_by_the_keyboard_alone(editor, folders, shot):
    page = editor("adding")
    keyboard = page.keyboard
    keyboard.press("Home")
    has(page, "ohwx", "red_hat", "red hat", "smile")
    keyboard.press("t")
    keyboard.type("mot")
    options = page.get_by_role("listbox", name="Tags", exact=True).get_by_role("option")
    expect(options).to_have_text(["motion lines → speed lines12k"], timeout=WAIT)
    shot("panels-completion")
    keyboard.press("ArrowDown")
    keyboard.press("Enter")
    has(page, "ohwx", "red_hat", "red hat", "smile", "speed lines")
    keyboard.type("kit")  # the focus stayed in the field
    expect(options).to_have_text(["kitty2 here"], timeout=WAIT)
    keyboard.press("Enter")  # nothing was chosen: what was typed is taken
    has(page, "ohwx", "red_hat", "red hat", "smile", "speed lines", "kit")
    keyboard.type("kit")
    expect(options).to_have_text(["kitty2 here", "kit1 here"], timeout=WAIT)
    keyboard.press("Escape")
    expect(options).to_have_count(0)
    expect(page.locator("[data-loom=add]")).to_be_focused()
    keyboard.type("ty, new")
    keyboard.press("Shift+Enter")
    has(page, "kitty", "new", "ohwx", "red_hat", "red hat", "smile", "speed lines", "kit")
    assert texts(folders["adding"])["a.txt"] == CAPTIONS["a.png"].encode()


def test_chips_are_removed_edited_and_moved(editor, shot):
    page = editor("chips")
    keyboard = page.keyboard
    choose(page, "b.png")
    has(page, "ohwx", "red hat", "kitty", "what?")
    page.locator(CHIP).first.focus()
    keyboard.press("End")
    keyboard.press("Alt+ArrowLeft")
    has(page, "ohwx", "red hat", "what?", "kitty")
    keyboard.press("Alt+ArrowLeft")
    has(page, "ohwx", "what?", "red hat", "kitty")
    expect(page.locator(f"{CHIP}[data-tag='what?']")).to_be_focused()
    keyboard.press("Delete")
    keyboard.press("Delete")
    has(page, "ohwx", "kitty")
    keyboard.press("F2")
    keyboard.type("black cat")
    keyboard.press("Enter")
    has(page, "ohwx", "black cat")
    text = page.get_by_label("Caption as text")
    expect(text).to_have_value("ohwx, black cat")
    text.fill("ohwx, one, two, one, (three:1.2)")
    keyboard.press("Control+Enter")
    has(page, "ohwx", "one", "two", "one", "(three:1.2)")
    expect(page.locator(".loom-shown")).to_have_text("ohwx, one, two, one, (three:1.2)")
    expect(page.locator(".loom-diff ins").first).to_have_text(re.compile("one"))
    expect(page.get_by_role("option", name="three, weight 1.2")).to_be_visible()
    page.locator(CHIP).nth(3).get_by_role("button", name="Remove one").click()  # the second of two that are alike
    has(page, "ohwx", "one", "two", "(three:1.2)")
    drag(page, 3, 1)
    has(page, "ohwx", "(three:1.2)", "one", "two")
    shot("panels-caption")
    for _ in range(3):
        keyboard.press("Control+z")
    has(page, "ohwx", "black cat")


def drag(page, source, target):
    """A chip onto the left half of another one."""
    boxes = [page.locator(CHIP).nth(index).bounding_box() for index in (source, target)]
    (x, y), (to_x, to_y) = [(box["x"] + 12, box["y"] + box["height"] / 2) for box in boxes]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 20, y, steps=3)
    page.mouse.move(to_x - 6, to_y, steps=5)
    page.mouse.up()


def test_what_is_typed_is_not_lost_when_another_image_is_chosen(editor):
    page = editor("typing")
    choose(page, "a.png")
    has(page, "ohwx", "red_hat", "red hat", "smile")
    page.get_by_label("Caption as text").fill("line one,\nline two")
    choose(page, "c.png")
    has(page, "ohwx", "kitty", "hat")
    unwritten(page, 1)
    choose(page, "a.png")
    has(page, "line one", "line two")
    page.locator(CHIP).first.focus()
    page.keyboard.press("Alt+ArrowRight")
    expect(page.get_by_label("Caption as text")).to_have_value("line two,\nline one", timeout=WAIT)
    page.get_by_label("Caption as text").fill("taken back")
    page.keyboard.press("Escape")
    expect(page.get_by_label("Caption as text")).to_have_value("line two,\nline one")


def test_tags_of_several_images(editor, shot):
    page = editor("several")
    choose(page, "a.png", "b.png", "c.png")
    common = page.get_by_role("listbox", name="Tags of all selected images")
    partial = page.get_by_role("listbox", name="Tags of some selected images")
    expect(common.get_by_role("option")).to_have_text(["ohwx×"], timeout=WAIT)
    expect(partial.get_by_role("option", name="kitty, 2 of 3")).to_be_visible()
    shot("panels-several")
    partial.get_by_role("option", name="kitty, 2 of 3").click()
    expect(common.get_by_role("option")).to_have_count(2, timeout=WAIT)
    partial.get_by_role("option", name="smile, 1 of 3").focus()
    page.keyboard.press("Delete")
    expect(partial.get_by_role("option", name="smile, 1 of 3")).to_have_count(0, timeout=WAIT)
    common.get_by_role("option", name="ohwx").focus()
    page.keyboard.press("F2")
    page.keyboard.type("zorb")
    page.keyboard.press("Enter")
    expect(common.get_by_role("option", name="zorb")).to_be_focused(timeout=WAIT)
    page.get_by_label("Add tags").fill("x, y")
    page.keyboard.press("Enter")
    expect(common.get_by_role("option")).to_have_count(4, timeout=WAIT)
    choose(page, "a.png")
    has(page, "zorb", "red_hat", "red hat", "kitty", "x", "y")


# -- all tags


def test_a_table_of_fifty_thousand_tags(editor, shot):
    page = editor("table")
    table = panel(page, "Tags").get_by_role("listbox", name="Tags of the dataset")
    rows = table.get_by_role("option")
    expect(rows.first).to_have_text("ohwx3", timeout=WAIT)
    assert rows.count() < 100 and table.evaluate("(table) => table.scrollHeight") > 1_000_000
    page.get_by_label("Find tags").fill("g 4999")
    expect(rows).to_have_text(["tag 49991", *[f"tag 4999{digit}1" for digit in range(10)]], timeout=WAIT)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    expect(page.locator(".loom-bar-count")).to_contain_text("1 of 29 images", timeout=WAIT)
    expect(page.get_by_label("Filter", exact=True)).to_have_value('tag:"tag 49999"')
    page.keyboard.press("Enter")
    expect(page.locator(".loom-bar-count")).to_have_text("29 images", timeout=WAIT)
    page.get_by_label("Find tags").fill("what?")
    rows.first.click()
    expect(page.locator(".loom-bar-count")).to_contain_text("1 of 29 images", timeout=WAIT)
    shot("panels-tags")
    page.keyboard.press("Delete")
    page.get_by_text("1 image changes, of 29 looked at").wait_for(timeout=WAIT)
    expect(page.locator(APPLY)).to_be_focused(timeout=WAIT)
    page.keyboard.press("Enter")
    said(page, "1 image changed")
    expect(rows).to_have_count(0, timeout=WAIT)
    unwritten(page, 1)


# -- bulk edits


def test_a_bulk_rename_is_previewed_done_and_undone(editor, folders, shot):
    page = editor("renaming")
    before = texts(folders["renaming"])
    page.keyboard.press("Control+g")
    bulk = page.get_by_role("tabpanel", name="Bulk")
    expect(bulk.get_by_label("Tag", exact=True)).to_be_focused()
    page.keyboard.type("kit")
    options = page.get_by_role("listbox", name="Tags", exact=True).get_by_role("option")
    expect(options).to_have_text(["kitty2 here"], timeout=WAIT)
    page.keyboard.press("Tab")
    expect(bulk.get_by_label("Tag", exact=True)).to_have_value("kitty")
    page.keyboard.press("Tab")
    page.keyboard.type("cat")
    line = bulk.get_by_label("Line of the edit program")
    expect(line).to_have_value('rename "kitty" to "cat"')
    bulk.get_by_text("2 images change, of 4 looked at").wait_for(timeout=WAIT)
    expect(bulk.locator(".loom-example-name")).to_have_text(["b.png", "c.png"])
    expect(bulk.locator("ins").first).to_have_text("cat")
    assert texts(folders["renaming"]) == before and page.get_by_role("button", name="Undo").first.is_disabled()
    shot("panels-bulk")
    choose(page, "b.png")
    bulk.get_by_label("selected").check()
    bulk.get_by_text("1 image changes, of 1 looked at").wait_for(timeout=WAIT)
    page.get_by_label("Filter", exact=True).fill("name:c")
    bulk.get_by_label("the filter").check()
    expect(bulk.locator(".loom-suffix")).to_have_text("where name:c", timeout=WAIT)
    bulk.get_by_text("1 image changes, of 1 looked at").wait_for(timeout=WAIT)
    bulk.get_by_label("all 4 images").check()
    line.fill('rename "kity" to "cat"')
    bulk.get_by_text("no tag there fits “kity” (is “kitty” meant?)").wait_for(timeout=WAIT)
    expect(page.locator(APPLY)).to_be_disabled()
    line.fill("renam")
    bulk.get_by_text("the nearest is rename").wait_for(timeout=WAIT)
    line.fill('rename "kitty" to "cat"')
    expect(page.locator(APPLY)).to_be_enabled(timeout=WAIT)
    line.press("Control+Enter")
    said(page, "2 images changed")
    unwritten(page, 2)
    assert texts(folders["renaming"]) == before, "files are as they were"
    page.get_by_role("button", name="Undo").last.click()
    unwritten(page, 0)
    said(page, 'undone: rename "kitty" to "cat"')
    assert texts(folders["renaming"]) == before


# -- how it looks


def test_it_follows_a_light_theme(editor, shot):
    page = editor("light")
    page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'light')")
    try:
        choose(page, "a.png")
        has(page, "ohwx", "red_hat", "red hat", "smile")
        page.wait_for_function(
            """() => {
                const shown = getComputedStyle(document.querySelector(".loom-editor .loom-chip"));
                const parts = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
                const light = (colour) => parts(colour).reduce((sum, part) => sum + part);
                return light(shown.color) < light(shown.backgroundColor);
            }""",
            timeout=WAIT,
        )
        for name in ("Caption", "Tags", "Bulk", "Findings"):
            panel(page, name)
            page.wait_for_timeout(400)
            shot(f"panels-light-{name.lower()}")
    finally:
        page.evaluate("() => app.extensionManager.setting.set('Comfy.ColorPalette', 'dark')")


def test_the_page_saw_no_error_of_a_script(host_page):
    assert host_page.errors == []
