"""Train the text encoders of a CLIP: what learns on them, and captions encoded with gradients.

* ``trainable_clip``: the CLIP without what must not act in training, and what was left out.
* ``text_components``: the ``Component``s te1, te2, te3 and embeddings that a plan asks for.
* ``LiveText``: captions → what the CLIP's own encoding gives, differentiable in adapters and embeddings.
* ``borrow_text``: the CLIP on loan like the model itself, for as long as ``LiveText`` is to work.

Encoders are counted as the CLIP has them. ``layers`` chooses among their layers as among the model's; ``layer_filter``
and ``blocks`` name the model's layers, so that encoders get attention and MLP where ``layers`` is custom or conv.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..training.adapters import build
from ..training.embeddings import keep_length, parse
from ..training.learners import Component
from ..training.options import OptionError
from ..training.settings import Plan
from .embeddings import Words, begin, encoders, with_words
from .layers import weight_reader
from .loan import Loan, borrow
from .patched import trainable_clone
from .texts import Encoded

EMBEDDINGS = "embeddings"


def is_text(component: Component) -> bool:
    """Whether captions have to be encoded with gradients for it."""
    return component.name == EMBEDDINGS or component.name.startswith("te")


def trainable_clip(clip: Any) -> tuple[Any, list[str]]:
    """A clone that shares the weights and keeps its LoRAs and clip skip; and one note for each thing left out."""
    patcher, notes = trainable_clone(clip.patcher, "CLIP")
    clone = clip.clone()
    clone.patcher, clone.use_clip_schedule, clone.apply_hooks_to_conds = patcher, False, None
    return clone, notes


def text_components(clip: Any, plan: Plan) -> tuple[list[Component], list[str]]:
    """What is trained beside the model, on the CPU, and notes. May move weights. Raises OptionError."""
    found: list[Component] = []
    notes: list[str] = []
    present = encoders(clip)
    read = weight_reader(clip.patcher)
    settings = plan.components
    for number, (rate, stop) in enumerate(zip(settings.encoder_rates, settings.encoder_stops, strict=True), 1):
        if not rate:
            continue
        if number > len(present):
            having = ", ".join(f"te{n} {name}" for n, name in enumerate(present, 1))
            raise OptionError(f"te{number}_learning_rate is {rate!r}, expected 0: this CLIP has {having} and no more")
        name = list(present)[number - 1]
        built = build(present[name], plan, _within(name, read), f"te{number}")
        adapters = {f"{name}.{path}": adapter for path, adapter in built.adapters.items()}
        factors = {f"{name}.{path}": factor for path, factor in built.factors.items()}
        found.append(Component(f"te{number}", adapters, rate, stop, factors))
        notes.extend([f"te{number} is {name}", *built.notes])
    if words := parse(settings.embeddings):
        tensors, lengths, told = begin(clip, words, settings.preserve_embedding_norm)
        embeddings = Component(
            EMBEDDINGS, {}, settings.embedding_learning_rate, settings.embedding_stop_after, loose=tensors
        )
        if lengths:
            embeddings.after_step = lambda: _keep_lengths(embeddings.loose, lengths)
        found.append(embeddings)
        notes.extend(told)
    return found, notes


def _within(encoder: str, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    return lambda path: read(f"{encoder}.{path}")


def _keep_lengths(loose: Mapping[str, Tensor], lengths: Mapping[str, float]) -> None:
    for key, vectors in loose.items():
        keep_length(vectors, lengths[key.rpartition(".")[2]])


def words_of(components: Sequence[Component]) -> Words:
    """word -> encoder -> vectors, of the embeddings among ``components``."""
    found: Words = {}
    for component in components:
        for key, vectors in component.loose.items():
            word, _, encoder = key.rpartition(".")
            found.setdefault(word, {})[encoder] = vectors
    return found


class LiveText:
    """Captions encoded as they are needed, inside ``borrow_text``, with what ``components`` have learned so far."""

    def __init__(self, clip: Any, components: Sequence[Component]) -> None:
        self.clip = clip
        self.components = [component for component in components if is_text(component)]
        self._lent: tuple[Any, Loan] | None = None

    @property
    def device(self) -> torch.device:
        return self.clip.patcher.load_device

    def encode(self, captions: Sequence[str]) -> list[Encoded]:
        """(context, extras) of each caption. Without gradients once nothing of the text learns any more."""
        assert self._lent is not None, "the CLIP is not on loan"
        clip, loan = self._lent
        learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self._tensors())
        found: dict[str, Encoded] = {}
        with torch.set_grad_enabled(learning):
            for caption in dict.fromkeys(captions):
                with loan.using():
                    context, extras = clip.encode_from_tokens_scheduled(clip.tokenize(caption))[0]
                found[caption] = context, {n: v for n, v in extras.items() if n not in ("hooks", "model_conds")}
        return [found[caption] for caption in captions]

    def _tensors(self) -> Iterator[Tensor]:
        for component in self.components:
            yield from component.loose.values()
            for adapter in component.adapters.values():
                yield from adapter.parameters()

    @contextmanager
    def lent(self, loan: Loan) -> Iterator[None]:
        clip, _ = with_words(self.clip, words_of(self.components))
        # the weights are those of the loan; loading them anew for every caption might move others
        clip.load_model = lambda *_, **__: loan.patcher
        self._lent = clip, loan
        try:
            yield
        finally:
            self._lent = None


@contextmanager
def borrow_text(
    live: LiveText, checkpoint: bool = False, memory_required: float = 0, beside: Sequence[Any] = (), **how: Any
) -> Iterator[Loan]:
    """Lend the encoders of ``live`` for training, as ``loan.borrow`` lends a model; what is trained lies on their
    device."""
    adapters = {path: adapter for part in live.components for path, adapter in part.adapters.items()}
    with borrow(live.clip.patcher, adapters, checkpoint, memory_required, beside, **how) as loan, live.lent(loan):
        yield loan
