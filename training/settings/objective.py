"""What is compared, at which timesteps, and how much each comparison counts."""

from __future__ import annotations

from dataclasses import dataclass

from ..curve import parse_curve
from ..options import OptionError, Settings, option

TIMESTEPS = {
    "automatic": "logit-normal for flow models, uniform for the others",
    "uniform": "every timestep equally often",
    "logit-normal": "mostly the middle of the trajectory: sigmoid of a normal draw (Esser et al. 2024)",
    "mode": "more of the middle the larger mode_scale is, more of both ends below 0 (Esser et al. 2024)",
    "cosmap": "as often as a cosine noise schedule passes them (Esser et al. 2024)",
    "curve": "as often as timestep_curve says",
}
SHIFTS = {
    "none": "timesteps as drawn",
    "fixed": "towards noise by shift, as sampling with that shift does",
    "resolution": "towards noise by the picture's size, as Flux does: 1.88 at 512², 3.16 at 1024²",
}
LOSSES = {
    "L2": "mean square error, what diffusion models are made with",
    "L1": "mean absolute error",
    "Huber": "square for small differences, straight for large ones: outliers count less",
    "smooth L1": "Huber over its threshold: large differences count alike whatever huber_c is",
}
HUBER_SCHEDULES = {
    "constant": "huber_c at every timestep",
    "exponential": "falls from 1 at clean pictures to huber_c at pure noise",
    "SNR": "falls with the signal-to-noise ratio, for noise, v and flow models alike",
}
PRIOR_TARGETS = {
    "images": "regularisation pictures are learned as they are",
    "base model": "on regularisation pictures the model is held to what it predicted before training",
}


