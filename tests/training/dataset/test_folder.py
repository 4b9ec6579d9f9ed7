"""Folders of captioned pictures: what is taken, what goes with what, what is refused, and what kohya's names mean."""

import os
import re
import struct
import threading
import zlib
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from lora_loom.training.dataset import reading
from lora_loom.training.dataset.describe import describe
from lora_loom.training.dataset.images import IMAGE_TYPES, image_types
from lora_loom.training.dataset.model import Access, CaptionOptions, Concept, DatasetError, ImageOptions
from lora_loom.training.dataset.opening import open_dataset

SMALL = Concept(resolutions=((64, 64),))
WITH_TRIGGER = Concept(captions=CaptionOptions(trigger="ohwx"))
ANYWHERE = Access(lambda path: True, lambda path: "")
NOWHERE_ELSE = Access(lambda path: path.name == "data", lambda path: f"name {path} in the host's settings")


def put(folder, name, caption="a cat", size=(64, 48), **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "green").save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def opened(folder, defaults=SMALL, access=ANYWHERE, **options):
    return open_dataset(folder, defaults, access, **options)


def captions(dataset):
    return {sample.id: sample.caption for sample in dataset.samples}


def refuses(folder, *parts, defaults=SMALL, access=ANYWHERE, **options):
    with pytest.raises(DatasetError) as caught:
        opened(folder, defaults, access, **options)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- what is taken


