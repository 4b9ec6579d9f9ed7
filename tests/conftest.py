"""What all tests share: a clean import path, and one live server for those that ask for it."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# the checkout's own `nodes/` would hide the host's `nodes.py`
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
sys.path += [str(ROOT / folder) for folder in ("tests/host", "tests/kernels", "dev", "dev/demo_base")]


def pytest_sessionfinish(session):
    """Under continuous integration a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def server():
    """The real server with this checkout as a custom node and the demo base as a checkpoint."""
    from live_server import live_server

    with live_server(pack_name="any-Folder.v1") as running:
        yield running
