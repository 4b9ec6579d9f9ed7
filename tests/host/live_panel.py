"""What a page would do with a training, for tests in the process that trains: ``watching(name, script)`` beside it."""

import threading
import time
from contextlib import contextmanager

import comfy.model_management
import torch

from lora_loom.host import session as sessions
from lora_loom.host.live import TRAININGS
from lora_loom.host.previews import Previews, PreviewSettings
from lora_loom.host.record import Request
from lora_loom.training.loop import Trainer
from small_runs import parts, plan

PATIENCE = 60  # seconds until a test gives up


def slow_steps(monkeypatch):
    """Steps that leave time to ask for something between them."""
    step = Trainer.step

    def slow(self):
        time.sleep(0.02)
        return step(self)

    monkeypatch.setattr(Trainer, "step", slow)


def until(done):
    deadline = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.002)
    return found


class Panel:
    """What a page would do with the training of that name, in a thread of its own."""

    def __init__(self, name):
        self.training = until(lambda: next((one for one in TRAININGS.all() if one.summary()["run"] == name), None))

    def state(self):
        return self.training.summary()["state"]

    def at(self, step):
        until(lambda: self.training.summary()["step"] >= step)

    def ask(self, do):
        """The answer, once there is one."""
        number = self.training.ask(do)["number"]
        return until(lambda: self.answer(number))

    def answer(self, number):
        [wish] = [wish for wish in self.training.everything()["wishes"] if wish["number"] == number]
        return wish if wish["step"] is not None else None


@contextmanager
def watching(name, script):
    """``script(panel)`` runs beside what is inside; what it raises is raised here."""
    wrong = []

    def go():
        try:
            script(Panel(name))
        except BaseException as error:
            wrong.append(error)
            comfy.model_management.interrupt_current_processing()  # nobody would let it go on

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield
    finally:
        thread.join(PATIENCE)
        comfy.model_management.interrupt_current_processing(False)
        if wrong:
            raise wrong[0]


def previewed(dataset, name, every=1000, **options):
    settings = PreviewSettings("zorb", every=every, steps=1, cfg=1.0, width=32, height=32)
    with torch.inference_mode():
        return sessions.train(Request(*parts(), dataset, plan(**options), name, previews=Previews(settings, *parts())))


def known(name):
    return [training for training in TRAININGS.all() if training.summary()["run"] == name]


def line(step, loss=0.5):
    return {"step": step, "loss": loss, "learning_rate": 1e-4, "seconds": 0.1, "bands": [loss, None, None, None]}
