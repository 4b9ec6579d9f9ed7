"""Blocks of a diffusion model, derived from its module tree rather than tabulated.

* ``block_map``: the blocks in the order in which the modules were registered (the forward order of the host's models).
* ``base_parameters``: everything outside them (embedders, final layers, time and label embeddings).
* ``BlockIndex``: which block a module path belongs to.

A *stack* is an outermost container whose children are numbered: a ``ModuleList`` with a composite child (one that has
children itself), or a ``Sequential`` with two. Each child is a block; a stack whose name begins with "mid" is one block
as a whole. This gives the vectors people know (with the base first: SD1.5 26, SDXL 20, Flux 58) and names for
architectures nobody has tabulated. Only names and sizes are read: models on the meta device work.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

MODEL_PREFIX = "diffusion_model."
AUXILIARY_SHARE = 0.10  # a stack with less of the parameters than this is a helper: a refiner, an adapter
_ROLES = (("in", re.compile("input|down")), ("mid", re.compile("mid")), ("out", re.compile("output|up")))


@dataclass(frozen=True)
class Block:
    """One block: ``id`` "double_blocks.7", ``group`` "double_blocks", ``role`` in, mid, out, trunk or aux.

    ``modules`` are the paths of the modules it consists of, everything below them included; ``parameters`` are the
    full names of its parameters. Both begin as paths of the tree do, "diffusion_model." included; ids do not.
    """

    id: str
    group: str
    role: str
    modules: tuple[str, ...]
    parameters: tuple[str, ...]


class BlockIndex:
    """Finds the block that a module or parameter path lies in."""

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._by_module = {path: block for block in blocks for path in block.modules}

    def of(self, path: str) -> Block | None:
        """The block that holds ``path``, None for the base."""
        while path:
            if path in self._by_module:
                return self._by_module[path]
            path = path.rpartition(".")[0]
        return None


def block_map(module_tree: nn.Module) -> list[Block]:
    """All blocks of a model (a loaded model with a ``diffusion_model``, or any tree such as a text encoder)."""
    root, prefix = diffusion_tree(module_tree)
    sizes = {prefix + name: parameter.numel() for name, parameter in root.named_parameters()}
    total = sum(sizes.values())
    below: dict[str, list[str]] = defaultdict(list)  # module → its parameters
    for name in sizes:
        module = name
        while module := module.rpartition(".")[0]:
            below[module].append(name)
    blocks = []
    for path, stack in _stacks(root, prefix):
        share = sum(sizes[name] for name in below.get(path, ()))
        if not share:
            continue
        group = path.removeprefix(MODEL_PREFIX)
        role = named_role(path) or ("trunk" if share >= AUXILIARY_SHARE * total else "aux")
        members = [(group, path)] if role == "mid" else [(f"{group}.{n}", f"{path}.{n}") for n, _ in _children(stack)]
        for identifier, member in members:
            blocks.append(Block(identifier, group, role, (member,), tuple(below.get(member, ()))))
    return blocks


def base_parameters(module_tree: nn.Module) -> tuple[str, ...]:
    """Full names of the parameters that lie in no block."""
    root, prefix = diffusion_tree(module_tree)
    inside = {name for block in block_map(module_tree) for name in block.parameters}
    return tuple(prefix + name for name, _ in root.named_parameters() if prefix + name not in inside)


def diffusion_tree(module_tree: nn.Module) -> tuple[nn.Module, str]:
    """The part of a loaded model that diffuses and the prefix of its paths; a tree without such a part as it is."""
    root = dict(module_tree.named_children()).get(MODEL_PREFIX.rstrip("."))
    return (module_tree, "") if root is None else (root, MODEL_PREFIX)


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in _children(module):
        path = prefix + name
        if _is_stack(name, child):
            yield path, child
        else:
            yield from _stacks(child, path + ".")


def _is_stack(name: str, module: nn.Module) -> bool:
    children = _children(module)
    if not all(key.isdigit() for key, _ in children):
        return False
    composites = sum(1 for _, child in children if _children(child))
    alone = isinstance(module, nn.ModuleList) or name.startswith("mid")
    return composites >= (1 if alone else 2) and isinstance(module, nn.ModuleList | nn.Sequential)


def named_role(path: str) -> str | None:
    """in, mid or out, where the name of a stack says so."""
    leaf = path.rpartition(".")[2]
    return next((role for role, pattern in _ROLES if pattern.match(leaf)), None)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children under every name; ``named_children`` would drop the second name of a shared module."""
    return [(name, child) for name, child in module._modules.items() if child is not None]
