"""Rules that choose layers by their paths, as people write them.

* ``parse``: text, one rule a line → ``Rule``s. A rule is a part of a path (``attn1.to_q``), a pattern for the whole
  path with * and ? (``*.attn?.to_q``), ``re:`` and a regular expression that is searched in the path, or ``block:`` and
  names of blocks (``block_names``). A leading minus leaves layers out. Paths are without ``diffusion_model.``, unless a
  rule has it.
* ``chosen``: the layers that the rules choose among others. A rule without effect is an error.

Regular expressions come from a graph and cannot be stopped once they run: those that may take ages are refused.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .block_names import BASE, resolve
from .blocks import MODEL_PREFIX, Block
from .layers import Target

MAX_RULES, MAX_LENGTH = 200, 200
_MAX_BITS = 24  # of the ways in which an expression can be tried on a path, some tenths of a second for each
_BITS_OF_REPEAT = 6.6  # a path has a hundred letters or so
_FRONT, _BACK = re.compile(r"^\^?(?:\.\*\??)+"), re.compile(r"(?<!\\)(?:\.\*\??)+\$?$")  # no matter in a search
_HARMLESS = re.compile(r"\\d(?:[*+]|\{\d,?\d?\})|\(\?|(?<=[*+])\?|\\.")  # numbers are short
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")


@dataclass(frozen=True)
class Rule:
    line: int
    text: str
    leaves_out: bool
    fits: Callable[[Target], bool]

    def __str__(self) -> str:
        return f"line {self.line} ({self.text!r})"


def parse(text: str, blocks: Sequence[Block]) -> list[Rule]:
    """The rules in ``text``; empty lines count for nothing. Raises ValueError naming the line."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if len(lines) > MAX_RULES:
        raise ValueError(f"{len(lines)} rules, expected at most {MAX_RULES}")
    return [_rule(number, line, blocks) for number, line in lines]


def chosen(layers: Sequence[Target], rules: Sequence[Rule], among: str) -> list[Target]:
    """The layers that a rule names (all of them if rules only leave out) and none leaves out.

    Raises ValueError naming a rule that changes nothing; ``among`` says in words what ``layers`` are.
    """
    naming = [rule for rule in rules if not rule.leaves_out]
    for rule in naming:
        if not any(rule.fits(layer) for layer in layers):
            raise ValueError(f"{rule} matches none of {among}{_nearest(rule.text, layers)}")
    found = [layer for layer in layers if not naming or any(rule.fits(layer) for rule in naming)]
    for rule in rules:
        if rule.leaves_out and not any(rule.fits(layer) for layer in found):
            there = "those that the other rules chose" if naming else among
            raise ValueError(f"{rule} leaves out nothing of {there}{_nearest(rule.text.lstrip('- '), found)}")
    kept = [layer for layer in found if not any(rule.leaves_out and rule.fits(layer) for rule in rules)]
    if not kept:
        raise ValueError(f"the rules leave none of {among}")
    return kept


def _rule(number: int, line: str, blocks: Sequence[Block]) -> Rule:
    leaves_out = line.startswith("-")
    body = line.removeprefix("-").strip()
    try:
        return Rule(number, line[:MAX_LENGTH], leaves_out, _fits(body, blocks))
    except ValueError as error:
        raise ValueError(f"line {number} ({line[:60]!r}): {error}") from error


def _fits(body: str, blocks: Sequence[Block]) -> Callable[[Target], bool]:
    if not body:
        raise ValueError("a minus with nothing behind it; write which layers to leave out")
    if len(body) > MAX_LENGTH and not body.startswith("block:"):
        raise ValueError(f"it is {len(body)} letters long, expected at most {MAX_LENGTH}")
    if body.startswith("block:"):
        ids = resolve(body.removeprefix("block:"), blocks)
        return lambda layer: (layer.block or BASE) in ids
    if body.startswith("re:"):
        expression = body.removeprefix("re:").strip()
        if not expression:
            raise ValueError("re: with nothing behind it; write a regular expression")
        search = _checked(expression).search
        return lambda layer: search(_read(layer, body)) is not None
    if "*" in body or "?" in body:
        match = re.compile(fnmatch.translate(body.replace("[", "[[]"))).match
        return lambda layer: match(_read(layer, body)) is not None
    return lambda layer: body in _read(layer, body)


def _read(layer: Target, body: str) -> str:
    """The path that a rule is for: "ff" is no part of "diffusion_model", unless a rule says that itself."""
    return layer.path if MODEL_PREFIX[:-1] in body else layer.path.removeprefix(MODEL_PREFIX)


def _checked(expression: str) -> re.Pattern:
    """Compiled. Raises ValueError where it is none, or may take too long."""
    simple = _BACK.sub("", _FRONT.sub("", expression))
    risky = _HARMLESS.sub("", simple)
    repeats, choices = (sum(map(risky.count, signs)) for signs in ("*+{", "?|"))
    if _REPEATED_GROUP.search(simple):
        raise ValueError("a group that repeats may take forever; write it without * or + behind a parenthesis")
    if _BITS_OF_REPEAT * (repeats + 1) + choices > _MAX_BITS:
        raise ValueError("so many of * + ? | may take forever; use patterns with * instead of re:, on several lines")
    try:
        return re.compile(simple)
    except re.error as error:
        raise ValueError(f"this is no regular expression: {error}") from error


def _nearest(text: str, layers: Iterable[Target]) -> str:
    """The part of a path that is most like ``text``, in words; empty where nothing is."""
    if text.startswith(("block:", "re:")):
        return ""
    if "," in text:
        return "; write one rule a line"
    wanted = text.strip("*?.").lower()
    length = wanted.count(".") + 1
    parts: dict[str, str] = {}
    for layer in layers:
        segments = layer.path.split(".")
        for n in range(len(segments) - length + 1):
            part = ".".join(segments[n : n + length])
            parts.setdefault(part.lower(), part)
    found = difflib.get_close_matches(wanted, parts, 1)
    return f"; do you mean {parts[found[0]]!r}?" if found else ""
