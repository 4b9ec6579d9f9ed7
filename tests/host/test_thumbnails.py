"""Views of pictures: what training sees, small; damaged files as placeholders; everything bounded."""

import asyncio
import io
import os
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lora_loom.host import thumbnails
from lora_loom.host.guard import Refused
from lora_loom.host.thumbnails import Budget, Thumbnails, View, fitted
from lora_loom.training.dataset.images import read_header
from lora_loom.training.dataset.model import FilePicture, GraphPicture
from lora_loom.training.dataset.pixels import whole

NEAR = 6  # levels of 255 that JPEG and another way to scale may take away, on average


@pytest.fixture
def folder(places):
    place = places / "comfy/datasets/views"
    place.mkdir()
    return place


def smooth(width, height, seed=0, bands=3):
    draws = np.random.default_rng(seed).integers(0, 255, (5, 4, bands), dtype=np.uint8)
    return Image.fromarray(draws).resize((width, height), Image.Resampling.BICUBIC)


def put(folder, name, image, **options):
    image.save(folder / name, **options)
    return picture_of(folder / name)


def picture_of(path):
    status = path.stat()
    return FilePicture(str(path), read_header(path), status.st_size, status.st_mtime_ns)


def seen(picture, side, made=None, **options):
    encoded = asyncio.run((made or Thumbnails()).view(View(picture, side, **options)))
    image = Image.open(io.BytesIO(encoded.content))
    assert image.format == "JPEG" and not encoded.fault, encoded.fault
    return image


def as_trained(picture, size, background="#ffffff"):
    pixels = whole(picture, background).image.permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, size[::-1], mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).clamp(0, 1).numpy() * 255


