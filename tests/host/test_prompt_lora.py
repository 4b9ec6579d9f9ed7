"""LoRA from Prompt: what tags do to MODEL, CLIP and text, equal to the loader and the host's own encoder by hand."""

import copy
from pathlib import Path

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from PIL import Image

from applying import relative
from graph import Graph, GraphError, node
from lora_loom.host.apply import Strengths, apply_lora
from lora_loom.host.clocks import Course
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.kernels.strengths.dialects import DIALECTS, dialect_table
from lora_loom.kernels.strengths.schedule import fixed, parse
from lora_loom.kernels.strengths.tags import parse_prompt
from prompting import (
    by_hand,
    encoded,
    lora_folder,
    lora_tensors,
    pair,
    prompted,
    put,
    run,
    same_text,
    sigmas_of,
    spliced,
    two_loras,
)
from snapshot import weights

TEXT = "a cat, on a chair"
EQUAL = 1e-5
DOCS = Path(__file__).parents[2] / "web/docs/LoomPromptLoRA.md"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return lora_folder(tmp_path, monkeypatch)


@pytest.fixture
def sd15(folder):
    return two_loras(folder)


# ---------------------------------------------------------------- constant strengths


@pytest.mark.parametrize("engine", ["auto", "fuse", "branch", "host"])
def test_the_node_does_what_loader_and_encoder_do(sd15, folder, engine):
    model, clip = sd15
    done = prompted(model, clip, f"{TEXT}, <lora:cat:0.7:0.4>", engine=engine)
    hand, text = by_hand(model, clip, lora_tensors(model, clip), TEXT, 0.7, 0.4)
    same_text(done.conditioning, text)
    assert done.text == TEXT and done.tags == "<lora:cat:unet=0.7:te=0.4>"
    same_text(encoded(done.clip, "else"), by_hand(model, clip, lora_tensors(model, clip), "else", 0.7, 0.4)[1])
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "normal", 4)
    wanted = run(hand, "sd15", text, negative, sigmas)
    assert relative(run(done.model, "sd15", done.conditioning, negative, sigmas), wanted) <= EQUAL
    assert done.report.startswith("<lora:cat> is cat.safetensors: ") and "weights of the MODEL at 0.7" in done.report


def test_a_picture_for_every_lora(folder):
    model, clip = two_loras(folder)
    text = "a chair <lora:cat:0.7:in=0@1,1@6> <lora:van gogh:unet=0:te=1>"
    done = prompted(model, clip, text, pictured=True)
    assert len(done.pictures) == 2 and done.report.count("strongest") == 1
    assert done.pictures[0].height > done.pictures[1].height + 100  # with the weights over the run
    plain = prompted(model, clip, text)
    assert not plain.pictures and "strongest" not in plain.report


def test_a_prompt_without_tags(sd15):
    model, clip = sd15
    done = prompted(model, clip, TEXT)
    same_text(done.conditioning, encoded(clip, TEXT))
    assert done.clip is clip and not model.get_wrappers(WrappersMP.CALC_COND_BATCH, "lora_loom")
    assert len(done.model.get_wrappers(WrappersMP.CALC_COND_BATCH, "lora_loom")) == 1
    again = prompted(done.model, clip, TEXT)
    assert len(again.model.get_wrappers(WrappersMP.CALC_COND_BATCH, "lora_loom")) == 1
    assert (done.text, done.tags, done.words, done.report) == (TEXT, "", "", "no LoRA in this prompt")


