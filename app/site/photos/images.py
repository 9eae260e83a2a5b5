"""One picture: unchecked bytes in, an upright picture in sRGB or training pixels out.

Enters: a file that nobody has looked at, maybe damaged, maybe hostile, and its bytes. Leaves: a PIL picture in sRGB, a
float32 tensor CHW in [−1, 1], or `BadImage` with one of REASONS. Reasons may be counted and sent; names stay here.
Colours are converted by the picture's profile, a PNG's without one by its gamma and primaries (gAMA, cHRM); what is
damaged, says sRGB or has over 4 MB changes no pixel. What a PNG says in text is not unpacked. A JPEG of more than 50
megapixels is decoded at half its width.
"""

from __future__ import annotations

import os
import re
import stat
import struct
import warnings
import zlib
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from app.metrics import REASONS

if TYPE_CHECKING:
    from torch import Tensor

READING = 3  # the version of what this module makes of bytes: what was kept of another one's pixels is made anew
FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}  # what is read, and how such a file's name ends
PICTURES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".mpo"}
OTHER_PICTURES = {".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl"}  # set aside as "format"
MAX_PIXELS = 50_000_000  # 200 MB as RGB; a full-frame camera's 45 Mpixel photo still fits
MAX_JPEG = 4 * MAX_PIXELS  # of a JPEG in one scan, decoded at half its width; of several, all would lie in memory
MAX_BYTES = 200_000_000
# pixels times scans of a progressive JPEG: 40 scans of the largest photo, which has 10; 3 s
MAX_PASSES = 2_000_000_000
MAX_PIECES = 100_000  # chunks or segments of a file: a PNG of 200 MB has 25,000; each costs Pillow some microseconds
MAX_EXIF = 16  # segments of EXIF in a JPEG, which has one; Pillow joins them, and each joining copies what there was
MAX_PROFILE = 4_000_000  # bytes of an ICC profile; a printer's have 0.5 to 3 MB
MAX_TEXT = 1_000_000  # bytes of a text that turns a PNG upright
Image.MAX_IMAGE_PIXELS = MAX_JPEG  # Pillow's own bound, which knows no difference between formats; ours are below

OTHERS = (  # how other pictures begin
    b"GIF8", b"BM", b"II*\0", b"MM\0*", b"8BPS", b"\xff\x0a", b"\0\0\0\x0cJXL ", b"\0\0\0\x0cjP  ",
)  # fmt: skip
BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1", b"avif", b"avis")  # and HEIF's
TEXTS = (b"tEXt", b"zTXt", b"iTXt")  # a PNG's chunks
UPRIGHT = (b"XML:com.adobe.xmp", b"Raw profile type exif")  # texts that may say how to turn the picture
FOLDER = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)  # O_PATH: of a folder that may be passed but not listed
DEVICES = (b"mntr", b"scnr", b"prtr", b"spac")  # a profile of these: screen, scanner, printer, space
USUAL = 0.05  # a PNG's gamma is sRGB's own where it is that near to 1/2.2
GAMMAS = (0.2, 5.0)  # what a person can have meant; the rest is a mistake, and the picture's pixels stay
D50 = (0.9642, 1.0, 0.8249)  # a profile's white, as XYZ
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))  # XYZ to an eye's cones
SRGB = ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # its white, red, green and blue, as x, y
CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # its tones, as a profile says them
SAME = 2  # of 255: how far a profile's colours are from sRGB's where it is sRGB's own, of another maker
MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in a JPEG's scan: the next segment


class BadImage(Exception):
    """A picture that cannot be used; `str()` is one of REASONS and nothing else."""

    def __init__(self, reason: str) -> None:
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason = reason


def open_inside(root: Path, name: str) -> BufferedReader:
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


def read_inside(root: Path, name: str, most: int = MAX_BYTES) -> bytes:
    """The bytes of `name` below `root`, at most `most`. Errors: BadImage "outside", "unreadable" or "too-large"."""
    try:
        with open_inside(root, name) as file:
            data = file.read(most + 1) if os.fstat(file.fileno()).st_size <= most else None
    except OSError:
        raise BadImage("unreadable") from None
    if data is None or len(data) > most:
        raise BadImage("too-large")
    return data


def ending(name: str) -> str:
    """ ".jpg" of "A/B.JPG"."""
    return os.path.splitext(name)[1].lower()


def kind(head: bytes) -> str:
    """What a file is by its first 16 bytes: one of FORMATS, or the reason why it is set aside."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if (head[:4], head[8:12]) == (b"RIFF", b"WEBP"):
        return "WEBP"
    if not head:
        return "empty"
    if head.startswith(b"version https://"):
        return "pointer"
    return "format" if head.startswith(OTHERS) or (head[4:8] == b"ftyp" and head[8:12] in BRANDS) else "not-a-picture"


def check(data: bytes) -> None:
    """Look at the header only: no pixel is decoded. Errors: BadImage."""
    _open(data).close()


def rgb(data: bytes) -> Image.Image:
    """The whole picture, decoded: upright (EXIF), RGB, transparency on white. Errors: BadImage."""
    image = _open(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _shrink(image)
            image.load()
            ImageOps.exif_transpose(image, in_place=True)  # a copy of 50 million pixels is 200 MB
            return _to_rgb(image)
    except Exception:  # decoders fail in many ways: OSError, SyntaxError, ValueError, struct.error, ...
        raise BadImage("undecodable") from None


def to_pixels(image: Image.Image, resolution: int) -> Tensor:
    """The centre square of an RGB picture, scaled to resolution² with a Lanczos filter.

    Returns: float32 tensor (3, resolution, resolution), −1 is black and 1 is white.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return scaled(image, (left, top, side, side), resolution, resolution)


