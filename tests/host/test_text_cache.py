"""Encoded captions from disk: never other ones than the CLIP would give now."""

import dataclasses
import os

import comfy.model_management
import folder_paths
import pytest
import torch

import tiny
from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.apply import Strengths, apply_lora
from lora_loom.host.contents import content_of_model, open_cache
from lora_loom.host.examples import HostExamples
from lora_loom.host.fusing import FusedPatch
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.host.texts import TextCache, encode_captions
from lora_loom.training.dataset.batches import BatchPlan
from lora_loom.training.dataset.model import CaptionOptions
from lora_loom.training.options import OptionError
from lora_loom.training.settings import Plan, RunSettings
from training import opened

DISK = RunSettings(text_cache="disk")
CAPTIONS = ["a red circle", "something else, (loud:1.3)", "", "word " * 100]


@pytest.fixture(autouse=True)
def user_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    return tmp_path / "user"


def same(one, other):
    def equal(a, b):
        return torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b

    return one.keys() == other.keys() and all(
        torch.equal(one[text][0], other[text][0])
        and one[text][1].keys() == other[text][1].keys()
        and all(equal(value, other[text][1][name]) for name, value in one[text][1].items())
        for text in one
    )


@torch.inference_mode()
def cached(clip, captions=CAPTIONS):
    """(hits, misses) of captions that are kept on disk; what is found is what the CLIP gives now."""
    disk = open_cache()
    found = encode_captions(clip, captions, cache=TextCache(disk, clip))
    assert same(found, encode_captions(clip, captions)), "stale, or changed on the way"
    for context, extras in found.values():
        assert not any(tensor.is_inference() for tensor in (context, *extras.values()) if torch.is_tensor(tensor))
    return disk.hits, disk.misses


@pytest.mark.parametrize("make", [tiny.tiny_clip, tiny.tiny_dual_clip])
def test_captions_are_encoded_once_for_all_runs(make):
    assert cached(make(inference=True)) == (0, 4)
    assert cached(make(inference=True)) == (4, 0)
    assert cached(make(inference=True), ["a new one", *CAPTIONS]) == (4, 1)
    assert cached(make(1, inference=True)) == (0, 4)


def test_the_tokens_are_the_key_and_not_the_text():
    clip = tiny.tiny_clip(inference=True)
    assert cached(clip, ["a Red  circle"]) == (0, 1)
    assert cached(clip, ["a red circle"]) == (1, 0), "the tokenizer makes no difference between them"
    assert cached(clip, ["a (red:1.1) circle"]) == (0, 1)
    assert cached(clip, ["a (red:1.2) circle"]) == (0, 1)
    assert cached(clip, ["a \\(red:1.2\\) circle"]) == (0, 1)


def test_an_embedding_file_is_known_by_its_vectors(tmp_path):
    clip = tiny.tiny_clip(inference=True)
    clip.tokenizer.clip_l.embedding_directory = str(tmp_path)
    file = tmp_path / "mine.pt"
    text = "a embedding:mine thing"
    vector = torch.randn(2, 64)
    for step, expected in ((0, (0, 1)), (0, (1, 0)), (1, (0, 1))):
        torch.save({"string_to_param": {"*": vector + step}}, file)
        assert cached(clip, [text]) == expected


def lora_for(clip, seed=0, rank=2):
    draws = torch.Generator().manual_seed(seed)
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    name = f"lora_te_{path.replace('.', '_')}"
    return {
        f"{name}.lora_up.weight": torch.randn(64, rank, generator=draws),
        f"{name}.lora_down.weight": torch.randn(rank, 64, generator=draws),
        f"{name}.alpha": torch.tensor(float(rank)),
    }


