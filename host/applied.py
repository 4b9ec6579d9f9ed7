"""What to tell of a LoRA that was put on a MODEL and a CLIP.

* ``report``: in sentences: what acts how strongly by which engine and why, trigger words, what found no place and what
  is called alike, how much each block changes, what of it arrives on rounded weights.
* ``picture``: how much each block changes, and weights over the run.
* ``log``: the one line of the log.
"""

from __future__ import annotations

import logging
from typing import Any

from PIL import Image

from ..kernels.adapter import Adapter
from ..kernels.sidecars import Facts
from ..kernels.strengths.schedule import Schedule
from ..kernels.unplaced import grouped, summary
from .apply import BRANCH, FUSE, HOST, Applied, Strengths
from .diagnosis import Shares, shares_of
from .pictures import bar_picture, below, schedule_picture
from .realised import realised, realised_lines

ENGINES_SHOWN = {FUSE: "fused", BRANCH: "branched", HOST: "patched by the host's own loader"}
MOST_LINES = 60


def report(
    name: str, applied: Applied, strengths: Strengths, facts: Facts | None, shares: Shares | None, model: Any
) -> str:
    """``shares`` of ``applied`` on ``model``, where they are wanted."""
    lines = [_headline(name, applied, strengths)]
    if applied.words:
        lines.append(f"the CLIP now knows {', '.join(applied.words)}")
    if facts is not None:
        lines += filter(None, (facts.line(), *facts.notes))
    file = applied.file
    if file is not None and file.names is not None and applied.unplaced:
        lines += grouped(applied.unplaced, file.names, file.architecture, file.evidence)
    lines += applied.notes
    if shares is not None:
        lines += shares.lines()
        found = realised(model, shares, layer_adapters(applied))
        lines += realised_lines(found, shares.names) if found else []
    return "\n".join(lines[:MOST_LINES])


def log(name: str, applied: Applied) -> None:
    if applied.file is not None:
        logging.info(summary(name, applied.file, " and ".join(applied.why) or "none"))


def shares(model: Any, applied: Applied) -> Shares:
    """How much each block of ``model``, the MODEL before, changes; scheduled strengths at their greatest."""
    strengths = {_layer(key): strength.greatest for key, strength in applied.strengths.items()}
    return shares_of(model, layer_adapters(applied), lambda path: strengths[path])


def picture(name: str, found: Shares, strengths: Strengths) -> Image.Image:
    """Bars, and below them the weights that change over the run."""
    parts = {title: schedule for title, schedule in _schedules(strengths).items() if schedule.constant is None}
    bars = bar_picture(found.blocks, name, found.names)
    return below([bars, schedule_picture(parts, title=name)]) if parts else bars


def layer_adapters(applied: Applied) -> dict[str, Adapter]:
    """By the paths of layers; those of the MODEL."""
    return {_layer(key): adapter for key, adapter in applied.adapters.items() if not key.endswith(".bias")}


def _layer(key: str) -> str:
    return key.removesuffix(".weight").removesuffix(".bias")


def _schedules(strengths: Strengths) -> dict[str, Schedule]:
    return {"strength": strengths.model, "steps": strengths.steps, **strengths.components}


def _headline(name: str, applied: Applied, strengths: Strengths) -> str:
    parts = []
    engines = [f"{ENGINES_SHOWN[engine]}: {why}" for engine, why in applied.why.items()]
    if applied.model_weights:
        how = f" ({'; '.join(engines)})" if engines else ""
        parts.append(f"{applied.model_weights} weights of the MODEL at {strengths.model}{how}")
    if applied.clip_weights:
        rounded = f", {len(applied.clip_branched)} of them on use" if applied.clip_branched else ""
        parts.append(f"{applied.clip_weights} of the CLIP at {strengths.clip}{rounded}")
    if str(strengths.steps) != "1":
        parts.append(f"over the {strengths.course.clock}: {strengths.steps}")
    return f"{name}: " + (", ".join(parts) or "nothing acts")
