"""Every option of the preview settings changes the pictures that a run keeps, or is refused by name; and what is kept
are the pictures that the host's own nodes give.

``CASES`` has an entry for each option: what it is set to, and what must then be otherwise than without it.

* files: which previews there are
* size: how large a sheet is
* both: the picture of the base and the one with the LoRA, in a sheet of the same size
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import nodes
from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.previews import Previews, PreviewSettings
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.nodes.settings import LoomPreviewSettings
from lora_loom.training.options import OptionError
from lora_loom.training.settings import Plan, RunSettings
from training import opened

SMALL = {"prompts": "zorb", "negative": "", "every": 100, "sampler": "euler", "scheduler": "normal", "steps": 3}
SMALL |= {"cfg": 3.0, "width": 64, "height": 48, "seeds": "0"}
FILES, SIZE, BOTH = "files", "size", "both"
CASES = {
    "prompts": [("zorb, number 3", BOTH), ("zorb\nnumber", SIZE)],
    "negative": [("number", BOTH)],
    "every": [(1, FILES)],
    "sampler": [("dpmpp_2m", BOTH), ("euler_ancestral", BOTH)],
    "scheduler": [("karras", BOTH)],
    "steps": [(4, BOTH)],
    "cfg": [(1.5, BOTH)],
    "width": [(72, SIZE)],
    "height": [(64, SIZE)],
    "seeds": [("1", BOTH), ("0, 1", SIZE)],
}
REFUSED = [
    ("sampler", "crayon", "sampler is 'crayon', expected one of .*euler"),
    ("scheduler", "later", "scheduler is 'later', expected one of .*karras"),
    ("seeds", "one", "seeds is 'one', expected whole numbers"),
    ("seeds", " , ", "seeds is ' , ', expected at least one"),
    ("seeds", "-1", "seeds is '-1', expected at least one number from 0"),
    ("seeds", str(2**64), "expected at least one number from 0"),
    ("every", 0, "every is 0, expected 1 or more"),
    ("steps", 0, "steps is 0, expected 1 or more"),
    ("cfg", -1.0, "cfg is -1.0, expected 0 or more"),
    ("cfg", float("nan"), "cfg is nan, expected 0 or more"),
    ("width", 8, "width is 8, expected 16 or more"),
    ("height", 8, "height is 8, expected 16 or more"),
    ("width", 68, "width is 68, expected a multiple of 8, .* such as 72$"),
    ("height", 63, "height is 63, expected a multiple of 8, .* such as 64$"),
]
STEPS, LABEL, GAP = 2, 14, 6
NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        return tiny_model("sd15"), clip_for("sd15"), vae_for("sd15")


@pytest.fixture(scope="module")
def previewed(parts, tmp_path_factory):
    """options → (previews kept, name → sheet; the LoRA) of a run of two steps; made once."""
    dataset = opened(images(tmp_path_factory.mktemp("data") / "zorb", count=2), 64, 16)
    plan = Plan(length=STEPS, rank=2, alpha=2.0, learning_rate=0.05, seed=5, run=RunSettings(smoke_test=False))

    @functools.cache
    def run(**options):
        [settings] = LoomPreviewSettings.execute(**{**SMALL, **options}).result
        name = f"preview option {next(NUMBERS)}"
        with torch.inference_mode():
            result = train(Request(*parts, dataset, plan, name, previews=Previews(settings, *parts)))
        folder = Path(folder_paths.get_output_directory()) / "lora_loom" / name / "previews"
        return {path.name: Image.open(path).convert("RGB") for path in sorted(folder.iterdir())}, result.lora

    return run


def halves(sheet):
    """(what the base gave, what it gave with the LoRA)"""
    width, height = (sheet.width - GAP) // 2, sheet.height
    return sheet.crop((0, LABEL, width, height)), sheet.crop((width + GAP, LABEL, sheet.width, height))


def test_every_option_has_a_case():
    wanted = {field.name for field in dataclasses.fields(PreviewSettings) if field.init}
    assert CASES.keys() == SMALL.keys() == wanted
    assert {widget.id for widget in LoomPreviewSettings.define_schema().inputs} == wanted


@pytest.mark.parametrize("name, value, effect", [(name, *case) for name in CASES for case in CASES[name]])
def test_an_option_changes_the_pictures(name, value, effect, previewed):
    before, after = previewed()[0], previewed(**{name: value})[0]
    if effect == FILES:
        assert list(before) == ["step-000002.png"] and list(after) == ["step-000001.png", "step-000002.png"]
        assert halves(after["step-000001.png"])[1].tobytes() != halves(after["step-000002.png"])[1].tobytes()
        return
    assert before.keys() == after.keys()
    one, other = before["step-000002.png"], after["step-000002.png"]
    assert (one.size != other.size) == (effect == SIZE)
    if effect == BOTH:
        changed = [a.tobytes() != b.tobytes() for a, b in zip(halves(one), halves(other), strict=True)]
        assert changed == [True, True], f"{name} has no effect on the base's picture, or on that with the LoRA"


@pytest.mark.parametrize("name, value, why", REFUSED)
def test_what_cannot_be_sampled_is_refused(name, value, why, parts):
    with pytest.raises(OptionError, match=why):
        Previews(PreviewSettings(**{**SMALL, name: value}), *parts)


# -- the pictures are the host's


@torch.inference_mode()
def by_the_host(model, clip, vae, prompt, seed):
    """What the host's own nodes give: CLIP Text Encode, Empty Latent Image, KSampler, VAE Decode."""
    [positive], [negative] = (nodes.CLIPTextEncode().encode(clip, text) for text in (prompt, SMALL["negative"]))
    [latent] = nodes.EmptyLatentImage().generate(SMALL["width"], SMALL["height"])
    how = (seed, SMALL["steps"], SMALL["cfg"], SMALL["sampler"], SMALL["scheduler"])
    [samples] = nodes.KSampler().sample(model, *how, positive, negative, latent)
    [pixels] = nodes.VAEDecode().decode(vae, samples)
    return Image.fromarray((pixels[0].clamp(0, 1) * 255).round().byte().numpy())


def test_beside_each_picture_stands_what_the_base_alone_gives(parts, previewed):
    prompts, seeds = ("zorb", "number"), (3, 8)
    sheets, lora = previewed(prompts="\n".join(prompts), seeds=", ".join(map(str, seeds)), every=1)
    model, clip, vae = parts
    with torch.inference_mode():
        trained, text = nodes.LoraLoader().load_lora(model, clip, _saved(lora), 1.0, 1.0)
    width, height = SMALL["width"] + 2, SMALL["height"] + 2
    for name, sheet in sheets.items():
        base, after = halves(sheet)
        for (y, prompt), (x, seed) in itertools.product(enumerate(prompts), enumerate(seeds)):
            place = (x * width, y * height, x * width + SMALL["width"], y * height + SMALL["height"])
            alone = by_the_host(model, clip, vae, prompt, seed)
            assert base.crop(place).tobytes() == alone.tobytes(), (name, prompt, seed)
            assert after.crop(place).tobytes() != alone.tobytes(), (name, prompt, seed)
            if name == f"step-{STEPS:06d}.png":
                with_it = by_the_host(trained, text, vae, prompt, seed)
                # the host adds its products up in another order: at most one level of a pixel
                levels = np.abs(np.asarray(after.crop(place), int) - np.asarray(with_it, int))
                assert levels.max() <= 1, (prompt, seed)


def _saved(lora):
    """The name of the LoRA's file."""
    path = Path(folder_paths.get_folder_paths("loras")[0]) / "preview options.safetensors"
    save_file(dict(lora), path)
    return path.name
