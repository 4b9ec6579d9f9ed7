"""The trainer in the host's own executor: what comes out, what it is good for, what stays as it was."""

import json
import logging
import random
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import nodes
from graph import OUTPUTS, Graph, GraphError, clip_for, images, node, sampled, tiny_model, training_prompt
from lora_loom.host.branching import stack_on
from lora_loom.nodes.applying import FROM_SOCKET, LoomLoRALoaderAdvanced
from lora_loom.nodes.training import LoomLoRATrainer
from lora_loom.training.settings import plan_from_json
from snapshot import weights

FAMILIES = ("sd15", "sdxl", "flux", "sd3")


@pytest.fixture(scope="module")
def graph():
    images(Path(folder_paths.get_input_directory()) / "zorb")
    return Graph()


def train(graph, family="sd15", run_name="run", more=None, **options):
    """What the five outputs of a trainer are."""
    return graph.run({**training_prompt(family, "zorb", run_name, **options), **(more or {})})


def run_folder(name):
    return Path(folder_paths.get_output_directory()) / "lora_loom" / name


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------- the main path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_lora_is_usable_at_once_everywhere(graph, family, caplog):
    """In the trainer's own MODEL, in our loader, in core's loaders, from a file: one and the same picture."""
    name = f"made/{family}"
    pulled = {
        "base": node("Keep", value=["1", 0]),
        "4": node("LoomSaveLoRA", lora=["3", 0], name=name, if_file_exists="overwrite"),
        "file": node("Keep", value=["4", 0]),
        "5": node(
            "LoomLoRALoaderAdvanced",
            **{"model": ["1", 0], "clip": ["1", 1], "lora": ["3", 0], "lora_name": FROM_SOCKET},
            **{"strength_model": 1.0, "strength_clip": 1.0},
        ),
        "loaded": node("Keep", value=["5", 0]),
        "words": node("Keep", value=["5", 2]),
        "applied": node("Keep", value=["5", 3]),
        "6": node("LoraModelLoader", model=["1", 0], lora=["3", 0], strength_model=1.0, bypass=False),
        "core": node("Keep", value=["6", 0]),
    }
    caplog.set_level(logging.WARNING)
    kept = train(graph, family, f"everywhere {family}", pulled)
    assert all(value is not None for value in (kept[name] for name in OUTPUTS))

    before = sampled(tiny_model(family), family)
    expected = sampled(kept["core"], family)
    assert (expected - before).abs().max() > 1e-3 * before.abs().max(), "the LoRA does something"
    ours = sampled(kept["model"], family)
    assert (ours - expected).norm() <= 2e-5 * expected.norm(), "beside the weights instead of in them"
    assert torch.equal(sampled(kept["loaded"], family), ours)
    assert torch.equal(sampled(kept["base"], family), before), "the MODEL itself is untouched"

    lora = kept["lora"]
    assert kept["file"] == f"made/{family}.safetensors" and kept["words"] == "zorb"
    assert kept["applied"].startswith(f"the connected LoRA: {len(lora) // 3} weights of the MODEL at 1")
    assert "fit nothing" not in kept["applied"]
    with torch.inference_mode():
        from_file, _ = nodes.LoraLoader().load_lora(kept["base"], clip_for(family), kept["file"], 1.0, 1.0)
    assert torch.equal(sampled(from_file, family), expected)
    assert not [record for record in caplog.records if "lora key not loaded" in record.getMessage()]
    assert torch.equal(sampled(kept["base"], family), before)


def test_core_can_save_the_lora_and_plot_its_losses(graph):
    more = {
        "4": node("SaveLoRA", lora=["3", 0], prefix="loras/core", steps=3),
        "5": node("LossGraphNode", loss=["3", 3], filename_prefix="plot"),
    }
    prompt = {**training_prompt("sd15", "zorb", "core saves"), **more}
    kept = graph.run(prompt, also=("4", "5"))
    written = sorted(Path(folder_paths.get_output_directory()).glob("loras/core*.safetensors"))
    with safe_open(written[-1], "pt") as file:
        assert same({key: file.get_tensor(key) for key in file.keys()}, kept["lora"])
    assert len(kept["loss_map"]["loss"]) == 3 and all(np.isfinite(kept["loss_map"]["loss"]))


def test_the_same_queue_again_is_served_from_the_cache(graph):
    prompt = training_prompt("sd15", "zorb", "cached")
    graph.run(prompt)
    assert "3" in graph.ran
    graph.run(prompt)
    assert graph.ran == set()


# ---------------------------------------------------------------- names and metadata


