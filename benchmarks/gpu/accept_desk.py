"""A check's desk in `scripts/bench accept`: its time, its processes, and how it says that something is wrong.

Enters: the world (accept_world.py) and seconds. Leaves: answers of commands and of accept_child.py's work. What it
waits for ends with its time, what it started ends with it. Errors: Late, Wrong.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bouquet import ROOT

if TYPE_CHECKING:
    from benchmarks.gpu.accept_world import World

Some = TypeVar("Some")
LOOK = 0.1  # seconds between two looks at something that is being waited for


class Late(Exception):
    """Something did not happen in its time; `str()` says what."""


class Wrong(Exception):
    """Something is not as it should be; `str()` says what was found."""


class Skip(Exception):
    """There is nothing to check here; `str()` says why."""


class Child(subprocess.Popen):
    """A process in a session of its own; `log` has what it says on stderr."""

    log: Path


def kill(process: subprocess.Popen) -> None:
    """A process and all that it started, at once."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Desk:
    """One check's time and processes: all it waits for ends with its time, and all it started ends with it."""

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.end = world, time.monotonic() + seconds
        self.all: list[Child] = []

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        for process in list(self.all):
            self.over(process)

    def left(self, most: float = 1e9) -> float:
        """Seconds that are left to it, at most `most`. Errors: Late where none are."""
        if self.world.closed:
            raise Late("the command is ending")
        if (left := self.end - time.monotonic()) <= 0:
            raise Late("its time is over")
        return min(left, most)

    def until(self, what: Callable[[], Some], seconds: float, name: str, look: float = LOOK) -> Some:
        """The first true answer, asked every `look` seconds. Errors: Late, with what was waited for."""
        seconds *= self.world.patience
        end = time.monotonic() + self.left(seconds)
        while not (found := what()):
            if time.monotonic() > end or self.world.closed:
                raise Late(f"{name}: not within {seconds:.0f} s")
            time.sleep(look)
        return found

    def wait(self, made: Future, name: str) -> Any:
        self.until(made.done, self.left(), name)
        return made.result()

    # --- processes
    # -----------------------------------------------------------------------------------------------------------

    def start(self, command: list[Any], cwd: Path = ROOT, env: Mapping[str, str] = {}) -> Child:
        with self.world.lock:
            if self.world.closed:
                raise Late("the command is ending")
            log = self.world.home / "logs" / f"{len(list((self.world.home / 'logs').iterdir()))}.log"
            with log.open("w") as errors:
                process = Child(
                    [str(part) for part in command], cwd=cwd, env=self.world.env() | env, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True,
                )  # fmt: skip
            process.log = log
            self.world.children.add(process)
            self.all.append(process)
        return process

    def command(
        self, command: list[Any], cwd: Path = ROOT, env: Mapping[str, str] = {}, codes: tuple[int, ...] = (0,)
    ) -> str:
        """What a command says on stdout. Errors: Wrong where it ends with another code; Late, and then it has been
        ended.
        """
        return self.answer(self.start(command, cwd, env), codes)

    def answer(self, process: Child, codes: tuple[int, ...] = (0,)) -> str:
        """What a process says on stdout until it ends. Errors: as command's."""
        try:
            said = process.communicate(timeout=self.left())[0]
        except subprocess.TimeoutExpired:
            raise Late(f"{named(process)} took too long") from None
        finally:
            self.over(process)
        if process.returncode not in codes:
            words = process.log.read_text(errors="replace").strip().splitlines()[-1:]
            raise Wrong(f"{named(process)} ended with {process.returncode}: {' '.join(words) or 'it said nothing'}")
        return said

    def begin(self, work: str, asked: Mapping[str, Any], env: Mapping[str, str] = {}) -> Child:
        """A piece of accept_child.py's work, in a process of its own."""
        return self.start([sys.executable, "-m", "benchmarks.gpu.accept_child", work, json.dumps(asked)], env=env)

    def child(self, work: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Its answer."""
        return last(self.answer(self.begin(work, asked)))

    def over(self, process: Child) -> None:
        """End it now, with all that it started; once, for its id may be another's later."""
        if process in self.world.children:
            kill(process)
            for pipe in (process.stdin, process.stdout):
                pipe.close()
            self.world.children.discard(process)


def named(process: Child) -> str:
    """A child's work, or a command's name."""
    program, *words = (str(word) for word in process.args)
    return " ".join(words[1:3] if words[:1] == ["-m"] else [Path(program).name, *words[:2]])


def last(said: str) -> dict[str, Any]:
    """The last line of a child's stdout, which is its answer."""
    return json.loads(said.strip().splitlines()[-1])
