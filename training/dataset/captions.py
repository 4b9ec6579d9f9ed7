"""What one presentation shows of a caption: a pure function of the caption, the options and the draws.

In this order, which is that of sd-scripts except for the lines:

1. the whole caption dropped, by chance or every so many epochs
2. one line of several, or all of them joined
3. the trigger in front, then prefix and suffix around (sd-scripts puts those around before it picks a line, so that the
   lines in the middle get neither)
4. wildcards: {red|blue} picks one, also inside one another; {{ and }} are braces, but where two groups are open, }}
   closes both
5. tags, where an option needs them: a head that stays (before ``keep_tokens_separator``, or so many tags; at least up
   to the trigger), a tail that stays, and between them warm-up, shuffling and dropping
6. the secondary separator as an ordinary one
7. brackets as text, unless the captions are weighted

A caption that no option changes is shown as it was written, down to its white space. ``notes`` names what has no
effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from .draws import Draws
from .model import CaptionOptions, Dataset, listed
from .tag_text import Glob, literal, move_first, name_of, tags, unescaped

SENTENCE_ENDS = (".", "!", "?", ";", ":")
WEIGHT = re.compile(r"(?<!\\)\([^()]+:\s*\d+(?:\.\d*)?\s*\)")


def shown(
    caption: str, options: CaptionOptions, draws: Draws, epoch: int = 0, step: int = 0, total_steps: int = 0
) -> str:
    """The text of one presentation, ready for the host's tokenizer; epochs and steps count from 0."""
    if dropped(options, draws, epoch):
        return ""
    text = _line(caption, options, draws)
    text = move_first(text, options.trigger, options.separator)
    text = " ".join(part for part in (options.prefix, text, options.suffix) if part)
    if options.wildcards:
        text = _picked(text, draws)
    if _needs_tags(options, text):
        text = _arranged(text, options, draws, step, total_steps)
    if options.secondary_separator:
        text = text.replace(options.secondary_separator, options.separator)
    return text if options.weighted else literal(text)


def dropped(options: CaptionOptions, draws: Draws, epoch: int) -> bool:
    """Whether a presentation shows nothing of its caption; the first that is drawn."""
    if options.dropout and draws.chance(options.dropout):
        return True
    every = options.dropout_every_n_epochs
    return every > 0 and (epoch + 1) % every == 0  # sd-scripts counts epochs from 1


def _line(caption: str, options: CaptionOptions, draws: Draws) -> str:
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    if len(lines) < 2:
        return caption
    if options.lines == "random":
        return draws.pick(lines)
    if options.lines == "first":
        return lines[0]
    return joined_lines(lines, options.separator)


def joined_lines(lines: Sequence[str], separator: str) -> str:
    """Lines as one: a separator behind each that ends without one, and is no sentence."""
    ends = (*SENTENCE_ENDS, separator)
    joints = [" " if line.endswith(ends) else f"{separator} " for line in lines[:-1]]
    return "".join(line + joint for line, joint in zip(lines, (*joints, ""), strict=True))


def _picked(text: str, draws: Draws) -> str:
    """The text with every group {a|b} replaced by one of its choices, inner groups first."""
    groups = [[""]]  # the choices so far of each group that is open; the text itself is the outermost
    for piece in re.findall(r"\{\{|\}\}|[{}|]|[^{}|]+", text):
        if piece == "{":
            groups.append([""])
        elif piece in ("}", "}}") and len(groups) > len(piece):
            for _ in piece:
                choices = groups.pop()
                groups[-1][-1] += draws.pick(choices) if choices != [""] else "{}"
        elif piece == "|" and len(groups) > 1:
            groups[-1].append("")
        else:
            groups[-1][-1] += piece[0] if piece in ("{{", "}}") else piece
    return "{".join("|".join(choices) for choices in groups)  # a group that is never closed is just text


def _needs_tags(options: CaptionOptions, text: str) -> bool:
    marked = options.keep_tokens_separator and options.keep_tokens_separator in text
    return bool(options.shuffle or options.tag_dropout or options.warmup_steps or marked)


def _arranged(text: str, options: CaptionOptions, draws: Draws, step: int, total_steps: int) -> str:
    head, flex, tail = _parts(text, options)
    flex = flex[: _tags_at(step, len(flex), options, total_steps)]
    if options.shuffle:
        flex = draws.shuffled(flex)
    if options.tag_dropout:
        flex = _kept(flex, options, draws)
    return ", ".join((*head, *flex, *tail))


