"""The rules of the dataset check as one table, and the thresholds as the user sets them.

- each rule says what it fires on, at which level, with which thresholds and where those come from, what its finding
  reads, what cures it, and what ``fixes.py`` does about it where it can
- ``parse_limits("D021=1.2, T010=25, D001.error=5, -D002")`` changes thresholds and switches rules off
- ``rule_table()`` is the table as text, for the help page

Levels: ``error`` spoils what is learned, ``warn`` probably does, ``info`` is worth knowing. Sources: "guide" is a
written guide to training characters and styles, "measured" is what tests/training/dataset/test_scores.py measures on
photographs, "ours" is judgement.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .model import DatasetError, some

LEVELS = ("error", "warn", "info")
NEEDS = {
    "header": "headers of the files",
    "captions": "captions",
    "plan": "buckets and repeats",
    "pixels": "decoded pictures (full check only)",
}


@dataclass(frozen=True)
class Threshold:
    name: str
    default: float
    meaning: str


@dataclass(frozen=True)
class Rule:
    id: str
    level: str  # the most serious it can be
    title: str
    needs: str
    message: str  # filled with what was measured and the threshold
    advice: str  # what the user can do
    thresholds: tuple[Threshold, ...] = ()
    source: str = "ours"
    fix: str | None = None  # what the automatic fix does


T = Threshold

_TABLE = (
    Rule("D001", "error", "few images", "header",
         "{where} has {count}, fewer than {limit:g}", "add pictures, or raise repeats and mirror (flip)",
         (T("error", 8, "images: error below"), T("warn", 15, "warning below"), T("info", 30, "note below")), "guide"),
    Rule("D002", "info", "many images", "header",
         "{where} has {count}, more than {limit:g}: more work than use for a character",
         "keep the best, or tick style", (T("above", 50, "images; styles are exempt"),), "guide"),
    Rule("D003", "warn", "style outside its usual size", "header",
         "style {where} has {count}, outside {low:g} to {high:g} (125 to 150 is ideal)", "add or leave out pictures",
         (T("low", 50, "images, with style ticked"), T("high", 200, "images")), "guide"),
    Rule("D010", "warn", "transparent pictures", "header",
         "{count} transparent in parts, laid onto {background} and learned so; alpha_mask is off",
         "switch alpha_mask on, or choose another background", fix="switches alpha_mask on for their concept"),
    Rule("D011", "error", "file formats", "header", "{count} {what}", "nothing to do here",
         fix="leaves out pictures that cannot be decoded (files stay)"),
    Rule("D012", "info", "stored sideways", "header",
         "{count} with an Exif orientation; they are turned upright when read", "nothing to do here"),
    Rule("D020", "info", "very large", "header",
         "{count} with a side over {limit:g} pixels (up to {worst:g}, {worst_id}); they only take longer to read",
         "scale copies down", (T("above", 3000, "pixels, the long side"),), "guide"),
    Rule("D021", "error", "enlarged", "plan",
         "{count} enlarged more than {limit:g}× to fill the bucket (up to {worst:.2f}×, {worst_id})",
         "enlarge with an upscale model, or use a lower resolution",
         (T("warn", 1.0, "scale: warning above"), T("error", 1.5, "error above"))),
    Rule("D022", "warn", "much cropped away", "plan",
         "{count} that lose more than {limit:.0%} of their area to the crop or are longer than the buckets' "
         "{aspect:g}:1 (up to {worst:.0%}, {worst_id})",
         "crop them yourself, or use a smaller bucket_step or a larger max_aspect",
         (T("above", 0.10, "part of the area"),)),
    Rule("D023", "warn", "buckets cut short", "plan",
         "{where}: max_side {value:g} is below {limit:g}× the resolution {resolution:g}, so long pictures are "
         "trained small", "leave max_side empty", (T("below", 2.0, "max_side over resolution"),), "guide",
         "empties max_side of the concept"),
    Rule("D024", "info", "empty borders", "pixels",
         "{count} with plain borders on more than {limit:.0%} of the area (up to {worst:.0%}, {worst_id})",
         "trim the borders", (T("above", 0.25, "part of the area"),)),
    Rule("D030", "warn", "duplicates", "pixels",
         "{count} {what} (hash distance {worst:g} of 64 bits at most, {limit:g} or less counts): {pairs}",
         "keep one of each",
         (T("same", 4, "bits of 64: a duplicate up to"), T("likely", 10, "probably one up to")), "measured",
         "leaves out the lesser copy of duplicates (files stay)"),
    Rule("D031", "info", "soft or strongly compressed", "pixels",
         "{count} {what}", "replace them, or add the tag “low quality”",
         (T("detail", 0.13, "energy of fine waves over that of waves twice as long: soft or enlarged below"),
          T("blockiness", 1.3, "steps on the 8×8 grid over steps elsewhere: compressed above"),
          T("quality", 50, "JPEG quality: compressed below"),
          T("z", 3.5, "robust z of the sharpness among all pictures: soft below minus this")), "measured",
         "adds the tag “low quality”"),
    Rule("D032", "info", "unusual noise", "pixels",
         "{count} far noisier than the others (robust z up to {worst:.1f}, {limit:g} counts; {worst_id}) and blocky: "
         "heavy compression, or protected against training; nothing tells this for sure",
         "clean with core nodes: scale to 0.5–0.75, then upscale with a smoothing model; or leave them out",
         (T("z", 3.5, "robust z of the noise"), T("blockiness", 1.15, "and blockiness above"))),
    Rule("T001", "error", "captions that say nothing", "captions", "{count} {what}", "write captions, or set a trigger",
         fix="captions the picture with its concept's name; removes stray byte order marks and control characters"),
    Rule("T002", "error", "trigger not first", "captions", "{count} {what}", "put the trigger first",
         (T("share", 0.9, "captions beginning with the same new word: taken for the trigger from"),), "guide",
         "moves the trigger to the front, or puts it there"),
    Rule("T003", "info", "trigger already known", "captions",
         "trigger {tag} is a tag the tag list counts {worst:g} times (over {limit:g}): the model knows something by "
         "that name", "use a word of your own, e.g. {example}", (T("above", 100, "count in the tag list"),), "guide"),
    Rule("T004", "warn", "outfit not second", "captions",
         "{where}: {count} without its own tag “{tag}” in second place, behind the trigger that concepts share",
         "order captions as trigger, outfit, rest", (T("share", 0.8, "captions that hold the outfit's tag"),), "guide",
         "moves the outfit's tag to second place"),
    Rule("T010", "warn", "many tags", "captions",
         "{count} with more than {limit:g} tags (up to {worst:g}, {worst_id}; mean of all {mean:.1f})",
         "remove tags that say little", (T("above", 20, "tags"),), "guide"),
    Rule("T011", "info", "few tags", "captions",
         "{count} with fewer than {limit:g} tags (down to {worst:g}, {worst_id})",
         "describe what shall stay changeable", (T("below", 5, "tags"),)),
    Rule("T012", "warn", "long captions", "captions",
         "{count} longer than {limit:g} tokens (up to {worst:g}, {worst_id}; over 75: {over75}, over 150: {over150}, "
         "over 225: {over225})", "shorten them; each 75 tokens are encoded apart",
         (T("above", 75, "tokens; needs the text encoder"),)),
    Rule("T020", "warn", "implied tags", "captions",
         "{count} with a tag that another one implies: {what}",
         "keep the more specific tag; or keep both everywhere, as image boards do", fix="removes the implied tag",
         source="guide"),
    Rule("T021", "warn", "one tag, several spellings", "captions", "{count} {what}", "spell each tag in one way",
         fix="spells tags with spaces and plain brackets, replaces aliases, keeps the first of duplicates"),
    Rule("T022", "info", "tags that contradict", "captions", "{count} with tags that contradict: {what}",
         "remove the wrong one"),
    Rule("T023", "info", "probable typing mistakes", "captions",
         "{count} with a tag found once and one letter from a tag found {limit:g} times or more: {what}",
         "correct them", (T("frequent", 5, "captions with the frequent tag, at least"),),
         fix="replaces it by the frequent tag"),
    Rule("T024", "info", "tags not in the tag list", "captions", "{count} with tags not in the tag list: {what}",
         "correct them, or keep them as new words"),
    Rule("T030", "warn", "background not tagged", "pixels",
         "{count} of {total} ({share:.0%}, {limit:.0%} counts) on plain {colour} and no caption of them says so: "
         "the background becomes part of what is learned", "tag “{colour} background”",
         (T("share", 0.25, "part of the concept's images"),)),
    Rule("T031", "info", "tags on nearly every image", "captions",
         "{where}: {what} (on {limit:.0%} or more): learned as one with the trigger",
         "remove them if they belong to the concept, keep them to be able to change them",
         (T("share", 0.95, "part of the concept's images"),)),
    Rule("T032", "warn", "single tags", "captions",
         "{where}: all captions have one tag only: everything in the pictures is learned as part of it",
         "describe what shall stay changeable"),
    Rule("T040", "info", "untagged monochrome pictures", "pixels",
         "{count} without colour (saturation {worst:.3f} at most, {limit:g} counts) and not tagged so",
         "tag “monochrome, greyscale”", (T("below", 0.05, "saturation, 0 to 1"),),
         fix="adds “monochrome” and “greyscale”"),
    Rule("T041", "info", "several figures or views", "captions",
         "{where}: {count} of {total} ({share:.0%}, over {limit:.0%}) tagged with several figures or views: {what}",
         "crop them to one figure", (T("share", 0.20, "part of the concept's images"),)),
    Rule("T050", "warn", "one artist", "captions",
         "{where}: artist {tag} on {share:.0%} of the images (over {limit:.0%}): the style is learned along",
         "mix artists, or name it a style", (T("share", 0.40, "part of the concept's images"),)),
    Rule("B001", "warn", "unbalanced", "plan",
         "{high} is shown {worst:.2f} times as often as {low} (over {limit:g}): {what} per epoch",
         "set repeats to images of the largest over images", (T("ratio", 1.5, "most over fewest presentations"),),
         fix="sets repeats so that all concepts are shown equally often"),
    Rule("B002", "warn", "small among large", "plan", "{where} {what}", "add pictures; repeats do not replace them",
         (T("images", 8, "of a concept among several, at least"), T("ratio", 10, "highest over lowest repeats"))),
    Rule("B003", "info", "concepts share batches", "plan",
         "batch size {value} with {number} training concepts (batches over {limit:g} mix their gradients)",
         "use batch size 1 if concepts blend", (T("above", 1, "batch size"),), "guide"),
    Rule("A001", "error", "mirrored asymmetry", "captions",
         "{count} with words about one side, and {where} is mirrored (flip): {what}", "switch flip off",
         source="guide", fix="switches flip off for the concept"),
    Rule("R001", "info", "schedule", "plan",
         "{limit:g} presentations of each image, as guides advise, are {epochs} epochs of {steps} steps at batch size "
         "{batch}: {total} steps", "set the steps accordingly",
         (T("presentations", 100, "per image"), T("style", 35, "per image, with style ticked")), "guide"),
)  # fmt: skip
RULES: Mapping[str, Rule] = {rule.id: rule for rule in _TABLE}
FIXABLE = tuple(rule.id for rule in _TABLE if rule.fix)


@dataclass(frozen=True)
class Finding:
    """What a rule found: the pictures it is about and the cure.

    ``details`` stands beside ``ids``: the tags concerned, or the picture that stays.
    """

    rule: str
    level: str
    message: str
    ids: tuple[str, ...]
    fix: str | None
    concept: int | None = None  # of findings about a concept as a whole
    details: tuple[tuple[str, ...], ...] = ()


def finding(
    rule: str,
    level: str,
    ids: Iterable[str] = (),
    *,
    concept: int | None = None,
    details: Iterable[tuple[str, ...]] = (),
    advice: str | None = None,
    automatic: bool = True,
    **figures: object,
) -> Finding:
    """A finding of a rule, its message filled with the figures; ``count`` is the number of images.

    ``automatic`` is off where the rule's automatic fix is for others of its findings.
    """
    row, ids = RULES[rule], tuple(ids)
    message = row.message.format(count=some(ids, "image"), **figures)
    cure = advice or row.advice.format(**figures)
    fix = f"{cure} (automatic fix {rule}: {row.fix})" if row.fix and automatic else cure
    return Finding(rule, level, message, ids, fix, concept, tuple(details))


@dataclass(frozen=True)
class Limits:
    """The thresholds in force, and the rules that are switched off."""

    values: Mapping[tuple[str, str], float] = field(default_factory=dict)
    off: frozenset[str] = frozenset()

    def of(self, rule: str, name: str | None = None) -> float:
        """A threshold by name; the first one where none is given."""
        for threshold in RULES[rule].thresholds:
            if name in (None, threshold.name):
                return self.values.get((rule, threshold.name), threshold.default)
        raise KeyError((rule, name))

    def on(self, *rules: str) -> bool:
        """Whether any of these rules is checked."""
        return not self.off.issuperset(rules)

    def only(self, rules: Iterable[str]) -> Limits:
        """The same with all other rules switched off."""
        return replace(self, off=self.off | RULES.keys() - {*map(rule_id, rules)})


def rule_id(text: str) -> str:
    """The id of a rule as the user wrote it; DatasetError naming the nearest one."""
    name = text.strip().upper()
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, 1, 0.5)
        hint = f"did you mean {near[0]} ({RULES[near[0]].title})?" if near else f"known are {', '.join(RULES)}"
        raise DatasetError(f"{text.strip()!r} is no lint rule: {hint}")
    return name


def parse_limits(text: str) -> Limits:
    """``D021=1.2`` sets the first threshold of a rule, ``D021.error=2`` one by name, ``-D002`` switches a rule off."""
    values, off = {}, set()
    for part in re.split(r"[,;\s]+", text.strip()):
        if part.startswith("-"):
            off.add(rule_id(part[1:]))
        elif part:
            left, equals, right = part.partition("=")
            identity, _, name = left.partition(".")
            rule = RULES[rule_id(identity)]
            names = [threshold.name for threshold in rule.thresholds]
            if not equals:
                raise DatasetError(f"thresholds: {part!r} sets nothing: write e.g. {rule.id}=1 or -{rule.id}")
            if not names:
                raise DatasetError(f"thresholds: {rule.id} has no threshold: -{rule.id} switches it off")
            if name and name not in names:
                raise DatasetError(f"thresholds: {rule.id} has no {name!r}: it has {', '.join(names)}")
            try:
                value = float(right)
            except ValueError:
                value = math.nan
            if not (math.isfinite(value) and value >= 0):
                raise DatasetError(f"thresholds: {part!r}: {right!r} is no number of 0 or more, e.g. {left}=1.5")
            values[rule.id, name or names[0]] = value
    return Limits(values, frozenset(off))


def rule_table() -> str:
    """All rules as text: id, level, title, thresholds with their sources, what is needed, the automatic fix."""
    lines = []
    for rule in _TABLE:
        limits = "; ".join(f"{item.name} {item.default:g} ({item.meaning})" for item in rule.thresholds)
        lines.append(f"{rule.id} {rule.level}: {rule.title}; looks at {NEEDS[rule.needs]}")
        lines += [f"    thresholds: {limits}; source: {rule.source}"] * bool(limits)
        lines += [f"    automatic fix: {rule.fix}"] * bool(rule.fix)
    return "\n".join(lines)
