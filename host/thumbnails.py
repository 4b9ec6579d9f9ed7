"""Small views of pictures for the page: always encoded anew, so that no byte of a file is ever handed out.

- long sides of 96, 192 and 384 pixels, and one view of at most 2048; never larger than the picture
- upright and in the colours that training sees, transparency on the concept's background; of masks, their levels
- a file that is damaged, gone or no longer in a registered folder gives a drawn placeholder
- a few threads decode, with a bound on the pixels they hold at once; what exceeds the queue is refused
- the last ones stay in memory, up to a bound; ``tag_of`` changes with the file, for the browser's own cache
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from ..training.dataset.colour import to_levels, to_srgb
from ..training.dataset.images import upright
from ..training.dataset.model import FilePicture, Picture, Size
from ..training.dataset.pixels import whole
from ..training.dataset.sheet import wrap
from . import folders
from .workers import Workers

STEPS = {"96": 96, "192": 192, "384": 384, "full": 2048}  # as the address names them: the longest side
CONTENT_TYPE = "image/jpeg"
QUALITY = {2048: 92}  # of the large view; the others have
USUAL_QUALITY = 85
THREADS = 4
MOST_WAITING = 256
MOST_PIXELS = 64_000_000  # decoded at once by all threads together; a larger picture is decoded alone
MOST_BYTES = 64 << 20  # of encoded views that are kept
PLATE, CROSS, TEXT = (36, 38, 44), (110, 60, 64), (220, 222, 226)


@dataclass(frozen=True)
class View:
    """One view of a picture, or of a mask."""

    picture: Picture
    side: int
    background: str = "#ffffff"
    mask: bool = False

    def tag_of(self) -> str:
        """Changes with what the view would show."""
        facts = (_state(self.picture), self.side, self.background, self.mask)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Encoded:
    content: bytes
    tag: str
    fault: str = ""  # why it is a placeholder


class Thumbnails:
    """Views of pictures, made in threads and kept for a while."""

    def __init__(self, most_waiting: int = MOST_WAITING, most_bytes: int = MOST_BYTES) -> None:
        self._workers = Workers("loom-thumbnails", THREADS, most_waiting)
        self._budget = Budget(MOST_PIXELS)
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes, self._most_bytes = 0, most_bytes

    async def view(self, view: View, known: str = "", gone: Callable[[], bool] = lambda: False) -> Encoded | None:
        """The encoded view; None where the browser has it (``known`` is its tag) or nobody waits for it any more.

        Raises Refused where too many are waiting. Called in the event loop, which it never holds up.
        """
        return await self._workers.run(self._made, view, known, gone)

    def _made(self, view: View, known: str, gone: Callable[[], bool]) -> Encoded | None:
        if gone():
            return None
        try:
            if isinstance(view.picture, FilePicture) and not folders.is_registered(Path(view.picture.path)):
                raise OSError("it is no longer in a dataset folder")
            tag = view.tag_of()
            if tag == known:
                return None
            with self._lock:
                content = self._kept.get(tag)
                if content is not None:
                    self._kept.move_to_end(tag)
                    return Encoded(content, tag)
            with self._budget.taking(view.picture.width * view.picture.height):
                content = encoded(_shown(view), view.side)
        except Exception as error:  # decoders raise nearly anything on damaged files
            reason = getattr(error, "strerror", None) or str(error)
            return Encoded(encoded(placeholder(reason, view.side), view.side), "", reason)
        self._keep(tag, content)
        return Encoded(content, tag)

    def _keep(self, tag: str, content: bytes) -> None:
        with self._lock:
            self._bytes += len(content) - len(self._kept.get(tag, b""))
            self._kept[tag] = content
            self._kept.move_to_end(tag)
            while self._bytes > self._most_bytes:
                self._bytes -= len(self._kept.popitem(last=False)[1])


class Budget:
    """So many pixels at once; who asks for more than all of them gets all of them."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._turn, self._changed = threading.Lock(), threading.Condition()

    @contextmanager
    def taking(self, pixels: int) -> Iterator[None]:
        pixels = min(pixels, self._total)
        with self._turn, self._changed:  # in turn, or small ones would keep a large one waiting for ever
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _state(picture: Picture) -> str:
    """The file as it is now; it may have been replaced since its header was read."""
    if not isinstance(picture, FilePicture):
        return picture.fingerprint
    status = os.stat(picture.path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no file any more")  # reading a pipe would wait for ever
    return f"{picture.path} {status.st_size} {status.st_mtime_ns}"


def fitted(size: Size, side: int) -> Size:
    """The size with its longer side at most ``side``."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _shown(view: View) -> Image.Image:
    """The picture at the view's size."""
    picture = view.picture
    size = fitted((picture.width, picture.height), view.side)
    if not isinstance(picture, FilePicture):
        pixels = whole(picture, view.background).image
        image = Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().numpy())
    elif view.mask:
        image = to_levels(upright(picture.path)[0])
    else:
        # twice as large leaves something to smooth over
        stored, full = upright(picture.path, (2 * size[0], 2 * size[1]))
        size = fitted(full, view.side)
        image = to_srgb(_reduced(stored, size))
    if image.mode == "RGBA":
        flat = Image.new("RGBA", image.size, ImageColor.getrgb(view.background)[:3])
        flat.alpha_composite(image)
        image = flat
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def _reduced(image: Image.Image, size: Size) -> Image.Image:
    """Averaged down by a whole number while it stays twice as large: colours of fewer pixels have to be managed."""
    factor = min(image.width // (2 * size[0]), image.height // (2 * size[1]))
    if factor < 2 or image.mode not in ("RGB", "L", "CMYK") or "transparency" in image.info:
        return image  # a transparent colour is one no longer once it is mixed with others
    smaller = image.reduce(factor)
    smaller.info, smaller.format = image.info, image.format
    return smaller


def encoded(image: Image.Image, side: int) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=QUALITY.get(side, USUAL_QUALITY))
    return stream.getvalue()


def placeholder(reason: str, side: int) -> Image.Image:
    """What stands for a picture that cannot be shown."""
    side = min(side, 384)
    image = Image.new("RGB", (side, side), PLATE)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(max(10, side // 16))
    draw.line((side // 3, side // 5, 2 * side // 3, side // 2), CROSS, max(2, side // 40))
    draw.line((2 * side // 3, side // 5, side // 3, side // 2), CROSS, max(2, side // 40))
    for number, line in enumerate(wrap(reason, font, side - 8, 4)):
        draw.text((side // 2, round(side * 0.62) + number * round(side / 12)), line, TEXT, font, anchor="ma")
    return image
