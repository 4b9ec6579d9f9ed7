"""A LORA_MODEL to a file: in which names, and whether ComfyUI's own loaders read it as it was trained.

* ``save``: write it, and tell what was done or what those loaders misread.
* ``whole_file``: all of a LORA_MODEL as adapters; ``weights_of``: the weights of the connected models, for those that
  depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..kernels.core_reads import rewritten, warnings
from ..kernels.names import NameTable, layer_shapes
from ..kernels.reading import LoRAFile, read_lora
from ..kernels.safetensors_io import LoraModel, save_tensors
from ..kernels.writing import DIALECTS, write_lora
from .layers import weight_reader

AS_IT_IS = "as it is"
FORMATS = {
    AS_IT_IS: "The names it has: the trainer's are native.",
    **{name: row.description for name, row in DIALECTS.items()},
}
AS_TRAINED = "as trained"
PLAIN = "plain where needed"
FOR_CORE = {
    AS_TRAINED: "Nothing is changed; the node says what ComfyUI's own loaders misread.",
    PLAIN: (
        "Layers that ComfyUI's own loaders misread (DoRA per output, OFT, BOFT, (IA)³, some Tucker cores) are written "
        "with the same effect as what they read: larger files, native names. What depends on the weights needs the "
        "MODEL."
    ),
}


def save(lora: LoraModel, place: Path, form: str, for_core: str, model: Any, clip: Any) -> tuple[Path, list[str]]:
    """(the file, what there is to say). Raises ValueError naming the socket or the widget."""
    if form not in FORMATS:
        raise ValueError(f"format: {str(form)[:60]!r} is unknown; choose one of {', '.join(FORMATS)}")
    if for_core not in FOR_CORE:
        raise ValueError(f"for_core: {str(for_core)[:60]!r} is unknown; choose one of {', '.join(FOR_CORE)}")
    if form == AS_IT_IS and for_core == AS_TRAINED:
        return save_tensors(lora, place), warnings(read_lora(lora).adapters.values())
    if form != AS_IT_IS and model is None:
        raise ValueError(
            f"format is {form!r}: connect the MODEL that the LoRA is for (and the CLIP, where it was trained too): "
            "only they tell what their layers are called there"
        )
    file = whole_file(lora, model, clip)
    notes: list[str] = []
    if for_core == PLAIN:
        file, notes = rewritten(file, weights_of(model, clip))
        if form == AS_IT_IS and not notes:
            return save_tensors(lora, place), []
    else:
        notes = warnings(file.adapters.values())
    try:
        return write_lora(file, place, "native" if form == AS_IT_IS else form), notes
    except ValueError as error:
        raise ValueError(f"format is {form!r}: {error}") from error


def whole_file(lora: LoraModel, model: Any, clip: Any) -> LoRAFile:
    """All of it, by the connected models' own names where there are any."""
    trees = [tree for tree in (model and model.model, clip and clip.cond_stage_model) if tree is not None]
    shapes = {path: shape for tree in trees for path, shape in layer_shapes(tree).items()}
    file = read_lora(lora, NameTable(shapes) if trees else None)
    if file.unplaced:
        key, _, detail = file.unplaced[0]
        raise ValueError(
            f"lora: {len(file.unplaced)} of its keys cannot be written ({key[:80]}: {detail}); connect the MODEL that "
            "it is for, and the CLIP where it holds layers of text encoders"
        )
    return replace(file, metadata=dict(file.metadata))


def weights_of(
    model: Any, clip: Any, reader: Callable[[Any], Callable[[str], Tensor]] = weight_reader
) -> Callable[[str], Tensor] | None:
    """path → weight, as the connected models have it, or as another ``reader`` of a patcher gives it."""
    if model is None:
        return None
    own, text = reader(model), None if clip is None else reader(clip.patcher)
    encoders = set() if clip is None else set(layer_shapes(clip.cond_stage_model))
    return lambda path: text(path) if text is not None and path in encoders else own(path)
