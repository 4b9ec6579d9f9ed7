"""The editor's routes in the real server: open, page through, edit, undo, write; and what tries to get elsewhere."""

import io

import numpy as np
import pytest
from PIL import Image

from editor_client import Client, Dataset, listed_by, put, tree

STATE = {"revision", "unsaved", "edits", "can_undo", "can_redo", "undo", "redo", "keeps"}  # in every answer
CAPTIONS = {
    "a.png": "ohwx, red hat, smile",
    "b.png": "ohwx, Red Hat, dog (husky)",
    "sub/c.png": "a sentence, ohwx",
    "sub/d.png": "",
}


@pytest.fixture(scope="module")
def client(server):
    return Client(server)


@pytest.fixture(scope="module")
def folders(client):
    """Fresh folders of the same images, one for each test; the server lists them after a while."""
    names = [f"editor-{index}" for index in range(20)]
    for name in names:
        put(client.server.base / "datasets" / name, CAPTIONS)
    listed_by(client, names[-1])
    return iter(names)


@pytest.fixture
def opened(client, folders):
    name = next(folders)
    dataset = client.open(name)
    dataset.folder = client.server.base / "datasets" / name
    yield dataset
    dataset.post("/close")


def test_rows_of_a_dataset(opened):
    told = opened.told()
    assert told["images"] == 4 and told["unsaved"] == told["edits"] == 0 and told["keeps"] == "files"
    assert (told["can_undo"], told["can_redo"], told["undo"], told["redo"]) == (False, False, None, None)
    assert told["name"].startswith("datasets/editor-") and told["notes"] == ["without a caption file: sub/d.png"]
    page = opened.told("/rows")
    assert page["total"] == 4 and [row["name"] for row in page["rows"]] == list(CAPTIONS)
    row = page["rows"][1]
    assert row["caption"] == CAPTIONS["b.png"] and row["tags"] == ["ohwx", "Red Hat", "dog (husky)"]
    assert row["size"] == [48, 40] and not row["changed"] and row["findings"] is None and row["focus"] is None
    assert page["rows"][3]["caption"] == ""
    second = opened.told("/rows", start=1, count=2, crops=1)
    assert second["rows"][0]["id"] == row["id"] and [row["name"] for row in second["rows"]] == ["b.png", "sub/c.png"]
    [crop] = second["rows"][0]["crops"]
    left, top, right, bottom = crop["box"]
    assert 0 <= left < right <= 1 and crop["bucket"][0] * crop["bucket"][1] <= 1.25 * 512 * 512
    assert opened.told("/rows", start=99)["rows"] == []


def test_nothing_new_is_told_by_its_mark_alone(opened):
    for path in ("", "/rows", "/tags", "/findings", "/ids"):
        first = opened.get(path)
        again = opened.get(path, {"If-None-Match": first.headers["ETag"]})
        assert (first.status, again.status, again.content) == (200, 304, b""), path
    mark = opened.get("/rows").headers["ETag"]
    opened.done("/operation", line='add "x"')
    assert opened.get("/rows", {"If-None-Match": mark}).status == 200


def test_filters_and_tables(opened):
    ids = opened.ids()
    assert opened.told("/ids", filter='tag:"red hat"')["ids"] == [ids["a.png"], ids["b.png"]]
    assert [row["name"] for row in opened.told("/rows", filter="path:sub", start=1)["rows"]] == ["sub/d.png"]
    assert opened.told("/tags")["tags"][:2] == [["ohwx", 3], ["red hat", 2]]
    chosen = opened.done("/selection", images=[ids["a.png"], ids["b.png"]])
    assert chosen["images"] == 2 and chosen["common"] == ["ohwx", "red hat"]
    assert sorted(chosen["partial"]) == [["dog (husky)", 1], ["smile", 1]]
    refused = opened.get("/ids", filter="tag:")
    assert refused.status == 400 and refused.json["error"].startswith("filter: at character 1")
    assert "needs the pixels" in opened.get("/ids", filter="lint:D030").json["error"]


