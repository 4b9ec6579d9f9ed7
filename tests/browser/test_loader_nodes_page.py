"""The loader's weights in the host's real page: bars and a curve that are drawn from the text and written into it."""

from __future__ import annotations

import time

import pytest
from PIL import Image

from demo_lora import put_demo_lora
from lora_loom.kernels.strengths.schedule import parse

LORA = "weights page.safetensors"
LOADER = "app.graph._nodes.find((node) => node.type === 'LoomLoRALoaderAdvanced')"
ADD = """([lora, values]) => {
    for (const node of [...app.graph._nodes]) app.graph.remove(node);
    const node = LiteGraph.createNode("LoomLoRALoaderAdvanced");
    node.pos = [300, -280]; // so that the open panel lies in the middle of the page
    app.graph.add(node);
    for (const [name, value] of Object.entries({ lora_name: lora, ...values })) {
        const widget = node.widgets.find((each) => each.name === name);
        widget.value = value;
        widget.callback?.(value);
    }
    [app.canvas.ds.scale, app.canvas.ds.offset] = [1, [0, 0]];
    app.canvas.setDirty(true, true);
}"""
SAMPLE = f"""() => {{
    const make = (type, values = {{}}) => {{
        const node = LiteGraph.createNode(type);
        node.pos = [1500, 60];
        app.graph.add(node);
        for (const [name, value] of Object.entries(values)) {{
            node.widgets.find((each) => each.name === name).value = value;
        }}
        return node;
    }};
    const lora = {LOADER};
    const base = make("CheckpointLoaderSimple", {{ ckpt_name: "loom-demo-base.safetensors" }});
    const [yes, no] = [make("CLIPTextEncode", {{ text: "a zorb" }}), make("CLIPTextEncode")];
    const empty = make("EmptyChromaRadianceLatentImage", {{ width: 32, height: 32 }});
    const sampler = make("KSampler", {{ seed: 3, control_after_generate: "fixed", steps: 2, cfg: 1 }});
    const decode = make("VAEDecode");
    const save = make("SaveImage", {{ filename_prefix: "weights page" }});
    base.connect(0, lora, 0);
    base.connect(1, yes, 0);
    base.connect(1, no, 0);
    lora.connect(0, sampler, 0);
    yes.connect(0, sampler, 1);
    no.connect(0, sampler, 2);
    empty.connect(0, sampler, 3);
    sampler.connect(0, decode, 0);
    base.connect(2, decode, 1);
    decode.connect(0, save, 0);
}}"""
PLACE = f"() => [...{LOADER}.pos]"
VALUE = f"(name) => {LOADER}.widgets.find((widget) => widget.name === name).value"
HAS = f"([name, text]) => {LOADER}.widgets.find((widget) => widget.name === name).value === text"
TYPE = f"""([name, text]) => {{
    const widget = {LOADER}.widgets.find((each) => each.name === name);
    widget.value = text;
    widget.callback?.(text);
}}"""


@pytest.fixture(scope="module", autouse=True)
def lora(server):
    put_demo_lora(server, LORA)


@pytest.fixture
def loader(page):
    """loader(blocks=…, steps=…): a graph of one node with these texts, its panel open and drawn."""

    def add(**values):
        page.evaluate(ADD, [LORA, values])
        line = page.locator(".loom-weights-line")
        line.wait_for()
        line.click()
        bar(page, "middle").wait_for()
        return page

    return add


def bar(page, name):
    return page.get_by_role("slider", name=name, exact=True)


def weight(page, name, wanted):
    """Wait until a bar has this weight."""
    page.locator(f".loom-weights [aria-label='{name}'][aria-valuenow='{wanted}']").wait_for(timeout=20_000)


def text(page, name, wanted):
    try:
        page.wait_for_function(HAS, arg=[name, wanted], timeout=20_000)
    except Exception:
        pytest.fail(f"{name} is {page.evaluate(VALUE, name)!r}, expected {wanted!r}")


def read(page):
    """Wait until the server has read the texts that are there now."""
    with page.expect_response(lambda answer: answer.url.endswith("/lora_loom/blocks"), timeout=20_000):
        page.evaluate(TYPE, ["steps", page.evaluate(VALUE, "steps")])


def dragged(page, slider, up, steps=4):
    box = slider.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    place = page.evaluate(PLACE)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x, y - up, steps=steps)
    page.mouse.up()
    assert page.evaluate(PLACE) == place  # and the node stays where it is


