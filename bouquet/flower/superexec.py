"""Flower's SuperExec of a SuperNode, with the libraries already in memory and one process for all messages of a run.

Flower starts a new process for every message. Importing torch, peft and diffusers takes that process 4 to 6 s, and on
a GPU the start of CUDA, the base model and the first kernels take it 20 s more, each round, before it trains. Here
they are imported once, Python's own fork server is forked from this process, and a run's first message forks a worker
from that, which takes the later messages of that run too, so that the app may keep in it what the next message needs
again (client_app.py says what). A worker

  - serves one run: another run's message gets a process of its own, and ends the worker if that is idle (it holds the
    GPU's memory);
  - ends when the app keeps nothing (the run's last message, an error), or after SITE_KEEP seconds without a message;
  - takes nobody along when it dies: the message that it had becomes an error reply, as Flower does it, the next one a
    fresh worker.

This process itself is forked from the SuperNode at its start (supernode.py), which has imported half of Flower by
then, and no key. The fork server holds the libraries (libraries.py) and no key, photo or model. Flower's log begins
with warnings in all of these processes (FLWR_LOG_LEVEL, which whoever starts them may set to INFO); app/quiet.py sees
to the rest where the app is.
Enters: flower-superexec's own arguments, from the SuperNode by a pipe; SITE_KEEP (300; 0 is a process a message).
Leaves: its exit code.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib
import io
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from functools import partial, wraps
from multiprocessing.connection import Connection, wait
from typing import Any

from bouquet import COLLECTED, ROOT
from bouquet.flower import seams

PR_SET_NAME = 15  # prctl(2)
LIBRARIES = "bouquet.flower.libraries"
NAME = "flwr-superexec"  # what ps and top show of this process, which has the SuperNode's command line
SERVER = "forkserver"  # what they show of that; the next one is `python -c "from multiprocessing.forkserver …"`
QUIET = "WARNING"
KEEP = 300.0  # seconds that a worker waits for its run's next message
TRIES = 40  # of a fork, LEAST seconds apart
# seconds between two questions to the SuperNode: a share of the time since there was work, at least LEAST
LEAST, SHARE = 0.05, 0.05

# A message is there before what is in it; Flower looks again after 1 s, 2 s, … up to 10, 500 times, for two hours at
# most.
SOON = {"initial_backoff": LEAST, "backoff_cap": 0.2, "max_tries_per_object": None}


def hush() -> None:
    """Flower's log from warnings on, unless somebody has said otherwise; Flower reads that when it is imported."""
    if "FLWR_LOG_LEVEL" not in os.environ:
        os.environ["FLWR_LOG_LEVEL"] = QUIET
        if logger := sys.modules.get("flwr.supercore.logger"):
            logger.update_console_handler(level=QUIET)


def quietly(install: Callable[..., Any]) -> Callable[..., Any]:
    """Flower's install_from_fab without a word, unless it fails: it says each time where."""

    @wraps(install)
    def silent(*args: Any, **kwargs: Any) -> Any:
        said = io.StringIO()
        try:
            with redirect_stdout(said):
                return install(*args, **kwargs)
        except BaseException:
            print(said.getvalue(), end="", flush=True)
            raise

    return silent


# --- the fork server --------------------------------------------------------------------------------------------------


def server(*more: str) -> multiprocessing.context.ForkServerContext:
    """The running fork server, which has the libraries and `more` modules: a message is asked for only when it can be
    worked on. Errors: those of the import.
    """
    fork, path = multiprocessing.get_context("forkserver"), os.environ.get("PYTHONPATH", "")
    for name in (LIBRARIES, *more):
        importlib.import_module(name)
    fork.set_forkserver_preload([LIBRARIES, *more])
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{path}".rstrip(os.pathsep)  # where a later one finds that module
    multiprocessing.resource_tracker.ensure_running()  # a Python of its own, too, and it stays one
    afresh = multiprocessing.util.spawnv_passfds
    multiprocessing.util.spawnv_passfds = forked  # type: ignore[assignment]  # it needs no path and no arguments
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        multiprocessing.util.spawnv_passfds, os.environ["PYTHONPATH"] = afresh, path
    return fork


