"""The contestants of ``train_step``: each has a ``step()`` and shares the base weights with all the others."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import comfy.model_management
import comfy.utils
import comfy_extras.nodes_train as host_trainer
import torch

from lora_loom.host.denoiser import Conditioning, HostDenoiser
from lora_loom.host.layers import weight_reader
from lora_loom.host.loan import borrow
from lora_loom.kernels.adapter import Options
from lora_loom.kernels.registry import make_adapter
from lora_loom.training.learners import Component
from lora_loom.training.loop import Batch, Trainer
from lora_loom.training.settings import OptimizerSettings, Plan
from peers import FAMILIES, DiffusersStep, LycorisStep, PeftStep
from steps import RATE, Step, share, sizes


def contestant(name: str, base: Any, latent: int, rank: int, mode: Any = None) -> Any:
    """``mode``, a memory counter, is on from the start of the set-up.

    A name is who it is and, where it is not LoRA, which family: "ours", "lycoris LoHa".
    """
    if name.startswith("native"):
        return NativeStep(base, latent, rank, bypass="bypass" in name, mode=mode)
    if name == "frozen":
        return FrozenStep(base, latent, mode)
    if name == "diffusers + peft":
        return DiffusersStep(base, latent, rank, mode)
    who, _, family = name.partition(" ")
    if who == "peft":
        return PeftStep(base, latent, rank, mode, family or "LoRA")
    if who == "lycoris":
        return LycorisStep(base, latent, rank, mode, family or "LoRA")
    if name in ("ours, checkpointed", "ours, offloaded"):
        return OurStep(base, latent, rank, mode, checkpoint=True, offload="offloaded" in name)
    return OurStep(base, latent, rank, mode, family or "LoRA")


class FrozenStep(Step):
    """The unit: forward, and backward to the input."""

    def __init__(self, base: Any, latent: int, mode: Any) -> None:
        super().__init__(latent, mode)
        self.network = share(base, inference=False).network

    def once(self) -> None:
        x = self.latent.clone().requires_grad_(True)
        self.network(x, self.time, context=self.context).backward(self.noise)


class OurStep(Step):
    def __init__(
        self,
        base: Any,
        latent: int,
        rank: int,
        mode: Any,
        family: str = "LoRA",
        checkpoint: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(latent, mode)
        shared, row = share(base), FAMILIES[family]
        sides = (8 * latent, 8 * latent)
        self.sample = Batch(self.latent, [Conditioning(self.context, {}, sides, (0, 0), sides)])
        self.stack = ExitStack()
        with self.mode:
            draws, options = torch.Generator().manual_seed(0), Options(rank, rank, **row.ours)
            weight_of = weight_reader(shared.patcher) if options.dora else lambda path: None
            adapters = {
                target.path: make_adapter(row.algorithm, target.shape, options, draws, weight_of(target.path))
                for target in shared.targets
            }
            loan = self.stack.enter_context(borrow(shared.patcher, adapters, checkpoint, offload=offload))
            plan = Plan(learning_rate=RATE, optimizer=OptimizerSettings(max_grad_norm=1.0))
            component = Component("model", adapters, plan.learning_rate)
            self.trainer = Trainer([component], HostDenoiser(loan), self, plan, total_steps=1_000_000)
        comfy.model_management.current_loaded_models.clear()  # or the next contestant's load would push it out

    def batch(self, position: int) -> Batch:
        return self.sample

    def once(self) -> None:
        self.trainer.step()

    def close(self) -> None:
        self.stack.close()

    def sizes(self) -> dict[str, int]:
        return sizes(self.trainer.parameters, self.trainer.optimizer)


class _Ended(Exception):
    """Ends the native node's loop."""


class _Gate:
    """Stands in for the progress bar of the native node's loop: each update waits for the next turn."""

    waiting: dict[int, Callable[[], None]] = {}

    def __init__(self, total: int, *_: Any) -> None:
        self.update(0)

    def update(self, _: int) -> None:
        self.waiting[threading.get_ident()]()


class NativeStep(Step):
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
