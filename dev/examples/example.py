"""An example workflow, said briefly: nodes by name, links as tuples, groups of columns.

* ``node(type, title, size, **widgets)``: a value that is a tuple ("node", "output") is a link to that output; widgets
  that are not named keep their defaults.
* ``note(text)``: what the reader of the graph should do.
* ``Group(title, column, …)``: a column is a list of names, from top to bottom; groups stand side by side.
* ``Example``: all of it, what it is called, and which pictures of a run tell what it does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

CHECKPOINT = "loom-demo-base.safetensors"
WIDTH = 320
Link = tuple[str, str]


@dataclass(frozen=True)
class Node:
    type: str
    title: str | None
    size: tuple[int, int]  # at least
    widgets: dict[str, Any]
    links: dict[str, Link]


@dataclass(frozen=True)
class Group:
    title: str
    columns: list[list[str]]


@dataclass(frozen=True)
class Example:
    name: str
    groups: list[Group]
    nodes: dict[str, Node]
    picture: Callable[..., Any] = field(repr=False)

    def __post_init__(self) -> None:
        placed = [name for group in self.groups for column in group.columns for name in column]
        if sorted(placed) != sorted(self.nodes):
            raise ValueError(f"{self.name}: each node belongs in one group: {set(placed) ^ set(self.nodes)}")

    def plan(self) -> dict[str, Any]:
        """As the page builds it."""
        nodes = [
            {"name": name, "type": node.type, "title": node.title, "size": node.size, "widgets": node.widgets}
            | {"links": {socket: list(link) for socket, link in node.links.items()}}
            for name, node in self.nodes.items()
        ]
        return {"nodes": nodes, "groups": [{"title": group.title, "columns": group.columns} for group in self.groups]}


def node(of: str, title: str | None = None, /, size: tuple[int, int] = (WIDTH, 0), **values: Any) -> Node:
    links = {name: value for name, value in values.items() if isinstance(value, tuple)}
    return Node(of, title, size, {name: value for name, value in values.items() if name not in links}, links)


def note(title: str, text: str, size: tuple[int, int] = (WIDTH, 180)) -> Node:
    return node("MarkdownNote", title, size=size, text=text.strip())


def group(title: str, *columns: list[str]) -> Group:
    return Group(title, list(columns))


# ---------------------------------------------------------------- what many graphs share


def checkpoint() -> Node:
    return node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)


def dataset(folder: str, **values: Any) -> Node:
    return node("LoomDatasetLoader", **{"folder": folder, "resolution": 32, "bucket_step": 8, **values})


def encode(text: str, clip: Link, title: str = "Prompt") -> Node:
    return node("CLIPTextEncode", title, size=(WIDTH, 120), text=text, clip=clip)


def empty(count: int = 8) -> Node:
    title = "Empty picture (32 × 32 pixels)"
    return node("EmptyChromaRadianceLatentImage", title, width=32, height=32, batch_size=count)


def sampler(model: Link, positive: Link, negative: Link, latent: Link, **values: Any) -> Node:
    given = {"seed": 7, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", **values}
    links = {"model": model, "positive": positive, "negative": negative, "latent_image": latent}
    return node("KSampler", size=(280, 0), **links, **given, control_after_generate="fixed")


def decoded(samples: Link, vae: Link) -> Node:
    return node("VAEDecode", size=(200, 0), samples=samples, vae=vae)


def saved(images: Link, name: str, title: str) -> Node:
    return node("SaveImage", title, size=(WIDTH, 340), images=images, filename_prefix=name)


def text_view(source: Link, title: str, size: tuple[int, int] = (WIDTH, 240)) -> Node:
    return node("PreviewAny", title, size=size, source=source)


def compared(model: Link, text: Link, negative: Link, title: str, key: str) -> dict[str, Node]:
    """Sampler, decoder and saved pictures of one model: three nodes that start with ``key``."""
    return {
        f"{key} sampler": sampler(model, text, negative, ("empty", "LATENT")),
        f"{key} pixels": decoded((f"{key} sampler", "LATENT"), ("base", "VAE")),
        f"{key} pictures": saved((f"{key} pixels", "IMAGE"), key, title),
    }


def own_model(more: str = "") -> Node:
    """What to change where a graph that was made with the demo base meets a real one."""
    text = (
        "Made with the demo base of LoRA Loom's repository, whose pictures are 32 × 32 pixels. For your own model:\n\n"
        "1. **Load Checkpoint**: choose it\n"
        "2. **Dataset Loader**: your folder; *resolution* 512 for SD 1.5, 1024 for SDXL and newer; *bucket_step* 64\n"
        "3. **Empty picture**: put an *Empty Latent Image* of your model's size in its place\n"
    )
    return note("For your own model", text + (f"\n{more}" if more else ""), (WIDTH, 300))
