"""The editor's routes on a dataset of 10,000 images, in the real server and over HTTP.

``python bench/editor_server.py`` prints a table and writes bench/results/editor_server.md and .json.

The images are links to a few JPEGs of 1024², each with a caption of 5 to 25 tags. Times are by the clock, of the whole
request: the first, with nothing at hand, and where it can be repeated the median of further ones; behind each, what it
took of the server's processors (measured in steps of 10 ms), whatever else the machine was doing. *First paint* is what
the page needs for its first screen once the headers are read: a page of rows, then 60 thumbnails, six at a time as
browsers ask for them. The list of tags for completion has 140,000 rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

import numpy as np  # noqa: E402
import psutil  # noqa: E402
from PIL import Image  # noqa: E402

from editor_client import Client, listed_by  # noqa: E402
from live_server import live_server  # noqa: E402

IMAGES, LISTED = 10_000, 140_000
SCREEN, AT_ONCE, WRITTEN = 60, 6, 1000
LETTERS = "abcdefghijklmnoprstuvwy"


def fill(folder: Path, count: int) -> None:
    """Pictures and captions whose tags are as unevenly frequent as tags are."""
    draws, noise = random.Random(0), np.random.default_rng(0)
    words = ["".join(draws.choices(LETTERS, k=draws.randint(3, 9))) for _ in range(3000)]
    folder.mkdir(parents=True)
    originals = []
    for index, size in enumerate([(1024, 1024), (832, 1216), (1216, 832), (1000, 700)]):
        originals.append(folder.parent / f".{folder.name}-{index}.jpg")
        coarse = Image.fromarray(noise.integers(0, 255, (40, 40, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(originals[-1], quality=90)
    for index in range(count):
        os.link(originals[index % len(originals)], folder / f"{index:05}.jpg")
        tags = [words[int(len(words) * draws.random() ** 3)] for _ in range(draws.randint(5, 25))]
        (folder / f"{index:05}.txt").write_text(", ".join(["ohwx", *tags]))


def tag_list(path: Path, count: int) -> None:
    draws = random.Random(1)
    words = ["".join(draws.choices(LETTERS, k=draws.randint(2, 7))) for _ in range(9000)]
    lines = []
    for index in range(count):
        name = "_".join(draws.choices(words, k=draws.randint(1, 3)))
        aliases = ",".join("_".join(draws.choices(words, k=2)) for _ in range(draws.random() < 0.2))
        lines.append(f'{name}_{index},{draws.choice([0, 1, 3, 4])},{int(10 ** draws.uniform(0, 6.5))},"{aliases}"')
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(lines))


@dataclass(frozen=True)
class Took:
    """Seconds by the clock, and of the server's processors."""

    clock: float
    server: float


class Stopwatch:
    def __init__(self, client: Client) -> None:
        self.server = psutil.Process(client.server.process.pid)

    def timed(self, call: Callable[[], Any]) -> tuple[Took, Any]:
        start, before = time.perf_counter(), self._used()
        found = call()
        return Took(time.perf_counter() - start, self._used() - before), found

    def _used(self) -> float:
        times = self.server.cpu_times()
        return times.user + times.system


def median(found: list[Took]) -> Took:
    """The server's is the mean: its clock ticks slowly."""
    return Took(statistics.median(one.clock for one in found), statistics.fmean(one.server for one in found))


