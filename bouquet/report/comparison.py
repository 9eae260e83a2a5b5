"""The comparison of a run with training alone, as files: a site's column (NAME.worth.json), the hub's worth.json.

One number a seed, in the order of `seeds`; docs/records.md has every field. Any program that measures the same may
write them.
Enters: a file, which came from a site. Leaves: the record, or the file. Errors: REPORT-04 (no such record, or numbers
that cannot be), REPORT-05 (a newer version wrote it).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app import files, records, text
from app.errors import BouquetError
from app.hub import history
from app.records import entry

VERSION = 2
FILE = "worth.json"
LARGE = 2**26  # characters of a text that may be a picture
LEAST, MOST = 1e-6, 1e6  # of a loss
CONTENDERS = ("base", "alone", "federated", "personal", "pooled")
Numbers = dict[str, tuple[float, ...]]  # a number a seed: by contender, or by site
Kind = TypeVar("Kind", "Worth", "Column")


@dataclass(frozen=True)
class Measured:
    """What one site measured."""

    held_out: int = entry("photos that it held out", "photos")
    loss: Numbers = entry("fixed-noise loss on those, by contender, a number a seed; less is better")
    judge: Numbers | None = entry("share of pictures that show what was asked for, likewise", default=None)
    picture: str = entry("what each contender draws, where the site agreed: base64 of a PNG", default="")
    others: Numbers | None = entry(
        "loss on the same photos of what another site trained alone, by its name", default=None
    )
    digits: int | None = entry("significant digits that the losses were rounded to, if they were", default=None)


@dataclass(frozen=True)
class Column:
    """NAME.worth.json: what a site sends to the hub."""

    site: str = entry("the site's name")
    seeds: tuple[int, ...] = entry("of the runs that are compared")
    held_out: int = entry("photos that it held out", "photos")
    loss: Numbers = entry("as in worth.json")
    judge: Numbers | None = entry("as in worth.json", default=None)
    steps: int | None = entry("of each training at one site", "steps", default=None)
    others: Numbers | None = entry("as in worth.json", default=None)
    digits: int | None = entry("as in worth.json", default=None)
    runs: dict[str, str] | None = entry("SHA-256 of each run's final adapter, by seed", default=None)
    version: int = entry("of this format", default=VERSION)


@dataclass(frozen=True)
class Worth:
    """worth.json in a run's folder."""

    seeds: tuple[int, ...] = entry("of the runs that are compared")
    sites: dict[str, Measured] = entry("by name")
    run: str = entry("id of the first of these runs", default="")
    steps: int | None = entry("of each training at one site", "steps", default=None)
    version: int = entry("of this format", default=VERSION)


def read(path: Path) -> Worth | None:
    """A run's worth.json, checked; None where there is none. Errors: REPORT-04, REPORT-05."""
    if not path.is_file():
        return None
    return check(_read(Worth, path))


def read_column(path: Path) -> Column:
    """A site's. Errors: REPORT-04, REPORT-05."""
    return _read(Column, path)


def write(path: Path, record: Worth | Column) -> None:
    """In one step. Errors: OSError; ValueError for a number that is none."""
    files.write_json(path, records.told(record))


def check(worth: Worth) -> Worth:
    """The same. Errors: REPORT-04 unless every site has as many numbers as there are seeds, alone and federated at
    least, and each is what a loss or a share may be.
    """
    fits = (_fits(each, len(worth.seeds)) for each in worth.sites.values())
    if worth.seeds and all(fits):
        return worth
    raise _unreadable("a number for each seed is missing or impossible")


def _fits(measured: Measured, count: int) -> bool:
    others = measured.others or {}
    kinds = [measured.loss] if measured.judge is None else [measured.loss, measured.judge]
    if not all({"alone", "federated"} <= numbers.keys() <= set(CONTENDERS) for numbers in kinds):
        return False
    for numbers in (*kinds, others):
        least, most = (0.0, 1.0) if numbers is measured.judge else (LEAST, MOST)
        for name, values in numbers.items():
            if len(values) != count and not (name == "base" and len(values) == 1 and numbers is not others):
                return False
            if not all(least <= value <= most for value in values):
                return False
    return measured.held_out > 0 and (measured.digits is None or 0 < measured.digits < 20)


def _read(kind: type[Kind], path: Path) -> Kind:
    try:
        return records.read(kind, path, LARGE)
    except (records.Unfit, OSError) as error:
        if isinstance(error, records.Unfit) and error.newer:
            raise history.refusal(error, str(path)) from None
        raise _unreadable(text.line(f"{path.name}: {error}")) from None


def _unreadable(found: str) -> BouquetError:
    fix = "make it again, or take worth.json out of the run's folder"
    return BouquetError("REPORT-04", found=found, fix=fix)
