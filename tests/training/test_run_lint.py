"""The check of a run's options: every rule fires where it should, stays silent beside it, and its click cures it."""

import dataclasses
from fractions import Fraction
from importlib.util import find_spec

import pytest
import torch

from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.lint_rules import RULES
from lora_loom.training.dataset.model import Concept, Dataset, GraphPicture, ImageOptions, Sample
from lora_loom.training.options import options_of
from lora_loom.training.presets import KINDS, PRESETS, settings
from lora_loom.training.run_lint import RunFacts, check_run, facts
from lora_loom.training.run_rules import RUN_RULES, rule_table
from lora_loom.training.settings import Plan


def dataset(concepts=1, images=20, held_out=1, side=512, flip=False):
    """``images`` per concept, the last ``held_out`` of them for validation."""
    options = ImageOptions(flip=flip)
    kinds = [
        Concept(name=f"c{index}", resolutions=((side, side),), repeats=Fraction(1), images=options)
        for index in range(concepts)
    ]
    validation = dataclasses.replace(kinds[0], name="held out", kind="validation")
    samples = [
        Sample(f"{index}/{number}", GraphPicture(torch.zeros(8, 8, 3)), "word", concept=index)
        for index in range(concepts)
        for number in range(images)
    ]
    samples += [
        Sample(f"held/{number}", GraphPicture(torch.zeros(8, 8, 3)), "word", concept=concepts)
        for number in range(held_out)
    ]
    return Dataset("test", tuple(kinds) + (validation,), tuple(samples))


def plan(**options):
    """A plan that no rule has anything to say of; "part.option" keys go to the settings."""
    parts = {name: {} for name in KINDS if name != "trainer"}
    parts["run"]["save_every"] = 200
    parts["optimizer"]["schedule"] = "cosine"
    own = {}
    for key, value in options.items():
        part, _, option = key.rpartition(".")
        (parts[part] if part else own)[option] = value
    return Plan(**own, **{name: KINDS[name](**values) for name, values in parts.items()})


def checked(chosen=None, data=None, steps=2000, presentations=100.0, **model):
    return check_run(RunFacts(chosen or plan(), data or dataset(), steps, presentations, **model))


FIRES = {
    "L001": dict(chosen=plan(**{"optimizer.optimizer": "Prodigy"})),
    "L002": dict(chosen=plan(learning_rate=1.0, **{"optimizer.optimizer": "Prodigy", "optimizer.schedule": "linear"})),
    "L003": dict(chosen=plan(learning_rate=1.0, **{"optimizer.optimizer": "Prodigy"})),
    "L004": dict(chosen=plan(learning_rate=1.0, alpha=1.0, **{"optimizer.optimizer": "Prodigy"})),
    "L005": dict(chosen=plan(learning_rate=1.0)),
    "L006": dict(chosen=plan(learning_rate=5e-3)),
    "L007": dict(chosen=plan(**{"optimizer.schedule": "constant"})),
    "L008": dict(chosen=plan(learning_rate=1e-3)),
    "L010": dict(chosen=plan(rank=128, alpha=128.0)),
    "L011": dict(chosen=plan(rank=64, alpha=64.0, **{"adapter.algorithm": "LoHa"})),
    "L012": dict(chosen=plan(**{"adapter.conv_rank": 128})),
    "L013": dict(chosen=plan(alpha=1.0)),
    "L014": dict(chosen=plan(**{"adapter.conv_rank": 32})),
    "L015": dict(chosen=plan(rank=2, alpha=2.0)),
    "L016": dict(chosen=plan(rank=64, alpha=64.0, **{"adapter.conv_rank": 16})),
    "L017": dict(data=dataset(images=60), presentations=35.0),
    "L020": dict(chosen=plan(**{"adapter.algorithm": "LoKr", "adapter.factor": 64})),
    "L021": dict(chosen=plan(rank=128, alpha=128.0, batch_size=2, **{"adapter.algorithm": "DyLoRA"})),
    "L022": dict(chosen=plan(**{"adapter.algorithm": "IA3"})),
    "L023": dict(chosen=plan(**{"adapter.dora": "output", "adapter.network_dropout": 0.3})),
    "L024": dict(chosen=plan(**{"adapter.network_dropout": 0.7})),
    "L030": dict(chosen=plan(batch_size=2, rank=32, alpha=32.0), data=dataset(2)),
    "L031": dict(chosen=plan(rank=32, alpha=32.0), data=dataset(2, flip=True)),
    "L032": dict(data=dataset(2)),
    "L033": dict(presentations=10.0),
    "L034": dict(presentations=900.0),
    "L035": dict(data=dataset(side=1024), native=512),
    "L036": dict(data=dataset(side=256), native=1024),
    "L037": dict(chosen=plan(batch_size=6)),
    "L040": dict(chosen=plan(**{"objective.min_snr_gamma": 5.0})),
    "L041": dict(chosen=plan(**{"objective.min_snr_gamma": 0.5, "objective.debiased": True})),
    "L042": dict(chosen=plan(**{"objective.noise_offset": 0.3})),
    "L043": dict(chosen=plan(**{"adapter.max_norm": 0.1})),
    "L050": dict(chosen=plan(**{"components.te1_learning_rate": 2e-4, "components.te1_stop_after": 100})),
    "L051": dict(chosen=plan(**{"components.te2_learning_rate": 1e-5})),
    "L060": dict(chosen=plan(**{"run.save_every": 0})),
    "L061": dict(data=dataset(held_out=0)),
    "L062": dict(chosen=plan(**{"optimizer.warmup_steps": 900})),
    "L063": dict(chosen=plan(**{"run.parameter_dtype": "bf16"})),
    "L064": dict(chosen=plan(**{"run.compute_dtype": "fp32"})),
}


