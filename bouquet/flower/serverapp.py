"""Flower's SuperExec of the hub: a run's process is forked from one that has the libraries in memory.

Who takes a task from the SuperLink has 30 s to be heard again. Flower's SuperExec takes it and starts a process, which
is heard when Python and its libraries are loaded; where that lasts longer, on a slow disk or a busy host, the SuperLink
gives the task out again, to another process that is as late, and so for ever. Here a task is asked for when the
libraries are there, and its process speaks at once. They are those of a site (libraries.py), for the hub starts
adapters and draws, and so is the fork server (superexec.py); a run's process ends with it.

Enters: flower-superexec's own arguments. Leaves: its exit code.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import sys
import time

from bouquet.flower import seams, superexec

RUN = "flwr-serverapp"  # Flower's command for a run's process
COMMAND = "flwr.superlink.cli.flwr_serverapp"  # where it is


def serve(arguments: list[str]) -> None:
    """In a run's process: what Flower's command does. What it prints is in the run's log, and nowhere else."""
    superexec.settle(RUN)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    from flwr.superlink.cli.flwr_serverapp import flwr_serverapp

    seams.take(seams.SERVERAPPS_INSTALL, superexec.quietly)
    sys.argv = [RUN, *arguments]
    flwr_serverapp()


class Runs:
    """In the SuperExec: a process a run."""

    command = RUN

    def __init__(self, fork: multiprocessing.context.ForkServerContext) -> None:
        self.fork, self.run = fork, 0

    def start(self, arguments: list[str]) -> None:
        superexec.child(self.fork, serve, arguments)

    def tidy(self) -> None:
        multiprocessing.active_children()  # reaps those that have ended

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def main() -> None:
    superexec.hush()
    from flwr.supercore.cli.flower_superexec import flower_superexec

    runs = Runs(superexec.server(COMMAND))
    seams.begin(lambda: seams.hold(seams.SERVERAPPS_INSTALL), lambda: superexec.adopt(runs))
    flower_superexec()


if __name__ == "__main__":
    main()
