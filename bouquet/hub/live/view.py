"""What the hub's page shows, worked out from the runs' folders and the list of sites; the template shows it.

Enters: the folder of runs, `Known` sites. Leaves: HTML. A file is read again when it has changed, a chart drawn again
when a round is done.
"""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from markupsafe import Markup

from app.errors import BouquetError
from app.hub.history import Status
from bouquet.hub import roster
from bouquet.hub.live.sites import Known
from bouquet.report import charts, findings, page, pictures, reading

HERE = Path(__file__).parent
SHOWN = 50  # runs in the list
READ = ("history.json", "status.json", "samples.png")
FILES = {  # what may be fetched of a run, by the name in the address
    "adapter_model.safetensors": "final/adapter_model.safetensors",
    "adapter_config.json": "final/adapter_config.json",
    "pytorch_lora_weights.safetensors": "final/pytorch_lora_weights.safetensors",
    "kohya.safetensors": "final/kohya.safetensors",
    "provenance.json": "final/provenance.json",
    "samples.png": "samples.png",
    "history.json": "history.json",
}
TEMPLATES = page.templates(HERE)


class Seen:
    """One run as it was when it was last read, and what has been drawn of it."""

    def __init__(self, folder: Path, stamp: tuple[tuple[int, int], ...]) -> None:
        self.folder, self.stamp = folder, stamp
        self.run = reading.read(folder)

    @cached_property
    def chart(self) -> Markup | None:
        """Validation loss by site and round."""
        run = self.run
        if not run.validation:
            return None
        mean = [(entry.after_round, entry.weighted) for entry in run.validation]
        return Markup(
            charts.lines(
                [run.losses(name) for name in run.names], mean, "rounds trained", "Validation loss by site and round"
            )
        )

    @cached_property
    def legend(self) -> list[dict[str, str]]:
        return page.legend(self.run)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Of each prompt what the base model draws, and what the newest adapter does."""
        try:
            cut = pictures.cut(self.folder / "samples.png", self.run.config, len(self.run.rounds))
        except (OSError, ValueError):  # it is being written anew
            return []
        if not cut or "prompts" not in cut:
            return []
        names = ["base model", f"round {cut['rounds'][-1]}"] if len(cut["rounds"]) > 1 else ["base model"]
        return [
            {"text": p["text"], "pictures": list(zip(names, (p["pictures"][0], p["pictures"][-1]), strict=False))}
            for p in cut["prompts"]
        ]

    @cached_property
    def files(self) -> list[str]:
        return [name for name, place in FILES.items() if place.startswith("final/") and (self.folder / place).is_file()]

    @property
    def doing(self) -> str:
        return self.run.status.state if self.run.state == "running" else ""

    @property
    def eta(self) -> float | None:
        """Seconds, at the median pace of the rounds so far."""
        if not self.run.rounds or self.run.state != "running":
            return None
        pace = float(statistics.median(entry.seconds for entry in self.run.rounds))
        return pace * (self.run.wanted - len(self.run.rounds))

    @property
    def until(self) -> str:
        """When the sites' time is up, where the hub waits for them."""
        waits, deadline = self.doing.startswith("waiting"), self.run.status.deadline
        return clock(deadline) if waits and isinstance(deadline, int | float) else ""

    @property
    def last_loss(self) -> float | None:
        return self.run.validation[-1].weighted if self.run.validation else None

    @property
    def outcome(self) -> str:
        return findings.outcome(self.run)

    @property
    def last_word(self) -> str:
        return clock(self.run.written)


class Runs:
    """Every run on the volume, newest first."""

    def __init__(self, root: Path) -> None:
        self.root, self.kept = root, dict[str, Seen]()

    def folder(self, name: str) -> Path | None:
        """That run's; None where there is no such run, whatever the name is."""
        folder = self.root / name
        return (
            folder
            if name.isdecimal() and len(name) < 40 and not folder.is_symlink() and (folder / "history.json").is_file()
            else None
        )

    def all(self) -> list[Seen]:
        """Those that can be read: a run may be writing its first file, or be taken away."""
        found = {}
        for file in self.root.glob("*/history.json"):
            if (folder := self.folder(file.parent.name)) is None:
                continue
            try:
                stamp = tuple(_stamp(folder / name) for name in READ)
                kept = self.kept.get(folder.name)
                found[folder.name] = kept if kept and kept.stamp == stamp else Seen(folder, stamp)
            except (BouquetError, OSError):
                continue
        self.kept = found
        return sorted(found.values(), key=lambda seen: seen.stamp[0], reverse=True)


def whole(runs: Runs, known: Known) -> str:
    """The page, with what it shows now."""
    return TEMPLATES.get_template("live.html").render(now=Markup(now(runs, known)))


def now(runs: Runs, known: Known) -> str:
    """The part of the page that changes."""
    every = runs.all()
    going = [seen for seen in every if seen.run.state == "running"]
    return TEMPLATES.get_template("now.html").render(
        current=next(iter(going or every), None),
        runs=every[:SHOWN],
        older=max(0, len(every) - SHOWN),
        sites=sites(every, known),
        known=known,
        asked=clock(known.at),
    )


def sites(every: list[Seen], known: Known) -> list[dict[str, Any]]:
    """A row a site: what the hub says of it, and what it did in all runs, newest first."""
    rows: dict[str, dict[str, Any]] = {}
    for site in known.sites or ():
        seen = datetime.fromisoformat(site.seen) if site.seen else None
        rows[site.name] = {
            "name": site.name,
            "state": site.state,
            "seen": f"{seen:%Y-%m-%d %H:%M UTC}" if seen and site.state != "online" else "",
        }
    done = roster.deeds(seen.run.history for seen in reversed(every))
    for name in {*rows, *done}:
        row = rows.setdefault(name, {"name": name, "state": "", "seen": ""})
        row |= {"images": None, "gpu": None, "rounds": 0, "doing": ""} | done.get(name, {})
    current = next((seen for seen in every if seen.run.state == "running"), None)
    status = current.run.status if current else Status()
    for name in rows.keys() & {*status.replied}:
        rows[name]["doing"] = "has replied"
    for name in rows.keys() & {*status.missing}:
        rows[name]["doing"] = "missing" if rows[name]["state"] == "offline" else working(name, status)
    for name in rows.keys() & {*status.undecided}:
        rows[name]["doing"] = "waits for its operator's consent"
    for name in rows.keys() & {*status.declined}:
        rows[name]["doing"] = "has declined"
    return [rows[name] for name in sorted(rows)]


def working(name: str, status: Status) -> str:
    """Of a site that has not replied; with a time of day and no count of seconds, so that the page stays the same."""
    told = f"at work since {clock(status.since)}" if status.since is not None else "at work"
    return told + (f", {status.took[name]:.0f} s the last time" if name in status.took else "")


def part(name: str) -> str:
    """The page's style and script. The style is the report's, and what is this page's own."""
    own = (HERE / name).read_text()
    return (page.HERE / "page.css").read_text() + own if name.endswith(".css") else own


def clock(seconds: float) -> str:
    """A time of the hub, UTC; '' for none."""
    if not seconds:
        return ""
    then = datetime.fromtimestamp(seconds, UTC)
    return f"{then:%H:%M:%S} UTC" if time.time() - seconds < 43_200 else f"{then:%Y-%m-%d %H:%M} UTC"


def _stamp(file: Path) -> tuple[int, int]:
    """(when it was written, in ns; its size); (0, 0) where there is none."""
    try:
        status = file.stat()
    except FileNotFoundError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
