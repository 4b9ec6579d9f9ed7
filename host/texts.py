"""Captions to conditioning, with the graph's CLIP.

* ``encode_captions``: every caption once, by the host's own encoder: clip skip, prompt weights and long captions are
  its business.
* ``TextCache``: encoded captions on disk, known by their tokens and by the content of the CLIP.
* ``LiveText``: captions encoded anew at each step, where something of the text is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import comfy.model_management
import comfy.sd1_clip
import torch
from torch import Tensor

from ..training.caches import DiskCache, Entry, key_of
from ..training.options import OptionError
from .contents import UnknownContentError, content_of_model

Encoded = tuple[Tensor, dict[str, Any]]  # cross-attention, and what else the model is conditioned on

_CONTEXT, _EXTRA = "context", "extra."


class LiveText(Protocol):
    """Text encoders on loan, with what is trained of them acting."""

    def encode(self, captions: Sequence[str]) -> list[Encoded]:
        """Differentiable in what is trained."""
        ...


class TextCache:
    """Encoded captions of one CLIP on disk. Raises OptionError for a CLIP that nothing can be kept of."""

    def __init__(self, disk: DiskCache, clip: Any) -> None:
        self.disk = disk
        try:
            self.clip_key = key_of("text", content_of_model(clip.patcher), _options_of(clip))
        except UnknownContentError as error:
            raise _not_kept(str(error)) from error

    def key(self, tokens: Any) -> str:
        """The tokens say it all: the tokenizer's options, the weights of words, the vectors of embeddings."""
        try:
            return key_of(self.clip_key, tokens)
        except TypeError as error:
            raise _not_kept(str(error)) from error

    def get(self, key: str) -> Encoded | None:
        entry = self.disk.get(key)
        if entry is None:
            return None
        extras = {name.removeprefix(_EXTRA): value for name, value in entry.tensors.items() if name != _CONTEXT}
        return entry.tensors[_CONTEXT], {**entry.facts, **extras}

    def put(self, key: str, encoded: Encoded) -> None:
        context, extras = encoded
        tensors = {_EXTRA + name: value for name, value in extras.items() if isinstance(value, Tensor)}
        facts = {name: value for name, value in extras.items() if not isinstance(value, Tensor)}
        for name, value in facts.items():
            if value is not None and not isinstance(value, bool | int | float | str):
                raise _not_kept(f"it gives {name} as a {type(value).__name__}")
        self.disk.put(key, Entry({_CONTEXT: context, **tensors}, facts))


def _not_kept(why: str) -> OptionError:
    return OptionError(f"text_cache is 'disk', expected 'memory': this CLIP cannot be told from others ({why})")


def _options_of(clip: Any) -> Any:
    """What beside the weights decides how tokens are encoded: clip skip, masks, which layer, which token ends."""
    encoders = [
        (name, type(module).__qualname__, _simple(vars(module)))
        for name, module in clip.cond_stage_model.named_modules()
        if isinstance(module, comfy.sd1_clip.SDClipModel)
    ]
    return clip.layer_idx, type(clip.cond_stage_model).__qualname__, encoders


_SET_ON_USE = {"execution_device", "layer", "layer_idx", "return_projected_pooled", "training"}


def _simple(values: dict[str, Any]) -> dict[str, Any]:
    """Plain settings, without those that the host sets from ``options_default`` and clip skip at each use."""
    plain = bool, int, float, str, tuple, dict, type(None)
    return {n: v for n, v in values.items() if not n.startswith("_") and n not in _SET_ON_USE and isinstance(v, plain)}


def encode_captions(
    clip: Any,
    captions: Iterable[str],
    advance: Callable[[], None] = lambda: None,
    cache: TextCache | None = None,
) -> dict[str, Encoded]:
    """caption → (cross-attention tensor, extras) with ordinary tensors on the CPU; each caption is encoded once.

    ``advance`` is called after each.
    """
    encoded: dict[str, Encoded] = {}
    for caption in captions:
        if caption in encoded:
            continue
        comfy.model_management.throw_exception_if_processing_interrupted()
        tokens = clip.tokenize(caption)
        key = cache.key(tokens) if cache is not None else ""
        found = cache.get(key) if cache is not None else None
        if found is None:
            found = _encoded(clip, tokens)
            if cache is not None:
                cache.put(key, found)
        encoded[caption] = found
        advance()
    return encoded


def _encoded(clip: Any, tokens: Any) -> Encoded:
    context, extras = clip.encode_from_tokens_scheduled(tokens)[0]
    with torch.inference_mode(False):
        kept = {name: _plain(value) for name, value in extras.items() if name not in ("hooks", "model_conds")}
        return _plain(context), kept


def _plain(value: Any) -> Any:
    """Inference tensors cannot take part in training: a copy can."""
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
