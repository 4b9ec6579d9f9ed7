"""One cell of the table families × models: an adapter family on a tiny model of the host, from gradient to file.

* ``VARIANTS``: every family that can be trained, with the options that change what it is, as the settings have them.
* ``Cell.gradient_error``: the gradients of everything that is trained against central differences.
* ``Cell.losses``: before and after 20 steps of the trainer on one batch at one noise, once the smoke test has passed.
* ``Cell.reload_error``: the written file, read by our own reader, against the adapters it was written from.
* ``Cell.core_error``: a file as the host's own loader applies it; where that is known to be wrong, the equivalent one.
* ``Cell.checked``: all of that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

import tiny
from lora_loom.host.apply import Strengths, apply_lora
from lora_loom.host.denoiser import HostDenoiser
from lora_loom.host.layers import weight_reader
from lora_loom.host.loan import borrow
from lora_loom.kernels.core_reads import fault_of, rewritten
from lora_loom.kernels.dora import constant_norms
from lora_loom.kernels.layers import select_targets
from lora_loom.kernels.names import NameTable, layer_shapes
from lora_loom.kernels.reading import LoRAFile, read_lora
from lora_loom.kernels.registry import FAMILIES
from lora_loom.kernels.safetensors_io import load_tensors
from lora_loom.kernels.writing import write_lora
from lora_loom.training.adapters import build
from lora_loom.training.learners import Component
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import AdapterSettings, Plan
from lora_loom.training.smoke import check_gradients
from training import loss_of, samples_for

STEP = 1e-3  # of the central differences, over all tensors together
GRADIENT = 2e-3  # parts of the host compute in float32 whatever the weights are
EFFECT = 1e-4  # of what the adapters change
STEPS = 20
LEARNT = 0.98  # of the first loss


@dataclass(frozen=True)
class Variant:
    """``options`` of the adapter settings; ``rate``: learning rate.

    ``spatial``: for k×k convolutions only; ``biased``: for layers with a bias only.
    """

    options: dict
    spatial: bool = False
    biased: bool = False
    rate: float = 5e-3
    rank: int = 4


VARIANTS = {
    "LoRA": Variant({}),
    "LoRA, rsLoRA": Variant({"rs_lora": True}),
    "LoRA, Tucker": Variant({"tucker": True}, spatial=True),
    "LoRA, DoRA": Variant({"dora": "output"}),
    "LoRA, DoRA per input": Variant({"dora": "input"}),
    "DyLoRA": Variant({"algorithm": "DyLoRA", "unit": 2}),
    "LoRA-FA": Variant({"algorithm": "LoRA-FA"}),
    "LoHa": Variant({"algorithm": "LoHa"}),
    "LoHa, Tucker": Variant({"algorithm": "LoHa", "tucker": True}, spatial=True),
    "LoHa, DoRA": Variant({"algorithm": "LoHa", "dora": "output"}),
    "LoHa, DoRA per input": Variant({"algorithm": "LoHa", "dora": "input"}),
    "LoKr": Variant({"algorithm": "LoKr"}),
    "LoKr, factor 4": Variant({"algorithm": "LoKr", "factor": 4}),
    "LoKr, both in low rank": Variant({"algorithm": "LoKr", "decompose_both": True, "factor": 8}, rank=2),
    "LoKr, full matrix": Variant({"algorithm": "LoKr", "full_matrix": True}),
    "LoKr, Tucker": Variant({"algorithm": "LoKr", "tucker": True, "factor": 2}, spatial=True),
    "LoKr, DoRA": Variant({"algorithm": "LoKr", "dora": "output"}),
    "LoKr, DoRA per input": Variant({"algorithm": "LoKr", "dora": "input"}),
    "full": Variant({"algorithm": "full"}, rate=1e-3),
    "full with bias": Variant({"algorithm": "full", "train_bias": True}, biased=True, rate=1e-3),
    "OFT": Variant({"algorithm": "OFT", "block_size": 4}),
    "OFT, constraint, rescaled": Variant({"algorithm": "OFT", "block_size": 4, "constraint": 0.05, "rescaled": True}),
    "BOFT": Variant({"algorithm": "BOFT", "block_size": 4}),
    "BOFT, rescaled": Variant({"algorithm": "BOFT", "block_size": 4, "rescaled": True}),
    "OFTv2": Variant({"algorithm": "OFTv2", "block_size": 4}),
    "IA3": Variant({"algorithm": "IA3"}, rate=1e-2),
    "IA3 on inputs": Variant({"algorithm": "IA3", "train_on_input": True}, rate=1e-2),
    "GLoRA": Variant({"algorithm": "GLoRA"}),
}

SIDES = {"pixart": 64, "flux2": 4, "ltxv": 4, "ernie": 4}  # of the latents; 8 elsewhere
DEPTHS = {name: 2 for name, spec in tiny.SPECS.items() if spec.depth_keys}
# layers that text-to-image makes no use of: what they lead to is thrown away, or they wait for a reference picture
IDLE = {
    "qwen_image": tuple(f"transformer_blocks.1.{layer}" for layer in ("txt_mlp.", "attn.add_q_", "attn.to_add")),
    "omnigen2": ("ref_image_",),
}
# a share of the layers with all kinds of them, for the test of all families
FEW = {"sd15": "middle_block\noutput_blocks.3", "flux": "double_blocks.0\nsingle_blocks.0"}


@lru_cache(maxsize=2)
def model(name, dtype=torch.float32):
    """A MODEL as a loader node leaves it, shared by the cells that follow each other."""
    return tiny.tiny(name, dtype=dtype, inference=True, **({"depth": DEPTHS[name]} if name in DEPTHS else {}))


def fits(name, variant):
    """Whether this model has layers that the variant is for."""
    row = VARIANTS[variant]
    return (has_kernels(name) or not row.spatial) and (has_biases(name) or not row.biased)


@lru_cache
def has_kernels(name):
    """Whether any convolution of the model is wider than one point."""
    return any(math.prod(target.shape[2:]) > 1 for target in select_targets(model(name).model, "full", True))


@lru_cache
def has_biases(name):
    network = model(name).model
    layers = (network.get_submodule(target.path) for target in select_targets(network, "full", True))
    return any(layer.bias is not None for layer in layers)


def samples(name, dtype=torch.float32, batch=2):
    return samples_for(name, batch, dtype=dtype, side=SIDES.get(name, 8))


@torch.no_grad()
def prediction(patcher, adapters, data):
    x0, noise, times, conditioning = data
    with borrow(patcher, adapters) as loan, torch.no_grad():
        denoiser = HostDenoiser(loan)
        sigma = denoiser.noise_levels(times)
        return denoiser.predict(denoiser.prediction.noisy(x0, noise, sigma), sigma, conditioning).double().clone()


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@dataclass(frozen=True)
class Figures:
    gradient: float
    learnt: float  # loss after / loss before
    reload: float
    core: float
    fault: str  # why the host's loader needs another file, empty where it does not


class Cell:
    """``few``: only on the layers of ``FEW``."""

    def __init__(self, name, variant, few=False):
        self.name, self.variant, self.few = name, variant, few

    def plan(self):
        """All layers of the model, its k×k convolutions too."""
        row, conv = VARIANTS[self.variant], {}
        if has_kernels(self.name):
            scaled = "alpha" in FAMILIES[row.options.get("algorithm", "LoRA")].options
            conv = {"conv_rank": row.rank} | ({"conv_alpha": 2.0} if scaled else {})
        rules = {"layer_filter": FEW[self.name]} if self.few else {}
        settings = AdapterSettings(layers="full", **conv, **rules, **row.options)
        return Plan(learning_rate=row.rate, rank=row.rank, alpha=2.0, adapter=settings)

    def fresh(self):
        """Adapters as a run begins with them."""
        patcher = model(self.name)
        adapters = build(patcher.model, self.plan(), weight_reader(patcher)).adapters
        return {path: lively(adapter) for path, adapter in adapters.items()}

    def stirred(self, dtype=torch.float32):
        """The same with every tensor moved off its start, so that every gradient is alive."""
        draws = torch.Generator().manual_seed(0)
        return {path: lively(_stirred(adapter, dtype, draws)) for path, adapter in self.fresh().items()}

    # -- gradients

    def gradients(self, adapters, **lent):
        """path -> gradients of the adapter's parameters, for layers that have a part in the result."""
        with borrow(model(self.name, torch.float64), adapters, **lent) as loan:
            loss_of(HostDenoiser(loan), samples(self.name, torch.float64)).backward()
        found = {}
        for path, adapter in adapters.items():
            grads = [tensor.grad for tensor in adapter.parameters()]
            if path.removeprefix("diffusion_model.").startswith(IDLE.get(self.name, ("no layer",))):
                assert all(grad is None or not grad.any() for grad in grads), f"{path} is not idle"
                continue
            assert all(grad is not None and grad.any() for grad in grads), f"no gradient reached {path}"
            found[path] = grads
            for tensor in adapter.parameters():
                tensor.grad = None
        return found

    def gradient_error(self, parts=3):
        """The greatest relative error along one direction through each of ``parts`` shares of all trained tensors.

        A direction is each tensor's gradient at unit length, so that none hides behind a larger one, plus noise.
        """
        patcher, data = model(self.name, torch.float64), samples(self.name, torch.float64)
        adapters = self.stirred(torch.float64)
        found = self.gradients(adapters)
        pairs = [
            pair for path, grads in found.items() for pair in zip(adapters[path].parameters(), grads, strict=True)
        ]
        draws = torch.Generator().manual_seed(7)
        order = torch.randperm(len(pairs), generator=draws).tolist()
        errors = []
        with constant_norms(adapters.values()), borrow(patcher, adapters) as loan:
            denoiser = HostDenoiser(loan)
            with torch.no_grad():
                loss_of(denoiser, data)  # the norms of this point
            for part in range(parts):
                share = [pairs[index] for index in order[part::parts]]
                directions = [_direction(grad, draws) for _, grad in share]
                step = STEP / math.sqrt(sum(direction.square().sum().item() for direction in directions))
                up, down = (_loss_at(denoiser, data, share, directions, sign * step) for sign in (1, -1))
                expected = (up - down) / (2 * step)
                slopes = zip(share, directions, strict=True)
                got = sum((grad * direction).sum().item() for (_, grad), direction in slopes)
                errors.append(abs(got - expected) / abs(expected))
        return max(errors)

    # -- learning

    def losses(self):
        """(loss before, loss after) of a run from fresh adapters."""
        patcher, plan, adapters = model(self.name), self.plan(), self.fresh()
        with borrow(patcher, adapters) as loan:
            component = Component("model", adapters, plan.learning_rate)
            trainer = OneNoise([component], HostDenoiser(loan), OneBatch(samples(self.name)), plan, STEPS)
            if not self.few:
                check_gradients(trainer, dict(loan.model.named_modules()))
            before = trainer.loss(0).item()
            for _ in range(STEPS - 1):
                trainer.step()
            expected = trainer.loss(0).item()
            assert math.isclose(trainer.step().loss, expected, rel_tol=1e-5), "the last step saw another noise"
            return before, trainer.loss(0).item()

    # -- files

    def files(self, folder):
        """(error of our reader, error of the host's, what the host misreads), relative to what the adapters change."""
        patcher, data = model(self.name), samples(self.name)
        shapes = layer_shapes(patcher.model)
        file = LoRAFile(self.stirred(), names=NameTable(shapes))
        base, trained = prediction(patcher, {}, data), prediction(patcher, file.adapters, data)
        effect = (trained - base).norm()
        assert effect > 0.01 * base.norm(), "the adapters change nothing"
        path = write_lora(file, folder / "cell.safetensors")
        again = read_lora(path, shapes)
        assert not again.unplaced, again.unplaced
        reload = (prediction(patcher, again.adapters, data) - trained).norm() / effect
        faults = {fault.name for adapter in file.adapters.values() if (fault := fault_of(adapter))}
        if faults:
            path = write_lora(rewritten(file, weight_reader(patcher))[0], folder / "for-core.safetensors")
        merged, _, applied = apply_lora(patcher, None, load_tensors(path), Strengths.of(1.0, 0.0))
        assert not applied.unplaced, applied.unplaced
        core = (prediction(merged, {}, data) - trained).norm() / effect
        assert relative(prediction(patcher, {}, data), base) <= 1e-6, "the host has not taken its patches off"
        return reload.item(), core.item(), ", ".join(sorted(faults))

    def checked(self, folder):
        """All figures. Raises AssertionError where one is not good enough."""
        before, after = self.losses()
        cell = Figures(self.gradient_error(), after / before, *self.files(folder))
        assert cell.gradient <= GRADIENT, f"gradient off by {cell.gradient:.2%}"
        assert cell.learnt <= LEARNT, f"the loss went from {before:.4g} to {after:.4g} in {STEPS} steps"
        assert cell.reload <= EFFECT, f"read again, the file has another effect: off by {cell.reload:.2e}"
        assert cell.core <= EFFECT, f"the host's loader gives another effect: off by {cell.core:.2e}"
        return cell


