"""Named block weights: this pack's own, and the user's from one text file.

* ``PRESETS``: name → the texts it stands for, of which the first that fits the model counts.
* ``parse_presets``, ``read_presets``: such a table from text, from a file.
* ``find``: the texts of a name. Letters may be large or small where that leaves no doubt.

The file has a preset a line, ``NAME: vector or rules``, and ``#`` before comments; lines of sd-webui-lora-block-weight
(``OUTD:1,0,0,…``) are read as they are. A name may stand on several lines, one for each kind of model. A preset of the
user's own takes the place of one of this pack of that name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path

MAX_BYTES, MAX_LINES, MAX_LENGTH = 1 << 20, 2000, 8000
_NAME = re.compile(r"\w(?:[\w .+@-]{0,58}[\w+])?")

# The vectors are those that sd-webui-lora-block-weight comes with, 17 long for SD1.5, and the same parts of SDXL.
_TEXT = """
INS: 1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0
INS: 1,1,1,0,0,0,0,0,0,0,0,0
IND: 1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0
IND: 1,0,0,1,1,0,0,0,0,0,0,0
INALL: 1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0
INALL: 1,1,1,1,1,0,0,0,0,0,0,0
MIDD: 1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0
MIDD: 1,0,0,1,1,1,1,1,1,0,0,0
OUTD: 1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0
OUTD: 1,0,0,0,0,0,1,1,1,0,0,0
OUTS: 1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1
OUTS: 1,0,0,0,0,0,0,0,0,1,1,1
OUTALL: 1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1
OUTALL: 1,0,0,0,0,0,1,1,1,1,1,1
FLUXALL: double=1, single=1
FLUX-DOUBLE: single=0
FLUX-DOUBLE-FRONT: all=0, base=1, double.0-6=1
FLUX-DOUBLE-MID: all=0, base=1, double.7-12=1
FLUX-DOUBLE-TAIL: all=0, base=1, double.13-18=1
FLUX-SINGLE: double=0
FLUX-SINGLE-1TO10: all=0, base=1, single.0-9=1
FLUX-SINGLE-11TO20: all=0, base=1, single.10-19=1
FLUX-SINGLE-21TO30: all=0, base=1, single.20-29=1
FLUX-SINGLE-31TO38: all=0, base=1, single.30-37=1
ATTN: all=0, attn=1
FF: all=0, ff=1
"""


def parse_presets(text: str, where: str) -> dict[str, tuple[str, ...]]:
    """The presets in ``text``. Raises ValueError that begins with ``where`` and the number of the line."""
    lines = text.splitlines()
    if len(lines) > MAX_LINES:
        raise ValueError(f"{where}: {len(lines)} lines, expected at most {MAX_LINES}")
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        name, colon, body = (part.strip() for part in line.partition(":"))
        if not colon or not body:
            raise ValueError(
                f"{where}, line {number} ({line[:60]!r}): expected NAME: weights; put # before what is a comment"
            )
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{where}, line {number}: {name[:60]!r} is no name for a preset; use letters, digits and . + - @ _"
            )
        if len(body) > MAX_LENGTH:
            raise ValueError(f"{where}, line {number}: {len(body)} letters, expected at most {MAX_LENGTH}")
        found[name] = (*found.get(name, ()), body)
    return found


def read_presets(path: str | os.PathLike) -> dict[str, tuple[str, ...]]:
    """``PRESETS`` with those of a file, which need not exist. Raises ValueError that names the file."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path.name}: the file is larger than {MAX_BYTES} bytes; leave some presets out")
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return dict(PRESETS)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name}: this is no text; save the file as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path.name}: cannot be read: {error.strerror}") from error
    return PRESETS | parse_presets(text, path.name)


def find(name: str, presets: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The texts of a preset. Raises ValueError with the nearest name."""
    if name in presets:
        return presets[name]
    alike = [known for known in presets if known.casefold() == name.casefold()]
    if len(alike) == 1:
        return presets[alike[0]]
    near = alike or difflib.get_close_matches(name.upper(), presets, 3)
    hint = f"do you mean {' or '.join(near)}?" if near else f"there are {', '.join(sorted(presets)[:100])}"
    raise ValueError(f"there is no preset {name[:60]!r}; {hint}")


def _even(weight: str) -> tuple[str, ...]:
    """The same weight everywhere: as BASE of vectors is, it is for the text encoders too."""
    return (f"all={weight}, te={weight}",)


PRESETS: dict[str, tuple[str, ...]] = {
    "NONE": _even("0"),
    "ALL": _even("1"),
    "ALL0.5": _even("0.5"),
    **parse_presets(_TEXT, "presets"),
}
