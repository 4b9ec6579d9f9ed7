"""Settings nodes: each gathers the options of one part of a training run into one socket of the trainer."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..host import presets
from ..host.previews import PreviewSettings, sampler_names, scheduler_names
from ..training.optimizers import OPTIMIZERS, check_installed
from ..training.options import OptionError, options_of
from ..training.presets import NONE, settings
from ..training.settings import (
    AdapterSettings,
    ComponentSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunSettings,
)
from .sockets import (
    LOOM_ADAPTER_SETTINGS,
    LOOM_COMPONENT_SETTINGS,
    LOOM_OBJECTIVE_SETTINGS,
    LOOM_OPTIMIZER_SETTINGS,
    LOOM_PREVIEW_SETTINGS,
    LOOM_RUN_SETTINGS,
    preset_widget,
    settings_schema,
    widgets,
)


class LoomAdapterSettings(io.ComfyNode):
    """What hangs on which layers."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return settings_schema(
            "LoomAdapterSettings",
            "Adapter Settings",
            "What the adapters are made of, which layers of the model get one, and what is different in single blocks.",
            [*widgets(AdapterSettings), preset_widget()],
            LOOM_ADAPTER_SETTINGS,
            "adapter",
        )

    @classmethod
    def execute(cls, preset: str = NONE, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("adapter", presets.find(preset), options))


class LoomOptimizerSettings(io.ComfyNode):
    """How the weights follow the gradients."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return settings_schema(
            "LoomOptimizerSettings",
            "Optimizer Settings",
            "Optimizer, learning-rate schedule, gradient clipping and accumulation.",
            [*widgets(OptimizerSettings), preset_widget()],
            LOOM_OPTIMIZER_SETTINGS,
            "optimizer",
        )

    @classmethod
    def validate_inputs(cls, optimizer: Any = None) -> bool | str:
        """In the host's place, which would say no more of what a preset or another machine chose than that the list
        lacks it."""
        if optimizer is None:  # linked: not known yet
            return True
        try:
            options_of(OptimizerSettings)["optimizer"][0].check("optimizer", optimizer, "")
            check_installed(OPTIMIZERS[optimizer])
        except OptionError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, preset: str = NONE, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("optimizer", presets.find(preset), options))


class LoomObjectiveSettings(io.ComfyNode):
    """What is compared, where, and how much it counts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return settings_schema(
            "LoomObjectiveSettings",
            "Objective Settings",
            "Timesteps, noise, loss and its weights. The loss is taken in the space the model predicts in (noise, v or "
            "flow), whatever shift the sampling uses.",
            [*widgets(ObjectiveSettings), preset_widget()],
            LOOM_OBJECTIVE_SETTINGS,
            "objective",
        )

    @classmethod
    def execute(cls, preset: str = NONE, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("objective", presets.find(preset), options))


class LoomRunSettings(io.ComfyNode):
    """Memory, caches, saving, measuring, and what the ✕ does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return settings_schema(
            "LoomRunSettings",
            "Run Settings",
            "Memory use and precision, caches, saving and measuring while training, and what cancelling means.",
            [*widgets(RunSettings), preset_widget()],
            LOOM_RUN_SETTINGS,
            "run",
        )

    @classmethod
    def execute(cls, preset: str = NONE, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("run", presets.find(preset), options))


class LoomComponentSettings(io.ComfyNode):
    """Text encoders and embeddings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return settings_schema(
            "LoomComponentSettings",
            "Component Settings",
            "What is trained beside the diffusion model: text encoders, each at its own learning rate, and embeddings.",
            [*widgets(ComponentSettings), preset_widget()],
            LOOM_COMPONENT_SETTINGS,
            "components",
        )

    @classmethod
    def execute(cls, preset: str = NONE, **options: Any) -> io.NodeOutput:
        return io.NodeOutput(settings("components", presets.find(preset), options))


class LoomPreviewSettings(io.ComfyNode):
    """Pictures while training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = PreviewSettings()
        return settings_schema(
            "LoomPreviewSettings",
            "Preview Settings",
            "Samples the model with the LoRA so far, while it is trained, and keeps the pictures in the run folder.",
            [
                io.String.Input(
                    "prompts",
                    default=default.prompts,
                    multiline=True,
                    tooltip="One prompt per line; each gives one picture per seed.",
                ),
                io.String.Input(
                    "negative", default=default.negative, multiline=True, tooltip="The negative prompt of all pictures."
                ),
                io.Int.Input(
                    "every",
                    default=default.every,
                    min=1,
                    max=100000,
                    tooltip="Steps between two previews. There is one at the end in any case.",
                ),
                io.Combo.Input(
                    "sampler", options=sampler_names(), default=default.sampler, tooltip="As in the KSampler node."
                ),
                io.Combo.Input(
                    "scheduler", options=scheduler_names(), default=default.scheduler, tooltip="As in the KSampler."
                ),
                io.Int.Input("steps", default=default.steps, min=1, max=1000, tooltip="Sampling steps per picture."),
                io.Float.Input(
                    "cfg",
                    default=default.cfg,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="Classifier-free guidance. 1 turns the negative prompt off and is twice as fast.",
                ),
                io.Int.Input("width", default=default.width, min=16, max=8192, step=8, tooltip="Width in pixels."),
                io.Int.Input("height", default=default.height, min=16, max=8192, step=8, tooltip="Height in pixels."),
                io.String.Input(
                    "seeds",
                    default=default.seeds,
                    tooltip="Whole numbers separated by commas. The same seeds at every preview make them comparable.",
                ),
            ],
            LOOM_PREVIEW_SETTINGS,
            "preview",
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        return io.NodeOutput(PreviewSettings(**options))


