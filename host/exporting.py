"""What is applied to a MODEL and a CLIP at the moment, as one LoRA.

* ``collect``: all of it that can be seen, layer by layer: our branches at their constant strengths, our patches, core's
  and other packs' patches. What is low-rank stays so, exactly; anything else is patched weight minus weight by the
  host's own calculation, made when it is asked for.
* ``bake``: that as one file.

Strengths that change over a run cannot be in a file: an error names the widget. What acts in ways that cannot be seen
from outside (hooks, injected layers) is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from ..kernels.adapter import Adapter, Additive
from ..kernels.branches import can_branch, fused, fused_bias, needs_weight
from ..kernels.compose import Sliced, Sum, Swapped
from ..kernels.full import WEIGHTS, Full
from ..kernels.lora import DOWN, MID, UP, LoRA
from ..kernels.low_rank import Cut, as_lora, distance, truncated
from ..kernels.names import NameTable
from ..kernels.reading import LoRAFile
from ..kernels.tools.merge import Ingredient, merge
from ..kernels.tools.outcome import LayerOutcome, Outcome
from . import branching
from .effective import applied_patches, base_reader
from .embeddings import encoders
from .fusing import KEY, FusedPatch, OnUse
from .identify import origin_of
from .originals import Originals
from .targets import names_of, parameters_of

Parts = list[tuple[Adapter, float]]
_TUCKER = 4  # dimensions of the cores that core multiplies out
_NO_LAYERS = ("model_sampling", "latent_format", "process_latent_in", "process_latent_out")  # exchanged, no layers
_HOOKS = ("model_function_wrapper", "patches", "patches_replace")


class Change(Additive):
    """The difference that something makes to a weight, computed whenever it is asked for and never kept."""

    name = "applied"

    def __init__(self, shape: Sequence[int], compute: Callable[[], Tensor]) -> None:
        super().__init__({}, shape)
        self._compute = compute

    def delta(self) -> Tensor:
        return self._compute()


@dataclass(frozen=True)
class Collected:
    """``parts``: path → adapters with their strengths, all of which add up."""

    names: NameTable
    parts: dict[str, Parts] = field(default_factory=dict)
    embeddings: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def computed(self) -> list[str]:
        """The layers of which a part is patched weight minus weight."""
        return [path for path, parts in self.parts.items() if any(isinstance(adapter, Change) for adapter, _ in parts)]

    def ingredients(self) -> list[Ingredient]:
        """One for the first part of every layer, one for the second, and so on."""
        found = []
        for number in range(max(map(len, self.parts.values()), default=0)):
            own = {path: parts[number] for path, parts in self.parts.items() if number < len(parts)}
            strengths = {path: strength for path, (_, strength) in own.items()}
            file = LoRAFile(
                {path: adapter for path, (adapter, _) in own.items()},
                dict(self.metadata),
                embeddings={} if number else self.embeddings,
                names=self.names,
            )
            found.append(Ingredient(file, strengths.__getitem__, f"applied {number + 1}"))
        return found


def collect(model: Any, clip: Any | None) -> Collected:
    """Raises ValueError naming what cannot be in a file."""
    found = Collected(names_of(model, clip), metadata=origin_of(model.model))
    stack = branching.stack_on(model)
    _Side(model, _beside(stack), found).collect()
    found.notes.extend(unseen(model, "MODEL"))
    if clip is not None:
        _Side(clip.patcher, {}, found).collect()
        found.notes.extend(unseen(clip.patcher, "CLIP"))
        found.embeddings.update(_words(clip))
    if not found.parts and not found.embeddings:
        raise ValueError(
            "model: nothing is applied to it that could be baked; connect the MODEL (and CLIP) behind the LoRA loaders"
        )
    return found


@torch.no_grad()
def bake(
    found: Collected,
    method: str,
    cut: Cut | None,
    dense: Cut,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """As one LoRA, by ``concat`` or ``sum`` (then ``cut``); with ``concat`` what is no product of its own becomes one
    by ``dense``."""
    if method != "concat":
        return merge(found.ingredients(), method, cut, progress=progress)
    made: dict[str, list[float]] = {}  # ‖ΔW‖, error
    parts = dict(found.parts)
    for number, path in enumerate(computed := found.computed, 1):
        parts[path], *made[path] = _as_product(parts[path], found.names.shapes[path], dense)
        if progress is not None:
            progress(number, len(computed))
    kept = replace(found, parts={path: own for path, own in parts.items() if own})
    if not kept.parts and not kept.embeddings:
        raise ValueError("model: nothing is left that a LoRA could hold: what is applied to it changes nothing")
    outcome = merge(kept.ingredients(), method, progress=progress)
    layers = [
        LayerOutcome(layer.path, layer.rank, None, *made[layer.path]) if layer.path in made else layer
        for layer in outcome.layers
    ]
    return replace(outcome, layers=tuple(layers))


def _as_product(parts: Parts, shape: Sequence[int], cut: Cut) -> tuple[Parts, float, float]:
    """(all that had to be computed as one LoRA, with what else changes the layer beside it; ‖ΔW‖; the error)."""
    others = [(adapter, strength) for adapter, strength in parts if not isinstance(adapter, Change)]
    total = torch.zeros(tuple(shape))
    for adapter, strength in parts:
        if isinstance(adapter, Change):
            total.add_(adapter.delta(), alpha=strength)
    low, _ = truncated(total.flatten(1), cut, exact=False)
    error = distance(total.flatten(1), low)
    for adapter, strength in others:
        total.add_(adapter.difference(total), alpha=strength)
    product: Parts = [(as_lora(low, shape), 1.0)] if low.rank else []
    return [*product, *others], total.norm().item(), error


def _beside(stack: branching.Stack | None) -> dict[str, Parts]:
    """parameter → the adapters that hang beside it."""
    if stack is None:
        return {}
    changing = next((strength for strength in stack.strengths if strength.schedules), None)
    if changing is not None:
        shown = " and ".join(str(schedule)[:60] for schedule in changing.schedules)
        raise ValueError(
            f"model: a LoRA on it has a strength that changes over the run ({shown}), which a file cannot have; set "
            "steps, blocks and components of its LoRA Loader (Advanced), or its tag in LoRA from Prompt, to constant "
            "strengths"
        )
    return {
        key: [(adapter, stack.strengths[number].steady) for adapter, number in parts]
        for key, parts in stack.by_parameter().items()
    }


class _Side:
    """A MODEL's or a CLIP's patcher."""

    def __init__(self, patcher: Any, beside: Mapping[str, Parts], found: Collected) -> None:
        self._patches, self._idle = applied_patches(patcher)
        self._beside, self._found = dict(beside), found
        self._originals, self._read = Originals(patcher), base_reader(patcher)
        self._parameters = parameters_of(patcher.model)

    def collect(self) -> None:
        if self._idle:
            self._found.notes.append(
                f"{len(self._idle)} parameters have patches that ComfyUI never applies ({self._idle[0]} first), so "
                "these are not in it"
            )
        for key in dict.fromkeys((*self._patches, *self._beside)):
            if not self._parameters[key].shape:
                self._found.notes.append(f"{key} is a single number, which no LoRA holds: what changes it is not in it")
                continue
            path, parts = self._place(key)
            kept = [(adapter, strength) for adapter, strength in parts if strength]
            if kept:
                self._found.parts.setdefault(path, []).extend(kept)

    def _place(self, key: str) -> tuple[str, Parts]:
        layer, _, name = key.rpartition(".")
        if name == "bias" and f"{layer}.weight" in self._parameters:
            return layer, self._difference(key, "diff_b", self._found.names.shapes[layer])
        path = layer if name == "weight" else key
        shape = self._found.names.shapes[path]
        if math.prod(shape) in (math.prod(shape[:1]), math.prod(shape[1:])):  # a vector
            return path, self._difference(key, "diff", shape)
        return path, self._of_weight(key, path, shape)

    def _difference(self, key: str, part: str, shape: Sequence[int]) -> Parts:
        """Of what is small: computed at once."""
        before = self._originals.dense(key).cpu()
        after = comfy.lora.calculate_weight(self._patches.get(key, []), before.clone(), key)
        if beside := [(adapter.to("cpu"), strength) for adapter, strength in self._beside.get(key, ())]:
            after = fused_bias(after, beside) if key.endswith(".bias") else fused(after.clone(), beside)
        return [] if torch.equal(after, before) else [(Full({part: after - before}, shape), 1.0)]

    def _of_weight(self, key: str, path: str, shape: Sequence[int]) -> Parts:
        entries, parts = self._patches.get(key, []), []
        known = [_of_entry(entry, shape) for entry in entries]
        if all(own is not None for own in known):
            parts += [part for own in known for part in own or ()]
        else:
            parts.append((Change(shape, lambda: self._patched(key, entries, shape)), 1.0))
        for adapter, strength in self._beside.get(key, ()):
            _check(adapter, path)
            own = weight_alone(adapter.to("cpu"))
            if not needs_weight(adapter):
                parts += [] if own is None else [(own, strength)]
            else:
                parts.append((Change(shape, self._on_patched(adapter, key)), strength))
        return parts

    def _on_patched(self, adapter: Adapter, key: str) -> Callable[[], Tensor]:
        """What an adapter beside the weight adds to it: it finds the weight with the patches of others."""
        return lambda: adapter.to("cpu").difference(self._read(key))

    def _patched(self, key: str, entries: list[tuple], shape: Sequence[int]) -> Tensor:
        before = self._originals.dense(key)
        after = comfy.lora.calculate_weight(entries, before.clone(), key)
        if after.shape != before.shape:
            raise ValueError(
                f"model: a LoRA makes {key} wider ({tuple(after.shape)} instead of {tuple(before.shape)}), which no "
                "other one can hold; take its loader out of the way to this node"
            )
        return (after - before).cpu()


def _of_entry(entry: tuple, shape: Sequence[int]) -> Parts | None:
    """A patch of the host as adapters that add up, in closed form; None for all others."""
    strength, patch, strength_model, offset, function = entry
    if strength_model != 1.0 or function is not None or (offset is not None and offset[0] != 0):
        return None
    rows = tuple(shape) if offset is None else (offset[2], *shape[1:])
    if isinstance(patch, FusedPatch) and offset is None:
        parts: Parts = []
        for adapter, own, names, tensors in patch.weights:
            if needs_weight(adapter) or not can_branch(adapter):
                return None
            alone = weight_alone(adapter.with_tensors(dict(zip(names, tensors, strict=True))).to("cpu"))
            parts += [] if alone is None else [(alone, strength * own)]
        return parts
    found = _of_core(patch, rows)
    if found is None:
        return None
    adapter, factor = found
    if offset is not None:
        adapter = Sliced(adapter, offset[1], offset[2], tuple(shape))
    return [(adapter, strength * factor)]


def _of_core(patch: Any, shape: Sequence[int]) -> tuple[Adapter, float] | None:
    """(a LoRA or a difference of core's, what scales it)."""
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, mid, norms, wider = patch.weights
        if norms is not None or wider is not None or (mid is not None and mid.ndim != _TUCKER):
            return None
        parts = {UP: up.cpu(), DOWN: down.cpu()} | ({} if mid is None else {MID: mid.cpu()})
        try:
            return LoRA.read(parts, shape), 1.0 if alpha is None else float(alpha) / len(down)
        except ValueError:  # flattened, or what core itself cannot multiply: it says what comes of it
            return None
    if isinstance(patch, tuple) and len(patch) == 2 and patch[0] == "diff":
        patch = patch[1]
    if isinstance(patch, tuple) and len(patch) == 1 and isinstance(patch[0], Tensor) and patch[0].shape == tuple(shape):
        return Full({"diff": patch[0].cpu()}, shape), 1.0
    return None


def weight_alone(adapter: Adapter) -> Adapter | None:
    """An adapter without what it does to the bias; None where nothing is left of it."""
    if isinstance(adapter, Full):
        kept = {name: tensor for name, tensor in adapter.tensors.items() if name in WEIGHTS}
        return Full(kept, adapter.shape) if kept else None
    if isinstance(adapter, Sum):
        parts = [part for part in map(weight_alone, adapter.parts) if part is not None]
        return Sum(parts) if parts else None
    if isinstance(adapter, Sliced | Swapped):
        inner = weight_alone(adapter.inner)
        if inner is None:
            return None
        if isinstance(adapter, Swapped):
            return Swapped(inner)
        return Sliced(inner, adapter.start, adapter.length, adapter.shape)
    return adapter


def _check(adapter: Adapter, path: str) -> None:
    if not can_branch(adapter):
        raise ValueError(f"model: a LoRA makes {path} wider, which no other one can hold; take its loader away")


def _words(clip: Any) -> dict[str, dict[str, Tensor]]:
    """Embeddings that LoRAs have brought along: word → text encoder → vectors."""
    found: dict[str, dict[str, Tensor]] = {}
    for encoder in encoders(clip):
        tokenizer = getattr(clip.tokenizer, encoder, None)
        for word, vectors in getattr(tokenizer, "words", {}).items():
            found.setdefault(word, {})[encoder] = vectors.detach().cpu()
    return found


def unseen(patcher: Any, what: str) -> list[str]:
    """What other nodes let act otherwise than by patches of weights, in sentences."""
    notes = []
    if patcher.hook_patches:
        notes.append(
            f"{len(patcher.hook_patches)} hooked LoRA(s) on the {what} are not in it: they act on marked conditioning "
            "only; load them with a LoRA loader"
        )
    for key, injected in patcher.injections.items():
        if injected:
            notes.append(
                f"{key} injects layers into the {what}, as LoRAs in bypass mode do; these cannot be seen and are not "
                "in it: load them with an ordinary LoRA loader"
            )
    replaced = [name for name in patcher.object_patches if name not in _NO_LAYERS]
    wrapped = [
        key
        for key, functions in getattr(patcher, "weight_wrapper_patches", {}).items()
        if any(not isinstance(function, OnUse) for function in functions)
    ]
    if replaced or wrapped:
        some = [*replaced, *wrapped]
        notes.append(
            f"{len(some)} parts of the {what} are exchanged or changed on use by other nodes ({some[0]} first); what "
            "that does is not in it"
        )
    options = patcher.model_options
    hung = [name for name in _HOOKS if options.get(name) or options.get("transformer_options", {}).get(name)]
    hung += [
        str(key)
        for kinds in options.get("transformer_options", {}).get("wrappers", {}).values()
        for key, wrappers in kinds.items()
        if wrappers and key != KEY
    ]
    if hung:
        notes.append(
            f"other nodes act around the {what} while it runs ({', '.join(dict.fromkeys(hung))[:120]}); what that does "
            "is not in it"
        )
    return notes
