"""What tries to get elsewhere through the editor's routes in the real server, or too much at once: nothing of it works.

After all of it the server answers, and no file anywhere below its base directory is another one than before.
"""

import asyncio
import io
import json
from urllib.parse import quote

import aiohttp
import numpy as np
import psutil
import pytest
from PIL import Image

from editor_client import PREFIX, TOKEN, Client, listed_by, put, tree

ELSEWHERE = (
    "../secret",
    "../../secret.txt",
    "..\\..\\secret",
    "/etc/passwd",
    "//host/share",
    "\\\\host\\share",
    "C:\\secret",
    "C:secret",
    "~/secret",
    "file:///etc/passwd",
    "%2e%2e/secret",
    "..%2f..%2fsecret",
    "%252e%252e%252fsecret",
    "safe/../../secret",
    "safe/link",
    "link",
    "safe\0/../secret",
    "\u202e../secret",
    "．．/secret",
    "x/" * 3000,
    ".",
    "..",
    "",
)
POSTS = ("preview", "operation", "undo", "redo", "write", "selection", "focus", "close")


@pytest.fixture(scope="module")
def client(server):
    return Client(server)


@pytest.fixture(scope="module")
def opened(client):
    base = client.server.base
    folder = put(base / "datasets/safe", {f"{index}.png": f"tag {index}" for index in range(5)})
    put(base / "secret", {"s.png": "secret words"})
    (base / "secret.txt").write_text("secret words")
    (folder / "link").symlink_to(base / "secret")
    (base / "datasets/link").symlink_to(base / "secret")
    (base / "datasets/secret.csv").write_text("secret words")
    draws = np.random.default_rng(0)
    for index in range(200):  # some decoding for the thumbnails
        Image.fromarray(draws.integers(0, 255, (30, 40, 3), dtype=np.uint8)).resize((800, 600)).save(
            folder / f"many-{index}.jpg", quality=80
        )
        (folder / f"many-{index}.txt").write_text("many")
    listed_by(client, "safe")
    return client.open("safe")


@pytest.fixture(autouse=True, scope="module")
def nothing_is_written(client, opened):
    before = tree(client.server.base)
    yield
    assert tree(client.server.base) == before
    assert client.get("/session").status == 200 and client.server.process.poll() is None


def refused(answer, statuses=(400, 404)):
    """A JSON error that tells nothing."""
    assert answer.status in statuses, (answer.status, answer.content)
    assert b"secret words" not in answer.content and b"root:" not in answer.content
    if answer.headers.get("Content-Type", "").startswith("application/json"):
        assert answer.json["error"]


@pytest.mark.parametrize("text", ELSEWHERE, ids=lambda text: ascii(text[:20]))
def test_no_parameter_leads_elsewhere(client, opened, text):
    for root, folder in (("datasets", text), ("input", text), (text, "safe"), (text, text)):
        refused(client.post("/datasets", {"root": root, "folder": folder}), (404,))
    refused(client.post("/datasets", {"node": text}), (404,))
    for path, body in (
        *((path, {"line": 'add "x"', "images": [text]}) for path in ("selection", "write", "preview", "operation")),
        ("focus", {"image": text, "box": None}),
    ):
        refused(opened.post(f"/{path}", **body), (404,))
    for query in ({"start": text or "x"}, {"count": text or "x"}):
        refused(opened.get("/rows", **query), (400,))
    refused(client.get("/completions", q="a", dataset=text[:2000]), (404,))
    found = client.get("/completions", q=text[:2000]).json
    assert found["lists"] == [] and "secret" not in json.dumps(found["notes"])
    assert b"secret words" not in opened.get("/ids", filter=text[:2000]).content


PARTS = [text[:100] for text in ELSEWHERE if text.strip(".")]


@pytest.mark.parametrize("text", PARTS, ids=lambda text: ascii(text[:20]))
def test_no_address_leads_elsewhere(client, opened, text):
    """As a whole part of the address, and as many parts as it has slashes."""
    image, part = opened.ids()["0.png"], quote(text, safe="")
    plain = quote(text, safe="/:~")
    for path in (f"/images/{part}", f"/images/{part}/96", f"/images/{image}/{part}", f"/masks/{part}/96"):
        refused(opened.get(path), (400, 404))
        refused(client.get(f"/datasets/{part}{path}"), (400, 404))
    for path in (f"/images/{plain}", f"/images/{image}/{plain}", f"/{plain}", f"/images/{image}/96/{plain}"):
        refused(opened.get(path), (400, 403, 404, 405))


def test_numbers_are_numbers(opened):
    for text in ("-1", "1e3", "٣", "1 ", "0x1", "1" * 20, "NaN"):
        refused(opened.get("/rows", start=text), (400,))
    for text in ("0", "1001"):
        refused(opened.get("/rows", count=text), (400,))


ODD = [None, 5, 1.5, True, [], {}, ["safe"], {"folder": "safe"}]


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_what_is_no_text_names_nothing(client, opened, value):
    for body in ({"root": value, "folder": "safe"}, {"root": "datasets", "folder": value}, {"node": value}):
        refused(client.post("/datasets", body))
    for name in ("resolution", "bucket_step", "trigger"):
        refused(client.post("/datasets", {"root": "datasets", "folder": "safe", name: value}))
    refused(opened.post("/operation", line=value))
    refused(opened.post("/focus", image=value, box=None))
    if value not in (None, []):
        refused(opened.post("/selection", images=value))


