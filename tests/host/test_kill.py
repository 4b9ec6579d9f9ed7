"""kill −9 at random moments: the run that is taken up again, and again, ends with the bits of one that never stopped.

What is trained, how it is killed and what is compared is in ``killing.py``; ``make soak`` does the same for longer.
"""

import json
import subprocess
import sys
from pathlib import Path

KILLS = 26


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits():
    script = Path(__file__).with_name("killing.py")
    ended = subprocess.run(
        [sys.executable, str(script), "--kills", str(KILLS)], capture_output=True, text=True, timeout=1200
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    rows = json.loads(ended.stdout)
    assert {name: row["differences"] for name, row in rows.items()} == dict.fromkeys(rows, [])
    assert sum(row["kills"] for row in rows.values()) == KILLS and all(row["kills"] > 1 for row in rows.values())
    assert sum(row["in a save"] for row in rows.values()) >= 2, "kills fell between, into steps, and into saves"
    assert sum(row["before a step"] for row in rows.values()) >= 2, "and into the restoring"
    assert "torch.uint8" in rows["8-bit AdamW"]["dtypes"]
    assert "torch.bfloat16" in rows["EMA, bfloat16, accumulation"]["dtypes"]
