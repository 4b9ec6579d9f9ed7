"""What a file says of where it is from.

* ``Parent``: one of the files that it was made of.
* ``shared``: what parents say alike, without what is no longer true of anything made of them.
* ``with_parents``: metadata of a result: "loom.tool" (JSON: tool, options, parents, retained energy), ModelSpec's keys
  put right, the trigger words of all parents. kohya's are put right where the tensors are (``writing``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..metadata import split_words, trigger_words
from ..peft_config import CONFIG, DIFFUSERS_CONFIG
from ..writing import NETWORK, TOOL
from .outcome import Outcome

MAX_NAME, MAX_TEXT = 200, 2000  # of what a parent is called; of a strength
_STALE = (  # true of the tensors of one file only, or read as settings of it
    *("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "modelspec.date", "modelspec.merged_from"),
    *(*NETWORK, "ss_network_args", CONFIG, DIFFUSERS_CONFIG, TOOL),
)


@dataclass(frozen=True)
class Parent:
    """``digest``: a hash of the file or its tensors; ``strength`` as it was asked for; ``metadata``: its own.

    ``acts``: whether anything of it is in the result.
    """

    name: str
    digest: str = ""
    strength: str = "1"
    metadata: Mapping[str, str] = field(default_factory=dict)
    acts: bool = True


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
    told: dict[str, object] = {
        "tool": tool,
        "options": dict(options),
        "parents": [
            {"name": parent.name[:MAX_NAME], "digest": parent.digest[:MAX_NAME], "strength": parent.strength[:MAX_TEXT]}
            for parent in parents
        ],
    }
    if outcome.layers:
        told["energy"] = round(outcome.energy, 6)
    found = {key: value for key, value in metadata.items() if key not in _STALE}
    found["modelspec.sai_model_spec"] = "1.0.0"
    acting = [parent for parent in parents if parent.acts]
    if len(acting) > 1:
        found["modelspec.merged_from"] = ", ".join(parent.name[:MAX_NAME] for parent in acting)
    words = split_words(*(word for parent in acting for word in trigger_words(parent.metadata)))
    if words:
        found["modelspec.trigger_phrase"] = ", ".join(words)
    return found | {TOOL: json.dumps(told, ensure_ascii=False, sort_keys=True)}
