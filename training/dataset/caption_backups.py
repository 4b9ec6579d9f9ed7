"""Caption files as they are on the disk: read with what they were, replaced in one step, kept and brought back."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath

from .files import CAPTION_TYPES, kind
from .model import DatasetError
from .reading import LONGEST_CAPTION

BACKUPS = ".lora_loom"
MANIFEST = "written.json"
LARGEST_MANIFEST = 64 << 20
ONE_PASS = hasattr(os, "sync")  # else each file is waited for by itself
FEW = 64  # files that are settled one by one: waiting for all that is being written could take longer


@dataclass(frozen=True)
class State:
    """A file as it was found."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass(frozen=True)
class Refused:
    """Captions that are not written, and why, with the cure."""

    ids: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Restored:
    """What was brought back, and what was not."""

    files: tuple[str, ...]
    refused: tuple[Refused, ...]


class Conflict(ValueError):
    """Why one file is not written."""


# -- files as they are


def read_file(path: str) -> tuple[State | None, bytes | None]:
    """A file's state and content; nothing where there is no file."""
    name = os.path.basename(path)
    try:
        if os.path.islink(path):
            raise Conflict(f"{name} is a link, and links are not followed: put the file itself there")
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            content = stream.read(LONGEST_CAPTION + 1)
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise Conflict(f"{name} cannot be read ({error.strerror}): check the file") from error
    if len(content) > LONGEST_CAPTION:
        raise Conflict(f"{name} is longer than any caption: check the file")
    return State(status.st_size, status.st_mtime_ns, hashlib.sha256(content).hexdigest()), content


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Conflict(f"{name} is no UTF-8 text any more (byte {error.start}): save it as UTF-8") from error


def caption_of(name: str, content: bytes) -> str:
    """The caption as it is read."""
    return _text(name, content).replace("\r\n", "\n").strip()


def content_of(text: str, old: bytes | None) -> bytes:
    """The caption as the file's new content, in the manner of the old one."""
    if old is None:
        return text.encode()
    mark = codecs.BOM_UTF8 if old.startswith(codecs.BOM_UTF8) else b""
    whole = old.decode("utf-8-sig")
    caption = whole.strip()
    start = whole.index(caption) if caption else len(whole)
    around = whole[:start] if caption else "", whole[start + len(caption) :] if caption else whole
    crlf = 2 * whole.count("\r\n") > whole.count("\n")
    return mark + (around[0] + (text.replace("\n", "\r\n") if crlf else text) + around[1]).encode()


# -- keeping, and putting in place


def back_up(root: str, due: Sequence[tuple[str, bytes | None, bytes]], when: datetime) -> str:
    """A folder with what files hold, and a list of what they are going to hold: (path, old, new) of each.

    It is on the disk once ``settle`` has been called.
    """
    backup = None
    try:
        backup = _new_folder(Path(root, BACKUPS), f"captions-{when:%Y%m%d-%H%M%S}")
        rows, folders = {}, {str(backup)}
        for path, old, new in due:
            name = os.path.relpath(path, root)
            if old is not None:
                place = os.path.join(backup, name)
                if os.path.dirname(place) not in folders:
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    folders.add(os.path.dirname(place))
                _write_new(place, old)
                shutil.copystat(path, place)
            rows[Path(name).as_posix()] = {"was": old is not None, "sha256": hashlib.sha256(new).hexdigest()}
        _write_new(os.path.join(backup, MANIFEST), json.dumps(rows, ensure_ascii=False, indent=1).encode())
    except OSError as error:
        if backup is not None:
            discard(str(backup))
        raise DatasetError(
            f"{root}: what the captions say now cannot be kept in {BACKUPS} ({error.strerror}), so nothing was "
            "written: make room there, allow writing, or choose a shorter path"
        ) from error
    return str(backup)


def discard(backup: str) -> None:
    """Take away a backup behind which nothing was written."""
    shutil.rmtree(backup, ignore_errors=True)


