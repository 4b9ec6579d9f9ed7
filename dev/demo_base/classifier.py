"""The judge of the demo: a small network that names what a 32 × 32 picture shows, and describes it by 64 numbers.

It never sees generated pictures while it learns, only fresh drawings made noisier, softer and off in colour, so that
it judges a generator's output without favour. ``python dev/demo_base/classifier.py`` trains it again in a few minutes
on one thread and writes ``classifier.safetensors``.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.append(str(HERE))

from drawings import BACKGROUNDS, CLASSES, draw  # noqa: E402

SIZE = 32
FEATURES = 64
WEIGHTS = HERE / "classifier.safetensors"
STEPS = 1500
BATCH = 64
LEARNING_RATE = 3e-3


class Classifier(nn.Module):
    """Pixels (B, 3, 32, 32) in [0, 1] to one logit for each of ``drawings.CLASSES``."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 40, 64)
        stages = []
        for inside, outside in zip(widths, widths[1:], strict=False):
            stages += [nn.Conv2d(inside, outside, 3, padding=1), nn.GroupNorm(8, outside), nn.SiLU(), nn.MaxPool2d(2)]
        self.stages = nn.Sequential(*stages)
        self.features_out = nn.Linear(widths[-1] * 4 * 4, FEATURES)
        self.logits = nn.Linear(FEATURES, len(CLASSES))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The penultimate layer (B, 64): distances between its vectors compare pictures by what they show."""
        return torch.tanh(self.features_out(self.stages(pixels * 2 - 1).flatten(1)))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.logits(self.features(pixels))

    @torch.no_grad()
    def names(self, pixels: torch.Tensor) -> list[str]:
        """The class each picture of a batch shows, by name."""
        return [CLASSES[index] for index in self(pixels).argmax(1).tolist()]


def load(path: Path = WEIGHTS) -> Classifier:
    """The trained classifier, ready to judge."""
    classifier = Classifier()
    classifier.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return classifier.eval().requires_grad_(False)


def as_pixels(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """Pictures to (B, 3, 32, 32) in [0, 1]; others than 32 × 32 are resized."""
    small = [picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX) for picture in pictures]
    pixels = np.stack([np.asarray(picture, dtype=np.float32) for picture in small])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255


def drawings(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` fresh drawings of all classes in turn, and their class indices."""
    rng = random.Random(seed)
    labels = [index % len(CLASSES) for index in range(count)]
    pictures = [draw(CLASSES[label], rng.choice(tuple(BACKGROUNDS)), SIZE, rng) for label in labels]
    return as_pixels(pictures), torch.tensor(labels)


def spoil(pixels: torch.Tensor, draws: torch.Generator) -> torch.Tensor:
    """Each picture softened, off in colour and contrast, and noisy, each by an amount of its own."""

    def amount(*shape: int) -> torch.Tensor:
        return torch.rand(len(pixels), *shape, generator=draws)

    soft = functional.avg_pool2d(functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pixels = torch.lerp(pixels, soft, amount(1, 1, 1))
    pixels = (pixels - 0.5) * (0.8 + 0.4 * amount(1, 1, 1)) + 0.5 + 0.16 * (amount(3, 1, 1) - 0.5)
    return pixels + 0.12 * amount(1, 1, 1) * torch.randn(pixels.shape, generator=draws)


def train(steps: int = STEPS) -> Classifier:
    torch.manual_seed(0)
    classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        pixels, labels = drawings(BATCH, seed=step)
        pixels = spoil(pixels, torch.Generator().manual_seed(step))
        loss = functional.cross_entropy(classifier(pixels), labels, label_smoothing=0.02)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    return classifier.eval()


def accuracy(classifier: Classifier, count: int, seed: int, spoilt: bool = False) -> float:
    """The share of ``count`` fresh drawings that it names rightly; seeds from 10⁶ on were never trained on."""
    pixels, labels = drawings(count, seed)
    if spoilt:
        pixels = spoil(pixels, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return (classifier(pixels).argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the classifier of the demo.")
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    classifier = train()
    save_file({name: value.half().contiguous() for name, value in classifier.state_dict().items()}, options.output)
    classifier = load(options.output)
    for spoilt in (False, True):
        print(f"held-out {'spoilt ' if spoilt else ''}drawings: {accuracy(classifier, 1700, 1_000_000, spoilt):.2%}")


if __name__ == "__main__":
    main()
