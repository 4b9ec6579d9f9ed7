"""The host's real page in a Chromium of this machine, led by Playwright; it reaches nothing but the server under test.

Without a Chromium these tests are skipped, which under continuous integration is a failure; none is ever downloaded.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import sync_playwright

from bootstrap import chromium

ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
]
START_MILLISECONDS = 120_000
SHOTS = Path(__file__).resolve().parents[2] / "results" / "browser"  # not in the repository


@pytest.fixture(scope="module")
def browser():
    """Ended with the module: while it runs, nothing else in this thread can run an event loop."""
    program = chromium()
    if program is None:
        pytest.skip("no Chromium found: install one (on Debian: apt-get install chromium) or name it in LOOM_CHROMIUM")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, headless=True, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def host_page(browser, server):
    """The host's page when it is ready; ``errors`` are those of its scripts."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    page = context.new_page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.route("**/*", only_this_machine)
    page.goto(server.url, wait_until="domcontentloaded")
    page.wait_for_function(
        "() => window.app?.vueAppReady && app.extensionManager && app.graph && app.canvas", timeout=START_MILLISECONDS
    )
    yield page
    context.close()


@pytest.fixture(scope="module", params=["canvas", "vue"])
def page(request, host_page):
    """The page with nodes drawn on the canvas, and with nodes drawn by Vue."""
    host_page.mode = request.param
    host_page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", request.param == "vue")
    return host_page


def only_this_machine(route):
    address = urlsplit(route.request.url)
    if address.hostname == "127.0.0.1" or address.scheme in ("data", "blob"):
        route.continue_()
    else:
        route.abort()


@pytest.fixture
def drop(page):
    """drop(paths, (x, y)): files and folders dragged from the user's file manager to a point of the page."""
    session = page.context.new_cdp_session(page)

    def drag_and_let_go(paths, point):
        x, y = point
        data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            session.send("Input.dispatchDragEvent", {"type": kind, "x": x, "y": y, "data": data})

    yield drag_and_let_go
    session.detach()


@pytest.fixture
def shot(host_page):
    """shot(name): what the page shows, kept as a picture to be looked at."""

    def keep(name):
        SHOTS.mkdir(parents=True, exist_ok=True)
        host_page.screenshot(path=SHOTS / f"{name}.png")

    return keep
