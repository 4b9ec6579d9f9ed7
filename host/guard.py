"""Who may change something through our routes: the page of this very server, with the token it was given.

- ``token()``: drawn when the server starts; the page gets it from GET ``/lora_loom/session``
- ``guarded(handler)``: a POST of a JSON object of bounded size, with the token in ``X-LoRA-Loom-Token``; the handler is
  called with the request and that object
- ``own_page(handler)``: a GET; like the POSTs it is refused to pages of other origins, also to those that differ in the
  port alone
- a server that listens on loopback alone has to be asked for as an IP address, as localhost or by the name it was told
  to listen on: a page whose own name has come to mean this machine is refused. Behind a proxy, which says so in
  X-Forwarded-…, any name passes; a page may claim that too, so this is a fence and no wall, like the host's own
- what a handler returns goes out as JSON, ``Refused`` and errors of a dataset as ``{"error": …}`` with their status

Statuses: 400 no JSON or nonsense in it, 403 another origin or token, 404 unknown id, 409 conflict, 413 too large, 415
another type, 503 too much at once. No answer tells where on the disk anything lies.
"""

from __future__ import annotations

import functools
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NoReturn

from aiohttp import web
from comfy.cli_args import args
from yarl import URL

from ..training.dataset.model import DatasetError
from . import folders

TOKEN_HEADER = "X-LoRA-Loom-Token"
LARGEST = 1 << 20  # bytes of a request's body
LARGE = 8 << 20  # where a request names images, or brings captions, of a whole dataset
ANSWERED = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
PRIVATE = {"Cross-Origin-Resource-Policy": "same-origin"}

Handler = Callable[[web.Request], Awaitable[Any]]
BodyHandler = Callable[[web.Request, dict[str, Any]], Awaitable[Any]]

_token = secrets.token_urlsafe(32)


class Refused(Exception):
    """An answer that is no success; ``more`` goes out beside the message."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.more = status, more


def token() -> str:
    """What a POST has to bring in ``TOKEN_HEADER``."""
    return _token


def guarded(handler: BodyHandler, largest: int = LARGEST) -> Handler:
    """A handler of POSTs that is reached by this server's page alone."""

    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.StreamResponse:
        async def answer() -> Any:
            _check_origin(request)
            given = request.headers.get(TOKEN_HEADER, "")
            if not hmac.compare_digest(given.encode("utf-8", "replace"), _token.encode()):
                raise Refused(403, f"{TOKEN_HEADER} is missing or not of this start of the server: reload the page")
            return await handler(request, await _body(request, largest))

        return await _answered(answer)

    return checked


def own_page(handler: Handler) -> Handler:
    """A handler of GETs that pages of other origins cannot use."""

    @functools.wraps(handler)
    async def checked(request: web.Request) -> web.StreamResponse:
        async def answer() -> Any:
            _check_origin(request)
            return await handler(request)

        return await _answered(answer)

    return checked


async def _answered(answer: Callable[[], Awaitable[Any]]) -> web.StreamResponse:
    """The answer as JSON where it is none yet; whatever goes wrong as JSON too."""
    try:
        found = await answer()
        response = found if isinstance(found, web.StreamResponse) else json_answer(found)
    except Refused as refused:
        response = json_answer({"error": without_places(str(refused)), **refused.more}, refused.status)
        if refused.status == 503:
            response.headers["Retry-After"] = "1"
    except DatasetError as error:
        response = json_answer({"error": without_places(str(error))}, 400)
    except web.HTTPException:
        raise
    except Exception:
        logging.exception("LoRA Loom: a request failed")
        response = json_answer({"error": "the server failed; its log says why"}, 500)
    response.headers.update(PRIVATE)
    return response


def json_answer(content: Any, status: int = 200) -> web.Response:
    return web.json_response(content, status=status, headers=ANSWERED)


def without_places(text: str, others: Mapping[str, Sequence[str]] | None = None) -> str:
    """The text with the registered folders, and others, called by the names of their roots; not that of a whole disk,
    whose name is in every path."""
    roots = {**folders.roots(), **(others or {})}
    named = [(place, root) for root, places in roots.items() for place in places if os.path.dirname(place) != place]
    for place, root in sorted(named, key=lambda pair: -len(pair[0])):
        if place in text:  # the name of the whole folder, not the beginning or the end of another's
            text = re.sub(rf"(?<![\w.-]){re.escape(place)}(?![\w.-])", root, text)
    return text


# -- what a request has to be like


def _check_origin(request: web.Request) -> None:
    """Browsers tell of each request which page it is for, and no page can change that.

    ``same-site`` is refused too: every program of this machine that has a page is on the same site.
    """
    hosts, origins = (request.headers.getall(name, []) for name in ("Host", "Origin"))
    sites = request.headers.getall("Sec-Fetch-Site", [])
    if len(hosts) != 1 or any(site not in ("same-origin", "none") for site in sites):
        raise Refused(403, "this is for the page of this server only")
    if not _is_ours(hosts[0], request):
        raise Refused(
            403,
            "this server is for its own machine, and that is no name of it: open the page of this server only, as "
            "localhost; start the server with --listen and the name; or let the proxy send X-Forwarded-For",
        )
    if any(not _is_same(origin, hosts[0]) for origin in origins):
        raise Refused(403, "this is for the page of this server only; behind a proxy, let it pass on the Host header")


def _is_same(origin: str, host: str) -> bool:
    """Whether an origin is the server that a Host header names; TLS may end at a proxy, so the scheme is the page's."""
    try:
        page = URL(origin)
        server = URL(f"{page.scheme}://{host}")
        return page.scheme in ("http", "https") and (page.host, page.port) == (server.host, server.port)
    except ValueError:
        return False


def _is_ours(host: str, request: web.Request) -> bool:
    """Whether a Host header names this server, where only this machine can reach it without a proxy."""
    listening = [name.strip() for name in args.listen.split(",")]
    own = request.get_extra_info("sockname") or ("",)
    if any(name.lower().startswith("x-forwarded-") for name in request.headers):
        return True
    if not all(_is_loopback(name if _is_address(name) or name == "localhost" else own[0]) for name in listening):
        return True
    try:
        name = URL(f"http://{host}").host or ""
    except ValueError:
        return False
    return _is_address(name) or name in ("localhost", *map(str.lower, listening))


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


def _is_loopback(name: str) -> bool:
    return name == "localhost" or (_is_address(name) and ipaddress.ip_address(name).is_loopback)


async def _body(request: web.Request, largest: int) -> dict[str, Any]:
    """The object that a request brings. Forms, which any page may send anywhere, cannot have this type."""
    if request.content_type != "application/json" or request.headers.get("Content-Encoding", "identity") != "identity":
        raise Refused(415, "send JSON: Content-Type application/json, not compressed")
    too_large = Refused(413, f"send at most {largest >> 20} MB at once")
    if (request.content_length or 0) > largest:
        raise too_large
    content = bytearray()
    async for part in request.content.iter_any():
        content += part
        if len(content) > largest:
            raise too_large
    try:
        body = json.loads(content.decode("utf-8"), parse_constant=_no_number)
        if b"\\u" in content:  # half of a surrogate pair is no text that could be written anywhere
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is no valid JSON") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object")
    return body


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
