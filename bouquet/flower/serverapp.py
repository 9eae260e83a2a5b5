"""Flower's SuperExec of the hub, which keeps a run's task until the run's own process can speak for itself.

Who takes a task from the SuperLink has 30 s to be heard again. Flower's SuperExec takes it and starts a process,
which is heard when Python and its libraries are loaded; where that lasts longer, on a slow disk or a busy host, the
SuperLink gives the task out again, to another process that is as late, and so for ever. Here the SuperExec says every
BEAT seconds that the task is being worked on, until its process says that it begins, or has died, or LONGEST has
passed. torch is loaded before that: while the system's loader brings it in, no other thread of that process runs, and
it would be as silent in the run as before it.

Enters: flower-superexec's own arguments. Leaves: its exit code.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

RUN = "flwr-serverapp"  # Flower's command for a run's process; here the first argument of one
BEAT = 10.0  # seconds between two signs of life
LONGEST = 1800.0  # seconds after which a process that does not begin has failed


# --- in a run's process -----------------------------------------------------------------------------------------------


def serve(started: int, arguments: list[str]) -> None:
    """A run: torch and Flower, then what Flower's command does; closing `started` says that it begins."""
    from bouquet.flower import seams, superexec

    superexec.hush()
    ctypes.CDLL(None).prctl(superexec.PR_SET_NAME, RUN.encode())  # its name in ps and top
    gc.set_threshold(100_000)  # a million objects of the libraries stay: to look through them is a tenth of its start
    import torch  # noqa: F401
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    if os.getppid() != superexec.parent_of(arguments):
        sys.exit(1)  # nobody kept the task: it is, or will be, another process's
    seams.take(seams.SERVERAPPS_INSTALL, superexec.quietly)
    sys.argv = [RUN, *arguments]
    os.close(started)
    flwr_serverapp()


# --- in the SuperExec -------------------------------------------------------------------------------------------------


class Runs:
    """A process a run, which ends with it."""

    command = RUN

    def __init__(self) -> None:
        self.run, self.alive = 0, list[subprocess.Popen[bytes]]()

    def start(self, arguments: list[str]) -> None:
        mine, theirs = os.pipe()
        command = [sys.executable, "-m", "bouquet.flower.serverapp", RUN, str(theirs), *arguments]
        nowhere = subprocess.DEVNULL  # as Flower does: it is in the run's log
        self.alive.append(subprocess.Popen(command, pass_fds=[theirs], stdout=nowhere, stderr=nowhere))
        os.close(theirs)
        threading.Thread(target=keep, args=(mine, cache(lambda: speaker(options(arguments)))), daemon=True).start()

    def tidy(self) -> None:
        self.alive = [process for process in self.alive if process.poll() is None]

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def keep(started: int, speak: Callable[[], Callable[[], object]]) -> None:
    """Say that the task is being worked on, until its process closes its end of `started`; dying, it does so, too."""
    end = time.monotonic() + LONGEST
    try:
        while not select.select([started], [], [], BEAT)[0] and time.monotonic() < end:
            try:
                speak()()
            except Exception as error:  # no answer of any kind: the next one may be better
                print(f"bouquet: no sign of life for a run that starts ({type(error).__name__})", flush=True)
    finally:
        os.close(started)


def speaker(run: argparse.Namespace) -> Callable[[], object]:
    """Tells the SuperLink that a run's task is being worked on, in the name of the process that it was given to."""
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    version, token = RuntimeVersionHttpInterceptor(component_name=RUN), RuntimeTokenHttpInterceptor(run.token)
    authority = run.root_certificates and Path(run.root_certificates).read_bytes()
    client = RuntimeHttpClient.from_server_address(run.address, run.insecure, authority, [version, token])
    return lambda: client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


def options(arguments: list[str]) -> argparse.Namespace:
    """What Flower's SuperExec tells a run's process."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--runtime-api-address", dest="address", required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--root-certificates")
    return parser.parse_known_args(arguments)[0]


def main() -> None:
    if sys.argv[1:2] == [RUN]:
        return serve(int(sys.argv[2]), sys.argv[3:])
    from bouquet.flower import seams, superexec

    superexec.hush()
    from flwr.supercore.cli.flower_superexec import flower_superexec

    seams.begin(lambda: seams.hold(seams.SERVERAPPS_INSTALL), lambda: superexec.adopt(Runs()))
    flower_superexec()


if __name__ == "__main__":
    main()
