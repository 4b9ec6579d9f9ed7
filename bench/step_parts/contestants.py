"""The contestants of ``train_step``: each has a ``step()`` and shares the base weights with all the others."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import comfy_extras.nodes_train as host_trainer
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from lora_loom.host.denoiser import Conditioning, HostDenoiser
from lora_loom.host.loan import borrow
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.layers import Target, select_targets
from lora_loom.kernels.lora import LoRA
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import OptimizerSettings, Plan

TOKENS, CONTEXT = 77, 768
RATE = 1e-4


def first_model(channels: int) -> Any:
    """The model as a loader node leaves it: inference tensors."""
    return tiny.unet(channels, inference=True)


@dataclass
class Shared:
    """A module tree of its own over the same storages."""

    patcher: Any
    network: nn.Module
    targets: list[Target]


def share(base: Any, inference: bool = True, copies: bool = False) -> Shared:
    """A model whose parameters are ``base``'s own, or aliases that autograd accepts, or real copies."""

    def another(tensor: Tensor) -> Tensor:
        if copies:
            return _like(tensor, tensor.detach().clone())
        return tensor if inference else _like(tensor, _alias(tensor))

    with torch.inference_mode(False):
        memo: dict[int, Any] = {id(t): another(t) for t in (*base.model.parameters(), *base.model.buffers())}
    memo[id(base.model.model_config)] = base.model.model_config  # plain settings
    model = copy.deepcopy(base.model, memo)
    patcher = comfy.model_patcher.ModelPatcher(model, base.load_device, base.offload_device)
    return Shared(patcher, model.diffusion_model, select_targets(model, "full", True))


def _alias(tensor: Tensor) -> Tensor:
    bare = torch.empty(0, dtype=tensor.dtype)
    return bare.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def _like(original: Tensor, values: Tensor) -> Tensor:
    return nn.Parameter(values, requires_grad=False) if isinstance(original, nn.Parameter) else values


def contestant(name: str, base: Any, latent: int, rank: int, mode: Any = None) -> Any:
    """``mode``, a memory counter, is on from the start of the set-up."""
    if name.startswith("native"):
        return NativeStep(base, latent, rank, bypass="bypass" in name, mode=mode)
    if name == "frozen":
        return FrozenStep(base, latent, mode)
    if name == "peft":
        return PeftStep(base, latent, rank, mode)
    return OurStep(base, latent, rank, checkpoint="checkpointed" in name, mode=mode)


class _Step:
    """What they have in common: inputs, and the memory counter around everything."""

    def __init__(self, latent: int, mode: Any) -> None:
        self.mode = mode if mode is not None else nullcontext()
        draws = torch.Generator().manual_seed(0)
        self.latent = torch.randn((1, 4, latent, latent), generator=draws)
        self.noise = torch.randn((1, 4, latent, latent), generator=draws)
        self.context = torch.randn((1, TOKENS, CONTEXT), generator=draws)
        self.time = torch.tensor([500.0])

    def step(self) -> None:
        with self.mode:
            self.once()

    def once(self) -> None:
        raise NotImplementedError

    def close(self) -> None: ...

    def sizes(self) -> dict[str, int]:
        return {}


class FrozenStep(_Step):
    """The unit: forward, and backward to the input."""

    def __init__(self, base: Any, latent: int, mode: Any) -> None:
        super().__init__(latent, mode)
        self.network = share(base, inference=False).network

    def once(self) -> None:
        x = self.latent.clone().requires_grad_(True)
        self.network(x, self.time, context=self.context).backward(self.noise)


class PeftStep(_Step):
    def __init__(self, base: Any, latent: int, rank: int, mode: Any) -> None:
        super().__init__(latent, mode)
        shared = share(base, inference=False)
        names = [target.path.removeprefix("diffusion_model.") for target in shared.targets]
        with self.mode:
            settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
            self.network = peft.inject_adapter_in_model(settings, shared.network)
            self.parameters = [p for n, p in self.network.named_parameters() if "lora_" in n]
            self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, fused=True)
        if len(self.parameters) != 2 * len(names):
            raise RuntimeError(f"peft adapted {len(self.parameters) // 2} layers instead of {len(names)}")

    def once(self) -> None:
        prediction = self.network(self.latent + self.noise, self.time, context=self.context)
        F.mse_loss(prediction, self.noise).backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sizes(self) -> dict[str, int]:
        return _sizes(self.parameters, self.optimizer)


