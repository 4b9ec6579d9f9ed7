"""Names of text encoders: CLIP, T5, BERT and language models, as the host keeps them side by side.

* ``encoder_layers``: the paths that lie in text encoders.
* ``TextNames``: for the encoders of one loaded CLIP, which layer a spelling means and how a layer is written.
* ``encoder_prefixes``: how kohya and diffusers number the encoders of a model, from which encoders there are.

A canonical path is the host's, "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .blocks import MODEL_PREFIX

PREFIX = "text_encoders."
_ENCODER = re.compile(r"(\w+)\.transformer\.")
_CLIP_LAYER = re.compile(r"clip_\w\..*\.(?:self_attn\.\w+_proj|mlp\.fc[12])$")
_PROJECTIONS = {  # what the trainers of SD3 and Cascade call them, whichever encoders stand beside
    "clip_l.transformer.text_projection": ("lora_te1_text_projection",),
    "clip_g.transformer.text_projection": ("lora_te2_text_projection", "lora_prior_te_text_projection"),
}


@dataclass(frozen=True)
class Prefixes:
    """What stands before the layers of an encoder: ``kohya`` as accepted, the one to write first; ``diffusers``."""

    kohya: tuple[str, ...]
    diffusers: str


def encoder_layers(paths: Iterable[str]) -> list[str]:
    """Those of ``paths`` that lie in text encoders: all outside the diffusion model, if encoders are among them."""
    outside = [path for path in paths if not path.startswith(MODEL_PREFIX)]
    return outside if any(map(_ENCODER.match, outside)) else []


class TextNames:
    """Spellings of the layers of a set of text encoders; ``found`` maps each spelling to its path."""

    def __init__(self, paths: Iterable[str]) -> None:
        self.paths = tuple(paths)
        self._prefixes = encoder_prefixes(dict.fromkeys(m[1] for m in map(_ENCODER.match, self.paths) if m))
        self.found: dict[str, str] = {}
        self._begun: dict[str, bool] = {}
        for path in self.paths:
            self.found |= {path: path, PREFIX + path: path}
        for path in self.paths:
            for name in (*self._numbered(path), *_PROJECTIONS.get(path, ())):
                self.found.setdefault(name, path)
        language = [path for path in self.paths if _local(path) is not None and not path.startswith("clip_")]
        # newer hosts also read them without the encoder's own name, and then mean the last encoder
        self.found = {PREFIX + path.partition(".")[2]: path for path in language} | self.found

    def has(self, prefix: str) -> bool:
        """Whether a layer of any of the encoders is called by this beginning."""
        if prefix not in self._begun:
            self._begun[prefix] = any(name.startswith(prefix) for name in self.found)
        return self._begun[prefix]

    def write(self, path: str, dialect: str) -> str | None:
        """The name in "native", "kohya", "diffusers" or "host"; None where the dialect has none."""
        if dialect == "native":  # kohya's names where every loader reads them, the host's for all the rest
            dialect = "kohya" if _CLIP_LAYER.match(path) else "host"
        if dialect == "host":
            return PREFIX + path
        local, prefixes = _local(path), self._prefixes.get(path.partition(".")[0])
        if local is None or prefixes is None:
            return None
        if dialect == "kohya":
            return prefixes.kohya[0] + _flat(_unwrapped(local))
        return prefixes.diffusers + local if dialect == "diffusers" else None

    def _numbered(self, path: str) -> list[str]:
        local, prefixes = _local(path), self._prefixes.get(path.partition(".")[0])
        if local is None or prefixes is None:
            return []
        flat = dict.fromkeys((_flat(local), _flat(_unwrapped(local))))
        encoder = path.partition(".")[0]
        own = [f"{name}.{local}" for name in dict.fromkeys((encoder, encoder.removesuffix("xxl")))]  # OneTrainer's
        return [prefix + name for prefix in prefixes.kohya for name in flat] + [prefixes.diffusers + local, *own]


def encoder_prefixes(encoders: Iterable[str]) -> dict[str, Prefixes]:
    """Prefixes of each encoder; one whose number no trainer has settled is left out.

    CLIP models come first, then T5, then a language model. A lone encoder is also called by no number at all.
    """
    present = list(encoders)
    clips: list[str] = [name for name in ("clip_h", "clip_l", "clip_g") if name in present]
    if len(present) == 1:
        order = present
    elif "hydit_clip" in present:
        order = ["hydit_clip", "mt5xl"]
    elif "t5xxl" in present:
        order = [*clips, "t5xxl", "llama"]
    else:  # the two encoders of HunyuanVideo are CLIP and a language model, which diffusers counts the other way
        order = clips
    order = [encoder for encoder in order if encoder in present]
    found = {}
    for n, encoder in enumerate(order, start=1):
        kohya: tuple[str, ...] = (f"lora_te{n}_",)
        if n == 1 and encoder not in ("t5xxl", "hydit_clip"):
            alone = len(order) == 1 or encoder == "clip_g"
            kohya = ("lora_te_", *kohya) if alone else (*kohya, "lora_te_")
        if encoder == "t5xxl" and clips == ["clip_l"]:  # Flux: the third for kohya, so that it is called as in SD3
            kohya = ("lora_te3_", "lora_te2_")
        if encoder == "clip_g" and clips == ["clip_g"]:
            kohya = (*kohya, "lora_prior_te_")
        found[encoder] = Prefixes(kohya, "text_encoder." if n == 1 else f"text_encoder_{n}.")
    return found


def _local(path: str) -> str | None:
    """The path inside the encoder, as the libraries have it; None for what the host puts around it."""
    encoder, _, tail = path.partition(".")
    if not tail.startswith("transformer."):
        return None
    local = tail.removeprefix("transformer.")
    return local.removeprefix("bert.") if encoder == "hydit_clip" else local


def _unwrapped(local: str) -> str:
    """kohya leaves out the outer "model" of language models."""
    return local.removeprefix("model.")


def _flat(path: str) -> str:
    return path.replace(".", "_")
