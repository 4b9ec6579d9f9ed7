"""The pixels of a presentation: scaling, crops, mirrors, turns, colours, transparency and masks.

Pillow, torchvision and numpy say what is right; photographs ship inside scikit-learn and scikit-image.
"""

import math
import random
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import run_host
from lora_loom.training.dataset.augmentation import recolour, turning_margin, view_of
from lora_loom.training.dataset.batches import Item, place
from lora_loom.training.dataset.images import decode, read_header
from lora_loom.training.dataset.model import (
    BucketOptions,
    Concept,
    Dataset,
    DatasetError,
    FilePicture,
    GraphPicture,
    ImageOptions,
    Sample,
)
from lora_loom.training.dataset.pixels import load, load_many, whole

run_host.prepare_imports()
from torchvision.transforms import functional as reference  # noqa: E402

PHOTO = Image.open(Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg").convert("RGB")  # 640 × 427
PHOTO.info.clear()
ITEM = Item(0, (96, 64), (120, 80), (12, 8), 8)


def file_picture(path):
    status = path.stat()
    return FilePicture(str(path), read_header(path), status.st_size, status.st_mtime_ns)


def dataset(picture, mask=None, focus=None, resolution=(64, 64), **options):
    concept = Concept(resolutions=(resolution,), buckets=BucketOptions(step=8), images=ImageOptions(**options))
    sample = Sample("a.png", picture, "a pagoda", mask=mask, focus=focus)
    return Dataset("test", (concept,), (sample,))


@pytest.fixture
def photo(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    return file_picture(tmp_path / "a.png")


def levels(pixels):
    return pixels.image.numpy() * 255


def grey_png(folder, name, values):
    Image.fromarray(np.asarray(values, np.uint8)).save(folder / name)
    return file_picture(folder / name)


def fitting(picture, bucket):
    """An item that scales the picture just to cover the bucket, and crops its middle."""
    scale = max(bucket[0] / picture.width, bucket[1] / picture.height)
    resized = round(picture.width * scale), round(picture.height * scale)
    return Item(0, bucket, resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2), 8)


def test_a_thread_of_a_picture_is_named_before_it_fills_the_memory():
    thread = GraphPicture(torch.zeros(1, 10000, 3))
    dataset = Dataset("set", (Concept(resolutions=((1024, 1024),)),), (Sample("thread.png", thread, "x"),))
    [item] = place(dataset)
    with pytest.raises(DatasetError, match=r"thread.png is 10000×1: .* 5120000×512; crop it"):
        load(dataset, item, 0, 0)


# ---------------------------------------------------------------- scaling


@pytest.mark.parametrize("bucket", [(96, 64), (64, 96), (500, 300), (640, 427), (768, 512), (900, 900)])
def test_scaled_and_cropped_as_pillow_does(photo, bucket):
    item = fitting(photo, bucket)
    pixels = load(dataset(photo), item, 0, 0)
    box = (*item.crop, item.crop[0] + bucket[0], item.crop[1] + bucket[1])
    expected = np.asarray(PHOTO.resize(item.resized, Image.Resampling.BICUBIC).crop(box), np.float32)
    assert pixels.image.shape == (bucket[1], bucket[0], 3) and pixels.image.dtype == torch.float32
    assert pixels.image.is_contiguous() and pixels.mask is None
    assert (pixels.resized, pixels.crop) == (item.resized, item.crop)
    difference = np.abs(levels(pixels) - expected)
    assert difference.mean() < 0.02 and difference.max() <= 2


def test_nothing_is_scaled_where_the_size_is_right(photo):
    item = Item(0, (320, 200), (640, 427), (7, 11), 1)
    expected = np.asarray(PHOTO)[11:211, 7:327]
    assert np.array_equal(np.round(levels(load(dataset(photo), item, 0, 0))), expected)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_decoded_smaller_is_nearly_the_same(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    PHOTO.resize((2560, 1708), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=92, exif=exif)
    picture = file_picture(tmp_path / "a.jpg")
    item = fitting(picture, (400, 272))
    expected = decode(picture.path).resize(item.resized, Image.Resampling.BICUBIC)
    box = (*item.crop, item.crop[0] + 400, item.crop[1] + 272)
    difference = np.abs(levels(load(dataset(picture), item, 0, 0)) - np.asarray(expected.crop(box), np.float32))
    assert difference.mean() < 1.25, "frequencies cut off instead of a bicubic kernel"


def test_pixels_of_the_graph_are_never_rounded():
    values = torch.rand((50, 70, 3), generator=torch.Generator().manual_seed(0))
    before = values.clone()
    for bucket in ((32, 24), (140, 100)):
        item = fitting(GraphPicture(values), bucket)
        pixels = load(dataset(GraphPicture(values)), item, 0, 0)
        for channel in range(3):
            scaled = Image.fromarray(values[..., channel].numpy()).resize(item.resized, Image.Resampling.BICUBIC)
            box = (*item.crop, item.crop[0] + bucket[0], item.crop[1] + bucket[1])
            expected = np.asarray(scaled.crop(box)).clip(0, 1)
            assert np.abs(pixels.image[..., channel].numpy() - expected).max() < 1e-5
    same = load(dataset(GraphPicture(values)), Item(0, (70, 50), (70, 50), (0, 0), 1), 0, 0).image
    assert torch.equal(same, values) and same.data_ptr() != values.data_ptr() and torch.equal(values, before)
    grey = load(dataset(GraphPicture(values[..., :1])), Item(0, (70, 50), (70, 50), (0, 0), 1), 0, 0).image
    assert torch.equal(grey, values[..., :1].expand(-1, -1, 3))


def test_what_place_says_is_what_is_loaded(photo):
    data = dataset(photo, resolution=(128, 128))
    [item] = place(data)
    pixels = load(data, item, 0, 0)
    assert pixels.image.shape[:2] == item.bucket[::-1]
    assert (pixels.resized, pixels.crop) == (item.resized, item.crop)


# ---------------------------------------------------------------- crops


def views(data, count, item=ITEM, seed=0):
    sample = data.samples[0]
    return [view_of(sample, item, data.of(sample).images, variation, seed) for variation in range(count)]


def test_random_crops_are_anywhere(photo):
    crops = [view.crop for view in views(dataset(photo, crop="random"), 3000)]
    assert {left for left, _ in crops} == set(range(25)) and {top for _, top in crops} == set(range(17))
    mean = np.mean(crops, axis=0)
    assert np.abs(mean - [12, 8]).max() < 0.5


@pytest.mark.parametrize(
    "focus, crop",
    [
        ((0.45, 0.45, 0.55, 0.55), (12, 8)),
        ((0.0, 0.0, 0.1, 0.1), (0, 0)),
        ((0.9, 0.9, 1.0, 1.0), (24, 16)),
        ((0.4, 0.5, 0.5, 0.7), (54 - 48, 48 - 32)),
        (None, (12, 8)),
    ],
)
def test_the_focus_is_in_the_middle_as_far_as_the_picture_goes(photo, focus, crop):
    assert [view.crop for view in views(dataset(photo, focus=focus, crop="focus"), 2)] == [crop, crop]
    assert views(dataset(photo, focus=focus), 1)[0].crop == (12, 8)


@pytest.mark.parametrize("crop", ["centre", "focus", "random"])
def test_zooming_follows_the_box(photo, crop):
    """The box is 64 by 42.7 pixels of 640 by 427; the crop's short side is to be 2 to 4 times its long side."""
    focus = (0.5, 0.5, 0.6, 0.6)
    seen = views(dataset(photo, focus=focus, crop=crop, zoom=(2, 4)), 200)
    times = [64 / (64 * view.resized[0] / 640) for view in seen]
    assert 2 <= min(times) < 2.3 and 3.6 < max(times) <= 4.01
    for view in seen:
        (left, top), (width, height) = view.crop, view.resized
        assert abs(width / height - 640 / 427) < 0.02
        assert left <= 0.5 * width + 1 and 0.6 * width - 1 <= left + 96  # all of the box is in the crop
        assert top <= 0.5 * height + 1 and 0.6 * height - 1 <= top + 64
        if crop != "random":
            assert abs(left + 48 - 0.55 * width) <= 1 and abs(top + 32 - 0.55 * height) <= 1
    assert (len({view.crop for view in seen}) > 100) == (crop == "random")


def test_zooming_neither_enlarges_nor_uncovers(photo):
    tiny, huge = (0.5, 0.5, 0.501, 0.501), (0.0, 0.0, 1.0, 1.0)
    assert {view.resized for view in views(dataset(photo, focus=tiny, zoom=(1, 1)), 3)} == {(640, 427)}
    assert {view.resized for view in views(dataset(photo, focus=huge, zoom=(9, 9)), 3)} == {(96, 64)}
    assert {view.resized for view in views(dataset(photo, zoom=(1, 1)), 3)} == {(120, 80)}, "without a box, no zoom"
    large = Item(0, (960, 640), (960, 641), (0, 0), 1)
    assert {view.resized for view in views(dataset(photo, focus=tiny, zoom=(1, 1)), 3, large)} == {(960, 640)}


# ---------------------------------------------------------------- mirrors and turns


def test_half_of_the_variations_are_mirrored(photo):
    plain = load(dataset(photo), ITEM, 0, 0).image
    data = dataset(photo, flip=True)
    shown = [load(data, ITEM, variation, 0) for variation in range(4)]
    mirrored = [torch.equal(pixels.image, plain.flip(1)) for pixels in shown]
    assert sum(mirrored) == 2 and mirrored[0] == mirrored[2] != mirrored[1]
    assert all(torch.equal(pixels.image, plain) for pixels, turned in zip(shown, mirrored, strict=True) if not turned)
    off_centre = replace(ITEM, crop=(5, 8))
    for variation, turned in enumerate(mirrored):
        assert load(data, off_centre, variation, 0).crop == ((120 - 96 - 5, 8) if turned else (5, 8))
    firsts = [
        view_of(replace(data.samples[0], id=str(name)), ITEM, ImageOptions(flip=True), 0, 0).mirrored
        for name in range(200)
    ]
    assert 60 < sum(firsts) < 140, "which half comes first depends on the sample"


def turned_views(degrees, count, item=ITEM, size=(640, 427), **options):
    sample = Sample("a.png", GraphPicture(torch.zeros((size[1], size[0], 3))), "")
    choice = ImageOptions(rotate=degrees, **options)
    return [view_of(sample, item, choice, variation, 0) for variation in range(count)]


@pytest.mark.parametrize("crop", ["centre", "random"])
@pytest.mark.parametrize("degrees", [5, 45])
def test_a_turned_crop_stays_inside_the_picture(degrees, crop):
    seen = turned_views(degrees, 100, crop=crop)
    assert min(view.degrees for view in seen) < -0.8 * degrees and max(view.degrees for view in seen) > 0.8 * degrees
    for view in seen:
        angle = math.radians(view.degrees)
        centre = np.array(view.crop) + np.array(view.bucket) / 2
        for corner in ((-48, -32), (48, -32), (-48, 32), (48, 32)):
            x, y = corner
            place = centre + [
                x * math.cos(angle) - y * math.sin(angle),
                x * math.sin(angle) + y * math.cos(angle),
            ]
            assert (place >= -1e-6).all() and (place <= np.array(view.resized) + 1e-6).all()
        assert (
            view.resized[0] <= 120
            or view.resized[1] <= view.bucket[1] + 2 * view.margin[1] + 1
            or (view.resized[0] <= view.bucket[0] + 2 * view.margin[0] + 1)
        ), "enlarged no more than needed"


def test_turning_is_pillow_s(photo):
    data = dataset(photo, rotate=20.0)
    for variation in range(3):
        [view] = views(data, 3)[variation : variation + 1]
        left, top = view.crop
        scaled = PHOTO.resize(view.resized, Image.Resampling.BICUBIC)
        around = (left + 48, top + 32)
        turned = scaled.rotate(view.degrees, Image.Resampling.BICUBIC, center=around, fillcolor=(255, 0, 255))
        expected = np.asarray(turned.crop((left, top, left + 96, top + 64)), np.float32)
        difference = np.abs(levels(load(data, ITEM, variation, 0)) - expected)[1:-1, 1:-1]
        assert difference.mean() < 1.5, "the two sharpen differently"
        straight = np.asarray(scaled.crop((left, top, left + 96, top + 64)), np.float32)
        assert np.abs(straight - expected).mean() > 10


def test_turning_a_ramp():
    """What is linear in x and y stays so: at each pixel the value is that of the place it was taken from.

    torch's cubic has a = −0.75 and may err by up to (2a + 1)(s − 3s² + 2s³) ≤ 0.0481 pixels along each axis.
    """
    y, x = torch.meshgrid(torch.arange(200) + 0.5, torch.arange(240) + 0.5, indexing="ij")
    ramp = torch.stack([x / 240, y / 200, 0 * x + 0.25], -1)
    item = Item(0, (96, 64), (240, 200), (72, 68), 8)
    data = dataset(GraphPicture(ramp), rotate=45.0)
    for variation, view in enumerate(views(data, 4, item)):
        angle = math.radians(view.degrees)
        across, down = np.meshgrid(np.arange(96) + 0.5 - 48, np.arange(64) + 0.5 - 32)
        place_x = view.crop[0] + 48 + across * math.cos(angle) - down * math.sin(angle)
        place_y = view.crop[1] + 32 + across * math.sin(angle) + down * math.cos(angle)
        expected = np.stack([place_x / 240, place_y / 200, 0 * across + 0.25], -1)
        assert view.resized == (240, 200)
        difference = np.abs(load(data, item, variation, 0).image.numpy() - expected)
        assert difference[3:-3, 3:-3].max() < 0.0482 * (1 / 240 + 1 / 200) and difference.max() < 0.02


def test_the_margin_of_a_turn():
    assert turning_margin((96, 64), 0) == (0, 0)
    assert turning_margin((100, 100), 45) == turning_margin((100, 100), -45) == (21, 21)  # 141.42 of 100
    assert turning_margin((200, 10), 30) == (0, 50)


# ---------------------------------------------------------------- colours


def colourful():
    image = PHOTO.resize((60, 40))
    values = np.asarray(image, np.float32) / 255
    values[:4] = np.random.default_rng(0).random((4, 60, 3))
    values[4] = 0.5
    values[5], values[6] = 0, 1
    return torch.from_numpy(values)


@pytest.mark.parametrize(
    "change, by",
    [("brightness", 0.6), ("brightness", 1.4), ("contrast", 0.5), ("contrast", 1.5), ("saturation", 0.2)]
    + [("saturation", 1.9), ("hue", -0.5), ("hue", -0.1), ("hue", 0.25), ("hue", 0.4999)],
)
def test_colours_change_as_torchvision_has_it(change, by):
    image = colourful()
    before = image.clone()
    [view] = turned_views(0, 1)
    result = recolour(image, replace(view, **{change: by}))
    expected = getattr(reference, f"adjust_{change}")(image.permute(2, 0, 1), by).permute(1, 2, 0)
    assert (result - expected).abs().max() < 2e-3, "torchvision rounds the weights of grey to four places"
    assert (result - expected).abs().mean() < 2e-4
    assert torch.equal(image, before) and not torch.allclose(result, image, atol=0.01)


def test_colours_are_drawn_evenly_within_their_strength(photo):
    data = dataset(photo, brightness=0.1, contrast=0.2, saturation=0.3, hue=0.05)
    seen = views(data, 600)
    for name, strength in (("brightness", 0.1), ("contrast", 0.2), ("saturation", 0.3), ("hue", 0.05)):
        middle = 0 if name == "hue" else 1
        drawn = np.array([getattr(view, name) for view in seen])
        assert np.abs(drawn - middle).max() <= strength and abs(drawn.mean() - middle) < 0.1 * strength
        assert drawn.std() == pytest.approx(strength / math.sqrt(3), rel=0.1)
    together = np.corrcoef([[view.brightness, view.contrast, view.saturation, view.hue] for view in seen], rowvar=False)
    assert np.abs(together - np.eye(4)).max() < 0.15
    pixels = [load(data, ITEM, variation, 0).image for variation in range(4)]
    plain = load(dataset(photo), ITEM, 0, 0).image
    for image in pixels:
        assert 0 <= image.min() and image.max() <= 1 and 0.005 < (image - plain).abs().mean() < 0.2


# ---------------------------------------------------------------- transparency and masks


def translucent():
    """Columns from opaque to clear; where it is clear, red hides."""
    alpha = np.tile(np.linspace(255, 0, 640).round().astype(np.uint8), (427, 1))
    colours = np.asarray(PHOTO).copy()
    colours[alpha < 64] = (255, 0, 0)
    return np.dstack([colours, alpha])


@pytest.mark.parametrize(
    "background, colour", [("#fff", (255, 255, 255)), ("#102030", (16, 32, 48)), ("teal", (0, 128, 128))]
)
def test_transparency_is_laid_onto_the_background(tmp_path, background, colour):
    pixels = translucent()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    picture = file_picture(tmp_path / "a.png")
    alpha = pixels[..., 3:] / 255
    flat = alpha * pixels[..., :3] + (1 - alpha) * np.array(colour)
    item = Item(0, (640, 427), (640, 427), (0, 0), 1)
    for source in (picture, GraphPicture(torch.from_numpy(pixels).float() / 255)):
        result = load(dataset(source, background=background), item, 0, 0)
        assert np.abs(levels(result) - flat).max() <= 1 and result.mask is None
        shown = whole(source, background)
        assert torch.equal(shown.image, result.image) and shown.resized == (640, 427)
        assert np.abs(shown.mask.numpy() - alpha[..., 0]).max() < 1e-6


def test_hidden_colours_do_not_bleed_into_the_edge_when_scaled(tmp_path):
    pixels = np.zeros((128, 128, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[:, :61] = (100, 100, 100, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    result = load(dataset(file_picture(tmp_path / "a.png")), Item(0, (48, 48), (48, 48), (0, 0), 1), 0, 0)
    assert np.ptp(levels(result), axis=2).max() <= 1, "grey on white has no red"


def test_an_alpha_channel_that_is_opaque_is_none(tmp_path):
    PHOTO.convert("RGBA").save(tmp_path / "a.png")
    picture = file_picture(tmp_path / "a.png")
    assert whole(picture).mask is None and load(dataset(picture, alpha_mask=True), ITEM, 0, 0).mask is None
    assert np.array_equal(np.round(levels(whole(picture))), np.asarray(PHOTO))


@pytest.mark.parametrize("source", ["file", "graph", "alpha"])
def test_a_mask_goes_where_its_picture_goes(tmp_path, source):
    """The mask shows the same as the picture, so at every pixel it has to be the picture's level."""
    grey = np.array(PHOTO.convert("L"))
    options = {"crop": "random", "flip": True, "rotate": 30.0}
    if source == "alpha":
        # opaque where it is light; on black, the flattened picture is alpha × white
        white = np.dstack([np.full_like(grey, 255)] * 3 + [grey])
        Image.fromarray(white).save(tmp_path / "a.png")
        data = dataset(file_picture(tmp_path / "a.png"), background="#000000", alpha_mask=True, **options)
    else:
        picture = grey_png(tmp_path, "a.png", grey)
        mask = GraphPicture(torch.from_numpy(grey).float()[..., None] / 255) if source == "graph" else picture
        data = dataset(picture, mask, **options)
    for variation in range(6):
        pixels = load(data, ITEM, variation, 0)
        assert pixels.mask.shape == (64, 96) and pixels.mask.dtype == torch.float32
        assert (pixels.mask - pixels.image[..., 0]).abs().max() < 0.01
    assert pixels.mask.std() > 0.05


def test_floor_inversion_and_product(tmp_path, photo):
    left = np.zeros((427, 640), np.uint8)
    left[:, :320] = 255
    top = np.zeros((427, 640), np.uint8)
    top[:213] = 255
    mask = grey_png(tmp_path, "mask.png", left)
    Image.fromarray(np.dstack([np.asarray(PHOTO), top])).save(tmp_path / "a.png")
    both = file_picture(tmp_path / "a.png")

    def corners(data):
        result = load(data, Item(0, (640, 427), (640, 427), (0, 0), 1), 0, 0).mask
        return [round(float(result[y, x]), 3) for y in (5, 420) for x in (5, 630)]

    assert corners(dataset(photo, mask)) == [1, 0, 1, 0]
    assert corners(dataset(photo, mask, mask_floor=0.25)) == [1, 0.25, 1, 0.25]
    assert corners(dataset(photo, mask, invert_mask=True)) == [0, 1, 0, 1]
    assert corners(dataset(photo, mask, invert_mask=True, mask_floor=0.5)) == [0.5, 1, 0.5, 1]
    assert corners(dataset(both, alpha_mask=True)) == [1, 1, 0, 0]
    assert corners(dataset(both, alpha_mask=True, invert_mask=True)) == [0, 0, 1, 1]
    assert corners(dataset(both, mask, alpha_mask=True)) == [1, 0, 0, 0]
    assert corners(dataset(both, mask, alpha_mask=True, mask_floor=0.1)) == [1, 0.1, 0.1, 0.1]
    assert corners(dataset(both, mask, alpha_mask=True, invert_mask=True)) == [0, 1, 0, 0], "only the mask is inverted"


def test_masks_of_another_size_and_of_colour(tmp_path, photo):
    item = Item(0, (320, 213), (320, 213), (0, 0), 1)
    values = np.zeros((107, 160, 3), np.uint8)
    values[:, :80, 0], values[..., 1] = 128, 255  # only red counts
    Image.fromarray(values).save(tmp_path / "mask.png")
    mask = load(dataset(photo, file_picture(tmp_path / "mask.png")), item, 0, 0).mask
    assert (mask[:, :150] == torch.tensor(128 / 255)).all() and (mask[:, 170:] == 0).all()


def test_a_mask_of_another_aspect_is_named(tmp_path, photo):
    mask = grey_png(tmp_path, "mask.png", np.full((427, 600), 255))
    with pytest.raises(DatasetError, match=r"mask\.png is 600×427 and its picture .*a\.png is 640×427: they have to"):
        load(dataset(photo, mask), ITEM, 0, 0)


@pytest.mark.parametrize("invert", [False, True])
def test_a_random_crop_always_shows_something_of_the_mask(tmp_path, photo, invert):
    """One place in a corner counts: most crops that are drawn miss it."""
    levels = np.full((427, 640), 255 * invert)
    levels[400:410, 10:20] = 255 - 255 * invert
    made = dataset(photo, grey_png(tmp_path, "small.png", levels), crop="random", invert_mask=invert, rotate=5)
    item = Item(0, (128, 128), (640, 427), (256, 149), 8)
    for variation in range(8):
        pixels = load(made, item, variation, 0)
        assert pixels.mask.any() and pixels.crop[0] <= 20 + 10 and pixels.crop[1] >= 400 - 128 - 10
    everywhere = dataset(photo, grey_png(tmp_path, "all.png", np.full((427, 640), 255)), crop="random")
    assert len({load(everywhere, item, variation, 0).crop for variation in range(8)}) > 4


def test_a_mask_that_leaves_nothing_is_named(tmp_path, photo):
    black = grey_png(tmp_path, "black.png", np.zeros((427, 640)))
    with pytest.raises(DatasetError, match=r"mask .*black\.png leaves nothing of a\.png to learn .* mask_floor"):
        load(dataset(photo, black), ITEM, 0, 0)
    assert (load(dataset(photo, black, mask_floor=0.1), ITEM, 0, 0).mask == 0.1).all()
    assert (load(dataset(photo, black, invert_mask=True), ITEM, 0, 0).mask == 1).all()
    clear = GraphPicture(torch.zeros((427, 640, 4)))
    with pytest.raises(DatasetError, match=r"the transparency of a\.png leaves nothing"):
        load(dataset(clear, alpha_mask=True), ITEM, 0, 0)


# ---------------------------------------------------------------- whole


def test_the_whole_picture(photo):
    pixels = whole(photo)
    assert np.array_equal(np.round(levels(pixels)), np.asarray(PHOTO))
    assert pixels.mask is None and pixels.crop == (0, 0) and pixels.image.dtype == torch.float32


# ---------------------------------------------------------------- what goes wrong


def test_files_that_changed_are_named(tmp_path, photo):
    PHOTO.resize((640, 426)).save(photo.path)
    with pytest.raises(DatasetError, match=r"a\.png was replaced by an image of another size: queue the workflow"):
        load(dataset(photo), ITEM, 0, 0)
    Path(photo.path).write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.png cannot be decoded \(it is empty, 0 bytes\): save it again"):
        whole(photo)
    Path(photo.path).unlink()
    with pytest.raises(DatasetError, match=r"a\.png cannot be decoded \(.*No such file"):
        load(dataset(photo), ITEM, 0, 0)


@pytest.mark.parametrize("least", [(400, 267), (100, 70)])
def test_a_jpeg_of_another_size_is_noticed_though_it_is_decoded_smaller(tmp_path, least):
    PHOTO.save(tmp_path / "a.jpg")
    picture = file_picture(tmp_path / "a.jpg")
    PHOTO.crop((0, 0, 639, 427)).save(tmp_path / "a.jpg")
    with pytest.raises(DatasetError, match="another size"):
        load(dataset(picture), Item(0, least, least, (0, 0), 1), 0, 0)


def test_a_background_that_is_no_colour_is_named(photo):
    with pytest.raises(DatasetError, match="background is 'whitish', expected a colour such as #ffffff"):
        whole(photo, "whitish")
    with pytest.raises(DatasetError, match="the picture has 2 channels, expected 1, 3 or 4"):
        whole(GraphPicture(torch.zeros((8, 8, 2))))


# ---------------------------------------------------------------- chance


EVERYTHING = {"crop": "random", "flip": True, "rotate": 10.0, "brightness": 0.1, "contrast": 0.1, "saturation": 0.1}


def test_the_same_everywhere_whatever_came_before(photo):
    data = dataset(photo, **EVERYTHING, hue=0.05)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = [load(data, ITEM, variation, 7).image for variation in range(4)]
    again = [load(data, ITEM, variation, 7).image for variation in reversed(range(4))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert random.getstate() == before[0] and np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    others = [load(data, ITEM, 0, 8).image, load(data, replace(ITEM, bucket=(96, 72)), 0, 7).image[:64], *first[1:]]
    assert all(not torch.allclose(first[0], other, atol=1e-3) for other in others)


def test_known_draws(photo):
    """Pinned, so that an interrupted run goes on as it began whatever is updated meanwhile."""
    [view] = views(dataset(photo, **EVERYTHING, hue=0.05), 1)
    assert (view.resized, view.crop, view.mirrored) == ((120, 80), (8, 11), False)
    drawn = view.degrees, view.brightness, view.contrast, view.saturation, view.hue
    assert drawn == pytest.approx((0.989804, 0.954568, 1.065526, 0.915205, -0.032402), abs=1e-6)


def test_nothing_random_is_the_plain_crop(photo):
    view, other = views(dataset(photo), 2)
    assert view == other and view.crop == ITEM.crop and view.resized == ITEM.resized
    assert (view.degrees, view.mirrored, view.hue) == (0, False, 0)
    assert view.brightness == view.contrast == view.saturation == 1


sides = st.integers(8, 4000)
boxes = st.tuples(st.floats(0, 0.9), st.floats(0, 0.9), st.floats(0, 0.1), st.floats(0, 0.1))


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(sides, sides),
    st.tuples(st.integers(8, 2048), st.integers(8, 2048)),
    st.sampled_from(["centre", "random", "focus"]),
    st.none() | st.tuples(st.floats(0.1, 3), st.floats(3, 9)),
    st.none() | boxes,
    st.floats(0, 45),
    st.integers(0, 20),
)
def test_every_crop_lies_in_its_picture(size, bucket, crop, zoom, box, degrees, variation):
    focus = box and (box[0], box[1], box[0] + box[2], box[1] + box[3])
    picture = GraphPicture(torch.empty((size[1], size[0], 3), device="meta"))
    item = fitting(picture, bucket)
    sample = Sample("a", picture, "", focus=focus)
    view = view_of(sample, item, ImageOptions(crop=crop, zoom=zoom, rotate=degrees, flip=True), variation, 0)
    for axis in (0, 1):
        for start in (view.crop[axis], view.shown_crop[axis]):
            assert view.margin[axis] <= start <= view.resized[axis] - bucket[axis] - view.margin[axis]
    # both sides are the same multiple of the picture's, but for rounding: the item's, enlarged, and the view's own
    off = 1 + max(view.resized[axis] / item.resized[axis] for axis in (0, 1))
    least = max((view.resized[axis] - off) / size[axis] for axis in (0, 1))
    assert least <= min((view.resized[axis] + off) / size[axis] for axis in (0, 1))


# ---------------------------------------------------------------- decoding ahead


def test_many_are_loaded_in_order_and_no_more_than_needed(photo):
    data = dataset(photo, crop="random", flip=True)
    asked = []

    def requests():
        for variation in range(40):
            asked.append(variation)
            yield ITEM, variation

    loaded = load_many(data, requests(), 3, workers=2)
    assert not asked, "nothing happens before the first is wanted"
    for variation, pixels in enumerate(islice(loaded, 12)):
        assert torch.equal(pixels.image, load(data, ITEM, variation, 3).image)
        assert len(asked) <= variation + 1 + 2
    loaded.close()
    assert len(asked) <= 14
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]
    everything = list(load_many(data, ((ITEM, variation) for variation in range(5)), 3))
    assert len(everything) == 5 and not list(load_many(data, [], 3))


def test_an_error_comes_out_in_its_place(tmp_path, photo):
    (tmp_path / "bad.png").write_bytes(b"")
    data = dataset(photo)
    bad = replace(data.samples[0], id="bad.png", picture=replace(photo, path=str(tmp_path / "bad.png")))
    data = replace(data, samples=(*data.samples, bad))
    loaded = load_many(data, [(ITEM, 0), (ITEM, 0), (replace(ITEM, sample=1), 0), (ITEM, 0)], 0, workers=3)
    assert len(list(islice(loaded, 2))) == 2
    with pytest.raises(DatasetError, match=r"bad\.png cannot be decoded"):
        next(loaded)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pictures")]
