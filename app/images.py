"""One picture: unchecked bytes in, an upright RGB picture or training pixels out.

Enters: the bytes of a file that nobody has looked at, maybe damaged, maybe hostile. Leaves: a PIL picture in RGB, a
float32 tensor CHW in [−1, 1], or `BadImage` with one of REASONS. Reasons may be counted and sent; names stay here.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import TYPE_CHECKING

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
    "too-large": "more than 50 million pixels or 200 MB",
    "undecodable": "the header or the pixels are damaged or cut off",
    "unreadable": "absent, not a file, or this process may not read it",
}
FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 50_000_000  # 150 MB as RGB; a full-frame camera's 45 Mpixel photo still fits
MAX_BYTES = 200_000_000


class BadImage(Exception):
    """A picture that cannot be used; `str()` is one of REASONS and nothing else."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason = reason


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
            return _to_rgb(ImageOps.exif_transpose(image))
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
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged EXIF block: it does not spoil the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("too-large") from None
    except Exception:
        raise BadImage("undecodable") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage("too-large")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's JPEG with a preview beside it
        raise BadImage("animated")
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grey, 16-bit, palette, CMYK and transparent pictures as RGB."""
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert() would clip everything above 255 to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
