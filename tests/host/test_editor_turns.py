"""What takes the editor's server seconds holds up nobody else: rows and edits go on beside a check and an opening."""

import asyncio
import contextlib
import threading

import pytest
from aiohttp import ClientSession, ClientTimeout, web
from aiohttp.test_utils import TestServer

from editor_client import put
from lora_loom.host import editing, editor_routes, opened
from lora_loom.host.editing import Editing
from lora_loom.host.guard import TOKEN_HEADER, token

PATIENCE = 60


@pytest.fixture
def place(places, monkeypatch):
    for name in ("one", "two", "three"):
        put(places / f"comfy/datasets/{name}", {"a.png": "cat, cat", "b.png": "dog"})
    found = Editing()
    monkeypatch.setattr(editor_routes, "EDITING", found)
    return found


class Gate:
    """Holds up a function until it is opened."""

    def __init__(self, function):
        self.function, self.reached, self.let = function, threading.Event(), threading.Event()

    def __call__(self, *arguments, **options):
        self.reached.set()
        assert self.let.wait(PATIENCE)
        return self.function(*arguments, **options)


@contextlib.asynccontextmanager
async def page():
    """Asks the routes, in a server of their own: ``await ask("/datasets/…")``, and with what it sends."""
    app, routes = web.Application(), web.RouteTableDef()
    editor_routes.register(routes, "/lora_loom")
    app.add_routes(routes)
    async with TestServer(app) as server, ClientSession(timeout=ClientTimeout(PATIENCE)) as client:

        async def ask(path, body=None):
            url, headers = server.make_url(f"/lora_loom{path}"), {TOKEN_HEADER: token()}
            method = "GET" if body is None else "POST"
            async with client.request(method, url, json=body, headers=headers) as answer:
                assert answer.status == 200, (path, await answer.text())
                return await answer.json()

        yield ask


async def opened_by(ask, folder):
    told = await ask("/datasets", {"root": "datasets", "folder": folder})
    return f"/datasets/{told['id']}"


async def reached(gate):
    assert await asyncio.to_thread(gate.reached.wait, PATIENCE)


def test_rows_and_edits_go_on_beside_a_check(place, monkeypatch):
    gate = Gate(opened.lint)
    monkeypatch.setattr(opened, "lint", gate)

    async def go():
        async with page() as ask:
            one, two = await opened_by(ask, "one"), await opened_by(ask, "two")
            waiting = [
                asyncio.ensure_future(ask(f"{one}{path}"))
                for path in ("/findings", "/rows?filter=lint:T021", "/findings", "/ids?filter=lint:T021")
            ]
            await reached(gate)
            for dataset in (two, one):
                rows = (await ask(f"{dataset}/rows"))["rows"]
                assert [row["findings"] for row in rows] == [None, None], "not known yet"
                assert (await ask(f"{dataset}/preview", {"line": 'add "x"'}))["count"] == 2
                assert (await ask(f"{dataset}/operation", {"line": 'add "x"'}))["edits"] == 1
                assert (await ask(f"{dataset}/undo", {}))["edits"] == 0
            assert (await opened_by(ask, "three")) and len((await ask("/datasets"))["open"]) == 3
            assert not any(each.done() for each in waiting)
            gate.let.set()
            found, page_of, again, ids = await asyncio.gather(*waiting)
            assert [each["rule"] for each in found["findings"]].count("T021") == 1
            assert page_of["total"] == len(ids["ids"]) == 1
            latest = await ask(f"{one}/findings")
            assert latest["revision"] == (await ask(one))["revision"] >= found["revision"]
            assert (await ask(f"{one}/rows"))["rows"][0]["findings"] >= 1

    asyncio.run(go())


def test_an_edit_waits_for_what_it_is_to_cure(place, monkeypatch):
    """A line with lint: in its filter is carried out once the dataset has been checked."""
    gate = Gate(opened.lint)
    monkeypatch.setattr(opened, "lint", gate)

    async def go():
        async with page() as ask:
            one = await opened_by(ask, "one")
            line = {"line": "remove duplicates where lint:T021"}
            edit = asyncio.ensure_future(ask(f"{one}/operation", line))
            await reached(gate)
            assert len((await ask(f"{one}/rows"))["rows"]) == 2 and not edit.done()
            gate.let.set()
            assert len((await edit)["changed"]) == 1

    asyncio.run(go())


def test_rows_go_on_beside_an_opening(place, monkeypatch):
    gate = Gate(editing.read_to_edit)

    async def go():
        async with page() as ask:
            one = await opened_by(ask, "one")
            monkeypatch.setattr(editing, "read_to_edit", gate)
            slow = [asyncio.ensure_future(opened_by(ask, name)) for name in ("two", "three", "two")]
            await reached(gate)
            assert len((await ask(f"{one}/rows"))["rows"]) == 2
            assert (await ask(f"{one}/findings"))["findings"]
            assert [each["id"] for each in (await ask("/datasets"))["open"]] == [one.rsplit("/", 1)[1]]
            gate.let.set()
            two, three, same = await asyncio.gather(*slow)
            assert two == same != three

    asyncio.run(go())
