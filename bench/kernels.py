"""One adapted layer, forward and backward, ours beside PEFT, LyCORIS and the host.

``python bench/kernels.py`` prints a table and writes bench/results/kernels.md and kernels.json.

Each row is one layer with one adapter: the output, the gradients of the input and of the adapter's tensors. The unit is
the frozen layer alone (forward and input gradient). All contestants of a row share the layer's weight and take turns in
one process with one thread; figures are process CPU time, the ratio is the median of the ratios within a round. *kept*
is what autograd holds for backward besides parameters, every storage once.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--host", default="", help="a ComfyUI folder; default: COMFYUI_DIR, or what `make setup` wrote")
    parser.add_argument("--layers", nargs="+", default=None, help="only these layers")
    parser.add_argument("--families", nargs="+", default=None, help="only these families")
    parser.add_argument("--no-write", action="store_true", help="print only, leave bench/results as it is")
    return parser.parse_args()


OPTIONS = arguments()
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch is imported
    os.environ[variable] = "1"
if OPTIONS.host:
    os.environ["COMFYUI_DIR"] = OPTIONS.host
# not this folder: libraries look for a package called kernels, and would find this script
sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != HERE]
sys.path[:0] = [str(HERE.parent / "tests" / "host"), str(HERE.parent / "dev")]

from hosting import prepare_host  # noqa: E402

prepare_host()

import comfy.weight_adapter as host_adapters  # noqa: E402
import comfyui_version  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from lycoris.modules import diag_oft, locon, loha, lokr  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from lora_loom.kernels.adapter import Options  # noqa: E402
from lora_loom.kernels.products import ConvGeometry  # noqa: E402
from lora_loom.kernels.registry import make_adapter  # noqa: E402


@dataclass(frozen=True)
class Layer:
    """``make`` the layer, the shape of its input, the rank it is adapted with."""

    make: Callable[[], nn.Module]
    input: tuple[int, ...]
    rank: int


LAYERS = {
    "1280² × 1024 tokens": Layer(lambda: nn.Linear(1280, 1280), (1, 1024, 1280), 16),
    "3072² × 512 tokens": Layer(lambda: nn.Linear(3072, 3072), (1, 512, 3072), 32),
    "conv 3×3 320, 32²": Layer(lambda: nn.Conv2d(320, 320, 3, padding=1), (2, 320, 32, 32), 16),
}


@dataclass(frozen=True)
class Family:
    """One family's contestants: our name and options, and how the others make the same thing (None: they do not)."""

    ours: str
    options: dict
    peft: Callable[[int], peft.PeftConfig] | None = None
    lycoris: Callable[[nn.Module, int], nn.Module] | None = None
    host: Callable[[Tensor, int], nn.Module] | None = None
    rank: int | None = None


def targets(**settings) -> dict:
    return {"target_modules": ["layer"], **settings}


FAMILIES = {
    "LoRA": Family(
        "LoRA",
        {},
        lambda r: peft.LoraConfig(**targets(r=r, lora_alpha=r)),
        lambda m, r: locon.LoConModule("layer", m, 1.0, r, r),
        lambda w, r: host_adapters.LoRAAdapter.create_train(w, r, r),
    ),
    "LoRA, Tucker core": Family(
        "LoRA", {"tucker": True}, None, lambda m, r: locon.LoConModule("layer", m, 1.0, r, r, use_tucker=True)
    ),
    "DoRA": Family(
        "LoRA",
        {"dora": "output"},
        lambda r: peft.LoraConfig(**targets(r=r, lora_alpha=r, use_dora=True)),
        lambda m, r: locon.LoConModule("layer", m, 1.0, r, r, weight_decompose=True),
    ),
    "LoHa, rank 8": Family(
        "LoHa",
        {},
        lambda r: peft.LoHaConfig(**targets(r=r, alpha=r)),
        lambda m, r: loha.LohaModule("layer", m, 1.0, r, r),
        lambda w, r: host_adapters.LoHaAdapter.create_train(w, r, r),
        rank=8,
    ),
    "LoKr, factor 8": Family(
        "LoKr",
        {"factor": 8},
        lambda r: peft.LoKrConfig(**targets(r=r, alpha=r, decompose_factor=8)),
        lambda m, r: lokr.LokrModule("layer", m, 1.0, r, r, factor=8),
        lambda w, r: host_adapters.LoKrAdapter.create_train(w, r, r),
    ),
    "OFT, blocks of 32": Family(
        "OFT",
        {"block_size": 32},
        lambda r: peft.OFTConfig(**targets(r=0, oft_block_size=32)),
        lambda m, r: diag_oft.DiagOFTModule("layer", m, 1.0, 32, 0),
        lambda w, r: host_adapters.OFTAdapter.create_train(w, 32, 0),
    ),
    "OFTv2, blocks of 32": Family(
        "OFTv2", {"block_size": 32}, lambda r: peft.OFTConfig(**targets(r=0, oft_block_size=32))
    ),
    "(IA)³": Family("IA3", {}, lambda r: peft.IA3Config(**targets(feedforward_modules=[]))),
    "GLoRA": Family("GLoRA", {}),
    "LoRA-FA": Family("LoRA-FA", {}),
}


