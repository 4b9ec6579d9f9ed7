"""The trainings of this process as the page sees them, and what the page asks of them.

* ``TRAININGS``: all that run and the last that have ended, by ids that tell nothing of paths
* ``Training``: one run: its state, curves, previews, memory, time left; read from any thread
* ``Training.add`` takes a line of the run's log and tells all pages of it by ``EVENT``, a few times a second at most; a
  change of state and answers are told at once. Nothing that goes wrong there reaches the loop
* events are numbered (``seq``): a page that misses one, or comes later, asks for everything
* ``Training.ask`` leaves a wish of the page, which the loop takes up between two steps (``steering``); every wish is
  answered with the step at which it was carried out, or why it was not, also by the end of the run
"""

from __future__ import annotations

import logging
import math
import secrets
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import comfy.model_management
import folder_paths
import torch
from comfy_execution.utils import get_executing_context

from ..training.history import History
from .guard import without_places
from .progress import host_server
from .runs import Run

EVENT = "lora_loom.training"
TRAINER = "LoomLoRATrainer"
SECONDS_BETWEEN_POINTS = 0.5
AT_ONCE, SECONDS_FOR_THEM = 8, 4.0  # changes that are told at once: so many, then two a second
RUNNING = ("preparing", "training", "paused", "saving", "previewing", "validating")
ENDED = ("done", "stopped", "failed")
SECONDS_BETWEEN_MEMORY = 2.0  # asking the host for it costs as much as all else together
WISHES = ("stop", "save", "preview", "pause", "continue")
ENDED_KEPT = 20  # trainings that are remembered
MOST_WISHES = 32  # that may wait
WISHES_KEPT = 2 * MOST_WISHES  # of each training, among them all that are not answered
PREVIEWS_KEPT = 1000
WAITING_SHOWN = 200
UI_POINTS = 200  # of each curve in the output of the node, which the host keeps with its history
TEXT = 400  # characters of an error that are shown


class WishError(ValueError):
    """What cannot be asked of this training now; says why and what to do."""


@dataclass
class Wish:
    """``step`` is None until it was taken up; ``note`` says what else there is to know."""

    number: int
    do: str
    step: int | None = None
    note: str = ""


