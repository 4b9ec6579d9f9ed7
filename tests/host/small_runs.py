"""Runs of a few steps on a UNet with one transformer, and what they leave in their folders."""

from __future__ import annotations

import dataclasses
import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from safetensors.torch import load_file

import tiny
from graph import clip_for, tiny_model, vae_for
from lora_loom.host.record import Request
from lora_loom.host.session import Result, train
from lora_loom.training.dataset.model import Dataset
from lora_loom.training.settings import AdapterSettings, OptimizerSettings, Plan, RunSettings

RUNS = Path(folder_paths.get_output_directory()) / "lora_loom"
PLAN = Plan(length=6, rank=2, alpha=2.0, batch_size=2, seed=3, learning_rate=1e-2)
NAMES = (f"kept run {number}" for number in itertools.count())
PARTS = {"run": RunSettings, "optimizer": OptimizerSettings, "adapter": AdapterSettings}


def smaller_model() -> Any:
    """So small that steps are quick and saves a good part of them."""
    spec = tiny.SPECS["sd15"]
    depths = {"transformer_depth": [0, 0], "transformer_depth_output": [0] * 4, "transformer_depth_middle": 1}
    changed = dataclasses.replace(spec, settings={**spec.settings, **depths})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SPECS, "sd15", changed)
        return tiny_model("sd15")


@cache
def parts() -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE."""
    with torch.inference_mode():
        return smaller_model(), clip_for("sd15"), vae_for("sd15")


def holding_out_the_last(dataset: Dataset) -> Dataset:
    last = len(dataset.samples) - 1
    held_out = dataclasses.replace(dataset.concepts[0], kind="validation")
    samples = [dataclasses.replace(sample, concept=int(index == last)) for index, sample in enumerate(dataset.samples)]
    return dataclasses.replace(dataset, concepts=(*dataset.concepts, held_out), samples=tuple(samples))


def plan(**options: Any) -> Plan:
    """``PLAN`` with other options; those of its parts as dicts."""
    made = {name: PARTS[name](**value) if name in PARTS else value for name, value in options.items()}
    return dataclasses.replace(PLAN, **made)


def run(dataset: Dataset, plan: Plan = PLAN, name: str | None = None, if_exists: str = "continue") -> Result:
    with torch.inference_mode():
        return train(Request(*parts(), dataset, plan, name or next(NAMES), if_exists))


def lora(name: str, mark: str = "") -> dict[str, torch.Tensor]:
    return load_file(RUNS / name / f"{name}{mark}.safetensors")


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the last bit, NaN included."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    left, right = (bytes(t.contiguous().flatten().view(torch.uint8).numpy()) for t in (one, other))
    return left == right


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)


def files(name: str) -> list[str]:
    return sorted(path.name for path in (RUNS / name).iterdir())


def log(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RUNS / name / "log.jsonl").read_text().splitlines()]
