"""What the untrained model predicts as a target: regularisation pictures, and the class in place of the trigger.

Both through the real Trainer, examples and borrowed model, against their closed forms; the untrained prediction comes
from a loan of its own on which no adapter hangs.
"""

import dataclasses

import pytest
import torch

from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.examples import HostExamples
from lora_loom.host.loan import borrow
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.host.texts import encode_captions
from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.loop import Trainer, generator
from lora_loom.training.objective import draw_times
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ObjectiveSettings, Plan, RunSettings
from training import adapters_for, learners, opened

FAMILIES = ("sd15", "sdxl", "flux")
DOP = {"preservation_weight": 0.7, "preservation_trigger": "zorb", "preservation_class": "cat"}
BASE = {"prior_target": "base model"}
SEED = 3


@pytest.fixture(scope="module", params=FAMILIES)
def parts(request):
    with torch.inference_mode():
        return tiny_model(request.param), clip_for(request.param), vae_for(request.param)


@pytest.fixture(scope="module")
def sd15():
    with torch.inference_mode():
        return tiny_model("sd15"), clip_for("sd15"), vae_for("sd15")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Square pictures, so that all of them can be in one batch; two of four captions have the trigger."""
    folder = images(tmp_path_factory.mktemp("data") / "zorb", count=6)
    for index in (1, 3):
        (folder / f"{index}.png").write_bytes((folder / f"{index - 1}.png").read_bytes()[:-1] + b"\x81")
    for index, caption in enumerate(("a zorb, red", "nothing", "zorb", "a hat", "a (Zorb)", "the sky")):
        (folder / f"{index}.txt").write_text(caption)
    return folder


def with_regularisation(dataset):
    """The last three pictures are of the class."""
    of_class = dataclasses.replace(dataset.concepts[0], name="class", kind="regularisation")
    samples = [dataclasses.replace(sample, concept=int(index > 2)) for index, sample in enumerate(dataset.samples)]
    return dataclasses.replace(dataset, concepts=(*dataset.concepts, of_class), samples=tuple(samples))


def prepared(dataset, parts, batch=2, steps=12, live=None, run=None, **objective):
    plan = Plan(batch_size=batch, seed=SEED, objective=ObjectiveSettings(**objective), run=run or RunSettings())
    examples = HostExamples(dataset, BatchPlan(dataset, batch, SEED), *parts, plan, steps, live)
    with torch.inference_mode():
        examples.prepare(0, lambda count: lambda: None)
    return examples, plan


class Parts:
    """A batch's noisy latents, targets and predictions: with the adapters, and of the model without any."""

    def __init__(self, patcher, adapters, plan, batch, position=0):
        with borrow(patcher) as loan:
            denoiser = HostDenoiser(loan)
            kind = denoiser.prediction
            latents = batch.latents
            times = draw_times(
                len(latents), kind, plan.objective, generator(SEED, "timestep", position), batch.pixels
            )
            self.sigma = denoiser.noise_levels(times)
            noise = torch.randn(latents.shape, generator=generator(SEED, "noise", position))
            self.noisy = kind.noisy(latents, noise, self.sigma)
            self.target = kind.target(latents, noise, self.sigma)
            with torch.no_grad():
                self.old = denoiser.predict(self.noisy, self.sigma, batch.conditioning)
                self.kept = [index for index, item in enumerate(batch.preserved or ()) if item is not None]
                self.items = [batch.preserved[index] for index in self.kept]
                self.old_kept = self._predict(denoiser)
        self.batch = batch

    def _predict(self, denoiser):
        return denoiser.predict(self.noisy[self.kept], self.sigma[self.kept], self.items) if self.kept else None

    def loss(self, denoiser, weight):
        """mean over samples of ‖new − target‖², and of those kept w·‖new(class) − old(class)‖²"""
        prior = self.batch.prior if self.batch.prior is not None else torch.zeros(len(self.noisy), dtype=torch.bool)
        target = torch.where(prior.view(-1, *(1 for _ in self.noisy.shape[1:])), self.old, self.target)
        new = denoiser.predict(self.noisy, self.sigma, self.batch.conditioning)
        loss = (new - target).square().mean()
        if self.kept:
            changed = (self._predict(denoiser) - self.old_kept).square().flatten(1).mean(1)
            loss = loss + weight * changed.sum() / len(self.noisy)
        return loss


