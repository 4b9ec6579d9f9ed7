"""Which samples a line of text selects: ``tag:cat AND (NOT caption:"a dog" OR tags:>20)``.

- ``tag:`` a whole tag, ``lint:`` the id of a rule that has a finding; a part of ``caption:`` (a word alone means this),
  of the file's ``name:``, of its ``path:`` below the dataset's folder, of the ``concept:``
- ``tags:``, ``chars:``, ``tokens:``, ``width:``, ``height:`` with = != < > <= >= and a whole number
- NOT before AND before OR, brackets, * and ? as wildcards, quotes around spaces and a backslash in front of what is
  meant as it stands; case makes no difference, nor does it whether a tag's brackets are escaped
- an error names the position, what was expected and an example

The grammar is TagGUI's, with ``concept:`` and ``lint:`` added; a word alone looks at captions only.
"""

from __future__ import annotations

import dataclasses
import difflib
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from .lint_rules import RULES, Finding, rule_id
from .model import Concept, Dataset, DatasetError, Sample
from .tag_text import Glob, literal, tags, unescaped

TEXTS = ("tag", "caption", "name", "path", "concept", "lint")
NUMBERS = ("tags", "chars", "tokens", "width", "height")
COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "==": operator.eq,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
OPERATORS = ("NOT", "AND", "OR")
LONGEST = 2000  # characters of a filter: nobody writes more, and matching takes time in proportion
NO_TOKENIZER = "filter: tokens: counts with the text encoder's tokenizer; connect clip, or use tags: or chars:"
DEEPEST = 50  # brackets inside one another

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Facts:
    """What a filter may ask about a sample besides the sample itself."""

    concept: Concept
    rules: frozenset[str] = frozenset()  # that have a finding about it
    count_tokens: CountTokens | None = None

    def tokens(self, caption: str) -> int:
        if self.count_tokens is None:
            raise DatasetError(NO_TOKENIZER)
        return self.count_tokens(caption if self.concept.captions.weighted else literal(caption))


# -- what a filter consists of


@dataclass(frozen=True)
class Filter:
    """Any of ``options``, each of which is all of its parts; without options, everything."""

    options: tuple[tuple[Term | Not | Filter, ...], ...] = ()

    def matches(self, sample: Sample, facts: Facts) -> bool:
        return not self.options or any(all(part.matches(sample, facts) for part in parts) for parts in self.options)

    def terms(self) -> Iterator[Term]:
        for parts in self.options:
            for part in parts:
                part = part.part if isinstance(part, Not) else part
                yield from part.terms() if isinstance(part, Filter) else (part,)

    @property
    def rules(self) -> tuple[str, ...]:
        """The ids of the lint rules whose findings the filter asks for."""
        globs = [term.glob for term in self.terms() if term.field == "lint" and term.glob]
        return tuple(rule for rule in RULES if any(glob.fits(rule) for glob in globs))

    def asks_for(self, field: str) -> bool:
        return any(term.field == field for term in self.terms())


@dataclass(frozen=True)
class Not:
    part: Term | Filter

    def matches(self, sample: Sample, facts: Facts) -> bool:
        return not self.part.matches(sample, facts)


@dataclass(frozen=True)
class Term:
    """One term: a text field with its pattern, or a number with its comparison."""

    field: str
    glob: Glob | None = None
    comparison: str = "="
    number: int = 0
    seen: dict[str, bool] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def matches(self, sample: Sample, facts: Facts) -> bool:
        if self.glob is not None and self.field == "tag":
            return any(map(self._fits, tags(sample.caption, facts.concept.captions.separator)))
        if self.glob is not None:
            return any(self.glob.fits(text) for text in _texts(self.field, sample, facts))
        return COMPARISONS[self.comparison](_number(self.field, sample, facts), self.number)

    def _fits(self, tag: str) -> bool:
        """Whether a tag is meant: looked at once, since it is on many images."""
        assert self.glob is not None
        if tag not in self.seen:
            self.seen[tag] = self.glob.fits(unescaped(tag))
        return self.seen[tag]


