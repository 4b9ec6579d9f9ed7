"""What the page may ask the server for; nothing from a request reaches a path."""

from __future__ import annotations

import sys
from typing import Any

from . import presets

PREFIX = "/lora_loom"


def register() -> None:
    """Add our routes to the host's server, where there is one in this process."""
    instance = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if instance is None:
        return
    from aiohttp import web

    from . import block_routes, editor_routes, live_routes

    live_routes.register(instance.routes, PREFIX)
    editor_routes.register(instance.routes, PREFIX)
    block_routes.register(instance.routes, PREFIX)

    @instance.routes.get(f"{PREFIX}/presets")
    async def all_presets(request: Any) -> Any:
        return web.json_response(presets.as_filled())