def check_against_closed_form(parts, examples, plan, positions):
    adapters = adapters_for(parts[0], "attention", conv=False)
    leaves = [tensor for adapter in adapters.values() for tensor in adapter.parameters()]
    for position in positions:
        batch = examples.batch(position)
        with torch.inference_mode(False):
            apart = Parts(parts[0], adapters, plan, batch, position)
            with borrow(parts[0], adapters) as loan:
                denoiser = HostDenoiser(loan)
                trainer = Trainer(learners(adapters, plan), denoiser, examples, plan, 1)
                found = trainer.loss(position)
                gradients = torch.autograd.grad(found, leaves, allow_unused=True)
                expected = apart.loss(denoiser, plan.objective.preservation_weight)
                wanted = torch.autograd.grad(expected, leaves, allow_unused=True)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        alive = [(one, two) for one, two in zip(gradients, wanted, strict=True) if two is not None]
        assert len(alive) > len(leaves) / 2
        largest = max(two.abs().max() for _, two in alive)
        assert largest > 0
        for one, two in alive:
            assert torch.allclose(one, two, rtol=1e-3, atol=1e-5 * largest)


# ---------------------------------------------------------------- regularisation pictures


def test_regularisation_pictures_hold_the_model_to_its_old_prediction(folder, parts):
    dataset = with_regularisation(opened(folder, 64, 16))
    examples, plan = prepared(dataset, parts, **BASE)
    seen = []
    for position in range(6):
        batch = examples.batch(position)
        kinds = [dataset.of(examples.wording.sample(m)).kind for m in examples.order.batch(position)]
        marked = [False] * len(kinds) if batch.prior is None else batch.prior.tolist()
        assert marked == [kind == "regularisation" for kind in kinds] and batch.preserved is None
        seen += marked
    assert True in seen and False in seen
    check_against_closed_form(parts, examples, plan, [seen_at(examples, any), seen_at(examples, lambda p: not any(p))])


def seen_at(examples, asked):
    """A position whose batch has (or has not) something of the untrained model."""
    for position in range(12):
        batch = examples.batch(position)
        if asked([batch.prior is not None, batch.preserved is not None]):
            return position
    raise AssertionError("no such batch")


def test_an_untrained_model_has_nothing_to_learn_from_them(folder, sd15):
    """Fresh adapters change nothing, so only the pictures of the concept have a loss."""
    dataset = with_regularisation(opened(folder, 64, 16))
    examples, plan = prepared(dataset, sd15, batch=1, **BASE)
    adapters = adapters_for(sd15[0], filled=False)
    with torch.inference_mode(False), borrow(sd15[0], adapters) as loan:
        trainer = Trainer(learners(adapters, plan), HostDenoiser(loan), examples, plan, 1)
        for position in range(8):
            assert (trainer.loss(position).item() == 0) == (examples.batch(position).prior is not None)


def test_pictures_as_targets_are_the_default(folder, sd15):
    dataset = with_regularisation(opened(folder, 64, 16))
    examples, _ = prepared(dataset, sd15)
    assert all(examples.batch(position).prior is None for position in range(8))


def test_without_regularisation_pictures_there_is_no_prior(folder, sd15):
    with pytest.raises(OptionError, match=r"prior_target is 'base model', expected 'images': .* regularisation"):
        prepared(opened(folder, 64, 16), sd15, **BASE)


# ---------------------------------------------------------------- differential output preservation


