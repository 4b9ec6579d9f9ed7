"""The demo base is a generator: a classifier that never met it names what it was asked for."""

from pathlib import Path

import comfy.sample
import comfy.sd
import torch

import classifier
import host_extension  # noqa: F401 - the host learns to recognise the demo base
from drawings import BACKGROUNDS, KNOWN_CLASSES, caption

BASE = Path(__file__).resolve().parents[2] / "dev" / "demo_base" / "loom-demo-base.safetensors"
PER_CLASS = 4


def test_the_file_is_small_enough_to_ship():
    assert BASE.stat().st_size <= 10_000_000


def test_samples_are_named_after_their_captions():
    with torch.inference_mode():
        model, clip, vae = comfy.sd.load_checkpoint_guess_config(str(BASE), output_vae=True, output_clip=True)[:3]

        def encode(text):
            return clip.encode_from_tokens_scheduled(clip.tokenize(text))

        wanted, named = [], []
        negative = encode("")
        for number, thing in enumerate(KNOWN_CLASSES):
            positive = encode(caption(thing, list(BACKGROUNDS)[number % 2]))
            latent = torch.zeros(PER_CLASS, 3, 32, 32)
            noise = comfy.sample.prepare_noise(latent, 100 + number)
            samples = comfy.sample.sample(
                model, noise, 20, 3.0, "euler", "normal", positive, negative, latent, seed=number, disable_pbar=True
            )
            pixels = vae.decode(samples).permute(0, 3, 1, 2).clone()
            wanted += [thing] * PER_CLASS
            named += classifier.load().names(pixels)
    right = sum(a == b for a, b in zip(wanted, named, strict=True))
    assert len(wanted) == 64
    assert right >= 0.9 * len(wanted), [pair for pair in zip(wanted, named, strict=True) if pair[0] != pair[1]]
