"""What files say about themselves: the metadata of a training, and what is read from anybody's."""

import json

import pytest

from lora_loom.kernels.metadata import json_object, training_metadata, trigger_words


def test_training_metadata():
    recipe = {"rank": 8, "preset": "attention"}
    made = training_metadata(
        title="fern",
        architecture="stable-diffusion-v1",
        base_model_version="sd_v1",
        rank=8,
        alpha=4.0,
        conv_rank=4,
        conv_alpha=1.0,
        resolution=(512, 768),
        recipe=recipe,
        prediction_type="epsilon",
        trigger_phrase="sks fern",
        learning_rate=1e-4,
        max_train_steps=100,
        batch_size=2,
        seed=0,
        tag_frequency={"ferns": {"fern": 3}},
        training_started_at=1_700_000_000.0,
        training_finished_at=1_700_000_060.5,
        extra={"max_grad_norm": 1.0},
    )
    assert all(isinstance(value, str) for value in made.values())
    assert (
        made.items()
        >= {
            "ss_v2": "False",
            "ss_base_model_version": "sd_v1",
            "ss_network_module": "networks.lora",
            "ss_network_dim": "8",
            "ss_network_alpha": "4.0",
            "ss_network_args": '{"conv_dim": "4", "conv_alpha": "1.0"}',
            "ss_resolution": "(512, 768)",
            "ss_seed": "0",
            "ss_max_grad_norm": "1.0",
            "ss_tag_frequency": '{"ferns": {"fern": 3}}',
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.resolution": "512x768",
            "modelspec.date": "2023-11-14T22:14:20+00:00",
            "modelspec.trigger_phrase": "sks fern",
        }.items()
    )
    assert json.loads(made["loom.recipe"]) == recipe
    assert "ss_optimizer" not in made
    assert "ss_lr_scheduler" not in made


TAGS = '{"ferns": {" fern": 9, "moss": 6, "fox": 5}, "more": {"moss": 1}}'


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"modelspec.trigger_phrase": " sks fern "}, ["sks fern"]),
        ({"ss_tag_frequency": TAGS, "ss_num_train_images": "10"}, ["fern", "moss"]),
        ({"ss_tag_frequency": TAGS}, []),
        ({"ss_tag_frequency": TAGS, "ss_num_train_images": "0"}, []),
        ({"ss_tag_frequency": TAGS, "ss_num_train_images": "ten"}, []),
        ({"ss_tag_frequency": '{"a": 3, "b": {"c": "d"}}', "ss_num_train_images": "1"}, []),
        ({"ss_tag_frequency": "[" * 100_000, "ss_num_train_images": "1"}, []),
        ({}, []),
    ],
)
def test_trigger_words(metadata, words):
    assert trigger_words(metadata) == words


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "[" * 100_000, '{"a": ' * 100_000])
def test_metadata_that_is_no_json_object(text):
    assert json_object({"x": text}, "x") == json_object({}, "x") == {}
