"""What is trained beside the diffusion model: text encoders, and words of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..embeddings import parse
from ..options import OptionError, Settings, option

ENCODERS = 3


def _rate(number: int) -> Any:
    return option(
        0.0,
        f"Learning rate of text encoder {number} of the CLIP, in its own order (CLIP-L, CLIP-G, T5, …). 0 leaves it as "
        "it is. A tenth to a half of the model's is usual.",
        low=0.0,
        high=10.0,
        step=1e-6,
    )


def _stop(number: int) -> Any:
    return option(
        0,
        f"Step after which text encoder {number} stays as it is; 0 trains it to the end.",
        low=0,
        high=1000000,
        advanced=True,
    )


@dataclass(frozen=True)
class ComponentSettings(Settings):
    train_model: bool = option(True, "Train the diffusion model. Off: only what is switched on below.")
    te1_learning_rate: float = _rate(1)
    te2_learning_rate: float = _rate(2)
    te3_learning_rate: float = _rate(3)
    te1_stop_after: int = _stop(1)
    te2_stop_after: int = _stop(2)
    te3_stop_after: int = _stop(3)
    embeddings: str = option(
        "",
        "Words of your own, trained beside the LoRA and kept in its file (textual inversion). One a line: the word, a "
        "colon, how many vectors, and the text they begin as: my_cat: 4 fluffy cat. Use the word in the captions.",
        multiline=True,
    )
    embedding_learning_rate: float = option(
        1e-3, "Learning rate of the embeddings.", low=1e-8, high=10.0, step=1e-4
    )
    embedding_stop_after: int = option(
        0, "Step after which the embeddings stay as they are; 0 trains them to the end.", low=0, high=1000000,
        advanced=True,
    )
    preserve_embedding_norm: bool = option(
        False, "Keep the embeddings as long as the model's own words are.", advanced=True
    )

    def check_together(self) -> None:
        parse(self.embeddings)
        if not (self.train_model or any(self.encoder_rates) or self.embeddings.strip()):
            raise OptionError("train_model is off, expected something else to train then: a text encoder or embeddings")
        for number, (rate, stop) in enumerate(zip(self.encoder_rates, self.encoder_stops, strict=True), 1):
            if stop and not rate:
                raise OptionError(
                    f"te{number}_stop_after is {stop}, expected 0: text encoder {number} is not trained "
                    f"(te{number}_learning_rate is 0)"
                )
        if not self.embeddings.strip() and (self.embedding_stop_after or self.preserve_embedding_norm):
            name = "embedding_stop_after" if self.embedding_stop_after else "preserve_embedding_norm"
            raise OptionError(f"{name} is {getattr(self, name)!r}, expected its default: embeddings names none")

    @property
    def encoder_rates(self) -> tuple[float, ...]:
        return self.te1_learning_rate, self.te2_learning_rate, self.te3_learning_rate

    @property
    def encoder_stops(self) -> tuple[int, ...]:
        return self.te1_stop_after, self.te2_stop_after, self.te3_stop_after

    @property
    def trains_text(self) -> bool:
        """Whether anything is trained that the captions run through."""
        return any(self.encoder_rates) or bool(self.embeddings.strip())