def measured(client: Client, folder: str, repeats: int) -> dict[str, dict[str, Took]]:
    rows: dict[str, dict[str, Took]] = {}
    timed = Stopwatch(client).timed

    def note(name: str, first: Took, again: list[Took] | None = None) -> None:
        rows[name] = {"first": first} | ({"again": median(again)} if again else {})
        print(name, {key: f"{1000 * took.clock:.0f} ({1000 * took.server:.0f})" for key, took in rows[name].items()},
              flush=True)  # fmt: skip

    def repeated(name: str, call: Callable[[], Any]) -> None:
        note(name, timed(call)[0], [timed(call)[0] for _ in range(repeats)])

    seconds, opened = timed(lambda: client.open(folder))
    note("open: find the files, read headers and captions", seconds)

    def first_screen() -> None:
        found = opened.told("/rows", count=200)["rows"][:SCREEN]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for answer in pool.map(lambda row: opened.get(f"/images/{row['id']}/192"), found):
                assert answer.status == 200 and answer.content[:2] == b"\xff\xd8"

    def told(path: str, **query: Any) -> Callable[[], Any]:
        return lambda: opened.told(path, **query)

    for name, call in {
        "first paint: 200 rows and 60 thumbnails of 192": first_screen,
        "a page of 200 rows": told("/rows", start=5000),
        "with its crops": told("/rows", start=5000, crops=1),
        "all tags with their counts": told("/tags"),
        "a filter": told("/ids", filter="tag:a* OR caption:def"),
        "findings of the quick check": told("/findings"),
    }.items():
        repeated(name, call)

    def edit(path: str, **body: Any) -> Callable[[], Any]:
        return lambda: opened.done(f"/{path}", **body)

    repeated("preview of an edit of all images", edit("preview", line='add "masterpiece" at start'))
    line = 'add "best quality" at start'

    def done_and_undone(name: str, **body: Any) -> None:
        """Without a preview before it, and with one, as the page does it."""
        done, undone, previewed = [], [], []
        for _ in range(repeats):
            took, answer = timed(edit("operation", **body))
            assert len(answer["changed"]) == len(body.get("images", range(IMAGES)))
            done.append(took)
            undone.append(timed(edit("undo"))[0])
            edit("preview", **body)()
            previewed.append(timed(edit("operation", **body))[0])
            undone.append(timed(edit("undo"))[0])
        note(name, done[0], done[1:])
        note(f"{name}, behind its preview", previewed[0], previewed[1:])
        note(f"{name}: undo", undone[0], undone[1:])

    ids = opened.told("/ids")["ids"]
    done_and_undone("an edit of all images", line=line)
    done_and_undone(f"an edit of {IMAGES - 1:,} by selection", line=line, images=ids[1:])
    edit("redo")()
    note(f"dry run of writing {IMAGES - 1:,} captions", timed(edit("write", dry_run=True))[0])
    written = ids[1 : WRITTEN + 1]
    seconds, done = timed(edit("write", images=written))
    assert len(done["written"]) == WRITTEN
    note(f"write {WRITTEN:,} captions, with a backup", seconds)

    def completion(text: str) -> Callable[[], Any]:
        return lambda: client.get("/completions", q=text, dataset=opened.path.rsplit("/", 1)[1]).json

    note(f"completion: read the list of {LISTED:,}", timed(completion("zz"))[0])
    for text in ("a", "eed li", "qqqq"):
        repeated(f"completion of “{text}”", completion(text))
    return rows


def table(rows: dict[str, dict[str, Took]]) -> str:
    lines = ["| what | first, ms (server) | again, ms (server) |", "|---|---|---|"]
    for name, row in rows.items():
        cells = [f"{1000 * took.clock:.0f} ({1000 * took.server:.0f})" for took in row.values()]
        lines.append(f"| {' | '.join([name, *cells, *[''] * (2 - len(cells))])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as base:
        fill(Path(base) / "datasets" / "bench", IMAGES)
        tag_list(Path(base) / "user/lora_loom/tags/tags.csv", LISTED)
        with live_server(base=Path(base)) as server:
            client = Client(server)
            listed_by(client, "bench")
            rows = measured(client, "bench", options.repeats)
    told = {name: {key: asdict(took) for key, took in row.items()} for name, row in rows.items()}
    result = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "images": IMAGES, "rows": told}
    print(table(rows))
    if not options.no_write:
        path = HERE / "results" / "editor_server.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        head = ["# The editor's server", "", "`python bench/editor_server.py`; the file says what is measured.", ""]
        path.with_suffix(".md").write_text("\n".join([*head, table(rows), ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
