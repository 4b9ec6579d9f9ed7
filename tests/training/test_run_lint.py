"""The check of a run's options: every rule fires where it should, stays silent beside it, and its click cures it."""

import dataclasses
from fractions import Fraction

import pytest
import torch

from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.lint_rules import RULES
from lora_loom.training.dataset.model import Concept, Dataset, GraphPicture, ImageOptions, Sample
from lora_loom.training.options import options_of
from lora_loom.training.presets import KINDS
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
    "L010": dict(chosen=plan(rank=128, alpha=128.0)),
    "L011": dict(chosen=plan(rank=64, alpha=64.0, **{"adapter.algorithm": "LoHa"})),
    "L012": dict(chosen=plan(**{"adapter.conv_rank": 128})),
    "L013": dict(chosen=plan(alpha=1.0)),
    "L014": dict(chosen=plan(**{"adapter.conv_rank": 32})),
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
    "L037": dict(chosen=plan(batch_size=16)),
    "L040": dict(chosen=plan(**{"objective.min_snr_gamma": 5.0})),
    "L041": dict(chosen=plan(**{"objective.min_snr_gamma": 0.5, "objective.debiased": True})),
    "L042": dict(chosen=plan(**{"objective.noise_offset": 0.3})),
    "L043": dict(chosen=plan(**{"adapter.max_norm": 0.1})),
    "L050": dict(chosen=plan(**{"components.te1_learning_rate": 2e-4, "components.te1_stop_after": 100})),
    "L051": dict(chosen=plan(**{"components.te2_learning_rate": 1e-5})),
    "L060": dict(chosen=plan(**{"run.save_every": 0})),
    "L061": dict(data=dataset(held_out=0)),
    "L062": dict(chosen=plan(**{"optimizer.warmup_steps": 900})),
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
        {"learning_rate": 1.0, "optimizer.optimizer": "pytorch_optimizer", "optimizer.optimizer_name": "prodigy"},
        "L005",
    ),
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


def test_v_prediction_is_told_nothing_of_noise_prediction():
    assert "L040" not in {finding.rule for finding in checked(plan(**{"objective.min_snr_gamma": 5.0}), noise=False)}


def test_a_decoupling_that_is_switched_off_is_told():
    off = plan(**{"optimizer.optimizer": "Prodigy", "optimizer.optimizer_args": "d_coef=2 decouple=False"})
    [finding] = [finding for finding in checked(off) if finding.rule == "L004"]
    assert finding.changes[0].value == "d_coef=2 decouple=True"


def test_a_warm_up_is_too_long_for_every_optimizer():
    chosen = plan(**{"optimizer.optimizer": "Prodigy", "optimizer.warmup_steps": 900})
    assert "L062" in {finding.rule for finding in checked(chosen)}


def test_a_style_is_shown_less_often():
    style = dataset(images=100)
    assert not {finding.rule for finding in checked(data=style, presentations=35.0)} & {"L033", "L034"}
    assert "L033" in {finding.rule for finding in checked(presentations=25.0)}


# What the guide and the trainers' pages say, in their order, and where it has become a rule, an option or a preset.
STATEMENTS = {
    "one adapter type for the whole run": "option adapter.algorithm",
    "base LoRA or backup to start from": "option trainer.start_from",
    "rank 16, alpha 1.0 is a scale of 1/16": "rule L013",
    "DoRA dropout a tenth of a LoRA's": "rule L023",
    "dropout .1 to .5": "rule L024",
    "bundle embeddings": "option components.embeddings",
    "layer presets and a custom list; attention or attention+MLP": "option adapter.layers",
    "dim 4 to 128, typical 16/8": "rule L010",
    "learning rate 1e-4 to 1e-3": "rule L006",
    "C3Lier: 3×3 convolutions by conv_dim": "option adapter.conv_rank",
    "block dims": "option adapter.blocks",
    "LoRA+": "option adapter.loraplus_ratio",
    "at least 15 images, ideal 30, more than 50 overkill": "dataset D001 D002",
    "styles 50 to 200": "dataset D003",
    "white background behind transparency": "dataset D010",
    "at most 3k pixels": "dataset D020",
    "upscale small pictures": "dataset D021",
    "no flip of asymmetric concepts": "dataset A001",
    "protected pictures": "dataset D032",
    "trigger first on every image": "dataset T002",
    "5 to 20 tags": "dataset T010 T011",
    "no implied tags": "dataset T020",
    "tag dominant backgrounds": "dataset T030",
    "steps = images · repeats · epochs / batch": "dataset R001",
    "about 100 views per image, styles 30 to 40": "rule L033 L034",
    "multi-concept: balance repeats": "dataset B001",
    "multi-concept: batch 1": "rule L030",
    "multi-concept: flip off": "rule L031",
    "multi-concept: rank 32 or more": "rule L032",
    "batch size at most 4 to 8": "rule L037",
    "buckets on, max bucket not below the resolution": "dataset D023",
    "resolution within the model's": "rule L035 L036",
    "Prodigy and D-Adaptation: rate 1": "rule L001",
    "Prodigy and D-Adaptation: cosine": "rule L002",
    "Prodigy and D-Adaptation: alpha 1": "rule L003",
    "Prodigy and D-Adaptation: decouple, weight decay .1, betas .9 .99": "rule L004",
    "Adam: cosine with restarts": "rule L007",
    "rank 8/8 for familiar things, 32/32 to start, at most 64, 128 overkill": "rule L010",
    "conv 16/1": "rule L014",
    "scale weight norms 1": "rule L043",
    "dropouts 0": "option adapter.network_dropout",
    "min-SNR 5": "rule L041",
    "noise offset 0": "rule L042",
    "debiased on": "rule L040",
    "zero-terminal SNR only if the model has it": "option objective.zero_terminal_snr",
    "LoCon at most 64": "rule L012",
    "LoHa at most 32": "rule L011",
    "LoKr factor −1 small, about 8 large": "rule L020",
    "DyLoRA about 128 with accumulation, batch 1": "rule L021",
    "(IA)³ rate 5e-3 to 1e-2": "rule L022",
    "Diag-OFT, GLoRA, native fine-tuning": "option adapter.algorithm",
    "loss tells nothing, choose by saved epochs": "rule L060",
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_every_statement_has_its_place(statement):
    kind, *names = STATEMENTS[statement].split()
    for name in names:
        if kind == "rule":
            assert name in RUN_RULES
        elif kind == "dataset":
            assert name in RULES
        else:
            part, _, option = name.partition(".")
            assert option == "start_from" or option in options_of(KINDS[part])


def test_the_table_shows_every_rule():
    lines = rule_table().splitlines()
    assert [line.split()[0] for line in lines] == list(RUN_RULES)
