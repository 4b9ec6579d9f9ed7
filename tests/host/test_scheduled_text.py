"""Weights on text encoders that change over a run: equal to runs spliced by hand, whatever nodes do to the texts."""

import copy

import comfy.cldm.cldm
import comfy.controlnet
import comfy.hooks
import comfy.ops
import comfy.sample
import comfy.samplers
import node_helpers
import numpy as np
import pytest
import torch

import nodes
import tiny
from applying import relative
from lora_loom.host.clocks import Course
from lora_loom.host.scheduled_text import VARIANT, Choice, at_beginning, combinations, stepwise
from lora_loom.kernels.strengths.schedule import Clock, parse
from prompting import RUN, by_hand, encoded, lora_folder, lora_tensors, pair, prompted, put, run, sigmas_of, spliced

TEXT = "a cat, on a chair"
TAG = "<lora:cat:unet=0.8:te=0.1@1,0.6@6>"
EQUAL = 1e-5


class Case:
    """A LoRA file, what its tags are compared with, and what the node makes of them."""

    def __init__(self, folder, family="sd15", tag=TAG, weights=(0.1, 0.6)):
        self.family = family
        self.model, self.clip = pair(family)
        self.lora = lora_tensors(self.model, self.clip)
        put(folder, "cat.safetensors", self.lora)
        self.negative = encoded(self.clip, "blurry")
        made = [by_hand(self.model, self.clip, self.lora, TEXT, 0.8, weight) for weight in weights]
        self.constant, self.texts = made[0][0], [text for _, text in made]
        self.done = prompted(self.model, self.clip, f"{TEXT}{tag}")

    def sigmas(self, scheduler="normal", steps=12):
        return sigmas_of(self.model, scheduler, steps)

    def run(self, positive, sigmas, negative=None, **options):
        return run(self.done.model, self.family, positive, negative or self.negative, sigmas, **options)

    def spliced(self, parts, sigmas, **options):
        """(steps, positive) or (steps, positive, negative) one behind the other."""
        whole = [(part[0], self.constant, part[1], (*part, self.negative)[2]) for part in parts]
        return spliced(self.family, whole, sigmas, **options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return lora_folder(tmp_path, monkeypatch)


@pytest.fixture
def case(folder):
    return Case(folder)


# ---------------------------------------------------------------- when


@pytest.mark.parametrize("family", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_two_runs_spliced_at_step_six(folder, family, scheduler):
    case = Case(folder, family)
    first, second = case.texts
    sigmas = case.sigmas(scheduler)
    wanted = case.spliced([(5, first), (7, second)], sigmas)
    assert relative(case.run(case.done.conditioning, sigmas), wanted) <= EQUAL
    for steps in (4, 6):
        assert relative(case.spliced([(steps, first), (12 - steps, second)], sigmas), wanted) > 10 * EQUAL


def percent_step(case, percent, sigmas):
    """The steps that the host does before a percent of its own."""
    level = case.model.get_model_object("model_sampling").percent_to_sigma(percent)
    return sum(sigma > level for sigma in sigmas[:-1].tolist())


def test_where_percents_of_the_host_switch_elsewhere(case):
    """Five of twenty steps are done under karras before a quarter of its own time has passed."""
    first, second = case.texts
    sigmas = case.sigmas("karras", 20)
    there = percent_step(case, 0.25, sigmas)
    assert there != 5
    ranges = node_helpers.conditioning_set_values(first, {"start_percent": 0.0, "end_percent": 0.25})
    ranges += node_helpers.conditioning_set_values(second, {"start_percent": 0.25, "end_percent": 1.0})
    theirs = case.run(ranges, sigmas)
    wanted = case.spliced([(5, first), (15, second)], sigmas)
    assert relative(theirs, wanted) > 10 * EQUAL
    assert relative(theirs, case.spliced([(there, first), (20 - there, second)], sigmas)) <= EQUAL
    assert relative(case.run(case.done.conditioning, sigmas), wanted) <= EQUAL


def by_sigma(text, joint):
    """A function around the model that puts another text in the place of the positive one from a noise level on."""

    def call(apply, given):
        if given["timestep"][0] <= joint * (1 + 1e-6):
            c, rows = dict(given["c"]), list(given["cond_or_uncond"])
            size = len(given["input"]) // len(rows)
            context = c["c_crossattn"].clone()
            for place, kind in enumerate(rows):
                if kind == 0:
                    context[place * size : (place + 1) * size] = text
            given = {**given, "c": {**c, "c_crossattn": context}}
        return apply(given["input"], given["timestep"], **given["c"])

    return call


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral"])
def test_samplers_that_ask_between_steps(case, sampler):
    """The evaluation at the joint itself belongs to what comes behind it."""
    first, second = case.texts
    sigmas = case.sigmas("karras", 10)
    hand = case.constant.clone()
    hand.set_model_unet_function_wrapper(by_sigma(second[0][0], float(sigmas[5])))
    options = {"sampler": sampler}
    wanted = run(hand, "sd15", first, case.negative, sigmas, **options)
    assert relative(case.run(case.done.conditioning, sigmas, **options), wanted) <= EQUAL
    assert relative(run(case.constant, "sd15", first, case.negative, sigmas, **options), wanted) > 10 * EQUAL


def ksampler(model, positive, negative, steps, start=None, **options):
    """The host's KSampler (Advanced)."""
    latent = tiny.latent("sd15") if start is None else start
    noise = comfy.sample.prepare_noise(latent, 3) if start is None else torch.zeros_like(latent)
    given = (steps, 3.0, "euler", "karras", positive, negative, latent)
    with torch.inference_mode():
        return comfy.sample.sample(model, noise, *given, disable_noise=start is not None, disable_pbar=True, **options)


def test_start_and_end_steps_on_both_clocks(case):
    """Every sampler run counts its own steps, unless the whole trajectory is given."""
    (first, second), negative = case.texts, case.negative
    steps = 12
    got = ksampler(case.done.model, case.done.conditioning, negative, steps, last_step=8)
    got = ksampler(case.done.model, case.done.conditioning, negative, steps, got, start_step=8)
    wanted = ksampler(case.constant, first, negative, steps, last_step=5)
    wanted = ksampler(case.constant, second, negative, steps, wanted, start_step=5, last_step=8)
    wanted = ksampler(case.constant, first, negative, steps, wanted, start_step=8)  # its first four steps
    assert relative(got, wanted) <= EQUAL

    course = Course("trajectory", tuple(case.sigmas("karras").tolist()))
    whole = prompted(case.model, case.clip, TEXT + TAG, course=course)
    got = ksampler(whole.model, whole.conditioning, negative, steps, last_step=3)
    got = ksampler(whole.model, whole.conditioning, negative, steps, got, start_step=3)
    assert relative(got, case.spliced([(5, first), (7, second)], case.sigmas("karras"))) <= EQUAL


def test_a_picture_half_way(case):
    """With denoise 0.5 the sampler's run is the latter half of twice as many steps."""
    (first, second), negative = case.texts, case.negative
    picture = torch.randn(tiny.latent("sd15").shape, generator=torch.Generator().manual_seed(8))
    noise = comfy.sample.prepare_noise(picture, 3)
    sigmas = case.sigmas("karras", 24)

    def noised(model, positive, levels, latent=picture, drawn=noise):
        kernel = comfy.samplers.ksampler("euler")
        with torch.inference_mode():
            given = (drawn, 3.0, kernel, levels, positive, negative, latent)
            return comfy.sample.sample_custom(model, *given, disable_pbar=True, seed=3)

    for prompt, course, joint in (
        (TEXT + TAG, RUN, 17),  # the sixth step of the run is the 18th of the whole
        (TEXT + "<lora:cat:unet=0.8:te=0.1@1,0.6@16>", Course("trajectory", tuple(sigmas.tolist())), 15),
    ):
        done = prompted(case.model, case.clip, prompt, course=course)
        given = (12, 3.0, "euler", "karras", done.conditioning, negative, picture)
        with torch.inference_mode():
            got = comfy.sample.sample(done.model, noise, *given, denoise=0.5, disable_pbar=True)
        wanted = noised(case.constant, first, sigmas[12 : joint + 1])
        wanted = noised(case.constant, second, sigmas[joint:], wanted, torch.zeros_like(noise))
        assert relative(got, wanted) <= EQUAL


def test_parts_of_the_model_s_own_time_without_any_steps(case):
    done = prompted(case.model, case.clip, TEXT + "<lora:cat:unet=0.8:te=0.1@0%,0.6@75%>", course=Course("trajectory"))
    sigmas = case.sigmas("karras")
    before = percent_step(case, 0.75, sigmas)
    assert 1 < before < 9
    first, second = case.texts
    got = run(done.model, "sd15", done.conditioning, case.negative, sigmas)
    assert relative(got, case.spliced([(before, first), (12 - before, second)], sigmas)) <= EQUAL


def test_blended_from_step_to_step(case):
    done = prompted(case.model, case.clip, TEXT + "<lora:cat:unet=0.8:te=0.1@2,0.7@5:interpolation=linear>")
    parts = [
        (1, by_hand(case.model, case.clip, case.lora, TEXT, 0.8, weight)[1])
        for weight in np.interp(range(8), [1, 4], [0.1, 0.7])
    ]
    sigmas = case.sigmas("karras", 8)
    got = run(done.model, "sd15", done.conditioning, case.negative, sigmas)
    assert relative(got, case.spliced(parts, sigmas)) <= EQUAL
    assert len(done.conditioning) == 4


def test_weights_that_come_back(case):
    done = prompted(case.model, case.clip, TEXT + "<lora:cat:unet=0.8:te=0.1@1,0.6@3,0.1@5>")
    first, second = case.texts
    sigmas = case.sigmas("karras", 8)
    got = run(done.model, "sd15", done.conditioning, case.negative, sigmas)
    assert relative(got, case.spliced([(2, first), (2, second), (4, first)], sigmas)) <= EQUAL
    assert len(done.conditioning) == 2  # encoded once for each weight


# ---------------------------------------------------------------- what nodes do to a conditioning

AREA = nodes.ConditioningSetArea()


def areas(text):
    return AREA.append(text, 32, 64, 32, 0, 0.7)[0]


def masked(text):
    mask = torch.rand(1, 64, 64, generator=torch.Generator().manual_seed(4))
    return nodes.ConditioningSetMask().append(text, mask, "default", 0.9)[0]


def test_areas_and_masks(case):
    """The host copies texts for areas of the other side: these follow, too."""
    first, second = case.texts
    sigmas = case.sigmas()
    elsewhere = encoded(case.clip, "a dog")
    for change in (areas, masked):
        for combine in (lambda text, change=change: change(text), lambda text, change=change: change(text) + elsewhere):
            wanted = case.spliced([(5, combine(first)), (7, combine(second))], sigmas)
            assert relative(case.run(combine(case.done.conditioning), sigmas), wanted) <= EQUAL
    wanted = case.spliced([(5, areas(elsewhere), first), (7, areas(elsewhere), second)], sigmas)
    assert relative(case.run(areas(elsewhere), sigmas, case.done.conditioning), wanted) <= EQUAL
    both = [areas(text) + elsewhere for text in (first, second, case.done.conditioning)]
    wanted = case.spliced([(5, both[0], first), (7, both[1], second)], sigmas)
    assert relative(case.run(both[2], sigmas, case.done.conditioning), wanted) <= EQUAL


@pytest.mark.parametrize("ranges", [(0.0, 0.6), (0.25, 1.0), (0.0, 1.0)])
def test_ranges_of_time_that_were_set_later(case, ranges):
    def ranged(text):
        return nodes.ConditioningSetTimestepRange().set_range(text, *ranges)[0] + masked(encoded(case.clip, "a dog"))

    first, second = case.texts
    sigmas = case.sigmas("karras")
    wanted = case.spliced([(5, ranged(first)), (7, ranged(second))], sigmas)
    assert relative(case.run(ranged(case.done.conditioning), sigmas), wanted) <= EQUAL


@pytest.mark.parametrize("ranges", [(0.5, 1.0), (0.0, 0.5), (0.0, 1.0)])
def test_ranges_that_equal_our_own(folder, ranges):
    """A range of the user's counts, by the host's percents, even where we have given an entry just that one."""
    case = Case(folder, tag="<lora:cat:unet=0.8:te=0.1@0%,0.6@50%>")
    assert [(e[1]["start_percent"], e[1]["end_percent"]) for e in case.done.conditioning] == [(0.0, 0.5), (0.5, 1.0)]
    elsewhere = masked(encoded(case.clip, "a dog"))

    def ranged(text):
        return nodes.ConditioningSetTimestepRange().set_range(text, *ranges)[0] + elsewhere

    first, second = case.texts
    sigmas = case.sigmas("karras", 20)
    assert percent_step(case, 0.5, sigmas) != 10
    wanted = case.spliced([(10, ranged(first)), (10, ranged(second))], sigmas)
    for given in (case.done.conditioning, copy.deepcopy(case.done.conditioning)):
        assert relative(case.run(ranged(given), sigmas), wanted) <= EQUAL


def test_a_negative_prompt_that_changes_while_the_positive_one_does_not(case):
    """Every MODEL of the node chooses, so the sampler may have either's."""
    positive = prompted(case.model, case.clip, "a dog <lora:cat:0.8>")
    plain = prompted(case.model, case.clip, "a dog")
    first, second = case.texts
    sigmas = case.sigmas("karras")
    for done, model in ((positive, case.constant), (plain, case.model)):
        text = done.conditioning
        parts = [(5, model, text, first), (7, model, text, second)]
        wanted = spliced("sd15", parts, sigmas)
        assert relative(run(done.model, "sd15", text, case.done.conditioning, sigmas), wanted) <= EQUAL
        assert relative(run(model, "sd15", text, case.done.conditioning, sigmas), wanted) > 10 * EQUAL


@pytest.mark.parametrize("node", ["ConditioningConcat", "ConditioningAverage"])
def test_joined_with_another_text(case, node):
    """As the help page says: with ours as conditioning_to."""
    elsewhere, (first, second) = encoded(case.clip, "a dog"), case.texts

    def joined(text):
        if node == "ConditioningConcat":
            return nodes.ConditioningConcat().concat(text, elsewhere)[0]
        return nodes.ConditioningAverage().addWeighted(text, elsewhere, 0.6)[0]

    sigmas = case.sigmas("karras")
    wanted = case.spliced([(5, joined(first)), (7, joined(second))], sigmas)
    assert relative(case.run(joined(case.done.conditioning), sigmas), wanted) <= EQUAL


def test_control_nets(case):
    options = dict(case.model.model.model_config.unet_config)
    options = {name: value for name, value in options.items() if name not in ("image_size", "out_channels", "dtype")}
    with torch.inference_mode():
        net = comfy.cldm.cldm.ControlNet(
            image_size=8, hint_channels=3, dtype=torch.float32, operations=comfy.ops.disable_weight_init, **options
        )
        tiny.fill(net)
    device = case.model.load_device
    control = comfy.controlnet.ControlNet(net, load_device=device, manual_cast_dtype=None)
    picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(6))

    def controlled(positive, negative):
        apply = nodes.ControlNetApplyAdvanced()
        return apply.apply_controlnet(positive, negative, control, picture, 0.8, 0.0, 0.7)

    first, second = case.texts
    sigmas = case.sigmas("karras")
    parts = [(steps, *controlled(text, case.negative)) for steps, text in ((5, first), (7, second))]
    wanted = case.spliced(parts, sigmas)
    got = case.run(*[(pair := controlled(case.done.conditioning, case.negative))[0], sigmas, pair[1]])
    assert relative(got, wanted) <= EQUAL
    assert relative(wanted, case.spliced([(5, first), (7, second)], sigmas)) > 10 * EQUAL


def test_hooks(case):
    """The host's own, on the conditioning and with keyframes."""
    hooks = comfy.hooks.create_hook_lora(lora_tensors(case.model, case.clip, seed=9), 0.7, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.0))
    frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.4))
    hooks.set_keyframes_on_hooks(frames)

    def hooked(text):
        return comfy.hooks.set_hooks_for_conditioning(text, hooks)

    first, second = case.texts
    sigmas = case.sigmas("karras")
    wanted = case.spliced([(5, hooked(first)), (7, hooked(second))], sigmas)
    assert relative(case.run(hooked(case.done.conditioning), sigmas), wanted) <= EQUAL
    assert relative(wanted, case.spliced([(5, first), (7, second)], sigmas)) > 10 * EQUAL