def test_closed_it_is_one_line_that_tells_the_weights(page):
    page.evaluate(ADD, [LORA, {"blocks": "in=0.5", "steps": "0.2@1, 0.6@6"}])
    line = page.locator(".loom-weights-line")
    page.locator(".loom-weights-short", has_text="in 0.5").wait_for()
    assert line.inner_text().split("\n")[1:] == ["weights", "in 0.5 · mid 1 · out 1 · steps 0.2 → 0.6"]
    assert line.get_attribute("aria-expanded") == "false"
    assert not page.locator(".loom-weights-body").is_visible()
    assert page.locator(".loom-weights").bounding_box()["height"] < 40


def test_bars_are_drawn_from_the_text_and_written_into_it(loader):
    page = loader(blocks="in=0.5, attn=0.25")
    weight(page, "All of in", "0.5")
    before = bar(page, "middle").locator(".loom-weights-fill").bounding_box()["height"]
    dragged(page, bar(page, "middle"), -14)
    value = bar(page, "middle").get_attribute("aria-valuenow")
    assert 0 < float(value) < 1
    text(page, "blocks", f"middle={value}, in=0.5, attn=0.25")  # before what no bar shows, so that this goes on acting
    assert bar(page, "middle").locator(".loom-weights-fill").bounding_box()["height"] < before
    page.evaluate(TYPE, ["blocks", "mid=0.75, attn=0.25"])
    weight(page, "middle", "0.75")
    weight(page, "All of in", "1")
    kept = page.locator(".loom-weights-kept")
    assert "attn=0.25" in kept.inner_text() and "mid" not in kept.inner_text()
    assert "0.25" in bar(page, "middle").get_attribute("aria-valuetext")  # its attention is not at 0.75

    dragged(page, page.get_by_role("slider", name="All of out"), 40)
    high = float(page.get_by_role("slider", name="All of out").get_attribute("aria-valuenow"))
    assert high > 1
    text(page, "blocks", f"out={high:g}, mid=0.75, attn=0.25")


def test_typing_into_the_widget_moves_the_bars(loader):
    page = loader()
    field = page.locator("textarea[placeholder='blocks']").first
    if not field.count():
        field = page.locator("textarea").first
    field.fill("OUT2=-0.4")
    weight(page, "output.2", "-0.4")
    assert bar(page, "output.2").locator("[data-negative]").count() == 1


def test_a_number_is_typed_and_reset_and_one_alone(loader):
    page = loader(blocks="in=0.5")
    weight(page, "All of in", "0.5")
    bar(page, "middle").dblclick()
    page.keyboard.type("-1.75")
    page.keyboard.press("Enter")
    text(page, "blocks", "middle=-1.75\nin=0.5")
    assert page.evaluate("() => document.activeElement.dataset.bar") == "middle_block"
    read(page)
    page.keyboard.press("Delete")
    text(page, "blocks", "in=0.5")
    read(page)
    page.get_by_role("button", name="Solo").click()
    text(page, "blocks", "all=0\nmiddle=1")
    weight(page, "All of in", "0")
    page.get_by_role("button", name="Solo").click()
    text(page, "blocks", "in=0.5")
    weight(page, "All of in", "0.5")
    page.get_by_role("button", name="Reset").click()
    text(page, "blocks", "")


def test_all_of_it_by_the_keyboard(page):
    page.evaluate(ADD, [LORA, {}])
    page.locator(".loom-weights-short", has_text="1 everywhere").wait_for()
    page.locator(".loom-weights-line").focus()
    page.keyboard.press("Enter")
    bar(page, "middle").wait_for()
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.dataset.group") == "in":
            break
    page.keyboard.press("ArrowDown")
    text(page, "blocks", "in=0.95")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Home")
    named = page.evaluate("() => document.activeElement.getAttribute('aria-label')")
    assert named.startswith("input.")
    text(page, "blocks", f"in=0.95\n{named}=0")
    page.keyboard.press("PageUp")
    page.keyboard.press("Shift+ArrowUp")
    text(page, "blocks", f"in=0.95\n{named}=0.26")
    page.keyboard.press("Enter")
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    text(page, "blocks", f"in=0.95\n{named}=2")
    page.keyboard.press("Backspace")  # of the bar, not of the node
    text(page, "blocks", f"in=0.95\n{named}=1")
    assert page.evaluate(f"() => Boolean({LOADER})")


