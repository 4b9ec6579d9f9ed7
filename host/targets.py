"""What adapters may sit on in a loaded MODEL and CLIP; found once per model, for as long as it lives.

* ``names_of``: the table of names of a MODEL's layers and, with one, of a CLIP's.
* ``layout_of``: blocks and paths of a module tree, for block weights.
* ``parameters_of``: the names of its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from ..kernels.names import NameTable, layer_shapes
from ..kernels.strengths.layout import Layout

T = TypeVar("T")
_known: WeakKeyDictionary[nn.Module, dict[Any, Any]] = WeakKeyDictionary()


def names_of(model: Any, clip: Any | None) -> NameTable:
    """Of all layers of a MODEL and of the text encoders of a CLIP together."""
    tree = model.model
    if clip is None:
        return _once(tree, "names", lambda: NameTable(_shapes(tree)))
    text = clip.cond_stage_model
    tables: WeakKeyDictionary[nn.Module, NameTable] = _once(tree, "names with text", WeakKeyDictionary)
    if text not in tables:
        tables[text] = NameTable(_shapes(tree) | _shapes(text))
    return tables[text]


def layout_of(tree: nn.Module) -> Layout:
    return _once(tree, "layout", lambda: Layout.of(tree))


def parameters_of(tree: nn.Module) -> frozenset[str]:
    return _once(tree, "parameters", lambda: frozenset(name for name, _ in tree.named_parameters()))


def _shapes(tree: nn.Module) -> dict[str, tuple[int, ...]]:
    return _once(tree, "shapes", lambda: layer_shapes(tree))


def _once(tree: nn.Module, what: str, make: Callable[[], T]) -> T:
    known = _known.setdefault(tree, {})
    if what not in known:
        known[what] = make()
    return known[what]
