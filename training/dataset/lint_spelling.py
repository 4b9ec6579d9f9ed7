"""Rules about the tags of a caption among themselves: implied, repeated, misspelled, contradicting, unknown.

- implied tags: the user's table, and tags that are the end of another ("black hair", "hair") with known exceptions
- spellings: a tag twice, one tag in several spellings, aliases of the user's tag list
- typing mistakes: a tag found once that is one letter from a frequent one

Only captions made of tags, of pictures that are trained on.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, zip_longest

from .lint_captions import EXAMPLES, Caption, CaptionCheck, bare, most_common
from .lint_knowledge import TagKnowledge, plain
from .lint_rules import Finding, finding
from .tag_text import canonical, tags

BECOMES = " → "  # in details, between what is written and what is meant
UNTOUCHED = re.compile(r"(?:score|rating|source)_")  # tags that models know with their underscore
NO_IMPLICATION = re.compile(r"(?:no|non|without|not) .*|.* print")
NOT_ITS_END = {"hot dog", "corn dog", "prairie dog", "teddy bear", "gummy bear", "sea horse", "rocking horse",
               "sea cow", "guinea pig", "sea lion", "flying fox", "dragon fruit", "crescent moon", "computer mouse",
               "paper crane", "bird house", "dog house", "green house"}  # fmt: skip
# words of captions one letter from each other, of which neither is a mistake; shorter ones are never taken for one
NEIGHBOURS = set("beach bench beast breast black blank books boots brown crown clown glass grass green greek horse "
                 "house pants paints plants short shirt skirt shorts shirts skirts stars stairs steam stream tower "
                 "towel watch witch wings rings strings braid brand".split())  # fmt: skip
LEAST_LETTERS = 5
COLOURS = "red|blue|green|brown|blonde|orange|purple|pink|yellow|aqua"
FIGURE = re.compile(r"\d\+?(?:girl|boy|other)s?|multiple (?:girls|boys|others)|group|duo|couple")
CONTRADICTIONS = tuple(
    re.compile(pattern)
    for pattern in (
        r"(1girl)|([2-6]\+?girls|multiple girls)",
        r"(1boy)|([2-6]\+?boys|multiple boys)",
        r"(solo)|((?:[2-6]\+?|multiple )(?:girls|boys)|duo|group|couple)",
        r"(no humans)|(\d\+?(?:girl|boy)s?|solo)",
        r"(day|daytime)|(night|nighttime)",
        rf"(monochrome|greyscale|grayscale)|((?:{COLOURS}) (?:hair|eyes|background|shirt|skirt|dress|skin))",
        r"(white background)|(black background|outdoors)",
    )
)
OF_ONE_FIGURE = tuple(  # where there are several, each may be true of another one
    re.compile(pattern)
    for pattern in (
        r"(closed mouth)|(open mouth)",
        r"(bald)|((?:\w+ )*(?!(?:facial|chest|body|arm|leg|armpit|pubic) )\w+ hair)",
        r"(barefoot)|(shoes|boots|sneakers)",
        r"(long hair|very long hair)|(short hair|very short hair)",
    )
)


def spelling_findings(check: CaptionCheck) -> Iterator[Finding]:
    """Findings about the tags of a caption among themselves."""
    for identity, rules in CHECKS.items():
        for rule in rules if check.limits.on(identity) else ():
            yield from rule(check)


def implied_by(names: Sequence[str], knowledge: TagKnowledge) -> dict[str, str]:
    """Each tag that another one of the same caption implies, and that one."""
    return _implied_among(names, lambda name: implications_of(name, knowledge))


def _implied_among(names: Sequence[str], implications: Callable[[str], set[str]]) -> dict[str, str]:
    present = set(names)
    found: dict[str, str] = {}
    for name in names:
        for other in implications(name) & present - {name}:
            found.setdefault(other, name)
    return found


def implications_of(name: str, knowledge: TagKnowledge) -> set[str]:
    """What one tag implies: its ends, and what the user's table says."""
    ends = {name.split(" ", count)[-1] for count in range(1, name.count(" ") + 1)}
    if name in NOT_ITS_END or NO_IMPLICATION.fullmatch(name):
        ends = set()
    return ends | knowledge.implied(name)


