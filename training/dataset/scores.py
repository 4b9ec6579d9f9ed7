"""What a picture looks like in a few numbers: hashes that find duplicates, and signs of poor quality.

- ``hashes``: difference hash and cosine hash (DCT), 64 bits each, in all eight orientations of the picture
- ``distances``: how far hashes are apart, all against all, in blocks
- sharpness: variance of the Laplacian; detail: energy of fine waves over that of waves twice as long
- blockiness: steps on an 8×8 grid, wherever it begins; noise: Immerkær's σ, in levels of 255
- plain borders, a plain background and its colour, saturation

Sharpness and detail look at the middle of the picture at the size it is trained at: what is lost in shrinking does no
harm. Blockiness and noise look at its own pixels. The radius that holds 99.9 % of the energy, which synthetic pictures
recommend, misses enlarged photographs (median 0.61 at twice the size, where a threshold of 0.5 was to tell); the
energies of neighbouring octaves find 15 of 17.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image

CROP = 512  # pixels of a side that the quality scores look at
THUMB = 128  # pixels of the short side, about, that everything else looks at
ROUNDING = 1 / 12  # variance that rounding to whole levels adds to each pixel
OCTAVES = 5
FINEST = 2  # octaves that are compared with the next
FAINT = 4.0  # an octave below so many times the energy of rounding tells nothing
PLAIN = 10  # levels of 255 that a plain area may vary by
CONTRAST = 2.0  # standard deviation in levels; flatter thumbnails have no meaningful hash


@dataclass(frozen=True)
class Scores:
    """Figures of one picture; see the functions of the same names."""

    digest: bytes  # of the decoded pixels
    hashes: np.ndarray | None  # (8 orientations, 2 hashes) uint64; None for a picture without contrast
    sharpness: float
    detail: float
    blockiness: float
    noise: float
    border: float
    saturation: float
    background: str | None  # white, black, grey, or none that is plain
    opaque: bool


def measure(image: Image.Image, scale: float = 1.0) -> Scores:
    """All figures of an upright RGB or RGBA picture that is trained at ``scale`` times its size."""
    opaque = image.mode != "RGBA" or image.getchannel("A").getextrema()[0] == 255
    pixels = hashlib.sha256(np.ascontiguousarray(image).data)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    small = thumbnail(image)
    colours = np.asarray(small, np.int16)
    own = middle(image)
    trained = middle(image, scale) if scale < 1 else own
    return Scores(
        digest=repr(image.size).encode() + pixels.digest(),
        hashes=hashes(small),
        sharpness=sharpness(trained),
        detail=detail(trained),
        blockiness=blockiness(own),
        noise=noise(own),
        border=border(colours),
        saturation=saturation(colours),
        background=background(colours),
        opaque=opaque,
    )


def thumbnail(image: Image.Image) -> Image.Image:
    """The picture with a short side of about 128, mirrored the same as its mirror image is."""
    factor = max(1, min(image.size) // THUMB)
    small = (max(1, image.width // factor), max(1, image.height // factor))
    return image.resize(small, Image.Resampling.BOX, reducing_gap=2.0)


def middle(image: Image.Image, scale: float = 1.0) -> np.ndarray:
    """Grey levels of the middle of the picture, at most 512 × 512 and sides of 64·n where that is possible."""
    width, height = (_whole_steps(round(side * scale)) for side in image.size)
    region = min(image.width, round(width / scale)), min(image.height, round(height / scale))
    left, top = ((side - inner) // 2 for side, inner in zip(image.size, region, strict=True))
    grey = image.crop((left, top, left + region[0], top + region[1])).convert("L")
    if scale != 1:
        grey = grey.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(grey, np.float32)


def _whole_steps(side: int) -> int:
    return min(CROP, side // 64 * 64) if side >= 64 else max(1, side)


# -- hashes


def hashes(image: Image.Image) -> np.ndarray | None:
    """(8, 2) uint64: difference hash and cosine hash of the picture and its mirrored and turned copies.

    Row 0 is the picture itself. Both hashes look at the picture squeezed into a square of 32 × 32.
    """
    square = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    if square.std() < CONTRAST:
        return None
    both = (square, square.T)
    turned = np.stack([version[::down, ::across] for version in both for down in (1, -1) for across in (1, -1)])
    rows, columns = _means(8), _means(9)
    levels = rows @ turned @ columns.T
    differences = levels[:, :, 1:] > levels[:, :, :-1]
    waves = _cosines() @ turned @ _cosines().T
    strong = waves > np.median(waves, axis=(1, 2), keepdims=True)
    bits = np.stack([differences.reshape(8, 64), strong.reshape(8, 64)], axis=1)
    return np.packbits(bits, axis=-1).view(">u8")[..., 0].astype(np.uint64)


@lru_cache(maxsize=2)
def _means(count: int) -> np.ndarray:
    """(count, 32): weights of the means over ``count`` equal parts of 32 pixels."""
    edges = np.arange(33) * count / 32
    starts = np.arange(count)[:, None]
    overlap = np.minimum(edges[1:], starts + 1) - np.maximum(edges[:-1], starts)
    return np.clip(overlap, 0, None)


@lru_cache(maxsize=1)
def _cosines() -> np.ndarray:
    """(8, 32): the eight lowest waves of the DCT-II over 32 pixels."""
    return np.cos(np.pi * np.arange(8)[:, None] * (np.arange(32) + 0.5) / 32)


def distances(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(n, m) Hamming distances of (n,) and (m,) hashes."""
    return _bits_set(one[:, None] ^ other)


