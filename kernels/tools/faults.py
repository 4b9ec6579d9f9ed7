"""What is wrong, or odd, in adapter files, and what to do about it: one table.

* ``RULES``: every fault that is looked for, with why it matters and the cure; ``findings``: those that a file has.

``error``: the file, or a part of it, does not do what it should; ``warning``: somebody will read it otherwise, or it
does nothing; ``advice``: it could be smaller. How they are found is in ``fault_checks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from . import fault_checks as checks
from .fault_checks import Evidence, Hit

ERROR, WARNING, ADVICE = "error", "warning", "advice"
EXAMPLES, LONGEST = 3, 160


@dataclass(frozen=True)
class Rule:
    id: str
    severity: str
    what: str
    why: str
    cure: str
    look: Callable[[Evidence], Iterator[Hit]]


@dataclass(frozen=True)
class Finding:
    """A rule that a file meets, ``count`` times; ``examples`` of where."""

    rule: str
    severity: str
    what: str
    why: str
    cure: str
    count: int
    examples: tuple[str, ...]

    def line(self) -> str:
        """For people."""
        times = f" ({self.count}: {', '.join(self.examples)})" if self.examples else ""
        return f"{self.severity}: {self.what}{times}. {self.why}. {self.cure}"


def findings(evidence: Evidence) -> list[Finding]:
    """Errors first."""
    found = [_finding(rule, hit) for rule in RULES for hit in rule.look(evidence)]
    return sorted(found, key=lambda finding: (ERROR, WARNING, ADVICE).index(finding.severity))


def _finding(rule: Rule, hit: Hit) -> Finding:
    what = f"{rule.what}: {shown(hit.more, 4 * LONGEST)}" if hit.more else rule.what
    examples = tuple(shown(place, LONGEST) for place in hit.where[:EXAMPLES])
    return Finding(rule.id, rule.severity, what, rule.why, rule.cure, len(hit.where), examples)


def shown(text: str, length: int) -> str:
    """On one line, printable, at most ``length`` letters."""
    text = " ".join(text[: 4 * length].split())
    text = "".join(letter if letter.isprintable() else "�" for letter in text)
    return text if len(text) <= length else text[: length - 1] + "…"


_AGAIN = "Get or save the file again; of a run of one's own, take an earlier step"
RULES: tuple[Rule, ...] = (
    Rule(
        "not_finite",
        ERROR,
        "NaN or infinite numbers",
        "One of them makes pictures black or of noise",
        _AGAIN,
        checks.not_finite,
    ),
    Rule(
        "nothing_read",
        ERROR,
        "nothing in the file can be used",
        "It has no effect",
        "Look at the other findings; is it a LoRA, and of the kind that its name says?",
        checks.nothing_read,
    ),
    Rule(
        "does_nothing",
        ERROR,
        "the file does nothing",
        "Training never moved what starts at zero",
        "Train with a higher learning rate or longer; check that the loss reached these layers",
        checks.does_nothing,
    ),
    Rule(
        "incomplete",
        ERROR,
        "parts of layers are missing or do not fit each other",
        "These layers have no effect",
        "Get or save the file again",
        checks.incomplete,
    ),
    Rule(
        "dora_axis",
        ERROR,
        "norms of DoRA along no axis of the layer",
        "These layers have no effect",
        "Save it again with one norm per output (out, 1) or per input (1, in)",
        checks.norms_of_no_axis,
    ),
    Rule(
        "other_base",
        ERROR,
        "made for another model",
        "Layers that do fit would do anything",
        "Load the base it was trained on",
        checks.other_base,
    ),
    Rule(
        "unplaced",
        WARNING,
        "keys that are not used",
        "What they hold has no effect",
        "Use the model it was trained for, and its CLIP",
        checks.unplaced,
    ),
    Rule(
        "infinite_alpha",
        WARNING,
        "an infinite alpha",
        "It was meant as alpha = rank; some loaders make NaN of it",
        "Convert it to plain LoRA: this pack reads it as alpha = rank and writes a number",
        checks.infinite_alpha,
    ),
    Rule(
        "zero_alpha",
        WARNING,
        "an alpha of zero",
        "kohya's trainers mean alpha = rank, other loaders take it for no effect",
        "Convert it to plain LoRA: this pack reads it as kohya does and writes the rank",
        checks.zero_alpha,
    ),
    Rule(
        "negative_alpha",
        WARNING,
        "a negative alpha",
        "The layer works against what it was trained for",
        "Is that meant? Merge it with strength −1 to turn it round",
        checks.negative_alpha,
    ),
    Rule(
        "absurd_alpha",
        WARNING,
        "alpha far beyond the rank",
        "The layer is multiplied with it",
        "Is it another trainer's placeholder? Try a lower strength, or correct alpha",
        checks.absurd_alpha,
    ),
    Rule(
        "duplicate",
        WARNING,
        "the same tensors under two names",
        "They count once here; other loaders add them or take one",
        "Convert the file: it is written once",
        checks.same_twice,
    ),
    Rule(
        "two_spellings",
        WARNING,
        "a layer under two names",
        "Here they add up; ComfyUI's own loaders take the last of them",
        "Merge or convert the file: they become one",
        checks.two_spellings,
    ),
    Rule(
        "dora_missing",
        WARNING,
        "layers without the norms of DoRA",
        "They work as plain adapters beside others that do not",
        "Get or save the file again with dora_scale",
        checks.norms_missing,
    ),
    Rule(
        "beyond_float16",
        WARNING,
        "numbers beyond float16",
        "They become infinite where the model runs in float16",
        "Convert to float16: factors are balanced",
        checks.beyond_float16,
    ),
    Rule(
        "idle_encoder",
        WARNING,
        "a text encoder that was not trained",
        "It makes the file larger and does nothing",
        "Convert it to plain LoRA, which leaves out what does nothing",
        checks.idle_encoders,
    ),
    Rule(
        "idle_layers",
        WARNING,
        "layers that do nothing",
        "Their up matrix is zero: no gradient arrived, or they are left over",
        "Convert it to plain LoRA, which leaves them out",
        checks.idle_layers,
    ),
    Rule(
        "misread",
        WARNING,
        "ComfyUI's own LoRA loaders misread",
        "With them it has another effect than it was trained for",
        "Use the loader of this pack, or save it with for_core",
        checks.misread,
    ),
    Rule(
        "other_hash",
        WARNING,
        "the tensors were changed after their hash was written",
        "Model pages do not know the file by it",
        "Save it with this pack, which writes hashes that are true",
        checks.other_hash,
    ),
    Rule(
        "rank_beyond_layer",
        ADVICE,
        "a rank greater than the layer allows",
        "The ranks beyond it hold nothing",
        "Resize it",
        checks.rank_beyond_layer,
    ),
    Rule(
        "unused_ranks",
        ADVICE,
        "ranks that are hardly used",
        "The file is larger than what it has learnt",
        "Resize it by energy 0.99, or train with a lower rank",
        checks.mostly_unused,
    ),
    Rule(
        "needlessly_wide",
        ADVICE,
        "stored in a wider precision than it has",
        "The file is twice as large as it needs to be",
        "Convert it; nothing is lost",
        checks.needlessly_wide,
    ),
)
