"""How trainers spell the tensors of a layer's adapter, as one table.

* ``SPELLINGS``: the end of a key -> the part it is, by the names that the families have in ``registry.FAMILIES``.
* ``split``: a key of a file -> the layer's name as it stands there, the part, the adapter's name (PEFT's files).
* ``BOOKKEEPING``: keys that tools leave in files and that are no part of an adapter.

Parts that only some trainers write, and that ``reading`` turns into others, are listed as constants.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import NamedTuple

from .control import SET_WEIGHT, WIDTH
from .dora import PARTS as NORMS
from .ia3 import ON_INPUT, WEIGHT
from .lora import DOWN, UP
from .registry import FAMILIES

UP_BIAS = "lora_up.bias"  # added behind the product: a difference of the bias, scaled like the product
TOKENS_DOWN, TOKENS_UP = "lora_embedding_A", "lora_embedding_B"  # PEFT's factors of a table, the other way round
VERA_A, VERA_B = "vera_A", "vera_B"  # shared by all layers
BOOKKEEPING = re.compile(r"_aux\.")  # slider tools

_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"  # PEFT's slot for the adapter's name, empty in most files
SPELLINGS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_A{_ADAPTER}(?:\.weight)?", DOWN),  # PEFT and diffusers; without ".weight": Mochi's authors
    (rf"\.lora_B{_ADAPTER}(?:\.weight)?", UP),
    (rf"\.lora_B{_ADAPTER}\.bias|\.lora_up\.bias", UP_BIAS),
    (r"(?:\.lora|_lora|\.lora_linear_layer)?\.down\.weight", DOWN),  # diffusers' older ones, XLabs
    (r"(?:\.lora|_lora|\.lora_linear_layer)?\.up\.weight", UP),
    (rf"\.(?P<part>lora_embedding_[AB]){_ADAPTER}", r"\g<part>"),
    (rf"\.(?P<part>lora_magnitude_vector){_ADAPTER}(?:\.weight)?", r"\g<part>"),
    (rf"\.(?P<part>(?:hada|lokr)_[wt][12](?:_[ab])?|ia3_l|boft_[Rs]|vera_(?:lambda_[bd]|[AB])){_ADAPTER}", r"\g<part>"),
    (rf"\.oft_R{_ADAPTER}\.(?P<part>weight|scaled_oft)", r"oft_R.\g<part>"),
    (r"(?<=_norm)\.scale", SET_WEIGHT),
    (rf"\.(?P<part>{SET_WEIGHT}|{WIDTH}|scalar)", r"\g<part>"),
)


class Split(NamedTuple):
    """``part`` is None for a key that ends like no part of any adapter."""

    name: str
    part: str | None
    adapter: str = ""


def _own() -> list[tuple[str, str]]:
    parts = {"alpha", *NORMS}.union(*(family.parts for family in FAMILIES.values()))
    spelled = "|".join(re.escape(part) for part in sorted(parts, key=len, reverse=True))
    return [(rf"\.(?P<part>{spelled})", r"\g<part>")]


_ROWS = (*SPELLINGS, *_own())
_GROUP = re.compile(r"\?P<([a-z]+)>")
_GIVEN = r"\g<part>"  # at the end of a row's part: what its group of that name has found
# one pattern of all rows, with the groups of row 3 called row3, part3 and adapter3
_NUMBERED = ((n, _GROUP.sub(rf"?P<\g<1>{n}>", end)) for n, (end, _) in enumerate(_ROWS))
_ANY = re.compile("|".join(f"(?P<row{n}>(?:{end})$)" for n, end in _NUMBERED))
_READ_AS = {
    f"row{n}": (part.removesuffix(_GIVEN), f"part{n}" * part.endswith(_GIVEN), f"adapter{n}" * ("<adapter>" in end))
    for n, (end, part) in enumerate(_ROWS)
}


def split(key: str, file: Container[str] = ()) -> Split:
    """The longest end of ``key`` that is a part's name decides.

    The other keys of the ``file`` do where a layer itself is called "down" or "up": its (IA)³ is not another's factor.
    """
    if f"{key.removesuffix('.weight')}.{ON_INPUT}" in file:
        return Split(key.removesuffix(".weight"), WEIGHT)
    found = _ANY.search(key, _tail(key))
    if found is None or found.start() == 0:
        return Split(key, None)
    assert found.lastgroup is not None
    part, given, adapter = _READ_AS[found.lastgroup]
    name = key[: found.start()]
    return Split(name, part + found[given] if given else part, (found[adapter] or "") if adapter else "")


def _tail(key: str) -> int:
    """Where the longest end of all could begin: at the third dot from the right, or a "_lora" before the only two."""
    dot = len(key)
    for _ in range(3):
        before = key.rfind(".", 0, dot)
        if before < 0:
            return max(0, dot - len("_lora"))
        dot = before
    return dot
