"""A base model in a .safetensors file, read weight by weight by the paths that its layers have in the host.

* ``Checkpoint``: the names and shapes of its layers from the header alone (``table``), ``weight``: one of them.

Whole checkpoints (Stable Diffusion 1, 2, XL, 3, what ComfyUI saves) and files of a diffusion model alone are read. Text
encoders too: CLIP as transformers and as OpenCLIP call its layers, where the file holds it, and whatever lies under
"text_encoders.". What else there is (VAEs, tables of the schedule) is no layer that a LoRA could be on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..adapter import wide
from ..blocks import MODEL_PREFIX
from ..dialects_text import PREFIX as TEXT_ENCODERS
from ..names import NameTable
from ..safetensors_io import TensorFile

_DIFFUSION = ("model.diffusion_model.", MODEL_PREFIX, "net.")  # before the host's own paths; none in files without more
_BESIDE = (
    *("first_stage_model.", "vae.", "model_ema.", "control_model.", "cond_stage_model.", "conditioner.embedders."),
    *(TEXT_ENCODERS, "denoiser.", "embedding_manager."),
)
_DIFFUSERS = re.compile(r"(?:unet\.|transformer\.)?(?:down_blocks\.0\.|mid_block\.|single_transformer_blocks\.0\.)")
_QUANTISED = re.compile(r"\.(?:scale_weight|weight_scale(?:_2)?|scale_input|input_scale|comfy_quant)$|^scaled_fp8$")
_TEXT = (  # the beginning of a name, the encoder, whether its layers are called as OpenCLIP calls them
    ("conditioner.embedders.0.transformer.", "clip_l", False),
    ("conditioner.embedders.1.model.", "clip_g", True),
    ("conditioner.embedders.0.model.", "", True),
    ("cond_stage_model.transformer.", "clip_l", False),
    ("cond_stage_model.model.", "clip_h", True),
)
_WIDTHS = {1024: "clip_h", 1280: "clip_g"}  # of the encoders that may be the first and are called by no name
_OPEN = {  # OpenCLIP → transformers
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
    "text_projection.weight": "text_projection.weight",
}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)")
_FUSED = ("q_proj", "k_proj", "v_proj")


_SCHEDULE = frozenset(  # of the noise, where it stands beside the model
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 logvar sigmas log_sigmas v_pred "
    "ztsnr".split()
)


@dataclass(frozen=True)
class _Place:
    """A tensor of the file, some of its rows (start, length), or the whole of it turned."""

    name: str
    rows: tuple[int, int] | None = None
    turned: bool = False


class Checkpoint:
    """``table``: the names of its layers. Raises ValueError naming the file where it holds no diffusion model."""

    def __init__(self, path: str | os.PathLike) -> None:
        self.file = TensorFile(path)
        self.name = Path(path).name
        shapes = self.file.shapes
        quantised = next((name for name in shapes if _QUANTISED.search(name)), None)
        if quantised:
            raise ValueError(
                f"{self.name}: its weights are quantised ({quantised[:80]}); give the checkpoint that it was made from"
            )
        if (foreign := next(filter(_DIFFUSERS.match, shapes), None)) is not None:
            raise ValueError(
                f"{self.name}: its layers are called as diffusers calls them ({foreign[:80]}); give the checkpoint in "
                "the form that ComfyUI loads"
            )
        self._places = dict(_diffusion(shapes))
        if not any(path.startswith(MODEL_PREFIX) for path in self._places):
            raise ValueError(f"{self.name}: there is no diffusion model in it; give the checkpoint of one")
        self._places |= dict(_text(shapes))
        floats = {name for name, dtype in self.file.dtypes.items() if dtype.is_floating_point}
        self._places = {key: place for key, place in self._places.items() if place.name in floats}  # tables of numbers
        self.table = NameTable({key.removesuffix(".weight"): self.shape(key) for key in self._places})

    @property
    def keys(self) -> tuple[str, ...]:
        """The parameters by the names that the host has for them."""
        return tuple(self._places)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders that it holds."""
        return tuple(dict.fromkeys(key.partition(".")[0] for key in self._places if not key.startswith(MODEL_PREFIX)))

    def shape(self, key: str) -> tuple[int, ...]:
        place = self._places[key]
        shape = self.file.shapes[place.name]
        if place.rows:
            return (place.rows[1], *shape[1:])
        return shape[::-1] if place.turned else shape

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def stored(self, key: str) -> Tensor:
        """A parameter in the type it is kept in. Raises ValueError naming what is not there."""
        place = self._places.get(key)
        if place is None:
            raise ValueError(f"{key[:200]}: is no weight of {self.name}; give the base that the LoRA was made for")
        found = self.file.read(place.name)
        if place.rows:
            found = found.narrow(0, *place.rows)
        return found.T.contiguous() if place.turned else found

    def weight(self, path: str) -> Tensor:
        """The weight of a layer, or the parameter of that name, in float32 or wider."""
        key = f"{path}.weight"
        return wide(self.stored(key if key in self._places else path))


def _diffusion(shapes: Mapping[str, object]) -> Iterator[tuple[str, _Place]]:
    prefix = next((start for start in _DIFFUSION if any(name.startswith(start) for name in shapes)), "")
    for name in shapes:
        if name.startswith(prefix) and (prefix or not (name in _SCHEDULE or name.startswith(_BESIDE))):
            yield MODEL_PREFIX + name.removeprefix(prefix), _Place(name)


def _text(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, _Place]]:
    for name, shape in shapes.items():
        if name.startswith(TEXT_ENCODERS):
            yield name.removeprefix(TEXT_ENCODERS), _Place(name)
            continue
        for prefix, encoder, is_open in _TEXT:
            if name.startswith(prefix):
                local = name.removeprefix(prefix)
                if not is_open:
                    local = local if local.startswith(("text_model.", "text_projection")) else f"text_model.{local}"
                    yield f"{encoder}.transformer.{local}", _Place(name)
                elif owner := encoder or _WIDTHS.get(shapes.get(prefix + "token_embedding.weight", (0, 0))[-1], ""):
                    yield from ((f"{owner}.transformer.{key}", place) for key, place in _of_open(local, name, shape))
                break


def _of_open(local: str, name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, _Place]]:
    """What a tensor of OpenCLIP is in transformers' names: query, key and value lie in one there."""
    if local in _OPEN:
        yield _OPEN[local], _Place(name, turned=local == "text_projection")
    match = _BLOCK.fullmatch(local)
    if match is None:
        return
    number, layer, kind = match.groups()
    block = f"text_model.encoder.layers.{number}"
    if layer in _IN_BLOCK:
        yield f"{block}.{_IN_BLOCK[layer]}.{kind}", _Place(name)
    elif layer == "attn.in_proj":
        rows = shape[0] // len(_FUSED)
        for part, projection in enumerate(_FUSED):
            yield f"{block}.self_attn.{projection}.{kind}", _Place(name, (part * rows, rows))
