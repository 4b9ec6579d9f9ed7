"""``optimizer_args`` as text: ``d_coef=2 safeguard_warmup=True betas=0.9,0.99``.

* Values are literals (numbers, True, False, None, words, tuples with or without brackets); nothing is evaluated.
* A name the optimizer does not know is an error that lists those it does and names the nearest.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import re
from itertools import zip_longest
from typing import Any

from ..options import OptionError

# what the run decides itself, and what has no effect or does harm in it
OURS = frozenset(
    ("self", "params", "lr", "foreach", "fused", "capturable", "differentiable", "maximize", "args", "optim_bits")
    + ("fsdp_in_use", "fused_back_pass", "stochastic_rounding", "bf16_stochastic_round", "warmup_steps", "model")
)
# what to say of them instead
ELSEWHERE = {
    "lr": "the trainer's learning_rate",
    "warmup_steps": "the option warmup_steps",
    "stochastic_rounding": "parameter_dtype of the run settings",
    "bf16_stochastic_round": "parameter_dtype of the run settings",
}
_NAME = re.compile(r"(?:^|(?<=[\s,;]))\s*([A-Za-z_]\w*)\s*=(?!=)")


def parse_arguments(text: str) -> dict[str, Any]:
    """name -> value. Raises OptionError on text that is not names and literals."""
    names = list(_NAME.finditer(text))
    if text.strip() and (not names or text[: names[0].start()].strip()):
        raise OptionError(f"optimizer_args is {text!r}, expected name=value pairs such as d_coef=2 betas=0.9,0.99")
    found: dict[str, Any] = {}
    for match, following in zip_longest(names, names[1:]):
        end = following.start() if following else len(text)
        name, value = match.group(1), text[match.end() : end].strip(" \t\r\n,;")
        if name in found:
            raise OptionError(f"optimizer_args is {text!r}, expected {name} once")
        found[name] = _literal(name, value)
    return found


def _literal(name: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        pass
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    if re.fullmatch(r"[+-]?inf(inity)?", text, re.IGNORECASE):
        return float(text)
    if re.fullmatch(r"[A-Za-z_][\w.-]*", text):
        return text
    raise OptionError(
        f"optimizer_args is {name}={text}, expected a number, True, False, None, a word, or several by comma"
    )


def known_arguments(kind: type) -> dict[str, Any]:
    """name -> default of everything ``optimizer_args`` may set for an optimizer class."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(kind).parameters.items()
        if name not in OURS and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def read_arguments(text: str, kind: type, optimizer: str) -> dict[str, Any]:
    """The arguments in ``text``, all of them known to ``kind``."""
    arguments, known = parse_arguments(text), known_arguments(kind)
    for name in arguments:
        if name in known:
            continue
        if name in ELSEWHERE:
            raise OptionError(f"optimizer_args has {name}, expected it where it belongs: {ELSEWHERE[name]}")
        near = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f" (nearest: {near[0]})" if near else ""
        raise OptionError(f"optimizer_args has {name}, expected one of {optimizer}'s: {', '.join(known)}{hint}")
    return arguments