def test_what_comes_out_of_a_graph(sd15, folder, monkeypatch):
    graph = Graph()
    source = {"1": node("TinySource", family="sd15")}
    widgets = {"dialect": "sdnext", "trigger_words": 2, "seed": 0, "side": "one"}
    ask = node("LoomPromptLoRA", model=["1", 0], clip=["1", 1], prompt=f"{TEXT} <lora:cat:0.5>", **widgets)
    names = ("model", "clip", "conditioning", "text", "report", "tags", "words")
    keep = {name: node("Keep", value=["2", place]) for place, name in enumerate(names)}
    kept = graph.run({**source, "2": ask, **keep})
    assert kept["text"] == f"{TEXT}, ohwx cat, fluffy"
    assert kept["tags"] == "<lora:cat:0.5>" and kept["words"] == "ohwx cat, fluffy, big"
    assert "trigger words added: ohwx cat, fluffy" in kept["report"]
    same_text(kept["conditioning"], encoded(kept["clip"], kept["text"]))
    assert graph.run({**source, "2": ask, **keep}) == {} and "2" not in graph.ran
    model, clip = sd15
    put(folder, "cat.safetensors", lora_tensors(model, clip, seed=5, size=0.6))
    other = graph.run({**source, "2": ask, **keep})
    assert "2" in graph.ran and relative(other["conditioning"][0][0], kept["conditioning"][0][0]) > 1e-3
    ask["inputs"]["prompt"] = "<lora:dog>"
    with pytest.raises(GraphError, match="<lora:dog>: there is no LoRA 'dog'"):
        graph.run({**source, "2": ask, **keep})


def test_two_encoders_of_their_own(folder):
    model, clip = pair("sdxl")
    lora = lora_tensors(model, clip)
    put(folder, "cat.safetensors", lora)
    done = prompted(model, clip, f"{TEXT}<lora:cat:0.8:te1=0.2:te2=-0.5>")
    hand, text = by_hand(model, clip, lora, TEXT, 0.8, 1.0, {"clip_l": 0.2, "clip_g": -0.5})
    same_text(done.conditioning, text)
    by_name = prompted(model, clip, f"{TEXT}<lora:cat:0.8:clip_l=0.2:clip_g=-0.5>")
    same_text(by_name.conditioning, text)
    with pytest.raises(ValueError, match=r"<lora:cat>: components: there is no component 'te3'.*te2 \(clip_g\)"):
        prompted(model, clip, f"{TEXT}<lora:cat:0.8:te3=0.2>")


@pytest.mark.parametrize(
    "module, on_model, first, second",
    [("unet", 0.6, 0, 0), ("te", 0, 0.6, 0.6), ("te1", 0, 0.6, 0), ("clip_g", 0, 0, 0.6)],
)
def test_only_one_part(folder, module, on_model, first, second):
    model, clip = pair("sdxl")
    lora = lora_tensors(model, clip)
    put(folder, "cat.safetensors", lora)
    done = prompted(model, clip, f"{TEXT}<lora:cat:0.6:module={module}>")
    hand, text = by_hand(model, clip, lora, TEXT, on_model, 1.0, {"clip_l": first, "clip_g": second})
    same_text(done.conditioning, text)
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "normal", 3)
    wanted = run(hand, "sdxl", text, negative, sigmas)
    assert relative(run(done.model, "sdxl", done.conditioning, negative, sigmas), wanted) <= EQUAL


def test_high_and_low(sd15):
    model, clip = sd15
    prompt = f"{TEXT} <lora:cat:0.5:high> <lora:van gogh:0.5:low>"
    alone = prompted(model, clip, prompt)
    same_text(alone.conditioning, encoded(clip, TEXT))
    assert alone.report.splitlines() == [
        "<lora:cat> (high) is for one of two MODELs, and was left out; set side to high where that MODEL is",
        "<lora:van gogh> (low) is for one of two MODELs, and was left out; set side to low where that MODEL is",
    ]
    for side, name, other in (("high", "cat", "van gogh"), ("low", "van gogh", "cat")):
        done = prompted(model, clip, prompt, side=side)
        same_text(done.conditioning, prompted(model, clip, f"{TEXT} <lora:{name}:0.5>").conditioning)
        assert (
            f"<lora:{other}> ({'low' if side == 'high' else 'high'}) is not for the MODEL for {side} noise"
            in done.report
        )
        assert done.tags == "<lora:cat:0.5:high> <lora:van gogh:0.5:low>"
    with pytest.raises(ValueError, match="side: there is no 'middle'"):
        prompted(model, clip, prompt, side="middle")


