"""Captions written into their files, when that is asked for: nothing is lost, whatever happens meanwhile.

- ``plan_writing``: what would be written, and what cannot be, with the reason; nothing is done
- only ``<picture>.txt`` or ``.caption`` beside a picture of the dataset; captions in lists and of pictures of the graph
  are refused with a cure; links are never followed; a missing file is made
- a file that does not hold what was read, or that changes before its turn, is refused and named; the others are written
- line ends, byte order mark and white space around the caption stay as the file has them
- each file is replaced in one step; what it held lies in ``.lora_loom/captions-<date>-<time>/`` before anything is
  written, under its own name: ``restore_captions`` brings it back, copying does too
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime

from .caption_backups import (
    Aside,
    Conflict,
    Refused,
    State,
    back_up,
    caption_of,
    content_of,
    discard,
    read_file,
    settle,
)
from .files import CAPTION_TYPES, kind, stem
from .model import Dataset, DatasetError, FilePicture, Sample, listed
from .reading import LONGEST_CAPTION


@dataclass(frozen=True)
class Planned:
    """One file to write: whose caption, which text, and how the file was found; without a state it is to be made."""

    path: str
    ids: tuple[str, ...]
    text: str
    state: State | None
    root: str  # the folder whose backups it belongs to


@dataclass(frozen=True)
class Plan:
    """What writing would do; ``same`` are samples whose files say already what they should."""

    files: tuple[Planned, ...] = ()
    refused: tuple[Refused, ...] = ()
    same: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What was written: the samples whose captions are now in their files, and the folders with what was there."""

    ids: tuple[str, ...]
    files: tuple[str, ...]
    refused: tuple[Refused, ...]
    backups: tuple[str, ...]


# -- planning


def plan_writing(read: Dataset, now: Dataset) -> Plan:
    """How the files come to say what ``now`` says, where it differs from what was ``read``."""
    as_read = {sample.id: sample for sample in read.samples}
    refused: list[Refused] = []
    groups: dict[str, list[tuple[Sample, Sample]]] = defaultdict(list)  # by the file they were read from
    extensions = _extensions(read)
    for sample in now.samples:
        old = as_read.get(sample.id)
        picture = sample.picture
        if old is not None and isinstance(picture, FilePicture) and _type(old) in ("", *CAPTION_TYPES):
            groups[old.caption_path or _own(picture, extensions)].append((sample, old))
        elif old is None or old.caption != sample.caption:
            refused.append(Refused((sample.id,), _why_not(sample, old)))
    files: list[Planned] = []
    same: list[str] = []
    for path, members in groups.items():
        for target in _targets(path, members):
            try:
                planned = target.planned(_root(read, target.path))
            except Conflict as conflict:
                refused.append(Refused(target.ids, str(conflict)))
                continue
            if planned is None:
                same += target.ids
            else:
                files.append(planned)
    return Plan(tuple(files), tuple(refused), tuple(same))


@dataclass(frozen=True)
class _Target:
    """A file that is to hold the captions of some samples."""

    path: str
    samples: tuple[Sample, ...]
    known: str  # what it has to hold if it is there
    was_read: bool  # else it may be missing

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(sample.id for sample in self.samples)

    def planned(self, root: str) -> Planned | None:
        """None where the file says already what it should."""
        name = os.path.basename(self.path)
        texts = {sample.caption.strip() for sample in self.samples}
        if len(texts) > 1:
            raise Conflict(f"{listed(self.ids)} share {name} and have different captions: give them the same one")
        for sample in self.samples:
            assert isinstance(sample.picture, FilePicture)
            if os.path.dirname(sample.picture.path) != os.path.dirname(self.path):
                raise Conflict(f"{name} does not lie beside {sample.id}: copy it there, and open the dataset again")
        [text] = texts
        if (
            len(text.encode("utf-8", "surrogatepass")) > LONGEST_CAPTION
            or text.encode("utf-8", "ignore").decode() != text
        ):
            raise Conflict(f"the caption of {self.ids[0]} is too long for a file, or no text: correct it")
        state, content = read_file(self.path)
        if content is None:
            if self.was_read:
                raise Conflict(f"{name} is gone since it was read: open the dataset again")
            for other in CAPTION_TYPES:
                if os.path.lexists(stem(self.path) + other):
                    raise Conflict(f"{stem(name)}{other} is there instead of {name}: open the dataset again")
            return Planned(self.path, self.ids, text, None, root)
        holds = caption_of(name, content)
        if holds == text:
            return None
        if holds != self.known:
            raise Conflict(f"{name} was changed since it was read: open the dataset again and repeat the edit")
        twins = [stem(self.path) + other for other in CAPTION_TYPES if other != kind(self.path)]
        if any(map(os.path.lexists, twins)):
            raise Conflict(f"{os.path.basename(twins[0])} lies beside {name}: keep one of them only")
        return Planned(self.path, self.ids, text, state, root)