def forked(_path: Any, _arguments: Any, descriptors: Sequence[int]) -> int:
    """In place of the multiprocessing function that starts the first fork server as a new Python, which would import
    all of that again: a fork of this process, which has one thread yet (those of NumPy's OpenBLAS end at a fork). When
    it is gone the next one is a new Python, as by then this process has more, which would leave their locks behind.
    """
    assert threading.active_count() == 1
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        ctypes.CDLL(None).prctl(PR_SET_NAME, SERVER.encode())
        least = 3  # none but the standard streams and its own: it ends when the last end of a pipe is closed
        for one in (*sorted(descriptors), os.sysconf("SC_OPEN_MAX")):
            os.closerange(least, one)
            least = one + 1
        # this process, which begins its server, has the lock for it; its copy here would be taken for ever
        vars(multiprocessing.forkserver._forkserver).update(vars(multiprocessing.forkserver.ForkServer()))
        listener, alive, *key = descriptors
        more: dict[str, Any] = {"authkey_r": key[0]} if key else {}  # since Python 3.14
        multiprocessing.forkserver.main(listener, alive, [], **more)
    except SystemExit:
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def child(
    fork: multiprocessing.context.ForkServerContext, does: Callable[..., None], *arguments: Any
) -> multiprocessing.context.ForkServerProcess:
    """A process from the fork server; where that dies in this moment, from the next one. Errors: OSError, EOFError
    where none answers for two seconds.
    """
    for left in reversed(range(TRIES)):
        process = fork.Process(target=does, args=arguments, daemon=True)
        try:
            process.start()
            break
        except (EOFError, OSError):  # it takes a while until it counts as dead, and another is begun
            if not left:
                raise
            time.sleep(LEAST)
    return process


# --- in a worker ------------------------------------------------------------------------------------------------------


def settle(name: str) -> None:
    """What a forked process does first; `name` is what ps and top show."""
    # the collector would write to every object of the libraries: 150 MB that stay shared with the fork server
    gc.freeze()
    gc.set_threshold(*COLLECTED)
    ctypes.CDLL(None).prctl(PR_SET_NAME, name.encode())


def work(orders: Connection, keep: bool) -> None:
    """Messages of one run, one after another, until the SuperExec hangs up; tells it after each whether there is a
    reason to wait.
    """
    settle("flwr-clientapp")
    os.environ["BOUQUET_KEEP"] = "1" if keep else ""
    stay()
    first = True
    while True:
        try:
            arguments, began = orders.recv()
        except EOFError:
            return
        os.environ["BOUQUET_BEGAN"] = str(began)
        message(arguments if first else watched_already(arguments))
        first = False
        orders.send(bool(getattr(sys.modules.get("app.site.client_app"), "kept", None)))


def message(arguments: list[str]) -> None:
    """One message: what Flower's command flwr-clientapp does, but for ending the process."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    sys.argv = ["flwr-clientapp", *arguments]
    flwr_clientapp()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)  # Flower's handlers answer for a message that is over


def stay() -> None:
    """From now on a message that is over does not end this process, and its objects are looked for soon."""
    from flwr.supercore.exit import exit_handler

    def without_end(flowers: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(flowers)
        def end(code: int, *_: Any, **__: Any) -> None:
            for early in (True, False):
                exit_handler.trigger_exit_handlers(run_before_force_exit=early)

        return end

    def take() -> None:
        seams.take(seams.CLIENTAPPS_EXIT, without_end)
        seams.take(seams.CLIENTAPPS_PULL, lambda pull: partial(pull, **SOON))
        seams.take(seams.CLIENTAPPS_INSTALL, quietly)

    seams.begin(take)


def watched_already(arguments: list[str]) -> list[str]:
    """Without --parent-pid: Flower starts a thread for it, which ends this process with the SuperExec, and one is
    enough.
    """
    at = arguments.index("--parent-pid")
    return arguments[:at] + arguments[at + 2 :]


# --- in the SuperExec -------------------------------------------------------------------------------------------------


class Worker:
    """A run's process, seen from the SuperExec."""

    def __init__(self, fork: multiprocessing.context.ForkServerContext, run: int, keep: bool) -> None:
        self.run, self.busy, self.since = run, False, time.monotonic()
        self.orders, theirs = multiprocessing.Pipe()
        self.process = child(fork, work, theirs, keep)
        theirs.close()

    def take(self, arguments: list[str]) -> None:
        """A message; with it the time, from which the app counts what it took. Errors: OSError when the process has
        died.
        """
        self.busy = True
        self.orders.send((arguments, time.monotonic()))

    def waits(self) -> bool:
        """Whether it lives and may get another message; looks for what it has said since it was last asked."""
        try:
            while self.orders.poll():
                self.busy, self.since = False, time.monotonic()
                if not self.orders.recv():
                    return False
        except (EOFError, OSError):
            return False
        return True

    def end(self) -> None:
        """Hang up: an idle one ends at once, a busy one with its message."""
        self.orders.close()


