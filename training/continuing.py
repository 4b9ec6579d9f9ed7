"""What may be different when a run is gone on with, and what its learning rate does from there.

* ``RULES``: for every option and every fact of the dataset and of the base (MODEL, CLIP and VAE), whether a change is
  accepted and what it means, or why it is refused. This table is the documentation; a test holds it complete.
* ``compare``: the differences between what a run was made with and what it shall go on with, judged by that table.
* ``next_segments``: the learning-rate schedule of a continued run. Where the schedule can simply go on, the run equals
  one that never stopped; otherwise a new schedule begins at the joint.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .options import options_of
from .schedules import Schedule, check_room
from .settings import PARTS, OptimizerSettings, Plan

VERDICTS = {
    "no matter": "changes nothing in what is learned",
    "from here": "accepted, takes effect from the step at which the run goes on",
    "schedule": "accepted, a new learning-rate schedule begins at the step at which the run goes on",
    "another base": "accepted and told apart: the LoRA is no longer that of a run which was never interrupted",
    "on or off": "accepted as long as it is not switched on or off by it",
    "refused": "another run, for the reason given",
}
_SHAPE = "it makes the saved weights what they are"
_MEMORY = "what the optimizer remembers belongs to it"
_ORDER = "it decides which weights learn together"
_TRAINED = "it decides what is trained"


@dataclass(frozen=True)
class Rule:
    verdict: str
    reason: str = ""


def _rules(verdict: str, names: str, reason: str = "") -> dict[str, Rule]:
    return {name: Rule(verdict, reason) for name in names.split()}


RULES: dict[str, Rule] = {
    # the trainer node
    **_rules("from here", "length unit learning_rate", "more steps go on, fewer end the run earlier"),
    **_rules("from here", "batch_size", "the order of the data is that of the new size, at the same position"),
    **_rules("from here", "seed", "order, noise, timesteps and dropout are drawn with the new one"),
    **_rules("refused", "rank alpha", _SHAPE),
    # adapter settings
    **_rules("refused", "adapter.layers adapter.layer_filter adapter.conv_rank adapter.conv_alpha", _SHAPE),
    **_rules("refused", "adapter.algorithm adapter.dora adapter.rs_lora adapter.tucker adapter.factor", _SHAPE),
    **_rules("refused", "adapter.decompose_both adapter.full_matrix adapter.block_size adapter.constraint", _SHAPE),
    **_rules("refused", "adapter.rescaled adapter.unit adapter.train_on_input adapter.train_bias", _SHAPE),
    **_rules("refused", "adapter.blocks adapter.loraplus_ratio", _ORDER),
    **_rules("from here", "adapter.network_dropout adapter.rank_dropout adapter.module_dropout adapter.max_norm"),
    # optimizer settings
    **_rules("refused", "optimizer.optimizer optimizer.optimizer_name optimizer.optimizer_args", _MEMORY),
    **_rules("from here", "optimizer.weight_decay optimizer.beta1 optimizer.beta2 optimizer.epsilon"),
    **_rules("from here", "optimizer.max_grad_norm"),
    **_rules("from here", "optimizer.gradient_accumulation", "the data goes on at step × gradient_accumulation"),
    **_rules("schedule", "optimizer.schedule optimizer.warmup_steps optimizer.min_lr_factor optimizer.cycles"),
    **_rules("schedule", "optimizer.power optimizer.decay_steps optimizer.schedule_unit optimizer.horizon"),
    # objective settings: each step has its own objective
    **{f"objective.{name}": Rule("from here") for name in options_of(PARTS["objective"])},
    # run settings
    **_rules("no matter", "run.gradient_checkpointing run.offload_activations run.latent_cache run.text_cache"),
    **_rules("no matter", "run.on_cancel run.save_every run.save_unit run.keep_last run.tensorboard run.smoke_test"),
    **_rules("from here", "run.validate_every run.keep_best run.early_stop"),
    **_rules("from here", "run.compute_dtype run.sample_latents run.text_variants"),
    **_rules("from here", "run.ema_decay", "an average that is switched on begins with the weights of that step"),
    **_rules("refused", "run.parameter_dtype", _SHAPE),
    # component settings
    **_rules("refused", "components.train_model components.embeddings", _TRAINED),
    **_rules("on or off", "components.te1_learning_rate components.te2_learning_rate components.te3_learning_rate"),
    **_rules("from here", "components.te1_stop_after components.te2_stop_after components.te3_stop_after"),
    **_rules("from here", "components.embedding_learning_rate components.embedding_stop_after"),
    **_rules("from here", "components.preserve_embedding_norm"),
    # which presets filled the settings
    **_rules("no matter", "preset adapter.preset optimizer.preset objective.preset run.preset components.preset"),
    # the dataset
    **_rules("from here", "dataset.images dataset.resolution dataset.concepts dataset.options"),
    **_rules("from here", "dataset.pictures dataset.captions"),
    **_rules("from here", "dataset.fingerprint", "of everything; told where nothing else says what is different"),
    # the base: people change it on purpose, as for a second stage. Another architecture is refused, as no layer fits
    **_rules("another base", "base.weights base.loras base.sampling", "LoRAs are those applied before the trainer"),
    **_rules("another base", "base.text_encoder base.text_encoder_loras base.clip_skip"),
    **_rules("another base", "base.vae", "latents are encoded anew"),
}
LUMP = "dataset.fingerprint"
_WORDS = {  # of facts that are hashes, which would tell nobody anything
    LUMP: "the dataset's images, captions or options",
    "dataset.pictures": "the dataset's images, masks or their concepts",
    "dataset.captions": "the dataset's captions",
    "base.weights": "the weights of the MODEL",
    "base.loras": "the LoRAs on the MODEL",
    "base.sampling": "the prediction or noise levels of the MODEL",
    "base.text_encoder": "the weights of the CLIP",
    "base.text_encoder_loras": "the LoRAs on the CLIP",
    "base.vae": "the weights of the VAE",
}
_FACTS = ("dataset.", "base.")  # they have no defaults: what a saved run does not tell of cannot be compared
_MEASURING = (*_FACTS, "seed", "objective.zero_terminal_snr")  # same pictures, noise and noise levels


@dataclass
class Differences:
    """``accepted``, ``base`` and ``refused`` as text for the user; ``schedule`` whether the learning rate has to begin
    anew, ``measures`` whether validation losses can no longer be compared."""

    accepted: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    schedule: bool = False
    measures: bool = False


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> Differences:
    """What is different, both given as recipes (what ``dataclasses.asdict`` makes of a plan, "dataset" and "base")."""
    found, old, given = Differences(), dict(_flat(before)), dict(_flat(now))
    changed = [name for name in given if _changed(name, old, given)]
    if LUMP in changed and "dataset.pictures" in old and any(n.startswith("dataset.") and n != LUMP for n in changed):
        changed.remove(LUMP)
    for name in changed:
        was, value, rule = old.get(name, _default(name)), given[name], RULES[name]
        switched = rule.verdict == "on or off" and bool(was) != bool(value)
        if rule.verdict == "refused" or switched:
            reason = rule.reason or _TRAINED
            found.refused.append(f"another {name.rpartition('.')[2]} ({was!r}, now {value!r}): {reason}")
        elif rule.verdict == "another base":
            found.base.append(_told(name, was, value))
        else:
            found.accepted.append(_told(name, was, value))
        found.schedule |= rule.verdict == "schedule"
        found.measures |= name.startswith(_MEASURING)
    return found


def _changed(name: str, old: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """The options of later versions had their defaults, the facts of later versions are not known."""
    unknown = name not in old and name.startswith(_FACTS)
    return not unknown and old.get(name, _default(name)) != given[name]


def _flat(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in recipe.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", deeper) for inner, deeper in value.items())
        else:
            yield name, value


def _default(name: str) -> Any:
    part, _, option = name.rpartition(".")
    kind = PARTS.get(part, Plan)
    return next((field.default for field in dataclasses.fields(kind) if field.name == option), None)


def _told(name: str, was: Any, value: Any) -> str:
    if name in _WORDS:
        return _WORDS[name]
    part, _, option = name.rpartition(".")
    whose = "the dataset's " if part == "dataset" else ""
    return f"{whose}{option} {was!r} → {value!r}"


# -- the learning rate


@dataclass(frozen=True)
class Segment:
    """A schedule of ``length`` steps from step ``start`` on."""

    start: int
    length: int
    steps_per_epoch: float

    def schedule(self, settings: OptimizerSettings) -> Schedule:
        return Schedule(settings, self.length, self.start, self.steps_per_epoch)


def first_segment(settings: OptimizerSettings, total: int, steps_per_epoch: float) -> Segment:
    """The schedule of a run that begins: as long as its horizon, or as the run. Raises OptionError."""
    return Segment(0, Schedule.of_run(settings, total, steps_per_epoch).length, steps_per_epoch)


def next_segments(
    settings: OptimizerSettings,
    total: int,
    steps_per_epoch: float,
    before: Sequence[Segment],
    step: int,
    changed: bool,
) -> tuple[list[Segment], bool]:
    """The schedules of a run that goes on at ``step``, the last being the one it follows; whether that one is new.
    Raises OptionError where the options do not fit what is left.

    ``changed`` says that options of the schedule are different.
    """
    last, wanted = before[-1], first_segment(settings, total, steps_per_epoch)
    counts_epochs = settings.schedule_unit == "epochs" and steps_per_epoch != last.steps_per_epoch
    same_end = last.start + last.length == wanted.length
    goes_on = not changed and not counts_epochs and (same_end or last.schedule(settings).horizon_free)
    if goes_on or step >= total:
        return list(before), False
    length = max(1, wanted.length - step)
    check_room(settings, length, steps_per_epoch, "the rest of the run, for which a new schedule begins")
    return [*before, Segment(step, length, steps_per_epoch)], True
