"""Memory, precision, caches, saving, looking, and what the ✕ does."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import OptionError, Settings, option

ON_CANCEL = {
    "abort": "the ✕ saves what has been learned to the run folder, then aborts the prompt; queue again to go on",
    "stop and keep": "the ✕ ends the training; the LoRA so far leaves the node and the graph goes on",
}
SAVE_UNITS = {"steps": "save_every counts optimizer steps", "epochs": "save_every counts passes over the data set"}
COMPUTE = {
    "automatic": "as the host runs the model",
    "fp32": "exact, slowest",
    "bf16": "fast on new GPUs, needs no loss scaling",
    "fp16": "fast on older GPUs; the loss is scaled so that small gradients survive",
}
PARAMETERS = {
    "fp32": "adapters in full precision; recommended",
    "bf16": "half the memory; steps are rounded at random so that small ones are not lost",
}
CACHES = {
    "memory": "kept while the run lasts",
    "disk": "kept for later runs too, in the host's user folder (__lora_loom/cache, at most 32 GB); a changed picture, "
    "caption, VAE or CLIP is encoded anew",
}


@dataclass(frozen=True)
class RunSettings(Settings):
    first_release = ("gradient_checkpointing", "on_cancel", "save_every")

    gradient_checkpointing: bool = option(
        False,
        "Keep only the inputs of each block and run it once more in backward: about half the activation memory for "
        "about a third more time. The result is the same.",
    )
    on_cancel: str = option("abort", "What the ✕ does.", choices=ON_CANCEL)
    save_every: int = option(
        0,
        "Write the run to its folder every so many steps (or epochs), so that even a crash loses little, and keep the "
        "LoRA of that step. 0 writes it at the end and when the run is stopped.",
        low=0,
        high=100000,
        expected="0 (only at the end) or a number of steps",
    )
    save_unit: str = option("steps", "What save_every counts.", choices=SAVE_UNITS, advanced=True)
    keep_last: int = option(
        0,
        "How many of the LoRAs saved on the way are kept; older ones are deleted. 0 keeps all.",
        low=0,
        high=100000,
        advanced=True,
    )
    offload_activations: bool = option(
        False,
        "With gradient_checkpointing: keep the inputs of the blocks in main memory until they are needed.",
        advanced=True,
    )
    compute_dtype: str = option("automatic", "Precision the model computes in.", choices=COMPUTE, advanced=True)
    parameter_dtype: str = option("fp32", "Precision the adapters are kept in.", choices=PARAMETERS, advanced=True)
    ema_decay: float = option(
        0.0,
        "Also keep a moving average of the adapters, saved apart as …-ema. 0.99 to 0.9999, the longer the run the "
        "higher; 0 is off.",
        low=0.0,
        high=0.99999,
        step=0.001,
        expected="0 (off) to below 1",
    )
    validate_every: int = option(
        0,
        "Measure the loss on held-out pictures every so many steps (there are some where the dataset has a validation "
        "split). 0 measures at the beginning and at the end.",
        low=0,
        high=100000,
    )
    keep_best: bool = option(
        False, "Keep the LoRA with the lowest validation loss as …-best.", advanced=True
    )
    early_stop: int = option(
        0,
        "End the run when the validation loss has not fallen for this many measurements in a row. 0 never does.",
        low=0,
        high=1000,
        advanced=True,
    )
    latent_cache: str = option("memory", "Where encoded pictures are kept.", choices=CACHES, advanced=True)
    text_cache: str = option("memory", "Where encoded captions are kept.", choices=CACHES, advanced=True)
    sample_latents: bool = option(
        False,
        "Draw a fresh latent from the VAE's distribution at each presentation, as the models were trained, instead of "
        "taking its mean.",
        advanced=True,
    )
    text_variants: int = option(
        0,
        "With captions that vary (shuffle, dropout): how many variants of each are encoded; 0 takes a new one at "
        "every presentation.",
        low=0,
        high=1000,
        advanced=True,
    )
    tensorboard: bool = option(
        False, "Write curves for TensorBoard to the run folder (needs pip install tensorboard).", advanced=True
    )
    smoke_test: bool = option(
        True, "Before the first step, check that gradients reach every adapter, and name the layer that breaks them.",
        advanced=True,
    )

    def check_together(self) -> None:
        if self.offload_activations and not self.gradient_checkpointing:
            raise OptionError(
                "offload_activations is True, expected False: it has an effect only with gradient_checkpointing"
            )
        for name in ("keep_best", "early_stop"):
            if getattr(self, name) and not self.validate_every:
                value = getattr(self, name)
                raise OptionError(
                    f"{name} is {value!r}, expected {type(value)()!r}: validate_every is 0, so nothing is measured"
                )
        if self.keep_last and not self.save_every:
            raise OptionError(f"keep_last is {self.keep_last}, expected 0: save_every is 0, so nothing is saved before")
        if self.save_unit == "epochs" and not self.save_every:
            raise OptionError("save_unit is 'epochs', expected 'steps': save_every is 0, so nothing is saved before")