def scaled(image: Image.Image, box: tuple[int, int, int, int], height: int, width: int) -> Tensor:
    """A box (left, top, width, height) of an RGB picture as `to_pixels` has it: float32 (3, height, width)."""
    import torch  # slow to import, and most readers of this module want no tensor

    left, top, across, down = box
    part = image.crop((left, top, left + across, top + down))  # not resize(box=...): its filter looks past the box
    scaled = part.resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()


def upright(data: bytes) -> tuple[int, int]:
    """(width, height) by the header alone, as `rgb` turns it; a guess where the header is damaged. Errors: BadImage."""
    with _open(data) as image:
        try:
            turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception:  # what it says of itself can be damaged in as many ways as the pixels
            turned = False
        return (image.height, image.width) if turned else (image.width, image.height)


def _open(data: bytes) -> Image.Image:
    """The picture with its header read. Errors: BadImage."""
    if (found := kind(data[:16])) not in FORMATS:
        raise BadImage("format" if found == "not-a-picture" else found)
    scans = _scans(data) if found == "JPEG" else 1
    data, profile = _without_texts(data) if found == "PNG" else (data, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a damaged EXIF block: it does not spoil the pixels
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(data), formats=tuple(FORMATS))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage("too-large") from None
    except Exception:
        raise BadImage("undecodable") from None
    pixels = image.width * image.height
    if pixels > (MAX_JPEG if found == "JPEG" and scans == 1 else MAX_PIXELS) or pixels * scans > MAX_PASSES:
        raise BadImage("too-large")
    if getattr(image, "is_animated", False) and image.format != "MPO":  # MPO: a phone's JPEG with a preview beside it
        raise BadImage("animated")
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def _scans(data: bytes) -> int:
    """Scans of a JPEG; what is cut off or odd is Pillow's to find. Errors: BadImage, too many pieces."""
    at, pieces, scans, exif = 2, 0, 0, 0
    while (found := MARKER.search(data, at)) and (mark := data[found.start() + 1]) != 0xD9:  # D9: the end
        at = found.end()
        if mark not in (0x01, 0xD8):  # these two have no length
            at += max(2, int.from_bytes(data[at : at + 2]))
        pieces += 1
        scans += mark == 0xDA
        exif += mark == 0xE1 and data[found.end() + 2 : found.end() + 6] == b"Exif"
        if pieces > MAX_PIECES // 10 or exif > MAX_EXIF:
            raise BadImage("too-large")
    return max(1, scans)


def _without_texts(data: bytes) -> tuple[bytes, bytes]:
    """(a PNG without its texts and its colour profile, the profile), of which Pillow unpacks a megabyte and then gives
    the picture up. What turns it upright stays. Errors: BadImage, too many pieces.
    """
    at, done, upright, profile = 8, 0, set(UPRIGHT), b""
    kept: list[bytes] = []
    for _ in range(MAX_PIECES + 1):
        if at >= len(data):
            return (b"".join([*kept, data[done:]]) if kept else data), profile
        end = at + 12 + int.from_bytes(data[at : at + 4])
        if end <= len(data) and (name := data[at + 4 : at + 8]) in (b"iCCP", *TEXTS):
            word, _, rest = data[at + 8 : end - 4].partition(b"\0")
            if name == b"iCCP":
                profile = profile or _unpacked(rest[1:], MAX_PROFILE)
            if name == b"iCCP" or word not in upright or not _is_small(name, rest):
                kept.append(data[done:at])
                done = end
            upright.discard(word)
        at = end
    raise BadImage("too-large")


def _is_small(name: bytes, rest: bytes) -> bool:
    """Whether what follows a text's first word is at most a megabyte, unpacked."""
    if name == b"zTXt":
        return bool(_unpacked(rest[1:], MAX_TEXT))
    if name == b"iTXt" and rest[:1] == b"\1":  # after two flags, a language and a translated first word
        return bool(_unpacked(rest[2:].split(b"\0", 2)[-1], MAX_TEXT))
    return len(rest) <= MAX_TEXT


def _unpacked(data: bytes, most: int) -> bytes:
    """Nothing where it is damaged, or more than that."""
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(data, most)
    except zlib.error:
        return b""
    return found if reader.eof else b""


