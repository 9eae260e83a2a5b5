"""How far long work is: a bar where a person sits at a terminal, and a line now and then where nobody does.

Enters: steps as they are done. Leaves: on standard error a bar, which goes when the work is done; without a terminal no
line in the first EVERY seconds, then one every EVERY: `drawing  3/8, 41 s`. Standard output has the results alone, and
is a terminal too where there is a bar: else what is read from a pipe and the bar would stand in each other's way.
Errors: none.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

EVERY = 10.0  # seconds
Step = TypeVar("Step")


class Bar:
    """total: steps; None where nobody knows how many. lines: not where the work tells of itself in lines of its own."""

    def __init__(
        self,
        what: str,
        total: int | None = None,
        out: TextIO | None = None,
        lines: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.lines, self.clock = what, total, lines, clock
        self.out = out or sys.stderr
        self.began = self.told = clock()
        self.shown = shown(self.out) if self.out.isatty() and sys.stdout.isatty() else None

    def __enter__(self) -> Self:
        if self.shown:
            self.task = self.shown.add_task(self.what, total=self.total)
            self.shown.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.shown:
            self.shown.stop()

    def to(self, done: int, total: int | None = None) -> None:
        """So many steps are done, of `total` where that is known only now."""
        self.total = total or self.total
        if self.shown:
            self.shown.update(self.task, completed=done, total=self.total)
        elif self.lines and (now := self.clock()) - self.told >= EVERY:
            self.told = now
            of = f"/{self.total}" if self.total else ""
            print(f"{self.what}  {done}{of}, {now - self.began:.0f} s", file=self.out, flush=True)


def shown(out: TextIO) -> Progress:
    """rich's bar; what is printed meanwhile stands above it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(file=out), transient=True)


def steps(what: str, work: Iterable[Step], total: int | None = None, out: TextIO | None = None) -> Iterator[Step]:
    """The same steps, counted as each is done. total: where `work` has no length."""
    with Bar(what, len(work) if isinstance(work, Sized) else total, out) as bar:
        for number, step in enumerate(work, start=1):
            yield step
            bar.to(number)
