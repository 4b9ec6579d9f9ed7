"""Captions in files: written whole or not at all, never over what somebody else wrote, and brought back as they were.

The process really dies in the middle of it, at every step there is.
"""

import dataclasses
import json
import os
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lora_loom.training.dataset.caption_backups import FEW, caption_of, content_of, restore_captions
from lora_loom.training.dataset.caption_edits import SetCaption
from lora_loom.training.dataset.caption_files import plan_writing, write_captions
from lora_loom.training.dataset.combining import combine
from lora_loom.training.dataset.edit_program import parse_operation
from lora_loom.training.dataset.edits import update
from lora_loom.training.dataset.model import Access, Concept, DatasetError
from lora_loom.training.dataset.opening import open_dataset

EVERYWHERE = Access(lambda path: True, lambda path: "")
WHEN = datetime(2030, 1, 2, 3, 4, 5)
BACKUP = ".lora_loom/captions-20300102-030405"


def folder(tmp_path, **captions):
    """Pictures of these names; a caption of None is a missing file."""
    for name, caption in captions.items():
        path = tmp_path / "set" / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path.with_suffix(".png"))
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return tmp_path / "set"


def opened(path, trigger="zorb"):
    concept = Concept(resolutions=((64, 64),))
    captions = dataclasses.replace(concept.captions, trigger=trigger)
    return open_dataset(Path(path), dataclasses.replace(concept, captions=captions), EVERYWHERE)


def edited(dataset, *lines):
    for line in lines:
        dataset, _ = parse_operation(line).apply(dataset)
    return dataset


def files(path):
    """Every file below, hidden ones too, but for pictures and the backups."""
    found = {file.relative_to(path).as_posix(): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}
    return {name: content for name, content in found.items() if not name.endswith(".png") and ".lora_loom" not in name}


# ---------------------------------------------------------------- what is written


def test_edits_arrive_in_the_files_and_read_back(tmp_path):
    path = folder(tmp_path, a="cat, sitting\n", b="dog", sub__c="cat", d=None)
    dataset = opened(path)
    now = edited(dataset, 'add "new" at start where NOT tag:dog')
    plan = plan_writing(dataset, now)
    assert sorted(Path(one.path).name for one in plan.files) == ["a.txt", "c.txt", "d.txt"] and not plan.refused
    assert files(path) == {"a.txt": b"cat, sitting\n", "b.txt": b"dog", "sub/c.txt": b"cat"}, "a plan writes nothing"
    written = write_captions(plan, WHEN)
    assert files(path) == {
        "a.txt": b"new, cat, sitting\n", "b.txt": b"dog", "sub/c.txt": b"new, cat", "d.txt": b"new"
    }  # fmt: skip
    assert set(written.ids) == {"a.png", "sub/c.png", "d.png"} and written.refused == ()
    assert written.backups == (str(path / BACKUP),)
    again = opened(path)
    assert {s.id: s.caption for s in again.samples} == {s.id: s.caption for s in now.samples}
    kept = {name: (path / BACKUP / name).read_bytes() for name in ("a.txt", "sub/c.txt")}
    assert kept == {"a.txt": b"cat, sitting\n", "sub/c.txt": b"cat"} and not (path / BACKUP / "d.txt").exists()
    assert plan_writing(again, again) == plan_writing(now, now) != plan


def test_the_way_a_file_is_written_stays(tmp_path):
    manners = {
        "bom": "\ufeffcat, dog\n".encode(),
        "crlf": b"cat\r\ndog\r\n",
        "space": b"\n  cat, dog \n\n",
        "bare": b"cat, dog",
        "empty": b"\n",
        "umlaut": "Kätzchen, cat".encode(),
    }
    path = folder(tmp_path, **manners)
    dataset = opened(path)
    write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    assert {name.removesuffix(".txt"): content for name, content in files(path).items()} == {
        "bom": "\ufeffcat, dog, x\n".encode(),
        "crlf": b"cat\r\ndog, x\r\n",
        "space": b"\n  cat, dog, x \n\n",
        "bare": b"cat, dog, x",
        "empty": b"x\n",
        "umlaut": "Kätzchen, cat, x".encode(),
    }


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab\n\r \ufeff"), max_size=12), st.text(st.sampled_from("ab\nä, "), max_size=12))
def test_what_is_written_reads_back(old, new):
    content = content_of(new.strip(), old.encode())
    assert caption_of("name", content) == new.strip()
    assert caption_of("name", content_of(new.strip(), None)) == new.strip()
    if caption_of("name", old.encode()) == new.strip() and "\r" not in old:
        assert content == old.encode(), "the same caption is the same file"


