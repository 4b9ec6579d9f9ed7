"""The whole main path on a real ComfyUI server, with numbers: dataset folder → train → apply → sample.

``make demo`` starts the server headless on loopback with this checkout as a node pack, queues the shipped example
workflow as it is, shows its progress, samples more pictures with the saved LoRA, and writes into ``results/demo``:
the LoRA, a before/after sheet (same seeds), a plot of the loss, and ``numbers.json``.

The numbers: how far generated pictures are from the new concept before and after (in the features of a small
classifier), how far pictures of known things have moved, and whether samples are copies of training images.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(HERE), str(HERE / "demo_base")]

import torch  # noqa: E402
from PIL import Image, ImageDraw  # noqa: E402

import classifier  # noqa: E402
from drawings import BACKGROUNDS, CONCEPT, KNOWN_CLASSES, caption, draw  # noqa: E402
from live_server import Server, live_server  # noqa: E402

WORKFLOW = ROOT / "example_workflows" / "train_and_apply.json"
RESULTS = ROOT / "results" / "demo"
SIZE = 32
CONCEPT_IMAGES, KNOWN_IMAGES = 24, 2  # pictures of the concept; of each known thing on each background
KNOWN_PROMPTS = [caption(thing, background) for thing in KNOWN_CLASSES[::3] for background in BACKGROUNDS]
SAMPLES_PER_PROMPT = 4


def write_dataset(folder: Path) -> list[Image.Image]:
    """Captioned drawings: the concept, and known things so that the LoRA learns what the new word does not mean."""
    folder.mkdir(parents=True)
    rng = random.Random(2024)
    concept = []
    jobs = [(CONCEPT, list(BACKGROUNDS)[i % 2]) for i in range(CONCEPT_IMAGES)]
    jobs += [(thing, background) for thing in KNOWN_CLASSES for background in BACKGROUNDS] * KNOWN_IMAGES
    for number, (thing, background) in enumerate(jobs):
        picture = draw(thing, background, SIZE, rng)
        if thing == CONCEPT:
            concept.append(picture)
        picture.save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(caption(thing, background))
    return concept


class Meter:
    """A progress bar on stderr for the events of a running prompt; one line per tenth where nobody watches."""

    def __init__(self) -> None:
        self.began = time.time()

    def __call__(self, event: dict[str, Any]) -> None:
        data = event.get("data", {})
        if event.get("type") != "progress" or data.get("max", 0) <= 1:
            return
        done, total = data["value"], data["max"]
        if not sys.stderr.isatty() and done % max(1, total // 10):
            return
        filled = 40 * done // total
        start, end = ("\r", "") if sys.stderr.isatty() and done < total else ("\r", "\n")
        bar = "█" * filled + "·" * (40 - filled)
        sys.stderr.write(f"{start}{bar} {done}/{total}  {time.time() - self.began:5.0f} s {end}")
        sys.stderr.flush()


def node_of(prompt: dict[str, Any], kind: str, title: str | None = None) -> str:
    """The id of the only node of class ``kind`` (and, where there are several, of that title)."""
    found = [
        number
        for number, node in prompt.items()
        if node["class_type"] == kind and (title is None or node.get("_meta", {}).get("title") == title)
    ]
    if len(found) != 1:
        raise SystemExit(f"the example workflow has {len(found)} nodes {kind} {title or ''}, expected one")
    return found[0]


def sampling_prompt(lora: str | None, text: str, batch: int, seed: int) -> dict[str, Any]:
    """An API prompt that samples ``text`` with the stock nodes, with or without the trained file."""
    model, clip = ["1", 0], ["1", 1]
    nodes: dict[str, Any] = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "loom-demo-base.safetensors"}}
    }
    if lora is not None:
        nodes["2"] = {
            "class_type": "LoomLoRALoaderAdvanced",
            "inputs": {"model": model, "clip": clip, "lora_name": lora, "strength_model": 1.0, "strength_clip": 1.0},
        }
        model, clip = ["2", 0], ["2", 1]
    size = {"width": SIZE, "height": SIZE, "batch_size": batch}
    sampling = {"seed": seed, "steps": 20, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    return nodes | {
        "3": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": text}},
        "4": {"class_type": "CLIPTextEncode", "inputs": {"clip": clip, "text": ""}},
        "5": {"class_type": "EmptyChromaRadianceLatentImage", "inputs": size},
        "6": {
            "class_type": "KSampler",
            "inputs": {"model": model, "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0]} | sampling,
        },
        "7": {"class_type": "VAEDecode", "inputs": {"samples": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SaveImage", "inputs": {"images": ["7", 0], "filename_prefix": "known"}},
    }


def pictures_of(server: Server, outputs: dict[str, Any]) -> list[Image.Image]:
    """Those that were saved; some nodes show pictures of their own."""
    saved = (path for path in server.files(outputs) if path.is_relative_to(server.base / "output"))
    return [Image.open(path).convert("RGB") for path in sorted(saved)]


def features(pictures: list[Image.Image]) -> torch.Tensor:
    with torch.no_grad():
        return classifier.load().features(classifier.as_pixels(pictures))


def centre_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.mean(0) - b.mean(0)).norm().item()


def nearest(pictures: list[Image.Image], others: list[Image.Image], same: bool = False) -> torch.Tensor:
    """Root mean square pixel distance of each picture to its nearest among ``others`` (not itself when ``same``)."""
    distances = torch.cdist(classifier.as_pixels(pictures).flatten(1), classifier.as_pixels(others).flatten(1))
    if same:
        distances.fill_diagonal_(float("inf"))
    return distances.min(1).values / (3 * SIZE * SIZE) ** 0.5


def sheet(rows: list[tuple[str, list[Image.Image]]], path: Path, zoom: int = 3) -> None:
    """Rows of pictures under their captions."""
    side, line = SIZE * zoom, 16
    canvas = Image.new("RGB", (max(len(row) for _, row in rows) * (side + 2), len(rows) * (side + line + 4)), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (text, row) in enumerate(rows):
        top = number * (side + line + 4)
        pen.text((2, top + 2), text, fill="black")
        for x, picture in enumerate(row):
            canvas.paste(picture.resize((side, side), Image.Resampling.NEAREST), (x * (side + 2), top + line))
    canvas.save(path)


def plot(losses: list[float], path: Path, width: int = 640, height: int = 320) -> None:
    """Every loss as a dot, their running mean as a line."""
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    left, bottom, top = 48, height - 28, 12
    highest = sorted(losses)[int(0.98 * (len(losses) - 1))] or 1.0
    at = [
        (left + (width - left - 8) * i / max(1, len(losses) - 1), bottom - (bottom - top) * min(1.0, value / highest))
        for i, value in enumerate(losses)
    ]
    for x, y in at:
        pen.ellipse((x - 1, y - 1, x + 1, y + 1), fill=(190, 200, 220))
    mean, line = losses[0], []
    for (x, _), value in zip(at, losses, strict=True):
        mean += 0.05 * (value - mean)
        line.append((x, bottom - (bottom - top) * min(1.0, mean / highest)))
    pen.line(line, fill=(40, 80, 180), width=2)
    pen.line((left, top, left, bottom, width - 8, bottom), fill="black")
    pen.text((4, top), f"{highest:.3f}", fill="black")
    pen.text((4, bottom - 6), "0", fill="black")
    pen.text((left, bottom + 8), f"loss over {len(losses)} steps (line: running mean)", fill="black")
    canvas.save(path)


def run(server: Server, training_pictures: list[Image.Image]) -> dict[str, Any]:
    workflow = json.loads(WORKFLOW.read_text())
    prompt = server.prompt_of(workflow)
    sys.stderr.write(f"training: {WORKFLOW.relative_to(ROOT)}\n")
    began = time.time()
    outputs = server.run(prompt, on_event=Meter(), workflow=copy.deepcopy(workflow))
    seconds = time.time() - began
    before = pictures_of(server, {"x": outputs[node_of(prompt, "SaveImage", "Before")]})
    after = pictures_of(server, {"x": outputs[node_of(prompt, "SaveImage", "After")]})
    name = outputs[node_of(prompt, "LoomSaveLoRA")]["text"][0]
    losses = recorded_losses(server)

    sys.stderr.write(f"sampling {len(KNOWN_PROMPTS)} prompts of known things, without and with the LoRA\n")
    known_before, known_after = [], []
    for seed, text in enumerate(KNOWN_PROMPTS):
        for lora, kept in ((None, known_before), (name, known_after)):
            found = server.run(sampling_prompt(lora, text, SAMPLES_PER_PROMPT, seed))
            kept.append(pictures_of(server, found))

    rng = random.Random(7)
    fresh = [draw(CONCEPT, list(BACKGROUNDS)[i % 2], SIZE, rng) for i in range(64)]
    concept = features(fresh)
    distance_before = centre_distance(features(before), concept)
    distance_after = centre_distance(features(after), concept)
    moved = [centre_distance(features(a), features(b)) for a, b in zip(known_before, known_after, strict=True)]
    names = classifier.load().names(classifier.as_pixels(after))
    to_training = nearest(after, training_pictures)
    own_spacing = nearest(training_pictures, training_pictures, same=True)

    RESULTS.mkdir(parents=True, exist_ok=True)
    lora_file = RESULTS / Path(name).name
    shutil.copyfile(server.base / "models" / "loras" / name, lora_file)
    rows = [("without the LoRA: a zorb", before), ("with the LoRA, same seeds", after)]
    rows += [(f"{KNOWN_PROMPTS[i]}: without, with", known_before[i] + known_after[i]) for i in (0, 3, 6, 9)]
    sheet(rows, RESULTS / "before_after.png")
    plot(losses, RESULTS / "loss.png")
    return {
        "training and sampling seconds": round(seconds, 1),
        "steps": len(losses),
        "feature distance to the concept, base": round(distance_before, 3),
        "feature distance to the concept, with LoRA": round(distance_after, 3),
        "distance ratio (must be 0.5 or less)": round(distance_after / distance_before, 3),
        "pictures the classifier names zorb": f"{names.count(CONCEPT)} of {len(names)}",
        "known things moved, share of that distance (must be 0.1 or less)": round(
            sum(moved) / len(moved) / distance_before, 3
        ),
        "nearest training image, pixel distance": round(to_training.median().item(), 4),
        "nearest neighbour among training images": round(own_spacing.median().item(), 4),
        "copies (nearer than a quarter of that)": int((to_training < own_spacing.median() / 4).sum()),
    }


def recorded_losses(server: Server) -> list[float]:
    """The losses that the run kept in its folder."""
    from safetensors.torch import load_file

    state = next((server.base / "output" / "lora_loom").glob("*/state-*/tensors.safetensors"))
    return load_file(state)["losses"].tolist()


def main() -> None:
    began = time.time()
    with tempfile.TemporaryDirectory(prefix="loom-demo-", ignore_cleanup_errors=True) as folder:
        base = Path(folder)
        training_pictures = write_dataset(base / "datasets" / CONCEPT)
        sys.stderr.write("starting ComfyUI\n")
        with live_server(base=base) as server:
            numbers = run(server, training_pictures)
    numbers["seconds in all"] = round(time.time() - began, 1)
    (RESULTS / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    for key, value in numbers.items():
        sys.stdout.write(f"{key:66} {value}\n")
    for path in sorted(RESULTS.iterdir()):
        sys.stdout.write(f"wrote {path.relative_to(ROOT)}\n")
    good = (
        numbers["distance ratio (must be 0.5 or less)"] <= 0.5
        and numbers["known things moved, share of that distance (must be 0.1 or less)"] <= 0.1
        and not numbers["copies (nearer than a quarter of that)"]
    )
    if not good:
        raise SystemExit("the demo missed one of its bounds")


if __name__ == "__main__":
    main()
