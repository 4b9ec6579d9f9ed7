"""What is predicted, what is compared, which timesteps are drawn, and how much each comparison counts."""

from .checks import check_objective
from .losses import sample_losses
from .noise import Noised, add_noise
from .prediction import Denoiser, Prediction, per_sample
from .timesteps import draw_times
from .weights import loss_weights

__all__ = [
    "Denoiser",
    "Noised",
    "Prediction",
    "add_noise",
    "check_objective",
    "draw_times",
    "loss_weights",
    "per_sample",
    "sample_losses",
]
