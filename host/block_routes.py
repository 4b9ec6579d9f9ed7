"""What the page may ask about strengths, to draw them: their texts are read here, by the parser that nodes use.

* POST ``blocks`` with {"blocks", "steps", "interpolation", "lora", "layout"}: the bars of blocks and the points over
  the run, each with its place in the text; a text that is not understood comes back as ``error``
* POST ``blocks/presets`` with {"lora", "layout"}: the presets of block weights, and which of them fit
* ``remember``: called by nodes that put a LoRA on a MODEL: its blocks, by names alone, for the page to ask about

Which blocks there are is told by the model of the node's last run (``layout``, which the run gave out), or the model
that the LoRA called ``lora`` was last put on, else by the file itself, which may hold a part of them only.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

from aiohttp import web

from ..kernels.block_names import BASE, resolve
from ..kernels.blocks import MODEL_PREFIX, Block
from ..kernels.file_blocks import blocks_of_file
from ..kernels.safetensors_io import TensorFile
from ..kernels.strengths.blocks import parse_blocks
from ..kernels.strengths.components import TE
from ..kernels.strengths.layout import Layout
from ..kernels.strengths.pictured import Rule, drawn, pictured
from ..kernels.strengths.schedule import HOLD, INTERPOLATIONS
from . import loras
from .diagnosis import short_names
from .guard import Refused, guarded
from .presets import block_presets
from .targets import layout_of
from .workers import Workers

LAYOUTS_KEPT, FILES_KEPT, LORAS_KEPT = 32, 64, 256
READERS, MOST_WAITING = 2, 64  # threads, and requests that wait for them
_LONGEST = 16_000  # letters of a text; the parser refuses fewer, with its own words
_REST = "rest"
_FIRST_NUMBER = re.compile(r"^\D*\d+_")


@dataclass(frozen=True)
class Known:
    """``on``: ids of the blocks that the LoRA is on, None where that is not known; ``source``: model or file."""

    layout: Layout
    on: frozenset[str] | None
    source: str


_lock = threading.Lock()
_layouts: OrderedDict[str, Layout] = OrderedDict()
_of_loras: OrderedDict[str, str] = OrderedDict()  # LoRA by its name → the layout it was last put on


def remember(model: Any, lora_name: str | None, paths: Iterable[str] | None = None) -> dict[str, Any]:
    """What a node tells the page of the MODEL that a LoRA was put on, as a part of its ``ui``.

    ``paths``: the layers that it is on.
    """
    layout = layout_of(model.model)
    key = hashlib.sha256("\n".join(layout.paths).encode()).hexdigest()[:16]
    with _lock:
        _put(_layouts, key, layout, LAYOUTS_KEPT)
        if lora_name is not None:
            _put(_of_loras, lora_name, key, LORAS_KEPT)
    on = None if paths is None else sorted({layout.block_of[path] for path in paths if path in layout.block_of})
    return {"loom_blocks": [{"layout": key, "on": on}]}


def _put(table: OrderedDict, key: str, value: Any, most: int) -> None:
    table[key] = value
    table.move_to_end(key)
    while len(table) > most:
        table.popitem(last=False)


def register(routes: web.RouteTableDef, prefix: str) -> None:
    readers = Workers("loom-blocks", READERS, MOST_WAITING)

    @routes.post(f"{prefix}/blocks")
    @guarded
    async def blocks(request: web.Request, body: dict[str, Any]) -> Any:
        texts = {name: _text(body, name) for name in ("blocks", "steps", "interpolation", "lora", "layout")}
        return await readers.run(_told, texts)

    @routes.post(f"{prefix}/blocks/presets")
    @guarded
    async def presets(request: web.Request, body: dict[str, Any]) -> Any:
        return await readers.run(_presets, _text(body, "lora"), _text(body, "layout"))


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name, "")
    if not isinstance(value, str) or len(value) > _LONGEST:
        raise Refused(400, f"{name} is no text of at most {_LONGEST} letters")
    return value


# -- answers


def _told(texts: dict[str, str]) -> dict[str, Any]:
    interpolation = texts["interpolation"] or HOLD
    if interpolation not in INTERPOLATIONS:
        raise Refused(400, f"interpolation is none of {', '.join(INTERPOLATIONS)}")
    return {
        "blocks": _bars(texts["blocks"], interpolation, _known(texts["lora"], texts["layout"])),
        "steps": _points(texts["steps"], interpolation),
    }


def _bars(text: str, interpolation: str, known: Known | None) -> dict[str, Any]:
    if known is None:
        return {"source": None}
    lenient = known.source == "file"
    groups = _groups(known)
    try:
        found = pictured(text, known.layout, interpolation, block_presets(), lenient=lenient)
    except ValueError as error:
        return {"source": known.source, "groups": groups, "error": str(error)}
    return {
        "source": known.source,
        "groups": groups,
        "bars": {bar.id: {"weight": bar.weight, "others": bar.others} for bar in found.bars},
        "rules": _in_page_units(text, found.rules),
        "notes": list(found.notes),
    }


def _points(text: str, interpolation: str) -> dict[str, Any]:
    try:
        found = drawn(text, interpolation=interpolation)
    except ValueError as error:
        return {"error": str(error)}
    points = [
        {"text": item, "weight": point.weight, "position": point.position, "unit": point.unit}
        for item, point in found.points
    ]
    return {"points": points, "constant": found.constant, "how": found.how, "inset": found.inset}


def _presets(lora: str, layout: str) -> dict[str, Any]:
    """Names in the order of the file; ``fits`` is None where the model is not known."""
    known = _known(lora, layout)
    try:
        presets = block_presets()
    except ValueError as error:
        return {"presets": [], "error": str(error)}
    judged = known.layout if known is not None and known.source == "model" else None
    return {"presets": [{"name": name, "fits": _fits(texts, judged)} for name, texts in presets.items()]}


def _fits(texts: Sequence[str], layout: Layout | None) -> bool | None:
    if layout is None:
        return None
    return any(_is_read(text, layout) for text in texts)


def _is_read(text: str, layout: Layout) -> bool:
    try:
        parse_blocks(text, layout, presets={})
    except ValueError:
        return False
    return True


def _in_page_units(text: str, rules: Iterable[Rule]) -> list[dict[str, Any]]:
    """With places as the page counts them, where letters beyond U+FFFF are two."""
    wide = not text.isascii()

    def place(letters: int) -> int:
        return len(text[:letters].encode("utf-16-le", "surrogatepass")) // 2 if wide else letters

    return [
        {**asdict(rule), "begin": place(rule.begin), "end": place(rule.end), "value": place(rule.value)}
        for rule in rules
    ]


def _groups(known: Known) -> list[dict[str, Any]]:
    """Bars by groups, each with the name that means it in a text; text encoders and what lies in no block last."""
    blocks = known.layout.blocks
    names = short_names(blocks, [block.id for block in blocks])
    members: dict[str, list[Block]] = {}
    for block in blocks:
        members.setdefault(block.group, []).append(block)
    found = []
    for group, inside in members.items():
        label = inside[0].role if inside[0].role in ("in", "mid", "out") else names[inside[0].id].partition(".")[0]
        selector = next((name for name in (label, group) if _is_group(name, inside, blocks)), None)
        bars = [_bar(known, block.id, names[block.id], _number(block) or label) for block in inside]
        found.append({"label": label, "selector": selector or " ".join(bar["selector"] for bar in bars), "bars": bars})
    rest = [_bar(known, BASE, BASE, "base"), _bar(known, TE, TE, "text")]
    return [*found, {"label": "other", "selector": None, "bars": rest}]


def _bar(known: Known, identifier: str, selector: str, label: str) -> dict[str, Any]:
    on = identifier in (BASE, TE) or known.on is None or identifier in known.on
    return {"id": identifier, "selector": selector, "label": label, "on": on}


def _number(block: Block) -> str:
    return block.id.removeprefix(block.group).lstrip(".")


def _is_group(name: str, inside: list[Block], blocks: Sequence[Block]) -> bool:
    try:
        return resolve(name, blocks) == {block.id for block in inside}
    except ValueError:
        return False


# -- which blocks there are


def _known(lora: str, layout: str) -> Known | None:
    file = _of_file(lora)
    with _lock:
        model = _layouts.get(layout) or _layouts.get(_of_loras.get(lora, ""))
    return file if model is None else Known(model, None if file is None else file.on, "model")


def _of_file(lora: str) -> Known | None:
    try:
        path = loras.path_of(lora)
        status = os.stat(path)
        return _read(path, status.st_mtime_ns, status.st_size)
    except (ValueError, OSError):  # the node itself says what is wrong with it
        return None


@lru_cache(FILES_KEPT)
def _read(path: str, changed: int, size: int) -> Known | None:
    """From the header of the file alone."""
    file = TensorFile(path)
    blocks = blocks_of_file(file.shapes, file.metadata)
    if not blocks:
        return None
    paths = [_path(block, name) for block in blocks for name in block.parameters]
    # something else in every block, as its model has it: no kind of layer is then all of a block
    rest = [f"{MODEL_PREFIX}{block.id}.{_REST}" for block in blocks]
    layout = Layout(tuple(blocks), (*dict.fromkeys(paths), *rest, f"{MODEL_PREFIX}{_REST}"))
    return Known(layout, frozenset(block.id for block in blocks), "file")


def _path(block: Block, parameter: str) -> str:
    """Below its block; of most families only the name in the file is known, which has no dots."""
    local = parameter.removeprefix(MODEL_PREFIX).removesuffix(".weight")
    return MODEL_PREFIX + (local if "." in local else f"{block.id}.{_FIRST_NUMBER.sub('', local)}")
