"""Datasets in the host's own executor: the nodes around them, small folders, and what is trained of a sample."""

from __future__ import annotations

import os
import random

import numpy as np
from comfy_extras import nodes_preview_any, nodes_string, nodes_upscale_model
from PIL import Image

import nodes
from graph import Graph, images, node
from lora_loom.training.dataset.batches import place
from lora_loom.training.dataset.pixels import load

SIZES = {"resolution": 64, "bucket_step": 16}


class KeepLists:
    """Its inputs as whole lists, for the test to see."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE, INPUT_IS_LIST = (), "keep", "test", True, True
    kept: dict = {}

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {name: ("*",) for name in ("images", "masks", "captions", "ids")}}

    def keep(self, **lists):
        KeepLists.kept = lists
        return ()


class Shuffled:
    """All of its lists in another order."""

    RETURN_TYPES, FUNCTION, CATEGORY, INPUT_IS_LIST = ("IMAGE", "STRING", "STRING"), "shuffle", "test", True
    OUTPUT_IS_LIST = (True, True, True)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "captions": ("STRING",), "ids": ("STRING",), "seed": ("INT",)}}

    def shuffle(self, images, captions, ids, seed):
        order = list(range(len(ids)))
        random.Random(seed[0]).shuffle(order)
        return tuple([values[index] for index in order] for values in (images, captions, ids))


def dataset_graph() -> Graph:
    """An executor that also knows the core nodes for text and upscaling, and the two above."""
    for kind in (KeepLists, Shuffled):
        Graph.register(kind.__name__, kind)
    for module in (nodes_string, nodes_upscale_model, nodes_preview_any):
        for kind in vars(module).values():
            if isinstance(kind, type) and getattr(kind, "__module__", "") == module.__name__:
                schema = getattr(kind, "GET_SCHEMA", None)
                if schema is not None:
                    Graph.register(schema().node_id, kind)
    Graph.register("PreviewAny", nodes_preview_any.PreviewAny)
    return Graph()


def loader(folder, **options):
    return node("LoomDatasetLoader", root="datasets", folder=folder, **SIZES | {"lint": "off"} | options)


def put(places, name, count=4, side=64, square=True):
    folder = images(places / "comfy/datasets" / name, count, side)
    if square:
        for index in range(1, count, 2):
            picture = Image.open(folder / f"{index}.png").crop((0, 0, side, side))
            picture.save(folder / f"{index}.png")
    return folder


def stored(folder):
    """Name → pixels of every picture in a folder, as Pillow reads them."""
    return {path.name: np.asarray(Image.open(path), np.float32) / 255 for path in sorted(folder.glob("*.png"))}


def trained(dataset, sample):
    """Its pixels as trained."""
    [item] = [item for item in place(dataset) if dataset.samples[item.sample].id == sample]
    return load(dataset, item, 0, 0).image.numpy()


def settings(kind):
    return nodes.NODE_CLASS_MAPPINGS[kind].GET_SCHEMA().inputs


def later(path):
    """A change of time alone, by more than any clock's tick."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
