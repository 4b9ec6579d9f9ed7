"""Every option of every settings class changes something on a run that it fits, or is refused by name.

``CASES`` has an entry for each option: what it is set to, what has to be set beside it (in both runs that are
compared), on which model, and what must then differ between the run with it and the run without.

* weights: the LoRA's tensors
* report: the text, the log or what is kept in the run folder
* an error: the message, where the option is refused
* a test's name: what it changes cannot be seen in a result, and is measured there
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.training.dataset.model import CaptionOptions
from lora_loom.training.options import options_of
from lora_loom.training.presets import KINDS
from lora_loom.training.settings import Plan
from tiny_text import tiny_sd3, tiny_sd3_clip
from training import opened

BASE = {
    "trainer": {"length": 3, "rank": 2, "alpha": 2.0, "batch_size": 2, "learning_rate": 1e-2, "seed": 5},
    "run": {"smoke_test": False},
}
NUMBERS = itertools.count()
WEIGHTS, REPORT = "weights", "report"


@dataclass(frozen=True)
class Case:
    """``value`` of the option; ``beside``: "part.option" -> value, in both runs; ``data``: how the dataset is made."""

    value: Any
    effect: str = WEIGHTS
    beside: dict[str, Any] = field(default_factory=dict)
    model: str = "sd15"
    data: str = "plain"


def case(value: Any, effect: str = WEIGHTS, model: str = "sd15", data: str = "plain", **beside: Any) -> Case:
    return Case(value, effect, {name.replace("__", "."): given for name, given in beside.items()}, model, data)


LOKR, OFT = {"adapter__algorithm": "LoKr"}, {"adapter__algorithm": "OFT", "adapter__block_size": 4}
FULL_CONV = {"adapter__layers": "full", "adapter__conv_rank": 2}
HUBER = {"objective__loss": "Huber"}
TEXT = {"components__te1_learning_rate": 1e-2}
WORDS = {"components__embeddings": "zorb: 2 fluffy cat"}
HELD_OUT = {"run__validate_every": 1}

CASES: dict[str, Case | str] = {
    "trainer.length": case(4),
    "trainer.unit": case("epochs"),
    "trainer.learning_rate": case(2e-2),
    "trainer.rank": case(3),
    "trainer.alpha": case(1.0),
    "trainer.batch_size": case(1),
    "trainer.seed": case(6),
    "adapter.layers": case("attention"),
    "adapter.conv_rank": case(2, adapter__layers="full"),
    "adapter.conv_alpha": case(0.5, **FULL_CONV),
    "adapter.algorithm": case("LoHa"),
    "adapter.dora": case("output"),
    "adapter.rs_lora": case(True),
    "adapter.tucker": case(True, **FULL_CONV),
    "adapter.factor": case(2, **LOKR),
    "adapter.decompose_both": case(True, **LOKR, adapter__factor=8, trainer__rank=1),
    "adapter.full_matrix": case(True, **LOKR),
    "adapter.block_size": case(8, adapter__algorithm="OFT"),
    "adapter.constraint": case(0.001, **OFT),
    "adapter.rescaled": case(True, **OFT),
    "adapter.unit": case(2, adapter__algorithm="DyLoRA", trainer__rank=4),
    "adapter.train_on_input": case(True, adapter__algorithm="IA3"),
    "adapter.train_bias": case(True, adapter__algorithm="full"),
    "adapter.network_dropout": case(0.5),
    "adapter.rank_dropout": case(0.5),
    "adapter.module_dropout": case(0.5),
    "adapter.max_norm": case(0.01),
    "adapter.loraplus_ratio": case(4.0),
    "adapter.layer_filter": case("attn1"),
    "adapter.blocks": case("mid: off"),
    "optimizer.optimizer": case("SGD", optimizer__weight_decay=0.0),
    "optimizer.weight_decay": case(0.5),
    "optimizer.beta1": case(0.5),
    "optimizer.beta2": case(0.5),
    "optimizer.epsilon": case(1e-3),
    "optimizer.schedule": case("cosine"),
    "optimizer.warmup_steps": case(2),
    "optimizer.max_grad_norm": case(0.01, optimizer__epsilon=1e-3),
    "optimizer.gradient_accumulation": case(2),
    "optimizer.optimizer_args": case("amsgrad=True"),
    "optimizer.optimizer_name": case("AdEMAMix", optimizer__optimizer="pytorch_optimizer"),
    "optimizer.min_lr_factor": case(0.5, optimizer__schedule="cosine"),
    "optimizer.cycles": case(2.0, optimizer__schedule="cosine with restarts"),
    "optimizer.power": case(2.0, optimizer__schedule="polynomial"),
    "optimizer.decay_steps": case(2, optimizer__schedule="warm-up-stable-decay"),
    "optimizer.schedule_unit": case("epochs", optimizer__warmup_steps=1, trainer__length=6),
    "optimizer.horizon": case(30, optimizer__schedule="cosine"),
    "objective.timesteps": case("logit-normal"),
    "objective.logit_mean": case(1.0, objective__timesteps="logit-normal"),
    "objective.logit_std": case(0.3, objective__timesteps="logit-normal"),
    "objective.timestep_shift": case("fixed"),
    "objective.shift": case(5.0, objective__timestep_shift="fixed"),
    "objective.mode_scale": case(0.5, objective__timesteps="mode"),
    "objective.timestep_curve": case("0:1, 1:0"),
    "objective.min_timestep": case(500),
    "objective.max_timestep": case(500),
    "objective.loss": case("L1"),
    "objective.huber_c": case(0.01, **HUBER),
    "objective.huber_schedule": case("constant", **HUBER),
    "objective.huber_scale": case(0.1, **HUBER),
    "objective.min_snr_gamma": case(1.0),
    "objective.debiased": case(True),
    "objective.p2_gamma": case(1.0),
    "objective.v_loss_scale": case(True, "v_loss_scale is True and has no effect"),
    "objective.v_like_loss": case(0.5),
    "objective.zero_terminal_snr": case(True, "zero_terminal_snr is True and has no effect"),
    "objective.noise_offset": case(0.1),
    "objective.noise_offset_random": case(True, objective__noise_offset=0.1),
    "objective.adaptive_noise_offset": case(1.0, objective__noise_offset=0.1),
    "objective.multires_noise_iterations": case(3),
    "objective.multires_noise_discount": case(0.8, objective__multires_noise_iterations=3),
    "objective.input_perturbation": case(0.1),
    "objective.prior_target": case("base model", data="regularised"),
    "objective.preservation_weight": case(
        2.0, objective__preservation_trigger="zorb", objective__preservation_class="thing"
    ),
    "objective.preservation_trigger": case(
        "number", objective__preservation_weight=1.0, objective__preservation_class="thing"
    ),
    "objective.preservation_class": case(
        "animal", objective__preservation_weight=1.0, objective__preservation_trigger="zorb"
    ),
    "run.gradient_checkpointing": case(True, REPORT, run__smoke_test=True),
    "run.on_cancel": "test_cancel.py",
    "run.save_every": case(1, REPORT),
    "run.save_unit": case("epochs", REPORT, run__save_every=1, trainer__length=5),
    "run.keep_last": case(1, REPORT, run__save_every=1),
    "run.offload_activations": case(True, REPORT, run__gradient_checkpointing=True, run__smoke_test=True),
    "run.compute_dtype": case("bf16"),
    "run.parameter_dtype": case("bf16"),
    "run.ema_decay": case(0.9, REPORT),
    "run.validate_every": case(1, REPORT, data="held out"),
    "run.keep_best": case(True, REPORT, data="held out", **HELD_OUT),
    "run.early_stop": case(1, REPORT, data="held out", trainer__length=12, trainer__learning_rate=0.5, **HELD_OUT),
    "run.latent_cache": "test_latent_cache.py",
    "run.text_cache": "test_text_cache.py",
    "run.sample_latents": case(True),
    "run.text_variants": case(1, data="shuffled"),
    "run.tensorboard": case(True, REPORT),
    "run.smoke_test": case(True, REPORT),
    "components.train_model": case(False, **TEXT),
    "components.te1_learning_rate": case(1e-2),
    "components.te2_learning_rate": case(1e-2, model="sdxl"),
    "components.te3_learning_rate": case(1e-2, model="sd3"),
    "components.te1_stop_after": case(1, **TEXT),
    "components.te2_stop_after": case(1, model="sdxl", components__te2_learning_rate=1e-2),
    "components.te3_stop_after": case(1, model="sd3", components__te3_learning_rate=1e-2),
    "components.embeddings": case("zorb: 2 fluffy cat"),
    "components.embedding_learning_rate": case(0.1, **WORDS),
    "components.embedding_stop_after": case(1, **WORDS),
    "components.preserve_embedding_norm": case(True, **WORDS),
}
# an option whose default cannot stand beside what its case needs: what it is compared with instead
OTHERWISE = {
    "optimizer.optimizer_name": "SOAP",
    "objective.timestep_curve": "0:1, 1:1",
    "objective.preservation_weight": 1.0,
    "objective.preservation_trigger": "zorb",
    "objective.preservation_class": "thing",
    "adapter.block_size": 4,
}
BESIDE_BOTH = {"objective.timestep_curve": {"objective.timesteps": "curve"}}


@pytest.fixture(scope="module")
def models():
    with torch.inference_mode():
        found = {name: (tiny_model(name), clip_for(name), vae_for(name)) for name in ("sd15", "sdxl")}
        return {**found, "sd3": (tiny_sd3(), tiny_sd3_clip(inference=True), vae_for("sd3"))}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    plain = opened(images(tmp_path_factory.mktemp("data") / "zorb", count=6), 64, 16)
    concept = plain.concepts[0]

    def with_concepts(*concepts, of=lambda index: 0):
        samples = tuple(dataclasses.replace(s, concept=of(i)) for i, s in enumerate(plain.samples))
        return dataclasses.replace(plain, concepts=concepts, samples=samples)

    return {
        "plain": plain,
        "regularised": with_concepts(
            concept, dataclasses.replace(concept, kind="regularisation"), of=lambda index: index % 2
        ),
        "held out": with_concepts(
            concept, dataclasses.replace(concept, kind="validation"), of=lambda index: int(index == 5)
        ),
        "shuffled": with_concepts(dataclasses.replace(concept, captions=CaptionOptions(shuffle=True))),
    }


def plan_of(values: dict[str, Any]) -> Plan:
    parts: dict[str, dict[str, Any]] = {part: dict(BASE.get(part, {})) for part in KINDS}
    for name, value in values.items():
        part, _, option = name.partition(".")
        parts[part][option] = value
    own = parts.pop("trainer")
    return Plan(**own, **{part: KINDS[part](**options) for part, options in parts.items()})


_finished: dict[str, Any] = {}


def run(models, datasets, chosen: Case, values: dict[str, Any]):
    """(tensors, report and log and file names) of a run; equal runs are made once."""
    key = repr((chosen.model, chosen.data, sorted(values.items(), key=str)))
    if key not in _finished:
        name = f"option {next(NUMBERS)}"
        with torch.inference_mode():
            result = train(Request(*models[chosen.model], datasets[chosen.data], plan_of(values), name, "error"))
        folder = Path(re.search(r"kept in (.*)", result.report)[1])
        kept = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
        names = [re.sub(r"events\.out.*|state-[^/]*|option \d+", "…", each) for each in kept]
        report = re.sub(r"option \d+|[\d.]+ (m?s|min|h|s/step|steps/s)\b|[\d.]+ [MG]B are free", "…", result.report)
        _finished[key] = {key: value.clone() for key, value in result.lora.items()}, (report, names)
    return _finished[key]


def test_every_option_has_a_case():
    wanted = {f"{part}.{option}" for part, kind in KINDS.items() for option in options_of(kind)}
    assert CASES.keys() == wanted
    for name in (each for each in CASES.values() if isinstance(each, str)):
        option = next(key for key, value in CASES.items() if value == name).partition(".")[2]
        found = list(Path(__file__).parent.parent.rglob(name))
        assert found, f"{name} is to measure {option}"
    for key, name in CASES.items():
        if isinstance(name, str):
            texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.parent.rglob(name)]
            assert any(key.partition(".")[2] in text for text in texts), f"{name} does not speak of {key}"


@pytest.mark.parametrize("name", [name for name, chosen in CASES.items() if isinstance(chosen, Case)])
def test_an_option_has_an_effect_or_is_refused(name, models, datasets):
    chosen = CASES[name]
    beside = {**chosen.beside, **BESIDE_BOTH.get(name, {})}
    before = {**beside, **({name: OTHERWISE[name]} if name in OTHERWISE else {})}
    after = {**beside, name: chosen.value}
    if chosen.effect not in (WEIGHTS, REPORT):
        with pytest.raises(ValueError, match=chosen.effect):
            run(models, datasets, chosen, after)
        return
    (weights, told), (other, others_told) = (run(models, datasets, chosen, values) for values in (before, after))
    if chosen.effect == REPORT:
        assert told != others_told, f"{name} changes neither the report nor the run folder"
        return
    same = weights.keys() == other.keys() and all(torch.equal(weights[key], other[key]) for key in weights)
    assert not same, f"{name} has no effect on the LoRA"
