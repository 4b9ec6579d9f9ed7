"""Figures of pictures against SciPy and scikit-image, and on photographs: what fires on them as they are, and degraded.

The thresholds are those of the lint rules D024, D030, D031 and T040. Counts on the 17 photographs below:

- detail below 0.13: 0 as they are, 14 blurred (σ 1), 15 enlarged twofold, 15 so at quality 90, 15 fourfold at 30
- blockiness above 1.3: 0 as they are, 2 at quality 90 (both have been JPEGs), 5 at 75, 16 at 30, 17 at 10, 0 enlarged
- duplicates: each of twelve kinds of copies (turned, mirrored, brighter …) for at least 16; the nearest different
  photographs are 22 of 64 bits apart, with 4 and 10 as thresholds
"""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import scipy.signal
import skimage
import skimage.filters
import sklearn
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageFilter

from lora_loom.training.dataset import scores
from lora_loom.training.dataset.lint_rules import Limits
from lora_loom.training.dataset.scores import alike, distances, hashes, measure, middle, thumbnail

SKIMAGE = Path(skimage.__file__).parent / "data"
SKLEARN = Path(sklearn.__file__).parent / "datasets" / "images"
NAMES = "coffee.png astronaut.png chelsea.png rocket.jpg camera.png hubble_deep_field.jpg retina.jpg ihc.png "
NAMES += "motorcycle_left.png moon.png brick.png grass.png gravel.png coins.png color.png"
PHOTOS = {name: Image.open(SKIMAGE / name).convert("RGB") for name in NAMES.split()}
PHOTOS |= {name: Image.open(SKLEARN / name).convert("RGB") for name in ("china.jpg", "flower.jpg")}
LIMITS = Limits()


def centre(image, side=512):
    left, top = max(0, image.width - side) // 2, max(0, image.height - side) // 2
    return image.crop((left, top, min(image.width, left + side), min(image.height, top + side)))


CENTRES = {name: centre(photo) for name, photo in PHOTOS.items()}  # all that the quality figures look at, or nearly


def jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def enlarged(image, factor=2):
    small = image.resize((image.width // factor, image.height // factor), Image.Resampling.LANCZOS)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def blurred(image, radius):
    return image.filter(ImageFilter.GaussianBlur(radius))


def noisy(image, sigma, seed=0):
    change = np.random.default_rng(seed).normal(0, sigma, (*image.size[::-1], 3))
    return Image.fromarray(np.clip(np.asarray(image) + change, 0, 255).round().astype(np.uint8))


def firing(name, change, below=None, above=None):
    figures = [getattr(scores, name)(middle(change(photo))) for photo in CENTRES.values()]
    return sum(figure < below if above is None else figure > above for figure in figures)


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize("name", ["astronaut.png", "retina.jpg", "chelsea.png"])
def test_hashes_are_what_their_definitions_say(name):
    small = thumbnail(PHOTOS[name])
    square = np.asarray(small.convert("L").resize((32, 32), Image.Resampling.BOX), float)
    waves = scipy.fft.dctn(square)[:8, :8]
    level = square.repeat(9, axis=1).reshape(8, 4, 9, 32).mean(axis=(1, 3))
    difference, cosine = hashes(small)[0]
    assert bits(cosine) == (waves > np.median(waves)).ravel().tolist()
    assert bits(difference) == (level[:, 1:] > level[:, :-1]).ravel().tolist()


def bits(value):
    return [bool(int(value) >> (63 - place) & 1) for place in range(64)]


@settings(max_examples=30)
@given(arrays(np.uint64, st.integers(1, 9)), arrays(np.uint64, st.integers(1, 9)))
def test_distances_count_differing_bits(one, other):
    expected = [[bin(int(a) ^ int(b)).count("1") for b in other] for a in one]
    assert distances(one, other).tolist() == expected


def test_distances_without_the_function_of_numpy_2(monkeypatch):
    values = np.random.default_rng(0).integers(0, 2**64, (2, 30), np.uint64)
    expected = distances(*values)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert np.array_equal(distances(*values), expected)


def test_all_pairs_are_found_in_blocks_of_any_size():
    """Planted: a mirrored copy, and one of which three bits of one hash and one of the other differ."""
    prints = np.random.default_rng(0).integers(0, 2**64, (70, 8, 2), np.uint64)
    prints[60, 4] = prints[3, 0]
    prints[69, 0] = prints[12, 0] ^ np.array([0b1011, 0b100], np.uint64)
    for block in (1, 7, 256):
        assert sorted(alike(prints, 3, block)) == [(3, 60, 0, 4), (12, 69, 3, 0)]
    assert list(alike(prints, 2)) == [(3, 60, 0, 4)] and list(alike(prints[:0], 64)) == []


DEGRADED = {
    "JPEG quality 30": lambda image: jpeg(image, 30),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "20 levels brighter": lambda image: image.point(lambda level: min(255, level + 20)),
    "blurred": lambda image: blurred(image, 2),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "turned left": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "turned right": lambda image: image.transpose(Image.Transpose.ROTATE_270),
    "turned around": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "transposed": lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    "transversed": lambda image: image.transpose(Image.Transpose.TRANSVERSE),
}


@pytest.fixture(scope="module")
def prints():
    return {name: hashes(thumbnail(photo)) for name, photo in PHOTOS.items()}


@pytest.mark.parametrize("change", DEGRADED)
def test_copies_are_duplicates(prints, change):
    """16 (brightened) or 17 of 17 within the threshold, and all within that for probable ones."""
    apart = [
        next(alike(np.stack([prints[name], hashes(thumbnail(DEGRADED[change](photo)))]), 64))[2]
        for name, photo in PHOTOS.items()
    ]
    assert sum(bits <= LIMITS.of("D030", "same") for bits in apart) >= 16
    assert max(apart) <= LIMITS.of("D030", "likely")


def test_different_photographs_are_no_duplicates(prints):
    """The nearest of 136 pairs in 8 orientations are 22 bits apart; the stereo pair of motorcycles are near."""
    found = sorted(pair[2] for pair in alike(np.stack(list(prints.values())), 64))
    assert len(found) == 136 and found[0] > 2 * LIMITS.of("D030", "likely")


def test_what_has_no_contrast_has_no_hash():
    assert hashes(Image.new("RGB", (128, 128), "white")) is None
    assert hashes(Image.fromarray(np.full((128, 128), 77, np.uint8) + np.eye(128, dtype=np.uint8))) is None


# ---------------------------------------------------------------- quality


def grey(name):
    return middle(PHOTOS[name])


def test_the_middle_of_a_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3), np.uint8))
    assert np.array_equal(middle(image), np.asarray(image.crop((194, 94, 706, 606)).convert("L")))
    assert middle(image, 0.5).shape == (320, 448)
    half = np.asarray(image.convert("L").resize((450, 350), Image.Resampling.BICUBIC), float)
    assert np.abs(middle(image, 0.5) - half[15:335, 1:449]).mean() < 3
    assert middle(Image.new("RGB", (5, 70))).shape == (64, 5)


