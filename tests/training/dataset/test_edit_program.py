"""Edit programs: text and operations are the same thing, in both directions; faults are named with their cure."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_loom.training.dataset import edit_program
from lora_loom.training.dataset.caption_edits import ReplacePattern, ReplaceText, SetCaption, SplitTags
from lora_loom.training.dataset.edit_program import (
    OPERATIONS,
    parse_operation,
    parse_program,
    program_text,
    run_program,
)
from lora_loom.training.dataset.edit_words import Words, quoted
from lora_loom.training.dataset.fix_edits import FIXES
from lora_loom.training.dataset.focus_edits import rounded
from lora_loom.training.dataset.journal import OVERHEAD, Journal
from lora_loom.training.dataset.model import CaptionOptions, Concept, Dataset, DatasetError, GraphPicture, Sample
from lora_loom.training.dataset.operations import Selection
from lora_loom.training.dataset.tag_edits import Add, Place, Remove, Sort

PAGE = Path(__file__).resolve().parents[3] / "web" / "docs" / "LoomTagEditor.md"

# ---------------------------------------------------------------- any operation there is

TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12)
ODD = st.text(st.sampled_from('ab"\\nr\n\r\t #,*?()éあ😀\u2028\x0b'), max_size=12)
ANY = TEXT | ODD
TAG = ANY.map(lambda text: text.replace("\n", " ").strip()).filter(bool)
TAGS = st.lists(TAG, min_size=1, max_size=4).map(tuple)
PLACE = st.one_of(
    st.sampled_from([Place("start"), Place("end")]),
    st.integers(1, 100_000).map(lambda position: Place("position", position)),
    st.builds(Place, st.sampled_from(["before", "after"]), st.just(0), TAG),
)
WEIGHT = st.integers(0, 10_000).map(lambda thousandths: thousandths / 1000)
SIDES = st.integers(1, 499_999).map(lambda part: part / 1_000_000)
WHERE = st.sampled_from(["", "tag:cat", 'tag:"a b" AND NOT (path:x OR tags:>20)', "caption:'#'", "#x OR y"])
SELECTION = st.builds(Selection, where=WHERE) | st.builds(
    Selection, ids=st.lists(ANY.filter(bool), min_size=1, max_size=3, unique=True).map(tuple)
)
FIELDS = {
    "add": {"tags": TAGS, "place": PLACE, "again": st.booleans()},
    "remove": {"tags": TAGS},
    "rename": {"tag": TAG, "new": TAGS},
    "move": {"tags": TAGS, "place": PLACE},
    "sort": {"by": st.sampled_from(["name", "frequency"]), "fixed": st.integers(0, 100_000)},
    "put trigger": {"trigger": TAG | st.just("")},
    "respell": {
        "gaps": st.sampled_from(["spaces", "underscores"]),
        "lower": st.booleans(),
        "exceptions": TAGS | st.just(()),
    },
    "set weight": {"weight": WEIGHT, "tags": TAGS},
    "clear weight": {"tags": TAGS},
    "set caption": {"text": ANY},
    "split tags": {"mark": ANY.filter(bool)},
    "join tags": {"joint": ANY},
    "replace text": {"old": ANY.filter(bool), "new": ANY},
    "replace pattern": {
        "pattern": st.sampled_from([r"(\w+) hair", "a+", r"\\", '"x"', r"\n|\r", "[\\]a]", "\\d{1,2}#"]),
        "new": st.sampled_from(["", r"\0", "x", r"\\n", '"\n']),
        "within": st.sampled_from(["tags", "captions"]),
    },
    "fix": {"rule": st.sampled_from(FIXES)},
    "set focus": {"box": st.tuples(*[SIDES] * 2, *[SIDES.map(lambda side: side + 0.5)] * 2).map(rounded)},
}  # fmt: skip
OPERATION = st.one_of(*(st.builds(kind, **FIELDS.get(kind.OPENING, {}), selection=SELECTION) for kind in OPERATIONS))


@settings(max_examples=600, deadline=None)
@given(OPERATION)
def test_a_line_is_its_operation(operation):
    line = operation.line
    assert "\n" not in line and "\r" not in line
    read = parse_operation(line)
    assert read == operation and type(read) is type(operation) and read.line == line
    assert parse_program(f"  {line}\t\r\n") == (operation,)


@settings(max_examples=100, deadline=None)
@given(st.lists(OPERATION, max_size=6))
def test_a_program_is_its_operations(operations):
    text = program_text(operations)
    assert parse_program(text) == tuple(operations)
    assert parse_program(f"# note\n\n{text}\n#") == tuple(operations)


@settings(max_examples=500, deadline=None)
@given(ANY)
def test_a_text_in_quotes_is_that_text(text):
    words = Words(quoted(text))
    assert words.text() == text
    words.ended()


@pytest.mark.parametrize(
    "written, text",
    [
        (r'"miku \(vocaloid\)"', r"miku \(vocaloid\)"),
        (r'"\d+\.\w"', r"\d+\.\w"),
        (r'"a\nb"', "a\nb"),
        (r'"a\\nb"', r"a\nb"),
        (r'"\"hi\" \\"', '"hi" \\'),
        (r'"\\\("', r"\\("),
    ],
)
def test_backslashes_need_no_doubling(written, text):
    words = Words(written)
    assert words.text() == text
    assert Words(quoted(text)).text() == text


def test_a_program_may_be_written_loosely():
    text = 'ADD   "a" ,"b"AT  start\t where  tag:x   \r\n# add "c"\n   #\n\nSort By Name Keeping First 2 Where NOT cat'
    expected = 'add "a", "b" at start where tag:x\nsort by name keeping first 2 where NOT cat'
    assert program_text(parse_program(text)) == expected


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    "text, message",
    [
        ('remvoe "a"', "“remvoe” is no operation; the nearest is remove: remove \"tag\""),
        ('\n# x\nset weigth 1 on "a"', "“set weigth” is no operation; the nearest is set weight: set weight 1.2"),
        ("xyz", "“xyz” is no operation; there are add, add implied, clear focus, "),
        ('"a"', "it has to begin with an operation: add, "),
        ("remove cat", 'at \'cat\': expected a text in quotes, e.g. "cat"; it is written: remove "tag", …, or rem'),
        ('add "a" at strat', "at 'strat': expected start, end or position; the nearest is start"),
        ('add "a" at position first', "at 'first': expected a position, 1 is the first"),
        ('add "a" at position 0', "position is 0, expected 1 (the first) to 100000"),
        ('add "a" even presen', "at 'presen': expected if"),
        ('add "a" "b"', "at '\"b\"': expected a comma, before, after, at, even, for, where or the end"),
        ('add "a", ', "at its end: expected a text in quotes"),
        ('add "a', "at '\"a': expected a closing quote; a quote inside a text is written \\\""),
        ('add " "', "add: ' ' is no tag; give one without spaces or line breaks around it"),
        ('add "a\\nb"', "is no tag"),
        ('remove "a" wehre tag:b', "the nearest is where"),
        ('remove "a" where', "at its end: expected a filter behind where, e.g. where tag:cat"),
        ('remove "a" where tga:b', "the nearest is tag:"),
        ('remove "a" where tag:b # only', "a comment needs a line of its own"),
        ('remove "a" for "x", "x"', "ids: given more than once: x"),
        ('move "a"', "at its end: expected a comma, before, after or to"),
        ("sort by freq", "the nearest is frequency; it is written: sort by name | by frequency"),
        ("respell", "respell: say how"),
        ('set weight 11 on "a"', "weight is 11.0, expected 0 to 10"),
        ('set weight 1.2345 on "a"', "expected a weight, e.g. 1.2"),
        ('replace pattern "(a" with "" in tags', "this bracket is not closed"),
        ('replace pattern "(a)" with "\\2" in tags', "the pattern has 1 groups"),
        ('replace pattern "a" with "b" in tag', "expected tags or captions; the nearest is tags"),
        ('replace text "" with "b"', "replace text: the text to look for is empty"),
        ('set caption "a\0b"', "characters that no text file holds"),
        ('add "a"\x0bat start', "expected a space instead of the character '\\x0b'"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_its_line_and_cure(text, message):
    with pytest.raises(DatasetError) as fault:
        parse_program(text)
    assert str(fault.value).startswith(f"program, line {text.count(chr(10)) + 1}: ") and message in str(fault.value)


def test_all_faults_are_named_together():
    with pytest.raises(DatasetError) as fault:
        parse_program('add "a"\nx\n' + "remove\n" * 6)
    lines = str(fault.value).split("\n")
    assert [line.split(":")[0] for line in lines[:5]] == [f"program, line {number}" for number in (2, 3, 4, 5, 6)]
    assert lines[5] == "and 2 lines more"


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from('add remove"\\ab,.1#\nwhere for tag:()* in to') | st.characters(), max_size=30))
def test_any_text_is_a_program_or_a_named_fault(text):
    try:
        operations = parse_program(text)
    except DatasetError as error:
        assert str(error).startswith("program, line ")
    else:
        assert parse_program(program_text(operations)) == operations


@pytest.mark.parametrize(
    "limit, text, message",
    [
        ("LONGEST", 'add "abc"', "9 characters, at most 5 are read; divide it"),
        ("MOST_LINES", 'add "abc"\n' * 6, "7 lines, at most 5 are read; divide it"),
        ("LONGEST_LINE", 'add "abc"', "line 1: it has 9 characters, at most 5 are read; use several lines"),
    ],
)
def test_programs_are_bounded(monkeypatch, limit, text, message):
    monkeypatch.setattr(edit_program, limit, 5)
    with pytest.raises(DatasetError, match=re.escape(message)):
        parse_program(text)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Add(("x" * 20_001,)), "20001 characters, at most 20000"),
        (lambda: Remove(tuple(map(str, range(1001)))), "expected 1 to 1000 texts, found 1001"),
        (lambda: Remove(()), "expected 1 to 1000 texts, found 0"),
        (lambda: Remove(("\ud800",)), "characters that no text file holds"),
        (lambda: Remove(("a",), selection=Selection("tag:a\n")), "one line without spaces around"),
        (lambda: Remove(("a",), selection=Selection("tag:a", ("x",))), "not for both"),
        (lambda: Remove(("a",), selection=Selection("tag:")), "something to look for after tag:"),
        (lambda: SetCaption("a" * 20_001), "at most 20000"),
        (lambda: SplitTags(""), "empty"),
        (lambda: ReplaceText("", "a"), "empty"),
        (lambda: ReplacePattern("a*", ""), "fits nothing"),
        (lambda: Place("middle"), "'middle' is unknown; use one of start, end"),
        (lambda: Place("before", 0, ""), "is no tag"),
        (lambda: Place("start", 5), "start has no position; leave 5 out"),
        (lambda: Place("before", 7, "x"), "before has no position"),
        (lambda: Place("end", 0, "zz"), "end has no tag; leave 'zz' out"),
        (lambda: Place("position", True), "position is True, expected a whole number"),
        (lambda: Place("position", 1.0), "position is 1.0"),
        (lambda: Sort("name", True), "keeping first is True"),
    ],
)
def test_operations_made_by_hand_are_checked_too(make, message):
    with pytest.raises(DatasetError, match=re.escape(message)):
        make()


def test_the_help_lists_every_line_as_it_is_written():
    page = PAGE.read_text(encoding="utf-8")
    for kind in OPERATIONS:
        assert f"| `{kind.SYNTAX.replace('|', chr(92) + '|')}` |" in page, kind.SYNTAX
    assert page.count("\n| `") == len(OPERATIONS)
    [example] = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    assert len(parse_program(example)) == 5


# ---------------------------------------------------------------- carried out

PICTURE = GraphPicture(torch.zeros(8, 8, 3))
WORDS = ("a", "b cat", "long_hair", "black hair", "hair", "C", "^_^", "zorb")
CAPTION = st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(", ".join), max_size=2).map("\n".join)
DATASET = st.builds(
    lambda captions, lines: Dataset(
        "test",
        (Concept("x", captions=CaptionOptions(trigger="zorb", lines=lines)), Concept("class", kind="regularisation")),
        tuple(Sample(f"{i}.png", PICTURE, caption, i % 2) for i, caption in enumerate(captions)),
    ),
    st.lists(CAPTION, min_size=1, max_size=5),
    st.sampled_from(["all", "random"]),
)
LINES = st.sampled_from(
    ['add "x", "a" at start', 'remove "b*" where concept:class', 'rename "a" to "b cat", "y"', "sort by frequency",
     'move "C" to start for "0.png", "2.png"', "remove duplicates", "respell with spaces in lower case", "tidy",
     "put trigger first", "remove implied", 'set caption "new, a" where tags:>3', 'replace text "a" with "aa"',
     r'replace pattern "(\w+)_(\w+)" with "\2" in tags', 'split tags at " "', "join lines", "fix T021 where path:1",
     "set focus 0.1 0.1 0.5 0.5 where tag:a", "clear focus", 'set weight 1.2 on "a"']
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(DATASET, st.lists(LINES, max_size=7), st.data())
def test_the_journal_can_go_anywhere_and_its_program_leads_there(dataset, lines, data):
    journal, states = Journal(dataset), [dataset]
    for line in lines:
        operation = parse_operation(line)
        preview = journal.preview(operation)
        assert journal.dataset == states[-1], "a preview changes nothing"
        expected, change = operation.apply(journal.dataset)
        done = journal.do(operation)
        assert (done.ids, done.selected, done.notes) == (change.ids, change.selected, change.notes)
        assert (preview.count, preview.selected, preview.notes) == (done.count, done.selected, done.notes)
        assert journal.dataset == expected
        captions = {sample.id: sample.caption for sample in journal.dataset.samples}
        assert all(captions[example.id] == example.after != example.before for example in preview.examples)
        states += [expected] * bool(done.count)
        assert run_program(dataset, parse_program(journal.program))[0] == expected
    place = len(states) - 1
    for back in data.draw(st.lists(st.booleans(), max_size=12)):
        assert (journal.can_undo, journal.can_redo) == (place > 0, place < len(states) - 1)
        if back and place:
            place, done = place - 1, journal.undo()
        elif not back and place < len(states) - 1:
            place, done = place + 1, journal.redo()
        else:
            with pytest.raises(DatasetError, match="there is nothing to"):
                journal.undo() if back else journal.redo()
            continue
        assert journal.dataset == states[place] and done.count
        assert run_program(dataset, parse_program(journal.program))[0] == states[place]
        changed = {new.id for old, new in zip(dataset.samples, states[place].samples, strict=True)
                   if old.caption != new.caption}  # fmt: skip
        assert set(journal.unsaved) == changed


def test_the_notes_of_a_program_say_what_each_line_did():
    dataset = Dataset("t", (Concept(),), tuple(Sample(name, PICTURE, name) for name in "ab"), ("a note",))
    seen = []
    edited, notes = run_program(
        dataset, parse_program('add "x" where tag:a\nremove "hat"'), done=lambda *what: seen.append(what)
    )
    assert notes == [
        'add "x" where tag:a: 1 image changed',
        'remove "hat": 0 of 2 images changed; no tag there fits “hat”',
    ]
    assert [change.count for _, change in seen] == [1, 0] and edited.notes == dataset.notes
    assert [sample.caption for sample in edited.samples] == ["a, x", "b"]
    assert run_program(dataset, [])[0] is dataset


# ---------------------------------------------------------------- the journal


def numbered(count):
    return Dataset("t", (Concept(),), tuple(Sample(f"{i}.png", PICTURE, f"tag {i}, a") for i in range(count)))


def test_a_bulk_edit_is_one_step():
    dataset = numbered(50)
    journal = Journal(dataset)
    preview = journal.preview(parse_operation('rename "a" to "b"'))
    assert (preview.count, preview.selected, len(preview.examples)) == (50, 50, 5)
    assert (preview.examples[0].before, preview.examples[0].after) == ("tag 0, a", "tag 0, b")
    assert journal.do(parse_operation('rename "a" to "b"')).count == 50
    assert journal.undo().count == 50 and journal.dataset == dataset
    assert journal.redo().count == 50
    assert journal.do(parse_operation('remove "nothing"')).count == 0 and journal.program == 'rename "a" to "b"'
    journal.undo()
    journal.do(parse_operation('add "c"'))
    assert not journal.can_redo and journal.program == 'add "c"'


def test_what_is_saved_is_no_longer_unsaved():
    journal = Journal(numbered(3))
    journal.do(parse_operation('add "b" for "0.png", "2.png"'))
    assert journal.unsaved == ("0.png", "2.png")
    journal.saved(["0.png"])
    assert journal.unsaved == ("2.png",)
    assert [sample.caption for sample in journal.as_saved.samples] == ["tag 0, a, b", "tag 1, a", "tag 2, a"]
    journal.undo()
    assert journal.unsaved == ("0.png",), "its file has the edit that was taken back"


def test_the_oldest_steps_are_let_go_where_they_hold_too_much():
    dataset = numbered(10)
    journal = Journal(dataset, most_kept=8000)
    for number in range(20):
        journal.do(parse_operation(f'add "new {number}" at start'))
        assert journal._kept == sum(step.size for step in journal._done) <= 8000 or len(journal._done) == 1
    assert len(journal.operations) == 20 and run_program(dataset, journal.operations)[0] == journal.dataset
    journal.undo()
    while journal.can_undo:
        journal.undo()
    with pytest.raises(DatasetError, match="nothing to undo; the steps before are too far back"):
        journal.undo()
    assert 0 < len(journal.operations) < 20
    assert run_program(dataset, journal.operations)[0] == journal.dataset


def test_only_what_changed_is_kept():
    journal = Journal(numbered(1000))
    journal.do(parse_operation('add "b" for "5.png"'))
    assert journal._kept == len("tag 5, a, b") + OVERHEAD
    journal.undo()
    journal.do(parse_operation('set focus 0.1 0.1 0.5 0.5 for "5.png"'))
    assert journal._kept == OVERHEAD + 4, "what is no text takes room too"


GIVEN = '# what it is about\n\nadd "x" at start\nremove "nothing"\n'


@pytest.mark.parametrize("given", [GIVEN, GIVEN.rstrip(), f"\ufeff{GIVEN}", ""])
def test_what_is_given_stays_as_it_is_and_cannot_be_undone(given):
    dataset = numbered(3)
    journal = Journal(dataset, given=given)
    before = journal.dataset
    assert before == run_program(dataset, parse_program(given))[0]
    assert journal.program == journal.given == given and not journal.can_undo and journal.added == ""
    journal.do(parse_operation('add "y"'))
    assert journal.program.startswith(given) and journal.added == 'add "y"' and journal.steps == 1
    assert parse_program(journal.program) == journal.operations
    assert run_program(dataset, journal.operations)[0] == journal.dataset
    journal.undo()
    assert journal.dataset == before and journal.program == given
    with pytest.raises(DatasetError, match="there is nothing to undo$"):
        journal.undo()


@pytest.mark.parametrize("line", ["xyz", "add implied", 'set caption "a" where tokens:>1'])
def test_a_given_line_that_fails_is_named(line):
    with pytest.raises(DatasetError, match="^program, line 3: "):
        Journal(numbered(1), given=f'# note\nadd "x"\n{line}\nadd "y"')


def test_what_would_be_undone_and_redone_is_told():
    journal = Journal(numbered(2))
    assert (journal.undo_line, journal.redo_line, journal.steps) == (None, None, 0)
    journal.do(parse_operation('add "b"'))
    journal.do(SetCaption("x" * 400))
    assert journal.undo_line == 'set caption "' + "x" * 286 + "…" and journal.redo_line is None
    journal.undo()
    assert journal.undo_line == 'add "b"' and journal.redo_line.startswith("set caption") and journal.steps == 1


def test_a_focus_that_is_not_as_it_was_read_is_a_change_but_no_caption_to_save():
    journal = Journal(numbered(3))
    journal.do(parse_operation('add "b" for "0.png"'))
    journal.do(parse_operation('set focus 0 0 1 1 for "2.png"'))
    assert (journal.unsaved, journal.changed) == (("0.png",), ("0.png", "2.png"))
    journal.saved(["0.png", "2.png"])
    assert (journal.unsaved, journal.changed) == ((), ("2.png",))
    journal.undo()
    assert journal.changed == ()


def test_a_program_for_thousands_of_selected_images_can_be_read_again(monkeypatch):
    """As the editor makes it: all but one of 10,000 images, one edit after the other, until no more are possible.

    With an eighth of the room, so that it does not take long.
    """
    monkeypatch.setattr("lora_loom.training.dataset.journal.LONGEST", 4_000_000)
    monkeypatch.setattr(edit_program, "LONGEST", 4_000_000)
    ids = tuple(f"my folder/some picture name {number:05}.png" for number in range(10_000))
    dataset = Dataset("t", (Concept(),), tuple(Sample(name, PICTURE, "a") for name in ids))
    journal = Journal(dataset)
    with pytest.raises(DatasetError, match=r"at most 4,000,000 in 20,000 are read: select the images by a filter"):
        for number in range(1000):
            journal.do(SetCaption(f"c{number}", selection=Selection(ids=ids[:-1])))
    assert journal.steps == 9
    assert parse_program(journal.program) == journal.operations
    assert journal.do(SetCaption("by a filter", selection=Selection("tag:c8"))).count == 9_999
    journal.undo()
    journal.undo()
    journal.redo()
    with pytest.raises(DatasetError, match="select the images by a filter"):
        journal.preview(SetCaption("one more", selection=Selection(ids=ids[:-1])))


@pytest.mark.parametrize(
    "limit, message",
    [("LONGEST_LINE", "the line of this edit would have 9 characters, at most 5"), ("MOST_LINES", "in 6 lines"),
     ("LONGEST", "the program of all edits would have 10 characters")],
)  # fmt: skip
def test_an_edit_that_no_program_could_hold_is_refused(monkeypatch, limit, message):
    opened = Journal(numbered(1), given="\n" * 4 if limit == "MOST_LINES" else "")
    monkeypatch.setattr(f"lora_loom.training.dataset.journal.{limit}", 5)
    with pytest.raises(DatasetError, match=re.escape(message)):
        opened.do(parse_operation('add "abc"'))
    assert opened.program.strip() == "" and opened.dataset == numbered(1)
