"""What a check of `scripts/bench accept` found, and all of it as JSON, Markdown and an exit code.

`state`: pass, fail, skip: whether the deployment works. `target`: pass, fail, or empty where there is none or none is
judged: whether it is as fast and as frugal as it should be. A missed target does not hide that the check worked, and
either is exit code 1.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

NO_TIME = "no time left"


@dataclass(frozen=True)
class Target:
    """A number and where it should lie."""

    name: str
    value: float
    least: float = -inf
    most: float = inf

    @property
    def met(self) -> bool:
        return self.least <= self.value <= self.most

    def __str__(self) -> str:
        ends = [f"{word} {end:g}" for word, end in (("at least", self.least), ("at most", self.most)) if isfinite(end)]
        return f"{self.name} {self.value:.2f} ({', '.join(ends)})"


@dataclass(frozen=True)
class Found:
    """A check that passed: `text` for a person, `facts` for the JSON."""

    text: str
    facts: dict[str, Any] = field(default_factory=dict)
    targets: list[Target] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """One check's result."""

    name: str
    state: str
    text: str
    seconds: float
    target: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, found: Found, seconds: float, judged: bool) -> Row:
        """judged: whether missed targets count (on a GPU)."""
        target = ("pass" if all(t.met for t in found.targets) else "fail") if found.targets and judged else ""
        told = "; ".join([found.text, *map(str, found.targets)])
        facts = found.facts | ({"targets": [json_able(t) for t in found.targets]} if found.targets else {})
        return cls(name, "pass", told, seconds, target, facts)

    @property
    def wrong(self) -> bool:
        return "fail" in (self.state, self.target) or self.incomplete

    @property
    def incomplete(self) -> bool:
        return self.state == "skip" and self.text.startswith(NO_TIME)

    def __str__(self) -> str:
        state = f"{self.state}, target missed" if self.target == "fail" else self.state
        return f"{self.name:<10} {state:<5} {self.text}  {self.seconds:.1f} s"


def json_able(target: Target) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: value for key, value in asdict(target).items() if not isinstance(value, float) or isfinite(value)} | {
        "met": target.met
    }


@dataclass
class Report:
    """Everything so far; written after every check, so that what there is survives whatever ends the command."""

    file: Path
    wanted: list[str]
    about: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows = sorted([*self.rows, row], key=lambda row: self.wanted.index(row.name))
        self.write("running")

    @property
    def code(self) -> int:
        return int(any(row.wrong for row in self.rows) or len(self.rows) < len(self.wanted))

    @property
    def verdict(self) -> str:
        """accepted, not accepted, or incomplete where nothing is wrong but something was not looked at."""
        if any(row.wrong and not row.incomplete for row in self.rows):
            return "not accepted"
        return "incomplete" if self.code else "accepted"

    def write(self, state: str) -> None:
        """state: running, cut off, or the verdict."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        checks = {row.name: asdict(row) for row in self.rows}
        told = self.about | {
            "state": state,
            "checks": checks,
            "missing": [name for name in self.wanted if name not in checks],
        }
        temporary = self.file.with_name(f".{self.file.name}.tmp")
        temporary.write_text(json.dumps(told, indent=1) + "\n")
        temporary.replace(self.file)

    def table(self) -> str:
        lines = ["| check | result | target | found | s |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {r.name} | {r.state} | {r.target or '-'} | {r.text.replace('|', '/')} | {r.seconds:.0f} |"
            for r in self.rows
        ]
        return "\n".join(lines)