def test_permissions_and_other_types_stay(tmp_path):
    path = folder(tmp_path, a="cat", b="dog")
    os.rename(path / "b.txt", path / "b.caption")
    os.chmod(path / "a.txt", 0o640)
    dataset = opened(path)
    write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    assert files(path) == {"a.txt": b"cat, x", "b.caption": b"dog, x"}
    assert (path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_a_new_caption_is_of_the_type_the_others_have(tmp_path):
    path = folder(tmp_path, a="cat", b="dog", c=None)
    for name in "ab":
        os.rename(path / f"{name}.txt", path / f"{name}.caption")
    dataset = opened(path)
    write_captions(plan_writing(dataset, edited(dataset, 'set caption "x" for "c.png"')), WHEN)
    assert files(path)["c.caption"] == b"x"


def test_class_tokens_become_a_file_only_where_they_were_edited(tmp_path):
    path = folder(tmp_path, **{"10_cat__a": None, "10_cat__b": None})
    dataset = opened(path)
    assert {sample.caption for sample in dataset.samples} == {"cat"}
    now = edited(dataset, 'add "hat" for "10_cat/a.png"')
    write_captions(plan_writing(dataset, now), WHEN)
    assert files(path) == {"10_cat/a.txt": b"cat, hat"}
    assert [sample.caption for sample in opened(path).samples] == ["cat, hat", "cat"]


def test_faces_that_share_a_caption_get_their_own_where_they_differ(tmp_path):
    shared = {"cat": "cat, face", "cat_8_8_4_4": None, "cat_4_4_4_4": None}
    path = folder(tmp_path, **shared)
    dataset = opened(path)
    assert {Path(sample.caption_path).name for sample in dataset.samples} == {"cat.txt"}
    together = plan_writing(dataset, edited(dataset, 'add "x"'))
    assert [(Path(one.path).name, len(one.ids)) for one in together.files] == [("cat.txt", 3)]
    for lines in (
        ['add "x" for "cat_8_8_4_4.png"'],
        ['add "x" for "cat.png"'],
        ['remove "face" for "cat.png"', 'add "y"'],
    ):
        work = tmp_path / "work"
        shutil.copytree(path, work)
        given_dataset = opened(work)
        now = edited(given_dataset, *lines)
        assert not write_captions(plan_writing(given_dataset, now), WHEN).refused
        assert {s.id: s.caption for s in opened(work).samples} == {s.id: s.caption for s in now.samples}, lines
        shutil.rmtree(work)


def test_a_picture_in_two_concepts_cannot_have_two_captions(tmp_path):
    path = folder(tmp_path, a="cat")
    dataset = combine([opened(path), opened(path)])
    assert [sample.id for sample in dataset.samples] == ["a.png", "2/a.png"]
    apart = plan_writing(dataset, edited(dataset, 'add "x" for "2/a.png"'))
    assert apart.files == () and "share a.txt and have different captions: give them" in apart.refused[0].reason
    both = write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    assert set(both.ids) == {"a.png", "2/a.png"} and files(path) == {"a.txt": b"cat, x"}
    assert both.backups == (str(path / BACKUP),), "beside the pictures: the two have no folder in common"


# ---------------------------------------------------------------- what is refused


def refusals(dataset, now):
    plan = plan_writing(dataset, now)
    return {one.ids: one.reason for one in plan.refused}, plan


def test_captions_in_lists_and_of_the_graph_are_refused_with_a_cure(tmp_path):
    path = folder(tmp_path, a=None, b=None)
    (path / "list.json").write_text(json.dumps({"a.png": {"caption": "cat"}, "b.png": "dog"}))
    dataset = opened(path / "list.json")
    reasons, plan = refusals(dataset, edited(dataset, 'add "x" for "a.png"'))
    assert plan.files == () and list(reasons) == [("a.png",)]
    assert "has its caption in list.json, which is not written: keep its edits in the program" in reasons[("a.png",)]

    path = folder(tmp_path / "other", a="cat", b="dog")
    dataset = opened(path)
    images = update(dataset, ["a.png"], images=[torch.zeros(8, 8, 3)], images_mode="append")
    images = update(images, ["b.png"], images=[torch.zeros(16, 16, 3)])
    reasons, plan = refusals(dataset, edited(images, 'add "x"'))
    assert set(reasons) == {("a.png~2",), ("b.png",)} and [Path(one.path).name for one in plan.files] == ["a.txt"]
    assert all("comes from the graph" in reason for reason in reasons.values())


def test_a_file_that_was_changed_since_is_refused_and_the_others_written(tmp_path):
    path = folder(tmp_path, a="cat", b="dog", c="bird", d="cow", e="hen", f=None)
    dataset = opened(path)
    now = edited(dataset, 'add "x"')
    (path / "a.txt").write_text("somebody else's words")
    (path / "b.txt").unlink()
    (path / "c.txt").write_bytes(b"\xff\xfe")
    (path / "f.txt").write_text("somebody else's too")
    (path / "e.txt").write_text("hen, x")  # says so already
    before = files(path)
    reasons, plan = refusals(dataset, now)
    assert {name[0]: reason.split(": ")[0] for name, reason in reasons.items()} == {
        "a.png": "a.txt was changed since it was read",
        "b.png": "b.txt is gone since it was read",
        "c.png": "c.txt is no UTF-8 text any more (byte 0)",
        "f.png": "f.txt was changed since it was read",
    }
    written = write_captions(plan, WHEN)
    assert set(written.ids) == {"d.png", "e.png"} and len(written.refused) == 4
    assert files(path) == before | {"d.txt": b"cow, x"}


@pytest.mark.parametrize(
    "meddle, reason",
    [
        (lambda path: (path / "a.txt").write_text("new words"), "a.txt was changed in the meantime"),
        (lambda path: os.utime(path / "a.txt", ns=(1, 1)), "a.txt was changed in the meantime"),
        (lambda path: (path / "a.txt").unlink(), "a.txt is gone in the meantime"),
        (lambda path: (path / "n.txt").write_text("new words"), "n.txt appeared in the meantime"),
        (lambda path: (path / "n.txt").symlink_to(path / "b.txt"), "n.txt is a link"),
    ],
)
def test_what_changes_between_plan_and_writing_is_refused_too(tmp_path, meddle, reason):
    path = folder(tmp_path, a="cat", b="dog", n=None)
    dataset = opened(path)
    plan = plan_writing(dataset, edited(dataset, 'add "x"'))
    meddle(path)
    before = files(path)
    written = write_captions(plan, WHEN)
    assert [one.reason.split(":")[0] for one in written.refused] == [
        reason if "link" not in reason else "n.txt is a link, and links are not followed"
    ]
    assert len(written.ids) == 2 and files(path)["b.txt"] == b"dog, x"
    spared = written.refused[0].ids[0].replace(".png", ".txt")
    assert files(path).get(spared) == (before.get(spared) if "link" not in reason else b"dog, x")


def test_links_and_twins_are_refused(tmp_path):
    path = folder(tmp_path, a="cat", b="dog")
    outside = tmp_path / "outside.txt"
    outside.write_text("cat")
    (path / "a.txt").unlink()
    (path / "a.txt").symlink_to(outside)
    (path / "b.caption").write_text("dog")
    dataset = opened(path)
    reasons, plan = refusals(dataset, edited(dataset, 'add "x"'))
    assert plan.files == () and "is a link" in reasons[("a.png",)]
    assert reasons[("b.png",)] == "b.caption lies beside b.txt: keep one of them only"
    assert outside.read_text() == "cat"


def test_a_caption_that_no_file_can_hold_is_refused(tmp_path):
    path = folder(tmp_path, a="cat", b="dog")
    dataset = opened(path)
    now = update(dataset, ["a.png", "b.png"], captions=["\ud800", "x" * (1 << 20) + "y"])
    reasons, plan = refusals(dataset, now)
    assert plan.files == () and all("too long for a file, or no text" in reason for reason in reasons.values())


def test_without_a_backup_nothing_is_written(tmp_path):
    path = folder(tmp_path, a="cat", b="dog")
    dataset = opened(path)
    plan = plan_writing(dataset, edited(dataset, 'add "x"'))
    (path / ".lora_loom").write_text("a file where the folder should be")
    with pytest.raises(DatasetError, match=r"cannot be kept in \.lora_loom .*nothing was written: make room"):
        write_captions(plan, WHEN)
    (path / ".lora_loom").unlink()
    (tmp_path / "elsewhere").mkdir()
    (path / ".lora_loom").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DatasetError, match="it is a link"):
        write_captions(plan, WHEN)
    assert files(path) == {"a.txt": b"cat", "b.txt": b"dog"} and not list((tmp_path / "elsewhere").iterdir())