def _parts(text: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """(what stays in front, what varies, what stays behind), as tags."""
    separator, mark = options.separator, options.keep_tokens_separator
    if mark and mark in text:
        before, between, *after = text.split(mark)
        head, flex = tags(before, separator), tags(between, separator)
        tail = [tag for part in after for tag in tags(part, separator)]
    else:
        every = tags(text, separator)
        head, flex, tail = every[: options.keep_tokens], every[options.keep_tokens :], []
    missing = _through_trigger(head + flex, options) - len(head)
    if missing > 0:
        head, flex = head + flex[:missing], flex[missing:]
    return head, flex, tail


def _through_trigger(front: Sequence[str], options: CaptionOptions) -> int:
    """How many tags there are up to the trigger and with it; prefix and trigger stay where they were put."""
    parts = tags(name_of(options.trigger), options.separator)
    if not parts:
        return 0
    words = [re.compile(rf"(?<!\w){re.escape(part)}(?!\w)") for part in parts]
    ends = range(len(parts), len(front) + 1)
    names = [name_of(tag) for tag in front]
    return next((end for end in ends if all(map(re.Pattern.search, words, names[end - len(parts) : end]))), 0)


def _tags_at(step: int, count: int, options: CaptionOptions, total_steps: int) -> int:
    """How many of the varying tags a step shows: ``warmup_min`` at first, all of them from ``warmup_steps`` on."""
    steps = options.warmup_steps if options.warmup_steps >= 1 else int(options.warmup_steps * total_steps + 1e-6)
    if step >= steps:
        return count
    return int(step * (count - options.warmup_min) / steps + 1e-6) + options.warmup_min


def _kept(flex: Iterable[str], options: CaptionOptions, draws: Draws) -> list[str]:
    never, only = ([_glob(pattern) for pattern in patterns] for patterns in (options.never_drop, options.only_drop))

    def stays(tag: str) -> bool:
        lucky = not draws.chance(options.tag_dropout)  # drawn for every tag, so that lists change nothing for others
        name = unescaped(tag)
        exempt = any(glob.fits(name) for glob in never) or (only and not any(glob.fits(name) for glob in only))
        return lucky or bool(exempt)

    return [tag for tag in flex if stays(tag)]


def _glob(pattern: str) -> Glob:
    return Glob(unescaped(pattern))


# -- what has no effect


def check(options: CaptionOptions) -> list[str]:
    """Options that do nothing, or undo one another, whatever the captions are."""
    return list(_idle(options))


def _idle(options: CaptionOptions) -> Iterator[str]:
    varies = options.shuffle or options.tag_dropout or options.warmup_steps
    kept = [name for name in ("keep_tokens", "keep_tokens_separator") if getattr(options, name)]
    if kept and not varies:
        yield (
            f"{' and '.join(kept)} keeps tags in place, but nothing moves or drops any: "
            "set shuffle, tag_dropout or warmup_steps, or leave it empty"
        )
    if options.keep_tokens and options.keep_tokens_separator:
        yield f"keep_tokens ({options.keep_tokens}) counts only in captions without {options.keep_tokens_separator!r}"
    lists = [name for name in ("never_drop", "only_drop") if getattr(options, name)]
    if lists and not options.tag_dropout:
        yield f"{' and '.join(lists)} has no effect without tag_dropout: set tag_dropout, or empty the list"
    if options.warmup_min != 1 and not options.warmup_steps:
        yield f"warmup_min ({options.warmup_min}) has no effect without warmup_steps: set that, or leave this at 1"
    if options.trigger and name_of(options.trigger) in map(name_of, tags(options.prefix, options.separator)):
        yield f"trigger {options.trigger!r} is in the prefix too and shown twice: leave it out of the prefix"
    if options.dropout == 1 or options.dropout_every_n_epochs == 1:
        name = "dropout" if options.dropout == 1 else "dropout_every_n_epochs"
        yield f"{name} is 1: every caption is dropped and no other caption option has an effect"
    if options.secondary_separator and options.separator in options.secondary_separator and varies:
        yield (
            f"secondary_separator {options.secondary_separator!r} holds the separator {options.separator!r}, which "
            "divides its tags: choose another, e.g. ;;;"
        )


def notes(dataset: Dataset) -> list[str]:
    """What of the caption options has no effect on the captions of this dataset, per concept."""
    found = []
    for index, concept in enumerate(dataset.concepts):
        samples = [sample for sample in dataset.samples if sample.concept == index]
        captions = [sample.caption for sample in samples]
        name = f"{concept.name}: " if concept.name else ""
        unmet = _unmet(concept.captions, captions) if any(captions) else ()
        found += [name + note for note in (*check(concept.captions), *unmet)]
        empty = [sample.id for sample in samples if not sample.caption.strip()]
        if empty and not (concept.captions.trigger or concept.captions.prefix or concept.captions.suffix):
            found.append(f"{name}empty captions, trained without a prompt: {listed(empty)}")
    return list(dict.fromkeys(found))


def _unmet(options: CaptionOptions, captions: Sequence[str]) -> Iterator[str]:
    """Options that ask for something which no caption has."""
    around = (options.prefix, options.suffix)
    texts = [*captions, *around]
    for name in ("keep_tokens_separator", "secondary_separator"):
        mark = getattr(options, name)
        if mark and not any(mark in text for text in texts):
            yield f"{name} {mark!r} is in no caption: write it there, or leave the option empty"
    if options.wildcards and not any("{" in text for text in texts):
        yield "wildcards is on, but no caption has a {choice|of|words}: write some, or switch it off"
    lines_asked = options.lines == "random" and not options.wildcards  # enable_wildcard of a configuration is both
    if lines_asked and not any("\n" in caption.strip() for caption in captions):
        yield "lines is random, but no caption has several lines: write several, or set it to all"
    if options.weighted and not any(bracket in text for text in texts for bracket in "()"):
        yield "weighted is on, but no caption has a (bracket): write (tag:1.2), or switch it off"
    weights = next((match[0] for text in texts if (match := WEIGHT.search(text))), None)
    if weights and not options.weighted:
        yield f"weighted is off: {weights[:40]!r} is read as it stands; switch it on for prompt weights"
    mark = options.keep_tokens_separator or options.separator
    parts = [tags(text.replace(mark, options.separator), options.separator) for text in texts]
    every, divided = {unescaped(tag) for part in parts for tag in part}, any(len(part) > 1 for part in parts)
    moving = [name for name in ("shuffle", "tag_dropout", "warmup_steps") if getattr(options, name)]
    if moving and not divided:
        yield (
            f"{' and '.join(moving)}: no caption has more than one tag, divided by {options.separator!r}: "
            "a sentence is one tag, and is kept or dropped whole"
        )
    for name in ("never_drop", "only_drop"):
        idle = [pattern for pattern in getattr(options, name) if not any(_glob(pattern).fits(tag) for tag in every)]
        if idle and options.tag_dropout:
            yield f"{name} names tags that no caption has: {listed(idle)}; check how they are spelled"