def test_a_wheel_turns_what_has_the_focus_only(loader):
    page = loader()
    box = bar(page, "middle").bounding_box()
    page.mouse.move(box["x"] + 5, box["y"] + 5)
    bar(page, "middle").click()
    page.mouse.wheel(0, 100)
    text(page, "blocks", "middle=0.95")


def test_a_vector_keeps_its_form(loader):
    page = loader()
    count = page.locator("[data-bar]").count() - 1  # without the text encoders: BASE and every block
    vector = ",".join(["1"] * count)
    page.evaluate(TYPE, ["blocks", vector])
    read(page)
    if page.locator(".loom-weights-kept").is_visible():  # a file has a part of the model's blocks only
        assert vector in page.locator(".loom-weights-kept").inner_text()
    weight(page, "middle", "1")
    bar(page, "middle").focus()
    page.keyboard.press("Home")
    weight(page, "middle", "0")
    found = page.evaluate(VALUE, "blocks")
    assert found.startswith("1,") and "0" in found and found.count(",") == count - 1


def test_presets_are_offered_and_written_as_their_name(loader):
    page = loader(blocks="in=0.5, attn=0.25")
    presets = page.get_by_role("combobox", name="Presets of block weights")
    presets.locator("option", has_text="ALL0.5").wait_for(state="attached")
    presets.select_option("ALL0.5")
    text(page, "blocks", "ALL0.5\nattn=0.25")
    weight(page, "middle", "0.5")


def test_what_is_not_understood_is_left_alone(loader):
    page = loader(blocks="in=0.5")
    page.evaluate(TYPE, ["blocks", "in=much"])
    alert = page.get_by_role("alert").filter(has_text="blocks: in: 'much' is no weight")
    alert.wait_for()
    bar(page, "middle").focus()
    page.keyboard.press("Home")
    dragged(page, bar(page, "middle"), 30)
    assert page.evaluate(VALUE, "blocks") == "in=much"
    assert "not understood" in page.locator(".loom-weights-line").inner_text()
    page.evaluate(TYPE, ["blocks", "out=0.1@1, 0.6@6"])  # a change over the run is no bar's
    alert.wait_for(state="hidden")
    bar(page, "middle").focus()
    page.keyboard.press("Home")
    text(page, "blocks", "middle=0\nout=0.1@1, 0.6@6")


def test_a_curve_is_drawn_by_the_mouse(loader):
    page = loader(steps="0.2@10%, 1@0.5")
    points = page.locator(".loom-weights-point")
    points.nth(1).wait_for()
    plot = page.locator(".loom-weights-plot").bounding_box()
    page.mouse.click(plot["x"] + plot["width"] * 0.9, plot["y"] + plot["height"] / 2)
    points.nth(2).wait_for()
    steps = page.evaluate(VALUE, "steps")
    assert steps.startswith("0.2@10%, 1@0.5, ")  # what is not touched stays as it was written
    first, second, third = parse(steps, "steps").points
    assert (third.unit, 0.85 < third.position < 0.95, 0 < third.weight < 1) == ("fraction", True, True)

    dragged(page, points.nth(0), 30)
    moved = page.evaluate(VALUE, "steps").split(", ")
    assert moved[1:] == steps.split(", ")[1:] and parse(moved[0], "steps").constant > first.weight
    told = [handle.get_attribute("aria-valuetext") for handle in points.all()]
    assert told == moved

    page.keyboard.press("Delete")
    text(page, "steps", ", ".join(moved[1:]))
    page.get_by_role("combobox", name="Between two points").select_option("cosine")
    text(page, "interpolation", "cosine")
    corners = page.locator(".loom-weights-plot polyline").get_attribute("points").split()
    assert len(corners) > 20


def test_a_curve_by_the_keyboard_and_every_clock(loader):
    page = loader()
    unit = page.get_by_role("combobox", name="How the points are counted")
    for clock, wanted in {
        "fraction": ["1@0%, 1@50%", "1@0%, 0.95@55%", "1@0%, 0.5@s2"],
        "step": ["1@1, 1@11", "1@1, 0.95@12", "1@1, 0.5@15"],
        "sigma": ["1@s15, 1@s3.75", "1@s15, 0.95@s3.563", "1@s15, 0.5@s2.5"],
    }.items():
        unit.select_option(clock)
        page.get_by_role("button", name="Add a point").focus()
        page.keyboard.press("Enter")
        text(page, "steps", wanted[0])
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowRight")
        text(page, "steps", wanted[1])
        weights = [handle.get_attribute("aria-valuenow") for handle in page.locator(".loom-weights-point").all()]
        assert [float(one) for one in weights] == [point.weight for point in parse(wanted[1], "steps").points]
        page.keyboard.press("Enter")
        page.keyboard.type(wanted[2].split(", ")[1])
        page.keyboard.press("Enter")
        text(page, "steps", wanted[2])
        if clock == "fraction":  # two clocks in one text are no curve
            page.get_by_text("counted by different clocks").wait_for()
            page.evaluate(TYPE, ["steps", ""])
            page.get_by_text("counted by different clocks").wait_for(state="hidden")
            continue
        for _ in range(2):
            read(page)
            page.locator(".loom-weights-point").first.focus()
            page.keyboard.press("Delete")
        text(page, "steps", "")


