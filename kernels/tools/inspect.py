"""What an adapter file is, what it holds, how it was made, how much it does where, and what is wrong with it.

* ``inspect``: a file or state dict → ``Inspection``; with the names of a model by its layers, with its weights also of
  families that depend on them.
* ``Inspection.text``: one screen for people; ``to_json``: everything, under keys that stay; ``blocks``: for a picture.

Nothing that a file says is trusted: texts are cut, what JSON has no numbers for becomes null.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import reading
from ..file_blocks import block_of_layers, blocks_of_file
from ..metadata import json_object
from ..names import NameTable
from ..peft_config import beside
from ..reading import LoRAFile, read_lora
from ..safetensors_io import LoraModel, load_tensors
from ..sidecars import facts_about
from ..strengths.components import UNET
from ..unplaced import called
from ..writing import TOOL, WRITTEN_AS
from .deltas import Progress, Weights, told
from .fault_checks import Evidence
from .faults import Finding, findings, shown
from .measure import Layer, measured

RECIPE = "loom.recipe"
OTHER, TEXT = "other", "text"  # roles of what lies in no block, and of text encoders
_DIALECTS = (  # what keys look like, what they are called; the first that fits decides
    (r"base_model\.model\.", "PEFT"),
    (r"(?:double|single)_blocks\.\d+\.processor\.", "XLabs"),
    (r"oft_unet_", "kohya (OFT)"),
    (r"lycoris_", "LyCORIS' wrapper"),
    (r"lora_transformer_", "OneTrainer (legacy)"),
    (r"(?:lora|lora_prior)_(?:unet|te\d?)_", "kohya"),
    (r"(?:diffusion_model|text_encoders|model\.diffusion_model)\..*\.lora_[AB]\.", "ComfyUI's names, PEFT's factors"),
    (r"(?:diffusion_model|text_encoders|model\.diffusion_model|clip_[lgh]|t5xxl)\.", "ComfyUI"),
    (r"(?:unet|transformer|text_encoder(?:_\d)?|prior)\.", "diffusers"),
    (r"bundle_emb\.", "embeddings"),
    (r"(?:double|single)_blocks\.|img_in\.|txt_in\.|final_layer\.", "Black Forest Labs"),
    (r".*\.lora_[AB]\b", "PEFT's factors, the model's own names"),
)
_COMPILED = [(re.compile(pattern), name) for pattern, name in _DIALECTS]
_TRAINING = (  # label, metadata of kohya's trainers and of ModelSpec that may tell
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("epochs", ("ss_epoch", "ss_num_epochs")),
    ("pictures", ("ss_num_train_images",)),
    ("batch size", ("ss_total_batch_size", "ss_batch_size_per_device")),
    ("resolution", ("ss_resolution", "modelspec.resolution")),
    ("learning rate", ("ss_learning_rate",)),
    ("learning rate of the UNet", ("ss_unet_lr",)),
    ("learning rate of text encoders", ("ss_text_encoder_lr",)),
    ("optimizer", ("ss_optimizer",)),
    ("schedule", ("ss_lr_scheduler",)),
    ("network", ("ss_network_module",)),
    ("network arguments", ("ss_network_args",)),
    ("base", ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture")),
    ("prediction", ("modelspec.prediction_type",)),
    ("min-SNR γ", ("ss_min_snr_gamma",)),
    ("noise offset", ("ss_noise_offset",)),
    ("clip skip", ("ss_clip_skip",)),
    ("seed", ("ss_seed",)),
    ("date", ("modelspec.date",)),
    ("title", ("modelspec.title", "ss_output_name")),
)
_BARS = "▁▂▃▄▅▆▇█"
_LONG, _DEEP, _MANY = 2000, 8, 500  # letters of a text, levels and items of a table that are passed on
_BITS = 64  # of whole numbers, as seeds are
_SHORT = 90
_SHOWN = 12  # findings, groups, facts in a text


@dataclass(frozen=True)
class BlockRow:
    """One block, or a text encoder, or what lies in none; ``norm`` of all its layers together, √Σ‖ΔW‖².

    ``effective_rank`` and ``rank``: the means of its layers'. ``unmeasured``: layers that need the base weight.
    """

    id: str
    group: str
    role: str
    layers: int
    norm: float | None
    effective_rank: float | None
    rank: float | None
    unmeasured: int


@dataclass(frozen=True)
class Inspection:
    """``families``, ``components``: name → layers; ``ranks``, ``alphas``: value → layers; ``precisions``: → numbers.

    ``training``: label → what the metadata says; ``recipe`` and ``made_by`` (tool, options, parents) as this pack
    writes them. ``embeddings``: word → encoder → shape.
    """

    name: str
    bytes: int
    dialect: str
    architecture: str | None
    evidence: str
    families: dict[str, int]
    components: dict[str, int]
    ranks: dict[str, int]
    alphas: dict[str, int]
    precisions: dict[str, int]
    trigger_words: tuple[str, ...]
    words_from: str
    training: dict[str, str]
    recipe: dict[str, Any]
    made_by: dict[str, Any]
    embeddings: dict[str, dict[str, tuple[int, ...]]]
    blocks: tuple[BlockRow, ...]
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Everything."""
        found = asdict(self) | {"findings": [asdict(finding) for finding in self.findings]}
        return json.dumps(_plain(found, _DEEP + 4), ensure_ascii=False, allow_nan=False)

    def text(self) -> str:
        """One screen."""
        size = f"{self.bytes / 2**20:.1f} MB"
        lines = [" · ".join(filter(None, (self.name, size, _counts(self.precisions), f"names: {self.dialect}")))]
        lines.append(f"base: {called(self.architecture)} ({shown(self.evidence, 2 * _SHORT)})")
        if self.layers:
            alphas = f", alpha {_counts(self.alphas)}" if self.alphas else ""
            ranks = f"; rank {_counts(self.ranks)}{alphas}" if self.ranks else ""
            lines.append(f"{len(self.layers)} layers: {_counts(self.families)}{ranks}")
            lines.append(
                f"on {shown(', '.join(f'{part} ({count})' for part, count in self.components.items()), 2 * _SHORT)}"
            )
        if self.trigger_words:
            lines.append(f"trigger words: {shown(', '.join(self.trigger_words), 2 * _SHORT)} (from {self.words_from})")
        for word, encoders in list(self.embeddings.items())[:_SHOWN]:
            told = (f"{encoder} {'×'.join(map(str, shape))}" for encoder, shape in encoders.items())
            lines.append(f"embedding {shown(word, _SHORT)}: {shown(', '.join(told), _SHORT)}")
        if self.training:
            told = (f"{label} {shown(value, _SHORT)}" for label, value in list(self.training.items())[:_SHOWN])
            lines.append(f"training: {', '.join(told)}")
        if self.recipe:
            lines.append(f"recipe of this pack: {shown(', '.join(sorted(self.recipe)), 2 * _SHORT)}")
        if self.made_by:
            lines.append(_parents(self.made_by))
        lines += _pictured(self.blocks)
        lines += [finding.line() for finding in self.findings[:_SHOWN]]
        if len(self.findings) > _SHOWN:
            lines.append(f"and {len(self.findings) - _SHOWN} findings more, in the JSON")
        if not self.findings:
            lines.append("no faults found")
        return "\n".join([*lines, *(f"note: {shown(note, 3 * _SHORT)}" for note in self.notes[:_SHOWN])])