def _implied(check: CaptionCheck) -> Iterator[Finding]:
    details, pairs = {}, Counter[str]()
    implications = cache(lambda name: implications_of(name, check.knowledge))
    for caption in check.tagged:
        trigger = check.triggers[caption.sample.concept]
        found = _implied_among([name for name in caption.names if name != trigger], implications)
        if found:
            details[caption.sample.id] = tuple(sorted(found))
            pairs.update(f"“{tag}” by “{by}”" for tag, by in sorted(found.items()))
    if details:
        yield finding("T020", "warn", details, details=details.values(), what=most_common(pairs))


# -- spellings


def respelled(caption: Caption) -> str:
    """The caption with every tag in its canonical spelling, each once per line."""
    options = caption.options
    untouched = [tag for line in caption.lines for tag in line if UNTOUCHED.match(tag)]
    keep = (*tags(options.trigger, options.separator), *untouched)
    return canonical(caption.sample.caption, options.separator, keep=keep, weighted=options.weighted)


def _repeated(check: CaptionCheck) -> Iterator[Finding]:
    repeated = {c.sample.id: (*chain.from_iterable(map(_twice, _named_lines(c))),) for c in check.tagged}
    yield from _spelled({i: names for i, names in repeated.items() if names}, "with a tag twice")


def _twice(names: list[str]) -> list[str]:
    return [name for name, n in Counter(names).items() if n > 1] if len({*names}) < len(names) else []


def _named_lines(caption: Caption) -> list[list[str]]:
    lines = _written_lines(caption)
    return [caption.names] if len(lines) == 1 else [[*map(caption.name, line)] for line in lines]


def _written_lines(caption: Caption) -> list[list[str]]:
    """Tags of each line of the file: lines are respelled one by one."""
    lines = caption.sample.caption.split("\n")
    return caption.lines if len(lines) == 1 else [tags(line, caption.options.separator) for line in lines]


def _mixed(check: CaptionCheck) -> Iterator[Finding]:
    written = {c.sample.id: {tag for line in c.lines for tag in line} for c in check.tagged}
    spellings: dict[str, set[str]] = defaultdict(set)
    for weighted in (False, True):
        for tag in {*chain.from_iterable(written[c.sample.id] for c in check.tagged if c.options.weighted == weighted)}:
            spellings[plain(bare(tag, weighted))].add(bare(tag, weighted).lower())
    mixed = {name for name, spelled in spellings.items() if len(spelled) > 1}
    found = {}
    for caption in check.tagged if mixed else ():
        odd = sorted(tag for tag in written[caption.sample.id] if _is_odd(caption, tag, mixed))
        if odd and respelled(caption) != caption.sample.caption:
            found[caption.sample.id] = tuple(odd)
    yield from _spelled(found, "with a tag that is spelled otherwise elsewhere")


def _is_odd(caption: Caption, tag: str, mixed: set[str]) -> bool:
    """Whether a tag is written in several ways, and here not by its name."""
    name = caption.name(tag)
    return name in mixed and name != caption.bare(tag).lower()


def _aliases(check: CaptionCheck) -> Iterator[Finding]:
    aliases = check.knowledge.aliases
    known = {c.sample.id: tuple(n + BECOMES + aliases[n] for n in c.names if n in aliases) for c in check.tagged}
    yield from _spelled({i: pairs for i, pairs in known.items() if pairs}, "with a tag the tag list calls otherwise")


def _spelled(found: dict[str, tuple[str, ...]], what: str) -> Iterator[Finding]:
    if found:
        examples = most_common(Counter(f"“{tag}”" for tags in found.values() for tag in tags))
        yield finding("T021", "warn", found, details=found.values(), what=f"{what}: {examples}")