# ---------------------------------------------------------------- a MODEL that cannot choose


def test_without_our_model_only_the_first_acts(case):
    sigmas = case.sigmas("karras")
    got = run(case.constant, "sd15", case.done.conditioning, case.negative, sigmas)
    assert relative(got, case.spliced([(12, case.texts[0])], sigmas)) <= EQUAL


def test_without_our_model_parts_are_the_host_s_percents(case):
    done = prompted(case.model, case.clip, TEXT + "<lora:cat:unet=0.8:te=0.1@0%,0.6@75%>")
    ranges = []
    for text, start, end in ((case.texts[0], 0.0, 0.75), (case.texts[1], 0.75, 1.0)):
        ranges += node_helpers.conditioning_set_values(text, {"start_percent": start, "end_percent": end})
    sigmas = case.sigmas("karras")
    wanted = run(case.constant, "sd15", ranges, case.negative, sigmas)
    assert relative(run(case.constant, "sd15", done.conditioning, case.negative, sigmas), wanted) <= EQUAL
    ours = case.spliced([(9, case.texts[0]), (3, case.texts[1])], sigmas)
    assert relative(run(done.model, "sd15", done.conditioning, case.negative, sigmas), ours) <= EQUAL
    assert relative(ours, wanted) > 10 * EQUAL