class Workers:
    """Of each run at most one that waits for messages."""

    command = "flwr-clientapp"

    def __init__(self, fork: multiprocessing.context.ForkServerContext, keep: float) -> None:
        self.fork, self.keep, self.alive = fork, keep, list[Worker]()
        self.run = 0  # of the message that comes next
        self.worked = time.monotonic()

    def start(self, arguments: list[str]) -> None:
        """A message of `self.run`: to its worker, else to a fresh one."""
        self.tidy()
        mine = next((worker for worker in self.alive if worker.run == self.run and not worker.busy), None)
        for other in [worker for worker in self.alive if worker is not mine and not worker.busy]:
            self._end(other)
        self.worked = time.monotonic()
        if mine is not None:
            try:
                return mine.take(arguments)
            except OSError:  # it died a moment ago
                self._end(mine)
        self.alive.append(Worker(self.fork, self.run, keep=self.keep > 0))
        self.alive[-1].take(arguments)

    def tidy(self) -> None:
        """End those that keep nothing, that have died, and that have waited too long."""
        multiprocessing.active_children()  # reaps those that have ended
        for worker in list(self.alive):
            if not worker.waits() or (not worker.busy and time.monotonic() - worker.since > self.keep):
                self._end(worker)

    def _end(self, worker: Worker) -> None:
        worker.end()
        self.alive.remove(worker)

    def sleep(self, seconds: float) -> None:
        """Between two questions for work: until a worker is done, else the sooner, the shorter ago there was some."""
        if busy := [worker.orders for worker in self.alive if worker.busy]:  # a SuperNode has one message at a time
            wait(busy, seconds)
            self.worked = time.monotonic()
        else:
            time.sleep(min(seconds, max(LEAST, SHARE * (time.monotonic() - self.worked))))


def adopt(workers: Any) -> None:
    """Put `workers`, a site's or the hub's, where Flower's SuperExec starts processes. Errors: FLWR-01."""
    from flwr.supercore.constant import TaskType

    class Forked:
        """In place of the module subprocess, for the one thing that Flower's executor does with it."""

        DEVNULL = None

        @staticmethod
        def Popen(command: list[str], **_: None) -> None:
            assert command[0] == workers.command, command
            workers.start(command[1:])

    class Clock:
        sleep = workers.sleep

    def of_a_run(launch: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launch)
        def launch_task(self: Any, token: str, task: Any) -> Any:
            workers.run = task.run_id
            return launch(self, token, task)

        return launch_task

    def reconcile(self: Any) -> None:
        workers.tidy()

    seams.take(seams.TASK_TYPES, lambda _: frozenset({TaskType(workers.command)}))  # no other is asked for
    seams.take(seams.LAUNCH_TASK, of_a_run)
    seams.take(seams.RECONCILE, lambda _: reconcile)
    seams.take(seams.EXECUTORS_PROCESS, lambda _: Forked)
    seams.take(seams.SUPEREXECS_CLOCK, lambda _: Clock)


def parent_of(arguments: list[str]) -> int:
    """The SuperNode's process, from Flower's --parent-pid; 0 where nobody has said it."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--parent-pid", type=int, default=0)
    return int(options.parse_known_args(arguments)[0].parent_pid)


def check() -> None:
    """In a process of its own: the fast part of the site's checks."""
    settle("bouquet-check")
    from bouquet.site import preflight

    os.chdir(ROOT)
    sys.exit(preflight.check(fast=True))


def ordered(fork: multiprocessing.context.ForkServerContext, supernode: Connection, checks: bool) -> list[str]:
    """Flower's arguments, from the SuperNode; where there are `checks`, once these have passed, and until then it does
    not go online. They need the libraries, which are here, and leave nothing in memory. Ends here where one fails, or
    the SuperNode is gone.
    """
    try:
        if checks:
            (checking := child(fork, check)).join()
            if checking.exitcode:
                sys.exit(1)
            supernode.send(True)
        arguments: list[str] = supernode.recv()
    except (OSError, EOFError):
        sys.exit(1)
    supernode.close()
    return arguments


def run(supernode: Connection, checks: bool) -> None:
    """In the process that the SuperNode has forked, from which on this is the main program."""
    ctypes.CDLL(None).prctl(PR_SET_NAME, NAME.encode())
    sys.modules["__main__"] = sys.modules[__name__]  # a worker asks which program it belongs to
    hush()
    from flwr.supercore.cli.flower_superexec import flower_superexec

    seams.begin(lambda: seams.hold(seams.CLIENTAPPS_EXIT, seams.CLIENTAPPS_PULL, seams.CLIENTAPPS_INSTALL))
    fork = server()
    sys.argv = ["flower-superexec", *ordered(fork, supernode, checks)]
    workers = Workers(fork, float(os.environ.get("SITE_KEEP") or KEEP))
    seams.begin(lambda: adopt(workers))
    if (parent := parent_of(sys.argv[1:])) and os.getppid() != parent:
        sys.exit(1)  # while the libraries were imported: else it took a message of the next SuperNode at this address
    flower_superexec()
