"""What a run keeps on the way, how it goes on when it is made longer, and what it measures."""

import dataclasses
from fractions import Fraction

import pytest
import torch

from graph import images
from lora_loom.host.runs import RunError
from lora_loom.kernels.safetensors_io import read_metadata
from lora_loom.training.continuing import RULES
from lora_loom.training.loop import Trainer
from lora_loom.training.options import OptionError
from lora_loom.training.runstate import find_state
from lora_loom.training.settings import RunSettings
from small_runs import NAMES, RUNS, alike, files, holding_out_the_last, log, lora, plan, run, same
from training import opened


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(images(tmp_path_factory.mktemp("data") / "zorb", count=5), 64, 16)


@pytest.fixture(scope="module")
def dataset(plain):
    """The fifth picture is held out."""
    return holding_out_the_last(plain)


# ---------------------------------------------------------------- made longer


@pytest.mark.parametrize(
    "optimizer", [{"schedule": "constant", "warmup_steps": 2}, {"schedule": "cosine", "horizon": 9}]
)
def test_a_longer_run_equals_one_that_never_stopped(plain, optimizer):
    whole, name = plan(length=9, optimizer=optimizer), next(NAMES)
    straight = run(plain, whole)
    first = run(plain, plan(length=4, optimizer=optimizer), name)
    second = run(plain, whole, name)
    assert second.losses == straight.losses and first.losses == straight.losses[:4]
    assert alike(second.lora, straight.lora) and "new learning-rate schedule" not in second.report
    assert f"went on with run {name!r} after step 4" in second.report and "length 4 → 9" in second.report


def test_a_schedule_that_has_ended_begins_anew_at_the_joint_and_the_second_resume_knows(plain, monkeypatch):
    short, name = plan(length=4, optimizer={"schedule": "cosine"}), next(NAMES)
    long = plan(length=9, optimizer={"schedule": "cosine"})
    run(plain, short, name)
    told = run(plain, long, name)
    assert "a new learning-rate schedule (cosine) of 5 steps begins at step 4: the one before was made" in told.report
    rates = [line["learning_rate"] for line in log(name)]
    assert rates[0] == rates[4] == 1e-2 and all(sorted(part)[::-1] == part for part in (rates[:4], rates[4:]))

    other = next(NAMES)  # the same, stopped on its way through the second schedule
    run(plain, short, other)
    step = Trainer.step

    def stopping(self):
        if self.step_number == 7:
            raise MemoryError("stop here")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(MemoryError):
            run(plain, long, other)
    again = run(plain, long, other)
    assert alike(again.lora, told.lora) and again.losses == told.losses
    assert [line["learning_rate"] for line in log(other)] == rates
    assert "new learning-rate schedule" not in again.report


def test_what_has_changed_is_told_or_refused(plain):
    name = next(NAMES)
    run(plain, plan(length=2), name)
    before = (RUNS / name / f"{name}.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"with another rank \(2, now 4\) and another alpha \(2\.0, now 3\.0\)\. Choose "
                                       r"another run_name, .* \(it makes the saved weights what they are\)"):
        run(plain, plan(length=4, rank=4, alpha=3.0), name)
    with pytest.raises(RunError, match="another optimizer .*what the optimizer remembers belongs to it"):
        run(plain, plan(length=4, optimizer={"optimizer": "Adafactor", "weight_decay": 0.0}), name)
    assert (RUNS / name / f"{name}.safetensors").read_bytes() == before
    told = run(plain, plan(length=4, learning_rate=1e-3, seed=4, optimizer={"weight_decay": 0.5}), name)
    line = next(line for line in told.report.splitlines() if "changed since then" in line)
    for change in ("length 2 → 4", "learning_rate 0.01 → 0.001", "seed 3 → 4", "weight_decay 0.01 → 0.5"):
        assert change in line
    assert [entry["learning_rate"] for entry in log(name)] == [1e-2, 1e-2, 1e-3, 1e-3]
    recipe = find_state(RUNS / name).facts["recipe"]
    kept = {f"{part}.{key}" for part, value in recipe.items() if isinstance(value, dict) for key in value}
    assert kept | {key for key, value in recipe.items() if not isinstance(value, dict)} == set(RULES)


