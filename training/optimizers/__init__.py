"""Optimizers: one table of them, how they are made, and what of them is saved."""

from .make import check_installed, check_optimizer, make_optimizer, saves_averages
from .table import OPTIMIZERS, known, offered

__all__ = ["OPTIMIZERS", "check_installed", "check_optimizer", "known", "make_optimizer", "offered", "saves_averages"]
