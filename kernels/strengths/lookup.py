"""Which file a name in a prompt means.

* ``find_name``: the first of these that fits one name: the name itself; with or without ``.safetensors`` and with
  either slash, the whole path or the end of one; the same with capitals, ``_``, ``-`` and spaces alike; all words of
  it, in any order.

Before the last slash stand folders, one in the other, and what is meant lies in them. Words are whole ones: they end
at signs, at digits, and where a capital follows a small letter; ``1.5`` is one. Accents count alike in one sign or two.

Several that fit equally well are an error, as is none. Only the names are looked at, never the disk.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Sequence

SUFFIX = ".safetensors"
MAX_LENGTH, MAX_SHOWN = 300, 8
_WORD = re.compile(r"[^\W_]+(?:(?<=\d)\.(?=\d)[^\W_]+)*")
_BORDER = re.compile(r"(?<=[^\W\d_])(?=\d)|(?<=\d)(?=[^\W\d_])|(?<=[a-zß-öø-ÿ])(?=[A-ZÀ-ÖØ-Þ])")


def find_name(wanted: str, names: Sequence[str]) -> str:
    """The one of ``names`` that is meant. Raises ValueError with candidates."""
    if len(wanted) > MAX_LENGTH:
        raise ValueError(f"the name of a LoRA is {len(wanted)} letters long, expected at most {MAX_LENGTH}")
    if wanted in names:
        return wanted
    plain = {name: _plain(name) for name in names}
    folded = {name: _folded(path) for name, path in plain.items()}
    path = _folded(wanted)
    for whole, paths in ((_plain(wanted), plain), (path, folded)):
        rungs = (
            [name for name, other in paths.items() if other == whole],
            [name for name, other in paths.items() if other.endswith("/" + whole)],
        )
        if found := next(filter(None, rungs), None):
            return _only(wanted, found)
    folder, slash, stem = path.rpartition("/")
    inside = _inside(folder, folded) if slash else folded
    words = _WORD.findall(stem)
    likely = [name for name, below in inside.items() if all(word in below for word in words)]
    as_whole = [re.compile(r"(?<![^ |])" + r"\|?".join(map(re.escape, word)) + r"(?![^ |])") for word in words]
    found = [name for name in likely if _fits(as_whole, plain[name], inside[name].count("/"))]
    if words and found:
        return _only(wanted, found)
    stems: dict[str, str] = {}
    for name, other in folded.items():
        stems.setdefault(other.rpartition("/")[2], name)
    near = [stems[other] for other in difflib.get_close_matches(stem, stems, MAX_SHOWN, 0.6)]
    said = f"the nearest: {_list(near)}" if near else f"there are {len(names)} others" if names else "there are none"
    raise ValueError(f"there is no LoRA {wanted[:100]!r} in the loras folders; {said}")


def _only(wanted: str, found: Sequence[str]) -> str:
    if len(found) == 1:
        return found[0]
    raise ValueError(f"{wanted[:100]!r} may be any of {len(found)} LoRAs: {_list(found)}; write more of the name")


def _plain(name: str) -> str:
    path = unicodedata.normalize("NFC", name.strip().replace("\\", "/"))
    return path[: -len(SUFFIX)] if path.lower().endswith(SUFFIX) else path


def _folded(name: str) -> str:
    return " ".join(re.sub(r"[_\-\s]+", " ", _plain(name).casefold()).split())


def _inside(folder: str, paths: dict[str, str]) -> dict[str, str]:
    """The names whose paths lie in a folder, and what is left of these below it."""
    found = {name: f"/{path}".partition(f"/{folder}/")[2] for name, path in paths.items()}
    return {name: below for name, below in found.items() if below}


def _fits(words: Sequence[re.Pattern[str]], path: str, folders: int) -> bool:
    """Whether these words are in a path's file name and the last so many folders; they begin and end at borders."""
    parts = path.split("/")[-folders - 1 :]
    bordered = " ".join(_BORDER.sub("|", word) for part in parts for word in _WORD.findall(part)).casefold()
    return all(word.search(bordered) for word in words)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_SHOWN]) + (", …" if len(names) > MAX_SHOWN else "")