@pytest.mark.parametrize(
    "tag, options, wanted",
    [
        ("0.4:0.7", {"dialect": "a1111"}, Strengths(fixed(0.7), fixed(0.4))),
        ("0.4:0.7", {"dialect": "prompt-control"}, Strengths(fixed(0.4), fixed(0.7))),
        ("1:in=0:mid=1:out=0.5", {}, Strengths(blocks="in=0,mid=1,out=0.5")),
        ("1:lbw=ATTN:lbwe=OUT:attn:0.3", {}, Strengths(blocks="ATTN,OUT/attn=0.3")),
        ("1:lbw=R,U,X,R,X,X,0,1:x=0.5", {"seed": 7}, Strengths(blocks="R,U,0.5,R,0.5,0.5,0,1", seed=7)),
        ("1:start=3:stop=6", {}, Strengths(steps=parse("0@0%,1@3,0@6", "steps"))),
        ("unet=0@1,1@4:te=1:interpolation=linear", {}, Strengths(parse("0@1,1@4", "unet", "linear"))),
    ],
)
def test_tags_are_what_the_loader_says(sd15, folder, tag, options, wanted):
    model, clip = sd15
    with torch.inference_mode():
        hand, text, _ = apply_lora(model, clip, lora_tensors(model, clip), wanted)
    done = prompted(model, clip, f"{TEXT}<lora:cat:{tag}>", **options)
    text = encoded(text, TEXT)
    same_text(done.conditioning, text)
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "karras", 7)
    got = run(done.model, "sd15", done.conditioning, negative, sigmas)
    assert relative(got, run(hand, "sd15", text, negative, sigmas)) <= EQUAL
    plain = prompted(model, clip, f"{TEXT}<lora:cat>")
    assert relative(got, run(plain.model, "sd15", plain.conditioning, negative, sigmas)) > 10 * EQUAL
    again = prompted(model, clip, TEXT + done.tags, **options | {"dialect": "sdnext"})
    assert relative(run(again.model, "sd15", again.conditioning, negative, sigmas), got) <= EQUAL


def test_files_of_pairs_go_to_their_side(sd15, folder):
    """Without high or low in the tag, as the pair node does it: by keys, metadata, name."""
    model, clip = sd15
    lora = lora_tensors(model, clip)
    for name, metadata in (
        ("walk_high_noise", {}),
        ("walk_low_noise", {}),
        ("run", {"ss_sd_model_name": "wan2.2_t2v_low_noise.safetensors"}),
    ):
        put(folder, f"{name}.safetensors", lora, metadata)
    prompt = f"{TEXT} <lora:walk_high_noise> <lora:walk_low_noise> <lora:run> <lora:cat:0.5>"
    for side, kept, gone in (
        ("high", ["walk_high_noise", "cat"], ["walk_low_noise", "run"]),
        ("low", ["walk_low_noise", "run", "cat"], ["walk_high_noise"]),
    ):
        done = prompted(model, clip, prompt, side=side)
        tags = "".join(f"<lora:{name}:{0.5 if name == 'cat' else 1}>" for name in kept)
        same_text(done.conditioning, prompted(model, clip, TEXT + tags).conditioning)
        for name in gone:
            other = "low" if side == "high" else "high"
            assert f"<lora:{name}> is {name}.safetensors, for {other} noise (" in done.report
        assert done.report.count("and was left out: this MODEL is for") == len(gone)
    forced = prompted(model, clip, f"{TEXT} <lora:run:1:high>", side="high")
    assert "it is here because the tag says high" in forced.report and "19 weights of the MODEL" in forced.report
    alone = prompted(model, clip, prompt)
    assert alone.report.count("; set side if this MODEL is one of two") == 3 and "left out" not in alone.report


