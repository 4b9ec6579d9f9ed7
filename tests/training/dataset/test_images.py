"""Image files: headers, upright pictures, colours, and files that are not what they seem.

Colours are checked against closed forms: the profiles, the chunks and the 16-bit files are written here byte by byte.
"""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn
from PIL import Image, ImageCms, ImageFile

from lora_loom.training.dataset.images import decode, decode_mask, image_types, read_header, upright

ORIENTATION = 0x0112
PHOTO = Image.open(Path(sklearn.__file__).parent / "datasets" / "images" / "flower.jpg").convert("RGB")
PHOTO.info.clear()  # it has a profile
MOTORCYCLE = Path(skimage.__file__).parent / "data" / "motorcycle_left.png"
SMALL = PHOTO.resize((64, 40), Image.Resampling.BICUBIC)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a[::-1].swapaxes(0, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: a[:, ::-1].swapaxes(0, 1),
}  # what the Exif standard says of the stored rows and columns
LOSSLESS = {"webp": {"lossless": True, "exact": True}}


def put(folder, name, image=SMALL, **options):
    path = folder / name
    image.save(path, **options)
    return path


def translucent():
    """The photograph with an alpha channel of all levels."""
    picture = SMALL.copy()
    picture.putalpha(PHOTO.convert("L").resize(picture.size))
    return picture


def exif(orientation):
    data = Image.Exif()
    data[ORIENTATION] = orientation
    return data


def array(image):
    return np.asarray(image).astype(np.int16)


# ---------------------------------------------------------------- upright


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "avif"])
def test_every_orientation_in_every_format(tmp_path, kind, orientation):
    path = put(tmp_path, f"a.{kind}", exif=exif(orientation))
    stored = Image.open(put(tmp_path, f"plain.{kind}")).convert("RGB")
    expected = UPRIGHT[orientation](np.asarray(stored))
    header = read_header(path)
    assert (header.height, header.width) == expected.shape[:2] and header.orientation == orientation
    assert np.array_equal(np.asarray(decode(path)), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["png", "webp", "tiff"])
def test_alpha_turns_with_the_picture_and_keeps_hidden_colours(tmp_path, kind, orientation):
    path = put(tmp_path, f"a.{kind}", translucent(), exif=exif(orientation), **LOSSLESS.get(kind, {}))
    assert np.array_equal(np.asarray(decode(path)), UPRIGHT[orientation](np.asarray(translucent())))
    assert read_header(path).transparent


