"""Threads for what would hold up the host's event loop, with a bound on what waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from .guard import Refused

Result = TypeVar("Result")


class Workers:
    """A few threads; what exceeds ``most_waiting`` is refused with status 503, to be asked for again."""

    def __init__(self, name: str, threads: int, most_waiting: int) -> None:
        self._pool = ThreadPoolExecutor(threads, name)
        self._waiting, self._most_waiting = 0, most_waiting

    async def run(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """What ``call`` returns or raises. To be awaited in the event loop."""
        if self._waiting >= self._most_waiting:
            raise Refused(503, "too much is being asked for at once: try again in a second")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        finally:
            self._waiting -= 1
