"""Tell the user how far it is: the host's progress bar, and a line of text on the node."""

from __future__ import annotations

import sys
import time
from typing import Any

import comfy.utils
from PIL import Image

from .previews import PREVIEW_PIXELS

SECONDS_BETWEEN_LINES = 0.5


class Progress:
    """A bar of ``total`` steps on the running node; ``node_id`` is where the text goes."""

    def __init__(self, total: int, node_id: str | None) -> None:
        self.bar = comfy.utils.ProgressBar(total, node_id)
        self.node_id, self.done = node_id, 0
        self._last_line = 0.0

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bar.update_absolute(self.done)

    def show(self, picture: Image.Image) -> None:
        """Show a picture on the node."""
        self.bar.update_absolute(self.done, preview=("PNG", picture, PREVIEW_PIXELS))

    def tell(self, text: str, now: bool = False) -> None:
        """Show ``text`` on the node, at most twice a second unless ``now``."""
        if self.node_id is None or not (now or time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES):
            return
        self._last_line = time.monotonic()
        server = host_server()
        if server is not None:
            server.send_progress_text(text, self.node_id, server.client_id)


def host_server() -> Any:
    """The host's server, where there is one in this process."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
