"""Which file a name in a prompt means.

* ``find_name``: the first of these that fits one name: the name itself, with or without ``.safetensors`` and with
  either slash; the end of its path; its file name without folders; the same with capitals, ``_``, ``-`` and spaces
  alike; all words of it, in any order.

Several that fit equally well are an error, as is none. Only the names are looked at, never the disk.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

SUFFIX = ".safetensors"
MAX_LENGTH, MAX_SHOWN = 300, 8


def find_name(wanted: str, names: Sequence[str]) -> str:
    """The one of ``names`` that is meant. Raises ValueError with candidates."""
    if len(wanted) > MAX_LENGTH:
        raise ValueError(f"the name of a LoRA is {len(wanted)} letters long, expected at most {MAX_LENGTH}")
    if wanted in names:
        return wanted
    for alike in (_plain, _folded):
        paths = {name: alike(name) for name in names}
        path = alike(wanted)
        stem = path.rpartition("/")[2]
        rungs = (
            [name for name, other in paths.items() if other == path],
            [name for name, other in paths.items() if other.endswith("/" + path)],
            [name for name, other in paths.items() if other.rpartition("/")[2] == stem],
        )
        if stem and (found := next(filter(None, rungs), None)):
            return _only(wanted, found)
    words = re.split(r"[\s/.]+", _folded(wanted))
    if any(words) and (found := [name for name, other in paths.items() if all(word in other for word in words)]):
        return _only(wanted, found)
    stems: dict[str, str] = {}
    for name, other in paths.items():
        stems.setdefault(other.rpartition("/")[2], name)
    near = [stems[stem] for stem in difflib.get_close_matches(stem, stems, MAX_SHOWN, 0.6)]
    said = f"the nearest: {_list(near)}" if near else f"there are {len(names)} others" if names else "there are none"
    raise ValueError(f"there is no LoRA {wanted[:100]!r} in the loras folders; {said}")


def _only(wanted: str, found: Sequence[str]) -> str:
    if len(found) == 1:
        return found[0]
    raise ValueError(f"{wanted[:100]!r} may be any of {len(found)} LoRAs: {_list(found)}; write more of the name")


def _plain(name: str) -> str:
    path = name.strip().replace("\\", "/")
    return path[: -len(SUFFIX)] if path.lower().endswith(SUFFIX) else path


def _folded(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", _plain(name).casefold()).split())


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (", …" if len(names) > MAX_SHOWN else "")
