"""The LoRA tools on the command line, without ComfyUI: ``run.py inspect | merge | extract | resize | convert``.

* ``main``: arguments → exit code: 0 done, 1 it could not be done (one line says why), 2 misspelt, 130 interrupted.

Nothing is overwritten unless --overwrite says so; a file is there whole or not at all. ``--base`` names a checkpoint:
its header tells what layers are called, its weights are read one by one where an adapter depends on them.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from ..low_rank import Cut
from ..names import NameTable
from ..peft_config import beside
from ..reading import LoRAFile, read_lora
from ..safetensors_io import LoraModel, load_tensors
from ..writing import DIALECTS, config_of, write_lora
from .baked import layout_of, parse_strength, part_of
from .budget import Budget
from .checkpoint import Checkpoint
from .convert import plain
from .deltas import Progress, Weights
from .extract import extract
from .finishing import (
    AS_GIVEN,
    PRECISIONS,
    digest,
    finished,
    options_of,
    precision_of,
    spelled_as,
    written_in,
)
from .inspect import inspect
from .merge import MAJORITIES, METHODS, Ingredient, merge, without_effect
from .outcome import Outcome
from .pairing import changes_between
from .provenance import Parent
from .resize import resize

DONE, FAILED, INTERRUPTED = 0, 1, 130
SUFFIX = ".safetensors"
_EPILOG = "Strengths are written as behind the name in a prompt's tag: 0.7, or 0.7:te=0.3:blocks=in=0.5;double.3-8=0."


@dataclass(frozen=True)
class _Read:
    """A LoRA from a file."""

    path: Path
    tensors: LoraModel
    file: LoRAFile

    def parent(self, strength: str = "1", acts: bool = True) -> Parent:
        return Parent(self.path.name, digest(self.tensors), strength, self.tensors.metadata, acts)


def main(arguments: Sequence[str] | None = None) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal cannot show are no failure
    chosen = _parser().parse_args(arguments)
    chosen.written = []
    try:
        chosen.run(chosen)
    except (OSError, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted; {_written(chosen.written)}\n")
        return INTERRUPTED
    return DONE


def _written(files: Sequence[Path]) -> str:
    return f"finished by then: {', '.join(map(str, files))}" if files else "nothing was written"


# -- what there is


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="run.py", description="LoRA Loom without the graph.")
    commands = parser.add_subparsers(dest="command", required=True)

    found = _command(commands, "inspect", _inspect, "tell what LoRA files hold, how they were made, what is wrong")
    found.add_argument("files", nargs="+", metavar="FILE")
    _base(found)

    found = _command(commands, "merge", _merge, "make one LoRA of several", _EPILOG)
    found.add_argument("files", nargs="+", metavar="FILE")
    found._negative_number_matcher = re.compile(r"-\.?\d")  # a strength such as -0.5:te=0 is no option
    found.add_argument("--strengths", nargs="+", default=[], metavar="TEXT", help="one for each FILE; without: 1")
    found.add_argument("--method", choices=METHODS, default="concat", help=_told(METHODS))
    _amount(found)
    found.add_argument("--density", type=float, default=0.5, help="ties, dare, prune: the part of the numbers kept")
    found.add_argument("--majority", choices=MAJORITIES, default="total", help=_told(MAJORITIES))
    found.add_argument("--seed", type=int, default=0, help="dare: draws what is dropped")
    _base(found)
    _writing(found)

    found = _command(commands, "extract", _extract, "make a LoRA of what one checkpoint has and another has not")
    found.add_argument("tuned", metavar="TUNED")
    found.add_argument("base", metavar="BASE")
    _amount(found, budget=True)
    found.add_argument("--min-change", type=float, default=0.0, help="leave out layers that change by less (a part)")
    found.add_argument("--clamp-quantile", type=float, help="limit the factors as kohya's scripts do (0.99)")
    found.add_argument("--no-conv", action="store_true", help="leave out convolutions with a kernel")
    found.add_argument("--no-text", action="store_true", help="leave out text encoders")
    _dialect(found)
    _writing(found, "float16")

    found = _command(commands, "resize", _resize, "give LoRAs fewer ranks")
    found.add_argument("files", nargs="+", metavar="FILE")
    _amount(found, budget=True)
    found.add_argument("--ratio", type=float, help="keep singular values of at least the largest / this (sv_ratio)")
    found.add_argument("--cumulative", type=float, help="keep this part of their sum (kohya's sv_cumulative)")
    _base(found)
    _writing(found)

    found = _command(commands, "convert", _convert, "write LoRAs in other names, in another precision, as plain LoRA")
    found.add_argument("files", nargs="+", metavar="FILE")
    _dialect(found)
    found.add_argument("--plain", action="store_true", help="any family as LoRA, with the error stated")
    _amount(found)
    _base(found)
    _writing(found)
    return parser


def _command(commands, name: str, run: Callable, what: str, epilog: str = "") -> argparse.ArgumentParser:
    found = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=epilog)
    found.set_defaults(run=run)
    found.add_argument("--json", action="store_true", help="print what there is to say as JSON")
    return found


def _base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="CHECKPOINT", help="what they are for: tells names, shapes and weights")


def _dialect(parser: argparse.ArgumentParser) -> None:
    told = _told({name: row.description for name, row in DIALECTS.items()})
    parser.add_argument("--dialect", choices=DIALECTS, help=f"what layers are called; needs a base. {told}")


def _amount(parser: argparse.ArgumentParser, budget: bool = False) -> None:
    parser.add_argument("--rank", type=int, help="of every layer, at most")
    parser.add_argument("--energy", type=float, help="the part of each layer's squared norm that is retained, 0 to 1")
    if budget:
        parser.add_argument("--average-rank", type=float, help="a size, shared out so that most is retained")
        parser.add_argument("--megabytes", type=float, help="the same, as the size of the file")


def _writing(parser: argparse.ArgumentParser, precision: str = AS_GIVEN) -> None:
    parser.add_argument("--precision", choices=PRECISIONS, default=precision, help=_told(PRECISIONS))
    parser.add_argument("--out", required=True, metavar="FILE", help="a folder, where several files are made")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")


def _told(table: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {text.rstrip('.')}" for name, text in table.items()).replace("%", "%%")


# -- the tools


def _inspect(chosen: argparse.Namespace) -> None:
    base = _checkpoint(chosen)
    found = [(path, inspect(path, _table(base), _weights(base), _bar())) for path in chosen.files]
    if chosen.json:
        told = [{"file": path, **json.loads(inspection.to_json())} for path, inspection in found]
        _say(json.dumps(told if len(told) > 1 else told[0], ensure_ascii=False, indent=2))
    else:
        _say("\n\n".join(inspection.text() for _, inspection in found))


def _merge(chosen: argparse.Namespace) -> None:
    (target,) = _targets(chosen, chosen.files[:1])
    if chosen.strengths and len(chosen.strengths) != len(chosen.files):
        raise ValueError(
            f"--strengths: {len(chosen.strengths)} for {len(chosen.files)} files; write one for each, in their order"
        )
    base = _checkpoint(chosen)
    layout = None if base is None else layout_of(base.table)
    read = [_read(path, base) for path in chosen.files]
    texts = chosen.strengths or ["1"] * len(read)
    ingredients, notes = [], []
    for lora, text in zip(read, texts, strict=True):
        encoders = list(base.encoders) if base else sorted({part_of(path) for path in lora.file.adapters} - {"unet"})
        baked = parse_strength(text, encoders, layout, name=f"--strengths: {lora.path.name}")
        ingredients.append(Ingredient(lora.file, baked, lora.path.name))
        notes += [f"{lora.path.name}: {note}" for note in baked.notes]
    cut = _cut(chosen)
    how = {"density": chosen.density, "majority": chosen.majority, "seed": chosen.seed}
    outcome = merge(ingredients, chosen.method, cut, _weights(base), **how, exact=False, progress=_bar())
    parents = [lora.parent(text, each.acts) for lora, text, each in zip(read, texts, ingredients, strict=True)]
    tensors = [item for lora in read for item in lora.tensors.items()]
    notes += without_effect(chosen.method, **how)
    _write(chosen, target, outcome, parents, {"method": chosen.method, **how, **options_of(cut)}, tensors, notes=notes)


def _extract(chosen: argparse.Namespace) -> None:
    (target,) = _targets(chosen, [chosen.tuned])
    tuned, base = Checkpoint(chosen.tuned), Checkpoint(chosen.base)
    cut, notes = _amount_of(chosen, []), list[str]()
    lacking = [encoder for encoder in base.encoders if encoder not in tuned.encoders]
    if lacking or not base.encoders:
        without = f"{' and '.join(lacking)} is not in {tuned.name}" if lacking else f"there are none in {base.name}"
        notes.append(f"text encoders: {without}, so nothing of them is extracted")
    left = {*lacking, *(base.encoders if chosen.no_text else ())}
    sides = [
        (each.name, {key: each.shape(key) for key in each.keys if part_of(key) not in left}, each.stored)
        for each in (base, tuned)
    ]
    changes, said = changes_between(sides[0], sides[1], not chosen.no_conv)
    kind = base.file.metadata.get("modelspec.architecture", "").partition("/")[0]
    outcome = extract(
        changes,
        cut,
        min_change=chosen.min_change,
        clamp_quantile=chosen.clamp_quantile,
        names=base.table,
        metadata={"modelspec.architecture": f"{kind}/lora"} if kind else {},
        progress=_bar(),
    )
    parents = [Parent(tuned.name), Parent(base.name, strength="-1")]
    told = {"min_change": chosen.min_change, "clamp_quantile": chosen.clamp_quantile, **options_of(cut)}
    _write(chosen, target, outcome, parents, told, [], chosen.dialect or "native", notes + said)


def _resize(chosen: argparse.Namespace) -> None:
    base = _checkpoint(chosen)
    for target, path in zip(_targets(chosen, chosen.files), chosen.files, strict=True):
        lora = _read(path, base)
        cut = _amount_of(chosen, lora.tensors.items())
        outcome = resize(_whole(lora), cut, _weights(base), progress=_bar())
        _write(chosen, target, outcome, [lora.parent()], options_of(cut), list(lora.tensors.items()))


def _convert(chosen: argparse.Namespace) -> None:
    base, cut = _checkpoint(chosen), _cut(chosen)
    if chosen.dialect and base is None:
        raise ValueError(f"--dialect {chosen.dialect} needs --base, which tells what its layers are called there")
    if cut is not None and not chosen.plain:
        raise ValueError("--rank and --energy are for --plain; resize cuts LoRAs to other ranks")
    for target, path in zip(_targets(chosen, chosen.files), chosen.files, strict=True):
        lora = _read(path, base)
        file = _whole(lora)
        outcome = plain(file, cut, _weights(base), _bar()) if chosen.plain else Outcome(file, (), tuple(file.notes))
        told = {"dialect": chosen.dialect, "plain": chosen.plain, **options_of(cut)}
        dialect = chosen.dialect or spelled_as(lora.tensors)
        _write(chosen, target, outcome, [lora.parent()], told, list(lora.tensors.items()), dialect)


# -- in and out


def _checkpoint(chosen: argparse.Namespace) -> Checkpoint | None:
    return None if chosen.base is None else Checkpoint(chosen.base)


def _table(base: Checkpoint | None) -> NameTable | None:
    return None if base is None else base.table


def _weights(base: Checkpoint | None) -> Weights | None:
    return None if base is None else base.weight


def _read(path: str, base: Checkpoint | None) -> _Read:
    tensors = load_tensors(path)
    tensors.metadata = beside(path, tensors.metadata) | tensors.metadata
    try:
        return _Read(Path(path), tensors, read_lora(tensors, _table(base)))
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def _whole(lora: _Read) -> LoRAFile:
    """Raises ValueError where a part of it would be lost."""
    if lora.file.unplaced:
        key, _, detail = lora.file.unplaced[0]
        raise ValueError(
            f"{lora.path.name}: {len(lora.file.unplaced)} of its keys would be lost ({key[:80]}: {detail}); give the "
            "base that it is for with --base, or inspect it"
        )
    return lora.file


def _targets(chosen: argparse.Namespace, sources: Sequence[str]) -> list[Path]:
    """Where each result goes. Raises ValueError for what is there already."""
    out = Path(chosen.out)
    if len(sources) > 1 or out.is_dir():
        if out.suffix.lower() == SUFFIX:
            raise ValueError(f"--out {out} is one file for {len(sources)}; give a folder")
        names = [Path(source).name for source in sources]
        if len(set(names)) < len(names):
            raise ValueError("--out: two files have the same name; give them one by one")
        targets = [out / name for name in names]
    else:
        targets = [out]
    for target in targets:
        if target.suffix.lower() != SUFFIX:
            raise ValueError(f"--out {target} is no {SUFFIX} file; write one")
        _check_free(target, chosen)
    return targets


def _check_free(target: Path, chosen: argparse.Namespace) -> None:
    beside = config_of(target, getattr(chosen, "dialect", None) or "")
    there = next((path for path in (target, beside) if path is not None and path.exists()), None)
    if there is not None and not chosen.overwrite:
        raise ValueError(f"{there} is there already; give another --out, or --overwrite")


def _write(
    chosen: argparse.Namespace,
    target: Path,
    outcome: Outcome,
    parents: Sequence[Parent],
    options: dict[str, object],
    given: Sequence[tuple[str, Tensor]],
    dialect: str = "native",
    notes: Sequence[str] = (),
) -> None:
    outcome = replace(outcome, notes=(*outcome.notes, *notes))
    file, said = finished(
        outcome, chosen.command, parents, options, chosen.precision, precision_of(given) if given else None
    )
    _check_free(target, chosen)  # it may have come in the meantime
    write_lora(file, target, dialect)
    chosen.written.append(target)
    lines = [*outcome.lines(), *said]
    if chosen.json:
        energy = {"energy": outcome.energy} if outcome.layers else {}
        _say(json.dumps({"file": str(target), **energy, "notes": lines}, ensure_ascii=False))
    else:
        _say("\n".join([f"{target}", *(f"  {line}" for line in lines)]))


def _cut(chosen: argparse.Namespace) -> Cut | None:
    ratio, cumulative = getattr(chosen, "ratio", None), getattr(chosen, "cumulative", None)
    if all(value is None for value in (chosen.rank, chosen.energy, ratio, cumulative)):
        return None
    return Cut(chosen.rank, chosen.energy, ratio, cumulative)


def _amount_of(chosen: argparse.Namespace, given: Iterable[tuple[str, Tensor]]) -> Cut | Budget:
    """``given``: the numbers whose precision is "as given"."""
    cut = _cut(chosen)
    budget = [value for value in (chosen.average_rank, chosen.megabytes) if value is not None]
    if (cut is not None) + len(budget) != 1:
        raise ValueError("give either --rank, --energy and the like, or --average-rank, or --megabytes")
    if cut is not None:
        return cut
    itemsize = written_in(chosen.precision, given).itemsize
    if chosen.megabytes is not None:
        return Budget.of_megabytes(chosen.megabytes, itemsize)
    return Budget(average_rank=chosen.average_rank, itemsize=itemsize)


def _bar() -> Progress:
    """Percents on a terminal, nothing elsewhere."""

    def tick(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done} of {total} layers" + ("\n" if done == total else ""))

    return tick


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
