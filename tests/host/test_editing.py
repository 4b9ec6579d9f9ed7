"""Which datasets are open: bounded, found again, no edits dropped that are only there, no pixels of the graph kept."""

import gc
import weakref

import pytest
import torch

import tiny
from editor_client import put
from lora_loom.host import editing, editor_routes
from lora_loom.host.editing import Editing
from lora_loom.host.guard import Refused
from lora_loom.training.dataset.journal import Journal
from lora_loom.training.dataset.model import Concept, Dataset, DatasetError, FilePicture, GraphPicture, Header, Sample


def of_files(name="a.png"):
    return Dataset("set", (Concept(),), (Sample(name, FilePicture(name, Header(64, 64, "PNG", "RGB"), 1, 1), "cat"),))


def of_the_graph():
    return Dataset("IMAGEs", (Concept(),), (Sample("1", GraphPicture(torch.rand(8, 8, 3)), "cat"),))


@pytest.fixture
def sets(places):
    """Folders 0 to 9."""
    for index in range(10):
        put(places / f"comfy/datasets/{index}", {"a.png": "cat", "b.png": ""})
    return places / "comfy/datasets"


def opened(editing_, folder, **options):
    return editing_.open_source("datasets", str(folder), 512, 64, "", **options)


def edit(dataset, line='add "x"'):
    dataset.do(dataset.operation(line))
    return dataset


def test_what_nodes_had_is_bounded_and_pixels_are_not_kept():
    kept = Editing()
    for index in range(editing.MOST_KEPT + 3):
        kept.keep(str(index), of_files())
    kept.keep(None, of_files())
    assert [*kept.kept()] == [str(index) for index in range(3, editing.MOST_KEPT + 3)]
    dataset = of_the_graph()
    pixels = weakref.ref(dataset.samples[0].picture.pixels)
    kept.keep("graph", dataset)
    assert kept.open_node("graph").dataset == dataset
    kept.close(kept.all()[0].id)
    del dataset
    gc.collect()
    assert pixels() is None and "graph" not in kept.kept()
    with pytest.raises(Refused, match="has not run") as refused:
        kept.open_node("graph")
    assert refused.value.status == 404


def test_the_oldest_without_edits_makes_room(sets, monkeypatch):
    monkeypatch.setattr(editing, "MOST_OPEN", 3)
    place = Editing()
    first, second, third = (opened(place, index) for index in range(3))
    edit(first)
    place.get(second.id)  # used last
    fourth = opened(place, 3)
    assert {each.id for each in place.all()} == {first.id, second.id, fourth.id}
    edit(second), edit(fourth)
    with pytest.raises(Refused, match="unwritten edits are open") as refused:
        opened(place, 4)
    assert refused.value.status == 409 and len(place.all()) == 3
    fourth.undo()
    assert opened(place, 4).id and first in place.all() and second in place.all()
    place.close(second.id)
    with pytest.raises(Refused, match="no such dataset"):
        place.get(second.id)


def test_the_files_are_read_again_where_nothing_is_lost(sets):
    place = Editing()
    dataset = opened(place, 0)
    (sets / "0/a.txt").write_text("dog")
    changed = opened(place, 0)
    assert changed is not dataset and changed.dataset.samples[0].caption == "dog"
    edit(changed)
    (sets / "0/a.txt").write_text("cow")
    assert opened(place, 0) is changed
    assert opened(place, 0, again=True).dataset.samples[0].caption == "cow"


def test_what_others_wrote_meanwhile_is_not_taken_for_read(sets):
    """Our own writing is no news, but theirs at the same time is."""
    place = Editing()
    dataset = edit(opened(place, 0), 'set caption "new" for "a.png"')
    (sets / "0/b.txt").write_text("theirs")
    dataset.write()
    again = opened(place, 0)
    assert again is not dataset
    assert [sample.caption for sample in again.dataset.samples] == ["new", "theirs"]


