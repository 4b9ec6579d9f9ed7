"""The editor's routes of the live server as its page uses them: with the token, answers with their status."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
from PIL import Image

from live_server import Server

PREFIX = "/lora_loom"
TOKEN = "X-LoRA-Loom-Token"


@dataclass
class Answer:
    status: int
    headers: Any
    content: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.content)


class Client:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.token = self.get("/session").json["token"]

    def get(self, path: str, headers: dict[str, str] | None = None, **query: Any) -> Answer:
        return self.ask("GET", path + (f"?{urlencode(query)}" if query else ""), None, headers)

    def post(self, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
        given = {"Content-Type": "application/json", TOKEN: self.token, **(headers or {})}
        return self.ask("POST", path, json.dumps(body or {}).encode(), given)

    def ask(self, method: str, path: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        """``path`` goes out as it is, dots and all."""
        request = urllib.request.Request(self.server.url + PREFIX + path, data, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return Answer(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as refusal:
            return Answer(refusal.code, refusal.headers, refusal.read())

    def open(self, folder: str, **options: Any) -> Dataset:
        answer = self.post("/datasets", {"root": "datasets", "folder": folder, **options})
        assert answer.status == 200, answer.content
        return Dataset(self, answer.json["id"])


class Dataset:
    """One that is open in the editor."""

    def __init__(self, client: Client, identity: str) -> None:
        self.client, self.path = client, f"/datasets/{quote(identity, safe='')}"

    def get(self, path: str = "", headers: dict[str, str] | None = None, **query: Any) -> Answer:
        return self.client.get(self.path + path, headers, **query)

    def told(self, path: str = "", **query: Any) -> Any:
        answer = self.get(path, **query)
        assert answer.status == 200, (path, answer.content)
        return answer.json

    def post(self, path: str, **body: Any) -> Answer:
        return self.client.post(self.path + path, body)

    def done(self, path: str, **body: Any) -> Any:
        answer = self.post(path, **body)
        assert answer.status == 200, (path, answer.content)
        return answer.json

    def captions(self) -> dict[str, str]:
        return {row["name"]: row["caption"] for row in self.told("/rows", count=1000)["rows"]}

    def ids(self) -> dict[str, str]:
        return {row["name"]: row["id"] for row in self.told("/rows", count=1000)["rows"]}


def put(folder: Path, captions: dict[str, str], size: tuple[int, int] = (48, 40)) -> Path:
    """Pictures of noise with these captions; without a file where that is empty."""
    draws = np.random.default_rng(len(captions))
    for name, caption in captions.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(path)
        if caption:
            path.with_suffix(".txt").write_bytes(caption.encode())
    return folder


def listed_by(client: Client, folder: str) -> None:
    """Wait until the server lists a folder: it looks for new ones every two seconds."""
    for _ in range(60):
        if folder in client.get("/datasets").json["roots"]["datasets"]:
            return
        time.sleep(0.1)
    raise TimeoutError(folder)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its content, links with where they lead; the server's own log aside."""
    return {
        path.relative_to(folder).as_posix(): f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name != "server.log" and "loom.db" not in path.name
    }
