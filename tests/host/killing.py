"""Training processes that are killed in the middle, again and again, and must end with the bits of one that was not.

``python killing.py --kills 25 --seed 0``: every run of ``RUNS`` is trained once undisturbed, then under fire: SIGKILL
at a random moment, within a save or while it restores, taken up again, killed again, until as many kills are spent;
then it may finish. Prints one JSON object with a row per run. The heavy imports are made once; each training process
is a fork that ends or is killed. After every kill the run folder must hold a whole state that is at most one step
behind what the log tells.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != ROOT]
sys.path += [str(ROOT / "tests/host"), str(ROOT / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import folder_paths  # noqa: E402
import torch  # noqa: E402

from graph import images  # noqa: E402
from lora_loom.host.record import Request  # noqa: E402
from lora_loom.host.session import train  # noqa: E402
from lora_loom.training.dataset.model import CaptionOptions  # noqa: E402
from lora_loom.training.optimizers.make import check_saves  # noqa: E402
from lora_loom.training.runstate import find_state  # noqa: E402
from lora_loom.training.settings import (  # noqa: E402
    AdapterSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Plan,
    RunSettings,
)
from small_runs import holding_out_the_last, parts, same  # noqa: E402
from training import opened  # noqa: E402

SAVING = RunSettings(save_every=1, keep_last=2, validate_every=2, keep_best=True)
AVERAGED = dataclasses.replace(SAVING, ema_decay=0.9)
BASE = Plan(length=10, rank=2, batch_size=2, seed=3, learning_rate=1e-2, run=SAVING)  # each step is saved
RUNS = {
    "AdamW, accumulation, dropout": dataclasses.replace(
        BASE,
        adapter=AdapterSettings(network_dropout=0.1),
        optimizer=OptimizerSettings(schedule="cosine", warmup_steps=2, gradient_accumulation=3),
        objective=ObjectiveSettings(noise_offset=0.05, input_perturbation=0.1),
    ),
    "8-bit AdamW": dataclasses.replace(BASE, rank=32, optimizer=OptimizerSettings("AdamW8bit")),
    "schedule-free AdamW": dataclasses.replace(BASE, optimizer=OptimizerSettings("AdamWScheduleFree")),
    "EMA": dataclasses.replace(BASE, run=AVERAGED),
    "EMA, bfloat16, accumulation": dataclasses.replace(
        BASE,
        rank=4,
        optimizer=OptimizerSettings(gradient_accumulation=4),
        run=dataclasses.replace(AVERAGED, parameter_dtype="bf16"),
    ),
}


# Saving and restoring are too short to be hit by chance: what is then done to which files, and how many such things
IN_A_SAVE = (".part", 12)
RESTORING = ("state-", 6)


class Campaign:
    """Runs on one tiny model and a dataset whose captions vary."""

    def __init__(self, seed: int) -> None:
        self.draws = random.Random(seed)
        self.folder = Path(tempfile.mkdtemp(prefix="loom-killing-"))
        pictures = images(self.folder / "zorb", count=5)
        for index in range(5):
            (pictures / f"{index}.txt").write_text(f"zorb, number {index}, red, on white")
        dataset = opened(pictures, 64, 16)
        captions = CaptionOptions(shuffle=True, dropout=0.2, tag_dropout=0.2, keep_tokens=1)
        held_out = dataclasses.replace(dataset.concepts[0], kind="validation")
        trained = dataclasses.replace(dataset.concepts[0], captions=captions)
        self.dataset = dataclasses.replace(holding_out_the_last(dataset), concepts=(trained, held_out))
        self.parts = parts()
        for plan in RUNS.values():  # what is imported on first use is imported once for all forks
            check_saves(plan.optimizer, torch.device("cpu"))

    def close(self) -> None:
        shutil.rmtree(self.folder)

    def start(self, name: str, plan: Plan, at: tuple[str, int] | None = None) -> int:
        """A training process; one that kills itself where ``at`` says."""
        shot = self.draws.randint(2, at[1]) if at else 0
        child = os.fork()
        if child:
            return child
        if at:
            sys.addaudithook(self_shot(folder_of(name), at[0], shot))
        code = 1
        try:
            with torch.inference_mode():
                train(Request(*self.parts, self.dataset, plan, name))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def finish(self, name: str, plan: Plan) -> Path:
        """Train without any disturbance; the run folder."""
        _, status = os.waitpid(self.start(name, plan), 0)
        assert status == 0, f"{name}: the training process ended with {status}"
        return folder_of(name)

    def under_fire(self, name: str, plan: Plan, kills: int, step_seconds: float) -> dict[str, int]:
        """Kill ``name`` at random moments, wherever they fall, and in its saves, then let it finish."""
        told = {"kills": 0, "in a save": 0, "before a step": 0, "restarts": 0}
        while told["kills"] < kills:
            before = last_logged(folder_of(name))
            told["restarts"] += 1
            match told["kills"] % 4:
                case 1:
                    child = self.start(name, plan, IN_A_SAVE)
                case 3:
                    child = self.start(name, plan, RESTORING)
                case _:
                    child = self.start(name, plan)
                    if wait_for_step(child, folder_of(name), before):  # then the save that follows, or anywhere
                        time.sleep(self.draws.uniform(0, self.draws.choice((0.5, 2.5)) * step_seconds))
                        os.kill(child, signal.SIGKILL)
            if not killed(child, name):  # it was quicker than the shot: begin anew, so that kills fall everywhere
                shutil.rmtree(folder_of(name))
                continue
            told["kills"] += 1
            told["before a step"] += last_logged(folder_of(name)) <= before
            told["in a save"] += examine(folder_of(name))
        self.finish(name, plan)
        return told


def self_shot(folder: Path, word: str, shot: int) -> Callable[[str, tuple], None]:
    """An audit hook: SIGKILL before the ``shot``-th thing that is done to a path of ``folder`` with ``word`` in it."""
    left = [shot]

    def hook(event: str, arguments: tuple) -> None:
        if event not in ("open", "os.mkdir", "os.rename", "os.listdir", "os.scandir", "os.remove", "os.rmdir"):
            return
        path = str(arguments[0])
        if path.startswith(str(folder)) and word in path:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    return hook


def killed(child: int, name: str) -> bool:
    """Whether the process was killed; False when it had come to its end. Raises AssertionError when it failed."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or status == 0, f"{name}: the training process ended with {status}"
    return os.WIFSIGNALED(status)


