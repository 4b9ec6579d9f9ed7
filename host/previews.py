"""Pictures while training: the host samples the MODEL with the LoRA so far, with samplers of its own.

Runs outside the loan, on a clone that carries the LoRA as ordinary patches: what is seen is what a loader will give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..training.settings import OptionError
from .apply import apply_lora
from .runs import Run

PREVIEW_PIXELS = 512  # the host shows previews at this size at most
LEAST = {"every": 1, "steps": 1, "cfg": 0.0, "width": 16, "height": 16}  # a connected value passes the widget's bounds


def sampler_names() -> list[str]:
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    return list(comfy.samplers.KSampler.SCHEDULERS)


@dataclass(frozen=True)
class PreviewSettings:
    prompts: str = ""
    negative: str = ""
    every: int = 100
    sampler: str = "euler"
    scheduler: str = "normal"
    steps: int = 20
    cfg: float = 5.0
    width: int = 512
    height: int = 512
    seeds: str = "0"
    seed_list: tuple[int, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        try:
            seeds = tuple(int(part) for part in self.seeds.split(",") if part.strip())
        except ValueError:
            raise OptionError(f"seeds is {self.seeds!r}, expected whole numbers separated by commas") from None
        if not seeds or any(not 0 <= seed < 2**64 for seed in seeds):
            raise OptionError(f"seeds is {self.seeds!r}, expected at least one number from 0 to 2⁶⁴ − 1")
        if self.sampler not in sampler_names():
            raise OptionError(f"sampler is {self.sampler!r}, expected one of {', '.join(sampler_names())}")
        if self.scheduler not in scheduler_names():
            raise OptionError(f"scheduler is {self.scheduler!r}, expected one of {', '.join(scheduler_names())}")
        for name, least in LEAST.items():
            if not getattr(self, name) >= least:
                raise OptionError(f"{name} is {getattr(self, name)!r}, expected {least:g} or more")
        object.__setattr__(self, "seed_list", seeds)

    @property
    def prompt_list(self) -> list[str]:
        return [line.strip() for line in self.prompts.splitlines() if line.strip()] or [""]


class Previews:
    """``previews(run, step, lora)`` samples, keeps one sheet (prompts down, seeds across), and returns it.

    Beside each picture stands what the MODEL gave without the LoRA, sampled once.
    """

    def __init__(self, settings: PreviewSettings, model: Any, clip: Any, vae: Any) -> None:
        self.settings, self.every = settings, settings.every
        self.model, self.clip, self.vae = model, clip, vae
        self._base: list[list[Image.Image]] = []
        if vae is not None:  # a run without one is refused with its own words
            factor = vae.spacial_compression_encode()
            _check_side("width", settings.width, factor)
            _check_side("height", settings.height, factor)

    @torch.inference_mode()
    def __call__(self, run: Run, step: int, lora: Mapping[str, Tensor]) -> Image.Image:
        model, clip, _ = apply_lora(self.model, self.clip, lora)
        devices = [model.load_device] if model.load_device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # the host's samplers seed the global generators
            if not self._base:
                self._base = [self._pictures(self.model, self.clip, prompt) for prompt in self.settings.prompt_list]
            rows = [self._pictures(model, clip, prompt) for prompt in self.settings.prompt_list]
        sheet = side_by_side({"base": self._base, f"step {step}": rows})
        file = run.preview_file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(file)
        return sheet

    def _pictures(self, model: Any, clip: Any, prompt: str) -> list[Image.Image]:
        settings = self.settings
        positive = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        negative = clip.encode_from_tokens_scheduled(clip.tokenize(settings.negative))
        pictures = []
        for seed in settings.seed_list:
            latent = self._empty_latent(model)
            noise = comfy.sample.prepare_noise(latent, seed)
            samples = comfy.sample.sample(
                model,
                noise,
                settings.steps,
                settings.cfg,
                settings.sampler,
                settings.scheduler,
                positive,
                negative,
                latent,
                seed=seed,
                disable_pbar=True,
            )
            pixels = self.vae.decode(samples)
            pictures.append(to_picture(pixels.reshape(-1, *pixels.shape[-3:])[0]))
        return pictures

    def _empty_latent(self, model: Any) -> Tensor:
        factor = self.vae.spacial_compression_encode()
        channels = model.get_model_object("latent_format").latent_channels
        latent = torch.zeros(1, channels, self.settings.height // factor, self.settings.width // factor)
        return comfy.sample.fix_empty_latent_channels(model, latent)


def _check_side(name: str, side: int, factor: int) -> None:
    """Raises OptionError for a side between two sizes of latents: the picture would be smaller than asked for."""
    if side % factor:
        raise OptionError(
            f"{name} is {side}, expected a multiple of {factor}, the pixels that this VAE makes one of, such as "
            f"{side + -side % factor}"
        )


def to_picture(pixels: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] → picture."""
    return Image.fromarray((pixels[..., :3].clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy())


def side_by_side(parts: Mapping[str, list[list[Image.Image]]], gap: int = 6, line: int = 14) -> Image.Image:
    """Contact sheets beside each other, each under its name."""
    sheets = {name: contact_sheet(rows) for name, rows in parts.items()}
    width = sum(sheet.width + gap for sheet in sheets.values()) - gap
    canvas = Image.new("RGB", (width, line + max(sheet.height for sheet in sheets.values())), (255, 255, 255))
    pen, left = ImageDraw.Draw(canvas), 0
    for name, sheet in sheets.items():
        pen.text((left + 2, 1), name, fill=(0, 0, 0))
        canvas.paste(sheet, (left, line))
        left += sheet.width + gap
    return canvas


def contact_sheet(rows: list[list[Image.Image]], gap: int = 2) -> Image.Image:
    """Pictures of one size in rows, on white."""
    width, height = rows[0][0].size
    sheet = Image.new(
        "RGB",
        (max(map(len, rows)) * (width + gap) - gap, len(rows) * (height + gap) - gap),
        (255, 255, 255),
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * (width + gap), y * (height + gap)))
    return sheet
