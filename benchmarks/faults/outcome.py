"""What one repeat of one case left, and the table of all of them."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Outcome:
    """A case's one repeat: whether the run survived it, seconds from fault to the next whole round, adapters lost."""

    case: str
    survived: bool
    recovery: float | None = None
    lost: int = 0
    problems: list[str] = field(default_factory=list)
    how: str = ""  # "resumed": the run ended, declared, and a second one went on where it stopped
    skipped: str = ""  # why it could not be tried here
    hub: str = "bouquet"  # or "stock": Flower's own FedAvg

    def __str__(self) -> str:
        said = f"skipped: {self.skipped}" if self.skipped else "survived" if self.survived else "FAILED"
        recovery = "" if self.recovery is None else f"  recovery {self.recovery:g} s"
        more = [f"and {len(self.problems) - 3} more"] if len(self.problems) > 3 else []
        return "\n    ".join(
            [f"{said:<9} {self.case}{recovery}{'  ' + self.how if self.how else ''}", *self.problems[:3], *more]
        )


def failed(outcomes: list[Outcome]) -> bool:
    """Whether this project's own hub did not survive something. What becomes of a stock hub is told, not judged."""
    return any(not (o.survived or o.skipped) for o in outcomes if o.hub == "bouquet")


def percentile(values: list[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def rows(outcomes: list[Outcome]) -> list[dict]:
    """One row a case, in the order in which they were first seen."""
    table = []
    for case in dict.fromkeys(o.case for o in outcomes):
        mine, theirs = ([o for o in outcomes if o.case == case and o.hub == hub] for hub in ("bouquet", "stock"))
        tried = [o for o in mine if not o.skipped]
        times = [o.recovery for o in tried if o.recovery is not None]
        table.append({
            "case": case,
            "repeats": len(tried),
            "skipped": next((o.skipped for o in mine if o.skipped), "") if not tried else "",
            "survived": sum(o.survived for o in tried),
            "resumed": sum(o.how == "resumed" for o in tried),
            "p50": percentile(times, 0.5) if times else None,
            "p95": percentile(times, 0.95) if times else None,
            "lost": sum(o.lost for o in tried),
            "stock": _stock(theirs),
        })  # fmt: skip
    return table


def _stock(outcomes: list[Outcome]) -> str:
    """What became of the stock hub's result, in a word or two; '' where it was not tried."""
    said = " ".join(problem for o in outcomes for problem in o.problems)
    if not outcomes:
        return ""
    if all(o.survived for o in outcomes):
        return "the honest mean"
    if "finished:failed" in said or "not within" in said:
        return "run lost" + ", no adapter" * ("no adapter" in said)
    if "not finite" in said:
        return "poisoned: not finite"
    if far := re.search(r"it is (\S+) away", said):
        return f"poisoned: {float(far[1]):.0e} from the honest mean"
    return f"another adapter: {sum(len(o.problems) for o in outcomes)} tensors wrong"


def machine() -> str:
    """As a reader would name it: 2-core AMD EPYC, no GPU."""
    found = (
        re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").is_file()
        else None
    )
    gpu = "with GPU" if Path("/dev/nvidiactl").exists() else "no GPU"
    return f"{os.cpu_count()}-core {found[1].strip() if found else platform.machine()}, {gpu}"


def markdown(outcomes: list[Outcome]) -> str:
    """The table that docs/faults.md and the README quote."""
    lines = [
        f"{machine()}, {time.strftime('%Y-%m-%d')}; 3 sites, 3 rounds, base model mini.",
        "",
        "| case | repeats | survived | recovery p50 / p95 | adapters lost | stock FedAvg |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows(outcomes):
        if row["skipped"]:
            lines.append(f"| {row['case']} | 0 | not tried: {row['skipped']} | – | – | {row['stock'] or '–'} |")
            continue
        times = "–" if row["p50"] is None else f"{row['p50']:.0f} / {row['p95']:.0f} s"
        how = f" ({row['resumed']} by resume)" if row["resumed"] else ""
        lines.append(
            f"| {row['case']} | {row['repeats']} | {row['survived']}{how} | {times} | {row['lost']} |"
            f" {row['stock'] or '–'} |"
        )
    return "\n".join(lines) + "\n"


def read(file: Path) -> list[Outcome]:
    return [Outcome(**each) for each in json.loads(file.read_text())] if file.is_file() else []


def write(file: Path, outcomes: list[Outcome]) -> None:
    file.write_text(json.dumps([asdict(o) for o in outcomes], indent=1, ensure_ascii=False) + "\n")