def test_orientation_behind_a_png_s_pixels_and_in_xmp(tmp_path):
    late = insert(put(tmp_path, "late.png"), b"eXIf", exif(6).tobytes()[6:], before=b"IEND")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    by_xmp = put(tmp_path, "xmp.jpg", xmp=xmp)
    for path, orientation in ((late, 6), (by_xmp, 8)):
        assert (read_header(path).width, read_header(path).height) == (40, 64)
        stored = np.asarray(Image.open(path).convert("RGB"))
        assert np.array_equal(np.asarray(decode(path)), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("damage", [b"Exif\0\0no TIFF at all", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(9).tobytes()])
def test_damaged_metadata_is_no_obstacle(tmp_path, damage):
    path = put(tmp_path, "a.jpg", exif=damage)
    assert read_header(path).orientation == 1
    assert decode(path).size == (64, 40)


# ---------------------------------------------------------------- headers


@pytest.mark.parametrize("kind", sorted(kind for kind in image_types()))
def test_a_header_of_every_type(tmp_path, kind):
    path = put(tmp_path, f"a{kind}", format=Image.registered_extensions()[kind])
    header = read_header(path)
    assert (header.width, header.height, header.animated, header.bits) == (64, 40, False, 8)
    assert header.format == Image.registered_extensions()[kind] and not header.transparent
    assert (header.jpeg_quality is not None) == (header.format == "JPEG")
    assert np.abs(array(decode(path)) - array(SMALL)).mean() < 14  # a palette of 256 colours is the worst


def test_everything_common_is_supported():
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"} <= image_types()


def test_the_quality_of_a_jpeg_is_read_from_its_tables(tmp_path):
    for quality in range(1, 101):
        assert read_header(put(tmp_path, "a.jpg", quality=quality)).jpeg_quality == quality
    assert read_header(put(tmp_path, "grey.jpg", SMALL.convert("L"), quality=61)).jpeg_quality == 61


@pytest.mark.parametrize("mode, bits", [("1", 1), ("L", 8), ("P", 8), ("RGB", 8), ("I;16", 16)])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_modes_and_bits(tmp_path, kind, mode, bits):
    picture = Image.fromarray(np.zeros((8, 8), np.uint16)) if mode == "I;16" else SMALL.convert(mode)
    header = read_header(put(tmp_path, f"a.{kind}", picture))
    assert (header.mode, header.bits) == (mode, bits)


def test_bits_of_few_bit_files(tmp_path):
    assert read_header(put(tmp_path, "palette.png", SMALL.quantize(4))).bits == 8
    assert read_header(put(tmp_path, "grey.png", SMALL.convert("L"), bits=4)).bits == 4


@pytest.mark.parametrize("bits, flags", [(8, 0x00), (10, 0x40), (12, 0x60)])
def test_bits_of_avif(tmp_path, bits, flags):
    """The header tells twice: in the codec's configuration and in the pixel information."""
    data = bytearray(put(tmp_path, "a.avif").read_bytes())
    place = data.index(b"av1C") + 6
    data[place] = data[place] & 0x1F | flags
    place = data.index(b"pixi") + 9
    data[place : place + 3] = bytes([bits] * 3)
    (tmp_path / "a.avif").write_bytes(data)
    assert read_header(tmp_path / "a.avif").bits == bits


@pytest.mark.parametrize("kind, options", [("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("avif", {})])
def test_an_animation_is_its_first_frame(tmp_path, kind, options):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    path = put(tmp_path, f"a.{kind}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert read_header(path).animated
    assert np.abs(array(decode(path).convert("RGB")) - [255, 0, 0]).max() <= 2


def test_a_phone_s_jpeg_with_a_second_picture_in_it_is_a_jpeg(tmp_path):
    path = put(tmp_path, "a.jpg", format="MPO", save_all=True, append_images=[SMALL.resize((32, 20))])
    header = read_header(path)
    assert (header.format, header.animated, header.width) == ("JPEG", False, 64) and header.jpeg_quality is not None
    assert decode(path, (16, 10)).size == (16, 10)


def test_a_header_is_read_without_the_pixels(tmp_path):
    path = put(tmp_path, "a.png", PHOTO)
    data = path.read_bytes()
    place = data.index(b"IDAT") + 4
    path.write_bytes(data[:place] + bytes(1000) + data[place + 1000 :])
    assert (read_header(path).width, read_header(path).height) == PHOTO.size
    with pytest.raises(OSError):
        decode(path)


@pytest.mark.parametrize("kind", sorted(image_types()))
def test_nothing_stays_open(tmp_path, kind):
    path = put(tmp_path, f"a{kind}", format=Image.registered_extensions()[kind])
    before = os.listdir("/dev/fd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = read_header(path), decode(path), upright(path)
    assert len(os.listdir("/dev/fd")) == len(before) and len(kept) == 3


# ---------------------------------------------------------------- depth, palettes, transparency


def write_png(path, levels, colour, chunks=()):
    """A 16-bit PNG of (height, width, channels) levels; ``colour`` is the type: 0 grey, 2 RGB, 4 grey+A, 6 RGBA."""
    height, width = levels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def insert(path, kind, body, before=b"IDAT"):
    """The PNG with one more chunk."""
    data = path.read_bytes()
    place = data.index(before) - 4
    path.write_bytes(data[:place] + chunk(kind, body) + data[place:])
    return path


ALL_LEVELS = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_all_levels_of_sixteen_bit_grey_are_rounded(tmp_path, kind):
    path = put(tmp_path, f"a.{kind}", Image.fromarray(ALL_LEVELS), exif=exif(8))
    assert read_header(path).bits == 16
    expected = (2 * ALL_LEVELS.astype(np.int64) + 257) // 514  # round(v / 257)
    assert np.array_equal(np.asarray(decode(path)), UPRIGHT[8](np.repeat(expected[..., None], 3, 2)))
    assert np.array_equal(np.asarray(decode_mask(path)), UPRIGHT[8](expected))


def test_a_transparent_level_of_sixteen_bit_grey(tmp_path):
    path = write_png(tmp_path / "a.png", ALL_LEVELS[..., None], 0, [(b"tRNS", struct.pack(">H", 1000))])
    assert read_header(path).transparent
    assert np.array_equal(np.asarray(decode(path))[..., 3], np.where(ALL_LEVELS == 1000, 0, 255))


@pytest.mark.parametrize("colour, channels", [(2, 3), (6, 4), (4, 2)])
def test_sixteen_bit_colour_is_at_most_one_level_off(tmp_path, colour, channels):
    levels = np.random.default_rng(0).integers(0, 65536, (64, 64, channels)).astype(np.uint16)
    path = write_png(tmp_path / "a.png", levels, colour)
    assert read_header(path).bits == 16
    expected = np.round(levels / 257)
    if channels == 2:
        expected = expected[..., [0, 0, 0, 1]]
    assert np.abs(array(decode(path)) - expected).max() <= 1


def test_a_transparent_colour_of_sixteen_bits(tmp_path):
    levels = np.full((8, 8, 3), 40000, np.uint16)
    levels[:, :4] = 65535, 0, 3000
    path = write_png(tmp_path / "a.png", levels, 2, [(b"tRNS", struct.pack(">HHH", 65535, 0, 3000))])
    assert np.array_equal(np.asarray(decode(path))[0, :, 3], [0] * 4 + [255] * 4)


def test_palettes_and_transparent_colours(tmp_path):
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([1, 2, 3, 100, 110, 120])
    palette.paste(0, (0, 0, 4, 8))
    cases = {
        "one": put(tmp_path, "one.png", palette, transparency=0),
        "levels": put(tmp_path, "levels.png", palette, transparency=bytes([77, 255])),
        "gif": put(tmp_path, "a.gif", palette, transparency=0),
        "key": put(tmp_path, "key.png", palette.convert("RGB"), transparency=(1, 2, 3)),
    }
    for name, path in cases.items():
        assert read_header(path).transparent, name
        pixels = np.asarray(decode(path))
        assert (pixels[:, :4, 3] == (77 if name == "levels" else 0)).all() and (pixels[:, 4:, 3] == 255).all(), name
        assert (pixels[:, 4:, :3] == [100, 110, 120]).all(), name
        if name != "gif":
            assert (pixels[:, :4, :3] == [1, 2, 3]).all(), name
    opaque = read_header(put(tmp_path, "opaque.png", palette, transparency=bytes([255, 255])))
    assert not opaque.transparent
    grey = put(tmp_path, "la.png", translucent().convert("LA"))
    assert np.array_equal(np.asarray(decode(grey)), np.asarray(translucent().convert("LA"))[..., [0, 0, 0, 1]])
    bits = put(tmp_path, "bits.png", SMALL.convert("1"))
    assert set(np.unique(np.asarray(decode(bits)))) == {0, 255} and decode(bits).mode == "RGB"


def test_pixels_of_unknown_range_are_refused(tmp_path):
    """At the header, so that they can be skipped when a folder is opened."""
    path = put(tmp_path, "a.tiff", Image.fromarray(np.ones((8, 8), np.float32)))
    with pytest.raises(ValueError, match="32 bits, of unknown range"):
        read_header(path)
    with pytest.raises(ValueError, match="CIELAB"):
        read_header(put(tmp_path, "lab.tiff", Image.new("LAB", (8, 8))))


# ---------------------------------------------------------------- CMYK


def inks(*parts):
    return Image.new("CMYK", (32, 32), tuple(round(255 * part) for part in parts))


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0.3, 0.9, 0.1, 0.2), (0.5, 0.5, 0.5, 0.5)])
@pytest.mark.parametrize("kind", ["tiff", "jpg"])
def test_inks_without_a_profile(tmp_path, kind, ink):
    """JPEGs hold them inverted, as Adobe does."""
    path = put(tmp_path, f"a.{kind}", inks(*ink), **({"quality": 100} if kind == "jpg" else {}))
    expected = 255 * (1 - np.array(ink[:3])) * (1 - ink[3])
    assert np.abs(array(decode(path)) - expected).max() <= 2
    assert read_header(path).mode == "CMYK"


def test_ycck(tmp_path):
    """The same file with its Adobe marker saying that the first three are Y, Cb and Cr."""
    path = put(tmp_path, "a.jpg", inks(0.4, 0.45, 0.55, 0.2), quality=100)
    data = bytearray(path.read_bytes())
    data[data.index(b"Adobe") + 11] = 2
    path.write_bytes(data)
    y, cb, cr = 255 - np.round(255 * np.array([0.4, 0.45, 0.55]))  # as stored: inverted
    rgb = y + np.array([1.402 * (cr - 128), -0.344136 * (cb - 128) - 0.714136 * (cr - 128), 1.772 * (cb - 128)])
    # YCCK holds 255 − CMY as RGB, and Adobe holds CMYK inverted
    expected = (255 - rgb) * (1 - 0.2)
    assert np.abs(array(decode(path)) - expected).max() <= 3


# ---------------------------------------------------------------- gamma and profiles


def encoded(light):
    """sRGB's transfer function, IEC 61966-2-1."""
    light = np.clip(light, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("gamma", [1.0, 1 / 1.8, 0.3])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_png_s_gamma(tmp_path, mode, gamma):
    picture = translucent().convert(mode)
    path = insert(put(tmp_path, "a.png", picture), b"gAMA", struct.pack(">I", round(gamma * 100000)))
    exact = round(gamma * 100000) / 100000
    expected = np.round(encoded((np.asarray(picture.convert("RGB")) / 255) ** (1 / exact)))
    result = np.asarray(decode(path))
    assert np.array_equal(result[..., :3], expected)
    if mode == "RGBA":
        assert np.array_equal(result[..., 3], np.asarray(picture)[..., 3])
    assert np.array_equal(np.asarray(decode_mask(path)), np.asarray(picture.convert("RGB"))[..., 0])


def test_gamma_of_sixteen_bits_is_exact(tmp_path):
    path = write_png(tmp_path / "a.png", ALL_LEVELS[..., None], 0, [(b"gAMA", struct.pack(">I", 100000))])
    assert np.array_equal(np.asarray(decode(path))[..., 0], np.round(encoded(ALL_LEVELS / 65535)))


@pytest.mark.parametrize("case", ["2.2", "marked", "zero"])
def test_a_gamma_that_changes_nothing(tmp_path, case):
    path = insert(put(tmp_path, "a.png"), b"gAMA", struct.pack(">I", {"2.2": 45455, "marked": 100000, "zero": 0}[case]))
    if case == "marked":
        insert(path, b"sRGB", b"\0")
    assert np.array_equal(np.asarray(decode(path)), np.asarray(SMALL))


WHITE = np.array([0.9642, 1.0, 0.8249])  # D50
SRGB = np.array([[0.43607, 0.38506, 0.14308], [0.22250, 0.71688, 0.06062], [0.01393, 0.09710, 0.71417]])
WIDE = np.array([[0.7977, 0.1352, 0.0313], [0.2880, 0.7119, 0.0001], [0.0, 0.0, 0.8249]])  # ProPhoto's


def fixed(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def profile(space, pcs, kind, tags):
    """An ICC profile of version 2."""
    table, body, place = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", place + len(body), len(data))
        body += data
    head = bytes(4) + struct.pack(">I", 0x02400000) + kind + space + pcs + bytes(12) + b"acsp" + bytes(28)
    head += fixed(*WHITE)
    head = struct.pack(">I", place + len(body)) + head
    return head.ljust(128, b"\0") + table + body


def curve(gamma):
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def matrix_profile(matrix, gamma):
    tags = {name: b"XYZ " + bytes(4) + fixed(*matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(b"RGB ", b"XYZ ", b"mntr", tags | {b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE)})


def to_srgb(levels, matrix, gamma):
    light = (np.asarray(levels) / 255.0) ** gamma
    return encoded(light @ matrix.T @ np.linalg.inv(SRGB).T)


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("matrix, gamma", [(WIDE, 1.8008), (SRGB, 1.0), (WIDE, 2.19921875)])
def test_a_profile_is_applied(tmp_path, kind, matrix, gamma):
    gamma = round(gamma * 256) / 256
    path = put(tmp_path, f"a.{kind}", icc_profile=matrix_profile(matrix, gamma), **LOSSLESS.get(kind, {}))
    stored = np.asarray(Image.open(path).convert("RGB"))
    expected = to_srgb(stored, matrix, gamma)
    assert np.abs(expected - stored).mean() > 5
    difference = np.abs(array(decode(path)) - expected)
    assert difference.max() <= 2 and difference.mean() < 0.5


def test_a_profile_leaves_alpha_and_masks_alone(tmp_path):
    path = put(tmp_path, "a.png", translucent(), icc_profile=matrix_profile(WIDE, 1.0), exif=exif(6))
    result, stored = array(decode(path)), UPRIGHT[6](np.asarray(translucent()))
    assert np.array_equal(result[..., 3], stored[..., 3])
    assert np.abs(result[..., :3] - to_srgb(stored[..., :3], WIDE, 1.0)).max() <= 2
    assert np.array_equal(np.asarray(decode_mask(path)), stored[..., 0])


@pytest.mark.parametrize("mode", ["L", "LA"])
@pytest.mark.parametrize("space", ["grey", "colour"])
def test_a_grey_picture_with_a_profile(tmp_path, mode, space):
    if space == "grey":
        tags = {b"kTRC": curve(1.0), b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE)}
        data = profile(b"GRAY", b"XYZ ", b"mntr", tags)
    else:
        data = matrix_profile(WIDE, 1.0)
    picture = translucent().convert(mode)
    path = put(tmp_path, "a.png", picture, icc_profile=data)
    grey = np.asarray(picture.getchannel(0))
    assert np.abs(array(decode(path))[..., :3] - encoded(grey / 255)[..., None]).max() <= 2


def test_an_ink_profile(tmp_path):
    """A table of 2⁴ colours in CIELAB, from white to black: at its corners the colour is the table's entry."""
    corners = np.random.default_rng(1).uniform([35, -15, -15], [75, 15, 15], (16, 3))
    corners[0], corners[15] = (100, 0, 0), (0, 0, 0)
    entries = np.round(corners * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8)
    straight = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    table += straight * 4 + entries.tobytes() + straight * 3
    data = profile(b"CMYK", b"Lab ", b"prtr", {b"A2B0": table, b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE)})
    for corner in range(16):
        ink = [float(corner >> (3 - channel) & 1) for channel in range(4)]
        path = put(tmp_path, f"{corner}.tiff", inks(*ink), icc_profile=data)
        light, a, b = entries[corner] / [2.55, 1, 1] - [0, 128, 128]
        f = np.array([(light + 16) / 116 + a / 500, (light + 16) / 116, (light + 16) / 116 - b / 200])
        xyz = WHITE * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
        assert np.abs(array(decode(path))[0, 0] - encoded(np.linalg.inv(SRGB) @ xyz)).max() <= 3


@pytest.mark.parametrize("case", ["srgb", "own sRGB", "damaged", "for inks"])
def test_a_profile_that_changes_nothing(tmp_path, case):
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*WHITE)}
    data = {
        "srgb": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        "own sRGB": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes() + bytes(16),
        "damaged": matrix_profile(WIDE, 1.0)[:150],
        "for inks": profile(b"CMYK", b"Lab ", b"prtr", tags),
    }[case]
    path = put(tmp_path, "a.png", icc_profile=data)
    assert np.array_equal(np.asarray(decode(path)), np.asarray(SMALL))


# ---------------------------------------------------------------- decoding smaller


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_is_decoded_no_smaller_than_needed(tmp_path, orientation):
    path = put(tmp_path, "a.jpg", PHOTO.resize((801, 533)), exif=exif(orientation), quality=95)
    turned = orientation == 6

    def size(least):
        result = decode(path, least[::-1] if turned else least).size
        return result[::-1] if turned else result

    assert size((801, 533)) == size((401, 200)) == size((2000, 10)) == (801, 533)
    assert size((400, 266)) == (401, 267) and size((100, 66)) == (101, 67) and size((1, 1)) == (101, 67)
    assert upright(path, (50, 50))[1] == ((533, 801) if turned else (801, 533))


def test_a_smaller_decoded_jpeg_shows_the_same(tmp_path):
    path = put(tmp_path, "a.jpg", PHOTO.resize((800, 533)), quality=95)
    full = decode(path).reduce(2)
    half = decode(path, (400, 266)).crop((0, 0, *full.size))
    assert np.abs(array(half) - array(full)).mean() < 1


# ---------------------------------------------------------------- files that are not what they seem


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("part", [0.3, 0.9, 0.995])
@pytest.mark.parametrize("kind", ["png", "jpg", "progressive", "webp", "gif", "tiff", "lzw", "bmp", "avif"])
def test_a_file_cut_short_is_an_error_whatever_pillow_is_set_to(tmp_path, monkeypatch, kind, part, tolerant):
    options = {"progressive": {"progressive": True}, "lzw": {"compression": "tiff_lzw"}}.get(kind, {})
    extension = {"progressive": "jpg", "lzw": "tiff"}.get(kind, kind)
    path = put(tmp_path, f"a.{extension}", PHOTO.resize((200, 150)), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    with pytest.raises((OSError, ValueError)):
        decode(path)


@pytest.mark.parametrize("tolerant", [False, True])
def test_a_damaged_png_is_an_error_whatever_pillow_is_set_to(tmp_path, monkeypatch, tolerant):
    data = put(tmp_path, "a.png", PHOTO).read_bytes()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    draw = np.random.default_rng(0)
    for place in draw.integers(100, len(data) - 30, 12):
        (tmp_path / "b.png").write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(OSError):
            decode(tmp_path / "b.png")


def test_a_png_cut_short_is_found_by_its_header(tmp_path):
    path = put(tmp_path, "a.png", PHOTO)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(OSError, match="it is truncated: its end is missing"):
        read_header(path)


@pytest.mark.parametrize("part", [0.6, 0.995])
@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a.avif", "a.gif", "a.bmp", "a.tiff"])
def test_a_file_cut_short_is_found_when_it_is_opened(tmp_path, name, part):
    """So that it can be left out then."""
    path = put(tmp_path, name, PHOTO)
    header = read_header(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    with pytest.raises((OSError, ValueError)):
        read_header(path)
    path.write_bytes(data + bytes(5000))  # something behind the end is no harm
    assert read_header(path) == header


def test_settings_of_pillow_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345678)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    decode(put(tmp_path, "a.png"))
    assert Image.MAX_IMAGE_PIXELS == 12345678 and ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize(
    "data, what",
    [
        (b"", "it is empty, 0 bytes"),
        (bytes(5000), "it is filled with zeros"),
        (b"\xef\xbb\xbf\n <!DOCTYPE html><html>", "it is an HTML page"),
        (b"<HTML><body>404", "it is an HTML page"),
        (b'<?xml version="1.0"?><svg>', "it is an XML file"),
        (b'{"error": "not found"}', "it is a JSON text"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "it is a Git LFS pointer"),
        (b"PK\x03\x04\x14\0", "it is a zip archive"),
        (b"%PDF-1.7", "it is a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "it is an HEIC picture"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "it is a video"),
        (b"\x1a\x45\xdf\xa3\x01\0", "it is a video"),
        (b"RIFF\0\0\0\0AVI LIST", "it is a video"),
        (b"8BPS\0\x01", "it is a Photoshop file"),
        (b"\xff\x0a\xfa\x1f", "it is a JPEG XL picture"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "its header is damaged or cut short"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "its header is damaged or cut short"),
        (b"just a caption", "it is a text"),
        (b"\x80\x02}q\x00", "it is no image of a supported type"),
    ],
)
def test_what_is_no_image_is_called_by_its_name(tmp_path, data, what):
    (tmp_path / "a.png").write_bytes(data)
    for read in (read_header, decode):
        with pytest.raises((ValueError, OSError)) as caught:
            read(tmp_path / "a.png")
        assert str(caught.value).startswith(what)


def test_an_image_is_told_by_its_content(tmp_path):
    path = put(tmp_path, "a.png", format="WEBP", lossless=True)
    assert read_header(path).format == "WEBP"
    assert np.array_equal(np.asarray(decode(path)), np.asarray(SMALL))


def test_other_types_that_pillow_knows_are_not_opened(tmp_path):
    for kind, code in (("tga", "TGA"), ("eps", "EPS"), ("ico", "ICO"), ("ppm", "PPM")):
        with pytest.raises(ValueError, match="it is "):
            read_header(put(tmp_path, f"{kind}.png", SMALL, format=code))


@pytest.mark.parametrize("limit", [None, 10**12, 89_478_485])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    data = put(tmp_path, "a.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + data[24:29]
    (tmp_path / "a.png").write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])
    for read in (read_header, decode):
        with pytest.raises(ValueError, match="it has too many pixels: "):
            read(tmp_path / "a.png")


# ---------------------------------------------------------------- what others get wrong


def test_the_naive_way_fails_where_this_one_does_not(tmp_path):
    """Open and convert to RGB: sideways photographs, hidden colours shown, 16-bit grey all white."""

    def naive(path):
        return array(Image.open(path).convert("RGB"))

    sideways = put(tmp_path, "sideways.jpg", exif=exif(6))
    assert naive(sideways).shape != array(decode(sideways)).shape
    hidden = put(tmp_path, "hidden.png", Image.new("RGBA", (8, 8), (255, 0, 0, 0)))
    assert (naive(hidden) == [255, 0, 0]).all() and (array(decode(hidden))[..., 3] == 0).all()
    deep = put(tmp_path, "deep.png", Image.fromarray(np.full((8, 8), 20000, np.uint16)))
    assert (naive(deep) == 255).all() and (array(decode(deep)) == 78).all()


def test_a_photograph_comes_as_it_is():
    assert np.array_equal(np.asarray(decode(MOTORCYCLE)), np.asarray(Image.open(MOTORCYCLE).convert("RGB")))
