"""The trainer node: the graph's MODEL goes in, a LoRA and the MODEL with it come out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host.apply import apply_lora
from ..host.previews import Previews, PreviewSettings
from ..host.record import Request
from ..host.runs import IF_EXISTS
from ..host.session import train
from ..kernels.safetensors_io import load_tensors
from ..training.dataset.model import Dataset
from ..training.settings import (
    LENGTH_UNITS,
    AdapterSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Plan,
    RunSettings,
)
from .compat import build
from .sockets import (
    CATEGORY,
    LOOM_ADAPTER_SETTINGS,
    LOOM_DATASET,
    LOOM_OBJECTIVE_SETTINGS,
    LOOM_OPTIMIZER_SETTINGS,
    LOOM_PREVIEW_SETTINGS,
    LOOM_RUN_SETTINGS,
    LORA_MODEL,
    LOSS_MAP,
    explained,
)

# How often each run ended early. The host caches what a node returns: without this, the same queue again would be
# served the unfinished LoRA instead of going on with it.
_early_ends: dict[str, int] = {}


class LoomLoRATrainer(io.ComfyNode):
    """Trains a LoRA on the loaded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = Plan()
        return build(
            io.Schema,
            node_id="LoomLoRATrainer",
            display_name="LoRA Trainer",
            category=CATEGORY,
            description=(
                "Trains a LoRA on the MODEL that the graph has loaded, without a second copy of it, and hands out the "
                "LoRA, and MODEL and CLIP with it applied. The model itself is given back unchanged."
            ),
            search_aliases=["train lora", "lora training", "fine-tune", "finetune", "dreambooth"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="What is trained on, as wired: with LoRAs applied and shifts set."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the captions. Needed; it is not trained."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the images. Needed."),
                LOOM_DATASET.Input("dataset", tooltip="From the Dataset Loader."),
                io.Int.Input(
                    "length", default=default.length, min=1, max=1000000, tooltip="How long to train, in units."
                ),
                io.Combo.Input(
                    "unit", options=list(LENGTH_UNITS), default=default.unit, tooltip=explained(LENGTH_UNITS)
                ),
                io.Float.Input(
                    "learning_rate",
                    default=default.learning_rate,
                    min=1e-8,
                    max=10.0,
                    step=1e-5,
                    round=False,
                    tooltip="1e-4 suits AdamW on most models. Too high: the loss jumps. Too low: nothing is learned.",
                ),
                io.Int.Input(
                    "rank",
                    default=default.rank,
                    min=0,
                    max=1024,
                    tooltip="Size of the adapters, 8 to 32 is usual. Larger: more detail, larger files.",
                ),
                io.Float.Input(
                    "alpha",
                    default=default.alpha,
                    min=-1024.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="The adapter acts with strength alpha / rank. alpha = rank is strength 1.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=default.batch_size,
                    min=1,
                    max=1024,
                    tooltip="Images per step, all of one bucket. Larger is steadier, slower and needs more memory.",
                ),
                io.Int.Input(
                    "seed",
                    default=default.seed,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Drives everything random: initial weights, order, noise, timesteps. Same seed, same LoRA.",
                ),
                io.String.Input(
                    "run_name",
                    default="my_lora",
                    tooltip="The run's folder below output/lora_loom. It keeps the LoRA and what is needed to go on.",
                ),
                io.Combo.Input(
                    "if_run_exists", options=list(IF_EXISTS), default="continue", tooltip=explained(IF_EXISTS)
                ),
                LORA_MODEL.Input(
                    "start_from", optional=True, tooltip="Begin with the weights of this LoRA instead of a fresh one."
                ),
                LOOM_ADAPTER_SETTINGS.Input(
                    "adapter", optional=True, tooltip="Which layers. Without: attention and MLP."
                ),
                LOOM_OPTIMIZER_SETTINGS.Input(
                    "optimizer", optional=True, tooltip="Optimizer and schedule. Without: AdamW, constant rate."
                ),
                LOOM_OBJECTIVE_SETTINGS.Input(
                    "objective", optional=True, tooltip="Timesteps. Without: what suits the model."
                ),
                LOOM_RUN_SETTINGS.Input("run", optional=True, tooltip="Memory, saving and cancelling."),
                LOOM_PREVIEW_SETTINGS.Input("preview", optional=True, tooltip="Pictures while training."),
            ],
            outputs=[
                LORA_MODEL.Output("lora", display_name="lora", tooltip="The trained LoRA, for any loader or saver."),
                io.Model.Output("trained_model", display_name="model", tooltip="The MODEL with the LoRA, strength 1."),
                io.Clip.Output("trained_clip", display_name="clip", tooltip="The CLIP that belongs to it."),
                LOSS_MAP.Output("loss_map", display_name="loss_map", tooltip="The loss of every step, to plot."),
                io.String.Output("report", display_name="report", tooltip="What was trained and what to know."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, run_name: Any = None, **_: Any) -> int:
        """Changes when the run of this name has ended early, so that the same queue again goes on with it."""
        if run_name is None:  # linked: which run it will be is not known yet
            return sum(_early_ends.values())
        return _early_ends.get(str(run_name), 0)

    @classmethod
    def execute(
        cls,
        model: Any,
        dataset: Dataset,
        length: int,
        unit: str,
        learning_rate: float,
        rank: int,
        alpha: float,
        batch_size: int,
        seed: int,
        run_name: str,
        if_run_exists: str,
        clip: Any = None,
        vae: Any = None,
        start_from: Any = None,
        adapter: AdapterSettings | None = None,
        optimizer: OptimizerSettings | None = None,
        objective: ObjectiveSettings | None = None,
        run: RunSettings | None = None,
        preview: PreviewSettings | None = None,
    ) -> io.NodeOutput:
        plan = Plan(
            length=length,
            unit=unit,
            learning_rate=learning_rate,
            rank=rank,
            alpha=alpha,
            batch_size=batch_size,
            seed=seed,
            adapter=adapter or AdapterSettings(),
            optimizer=optimizer or OptimizerSettings(),
            objective=objective or ObjectiveSettings(),
            run=run or RunSettings(),
        )
        request = Request(
            model=model,
            clip=clip,
            vae=vae,
            dataset=dataset,
            plan=plan,
            run_name=run_name,
            if_run_exists=if_run_exists,
            start_from=None if start_from is None else load_tensors(start_from),
            node_id=cls.hidden.unique_id,
            previews=None if preview is None else Previews(preview, model, clip, vae),
        )
        result = train(request)
        if not result.finished:
            _early_ends[run_name] = _early_ends.get(run_name, 0) + 1
        trained_model, trained_clip, _ = apply_lora(model, clip, result.lora, 1.0, 1.0)
        return io.NodeOutput(result.lora, trained_model, trained_clip, {"loss": result.losses}, result.report)