_OF_BYTE = np.array([bin(value).count("1") for value in range(256)], np.uint8)


def _bits_set(values: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):  # NumPy 2
        return np.bitwise_count(values)
    parts = values[..., None].view(np.uint8)
    return _OF_BYTE[parts].sum(-1, dtype=np.uint8)


def alike(prints: np.ndarray, limit: int, block: int = 256) -> Iterator[tuple[int, int, int, int]]:
    """(first, second, distance, orientation) of all pairs of (n, 8, 2) hashes that are at most ``limit`` apart.

    The distance of a pair is the larger of both hashes' distances, at the orientation where that is smallest; 0 is the
    picture as it is.
    """
    for start in range(0, len(prints), block):
        upright = prints[start : start + block, 0]
        rest = prints[start:]
        best = np.full((len(upright), len(rest)), 65, np.uint8)
        turn = np.zeros_like(best)
        for orientation in range(8):
            apart = np.maximum(*(distances(upright[:, kind], rest[:, orientation, kind]) for kind in (0, 1)))
            turn[apart < best] = orientation
            best = np.minimum(best, apart)
        for first, second in np.argwhere(best <= limit):
            if second > first:
                yield start + int(first), start + int(second), int(best[first, second]), int(turn[first, second])


# -- quality


def sharpness(grey: np.ndarray) -> float:
    """Variance of the Laplacian: high where edges are sharp, and where there are many."""
    if min(grey.shape) < 3:
        return 0.0
    centre = grey[1:-1, 1:-1]
    return float((grey[1:-1, :-2] + grey[1:-1, 2:] + grey[:-2, 1:-1] + grey[2:, 1:-1] - 4 * centre).var())


def detail(grey: np.ndarray) -> float:
    """Energy of an octave of frequencies over that of the next coarser, the least of the finest ones that tell.

    A natural picture has nearly as much in the one as in the other, an enlarged or blurred one next to nothing in the
    finer. Compression adds to the finest octave, so the second counts too; octaves with no more energy than the
    rounding of levels do not count as the coarser one. 1 where a picture is too plain to tell.
    """
    height, width = grey.shape
    if min(grey.shape) < 32:
        return 1.0
    window, octaves, rounding = _octaves(height, width)
    waves = torch.fft.rfft2(torch.from_numpy((grey - grey.mean()) * window))
    power = (waves.real.square() + waves.imag.square()).flatten()
    energy = (octaves @ power).numpy()
    own = np.maximum(0, energy - rounding)
    telling = np.flatnonzero(energy[1:] > FAINT * rounding[1:])[:FINEST]
    return float(min((own[finer] / own[finer + 1] for finer in telling), default=1.0))


