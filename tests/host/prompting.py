"""LoRAs on MODEL and CLIP as files, prompts that name them, and runs spliced by hand."""

from __future__ import annotations

import comfy.sample
import comfy.samplers
import folder_paths
import torch

import tiny
from applying import random_adapter, relative
from graph import clip_for, tiny_model
from lora_loom.host import lora_cache
from lora_loom.host.apply import Strengths, apply_lora
from lora_loom.host.clocks import Course
from lora_loom.host.prompt_lora import apply_prompt
from lora_loom.host.targets import names_of
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.reading import LoRAFile
from lora_loom.kernels.safetensors_io import save_tensors
from lora_loom.kernels.strengths.schedule import fixed
from lora_loom.kernels.writing import to_tensors
from tiny_text import tiny_flux_clip

RUN = Course()
TEXT_LAYERS = ("q_proj", "fc1", "SelfAttention.q", "wi_0")


def lora_folder(tmp_path, monkeypatch):
    """An empty LoRA folder of the host, and nothing in memory."""
    folder = tmp_path / "loras"
    folder.mkdir()
    known = dict(folder_paths.folder_names_and_paths) | {"loras": ([str(folder)], {".safetensors"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    lora_cache.clear()
    return folder


def pair(family):
    """MODEL and CLIP that fit each other."""
    return tiny_model(family), tiny_flux_clip(inference=True) if family == "flux" else clip_for(family)


def lora_tensors(model, clip, seed=1, on_model=True, on_text=True, size=0.5):
    """A LoRA on some layers of both; what it does to the text is plain to see."""
    adapters = {}
    if on_model:
        for number, target in enumerate(select_targets(model.model, "attention", False)[seed % 3 :: 3]):
            adapters[target.path] = random_adapter("LoRA", target.shape, {}, None, 1000 * seed + number)
    if on_text:
        text = clip.cond_stage_model
        layers = [path for path, _ in text.named_modules() if path.endswith(TEXT_LAYERS)]
        for number, path in enumerate(layers):
            shape = tuple(text.get_submodule(path).weight.shape)
            adapters[path] = random_adapter("LoRA", shape, {}, None, 5000 * seed + number, size)
    assert adapters
    return to_tensors(LoRAFile(adapters, names=names_of(model, clip)))


def put(folder, name, tensors, metadata=None):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_tensors(tensors, path, metadata)


def prompted(model, clip, prompt, **options):
    """What the node does, with the widgets' defaults."""
    given = {"dialect": "sdnext", "engine": "auto", "course": RUN} | options
    with torch.inference_mode():
        return apply_prompt(model, clip, prompt, **given)


def two_loras(folder):
    """MODEL and CLIP of SD1.5, and two LoRA files for them."""
    model, clip = pair("sd15")
    put(folder, "cat.safetensors", lora_tensors(model, clip), {"modelspec.trigger_phrase": "ohwx cat, fluffy, big"})
    put(folder, "style/Van_Gogh-v2.safetensors", lora_tensors(model, clip, seed=2), {})
    return model, clip


def encoded(clip, text):
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def same_text(one, other):
    assert len(one) == len(other)
    for (context, extras), (wanted, known) in zip(one, other, strict=True):
        assert relative(context, wanted) <= 1e-5
        if known.get("pooled_output") is not None:
            assert relative(extras["pooled_output"], known["pooled_output"]) <= 1e-5


def by_hand(model, clip, lora, text, strength, on_text, components=None):
    """(MODEL, CONDITIONING) with constant strengths, by the loader and the host's own encoder."""
    given = {name: fixed(weight) for name, weight in (components or {}).items()}
    with torch.inference_mode():
        new_model, new_clip, _ = apply_lora(model, clip, lora, Strengths(fixed(strength), fixed(on_text), given))
    return new_model, encoded(new_clip, text)


def sigmas_of(model, scheduler, steps):
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, steps)


def run(model, family, positive, negative, sigmas, start=None, sampler="euler", cfg=3.0):
    """The latents of a sampler; with ``start`` it goes on from there, without noise."""
    latent = tiny.latent(family) if start is None else start
    noise = comfy.sample.prepare_noise(latent, 3) if start is None else torch.zeros_like(latent)
    kernel = comfy.samplers.ksampler(sampler)
    with torch.inference_mode():
        return comfy.sample.sample_custom(
            model, noise, cfg, kernel, sigmas, positive, negative, latent, disable_pbar=True, seed=3
        )


def spliced(family, parts, sigmas, start=None, sampler="euler"):
    """A run in parts: (steps, MODEL, positive, negative) one behind the other."""
    done, latent = 0, start
    for steps, model, positive, negative in parts:
        latent = run(model, family, positive, negative, sigmas[done : done + steps + 1], latent, sampler)
        done += steps
    assert done == len(sigmas) - 1
    return latent