def test_unknown_ids_are_404(client, opened):
    image = opened.ids()["0.png"]
    for identity in ("x", image, "0" * 16, "A" * 16):
        for path in ("", "/rows", "/tags", "/ids", "/findings", f"/images/{image}", f"/images/{image}/96"):
            refused(client.get(f"/datasets/{identity}{path}"), (404,))
        for path in POSTS:
            refused(client.post(f"/datasets/{identity}/{path}", {"line": 'add "x"'}), (404,))
    for identity in ("x", "0" * 20, image[:-1], image.upper() + "0", image + "0"):
        refused(opened.get(f"/images/{identity}"), (404,))
        refused(opened.get(f"/images/{identity}/96"), (404,))
    for size in ("97", "0", "-1", "2048", "FULL", "96.0", "96.jpg"):
        refused(opened.get(f"/images/{image}/{size}"), (404,))
    refused(opened.get(f"/masks/{image}/96"), (404,))


def test_every_post_wants_the_token_the_type_and_this_page(client, opened):
    paths = ["/datasets", *(f"{opened.path}/{path}" for path in POSTS)]
    good = {"Content-Type": "application/json", TOKEN: client.token}
    for path in paths:

        def asked(data=b"{}", path=path, **headers):
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            return client.ask("POST", path, data, {**good, **given})

        assert client.ask("POST", path, b"{}", {"Content-Type": "application/json"}).status == 403
        for headers in ({TOKEN: "x"}, {"Origin": "https://evil.example"}, {"Origin": "null"},
                        {"Origin": "http://127.0.0.1:1"}, {"Sec-Fetch-Site": "same-site"},
                        {"Sec-Fetch-Site": "cross-site"}):  # fmt: skip
            assert asked(**headers).status == 403, (path, headers)
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            refused(asked(Content_Type=kind), (415,))
        for data in (b"", b"[]", b"{", b'{"line": NaN}', b'{"line": "\\ud800"}'):
            refused(asked(data), (400,))
        large = ("preview", "operation", "write", "selection")
        limit = 48 if path == "/datasets" else 8 if path.rsplit("/", 1)[1] in large else 1
        refused(asked(b'{"line": "%s"}' % (b"x" * (limit << 20))), (413,))
        assert path == "/datasets" or client.ask("GET", path).status in (404, 405), "POST only"
    for path in ("/session", "/datasets", opened.path, f"{opened.path}/rows"):
        assert client.get(path, {"Sec-Fetch-Site": "same-site"}).status == 403
        assert client.get(path, {"Origin": "https://evil.example"}).status == 403


def test_no_answer_names_a_place_on_the_disk(client, opened):
    place = str(client.server.base)
    image = opened.ids()["0.png"]
    paths = [
        "/datasets",
        opened.path,
        *(f"{opened.path}/{path}" for path in ("rows", "tags", "findings", "ids", "program")),
    ]
    for path in (*paths, f"{opened.path}/images/{image}", "/completions?q=a"):
        answer = client.get(path)
        assert answer.status == 200 and place not in answer.content.decode(), path


def test_a_view_is_always_a_new_jpeg(opened):
    image = opened.ids()["many-0.jpg"]
    for size, side in (("96", 96), ("192", 192), ("384", 384), ("full", 800)):
        answer = opened.get(f"/images/{image}/{size}")
        assert answer.status == 200 and answer.content[:3] == b"\xff\xd8\xff"
        assert answer.headers["Content-Type"] == "image/jpeg" and answer.headers["X-Content-Type-Options"] == "nosniff"
        again = opened.get(f"/images/{image}/{size}", {"If-None-Match": answer.headers["ETag"]})
        assert again.status == 304 and not again.content
        assert max(Image.open(io.BytesIO(answer.content)).size) == side


def test_a_thousand_thumbnails_at_once_are_served_or_refused(client, opened):
    ids = [identity for name, identity in opened.ids().items() if name.startswith("many")]
    resident = memory(client.server.process.pid)

    async def all_at_once():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one(index):
                size = ("96", "192", "384", "full", "full")[index % 5]
                path = f"{PREFIX}{opened.path}/images/{ids[index % len(ids)]}/{size}"
                async with session.get(client.server.url + path) as answer:
                    return answer.status, answer.headers, await answer.read()

            async def other():
                """The server is there for others meanwhile."""
                async with session.get(client.server.url + f"{PREFIX}/session") as answer:
                    return answer.status

            return await asyncio.gather(other(), *(one(index) for index in range(1000)), other())

    first, *answers, last = asyncio.run(all_at_once())
    assert (first, last) == (200, 200)
    statuses = [status for status, *_ in answers]
    assert set(statuses) <= {200, 503} and statuses.count(200) >= 256
    for status, headers, content in answers:
        if status == 200:
            assert content[:3] == b"\xff\xd8\xff"
        else:
            assert headers["Retry-After"] == "1" and json.loads(content)["error"]
    assert memory(client.server.process.pid) - resident < 400 << 20
    assert opened.get(f"/images/{ids[0]}/96").status == 200


def memory(process):
    """Bytes that a process has in memory."""
    return psutil.Process(process).memory_info().rss
