"""The real ComfyUI server in a process of its own, with this checkout in its ``custom_nodes``.

    with live_server() as server:
        prompt = server.prompt_of(json.loads(path.read_text()))
        outputs = server.run(prompt, on_event=lambda event: ...)

* headless, on loopback, on a free port, with everything it writes under one temporary base directory;
* ``custom_nodes`` holds this checkout (a link, or a copy where links are not allowed) and the demo's host extension,
  ``models/checkpoints`` the demo base;
* the server ends with the ``with`` block, whatever happens in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from ui_workflow import to_prompt

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "dev" / "demo_base"
BASE_FOLDERS = ("custom_nodes", "input", "models/checkpoints", "models/loras", "output", "temp", "user/default")
COPY_WITHOUT = shutil.ignore_patterns(".git", ".venv", ".dev", "__pycache__", "*.egg-info")
LAST_EVENTS = ("execution_success", "execution_error", "execution_interrupted")
BOOT_SECONDS = 300


class PromptError(RuntimeError):
    """A prompt was refused, failed or was interrupted; ``details`` is what the server said."""

    def __init__(self, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.details = details


class Server:
    """A running server: queue prompts, watch them, read what they left."""

    def __init__(self, url: str, base: Path, process: subprocess.Popen) -> None:
        self.url, self.base, self.process = url, base, process
        self._object_info: dict[str, Any] | None = None

    def get(self, path: str) -> Any:
        """The JSON answer to GET ``path``."""
        with urllib.request.urlopen(self.url + path, timeout=120) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to POST ``path`` (None when it is empty)."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body or {}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    def object_info(self) -> dict[str, Any]:
        if self._object_info is None:
            self._object_info = self.get("/object_info")
        return self._object_info

    def prompt_of(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """The API prompt of a workflow as the page saves it."""
        return to_prompt(workflow, self.object_info())

    def interrupt(self) -> None:
        """What the page's ✕ does."""
        self.post("/interrupt")

    def follow(self, prompt: dict[str, Any], workflow: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Queue ``prompt`` and yield its events {"type", "data"} as they come; the last one is of ``LAST_EVENTS``.

        A preview picture comes as {"type": "preview", "data": bytes}. ``workflow`` rides along as the page sends it.
        """
        loop = asyncio.new_event_loop()
        stack = contextlib.AsyncExitStack()
        client = uuid.uuid4().hex
        try:
            address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client}"
            connection = loop.run_until_complete(_connect(stack, address))
            extra = {"extra_pnginfo": {"workflow": workflow}} if workflow else {}
            number = self._queue({"prompt": prompt, "client_id": client, "extra_data": extra})
            while True:
                message = loop.run_until_complete(connection.receive())
                if message.type is aiohttp.WSMsgType.BINARY:
                    yield {"type": "preview", "data": message.data}
                    continue
                if message.type is not aiohttp.WSMsgType.TEXT:
                    raise PromptError(f"the server went away; its last words:\n{self.log_tail()}", {})
                event = json.loads(message.data)
                if event["data"].get("prompt_id", number) == number:
                    yield event
                    if event["type"] in LAST_EVENTS:
                        return
        finally:
            loop.run_until_complete(stack.aclose())
            loop.close()

    def run(
        self,
        prompt: dict[str, Any],
        on_event: Callable[[dict[str, Any]], None] | None = None,
        workflow: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Carry out ``prompt`` and return its history outputs {node id: {...}}; PromptError if it does not succeed."""
        last: dict[str, Any] = {}
        for last in self.follow(prompt, workflow):
            if on_event is not None:
                on_event(last)
        details = last["data"]
        if last["type"] != "execution_success":
            what = details.get("exception_message", "interrupted").strip()
            raise PromptError(f"{details.get('node_type')}: {what}", {"event": last["type"], **details})
        for _ in range(50):  # the history entry is written just after the last event
            history = self.get(f"/history/{details['prompt_id']}")
            if history:
                return history[details["prompt_id"]]["outputs"]
            time.sleep(0.1)
        raise PromptError("the prompt left no history", details)

    def files(self, outputs: dict[str, Any]) -> list[Path]:
        """The pictures named in a prompt's outputs, in the order of the nodes."""
        folders = {"output": self.base / "output", "temp": self.base / "temp", "input": self.base / "input"}
        return [
            folders[item["type"]] / item.get("subfolder", "") / item["filename"]
            for output in outputs.values()
            for item in output.get("images", ())
        ]

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join((self.base / "server.log").read_text(errors="replace").splitlines()[-lines:])

    def _queue(self, body: dict[str, Any]) -> str:
        try:
            return self.post("/prompt", body)["prompt_id"]
        except urllib.error.HTTPError as refusal:
            answer = json.loads(refusal.read())
            raise PromptError(f"the server refused the prompt: {json.dumps(answer)[:2000]}", answer) from None


async def _connect(stack: contextlib.AsyncExitStack, address: str) -> aiohttp.ClientWebSocketResponse:
    session = await stack.enter_async_context(aiohttp.ClientSession())
    return await stack.enter_async_context(session.ws_connect(address, max_msg_size=0))


def host_folder() -> Path:
    """``COMFYUI_DIR``, or the host that set-up recorded."""
    return Path(os.environ.get("COMFYUI_DIR") or (ROOT / ".dev" / "host-path").read_text().strip()).resolve()


def lay_out(base: Path, pack: Path, pack_name: str) -> None:
    """Fill a base directory: folders, the pack, the demo's extension and its model. Safe to repeat."""
    for folder in BASE_FOLDERS:
        (base / folder).mkdir(parents=True, exist_ok=True)
    _link(pack, base / "custom_nodes" / pack_name)
    _link(DEMO / "host_extension", base / "custom_nodes" / "loom_demo_base")
    checkpoint = DEMO / "loom-demo-base.safetensors"
    if checkpoint.exists():
        _link(checkpoint, base / "models" / "checkpoints" / checkpoint.name)
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.write_text(json.dumps({"Comfy.TutorialCompleted": True}))


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:  # Windows without the right to make links
        if source.is_dir():
            shutil.copytree(source, target, ignore=COPY_WITHOUT)
        else:
            shutil.copyfile(source, target)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def live_server(
    *,
    pack: Path = ROOT,
    pack_name: str = "lora-loom",
    base: Path | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """Run a server for the length of a ``with`` block.

    ``pack`` is linked into ``custom_nodes`` under ``pack_name``; ``base`` is the base directory (without it a
    temporary one, deleted afterwards); ``arguments`` are further arguments of ComfyUI's own.
    """
    with contextlib.ExitStack() as stack:
        if base is None:
            temporary = tempfile.TemporaryDirectory(prefix="loom-server-", ignore_cleanup_errors=True)
            base = Path(stack.enter_context(temporary))
        base = base.resolve()
        lay_out(base, pack, pack_name)
        port = _free_port()
        command = [sys.executable, str(ROOT / "dev" / "run_host.py"), "--listen", "127.0.0.1", "--port", str(port)]
        database = f"sqlite:///{(base / 'user' / 'loom.db').as_posix()}"
        command += ["--base-directory", str(base), "--database-url", database]
        command += ["--disable-auto-launch", *arguments]
        if page := os.environ.get("LOOM_FRONTEND"):  # as dev/frontend.py prints it
            command += ["--front-end-root", page]
        if os.environ.get("LOOM_TEST_DEVICE") != "cuda":
            command.append("--cpu")
        log = stack.enter_context((base / "server.log").open("w"))
        process = subprocess.Popen(
            command, cwd=host_folder(), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        stack.callback(_end, process)
        server = Server(f"http://127.0.0.1:{port}", base, process)
        _wait(server)
        yield server


def _wait(server: Server) -> None:
    deadline = time.monotonic() + BOOT_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"the server ended while starting; its last words:\n{server.log_tail()}")
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"the server did not answer within {BOOT_SECONDS} s; its last words:\n{server.log_tail()}")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
