"""Bad photos: a site's whole preparation and a training step, with one file among good ones that is no good, and
folders with too few.

Survived: the bad file is set aside for the right reason and the site trains on the others; or the site says by name
what is wrong with its folder, in a sentence that names no file.
"""

from __future__ import annotations

import math
import struct
import tempfile
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from app.config import RunConfig
from app.errors import SiteError
from app.site import train
from benchmarks.faults.bench import RUN, everybodys, pictures
from benchmarks.faults.case import Case
from benchmarks.faults.outcome import Outcome
from bouquet import ROOT
from bouquet.data import listing

GOOD = 6  # good photos beside the bad one
SECRET = "patient-0815.png"  # the bad file's name, which must not leave the site


def photo(mode: str = "RGB", kind: str = "PNG", **how) -> bytes:
    rng, out = np.random.default_rng(9), BytesIO()
    if mode == "16":
        image = Image.fromarray(rng.integers(0, 65536, (64, 64), dtype=np.uint16))
    else:
        image = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode)
    image.save(out, kind, **how)
    return out.getvalue()


def huge() -> bytes:
    """A PNG of 20,000 × 20,000 pixels in a few hundred kilobytes: 1.2 GB once it is decoded."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    rows = b"".join([packer.compress(bytes(60_001)) for _ in range(20_000)] + [packer.flush()])
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", rows)
        + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    return photo(save_all=True, append_images=[Image.new("RGB", (64, 64))])


# name -> (the bad file's bytes, why it is set aside; '' where it is a photo like the others)
FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "a truncated photo": (lambda: photo()[:4000], "undecodable"),
    "zero bytes": (lambda: b"", "empty"),
    "a PNG of 20,000×20,000 pixels": (huge, "too-large"),
    "a file that is no image": (lambda: b"%PDF-1.7 a report\n" * 100, "format"),
    "an animated PNG": (animated, "animated"),
    "a CMYK JPEG": (lambda: photo("CMYK", "JPEG"), ""),
    "a 16-bit PNG": (lambda: photo("16"), ""),
}
FOLDERS = {"an empty folder": 0, "a single photo": 1}  # name -> how many photos it has


def play(case: Case, repeats: int) -> list[Outcome]:
    outcomes = []
    for _ in range(repeats):
        outcomes += [_outcome(name, _a_file, make(), reason) for name, (make, reason) in FILES.items()]
        outcomes.append(_outcome("a symlink out of the folder", _a_link))
        outcomes += [_outcome(name, _a_folder, count) for name, count in FOLDERS.items()]
    return outcomes


def _outcome(name: str, check: Callable[..., list[str]], *args) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        try:
            problems = check(Path(folder), *args)
        except Exception as error:
            problems = [f"it was not foreseen: {type(error).__name__}: {error}"]
    return Outcome(name, not problems, problems=problems)


def _site(folder: Path) -> train.Site:
    return train.Site(RunConfig.read(RUN | {"local-steps": 1}), ROOT / "models", folder / "data", folder / "cache", "")


def _trains(site: train.Site, usable: int, counts: dict[str, int]) -> list[str]:
    found = {reason: count for reason, count in site.partition.counts.items() if reason != "images"}
    photos = len(site.train.keys) + len(site.held_out.keys)
    problems = [f"{photos} photos usable, set aside {found}; {usable} and {counts} were right"] * (
        (photos, found) != (usable, counts)
    )
    return problems + ["the loss is not finite"] * (not math.isfinite(site.fit(1) + site.evaluate()))


def _add(folder: Path, put: Callable[[Path], object]) -> None:
    data = pictures(folder / "data", GOOD, seed=5)
    put(data / SECRET)
    with (data / listing.LIST).open("a", encoding="utf-8") as lines:
        lines.write(listing.line(SECRET, "a flower"))
    everybodys(data)


def _a_file(folder: Path, content: bytes, reason: str) -> list[str]:
    _add(folder, lambda file: file.write_bytes(content))
    return _trains(_site(folder), GOOD + (not reason), {reason: 1} if reason else {})


def _a_link(folder: Path) -> list[str]:
    (folder / "elsewhere.png").write_bytes(photo())
    _add(folder, lambda file: file.symlink_to(folder / "elsewhere.png"))
    return _trains(_site(folder), GOOD, {"outside": 1})


def _a_folder(folder: Path, count: int) -> list[str]:
    pictures(folder / "data", count, seed=5)
    try:
        _site(folder)
    except SiteError as error:
        return [f"the public sentence says where: {error}"] * (str(folder) in str(error))
    return ["nobody noticed"]


CASES = [Case("photos", "bad photos", play=play)]
