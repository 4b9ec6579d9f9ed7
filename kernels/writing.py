"""The writer of adapter files.

* ``DIALECTS``: what can be written, and who reads it.
* ``write_lora``: a ``LoRAFile`` to a file in a dialect, with a second one beside it in some (``config_of``);
  ``to_tensors``: the same as tensors in memory.
* ``to_state_dict``: adapters under given names, their parts as LyCORIS and kohya call them.

Layers that a dialect holds in other pieces than the model are cut or joined with the same ΔW. PEFT and diffusers have
no place for alpha in a file's tensors: it goes into a factor, so that they, and everybody who takes their files for
alpha = rank, get the trained strength. What a dialect cannot hold is an error that names it, never left out.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .architectures import has_prefix, in_text_encoder
from .blocks import MODEL_PREFIX
from .control import SET_WEIGHT
from .dora import SCALE
from .lora import DOWN, UP
from .names import NameTable, Place
from .peft_config import CONFIG, DIFFUSERS_CONFIG, WRAPPER, config_json
from .pieces import DIFF_B, Piece, as_one, exchanged, folded, on_rows, pieces_of
from .quirks import as_peft_turns
from .reading import LoRAFile
from .safetensors_io import LoraModel, checked_path, replace_file, save_tensors

WRITTEN_AS = "loom.dialect"  # metadata: this pack wrote it, so there is nothing to put right
TOOL = "loom.tool"  # metadata: what a tool of this pack made it of
NETWORK = ("ss_network_module", "ss_network_dim", "ss_network_alpha")  # metadata of kohya's trainers


@dataclass(frozen=True)
class Dialect:
    """``names``: a dialect of ``NameTable``; ``peft``: parts as PEFT calls them, without alpha."""

    description: str
    names: str
    peft: bool = False


DIALECTS: dict[str, Dialect] = {
    "native": Dialect("Any loader of ComfyUI: kohya's names for Stable Diffusion, else the model's own.", "native"),
    "kohya": Dialect("kohya's trainers and the web UIs: lora_unet_… and lora_te_….", "kohya"),
    "lycoris": Dialect("LyCORIS' own wrapper and SimpleTuner: lycoris_… and diffusers' names.", "diffusers"),
    "diffusers": Dialect("diffusers: unet.… or transformer.…, LoRA and DoRA alone.", "diffusers", peft=True),
    "peft": Dialect("PEFT: one component; with adapter_config.json beside adapter_model.", "diffusers", peft=True),
}
_COMPONENTS = ("unet.", "transformer.", "text_encoder.", "text_encoder_2.", "text_encoder_3.")
_PAIR = {DOWN: "lora_A.weight", UP: "lora_B.weight", SCALE: "lora_magnitude_vector", DIFF_B: "lora_B.bias"}
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_PEFT_KINDS: tuple[tuple[str, str, str, Mapping[str, str]], ...] = (
    # mark, PEFT's name of the kind, the factor that takes alpha's scale, part -> what PEFT calls it
    (DOWN, "LORA", UP, _PAIR),
    ("hada_w1_a", "LOHA", "hada_w1_a", {part: part for part in _LOHA}),
    ("lokr_w1", "LOKR", "lokr_w1", {part: part for part in _LOKR}),
    ("lokr_w1_a", "LOKR", "lokr_w1_a", {part: part for part in _LOKR}),
    ("oft_R.weight", "OFT", "", {"oft_R.weight": "oft_R.weight"}),
    ("boft_R", "BOFT", "", {"boft_R": "boft_R", "boft_s": "boft_s"}),
    ("ia3_l", "IA3", "", {"ia3_l": "ia3_l"}),
)


def write_lora(file: LoRAFile, path: str | os.PathLike, dialect: str = "native") -> Path:
    """Write ``file`` in one step. Raises ValueError naming whatever the dialect cannot hold."""
    path = checked_path(path)
    model = to_tensors(file, dialect)
    written = save_tensors(model, path)
    config = config_of(path, dialect)
    if config is not None:
        replace_file(config, model.metadata[CONFIG].encode())
    return written


def config_of(path: Path, dialect: str) -> Path | None:
    """The file that is written beside ``path``."""
    return path.with_name(f"{CONFIG}.json") if dialect == "peft" and path.stem == "adapter_model" else None


def to_tensors(file: LoRAFile, dialect: str = "native") -> LoraModel:
    """The tensors and metadata of a file in ``dialect``. Raises ValueError naming whatever the dialect cannot hold."""
    if dialect not in DIALECTS:
        raise ValueError(f"there is no dialect {dialect!r}; choose one of {', '.join(DIALECTS)}")
    layers: dict[str, dict[str, Tensor]] = {}
    for path, adapter in file.adapters.items():
        try:
            for name, parts in _named(path, adapter, file.names, dialect):
                if DIALECTS[dialect].peft:
                    parts = as_peft_turns(parts, adapter.shape)
                if name in layers:
                    raise ValueError(f"is called {name} in {dialect} files, like another layer")
                layers[name] = parts
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    metadata = {key: value for key, value in file.metadata.items() if key not in (CONFIG, DIFFUSERS_CONFIG)}
    metadata[WRITTEN_AS] = dialect
    if TOOL in metadata:  # what a trainer says of itself stays
        metadata = {key: value for key, value in metadata.items() if key not in NETWORK}
        metadata |= _network(layers, not DIALECTS[dialect].peft)
    if DIALECTS[dialect].peft:
        layers, config = _as_peft(layers, dialect)
        metadata |= {CONFIG: config_json(config)} if dialect == "peft" else {}
    tensors = {f"{name}.{part}": tensor for name, parts in layers.items() for part, tensor in parts.items()}
    for placeholder, encoders in file.embeddings.items():
        tensors |= {f"bundle_emb.{placeholder}.{encoder}": vectors for encoder, vectors in encoders.items()}
    return LoraModel(tensors, metadata)


def to_state_dict(adapters: Mapping[str, Adapter], name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """Adapters by canonical path -> "<name>.lora_down.weight", "<name>.lora_up.weight", "<name>.alpha" and the like."""
    return {
        f"{name_of(path)}.{part}": tensor
        for path, adapter in adapters.items()
        for part, tensor in adapter.state().items()
    }


def _network(layers: Mapping[str, Mapping[str, Tensor]], with_alpha: bool) -> dict[str, str]:
    """kohya's keys, as true as the parts are; it writes "Dynamic" where layers differ."""
    plain = all(parts.keys() <= {DOWN, UP, "alpha", DIFF_B} for parts in layers.values())
    found = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    pairs = [parts for parts in layers.values() if DOWN in parts]
    if pairs:
        found["ss_network_dim"] = _one(str(len(parts[DOWN])) for parts in pairs)
        found["ss_network_alpha"] = _one(f"{_alpha(parts) if with_alpha else len(parts[DOWN]):.6g}" for parts in pairs)
    return found