def inspect(
    source: str | os.PathLike | Mapping[str, Tensor],
    targets: Mapping[str, Sequence[int]] | NameTable | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Raises ValueError naming the file where it is no safetensors file, or a damaged one; other faults are told.

    ``targets``: path → shape of every weight of a model (``names.layer_shapes``); ``weights(path)``: the weights
    themselves. ``progress(done, total)`` counts layers and may raise to stop.
    """
    model = load_tensors(source)
    path = None if isinstance(source, Mapping) else Path(source)
    if path is not None:
        model = LoraModel(model, beside(path, model.metadata) | model.metadata)
    table = targets if isinstance(targets, NameTable) or targets is None else NameTable(targets)
    file = _read(model, table)
    layers = _measured(file, weights, progress)
    facts = facts_about(path, model.metadata)
    return Inspection(
        name=shown(model.metadata.get("modelspec.title", "") if path is None else path.name, _SHORT),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in model.values()),
        dialect=_dialect(model),
        architecture=file.architecture,
        evidence=file.evidence,
        families=_count(layer.family for layer in layers),
        components=_count(layer.component for layer in layers),
        ranks=_count(str(layer.rank) for layer in layers if layer.rank is not None),
        alphas=_count(f"{layer.alpha:.6g}" for layer in layers if layer.alpha is not None and layer.rank),
        precisions=_precisions(model),
        trigger_words=facts.words,
        words_from=facts.source,
        training=_training(model.metadata),
        recipe=_plain(json_object(model.metadata, RECIPE), _DEEP, _MANY),
        made_by=_plain(json_object(model.metadata, TOOL), _DEEP, _MANY),
        embeddings={
            word: {encoder: tuple(tensor.shape) for encoder, tensor in vectors.items()}
            for word, vectors in file.embeddings.items()
        },
        blocks=_block_rows(file, layers),
        layers=tuple(layers),
        findings=tuple(findings(Evidence(model, file, layers))),
        notes=tuple(_notes(file, layers, weights is not None)),
    )


def _read(model: LoraModel, table: NameTable | None) -> LoRAFile:
    """As ``read_lora``, which refuses what is damaged as a whole: an inspection tells of it instead."""
    try:
        return read_lora(model, table)
    except ValueError:
        lost = [reading.Unplaced(key, reading.DAMAGED, "cannot be used") for key in model]
        return LoRAFile({}, dict(model.metadata), lost, None, "nothing in it can be used", names=table)


def _measured(file: LoRAFile, weights: Weights | None, progress: Progress | None) -> list[Layer]:
    blocks = block_of_layers(file.adapters, file.metadata, _family(file))
    return [
        measured(path, adapter, blocks.get(path, ""), weights)
        for path, adapter in told(list(file.adapters.items()), progress)
    ]


def _family(file: LoRAFile) -> str | None:
    """What the model is, where there is one; else ``file_blocks`` finds out."""
    return file.names.architecture if file.names is not None else None


def _dialect(model: LoraModel) -> str:
    """The commonest, then the others."""
    found: Counter[str] = Counter()
    for key in model:
        found[next((name for pattern, name in _COMPILED if pattern.match(key)), "unknown")] += 1
    told = " and ".join(name for name, _ in found.most_common(3))
    written = model.metadata.get(WRITTEN_AS, "")
    return f"{told or 'none'}, written by this pack" if written else told or "none"


def _precisions(model: LoraModel) -> dict[str, int]:
    found: Counter[str] = Counter()
    for tensor in model.values():
        if tensor.numel() > 1:
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(found.most_common())


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for label, keys in _TRAINING:
        value = next((metadata[key] for key in keys if metadata.get(key, "None") not in ("None", "", "{}")), None)
        if value is not None:
            found[label] = shown(value, _LONG)
    return found


def _block_rows(file: LoRAFile, layers: Sequence[Layer]) -> tuple[BlockRow, ...]:
    """Blocks in the model's order, then what lies in none, then text encoders."""
    known = {block.id: block for block in blocks_of_file(file.adapters, file.metadata, _family(file))}
    inside: dict[str, list[Layer]] = {identifier: [] for identifier in known}
    encoders: dict[str, list[Layer]] = {}
    outside: list[Layer] = []
    for layer in layers:
        if layer.component != UNET:
            encoders.setdefault(layer.component, []).append(layer)
        else:
            inside.get(layer.block, outside).append(layer)
    rows = [_block_row(block.id, block.group, block.role, inside[block.id]) for block in known.values()]
    rows += [_block_row(OTHER, OTHER, OTHER, outside)] if outside else []
    rows += [_block_row(encoder, encoder, TEXT, found) for encoder, found in encoders.items()]
    return tuple(rows)


def _block_row(identifier: str, group: str, role: str, layers: Sequence[Layer]) -> BlockRow:
    norms = [layer.norm for layer in layers if layer.norm is not None]
    norm = math.hypot(*norms) if norms else None
    return BlockRow(
        identifier,
        group,
        role,
        len(layers),
        norm,
        _mean(layer.effective_rank for layer in layers),
        _mean(layer.rank for layer in layers),
        len(layers) - len(norms),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _notes(file: LoRAFile, layers: Sequence[Layer], weighed: bool) -> list[str]:
    notes = list(file.notes)
    unmeasured = [layer for layer in layers if layer.norm is None]
    if unmeasured and not weighed:
        families = ", ".join(dict.fromkeys(layer.family for layer in unmeasured))
        notes.append(
            f"‖ΔW‖ of {len(unmeasured)} layers was not measured ({families}): it depends on the weights; give the base "
            "model"
        )
    elif unmeasured:
        notes.append(f"‖ΔW‖ of {len(unmeasured)} layers could not be measured, such as {unmeasured[0].path[:_SHORT]}")
    return notes


# -- for people


def _pictured(blocks: Sequence[BlockRow]) -> list[str]:
    """A line for each group of blocks, with a bar for each block."""
    known = [row.norm for row in blocks if row.norm is not None]
    if not known:
        return []
    most = max(known) or 1.0
    groups: dict[str, list[BlockRow]] = {}
    for row in blocks:
        groups.setdefault(row.group, []).append(row)
    lines = [f"‖ΔW‖ by blocks, █ is {most:.3g}:"]
    for group, rows in list(groups.items())[:_SHOWN]:
        bars = "".join("·" if row.norm is None else _BARS[min(7, int(8 * row.norm / most))] for row in rows)
        norms, ranks, given = ([value for row in rows if (value := getattr(row, name)) is not None]
                               for name in ("norm", "effective_rank", "rank"))  # fmt: skip
        told = [_range(norms, ".3g")] if norms else ["not measured"]
        told += (
            [f"effective rank {_range(ranks, '.1f')}" + (f" of {_range(given, '.4g')}" if given else "")]
            if ranks
            else []
        )
        lines.append(f"  {shown(group, 40)} {bars} {', '.join(told)}")
    return lines


def _range(values: Sequence[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least}–{most}"


def _counts(counts: Mapping[str, int]) -> str:
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} (×{count})" for value, count in list(counts.items())[:4]]
    return ", ".join(shown) + (" …" if len(counts) > 4 else "")


def _parents(made_by: Mapping[str, Any]) -> str:
    parents = made_by.get("parents")
    named = [parent for parent in parents if isinstance(parent, dict)] if isinstance(parents, list) else []
    told = (
        f"{shown(str(parent.get('name', '?')), 40)} at {shown(str(parent.get('strength', '?')), 40)}"
        for parent in named[:_SHOWN]
    )
    energy = made_by.get("energy")
    kept = f", {100 * energy:.2f} % of the energy" if isinstance(energy, int | float) and math.isfinite(energy) else ""
    return f"made by {shown(str(made_by.get('tool', '?')), 40)} of {', '.join(told) or 'what it does not say'}{kept}"


def _plain(value: Any, depth: int, most: int | None = None) -> Any:
    """What JSON can hold, with texts, levels and, where ``most`` is given, items of tables cut."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        value = value if len(value) <= _LONG else value[: _LONG - 1] + "…"
        return value.encode(errors="replace").decode()  # JSON can spell half a character, which no file and no page can
    if isinstance(value, int):
        return value if value.bit_length() <= _BITS else None
    if value is None:
        return value
    if depth <= 0:
        return "…"
    if isinstance(value, Mapping):
        items = itertools.islice(value.items(), most)
        return {shown(str(key), _LONG): _plain(item, depth - 1, most) for key, item in items}
    return [_plain(item, depth - 1, most) for item in itertools.islice(value, most)]