def test_what_of_a_dataset_has_changed_is_told(plain):
    name, first = next(NAMES), plain.samples[0]
    run(plain, plan(length=1), name)
    renamed = dataclasses.replace(plain, samples=(dataclasses.replace(first, caption="other"), *plain.samples[1:]))
    fewer = dataclasses.replace(renamed, samples=renamed.samples[1:])
    often = dataclasses.replace(fewer, concepts=(dataclasses.replace(fewer.concepts[0], repeats=Fraction(3)),))
    lines = []
    for length, data in enumerate((renamed, fewer, often), 2):
        report = run(data, plan(length=length), name).report
        lines += [line.partition(" → ")[2] for line in report.splitlines() if "changed since then" in line]
    assert lines[0] == "2, the dataset's captions"
    pictures = "the dataset's images, masks or their concepts"
    assert lines[1] == f"3, the dataset's images 5 → 4, {pictures}, the dataset's captions"
    assert lines[2].startswith("4, the dataset's concepts ['zorb: training") and "repeats 1'] → [" in lines[2]
    assert lines[2].endswith("repeats 3']")


def test_an_accepted_change_has_its_effect(plain):
    """Weight decay is an argument of the optimizer, not of what it remembers."""
    one, two, how = next(NAMES), next(NAMES), {"adapter": {"loraplus_ratio": 1.0}}  # one rate for all
    for name in (one, two):
        before = run(plain, plan(length=2, **how), name).lora
    strong = plan(length=3, optimizer={"weight_decay": 10.0}, **how)
    kept, pulled = run(plain, plan(length=3, **how), one), run(plain, strong, two)
    for key in (key for key in before if "alpha" not in key):  # one step at rate 0.01
        more = 0.01 * (10 - 0.01) * before[key]
        assert torch.allclose(kept.lora[key] - pulled.lora[key], more, atol=1e-6) and bool(more.any()), key


def test_what_is_not_trained_is_kept_as_well(plain):
    """LoRA-FA trains one factor; the other was drawn from a seed that may change."""
    name = next(NAMES)
    first = run(plain, plan(length=2, adapter={"algorithm": "LoRA-FA"}), name)
    second = run(plain, plan(length=4, seed=99, adapter={"algorithm": "LoRA-FA"}), name)
    downs = [key for key in first.lora if "lora_down" in key]
    assert downs and all(same(first.lora[key], second.lora[key]) for key in downs)
    assert not alike(first.lora, second.lora)


# ---------------------------------------------------------------- kept on the way


def test_loras_are_kept_on_the_way(plain):
    name = next(NAMES)
    result = run(plain, plan(length=7, run={"save_every": 2}), name)
    assert files(name) == sorted(
        [f"{name}.safetensors", *(f"{name}-step{n:06d}.safetensors" for n in (2, 4, 6)), "log.jsonl", "state-000007"]
    )
    shorter = run(plain, plan(length=4))
    assert alike(lora(name, "-step000004"), shorter.lora), "the LoRA of a step is that of a run that ends there"
    assert alike(lora(name), result.lora) and f"kept in {RUNS / name}" in result.report


def test_only_the_last_are_kept_and_epochs_are_counted(plain):
    """Five pictures of two shapes in batches of two are three batches; with two of them a step, 1.5 steps an epoch."""
    name = next(NAMES)
    options = {"save_every": 1, "save_unit": "epochs", "keep_last": 2}
    run(plain, plan(length=8, run=options, optimizer={"gradient_accumulation": 2}), name)
    marks = [path.stem.rpartition("-step")[2] for path in sorted((RUNS / name).glob("*-step*"))]
    assert marks == ["000005", "000006"], "epochs end in steps 2, 3, 5, 6 (and 8, which is the end)"


def test_the_average_of_the_weights_is_saved_apart(plain):
    """Against its recursion over the LoRAs of all steps; the second factors begin as zeros."""
    name = next(NAMES)
    result = run(plain, plan(length=5, run={"save_every": 1, "ema_decay": 0.3}), name)
    ups = [key for key in result.lora if "lora_up" in key]
    for key in ups:
        average = torch.zeros_like(result.lora[key], dtype=torch.float64)
        for number in range(5):
            decay = min(0.3, (1 + number) / (10 + number))
            now = result.lora[key] if number == 4 else lora(name, f"-step{number + 1:06d}")[key]
            average = decay * average + (1 - decay) * now
        found = lora(name, "-ema")[key]
        assert torch.allclose(found.double(), average, rtol=1e-5, atol=1e-7)
        assert not torch.equal(found, result.lora[key])
    assert f"moving average of 5 steps: {name}-ema.safetensors" in result.report


