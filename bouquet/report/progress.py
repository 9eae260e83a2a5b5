"""A run's progress in the terminal, from its folder alone: one line that renews itself, or plain lines when it is no
terminal.

Enters: history.json and, where the hub writes it, status.json. Leaves: lines such as
`round 4/6  validation ▇▄▂▁ 0.1070  sites 2  18 s a round  ETA 54 s`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from app import text
from bouquet.report.reading import Run, read

BARS = "▁▂▃▄▅▆▇█"
CLEAR = "\r\x1b[2K"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A bar a value, the newest `width` of them, lowest to highest; equal values are all low."""
    shown = list(values)[-width:]
    low, high = min(shown, default=0), max(shown, default=0)
    step = (high - low) / (len(BARS) - 1)
    return "".join(BARS[round((value - low) / step)] if step else BARS[0] for value in shown)


def line(run: Run) -> str:
    """The run on one line."""
    losses = [entry.weighted for entry in run.validation]
    parts = [f"round {len(run.rounds)}/{run.wanted}"]
    if losses:
        parts.append(f"validation {sparkline(losses)} {losses[-1]:.4f}")
    if run.rounds:
        pace = statistics.median(entry.seconds for entry in run.rounds)
        parts += [f"sites {len(run.rounds[-1].sites)}", f"{pace:.0f} s a round"]
        if run.state == "running":
            parts.append(f"ETA {pace * (run.wanted - len(run.rounds)):.0f} s")
    if run.state == "running" and run.status.missing:
        parts.append("waiting for " + ", ".join(run.status.missing))
    if run.state != "running":
        parts.append(run.state + (f"  {run.history.error}" if run.history.error else ""))
    return text.printable("  ".join(parts))


def follow(folder: Path, out: TextIO, changed: Callable[[Run], object] = lambda run: None, poll: float = 1.0) -> Run:
    """Show the run until it has ended; `changed` gets it whenever a round is done or its state is another. Errors:
    REPORT-01, -02.
    """
    before, shown = None, ""
    while True:
        run = read(folder)
        if (now := (len(run.rounds), run.state)) != before:
            before = now
            changed(run)
            if not out.isatty():
                print(line(run), file=out, flush=True)
        if out.isatty() and (latest := line(run)) != shown:
            out.write(CLEAR + latest)
            out.flush()
            shown = latest
        if run.state != "running":
            out.write("\n" if out.isatty() else "")
            return run
        time.sleep(poll)
