"""Read hostile files, kill training runs, train every family; then run a workflow again and again on one server, and
watch its memory.

``python dev/soak.py --files 10000``: so many damaged adapter files, each of which must be read or refused.
``--kills 100``: so many times a training process is killed; the runs must end with the bits of undisturbed ones.
``--families``: every adapter family is trained, saved and loaded on every tiny model (``soak_families.py``).
``--minutes 20``: a table line for each round (workflow, seconds, the server's memory in MiB), every round with other
seeds, so that nothing comes from the cache. Ends with 1 when a workflow fails or when the server has grown by more than
``--allowed-growth`` MiB since it was warm.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from demo import CONCEPT, write_dataset
from live_server import ROOT, Server, live_server

DEMO = ROOT / "example_workflows" / "train_and_apply.json"
WARM_ROUNDS, TRAINED_STEPS = 3, 20


def memory_mib(server: Server) -> float:
    """Resident memory of the server's process."""
    return psutil.Process(server.process.pid).memory_info().rss / 2**20


def reseed(prompt: dict, seed: int) -> dict:
    """The same prompt with another seed wherever there is one, and a short training."""
    for node in prompt.values():
        if node["class_type"] == "LoomLoRATrainer":
            node["inputs"]["length"] = TRAINED_STEPS
        for name in ("seed", "noise_seed", "run_name"):
            value = node["inputs"].get(name)
            if isinstance(value, int):
                node["inputs"][name] = seed
            elif isinstance(value, str):
                node["inputs"][name] = f"soak-{seed}"
    return prompt


def read_hostile_files(count: int) -> None:
    """Raises what the reader should not have raised, and leaves the file that it was raised for."""
    sys.path.insert(0, str(ROOT / "tests" / "kernels"))
    from mutations import check, good_files, mutated

    targets = {"one": (6, 4), "two": (6, 4)}
    contents, outcomes = good_files((6, 4)), Counter()
    path = Path(tempfile.mkdtemp(prefix="loom-soak-")) / "hostile.safetensors"
    for seed in range(count):
        path.write_bytes(mutated(contents[seed % len(contents)], random.Random(f"soak {seed}")))
        try:
            outcomes[check(path, targets)] += 1
        except Exception:
            print(f"hostile file {seed} is kept at {path}", flush=True)
            raise
    shutil.rmtree(path.parent)
    print(f"{count} hostile files: {', '.join(f'{n} {outcome}' for outcome, n in outcomes.items())}", flush=True)


def kill_training(count: int) -> bool:
    """Whether every run ended as the one that nobody killed; prints a table."""
    script = ROOT / "tests" / "host" / "killing.py"
    told = subprocess.run([sys.executable, str(script), "--kills", str(count)], stdout=subprocess.PIPE, check=True)
    rows = json.loads(told.stdout)
    for name, row in rows.items():
        ended = "the same bits" if not row["differences"] else f"DIFFERENT: {', '.join(row['differences'])}"
        print(f"{name:32s} {row['kills']:4d} kills, {row['in a save']:3d} in a save: {ended}", flush=True)
    return not any(row["differences"] for row in rows.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workflows", nargs="*", type=Path, help=f"workflow files (default: {DEMO.name})")
    parser.add_argument("--minutes", type=float, default=float(os.environ.get("SOAK_MINUTES", 20)))
    parser.add_argument("--input", type=Path, help="a folder to serve as the server's input folder")
    parser.add_argument("--allowed-growth", type=float, default=200.0, metavar="MIB")
    parser.add_argument("--files", type=int, default=10_000, help="damaged adapter files to read first")
    parser.add_argument("--kills", type=int, default=100, help="how often training processes are killed")
    parser.add_argument("--families", action=argparse.BooleanOptionalAction, default=True, help="families × models")
    options = parser.parse_args()
    read_hostile_files(options.files)
    if not kill_training(options.kills):
        return 1
    if options.families and subprocess.run([sys.executable, ROOT / "dev" / "soak_families.py"]).returncode:
        return 1
    paths = options.workflows or [DEMO]
    arguments = ["--input-directory", str(options.input.resolve())] if options.input else []
    memory: list[float] = []
    with live_server(arguments=arguments) as server:
        write_dataset(server.base / "datasets" / CONCEPT)
        prompts = {path.stem: server.prompt_of(json.loads(path.read_text(encoding="utf-8"))) for path in paths}
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline or len(memory) <= WARM_ROUNDS:
            for name, prompt in prompts.items():
                began = time.monotonic()
                server.run(reseed(prompt, len(memory)))
                print(f"{len(memory):4d}  {name:32s} {time.monotonic() - began:8.1f} s", flush=True)
            memory.append(memory_mib(server))
            print(f"{len(memory) - 1:4d}  memory {memory[-1]:.0f} MiB", flush=True)
    growth = memory[-1] - memory[WARM_ROUNDS]
    print(f"grown by {growth:.0f} MiB in {len(memory) - 1 - WARM_ROUNDS} rounds after warm-up")
    return int(growth > options.allowed_growth)


if __name__ == "__main__":
    sys.exit(main())