@pytest.mark.parametrize("name", ["coffee.png", "moon.png"])
def test_sharpness_is_the_variance_of_the_laplacian(name):
    levels = grey(name)
    assert scores.sharpness(levels) == pytest.approx(skimage.filters.laplace(levels)[1:-1, 1:-1].var(), rel=1e-4)


@pytest.mark.parametrize("sigma", [2, 5, 15, 30])
def test_noise_is_estimated(sigma):
    """On a plain area as much as was added, on a photograph that and its own; the formula is the published one."""
    noise = np.random.default_rng(1).normal(0, sigma, (512, 512)).astype(np.float32)
    assert scores.noise(128 + noise) == pytest.approx(sigma, rel=0.03)
    photo = grey("flower.jpg")
    own, both = scores.noise(photo), scores.noise(photo + noise[: photo.shape[0]])
    assert math.hypot(own, sigma) * 0.98 < both < own + sigma
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]])
    response = np.abs(scipy.signal.convolve2d(photo, mask, "valid")).sum()
    height, width = photo.shape
    assert own == pytest.approx(math.sqrt(math.pi / 2) / (6 * (width - 2) * (height - 2)) * response, rel=1e-4)


def test_detail_tells_what_spectrum_noise_has():
    """Noise of equal energy everywhere has as much in an octave as the octave has frequencies: 4 to 1."""
    levels = np.random.default_rng(0).normal(128, 40, (512, 512)).astype(np.float32)
    ring = math.pi * (1 - 0.25), math.pi * (0.25 - 1 / 16)
    assert scores.detail(levels) == pytest.approx(ring[0] / ring[1], rel=0.02)
    assert scores.detail(np.full((256, 256), 9, np.float32)) == 1
    assert scores.detail(np.zeros((20, 20), np.float32)) == 1


@pytest.mark.parametrize(
    "change, least, most",
    [
        (lambda image: image, 0, 0),
        (lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS), 0, 0),
        (lambda image: jpeg(image, 75), 0, 0),
        (lambda image: jpeg(image, 30), 0, 1),
        (lambda image: blurred(image, 1), 13, 17),
        (lambda image: jpeg(blurred(image, 2), 75), 14, 17),
        (lambda image: enlarged(image), 14, 17),
        (lambda image: jpeg(enlarged(image), 90), 14, 17),
        (lambda image: jpeg(enlarged(image, 4), 30), 14, 17),
    ],
    ids="as is|half size|quality 75|quality 30|blur 1|blur 2, 75|enlarged 2|enlarged 2, 90|enlarged 4, 30".split("|"),
)
def test_detail_of_photographs(change, least, most):
    assert least <= firing("detail", change, below=LIMITS.of("D031", "detail")) <= most


