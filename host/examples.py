"""What a run trains on, encoded span by span, while the model is not on loan.

``HostExamples`` implements ``training.loop.Examples``. Each presentation of a sample has a caption of its own where
the captions vary; the texts and pictures of the coming steps are encoded ahead, and old ones go once they fill their
budget.
Every step asks ``ready`` first; ``prepare`` may move weights, so it runs outside the loan.

Where something of the text is trained (``live``), captions are encoded at each step instead, inside the loan; encoded
ahead are only those for which the untrained model is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import comfy.model_base
import torch
from torch import Tensor

from ..training.dataset.balancing import with_still_validation
from ..training.dataset.batches import BatchPlan, Item, Shown, place
from ..training.dataset.captions import shown
from ..training.dataset.draws import Draws
from ..training.dataset.model import Dataset
from ..training.loop import Batch, generator
from ..training.options import OptionError
from ..training.settings import Plan
from ..training.wording import Wording
from .contents import open_cache
from .denoiser import Conditioning
from .latents import EncodedPicture, PictureCache, check_distribution, check_sizes, encode_pictures
from .texts import Encoded, LiveText, TextCache, encode_captions

TEXT_BUDGET = 1 << 30  # bytes of encoded captions kept
PICTURE_BUDGET = 8 << 30  # bytes of latents kept beyond those of one span
SPAN_STEPS = 2000  # how far ahead is encoded at most: further off, a stopped run would have encoded for nothing
# distilled guidance is an input of some models; training at 1 teaches the model itself
GUIDANCE = 1.0
NO_GUIDANCE = 0.0  # what Chroma is given, which has the input and was not distilled


class HostExamples:
    """The data of a run of ``total_steps`` steps. Raises OptionError for options that this data has no use for."""

    def __init__(
        self,
        dataset: Dataset,
        order: BatchPlan,
        patcher: Any,
        clip: Any,
        vae: Any,
        plan: Plan,
        total_steps: int,
        live: LiveText | None = None,
    ) -> None:
        self.dataset, self.order, self.clip = with_still_validation(dataset), order, clip
        self.guidance = NO_GUIDANCE if isinstance(patcher.model, comfy.model_base.Chroma) else GUIDANCE
        self.accumulation, self.total_steps = plan.optimizer.gradient_accumulation, total_steps
        self.live = live
        self.wording = Wording(self.dataset, order, plan, total_steps)
        self._prior = plan.objective.prior_target == "base model"
        self._held_out = place(self.dataset, ("validation",))
        check_sizes(dataset, (*order.items, *self._held_out), vae)
        self._check(plan)
        sampled = plan.run.sample_latents
        if sampled:
            check_distribution(vae)
        self._disk = open_cache()
        self._kept_texts = TextCache(self._disk, clip) if plan.run.text_cache == "disk" else None
        kept_pictures = PictureCache(self._disk, vae, sampled) if plan.run.latent_cache == "disk" else None

        def encode(wanted: Sequence[tuple[Item, int]], advance: Callable[[], None]) -> list[EncodedPicture]:
            return encode_pictures(
                self.dataset, wanted, order.seed, patcher, vae, advance, sampled=sampled, cache=kept_pictures
            )

        self._encode = encode
        self._pictures: dict[tuple[int, int], EncodedPicture] = {}
        self._texts: dict[str, Encoded] = {}
        self._validation: list[tuple[Item, EncodedPicture, str]] | None = None
        self._validation_texts: dict[str, Encoded] = {}

    def _check(self, plan: Plan) -> None:
        if self._prior and not self.dataset.members("regularisation"):
            raise OptionError(
                "prior_target is 'base model', expected 'images': the dataset has no regularisation pictures. Set the "
                "kind of a dataset with pictures of the class to regularisation and combine it with this one"
            )
        if self.live is not None and plan.run.text_cache == "disk":
            raise OptionError(
                "text_cache is 'disk', expected 'memory': text encoders or embeddings are trained, so captions are "
                "encoded anew at each step"
            )

    # -- what the trainer asks for

    def batch(self, position: int) -> Batch:
        members = self.order.batch(position)
        items = [self.order.items[member.item] for member in members]
        pictures = [self._pictures[member.item, member.variation] for member in members]
        texts = [self._text(member, position) for member in members]
        conditioning = [
            self._conditioning(item, picture, words, self._untrained(text))
            for item, picture, words, text in zip(items, pictures, self._encoded(texts), texts, strict=True)
        ]
        preserved: list[Conditioning | None] = [None] * len(members)
        instead = {
            index: swapped
            for index, (member, text) in enumerate(zip(members, texts, strict=True))
            if (swapped := self.wording.preserved(member, text)) is not None
        }
        # encoded apart, for one part of the loss is differentiated before the other
        for (index, text), words in zip(instead.items(), self._encoded(list(instead.values())), strict=True):
            preserved[index] = self._conditioning(items[index], pictures[index], words, self._untrained(text))
        draws = generator(self.order.seed, "latent", position)
        prior = [self._is_prior(member) for member in members]
        return dataclasses.replace(
            self._batch(items, pictures, [picture.drawn(draws) for picture in pictures], conditioning),
            prior=torch.tensor(prior) if any(prior) else None,
            preserved=preserved if instead else None,
        )

    def validation(self) -> list[Batch]:
        """A batch for each picture that is never trained on, as the text encoders are now; once ``prepare`` has run."""
        assert self._validation is not None, "prepare comes first"
        batches = []
        for item, picture, caption in self._validation:
            if self.live is None:
                words = self._validation_texts[caption]
            else:
                with torch.no_grad():
                    [words] = self.live.encode([caption])
            batches.append(self._batch([item], [picture], [picture.latent], [self._conditioning(item, picture, words)]))
        return batches

    def largest_latent(self) -> Tensor:
        return max((picture.latent for picture in self._pictures.values()), key=Tensor.numel)

    def notes(self) -> list[str]:
        """What the user should know of the caches."""
        found = []
        if self._disk.hits:
            found.append(f"{self._disk.hits} encoded pictures and captions were on disk, {self._disk.misses} were not")
        if self._disk.problem:
            found.append(f"the cache on disk was left as it is: {self._disk.problem}")
        return found

    # -- outside the loan

    def ready(self, step: int) -> bool:
        """Whether everything that step needs is encoded."""
        return self._validation is not None and all(
            (member.item, member.variation) in self._pictures
            and all(text in self._texts for text in self._ahead(member, position))
            for position in self._positions(step)
            for member in self.order.batch(position)
        )

    def prepare(self, step: int, begin: Callable[[int], Callable[[], None]]) -> None:
        """Encode what the steps from ``step`` on need.

        ``begin`` is told how many pictures and captions there are to encode, and gives what to call after each.
        """
        pictures: dict[tuple[int, int], None] = {}  # in order, each once
        texts: dict[str, None] = {}
        room: int | None = None
        for coming in range(step, min(step + SPAN_STEPS, self.total_steps)):
            for position in self._positions(coming):
                for member in self.order.batch(position):
                    pictures[member.item, member.variation] = None
                    texts.update(dict.fromkeys(self._ahead(member, position)))
            if texts and room is None:
                room = self._room_for_texts()
            if room is not None and len(texts) >= room:
                break
        if room is not None:
            self._drop_texts(texts, room)
        new_pictures = [key for key in pictures if key not in self._pictures]
        new_texts = [text for text in texts if text not in self._texts]
        held_out = () if self._validation is not None else self._held_out
        advance = begin(len(new_pictures) + len(new_texts) + len(held_out))
        self._texts |= self._encode_texts(new_texts, advance)
        encoded = self._encode([(self.order.items[item], variation) for item, variation in new_pictures], advance)
        self._pictures.update(zip(new_pictures, encoded, strict=True))
        if sum(map(_picture_size, self._pictures.values())) > PICTURE_BUDGET:
            self._pictures = {key: self._pictures[key] for key in pictures}
        if self._validation is None:
            self._encode_validation(held_out, advance)
        if self._disk.misses:
            self._disk.prune()

    def _positions(self, step: int) -> range:
        return range(step * self.accumulation, (step + 1) * self.accumulation)

    # -- texts

    def _text(self, member: Shown, position: int) -> str:
        return self.wording.text(member, position)

    def _is_prior(self, member: Shown) -> bool:
        """Whether the presentation teaches what the untrained model predicts."""
        return self._prior and self.dataset.of(self.wording.sample(member)).kind == "regularisation"

    def _ahead(self, member: Shown, position: int) -> Iterator[str]:
        """The texts of a presentation that are encoded before the loan."""
        text = self._text(member, position)
        if self.live is None or self._is_prior(member):
            yield text
        instead = self.wording.preserved(member, text)
        if instead is not None:
            yield instead

    def _encoded(self, texts: Sequence[str]) -> list[Encoded]:
        if self.live is None or not texts:
            return [self._texts[text] for text in texts]
        return self.live.encode(texts)

    def _untrained(self, text: str) -> Encoded | None:
        """The text as the untrained encoders have it, where text encoders are trained and that is asked for."""
        return None if self.live is None else self._texts.get(text)

    def _encode_texts(
        self, texts: Iterable[str], advance: Callable[[], None] = lambda: None
    ) -> dict[str, Encoded]:
        return encode_captions(self.clip, texts, advance, self._kept_texts)

    def _room_for_texts(self) -> int:
        """How many captions fit the budget; to know their size one has to be there, and they may be of any length."""
        if not self._texts:
            captions = (self.dataset.samples[item.sample].caption for item in self.order.items)
            self._texts |= self._encode_texts([max(captions, key=len)])
        return max(64, TEXT_BUDGET // max(map(_size, self._texts.values())))

    def _drop_texts(self, needed: Iterable[str], room: int) -> None:
        if len(self._texts) + len(set(needed) - self._texts.keys()) > room:
            self._texts = {text: self._texts[text] for text in needed if text in self._texts}

    def _encode_validation(self, items: Sequence[Item], advance: Callable[[], None]) -> None:
        pictures = self._encode([(item, 0) for item in items], advance)
        samples = [self.dataset.samples[item.sample] for item in items]
        captions = [
            shown(s.caption, self.dataset.of(s).captions, Draws(self.order.seed, "validation caption", s.id))
            for s in samples
        ]
        self._validation_texts = self._encode_texts(captions) if self.live is None else {}
        self._validation = list(zip(items, pictures, captions, strict=True))

    # -- batches

    def _conditioning(
        self, item: Item, picture: EncodedPicture, encoded: Encoded, untrained: Encoded | None = None
    ) -> Conditioning:
        context, extras = encoded
        base = None if untrained is None else self._conditioning(item, picture, untrained)
        size = self.dataset.samples[item.sample].size
        return Conditioning(context, {"guidance": self.guidance, **extras}, size, picture.crop, item.bucket, base)

    def _batch(
        self,
        items: Sequence[Item],
        pictures: Sequence[EncodedPicture],
        latents: Sequence[Tensor],
        conditioning: Sequence[Conditioning],
    ) -> Batch:
        samples = [self.dataset.samples[item.sample] for item in items]
        masks = weights = None
        if any(picture.mask is not None for picture in pictures):
            everything = torch.ones_like(latents[0][:, :1])
            masks = torch.cat([everything if picture.mask is None else picture.mask for picture in pictures])
        if any(self.dataset.of(sample).loss_weight != 1 for sample in samples):
            weights = torch.tensor([self.dataset.of(sample).loss_weight for sample in samples])
        width, height = items[0].bucket
        return Batch(torch.cat(list(latents)), conditioning, masks, weights, pixels=width * height)


def _picture_size(picture: EncodedPicture) -> int:
    return picture.latent.nbytes * (1 if picture.deviation is None else 2)


def _size(encoded: Encoded) -> int:
    context, extras = encoded
    return sum(part.nbytes for part in (context, *extras.values()) if isinstance(part, Tensor))