def wait_for_step(child: int, folder: Path, before: int) -> bool:
    """Until the process has made a step of its own; False when it ended instead. Leaves it to be waited for."""
    while last_logged(folder) <= before:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(0.003)
    return True


def folder_of(name: str) -> Path:
    return Path(folder_paths.get_output_directory()) / "lora_loom" / name


def last_logged(folder: Path) -> int:
    return max((entry["step"] for entry in log_of(folder)), default=0)


def log_of(folder: Path) -> list[dict]:
    """Whole lines that tell of a step."""
    path = folder / "log.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [entry for line in lines if "loss" in (entry := json.loads(line))]


def examine(folder: Path) -> bool:
    """Raises AssertionError unless a whole state is there; whether the kill fell into a save."""
    leftovers = [path for path in folder.iterdir() if path.name.endswith(".part")]
    states = [path for path in folder.iterdir() if path.name.startswith("state-")]
    logged, found = last_logged(folder), find_state(folder)
    kept = found.step if found else 0
    assert logged - 1 <= kept <= logged, f"step {logged} is logged, the state is that of {kept}"
    assert found is None or not found.damaged
    written = (folder / f"{folder.name}-step{logged:06d}.safetensors").exists() and kept < logged
    return bool(leftovers) or len(states) > 1 or written


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common; nothing, when one was as good as the other."""
    from safetensors.torch import load_file

    first, second = find_state(one), find_state(other)
    found = [] if first.facts == second.facts else ["the facts of the state"]
    pairs = {"state": (first.tensors, second.tensors)}
    for path in sorted(one.glob("*.safetensors")):
        mark = path.stem.removeprefix(one.name)
        pairs[f"LoRA{mark}"] = load_file(path), load_file(other / f"{other.name}{mark}.safetensors")
    for what, (left, right) in pairs.items():
        if left.keys() != right.keys():
            found.append(f"the names of {what}")
        found += [f"{what} {key}" for key in left if key in right and not same(left[key], right[key])]
    steps = [[{**entry, "seconds": 0} for entry in log_of(folder)] for folder in (one, other)]
    return found + ([] if steps[0] == steps[1] else ["the log"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the runs are forks: threads that torch computes with here are not there in them
    campaign = Campaign(options.seed)
    rows = {}
    try:
        for index, (name, plan) in enumerate(RUNS.items()):
            kills = options.kills // len(RUNS) + (index < options.kills % len(RUNS))
            straight = campaign.finish(f"straight {index}", plan)
            seconds = max(entry["seconds"] for entry in log_of(straight)[1:])
            rows[name] = campaign.under_fire(f"killed {index}", plan, kills, seconds + 0.05)
            rows[name]["differences"] = differences(straight, folder_of(f"killed {index}"))
            rows[name]["dtypes"] = sorted({str(t.dtype) for t in find_state(straight).tensors.values()})
            sys.stderr.write(f"{name}: {rows[name]}\n")
    finally:
        campaign.close()
    sys.stdout.write(json.dumps(rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
