"""Train the demo base model from nothing and write it as one checkpoint file a stock loader opens.

``python dev/demo_base/train_base.py`` takes about an hour on two cores. It saves its state every few minutes and goes
on from there when started again. The data are drawn as they are needed (``drawings.py``); the network is the host's
UNet and CLIP; the objective is rectified flow on pixels with logit-normal times; what is kept is an exponential
moving average of the weights, in half precision.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))
sys.path.insert(0, (ROOT / ".dev" / "host-path").read_text())

import numpy as np  # noqa: E402
import torch  # noqa: E402

import run_host  # noqa: E402

run_host.prepare_imports()
import comfy.options  # noqa: E402

comfy.options.args_parsing = False
from comfy.cli_args import args as host_args  # noqa: E402

host_args.cpu = True
host_args.use_pytorch_cross_attention = True
import comfy.ops  # noqa: E402
import comfy.sd1_clip  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import host_extension  # noqa: E402
from drawings import BACKGROUNDS, KNOWN_CLASSES, caption, draw  # noqa: E402

SIZE = 32
BATCH = 32
STEPS = 2600
LEARNING_RATE = 1.5e-3
WARM_UP = 100
EMA = 0.998
CAPTION_DROPOUT = 0.1
OUTPUT = HERE / "loom-demo-base.safetensors"
UNET = {
    "image_size": SIZE,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 0, 1],
    "transformer_depth_output": [0, 0, 0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": host_extension.TEXT_WIDTH,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_resblock": False,
    "use_temporal_attention": False,
    "legacy": False,
}


def build() -> torch.nn.ModuleDict:
    """The host's network and text encoder, with freshly drawn weights (the host leaves them uninitialised)."""
    config = host_extension.DemoBase(dict(UNET))
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.disable_weight_init
    unet = config.get_model({}, "").diffusion_model
    clip = comfy.sd1_clip.SDClipModel(
        dtype=torch.float32,
        model_options={
            "model_name": "clip_l",
            "clip_l_model_config": host_extension.CLIP_CONFIG,
            "custom_operations": comfy.ops.disable_weight_init,
        },
    )
    for module in [*unet.modules(), *clip.modules()]:
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            fan_in = module.weight[0].numel()
            torch.nn.init.trunc_normal_(module.weight, std=fan_in**-0.5)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.5)
        elif isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
    for block in unet.modules():  # residual branches and the output start at zero, as in the original UNet
        if hasattr(block, "out_layers"):
            torch.nn.init.zeros_(block.out_layers[-1].weight)
        if hasattr(block, "proj_out"):
            torch.nn.init.zeros_(block.proj_out.weight)
    torch.nn.init.zeros_(unet.out[-1].weight)
    return torch.nn.ModuleDict({"unet": unet, "clip": clip}).requires_grad_(True)


class Captions:
    """Tokenises each of the few captions once; index 0 is the empty caption."""

    def __init__(self) -> None:
        tokenizer = comfy.sd1_clip.SD1Tokenizer()
        self.things = [(thing, background) for thing in KNOWN_CLASSES for background in BACKGROUNDS]
        texts = ["", *(caption(*thing) for thing in self.things)]
        self.tokens = [[pair[0] for pair in tokenizer.tokenize_with_weights(text)["l"][0]] for text in texts]


def make_batch(step: int, captions: Captions) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (B, 3, S, S) in [-1, 1] and caption indices (B,), a pure function of ``step``."""
    rng = random.Random(step)
    pixels, labels = [], []
    for _ in range(BATCH):
        which = rng.randrange(len(captions.things))
        picture = draw(*captions.things[which], SIZE, rng)
        pixels.append(np.asarray(picture, dtype=np.float32) / 127.5 - 1.0)
        labels.append(0 if rng.random() < CAPTION_DROPOUT else which + 1)
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def learning_rate(step: int) -> float:
    warm = min(1.0, (step + 1) / WARM_UP)
    return LEARNING_RATE * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / STEPS)))


def write_checkpoint(weights: dict[str, torch.Tensor], path: Path) -> None:
    """One file in the layout of a Stable Diffusion checkpoint; written aside, then moved into place."""
    tensors = {"first_stage_model.pixel_space_vae": torch.tensor(1.0)}
    for name, value in weights.items():
        part, rest = name.split(".", 1)
        if part == "unet":
            tensors[f"model.diffusion_model.{rest}"] = value.half().contiguous()
        elif rest.startswith("transformer.") and "text_projection" not in rest:
            tensors[f"cond_stage_model.{rest}"] = value.half().contiguous()
    aside = path.with_suffix(".tmp")
    save_file(tensors, aside, metadata={"format": "pt", "modelspec.title": "LoRA Loom demo base"})
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--state", type=Path, default=ROOT / ".dev" / "demo-base-state.pt")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()

    torch.manual_seed(0)
    captions = Captions()
    model = build()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    start = 0
    if options.state.exists():
        saved = torch.load(options.state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average, start = saved["average"], saved["step"]
    began, running = time.time(), 0.0
    for step in range(start, STEPS):
        pixels, labels = make_batch(step, captions)
        draws = torch.Generator().manual_seed(step)
        noise = torch.randn(pixels.shape, generator=draws)
        times = torch.sigmoid(torch.randn(BATCH, generator=draws))
        sigma = times[:, None, None, None]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():  # the host's CLIP adds in place
            contexts, _ = model["clip"](captions.tokens)
            output = model["unet"]((1 - sigma) * pixels + sigma * noise, times * 1000.0, context=contexts[labels])
            loss = torch.nn.functional.mse_loss(output, noise - pixels)
            optimizer.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            average[name].lerp_(value.to(average[name].dtype), 1 - decay)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            pace = (time.time() - began) / (step + 1 - start)
            sys.stdout.write(f"step {step + 1}/{STEPS}  loss {running:.4f}  {pace:.2f} s/step\n")
            sys.stdout.flush()
        if (step + 1) % 200 == 0 or step + 1 == STEPS:
            aside = options.state.with_suffix(".tmp")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "average": average,
                    "step": step + 1,
                },
                aside,
            )
            aside.replace(options.state)
            write_checkpoint(average, options.output)


if __name__ == "__main__":
    main()
