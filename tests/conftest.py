"""What all tests share: one thread each, a clean import path, and one live server for those that ask for it."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# `make test` runs as many processes as there are cores; read when torch is imported, also by servers that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")

# the checkout's own `nodes/` would hide the host's `nodes.py`
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
sys.path += [str(ROOT / folder) for folder in ("tests/host", "tests/kernels", "dev", "dev/demo_base", "dev/examples")]


def pytest_sessionfinish(session):
    """Under continuous integration a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")  # the processes that run the tests have none
    if os.environ.get("CI") and reporter and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(scope="session")
def server():
    """The real server with this checkout as a custom node and the demo base as a checkpoint."""
    from live_server import live_server

    with live_server(pack_name="any-Folder.v1") as running:
        yield running
