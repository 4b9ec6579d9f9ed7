"""The guard of the routes in a server of its own: who gets through, and what becomes of errors.

The host's own checks stand in front of ours in its server; here nothing does.
"""

import asyncio
import gzip
import json

import comfy.cli_args
import folder_paths
import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from lora_loom.host.guard import TOKEN_HEADER, Refused, guarded, own_page, token, without_places
from lora_loom.training.dataset.model import DatasetError


async def echo(request, body):
    return {"got": body}


PLACE = web.AppKey("place", str)


async def fail(request):
    kind = request.match_info["kind"]
    if kind == "refused":
        raise Refused(409, "taken", by=["x"])
    if kind == "busy":
        raise Refused(503, "later")
    if kind == "dataset":
        raise DatasetError(f"{request.app[PLACE]}/cats is empty: fill it")
    raise KeyError(request.app[PLACE])


def asked(*requests, place=""):
    """(status, headers, content) of each (method, path, options of aiohttp), one after the other."""

    async def run():
        app = web.Application()
        app[PLACE] = place
        app.router.add_post("/echo", guarded(echo, 2000))
        app.router.add_get("/fail/{kind}", own_page(fail))
        answers = []
        async with TestServer(app) as server, ClientSession() as client:
            for method, path, options in requests:
                options = dict(options)
                if options.get("headers", {}).get("Origin") == "own":
                    options["headers"] = {**options["headers"], "Origin": str(server.make_url("/")).rstrip("/")}
                async with client.request(method, server.make_url(path), **options) as answer:
                    text = await answer.text()
                    answers.append((answer.status, answer.headers, json.loads(text)))
        return answers

    return asyncio.run(run())


def post(headers=None, data=b"{}", kind="application/json", given=None):
    own = {TOKEN_HEADER: token()} if given is None else given
    return ("POST", "/echo", {"data": data, "headers": {"Content-Type": kind, **own, **(headers or {})}})


def test_this_servers_page_gets_through():
    body = {"a": [1, "ü", None], "\U0001f408": "\\ud83d"}
    requests = [
        post(data=json.dumps(body).encode()),
        post({"Origin": "own"}, json.dumps(body, ensure_ascii=False).encode(), "application/json; charset=utf-8"),
        post({"Origin": "own", "Sec-Fetch-Site": "same-origin"}, json.dumps(body).encode()),
    ]
    for status, headers, content in asked(*requests):
        assert (status, content) == (200, {"got": body})
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


