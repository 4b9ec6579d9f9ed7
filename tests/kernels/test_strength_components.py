"""Strengths by part: what is written, what the parts then get, and what is told."""

import pytest

from lora_loom.kernels.strengths.components import by_part, parse_components, without_effect
from lora_loom.kernels.strengths.schedule import Clock, fixed, parse

SDXL, SD3, FLUX = ["clip_l", "clip_g"], ["clip_l", "clip_g", "t5xxl"], ["clip_l", "t5xxl"]


def constants(text, encoders, vector=None):
    return {part: strength.constant for part, strength in by_part(parse_components(text), encoders, vector).items()}


@pytest.mark.parametrize(
    "text, encoders, wanted",
    [
        ("", [], {"unet": 1}),
        ("", SDXL, {"unet": 1, "clip_l": 1, "clip_g": 1}),
        ("unet=0.5", [], {"unet": 0.5}),
        ("UNet = .5", SDXL, {"unet": 0.5, "clip_l": 1, "clip_g": 1}),
        ("model=0.25", SDXL, {"unet": 0.25, "clip_l": 1, "clip_g": 1}),
        ("transformer=0.25;te=0.5", FLUX, {"unet": 0.25, "clip_l": 0.5, "t5xxl": 0.5}),
        ("dit=-1\nte2=0", FLUX, {"unet": -1, "clip_l": 1, "t5xxl": 0}),
        ("te1=0.3, te2=0.6, te3=0.9", SD3, {"unet": 1, "clip_l": 0.3, "clip_g": 0.6, "t5xxl": 0.9}),
        ("te=0.5, te3=0.9", SD3, {"unet": 1, "clip_l": 0.5, "clip_g": 0.5, "t5xxl": 0.9}),
        ("te3=0.9, te=0.5", SD3, {"unet": 1, "clip_l": 0.5, "clip_g": 0.5, "t5xxl": 0.5}),
        ("CLIP_G=0.1", SDXL, {"unet": 1, "clip_l": 1, "clip_g": 0.1}),
        ("te1=0.1, clip_l=0.2", SDXL, {"unet": 1, "clip_l": 0.2, "clip_g": 1}),
        ("unet=0.1, model=0.2", SDXL, {"unet": 0.2, "clip_l": 1, "clip_g": 1}),
        ("te=0.5, unet=0.7", [], {"unet": 0.7}),
    ],
)
def test_parts(text, encoders, wanted):
    assert constants(text, encoders) == wanted


def test_points_belong_to_the_component_before():
    parts = by_part(parse_components("unet=0.5, te1=0.3@1,0.6@6, te2=1@50%,0.5@80% linear"), SDXL)
    assert parts["unet"] == fixed(0.5)
    assert parts["clip_l"] == parse("0.3@1,0.6@6", "x")
    assert parts["clip_g"] == parse("1@50%,0.5@80% linear", "x")
    clock = Clock([10, 8, 6, 5, 4, 3, 2, 1, 0])
    assert [parts["clip_l"].at(clock, sigma) for sigma in (10, 4, 3, 1)] == [0.3, 0.3, 0.6, 0.6]
    assert parse_components("te=0@0%,1@100%", interpolation="cosine")["te"].interpolation == "cosine"


def test_vectors_multiply():
    assert constants("te=0.5", SDXL, {"te": 0.5}) == {"unet": 1, "clip_l": 0.25, "clip_g": 0.25}
    assert constants("te2=0.5", FLUX, {"clip_l": 0.2, "t5xxl": 0.4}) == {"unet": 1, "clip_l": 0.2, "t5xxl": 0.2}
    assert constants("", [], {"te": 0.5, "t5xxl": 0}) == {"unet": 1}


@pytest.mark.parametrize(
    "text, message",
    [
        ("unet", r"^components: 'unet' is no component and its strength; write unet=0\.5"),
        ("0.5@1", "is no component and its strength"),
        ("=0.5", "is no component and its strength"),
        ("a b=0.5", "is no component and its strength"),
        ("te1=much", "^components: te1: 'much' is no weight"),
        ("te1=", "^components: te1"),
        ("te1=1e3", "^components: te1: 1e3 is too much"),
        ("x" * 9000, "9000 letters, expected at most 8000"),
        (", ".join(f"te{n}=1" for n in range(60)), "60 components, expected at most 50"),
    ],
)
def test_what_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        parse_components(text)


@pytest.mark.parametrize(
    "text, encoders, message",
    [
        ("te3=1", SDXL, r"there is no component 'te3'.* there are unet, te, te1 \(clip_l\), te2 \(clip_g\)$"),
        ("te0=1", SDXL, "there is no component 'te0'"),
        ("t5xl=1", SD3, r"'t5xl', do you mean t5xxl\?"),
        ("unnet=1", SDXL, r"'unnet', do you mean unet\?"),
        ("clip_l=1", [], "there are unet; connect a CLIP"),
        ("vae=1", [], "there is no component 'vae'"),
    ],
)
def test_parts_that_are_not_there(text, encoders, message):
    for function in (by_part, without_effect):
        with pytest.raises(ValueError, match=message):
            function(parse_components(text), encoders)


def test_what_has_no_effect_is_told():
    (note,) = without_effect(parse_components("te1=0.5, unet=0.5"), [])
    assert note == "components: te1 has no effect without a CLIP; connect the CLIP, or leave it out"
    (note,) = without_effect(parse_components("te1=0.5, te=0.7"), SDXL)
    assert note.startswith("components: te1 has no effect, later ones")
    (note,) = without_effect(parse_components("te=1, te1=0.5, te2=0.7"), SDXL)
    assert note.startswith("components: te has no effect")
    assert without_effect(parse_components("te=0.7, te1=0.5, unet=2"), SDXL) == []