# ---------------------------------------------------------------- brought back


def test_a_writing_is_brought_back(tmp_path):
    path = folder(tmp_path, a="cat\n", b="\ufeffdog\r\nbird", sub__c="cow", n=None)
    before = files(path)
    dataset = opened(path)
    written = write_captions(plan_writing(dataset, edited(dataset, 'set caption "x"')), WHEN)
    after = files(path)
    assert len(after) == 4
    restored = restore_captions(written.backups[0])
    assert files(path) == before and len(restored.files) == 4 and restored.refused == ()
    assert (path / BACKUP / "n.txt").read_bytes() == b"x", "nothing is ever deleted"
    assert restore_captions(written.backups[0]) == dataclasses.replace(restored, files=()), "twice is once"
    assert opened(path) == dataset


def test_copying_a_backup_by_hand_brings_it_back_too(tmp_path):
    path = folder(tmp_path, a="cat", sub__b="dog")
    before = files(path)
    dataset = opened(path)
    write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    shutil.copytree(path / BACKUP, path, dirs_exist_ok=True)
    assert {name: content for name, content in files(path).items() if name != "written.json"} == before


def test_what_was_changed_after_the_writing_is_not_lost_by_bringing_back(tmp_path):
    path = folder(tmp_path, a="cat", b="dog", c="cow", n=None)
    dataset = opened(path)
    written = write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    (path / "a.txt").write_text("later words")
    (path / "n.txt").write_text("later words")
    (path / "b.txt").unlink()
    restored = restore_captions(written.backups[0])
    assert files(path) == {"a.txt": b"later words", "n.txt": b"later words", "c.txt": b"cow"}
    assert {one.ids[0] for one in restored.refused} == {"a.txt", "n.txt", "b.txt"}
    assert all("was changed after it was written: copy it from" in one.reason for one in restored.refused)


