"""Names of a model's layers in files: the host's module paths, kohya's, diffusers' and the authors' own spellings.

* ``Place``: what a name means: a layer of the model, or some rows of a fused one.
* ``NameTable``: for one model, the place that any accepted spelling means, and the names to write in a dialect.
* ``layer_shapes``: the layers of a loaded model and their weights' shapes, all that a table is made from.

A canonical path is the host's name of a weight without ".weight": "diffusion_model.double_blocks.0.img_attn.qkv",
"clip_l.transformer.text_model.encoder.layers.0.mlp.fc1". Parameters of other names keep them ("….bias", "….scale").

Dialects: "native", what this pack writes: kohya's names for SD1, SD2 and SDXL UNets and CLIP layers, which every loader
takes, the host's for the rest. "kohya": "lora_unet_" or "lora_te1_" and the path of the trainers' own model with
underscores: diffusers' paths for SD1 and SD2, the host's for all others. "diffusers": what diffusers and PEFT load,
q, k and v apart where the host has them in one layer. "host": "diffusion_model.…" and "text_encoders.…". "bfl": the
host's paths without prefix, as Black Forest Labs write them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from .blocks import MODEL_PREFIX, diffusion_tree
from .dialects import Part, spelled
from .dialects_text import TextNames, encoder_layers
from .dialects_transformers import family_of
from .dialects_unet import UNetLayout, diffusers_paths, diffusers_spellings, sd_unet_layout
from .layers import is_linear

DIALECTS = ("native", "kohya", "diffusers", "host", "bfl")
_WRAPPER = "base_model.model."  # PEFT's own, before or after the name of the component
_THEIRS = (
    "transformer.",
    "unet.",
    "lora_transformer_",
    "lycoris_",
)  # diffusers' names come first here, else the host's
_DOTTED = (MODEL_PREFIX, "model.diffusion_model.", "transformer.", "unet.")
_FLAT = ("lora_unet__", "lora_unet_", "lora_prior_unet_", "lora_transformer_", "lycoris_", "oft_unet_")
_COMPONENTS = ("text_conditioner.",)  # diffusers keeps these beside the transformer


class Place(NamedTuple):
    """A layer, or a ``slice`` of its weight: (dimension, start, length).

    ``swapped``: the name stands for the rows with their two halves the other way round (diffusers wants the scale
    before the shift), so what is read from the file under it must be exchanged in the same way.
    """

    path: str
    slice: tuple[int, int, int] | None = None
    swapped: bool = False


class NameTable:
    """Names of the layers of one model, of its text encoders, or of both.

    ``shapes`` maps canonical paths to the shapes of the weights, all of them: the family is told from the paths, the
    slices of fused layers from the shapes. Without any, nothing is found, and a reader keeps the raw names.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]) -> None:
        self.shapes = {path: tuple(shape) for path, shape in shapes.items()}
        self.text = TextNames(encoder_layers(self.shapes))
        text = set(self.text.paths)
        self._paths = {path.removeprefix(MODEL_PREFIX): path for path in self.shapes if path not in text}
        local = {name: self.shapes[path] for name, path in self._paths.items()}
        self.layout = sd_unet_layout(local)
        family = None if self.layout else family_of(local)
        self._kohya_prefix = family.kohya if family else "lora_unet_"
        self._bfl = family is not None and family.bfl
        if self.layout:
            kind = _unet_kind(self.layout, local)
            self._diffusers = _of_unet(diffusers_paths(self.layout), local)
            aliases = [{name: list(_respelled(parts)) for name, parts in self._diffusers.items()}]
        else:
            kind = family.name if family else ""
            self._diffusers = spelled(family.diffusers, local) if family and family.diffusers else {}
            aliases = [spelled(table, local) for table in (family.aliases if family else ())]
        self.architecture: str | None = kind or None
        ours = {name: Place(path) for name, path in self._paths.items()}
        for name, place in list(ours.items()):  # the norms of Flux, which newer hosts call as other norms
            if name.endswith("_norm"):
                ours.setdefault(name + ".scale", place)
        theirs: dict[str, Place] = {}
        for table in (self._diffusers, *aliases):
            for name, parts in table.items():
                for part in parts:
                    theirs.setdefault(part.name, self._place(name, part))
        self._dotted = ours, theirs
        self._flat = _flattened(ours), _flattened(theirs)

    @classmethod
    def of(cls, module_tree: nn.Module) -> NameTable:
        """The table of a loaded model, or of the text encoders of a loaded CLIP."""
        return cls(layer_shapes(module_tree))

    def find(self, name: str) -> Place | None:
        """What an accepted spelling means, None if nothing in this model is called so."""
        name = name.replace(_WRAPPER, "", 1)
        if name in self.text.found:
            return Place(self.text.found[name])
        for prefixes, tables in ((_FLAT, self._flat), ((*_DOTTED, ""), self._dotted)):
            for prefix in prefixes:
                if name.startswith(prefix):
                    ours, theirs = tables
                    first, second = (theirs, ours) if prefix in _THEIRS else (ours, theirs)
                    local = name.removeprefix(prefix)
                    if local in first or local in second:
                        return first.get(local) or second.get(local)
        return None

    def spelled(self) -> dict[str, str]:
        """Every spelling, without prefixes of components and with "_" for ".", → the canonical path."""
        text = {name.replace(".", "_"): path for name, path in self.text.found.items()}
        ours, theirs = self._flat
        return text | {name: place.path for name, place in (theirs | ours).items()}

    def whole(self, name: str) -> str | None:
        """Canonical path of the layer that a name means; None also where it means only a part of one."""
        place = self.find(name)
        return place.path if place is not None and place == Place(place.path) else None

    def write(self, place: Place | str, dialect: str = "native") -> str:
        """The one name of a place. Raises ValueError where ``dialect`` has none, or holds it in another shape."""
        names = self.parts(place, dialect)
        if [place for _, place in names] != [Place(place) if isinstance(place, str) else place]:
            listed = ", ".join(name for name, _ in names)
            raise ValueError(f"{_described(place)}: not held as it is in {dialect} files, but as {listed}")
        return names[0][0]

    def parts(self, place: Place | str, dialect: str = "native") -> list[tuple[str, Place]]:
        """The names that together stand for a place, and the place of each. Raises ValueError if there are none.

        The place of a name may be ``swapped`` where the given one is not.
        """
        if dialect not in DIALECTS:
            raise ValueError(f"there is no dialect {dialect!r}; choose one of {', '.join(DIALECTS)}")
        place = Place(place) if isinstance(place, str) else place
        if place.path not in self.shapes:
            raise ValueError(f"{place.path}: not a layer of this model")
        local = place.path.removeprefix(MODEL_PREFIX)
        if dialect == "diffusers" and local in self._paths:
            found = self._in_diffusers(local, place)
        elif place.slice is not None or place.swapped:
            found = []  # only diffusers has names for parts of what the host holds in one
        else:
            name = self._whole_name(local, dialect) if local in self._paths else self.text.write(place.path, dialect)
            found = [] if name is None else [(name, place)]
        if not found:
            raise ValueError(f"{_described(place)}: has no name in {dialect}")
        return found

    def _whole_name(self, local: str, dialect: str) -> str | None:
        if dialect == "native":
            dialect = "kohya" if self.layout else "host"
        if dialect == "host":
            return MODEL_PREFIX + local
        if dialect == "bfl":
            return (local + ".scale" if local.endswith("_norm") else local) if self._bfl else None
        if self.layout and not self.layout.sdxl:
            parts = self._diffusers.get(local)
            if not parts:
                return None
            local = parts[0].name
        return self._kohya_prefix + local.replace(".", "_")

    def _in_diffusers(self, local: str, place: Place) -> list[tuple[str, Place]]:
        """The parts inside ``place``, if together they are all of it."""
        component = "unet." if self.layout else "transformer."
        rows = next(iter(self.shapes[place.path]), 1)
        first, count = place.slice[1:] if place.slice else (0, rows)
        found = []
        for part in self._diffusers.get(local, ()):
            name = part.name if part.name.startswith(_COMPONENTS) else component + part.name
            start, length = part.rows or (0, rows)
            if first <= start and start + length <= first + count:
                found.append((name, self._place(local, part)))
                count -= length
                first += length
        return found if count == 0 and (place.slice is None or place.slice[0] == 0) else []

    def _place(self, local: str, part: Part) -> Place:
        return Place(self._paths[local], (0, *part.rows) if part.rows else None, part.swapped)


