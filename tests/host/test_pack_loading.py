"""The pack as the host loads it: any folder name, the published archive, one identity, quickly, without network."""

import json
import statistics
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hosting import BASE_FOLDERS, host_folder

ROOT = Path(__file__).resolve().parent.parent.parent
NODES = {  # the public contract, as far as it exists
    "LoomDatasetLoader",
    "LoomLoRATrainer",
    "LoomAdapterSettings",
    "LoomOptimizerSettings",
    "LoomObjectiveSettings",
    "LoomRunSettings",
    "LoomPreviewSettings",
    "LoomSaveLoRA",
    "LoomSavePreset",
    "LoomLoRALoaderAdvanced",
    "LoomCaptionSettings",
    "LoomImageSettings",
    "LoomConceptSettings",
    "LoomDatasetFromImages",
    "LoomCombineDatasets",
    "LoomDatasetLint",
    "LoomContactSheet",
    "LoomDatasetToGraph",
    "LoomDatasetUpdate",
    "LoomDatasetToTOML",
    "LoomComponentSettings",
    "LoomLoadLoRA",
    "LoomPromptLoRA",
    "LoomLoRAPair",
    "LoomBlockAnalyser",
    "LoomMergeLoRA",
    "LoomBakeApplied",
    "LoomExtractLoRA",
    "LoomResizeLoRA",
    "LoomConvertLoRA",
    "LoomInspectLoRA",
    "LoomTagEditor",
}
SECONDS = 0.5  # what importing the pack may cost at every start but the first, which also compiles it

# Runs in a fresh interpreter with the host as its working directory: imports the host, then lets it load the pack.
LOAD = """
import asyncio, compileall, gc, json, os, sys, time
dev, base, folder = sys.argv[1:]
sys.argv = sys.argv[:1]
sys.path[:0] = [os.getcwd(), dev]
import run_host
run_host.prepare_imports()
import comfy.options
comfy.options.args_parsing = False
from comfy.cli_args import args
args.base_directory, args.cpu = base, True
import utils.extra_config  # first, as the host does: its comfy folder has a utils of its own
import server
import comfy_api.latest
import comfy_config.config_parser  # the first pack's load would bring it in, with all that it imports itself
import nodes
touched = []
def watch(event, arguments):
    if event.startswith("socket.") and event != "socket.__new__":
        touched.append(event)
sys.addaudithook(watch)
before = set(sys.modules)
sys.pycache_prefix = os.path.join(base, "byte code")
for part in ("kernels", "training", "host", "nodes"):
    compileall.compile_dir(os.path.join(folder, part), quiet=1)
gc.collect()
gc.freeze()  # else the sweep of the host's own objects, a quarter of a second, falls on whoever crosses its threshold
began = time.process_time()
fine = asyncio.run(nodes.load_custom_node(folder, module_parent="custom_nodes"))
seconds = time.process_time() - began
network = list(touched)
sys.path.remove(dev)
import lora_loom, lora_loom.nodes, lora_loom.kernels.lora
loaded = nodes.NODE_CLASS_MAPPINGS["LoomLoRATrainer"]
files = {name: module.__file__ for name, module in sys.modules.items()
         if name not in before and getattr(module, "__file__", None) and hasattr(module, "__spec__")}
print(json.dumps({
    "fine": fine, "seconds": seconds, "network": network,
    "nodes": sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("Loom")),
    "one module": sys.modules[folder.replace(".", "_x_")] is lora_loom,
    "one class": loaded.__mro__[0] is lora_loom.nodes.LoomLoRATrainer or loaded in lora_loom.nodes.NODES,
    "files": files, "web": nodes.EXTENSION_WEB_DIRS.get(os.path.basename(folder)),
    "path": sys.path,
}))
"""


def git(*arguments):
    answer = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=ROOT, capture_output=True, check=True)
    return {name for name in answer.stdout.decode().split("\0") if name}


