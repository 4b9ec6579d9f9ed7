"""Words of one's own: the host's embedding mechanism, trained, kept in the LoRA's file, known to one CLIP only."""

import json
from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from graph import clip_for, images, tiny_model, vae_for
from lora_loom.host.apply import apply_lora
from lora_loom.host.embeddings import encoders, with_words
from lora_loom.host.record import Request
from lora_loom.host.session import train
from lora_loom.host.text_loan import LiveText, borrow_text
from lora_loom.kernels.safetensors_io import load_tensors
from lora_loom.training.options import OptionError
from lora_loom.training.settings import ComponentSettings, ObjectiveSettings, OptimizerSettings, Plan, RunSettings
from snapshot import weights
from tiny_text import CLIPS, components_for, encoded
from training import opened

WORDS = "my_cat: 3 fluffy cat\nmy_dog: 1 dog"
TEXTS = {  # how one writes it, and how the host wants it written
    "my_cat": "embedding:my_cat",
    "a photo of my_cat, sitting": "a photo of embedding:my_cat , sitting",
    "a (my_cat:1.3) and (my_dog)\nmy_cat": "a ( embedding:my_cat :1.3) and ( embedding:my_dog )\nembedding:my_cat",
    "embedding:my_cat my_cats amy_cat my-cat": "embedding:my_cat my_cats amy_cat my-cat",
    " ".join(["my_cat"] * 40): " ".join(["embedding:my_cat"] * 40),
}


def vectors_in(chunks):
    return [token for chunk in chunks for token, _ in chunk if isinstance(token, torch.Tensor)]


def sides(tokens):
    """Integers as they are, vectors as their numbers, with the weights."""
    return [
        [(token.tolist() if isinstance(token, torch.Tensor) else token, weight) for token, weight in chunk]
        for chunks in tokens.values()
        for chunk in chunks
    ]


@pytest.mark.parametrize("name", ("sd15", "sdxl", "flux"))
def test_words_are_read_as_the_hosts_own_embedding_files(name, tmp_path):
    clip = CLIPS[name](inference=True)
    words = {"my_cat": {encoder: torch.randn(3, 64) for encoder in encoders(clip)}}
    words["my_dog"] = {encoder: torch.randn(1, 64) for encoder in encoders(clip)}
    for word, vectors in words.items():
        save_file(vectors, tmp_path / f"{word}.safetensors")
    known, unplaced = with_words(clip, words)
    assert not unplaced
    for encoder in encoders(clip):
        getattr(clip.tokenizer, encoder).embedding_directory = [str(tmp_path)]
    for written, wanted in TEXTS.items():
        assert sides(known.tokenize(written)) == sides(clip.tokenize(wanted)), written


def test_other_embeddings_stay_known_and_words_add_up(tmp_path):
    clip = CLIPS["sd15"](inference=True)
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    other = torch.randn(2, 64)
    save_file({"clip_l": other}, tmp_path / "other.safetensors")
    vectors = torch.randn(3, 3, 64)
    first, _ = with_words(clip, {"one": {"clip_l": vectors[0]}})
    second, _ = with_words(first, {"two": {"clip_l": vectors[1]}, "one": {"clip_l": vectors[2]}})
    found = vectors_in(second.tokenize("one two embedding:other")["l"])
    assert torch.equal(torch.stack(found), torch.cat([vectors[2], vectors[1], other]))
    assert torch.equal(torch.stack(vectors_in(first.tokenize("one two")["l"])), vectors[0])
    assert not vectors_in(clip.tokenize("one two")["l"])


def test_vectors_that_fit_no_encoder_are_told():
    clip = CLIPS["sd15"](inference=True)
    good, bad = torch.randn(2, 64), torch.randn(2, 48)
    known, unplaced = with_words(clip, {"my_cat": {"clip_l": good, "clip_g": good}, "odd": {"clip_l": bad}})
    assert sorted(unplaced) == ["my_cat.clip_g", "odd.clip_l"]
    assert sides(known.tokenize("odd")) == sides(clip.tokenize("odd"))


def test_a_file_of_embeddings_alone_says_what_it_wants():
    """Vectors without the name of an encoder are those of a lone one."""
    nameless, model = {"emb_params": torch.randn(2, 64)}, tiny_model("sdxl")
    with pytest.raises(ValueError, match="nothing of this LoRA fits the MODEL: connect the CLIP, it holds"):
        apply_lora(model, None, nameless)
    with pytest.raises(ValueError, match="none of the 1 keys .* example embedding.emb_params.*; load the base it was"):
        apply_lora(model, CLIPS["sdxl"](inference=True), nameless)
    _, known, applied = apply_lora(tiny_model("sd15"), CLIPS["sd15"](inference=True), nameless)
    assert applied.words == ("embedding",)
    assert len(vectors_in(known.tokenize("embedding, embedding:other")["l"])) == 2, "the other one is another's"


