"""Bad input: the message names the option or the file and the cure, nothing is trained, no run folder appears."""

from pathlib import Path

import folder_paths
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingContinuousEDM
from safetensors import safe_open

import tiny
from graph import Graph, GraphError, clip_for, images, node, tiny_model, training_prompt, vae_for
from lora_loom.host import session
from lora_loom.host.record import Request
from lora_loom.host.runs import RunError, checked_name
from lora_loom.host.session import train
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import AdapterSettings, Plan
from training import opened

INPUT = Path(folder_paths.get_input_directory())
RUNS = Path(folder_paths.get_output_directory()) / "lora_loom"


@pytest.fixture(scope="module")
def graph():
    images(INPUT / "fine")
    return Graph()


@pytest.fixture
def no_step(monkeypatch):
    monkeypatch.setattr(Trainer, "step", lambda self: pytest.fail("a step was made"))


def refused(graph, match, change=None, folder="fine", run_name="refused", **options):
    prompt = training_prompt("sd15", folder, run_name, **options)
    if change:
        change(prompt)
    before = sorted(RUNS.rglob("*"))
    with pytest.raises(GraphError, match=match):
        graph.run(prompt)
    assert sorted(RUNS.rglob("*")) == before, "nothing is left behind"


def use(inputs):
    """A change to the trainer's inputs; None takes one away."""

    def change(prompt):
        kept = {**prompt["3"]["inputs"], **inputs}
        prompt["3"]["inputs"] = {name: value for name, value in kept.items() if value is not None}

    return change


# ---------------------------------------------------------------- data


def test_an_empty_folder(graph, no_step):
    (INPUT / "empty").mkdir()
    refused(graph, r"has no images: put images \(.*png.*\) there, each with a caption in a \.txt file", folder="empty")


def test_an_image_without_a_caption(graph, no_step):
    (images(INPUT / "bare") / "2.txt").unlink()
    refused(graph, r"1 image of 4 without a caption: 2\.png; write .* e\.g\. 2\.txt", folder="bare")


def test_an_unreadable_image(graph, no_step):
    (images(INPUT / "torn") / "1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    refused(graph, r"1 file cannot be used:\n1\.png is no readable image .*: save it again or remove it", folder="torn")


def test_an_image_that_is_damaged_inside(graph, no_step):
    """Its header and its end are fine, so it is found when it is encoded."""
    picture = images(INPUT / "torn inside") / "1.png"
    data = bytearray(picture.read_bytes())
    data[len(data) // 2] ^= 4
    picture.write_bytes(data)
    refused(graph, r"1\.png cannot be decoded .*: save it again or remove it", folder="torn inside")


def test_buckets_that_do_not_fit_the_vae(graph, no_step):
    def change(prompt):
        prompt["2"]["inputs"]["bucket_step"] = 12

    refused(graph, r"0\.png would be trained at 60×60.* multiples of 8: set bucket_step .* to a multiple of 8", change)


# ---------------------------------------------------------------- sockets


@pytest.mark.parametrize("socket", ["clip", "vae"])
def test_a_missing_socket(graph, no_step, socket):
    cure = f"Connect the {socket.upper()} of the checkpoint"
    refused(graph, f"{socket} is not connected: .* {cure}", use({socket: None}))


def test_a_vae_of_another_family(graph, no_step):
    def change(prompt):
        prompt["11"] = node("TinySource", family="sd3")
        prompt["3"]["inputs"]["vae"] = ["11", 2]

    refused(graph, r"vae: .* 16 channels, the MODEL wants 4\. Connect the VAE that belongs to the MODEL", change)


def start_from(graph, family, **options):
    """A change that connects the LoRA of another run."""
    made = graph.run(training_prompt(family, "fine", f"given {family}", length=1, **options))["lora"]

    def change(prompt):
        prompt["12"] = node("Given", value=0)
        prompt["3"]["inputs"]["start_from"] = ["12", 0]

    class Given:
        RETURN_TYPES, FUNCTION, CATEGORY = ("LORA_MODEL",), "give", "test"

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"value": ("INT", {})}}

        def give(self, value):
            return (made,)

    graph.register("Given", Given)
    return change


def test_start_from_another_family(graph):
    refused(graph, r"start_from: none of its layers is trained here\. It must be a LoRA for", start_from(graph, "flux"))


def test_start_from_another_rank(graph):
    refused(graph, r"start_from has rank 3 on .*, rank is 2: set rank to 3", start_from(graph, "sd15", rank=3))


def test_a_model_whose_sampling_is_not_supported(graph, no_step):
    def change(prompt):
        graph.register("EDM", ModelSamplingContinuousEDM)
        prompt["13"] = node("EDM", model=["1", 0], sampling="edm", sigma_max=120.0, sigma_min=0.002)
        prompt["3"]["inputs"]["model"] = ["13", 0]

    refused(graph, r"model.*EDM.* supported are epsilon, v-prediction and flow", change)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "option, value, expected",
    [
        ("rank", 0, "rank is 0, expected 1 or more"),
        ("alpha", 0.0, "alpha is 0.0, expected a number other than 0"),
        ("batch_size", 0, "batch_size is 0, expected 1 or more"),
        ("length", 0, "length is 0, expected 1 or more"),
        ("learning_rate", 0.0, "learning_rate is 0.0, expected more than 0"),
        ("learning_rate", float("nan"), "learning_rate is nan, expected more than 0"),
        ("unit", "hours", "unit is 'hours', expected one of steps, epochs, presentations per image"),
        ("if_run_exists", "ask", "if_run_exists is 'ask', expected one of continue, new, error"),
    ],
)
def test_a_value_that_makes_no_sense(graph, no_step, option, value, expected):
    refused(graph, expected, **{option: value})


