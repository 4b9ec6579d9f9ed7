"""Prompts in the host's own executor, in this process, on tiny models.

    graph = Graph()
    kept = graph.run({"1": node("TinySource", family="sd15"), …, "9": node("Keep", value=["5", 0])})

``Keep`` hands its input to the test; ``TinySource`` gives MODEL, CLIP and VAE of a family that fit each other.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from pathlib import Path
from typing import Any

import comfy.sd
import execution
import numpy as np
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy_extras import nodes_train
from PIL import Image

import nodes
import tiny
from lora_loom.nodes import NODES

WIDTHS: dict[str, dict[str, Any]] = {  # what makes a tiny model fit the tiny text encoders
    "sd15": {},
    "sdxl": {"context_dim": 128, "adm_in_channels": 6 * 256 + 64},
    "flux": {"vec_in_dim": 64},
    "sd3": {"adm_in_channels": 64},
}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def tiny_model(family: str, seed: int = 0, inference: bool = True):
    """A MODEL whose inputs have the widths of ``clip_for(family)``."""
    spec = tiny.SPECS[family]
    fitting = dataclasses.replace(spec, settings={**spec.settings, **WIDTHS[family]})
    return tiny._build(fitting, seed, torch.float32, None, inference)


def clip_for(family: str):
    return (tiny.tiny_dual_clip if family == "sdxl" else tiny.tiny_clip)(inference=True)


def vae_for(family: str):
    channels = tiny.SPECS[family].latent[0]
    if channels == 4:
        return tiny.tiny_vae(inference=True)
    config = {"ddconfig": {**tiny.VAE_CONFIG, "z_channels": channels}, "embed_dim": channels}
    with torch.inference_mode():
        model = tiny.fill(AutoencoderKL(**config))
        weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return comfy.sd.VAE(sd=weights, config={"params": config})


def images(folder: Path, count: int = 4, side: int = 64, word: str = "zorb") -> Path:
    """Captioned noise of two shapes."""
    draws = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        shape = (side + side // 2 * (index % 2), side, 3)
        Image.fromarray(draws.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"{word}, number {index}")
    return folder


class TinySource:
    """MODEL, CLIP and VAE, as a checkpoint loader gives them."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP", "VAE"), "load", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"family": ("STRING", {})}}

    def load(self, family):
        return tiny_model(family), clip_for(family), vae_for(family)


class Keep:
    """Its input, for the test to see."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "keep", "test", True
    kept: dict[str, Any] = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}, "hidden": {"unique_id": "UNIQUE_ID"}}

    def keep(self, value, unique_id):
        Keep.kept[unique_id] = value
        return ()


class _Server:
    """What the executor asks of a server."""

    client_id = last_node_id = last_prompt_id = None

    def send_sync(self, event, data, sid=None):
        pass


class GraphError(RuntimeError):
    """A prompt failed; the message is the node's."""


class Graph:
    """One executor with its cache; ``ran`` are the nodes that the last prompt carried out."""

    def __init__(self) -> None:
        found = {kind.GET_SCHEMA().node_id: kind for kind in (*NODES, *_core_nodes())}
        nodes.NODE_CLASS_MAPPINGS.update({**found, "TinySource": TinySource, "Keep": Keep})
        self.executor = execution.PromptExecutor(_Server(), cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
        self.number = 0
        self.ran: set[str] = set()

    @staticmethod
    def register(name: str, kind: type) -> None:
        nodes.NODE_CLASS_MAPPINGS[name] = kind

    def run(self, prompt: dict[str, Any], also: tuple[str, ...] = ()) -> dict[str, Any]:
        """What the prompt's Keep nodes got, by their ids; ``also`` are further output nodes. Raises GraphError."""
        self.number += 1
        prompt = copy.deepcopy(prompt)  # as it would come from the page: the host keeps fingerprints in it
        Keep.kept = {}
        outputs = [*also, *(key for key, value in prompt.items() if value["class_type"] == "Keep")]
        asyncio.run(self.executor.execute_async(prompt, f"prompt-{self.number}", {}, outputs))
        messages = dict(self.executor.status_messages)
        self.ran = set(prompt) - set(messages["execution_cached"]["nodes"])
        if "execution_error" in messages:
            raise GraphError(messages["execution_error"]["exception_message"])
        assert "execution_success" in messages, messages
        return Keep.kept


def _core_nodes():
    return [nodes_train.LoraModelLoader, nodes_train.SaveLoRA, nodes_train.LossGraphNode]


def training_prompt(family: str, folder: str, run_name: str, **options: Any) -> dict[str, Any]:
    """Data set "2", source "1", trainer "3", and Keep nodes for its five outputs ("lora", "model", …)."""
    settings = {
        **{"length": 3, "unit": "steps", "learning_rate": 1e-2, "rank": 2, "alpha": 2.0, "batch_size": 2, "seed": 5},
        **{"run_name": run_name, "if_run_exists": "error"},
        **options,
    }
    return {
        "1": node("TinySource", family=family),
        "2": node("LoomDatasetLoader", root="input", folder=folder, resolution=64, bucket_step=16),
        "3": node("LoomLoRATrainer", model=["1", 0], clip=["1", 1], vae=["1", 2], dataset=["2", 0], **settings),
        **{name: node("Keep", value=["3", index]) for index, name in enumerate(OUTPUTS)},
    }


OUTPUTS = ("lora", "model", "clip", "loss_map", "report")


@torch.inference_mode()
def sampled(model: Any, family: str = "sd15", seed: int = 1, positive: Any = None, width: int | None = None):
    """Two steps of the host's own sampler on fixed conditioning."""
    import comfy.sample

    latent = tiny.latent(family)
    text = positive or conditioning(family)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, 2, 1.5, "euler", "simple", text, text, latent, seed=seed, disable_pbar=True
    ).clone()


def conditioning(family: str):
    """Random text of the width that ``tiny_model(family)`` takes."""
    draws = torch.Generator().manual_seed(1)
    text = torch.randn(1, tiny.TOKENS, 128 if family == "sdxl" else 64, generator=draws)
    return [[text, {"pooled_output": torch.randn(1, 64, generator=draws)}]]
