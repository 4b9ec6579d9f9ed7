"""The trainer node: the graph's MODEL goes in, a LoRA and the MODEL with it come out."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import presets
from ..host.apply import apply_lora
from ..host.previews import Previews, PreviewSettings
from ..host.record import Request
from ..host.runs import IF_EXISTS
from ..host.session import train
from ..kernels.safetensors_io import load_tensors
from ..training.dataset.model import Dataset
from ..training.presets import NONE, TRAINER, label, settings
from ..training.settings import (
    AdapterSettings,
    ComponentSettings,
    ObjectiveSettings,
    OptimizerSettings,
    Plan,
    RunSettings,
)
from .compat import build
from .sockets import (
    CATEGORY,
    LOOM_ADAPTER_SETTINGS,
    LOOM_COMPONENT_SETTINGS,
    LOOM_DATASET,
    LOOM_OBJECTIVE_SETTINGS,
    LOOM_OPTIMIZER_SETTINGS,
    LOOM_PREVIEW_SETTINGS,
    LOOM_RUN_SETTINGS,
    LORA_MODEL,
    LOSS_MAP,
    explained,
    preset_widget,
    widgets,
)

# How often each run ended early. The host caches what a node returns: without this, the same queue again would be
# served the unfinished LoRA instead of going on with it.
_early_ends: dict[str, int] = {}


class LoomLoRATrainer(io.ComfyNode):
    """Trains a LoRA on the loaded model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
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
            has_intermediate_output=True,  # so that the host sends it again where it serves the node from its cache
            inputs=[
                io.Model.Input("model", tooltip="What is trained on, as wired: with LoRAs applied and shifts set."),
                io.Clip.Input("clip", optional=True, tooltip="Encodes the captions. Needed."),
                io.Vae.Input("vae", optional=True, tooltip="Encodes the images. Needed."),
                LOOM_DATASET.Input("dataset", tooltip="From the Dataset Loader."),
                *widgets(Plan),
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
                LOOM_COMPONENT_SETTINGS.Input(
                    "components", optional=True, tooltip="Text encoders and embeddings. Without: the MODEL alone."
                ),
                preset_widget(),
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
        components: ComponentSettings | None = None,
        preset: str = NONE,
        **options: Any,
    ) -> io.NodeOutput:
        chosen = presets.find(preset)
        sockets = {
            "adapter": adapter,
            "optimizer": optimizer,
            "objective": objective,
            "run": run,
            "components": components,
        }
        plan = Plan(
            **options,
            **{part: given or settings(part, chosen, {}) for part, given in sockets.items()},  # type: ignore[arg-type]
            preset=label(TRAINER, chosen, options),
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
        trained_model, trained_clip, _ = apply_lora(model, clip, result.lora)
        loss_map, shown = {"loss": result.losses}, {"loom_training": [result.training.for_ui()]}
        return io.NodeOutput(result.lora, trained_model, trained_clip, loss_map, result.report, ui=shown)