def test_no_layer_matched(graph, no_step, monkeypatch):
    """A network of convolutions alone has no attention to train."""
    dataset = opened(INPUT / "fine", 64, 16)
    settings = {"transformer_depth": [0, 0], "transformer_depth_output": [0] * 4, "transformer_depth_middle": -1}
    monkeypatch.setitem(tiny.SPECS, "sd15", tiny.Spec("SD15", tiny.unet_settings(32, 64, **settings), (4, 16, 16), 64))
    plan = Plan(adapter=AdapterSettings("attention"))
    request = Request(tiny_model("sd15"), clip_for("sd15"), vae_for("sd15"), dataset, plan, "no layers")
    with pytest.raises(ValueError, match=r"layers: the preset 'attention' matches no layer .*; it has \d+ × "):
        train(request)
    assert not (RUNS / "no layers").exists()


@pytest.mark.parametrize(
    "name",
    ["../x", "..", ".", "CON", "nul.x", "com1 .x", "", "  ", "a/b", "a\\b", "C:x", "x" * 200, "a\0b", "ü", ".a", "a."],
)
def test_a_run_name_that_is_no_file_name(graph, no_step, name):
    refused(graph, r"^run_name is .*; use letters, digits, spaces.*\(at most 100\)", run_name=name)


def test_a_run_name_that_is_taken_by_its_own_state(graph, no_step):
    refused(graph, "run_name: 'State' is the name of the file beside the LoRA; choose another", run_name="State")


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": 1}])
def test_a_run_name_that_is_no_text(value):
    with pytest.raises(RunError, match="^run_name is "):
        checked_name(value)
    assert checked_name(" my run 2.1 ") == "my run 2.1"


# ---------------------------------------------------------------- a run that is there already


def test_a_run_that_exists(graph, monkeypatch):
    first = graph.run(training_prompt("sd15", "fine", "taken", length=1))
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self: pytest.fail("a step was made"))
        refused(graph, r"is a run called 'taken' already .*set if_run_exists to continue or new", run_name="taken")
        again = {"run_name": "taken", "if_run_exists": "continue"}
        refused(graph, r"'taken' was made with another rank \(2, now 4\)\. Choose another run_name", rank=4, **again)
        refused(graph, r"was made with another alpha \(2\.0, now 3\.0\)", alpha=3.0, **again)
    for number in (2, 3):
        fresh = graph.run(training_prompt("sd15", "fine", "taken", length=1, if_run_exists="new", seed=number))
        assert f"run 'taken-{number}': 1 of 1 steps" in fresh["report"]
        assert (RUNS / f"taken-{number}" / f"taken-{number}.safetensors").exists()
    with safe_open(RUNS / "taken" / "taken.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in first["lora"].items())


def test_a_run_of_another_model(graph):
    graph.run(training_prompt("sd15", "fine", "of sd15", length=1))

    def change(prompt):
        prompt["1"]["inputs"]["family"] = "sdxl"

    again = {"run_name": "of sd15", "if_run_exists": "continue"}
    refused(graph, r"made with another base model \('stable-diffusion-v1', now 'stable-diffusion-xl", change, **again)


# ---------------------------------------------------------------- a loss that is no number


def kept_weights(name):
    with safe_open(RUNS / name / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}


def test_poisoned_data_stops_the_run_with_the_last_good_weights(graph, monkeypatch):
    good = graph.run(training_prompt("sd15", "fine", "good", length=1))["lora"]

    class Poisoned(session.HostExamples):
        def batch(self, position):
            batch = super().batch(position)
            bad = self.order.locate(position)[0] == 1
            return Batch(batch.latents * float("nan"), batch.conditioning) if bad else batch

    monkeypatch.setattr(session, "HostExamples", Poisoned)
    kept = graph.run(training_prompt("sd15", "fine", "poisoned", length=9))
    assert "poisoned': 2 of 9 steps" in kept["report"]
    assert "STOPPED EARLY, the last good weights are kept. step 3: the loss is nan. Lower" in kept["report"]
    assert len(kept["loss_map"]["loss"]) == 2
    written = kept_weights("poisoned")
    for key, value in kept["lora"].items():
        assert torch.isfinite(value).all() and torch.equal(written[key], value), key
    assert all(torch.equal(kept["lora"][key], value) for key, value in good.items()), "those that gave a finite loss"


def test_a_huge_learning_rate_stops_the_run(graph):
    kept = graph.run(training_prompt("sd15", "fine", "huge", length=30, learning_rate=10.0, alpha=1024.0))
    assert "STOPPED EARLY" in kept["report"] and "Lower learning_rate" in kept["report"]
    assert all(torch.isfinite(value).all() for value in kept_weights("huge").values())
    assert "no state had been saved" in kept["report"] and not list((RUNS / "huge").glob("state-*"))


def test_a_loss_that_is_no_number_from_the_start_is_an_error(graph, monkeypatch):
    class Poisoned(session.HostExamples):
        def batch(self, position):
            batch = super().batch(position)
            return Batch(batch.latents * float("nan"), batch.conditioning)

    monkeypatch.setattr(session, "HostExamples", Poisoned)
    refused(graph, r"smoke_test: the gradient of .* is not finite: .* gives inf or NaN", run_name="never good")
