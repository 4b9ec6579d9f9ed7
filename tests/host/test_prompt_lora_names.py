"""LoRA from Prompt: which LoRAs names mean, their trigger words, and when something has changed."""

import json
import math
import os
import random
from pathlib import Path

import folder_paths
import pytest
from comfy.sd1_clip import escape_important
from comfy.sd1_clip import token_weights as weights_in

from lora_loom.host import lora_cache
from lora_loom.host.prompt_states import prompt_state
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.kernels.strengths.dialects import DIALECTS
from lora_loom.kernels.strengths.tags import names_in, parse_prompt
from lora_loom.nodes.prompting import LoomPromptLoRA
from prompting import encoded, lora_folder, lora_tensors, pair, prompted, put, same_text, two_loras

TEXT = "a cat, on a chair"


def token_weights(text):
    """As the host reads brackets."""
    return weights_in(escape_important(text), 1.0)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return lora_folder(tmp_path, monkeypatch)


@pytest.fixture
def sd15(folder):
    return two_loras(folder)


# ---------------------------------------------------------------- trigger words


@pytest.mark.parametrize(
    "prompt, count, wanted",
    [
        ("a dog", 0, "a dog"),
        ("a dog", 1, "a dog, ohwx cat"),
        ("a dog,", -1, "a dog, ohwx cat, fluffy, big"),
        ("", -1, "ohwx cat, fluffy, big"),
        ("a _tags_ dog", 2, "a ohwx cat, fluffy dog"),
        ("_tags_, a dog", 0, "ohwx cat, fluffy, big, a dog"),
        ("a FLUFFY dog", -1, "a FLUFFY dog, ohwx cat, big"),
        ("my_tags_are", 0, "my_tags_are"),
        ("a bigger dog", 100, "a bigger dog, ohwx cat, fluffy, big"),
    ],
)
def test_trigger_words(sd15, prompt, count, wanted):
    model, clip = sd15
    done = prompted(model, clip, f"{prompt}<lora:cat:0.5>", trigger_words=count)
    assert done.text == wanted and done.words == "ohwx cat, fluffy, big"
    same_text(done.conditioning, encoded(done.clip, wanted))


def test_trigger_words_of_several_and_of_none(sd15, folder):
    model, clip = sd15
    (folder / "style/Van_Gogh-v2.civitai.info").write_text(json.dumps({"trainedWords": ["(oil:1.2)", "fluffy"]}))
    done = prompted(model, clip, "a _tags_ b<lora:cat:0.5><lora:gogh:0.5>", trigger_words=2)
    assert done.text == "a ohwx cat, fluffy, (oil:1.2) b"
    (folder / "style/Van_Gogh-v2.civitai.info").unlink()
    done = prompted(model, clip, "a, _tags_, b<lora:gogh:0.5>", trigger_words=2)
    assert done.text == "a, b" and "trigger words: none added, the LoRAs have none" in done.report
    assert prompted(model, clip, "a, _tags_").text == "a,"


@pytest.mark.parametrize(
    "word, wanted",
    [
        ("(((cat", r"\(\(\(cat"),
        ("cat) (dog", r"cat\) \(dog"),
        (r"cat \(animal\)", r"cat \(animal\)"),
        (r"cat \(animal)", r"cat \(animal\)"),
        ("(cat:1.2)", "(cat:1.2)"),
        ("cat\\", "cat"),
    ],
)
def test_trigger_words_hold_nothing_else_together(sd15, folder, word, wanted):
    """Brackets that do not close stand for themselves, so what is around them has the weight that was written."""
    model, clip = sd15
    (folder / "style/Van_Gogh-v2.civitai.info").write_text(json.dumps({"trainedWords": [word]}))
    done = prompted(model, clip, "photo (of _tags_:1.3) here<lora:gogh:0.5>")
    assert done.text == f"photo (of {wanted}:1.3) here"
    weights = {weight for _, weight in token_weights(wanted)} - {1.0}
    inside = [weight for text, weight in token_weights(done.text) if "of" in text or "here" in text]
    assert inside == [1.3, 1.0] and weights <= {1.2}


# ---------------------------------------------------------------- names


def test_names_of_files_and_runs(sd15, folder, tmp_path, monkeypatch):
    model, clip = sd15
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    for name, seed in (("zorb", 3), ("zorb-best", 4), ("cat", 5)):
        kept = tmp_path / "output/lora_loom" / name.removesuffix("-best") / f"{name}.safetensors"
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(lora_tensors(model, clip, seed=seed), kept)
    for tag, source in (
        ("cat", "cat.safetensors"),
        ("van gogh v2", "style/Van_Gogh-v2.safetensors"),
        ("style/Van_Gogh-v2", "style/Van_Gogh-v2.safetensors"),
        ("gogh", "style/Van_Gogh-v2.safetensors"),
        ("run: zorb", "run: zorb"),
        ("run: zorb (best)", "run: zorb (best)"),
        ("run: cat", "run: cat"),
    ):
        done = prompted(model, clip, f"{TEXT}<lora:{tag}:0.5>")
        assert done.report.startswith(f"<lora:{tag}> is {source}: ") and done.tags == f"<lora:{tag}:0.5>"
    with pytest.raises(ValueError, match=r"<lora:zorb>: 'zorb' may be any of 2 LoRAs: run: zorb, run: zorb \(best\)"):
        prompted(model, clip, "<lora:zorb:0.5>")
    put(folder, "run.safetensors", lora_tensors(model, clip))
    assert prompted(model, clip, "<lora:run:0.5:low>", side="low").report.startswith("<lora:run> is run.safetensors")


