"""The figures of ``train_step`` as a table, and their files."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import comfyui_version
import torch

HEAD = (
    "step",
    "× frozen (CPU)",
    "range",
    "× frozen (wall)",
    "CPU s",
    "stays MB",
    "for backward MB",
    "step peak MB",
    "peak MB",
)


def described(result: dict[str, Any]) -> dict[str, Any]:
    machine = f"{platform.machine()}, {result['threads']} thread(s), torch {torch.__version__}"
    return {**result, "host": f"ComfyUI {comfyui_version.__version__}", "machine": machine}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"### model_channels {result['model_channels']}, latent {result['latent']}×{result['latent']}, "
        f"rank {result['rank']}, {result['host']}",
        "",
        f"Model {result['model_bytes'] / 1e6:.0f} MB, {result['adapted_layers']} layers adapted, batch 1, fp32, "
        f"{result['machine']}; median of {result['repeats']}, ratios taken within a round.",
        "",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
    ]
    for name, row in result["rows"].items():
        low, high = row["cpu_ratio_range"]
        cells = [
            name,
            f"{row['cpu_ratio']:.3f}",
            f"{low:.2f}–{high:.2f}",
            f"{row['wall_ratio']:.3f}",
            f"{row['cpu_seconds']:.3f}",
        ]
        sizes = row.get("bytes", {})
        cells += [f"{sizes[key] / 1e6:.1f}" if sizes else "" for key in ("before", "held", "step_peak", "peak")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


EXPLANATION = """# One training step

`python bench/train_step.py` measures; `bench/train_step.py` says what is measured. *frozen* is the forward of the same
network with a backward to its input only. *stays*: adapters, optimizer state and copies of weights between steps;
*for backward*: what the forward keeps; *step peak*: the most above *stays* inside a step, gradients included; *peak*:
the most above the loaded model from the first set-up on. Bytes are exact counts of tensor storages.

"""


def write(result: dict[str, Any], folder: Path) -> None:
    """Add ``result`` to train_step.json, in place of an older one of the same kind, and write the tables anew."""
    folder.mkdir(exist_ok=True)
    file = folder / "train_step.json"
    results = json.loads(file.read_text()) if file.exists() else []
    new = described(result)
    kind = ("host", "model_channels", "latent", "rank", "threads")
    results = [old for old in results if any(old[key] != new[key] for key in kind)] + [new]
    results.sort(key=lambda entry: tuple(str(entry[key]).zfill(20) for key in kind))
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (folder / "train_step.md").write_text(EXPLANATION + "\n".join(table(entry) for entry in results))
