"""LoRA Loom on the command line: ``python run.py inspect FILE``. Works from any folder, without installing the pack.

What there is stands in ``kernels/tools/command_line.py``, or behind ``python run.py --help``.
"""

from __future__ import annotations

import importlib.util
import sys
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


def main() -> int:
    load_pack()
    from lora_loom.kernels.tools import command_line

    return command_line.main()


if __name__ == "__main__":
    sys.exit(main())