# ---------------------------------------------------------------- what can hold at the same time


def plain(sampling_max=14.6):
    return type("Sampling", (), {"sigma_max": sampling_max})()


def test_what_meets():
    one, other = parse("0.1@1,0.6@6", "te"), parse("0.3@1,0.5@4,0.3@8", "te")
    assert combinations([one, other], "te") == [(0.1, 0.3), (0.1, 0.5), (0.6, 0.5), (0.6, 0.3)]
    parts = parse("0.2@0%,0.9@50%", "te")
    assert set(combinations([one, parts], "te")) == {(0.1, 0.2), (0.1, 0.9), (0.6, 0.2), (0.6, 0.9)}
    levels = parse("0.1@s10,0.4@s2", "te")
    assert combinations([levels], "te") == [(0.1,), (0.4,)]
    mixed = parse("0.1@1,0.4@50%,0.2@s0.5", "te")
    assert set(combinations([mixed], "te")) == {(0.1,), (0.4,), (0.2,)}
    many = ",".join(f"{number / 100}@{number}" for number in range(1, 67))
    with pytest.raises(ValueError, match=r"te: .* more than 64 times.*fewer points"):
        combinations([parse(many, "te")], "te")


@pytest.mark.parametrize("seed", range(12))
def test_every_moment_of_a_run_has_its_encoding(seed):
    """Whatever points there are, what holds in a run is among what was foreseen."""
    draws = np.random.default_rng(seed)
    schedules = []
    for _ in range(3):
        kinds = draws.choice(["@{step}", "@{part}%", "@s{level}"], size=2 if seed % 3 == 0 else 1)
        items = {}
        for _ in range(draws.integers(1, 4)):
            place = draws.choice(kinds).format(
                step=draws.integers(1, 14), part=draws.integers(0, 101), level=round(float(draws.uniform(0.05, 20)), 2)
            )
            items[place] = round(float(draws.uniform(-1, 1)), 1)
        schedules.append(parse(",".join(f"{weight}{place}" for place, weight in items.items()), "te"))
    schedules = list(dict.fromkeys(schedule for schedule in schedules if schedule.constant is None))
    found = combinations(schedules, "te")
    numbers = {weights: number for number, weights in enumerate(found)}
    choice = Choice(tuple(schedules), numbers, RUN)
    assert at_beginning(schedules, RUN, plain()) in numbers
    for steps in (1, 3, 10, 13):
        sigmas = torch.cat([torch.linspace(14.6, 0.03, steps) ** 1.3, torch.zeros(1)])
        clock = Clock(sigmas.tolist())
        for sigma in [*sigmas.tolist(), *draws.uniform(0, 40, 20)]:
            number = choice.at(None, {"sample_sigmas": sigmas}, sigma)
            assert found[number] == tuple(schedule.at(clock, sigma) for schedule in schedules)


