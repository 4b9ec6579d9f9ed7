"""What adapters may sit on in a loaded MODEL and CLIP; found once per model, for as long as it lives.

* ``names_of``: the table of names of a MODEL's layers and, with one, of a CLIP's.
* ``layout_of``: blocks and paths of a module tree, for block weights.
* ``parameters_of``: its parameters, and what kind of place for an adapter each is; ``layer_of``: the layer of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from ..kernels.blocks import block_map
from ..kernels.layers import is_linear
from ..kernels.names import NameTable, layer_shapes
from ..kernels.strengths.layout import Layout
from .layers import conv_geometry

PLAIN = (torch.float32, torch.float16, torch.bfloat16)  # weights that take a patch without losing much of it

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
    return _once(tree, "layout", lambda: Layout(tuple(block_map(tree)), tuple(_shapes(tree))))


class Parameter(NamedTuple):
    """``product``: the weight of a linear layer or convolution; ``held_beside``: its module holds others that have
    parameters; ``cast``: the host casts it on use, where patches can act as well."""

    product: bool
    held_beside: bool
    cast: bool
    shape: tuple[int, ...]
    module: ref[nn.Module]
    name: str

    @property
    def _value(self) -> Tensor | None:
        module = self.module()
        return None if module is None else module._parameters.get(self.name)

    @property
    def kept(self) -> str:
        """What kind of numbers it is kept in at the moment."""
        value = self._value
        plain = type(value) in (Tensor, nn.Parameter)
        return str(value.dtype).removeprefix("torch.") if value is not None and plain else type(value).__name__

    @property
    def ordinary(self) -> bool:
        """Whether a patch loses little there."""
        value = self._value
        return value is not None and type(value) in (Tensor, nn.Parameter) and value.dtype in PLAIN


def parameters_of(tree: nn.Module) -> dict[str, Parameter]:
    """By name."""
    return _once(tree, "parameters", lambda: dict(_parameters(tree)))


def layer_of(key: str) -> str:
    """The canonical path that a parameter belongs to."""
    return key.removesuffix(".weight").removesuffix(".bias")


def is_product(module: nn.Module) -> bool:
    """Whether a layer is linear or a convolution that a branch can hang on."""
    return is_linear(module) or conv_geometry(module) is not None


def _parameters(tree: nn.Module) -> Iterator[tuple[str, Parameter]]:
    for path, module in tree.named_modules(remove_duplicate=False):
        if not module._parameters:
            continue
        here, beside = ref(module), any(True for child in module.children() for _ in child.parameters())
        for name, value in module._parameters.items():
            if value is not None:
                product, cast = name == "weight" and is_product(module), hasattr(module, f"{name}_function")
                key = f"{path}.{name}" if path else name
                yield key, Parameter(product, beside, cast, tuple(value.shape), here, name)


def _shapes(tree: nn.Module) -> dict[str, tuple[int, ...]]:
    return _once(tree, "shapes", lambda: layer_shapes(tree))


def _once(tree: nn.Module, what: str, make: Callable[[], T]) -> T:
    known = _known.setdefault(tree, {})
    if what not in known:
        known[what] = make()
    return known[what]