def _typing(check: CaptionCheck) -> Iterator[Finding]:
    limit = check.limits.of("T023")
    counts = Counter(chain.from_iterable({*caption.names} for caption in check.tagged))
    odd = {name for name, n in counts.items() if n == 1 and len(name) >= 5} - check.knowledge.counts.keys()
    near: dict[str, list[str]] = defaultdict(list)
    for name, count in counts.items():
        for part in _shortened(name) if count >= limit else ():
            near[part].append(name)
    details = {}
    for caption in check.tagged:
        meant = {}
        for name in odd.intersection(caption.names) if odd else ():
            candidates = {other for part in _shortened(name) for other in near.get(part, ())}
            candidates = {other for other in candidates if one_letter_apart(name, other) and unlikely(name, other)}
            if candidates:
                meant[name] = max(candidates, key=lambda other: (counts[other], other))
        if meant:
            details[caption.sample.id] = tuple(name + BECOMES + other for name, other in meant.items())
    if details:
        pairs = Counter(f"“{pair}”" for pairs in details.values() for pair in pairs)
        yield finding("T023", "info", details, details=details.values(), what=most_common(pairs), limit=limit)


def _shortened(name: str) -> set[str]:
    """The name and what it is without one of its letters: names one letter apart share one of these."""
    return {name, *(name[:at] + name[at + 1 :] for at in range(len(name)))}


def one_letter_apart(one: str, other: str) -> bool:
    """A letter more, less, changed or exchanged with the next; plurals and digits are no mistakes."""
    if one == other or one + "s" == other or other + "s" == one:
        return False
    start = next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    a, b = one[start:], other[start:]
    if any(letter.isdigit() for letter in a[:1] + b[:1]):
        return False
    exchanged = len(a) > 1 and a[:2] == b[1::-1] and a[2:] == b[2:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or exchanged


def unlikely(name: str, other: str) -> bool:
    """Whether two tags one letter apart can hardly both be meant, as "red hat" and "red cat" can."""
    pairs = [pair for pair in zip_longest(name.split(), other.split(), fillvalue="") if pair[0] != pair[1]]
    if len(pairs) > 1:  # a space more or less
        return True
    return min(map(len, pairs[0])) >= LEAST_LETTERS and not set(pairs[0]) <= NEIGHBOURS


# -- contradictions and unknown tags


def _contradictions(check: CaptionCheck) -> Iterator[Finding]:
    details = {}
    for caption in check.tagged:
        figures = [name for name in caption.names if FIGURE.fullmatch(name)]
        several = len(figures) > 1 or figures and not figures[0].startswith("1")
        for rule in CONTRADICTIONS if several else CONTRADICTIONS + OF_ONE_FIGURE:
            matches = [match for name in caption.names if (match := rule.fullmatch(name))]
            one, other = (next((match[0] for match in matches if match[side]), None) for side in (1, 2))
            if one and other:
                details[caption.sample.id] = (one, other)
                break
    if details:
        pairs = Counter(" + ".join(sides) for sides in details.values())
        yield finding("T022", "info", details, details=details.values(), what=most_common(pairs))


def _unknown(check: CaptionCheck) -> Iterator[Finding]:
    known = check.knowledge
    if not known.counts:
        return
    details, counts = {}, Counter[str]()
    for caption in check.tagged:
        names = {name for name in caption.names if not re.search("[{}]", name)}
        unknown = sorted(names - known.counts.keys() - known.aliases.keys() - {check.triggers[caption.sample.concept]})
        if unknown:
            details[caption.sample.id] = tuple(unknown)
            counts.update(unknown)
    if details:
        named = ", ".join(f"{_with_nearest(name, known)} ({n}×)" for name, n in counts.most_common(EXAMPLES))
        rest = f" and {len(counts) - EXAMPLES} more" if len(counts) > EXAMPLES else ""
        yield finding("T024", "info", details, details=details.values(), what=named + rest)


def _with_nearest(name: str, known: TagKnowledge) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz -'()"
    pieces = [(name[:at], name[at:]) for at in range(len(name) + 1)]
    candidates = {head + letter + rest for head, tail in pieces for letter in letters for rest in (tail, tail[1:])}
    candidates |= _shortened(name) | {head + tail[1] + tail[0] + tail[2:] for head, tail in pieces if len(tail) > 1}
    nearest = max(candidates & known.counts.keys(), key=lambda other: (known.counts[other], other), default=None)
    return f"“{name}” (did you mean “{nearest}”?)" if nearest else f"“{name}”"


CHECKS = {
    "T020": (_implied,),
    "T021": (_repeated, _mixed, _aliases),
    "T022": (_contradictions,),
    "T023": (_typing,),
    "T024": (_unknown,),
}
