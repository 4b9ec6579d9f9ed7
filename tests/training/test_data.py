"""Folders of captioned images: what is read, what is refused, and how it is cut into buckets and batches."""

import os
import random
import re
import struct
import zlib
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from lora_loom.training.buckets import bucket_sizes, choose_bucket, cover, kept_part
from lora_loom.training.data import DatasetError, batch_order, describe, folder_state, load_pixels, scan_folder
from lora_loom.training.images import image_types

ORIENTATION = 0x0112
SAVED_BY_ALL = ["png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif"]


def noise(width, height, mode="RGB", seed=0):
    """Smooth random colours, so that lossy formats keep them."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def put(folder, name, image=None, caption="a cat", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or noise(64, 64)).save(path, **options)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption if isinstance(caption, bytes) else caption.encode())
    return path


def whole(sample):
    """The sample as it is when nothing is scaled or cropped."""
    size = sample.width, sample.height
    return replace(sample, bucket=size, resized=size, crop=(0, 0))


def many(folder, count, seed=0):
    """A dataset of small images of all aspect ratios, three of each."""
    draw = random.Random(seed)
    for index in range(0, count, 3):
        size = draw.randint(16, 90), draw.randint(16, 90)
        for twin in range(3):
            put(folder, f"{index + twin:03}.bmp", noise(*size))
    return scan_folder(folder, 64, 8)


# ---------------------------------------------------------------- buckets


@pytest.mark.parametrize(
    "resolution, step", [(16, 8), (16, 16), (64, 8), (96, 64), (500, 64), (512, 64), (768, 32), (1024, 64), (4096, 256)]
)
def test_bucket_sizes(resolution, step):
    sizes = bucket_sizes(resolution, step)
    assert len(set(sizes)) == len(sizes)
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert any(width == height for width, height in sizes)
    for width, height in sizes:
        assert width % step == 0 and height % step == 0
        if width != height:
            assert resolution <= 2 * width <= 4 * resolution and resolution <= 2 * height <= 4 * resolution
            assert 0.75 <= width * height / resolution**2 <= 1.25
        assert width * height <= 1.25 * resolution**2


def test_known_buckets_without_a_cap_at_1024():
    sizes = bucket_sizes(1024, 64)
    assert {(1024, 1024), (1152, 896), (1216, 832), (1344, 768), (512, 2048), (2048, 512)} <= set(sizes)
    assert sum(width * height for width, height in sizes) / len(sizes) == pytest.approx(1024**2, rel=0.02)
    assert bucket_sizes(512, 512) == ((256 * 2, 512),)


@pytest.mark.parametrize("resolution, step", [(32, 64), (512, 0), (512, -8)])
def test_a_step_that_does_not_fit_is_refused(resolution, step):
    with pytest.raises(ValueError, match=f"bucket_step is {step} and resolution is {resolution}: choose a bucket_step"):
        bucket_sizes(resolution, step)


def test_every_image_goes_to_the_bucket_that_keeps_most_of_it():
    draw = random.Random(1)
    for _ in range(150):
        image = draw.randint(1, 3000), draw.randint(1, 3000)
        resolution, step = draw.choice([(64, 8), (512, 64), (1024, 32), (768, 128)])
        bucket = choose_bucket(image, resolution, step)
        resized, (left, top) = cover(image, bucket)
        assert kept_part(image, bucket) == max(kept_part(image, other) for other in bucket_sizes(resolution, step))
        assert choose_bucket(image[::-1], resolution, step) == bucket[::-1]
        assert cover(image[::-1], bucket[::-1]) == (resized[::-1], (top, left))
        assert resized[0] == bucket[0] or resized[1] == bucket[1]
        for side in (0, 1):
            room = resized[side] - bucket[side]
            assert 0 <= room and (left, top)[side] == room // 2
            scale = max(Fraction(bucket[0], image[0]), Fraction(bucket[1], image[1]))
            assert abs(resized[side] - image[side] * scale) <= 0.5


def test_photographs_lose_little_at_1024():
    draw = random.Random(2)
    images = [(round(1000 * 2.2 ** draw.uniform(-1, 1)), 1000) for _ in range(300)]
    lost = [1 - float(kept_part(image, choose_bucket(image, 1024, 64))) for image in images]
    assert np.mean(lost) < 0.035 and max(lost) < 0.09


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("kind", SAVED_BY_ALL)
def test_every_type_is_read(tmp_path, kind):
    if f".{kind}" not in image_types():  # Pillow is built without the codec: then the type is refused by name
        (tmp_path / f"a.{kind}").write_bytes(b"")
        with pytest.raises(DatasetError, match="unsupported types"):
            scan_folder(tmp_path, 64, 8)
        return
    picture = noise(48, 80)
    put(tmp_path, f"a.{kind.upper()}", picture, format=Image.registered_extensions()[f".{kind}"])
    [sample] = scan_folder(tmp_path, 64, 8).samples
    assert (sample.id, sample.caption, sample.width, sample.height) == (f"a.{kind.upper()}", "a cat", 48, 80)
    pixels = load_pixels(whole(sample))
    assert pixels.shape == (80, 48, 3) and pixels.dtype == np.float32
    assert 0 <= pixels.min() and pixels.max() <= 1
    assert np.abs(pixels - np.asarray(picture) / 255).mean() < 0.05


def test_files_are_sorted_by_relative_path_and_everything_else_is_ignored(tmp_path):
    for name in ("b/2.png", "b/10.jpg", "a.webp", "Z.png", "ä ö/猫.png", "a/deep/er/x.y.png", "[1]/x.png"):
        put(tmp_path, name)
    for name in (".hidden.png", ".cache/x.png", "b/.thumbs/x.png", "b/._2.png"):
        put(tmp_path, name, caption=None, format="png")
    for name in ("readme.txt", "metadata.json", "b/2.npz", "b/2.png.bak", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\xff\xfe")
    dataset = scan_folder(tmp_path, 64, 8)
    names = [sample.id for sample in dataset.samples]
    assert names == sorted(["b/2.png", "b/10.jpg", "a.webp", "Z.png", "ä ö/猫.png", "a/deep/er/x.y.png", "[1]/x.png"])
    assert dataset.notes == () and dataset.root == str(tmp_path) and dataset.resolution == 64
    assert all(load_pixels(sample).shape == (64, 64, 3) for sample in dataset.samples)


def test_captions(tmp_path):
    put(tmp_path, "bom.png", caption=b"\xef\xbb\xbf  a c\xc3\xa4t, \xe7\x8c\xab\r\n\n")
    put(tmp_path, "lines.png", caption="first\nsecond\n")
    put(tmp_path, "empty.png", caption=" \n")
    put(tmp_path, "upper.png", caption=None)
    (tmp_path / "upper.TXT").write_text("shouting")
    dataset = scan_folder(tmp_path, 64, 8)
    captions = {sample.id: sample.caption for sample in dataset.samples}
    assert captions == {"bom.png": "a cät, 猫", "lines.png": "first\nsecond", "empty.png": "", "upper.png": "shouting"}
    assert dataset.notes == ("empty captions, trained without a prompt: empty.png",)


def test_the_size_and_crop_of_a_sample_describe_its_pixels(tmp_path):
    path = put(tmp_path, "a.png", noise(200, 90))
    [sample] = scan_folder(tmp_path, 64, 16).samples
    assert (sample.width, sample.height, sample.bucket) == (200, 90, (96, 48))
    assert (sample.resized, sample.crop) == ((107, 48), (5, 0))
    assert (sample.size, sample.mtime_ns) == (path.stat().st_size, path.stat().st_mtime_ns)
    expected = Image.open(path).resize((107, 48), Image.Resampling.LANCZOS).crop((5, 0, 101, 48))
    assert np.array_equal(load_pixels(sample), np.asarray(expected, np.float32) / 255)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "avif"])
def test_all_exif_orientations(tmp_path, kind):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        put(tmp_path, f"{orientation}.{kind}", noise(64, 40), exif=exif)
    for sample in scan_folder(tmp_path, 64, 8).samples:
        orientation = int(sample.id[0])
        expected = ImageOps.exif_transpose(Image.open(sample.path)).convert("RGB")
        turned = orientation >= 5
        assert (sample.width, sample.height) == expected.size == ((40, 64) if turned else (64, 40))
        assert np.array_equal(load_pixels(whole(sample)) * 255, np.asarray(expected))
        assert (sample.bucket[0] < sample.bucket[1]) == turned


def test_orientation_behind_a_png_s_pixels_and_in_xmp(tmp_path):
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    plain = put(tmp_path, "late.png", noise(64, 40)).read_bytes()
    body = b"eXIf" + exif.tobytes()[6:]
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "late.png").write_bytes(plain[:-12] + chunk + plain[-12:])
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    put(tmp_path, "xmp.jpg", noise(64, 40), xmp=xmp)
    for sample in scan_folder(tmp_path, 64, 8).samples:
        assert (sample.width, sample.height) == (40, 64), sample.id
        expected = ImageOps.exif_transpose(Image.open(sample.path))
        assert np.array_equal(load_pixels(whole(sample)) * 255, np.asarray(expected))


def half_transparent(mode):
    """Left half opaque grey 100; right half fully transparent, hiding black, as in files that editors write."""
    image = Image.new("LA" if mode == "LA" else "RGBA", (64, 64), (0, 0) if mode == "LA" else (0, 0, 0, 0))
    image.paste((100, 255) if mode == "LA" else (100, 100, 100, 255), (0, 0, 32, 64))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L key", "RGB key", "I;16 key"])
def test_transparency_is_laid_onto_white(tmp_path, mode):
    if mode == "P":
        image, options = Image.new("P", (64, 64), 1), {"transparency": 1}
        image.putpalette([100, 100, 100, 0, 0, 0])
        image.paste(0, (0, 0, 32, 64))
    elif mode == "I;16 key":
        levels = np.zeros((64, 64), np.uint16)
        levels[:, :32] = 100 * 257
        image, options = Image.fromarray(levels), {"transparency": 0}
    elif mode.endswith("key"):
        image = half_transparent("RGBA").convert(mode[:-4])
        options = {"transparency": 0 if mode[0] == "L" else (0, 0, 0)}
    else:
        image, options = half_transparent(mode), {}
    put(tmp_path, "a.png", image, **options)
    [sample] = scan_folder(tmp_path, 64, 8).samples
    pixels = np.round(load_pixels(sample) * 255)
    assert (pixels[:, :32] == 100).all() and (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "gif"])
def test_transparency_in_other_formats(tmp_path, kind):
    put(tmp_path, f"a.{kind}", half_transparent("RGBA"), **({"lossless": True} if kind == "webp" else {}))
    [sample] = scan_folder(tmp_path, 64, 8).samples
    pixels = np.round(load_pixels(sample) * 255)
    assert (pixels[:, :32] == 100).all() and (pixels[:, 32:] == 255).all()


@pytest.mark.parametrize("mode, kind", [("1", "png"), ("L", "png"), ("P", "gif"), ("CMYK", "jpg"), ("YCbCr", "jpg")])
def test_modes_without_transparency(tmp_path, mode, kind):
    image = noise(64, 64).convert(mode)
    path = put(tmp_path, f"a.{kind}", image)
    [sample] = scan_folder(tmp_path, 64, 8).samples
    assert np.array_equal(load_pixels(sample) * 255, np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_sixteen_bit_grey_keeps_its_levels(tmp_path, kind):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    put(tmp_path, f"a.{kind}", Image.fromarray(ramp))
    [sample] = scan_folder(tmp_path, 64, 8).samples
    assert np.abs(load_pixels(sample) - ramp[..., None] / 65535).max() <= 0.5 / 255 + 1e-6


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    put(tmp_path, "a.gif", frames[0], save_all=True, append_images=frames[1:])
    [sample] = scan_folder(tmp_path, 64, 8).samples
    assert (load_pixels(sample) == np.array([1, 0, 0], np.float32)).all()


# ---------------------------------------------------------------- notes


def test_notes(tmp_path):
    put(tmp_path, "small.png", noise(16, 16))
    put(tmp_path, "smaller.png", noise(8, 8))
    put(tmp_path, "strip.png", noise(1000, 50))
    put(tmp_path, "fine.png", noise(64, 64))
    (tmp_path / "phone.HEIC").write_bytes(b"")
    dataset = scan_folder(tmp_path, 64, 8)
    assert dataset.notes == (
        "left out, no supported type: phone.HEIC; convert to png or jpg to use them",
        "2 images smaller than the bucket and scaled up (at most 8.00×, smaller.png): "
        "use larger originals or a lower resolution",
        "1 image with more than a fifth cropped away (at most 80%, strip.png): "
        "crop them yourself, or use a smaller bucket_step",
    )
    text = describe(dataset).splitlines()
    assert text[:2] == ["4 images at resolution 64", "2 buckets (64×64: 3, 128×32: 1)"]
    assert text[2:] == [f"note: {note}" for note in dataset.notes]


def test_linked_folders_are_named_not_entered(tmp_path):
    put(tmp_path, "data/a.png")
    put(tmp_path, "other/b.png")
    (tmp_path / "data/more").symlink_to(tmp_path / "other")
    dataset = scan_folder(tmp_path / "data", 64, 8)
    assert [sample.id for sample in dataset.samples] == ["a.png"]
    assert dataset.notes == ("left out, folders that are links: more; copy them in to use them",)


# ---------------------------------------------------------------- what is refused


def refuses(folder, *parts, allowed=None):
    with pytest.raises(DatasetError) as caught:
        scan_folder(folder, 64, 8, allowed)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_folders_without_images(tmp_path):
    refuses(tmp_path / "absent", "absent cannot be opened", "does it exist")
    refuses(tmp_path, str(tmp_path), "has no images: put images (png, jpg,", "each with a caption in a .txt file")
    (tmp_path / "notes.txt").write_text("hello")
    refuses(tmp_path, "has no images")
    for name in ("a.heic", "b.psd"):
        (tmp_path / name).write_bytes(b"")
    refuses(tmp_path, "images of unsupported types only (a.heic, b.psd): convert them to one of png, jpg")


def test_images_without_a_caption(tmp_path):
    for index in range(8):
        put(tmp_path, f"{index}.png", caption="x" if index == 0 else None)
    message = refuses(tmp_path, "7 images of 8 without a caption: 1.png, 2.png, 3.png, 4.png, 5.png and 2 more")
    assert message.endswith("write each caption into a text file of the same name, e.g. 1.txt")


def test_images_that_share_a_caption(tmp_path):
    put(tmp_path, "cats/a.png")
    put(tmp_path, "cats/a.jpg")
    put(tmp_path, "dogs/a.jpg")
    refuses(tmp_path, "share one caption file: cats/a.jpg and cats/a.png; rename or remove one of each")


def test_unreadable_files_are_named_together(tmp_path):
    for name in ("fine.png", "text.png", "empty.jpg", "short.png"):
        put(tmp_path, name)
    (tmp_path / "text.png").write_text("<html>not found</html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    data = (tmp_path / "short.png").read_bytes()
    (tmp_path / "short.png").write_bytes(data[: len(data) * 2 // 3])
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "broken.txt").write_bytes("à".encode("utf-16"))
    put(tmp_path, "latin.png", caption="façade".encode("latin-1"))
    message = refuses(tmp_path, "5 files cannot be used:", "save it again or remove it", "save it as UTF-8")
    for name in ("text.png", "empty.jpg", "short.png", "broken.png"):
        assert re.search(rf"^{name} is no readable image \(.+\)", message, re.MULTILINE)
    assert "latin.txt is not UTF-8 text (byte 2)" in message
    assert "fine" not in message


def test_undecodable_pixels_are_named_at_load(tmp_path):
    path = put(tmp_path, "a.jpg", noise(300, 300))
    [sample] = scan_folder(tmp_path, 64, 8).samples
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"a\.jpg cannot be decoded \(.*truncated.*\): save it again or remove it"):
        load_pixels(sample)
    noise(30, 30).save(path)
    with pytest.raises(
        DatasetError, match=r"a\.jpg was replaced by an image of another size: queue the workflow again"
    ):
        load_pixels(sample)


def test_pixels_of_unknown_range_are_refused(tmp_path):
    put(tmp_path, "a.tiff", Image.fromarray(np.ones((64, 64), np.float32)))
    with pytest.raises(DatasetError, match="32 bits, of unknown range"):
        load_pixels(scan_folder(tmp_path, 64, 8).samples[0])


def test_a_picture_of_absurd_size_is_refused(tmp_path):
    path = put(tmp_path, "a.png")
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    refuses(tmp_path, "a.png is no readable image", "exceeds limit")


@pytest.mark.parametrize("linked", ["a.png", "a.txt"])
def test_links_are_followed_only_where_allowed(tmp_path, linked):
    put(tmp_path, "data/a.png")
    os.replace(tmp_path / "data" / linked, tmp_path / linked)
    (tmp_path / "data" / linked).symlink_to(tmp_path / linked)
    assert len(scan_folder(tmp_path / "data", 64, 8).samples) == 1
    assert len(scan_folder(tmp_path / "data", 64, 8, lambda path: path == tmp_path / linked).samples) == 1
    refuses(tmp_path / "data", f"links that lead outside the dataset folders: {linked}", allowed=lambda path: False)


# ---------------------------------------------------------------- fingerprints and batches


def test_the_fingerprint_and_the_state_follow_the_files(tmp_path):
    paths = [put(tmp_path, name, noise(50, 70)) for name in ("a.png", "b.png")]
    for path in (*paths, *(path.with_suffix(".txt") for path in paths)):
        os.utime(path, ns=(10**18, 10**18))

    def both():
        return scan_folder(tmp_path, 64, 8).fingerprint(), folder_state(tmp_path)

    first = both()
    assert both() == first
    assert scan_folder(tmp_path, 64, 16).fingerprint() != first[0] != scan_folder(tmp_path, 80, 8).fingerprint()
    (tmp_path / "readme.md").write_text("nothing to do with it")
    assert both() == first
    (tmp_path / "a.txt").write_text("a dog, new")
    caption = both()
    os.utime(paths[1], ns=(10**18, 10**18 + 1))
    touched = both()
    put(tmp_path, "c.png")
    added = both()
    for results in zip(first, caption, touched, added, strict=True):
        assert len(set(results)) == 4


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_an_epoch_shows_every_sample_once_in_batches_of_one_bucket(tmp_path, batch_size):
    dataset = many(tmp_path, 24)
    sizes = {index: sample.bucket for index, sample in enumerate(dataset.samples)}
    assert len(set(sizes.values())) > 3
    batches = batch_order(dataset, batch_size, 7, 0)
    assert sorted(index for batch in batches for index in batch) == list(sizes)
    for bucket in set(sizes.values()):
        lengths = [len(batch) for batch in batches if sizes[batch[0]] == bucket]
        total = list(sizes.values()).count(bucket)
        rest = [total % batch_size] if total % batch_size else []
        assert sorted(lengths, reverse=True) == [batch_size] * (total // batch_size) + rest
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)


def test_the_order_is_a_pure_function_of_its_arguments(tmp_path):
    dataset = many(tmp_path, 24)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    orders = {(seed, epoch): batch_order(dataset, 2, seed, epoch) for seed in (0, 1, 2**63) for epoch in (0, 1, 11)}
    again = {key: batch_order(replace(dataset, notes=("x",)), 2, *key) for key in reversed(orders)}
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1]) and torch.equal(torch.get_rng_state(), before[2])
    assert again == orders
    assert len({repr(order) for order in orders.values()}) == len(orders)
    assert len({frozenset(map(frozenset, order)) for order in orders.values()}) > 1, "partners must change too"


def test_the_order_has_no_preference(tmp_path):
    put(tmp_path, "0.bmp")
    [sample] = scan_folder(tmp_path, 64, 8).samples
    dataset = replace(scan_folder(tmp_path, 64, 8), samples=(sample,) * 4)
    firsts = [batch_order(dataset, 1, 0, epoch)[0][0] for epoch in range(800)]
    assert min(firsts.count(index) for index in range(4)) > 150


def test_a_batch_size_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="batch_size is 0"):
        batch_order(many(tmp_path, 3), 0, 0, 0)