def test_a_sound_run_has_no_findings():
    assert checked(native=512, noise=False) == [] and checked(native=512) == []


def test_every_rule_has_a_case():
    assert FIRES.keys() == RUN_RULES.keys()


@pytest.mark.parametrize("rule", RUN_RULES)
def test_a_rule_fires_alone_and_its_click_cures_it(rule):
    case = FIRES[rule]
    found = {finding.rule: finding for finding in checked(**case)}
    assert rule in found, checked(**case)
    finding = found[rule]
    assert finding.level == RUN_RULES[rule].level and "{" not in finding.message and finding.changes
    serious = [each for each in found.values() if each.level == "error" and each.rule != rule]
    assert not serious, serious
    for change in finding.changes:
        if change.part != "dataset":
            assert change.option in options_of(KINDS[change.part])
    if any(change.part == "dataset" or change.option in ("length", "unit") for change in finding.changes):
        return
    cured = case.get("chosen") or plan()
    for change in finding.changes:
        if change.part == "trainer":
            cured = dataclasses.replace(cured, **{change.option: change.value})
        else:
            part = dataclasses.replace(getattr(cured, change.part), **{change.option: change.value})
            cured = dataclasses.replace(cured, **{change.part: part})
    assert rule not in {each.rule for each in checked(**{**case, "chosen": cured})}


def test_the_most_serious_comes_first():
    levels = [finding.level for finding in checked(plan(rank=128, alpha=1.0, learning_rate=1.0))]
    assert levels == sorted(levels, key=("error", "warn", "info").index) and len(set(levels)) == 3


def presentations(chosen, data, steps):
    return facts(chosen, BatchPlan(data, chosen.batch_size, chosen.seed), steps).presentations


def test_presentations_count_batches_accumulation_and_regularisation():
    chosen = plan(batch_size=2, **{"optimizer.gradient_accumulation": 3})
    data = dataset(images=12)
    assert presentations(chosen, data, 100) == 100 * 3 * 2 / 12
    regularised = dataclasses.replace(
        data, concepts=(*data.concepts, Concept("class", "regularisation", resolutions=((512, 512),))),
        samples=(*data.samples, *(dataclasses.replace(s, id=f"class/{s.id}", concept=2) for s in data.samples[:12])),
    )  # fmt: skip
    assert presentations(chosen, regularised, 100) == 100 * 3 * 2 / 12 / 2


