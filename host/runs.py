"""Run folders: where a training keeps what it needs to go on, and what it has learned so far.

One folder per run name below ``output/lora_loom``: ``state.safetensors`` (adapters, optimizer, position; the facts of
the run as JSON in its header) and ``<name>.safetensors`` (the LoRA). Both are written aside and moved into place.
Names come from a graph and are untrusted: only plain file names that every system accepts pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ..kernels.safetensors_io import LoraModel, load_tensors, read_metadata, save_tensors

IF_EXISTS = {
    "continue": "go on where that run stopped, or return its result when it is complete",
    "new": "start afresh under the next free name (name-2, name-3, …)",
    "error": "stop with an error",
}
STATE = "state"  # the file that a run goes on from
_NAME = re.compile(r"[\w][\w .+-]{0,98}[\w]|[\w]", re.ASCII)
_RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{n}" for device in ("com", "lpt") for n in range(1, 10))}


class RunError(ValueError):
    """A run name that cannot be used, or a run that cannot be continued."""


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path

    @property
    def state_path(self) -> Path:
        return self.folder / f"{STATE}.safetensors"

    @property
    def lora_path(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    def exists(self) -> bool:
        return self.state_path.exists()

    def facts(self) -> dict[str, Any]:
        """What was written beside the state."""
        return json.loads(read_metadata(self.state_path)["loom.run"])

    def state(self) -> LoraModel:
        return load_tensors(self.state_path)

    def write(self, state: Mapping[str, Tensor], facts: Mapping[str, Any], lora: LoraModel) -> None:
        """Keep both files; the LoRA first, so that a state never tells of a LoRA that is not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(lora, self.lora_path)
        save_tensors(state, self.state_path, {"loom.run": json.dumps(facts, sort_keys=True)})


def open_run(name: str, if_exists: str) -> Run:
    """The run to write to. Raises RunError naming ``run_name`` or ``if_run_exists``."""
    checked = checked_name(name)
    if checked.lower() == STATE:
        raise RunError(f"run_name: {checked!r} is the name of the file beside the LoRA; choose another run_name")
    if if_exists not in IF_EXISTS:
        raise RunError(f"if_run_exists is {if_exists!r}, expected one of {', '.join(IF_EXISTS)}")
    root = Path(folder_paths.get_output_directory()) / "lora_loom"
    run = Run(checked, root / checked)
    if not run.exists() or if_exists == "continue":
        return run
    if if_exists == "error":
        raise RunError(
            f"run_name: there is a run called {checked!r} already ({run.folder}). "
            "Choose another run_name, or set if_run_exists to continue or new."
        )
    number = 2
    while Run(f"{checked}-{number}", root / f"{checked}-{number}").exists():
        number += 1
    return Run(f"{checked}-{number}", root / f"{checked}-{number}")


def checked_name(name: Any, option: str = "run_name") -> str:
    """``name`` if it is a plain file name on every system. Raises RunError naming ``option``."""
    text = name.strip() if isinstance(name, str) else ""
    if not _NAME.fullmatch(text) or text.split(".")[0].strip().lower() in _RESERVED:
        raise RunError(
            f"{option} is {_shown(name)}; use letters, digits, spaces, dots, dashes and underscores (at most 100), "
            "beginning and ending with a letter or digit, and no name that a system keeps for itself (CON, NUL, …)"
        )
    return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "…"
