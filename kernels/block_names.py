"""What people call the blocks of a model, in the trainer and in the loader.

* ``resolve``: names separated by commas → the ids of the blocks that are meant, ``BASE`` for what lies in no block.

A name is, in any case of letters,
- ``base``, ``all``, a role (``in``, ``mid``, ``out``, ``trunk``, ``aux``) or a group (``double_blocks``, ``double``,
  ``input_blocks``, ``layers``; a part of a longer one will do where it is the only such: ``llm_adapter``);
- one of these with a number: ``double_blocks.7``, ``double.7``, ``IN04``, ``M00``, ``OUT3``;
- or with a range, both ends included: ``IN4-8``, ``IN04-IN08``, ``double_blocks.0-7``, ``single.10-`` (to the last).

In models without such roles ``in``, ``mid`` and ``out`` are the thirds of the trunk, in the model's order.
Blocks of a role that has a single group are counted as that group counts them, others in the model's order.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from .blocks import Block

BASE = "base"
ROLES = ("in", "mid", "out", "trunk", "aux")
THIRDS = ROLES[:3]
_SHORT = {"m": "mid", "middle": "mid", "b": BASE, "d": "double", "s": "single"}
_NUMBERED = re.compile(r"(?P<name>.*?)[._ ]?(?P<first>\d{1,4})(?P<range>-(?:(?P<again>\D*?)[._ ]?(?P<last>\d{1,4}))?)?")
_MAX_LENGTH = 2000  # of a list of names


def resolve(text: str, blocks: Sequence[Block]) -> set[str]:
    """Ids of the blocks that ``text`` names. Raises ValueError saying what is not known and what is nearest."""
    if len(text) > _MAX_LENGTH:
        raise ValueError(f"the names of blocks are {len(text)} letters long, expected at most {_MAX_LENGTH}")
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ValueError(f"no block is named; {described(blocks)}")
    known = _known(blocks)
    return set().union(*(_meant(name, known, blocks) for name in names))


def described(blocks: Sequence[Block]) -> str:
    """The blocks that there are, in words."""
    groups: dict[str, list[Block]] = {}
    for block in blocks:
        groups.setdefault(block.group, []).append(block)
    found = [BASE]
    for group, members in groups.items():
        role = f" ({members[0].role})"
        found.append(f"{group}.0-{len(members) - 1}{role}" if members[0].id != group else f"{group}{role}")
    thirds = not any(block.role in THIRDS for block in blocks) and sum(block.role == "trunk" for block in blocks) > 2
    return f"this model has {', '.join(found)}" + ("; in, mid and out are thirds of its trunk" if thirds else "")


def _known(blocks: Sequence[Block]) -> dict[str, dict[str, str]]:
    """name in small letters → number (or nothing) → id, for all that may stand before a number."""
    known: dict[str, dict[str, str]] = {BASE: {"": BASE}, "all": {"": BASE}}
    known["all"] |= {block.id: block.id for block in blocks}
    groups: dict[str, dict[str, str]] = {}
    for block in blocks:
        number = block.id.removeprefix(block.group).lstrip(".") or "0"
        groups.setdefault(block.group, {})[number] = block.id
    for role in ROLES:
        own = [block for block in blocks if block.role == role]
        if own and len({block.group for block in own}) == 1:
            known[role] = groups[own[0].group]
        elif own:
            known[role] = {str(number): block.id for number, block in enumerate(own)}
    trunk = [block.id for block in blocks if block.role == "trunk"]
    if len(trunk) >= len(THIRDS) and not any(block.role in THIRDS for block in blocks):
        ends = [round(len(trunk) * part / len(THIRDS)) for part in range(len(THIRDS) + 1)]
        for role, first, end in zip(THIRDS, ends, ends[1:], strict=False):
            known[role] = {str(number): block for number, block in enumerate(trunk[first:end])}
    for name, members in _unambiguous(groups).items():
        known.setdefault(name, members)
    for short, name in _SHORT.items():
        if name in known:
            known.setdefault(short, known[name])
    return known


def _unambiguous(groups: Mapping[str, dict[str, str]]) -> dict[str, dict[str, str]]:
    """Groups by their whole names, and by parts of them that no other group has."""
    parts: dict[str, set[str]] = {}
    for group in groups:
        for part in group.lower().split("."):
            for spelled in (part, re.sub(r"_(?:blocks?|layers?)$", "", part)):
                parts.setdefault(spelled, set()).add(group)
    found = {group.lower(): members for group, members in groups.items()}
    for part, owners in parts.items():
        if len(owners) == 1:
            found.setdefault(part, groups[next(iter(owners))])
    return found


def _meant(name: str, known: Mapping[str, Mapping[str, str]], blocks: Sequence[Block]) -> set[str]:
    lower = name.lower()
    if lower in known:
        return set(known[lower].values())
    match = _NUMBERED.fullmatch(lower)
    if match is None or match["name"] not in known or match["name"] in (BASE, "all"):
        raise ValueError(f"there is no block {name[:60]!r}{_nearest(lower, known, match)}; {described(blocks)}")
    members = {int(number): block for number, block in known[match["name"]].items()}
    first, last = int(match["first"]), int(match["first"])
    if match["range"]:
        if match["again"] and known.get(match["again"]) is not known[match["name"]]:
            raise ValueError(f"{name[:60]!r} begins in one group of blocks and ends in another; write two names")
        last = int(match["last"]) if match["last"] else max(members)
    if missing := [number for number in (first, last) if number not in members]:
        there = f"{min(members)} to {max(members)}" if len(members) > 1 else str(min(members))
        raise ValueError(f"{name[:60]!r}: there is no number {missing[0]}, expected {there}; {described(blocks)}")
    if first > last:
        raise ValueError(f"{name[:60]!r} ends before it begins; write the smaller number first")
    return {block for number, block in members.items() if first <= number <= last}


def _nearest(name: str, known: Mapping[str, Mapping[str, str]], match: re.Match | None) -> str:
    """The known name that is most like it, with the numbers it came with."""
    word = match["name"] if match else name
    found = difflib.get_close_matches(word, known, 1)
    if not found:
        return ""
    return f", do you mean {found[0] + ('.' + name[len(word):].lstrip('._ ') if match else '')!r}"
