"""The command line works from an unpacked archive in any folder."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from lora_loom.kernels.adapter import Options
from lora_loom.kernels.lora import LoRA
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors
from lora_loom.kernels.writing import to_state_dict

ROOT = Path(__file__).resolve().parent.parent


def run(folder, *arguments):
    command = [sys.executable, str(folder / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)


def test_inspect_from_a_folder_of_any_name(tmp_path):
    folder = tmp_path / "any name-2"
    folder.mkdir()
    for part in ("__init__.py", "run.py"):
        shutil.copy(ROOT / part, folder / part)
    for part in ("kernels", "training"):
        shutil.copytree(ROOT / part, folder / part)
    adapter = LoRA.create((7, 5), Options(3, 3.0), torch.Generator().manual_seed(0))
    file = tmp_path / "one.safetensors"
    save_tensors(LoraModel(to_state_dict({"a.b": adapter}, lambda path: path)), file, {"modelspec.title": "one"})
    result = run(folder, "inspect", str(file))
    assert result.returncode == 0, result.stderr
    assert "1 layers: LoRA; rank 3" in result.stdout
    assert "title one" in result.stdout


def test_inspect_names_the_file_it_cannot_read(tmp_path):
    result = run(ROOT, "inspect", str(tmp_path / "missing.safetensors"))
    assert result.returncode == 1
    assert "missing.safetensors" in result.stderr