def test_batches_that_are_not_full_show_less():
    """Three pictures, no two of a shape, and a batch size of four: each batch shows one."""
    data = dataset(images=3, held_out=0)
    shapes = [GraphPicture(torch.zeros(height, width, 3)) for height, width in ((8, 8), (8, 16), (16, 8))]
    samples = (dataclasses.replace(s, picture=shape) for s, shape in zip(data.samples, shapes, strict=True))
    assert presentations(plan(batch_size=4), dataclasses.replace(data, samples=tuple(samples)), 30) == 10


QUIET = {  # what would be wrong advice: the options, and the rule that says nothing of them
    "SGD wants far higher rates": (dict(learning_rate=1.0, **{"optimizer.optimizer": "SGD"}), "L005"),
    "nobody knows what a package's optimizer wants": (
        {"learning_rate": 1.0, "optimizer.optimizer": "pytorch_optimizer", "optimizer.optimizer_name": "AdaDelta"},
        "L005",
    ),
    "unless its name says that it finds its rate": (
        {"learning_rate": 1.0, "optimizer.optimizer": "pytorch_optimizer", "optimizer.optimizer_name": "prodigy"},
        "L001",
    ),
    "second factors at the rates the tooltip gives": ({"learning_rate": 3e-4}, "L008"),
    "and without LoRA+": ({"learning_rate": 1e-3, "adapter.loraplus_ratio": 1.0}, "L008"),
    "an optimizer without LoRA+": ({"learning_rate": 1e-3, "optimizer.optimizer": "Lion"}, "L008"),
    "one advice on the rate at a time": ({"learning_rate": 5e-3}, "L008"),
    "a GLoRA that is not too large": ({"rank": 64, "alpha": 64.0, "adapter.algorithm": "GLoRA"}, "L010"),
    "ranks of LoKr mean something else": ({"rank": 128, "alpha": 128.0, "adapter.algorithm": "LoKr"}, "L010"),
    "in both directions": ({"rank": 2, "alpha": 2.0, "adapter.algorithm": "LoKr"}, "L015"),
    "rank 4 is within sd-scripts' range": ({"rank": 4, "alpha": 4.0}, "L015"),
    "where the guide begins a LoCon": ({"rank": 32, "alpha": 32.0, "adapter.conv_rank": 16}, "L016"),
    "and where it ends": ({"rank": 64, "alpha": 32.0, "adapter.conv_rank": 16}, "L016"),
    "a LoRA without convolutions is no LoCon": ({"rank": 64, "alpha": 64.0}, "L016"),
    "twenty pictures are no style": ({"adapter.algorithm": "LoHa"}, "L017"),
    "the guide's own batch size": ({"batch_size": 4}, "L037"),
    "half precision on purpose": ({"run.compute_dtype": "bf16"}, "L064"),
    "adapters in full precision": ({"run.compute_dtype": "bf16"}, "L063"),
    "averages go with a constant rate": (
        {"optimizer.optimizer": "AdamWScheduleFree", "optimizer.schedule": "constant"},
        "L007",
    ),
    "averages like higher rates": (
        {"learning_rate": 5e-3, "optimizer.optimizer": "AdamWScheduleFree", "optimizer.schedule": "constant"},
        "L006",
    ),
    "one rate for everything": (
        {"learning_rate": 1.0, "optimizer.optimizer": "Prodigy", "components.te1_learning_rate": 1.0},
        "L050",
    ),
    "no alpha to set": ({"learning_rate": 1.0, "optimizer.optimizer": "Prodigy", "adapter.algorithm": "IA3"}, "L003"),
    "no ranks to set": ({"adapter.algorithm": "OFT", "adapter.conv_rank": 32}, "L014"),
    "nor to lower": ({"adapter.algorithm": "OFT", "adapter.conv_rank": 128}, "L012"),
    "one advice at a time": ({"adapter.conv_rank": 128}, "L014"),
    "decoupled unless told otherwise": (
        {"optimizer.optimizer": "Prodigy", "optimizer.weight_decay": 0.1, "optimizer.beta2": 0.99},
        "L004",
    ),
    "written out": (
        {"optimizer.optimizer": "Prodigy", "optimizer.optimizer_args": "betas=0.9,0.95 weight_decay=0.0"},
        "L004",
    ),
}