def test_a_file_with_keys_for_both_sides(folder):
    model, clip = pair("sd15")
    halves = [lora_tensors(model, clip, seed=seed, on_text=False) for seed in (1, 2)]
    both = {
        f"{part}.{key}": tensor
        for part, half in zip(("high_noise", "low_noise"), halves, strict=True)
        for key, tensor in half.items()
    }
    put(folder, "both.safetensors", both)
    put(folder, "one.safetensors", {key: tensor for key, tensor in both.items() if key.startswith("high")})
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "normal", 2)
    for side, half in zip(("high", "low"), halves, strict=True):
        for tag in ("<lora:both>", f"<lora:both:1:{side}>"):
            done = prompted(model, clip, TEXT + tag, side=side)
            hand, text = by_hand(model, clip, half, TEXT, 1.0, 1.0)
            got = run(done.model, "sd15", done.conditioning, negative, sigmas)
            assert relative(got, run(hand, "sd15", text, negative, sigmas)) <= EQUAL
    assert "and was left out" in prompted(model, clip, TEXT + "<lora:one>", side="low").report
    with pytest.raises(ValueError, match="<lora:one>: low: one.safetensors is for high noise .by its keys. only"):
        prompted(model, clip, TEXT + "<lora:one:1:low>", side="low")


@pytest.mark.parametrize(
    "tag, on_model, on_text, note",
    [
        ("te=0.3:unet=1", True, False, "the weights on text encoders have no effect, the LoRA holds nothing"),
        ("te1=0.5", True, False, "the weights on text encoders have no effect"),
        ("module=te1", True, False, "module: te1 leaves nothing of it, the LoRA holds nothing for the text encoders"),
        ("unet=0.3:te=1", False, True, "unet: no effect, the LoRA holds nothing for the MODEL"),
        ("1:blocks=in=0:start=3", False, True, "blocks and steps: no effect"),
        ("module=unet", False, True, "module: unet leaves nothing of it, the LoRA holds nothing for the MODEL"),
        ("0.7", True, False, ""),
        ("0.7", False, True, ""),
        ("te=0:unet=0.7", True, False, ""),
        ("unet=0.3:te=0.4:blocks=in=0", True, True, ""),
    ],
)
def test_what_has_no_effect_is_told(folder, tag, on_model, on_text, note):
    model, clip = pair("sd15")
    put(folder, "cat.safetensors", lora_tensors(model, clip, on_model=on_model, on_text=on_text))
    report = prompted(model, clip, f"{TEXT}<lora:cat:{tag}>").report
    assert note in report and bool(note) == ("the LoRA holds nothing" in report)


def test_a_clock_without_anything_that_changes_is_told(sd15):
    course = Course("trajectory", (14.0, 3.0, 0.0))
    note = "clock: trajectory has no effect, since no weight changes over the run"
    for tag, idle in (("0.7", True), ("te=0.1@1,0.6@2", False), ("1:start=2", False), ("1:in=0@1,1@2", False)):
        assert (note in prompted(*sd15, f"{TEXT}<lora:cat:{tag}>", course=course).report) == idle
    assert note not in prompted(*sd15, f"{TEXT}<lora:cat:0.7>").report


def test_what_is_off_brings_neither_words_nor_embeddings(folder):
    model, clip = pair("sdxl")
    lora = dict(lora_tensors(model, clip))
    draws = torch.Generator().manual_seed(7)
    lora |= {f"bundle_emb.mycat.{name}": torch.randn(2, 64, generator=draws) for name in ("clip_l", "clip_g")}
    put(folder, "cat.safetensors", lora, {"modelspec.trigger_phrase": "ohwx"})
    for tag, words, known in (
        ("0.5", "ohwx", True),
        ("0", "", False),
        ("unet=0:te=0", "", False),
        ("1:te=0:te1=0:start=2", "ohwx", False),
        ("module=unet", "ohwx", False),
        ("0.5:te1=0", "ohwx", True),
        ("te=0@1,1@2:unet=0", "ohwx", True),
    ):
        done = prompted(model, clip, f"a mycat<lora:cat:{tag}>", trigger_words=-1)
        assert done.words == words and done.text == ", ".join(filter(None, ("a mycat", words)))
        plain = encoded(clip, done.text)
        for entry, factor in zip(done.conditioning, (0, 1) if "@" in tag else (known,), strict=True):
            assert (relative(entry[0], plain[0][0]) > 1e-3) == bool(factor)