def _texts(field: str, sample: Sample, facts: Facts) -> Iterable[str]:
    if field == "lint":
        return facts.rules
    if field == "caption":
        return (unescaped(sample.caption),)
    return ({"name": PurePosixPath(sample.id).name, "path": sample.id, "concept": facts.concept.name}[field],)


def _number(field: str, sample: Sample, facts: Facts) -> int:
    if field == "tags":
        return len(tags(sample.caption, facts.concept.captions.separator))
    if field == "tokens":
        return facts.tokens(sample.caption)
    return {"chars": len(sample.caption), "width": sample.size[0], "height": sample.size[1]}[field]


# -- reading


@dataclass(frozen=True)
class _Word:
    text: str  # unquoted; escapes of wildcards are left to the pattern
    at: int
    quoted: bool = False  # in part: then it is no operator


def parse_filter(text: str) -> Filter:
    """DatasetError with the position when the text is no filter; an empty text selects everything."""
    if len(text) > LONGEST:
        raise DatasetError(f"filter: it has {len(text)} characters, at most {LONGEST} are read; use wildcards (*)")
    words = _words(text)
    if not words:
        return Filter()
    found, at = _alternatives(text, words, 0, 0)
    if at < len(words):
        if words[at].text == ")" and not words[at].quoted:
            raise _fault(text, words[at].at, "no closing bracket, since none is open", '"quotes" around brackets')
        raise _fault(
            text, words[at].at, "AND, OR or the end", 'tag:cat AND tag:dog, or "cat dog" for the words together'
        )
    return found


def _fault(text: str, at: int, expected: str, example: str) -> DatasetError:
    here = f"at character {at + 1} ({text[at : at + 20]!r})" if at < len(text) else "at its end"
    return DatasetError(f"filter: {here}: expected {expected}, e.g. {example}")