def kohya_layers(family):
    """What kohya's trainers adapt in such a UNet by default: all there is in its transformers, under their names."""
    transformers, depth = {
        "sd15": (
            ["mid_block_attentions_0"]
            + [f"down_blocks_{level}_attentions_0" for level in (0, 1)]
            + [f"up_blocks_{level}_attentions_{n}" for level in (0, 1) for n in (0, 1)],
            1,
        ),
        "sdxl": (["input_blocks_3_1", "middle_block_1", "output_blocks_0_1", "output_blocks_1_1"], 2),
    }[family]
    leaves = [f"attn{n}_{leaf}" for n in (1, 2) for leaf in ("to_q", "to_k", "to_v", "to_out_0")]
    leaves += ["ff_net_0_proj", "ff_net_2"]
    inside = [f"transformer_blocks_{index}_{leaf}" for index in range(depth) for leaf in leaves]
    return {f"lora_unet_{place}_{leaf}" for place in transformers for leaf in ("proj_in", "proj_out", *inside)}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_sd_keys_are_kohya_s(graph, family):
    lora = train(graph, family, f"keys {family}", length=1)["lora"]
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(lora) == {f"{layer}.{part}" for layer in kohya_layers(family) for part in parts}
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in lora.values())
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in lora.values())


def test_other_keys_are_the_host_s(graph):
    lora = train(graph, "flux", "keys flux", length=1)["lora"]
    base = tiny_model("flux").model.state_dict()
    layers = {key.rsplit(".", 2)[0] if "weight" in key else key.rsplit(".", 1)[0] for key in lora}
    assert all(layer.startswith("diffusion_model.") and f"{layer}.weight" in base for layer in layers)


@pytest.mark.parametrize(
    "family, version, architecture, prediction",
    [
        ("sd15", "sd_v1", "stable-diffusion-v1/lora", "epsilon"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "epsilon"),
        ("flux", "flux1", "flux-1-dev/lora", None),
    ],
)
def test_the_metadata_tells_how_it_was_made(graph, family, version, architecture, prediction):
    save = {
        "4": node("LoomSaveLoRA", lora=["3", 0], name=f"told-{family}", if_file_exists="overwrite"),
        "file": node("Keep", value=["4", 0]),
    }
    name, options = f"told {family}", {"rank": 3, "alpha": 1.5, "seed": 11, "learning_rate": 2e-3}
    kept = train(graph, family, name, save, **options)
    with safe_open(folder_paths.get_full_path("loras", kept["file"]), "pt") as file:
        told = file.metadata()
    expected = {
        **{"ss_base_model_version": version, "ss_output_name": name, "ss_network_module": "networks.lora"},
        **{"ss_network_dim": "3", "ss_network_alpha": "1.5", "ss_learning_rate": "0.002", "ss_seed": "11"},
        **{"ss_steps": "3", "ss_max_train_steps": "3", "ss_num_train_images": "4", "ss_resolution": "(64, 64)"},
        **{"ss_optimizer": "AdamW", "ss_lr_scheduler": "constant", "ss_batch_size_per_device": "2"},
        **{"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": architecture, "modelspec.title": name},
        **{"modelspec.resolution": "64x64", "modelspec.prediction_type": prediction},
    }
    assert {key: told.get(key) for key in expected} == expected
    assert json.loads(told["ss_tag_frequency"]) == {"zorb": {"zorb": 4, **{f"number {n}": 1 for n in range(4)}}}
    assert len(told["sshs_model_hash"]) == 64 and told["modelspec.hash_sha256"] == "0x" + told["sshs_model_hash"]
    recipe = json.loads(told["loom.recipe"])
    data, base = recipe.pop("dataset"), recipe.pop("base")
    assert base["weights"] and base["vae"] and base["loras"] == ""
    assert (data["images"], data["resolution"]) == (4, 64)
    plan = plan_from_json(json.dumps(recipe))
    assert (plan.rank, plan.alpha, plan.seed, plan.learning_rate, plan.batch_size) == (3, 1.5, 11, 2e-3, 2)
    assert json.loads(plan.to_json()) == recipe
    assert {key: value for key, value in kept["lora"].metadata.items()}.items() <= told.items()


# ---------------------------------------------------------------- seeds and state


def preview(every=2):
    return {
        "7": node(
            "LoomPreviewSettings",
            **{"prompts": "zorb\nzorb, number 1", "negative": "", "every": every, "sampler": "euler_ancestral"},
            **{"scheduler": "normal", "steps": 2, "cfg": 2.0, "width": 64, "height": 64, "seeds": "1, 2"},
        )
    }


def with_preview(**options):
    return {"more": preview(), "preview": ["7", 0], **options}


