"""LoRA Loom on the command line: ``python run.py inspect FILE``. Works from any folder, without installing the pack."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path


def load_pack() -> None:
    """Make the folder this file lies in importable as ``lora_loom``, whatever its name is."""
    if "lora_loom" in sys.modules:
        return
    root = Path(__file__).resolve().parent
    spec = importlib.util.spec_from_file_location(
        "lora_loom", root / "__init__.py", submodule_search_locations=[str(root)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["lora_loom"] = module
    spec.loader.exec_module(module)
    # beside the host, this folder's nodes/ would hide the host's nodes.py
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != root]


def inspect(path: str) -> str:
    """What a LoRA file holds: layers, ranks, how it was trained."""
    from lora_loom.kernels.metadata import trigger_words
    from lora_loom.kernels.safetensors_io import load_tensors

    lora = load_tensors(path)
    ranks: Counter[str] = Counter()
    for name, tensor in lora.items():
        if name.endswith((".lora_down.weight", ".lora_A.weight")):
            ranks[f"rank {tensor.shape[0]}"] += 1
    lines = [f"{Path(path).name}: {len(lora)} tensors, {sum(tensor.numel() for tensor in lora.values()):,} numbers"]
    lines += [f"  {count} layers of {rank}" for rank, count in sorted(ranks.items())]
    words = trigger_words(lora.metadata)
    if words:
        lines.append(f"  trigger words: {', '.join(words)}")
    for key in sorted(lora.metadata):
        if key.startswith("modelspec."):
            lines.append(f"  {key.removeprefix('modelspec.')}: {lora.metadata[key]}")
    if "loom.recipe" in lora.metadata:
        recipe = json.dumps(json.loads(lora.metadata["loom.recipe"]), indent=2)
        lines.append("  recipe: " + recipe.replace("\n", "\n  "))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py", description="LoRA Loom without the graph.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="tell what a LoRA file holds and how it was trained")
    inspecting.add_argument("file")
    chosen = parser.parse_args(arguments)
    load_pack()
    try:
        sys.stdout.write(inspect(chosen.file) + "\n")
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