# ---------------------------------------------------------------- weights over the run


@pytest.mark.parametrize("scheduler", ["normal", "karras"])
def test_everything_changes_at_once(sd15, scheduler):
    """``0.1@1,0.6@6`` is for the MODEL and for the text."""
    model, clip = sd15
    lora = lora_tensors(model, clip)
    done = prompted(model, clip, f"{TEXT}<lora:cat:0.1@1,0.6@6>")
    negative, sigmas = encoded(clip, "blurry"), sigmas_of(model, scheduler, 12)
    parts = [
        (steps, *by_hand(model, clip, lora, TEXT, weight, weight), negative) for steps, weight in ((5, 0.1), (7, 0.6))
    ]
    got = run(done.model, "sd15", done.conditioning, negative, sigmas)
    assert relative(got, spliced("sd15", parts, sigmas)) <= EQUAL


@pytest.mark.parametrize("family, names", [("sdxl", ("clip_l", "clip_g")), ("flux", ("clip_l", "t5xxl"))])
def test_each_encoder_by_its_own_schedule(folder, family, names):
    model, clip = pair(family)
    lora = lora_tensors(model, clip)
    put(folder, "cat.safetensors", lora)
    done = prompted(model, clip, f"{TEXT}<lora:cat:0.8:te1=0.1@1,0.9@3:te2=0.5@1,-0.4@5>")
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "normal", 7)
    parts = []
    for steps, *pair_of in ((2, 0.1, 0.5), (2, 0.9, 0.5), (3, 0.9, -0.4)):
        hand, text = by_hand(model, clip, lora, TEXT, 0.8, 1.0, dict(zip(names, pair_of, strict=True)))
        parts.append((steps, hand, text, negative))
    got = run(done.model, family, done.conditioning, negative, sigmas)
    assert relative(got, spliced(family, parts, sigmas)) <= EQUAL
    assert len(done.conditioning) == 3


def test_two_loras_are_encoded_once_for_what_they_are_together(sd15):
    model, clip = sd15
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0:te=0.1@1,0.6@4><lora:gogh:unet=0:te=0.3@1,0.5@4,0.2@6>")
    assert len(done.conditioning) == 3 and "the prompt was encoded 3 times" in done.report
    two = [lora_tensors(model, clip), lora_tensors(model, clip, seed=2)]
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "karras", 8)
    parts = []
    for steps, *on_text in ((3, 0.1, 0.3), (2, 0.6, 0.5), (3, 0.6, 0.2)):
        both = clip
        with torch.inference_mode():
            for lora, weight in zip(two, on_text, strict=True):
                _, both, _ = apply_lora(model, both, lora, Strengths.of(0.0, weight))
        parts.append((steps, model, encoded(both, TEXT), negative))
    got = run(done.model, "sd15", done.conditioning, negative, sigmas)
    assert relative(got, spliced("sd15", parts, sigmas)) <= EQUAL


def test_the_negative_prompt_has_a_node_of_its_own(sd15):
    """Its CONDITIONING follows the steps as well, on the MODEL of the first."""
    model, clip = sd15
    lora, tag = lora_tensors(model, clip), "<lora:cat:unet=0.8:te=0.1@1,0.6@3>"
    one, two = (prompted(model, clip, text + tag) for text in (TEXT, "blurry"))
    sigmas = sigmas_of(model, "karras", 6)
    parts = []
    for steps, weight in ((2, 0.1), (4, 0.6)):
        hand, text = by_hand(model, clip, lora, TEXT, 0.8, weight)
        parts.append((steps, hand, text, by_hand(model, clip, lora, "blurry", 0.8, weight)[1]))
    got = run(one.model, "sd15", one.conditioning, two.conditioning, sigmas)
    assert relative(got, spliced("sd15", parts, sigmas)) <= EQUAL


