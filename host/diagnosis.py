"""How much a LoRA changes a model, block by block.

* ``shares_of(patcher, adapters, factor)`` → ``Shares``: ‖factor · ΔW‖ / ‖W‖ of every layer, ``blocks`` of every block,
  ``lines`` in words. Frobenius norms; of a block √Σ‖ΔW‖² / √Σ‖W‖² over the layers that the LoRA touches.
* ``change_of``: ‖ΔW‖ of one adapter, from its factors where they tell it.

W is the base model's own weight, whatever is merged into it at the time, and its norm is read once. Large weights are
read in part, and what needs dense arithmetic is measured as far as ``BUDGET`` goes; both is said.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from ..kernels.adapter import Adapter
from ..kernels.block_names import BASE, resolve
from ..kernels.blocks import Block, BlockIndex, block_map
from ..kernels.compose import Sliced, Sum, Swapped
from ..kernels.control import Widened
from ..kernels.full import Full
from ..kernels.lokr import LoKr
from ..kernels.lora import LoRA
from .originals import Originals, UnreadableError

BUDGET = 1 << 28  # numbers of weights that are made dense for one report, seconds on a processor
SHOWN = 3  # strongest and weakest blocks in words

# ‖ΔW‖ that the adapter alone tells, for as long as it lives: adapters that are applied do not change
_CHANGES: WeakKeyDictionary[Adapter, float] = WeakKeyDictionary()


class LayerShare(NamedTuple):
    """One layer: ``change`` is ‖ΔW‖ at full strength, ``factor`` the strength, ``weight`` ‖W‖ with its relative
    standard ``error``; ``zero``: the adapter changes nothing at any strength, nor a bias."""

    path: str
    block: str
    role: str
    change: float
    factor: float
    weight: float
    error: float = 0.0
    zero: bool = False

    @property
    def share(self) -> float:
        return _ratio(abs(self.factor) * self.change, self.weight)


class BlockShare(NamedTuple):
    """``block`` is an id, or "base" for what lies in no block; ``role`` as in ``kernels.blocks``."""

    block: str
    share: float
    layers: int
    role: str = BASE


@dataclass(frozen=True)
class Shares:
    """``layers`` in the model's order; ``left_out`` of them for ``BUDGET``'s sake; ``unreadable``: reason → how many;
    ``names``: id → what to call the block, which the selectors of blocks understand."""

    layers: tuple[LayerShare, ...]
    left_out: int
    unreadable: Mapping[str, int]
    names: Mapping[str, str]

    @property
    def blocks(self) -> list[BlockShare]:
        members: dict[str, list[LayerShare]] = defaultdict(list)
        for layer in self.layers:
            members[layer.block].append(layer)
        return [
            BlockShare(
                block,
                _ratio(
                    math.hypot(*(layer.factor * layer.change for layer in own)),
                    math.hypot(*(layer.weight for layer in own)),
                ),
                len(own),
                own[0].role,
            )
            for block, own in members.items()
        ]

    def lines(self) -> list[str]:
        """For people, without the numbers of every block."""
        return [
            *_extremes(self.blocks, self.names),
            *_nothing(self.layers),
            *_accuracy(self.layers, self.left_out),
            *(f"{some(count, 'layer')} could not be compared: {reason}" for reason, count in self.unreadable.items()),
        ]


@torch.no_grad()
def shares_of(patcher: Any, adapters: Mapping[str, Adapter], factor: Callable[[str], float]) -> Shares:
    """Of ``adapters`` by the paths of layers of the patcher's model; ``factor`` of a path is how strong it acts."""
    originals, blocks = Originals(patcher), block_map(patcher.model)
    index = BlockIndex(blocks)
    found = {path: index.of(path) for path in adapters}
    affordable = _affordable(originals, adapters, found)
    layers: list[LayerShare] = []
    unreadable: Counter[str] = Counter()
    for path, adapter in adapters.items():
        if path not in affordable:
            continue
        block = found[path]
        try:
            norm = originals.norm(path)
            change = change_of(adapter, path, originals)
        except UnreadableError as error:
            unreadable[str(error)] += 1
            continue
        name, role = (BASE, BASE) if block is None else (block.id, block.role)
        zero = not change and not _moves_bias(adapter)
        layers.append(LayerShare(path, name, role, change, factor(path), norm.value, norm.error, zero))
    order = {block.id: number for number, block in enumerate(blocks)}
    layers.sort(key=lambda layer: order.get(layer.block, -1))
    names = short_names(blocks, {layer.block for layer in layers})
    return Shares(tuple(layers), len(adapters) - len(affordable), unreadable, names)


def change_of(adapter: Adapter, path: str, originals: Originals) -> float:
    """‖ΔW‖ at full strength. Raises UnreadableError where that takes W and W cannot be read."""
    known = _CHANGES.get(adapter)
    if known is None:
        known = _known(adapter)
    if known is not None:
        _CHANGES[adapter] = known
        return known
    weight = originals.dense(path)
    while isinstance(adapter, Widened):
        weight, adapter = adapter.widened(weight), adapter.inner
    return adapter.difference(weight).norm().item()


def _known(adapter: Adapter) -> float | None:
    """‖ΔW‖ where the adapter's own tensors tell it at little cost."""
    if isinstance(adapter, Sliced | Swapped | Widened):
        return _known(adapter.inner)
    if isinstance(adapter, Sum):
        return _known_sum(adapter.parts)
    if isinstance(adapter, LoRA):
        return None if adapter.mid is not None else adapter.norm().item()
    return adapter.norm().item() if isinstance(adapter, LoKr | Full) else None