@pytest.mark.parametrize("case", QUIET)
def test_a_rule_says_nothing_where_it_would_be_wrong(case):
    options, rule = QUIET[case]
    assert rule not in {finding.rule for finding in checked(plan(**options))}


@pytest.mark.parametrize(
    "algorithm, layers", (("LoRA", "full"), ("LoRA", "conv"), ("GLoRA", "attention"), ("IA3", "attention+MLP"))
)
def test_what_the_guide_makes_styles_with(algorithm, layers):
    chosen = plan(learning_rate=5e-3, **{"adapter.algorithm": algorithm, "adapter.layers": layers})
    assert "L017" not in {finding.rule for finding in checked(chosen, dataset(images=60))}


@pytest.mark.parametrize("algorithm", ("LoHa", "LoKr", "DyLoRA", "LoRA-FA", "OFT", "full"))
def test_other_families_for_a_style(algorithm):
    chosen = plan(**{"adapter.algorithm": algorithm, "adapter.layers": "full"})
    [finding] = [finding for finding in checked(chosen, dataset(images=60)) if finding.rule == "L017"]
    assert [(change.option, change.value) for change in finding.changes] == [("algorithm", "LoRA")]


def test_128_is_overkill_for_glora_too():
    wide = {"rank": 128, "alpha": 128.0}
    assert "L010" in {finding.rule for finding in checked(plan(**wide, **{"adapter.algorithm": "GLoRA"}))}


@pytest.mark.parametrize(
    "own, named", (("Prodigy", "PRODIGY"), ("DAdaptAdam", "dadaptadam"), ("DAdaptSGD", "DAdaptSGD"))
)
@pytest.mark.parametrize("options", ({}, {"optimizer.schedule": "linear"}, {"components.te1_learning_rate": 1.0}))
@pytest.mark.parametrize("rate", (2e-4, 1.0))
def test_an_optimizer_chosen_by_name_is_advised_as_our_own(own, named, options, rate):
    found = [
        checked(plan(learning_rate=rate, **optimizer, **options))
        for optimizer in (
            {"optimizer.optimizer": own},
            {"optimizer.optimizer": "pytorch_optimizer", "optimizer.optimizer_name": named},
        )
    ]
    told = [[(each.rule, each.message.replace("weight_decouple", "decouple"), each.changes) for each in one]
            for one in found]  # fmt: skip
    assert told[0] == told[1] and (rate == 1.0) == ("L001" not in {each.rule for each in found[1]})


def test_presets_follow_the_advice():
    """All but what hangs on the data: what a style is made of is seen with a style's pictures."""
    for name, preset in PRESETS.items():
        parts = {part: settings(part, preset, {}) for part in KINDS if part != "trainer"}
        chosen = Plan(**preset.options("trainer"), **parts)
        pictures = dataset(images=60 if name == "style" else 20)
        found = {each.rule for each in checked(chosen, pictures, steps=500)} - {"L033", "L034"}
        assert not found, (name, found)


def test_v_prediction_is_told_nothing_of_noise_prediction():
    assert "L040" not in {finding.rule for finding in checked(plan(**{"objective.min_snr_gamma": 5.0}), noise=False)}


def test_a_decoupling_that_is_switched_off_is_told():
    named = {"optimizer.optimizer": "pytorch_optimizer", "optimizer.optimizer_name": "Prodigy"}
    for chosen, option in (({"optimizer.optimizer": "Prodigy"}, "decouple"), (named, "weight_decouple")):
        off = plan(**chosen, **{"optimizer.optimizer_args": f"d_coef=2 {option}=False"})
        [finding] = [finding for finding in checked(off) if finding.rule == "L004"]
        assert finding.changes[0].value == f"d_coef=2 {option}=True" and f" {option}=True" in finding.message


def test_a_warm_up_is_too_long_for_every_optimizer():
    chosen = plan(**{"optimizer.optimizer": "Prodigy", "optimizer.warmup_steps": 900})
    assert "L062" in {finding.rule for finding in checked(chosen)}


def test_a_style_is_shown_less_often():
    style = dataset(images=100)
    assert not {finding.rule for finding in checked(data=style, presentations=35.0)} & {"L033", "L034"}
    assert "L033" in {finding.rule for finding in checked(presentations=25.0)}