class OurStep(_Step):
    def __init__(self, base: Any, latent: int, rank: int, checkpoint: bool, mode: Any) -> None:
        super().__init__(latent, mode)
        shared = share(base)
        sides = (8 * latent, 8 * latent)
        self.sample = Batch(self.latent, [Conditioning(self.context, {}, sides, (0, 0), sides)])
        self.stack = ExitStack()
        with self.mode:
            draws = torch.Generator().manual_seed(0)
            adapters = {t.path: LoRA.create(t.shape, Options(rank, rank), draws) for t in shared.targets}
            loan = self.stack.enter_context(borrow(shared.patcher, adapters, checkpoint))
            plan = Plan(learning_rate=RATE, optimizer=OptimizerSettings(max_grad_norm=1.0))
            self.trainer = Trainer(adapters, HostDenoiser(loan), self, plan, total_steps=1_000_000)
        comfy.model_management.current_loaded_models.clear()  # or the next contestant's load would push it out

    def batch(self, position: int) -> Batch:
        return self.sample

    def once(self) -> None:
        self.trainer.step()

    def close(self) -> None:
        self.stack.close()

    def sizes(self) -> dict[str, int]:
        return _sizes(self.trainer.parameters, self.trainer.optimizer)


def _sizes(parameters: list[Tensor], optimizer: torch.optim.Optimizer) -> dict[str, int]:
    moments = [value for state in optimizer.state.values() for value in state.values()]
    return {"adapters": sum(t.nbytes for t in parameters), "optimizer": sum(t.nbytes for t in moments)}


class _Ended(Exception):
    """Ends the native node's loop."""


class _Gate:
    """Stands in for the progress bar of the native node's loop: each update waits for the next turn."""

    waiting: dict[int, Callable[[], None]] = {}

    def __init__(self, total: int, *_: Any) -> None:
        self.update(0)

    def update(self, _: int) -> None:
        self.waiting[threading.get_ident()]()


class NativeStep(_Step):
    """``TrainLoraNode.execute`` in a thread of its own, let go for one step at a time."""

    def __init__(self, base: Any, latent: int, rank: int, bypass: bool, mode: Any) -> None:
        super().__init__(latent, mode)
        self.counted = mode is not None
        self.base, self.rank, self.bypass = base, rank, bypass
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.error: BaseException | None = None
        self.ended = False
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.step(start=True)
        comfy.model_management.current_loaded_models.clear()

    def step(self, start: bool = False) -> None:
        if start:
            self.thread.start()
        else:
            self.go.release()
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def close(self) -> None:
        self.ended = True
        self.go.release()
        self.thread.join()

    def _pause(self) -> None:
        self.done.release()
        self.go.acquire()
        if self.ended:
            raise _Ended

    def _patcher(self) -> Any:
        patcher = share(self.base).patcher

        def again(disable_dynamic: bool = False) -> Any:
            # the node reads a second model of its own, outside inference mode: a real copy where memory is counted
            return share(self.base, inference=False, copies=self.counted).patcher

        patcher.cached_patcher_init = (again, ())
        return patcher

    def _run(self) -> None:
        _Gate.waiting[threading.get_ident()] = self._pause
        host_trainer.ProgressBar = _Gate
        comfy.utils.PROGRESS_BAR_ENABLED = False
        torch.set_num_threads(torch.get_num_threads())
        patcher = self._patcher()
        node = host_trainer.TrainLoraNode
        values = {entry.id: [entry.default] for entry in node.define_schema().inputs if hasattr(entry, "default")}
        values |= {
            "model": [patcher],
            "latents": [{"samples": self.latent}, {"samples": self.latent.clone()}],
            "positive": [[[self.context, {}]], [[self.context.clone(), {}]]],
            "steps": [1_000_000],
            "learning_rate": [RATE],
            "rank": [self.rank],
            "training_dtype": ["fp32"],
            "lora_dtype": ["fp32"],
            "gradient_checkpointing": [False],
            "existing_lora": ["[None]"],
        }
        if "bypass_mode" in values:
            values["bypass_mode"] = [self.bypass]
        try:
            with self.mode, torch.inference_mode():
                node.execute(**values)
        except _Ended:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.done.release()
