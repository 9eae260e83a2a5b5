"""A run while it works: round, who has replied, who is missing and since when, the deadline, the last error by site,
the last good adapter.

  bouquet hub status [RUN] [--follow] [--json]

Exit code: 0 the run ended well, 1 it failed, 3 it still works.
Enters: the run's history.json and status.json, what the hub says of it (a killed ServerApp cannot write that it failed,
nor one that starts that it starts), the sites' last seen.
Errors: REPORT-01, REPORT-02.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from app import text
from app.config import RunConfig
from app.errors import BouquetError
from app.hub.history import History
from bouquet.hub import adapters, control, roster
from bouquet.report import progress
from bouquet.report.reading import Run, read

CODES = {"finished": 0, "failed": 1, "running": 3}
WAITS = {  # by what Flower says of a run that has written nothing yet
    "pending": "for the hub's SuperExec to take it; is `serverapp` up?",
    "starting": "for its ServerApp to start; on a slow host that takes minutes",
    "running": "for its ServerApp's first word, in the service `serverapp`",
}


def show(run: str, follow: bool = False, as_json: bool = False) -> int:
    """Print the run's status, once or until it has ended; the exit code."""
    with tempfile.TemporaryDirectory() as copies:
        before = ""
        while True:
            found = find(run, Path(copies))
            if isinstance(found, Run):
                state, why = end_of(found)
                facts, line = tell(found, state, why, seen()), progress.line(found)
            else:
                facts = early(found)
                state, line = facts["state"], f"run {found.run}  {found.state} since {_clock(facts['since'])}"
            if follow and state == "running":
                if sys.stdout.isatty():
                    print(progress.CLEAR + line, end="", flush=True)
                elif line != before:
                    print(line, flush=True)
                before = line
                time.sleep(2)
                continue
            if before and sys.stdout.isatty():
                print()
            print(json.dumps(facts, indent=1) if as_json else words(facts))
            return CODES[state]


def find(number: str, copies: Path) -> Run | control.Told:
    """The run of that number, or the newest that the hub knows, else the newest on the volume.

    What the hub says of it, where it has written nothing yet, or never will. Errors: REPORT-01, REPORT-02.
    """
    try:
        told = control.run(number)
    except BouquetError:  # without a hub there is what it has written
        told = None
    try:
        return read(adapters.run(number or (told.run if told else ""), copies))
    except BouquetError as error:
        if error.code != "REPORT-01":
            raise
        if told and (number or told.state != "finished:completed"):
            return told
        if number or not told:
            raise
    return read(adapters.run("", copies))  # somebody has taken the newest run's folder away


def end_of(run: Run) -> tuple[str, str]:
    """(running, finished or failed; why). The history says it, unless the ServerApp was killed: then Flower alone
    knows.
    """
    if run.state != "running":
        return run.state, run.history.error
    try:
        told = control.run(run.history.run)
    except BouquetError as error:
        return "running", f"the hub does not answer now: {error}"
    if told is None:
        return "failed", "the hub does not know this run any more: its state was made anew"
    if not told.state.startswith("finished"):
        return "running", ""
    details = f": {told.details}" if told.details else ""
    return "failed", f"Flower says {told.state}{details}; the ServerApp ended before it could say why"


def early(told: control.Told) -> dict[str, Any]:
    """The facts of a run that has written nothing: what it waits for, or why it never will."""
    waits, said = told.state in WAITS, told.details or "the ServerApp ended before it wrote anything"
    return {
        "run": told.run,
        "state": "running" if waits else "failed",
        "doing": told.state if waits else "",
        "why": "" if waits else f"Flower says {told.state}: {said}",
        "rounds": {"done": 0, "wanted": None},
        "round": None,
        "try": None,
        "since": datetime.fromisoformat(told.since).astimezone(UTC).isoformat(timespec="seconds"),
        "deadline": None,
        "for": WAITS.get(told.state),
        "replied": [],
        "missing": {},
        "took": {},
        "errors": {},
        "undecided": [],
        "declined": [],
        "adapter": None,
        "aggregation_error": None,
        "again": "",
    }


def seen() -> dict[str, str]:
    """Site -> since when the hub has not heard of it, of those that are not online; {} when the hub does not answer."""
    try:
        return {site.name: site.seen or "never" for site in roster.registered() if site.state != "online"}
    except BouquetError:
        return {}


