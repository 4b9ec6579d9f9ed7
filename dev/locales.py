"""The texts of nodes and commands, for the host's translations: ``locales/en`` is made of what they say themselves.

    python dev/locales.py            writes locales/en anew
    python dev/locales.py --missing  lists what the other languages lack or have too much

* ``node_texts``: names, descriptions and tooltips by node, as ``nodeDefs.json`` has them
* ``command_texts``: what commands in the page are called, as ``commands.json`` has them
* ``categories``: the folders that nodes are listed in, for ``main.json``

Texts with a mark of the page's message format (``@ { } |``) are left out: older pages read them as messages, newer ones
as they are, so no spelling suits both; and the one that depends on what is installed. What is left out is shown as the
node itself says it. Names of sockets and widgets are the same in all languages: errors and reports call them so.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
MARKS = re.compile(r"[@{}|]")
INSTALLED = {("LoomOptimizerSettings", "optimizer")}  # its tooltip lists the optimizers that can be imported
COMMAND = re.compile(r'id: "([\w.]+)",[^{}]*?label: "([^"]+)"', re.S)


def node_texts(object_info: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name, node in sorted(object_info.items()):
        if not name.startswith("Loom"):
            continue
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
        told = {key: "" if (name, key) in INSTALLED else spec[1]["tooltip"] for key, spec in inputs.items()}
        found[name] = _plain(
            {
                "display_name": node["display_name"],
                "description": node["description"],
                "inputs": {_key(key): {"name": key, "tooltip": text} for key, text in told.items()},
                "outputs": {str(slot): {"name": key, "tooltip": text} for slot, (key, text) in enumerate(outputs)},
            }
        )
    return found


def categories(object_info: dict[str, Any]) -> dict[str, Any]:
    ours = (node["category"] for name, node in object_info.items() if name.startswith("Loom"))
    return {"nodeCategories": {part: part for part in sorted({part for path in ours for part in path.split("/")})}}


def command_texts() -> dict[str, Any]:
    sources = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.js")))
    commands = re.findall(r"^  commands: \[(.*?)^  \]", sources, re.S | re.M)
    return {_key(name): {"label": label} for block in commands for name, label in COMMAND.findall(block)}


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """By the name of the file."""
    return {"main": categories(object_info), "nodeDefs": node_texts(object_info), "commands": command_texts()}


def paths(texts: Any, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """(path of keys, text) for every text."""
    if isinstance(texts, str):
        yield before, texts
    else:
        for key, value in texts.items():
            yield from paths(value, (*before, key))


def read(language: str) -> dict[str, Any]:
    """A language's files, by name."""
    folder = LOCALES / language
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _plain(texts: Any) -> Any:
    if isinstance(texts, dict):
        plain = {key: _plain(value) for key, value in texts.items()}
        return {key: value for key, value in plain.items() if value is not None}
    return None if not texts or MARKS.search(texts) else texts


def _key(name: str) -> str:
    return name.replace(".", "_")


def _missing() -> None:
    wanted = {path for path, _ in paths(read("en"))}
    for folder in sorted(LOCALES.iterdir()):
        given = {path for path, _ in paths(read(folder.name))}
        for path in sorted(wanted - given):
            sys.stdout.write(f"{folder.name} lacks {'.'.join(path)}\n")
        for path in sorted(given - wanted):
            sys.stdout.write(f"{folder.name} has {'.'.join(path)}, which is nothing\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--missing", action="store_true")
    if parser.parse_args().missing:
        _missing()
        return
    from live_server import live_server

    with live_server() as server:
        texts = english(server.object_info())
    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (LOCALES / "en" / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
