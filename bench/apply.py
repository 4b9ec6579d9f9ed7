"""What a LoRA costs once it is on a MODEL: per step, per change of strength, to load, in memory; beside the host's own.

The model is the host's UNet (SD1.5 topology, 96 channels, 81 M parameters, random weights), the LoRAs have rank 16 on
every linear layer and convolution, kept in fp16. The unit is a *forward*: one step of euler with CFG without any LoRA.

* per step: the host's patched weights, its hooks with a keyframe at every step, its bypass loader (newer hosts); ours
  fused, branched, branched with a strength that changes at every step, and four such LoRAs. Loading is not counted;
* change of strength: everything between the node's execute() and the first call of the model: the host's loader node
  and its loading, ours with both engines; "nothing" is what the sampler itself does until then;
* load and place: a file to patches on a clone, read anew each time;
* memory: what stays beside the model's own weights.

All in one process, taking turns; every ratio is taken within one round, per step against a run without LoRA directly
before. "no LoRA" has such a ratio too: what it differs from 1 is noise. Times are process CPU.

    python bench/apply.py --repeats 7 --host /path/to/ComfyUI
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--latent", type=int, default=24)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="of each run; the first one is not counted")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--host", default="", help="a ComfyUI folder; default: COMFYUI_DIR, or what `make setup` wrote")
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    return parser.parse_args()


OPTIONS = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = str(OPTIONS.threads)
if OPTIONS.host:
    os.environ["COMFYUI_DIR"] = OPTIONS.host
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import comfy.hooks  # noqa: E402
import comfy.lora  # noqa: E402
import comfy.lora_convert  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import comfyui_version  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402

import nodes  # noqa: E402
import tiny  # noqa: E402
from lora_loom.host import branching, lora_cache, targets  # noqa: E402
from lora_loom.host.apply import BRANCH, FUSE  # noqa: E402
from lora_loom.kernels.adapter import Options  # noqa: E402
from lora_loom.kernels.layers import select_targets  # noqa: E402
from lora_loom.kernels.lora import UP, LoRA  # noqa: E402
from lora_loom.kernels.names import NameTable  # noqa: E402
from lora_loom.kernels.reading import LoRAFile  # noqa: E402
from lora_loom.kernels.safetensors_io import LoraModel, save_tensors  # noqa: E402
from lora_loom.kernels.writing import to_tensors  # noqa: E402
from lora_loom.nodes.applying import LoomLoRALoaderAdvanced  # noqa: E402

FOUR = 4
NAMES = [f"bench-{number}.safetensors" for number in range(FOUR)]
Conds = tuple[list, list]


def write_loras(patcher: Any, folder: Path) -> int:
    """Four files; how many layers each is on."""
    layers = select_targets(patcher.model, "full", True)
    for number, name in enumerate(NAMES):
        draws = torch.Generator().manual_seed(number)
        adapters = {}
        for layer in layers:
            adapter = LoRA.create(layer.shape, Options(OPTIONS.rank, OPTIONS.rank), draws)
            adapter.tensors[UP] = 0.02 * torch.randn(adapter.up.shape, generator=draws)
            adapters[layer.path] = adapter.to(dtype=torch.float16)
        save_tensors(LoraModel(to_tensors(LoRAFile(adapters, names=NameTable.of(patcher.model)))), folder / name)
    return len(layers)


def ours(patcher: Any, names: list[str], **options: Any) -> Any:
    for name in names:
        patcher = LoomLoRALoaderAdvanced.execute(patcher, name, 0.7, 1.0, picture=False, **options).args[0]
    return patcher


def contestants(base: Any, conds: Conds) -> dict[str, tuple[Any, Conds]]:
    """name → MODEL and conditioning."""
    schedule = ", ".join(f"{1 - 0.1 * step}@{step + 1}" for step in range(OPTIONS.steps))
    found = {
        "no LoRA": (base, conds),
        "host, patched": (nodes.LoraLoaderModelOnly().load_lora(base, None, NAMES[0], 0.7, 0.0)[0], conds),
        "host, hooks at every step": hooked(base, conds),
        "ours, fused": (ours(base, NAMES[:1], engine=FUSE), conds),
        "ours, branched": (ours(base, NAMES[:1], engine=BRANCH), conds),
        "ours, changing at every step": (ours(base, NAMES[:1], steps=schedule), conds),
        "ours, four changing": (ours(base, NAMES, steps=schedule), conds),
    }
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", NAMES[0]))
        found["host, bypass"] = (comfy.sd.load_bypass_lora_for_models(base, None, lora, 0.7, 0.0)[0], conds)
    return found


def hooked(base: Any, conds: Conds) -> tuple[Any, Conds]:
    lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", NAMES[0]))
    hooks = comfy.hooks.create_hook_lora(lora, 0.7, 0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for step in range(OPTIONS.steps):
        frames.add(comfy.hooks.HookKeyframe(strength=1 - 0.1 * step, start_percent=step / OPTIONS.steps))
    hooks.set_keyframes_on_hooks(frames)
    marked = tuple(comfy.hooks.set_hooks_for_conditioning(cond, hooks=hooks) for cond in conds)
    model = base.clone()
    comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    return model, marked  # type: ignore[return-value]


def run(model: Any, conds: Conds) -> float:
    """CPU seconds of a step: the median of all but the first."""
    latent = torch.zeros(1, 4, OPTIONS.latent, OPTIONS.latent)
    noise = comfy.sample.prepare_noise(latent, 3)
    marks: list[float] = []
    how = (OPTIONS.steps, 7.0, "euler", "normal")
    comfy.sample.sample(
        model, noise, *how, *conds, latent, seed=3, disable_pbar=True,
        callback=lambda *_: marks.append(time.process_time()),
    )  # fmt: skip
    return statistics.median(end - begin for begin, end in itertools.pairwise(marks))


def per_step(found: dict[str, tuple[Any, Conds]]) -> dict[str, dict]:
    seconds: dict[str, list[float]] = {name: [] for name in found}
    units: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(OPTIONS.repeats + 1):
        for name, contestant in found.items():
            unit, spent = run(*found["no LoRA"]), run(*contestant)
            if turn:
                units[name].append(unit)
                seconds[name].append(spent)
        print(f"round {turn} of {OPTIONS.repeats}" if turn else "warm-up", file=sys.stderr, flush=True)
    return {name: summary(spent, units[name]) for name, spent in seconds.items()}


def summary(spent: list[float], unit: list[float]) -> dict:
    ratios = sorted(a / b for a, b in zip(spent, unit, strict=True))
    return {"seconds": statistics.median(spent), "ratio": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}


def changes(base: Any, conds: Conds) -> dict[str, dict]:
    """A change of strength in forwards: from the node to the first call of the model."""

    def by_host(strength: float) -> Any:
        return nodes.LoraLoaderModelOnly().load_lora(base, None, NAMES[0], strength, 0.0)[0]

    def by_us(engine: str) -> Callable[[float], Any]:
        def change(strength: float) -> Any:
            return LoomLoRALoaderAdvanced.execute(base, NAMES[0], strength, 1.0, engine=engine, picture=False).args[0]

        return change

    makers = {
        "nothing": lambda strength: base,
        "host, patched": by_host,
        "ours, fused": by_us(FUSE),
        "ours, branched": by_us(BRANCH),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    units: list[float] = []
    for turn in range(OPTIONS.repeats):
        units.append(run(base, conds))
        for name, make in makers.items():
            run(make(0.9), conds)
            begun = time.process_time()
            model = make(0.2 + 0.05 * turn)
            first_call(model, conds, begun, seconds[name])
    return {name: summary(spent, units) for name, spent in seconds.items()}


class Reached(BaseException):
    """The model is called for the first time."""


def first_call(model: Any, conds: Conds, begun: float, into: list[float]) -> None:
    """Sample until the network itself is entered, and note the CPU seconds since ``begun``."""
    network = model.model.diffusion_model

    def entered(*_: Any) -> None:
        into.append(time.process_time() - begun)
        raise Reached

    handle = network.register_forward_pre_hook(entered)
    try:
        run(model, conds)
    except Reached:
        pass
    finally:
        handle.remove()


def loads(base: Any) -> dict[str, dict]:
    """File to patches on a clone, in milliseconds of CPU."""

    def by_host() -> None:
        lora = comfy.utils.load_torch_file(folder_paths.get_full_path_or_raise("loras", NAMES[0]), safe_load=True)
        names = comfy.lora.model_lora_keys_unet(base.model, {})
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), names)
        base.clone().add_patches(patches, 0.7)

    def by_us(engine: str, again: bool) -> Callable[[], None]:
        def load() -> None:
            if not again:
                lora_cache.clear()
            LoomLoRALoaderAdvanced.execute(base, NAMES[0], 0.7, 1.0, engine=engine, picture=False)

        return load

    def first() -> None:
        targets._known.pop(base.model, None)
        lora_cache.clear()
        LoomLoRALoaderAdvanced.execute(base, NAMES[0], 0.7, 1.0, engine=FUSE, picture=False)

    makers = {
        "host": by_host,
        "ours, first on a model": first,
        "ours, fused": by_us(FUSE, False),
        "ours, branched": by_us(BRANCH, False),
        "ours, from memory": by_us(FUSE, True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for turn in range(OPTIONS.repeats + 3):
        for name, load in makers.items():
            gc.collect()  # so that nobody pays for the objects of the one before
            begun = time.process_time()
            load()
            if turn >= 3:
                seconds[name].append(time.process_time() - begun)
    return {name: summary(spent, seconds["host"]) for name, spent in seconds.items()}


def memory(base: Any, found: dict[str, tuple[Any, Conds]], conds: Conds) -> dict[str, dict]:
    """Bytes beside the weights of the model, against the bytes of the weights that are patched."""
    patched = sum(base.model.get_parameter(f"{t.path}.weight").nbytes for t in select_targets(base.model, "full", True))
    file = sum(tensor.nbytes for tensor in lora_cache.get(NAMES[0]).tensors.values())
    rows = {}
    for name in ("host, patched", "ours, fused"):
        run(*found[name])
        rows[name] = sum(entry.weight.nbytes for entry in found[name][0].backup.values())
    for name, count in (("ours, changing at every step", 1), ("ours, four changing", FOUR)):
        run(*found[name])
        stack = branching.stack_on(found[name][0])
        assert stack is not None
        rows[name] = count * file + stack.hung_on(base.model).memory()
    return {name: {"bytes": size, "share": size / patched} for name, size in rows.items()}


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        f"### model_channels {OPTIONS.channels}, latent {OPTIONS.latent}×{OPTIONS.latent}, rank {OPTIONS.rank}, "
        f"{result['host']}",
        "",
        f"{result['layers']} layers, fp32 weights, fp16 LoRA, CFG, {result['machine']}; median of {OPTIONS.repeats}, "
        f"ratios taken within a round. A forward: {result['per_step']['no LoRA']['seconds']:.3f} s of CPU.",
        "",
        "| per step | × no LoRA | range |",
        "|---|---|---|",
        *(ratio_row(name, row) for name, row in result["per_step"].items()),
        "",
        "| change of strength | forwards | range |",
        "|---|---|---|",
        *(ratio_row(name, row) for name, row in result["changes"].items()),
        "",
        "| load and place | ms | × host | range |",
        "|---|---|---|---|",
        *(
            f"| {name} | {1000 * row['seconds']:.1f} {ratio_row('', row)[3:]}"
            for name, row in result["loads"].items()
        ),
        "",
        "| memory beside the weights | MB | of the patched weights |",
        "|---|---|---|",
        *(f"| {name} | {row['bytes'] / 1e6:.1f} | {row['share']:.1%} |" for name, row in result["memory"].items()),
    ]
    return "\n".join(lines)


def ratio_row(name: str, row: dict) -> str:
    return f"| {name} | {row['ratio']:.3f} | {row['range'][0]:.3f}–{row['range'][1]:.3f} |"


def main() -> None:
    torch.set_num_threads(OPTIONS.threads)
    with torch.inference_mode(), tempfile.TemporaryDirectory() as folder:
        folder_paths.folder_names_and_paths["loras"] = ([folder], {".safetensors"})
        base = tiny.unet(OPTIONS.channels, inference=True)
        layers = write_loras(base, Path(folder))
        draws = torch.Generator().manual_seed(1)
        conds = tuple([[torch.randn(1, 77, 768, generator=draws), {}]] for _ in range(2))
        found = contestants(base, conds)  # type: ignore[arg-type]
        result = {
            "host": f"ComfyUI {comfyui_version.__version__}",
            "machine": f"{platform.machine()}, {OPTIONS.threads} thread(s), torch {torch.__version__}",
            "options": {name: value for name, value in vars(OPTIONS).items() if name not in ("host", "no_write")},
            "layers": layers,
            "loads": loads(base),
            "changes": changes(base, conds),  # type: ignore[arg-type]
            "per_step": per_step(found),
            "memory": memory(base, found, conds),  # type: ignore[arg-type]
        }
    print(table(result))
    if not OPTIONS.no_write:
        write(result)


def write(result: dict[str, Any]) -> None:
    """Replace what was measured on the same host before."""
    path = HERE / "results" / "apply.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept[result["host"]] = {**result, "table": table(result)}
    path.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = ["# What a LoRA costs", "", "`python bench/apply.py` measures; `bench/apply.py` says what is measured.", ""]
    for one in kept.values():
        text += [one["table"], ""]
    path.with_suffix(".md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
