"""Datasets: pictures made ready beside sd-scripts' way, the host's nodes and plain Pillow; opening, lint, epochs.

``python bench/data.py`` prints tables and writes bench/results/data.md and data.json; with ``--only`` the other tables
of these files stay as they are.

The pictures are photographs of scikit-image and scikit-learn, enlarged and with a sensor's noise, so that files have a
camera's size. All contestants of a row take turns in one process with one thread; figures are process CPU time per
picture, the ratio is the median of the ratios within a round. *decode only* is what Pillow needs for the file alone,
at full size: with the same decoder nobody can be faster than that, save by decoding a smaller picture.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--host", default="", help="a ComfyUI folder; default: COMFYUI_DIR, or what `make setup` wrote")
    parser.add_argument("--only", nargs="+", default=None, help="only these tables")
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    return parser.parse_args()


OPTIONS = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = "1"
if OPTIONS.host:
    os.environ["COMFYUI_DIR"] = OPTIONS.host
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models_base  # noqa: E402
import comfy_extras.nodes_dataset as host_nodes  # noqa: E402
import comfyui_version  # noqa: E402
import cv2  # noqa: E402
import folder_paths  # noqa: E402
import numpy as np  # noqa: E402
import PIL  # noqa: E402
import skimage  # noqa: E402
import sklearn  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402

import tiny  # noqa: E402
from lora_loom.host.latents import PictureCache, encode_pictures  # noqa: E402
from lora_loom.host.texts import TextCache, encode_captions  # noqa: E402
from lora_loom.training.caches import DiskCache  # noqa: E402
from lora_loom.training.dataset.batches import BatchPlan, Item, place  # noqa: E402
from lora_loom.training.dataset.images import read_header  # noqa: E402
from lora_loom.training.dataset.lint import lint  # noqa: E402
from lora_loom.training.dataset.model import Access, Concept, Dataset, FilePicture, Header, Sample  # noqa: E402
from lora_loom.training.dataset.opening import open_dataset  # noqa: E402
from lora_loom.training.dataset.pixels import load  # noqa: E402

Size = tuple[int, int]
PHOTOGRAPHS = (
    Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg",
    Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg",
    Path(skimage.__file__).parent / "data" / "coffee.png",
    Path(skimage.__file__).parent / "data" / "motorcycle_left.png",
)
CASES: dict[str, tuple[str, Size, Size]] = {  # kind of file, its size, the bucket
    "JPEG 1024² → 768²": ("jpg", (1024, 1024), (768, 768)),
    "PNG 1024² → 768²": ("png", (1024, 1024), (768, 768)),
    "JPEG 3072×2048 → 1024²": ("jpg", (3072, 2048), (1024, 1024)),
    "JPEG 3072×2048 → 1216×832": ("jpg", (3072, 2048), (1216, 832)),
    "JPEG 4032×3024 → 512²": ("jpg", (4032, 3024), (512, 512)),
}


def photograph(index: int, size: Size) -> Image.Image:
    """A photograph cut to the aspect of ``size`` and enlarged to it, with the noise of a camera."""
    picture = ImageOps.fit(Image.open(PHOTOGRAPHS[index]).convert("RGB"), size, Image.Resampling.BICUBIC)
    noise = np.random.default_rng(index).normal(0, 3, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


def cover(size: Size, bucket: Size) -> Size:
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    return max(bucket[0], round(size[0] * scale)), max(bucket[1], round(size[1] * scale))


# -- who makes pictures ready: each is called with a path


def ours(paths: list[Path], bucket: Size) -> Callable[[int], object]:
    """To float32 in [0, 1], upright, checked against what was scanned."""
    samples = []
    for path in paths:
        status = path.stat()
        picture = FilePicture(str(path), read_header(path), status.st_size, status.st_mtime_ns)
        samples.append(Sample(path.name, picture, ""))
    dataset = Dataset("bench", (Concept(),), tuple(samples))
    items = []
    for index, sample in enumerate(samples):
        resized = cover(sample.size, bucket)
        crop = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
        items.append(Item(index, bucket, resized, crop, 1))
    return lambda index: load(dataset, items[index], 0, 0)


def sd_scripts(paths: list[Path], bucket: Size, tensor: bool) -> Callable[[int], object]:
    """Pillow, RGB, an area filter to shrink, a slice; ``tensor``: scaled to [-1, 1] as well. Nothing is turned."""

    def once(index: int) -> object:
        with Image.open(paths[index]) as image:
            pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"), np.uint8)
        resized = cover((pixels.shape[1], pixels.shape[0]), bucket)
        pixels = cv2.resize(pixels, resized, interpolation=cv2.INTER_AREA)
        left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
        pixels = pixels[top : top + bucket[1], left : left + bucket[0]]
        if not tensor:
            return pixels
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div(255).sub_(0.5).div_(0.5)

    return once


def pillow(paths: list[Path], bucket: Size, kernel: Image.Resampling) -> Callable[[int], object]:
    """Turn, convert, scale all of it, crop."""

    def once(index: int) -> object:
        with Image.open(paths[index]) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        resized = cover(upright.size, bucket)
        left, top = (resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2
        return np.asarray(upright.resize(resized, kernel).crop((left, top, left + bucket[0], top + bucket[1])))

    return once


def host(paths: list[Path], bucket: Size) -> Callable[[int], object]:
    """The host's own nodes: load a folder (of one picture), scale its shorter edge, crop the centre."""
    for index, path in enumerate(paths):
        folder = Path(folder_paths.get_input_directory()) / f"{path.stem}-{path.suffix[1:]}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
        paths = [*paths[:index], folder, *paths[index + 1 :]]

    def once(index: int) -> object:
        [image] = host_nodes.LoadImageDataSetFromFolderNode.execute(paths[index].name).args[0]
        width, height = cover((image.shape[2], image.shape[1]), bucket)
        image = host_nodes.ResizeImagesByShorterEdgeNode.execute(image, shorter_edge=min(width, height)).args[0]
        return host_nodes.CenterCropImagesNode.execute(image, width=bucket[0], height=bucket[1]).args[0]

    return once