class Training:
    """One run. The loop's thread writes, any thread reads and asks."""

    def __init__(self, run_name: Any = "", node_id: str | None = None, previews: bool = False) -> None:
        context = get_executing_context()
        self.id, self.node_id = secrets.token_hex(8), node_id
        self.prompt_id = None if context is None else context.prompt_id
        self.state, self.why, self.stopping = "preparing", "", False
        self.paused = False  # also while something is saved or shown meanwhile
        self._name, self._can_preview = str(run_name)[:100], previews
        self._run: Run | None = None
        self._total, self._device = 0, torch.device("cpu")
        self._history, self._previews = History(), deque[int](maxlen=PREVIEWS_KEPT)
        self._memory: dict[str, int] = {}
        self._asked_memory = -math.inf
        self._started = time.time()
        self._ended: float | None = None
        self._began, self._active, self._made = 0.0, 0.0, 0  # the first step's beginning, time spent since, steps made
        self._paused_since: float | None = None
        self._paused = 0.0
        self._bell = threading.Condition()  # rings for every wish, and guards all there is
        self._wishes: deque[Wish] = deque(maxlen=WISHES_KEPT)
        self._waiting: deque[Wish] = deque()
        self._number = self._seq = 0  # of the last wish, and of the last event
        self._points: dict[str, dict[str, list[Any]]] = {}  # what the pages do not know yet
        self._new_previews: list[int] = []
        self._answers: list[Wish] = []
        self._changed = self._broken = False
        self._told_points = -math.inf  # when
        self._told_changes = deque([-math.inf] * AT_ONCE, AT_ONCE)
        self._later: threading.Timer | None = None  # tells what was held back

    # -- the loop

    def take_up(self, history: History, previews: Iterable[int]) -> None:
        """What the run had measured and shown before."""
        with self._bell:
            self._history = history
            self._previews.extend(previews)

    def begin(self, run: Run, total: int, device: Any) -> None:
        with self._bell:
            self._name, self._run, self._total, self._device = run.name, run, total, device
            self._change()

    def add(self, line: Mapping[str, Any]) -> None:
        """A line of the log."""
        with self._bell:
            for name, step, value in self._history.add(line):
                columns = self._points.setdefault(name, {"step": [], "value": []})
                columns["step"].append(step)
                columns["value"].append(value if math.isfinite(value) else None)  # JSON has no NaN
            if "loss" in line:
                self._made += 1
                self._active = time.monotonic() - self._began - self._paused
            self._tell()

    def now(self, state: str) -> None:
        """What the run is doing."""
        with self._bell:
            if state == self.state:
                return
            moment = time.monotonic()
            if state == "training" and not self._began:
                self._began = moment
            if state in ("paused", "training"):  # what is done during a pause belongs to it
                if self._paused_since is not None:
                    self._paused += moment - self._paused_since
                self.paused = state == "paused"
                self._paused_since = moment if self.paused else None
            self.state = state
            self._change()

    @contextmanager
    def during(self, state: str) -> Iterator[None]:
        before = self.state
        self.now(state)
        try:
            yield
        finally:
            self.now(before)

    def previewed(self, step: int) -> None:
        with self._bell:
            for steps in (self._previews, self._new_previews):
                if step not in steps:
                    steps.append(step)
            self._change()

    def taken(self, *kinds: str) -> Wish | None:
        """The wish that has waited longest, of these kinds where any are named; to be answered."""
        with self._bell:
            for wish in self._waiting:
                if wish.do in kinds or not kinds:
                    self._waiting.remove(wish)
                    return wish
            return None

    def answer(self, wish: Wish, step: int, note: str = "") -> None:
        with self._bell:
            wish.step, wish.note = step, note
            self._answers.append(wish)
            self._change()

    def wait(self, seconds: float) -> None:
        """Until there is a wish, or so long."""
        with self._bell:
            self._bell.wait_for(lambda: self._waiting, seconds)

    def end(self, state: str, why: str = "") -> None:
        """The run is over; what was asked and not carried out is told so."""
        self.now(state)
        with self._bell:
            self._ended = time.time()
            self.why = _shown(why or self.why)
            for wish in self._wishes:
                if wish.step is None:
                    waited = wish in self._waiting
                    wish.step = self._history.step
                    wish.note = "the training had ended before" if waited else f"it was not done: {self.why or state}"
                    self._answers.append(wish)
            self._waiting.clear()
            self._tell(last=True)

    # -- the page

    @property
    def running(self) -> bool:
        return self.state in RUNNING

    def ask(self, do: str) -> dict[str, Any]:
        """Leave a wish. Raises WishError where it could not be carried out."""
        with self._bell:
            if not self.running:
                raise WishError(f"this training is {self.state}; queue the prompt again to go on with the run")
            if do == "preview" and not self._can_preview:
                raise WishError("this training has no preview settings; connect Preview Settings to the trainer")
            if self._waiting and self._waiting[-1].do == do:
                return asdict(self._waiting[-1])
            if len(self._waiting) >= MOST_WISHES:
                raise WishError("too much is asked of this training already; wait until its step is done")
            self._number += 1
            wish = Wish(self._number, do)
            self._wishes.append(wish)
            self._waiting.append(wish)
            self._bell.notify_all()
            return asdict(wish)

    def summary(self) -> dict[str, Any]:
        """What a list of trainings shows."""
        with self._bell:
            return self._summary()

    def everything(self, since: int | None = None) -> dict[str, Any]:
        """All that a panel is built from, of its curves what comes after the step ``since``."""
        with self._bell:
            return self._whole(self._history.points(since))

    def for_ui(self) -> dict[str, Any]:
        """The same with short curves, to be kept with the output of the node."""
        with self._bell:
            return self._whole(self._history.thinned(UI_POINTS))

    def preview_of(self, step: int) -> Any:
        """The file of a preview; None where there was none."""
        with self._bell:
            return None if self._run is None or step not in self._previews else self._run.preview_file(step)

    # -- inside the lock

    def _whole(self, points: dict[str, Any]) -> dict[str, Any]:
        wishes = list(map(asdict, self._wishes))
        return {**self._summary(), "points": points, "previews": list(self._previews), "wishes": wishes}

    def _summary(self) -> dict[str, Any]:
        left = max(0, self._total - self._history.step)
        return {
            "id": self.id,
            "seq": self._seq,
            "node": self.node_id,
            "prompt": self.prompt_id,
            "run": self._name,
            "state": self.state,
            "why": self.why,
            "step": self._history.step,
            "total": self._total,
            "seconds_left": left * self._active / self._made if self._made and self.running else None,
            "memory": self._memory,
            "started": self._started,
            "ended": self._ended,
            "can": self._can(),
        }

    def _can(self) -> list[str]:
        """What would have an effect now."""
        learned = self._history.step > 0  # else there is nothing to keep or to show
        effect = {
            "stop": learned and not self.stopping,
            "save": learned,
            "preview": learned and self._can_preview,
            "pause": not self.paused,
            "continue": self.paused,
        }
        return [do for do in WISHES if self.running and effect[do]]

    def _change(self) -> None:
        self._changed = True
        self._tell()

    def _tell(self, last: bool = False) -> None:
        """Tell the pages what is new: at once, or a little later where much has been told of late."""
        moment = time.monotonic()
        due = self._told_changes[0] + SECONDS_FOR_THEM if self._changed else math.inf
        if self._points:
            due = min(due, self._told_points + SECONDS_BETWEEN_POINTS)
        if last or due <= moment:
            self._send(moment)
        elif due < math.inf and self._later is None:  # by itself: a preview may take the loop minutes from here
            timer = threading.Timer(due - moment, self._held_back)
            timer.daemon = True
            with suppress(RuntimeError):  # no thread can be had: the next news bring this with them
                timer.start()
                self._later = timer

    def _held_back(self) -> None:
        with self._bell:
            self._later = None
            self._tell()

    def _send(self, moment: float) -> None:
        if self._changed:
            self._told_changes.append(moment)
        self._told_points = moment
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._seq += 1
        try:
            if not self.running or moment - self._asked_memory >= SECONDS_BETWEEN_MEMORY:
                self._asked_memory, self._memory = moment, _memory_of(self._device)
            news = {"points": self._points, "previews": self._new_previews, "wishes": list(map(asdict, self._answers))}
            server = host_server()
            if server is not None:
                server.send_sync(EVENT, {**self._summary(), **news})  # to all pages
        except Exception:
            if not self._broken:  # once is enough
                logging.warning("LoRA Loom: the page could not be told of the training", exc_info=True)
            self._broken = True
        self._points, self._new_previews, self._answers, self._changed = {}, [], [], False