def test_folders_without_captions_are_opened_to_write_them(sets):
    put(sets / "bare", {"a.png": "", "b.png": ""})
    dataset = opened(Editing(), "bare")
    assert [sample.caption for sample in dataset.dataset.samples] == ["", ""]
    assert dataset.dataset.concepts[0].captions.trigger == ""
    assert not any(editing.UNWRITTEN in note or "trigger" in note for note in dataset.dataset.notes)
    edit(dataset, 'set caption "a cat"')
    dataset.write()
    assert {path.read_text().strip() for path in (sets / "bare").glob("*.txt")} == {"a cat"}


def test_damaged_pictures_are_left_out_with_a_note(sets):
    (sets / "0/broken.png").write_bytes(b"<html>")
    dataset = opened(Editing(), 0)
    assert len(dataset.images) == 2 and any("an HTML page" in note for note in dataset.told["notes"])


def test_nothing_is_written_into_folders_that_are_no_longer_ours(sets, places):
    """A link that is put in the way while the dataset is open leads nowhere."""
    put(sets / "moved", {"deep/a.png": "cat"})
    dataset = edit(opened(Editing(), "moved"))
    (sets / "moved/deep").rename(places / "outside")
    (sets / "moved/deep").symlink_to(places / "outside")
    with pytest.raises(Refused, match="no longer one of the dataset folders") as refused:
        dataset.write()
    assert refused.value.status == 409 and (places / "outside/a.txt").read_text() == "cat"
    assert not (sets / "moved/.lora_loom").exists() and dataset.unsaved == {"deep/a.png"}


def test_implied_tags_by_a_table_of_the_users(places):
    (places / "comfy/datasets/implied.csv").write_text("cat,animal\n")
    place = Editing()
    place.keep("7", of_files())
    with pytest.raises(DatasetError, match="no implications are known"):
        edit(place.open_node("7"), "add implied")
    assert edit(place.open_node("7", "", "implied.csv"), "add implied").dataset.samples[0].caption == "cat, animal"
    with pytest.raises(DatasetError, match="^implications: "):
        place.open_node("7", "", "../implied.csv")


# -- what the lock is for


def test_what_is_asked_without_the_lock_reads_no_captions(sets, monkeypatch):
    """Who reads them beside an edit would keep those of before it, and they would be written instead of the edit."""
    place = Editing()
    dataset = edit(opened(place, 0), 'add "x" for "a.png"')
    image = dataset.ids["b.png"]
    with monkeypatch.context() as patch:
        patch.setattr(editor_routes, "EDITING", place)
        for name in ("dataset", "unsaved", "changed", "program"):
            patch.setattr(Journal, name, property(lambda self: pytest.fail("it reads captions")))
        operation = dataset.operation('add "y"', [image])
        [told] = editor_routes._all()["open"]
        assert (told["unsaved"], told["edits"], dataset.idle) == (1, 1, False)
    assert dataset.do(operation)["changed"] == [image] and dataset.told["unsaved"] == 2


def test_what_everybody_is_told_is_never_behind(sets):
    dataset = opened(Editing(), 0)
    for count, step in enumerate((lambda: edit(dataset), dataset.undo, dataset.redo, dataset.write, dataset.undo)):
        step()
        told = dataset.told
        assert told["unsaved"] == len(dataset.journal.unsaved) == (2, 0, 2, 0, 2)[count]
        assert told["revision"] == dataset.revision == count + 1 and told["edits"] == dataset.journal.steps


# -- edits that are only there


def test_a_focus_is_not_dropped(sets, monkeypatch):
    """No file can hold it, so nothing is unwritten; it is lost with the dataset all the same."""
    monkeypatch.setattr(editing, "MOST_OPEN", 1)
    place = Editing()
    dataset = opened(place, 0)
    dataset.focus(dataset.ids["a.png"], (0.1, 0.1, 0.5, 0.5))
    assert (dataset.told["unsaved"], dataset.told["changed_images"]) == (0, 1)
    put(sets / "0", {"c.png": "dog"})
    assert opened(place, 0) is dataset
    with pytest.raises(Refused, match="unwritten edits are open"):
        opened(place, 1)
    dataset.focus(dataset.ids["a.png"], None)
    assert opened(place, 0) is not dataset