@dataclass(frozen=True)
class ObjectiveSettings(Settings):
    first_release = ("timesteps", "logit_mean", "logit_std")

    timesteps: str = option("automatic", "How timesteps are drawn.", choices=TIMESTEPS)
    logit_mean: float = option(
        0.0,
        "Centre of logit-normal timesteps: above 0 noisier, below 0 cleaner.",
        low=-5.0,
        high=5.0,
        step=0.1,
    )
    logit_std: float = option(
        1.0, "Width of logit-normal timesteps.", low=0.05, high=5.0, step=0.05, expected="more than 0"
    )
    timestep_shift: str = option("none", "Move the drawn timesteps.", choices=SHIFTS, advanced=True)
    shift: float = option(
        3.0, "With timestep_shift fixed: σ becomes s·σ / (1 + (s−1)·σ).", low=0.01, high=100.0, step=0.1, advanced=True
    )
    mode_scale: float = option(
        1.29,
        "With timesteps mode: above 0 the middle is drawn more often, below 0 both ends.",
        low=-1.0,
        high=1.75,
        step=0.01,
        advanced=True,
    )
    timestep_curve: str = option(
        "",
        "With timesteps curve: how often each is drawn, as points time:weight from 0 (clean) to 1 (noise), joined by "
        "lines: 0:1, 0.5:3, 1:0. Nothing is drawn outside the first and the last point.",
        advanced=True,
    )
    min_timestep: int = option(
        0, "No timestep below this is trained; 0 is the clean end.", low=0, high=999, advanced=True
    )
    max_timestep: int = option(
        1000, "No timestep above this is trained; 1000 is pure noise.", low=1, high=1000, advanced=True
    )
    loss: str = option("L2", "How a prediction is compared with its target.", choices=LOSSES)
    huber_c: float = option(
        0.1, "Huber, smooth L1: where square turns into straight.", low=1e-6, high=100.0, step=0.01, advanced=True
    )
    huber_schedule: str = option(
        "SNR", "Huber, smooth L1: how huber_c changes along the timesteps.", choices=HUBER_SCHEDULES, advanced=True
    )
    huber_scale: float = option(
        1.0, "Huber, smooth L1: multiplies the scheduled huber_c.", low=1e-6, high=1000.0, step=0.1, advanced=True
    )
    min_snr_gamma: float = option(
        0.0,
        "Min-SNR weighting (Hang et al. 2023): little-noised pictures count less. 5 is usual, 0 is off.",
        low=0.0,
        high=1000.0,
        step=0.5,
    )
    debiased: bool = option(
        False, "Debiased estimation (Yu et al. 2024): weight 1/√SNR, so that structure counts more.", advanced=True
    )
    p2_gamma: float = option(
        0.0, "P2 weighting (Choi et al. 2022): weight (1 + SNR)^−γ; 0 is off.", low=0.0, high=10.0, step=0.1,
        advanced=True,
    )
    v_loss_scale: bool = option(
        False, "v-prediction: weigh the loss as noise prediction would (scale_v_pred_loss_like_noise_pred).",
        advanced=True,
    )
    v_like_loss: float = option(
        0.0, "Noise prediction: add this much of the loss weighted as v-prediction's (v_pred_like_loss).",
        low=0.0, high=10.0, step=0.05, advanced=True,
    )
    zero_terminal_snr: bool = option(
        False,
        "Train v-prediction models down to pure noise (Lin et al. 2023). Sample with ModelSamplingDiscrete, zsnr on.",
        advanced=True,
    )
    noise_offset: float = option(
        0.0,
        "Adds noise that is one colour all over, so that very dark and very bright pictures can be learned. 0.05 to "
        "0.1 is usual.",
        low=0.0,
        high=1.0,
        step=0.01,
    )
    noise_offset_random: bool = option(
        False, "Draw the strength of the noise offset between 0 and noise_offset for each picture.", advanced=True
    )
    adaptive_noise_offset: float = option(
        0.0,
        "Noise offset grows by this times the mean of the picture's latent (its size, per channel).",
        low=-10.0,
        high=10.0,
        step=0.01,
        advanced=True,
    )
    multires_noise_iterations: int = option(
        0, "Multi-resolution (pyramid) noise: layers of coarser noise; 6 to 10 is usual, 0 is off.", low=0, high=16,
        advanced=True,
    )
    multires_noise_discount: float = option(
        0.3, "Multi-resolution noise: strength of each coarser layer over the one before.", low=0.0, high=1.0,
        step=0.05, advanced=True,
    )
    input_perturbation: float = option(
        0.0,
        "Extra noise in what the model sees, not in what it shall predict (Ning et al. 2023). 0.1 is usual.",
        low=0.0,
        high=1.0,
        step=0.01,
        advanced=True,
    )
    prior_target: str = option(
        "images", "What regularisation pictures teach.", choices=PRIOR_TARGETS, advanced=True
    )
    preservation_weight: float = option(
        0.0,
        "Differential output preservation: how much the model is held to its old prediction for the class word. "
        "1 is usual, 0 is off; each step takes two more predictions.",
        low=0.0,
        high=100.0,
        step=0.1,
        advanced=True,
    )
    preservation_trigger: str = option(
        "", "Differential output preservation: the word of the captions that is replaced.", advanced=True
    )
    preservation_class: str = option(
        "", "Differential output preservation: what stands in its place (woman, cat, …).", advanced=True
    )

    def check_together(self) -> None:
        needs = (
            ("shift", 3.0, "timestep_shift", ("fixed",)),
            ("mode_scale", 1.29, "timesteps", ("mode",)),
            ("timestep_curve", "", "timesteps", ("curve",)),
            ("huber_c", 0.1, "loss", ("Huber", "smooth L1")),
            ("huber_schedule", "SNR", "loss", ("Huber", "smooth L1")),
            ("huber_scale", 1.0, "loss", ("Huber", "smooth L1")),
        )
        for name, default, owner, values in needs:
            if getattr(self, name) != default and getattr(self, owner) not in values:
                raise OptionError(
                    f"{name} is {getattr(self, name)!r}, expected {default!r}: it has an effect only with {owner} "
                    f"{' or '.join(values)}"
                )
        if self.timesteps == "curve" and not self.timestep_curve.strip():
            raise OptionError("timestep_curve is empty, expected points such as 0:1, 0.5:3, 1:0: timesteps is curve")
        if self.timesteps == "curve":
            parse_curve(self.timestep_curve)
        if self.timesteps not in ("automatic", "logit-normal") and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise OptionError(
                f"logit_mean and logit_std have no effect with timesteps {self.timesteps}: set them to 0 and 1, or "
                "timesteps to logit-normal"
            )
        if self.min_timestep >= self.max_timestep:
            raise OptionError(
                f"min_timestep is {self.min_timestep!r}, expected less than max_timestep ({self.max_timestep})"
            )
        if self.multires_noise_discount != 0.3 and not self.multires_noise_iterations:
            raise OptionError(
                f"multires_noise_discount is {self.multires_noise_discount!r}, expected 0.3: it has an effect only "
                "with multires_noise_iterations"
            )
        if not self.noise_offset and (self.noise_offset_random or self.adaptive_noise_offset):
            name = "noise_offset_random" if self.noise_offset_random else "adaptive_noise_offset"
            raise OptionError(f"{name} is {getattr(self, name)!r}, expected its default: noise_offset is 0")
        words = (self.preservation_trigger.strip(), self.preservation_class.strip())
        if self.preservation_weight and not all(words):
            name = "preservation_class" if words[0] else "preservation_trigger"
            raise OptionError(f"{name} is empty, expected the word that preservation_weight needs")
        if any(words) and not self.preservation_weight:
            raise OptionError("preservation_weight is 0, expected more: preservation_trigger and _class are set")
