"""The words that each presentation of a picture is trained with.

* a caption of its own for every presentation, where captions vary; with ``text_variants`` one of so many, drawn anew
  each time, while dropping the whole caption stays a matter of the presentation
* ``preserved``: the same words with the class in place of the trigger (differential output preservation)
* options that no caption of the dataset has a use for are errors
"""

from __future__ import annotations

import dataclasses
import re

from .dataset.batches import TRAINED, BatchPlan, Shown
from .dataset.captions import dropped, shown
from .dataset.draws import Draws
from .dataset.model import CaptionOptions, Dataset, Sample
from .dataset.tag_text import literal
from .options import OptionError
from .settings import Plan


class Wording:
    """The captions of a run; pure functions of the plan, the dataset and the presentation."""

    def __init__(self, dataset: Dataset, order: BatchPlan, plan: Plan, total_steps: int) -> None:
        self.dataset, self.order, self.total_steps = dataset, order, total_steps
        self.accumulation = plan.optimizer.gradient_accumulation
        self.variants = plan.run.text_variants
        self._check_variants()
        objective = plan.objective
        self.class_word = objective.preservation_class.strip()
        self._trigger = _word(objective.preservation_trigger.strip()) if objective.preservation_weight else None
        if self._trigger is not None:
            self._check_trigger(objective.preservation_trigger)

    def sample(self, member: Shown) -> Sample:
        return self.dataset.samples[self.order.items[member.item].sample]

    def text(self, member: Shown, position: int) -> str:
        """What the presentation at a position of the run shows of its caption."""
        sample, seed = self.sample(member), self.order.seed
        options = self.dataset.of(sample).captions
        draws = Draws(seed, "caption", sample.id, member.item, member.turn)
        epoch = self.order.locate(position)[0] if options.varies else 0
        if self.variants and options.varies:
            if dropped(options, draws, epoch):
                return ""
            draws = Draws(seed, "caption variant", sample.id, draws.below(self.variants))
            options = _never_dropped(options)
        return shown(sample.caption, options, draws, epoch, position // self.accumulation, self.total_steps)

    def preserved(self, member: Shown, text: str) -> str | None:
        """``text`` with the class in place of the trigger; None where nothing is to be preserved."""
        if self._trigger is None or not self._trigger.search(text):
            return None
        weighted = self.dataset.of(self.sample(member)).captions.weighted
        instead = self.class_word if weighted else literal(self.class_word)
        return self._trigger.sub(lambda _: instead, text)

    def _check_variants(self) -> None:
        if self.variants and not any(
            dataclasses.replace(_never_dropped(self.dataset.of(sample).captions), warmup_steps=0.0).varies
            for sample in map(self.dataset.samples.__getitem__, self.dataset.members(*TRAINED))
        ):
            raise OptionError(
                f"text_variants is {self.variants}, expected 0: no caption of the dataset varies. Switch on shuffle, "
                "tag_dropout, wildcards or random lines in its caption settings"
            )

    def _check_trigger(self, trigger: str) -> None:
        assert self._trigger is not None
        for index in self.dataset.members(*TRAINED):
            sample = self.dataset.samples[index]
            options = self.dataset.of(sample).captions
            if any(map(self._trigger.search, (sample.caption, options.trigger, options.prefix, options.suffix))):
                return
        raise OptionError(
            f"preservation_trigger is {trigger!r}, expected a word of the captions: none of them holds it. Write it as "
            "the captions do, or set it as the dataset's trigger"
        )


def _word(text: str) -> re.Pattern[str]:
    """``text`` as a word of its own, whatever its case, with or without its brackets escaped."""
    either = "|".join(re.escape(spelling) for spelling in dict.fromkeys((literal(text), text)))
    return re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE)


def _never_dropped(options: CaptionOptions) -> CaptionOptions:
    """The caption is shown at every presentation."""
    return dataclasses.replace(options, dropout=0.0, dropout_every_n_epochs=0)
