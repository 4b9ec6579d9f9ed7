"""Run folders: where a training keeps what it needs to go on, and what it has learned so far.

One folder per run name below ``output/lora_loom``:

* ``<name>.safetensors``, the LoRA so far; ``<name>-step000500``, ``<name>-best`` and ``<name>-ema`` where wanted
* ``state-<step>``, what the run goes on from (``training.runstate``)
* ``log.jsonl``, ``tensorboard``, ``previews``; ``past_runs`` finds those that have a log, ``Histories`` reads them

LoRAs are written aside and moved into place, and before the state, so that a state never tells of a LoRA that is not
there. ``Run.locked`` keeps a second trainer, in this process or another, from writing to the same folder.
Names come from a graph and are untrusted: only plain file names that every system accepts pass.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import folder_paths
from torch import Tensor

from ..kernels.safetensors_io import LoraModel, save_tensors
from ..training import runstate
from ..training.history import History, history_of
from ..training.logs import LOG, last_step, read_log

IF_EXISTS = {
    "continue": "go on where that run stopped, or return its result when it is complete",
    "new": "start afresh under the next free name (name-2, name-3, …)",
    "error": "stop with an error",
}
HISTORIES_KEPT = 8  # half a megabyte each at most
STATE = "state"  # what the states in a run folder are called
LOCK = ".lock"
_NAME = re.compile(r"[\w][\w .+-]{0,98}[\w]|[\w]", re.ASCII)
_RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{n}" for device in ("com", "lpt") for n in range(1, 10))}
_UNFINISHED = re.compile(r"\..*\.part")
_PREVIEW = re.compile(r"step-(\d{6,15})\.png")


class RunError(ValueError):
    """A run name that cannot be used, or a run that cannot be continued."""


@dataclass(frozen=True)
class Run:
    name: str
    folder: Path

    @property
    def lora_path(self) -> Path:
        return self.lora_file()

    def lora_file(self, mark: str = "") -> Path:
        """Where the LoRA is kept, or one of its kinds: ``step000500``, ``best``, ``ema``."""
        return self.folder / f"{self.name}{mark and f'-{mark}'}.safetensors"

    def exists(self) -> bool:
        """Whether there is something that another run must not overwrite."""
        return self.lora_path.exists() or runstate.has_state(self.folder) or self._old_state().exists()

    def saved(self) -> runstate.Found | None:
        """What to go on from. Raises RunError where something is there that cannot be gone on from."""
        try:
            found = runstate.find_state(self.folder)
        except runstate.StateError as error:
            raise RunError(f"run_name: the run {self.name!r}: {error}") from error
        if found is None and self._old_state().exists():
            raise RunError(
                f"run_name: the run {self.name!r} was made by LoRA Loom 0.1, whose states this version does not go on "
                f"from. Choose another run_name, or set if_run_exists to new; the LoRA so far is {self.lora_path} and "
                "can be connected to start_from"
            )
        return found

    def _old_state(self) -> Path:
        return self.folder / f"{STATE}.safetensors"

    def keep(self, lora: LoraModel, mark: str = "") -> Path:
        """Write a LoRA in one step."""
        return save_tensors(lora, self.lora_file(mark))

    def keep_step(self, lora: LoraModel, step: int, last: int) -> None:
        """Write the LoRA of a step; with ``last``, only so many of the steps until here are kept."""
        self.keep(lora, f"step{step:06d}")
        if not last:
            return
        steps = self.steps()
        for old in sorted(number for number in steps if number <= step)[:-last]:
            steps[old].unlink(missing_ok=True)

    def steps(self) -> dict[int, Path]:
        """step → its LoRA, of those kept on the way."""
        pattern = re.compile(re.escape(self.name) + r"-step(\d{6,})\.safetensors")
        return {int(match[1]): path for path in self.folder.iterdir() if (match := pattern.fullmatch(path.name))}

    def preview_file(self, step: int) -> Path:
        """Where the pictures of a step are kept."""
        return self.folder / "previews" / f"step-{step:06d}.png"

    def previews(self) -> list[int]:
        """The steps of which there are pictures."""
        try:
            names = os.listdir(self.folder / "previews")
        except OSError:
            return []
        return sorted(int(match[1]) for name in names if (match := _PREVIEW.fullmatch(name)))

    def described(self) -> dict[str, Any]:
        """What a list of runs shows. Raises OSError where the log has gone."""
        when = (self.folder / LOG).stat().st_mtime
        return {"run": self.name, "step": last_step(self.folder), "time": when, "previews": len(self.previews())}

    def keep_state(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        runstate.write_state(self.folder, step, tensors, facts)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else writes to this run meanwhile. Raises RunError where somebody does."""
        new = not self.folder.exists()
        path = self.folder / LOCK
        handle = _lock(path)
        if handle is None:
            raise RunError(
                f"run_name: the run {self.name!r} is being trained right now. Wait until it is done, or choose another "
                "run_name"
            )
        try:
            self._clean()
            yield
        finally:
            with suppress(OSError):  # Windows: somebody has just opened it to find it locked
                if os.name != "nt":  # while it is held, so that nobody locks a file that is gone
                    path.unlink()
            os.close(handle)
            with suppress(OSError):
                if os.name == "nt":
                    path.unlink()
            if new:
                with suppress(OSError):  # something was written
                    self.folder.rmdir()

    def _clean(self) -> None:
        """Remove what a killed process left half-written."""
        runstate.clean(self.folder)
        for path in self.folder.iterdir():
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink()


