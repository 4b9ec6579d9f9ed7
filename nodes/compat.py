"""The one place that knows how hosts differ in what a node's schema may say."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

NEWER_OPTIONS = frozenset(
    {
        "accept_all_inputs",
        "advanced",
        "essentials_category",
        "extra_dict",
        "has_intermediate_output",
        "is_dev_only",
        "raw_link",
        "search_aliases",
    }
)


def build(part: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """``part(*args, **options)`` for a Schema, Input or Output, without the newer options this host lacks.

    Only the options listed above are ever dropped: a misspelt one stays a TypeError on every host.
    """
    known = inspect.signature(part).parameters
    return part(*args, **{name: value for name, value in options.items() if name in known or name not in NEWER_OPTIONS})
