"""What each preset chooses on the host's full-size models."""

import re
from collections import Counter

import pytest
import torch

from full_size import FAMILIES, full_size
from lora_loom.kernels.layers import select_targets

# name -> (attention, attention+MLP)
COUNTS = {
    "sd15": (16 * 8, 16 * (8 + 2 + 2)),
    "sd2": (16 * 8, 16 * (8 + 2 + 2)),
    "sdxl": (70 * 8, 70 * (8 + 2) + 11 * 2),
    "sd35_medium": (24 * 4 - 1 + 13 * 2, 24 * 8 - 3 + 13 * 2),  # the last context block only has qkv
    "flux": (19 * 4 + 38 * 2, 19 * 8 + 38 * 2),
    "flux2": (8 * 4 + 48 * 2, 8 * 8 + 48 * 2),
    "chroma": (19 * 4 + 38 * 2, 19 * 8 + 38 * 2),
    "hunyuan_video": (2 * 2 + 20 * 4 + 40 * 2, 2 * 4 + 20 * 8 + 40 * 2),
    "wan_14b": (40 * 8, 40 * 10),
    "qwen_image": (60 * 8, 60 * 12),
    "lumina2": (30 * 2, 30 * 5),
    "ltxv": (28 * 8, 28 * 10),
    "cosmos2": (28 * 8, 28 * 10),
    "aura": (4 * 8 + 32 * 4, 4 * 14 + 32 * 7),
}
LINEAR_AND_CONV = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    model = full_size(name)
    counts = tuple(len(select_targets(model, preset, conv=False)) for preset in ("attention", "attention+MLP"))
    assert counts == COUNTS[name]


def test_sd15_parts():
    targets = select_targets(full_size("sd15"), "attention+MLP", conv=False)
    assert Counter(target.kind for target in targets) == {"linear": 16 * 10, "conv": 16 * 2}  # 1×1 proj_in, proj_out
    assert {target.shape[2:] for target in targets} == {(), (1, 1)}
    parts = Counter(re.search(r"\.(attn1|attn2|ff|proj_in|proj_out)", target.path)[1] for target in targets)
    assert parts == {"attn1": 64, "attn2": 64, "ff": 32, "proj_in": 16, "proj_out": 16}


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_preset_is_every_attention_layer_inside_blocks(name):
    model = full_size(name)
    every = [path for path, module in model.named_modules() if isinstance(module, LINEAR_AND_CONV)]
    chosen = {target.path for target in select_targets(model, "attention", conv=True)}
    named = {path for path in every if re.search(r"(attn|attention)\d*\.", path) and "modulation" not in path}
    fused = {path for path in every if re.search(r"single_blocks\.\d+\.linear[12]$", path)}
    assert chosen == named | fused


@pytest.mark.parametrize("name", FAMILIES)
def test_presets_widen_and_full_is_everything(name):
    model = full_size(name)
    attention, both, full, convs = (
        {target.path: target for target in select_targets(model, preset, conv)}
        for preset, conv in (("attention", False), ("attention+MLP", False), ("full", False), ("full", True))
    )
    assert attention.keys() < both.keys() < full.keys() <= convs.keys()
    assert all(target.block for target in both.values())
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, LINEAR_AND_CONV) and getattr(module, "groups", 1) == 1
    }
    assert convs.keys() == {path for path in layers if path.startswith("diffusion_model.")}
    for path, target in convs.items():
        assert target.shape == tuple(layers[path].weight.shape)
    spatial = {path for path, target in convs.items() if any(size > 1 for size in target.shape[2:])}
    assert convs.keys() - full.keys() == spatial


@pytest.mark.parametrize("name", ["flux", "sd35_medium", "cosmos2", "qwen_image", "lumina2", "wan_14b", "ltxv"])
def test_modulation_is_left_to_full(name):
    for target in select_targets(full_size(name), "attention+MLP", conv=True):
        assert not re.search(r"mod(ulation)?[._\d]|adaln", target.path.removeprefix("diffusion_model."), re.IGNORECASE)