def test_the_class_word_keeps_its_old_prediction(folder, parts):
    """L = MSE(new, target) + w · MSE(new(class), old(class)), the second for captions with the trigger."""
    dataset = opened(folder, 64, 16)
    examples, plan = prepared(dataset, parts, **DOP)
    mixed = set()
    for position in range(6):
        batch, members = examples.batch(position), examples.order.batch(position)
        captions = [examples.wording.sample(member).caption for member in members]
        expected = ["zorb" in caption.lower() for caption in captions]
        found = [item is not None for item in batch.preserved or [None] * len(members)]
        assert found == expected
        mixed.add(tuple(sorted(expected)))
        for caption, item, own in zip(captions, batch.preserved or (), batch.conditioning, strict=False):
            if item is not None:
                text = caption.replace("zorb", "cat").replace("(Zorb)", "\\(cat\\)")
                [(context, _)] = encode_captions(parts[1], [text]).values()
                assert torch.equal(item.cross_attn, context) and not torch.equal(item.cross_attn, own.cross_attn)
                rest = dataclasses.replace(own, cross_attn=item.cross_attn, extras=item.extras)
                assert (item.crop, item.host_arguments()["width"]) == (rest.crop, rest.host_arguments()["width"])
    assert (False, True) in mixed
    check_against_closed_form(parts, examples, plan, [seen_at(examples, any)])


def test_both_at_once(folder, sd15):
    dataset = with_regularisation(opened(folder, 64, 16))
    examples, plan = prepared(dataset, sd15, **BASE, **DOP)
    check_against_closed_form(sd15, examples, plan, range(4))


def test_preservation_holds_the_model_back(folder, sd15):
    """After some steps the class is predicted closer to the old prediction than without it."""
    dataset = opened(folder, 64, 16)

    def drift(**objective):
        plan = Plan(
            length=12, rank=2, alpha=2.0, batch_size=2, seed=SEED, learning_rate=1e-2,
            objective=ObjectiveSettings(**objective),
        )  # fmt: skip
        examples = HostExamples(dataset, BatchPlan(dataset, 2, SEED), *sd15, plan, 12)
        with torch.inference_mode():
            examples.prepare(0, lambda count: lambda: None)
        adapters = adapters_for(sd15[0], "attention", conv=False, filled=False)
        with torch.inference_mode(False), borrow(sd15[0], adapters) as loan:
            denoiser = HostDenoiser(loan)
            trainer = Trainer(learners(adapters, plan), denoiser, examples, plan, 12)
            while not trainer.finished:
                trainer.step()
            batch = examples.batch(seen_at(examples, any))
            [item] = [item for item in batch.preserved if item is not None][:1]
            noisy, sigma = torch.randn(4, *batch.latents.shape[1:], generator=generator(1, "test", 0)), torch.ones(4)
            with torch.no_grad():
                new = denoiser.predict(noisy, sigma, [item] * 4)
            return (new - denoiser.predict_base(noisy, sigma, [item] * 4)).square().mean().item()

    assert drift(**{**DOP, "preservation_weight": 20.0}) < 0.5 * drift(**{**DOP, "preservation_weight": 1e-6})


def test_a_trigger_of_no_caption_is_refused(folder, sd15):
    with pytest.raises(OptionError, match="preservation_trigger is 'zebra', expected a word of the captions"):
        prepared(opened(folder, 64, 16), sd15, **{**DOP, "preservation_trigger": "zebra"})


def test_a_whole_run_with_both(folder, sd15):
    plan = Plan(length=3, rank=2, batch_size=2, seed=SEED, objective=ObjectiveSettings(**BASE, **DOP))
    dataset = with_regularisation(opened(folder, 64, 16))
    with torch.inference_mode():
        with_both = train(Request(*sd15, dataset, plan, "preserved", "new"))
        plain = train(Request(*sd15, dataset, dataclasses.replace(plan, objective=ObjectiveSettings()), "plain", "new"))
    assert with_both.finished and with_both.losses != plain.losses


