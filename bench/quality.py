"""How many steps does a LoRA need? Ours, the host's own trainer and the usual script, each at its defaults.

The base is the demo's own small model (flow, 32 × 32 drawings, a text encoder of words); the new thing to learn is its
concept, from 24 captioned drawings, one a step. Measured is the mean square error of the base's own prediction on other
drawings of the concept, at fixed noise and five places of the trajectory, with the LoRA put on by the host's own
loader: the same judge for all. Wanted is the first step (on a grid, linearly between) at which that loss has fallen by
``--share`` of what a long reference run (the script's, at ten times its rate) reaches.

* ours: ``host.session.train``, all options as they are set out of the box
* native: ``TrainLoraNode``, all inputs as they are set out of the box
* script: a ``peft`` injection with what sd-scripts' guide gives: dim 16, alpha 1, AdamW, 1e-4, every linear layer and
  1×1 convolution of the spatial transformers, plain loss, uniform σ

    python bench/quality.py --seeds 5
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=600, help="after which a contestant is given up")
    parser.add_argument("--grid", type=int, default=20, help="steps between two looks")
    parser.add_argument("--share", type=float, default=0.5, help="part of the reference run's gain that is wanted")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=("ours", "native", "script"), default=("ours", "native", "script"))
    parser.add_argument("--plan", default="", help="JSON of options of ours, to try others: {\"learning_rate\": 3e-4}")
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    return parser.parse_args()


OPTIONS = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = str(OPTIONS.threads)
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(ROOT / "tests" / "host"), str(ROOT / "dev"), str(ROOT / "dev" / "demo_base")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import comfy.lora  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import numpy as np  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from comfy_extras import nodes_train  # noqa: E402
from torch import Tensor  # noqa: E402

import host_extension  # noqa: E402, F401 - the host learns to recognise the demo base
from drawings import BACKGROUNDS, CONCEPT, caption, draw  # noqa: E402
from lora_loom.host import record, session  # noqa: E402
from lora_loom.host.denoiser import Conditioning, HostDenoiser  # noqa: E402
from lora_loom.host.loan import borrow  # noqa: E402
from lora_loom.host.texts import encode_captions  # noqa: E402
from lora_loom.kernels.layers import select_targets  # noqa: E402
from lora_loom.kernels.safetensors_io import load_tensors  # noqa: E402
from lora_loom.training.dataset.model import Access, BucketOptions, Concept  # noqa: E402
from lora_loom.training.dataset.opening import open_dataset  # noqa: E402
from lora_loom.training.settings import Plan, plan_from_json  # noqa: E402

BASE = ROOT / "dev" / "demo_base" / "loom-demo-base.safetensors"
SIDE, TRAINED, JUDGED = 32, 24, 16
TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
Loss = Callable[[dict[str, Tensor] | None], float]


def drawings(count: int, seed: int) -> list[tuple[Any, str]]:
    rng = random.Random(seed)
    grounds = [list(BACKGROUNDS)[index % 2] for index in range(count)]
    return [(draw(CONCEPT, ground, SIDE, rng), caption(CONCEPT, ground)) for ground in grounds]


def as_latents(vae: Any, pictures: list[Any]) -> list[Tensor]:
    pixels = [torch.from_numpy(np.array(picture))[None].float() / 255 for picture in pictures]
    return [vae.encode(each).float().clone() for each in pixels]


class Judge:
    """The loss of a LoRA (None: of the base) on drawings that no contestant has seen."""

    def __init__(self, parts: Any) -> None:
        self.model, clip, vae = parts
        pictures, captions = zip(*drawings(JUDGED, 7), strict=True)
        texts = encode_captions(clip, captions)
        self.latents = [self.model.model.process_latent_in(latent) for latent in as_latents(vae, list(pictures))]
        sides = (SIDE, SIDE)
        self.conditioning = [Conditioning(*texts[text], sides, (0, 0), sides) for text in captions]

    def __call__(self, lora: dict[str, Tensor] | None) -> float:
        model = self.model if lora is None else comfy.sd.load_lora_for_models(self.model, None, dict(lora), 1.0, 0.0)[0]
        draws = torch.Generator().manual_seed(1234)
        total = 0.0
        with torch.inference_mode(False), borrow(model) as loan, torch.no_grad():
            denoiser = HostDenoiser(loan)
            kind = denoiser.prediction
            x0 = torch.cat([latent.clone() for latent in self.latents])
            for time_ in TIMES:
                noise = torch.randn(x0.shape, generator=draws)
                sigma = denoiser.noise_levels(torch.full((len(x0),), time_, dtype=torch.float64))
                output = denoiser.predict(kind.noisy(x0, noise, sigma), sigma, self.conditioning)
                total += (output - kind.target(x0, noise, sigma)).square().mean().item()
        return total / len(TIMES)


def parts_of_base() -> tuple[Any, Any, Any]:
    with torch.inference_mode():
        return comfy.sd.load_checkpoint_guess_config(str(BASE), output_vae=True, output_clip=True)[:3]


def ours(parts: Any, folder: Path, seed: int, steps: int, grid: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    concept = Concept(resolutions=((SIDE, SIDE),), buckets=BucketOptions(step=8))
    dataset = open_dataset(folder, concept, Access(allowed=lambda path: True, advice=str))
    options = {**json.loads(Plan().to_json()), **json.loads(OPTIONS.plan or "{}"), "length": steps, "seed": seed}
    options["run"] = {**options["run"], "save_every": grid}
    name = f"quality {seed} {time.time_ns()}"
    with torch.inference_mode():
        request = record.Request(*parts, dataset, plan_from_json(json.dumps(options)), name, "error")
        result = session.train(request)
    kept = sorted(Path(session.open_run(name, "continue").folder).glob("*-step*.safetensors"))
    for path in kept:
        yield int(path.stem.rpartition("step")[2]), load_tensors(path)
    yield steps, result.lora


def native(parts: Any, folder: Path, seed: int, steps: int, grid: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Every look is a run of its own: the node hands out nothing before its end."""
    model, clip, vae = parts
    pictures, captions = zip(*drawings(TRAINED, 3), strict=True)
    latents = [{"samples": latent} for latent in as_latents(vae, list(pictures))]
    positive = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in captions]
    node = nodes_train.TrainLoraNode
    values = {entry.id: [entry.default] for entry in node.define_schema().inputs if hasattr(entry, "default")}
    comfy.utils.PROGRESS_BAR_ENABLED = False
    for count in range(grid, steps + 1, grid):
        torch.manual_seed(seed)  # its seed leaves the first weights to chance
        fresh = parts_of_base()[0]
        fresh.cached_patcher_init = (lambda disable_dynamic=False: parts_of_base()[0], ())
        with torch.inference_mode():
            given = {"model": [fresh], "latents": latents, "positive": positive, "steps": [count], "seed": [seed]}
            outputs = node.execute(**{**values, **given, "existing_lora": ["[None]"]}).result
        found = next(output for output in outputs if isinstance(output, dict) and any("lora" in key for key in output))
        yield count, {key: value.detach().clone() for key, value in found.items()}


