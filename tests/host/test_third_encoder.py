"""The third text encoder of a CLIP, T5 behind SD3's two: it learns at its own rate and stops when it is told to."""

from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

import nodes
from graph import images, vae_for
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.host.text_loan import LiveText, borrow_text, text_components, trainable_clip
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ComponentSettings, OptimizerSettings, Plan, RunSettings
from tiny_text import CLIPS, components_for, encoded, tensors_of, tiny_sd3, tiny_sd3_clip
from training import opened

CAPTIONS = ["a photo of one", "", "number (one:1.4)"]


def test_all_three_encode_as_the_host_does_and_all_learn():
    clip = tiny_sd3_clip(inference=True)
    own, components = components_for(clip, rates=[1e-3] * 3, filled=False)
    live = LiveText(own, components)
    with borrow_text(live):
        found = live.encode(CAPTIONS)
        for context, extras in found:
            (context.square().sum() + extras["pooled_output"].square().sum()).backward()
    for caption, (context, extras) in zip(CAPTIONS, found, strict=True):
        wanted, more = encoded(clip, caption)
        assert torch.equal(context, wanted) and torch.equal(extras["pooled_output"], more["pooled_output"])
    assert [component.name for component in components] == ["te1", "te2", "te3"]
    for component in components:
        assert any(tensor.grad is not None and tensor.grad.any() for tensor in tensors_of([component]).values())


@pytest.fixture(scope="module")
def parts():
    return tiny_sd3(), tiny_sd3_clip(inference=True), vae_for("sd3")


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """options of the components → the LoRA."""
    dataset = opened(images(tmp_path_factory.mktemp("data") / "zorb", count=2), 64, 16)

    def train_on(length, **options):
        own = {"run": RunSettings(smoke_test=False), "components": ComponentSettings(train_model=False, **options)}
        plan = Plan(length=length, rank=2, alpha=2.0, seed=5, optimizer=OptimizerSettings(weight_decay=0.0), **own)
        with torch.inference_mode():
            return train(Request(*parts, dataset, plan, "third encoder", "new")).lora

    return train_on


def test_it_learns_alone_and_the_host_s_loader_finds_all_of_it(run, parts):
    lora = run(2, te3_learning_rate=1e-2)
    model, clip, _ = parts
    with torch.inference_mode():
        _, with_it = nodes.LoraLoader().load_lora(model, clip, saved(lora), 1.0, 1.0)
    assert len(with_it.patcher.patches) == len(lora) // 3 == 14
    assert all(key.startswith("t5xxl.") for key in with_it.patcher.patches)
    (before, one), (after, other) = encoded(clip, "number"), encoded(with_it, "number")
    assert torch.equal(one["pooled_output"], other["pooled_output"]) and torch.equal(before[:, :77], after[:, :77])
    assert (before[:, 77:] - after[:, 77:]).norm() > 1e-3 * before[:, 77:].norm()


def test_it_stops_when_it_is_told_to(run):
    rates = {"te1_learning_rate": 1e-2, "te3_learning_rate": 1e-2}
    one_step, free, stopped = run(1, **rates), run(3, **rates), run(3, **rates, te3_stop_after=1)
    third = [key for key in stopped if "t5xxl" in key]
    first = [key for key in stopped if key.startswith("lora_te1_")]
    assert third and len(third) + len(first) == len(stopped)
    assert same(third, stopped, one_step) and not same(third, stopped, free)
    assert not same(first, stopped, one_step), "the first goes on"


def test_where_there_is_none_it_is_refused():
    own, _ = trainable_clip(CLIPS["sdxl"](inference=True))
    with pytest.raises(
        OptionError, match="te3_learning_rate is 0.01, expected 0: this CLIP has te1 .*, te2 .* no more"
    ):
        text_components(own, Plan(components=ComponentSettings(te3_learning_rate=1e-2)))
    with pytest.raises(OptionError, match="te3_stop_after is 1, expected 0"):
        ComponentSettings(te3_stop_after=1)


def same(keys, one, other):
    return all(torch.equal(one[key], other[key]) for key in keys)


def saved(lora):
    """The name of the LoRA's file."""
    path = Path(folder_paths.get_folder_paths("loras")[0]) / "third encoder.safetensors"
    save_file(dict(lora), path)
    return path.name