def test_adapters_kept_in_bfloat16_learn_as_those_in_float32_do(plain):
    """Steps of 1e-5 are far below what bfloat16 holds beside weights of 0.1; rounded at random they still add up."""
    wide = run(plain, plan(length=30, learning_rate=1e-5))
    narrow = run(plain, plan(length=30, learning_rate=1e-5, run={"parameter_dtype": "bf16"}))
    begun = run(plain, plan(length=1, learning_rate=1e-8))
    moved = []
    for key in (key for key in wide.lora if "lora_down" in key):
        assert narrow.lora[key].dtype == torch.bfloat16 and wide.lora[key].dtype == torch.float32
        ours, theirs = (other.lora[key].float() - begun.lora[key] for other in (narrow, wide))
        moved.append([(ours * theirs.sign()).sum(), theirs.abs().sum()])
    along, whole = torch.tensor(moved).sum(0)
    assert 0.5 < along / whole < 1.5
    assert narrow.losses == pytest.approx(wide.losses, rel=2e-2)


def test_what_is_saved_of_a_schedule_free_run_are_the_weights_to_look_at(plain):
    name = next(NAMES)
    result = run(plain, plan(optimizer={"optimizer": "AdamWScheduleFree"}), name)
    state = find_state(RUNS / name)
    trained = [tensor for key, tensor in state.tensors.items() if key.startswith("parameter.")]
    saved = [tensor for key, tensor in result.lora.items() if "alpha" not in key]
    assert len(trained) == len(saved)
    assert not any(torch.equal(one, two) for one in trained for two in saved if one.shape == two.shape)


def test_only_loras_of_steps_are_counted_as_such(plain):
    result = run(plain, plan(length=1, run={"ema_decay": 0.5}), "two-step dance")
    assert "on the way" not in result.report
    result = run(plain, plan(length=3, run={"save_every": 1}), "three-step dance")
    assert "with the LoRAs of 2 steps on the way" in result.report


# ---------------------------------------------------------------- measured


def test_held_out_pictures_are_measured_and_the_best_is_kept(dataset):
    name = next(NAMES)
    options = {"validate_every": 2, "keep_best": True, "save_every": 1}
    result = run(dataset, plan(length=7, learning_rate=5e-2, run=options), name)
    assert alike(result.lora, run(dataset, plan(length=7, learning_rate=5e-2)).lora), "measuring changes nothing"
    curve = [(entry["step"], entry["mean"]) for entry in log(name) if "mean" in entry]
    assert [step for step, _ in curve] == [0, 2, 4, 6, 7]
    best, loss = min(curve[1:], key=lambda pair: pair[1])
    kept = result.lora if best == 7 else lora(name, f"-step{best:06d}")
    assert alike(lora(name, "-best"), kept)
    assert f"the best on held-out pictures, of step {best}: {name}-best.safetensors" in result.report
    lowest, at = min((loss, step) for step, loss in curve)
    assert f"lowest validation loss {lowest:.4f} at step {at}" in result.report
    measured = next(entry["validation"] for entry in log(name) if "mean" in entry)
    assert list(measured) == ["0.1", "0.3", "0.5", "0.7", "0.9"]
    assert "validation by timestep (0 is clean): 0.1: " in result.report


def test_measurements_survive_a_stop(dataset, monkeypatch):
    options = {"validate_every": 2, "keep_best": True}
    straight, name = next(NAMES), next(NAMES)
    one = run(dataset, plan(length=7, run=options), straight)
    step = Trainer.step

    def stopping(self):
        if self.step_number == 5:
            raise MemoryError("stop here")
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stopping)
        with pytest.raises(MemoryError):
            run(dataset, plan(length=7, run=options), name)
    two = run(dataset, plan(length=7, run=options), name)
    curves = [[(e["step"], e["validation"]) for e in log(which) if "mean" in e] for which in (straight, name)]
    assert curves[0] == curves[1] and alike(lora(straight, "-best"), lora(name, "-best"))
    lines = [next(li for li in r.report.splitlines() if li.startswith("validation loss")) for r in (one, two)]
    assert lines[0] == lines[1] and alike(one.lora, two.lora)


