"""What a dataset says reaches the training: masks, weights, varying captions, variations, held-out pictures."""

import dataclasses
import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host import examples as host_examples
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.examples import HostExamples
from lora_loom.host.loan import borrow
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.model import CaptionOptions, Concept, ImageOptions
from lora_loom.training.dataset.pixels import load
from lora_loom.training.loop import Trainer, generator
from lora_loom.training.settings import ObjectiveSettings, OptimizerSettings, Plan
from tiny_text import tiny_qwen_clip
from training import adapters_for, learners, opened

PLAN = Plan(length=6, rank=2, alpha=2.0, batch_size=2, seed=3, learning_rate=1e-2)
NAMES = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return images(tmp_path_factory.mktemp("data") / "zorb", count=5)


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        return tiny_model("sd15"), clip_for("sd15"), vae_for("sd15")


def with_options(dataset, **options):
    return dataclasses.replace(dataset, concepts=tuple(dataclasses.replace(c, **options) for c in dataset.concepts))


def prepared(dataset, parts, steps=6, batch=2, seed=3, accumulation=1):
    plan = dataclasses.replace(PLAN, optimizer=OptimizerSettings(gradient_accumulation=accumulation))
    examples = HostExamples(dataset, BatchPlan(dataset, batch, seed), *parts, plan, steps)
    with torch.inference_mode():
        examples.prepare(0, lambda count: lambda: None)
    return examples


def run(dataset, parts, plan=PLAN, name=None, if_exists="new"):
    with torch.inference_mode():
        return train(Request(*parts, dataset, plan, name or f"dataset run {next(NAMES)}", if_exists))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- sizes


def test_a_batch_knows_the_size_of_its_pictures(folder, parts):
    examples = prepared(opened(folder, 64, 16), parts)
    batch, (width, height) = examples.batch(0), examples.order.items[0].bucket
    assert batch.pixels == width * height == batch.conditioning[0].target_size[0] * batch.conditioning[0].target_size[1]


# ---------------------------------------------------------------- masks and weights


