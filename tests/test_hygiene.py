"""What would be published is fit to be: no code from data, no flagged token, no bundle, no trace of a machine.

The published archive holds what git tracks, less what ``.comfyignore`` names. What ``comfy node validate`` looks at is
looked at here, too.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import toml

ROOT = Path(__file__).resolve().parent.parent

TEXT = {".py", ".js", ".mjs", ".css", ".md", ".json", ".toml", ".txt", ".svg", ""}
PICTURES = {".jpg", ".png", ".webp"}
CODE = {".py", ".js", ".mjs", ".css"}
LARGEST, LARGEST_ARCHIVE = 500_000, 8_000_000
LONGEST_LINE = 400
WORKSHOP = re.compile(r"(^|/)(test_|conftest|\.)|\.(map|min\.js|ipynb|orig|rej|lock)$|_test\.")

# substrings that get a pack flagged by the registry, and what we do without
TOKENS = (
    *(".bind(", ".connect(", ".send(", ".sendall(", "aiohttp.ClientSession", "os.environ", "putenv"),
    *("subprocess.", "os.system", "os.popen", "os.spawn", "torch.load", "pickle.load", "marshal.", "trust_remote_code"),
    *("pip.main", "ensurepip", "urlopen", "requests.get", "requests.post", "base64.b64decode"),
    *("new Function(", "document.write(", "atob("),
)
FORBIDDEN_MODULES = {
    *("cloudpickle", "ctypes", "dill", "ftplib", "http", "httpx", "huggingface_hub", "joblib", "marshal", "pickle"),
    *("pip", "pty", "requests", "shelve", "smtplib", "socket", "subprocess", "telnetlib", "urllib", "urllib3"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
# what a page does with text that becomes markup or code, and addresses of other machines
PAGE_TOKENS = (
    *("innerHTML", "outerHTML", "insertAdjacentHTML", "createContextualFragment", "eval(", "Function(", "setHTML("),
    *("http://", "https://", "ws://", "wss://", 'setAttribute("on', "importScripts("),
)
NAMED = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xhtml"}  # names of languages, nobody's address
MACHINE_PATHS = re.compile(r"(?<![\w.:/-])/" + r"(?:work|tmp|root|home|Users|opt|mnt)/" + r"|\b[A-Z]:\\\\?Users\b")


def listed(*arguments: str) -> set[str]:
    result = subprocess.run(["git", "ls-files", "-z", *arguments], cwd=ROOT, capture_output=True, check=True)
    return {name for name in result.stdout.decode().split("\0") if name}


def repository() -> list[Path]:
    """Every file that is tracked or would be at the next commit."""
    names = listed("--cached", "--others", "--exclude-standard")
    return sorted(path for path in (ROOT / name for name in names) if path.exists())


def archive() -> list[Path]:
    """The files of the published archive."""
    ignored = listed("--cached", "--ignored", "--exclude-from=.comfyignore")
    ignored |= listed("--others", "--ignored", "--exclude-from=.comfyignore")
    return [path for path in repository() if path.relative_to(ROOT).as_posix() not in ignored]


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


ARCHIVE = archive()
SOURCES = [path for path in ARCHIVE if path.suffix in CODE]


def test_the_archive_holds_the_pack_and_nothing_of_its_workshop():
    names = {shown(path) for path in ARCHIVE}
    assert {"__init__.py", "pyproject.toml", "requirements.txt", "LICENSE", "SECURITY.md"} <= names
    folders = {name.split("/")[0] for name in names if "/" in name}
    assert {"kernels", "training", "host", "nodes"} <= folders
    assert folders <= {"kernels", "training", "host", "nodes", "web", "locales", "example_workflows"}
    assert not [name for name in names if WORKSHOP.search(name)]
    assert not [name for name in names if (ROOT / name).is_symlink()], "an archive must not hold links"
    assert sum(path.stat().st_size for path in ARCHIVE) < LARGEST_ARCHIVE


def test_only_known_kinds_of_files_of_modest_size():
    for path in ARCHIVE:
        assert path.suffix in TEXT | PICTURES, f"{shown(path)}: what kind of file is this?"
        assert path.suffix or path.name in {"LICENSE"}, f"{shown(path)}: what kind of file is this?"
        assert path.stat().st_size < LARGEST, f"{shown(path)} is too large to publish"
        if path.suffix in TEXT:
            assert "\0" not in path.read_text(encoding="utf-8"), f"{shown(path)} is not a text file"
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def test_pictures_are_what_their_names_say():
    first = {".jpg": b"\xff\xd8\xff", ".png": b"\x89PNG", ".webp": b"RIFF"}
    for path in ARCHIVE:
        if path.suffix in PICTURES:
            assert path.read_bytes().startswith(first[path.suffix]), shown(path)


def test_the_registry_finds_what_it_wants_in_the_project_file():
    told = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project, comfy = told["project"], told["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,98}", project["name"]) and "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["license"]["text"] and project["description"] and project["requires-python"] == ">=3.10"
    assert project["dynamic"] == ["dependencies"]
    assert told["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
    systems = ("Operating System :: OS Independent", "Operating System :: ", "Programming Language :: Python")
    graphics = {f"Environment :: GPU :: {name}" for name in ("NVIDIA CUDA", "AMD ROCm", "Apple Metal", "Intel Arc")}
    for name in project["classifiers"]:  # one that is unknown voids the list
        assert name.startswith(systems) or name in graphics, name
    assert comfy["PublisherId"] and len(comfy["DisplayName"]) <= 100
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert "web" not in comfy, "the host would load every script twice: WEB_DIRECTORY says it"
    assert "includes" not in comfy


def test_the_registrys_own_rules_find_nothing():
    """``comfy node validate`` asks for just these."""
    files = [str(path) for path in SOURCES if path.suffix == ".py"]
    rules = ("check", "--quiet", "--isolated", "--no-cache", "--select", "S102,S307,E702")
    done = subprocess.run([sys.executable, "-m", "ruff", *rules, *files], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_a_source_has_no_flagged_token_and_is_no_bundle(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        found = [token for token in TOKENS if token in line.replace("safetensors.torch.load", "")]
        assert not found, f"{shown(path)}:{number}: the registry flags {found}"
        assert len(line) <= LONGEST_LINE, f"{shown(path)}:{number}: no minified sources"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix != ".py"], ids=shown)
def test_the_page_makes_no_markup_of_text_and_asks_nobody_else(path):
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for name in NAMED:
            line = line.replace(name, "")
        found = [token for token in PAGE_TOKENS if token in line]
        assert not found, f"{shown(path)}:{number}: {found}"
    assert path.suffix == ".css" or path.read_text(encoding="utf-8").lstrip().startswith("/**"), "what does it do?"
    if path.suffix == ".js":
        assert "registerExtension" in path.read_text(encoding="utf-8"), "the host loads every .js: a module is an .mjs"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.suffix == ".py"], ids=shown)
def test_a_module_runs_no_code_from_data_and_reaches_no_network(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        line = f"{shown(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{line}: {node.func.id}"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{line}: import {name}"


def test_no_file_names_a_place_on_somebodys_machine():
    for path in repository():
        if path.suffix in TEXT | {".yml", ".yaml", ".sh"}:
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                assert not MACHINE_PATHS.search(line), f"{shown(path)}:{number}: {line.strip()[:100]}"
