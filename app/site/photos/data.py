"""A site's photos: a folder in; checked photos with captions, and public counts out.

Enters: the site's data folder (see folders.py for what may lie in it). Leaves: `Partition`, whose counts may be sent
to the hub while its names and captions stay here. `scan` reads every photo once (its hash is the photo's identity), and
none that `Seen` remembers, but looks only at headers; pixels are decoded one photo at a time by `Photo.read`, where
damage shows up as `BadImage`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import SiteError
from app.metrics import REASONS
from app.site.photos.captions import checked_template
from app.site.photos.folders import Entry, entries, statuses
from app.site.photos.images import BadImage, check, rgb, to_pixels
from app.site.photos.seen import Seen

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

OF_THE_FILE = ("animated", "empty", "format", "pointer", "too-large", "undecodable")  # as long as its bytes are these
LATE = ("unused-caption", "not-a-picture", "system")  # in the site's log after what is about photos
SET_FOLDER = "set this site's data folder in .env, then: docker compose up -d"


@dataclass(frozen=True)
class Photo:
    """One usable photo. `key` is the sha256 of its bytes; everything else is private to the site. Validation uses
    `caption`, the first one; training draws from `others` too.
    """

    key: str
    caption: str = field(repr=False)
    name: str = field(repr=False, compare=False)
    load: Callable[[], bytes] = field(repr=False, compare=False)
    others: tuple[str, ...] = field(default=(), repr=False)

    @property
    def captions(self) -> tuple[str, ...]:
        return (self.caption, *self.others)

    def read(self) -> Image.Image:
        """The decoded picture: RGB, upright. Errors: BadImage (set it aside with `Partition.without` and go on)."""
        data = self.load()
        if _key(data) != self.key:
            raise BadImage("changed")
        return rgb(data)


@dataclass(frozen=True)
class Partition:
    """What a site has: `photos` with unique keys; `quarantined` (private name, reason) pairs, of all else in the
    folder.

    cut: captions that are longer than the `reads` tokens that the base model reads of each; enlarged: photos smaller
    than what is trained on (cache.py finds out both).
    """

    folder: Path = field(repr=False)
    photos: tuple[Photo, ...] = field(repr=False)
    quarantined: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    cut: int = 0
    reads: int = 0
    enlarged: int = 0

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
        counts, summary = self.counts, self.report(5)
        mute = counts.get("no-caption", 0)
        if mute and (not self.photos or mute + len(self.photos) >= min_images):
            fix = (
                'add metadata.jsonl with lines like {"file_name": "0001.png", "text": "a red poppy"}, or a .txt beside'
            )
            fix += " each picture, or caption.txt with one line for all, like: a photo of a {label} (the sub-folder's"
            fix += " name); a table needs a column text, caption, prompt or label"
            raise SiteError("SITE-04", found=summary, fix=fix)
        if not self.photos:
            raise SiteError("SITE-01", found=summary, fix=SET_FOLDER)
        found = f"{summary}; {min_images} are needed"
        fix = (
            "add photos; private photos need as many as this site's floors say, and SITE_LIMITS lowers them"
            " (docs/site.md)"
        )
        raise SiteError("SITE-02", found=found, fix=fix)

    def report(self, limit: int = 20) -> str:
        """The private summary for this machine's log: counts, then the quarantined names."""
        lines = [f"{self.folder} {self._summary()}"]
        if self.cut:
            captions = sum(len(photo.captions) for photo in self.photos)
            what = f"longer than the {self.reads} tokens that this base model reads; the rest is not learned"
            lines += [f"  {self.cut} of {captions} captions are {what}"]
        if self.enlarged:
            lines += [f"  {self.enlarged} photos are smaller than what is trained on, and enlarged"]
        first = sorted(self.quarantined, key=lambda pair: LATE.index(pair[1]) if pair[1] in LATE else -1)
        lines += [f"  set aside  {name}: {REASONS[reason]}" for name, reason in first[:limit]]
        more = len(self.quarantined) - limit
        return "\n".join(lines + ([f"  and {more} more"] if more > 0 else []))

    def _summary(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.items() if reason != "images")
        usable = f"holds {len(self.photos)} usable .png, .jpg or .webp images"
        return f"{usable} (set aside: {reasons})" if reasons else usable


def scan(
    folder: Path, *, caption_template: str | None = None, min_images: int = 2, memory: Path | None = None
) -> Partition:
    """Read what a site has. The least that makes sense is 2: one photo to train on and one to hold out.

    `caption_template` ("a photo of a {label}") captions photos that come without; else the nearest caption.txt does.
    `memory` is the cache folder, in which hashes are remembered. Errors: SITE-01 to SITE-07.
    """
    assert min_images >= 2, min_images
    return look(folder, caption_template, memory).require(min_images)


def look(folder: Path, caption_template: str | None = None, memory: Path | None = None) -> Partition:
    """As `scan`, however little there is. Errors: SITE-03, SITE-05 to SITE-07."""
    root = _root(folder)
    template = None if caption_template is None else checked_template(caption_template)
    photos: dict[str, Photo] = {}
    quarantined, seen = [], Seen(root, memory)
    for entry in entries(root, template, seen):
        try:
            photo = _photo(entry, seen)
            if photo.key in photos:
                raise BadImage("duplicate")
            photos[photo.key] = photo
        except BadImage as bad:
            quarantined.append((entry.name, bad.reason))
    seen.save()
    return Partition(root, tuple(photos.values()), tuple(quarantined))


def stamp(folder: Path) -> str:
    """sha256 (hex) over name, size and times of every file that `scan` would look at: the same as long as nobody
    touches the folder.

    It reads no file: what takes minutes for a folder of originals on a network drive takes a look at each. Errors:
    SITE-03.
    """
    root = _root(folder)
    total = hashlib.sha256()
    for name, status in statuses(root):
        total.update(
            repr((name, status and (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns))).encode()
        )
    return total.hexdigest()


def pixels(photo: Photo, resolution: int) -> Tensor:
    """float32 (3, resolution, resolution) in [−1, 1]: upright, centre-cropped, scaled. Errors: BadImage."""
    return to_pixels(photo.read(), resolution)


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _photo(entry: Entry, seen: Seen) -> Photo:
    """Read once, check the header, find the caption. Errors: BadImage."""
    if entry.reason:
        raise BadImage(entry.reason)
    found = seen.get(entry.file) if entry.file else None
    if found is None:
        try:
            data = entry.load()
            check(data)
            found = _key(data)
        except BadImage as bad:
            if bad.reason not in OF_THE_FILE:
                raise
            found = f"!{bad.reason}"
        if entry.file:
            seen.put(entry.file, found)
    if found.startswith("!"):
        raise BadImage(found[1:])
    if not entry.captions:
        raise BadImage("no-caption")
    caption, *others = entry.captions
    return Photo(found, caption, entry.name, entry.load, tuple(others))


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
        raise SiteError("SITE-03", found=found, fix=SET_FOLDER)
    return folder.resolve()
