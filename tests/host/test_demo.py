"""The demo keeps its promises: it is run as a user runs it, and judged by the numbers it writes."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_demo_teaches_the_concept_and_leaves_the_rest_alone():
    finished = subprocess.run(
        [sys.executable, str(ROOT / "dev" / "demo.py")], cwd=ROOT, capture_output=True, text=True, timeout=1500
    )
    assert finished.returncode == 0, finished.stderr[-2000:] + finished.stdout[-2000:]
    numbers = json.loads((ROOT / "results" / "demo" / "numbers.json").read_text())
    assert numbers["distance ratio (must be 0.5 or less)"] <= 0.5
    assert numbers["known things moved, share of that distance (must be 0.1 or less)"] <= 0.1
    assert numbers["copies (nearer than a quarter of that)"] == 0
    for name in ("before_after.png", "loss.png", "zorb.safetensors"):
        assert (ROOT / "results" / "demo" / name).stat().st_size > 1000
