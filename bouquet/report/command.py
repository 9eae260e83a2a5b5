"""One HTML file about one run: did it work, what to look at, pictures by round, sites, time, GPU, files and hashes.

  bouquet report [RUN] [--out FILE] [--follow]

RUN     a run's folder or its id; default: the last run that ended well (latest)
--out   where the page goes; default: report.html in the run's folder; - writes it to standard output
--follow  while the run works: its progress here, and a new page after every round; exit code 1 when the run fails

The page asks nobody for anything: it opens from disk. Errors: REPORT-01 to REPORT-03.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from app import files
from app.errors import BouquetError
from bouquet import ROOT
from bouquet.report import progress
from bouquet.report.page import page
from bouquet.report.reading import Run, read

ADAPTERS = Path(os.environ.get("BOUQUET_ADAPTERS") or ROOT / ".bouquet" / "adapters")


def report(run: str = "latest", out: str = "", follow: bool = False) -> int:
    """Write a run's page, or, with `follow`, one after every round until it has ended; 1 for a run that failed. Errors:
    REPORT-01 to -03.
    """
    folder = find(run)
    if not follow:
        told = write(read(folder), out)
        print(told, file=sys.stderr if out == "-" else sys.stdout)
        return 0
    last = progress.follow(folder, sys.stdout, lambda found: write(found, out))
    print(f"report  {target(last, out)}")
    return 0 if last.state == "finished" else 1


def find(run: str) -> Path:
    """A run's folder, from its path or from its id on the shared volume."""
    return Path(run) if Path(run).is_dir() else ADAPTERS / run


def target(run: Run, out: str) -> Path:
    return Path(out) if out else run.folder / "report.html"


def write(run: Run, out: str) -> str:
    """The page to its place, in one step; what to tell the person. Errors: REPORT-03."""
    text = page(run)
    if out == "-":
        sys.stdout.write(text)
        return "report  standard output"
    file = target(run, out)
    try:
        files.write(file, text)
    except OSError as error:
        found, fix = f"{file}: {error.strerror}", "name a place where you may write: bouquet report --out FILE"
        raise BouquetError("REPORT-03", found=found, fix=fix) from None
    return f"report  {file}"