@pytest.mark.parametrize("name", CLIPS)
def test_words_begin_as_the_text_they_are_given(name):
    """As many vectors as every tokenizer has tokens: captions mean the same with the word as with its text."""
    clip = CLIPS[name](inference=True)
    text = "red cat"
    for encoder in encoders(clip):
        tokens = getattr(clip.tokenizer, encoder).tokenize_with_weights(text, return_word_ids=True)
        assert len([place for chunk in tokens for *_, place in chunk if place]) == 2
    own, components = components_for(clip, words=f"my_cat: 2 {text}")
    live = LiveText(own, components)
    with borrow_text(live), torch.no_grad():
        [(context, _)] = live.encode(["my_cat"])
    assert components[0].loose.keys() == {f"my_cat.{encoder}" for encoder in encoders(clip)}
    assert torch.equal(context, encoded(clip, text)[0])


def test_words_keep_the_length_of_the_models_own():
    clip = CLIPS["sdxl"](inference=True)
    _, [component] = components_for(clip, words=WORDS, preserve=True)
    tables = {name: encoder.transformer.get_input_embeddings().weight for name, encoder in encoders(clip).items()}
    lengths = {name: table.float().norm(dim=1).mean() for name, table in tables.items()}
    with torch.no_grad():
        for vectors in component.loose.values():
            vectors.add_(torch.randn_like(vectors))
    component.after_step()
    for key, vectors in component.loose.items():
        wanted = lengths[key.partition(".")[2]]
        assert torch.allclose(vectors.norm(dim=-1), wanted.expand(len(vectors)), rtol=1e-5), key


def test_a_word_that_lies_in_the_embeddings_folder_is_refused(tmp_path):
    clip = CLIPS["sd15"](inference=True)
    clip.tokenizer.clip_l.embedding_directory = [str(tmp_path)]
    save_file({"clip_l": torch.randn(2, 64)}, tmp_path / "my_dog.safetensors")
    with pytest.raises(OptionError, match="knows an embedding 'my_dog' already"):
        components_for(clip, words=WORDS)


# -- whole runs


@pytest.fixture
def pictures(tmp_path):
    return opened(images(tmp_path / "set", 3, 64, "my_cat"), 64, 64)


EVERYTHING = {"te1_learning_rate": 1e-3, "embeddings": "my_cat: 3 fluffy cat", "embedding_learning_rate": 1e-2}


def run(pictures, name, steps, components, family="sd15", clip=None, start_from=None, **options):
    """A whole run, as the trainer node makes it; (result, CLIP)."""
    clip = clip or clip_for(family)
    settings = {"components": ComponentSettings(**components), "run": RunSettings(smoke_test=family == "sdxl")}
    plan = Plan(length=steps, rank=2, learning_rate=1e-3, **settings, **options)
    request = Request(tiny_model(family), clip, vae_for(family), pictures, plan, name, start_from=start_from)
    with torch.inference_mode():
        return train(request), clip


def test_a_run_keeps_encoders_and_words_in_its_file_and_every_loader_gives_them_back(pictures):
    chosen = {**EVERYTHING, "te2_learning_rate": 2e-3}
    result, clip = run(pictures, "with words", 2, chosen, "sdxl")
    before = weights(clip.patcher)
    assert before == weights(clip_for("sdxl").patcher), "the CLIP itself is untouched"
    file = Path(folder_paths.get_output_directory()) / "lora_loom/with words/with words.safetensors"
    lora = load_tensors(file)
    assert lora.keys() == result.lora.keys()
    kinds = {key.split("_text_model")[0].split("_down_blocks")[0].rpartition(".my_cat")[0] or key[:9] for key in lora}
    assert {"bundle_emb", "lora_te1_", "lora_te2_", "lora_unet"} == kinds
    assert lora["bundle_emb.my_cat.clip_l"].shape == lora["bundle_emb.my_cat.clip_g"].shape == (3, 64)
    assert lora.metadata["modelspec.trigger_phrase"] == "my_cat"
    assert lora.metadata["ss_text_encoder_lr"] == "[0.001, 0.002]"
    assert json.loads(lora.metadata["loom.recipe"])["components"]["embeddings"] == "my_cat: 3 fluffy cat"
    moved = [key for key in lora if key.startswith("lora_te1") and "lora_up" in key and lora[key].any()]
    assert len(moved) == 12, "all but the layers behind the one that SDXL reads"

    _, trained, applied = apply_lora(tiny_model("sdxl"), clip, lora)
    assert applied.words == ("my_cat",) and not applied.unplaced and applied.clip_weights == 36
    for text in ("my_cat sits", "a (my_cat:1.2)"):
        assert not torch.equal(encoded(trained, text)[0], encoded(clip, text)[0])
    assert torch.equal(torch.stack(vectors_in(trained.tokenize("my_cat sits")["g"])), lora["bundle_emb.my_cat.clip_g"])
    _, again, _ = apply_lora(tiny_model("sdxl"), clip_for("sdxl"), result.lora)
    assert torch.equal(encoded(again, "my_cat sits")[0], encoded(trained, "my_cat sits")[0])
    assert sides(clip.tokenize("my_cat")) == sides(clip_for("sdxl").tokenize("my_cat"))
    _, nobody, without = apply_lora(tiny_model("sdxl"), None, lora)
    assert nobody is None and {"my_cat.clip_l", "my_cat.clip_g"} <= {item.key for item in without.unplaced}
    assert "te1 is clip_l" in result.report and "te2 is clip_g" in result.report