def test_two_writings_in_one_second_have_two_backups(tmp_path):
    path = folder(tmp_path, a="cat")
    states, backups = [files(path)], []
    for word in ("x", "y"):
        dataset = opened(path)
        backups += write_captions(plan_writing(dataset, edited(dataset, f'add "{word}"')), WHEN).backups
        states.append(files(path))
    assert [Path(backup).name for backup in backups] == ["captions-20300102-030405", "captions-20300102-030405-2"]
    for backup, state in zip(reversed(backups), reversed(states[:-1]), strict=True):
        restore_captions(backup)
        assert files(path) == state


@pytest.mark.parametrize(
    "manifest",
    [
        '{"../../evil.txt": {"was": false, "sha256": ""}}',
        '{"/evil.txt": {"was": false, "sha256": ""}}',
        '{"linked/evil.txt": {"was": false, "sha256": ""}}',
        '{"a.png": {"was": true, "sha256": ""}}',
        '{"a.txt": {"was": true}}',
        '{"a.txt": 3}',
        "[]",
        "no json",
        "",
    ],
)
def test_a_backup_that_names_other_files_is_refused(tmp_path, manifest):
    path = folder(tmp_path, a="cat")
    (tmp_path / "evil.txt").write_text("spared")
    (path / "linked").symlink_to(tmp_path)
    backup = path / BACKUP
    backup.mkdir(parents=True)
    (backup / "written.json").write_text(manifest)
    with pytest.raises(DatasetError, match="is no backup of captions|outside its dataset"):
        restore_captions(backup)
    assert files(path).get("a.txt") == b"cat" and (tmp_path / "evil.txt").read_text() == "spared"
    with pytest.raises(DatasetError, match="is no backup"):
        restore_captions(tmp_path)


