"""One option of a run: its default, its range, its choices and its tooltip, written once.

``option`` declares a field of a settings class; ``Settings`` checks every field when one is made. Widgets, tooltips
and the tests that go over all options are made from the same declarations (``options_of``).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

Choices = Mapping[str, str]  # name -> what it does


class OptionError(ValueError):
    """A value that makes no sense for the option it was given to."""


def check(condition: bool, option: str, value: Any, expected: str) -> None:
    if not condition:
        raise OptionError(f"{option} is {value!r}, expected {expected}")


@dataclass(frozen=True)
class Option:
    """What is known of an option beside its name and default.

    ``low`` and ``high`` bound numbers; ``choices`` (or a function that finds them when asked) bound words.
    ``also`` are words understood though not offered here: ``check_together`` says what they need. ``expected`` replaces
    the range in errors where it says more. ``advanced``: most people leave it as it is.
    """

    tooltip: str
    low: float | None = None
    high: float | None = None
    step: float | None = None
    choices: Choices | Callable[[], Choices] | None = None
    multiline: bool = False
    advanced: bool = False
    expected: str = ""
    also: Choices = dataclasses.field(default_factory=dict)

    def table(self) -> Choices:
        return {} if self.choices is None else self.choices() if callable(self.choices) else self.choices

    def check(self, name: str, value: Any, default: Any) -> None:
        """Raises OptionError naming the option."""
        if self.choices is not None:
            fine = value in self.table() or value in self.also
            check(fine, name, value, f"one of {', '.join(self.table())}")
        elif isinstance(default, bool):
            check(isinstance(value, bool), name, value, "true or false")
        elif isinstance(default, int | float):
            whole = not isinstance(default, int) or isinstance(value, int)
            fine = isinstance(value, int | float) and not isinstance(value, bool) and whole and math.isfinite(value)
            inside = fine and (self.low is None or value >= self.low) and (self.high is None or value <= self.high)
            check(inside, name, value, self.expected or self._range(default))
        else:
            check(isinstance(value, str), name, value, "text")

    def _range(self, default: float) -> str:
        kind = "a whole number" if isinstance(default, int) else "a number"
        return kind if self.low is None else f"{kind} from {self.low:g} to {self.high:g}"


def option(default: Any, tooltip: str, **details: Any) -> Any:
    """A field of a settings class; ``details`` are those of ``Option``."""
    return dataclasses.field(default=default, metadata={"option": Option(tooltip, **details)})


@dataclass(frozen=True)
class Settings:
    """Base of the settings classes: each field declared by ``option`` is checked.

    ``preset`` says which preset filled them, for the recipe; it changes nothing. ``first_release`` names the widgets
    its node was first released with, where there have come more since: prompts of that time lack those, and are still
    good.
    """

    first_release: ClassVar[tuple[str, ...]] = ()
    preset: str = dataclasses.field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for name, (declared, default) in options_of(type(self)).items():
            declared.check(name, getattr(self, name), default)
        self.check_together()

    def check_together(self) -> None:
        """What no option can tell alone. Raises OptionError naming the options."""


def options_of(kind: type) -> dict[str, tuple[Option, Any]]:
    """name -> (declaration, default), in the order of the widgets."""
    return {
        field.name: (field.metadata["option"], field.default)
        for field in dataclasses.fields(kind)
        if "option" in field.metadata
    }
