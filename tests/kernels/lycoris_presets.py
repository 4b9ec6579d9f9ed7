"""LyCORIS' presets while a network is made: it keeps them on its class, where the next test would find them."""

from contextlib import contextmanager

from lycoris.config import PRESET
from lycoris.wrapper import LycorisNetwork


@contextmanager
def preset(**changes):
    """LyCORIS with its own settings, its preset "full" and ``changes`` on top of it; afterwards as it was."""
    before = {name: value for name, value in vars(LycorisNetwork).items() if name.isupper()}
    LycorisNetwork.apply_preset({**PRESET["full"], "lora_prefix": "lycoris", **changes})
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(LycorisNetwork, name, value)
