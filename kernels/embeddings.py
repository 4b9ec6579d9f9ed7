"""Textual inversion embeddings inside adapter files.

* ``take_embeddings``: the embeddings of a file, by placeholder and text encoder, and the tensors that are none.
* ``by_encoder``: the same by the host's names of the encoders; ``bundle``: such vectors as a file holds them.

OneTrainer bundles "bundle_emb.<placeholder>.clip_l" (clip_g, t5, llama, gemma; "_out" for vectors behind the encoder),
LyCORIS' tools "bundle_emb.<placeholder>.string_to_param.*". Pivotal tuning leaves kohya's embedding keys beside the
adapter's: "emb_params", or one key for each encoder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

_BUNDLED = re.compile(r"bundle_emb\.(.+)\.(string_to_param\.\*|\w+)")
_IN_FILES = {"t5xxl": "t5"}  # encoders that OneTrainer and the web UIs call otherwise than the host
_ALONE = re.compile(r"(?:emb_params|clip_[lgh]|t5(?:xxl)?|text_encoders_[012]|llama|gemma|string_to_param\.\*|<s\d+>)")


def take_embeddings(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(placeholder -> encoder -> vectors, the rest). An embedding without placeholder is called as the file is."""
    found: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    alone = metadata.get("ss_output_name") or metadata.get("modelspec.title") or metadata.get("name") or "embedding"
    for key, tensor in tensors.items():
        bundled = _BUNDLED.fullmatch(key)
        if not tensor.is_floating_point() or not 1 <= tensor.ndim <= 2 or not tensor.numel():
            rest[key] = tensor
        elif bundled:
            found.setdefault(bundled[1], {})[bundled[2]] = tensor
        elif _ALONE.fullmatch(key):
            found.setdefault(alone, {})[key] = tensor
        else:
            rest[key] = tensor
    return found, rest


def by_encoder(
    words: Mapping[str, Mapping[str, Tensor]], encoders: Sequence[str]
) -> dict[str, dict[str, Tensor]]:
    """placeholder -> the host's name of the encoder -> (count, width); a nameless one is that of a lone encoder."""
    ours = {name: encoder for encoder, name in _IN_FILES.items()}
    if len(encoders) == 1:
        ours |= dict.fromkeys(("emb_params", "string_to_param.*"), encoders[0])
    return {
        word: {ours.get(name, name): tensor.reshape(-1, tensor.shape[-1]) for name, tensor in vectors.items()}
        for word, vectors in words.items()
    }


def bundle(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Vectors by "placeholder.encoder" -> "bundle_emb.placeholder.<its name in files>", copied."""
    found = {}
    for name, tensor in vectors.items():
        word, _, encoder = name.rpartition(".")
        found[f"bundle_emb.{word}.{_IN_FILES.get(encoder, encoder)}"] = tensor.detach().to("cpu", copy=True)
    return found
