"""What the parts of ``<lora:name:…>`` mean to whom.

* ``DIALECTS``: the programs whose habits contradict each other, ``HABITS``: how.
* ``TABLE``: every part of a tag, its meaning and an example, in the dialects that give it that meaning.
  ``dialect_table`` is the same as Markdown.
* ``weights``: a strength from its text, in the way of a dialect.
* ``ELEMENTALS``: the named sets of elements that people carry.

What only one of them knows is understood in all. Only these depend on the dialect: which number comes first, whether
te= is for the MODEL too, whether block weights may stand there without a name, and how places in a run are counted.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .schedule import Point, Schedule, fixed, parse, simplest, weight_of

SDNEXT, A1111, LORACTL, PROMPT_CONTROL = DIALECTS = ("sdnext", "a1111", "loractl", "prompt-control")
HABITS = {  # what a dialect decides, for people
    SDNEXT: "two numbers are MODEL and text encoders; steps count from 1; weights are held until the next place",
    A1111: "two numbers are text encoders and MODEL; te= alone is for both; a part without a name is block "
    "weights (lbw)",
    LORACTL: "two numbers are text encoders and MODEL; te= alone is for both; weights over the run are blended in "
    "straight lines",
    PROMPT_CONTROL: "two numbers are MODEL and text encoders; places count from 0 and weights are held",
}
TE_FIRST = (A1111, LORACTL)  # the first number is te, and unet is what te has come to unless it is given
ENCODERS = ("clip_l", "clip_g", "t5xxl")  # names of text encoders that are known without a CLIP
SIDES = ("high", "low")
ELEMENTALS = {
    "ATTNDEEPON": "IN05-OUT05:attn:1",
    "ATTNDEEPOFF": "IN05-OUT05:attn:0",
    "PROJDEEPOFF": "IN05-OUT05:proj:0",
}
_PLAIN = re.compile(r"\d{1,12}(?:\.\d{0,12})?|\.\d{1,12}", re.ASCII)


class TagError(ValueError):
    """A tag that cannot be understood; says which one, why, and what to write."""


@dataclass(frozen=True)
class Row:
    """One part of a tag: ``names`` are what may stand before its "=", the first of them is ours; ``model`` is the one
    that the example is for, if SD1.5 will not do."""

    part: str
    meaning: str
    example: str
    names: tuple[str, ...] = ()
    dialects: tuple[str, ...] = DIALECTS
    model: str = ""


TABLE = (
    Row("`<lora:name>`", "the LoRA, at 1; `<lyco:` is the same", "<lora:cat>"),
    Row(
        "`<loractl:name:…>`",
        "a tag of prompt-control's, read in its way wherever it stands; in the dialect loractl it is read in that way",
        "<loractl:cat:0@0,1@0.5>",
    ),
    Row("first number", "strength of everything", "<lora:cat:0.7>"),
    Row(
        "second number",
        "strength of the part on the text encoders; the first is then that of the part on the MODEL. SD.Next itself "
        "ignores a second number",
        "<lora:cat:0.7:0.4>",
        dialects=(SDNEXT, PROMPT_CONTROL),
    ),
    Row(
        "second number",
        "strength of the part on the MODEL; the first is then that of the part on the text encoders",
        "<lora:cat:0.4:0.7>",
        dialects=TE_FIRST,
    ),
    Row("what is no number", "block weights, as behind `lbw=`", "<lora:cat:1:1:OUTALL>", dialects=(A1111,)),
    Row(
        "`unet=`",
        "strength of the part on the MODEL, instead of the number's",
        "<lora:cat:unet=1.5>",
        ("unet", "model", "transformer", "dit"),
    ),
    Row(
        "`te=`, `clip=`",
        "strength of the part on the text encoders, instead of the number's; alone it leaves the MODEL at the number, "
        "as SD.Next's documentation has it. SD.Next itself gives it to the MODEL too where `unet=` is not written",
        "<lora:cat:te=0.5:unet=1.5>",
        ("te", "clip"),
        dialects=(SDNEXT, PROMPT_CONTROL),
    ),
    Row(
        "`te=`, `clip=`",
        "strength of the part on the text encoders, instead of the first number's; and of that on the MODEL, where "
        "neither `unet=` nor a second number says it",
        "<lora:cat:te=0.5>",
        dialects=TE_FIRST,
    ),
    Row(
        "`te1=` to `te9=`",
        "strength of the part on one text encoder, instead of that of all; also `text_encoder=` (the first), "
        "`text_encoder_2=` and the encoder's own name",
        "<lora:cat:te1=0.3:clip_g=0.8>",
        model="SDXL",
    ),
    Row(
        "`w@n,w@n`",
        "for each weight: held from the nth step on, steps count from 1; `0.5` or `50%` is a part of the run's steps, "
        "`s14.6` a noise level",
        "<lora:cat:te=0.1@1,0.6@6>",
        dialects=(SDNEXT, A1111),
    ),
    Row(
        "`w@n,w@n`",
        "blended in straight lines; if the last place is 1 or less, all are parts of two steps less than the run has, "
        "else steps counted from 0; no place is 1",
        "<lora:cat:0@0,1@0.5>",
        dialects=(LORACTL,),
    ),
    Row(
        "`w@n,w@n`",
        "held; if the last place is 1 or less, all are parts of the run's steps, else steps counted from 0; no place "
        "is 0. In prompt-control itself parts are ComfyUI's percents of the noise, which come at other steps under "
        "schedulers such as karras",
        "<lora:cat:0,1@0.5>",
        dialects=(PROMPT_CONTROL,),
    ),
    Row("`w~n;w~n`", "the same as `w@n,w@n`", "<lora:cat:0.2@10%;1~50%>"),
    Row(
        "`interpolation=`",
        "how the tag's weights go from one to the next: `hold`, `linear` or `cosine`",
        "<lora:cat:0@0%,1@50%:interpolation=cosine>",
        ("interpolation", "interp"),
    ),
    Row("`in=`", "strength of the blocks on the way in, instead of `unet=`", "<lora:cat:in=0:mid=1:out=0>", ("in",)),
    Row("`mid=`", "the same for those in the middle", "<lora:cat:0.8:mid=0.2>", ("mid",)),
    Row("`out=`", "the same for those on the way out", "<lora:cat:out=0.1@1,0.6@6>", ("out",)),
    Row(
        "`blocks=`, `lbw=`",
        "block weights, which multiply `unet=`: rules with commas or semicolons between, a vector, or the name of a "
        "preset. Weights over the run are written as in the dialect sdnext",
        "<lora:cat:1:lbw=1,1,1,1,1,1,0,0,0,0,0,0,1,1,1,1,1>",
        ("blocks", "lbw"),
    ),
    Row(
        "`lbwe=`",
        "`blocks:elements:weight`, which set the weight of these elements of these blocks; several names with spaces "
        f"between, NOT before them turns them around, none means all. Also {', '.join(ELEMENTALS)}",
        "<lora:cat:1:lbwe=IN05-OUT05:attn:0.3>",
        ("lbwe",),
    ),
    Row(
        "`x=`",
        "the weight of each X in a vector, 1 if it is not written",
        "<lora:cat:1:lbw=1,X,X,X,X,X,X,X-0.2,1,1,1,1,1,1,1,1,1:x=0.7>",
        ("x",),
    ),
    Row("`start=`", "nothing on the MODEL before this step or place", "<lora:cat:1:start=5>", ("start",)),
    Row("`stop=`", "nothing on the MODEL from this step or place on", "<lora:cat:1:stop=50%>", ("stop",)),
    Row("`step=`", "`a-b`: the same as `start=a:stop=b`", "<lora:cat:1:step=5-10>", ("step",)),
    Row(
        "`steps=`",
        "weights over the run that multiply `unet=`, written as in the dialect sdnext",
        "<lora:cat:1:steps=0.2@1,1@5>",
        ("steps",),
    ),
    Row(
        "`module=`",
        "only this part: `unet`, `te`, `te1` … or an encoder's own name; `transformer_2` is the MODEL for low noise",
        "<lora:cat:1:module=unet>",
        ("module",),
    ),
    Row("`high`, `low`", "only the MODEL for high noise, or for low noise, of two", "<lora:cat:1:low>"),
    Row(
        "`hr=`",
        "without effect, which is told: no second pass belongs to a prompt here; put the LoRA on that sampler's MODEL",
        "<lora:cat:1:hr=0.5>",
        ("hr",),
    ),
    Row("`hrunet=`", "likewise", "<lora:cat:1:hrunet=0.5>", ("hrunet",)),
    Row("`hrte=`", "likewise", "<lora:cat:1:hrte=0.5>", ("hrte",)),
)
ARGUMENTS = tuple(name for row in TABLE for name in row.names)
OURS = {name: row.names[0] for row in TABLE for name in row.names}


def dialect_table() -> str:
    """``TABLE`` as Markdown."""
    lines = ["| part | meaning | dialects | example |", "|---|---|---|---|"]
    for row in TABLE:
        where = "all" if row.dialects == DIALECTS else ", ".join(row.dialects)
        names = "".join(f", `{name}=`" for name in row.names if f"`{name}=`" not in row.part)
        example = f"`{row.example}`" + (f" ({row.model})" if row.model else "")
        lines.append(f"| {row.part}{names} | {row.meaning} | {where} | {example} |")
    return "\n".join(lines) + "\n"


def weights(text: str, name: str, dialect: str, interpolation: str | None) -> Schedule:
    """A strength as a dialect writes it. Raises ValueError that begins with ``name``."""
    text = text.replace(";", ",").replace("~", "@")
    if dialect == LORACTL:
        return _counted_from_zero(text, name, 1.0, interpolation or "linear", 2)
    if dialect == PROMPT_CONTROL:
        return _counted_from_zero(text, name, 0.0, interpolation or "hold", 0)
    return parse(text, name, interpolation or "hold")


def _counted_from_zero(text: str, name: str, missing: float, interpolation: str, inset: int) -> Schedule:
    """Bare numbers are parts of the run if none is above 1, else steps done; ``missing`` where none is written."""
    items = [[part.strip() for part in item.split("@")] for item in text.split(",")]
    if len(items) == 1 and len(items[0]) == 1:
        return fixed(weight_of(items[0][0], name))
    places = [item[1] for item in items if len(item) > 1]
    if not any(_PLAIN.fullmatch(place) for place in places) and places:
        return parse(text, name, interpolation)
    if not all(_PLAIN.fullmatch(place) for place in places) or any(len(item) > 2 for item in items):
        raise ValueError(f"{name}: bare numbers and other places in one list; write all as parts of the run (@50%)")
    if missing == 1 and len(items[0]) == 1:
        raise ValueError(
            f"{name}: the first weight has no place, so loractl would take it for all of the run; write "
            f"{items[0][0][:20]}@0, or it alone"
        )
    pairs = [(weight_of(item[0], name), float(item[1]) if len(item) > 1 else missing) for item in items]
    unit = "fraction" if max(place for _, place in pairs) <= 1 else "step"
    points = tuple(Point(weight, place, unit) for weight, place in pairs)
    if interpolation == "hold" and len({point.position for point in points}) < len(points):
        raise ValueError(f"{name}: {text[:60]!r} has two weights for one place; leave one of them out")
    try:
        return simplest(Schedule(points, interpolation, inset if unit == "fraction" else 0))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