def masked(folder, dark):
    """The dataset with a mask of the left half; what lies under the dark half is ``dark``."""
    for path in sorted(folder.glob("*.png")):
        if "masklabel" in path.name:
            continue
        pixels = np.asarray(Image.open(path)).copy()
        height, width = pixels.shape[:2]
        pixels[:, width // 2 :] = dark
        Image.fromarray(pixels).save(path)
        mask = np.zeros((height, width), np.uint8)
        mask[:, : width // 2] = 255
        Image.fromarray(mask).save(path.with_name(f"{path.stem}-masklabel.png"))
    return opened(folder, 64, 16)


def test_the_loss_is_the_mean_over_the_masks_area(tmp_path, parts):
    """Against the closed form, on the prediction of the borrowed model."""
    dataset = masked(images(tmp_path, count=3), 0)
    examples = prepared(dataset, parts)
    batch = examples.batch(0)
    assert batch.masks is not None and batch.masks.shape == (len(batch.latents), 1, *batch.latents.shape[2:])
    half = batch.latents.shape[-1] // 2
    assert (batch.masks[..., :half] > 0.9).all() and (batch.masks[..., half:] < 0.1).all()

    adapters = adapters_for(parts[0])
    with torch.inference_mode(False), borrow(parts[0], adapters) as loan:
        denoiser = HostDenoiser(loan)
        trainer = Trainer(learners(adapters, PLAN), denoiser, examples, PLAN, 1)
        found = trainer.loss(0).item()
        times = torch.rand(len(batch.latents), generator=generator(3, "timestep", 0), dtype=torch.float64)
        noise = torch.randn(batch.latents.shape, generator=generator(3, "noise", 0))
        sigma = denoiser.noise_levels(times)
        noisy = batch.latents + sigma.view(-1, 1, 1, 1) * noise
        output = denoiser.predict(noisy, sigma, batch.conditioning)
    squares, masks = (output - noise).detach().double().square().numpy(), batch.masks.double().numpy()
    each = [(squares[i] * masks[i]).sum() / (masks[i].sum() * squares.shape[1]) for i in range(len(squares))]
    assert found == pytest.approx(sum(each) / len(each), rel=1e-6)
    assert found != pytest.approx((output - noise).double().square().mean().item(), rel=1e-3)


def test_weights_scale_each_samples_loss(folder, parts):
    plain = opened(folder, 64, 16)
    other = dataclasses.replace(plain.concepts[0], loss_weight=0.25)
    samples = [dataclasses.replace(sample, concept=index % 2) for index, sample in enumerate(plain.samples)]
    weighted = dataclasses.replace(plain, concepts=(plain.concepts[0], other), samples=tuple(samples))
    adapters = adapters_for(parts[0], "attention")
    with torch.inference_mode(False):
        one, two = prepared(plain, parts, batch=1), prepared(weighted, parts, batch=1)
        with borrow(parts[0], adapters) as loan:
            denoiser = HostDenoiser(loan)
            for position in range(5):
                factor = two.batch(position).weights
                sample = one.order.items[one.order.batch(position)[0].item].sample
                assert (factor is None) == (sample % 2 == 0)
                trainers = [Trainer(learners(adapters, PLAN), denoiser, e, PLAN, 1) for e in (one, two)]
                bare, scaled = (trainer.loss(position).item() for trainer in trainers)
                assert scaled == pytest.approx(bare * (0.25 if sample % 2 else 1), rel=1e-6)


# ---------------------------------------------------------------- captions that vary


VARYING = CaptionOptions(shuffle=True, dropout=0.3, tag_dropout=0.3, trigger="zorb")


def texts(examples, positions):
    return [
        examples._text(member, position) for position in range(positions) for member in examples.order.batch(position)
    ]


def test_spans_of_any_length_give_the_same_bits(folder, parts, monkeypatch):
    dataset = with_options(opened(folder, 64, 16), captions=VARYING, images=ImageOptions(flip=True))
    whole = run(dataset, parts)
    monkeypatch.setattr(host_examples, "SPAN_STEPS", 1)
    monkeypatch.setattr(host_examples, "TEXT_BUDGET", 0)
    monkeypatch.setattr(host_examples, "PICTURE_BUDGET", 0)
    in_pieces = run(dataset, parts)
    assert whole.losses == in_pieces.losses and same(whole.lora, in_pieces.lora)
    assert whole.losses != run(opened(folder, 64, 16), parts).losses


def test_a_stopped_run_goes_on_with_the_captions_it_would_have_shown(folder, parts):
    dataset = with_options(opened(folder, 64, 16), captions=VARYING, images=ImageOptions(flip=True, brightness=0.2))
    whole = run(dataset, parts, PLAN)
    name = f"dataset run {next(NAMES)}"
    run(dataset, parts, dataclasses.replace(PLAN, length=2), name)
    rest = run(dataset, parts, PLAN, name, "continue")
    assert rest.losses == whole.losses and same(rest.lora, whole.lora)


def test_each_presentation_has_a_caption_of_its_own(folder, parts):
    dataset = with_options(opened(folder, 64, 16), captions=dataclasses.replace(VARYING, dropout=0.4))
    examples = prepared(dataset, parts, steps=60)
    found = texts(examples, 60)
    assert 0.2 < found.count("") / len(found) < 0.6
    assert all(text == "" or text.startswith("zorb") for text in found)
    again = prepared(dataset, parts, steps=60)
    assert texts(again, 60) == found
    other = HostExamples(dataset, BatchPlan(dataset, 2, 4), *parts, PLAN, 60)
    assert texts(other, 60) != found


def test_old_texts_go_when_their_budget_is_full(folder, parts, monkeypatch):
    dataset = with_options(opened(folder, 64, 16), captions=CaptionOptions(wildcards=True))
    samples = [dataclasses.replace(s, caption="{" + "|".join(map(str, range(400))) + "}") for s in dataset.samples]
    monkeypatch.setattr(host_examples, "TEXT_BUDGET", 0)
    examples = prepared(dataset.with_samples(samples), parts, steps=300)
    step = 0
    while step < 300:
        assert len(examples._texts) <= 64 + 2
        while step < 300 and examples.ready(step):
            examples.batch(step)
            step += 1
        if step < 300:
            with torch.inference_mode():
                examples.prepare(step, lambda count: lambda: None)


def test_the_budget_counts_captions_as_long_as_they_are(folder, parts, monkeypatch):
    """Encoders of language models give as many vectors as there are tokens."""
    clip, dataset = tiny_qwen_clip(inference=True), opened(folder, 64, 16)
    words = ", ".join(f"word{index}" for index in range(60))
    samples = [dataclasses.replace(sample, caption=words) for sample in dataset.samples]
    varied = with_options(dataset.with_samples(samples), captions=CaptionOptions(shuffle=True))
    [(context, _)] = host_examples.encode_captions(clip, [words]).values()
    monkeypatch.setattr(host_examples, "TEXT_BUDGET", 80 * context.nbytes)
    examples = prepared(varied, (parts[0], clip, parts[2]), steps=150)
    assert sum(map(host_examples._size, examples._texts.values())) < 1.1 * host_examples.TEXT_BUDGET
    assert len(examples._texts) > 70


def test_long_captions_and_clip_skip_go_through_the_hosts_encoder(folder, parts):
    """77 tokens are one piece of the host's, more are several; the last layer is the CLIP's own choice."""
    dataset = opened(folder, 64, 16)
    long = [dataclasses.replace(dataset.samples[0], caption="a cat, " * 60), *dataset.samples[1:]]
    mixed = prepared(dataset.with_samples(long), parts, steps=3)
    lengths = {item.cross_attn.shape[1] for position in range(3) for item in mixed.batch(position).conditioning}
    assert len(lengths) == 2 and max(lengths) % min(lengths) == 0
    result = run(dataset.with_samples(long), parts)
    assert all(np.isfinite(result.losses))

    skipped = parts[1].clone()
    skipped.clip_layer(-2)
    assert run(dataset, (parts[0], skipped, parts[2])).losses != run(dataset, parts).losses


# ---------------------------------------------------------------- pictures


def test_every_variation_is_seen(folder, parts):
    dataset = with_options(opened(folder, 64, 16), images=ImageOptions(flip=True))
    examples = prepared(dataset, parts, steps=20, batch=1)
    seen = {}
    for position in range(10):
        [member] = examples.order.batch(position)
        latent = examples.batch(position).latents
        seen.setdefault(member.item, []).append(latent)
    assert len(seen) == 5
    assert all(len(pair) == 2 and not torch.equal(*pair) for pair in seen.values())


def test_size_conditioning_tells_of_the_crop_that_is_shown(folder, parts):
    """What SDXL is told: the picture's own size, where the crop lies in the scaled picture, the bucket's size."""
    dataset = with_options(opened(folder, 64, 64), images=ImageOptions(crop="random", flip=True, variations=4))
    examples = prepared(dataset, parts, steps=20, batch=1)
    crops = set()
    for position in range(20):
        [member], [condition] = examples.order.batch(position), examples.batch(position).conditioning
        item = examples.order.items[member.item]
        pixels = load(dataset, item, member.variation, examples.order.seed)
        assert condition.original_size == dataset.samples[item.sample].size
        assert (condition.crop, condition.target_size) == (pixels.crop, item.bucket)
        arguments = condition.host_arguments()
        assert (arguments["crop_w"], arguments["crop_h"]) == pixels.crop
        assert (arguments["target_width"], arguments["target_height"]) == pixels.image.shape[1::-1]
        crops.add(pixels.crop)
    assert len(crops) > 5


def test_several_resolutions_are_trained_at_once(folder, parts):
    dataset = with_options(opened(folder, 64, 16), resolutions=((64, 64), (96, 96)))
    examples = prepared(dataset, parts, steps=10, batch=1)
    areas = sorted({examples.batch(position).latents[0, 0].numel() * 64 for position in range(10)})
    assert len(areas) >= 2 and areas[-1] > 1.8 * areas[0]
    assert examples.order.batches_in(1) == 10


def test_length_in_epochs_and_presentations_counts_repeats(folder, parts):
    dataset = with_options(opened(folder, 64, 16), repeats=Fraction(3))

    def steps(length, unit):
        plan = dataclasses.replace(PLAN, length=length, unit=unit, batch_size=1)
        return run(dataset, parts, plan).report.splitlines()[0]

    assert "30 of 30 steps" in steps(2, "epochs")
    assert "15 of 15 steps" in steps(3, "presentations per image")


# ---------------------------------------------------------------- regularisation and validation


def test_regularisation_pictures_are_shown_as_often_as_the_others(folder, parts):
    plain = opened(folder, 64, 16)
    concepts = (plain.concepts[0], Concept("class", "regularisation", plain.concepts[0].resolutions,
                                           buckets=plain.concepts[0].buckets, loss_weight=0.5))  # fmt: skip
    samples = [dataclasses.replace(sample, concept=int(index > 1)) for index, sample in enumerate(plain.samples)]
    dataset = dataclasses.replace(plain, concepts=concepts, samples=tuple(samples))
    examples = prepared(dataset, parts, batch=1, steps=12)
    shown = [examples.order.items[examples.order.batch(p)[0].item].sample for p in range(examples.order.batches_in(3))]
    assert len(shown) == 12 and sum(sample > 1 for sample in shown) == 6
    assert {examples.batch(p).weights is None for p, sample in enumerate(shown) if sample > 1} == {False}


def test_validation_pictures_are_never_trained_and_their_loss_is_told(folder, parts):
    plain = opened(folder, 64, 16)
    held_out = dataclasses.replace(plain.concepts[0], kind="validation")
    samples = [dataclasses.replace(sample, concept=int(index == 4)) for index, sample in enumerate(plain.samples)]
    dataset = dataclasses.replace(plain, concepts=(*plain.concepts, held_out), samples=tuple(samples))
    without = plain.with_samples(plain.samples[:4])
    one, two = run(dataset, parts), run(without, parts)
    assert one.losses == two.losses and same(one.lora, two.lora)
    assert "validation loss" not in two.report
    line = next(line for line in one.report.splitlines() if line.startswith("validation loss"))
    first, last = (float(part.split()[0]) for part in line.removeprefix("validation loss ").split(" → "))
    assert "(step 0)" in line and "(step 6)" in line and first != last

    adapters = adapters_for(parts[0], filled=False)
    examples = prepared(dataset, parts)
    [batch] = examples.validation()
    with torch.inference_mode(False), borrow(parts[0], adapters) as loan:
        trainer = Trainer(learners(adapters, PLAN), HostDenoiser(loan), examples, PLAN, 1)
        losses = trainer.validation_losses([batch])
        assert sum(losses.values()) / len(losses) == pytest.approx(first, abs=6e-5)
        assert trainer.validation_losses([batch]) == losses


def test_the_report_carries_what_the_dataset_has_to_say(folder, parts):
    plain = opened(folder, 64, 16)
    captions = CaptionOptions(shuffle=True, separator=";")
    dataset = with_options(plain.with_samples(plain.samples, "left out: torn.png"), captions=captions)
    report = run(dataset, parts, dataclasses.replace(PLAN, length=1)).report
    assert "note: left out: torn.png" in report
    assert "shuffle: no caption has more than one tag" in report


def test_a_run_that_goes_on_with_another_dataset_says_so(tmp_path, parts):
    folder = images(tmp_path, count=3)
    one = opened(folder, 64, 16)
    run(one, parts, dataclasses.replace(PLAN, length=1), "another dataset", "error")
    (folder / "0.txt").write_text("another caption")
    two = with_options(opened(folder, 64, 16), captions=CaptionOptions(prefix="a"))
    [changed] = [line for line in _went_on(two, parts, 2) if "changed" in line]
    assert "length 1 → 2" in changed and "prefix 'a'" in changed
    assert "the dataset's captions" in changed and one.fingerprint() not in changed
    [changed] = [line for line in _went_on(two, parts, 3) if "changed" in line]
    assert "dataset" not in changed


def _went_on(dataset, parts, length):
    plan = dataclasses.replace(PLAN, length=length)
    return run(dataset, parts, plan, "another dataset", "continue").report.splitlines()


def test_validation_pictures_have_to_fit_the_vae_too(folder, parts):
    plain = opened(folder, 64, 16)
    buckets = dataclasses.replace(plain.concepts[0].buckets, step=12)
    held_out = dataclasses.replace(plain.concepts[0], kind="validation", resolutions=((60, 60),), buckets=buckets)
    samples = [dataclasses.replace(sample, concept=int(index == 4)) for index, sample in enumerate(plain.samples)]
    dataset = dataclasses.replace(plain, concepts=(*plain.concepts, held_out), samples=tuple(samples))
    with pytest.raises(ValueError, match=r"would be trained at .* multiples of 8"):
        prepared(dataset, parts)


def test_micro_batches_of_one_step_are_prepared_together(folder, parts):
    plan = dataclasses.replace(PLAN, length=3, optimizer=OptimizerSettings(gradient_accumulation=4))
    dataset = with_options(opened(folder, 64, 16), captions=VARYING)
    assert len(run(dataset, parts, plan).losses) == 3


def test_token_warm_up_follows_the_optimizers_steps(folder, parts):
    options = CaptionOptions(warmup_min=1, warmup_steps=0.5)
    dataset = with_options(opened(folder, 64, 16), captions=options)
    samples = [dataclasses.replace(sample, caption="a, b, c, d, e") for sample in dataset.samples]
    examples = prepared(dataset.with_samples(samples), parts, steps=10, batch=1, accumulation=2)
    counts = [text.count(",") + 1 for text in texts(examples, 20)]
    assert counts[:2] == [1, 1] and counts == sorted(counts) and counts[10:] == [5] * 10


def test_the_objective_draws_do_not_depend_on_the_data(folder, parts):
    """Same seed, other captions: same noise and timesteps, so that runs can be compared."""
    plan = dataclasses.replace(PLAN, objective=ObjectiveSettings(timesteps="uniform"), length=1)
    one = run(opened(folder, 64, 16), parts, plan)
    two = run(with_options(opened(folder, 64, 16), captions=CaptionOptions(prefix="")), parts, plan)
    assert one.losses == two.losses
