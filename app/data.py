"""A site's photos: a folder in; checked photos with captions, and public counts out.

Enters: the site's data folder (see folders.py for what may lie in it). Leaves: `Partition`, whose counts may be sent
to the hub while its names and captions stay here. `scan` reads every file once (its hash is the photo's identity) but
looks only at headers; pixels are decoded one photo at a time by `Photo.read`, where damage shows up as `BadImage`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import SiteError
from app.folders import Entry, entries, statuses, text_inside
from app.images import REASONS, BadImage, check, rgb, to_pixels

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

SET_FOLDER = "set this site's data folder in .env, then: docker compose up -d"


@dataclass(frozen=True)
class Photo:
    """One usable photo. `key` is the sha256 of its bytes; everything else is private to the site."""

    key: str
    caption: str = field(repr=False)
    name: str = field(repr=False, compare=False)
    load: Callable[[], bytes] = field(repr=False, compare=False)

    def read(self) -> Image.Image:
        """The decoded picture: RGB, upright. Errors: BadImage (set it aside with `Partition.without` and go on)."""
        data = self.load()
        if _key(data) != self.key:
            raise BadImage("changed")
        return rgb(data)


@dataclass(frozen=True)
class Partition:
    """What a site has: `photos` with unique keys, and `quarantined` (private name, reason) pairs."""

    folder: Path = field(repr=False)
    photos: tuple[Photo, ...] = field(repr=False)
    quarantined: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def counts(self) -> dict[str, int]:
        """Numbers that may leave the site: {"images": 98, "undecodable": 2}; the other keys are those of REASONS."""
        return {"images": len(self.photos), **Counter(sorted(reason for _, reason in self.quarantined))}

    def without(self, bad: Mapping[str, str]) -> Partition:
        """This partition with the photos whose keys are in `bad` (key → reason) moved to quarantine."""
        moved = tuple((photo.name, bad[photo.key]) for photo in self.photos if photo.key in bad)
        kept = tuple(photo for photo in self.photos if photo.key not in bad)
        return replace(self, photos=kept, quarantined=self.quarantined + moved)

    def require(self, min_images: int) -> Partition:
        """Itself, when it has enough photos. Errors: SITE-01 none, SITE-02 too few, SITE-04 no captions."""
        if len(self.photos) >= min_images:
            return self
        counts, summary = self.counts, f"{self.folder} {self._summary()}"
        mute = counts.get("no-caption", 0)
        if mute and (not self.photos or mute + len(self.photos) >= min_images):
            fix = 'add metadata.jsonl with lines like {"file_name": "0001.png", "text": "a red poppy"}, or caption.txt'
            fix += " with one line for all, like: a photo of a {label} (the sub-folder's name)"
            raise SiteError("SITE-04", "Captions are missing.", found=summary, fix=fix)
        if not self.photos:
            raise SiteError("SITE-01", "No training images.", found=summary, fix=SET_FOLDER)
        found = f"{summary}; {min_images} are needed"
        fix = "add photos; private photos need as many as this site's floors say, and SITE_LIMITS lowers them (docs/site.md)"
        raise SiteError("SITE-02", "Too few training images.", found=found, fix=fix)

    def report(self, limit: int = 20) -> str:
        """The private summary for this machine's log: counts, then the quarantined names."""
        lines = [f"{self.folder} {self._summary()}"]
        lines += [f"  set aside  {name}: {REASONS[reason]}" for name, reason in self.quarantined[:limit]]
        more = len(self.quarantined) - limit
        return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))

    def _summary(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items() if reason != "images")
        usable = f"holds {len(self.photos)} usable .png, .jpg or .webp images"
        return f"{usable} (set aside: {reasons})" if reasons else usable


def scan(folder: Path, *, caption_template: str | None = None, min_images: int = 2) -> Partition:
    """Read what a site has. The least that makes sense is 2: one photo to train on and one to hold out.

    `caption_template` ("a photo of a {label}") captions photos that come without; else the folder's caption.txt does.
    Errors: SITE-01 to SITE-07.
    """
    assert min_images >= 2, min_images
    root = _root(folder)
    template = _template(root, caption_template)
    photos: dict[str, Photo] = {}
    quarantined = []
    for entry in entries(root):
        try:
            photo = _photo(entry, template)
            if photo.key in photos:
                raise BadImage("duplicate")
            photos[photo.key] = photo
        except BadImage as bad:
            quarantined.append((entry.name, bad.reason))
    return Partition(root, tuple(photos.values()), tuple(quarantined)).require(min_images)


def stamp(folder: Path) -> str:
    """sha256 (hex) over name, size and times of every file that `scan` would look at: the same as long as nobody touches the folder.

    It reads no file: what takes minutes for a folder of originals on a network drive takes a look at each. Errors: SITE-03.
    """
    root = _root(folder)
    total = hashlib.sha256()
    for name, status in statuses(root):
        total.update(repr((name, status and (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))).encode())
    return total.hexdigest()


def pixels(photo: Photo, resolution: int) -> Tensor:
    """float32 (3, resolution, resolution) in [−1, 1]: upright, centre-cropped, scaled. Errors: BadImage."""
    return to_pixels(photo.read(), resolution)


def checked_template(text: str) -> str:
    """A caption template on one line. Errors: SITE-05 when it is empty or has a placeholder other than {label}."""
    template = " ".join(text.split())
    unknown = sorted(set(re.findall(r"{(.*?)}", template)) - {"label"})
    if not template or unknown:
        raise _template_error(f"the placeholder {{{unknown[0]}}}" if unknown else "an empty template")
    return template


def fill(template: str | None, label: str | None) -> str | None:
    """The caption of a photo that came without; None when there is no template, or no label for it."""
    if template is None or ("{label}" in template and label is None):
        return None
    return template.replace("{label}", label or "")


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _photo(entry: Entry, template: str | None) -> Photo:
    """Read once, check the header, find the caption. Errors: BadImage."""
    data = entry.load()
    check(data)
    caption = entry.caption or fill(template or entry.template, entry.label)
    if not caption:
        raise BadImage("no-caption")
    return Photo(_key(data), caption, entry.name, entry.load)


def _root(folder: Path) -> Path:
    """The resolved folder. Errors: SITE-03 when it is absent, not a folder, or closed to this process."""
    found = None
    if not folder.exists():
        found = f"{folder} does not exist"
    elif not folder.is_dir():
        found = f"{folder} is not a folder"
    elif not os.access(folder, os.R_OK | os.X_OK):
        found = f"{folder} may not be read by user id {os.geteuid()}"
    if found:
        raise SiteError("SITE-03", "The data folder cannot be opened.", found=found, fix=SET_FOLDER)
    return folder.resolve()


def _template(root: Path, given: str | None) -> str | None:
    """The given template, else the line in caption.txt, else None. Errors: SITE-05."""
    if given is not None:
        return checked_template(given)
    try:
        text = text_inside(root, "caption.txt")
    except (BadImage, UnicodeDecodeError) as error:
        raise _template_error(f"{root / 'caption.txt'}: {error}") from None
    return None if text is None else checked_template(text)


def _template_error(found: str) -> SiteError:
    fix = "write one line, where {label} stands for the class or sub-folder name: a photo of a {label}"
    return SiteError("SITE-05", "The caption template cannot be used.", found=found, fix=fix)