def test_a_run_that_no_longer_gets_better_ends_early(dataset):
    """At such a rate nothing is learned but noise."""
    name = next(NAMES)
    wild = plan(length=60, learning_rate=1.0, run={"validate_every": 1, "early_stop": 3})
    result = run(dataset, wild, name)
    curve = [(entry["step"], entry["mean"]) for entry in log(name) if "mean" in entry]
    best = min(range(len(curve)), key=lambda index: curve[index][1])
    assert len(curve) - 1 - best == 3 and len(result.losses) < 60 and result.finished
    assert "ended early: the validation loss has not fallen for 3 measurements, it was lowest" in result.report
    assert f"({curve[best][1]:.4f}) at step {curve[best][0]}" in result.report
    again = run(dataset, wild, name)
    assert alike(again.lora, result.lora) and again.losses == result.losses
    assert "the run had ended: the validation loss has not fallen" in again.report
    on = run(dataset, plan(length=len(result.losses) + 2, learning_rate=1.0, run={"validate_every": 1}), name)
    assert len(on.losses) == len(result.losses) + 2


def test_a_run_that_reaches_its_length_did_not_end_early(dataset):
    options = plan(length=1, learning_rate=1.0, run={"validate_every": 1, "early_stop": 1})
    [(_, before), (_, after)] = [(e["step"], e["mean"]) for e in log(only(dataset, options)) if "mean" in e]
    assert after > before, "the one measurement made is a worse one"
    report = run(dataset, options).report
    assert "1 of 1 steps" in report and "ended early" not in report


def only(dataset, options):
    name = next(NAMES)
    run(dataset, options, name)
    return name


def test_the_file_of_the_best_is_that_of_the_step_which_the_report_names(dataset):
    name, options = next(NAMES), {"validate_every": 1, "keep_best": True}
    slow = {"learning_rate": 1e-3}
    first = run(dataset, plan(length=2, run=options, **slow), name)
    [best] = [line for line in first.report.splitlines() if line.startswith("the best on held-out")]
    off = run(dataset, plan(length=6, run={"validate_every": 1}, **slow), name)
    assert "the best on held-out" not in off.report, "it was not looked for"
    at = read_metadata(RUNS / name / f"{name}-best.safetensors")["ss_steps"]
    assert f"of step {at}:" in best
    on = run(dataset, plan(length=7, run=options, **slow), name).report
    at = read_metadata(RUNS / name / f"{name}-best.safetensors")["ss_steps"]
    assert f"the best on held-out pictures, of step {at}:" in on


@pytest.mark.parametrize("change", ["seed", "dataset", "nothing"])
def test_measurements_that_cannot_be_compared_begin_anew(dataset, plain, change):
    """Another seed is other noise, another data set may be other pictures."""
    name, options = next(NAMES), {"validate_every": 1, "keep_best": True}
    run(dataset, plan(length=2, run=options), name)
    other = dataset
    if change == "dataset":
        swapped = [dataclasses.replace(s, concept=int(i == 0)) for i, s in enumerate(dataset.samples)]
        other = dataclasses.replace(dataset, samples=tuple(swapped))
    report = run(other, plan(length=3, run=options, **({"seed": 9} if change == "seed" else {})), name).report
    [curve] = [line for line in report.splitlines() if line.startswith("validation loss")]
    assert ("(step 0)" in curve) == (change == "nothing") and "(step 2)" in curve and "(step 3)" in curve
    assert ("measured anew" in report) == (change != "nothing")


def test_the_loss_is_told_by_timestep(plain):
    name = next(NAMES)
    report = run(plain, plan(length=20), name).report
    line = next(line for line in report.splitlines() if line.startswith("loss by timestep"))
    bands = [entry["bands"] for entry in log(name)]
    for index, label in enumerate(("0-0.25", "0.25-0.5", "0.5-0.75", "0.75-1")):
        first, last = ([row[index] for row in rows if row[index] is not None] for rows in (bands[:2], bands[-2:]))
        told = first and last and f"{label}: {sum(first) / len(first):.4f} → {sum(last) / len(last):.4f}"
        assert told in line if told else label + ":" not in line


@pytest.mark.parametrize(
    "options", [{"validate_every": 2}, {"validate_every": 2, "keep_best": True}, {"validate_every": 2, "early_stop": 1}]
)
def test_measuring_without_anything_to_measure_is_an_error(plain, options):
    name = next(NAMES)
    with pytest.raises(OptionError, match="validate_every is 2, but the dataset has no held-out pictures"):
        run(plain, plan(run=options), name)
    assert not (RUNS / name).exists()


@pytest.mark.parametrize("options", [{"keep_best": True}, {"early_stop": 2}])
def test_measurements_that_are_never_made_are_an_error(options):
    [name] = options
    with pytest.raises(OptionError, match=f"{name} is .*: validate_every is 0"):
        RunSettings(**options)
