"""LoRA from Prompt: every example of the table on a model, in all dialects that it is for."""

from functools import cache

import pytest
import torch

from applying import relative
from full_size import full_size, text_encoders
from lora_loom.host.apply import Strengths, apply_lora
from lora_loom.host.prompt_lora import SIDES
from lora_loom.kernels.strengths.blocks import parse_blocks
from lora_loom.kernels.strengths.components import by_part
from lora_loom.kernels.strengths.dialects import TABLE, dialect_table
from lora_loom.kernels.strengths.layout import Layout
from lora_loom.kernels.strengths.schedule import Clock, fixed
from lora_loom.kernels.strengths.tags import parse_prompt
from prompting import encoded, lora_folder, lora_tensors, pair, prompted, put, run, same_text, sigmas_of

MODELS = {"": ("sd15", "sd1"), "SDXL": ("sdxl", "sdxl")}  # what a row says of its example: MODEL, CLIP
EXAMPLES = [(row, dialect) for row in TABLE for dialect in row.dialects]
IDS = [f"{dialect} {row.example}" for row, dialect in EXAMPLES]


@cache
def layout_of(name):
    return Layout.of(full_size(name))


@cache
def encoders_of(name):
    return tuple(part for part, _ in text_encoders(name).named_children() if part in ("clip_l", "clip_g"))


def read(row, dialect, model, clip):
    (tag,) = parse_prompt(row.example, dialect, encoders_of(clip)).tags
    by_part(tag.components, encoders_of(clip))
    by_part({tag.module: fixed(0.0)} if tag.module else {}, encoders_of(clip))
    return tag, parse_blocks(tag.blocks, layout_of(model))


@pytest.mark.parametrize("row, dialect", EXAMPLES, ids=IDS)
def test_at_full_size(row, dialect):
    """With the pack's own presets: nothing is refused, and nothing has places that the model lacks."""
    tag, blocks = read(row, dialect, *MODELS[row.model])
    assert not [note for note in blocks.notes if "no effect" in note or "this model has no" in note]
    if tag.blocks:
        assert {strength.constant for strength in blocks.weights.values()} - {1}
    clock = Clock([14.6 * 0.8**n for n in range(20)] + [0.0])
    for schedule in (tag.model, tag.clip, tag.steps, *tag.components.values()):
        assert schedule.constant is not None or len({schedule.at(clock, sigma) for sigma in clock.sigmas[:-1]}) > 1


def test_examples_for_another_model_say_so():
    for row in TABLE:
        if row.model:
            with pytest.raises(ValueError, match="there is no component"):
                read(row, row.dialects[0], *MODELS[""])
            assert f"`{row.example}` ({row.model})" in dialect_table()


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    """``prompted`` for a family, with LoRAs of the names that the table has."""
    with pytest.MonkeyPatch.context() as patch:
        folder = lora_folder(tmp_path_factory.mktemp("table"), patch)

        @cache
        def ready(family):
            model, clip = pair(family)
            put(folder, f"{family}/cat.safetensors", lora_tensors(model, clip))
            return model, clip

        def done(family, prompt, **options):
            model, clip = ready(family)
            return model, clip, prompted(model, clip, prompt.replace(":cat", f":{family}/cat"), **options)

        yield done


@pytest.mark.parametrize("row, dialect", EXAMPLES, ids=IDS)
def test_on_a_tiny_model(row, dialect, applied):
    """Which has fewer blocks, so that vectors of 17 and IN05 are none of its own."""
    (tag,) = parse_prompt(row.example, dialect, ("clip_l", "clip_g")).tags
    if tag.blocks and tag.blocks.count(",") == 16 or "IN05" in tag.blocks or tag.blocks == "OUTALL":
        with pytest.raises(ValueError, match="^<lora:sd15/cat>: blocks: "):
            applied("sd15", f"a cat {row.example}", dialect=dialect)
        return
    options = {"side": tag.side} if tag.side in SIDES else {}
    *_, done = applied(MODELS[row.model][0], f"a cat {row.example}", dialect=dialect, **options)
    assert done.text == "a cat" and "/cat.safetensors: " in done.report


@pytest.mark.parametrize(
    "family, tag, dialect, on_model, on_text",
    [
        ("sd15", "0.8:te=0.4", "a1111", 0.4, 0.4),
        ("sd15", "0.8:te=0", "loractl", 0, 0),
        ("sd15", "0.6:0.8:te=0.2", "a1111", 0.8, 0.2),
        ("sd15", "0.8:te=0.4", "sdnext", 0.8, 0.4),
        ("sd15", "0.8:blocks=ALL0.5", "sdnext", 0.4, 0.4),
        ("sdxl", "0.8:lbw=NONE", "a1111", 0, 0),
        ("flux", "0.8:blocks=ALL0.5", "sdnext", 0.4, 0.4),
    ],
)
def test_who_gets_how_much(family, tag, dialect, on_model, on_text, applied):
    model, clip, done = applied(family, f"a cat<lora:cat:{tag}>", dialect=dialect)
    strengths = Strengths(fixed(float(on_model)), fixed(float(on_text)))
    with torch.inference_mode():
        hand, hand_clip, _ = apply_lora(model, clip, lora_tensors(model, clip), strengths)
    text, negative, sigmas = encoded(hand_clip, "a cat"), encoded(clip, ""), sigmas_of(model, "normal", 3)
    same_text(done.conditioning, text)
    got = run(done.model, family, done.conditioning, negative, sigmas)
    assert relative(got, run(hand, family, text, negative, sigmas)) <= 1e-5
    other = apply_lora(model, clip, lora_tensors(model, clip), Strengths(fixed(1.0), fixed(1.0)))[0]
    assert relative(got, run(other, family, text, negative, sigmas)) > 1e-4
