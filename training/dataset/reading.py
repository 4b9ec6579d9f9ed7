"""From files to samples: headers, captions and masks of the pictures that a folder, a list or a configuration names.

- only headers and captions are read here, in threads where the disk is slow; pixels are read when they are needed
- every fault that a name, a header or a caption shows is found now: all of them together, or left out as asked
- a picture without a caption gets its class tokens, or the trigger alone; where there is neither, that is an error
- a focus box is in the name of the picture, as in cat_300_200_120_80.png: its centre and size in pixels
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from .files import BOXED, File, check_links, stem
from .images import read_header
from .model import SHOWN, Access, Box, Concept, Dataset, DatasetError, FilePicture, Sample, listed, some

IF_UNREADABLE = {
    "error": "files that cannot be read are named together, and nothing is trained",
    "skip": "files that cannot be read are left out, and the report says which and why",
}
SKIPPED_SHOWN = 20
LONGEST_CAPTION = 1 << 20  # bytes
THREADS = 4
PORTION = 32  # pictures that a thread takes at once
WAITING = 3.0  # clock over CPU time from which on the disk or network is what takes the time
MASK_ASPECT = 0.01  # how far the aspect of a mask may be from that of its picture


@dataclass(frozen=True)
class Entry:
    """A picture to be opened, and where its caption comes from: a text at hand, files, or else the class tokens."""

    name: str
    image: File
    concept: int = 0
    text: str | None = None
    captions: tuple[File, ...] = ()
    class_tokens: str = ""
    mask: File | None = None
    caption_path: str | None = None


class Unreadable(ValueError):
    """Why one picture cannot be used."""


def read(
    source: Path,
    concepts: Sequence[Concept],
    entries: Sequence[Entry],
    access: Access,
    if_unreadable: str = "error",
    notes: Iterable[str] = (),
) -> Dataset:
    """The dataset of these pictures; DatasetError names the first files at fault and says how many there are."""
    if if_unreadable not in IF_UNREADABLE:
        raise DatasetError(f"if_unreadable is {if_unreadable!r}, expected one of {', '.join(IF_UNREADABLE)}")
    for entry in entries:
        check_links([entry.image, *entry.captions, *([entry.mask] if entry.mask else [])], access)

    samples: list[Sample] = []
    readable: list[Entry] = []
    faults: list[str] = []
    seen: Counter[str] = Counter()
    for entry, outcome in zip(entries, _outcomes(entries), strict=True):
        if isinstance(outcome, str):
            faults.append(outcome)
        else:
            readable.append(entry)
            samples.append(_unique(_focused(outcome, concepts[outcome.concept]), seen))
    if faults and (if_unreadable == "error" or not samples):
        raise DatasetError(f"{source}: {some(faults, 'file')} cannot be used:\n" + "\n".join(faults[:SHOWN]))
    found_notes = [*notes, *_without_caption(source, concepts, readable)]
    found_notes += [f"left out: {fault}" for fault in faults[:SKIPPED_SHOWN]]
    if len(faults) > SKIPPED_SHOWN:
        found_notes.append(f"left out for such reasons: {some(faults[SKIPPED_SHOWN:], 'more file')}")
    return Dataset(str(source), tuple(concepts), tuple(samples), tuple(found_notes))


def _without_caption(source: Path, concepts: Sequence[Concept], entries: Sequence[Entry]) -> list[str]:
    """What is shown for pictures without a caption; DatasetError where that is nothing."""
    bare = [entry for entry in entries if entry.text is None and not entry.captions]
    lost = [entry.name for entry in bare if not entry.class_tokens and not concepts[entry.concept].captions.trigger]
    if lost:
        class_only = any(concepts[entry.concept].kind == "regularisation" for entry in bare if entry.name in lost)
        instead = "give the class (class_tokens, or a folder called 1_person)" if class_only else "set a trigger"
        raise DatasetError(
            f"{source}: {some(lost, 'image')} of {len(entries)} without a caption: {listed(lost)}; "
            f"write each caption into a text file of the same name, e.g. {stem(lost[0])}.txt, or {instead}"
        )
    named: dict[str, list[str]] = {}
    for entry in bare:
        named.setdefault(entry.class_tokens, []).append(entry.name)
    return [
        f"without a caption file, captioned {tokens!r}: {listed(names)}"
        if tokens
        else f"without a caption file, shown with the trigger alone: {listed(names)}"
        for tokens, names in named.items()
    ]


def _outcomes(entries: Sequence[Entry]) -> Iterator[Sample | str]:
    """The sample of each entry, or what is wrong with it.

    Threads wait for a slow disk together, but where the files are at hand they only take the interpreter from each
    other (2.5 times the CPU time): the first portion tells which it is.
    """
    clock, cpu = time.perf_counter(), time.thread_time()
    first = _samples_or_faults(entries[:PORTION])
    slow = time.perf_counter() - clock > WAITING * (time.thread_time() - cpu)
    yield from first
    portions = [entries[start : start + PORTION] for start in range(PORTION, len(entries), PORTION)]
    if not slow:
        yield from chain.from_iterable(map(_samples_or_faults, portions))
        return
    with ThreadPoolExecutor(THREADS) as pool:
        yield from chain.from_iterable(pool.map(_samples_or_faults, portions))


def _samples_or_faults(entries: Sequence[Entry]) -> list[Sample | str]:
    outcomes: list[Sample | str] = []
    for entry in entries:
        try:
            outcomes.append(_sample(entry))
        except Unreadable as fault:
            outcomes.append(str(fault))
    return outcomes


def _sample(entry: Entry) -> Sample:
    if entry.name.encode("utf-8", "ignore").decode() != entry.name:
        raise Unreadable(f"{ascii(entry.name)}: its name is not UTF-8: rename it")
    picture = _picture(entry.image, entry.name)
    caption, caption_path = _caption(entry)
    mask = _picture(entry.mask, entry.mask.path) if entry.mask else None
    if mask and abs(mask.width * picture.height / (mask.height * picture.width) - 1) > MASK_ASPECT:
        raise Unreadable(
            f"{entry.name} is {picture.width}×{picture.height} and its mask {mask.path} {mask.width}×{mask.height}: "
            "give the mask the shape of the picture"
        )
    return Sample(entry.name, picture, caption, entry.concept, mask, caption_path=caption_path)


def _picture(file: File, name: str) -> FilePicture:
    try:
        header = read_header(file.path)
    except Exception as error:  # Pillow's readers raise nearly anything on damaged files
        raise Unreadable(f"{name} is no readable image ({error}): save it again or remove it") from error
    return FilePicture(file.path, header, file.size, file.mtime_ns)


def _caption(entry: Entry) -> tuple[str, str | None]:
    if entry.text is not None:
        return entry.text, entry.caption_path
    texts = [read_caption(file) for file in entry.captions]
    if not texts:
        return entry.class_tokens, None
    if len(set(texts)) > 1:
        names = " and ".join(file.name for file in entry.captions)
        raise Unreadable(f"{entry.name} has different captions in {names}: remove one of them")
    return texts[0], entry.captions[0].path


def read_caption(file: File) -> str:
    if file.size > LONGEST_CAPTION:
        raise Unreadable(f"{file.name} has {file.size} bytes, too long for a caption: is it one?")
    try:
        with open(file.path, "rb") as stream:
            return stream.read().decode("utf-8-sig").replace("\r\n", "\n").strip()
    except UnicodeDecodeError as error:
        raise Unreadable(f"{file.name} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    except OSError as error:
        raise Unreadable(f"{file.name} cannot be read ({error.strerror}): check the file") from error


def _focused(sample: Sample, concept: Concept) -> Sample:
    """The sample with the box in its name, where the options ask for one: elsewhere four numbers may be a date."""
    if not concept.images.focused or not isinstance(sample.picture, FilePicture):
        return sample
    return dataclasses.replace(sample, focus=focus_in_name(sample.picture))


def focus_in_name(picture: FilePicture) -> Box | None:
    """The box of a face where a detector wrote it into the name: ``…_<centre x>_<centre y>_<width>_<height>``."""
    match = BOXED.fullmatch(stem(os.path.basename(picture.path)))
    if match is None:
        return None
    x, y, width, height = map(int, match[2].split("_")[1:])
    box = (
        max(0.0, (x - width / 2) / picture.width),
        max(0.0, (y - height / 2) / picture.height),
        min(1.0, (x + width / 2) / picture.width),
        min(1.0, (y + height / 2) / picture.height),
    )
    return box if box[0] < box[2] and box[1] < box[3] else None


def _unique(sample: Sample, seen: Counter[str]) -> Sample:
    """The sample under an id of its own: a picture that is listed twice is ``cat.png`` and ``cat.png~2``."""
    seen[sample.id] += 1
    if seen[sample.id] == 1:
        return sample
    return _unique(dataclasses.replace(sample, id=f"{sample.id}~{seen[sample.id]}"), seen)