def test_a_run_that_goes_on_ends_with_the_bits_of_one_that_never_stopped(pictures):
    chosen = {**EVERYTHING, "te1_stop_after": 3, "preserve_embedding_norm": True}
    optimizer = OptimizerSettings(gradient_accumulation=2)
    whole, _ = run(pictures, "whole", 4, chosen, optimizer=optimizer)
    run(pictures, "in parts", 2, {**chosen, "te1_stop_after": 0}, optimizer=optimizer)
    parts, _ = run(pictures, "in parts", 4, chosen, optimizer=optimizer)
    assert "went on with run 'in parts' after step 2" in parts.report
    assert whole.lora.keys() == parts.lora.keys()
    assert all(torch.equal(tensor, parts.lora[key]) for key, tensor in whole.lora.items())
    assert whole.losses == parts.losses


@pytest.mark.parametrize("what", ("te1_learning_rate", "embeddings"))
def test_without_the_model_only_the_text_is_trained_and_saved(pictures, what):
    result, clip = run(pictures, f"only {what}", 2, {"train_model": False, what: EVERYTHING[what]})
    start = {"te1_learning_rate": "lora_te_", "embeddings": "bundle_emb.my_cat.clip_l"}[what]
    assert result.lora and all(key.startswith(start) for key in result.lora)
    _, trained, _ = apply_lora(tiny_model("sd15"), clip, result.lora)
    assert not torch.equal(encoded(trained, "my_cat")[0], encoded(clip, "my_cat")[0])


def test_captions_without_the_word_teach_it_nothing(tmp_path):
    folder = images(tmp_path / "set", 3, 64, "my_cat")
    for number in (0, 2):
        (folder / f"{number}.txt").write_text("a hat")
    only = {"train_model": False, "embeddings": WORDS.partition("\n")[0]}
    result, _ = run(opened(folder, 64, 64), "rarely shown", 3, only)
    assert result.finished and len(result.losses) == 3
    assert "2 taught nothing because nothing that is trained had a part in them" in result.report


def test_a_word_in_no_caption_is_refused_before_anything_is_encoded(pictures):
    with pytest.raises(OptionError, match="no caption shows the word 'my_horse'"):
        run(pictures, "no word", 2, {"embeddings": "my_horse: 2 horse"})


def test_a_run_starts_from_the_text_of_another(pictures):
    first, _ = run(pictures, "first", 2, EVERYTHING)
    second, _ = run(pictures, "second", 1, {**EVERYTHING, "embedding_learning_rate": 1e-8}, start_from=first.lora)
    assert "and with its embeddings my_cat.clip_l" in second.report
    key = "bundle_emb.my_cat.clip_l"
    assert torch.allclose(first.lora[key], second.lora[key], atol=1e-6)
    other = {**EVERYTHING, "embeddings": "my_cat: 2 cat"}
    with pytest.raises(OptionError, match="start_from holds 3 vectors of 64 numbers for my_cat, embeddings make 2 of"):
        run(pictures, "third", 1, other, start_from=first.lora)


def test_an_interrupted_run_gives_the_clip_back(pictures, monkeypatch):
    from lora_loom.training.loop import Trainer

    def fail(self):
        raise MemoryError("no more")

    clip = clip_for("sdxl")
    before = weights(clip.patcher)
    monkeypatch.setattr(Trainer, "_apply_gradients", fail)
    with pytest.raises(MemoryError):
        run(pictures, "out of memory", 2, {**EVERYTHING, "te2_learning_rate": 1e-3}, "sdxl", clip)
    assert weights(clip.patcher) == before
    assert not [path for path, module in clip.cond_stage_model.named_modules() if "forward" in vars(module)]
    assert all(p.is_inference() for p in clip.cond_stage_model.parameters()), "an alias stayed behind"


def test_what_is_preserved_is_the_old_model_with_the_old_text(pictures):
    """Nothing is lost at first, so preservation costs nothing; then it does, through the text alone as well."""
    text = {**EVERYTHING, "train_model": False, "te1_learning_rate": 0.1}
    words = {"preservation_trigger": "my_cat", "preservation_class": "red cat"}
    free, _ = run(pictures, "free", 2, text)
    bound, _ = run(pictures, "bound", 2, text, objective=ObjectiveSettings(preservation_weight=1.0, **words))
    assert bound.losses[0] == pytest.approx(free.losses[0], rel=1e-6)
    assert bound.losses[1] > free.losses[1] * 1.001
