"""What of a LoRA found no place in a model, told so that people can do something about it.

* ``grouped``: one line for each cause: how many keys, one of them, and what the model has that is called alike.
* ``both_bases``: what the file was made for and what the model is, where these differ.
* ``summary``: one line for the log, with every key behind it only where LOOM_DEBUG is 1.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable, Sequence

from . import reading
from .architectures import in_text_encoder, local, same_base
from .names import NameTable
from .reading import LoRAFile, Unplaced
from .spellings import split

CURES = {
    reading.WRONG_BASE: "made for another model; load the base it was trained on",
    reading.NO_ENCODER: "of a text encoder that is not here; connect the CLIP it was trained with",
    reading.SHAPE: "of another size than the layer here; made for another model of this family",
    reading.PREFIX: "called as no trainer known here calls layers",
    reading.DUPLICATE: "there twice, used once",
    reading.INCOMPLETE: "a part is missing or the parts do not fit each other; get or save the file again",
    reading.DAMAGED: "damaged; get or save the file again",
    reading.UNKNOWN: "no part of an adapter that is known here",
}
_CALLED = {
    **{"sd1": "SD1.5", "sd2": "SD2", "sd": "SD1.5 or SD2", "sdxl": "SDXL", "sdxl_refiner": "the SDXL refiner"},
    **{"sd3": "SD3", "flux": "Flux", "flux2": "Flux 2", "chroma": "Chroma", "qwen_image": "Qwen-Image", "wan": "Wan"},
    **{"hunyuan_video": "HunyuanVideo", "hunyuan_dit": "HunyuanDiT", "lumina2": "Lumina 2", "z_image": "Z-Image"},
    **{"ltxv": "LTX-Video", "mochi": "Mochi", "auraflow": "AuraFlow", "hidream": "HiDream", "pixart": "PixArt"},
    **{"cosmos1": "Cosmos 1", "cosmos2": "Cosmos 2", "anima": "Anima", "cascade_c": "Stable Cascade"},
}
_CONTEXTS = {768: "sd1", 1024: "sd2"}  # what cross-attention of the two takes in
_CANDIDATES = 40  # names that are compared letter by letter
_LONGEST = 300  # letters of a key that are shown or compared


def called(architecture: str | None) -> str:
    """For people."""
    return _CALLED.get(architecture or "", architecture or "a model not known here")


def base_of(names: NameTable) -> str | None:
    """``names.architecture``, SD1 and SD2 told apart."""
    if names.architecture != "sd":
        return names.architecture
    widths = (shape[1] for path, shape in names.shapes.items() if path.endswith("attn2.to_k") and len(shape) > 1)
    return _CONTEXTS.get(next(widths, 0), "sd")


def both_bases(architecture: str | None, evidence: str, names: NameTable) -> str:
    """Says for what the file was made and what the model is; empty where they may be the same."""
    here = base_of(names)
    sds = {"sd1", "sd2"}
    if same_base(architecture, names.architecture) and not (sds == {architecture, here}):
        return ""
    return f"made for {called(architecture)} ({evidence}), the model is {called(here)}"


def grouped(
    unplaced: Sequence[Unplaced], names: NameTable, architecture: str | None = None, evidence: str = ""
) -> list[str]:
    """One line per cause, the most frequent first."""
    bases = both_bases(architecture, evidence, names)
    by_cause: dict[str, list[Unplaced]] = {}
    for item in unplaced:
        by_cause.setdefault(item.reason, []).append(item)
    lines = []
    for cause, items in sorted(by_cause.items(), key=lambda pair: -len(pair[1])):
        first = items[0]
        told = bases if bases and cause in (reading.WRONG_BASE, reading.SHAPE) else CURES.get(cause, "")
        parts = [f"{len(items)} {'key' if len(items) == 1 else 'keys'} left out, {cause}", told]
        parts.append(f"for example {first.key[:_LONGEST]}")
        if cause in (reading.SHAPE, reading.INCOMPLETE, reading.DAMAGED, reading.DUPLICATE):
            parts.append(first.detail[:_LONGEST])
        elif cause in (reading.WRONG_BASE, reading.PREFIX, reading.UNKNOWN):
            near = nearest(split(first.key).name, names)
            parts.append(f"nearest in this model: {near}" if near else "nothing in this model is called alike")
        lines.append("; ".join(part for part in parts if part))
    return lines


def nearest(name: str, names: NameTable) -> str:
    """The layer of the model whose name, in any spelling, is most like ``name``; empty where none is like it.

    Compared letter by letter are only those that share most pieces of their names.
    """
    wanted = (name if in_text_encoder(name) else local(name)).replace(".", "_")[:_LONGEST]
    pieces = Counter(wanted.split("_"))
    known = {flat: path for flat, path in names.spelled().items() if not path.endswith(".bias")}
    shared = {flat: sum((pieces & Counter(flat.split("_"))).values()) for flat in known}
    best = sorted(shared, key=lambda flat: (-shared[flat], abs(len(flat) - len(wanted)), flat))
    close = difflib.get_close_matches(wanted, best[:_CANDIDATES], n=1, cutoff=0.5)
    return known[close[0]] if close else ""


def summary(name: str, file: LoRAFile, engine: str) -> str:
    """For the log: "cat.safetensors: 282 of 282 layers placed, engine fuse"; every key with LOOM_DEBUG=1."""
    lost = Counter(item.reason for item in file.unplaced)
    places = {key: split(key).name for key, *_ in file.unplaced}
    layers = len(file.adapters) + len({layer for layer in places.values() if not _placed(layer, file)})
    line = f"{name}: {len(file.adapters)} of {layers} layers placed, engine {engine}"
    if lost:
        bases = both_bases(file.architecture, file.evidence, file.names) if file.names is not None else ""
        causes = ", ".join(f"{count} {cause}" for cause, count in lost.most_common())
        line += f"; keys left out: {causes}" + ("" if debugging() else " (LOOM_DEBUG=1 lists them)")
        line += f"; {bases}" if bases else ""
    return "\n".join([line, *every_key(file.unplaced)]) if debugging() else line


def every_key(unplaced: Iterable[Unplaced]) -> list[str]:
    return [f"  {key[:_LONGEST]}: {reason}, {detail[:_LONGEST]}" for key, reason, detail in unplaced]


def debugging() -> bool:
    return os.getenv("LOOM_DEBUG") == "1"


def _placed(layer: str, file: LoRAFile) -> bool:
    """Whether another part of the same layer is used."""
    place = file.names.find(layer) if file.names is not None else None
    return (layer if place is None else place.path) in file.adapters
