"""The editor's window on a dataset of 10,000 images, in a real page.

``python bench/editor_page.py`` prints a table and appends it to bench/results/editor.md under a heading of its own.

By the page's clock, from the click on the button: when the window is there, when its first rows are, when all pictures
in view are painted; with the server opening the dataset (headers of 10,000 pictures read), and with it open already, as
after a reload. Then how long the page needs for a frame while the grid is scrolled through from top to bottom, and how
long until the pictures at the end are painted. The images are links to a few JPEGs of 1024².
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

from editor_server import IMAGES, fill  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from bootstrap import chromium  # noqa: E402
from editor_client import Client, listed_by  # noqa: E402
from live_server import live_server  # noqa: E402

HEADING = "## In the page"
READY = "() => window.app?.vueAppReady && app.extensionManager && app.graph && app.canvas"
WAIT = 120_000  # milliseconds
OPEN = """async () => {
    const loader = LiteGraph.createNode("LoomDatasetLoader");
    app.graph.add(loader);
    for (const [name, value] of Object.entries({ root: "datasets", folder: "bench" }))
        loader.widgets.find((widget) => widget.name === name).value = value;
    const times = {}, start = performance.now();
    loader.widgets.find(({ name }) => name === "Open editor").callback();
    const inView = (tile) => tile.getBoundingClientRect().top < innerHeight;
    const reached = {
        window: () => document.querySelector(".loom-editor[open]"),
        rows: () => document.querySelector(".loom-tile[data-image]:not([data-image=''])"),
        pictures: () => {
            const tiles = [...document.querySelectorAll(".loom-tile")].filter(inView);
            return tiles.length && tiles.every((tile) => tile.querySelector("img.there")?.complete);
        },
    };
    for (const [name, isThere] of Object.entries(reached)) {
        while (!isThere()) await new Promise(requestAnimationFrame);
        times[name] = performance.now() - start;
    }
    times.tiles = [...document.querySelectorAll(".loom-tile")].filter(inView).length;
    return times;
}"""
SCROLL = """async () => {
    const grid = document.querySelector(".loom-grid"), frames = [];
    const end = grid.scrollHeight - grid.clientHeight, steps = 200;
    let last = performance.now(), most = 0;
    for (let step = 1; step <= steps; step++) {
        grid.scrollTop = (end * step) / steps;
        const now = await new Promise(requestAnimationFrame);
        frames.push(now - last);
        last = now;
        most = Math.max(most, document.querySelectorAll(".loom-tile").length);
    }
    const start = performance.now();
    const shown = (tile) => tile.getBoundingClientRect().top < innerHeight && tile.getBoundingClientRect().bottom > 0;
    for (;;) {
        const tiles = [...document.querySelectorAll(".loom-tile")].filter(shown);
        if (tiles.length && tiles.every((tile) => tile.querySelector("img.there"))) break;
        await new Promise(requestAnimationFrame);
    }
    return { frames, settled: performance.now() - start, most };
}"""


def measured(page: Any, url: str) -> dict[str, Any]:
    def opened() -> dict[str, Any]:
        page.goto(url, wait_until="domcontentloaded")
        page.wait_for_function(READY, timeout=WAIT)
        page.wait_for_timeout(3000)  # the host's own start
        return page.evaluate(OPEN)

    return {"first": opened(), "again": opened(), "scroll": page.evaluate(SCROLL)}


def table(found: dict[str, Any]) -> str:
    first, again, scroll = found["first"], found["again"], found["scroll"]
    frames = sorted(scroll["frames"])
    lines = ["| from the click until | folder not open yet | open already |", "|---|---|---|"]
    for name, what in {"window": "the window is there", "rows": "rows are shown"}.items():
        lines.append(f"| {what} | {first[name]:.0f} ms | {again[name]:.0f} ms |")
    painted = f"all {first['tiles']} pictures in view are painted"
    lines.append(f"| {painted} | {first['pictures']:.0f} ms | {again['pictures']:.0f} ms |")
    usual, slow = statistics.median(frames), frames[int(0.95 * len(frames))]
    lines += [
        "",
        f"Scrolled from top to bottom in {len(frames)} frames: {usual:.0f} ms per frame (95 %: {slow:.0f} ms), at most "
        f"{scroll['most']} tiles in the page; the pictures at the end are there {scroll['settled']:.0f} ms later.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    options = parser.parse_args()
    busy = os.getloadavg()[0]  # of others: clocks tell less of the page where it is high
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as base:
        fill(Path(base) / "datasets" / "bench", options.images)
        with live_server(base=Path(base)) as server, sync_playwright() as playwright:
            listed_by(Client(server), "bench")
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=arguments)
            page = browser.new_context(viewport={"width": 1500, "height": 950}).new_page()
            found = measured(page, server.url)
            browser.close()
    text = table(found)
    print(text)
    if not options.no_write:
        path = HERE / "results" / "editor.md"
        before = path.read_text(encoding="utf-8").split(f"\n{HEADING}\n")[0].rstrip()
        head = f"{options.images:,} images, {platform.machine()}, {os.cpu_count()} cores, headless without a GPU; "
        note = f"{head}load average before {busy:.1f}; `python bench/editor_page.py`."
        path.write_text("\n".join([before, "", HEADING, "", note, "", text, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
