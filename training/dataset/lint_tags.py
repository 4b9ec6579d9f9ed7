"""Rules about captions as a whole: trigger, number and weight of tags, lengths, what is said of all pictures.

Captions that are sentences are left alone by the rules about tags; validation and regularisation pictures by all but
those about empty captions and lengths.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from .captions import shown
from .draws import Draws
from .lint_captions import EXAMPLES, FEW, Caption, CaptionCheck, most_common, title
from .lint_knowledge import ARTIST, plain
from .lint_rules import Finding, finding
from .model import CaptionOptions
from .tag_text import begins_with

STRAY = re.compile("[\ufeff\ufffd\x00-\x08\x0b\x0c\x0e-\x1f]")  # byte order marks, lost letters, control characters
SIDES = re.compile(
    r"\b(?:left|right|eye ?patch|asymmetr\w+|heterochromia|prosthe\w+|mechanical arm|text|side ponytail|one side up|"
    r"hair over one eye|single (?:\w+ )?(?:glove|sleeve|thighhigh|sock|shoe|earring|horn|wing|braid))\b"
)
SEVERAL = re.compile(
    r"(?:[2-9]\+?|multiple )(?:girls|boys|others)|group|duo|trio|couple|multiple (?:views|people|persons)|"
    r"(?:reference|character|model) sheet|turnaround|comic|collage|\d?koma|before and after"
)
ARTISTS = re.compile(r"(?:artist:|by |drawn by |art by |in the style of |@)(.+)")


def caption_findings(check: CaptionCheck, count_tokens: Callable[[str], int] | None) -> Iterator[Finding]:
    """Findings about captions as a whole."""
    on = check.limits.on
    if on("T001"):
        yield from _texts(check)
    if on("T012") and count_tokens is not None:
        yield from _lengths(check, count_tokens)
    if on("T004"):
        yield from _outfits(check)
    if on("T010", "T011"):
        yield from _counts(check)
    wanted = [rule for rule, ids in OF_CONCEPTS if on(*ids)]
    for index, captions in check.concepts.items() if wanted else ():
        for rule in wanted:
            yield from rule(check, index, captions)
    if on("A001"):
        yield from _sides(check)


def _texts(check: CaptionCheck) -> Iterator[Finding]:
    empty = [c.sample.id for c in check.captions if not c.sample.caption.strip() and not c.options.trigger]
    if empty:
        yield finding("T001", "error", empty, what="without a caption or a trigger, trained without words")
    stray = [c.sample.id for c in check.captions if STRAY.search(c.sample.caption)]
    if stray:
        what = "with byte order marks, control characters or letters lost in reading (\ufffd) in the caption"
        yield finding("T001", "error", stray, what=what, advice="save the captions as UTF-8 text")


def _trigger(check: CaptionCheck, index: int, captions: list[Caption]) -> Iterator[Finding]:
    options, trigger = check.dataset.concepts[index].captions, check.triggers[index]
    if options.trigger:
        late = [c.sample.id for c in captions if not begins_with(c.sample.caption, options.trigger, options.separator)]
        level, written = "info", options.trigger
        what = f"that do not begin with the trigger “{written}”; it is put there when shown, but not by other trainers"
    else:
        late = [c.sample.id for c in captions if trigger and c.names[:1] != [trigger]]
        level, written = "error", trigger
        what = f"that do not begin with “{trigger}”, as the other captions do"
    if late:
        yield finding("T002", level, late, concept=index, what=what, details=[(written,)] * len(late))
    seen, limit = check.knowledge.counts.get(trigger, 0), check.limits.of("T003")
    if seen > limit:
        example = f"“{obfuscated(trigger)}”"
        yield finding("T003", "info", concept=index, tag=f"“{trigger}”", worst=seen, limit=limit, example=example)


def obfuscated(trigger: str) -> str:
    """A word like the trigger that no tag list has: without the vowels behind its first letter."""
    letters = re.sub(r"\W", "", trigger)
    short = letters[:1] + re.sub("[aeiou]", "", letters[1:])
    return short if len(short) > 2 and short != trigger else f"{short}x{len(letters)}"


def _outfits(check: CaptionCheck) -> Iterator[Finding]:
    sharing: dict[str, list[int]] = defaultdict(list)
    for index, trigger in check.triggers.items():
        sharing[trigger].append(index)
    share = check.limits.of("T004")
    for trigger, indices in sharing.items():
        for index in indices if trigger and len(indices) > 1 else ():
            captions = check.concepts[index]
            others = {n for other in indices if other != index for c in check.concepts[other] for n in c.names}
            own = Counter(name for c in captions for name in set(c.names) - others - {trigger})
            outfit, count = max(own.items(), key=lambda item: (item[1], item[0]), default=("", 0))
            late = [c.sample.id for c in captions if [n for n in c.names if n != trigger][:1] != [outfit]]
            if late and count >= share * len(captions):
                yield finding("T004", "warn", late, concept=index, details=[(trigger, outfit)] * len(late),
                              where=title(check.dataset, index), tag=outfit)  # fmt: skip


def _counts(check: CaptionCheck) -> Iterator[Finding]:
    counts = {c.sample.id: len(c.names) for c in check.tagged}
    most, least = check.limits.of("T010"), check.limits.of("T011")
    many = {identity: count for identity, count in counts.items() if count > most}
    if many:
        worst = max(many, key=lambda identity: many[identity])
        mean = sum(counts.values()) / len(counts)
        yield finding("T010", "warn", many, limit=most, worst=many[worst], worst_id=worst, mean=mean)
    few = {identity: count for identity, count in counts.items() if count < least}
    if few:
        worst = min(few, key=lambda identity: few[identity])
        yield finding("T011", "info", few, limit=least, worst=few[worst], worst_id=worst)


def _lengths(check: CaptionCheck, count_tokens: Callable[[str], int]) -> Iterator[Finding]:
    limit = check.limits.of("T012")
    texts = {c.sample.id: shown(c.sample.caption, _whole(c.options), Draws("lengths")) for c in check.captions}
    counts = {text: count_tokens(text) for text in set(texts.values())}
    lengths = {identity: counts[text] for identity, text in texts.items()}
    long = {identity: count for identity, count in lengths.items() if count > limit}
    if long:
        worst = max(long, key=lambda identity: long[identity])
        edges = (75, 150, 225)
        over: dict[str, Any] = {f"over{edge}": sum(count > edge for count in lengths.values()) for edge in edges}
        yield finding("T012", "warn", long, limit=limit, worst=long[worst], worst_id=worst, **over)


def _whole(options: CaptionOptions) -> CaptionOptions:
    """The options without anything that leaves tags out."""
    return dataclasses.replace(options, dropout=0, dropout_every_n_epochs=0, tag_dropout=0, warmup_steps=0)


# -- of one concept


def _single(check: CaptionCheck, index: int, captions: list[Caption]) -> Iterator[Finding]:
    with_trigger = [{plain(c.options.trigger), *c.names} - {""} for c in captions]
    if len(captions) > 1 and all(len(names) == 1 for names in with_trigger) and not any(c.prose for c in captions):
        ids = [c.sample.id for c in captions]
        yield finding("T032", "warn", ids, concept=index, where=title(check.dataset, index))


def _everywhere(check: CaptionCheck, index: int, captions: list[Caption]) -> Iterator[Finding]:
    limit = check.limits.of("T031")
    counts = Counter(name for c in captions if not c.prose for name in set(c.names))
    shares = {name: n / len(captions) for name, n in counts.most_common() if name != check.triggers[index]}
    found = [name for name, share in shares.items() if share >= limit]
    if found and len(captions) >= FEW:
        what = ", ".join(f"“{name}” on {shares[name]:.0%}" for name in found[:EXAMPLES])
        what += f" and {len(found) - EXAMPLES} more" if len(found) > EXAMPLES else ""
        yield finding("T031", "info", concept=index, where=title(check.dataset, index), what=what, limit=limit)


def _figures(check: CaptionCheck, index: int, captions: list[Caption]) -> Iterator[Finding]:
    limit = check.limits.of("T041")
    found = {c.sample.id: tuple(n for n in c.names if SEVERAL.fullmatch(n)) for c in captions if not c.prose}
    details = {identity: names for identity, names in found.items() if names}
    share = len(details) / len(captions)
    if share > limit:
        what = most_common(Counter(name for names in details.values() for name in set(names)))
        yield finding("T041", "info", details, concept=index, details=details.values(), total=len(captions),
                      where=title(check.dataset, index), share=share, limit=limit, what=what)  # fmt: skip


def _artists(check: CaptionCheck, index: int, captions: list[Caption]) -> Iterator[Finding]:
    limit = check.limits.of("T050")
    holders: dict[str, list[str]] = defaultdict(list)
    for caption in captions:
        for name in set(caption.names) - {check.triggers[index]}:
            if (ARTISTS.fullmatch(name) and not caption.prose) or check.knowledge.categories.get(name) == ARTIST:
                holders[name].append(caption.sample.id)
    for artist, ids in sorted(holders.items()):
        share = len(ids) / len(captions)
        if len(captions) >= FEW and share > limit:
            yield finding("T050", "warn", ids, concept=index, where=title(check.dataset, index), tag=f"“{artist}”",
                          share=share, limit=limit)  # fmt: skip


OF_CONCEPTS = (
    (_trigger, ("T002", "T003")),
    (_single, ("T032",)),
    (_everywhere, ("T031",)),
    (_figures, ("T041",)),
    (_artists, ("T050",)),
)


# -- of pictures that are mirrored


def _sides(check: CaptionCheck) -> Iterator[Finding]:
    found: dict[int, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for caption in check.captions:
        concept = check.dataset.of(caption.sample)
        if concept.images.flip and concept.kind != "validation":
            words = SIDES.findall(caption.sample.caption.lower().replace("_", " "))
            if words:
                found[caption.sample.concept][caption.sample.id] = tuple(words)
    for index, details in found.items():
        what = most_common(Counter(word for words in details.values() for word in set(words)))
        yield finding("A001", "error", details, concept=index, details=details.values(),
                      where=title(check.dataset, index), what=what)  # fmt: skip
