"""What the editor's page may ask and do; every address below ``/lora_loom``, images and datasets by their ids alone.

* GET ``session``: the token for POSTs
* GET ``datasets``: what is open, what can be opened; POST: open what a loader's widgets name, or what a node has had
* GET ``datasets/{dataset}``: its state; ``/rows``, ``/ids``, ``/tags``, ``/findings``, ``/images/{image}``;
  ``/program``: what it was opened with and what was added since, for the node whose program it is
* GET ``datasets/{dataset}/images/{image}/{size}``, ``/masks/{image}/{size}``: views of pictures, always encoded anew
* POST ``datasets/{dataset}/preview``, ``/operation``: an edit as a line of an edit program, also ``fix T002``
* POST ``datasets/{dataset}/focus``: the box a crop is laid around, as an edit like any other
* POST ``datasets/{dataset}/undo``, ``/redo``, ``/write`` (also as a dry run), ``/selection``, ``/close``
* GET ``completions``: tags with a text in them, of a dataset and of the user's own lists

All of it runs beside the event loop: datasets are opened in one thread and checked in another, so that what takes
seconds holds up neither rows nor edits, of the same dataset or of others.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from aiohttp import web

from ..training.dataset.focus_edits import rounded
from ..training.dataset.model import Box
from ..training.dataset.operations import Operation
from . import folders
from .completion import MOST, TagLists
from .editing import EDITING
from .editor_views import detail, finding, row, selected
from .guard import ANSWERED, LARGE, LARGEST, Refused, guarded, json_answer, own_page, token, without_places
from .opened import Opened, asks
from .thumbnails import CONTENT_TYPE, STEPS, Thumbnails, View
from .workers import Workers

USUAL_ROWS, MOST_ROWS = 200, 1000
LONGEST_QUERY = 4000  # characters of a filter; how long one may be the filters say themselves
LONGEST_PROGRAM = 48 << 20  # bytes of a request with the program of a node
THREADS, MOST_WAITING = 2, 64
SECONDS_BEFORE_LISTS = 5
VIEW_HEADERS = {"X-Content-Type-Options": "nosniff", "Content-Disposition": "inline"}
VIEW_KEPT = {"Cache-Control": "private, max-age=300"}  # by the browser; addresses change with the file

Answer = TypeVar("Answer")


def register(routes: web.RouteTableDef, prefix: str) -> None:
    workers, thumbnails = Workers("loom-editor", THREADS, MOST_WAITING), Thumbnails()
    openings, checks = Workers("loom-opening", 1, MOST_WAITING), Workers("loom-check", 1, MOST_WAITING)
    lists, list_workers = TagLists(), Workers("loom-completion", 1, MOST_WAITING)
    readers: set[asyncio.Future[Any]] = set()  # the event loop itself does not keep them
    one = f"{prefix}/datasets/{{dataset}}"

    async def locked(opened: Opened, call: Callable[[], Answer]) -> Answer:
        """What ``call`` makes of an open dataset, in a thread and while nothing else changes it.

        Who waits for it does so without a thread: writing thousands of files must not hold up other datasets.
        """

        def alone() -> Answer:
            with opened.lock:
                return call()

        async with opened.turn:
            return await workers.run(alone)

    async def checked(opened: Opened) -> None:
        """Have the dataset checked as it is now."""
        async with opened.checking:
            if not opened.is_checked:
                await checks.run(opened.check)

    def reading(path: str, told: Callable[[Opened, web.Request], Any]) -> None:
        """A GET about an open dataset, or those of its images that a filter selects."""

        async def handler(request: web.Request) -> Any:
            async with _used(request) as opened:
                if asks(_query(request, "filter")):
                    await checked(opened)
                return await locked(opened, lambda: _marked(told(opened, request), request))

        routes.get(one + path)(own_page(handler))

    def doing(path: str, done: Callable[[Opened, dict[str, Any]], Any], largest: int = LARGEST) -> None:
        """A POST to an open dataset."""

        async def handler(request: web.Request, body: dict[str, Any]) -> Any:
            async with _used(request) as opened:
                return await locked(opened, lambda: json_answer(done(opened, body)))

        routes.post(one + path)(guarded(handler, largest))

    def editing(path: str, done: Callable[[Opened, Operation], Any]) -> None:
        """A POST of a line, for those ``images`` that it names or for what the line says itself."""

        async def handler(request: web.Request, body: dict[str, Any]) -> Any:
            async with _used(request) as opened:
                operation = await workers.run(opened.operation, _text(body, "line"), body.get("images"))
                if asks(operation.selection.where):
                    await checked(opened)
                return await locked(opened, lambda: json_answer(done(opened, operation)))

        routes.post(one + path)(guarded(handler, LARGE))

    @routes.get(f"{prefix}/session")
    @own_page
    async def session(request: web.Request) -> Any:
        return {"token": token()}

    @routes.get(f"{prefix}/datasets")
    @own_page
    async def datasets(request: web.Request) -> Any:
        return await workers.run(_all)

    async def read_lists() -> None:
        """Takes a second: not while the first images are shown, but before somebody types."""
        await asyncio.sleep(SECONDS_BEFORE_LISTS)
        await list_workers.run(lists.complete, "", 0)

    @routes.post(f"{prefix}/datasets")
    @partial(guarded, largest=LONGEST_PROGRAM)
    async def opening(request: web.Request, body: dict[str, Any]) -> Any:
        told = await openings.run(_opened, body)
        reader = asyncio.ensure_future(read_lists())
        readers.add(reader)
        reader.add_done_callback(readers.discard)
        return told

    reading("", lambda opened, _: opened.told)
    reading("/program", lambda opened, _: opened.fetched())
    reading("/rows", _rows)
    reading("/ids", lambda opened, request: {"ids": _ids(opened, _chosen(opened, request))})
    reading("/tags", lambda opened, _: {"tags": opened.tags.as_json()})

    @routes.get(f"{one}/findings")
    @own_page
    async def findings(request: web.Request) -> Any:
        async with _used(request) as opened:
            await checked(opened)
            return await locked(opened, lambda: _marked(_findings(opened), request))

    reading("/images/{image}", lambda opened, request: _detail(opened, request.match_info["image"]))

    doing("/selection", lambda opened, body: selected(opened.dataset, opened.samples(body.get("images"))), LARGE)
    editing("/preview", Opened.preview)
    editing("/operation", Opened.do)
    doing("/focus", lambda opened, body: opened.focus(_text(body, "image"), _box(body.get("box"))))
    doing("/undo", lambda opened, _: opened.undo())
    doing("/redo", lambda opened, _: opened.redo())
    doing("/write", lambda opened, body: opened.write(body.get("images"), body.get("dry_run") is True), LARGE)
    doing("/close", lambda opened, _: EDITING.close(opened.id))

    @routes.get(f"{one}/{{kind:images|masks}}/{{image}}/{{size}}")
    @own_page
    async def picture(request: web.Request) -> Any:
        view = _view(_dataset(request), **request.match_info)
        known = request.headers.get("If-None-Match", "").strip('"')
        encoded = await thumbnails.view(view, known, lambda: request.transport is None)
        if encoded is None:
            return web.Response(status=304, headers={"ETag": f'"{known}"', **VIEW_HEADERS, **VIEW_KEPT})
        kept = {"ETag": f'"{encoded.tag}"', **VIEW_KEPT} if encoded.tag else {"Cache-Control": "no-store"}
        return web.Response(body=encoded.content, content_type=CONTENT_TYPE, headers={**VIEW_HEADERS, **kept})

    @routes.get(f"{prefix}/completions")
    @own_page
    async def completions(request: web.Request) -> Any:
        text, most = _query(request, "q"), _number(request, "most", 20, 1, MOST)
        answer: dict[str, Any] = {"dataset": []}
        if "dataset" in request.query:
            async with _using(EDITING.get(request.query["dataset"])) as opened:
                own = await locked(opened, lambda: opened.tags.find(text, most))
            answer["dataset"] = [[found.tag, found.count] for found in own]
        found, notes = await list_workers.run(lists.complete, text, most)
        return {**answer, "lists": [asdict(each) for each in found], "notes": [*map(without_places, notes)]}


# -- what a request speaks of


def _dataset(request: web.Request) -> Opened:
    return EDITING.get(request.match_info["dataset"])


@asynccontextmanager
async def _using(opened: Opened) -> AsyncIterator[Opened]:
    """Meanwhile the dataset makes no room for others."""
    if opened.users >= MOST_WAITING:
        raise Refused(503, "too much is being asked of this dataset at once: try again in a second")
    opened.users += 1
    try:
        yield opened
    finally:
        opened.users -= 1


def _used(request: web.Request) -> AbstractAsyncContextManager[Opened]:
    return _using(_dataset(request))


def _query(request: web.Request, name: str) -> str:
    text = request.query.get(name, "")
    if len(text) > LONGEST_QUERY or text.encode("utf-8", "ignore").decode() != text:
        raise Refused(400, f"{name} is no text of at most {LONGEST_QUERY} characters")
    return text


def _number(request: web.Request, name: str, default: int, low: int, high: int) -> int:
    text = request.query.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and low <= int(text) <= high):
        raise Refused(400, f"{name} is {text[:40]!r}, expected a whole number from {low} to {high}")
    return int(text)


def _text(body: dict[str, Any], name: str) -> str:
    text = body.get(name, "")
    if not isinstance(text, str):
        raise Refused(400, f"{name} has to be a text")
    return text


def _whole(body: dict[str, Any], name: str, default: int, low: int, high: int) -> int:
    number = body.get(name, default)
    if type(number) is not int or not low <= number <= high:
        raise Refused(400, f"{name} is {str(number)[:40]}, expected a whole number from {low} to {high}")
    return number


def _box(value: Any) -> Box | None:
    """Left, top, right, bottom as parts of the picture; None to have none."""
    if value is None:
        return None
    sides = value if isinstance(value, list) and len(value) == 4 else []
    if not sides or not all(type(side) in (int, float) and 0 <= side <= 1 for side in sides):
        raise Refused(400, "box has to be left, top, right and bottom from 0 to 1, or null")
    return rounded(sides)


# -- opening


def _all() -> dict[str, Any]:
    return {
        "open": [opened.told for opened in EDITING.all()],
        "roots": {root: list(folders.list_sources(root)) for root in folders.roots()},
        "nodes": [
            {"node": node, "name": without_places(dataset.source), "images": len(dataset.samples)}
            for node, dataset in EDITING.kept().items()
        ],
    }


def _opened(body: dict[str, Any]) -> dict[str, Any]:
    again = body.get("again") is True
    if "node" in body:
        implications = _text(body, "implications") or folders.NONE
        opened = EDITING.open_node(body["node"], _text(body, "program"), implications, again)
    else:
        resolution = _whole(body, "resolution", 512, 16, 4096)
        step = _whole(body, "bucket_step", 64, 8, 256)
        opened = EDITING.open_source(
            body.get("root"), body.get("folder"), resolution, step, _text(body, "trigger")[:1000], again
        )
    return opened.told


# -- what is told


def _marked(content: Any, request: web.Request) -> web.Response:
    """JSON with a mark of what it says, or nothing but the mark where the page has it already."""
    text = json.dumps(content)
    mark = f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"'
    headers = {**ANSWERED, "ETag": mark, "Cache-Control": "private, no-cache"}
    if request.headers.get("If-None-Match") == mark:
        return web.Response(status=304, headers=headers)
    return web.Response(text=text, content_type="application/json", headers=headers)


def _ids(opened: Opened, indices: Iterable[int]) -> list[str]:
    return [opened.ids[opened.names[index]] for index in indices]


def _chosen(opened: Opened, request: web.Request) -> Sequence[int]:
    """What the filter selects; where only what has changed is wanted, of those."""
    chosen = opened.select(_query(request, "filter"))
    if not _number(request, "changed", 0, 0, 1):
        return chosen
    changed = opened.changed
    return [index for index in chosen if opened.names[index] in changed]


def _rows(opened: Opened, request: web.Request) -> dict[str, Any]:
    start = _number(request, "start", 0, 0, 10**8)
    count = _number(request, "count", USUAL_ROWS, 1, MOST_ROWS)
    chosen = _chosen(opened, request)
    samples = [opened.dataset.samples[index] for index in chosen[start : start + count]]
    found, changed = opened.known_findings, opened.changed
    rows = [row(opened.dataset, sample, sample.id in changed, found) for sample in samples]
    if request.query.get("crops") == "1":
        rows = [{**each, "crops": opened.boxes.get(sample.id, [])} for each, sample in zip(rows, samples, strict=True)]
    return {"revision": opened.revision, "total": len(chosen), "start": start, "rows": rows}


def _findings(opened: Opened) -> dict[str, Any]:
    revision, found = opened.findings
    return {"revision": revision, "findings": [finding(each, opened.ids) for each in found]}


def _detail(opened: Opened, image: str) -> dict[str, Any]:
    sample, before = opened.sample(image), opened.read.samples[opened.index(image)]
    changed, found = sample.id in opened.changed, opened.known_findings
    return detail(opened.dataset, sample, before, changed, found, opened.boxes.get(sample.id, []))


def _view(opened: Opened, kind: str, image: str, size: str, dataset: str) -> View:
    if size not in STEPS:
        raise Refused(404, f"there is no such size; choose one of {', '.join(STEPS)}")
    sample = opened.read.samples[opened.index(image)]
    background = opened.read.of(sample).images.background
    if kind == "images":
        return View(sample.picture, STEPS[size], background)
    if sample.mask is None:
        raise Refused(404, "this image has no mask")
    return View(sample.mask, STEPS[size], mask=True)
