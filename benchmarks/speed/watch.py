"""A deployment's processes, looked at from outside: memory of each site, when each message's process began, CPU while
idle.

Enters: the process groups that _deployment.Processes started, by name. Every process of one of them has its session id.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
MESSAGE = "flwr-clientapp"  # the name of a message's process


class Process:
    """One line of /proc/PID/stat. Errors: OSError when it has ended."""

    def __init__(self, pid: int) -> None:
        name, _, rest = (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")
        fields = rest.split()
        self.pid, self.name, self.session = pid, name.partition("(")[2], int(fields[3])
        self.parent = int(fields[1])
        self.cpu, self.began = (
            (int(fields[11]) + int(fields[12])) / TICKS,
            int(fields[19]) / TICKS - time.clock_gettime(time.CLOCK_BOOTTIME) + time.time(),
        )

    def megabytes(self, file: str, key: str) -> float:
        """A line of kB of /proc/PID/`file`, in MB."""
        for line in (Path("/proc") / str(self.pid) / file).read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024 / 1e6
        return 0.0


def memory_mb(key: str) -> float:
    """This process's line of /proc/self/status, in MB: VmRSS now, VmHWM at most since it began (getrusage's is
    inherited from its parent).
    """
    return Process(os.getpid()).megabytes("status", key)


def processes(sessions: Mapping[int, str]) -> Iterator[tuple[str, Process]]:
    """(name, process) for all that live in these sessions."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                process = Process(int(entry.name))
            except OSError:
                continue
            if process.session in sessions:
                yield sessions[process.session], process


class Watch(threading.Thread):
    """Looks five times a second until stop(): peaks in MB, and when the processes of messages began."""

    def __init__(self, sessions: Mapping[int, str]) -> None:
        super().__init__(daemon=True)
        self.sessions, self.ended = dict(sessions), threading.Event()
        self.message_mb: dict[str, float] = {}  # largest resident memory of one message's process (VmHWM), by site
        # largest memory of all of a site's or the hub's processes, shared pages once (PSS)
        self.whole_mb: dict[str, float] = {}
        self.began: dict[str, dict[int, float]] = {}  # name -> pid -> time

    def run(self) -> None:
        look = 0
        while not self.ended.wait(0.2):
            look += 1
            whole: dict[str, float] = {}
            living = list(processes(self.sessions))
            working = {process.pid for _, process in living if process.name == MESSAGE}
            for name, process in living:
                try:
                    # what one starts has its name until it is another program
                    if process.pid in working and process.parent not in working:
                        self.began.setdefault(name, {})[process.pid] = process.began
                        self.message_mb[name] = max(
                            self.message_mb.get(name, 0.0), process.megabytes("status", "VmHWM")
                        )
                    if look % 10 == 0:  # the kernel walks every page for this one
                        whole[name] = whole.get(name, 0.0) + process.megabytes("smaps_rollup", "Pss")
                except OSError:
                    continue
            for name, now in whole.items():
                self.whole_mb[name] = max(self.whole_mb.get(name, 0.0), now)

    def stop(self) -> None:
        self.ended.set()
        self.join()


def idle_cpu(sessions: Mapping[int, str], seconds: float) -> dict[str, float]:
    """CPU use by name over `seconds`, in percent of one core."""

    def now() -> dict[str, float]:
        total = dict.fromkeys(sessions.values(), 0.0)
        for name, process in processes(sessions):
            total[name] += process.cpu
        return total

    before = now()
    time.sleep(seconds)
    return {name: 100 * (cpu - before[name]) / seconds for name, cpu in now().items()}
