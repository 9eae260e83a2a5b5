"""What keeps a site's photos from being confirmed by the numbers that it reports.

Every number is a query on the photos, and the hub chooses the query: with a run's seed known, a held-out split, a
noise and a batch that follow from it can be recomputed for a candidate photo, and compared. So a site with private
photos
  - draws what nobody may predict (who is held out, the noise, the batches) from a secret of its own, which never
    leaves it;
  - holds photos out in whole groups, so that no two runs differ by one photo;
  - answers no run that asks about too few photos, and no hub that asks too often (limits.py: floors and budgets);
  - tells numbers to three digits.
Photos are private unless the folder says otherwise: `.public` in it lists the photos that everybody has, such as the
demo's drawn ones. Then nothing is secret and every figure can be repeated to the bit; one photo that is not in the
list makes all private.
Enters: a site's data and cache folders. Leaves: `Privacy`. Errors: SITE-14 (the secret is not where it must be).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from app import files
from app.errors import SiteError

if TYPE_CHECKING:
    from app.config import RunConfig
    from app.site.limits import Limits
    from app.site.photos.data import Partition, Photo

PUBLIC_LIST = ".public"  # in the data folder: hidden, so no picture
FILE = "site.secret"  # in the cache folder
DIGITS, COUNTED = 3, 2  # of a number, of a count


@dataclass(frozen=True)
class Privacy:
    """secret: 32 bytes, or none where the photos are public."""

    secret: bytes = field(default=b"", repr=False)

    @property
    def private(self) -> bool:
        return bool(self.secret)

    def __str__(self) -> str:
        return "private" if self.secret else "public"

    def digest(self, text: str) -> bytes:
        """32 bytes that follow from the text; without the secret nobody can tell them from chance (HMAC, RFC 2104)."""
        if not self.secret:
            return hashlib.sha256(text.encode()).digest()
        return hmac.digest(self.secret, text.encode(), "sha256")

    def seed(self, *parts: object) -> int:
        """A 63-bit seed from (run seed, site, round): the same in every process of this site, and on every machine
        where all is public.
        """
        return int.from_bytes(self.digest(repr(parts))[:8], "big") >> 1

    def split(
        self, photos: Iterable[Photo], fraction: float, seed: int, group: int = 1, *, each: bool = False
    ) -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
        """(training, validation) with about `fraction` of the photos held out, at least one in each, in their given
        order.

        Public: a photo's side depends on nothing but its bytes and the seed, so that adding one never moves another;
        the exception is a handful of photos that would all fall on one side, of which the nearest to the line changes
        sides.
        Private: the side depends on the secret and not on the run's seed, and the number held out is a multiple of
        `group`. Two runs with different fractions thus differ by a group of photos or by none, and no run trains on
        what another held out.
        each: private photos as public ones are, each by itself, so that one more is one more on one side and nothing
        else; whoever is the nearest to the line stays the only one there as long as nobody is nearer.
        """
        photos = tuple(photos)
        assert len(photos) >= 2 and 0 < fraction < 1
        of = "held out" if self.secret else seed
        # in [0, 1)
        score = {photo.key: int.from_bytes(self.digest(f"{of}:{photo.key}")[:8], "big") / 2**64 for photo in photos}
        ranked = sorted(photos, key=lambda photo: score[photo.key])
        if self.secret and not each:
            count = group * max(1, round(fraction * len(photos) / group))
        else:
            count = max(1, sum(score[photo.key] < fraction for photo in photos))
        held = {photo.key for photo in ranked[: min(count, len(photos) - 1)]}
        return tuple(p for p in photos if p.key not in held), tuple(p for p in photos if p.key in held)

    def told(self, numbers: Mapping[str, int | float]) -> dict[str, int | float]:
        """The numbers as they may leave: to three digits, counts from a hundred on rounded down to two."""
        return {name: self.number(value) for name, value in numbers.items()}

    def number(self, value: float) -> float:
        """One of them."""
        if not self.secret:
            return value
        return _count(value) if type(value) is int else float(f"{value:.{DIGITS}g}")


PUBLIC = Privacy()


class Secret(Enum):
    """Where a site with private photos has its secret from."""

    MADE = "in a run: kept in the cache, and made at the first round"
    KEPT = "measuring at the site, after a run: it must be in the cache"
    NONE = "in a simulation: all sites are one computer, and nothing leaves it"


def of(folder: Path, photos: Iterable[Photo], cached: Path, secret: Secret) -> Privacy:
    """That of the photos in a site's folder. Errors: SITE-14."""
    if secret is Secret.NONE or is_public(folder, photos):
        return PUBLIC
    return Privacy(_secret(cached / FILE, make=secret is Secret.MADE))


def divide(
    partition: Partition, privacy: Privacy, limits: Limits, config: RunConfig, *, each: bool = False
) -> tuple[tuple[Photo, ...], tuple[Photo, ...]]:
    """(training, validation) as a run asks and the site's floors allow. Errors: SITE-02, TRUST-03 where a round would
    be about too few photos.
    """
    photos = partition.require(limits.least_photos).photos
    group = limits.floor("min-held-out")
    train, held_out = privacy.split(photos, config.validation_fraction, config.seed, group, each=each)
    limits.check_photos(config, len(train), len(held_out))
    return train, held_out


def is_public(folder: Path, photos: Iterable[Photo]) -> bool:
    """Whether the folder's `.public` lists every one of these photos, with its captions."""
    try:
        listed = set((folder / PUBLIC_LIST).read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError):
        return False
    return all(_line(photo) in listed for photo in photos)


def stamp(folder: Path) -> int | None:
    """When the folder's `.public` was written, in ns; None where there is none."""
    try:
        return (folder / PUBLIC_LIST).stat().st_mtime_ns
    except OSError:
        return None


def declare_public(folder: Path, photos: Iterable[Photo]) -> None:
    """Say of these photos, and of no other that may come into the folder, that everybody has them."""
    (folder / PUBLIC_LIST).write_text("".join(f"{line}\n" for line in sorted(map(_line, photos))), encoding="ascii")


def _line(photo: Photo) -> str:
    captions = "\n".join(photo.captions)  # each has one line
    return hashlib.sha256(f"{photo.key} {captions}".encode()).hexdigest()


def _count(value: int) -> int:
    unit: int = 10 ** max(0, len(str(abs(value))) - COUNTED)
    return value // unit * unit


def _secret(file: Path, make: bool) -> bytes:
    """The secret, made at a site's first round: whole or not at all, readable by the site alone."""
    if make and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        files.write(file, secrets.token_hex(32) + "\n", 0o600)
    try:
        secret = bytes.fromhex(file.read_text(encoding="ascii"))
    except (OSError, ValueError) as error:
        raise _no_secret(file, type(error).__name__) from None
    if len(secret) != 32:
        raise _no_secret(file, f"{len(secret)} bytes")
    return secret


def _no_secret(file: Path, found: str) -> SiteError:
    return SiteError(
        "SITE-14",
        found=f"{file}: {found}; without it nobody knows which photos were held out",
        fix=(
            "name the cache folder of this site (--cache); if it is lost, remove the file: the next round makes a new"
            " one, and holds out other photos"
        ),
    )
