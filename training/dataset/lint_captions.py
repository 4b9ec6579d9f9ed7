"""Captions as the rules of the dataset check look at them: tags by name, sentences told from tags, the trigger.

- spellings with underscores, escaped brackets, capitals or weights are one tag
- a caption of sentences is recognised by its long pieces
- a trigger that nobody set is recognised where nearly all captions begin with the same unusual word
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from .lint_knowledge import TagKnowledge, plain
from .lint_rules import Limits
from .model import CaptionOptions, Dataset, Sample
from .tag_text import tags

SENTENCE_WORDS = 4  # words per tag from which a caption is a sentence, or …
SENTENCE_LETTERS = 40  # … letters, for languages that do without spaces
FEW = 5  # captions below which nothing is said about all of them
EXAMPLES = 5

WEIGHT = re.compile(r"\(+([^()]+?)(?::\s*[\d.]+)?\)+")

USUAL_FIRST = re.compile(
    r"(?:\d\+?)?(?:girl|boy|other|woman|man)s?|multiple \w+|solo|no humans|(?:best|high|low|worst|normal) quality|"
    r"masterpiece|absurdres|highres|score.*|rating.*|source.*|photo.*|illustration|painting|drawing|sketch|"
    r"(?:a|an|the)\b.*"
)  # what captions begin with that is no trigger


@dataclass(frozen=True)
class Caption:
    """One sample's caption as the rules look at it."""

    sample: Sample
    options: CaptionOptions

    @cached_property
    def lines(self) -> list[list[str]]:
        """Tags as written, of each line that may be shown."""
        text = self.sample.caption
        for mark in (self.options.keep_tokens_separator, self.options.secondary_separator):
            text = text.replace(mark, self.options.separator) if mark else text
        lines = [line for line in text.split("\n") if line.strip()]
        if self.options.lines == "all":
            lines = ["\n".join(lines)]
        elif self.options.lines == "first":
            lines = lines[:1]
        return [tags(line, self.options.separator) for line in lines]

    @cached_property
    def names(self) -> list[str]:
        """Names of the tags of the longest line."""
        line = max(self.lines, key=len, default=[])
        return [*map(self.name if self.options.weighted else plain, line)]

    def name(self, tag: str) -> str:
        """What the rules know a tag by: without weight, and in one spelling."""
        return plain(self.bare(tag))

    def bare(self, tag: str) -> str:
        """The tag as written, without its weight."""
        return bare(tag, self.options.weighted)

    @cached_property
    def prose(self) -> bool:
        """Whether this is made of sentences rather than tags."""
        return is_prose(self.names)


@dataclass(frozen=True)
class CaptionCheck:
    """What the rules about captions look at."""

    dataset: Dataset
    limits: Limits
    knowledge: TagKnowledge

    @cached_property
    def captions(self) -> list[Caption]:
        return [Caption(sample, self.dataset.of(sample).captions) for sample in self.dataset.samples]

    @cached_property
    def concepts(self) -> dict[int, list[Caption]]:
        """Captions of each training concept."""
        groups: dict[int, list[Caption]] = defaultdict(list)
        for caption in self.captions:
            if self.dataset.of(caption.sample).kind == "training":
                groups[caption.sample.concept].append(caption)
        return dict(groups)

    @cached_property
    def tagged(self) -> list[Caption]:
        """Training captions made of tags."""
        return [caption for group in self.concepts.values() for caption in group if caption.names and not caption.prose]

    @cached_property
    def triggers(self) -> dict[int, str]:
        """The name of the trigger of each training concept, set or recognised; "" where there is none."""
        return {
            index: plain(self.dataset.concepts[index].captions.trigger) or self._recognised(captions)
            for index, captions in self.concepts.items()
        }

    def _recognised(self, captions: Sequence[Caption]) -> str:
        firsts = Counter(caption.names[0] for caption in captions if caption.names and not caption.prose)
        if not firsts or len(captions) < FEW:
            return ""
        [(word, count)] = firsts.most_common(1)
        usual = USUAL_FIRST.fullmatch(word) or word in self.knowledge.counts
        return word if count >= self.limits.of("T002", "share") * len(captions) and not usual else ""


def bare(tag: str, weighted: bool) -> str:
    """The tag as written, without its weight where captions are weighted."""
    found = WEIGHT.fullmatch(tag) if weighted else None
    return found[1] if found else tag


def is_prose(names: Sequence[str]) -> bool:
    """Whether these are sentences, or parts of them, rather than tags."""
    count = max(1, len(names))
    words = len(" ".join(names).split())
    return words >= SENTENCE_WORDS * count or sum(map(len, names)) >= SENTENCE_LETTERS * count


def title(dataset: Dataset, index: int) -> str:
    """What a finding calls a concept."""
    name = dataset.concepts[index].name
    return f"“{name}”" if name else f"concept {index + 1}" if len(dataset.concepts) > 1 else "the dataset"


def most_common(counts: Counter[str]) -> str:
    """The most frequent few, each with its count."""
    named = [f"{what} ({count}×)" for what, count in counts.most_common(EXAMPLES)]
    return ", ".join(named) + (f" and {len(counts) - EXAMPLES} more" if len(counts) > EXAMPLES else "")