def test_a_seed_means_the_same_bits_and_previews_change_nothing(graph):
    one = train(graph, run_name="seed one")
    two = train(graph, run_name="seed two", **with_preview())
    other = train(graph, run_name="seed three", seed=6)
    assert same(one["lora"], two["lora"]) and one["loss_map"] == two["loss_map"]
    assert one["lora"].keys() == other["lora"].keys() and not same(one["lora"], other["lora"])


def test_no_generator_but_our_own_is_used(graph):
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    train(graph, run_name="generators", **with_preview())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[2] == random.getstate()
    assert np.array_equal(before[1][1], np.random.get_state()[1])


def test_what_the_node_was_given_is_as_before(graph):
    kept = train(graph, run_name="as before", more={"base": node("Keep", value=["1", 0])}, length=2)
    fresh = tiny_model("sd15")
    assert weights(kept["base"]) == weights(fresh)
    assert not kept["base"].patches and not kept["base"].injections
    assert stack_on(kept["base"]) is None and stack_on(kept["model"]) is not None


def test_a_run_goes_on_as_if_it_had_never_stopped(graph):
    straight = train(graph, run_name="node straight", length=5, if_run_exists="continue")
    first = train(graph, run_name="node in parts", length=2, if_run_exists="continue")
    second = train(graph, run_name="node in parts", length=5, if_run_exists="continue")
    assert not same(first["lora"], second["lora"]) and same(second["lora"], straight["lora"])
    assert second["loss_map"] == straight["loss_map"]
    assert "went on with run 'node in parts' after step 2" in second["report"]
    assert "length 2 → 5" in second["report"], "what has changed is told"
    again = train(graph, run_name="node in parts", length=4, if_run_exists="continue")
    assert "nothing was trained" in again["report"] and same(again["lora"], second["lora"])


# ---------------------------------------------------------------- sockets


def test_settings_reach_the_run(graph):
    more = {
        "7": node("LoomAdapterSettings", layers="full", conv_rank=1, conv_alpha=0.5),
        "8": node(
            "LoomOptimizerSettings",
            **{"optimizer": "AdamW", "weight_decay": 0.0, "beta1": 0.8, "beta2": 0.99, "epsilon": 1e-7},
            **{"schedule": "cosine", "warmup_steps": 1, "max_grad_norm": 0.5, "gradient_accumulation": 2},
        ),
        "9": node("LoomObjectiveSettings", timesteps="logit-normal", logit_mean=0.5, logit_std=0.7),
        "10": node("LoomRunSettings", gradient_checkpointing=True, on_cancel="stop and keep", save_every=2),
    }
    sockets = {"adapter": ["7", 0], "optimizer": ["8", 0], "objective": ["9", 0], "run": ["10", 0]}
    kept = train(graph, run_name="settings", more=more, **sockets)
    recipe = json.loads(kept["lora"].metadata["loom.recipe"])
    assert recipe["adapter"].items() >= {"layers": "full", "conv_rank": 1, "conv_alpha": 0.5}.items()
    assert (recipe["optimizer"]["schedule"], recipe["optimizer"]["gradient_accumulation"]) == ("cosine", 2)
    assert recipe["objective"].items() >= {"timesteps": "logit-normal", "logit_mean": 0.5, "logit_std": 0.7}.items()
    run = {"gradient_checkpointing": True, "on_cancel": "stop and keep", "save_every": 2}
    assert recipe["run"].items() >= run.items()
    shapes = {tuple(tensor.shape[2:]): len(tensor) for key, tensor in kept["lora"].items() if "lora_down" in key}
    assert shapes[(3, 3)] == 1 and shapes[()] == 2
    assert kept["lora"].metadata["ss_network_args"] == '{"conv_dim": "1", "conv_alpha": "0.5"}'
    assert "84 layers" not in kept["report"] and "(full)" in kept["report"]


def test_conv_rank_without_convolutions_is_refused(graph):
    more = {"7": node("LoomAdapterSettings", layers="attention", conv_rank=4, conv_alpha=1.0)}
    why = "conv_rank is 4, expected 0: it has no effect here, the layers of 'attention' hold no k×k convolution"
    with pytest.raises(GraphError, match=why):
        train(graph, run_name="no convolutions", more=more, adapter=["7", 0], length=1)


@pytest.mark.parametrize("unit, length, steps", [("epochs", 2, 4), ("presentations per image", 3, 6)])
def test_length_counts_units(graph, unit, length, steps):
    """Four images in two buckets of two are two batches of two."""
    kept = train(graph, run_name=f"{unit}", unit=unit, length=length)
    assert len(kept["loss_map"]["loss"]) == steps


