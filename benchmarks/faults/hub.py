"""A hub that is being watched: its runs are started and judged over the Control API, and what it writes is read from
its volume.

Whether hub and sites are processes (bench.py) or containers (containers.py) does not matter here.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from benchmarks import check
from benchmarks.control import Control
from bouquet import ROOT

LIMIT = 420  # seconds in which a run must have ended, whatever happened to it
BACK = 150  # seconds in which every site must be online again


class Late(Exception):
    """Something did not happen in its time."""


class Hub(Control, ABC):
    """What both kinds of deployment have in common."""

    sites: Mapping[str, Path]  # name -> data folder
    caches: Mapping[str, Path]  # site -> its cache, where its journal lies
    config: Mapping[str, object] = {}  # what every run here has, whatever is asked of it

    def start_run(self, config: Mapping[str, Any], app: Path | None = None) -> str:
        return super().start_run({**config, **self.config}, app)

    @abstractmethod
    def up(self) -> None:
        """Start the hub and the sites."""

    @abstractmethod
    def down(self) -> None:
        """End all that runs, whatever state it is in."""

    @abstractmethod
    def log(self, name: str) -> str:
        """All that a part of the deployment has printed so far."""

    def __enter__(self) -> Self:
        try:
            self.up()
            self.all_online()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def until(self, what: Callable[[], object], seconds: float, name: str, pause: float = 0.1) -> object:
        """The first true answer of `what`. Errors: Late."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := what():
                return found
            time.sleep(pause)
        raise Late(f"{name}: not within {seconds:.0f} s")

    def all_online(self, seconds: float = BACK) -> None:
        def online() -> bool:
            return self.online() == len(self.sites)

        self.until(online, seconds, "every site online", pause=1.0)

    def wait_for_end(self, run: str, seconds: float = LIMIT) -> str:
        """The state in which a run ended. Errors: Late."""

        def ended() -> str:
            state = self.state(run)
            return state if state.startswith("finished") else ""

        return str(self.until(ended, seconds, f"run {run}'s end", pause=1.0))

    def mid_round(self, run: str, number: int, site: str = "site-3") -> None:
        """Wait until that site works on round `number`: its ClientApp has read the photos, and trains."""

        def waiting() -> bool:
            said = self.said(run)
            return (said.get("round"), said.get("state")) == (number, "waiting")

        self.until(waiting, LIMIT, f"round {number}")
        own = f"bouquet: {site}: "  # how its two lines a message begin: what it has read, what has come of it
        heard = self.log(site).count(own)
        self.until(lambda: self.log(site).count(own) > heard, LIMIT, f"{site} at work in round {number}")

    def evidence(self, run: str, **other) -> check.Evidence:
        return check.Evidence(self.adapters / run, self.caches, ROOT / "models", **other)
