"""Processes that are killed, told to end, or stopped for a while."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from benchmarks.faults.bench import Bench
from benchmarks.faults.case import Case

Fault = Callable[[Bench, str], None]


def ends(name: str, number: signal.Signals) -> Fault:
    """That signal to one process, which is started again at once."""
    return lambda bench, run: bench.signal(name, number)


def ends_child(name: str, program: str, number: signal.Signals = signal.SIGKILL) -> Fault:
    return lambda bench, run: os.kill(bench.child(name, program), number)


def pauses(name: str, seconds: float) -> Fault:
    """Stop a process and all that it started, and let it go on."""

    def pause(bench: Bench, run: str) -> None:
        bench.signal_all(name, signal.SIGSTOP)
        try:
            time.sleep(seconds)
        finally:
            bench.signal_all(name, signal.SIGCONT)

    return pause


def stays_away(bench: Bench, run: str) -> Callable[[], None]:
    """A site is killed and does not come back before the run has ended."""
    bench.held.add("site-3")
    bench.signal_all("site-3", signal.SIGKILL)
    return lambda: bench.held.discard("site-3")


KILL, TERM = signal.SIGKILL, signal.SIGTERM
CASES = [
    Case("kill", "SIGKILL of a SuperNode, started again at once with the same key", ends("site-3", KILL)),
    Case("kill", "SIGKILL of a ClientApp", ends_child("site-3", "flwr-clientapp")),
    Case("kill", "SIGKILL of a site's SuperExec", ends_child("site-3", "flwr-superexec")),
    Case("kill", "SIGKILL of a site's fork server", ends_child("site-3", "forkserver")),
    Case(
        "kill", "SIGKILL of a SuperNode that stays away, min-sites 2", stays_away, config={"min-sites": 2}, same=False
    ),
    Case("kill", "SIGKILL of the ServerApp", ends_child("serverapp", "flwr-serverapp")),
    Case("kill", "SIGKILL of the SuperExec", ends("serverapp", KILL)),
    Case("kill", "SIGKILL of the SuperExec and its ServerApp", lambda bench, run: bench.signal_all("serverapp", KILL)),
    Case("kill", "SIGKILL of the SuperLink, started again with its database", ends("superlink", KILL)),
    Case("term", "SIGTERM to a SuperNode, instant restart", ends("site-3", TERM)),
    Case("term", "SIGTERM to a ClientApp", ends_child("site-3", "flwr-clientapp", TERM)),
    Case("term", "SIGTERM to the SuperExec, instant restart", ends("serverapp", TERM)),
    Case("term", "SIGTERM to the SuperLink, instant restart", ends("superlink", TERM)),
    Case("pause", "a site paused for 20 s", pauses("site-3", 20)),
    Case("pause", "the SuperLink paused for 20 s", pauses("superlink", 20)),
    Case("pause", "a site paused for 90 s", pauses("site-3", 90), most=3),
    Case("pause", "the SuperLink paused for 90 s", pauses("superlink", 90), most=3),
]
