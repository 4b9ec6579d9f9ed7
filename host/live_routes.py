"""What the page may ask of trainings: those of this process by their ids, those of before by the names of their runs.

* GET ``trainings``: all that run, those that have ended lately, and the trainers that wait in the host's queue
* GET ``trainings/{id}``: all that a panel is built from; ``?since=step`` leaves out what came before
* GET ``trainings/{id}/previews/{step}``: the pictures of a step, encoded anew
* POST ``trainings/{id}/control`` with {"do": "stop" | "save" | "preview" | "pause" | "continue"}
* GET ``runs``: run folders that have a log, the last to be written to first, with step, time and number of previews
* GET ``runs/{name}``, ``runs/{name}/previews/{step}``: the same as of trainings, from the log

Ids, steps and names are only looked up among those that are there; files are read and pictures decoded beside the event
loop, few at a time.
"""

from __future__ import annotations

import hashlib
import io
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from aiohttp import web
from PIL import Image

from .guard import Refused, guarded, own_page
from .live import PREVIEWS_KEPT, TRAININGS, WISHES, Training, WishError, waiting
from .runs import Histories, Run, past_runs
from .workers import Workers

LARGEST_SIDE = 4096  # pixels of a sheet of previews that is sent
QUALITY = 90
READERS, MOST_WAITING = 2, 64  # threads, and requests that wait for them
RUNS_SHOWN = 500
_STEP = re.compile(r"[0-9]{1,15}")


def register(routes: web.RouteTableDef, prefix: str) -> None:
    readers, histories = Workers("loom-runs", READERS, MOST_WAITING), Histories()

    @routes.get(f"{prefix}/trainings")
    @own_page
    async def all_trainings(request: web.Request) -> Any:
        return {"trainings": [training.summary() for training in TRAININGS.all()], "waiting": waiting()}

    @routes.get(f"{prefix}/trainings/{{id}}")
    @own_page
    async def one_training(request: web.Request) -> Any:
        return _training(request).everything(_since(request))

    @routes.get(f"{prefix}/trainings/{{id}}/previews/{{step}}")
    @own_page
    async def preview_of_training(request: web.Request) -> Any:
        file = _training(request).preview_of(_step(request.match_info["step"]))
        return await readers.run(_picture, file, request.headers.get("If-None-Match"))

    @routes.post(f"{prefix}/trainings/{{id}}/control")
    @guarded
    async def control(request: web.Request, body: dict[str, Any]) -> Any:
        training, do = _training(request), body.get("do")
        if do not in WISHES:
            raise Refused(400, f"do is {str(do)[:40]!r}, expected one of {', '.join(WISHES)}")
        try:
            return training.ask(do)
        except WishError as error:
            raise Refused(409, str(error)) from error

    @routes.get(f"{prefix}/runs")
    @own_page
    async def all_runs(request: web.Request) -> Any:
        return {"runs": await readers.run(_described)}

    @routes.get(f"{prefix}/runs/{{name}}")
    @own_page
    async def one_run(request: web.Request) -> Any:
        return await readers.run(_told, histories, request.match_info["name"], _since(request))

    @routes.get(f"{prefix}/runs/{{name}}/previews/{{step}}")
    @own_page
    async def preview_of_run(request: web.Request) -> Any:
        name, step = request.match_info["name"], _step(request.match_info["step"])
        return await readers.run(_picture_of, name, step, request.headers.get("If-None-Match"))


# -- what a request speaks of


def _training(request: web.Request) -> Training:
    training = TRAININGS.find(request.match_info["id"])
    if training is None:
        raise Refused(404, "there is no such training since the server was started; look among the runs")
    return training


def _run(name: str) -> Run:
    run = past_runs().get(name)
    if run is None:
        raise Refused(404, "there is no run of this name with a log")
    return run


def _step(text: str) -> int:
    if not _STEP.fullmatch(text):
        raise Refused(404, "a step is a whole number")
    return int(text)


def _since(request: web.Request) -> int | None:
    text = request.query.get("since")
    if text is not None and not _STEP.fullmatch(text):
        raise Refused(400, f"since is {text[:40]!r}, expected the number of a step")
    return None if text is None else int(text)


# -- beside the event loop


def _described() -> list[dict[str, Any]]:
    found = []
    for run in islice(past_runs().values(), RUNS_SHOWN):
        with suppress(OSError):  # gone meanwhile
            found.append(run.described())
    return found


def _told(histories: Histories, name: str, since: int | None) -> dict[str, Any]:
    run = _run(name)
    try:
        history = histories.of(run)
    except OSError as error:
        raise Refused(404, "the log of this run is gone, or cannot be read") from error
    previews = run.previews()[-PREVIEWS_KEPT:]
    return {"run": name, "step": history.step, "points": history.points(since), "previews": previews}


def _picture_of(name: str, step: int, known: str | None) -> web.Response:
    run = _run(name)
    return _picture(run.preview_file(step) if step in run.previews() else None, known)


def _picture(file: Path | None, known: str | None) -> web.Response:
    """The picture of a file that is ours, as JPEG; nothing but its mark where the page has it already."""
    try:
        if file is None:
            raise FileNotFoundError
        state = file.stat()
        mark = hashlib.sha256(f"{file} {state.st_mtime_ns} {state.st_size}".encode()).hexdigest()[:32]
        headers = {"ETag": f'"{mark}"', "Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}
        if known == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        with Image.open(file, formats=("PNG",)) as sheet:
            picture = sheet.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise Refused(404, "there are no pictures of this step, or no longer") from error
    picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    encoded = io.BytesIO()
    picture.save(encoded, "JPEG", quality=QUALITY)
    return web.Response(body=encoded.getvalue(), content_type="image/jpeg", headers=headers)