def test_an_edit_is_previewed_done_undone_and_redone(opened):
    before = opened.captions()
    line = 'rename "red hat" to "hat"'
    preview = opened.done("/preview", line=line)
    assert preview["count"] == 2 and preview["examples"][0]["after"] == "ohwx, hat, smile"
    assert opened.captions() == before, "a preview does nothing"
    done = opened.done("/operation", line=line)
    assert done["changed"] == [opened.ids()["a.png"], opened.ids()["b.png"]]
    assert done["unsaved"] == 2 and done["can_undo"] and done["undo"] == line and done["revision"] == done["edits"] == 1
    assert done.keys() >= STATE and opened.told().keys() >= STATE
    assert opened.captions()["b.png"] == "ohwx, hat, dog (husky)"
    rows = opened.told("/rows")["rows"]
    assert [row["changed"] for row in rows] == [True, True, False, False]
    undone = opened.done("/undo")
    assert undone["unsaved"] == undone["edits"] == 0 and opened.captions() == before
    assert (undone["can_undo"], undone["undo"], undone["can_redo"], undone["redo"]) == (False, None, True, line)
    assert opened.done("/redo")["undo"] == line and opened.captions()["a.png"] == "ohwx, hat, smile"
    assert opened.told("/program") == {"given": "", "added": line, "program": line}
    assert opened.post("/redo").status == 409 and "nothing to redo" in opened.post("/redo").json["error"]
    assert opened.captions() != before and {path.read_text() for path in opened.folder.glob("?.txt")} == {
        CAPTIONS["a.png"], CAPTIONS["b.png"]
    }, "files are as they were"  # fmt: skip


def test_edits_of_a_selection(opened):
    ids = opened.ids()
    done = opened.done("/operation", line='add "blue"', images=[ids["sub/c.png"]])
    assert done["line"] == done["undo"] == 'add "blue" for "sub/c.png"' and done["changed"] == [ids["sub/c.png"]]
    everything = opened.done("/operation", line='add "sky"', images=list(ids.values()))
    assert everything["line"] == 'add "sky"' and len(everything["changed"]) == 4
    for body in ({"line": 'add "x" where tag:sky', "images": [ids["a.png"]]}, {"line": 'add "x"', "images": []}):
        assert opened.post("/operation", **body).status == 400
    assert opened.post("/operation", line='add "x"', images=["0" * 20]).status == 404
    for images in ("all", [1], {"a": 1}, [None], [[ids["a.png"]]]):
        assert opened.post("/operation", line='add "x"', images=images).status in (400, 404)
    assert "no operation" in opened.post("/operation", line="delete all").json["error"]
    assert opened.post("/operation", line=["add"]).status == 400


def test_findings_with_a_click_that_cures_them(opened):
    folder = opened.folder
    (folder / "a.txt").write_text("ohwx, red_hat, red hat, smile, face, hand, day")
    (folder / "b.txt").write_text("ohwx, red hat, dog")
    opened = opened.client.open(folder.name, again=True)
    ids = opened.ids()
    found = [each for each in opened.told("/findings")["findings"] if each["rule"] == "T021"]
    assert {*found[0]["images"]} == {ids["a.png"]} and {each["line"] for each in found} == {"fix T021"}
    assert str(folder) not in str(found)
    row = next(row for row in opened.told("/rows")["rows"] if row["name"] == "a.png")
    assert row["findings"] >= 1 and row["level"] in ("error", "warn", "info")
    cures = opened.told(f"/images/{ids['a.png']}")["cures"]
    assert any(cure["rule"] == "T021" and cure["images"] == [ids["a.png"]] for cure in cures)
    opened.done("/operation", line=found[0]["line"], images=found[0]["images"])
    assert opened.captions()["a.png"] == "ohwx, red hat, smile, face, hand, day"
    assert not [each for each in opened.told("/findings")["findings"] if each["rule"] == "T021"]
    again = opened.done("/operation", line="fix T021")
    assert again["changed"] == [] and "finds nothing of T021" in again["notes"][0]
    opened.done("/undo")
    assert opened.captions()["a.png"].startswith("ohwx, red_hat, red hat")


def test_detail_of_an_image(opened):
    ids = opened.ids()
    opened.done("/operation", line='put trigger "ohwx" first')
    told = opened.told(f"/images/{ids['sub/c.png']}")
    assert told["before"] == "a sentence, ohwx" and told["caption"] == told["shown"] == "ohwx, a sentence"
    assert told["changed"] and told["cures"] is None and len(told["crops"]) == 1


