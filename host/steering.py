"""What the page asks of a running training, carried out between two steps. None of it changes what is learned.

* stop: the run ends as with ``on_cancel`` set to stop and keep: the LoRA so far leaves the node, the graph goes on
* save: the LoRA and the state of this step, as ``save_every`` writes them
* preview: pictures of this step, once the model is given back
* pause, continue: the loop waits without computing, and still hears the host's ✕; what it has in the device's memory
  stays there, and what else is queued waits with it
"""

from __future__ import annotations

import comfy.model_management

from ..training.loop import Trainer
from . import keeping
from .live import Wish
from .record import Session

PATIENCE = 0.1  # seconds between two looks at the ✕ while paused


def heed(session: Session, trainer: Trainer) -> bool:
    """Do what is asked; stays here while the run is paused. True where a preview is wanted."""
    training = session.training
    while True:
        wish = training.taken()
        if wish is not None:
            if _carry_out(wish, session, trainer):
                return True
        elif training.paused:
            training.now("paused")
            training.wait(PATIENCE)
            comfy.model_management.throw_exception_if_processing_interrupted()
        else:
            training.now("training")
            return False


def stop_if_asked(session: Session, trainer: Trainer) -> None:
    """Between two pictures that are encoded."""
    wish = session.training.taken("stop")
    if wish is not None:
        _carry_out(wish, session, trainer)


def _carry_out(wish: Wish, session: Session, trainer: Trainer) -> bool:
    """Whether a preview is wanted."""
    training, step = session.training, trainer.step_number
    if wish.do == "stop":
        training.stopping = True
        training.answer(wish, step, "" if step else "nothing has been learned yet: the prompt ends here")
        raise comfy.model_management.InterruptProcessingException
    if wish.do in ("pause", "continue"):
        paused, pause = training.paused, wish.do == "pause"
        training.now("paused" if pause else "training")
        training.answer(wish, step, f"it was {'' if paused else 'not '}paused" if paused == pause else "")
        return False
    if not step:
        training.answer(wish, step, "nothing has been learned yet; ask again after the first step")
        return False
    if wish.do == "save":
        trainer.check_finite()
        keeping.save(session, trainer, complete=False, on_the_way=True)
    training.answer(wish, step)
    return wish.do == "preview"