FOREIGN = {
    "another site": {"Origin": "https://evil.example"},
    "another port": {"Origin": "http://127.0.0.1:1"},
    "no port": {"Origin": "http://127.0.0.1"},
    "a longer name": {"Origin": "http://127.0.0.1.evil.example"},
    "a name for it": {"Origin": "http://localhost"},
    "a file": {"Origin": "null"},
    "an extension": {"Origin": "chrome-extension://abc"},
    "nonsense": {"Origin": "http://[::1"},
    "empty": {"Origin": ""},
    "cross-site": {"Sec-Fetch-Site": "cross-site"},
    "same-site": {"Sec-Fetch-Site": "same-site"},
    "odd site": {"Sec-Fetch-Site": "own"},
    "own origin, other site": {"Origin": "own", "Sec-Fetch-Site": "cross-site"},
    "other host": {"Origin": "own", "Host": "evil.example"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_other_origins_are_refused(headers):
    for status, _, content in asked(post(headers), ("GET", "/fail/refused", {"headers": headers})):
        assert status == 403 and "page of this server only" in content["error"]


def test_behind_a_proxy_that_ends_tls():
    """The page is https, what arrives here is http: the Host header tells the rest."""
    passed = {"X-Forwarded-Proto": "https"}
    proxied = {"Origin": "https://loom.example", "Host": "loom.example", **passed}
    with_port = {"Origin": "https://loom.example:8443", "Host": "loom.example:8443", **passed}
    wrong = {"Origin": "https://loom.example:8443", "Host": "loom.example", **passed}
    assert [status for status, *_ in asked(post(proxied), post(with_port), post(wrong))] == [200, 200, 403]


def by_name(*hosts, path="/fail/refused"):
    """The statuses of a page that has come by these names, and of what it posts."""
    found = []
    for host in hosts:
        headers = {"Host": host, "Origin": f"http://{host}", "Sec-Fetch-Site": "same-origin"}
        answers = asked(("GET", path, {"headers": headers}), post(headers))
        if answers[0][0] == 403:
            assert all("no name of it" in content["error"] for *_, content in answers)
        found.append([status for status, *_ in answers])
    return found


def test_a_name_that_has_come_to_mean_this_machine_is_refused():
    """Whoever owns a name may let it mean 127.0.0.1 once his page is loaded; the browser then calls it same-origin."""
    assert comfy.cli_args.args.listen == "127.0.0.1"
    foreign = by_name("evil.example:8188", "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "x y")
    assert foreign == [[403, 403]] * 5
    assert by_name("127.0.0.1:8188", "localhost:8188", "[::1]:8188", "LOCALHOST", "192.168.0.5") == [[409, 200]] * 5


@pytest.mark.parametrize("listen, statuses", [
    ("127.0.0.1,::1", [403, 403]),
    ("localhost", [403, 403]),
    ("loom.lan", [409, 200]),
    ("127.0.0.1, loom.lan", [409, 200]),
    ("other.lan", [403, 403]),
    ("0.0.0.0,::", [409, 200]),
    ("127.0.0.1,192.168.0.5", [409, 200]),
])  # fmt: skip
def test_how_the_server_may_be_called_goes_by_where_it_listens(monkeypatch, listen, statuses):
    """The test's own server answers on 127.0.0.1 in all cases, as one does that listens on a name for it."""
    monkeypatch.setattr(comfy.cli_args.args, "listen", listen)
    assert by_name("loom.lan:8188") == [statuses]


@pytest.mark.parametrize("given", [{}, {TOKEN_HEADER: ""}, {TOKEN_HEADER: "x"}, {TOKEN_HEADER: token()[:-1]},
                                   {TOKEN_HEADER: token() + "x"}, {"Cookie": f"token={token()}"}])  # fmt: skip
def test_without_the_token_nothing_goes(given):
    [(status, _, content)] = asked(post(given=given))
    assert status == 403 and "reload the page" in content["error"] and token() not in json.dumps(content)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x",
                                  "application/jsonp", "", "text/plain; application/json"])  # fmt: skip
def test_other_types_are_refused(kind):
    [(status, _, content)] = asked(post(kind=kind))
    assert status == 415 and "application/json" in content["error"]


def test_compressed_bodies_are_refused():
    """Some kilobytes may become gigabytes."""
    [(status, *_)] = asked(post({"Content-Encoding": "gzip"}, gzip.compress(b"{}")))
    assert status == 415


async def in_parts(count):
    for _ in range(count):
        yield b" " * 500


def test_bodies_are_bounded():
    fits = post(data=b'{"a": 1}'.ljust(2000))
    large = post(data=b'{"a": 1}'.ljust(2001))
    answers = asked(fits, large, post(data=in_parts(5)), fits)
    assert [status for status, *_ in answers] == [200, 413, 413, 200]


BAD = {
    "nothing": b"",
    "cut": b'{"a": ',
    "list": b"[]",
    "text": b'"a"',
    "null": b"null",
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "no UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a pair": b'{"a": "\\ud800"}',
    "half a pair in a key": b'{"\\udfff": 1}',
    "deep": b'{"a":' + b"[" * 1500,
    "two": b"{}{}",
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_what_is_no_json_object_is_refused(data):
    [(status, _, content)] = asked(post(data=data))
    assert status == 400 and "JSON" in content["error"]


def test_errors_are_json_and_name_no_place(places):
    place = str(places / "comfy/datasets")
    kinds = ("refused", "busy", "dataset", "else")
    refused, busy, dataset, other = asked(*(("GET", f"/fail/{kind}", {}) for kind in kinds), place=place)
    assert refused[0] == 409 and refused[2] == {"error": "taken", "by": ["x"]}
    assert busy[0] == 503 and busy[1]["Retry-After"] == "1"
    assert dataset[0] == 400 and dataset[2] == {"error": "datasets/cats is empty: fill it"}
    assert other[0] == 500 and place not in json.dumps(other[2])


def test_places_are_called_by_their_roots(places, monkeypatch):
    data, inputs = places / "comfy/datasets", places / "comfy/input"
    assert without_places(f"{data}/cats/a.png, '{inputs}'") == "datasets/cats/a.png, 'input'"
    for other in (f"{data}-2/a.png", f"/mnt{data}/a.png", f"{data}.bak", f"{inputs}_old/x"):
        assert without_places(other) == other, "another folder"
    assert without_places("/out/x failed", {"output": ["/out"]}) == "output/x failed"
    monkeypatch.setattr(folder_paths, "input_directory", str(data / "in"))
    assert without_places(f"{data}/in/a.png") == "input/a.png", "the nearest"
    monkeypatch.setattr(folder_paths, "input_directory", "/")
    assert without_places("1/2 and/or 3") == "1/2 and/or 3"