def test_pictures_are_sorted_by_path_and_everything_else_is_ignored(tmp_path):
    names = ["b/2.png", "b/10.jpg", "a.webp", "Z.png", "ä ö/猫.png", "a/deep/er/x.y.png", "[1]/x.png", "b/a;#'%20.png"]
    for name in names:
        put(tmp_path, name)
    for name in (".hidden.png", ".cache/x.png", "b/.thumbs/x.png", "b/._2.png"):
        put(tmp_path, name, caption=None, format="png")
    for name in ("readme.txt", "metadata.json", "b/2.npz", "b/2.png.bak", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    dataset = opened(tmp_path)
    assert [sample.id for sample in dataset.samples] == sorted(names)
    assert dataset.notes == () and dataset.source == str(tmp_path)
    [concept] = dataset.concepts
    assert (concept.name, concept.repeats, concept.resolutions) == (tmp_path.name, 1, ((64, 64),))
    sample = dataset.samples[0]
    path, status = tmp_path / sample.id, (tmp_path / sample.id).stat()
    assert (sample.picture.path, sample.picture.size) == (str(path), status.st_size)
    assert sample.picture.mtime_ns == status.st_mtime_ns and sample.size == (64, 48)
    assert sample.caption_path == str(path.with_suffix(".txt")) and (sample.mask, sample.focus) == (None, None)


@pytest.mark.parametrize("kind", IMAGE_TYPES)
def test_every_type_is_taken_whatever_its_case(tmp_path, kind):
    name = f"a{kind.upper()}"
    if kind in image_types():
        put(tmp_path, name, format=Image.registered_extensions()[kind])
        assert captions(opened(tmp_path)) == {name: "a cat"}
    else:  # Pillow is built without the codec: then the type is refused by name
        (tmp_path / name).write_bytes(b"")
        refuses(tmp_path, f"images of unsupported types only ({name})")


def test_captions(tmp_path):
    put(tmp_path, "bom.png", caption=b"\xef\xbb\xbf  a c\xc3\xa4t, \xe7\x8c\xab\r\n\n")
    put(tmp_path, "lines.png", caption="first\r\nsecond\n")
    put(tmp_path, "empty.png", caption=" \n")
    for name, text in {"upper.TXT": "shouting", "kohya.caption": "as kohya calls it", "twice.caption": "same"}.items():
        put(tmp_path, f"{name.split('.')[0]}.png", caption=None)
        (tmp_path / name).write_text(text)
    (tmp_path / "twice.txt").write_text("same\n")
    dataset = opened(tmp_path)
    assert captions(dataset) == {
        "bom.png": "a cät, 猫",
        "empty.png": "",
        "kohya.png": "as kohya calls it",
        "lines.png": "first\nsecond",
        "twice.png": "same",
        "upper.png": "shouting",
    }
    assert "empty captions, trained without a prompt: empty.png" in describe(dataset)
    (tmp_path / "twice.txt").write_text("another")
    message = refuses(tmp_path, "twice.png has different captions in ", "remove one of them")
    assert "twice.txt" in message and "twice.caption" in message


def test_a_damaged_file_is_not_asked_for_a_caption(tmp_path):
    put(tmp_path, "good.png")
    (tmp_path / "torn.png").write_bytes(b"")
    assert "caption" not in refuses(tmp_path, "torn.png is no readable image")
    assert [sample.id for sample in opened(tmp_path, if_unreadable="skip").samples] == ["good.png"]
    put(tmp_path, "bare.png", caption=None)
    refuses(tmp_path, "1 image of 2 without a caption: bare.png", if_unreadable="skip")


def test_a_trigger_stands_in_for_missing_captions(tmp_path):
    put(tmp_path, "bare.png", caption=None)
    put(tmp_path, "blank.png", caption="")
    put(tmp_path, "told.png")
    dataset = opened(tmp_path, WITH_TRIGGER)
    assert captions(dataset) == {"bare.png": "", "blank.png": "", "told.png": "a cat"}
    assert dataset.notes == ("without a caption file, shown with the trigger alone: bare.png",)
    assert [sample.caption_path is None for sample in dataset.samples] == [True, False, False]


def test_lesser_things_become_notes(tmp_path):
    put(tmp_path, "data/a.png")
    put(tmp_path, "other/b.png")
    (tmp_path / "data/phone.HEIC").write_bytes(b"")
    (tmp_path / "data/more").symlink_to(tmp_path / "other")
    dataset = opened(tmp_path / "data")
    assert [sample.id for sample in dataset.samples] == ["a.png"]
    assert dataset.notes == (
        "left out, no supported type: phone.HEIC; convert to png or jpg to use them",
        "left out, folders that are links: more; copy them in to use them",
    )


# ---------------------------------------------------------------- masks and other companions


@pytest.mark.parametrize("mask", ["a-masklabel.png", "masks/a.png", "Mask/a.jpg"])
def test_masks_are_never_training_pictures(tmp_path, mask):
    put(tmp_path, "cats/a.png")
    put(tmp_path, "cats/b.png")
    path = put(tmp_path, f"cats/{mask}", caption=None)
    dataset = opened(tmp_path)
    assert [sample.id for sample in dataset.samples] == ["cats/a.png", "cats/b.png"]
    first, second = dataset.samples
    assert first.mask is not None and (first.mask.path, first.mask.header.format) == (
        str(path),
        "JPEG" if mask.endswith("jpg") else "PNG",
    )
    assert second.mask is None
    folder = os.path.dirname(mask)
    expected = f"cats/{folder} is taken as masks of the pictures beside it (1)"
    assert dataset.notes == ((expected,) if folder else ())


def test_a_concept_may_be_called_masks_or_control(tmp_path):
    for name in ("masks/venice.png", "control/room.png", "other.png"):
        put(tmp_path, name)
    put(tmp_path, "same/1.png")
    put(tmp_path, "same/masks/1.png", caption="a mask that has a caption is a picture")
    names = [sample.id for sample in opened(tmp_path).samples]
    assert names == ["control/room.png", "masks/venice.png", "other.png", "same/1.png", "same/masks/1.png"]


def test_masks_that_do_not_fit(tmp_path):
    put(tmp_path, "a.png", size=(64, 48))
    put(tmp_path, "a-masklabel.png", caption=None, size=(48, 64))
    refuses(tmp_path, "a.png is 64×48 and its mask ", "a-masklabel.png 48×64: give the mask the shape of the picture")
    put(tmp_path, "a-masklabel.png", caption=None, size=(640, 480))
    assert opened(tmp_path).samples[0].mask.size > 0
    put(tmp_path, "mask/a.png", caption=None)
    refuses(tmp_path, "pictures with two masks each: ", "remove one of each")
    (tmp_path / "mask/a.png").rename(tmp_path / "gone-masklabel.png")
    assert opened(tmp_path).notes == ("left out, masks without a picture: gone-masklabel.png",)


@pytest.mark.parametrize("name", ["a-condlabel.png", "control/a.png", "Conditioning/a.jpg", "_controls/a.png"])
def test_condition_images_are_refused_by_name(tmp_path, name):
    put(tmp_path, "a.png")
    put(tmp_path, name, caption=None)
    message = refuses(tmp_path, "control", "move ")
    assert name.split("/")[0] in message


@pytest.mark.parametrize("kind", ["mp4", "webm", "mkv", "MOV", "avi", "m4v"])
def test_videos_are_refused_by_name(tmp_path, kind):
    put(tmp_path, "a.png")
    (tmp_path / f"clip.{kind}").write_bytes(b"")
    refuses(tmp_path, f"videos cannot be trained on: clip.{kind}; save single frames as images")


def test_animated_pictures_are_pictures(tmp_path):
    frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp"):
        put(tmp_path, f"{kind}.{kind}")
        frames[0].save(tmp_path / f"{kind}.{kind}", save_all=True, append_images=frames[1:])
    assert [sample.picture.header.animated for sample in opened(tmp_path).samples] == [True, True]


# ---------------------------------------------------------------- kohya's folders


def test_kohya_folders(tmp_path):
    put(tmp_path, "10_sks girl/a.png", caption=None)
    put(tmp_path, "10_sks girl/deep/b.png")
    put(tmp_path, "3_a_b/c.png", caption=None)
    put(tmp_path, "0_unused/d.mp4.png", caption=None)
    put(tmp_path, "20240131_trip/e.png")
    put(tmp_path, "2024_trip/h.png")
    put(tmp_path, "5/f.png")
    put(tmp_path, "g.png")
    dataset = opened(tmp_path)
    assert [(concept.name, concept.repeats) for concept in dataset.concepts] == [
        (tmp_path.name, 1),
        ("10_sks girl", 10),
        ("3_a_b", 3),
    ]
    assert {sample.id: sample.concept for sample in dataset.samples} == {
        "10_sks girl/a.png": 1,
        "10_sks girl/deep/b.png": 1,
        "3_a_b/c.png": 2,
        "20240131_trip/e.png": 0,
        "2024_trip/h.png": 0,
        "5/f.png": 0,
        "g.png": 0,
    }
    texts = captions(dataset)
    assert texts["10_sks girl/a.png"] == "sks girl" and texts["10_sks girl/deep/b.png"] == "a cat"
    assert texts["3_a_b/c.png"] == "a_b"
    assert dataset.notes == (
        "left out, 0 repeats: 0_unused",
        "not called like 10_name, so shown as often as the loader says: 20240131_trip, 2024_trip, 5, g.png",
        "without a caption file, captioned 'sks girl': 10_sks girl/a.png",
        "without a caption file, captioned 'a_b': 3_a_b/c.png",
    )


def test_the_chosen_folder_may_be_called_so_itself(tmp_path):
    put(tmp_path, "7_cat/a.png", caption=None)
    dataset = opened(tmp_path / "7_cat")
    assert [(concept.name, concept.repeats) for concept in dataset.concepts] == [("7_cat", 7)]
    assert captions(dataset) == {"a.png": "cat"}
    assert opened(tmp_path).concepts == dataset.concepts


def test_plain_folders_mean_nothing(tmp_path):
    put(tmp_path, "10_cat/a.png")
    put(tmp_path, "0_cat/b.png")
    defaults = Concept(repeats=Fraction(5, 2), name="cats")
    dataset = opened(tmp_path, defaults, subfolders="plain")
    assert dataset.concepts == (defaults,) and len(dataset.samples) == 2 and dataset.notes == ()
    put(tmp_path, "10_cat/bare.png", caption=None)
    refuses(tmp_path, "1 image of 3 without a caption: 10_cat/bare.png", subfolders="plain")


def test_names_of_folders_go_before_the_loader_and_say_so(tmp_path):
    put(tmp_path, "10_cat/a.png")
    put(tmp_path, "more/b.png")
    assert "repeats has no effect on 10_cat: its name sets the repeats" in opened(tmp_path, Concept(repeats=3)).notes
    dataset = opened(tmp_path, Concept(samples_per_epoch=40, kind="regularisation"))
    assert [(c.samples_per_epoch, c.repeats, c.kind) for c in dataset.concepts] == [
        (40, 1, "regularisation"),
        (None, 10, "regularisation"),
    ]
    assert "samples_per_epoch has no effect on 10_cat: its name sets the repeats" in dataset.notes
    refuses(tmp_path, "subfolders is 'flat', expected one of repeats, plain", subfolders="flat")
    for name in ("10_cat", "more"):
        (tmp_path / name).rename(tmp_path / f"0_{name}")
    refuses(tmp_path, "nothing but 0 repeats: 0_10_cat, 0_more; rename the folder")


def test_folders_that_are_too_deep_to_set_repeats_are_named(tmp_path):
    put(tmp_path, "img/10_cat/a.png")
    put(tmp_path, "img/b.png")
    assert [concept.repeats for concept in opened(tmp_path).concepts] == [1]
    [note] = opened(tmp_path).notes
    assert "these set nothing: img/10_cat; choose the folder around them" in note
    assert opened(tmp_path, subfolders="plain").notes == ()


def test_focus_boxes_in_names_count_where_they_are_asked_for(tmp_path):
    put(tmp_path, "cat_32_24_16_12.png", caption=None)
    (tmp_path / "cat.txt").write_text("a cat")  # of the picture that the face was found in
    for images in (ImageOptions(crop="focus"), ImageOptions(zoom=(1.0, 2.0))):
        [sample] = opened(tmp_path, Concept(images=images)).samples
        assert sample.focus == (0.375, 0.375, 0.625, 0.625) and sample.caption == "a cat"
    assert opened(tmp_path).samples[0].focus is None, "four numbers may be a date"
    put(tmp_path, "cat_32_24_16_12.png", caption="a face")
    assert captions(opened(tmp_path)) == {"cat_32_24_16_12.png": "a face"}


# ---------------------------------------------------------------- what is refused


def test_folders_without_images(tmp_path):
    refuses(tmp_path / "absent", "absent cannot be opened", "does it exist")
    refuses(tmp_path, str(tmp_path), "has no images: put images (png, jpg,", "each with a caption in a .txt file")
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path, "has no images")
    for name in ("a.heic", "b.psd"):
        (tmp_path / name).write_bytes(b"")
    refuses(tmp_path, "images of unsupported types only (a.heic, b.psd): convert them to one of png, jpg")
    refuses(tmp_path / "notes.txt", "is no dataset; choose a folder, or a .toml, .json, .jsonl file")


