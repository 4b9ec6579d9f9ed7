"""What PEFT keeps beside the tensors: ranks, alphas and options of an adapter, as JSON.

* ``Configs``: from a file's metadata, or the ``adapter_config.json`` that PEFT writes next to ``adapter_model``.
* ``Configs.scale``: what a layer's product is multiplied with, None where the file does not say.
* ``Configs.of``: the options that hold for a layer.

PEFT's own files have one configuration; diffusers keeps one per component ("transformer.r", "text_encoder.r") under
"lora_adapter_metadata". Per-layer values come as patterns of names, regular expressions to PEFT. A file is not trusted
with those: plain names and simple patterns are followed, others are named in ``refused``.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .metadata import json_object

CONFIG, DIFFUSERS_CONFIG = "adapter_config", "lora_adapter_metadata"
WRAPPER = "base_model.model."
_MAX_BYTES = 2**20
_SIMPLE = re.compile(r"\^?(?:[\w-]|\\?\.|\\d\+?|\.\*)+\$?", re.ASCII)
_OUT_OF_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")  # initialisations that change the base's weights
_MAX_REPEATS = 2  # more of them in one pattern take ages on names made for it
_MAX_STEPS = 10**9  # of all patterns on all names, some seconds
_CALL = 30  # steps that a match costs however short it is


def config_file(path: str | os.PathLike) -> Path | None:
    """The file that PEFT writes next to its own, and to no other; None for others and without one."""
    config = Path(path).with_name(f"{CONFIG}.json")
    if not Path(path).stem.startswith("adapter_model") or not config.is_file() or config.stat().st_size > _MAX_BYTES:
        return None
    return config


def beside(path: str | os.PathLike, metadata: Mapping[str, str]) -> dict[str, str]:
    """What that file adds to the ``metadata`` of the one at ``path``.

    Nothing to files of this pack, which have it inside: what lies beside may be left from another.
    """
    config = None if "loom.dialect" in metadata else config_file(path)
    return {} if config is None else {CONFIG: config.read_text(encoding="utf-8", errors="replace")}


class Configs:
    """The configurations in ``metadata``; falsy without any."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self.components: dict[str, dict[str, Any]] = {}
        self.refused: list[str] = []
        own = json_object(metadata, CONFIG)
        if own:
            self.components[""] = own
        for key, value in json_object(metadata, DIFFUSERS_CONFIG).items():
            component, _, name = key.rpartition(".")
            self.components.setdefault(component, {})[name] = value
        self._steps = 0
        for config in self.components.values():
            for field in ("alpha_pattern", "rank_pattern"):
                config[field] = self._checked(config.get(field))

    def __bool__(self) -> bool:
        return bool(self.components)

    def warnings(self) -> list[str]:
        """What nobody can replay from the file alone, in sentences."""
        starts = {str(config.get("init_lora_weights")) for config in self.components.values()}
        return [
            f"PEFT took the adapter's beginning out of the base model ({start[:20]}), which is not in the file: on the"
            " base model itself it acts otherwise than in training"
            for start in sorted(starts)
            if start.lower().startswith(_OUT_OF_BASE)
        ]

    def of(self, name: str) -> tuple[Mapping[str, Any], str]:
        """(configuration of a layer by its name in the file, its name there)."""
        name = name.replace(WRAPPER, "", 1)
        component, _, inside = name.partition(".")
        if component in self.components:
            return self.components[component], inside.replace(WRAPPER, "", 1)
        return self.components.get("", {}), name

    def scale(self, name: str) -> float | None:
        config, inside = self.of(name)
        rank = _number(self._matching(config.get("rank_pattern", {}), inside, config.get("r")))
        default = config.get("lora_alpha", config.get("alpha"))
        alpha = _number(self._matching(config.get("alpha_pattern", {}), inside, default))
        if rank is None or alpha is None or rank < 1:
            return None
        return alpha / (math.sqrt(rank) if config.get("use_rslora") is True else rank)

    def _checked(self, patterns: Any) -> dict[re.Pattern, Any]:
        found = {}
        for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
            if _SIMPLE.fullmatch(pattern) and _repeats(pattern) <= _MAX_REPEATS:
                found[re.compile(f"(?:{pattern})$")] = value
            else:
                self.refused.append(pattern)
        return found

    def _matching(self, patterns: Mapping[re.Pattern, Any], name: str, default: Any) -> Any:
        """The value of the first pattern that fits the end of ``name`` from a dot on, as PEFT has it."""
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        for pattern, value in patterns.items():
            self._steps += len(starts) * (_CALL + len(name) ** _repeats(pattern.pattern))
            if self._steps > _MAX_STEPS:
                self.refused.append(pattern.pattern)
                break
            if any(pattern.match(name, start) for start in starts):
                return value
        return default


def config_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _repeats(pattern: str) -> int:
    return pattern.count("*") + pattern.count("+")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