@pytest.mark.parametrize("how", ["linear", "cosine"])
def test_blends_are_held(how):
    steps = stepwise(parse("0.1@2,0.7@5,0.2@9", "te", how), "te")
    assert [point.position for point in steps.points] == list(range(1, 9)) and steps.interpolation == "hold"
    parts = stepwise(parse("0@10%,1@33%", "te", how), "te")
    assert [point.position for point in parts.points] == pytest.approx([0.1, 0.15, 0.2, 0.25, 0.3, 0.33])
    if how == "linear":
        wanted = np.interp(range(1, 9), [1, 4, 8], [0.1, 0.7, 0.2])
        assert [point.weight for point in steps.points] == pytest.approx(wanted)
        wanted = np.interp([point.position for point in parts.points], [0.1, 0.33], [0, 1])
        assert [point.weight for point in parts.points] == pytest.approx(wanted)
    jump = stepwise(parse("0@0%,1@0%", "te", how), "te")
    assert jump.constant is None or jump.constant == 1
    loractl = parse("0@0%,1@50% linear of steps-2", "te")
    assert stepwise(loractl, "te").inset == 2


def test_blends_that_cannot_be_held():
    for text, why in (
        ("0@s14,1@s2 linear", "between|blended from step to step or in parts"),
        ("0@1,1@50% cosine", "blended from step to step or in parts"),
        ("0@1,1@500 linear", "more than 64 times"),
    ):
        with pytest.raises(ValueError, match=rf"te1: .*({why})"):
            stepwise(parse(text, "te1"), "te1")


def test_entries_tell_what_they_are(case):
    assert [entry[1][VARIANT].number for entry in case.done.conditioning] == [0, 1]
    ours = [{key for key in entry[1] if key not in case.texts[0][0][1]} for entry in case.done.conditioning]
    assert ours == [{VARIANT, "start_percent", "end_percent"}] * 2
