"""Curves of a run: log.jsonl in its folder, and TensorBoard's files where wanted.

* one JSON object a line: {"step", "loss", "learning_rate", "gradient_norm", "bands", "seconds"} after each step, and
  {"step", "validation": {time: loss}, "mean"} after each measurement; what is not a number is null
* written after each step, so that a crash loses nothing; a run that goes on drops the lines of steps it will make again
* nothing is written before the first step has been made
* ``read_log``: the lines of a folder's log, one after the other, however long it is; what is no line is passed over
* ``last_step``: how far a log has come, from its end alone
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np

from .loop import BANDS, StepReport
from .options import OptionError

LOG, TENSORBOARD = "log.jsonl", "tensorboard"
LONGEST = 1 << 16  # characters of a line that is looked at


def check_tensorboard(wanted: bool) -> None:
    """Raises OptionError where TensorBoard is wanted and not installed."""
    if wanted and importlib.util.find_spec("tensorboard") is None:
        raise OptionError(
            "tensorboard is on, but the package is not installed: pip install tensorboard, or switch it off "
            f"({LOG} in the run folder has the same numbers)"
        )


def band_names() -> list[str]:
    """The parts of the trajectory, 0 being clean."""
    return [f"{band / BANDS:g}-{(band + 1) / BANDS:g}" for band in range(BANDS)]


class Log:
    """Writes to ``folder`` from ``step`` on, while a ``with`` lasts; ``told`` is called with each line."""

    def __init__(
        self, folder: Path, step: int, tensorboard: bool, told: Callable[[dict[str, Any]], object] = lambda line: None
    ) -> None:
        self.folder, self.step, self.tensorboard, self.told = folder, step, tensorboard, told
        self._file: TextIO | None = None
        self._board: Any = None
        self._held: list[dict[str, Any]] = []  # of before the first step

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sink in (self._file, self._board):
            if sink is not None:
                sink.close()
        self._file = self._board = None

    def after(self, report: StepReport, seconds: float) -> None:
        """What ``Trainer.step`` returned, and how long it took."""
        if self._file is None:
            self._open()
        numbers = {
            "loss": report.loss,
            "learning_rate": report.learning_rate,
            "gradient_norm": report.gradient_norm,
            "bands": report.bands,
            "seconds": round(seconds, 4),
        }
        self._say({"step": report.step, **numbers})

    def validation(self, step: int, losses: Mapping[float, float]) -> None:
        """``losses`` of what is never trained on, by time."""
        mean = sum(losses.values()) / len(losses)
        self._say({"step": step, "validation": {f"{time:g}": loss for time, loss in losses.items()}, "mean": mean})

    def picture(self, step: int, name: str, picture: Any) -> None:
        """A preview, for TensorBoard alone."""
        if self._board is not None:
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")

    def _open(self) -> None:
        path = self.folder / LOG
        self.folder.mkdir(parents=True, exist_ok=True)
        first = self.step + 1 if self.step else 0  # a run that begins anew measures its beginning anew
        if path.exists():
            _cut(path, first)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - closed by __exit__
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self.folder / TENSORBOARD), purge_step=first, flush_secs=10)  # type: ignore[no-untyped-call]
        held, self._held = self._held, []
        for line in held:
            self._put(line)

    def _say(self, line: dict[str, Any]) -> None:
        self._put(line)
        self.told(line)

    def _put(self, line: dict[str, Any]) -> None:
        if self._file is None:
            self._held.append(line)
            return
        self._file.write(json.dumps(_plain(line), allow_nan=False) + "\n")
        if self._board is not None:
            for name, value in _scalars(line):
                self._board.add_scalar(name, value, line["step"])


def read_log(folder: Path, last: float = math.inf) -> Iterator[dict[str, Any]]:
    """The lines of the log in ``folder`` up to the step ``last``; none without a log."""
    try:
        file = open(folder / LOG, encoding="utf-8", errors="replace")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        return
    with file:
        while text := file.readline(LONGEST):
            line = _read(text)
            if line is not None and line["step"] <= last:
                yield line


def last_step(folder: Path) -> int:
    """The step of the last line of the log in ``folder``; 0 where there is none."""
    try:
        with open(folder / LOG, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - LONGEST))
            lines = file.read(LONGEST).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return 0
    found = (line["step"] for line in map(_read, reversed(lines)) if line is not None)
    return next(found, 0)


def _read(text: str) -> dict[str, Any] | None:
    """A line of the log; None for what is none."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None


def _cut(path: Path, first: int) -> None:
    """Drop the lines of the steps from ``first`` on, and one that a killed process left unfinished."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] < first:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    aside = path.with_name(f".{path.name}.part")
    aside.write_text("".join(kept), encoding="utf-8")
    os.replace(aside, path)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(line: Mapping[str, Any]) -> list[tuple[str, float]]:
    if "validation" in line:
        times = [(f"validation/{time}", loss) for time, loss in line["validation"].items()]
        return [("validation/mean", line["mean"]), *times]
    bands = zip(band_names(), line["bands"], strict=True)
    drawn = [(f"loss by timestep/{name}", loss) for name, loss in bands if not math.isnan(loss)]
    return [(name, line[name]) for name in ("loss", "learning_rate", "gradient_norm")] + drawn
