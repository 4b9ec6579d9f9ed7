"""The check of a run's options in the host: what it needs to know of the model, and how the page hears of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from ..training.dataset.batches import BatchPlan
from ..training.objective import Prediction
from ..training.run_lint import check_run, facts
from ..training.run_rules import RunFinding
from ..training.settings import Plan
from .identify import architecture, native_side
from .progress import host_server

EVENT = "loom.run_lint"


def advise(
    model: Any, prediction: Prediction, plan: Plan, order: BatchPlan, total_steps: int, node_id: str | None
) -> list[RunFinding]:
    """What the check finds; the page shows it on the node before the first step."""
    found = check_run(
        facts(
            plan,
            order,
            total_steps,
            architecture=architecture(model)[0],
            native=native_side(model),
            noise=prediction is Prediction.EPSILON,
        )
    )
    _show(found, node_id)
    return found


def _show(found: Iterable[RunFinding], node_id: str | None) -> None:
    server = host_server()
    if server is not None and node_id is not None:
        content = {"node": node_id, "findings": [dataclasses.asdict(finding) for finding in found]}
        server.send_sync(EVENT, content, server.client_id)