def tell(run: Run, state: str, why: str, offline: dict[str, str]) -> dict[str, Any]:
    """The facts, by name; times are UTC in ISO 8601."""
    status, waiting = run.status, state == "running" and run.status.state.startswith("waiting")
    errors: dict[str, str] = {}
    for number, site, reason in run.refused:
        errors[site] = f"round {number}: {reason}"
    return {
        "run": run.history.run,
        "state": state,
        "doing": status.state if state == "running" else "",
        "why": why,
        "rounds": {"done": len(run.rounds), "wanted": run.wanted},
        "round": status.round if state == "running" else None,
        "try": status.attempt + 1 if waiting else None,
        "since": _utc(status.since) if waiting else None,
        "deadline": _utc(status.deadline) if waiting else None,
        "for": None,
        "replied": list(status.replied) if state == "running" else [],
        "missing": {site: offline.get(site, "online") for site in status.missing} if waiting else {},
        "took": status.took if waiting else {},
        "errors": errors,
        "undecided": list(status.undecided) if state == "running" else [],
        "declined": list(status.declined),
        "adapter": f"{run.history.run}/round-{run.rounds[-1].round:04d}" if run.rounds else None,
        "aggregation_error": run.rounds[-1].aggregation_error if run.rounds else None,
        "again": again(run.history),
    }


def again(told: History) -> str:
    """What a shell has to say for the run to go on: `--run-config` with the run's own keys, but for those that are as
    usual.
    """
    usual = asdict(RunConfig())
    mine = {key: value for key, value in told.config.items() if key in usual and usual[key] != value}
    mine = {"resume": told.run} | {key: value for key, value in mine.items() if key != "resume"}
    return shlex.quote(" ".join(f"{key.replace('_', '-')}={_toml(value)}" for key, value in mine.items()))


def _toml(value: Any) -> str:
    """As `flwr run` reads it, which takes the first quote within a text for its end."""
    told = json.dumps(value, ensure_ascii=False)
    return '"' + told[1:-1].replace(r"\"", r"\u0022") + '"' if isinstance(value, str) else told


def words(facts: dict[str, Any], now: float | None = None) -> str:
    """For people: a line a fact."""
    now = time.time() if now is None else now
    done, wanted = facts["rounds"]["done"], facts["rounds"]["wanted"]
    lines = [f"run       {facts['run']}  {facts['state']}" + (f", {facts['doing']}" if facts["doing"] else "")]
    if wanted is not None:
        lines.append(f"rounds    {done} of {wanted} done" + (f", now {facts['round']}" if facts["round"] else ""))
    if facts["why"]:
        lines.append(f"why       {facts['why']}")
    if facts["for"]:
        lines.append(f"waiting   since {_clock(facts['since'])}, {facts['for']}")
    elif facts["deadline"]:
        left = datetime.fromisoformat(facts["deadline"]).timestamp() - now
        attempt = f", try {facts['try']}" if facts["try"] > 1 else ""
        lines.append(
            f"waiting   since {_clock(facts['since'])}, until {_clock(facts['deadline'])} ({max(0, left):.0f} s"
            f" more){attempt}"
        )
    if facts["replied"]:
        lines.append(f"replied   {', '.join(facts['replied'])}")
    for site, since in facts["missing"].items():
        doing = working(site, facts, now) if since == "online" else f"offline since {_clock(since)}"
        lines.append(f"missing   {site}  {doing}")
    asked = "its operator has not approved the run yet; it is asked again"
    lines += [f"undecided {site}  {asked}" for site in facts["undecided"]]
    lines += [f"declined  {site}  its operator wants no part in the run" for site in facts["declined"]]
    lines += [f"refused   {site}  {reason}" for site, reason in facts["errors"].items()]
    lines.append(f"adapter   {facts['adapter']}" if facts["adapter"] else "adapter   none yet")
    if facts["adapter"]:
        lost = facts["aggregation_error"]
        lines.append(
            f"averaging {'not known' if lost is None else f'lost {lost:.1%} of the mean update in this round'}"
        )
    if facts["state"] == "failed" and facts["adapter"]:
        lines.append(f"next      mend it, then: flwr run . remote-deployment --run-config {facts['again']}")
    if facts["state"] == "finished":
        lines.append("next      scripts/bouquet report")
    return "\n".join(text.printable(line) for line in lines)


def working(site: str, facts: dict[str, Any], now: float) -> str:
    """What is known of a site that has a message and has not replied yet."""
    since = f" for {max(0, now - datetime.fromisoformat(facts['since']).timestamp()):.0f} s" if facts["since"] else ""
    return f"at work{since}" + (f", the last time {facts['took'][site]:.0f} s" if site in facts["took"] else "")


def _utc(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat() if seconds is not None else None


def _clock(time_: str) -> str:
    return f"{datetime.fromisoformat(time_):%H:%M:%S} UTC" if time_ != "never" else "its admission"
