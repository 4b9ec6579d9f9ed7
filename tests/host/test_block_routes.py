"""What the page is told of strengths on the real server: read by the parser, by no other page, of known LoRAs only."""

import pytest
import torch

import tiny
from applying import lora_on
from demo_lora import put_demo_lora
from editor_client import TOKEN, Client
from lora_loom.host import block_routes
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors

NAME = "bars of a file.safetensors"


@pytest.fixture(scope="module")
def page(server):
    """With a LoRA of SD1.5 in the server's folder."""
    _, lora = lora_on(tiny.tiny("sd15"), preset="attention", conv=False)
    save_tensors(LoraModel(lora), server.base / "models/loras" / NAME)
    return Client(server)


def ask(page, path="/blocks", **body):
    answer = page.post(path, body)
    return answer.status, answer.json


def test_a_files_blocks_and_a_text(page):
    status, found = ask(page, blocks="in=0.5, IN99=2", steps="0.1@1, 0.6@6", lora=NAME)
    blocks, steps = found["blocks"], found["steps"]
    assert status == 200 and blocks["source"] == "file"
    groups = {group["label"]: group for group in blocks["groups"]}
    assert set(groups) == {"in", "mid", "out", "other"} and groups["in"]["selector"] == "in"
    assert [bar["selector"] for bar in groups["other"]["bars"]] == ["base", "te"]
    assert all(blocks["bars"][bar["id"]] == {"weight": 0.5, "others": ""} for bar in groups["in"]["bars"])
    assert [rule["kept"] for rule in blocks["rules"]] == [False, True] and "99" in blocks["rules"][1]["fault"]
    assert [point["text"] for point in steps["points"]] == ["0.1@1", "0.6@6"]


def test_errors_are_told_in_the_parsers_words(page):
    _, found = ask(page, blocks="in=much", steps="1@noon", lora=NAME)
    assert found["blocks"]["error"].startswith("blocks: in: 'much' is no weight")
    assert found["steps"]["error"].startswith("steps: 'noon' is no place in a run")
    assert found["blocks"]["groups"]


def test_places_are_counted_as_the_page_counts(page):
    text = "\U0001f408=1, in=0.5"
    _, found = ask(page, blocks=text, lora=NAME)
    begin = found["blocks"]["rules"][1]["begin"]
    assert text.encode("utf-16-le")[2 * begin :].decode("utf-16-le") == "in=0.5"


@pytest.mark.parametrize(
    "name", ["", "nothing.safetensors", "../../secret.safetensors", "/etc/passwd", "run: none", "\0"]
)
def test_other_names_tell_nothing(page, name):
    status, found = ask(page, blocks="in=0.5", lora=name)
    assert status == 200 and found["blocks"] == {"source": None}


def test_the_model_of_a_run_counts_more_than_the_file(page, server):
    """What the node gives out after a run names the model's blocks, also those that the file has nothing of."""
    name = "bars of the demo base.safetensors"
    put_demo_lora(server, name)
    prompt = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "loom-demo-base.safetensors"}},
        "2": {
            "class_type": "LoomLoRALoaderAdvanced",
            "inputs": {
                **{"model": ["1", 0], "clip": ["1", 1], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0},
                "picture": False,
            },
        },
        "3": {"class_type": "PreviewAny", "inputs": {"source": ["2", 3]}},
    }
    before = ask(page, lora=name)[1]["blocks"]
    assert before["source"] == "file"
    [told] = server.run(prompt)["2"]["loom_blocks"]
    assert told["on"]
    for body in ({"lora": name}, {"layout": told["layout"]}):
        blocks = ask(page, blocks="1,0,1", **body)[1]["blocks"]
        assert blocks["source"] == "model" and "a vector of 3 numbers" in blocks["error"]
    listed = [bar["id"] for group in blocks["groups"] for bar in group["bars"]]
    assert set(told["on"]) <= set(listed)


def test_presets(page, server):
    file = server.base / "user/lora_loom/block_presets.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("MINE: in=0\n")
    try:
        status, found = ask(page, "/blocks/presets", lora="")
        names = [preset["name"] for preset in found["presets"]]
        assert status == 200 and "OUTD" in names and names[-1] == "MINE"
        assert {preset["fits"] for preset in found["presets"]} == {None}
        file.write_text("MINE\n")
        assert "block_presets.txt, line 1" in ask(page, "/blocks/presets")[1]["error"]
        assert "block_presets.txt, line 1" in ask(page, blocks="", lora=NAME)[1]["blocks"]["error"]
    finally:
        file.unlink()


def test_which_presets_fit_is_told_of_a_known_model():
    patcher = tiny.tiny("flux")
    block_routes.remember(patcher, "a flux lora")
    found = {preset["name"]: preset["fits"] for preset in block_routes._presets("a flux lora", "")["presets"]}
    assert found["FLUX-SINGLE"] and not found["OUTD"]


def test_what_is_remembered_is_bounded_and_holds_no_model():
    for number in range(block_routes.LORAS_KEPT + 5):
        block_routes.remember(tiny_model(), f"lora {number}")
    assert len(block_routes._of_loras) == block_routes.LORAS_KEPT
    assert len(block_routes._layouts) <= block_routes.LAYOUTS_KEPT


_model = []


def tiny_model():
    if not _model:
        _model.append(tiny.tiny("sd15"))
    return _model[0]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"blocks": 1}, "blocks is no text"),
        ({"steps": ["0.5"]}, "steps is no text"),
        ({"blocks": "x" * 20_000}, "blocks is no text of at most"),
        ({"interpolation": "wavy"}, "interpolation is none of hold"),
        ({"lora": {}}, "lora is no text"),
    ],
)
def test_nonsense_is_refused(page, body, said):
    status, found = ask(page, **body)
    assert status == 400 and said in found["error"]


@pytest.mark.parametrize("path", ["/blocks", "/blocks/presets"])
def test_other_pages_are_refused(page, path):
    foreign = {"Origin": "https://evil.example"}
    for headers in (foreign, {TOKEN: ""}, {TOKEN: "x" * 43}, {"Sec-Fetch-Site": "cross-site"}):
        assert page.post(path, {}, headers).status == 403
    assert page.post(path, {}, {"Content-Type": "text/plain"}).status == 415
    assert page.get(path).status in (404, 405)
    assert page.post(path, {}).status == 200


def test_a_long_text_is_answered_quickly_enough(page):
    """Five hundred rules, the most there may be, do not hold up the server."""
    text = "\n".join(["in=0.5"] * 500)
    status, found = ask(page, blocks=text, lora=NAME)
    assert status == 200 and len(found["blocks"]["rules"]) == 500
    assert torch.tensor([rule["begin"] for rule in found["blocks"]["rules"]]).diff().min() > 0