# ---------------------------------------------------------------- the process dies

STEPS = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.chmod", "shutil.copystat", "shutil.copymode"}


def dying_at(step, work):
    """Runs ``work`` in a child that is gone without a word at the so many-th thing it does to a file; its exit code."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = [0]

    def watch(event, arguments):
        if event in STEPS:
            if seen[0] == step:
                os._exit(9)
            seen[0] += 1

    sys.addaudithook(watch)
    try:
        work()
    except BaseException:
        os._exit(2)
    os._exit(0)


def test_wherever_the_process_dies_a_file_is_old_or_new(tmp_path):
    path = folder(tmp_path, a="cat\n", b="dog", n=None)
    old = files(path)
    new = {"a.txt": b"cat, some new words\n", "b.txt": b"dog, some new words", "n.txt": b"some new words"}
    step, halfway = 0, set()
    while True:
        work = tmp_path / f"work-{step}"
        shutil.copytree(path, work)
        dataset = opened(work)
        plan = plan_writing(dataset, edited(dataset, 'add "some new words"'))
        code = dying_at(step, lambda plan=plan: write_captions(plan, WHEN))
        assert code in (0, 9)
        found = files(work)
        visible = {name: content for name, content in found.items() if not Path(name).name.startswith(".")}
        for name, content in visible.items():
            assert content in (old.get(name), new[name]), (step, name, content)
        assert set(old) <= set(visible)
        read = {sample.id.replace(".png", ".txt"): sample.caption for sample in opened(work).samples}
        assert all(read[name] == visible.get(name, b"").decode().strip() for name in new), (
            "what is left over is not read"
        )
        halfway.add(frozenset(visible.items()))
        if visible != old:  # then there is a backup that brings it back
            restored = restore_captions(work / BACKUP)
            assert not restored.refused
            assert {name: text for name, text in files(work).items() if not Path(name).name.startswith(".")} == old
        if code == 0:
            assert visible == new
            break
        step += 1
    assert step > 15 and len(halfway) == 4, "none, one, two and all three were written"


def test_wherever_bringing_back_dies_it_can_be_done_again(tmp_path):
    path = folder(tmp_path, a="cat\n", b="dog", n=None)
    old = files(path)
    dataset = opened(path)
    write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    new, step = files(path), 0
    while True:
        work = tmp_path / f"work-{step}"
        shutil.copytree(path, work)
        code = dying_at(step, lambda work=work: restore_captions(work / BACKUP))
        visible = {name: content for name, content in files(work).items() if not Path(name).name.startswith(".")}
        assert all(content in (old.get(name), new[name]) for name, content in visible.items()) and set(old) <= set(
            visible
        )
        assert not restore_captions(work / BACKUP).refused
        assert {name: text for name, text in files(work).items() if not Path(name).name.startswith(".")} == old
        if code == 0:
            break
        step += 1
    assert step > 8


@pytest.mark.parametrize("call", ["replace", "link"])
def test_an_error_of_the_disk_is_a_reason_and_leaves_nothing_behind(tmp_path, monkeypatch, call):
    """A full disk cannot be had in a test: the call raises what it raises then, for one of the files only."""
    path = folder(tmp_path, a="cat", b="dog", n=None)
    dataset = opened(path)
    plan = plan_writing(dataset, edited(dataset, 'add "x"'))
    real, target = getattr(os, call), {"replace": "b.txt", "link": "n.txt"}[call]

    def failing(*arguments, **options):
        if Path(arguments[1]).name == target:
            raise OSError(28, "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    before = files(path)
    written = write_captions(plan, WHEN)
    if call == "link":
        assert not written.refused, "a file system without links is served otherwise"
        return
    assert all("cannot be written (No space left on device): check its folder" in one.reason for one in written.refused)
    spared = {name[:-3] + "txt" for one in written.refused for name in one.ids}
    assert spared and all(files(path).get(name) == before.get(name) for name in spared)
    assert not [name for name in files(path) if name.startswith(".")]


@pytest.mark.parametrize("at", [0, 2, 4])
def test_a_disk_that_is_full_while_it_is_waited_for_changes_nothing(tmp_path, monkeypatch, at):
    path = folder(tmp_path, a="cat", b="dog", n=None)
    dataset = opened(path)
    plan = plan_writing(dataset, edited(dataset, 'add "x"'))
    before, real, count = files(path), os.fsync, iter(range(100))

    def failing(file):
        if next(count) == at:
            raise OSError(28, "No space left on device")
        return real(file)

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(DatasetError, match=r"cannot be stored \(No space left on device\), so nothing was written"):
        write_captions(plan, WHEN)
    assert files(path) == before and not (path / BACKUP).exists()
    written = write_captions(plan, WHEN)
    after, count = files(path), iter(range(at, 100))
    with pytest.raises(DatasetError, match="what is to be brought back cannot be stored .*, so nothing was changed"):
        restore_captions(written.backups[0])
    assert files(path) == after
    assert len(restore_captions(written.backups[0]).files) == 3 and files(path) == before


def test_a_backup_that_cannot_be_finished_leaves_no_folder(tmp_path, monkeypatch):
    path = folder(tmp_path, a="cat", b="dog")
    dataset = opened(path)
    plan = plan_writing(dataset, edited(dataset, 'add "x"'))
    real = shutil.copystat

    def failing(source, target):
        if Path(source).name == "b.txt":
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(shutil, "copystat", failing)
    with pytest.raises(DatasetError, match="so nothing was written: make room there"):
        write_captions(plan, WHEN)
    assert files(path) == {"a.txt": b"cat", "b.txt": b"dog"} and not list((path / ".lora_loom").iterdir())


def test_many_files_are_waited_for_in_one_pass(tmp_path, monkeypatch):
    path = folder(tmp_path, **{f"p{number}": f"tag {number}" for number in range(FEW + 1)})
    dataset, before = opened(path), files(path)
    seen: list[str] = []

    def noted(name):
        real = getattr(os, name)
        return lambda *arguments, **options: (seen.append(name), real(*arguments, **options))[1]

    for name in ("sync", "fsync", "replace"):
        monkeypatch.setattr(os, name, noted(name))
    written = write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN)
    assert seen == ["sync", *["replace"] * (FEW + 1)], "nothing is replaced before all is kept"
    seen.clear()
    assert len(restore_captions(written.backups[0]).files) == FEW + 1 and files(path) == before
    assert seen == ["sync", *["replace"] * (FEW + 1)]


@pytest.mark.parametrize("old", ["a, b\n", "a\r\nb\r\n", "\ufeffa"])
@pytest.mark.parametrize("text", ["p\r\nq", "\ufeffp", "p\r\r\nq\r"])
def test_what_was_written_can_be_written_again(tmp_path, old, text):
    path = folder(tmp_path, a=old)
    dataset = opened(path)
    once = SetCaption(text).apply(dataset)[0]
    assert write_captions(plan_writing(dataset, once), WHEN).refused == ()
    again = opened(path)
    assert again.samples[0].caption == once.samples[0].caption.strip()
    assert plan_writing(dataset, once).same == ("a.png",), "a second time there is nothing to do"
    assert write_captions(plan_writing(again, edited(again, 'add "x"')), WHEN).refused == ()
    assert opened(path).samples[0].caption.endswith("x")


def test_what_changes_while_it_is_brought_back_is_left_alone(tmp_path, monkeypatch):
    path = folder(tmp_path, a="cat", b="dog", n=None)
    dataset = opened(path)
    [backup] = write_captions(plan_writing(dataset, edited(dataset, 'add "x"')), WHEN).backups
    real = os.fsync

    def meddling(file):
        (path / "a.txt").write_text("by somebody else")
        (path / "b.txt").unlink(missing_ok=True)
        real(file)

    monkeypatch.setattr(os, "fsync", meddling)
    restored = restore_captions(backup)
    assert [one.ids for one in restored.refused] == [("a.txt",), ("b.txt",)]
    assert files(path) == {"a.txt": b"by somebody else"} and len(restored.files) == 1