# What no option of a run can say, and why.
REASONS = {
    "applying": "about LoRAs that are applied, not trained: what the loader nodes and the reader of files are for",
    "model": "the MODEL, CLIP and VAE of the graph say so themselves (their kind, their clip skip, their attention)",
    "no workers": "pictures are read in the host's own process, there are no others to keep",
    "untrue": "the report that quotes it shows that it is not so, or not any more",
}
# What the guide and the trainers' pages say, in their order: which seed and which line, and where it has become a rule,
# an option, a part of the code that does it without being asked, or why nowhere.
STATEMENTS = {
    "000.1 one adapter type for the whole run": "option adapter.algorithm",
    "000.2 base LoRA or backup to start from": "module training.starting",
    "000.2 a backup restores the optimizer, less is changeable": "module training.continuing",
    "000.3 rank 16, alpha 1.0 is a scale of 1/16": "rule L013",
    "000.4 DoRA off, output axis off": "option adapter.dora",
    "000.4 DoRA dropout a tenth of a LoRA's": "rule L023",
    "000.5 dropout .1 to .5": "rule L024",
    "000.5 dropout 0.0 to begin with": "option adapter.network_dropout",
    "000.5 weight dtype fp32": "rule L063",
    "000.5 bundle embeddings": "option components.embeddings",
    "000.6 layer presets and a custom list; attention or attention+MLP": "option adapter.layers adapter.layer_filter",
    "000.6 rank is the number of layers": "nowhere untrue",
    "001.1 types that are applied; any number of LoRAs; <lora:name:strength>": "nowhere applying",
    "001.1 automatic tags of a LoRA": "module kernels.metadata",
    "001.1 extract a combined LoRA": "nowhere applying",
    "001.2 weights of components and blocks; modules by name": "nowhere applying",
    "001.3 weights by step": "nowhere applying",
    "001.4 how LoRAs are fused and reloaded": "nowhere applying",
    "003.1 LierLa: linear and 1×1": "option adapter.layers",
    "003.1 C3Lier: 3×3 convolutions by conv_dim": "option adapter.conv_rank",
    "003.1 block dims": "option adapter.blocks",
    "003.1 LoRA+": "option adapter.loraplus_ratio",
    "003.1 LoRA+ multiplies the rate of the second factors": "rule L008",
    "003.1 DyLoRA": "rule L021",
    "003.1 dim 4 to 128, typical 16/8": "rule L010 L015",
    "003.1 learning rate 1e-4 to 1e-3": "rule L006",
    "003.1 epochs 5 to 20 (with folder repeats; what counts is how often an image is shown)": "rule L033 L034",
    "003.1 fp16/bf16": "rule L064",
    "003.1 TOML general/datasets/subsets": "module training.dataset.config",
    "004.1 at least 15 images, ideal 30, more than 50 overkill": "dataset D001 D002",
    "004.1 styles 50 to 200": "dataset D003",
    "004.2 white background behind transparency": "dataset D010",
    "004.2 convert webp": "nowhere untrue",
    "004.2 crop views apart": "dataset T041",
    "004.2 at most 3k pixels": "dataset D020",
    "004.2 upscale small pictures": "dataset D021",
    "004.2 no flip of asymmetric concepts": "dataset A001",
    "004.2 clean protected pictures": "dataset D032",
    "004.3 add a tag to all, edit by hand": "module training.dataset.edits",
    "004.3 trigger first on every image": "dataset T002",
    "004.3 5 to 20 tags": "dataset T010 T011",
    "004.3 no implied tags": "dataset T020",
    "004.3 tag dominant backgrounds": "dataset T030",
    "004.4 folders X_name: X repeats, the name is the trigger": "module training.dataset.folder",
    "004.4 steps = images · repeats · epochs / batch": "dataset R001",
    "004.4 about 100 views per image, styles 30 to 40": "rule L033 L034",
    "004.4 multi-concept: balance repeats": "dataset B001",
    "004.4 multi-concept: batch 1": "rule L030",
    "004.4 multi-concept: flip off": "rule L031",
    "004.4 multi-concept: rank 32 or more": "rule L032",
    "004.5 v2, v_param, SDXL": "nowhere model",
    "004.5 batch size at most 4": "rule L037",
    "004.5 mixed precision = save precision": "option run.compute_dtype run.parameter_dtype",
    "004.5 cache latents, on disk too": "option run.latent_cache",
    "004.5 xformers": "nowhere model",
    "004.5 flip": "dataset A001",
    "004.5 buckets on: without them much is cropped away": "dataset D022",
    "004.5 max bucket = resolution, which cuts long pictures short": "dataset D023",
    "004.5 resolution within the model's": "rule L035 L036",
    "004.5 persistent workers": "nowhere no workers",
    "004.6 Prodigy and D-Adaptation: rate 1": "rule L001",
    "004.6 Prodigy and D-Adaptation: cosine": "rule L002",
    "004.6 Prodigy and D-Adaptation: alpha 1": "rule L003",
    "004.6 Prodigy and D-Adaptation: decouple, weight decay .1, betas .9 .99": "rule L004",
    "004.6 Adam: cosine with restarts": "rule L007",
    "004.6 arguments are literals, betas a tuple": "option optimizer.optimizer_args",
    "004.7 rank 8/8 for familiar things, 32/32 to start, at most 64, 128 overkill": "rule L010 L015",
    "004.7 conv 16/1": "rule L014",
    "004.7 scale weight norms 1": "rule L043",
    "004.7 dropouts 0": "option adapter.network_dropout adapter.rank_dropout adapter.module_dropout",
    "004.7 min-SNR 5": "rule L041",
    "004.7 noise offset 0": "rule L042",
    "004.7 debiased on, which multiplies with min-SNR": "rule L040",
    "004.7 zero-terminal SNR only if the model has it (else refused)": "option objective.zero_terminal_snr",
    "004.7 clip skip 2 for anime": "nowhere model",
    "004.8 LoCon at most 64": "rule L010 L012",
    "004.8 LoCon alpha ½": "rule L016",
    "004.8 LoHa at most 32": "rule L011",
    "004.8 LoKr factor −1 small, about 8 large": "rule L020",
    "004.8 DyLoRA about 128 with accumulation, batch 1": "rule L021",
    "004.8 GLoRA": "rule L010",
    "004.8 (IA)³ rate 5e-3 to 1e-2": "rule L022",
    "004.8 Diag-OFT, native fine-tuning": "option adapter.algorithm",
    "004.8 styles are LoCon, GLoRA, (IA)³": "rule L017",
    "004.9 the loss tells nothing, choose by saved epochs": "rule L060",
    "004.9 measure at fixed timesteps on what is held out": "rule L061",
}
LINES = {"000": 6, "001": 4, "003": 1, "004": 9}  # of each seed; 001 and 002 share theirs


