"""What a run trains on, encoded span by span, while the model is not on loan.

``HostExamples`` implements ``training.loop.Examples``. Each presentation of a sample has a caption of its own where
the captions vary; the texts and pictures of the coming steps are encoded ahead, and old ones go once they fill their
budget.
Every step asks ``ready`` first; ``prepare`` may move weights, so it runs outside the loan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..training.dataset.balancing import with_still_validation
from ..training.dataset.batches import BatchPlan, Item, Shown, place
from ..training.dataset.captions import shown
from ..training.dataset.draws import Draws
from ..training.dataset.model import Dataset
from ..training.loop import Batch
from .denoiser import Conditioning, encode_captions
from .latents import EncodedPicture, check_sizes, encode_pictures

TEXT_BUDGET = 1 << 30  # bytes of encoded captions kept
PICTURE_BUDGET = 8 << 30  # bytes of latents kept beyond those of one span
SPAN_STEPS = 2000  # how far ahead is encoded at most: further off, a stopped run would have encoded for nothing
# distilled guidance is an input of some models; training at 1 teaches the model itself
GUIDANCE = {"guidance": 1.0}


class HostExamples:
    """The data of a run of ``total_steps`` steps of ``accumulation`` micro-batches each."""

    def __init__(
        self, dataset: Dataset, order: BatchPlan, patcher: Any, clip: Any, vae: Any, accumulation: int, total_steps: int
    ) -> None:
        self.dataset, self.order, self.clip = with_still_validation(dataset), order, clip
        self.accumulation, self.total_steps = accumulation, total_steps
        self._held_out = place(self.dataset, ("validation",))
        check_sizes(dataset, (*order.items, *self._held_out), vae)
        self._encode = lambda wanted, advance: encode_pictures(self.dataset, wanted, order.seed, patcher, vae, advance)
        self._pictures: dict[tuple[int, int], EncodedPicture] = {}
        self._texts: dict[str, tuple[Tensor, dict[str, Any]]] = {}
        self._validation: list[Batch] | None = None

    # -- what the trainer asks for

    def batch(self, position: int) -> Batch:
        members = self.order.batch(position)
        items = [self.order.items[member.item] for member in members]
        pictures = [self._pictures[member.item, member.variation] for member in members]
        texts = [self._texts[self._text(member, position)] for member in members]
        return self._batch(items, pictures, texts)

    def validation(self) -> list[Batch]:
        """A batch for each picture that is never trained on; there once ``prepare`` has run."""
        assert self._validation is not None, "prepare comes first"
        return self._validation

    def largest_latent(self) -> Tensor:
        return max((picture.latent for picture in self._pictures.values()), key=Tensor.numel)

    # -- outside the loan

    def ready(self, step: int) -> bool:
        """Whether everything that step needs is encoded."""
        return self._validation is not None and all(
            (member.item, member.variation) in self._pictures and self._text(member, position) in self._texts
            for position in self._positions(step)
            for member in self.order.batch(position)
        )

    def prepare(self, step: int, begin: Callable[[int], Callable[[], None]]) -> None:
        """Encode what the steps from ``step`` on need.

        ``begin`` is told how many pictures and captions there are to encode, and gives what to call after each.
        """
        pictures: dict[tuple[int, int], None] = {}  # in order, each once
        texts: dict[str, None] = {}
        room = self._room_for_texts()
        for coming in range(step, min(step + SPAN_STEPS, self.total_steps)):
            for position in self._positions(coming):
                for member in self.order.batch(position):
                    pictures[member.item, member.variation] = None
                    texts[self._text(member, position)] = None
            if len(texts) >= room:
                break
        self._drop_texts(texts, room)
        new_pictures = [key for key in pictures if key not in self._pictures]
        new_texts = [text for text in texts if text not in self._texts]
        held_out = () if self._validation is not None else self._held_out
        advance = begin(len(new_pictures) + len(new_texts) + len(held_out))
        self._texts |= encode_captions(self.clip, new_texts, advance)
        encoded = self._encode([(self.order.items[item], variation) for item, variation in new_pictures], advance)
        self._pictures.update(zip(new_pictures, encoded, strict=True))
        if sum(picture.latent.nbytes for picture in self._pictures.values()) > PICTURE_BUDGET:
            self._pictures = {key: self._pictures[key] for key in pictures}
        if self._validation is None:
            self._validation = self._encode_validation(held_out, advance)

    def _positions(self, step: int) -> range:
        return range(step * self.accumulation, (step + 1) * self.accumulation)

    def _text(self, member: Shown, position: int) -> str:
        sample = self.dataset.samples[self.order.items[member.item].sample]
        draws = Draws(self.order.seed, "caption", sample.id, member.item, member.turn)
        options = self.dataset.of(sample).captions
        epoch = self.order.locate(position)[0] if options.varies else 0
        return shown(sample.caption, options, draws, epoch, position // self.accumulation, self.total_steps)

    def _room_for_texts(self) -> int:
        """How many captions fit the budget; to know their size one has to be there."""
        if not self._texts:
            self._texts |= encode_captions(self.clip, [""])
        return max(64, TEXT_BUDGET // max(map(_size, self._texts.values())))

    def _drop_texts(self, needed: Iterable[str], room: int) -> None:
        if len(self._texts) + len(set(needed) - self._texts.keys()) > room:
            self._texts = {text: self._texts[text] for text in needed if text in self._texts}

    def _encode_validation(self, items: Sequence[Item], advance: Callable[[], None]) -> list[Batch]:
        pictures = self._encode([(item, 0) for item in items], advance)
        samples = [self.dataset.samples[item.sample] for item in items]
        captions = [
            shown(s.caption, self.dataset.of(s).captions, Draws(self.order.seed, "validation caption", s.id))
            for s in samples
        ]
        texts = encode_captions(self.clip, captions)
        return [
            self._batch([item], [picture], [texts[caption]])
            for item, picture, caption in zip(items, pictures, captions, strict=True)
        ]

    def _batch(
        self,
        items: Sequence[Item],
        pictures: Sequence[EncodedPicture],
        texts: Sequence[tuple[Tensor, dict[str, Any]]],
    ) -> Batch:
        samples = [self.dataset.samples[item.sample] for item in items]
        conditioning = [
            Conditioning(context, {**GUIDANCE, **extras}, sample.size, picture.crop, item.bucket)
            for sample, item, picture, (context, extras) in zip(samples, items, pictures, texts, strict=True)
        ]
        latents = torch.cat([picture.latent for picture in pictures])
        masks = weights = None
        if any(picture.mask is not None for picture in pictures):
            everything = torch.ones_like(latents[:1, :1])
            masks = torch.cat([everything if picture.mask is None else picture.mask for picture in pictures])
        if any(self.dataset.of(sample).loss_weight != 1 for sample in samples):
            weights = torch.tensor([self.dataset.of(sample).loss_weight for sample in samples])
        return Batch(latents, conditioning, masks, weights)


def _size(encoded: tuple[Tensor, dict[str, Any]]) -> int:
    context, extras = encoded
    return sum(part.nbytes for part in (context, *extras.values()) if isinstance(part, Tensor))
