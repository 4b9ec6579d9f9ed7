"""One way in: what a path is taken for, that nothing outside can be reached, and when a dataset has changed."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image

from lora_loom.training.dataset.model import Access, Concept, DatasetError
from lora_loom.training.dataset.opening import dataset_state, open_dataset

PLAIN = Concept()


def put(path, caption="a cat"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), "green").save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)


def inside(root):
    """What the host says of one registered folder."""
    real = os.path.realpath(root)
    return Access(
        lambda path: os.path.commonpath([real, os.path.realpath(path)]) == real,
        lambda path: f"register {path}",
    )


def toml(**keys):
    values = {"image_dir": "cats"} | keys
    lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
    return f"[[datasets]]\n[[datasets.subsets]]\n{lines}\n"


@pytest.fixture
def data(tmp_path):
    """A registered folder, a secret beside it, and links that lead there."""
    put(tmp_path / "data/cats/a.png")
    put(tmp_path / "data-secret/a.png", "secret words")
    (tmp_path / "data-secret/list.json").write_text('{"a.png": "secret words"}')
    (tmp_path / "data/link").symlink_to(tmp_path / "data-secret")
    for name in ("a.png", "list.json"):
        (tmp_path / f"data/linked-{name}").symlink_to(tmp_path / f"data-secret/{name}")
    return tmp_path / "data"


# ---------------------------------------------------------------- what a path is taken for


def test_folders_lists_and_configurations(data):
    (data / "list.json").write_text('{"cats/a.png": "from the list"}')
    (data / "list.jsonl").write_text('{"image_path": "cats/a.png", "caption": "from the lines"}')
    (data / "set.toml").write_text(toml())
    (data / "set.json").write_text(json.dumps({"datasets": [{"subsets": [{"image_dir": "cats"}]}]}))
    (data / "folder.toml").mkdir()
    put(data / "folder.toml/b.png", "a folder")
    captions = {
        name: [sample.caption for sample in open_dataset(data / name, PLAIN, inside(data)).samples]
        for name in ("cats", "list.json", "list.jsonl", "set.toml", "set.json", "folder.toml")
    }
    assert captions == {
        "cats": ["a cat"],
        "list.json": ["from the list"],
        "list.jsonl": ["from the lines"],
        "set.toml": ["a cat"],
        "set.json": ["a cat"],
        "folder.toml": ["a folder"],
    }
    with pytest.raises(DatasetError, match=r"set\.toml cannot be read \(No such file or directory\)"):
        open_dataset(data / "gone" / "set.toml", PLAIN, inside(data))


# ---------------------------------------------------------------- nothing outside can be reached

ESCAPES = {
    "..": "leads outside the dataset folders; register ",
    "../data-secret": "leads outside",
    "cats/../../data-secret": "leads outside",
    "..\\data-secret": "leads outside",
    "{secret}": "leads outside",
    "{secret}/": "leads outside",
    "link": "leads outside",
    "link/": "leads outside",
    "link/..": "leads outside",
    "/": "leads outside",
    "/proc/self/cwd": "leads outside",
    "//host/share": "is a network path",
    "\\\\host\\share": "is a network path",
    "\\\\?\\C:\\x": "is a network path",
    "\\/host/share": "is a network path",
    "C:\\x": "is a path of another machine",
    "c:x": "is a path of another machine",
    "cats\0": "is no path",
    "\0": "is no path",
    "": "the path is empty",
    " ": "the path is empty",
    "x" * 5000: "is no path",
    "x" * 300: "there is no f",
    "~": "~ is not replaced by a home folder",
    "~root": "~ is not replaced by a home folder",
    "%2e%2e": "there is no f",
    "%2e%2e%2fdata-secret": "there is no f",
    "．．": "there is no f",
    "CATS": "there is no f",
    "$HOME": "there is no f",
    "file:///etc": "there is no f",
    "cats\nx": "there is no f",
}


def refused(path, access):
    with pytest.raises(DatasetError) as caught:
        open_dataset(path, PLAIN, access)
    message = str(caught.value)
    assert "secret words" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_folders_in_a_configuration_lead_nowhere_else(data, name):
    text = name.format(secret=data.parent / "data-secret") if "{" in name else name
    for key in ("image_dir", "conditioning_data_dir"):
        (data / "set.toml").write_text(toml(**{key: text}), encoding="utf-8")
        message = refused(data / "set.toml", inside(data))
        assert f"datasets[0].subsets[0].{key}: " in message and ESCAPES[name] in message


@pytest.mark.parametrize("name", ESCAPES, ids=ascii)
def test_files_in_lists_and_configurations_lead_nowhere_else(data, name):
    text = name.format(secret=data.parent / "data-secret") if "{" in name else name
    image = text if text.strip() in ("", "~") or "\0" in text else f"{text.rstrip('/')}/a.png"
    entries = {
        "path": {image: {"caption": "x"}},
        "mask": {"cats/a.png": {"caption": "x", "mask": image}},
    }
    for content in entries.values():
        (data / "list.json").write_text(json.dumps(content))
        assert ESCAPES[name] in refused(data / "list.json", inside(data))
    meta = image.replace("a.png", "list.json")
    (data / "set.toml").write_text(toml(metadata_file=meta), encoding="utf-8")
    message = refused(data / "set.toml", inside(data))
    assert "datasets[0].subsets[0].metadata_file: " in message and ESCAPES[name] in message


@pytest.mark.parametrize("name", ["linked-a.png", "../data-secret/a.png", "{secret}/a.png", "linked-a"])
def test_linked_files_in_lists_are_not_read(data, name):
    text = name.format(secret=data.parent / "data-secret")
    (data / "list.json").write_text(json.dumps({text: "x"}))
    message = refused(data / "list.json", inside(data))
    assert "outside the dataset folders" in message and f"register {data.parent / 'data-secret'}" in message
    assert open_dataset(data / "list.json", PLAIN, inside(data.parent)).samples[0].caption == "x"


def test_linked_lists_are_not_read(data):
    (data / "set.toml").write_text(toml(metadata_file="linked-list.json"))
    assert "links that lead outside the dataset folders" in refused(data / "set.toml", inside(data))
    assert "is outside the dataset folders; register " in refused(data / "linked-list.json", inside(data))
    assert "is outside the dataset folders; register " in refused(data / "link", inside(data))


def test_other_registered_folders_can_be_named(data):
    for text in ("../data-secret", str(data.parent / "data-secret"), "link", "./cats/../link"):
        (data / "set.toml").write_text(toml(image_dir=text))
        [sample] = open_dataset(data / "set.toml", PLAIN, inside(data.parent)).samples
        assert (sample.id, sample.caption) == ("data-secret/a.png", "secret words")


def test_nothing_of_the_file_system_outside_is_told(data):
    """What is there and what is not give the same answer."""
    answers = set()
    for name in ("data-secret", "data-nothing"):
        (data / "set.toml").write_text(toml(image_dir=f"../{name}"))
        answers.add(refused(data / "set.toml", inside(data)).replace(name, "x"))
        (data / "list.json").write_text(json.dumps({f"../{name}/a.png": "x"}))
        answers.add(refused(data / "list.json", inside(data)).replace(name, "x"))
    assert len(answers) == 2


# ---------------------------------------------------------------- when a dataset has changed


def everything(root):
    """A folder with a mask, a list beside it, and a configuration that uses both."""
    for name in ("cats/a.png", "dogs/b.png"):
        put(root / name)
    for name in ("cats/a-masklabel.png", "masks/b.png"):
        put(root / name, None)
    (root / "dogs/list.jsonl").write_text('{"image_path": "b", "caption": "x"}')
    second = '\n[[datasets.subsets]]\nmetadata_file = "dogs/list.jsonl"\nconditioning_data_dir = "masks"\n'
    (root / "set.toml").write_text(toml() + second)
    for path in [*root.rglob("*")]:
        os.utime(path, ns=(10**18, 10**18))


READ = {
    "cats": {"cats/a.png", "cats/a.txt", "cats/a-masklabel.png"},
    "dogs/list.jsonl": {"dogs/list.jsonl", "dogs/b.png"},
}
READ["set.toml"] = {"set.toml", *READ["cats"], *READ["dogs/list.jsonl"], "masks/b.png"}


@pytest.mark.parametrize("source", READ)
def test_the_state_follows_what_is_read_and_nothing_else(tmp_path, source):
    everything(tmp_path)
    access = inside(tmp_path)
    fingerprint = open_dataset(tmp_path / source, PLAIN, access).fingerprint()
    first = dataset_state(tmp_path / source, access)
    states = {first}
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert set(files) > READ[source]
    for name in files:
        content = (tmp_path / name).read_bytes()
        for changed in ((content, 10**18 + 1), (content + b" ", 10**18)):
            (tmp_path / name).write_bytes(changed[0])
            os.utime(tmp_path / name, ns=(10**18, changed[1]))
            state = dataset_state(tmp_path / source, access)
            assert (state != first) == (name in READ[source]), name
            assert name not in READ[source] or state not in states
            states.add(state)
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
        assert dataset_state(tmp_path / source, access) == first
    (tmp_path / "cats/readme.md").write_text("nothing to do with it")
    (tmp_path / "cats/notes.txt").write_text("nor this")
    assert dataset_state(tmp_path / source, access) == first
    assert open_dataset(tmp_path / source, PLAIN, access).fingerprint() == fingerprint


def test_the_state_follows_names(data):
    access = inside(data)
    states = [dataset_state(data / "cats", access)]
    for change in (
        lambda: put(data / "cats/b.png"),
        lambda: (data / "cats/b.png").rename(data / "cats/c.png"),
        lambda: (data / "cats/c.png").rename(data / "cats/b.png"),
        lambda: (data / "cats/b.txt").unlink(),
        lambda: (data / "cats").rename(data / "dogs"),
        lambda: (data / "dogs").rename(data / "cats"),
        lambda: (data / "cats/phone.heic").write_bytes(b""),
        lambda: (data / "cats/clip.mp4").write_bytes(b""),
    ):
        change()
        states.append(dataset_state(data / "cats", access))
    assert states[3] == states[1] and states[6] == states[4]
    assert len(set(states)) == len(states) - 2


@pytest.mark.parametrize(
    "name, content",
    [
        ("gone", None),
        ("gone.toml", None),
        ("gone.json", None),
        ("a.toml", b"\xff"),
        ("a.toml", b"x = ["),
        ("a.toml", b"[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'gone'"),
        ("a.toml", b"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '../data-secret'"),
        ("a.toml", b"[[datasets]]\n[[datasets.subsets]]\nmetadata_file = 'gone.json'"),
        ("a.json", b"\xff"),
        ("a.json", b"[" * 100_000),
        ("a.json", b'{"gone.png": 1}'),
        ("a.json", b'{"../data-secret/a.png": "x"}'),
        ("a.jsonl", b"{}\n"),
        ("linked-a.png", None),
        ("link", None),
    ],
)
def test_the_state_never_raises(data, name, content):
    if content is not None:
        (data / name).write_bytes(content)
    first = dataset_state(data / name, inside(data))
    assert len(first) == 64
    if content is not None:
        (data / name).write_bytes(content + b" ")
        assert dataset_state(data / name, inside(data)) != first
    before = dataset_state(data / name, inside(data))
    put(data.parent / "data-secret/b.png")
    os.utime(data.parent / "data-secret/a.png", ns=(1, 1))
    assert dataset_state(data / name, inside(data)) == before, "what may not be read has no state"


def test_an_error_in_one_subset_hides_no_change_in_another(data):
    put(data / "dogs/b.png")
    (data / "set.toml").write_text(toml(image_dir="gone") + '[[datasets.subsets]]\nimage_dir = "dogs"\n')
    first = dataset_state(data / "set.toml", inside(data))
    put(data / "dogs/c.png")
    assert dataset_state(data / "set.toml", inside(data)) != first


def test_options_that_fit_only_this_loader_hide_no_change(data):
    """The state asks nothing of the options: a step larger than the usual resolution is fine for a larger one."""
    (data / "set.toml").write_text(toml().replace("[[datasets]]", "[[datasets]]\nbucket_reso_steps = 640"))
    large = Concept(resolutions=((1280, 1280),))
    assert open_dataset(data / "set.toml", large, inside(data)).concepts[0].buckets.step == 640
    first = dataset_state(data / "set.toml", inside(data))
    (data / "cats/a.txt").write_text("a cat, edited")
    assert dataset_state(data / "set.toml", inside(data)) != first


def test_nothing_is_left_open(data):
    (data / "set.toml").write_text(toml())
    (data / "cats/broken.png").write_bytes(b"\x89PNG")
    (data / "cats/broken.txt").write_text("x")
    before = set(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else set()
    for _ in range(3):
        open_dataset(data / "set.toml", PLAIN, inside(data), if_unreadable="skip")
        dataset_state(data / "set.toml", inside(data))
    assert len(set(os.listdir("/proc/self/fd")) if before else set()) == len(before)