def test_no_line_is_left_out():
    assert {key.split()[0] for key in STATEMENTS} == {
        f"{seed}.{line}" for seed, lines in LINES.items() for line in range(1, lines + 1)
    }


def test_every_rule_of_the_guide_has_a_statement():
    """Those of our own judgement and of papers may stand alone, and two that OneTrainer's tooltips give."""
    said = {name for place in STATEMENTS.values() for name in place.split() if name in RUN_RULES}
    alone = {name for name, rule in RUN_RULES.items() if rule.source == "ours"} | {"L005", "L050", "L051"}
    assert said | alone == RUN_RULES.keys()


@pytest.mark.parametrize("statement", STATEMENTS)
def test_every_statement_has_its_place(statement):
    kind, _, names = STATEMENTS[statement].partition(" ")
    if kind == "nowhere":
        assert names in REASONS
        return
    for name in names.split():
        if kind == "rule":
            assert name in RUN_RULES
        elif kind == "dataset":
            assert name in RULES
        elif kind == "module":
            assert find_spec(f"lora_loom.{name}")
        else:
            part, _, option = name.partition(".")
            assert kind == "option" and option in options_of(KINDS[part])


def test_the_table_shows_every_rule():
    lines = rule_table().splitlines()
    assert [line.split()[0] for line in lines] == list(RUN_RULES)
