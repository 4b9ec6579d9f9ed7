"""Two models, parameter by parameter: what ``extract`` is given.

* ``changes_between``: every parameter that both have, weights together with their biases, in the order of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor

from .extract import Change

Read = Callable[[str], Tensor]
Shapes = Mapping[str, Sequence[int]]


def changes_between(
    base: tuple[str, Shapes, Read], tuned: tuple[str, Shapes, Read], conv: bool = True
) -> tuple[list[Change], list[str]]:
    """(the changes, what was left out). Each of both is what it is called, parameter → shape, and how one is read.

    Raises ValueError where they are no two versions of one model.
    """
    (base_name, before, old), (tuned_name, after, new) = base, tuned
    shared = [key for key in before if key in after and tuple(before[key]) == tuple(after[key])]
    if 2 * len(shared) < len(before):
        raise ValueError(
            f"{tuned_name} and {base_name} are of different architectures: {len(shared)} of {len(before)} parameters "
            "have the same name and shape in both; give a model and what it was tuned from"
        )
    known = set(shared)
    notes = []
    if others := [key for key in before if key not in known]:
        notes.append(
            f"{len(others)} parameters of {base_name} are otherwise or not at all in {tuned_name} and left out "
            f"({others[0]} first)"
        )
    if kernels := [key for key in shared if not conv and _has_kernel(before[key])]:
        notes.append(f"conv is off: {len(kernels)} convolutions were left out")
    left = {*kernels, *(f"{key.removesuffix('.weight')}.bias" for key in kernels)}
    changes = []
    for key in shared:
        owner, _, name = key.rpartition(".")
        if key in left or (name == "bias" and f"{owner}.weight" in known):
            continue
        bias = f"{owner}.bias" if name == "weight" and f"{owner}.bias" in known else ""
        both = (partial(old, bias), partial(new, bias)) if bias else None
        changes.append(Change(owner if name == "weight" else key, partial(old, key), partial(new, key), both))
    return changes, notes


def _has_kernel(shape: Sequence[int]) -> bool:
    return len(shape) > 2 and max(shape[2:]) > 1
