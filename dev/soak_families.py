"""The whole product of adapter families and tiny models of the host, as a table under bench/results.

``python dev/soak_families.py``: every family on every model that this host has (tests/host/family_cell.py says what a
cell has to show). ``--models`` and ``--variants`` run a part, ``--missing`` what no table has yet; the rest of the
table stays. With ``COMFYUI_DIR`` set to another host its own table is written beside; two hosts may run at once. Ends
with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
sys.path[:0] = [str(ROOT / "tests" / "host"), str(ROOT / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import comfyui_version  # noqa: E402

import tiny  # noqa: E402
from family_cell import EFFECT, GRADIENT, LEARNT, STEPS, VARIANTS, Cell, fits  # noqa: E402

MODELS = [name for name in tiny.SPECS if name != "sd2"]  # sd2_v is the same network

EXPLANATION = f"""# Adapter families on tiny models of the host

`python dev/soak_families.py` makes these tables, one for each host; `tests/host/family_cell.py` says what is done.
Adapters sit on every linear layer and convolution. A number is the loss after {STEPS} steps as a part of what it was
(at most {LEARNT} is asked for). Each cell has also shown that the gradients of everything trained agree with finite
differences (to {GRADIENT:g}), that the written file has the same effect when our reader reads it, and when the host's
own loader does (to {EFFECT:g} of the effect). † marks cells whose plain file the host's loader misreads: there it was
given the equivalent that the save node offers. – : no such layers in this model.
"""


def run(name: str, variant: str) -> dict[str, Any]:
    """The figures of a cell, or what went wrong."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="loom-cell-") as folder:
        try:
            figures: dict[str, Any] = asdict(Cell(name, variant).checked(Path(folder)))
        except Exception as error:  # a table of failures is worth more than the first of them
            figures = {"error": f"{type(error).__name__}: {error}"}
    return {**figures, "seconds": round(time.monotonic() - began, 1)}


def shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if "error" in cell:
        return f"**{cell['error'].splitlines()[0][:80]}**"
    return f"{cell['learnt']:.2f}" + ("†" if cell["fault"] else "") if cell else "–"


def table(host: str, cells: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row for each variant, a column for each model, and the largest errors of each column."""
    lines = [f"## {host}", "", f"| | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for variant in VARIANTS:
        lines.append(f"| {variant} | " + " | ".join(shown(column.get(variant)) for column in cells.values()) + " |")
    for figure, what in (("gradient", "gradients"), ("reload", "our reader"), ("core", "the host's loader")):
        worst = [
            max((cell[figure] for cell in column.values() if figure in cell), default=None) for column in cells.values()
        ]
        told = ("" if error is None else f"{error:.0e}" for error in worst)
        lines.append(f"| *largest error: {what}* | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def file_of(version: str) -> Path:
    return RESULTS / f"families-{version}.json"


def kept(version: str) -> dict[str, Any]:
    """model -> variant -> cell."""
    return json.loads(file_of(version).read_text()) if file_of(version).exists() else {}


def keep(version: str, name: str, variant: str, cell: dict[str, Any]) -> None:
    """Put a cell into the results."""
    results = kept(version)
    results.setdefault(name, {})[variant] = cell
    results = {model: results[model] for model in MODELS if model in results}
    lines = [
        f' "{model}": {{\n'
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in cells.items())
        + "\n }"
        for model, cells in results.items()
    ]
    replace(file_of(version), "{\n" + ",\n".join(lines) + "\n}\n")
    others = sorted(path.stem.removeprefix("families-") for path in RESULTS.glob(file_of("*").name))
    replace(RESULTS / "families.md", "\n".join([EXPLANATION, *(table(f"ComfyUI {one}", kept(one)) for one in others)]))


def replace(path: Path, text: str) -> None:
    """In one step: the other host's run reads it too."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="NAME")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--missing", action="store_true", help="only cells that the table has not got, or that failed")
    options = parser.parse_args()
    version, failed = comfyui_version.__version__, 0
    for name, variant in itertools.product(options.models, options.variants):
        known = kept(version).get(name, {}).get(variant, {"error": "not run yet"})
        if options.missing and "error" not in known:
            continue
        cell = run(name, variant) if fits(name, variant) else {}
        failed += "error" in cell
        print(f"{name:14s} {variant:26s} {cell.get('seconds', 0):6.1f} s  {cell.get('error', 'ok')}", flush=True)
        keep(version, name, variant, cell)
    print(f"families × models: {failed} cells failed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
