"""Presets in the host: the user's files, what the page is told of them, and that they fit the models they are for."""

import asyncio
import json

import execution
import folder_paths
import pytest
import torch

import tiny
from graph import Graph, node
from lora_loom.host import presets
from lora_loom.host.denoiser import prediction_of
from lora_loom.host.layers import weight_reader
from lora_loom.kernels.layers import is_spatial, trainable_layers
from lora_loom.nodes.presets import LoomSavePreset
from lora_loom.training.adapters import build
from lora_loom.training.objective import check_objective
from lora_loom.training.optimizers import table
from lora_loom.training.options import OptionError
from lora_loom.training.presets import KINDS, PRESETS, Preset, settings, to_json
from lora_loom.training.settings import Plan

MINE = Preset("mine", "", {"trainer": {"rank": 5}})


@pytest.fixture(autouse=True)
def own(tmp_path, monkeypatch):
    """The folder of the user's own presets."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    folder = tmp_path / "lora_loom/presets"
    folder.mkdir(parents=True)
    return folder


def test_a_preset_is_kept_offered_and_filled(own):
    assert presets.save(MINE, overwrite=False) == own / "mine.json"
    assert presets.names() == ["none", *PRESETS, "mine"]
    assert presets.find("mine").parts == MINE.parts
    filled = presets.as_filled()["mine"]
    assert filled["trainer"]["rank"] == 5 and filled["trainer"]["batch_size"] == 1 and "seed" not in filled["trainer"]
    with pytest.raises(OptionError, match="there is a preset 'mine' already"):
        presets.save(MINE, overwrite=False)
    presets.save(Preset("mine", "", {}), overwrite=True)
    assert presets.find("mine").parts == {}


ELSEWHERE = ("../mine", "a/b", "a\\b", "/etc/x", "C:x", "CON", "", " ", "x\0", ".x")


@pytest.mark.parametrize("name", (*ELSEWHERE, "style", "none"))
def test_no_name_leads_elsewhere_or_replaces_one_of_the_packs(own, name):
    with pytest.raises(ValueError, match="^name is "):
        presets.save(Preset(name, "", {}), overwrite=True)
    assert [*own.rglob("*")] == [*own.parent.parent.rglob("*.json")] == []


@pytest.mark.parametrize("name", ("../secret", "..\\secret", "secret", ["mine"], {"mine": 1}, 5, b"mine"))
def test_only_what_is_offered_is_found(own, name):
    (own.parent / "secret.json").write_text(to_json(MINE))
    with pytest.raises(OptionError, match="preset is .*, expected one of none, character"):
        presets.find(name)


SPOILED = {
    "no mapping": '{"version": 1, "parts": {"trainer": 3}}',
    "list": '{"version": 1, "parts": {"trainer": ["rank"]}}',
    "huge": '{"version": 1, "parts": {"trainer": {"rank": 1%s}}}' % ("0" * 400),
    "no text": b"\xff\xfe\xff",
    "deep": "[" * 100_000,
    "large": " " * (presets.LARGEST + 1),
}


def test_a_file_that_is_spoiled_spoils_nothing_else(own):
    presets.save(MINE, overwrite=False)
    for name, content in SPOILED.items():
        (own / f"{name}.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert presets.as_filled().keys() == {"none", *PRESETS, "mine"}
    for name in SPOILED:
        with pytest.raises(OptionError, match=f"preset '{name}' cannot be used"):
            presets.find(name)


def test_files_that_came_from_elsewhere_are_read(own):
    """Under any name a file system has, and with the mark that editors of Windows put in front."""
    (own / "düster.json").write_bytes(b"\xef\xbb\xbf" + to_json(MINE).encode())
    assert presets.find("düster").parts == MINE.parts and "düster" in presets.as_filled()


def test_a_lora_with_a_spoiled_recipe_makes_no_preset(own):
    lora = tiny_lora({"adapter": 3})
    with pytest.raises(OptionError, match="holds no options of 'adapter'"):
        LoomSavePreset.execute(lora, "mine", "error")
    assert LoomSavePreset.execute(tiny_lora({"rank": 7}), "mine", "error").args == ("mine",)
    assert presets.find("mine").parts["trainer"] == {"rank": 7}


def tiny_lora(recipe):
    from lora_loom.kernels.safetensors_io import LoraModel

    return LoraModel({"x.lora_up.weight": torch.zeros(1, 1)}, {"loom.recipe": json.dumps(recipe)})


# -- on this machine, on these models


def test_an_optimizer_that_is_not_installed_is_told_with_what_to_install(monkeypatch):
    Graph()  # so that the host knows our nodes
    prodigy = settings("optimizer", PRESETS["guide: Prodigy"], {})

    def errors(optimizer):
        prompt = {"1": node("LoomOptimizerSettings", optimizer=optimizer), "2": node("Keep", value=["1", 0])}
        widgets = ("weight_decay", "beta1", "beta2", "epsilon", "schedule", "warmup_steps", "max_grad_norm")
        prompt["1"]["inputs"] |= {name: getattr(prodigy, name) for name in (*widgets, "gradient_accumulation")}
        _, _, _, found = asyncio.run(execution.validate_prompt("id", prompt, None))
        return [error["details"] for error in found.get("1", {"errors": []})["errors"]]

    assert errors("Prodigy") == []
    monkeypatch.setattr(table, "find_spec", lambda name: None)
    assert "pip install prodigyopt, or choose one of AdamW" in errors("Prodigy")[0]
    assert "optimizer is 'Adam the First', expected one of AdamW" in errors("Adam the First")[0]


@pytest.mark.parametrize("family", tiny.SPECS)
def test_presets_fit_every_model_but_for_the_guides_which_want_convolutions(family):
    patcher = tiny._build(tiny.SPECS[family], 0, torch.float32, None, False)
    convolutions = any(map(is_spatial, trainable_layers(patcher.model)))
    for name, preset in PRESETS.items():
        parts = {part: settings(part, preset, {}) for part in KINDS if part != "trainer"}
        plan = Plan(**preset.options("trainer"), **parts)
        check_objective(plan.objective, prediction_of(patcher.get_model_object("model_sampling")))
        if name.startswith("guide") and not convolutions:
            assert preset.description.endswith("For models with convolutions: SD 1, SD 2, SDXL.")
            with pytest.raises(OptionError, match="conv_rank is 16, expected 0: .* hold no k×k convolution"):
                build(patcher.model, plan, weight_reader(patcher))
        else:
            assert build(patcher.model, plan, weight_reader(patcher)).adapters
