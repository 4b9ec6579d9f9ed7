"""Wan 2.2 as the files its workflow names, so small that a processor runs it: two transformers, UMT5 and the VAE.

The host finds everything in the files but the sizes of UMT5, which it has in a table of its own: ``NARROW`` is a host
extension (a file in ``custom_nodes``) that gives UMT5 the tiny file's.
"""

from __future__ import annotations

import io
from pathlib import Path

import comfy.ldm.wan.model
import comfy.ldm.wan.vae
import comfy.ops
import comfy.text_encoders.t5
import sentencepiece
import torch
from safetensors.torch import save_file

from drawings import BACKGROUNDS, CLASSES, caption
from tiny import NEWER, fill

UMT5 = {"num_layers": 1, "num_decoder_layers": 1, "d_ff": 32, "d_kv": 32, "num_heads": 2, "vocab_size": 60}
NARROW = f"""
import comfy.text_encoders.wan

SIZES = {UMT5!r}


class Narrow(comfy.text_encoders.wan.UMT5XXlModel):
    def __init__(self, *arguments, model_options={{}}, **rest):
        options = {{**model_options, "model_name": "umt5xxl", "umt5xxl_model_config": SIZES}}
        super().__init__(*arguments, model_options=options, **rest)


comfy.text_encoders.wan.UMT5XXlModel = Narrow
NODE_CLASS_MAPPINGS = {{}}
"""
TABLE = {  # of the host's own file
    **{"d_model": 4096, "dense_act_fn": "gelu_pytorch_tanh", "is_gated_act": True, "model_type": "umt5"},
    **{"layer_norm_epsilon": 1e-6, "relative_attention_num_buckets": 32},
}
# by which the host knows the XXL encoder: older ones by its width, newer ones by its height
WIDE, SHAPE = "encoder.block.23.layer.1.DenseReluDense.wi_1.weight", (10240, 1) if NEWER else (1, 4096)
OPERATIONS = comfy.ops.disable_weight_init


def write(models: Path, high: str, low: str, encoder: str, vae: str) -> None:
    """The four files into their folders below ``models``."""
    for seed, name in enumerate((high, low)):
        _save(_transformer(seed), models / "diffusion_models" / name)
    _save(_encoder(), models / "text_encoders" / encoder)
    _save(_vae(), models / "vae" / vae)


def _transformer(seed: int) -> dict[str, torch.Tensor]:
    sizes = {"dim": 128, "ffn_dim": 64, "num_heads": 1, "num_layers": 2}
    return fill(comfy.ldm.wan.model.WanModel(**sizes, operations=OPERATIONS), seed).state_dict()


def _encoder() -> dict[str, torch.Tensor]:
    written = io.BytesIO()
    sentences = [caption(thing, paper) for thing in CLASSES for paper in BACKGROUNDS] + ["blurry"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=written,
        vocab_size=UMT5["vocab_size"],
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    network = comfy.text_encoders.t5.T5({**TABLE, **UMT5}, torch.float32, "cpu", OPERATIONS)
    pieces = torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)
    return {**fill(network).state_dict(), WIDE: torch.zeros(SHAPE), "spiece_model": pieces}


def _vae() -> dict[str, torch.Tensor]:
    sizes = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_scales": []}
    network = comfy.ldm.wan.vae.WanVAE(**sizes, temperal_downsample=[False, True, True], dropout=0.0)
    return fill(network).state_dict()


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().clone().contiguous() for name, value in weights.items()}, path)