# ---------------------------------------------------------------- texts encoded at each step


class Encoders:
    """Text encoders that are on loan: the CLIP itself, its output moved as training would move it."""

    def __init__(self, clip, moved=0.0):
        self.clip, self.moved, self.calls = clip, moved, []

    def encode(self, captions):
        self.calls.append(list(captions))
        known = encode_captions(self.clip, captions)
        return [(known[text][0] + self.moved, known[text][1]) for text in captions]


def test_live_texts_are_those_encoded_ahead(folder, sd15):
    dataset = opened(folder, 64, 16)
    held_out = dataclasses.replace(dataset.concepts[0], kind="validation")
    samples = [dataclasses.replace(sample, concept=int(index == 5)) for index, sample in enumerate(dataset.samples)]
    dataset = dataclasses.replace(dataset, concepts=(*dataset.concepts, held_out), samples=tuple(samples))
    encoders = Encoders(sd15[1])
    ahead, _ = prepared(dataset, sd15, **DOP)
    live, _ = prepared(dataset, sd15, live=encoders, **DOP)
    assert encoders.calls == [] and live.ready(0)
    for position in range(6):
        one, two = ahead.batch(position), live.batch(position)
        assert torch.equal(one.latents, two.latents)
        pairs = [*zip(one.conditioning, two.conditioning, strict=True)]
        pairs += zip(one.preserved or (), two.preserved or (), strict=True)
        for a, b in pairs:
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a.cross_attn, b.cross_attn)
    assert all(len(call) <= 2 for call in encoders.calls) and len(encoders.calls) <= 12, "a batch at a time"
    [one], [two] = ahead.validation(), live.validation()
    assert torch.equal(one.conditioning[0].cross_attn, two.conditioning[0].cross_attn)
    encoders.moved = 1.0
    [three] = live.validation()
    assert torch.equal(three.conditioning[0].cross_attn, two.conditioning[0].cross_attn + 1), "as the encoders are now"


def test_the_untrained_model_is_asked_with_the_untrained_text(folder, sd15):
    """Where text encoders are trained, the old prediction is that of the old encoders too."""
    dataset = with_regularisation(opened(folder, 64, 16))
    ahead, plan = prepared(dataset, sd15, **BASE, **DOP)
    live, _ = prepared(dataset, sd15, live=Encoders(sd15[1], 0.5), **BASE, **DOP)
    adapters = adapters_for(sd15[0], "attention", conv=False)
    checked = 0
    with torch.inference_mode(False), borrow(sd15[0], adapters) as loan:
        denoiser = HostDenoiser(loan)
        for position in range(6):
            one, two = ahead.batch(position), live.batch(position)
            noisy, sigma = torch.randn(one.latents.shape), torch.ones(len(one.latents))
            marked = [index for index, prior in enumerate(one.prior.tolist()) if prior] if one.prior is not None else []
            for old, new in [
                *((one.conditioning[index], two.conditioning[index]) for index in marked),
                *((a, b) for a, b in zip(one.preserved or (), two.preserved or (), strict=True) if a is not None),
            ]:
                checked += 1
                asked = [denoiser.predict_base(noisy[:1], sigma[:1], [item]) for item in (old, new)]
                assert torch.equal(*asked)
                assert not torch.equal(denoiser.predict(noisy[:1], sigma[:1], [new]), asked[1])
                assert torch.equal(new.cross_attn, old.cross_attn + 0.5)
    assert checked >= 4


def test_live_texts_are_not_kept_on_disk(folder, sd15):
    with pytest.raises(OptionError, match=r"text_cache is 'disk', expected 'memory': text encoders or embeddings"):
        prepared(opened(folder, 64, 16), sd15, live=Encoders(sd15[1]), run=RunSettings(text_cache="disk"))