def _new_folder(parent: Path, name: str) -> Path:
    parent.mkdir(exist_ok=True)
    if parent.is_symlink():
        raise OSError(0, "it is a link")
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _write_new(path: str, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        if not ONE_PASS:
            file.flush()
            os.fsync(file.fileno())


def settle(asides: Sequence[Aside], backups: Iterable[str] = ()) -> None:
    """Wait until all this is on the disk: in one pass over whatever is being written where it is much."""
    if ONE_PASS and len(asides) > FEW:
        os.sync()
    elif ONE_PASS:
        walks = (each for backup in backups for each in os.walk(backup))
        kept = [os.path.join(folder, name) for folder, _, names in walks for name in names]
        for path in (*kept, *(aside.path for aside in asides)):
            with open(path, "rb") as file:
                os.fsync(file.fileno())


class Aside:
    """The content that a file is going to have, beside it; it goes away unless it is put in place."""

    def __init__(self, path: str, content: bytes, new: bool) -> None:
        """A ``new`` file takes nobody's place."""
        self.target, self.new = path, new
        folder, name = os.path.split(path)
        self.path = os.path.join(folder, f".{name[:40]}-{secrets.token_hex(4)}.part")
        try:
            _write_new(self.path, content)
            if not new and os.name != "nt":  # there a file that is not to be written could not be removed either
                shutil.copymode(path, self.path)
        except BaseException:
            self.drop()
            raise

    def put(self) -> None:
        """The whole content or none of it, in one step; ``settle`` comes first."""
        try:
            if not self.new:
                os.replace(self.path, self.target)
                return
            try:
                os.link(self.path, self.target)
            except FileExistsError as error:
                raise Conflict(
                    f"{os.path.basename(self.target)} appeared in the meantime: open the dataset again and repeat the "
                    "edit"
                ) from error
            except OSError:  # a file system without links
                if os.path.lexists(self.target):
                    raise
                os.replace(self.path, self.target)
        finally:
            self.drop()

    def __enter__(self) -> Aside:
        return self

    def __exit__(self, *_: object) -> None:
        self.drop()

    def drop(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


# -- bringing back


def restore_captions(backup: str | os.PathLike) -> Restored:
    """Bring back what was there before a writing; files that were made then are moved into the backup.

    What has been changed since then stays as it is, and is named.
    """
    folder = Path(backup)
    root, restored, refused = folder.parent.parent, list[str](), list[Refused]()
    due: dict[str, tuple[State, Aside | None]] = {}  # by name; without content, the file goes away
    rows = _rows(folder)
    with contextlib.ExitStack() as stack:
        for name, row in rows.items():
            with _noting(name, refused):
                before = (folder / name).read_bytes() if row["was"] else None
                state, content = read_file(str(root / name))
                if content == before:
                    continue
                if state is None or state.sha256 != row["sha256"]:
                    raise _changed(folder, name)
                aside = None if before is None else Aside(str(root / name), before, new=False)
                due[name] = state, aside and stack.enter_context(aside)
        try:
            settle([aside for _, aside in due.values() if aside])
        except OSError as error:
            raise DatasetError(
                f"{root}: what is to be brought back cannot be stored ({error.strerror}), so nothing was changed: make "
                "room there"
            ) from error
        for name, (state, aside) in due.items():
            with _noting(name, refused):
                status = os.lstat(root / name)
                if (status.st_size, status.st_mtime_ns) != (state.size, state.mtime_ns):
                    raise _changed(folder, name)
                if aside is None:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(root / name, folder / name)
                else:
                    aside.put()
                restored.append(str(root / name))
    return Restored(tuple(restored), tuple(refused))


@contextlib.contextmanager
def _noting(name: str, refused: list[Refused]) -> Iterator[None]:
    """Why something of a file is not possible goes to what is refused."""
    try:
        yield
    except Conflict as conflict:
        refused.append(Refused((name,), str(conflict)))
    except OSError as error:
        refused.append(Refused((name,), f"{name} cannot be brought back ({error.strerror}): check its folder"))


def _changed(folder: Path, name: str) -> Conflict:
    return Conflict(f"{name} was changed after it was written: copy it from {folder} by hand")


def _rows(folder: Path) -> dict[str, dict]:
    """What a writing did, by names below the dataset's folder; DatasetError where that is no such folder."""
    try:
        with open(folder / MANIFEST, "rb") as stream:
            rows = json.loads(stream.read(LARGEST_MANIFEST))
        fine = folder.parent.name == BACKUPS and all(
            kind(name) in CAPTION_TYPES and {**row}.keys() == {"was", "sha256"} for name, row in rows.items()
        )
        fine = fine and not any(_leads_out(folder, inner) for inner in {*map(os.path.dirname, rows)})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DatasetError(f"{folder} is no backup of captions ({error}): choose another") from error
    if not fine:
        raise DatasetError(f"{folder} names files outside its dataset, or that are no captions: nothing was done")
    return rows


def _leads_out(folder: Path, inner: str) -> bool:
    """Whether a folder of the list is none of the dataset's."""
    if PurePosixPath(inner).is_absolute():
        return True
    root = os.path.realpath(folder.parent.parent)
    place = os.path.realpath(os.path.join(root, inner))
    return os.path.commonpath([root, place]) != root