def decode_only(paths: list[Path]) -> Callable[[int], object]:
    def once(index: int) -> object:
        with Image.open(paths[index]) as image:
            return image.load()

    return once


def contestants(paths: list[Path], bucket: Size) -> dict[str, Callable[[int], object]]:
    return {
        "ours, to float": ours(paths, bucket),
        "sd-scripts' way, to 8 bits": sd_scripts(paths, bucket, tensor=False),
        "sd-scripts' way, to float": sd_scripts(paths, bucket, tensor=True),
        "Pillow, Lanczos": pillow(paths, bucket, Image.Resampling.LANCZOS),
        "Pillow, bicubic": pillow(paths, bucket, Image.Resampling.BICUBIC),
        "host's nodes": host(paths, bucket),
        "decode only": decode_only(paths),
    }


def interleaved(runs: dict[str, Callable[[int], object]], count: int) -> dict[str, list[float]]:
    """CPU seconds per call of each, in rounds over the same ``count`` inputs, everybody first in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    for turn in range(OPTIONS.repeats + 1):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            before = time.process_time()
            for index in range(count):
                runs[name](index)
            if turn:
                seconds[name].append((time.process_time() - before) / count)
    gc.enable()
    return seconds


def loading(folder: Path) -> dict[str, dict]:
    """Decode, turn upright, scale, crop."""
    rows: dict[str, dict] = {}
    for case, (kind, size, bucket) in CASES.items():
        paths = []
        for index in range(len(PHOTOGRAPHS)):
            paths.append(folder / f"{size[0]}x{size[1]}-{index}.{kind}")
            if not paths[-1].exists():
                photograph(index, size).save(paths[-1], quality=90)
        seconds = interleaved(contestants(paths, bucket), len(paths))
        own = seconds["ours, to float"]
        rows[case] = {}
        for name, spent in seconds.items():
            ratios = sorted(a / b for a, b in zip(spent, own, strict=True))
            rows[case][name] = {
                "milliseconds": 1000 * statistics.median(spent),
                "best": 1000 * min(spent),
                "ratio": statistics.median(ratios),
                "range": [ratios[0], ratios[-1]],
            }
        print(case, {name: round(row["ratio"], 2) for name, row in rows[case].items()}, flush=True)
    return rows


# -- opening and lint: seconds of one call, in CPU time and by the clock


ANYWHERE = Access(lambda path: True, lambda path: "")


def timed(call: Callable[[], object]) -> dict:
    """The median of a few calls; threads' CPU time counts."""
    spent = []
    for _ in range(max(3, OPTIONS.repeats // 3)):
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        spent.append((time.process_time() - cpu, time.perf_counter() - wall))
    seconds, clock = (statistics.median(column) for column in zip(*spent, strict=True))
    return {"seconds": seconds, "clock": clock}


def linked(folder: Path, count: int, kind: str) -> Path:
    """``count`` captioned pictures of 1024²: links to a few files, since nobody looks at their pixels."""
    folder.mkdir()
    originals = []
    for index in range(len(PHOTOGRAPHS)):
        originals.append(folder.parent / f"{folder.name}-{index}.{kind}")
        photograph(index, (1024, 1024)).save(originals[-1], quality=90)
    for index in range(count):
        os.link(originals[index % len(originals)], folder / f"{index:05}.{kind}")
        (folder / f"{index:05}.txt").write_text(f"a photograph, number {index}, outdoors")
    return folder


def opening(folder: Path) -> dict[str, dict]:
    rows = {}
    for kind in ("jpg", "png"):
        pictures = linked(folder / f"open-{kind}", 10_000, kind)

        def plain(pictures: Path = pictures, kind: str = kind) -> None:
            """What anybody has to do: find, open, read the caption."""
            for path in sorted(pictures.glob(f"*.{kind}")):
                with Image.open(path) as image:
                    _ = image.size
                path.with_suffix(".txt").read_text("utf-8")

        rows[f"{kind}, ours"] = timed(lambda pictures=pictures: open_dataset(pictures, Concept(), ANYWHERE))
        rows[f"{kind}, Pillow's open and size"] = timed(plain)
    return rows


def linting(folder: Path) -> dict[str, dict]:
    """JPEGs that differ: each is cut from its photograph elsewhere."""
    pictures = folder / "lint"
    pictures.mkdir()
    enlarged = [photograph(index, (1400, 1400)) for index in range(len(PHOTOGRAPHS))]
    draw = random.Random(0)
    for index in range(1000):
        left, top = draw.randrange(376), draw.randrange(376)
        picture = enlarged[index % len(enlarged)].crop((left, top, left + 1024, top + 1024))
        picture.save(pictures / f"{index:04}.jpg", quality=draw.randrange(80, 97))
        (pictures / f"{index:04}.txt").write_text(f"a photograph, number {index}, outdoors, day, colour, sharp")
    dataset = open_dataset(pictures, Concept(), ANYWHERE)
    return {
        "headers and captions": timed(lambda: lint(dataset)),
        "pixels too": timed(lambda: lint(dataset, full=True)),
    }


def times(rows: dict[str, dict]) -> list[str]:
    lines = ["", "| what | CPU s | by the clock s |", "|---" * 3 + "|"]
    return lines + [f"| {name} | {row['seconds']:.2f} | {row['clock']:.2f} |" for name, row in rows.items()]


# -- steps of an epoch


def sd_scripts_steps(sizes: list[Size], resolution: int, largest: int, batch_size: int) -> int:
    """Buckets of all multiples of 64 from 256 up, the nearest aspect by difference, partial batches kept."""
    area, buckets = resolution * resolution, {(resolution // 64 * 64,) * 2}
    for width in range(256, largest + 1, 64):
        height = min(largest, area // width // 64 * 64)
        if height >= 256:
            buckets |= {(width, height), (height, width)}
    counts: dict[Size, int] = {}
    for width, height in sizes:
        bucket = min(sorted(buckets), key=lambda other: abs(other[0] / other[1] - width / height))
        counts[bucket] = counts.get(bucket, 0) + 1
    return sum(math.ceil(count / batch_size) for count in counts.values())


def epochs(folder: Path) -> dict[str, dict]:
    """Folders of photographs of all aspects from 1:2.2 to 2.2:1 at resolution 1024, mean of many folders."""
    rows = {}
    for count in (30, 100):
        for batch_size in (4, 8):
            steps: dict[str, list[int]] = {"ours": [], "sd-scripts' buckets": [], "sd-scripts' buckets, to 2048": []}
            for seed in range(20):
                draw = random.Random(seed)
                sizes = [(round(1500 * 2.2 ** draw.uniform(-1, 1)), 1500) for _ in range(count)]
                pictures = [FilePicture(str(i), Header(*size, "PNG", "RGB"), 0, 0) for i, size in enumerate(sizes)]
                samples = tuple(Sample(picture.path, picture, "") for picture in pictures)
                dataset = Dataset("bench", (Concept(resolutions=((1024, 1024),)),), samples)
                steps["ours"].append(len(BatchPlan(dataset, batch_size, seed).epoch(0)))
                for name, largest in (("sd-scripts' buckets", 1024), ("sd-scripts' buckets, to 2048", 2048)):
                    steps[name].append(sd_scripts_steps(sizes, 1024, largest, batch_size))
            rows[f"{count} pictures in batches of {batch_size}"] = {
                "fewest possible": math.ceil(count / batch_size),
                **{name: statistics.mean(values) for name, values in steps.items()},
            }
    return rows


def counts(rows: dict[str, dict]) -> list[str]:
    names = list(next(iter(rows.values())))
    lines = ["", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {case} | {' | '.join(f'{row[name]:.1f}' for name in names)} |" for case, row in rows.items()]


# -- encoding again, or from a cache


def caching(folder: Path) -> dict[str, dict]:
    """Pictures of 256² by the VAE of SD1.5, captions by CLIP-L, both of full size with random weights, in float32."""
    vae_config = {**tiny.VAE_CONFIG, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    weights = tiny.fill(AutoencoderKL(ddconfig=vae_config, embed_dim=4)).state_dict()
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": vae_config, "embed_dim": 4}})
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip, patcher = tiny._clip(target, {}, 0, False), tiny.tiny("sd15")
    pictures = folder / "caching"
    pictures.mkdir()
    for index in range(len(PHOTOGRAPHS)):
        photograph(index, (1024, 1024)).save(pictures / f"{index}.jpg", quality=90)
        (pictures / f"{index}.txt").write_text(f"a photograph, number {index}, outdoors, day, colour, sharp")
    dataset = open_dataset(pictures, Concept(resolutions=((256, 256),)), ANYWHERE)
    wanted, captions = [(item, 0) for item in place(dataset)], [sample.caption for sample in dataset.samples]
    disk = DiskCache(folder / "cache", 1 << 40)

    def latents(cache: PictureCache | None) -> list:
        if cache is not None:
            cache._contents.clear()  # a new run reads each file once to know it
        return encode_pictures(dataset, wanted, 0, patcher, vae, cache=cache)

    def texts(cache: TextCache | None) -> dict:
        return encode_captions(clip, captions, cache=cache)

    with torch.inference_mode():
        filled = PictureCache(disk, vae, False), TextCache(disk, clip)
        latents(filled[0]), texts(filled[1])
        calls: dict[str, Callable[[], object]] = {
            "pictures, encoded again": lambda: latents(None),
            "pictures, from disk": lambda: latents(filled[0]),
            "captions, encoded again": lambda: texts(None),
            "captions, from disk": lambda: texts(filled[1]),
        }
        rows = {name: timed(call) for name, call in calls.items()}
        per_item = {name: {key: value / len(wanted) for key, value in row.items()} for name, row in rows.items()}
        knowing = {
            "to know the VAE (335 MB), once a run": timed(lambda: PictureCache(disk, vae, False)),
            "to know the CLIP (492 MB), once a run": timed(lambda: TextCache(disk, clip)),
        }
    return {**per_item, **knowing}


def milliseconds(rows: dict[str, dict]) -> list[str]:
    lines = ["", "| what | CPU ms | by the clock ms |", "|---" * 3 + "|"]
    return lines + [
        f"| {name} | {1000 * row['seconds']:.1f} | {1000 * row['clock']:.1f} |" for name, row in rows.items()
    ]


# -- the report


def table(rows: dict[str, dict]) -> list[str]:
    lines = []
    for case, contestants_ in rows.items():
        lines += ["", f"### {case}", "", "| who | ms | best | × ours | range |", "|---" * 5 + "|"]
        for name, row in contestants_.items():
            low, high = row["range"]
            spent = f"{row['milliseconds']:.1f} | {row['best']:.1f}"
            lines.append(f"| {name} | {spent} | {row['ratio']:.2f} | {low:.2f}–{high:.2f} |")
    return lines


# what is measured in a temporary folder, how it is shown, and what it is
TABLES: dict[str, tuple[Callable[[Path], dict], Callable[[dict], list[str]], str]] = {
    "load": (loading, table, "Decode, turn upright, scale, crop; CPU time per picture, mean of four photographs"),
    "open": (opening, times, "Open a folder of 10,000 captioned pictures, files in the system's cache"),
    "lint": (linting, times, "Lint 1,000 captioned JPEGs of 1024²"),
    "caches": (caching, milliseconds, "Latents and texts, encoded again or from the cache on disk, each"),
    "epochs": (epochs, counts, "Steps of an epoch at resolution 1024, aspects from 1:2.2 to 2.2:1, mean of 20 folders"),
}


def report(results: dict) -> str:
    lines = [
        "# Datasets",
        "",
        f"`python bench/data.py`: {results['machine']}, ComfyUI {results['host']}, median of {results['repeats']}.",
        "`bench/data.py` says what is measured.",
    ]
    for name, (_, show, title) in TABLES.items():
        if name in results["tables"]:
            lines += ["", f"## {title}", *show(results["tables"][name])]
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    versions = f"torch {torch.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}"
    results: dict = {
        "machine": f"{platform.machine()}, 1 thread, {versions}",
        "host": comfyui_version.__version__,
        "repeats": OPTIONS.repeats,
        "tables": {},
    }
    stored = HERE / "results" / "data.json"
    if OPTIONS.only and stored.exists():
        results["tables"] = json.loads(stored.read_text(encoding="utf-8"))["tables"]
    with tempfile.TemporaryDirectory(prefix="loom-bench-") as folder:
        for name in OPTIONS.only or TABLES:
            results["tables"][name] = TABLES[name][0](Path(folder))
    text = report(results)
    print(text)
    if not OPTIONS.no_write:
        (HERE / "results" / "data.md").write_text(text, encoding="utf-8")
        stored.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
