"""What a LoRA file and the files that managers keep beside it say about it.

* ``files_beside``: where such files may lie.
* ``facts_about``: the words it reacts to and where they are from, a description, the base model, the strength and the
  negative prompt that its maker recommends, and notes on files that could not be used.

The first of these that has words decides: the file's own header (``modelspec.trigger_phrase``), then beside
``cat.safetensors``

    cat.json                           A1111's card ("activation text"), or a model's page with all its versions, of
                                       which the one with this file's hash counts (SD.Next)
    cat.civitai.info                   one version of that page (Civitai Helper)
    cat.metadata.json                  LoRA Manager
    cat.safetensors.rgthree-info.json  rgthree
    cat.cm-info.json                   Stability Matrix
    cat.txt                            a description only

and then what the trainer left in the header: its concepts, or tags that most captions share.

Files from anywhere: nothing above ``MAX_BYTES``, nothing but plain files of the LoRA's own folder is read, and damage
is told in ``notes`` rather than raised.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .metadata import Words, split_words, stated, trained_on

MAX_BYTES = 1_000_000
MAX_DESCRIPTION = 2_000
_MAX_TEXT = 100_000
_TAG = re.compile("<[^<>]*>")
_BREAK = re.compile(r"</?(?:p|br|li|ul|ol|div|h[1-6])\b[^<>]*>", re.IGNORECASE)
_GREATEST = 100.0  # strength that anything here takes


@dataclass(frozen=True)
class Facts:
    """``strength`` is None where nobody recommends one; texts are empty where nobody says anything."""

    words: tuple[str, ...] = ()
    source: str = ""  # of the words
    description: str = ""
    base_model: str = ""
    strength: float | None = None
    negative: str = ""
    notes: tuple[str, ...] = ()

    def line(self) -> str:
        """For people: "trigger words: a, b (from cat.civitai.info)"; empty without words."""
        return f"trigger words: {', '.join(self.words)} (from {self.source})" if self.words else ""


@dataclass(frozen=True)
class _LoRA:
    """What a model's page is searched for."""

    name: str
    data_hash: str
    digest: Callable[[], str]  # of the whole file, which takes a while for large ones


def facts_about(
    path: str | os.PathLike | None, metadata: Mapping[str, str], digest: Callable[[], str] | None = None
) -> Facts:
    """Everything that is known of the LoRA at ``path``, or of one that is no file, by its metadata alone.

    ``digest`` gives the SHA-256 of the file, as hexadecimal digits; asked for only where a page has several versions.
    """
    found: list[Facts] = [_by(stated(metadata))]
    if path is not None:
        own_hash = metadata.get("sshs_model_hash") or metadata.get("modelspec.hash_sha256", "").removeprefix("0x")
        lora = _LoRA(Path(path).name, own_hash, digest or str)
        found += (read(Path(path), lora) for read in (_cards, _description))
    found.append(_by(trained_on(metadata)))
    return _first(found)


def files_beside(path: str | os.PathLike) -> list[Path]:
    """The files that ``facts_about`` looks for, whether they are there or not."""
    return [*(_beside(Path(path), ending) for ending in _READERS), Path(path).with_suffix(".txt")]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(path.stem + ending if ending.startswith(".") else f"{path.name}.{ending}")


def _first(found: list[Facts]) -> Facts:
    """Each thing from the first that has it."""
    words = next((facts for facts in found if facts.words), Facts())
    return Facts(
        words.words,
        words.source,
        next((facts.description for facts in found if facts.description), ""),
        next((facts.base_model for facts in found if facts.base_model), ""),
        next((facts.strength for facts in found if facts.strength is not None), None),
        next((facts.negative for facts in found if facts.negative), ""),
        tuple(note for facts in found for note in facts.notes),
    )


def _by(words: Words) -> Facts:
    return Facts(tuple(words.texts), words.source)


def _cards(path: Path, lora: _LoRA) -> Facts:
    found = []
    for ending, read in _READERS.items():
        name = _beside(path, ending).name
        text, notes = _text_of(path.with_name(name))
        if text is None:
            found.append(Facts(notes=notes))
            continue
        try:
            page = json.loads(text)
        except (ValueError, RecursionError):
            page = None
        if not isinstance(page, dict):
            found.append(Facts(notes=(f"{name} is damaged (no JSON object) and was not used",)))
            continue
        facts = read(page, lora)
        found.append(replace(facts, source=name, notes=tuple(f"{name}: {note}" for note in facts.notes)))
    return _first(found)


def _description(path: Path, _: _LoRA) -> Facts:
    text, notes = _text_of(path.with_suffix(".txt"))
    return Facts(description=_plain(text), notes=notes)


# -- one kind of file each


def _card(page: Mapping[str, Any], lora: _LoRA) -> Facts:
    if isinstance(page.get("modelVersions"), list):
        return _model(page, lora)
    strength = page.get("preferred weight", page.get("preferredWeight"))
    return Facts(
        tuple(split_words(page.get("activation text"), page.get("activationText"))),
        description=_plain(page.get("description")),
        base_model=_name(page.get("sd version")),
        strength=_strength(strength) or None,  # 0 is what the web UI writes where nothing was set
        negative=_plain(page.get("negative text")),
    )


