"""Settings nodes: each gathers the options of one part of a training run into one socket of the trainer."""

from __future__ import annotations

from comfy_api.latest import io

from ..host.previews import PreviewSettings, sampler_names, scheduler_names
from ..kernels.layers import PRESETS
from ..training.settings import (
    ON_CANCEL,
    OPTIMIZERS,
    SCHEDULES,
    TIMESTEPS,
    AdapterSettings,
    ObjectiveSettings,
    OptimizerSettings,
    RunSettings,
)
from .sockets import (
    LOOM_ADAPTER_SETTINGS,
    LOOM_OBJECTIVE_SETTINGS,
    LOOM_OPTIMIZER_SETTINGS,
    LOOM_PREVIEW_SETTINGS,
    LOOM_RUN_SETTINGS,
    explained,
    settings_schema,
)


class LoomAdapterSettings(io.ComfyNode):
    """Which layers are trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = AdapterSettings()
        return settings_schema(
            "LoomAdapterSettings",
            "Adapter Settings",
            "Which layers of the model get an adapter, and how large the convolutions' adapters are.",
            [
                io.Combo.Input(
                    "layers",
                    options=list(PRESETS),
                    default=default.layers,
                    tooltip=explained({preset.name: preset.description for preset in PRESETS.values()}),
                ),
                io.Int.Input(
                    "conv_rank",
                    default=default.conv_rank,
                    min=0,
                    max=512,
                    tooltip="Rank of the adapters on k×k convolutions (LoCon). 0 leaves those layers out; "
                    "they are part of the full preset only.",
                ),
                io.Float.Input(
                    "conv_alpha",
                    default=default.conv_alpha,
                    min=-1024.0,
                    max=1024.0,
                    step=0.5,
                    tooltip="Alpha of the convolutions' adapters; their strength is conv_alpha / conv_rank.",
                ),
            ],
            LOOM_ADAPTER_SETTINGS,
            "adapter",
        )

    @classmethod
    def execute(cls, layers: str, conv_rank: int, conv_alpha: float) -> io.NodeOutput:
        return io.NodeOutput(AdapterSettings(layers, conv_rank, conv_alpha))


class LoomOptimizerSettings(io.ComfyNode):
    """How the weights follow the gradients."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = OptimizerSettings()
        return settings_schema(
            "LoomOptimizerSettings",
            "Optimizer Settings",
            "Optimizer, learning-rate schedule, gradient clipping and accumulation.",
            [
                io.Combo.Input(
                    "optimizer", options=list(OPTIMIZERS), default=default.optimizer, tooltip=explained(OPTIMIZERS)
                ),
                io.Float.Input(
                    "weight_decay",
                    default=default.weight_decay,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    round=False,
                    tooltip="Pulls the adapter towards zero, decoupled from the gradient.",
                ),
                io.Float.Input(
                    "beta1",
                    default=default.beta1,
                    min=0.0,
                    max=0.9999,
                    step=0.01,
                    round=False,
                    tooltip="Memory of the mean gradient.",
                ),
                io.Float.Input(
                    "beta2",
                    default=default.beta2,
                    min=0.0,
                    max=0.99999,
                    step=0.001,
                    round=False,
                    tooltip="Memory of the squared gradient.",
                ),
                io.Float.Input(
                    "epsilon",
                    default=default.epsilon,
                    min=1e-16,
                    max=1.0,
                    step=1e-8,
                    round=False,
                    tooltip="Added to the denominator of the update; larger values calm very small gradients.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default=default.schedule, tooltip=explained(SCHEDULES)
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=default.warmup_steps,
                    min=0,
                    max=100000,
                    tooltip="Steps over which the learning rate rises linearly from zero.",
                ),
                io.Float.Input(
                    "max_grad_norm",
                    default=default.max_grad_norm,
                    min=0.0,
                    max=1000.0,
                    step=0.1,
                    tooltip="Longer gradients are shortened to this norm. 0 does not clip.",
                ),
                io.Int.Input(
                    "gradient_accumulation",
                    default=default.gradient_accumulation,
                    min=1,
                    max=1024,
                    tooltip="Batches per optimizer step: the effective batch size is batch_size times this.",
                ),
            ],
            LOOM_OPTIMIZER_SETTINGS,
            "optimizer",
        )

    @classmethod
    def execute(cls, **options) -> io.NodeOutput:
        return io.NodeOutput(OptimizerSettings(**options))


class LoomObjectiveSettings(io.ComfyNode):
    """Which timesteps are trained."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = ObjectiveSettings()
        return settings_schema(
            "LoomObjectiveSettings",
            "Objective Settings",
            "How timesteps are drawn. The loss is the mean square error in the space the model predicts in (noise, v "
            "or flow), whatever shift the sampling uses.",
            [
                io.Combo.Input(
                    "timesteps", options=list(TIMESTEPS), default=default.timesteps, tooltip=explained(TIMESTEPS)
                ),
                io.Float.Input(
                    "logit_mean",
                    default=default.logit_mean,
                    min=-5.0,
                    max=5.0,
                    step=0.1,
                    tooltip="Centre of logit-normal timesteps: above 0 noisier, below 0 cleaner. Unused by uniform.",
                ),
                io.Float.Input(
                    "logit_std",
                    default=default.logit_std,
                    min=0.05,
                    max=5.0,
                    step=0.05,
                    tooltip="Width of logit-normal timesteps. Unused by uniform.",
                ),
            ],
            LOOM_OBJECTIVE_SETTINGS,
            "objective",
        )

    @classmethod
    def execute(cls, timesteps: str, logit_mean: float, logit_std: float) -> io.NodeOutput:
        return io.NodeOutput(ObjectiveSettings(timesteps, logit_mean, logit_std))


class LoomRunSettings(io.ComfyNode):
    """Memory, saving, and what the ✕ does."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        default = RunSettings()
        return settings_schema(
            "LoomRunSettings",
            "Run Settings",
            "Memory use, saving while training, and what cancelling means.",
            [
                io.Boolean.Input(
                    "gradient_checkpointing",
                    default=default.gradient_checkpointing,
                    tooltip="Keep only the inputs of each block and run it once more in backward: about half the "
                    "activation memory for about a third more time. The result is the same.",
                ),
                io.Combo.Input(
                    "on_cancel", options=list(ON_CANCEL), default=default.on_cancel, tooltip=explained(ON_CANCEL)
                ),
                io.Int.Input(
                    "save_every",
                    default=default.save_every,
                    min=0,
                    max=100000,
                    tooltip="Write the run to its folder every so many steps, so that even a crash loses little. "
                    "0 writes it at the end and when the run is stopped.",
                ),
            ],
            LOOM_RUN_SETTINGS,
            "run",
        )

    @classmethod
    def execute(cls, gradient_checkpointing: bool, on_cancel: str, save_every: int) -> io.NodeOutput:
        return io.NodeOutput(RunSettings(gradient_checkpointing, on_cancel, save_every))


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