@pytest.mark.parametrize(
    "change, least, most",
    [
        (lambda image: image, 0, 0),
        (lambda image: enlarged(image), 0, 0),
        (lambda image: enlarged(image, 4), 0, 0),
        (lambda image: jpeg(image, 90), 0, 2),
        (lambda image: jpeg(image, 75), 0, 5),
        (lambda image: jpeg(image, 30), 14, 17),
        (lambda image: jpeg(image, 30).crop((3, 5, *image.size)), 14, 17),
        (lambda image: jpeg(image, 10), 17, 17),
    ],
    ids="as is|enlarged 2|enlarged 4|quality 90|quality 75|quality 30|quality 30, cropped|quality 10".split("|"),
)
def test_blockiness_of_photographs(change, least, most):
    assert least <= firing("blockiness", change, above=LIMITS.of("D031", "blockiness")) <= most


def test_frames_are_no_blocks():
    page = Image.new("RGB", (512, 512), "white")
    for number in range(4):
        panel = CENTRES["coffee.png"].crop((number * 40, 0, number * 40 + 232, 232))
        page.paste(panel, (8 + number % 2 * 248, 8 + number // 2 * 248))
    assert scores.blockiness(middle(page)) < 1.15


def test_blur_does_not_matter_where_it_is_scaled_away():
    """An enlarged photograph that is trained at half its size has all the detail it needs."""
    big = enlarged(PHOTOS["retina.jpg"].resize((1024, 1024), Image.Resampling.LANCZOS))
    assert measure(big).detail < LIMITS.of("D031", "detail") < measure(big, 0.5).detail


def test_a_spread_that_one_picture_does_not_widen():
    values = np.array([5.0, 6, 7, 5, 6, 7, 6, 60])
    assert scores.robust_z(values)[-1] > 30 and abs(scores.robust_z(values)[:-1]).max() < 1
    assert not scores.robust_z(values[:7]).any() and not scores.robust_z(np.ones(20)).any()


# ---------------------------------------------------------------- colours


def framed(photo, top=0, right=0, bottom=0, left=0, colour="white"):
    picture = Image.new("RGB", (photo.width + left + right, photo.height + top + bottom), colour)
    picture.paste(photo, (left, top))
    return picture


@pytest.mark.parametrize(
    "sides, part", [({}, 0), ({"top": 64, "bottom": 64}, 0.2), ({"left": 512, "top": 0}, 0.5), ({"right": 128}, 0.2)]
)
def test_plain_borders(sides, part):
    picture = framed(PHOTOS["astronaut.png"], **sides, colour="black")
    assert measure(picture).border == pytest.approx(part, abs=0.02)
    assert measure(jpeg(picture, 75)).border == pytest.approx(part, abs=0.02)


def test_borders_of_pictures_that_are_nothing_but_border():
    assert measure(Image.new("RGB", (300, 300), "red")).border == 1


@pytest.mark.parametrize("colour", ["white", "black", "grey"])
def test_backgrounds(colour):
    small = PHOTOS["astronaut.png"].resize((200, 200))
    assert measure(framed(small, 90, 90, 0, 90, colour)).background == colour
    assert measure(framed(small, 90, 90, 0, 90, "lightblue")).background is None


def test_photographs_have_no_borders_but_some_a_plain_background():
    figures = {name: measure(photo) for name, photo in PHOTOS.items()}
    assert not [name for name, each in figures.items() if each.border > LIMITS.of("D024")]
    plain = {name: each.background for name, each in figures.items() if each.background}
    assert plain == {"hubble_deep_field.jpg": "black", "retina.jpg": "black", "moon.png": "grey", "color.png": "black"}
    colourless = {name for name, each in figures.items() if each.saturation < LIMITS.of("T040")}
    assert colourless == {name for name in PHOTOS if Image.open(_file(name)).mode == "L"}


def _file(name):
    return SKIMAGE / name if (SKIMAGE / name).exists() else SKLEARN / name


def test_transparency_is_noticed_and_laid_onto_white():
    picture = PHOTOS["chelsea.png"].copy()
    picture.putalpha(255)
    assert measure(picture).opaque and measure(PHOTOS["chelsea.png"]).opaque
    picture.paste((0, 0, 0, 0), (0, 0, picture.width, 40))
    figures, white = measure(picture), PHOTOS["chelsea.png"].copy()
    white.paste("white", (0, 0, white.width, 40))
    assert not figures.opaque and figures.digest != measure(white).digest
    assert figures.border == measure(white).border > 0.1


def test_the_digest_is_that_of_the_pixels(tmp_path):
    photo = PHOTOS["chelsea.png"]
    for name in ("a.png", "b.bmp"):
        photo.save(tmp_path / name)
    one, other = (measure(Image.open(tmp_path / name)) for name in ("a.png", "b.bmp"))
    assert one.digest == other.digest != measure(noisy(photo, 1)).digest
