"""What to tell of a LoRA that was put on a MODEL and a CLIP.

* ``account``: in sentences: what acts how strongly by which engine and why, trigger words, what found no place and what
  is called alike, how much each block changes, what of it arrives on rounded weights. And as a picture: how much each
  block changes, and weights over the run.
* ``log``: the one line of the log.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..kernels.adapter import Adapter
from ..kernels.sidecars import Facts
from ..kernels.strengths.schedule import Schedule
from ..kernels.unplaced import grouped, summary
from .apply import BRANCH, FUSE, HOST, Applied, Strengths
from .branching import Strength
from .diagnosis import Shares, shares_of
from .pictures import bar_picture, below, schedule_picture
from .realised import realised, realised_lines
from .targets import layer_of

ENGINES_SHOWN = {FUSE: "fused", BRANCH: "branched", HOST: "patched by the host's own loader"}
MOST_LINES = 60


def account(
    name: str, applied: Applied, facts: Facts | None, model: Any, strengths: Strengths, pictured: bool, title: str = ""
) -> tuple[str, Image.Image | None]:
    """(report, picture); ``model`` is the MODEL before. Only a picture needs to read its weights, once."""
    found = _shares(model, applied) if pictured and applied.adapters else None
    text = _report(name, applied, facts, found, model)
    return text, None if found is None else _picture(title or name, found, strengths, applied)


def _report(name: str, applied: Applied, facts: Facts | None, shares: Shares | None, model: Any) -> str:
    lines = [_headline(name, applied), *_idle(applied)]
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


def _shares(model: Any, applied: Applied) -> Shares:
    """How much each block changes; scheduled strengths at their greatest."""
    strengths = {layer_of(key): strength.greatest for key, strength in applied.strengths.items()}
    return shares_of(model, layer_adapters(applied), lambda path: strengths[path])


def _picture(name: str, found: Shares, strengths: Strengths, applied: Applied) -> Image.Image:
    """Bars, and below them the weights that change over the run."""
    parts = {title: schedule for title, schedule in _schedules(strengths, applied).items() if schedule.constant is None}
    bars = bar_picture(found.blocks, name, found.names)
    return below([bars, schedule_picture(parts, title=name)]) if parts else bars


def layer_adapters(applied: Applied) -> dict[str, Adapter]:
    """By the paths of layers; those of the MODEL."""
    return {layer_of(key): adapter for key, adapter in applied.adapters.items() if not key.endswith(".bias")}


def _schedules(strengths: Strengths, applied: Applied) -> dict[str, Schedule]:
    """What changes over the run: by widget, and what rules say of blocks."""
    found = {"strength": strengths.model, "steps": strengths.steps, **strengths.components}
    known = set(found.values())
    rules = dict.fromkeys(s for strength in applied.strengths.values() for s in strength.schedules if s not in known)
    return found | {f"blocks: {schedule}"[:60]: schedule for schedule in rules}


def _headline(name: str, applied: Applied) -> str:
    parts = []
    if applied.model_weights:
        acting = [applied.strengths[key] for key in (*applied.fused, *applied.branched) if key in applied.strengths]
        engines = "; ".join(f"{ENGINES_SHOWN[engine]}: {why}" for engine, why in applied.why.items())
        how = f" ({engines})" if engines else ""
        parts.append(f"{applied.model_weights} weights of the MODEL{_at(acting)}{how}")
    if applied.clip_weights:
        at = [Strength(strength) for strength in applied.clip_strengths.values() if strength]
        rounded = f", {len(applied.clip_branched)} of them merged on use" if applied.clip_branched else ""
        parts.append(f"{applied.clip_weights} of the CLIP{_at(at)}{rounded}")
    return f"{name}: " + (", ".join(parts) or "nothing acts, since all of it is at strength 0")


def _at(strengths: Sequence[Strength]) -> str:
    """ " at 0.7", " at 0.2 to 1", or how they change."""
    if not strengths:
        return ""
    low, high = min(s.constant for s in strengths), max(s.constant for s in strengths)
    text = f" at {low:g}" if low == high else f" at {low:g} to {high:g}"
    changing = dict.fromkeys(str(schedule) for strength in strengths for schedule in strength.schedules)
    if changing:
        courses = dict.fromkeys(strength.course.clock for strength in strengths if strength.schedules)
        text += f" times {' and '.join(changing)} over the {' and '.join(courses)}"
    return text


def _idle(applied: Applied) -> list[str]:
    """What is left as it is, and what branches are no part of."""
    acting = {*applied.fused, *applied.branched}
    idle = sum(key not in acting for key in applied.strengths)
    idle_text = sum(not strength for strength in applied.clip_strengths.values())
    lines = [f"{idle} weights of the MODEL are left as they are: their factor is 0"] if idle else []
    lines += [f"{idle_text} weights of the CLIP are left as they are: their factor is 0"] if idle_text else []
    if applied.branched:
        lines.append("what is branched is no part of what nodes that save or merge models write: choose fuse for those")
    return lines