def test_options_are_also_told_in_the_words_of_other_trainers(graph):
    options = {"loss": "Huber", "huber_c": 0.2, "min_snr_gamma": 5.0, "noise_offset": 0.05}
    settings = dict(timesteps="uniform", logit_mean=0.0, logit_std=1.0, **options)
    more = {"7": node("LoomObjectiveSettings", **settings)}
    metadata = train(graph, run_name="words", length=1, more=more, objective=["7", 0])["lora"].metadata
    told = {name: metadata[f"ss_{name}"] for name in ("loss_type", "huber_c", "huber_schedule", "min_snr_gamma")}
    assert told == {"loss_type": "huber", "huber_c": "0.2", "huber_schedule": "snr", "min_snr_gamma": "5.0"}
    assert metadata["ss_noise_offset"] == "0.05" and "ss_zero_terminal_snr" not in metadata


def test_previews_are_kept_in_the_run_folder(graph):
    train(graph, run_name="pictures", **with_preview())
    sheets = sorted((run_folder("pictures") / "previews").iterdir())
    assert [sheet.name for sheet in sheets] == ["step-000002.png", "step-000003.png"]
    sheet = 2 * 64 + 2  # two seeds, two prompts; what the base gives stands beside
    assert Image.open(sheets[0]).size == (2 * sheet + 6, sheet + 14)
    assert Image.open(sheets[0]).tobytes() != Image.open(sheets[1]).tobytes()


def test_a_lora_can_be_trained_further_in_another_run(graph):
    prompt = training_prompt("sd15", "zorb", "base of two", alpha=1.0)
    second = training_prompt("sd15", "zorb", "second of two", start_from=["3", 0], learning_rate=1e-8, length=1)
    keep = {"second": node("Keep", value=["8", 0]), "told": node("Keep", value=["8", 4])}
    kept = graph.run({**prompt, "8": second["3"], **keep})
    assert "started from the given LoRA on 84 of 84 layers; its alpha 1 stays" in kept["told"]
    for key, value in kept["lora"].items():
        assert torch.allclose(value, kept["second"][key], atol=1e-6), key


def test_a_lora_without_metadata_is_taken(graph):
    """As core's own trainer makes it: the host's names, no alpha, no metadata."""
    kept = train(graph, run_name="plain one", length=1)
    target = "diffusion_model.middle_block.1.proj_in"
    plain = {f"{target}.lora_up.weight": torch.ones(64, 2, 1, 1), f"{target}.lora_down.weight": torch.ones(2, 64, 1, 1)}
    with torch.inference_mode():
        given = LoomLoRALoaderAdvanced.execute(kept["model"], FROM_SOCKET, 1.0, 1.0, lora=plain)
    model, _, words, report = given.args
    assert "1 weights of the MODEL" in report and words == ""
    assert model.patches.keys() == {f"{target}.weight"} and stack_on(model) is stack_on(kept["model"])


def test_an_early_end_changes_the_fingerprint(graph, monkeypatch):
    """A stopped run is not served from the cache when it is queued again."""
    import comfy.model_management

    from lora_loom.training.loop import Trainer

    step = Trainer.step

    def stopping(self):
        if self.step_number == 2:
            monkeypatch.setattr(Trainer, "step", step)
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        return step(self)

    monkeypatch.setattr(Trainer, "step", stopping)
    more = {"7": node("LoomRunSettings", gradient_checkpointing=False, on_cancel="stop and keep", save_every=0)}
    options = {"more": more, "run": ["7", 0], "length": 4, "if_run_exists": "continue"}
    linked = LoomLoRATrainer.fingerprint_inputs(run_name=None)
    first = train(graph, run_name="stopped", **options)
    assert "stopped by you after 2 of 4 steps; queue again to go on" in first["report"]
    assert len(first["loss_map"]["loss"]) == 2 and first["lora"].metadata["ss_steps"] == "2"
    assert LoomLoRATrainer.fingerprint_inputs(run_name=None) != linked, "also where the name is linked"
    second = train(graph, run_name="stopped", **options)
    assert "after step 2" in second["report"] and len(second["loss_map"]["loss"]) == 4
    train(graph, run_name="stopped", **options)
    assert graph.ran == set()


def test_a_changed_file_is_loaded_again(graph):
    def load():
        loader = {"model": ["1", 0], "lora_name": "again.safetensors", "strength_model": 1.0, "strength_clip": 1.0}
        prompt = {
            "1": node("TinySource", family="sd15"),
            "5": node("LoomLoRALoaderAdvanced", **loader),
            "model": node("Keep", value=["5", 0]),
        }
        graph.run(prompt)
        return "5" in graph.ran

    def save(seed):
        more = {"4": node("LoomSaveLoRA", lora=["3", 0], name="again", if_file_exists="overwrite")}
        more["file"] = node("Keep", value=["4", 0])
        train(graph, run_name=f"again {seed}", more=more, seed=seed, length=1)

    save(1)
    assert load() and not load()
    save(2)
    assert load()
