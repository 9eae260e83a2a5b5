"""The hub's list of sites, asked for in the background, so that no page waits for the hub.

Enters: the SuperLink's Control API, by the connection that flwr uses. Leaves: `Known`. Errors: none; a hub that does
not answer is said.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from app.errors import BouquetError
from bouquet.hub import roster

EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Known:
    """The latest answer, None before there was one; why there is no newer one; when it came (time.time)."""

    sites: tuple[roster.Site, ...] | None = None
    trouble: str = ""
    at: float = 0.0


class Sites:
    """Asks until it is closed: `with Sites() as sites: sites.now()`."""

    def __init__(self, every: float = EVERY) -> None:
        self.every, self.known, self.closed = every, Known(), threading.Event()
        self.thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Sites:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()

    def now(self) -> Known:
        return self.known

    def _ask(self) -> None:
        while not self.closed.is_set():
            try:
                self.known = Known(tuple(roster.registered()), "", time.time())
            except BouquetError as error:
                self.known = Known(self.known.sites, error.headline, self.known.at)
            self.closed.wait(self.every)
