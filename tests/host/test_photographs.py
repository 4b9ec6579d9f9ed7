"""Training on real photographs teaches what is on them: held-out loss falls, and more than with another's LoRA.

The pictures ship inside scikit-image and scikit-learn. Training crops come from the left of each photograph, held-out
crops from its right, no pixel in common; of the motorcycles one photograph of the stereo pair trains, the other tests.
The base is the demo model, which has never seen a photograph.
"""

import math
import random
import statistics
from pathlib import Path

import comfy.sd
import numpy as np
import pytest
import skimage
import sklearn
import torch
from PIL import Image

import host_extension  # noqa: F401 - the host learns to recognise the demo base
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.examples import HostExamples
from lora_loom.host.loan import borrow
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.lora import LoRA
from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.loop import Trainer, generator
from lora_loom.training.objective import sample_losses
from lora_loom.training.settings import OptimizerSettings, Plan
from training import learners, opened

BASE = Path(__file__).resolve().parents[2] / "dev" / "demo_base" / "loom-demo-base.safetensors"
SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
SEEDS, STEPS, BATCH, CROPS = 5, 30, 4, 12
TIMES = (0.25, 0.5, 0.75)


def photograph(path):
    return Image.open(path).convert("RGB")


def halves(path):
    picture = photograph(path)
    width, height = picture.size
    return picture.crop((0, 0, width // 2, height)), picture.crop((width // 2, 0, width, height))


CONCEPTS = {
    "brick": lambda: halves(SKIMAGE / "brick.png"),
    "flower": lambda: halves(SKLEARN / "flower.jpg"),
    "motorcycle": lambda: (photograph(SKIMAGE / "motorcycle_left.png"), photograph(SKIMAGE / "motorcycle_right.png")),
}


def write_crops(picture, folder, concept, seed):
    """Crops of several sizes as PNG and JPEG; one turned by EXIF, one with an alpha channel."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for number in range(CROPS):
        side = rng.choice((96, 128, 160))
        left, top = rng.randrange(picture.width - side), rng.randrange(picture.height - side)
        crop = picture.crop((left, top, left + side, top + side))
        name = folder / f"{number:02d}"
        if number == 0:
            exif = Image.Exif()
            exif[0x0112] = 6
            crop.transpose(Image.Transpose.ROTATE_90).save(name.with_suffix(".jpg"), quality=95, exif=exif)
        elif number == 1:
            crop.putalpha(255)
            crop.save(name.with_suffix(".png"))
        else:
            crop.resize((side * 3 // 4,) * 2).save(name.with_suffix(rng.choice((".png", ".jpg"))))
        name.with_suffix(".txt").write_text(f"a photo of {concept}")


@pytest.fixture(scope="module")
def loaded():
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(BASE), output_vae=True, output_clip=True)[:3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """concept → (training data set, held-out data set)."""
    root, found = tmp_path_factory.mktemp("photographs"), {}
    for concept, pictures in CONCEPTS.items():
        found[concept] = []
        for part, picture in zip(("training", "held out"), pictures(), strict=True):
            folder = root / concept / part
            write_crops(picture, folder, concept, len(part))
            found[concept].append(opened(folder, 32, 8))
    return found


def adapters_for(model, seed):
    targets = select_targets(model.model, "attention+MLP", conv=False)
    targets += [t for t in select_targets(model.model, "full", conv=True) if t.path not in {x.path for x in targets}]
    return {t.path: LoRA.create(t.shape, Options(4, 4.0), generator(seed, "adapter", i)) for i, t in enumerate(targets)}


def encoded(loaded, dataset, batch, seed, steps):
    examples = HostExamples(dataset, BatchPlan(dataset, batch, seed), *loaded, Plan(), steps)
    with torch.inference_mode():
        examples.prepare(0, lambda count: lambda: None)
    return examples


def trained(loaded, dataset, seed):
    model, examples = loaded[0], encoded(loaded, dataset, BATCH, seed, STEPS)
    plan = Plan(
        length=STEPS, learning_rate=3e-3, rank=4, alpha=4.0, batch_size=BATCH, seed=seed,
        optimizer=OptimizerSettings(schedule="cosine", warmup_steps=3),
    )  # fmt: skip
    adapters = adapters_for(model, seed)
    with borrow(model, adapters) as loan:
        trainer = Trainer(learners(adapters, plan), HostDenoiser(loan), examples, plan, STEPS)
        while not trainer.finished:
            trainer.step()
    return adapters


@torch.no_grad()
def held_out_losses(model, adapters, examples):
    """One loss per held-out picture at fixed noise and timesteps, mean over the timesteps."""
    sums = np.zeros(CROPS)
    with borrow(model, adapters) as loan:
        denoiser = HostDenoiser(loan)
        kind = denoiser.prediction
        for index in range(CROPS):
            batch = examples.batch(index)
            latent, [condition] = batch.latents, batch.conditioning
            noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(index))
            count = len(TIMES)
            x0, noise = latent.expand(count, *latent.shape[1:]), noise.expand(count, *latent.shape[1:])
            sigma = denoiser.noise_levels(torch.tensor(TIMES, dtype=torch.float64))
            output = denoiser.predict(kind.noisy(x0, noise, sigma), sigma, [condition] * count)
            sums[index] = sample_losses(output, kind.target(x0, noise, sigma)).mean().item()
    return sums


def interval(differences):
    """95 % interval of the mean of independent differences (Student's t, 14 degrees of freedom)."""
    mean = statistics.mean(differences)
    half = 2.145 * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - half, mean + half


def test_held_out_loss_falls_and_more_than_with_another_concept(loaded, data, record_property):
    with torch.inference_mode(False):
        model = loaded[0]
        names = list(CONCEPTS)
        loras = {
            (concept, seed): trained(loaded, data[concept][0], seed) for concept in names for seed in range(SEEDS)
        }
        against_base, against_other = [], []
        for number, concept in enumerate(names):
            held_out = encoded(loaded, data[concept][1], 1, 0, CROPS)
            base = held_out_losses(model, {}, held_out)
            other = names[(number + 1) % len(names)]
            for seed in range(SEEDS):
                own = held_out_losses(model, loras[concept, seed], held_out)
                foreign = held_out_losses(model, loras[other, seed], held_out)
                against_base.append(float((base - own).mean() / base.mean()))
                against_other.append(float((foreign - own).mean() / base.mean()))
    fall, more = interval(against_base), interval(against_other)
    record_property("fall against the base, share of its loss", fall)
    record_property("fall beyond another concept's LoRA", more)
    assert fall[0] > 0, (fall, against_base)
    assert more[0] > 0, (more, against_other)
