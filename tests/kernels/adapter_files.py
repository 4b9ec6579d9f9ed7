"""Models to read adapter files for, as tables of shapes, and adapters to put into files."""

import torch

from lora_loom.kernels.dialects_unet import UNetLayout, diffusers_paths

SD1 = UNetLayout((2, 2, 2, 2), (1, 1, 1, 1, 1, 1, 0, 0), 1, (0, 0, 0, *([1] * 9)), sdxl=False)
PREFIX = "diffusion_model."
CLIP = {
    f"clip_l.transformer.text_model.encoder.layers.{n}.{leaf}": (6, 6)
    for n in range(2)
    for leaf in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")
}
KEY = "input_blocks.1.1.transformer_blocks.0.attn1.to_k"
CONV = "input_blocks.1.0.in_layers.2"


def unet():
    """The layers of SD1's UNet, all linear but one."""
    paths = [path for path in diffusers_paths(SD1) if not path.startswith("label_emb")]
    return {PREFIX + path: (6, 4) for path in paths} | {PREFIX + CONV: (6, 4, 3, 3)}


def flux(hidden=8, doubles=2, singles=2):
    """A Flux of a few blocks."""
    shapes = {"img_in": (hidden, 4), "txt_in": (hidden, 4), "final_layer.adaLN_modulation.1": (2 * hidden, hidden)}
    for n in range(doubles):
        for stream in ("img", "txt"):
            shapes |= {
                f"double_blocks.{n}.{stream}_attn.qkv": (3 * hidden, hidden),
                f"double_blocks.{n}.{stream}_attn.proj": (hidden, hidden),
                f"double_blocks.{n}.{stream}_attn.norm.query_norm.scale": (4,),
                f"double_blocks.{n}.{stream}_mlp.0": (4 * hidden, hidden),
            }
    for n in range(singles):
        shapes |= {
            f"single_blocks.{n}.linear1": (7 * hidden, hidden),
            f"single_blocks.{n}.linear2": (hidden, 5 * hidden),
        }
    return {PREFIX + path: shape for path, shape in shapes.items()}


def pair(shape, rank=2, seed=0):
    """(down, up) for a weight of ``shape``."""
    draws = torch.Generator().manual_seed(seed)
    down = torch.randn((rank, *shape[1:]), generator=draws)
    return down, torch.randn((shape[0], rank, *(1 for _ in shape[2:])), generator=draws)


def product(down, up, scale=1.0):
    """scale · up · down"""
    return (scale * up.flatten(1).double() @ down.flatten(1).double()).view(len(up), *down.shape[1:])


def lora(name, shape, rank=2, alpha=None, down=".lora_down.weight", up=".lora_up.weight", seed=0):
    """The keys of one layer."""
    factors = pair(shape, rank, seed)
    keys = {name + down: factors[0], name + up: factors[1]}
    return keys if alpha is None else keys | {name + ".alpha": torch.tensor(alpha)}


def close(adapter, shape, wanted):
    """Whether the adapter's difference on some weight of ``shape`` is ``wanted``."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    got = adapter.merged(weight) - weight
    return torch.allclose(got, wanted.double(), rtol=1e-5, atol=1e-6)
