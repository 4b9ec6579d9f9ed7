"""What adapter files say about themselves in their header.

* ``training_metadata``: kohya's and ModelSpec's keys from plain arguments.
* ``trigger_words``: the words an adapter reacts to; ``stated`` and ``trained_on`` with where they are from.
* ``split_words``: words out of what people wrote.
* ``json_object``: one value of it that is JSON inside, whatever is really there.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

COMMON = 0.6  # of the captions
MAX_WORD, MAX_WORDS = 200, 100
_MAX_TEXT = 20_000
_MARKUP = re.compile("<[^<>]*>")
_MARKS = re.compile(r"\\.|[(),]")


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
    """What a LoRA reacts to, as far as the file itself tells; what lies beside it is read in ``sidecars``."""
    return (stated(metadata) or trained_on(metadata)).texts


class Words(NamedTuple):
    """Words, each once, and where they are from; falsy without any."""

    texts: list[str]
    source: str

    def __bool__(self) -> bool:
        return bool(self.texts)


def stated(metadata: Mapping[str, str]) -> Words:
    """What whoever made the file says that it reacts to."""
    return Words(split_words(metadata.get("modelspec.trigger_phrase", "")), "modelspec.trigger_phrase")


def trained_on(metadata: Mapping[str, str]) -> Words:
    """The trainer's names of its concepts, or else the tags that most captions share (in 60 % or more of them)."""
    named = _class_tokens(metadata)
    if named:
        return Words(named, "class_tokens")
    buckets = {
        name: {tag.strip(): count for tag, count in tags.items() if type(count) is int and tag.strip()}
        for name, tags in json_object(metadata, "ss_tag_frequency").items()
        if isinstance(tags, dict)
    }
    for name, tags in buckets.items():  # ai-toolkit's trigger, in the place of tags: "1_word" with the word once
        if tags == {name.removeprefix("1_").strip(): 1} and len(buckets) == 1:
            return Words(split_words(*tags), "ss_tag_frequency")
    images = _images(metadata, buckets)
    counts: Counter[str] = Counter()
    for name in images or buckets:
        counts.update(buckets[name])
    number = sum(images.get(name, 0) for name in buckets) or _number(metadata.get("ss_num_train_images", ""))
    common = [tag for tag, count in counts.most_common() if number and count >= COMMON * number]
    return Words(split_words(*common), f"tags in {COMMON:.0%} of the captions")


def split_words(*texts: Any) -> list[str]:
    """The words of texts that people wrote, each once: cut at commas outside of brackets and at line ends.

    Markup and prompt tags ("<b>", "<lora:other:1>") are left out, whatever they hold: a file must not load another one.
    """
    found: dict[str, str] = {}
    for text in texts:
        for word in _pieces(_MARKUP.sub(" ", text[:_MAX_TEXT])) if isinstance(text, str) else ():
            word = " ".join(word.split()).strip(" ,;")
            if word and word.isprintable() and len(word) <= MAX_WORD and len(found) < MAX_WORDS:
                found.setdefault(word.lower(), word)
    return list(found.values())


def _pieces(text: str) -> Iterator[str]:
    """Cut at commas, line ends and the like; an open bracket that is never closed holds nothing together."""
    for line in re.split(r"[\n\r;]", text):
        depth = begin = 0
        if line.count("(") == line.count(")"):
            for mark in _MARKS.finditer(line):
                if mark[0] == ",":
                    if depth <= 0:
                        yield line[begin : mark.start()]
                        begin = mark.end()
                elif len(mark[0]) == 1:
                    depth += 1 if mark[0] == "(" else -1
            yield line[begin:]
        else:
            yield from line.split(",")


def _class_tokens(metadata: Mapping[str, str]) -> list[str]:
    """What the subsets of kohya's trainers are called, without those that regularise."""
    return split_words(*(subset.get("class_tokens") for subset in _subsets(metadata) if not subset.get("is_reg")))


def _subsets(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    datasets = _json_list(metadata, "ss_datasets")
    subsets = [subset for dataset in datasets if isinstance(dataset, dict) for subset in _list(dataset.get("subsets"))]
    return [subset for subset in subsets if isinstance(subset, dict)]


def _images(metadata: Mapping[str, str], buckets: Container[str]) -> dict[str, int]:
    """Folder → how many captions were counted there, without folders that regularise; empty where kohya's do not say.

    That is one for each picture, however often it is repeated (``ss_num_train_images`` has the repeats in it) and in
    however many datasets its folder is.
    """
    images: dict[str, int] = {}
    folders: list[tuple[Any, Any]] = list(json_object(metadata, "ss_dataset_dirs").items())
    folders = [(subset.get("image_dir"), subset) for subset in _subsets(metadata)] or folders
    for name, folder in folders:
        count = folder.get("img_count") if isinstance(folder, dict) and not folder.get("is_reg") else None
        if isinstance(name, str) and name in buckets and type(count) is int and count > 0:
            images[name] = max(count, images.get(name, 0))
    return images


def _number(text: str) -> int:
    return int(text[:12]) if text.isdecimal() else 0


def json_object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """The JSON object that is kept as text under ``key``; empty where there is none or none that can be read."""
    value = _json_in(metadata.get(key, ""))
    return value if isinstance(value, dict) else {}


def _json_list(metadata: Mapping[str, str], key: str) -> list[Any]:
    return _list(_json_in(metadata.get(key, "")))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _json_in(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _iso_date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).isoformat()