def test_a_run_s_name_is_one_name():
    for dialect in DIALECTS:
        prompt = parse_prompt(
            "<lora:run: cat (best):0.5><lora:Run:zorb:te=0.2:high><lora:run:0.7><lora:run:low>", dialect
        )
        assert [tag.name for tag in prompt.tags] == ["run: cat (best)", "run: zorb", "run", "run"]
    text = "<lora:run: cat:1><lyco: run : cat :nonsense><lora:a b:><lora:><loractl:x/y:1><lora:unfinished"
    assert names_in(text) == ["run: cat", "a b", "x/y", "unfinished"]


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("<lora:dog:1>", r"<lora:dog>: there is no LoRA 'dog' in the loras folders"),
        ("<lora:cat:1:color=2>", r"<lora:cat…>: unknown argument 'color'.*known:"),
        ("<lora:cat:1", "the tag does not end"),
        ("<lora:../../etc/passwd:1>", "there is no LoRA"),
        ("<lora:cat:te=0.1@1,0.6@6:module=te9>", "module: there is no component 'te9'"),
        ("<lora:cat:1:blocks=nowhere=0>", "<lora:cat>: blocks: .*nowhere"),
    ],
)
def test_errors_name_the_tag_and_the_cure(sd15, prompt, message):
    with pytest.raises(ValueError, match=message):
        prompted(*sd15, prompt)
    for option, value in (("engine", "fast"), ("dialect", "klingon")):
        with pytest.raises(
            ValueError, match=f"{option}.*{value}.*expected|{option}: there is no '{value}'; choose one"
        ):
            prompted(*sd15, "<lora:cat>", **{option: value})


def test_a_lora_for_another_model(folder):
    model, clip = pair("sd15")
    other, its_clip = pair("flux")
    put(folder, "cat.safetensors", lora_tensors(other, its_clip, on_text=False))
    with pytest.raises(ValueError, match="<lora:cat>: none of the .* keys of this LoRA fits"):
        prompted(model, clip, "<lora:cat>")


# ---------------------------------------------------------------- has anything changed?


def test_changes_are_noticed(sd15, folder):
    model, clip = sd15
    state = LoomPromptLoRA.fingerprint_inputs
    prompt = f"{TEXT}<lora:cat:0.5:nonsense=1:qwen3_4b=1>"
    seen = [state(prompt=prompt)]
    assert state(prompt=prompt) == seen[0] and state(prompt="no tags") == ""
    put(folder, "cat.safetensors", lora_tensors(model, clip, seed=4))
    os.utime(folder / "cat.safetensors", (1, 1))
    seen.append(state(prompt=prompt))
    (folder / "cat.civitai.info").write_text("{}")
    seen.append(state(prompt=prompt))
    put(folder, "dog.safetensors", lora_tensors(model, clip, seed=4))
    assert state(prompt=prompt) == seen[-1]
    (folder / "cat.safetensors").unlink()
    seen.append(state(prompt=prompt))
    presets = Path(folder_paths.get_user_directory()) / "lora_loom/block_presets.txt"
    presets.parent.mkdir(parents=True, exist_ok=True)
    for text in ("MINE: in=0.5", "broken"):
        presets.write_text(text)
        seen.append(state(prompt=prompt))
    presets.unlink()
    assert len(set(seen)) == len(seen)
    assert math.isnan(state(prompt=prompt, force_reload=True))


def test_no_text_makes_the_fingerprint_raise(sd15):
    draws = random.Random(1)
    pieces = ["<lora:", "cat", ":", "=", ">", "<", "run: ", "\0", "../", "\ud800", "te=", "0.5", "@", "é", " ", "lyco"]
    for _ in range(300):
        prompt_state("".join(draws.choices(pieces, k=draws.randrange(12))))
    for odd in (5, ["1", 0], b"x", "<lora:" * 50_000, "<lora:cat>" * 500, "<lora:" + "a" * 1_000_000):
        prompt_state(odd)


def test_files_are_read_anew_when_asked(sd15, folder, monkeypatch):
    model, clip = sd15
    read = []
    real = lora_cache.load_tensors
    monkeypatch.setattr(lora_cache, "load_tensors", lambda path: read.append(path) or real(path))
    os.utime(folder / "cat.safetensors", (1_600_000_000, 1_600_000_000))
    for force, wanted in ((False, 1), (False, 1), (True, 2)):
        prompted(model, clip, f"{TEXT}<lora:cat:0.5:te=0.1@1,0.6@3>", force_reload=force)
        assert len(read) == wanted