def test_the_same_is_opened_once_and_again_from_the_files(opened):
    opened.done("/operation", line='add "kept"')
    name = opened.folder.name
    assert opened.client.open(name).path == opened.path, "a reload of the page finds its edits"
    assert opened.client.open(name, trigger="ohwx").path != opened.path
    fresh = opened.client.open(name, again=True)
    assert fresh.path != opened.path and "kept" not in fresh.captions()["a.png"]
    assert opened.get().status == 404
    (opened.folder / "a.txt").write_text("changed on disk")
    newer = opened.client.open(name)
    assert newer.captions()["a.png"] == "changed on disk", "nothing was to be lost"
    newer.done("/close")
    assert newer.get().status == 404


def test_a_focus_moves_the_crop_and_can_be_undone(opened):
    image = opened.ids()["a.png"]
    done = opened.done("/focus", image=image, box=[0, 0.25, 0.1234567, 1.0])
    assert done["line"] == 'set focus 0 0.25 0.123457 1 for "a.png"'
    assert (done["unsaved"], done["changed_images"]) == (0, 1), "no file can hold it"
    assert len(done["crops"]) == 1
    assert "set crop to focus" in done["notes"][0], "what has no effect is said"
    [row] = opened.told("/rows", changed=1)["rows"]
    assert row["id"] == image and row["changed"] and row["focus"] == [0, 0.25, 0.123457, 1]
    opened.done("/undo")
    assert opened.told("/rows")["rows"][0]["focus"] is None
    opened.done("/redo")
    opened.done("/focus", image=image, box=None)
    assert opened.told("/rows")["rows"][0]["focus"] is None
    none = ([0, 0, 1], [0, 0, 0, 1], [0.5, 0, 0.2, 1], [0, 0, 1, 1.5], [0, 0, 1, 10**400], [False, 0, 1, 1], "0 0 1 1")
    for box in none:
        assert opened.post("/focus", image=image, box=box).status == 400, box
    assert opened.post("/focus", image="x", box=None).status == 404


def test_masks_are_seen_and_shown(client, opened):
    folder = opened.folder
    levels = Image.linear_gradient("L").resize((48, 40))
    levels.save(folder / "a-masklabel.png")
    opened = client.open(folder.name, again=True)
    rows = {row["name"]: row for row in opened.told("/rows")["rows"]}
    assert [name for name, row in rows.items() if row["mask"]] == ["a.png"]
    shown = opened.get(f"/masks/{rows['a.png']['id']}/96")
    assert shown.headers["Content-Type"] == "image/jpeg"
    seen = np.asarray(Image.open(io.BytesIO(shown.content)).convert("L"), float)
    assert np.abs(seen - np.asarray(levels, float)).mean() < 3
    assert opened.get(f"/masks/{rows['b.png']['id']}/96").status == 404
    opened.post("/close")


def test_completion_from_the_dataset_and_the_users_lists(client, opened):
    place = client.server.base / "user/lora_loom/tags"
    place.mkdir(parents=True, exist_ok=True)
    (place / "mine.csv").write_text('red_hat,0,500,"scarlet_hat"\nhat,0,9000,\n')
    (place / "faulty.csv").write_text("a,b\n")
    try:
        found = client.get("/completions", q="hat", dataset=opened.path.rsplit("/", 1)[1]).json
        assert found["dataset"] == [["red hat", 2]]
        assert [(each["tag"], each["count"]) for each in found["lists"]] == [("hat", 9000), ("red hat", 500)]
        assert found["notes"][0].startswith("faulty.csv, line 1: ")
        [alias] = client.get("/completions", q="SCARLET").json["lists"]
        assert (alias["tag"], alias["alias"]) == ("red hat", "scarlet hat")
        assert len(client.get("/completions", q="a", most=1).json["lists"]) == 1
        assert client.get("/completions", q="a", most=101).status == 400
    finally:
        for path in place.glob("*.csv"):
            path.unlink()


# -- writing