class Trainings:
    """Trainings by id, in the order they began; of those that have ended only the last ``kept``."""

    def __init__(self, kept: int = ENDED_KEPT) -> None:
        self.kept, self._lock = kept, threading.Lock()
        self._known: dict[str, Training] = {}

    @contextmanager
    def begun(self, training: Training) -> Iterator[Training]:
        """Known from here on; has ended when the ``with`` does, as done where nothing else was said."""
        with self._lock:
            self._known[training.id] = training
        try:
            yield training
            if training.running:
                training.end("done")
        except comfy.model_management.InterruptProcessingException:
            training.end("stopped", "stopped by you")
            raise
        except BaseException as error:
            training.end("failed", _first_line(error))
            raise
        finally:
            self._forget()

    def _forget(self) -> None:
        with self._lock:
            ended = [name for name, training in self._known.items() if not training.running]
            for name in ended[: max(0, len(ended) - self.kept)]:
                del self._known[name]

    def find(self, name: str) -> Training | None:
        with self._lock:
            return self._known.get(name)

    def all(self) -> list[Training]:
        with self._lock:
            return list(self._known.values())


TRAININGS = Trainings()


def waiting() -> list[dict[str, Any]]:
    """The trainers of prompts that wait in the host's queue, in the order of the queue."""
    server, found = host_server(), []
    if server is None:
        return []
    _, queue = server.prompt_queue.get_current_queue_volatile()
    for _, prompt_id, prompt, *_ in sorted(queue, key=lambda item: item[0]):
        for node_id, node in prompt.items():
            if node.get("class_type") == TRAINER:
                name = node.get("inputs", {}).get("run_name")
                known = name[:100] if isinstance(name, str) else None  # else it comes from another node
                found.append({"node": node_id, "prompt": prompt_id, "run": known})
    return found[:WAITING_SHOWN]


def _memory_of(device: Any) -> dict[str, int]:
    """Bytes of the device that computes."""
    management = comfy.model_management
    free, total = management.get_free_memory(device), management.get_total_memory(device)
    return {"free": int(free), "total": int(total)}


def _shown(why: str) -> str:
    """Without places on the disk, and short; whatever goes wrong here, the run has ended as it has."""
    try:
        return without_places(why, {"output": [folder_paths.get_output_directory()]})[:TEXT] if why else ""
    except Exception:
        logging.warning("LoRA Loom: the page could not be told why the training has ended", exc_info=True)
        return "the server's log says why"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
