"""Which pixels a photo is trained on: its colours as its profile means them, large photos, what a PNG carries along."""

from __future__ import annotations

import hashlib
import os
import re
import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from app.site.photos import images
from app.site.photos.images import MAX_JPEG, MAX_PIXELS, BadImage, check, rgb
from bouquet import ROOT

TO_XYZ = {  # an RGB space's primaries as XYZ under D50, a column each. Sources: Adobe RGB (1998), 4.3; ICC, Display P3
    "Adobe RGB": ((0.60974, 0.20528, 0.14919), (0.31111, 0.62567, 0.06322), (0.01947, 0.06087, 0.74457)),
    "Display P3": ((0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657), (-0.00105, 0.04189, 0.78407)),
    "sRGB": ((0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061), (0.01392, 0.09708, 0.71410)),
}
GAMMA = {"Adobe RGB": 563 / 256, "Display P3": 2.2, "sRGB": 2.2}


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    out = BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def profile(space: str) -> bytes:
    """A matrix profile by hand. Source: ICC.1:2010, 7.2 to 10.31."""
    fixed = lambda *values: struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))  # noqa: E731
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(GAMMA[space] * 256)) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"x\0" + bytes(78),
        b"wtpt": b"XYZ " + bytes(4) + fixed(0.9642, 1, 0.8249),
    }
    for index, letter in enumerate((b"r", b"g", b"b")):
        tags |= {
            letter + b"XYZ": b"XYZ " + bytes(4) + fixed(*(row[index] for row in TO_XYZ[space])),
            letter + b"TRC": curve,
        }
    at, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4sI12s12s4s28s", at + len(body), b"", 0x02400000, b"mntrRGB XYZ ", bytes(12), b"acsp", bytes(28)
    )
    return (head + fixed(0.9642, 1, 0.8249)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def stored(colours: np.ndarray, space: str) -> np.ndarray:
    """What a camera in that space writes for these sRGB colours: by the two matrices and curves, in floating point."""
    some = colours / 255
    linear = np.where(some <= 0.04045, some / 12.92, ((some + 0.055) / 1.055) ** 2.4)
    there = linear @ np.array(TO_XYZ["sRGB"]).T @ np.linalg.inv(np.array(TO_XYZ[space])).T
    return np.clip(there, 0, 1) ** (1 / GAMMA[space]) * 255


def lab(colours: np.ndarray) -> np.ndarray:
    """CIE L*a*b* of sRGB colours under D50. Source: CIE 15:2004, 8.2.1."""
    some = colours / 255
    xyz = (
        np.where(some <= 0.04045, some / 12.92, ((some + 0.055) / 1.055) ** 2.4)
        @ np.array(TO_XYZ["sRGB"]).T
        / (0.9642, 1, 0.8249)
    )
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * 841 / 108 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


SCENE = np.stack(np.meshgrid(*[np.arange(20, 240, 18)] * 3, indexing="ij"), -1).reshape(13 * 13, 13, 3)
FORMATS = {"PNG": {}, "WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}

# --- colours
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["Adobe RGB", "Display P3"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_wide_photos_colours_are_those_it_means(space, format):
    picture = Image.fromarray(stored(SCENE, space).round().astype(np.uint8))

    def apart(data: bytes) -> float:
        seen = lab(np.asarray(rgb(data)).astype(float))
        return np.linalg.norm(seen - lab(SCENE.astype(float)), axis=-1).mean()

    assert apart(encoded(picture, format, icc_profile=profile(space), **FORMATS[format])) < (
        1.2 if format == "JPEG" else 0.4
    )
    assert apart(encoded(picture, format, **FORMATS[format])) > 4  # as it was read before


def test_a_transparent_photos_colours_are_converted_and_then_laid_on_white():
    red = tuple(int(value) for value in stored(np.array([[230, 20, 30]]), "Adobe RGB")[0].round())
    pixel = rgb(encoded(Image.new("RGBA", (8, 8), (*red, 51)), icc_profile=profile("Adobe RGB"))).getpixel((0, 0))
    assert pixel == pytest.approx([255 - (255 - value) / 5 for value in (230, 20, 30)], abs=1)


def test_a_palettes_colours_are_converted():
    red = tuple(int(value) for value in stored(np.array([[230, 20, 30]]), "Display P3")[0].round())
    picture = Image.new("RGB", (8, 8), red).quantize(4)
    assert rgb(encoded(picture, icc_profile=profile("Display P3"))).getpixel((0, 0)) == pytest.approx(
        (230, 20, 30), abs=2
    )


NO_PROFILE = {  # bytes that change no pixel
    "none": None, "empty": b"", "text": b"profile", "cut off": profile("Adobe RGB")[:200], "zeros": bytes(4000),
    "a header alone": profile("Adobe RGB")[:128],
    "of grey": profile("Adobe RGB")[:16] + b"GRAY" + profile("Adobe RGB")[20:],
    "a link of two devices": profile("Adobe RGB")[:12] + b"link" + profile("Adobe RGB")[16:],
    "noise": bytes(range(256)) * 8, "tags that point nowhere": profile("Adobe RGB")[:132] + b"\xff" * 120,
    "too large": profile("Adobe RGB") + bytes(images.MAX_PROFILE),
    "sRGB of another maker": ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PROFILE)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "CMYK"])
def test_a_profile_that_is_damaged_or_says_srgb_changes_no_pixel(name, mode):
    picture = Image.fromarray(SCENE.astype(np.uint8)).convert(mode)
    format, options = (
        ("JPEG", {"quality": 95}) if mode == "CMYK" else ("WEBP", {"lossless": True}) if mode != "L" else ("JPEG", {})
    )
    plain = encoded(picture, format, **options)
    told = encoded(picture, format, icc_profile=NO_PROFILE[name], **options) if NO_PROFILE[name] else plain
    assert np.array_equal(np.asarray(rgb(told)), np.asarray(rgb(plain)))


def test_a_photo_without_a_profile_is_read_as_it_always_was():
    """sha256 of the pixels before colours were converted: 3 channels, 16 bits, palette, transparency, CMYK."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    colour = Image.fromarray(np.stack([ramp, ramp.T, 255 - ramp], -1))
    some = [colour, colour.quantize(16), Image.fromarray(ramp), Image.fromarray(ramp.astype(np.uint16) * 257)]
    some += [
        Image.merge("RGBA", [*colour.split(), Image.fromarray(ramp)]),
        Image.merge("LA", [Image.fromarray(ramp)] * 2),
    ]
    total = hashlib.sha256(b"".join(rgb(encoded(image)).tobytes() for image in some))
    assert total.hexdigest() == "7192b65db3efd023a1f9c5a50435ed883a6327cf300b4e5e433e22d468d6723c"


def test_a_16_bit_grey_that_is_named_transparent_becomes_white():
    grey = Image.fromarray(np.array([[32768, 32769]] * 2, dtype=np.uint16))
    assert [rgb(encoded(grey, transparency=32768)).getpixel((x, 0)) for x in (0, 1)] == [
        (255, 255, 255),
        (128, 128, 128),
    ]


# --- what a PNG carries along
# ----------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunks(*chunks: bytes, colour=(200, 30, 40), size=(4, 2)) -> bytes:
    picture = Image.new("RGB", size, (0, 0, 0))
    picture.putpixel((0, 0), colour)
    png = encoded(picture)
    return png[:33] + b"".join(chunks) + png[33:]


CARRIED = {
    "a workflow of 3 MB": lambda: chunk(b"tEXt", b"workflow\0" + b'{"n":1}' * 450_000),
    "a packed workflow of 2 MB": lambda: chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b'{"n":1}' * 300_000)),
    "an international text of 2 MB": lambda: chunk(b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(b"a" * 2_000_000)),
    "a hundred packed texts": lambda: chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(900_000))) * 100,
    "a damaged profile of 2 MB": lambda: chunk(b"iCCP", b"x\0\0" + zlib.compress(os.urandom(100) * 20_000)),
    "a profile that unpacks to 100 MB": lambda: chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(100_000_000))),
    "XMP that unpacks to 100 MB": lambda: chunk(
        b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(100_000_000))
    ),
    "a profile that cannot be unpacked": lambda: chunk(b"iCCP", b"x\0\0nonsense"),
}


@pytest.mark.parametrize("name", CARRIED)
def test_a_png_is_read_whatever_it_carries_along(name):
    data = with_chunks(CARRIED[name]())
    check(data)
    assert rgb(data).getpixel((0, 0)) == (200, 30, 40)


def test_a_large_profile_of_a_png_is_used():
    colour = tuple(int(value) for value in stored(np.array([[230, 20, 30]]), "Adobe RGB")[0].round())
    wide = profile("Adobe RGB") + bytes(2_000_000)
    wide = struct.pack(">I", len(wide)) + wide[4:]
    data = with_chunks(chunk(b"iCCP", b"x\0\0" + zlib.compress(wide)), colour=colour)
    assert rgb(data).getpixel((0, 0)) == pytest.approx((230, 20, 30), abs=1)


def test_the_texts_that_turn_a_png_upright_still_do():
    xmp = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", xmp)
    picture = Image.new("RGB", (4, 2))
    picture.putpixel((0, 0), (255, 0, 0))
    upright = rgb(encoded(picture, pnginfo=texts))
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 0, 0)


# --- large photos
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(9504, 6336), (11648, 8736), (16320, 12240)], ids=["61", "102", "200"])
def test_a_large_cameras_photo_is_read_at_half_its_width(size):
    data = encoded(Image.new("L", size, 128), "JPEG")
    check(data)
    assert MAX_PIXELS < size[0] * size[1] <= MAX_JPEG
    picture = rgb(data)
    assert picture.size == (size[0] // 2, size[1] // 2) and picture.getpixel((9, 9)) == (128, 128, 128)


def test_a_large_photo_is_turned_and_converted_like_any_other():
    exif, colour = (
        Image.Exif(),
        tuple(int(value) for value in stored(np.array([[230, 20, 30]]), "Adobe RGB")[0].round()),
    )
    exif[0x0112] = 6
    data = encoded(
        Image.new("RGB", (8000, 6400), colour), "JPEG", quality=95, exif=exif, icc_profile=profile("Adobe RGB")
    )
    picture = rgb(data)
    assert picture.size == (3200, 4000) and picture.getpixel((5, 5)) == pytest.approx((230, 20, 30), abs=4)


def test_what_cannot_be_decoded_smaller_is_refused_as_before_and_the_reason_says_so():
    large = Image.new("L", (7072, 7072), 9)
    for data in (encoded(large), encoded(large, "JPEG", progressive=True)):
        with pytest.raises(BadImage, match="^too-large$"):
            check(data)
    frame = encoded(Image.new("L", (8, 8)), "JPEG")
    at = frame.index(b"\xff\xc0") + 5  # height and width
    with pytest.raises(BadImage, match="^too-large$"):
        check(frame[:at] + struct.pack(">HH", 15_000, 14_000) + frame[at + 4 :])  # 210 million
    assert "50 million" in images.REASONS["too-large"] and "200 million" in images.REASONS["too-large"]


PEAK = """
import re, sys
from pathlib import Path
from app.site.photos.images import rgb
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
data, before = Path(sys.argv[1]).read_bytes(), peak()
print(rgb(data).size, peak() - before)
"""


def test_a_photo_of_200_megapixels_takes_no_more_memory_than_one_of_50(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (16320, 12240), (9, 90, 200)), "JPEG"))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "a.jpg"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    size, mebibytes = re.fullmatch(r"(\(.*\)) (\d+)\n", done.stdout).groups()
    assert size == "(8160, 6120)" and int(mebibytes) < 250  # 190 of pixels