def _type(sample: Sample) -> str:
    return kind(sample.caption_path) if sample.caption_path else ""


def _extensions(read: Dataset) -> Counter[str]:
    """How often captions of each type were read: a new one gets the most frequent."""
    return Counter(_type(sample) for sample in read.samples if _type(sample) in CAPTION_TYPES)


def _own(picture: FilePicture, extensions: Counter[str]) -> str:
    return stem(picture.path) + (extensions.most_common(1)[0][0] if extensions else CAPTION_TYPES[0])


def _why_not(sample: Sample, old: Sample | None) -> str:
    if old is None or not isinstance(sample.picture, FilePicture):
        return f"{sample.id} comes from the graph and has no caption file: keep its edits in the program of Tag Editor"
    name = os.path.basename(old.caption_path or "")
    return (
        f"{sample.id} has its caption in {name}, which is not written: keep its edits in the program of Tag Editor, or "
        "put each caption into a .txt file beside its picture"
    )


def _targets(path: str, members: list[tuple[Sample, Sample]]) -> Iterator[_Target]:
    """The files for samples that were read from one, or were to be: (now, as read) of each.

    Faces cut out of a picture share its caption file; where they differ now, each gets a file of its own.
    """
    changed = {now.id for now, old in members if now.caption != old.caption}
    if not changed:
        return
    if len({now.caption.strip() for now, _ in members}) == 1:
        yield _target(path, path, members)
        return
    by_file: dict[str, list[tuple[Sample, Sample]]] = defaultdict(list)
    for now, old in members:
        assert isinstance(now.picture, FilePicture)
        by_file[stem(now.picture.path) + os.path.splitext(path)[1]].append((now, old))
    file_changes = any(now.id in changed for now, _ in by_file.get(path, ()))
    for target, sharing in by_file.items():
        if any(now.id in changed for now, _ in sharing) or (file_changes and target != path):
            yield _target(target, path, sharing)


def _target(target: str, path: str, members: list[tuple[Sample, Sample]]) -> _Target:
    old = members[0][1]
    return _Target(target, tuple(now for now, _ in members), old.caption.strip(), target == path == old.caption_path)


def _root(read: Dataset, target: str) -> str:
    """The folder of the dataset that a file lies in, or else its own."""
    folder = os.path.dirname(target)
    if not os.path.isdir(read.source):
        return folder
    try:
        inside = os.path.commonpath([read.source, folder]) == os.path.normpath(read.source)
    except ValueError:  # two drives, or a relative path
        return folder
    return read.source if inside else folder


# -- writing


def write_captions(plan: Plan, when: datetime | None = None) -> Written:
    """Carry a plan out; files that changed since it was made are refused, the others written.

    DatasetError, with nothing written, where what is there cannot be kept.
    """
    refused, when = list(plan.refused), when or datetime.now()
    due: list[tuple[Planned, bytes | None]] = []
    for planned in plan.files:
        try:
            due.append((planned, _unchanged(planned)))
        except Conflict as conflict:
            refused.append(Refused(planned.ids, str(conflict)))
    backups = [
        back_up(root, [(one.path, old, content_of(one.text, old)) for one, old in due if one.root == root], when)
        for root in dict.fromkeys(planned.root for planned, _ in due)
    ]
    ids, files = [*plan.same], []
    with ExitStack() as stack:
        asides: list[tuple[Planned, Aside]] = []
        for planned, old in due:
            with _noting(planned, refused):
                aside = Aside(planned.path, content_of(planned.text, old), new=old is None)
                asides.append((planned, stack.enter_context(aside)))
        try:
            settle([aside for _, aside in asides], backups)
        except OSError as error:
            for backup in backups:
                discard(backup)
            raise DatasetError(
                f"the captions cannot be stored ({error.strerror}), so nothing was written: make room there"
            ) from error
        for planned, aside in asides:
            with _noting(planned, refused):
                _unchanged(planned)
                aside.put()
                ids += planned.ids
                files.append(planned.path)
    return Written(tuple(ids), tuple(files), tuple(refused), tuple(backups))


@contextmanager
def _noting(planned: Planned, refused: list[Refused]) -> Iterator[None]:
    """Why a file cannot be written goes to what is refused."""
    try:
        yield
    except Conflict as conflict:
        refused.append(Refused(planned.ids, str(conflict)))
    except OSError as error:
        name = os.path.basename(planned.path)
        refused.append(Refused(planned.ids, f"{name} cannot be written ({error.strerror}): check its folder"))


def _unchanged(planned: Planned) -> bytes | None:
    """What the file holds, if it is as it was found."""
    state, content = read_file(planned.path)
    if state != planned.state:
        name = os.path.basename(planned.path)
        how = "appeared" if planned.state is None else "is gone" if state is None else "was changed"
        raise Conflict(f"{name} {how} in the meantime: open the dataset again and repeat the edit")
    return content