def _known_sum(parts: Sequence[Adapter]) -> float | None:
    if all(isinstance(part, LoRA) and part.mid is None for part in parts):
        loras = [part for part in parts if isinstance(part, LoRA)]
        down = torch.cat([lora.down.flatten(1).float() for lora in loras])
        up = torch.cat([lora.scale * lora.up.flatten(1).float() for lora in loras], 1)
        return LoRA(down, up, len(down)).norm().item()
    slices = sorted((part.start, part.start + part.length) for part in parts if isinstance(part, Sliced))
    apart = all(end <= start for (_, end), (start, _) in zip(slices, slices[1:], strict=False))
    norms = [_known(part) for part in parts]
    if len(slices) < len(parts) or not apart:
        return None
    known = [norm for norm in norms if norm is not None]
    return math.hypot(*known) if len(known) == len(norms) else None


def _affordable(originals: Originals, adapters: Mapping[str, Adapter], blocks: Mapping[str, Block | None]) -> set[str]:
    """The layers to measure: those that cost little, and of the others one in every block, then a second, and so on
    while ``BUDGET`` lasts."""
    turns: Counter[Block | None] = Counter()
    chosen, dear = set(), []
    for path, adapter in adapters.items():
        if _cheap(adapter) and originals.in_rows(path):
            chosen.add(path)
        else:
            dear.append((turns[blocks[path]], path))
            turns[blocks[path]] += 1
    spent = 0
    for _, path in sorted(dear, key=lambda pair: pair[0]):
        if spent > BUDGET:
            break
        spent += math.prod(originals.shape(path))
        chosen.add(path)
    return chosen


def _cheap(adapter: Adapter) -> bool:
    if isinstance(adapter, Sliced | Swapped | Widened):
        return _cheap(adapter.inner)
    if isinstance(adapter, Sum):
        return all(map(_cheap, adapter.parts))
    return isinstance(adapter, LoKr | Full) or (isinstance(adapter, LoRA) and adapter.mid is None)


def _moves_bias(adapter: Adapter) -> bool:
    """Whether it gives a layer another bias than that of ones."""
    if adapter.shape is None:
        return False
    ones = torch.ones(adapter.shape[0])
    moved = adapter.merged_bias(ones)
    return moved is not None and not torch.equal(moved.cpu().float(), ones)


def _ratio(change: float, weight: float) -> float:
    if weight:
        return change / weight
    return math.inf if change else 0.0


# -- in words


def some(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def percent(share: float) -> str:
    """Two digits, three of what is large."""
    if share and not 1e-5 <= share < 100:
        return f"{share * 100:.1e} %"
    digits = 0 if share >= 0.1 or share <= 0 else 1 - math.floor(math.log10(share * 100))
    return f"{share * 100:.{digits}f} %"


def short_names(blocks: Sequence[Block], wanted: Iterable[str]) -> dict[str, str]:
    """id → the shortest name that means just this block; "double.3" for "double_blocks.3"."""
    names = {BASE: BASE}
    groups: dict[str, str] = {}
    for block in blocks:
        if block.group not in groups:
            last = block.group.rpartition(".")[2]
            tried = [last.removesuffix("_blocks").removesuffix("_block").removesuffix("_layers"), last, block.group]
            end = block.id.removeprefix(block.group)
            groups[block.group] = next(name for name in tried if _means(name + end, block, blocks))
        names[block.id] = groups[block.group] + block.id.removeprefix(block.group)
    return {block: names[block] for block in wanted}


def _means(name: str, block: Block, blocks: Sequence[Block]) -> bool:
    try:
        return resolve(name, blocks) == {block.id}
    except ValueError:
        return False


def _extremes(blocks: Sequence[BlockShare], names: Mapping[str, str]) -> list[str]:
    ranked = sorted((block for block in blocks if 0 < block.share < math.inf), key=lambda block: -block.share)
    told = [f"{names[block.block]} {percent(block.share)}" for block in ranked]
    if not told:
        return []
    if len(told) <= 2 * SHOWN:
        return [f"change of the weights by block: {', '.join(told)}"]
    strongest, weakest = told[:SHOWN], told[: -SHOWN - 1 : -1]
    return [f"strongest blocks: {', '.join(strongest)}; weakest: {', '.join(weakest)} (change of the weights)"]


def _nothing(layers: Sequence[LayerShare]) -> list[str]:
    zero = sum(layer.zero for layer in layers)
    off = sum(not layer.zero and not layer.factor for layer in layers)
    broken = [layer for layer in layers if not math.isfinite(layer.change)]
    on_zeros = sum(not layer.weight and math.isfinite(layer.change) and layer.change > 0 for layer in layers)
    lines = []
    if zero:
        lines.append(f"{some(zero, 'layer')} change nothing: what the file holds for them is zero, as before training")
    if off:
        lines.append(f"{some(off, 'layer')} at strength 0")
    if broken:
        lines.append(f"{some(len(broken), 'layer')} with values that are no numbers, {broken[0].path} first")
    if on_zeros:
        lines.append(f"{some(on_zeros, 'layer')} whose own weights are all zero")
    return lines


def _accuracy(layers: Sequence[LayerShare], left_out: int) -> list[str]:
    lines = []
    estimated = [layer.error for layer in layers if layer.error]
    if estimated:
        within = max(0.001, 2 * max(estimated))
        lines.append(
            f"the weights of {some(len(estimated), 'large layer')} were read in part: the norms of these are within "
            f"{within:.1%}"
        )
    if left_out:
        lines.append(f"{some(left_out, 'layer')} not measured: this kind of adapter or weight takes too long for all")
    return lines