def test_the_image_that_is_sampled_changes_and_a_run_tells_the_models_blocks(loader, server):
    page = loader()
    page.evaluate(SAMPLE)
    plain = sampled(page, server)
    page.get_by_text("A run shows all blocks of the model").wait_for(state="hidden", timeout=20_000)
    assert page.locator("[data-bar][data-off]").count() < page.locator("[data-bar]").count()
    page.get_by_role("slider", name="All of out").focus()
    page.keyboard.press("Home")
    text(page, "blocks", "out=0")
    changed = sampled(page, server)
    assert changed != plain
    page.get_by_role("slider", name="All of out").focus()
    page.keyboard.press("End")
    text(page, "blocks", "out=1")
    page.evaluate(TYPE, ["force_reload", True])
    assert sampled(page, server) == plain


def sampled(page, server):
    """The pixels of the picture that a queue leaves on the disk."""
    folder = server.base / "output"
    before = set(server.get("/history"))
    page.evaluate("() => app.queuePrompt(0, 1)")
    deadline = time.monotonic() + 120
    while not (new := set(server.get("/history")) - before):
        assert time.monotonic() < deadline, server.log_tail()
        page.wait_for_timeout(100)
    entry = server.get("/history")[new.pop()]
    assert entry["status"]["status_str"] == "success", server.log_tail()
    [item] = [
        item for output in entry["outputs"].values() for item in output.get("images", ()) if item["type"] == "output"
    ]
    with Image.open(folder / item["subfolder"] / item["filename"]) as picture:
        return picture.tobytes()


def test_a_workflow_keeps_the_texts_and_an_open_panel(loader, shot):
    page = loader(blocks="in=0.5\nattn=0.2", steps="0.2@1, 1@4")
    weight(page, "All of in", "0.5")
    saved = page.evaluate("() => app.graph.serialize()")
    values = saved["nodes"][0]["widgets_values"]
    assert "in=0.5\nattn=0.2" in values and "0.2@1, 1@4" in values
    assert len(values) == page.evaluate(f"() => {LOADER}.widgets.length") - 1  # the panel holds nothing
    page.evaluate("(saved) => app.loadGraphData(saved)", saved)
    weight(page, "All of in", "0.5")
    assert page.locator(".loom-weights-point").count() == 2
    shot(f"weights of a loader, {page.mode}")


def test_the_node_gives_back_the_room_of_a_closed_panel(loader):
    page = loader(blocks="in=0.5")
    weight(page, "All of in", "0.5")
    page.wait_for_function(f"() => {LOADER}.size[1] >= {LOADER}.computeSize()[1] - 1")
    height = page.evaluate(f"() => {LOADER}.size[1]")
    page.locator(".loom-weights-line").click()
    page.wait_for_function(f"(before) => {LOADER}.size[1] < before - 150", arg=height)
    page.locator(".loom-weights-line").click()
    page.wait_for_function(f"(before) => Math.abs({LOADER}.size[1] - before) < 8", arg=height)


def test_a_pair_has_it_too(page):
    page.evaluate(ADD.replace("LoomLoRALoaderAdvanced", "LoomLoRAPair"), [LORA, {"blocks": "mid=0.5"}])
    page.locator(".loom-weights-short", has_text="mid 0.5").wait_for()
    page.locator(".loom-weights-line").click()
    page.get_by_role("button", name="Add a point").click()
    page.get_by_role("combobox", name="Between two points").select_option("linear")  # no widget: it stands in the text
    steps = "app.graph._nodes[0].widgets.find((widget) => widget.name === 'steps').value"
    page.wait_for_function(f"() => {steps} === '1@0%, 1@50% linear'")


def test_the_page_saw_no_error_of_a_script(page):
    assert page.errors == []