def test_a_lora_on_the_clip_encodes_anew():
    model, plain = tiny_model("sd15"), tiny.tiny_clip(inference=True)

    def patched(seed, strength, on=plain):
        return apply_lora(model, on, lora_for(on, seed), Strengths.of(1.0, strength))[1]

    assert cached(plain) == (0, 4)
    assert cached(patched(0, 1.0)) == (0, 4)
    assert cached(patched(0, 1.0)) == (4, 0), "an equal LoRA is the same LoRA"
    assert cached(patched(0, 0.5)) == (0, 4)
    assert cached(patched(1, 1.0)) == (0, 4)
    assert cached(patched(1, 1.0, patched(0, 1.0))) == (0, 4)
    assert cached(plain) == (4, 0)


def test_a_lora_that_the_host_would_misread_encodes_anew():
    """It is patched by our own arithmetic."""
    model, plain = tiny_model("sd15"), tiny.tiny_clip(inference=True)

    def patched(length):
        lora = lora_for(plain)
        [name] = {key.split(".")[0] for key in lora}
        lora[f"{name}.dora_scale"] = torch.full((64, 1), length)
        applied = apply_lora(model, plain, lora)[1]
        kinds = {type(patch[1]) for patches in applied.patcher.patches.values() for patch in patches}
        assert kinds == {FusedPatch}
        return applied

    assert cached(patched(1.5)) == (0, 4)
    assert cached(patched(1.5)) == (4, 0)
    assert cached(patched(1.6)) == (0, 4)


def test_whether_the_clip_is_loaded_makes_no_difference():
    """The host writes patched weights over the model's own while it is loaded."""
    plain = tiny.tiny_clip(inference=True)
    patched = apply_lora(tiny_model("sd15"), plain, lora_for(plain))[1]
    before = content_of_model(plain.patcher), content_of_model(patched.patcher)
    assert before[0] != before[1]
    for clip in (patched, plain, patched):
        with torch.inference_mode():
            comfy.model_management.load_models_gpu([clip.patcher])
        assert (content_of_model(plain.patcher), content_of_model(patched.patcher)) == before
    with torch.inference_mode():
        comfy.model_management.unload_all_models()
    assert (content_of_model(plain.patcher), content_of_model(patched.patcher)) == before


def test_one_weight_or_another_precision_encodes_anew():
    def changed(change):
        clip = tiny.tiny_clip(inference=True)
        with torch.inference_mode():
            change(clip.cond_stage_model.clip_l.transformer.text_model)
        return clip

    assert cached(changed(lambda model: None)) == (0, 4)

    def one_number(model):
        model.embeddings.token_embedding.weight[:, 17] += 0.25

    assert cached(changed(one_number)) == (0, 4)

    def rows(model):
        model.encoder.layers[1].mlp.fc2.weight[[3, 5]] = model.encoder.layers[1].mlp.fc2.weight[[5, 3]]

    assert cached(changed(rows)) == (0, 4)
    assert cached(changed(lambda model: model.encoder.layers.to(torch.bfloat16))) == (0, 4)


def test_clip_skip_and_other_settings_encode_anew():
    clip = tiny.tiny_clip(inference=True)
    assert cached(clip) == (0, 4)
    skipped = clip.clone()
    skipped.clip_layer(-2)
    assert cached(skipped) == (0, 4)
    assert cached(clip) == (4, 0), "using the other has left no trace"
    assert cached(skipped) == (4, 0)
    encoder = clip.cond_stage_model.clip_l
    for name in ("layer_norm_hidden_state", "enable_attention_masks", "zero_out_masked"):
        before = getattr(encoder, name)
        setattr(encoder, name, not before)
        assert cached(clip)[0] == 0, name
        setattr(encoder, name, before)
    assert cached(clip) == (4, 0)


