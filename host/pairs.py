"""A LoRA for two MODELs, one for high and one for low noise (Wan 2.2): which file goes where, and putting it there.

* ``Choice``: what was chosen: files, LoRAs of the graph, sides. ``route`` → ``Route``: what each MODEL gets, and why.
* ``apply_pair``: both MODELs and the CLIP with it.
* ``parts_of``: the one or two parts of a LoRA, and what tells their sides.
* ``state``: changes when the files that count do.

What tells the side of a file: its keys, then its metadata, its name, the name it was made under; else it is for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..kernels.safetensors_io import LoraModel, load_tensors
from ..kernels.sidecars import Facts
from ..kernels.sides import HIGH, LOW, OTHER, Said, halves, partners, side_by_metadata, side_by_name, side_by_title
from . import lora_cache, loras
from .applied import account, log
from .apply import Strengths, apply_lora
from .lora_cache import Loaded

FROM_SOCKETS, FIND, NONE = "(from the sockets)", "(find it)", "(none)"
AUTOMATIC, BOTH = "automatic", "both"
SIDES = {
    AUTOMATIC: "by its keys, its metadata or its name; both MODELs get what none of these tells",
    HIGH: "the MODEL for high noise, the first part of the run",
    LOW: "the MODEL for low noise, the second part",
    BOTH: "both MODELs get it",
}
CALLED = {HIGH: "high noise", LOW: "low noise"}
BY_KEYS = "by its keys"
_SHOWN = 8  # candidates in an error


@dataclass(frozen=True)
class Choice:
    """Names of files and runs as ``loras.sources`` has them, and LoRAs of the graph."""

    lora_name: str = FROM_SOCKETS
    partner: str = FIND
    side: str = AUTOMATIC
    lora_high: Any = None
    lora_low: Any = None

    def __post_init__(self) -> None:
        if self.side not in SIDES:
            raise ValueError(f"side: {str(self.side)[:60]!r} is none; choose one of {', '.join(SIDES)}")

    @property
    def sockets(self) -> dict[str, Any]:
        found = {HIGH: self.lora_high, LOW: self.lora_low}
        return {side: lora for side, lora in found.items() if lora is not None}


@dataclass(frozen=True)
class Part:
    """What one MODEL gets. ``why`` it is this one, in words; ``facts`` of the whole file."""

    lora: Loaded
    why: str

    @property
    def name(self) -> str:
        return self.lora.name


@dataclass
class Route:
    """Side → what its MODEL gets; ``facts`` of everything that is used."""

    parts: dict[str, Part] = field(default_factory=dict)
    facts: list[Facts] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def put(self, side: str, lora: Loaded, why: str, option: str) -> None:
        """Raises ValueError naming the ``option`` where something else is there already."""
        if side in self.parts:
            raise ValueError(
                f"{option}: {lora.name} is for {CALLED[side]} ({why}), and so is {self.parts[side].name} "
                f"({self.parts[side].why}); choose one of them, or the right one in side"
            )
        self.parts[side] = Part(lora, why)


def route(choice: Choice) -> Route:
    """Raises ValueError naming the option where that cannot be done as chosen."""
    found = Route()
    for side, lora in choice.sockets.items():
        _of_socket(found, side, lora)
    if choice.lora_name == FROM_SOCKETS:
        if not choice.sockets:
            raise ValueError("lora_name: choose a file, or connect lora_high or lora_low")
        if choice.partner not in (FIND, NONE):
            raise ValueError("partner: it belongs to a file in lora_name; choose that file there, and its partner here")
        if choice.side != AUTOMATIC:
            found.notes.append(f"side: {choice.side} has no effect without a file; the sockets tell the sides")
    elif len(choice.sockets) == 2:
        found.notes.append(f"lora_name: {choice.lora_name} is not used while both sockets are connected")
    else:
        _of_files(found, choice)
    for side in OTHER:
        if side not in found.parts:
            found.notes.append(f"the {CALLED[side]} MODEL stays as it is")
    return found


def _of_socket(found: Route, side: str, lora: Any) -> None:
    name = f"the LoRA at lora_{side}"
    model = load_tensors(lora)
    loaded = lora_cache.of(model, name)
    parts = halves(model, model.metadata)
    if parts and side not in parts:
        raise ValueError(f"lora_{side}: its keys are for {CALLED[OTHER[side]]}; connect it to lora_{OTHER[side]}")
    if parts:
        loaded = _half(loaded, parts[side])
        if OTHER[side] in parts:
            found.notes.append(f"lora_{side}: of its two halves only the one for {CALLED[side]} is used")
    else:
        said = side_by_metadata(model.metadata)
        if said.side == OTHER[side]:
            found.notes.append(f"lora_{side}: it seems made for {CALLED[said.side]} ({said.evidence})")
    found.facts.append(loaded.facts())
    found.put(side, loaded, "by its socket", f"lora_{side}")


def _of_files(found: Route, choice: Choice) -> None:
    names = loras.sources()
    loaded = lora_cache.get(choice.lora_name)
    found.facts.append(loaded.facts())
    ours = parts_of(loaded, names, found.notes)
    if choice.side != AUTOMATIC:
        ours = _as_chosen(ours, choice)
    if len(ours) == 2:
        if choice.partner not in (FIND, NONE):
            raise ValueError(f"partner: {choice.lora_name} holds both sides itself; choose {NONE}")
        for lora, said in ours:
            found.put(said.side, lora, said.evidence, "lora_name")
        return
    ((lora, said),) = ours
    partner = _partner(found, choice, said, names)
    if partner is not None:
        said, theirs = _both_sides(found, said, partner[1])
        found.put(said.side, lora, said.evidence, "lora_name")
        found.put(theirs.side, partner[0], theirs.evidence, "partner")
    elif said.side:
        found.put(said.side, lora, said.evidence, "lora_name")
    else:
        for side in OTHER:
            if side not in found.parts:
                found.put(side, lora, said.evidence or "nothing tells which one it is for", "lora_name")


def parts_of(lora: Loaded, names: Sequence[str], notes: list[str]) -> list[tuple[Loaded, Said]]:
    """The one or two parts of a file, and what tells their sides; adds to ``notes`` what contradicts it."""
    parts = halves(lora.tensors, lora.metadata)
    if not parts:
        return [(lora, _side_of(notes, lora, names))]
    return [(_half(lora, part), Said(side, BY_KEYS)) for side, part in parts.items()]


def _as_chosen(ours: list[tuple[Loaded, Said]], choice: Choice) -> list[tuple[Loaded, Said]]:
    """What ``side`` leaves of a file."""
    by_keys = len(ours) == 2 or ours[0][1].evidence == BY_KEYS
    if not by_keys:
        return [(ours[0][0], Said(choice.side if choice.side in OTHER else "", "chosen"))]
    kept = ours if choice.side == BOTH else [(lora, said) for lora, said in ours if said.side == choice.side]
    if not kept or (choice.side == BOTH and len(ours) == 1):
        raise ValueError(
            f"side: the keys of {choice.lora_name} are for {CALLED[ours[0][1].side]} only; choose that, or {AUTOMATIC}"
        )
    return kept


def _half(lora: Loaded, part: tuple[Mapping[str, Any], Mapping[str, str]]) -> Loaded:
    return lora_cache.of(LoraModel(*part, trained=lora.trained), lora.name)


def _side_of(notes: list[str], lora: Loaded, names: Sequence[str]) -> Said:
    by_metadata, by_name = side_by_metadata(lora.metadata), side_by_name(lora.name, names)
    if by_metadata.evidence:
        if by_metadata.side and by_name.side == OTHER[by_metadata.side]:
            notes.append(
                f"{lora.name}: its name says {CALLED[by_name.side]}, but it was {by_metadata.evidence}; "
                "choose the right one in side"
            )
        return by_metadata
    return by_name if by_name.side else side_by_title(lora.metadata)


def _partner(found: Route, choice: Choice, said: Said, names: list[str]) -> tuple[Loaded, Said] | None:
    if choice.partner == NONE:
        return None
    if choice.partner != FIND:
        if choice.side == BOTH:
            raise ValueError(f"partner: side says that both MODELs get {choice.lora_name}; choose {NONE}")
        return _only(found, choice.partner, names)
    if not said.side or OTHER[said.side] in found.parts:
        return None
    candidates = partners(choice.lora_name, said.side, names)
    if len(candidates) > 1:
        shown = ", ".join(candidates[:_SHOWN]) + (", …" if len(candidates) > _SHOWN else "")
        raise ValueError(
            f"partner: {choice.lora_name} may belong to any of {len(candidates)} files: {shown}; choose one there"
        )
    if not candidates:
        found.notes.append(f"no partner found for {choice.lora_name}; choose one in partner if there is one")
        return None
    return _only(found, candidates[0], names)


def _only(found: Route, name: str, names: list[str]) -> tuple[Loaded, Said]:
    """A partner, which is for one side."""
    try:
        lora = lora_cache.get(name)
    except ValueError as error:
        raise ValueError(f"partner: {str(error).removeprefix('lora_name: ')}") from error
    found.facts.append(lora.facts())
    parts = parts_of(lora, names, found.notes)
    if len(parts) > 1:
        raise ValueError(f"partner: {name} holds both sides itself; choose it in lora_name, and {NONE} in partner")
    return parts[0]


def _both_sides(found: Route, ours: Said, theirs: Said) -> tuple[Said, Said]:
    """Of two files; one that tells its side tells the other's."""
    if not ours.side and not theirs.side:
        found.notes.append(
            "nothing tells which of the two files is for high noise: it is taken to be the one in lora_name"
        )
        return Said(HIGH, "as the first of two"), Said(LOW, "as the second of two")
    if not ours.side:
        ours = Said(OTHER[theirs.side], "as its partner's counterpart")
    if not theirs.side:
        theirs = Said(OTHER[ours.side], "as its partner's counterpart")
    return ours, theirs