def layer_shapes(module_tree: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical path -> shape, for the weights and all other parameters and tables of a loaded model.

    The shape of a linear layer is that of what it computes: a quantised one may hold its weight packed.
    """
    root, prefix = diffusion_tree(module_tree)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        own, path = module._parameters, prefix + name  # named_parameters takes longer than all the rest
        weight = own.get("weight")
        if weight is None and not isinstance(module, nn.Sequential | nn.ModuleList):
            weight = getattr(module, "weight", None)  # not always a parameter
        if weight is not None:
            shapes[path] = (module.out_features, module.in_features) if is_linear(module) else tuple(weight.shape)
        for held in (own, module._buffers):
            for key, value in held.items():
                if key != "weight" and value is not None:
                    shapes[f"{path}.{key}" if name else prefix + key] = tuple(value.shape)
    return shapes


def _unet_kind(layout: UNetLayout, local: Mapping[str, Sequence[int]]) -> str:
    if not layout.sdxl:
        return "sd"
    refiner = any(path.endswith("attn2.to_k") and shape[1] == 1280 for path, shape in local.items())
    return "sdxl_refiner" if refiner else "sdxl"  # the refiner reads the text of CLIP-G alone


def _of_unet(diffusers: Mapping[str, str], local: Mapping[str, Sequence[int]]) -> dict[str, list[Part]]:
    return {path: [Part(name, None, False)] for path, name in diffusers.items() if path in local}


def _respelled(parts: Sequence[Part]) -> list[Part]:
    return [Part(name, part.rows, part.swapped) for part in parts for name in diffusers_spellings(part.name)]


def _flattened(names: Mapping[str, Place]) -> dict[str, Place]:
    flat: dict[str, Place] = {}
    for name, place in names.items():
        flat.setdefault(name.replace(".", "_"), place)
    return flat


def _described(place: Place | str) -> str:
    if isinstance(place, str) or place.slice is None:
        return place if isinstance(place, str) else place.path
    return f"{place.path}[{place.slice[1]}:{place.slice[1] + place.slice[2]}]"