def test_captions_are_written_with_a_backup(opened):
    before = {path.name: path.read_bytes() for path in opened.folder.rglob("*.txt")}
    opened.done("/operation", line='rename "red hat" to "hat"')
    opened.done("/operation", line='set caption "new" where path:"sub/d"')
    done = opened.done("/write")
    ids = opened.ids()
    assert sorted(done["written"]) == sorted([ids["a.png"], ids["b.png"], ids["sub/d.png"]]) and done["refused"] == []
    assert done["unsaved"] == 0 and not any(row["changed"] for row in opened.told("/rows")["rows"])
    assert (opened.folder / "a.txt").read_text() == "ohwx, hat, smile"
    assert (opened.folder / "sub/d.txt").read_text().strip() == "new"
    assert (opened.folder / "sub/c.txt").read_bytes() == before["c.txt"]
    [backup] = done["backups"]
    root, _, place = backup.partition("/")
    assert root == "datasets" and place.startswith(f"{opened.folder.name}/.lora_loom/captions-")
    kept = opened.client.server.base / "datasets" / place
    assert (kept / "a.txt").read_bytes() == before["a.txt"] and (kept / "b.txt").read_bytes() == before["b.txt"]
    assert opened.client.open(opened.folder.name).path == opened.path, "what we wrote ourselves is no news"
    opened.done("/undo")
    opened.done("/undo")
    assert opened.told()["unsaved"] == 3, "undone here, not yet in the files"
    opened.done("/write", images=[ids["b.png"]])
    assert (opened.folder / "b.txt").read_bytes() == before["b.txt"]
    assert (opened.folder / "a.txt").read_text() == "ohwx, hat, smile" and opened.told()["unsaved"] == 2


def test_what_changed_on_disk_is_not_overwritten(opened):
    opened.done("/operation", line='add "late"')
    (opened.folder / "a.txt").write_text("somebody else's work")
    (opened.folder / "sub/d.txt").write_text("it was not there")
    answer = opened.post("/write")
    ids = opened.ids()
    assert answer.status == 409 and "captions of 2 of the images were not written" in answer.json["error"]
    refused = {image: each["reason"] for each in answer.json["refused"] for image in each["images"]}
    assert refused.keys() == {ids["a.png"], ids["sub/d.png"]} and "a.txt" in refused[ids["a.png"]]
    assert sorted(answer.json["written"]) == sorted([ids["b.png"], ids["sub/c.png"]])
    assert (opened.folder / "a.txt").read_text() == "somebody else's work"
    assert (opened.folder / "sub/d.txt").read_text() == "it was not there"
    assert (opened.folder / "b.txt").read_text() == CAPTIONS["b.png"] + ", late"
    assert str(opened.client.server.base) not in answer.content.decode()
    changed = [row["name"] for row in opened.told("/rows")["rows"] if row["changed"]]
    assert changed == ["a.png", "sub/d.png"], "still unwritten"
    assert opened.client.open(opened.folder.name).path == opened.path, "unwritten edits are not dropped"


def test_nothing_to_write_writes_nothing(opened):
    before = tree(opened.folder)
    done = opened.done("/write")
    assert done["written"] == [] and done["files"] == 0 and tree(opened.folder) == before


# -- datasets of the graph