def _lock(path: Path) -> int | None:
    """A handle that holds the lock until it is closed, however the process ends; None when somebody else holds it."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(handle):
                os.close(handle)
                return None
            if os.name == "nt" or _is_at(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the holder before us has removed the file meanwhile


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _try_lock(handle: int) -> bool:
    """Whether the lock could be had. A file system without locks gives it to everybody."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True


def open_run(name: str, if_exists: str) -> Run:
    """The run to write to. Raises RunError naming ``run_name`` or ``if_run_exists``."""
    checked = checked_name(name)
    if checked.lower() == STATE:
        raise RunError(f"run_name: {checked!r} is the name of the file beside the LoRA; choose another run_name")
    if if_exists not in IF_EXISTS:
        raise RunError(f"if_run_exists is {if_exists!r}, expected one of {', '.join(IF_EXISTS)}")
    root = runs_root()
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


class Histories:
    """What runs have measured, from their logs; of the last ones asked for it is kept until their logs change."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[tuple[int, int, int], History]] = OrderedDict()

    def of(self, run: Run) -> History:
        """Raises OSError where the log has gone."""
        status = (run.folder / LOG).stat()
        state = status.st_ino, status.st_size, status.st_mtime_ns
        with self._lock:  # also while reading: who asks for the same waits, and does not read it too
            known = self._kept.pop(run.name, None)
            history = known[1] if known is not None and known[0] == state else history_of(read_log(run.folder))
            self._kept[run.name] = state, history
            while len(self._kept) > HISTORIES_KEPT:
                self._kept.popitem(last=False)
        return history


def past_runs() -> dict[str, Run]:
    """The runs that have a log, by name, the last to be written to first."""
    found = []
    root = runs_root().resolve()
    for path in root.iterdir() if root.is_dir() else ():
        log = path / LOG
        try:
            if checked_name(path.name) == path.name and log.resolve().is_relative_to(root) and log.is_file():
                found.append((log.stat().st_mtime, path.name))
        except (RunError, OSError):  # not ours, or gone meanwhile
            continue
    return {name: Run(name, root / name) for _, name in sorted(found, reverse=True)}


def runs_root() -> Path:
    """Where the folders of all runs lie; not there before the first."""
    return Path(folder_paths.get_output_directory()) / "lora_loom"


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
