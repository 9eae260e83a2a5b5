"""A run as it works, to its real end: the ServerApp's own lines as they come, whatever becomes of the link to the hub.

Enters: a run's number. Leaves: lines, then (state, details). A hub that is away is waited for, as the run is taken up
there: `flwr run --stream` ends with the first link that breaks, and with 0 whatever became of the run.
Errors: HOST-08, no hub for PATIENT, or one that knows no such run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from app import text
from app.errors import BouquetError
from bouquet import progress
from bouquet.hub import control, runs

ROUND = re.compile(r"bouquet: round (\d+)/(\d+)  ")
OURS = re.compile(r"bouquet: |[A-Z]+-\d\d  |  (found|fix|help) ")  # the server's progress lines and its named errors
PATIENT = 300.0  # seconds without a hub
AGAIN = 0.2  # seconds until a log that has ended is looked at again
SOON = 1.0  # seconds until a hub, or a log, that was not there is
LAST = 5  # so often a finished run's log is asked for, if it cannot be had

Show = Callable[[str], None]


def follow(run: str, show: Show, timeout: float = 3600) -> tuple[str, str]:
    """Pass on the server's own lines as they come, until the run has really ended; its (state, details)."""
    heard, begun, failed, end = 0.0, "", 0, time.monotonic() + timeout
    while True:
        state, details = status(run, show)  # before its log, of which nothing is missed then
        over = state.startswith("finished")
        try:
            for said, moment in control.log(run, heard):
                heard, failed = max(heard, moment), failed if over else 0
                lines, begun = ours(begun + said)
                for line in lines:
                    show(line)
                if time.monotonic() > end:
                    break
            failed = 0
        except BouquetError as error:
            if (failed := failed + 1) == 2:  # once is a link that broke
                show(f"bouquet: the run's log cannot be had now: {error.found}")
        if time.monotonic() > end or (over and (not failed or failed >= LAST)):
            for line in ours(begun + "\n")[0]:
                show(line)
            return state, details
        time.sleep(SOON if failed else AGAIN)


def status(run: str, show: Show) -> tuple[str, str]:
    """runs.status, of a hub that may be away for a while."""
    since = None
    while True:
        try:
            return runs.status(run)
        except control.Unanswered as error:
            if since is None:
                since = time.monotonic()
                show(f"bouquet: the hub does not answer now ({error.found}); asking for {PATIENT / 60:.0f} minutes")
            if time.monotonic() - since > PATIENT:
                found = f"{error.found}, for {PATIENT / 60:.0f} minutes"
                fix = f"the run is taken up when the hub is back: bouquet hub status {run}"
                raise BouquetError("HOST-08", did="does not answer", found=found, fix=fix) from None
        time.sleep(SOON)


def ours(said: str) -> tuple[list[str], str]:
    """The server's own among the lines that have ended, and what there is of the next."""
    *ended, begun = said.split("\n")
    lines = [text.printable(line[: text.LONGEST].rstrip()) for line in ended if OURS.match(line)]
    return lines, begun[: text.LONGEST]


def watch(run: str) -> tuple[str, str]:
    """The same for a person: the lines on standard output, and at a terminal how many rounds are done."""
    with progress.Bar("rounds", lines=False) as bar:

        def show(line: str) -> None:
            print(line, flush=True)
            if found := ROUND.match(line):
                bar.to(int(found[1]), int(found[2]))

        return follow(run, show, timeout=float("inf"))
