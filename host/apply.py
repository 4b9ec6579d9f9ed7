"""Put a LoRA on a MODEL and a CLIP.

Weights are patched through the host's own ModelPatcher, at no cost per sampling step; the host undoes it when the
model is used without. Every spelling the host reads is understood, adapters it misreads are patched by our own kernels,
and what found no place is told. Embeddings that the file brings along become words of the CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
from torch import Tensor

from ..kernels.embeddings import by_encoder, take_embeddings
from .embeddings import encoders, with_words
from .own_patches import own_patches

_NOT_LOADED = "lora key not loaded"


@dataclass(frozen=True)
class Applied:
    """What happened: how many weights of each part were patched, which keys of the file found no place, and which
    words the CLIP has learned."""

    model_weights: int
    clip_weights: int
    unplaced: tuple[str, ...]
    words: tuple[str, ...] = ()

    def describe(self, name: str, strength_model: float, strength_clip: float) -> str:
        parts = [f"{name}: {self.model_weights} weights of the MODEL at {strength_model:g}"]
        if self.clip_weights:
            parts.append(f"{self.clip_weights} of the CLIP at {strength_clip:g}")
        lines = [", ".join(parts)]
        if self.words:
            lines.append(f"the CLIP now knows {', '.join(self.words)}")
        if self.unplaced:
            shown = ", ".join(self.unplaced[:5]) + (" …" if len(self.unplaced) > 5 else "")
            lines.append(f"{len(self.unplaced)} keys fit nothing here: {shown}")
        return "\n".join(lines)


def apply_lora(
    model: Any, clip: Any | None, lora: Mapping[str, Tensor], strength_model: float, strength_clip: float
) -> tuple[Any, Any | None, Applied]:
    """(MODEL, CLIP, what happened); the inputs stay as they are.

    Raises ValueError when nothing of the LoRA fits the model or the text encoder.
    """
    whole = lora
    embeddings, lora = take_embeddings(whole, getattr(whole, "metadata", {}))
    names: dict[str, Any] = comfy.lora.model_lora_keys_unet(model.model, {})
    if clip is not None:
        names = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, names)
    with _unplaced_keys() as unplaced:
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(lora)), names)
    own, taken = own_patches(lora, model, clip)
    # the host's patches of a fused layer's parts have (key, place in it) for a key
    patches = {key: patch for key, patch in patches.items() if (key if isinstance(key, str) else key[0]) not in own}
    patches |= own
    unplaced[:] = [key for key in unplaced if key not in taken]
    new_model = model.clone()
    on_model = set(new_model.add_patches(patches, strength_model))
    new_clip, on_clip = clip, set()
    words: tuple[str, ...] = ()
    if clip is None:
        unplaced += [f"{word}.{name}" for word, vectors in embeddings.items() for name in vectors]
    else:
        found = by_encoder(embeddings, list(encoders(clip)))
        new_clip, unfit = with_words(clip, found)
        unplaced += unfit
        words = tuple(word for word, vectors in found.items() if any(f"{word}.{name}" not in unfit for name in vectors))
        on_clip = set(new_clip.add_patches(patches, strength_clip))
    if not (on_model or on_clip or words):
        lacking = clip is None and embeddings
        cure = "connect the CLIP, it holds embeddings" if lacking else "it was made for another family"
        raise ValueError(
            f"none of the {len(whole)} keys of this LoRA fits the MODEL (for example {next(iter(whole), 'no key')}): "
            + cure
        )
    lost = [str(key) for key in patches if key not in on_model and key not in on_clip]
    return new_model, new_clip, Applied(len(on_model), len(on_clip), (*unplaced, *lost), words)


@contextmanager
def _unplaced_keys() -> Iterator[list[str]]:
    """The keys that the host says it could not load; it says so in its log only."""
    found: list[str] = []

    def take(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if not text.startswith(_NOT_LOADED):
            return True
        found.append(text.split(": ", 1)[-1])
        return False

    logger = logging.getLogger()
    logger.addFilter(take)
    try:
        yield found
    finally:
        logger.removeFilter(take)