def lively(adapter):
    for tensor in adapter.parameters():
        tensor.requires_grad_(True)
    return adapter


def _stirred(adapter, dtype, draws):
    values = {}
    for name, tensor in adapter.tensors.items():
        spread = tensor.std().item() if tensor.numel() > 1 else 0.0
        size = 0.3 * spread if spread > 0.01 else 0.1
        noise = torch.randn(tensor.shape, generator=draws, dtype=torch.float64).mul_(size)
        values[name] = tensor.detach().to(dtype) + noise.to(dtype)
    return adapter.with_tensors(values)


def _direction(grad, draws):
    return grad / grad.norm() + torch.randn(grad.shape, generator=draws, dtype=grad.dtype) / grad.numel() ** 0.5


def _loss_at(denoiser, data, share, directions, step):
    kept = [tensor.detach().clone() for tensor, _ in share]
    with torch.no_grad():
        for (tensor, _), direction in zip(share, directions, strict=True):
            tensor.add_(direction, alpha=step)
        value = loss_of(denoiser, data).item()
        for (tensor, _), before in zip(share, kept, strict=True):
            tensor.copy_(before)
    return value


class OneNoise(Trainer):
    """Every step sees the first one's batch, timesteps and noise."""

    def terms(self, position, bands=None):
        return super().terms(0, bands)


class OneBatch:
    def __init__(self, data):
        self.latents, _, _, self.conditioning = data

    def batch(self, position):
        return Batch(self.latents, self.conditioning)