def test_nothing_of_one_encoding_is_left_in_another(sd15):
    model, clip = sd15
    lora, before, base = lora_tensors(model, clip), weights(clip.patcher), encoded(clip, TEXT)
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0.8:te=0.1@1,0.6@3,-0.7@4>")
    wanted = [by_hand(model, clip, lora, TEXT, 0.8, weight)[1][0] for weight in (0.1, 0.6, -0.7)]
    for entry, (context, _) in zip(done.conditioning, wanted, strict=True):
        assert relative(entry[0], context) <= 1e-6
    assert torch.equal(encoded(clip, TEXT)[0][0], base[0][0])
    assert relative(encoded(done.clip, TEXT)[0][0], wanted[0][0]) <= 1e-6  # the weights of the beginning
    assert torch.equal(encoded(clip, TEXT)[0][0], base[0][0])
    comfy.model_management.unload_all_models()
    assert weights(clip.patcher) == before


def test_clip_skip_and_bundled_embeddings_act_in_every_encoding(folder):
    model, clip = pair("sdxl")
    skipped = clip.clone()
    skipped.clip_layer(-3)
    lora = dict(lora_tensors(model, clip))
    draws = torch.Generator().manual_seed(7)
    lora |= {f"bundle_emb.mycat.{name}": torch.randn(2, 64, generator=draws) for name in ("clip_l", "clip_g")}
    put(folder, "cat.safetensors", lora)
    done = prompted(model, skipped, "a mycat<lora:cat:unet=0.8:te=0.1@1,0.6@3>")
    assert "the CLIP now knows mycat" in done.report
    for entry, weight in zip(done.conditioning, (0.1, 0.6), strict=True):
        wanted = by_hand(model, skipped, lora, "a mycat", 0.8, weight)[1][0][0]
        assert relative(entry[0], wanted) <= 1e-6
        assert relative(entry[0], by_hand(model, clip, lora, "a mycat", 0.8, weight)[1][0][0]) > 1e-3
        assert relative(entry[0], encoded(skipped, "a mycat")[0][0]) > 1e-3


def test_the_host_s_own_loader_takes_them_too(sd15):
    model, clip = sd15
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0.8:te=0.1@1,0.6@3>", engine="host")
    ours = prompted(model, clip, f"{TEXT}<lora:cat:unet=0.8:te=0.1@1,0.6@3>", engine="fuse")
    for entry, other in zip(done.conditioning, ours.conditioning, strict=True):
        assert relative(entry[0], other[0]) <= EQUAL
    with pytest.raises(ValueError, match="<lora:cat>: engine: host knows one strength"):
        prompted(model, clip, f"{TEXT}<lora:cat:in=0.2>", engine="host")


def test_weights_on_text_without_effect_are_told(folder):
    model, clip = pair("sd15")
    put(folder, "cat.safetensors", lora_tensors(model, clip, on_text=False))
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0.8:te=0.1@1,0.6@3>")
    assert "weights on text encoders have no effect" in done.report
    same_text(done.conditioning, encoded(clip, TEXT))


def test_the_same_weights_are_encoded_once(sd15):
    model, clip = sd15
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0:te=0.5@1,0.25@3><lora:cat:unet=0:te=0@1,0.25@3>")
    assert len(done.conditioning) == 2
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0:te1=0:te=0.5@1,0.25@3>")  # there is te1 only
    assert len(done.conditioning) == 1


def test_what_was_encoded_can_be_copied(sd15):
    model, clip = sd15
    done = prompted(model, clip, f"{TEXT}<lora:cat:unet=0.8:te=0.1@1,0.6@3>")
    negative, sigmas = encoded(clip, ""), sigmas_of(model, "karras", 5)
    wanted = run(done.model, "sd15", done.conditioning, negative, sigmas)
    copied = copy.deepcopy(done.conditioning)
    assert torch.equal(run(done.model.clone(), "sd15", copied, negative, sigmas), wanted)


