"""Does the adapter remember photos? Each site's distances in; a sentence a site, and what is suspicious, out.

Enters: what sites measured (NAME.memory.json, and memory.json in a run's folder; docs/records.md), for each the sorted
numbers of `samples` and of `held_out` photos: near 0 is a copy of one training photo, 1 is near to all alike. Leaves:
the files, `Found`s. Errors: MEASURE-02, REPORT-05 (a newer version wrote it).

A sample is suspicious when its number is smaller than every held-out photo's. If samples were like held-out photos, n
samples and H photos would come in any order, and the s smallest would all be samples with probability n(n−1)…(n−s+1) /
(n+H)(n+H−1)…(n+H−s+1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

from app import files, records, text
from app.errors import BouquetError
from app.hub import history
from app.records import entry

VERSION = 1
FILE = "memory.json"
RARE = 0.05
Kind = TypeVar("Kind", "Memory", "SiteMemory")


@dataclass(frozen=True)
class Distances:
    """What one site measured."""

    photos: int = entry("photos that it trained on", "photos")
    space: str = entry("what the distances are taken in")
    samples: tuple[float, ...] = entry(
        "of each drawn picture, sorted: distance to the nearest photo over that to others"
    )
    held_out: tuple[float, ...] = entry("of each photo that it held out, likewise")
    run: str = entry("id of the run", default="")
    adapter: str = entry("SHA-256 of its adapter", default="")
    seed: int | None = entry("of the pictures' noise", default=None)


@dataclass(frozen=True, kw_only=True)
class SiteMemory(Distances):
    """NAME.memory.json: what a site sends to the hub."""

    site: str = entry("the site's name")
    version: int = entry("of this format", default=VERSION)

    @property
    def distances(self) -> Distances:
        return Distances(**{field.name: getattr(self, field.name) for field in fields(Distances)})


@dataclass(frozen=True)
class Memory:
    """memory.json in a run's folder."""

    sites: dict[str, Distances] = entry("by name")
    run: str = entry("id of the run", default="")
    version: int = entry("of this format", default=VERSION)


@dataclass(frozen=True)
class Found:
    """`chance` is the probability of as many suspicious samples, or more, where nothing is remembered; `rare` when it
    is small.
    """

    site: str
    suspicious: int
    chance: float
    rare: bool
    sentence: str


def read(path: Path) -> Memory | None:
    """A run's memory.json, checked; None where there is none. Errors: MEASURE-02, REPORT-05."""
    return check(_read(Memory, path)) if path.is_file() else None


def read_column(path: Path) -> SiteMemory:
    """A site's. Errors: MEASURE-02, REPORT-05."""
    return _read(SiteMemory, path)


def write(path: Path, record: Memory | SiteMemory) -> None:
    """In one step. Errors: OSError; ValueError for a number that is none."""
    files.write_json(path, records.told(record))


def check(memory: Memory) -> Memory:
    """The same. Errors: MEASURE-02 unless every site has numbers of samples and of held-out photos that can be."""
    for site in memory.sites.values():
        for values in (site.samples, site.held_out):
            if not values or not all(0 <= value < text.LARGEST for value in values):  # what is no number (text.tidy)
                raise unfit("a site's numbers are missing or impossible")
    return memory


def _read(kind: type[Kind], path: Path) -> Kind:
    try:
        return records.read(kind, path)
    except (records.Unfit, OSError) as error:
        if isinstance(error, records.Unfit) and error.newer:
            raise history.refusal(error, str(path)) from None
        raise unfit(text.line(f"{path.name}: {error}")) from None


def unfit(found: str) -> BouquetError:
    fix = "let the sites measure again: bouquet measure memory; or take memory.json out of the run's folder"
    return BouquetError("MEASURE-02", found=found, fix=fix)


def chance(samples: int, held_out: int, suspicious: int) -> float:
    """Of at least that many suspicious samples by luck alone."""
    return math.prod((samples - i) / (samples + held_out - i) for i in range(suspicious))


def found(site: str, measured: Distances) -> Found:
    samples, held_out = measured.samples, measured.held_out
    count = suspicious(samples, held_out)
    luck = chance(len(samples), len(held_out), count)
    rare = count > 0 and luck < RARE
    if not count:
        words = (
            f"None of {len(samples)} samples is as near to a single training photo as the nearest of {len(held_out)}"
            " held-out photos is."
        )
    else:
        words = (
            f"{count} of {len(samples)} samples {'are' if count > 1 else 'is'} nearer to a single training photo than"
            f" any of {len(held_out)} held-out photos is; where nothing is remembered that happens with a probability"
            f" of {luck:.0%}. "
        )
        words += "Look at them at the site before the adapter goes out." if rare else "That is not unusual."
    return Found(site, count, luck, rare, words.replace("%", " %"))


def suspicious(samples: Sequence[float], held_out: Sequence[float]) -> int:
    """How many samples lie below every held-out photo."""
    return sum(value < min(held_out) for value in samples)


def all_found(memory: Memory) -> list[Found]:
    """One for each site, by name."""
    return [found(site, measured) for site, measured in sorted(memory.sites.items())]
