"""A site's class images, for prior preservation: pictures of the kind of thing that its photos show, but of others.

A net that learns one dog from a few photos forgets what other dogs look like; so each step also learns from a batch of
these. Source: Ruiz et al. 2023, arXiv:2208.12242, section 3.2.
Enters: the folder `class-images` in a site's data folder, where no file is one of the site's photos: there they count
neither as its images nor in its validation. It may hold what a data folder may; as a rule pictures, and a `caption.txt`
with one line ("a photo of a dog"). Leaves: `ClassImages`. Errors: SITE-15 (a run asks for them and there are none),
SITE-05 to SITE-07 as of photos.
"""

from __future__ import annotations

from pathlib import Path

from app.errors import SiteError
from app.site.photos import data
from app.site.photos.folders import CLASS


class ClassImages(data.Partition):
    """As a site's photos, of which one is enough."""

    def require(self, min_images: int) -> ClassImages:
        if not self.photos:
            raise _none(self.report(5))
        return self


def scan(folder: Path, memory: Path | None = None) -> ClassImages:
    """Those in a site's data folder; `memory` is the site's cache. Errors: SITE-15, SITE-05 to SITE-07."""
    inside = folder / CLASS
    if not inside.is_dir():
        raise _none(f"{inside} is not there, or no folder")
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise _none(f"{inside} leads out of the data folder")
    found = data.look(inside, memory=cache(memory) if memory else None)
    return ClassImages(found.folder, found.photos, found.quarantined).require(1)


def stamp(folder: Path) -> str:
    """As data.stamp, of the class images; '' where there is no folder of them."""
    inside = folder / CLASS
    return data.stamp(inside) if inside.is_dir() else ""


def cache(cached: Path) -> Path:
    """Where what is made of them is kept, apart from what is made of photos."""
    return cached / CLASS


def _none(found: str) -> SiteError:
    fix = (
        f"put pictures of other things of the same kind into a folder {CLASS} in this site's data folder, with a"
        " caption.txt of one line like: a photo of a dog; or agree on a run with prior-loss-weight=0"
    )
    return SiteError("SITE-15", found=found, fix=fix)