@lru_cache(maxsize=8)
def _octaves(height: int, width: int) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Hann window; which frequencies belong to each octave, the finest first; energy of rounding in each."""
    window = np.hanning(height)[:, None] * np.hanning(width)
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)) * 2  # 1 is the finest wave
    count = np.full(radius.shape, 2.0)  # the other half of the plane is the mirror image of this one
    count[:, 0] = 1
    belongs = [(radius < 0.5**octave) & (radius >= 0.5 ** (octave + 1)) for octave in range(OCTAVES)]
    octaves = np.stack([(inside * count).ravel() for inside in belongs])
    rounding = ROUNDING * (window**2).sum() * octaves.sum(1)
    return window.astype(np.float32), torch.from_numpy(octaves.astype(np.float32)), rounding


def blockiness(grey: np.ndarray) -> float:
    """Mean step on the strongest lines 8 pixels apart over that on the second strongest; mean of both directions.

    Enlarging by 2 or 4 gives steps a rhythm too, but one that repeats within 8 pixels. The largest eighth of the steps
    is left out: single lines from edge to edge, such as frames have, happen to lie somewhere on the grid.
    """
    ratios = []
    for picture in (grey, grey.T):
        steps = np.abs(np.diff(picture, axis=1)).mean(0)
        whole = len(steps) // 8 * 8
        if whole < 64:
            return 1.0
        lines = np.sort(steps[:whole].reshape(-1, 8), axis=0)
        second, first = np.sort(lines[: len(lines) * 7 // 8].mean(0))[-2:]
        ratios.append(first / second if second > 0 else 1.0)
    return float(np.mean(ratios))


def noise(grey: np.ndarray) -> float:
    """Immerkær's estimate of the noise's standard deviation, in levels: √(π/2)/6 · mean |picture ∗ mask|.

    The mask is the difference of two Laplacians, [1 -2 1] across and [1 -2 1] down:
    J. Immerkær, Fast noise variance estimation, Computer Vision and Image Understanding 64 (1996).
    """
    if min(grey.shape) < 3:
        return 0.0
    across = grey[:, :-2] - 2 * grey[:, 1:-1] + grey[:, 2:]
    both = across[:-2] - 2 * across[1:-1] + across[2:]
    return float(np.abs(both).mean() * math.sqrt(math.pi / 2) / 6)


# -- colours of the thumbnail, (height, width, 3)


def border(colours: np.ndarray) -> float:
    """Part of the area that plain borders take, each of the colour of its outermost line."""
    height, width = colours.shape[:2]
    top, bottom = (_plain_lines(lines) for lines in (colours, colours[::-1]))
    across = colours.transpose(1, 0, 2)
    left, right = (_plain_lines(lines) for lines in (across, across[::-1]))
    inner = max(0, height - top - bottom) * max(0, width - left - right)
    return 1 - inner / (height * width)


def _plain_lines(lines: np.ndarray) -> int:
    """How many lines from the first on are plain, all in the first one's colour."""
    colour = np.median(lines[0], axis=0)
    if (np.abs(lines[0] - colour) > PLAIN).any():
        return 0  # as in most pictures, at a fraction of the cost
    plain = (np.abs(lines - colour) <= PLAIN).all(axis=(1, 2))
    return int(plain.argmin()) if not plain.all() else len(plain)


def background(colours: np.ndarray) -> str | None:
    """White, black or grey where three quarters of the outermost pixels are that colour."""
    edge = np.concatenate([colours[0], colours[-1], colours[1:-1, 0], colours[1:-1, -1]])
    colour = np.median(edge, axis=0)
    plain = (np.abs(edge - colour) <= PLAIN).all(axis=1).mean() >= 0.75
    if not plain or colour.max() - colour.min() > PLAIN:
        return None
    return "white" if colour.min() >= 235 else "black" if colour.max() <= 20 else "grey"


def saturation(colours: np.ndarray) -> float:
    """Difference of the strongest and the weakest channel, 0 to 1, that 98 % of the picture stay below."""
    red, green, blue = (colours[..., channel] for channel in range(3))
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    count = np.bincount(spread.ravel(), minlength=256).cumsum()
    return int(np.searchsorted(count, 0.98 * count[-1])) / 255


def robust_z(values: np.ndarray) -> np.ndarray:
    """How many standard deviations each value is off the median, the deviation taken from the median one; 0 for few."""
    if len(values) < 8:
        return np.zeros_like(values)
    centred = values - np.median(values)
    spread = 1.4826 * np.median(np.abs(centred))
    return centred / spread if spread > 0 else np.zeros_like(centred)
