"""Edits of 10,000 captions, without a server: each operation with its preview and undo, programs, and caption files.

``python bench/editor.py`` prints a table and writes bench/results/editor.md and editor.json.

Captions have 5 to 40 tags, 20 on average, as unevenly frequent as tags are. Figures are process CPU time, median of
``--repeats``; *do + undo* is what the goal of 0.3 s is about. The editor's routes are measured by editor_server.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]

from PIL import Image  # noqa: E402

from lora_loom.training.dataset.caption_backups import restore_captions  # noqa: E402
from lora_loom.training.dataset.caption_files import plan_writing, write_captions  # noqa: E402
from lora_loom.training.dataset.edit_program import parse_operation, parse_program, run_program  # noqa: E402
from lora_loom.training.dataset.journal import Journal  # noqa: E402
from lora_loom.training.dataset.model import Access, CaptionOptions, Concept, Dataset  # noqa: E402
from lora_loom.training.dataset.opening import open_dataset  # noqa: E402

IMAGES = 10_000
GOAL = 0.3
LETTERS = "abcdefghijklmnoprstuvwy"
LINES = (
    'add "new tag" at start',
    'add "new tag" where tag:"a*" AND tags:>9',
    'remove "a*", "?b*"',
    "remove duplicates",
    "remove implied",
    'rename "a*" to "renamed"',
    'move "a*" to start',
    "sort by name keeping first 1",
    "sort by frequency",
    'put trigger "zorb" first',
    "respell with underscores in lower case",
    'set weight 1.2 on "a*"',
    'replace text "a" with "o"',
    r'replace pattern "(\w+) (\w+)" with "\2 \1" in tags',
    r'replace pattern "\b(\w+) (\w+)\b" with "\2 \1" in captions',
    "tidy",
    "fix T001",
    "fix T020",
    'set caption "all the same"',
)


def fill(folder: Path) -> None:
    """Links to one picture, each with a caption."""
    draws = random.Random(0)
    words = ["".join(draws.choices(LETTERS, k=draws.randint(3, 9))) for _ in range(3000)]
    names = [" ".join(draws.choices(words, k=draws.choice([1, 2, 2, 3]))) for _ in range(5000)]
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder.parent / "one.png")
    for index in range(IMAGES):
        os.link(folder.parent / "one.png", folder / f"{index:05}.png")
        tags = [names[int(len(names) * draws.random() ** 3)] for _ in range(draws.randint(5, 35))]
        (folder / f"{index:05}.txt").write_text(", ".join(["ohwx", *tags]))


def seconds(call: Callable[[], Any]) -> float:
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def measured(dataset: Dataset, repeats: int) -> dict[str, dict[str, float]]:
    rows = {}
    for line in LINES:
        operation, times, count = parse_operation(line), [], 0
        for _ in range(repeats):
            journal = Journal(dataset)
            preview = seconds(lambda journal=journal, operation=operation: journal.preview(operation))
            journal = Journal(dataset)  # one that has not seen the preview
            do = seconds(lambda journal=journal, operation=operation: journal.do(operation))
            count = len(journal.unsaved)
            times.append((preview, do, seconds(journal.undo) if journal.can_undo else 0.0))
            assert journal.dataset == dataset
        preview, do, undo = (statistics.median(column) for column in zip(*times, strict=True))
        rows[line] = {"images changed": count, "preview": preview, "do": do, "undo": undo, "do + undo": do + undo}
    return rows


def others(dataset: Dataset, folder: Path) -> dict[str, float]:
    program = parse_program("\n".join(LINES))
    edited = parse_operation('add "new tag"').apply(dataset)[0]
    found: dict[str, Any] = {}

    def write() -> None:
        found["written"] = write_captions(found["plan"])

    figures = {
        f"a program of all these {len(LINES)} lines": seconds(lambda: run_program(dataset, program)),
        "plan the writing of all files": seconds(lambda: found.update(plan=plan_writing(dataset, edited))),
        "write them, with the backup": seconds(write),
        "bring them back": seconds(lambda: restore_captions(found["written"].backups[0])),
    }
    assert len(found["written"].ids) == IMAGES and open_dataset(folder, dataset.concepts[0], EVERYWHERE) == dataset
    return figures


EVERYWHERE = Access(lambda path: True, lambda path: "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="loom-bench-"))
    try:
        fill(base / "set")
        concept = Concept(name="set", captions=CaptionOptions(trigger="ohwx"))
        dataset = open_dataset(base / "set", concept, EVERYWHERE)
        rows = measured(dataset, options.repeats)
        rest = others(dataset, base / "set")
    finally:
        shutil.rmtree(base)
    head = ["edit", *next(iter(rows.values()))]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for line, row in rows.items():
        cells = [f"{row['images changed']:,}", *(f"{value:.2f} s" for value in [*row.values()][1:])]
        table.append(f"| `{line}` | {' | '.join(cells)} |")
    table += ["", "| else | CPU time |", "|---|---|", *(f"| {name} | {value:.2f} s |" for name, value in rest.items())]
    within = sum(row["do + undo"] < GOAL for row in rows.values())
    machine = f"{platform.machine()}, Python {platform.python_version()}, one thread"
    text = (
        f"# Edits of {IMAGES:,} captions\n\n"
        f"{machine}. Process CPU time, median of {options.repeats}; *do* without a preview before it: behind one, it\n"
        f"takes what *undo* takes. {within} of {len(rows)} edits are done and undone within {GOAL} s.\n\n"
    )
    text += "\n".join(table) + "\n"
    print(text)
    if not options.no_write:
        results = HERE / "results"
        (results / "editor.md").write_text(text, encoding="utf-8")
        (results / "editor.json").write_text(
            json.dumps({"edits": rows, "else": rest}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