def archive(target: Path) -> Path:
    """What the registry would hold: the tracked files without those of .comfyignore, in one zip."""
    left_out = ("--ignored", "--exclude-from=.comfyignore")
    ignored = git("--cached", *left_out) | git("--others", *left_out)
    with zipfile.ZipFile(target, "w") as packed:
        for name in sorted(git("--cached", "--others", "--exclude-standard") - ignored):
            if (ROOT / name).exists():
                packed.write(ROOT / name, name)
    return target


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What each way of being installed gave: way -> (folder, facts)."""
    base = tmp_path_factory.mktemp("base")
    for folder in BASE_FOLDERS:
        (base / folder).mkdir(parents=True)
    packs = base / "custom_nodes"
    (packs / "any-Folder.v1").symlink_to(ROOT)
    for name in ("real copy-2", "lora-loom"):
        zipfile.ZipFile(archive(base / "node.zip")).extractall(packs / name)
    return {folder.name: (folder, facts_of(base, folder)) for folder in sorted(packs.iterdir())}


def facts_of(base, folder):
    answer = subprocess.run(
        [sys.executable, "-c", LOAD, str(ROOT / "dev"), str(base), str(folder)],
        **{"cwd": host_folder(), "capture_output": True, "text": True},
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


def test_it_loads_from_any_folder_and_as_the_archive(loaded):
    assert set(loaded) == {"any-Folder.v1", "real copy-2", "lora-loom"}
    for folder, facts in loaded.values():
        assert facts["fine"] and set(facts["nodes"]) == NODES
        assert Path(facts["web"]) == folder / "web"


def test_there_is_one_of_everything(loaded):
    """``lora_loom`` is the pack that the host has loaded, and no file is imported under two names."""
    for folder, facts in loaded.values():
        assert facts["one module"] and facts["one class"]
        places = [path for path in facts["files"].values() if Path(path).is_relative_to(folder)]
        twice = {path for path in places if places.count(path) > 1}
        assert twice == {str(folder / "__init__.py")}, "only the root, which has its path and its name"
        assert len(places) > 30
        elsewhere = [path for path in facts["files"].values() if Path(path).is_relative_to(ROOT)]
        assert not [path for path in elsewhere if ".venv" not in path and ".dev" not in path]
        assert str(folder) not in facts["path"] and str(ROOT) not in facts["path"], "our nodes/ would hide the host's"


def test_importing_it_is_quick_and_touches_no_network(loaded):
    seconds = [facts["seconds"] for _, facts in loaded.values()]
    assert statistics.median(seconds) <= SECONDS, seconds
    assert [facts["network"] for _, facts in loaded.values()] == [[]] * 3


# ---------------------------------------------------------------- on the server


def test_every_socket_and_widget_is_explained(server):
    info = server.object_info()
    assert {name for name in info if name.startswith("Loom")} == NODES
    for name in NODES:
        about = info[name]
        assert about["description"] and about["display_name"] and about["category"].startswith("LoRA Loom"), name
        assert (ROOT / "web" / "docs" / f"{name}.md").exists(), f"{name} has no help page"
        for section in ("required", "optional"):
            for option, spec in about["input"].get(section, {}).items():
                assert len(spec) > 1 and spec[1].get("tooltip"), f"{name}.{option}"
        assert len(about["output_tooltips"]) == len(about["output"]) and all(about["output_tooltips"]), name


# ---------------------------------------------------------------- what it asks for


def test_its_requirements_change_nothing_that_the_host_has_installed(tmp_path):
    """Asked of pip in an environment that has everything but our own additions."""
    installed = next(Path(entry) for entry in sys.path if (Path(entry) / "torch").is_dir())
    ours = ("accelerate", "tomli_w")
    for entry in installed.iterdir():
        if not entry.name.startswith(ours) and entry.suffix != ".pth":
            (tmp_path / entry.name).symlink_to(entry)
    report = tmp_path / "report.json"
    pip = "import runpy, sys; sys.path.append(sys.argv.pop(1)); runpy.run_module('pip', run_name='__main__')"
    asked = ["install", "--dry-run", "--quiet", "--report", str(report), "-r", str(ROOT / "requirements.txt")]
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", pip, str(tmp_path), *asked], capture_output=True, text=True, cwd=tmp_path
    )
    assert answer.returncode == 0, answer.stderr
    names = {item["metadata"]["name"].lower().replace("_", "-") for item in json.loads(report.read_text())["install"]}
    assert "accelerate" in names and names <= {"accelerate", "tomli-w", "tomli"}
