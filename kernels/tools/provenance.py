"""What a file says of where it is from.

* ``Parent``: one of the files that it was made of.
* ``shared``: what parents say alike, without what is no longer true of anything made of them.
* ``with_parents``: metadata of a result: "loom.tool" (JSON: tool, options, parents, retained energy), kohya's and
  ModelSpec's keys put right, the trigger words of all parents.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..compose import Sum
from ..full import Full
from ..lora import LoRA
from ..metadata import split_words, trigger_words
from ..peft_config import CONFIG, DIFFUSERS_CONFIG
from .outcome import Outcome

TOOL = "loom.tool"
MAX_NAME, MAX_TEXT = 200, 2000  # of what a parent is called; of a strength
_STALE = (  # true of the tensors of one file only, or read as settings of it
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.date", "modelspec.merged_from"),
    *("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args", CONFIG, DIFFUSERS_CONFIG, TOOL),
)


@dataclass(frozen=True)
class Parent:
    """``digest``: a hash of the file or its tensors; ``strength`` as it was asked for; ``metadata``: its own."""

    name: str
    digest: str = ""
    strength: str = "1"
    metadata: Mapping[str, str] = field(default_factory=dict)


def shared(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all of them say alike."""
    first, *others = metadata
    alike = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return {key: value for key, value in alike.items() if key not in _STALE}


def with_parents(
    metadata: Mapping[str, str],
    tool: str,
    parents: Sequence[Parent],
    options: Mapping[str, object],
    outcome: Outcome,
) -> dict[str, str]:
    """``metadata`` as it is true of the result. ``options``: whatever JSON can hold."""
    told = {
        "tool": tool,
        "options": dict(options),
        "parents": [
            {"name": parent.name[:MAX_NAME], "digest": parent.digest[:MAX_NAME], "strength": parent.strength[:MAX_TEXT]}
            for parent in parents
        ],
        "energy": round(outcome.energy, 6),
    }
    found = {key: value for key, value in metadata.items() if key not in _STALE}
    found |= _network(outcome) | {"modelspec.sai_model_spec": "1.0.0"}
    if len(parents) > 1:
        found["modelspec.merged_from"] = ", ".join(parent.name[:MAX_NAME] for parent in parents)
    words = split_words(*(word for parent in parents for word in trigger_words(parent.metadata)))
    if words:
        found["modelspec.trigger_phrase"] = ", ".join(words)
    return found | {TOOL: json.dumps(told, ensure_ascii=False, sort_keys=True)}


def _network(outcome: Outcome) -> dict[str, str]:
    """kohya's keys; it writes "Dynamic" where layers differ."""
    parts = [
        part
        for adapter in outcome.file.adapters.values()
        for part in (adapter.parts if isinstance(adapter, Sum) else (adapter,))
    ]
    pairs = [part for part in parts if isinstance(part, LoRA)]
    plain = all(isinstance(part, LoRA) or (isinstance(part, Full) and not part.factors) for part in parts)
    found = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    if pairs:
        found["ss_network_dim"] = _one(str(pair.rank) for pair in pairs)
        found["ss_network_alpha"] = _one(str(pair.alpha) for pair in pairs)
    return found


def _one(values: Iterable[str]) -> str:
    different = set(values)
    return different.pop() if len(different) == 1 else "Dynamic"