def script(
    parts: Any, folder: Path, seed: int, steps: int, grid: int, rate: float = 1e-4
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    model, clip, vae = parts_of_base()
    pictures, captions = zip(*drawings(TRAINED, 3), strict=True)
    latents = [model.model.process_latent_in(latent) for latent in as_latents(vae, list(pictures))]
    texts = encode_captions(clip, captions)
    with torch.inference_mode(False):
        network = copy.deepcopy(model.model.diffusion_model)
        network.load_state_dict({key: value.clone() for key, value in network.state_dict().items()}, assign=True)
        targets = select_targets(model.model, "attention+MLP", False)
        names = [target.path.removeprefix("diffusion_model.") for target in targets]
        torch.manual_seed(seed)
        network = peft.inject_adapter_in_model(peft.LoraConfig(r=16, lora_alpha=1, target_modules=names), network)
        parameters = {name: value for name, value in network.named_parameters() if "lora_" in name}
        optimizer = torch.optim.AdamW(parameters.values(), lr=rate)
        order, draws = random.Random(seed), torch.Generator().manual_seed(seed)
        queue: list[int] = []
        multiplier = model.get_model_object("model_sampling").multiplier
        for step in range(1, steps + 1):
            queue = queue or order.sample(range(TRAINED), TRAINED)
            index = queue.pop()
            x0, context = latents[index].clone(), texts[captions[index]][0]
            noise, sigma = torch.randn(x0.shape, generator=draws), torch.rand(1, generator=draws)
            output = network((1 - sigma) * x0 + sigma * noise, sigma * multiplier, context=context)
            torch.nn.functional.mse_loss(output, noise - x0).backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % grid == 0:
                yield step, as_file(parameters)


def as_file(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    lora = {}
    for name, value in parameters.items():
        path, _, part = name.partition(".lora_")
        end = {"A": "lora_down", "B": "lora_up"}[part[0]]
        lora[f"diffusion_model.{path}.{end}.weight"] = value.detach().clone()
        lora[f"diffusion_model.{path}.alpha"] = torch.tensor(1.0)
    return lora


def first_below(curve: list[tuple[int, float]], wanted: float) -> float | None:
    for (step, loss), (next_step, next_loss) in zip(curve, curve[1:], strict=False):
        if next_loss <= wanted:
            return step + (next_step - step) * (loss - wanted) / (loss - next_loss) if loss > wanted else step
    return None


def main() -> None:
    torch.set_num_threads(OPTIONS.threads)
    folder = Path(tempfile.mkdtemp(prefix="loom-quality-")) / "concept"
    folder.mkdir()
    for number, (picture, text) in enumerate(drawings(TRAINED, 3)):
        picture.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(text)
    parts = parts_of_base()
    judge = Judge(parts)
    base = judge(None)
    reference = min(judge(lora) for _, lora in script(parts, folder, 999, OPTIONS.steps, 100, rate=1e-3))
    wanted = base - OPTIONS.share * (base - reference)
    print(f"base {base:.5f}, reference {reference:.5f}, wanted {wanted:.5f}", flush=True)
    found: dict[str, list[float | None]] = {name: [] for name in OPTIONS.only}
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in OPTIONS.only}
    for seed in range(1, OPTIONS.seeds + 1):
        for name in OPTIONS.only:
            curve = [(0, base)]
            for step, lora in {"ours": ours, "native": native, "script": script}[name](
                parts, folder, seed, OPTIONS.steps, OPTIONS.grid
            ):
                curve.append((step, judge(lora)))
                if curve[-1][1] <= wanted and name != "ours":
                    break
            curves[name].append(curve)
            found[name].append(first_below(curve, wanted))
            shown = " ".join(f"{step}:{loss:.4f}" for step, loss in curve[:: max(1, len(curve) // 8)])
            print(f"seed {seed} {name:7s} {found[name][-1]} | {shown}", flush=True)
    if not OPTIONS.no_write:
        write(base, reference, wanted, found, curves)


def write(base: float, reference: float, wanted: float, found: Any, curves: Any) -> None:
    results = HERE / "results"
    facts = {"base": base, "reference": reference, "wanted": wanted, "steps": found, "curves": curves}
    (results / "quality.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        "# Steps to a held-out loss",
        "",
        f"Base {base:.5f}, wanted {wanted:.5f} ({OPTIONS.share:.0%} of what a long run of the script at ten times its "
        f"rate gains, {reference:.5f}). {OPTIONS.seeds} seeds; given up after {OPTIONS.steps} steps.",
        "",
        "| | median | each seed |",
        "|---|---|---|",
    ]
    for name, steps in found.items():
        ordered = sorted(float("inf") if step is None else step for step in steps)
        each = ", ".join(_shown(step) for step in steps)
        lines.append(f"| {name} | {_shown(ordered[len(ordered) // 2])} | {each} |")
    (results / "quality.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _shown(step: float | None) -> str:
    return f"> {OPTIONS.steps}" if step is None or step == float("inf") else f"{step:.0f}"


if __name__ == "__main__":
    main()
