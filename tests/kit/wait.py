"""Waiting for what happens: a line, a file, a process's end. No tight clock, since others may have the processor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")
PATIENT = 900.0  # seconds: nothing that works takes as long, however busy the machine is


def until(
    what: Callable[[], Found],
    why: Callable[[], object] = lambda: "it did not happen",
    over: Callable[[], bool] = lambda: False,
    every: float = 0.1,
) -> Found:
    """The first true answer of `what`. Fails with `why` once `over` says that it cannot come any more (a process has
    ended, for instance), and after PATIENT seconds.
    """
    end = time.monotonic() + PATIENT
    while True:
        last = over() or time.monotonic() > end  # what happened before that still counts
        if found := what():
            return found
        assert not last, why()
        time.sleep(every)
