"""What adapter files say about themselves in their header.

* ``training_metadata``: kohya's and ModelSpec's keys from plain arguments.
* ``trigger_words``: the words an adapter reacts to.
* ``json_object``: one value of it that is JSON inside, whatever is really there.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any


def training_metadata(
    *,
    title: str,
    architecture: str,
    base_model_version: str,
    rank: int,
    alpha: float,
    resolution: int | tuple[int, int],
    recipe: Mapping[str, object],
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    implementation: str = "diffusers",
    prediction_type: str | None = None,
    trigger_phrase: str | None = None,
    learning_rate: float | None = None,
    max_train_steps: int | None = None,
    steps: int | None = None,
    epoch: int | None = None,
    batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    optimizer: str | None = None,
    lr_scheduler: str | None = None,
    lr_warmup_steps: int | None = None,
    seed: int | None = None,
    num_train_images: int | None = None,
    tag_frequency: Mapping[str, Mapping[str, int]] | None = None,
    training_started_at: float | None = None,
    training_finished_at: float | None = None,
    extra: Mapping[str, object] | None = None,
) -> dict[str, str]:
    """The metadata of a trained LoRA: kohya's ss_ keys, ModelSpec 1.0.0, and the recipe as JSON in "loom.recipe".

    ``architecture`` is ModelSpec's id of the base model ("stable-diffusion-v1"; "/lora" is added),
    ``base_model_version`` kohya's ("sd_v1", "sd_v2", "sdxl_base_v1-0", "flux1"); ``tag_frequency`` is folder -> tag ->
    count, times are Unix seconds, ``extra`` further ss_ keys without the prefix. What is None is left out.
    """
    width, height = (resolution, resolution) if isinstance(resolution, int) else resolution
    network_args = {"conv_dim": conv_rank, "conv_alpha": conv_alpha} if conv_rank else {}
    trained: dict[str, object] = {
        "v2": base_model_version.startswith("sd_v2"),
        "base_model_version": base_model_version,
        "output_name": title,
        "network_module": "networks.lora",
        "network_dim": rank,
        "network_alpha": alpha,
        "network_args": json.dumps({key: str(value) for key, value in network_args.items() if value is not None}),
        "resolution": f"({width}, {height})",
        "learning_rate": learning_rate,
        "max_train_steps": max_train_steps,
        "steps": steps,
        "epoch": epoch,
        "batch_size_per_device": batch_size,
        "total_batch_size": batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "optimizer": optimizer,
        "lr_scheduler": lr_scheduler,
        "lr_warmup_steps": lr_warmup_steps,
        "seed": seed,
        "num_train_images": num_train_images,
        "tag_frequency": None if tag_frequency is None else _json(tag_frequency),
        "training_started_at": training_started_at,
        "training_finished_at": training_finished_at,
        **(extra or {}),
    }
    spec: dict[str, object] = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": title,
        "date": None if training_finished_at is None else _iso_date(training_finished_at),
        "resolution": f"{width}x{height}",
        "prediction_type": prediction_type,
        "trigger_phrase": trigger_phrase,
    }
    every = {f"ss_{key}": value for key, value in trained.items()}
    every |= {f"modelspec.{key}": value for key, value in spec.items()}
    return {key: str(value) for key, value in every.items() if value is not None} | {"loom.recipe": _json(recipe)}


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What a LoRA reacts to: its trigger phrase, or else the tags that most of its captions share (in 60 % or more)."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    images = metadata.get("ss_num_train_images", "")
    if not images.isdecimal() or not int(images[:12]):
        return []
    counts: Counter[str] = Counter()
    for tags in json_object(metadata, "ss_tag_frequency").values():
        if isinstance(tags, dict):
            counts.update({tag.strip(): count for tag, count in tags.items() if isinstance(count, int)})
    return [tag for tag, count in counts.most_common() if count >= 0.6 * int(images[:12])]


def json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object that is kept as text under ``key``; empty where there is none or none that can be read."""
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _iso_date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).isoformat()
