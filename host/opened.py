"""One dataset that is open in the editor: edited through a journal, written only when asked.

- images by opaque ids, digests of their names; no path comes in or goes out
- what follows from captions (tags, findings, filters, crops) is computed when asked for and kept until the next edit
- edits are lines of an edit program, for some images or by a filter; focus boxes too
- of a folder, ``write`` puts captions into their files, if those are as they were read and still in a registered folder
- of a node, the edits live in its ``program``: what it was opened with, to the letter, and behind it what is added here
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..training.dataset.caption_files import Plan, Planned, plan_writing, write_captions
from ..training.dataset.caption_files import Refused as NotWritten
from ..training.dataset.edit_program import parse_operation, shortened
from ..training.dataset.filters import CountTokens, parse_filter, select
from ..training.dataset.focus_edits import ClearFocus, SetFocus
from ..training.dataset.journal import SHOWN, Done, Journal
from ..training.dataset.lint import lint
from ..training.dataset.lint_knowledge import TagKnowledge
from ..training.dataset.lint_rules import RULES, Finding
from ..training.dataset.model import Box, Dataset, DatasetError, Sample
from ..training.dataset.opening import dataset_state
from ..training.dataset.operations import Known, Operation, Selection, quick_findings
from . import folders
from .editor_views import TagTable, by_sample, concepts, crop_boxes, image_id
from .guard import Refused, without_places

FILTERS_KEPT = 8

Value = TypeVar("Value")


class Opened:
    """One dataset in the editor. Who uses it holds ``lock``, for which requests take turns; ``told``, ``idle`` and what
    never changes (ids, names) are for everybody.

    ``basis`` is what, besides ``key``, it was made from; ``given`` the program that came with it.
    """

    def __init__(
        self,
        name: str,
        key: object,
        dataset: Dataset,
        path: Path | None = None,
        state: str = "",
        *,
        basis: object = None,
        given: str = "",
        knowledge: TagKnowledge | None = None,
        count_tokens: CountTokens | None = None,
    ) -> None:
        self.id, self.name, self.key, self.basis = secrets.token_urlsafe(12), name, key, basis
        self.lock, self.turn, self.checking = threading.RLock(), asyncio.Lock(), asyncio.Lock()
        self.users = 0  # requests about it that are not answered yet
        self.read = dataset  # as the files say
        self.path, self.state = path, state  # of what it was opened from, when it was read
        self.keeps = "program" if path is None else "files"  # what holds the edits
        self.names = [sample.id for sample in dataset.samples]
        self.ids = {name: image_id(name) for name in self.names}
        self.images = {image: index for index, image in enumerate(self.ids.values())}
        self.revision = self._fetched = 0  # the latter: of the program that the page has
        self._derived: dict[str, Any] = {}
        self._filtered: OrderedDict[str, list[int]] = OrderedDict()
        self._checked: tuple[int, list[Finding]] | None = None  # what was found, and in which revision
        self.count_tokens = count_tokens or _no_tokens
        known = Known(knowledge or TagKnowledge(), self.count_tokens, self._findings_for)
        self.journal = Journal(dataset, known, given=given)
        self._facts = {
            "id": self.id,
            "name": name,
            "images": len(self.names),
            "keeps": self.keeps,
            "concepts": concepts(dataset),
            "notes": [*map(without_places, dataset.notes)],
        }
        self._tell()

    @property
    def dataset(self) -> Dataset:
        return self.journal.dataset

    @property
    def idle(self) -> bool:
        """Whether it may be closed without a loss."""
        return self._safe and not self.users

    def fits(self, program: str) -> bool:
        """Whether it was opened with that program, or has come to it by now."""
        return program in (self.journal.given, self.journal.program)

    def fetched(self) -> dict[str, Any]:
        """The program for the page, which keeps it from here on."""
        self._fetched = self.revision
        self._tell()
        return {"given": self.journal.given, "added": self.journal.added, "program": self.journal.program}

    def _tell(self) -> dict[str, Any]:
        """Renew what everybody is told, after each change."""
        journal, changed = self.journal, self.changed
        self._safe = not changed if self.keeps == "files" else self._fetched == self.revision
        state = {
            "revision": self.revision,
            "unsaved": len(self.unsaved),
            "changed_images": len(changed),
            "edits": journal.steps,
            "can_undo": journal.can_undo,
            "can_redo": journal.can_redo,
            "undo": journal.undo_line,
            "redo": journal.redo_line,
            "keeps": self.keeps,
        }
        self.told = {**self._facts, **state}  # in one go: it is read without the lock
        return state

    # -- by ids

    def index(self, image: object) -> int:
        """Raises Refused."""
        if not isinstance(image, str) or image not in self.images:
            raise Refused(404, "there is no such image in this dataset: open it again")
        return self.images[image]

    def indices(self, images: object) -> list[int]:
        """Raises Refused."""
        if not isinstance(images, list):
            raise Refused(400, "images has to be a list of ids")
        return list(dict.fromkeys(map(self.index, images)))

    def sample(self, image: object) -> Sample:
        return self.dataset.samples[self.index(image)]

    def samples(self, images: object) -> list[Sample]:
        samples = self.dataset.samples
        return [samples[index] for index in self.indices(images)]

    # -- what follows from the captions

    def _once(self, name: str, made: Callable[[], Value]) -> Value:
        if name not in self._derived:
            self._derived[name] = made()
        return self._derived[name]

    @property
    def unsaved(self) -> frozenset[str]:
        return self._once("unsaved", lambda: frozenset(self.journal.unsaved))

    @property
    def changed(self) -> frozenset[str]:
        """Those whose caption or focus is not as it was read, or written last."""
        return self._once("changed", lambda: frozenset(self.journal.changed))

    @property
    def tags(self) -> TagTable:
        return self._once("tags", lambda: TagTable(self.dataset))

    @property
    def boxes(self) -> dict[str, list[dict[str, Any]]]:
        return self._once("boxes", lambda: crop_boxes(self.dataset))

    @property
    def known_findings(self) -> dict[str, list[Finding]] | None:
        """By sample; None where this revision has not been checked yet."""
        return self._once("by sample", lambda: by_sample(self.findings[1])) if self.is_checked else None

    @property
    def findings(self) -> tuple[int, list[Finding]]:
        """(revision, what the last check found in it)."""
        assert self._checked is not None
        return self._checked

    @property
    def is_checked(self) -> bool:
        return self._checked is not None and self._checked[0] == self.revision

    def check(self) -> None:
        """The quick check. Takes seconds for thousands of images, so it is called without the lock."""
        with self.lock:
            dataset, revision = self.dataset, self.revision
        found = lint(dataset)
        with self.lock:
            self._checked = revision, found

    def _findings_for(self, dataset: Dataset, where: str) -> list[Finding]:
        """What a filter with lint: asks for, from the check there is."""
        return self.findings[1] if self.is_checked and asks(where) else quick_findings(dataset, where)

    def select(self, text: str) -> Sequence[int]:
        """Indices of the samples that a filter selects. DatasetError for what is none."""
        if not text.strip():
            return range(len(self.dataset.samples))
        if text not in self._filtered:
            findings = self._findings_for(self.dataset, text)
            self._filtered[text] = select(self.dataset, text, findings, self.count_tokens)
            while len(self._filtered) > FILTERS_KEPT:
                self._filtered.popitem(last=False)
        return self._filtered[text]

    # -- edits

    def operation(self, line: str, images: object = None) -> Operation:
        """An edit from its line, for some images where they are given. Raises DatasetError, Refused."""
        operation = parse_operation(line.strip())
        if images is None:
            return operation
        names = [self.names[index] for index in self.indices(images)]
        if operation.selection != Selection():
            raise Refused(400, "the line says itself which images it is for: leave out either that or images")
        if not names:
            raise Refused(400, "no image is selected: select some, or leave images out for all of them")
        everything = len(names) == len(self.images)
        return operation if everything else dataclasses.replace(operation, selection=Selection(ids=tuple(names)))

    def preview(self, operation: Operation) -> dict[str, Any]:
        found = self.journal.preview(operation)
        examples = [{"image": self.ids[each.id], "before": each.before, "after": each.after} for each in found.examples]
        return {"count": found.count, "selected": found.selected, "notes": list(found.notes), "examples": examples,
                "line": shortened(operation.line, SHOWN)}  # fmt: skip

    def do(self, operation: Operation) -> dict[str, Any]:
        return self._done(self.journal.do(operation))

    def focus(self, image: str, box: Box | None) -> dict[str, Any]:
        """Lay the crop of an image around a box, or around none."""
        only = Selection(ids=(self.sample(image).id,))
        told = self.do(ClearFocus(selection=only) if box is None else SetFocus(box, selection=only))
        return {**told, "crops": self.boxes.get(only.ids[0], [])}

    def undo(self) -> dict[str, Any]:
        return self._done(self._stepped(self.journal.can_undo, "nothing to undo", self.journal.undo))

    def redo(self) -> dict[str, Any]:
        return self._done(self._stepped(self.journal.can_redo, "nothing to redo", self.journal.redo))

    def write(self, images: object = None, dry_run: bool = False) -> dict[str, Any]:
        """Write captions into their files, of all images or some; or tell what would be written. Raises Refused where
        some could not be."""
        if self.keeps == "program":
            raise Refused(409, "the edits of a node are kept in its program, files stay as they are: open the folder "
                          "itself to write captions")  # fmt: skip
        now = self.dataset
        if images is not None:
            chosen = set(self.indices(images))
            pairs = enumerate(zip(now.samples, self.read.samples, strict=True))
            now = dataclasses.replace(now, samples=tuple(new if at in chosen else old for at, (new, old) in pairs))
        plan = _contained(plan_writing(self.read, now))
        if dry_run:
            count = sum(len(file.ids) for file in plan.files)
            return {"files": len(plan.files), "images": count, "refused": self._refused(plan.refused)}
        current = self._files_state()
        written = write_captions(plan)
        if current == self.state:  # else others have changed something too, and opening has to read it
            self.state = self._files_state()
        told = {
            "written": [self.ids[name] for name in written.ids],
            "files": len(written.files),
            "backups": [*map(without_places, written.backups)],
            "refused": self._refused(written.refused),
            **self._written(written.ids, {name: file.path for file in plan.files for name in file.ids}),
        }
        if written.refused:
            count, why = sum(len(each.ids) for each in written.refused), written.refused[0].reason
            raise Refused(409, f"captions of {count} of the images were not written: {why}", **told)
        return told

    def _refused(self, refused: Sequence[NotWritten]) -> list[dict[str, Any]]:
        return [
            {"images": [self.ids[name] for name in each.ids], "reason": without_places(each.reason)} for each in refused
        ]

    def _files_state(self) -> str:
        return dataset_state(self.path, folders.access()) if self.path else ""

    def _written(self, names: Collection[str], paths: dict[str, str]) -> dict[str, Any]:
        """The files of these samples now hold their captions."""
        index = {name: place for place, name in enumerate(self.names)}
        samples = list(self.read.samples)
        for name in names:
            place = index[name]
            caption = self.dataset.samples[place].caption.strip()  # as it is read from a file
            path = paths.get(name, samples[place].caption_path)
            samples[place] = dataclasses.replace(samples[place], caption=caption, caption_path=path)
        self.read = dataclasses.replace(self.read, samples=tuple(samples))
        self.journal.saved(names)
        if self._checked is not None and self.is_checked:
            self._checked = self.revision + 1, self._checked[1]  # captions are as they were
        self.revision += 1
        for name in ("unsaved", "changed"):
            self._derived.pop(name, None)
        return self._tell()

    def _stepped(self, possible: bool, otherwise: str, step: Callable[[], Done]) -> Done:
        if not possible:
            raise Refused(409, f"there is {otherwise}")
        return step()

    def _done(self, done: Done) -> dict[str, Any]:
        """What the page is told of an edit; what followed from the captions before is forgotten."""
        if done.ids:
            self.revision += 1
            self._derived.clear()
            self._filtered.clear()
        images = [self.ids[name] for name in done.ids]
        told = {"line": shortened(done.operation.line, SHOWN), "changed": images, "selected": done.selected}
        return {**told, "notes": list(done.notes), **self._tell()}


def _no_tokens(text: str) -> int:
    raise DatasetError(
        "tokens: counts with the tokenizer of a CLIP, which this dataset was opened without: connect clip to a Tag "
        "Editor node, queue the workflow and open that node"
    )


def _contained(plan: Plan) -> Plan:
    """The plan without files that are no longer in a registered folder."""
    allowed = folders.access().allowed
    inside: list[Planned] = []
    refused: list[NotWritten] = []
    for file in plan.files:
        if allowed(Path(file.path)) and allowed(Path(file.root)):
            inside.append(file)
        else:
            why = "its folder is no longer one of the dataset folders: open the dataset again"
            refused.append(NotWritten(file.ids, why))
    return dataclasses.replace(plan, files=tuple(inside), refused=(*plan.refused, *refused))


def asks(where: str) -> bool:
    """Whether a filter needs the findings of the quick check."""
    rules = parse_filter(where).rules if where.strip() else ()
    return bool(rules) and all(RULES[rule].needs != "pixels" for rule in rules)