def test_a_clip_that_cannot_be_known_is_refused():
    clip = tiny.tiny_clip(inference=True)
    hooked = clip.clone()
    hooked.patcher.add_object_patch("clip_l.something", object())
    with pytest.raises(OptionError, match=r"text_cache is 'disk', expected 'memory': .*object has no content"):
        cached(hooked)
    wrapped = clip.clone()
    wrapped.patcher.add_weight_wrapper("clip_l.transformer.text_model.final_layer_norm.weight", lambda weight: weight)
    with pytest.raises(OptionError, match=r"text_cache is 'disk', expected 'memory': .* weight_wrapper_patches"):
        cached(wrapped)
    strange = clip.clone()
    weight = "clip_l.transformer.text_model.final_layer_norm.weight"
    strange.patcher.add_patches({weight: (object(),)}, 1.0)
    with pytest.raises(OptionError, match="text_cache is 'disk'"):
        TextCache(open_cache(), strange)


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def parts():
    with torch.inference_mode():
        return tiny_model("sd15"), clip_for("sd15"), vae_for("sd15")


VARYING = CaptionOptions(shuffle=True, dropout=0.3, tag_dropout=0.3, trigger="zorb")


def dataset_in(folder, options=VARYING):
    dataset = opened(folder, 64, 16)
    samples = [dataclasses.replace(s, caption=f"red, green, {i}, blue, loud") for i, s in enumerate(dataset.samples)]
    concepts = (dataclasses.replace(dataset.concepts[0], captions=options),)
    return dataclasses.replace(dataset.with_samples(samples), concepts=concepts)


@torch.inference_mode()
def prepared(dataset, parts, run, steps=40):
    plan = Plan(run=run, batch_size=1)
    examples = HostExamples(dataset, BatchPlan(dataset, 1, 3), *parts, plan, steps)
    examples.prepare(0, lambda count: lambda: None)
    return examples


def test_captions_that_vary_are_shown_as_without_a_cache(tmp_path, parts):
    dataset = dataset_in(images(tmp_path / "zorb", count=3))
    plan = Plan(length=5, rank=2, alpha=2.0, batch_size=2, seed=3, learning_rate=1e-2)
    results = []
    for number, run in enumerate((RunSettings(), DISK, DISK)):
        with torch.inference_mode():
            request = Request(*parts, dataset, dataclasses.replace(plan, run=run), f"texts {number}", "new")
            results.append(train(request))
    for other in results[1:]:
        assert other.losses == results[0].losses
        assert all(torch.equal(other.lora[name], tensor) for name, tensor in results[0].lora.items())


def test_variants_are_all_that_is_encoded(tmp_path, parts):
    dataset = dataset_in(images(tmp_path / "zorb", count=3))
    variants = dataclasses.replace(DISK, text_variants=2)
    examples = prepared(dataset, parts, variants)
    assert 2 < len(examples._texts) <= 3 * 2 + 2, "two of each, none at all, and one as it stands to tell the size by"
    assert examples._disk.misses == len(examples._texts)
    again = prepared(dataset, parts, variants)
    assert again._disk.misses == 0
    for position in range(40):
        [one], [two] = examples.batch(position).conditioning, again.batch(position).conditioning
        assert torch.equal(one.cross_attn, two.cross_attn)
    assert len(prepared(dataset, parts, RunSettings())._texts) > 20


def test_variants_need_captions_that_vary(tmp_path, parts):
    dataset = dataset_in(images(tmp_path / "zorb", count=3), CaptionOptions(dropout=0.3))
    with pytest.raises(OptionError, match="text_variants is 2, expected 0"):
        prepared(dataset, parts, RunSettings(text_variants=2))


def test_a_changed_caption_is_encoded_anew(tmp_path, parts):
    folder = images(tmp_path / "zorb", count=3)
    for caption, misses in (("one", 3), ("one", 0), ("two", 1)):
        file = folder / "1.txt"
        status = os.stat(file)
        file.write_text(caption)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        examples = prepared(opened(folder, 64, 16), parts, DISK)
        assert examples._disk.misses == misses
        with torch.inference_mode():
            expected = parts[1].encode_from_tokens(parts[1].tokenize(caption))
        found = [examples.batch(p).conditioning[0].cross_attn for p in range(3)]
        assert sum(torch.equal(context, expected) for context in found) == 1
