"""What block weights need of a model, read from its module tree or from the keys of a LoRA file.

* ``Layout``: the blocks and the paths of all layers, norms, biases and raw parameters among them; no weights.
* ``KINDS``: what layers do, by the names that rules use, and ``Layout.of_kind``: the paths of such layers.

Kinds are read from paths below the block, so they are the same for every architecture: ``kernels.layers.kind_of``
says what is attention and feed-forward, the rest is here. A path can be of several kinds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from ..block_names import BASE
from ..blocks import MODEL_PREFIX, Block, BlockIndex, block_map
from ..layers import kind_of
from ..names import layer_shapes

KINDS: dict[str, str] = {
    "attn": "attention, its norms included; in Flux' single blocks the layers that hold it together with the MLP",
    "ff": "feed-forward layers (also: mlp)",
    "mod": "what lets time and pooled text act on a block: modulation, the embedding's layer of a ResNet",
    "norm": "norms",
    "img": "the picture's stream of blocks with two streams",
    "txt": "the text's stream of such blocks",
    "qkv": "query, key and value, together or apart",
    "q": "query, where it has a layer of its own",
    "k": "key, likewise",
    "v": "value, likewise",
    "o": "the projection out of attention (behind a slash also: out)",
}
ALIASES = {"mlp": "ff", "attention": "attn"}
_NORM = re.compile(r"norm|(?:^|[._])ln(?:_|\d|$)")
_GROUP_NORM = re.compile(r"(?:^|\.)(?:in|out)_layers\.0$")
_MOD = re.compile(
    r"(?:^|[._])mod(?:[A-Z]\w*|_[xy])?(?:\.|$)|(?i:modulation)|adaln_single|scale_shift_table"
    r"|(?:^|\.)norm\d?\.linear$|(?:^|\.)emb_layers\."
)
_TXT = re.compile(
    r"(?:^|\.)(?:txt_|context_block\.|mlpC\.|modC\.|ff_t\.)|^attn\.(?:add_[qkv]_proj|to_add_out|norm_added_[qkv])"
    r"|_[ty](?=\.|$)"
)
_TXT_OF_AURA = re.compile(r"^attn\.w1[qkvo]$")  # only where there is a second stream; else it is all there is
_OF_BOTH = re.compile(r"^block\.adaLN_modulation\.")
_NUMBERS = re.compile(r"(?:\.\d+)+$")
_PROJECTIONS = {
    **{
        letter: re.compile(rf"(?:to_|add_|linear_|w\d?)?{letter}(?:{rest})?(?:_proj|_linear|_t|_img)?")
        for letter, rest in (("q", "uery"), ("k", "ey"), ("v", "alue"))
    },
    "fused": re.compile(r"W?qkv(?:_[xy])?|kv_(?:linear|proj)"),
    "o": re.compile(r"to_(?:add_)?out(?:_t)?|proj(?:_[xy])?|w\d?o|o|o(?:ut|utput)?_proj|out|out_layer|linear_out"),
}


@dataclass(frozen=True)
class Layout:
    """``blocks`` in the model's order; ``paths``: canonical ones, of layers and of parameters by other names."""

    blocks: tuple[Block, ...]
    paths: tuple[str, ...]

    @classmethod
    def of(cls, module_tree: nn.Module) -> Layout:
        """Of a loaded model, or of its diffusion model alone."""
        return cls(tuple(block_map(module_tree)), tuple(layer_shapes(module_tree)))

    @cached_property
    def block_of(self) -> dict[str, str]:
        """path → id of its block, ``BASE`` where it lies in none."""
        index = BlockIndex(self.blocks)
        found = ((path, index.of(path)) for path in self.paths)
        return {path: block.id if block else BASE for path, block in found}

    @cached_property
    def local(self) -> dict[str, str]:
        """path → what people write of it: in small letters, without "diffusion_model."."""
        return {path: path.removeprefix(MODEL_PREFIX).lower() for path in self.paths}

    def inside(self, ids: Iterable[str]) -> frozenset[str]:
        """The paths that lie in these blocks; ``BASE`` is an id as well."""
        ids = set(ids)
        return frozenset(path for path, block in self.block_of.items() if block in ids)

    def of_kind(self, kind: str) -> frozenset[str]:
        """The paths of a kind in ``KINDS``, inside and outside of blocks."""
        return self._by_kind.get(kind, frozenset())

    @property
    def kinds(self) -> tuple[str, ...]:
        """Those that this model has."""
        return tuple(kind for kind in KINDS if self.of_kind(kind))

    @cached_property
    def _by_kind(self) -> dict[str, frozenset[str]]:
        found: dict[str, set[str]] = {kind: set() for kind in KINDS}
        known = set(self.paths)
        local = {path: self._below(path, known) for path in self.paths}
        two_streams = {self.block_of[path] for path, name in local.items() if _TXT.search(name)} - {BASE}
        for path, name in local.items():
            block = self.block_of[path]
            for kind in _kinds(path.removeprefix(MODEL_PREFIX), name, _owner(path, known)):
                found[kind].add(path)
            if block in two_streams and not _OF_BOTH.search(name):
                found["txt" if _TXT.search(name) or _TXT_OF_AURA.search(name) else "img"].add(path)
        return {kind: frozenset(paths) for kind, paths in found.items()}

    def _below(self, path: str, known: set[str]) -> str:
        """The name of the layer that a path belongs to, below its block."""
        local = _owner(path, known).removeprefix(MODEL_PREFIX)
        block = self.block_of[path]
        return local if block == BASE else local.removeprefix(block).removeprefix(".")


def _owner(path: str, known: set[str]) -> str:
    """The layer that a bias or another parameter belongs to."""
    parent = path.rpartition(".")[0]
    return parent if parent in known else path


def _kinds(path: str, name: str, owner: str) -> Iterable[str]:
    """What a layer does; ``name`` is its path below the block."""
    if _MOD.search(name) and not name.endswith("_ln"):
        yield "mod"
        return
    segments = owner.split(".")
    is_norm = bool(_NORM.search(name) or _GROUP_NORM.search(name))
    if is_norm:
        yield "norm"
    what = kind_of(".".join(segment for segment in segments if not _NORM.search(segment)))
    if what == "mlp" and not is_norm:
        yield "ff"
    if what != "attention":
        return
    yield "attn"
    leaf = _NUMBERS.sub("", name).rpartition(".")[2]
    fits = [letter for letter, pattern in _PROJECTIONS.items() if pattern.fullmatch(leaf)]
    for letter in fits if not is_norm else ():
        if letter != "fused":
            yield letter
        if letter != "o":
            yield "qkv"