def test_images_without_a_caption(tmp_path):
    for index in range(8):
        put(tmp_path, f"{index}.png", caption="x" if index == 0 else None)
    message = refuses(tmp_path, "7 images of 8 without a caption: 1.png, 2.png, 3.png, 4.png, 5.png and 2 more")
    assert message.endswith("write each caption into a text file of the same name, e.g. 1.txt, or set a trigger")
    regularisation = Concept(kind="regularisation")
    refuses(tmp_path, "or give the class (class_tokens, or a folder called 1_person)", defaults=regularisation)


def test_images_that_share_a_caption_or_a_mask(tmp_path):
    put(tmp_path, "cats/a.png")
    put(tmp_path, "cats/a.jpg")
    put(tmp_path, "dogs/a.jpg")
    refuses(tmp_path, "share one caption file or mask: cats/a.jpg and cats/a.png; rename or remove one of each")
    (tmp_path / "cats/a.txt").unlink()
    (tmp_path / "cats").rename(tmp_path / "1_cats")
    assert captions(opened(tmp_path)) == {"1_cats/a.jpg": "cats", "1_cats/a.png": "cats", "dogs/a.jpg": "a cat"}


def broken(folder):
    """Six pictures; one is fine, five are not, each in another way."""
    for name in ("fine.png", "text.png", "empty.jpg", "short.png"):
        put(folder, name)
    (folder / "text.png").write_text("<html>not found</html>")
    (folder / "empty.jpg").write_bytes(b"")
    data = (folder / "short.png").read_bytes()
    (folder / "short.png").write_bytes(data[: len(data) * 2 // 3])
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "broken.txt").write_bytes("à".encode("utf-16"))
    put(folder, "latin.png", caption="façade".encode("latin-1"))
    return ("text.png", "empty.jpg", "short.png", "broken.png")


def test_unreadable_files_are_named_together(tmp_path):
    names = broken(tmp_path)
    message = refuses(tmp_path, "5 files cannot be used:", "save it again or remove it", "save it as UTF-8")
    for name in names:
        assert re.search(rf"^{name} is no readable image \(.+\)", message, re.MULTILINE)
    assert "latin.txt is not UTF-8 text (byte 2)" in message
    assert "fine" not in message


def test_unreadable_files_can_be_left_out(tmp_path):
    names = broken(tmp_path)
    dataset = opened(tmp_path, if_unreadable="skip")
    assert [sample.id for sample in dataset.samples] == ["fine.png"]
    notes = "\n".join(dataset.notes)
    assert len(dataset.notes) == 5 and all(f"left out: {name} is no readable image (" in notes for name in names)
    assert "left out: latin.txt is not UTF-8 text (byte 2): save it as UTF-8" in notes
    for index in range(30):
        (tmp_path / f"{index:02}.png").write_bytes(b"")
        (tmp_path / f"{index:02}.txt").write_bytes(b"")
    notes = opened(tmp_path, if_unreadable="skip").notes
    assert len(notes) == 21 and notes[20] == "left out for such reasons: 15 more files"
    (tmp_path / "fine.png").unlink()
    (tmp_path / "fine.txt").unlink()
    refuses(tmp_path, "35 files cannot be used:", if_unreadable="skip")
    refuses(tmp_path, "if_unreadable is 'ignore', expected one of error, skip", if_unreadable="ignore")


def test_a_picture_of_absurd_size_is_refused(tmp_path):
    path = put(tmp_path, "a.png")
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    refuses(tmp_path, "a.png is no readable image (")


def test_absurd_captions_and_names_are_named(tmp_path):
    put(tmp_path, "a.png", caption="x" * (1 << 21))
    refuses(tmp_path, "a.txt has 2097152 bytes, too long for a caption")
    put(tmp_path, "a.png")
    os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
    os.rename(os.fsencode(tmp_path / "a.txt"), os.fsencode(tmp_path) + b"/caf\xe9.txt")
    refuses(tmp_path, r"'caf\udce9.png': its name is not UTF-8: rename it")


@pytest.mark.parametrize("linked", ["a.png", "a.txt", "a-masklabel.png"])
def test_links_are_followed_only_where_allowed(tmp_path, linked):
    put(tmp_path, "data/a.png")
    put(tmp_path, "data/a-masklabel.png", caption=None)
    os.replace(tmp_path / "data" / linked, tmp_path / linked)
    (tmp_path / "data" / linked).symlink_to(tmp_path / linked)
    assert len(opened(tmp_path / "data").samples) == 1
    message = refuses(tmp_path / "data", "links that lead outside the dataset folders: ", access=NOWHERE_ELSE)
    assert message.endswith(f"{linked}; copy the files in, or: name {tmp_path} in the host's settings")


def test_a_folder_outside_is_refused_before_it_is_read(tmp_path):
    message = refuses(tmp_path / "secret", access=NOWHERE_ELSE)
    assert message.endswith(f"is outside the dataset folders; name {tmp_path / 'secret'} in the host's settings")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_no_picture(tmp_path):
    put(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    os.mkfifo(tmp_path / "a.caption")
    (tmp_path / "c.png").symlink_to(tmp_path / "b.png")
    assert captions(opened(tmp_path)) == {"a.png": "a cat"}


def test_many_pictures_keep_their_order(tmp_path):
    pixels = np.zeros((1, 1, 3), np.uint8)
    for index in range(300):
        Image.fromarray(pixels).save(tmp_path / f"{index:03}.bmp")
        (tmp_path / f"{index:03}.txt").write_text(str(index))
    assert [sample.caption for sample in opened(tmp_path).samples] == [str(index) for index in range(300)]


def test_a_slow_disk_is_read_in_threads_with_the_same_result(tmp_path, monkeypatch):
    for index in range(100):
        put(tmp_path, f"{index}.png")
    (tmp_path / "70.png").write_bytes(b"no picture")
    read, threads = reading._samples_or_faults, set()

    def watched(entries):
        threads.add(threading.get_ident())
        return read(entries)

    monkeypatch.setattr(reading, "_samples_or_faults", watched)
    monkeypatch.setattr(reading, "WAITING", 1e9)
    at_once = opened(tmp_path, if_unreadable="skip")
    assert threads == {threading.get_ident()} and len(at_once.samples) == 99
    monkeypatch.setattr(reading, "WAITING", 0.0)
    assert opened(tmp_path, if_unreadable="skip") == at_once
    assert len(threads) > 1