class Held:
    """The layer on loan, resident: its weight is there whenever it is asked for."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.geometry = module, None
        if isinstance(module, nn.Conv2d):
            self.geometry = ConvGeometry(module.stride, module.padding, module.dilation, module.groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    @contextmanager
    def weight(self, like: Tensor):
        yield self.module.weight

    def bias(self, like: Tensor) -> Tensor:
        return self.module.bias


Run = tuple[Callable[[Tensor], Tensor], list[Tensor]]  # the adapted layer, what is trained


def ours(module: nn.Module, family: Family, rank: int) -> Run:
    options = Options(rank, float(rank), **family.options)
    adapter = make_adapter(family.ours, module.weight.shape, options, torch.Generator().manual_seed(0), module.weight)
    _fill(adapter.parameters())
    held = Held(module)
    return lambda x: adapter.on(x, held), adapter.parameters()


def of_peft(module: nn.Module, family: Family, rank: int) -> Run:
    network = peft.inject_adapter_in_model(family.peft(rank), nn.ModuleDict({"layer": _twin(module)}))
    parameters = [p for p in network.parameters() if p.requires_grad]
    _fill(parameters)
    return network["layer"], parameters


def of_lycoris(module: nn.Module, family: Family, rank: int, bypass: bool) -> Run:
    twin = _twin(module)
    adapter = family.lycoris(twin, rank)
    adapter.bypass_mode = bypass
    adapter.apply_to()
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    _fill(parameters)
    return twin, parameters


def of_host(module: nn.Module, family: Family, rank: int, bypass: bool) -> Run:
    adapter = family.host(module.weight, rank)
    parameters = [p for name, p in adapter.named_parameters() if p.requires_grad and name != "alpha"]
    _fill(parameters)
    conv = isinstance(module, nn.Conv2d)
    if bypass:
        adapter.is_conv, adapter.conv_dim, adapter.multiplier = conv, 2 if conv else 0, 1.0
        keys = ("stride", "padding", "dilation", "groups")
        adapter.kw_dict = {key: getattr(module, key) for key in keys} if conv else {}
        adapter.kernel_size = module.kernel_size if conv else (1,)
        adapter.in_channels, adapter.out_channels = module.weight.shape[1], module.weight.shape[0]

        def beside(x: Tensor) -> Tensor:
            base = module(x)
            return adapter.g(base + adapter.h(x, base))

        return beside, parameters
    if conv:
        return lambda x: F.conv2d(x, adapter(module.weight), module.bias, padding=module.padding), parameters
    return lambda x: F.linear(x, adapter(module.weight), module.bias), parameters


def contestants(family: Family) -> dict[str, Callable[[nn.Module, int], Run]]:
    made: dict[str, Callable[[nn.Module, int], Run]] = {"ours": lambda m, r: ours(m, family, r)}
    if family.peft:
        made["peft"] = lambda m, r: of_peft(m, family, r)
    if family.lycoris:
        made["lycoris rebuild"] = lambda m, r: of_lycoris(m, family, r, False)
        if not family.options.get("dora"):  # bypassing leaves DoRA out without a word
            made["lycoris bypass"] = lambda m, r: of_lycoris(m, family, r, True)
    if family.host:
        made["host merge"] = lambda m, r: of_host(m, family, r, False)
        if hasattr(host_adapters.WeightAdapterBase, "h"):
            made["host bypass"] = lambda m, r: of_host(m, family, r, True)
    return made


def _twin(module: nn.Module) -> nn.Module:
    """The same layer over the same weight, for those that change the module they are given."""
    twin = type(module).__new__(type(module))
    twin.__dict__ = dict(module.__dict__)
    twin._parameters, twin._modules = dict(module._parameters), {}
    return twin


def _fill(parameters: list[Tensor]) -> None:
    """Something in every tensor: zeros would spare some kernels their work."""
    for parameter in parameters:
        parameter.requires_grad_(True)
        with torch.no_grad():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))


def once(forward: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor, grad: Tensor) -> float:
    x = x.detach().requires_grad_(True)
    for parameter in parameters:
        parameter.grad = None
    before = time.process_time()
    forward(x).backward(grad)
    return time.process_time() - before


def kept(forward: Callable[[Tensor], Tensor], module: nn.Module, parameters: list[Tensor], x: Tensor) -> int:
    """Bytes that autograd holds for backward, without parameters."""
    known = {t.untyped_storage().data_ptr() for t in (*parameters, *module.parameters())}
    found: dict[int, int] = {}
    held: list[Tensor] = []  # or a freed storage's address comes again

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        forward(x.detach().requires_grad_(True))
    return sum(found.values())


def measure(layer: Layer, family: Family) -> dict[str, dict]:
    torch.manual_seed(0)
    module = layer.make().requires_grad_(False)
    rank = family.rank or layer.rank
    x = torch.randn(layer.input)
    grad = torch.randn_like(module(x))
    runs: dict[str, Run] = {"frozen": (module, [])}
    rows: dict[str, dict] = {}
    for name, make in contestants(family).items():
        try:
            runs[name] = make(module, rank)
            once(*runs[name], x, grad)
        except Exception as error:  # some peers cannot do some layers: that is a result
            runs.pop(name, None)
            rows[name] = {"fails": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    for turn in range(OPTIONS.repeats + 1):
        names = list(runs)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            spent = once(*runs[name], x, grad)
            if turn:
                seconds[name].append(spent)
    gc.enable()
    for name, spent in seconds.items():
        ratios = sorted(a / b for a, b in zip(spent, seconds["frozen"], strict=True))
        forward, parameters = runs[name]
        rows[name] = {
            "ratio": statistics.median(ratios),
            "range": [ratios[0], ratios[-1]],
            "best": min(spent) / min(seconds["frozen"]),
            "milliseconds": 1000 * statistics.median(spent),
            "kept": kept(forward, module, parameters, x),
        }
    return rows


def table(results: dict) -> str:
    lines = [
        "# One adapted layer",
        "",
        f"`python bench/kernels.py`: {results['machine']}, ComfyUI {results['host']}, median of {results['repeats']}.",
        "× is process CPU time of forward and backward against the frozen layer alone; *best* the fastest of each;",
        "*kept* is what autograd holds for backward besides parameters.",
    ]
    for layer, families in results["rows"].items():
        lines += ["", f"## {layer}", "", "| family | who | × frozen | best | range | kept MB |", "|---" * 6 + "|"]
        for family, rows in families.items():
            for name, row in rows.items():
                if name == "frozen":
                    continue
                if "fails" in row:
                    lines.append(f"| {family} | {name} | fails: {row['fails']} | | | |")
                    continue
                low, high = row["range"]
                times = f"{row['ratio']:.2f} | {row['best']:.2f} | {low:.2f}–{high:.2f}"
                lines.append(f"| {family} | {name} | {times} | {row['kept'] / 1e6:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    results: dict = {
        "machine": f"{platform.machine()}, 1 thread, torch {torch.__version__}",
        "host": comfyui_version.__version__,
        "repeats": OPTIONS.repeats,
        "rows": {},
    }
    for layer_name in OPTIONS.layers or LAYERS:
        rows = results["rows"].setdefault(layer_name, {})
        for family_name in OPTIONS.families or FAMILIES:
            rows[family_name] = measure(LAYERS[layer_name], FAMILIES[family_name])
            ratios = {name: round(row.get("ratio", 0), 2) for name, row in rows[family_name].items()}
            print(layer_name, family_name, ratios, flush=True)
    text = table(results)
    print(text)
    if not OPTIONS.no_write:
        (HERE / "results" / "kernels.md").write_text(text, encoding="utf-8")
        (HERE / "results" / "kernels.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