def _words(text: str) -> list[_Word]:
    """Brackets and words. Brackets inside a word belong to it where they pair up, as in tag:miku_(vocaloid)."""
    words, at = [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
        elif text[at] in "()":
            words.append(_Word(text[at], at))
            at += 1
        else:
            word, at = _word(text, at)
            words.append(word)
    return words


def _word(text: str, start: int) -> tuple[_Word, int]:
    letters: list[str] = []
    at, depth, quoted = start, 0, False
    while at < len(text) and not text[at].isspace():
        letter = text[at]
        if letter in "\"'" and (not letters or letters[-1] == ":"):
            letter, at = _quoted(text, at)
            quoted = True
        elif letter == "(" and "".join(letters).upper() in OPERATORS:
            break
        elif letter in "()":
            depth += 1 if letter == "(" else -1
            if depth < 0:
                break
        elif letter == "\\" and at + 1 < len(text):
            letter = _escape(text[at + 1])
            at += 1
        letters.append(letter)
        at += 1
    return _Word("".join(letters), start, quoted), at


def _quoted(text: str, start: int) -> tuple[str, int]:
    """(what stands between the quotes, where the closing one is)."""
    letters, at = [], start + 1
    while at < len(text) and text[at] != text[start]:
        if text[at] == "\\" and at + 1 < len(text):
            letters.append(_escape(text[at + 1]))
            at += 1
        else:
            letters.append(text[at])
        at += 1
    if at == len(text):
        raise _fault(text, start, f"a closing {text[start]}", 'tag:"orange cat"')
    return "".join(letters), at


def _escape(letter: str) -> str:
    return letter if letter in "\"'" else "\\" + letter  # wildcards and backslashes stay escaped for the pattern


def _alternatives(text: str, words: list[_Word], at: int, depth: int) -> tuple[Filter, int]:
    """a AND b OR c …: (the filter, the word after it)."""
    options: list[tuple[Term | Not | Filter, ...]] = []
    parts: list[Term | Not | Filter] = []
    while True:
        part, at = _part(text, words, at, depth)
        parts.append(part)
        name = _operator(words, at)
        if name != "AND":
            options.append(tuple(parts))
            parts = []
        if name not in ("AND", "OR"):
            return Filter(tuple(options)), at
        at += 1


def _part(text: str, words: list[_Word], at: int, depth: int) -> tuple[Term | Not | Filter, int]:
    """A term or a group, with any number of NOT in front."""
    negative = False
    while _operator(words, at) == "NOT":
        negative, at = not negative, at + 1
    if at == len(words) or _operator(words, at) or (words[at].text == ")" and not words[at].quoted):
        place = len(text) if at == len(words) else words[at].at
        raise _fault(text, place, "a term", 'tag:cat (in quotes, "and" is a word like any other)')
    part: Term | Filter
    if words[at].text == "(" and not words[at].quoted:
        if depth == DEEPEST:
            raise _fault(text, words[at].at, f"at most {DEEPEST} brackets inside one another", "(tag:cat OR tag:dog)")
        opened = words[at]
        part, at = _alternatives(text, words, at + 1, depth + 1)
        if at == len(words):
            raise _fault(text, opened.at, "a closing bracket for this one", "(tag:cat OR tag:dog)")
        if words[at].text != ")" or words[at].quoted:
            raise _fault(text, words[at].at, "AND, OR or a closing bracket", "(tag:cat OR tag:dog)")
    else:
        part = _term(text, words[at])
    return (Not(part) if negative else part), at + 1


def _operator(words: list[_Word], at: int) -> str:
    """The operator at this place, or nothing."""
    name = words[at].text.upper() if at < len(words) and not words[at].quoted else ""
    return name if name in OPERATORS else ""


def _term(text: str, word: _Word) -> Term:
    field, colon, value = word.text.partition(":")
    field = field.lower()
    if not colon or (word.quoted and text[word.at] in "\"'"):  # "a: b" in quotes is all text
        return Term("caption", Glob(unescaped(word.text), anywhere=True))
    if field in NUMBERS:
        match = re.fullmatch(r"(<=|>=|!=|==|=|<|>)(\d{1,9})", value, re.ASCII)
        if match is None:
            raise _fault(text, word.at, "a comparison (= != < > <= >=) and a whole number", f"{field}:>20")
        return Term(field, None, match[1], int(match[2]))
    if field not in TEXTS:
        raise _unknown(text, word, field)
    if not value:
        raise _fault(text, word.at, f"something to look for after {field}:", f'{field}:cat, or {field}:"orange cat"')
    glob = Glob(unescaped(value), anywhere=field not in ("tag", "lint"))
    if field == "lint" and not any(glob.fits(rule) for rule in RULES):
        try:
            rule_id(value)
        except DatasetError as error:
            raise DatasetError(f"filter: at character {word.at + 1}: {error}") from None
    return Term(field, glob)


def _unknown(text: str, word: _Word, field: str) -> DatasetError:
    known = ", ".join(f"{name}:" for name in (*TEXTS, *NUMBERS))
    near = difflib.get_close_matches(field, (*TEXTS, *NUMBERS), 1, 0.5)
    nearest = f"; the nearest is {near[0]}:" if near else ""
    return _fault(text, word.at, f"a known prefix ({known}){nearest}", 'quotes for text with a colon: "re: zero"')


# -- using


def select(
    dataset: Dataset, text: str, findings: Iterable[Finding] = (), count_tokens: CountTokens | None = None
) -> list[int]:
    """Indices of the samples that a filter selects; an empty text selects all of them."""
    chosen = parse_filter(text)
    if count_tokens is None and chosen.asks_for("tokens"):
        raise DatasetError(NO_TOKENIZER)  # also where no caption would have been counted
    rules: dict[str, set[str]] = {}
    for finding in findings:
        for name in finding.ids:
            rules.setdefault(name, set()).add(finding.rule)
    return [
        index
        for index, sample in enumerate(dataset.samples)
        if chosen.matches(sample, Facts(dataset.of(sample), frozenset(rules.get(sample.id, ())), count_tokens))
    ]
