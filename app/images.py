"""One picture: unchecked bytes in, an upright RGB picture or training pixels out.

Enters: a file that nobody has looked at, maybe damaged, maybe hostile, and its bytes. Leaves: a PIL picture in RGB, a
float32 tensor CHW in [−1, 1], or `BadImage` with one of REASONS. Reasons may be counted and sent; names stay here.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

REASONS = {  # why a picture is set aside (quarantined), and what it means to a person
    "animated": "an animation, not a photo",
    "changed": "its bytes are no longer those that were scanned",
    "duplicate": "the same bytes as a picture before it",
    "empty": "zero bytes",
    "format": "not PNG, JPEG or WebP by its content",
    "no-caption": "no caption, and no template to make one from",
    "outside": "a link or path that leads out of the data folder",
    "too-large": "more than 50 million pixels or 200 MB, or packed so that reading it is the work of many photos",
    "undecodable": "the header or the pixels are damaged or cut off",
    "unreadable": "absent, not a file, or this process may not read it",
}
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a full-frame camera's 45 Mpixel photo still fits
MAX_BYTES = 200_000_000
MAX_PASSES = 2_000_000_000  # pixels times scans of a progressive JPEG: 40 scans of the largest photo, which has 10; 3 s
MAX_PIECES = 100_000  # chunks or segments of a file: a PNG of 200 MB has 25,000; each costs Pillow some microseconds
MAX_EXIF = 16  # segments of EXIF in a JPEG, which has one; Pillow joins them, and each joining copies what there was


FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH: of a folder that may be passed but not listed
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a JPEG's scan: the next segment


class BadImage(Exception):
    """A picture that cannot be used; `str()` is one of REASONS and nothing else."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason = reason


def open_inside(root: Path, name: str) -> BinaryIO:
    """The regular file `name` below `root` (a resolved folder), open. Errors: BadImage "outside" or "unreadable".

    Its folders are opened one after the other without following a link, so that nobody can exchange one for a link
    meanwhile; and nothing waits for a pipe's other end.
    """
    try:
        real = Path(os.path.realpath(root / name))
        if not real.is_relative_to(root):
            raise BadImage("outside")
        if not real.is_file():  # before it is opened, which can have effects of its own where it is a device
            raise BadImage("unreadable")
        *folders, last = real.relative_to(root).parts
        here = os.open(root, FOLDER)
        try:
            for folder in folders:
                here, above = os.open(folder, FOLDER | os.O_NOFOLLOW, dir_fd=here), here
                os.close(above)
            file = os.fdopen(os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=here), "rb")
        finally:
            os.close(here)
    except (OSError, ValueError):  # ValueError: a name with a null byte, or one that no file system can hold
        raise BadImage("unreadable") from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise BadImage("unreadable")
    return file


def check(data: bytes) -> None:
    """Look at the header only: no pixel is decoded. Errors: BadImage."""
    _open(data).close()


def rgb(data: bytes) -> Image.Image:
    """The whole picture, decoded: upright (EXIF), RGB, transparency on white. Errors: BadImage."""
    image = _open(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy of 50 million pixels is 200 MB
            return _to_rgb(image)
    except Exception:  # decoders fail in many ways: OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage("undecodable") from None


def to_pixels(image: Image.Image, resolution: int) -> Tensor:
    """The centre square of an RGB picture, scaled to resolution² with a Lanczos filter.

    Returns: float32 tensor (3, resolution, resolution), −1 is black and 1 is white.
    """
    import torch  # slow to import, and most readers of this module want no tensor

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # not resize(box=...): its filter looks past the box
    scaled = square.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def _open(data: bytes) -> Image.Image:
    """The picture with its header read. Errors: BadImage."""
    if not data:
        raise BadImage("empty")
    if not (data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4], data[8:12]) == (b"RIFF", b"WEBP")):
        raise BadImage("format")
    scans = _pieces(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged EXIF block: it does not spoil the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("too-large") from None
    except Exception:
        raise BadImage("undecodable") from None
    if image.width * image.height > MAX_PIXELS or image.width * image.height * scans > MAX_PASSES:
        raise BadImage("too-large")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's JPEG with a preview beside it
        raise BadImage("animated")
    return image


def _pieces(data: bytes) -> int:
    """Scans of a JPEG, 1 of others; what is cut off or odd is Pillow's to find. Errors: BadImage, too many pieces."""
    at, pieces, scans, exif = 8, 0, 1, 0
    if data[:1] == b"\x89":
        while at < len(data):
            at += 12 + int.from_bytes(data[at : at + 4])
            pieces += 1
            if pieces > MAX_PIECES:
                raise BadImage("too-large")
    elif data[:1] == b"\xff":
        at, scans = 2, 0
        while (found := MARKER.search(data, at)) and (kind := data[found.start() + 1]) != 0xD9:  # D9: the end
            at = found.end()
            if kind not in (0x01, 0xD8):  # these two have no length
                at += max(2, int.from_bytes(data[at : at + 2]))
            pieces += 1
            scans += kind == 0xDA
            exif += kind == 0xE1 and data[found.end() + 2 : found.end() + 6] == b"Exif"
            if pieces > MAX_PIECES // 10 or exif > MAX_EXIF:
                raise BadImage("too-large")
    return max(1, scans)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grey, 16-bit, palette, CMYK and transparent pictures as RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert() would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