def _alpha(parts: Mapping[str, Tensor]) -> float:
    """As it is read: 0 and infinity are the rank."""
    alpha = float(parts["alpha"])
    return alpha if alpha and math.isfinite(alpha) else len(parts[DOWN])


def _one(values: Iterable[str]) -> str:
    different = set(values)
    return different.pop() if len(different) == 1 else "Dynamic"


def _named(path: str, adapter: Adapter, table: NameTable | None, dialect: str) -> list[tuple[str, dict[str, Tensor]]]:
    """(name of the layer in the file, its parts), several for a layer that the dialect holds in pieces."""
    pieces = pieces_of(adapter)
    if table is None:
        return [(_raw_name(path, dialect), as_one(pieces, adapter.shape))]
    places, shape = _places(path, table, dialect), table.shapes[path]
    found = []
    for name, place in places:
        parts = _parts_at(place, pieces, shape)
        if parts:
            found.append((_spelled(name, path in table.text.paths, table, path, dialect), parts))
    return found


def _parts_at(place: Place, pieces: list[Piece], shape: tuple[int, ...]) -> dict[str, Tensor]:
    if place.slice is None:
        parts = as_one(pieces, shape)
    else:
        parts, shape = on_rows(pieces, place.slice[1:], shape), (place.slice[2], *shape[1:])
    return exchanged(parts, shape) if place.swapped and parts else parts


def _places(path: str, table: NameTable, dialect: str) -> list[tuple[str, Place]]:
    names = DIALECTS[dialect].names
    if path not in table.shapes:
        raise ValueError("not a layer of the model that this is written for")
    if names == "diffusers" and table.architecture is None and path not in table.text.paths:
        return [(path.removeprefix(MODEL_PREFIX), Place(path))]  # an unknown model is called by its own names
    return table.parts(path, names)


def _spelled(name: str, text: bool, table: NameTable, path: str, dialect: str) -> str:
    if dialect == "lycoris":
        if text:
            return table.write(path, "kohya")
        component = next((prefix for prefix in _COMPONENTS if name.startswith(prefix)), "")
        return "lycoris_" + name.removeprefix(component).replace(".", "_")
    return name


def _raw_name(name: str, dialect: str) -> str:
    """Names as they stood in a file, which only the model itself can translate."""
    flat = (has_prefix(name) or in_text_encoder(name)) and "." not in name
    if DIALECTS[dialect].peft and flat:
        raise ValueError(f"only the model tells what it is called in {dialect} files")
    return name


