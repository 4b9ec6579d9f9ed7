"""What lies in a dataset's folder: pictures, the files that go with them, and what has no business there.

- ``find`` looks at names only: pictures, captions (``cat.txt``, ``cat.caption`` beside ``cat.png``, and beside
  ``cat_300_200_120_80.png``, a face in it) and masks (``cat-masklabel.png`` as OneTrainer names them, or a picture of
  the same name in a sub-folder ``mask`` or ``masks``)
- condition images, control folders and videos are refused by name; hidden files and linked folders are left out
- ``Places`` turns the paths that TOML and JSON files hold into files, and none into a file that may not be read
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from .images import IMAGE_TYPES, OTHER_IMAGE_TYPES, VIDEO_TYPES, image_types
from .model import Access, DatasetError, listed

CAPTION_TYPES = (".txt", ".caption")
MASK_LABEL, CONDITION_LABEL = "-masklabel", "-condlabel"
MASK_FOLDERS = ("mask", "masks")
CONTROL_FOLDERS = ("_controls", "condition", "conditioning", "conditions", "control", "controls")
BOXED = re.compile(r"(.+)((?:_[0-9]{1,6}){4})", re.DOTALL)  # names that a face detector has put its box behind
LONGEST_PATH = 4096


class FileMissing(DatasetError):
    """A file that another one names is not there."""


@dataclass(frozen=True)
class File:
    """A file by its path; size and time are those of what a link leads to."""

    path: str
    size: int
    mtime_ns: int
    linked: bool = False

    @property
    def name(self) -> str:
        return os.path.basename(self.path)


@dataclass
class Found:
    """What lies in a folder, each by its posix path below the folder; captions and masks by that of their picture."""

    folder: Path
    images: dict[str, File] = field(default_factory=dict)
    captions: dict[str, list[File]] = field(default_factory=dict)
    masks: dict[str, list[File]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class _Names:
    """The names of a walk, sorted out by kind; companions by folder and stem, since their picture may come later."""

    images: dict[str, File] = field(default_factory=dict)
    captions: dict[str, list[File]] = field(default_factory=dict)
    masks: dict[str, list[File]] = field(default_factory=dict)
    conditions: list[str] = field(default_factory=list)
    videos: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)  # folders that were not entered


def stem(name: str) -> str:
    return os.path.splitext(name)[0]


def kind(name: str) -> str:
    """The type of a file by its name: lower case, with the dot."""
    return os.path.splitext(name)[1].lower()


def find(folder: Path, deep: bool = True, caption_types: tuple[str, ...] = CAPTION_TYPES) -> Found:
    """The pictures of a folder, with ``deep`` of those below it too. DatasetError names what has to be moved away."""
    names = _Names()
    _walk(folder, "", deep, caption_types, names)
    if names.videos:
        raise DatasetError(
            f"{folder}: videos cannot be trained on: {listed(sorted(names.videos))}; save single frames as images "
            "and move the videos out of the folder"
        )
    if names.conditions:
        raise DatasetError(
            f"{folder}: condition images of edit or control training, which this trainer does not do: "
            f"{listed(sorted(names.conditions))}; move them out of the folder"
        )
    notes = _take_companion_folders(folder, names)
    images = dict(sorted(names.images.items()))
    found = Found(folder, images, notes=notes)
    stems = {name: stem(name) for name in images}
    for name, own in stems.items():
        boxed = BOXED.fullmatch(own)  # sd-scripts takes the caption of the picture that the face was found in
        found.captions[name] = names.captions.get(own) or names.captions.get(boxed[1] if boxed else own, [])
        found.masks[name] = names.masks.get(own, [])
    pictured = set(stems.values())
    lonely = [mask.name for of, masks in sorted(names.masks.items()) if of not in pictured for mask in masks]
    if lonely:
        found.notes.append(f"left out, masks without a picture: {listed(lonely)}")
    if names.unsupported:
        if not images:
            raise DatasetError(
                f"{folder} has images of unsupported types only ({listed(sorted(names.unsupported))}): "
                f"convert them to one of {_types()}"
            )
        found.notes.append(
            f"left out, no supported type: {listed(sorted(names.unsupported))}; convert to png or jpg to use them"
        )
    if names.linked:
        found.notes.append(
            f"left out, folders that are links: {listed(sorted(names.linked))}; copy them in to use them"
        )
    filled = [name for name in sorted(names.below) if _has_images(folder / name)]
    if filled:
        found.notes.append(f"left out, folders below {folder}: {listed(filled)}; a subset is what lies directly in it")
    return found


def check_found(found: Found) -> None:
    """DatasetError where there is no picture, or where it is not plain what belongs to which."""
    folder = found.folder
    if not found.images:
        raise DatasetError(f"{folder} has no images: put images ({_types()}) there, each with a caption in a .txt file")
    sharing: dict[str, list[str]] = {}
    for name in found.images:
        if found.captions[name] or found.masks[name]:
            sharing.setdefault(stem(name), []).append(name)
    ambiguous = [" and ".join(names) for names in sharing.values() if len(names) > 1]
    if ambiguous:
        raise DatasetError(
            f"{folder}: images that share one caption file or mask: {listed(ambiguous)}; rename or remove one of each"
        )
    several = [" and ".join(mask.path for mask in masks) for masks in found.masks.values() if len(masks) > 1]
    if several:
        raise DatasetError(f"{folder}: pictures with two masks each: {listed(several)}; remove one of each")


def check_links(files: Iterable[File], access: Access) -> None:
    """DatasetError where a file is a link to somewhere that may not be read."""
    outside = [
        (file.path, target)
        for file in files
        if file.linked and not access.allowed(target := Path(os.path.realpath(file.path)))
    ]
    if outside:
        raise DatasetError(
            f"links that lead outside the dataset folders: {listed(path for path, _ in outside)}; copy the files in, "
            f"or: {access.advice(outside[0][1].parent)}"
        )


def _types() -> str:
    return ", ".join(name[1:] for name in IMAGE_TYPES if name in image_types())


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not entry.name.startswith(".")]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{folder} cannot be opened ({reason}): does it exist, may it be read?") from error


def _has_images(folder: Path) -> bool:
    return any(kind(entry.name) in image_types() for entry in _scan(folder))


def _walk(folder: Path, below: str, deep: bool, caption_types: tuple[str, ...], names: _Names) -> None:
    for entry in _scan(folder / below):
        name = below + entry.name
        if entry.is_dir():
            if entry.is_symlink():
                names.linked.append(name)
            elif deep:
                _walk(folder, name + "/", deep, caption_types, names)
            else:
                names.below.append(name)
            continue
        if not entry.is_file() and _exists(entry):
            continue  # a pipe or a device: opening it would wait for ever
        here, type_ = os.path.splitext(name)
        type_ = type_.lower()
        if type_ in image_types():
            if here.endswith(MASK_LABEL):
                names.masks.setdefault(here.removesuffix(MASK_LABEL), []).append(_file(entry))
            elif here.endswith(CONDITION_LABEL):
                names.conditions.append(name)
            else:
                names.images[name] = _file(entry)
        elif type_ in caption_types:
            names.captions.setdefault(here, []).append(_file(entry))
        elif type_ in VIDEO_TYPES:
            names.videos.append(name)
        elif type_ in IMAGE_TYPES or type_ in OTHER_IMAGE_TYPES:
            names.unsupported.append(name)


def _exists(entry: os.DirEntry[str]) -> bool:
    return os.path.exists(entry.path)  # False for a link to nowhere, which is named when it is read


def _file(entry: os.DirEntry[str]) -> File:
    linked = entry.is_symlink()
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere: named when it is read
        return File(entry.path, 0, 0, linked)
    return File(entry.path, status.st_size, status.st_mtime_ns, linked)


def _take_companion_folders(folder: Path, names: _Names) -> list[str]:
    """Make the pictures of mask folders masks; DatasetError for control folders.

    A folder is a companion of the one around it where both have a picture of the same name, and its own pictures have
    no captions: a concept may be called ``masks`` too.
    """
    inside: dict[str, list[str]] = {}
    for name in names.images:
        place, _, last = os.path.dirname(name).rpartition("/")
        if last.lower() in MASK_FOLDERS + CONTROL_FOLDERS:
            inside.setdefault(os.path.dirname(name), []).append(name)
    if not inside:
        return []
    stems = {stem(name) for name in names.images}
    notes = []
    for place, members in sorted(inside.items()):
        around, _, last = place.rpartition("/")
        partner = {name: f"{around}/" * bool(around) + stem(os.path.basename(name)) for name in members}
        if not stems.intersection(partner.values()) or any(stem(name) in names.captions for name in members):
            continue
        if last.lower() in CONTROL_FOLDERS:
            raise DatasetError(
                f"{folder}: {place} holds control images, and this trainer does no control or edit training; "
                "move that folder out"
            )
        for name in members:
            names.masks.setdefault(partner[name], []).append(names.images.pop(name))
        notes.append(f"{place} is taken as masks of the pictures beside it ({len(members)})")
    return notes


# -- paths that are written in files


class Places:
    """Paths as TOML and JSON files hold them, relative to one folder; only what may be read is ever looked at."""

    def __init__(self, base: Path, access: Access) -> None:
        self.base = base
        self._access = access
        self._folders: dict[str, str] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def folder(self, text: str, where: str) -> Path:
        """The real path of a folder that exists; DatasetError begins with ``where``."""
        check_path(text, where)
        for spelling in _spellings(text):
            path = self._real(spelling, where)
            if os.path.isdir(path):
                return Path(path)
        raise DatasetError(
            f"{where}: there is no folder {shown(text)} (looked for it in {self.base}); correct the path{_tilde(text)}"
        )

    def file(self, text: str, where: str, types: frozenset[str] = frozenset()) -> File:
        """The file, whose extension may be missing where ``types`` are given."""
        check_path(text, where)
        for spelling in _spellings(text):
            folder, name = os.path.split(spelling)
            if name in ("", ".", ".."):
                raise DatasetError(f"{where}: {shown(text)} is no name of a file; correct the path")
            place = self._real(folder, where)
            found = _file_at(os.path.join(place, name)) or self._without_type(place, name, types, where)
            if found:
                check_links([found], self._access)
                return found
        raise FileMissing(
            f"{where}: there is no file {shown(text)} (looked for it in {self.base}); "
            f"correct the path or put the file there{_tilde(text)}"
        )

    def _real(self, folder: str, where: str) -> str:
        """A folder with its links followed, checked once."""
        if folder not in self._folders:
            real = os.path.realpath(os.path.join(self.base, folder))
            if not self._access.allowed(Path(real)):
                raise DatasetError(
                    f"{where}: {shown(folder or str(self.base))} leads outside the dataset folders; "
                    f"{self._access.advice(Path(real))}"
                )
            self._folders[folder] = real
        return self._folders[folder]

    def _without_type(self, place: str, name: str, types: frozenset[str], where: str) -> File | None:
        if not types:
            return None
        if place not in self._stems:
            self._stems[place] = {}
            for entry in os.listdir(place) if os.path.isdir(place) else ():
                if kind(entry) in types:
                    self._stems[place].setdefault(stem(entry), []).append(entry)
        names = self._stems[place].get(name, [])
        if len(names) > 1:
            raise DatasetError(f"{where}: {shown(name)} may be {' or '.join(sorted(names))}; write the extension too")
        return _file_at(os.path.join(place, names[0])) if names else None


def check_path(text: str, where: str) -> None:
    """DatasetError where a text cannot be a path of this machine; the file system is not asked."""
    windows = PureWindowsPath(text)
    if not text.strip():
        raise DatasetError(f"{where}: the path is empty; write one")
    if "\0" in text or len(text) > LONGEST_PATH or text.encode("utf-8", "ignore").decode() != text:
        raise DatasetError(f"{where}: {shown(text)} is no path; correct it")
    if text.replace("\\", "/").startswith("//"):  # asking for it would already log in to that machine
        raise DatasetError(f"{where}: {shown(text)} is a network path; write one relative to the file, or mount it")
    if windows.drive and os.name != "nt":
        raise DatasetError(
            f"{where}: {shown(text)} is a path of another machine; write one relative to the file that holds it"
        )


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "…"


def _spellings(text: str) -> Iterator[str]:
    """The path as written, and with backslashes as folders where a file from Windows is read elsewhere."""
    yield text
    if "\\" in text and os.sep == "/":
        yield text.replace("\\", "/")


def _tilde(text: str) -> str:
    return "; ~ is not replaced by a home folder" if text.startswith("~") else ""


def _file_at(path: str) -> File | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return File(path, status.st_size, status.st_mtime_ns, os.path.islink(path))
