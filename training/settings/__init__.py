"""Every option of a training run, declared once: default, range, choices, tooltip. Each class is one settings node."""

from ..options import Option, OptionError, Settings, options_of
from .adapter import ALGORITHMS, DORA, AdapterSettings
from .components import ComponentSettings
from .objective import (
    HUBER_SCHEDULES,
    LOSSES,
    PRIOR_TARGETS,
    SHIFTS,
    TIMESTEPS,
    ObjectiveSettings,
)
from .optimizer import OptimizerSettings
from .plan import LENGTH_UNITS, PARTS, Plan, plan_from_json
from .run import ON_CANCEL, RunSettings

__all__ = [
    "ALGORITHMS",
    "AdapterSettings",
    "ComponentSettings",
    "DORA",
    "HUBER_SCHEDULES",
    "LENGTH_UNITS",
    "LOSSES",
    "ON_CANCEL",
    "ObjectiveSettings",
    "Option",
    "OptionError",
    "OptimizerSettings",
    "PARTS",
    "PRIOR_TARGETS",
    "Plan",
    "RunSettings",
    "SHIFTS",
    "Settings",
    "TIMESTEPS",
    "options_of",
    "plan_from_json",
]
