"""Merging two LoRAs into one: ours beside the dense way of kohya's sd-scripts (networks/svd_merge_lora.py).

* SDXL: two LoRAs of rank 32 on all linear layers of the UNet's transformers, to one of rank 32. The shapes are those of
  the host's own UNet on the meta device; the factors are random, kept in fp16.
* sd-scripts' way is written down here from what it does: ΔW of every layer summed in float32 and kept, then per layer
  ``torch.linalg.svd`` with all of U and V, U·S and Vᵀ cut to the rank, both clamped at the 0.99 quantile of their
  numbers. Its time is measured once for every distinct shape and multiplied by how many layers have it; the same with
  U and V of no more columns than needed ("reduced"), which it does not do. Ours is measured on the whole files.
* memory is what a fresh process takes at its peak (Linux' VmHWM) beyond what it took with both LoRAs loaded. Of
  sd-scripts' way it is measured on the largest layer alone; all ΔW together, which it keeps, are added by arithmetic.
* Flux: two LoRAs of rank 16 on all linear layers of the double and single blocks; ours alone, for the memory.

Times are process CPU with one thread.

    python bench/tools.py --host /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="only the smaller half of SDXL's shapes; nothing is written"
    )
    parser.add_argument("--host", default="", help="a ComfyUI folder; default: COMFYUI_DIR, or what `make setup` wrote")
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    parser.add_argument("--fresh", default="", help=argparse.SUPPRESS)  # what a process of its own measures
    return parser.parse_args()


OPTIONS = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = "1"
if OPTIONS.host:
    os.environ["COMFYUI_DIR"] = OPTIONS.host
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from full_size import full_size  # noqa: E402
from lora_loom.kernels.lora import LoRA  # noqa: E402
from lora_loom.kernels.low_rank import Cut  # noqa: E402
from lora_loom.kernels.names import NameTable, layer_shapes  # noqa: E402
from lora_loom.kernels.reading import LoRAFile  # noqa: E402
from lora_loom.kernels.tools.merge import Ingredient, merge  # noqa: E402

Shapes = dict[str, tuple[int, int]]
RANKS = {"sdxl": 32, "flux": 16}
STRENGTHS = (0.7, 0.5)
CLAMP = 0.99


def layers_of(model: str) -> Shapes:
    """The linear layers that LoRAs are on, and their shapes."""
    shapes = layer_shapes(full_size(model))
    inside = (
        (".transformer_blocks.", ".proj_in", ".proj_out") if model == "sdxl" else ("double_blocks.", "single_blocks.")
    )
    found = {path: shape for path, shape in shapes.items() if len(shape) == 2 and any(part in path for part in inside)}
    if OPTIONS.quick:
        kept = sorted(set(found.values()), key=lambda shape: shape[0] * shape[1])
        found = {path: shape for path, shape in found.items() if shape in kept[: len(kept) // 2]}
    return found


def drawn(shapes: Shapes, rank: int, seed: int) -> dict[str, LoRA]:
    """Factors whose singular values fall off as those of trained LoRAs do."""
    draws, adapters = torch.Generator().manual_seed(seed), {}
    fall = torch.logspace(0, -1.5, rank)
    for path, (rows, columns) in shapes.items():
        down, up = torch.randn(rank, columns, generator=draws), torch.randn(rows, rank, generator=draws) * fall
        adapters[path] = LoRA(down.half() / columns**0.5, up.half() / rows**0.5, rank / 2)
    return adapters


def merged(shapes: Shapes, pair: list[dict[str, LoRA]], method: str, rank: int) -> Any:
    table = NameTable(shapes)
    ingredients = [Ingredient(LoRAFile(one, names=table), s) for one, s in zip(pair, STRENGTHS, strict=True)]
    return merge(ingredients, method, None if method == "concat" else Cut(rank=rank))


def dense_way(pair: list[LoRA], rank: int, full: bool) -> tuple[Tensor, Tensor]:
    """One layer as sd-scripts merges it: (up, down)."""
    matrix = torch.zeros(pair[0].shape)
    for lora, ratio in zip(pair, STRENGTHS, strict=True):
        matrix = matrix + ratio * (lora.up.float() @ lora.down.float()) * lora.scale
    u, values, v = torch.linalg.svd(matrix, full_matrices=full)
    u, v = u[:, :rank] @ torch.diag(values[:rank]), v[:rank]
    limit = torch.quantile(torch.cat([u.flatten(), v.flatten()]), CLAMP)
    return u.clamp(-limit, limit).contiguous(), v.clamp(-limit, limit).contiguous()


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


# -- memory, each in a process of its own


def peak() -> int:
    """Bytes: the most that this process held since ``forget_peak``."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> None:
    """What it held before: imports and drawing take more than what is kept of them."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def beyond_loaded(what: str) -> dict[str, int]:
    """What one process takes beyond its two LoRAs, and how much of that is the result."""
    way, model, method = what.split()
    shapes, rank = layers_of(model), RANKS[model]
    if way == "dense":
        path = max(shapes, key=lambda each: shapes[each][0] * shapes[each][1])
        shapes = {path: shapes[path]}
    pair = [drawn(shapes, rank, seed) for seed in (0, 1)]
    forget_peak()
    loaded = peak()
    if way == "dense":
        layers = [one[path] for one in pair]
        result = dense_way(layers, rank, full=method == "full")
        return {"bytes": peak() - loaded, "result": sum(tensor.nbytes for tensor in result)}
    outcome = merged(shapes, pair, method, rank)
    tensors = [tensor for adapter in outcome.file.adapters.values() for tensor in adapter.tensors.values()]
    return {"bytes": peak() - loaded, "result": sum(tensor.nbytes for tensor in tensors)}


def in_fresh(what: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--fresh", what, *(["--quick"] if OPTIONS.quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- all of it


def sdxl() -> dict[str, Any]:
    shapes, rank = layers_of("sdxl"), RANKS["sdxl"]
    pair = [drawn(shapes, rank, seed) for seed in (0, 1)]
    ours = {
        method: cpu_seconds(lambda method=method: merged(shapes, pair, method, rank)) for method in ("concat", "sum")
    }
    best = {layer.path: layer.error for layer in ours["sum"][1].layers}
    counts = Counter(shapes.values())
    rows = []
    for shape, count in sorted(counts.items(), key=lambda item: item[0][0] * item[0][1]):
        path = next(path for path, each in shapes.items() if each == shape)
        layers = [one[path] for one in pair]
        seconds, (up, down) = cpu_seconds(lambda layers=layers: dense_way(layers, rank, full=True))
        reduced, _ = cpu_seconds(lambda layers=layers: dense_way(layers, rank, full=False))
        wanted = sum(s * lora.delta().double() for s, lora in zip(STRENGTHS, layers, strict=True))
        error = float((up.double() @ down.double() - wanted).norm())
        own = ours["sum"][1].file.adapters[path].delta().double()
        rows.append(
            {
                "shape": shape,
                "layers": count,
                "seconds": seconds,
                "reduced": reduced,
                "error": error / best[path],
                "ours_error": float((own - wanted).norm()) / best[path],
            }
        )
    dense = sum(4 * rows_ * columns for rows_, columns in shapes.values())
    largest = in_fresh("dense sdxl full")
    memory = {method: in_fresh(f"ours sdxl {method}") for method in ours}
    return {
        "layers": len(shapes),
        "rank": rank,
        "shapes": rows,
        "seconds": {method: seconds for method, (seconds, _) in ours.items()},
        "dense_seconds": sum(row["seconds"] * row["layers"] for row in rows),
        "reduced_seconds": sum(row["reduced"] * row["layers"] for row in rows),
        "memory": memory,
        "dense_memory": {"all differences": dense, "largest layer": largest["bytes"]},
    }


def flux() -> dict[str, Any]:
    shapes = layers_of("flux")
    dense = [4 * rows * columns for rows, columns in shapes.values()]
    memory = {method: in_fresh(f"ours flux {method}") for method in ("concat", "sum")}
    return {
        "layers": len(shapes),
        "rank": RANKS["flux"],
        "memory": memory,
        "all differences": sum(dense),
        "largest difference": max(dense),
    }


def table(result: dict[str, Any]) -> str:
    one, other = result["sdxl"], result["flux"]
    dense_bytes = sum(one["dense_memory"].values())
    lines = [
        f"### Two LoRAs of rank {one['rank']} on the {one['layers']} linear layers of SDXL's transformers",
        "",
        f"{result['machine']}; CPU seconds; memory beyond the two files, of which the result (float32) is a part.",
        "",
        "| way | s | × sum | MB | result | × sum |",
        "|---|---|---|---|---|---|",
    ]
    base, base_bytes = one["seconds"]["sum"], one["memory"]["sum"]["bytes"]
    for method, seconds in one["seconds"].items():
        took = one["memory"][method]
        lines.append(
            f"| ours, {method} | {seconds:.1f} | {seconds / base:.2f} | {megabytes(took['bytes'])} | "
            f"{megabytes(took['result'])} | {took['bytes'] / base_bytes:.2f} |"
        )
    lines += [
        f"| dense, as sd-scripts | {one['dense_seconds']:.0f} ¹ | {one['dense_seconds'] / base:.0f} | "
        f"{megabytes(dense_bytes)} ² | | {dense_bytes / base_bytes:.1f} |",
        f"| dense, reduced SVD | {one['reduced_seconds']:.0f} ¹ | {one['reduced_seconds'] / base:.0f} | | | |",
        "",
        "¹ measured once for each distinct shape and multiplied by its number of layers (below).",
        f"² {megabytes(one['dense_memory']['all differences'])} MB are all differences, which it keeps (arithmetic); "
        f"{megabytes(one['dense_memory']['largest layer'])} MB the SVD of the largest layer (measured).",
        "",
        "Error of the result, in that of the best approximation of its rank:",
        "",
        "| layer | layers | s, as sd-scripts | s, reduced | error, ours | error, sd-scripts (clamped) |",
        "|---|---|---|---|---|---|",
    ]
    for row in one["shapes"]:
        rows, columns = row["shape"]
        lines.append(
            f"| {rows}×{columns} | {row['layers']} | {row['seconds']:.2f} | {row['reduced']:.2f} | "
            f"{row['ours_error']:.4f} | {row['error']:.4f} |"
        )
    lines += [
        "",
        f"### Two LoRAs of rank {other['rank']} on the {other['layers']} linear layers of Flux's blocks",
        "",
        f"All differences would take {megabytes(other['all differences'])} MB in float32, the largest alone "
        f"{megabytes(other['largest difference'])} MB.",
        "",
        "| way | MB beyond the two files | result | beside the result |",
        "|---|---|---|---|",
    ]
    for method, took in other["memory"].items():
        beside = megabytes(took["bytes"] - took["result"])
        lines.append(f"| ours, {method} | {megabytes(took['bytes'])} | {megabytes(took['result'])} | {beside} |")
    return "\n".join(lines)


def megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"


def main() -> None:
    torch.set_num_threads(1)
    if OPTIONS.fresh:
        print(json.dumps(beyond_loaded(OPTIONS.fresh)))
        return
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
    result = {"machine": machine, "sdxl": sdxl(), "flux": flux()}
    result["table"] = table(result)
    print(result["table"])
    if not OPTIONS.no_write and not OPTIONS.quick:
        path = HERE / "results" / "tools.json"
        path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        head = [
            "# What merging costs",
            "",
            "`python bench/tools.py` measures; `bench/tools.py` says what is measured.",
            "",
        ]
        path.with_suffix(".md").write_text("\n".join([*head, result["table"], ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
