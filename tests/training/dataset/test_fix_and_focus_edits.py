"""Fixes of the check and focus boxes as edits: what they do, undone to the letter, lines that read back."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_loom.training.dataset.batches import place
from lora_loom.training.dataset.edit_program import parse_operation, parse_program, run_program
from lora_loom.training.dataset.fix_edits import FIXES, Fix
from lora_loom.training.dataset.fixes import apply_fixes
from lora_loom.training.dataset.focus_edits import ClearFocus, SetFocus, rounded
from lora_loom.training.dataset.journal import Journal
from lora_loom.training.dataset.lint import lint
from lora_loom.training.dataset.model import (
    BucketOptions,
    CaptionOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    Header,
    ImageOptions,
    Sample,
)
from lora_loom.training.dataset.operations import Selection

CAPTIONS = [
    "red_hat, red hat, ohwx, day",
    "ohwx, black hair, hair, day",
    "ohwx, smile, sky, blu sky",
    "",
    *["ohwx, blue sky, red hat, day"] * 6,
]


def dataset(crop="centre"):
    options = {"captions": CaptionOptions(trigger="ohwx"), "images": ImageOptions(crop=crop)}
    concept = Concept("cats", buckets=BucketOptions(enabled=False), **options)
    pictures = [FilePicture(f"{index}.png", Header(900, 400, "PNG", "RGB"), 1, 1) for index in range(len(CAPTIONS))]
    samples = [Sample(picture.path, picture, text) for picture, text in zip(pictures, CAPTIONS, strict=True)]
    return Dataset("cats", (concept,), tuple(samples))


@pytest.mark.parametrize("rule", FIXES)
def test_a_fix_is_what_the_check_fixes(rule):
    given_ = dataset()
    expected = apply_fixes(given_, lint(given_), [rule])
    edited, [note] = run_program(given_, parse_program(f"fix {rule}"))
    assert [sample.caption for sample in edited.samples] == [sample.caption for sample in expected.samples]
    changed = sum(a.caption != b.caption for a, b in zip(edited.samples, given_.samples, strict=True))
    assert note.startswith(f"fix {rule}: ") and (changed > 0) == ("finds nothing" not in note)
    again, [note] = run_program(edited, parse_program(f"fix {rule.lower()}"))
    assert again == edited and "finds nothing" in note


def test_some_fix_does_something():
    findings = {found.rule for found in lint(dataset())}
    assert {"T002", "T020", "T021"} <= findings & set(FIXES)


def test_a_fix_of_a_selection_and_its_undo():
    journal = Journal(dataset())
    done = journal.do(parse_operation('fix T021 for "0.png"'))
    assert done.ids == ("0.png",) and journal.dataset.samples[0].caption == "red hat, ohwx, day"
    journal.undo()
    assert journal.dataset == dataset()
    assert parse_operation(Fix("T021", selection=Selection(where="tag:x")).line) == Fix(
        "T021", selection=Selection(where="tag:x")
    )


@pytest.mark.parametrize("line", ["fix", "fix T999", "fix D030", "fix D031", "fix T040", "fix A001"])
def test_what_no_edit_can_fix_is_refused(line):
    with pytest.raises(DatasetError, match="T021"):
        parse_operation(line)
    with pytest.raises(DatasetError, match="T021"):
        Fix(line[4:])


parts = st.floats(0, 1)


@given(parts, parts, parts, parts)
def test_a_focus_is_written_as_it_is_read(a, b, c, d):
    box = rounded((min(a, b), min(c, d), max(a, b), max(c, d)))
    if box[0] == box[2] or box[1] == box[3]:
        with pytest.raises(DatasetError, match="is no box"):
            SetFocus(box)
        return
    edit = SetFocus(box, selection=Selection(ids=('a "b".png',)))
    assert parse_operation(edit.line) == edit
    clear = ClearFocus(selection=edit.selection)
    assert parse_operation(clear.line) == clear


@pytest.mark.parametrize("box", ["0 0 1", "0 0 0 1", "0.5 0 0.2 1", "0 0 1 2", "-1 0 1 1", "0 0 1 1e9", '"0" 0 1 1',
                                 "0 0 nan 1", "0 0 1 1 1"])  # fmt: skip
def test_what_is_no_box_is_refused(box):
    with pytest.raises(DatasetError, match="set focus|is no box"):
        parse_operation(f"set focus {box}")


def test_a_focus_moves_the_crop_and_only_that():
    journal = Journal(dataset("focus"))
    done = journal.do(parse_operation('set focus 0 0 0.2 1 for "1.png"'))
    assert done.ids == ("1.png",) and done.notes == () and journal.unsaved == ()
    crops = {item.sample: item.crop for item in place(journal.dataset)}
    assert crops[1][0] == 0 and crops[0][0] > 0
    assert journal.preview(parse_operation("clear focus")).examples == ()
    journal.do(parse_operation('add "x"'))
    rerun, _ = run_program(dataset("focus"), parse_program(journal.program))
    assert rerun == journal.dataset and rerun.samples[1].focus == (0, 0, 0.2, 1)
    journal.undo()
    journal.undo()
    assert journal.dataset == dataset("focus")
    assert journal.redo().operation.FIELD == "focus" and journal.dataset.samples[1].focus == (0, 0, 0.2, 1)
    assert dataclasses.replace(journal.dataset.samples[1], focus=None) == dataset("focus").samples[1]


def test_a_focus_without_effect_says_so():
    _, [note] = run_program(dataset(), parse_program("set focus 0 0 0.5 0.5"))
    assert "set crop to focus" in note
