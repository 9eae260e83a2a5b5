"""A run's folder as the report needs it; nothing here needs torch, and nothing is written.

Enters: a folder of the shared volume (app/hub/volume.py), of a run that is finished, running or failed. Leaves: `Run`.
Errors: REPORT-01 (no run there), REPORT-02 (its history.json cannot be read).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from app import text
from app.errors import BouquetError

LARGE = 2**26  # characters of a text that may be a picture


def need(true: object) -> None:
    """What a file must have. Errors: ValueError."""
    if not true:
        raise ValueError


@dataclass(frozen=True)
class Run:
    """One run: its history, and what else lies in its folder. `status` is {}, `worth` and `memory` None where the files
    are absent.
    """

    folder: Path
    history: dict[str, Any]
    status: dict[str, Any] = field(default_factory=dict)
    worth: dict[str, Any] | None = None
    written: float = 0.0  # seconds since 1970: when the run last said something
    now: float = 0.0
    memory: dict[str, Any] | None = None

    @property
    def state(self) -> str:
        return self.history["state"]

    @property
    def config(self) -> dict[str, Any]:
        return self.history.get("config", {})

    @property
    def rounds(self) -> list[dict[str, Any]]:
        return self.history.get("rounds", [])

    @property
    def wanted(self) -> int:
        """How many rounds the run is to have."""
        return self.config.get("rounds", len(self.rounds))

    @property
    def validation(self) -> list[dict[str, Any]]:
        return self.history.get("validation", [])

    @cached_property
    def names(self) -> list[str]:
        """Every site that took part in any round, by name."""
        return sorted({name for entry in self.rounds for name in entry["sites"]})

    @cached_property
    def refused(self) -> list[tuple[str, str, str]]:
        """(round or 'last evaluation', site, reason), in the order of the rounds; of the round in progress too."""
        rows = [
            (str(entry["round"]), no["site"], no["reason"]) for entry in self.rounds for no in entry.get("refused", [])
        ]
        if self.state != "finished" and self.status.get("round", 0) > len(self.rounds):
            rows += [(str(self.status["round"]), no["site"], no["reason"]) for no in self.status.get("refused", [])]
        return rows + [
            ("last evaluation", no["site"], no["reason"]) for no in self.history.get("refused_final_evaluation", [])
        ]

    def losses(self, site: str) -> list[tuple[int, float]]:
        """(rounds trained, validation loss) wherever the site measured it."""
        return [(entry["after_round"], entry["sites"][site]) for entry in self.validation if site in entry["sites"]]

    def metric(self, site: str, name: str) -> list[tuple[int, float]]:
        """(round, value) wherever the site sent that number."""
        return [(e["round"], e["sites"][site][name]) for e in self.rounds if name in e["sites"].get(site, {})]

    @cached_property
    def files(self) -> list[dict[str, Any]]:
        """The final folder's files with size and SHA-256, so that a copy can be compared with the original."""
        found = sorted(path for path in (self.folder / "final").rglob("*") if path.is_file())
        return [
            {"name": str(p.relative_to(self.folder)), "bytes": p.stat().st_size, "sha256": _sha256(p)} for p in found
        ]

    @cached_property
    def provenance(self) -> dict[str, Any]:
        return _json(self.folder / "final" / "provenance.json") or {}


def read(folder: Path) -> Run:
    """The run in a folder. Errors: REPORT-01, REPORT-02."""
    folder = folder.resolve()
    file = folder / "history.json"
    if not file.is_file():
        raise BouquetError(
            "REPORT-01",
            found=f"no {file}",
            fix=(
                "name a run's folder, or its id; while a run works under Docker: docker compose cp serverapp:/adapters"
                " ./adapters"
            ),
        )
    history = _json(file)
    if not history or "state" not in history:
        raise BouquetError(
            "REPORT-02",
            found=f"{file} is no JSON object with a state",
            fix="copy the run's folder again from the hub's shared volume",
        )
    status = _json(folder / "status.json") or {}
    written = max(path.stat().st_mtime for path in (file, folder / "status.json") if path.is_file())
    worth, memory = _json(folder / "worth.json", LARGE), _json(folder / "memory.json")
    return Run(folder, history, status, worth, written, time.time(), memory)


def _json(file: Path, longest: int = text.LONGEST) -> dict[str, Any] | None:
    """A JSON object; None where there is none. Sites have a hand in it, and an older version may have written it."""
    try:
        value = text.tidy(json.loads(file.read_text()), longest)
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
