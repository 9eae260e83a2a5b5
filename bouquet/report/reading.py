"""A run's folder as the report needs it; nothing here needs torch, and nothing is written.

Enters: a folder of the shared volume (app/hub/volume.py), of a run that is finished, running or failed. Leaves: `Run`.
Errors: REPORT-01 (no run there), REPORT-02 (its history.json cannot be read), REPORT-04 (its worth.json), MEASURE-02
(its memory.json), REPORT-05.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from app.errors import BouquetError
from app.hub import history
from app.hub.history import UNKNOWN, History, Part, Provenance, Round, Status, Validation
from bouquet.report import comparison, memorisation
from bouquet.report.comparison import Worth
from bouquet.report.memorisation import Memory


@dataclass(frozen=True)
class Run:
    """One run: its history, and what else lies in its folder. Where the files are absent `status` says nothing, `worth`
    and `memory` are None.
    """

    folder: Path
    history: History
    status: Status = Status()
    worth: Worth | None = None
    written: float = 0.0  # seconds since 1970: when the run last said something
    now: float = 0.0
    memory: Memory | None = None

    @property
    def state(self) -> str:
        return self.history.state

    @property
    def config(self) -> dict[str, Any]:
        return self.history.config

    @property
    def rounds(self) -> tuple[Round, ...]:
        return self.history.rounds

    @property
    def wanted(self) -> int:
        """How many rounds the run is to have."""
        wanted = self.config.get("rounds")
        return wanted if type(wanted) is int else len(self.rounds)

    @property
    def validation(self) -> tuple[Validation, ...]:
        return self.history.validation

    @cached_property
    def names(self) -> list[str]:
        """Every site that took part in any round, by name."""
        return sorted({name for entry in self.rounds for name in entry.sites})

    @cached_property
    def refused(self) -> list[tuple[str, str, str]]:
        """(round or 'last evaluation', site, reason), in the order of the rounds; of the round in progress too."""
        told = [(str(entry.round), entry.refused) for entry in self.rounds]
        if self.state != "finished" and (self.status.round or 0) > len(self.rounds):
            told.append((str(self.status.round), self.status.refused))
        told.append(("last evaluation", self.history.refused_final_evaluation))
        return [(where, no.site, no.reason) for where, refused in told for no in refused]

    def losses(self, site: str) -> list[tuple[int, float]]:
        """(rounds trained, validation loss) wherever the site measured it."""
        return [(entry.after_round, entry.sites[site]) for entry in self.validation if site in entry.sites]

    def metric(self, site: str, name: str) -> list[tuple[int, float]]:
        """(round, value) wherever the site sent that number."""
        return [(number, part.numbers[name]) for number, part in self.parts(site) if name in part.numbers]

    def parts(self, site: str) -> list[tuple[int, Part]]:
        """(round, the site's part in it) wherever it took part."""
        return [(entry.round, entry.sites[site]) for entry in self.rounds if site in entry.sites]

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """The final folder's files with size and SHA-256, so that a copy can be compared with the original."""
        found = sorted(path for path in (self.folder / "final").rglob("*") if path.is_file())
        return [
            {"name": str(p.relative_to(self.folder)), "bytes": p.stat().st_size, "sha256": _sha256(p)} for p in found
        ]

    @cached_property
    def provenance(self) -> Provenance:
        try:
            return history.read_provenance(self.folder / "final" / history.PROVENANCE)
        except BouquetError:  # there is none yet; the page is about the run
            return UNKNOWN


def read(folder: Path) -> Run:
    """The run in a folder. Errors: REPORT-01, -02, -04, -05, MEASURE-02."""
    folder = folder.resolve()
    file = folder / history.FILE
    if not file.is_file():
        raise BouquetError(
            "REPORT-01",
            found=f"no {file}",
            fix=(
                "name a run's folder, or its id; while a run works under Docker: docker compose cp serverapp:/adapters"
                " ./adapters"
            ),
        )
    told = history.read(file)
    try:
        status = history.read_status(folder / history.STATUS)
    except BouquetError:  # it says what the run does now, and no more
        status = Status()
    written = max(path.stat().st_mtime for path in (file, folder / history.STATUS) if path.is_file())
    worth, memory = comparison.read(folder / comparison.FILE), memorisation.read(folder / memorisation.FILE)
    return Run(folder, told, status, worth, written, time.time(), memory)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
