"""The LoRA tools on what a graph has: each gives a LORA_MODEL, a report, a picture.

* ``merge_loras``, ``bake_applied``, ``extract_lora``, ``resize_lora``, ``convert_lora``, ``inspect_lora``.

What comes out says of itself what it was made of. Long ones show a bar and stop at the ✕; nothing dense is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ..kernels.adapter import Adapter
from ..kernels.full import Full
from ..kernels.low_rank import Cut
from ..kernels.safetensors_io import LoraModel
from ..kernels.tools.budget import Budget
from ..kernels.tools.convert import plain
from ..kernels.tools.extract import extract
from ..kernels.tools.finishing import AS_GIVEN, PRECISIONS, finished, options_of, precision_of, spelled_as
from ..kernels.tools.inspect import inspect
from ..kernels.tools.merge import MAJORITIES, METHODS, merge, without_effect
from ..kernels.tools.outcome import Outcome
from ..kernels.tools.pairing import changes_between
from ..kernels.tools.provenance import Parent
from ..kernels.tools.resize import resize
from ..kernels.writing import to_tensors
from . import branching, exporting, lora_cache
from .diagnosis import BlockShare
from .effective import base_reader, effective_reader
from .identify import origin_of
from .pictures import bar_picture, below
from .progress import Progress
from .saving import AS_IT_IS, FORMATS, weights_of
from .targets import names_of, parameters_of
from .tooling import Places, energy_picture, gather, named, parent_of, ticking

DENSE_RANK = 64
BAKING = {method: METHODS[method] for method in ("concat", "sum")}


@dataclass(frozen=True)
class Made:
    lora: LoraModel
    report: str
    picture: Image.Image


@dataclass(frozen=True)
class Inspected:
    text: str
    json: str
    picture: Image.Image


@dataclass(frozen=True)
class MergeOptions:
    method: str = "concat"
    density: float = 0.5
    majority: str = "total"
    seed: int = 0
    precision: str = AS_GIVEN

    def check(self) -> None:
        """Raises ValueError naming what is unknown: not every host checks its combos itself."""
        for name, known in (("method", METHODS), ("majority", MAJORITIES), ("precision", PRECISIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name}: {str(value)[:60]!r} is unknown; choose one of {', '.join(known)}")


@torch.inference_mode(False)
@torch.no_grad()
def merge_loras(
    given: Sequence[tuple[str, Mapping[str, Tensor]]],
    strengths: str,
    files: str,
    options: MergeOptions,
    cut: Cut | None,
    model: Any = None,
    clip: Any = None,
    node_id: str | None = None,
) -> Made:
    options.check()
    _check_cut(options.method, cut)
    gathered = gather(given, strengths, files, model, clip)
    outcome = merge(
        gathered.ingredients,
        options.method,
        cut,
        weights_of(model, clip, base_reader),
        density=options.density,
        majority=options.majority,
        seed=options.seed,
        exact=False,
        progress=ticking(node_id),
    )
    told = {**vars(options), **options_of(cut)}
    title = f"{len(gathered.ingredients)} LoRAs by {options.method}"
    notes = [*gathered.notes, *without_effect(options.method, options.density, options.majority, options.seed)]
    first = [f"{parent.name} at {parent.strength}" for parent in gathered.parents]
    return _made(
        outcome, title, "merge", gathered.parents, told, options.precision, gathered.tensors, model, first, notes
    )


@torch.inference_mode(False)
@torch.no_grad()
def bake_applied(
    model: Any, clip: Any, method: str, cut: Cut | None, dense_rank: int, precision: str, node_id: str | None = None
) -> Made:
    _known("method", method, BAKING)
    _check_cut(method, cut)
    found = exporting.collect(model, clip)
    outcome = exporting.bake(found, method, cut, Cut(rank=dense_rank), ticking(node_id))
    notes = list(found.notes)
    if found.computed and method == "concat":
        notes.append(
            f"{len(found.computed)} weights are changed by what is no product of two factors; their change was "
            f"computed and cut to rank {dense_rank} (dense_rank)"
        )
    elif dense_rank != DENSE_RANK:
        notes.append("dense_rank: no effect, every change is kept as it is, or cut by rank and energy")
    adapters = [adapter for parts in found.parts.values() for adapter, _ in parts]
    tensors = [item for adapter in adapters if not _is_computed(adapter) for item in adapter.tensors.items()]
    parents = [Parent("what was applied to a MODEL", metadata=found.metadata)]
    told = {"method": method, "precision": precision, **options_of(cut)}
    told |= {"dense_rank": dense_rank} if found.computed and method == "concat" else {}
    return _made(outcome, "all that is applied", "bake", parents, told, precision, tensors, model, [], notes)


@torch.inference_mode(False)
@torch.no_grad()
def extract_lora(
    tuned: Any,
    base: Any,
    clip_tuned: Any,
    clip_base: Any,
    cut: Cut | Budget,
    min_change: float,
    clamp_quantile: float | None,
    conv: bool,
    precision: str,
    node_id: str | None = None,
) -> Made:
    """Module by module; of both models no more than one layer more is in memory."""
    if (clip_tuned is None) != (clip_base is None):
        lacking = "clip_base" if clip_base is None else "clip_tuned"
        raise ValueError(f"{lacking} is not connected: the text encoders of both models are compared, or of none")
    model_base, model_tuned = _side("model_base", base, base.model), _side("model_tuned", tuned, tuned.model)
    changes, notes = changes_between(model_base, model_tuned, conv)
    if clip_base is not None:
        text_base = _side("clip_base", clip_base.patcher, clip_base.cond_stage_model)
        text_tuned = _side("clip_tuned", clip_tuned.patcher, clip_tuned.cond_stage_model)
        text, said = changes_between(text_base, text_tuned, conv)
        changes, notes = changes + text, notes + said
    outcome = extract(
        changes,
        cut,
        min_change=min_change,
        clamp_quantile=clamp_quantile,
        names=names_of(base, clip_base),
        metadata=origin_of(base.model),
        progress=ticking(node_id),
    )
    notes += exporting.unseen(tuned, "MODEL that is tuned")
    parents = [Parent("model_tuned"), Parent("model_base", strength="-1")]
    told = {"min_change": min_change, "clamp_quantile": clamp_quantile, "conv": conv, **options_of(cut)}
    return _made(outcome, "extracted", "extract", parents, told, precision, [], base, [], notes)


@torch.inference_mode(False)
@torch.no_grad()
def resize_lora(
    lora: Mapping[str, Tensor],
    cut: Cut | Budget,
    precision: str,
    model: Any = None,
    clip: Any = None,
    node_id: str | None = None,
) -> Made:
    file = named(lora, model, clip)
    outcome = resize(file, cut, weights_of(model, clip, base_reader), progress=ticking(node_id))
    parents = [parent_of(lora, "the connected LoRA")]
    return _made(outcome, "resized", "resize", parents, options_of(cut), precision, list(lora.items()), model, [], [])


@torch.inference_mode(False)
@torch.no_grad()
def convert_lora(
    lora: Mapping[str, Tensor],
    dialect: str,
    precision: str,
    as_plain: bool,
    cut: Cut | None,
    model: Any = None,
    clip: Any = None,
    node_id: str | None = None,
) -> Made:
    _known("dialect", dialect, FORMATS)
    if dialect != AS_IT_IS and model is None:
        raise ValueError(
            f"dialect is {dialect!r}: connect the MODEL that the LoRA is for (and the CLIP, where it was trained too): "
            "only they tell what their layers are called there"
        )
    file = named(lora, model, clip)
    outcome, notes = Outcome(file, (), tuple(file.notes)), []
    if as_plain:
        outcome = plain(file, cut, weights_of(model, clip, base_reader), ticking(node_id))
    elif cut is not None:
        notes.append("rank, energy: no effect, since plain is off")
    told = {"dialect": dialect, "precision": precision, "plain": as_plain, **(options_of(cut) if as_plain else {})}
    made = dialect if dialect != AS_IT_IS else spelled_as(lora)
    parent = parent_of(lora, "the connected LoRA")
    return _made(outcome, "converted", "convert", [parent], told, precision, list(lora.items()), model, [], notes, made)


@torch.inference_mode(False)
@torch.no_grad()
def inspect_lora(
    loaded: lora_cache.Loaded, model: Any = None, clip: Any = None, node_id: str | None = None
) -> Inspected:
    names = None if model is None else names_of(model, clip)
    source = loaded.tensors if loaded.path is None else loaded.path
    found = inspect(source, names, weights_of(model, clip, base_reader), ticking(node_id))
    found = replace(found, name=loaded.name)
    rows = [BlockShare(row.id, _or_nan(row.norm), row.layers, row.role) for row in found.blocks]
    ranks = [BlockShare(row.id, _or_nan(row.effective_rank), row.layers, row.role) for row in found.blocks]
    pictures = [
        bar_picture(rows, loaded.name, what="|dW| by block", number=lambda value: f"{value:.3g}"),
        bar_picture(ranks, "", what="effective rank by block", number=lambda value: f"{value:.1f}"),
    ]
    text = found.text()
    Progress(1, node_id).tell(text, now=True)
    return Inspected(text, found.to_json(), below(pictures))


def _or_nan(value: float | None) -> float:
    """What was not measured is not drawn."""
    return math.nan if value is None else value


def _made(
    outcome: Outcome,
    title: str,
    tool: str,
    parents: Sequence[Parent],
    options: Mapping[str, object],
    precision: str,
    given: Sequence[tuple[str, Tensor]],
    model: Any,
    first: Sequence[str],
    notes: Sequence[str],
    dialect: str = "native",
) -> Made:
    """``first`` and ``notes`` stand before and behind what the outcome says."""
    outcome = replace(outcome, notes=(*outcome.notes, *notes))
    file, said = finished(outcome, tool, parents, options, precision, precision_of(given) if given else None)
    places = Places(model, file)
    lines = [*first, *outcome.lines(places.called), *said]
    try:
        lora = to_tensors(file, dialect)
    except ValueError as error:
        raise ValueError(f"dialect is {dialect!r}: {error}") from error
    return Made(lora, "\n".join(dict.fromkeys(lines)), energy_picture(title, outcome, places))


def _side(name: str, patcher: Any, tree: nn.Module) -> tuple[str, dict[str, tuple[int, ...]], Callable[[str], Tensor]]:
    """A model for ``changes_between``."""
    shapes = {key: place.shape for key, place in parameters_of(tree).items()}
    return name, shapes, effective_reader(patcher, branching.stack_on(patcher))


def _is_computed(adapter: Adapter) -> bool:
    """Whether its numbers were worked out here, and so have no precision that anybody gave them."""
    return isinstance(adapter, exporting.Change | Full)


def _check_cut(method: str, cut: Cut | None) -> None:
    if method == "concat" and cut is not None:
        raise ValueError("rank and energy: concat keeps all ranks; set both to 0, or choose method sum to cut them")
    if method != "concat" and cut is None:
        raise ValueError(f"rank and energy are 0, and {method} makes as many ranks as it likes; set one of them")


def _known(name: str, value: object, known: Sequence[str] | Mapping[str, str]) -> None:
    if value not in known:
        raise ValueError(f"{name}: {str(value)[:60]!r} is unknown; choose one of {', '.join(known)}")