def test_what_a_node_has_had_is_opened_with_its_program(client, opened):
    name = opened.folder.name
    inputs = {"root": "datasets", "folder": name, "resolution": 64, "bucket_step": 16, "trigger": "ohwx", "lint": "off"}
    prompt = {
        "71": {"class_type": "LoomDatasetLoader", "inputs": inputs},
        "72": {"class_type": "PreviewAny", "inputs": {"source": ["71", 1]}},
    }
    client.server.run(prompt)
    assert {"node": "71", "name": f"datasets/{name}", "images": 4} in client.get("/datasets").json["nodes"]
    given = 'add "sky" where path:sub\n# words\nadd "x" where tag:nowhere\n'
    told = client.post("/datasets", {"node": "71", "program": given}).json
    assert told["keeps"] == "program" and told["unsaved"] == 2 and not told["can_undo"] and told["edits"] == 0
    assert told["concepts"][0]["trigger"] == "ohwx"
    mine = Dataset(client, told["id"])
    assert mine.told("/program") == {"given": given, "added": "", "program": given}, "to the letter"
    added = mine.done("/operation", line='remove "smile"')
    assert added["edits"] == 1 and added["undo"] == 'remove "smile"'
    now = mine.told("/program")
    assert now == {"given": given, "added": 'remove "smile"', "program": given + 'remove "smile"'}
    refused = mine.post("/write")
    assert refused.status == 409 and "kept in its program" in refused.json["error"]
    for program in (given, now["program"]):
        assert client.post("/datasets", {"node": "71", "program": program}).json["id"] == told["id"]
    assert mine.done("/undo")["can_undo"] is False and mine.post("/undo").status == 409
    assert mine.captions()["sub/d.png"] == "sky", "what was given stays"
    faulty = client.post("/datasets", {"node": "71", "program": 'add "a"\nad x'})
    assert faulty.status == 400 and faulty.json["error"].startswith("program, line 2: ")
    untold = client.post("/datasets", {"node": "71", "program": 'add "a"\n\nadd "b" where tokens:>1'})
    assert untold.status == 400 and untold.json["error"].startswith("program, line 3: tokens: ")
    other = Dataset(client, client.post("/datasets", {"node": "71", "program": 'add "y"'}).json["id"])
    assert other.path != mine.path and mine.get().status == 404, "the widget says something else now"
    assert other.captions()["sub/d.png"] == "y"
    fresh = client.post("/datasets", {"node": "71", "program": 'add "y"', "again": True}).json
    assert other.get().status == 404
    client.post(f"/datasets/{fresh['id']}/close")


def test_a_selection_makes_no_long_answers(client, opened):
    """The ids of a selection stand in the line; the page knows them."""
    names = {f"{'a-long-name-' * 8}{index}.png": "cat" for index in range(30)}
    put(opened.folder, names)
    opened = client.open(opened.folder.name, again=True)
    ids = [*opened.ids().values()][1:]
    done = opened.done("/operation", line='add "x"', images=ids)
    preview = opened.done("/preview", line='add "y"', images=ids)
    undone = opened.done("/undo")
    for text in (done["line"], done["undo"], preview["line"], undone["line"], undone["redo"], opened.told()["redo"]):
        assert len(text) <= 300 and text.startswith('add "') and text.endswith("…")
    assert len(opened.done("/redo")["changed"]) == len(ids)
    assert len(opened.told("/program")["added"]) > 3000
    opened.post("/close")


def test_only_what_has_changed(opened):
    ids = opened.ids()
    for path in ("/ids", "/rows"):
        assert not opened.told(path, changed=1)[path[1:]]
    opened.done("/operation", line='add "new" where tag:"red hat"')
    opened.done("/focus", image=ids["sub/d.png"], box=[0, 0, 0.5, 0.5])
    assert opened.told("/ids", changed=1)["ids"] == [ids["a.png"], ids["b.png"], ids["sub/d.png"]]
    page = opened.told("/rows", changed=1, filter="NOT tag:smile", start=1)
    assert page["total"] == 2 and [row["name"] for row in page["rows"]] == ["sub/d.png"]
    opened.done("/write", images=[ids["a.png"]])
    assert opened.told("/ids", changed=1)["ids"] == [ids["b.png"], ids["sub/d.png"]]
    assert opened.get("/ids", changed=2).status == opened.get("/rows", changed="yes").status == 400


def test_a_dry_run_of_writing(opened):
    ids, before = opened.ids(), tree(opened.folder)
    assert opened.done("/write", dry_run=True) == {"files": 0, "images": 0, "refused": []}
    opened.done("/operation", line='add "late"')
    assert opened.done("/write", dry_run=True) == {"files": 4, "images": 4, "refused": []}
    assert opened.done("/write", dry_run=True, images=[ids["b.png"]])["images"] == 1
    assert tree(opened.folder) == before and opened.told()["unsaved"] == 4, "nothing was written"
    (opened.folder / "a.txt").write_text("somebody else's work")
    told = opened.done("/write", dry_run=True)
    assert told["files"] == told["images"] == 3
    [refused] = told["refused"]
    assert refused["images"] == [ids["a.png"]] and "a.txt was changed since it was read" in refused["reason"]
    assert opened.done("/write", images=[ids["b.png"]])["unsaved"] == 3
