"""What a model calls itself in LoRA files, and how layers are named there."""

from __future__ import annotations

from typing import Any

# the host's configuration class -> (ModelSpec architecture, kohya's base model version)
_KNOWN = {
    "SD15": ("stable-diffusion-v1", "sd_v1"),
    "SD20": ("stable-diffusion-v2-768-v", "sd_v2"),
    "SDXL": ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0"),
    "SDXLRefiner": ("stable-diffusion-xl-v1-refiner", "sdxl_refiner_v1-0"),
    "SD3": ("stable-diffusion-3", "sd3"),
    "Flux": ("flux-1-dev", "flux1"),
    "FluxSchnell": ("flux-1-schnell", "flux1"),
    "Flux2": ("flux-2", "flux2"),
    "Chroma": ("chroma", "chroma"),
    "HunyuanVideo": ("hunyuan-video", "hunyuan_video"),
    "WAN21_T2V": ("wan2.1", "wan2.1"),
    "QwenImage": ("qwen-image", "qwen_image"),
    "Lumina2": ("lumina-2", "lumina2"),
    "ZImage": ("z-image", "z_image"),
}


# sides of the square pictures that families were made with, where that is common knowledge
_NATIVE = {
    "SD15": 512,
    "SD20": 768,
    "SDXL": 1024,
    "SDXLRefiner": 1024,
    "SD3": 1024,
    "Flux": 1024,
    "Flux2": 1024,
    "Chroma": 1024,
    "QwenImage": 1328,
    "Lumina2": 1024,
    "ZImage": 1024,
}


def native_side(model: Any) -> int:
    """The side of the square pictures that the family of a model was made with, in pixels; 0 where that is unknown."""
    if architecture(model)[0] == "stable-diffusion-v2-512":
        return 512
    names = (kind.__name__ for kind in type(model.model_config).__mro__)
    return next((_NATIVE[name] for name in names if name in _NATIVE), 0)


def architecture(model: Any) -> tuple[str, str]:
    """(ModelSpec architecture, kohya base version); a family without either goes by the host's own name for it."""
    for kind in type(model.model_config).__mro__:
        if kind.__name__ == "SD20" and model.model_type.name == "EPS":
            return "stable-diffusion-v2-512", "sd_v2"
        if kind.__name__ in _KNOWN:
            return _KNOWN[kind.__name__]
    name = type(model.model_config).__name__.lower()
    return name, name


def origin_of(model: Any) -> dict[str, str]:
    """What a LoRA made for the model says of that."""
    kind, base = architecture(model)
    return {"modelspec.architecture": f"{kind}/lora", "ss_base_model_version": base}