def test_what_is_being_asked_about_makes_no_room(sets, monkeypatch):
    """The edit that is under way would be lost with it."""
    monkeypatch.setattr(editing, "MOST_OPEN", 1)
    place = Editing()
    dataset = opened(place, 0)
    dataset.users += 1
    with pytest.raises(Refused):
        opened(place, 1)
    dataset.users -= 1
    assert opened(place, 1) in place.all() and dataset not in place.all()


# -- nodes


def test_a_node_has_one_place_however_often_it_runs(sets):
    place = Editing()
    for _ in range(2 * editing.MOST_OPEN):
        dataset = of_files()
        place.keep("5", dataset)
        edit(place.open_node("5", 'add "x"'), 'add "y"')
        assert len(place.all()) == 1
        assert place.open_node("5", 'add "x"').journal.program == 'add "x"\nadd "y"', "a reload of the page"
    pixels = of_the_graph()
    alive = weakref.ref(pixels.samples[0].picture.pixels)
    place.keep("5", pixels)
    edit(place.open_node("5"))
    place.keep("5", dataset)
    place.open_node("5")
    del pixels
    gc.collect()
    assert alive() is None
    assert opened(place, 0) in place.all()


def test_a_nodes_edits_are_safe_once_the_page_has_the_program(sets, monkeypatch):
    monkeypatch.setattr(editing, "MOST_OPEN", 1)
    place = Editing()
    place.keep("5", of_files())
    dataset = place.open_node("5", 'add "given"')
    assert dataset.idle, "the widget has all of it"
    edit(dataset, 'add "y"')
    assert not dataset.idle
    assert dataset.fetched() == {"given": 'add "given"', "added": 'add "y"', "program": 'add "given"\nadd "y"'}
    assert dataset.idle
    dataset.undo()
    with pytest.raises(Refused, match="unwritten edits are open"):
        opened(place, 0)
    dataset.fetched()
    assert opened(place, 0) in place.all()


def test_another_program_is_opened_from_its_own_text(sets):
    """Of the widget, of another workflow, or of another page whose node has the same number."""
    place = Editing()
    place.keep("5", of_files())
    text = '# mine\r\nadd "x"\n\n  remove "nothing"  \n'
    first = place.open_node("5", text)
    assert first.fetched()["program"] == text and first.dataset.samples[0].caption == "cat, x"
    edit(first, 'add "z"')
    assert place.open_node("5", text) is place.open_node("5", text + 'add "z"') is first
    other = place.open_node("5", 'add "y"')
    assert other is not first and first not in place.all() and other.dataset.samples[0].caption == "cat, y"
    with pytest.raises(DatasetError, match="^program, line 3: .*no operation"):
        place.open_node("5", 'add "x"\n\nad "y"')
    with pytest.raises(DatasetError, match="^program, line 2: .*no implications are known"):
        place.open_node("5", "# by a table\nadd implied")
    assert place.all() == [other], "what is open stays as it is"


def test_nodes_write_no_files(places):
    folder = put(places / "comfy/datasets/node", {"a.png": "cat"})
    place = Editing()
    place.keep("5", opened(place, "node").read)
    dataset = edit(place.open_node("5"))
    for dry_run in (True, False):
        with pytest.raises(Refused, match="kept in its program") as refused:
            dataset.write(dry_run=dry_run)
        assert refused.value.status == 409
    assert (folder / "a.txt").read_text() == "cat"


def test_tokens_are_counted_as_long_as_the_graph_has_the_clip(sets):
    place, clip = Editing(), tiny.tiny_clip()
    place.keep("5", of_files(), clip)
    found = place.open_node("5", 'add "a long one" where tokens:<2')
    assert found.dataset.samples[0].caption == "cat, a long one"
    assert [*found.select("tokens:>4")] == [0] and [*found.select("tokens:>5")] == []
    without = opened(place, 0)
    with pytest.raises(DatasetError, match="tokens: .*connect clip to a Tag Editor node"):
        without.select("tokens:>4")
    gone = weakref.ref(clip)
    del clip
    gc.collect()
    assert gone() is None
    with pytest.raises(DatasetError, match="tokens: the CLIP that counted them is gone: queue the workflow again"):
        found.select("tokens:>3")
    assert place.open_node("5", 'add "x"'), "who asks for no tokens needs none"
