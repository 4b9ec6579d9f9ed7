"""Time and memory of one training step, against the bare work that no trainer can avoid.

The unit is the *frozen* pass: the host's own UNet (SD1.5 topology, random weights, batch 1), forward with plain
autograd and backward to its input only. Everything else is a whole step: forward, loss, backward, clipping, optimizer.

* ours, and ours with gradient checkpointing, with the inputs of blocks in main memory ("offloaded") too:
  ``training.Trainer`` on a model lent by ``host.borrow``. On a CPU main memory is where all is: what offloading moves
  is counted with the rest there;
* the host's ``TrainLoraNode``, its own execute() and loop, adapters on every layer, norm and bias as it always does:
  weights wrapped (its default) and, where the host has it, bypass mode. Run in fp32 without checkpointing, the setting
  that is fastest for it on a CPU; it does not clip;
* a plain ``peft`` injection of our targets into the same network, with the loop anybody would write;
* the same loop around a ``diffusers`` UNet of that shape with its own noise schedule ("diffusers + peft");
* with ``--family-channels``, in a table of their own, each adapter family: ours, and ``lycoris_lora``'s and ``peft``'s
  where they have it.

All of them share the weights, live in one process and take turns, so that every ratio is taken within one round.

    python bench/train_step.py --channels 96 --repeats 7 --host /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = (
    "frozen",
    "ours",
    "ours, checkpointed",
    "ours, offloaded",
    "peft",
    "diffusers + peft",
    "native",
    "native, bypass",
)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, nargs="*", default=[96], help="model_channels (SD1.5 has 320)")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent (SD1.5 trains at 64)")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--host", default="", help="a ComfyUI folder; default: COMFYUI_DIR, or what `make setup` wrote")
    parser.add_argument("--only", nargs="+", choices=NAMES[1:], default=NAMES[1:])
    parser.add_argument("--family-channels", type=int, nargs="*", default=[64], help="widths for the table of families")
    parser.add_argument("--families", nargs="+", help="which of them (default: all)")
    parser.add_argument("--no-memory", action="store_true", help="leave the memory table out")
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    return parser.parse_args()


OPTIONS = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = str(OPTIONS.threads)
if OPTIONS.host:
    os.environ["COMFYUI_DIR"] = OPTIONS.host
# not this folder itself: libraries look for a package called kernels, and would find kernels.py
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(HERE / "step_parts"), str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import torch  # noqa: E402

import report  # noqa: E402
from contestants import contestant  # noqa: E402
from memory import memory_of  # noqa: E402
from peers import FAMILIES  # noqa: E402
from steps import first_model, share  # noqa: E402
from timing import take_turns  # noqa: E402


def of_all() -> list[str]:
    """Who takes part beside the frozen pass."""
    import comfy.model_management

    has_bypass = hasattr(comfy.model_management, "in_training")
    return [name for name in OPTIONS.only if has_bypass or name != "native, bypass"]


def of_families() -> list[str]:
    return [
        f"{who} {family}"
        for family in OPTIONS.families or FAMILIES
        for who in ("ours", "lycoris", "peft")
        if who == "ours" or getattr(FAMILIES[family], who)
    ]


def measure(channels: int, names: list[str]) -> dict:
    """Times and bytes at one width."""
    base = first_model(channels)
    names = ["frozen", *names]
    make = {name: partial(contestant, name, base, OPTIONS.latent, OPTIONS.rank) for name in names}
    rows = take_turns(make, OPTIONS.repeats)
    if not OPTIONS.no_memory:
        for name, row in rows.items():
            row["bytes"] = memory_of(make[name], base)
    size = sum(value.nbytes for value in base.model.parameters())
    targets = share(base).targets
    return {
        "model_channels": channels,
        "latent": OPTIONS.latent,
        "rank": OPTIONS.rank,
        "batch": 1,
        "repeats": OPTIONS.repeats,
        "threads": OPTIONS.threads,
        "model_bytes": size,
        "adapted_layers": len(targets),
        "rows": rows,
    }


def main() -> None:
    torch.set_num_threads(OPTIONS.threads)
    tables = [(channels, of_all()) for channels in OPTIONS.channels]
    tables += [(channels, of_families()) for channels in OPTIONS.family_channels]
    for channels, names in tables:
        result = measure(channels, names)
        print(report.table(report.described(result)))
        if not OPTIONS.no_write:
            report.write(result, HERE / "results")


if __name__ == "__main__":
    main()
