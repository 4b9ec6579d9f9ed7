"""All datasets that are open in the editor, and those that nodes of the graph have had.

- opened by what a Dataset Loader's widgets hold, or as a node of the graph has just had it (``keep``)
- opening the same again finds the same one, with its edits and their history: a reload of the page loses nothing
- of each node one: where it had another dataset meanwhile, or its program is another one, that is opened instead
- so many at most: those without edits that are only here make room, and where all have some, opening is refused
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.dataset.lint_knowledge import read_knowledge
from ..training.dataset.model import Concept, Dataset, DatasetError, GraphPicture
from ..training.dataset.opening import dataset_state, open_dataset
from ..training.dataset.settings import concept_from
from . import folders
from .checking import token_counter
from .folders import NONE
from .guard import Refused, without_places
from .opened import Opened

MOST_OPEN = 8
MOST_KEPT = 16  # datasets of nodes
UNWRITTEN = "\ue000unwritten"  # stands for a trigger while a folder is opened in which captions are yet to be written
ALONE = ", shown with the trigger alone"  # as notes have it


class GraphsTokens:
    """Counts tokens by a CLIP of the graph, as long as the graph has it."""

    def __init__(self, clip: Any) -> None:
        self._clip = weakref.ref(clip)
        self._count: Callable[[str], int] | None = None

    def __call__(self, text: str) -> int:
        self._count = self._count or token_counter(self)
        assert self._count is not None
        return self._count(text)

    def tokenize(self, text: str) -> Any:
        clip = self._clip()
        if clip is None:
            raise DatasetError("tokens: the CLIP that counted them is gone: queue the workflow again")
        return clip.tokenize(text)


@dataclass(frozen=True)
class Kept:
    """What a node has had; models and pixels are not kept alive by it."""

    dataset: Callable[[], Dataset | None]
    tokens: GraphsTokens | None


class Editing:
    """All datasets that are open, and those that nodes have had."""

    def __init__(self) -> None:
        self._lock, self._opening = threading.RLock(), threading.Lock()
        self._open: OrderedDict[str, Opened] = OrderedDict()  # the last used at the end
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    # -- datasets of the graph

    def keep(self, node_id: str | None, dataset: Dataset, clip: Any = None) -> None:
        """Remember what a node has just had. Pixels of the graph are not kept alive by that, nor is its CLIP."""
        if node_id is None:
            return
        pictures = any(
            isinstance(picture, GraphPicture) for sample in dataset.samples for picture in (sample.picture, sample.mask)
        )
        found = weakref.ref(dataset) if pictures else lambda: dataset
        tokens = GraphsTokens(clip) if getattr(type(clip), "__weakrefoffset__", 0) else None
        with self._lock:
            self._kept[str(node_id)] = Kept(found, tokens)
            self._kept.move_to_end(str(node_id))
            while len(self._kept) > MOST_KEPT:
                self._kept.popitem(last=False)

    def kept(self) -> dict[str, Dataset]:
        """By node, those that are still there."""
        with self._lock:
            return {node: dataset for node, kept in self._kept.items() if (dataset := kept.dataset()) is not None}

    # -- opening

    def open_node(self, node: object, program: str = "", implications: str = NONE, again: bool = False) -> Opened:
        """The dataset that a node had when it ran last, edited as a program says; with a table of implied tags.

        The one that is open already, if the program is what that was opened with or what it is now.
        """
        with self._lock:
            kept = self._kept.get(node) if isinstance(node, str) else None
        dataset = None if kept is None else kept.dataset()
        if kept is None or dataset is None:
            raise Refused(404, "that node has not run since the server was started: queue the workflow first")
        basis = (id(dataset), implications)  # an open one keeps its dataset alive: no other has this id

        def fits(found: Opened) -> bool:
            with found.lock:
                return not again and found.basis == basis and found.fits(program)

        def made() -> Opened:
            return Opened(
                without_places(dataset.source),
                ("node", node),
                dataset,
                basis=basis,
                given=program,
                knowledge=read_knowledge(None, folders.resolve_table(implications, "implications")),
                count_tokens=kept.tokens,
            )

        return self._opened(("node", node), fits, made)

    def open_source(
        self, root: object, folder: object, resolution: int, bucket_step: int, trigger: str, again: bool = False
    ) -> Opened:
        """A folder or file of a registered root. Refused where it is not listed, DatasetError where it is none."""
        if not isinstance(root, str) or root not in folders.roots() or folder not in folders.list_sources(root):
            raise Refused(404, "there is no such folder with images among the registered ones: choose one of the list")
        path = folders.resolve(root, folder)
        state = dataset_state(path, folders.access())
        concept = concept_from(resolution, bucket_step, trigger=trigger)
        key = ("source", root, folder, concept)

        def fits(found: Opened) -> bool:
            return not again and (found.state == state or not found.idle)

        name = f"{root}/{folder}"
        return self._opened(key, fits, lambda: Opened(name, key, read_to_edit(path, concept), path, state))

    def _opened(self, key: object, fits: Callable[[Opened], bool], made: Callable[[], Opened]) -> Opened:
        """The one that is open already if it ``fits``, else a new one in its place."""
        with self._opening:
            found = self._by(key)
            if found is not None and fits(found):
                return self.get(found.id)
            new = made()
            with self._lock:
                if found is not None:
                    self._open.pop(found.id, None)
                self._make_room()
                self._open[new.id] = new
            return new

    def _by(self, key: object) -> Opened | None:
        return next((each for each in self.all() if each.key == key), None)

    def _make_room(self) -> None:
        while len(self._open) >= MOST_OPEN:
            idle = next((each for each in self._open.values() if each.idle), None)
            if idle is None:
                raise Refused(409, f"{MOST_OPEN} datasets with unwritten edits are open: write or close one of them")
            del self._open[idle.id]

    # -- those that are open

    def all(self) -> list[Opened]:
        with self._lock:
            return list(self._open.values())

    def get(self, dataset: object) -> Opened:
        """By its id. Raises Refused."""
        with self._lock:
            if not isinstance(dataset, str) or dataset not in self._open:
                raise Refused(404, "there is no such dataset open: open it again")
            self._open.move_to_end(dataset)
            return self._open[dataset]

    def close(self, dataset: object) -> None:
        """Forget one, with its edits."""
        with self._lock:
            del self._open[self.get(dataset).id]


def read_to_edit(path: Path, concept: Concept) -> Dataset:
    """A dataset whose captions may be missing still, and whose damaged files are left out with a note."""
    bare = not concept.captions.trigger
    stand_in = dataclasses.replace(concept, captions=dataclasses.replace(concept.captions, trigger=UNWRITTEN))
    dataset = open_dataset(path, stand_in if bare else concept, folders.access(), if_unreadable="skip")
    if not bare:
        return dataset
    concepts = tuple(
        dataclasses.replace(each, captions=dataclasses.replace(each.captions, trigger=""))
        if each.captions.trigger == UNWRITTEN
        else each
        for each in dataset.concepts
    )
    notes = tuple(note.replace(ALONE, "") for note in dataset.notes)
    return dataclasses.replace(dataset, concepts=concepts, notes=notes)


EDITING = Editing()