def same(image, expected):
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image.convert("RGB"), float) - expected).mean() < NEAR


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "bmp", "tiff", "gif"])
@pytest.mark.parametrize("side", [96, 384, 2048])
def test_a_view_is_the_picture_small(folder, kind, side):
    picture = put(folder, f"a.{kind}", smooth(731, 457))
    size = fitted((731, 457), side)
    assert max(size) == min(side, 731), "never larger than the picture"
    same(seen(picture, side), as_trained(picture, size))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_upright_as_training_sees_it(folder, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = smooth(640, 250, orientation)
    picture = put(folder, f"a.{kind}", image, exif=exif)
    shown = seen(picture, 96)
    same(shown, as_trained(picture, fitted((picture.width, picture.height), 96)))
    image.getexif()[0x0112] = orientation
    assert shown.size == fitted(ImageOps.exif_transpose(image).size, 96)


def test_transparency_lies_on_the_concepts_background(folder):
    image = smooth(300, 200, bands=4)
    picture = put(folder, "a.png", image)
    for background in ("#ffffff", "#102030"):
        same(seen(picture, 96, background=background), as_trained(picture, (96, 64), background))
    key = Image.new("RGB", (900, 900), (255, 0, 255))
    key.paste((0, 200, 0), (0, 0, 450, 900))
    picture = put(folder, "key.png", key, transparency=(255, 0, 255))
    same(seen(picture, 96, background="#000000"), as_trained(picture, (96, 96), "#000000"))


def test_masks_show_their_levels(folder):
    levels = smooth(500, 300, bands=3).convert("L")
    picture = put(folder, "m.png", levels)
    expected = np.asarray(levels.resize((96, 58), Image.Resampling.BICUBIC), float)
    same(seen(picture, 96, mask=True), np.repeat(expected[..., None], 3, 2))


def test_pictures_of_the_graph():
    noise = torch.rand(1, 4, 5, 4)
    smoothed = torch.nn.functional.interpolate(noise, (400, 300), mode="bicubic", antialias=True).clamp(0, 1)
    picture = GraphPicture(smoothed[0].permute(1, 2, 0))
    same(seen(picture, 2048), as_trained(picture, (300, 400)))
    same(seen(picture, 96), as_trained(picture, (72, 96)))
    same(seen(GraphPicture(torch.ones(64, 64, 1)), 96), np.full((64, 64, 3), 255.0))


def placeholder(made, picture):
    encoded = asyncio.run(made.view(View(picture, 96)))
    assert Image.open(io.BytesIO(encoded.content)).size == (96, 96) and encoded.tag == ""
    return encoded.fault


def test_damaged_files_give_a_placeholder(folder, places):
    picture, made = put(folder, "a.jpg", smooth(300, 200)), Thumbnails()
    content = (folder / "a.jpg").read_bytes()
    (folder / "a.jpg").write_bytes(content[: len(content) // 2])
    assert "truncated" in placeholder(made, picture)
    (folder / "a.jpg").write_bytes(b"<html>")
    assert placeholder(made, picture) == "it is an HTML page"
    (folder / "a.jpg").unlink()
    assert placeholder(made, picture) == "No such file or directory"
    smooth(50, 50).save(places / "secret.jpg")
    (folder / "a.jpg").symlink_to(places / "secret.jpg")
    assert placeholder(made, picture) == "it is no longer in a dataset folder"
    (folder / "a.jpg").unlink()
    (folder / "a.jpg").write_bytes(content)
    same(seen(picture, 96, made), as_trained(picture, (96, 64)))


def test_a_pipe_holds_nobody_up(folder):
    """What was a picture when the dataset was read may be anything later."""
    picture = put(folder, "a.png", smooth(30, 20))
    (folder / "a.png").unlink()
    os.mkfifo(folder / "a.png")
    assert placeholder(Thumbnails(), picture) == "it is no file any more"


def test_a_file_that_was_replaced_is_shown_anew(folder):
    picture, made = put(folder, "a.png", smooth(300, 200)), Thumbnails()
    first = asyncio.run(made.view(View(picture, 96)))
    assert asyncio.run(made.view(View(picture, 96), known=first.tag)) is None
    smooth(200, 300, 5).save(folder / "a.png")
    second = asyncio.run(made.view(View(picture, 96), known=first.tag))
    assert second.tag != first.tag and Image.open(io.BytesIO(second.content)).size == (64, 96)


def test_what_is_kept_is_bounded_and_found_again(folder, monkeypatch):
    pictures = [put(folder, f"{index}.png", smooth(300, 200, index)) for index in range(6)]
    made = Thumbnails(most_bytes=12_000)
    decoded = []
    monkeypatch.setattr(thumbnails, "_shown", lambda view, shown=thumbnails._shown: decoded.append(view) or shown(view))
    sizes = [len(asyncio.run(made.view(View(picture, 192))).content) for picture in pictures]
    assert sum(sizes) > 12_000 >= made._bytes == sum(map(len, made._kept.values()))
    assert len(decoded) == 6
    seen(pictures[-1], 192, made)
    assert len(decoded) == 6, "the last is still there"
    seen(pictures[0], 192, made)
    assert len(decoded) == 7, "the first had to go"


def test_too_many_at_once_are_refused_and_the_gone_are_not_decoded(folder):
    picture, made = put(folder, "a.png", smooth(300, 200)), Thumbnails(most_waiting=5)

    async def many():
        calls = [made.view(View(picture, 96)) for _ in range(40)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(many())
    refused = [answer for answer in answers if isinstance(answer, Refused)]
    assert len(refused) == 35 and {each.status for each in refused} == {503}
    assert asyncio.run(made.view(View(picture, 384), gone=lambda: True)) is None
    assert seen(picture, 96, made).size == (96, 64), "afterwards there is room again"


def test_pixels_at_once_are_bounded():
    budget, held, most = Budget(100), [0], [0]
    lock, done = threading.Lock(), []

    def work(pixels):
        with budget.taking(pixels):
            with lock:
                held[0] += min(pixels, 100)
                most[0] = max(most[0], held[0])
            time.sleep(0.002)
            with lock:
                held[0] -= min(pixels, 100)
        done.append(pixels)

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in [30, 10, 500, 40, 100, 1, 60, 60, 5, 99] * 3]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(done) == 30 and 50 < most[0] <= 100


def test_what_is_kept_is_not_shown_once_its_folder_is_no_longer_ours(folder, monkeypatch):
    picture, made = put(folder, "a.png", smooth(300, 200)), Thumbnails()
    first = asyncio.run(made.view(View(picture, 96)))
    monkeypatch.setattr(thumbnails.folders, "is_registered", lambda path: False)
    assert placeholder(made, picture) == "it is no longer in a dataset folder"
    known = asyncio.run(made.view(View(picture, 96), known=first.tag))
    assert known is not None and known.fault, "the browser's own copy is not confirmed either"