def state(lora_name: Any, partner: Any) -> str:
    """Changes with the files that count; for any values (None is one that is not known yet), without raising."""
    names = [lora_name] if partner in (FIND, NONE) else [lora_name, partner]
    try:
        known = loras.sources() if partner == FIND else []
    except OSError:  # a run's folder that vanishes just now
        known = []
    if isinstance(lora_name, str) and lora_name in known:
        names += [other for side in OTHER for other in partners(lora_name, side, known)]
    return "\n".join(f"{name!r:.300} {loras.state_of(name)}" for name in names)


# -- putting it there


def apply_pair(
    models: Mapping[str, Any],
    clip: Any | None,
    choice: Choice,
    strengths: Mapping[str, Strengths],
    engine: str,
    pictured: bool = False,
) -> tuple[dict[str, Any], Any | None, list[str], str, list[Image.Image | None]]:
    """(MODELs by side, CLIP, trigger words, report, pictures)."""
    chosen = route(choice)
    lines: list[str] = []
    pictures: list[Image.Image | None] = []
    done = dict(models)
    new_clip, owner = clip, None
    changes = False
    for side in filter(chosen.parts.get, OTHER):
        part = chosen.parts[side]
        try:
            done[side], with_text, applied = apply_lora(models[side], clip, part.lora, strengths[side], engine)
        except ValueError as error:
            raise ValueError(f"{CALLED[side]}, {part.name}: {error}") from error
        if applied.clip_weights or applied.words:
            if owner is None:
                new_clip, owner = with_text, part
            elif owner.lora is not part.lora:
                lines.append(f"the CLIP has the text encoder's part of {owner.name}; that of {part.name} is left out")
        changes = changes or any(strength.schedules for strength in applied.strengths.values())
        name = f"{CALLED[side]}: {part.name}"
        own = strengths[side]
        text, image = account(f"{name} ({part.why})", applied, None, models[side], own, pictured, title=name)
        lines.append(text)
        pictures.append(image)
        log(name, applied)
    words = list(dict.fromkeys(word for facts in chosen.facts for word in facts.words))
    lines += next((own.course.without_effect(changes) for own in strengths.values()), [])
    lines += [*chosen.notes, *dict.fromkeys(note for facts in chosen.facts for note in facts.notes)]
    lines += [line for facts in chosen.facts if (line := facts.line())]
    return done, new_clip, words, "\n".join(dict.fromkeys(lines)), pictures