def _shrink(image: Image.Image) -> None:
    """Have a JPEG of more than MAX_PIXELS decoded at half its width and height: a block of it gives fewer pixels."""
    if image.width * image.height > MAX_PIXELS:
        image.draft(image.mode, (image.width // 2, image.height // 2))


def _to_rgb(image: Image.Image) -> Image.Image:
    """Grey, 16-bit, palette, CMYK and transparent pictures as RGB, in sRGB's colours."""
    said, is_png = image.info, image.format == "PNG"
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert() would clip everything above 255 to white
        image = _eight_bits(image)
    space = {"1": "GRAY", "L": "GRAY", "LA": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB ")
    profile = said.get("icc_profile") or b""
    if is_png and not profile and "srgb" not in said and "gamma" in said:
        profile = _profile_of(said["gamma"], said.get("chromaticity"), space)
    to_srgb = _to_srgb(profile, space)
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        if to_srgb:
            alpha = image.getchannel("A")
            image = _converted(image, space, to_srgb)
            image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    elif to_srgb:
        image = _converted(image, space, to_srgb)
    return image if image.mode == "RGB" else image.convert("RGB")  # which copies what is RGB already


def _eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey picture in 8 bits, 65535 being 255; where it names one grey transparent, with alpha."""
    grey, clear = np.asarray(image), image.info.get("transparency")
    eight = Image.fromarray(np.rint(np.arange(65536) / 257).astype(np.uint8)[grey])
    if isinstance(clear, int):
        eight.putalpha(Image.fromarray(((grey != clear) * 255).astype(np.uint8)))
    return eight


def _converted(image: Image.Image, space: str, to_srgb: Any) -> Image.Image:
    converted = ImageCms.applyTransform(image.convert({"GRAY": "L", "RGB ": "RGB"}.get(space, space)), to_srgb)
    assert converted is not None  # a new picture, unless it is asked to work in place
    return converted


@lru_cache(maxsize=4)
def _to_srgb(profile: bytes, space: str) -> Any:
    """A transform by that profile; None where it is not of this colour space, damaged, or changes nothing to speak of.

    Relative colorimetric with black point compensation, as the programs that show photos do it.
    """
    if not 128 < len(profile) <= MAX_PROFILE or profile[12:16] not in DEVICES or profile[16:20] != space.encode():
        return None
    mode = {"GRAY": "L", "RGB ": "RGB"}.get(space, space)
    try:
        transform = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"), mode, "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC, ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )  # fmt: skip
        if mode == "CMYK":
            return transform
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        every = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, len(steps), 3)
        before = Image.fromarray(every if mode == "RGB" else np.tile(steps, (4, 1)))
        after = np.asarray(ImageCms.applyTransform(before, transform), dtype=int)
        return transform if np.abs(after - np.asarray(before.convert("RGB"), dtype=int)).max() > SAME else None
    except Exception:  # littleCMS's own, and what Pillow makes of them
        return None


def _profile_of(gamma: float, places: tuple[float, ...] | None, space: str) -> bytes:
    """A colour profile that says what a PNG's gAMA and cHRM say; nothing where that can't be meant. Both are one's
    claim: primaries alone change nothing, and a gamma alone is about sRGB's primaries.
    """
    if not GAMMAS[0] <= gamma <= GAMMAS[1]:
        return b""
    usual = abs(gamma * 2.2 - 1) <= USUAL  # its pure power would change dark tones that every viewer shows as sRGB's
    tones = struct.pack(">4s4xHH", b"para", 3 * usual, 0) + _fixed(*(CURVE if usual else [1 / gamma]))
    if space == "GRAY":
        return _profile(b"GRAY", {b"wtpt": _xyz(D50), b"kTRC": tones})
    try:
        columns = _to_d50(SRGB if places is None else tuple(zip(places[::2], places[1::2], strict=True)))
    except (np.linalg.LinAlgError, ValueError, ZeroDivisionError):  # primaries on one line, a white without light
        return b""
    colours = {name + b"XYZ": _xyz(column) for name, column in zip((b"r", b"g", b"b"), columns.T, strict=True)}
    return _profile(b"RGB ", {b"wtpt": _xyz(D50), **colours, b"rTRC": tones, b"gTRC": tones, b"bTRC": tones})


def _to_d50(places: tuple[tuple[float, float], ...]) -> np.ndarray:
    """The matrix from linear RGB to XYZ under D50. Errors: ValueError and its kind, where that is none."""
    (x, y), *primaries = places
    white = np.array([x / y, 1.0, (1 - x - y) / y])
    rgb_to_xyz = np.array([[x, y, 1 - x - y] for x, y in primaries]).T
    eye = np.array(BRADFORD)
    adapted = np.linalg.inv(eye) @ np.diag((eye @ D50) / (eye @ white)) @ eye
    found: np.ndarray = adapted @ rgb_to_xyz @ np.diag(np.linalg.solve(rgb_to_xyz, white))
    if not (np.isfinite(found).all() and np.abs(found).max() < 4):
        raise ValueError("no colours that there are")
    return found


def _fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _xyz(numbers: Any) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*numbers)


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A screen's ICC profile, version 4, with these tags."""
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = start + len(body)
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x04300000, b"mntr", space, b"XYZ ", b"acsp") + _fixed(*D50)
    return head + bytes(128 - len(head)) + table + body