def test_clocks_that_nobody_knows(sd15):
    model, clip = sd15
    for tag in ("te=0.1@1,0.6@6", "unet=0.1@1,0.6@6:te=1", "1:start=3", "1:blocks=in=0@1,1@6"):
        with pytest.raises(ValueError, match="clock: .*steps of the whole trajectory.*connect its sigmas"):
            prompted(model, clip, f"{TEXT}<lora:cat:{tag}>", course=Course("trajectory"))
    with pytest.raises(ValueError, match="sigmas: they count for the clock 'trajectory'"):
        Course("run", (14.0, 0.0))
    with pytest.raises(ValueError, match="te: the prompt would have to be encoded more than 64 times"):
        prompted(model, clip, f"{TEXT}<lora:cat:te=0@1,1@90:interpolation=linear>")


# ---------------------------------------------------------------- page and server


def test_the_page_has_the_table_and_its_examples_are_read(sd15):
    page = DOCS.read_text(encoding="utf-8")
    assert dialect_table() in page
    for dialect in DIALECTS:
        assert f"`{dialect}`" in page
    examples = [line for line in page.split("```")[1::2] if "<lora:" in line]
    assert examples
    for example in examples:
        assert parse_prompt(example).tags


def test_on_the_server(server):
    """Spliced by hand with the host's own nodes: the same picture, to a level of grey."""
    draws = torch.Generator().manual_seed(1)
    layers = {
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (128, 32),
        "lora_te_text_model_encoder_layers_1_self_attn_q_proj": (32, 32),
        "diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_q": (96, 96),
    }
    tensors = {}
    for name, (rows, columns) in layers.items():
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows, 4, generator=draws)
        tensors[f"{name}.lora_down.weight"] = torch.randn(4, columns, generator=draws)
    save_tensors(tensors, server.base / "models/loras/loom prompt test.safetensors")

    def ask(number, tag):
        widgets = {"dialect": "sdnext", "trigger_words": 0, "seed": 0, "side": "one"}
        prompt = f"a red circle on a white background <lora:loom_prompt_test:{tag}>"
        return {number: node("LoomPromptLoRA", model=["1", 0], clip=["1", 1], prompt=prompt, **widgets)}

    def sampler(number, source, latent, **steps):
        given = {
            "add_noise": "disable",
            "return_with_leftover_noise": "disable",
            "noise_seed": 3,
            "steps": 9,
            "cfg": 3.0,
        }
        given |= {"sampler_name": "euler", "scheduler": "karras", "start_at_step": 0, "end_at_step": 10000} | steps
        links = {"model": [source, 0], "positive": [source, 2], "negative": ["2", 0], "latent_image": [latent, 0]}
        return {number: node("KSamplerAdvanced", **given, **links)}

    prompt = {
        "1": node("CheckpointLoaderSimple", ckpt_name="loom-demo-base.safetensors"),
        "2": node("CLIPTextEncode", text="", clip=["1", 1]),
        "3": node("EmptyChromaRadianceLatentImage", width=32, height=32, batch_size=1),
        **ask("4", "0.8:te=0.1@1,2@4"),
        **sampler("5", "4", "3", add_noise="enable"),
        **ask("6", "unet=0.8:te=0.1"),
        **ask("7", "unet=0.8:te=2"),
        **sampler("8", "6", "3", add_noise="enable", return_with_leftover_noise="enable", end_at_step=3),
        **sampler("9", "7", "8", start_at_step=3),
        **sampler("10", "6", "3", add_noise="enable"),
    }
    for number, latent in (("11", "5"), ("12", "9"), ("13", "10")):
        prompt[number] = node("VAEDecode", samples=[latent, 0], vae=["1", 2])
        prompt[f"{number}0"] = node("SaveImage", images=[number, 0], filename_prefix=f"prompt-{number}")
    outputs = server.run(prompt)
    pictures = {}
    for number in ("11", "12", "13"):
        [path] = server.files({number: outputs[f"{number}0"]})
        pictures[number] = torch.tensor(list(Image.open(path).convert("RGB").tobytes())).float()
    assert (pictures["11"] - pictures["12"]).abs().max() <= 1
    assert (pictures["11"] - pictures["13"]).abs().max() > 3