def _model(page: Mapping[str, Any], lora: _LoRA) -> Facts:
    versions = [version for version in page["modelVersions"] if isinstance(version, dict)]
    found = _of_this_file(versions, lora)
    if found is None:
        note = f"none of its {len(versions)} versions has this file's hash or name, so no words were taken from it"
        return Facts(description=_plain(page.get("description")), notes=(note,))
    facts = _version(found, lora)
    return replace(facts, description=facts.description or _plain(page.get("description")))


def _of_this_file(versions: list[dict[str, Any]], lora: _LoRA) -> dict[str, Any] | None:
    """The version that ``lora`` is of: by the hash of its tensors, of the file, by its name, or because it is alone."""
    for kinds, wanted in ((("AutoV3",), lambda: lora.data_hash), (("SHA256", "AutoV2"), lora.digest)):
        listed = [(value, version) for version in versions for value in _hashes(version, kinds)]
        own = wanted().lower() if listed else ""
        for value, version in listed:
            if own and own.startswith(value):
                return version
    named = [version for version in versions if any(file.get("name") == lora.name for file in _files(version))]
    if len(named) == 1:
        return named[0]
    return versions[0] if len(versions) == 1 and not any(_files(versions[0])) else None


def _files(version: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    files = version.get("files")
    yield from (file for file in files if isinstance(file, dict)) if isinstance(files, list) else ()


def _hashes(version: Mapping[str, Any], kinds: tuple[str, ...]) -> Iterator[str]:
    for file in _files(version):
        hashes = file.get("hashes")
        if isinstance(hashes, dict):
            values = (hashes.get(kind) for kind in kinds)
            yield from (value.lower() for value in values if isinstance(value, str) and len(value) >= 8)


def _version(page: Mapping[str, Any], _: _LoRA) -> Facts:
    words = page.get("trainedWords")
    return Facts(
        tuple(split_words(*words)) if isinstance(words, list) else (),
        description=_plain(page.get("description")),
        base_model=_name(page.get("baseModel")),
    )


def _manager(page: Mapping[str, Any], lora: _LoRA) -> Facts:
    inner = page.get("civitai")
    facts = _version(inner, lora) if isinstance(inner, dict) else Facts()
    notes = _plain(page.get("notes")) or _plain(page.get("modelDescription"))
    return replace(facts, description=notes or facts.description, base_model=_name(page.get("base_model")))


def _rgthree(page: Mapping[str, Any], _: _LoRA) -> Facts:
    """Its list also holds every tag of the captions; those that are only that are left to the header."""
    words = page.get("trainedWords")
    chosen = [
        word.get("word")
        for word in (words if isinstance(words, list) else ())
        if isinstance(word, dict) and (word.get("civitai") or word.get("user") or not word.get("metadata"))
    ]
    return Facts(
        tuple(split_words(*chosen)),
        description=_plain(page.get("userNote")),
        base_model=_name(page.get("baseModel")),
    )


def _matrix(page: Mapping[str, Any], _: _LoRA) -> Facts:
    words = page.get("TrainedWords")
    return Facts(
        tuple(split_words(*words)) if isinstance(words, list) else (),
        description=_plain(page.get("VersionDescription")) or _plain(page.get("ModelDescription")),
        base_model=_name(page.get("BaseModel")),
    )


# ending behind the stem, or behind the whole name where it has no dot -> reader
_READERS: dict[str, Callable[[Mapping[str, Any], _LoRA], Facts]] = {
    ".json": _card,
    ".civitai.info": _version,
    ".metadata.json": _manager,
    "rgthree-info.json": _rgthree,
    ".cm-info.json": _matrix,
}


# -- from files and values of any kind


def _text_of(path: Path) -> tuple[str | None, tuple[str, ...]]:
    """(content of a plain file that lies where it seems to, notes); None without such a file."""
    try:
        status = os.lstat(path)
    except (OSError, ValueError):
        return None, ()
    inside = os.path.realpath(path.parent)
    if stat.S_ISLNK(status.st_mode):
        if os.path.dirname(os.path.realpath(path)) != inside:
            return None, (f"{path.name} is a link that leads out of the folder and was not read",)
        try:
            status = os.stat(path)
        except OSError:
            return None, (f"{path.name} is a link to nothing",)
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        return None, (f"{path.name} is no file and was not read",)
    if status.st_size > MAX_BYTES:
        return None, (f"{path.name} has {status.st_size} bytes and was not read (at most {MAX_BYTES})",)
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES)
    except OSError as error:
        return None, (f"{path.name} could not be read ({error.strerror})",)
    return content.decode("utf-8-sig", errors="replace"), ()


def _plain(text: Any) -> str:
    """Text without markup, lines as they were, cut where it gets long; empty for anything else."""
    if not isinstance(text, str):
        return ""
    text = html.unescape(_TAG.sub("", _BREAK.sub("\n", text[:_MAX_TEXT])))
    lines = ("".join(mark if mark.isprintable() else " " for mark in line).split() for line in text.splitlines())
    text = "\n".join(" ".join(words) for words in lines if words)
    return text if len(text) <= MAX_DESCRIPTION else text[: MAX_DESCRIPTION - 1] + "…"


def _name(text: Any) -> str:
    return _plain(text)[:100]


def _strength(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -_GREATEST <= value <= _GREATEST and not math.isnan(value) else None