def _as_peft(
    layers: Mapping[str, Mapping[str, Tensor]], dialect: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parts as PEFT calls them, and the configuration that goes with them."""
    written: dict[str, dict[str, Tensor]] = {}
    components: set[str] = set()
    kinds: set[str] = set()
    ranks: dict[str, int] = {}
    normed: dict[str, bool] = {}
    for name, parts in layers.items():
        mark, kind, factor, names = _kind(name, parts, dialect)
        kinds.add(kind)
        parts = folded(parts, factor) if factor else dict(parts)
        component = next((prefix for prefix in _COMPONENTS if name.startswith(prefix)), "")
        components.add(component)
        if normed.setdefault(component, SCALE in parts) != (SCALE in parts):
            raise ValueError(f"{name}: {dialect} files have DoRA on all of its layers or on none")
        inside = name.removeprefix(component)
        if SCALE in parts:
            parts[SCALE] = _magnitude(name, parts)
        if mark == DOWN or factor:
            ranks[inside] = _rank(parts, mark)
        outside = name if dialect == "diffusers" else WRAPPER + inside.removeprefix(WRAPPER)
        written[outside] = {names[part]: tensor for part, tensor in parts.items()}
    if dialect == "peft" and (len(components) > 1 or len(kinds) > 1):
        mixed = ", ".join(sorted(components if len(components) > 1 else kinds))
        raise ValueError(f"PEFT files hold one component and one kind of adapter, not {mixed}; write native or kohya")
    return written, _config(written, next(iter(kinds), "LORA"), ranks)


def _kind(name: str, parts: Mapping[str, Tensor], dialect: str) -> tuple[str, str, str, Mapping[str, str]]:
    for mark, kind, factor, names in _PEFT_KINDS:
        if mark in parts:
            further = parts.keys() - names.keys() - {"alpha", "lora_mid.weight"}
            if further or (dialect == "diffusers" and kind != "LORA"):
                break
            return mark, kind, factor, names
    held = "as what they replace" if SET_WEIGHT in parts else ", ".join(sorted(parts))
    raise ValueError(f"{name}: {dialect} files cannot hold {held}; write kohya, lycoris or native instead")


def _magnitude(name: str, parts: Mapping[str, Tensor]) -> Tensor:
    """PEFT's norms are per output: (out,), of convolutions (1, out, 1, 1)."""
    norms, up = parts[SCALE], parts[UP]
    if norms.numel() != len(up) or norms.shape[0] != norms.numel():
        raise ValueError(f"{name}: PEFT's DoRA has norms per output, this one per input")
    return norms.reshape(-1) if up.ndim == 2 else norms.reshape(1, -1, *(1 for _ in up.shape[2:]))


def _rank(parts: Mapping[str, Tensor], mark: str) -> int:
    if mark == DOWN:
        return len(parts[DOWN])
    low = next((parts[part] for part in ("hada_w1_b", "lokr_w2_b", "lokr_w1_b") if part in parts), None)
    # a LoKr of two full halves has no rank; PEFT makes full halves when the rank is great enough
    return len(low) if low is not None else max(parts["lokr_w2"].shape)


def _config(layers: Mapping[str, Mapping[str, Tensor]], kind: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    names = [name.removeprefix(WRAPPER) for name in layers]
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 0
    pattern = {f"^{name}": value for name, value in ranks.items() if value != rank}
    config: dict[str, Any] = {"peft_type": kind, "target_modules": sorted(names), "inference_mode": True}
    parts = {part for named in layers.values() for part in named}
    if kind == "LORA":
        config |= {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern, "bias": "none"}
        config |= {"use_dora": "lora_magnitude_vector" in parts, "lora_bias": "lora_B.bias" in parts}
    elif kind in ("LOHA", "LOKR"):
        config |= {"r": rank, "alpha": rank, "rank_pattern": pattern, "alpha_pattern": pattern}
        config |= {"use_effective_conv2d": bool({"hada_t1", "lokr_t2"} & parts)}
        if kind == "LOKR":
            halves = {tuple(named["lokr_w1"].shape) for named in layers.values() if "lokr_w1" in named}
            rows, columns = next(iter(halves)) if len(halves) == 1 else (0, 1)
            config |= {"decompose_factor": rows if rows == columns else -1, "decompose_both": "lokr_w1_a" in parts}
    elif kind == "OFT":
        packed = [named["oft_R.weight"] for named in layers.values()]
        config |= {"r": 0, "oft_block_size": (1 + math.isqrt(1 + 8 * packed[0].shape[1])) // 2}
        config |= {"use_cayley_neumann": True, "block_share": all(len(tensor) == 1 for tensor in packed)}
    elif kind == "BOFT":
        blocks = next(iter(layers.values()))["boft_R"]
        config |= {"boft_block_size": blocks.shape[-1], "boft_n_butterfly_factor": blocks.shape[0]}
    elif kind == "IA3":
        inputs = [name for name, named in zip(names, layers.values(), strict=True) if len(named["ia3_l"]) == 1]
        config |= {"feedforward_modules": sorted(inputs)}
    return config
