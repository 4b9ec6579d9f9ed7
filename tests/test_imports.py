"""Imports go one way: nodes -> host -> training -> kernels, and the host's modules only where they belong."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"kernels": 0, "training": 1, "host": 2, "nodes": 3}
HOST_MODULES = {
    *("comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "comfyui_version", "cuda_malloc"),
    *("execution", "folder_paths", "latent_preview", "node_helpers", "nodes", "app", "api_server", "server"),
}
FILES = [path for package in LEVELS for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, wherever it stands; relative ones start with ``lora_loom``."""
    package = ("lora_loom", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield node.lineno, node.module or ""
                continue
            base = [*package[: len(package) - node.level + 1], *([node.module] if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def test_there_is_something_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(LEVELS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_downwards_only(path):
    package = path.relative_to(ROOT).parts[0]
    source = path.read_text(encoding="utf-8").splitlines()
    for line, name in imported(path):
        where = f"{path.relative_to(ROOT)}:{line}: {name}"
        first, *rest = name.split(".")
        if first == "lora_loom":
            assert "lora_loom" not in source[line - 1], f"{where}: use a relative import"
            if rest and rest[0] in LEVELS:
                assert LEVELS[rest[0]] <= LEVELS[package], f"{where}: {package} must not know {rest[0]}"
        elif first in HOST_MODULES:
            allowed = package == "host" or (package == "nodes" and first == "comfy_api")
            assert allowed, f"{where}: only host/ imports the host (nodes/ may import comfy_api)"


def modules_after(statement: str, folder: Path) -> set[str]:
    """The names in ``sys.modules`` of a fresh interpreter that ran ``statement``."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return set(result.stdout.split())


@pytest.mark.parametrize("package", ["kernels", "training"])
def test_kernels_and_training_work_without_a_host(package, tmp_path):
    names = [f"lora_loom.{package}.{path.stem}" for path in sorted((ROOT / package).glob("*.py"))]
    loaded = modules_after(f"import lora_loom, {', '.join(name.removesuffix('.__init__') for name in names)}", tmp_path)
    assert not loaded & HOST_MODULES
    foreign = {f"lora_loom.{other}" for other, level in LEVELS.items() if level > LEVELS[package]}
    assert not loaded & foreign


def test_importing_the_pack_loads_nothing_else(tmp_path):
    loaded = modules_after("import lora_loom", tmp_path)
    assert not loaded & (HOST_MODULES | {"torch"} | {f"lora_loom.{package}" for package in LEVELS})
